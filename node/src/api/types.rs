//! The API's resources, requests and problems as types: what travels as JSON between daemon, CLI and any other client.
//!
//! Owns their field names. Refuses to know how they are served (`server`) or fetched (`client`).

use std::{collections::BTreeMap, num::NonZeroU64};

use flocker_replication::{message::DivergencePolicy, plan::Outcome, resolution::Resolution};
use flocker_storage::{
    delta::Compare,
    driver::{Access, Capabilities, Finding, Orphan, Usage},
    model::{HeadState, Host, Metadata, NodeName, Role, SnapshotId, SnapshotName, VolumeId, VolumeName},
};
pub use flocker_transport::Stage;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// A volume.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct VolumeResource {
    /// The same on every node.
    pub id: VolumeId,
    /// Unique on this node.
    pub name: VolumeName,
    /// The user's own words.
    pub metadata: Metadata,
    /// When it was created.
    pub created: Timestamp,
    /// The snapshot it was cloned from.
    pub origin: Option<OriginResource>,
    /// Whether its head may be written here.
    pub role: Role,
    /// Grows with each change of the primary.
    pub epoch: u64,
    /// Who became the primary when the epoch began, as far as this node knows.
    #[serde(default)]
    pub primary: Option<NodeName>,
    /// The peer that was asked to be the primary from now on and has not answered; nobody may write meanwhile.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub handing_over_to: Option<NodeName>,
    /// The most bytes it may hold.
    pub quota_bytes: Option<u64>,
    /// How many snapshots of its own it has.
    pub snapshots: u64,
    /// Its newest snapshot (its origin, where it has none of its own).
    pub tip: Option<SnapshotResource>,
    /// Where it is mounted.
    pub mount: Option<MountResource>,
    /// Whether the head has changes since the newest snapshot. Only when one volume is inspected.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub head: Option<HeadState>,
    /// What is known of the peers that hold it. Only when one volume is inspected.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub peers: Vec<PeerPosition>,
    /// What may be lost by what was just done.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

/// How far a peer was with a volume when this node last exchanged snapshots of it with that peer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerPosition {
    /// The peer.
    pub host: NodeName,
    /// The newest snapshot that both hold; `None` where it was destroyed here since.
    pub common: Option<SnapshotName>,
    /// How many newer ones this node has.
    pub behind: Option<u64>,
}

/// The snapshot a volume was cloned from.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct OriginResource {
    /// The volume's id.
    pub volume_id: VolumeId,
    /// The snapshot's id.
    pub snapshot_id: SnapshotId,
    /// `volume@snapshot`, where both are known here.
    pub name: Option<String>,
}

/// A snapshot.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SnapshotResource {
    /// The same on every node.
    pub id: SnapshotId,
    /// The volume's name here.
    pub volume: VolumeName,
    /// Unique within its volume.
    pub name: SnapshotName,
    /// The snapshots it follows.
    pub parents: Vec<SnapshotId>,
    /// The host it was taken on.
    pub host: Host,
    /// When it was taken, by that host's clock.
    pub created: Timestamp,
    /// The user's own words.
    pub metadata: Metadata,
    /// The sum of the sizes of its files, in bytes.
    pub logical_bytes: u64,
    /// Whether it holds the same contents as its parent.
    pub unchanged: bool,
    /// What the user should know: sockets left out, files that never held still. Only when it was just taken.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<Finding>,
}

/// A mounted volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountResource {
    /// The volume's name.
    pub volume: VolumeName,
    /// Where it is.
    pub path: String,
    /// Whether it may only be read.
    pub read_only: bool,
    /// A bind mount, or (without root) a symlink.
    pub kind: MountKind,
}

/// How a volume is made to appear at a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MountKind {
    /// A real mount; read-only is held by the kernel.
    Bind,
    /// A symlink, as an ordinary user; read-only is a promise, not a lock.
    Symlink,
}

/// Creates a volume.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateVolume {
    /// Its name.
    pub name: VolumeName,
    /// The user's own words.
    #[serde(default)]
    pub metadata: Metadata,
    /// The most bytes it may hold.
    #[serde(default)]
    pub quota_bytes: Option<u64>,
}

