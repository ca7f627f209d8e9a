//! Pools of this process, by name: the durable part, which a crash leaves, and the session of who has one open.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use super::{folder::Folder, tree::Tree};
use crate::{
    delta::Partial,
    driver::{Access, Target},
    error::{Error, ErrorKind, Result},
    model::{HeldSnapshot, SnapshotKey, VolumeId, VolumeRecord},
};

static POOLS: Mutex<BTreeMap<String, Arc<MemoryPool>>> = Mutex::new(BTreeMap::new());

pub(super) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A pool in memory. It lives as long as the process, or until [`MemoryPool::discard`].
#[derive(Debug, Default)]
pub struct MemoryPool {
    /// What was committed.
    pub(super) disk: Mutex<Disk>,
    session: Mutex<Option<Arc<Session>>>,
}

/// What survives a crash.
#[derive(Debug, Default)]
pub(super) struct Disk {
    pub(super) volumes: BTreeMap<VolumeId, Volume>,
    pub(super) partials: BTreeMap<VolumeId, (Partial, Vec<u8>)>,
}

/// A volume.
#[derive(Debug)]
pub(super) struct Volume {
    pub(super) record: VolumeRecord,
    /// `None`: it is as its newest snapshot.
    pub(super) head: Option<Tree>,
    /// Its own, oldest first.
    pub(super) snapshots: Vec<Stored>,
}

/// A snapshot with its tree.
#[derive(Debug)]
pub(super) struct Stored {
    pub(super) held: HeldSnapshot,
    pub(super) tree: Tree,
}

/// What is lost with the process: who has the pool open, and what is open in it.
#[derive(Debug, Default)]
pub(super) struct Session {
    over: AtomicBool,
    pub(super) open: Mutex<Open>,
}

/// What is open in a session.
#[derive(Debug, Default)]
pub(super) struct Open {
    /// Heads that were written to and not synced.
    pub(super) heads: BTreeMap<VolumeId, Tree>,
    pub(super) receiving: BTreeSet<VolumeId>,
    pub(super) attached: BTreeMap<Target, Attached>,
    /// What a bug that was put back leaves to be lost.
    pub(super) not_durable: Vec<SnapshotKey>,
}

/// A path that was handed out.
#[derive(Debug)]
pub(super) struct Attached {
    pub(super) access: Access,
    pub(super) folder: Folder,
    /// The snapshot that it shows.
    pub(super) serves: Option<SnapshotKey>,
}

impl Session {
    pub(super) fn is_over(&self) -> bool {
        self.over.load(Ordering::SeqCst)
    }
}

/// A snapshot as a test looks at it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sight {
    /// The snapshot as held.
    pub held: HeldSnapshot,
    /// A digest of all that it holds.
    pub digest: [u8; 32],
}

/// A volume as a test looks at it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeSight {
    /// Its record.
    pub record: VolumeRecord,
    /// The digest of its head, with what was not synced yet.
    pub head: [u8; 32],
    /// Its own snapshots, oldest first.
    pub snapshots: Vec<Sight>,
    /// Whether programs may write to it now.
    pub in_use: bool,
}

impl MemoryPool {
    /// Returns the pool of a name, an empty one where there is none.
    pub fn named(name: &str) -> Arc<Self> {
        locked(&POOLS).entry(name.to_owned()).or_default().clone()
    }

    /// Forgets the pool of a name.
    pub fn discard(name: &str) {
        locked(&POOLS).remove(name);
    }

    /// Ends the session of who has it open, as a crash would: what was not committed is lost, and whatever that driver is
    /// asked from now on never comes to an end.
    pub fn crash(&self) {
        if let Some(session) = locked(&self.session).take() {
            session.over.store(true, Ordering::SeqCst);
            let open = std::mem::take(&mut *locked(&session.open));
            let mut disk = locked(&self.disk);
            for key in open.not_durable {
                if let Some(volume) = disk.volumes.get_mut(&key.volume) {
                    volume.snapshots.retain(|stored| stored.held.snapshot.id != key.snapshot);
                }
            }
        }
    }

    /// Writes (`Some`) or removes (`None`) a file in the root of a head, as a program would that has it mounted. False when the
    /// pool is not open or has no such volume.
    pub fn write(&self, volume: VolumeId, name: &str, contents: Option<&[u8]>) -> bool {
        let Some(session) = locked(&self.session).clone() else { return false };
        let disk = locked(&self.disk);
        let mut open = locked(&session.open);
        open.absorb();
        let Ok(mut tree) = disk.head(&open, volume) else { return false };
        match contents {
            Some(contents) => tree.write(name, contents),
            None => tree.remove(name),
        }
        if let Some(attached) = open.attached.get(&Target::Head(volume)) {
            let path = attached.folder.path().join("tree");
            super::folder::remove(&path);
            if super::folder::export(&tree, &path).is_err() {
                return false;
            }
        }
        open.heads.insert(volume, tree);
        true
    }

