//! `POST /v1/volumes/{name}/promote` and `/handoff`: their requests, the report, their handlers and the client's calls.

use std::sync::Arc;

use axum::{Json as Answer, extract::State};
use flocker_storage::model::{NodeName, SnapshotName, VolumeName};
use serde::{Deserialize, Serialize};

use super::{
    client::{self, Client, volume_path},
    server::{Json, Path},
    types::VolumeResource,
};
use crate::{daemon::Node, problem::Result};

/// Makes a replica the primary.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PromoteVolume {
    /// Also where another node is the primary, or may be.
    #[serde(default)]
    pub force: bool,
}

/// Makes a peer the primary in this node's place.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HandOffVolume {
    /// The peer.
    pub peer: NodeName,
    /// How long to wait, in milliseconds, until nobody uses the volume's mount any more; half a minute when left out.
    #[serde(default)]
    pub wait_ms: Option<u64>,
}

/// What a hand-over did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HandOffReport {
    /// The volume.
    pub volume: VolumeName,
    /// The primary now.
    pub primary: NodeName,
    /// The epoch that began.
    pub epoch: u64,
    /// The newest snapshot, which both hold.
    pub snapshot: SnapshotName,
    /// Where the volume was mounted here.
    pub unmounted: Option<String>,
    /// From the moment the volume could not be written here to the moment it could be written there, in milliseconds.
    pub writes_stopped_ms: u64,
    /// Bytes that travelled before and after writes were stopped.
    pub delta_bytes: [u64; 2],
}

pub(crate) async fn promote(
    State(node): State<Arc<Node>>,
    Path(name): Path<VolumeName>,
    Json(request): Json<PromoteVolume>,
) -> Result<Answer<VolumeResource>> {
    Ok(Answer(node.promote(&name, &request).await?))
}

pub(crate) async fn hand_off(
    State(node): State<Arc<Node>>,
    Path(name): Path<VolumeName>,
    Json(request): Json<HandOffVolume>,
) -> Result<Answer<HandOffReport>> {
    Ok(Answer(node.hand_off(name, request).await?))
}

impl Client {
    /// Makes a replica the primary.
    pub async fn promote(&self, name: &VolumeName, request: &PromoteVolume) -> client::Result<VolumeResource> {
        self.post(volume_path(name, "/promote"), request).await
    }

    /// Makes a peer the primary in this node's place.
    pub async fn hand_off(&self, name: &VolumeName, request: &HandOffVolume) -> client::Result<HandOffReport> {
        self.post(volume_path(name, "/handoff"), request).await
    }
}