/// Changes a volume's metadata: a value sets its key, null removes it, keys not named stay.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PatchVolume {
    /// Keys to values or null.
    pub metadata: BTreeMap<String, Option<String>>,
}

/// Mounts a volume.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MountVolume {
    /// Where; a stable path in the node's state folder when left out. It must not exist, or be an empty directory.
    #[serde(default)]
    pub path: Option<String>,
    /// For writing or only for reading. A replica is always mounted read-only when this is left out.
    #[serde(default)]
    pub access: Option<Access>,
}

/// Puts a volume back to one of its snapshots.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rollback {
    /// Which snapshot.
    pub snapshot: SnapshotName,
    /// What becomes of newer snapshots and of changes in the head. Without it both are refused.
    #[serde(default)]
    pub newer: Option<Newer>,
}

/// What becomes of the history a rollback leaves behind.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Newer {
    /// It is kept as a volume of this name.
    Fork(VolumeName),
    /// It is destroyed.
    Discard,
}

/// Takes a snapshot.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateSnapshot {
    /// Its name.
    pub name: SnapshotName,
    /// The user's own words.
    #[serde(default)]
    pub metadata: Metadata,
    /// How changed files are found.
    #[serde(default)]
    pub compare: Compare,
}

/// Clones a snapshot into a new volume.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CloneSnapshot {
    /// The new volume's name.
    pub name: VolumeName,
    /// The new volume's metadata.
    #[serde(default)]
    pub metadata: Metadata,
}

/// A volume's history as a graph: nodes and edges, and what each host that was asked holds of it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct HistoryResource {
    /// The volume's name here.
    pub volume: VolumeName,
    /// The volume.
    pub id: VolumeId,
    /// The snapshots, those of forks and clones on this node too.
    pub nodes: Vec<HistoryNode>,
    /// Which of them follows which.
    pub edges: Vec<HistoryEdge>,
    /// This node, and the peers where they were asked.
    pub hosts: Vec<HistoryHost>,
}

/// A snapshot in a history.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct HistoryNode {
    /// The same on every node.
    pub id: SnapshotId,
    /// Its name.
    pub name: SnapshotName,
    /// The host it was taken on.
    pub host: NodeName,
    /// When it was taken, by that host's clock.
    pub created: Timestamp,
    /// The snapshots it follows, two after a merge. Those that are in no volume any more are named, too.
    pub parents: Vec<SnapshotId>,
    /// The sum of the sizes of its files, in bytes.
    pub logical_bytes: u64,
    /// Whether it holds the same contents as its parent.
    pub unchanged: bool,
    /// Which volumes on which hosts hold it, as far as was asked.
    pub held_by: Vec<HistoryPlace>,
}

/// A volume on a host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HistoryPlace {
    /// The host.
    pub host: NodeName,
    /// The volume's name there.
    pub volume: VolumeName,
}

/// One snapshot follows another; both are nodes of the same history.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct HistoryEdge {
    /// The later one.
    pub child: SnapshotId,
    /// The earlier one.
    pub parent: SnapshotId,
}

/// What one host holds of a volume.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct HistoryHost {
    /// The host.
    pub host: NodeName,
    /// What kind of answer it gave. The fields below are there where it holds the volume.
    pub answer: HostAnswer,
    /// The volume's name there.
    pub volume: Option<VolumeName>,
    /// Its role there.
    pub role: Option<Role>,
    /// Its epoch there.
    pub epoch: Option<u64>,
    /// Whether its head there has changes since its newest snapshot.
    pub head: Option<HeadState>,
    /// Its newest snapshot there.
    pub tip: Option<SnapshotId>,
    /// The newest of this node's snapshots that it holds, too.
    pub common: Option<SnapshotId>,
    /// How many newer ones this node has; nothing where there is none in common.
    pub behind: Option<u64>,
    /// Why it does not answer.
    pub why: Option<String>,
}

