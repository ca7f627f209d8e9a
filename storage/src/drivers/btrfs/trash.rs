//! The trash: whatever goes is renamed in here by one atomic step first, and deleted afterwards.

use std::path::{Path, PathBuf};

use uuid::Uuid;

use super::{pool::Pool, subvolume};
use crate::{
    error::{Error, Result},
    fault,
    records::sync_dir,
};

/// Something in the trash.
#[derive(Debug)]
#[must_use = "what is trashed wants to be deleted"]
pub(super) struct Trashed(PathBuf);

impl Pool {
    /// Renames a place into the trash. From here on it is gone for everybody; what was there is deleted by
    /// [`Pool::delete_trashed`] or at the next open.
    pub(super) fn trash(&self, operation: &'static str, path: &Path) -> Result<Trashed> {
        let to = self.trash_dir().join(Uuid::now_v7().to_string());
        std::fs::rename(path, &to).map_err(|error| Error::io(operation, path.display(), error))?;
        if let Some(parent) = path.parent() {
            sync_dir(parent).map_err(|error| Error::io(operation, parent.display(), error))?;
        }
        Ok(Trashed(to))
    }

    /// Deletes what was trashed. A failure is logged and tried again at the next open: the verb is done already.
    pub(super) fn delete_trashed(&self, trashed: Trashed) {
        fault::point("btrfs.trash.deleting");
        delete(&trashed.0);
    }

    /// Deletes all that is in the trash.
    pub(super) fn empty_trash(&self) {
        for entry in std::fs::read_dir(self.trash_dir()).into_iter().flatten().flatten() {
            delete(&entry.path());
        }
    }

    /// Deletes what was trashed on a thread of its own, for a caller that may not wait. The pool joins it when it closes.
    pub(super) fn delete_later(&self, trashed: Trashed) {
        let work = move || delete(&trashed.0);
        match std::thread::Builder::new().name("flocker-trash".to_owned()).spawn(work) {
            Ok(thread) => self.join_at_close(thread),
            Err(error) => tracing::warn!(%error, "no thread to empty the trash; the next open does it"),
        }
    }

    /// Trashes and deletes a leftover that may be gone already.
    pub(super) fn clear_away(&self, path: &Path) {
        match self.trash("clear away", path) {
            Ok(trashed) => self.delete_trashed(trashed),
            Err(_) => delete(path),
        }
    }

    /// Deletes a place in staging where it lies.
    pub(super) fn delete_staged(&self, path: &Path) {
        delete(path);
    }

    fn trash_dir(&self) -> PathBuf {
        self.root().join("trash")
    }
}

fn delete(path: &Path) {
    if let Err(error) = subvolume::delete_all(path) {
        tracing::warn!(path = %path.display(), %error, "something in the trash cannot be deleted yet");
    }
}
