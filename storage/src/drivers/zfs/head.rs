//! Heads: the live datasets of volumes, mounted while they are attached.

use std::{path::PathBuf, sync::Arc};

use uuid::Uuid;

use super::{
    catalog::{self, is_passing, missing, options, refuse_blocked},
    pool::{Attachment, Pool},
    program::Trouble,
    view::{is_mounted, view_name},
    volume::Volume,
};
use crate::{
    driver::{Access, Target},
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
    pub(super) fn head_state(self: &Arc<Self>, volume: VolumeId) -> Result<HeadState> {
        const OPERATION: &str = "compare head of";
        let is_clean = self.again_if_gone(|| self.head_is_clean(OPERATION, &*self.known(OPERATION, volume)?))?;
        Ok(if is_clean { HeadState::Clean } else { HeadState::Dirty })
    }

    /// Compares the head with the newest snapshot: a snapshot of it is made for a moment, and the program says what
    /// differs. That costs what was changed, not what is there.
    pub(super) fn head_is_clean(self: &Arc<Self>, operation: &'static str, volume: &Volume) -> Result<bool> {
        let tip = self.tip(operation, volume)?;
        let dataset = &volume.found.name;
        if let Some((tip, _)) = &tip
            && self.abilities.modern
            && !is_mounted(&self.mount_point(dataset))
        {
            let property = format!("written@{}", tip.snapshot);
            let property = if tip.volume == volume.id() { property } else { "written".to_owned() };
            let found = self.look(dataset, &property).map_err(|trouble| trouble.into_error(operation, dataset))?;
            if found.property(&property) == Some("0") {
                return Ok(true);
            }
        }
        let now = self.moment(operation, volume)?;
        match tip {
            Some((tip, _)) => self.is_as(operation, tip, &now.name),
            None => {
                let view = self.view_of(operation, &now.name, format!("compared.{}", Uuid::now_v7()))?;
                // Nothing but the root itself.
                Ok(Walk::live(Root::open(view.path())?).take(2).collect::<Result<Vec<_>>>()?.len() < 2)
            }
        }
    }

    /// Takes a snapshot of a head for a moment.
    fn moment(self: &Arc<Self>, operation: &'static str, volume: &Volume) -> Result<Momentary> {
        self.sync_head(operation, volume)?;
        let name = format!("{}@compare.{}", volume.found.name, Uuid::now_v7());
        let taken = self.programs.zfs_patiently(&["snapshot", &name]);
        taken.map_err(|trouble: Trouble| trouble.into_error(operation, volume.id()))?;
        Ok(Momentary { pool: Arc::clone(self), volume: volume.id(), name })
    }

    /// Opens a snapshot to be read; of a head, what it is at this moment.
    pub(super) fn tree_view(self: &Arc<Self>, target: Target) -> Result<TreeView> {
        const OPERATION: &str = "read";
        match target {
            Target::Snapshot(volume, snapshot) => {
                let key = SnapshotKey { volume, snapshot };
                let begun = self.stored(OPERATION, key)?.snapshot.created;
                let view = self.view(OPERATION, key)?;
                let tree = TreeView::still(Root::open(view.path())?, Links::ByInode);
                Ok(tree.begun(begun).guarded(Box::new(view)))
            }
            Target::Head(id) => {
                let volume = self.volume(OPERATION, id)?;
                let now = self.moment(OPERATION, &volume)?;
                let view = self.view_of(OPERATION, &now.name, format!("compared.{}", Uuid::now_v7()))?;
                let tree = TreeView::still(Root::open(view.path())?, Links::ByInode);
                Ok(tree.guarded(Box::new((view, now))))
            }
        }
    }

    pub(super) fn rewind(self: &Arc<Self>, to: SnapshotKey) -> Result<()> {
        const OPERATION: &str = "rewind to snapshot";
        let volume = self.volume(OPERATION, to.volume)?;
        let at = volume.snapshots.iter().position(|stored| stored.snapshot.id == to.snapshot);
        let at = at.ok_or_else(|| missing(OPERATION, to.snapshot))?;
        let newer = volume.snapshots[at + 1..].iter().map(|stored| stored.snapshot.id).collect();
        let attached = self.attached().contains_key(&Target::Head(to.volume));
        refuse_blocked(OPERATION, to.snapshot, Blockers { newer, clones: Vec::new(), attached })?;
        self.unmount_head(OPERATION, to.volume)?;
        fault::point("zfs.rewind.before-rollback");
        self.roll_back(OPERATION, &volume, to)?;
        fault::point("zfs.rewind.rolled-back");
        Ok(())
    }

    /// Puts the dataset back to its newest snapshot. Snapshots of somebody else that are newer stand in the way, and stay.
    pub(super) fn roll_back(&self, operation: &'static str, volume: &Volume, to: SnapshotKey) -> Result<()> {
        for it in volume.all.iter().filter(|it| is_passing(&it.name)) {
            self.delete_snapshot(&format!("{}@{}", volume.found.name, it.name));
        }
        let done = self.programs.zfs_patiently(&["rollback", &self.snapshot_name(to)]);
        done.map_err(|trouble: Trouble| trouble.into_error(operation, to.snapshot))?;
        self.set_level(volume.id(), true);
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
        let _publishing = self.publishing();
        self.stored(OPERATION, origin)?;
        let encoded = catalog::encode(OPERATION, "volume", 1, record)?;
        let dataset = self.volume_dataset(record.id);
        let mut words = vec!["clone".to_owned()];
        words.extend(options(record, &encoded));
        words.extend([self.snapshot_name(origin), dataset.clone()]);
        fault::point("zfs.clone.before-publish");
        let cloned = self.programs.zfs_patiently(&words);
        cloned.map_err(|trouble: Trouble| trouble.into_error(OPERATION, &record.name))?;
        fault::point("zfs.clone.published");
        // zfs-fuse mounts every clone.
        self.unmount_head(OPERATION, record.id)
    }

    pub(super) fn attach(self: &Arc<Self>, target: Target, access: Access) -> Result<PathBuf> {
        const OPERATION: &str = "attach";
        let serves = match target {
            Target::Snapshot(volume, snapshot) => {
                let key = SnapshotKey { volume, snapshot };
                self.stored(OPERATION, key)?;
                if access == Access::ReadWrite {
                    let why = "a snapshot is read-only; clone it to write".to_owned();
                    return Err(Error::new(OPERATION, snapshot, ErrorKind::Unsupported(why)));
                }
                Some(key)
            }
            Target::Head(id) => {
                let volume = self.volume(OPERATION, id)?;
                match self.tip(OPERATION, &volume)? {
                    // A replica's read-only head is its newest snapshot.
                    Some((tip, _)) if access == Access::ReadOnly && volume.record.role == Role::Replica => Some(tip),
                    _ => {
                        self.make_writable(OPERATION, &volume, access)?;
                        None
                    }
                }
            }
        };
        let mut attached = self.attached();
        let before = attached.get(&target).map(|attachment| attachment.serves);
        let path = match (serves, target) {
            (Some(key), _) if before == Some(serves) => self.mounts().join("views").join(view_name(key)),
            (Some(key), _) => self.enter_view(OPERATION, &self.snapshot_name(key), &view_name(key))?,
            (None, Target::Head(volume) | Target::Snapshot(volume, _)) => self.mount_head(OPERATION, volume)?,
        };
        attached.insert(target, Attachment { serves });
        drop(attached);
        if let Some(Some(old)) = before.filter(|before| *before != serves) {
            self.leave_view(&view_name(old));
        }
        Ok(path)
    }

    /// A replica rests read-only; a head that is to be written to, or is a primary's, does not stay so.
    fn make_writable(&self, operation: &'static str, volume: &Volume, access: Access) -> Result<()> {
        if !volume.is_read_only() || (access == Access::ReadOnly && volume.record.role == Role::Replica) {
            return Ok(());
        }
        self.unmount_head(operation, volume.id())?;
        let dataset = &volume.found.name;
        self.set(dataset, "readonly", "off").map_err(|trouble| trouble.into_error(operation, dataset))
    }

    pub(super) fn detach(self: &Arc<Self>, target: Target) -> Result<()> {
        const OPERATION: &str = "detach";
        let Some(attachment) = self.attached().remove(&target) else { return Ok(()) };
        if let Some(key) = attachment.serves {
            self.leave_view(&view_name(key));
            self.settle_views();
            return Ok(());
        }
        let Target::Head(id) = target else { return Ok(()) };
        if let Err(error) = self.unmount_head(OPERATION, id) {
            // Somebody still uses it. It is unmounted before anything is done to the head.
            tracing::info!(volume = %id, %error, "the head is in use and stays mounted until something is done to it");
            return Ok(());
        }
        let Ok(volume) = self.volume(OPERATION, id) else { return Ok(()) };
        if volume.record.role == Role::Replica && !volume.is_read_only() {
            let dataset = &volume.found.name;
            self.set(dataset, "readonly", "on").map_err(|trouble| trouble.into_error(OPERATION, dataset))?;
        }
        Ok(())
    }

    /// Makes sure that nobody uses the head.
    pub(super) fn free_head(&self, operation: &'static str, volume: &Volume) -> Result<()> {
        let id = volume.id();
        refuse_blocked(operation, id, Blockers { attached: self.is_head_in_use(id), ..Blockers::default() })?;
        self.unmount_head(operation, id)
    }

    /// Makes sure that a received snapshot may take the place of the head: nobody uses it, and it holds nothing of its own.
    pub(super) fn head_gives_way(self: &Arc<Self>, operation: &'static str, volume: &Volume) -> Result<()> {
        self.free_head(operation, volume)?;
        if !self.head_is_clean(operation, volume)? {
            let why = "the head has changes that no snapshot holds; take a snapshot of it first";
            return Err(Error::new(operation, volume.id(), ErrorKind::Unsupported(why.to_owned())));
        }
        Ok(())
    }
}

/// A snapshot that is destroyed when it is not needed any more.
struct Momentary {
    pool: Arc<Pool>,
    volume: VolumeId,
    name: String,
}

impl Drop for Momentary {
    fn drop(&mut self) {
        self.pool.delete_momentary(self.volume, &self.name);
    }
}
