//! An open pool of the btrfs driver: where things lie, who may have it open, what kernel and programs can do.
//!
//! ```text
//! POOL/flocker-pool.json                         the format, so that a newer pool is refused
//! POOL/lock                                      flock: one node at a time; holds its process id
//! POOL/volumes/<volume-id>/volume.json           the volume's record
//! POOL/volumes/<volume-id>/head/                 a writable subvolume; missing while it equals the newest snapshot
//! POOL/volumes/<volume-id>/snapshots/<id>/       snapshot.json, tree/: a read-only subvolume
//! POOL/staging/                                  what is being made; one rename publishes it
//! POOL/trash/                                    what is being deleted
//! ```
//! Everything here is of mode 0700, so that the exact modes inside the trees open nothing to anybody, and nobody can write
//! into a subvolume that is being received. A read-only subvolume cannot move to another directory; the directory around
//! it can.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard},
    thread::JoinHandle,
    time::Duration,
};

use uuid::Uuid;

use super::{
    FORMAT_1, FORMAT_2,
    catalog::StoredSnapshot,
    place::{Place, explain as explain_program},
    subvolume::{self, PROGRAM},
};
use crate::{
    command,
    delta::DeltaFormat,
    driver::{Capabilities, Target, Usage},
    drivers::{
        PoolSpec,
        folder::{self, Attachment, locked, make_dir, sync_file_system},
        published::Published,
    },
    error::{Error, ErrorKind, Result},
    model::{SnapshotKey, VolumeId},
};

/// How long the space of deleted subvolumes is waited for: at open, where an earlier run may have left much, and when
/// somebody asks for the space.
const CLEANER_AT_OPEN: Duration = Duration::from_secs(30);
const CLEANER_AT_USAGE: Duration = Duration::from_secs(5);

/// An open pool. The lock goes with the value.
pub(super) struct Pool {
    root: PathBuf,
    capabilities: Capabilities,
    attached: Mutex<HashMap<Target, Attachment>>,
    receiving: Mutex<HashSet<VolumeId>>,
    publishing: Mutex<()>,
    pub(super) published: Published<StoredSnapshot>,
    deleting: Mutex<Vec<JoinHandle<()>>>,
    // In this order: the lock file is closed before its file system is unmounted.
    _lock: File,
    _place: Place,
}

impl Drop for Pool {
    fn drop(&mut self) {
        for thread in locked(&self.deleting).drain(..) {
            let _ = thread.join();
        }
    }
}

