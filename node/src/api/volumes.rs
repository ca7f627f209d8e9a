//! Handlers of `/v1/volumes`.

use std::sync::Arc;

use axum::{Json as Answer, extract::State, http::StatusCode};
use flocker_storage::model::VolumeName;
use serde::Deserialize;

use super::{
    server::{Json, Path, Query},
    types::{CreateVolume, HistoryResource, MountResource, MountVolume, PatchVolume, Rollback, VolumeResource},
};
use crate::{daemon::Node, history::Hosts, problem::Result};

pub(crate) async fn list(State(node): State<Arc<Node>>) -> Answer<Vec<VolumeResource>> {
    Answer(node.catalog.volumes().iter().map(|volume| node.volume_resource(volume)).collect())
}

pub(crate) async fn create(
    State(node): State<Arc<Node>>,
    Json(request): Json<CreateVolume>,
) -> Result<(StatusCode, Answer<VolumeResource>)> {
    Ok((StatusCode::CREATED, Answer(node.create_volume(request).await?)))
}

pub(crate) async fn inspect(
    State(node): State<Arc<Node>>,
    Path(name): Path<VolumeName>,
) -> Result<Answer<VolumeResource>> {
    Ok(Answer(node.inspect(&name).await?))
}

pub(crate) async fn patch(
    State(node): State<Arc<Node>>,
    Path(name): Path<VolumeName>,
    Json(request): Json<PatchVolume>,
) -> Result<Answer<VolumeResource>> {
    Ok(Answer(node.patch_volume(&name, request).await?))
}

pub(crate) async fn destroy(State(node): State<Arc<Node>>, Path(name): Path<VolumeName>) -> Result<StatusCode> {
    node.destroy_volume(&name).await?;
    Ok(StatusCode::NO_CONTENT)
}

pub(crate) async fn mount(
    State(node): State<Arc<Node>>,
    Path(name): Path<VolumeName>,
    Json(request): Json<MountVolume>,
) -> Result<Answer<MountResource>> {
    Ok(Answer(node.mount(&name, request).await?))
}

pub(crate) async fn unmount(State(node): State<Arc<Node>>, Path(name): Path<VolumeName>) -> Result<StatusCode> {
    let id = node.unmount(&name).await?;
    if node.superseded.holds(id) {
        node.tasks.spawn(node.clone().follow_newer_primaries());
    }
    Ok(StatusCode::NO_CONTENT)
}

pub(crate) async fn rollback(
    State(node): State<Arc<Node>>,
    Path(name): Path<VolumeName>,
    Json(request): Json<Rollback>,
) -> Result<Answer<VolumeResource>> {
    Ok(Answer(node.rollback(&name, request).await?))
}

/// Whom a history is asked of.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct HistoryQuery {
    /// Whether the peers are asked, too.
    #[serde(default)]
    all_hosts: bool,
}

pub(crate) async fn history(
    State(node): State<Arc<Node>>,
    Path(name): Path<VolumeName>,
    Query(query): Query<HistoryQuery>,
) -> Result<Answer<HistoryResource>> {
    let hosts = if query.all_hosts { Hosts::All } else { Hosts::Here };
    Ok(Answer(node.history(&name, hosts).await?))
}
