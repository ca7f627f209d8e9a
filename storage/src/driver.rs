//! The contract of a storage driver: one value per pool, object-safe, async.
//!
//! # Participants
//! The node calls; a driver under `drivers/` answers. Locks per volume, names and policy are the node's.
//!
//! # Rules every driver keeps (the conformance suite holds them)
//! - Identity is ours: records come back exactly as given, after a reopen too.
//! - Nothing is destroyed to make two sides agree. `rewind`, `forget`, `destroy` are explicit and refuse with
//!   [`ErrorKind::Blocked`](crate::error::ErrorKind::Blocked) and its evidence.
//! - Each verb is atomic against `kill -9`: after a reopen the old or the new state, nothing half, space given back.
//! - Nothing of a receive is visible before its commit.
//! - What `scan` finds and does not know is reported as orphaned and left alone.

use std::path::PathBuf;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use crate::{
    delta::{Compare, DeltaFormat, DeltaReader, DeltaRequest, Partial, ReceiveRequest, Receiving},
    error::{Error, Result},
    model::{HeadState, HeldSnapshot, Lineage, Snapshot, SnapshotId, SnapshotKey, VolumeId, VolumeRecord},
    tree::{root::Root, walk::Links, weave::TreeView},
};

/// A storage driver on one open pool. The pool is locked against a second opener until the value is dropped.
#[async_trait]
pub trait Driver: Send + Sync {
    /// Returns what was found when the pool was opened.
    fn capabilities(&self) -> &Capabilities;
    /// Returns the pool's space.
    async fn usage(&self) -> Result<Usage>;
    /// Lists all volumes with their own snapshots, and what is in the pool and nobody knows.
    async fn scan(&self) -> Result<Scan>;

    /// Creates a volume with an empty head (no file at all in it), mode 0755, owned by the node's user.
    async fn create(&self, record: &VolumeRecord) -> Result<()>;
    /// Replaces a volume's record (name, metadata, role, epoch, quota) by one atomic step; the id finds it.
    async fn set_record(&self, record: &VolumeRecord) -> Result<()>;
    /// Destroys a volume with its head and its snapshots. Blocked by clones of its snapshots and by being attached.
    async fn destroy(&self, volume: VolumeId) -> Result<()>;

    /// Takes one snapshot of each volume named, atomically over all where [`Capabilities::group_atomic`] says so.
    async fn snapshot(&self, requests: &[SnapshotRequest]) -> Result<Vec<SnapshotReport>>;
    /// Destroys one snapshot. Blocked by clones of it.
    async fn forget(&self, snapshot: SnapshotKey) -> Result<()>;
    /// Puts the head back to one of the volume's own snapshots. Blocked by newer snapshots and by being attached.
    async fn rewind(&self, snapshot: SnapshotKey) -> Result<()>;
    /// Moves the head and the snapshots newer than `keep` into a new volume `fork`, whose origin is `keep`; the old
    /// volume keeps its id and the rest, its head at `keep`. Clones of moved snapshots follow them. Blocked by being attached.
    async fn split(&self, keep: SnapshotKey, fork: &VolumeRecord) -> Result<()>;
    /// Creates a volume whose head equals a snapshot; `record.origin` names it.
    async fn clone_from(&self, record: &VolumeRecord) -> Result<()>;

    /// Hands out a path to a head or a snapshot. Idempotent. A read-only head of a replica is its newest snapshot.
    async fn attach(&self, target: Target, access: Access) -> Result<PathBuf>;
    /// Takes the path back. Idempotent.
    async fn detach(&self, target: Target) -> Result<()>;

    /// Opens a head or a snapshot to be read, whoever else uses it. It stays readable while the view lives; a snapshot
    /// must not be destroyed meanwhile. A driver that counts those who read overrides this: here the target stays attached.
    async fn view(&self, target: Target) -> Result<TreeView> {
        let path = self.attach(target, Access::ReadOnly).await?;
        let opened = tokio::task::spawn_blocking(move || Root::open(path)).await;
        let root = opened.map_err(|error| Error::io("open", "tree", std::io::Error::other(error)))??;
        Ok(match target {
            Target::Head(_) => TreeView::live(root),
            Target::Snapshot(..) => TreeView::still(root, Links::ByInode),
        })
    }

