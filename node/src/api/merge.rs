//! `POST /v1/volumes/{name}/merge`: its request, its report, its handler and the client's call.

use std::sync::Arc;

use axum::{Json as Answer, extract::State};
pub use flocker_replication::merge::{ConflictKind, Counts, PathText, Resolution, Resolve};
use flocker_replication::{merge::Conflict, plan::Point};
use flocker_storage::model::{SnapshotName, VolumeName};
use serde::{Deserialize, Serialize};

use super::{
    client::{self, Client, volume_path},
    server::{Json, Path},
    types::SnapshotResource,
};
use crate::{daemon::Node, problem::Result};

/// Merges another volume's history into a volume.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MergeVolume {
    /// The volume whose newest snapshot is merged in.
    pub from: VolumeName,
    /// What becomes of conflicts.
    #[serde(default)]
    pub conflicts: Resolve,
    /// Only says what would be done.
    #[serde(default)]
    pub dry_run: bool,
    /// The new snapshot's name; made of the other side's newest one when left out.
    #[serde(default)]
    pub snapshot: Option<SnapshotName>,
}

/// How a merge ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MergeState {
    /// The snapshot is made and the head is as it.
    Merged,
    /// There was nothing to merge.
    UpToDate,
    /// There are conflicts, and nothing was made.
    Conflicts,
    /// Nothing was made, since only a report was wanted.
    DryRun,
}

/// What a merge did, or would do.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MergeReport {
    /// The volume that was merged into.
    pub volume: VolumeName,
    /// The volume that was merged in.
    pub from: VolumeName,
    /// How it ended.
    pub state: MergeState,
    /// The newest snapshot that both descend from.
    pub base: Point,
    /// The newest snapshot of `volume`, before.
    pub ours: Point,
    /// The newest snapshot of `from`.
    pub theirs: Point,
    /// What became of conflicts.
    pub resolve: Resolve,
    /// How many paths without a conflict went which way.
    pub counts: Counts,
    /// All conflicts, in the order of the tree.
    pub conflicts: Vec<ConflictResource>,
    /// The new snapshot.
    pub snapshot: Option<SnapshotResource>,
    /// Snapshots taken first, of heads with changes that none held.
    pub kept: Vec<String>,
    /// Volumes whose heads have such changes, in a dry run: they are not in this report.
    pub unsaved: Vec<VolumeName>,
    /// Other common ancestors as new as `base`, where histories were merged crosswise before.
    pub further_ancestors: u64,
}

/// A conflict and how it ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConflictResource {
    /// Where.
    pub path: PathText,
    /// What is in conflict.
    pub kinds: Vec<ConflictKind>,
    /// What ours has there.
    pub ours: String,
    /// What theirs has there.
    pub theirs: String,
    /// What is in the result: `"ours"`, `"theirs"`, or `{"both": PATH}`, the other one being there.
    pub done: Resolution,
    /// Entries in a directory that are not in the result with it.
    pub beneath: u64,
    /// All names of an inode that has several, or of those it is linked with on a side.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub names: Vec<PathText>,
}

impl From<&Conflict> for ConflictResource {
    fn from(conflict: &Conflict) -> Self {
        let Conflict { path, kinds, ours, theirs, done, beneath, names } = conflict.clone();
        let names = names.iter().map(PathText::of).collect();
        Self { path: PathText::of(&path), kinds, ours, theirs, done, beneath, names }
    }
}

pub(crate) async fn merge(
    State(node): State<Arc<Node>>,
    Path(name): Path<VolumeName>,
    Json(request): Json<MergeVolume>,
) -> Result<Answer<MergeReport>> {
    Ok(Answer(node.merge(&name, request).await?))
}

impl Client {
    /// Merges another volume's history into a volume.
    pub async fn merge(&self, volume: &VolumeName, request: &MergeVolume) -> client::Result<MergeReport> {
        self.post(volume_path(volume, "/merge"), request).await
    }
}
