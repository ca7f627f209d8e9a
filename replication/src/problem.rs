//! Errors as they cross the wire: a code that the other side acts on, and facts for its words. Never text.
//!
//! Owns the codes (frozen) and the operator's sentence for each. Refuses to know what raised them.

use std::{collections::BTreeMap, fmt};

use serde::{Deserialize, Serialize};

use crate::message::demand;

/// The most facts of one problem.
pub const FACTS_LIMIT: usize = 32;
/// The longest key of a fact, in bytes.
pub const FACT_KEY_LIMIT: usize = 64;
/// The longest value of a fact, in bytes; a path fits.
pub const FACT_VALUE_LIMIT: usize = 4096;

/// Why an exchange ended. The order is the wire's: new codes are added at the end, none is ever moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum ProblemCode {
    /// 0: the peer's rights do not cover this verb on this volume. Facts: `verb`, `volume`.
    NotPermitted,
    /// 1: there is no volume of this name. Facts: `volume`.
    UnknownVolume,
    /// 2: there is no such snapshot. Facts: `volume`, `snapshot`.
    UnknownSnapshot,
    /// 3: the wanted name belongs to another volume. Facts: `volume`.
    NameTaken,
    /// 4: another transfer of this volume is running. Facts: `volume`, `transfer`.
    Busy,
    /// 5: the volume is mounted. Facts: `volume`, `path`.
    InUse,
    /// 6: the pool or the volume's quota is full. Facts: `volume`, `available_bytes`.
    NoSpace,
    /// 7: the sender's step does not fit what the receiver holds. Facts: `step`, `snapshot`, `rule`.
    StepMismatch,
    /// 8: the bytes that arrived are not the bytes that were sent. Facts: `snapshot`.
    DigestMismatch,
    /// 9: a format that the node cannot read or write. Facts: `format`.
    UnknownFormat,
    /// 10: a snapshot differs from its inventory. Facts: `volume`, `snapshot`, `path`, `what`.
    Tampered,
    /// 11: the resume point does not fit what is here; the step starts from its beginning. Facts: `snapshot`.
    ResumeStale,
    /// 12: the nodes speak different revisions of the protocol. Facts: `ours`, `theirs`.
    VersionMismatch,
    /// 13: the daemon's user may not do this on its pool. Facts: `object`.
    PermissionDenied,
    /// 14: the node is shutting down.
    ShuttingDown,
    /// 15: anything else; the node's log has it. Facts: `operation`.
    Internal,
    /// 16: the peer sent what the protocol does not allow. Facts: `message`, `rule`.
    ProtocolViolation,
    /// 17: the stream of a delta is malformed or hostile. Facts: `snapshot`, `what`.
    Malformed,
    /// 18: the histories have gone apart, and the node does not do what was asked for. Facts: `volume`, `policy`, `why`.
    PolicyUnsupported,
    /// 19: too much at once: snapshots in the lineage, transfers on the node. Facts: `what`, `limit`.
    LimitExceeded,
    /// 20: an operator cancelled the transfer. Facts: `transfer`.
    Cancelled,
    /// 21: no progress for too long. Facts: `waited_ms`.
    TimedOut,
    /// 22: the step cannot travel in this format; in the portable one it can. Facts: `why`.
    FormatUnfit,
    /// 23: the node does not become the primary in the asker's place. Facts: `volume`, `why`.
    HandOffRefused,
    /// 24: not used yet.
    Reserved24,
    /// 25: not used yet.
    Reserved25,
}

/// An error on the wire.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// What the other side acts on.
    pub code: ProblemCode,
    /// For its words; see each code for the keys.
    pub facts: BTreeMap<String, String>,
}

impl Problem {
    /// Builds a problem without facts.
    pub fn new(code: ProblemCode) -> Self {
        Self { code, facts: BTreeMap::new() }
    }

    /// Adds a fact. A value beyond [`FACT_VALUE_LIMIT`] is cut.
    #[must_use]
    pub fn with(mut self, key: &str, value: impl fmt::Display) -> Self {
        let mut value = value.to_string();
        value.truncate(value.floor_char_boundary(FACT_VALUE_LIMIT));
        self.facts.insert(key.to_owned(), value);
        self
    }

    /// Returns a fact.
    pub fn fact(&self, key: &str) -> Option<&str> {
        self.facts.get(key).map(String::as_str)
    }

