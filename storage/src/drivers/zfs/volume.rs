//! A volume as it lies in the pool, and the volumes as they were seen last.
//!
//! To list a volume costs as much as it has snapshots, so what was listed is remembered. It holds until this process changes
//! the dataset ([`super::touches`]); the pool is locked, so nobody else publishes. What an operator destroys by hand is seen by whoever
//! asks for a lineage, which is read each time: each transfer begins with that. A verb that fails has all forgotten.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
};

use serde::{Deserialize, Serialize};

use super::{
    listing::Found,
    pool::{Pool, locked},
    snapshot::Totals,
    touches::Mark,
};
use crate::{
    driver::Orphan,
    error::{Error, ErrorKind, Result},
    model::{HeldSnapshot, Snapshot, SnapshotId, SnapshotKey, VolumeId, VolumeRecord},
};

/// A snapshot's record as kept on it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct StoredSnapshot {
    /// Grows along the volume's own snapshots; clocks do not order them.
    pub(super) sequence: u64,
    /// Whether nothing differs from its first parent.
    pub(super) unchanged: bool,
    /// The sum of the sizes of its regular files.
    pub(super) logical_bytes: u64,
    /// Its entries, the root included.
    pub(super) entries: u64,
    /// The snapshot as given.
    pub(super) snapshot: Snapshot,
}

impl StoredSnapshot {
    pub(super) fn totals(&self) -> Totals {
        Totals { entries: self.entries, logical_bytes: self.logical_bytes }
    }

    pub(super) fn held(self, volume: VolumeId) -> HeldSnapshot {
        let Self { unchanged, logical_bytes, snapshot, .. } = self;
        HeldSnapshot { snapshot, volume, unchanged, logical_bytes }
    }
}

/// A snapshot of a volume's dataset, ours or not.
#[derive(Debug, Clone)]
pub(super) struct Any {
    /// The part behind the `@`.
    pub(super) name: String,
    pub(super) guid: Option<u64>,
}

/// A volume as it lies in the pool.
#[derive(Debug, Clone)]
pub(super) struct Volume {
    pub(super) record: VolumeRecord,
    /// Of its dataset.
    pub(super) found: Found,
    /// Its own snapshots, oldest first.
    pub(super) snapshots: Vec<StoredSnapshot>,
    /// All snapshots of its dataset, oldest first.
    pub(super) all: Vec<Any>,
    pub(super) orphans: Vec<Orphan>,
}

impl Volume {
    pub(super) fn id(&self) -> VolumeId {
        self.record.id
    }

    pub(super) fn find(&self, snapshot: SnapshotId) -> Option<&StoredSnapshot> {
        self.snapshots.iter().find(|stored| stored.snapshot.id == snapshot)
    }

    /// Tells whether its dataset has a snapshot named by this id, published or not.
    pub(super) fn has(&self, snapshot: SnapshotId) -> bool {
        let name = snapshot.to_string();
        self.all.iter().any(|it| it.name == name)
    }

    /// Returns the newest of its own snapshots.
    pub(super) fn newest(&self) -> Option<&StoredSnapshot> {
        self.snapshots.last()
    }

    /// Returns the snapshot that a clean head equals.
    pub(super) fn tip(&self) -> Option<SnapshotKey> {
        let own = self.newest().map(|stored| SnapshotKey { volume: self.id(), snapshot: stored.snapshot.id });
        own.or(self.record.origin)
    }

    /// Tells whether a snapshot that came after one of its own (or all of them, where it is none of them) changed anything.
    pub(super) fn changed_after(&self, base: SnapshotId) -> bool {
        let mut after = self.snapshots.iter().rev().take_while(|stored| stored.snapshot.id != base);
        after.any(|stored| !stored.unchanged)
    }

    pub(super) fn next_sequence(&self) -> u64 {
        self.newest().map_or(0, |last| last.sequence) + 1
    }

    /// Returns the guid of one of its snapshots, where it is known.
    pub(super) fn guid_of(&self, snapshot: SnapshotId) -> Option<u64> {
        let name = snapshot.to_string();
        self.all.iter().rev().find(|it| it.name == name)?.guid
    }

    pub(super) fn is_read_only(&self) -> bool {
        self.found.property("readonly") == Some("on")
    }
}

/// The volumes as they were seen last.
#[derive(Debug, Default)]
pub(super) struct Known(Mutex<HashMap<VolumeId, Seen>>);

