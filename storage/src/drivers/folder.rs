//! Folders that are pools: what makes one, who may have it open, and the one rename that publishes something in it.
//!
//! Owns what the drivers that keep their pool as a folder have in common: its record and first set-up, the lock, the mode
//! of what is made in it. Refuses to know what the trees in it are. Neighbour: [`super::partial`].

use std::{
    fs::{self, DirBuilder, File},
    io,
    os::unix::fs::DirBuilderExt,
    path::Path,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use rustix::fs as sys;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{PoolSpec, lock};
use crate::{
    error::{Error, ErrorKind, Result},
    model::SnapshotKey,
    records::{self, RecordError, sync_dir},
};

/// The layout this version writes.
const POOL_FORMAT: u32 = 1;
pub(super) const POOL_RECORD: &str = "flocker-pool.json";
const LOCK: &str = "lock";
/// How long programs are waited for that a process which is gone was starting when it went.
const CHILDREN: Duration = Duration::from_secs(5);
const FOLDERS: [&str; 3] = ["volumes", "staging", "trash"];
/// What a fresh file system may hold and still count as empty.
const LOST_AND_FOUND: &str = "lost+found";

#[derive(Serialize, Deserialize)]
struct PoolRecord {
    format: u32,
    id: Uuid,
    driver: String,
}

/// An attached target.
#[derive(Debug, Clone, Copy)]
pub(super) struct Attachment {
    /// The snapshot whose tree was handed out, where it was not the head itself.
    pub(super) serves: Option<SnapshotKey>,
}

/// Makes a pool of a folder that is free, or finds one there; returns its lock.
pub(super) fn take(spec: &PoolSpec, root: &Path) -> Result<File> {
    let unusable = |why: String| Error::new("open pool", spec, ErrorKind::PoolUnusable(why));
    let fresh = look_at(root, spec.driver()).map_err(|why| match why {
        Unusable::Because(why) => unusable(why),
        Unusable::Io(error) => unusable(explain(&error)),
    })?;
    let lock = lock(root, spec)?;
    if fresh {
        set_up(root, spec.driver()).map_err(|error| match error.kind() {
            io::ErrorKind::StorageFull => Error::io("set up pool", spec, error),
            _ => unusable(explain(&error)),
        })?;
    }
    for folder in FOLDERS {
        make_dir(&root.join(folder)).map_err(|error| unusable(explain(&error)))?;
    }
    Ok(lock)
}

/// Publishes something by one rename, durably. The target must not exist.
pub(super) fn publish(operation: &'static str, from: &Path, to: &Path) -> Result<()> {
    let failed = |error: io::Error| Error::io(operation, to.display(), error);
    let from_parent = from.parent().unwrap_or(from).to_owned();
    sys::renameat_with(sys::CWD, from, sys::CWD, to, sys::RenameFlags::NOREPLACE)
        .or_else(|error| match error {
            // Not every file system knows the flag; the driver is alone in the pool, so a look before is enough.
            rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS if !to.exists() => sys::rename(from, to),
            error => Err(error),
        })
        .map_err(|error| match error {
            rustix::io::Errno::EXIST => Error::new(operation, to.display(), ErrorKind::AlreadyExists),
            error => failed(error.into()),
        })?;
    sync_dir(&from_parent).map_err(failed)?;
    to.parent().map_or(Ok(()), sync_dir).map_err(failed)
}

/// Locks a mutex whose holders leave no state half done.
pub(super) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Makes a directory of mode 0700; one that is there is fine.
pub(super) fn make_dir(path: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
        other => other,
    }
}

/// Makes everything written to the file system that holds `path` durable.
pub(super) fn sync_file_system(path: &Path) -> io::Result<()> {
    sys::syncfs(File::open(path)?)?;
    Ok(())
}

enum Unusable {
    Because(String),
    Io(io::Error),
}

/// Looks at a place without changing it. `true`: a pool can be set up there.
fn look_at(root: &Path, driver: &str) -> std::result::Result<bool, Unusable> {
    match fs::metadata(root) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(true),
        Err(error) => return Err(Unusable::Io(error)),
        Ok(metadata) if !metadata.is_dir() => return Err(Unusable::Because("it is not a directory".to_owned())),
        Ok(_) => {}
    }
    match records::read::<PoolRecord>("pool", &root.join(POOL_RECORD)) {
        Ok(record) if record.format > POOL_FORMAT => {
            let format = record.format;
            Err(Unusable::Because(format!(
                "it has format {format}, written by a newer flocker; this one knows formats up to {POOL_FORMAT}"
            )))
        }
        Ok(record) if record.driver != driver => {
            Err(Unusable::Because(format!("it belongs to the driver {:?}", record.driver)))
        }
        Ok(_) => Ok(false),
        Err(RecordError::Missing) => {
            for entry in fs::read_dir(root).map_err(Unusable::Io)? {
                let name = entry.map_err(Unusable::Io)?.file_name();
                if !is_ours(&name) && name != LOST_AND_FOUND {
                    let name = name.to_string_lossy().into_owned();
                    return Err(Unusable::Because(format!(
                        "the directory is no pool and not empty: it holds {name:?}"
                    )));
                }
            }
            match fs::read_dir(root.join("volumes")).map(|mut entries| entries.next().is_some()) {
                Ok(true) => Err(Unusable::Because(format!("it holds volumes, but {POOL_RECORD} is missing"))),
                _ => Ok(true),
            }
        }
        Err(RecordError::Io(error)) => Err(Unusable::Io(error)),
        Err(error) => Err(Unusable::Because(format!("{POOL_RECORD}: {error}"))),
    }
}

/// Tells whether a name at the top of a pool is one that the driver makes.
pub(super) fn is_ours(name: &std::ffi::OsStr) -> bool {
    let name = name.to_string_lossy();
    FOLDERS.contains(&&*name) || name == LOCK || name == POOL_RECORD || name == format!("{POOL_RECORD}.new")
}

pub(super) fn explain(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::PermissionDenied => {
            format!("the node's user (uid {}) may not write there", rustix::process::geteuid().as_raw())
        }
        io::ErrorKind::ReadOnlyFilesystem => "the file system is read-only".to_owned(),
        io::ErrorKind::NotADirectory => "a part of its path is not a directory".to_owned(),
        _ => error.to_string(),
    }
}

fn lock(root: &Path, spec: &PoolSpec) -> Result<File> {
    let failed = |kind: ErrorKind| Error::new("open pool", spec, kind);
    let unusable = |error: io::Error| ErrorKind::PoolUnusable(explain(&error));
    DirBuilder::new().mode(0o700).recursive(true).create(root).map_err(|error| failed(unusable(error)))?;
    lock::take(&root.join(LOCK), CHILDREN).map_err(|error| failed(error.into_kind(unusable)))
}

/// The record is written last: a pool without it was never used.
fn set_up(root: &Path, driver: &str) -> io::Result<()> {
    for folder in FOLDERS {
        make_dir(&root.join(folder))?;
    }
    let record = PoolRecord { format: POOL_FORMAT, id: Uuid::now_v7(), driver: driver.to_owned() };
    records::write("pool", root, POOL_RECORD, &record)
}
