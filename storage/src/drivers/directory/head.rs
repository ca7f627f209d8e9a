//! Heads: made from a snapshot when they are wanted, compared with it cheaply by their baseline.
//!
//! A baseline is an inventory of a head, taken when it equalled a snapshot. Its file name says which one, of which head
//! (the inode of its root) and when: `<snapshot>.<inode>.<seconds>.<nanoseconds>`. So it needs no step of its own to
//! become current: it counts as soon as the snapshot and the head it names are there, and never for any other.
//! A head without one is compared with the snapshot's own inventory and by contents: slower, never wrong.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use rustix::fs::OFlags;

use super::{
    catalog::{lay_out_volume, make_head, refuse_blocked},
    compare::{Joined, Likeness, Pair, Trust, same_contents},
    pool::{Pool, Stage},
};
use crate::{
    delta::Compare,
    driver::{Access, Target},
    drivers::published::Histories,
    error::{Blockers, Error, ErrorKind, Result},
    fault,
    model::{HeadState, Role, SnapshotId, SnapshotKey, VolumeId, VolumeRecord},
    records::sync_dir,
    tree::{
        copy::Copier,
        entry::{EntryKind, Time},
        inventory::{InventoryEntry, InventoryReader, InventoryWriter},
        root::Root,
        walk::{Links, Walk},
        weave::TreeView,
    },
};

/// A head beside what it was when it last equalled a snapshot.
pub(super) struct Reference {
    /// The entries to compare with.
    pub(super) inventory: InventoryReader,
    /// What their stats are worth.
    pub(super) trust: Trust,
}

/// Returns the name of a baseline.
pub(super) fn baseline_name(snapshot: SnapshotId, head_inode: u64, taken: Time) -> String {
    format!("{snapshot}.{head_inode}.{}.{}", taken.secs, taken.nanos)
}

fn parse_baseline(name: &str) -> Option<(SnapshotId, u64, Time)> {
    let mut parts = name.split('.');
    let (snapshot, inode) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
    let taken = Time { secs: parts.next()?.parse().ok()?, nanos: parts.next()?.parse().ok()? };
    parts.next().is_none().then_some((snapshot, inode, taken))
}

/// Returns the time by the clock that stamps files in `dir`, which need not be this machine's.
pub(super) fn file_system_time(dir: &Path) -> io::Result<Time> {
    let path = dir.join("clock");
    let file = File::create(&path)?;
    let stat = rustix::fs::fstat(&file)?;
    fs::remove_file(&path)?;
    Ok(Time { secs: stat.st_ctime, nanos: stat.st_ctime_nsec as u32 })
}

pub(super) fn inode(path: &Path) -> io::Result<u64> {
    Ok(fs::symlink_metadata(path)?.ino())
}

/// Makes `name` the only baseline of a volume. The others name heads or snapshots that are no more the newest; a
/// leftover does no harm.
pub(super) fn drop_other_baselines(dir: &Path, name: &str) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    for entry in entries.flatten().filter(|entry| entry.file_name() != name) {
        let _ = fs::remove_file(entry.path());
    }
}

impl Pool {
    pub(super) fn baselines_dir(&self, volume: VolumeId) -> PathBuf {
        self.volume_dir(volume).join("baselines")
    }

