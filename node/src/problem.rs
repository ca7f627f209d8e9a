//! Turns what went wrong inside into what a user is told: [`ApiProblem`] with a stable code, a sentence and a way on.
//!
//! Owns the codes. Refuses to know how they are shown; the API serves them, the CLI prints them.

use std::{error::Error as StdError, fmt::Display};

use flocker_replication::message::{Problem, ProblemCode};
use flocker_storage::{
    error::{Error as StorageError, ErrorKind},
    model::{NodeName, ParseError, SnapshotName, VolumeName},
};
use serde::Serialize;

use crate::{api::types::ApiProblem, state::StateError};

/// The code of a step that a format cannot carry and the portable one can; from a peer it comes with `peer_` before it.
pub(crate) const FORMAT_UNFIT: &str = "format_unfit";

/// The code of a divergence that cannot be resolved in the way that was asked for.
pub(crate) const POLICY_UNSUPPORTED: &str = "policy_unsupported";

/// The code of an exchange on a kept connection whose peer did not answer any more: to be tried again at once on a new one. Users
/// do not see it.
pub(crate) const STALE_LINE: &str = "stale_line";

/// The code of a peer that is there and has too much to do.
pub(crate) const PEER_BUSY: &str = "peer_busy";

/// What to do about a peer that speaks another protocol, or does not keep to it.
pub(crate) const SAME_VERSION: &str = "both nodes should run the same version of flocker";

/// The result of one of the node's verbs.
pub(crate) type Result<T> = std::result::Result<T, ApiProblem>;

/// Builds a problem from its fixed parts.
pub(crate) fn problem(status: u16, code: &str, detail: impl Display) -> ApiProblem {
    let (code, detail) = (code.to_owned(), detail.to_string());
    ApiProblem { status, code, detail, hint: None, evidence: Default::default() }
}

impl ApiProblem {
    /// Adds what to do next.
    #[must_use]
    pub fn hint(mut self, hint: impl Display) -> Self {
        self.hint = Some(hint.to_string());
        self
    }

    /// Adds a piece of evidence. A value that does not serialise is left out.
    #[must_use]
    pub fn with(mut self, key: &str, value: impl Serialize) -> Self {
        if let Ok(value) = serde_json::to_value(value) {
            self.evidence.insert(key.to_owned(), value);
        }
        self
    }
}

/// Joins an error and its sources into one sentence, as the log and the API show it.
pub(crate) fn chain(error: &dyn StdError) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

/// No volume of that name is here.
pub(crate) fn volume_not_found(name: &VolumeName) -> ApiProblem {
    problem(404, "volume_not_found", format!("there is no volume {name} on this node"))
        .hint("`flocker list` shows the volumes")
}

/// The volume has no snapshot of that name.
pub(crate) fn snapshot_not_found(volume: &VolumeName, snapshot: &SnapshotName) -> ApiProblem {
    problem(404, "snapshot_not_found", format!("volume {volume} has no snapshot {snapshot} of its own"))
        .hint(format!("`flocker snapshots {volume}` shows its snapshots"))
}

/// A volume of that name is here already.
pub(crate) fn volume_exists(name: &VolumeName) -> ApiProblem {
    problem(409, "volume_exists", format!("a volume {name} exists already on this node"))
        .hint("choose another name, or `flocker destroy` the old volume first")
}

/// The peer is not known.
pub(crate) fn peer_not_found(name: &NodeName, known: &[String]) -> ApiProblem {
    let hint = if known.is_empty() {
        "this node knows no peers yet; create a token with `flocker token create` and give it to `flocker join` on the other host".to_owned()
    } else {
        format!("known peers: {}", known.join(", "))
    };
    problem(404, "peer_not_found", format!("there is no peer {name} in this cluster")).hint(hint)
}

/// The peer does not answer.
pub(crate) fn peer_unreachable(name: &NodeName, why: impl Display) -> ApiProblem {
    problem(502, "peer_unreachable", format!("cannot reach {name}: {why}")).hint(format!(
        "check that the node on {name} runs and that UDP reaches it; `flocker peers` shows its addresses"
    ))
}

/// Something that should not happen did.
pub(crate) fn internal(detail: impl Display) -> ApiProblem {
    problem(500, "internal", detail)
}

impl From<StateError> for ApiProblem {
    fn from(error: StateError) -> Self {
        internal(chain(&error))
    }
}