/// What kind of answer a host gave.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HostAnswer {
    /// It holds the volume.
    Holds,
    /// It has no volume of that name.
    Nothing,
    /// It has another volume of that name.
    OtherVolume,
    /// It cannot be asked: what it holds is not known.
    Unreachable,
}

/// Compares a snapshot with its inventory.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Verification {
    /// `volume@snapshot`.
    pub snapshot: String,
    /// What was compared.
    pub compare: Compare,
    /// What differs; empty when the snapshot is as it was taken.
    pub findings: Vec<Finding>,
}

/// Pushes a volume's history up to a snapshot to a peer, or pulls it from there.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StartTransfer {
    /// The peer's name.
    pub peer: NodeName,
    /// The newest snapshot wanted; a pull without it takes the peer's newest one.
    #[serde(default)]
    pub snapshot: Option<SnapshotName>,
    /// The name at the receiver, where it shall be another one.
    #[serde(default, rename = "as")]
    pub as_name: Option<VolumeName>,
    /// What to do when the histories have gone apart.
    #[serde(default)]
    pub on_divergence: DivergencePolicy,
    /// Only says what would be done.
    #[serde(default)]
    pub dry_run: bool,
    /// How changed files are found.
    #[serde(default)]
    pub compare: Compare,
    /// Bytes per second on the wire, at most; at least [`SLOWEST_LIMIT`].
    #[serde(default)]
    pub limit_bytes_per_second: Option<NonZeroU64>,
}

impl StartTransfer {
    /// Asks for a transfer with a peer that is refused where histories have gone apart.
    pub fn to(peer: NodeName) -> Self {
        Self {
            peer,
            snapshot: None,
            as_name: None,
            on_divergence: DivergencePolicy::Refuse,
            dry_run: false,
            compare: Compare::Metadata,
            limit_bytes_per_second: None,
        }
    }
}

/// The lowest limit of a transfer's rate: one KiB per second.
pub const SLOWEST_LIMIT: u64 = 1024;

/// Which way a transfer goes, seen from this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// To the peer, started here.
    Push,
    /// From the peer, started here.
    Pull,
}

/// Where a transfer stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TransferState {
    /// At work (or waiting for the line to come back).
    Running,
    /// Stopped by a lost peer or a restart; goes on by itself, and at the latest when the same is asked for again.
    Interrupted,
    /// Stopped by a user; goes on where it stopped when it is resumed, or when the same is asked for again.
    Paused,
    /// Everything wanted is on the receiver.
    Done,
    /// Refused: the histories do not allow it; see `outcome`.
    Refused,
    /// Failed for good; see `problem`.
    Failed,
    /// Cancelled by a user.
    Cancelled,
}

impl TransferState {
    /// Tells whether it will not change by itself any more.
    pub fn is_final(self) -> bool {
        !matches!(self, Self::Running | Self::Interrupted | Self::Paused)
    }
}

/// A push or a pull being run.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TransferResource {
    /// Its id.
    pub id: String,
    /// Push or pull.
    pub direction: Direction,
    /// The volume's name at the sender.
    pub volume: VolumeName,
    /// The newest snapshot wanted, once it is known.
    pub snapshot: Option<SnapshotName>,
    /// The peer's name.
    pub peer: NodeName,
    /// The name at the receiver.
    pub as_name: Option<VolumeName>,
    /// Whether it only says what would be done.
    pub dry_run: bool,
    /// Bytes per second on the wire, at most.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit_bytes_per_second: Option<NonZeroU64>,
    /// Where it stands.
    pub state: TransferState,
    /// How the histories compare, once that is known; for a dry run the answer.
    pub outcome: Option<Outcome>,
    /// What the policy has done where the histories had gone apart (for a dry run: what it would do).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resolution: Option<Resolution>,
    /// How the refusal reads for an operator: the situation drawn, and the commands that go on.
    pub refusal: Option<String>,
    /// Bytes and steps.
    pub progress: TransferProgress,
    /// Why it failed or was interrupted.
    pub problem: Option<ApiProblem>,
    /// What the user should know: sockets left out, a snapshot that had to be sent in full.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<Finding>,
    /// When it was asked for.
    pub started: Timestamp,
    /// When it came to an end.
    pub finished: Option<Timestamp>,
}

