//! The trash: whatever goes is renamed in here by one atomic step first, and deleted afterwards.
//!
//! Owns deletion. It works on trees of any depth with two open directories, and on directories that their owner may not
//! write to: a directory found inside another is renamed up into the trash and deleted in its turn.

use std::{
    io,
    path::{Path, PathBuf},
};

use rustix::{
    fs::{self as sys, AtFlags, Dir, Mode, OFlags},
    io::Errno,
};
use uuid::Uuid;

use super::pool::Pool;
use crate::{
    error::{Error, Result},
    fault,
    records::sync_dir,
};

/// How often a directory is read again when something came into it while it was emptied.
const RESCANS: usize = 8;

impl Pool {
    /// Renames a tree into the trash. From here on it is gone for everybody; what was there is deleted by
    /// [`Pool::delete_trashed`] or at the next open.
    pub(super) fn trash(&self, operation: &'static str, path: &Path) -> Result<Trashed> {
        let name = Uuid::now_v7();
        let to = self.trash_dir().join(name.to_string());
        std::fs::rename(path, &to).map_err(|error| Error::io(operation, path.display(), error))?;
        if let Some(parent) = path.parent() {
            sync_dir(parent).map_err(|error| Error::io(operation, parent.display(), error))?;
        }
        Ok(Trashed(name))
    }

    /// Deletes what was trashed. A failure is logged and tried again at the next open: the verb is done already.
    pub(super) fn delete_trashed(&self, trashed: Trashed) {
        if let Err(error) = delete(&self.trash_dir(), &trashed.0.to_string()) {
            tracing::warn!(pool = %self.root().display(), %error, "something in the trash cannot be deleted yet");
        }
    }

    /// Deletes all that is in the trash.
    pub(super) fn empty_trash(&self) {
        let dir = self.trash_dir();
        let Ok(entries) = std::fs::read_dir(&dir) else { return };
        for entry in entries.flatten() {
            if let Err(error) = delete_any(&dir, &entry.path()) {
                tracing::warn!(path = %entry.path().display(), %error, "something in the trash cannot be deleted yet");
            }
        }
    }

    /// Deletes what was trashed on a thread of its own, for a caller that may not wait. The pool joins it when it closes.
    pub(super) fn delete_later(&self, trashed: Trashed) {
        let (dir, stop) = (self.trash_dir(), self.closing());
        let work = move || {
            if !stop.load(std::sync::atomic::Ordering::Relaxed) {
                let _ = delete(&dir, &trashed.0.to_string());
            }
        };
        match std::thread::Builder::new().name("flocker-trash".to_owned()).spawn(work) {
            Ok(thread) => self.join_at_close(thread),
            Err(error) => tracing::warn!(%error, "no thread to empty the trash; the next open does it"),
        }
    }

    /// Trashes and deletes a leftover that may be gone already.
    pub(super) fn clear_away(&self, path: &Path) {
        match self.trash("clear away", path) {
            Ok(trashed) => self.delete_trashed(trashed),
            Err(_) => self.delete_staged(path),
        }
    }

    /// Deletes a place in staging where it lies.
    pub(super) fn delete_staged(&self, path: &Path) {
        if let Err(error) = delete_any(&self.staging_dir(), path) {
            tracing::warn!(path = %path.display(), %error, "a place in staging cannot be deleted yet");
        }
    }

    fn trash_dir(&self) -> PathBuf {
        self.root().join("trash")
    }
}

/// Something in the trash.
#[derive(Debug)]
#[must_use = "what is trashed wants to be deleted"]
pub(super) struct Trashed(Uuid);

fn delete_any(trash: &Path, path: &Path) -> io::Result<()> {
    match path.file_name().and_then(|name| name.to_str()) {
        Some(name) => delete(trash, name),
        None => Ok(()),
    }
}

/// Deletes one name of the trash with all below it. What is gone already is fine: two may delete at once.
fn delete(trash: &Path, name: &str) -> io::Result<()> {
    let trash = sys::open(trash, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    match sys::unlinkat(&trash, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        // A directory: EISDIR on Linux, EPERM by POSIX.
        Err(Errno::ISDIR | Errno::PERM) => {}
        Err(error) => return Err(error.into()),
    }
    let mut waiting: Vec<String> = vec![name.to_owned()];
    while let Some(name) = waiting.pop() {
        delete_directory(&trash, &name, &mut waiting)?;
        fault::point("directory.trash.deleting");
    }
    Ok(())
}

fn delete_directory(trash: &impl rustix::fd::AsFd, name: &str, waiting: &mut Vec<String>) -> io::Result<()> {
    for _ in 0..RESCANS {
        match sys::unlinkat(trash, name, AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOENT) => return Ok(()),
            Err(_) => {}
        }
        allow(trash, name)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let dir = match sys::openat(trash, name, flags, Mode::empty()) {
            Ok(fd) => fd,
            Err(Errno::NOENT) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        for entry in Dir::read_from(&dir)? {
            let entry = entry?;
            let child = entry.file_name();
            if child.to_bytes() == b"." || child.to_bytes() == b".." {
                continue;
            }
            match sys::unlinkat(&dir, child, AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => continue,
                Err(Errno::ISDIR | Errno::PERM) => {}
                Err(error) => return Err(error.into()),
            }
            if sys::unlinkat(&dir, child, AtFlags::REMOVEDIR).is_ok() {
                continue;
            }
            // Moving a directory rewrites its "..", for which its own mode must let us write.
            allow(&dir, child)?;
            let up = Uuid::now_v7().to_string();
            match sys::renameat(&dir, child, trash, up.as_str()) {
                Ok(()) => waiting.push(up),
                Err(Errno::NOENT) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
    match sys::unlinkat(trash, name, AtFlags::REMOVEDIR) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Lets the owner list and change a directory.
fn allow(dir: &impl rustix::fd::AsFd, name: impl rustix::path::Arg + Copy) -> io::Result<()> {
    match sys::chmodat(dir, name, Mode::RWXU, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::{fs, os::unix::fs::PermissionsExt};

    use super::*;

    #[test]
    fn a_tree_deeper_than_a_path_can_be_is_deleted_closed_directories_too() {
        let trash = tempfile::tempdir().unwrap();
        let top = trash.path().join("tree");
        fs::create_dir(&top).unwrap();
        let mut here = sys::open(&top, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).unwrap();
        let name = "d".repeat(100);
        for _ in 0..200 {
            sys::mkdirat(&here, name.as_str(), Mode::RWXU).unwrap();
            here = sys::openat(&here, name.as_str(), OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).unwrap();
            sys::openat(&here, "file", OFlags::CREATE | OFlags::WRONLY, Mode::empty()).unwrap();
        }
        let closed = top.join("closed");
        fs::create_dir(&closed).unwrap();
        fs::write(closed.join("file"), "x").unwrap();
        fs::set_permissions(&closed, fs::Permissions::from_mode(0o000)).unwrap();
        delete(trash.path(), "tree").unwrap();
        assert_eq!(fs::read_dir(trash.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_link_in_the_trash_is_not_followed() {
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join("kept"), "x").unwrap();
        let trash = tempfile::tempdir().unwrap();
        fs::create_dir(trash.path().join("tree")).unwrap();
        std::os::unix::fs::symlink(outside.path(), trash.path().join("tree/link")).unwrap();
        std::os::unix::fs::symlink(outside.path(), trash.path().join("link")).unwrap();
        delete(trash.path(), "tree").unwrap();
        delete(trash.path(), "link").unwrap();
        assert!(outside.path().join("kept").exists());
        assert_eq!(fs::read_dir(trash.path()).unwrap().count(), 0);
    }
}