    /// Tells whether the same attempt may succeed later without anybody doing anything.
    pub fn is_transient(&self) -> bool {
        matches!(
            self.code,
            ProblemCode::Busy | ProblemCode::ShuttingDown | ProblemCode::ResumeStale | ProblemCode::TimedOut
        )
    }

    /// Returns an operator's sentence: what is wrong, in the words of the node that raised it. Control characters of
    /// the facts are escaped, since they come from a peer.
    pub fn describe(&self) -> String {
        let fact = |key: &str| self.fact(key).map(|value| value.escape_debug().to_string());
        let known = |key: &str, before: &str| fact(key).map(|value| format!("{before}{value}")).unwrap_or_default();
        let volume = || fact("volume").map_or_else(|| "the volume".to_owned(), |name| format!("volume {name}"));
        let snapshot = || fact("snapshot").map_or_else(|| "the snapshot".to_owned(), |name| format!("snapshot {name}"));
        match self.code {
            ProblemCode::NotPermitted => {
                format!(
                    "this node has no right to {} {}",
                    fact("verb").unwrap_or_else(|| "do that with".to_owned()),
                    volume()
                )
            }
            ProblemCode::UnknownVolume => format!("there is no {}", volume().trim_start_matches("the ")),
            ProblemCode::UnknownSnapshot => format!("{} has no such snapshot{}", volume(), known("snapshot", ": ")),
            ProblemCode::NameTaken => format!("the name of {} belongs to another volume", volume()),
            ProblemCode::Busy => format!("another transfer of {} is running{}", volume(), known("transfer", ": ")),
            ProblemCode::InUse => format!("{} is mounted{}", volume(), known("path", " at ")),
            ProblemCode::NoSpace => {
                format!("no space left for {}{}", volume(), known("available_bytes", "; bytes available: "))
            }
            ProblemCode::StepMismatch => {
                format!("{} does not fit what the node holds{}", snapshot(), known("rule", ": "))
            }
            ProblemCode::DigestMismatch => format!("the bytes of {} arrived damaged", snapshot()),
            ProblemCode::UnknownFormat => format!("the node does not know the delta format{}", known("format", " ")),
            ProblemCode::Tampered => {
                format!("{} was changed after it was taken{}{}", snapshot(), known("path", ": "), known("what", ": "))
            }
            ProblemCode::ResumeStale => format!("{} cannot be resumed and starts from its beginning", snapshot()),
            ProblemCode::VersionMismatch => {
                format!(
                    "the nodes speak different revisions of the protocol{}{}",
                    known("ours", ": it speaks "),
                    known("theirs", ", asked for ")
                )
            }
            ProblemCode::PermissionDenied => {
                format!("the node's user may not do this on its pool{}", known("object", ": "))
            }
            ProblemCode::ShuttingDown => "the node is shutting down".to_owned(),
            ProblemCode::Internal => format!("the node failed{}; its log says why", known("operation", " to ")),
            ProblemCode::ProtocolViolation => {
                format!("the other side broke the protocol{}{}", known("message", " with "), known("rule", ": "))
            }
            ProblemCode::Malformed => format!("the delta of {} is malformed{}", snapshot(), known("what", ": ")),
            ProblemCode::PolicyUnsupported => {
                format!("the divergence cannot be resolved that way{}{}", known("policy", ", by "), known("why", ": "))
            }
            ProblemCode::LimitExceeded => {
                format!("too much at once{}{}", known("what", ": "), known("limit", ", at most "))
            }
            ProblemCode::Cancelled => "the transfer was cancelled".to_owned(),
            ProblemCode::TimedOut => format!("there was no progress{}", known("waited_ms", " for milliseconds: ")),
            ProblemCode::FormatUnfit => {
                format!("the delta's format does not fit what the node holds{}", known("why", ": "))
            }
            ProblemCode::HandOffRefused => format!("it does not take {} over{}", volume(), known("why", ": ")),
            ProblemCode::Reserved24 | ProblemCode::Reserved25 => "a problem that this version does not know".to_owned(),
        }
    }

    pub(crate) fn check(&self) -> Result<(), String> {
        demand(self.facts.len() <= FACTS_LIMIT, || format!("it has more than {FACTS_LIMIT} facts"))?;
        let fits = |(key, value): (&String, &String)| key.len() <= FACT_KEY_LIMIT && value.len() <= FACT_VALUE_LIMIT;
        demand(self.facts.iter().all(fits), || "a fact is too long".to_owned())
    }
}
