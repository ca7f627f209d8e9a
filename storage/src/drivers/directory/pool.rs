//! An open pool of the directory driver: where things lie, who may have it open, what the file system can do.
//!
//! ```text
//! POOL/flocker-pool.json                         the format, so that a newer pool is refused
//! POOL/lock                                      flock: one node at a time; holds its process id
//! POOL/volumes/<volume-id>/volume.json           the volume's record
//! POOL/volumes/<volume-id>/head/                 the writable tree; missing while it equals the newest snapshot
//! POOL/volumes/<volume-id>/baselines/            what the head looked like when it last equalled a snapshot
//! POOL/volumes/<volume-id>/snapshots/<id>/       snapshot.json, inventory, tree/
//! POOL/staging/                                  what is being made; one rename publishes it
//! POOL/trash/                                    what is being deleted
//! ```
//! Everything here is of mode 0700, so that the exact modes inside the trees open nothing to anybody.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Read, Seek, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::AtomicBool},
    thread::JoinHandle,
};

use rustix::fs::{self as sys, FlockOperation};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{
    delta::DeltaFormat,
    driver::{Capabilities, Target, Usage},
    drivers::{PoolSpec, partial},
    error::{Error, ErrorKind, Result},
    model::{SnapshotId, SnapshotKey, VolumeId},
    records::{self, RecordError, sync_dir},
};

/// The layout this version writes.
const POOL_FORMAT: u32 = 1;
const POOL_RECORD: &str = "flocker-pool.json";
const LOCK: &str = "lock";
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

/// An open pool. The lock goes with the value.
pub(super) struct Pool {
    root: PathBuf,
    capabilities: Capabilities,
    attached: Mutex<HashMap<Target, Attachment>>,
    receiving: Mutex<HashSet<VolumeId>>,
    publishing: Mutex<()>,
    closing: Arc<AtomicBool>,
    deleting: Mutex<Vec<JoinHandle<()>>>,
    _lock: File,
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.closing.store(true, std::sync::atomic::Ordering::Relaxed);
        for thread in locked(&self.deleting).drain(..) {
            let _ = thread.join();
        }
    }
}

