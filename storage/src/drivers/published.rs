//! The snapshots that a pool of folders has published, remembered between two looks at the disk, and the histories they make.
//!
//! Owns the list of each volume's own snapshots as it was read last, the question whether it still holds, and lineages. It holds while
//! the folder of the snapshots is the one that was read, unchanged: one look at a folder, however long the history. The
//! pool is locked, so nobody else publishes; what this process does to the folder it says here, because two changes within
//! one tick of the file system's clock leave the same times. Rewinding and splitting read the records themselves. Refuses to know
//! what lies in the folder.

use std::{
    collections::{BTreeSet, HashMap},
    fs, io,
    mem::ManuallyDrop,
    ops::ControlFlow,
    os::unix::fs::MetadataExt,
    path::Path,
    sync::{Arc, Mutex, MutexGuard},
};

use super::folder::locked;
use crate::{
    driver::Orphan,
    error::{Error, Result},
    model::{HeldSnapshot, Lineage, SnapshotId, SnapshotKey, VolumeId, VolumeRecord},
    records::RecordError,
};

/// A snapshot's record as a driver keeps it.
pub(crate) trait Record: Clone {
    /// Grows along the volume's own snapshots; clocks do not order them.
    fn sequence(&self) -> u64;
    fn id(&self) -> SnapshotId;
    fn held(self, volume: VolumeId) -> HeldSnapshot;
}

/// A pool that keeps records of its volumes and snapshots.
pub(crate) trait Histories {
    type Record: Record;

    fn record(&self, volume: VolumeId) -> std::result::Result<VolumeRecord, RecordError>;

    /// Lists the volume's own snapshots oldest first.
    fn own(&self, volume: VolumeId) -> io::Result<Arc<Vec<Self::Record>>>;

    /// Returns the sequence number for the volume's next snapshot.
    fn next_sequence(&self, operation: &'static str, volume: VolumeId) -> Result<u64> {
        let own = self.own(volume).map_err(|error| Error::io(operation, volume, error))?;
        Ok(own.last().map_or(0, Record::sequence) + 1)
    }

    /// Follows the origins back. What an origin names and the pool does not hold ends the lineage.
    fn lineage(&self, volume: VolumeId) -> Result<Lineage> {
        let mut newest_first = Vec::new();
        self.follow_back(volume, |own, of| {
            newest_first.extend(own.iter().rev().map(|stored| stored.clone().held(of)));
            ControlFlow::Continue(())
        })?;
        newest_first.reverse();
        Ok(Lineage { snapshots: newest_first })
    }

    /// Returns the snapshot that a clean head equals.
    fn tip(&self, volume: VolumeId) -> Result<Option<SnapshotKey>> {
        let mut tip = None;
        self.follow_back(volume, |own, of| {
            tip = own.last().map(|newest| SnapshotKey { volume: of, snapshot: newest.id() });
            if tip.is_some() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })?;
        Ok(tip)
    }

    /// Shows the snapshots of a volume, then those of its origin up to where it was cloned, and so on.
    fn follow_back(
        &self,
        volume: VolumeId,
        mut show: impl FnMut(&[Self::Record], VolumeId) -> ControlFlow<()>,
    ) -> Result<()> {
        const OPERATION: &str = "read lineage of";
        let failed = |error: io::Error| Error::io(OPERATION, volume, error);
        let found = self.record(volume);
        let mut record = found.map_err(|error| error.into_error(OPERATION, format_args!("volume {volume}")))?;
        let mut shown = show(&self.own(volume).map_err(failed)?, volume);
        let mut seen = BTreeSet::from([volume]);
        while let (Some(origin), ControlFlow::Continue(())) = (record.origin, shown) {
            let Ok(parent) = self.record(origin.volume) else { break };
            if !seen.insert(origin.volume) {
                break;
            }
            let own = self.own(origin.volume).map_err(failed)?;
            let Some(at) = own.iter().position(|stored| stored.id() == origin.snapshot) else { break };
            shown = show(&own[..=at], origin.volume);
            record = parent;
        }
        Ok(())
    }
}

/// What lies among a volume's snapshots: its own, oldest first, and what is none.
pub(crate) type Listed<R> = (Vec<R>, Vec<Orphan>);

/// The lists of a pool's volumes.
pub(crate) struct Published<R>(Mutex<Lists<R>>);

struct Lists<R> {
    of: HashMap<VolumeId, Known<R>>,
    /// Counts what was said here, so that a list that was read meanwhile is not taken for the newest.
    changes: u64,
}

/// The folder as it was before it was read, and what was in it.
type Known<R> = (Identity, Arc<Vec<R>>);

