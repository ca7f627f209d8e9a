//! Serves the API: routes, what a request must look like, and problems as `application/problem+json`.
//!
//! Owns the table of routes and the limits on requests. Refuses to know what the verbs do; the handlers beside it call
//! the node.

use std::sync::Arc;

use axum::{
    Router,
    body::Bytes,
    extract::{DefaultBodyLimit, FromRequest, FromRequestParts, Request},
    http::{StatusCode, header, request::Parts},
    response::{IntoResponse, Response},
    routing::{get, post, put},
};
use serde::de::DeserializeOwned;
use tokio::net::UnixListener;
use tokio_util::sync::CancellationToken;

use super::{diff, events, merge, nodes, ownership, snapshots, tarball, transfers, types::ApiProblem, volumes};
use crate::{daemon::Node, problem::problem};

/// The largest request body: metadata's limit, quoted and escaped.
const BODY_LIMIT: usize = 1024 * 1024;

/// Builds the table of routes.
pub(crate) fn router(node: Arc<Node>) -> Router {
    Router::new()
        .route("/v1/node", get(nodes::node))
        .route("/v1/pool", get(nodes::pool))
        .route("/v1/peers", get(nodes::peers))
        .route("/v1/tokens", post(nodes::create_token))
        .route("/v1/volumes", get(volumes::list).post(volumes::create))
        .route("/v1/volumes/{name}", get(volumes::inspect).patch(volumes::patch).delete(volumes::destroy))
        .route("/v1/volumes/{name}/mount", post(volumes::mount))
        .route("/v1/volumes/{name}/unmount", post(volumes::unmount))
        .route("/v1/volumes/{name}/rollback", post(volumes::rollback))
        .route("/v1/volumes/{name}/promote", post(ownership::promote))
        .route("/v1/volumes/{name}/handoff", post(ownership::hand_off))
        .route("/v1/volumes/{name}/merge", post(merge::merge))
        .route("/v1/volumes/{name}/import", put(tarball::import))
        .route("/v1/diff", get(diff::diff))
        .route("/v1/volumes/{name}/history", get(volumes::history))
        .route("/v1/volumes/{name}/push", post(transfers::push))
        .route("/v1/volumes/{name}/pull", post(transfers::pull))
        .route("/v1/volumes/{name}/snapshots", get(snapshots::list).post(snapshots::create))
        .route("/v1/volumes/{name}/snapshots/{snapshot}", get(snapshots::inspect).delete(snapshots::destroy))
        .route("/v1/volumes/{name}/snapshots/{snapshot}/clone", post(snapshots::clone))
        .route("/v1/volumes/{name}/snapshots/{snapshot}/verify", post(snapshots::verify))
        .route("/v1/events", get(events::events))
        .route("/v1/volumes/{name}/snapshots/{snapshot}/export", get(tarball::export))
        .route("/v1/transfers", get(transfers::list))
        .route("/v1/transfers/{id}", get(transfers::inspect))
        .route("/v1/transfers/{id}/cancel", post(transfers::cancel))
        .route("/v1/transfers/{id}/pause", post(transfers::pause))
        .route("/v1/transfers/{id}/resume", post(transfers::resume))
        .route("/metrics", get(nodes::metrics))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(|| async { "ready\n" }))
        .fallback(|| async { problem(404, "no_such_route", "the API has no such path") })
        .method_not_allowed_fallback(|| async {
            problem(405, "method_not_allowed", "the path does not take this method")
        })
        .layer(DefaultBodyLimit::max(BODY_LIMIT))
        .with_state(node)
}

/// Serves until told to stop; requests under way are answered.
pub(crate) async fn serve(listener: UnixListener, node: Arc<Node>, stop: CancellationToken) {
    let served = axum::serve(listener, router(node)).with_graceful_shutdown(stop.cancelled_owned()).await;
    if let Err(error) = served {
        crate::daemon::log_error(&error);
    }
}

impl IntoResponse for ApiProblem {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        if status.is_server_error() {
            tracing::error!(code = self.code, "{}", self.detail);
        }
        let body = serde_json::to_vec(&self).unwrap_or_default();
        (status, [(header::CONTENT_TYPE, "application/problem+json")], body).into_response()
    }
}

/// A JSON body. An empty one stands for `{}`; unknown fields are refused by the types.
pub(crate) struct Json<T>(pub(crate) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Json<T> {
    type Rejection = ApiProblem;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiProblem> {
        let bytes = Bytes::from_request(request, state).await;
        let bytes = bytes.map_err(|error| problem(error.status().as_u16(), "bad_request", error.body_text()))?;
        let text: &[u8] = if bytes.is_empty() { b"{}" } else { &bytes };
        serde_json::from_slice(text).map(Self).map_err(|error| {
            problem(400, "bad_request", format!("the request's body is not what this path takes: {error}"))
        })
    }
}

/// The parts of the path, parsed.
pub(crate) struct Path<T>(pub(crate) T);

impl<S: Send + Sync, T: DeserializeOwned + Send> FromRequestParts<S> for Path<T> {
    type Rejection = ApiProblem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiProblem> {
        let path = axum::extract::Path::<T>::from_request_parts(parts, state).await;
        path.map(|axum::extract::Path(value)| Self(value))
            .map_err(|error| problem(400, "bad_request", error.body_text()))
    }
}

/// The query, parsed.
pub(crate) struct Query<T>(pub(crate) T);

impl<S: Send + Sync, T: DeserializeOwned + Send> FromRequestParts<S> for Query<T> {
    type Rejection = ApiProblem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiProblem> {
        let query = axum::extract::Query::<T>::from_request_parts(parts, state).await;
        query
            .map(|axum::extract::Query(value)| Self(value))
            .map_err(|error| problem(400, "bad_request", error.body_text()))
    }
}
