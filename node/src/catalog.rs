//! What the pool holds, by name: volumes and their snapshots as last read from the driver, and who works on which.
//!
//! Owns the uniqueness of names on this node and one lock per volume. Refuses to be a second truth: it is filled by the
//! driver's scan and refreshed from the driver's answers; nothing of it is stored.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use flocker_storage::{
    driver::{Driver, Orphan},
    error::Result as StorageResult,
    model::{HeldSnapshot, SnapshotId, SnapshotKey, SnapshotName, VolumeId, VolumeName, VolumeRecord},
};
use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard};

use crate::{
    api::events::Event,
    events::Events,
    problem::{self, Result},
};

/// A volume with its own snapshots, oldest first.
#[derive(Debug, Clone)]
pub(crate) struct Volume {
    /// Its record.
    pub(crate) record: VolumeRecord,
    /// Its own snapshots.
    pub(crate) snapshots: Vec<Arc<HeldSnapshot>>,
}

impl Volume {
    pub(crate) fn new(record: VolumeRecord, snapshots: Vec<HeldSnapshot>) -> Self {
        Self { record, snapshots: snapshots.into_iter().map(Arc::new).collect() }
    }

    /// Finds a snapshot of the volume's own by name.
    pub(crate) fn snapshot(&self, name: &SnapshotName) -> Result<&HeldSnapshot> {
        self.snapshots
            .iter()
            .find(|held| held.snapshot.name == *name)
            .map(Arc::as_ref)
            .ok_or_else(|| problem::snapshot_not_found(&self.record.name, name))
    }
}

#[derive(Default)]
struct Contents {
    volumes: BTreeMap<VolumeId, Volume>,
    names: BTreeMap<VolumeName, VolumeId>,
    reserved: BTreeSet<VolumeName>,
    orphans: Vec<Orphan>,
    locks: HashMap<VolumeId, Arc<AsyncMutex<()>>>,
}

/// The catalogue of one pool.
pub(crate) struct Catalog {
    contents: Mutex<Contents>,
    events: Arc<Events>,
}

/// A name held for a volume that is being made. Dropping it gives the name back, unless the volume has been put in.
pub(crate) struct Reservation<'a> {
    catalog: &'a Catalog,
    name: VolumeName,
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        self.catalog.lock().reserved.remove(&self.name);
    }
}

impl Catalog {
    /// Makes an empty catalogue, which tells what changes in it.
    pub(crate) fn new(events: Arc<Events>) -> Self {
        Self { contents: Mutex::default(), events }
    }

    fn lock(&self) -> MutexGuard<'_, Contents> {
        self.contents.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads everything from the driver, before anybody works on anything. Where two volumes have one name, the one made later is shown as
    /// `NAME.SHORTID`; its record is left as it is.
    pub(crate) async fn reload(&self, driver: &dyn Driver) -> StorageResult<()> {
        let scan = driver.scan().await?;
        let mut contents = self.lock();
        contents.volumes.clear();
        contents.names.clear();
        contents.orphans = scan.orphans;
        for (mut record, snapshots) in scan.volumes {
            if contents.names.contains_key(&record.name) {
                let shown = format!("{:.100}.{}", record.name.as_str(), record.id.short());
                tracing::warn!(name = %record.name, id = %record.id, %shown, "two volumes have one name");
                if let Ok(shown) = shown.parse() {
                    record.name = shown;
                }
            }
            contents.names.insert(record.name.clone(), record.id);
            contents.volumes.insert(record.id, Volume::new(record, snapshots));
        }
        Ok(())
    }

    /// Lists all volumes by name.
    pub(crate) fn volumes(&self) -> Vec<Volume> {
        let contents = self.lock();
        contents.names.values().filter_map(|id| contents.volumes.get(id)).cloned().collect()
    }

    /// Lists what nobody knows.
    pub(crate) fn orphans(&self) -> Vec<Orphan> {
        self.lock().orphans.clone()
    }

