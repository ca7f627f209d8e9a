//! `GET …/snapshots/{snapshot}/export` and `PUT /v1/volumes/{name}/import`: their types, handlers and the client's calls.
//!
//! Both bodies are tarballs and have no length before their end. An export that fails on its way is cut off, so that no client
//! takes it for a whole one.

use std::{io, sync::Arc};

use axum::{
    Json as Answer,
    body::{Body, Bytes},
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
pub use flocker_storage::tarball::compression::Compression;
use flocker_storage::{
    driver::Finding,
    model::{SnapshotName, SnapshotRef, VolumeName},
};
use futures_util::stream;
use http_body_util::{BodyExt as _, Limited, StreamBody};
use hyper::{Method, Request, body::Frame, client::conn::http1};
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use super::{
    client::{
        self, Client, RESPONSE_LIMIT, Unreachable, decode, describe, judge, protocol, snapshot_path, volume_path,
    },
    server::{Path, Query},
    types::{SnapshotResource, VolumeResource},
};
use crate::{daemon::Node, problem::Result};

/// How much of an export waits to be taken by the client, in bytes, before its connection stands still.
const WAITING_LIMIT: usize = 1024 * 1024;

/// What a tarball became.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ImportKind {
    /// The snapshot that was exported, in its volume.
    Same,
    /// The snapshot that was exported, in a fork of its volume, which is here too.
    Fork,
    /// A new snapshot of a new volume.
    New,
}

/// Whether ids are taken from a tarball that names them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Identity {
    /// Where its contents are what was exported.
    Kept,
    /// Never.
    New,
}

/// What an import made.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ImportReport {
    /// The volume.
    pub volume: VolumeResource,
    /// Its one snapshot.
    pub snapshot: SnapshotResource,
    /// What the tarball became.
    pub kind: ImportKind,
    /// Why it became something else than it says it is.
    pub why: Option<String>,
    /// What could not be kept.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<Finding>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ExportQuery {
    #[serde(default)]
    compress: Compression,
}

pub(crate) async fn export(
    State(node): State<Arc<Node>>,
    Path((volume, snapshot)): Path<(VolumeName, SnapshotName)>,
    Query(query): Query<ExportQuery>,
) -> Result<Response> {
    let pieces = node.export(&SnapshotRef { volume, snapshot }, query.compress).await?;
    let media_type = match query.compress {
        Compression::None => "application/x-tar",
        Compression::Zstd => "application/zstd",
        Compression::Gzip => "application/gzip",
    };
    let pieces = stream::unfold(pieces, |mut pieces| async { Some((pieces.recv().await?, pieces)) });
    Ok(([(header::CONTENT_TYPE, media_type)], Body::from_stream(pieces)).into_response())
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ImportQuery {
    #[serde(default)]
    as_new: bool,
}

pub(crate) async fn import(
    State(node): State<Arc<Node>>,
    Path(name): Path<VolumeName>,
    Query(query): Query<ImportQuery>,
    body: Body,
) -> Result<(StatusCode, Answer<ImportReport>)> {
    let identity = if query.as_new { Identity::New } else { Identity::Kept };
    Ok((StatusCode::CREATED, Answer(node.import(name, identity, body).await?)))
}

impl Client {
    /// Fetches a snapshot as a tarball. Each piece is handed over as it comes; where `on_piece` returns an error, that ends the
    /// export and is returned.
    pub async fn export<E>(
        &self,
        snapshot: &SnapshotRef,
        compression: Compression,
        mut on_piece: impl FnMut(&[u8]) -> std::result::Result<(), E>,
    ) -> client::Result<std::result::Result<(), E>> {
        let path = snapshot_path(snapshot, &format!("/export?compress={compression}"));
        let mut answer = self.lines(path, WAITING_LIMIT).await?;
        while let Some(piece) = answer.bytes().await? {
            if let Err(error) = on_piece(&piece) {
                return Ok(Err(error));
            }
        }
        Ok(Ok(()))
    }

    /// Makes a volume out of a tarball, whose pieces come by the channel; an error in it breaks the import off.
    pub async fn import(
        &self,
        name: &VolumeName,
        identity: Identity,
        pieces: mpsc::Receiver<io::Result<Bytes>>,
    ) -> client::Result<ImportReport> {
        let path = volume_path(name, &format!("/import?as_new={}", identity == Identity::New));
        let described = describe(&Method::PUT, &path);
        let request = Request::builder().method(Method::PUT).uri(path).header(header::HOST, "flocker");
        let request = request.header(header::CONTENT_TYPE, "application/x-tar");
        let frames = stream::unfold(pieces, |mut pieces| async {
            let piece = pieces.recv().await?;
            Some((piece.map(Frame::data), pieces))
        });
        let request = request.body(StreamBody::new(Box::pin(frames))).map_err(|error| protocol(&described, &error))?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(self.connect().await?))
            .await
            .map_err(|error| self.unreachable(Unreachable::Lost(error.to_string())))?;
        let exchange = async move {
            let response = sender.send_request(request).await.map_err(|error| self.broken(&described, &error))?;
            let (parts, body) = response.into_parts();
            let body = Limited::new(body, RESPONSE_LIMIT).collect().await;
            let body = body.map_err(|error| self.unreachable(Unreachable::Lost(error.to_string())))?;
            decode(&described, &judge(&described, parts.status, &parts.headers, body.to_bytes())?)
        };
        tokio::pin!(exchange);
        tokio::select! {
            biased;
            answer = &mut exchange => answer,
            _ = connection => exchange.await,
        }
    }
}
