//! Deltas: the bytes that turn one snapshot (or nothing) into another, in one format.
//!
//! Owns the words a sender and a receiver agree on before bytes flow. Refuses to know how they travel.

use std::fmt;

use async_trait::async_trait;
use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::{
    driver::Finding,
    error::Result,
    model::{HeldSnapshot, Snapshot, SnapshotKey, VolumeId, VolumeRecord},
};

/// The portable format that every driver can write and read; see docs/PROTOCOL.md.
pub const TREE_FORMAT: &str = "flocker-tree/1";

/// The name of a delta format, `NAME/VERSION`, such as [`TREE_FORMAT`]. Compared as text.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct DeltaFormat(pub String);

impl DeltaFormat {
    /// Returns the portable format.
    pub fn tree() -> Self {
        Self(TREE_FORMAT.to_owned())
    }
}

impl fmt::Display for DeltaFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Where an interrupted receive can go on: bytes that only the receiver's driver and the sender's driver, both of
/// the step's format, understand. 64 KiB at most ([`RESUME_POINT_LIMIT`]); from a peer it is hostile input.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResumePoint(pub Bytes);

/// The longest [`ResumePoint`], in bytes: two paths of a tree and some numbers.
pub const RESUME_POINT_LIMIT: usize = 64 * 1024;

/// How unchanged files are told from changed ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compare {
    /// By inode, size, mtime and ctime. Reads no file that they call unchanged.
    #[default]
    Metadata,
    /// By reading every file.
    Contents,
}

/// Asks a driver for the bytes that turn `base` into `target`.
#[derive(Debug, Clone)]
pub struct DeltaRequest {
    /// What the receiver has already; `None` for a full copy. May belong to another volume (a clone's origin).
    pub base: Option<SnapshotKey>,
    /// What the receiver shall have.
    pub target: SnapshotKey,
    /// One of the driver's own formats.
    pub format: DeltaFormat,
    /// How changed files are found.
    pub compare: Compare,
    /// Where the receiver stopped the last time; the stream then starts there.
    pub resume: Option<ResumePoint>,
}

/// The longest chunk of a delta that is being read, in bytes: 256 KiB, and one more record of the portable format.
pub const CHUNK_LIMIT: usize = 400 * 1024;

/// A delta being read. Chunks are at most [`CHUNK_LIMIT`] and never empty.
#[async_trait]
pub trait DeltaReader: Send {
    /// Returns the next chunk, `None` at the end. Dropping the future loses nothing; dropping the reader ends its work.
    async fn next(&mut self) -> Result<Option<Bytes>>;
    /// Tells whether its bytes are known not to shrink: encrypted data that is sent as it lies. Whoever sends them need not try.
    fn is_packed(&self) -> bool {
        false
    }
    /// Takes out what the user should know of this delta: a base that could not be used, a socket left out. Complete once
    /// [`DeltaReader::next`] has returned `None`.
    fn take_findings(&mut self) -> Vec<Finding> {
        Vec::new()
    }
}

/// Asks a driver to take in a delta.
#[derive(Debug, Clone)]
pub struct ReceiveRequest {
    /// The volume it is for. Where the driver has no volume of this id, `commit` creates it from this record in the
    /// same atomic step that publishes the snapshot; where it has one, its record stays as it is.
    pub volume: VolumeRecord,
    /// What arrives. `commit` publishes it as given.
    pub snapshot: Snapshot,
    /// The snapshot here that the delta builds on. For a new volume it lies in another volume, and the new volume is
    /// a clone of it (`volume.origin` names it).
    pub base: Option<SnapshotKey>,
    /// One of the driver's own formats.
    pub format: DeltaFormat,
    /// Goes on with what an earlier receive of the same snapshot left (see [`Partial`]); `None` starts over.
    pub resume: Option<ResumePoint>,
}

/// A delta being received into a staging place. Nothing of it is visible before `commit`; dropping it discards it: at once where all is
/// settled, else as soon as what is being acted on is done.
#[async_trait]
pub trait Receiving: Send {
    /// Takes the next bytes of the stream, cut anywhere. They may be acted on later; an error of them shows at a later call
    /// then. An error leaves the old lineage as it was; the caller drops the value.
    async fn write(&mut self, chunk: Bytes) -> Result<()>;
    /// Waits until all bytes that were taken are acted on. Not necessary before `commit` and `suspend`, which do so, too.
    async fn settle(&mut self) -> Result<()> {
        Ok(())
    }
    /// Takes out what the user should know of what has arrived: an owner that could not be set. Asked for when all is settled,
    /// before `commit`.
    fn take_findings(&mut self) -> Vec<Finding> {
        Vec::new()
    }
    /// Checks that the stream is complete, makes it durable and publishes the snapshot by one atomic step.
    async fn commit(self: Box<Self>) -> Result<HeldSnapshot>;
    /// Keeps what has arrived, durably, for a later receive. `None` when nothing of it can be kept; then it is discarded.
    async fn suspend(self: Box<Self>) -> Result<Option<ResumePoint>>;
}

/// What an interrupted receive left behind, found again after a restart too.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Partial {
    /// The volume it was for (it may not exist here yet).
    pub volume: VolumeId,
    /// The snapshot that was arriving.
    pub snapshot: Snapshot,
    /// What it builds on.
    pub base: Option<SnapshotKey>,
    /// The format of the stream.
    pub format: DeltaFormat,
    /// Where it can go on.
    pub point: ResumePoint,
    /// Stream bytes taken in so far over all attempts, for progress.
    pub received_bytes: u64,
}
