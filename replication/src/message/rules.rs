//! What a message from a peer has to keep beyond its shape: limits, and what must not be there twice.
//!
//! Owns the limits, the check ([`Message::validate`]) and the word for a message that fails it ([`Violation`]). Refuses to know what is
//! done about such a message (node). Neighbours: what is defined beside the messages checks itself ([`crate::ancestry`],
//! [`crate::outline`], [`crate::plan`], [`crate::problem`], [`crate::resolution`]) and is only asked here.

use std::collections::BTreeSet;

use flocker_storage::{
    delta::{DeltaFormat, RESUME_POINT_LIMIT, ResumePoint},
    driver::Finding,
    model::{HeldSnapshot, Lineage, ParseError, Snapshot, VolumeRecord, check_metadata},
};

use super::{Answer, AskClaims, BeginStep, Description, Message, Offer, StepReady, StepStart};
use crate::outline::{self, Piece};

/// The most snapshots one lineage may have on the wire; comparing stays below a second and a message below
/// [`MESSAGE_LIMIT`].
pub const LINEAGE_LIMIT: usize = 20_000;
/// The most snapshots a receiver names as held in other volumes: one for each snapshot offered.
pub const ELSEWHERE_LIMIT: usize = LINEAGE_LIMIT;
/// The most delta formats a side may offer; four exist.
pub const FORMATS_LIMIT: usize = 32;
/// The longest name of a delta format, in bytes.
pub const FORMAT_NAME_LIMIT: usize = 64;
/// The most parents a snapshot may have: two, after a merge.
pub const PARENTS_LIMIT: usize = 2;
/// The most remarks about one step, and the longest path or text in one, in bytes.
pub const REMARKS_LIMIT: usize = 100;
/// See [`REMARKS_LIMIT`].
pub const REMARK_LIMIT: usize = 4096;
/// The most volumes that one [`AskClaims`] is about.
pub const CLAIMS_LIMIT: usize = 10_000;
/// The longest path in [`Answer::mounted`], in bytes (Linux' PATH_MAX).
pub const PATH_LIMIT: usize = 4096;
/// The largest encoded message, in bytes: a lineage of [`LINEAGE_LIMIT`] snapshots with the longest names fits.
pub const MESSAGE_LIMIT: usize = 16 * 1024 * 1024;

/// A message from a peer that breaks a rule of the protocol. The exchange ends; nothing was changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the peer's {message} breaks the protocol: {rule}")]
pub struct Violation {
    /// The kind of message.
    pub message: &'static str,
    /// The rule it breaks.
    pub rule: String,
}

impl Message {
    /// Checks what serde cannot: counts, lengths, duplicates. Every message from a peer goes through here first.
    /// The protocol's revision is not checked: a peer of another one gets
    /// [`ProblemCode::VersionMismatch`](super::ProblemCode::VersionMismatch).
    pub fn validate(&self) -> Result<(), Violation> {
        let checked = match self {
            Self::Offer(offer) => check_offer(offer),
            Self::Description(description) => check_description(description),
            Self::Answer(answer) => check_answer(answer),
            Self::BeginStep(begin) => check_begin(begin),
            Self::StepReady(StepReady { start: StepStart::Point(point), .. }) => check_point(point),
            Self::StepDone(done) => check_snapshot(&done.held.snapshot),
            Self::Conclude(outcome) | Self::Resolve(outcome) => outcome.check(),
            Self::Resolved(resolution) => resolution.check(),
            Self::Problem(problem) => problem.check(),
            Self::PullRequest(_) | Self::Describe(_) | Self::StepReady(_) | Self::Finish | Self::Finished => Ok(()),
            Self::Remarks(remarks) => check_remarks(remarks),
            Self::TakeOver(_) | Self::TakenOver(_) | Self::Lane(_) | Self::LaneReady | Self::Expected(_) => Ok(()),
            Self::AskClaims(AskClaims { volumes, .. }) => check_claims(volumes.len()),
            Self::Claims(claims) => check_claims(claims.len()),
            Self::Rest(rest) => rest.forgotten.check().and_then(|()| outline::check(&rest.older)),
            Self::Want(places) => demand(places.len() <= LINEAGE_LIMIT && places.is_sorted_by(|a, b| a < b), || {
                "it asks for blocks out of order, or for too many".to_owned()
            }),
            Self::Snapshots(snapshots) => check_snapshots(snapshots),
        };
        checked.map_err(|rule| Violation { message: self.kind(), rule })
    }
}

fn check_claims(count: usize) -> Result<(), String> {
    demand(count <= CLAIMS_LIMIT, || format!("it is about {count} volumes, {CLAIMS_LIMIT} are allowed"))
}

fn check_remarks(remarks: &[Finding]) -> Result<(), String> {
    let longest = remarks.iter().map(|remark| remark.path.len().max(remark.what.len())).max().unwrap_or(0);
    demand(remarks.len() <= REMARKS_LIMIT, || {
        format!("it has {} remarks, {REMARKS_LIMIT} are allowed", remarks.len())
    })?;
    demand(longest <= REMARK_LIMIT, || format!("a remark has {longest} bytes, {REMARK_LIMIT} are allowed"))
}

