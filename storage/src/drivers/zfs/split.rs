//! Splitting a volume: the head and the snapshots newer than one move into a new volume.
//!
//! A clone of the kept snapshot is promoted, which moves the older snapshots to it; then the two datasets change names, and
//! the records follow. The journal makes one step of it: what it says is carried out, again at the next open if need be.
//! Each step looks first whether it is done.
//!
//! | `incoming/split` | fork's dataset | done so far |
//! |---|---|---|
//! | – | – | nothing |
//! | a clone of the volume | – | cloned |
//! | the volume's origin | – | promoted |
//! | there | there | the head has moved |
//! | – | there | both have their names |

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{
    catalog::{self, PROPERTIES, missing, options, refuse_blocked},
    journal::Note,
    pool::Pool,
    program::{Class, Trouble},
};
use crate::{
    error::{Blockers, Error, ErrorKind, Result},
    fault,
    model::{Role, SnapshotId, SnapshotKey, VolumeRecord},
};

const OPERATION: &str = "split volume";

/// What a split is to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Split {
    /// The old volume's record.
    pub(super) record: VolumeRecord,
    keep: SnapshotId,
    fork: VolumeRecord,
    moved: Vec<SnapshotId>,
}

impl Pool {
    pub(super) fn split(self: &Arc<Self>, keep: SnapshotKey, fork: &VolumeRecord) -> Result<()> {
        self.check_record(OPERATION, fork)?;
        self.refuse_taken(OPERATION, fork)?;
        if fork.origin != Some(keep) {
            let why = ErrorKind::Unsupported("the fork's origin must be the snapshot that is kept".to_owned());
            return Err(Error::new(OPERATION, keep.volume, why));
        }
        let volume = self.volume(OPERATION, keep.volume)?;
        let at = volume.snapshots.iter().position(|stored| stored.snapshot.id == keep.snapshot);
        let at = at.ok_or_else(|| missing(OPERATION, keep.snapshot))?;
        let attached = self.is_attached(|key| key.volume == keep.volume, Some(keep.volume));
        refuse_blocked(OPERATION, keep.volume, Blockers { attached, ..Blockers::default() })?;
        let moved = volume.snapshots[at + 1..].iter().map(|stored| stored.snapshot.id).collect();
        let split = Split { record: volume.record.clone(), keep: keep.snapshot, fork: fork.clone(), moved };
        let _publishing = self.publishing();
        fault::point("zfs.split.before-journal");
        self.note(OPERATION, &Note::Split(Box::new(split.clone())))?;
        fault::point("zfs.split.journalled");
        self.carry_out(&split)
    }

    /// Does what is left to do of a split.
    pub(super) fn carry_out(&self, split: &Split) -> Result<()> {
        let failed = |trouble: Trouble| trouble.into_error(OPERATION, split.record.id);
        let old = self.volume_dataset(split.record.id);
        let fork = self.volume_dataset(split.fork.id);
        let new = format!("{}/split.{}", self.folder("incoming"), split.record.id);
        let is_there = |dataset: &str| super::place::exists(&self.programs, dataset).map_err(failed);
        self.unmount_head(OPERATION, split.record.id)?;
        if !is_there(&fork)? {
            if !is_there(&new)? {
                let encoded = catalog::encode(OPERATION, "volume", 1, &split.record)?;
                let mut words = vec!["clone".to_owned()];
                words.extend(options(&split.record, &encoded));
                words.extend([format!("{old}@{}", split.keep), new.clone()]);
                self.programs.zfs_patiently(&words).map_err(failed)?;
            }
            self.unmount(&self.mount_point(&new)).map_err(failed)?;
            fault::point("zfs.split.cloned");
            let origin = self.look(&new, "origin").map_err(failed)?;
            if origin.property("origin") == Some(&format!("{old}@{}", split.keep)) {
                self.programs.zfs_patiently(&["promote", &new]).map_err(failed)?;
            }
            fault::point("zfs.split.promoted");
            self.rename(&old, &fork).map_err(failed)?;
        }
        fault::point("zfs.split.head-moved");
        if is_there(&new)? {
            self.rename(&new, &old).map_err(failed)?;
        }
        fault::point("zfs.split.renamed");
        let found = self.look(&fork, PROPERTIES).map_err(failed)?;
        self.write_record(OPERATION, "volume", &found, &split.fork)?;
        let read_only = if split.fork.role == Role::Replica { "on" } else { "off" };
        self.set(&fork, "readonly", read_only).map_err(failed)?;
        let quota = split.fork.quota_bytes.map_or_else(|| "none".to_owned(), |bytes| bytes.to_string());
        match self.set(&fork, "refquota", &quota) {
            // What was there before the split stays, whatever the new limit.
            Err(trouble) if trouble.class == Class::NoSpace => tracing::warn!(fork, "it holds more than its quota"),
            other => other.map_err(failed)?,
        }
        fault::point("zfs.split.fork-recorded");
        self.repoint_clones(split)?;
        fault::point("zfs.split.clones-moved");
        self.unnote(OPERATION, &format!("split.{}", split.record.id))?;
        fault::point("zfs.split.done");
        Ok(())
    }

    /// Clones of moved snapshots follow them.
    fn repoint_clones(&self, split: &Split) -> Result<()> {
        for volume in self.volumes(OPERATION)? {
            let Some(origin) = volume.record.origin else { continue };
            if origin.volume == split.record.id && split.moved.contains(&origin.snapshot) {
                let origin = Some(SnapshotKey { volume: split.fork.id, ..origin });
                let record = VolumeRecord { origin, ..volume.record.clone() };
                self.write_record(OPERATION, "volume", &volume.found, &record)?;
            }
        }
        Ok(())
    }
}
