//! Every message that two nodes exchange on a control stream of ALPN `flocker/1`.
//!
//! Owns the shapes, their order on the wire (frozen by golden bytes) and how a lineage goes into an [`Answer`] and comes out of it.
//! Refuses to know streams and frames (transport) and what is done about a message (node).
//! Neighbours: `rules` the limits and the check of whatever a peer sent ([`Message::validate`]), `policy` what a user chooses,
//! [`crate::problem`] errors as codes and facts, [`crate::plan`] the outcome that a sender concludes.
//!
//! # The story on one stream (docs/PROTOCOL.md has it in full)
//! | who | sends | the other side answers |
//! |---|---|---|
//! | opener, to push | [`Offer`], [`Rest`] | [`Answer`]; before it [`Message::Want`], answered by [`Message::Snapshots`], where the offer is a long one and not all of it is known |
//! | opener, to pull | [`PullRequest`] | [`Offer`], [`Rest`], and is the sender from here on; the opener sends [`Answer`] |
//! | opener, to look | [`Describe`] | [`Description`], the end |
//! | sender, per step | [`BeginStep`] | [`StepReady`]; then the bytes flow on the bulk lanes; then [`StepDone`] |
//! | whoever did not start the transfer, once a step's bytes have flowed | [`Message::Remarks`] | nothing |
//! | sender, where histories have gone apart and the policy says so | [`Message::Resolve`] | [`Answer`] for the volume that the history lands in instead; or [`Message::Resolved`], the end |
//! | sender, at the end, unless its last step said [`After::Nothing`] | [`Message::Conclude`] (no step was run) or [`Message::Finish`] | [`Message::Finished`], the end; [`Message::Resolved`] after a `Resolve` |
//! | opener, to hand over | [`TakeOver`] | [`TakenOver`], the end |
//! | opener, to know who may write | [`AskClaims`] | [`Message::Claims`], the end |
//! | anybody, at any time | [`Problem`] | nothing, the end |

mod policy;
mod rules;

use std::num::NonZeroU64;

use flocker_storage::{
    delta::{DeltaFormat, Partial, ResumePoint},
    driver::Finding,
    model::{
        HeadState, HeldSnapshot, Host, Lineage, Role, Snapshot, SnapshotId, SnapshotKey, SnapshotName, VolumeId,
        VolumeName, VolumeRecord,
    },
};
pub use policy::{DivergencePolicy, Mode, UnknownPolicy};
use rules::check_lineage;
pub(crate) use rules::demand;
pub use rules::{
    CLAIMS_LIMIT, ELSEWHERE_LIMIT, FORMAT_NAME_LIMIT, FORMATS_LIMIT, LINEAGE_LIMIT, MESSAGE_LIMIT, PARENTS_LIMIT,
    PATH_LIMIT, REMARK_LIMIT, REMARKS_LIMIT, Violation,
};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

pub use crate::problem::{Problem, ProblemCode};
use crate::{
    ancestry::Forgotten,
    outline::{self, Block, Piece, Puzzle},
    plan::Outcome,
    resolution::Resolution,
};

/// The protocol's revision within ALPN `flocker/1`. A peer that speaks another one is refused with
/// [`ProblemCode::VersionMismatch`]. So that it can be, messages that open an exchange ([`Offer`], [`PullRequest`], [`Describe`],
/// [`TakeOver`], [`AskClaims`], [`Lane`]) and [`Problem`] keep their bytes through all revisions; what a revision adds comes behind them.
///
/// 2: what is forgotten behind each offer, [`Answer::forgotten`], [`BeginStep::after`]. 3: [`Rest::older`], [`Message::Want`],
/// [`Message::Snapshots`], [`Answer::pieces`]. 4: the portable format is not hashed by the pipeline, too;
/// [`Message::Lane`]. 5: in the portable format, data of 256 KiB a record, and digests of contents that are stated.
/// 6: [`Message::Expected`]. 7: [`Message::Rest`] behind [`Describe`], [`Description::pieces`].
pub const PROTOCOL: u32 = 7;