/// Device, inode, mtime and ctime of a folder.
type Identity = (u64, u64, (i64, i64), (i64, i64));

impl<R> Default for Published<R> {
    fn default() -> Self {
        Self(Mutex::new(Lists { of: HashMap::new(), changes: 0 }))
    }
}

impl<R: Record> Published<R> {
    fn lists(&self) -> MutexGuard<'_, Lists<R>> {
        locked(&self.0)
    }

    /// Returns the volume's own snapshots oldest first, with `read` where they are not known. A list with something in it that
    /// is no snapshot, or a damaged one, is not remembered.
    pub(crate) fn own(
        &self,
        volume: VolumeId,
        folder: &Path,
        read: impl FnOnce() -> io::Result<Listed<R>>,
    ) -> io::Result<Arc<Vec<R>>> {
        let found = identity(folder);
        let changes = {
            let lists = self.lists();
            match (lists.of.get(&volume), found) {
                (Some((identity, own)), Some(found)) if *identity == found => return Ok(Arc::clone(own)),
                _ => lists.changes,
            }
        };
        let (own, orphans) = read()?;
        let own = Arc::new(own);
        let mut lists = self.lists();
        match found {
            Some(found) if orphans.is_empty() && lists.changes == changes => {
                lists.of.insert(volume, (found, Arc::clone(&own)));
            }
            _ => drop(lists.of.remove(&volume)),
        }
        Ok(own)
    }

    /// Says that a volume's snapshots are about to be others. Its list is read anew when the value is gone, whatever came of it.
    pub(crate) fn change(&self, volume: VolumeId) -> Change<'_, R> {
        Change { published: self, volume }
    }

    fn forget(&self, volume: VolumeId) {
        let mut lists = self.lists();
        lists.changes += 1;
        lists.of.remove(&volume);
    }
}

/// A change that is being made to a volume's snapshots.
#[must_use]
pub(crate) struct Change<'a, R: Record> {
    published: &'a Published<R>,
    volume: VolumeId,
}

impl<R: Record> Change<'_, R> {
    /// Says that nothing has changed but that a snapshot was published behind all others, so that the list need not be read anew.
    pub(crate) fn added(self, folder: &Path, record: &R) {
        self.done(folder, |own| {
            let follows = own.last().is_none_or(|last| last.sequence() < record.sequence());
            if follows {
                own.push(record.clone());
            }
            follows
        });
    }

    /// Says that nothing has changed but that a snapshot is gone.
    pub(crate) fn removed(self, folder: &Path, snapshot: SnapshotId) {
        self.done(folder, |own| {
            own.retain(|record| record.id() != snapshot);
            true
        });
    }

    /// Takes a change over into the list, where `apply` says that it fits.
    fn done(self, folder: &Path, apply: impl FnOnce(&mut Vec<R>) -> bool) {
        let change = ManuallyDrop::new(self);
        let mut lists = change.published.lists();
        lists.changes += 1;
        let Some((identity_then, own)) = lists.of.get_mut(&change.volume) else { return };
        match (apply(Arc::make_mut(own)), identity(folder)) {
            (true, Some(now)) => *identity_then = now,
            _ => drop(lists.of.remove(&change.volume)),
        }
    }
}

impl<R: Record> Drop for Change<'_, R> {
    fn drop(&mut self) {
        self.published.forget(self.volume);
    }
}