impl Pool {
    /// Opens a pool, sets it up where the place is free, finishes or clears away what was interrupted.
    pub(super) fn open(spec: &PoolSpec) -> Result<Arc<Self>> {
        let root = PathBuf::from(spec.place());
        let unusable = |why: String| Error::new("open pool", spec, ErrorKind::PoolUnusable(why));
        let fresh = look_at(&root).map_err(|why| match why {
            Unusable::Because(why) => unusable(why),
            Unusable::Io(error) => unusable(explain(&error)),
        })?;
        let lock = lock(&root, spec)?;
        if fresh {
            set_up(&root).map_err(|error| match error.kind() {
                io::ErrorKind::StorageFull => Error::io("set up pool", spec, error),
                _ => unusable(explain(&error)),
            })?;
        }
        for folder in FOLDERS {
            make_dir(&root.join(folder)).map_err(|error| unusable(explain(&error)))?;
        }
        let capabilities = probe(spec, &root)?;
        let pool = Arc::new(Self {
            root,
            capabilities,
            attached: Mutex::default(),
            receiving: Mutex::default(),
            publishing: Mutex::default(),
            closing: Arc::default(),
            deleting: Mutex::default(),
            _lock: lock,
        });
        // Space first: on a full disk the rest may need it.
        pool.clear_staging();
        pool.empty_trash();
        pool.finish_splits()?;
        pool.tidy_baselines()?;
        Ok(pool)
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }
    pub(super) fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }
    pub(super) fn volumes_dir(&self) -> PathBuf {
        self.root.join("volumes")
    }
    pub(super) fn volume_dir(&self, volume: VolumeId) -> PathBuf {
        self.volumes_dir().join(volume.to_string())
    }
    pub(super) fn head_dir(&self, volume: VolumeId) -> PathBuf {
        self.volume_dir(volume).join("head")
    }
    pub(super) fn snapshots_dir(&self, volume: VolumeId) -> PathBuf {
        self.volume_dir(volume).join("snapshots")
    }
    pub(super) fn snapshot_dir(&self, key: SnapshotKey) -> PathBuf {
        self.snapshots_dir(key.volume).join(key.snapshot.to_string())
    }
    pub(super) fn tree_dir(&self, key: SnapshotKey) -> PathBuf {
        self.snapshot_dir(key).join("tree")
    }
    pub(super) fn inventory_path(&self, key: SnapshotKey) -> PathBuf {
        self.snapshot_dir(key).join("inventory")
    }
    pub(super) fn staging_dir(&self) -> PathBuf {
        self.root.join("staging")
    }
    /// Where a receive of this snapshot for this volume is built: its name is all that a restart needs to find it.
    pub(super) fn receive_dir(&self, volume: VolumeId, snapshot: SnapshotId) -> PathBuf {
        self.staging_dir().join(partial::place(volume, snapshot))
    }
    pub(super) fn attached(&self) -> MutexGuard<'_, HashMap<Target, Attachment>> {
        locked(&self.attached)
    }
    pub(super) fn receiving(&self) -> MutexGuard<'_, HashSet<VolumeId>> {
        locked(&self.receiving)
    }
    /// Held for the few renames that publish one verb, so that nobody lists the pool between two of them.
    pub(super) fn publishing(&self) -> MutexGuard<'_, ()> {
        locked(&self.publishing)
    }
    pub(super) fn closing(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.closing)
    }
    pub(super) fn join_at_close(&self, thread: JoinHandle<()>) {
        let mut threads = locked(&self.deleting);
        threads.retain(|thread| !thread.is_finished());
        threads.push(thread);
    }

    /// Makes a new place in staging. It is cleared away when dropped, unless [`Stage::publish`] moved it off.
    pub(super) fn stage(self: &Arc<Self>, operation: &'static str, purpose: &str) -> Result<Stage> {
        let path = self.staging_dir().join(format!("{purpose}-{}", Uuid::now_v7()));
        self.stage_at(operation, path)
    }

    /// Makes a place in staging at a path known beforehand.
    pub(super) fn stage_at(self: &Arc<Self>, operation: &'static str, path: PathBuf) -> Result<Stage> {
        make_dir(&path).map_err(|error| Error::io(operation, path.display(), error))?;
        Ok(Stage { pool: Arc::clone(self), path, keep: false })
    }

    /// Takes over a place in staging that exists.
    pub(super) fn stage_found(self: &Arc<Self>, path: PathBuf) -> Stage {
        Stage { pool: Arc::clone(self), path, keep: false }
    }

    /// Makes all that was written to the pool durable.
    pub(super) fn sync(&self, operation: &'static str) -> Result<()> {
        sync_file_system(&self.staging_dir()).map_err(|error| Error::io(operation, self.root.display(), error))
    }

    pub(super) fn usage(&self) -> Result<Usage> {
        let stat = sys::statvfs(&self.root).map_err(|error| Error::io("measure pool", self.root.display(), error))?;
        Ok(Usage {
            total_bytes: stat.f_blocks.saturating_mul(stat.f_frsize),
            available_bytes: stat.f_bavail.saturating_mul(stat.f_frsize),
        })
    }

    fn clear_staging(&self) {
        let Ok(entries) = fs::read_dir(self.staging_dir()) else { return };
        for entry in entries.flatten() {
            let path = entry.path();
            if !super::receive::is_suspended(&path) {
                self.clear_away(&path);
            }
        }
    }
}

/// A place in staging, cleared away when dropped.
pub(super) struct Stage {
    pool: Arc<Pool>,
    path: PathBuf,
    keep: bool,
}

impl Stage {
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Publishes it, or a part of it, by one rename. The target must not exist.
    pub(super) fn publish(&self, operation: &'static str, part: &str, to: &Path) -> Result<()> {
        let from = self.path.join(part);
        let failed = |error: io::Error| Error::io(operation, to.display(), error);
        let from_parent = from.parent().unwrap_or(&from).to_owned();
        sys::renameat_with(sys::CWD, &from, sys::CWD, to, sys::RenameFlags::NOREPLACE)
            .or_else(|error| match error {
                // Not every file system knows the flag; the driver is alone in the pool, so a look before is enough.
                rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS if !to.exists() => sys::rename(&from, to),
                error => Err(error),
            })
            .map_err(|error| match error {
                rustix::io::Errno::EXIST => Error::new(operation, to.display(), ErrorKind::AlreadyExists),
                error => failed(error.into()),
            })?;
        sync_dir(&from_parent).map_err(failed)?;
        to.parent().map_or(Ok(()), sync_dir).map_err(failed)
    }