fn check_offer(offer: &Offer) -> Result<(), String> {
    check_record(&offer.volume)?;
    check_lineage(&offer.lineage)?;
    check_formats(&offer.formats)?;
    demand(offer.lineage.find(offer.want).is_some(), || format!("its lineage lacks the wanted snapshot {}", offer.want))
}

fn check_description(description: &Description) -> Result<(), String> {
    check_record(&description.volume)?;
    check_pieces(&description.pieces)?;
    check_formats(&description.formats)?;
    check_mounted(description.mounted.as_deref())
}

fn check_pieces(pieces: &[Piece]) -> Result<(), String> {
    pieces.iter().try_for_each(|piece| match piece {
        Piece::Own(own) => check_snapshots(own),
        Piece::Offered { .. } => Ok(()),
    })
}

fn check_answer(answer: &Answer) -> Result<(), String> {
    match &answer.volume {
        Some(record) => check_record(record)?,
        None => demand(answer.pieces.is_empty(), || "it has snapshots of no volume".to_owned())?,
    }
    check_pieces(&answer.pieces)?;
    check_formats(&answer.formats)?;
    check_mounted(answer.mounted.as_deref())?;
    answer.forgotten.check()?;
    demand(answer.elsewhere.len() <= ELSEWHERE_LIMIT, || {
        format!("it holds {} snapshots elsewhere, {ELSEWHERE_LIMIT} at most", answer.elsewhere.len())
    })?;
    let distinct = answer.elsewhere.iter().collect::<BTreeSet<_>>().len();
    demand(distinct == answer.elsewhere.len(), || "it holds one snapshot elsewhere twice".to_owned())?;
    answer.partial.as_ref().map_or(Ok(()), |partial| {
        check_snapshot(&partial.snapshot)?;
        check_format(&partial.format)?;
        check_point(&partial.point)
    })
}

fn check_begin(begin: &BeginStep) -> Result<(), String> {
    check_snapshot(&begin.snapshot)?;
    check_format(&begin.format)?;
    let builds_on_itself = begin.base.is_some_and(|base| base.snapshot == begin.snapshot.id);
    demand(!builds_on_itself, || "its snapshot builds on itself".to_owned())?;
    begin.resume.as_ref().map_or(Ok(()), check_point)
}

fn check_record(record: &VolumeRecord) -> Result<(), String> {
    check_user_metadata(&record.metadata)
}

pub(super) fn check_lineage(lineage: &Lineage) -> Result<(), String> {
    check_snapshots(&lineage.snapshots)
}

fn check_snapshots(snapshots: &[HeldSnapshot]) -> Result<(), String> {
    let count = snapshots.len();
    demand(count <= LINEAGE_LIMIT, || format!("its lineage has {count} snapshots, {LINEAGE_LIMIT} at most"))?;
    let mut seen = BTreeSet::new();
    for held in snapshots {
        demand(held.snapshot.metadata.is_empty(), || "its lineage carries snapshot metadata".to_owned())?;
        check_parents(&held.snapshot)?;
        demand(seen.insert(held.snapshot.id), || format!("its lineage has snapshot {} twice", held.snapshot.id))?;
    }
    Ok(())
}

fn check_snapshot(snapshot: &Snapshot) -> Result<(), String> {
    check_parents(snapshot)?;
    check_user_metadata(&snapshot.metadata)
}

fn check_parents(snapshot: &Snapshot) -> Result<(), String> {
    let parents = &snapshot.parents;
    demand(parents.len() <= PARENTS_LIMIT, || format!("snapshot {} has {} parents", snapshot.id, parents.len()))?;
    demand(!parents.contains(&snapshot.id), || format!("snapshot {} is its own parent", snapshot.id))?;
    demand(parents.len() < 2 || parents[0] != parents[1], || format!("snapshot {} has a parent twice", snapshot.id))
}

fn check_formats(formats: &[DeltaFormat]) -> Result<(), String> {
    demand(formats.len() <= FORMATS_LIMIT, || format!("it has {} formats, {FORMATS_LIMIT} at most", formats.len()))?;
    formats.iter().try_for_each(check_format)
}

fn check_format(format: &DeltaFormat) -> Result<(), String> {
    let printable = !format.0.is_empty() && format.0.bytes().all(|byte| byte.is_ascii_graphic());
    demand(printable && format.0.len() <= FORMAT_NAME_LIMIT, || {
        format!("a format's name is not 1 to {FORMAT_NAME_LIMIT} printable ASCII characters")
    })
}

fn check_mounted(path: Option<&str>) -> Result<(), String> {
    demand(path.is_none_or(|path| path.len() <= PATH_LIMIT), || format!("a path is longer than {PATH_LIMIT} bytes"))
}

fn check_point(point: &ResumePoint) -> Result<(), String> {
    demand(point.0.len() <= RESUME_POINT_LIMIT, || format!("a resume point is longer than {RESUME_POINT_LIMIT} bytes"))
}

fn check_user_metadata(metadata: &flocker_storage::model::Metadata) -> Result<(), String> {
    check_metadata(metadata).map_err(|error: ParseError| error.to_string())
}

pub(crate) fn demand(holds: bool, rule: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(rule()) }
}
