//! Handlers of `/v1/volumes/{name}/snapshots`.

use std::sync::Arc;

use axum::{Json as Answer, extract::State, http::StatusCode};
use flocker_storage::{
    delta::Compare,
    model::{SnapshotName, SnapshotRef, VolumeName},
};
use serde::Deserialize;

use super::{
    server::{Json, Path, Query},
    types::{CloneSnapshot, CreateSnapshot, SnapshotResource, Verification, VolumeResource},
};
use crate::{daemon::Node, problem::Result, volumes::snapshot_resource};

fn named((volume, snapshot): (VolumeName, SnapshotName)) -> SnapshotRef {
    SnapshotRef { volume, snapshot }
}

pub(crate) async fn list(
    State(node): State<Arc<Node>>,
    Path(name): Path<VolumeName>,
) -> Result<Answer<Vec<SnapshotResource>>> {
    let volume = node.catalog.find(&name)?;
    Ok(Answer(volume.snapshots.iter().map(|held| snapshot_resource(&name, held)).collect()))
}

pub(crate) async fn create(
    State(node): State<Arc<Node>>,
    Path(name): Path<VolumeName>,
    Json(request): Json<CreateSnapshot>,
) -> Result<(StatusCode, Answer<SnapshotResource>)> {
    Ok((StatusCode::CREATED, Answer(node.create_snapshot(&name, request).await?)))
}

pub(crate) async fn inspect(
    State(node): State<Arc<Node>>,
    Path(path): Path<(VolumeName, SnapshotName)>,
) -> Result<Answer<SnapshotResource>> {
    let wanted = named(path);
    let volume = node.catalog.find(&wanted.volume)?;
    Ok(Answer(snapshot_resource(&wanted.volume, volume.snapshot(&wanted.snapshot)?)))
}

pub(crate) async fn destroy(
    State(node): State<Arc<Node>>,
    Path(path): Path<(VolumeName, SnapshotName)>,
) -> Result<StatusCode> {
    node.destroy_snapshot(&named(path)).await?;
    Ok(StatusCode::NO_CONTENT)
}

pub(crate) async fn clone(
    State(node): State<Arc<Node>>,
    Path(path): Path<(VolumeName, SnapshotName)>,
    Json(request): Json<CloneSnapshot>,
) -> Result<(StatusCode, Answer<VolumeResource>)> {
    Ok((StatusCode::CREATED, Answer(node.clone_snapshot(&named(path), request).await?)))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct VerifyQuery {
    #[serde(default)]
    compare: Compare,
}

pub(crate) async fn verify(
    State(node): State<Arc<Node>>,
    Path(path): Path<(VolumeName, SnapshotName)>,
    Query(query): Query<VerifyQuery>,
) -> Result<Answer<Verification>> {
    Ok(Answer(node.verify(&named(path), query.compare).await?))
}