/// One message. The order of the variants is the wire's: new ones take a reserved place, none is ever moved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Message {
    /// 0: a sender offers a history.
    Offer(Box<Offer>),
    /// 1: the opener asks the peer to be the sender.
    PullRequest(Box<PullRequest>),
    /// 2: asks for a volume's lineage.
    Describe(Describe),
    /// 3: answers [`Message::Describe`].
    Description(Box<Description>),
    /// 4: a receiver tells what it holds.
    Answer(Box<Answer>),
    /// 5: the sender starts a step.
    BeginStep(Box<BeginStep>),
    /// 6: the receiver is ready for the step's bytes.
    StepReady(StepReady),
    /// 7: the receiver holds the step's snapshot, durably.
    StepDone(Box<StepDone>),
    /// 8: the sender ends without (further) steps, and says what the comparison gave.
    Conclude(Box<Outcome>),
    /// 9: the sender has sent all steps.
    Finish,
    /// 10: the receiver has taken note; the exchange is over.
    Finished,
    /// 11: the exchange is over because of a problem.
    Problem(Problem),
    /// 12: what the user who started the transfer should know of a step; [`Message::remarks`] makes it.
    Remarks(Vec<Finding>),
    /// 13: the sender asks the receiver to resolve by [`Offer::policy`] what the comparison gave.
    Resolve(Box<Outcome>),
    /// 14: the receiver has done so; ends the exchange in place of [`Message::Finished`].
    Resolved(Box<Resolution>),
    /// 15: the primary asks a replica to be the primary from now on.
    TakeOver(Box<TakeOver>),
    /// 16: it is.
    TakenOver(TakenOver),
    /// 17: asks who may write some volumes.
    AskClaims(AskClaims),
    /// 18: answers [`Message::AskClaims`]; volumes that are not there, or not to be known, are left out.
    Claims(Vec<VolumeClaim>),
    /// 19: follows each [`Message::Offer`] at once.
    Rest(Rest),
    /// 20: the receiver asks for the snapshots of blocks of [`Rest::older`], by their places, in order.
    Want(Vec<u32>),
    /// 21: answers [`Message::Want`]: the snapshots of all these blocks, in order, without metadata.
    Snapshots(Vec<HeldSnapshot>),
    /// 22: opens a further connection for the bytes of a step. Over before, it is answered by [`Message::Finished`].
    Lane(Lane),
    /// 23: the receiver waits for the lane's stream of bytes; [`Message::Finished`] follows when the step is over.
    LaneReady,
    /// 24: before [`Message::Conclude`], the sender of a dry run tells how many bytes the deltas would have at most.
    Expected(u64),
}

/// A further connection for the bytes of a step that is being sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lane {
    /// [`PROTOCOL`].
    pub protocol: u32,
    /// The step's [`StepStream::id`].
    pub stream: Uuid,
}

/// What belongs to an offer and travels behind it, so that an offer keeps its bytes.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Rest {
    /// Ancestors of the lineage's snapshots that the sender does not hold; goes into [`Offer::forgotten`].
    pub forgotten: Forgotten,
    /// The snapshots before those of [`Offer::lineage`], as an outline; empty where that is all of it.
    pub older: Vec<Block>,
}

/// Asks who may write some volumes, as far as the peer knows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AskClaims {
    /// [`PROTOCOL`].
    pub protocol: u32,
    /// The volumes, [`CLAIMS_LIMIT`] at most.
    pub volumes: Vec<VolumeId>,
}

/// Who may write a volume, by a node's record of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeClaim {
    /// The volume.
    pub volume: VolumeId,
    /// Its name on the node.
    pub name: VolumeName,
    /// Whether the node may write it.
    pub role: Role,
    /// The epoch.
    pub epoch: u64,
    /// Who became the primary when the epoch began, as far as the node knows.
    pub primary: Option<Host>,
}

/// Hands a volume over. The sender has stopped writing and will not write again unless this is refused.
///
/// Asking again for what was done already is answered in the same way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TakeOver {
    /// [`PROTOCOL`].
    pub protocol: u32,
    /// The volume's name on the peer.
    pub name: VolumeName,
    /// The volume.
    pub volume: VolumeId,
    /// The newest snapshot, which the peer must hold as its newest.
    pub tip: SnapshotId,
    /// The epoch that begins.
    pub epoch: u64,
}

/// The volume is writable on the peer now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TakenOver {
    /// The epoch that has begun.
    pub epoch: u64,
}

/// What a sender has and what it wants the receiver to have.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// [`PROTOCOL`].
    pub protocol: u32,
    /// The transfer, the same for each of its attempts; minted by the opener.
    pub transfer: Uuid,
    /// The volume as the sender has it.
    pub volume: VolumeRecord,
    /// The name wanted on the receiver: the volume's own, or that of `--as`.
    pub name: VolumeName,
    /// The sender's lineage, snapshot metadata left out ([`strip`]); it holds `want`. Of a long one only the newest part travels
    /// here ([`outline::cut`]).
    pub lineage: Lineage,
    /// The snapshot the receiver shall have.
    pub want: SnapshotId,
    /// The formats the sender's driver writes, best first.
    pub formats: Vec<DeltaFormat>,
    /// What shall happen when the histories have gone apart.
    pub policy: DivergencePolicy,
    /// Whether to act.
    pub mode: Mode,
    /// Who sends.
    pub sender: Host,
    /// Ancestors of the lineage's snapshots that the sender does not hold. Travels behind the offer, in [`Rest`].
    #[serde(skip)]
    pub forgotten: Forgotten,
}