    /// Shows all volumes.
    pub fn look(&self) -> Vec<VolumeSight> {
        let session = locked(&self.session).clone().unwrap_or_default();
        let disk = locked(&self.disk);
        let open = locked(&session.open);
        let volumes = disk.volumes.iter().map(|(id, volume)| VolumeSight {
            record: volume.record.clone(),
            head: disk.head(&open, *id).unwrap_or_default().digest(),
            snapshots: volume
                .snapshots
                .iter()
                .map(|stored| Sight { held: stored.held.clone(), digest: stored.tree.digest() })
                .collect(),
            in_use: open.attached.get(&Target::Head(*id)).is_some_and(|it| it.access == Access::ReadWrite),
        });
        volumes.collect()
    }

    pub(super) fn open(&self, name: &str) -> Result<Arc<Session>> {
        let mut current = locked(&self.session);
        if current.is_some() {
            let busy = ErrorKind::PoolBusy { pid: Some(std::process::id()) };
            return Err(Error::new("open pool", name, busy));
        }
        let session = Arc::new(Session::default());
        *current = Some(session.clone());
        Ok(session)
    }

    /// Ends a session in order: what programs wrote is synced.
    pub(super) fn close(&self, session: &Arc<Session>) {
        let mut current = locked(&self.session);
        if session.is_over() || !current.as_ref().is_some_and(|it| Arc::ptr_eq(it, session)) {
            return;
        }
        *current = None;
        let mut open = std::mem::take(&mut *locked(&session.open));
        let mut disk = locked(&self.disk);
        open.absorb();
        disk.sync(&mut open);
    }
}

impl Open {
    /// Reads back what was written into folders that were handed out.
    pub(super) fn absorb(&mut self) {
        for (target, attached) in &self.attached {
            if let (Target::Head(volume), Access::ReadWrite) = (target, attached.access)
                && let Ok(tree) = super::folder::import(&attached.folder.path().join("tree"))
            {
                self.heads.insert(*volume, tree);
            }
        }
    }
}

impl Disk {
    pub(super) fn volume(&self, operation: &'static str, volume: VolumeId) -> Result<&Volume> {
        self.volumes.get(&volume).ok_or_else(|| Error::new(operation, volume, ErrorKind::NotFound))
    }

    pub(super) fn stored(&self, operation: &'static str, key: SnapshotKey) -> Result<&Stored> {
        let own = self.volumes.get(&key.volume).into_iter().flat_map(|volume| &volume.snapshots);
        let mut own = own.filter(|stored| stored.held.snapshot.id == key.snapshot);
        own.next().ok_or_else(|| Error::new(operation, key.snapshot, ErrorKind::NotFound))
    }

    /// Returns the newest snapshot of a volume, or that which it was cloned from.
    pub(super) fn tip(&self, volume: VolumeId) -> Option<&Stored> {
        let volume = self.volumes.get(&volume)?;
        match volume.snapshots.last() {
            Some(newest) => Some(newest),
            None => self.stored("", volume.record.origin?).ok(),
        }
    }

    /// Returns the head as programs see it.
    pub(super) fn head(&self, open: &Open, volume: VolumeId) -> Result<Tree> {
        if let Some(tree) = open.heads.get(&volume) {
            return Ok(tree.clone());
        }
        match &self.volume("read head of", volume)?.head {
            Some(tree) => Ok(tree.clone()),
            None => Ok(self.tip(volume).map(|tip| tip.tree.clone()).unwrap_or_default()),
        }
    }

    pub(super) fn is_clean(&self, open: &Open, volume: VolumeId) -> Result<bool> {
        let head = self.head(open, volume)?;
        Ok(match self.tip(volume) {
            Some(tip) => tip.tree == head,
            None => head.is_empty(),
        })
    }

    /// Makes durable what was written to heads.
    pub(super) fn sync(&mut self, open: &mut Open) {
        for (volume, tree) in std::mem::take(&mut open.heads) {
            if let Some(volume) = self.volumes.get_mut(&volume) {
                volume.head = Some(tree);
            }
        }
    }
}