/// How far a transfer is.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct TransferProgress {
    /// Snapshots that have arrived.
    pub steps_done: u32,
    /// Snapshots to send.
    pub steps_total: u32,
    /// The sum of the sizes of the files of the snapshot wanted, in bytes.
    pub volume_bytes: u64,
    /// Bytes of deltas taken in by the receiver so far.
    pub delta_bytes: u64,
    /// Bytes of deltas expected in all, an upper bound, where they can be told: at once of the first full copy, else when a push
    /// has run for a second, from the driver. A pull knows none.
    pub expected_bytes: Option<u64>,
    /// Bytes that travelled, after compression.
    pub wire_bytes: u64,
    /// Delta bytes per second over the last seconds.
    pub rate_bytes_per_second: u64,
    /// The stage that holds the others up, while it runs; none as long as nothing shows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limited_by: Option<Stage>,
    /// The most connections that carried it at once, where there were several.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub lanes: u32,
    /// How often it went on after a lost line or a restart.
    pub resumed: u32,
    /// Milliseconds of work so far.
    pub elapsed_ms: u64,
}

fn is_zero(number: &u32) -> bool {
    *number == 0
}

/// A node of the cluster as this node knows it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PeerResource {
    /// Its name.
    pub name: NodeName,
    /// Its identity, 64 hexadecimal digits.
    pub id: String,
    /// Where it listens.
    pub addresses: Vec<String>,
    /// When it was last heard of.
    pub last_seen: Option<Timestamp>,
}

/// This node.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct NodeResource {
    /// Its name.
    pub name: NodeName,
    /// Its identity, 64 hexadecimal digits.
    pub id: String,
    /// Its cluster.
    pub cluster: String,
    /// Its program version.
    pub version: String,
    /// Where it listens for peers.
    pub listen: String,
    /// Where peers are told to find it.
    pub addresses: Vec<String>,
    /// Whether it holds the cluster's authority, and so can create join tokens.
    pub authority: bool,
    /// When the certificate ends.
    pub certificate_expires: Timestamp,
    /// The daemon's process id.
    pub pid: u32,
    /// When the daemon started.
    pub started: Timestamp,
    /// The daemon's resident memory now and at its highest, in bytes.
    pub resident_bytes: u64,
    /// The highest resident memory so far, in bytes.
    pub peak_resident_bytes: u64,
}

/// The node's pool.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PoolResource {
    /// What the driver found.
    pub capabilities: Capabilities,
    /// Its space.
    pub usage: Usage,
    /// How many volumes it holds.
    pub volumes: u64,
    /// What is in the pool and nobody knows. Left alone.
    pub orphans: Vec<Orphan>,
}

/// Asks for a join token.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateToken {
    /// How long it may be used, in seconds; an hour when left out.
    #[serde(default)]
    pub ttl_seconds: Option<u64>,
}

/// A join token: good for one node.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TokenResource {
    /// The token, to be given to `flocker join`. A secret.
    pub token: String,
    /// When it ends.
    pub expires: Timestamp,
}

/// What went wrong, as `application/problem+json` (RFC 9457).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{detail}")]
pub struct ApiProblem {
    /// The HTTP status.
    pub status: u16,
    /// Stable, in snake case: what a program acts on ("volume_not_found").
    pub code: String,
    /// What was tried, on what, why it failed: one sentence for an operator.
    pub detail: String,
    /// What to do next, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// The evidence.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub evidence: BTreeMap<String, serde_json::Value>,
}

impl ApiProblem {
    /// Returns the exit code the CLI ends with: 3 not found, 4 conflict, 5 unreachable, 2 bad request, else 1.
    pub fn exit_code(&self) -> i32 {
        match self.status {
            400 | 422 => 2,
            404 => 3,
            409 => 4,
            502..=504 => 5,
            _ => 1,
        }
    }
}
