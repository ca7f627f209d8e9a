//! What a comparison leads to: the steps to run, or a refusal with its evidence.
//!
//! Owns [`Outcome`], which crosses the wire and is the API's JSON. Refuses to know how histories are compared
//! ([`crate::divergence`]), how a refusal reads ([`crate::refusal`]) and how steps are run (node).

use flocker_storage::{
    delta::DeltaFormat,
    model::{
        HeadState, HeldSnapshot, Host, Lineage, NodeName, SnapshotId, SnapshotKey, SnapshotName, VolumeId, VolumeName,
    },
};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::{
    divergence::Relation,
    message::{Answer, LINEAGE_LIMIT, demand},
    negotiate::{NoCommonFormat, negotiate},
};

/// The most snapshots that a [`Points`] lists.
pub const POINTS_LIMIT: usize = 100;

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Plan {
    /// Nothing: the receiver has the snapshot.
    UpToDate(Outcome),
    /// These steps, in this order.
    FastForward(Outcome, Vec<Step>),
    /// Nothing, because of this.
    Refuse(Refusal),
}

/// One snapshot to send.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// What the receiver shall have, as the sender holds it (metadata left out, as in the lineage).
    pub snapshot: HeldSnapshot,
    /// What it builds on; `None` for a full copy.
    pub base: Option<StepBase>,
    /// The format of its bytes.
    pub format: DeltaFormat,
}

/// One snapshot, as both sides name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepBase {
    /// For [`DeltaRequest::base`](flocker_storage::delta::DeltaRequest).
    pub on_sender: SnapshotKey,
    /// For [`BeginStep::base`](crate::message::BeginStep).
    pub on_receiver: SnapshotKey,
}

/// An outcome that is neither up to date nor a fast-forward.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal(pub Outcome);

/// The direction that the user asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// 0: the opener sends.
    Push,
    /// 1: the opener receives.
    Pull,
}

/// What the comparison of two histories gave, with its evidence: for the API's JSON, the wire and the operator's eyes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// Push or pull.
    pub direction: Direction,
    /// The volume's name on the sender.
    pub volume: VolumeName,
    /// The name on the receiver: that of the volume there, or the one wanted for a new volume.
    pub name: VolumeName,
    /// Who sends.
    pub sender: Host,
    /// Who receives.
    pub receiver: Host,
    /// The snapshot that was asked for.
    pub want: Point,
    /// What the comparison gave.
    pub verdict: Verdict,
}

/// The six outcomes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// 0: the receiver has the snapshot and nothing newer.
    UpToDate,
    /// 1: the receiver gets what is missing.
    FastForward {
        /// What the first missing one builds on; `None` for a full copy.
        base: Option<Point>,
        /// What is missing, oldest first.
        missing: Points,
    },
    /// 2: the receiver has the snapshot, and newer ones.
    Behind {
        /// The newer ones, oldest first.
        newer: Points,
    },
    /// 3: both sides have snapshots that the other lacks.
    Diverged {
        /// The newest snapshot that both have.
        common: Point,
        /// What only the sender has since then, oldest first.
        only_sender: Points,
        /// What only the receiver has since then, oldest first.
        only_receiver: Points,
        /// The receiver's name of `common`.
        receiver_name: SnapshotName,
        /// Whether the receiver's head has changes on top.
        head: HeadState,
    },
    /// 4: there is nothing to build on.
    Unrelated {
        /// Why.
        reason: UnrelatedReason,
        /// The id of the receiver's volume.
        receiver_volume: VolumeId,
        /// The receiver's newest snapshot.
        receiver_tip: Option<Point>,
    },
    /// 5: the receiver's head has changes that no snapshot holds.
    Dirty {
        /// The receiver's newest snapshot.
        tip: Option<Point>,
    },
}

/// Why two volumes have nothing in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum UnrelatedReason {
    /// 0: the receiver's volume of that name is another volume.
    OtherVolumeId,
    /// 1: it is the same volume, and no snapshot is on both sides any more.
    NoCommonSnapshot,
}

/// Who exchanges what with whom: the parts of an [`Outcome`] that no comparison gives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parties {
    /// Push or pull.
    pub direction: Direction,
    /// The volume's name on the sender.
    pub volume: VolumeName,
    /// The name wanted on the receiver.
    pub name: VolumeName,
    /// Who sends.
    pub sender: Host,
    /// Who receives.
    pub receiver: Host,
}

/// Turns a relation into steps or a refusal. `lineage` is the sender's, which `want` and the relation are of.
///
/// Fails where a step is due and the two drivers share no format.
///
/// # Panics
/// Where `want` is not in `lineage`: [`compare`](crate::divergence::compare) gave no relation for such a one.
pub fn plan(
    lineage: &Lineage,
    want: SnapshotId,
    relation: Relation,
    parties: &Parties,
    formats: &[DeltaFormat],
    answer: &Answer,
) -> Result<Plan, NoCommonFormat> {
    let outcome = outcome(lineage, want, &relation, parties, answer);
    match relation {
        Relation::UpToDate => Ok(Plan::UpToDate(outcome)),
        Relation::FastForward { base, missing } => {
            let format = negotiate(formats, &answer.formats)?;
            let base = base.map(|base| StepBase { on_sender: base.snapshot.key(), on_receiver: base.on_receiver });
            Ok(Plan::FastForward(outcome, steps(missing, base, answer.lands_in, &format)))
        }
        _ => Ok(Plan::Refuse(Refusal(outcome))),
    }
}

