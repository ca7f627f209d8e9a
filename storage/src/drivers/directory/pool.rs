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
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, atomic::AtomicBool},
    thread::JoinHandle,
};

use rustix::fs as sys;
use uuid::Uuid;

use super::catalog::StoredSnapshot;
use crate::{
    delta::DeltaFormat,
    driver::{Capabilities, Target, Usage},
    drivers::{
        PoolSpec,
        folder::{self, locked, make_dir, sync_file_system},
        partial,
        published::Published,
    },
    error::{Error, ErrorKind, Result},
    model::{SnapshotId, SnapshotKey, VolumeId},
};

pub(super) use crate::drivers::folder::Attachment;

/// An open pool. The lock goes with the value.
pub(super) struct Pool {
    root: PathBuf,
    capabilities: Capabilities,
    attached: Mutex<HashMap<Target, Attachment>>,
    receiving: Mutex<HashSet<VolumeId>>,
    publishing: Mutex<()>,
    pub(super) published: Published<StoredSnapshot>,
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
        let lock = folder::take(spec, &root)?;
        let capabilities = probe(spec, &root)?;
        let pool = Arc::new(Self {
            root,
            capabilities,
            attached: Mutex::default(),
            receiving: Mutex::default(),
            publishing: Mutex::default(),
            published: Published::default(),
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
        folder::publish(operation, &from, to)
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

fn probe(spec: &PoolSpec, root: &Path) -> Result<Capabilities> {
    let failed = |error: io::Error| Error::new("open pool", spec, ErrorKind::PoolUnusable(folder::explain(&error)));
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
