//! `GET /v1/diff?from=A&to=B`: JSON lines, as they are found. The last line holds the totals, or a problem; a stream
//! without either was cut short.

use std::{convert::Infallible, fmt, str::FromStr, sync::Arc};

use axum::{
    body::{Body, Bytes},
    extract::State,
    http::header,
    response::{IntoResponse, Response},
};
pub use flocker_storage::tree::diff::{Difference, Property};
use flocker_storage::{
    model::{ParseError, SnapshotName, SnapshotRef, VolumeName},
    tree::{diff::Change, entry::EntryKind},
};
use serde::{Deserialize, Serialize};

use super::{
    client::{self, Client, ClientError},
    server::Query,
    types::ApiProblem,
};
use crate::{daemon::Node, diff::cut_short, problem::Result};

/// The longest line: a path of 32 KiB, escaped, and what else is said.
const LINE_LIMIT: usize = 1024 * 1024;

/// The media type of JSON lines.
const JSON_LINES: &str = "application/jsonl";

/// A tree of a volume: its head, or a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TreeName {
    /// The volume.
    pub volume: VolumeName,
    /// The snapshot; the head without it.
    pub snapshot: Option<SnapshotName>,
}

impl FromStr for TreeName {
    type Err = ParseError;
    fn from_str(text: &str) -> std::result::Result<Self, ParseError> {
        if text.contains('@') {
            let SnapshotRef { volume, snapshot } = text.parse()?;
            return Ok(Self { volume, snapshot: Some(snapshot) });
        }
        Ok(Self { volume: text.parse()?, snapshot: None })
    }
}

impl TryFrom<String> for TreeName {
    type Error = ParseError;
    fn try_from(text: String) -> std::result::Result<Self, ParseError> {
        text.parse()
    }
}

impl From<TreeName> for String {
    fn from(name: TreeName) -> Self {
        name.to_string()
    }
}

impl fmt::Display for TreeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.snapshot {
            Some(snapshot) => write!(f, "{}@{snapshot}", self.volume),
            None => write!(f, "{}", self.volume),
        }
    }
}

/// One line of the stream.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiffLine {
    /// A path that differs.
    Change(ChangeResource),
    /// All paths were told.
    End(DiffTotals),
    /// The comparison failed.
    Problem(ApiProblem),
}

/// A path that differs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChangeResource {
    /// The path; bytes that are not UTF-8 are shown as U+FFFD.
    pub path: String,
    /// Its bytes as hexadecimal digits, where it is not UTF-8.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path_hex: Option<String>,
    /// Who has it.
    pub change: Difference,
    /// What differs, where both have it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub properties: Vec<Property>,
    /// What is there, in words.
    pub kind: String,
    /// Bytes added, removed or in changed blocks.
    pub bytes: u64,
}

impl From<Change> for ChangeResource {
    fn from(change: Change) -> Self {
        let bytes = change.path.as_bytes();
        let hex = || bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        Self {
            path: if bytes.is_empty() { ".".to_owned() } else { String::from_utf8_lossy(bytes).into_owned() },
            path_hex: std::str::from_utf8(bytes).is_err().then(hex),
            change: change.difference,
            properties: change.properties,
            kind: match &change.kind {
                EntryKind::HardLink { to } => format!("hard link to {to}"),
                kind => kind.word().to_owned(),
            },
            bytes: change.bytes,
        }
    }
}

/// How much differs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct DiffTotals {
    /// Paths only the second tree has.
    pub added: u64,
    /// Paths only the first one has.
    pub removed: u64,
    /// Paths that differ.
    pub changed: u64,
    /// Bytes of added files.
    pub added_bytes: u64,
    /// Bytes of removed files.
    pub removed_bytes: u64,
    /// Bytes of changed blocks.
    pub changed_bytes: u64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct DiffQuery {
    from: TreeName,
    to: TreeName,
    #[serde(default)]
    stat: bool,
}

pub(crate) async fn diff(State(node): State<Arc<Node>>, Query(query): Query<DiffQuery>) -> Result<Response> {
    let detail = if query.stat { DiffDetail::Totals } else { DiffDetail::Paths };
    let lines = node.diff(&query.from, &query.to, detail).await?;
    let lines = futures_util::stream::unfold(lines, |mut lines| async {
        let line = lines.recv().await?;
        let mut text = serde_json::to_vec(&line).unwrap_or_default();
        text.push(b'\n');
        Some((Ok::<_, Infallible>(Bytes::from(text)), lines))
    });
    Ok(([(header::CONTENT_TYPE, JSON_LINES)], Body::from_stream(lines)).into_response())
}

impl Client {
    /// Compares two trees. Each path that differs is handed over as it comes; where `on_change` returns an error, that ends
    /// the comparison and is returned. With [`DiffDetail::Totals`] only the totals travel.
    pub async fn diff<E>(
        &self,
        from: &TreeName,
        to: &TreeName,
        detail: DiffDetail,
        mut on_change: impl FnMut(ChangeResource) -> std::result::Result<(), E>,
    ) -> client::Result<std::result::Result<DiffTotals, E>> {
        let stat = detail == DiffDetail::Totals;
        let path = format!("/v1/diff?from={from}&to={to}&stat={stat}");
        let mut lines = self.lines(path, LINE_LIMIT).await?;
        while let Some(line) = lines.next().await? {
            match line {
                DiffLine::Change(change) => {
                    if let Err(error) = on_change(change) {
                        return Ok(Err(error));
                    }
                }
                DiffLine::End(totals) => return Ok(Ok(totals)),
                DiffLine::Problem(problem) => return Err(ClientError::Problem(problem)),
            }
        }
        Err(ClientError::Problem(cut_short()))
    }
}

/// What of a comparison is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiffDetail {
    /// Each path, and the totals.
    Paths,
    /// The totals.
    Totals,
}
