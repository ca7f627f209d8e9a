//! Ways on where two histories have gone apart: which policy does what with which outcome of a comparison.
//!
//! Owns the table ([`way`]; docs/DIVERGENCE.md shows the same, and a test holds them together) and the record of what
//! a policy has done ([`Resolution`]), which crosses the wire and is the API's JSON. Refuses to know how it is done
//! (node) and how it reads ([`crate::refusal`]). Both nodes look into the same table with the same comparison.

use flocker_storage::model::{NodeName, VolumeName};
use serde::{Deserialize, Serialize};

use crate::{
    divergence::Relation,
    message::DivergencePolicy,
    plan::{Outcome, Point, UnrelatedReason, Verdict},
    refusal::fork_name,
};

/// What a comparison gave, without its evidence. Two kinds of unrelated volumes are told apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// The receiver has the snapshot, and nothing newer.
    UpToDate,
    /// The receiver lacks something, and nothing is in the way.
    FastForward,
    /// The receiver has newer snapshots.
    Behind,
    /// Both have snapshots that the other lacks.
    Diverged,
    /// The receiver's volume of that name is another volume.
    OtherVolume,
    /// The same volume, and no snapshot is on both sides any more.
    NothingInCommon,
    /// The receiver's head has changes that no snapshot holds.
    Dirty,
}

impl Found {
    /// All of them, in the table's order.
    pub const ALL: [Self; 7] = [
        Self::UpToDate,
        Self::FastForward,
        Self::Behind,
        Self::Diverged,
        Self::Dirty,
        Self::OtherVolume,
        Self::NothingInCommon,
    ];
}

impl From<&Verdict> for Found {
    fn from(verdict: &Verdict) -> Self {
        match verdict {
            Verdict::UpToDate => Self::UpToDate,
            Verdict::FastForward { .. } => Self::FastForward,
            Verdict::Behind { .. } => Self::Behind,
            Verdict::Diverged { .. } => Self::Diverged,
            Verdict::Unrelated { reason, .. } => (*reason).into(),
            Verdict::Dirty { .. } => Self::Dirty,
        }
    }
}

impl From<&Relation> for Found {
    fn from(relation: &Relation) -> Self {
        match relation {
            Relation::UpToDate => Self::UpToDate,
            Relation::FastForward { .. } => Self::FastForward,
            Relation::Behind { .. } => Self::Behind,
            Relation::Diverged { .. } => Self::Diverged,
            Relation::Unrelated { reason, .. } => (*reason).into(),
            Relation::Dirty { .. } => Self::Dirty,
        }
    }
}

impl From<UnrelatedReason> for Found {
    fn from(reason: UnrelatedReason) -> Self {
        match reason {
            UnrelatedReason::OtherVolumeId => Self::OtherVolume,
            UnrelatedReason::NoCommonSnapshot => Self::NothingInCommon,
        }
    }
}

/// What is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// As the comparison says: nothing, or the missing snapshots.
    Straight,
    /// Nothing; the evidence is shown.
    Refuse,
    /// Nothing: all that comes in is in the receiver's history already.
    Contained,
    /// The incoming history lands as a volume of its own. The receiver's volume is not touched.
    Beside,
    /// The incoming history lands as a volume of its own, then the receiver's newer history becomes a fork, and the
    /// volume goes on with the incoming one.
    Succeed,
    /// The incoming history lands as a volume of its own, then the receiver's volume gets the fork's name, and the
    /// incoming one the wanted name.
    Rename,
    /// The receiver's history is brought to the sender, whose own becomes a fork there.
    Reverse,
}

/// Looks into the table.
pub fn way(policy: DivergencePolicy, found: Found) -> Way {
    use DivergencePolicy::{Fork, Ours, Refuse, Theirs};
    match (found, policy) {
        (Found::UpToDate | Found::FastForward, _) => Way::Straight,
        (_, Refuse) => Way::Refuse,
        (Found::Behind, Fork) => Way::Contained,
        (_, Fork) => Way::Beside,
        // One volume cannot have two histories that share nothing: there is no snapshot to go back to.
        (Found::NothingInCommon, Theirs | Ours) => Way::Refuse,
        (Found::OtherVolume, Theirs) => Way::Rename,
        (_, Theirs) => Way::Succeed,
        (_, Ours) => Way::Reverse,
    }
}

/// What a policy has done: the API's JSON, and the receiver's last word on the wire.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resolution {
    /// The policy that was asked for.
    pub policy: DivergencePolicy,
    /// What the comparison had given.
    pub found: Verdict,
    /// Where the history that was brought over is.
    pub landed: Place,
    /// Where the history that gave way is kept; `None` where nothing had to.
    pub kept: Option<Kept>,
}

/// A volume on a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// The node.
    pub host: NodeName,
    /// The volume's name there.
    pub volume: VolumeName,
}

/// A history that gave way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// The volume that keeps it.
    pub place: Place,
    /// Its newest snapshot.
    pub tip: Option<Point>,
}

/// Returns the name of the volume in which an incoming history lands beside the receiver's: made of the wanted snapshot
/// and the host it was taken on, so that it is the same wherever and by whomever it is brought.
pub fn incoming_name(volume: &VolumeName, want: &Point) -> VolumeName {
    fork_name(volume, &want.host, want.id)
}

/// Says what a policy would do, for a dry run; `None` where it would do nothing of its own.
pub fn planned(policy: DivergencePolicy, outcome: &Outcome) -> Option<Resolution> {
    let Outcome { volume, name, sender, receiver, want, verdict, .. } = outcome;
    let at = |host: &NodeName, volume: &VolumeName| Place { host: host.clone(), volume: volume.clone() };
    let tip = match verdict {
        Verdict::Behind { newer } => newer.tip(),
        Verdict::Diverged { only_receiver, .. } => only_receiver.tip(),
        Verdict::Unrelated { receiver_tip: tip, .. } | Verdict::Dirty { tip } => tip.as_ref(),
        Verdict::UpToDate | Verdict::FastForward { .. } => None,
    };
    let keep = |host: &NodeName, volume: &VolumeName, tip: &Point| Kept {
        place: at(host, &fork_name(volume, &tip.host, tip.id)),
        tip: Some(tip.clone()),
    };
    let (landed, kept) = match way(policy, verdict.into()) {
        Way::Straight | Way::Refuse => return None,
        Way::Contained => (at(&receiver.name, name), None),
        Way::Beside => (at(&receiver.name, &incoming_name(volume, want)), None),
        Way::Succeed | Way::Rename => (at(&receiver.name, name), tip.map(|tip| keep(&receiver.name, name, tip))),
        Way::Reverse => {
            let lost = !matches!(verdict, Verdict::Behind { .. });
            (at(&sender.name, volume), lost.then(|| keep(&sender.name, volume, want)))
        }
    };
    Some(Resolution { policy, found: verdict.clone(), landed, kept })
}

impl Resolution {
    pub(crate) fn check(&self) -> Result<(), String> {
        self.found.check()
    }
}
