//! Handlers of `/v1/node`, `/v1/pool`, `/v1/peers`, `/v1/tokens` and `/metrics`.

use std::sync::Arc;

use axum::{
    Json as Answer,
    extract::State,
    http::{StatusCode, header},
    response::IntoResponse,
};

use super::{
    server::Json,
    types::{CreateToken, NodeResource, PeerResource, PoolResource, TokenResource},
};
use crate::{daemon::Node, problem::Result};

pub(crate) async fn node(State(node): State<Arc<Node>>) -> Answer<NodeResource> {
    Answer(node.resource())
}

pub(crate) async fn pool(State(node): State<Arc<Node>>) -> Result<Answer<PoolResource>> {
    Ok(Answer(node.pool_resource().await?))
}

pub(crate) async fn peers(State(node): State<Arc<Node>>) -> Answer<Vec<PeerResource>> {
    Answer(node.peer_resources())
}

/// The numbers of `crate::metrics`; the media type is that of OpenMetrics 1.0.
pub(crate) async fn metrics(State(node): State<Arc<Node>>) -> Result<impl IntoResponse> {
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    Ok(([(header::CONTENT_TYPE, kind)], node.metrics_text().await?))
}

pub(crate) async fn create_token(
    State(node): State<Arc<Node>>,
    Json(request): Json<CreateToken>,
) -> Result<(StatusCode, Answer<TokenResource>)> {
    Ok((StatusCode::CREATED, Answer(node.create_token(request.ttl_seconds).await?)))
}