    /// Opens what a head is to be compared with, given the snapshot it would equal when clean.
    pub(super) fn reference(&self, volume: VolumeId, tip: SnapshotKey) -> Result<Reference> {
        let failed = |error: io::Error| Error::io("read baseline of", volume, error);
        let head = inode(&self.head_dir(volume)).map_err(failed)?;
        let dir = self.baselines_dir(volume);
        let mut newest: Option<(Time, PathBuf)> = None;
        for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
            let Some((snapshot, of, taken)) = entry.file_name().to_str().and_then(parse_baseline) else { continue };
            if (snapshot, of) == (tip.snapshot, head) && newest.as_ref().is_none_or(|(time, _)| *time < taken) {
                newest = Some((taken, entry.path()));
            }
        }
        if let Some((taken, path)) = newest {
            return Ok(Reference { inventory: InventoryReader::open(&path)?, trust: Trust::TakenAt(taken) });
        }
        tracing::info!(%volume, "the head has no baseline; its files are compared by contents");
        Ok(Reference { inventory: InventoryReader::open(&self.inventory_path(tip))?, trust: Trust::No })
    }

    /// Removes the baselines that an interrupted verb left: those of another head or another snapshot than the newest.
    pub(super) fn tidy_baselines(&self) -> Result<()> {
        for record in self.volumes("open pool")? {
            let head = inode(&self.head_dir(record.id)).ok();
            let tip = self.tip(record.id)?.map(|tip| tip.snapshot);
            for entry in fs::read_dir(self.baselines_dir(record.id)).into_iter().flatten().flatten() {
                let name = entry.file_name();
                let known = name.to_str().and_then(parse_baseline);
                if known.is_none_or(|(snapshot, of, _)| Some(snapshot) != tip || Some(of) != head) {
                    let _ = fs::remove_file(entry.path());
                }
            }
        }
        Ok(())
    }

    pub(super) fn head_state(&self, volume: VolumeId) -> Result<HeadState> {
        self.volume("compare head of", volume)?;
        let head = self.head_dir(volume);
        if !head.exists() {
            return Ok(HeadState::Clean);
        }
        let root = Root::open(&head)?;
        let Some(tip) = self.tip(volume)? else {
            // Nothing but the root itself.
            let empty = Walk::live(root).take(2).collect::<Result<Vec<_>>>()?.len() < 2;
            return Ok(if empty { HeadState::Clean } else { HeadState::Dirty });
        };
        let Reference { inventory, trust } = self.reference(volume, tip)?;
        let kept = Root::open(self.tree_dir(tip))?;
        let mut joined = Joined::with_head(root, Some(inventory));
        while let Some(pair) = joined.next()? {
            let Pair::Both(mut entry, record) = pair else { return Ok(HeadState::Dirty) };
            let same = match joined.judge(&mut entry, &record, trust, Compare::Metadata)? {
                Likeness::Same => true,
                Likeness::Different => false,
                Likeness::Unclear => {
                    let live = File::from(joined.walk().open_last(OFlags::RDONLY | OFlags::NONBLOCK)?);
                    same_contents(live, &entry, &kept)?
                }
            };
            if !same {
                return Ok(HeadState::Dirty);
            }
        }
        Ok(HeadState::Clean)
    }

    /// Copies a snapshot's tree to `head` in a stage, and writes its baseline beside it. Returns the baseline's name.
    fn stage_head(&self, operation: &'static str, from: SnapshotKey, dir: &Path) -> Result<String> {
        let failed = |error: io::Error| Error::io(operation, from.snapshot, error);
        let head = dir.join("head");
        make_head(&head).map_err(failed)?;
        let source = Root::open(self.tree_dir(from))?;
        let mut copier = Copier::new(Root::open(&head)?);
        for entry in self.witnessed(operation, from)? {
            copier.copy(&source, &entry?)?;
        }
        copier.finish()?;
        let taken = file_system_time(dir).map_err(failed)?;
        let name = baseline_name(from.snapshot, inode(&head).map_err(failed)?, taken);
        let mut baseline = InventoryWriter::create(&dir.join("baseline"))?;
        let known = InventoryReader::open(&self.inventory_path(from))?;
        let mut joined = Joined::new(Walk::new(Root::open(&head)?, Links::ByInode), Some(known));
        while let Some(pair) = joined.next()? {
            match pair {
                Pair::Both(entry, record) => {
                    baseline.add(InventoryEntry { entry, origin: None, digest: record.digest })?;
                }
                Pair::New(entry) => baseline.add(InventoryEntry { entry, origin: None, digest: None })?,
                // Not permitted to this user (a device node): then the head lacks it.
                Pair::Gone(_) => {}
            }
        }
        baseline.finish()?;
        Ok(name)
    }

    /// Puts a staged head in the place of a volume's head.
    fn publish_head(&self, operation: &'static str, stage: &Stage, volume: VolumeId, baseline: &str) -> Result<()> {
        self.sync(operation)?;
        let failed = |error: io::Error| Error::io(operation, volume, error);
        let baselines = self.baselines_dir(volume);
        fs::rename(stage.path().join("baseline"), baselines.join(baseline)).map_err(failed)?;
        sync_dir(&baselines).map_err(failed)?;
        stage.publish(operation, "head", &self.head_dir(volume))?;
        drop_other_baselines(&baselines, baseline);
        Ok(())
    }

    /// Makes the head of a volume that has none: its newest snapshot's tree, or an empty one.
    pub(super) fn materialise_head(self: &Arc<Self>, operation: &'static str, volume: VolumeId) -> Result<()> {
        if self.head_dir(volume).exists() {
            return Ok(());
        }
        let stage = self.stage(operation, "head")?;
        match self.tip(volume)? {
            None => {
                make_head(&stage.path().join("head")).map_err(|error| Error::io(operation, volume, error))?;
                stage.publish(operation, "head", &self.head_dir(volume))
            }
            Some(tip) => {
                let baseline = self.stage_head(operation, tip, stage.path())?;
                fault::point("directory.materialise.before-publish");
                let _publishing = self.publishing();
                self.publish_head(operation, &stage, volume, &baseline)?;
                fault::point("directory.materialise.published");
                Ok(())
            }
        }
    }

    pub(super) fn rewind(self: &Arc<Self>, to: SnapshotKey) -> Result<()> {
        const OPERATION: &str = "rewind to snapshot";
        self.volume(OPERATION, to.volume)?;
        self.stored(OPERATION, to)?;
        let (own, _) = self.own_snapshots(to.volume).map_err(|error| Error::io(OPERATION, to.snapshot, error))?;
        let newer = own.iter().skip_while(|stored| stored.snapshot.id != to.snapshot).skip(1);
        let newer = newer.map(|stored| stored.snapshot.id).collect();
        let attached = self.attached().contains_key(&Target::Head(to.volume));
        refuse_blocked(OPERATION, to.snapshot, Blockers { newer, clones: Vec::new(), attached })?;
        if !self.head_dir(to.volume).exists() {
            return Ok(());
        }
        let stage = self.stage(OPERATION, "rewind")?;
        let baseline = self.stage_head(OPERATION, to, stage.path())?;
        fault::point("directory.rewind.before-publish");
        let publishing = self.publishing();
        // A volume without a head is as its newest snapshot: with this rename the rewind is done, and works on any file
        // system. What follows only saves making the head once more.
        let trashed = self.trash(OPERATION, &self.head_dir(to.volume))?;
        fault::point("directory.rewind.trashed");
        self.publish_head(OPERATION, &stage, to.volume, &baseline)?;
        drop(publishing);
        fault::point("directory.rewind.published");
        self.delete_trashed(trashed);
        Ok(())
    }

    pub(super) fn clone_from(self: &Arc<Self>, record: &VolumeRecord) -> Result<()> {
        const OPERATION: &str = "clone volume";
        super::catalog::check_record(OPERATION, record)?;
        self.refuse_taken(OPERATION, record)?;
        let Some(origin) = record.origin else {
            let why = ErrorKind::Unsupported("a clone's record must name its origin".to_owned());
            return Err(Error::new(OPERATION, &record.name, why));
        };
        self.volume(OPERATION, origin.volume)?;
        self.stored(OPERATION, origin)?;
        let stage = self.stage(OPERATION, "clone")?;
        let dir = stage.path().join("volume");
        let failed = |error: io::Error| Error::io(OPERATION, &record.name, error);
        lay_out_volume(&dir, record).map_err(failed)?;
        let baseline = self.stage_head(OPERATION, origin, &dir)?;
        fs::rename(dir.join("baseline"), dir.join("baselines").join(baseline)).map_err(failed)?;
        self.sync(OPERATION)?;
        fault::point("directory.clone.before-publish");
        let _publishing = self.publishing();
        // The origin may have been forgotten while its tree was copied.
        self.stored(OPERATION, origin)?;
        stage.publish(OPERATION, "volume", &self.volume_dir(record.id))?;
        fault::point("directory.clone.published");
        Ok(())
    }

    pub(super) fn attach(self: &Arc<Self>, target: Target, access: Access) -> Result<PathBuf> {
        const OPERATION: &str = "attach";
        let (path, serves) = match target {
            Target::Snapshot(volume, snapshot) => {
                let key = SnapshotKey { volume, snapshot };
                self.stored(OPERATION, key)?;
                if access == Access::ReadWrite {
                    let why = "a snapshot is read-only; clone it to write".to_owned();
                    return Err(Error::new(OPERATION, snapshot, ErrorKind::Unsupported(why)));
                }
                (self.tree_dir(key), Some(key))
            }
            Target::Head(volume) => self.head_to_attach(OPERATION, volume, access)?,
        };
        if let Some(key) = serves {
            self.refuse_tampered(OPERATION, key)?;
        }
        self.attached().insert(target, super::pool::Attachment { serves });
        Ok(path)
    }

    /// A replica's read-only head is its newest snapshot, and so is one that was not made yet.
    fn head_to_attach(
        self: &Arc<Self>,
        operation: &'static str,
        volume: VolumeId,
        access: Access,
    ) -> Result<(PathBuf, Option<SnapshotKey>)> {
        let record = self.volume(operation, volume)?;
        let head = self.head_dir(volume);
        if access == Access::ReadOnly
            && (record.role == Role::Replica || !head.exists())
            && let Some(tip) = self.tip(volume)?
        {
            return Ok((self.tree_dir(tip), Some(tip)));
        }
        self.materialise_head(operation, volume)?;
        Ok((head, None))
    }

    /// Opens a target to be read, without taking it: nobody is in the way of it.
    pub(super) fn view(self: &Arc<Self>, target: Target) -> Result<TreeView> {
        const OPERATION: &str = "read";
        let (path, serves) = match target {
            Target::Snapshot(volume, snapshot) => {
                let key = SnapshotKey { volume, snapshot };
                (self.tree_dir(key), Some(key))
            }
            Target::Head(volume) => self.head_to_attach(OPERATION, volume, Access::ReadOnly)?,
        };
        let Some(key) = serves else { return Ok(TreeView::live(Root::open(path)?)) };
        let begun = self.stored(OPERATION, key)?.snapshot.created;
        self.refuse_tampered(OPERATION, key)?;
        let inventory = self.inventory_path(key);
        let links = Links::Inventory(Box::new(InventoryReader::open(&inventory)?));
        Ok(TreeView::still(Root::open(path)?, links).begun(begun).inventoried(inventory))
    }

    pub(super) fn detach(&self, target: Target) {
        self.attached().remove(&target);
    }
}

/// Whether an entry has contents of its own.
pub(super) fn logical_bytes(kind: &EntryKind) -> u64 {
    match kind {
        EntryKind::File { size } => *size,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_name_of_a_baseline_says_what_it_is_of() {
        let snapshot = SnapshotId::mint();
        let taken = Time { secs: -3, nanos: 999 };
        assert_eq!(parse_baseline(&baseline_name(snapshot, 42, taken)), Some((snapshot, 42, taken)));
        for wrong in ["", "x", "a.b.c.d", &format!("{snapshot}.1.2"), &format!("{snapshot}.1.2.3.4")] {
            assert_eq!(parse_baseline(wrong), None);
        }
    }
}
