//! The trash: whatever goes is renamed in here by one atomic step first, and destroyed afterwards, one thing at a time.

use uuid::Uuid;

use super::{
    catalog::gone,
    pool::{Pool, locked},
    program::{Class, Trouble, patiently},
};
use crate::{
    error::{Error, Result},
    fault,
    model::VolumeId,
};

/// How many snapshots one command destroys where it takes several.
const AT_ONCE: usize = 100;

/// Something in the trash.
#[derive(Debug)]
#[must_use = "what is trashed wants to be destroyed"]
pub(super) struct Trashed(String);

impl Pool {
    /// Renames a dataset into the trash. From here on it is gone for everybody; it is destroyed by
    /// [`Pool::delete_trashed`] or at the next open.
    pub(super) fn trash(&self, operation: &'static str, dataset: &str) -> Result<Trashed> {
        let to = format!("{}/{}", self.folder("trash"), Uuid::now_v7());
        let renamed = self.rename(dataset, &to);
        renamed.map_err(|trouble: Trouble| -> Error { trouble.into_error(operation, dataset) })?;
        Ok(Trashed(to))
    }

    /// Renames a dataset. Nothing that depends on it is unmounted for that where the program can be told so.
    pub(super) fn rename(&self, from: &str, to: &str) -> std::result::Result<(), Trouble> {
        self.settle_views();
        if self.abilities.modern {
            match self.programs.zfs_patiently(&["rename", "-u", from, to]) {
                Err(trouble) if trouble.class == Class::Usage => {}
                other => return other.map(drop),
            }
        }
        self.programs.zfs_patiently(&["rename", from, to]).map(drop)
    }

    /// Destroys what was trashed. A failure is logged and tried again at the next open: the verb is done already.
    pub(super) fn delete_trashed(&self, trashed: Trashed) {
        fault::point("zfs.trash.deleting");
        self.delete(&trashed.0);
    }

    /// Destroys a dataset that nobody needs, with its snapshots; nothing beneath it, and nothing that depends on it.
    pub(super) fn delete(&self, dataset: &str) {
        if let Err(trouble) = self.try_delete(dataset) {
            tracing::warn!(dataset, error = %trouble.error, "something in the trash cannot be destroyed yet");
        }
    }

    fn try_delete(&self, dataset: &str) -> std::result::Result<(), Trouble> {
        self.settle_views();
        self.unmount(&self.mount_point(dataset))?;
        let listed = match self.list(dataset, "type,userrefs") {
            Err(trouble) if trouble.class == Class::NotFound => return Ok(()),
            listed => listed?,
        };
        let own: Vec<&str> =
            listed.iter().filter(|it| it.dataset() == dataset).filter_map(|it| it.snapshot()).collect();
        for it in listed.iter().filter(|it| it.property("userrefs").is_some_and(|count| count != "0")) {
            self.release(&[&it.name]);
        }
        let several = if self.abilities.modern { AT_ONCE } else { 1 };
        // Newest first: that way each gives back what only it holds.
        let newest_first: Vec<&str> = own.into_iter().rev().collect();
        for names in newest_first.chunks(several) {
            gone(self.programs.zfs_patiently(&["destroy", &format!("{dataset}@{}", names.join(","))]))?;
        }
        patiently(|| {
            self.unmount(&self.mount_point(dataset))?;
            gone(self.programs.zfs(&["destroy", dataset]))
        })
    }

    /// Destroys a snapshot of a head that was taken for a moment. A receive that began in that moment builds on it on zfs-fuse, so
    /// it goes when that has ended.
    pub(super) fn delete_momentary(&self, volume: VolumeId, name: &str) {
        self.settle_views();
        match gone(self.programs.zfs_patiently(&["destroy", name])) {
            Err(trouble) if trouble.class == Class::Exists => {
                locked(&self.outlived).push(name.to_owned());
                if !self.receiving().contains(&volume) {
                    self.delete_outlived(volume);
                }
            }
            Err(trouble) => {
                tracing::warn!(name, error = %trouble.error, "a snapshot of a head cannot be destroyed yet");
            }
            Ok(_) => {}
        }
    }

    /// Destroys what a receive for a volume stood in the way of, which is over.
    pub(super) fn delete_outlived(&self, volume: VolumeId) {
        let of_volume = format!("{}@", self.volume_dataset(volume));
        let names: Vec<String> = locked(&self.outlived).extract_if(.., |name| name.starts_with(&of_volume)).collect();
        names.iter().for_each(|name| self.delete_snapshot(name));
    }

    /// Destroys one snapshot that nobody needs; a failure is logged and tried again at the next open.
    pub(super) fn delete_snapshot(&self, name: &str) {
        self.settle_views();
        if let Err(error) = gone(self.programs.zfs_patiently(&["destroy", name])) {
            tracing::warn!(name, error = %error.error, "a snapshot cannot be destroyed yet");
        }
    }
}
