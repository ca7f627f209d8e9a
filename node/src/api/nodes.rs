//! Handlers of `/v1/node`, `/v1/pool`, `/v1/peers` and `/v1/tokens`.

use std::sync::Arc;

use axum::{Json as Answer, extract::State, http::StatusCode};

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

pub(crate) async fn create_token(
    State(node): State<Arc<Node>>,
    Json(request): Json<CreateToken>,
) -> Result<(StatusCode, Answer<TokenResource>)> {
    Ok((StatusCode::CREATED, Answer(node.create_token(request.ttl_seconds).await?)))
}
