//! Every message that two nodes exchange on a control stream of ALPN `flocker/1`.
//!
//! Owns the shapes, their order on the wire (frozen by golden bytes) and the check of whatever a peer sent
//! ([`Message::validate`]). Refuses to know streams and frames (transport) and what is done about a message (node).
//! Neighbours: [`crate::problem`] errors as codes and facts, [`crate::plan`] the outcome that a sender concludes.
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

use std::{collections::BTreeSet, fmt, num::NonZeroU64, str::FromStr};

use flocker_storage::{
    delta::{DeltaFormat, Partial, RESUME_POINT_LIMIT, ResumePoint},
    driver::Finding,
    model::{
        HeadState, HeldSnapshot, Host, Lineage, ParseError, Role, Snapshot, SnapshotId, SnapshotKey, SnapshotName,
        VolumeId, VolumeName, VolumeRecord, check_metadata,
    },
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
/// 6: [`Message::Expected`].
pub const PROTOCOL: u32 = 6;

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
/// [`ProblemCode::UnknownVolume`].
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
    /// Its snapshots, snapshot metadata left out ([`strip`]).
    pub lineage: Lineage,
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

/// What shall happen when the histories have gone apart; [`crate::resolution::way`] is the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DivergencePolicy {
    /// 0: nothing; the evidence is shown.
    #[default]
    Refuse,
    /// 1: the incoming history lands as a new volume.
    Fork,
    /// 2: the receiver's history wins, the sender keeps its own as a fork.
    Ours,
    /// 3: the incoming history takes the name, the receiver keeps its own as a fork.
    Theirs,
}

impl fmt::Display for DivergencePolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Refuse => "refuse",
            Self::Fork => "fork",
            Self::Ours => "ours",
            Self::Theirs => "theirs",
        })
    }
}

/// Text that names no [`DivergencePolicy`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a way to treat a divergence: write refuse, fork, ours or theirs")]
pub struct UnknownPolicy {
    /// The text as given.
    pub text: String,
}

impl FromStr for DivergencePolicy {
    type Err = UnknownPolicy;
    fn from_str(text: &str) -> Result<Self, UnknownPolicy> {
        match text {
            "refuse" => Ok(Self::Refuse),
            "fork" => Ok(Self::Fork),
            "ours" => Ok(Self::Ours),
            "theirs" => Ok(Self::Theirs),
            _ => Err(UnknownPolicy { text: text.to_owned() }),
        }
    }
}

/// Whether a push or pull acts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// 0: it acts.
    #[default]
    Run,
    /// 1: it only says what it would do: the sender concludes instead of beginning a step.
    DryRun,
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
        let lineage = outline::unpack(std::mem::take(&mut self.pieces), offered).and_then(|lineage| {
            check_lineage(&lineage)?;
            Ok(lineage)
        });
        self.lineage = lineage.map_err(|rule| Violation { message: "Answer", rule })?;
        Ok(())
    }
}

/// Returns a lineage without its snapshots' metadata, as it travels.
pub fn strip(lineage: &Lineage) -> Lineage {
    let mut stripped = lineage.clone();
    stripped.snapshots.iter_mut().for_each(|held| held.snapshot.metadata.clear());
    stripped
}

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

    /// Checks what serde cannot: counts, lengths, duplicates. Every message from a peer goes through here first.
    /// The protocol's revision is not checked: a peer of another one gets [`ProblemCode::VersionMismatch`].
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
    check_lineage(&description.lineage)?;
    check_formats(&description.formats)?;
    check_mounted(description.mounted.as_deref())
}

fn check_answer(answer: &Answer) -> Result<(), String> {
    match &answer.volume {
        Some(record) => check_record(record)?,
        None => demand(answer.pieces.is_empty(), || "it has snapshots of no volume".to_owned())?,
    }
    for piece in &answer.pieces {
        if let Piece::Own(own) = piece {
            check_snapshots(own)?;
        }
    }
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

fn check_lineage(lineage: &Lineage) -> Result<(), String> {
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
