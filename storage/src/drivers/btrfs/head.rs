//! Heads: writable snapshots of the newest snapshot, made when they are wanted.

use std::{path::PathBuf, sync::Arc};

use super::{
    catalog::{lay_out_volume, make_head, refuse_blocked},
    pool::Pool,
    subvolume::{self, Mode},
};
use crate::{
    driver::{Access, Target},
    drivers::{folder::Attachment, published::Histories},
    error::{Blockers, Error, ErrorKind, Result},
    fault,
    model::{HeadState, Role, SnapshotKey, VolumeId, VolumeRecord},
    tree::{
        root::Root,
        walk::{Links, Walk},
        weave::TreeView,
    },
};

impl Pool {
    /// Compares the head with the newest snapshot: a snapshot of it is made for a moment, and the kernel says what
    /// differs. That costs what was changed, not what is there.
    pub(super) fn head_state(self: &Arc<Self>, volume: VolumeId) -> Result<HeadState> {
        const OPERATION: &str = "compare head of";
        self.volume(OPERATION, volume)?;
        let head = self.head_dir(volume);
        if !head.exists() {
            return Ok(HeadState::Clean);
        }
        let state = |clean| if clean { HeadState::Clean } else { HeadState::Dirty };
        let Some(tip) = self.tip(volume)? else {
            // Nothing but the root itself.
            let entries = Walk::live(Root::open(&head)?).take(2).collect::<Result<Vec<_>>>()?;
            return Ok(state(entries.len() < 2));
        };
        let stage = self.stage(OPERATION, "compare")?;
        let now = stage.path().join("tree");
        subvolume::snapshot(&head, &now, Mode::ReadOnly)
            .map_err(|error| Error::new(OPERATION, volume, error.into_kind()))?;
        Ok(state(self.is_as(tip, &now)?))
    }

    /// Makes a head from a snapshot.
    fn head_from(
        &self,
        operation: &'static str,
        from: SnapshotKey,
        head: &std::path::Path,
        quota_bytes: Option<u64>,
    ) -> Result<()> {
        self.refuse_tampered(operation, from)?;
        subvolume::snapshot(&self.tree_dir(from), head, Mode::Writable)
            .map_err(|error| Error::new(operation, from.snapshot, error.into_kind()))?;
        self.limit_head(operation, head, quota_bytes)
    }

    /// Makes the head of a volume that has none: its newest snapshot's tree, or an empty one.
    pub(super) fn materialise_head(self: &Arc<Self>, operation: &'static str, volume: VolumeId) -> Result<()> {
        if self.head_dir(volume).exists() {
            return Ok(());
        }
        let quota_bytes = self.volume(operation, volume)?.quota_bytes;
        let stage = self.stage(operation, "head")?;
        let head = stage.path().join("head");
        match self.tip(volume)? {
            None => {
                make_head(operation, &head)?;
                self.limit_head(operation, &head, quota_bytes)?;
            }
            Some(tip) => self.head_from(operation, tip, &head, quota_bytes)?,
        }
        self.sync(operation)?;
        fault::point("btrfs.materialise.before-publish");
        let _publishing = self.publishing();
        stage.publish(operation, "head", &self.head_dir(volume))?;
        fault::point("btrfs.materialise.published");
        Ok(())
    }

    pub(super) fn rewind(self: &Arc<Self>, to: SnapshotKey) -> Result<()> {
        const OPERATION: &str = "rewind to snapshot";
        let quota_bytes = self.volume(OPERATION, to.volume)?.quota_bytes;
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
        self.head_from(OPERATION, to, &stage.path().join("head"), quota_bytes)?;
        self.sync(OPERATION)?;
        fault::point("btrfs.rewind.before-publish");
        let publishing = self.publishing();
        // A volume without a head is as its newest snapshot: with this rename the rewind is done. What follows only
        // saves making the head once more.
        let trashed = self.trash(OPERATION, &self.head_dir(to.volume))?;
        fault::point("btrfs.rewind.trashed");
        stage.publish(OPERATION, "head", &self.head_dir(to.volume))?;
        drop(publishing);
        fault::point("btrfs.rewind.published");
        self.delete_trashed(trashed);
        Ok(())
    }

    pub(super) fn clone_from(self: &Arc<Self>, record: &VolumeRecord) -> Result<()> {
        const OPERATION: &str = "clone volume";
        self.check_record(OPERATION, record)?;
        self.refuse_taken(OPERATION, record)?;
        let Some(origin) = record.origin else {
            let why = ErrorKind::Unsupported("a clone's record must name its origin".to_owned());
            return Err(Error::new(OPERATION, &record.name, why));
        };
        self.volume(OPERATION, origin.volume)?;
        self.stored(OPERATION, origin)?;
        let stage = self.stage(OPERATION, "clone")?;
        let dir = stage.path().join("volume");
        lay_out_volume(&dir, record).map_err(|error| Error::io(OPERATION, &record.name, error))?;
        self.head_from(OPERATION, origin, &dir.join("head"), record.quota_bytes)?;
        self.sync(OPERATION)?;
        fault::point("btrfs.clone.before-publish");
        let _publishing = self.publishing();
        // The origin may have been forgotten meanwhile.
        self.stored(OPERATION, origin)?;
        stage.publish(OPERATION, "volume", &self.volume_dir(record.id))?;
        fault::point("btrfs.clone.published");
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
        self.attached().insert(target, Attachment { serves });
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
        Ok(TreeView::still(Root::open(path)?, Links::ByInode).begun(begun))
    }

    pub(super) fn detach(&self, target: Target) {
        self.attached().remove(&target);
    }

    /// Tells whether the volume's head makes way for a received snapshot: a replica's does, when nobody changed it.
    pub(super) fn head_to_replace(self: &Arc<Self>, operation: &'static str, volume: VolumeId) -> Result<bool> {
        let record = self.volume(operation, volume)?;
        if record.role == Role::Primary || !self.head_dir(volume).exists() {
            return Ok(false);
        }
        let in_use = self.attached().get(&Target::Head(volume)).is_some_and(|attachment| attachment.serves.is_none());
        refuse_blocked(operation, volume, Blockers { attached: in_use, ..Blockers::default() })?;
        match self.head_state(volume)? {
            HeadState::Clean => Ok(true),
            HeadState::Dirty => {
                let why = "the replica's head has changes that no snapshot holds; take a snapshot of it first";
                Err(Error::new(operation, volume, ErrorKind::Unsupported(why.to_owned())))
            }
        }
    }
}