    /// Finds a volume by name.
    pub(crate) fn find(&self, name: &VolumeName) -> Result<Volume> {
        let contents = self.lock();
        let found = contents.names.get(name).and_then(|id| contents.volumes.get(id));
        found.cloned().ok_or_else(|| problem::volume_not_found(name))
    }

    /// Finds a volume by id.
    pub(crate) fn get(&self, id: VolumeId) -> Option<Volume> {
        self.lock().volumes.get(&id).cloned()
    }

    /// Finds a volume's record by its id.
    pub(crate) fn record(&self, id: VolumeId) -> Option<VolumeRecord> {
        self.lock().volumes.get(&id).map(|volume| volume.record.clone())
    }

    /// Tells how many snapshots of its own a volume has, and which is the newest: what any change of them changes.
    pub(crate) fn extent(&self, id: VolumeId) -> Option<(usize, Option<SnapshotId>)> {
        let contents = self.lock();
        let snapshots = &contents.volumes.get(&id)?.snapshots;
        Some((snapshots.len(), snapshots.last().map(|held| held.snapshot.id)))
    }

    /// Finds which of some snapshots are held by other volumes than one.
    pub(crate) fn elsewhere(&self, wanted: &BTreeSet<SnapshotId>, but: VolumeId) -> Vec<SnapshotKey> {
        let contents = self.lock();
        let others = contents.volumes.values().filter(|volume| volume.record.id != but);
        let held = others.flat_map(|volume| volume.snapshots.iter());
        held.filter(|held| wanted.contains(&held.snapshot.id)).map(|held| held.key()).collect()
    }

    /// Finds the volumes cloned from snapshots of a volume.
    pub(crate) fn clones_of(&self, volume: VolumeId) -> Vec<VolumeId> {
        let contents = self.lock();
        let records = contents.volumes.values().map(|known| &known.record);
        records
            .filter(|record| record.origin.is_some_and(|origin| origin.volume == volume))
            .map(|record| record.id)
            .collect()
    }

    /// Shows a snapshot as `volume@snapshot`, where it is known.
    pub(crate) fn display(&self, key: SnapshotKey) -> Option<String> {
        let contents = self.lock();
        let volume = contents.volumes.get(&key.volume)?;
        let held = volume.snapshots.iter().find(|held| held.snapshot.id == key.snapshot)?;
        Some(format!("{}@{}", volume.record.name, held.snapshot.name))
    }