/// Asks the peer to offer one of its volumes on the same stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PullRequest {
    /// [`PROTOCOL`].
    pub protocol: u32,
    /// The transfer, the same for each of its attempts; minted by the opener.
    pub transfer: Uuid,
    /// The volume's name on the peer.
    pub volume: VolumeName,
    /// The snapshot's name on the peer; its newest one where this is `None`.
    pub snapshot: Option<SnapshotName>,
    /// The name wanted here; goes into [`Offer::name`].
    pub name: VolumeName,
    /// What shall happen when the histories have gone apart; goes into [`Offer::policy`].
    pub policy: DivergencePolicy,
    /// Whether to act; goes into [`Offer::mode`].
    pub mode: Mode,
    /// Who asks.
    pub receiver: Host,
    /// Bytes per second that the sender shall put on the wire at most.
    pub limit_bytes_per_second: Option<NonZeroU64>,
}

/// Asks for a volume's lineage by the volume's name. A name that is not there is answered by
/// [`ProblemCode::UnknownVolume`]. The outline of what the asking node has of it comes behind ([`Rest::older`]).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Describe {
    /// [`PROTOCOL`].
    pub protocol: u32,
    /// The volume's name on the peer.
    pub volume: VolumeName,
}

/// A volume as its node has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Description {
    /// Its record.
    pub volume: VolumeRecord,
    /// Its snapshots, snapshot metadata left out ([`strip`]). They travel as `pieces`.
    #[serde(skip)]
    pub lineage: Lineage,
    /// `lineage` beside the outline that came behind [`Describe`]: [`Description::pack`] makes it, [`Description::unpack`] takes it.
    pub pieces: Vec<Piece>,
    /// Whether its head differs from the newest snapshot.
    pub head: HeadState,
    /// Where it is mounted, if it is.
    pub mounted: Option<String>,
    /// The formats the node's driver knows, best first.
    pub formats: Vec<DeltaFormat>,
    /// The node.
    pub host: Host,
}

/// What the receiver has of the offered volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// The volume that the offer is bound to, or the unrelated one that has its name (see [`crate::binding`]); `None`
    /// where a new one will be made.
    pub volume: Option<VolumeRecord>,
    /// The id of the volume that the snapshots will land in: that of `volume`, or the new one's. Another one than that
    /// of `volume` says that `volume` is unrelated.
    pub lands_in: VolumeId,
    /// That volume's snapshots, snapshot metadata left out ([`strip`]). They travel as `pieces`.
    #[serde(skip)]
    pub lineage: Lineage,
    /// `lineage` beside what was offered: [`Answer::pack`] makes it, [`Answer::unpack`] takes it.
    pub pieces: Vec<Piece>,
    /// Whether its head differs from the newest snapshot; clean where there is no volume.
    pub head: HeadState,
    /// Where it is mounted, if it is.
    pub mounted: Option<String>,
    /// Which of the offered snapshots the receiver holds in other volumes, a clone's origin for instance.
    pub elsewhere: Vec<SnapshotKey>,
    /// The formats the receiver's driver reads, best first.
    pub formats: Vec<DeltaFormat>,
    /// What an interrupted receive for that volume left.
    pub partial: Option<Partial>,
    /// Who receives.
    pub receiver: Host,
    /// Ancestors of the lineage's snapshots that the receiver does not hold, that descend from what is offered, and that the
    /// sender does not know.
    pub forgotten: Forgotten,
}

/// Starts a step: one snapshot, built on one base or on nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BeginStep {
    /// Counts from 0, one more for each step of this attempt.
    pub step: u32,
    /// The snapshot that arrives, with its metadata.
    pub snapshot: Snapshot,
    /// Whether its contents are those of its first parent, by the sender's record.
    pub unchanged: bool,
    /// The sum of the sizes of its regular files, for progress and for the receiver's check of space.
    pub logical_bytes: u64,
    /// What it builds on, as the receiver names it.
    pub base: Option<SnapshotKey>,
    /// The format of the bytes.
    pub format: DeltaFormat,
    /// The stream of bytes that the sender has open.
    pub stream: StepStream,
    /// The point of the receiver's [`Answer::partial`] that the sender is willing to go on from.
    pub resume: Option<ResumePoint>,
    /// What the sender says when the step is done.
    pub after: After,
}

/// What a sender says behind the [`StepDone`] of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum After {
    /// 0: it begins another step, or finishes.
    More,
    /// 1: nothing: it was the last step, and its [`StepDone`] ends the exchange.
    Nothing,
}

/// The sender's stream of one step. It outlives a connection while the sender's daemon lives: after a reconnect the
/// sender begins the step again with the same id, and the receiver says at which frame it wants to go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepStream {
    /// Minted when the sender opens the delta.
    pub id: Uuid,
    /// The sequence number of the oldest frame the sender can still send; 0 for a stream of which nothing was dropped.
    pub oldest_frame: u64,
}