#[derive(Debug)]
struct Seen {
    volume: Arc<Volume>,
    /// When that was.
    mark: Mark,
    /// Whether ZFS takes the head for what the newest snapshot is: since it was, nobody has mounted it.
    is_level: bool,
}

/// A volume that is about to get another snapshot.
#[derive(Debug, Clone, Copy)]
pub(super) struct Before {
    volume: VolumeId,
    mark: Mark,
}

impl Pool {
    /// Returns a volume as it was seen last, where that holds; otherwise it is read.
    pub(super) fn known(&self, operation: &'static str, volume: VolumeId) -> Result<Arc<Volume>> {
        let mark = self.mark(volume);
        let seen =
            locked(&self.known.0).get(&volume).filter(|seen| seen.mark == mark).map(|seen| Arc::clone(&seen.volume));
        seen.map_or_else(|| self.volume(operation, volume), Ok)
    }

    pub(super) fn mark(&self, volume: VolumeId) -> Mark {
        self.programs.touches.mark(&self.volume_dataset(volume))
    }

    /// Remembers a volume that was read, unless it was changed meanwhile.
    pub(super) fn remember(&self, volume: &Arc<Volume>, mark: Mark) {
        let id = volume.id();
        let mut known = locked(&self.known.0);
        if !volume.orphans.is_empty() || self.mark(id) != mark {
            // What was seen before does not outlive a newer look.
            known.remove(&id);
            return;
        }
        let newest = |volume: &Volume| volume.newest().map(|newest| newest.snapshot.id);
        let is_level = known
            .get(&id)
            .is_some_and(|seen| seen.is_level && seen.mark == mark && newest(&seen.volume) == newest(volume));
        known.insert(id, Seen { volume: Arc::clone(volume), mark, is_level });
    }

    /// To be called before the commands that publish a snapshot, so that the volume need not be read anew ([`Pool::added`]).
    pub(super) fn before_adding(&self, volume: VolumeId) -> Before {
        Before { volume, mark: self.mark(volume) }
    }

    /// Says that the calling thread has done nothing else to a volume since than to publish a snapshot behind all others. `is_level`
    /// tells whether that came by a receive.
    pub(super) fn added(&self, before: Before, stored: &StoredSnapshot, guid: Option<u64>, is_level: bool) {
        let Before { volume, mark } = before;
        let mut known = locked(&self.known.0);
        let mine = self.programs.touches.only_mine_since(&self.volume_dataset(volume), mark);
        let Some(seen) = known.get_mut(&volume).filter(|seen| mine && seen.mark == mark) else { return };
        if seen.volume.next_sequence() <= stored.sequence {
            let grown = Arc::make_mut(&mut seen.volume);
            grown.snapshots.push(stored.clone());
            grown.all.push(Any { name: stored.snapshot.id.to_string(), guid });
            (seen.mark, seen.is_level) = (self.mark(volume), is_level);
        }
    }

    /// Notes whether ZFS takes a head for what its volume's newest snapshot is.
    pub(super) fn set_level(&self, volume: VolumeId, is_level: bool) {
        if let Some(seen) = locked(&self.known.0).get_mut(&volume) {
            seen.is_level = is_level;
        }
    }

    pub(super) fn is_level(&self, volume: VolumeId) -> bool {
        let mark = self.mark(volume);
        locked(&self.known.0).get(&volume).is_some_and(|seen| seen.is_level && seen.mark == mark)
    }

    pub(super) fn forget_volume(&self, volume: VolumeId) {
        locked(&self.known.0).remove(&volume);
    }

    /// Forgets all volumes; tells whether any was remembered.
    pub(super) fn forget_known(&self) -> bool {
        let mut known = locked(&self.known.0);
        let any = !known.is_empty();
        known.clear();
        any
    }

    /// Forgets what is remembered where something failed: that may be because it does not hold any more.
    pub(super) fn forgetting<T>(&self, result: Result<T>) -> Result<T> {
        if result.is_err() {
            self.forget_known();
        }
        result
    }

    /// Does something that trusts what is remembered, and once more where something of it is gone: an operator destroyed it.
    pub(super) fn again_if_gone<T>(&self, work: impl Fn() -> Result<T>) -> Result<T> {
        match work() {
            Err(Error { kind: ErrorKind::NotFound, .. }) if self.forget_known() => work(),
            done => done,
        }
    }
}
