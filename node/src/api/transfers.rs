//! Handlers of pushes, pulls and `/v1/transfers`.

use std::sync::Arc;

use axum::{Json as Answer, extract::State, http::StatusCode};
use flocker_storage::model::VolumeName;

use super::{
    server::{Json, Path},
    types::{Direction, StartTransfer, TransferResource},
};
use crate::{daemon::Node, problem::Result};

pub(crate) async fn push(
    State(node): State<Arc<Node>>,
    Path(name): Path<VolumeName>,
    Json(request): Json<StartTransfer>,
) -> Result<(StatusCode, Answer<TransferResource>)> {
    Ok((StatusCode::ACCEPTED, Answer(node.start_transfer(Direction::Push, name, request).await?)))
}

pub(crate) async fn pull(
    State(node): State<Arc<Node>>,
    Path(name): Path<VolumeName>,
    Json(request): Json<StartTransfer>,
) -> Result<(StatusCode, Answer<TransferResource>)> {
    Ok((StatusCode::ACCEPTED, Answer(node.start_transfer(Direction::Pull, name, request).await?)))
}

pub(crate) async fn list(State(node): State<Arc<Node>>) -> Answer<Vec<TransferResource>> {
    Answer(node.transfers.list())
}

pub(crate) async fn inspect(State(node): State<Arc<Node>>, Path(id): Path<String>) -> Result<Answer<TransferResource>> {
    Ok(Answer(node.transfers.find(&id)?.resource()))
}

pub(crate) async fn cancel(State(node): State<Arc<Node>>, Path(id): Path<String>) -> Result<Answer<TransferResource>> {
    let job = node.transfers.find(&id)?;
    Ok(Answer(node.cancel_transfer(&job).await))
}

pub(crate) async fn pause(State(node): State<Arc<Node>>, Path(id): Path<String>) -> Result<Answer<TransferResource>> {
    let job = node.transfers.find(&id)?;
    Ok(Answer(node.pause_transfer(&job).await?))
}

pub(crate) async fn resume(State(node): State<Arc<Node>>, Path(id): Path<String>) -> Result<Answer<TransferResource>> {
    let job = node.transfers.find(&id)?;
    Ok(Answer(node.resume_transfer(&job).await?))
}