/// Where the receiver wants the bytes of a step to start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum StepStart {
    /// 0: at the step's beginning.
    Beginning,
    /// 1: at this frame of the stream that the sender still has open: what was consumed is kept.
    Frame(u64),
    /// 2: at this point; the sender opens the delta there.
    Point(ResumePoint),
}

/// The receiver is ready for a step's bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepReady {
    /// The step's number, as begun.
    pub step: u32,
    /// Where its bytes shall start.
    pub start: StepStart,
}

/// The receiver holds a step's snapshot. It may come at once as the answer to [`BeginStep`], without any bytes,
/// where the snapshot was there already.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepDone {
    /// The step's number, as begun.
    pub step: u32,
    /// The snapshot as the receiver holds it.
    pub held: HeldSnapshot,
}

impl Offer {
    /// Puts the snapshots before the newest ones back into the lineage.
    pub fn complete(&mut self, puzzle: Puzzle, sent: Vec<HeldSnapshot>) -> Result<(), Violation> {
        let newest = std::mem::take(&mut self.lineage);
        let whole = puzzle.finish(sent, newest).and_then(|lineage| {
            check_lineage(&lineage)?;
            Ok(lineage)
        });
        self.lineage = whole.map_err(|rule| Violation { message: "Snapshots", rule })?;
        Ok(())
    }
}

impl Answer {
    /// Writes the lineage down beside what was offered.
    pub fn pack(&mut self, offered: &Lineage) {
        self.pieces = outline::pack(&self.lineage, offered);
    }

    /// Reads the lineage out of its pieces.
    pub fn unpack(&mut self, offered: &Lineage) -> Result<(), Violation> {
        self.lineage = unpacked("Answer", std::mem::take(&mut self.pieces), offered)?;
        Ok(())
    }
}

impl Description {
    /// Writes the lineage down beside the outline of the asking node's.
    pub fn pack(&mut self, outline: &[Block]) {
        self.pieces = outline::pack_beside(&self.lineage, outline);
    }

    /// Reads the lineage out of its pieces, beside the one that was outlined.
    pub fn unpack(&mut self, outlined: &Lineage) -> Result<(), Violation> {
        self.lineage = unpacked("Description", std::mem::take(&mut self.pieces), outlined)?;
        Ok(())
    }
}

fn unpacked(message: &'static str, pieces: Vec<Piece>, other: &Lineage) -> Result<Lineage, Violation> {
    let lineage = outline::unpack(pieces, other).and_then(|lineage| check_lineage(&lineage).map(|()| lineage));
    lineage.map_err(|rule| Violation { message, rule })
}

/// Returns a lineage without its snapshots' metadata, as it travels.
pub fn strip(lineage: &Lineage) -> Lineage {
    let mut stripped = lineage.clone();
    stripped.snapshots.iter_mut().for_each(|held| held.snapshot.metadata.clear());
    stripped
}

impl Message {
    /// Makes [`Message::Remarks`] of the first [`REMARKS_LIMIT`] findings, each cut to [`REMARK_LIMIT`] bytes.
    pub fn remarks(findings: Vec<Finding>) -> Self {
        let cut = |mut text: String| {
            text.truncate(text.floor_char_boundary(REMARK_LIMIT));
            text
        };
        let findings = findings.into_iter().take(REMARKS_LIMIT);
        Self::Remarks(findings.map(|finding| Finding { path: cut(finding.path), what: cut(finding.what) }).collect())
    }

    /// Returns the message's kind, for logs.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Offer(_) => "Offer",
            Self::PullRequest(_) => "PullRequest",
            Self::Describe(_) => "Describe",
            Self::Description(_) => "Description",
            Self::Answer(_) => "Answer",
            Self::BeginStep(_) => "BeginStep",
            Self::StepReady(_) => "StepReady",
            Self::StepDone(_) => "StepDone",
            Self::Conclude(_) => "Conclude",
            Self::Finish => "Finish",
            Self::Finished => "Finished",
            Self::Problem(_) => "Problem",
            Self::Remarks(_) => "Remarks",
            Self::Resolve(_) => "Resolve",
            Self::Resolved(_) => "Resolved",
            Self::TakeOver(_) => "TakeOver",
            Self::TakenOver(_) => "TakenOver",
            Self::AskClaims(_) => "AskClaims",
            Self::Claims(_) => "Claims",
            Self::Rest(_) => "Rest",
            Self::Want(_) => "Want",
            Self::Snapshots(_) => "Snapshots",
            Self::Lane(_) => "Lane",
            Self::LaneReady => "LaneReady",
            Self::Expected(_) => "Expected",
        }
    }
}