/// One step for each missing snapshot, each on the one before.
fn steps(missing: Vec<HeldSnapshot>, base: Option<StepBase>, lands_in: VolumeId, format: &DeltaFormat) -> Vec<Step> {
    let mut base = base;
    let step = |snapshot: HeldSnapshot| {
        let landed = SnapshotKey { volume: lands_in, snapshot: snapshot.snapshot.id };
        let next_base = StepBase { on_sender: snapshot.key(), on_receiver: landed };
        Step { base: base.replace(next_base), snapshot, format: format.clone() }
    };
    missing.into_iter().map(step).collect()
}

fn outcome(lineage: &Lineage, want: SnapshotId, relation: &Relation, parties: &Parties, answer: &Answer) -> Outcome {
    let name_of = |id: SnapshotId| lineage.find(id).map(Point::from);
    let verdict = match relation {
        Relation::UpToDate => Verdict::UpToDate,
        Relation::FastForward { base, missing } => Verdict::FastForward {
            base: base.as_ref().map(|base| Point::from(&base.snapshot)),
            missing: Points::new(missing),
        },
        Relation::Behind { newer, .. } => Verdict::Behind { newer: Points::new(newer) },
        Relation::Diverged { common, only_sender, only_receiver } => Verdict::Diverged {
            common: name_of(common.snapshot.id).unwrap_or_else(|| Point::from(common)),
            only_sender: Points::new(only_sender),
            only_receiver: Points::new(only_receiver),
            receiver_name: common.snapshot.name.clone(),
            head: answer.head,
        },
        Relation::Unrelated { reason, receiver_volume, receiver_tip } => Verdict::Unrelated {
            reason: *reason,
            receiver_volume: *receiver_volume,
            receiver_tip: receiver_tip.as_ref().map(Point::from),
        },
        Relation::Dirty { tip } => Verdict::Dirty { tip: tip.as_ref().map(Point::from) },
    };
    Outcome {
        direction: parties.direction,
        volume: parties.volume.clone(),
        name: answer.volume.as_ref().map_or_else(|| parties.name.clone(), |record| record.name.clone()),
        sender: parties.sender.clone(),
        receiver: parties.receiver.clone(),
        want: name_of(want).expect("a relation exists only for a snapshot of the lineage"),
        verdict,
    }
}

/// One snapshot, for people.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Point {
    /// Its id.
    pub id: SnapshotId,
    /// Its name, on the side that is speaking of it.
    pub name: SnapshotName,
    /// The host it was taken on.
    pub host: NodeName,
    /// When, by that host's clock.
    pub created: Timestamp,
    /// The sum of the sizes of its regular files.
    pub logical_bytes: u64,
}

/// A number of snapshots, of which the newest [`POINTS_LIMIT`] are listed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Points {
    /// How many there are.
    pub total: u64,
    /// The newest of them, oldest first.
    pub listed: Vec<Point>,
}

impl From<&HeldSnapshot> for Point {
    fn from(held: &HeldSnapshot) -> Self {
        let HeldSnapshot { snapshot, logical_bytes, .. } = held;
        Self {
            id: snapshot.id,
            name: snapshot.name.clone(),
            host: snapshot.host.name.clone(),
            created: snapshot.created,
            logical_bytes: *logical_bytes,
        }
    }
}

impl Points {
    /// Lists the newest of these, which are given oldest first.
    pub fn new(snapshots: &[HeldSnapshot]) -> Self {
        let skipped = snapshots.len().saturating_sub(POINTS_LIMIT);
        Self { total: snapshots.len() as u64, listed: snapshots[skipped..].iter().map(Point::from).collect() }
    }

    /// Returns the newest one.
    pub fn tip(&self) -> Option<&Point> {
        self.listed.last()
    }
}

impl Outcome {
    pub(crate) fn check(&self) -> Result<(), String> {
        self.verdict.check()
    }
}

impl Verdict {
    pub(crate) fn check(&self) -> Result<(), String> {
        let lists: &[&Points] = match self {
            Self::FastForward { missing, .. } => &[missing],
            Self::Behind { newer } => &[newer],
            Self::Diverged { only_sender, only_receiver, .. } => &[only_sender, only_receiver],
            Self::UpToDate | Self::Unrelated { .. } | Self::Dirty { .. } => &[],
        };
        let holds = |points: &&Points| {
            let listed = points.listed.len();
            listed <= POINTS_LIMIT && points.total >= listed as u64 && points.total <= LINEAGE_LIMIT as u64
        };
        demand(lists.iter().all(holds), || format!("it lists more than {POINTS_LIMIT} snapshots, or counts wrongly"))
    }
}