impl Pool {
    /// Opens a pool, sets it up where the place is free, finishes or clears away what was interrupted.
    pub(super) fn open(spec: &PoolSpec) -> Result<Arc<Self>> {
        if !rustix::process::geteuid().is_root() {
            let why = "btrfs receive and subvolume delete need root".to_owned();
            return Err(Error::new("open pool", spec, ErrorKind::PoolUnusable(why)));
        }
        let place = Place::open(spec)?;
        let root = place.root().to_owned();
        let lock = folder::take(spec, &root)?;
        let capabilities = probe(spec, &root)?;
        let pool = Arc::new(Self {
            root,
            capabilities,
            attached: Mutex::default(),
            receiving: Mutex::default(),
            publishing: Mutex::default(),
            published: Published::default(),
            deleting: Mutex::default(),
            _lock: lock,
            _place: place,
        });
        // Space first: on a full disk the rest may need it.
        pool.clear_staging();
        pool.empty_trash();
        pool.finish_splits()?;
        pool.wait_for_cleaner(CLEANER_AT_OPEN);
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
    pub(super) fn staging_dir(&self) -> PathBuf {
        self.root.join("staging")
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
        Ok(self.stage_found(path))
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
        self.wait_for_cleaner(CLEANER_AT_USAGE);
        let failed = |kind: ErrorKind| Error::new("measure pool", self.root.display(), kind);
        let usage = subvolume::file_system_usage(&self.root).map_err(|error| failed(error.into_kind()))?;
        let unread = || failed(ErrorKind::Io(io::Error::other("`btrfs filesystem usage` said something unexpected")));
        parse_usage(&usage).ok_or_else(unread)
    }

    /// Deleted subvolumes give their space back later, by a thread of the kernel.
    fn wait_for_cleaner(&self, at_most: Duration) {
        if let Err(error) = subvolume::wait_for_cleaner(&self.root, at_most) {
            tracing::warn!(pool = %self.root.display(), %error, "deleted subvolumes cannot be waited for");
        }
        // They leave their quota groups behind, which slow down the counting. Nothing else depends on it.
        if self.capabilities.quota
            && let Err(error) = subvolume::clear_stale_limits(&self.root)
        {
            tracing::debug!(pool = %self.root.display(), %error, "quota groups of deleted subvolumes stay");
        }
    }

    /// What is in staging was never published: among it what an interrupted receive left. One that can go on stays.
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

/// Finds out what the kernel and the programs know.
fn probe(spec: &PoolSpec, root: &Path) -> Result<Capabilities> {
    let unusable = |why: String| Error::new("open pool", spec, ErrorKind::PoolUnusable(why));
    let version = command::run(PROGRAM, &["--version"]).map_err(|error| unusable(explain_program(&error)))?;
    let version = String::from_utf8_lossy(&version).lines().next().unwrap_or_default().trim().to_owned();
    // A kernel before 6.0 lacks the file; it knows version 1.
    let kernel = fs::read_to_string("/sys/fs/btrfs/features/send_stream_version").unwrap_or_default();
    let kernel: u32 = kernel.trim().parse().unwrap_or(1);
    let mut formats = vec![DeltaFormat(FORMAT_1.to_owned()), DeltaFormat::tree()];
    // Programs before 6.2 lose or damage data of version 2 streams (their change log, 6.0.2 and 6.2).
    let compressed = kernel >= 2 && parse_version(&version).is_some_and(|version| version >= (6, 2));
    if compressed {
        formats.insert(0, DeltaFormat(FORMAT_2.to_owned()));
    }
    let quota = command::run(PROGRAM, &["qgroup".as_ref(), "show".as_ref(), root.as_os_str()]).is_ok();
    let usage = subvolume::file_system_usage(root).map_err(|error| unusable(error.to_string()))?;
    let mut facts = BTreeMap::from([
        ("programs".to_owned(), version),
        ("send stream version".to_owned(), if compressed { "2" } else { "1" }.to_owned()),
        ("quotas".to_owned(), if quota { "on" } else { "off; `btrfs quota enable` turns them on" }.to_owned()),
    ]);
    let profiles = parse_profiles(&usage);
    facts.extend(profiles.into_iter().map(|(of, profile)| (format!("profile of {of}"), profile)));
    Ok(Capabilities {
        driver: super::NAME.to_owned(),
        pool: spec.to_string(),
        reads: formats.clone(),
        formats,
        group_atomic: false,
        quota,
        facts,
    })
}

/// Reads `btrfs-progs v6.2`.
fn parse_version(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.strip_prefix("btrfs-progs v")?.split('.');
    let leading = |part: &str| part.chars().take_while(char::is_ascii_digit).collect::<String>().parse().ok();
    Some((leading(numbers.next()?)?, numbers.next().and_then(leading).unwrap_or(0)))
}

/// Reads the space of `btrfs filesystem usage -b`: what there is for data, and what is left of it; nothing where metadata
/// has no room any more, which statfs(2) knows.
fn parse_usage(text: &str) -> Option<Usage> {
    let value = |key: &str| {
        let line = text.lines().find_map(|line| line.trim().strip_prefix(key)?.strip_prefix(':'));
        line.and_then(|line| line.split_whitespace().next())
    };
    let number = |key: &str| value(key)?.parse::<u64>().ok();
    let ratio: f64 = value("Data ratio")?.parse().ok().filter(|ratio| *ratio >= 1.0)?;
    let total_bytes = (number("Device size")? as f64 / ratio) as u64;
    let available_bytes = number("Free (estimated)")?.min(number("Free (statfs, df)").unwrap_or(u64::MAX));
    Some(Usage { total_bytes, available_bytes: available_bytes.min(total_bytes) })
}

/// Reads the profiles (`Data,single: Size:…`) of `btrfs filesystem usage`.
fn parse_profiles(text: &str) -> Vec<(String, String)> {
    let lines = text.lines().filter_map(|line| line.split_once(": Size:")?.0.split_once(','));
    lines.map(|(of, profile)| (of.to_lowercase(), profile.to_owned())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read() {
        assert_eq!(parse_version("btrfs-progs v6.2"), Some((6, 2)));
        assert_eq!(parse_version("btrfs-progs v5.10.1"), Some((5, 10)));
        assert_eq!(parse_version("btrfs-progs v6.16-rc1"), Some((6, 16)));
        assert_eq!(parse_version("something else"), None);
    }

    #[test]
    fn space_and_profiles_are_read() {
        let text = include_str!("testdata/usage.txt");
        let expected = [("data", "single"), ("metadata", "DUP"), ("system", "DUP")];
        assert_eq!(parse_profiles(text), expected.map(|(a, b)| (a.to_owned(), b.to_owned())));
        let usage = Usage { total_bytes: 536_870_912, available_bytes: 451_936_256 };
        assert_eq!(parse_usage(text), Some(usage));
        let mirrored = text.replace("Data ratio:\t\t\t              1.00", "Data ratio:\t 2.00");
        assert_eq!(parse_usage(&mirrored), Some(Usage { total_bytes: 268_435_456, available_bytes: 268_435_456 }));
        assert_eq!(parse_usage("Overall:\n"), None);
    }
}
