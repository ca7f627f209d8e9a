//! Splitting a volume: the head and the snapshots newer than one move into a new volume.
//!
//! Many renames make one step by a journal: `split.json` in the old volume is the point of no return; what it says is
//! then carried out, again at the next open if need be. Each step looks first whether it is done.

use std::{fs, io, sync::Arc};

use serde::{Deserialize, Serialize};

use super::{
    catalog::{lay_out_volume, refuse_blocked, write_volume},
    pool::Pool,
};
use crate::{
    error::{Blockers, Error, ErrorKind, Result},
    fault,
    model::{SnapshotId, SnapshotKey, VolumeId, VolumeRecord},
    records::{self, RecordError, sync_dir},
};

const JOURNAL: &str = "split.json";

/// What a split is to do; names the old volume, so that a journal that was copied elsewhere does nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Split {
    volume: VolumeId,
    fork: VolumeRecord,
    moved: Vec<SnapshotId>,
}

impl Pool {
    pub(super) fn split(self: &Arc<Self>, keep: SnapshotKey, fork: &VolumeRecord) -> Result<()> {
        const OPERATION: &str = "split volume";
        self.check_record(OPERATION, fork)?;
        self.refuse_taken(OPERATION, fork)?;
        if fork.origin != Some(keep) {
            let why = ErrorKind::Unsupported("the fork's origin must be the snapshot that is kept".to_owned());
            return Err(Error::new(OPERATION, keep.volume, why));
        }
        self.volume(OPERATION, keep.volume)?;
        self.stored(OPERATION, keep)?;
        let attached = self.is_attached(|key| key.volume == keep.volume, Some(keep.volume));
        refuse_blocked(OPERATION, keep.volume, Blockers { attached, ..Blockers::default() })?;
        let failed = |error: io::Error| Error::io(OPERATION, keep.volume, error);
        let (own, _) = self.own_snapshots(keep.volume).map_err(failed)?;
        let newer = own.iter().skip_while(|stored| stored.snapshot.id != keep.snapshot).skip(1);
        let moved = newer.map(|stored| stored.snapshot.id).collect();
        // The fork must have a head whatever happens to snapshots later; the old one's is made when it is wanted.
        self.materialise_head(OPERATION, keep.volume)?;
        let _publishing = self.publishing();
        let split = Split { volume: keep.volume, fork: fork.clone(), moved };
        fault::point("btrfs.split.before-journal");
        records::write("split", &self.volume_dir(keep.volume), JOURNAL, &split).map_err(failed)?;
        fault::point("btrfs.split.journalled");
        self.carry_out(&split).map_err(failed)
    }

    /// Finishes the splits that were interrupted.
    pub(super) fn finish_splits(&self) -> Result<()> {
        for record in self.volumes("open pool")? {
            let failed = |error: io::Error| Error::io("finish the split of", record.id, error);
            match records::read::<Split>("split", &self.volume_dir(record.id).join(JOURNAL)) {
                Ok(split) if split.volume == record.id => self.carry_out(&split).map_err(failed)?,
                Err(RecordError::Missing) => {}
                Err(RecordError::Io(error)) => return Err(failed(error)),
                // Written by one atomic step, so this is no split that was interrupted.
                Ok(_) => tracing::error!(volume = %record.id, "a split journal of another volume is left alone"),
                Err(error) => tracing::error!(volume = %record.id, %error, "a split journal is left alone"),
            }
        }
        Ok(())
    }

    fn carry_out(&self, split: &Split) -> io::Result<()> {
        let (old, new) = (self.volume_dir(split.volume), self.volume_dir(split.fork.id));
        let _changes = [split.volume, split.fork.id].map(|volume| self.published.change(volume));
        lay_out_volume(&new, &split.fork)?;
        sync_dir(&self.volumes_dir())?;
        fault::point("btrfs.split.fork-created");
        let (from, to) = (old.join("head"), new.join("head"));
        if from.exists() && !to.exists() {
            fs::rename(from, to)?;
        }
        fault::point("btrfs.split.head-moved");
        for snapshot in &split.moved {
            let name = format!("snapshots/{snapshot}");
            if old.join(&name).exists() {
                fs::rename(old.join(&name), new.join(&name))?;
            }
            fault::point("btrfs.split.snapshot-moved");
        }
        self.repoint_clones(split)?;
        fault::point("btrfs.split.clones-moved");
        for dir in [old.clone(), old.join("snapshots"), new.clone(), new.join("snapshots")] {
            sync_dir(&dir)?;
        }
        fs::remove_file(old.join(JOURNAL))?;
        sync_dir(&old)?;
        fault::point("btrfs.split.done");
        Ok(())
    }

    /// Clones of moved snapshots follow them.
    fn repoint_clones(&self, split: &Split) -> io::Result<()> {
        let volumes = self.volumes("split volume").map_err(io::Error::other)?;
        for mut record in volumes {
            let Some(origin) = record.origin else { continue };
            if origin.volume == split.volume && split.moved.contains(&origin.snapshot) {
                record.origin = Some(SnapshotKey { volume: split.fork.id, ..origin });
                write_volume(&self.volume_dir(record.id), &record)?;
            }
        }
        Ok(())
    }
}