impl From<ParseError> for ApiProblem {
    fn from(error: ParseError) -> Self {
        problem(400, "bad_request", error)
    }
}

impl From<StorageError> for ApiProblem {
    fn from(error: StorageError) -> Self {
        let detail = chain(&error);
        match &error.kind {
            ErrorKind::NotFound => problem(404, "not_found", detail),
            ErrorKind::AlreadyExists => problem(409, "exists", detail),
            ErrorKind::Blocked(blockers) => problem(409, "blocked", detail)
                .with("newer", &blockers.newer)
                .with("clones", &blockers.clones)
                .with("attached", blockers.attached),
            ErrorKind::NoSpace => problem(507, "no_space", detail)
                .hint("free space on the pool (`flocker pool status`), for instance by destroying snapshots"),
            ErrorKind::PermissionDenied => problem(403, "permission_denied", detail),
            ErrorKind::PoolBusy { .. } => problem(409, "pool_busy", detail),
            ErrorKind::PoolUnusable(_) => problem(500, "pool_unusable", detail),
            ErrorKind::Corrupt(_) => problem(500, "corrupt", detail),
            ErrorKind::Tampered { .. } => problem(409, "tampered", detail)
                .hint("`flocker verify` lists all that differs; the snapshot is not sent as it is"),
            ErrorKind::ResumeStale(_) => problem(409, "resume_stale", detail),
            ErrorKind::FormatUnfit(_) => problem(409, FORMAT_UNFIT, detail),
            ErrorKind::Unsupported(_) => problem(422, "unsupported", detail),
            _ => internal(detail),
        }
    }
}

/// Tells what a peer said, in the words of the problem's code.
pub(crate) fn from_peer(peer: &NodeName, said: &Problem) -> ApiProblem {
    let status = match said.code {
        ProblemCode::UnknownVolume | ProblemCode::UnknownSnapshot => 404,
        ProblemCode::NotPermitted => 403,
        ProblemCode::NoSpace => 507,
        ProblemCode::ShuttingDown => 503,
        ProblemCode::Internal | ProblemCode::Malformed | ProblemCode::DigestMismatch => 500,
        _ => 409,
    };
    let problem =
        problem(status, &format!("peer_{}", code_name(said.code)), format!("{peer} answers: {}", said.describe()))
            .with("facts", &said.facts);
    match said.code {
        ProblemCode::PolicyUnsupported => problem.hint("--on-divergence fork keeps both"),
        ProblemCode::VersionMismatch => problem.hint(SAME_VERSION),
        _ => problem,
    }
}

/// A problem code in snake case.
fn code_name(code: ProblemCode) -> String {
    let mut name = String::new();
    for letter in format!("{code:?}").chars() {
        if letter.is_ascii_uppercase() && !name.is_empty() {
            name.push('_');
        }
        name.push(letter.to_ascii_lowercase());
    }
    name
}

/// Tells a peer what went wrong here, as a code and facts.
pub(crate) fn to_peer(error: &ApiProblem) -> Problem {
    let code = match error.code.as_str() {
        "volume_not_found" | "not_found" => ProblemCode::UnknownVolume,
        "snapshot_not_found" => ProblemCode::UnknownSnapshot,
        "volume_exists" => ProblemCode::NameTaken,
        "mounted" => ProblemCode::InUse,
        "busy" => ProblemCode::Busy,
        "no_space" => ProblemCode::NoSpace,
        "permission_denied" => ProblemCode::PermissionDenied,
        "not_permitted" => ProblemCode::NotPermitted,
        "tampered" => ProblemCode::Tampered,
        "resume_stale" => ProblemCode::ResumeStale,
        FORMAT_UNFIT => ProblemCode::FormatUnfit,
        "handoff_refused" => ProblemCode::HandOffRefused,
        "shutting_down" => ProblemCode::ShuttingDown,
        "version_mismatch" => ProblemCode::VersionMismatch,
        POLICY_UNSUPPORTED => ProblemCode::PolicyUnsupported,
        _ => ProblemCode::Internal,
    };
    let said = Problem::new(code).with("why", &error.detail);
    match code {
        ProblemCode::VersionMismatch => {
            ["ours", "theirs"].into_iter().fold(said, |said, which| match error.evidence.get(which) {
                Some(revision) => said.with(which, revision),
                None => said,
            })
        }
        _ => said,
    }
}
