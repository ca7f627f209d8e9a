//! Handlers of pushes, pulls and `/v1/transfers`.

use std::{sync::Arc, time::Duration};

use axum::{Json as Answer, extract::State, http::StatusCode};
use flocker_storage::model::VolumeName;
use serde::Deserialize;

use super::{
    server::{Json, Path, Query},
    types::{Direction, StartTransfer, TransferResource},
};
use crate::{daemon::Node, problem::Result};

/// The longest that a request waits for a transfer's end.
const LONGEST_WAIT: Duration = Duration::from_secs(10);

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

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct InspectQuery {
    /// How long to wait for its end, at most [`LONGEST_WAIT`].
    #[serde(default)]
    wait_ms: u64,
}

pub(crate) async fn inspect(
    State(node): State<Arc<Node>>,
    Path(id): Path<String>,
    Query(query): Query<InspectQuery>,
) -> Result<Answer<TransferResource>> {
    let job = node.transfers.find(&id)?;
    let wait = LONGEST_WAIT.min(Duration::from_millis(query.wait_ms));
    tokio::select! {
        biased;
        () = job.over.cancelled() => {}
        () = node.cancel.cancelled() => {}
        () = tokio::time::sleep(wait) => {}
    }
    Ok(Answer(job.resource()))
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