    /// Leaves it in staging for a later receive.
    pub(super) fn keep(mut self) {
        self.keep = true;
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        if self.keep || fs::remove_dir(&self.path).is_ok() {
            return;
        }
        match self.pool.trash("clear staging", &self.path) {
            Ok(trashed) => self.pool.delete_later(trashed),
            // A disk can be too full for a rename.
            Err(_) => self.pool.delete_staged(&self.path),
        }
    }
}

/// Locks a mutex whose holders leave no state half done.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
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
fn look_at(root: &Path) -> std::result::Result<bool, Unusable> {
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
        Ok(record) if record.driver != super::NAME => {
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

fn explain(error: &io::Error) -> String {
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
    let unusable = |error: io::Error| Error::new("open pool", spec, ErrorKind::PoolUnusable(explain(&error)));
    DirBuilder::new().mode(0o700).recursive(true).create(root).map_err(unusable)?;
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    let mut file = options.open(root.join(LOCK)).map_err(unusable)?;
    match sys::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => {
            let mut text = String::new();
            let _ = (&mut file).take(32).read_to_string(&mut text);
            return Err(Error::new("open pool", spec, ErrorKind::PoolBusy { pid: text.trim().parse().ok() }));
        }
        Err(error) => return Err(unusable(error.into())),
    }
    // Only for people and for the error above; the lock itself is the kernel's.
    let _ = file.set_len(0).and_then(|()| file.rewind()).and_then(|()| writeln!(file, "{}", std::process::id()));
    Ok(file)
}

/// The record is written last: a pool without it was never used.
fn set_up(root: &Path) -> io::Result<()> {
    for folder in FOLDERS {
        make_dir(&root.join(folder))?;
    }
    let record = PoolRecord { format: POOL_FORMAT, id: Uuid::now_v7(), driver: super::NAME.to_owned() };
    records::write("pool", root, POOL_RECORD, &record)
}

fn probe(spec: &PoolSpec, root: &Path) -> Result<Capabilities> {
    let failed = |error: io::Error| Error::new("open pool", spec, ErrorKind::PoolUnusable(explain(&error)));
    let yes_no = |yes: bool| if yes { "yes" } else { "no" }.to_owned();
    let reflink = probe_reflink(&root.join("staging")).map_err(failed)?;
    let kind = sys::statfs(root).map_err(|error| failed(error.into()))?.f_type;
    let facts = BTreeMap::from([
        ("reflink".to_owned(), yes_no(reflink)),
        ("owners kept".to_owned(), yes_no(rustix::process::geteuid().is_root())),
        ("file system".to_owned(), file_system_name(kind as u64)),
    ]);
    Ok(Capabilities {
        driver: super::NAME.to_owned(),
        pool: spec.to_string(),
        formats: vec![DeltaFormat::tree()],
        reads: vec![DeltaFormat::tree()],
        group_atomic: false,
        quota: false,
        facts,
    })
}

fn probe_reflink(dir: &Path) -> io::Result<bool> {
    let (from, to) = (dir.join(format!("probe-{}", Uuid::now_v7())), dir.join(format!("probe-{}", Uuid::now_v7())));
    let result: io::Result<bool> = (|| {
        let mut source = File::create_new(&from)?;
        // Writing shows a full or read-only file system, too; that is not the question here.
        let written = source.write_all(&[1; 4096]);
        let target = File::create_new(&to)?;
        Ok(written.is_ok() && sys::ioctl_ficlone(&target, &File::open(&from)?).is_ok())
    })();
    let _ = fs::remove_file(&from);
    let _ = fs::remove_file(&to);
    match result {
        Err(error) if error.kind() == io::ErrorKind::StorageFull => Ok(false),
        other => other,
    }
}

/// The magic numbers of statfs(2).
fn file_system_name(kind: u64) -> String {
    match kind & 0xffff_ffff {
        0xef53 => "ext4".to_owned(),
        0x5846_5342 => "xfs".to_owned(),
        0x9123_683e => "btrfs".to_owned(),
        0x2fc1_2fc1 => "zfs".to_owned(),
        0x0102_1994 => "tmpfs".to_owned(),
        0x794c_7630 => "overlayfs".to_owned(),
        0x6969 => "nfs".to_owned(),
        0xf2f5_2010 => "f2fs".to_owned(),
        0xca45_1a4e => "bcachefs".to_owned(),
        other => format!("{other:#x}"),
    }
}