    /// Returns the volume's snapshots along its origins.
    async fn lineage(&self, volume: VolumeId) -> Result<Lineage>;
    /// Compares the head with the newest snapshot, from metadata.
    async fn head_state(&self, volume: VolumeId) -> Result<HeadState>;
    /// Compares a snapshot with its inventory: all metadata, or all contents where a digest was kept. Empty: as taken.
    async fn verify(&self, snapshot: SnapshotKey, compare: Compare) -> Result<Vec<Finding>>;

    /// Estimates how many bytes the stream of a delta has, from metadata: an upper bound where the driver can give no better.
    /// `None` where it can tell nothing. Dropping the future ends the work.
    async fn estimate_delta(&self, request: DeltaRequest) -> Result<Option<u64>>;
    /// Opens a delta for reading.
    async fn read_delta(&self, request: DeltaRequest) -> Result<Box<dyn DeltaReader>>;
    /// Opens a staging place for a delta.
    async fn receive(&self, request: ReceiveRequest) -> Result<Box<dyn Receiving>>;
    /// Returns what an interrupted receive for this volume left.
    async fn partial(&self, volume: VolumeId) -> Result<Option<Partial>>;
    /// Throws away what an interrupted receive for this volume left. Done when nothing is left, too.
    async fn discard_partial(&self, volume: VolumeId) -> Result<()>;
}

/// What a driver found it can do on this pool. Probed at open, never assumed.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Capabilities {
    /// The driver's name, as written before the colon of a pool ("directory").
    pub driver: String,
    /// Where the pool is, as the user wrote it.
    pub pool: String,
    /// Delta formats it writes, best first; the portable one is always last.
    pub formats: Vec<DeltaFormat>,
    /// Delta formats it reads; the portable one always.
    pub reads: Vec<DeltaFormat>,
    /// Whether snapshots of several volumes in one call are of one moment.
    pub group_atomic: bool,
    /// Whether the driver can hold a volume to a quota.
    pub quota: bool,
    /// Further facts for `flocker pool status`, in words ("reflink": "yes").
    pub facts: std::collections::BTreeMap<String, String>,
}

/// The space of a pool, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// All there is.
    pub total_bytes: u64,
    /// What the node's user can still write.
    pub available_bytes: u64,
}

/// What a pool holds.
#[derive(Debug, Clone, Default)]
pub struct Scan {
    /// Every volume with its own snapshots (not those along its origin), oldest first.
    pub volumes: Vec<(VolumeRecord, Vec<HeldSnapshot>)>,
    /// What nobody knows.
    pub orphans: Vec<Orphan>,
}

/// Something in the pool that no record explains. It is listed and left alone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Orphan {
    /// Where it is, as the driver names places.
    pub place: String,
    /// Why it is nobody's ("no volume record", "record unreadable: …").
    pub reason: String,
}

/// Asks for one snapshot of one volume.
#[derive(Debug, Clone)]
pub struct SnapshotRequest {
    /// Whose head.
    pub volume: VolumeId,
    /// The record to keep, id already minted.
    pub snapshot: Snapshot,
    /// How unchanged files are found.
    pub compare: Compare,
}

/// A snapshot that was taken.
#[derive(Debug, Clone)]
pub struct SnapshotReport {
    /// The snapshot as held.
    pub held: HeldSnapshot,
    /// What the user should know: sockets left out, files that never held still.
    pub warnings: Vec<Finding>,
}

/// A remark about one path of a tree.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// Relative to the tree's root; bytes that are not UTF-8 are shown as U+FFFD.
    pub path: String,
    /// In words.
    pub what: String,
}

/// What a path is wanted for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Target {
    /// The head of a volume.
    Head(VolumeId),
    /// A snapshot, always read-only.
    Snapshot(VolumeId, SnapshotId),
}

/// Whether a path may be written to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Access {
    /// Reading only.
    ReadOnly,
    /// Reading and writing.
    ReadWrite,
}