    /// Holds a free name for a volume that is being made.
    pub(crate) fn reserve(&self, name: &VolumeName) -> Result<Reservation<'_>> {
        let mut contents = self.lock();
        if contents.names.contains_key(name) || !contents.reserved.insert(name.clone()) {
            return Err(problem::volume_exists(name));
        }
        Ok(Reservation { catalog: self, name: name.clone() })
    }

    /// Puts in a volume's new state.
    pub(crate) fn put(&self, volume: Volume) {
        let mut contents = self.lock();
        let id = volume.record.id;
        contents.names.retain(|_, known| *known != id);
        contents.names.insert(volume.record.name.clone(), id);
        let before = contents.volumes.insert(id, volume.clone());
        self.events.compare(before.as_ref(), Some(&volume));
    }

    /// Adds a snapshot to the volume that holds it.
    pub(crate) fn add_snapshot(&self, held: HeldSnapshot) {
        if let Some(volume) = self.lock().volumes.get_mut(&held.volume) {
            volume.snapshots.retain(|known| known.snapshot.id != held.snapshot.id);
            self.events.tell(Event::SnapshotAdded {
                volume: volume.record.name.clone(),
                snapshot: held.snapshot.name.clone(),
                host: held.snapshot.host.name.clone(),
            });
            volume.snapshots.push(Arc::new(held));
        }
    }

    /// Notes that the snapshots behind `keep` went into the volume `fork` (or, without one, were destroyed), and that
    /// clones of them follow.
    pub(crate) fn split(&self, keep: SnapshotKey, fork: Option<VolumeRecord>) {
        let mut contents = self.lock();
        let Some(volume) = contents.volumes.get_mut(&keep.volume) else { return };
        let kept = volume.snapshots.iter().position(|held| held.key() == keep).map_or(0, |at| at + 1);
        let before = volume.clone();
        let mut moved = volume.snapshots.split_off(kept);
        self.events.compare(Some(&before), Some(volume));
        let Some(record) = fork else { return };
        for held in &mut moved {
            let from = held.key();
            Arc::make_mut(held).volume = record.id;
            let clones = contents.volumes.values_mut().filter(|other| other.record.origin == Some(from));
            clones.for_each(|clone| clone.record.origin = Some(held.key()));
        }
        contents.names.insert(record.name.clone(), record.id);
        let fork = Volume { record, snapshots: moved };
        self.events.compare(None, Some(&fork));
        contents.volumes.insert(fork.record.id, fork);
    }

    /// Takes a snapshot out.
    pub(crate) fn remove_snapshot(&self, key: SnapshotKey) {
        if let Some(volume) = self.lock().volumes.get_mut(&key.volume)
            && let Some(at) = volume.snapshots.iter().position(|held| held.snapshot.id == key.snapshot)
        {
            let gone = volume.snapshots.remove(at).snapshot.name.clone();
            self.events.tell(Event::SnapshotRemoved { volume: volume.record.name.clone(), snapshot: gone });
        }
    }

    /// Takes a volume out.
    pub(crate) fn remove(&self, id: VolumeId) {
        let mut contents = self.lock();
        contents.names.retain(|_, known| *known != id);
        let gone = contents.volumes.remove(&id);
        contents.locks.remove(&id);
        self.events.compare(gone.as_ref(), None);
    }

    /// Waits until nobody else works on a volume. What was read of it before must be read again.
    pub(crate) async fn work_on(&self, id: VolumeId) -> OwnedMutexGuard<()> {
        let lock = self.lock().locks.entry(id).or_default().clone();
        lock.lock_owned().await
    }

    /// Waits until nobody else works on the volume of a name, and returns it as it is then.
    pub(crate) async fn claim(&self, name: &VolumeName) -> Result<(Volume, OwnedMutexGuard<()>)> {
        loop {
            let id = self.find(name)?.record.id;
            let guard = self.work_on(id).await;
            let volume = self.find(name)?;
            if volume.record.id == id {
                return Ok((volume, guard));
            }
        }
    }
}

/// Keeps snapshots from being destroyed while a transfer reads them or builds on them.
pub(crate) struct Pin {
    pins: Arc<Pins>,
    keys: Vec<SnapshotKey>,
}

/// Which snapshots are being read, and how often.
#[derive(Default)]
pub(crate) struct Pins {
    counts: Mutex<HashMap<SnapshotKey, usize>>,
}

impl Pins {
    /// Pins some snapshots until the value is dropped.
    pub(crate) fn pin(self: &Arc<Self>, keys: impl IntoIterator<Item = SnapshotKey>) -> Pin {
        let keys: Vec<SnapshotKey> = keys.into_iter().collect();
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        for key in &keys {
            *counts.entry(*key).or_default() += 1;
        }
        drop(counts);
        Pin { pins: self.clone(), keys }
    }

    /// Tells whether any snapshot of a volume is pinned.
    pub(crate) fn holds(&self, volume: VolumeId) -> bool {
        let counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        counts.keys().any(|key| key.volume == volume)
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        let mut counts = self.pins.counts.lock().unwrap_or_else(PoisonError::into_inner);
        for key in &self.keys {
            if let Some(count) = counts.get_mut(key) {
                *count -= 1;
                if *count == 0 {
                    counts.remove(key);
                }
            }
        }
    }
}