fn identity(folder: &Path) -> Option<Identity> {
    let found = fs::metadata(folder).ok()?;
    let (mtime, ctime) = ((found.mtime(), found.mtime_nsec()), (found.ctime(), found.ctime_nsec()));
    Some((found.dev(), found.ino(), mtime, ctime))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use std::{cell::Cell, path::PathBuf};

    use super::*;
    use crate::model::{Host, HostId, Snapshot};

    #[derive(Debug, Clone, PartialEq)]
    struct Stored(u64, Snapshot);

    impl Record for Stored {
        fn sequence(&self) -> u64 {
            self.0
        }
        fn id(&self) -> SnapshotId {
            self.1.id
        }
        fn held(self, volume: VolumeId) -> HeldSnapshot {
            HeldSnapshot { snapshot: self.1, volume, unchanged: false, logical_bytes: 0 }
        }
    }

    fn stored(sequence: u64) -> Stored {
        let snapshot = Snapshot {
            id: SnapshotId::mint(),
            name: format!("s{sequence}").parse().unwrap(),
            parents: Vec::new(),
            host: Host { id: HostId([1; 32]), name: "host-a".parse().unwrap() },
            created: "2026-01-02T03:04:05Z".parse().unwrap(),
            metadata: Default::default(),
        };
        Stored(sequence, snapshot)
    }

    struct Bench {
        dir: tempfile::TempDir,
        volume: VolumeId,
        published: Published<Stored>,
        reads: Cell<u32>,
    }

    impl Bench {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            fs::create_dir(dir.path().join("snapshots")).unwrap();
            let volume = "01890000-0000-7000-8000-000000000001".parse().unwrap();
            Self { dir, volume, published: Published::default(), reads: Cell::new(0) }
        }

        fn folder(&self) -> PathBuf {
            self.dir.path().join("snapshots")
        }

        fn put(&self, stored: &Stored) {
            fs::create_dir(self.folder().join(stored.1.id.to_string())).unwrap();
        }

        /// Lists what `there` says; tells whether it was asked.
        fn own(&self, there: &[Stored], orphans: usize) -> (Vec<Stored>, bool) {
            let before = self.reads.get();
            let read = || {
                self.reads.set(before + 1);
                let orphan = Orphan { place: "x".to_owned(), reason: "not named like a snapshot".to_owned() };
                Ok((there.to_vec(), vec![orphan; orphans]))
            };
            let own = self.published.own(self.volume, &self.folder(), read).unwrap();
            (own.to_vec(), self.reads.get() > before)
        }
    }

    #[test]
    fn a_list_is_read_once_and_grows_by_what_is_published() {
        let (bench, one, two) = (Bench::new(), stored(1), stored(2));
        bench.put(&one);
        assert_eq!(bench.own(std::slice::from_ref(&one), 0), (vec![one.clone()], true));
        assert_eq!(bench.own(&[], 0), (vec![one.clone()], false));
        bench.put(&two);
        bench.published.change(bench.volume).added(&bench.folder(), &two);
        assert_eq!(bench.own(&[], 0), (vec![one, two], false));
    }

    #[test]
    fn a_list_goes_on_without_what_is_destroyed() {
        let (bench, one, two) = (Bench::new(), stored(1), stored(2));
        bench.put(&one);
        bench.put(&two);
        bench.own(&[one.clone(), two.clone()], 0);
        fs::remove_dir(bench.folder().join(one.1.id.to_string())).unwrap();
        bench.published.change(bench.volume).removed(&bench.folder(), one.1.id);
        assert_eq!(bench.own(&[], 0), (vec![two], false));
    }

    #[test]
    fn what_somebody_else_does_to_the_folder_is_seen() {
        let (bench, one, two) = (Bench::new(), stored(1), stored(2));
        bench.put(&one);
        bench.own(std::slice::from_ref(&one), 0);
        // Another folder in its place: its inode tells, whatever the clock.
        fs::rename(bench.folder(), bench.dir.path().join("before")).unwrap();
        fs::create_dir(bench.folder()).unwrap();
        bench.put(&two);
        assert_eq!(bench.own(std::slice::from_ref(&two), 0), (vec![two], true));
        fs::remove_dir_all(bench.folder()).unwrap();
        assert_eq!(bench.own(&[], 0), (Vec::new(), true));
        assert_eq!(bench.own(&[], 0), (Vec::new(), true), "a folder that is not there cannot be known again");
    }

    #[test]
    fn what_this_process_does_is_seen_whatever_the_clock_says() {
        let (bench, one) = (Bench::new(), stored(1));
        bench.own(std::slice::from_ref(&one), 0);
        drop(bench.published.change(bench.volume));
        assert_eq!(bench.own(&[], 0), (Vec::new(), true), "the folder has not changed");
    }

    #[test]
    fn a_list_read_while_something_was_published_is_not_kept() {
        let (bench, one) = (Bench::new(), stored(1));
        let read = || {
            bench.published.change(bench.volume).added(&bench.folder(), &one);
            Ok((Vec::new(), Vec::new()))
        };
        bench.published.own(bench.volume, &bench.folder(), read).unwrap();
        assert_eq!(bench.own(std::slice::from_ref(&one), 0), (vec![one], true));
    }

    #[test]
    fn a_list_that_holds_it_already_is_read_anew_and_one_with_damage_each_time() {
        let (bench, one) = (Bench::new(), stored(1));
        bench.put(&one);
        bench.own(std::slice::from_ref(&one), 0);
        bench.published.change(bench.volume).added(&bench.folder(), &one);
        assert_eq!(bench.own(std::slice::from_ref(&one), 1), (vec![one.clone()], true));
        assert_eq!(bench.own(std::slice::from_ref(&one), 0), (vec![one], true));
    }
}
