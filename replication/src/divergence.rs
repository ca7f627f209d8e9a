//! Compares two histories of one volume: one pure function, six typed outcomes with their evidence.
//!
//! Owns the answer to "what has the receiver to do with the snapshot that the sender wants it to have". Refuses to
//! know formats, names, clocks and what is done about the answer. Neighbour: [`crate::plan`], which turns a
//! [`Relation`] into steps or a refusal.
//!
//! # Rules
//! - By id only. Names and times are carried for people and never looked at.
//! - A history is a DAG by parents. Both sides' lineages and what both remember of snapshots that are held no more make one graph
//!   ([`crate::ancestry`]); who holds a snapshot is told by the lineages alone. A lineage lists snapshots oldest first; where
//!   nothing is known of how a snapshot's parents lead to another of the list, the one before it stands for them.
//! - A snapshot that only the receiver has counts as a change unless it is an ancestor of the wanted one, or `unchanged` against a
//!   first parent that is (directly, or by such snapshots in between).
//! - Where a merge took in what the receiver has, only what descends from that follows: the receiver goes from its tip
//!   to the merge, not by way of the other branch.
//! - Older snapshots that only the receiver has (before the newest common one) never count.

use std::collections::BTreeSet;

use flocker_storage::model::{HeadState, HeldSnapshot, Lineage, SnapshotId, SnapshotKey, VolumeId, VolumeRecord};

pub use crate::plan::UnrelatedReason;
use crate::{
    ancestry::Forgotten,
    descent::{Descent, Side, told},
    message::{Answer, Offer},
};

/// The sender's side of a comparison.
#[derive(Debug, Clone, Copy)]
pub struct Sender<'a> {
    /// The snapshots of the volume.
    pub lineage: &'a Lineage,
    /// Their ancestors that it does not hold, as offered.
    pub forgotten: &'a Forgotten,
}

impl<'a> From<&'a Offer> for Sender<'a> {
    fn from(offer: &'a Offer) -> Self {
        Self { lineage: &offer.lineage, forgotten: &offer.forgotten }
    }
}

/// The receiver's side of a comparison.
#[derive(Debug, Clone, Copy)]
pub struct Receiver<'a> {
    /// The volume that the offer is bound to, or the other one that has its name; `None` where there is none.
    pub volume: Option<&'a VolumeRecord>,
    /// The volume that the snapshots would land in. Differs from `volume` where that one is not related.
    pub lands_in: VolumeId,
    /// The snapshots of `volume`.
    pub lineage: &'a Lineage,
    /// Whether the head of `volume` has changes.
    pub head: HeadState,
    /// Which of the sender's snapshots lie in other volumes of the receiver.
    pub elsewhere: &'a [SnapshotKey],
    /// Ancestors of its snapshots that it does not hold, as answered.
    pub forgotten: &'a Forgotten,
}

impl<'a> From<&'a Answer> for Receiver<'a> {
    fn from(answer: &'a Answer) -> Self {
        let Answer { volume, lands_in, lineage, head, elsewhere, forgotten, .. } = answer;
        Self { volume: volume.as_ref(), lands_in: *lands_in, lineage, head: *head, elsewhere, forgotten }
    }
}

/// What the receiver has to do with the snapshot that was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Relation {
    /// It has the snapshot, and nothing newer that counts.
    UpToDate,
    /// It lacks these and nothing is in their way.
    FastForward {
        /// What the first missing one builds on; `None` for a full copy.
        base: Option<Base>,
        /// What is missing, oldest first; the last one is the snapshot that was asked for. Never empty.
        missing: Vec<HeldSnapshot>,
    },
    /// It has the snapshot (or had it) and newer ones.
    Behind {
        /// The newer ones as the receiver holds them, oldest first. Never empty.
        newer: Vec<HeldSnapshot>,
        /// The newest snapshot that both hold, as the receiver holds it: the one that was asked for, or an older one
        /// where the receiver has pruned that; `None` where nothing is left in common.
        common: Option<HeldSnapshot>,
    },
    /// Both sides have snapshots that the other lacks.
    Diverged {
        /// The newest snapshot that both hold, as the receiver holds it.
        common: HeldSnapshot,
        /// What leads from there to the snapshot that was asked for, oldest first. Never empty.
        only_sender: Vec<HeldSnapshot>,
        /// The receiver's own changes since then, oldest first. Never empty.
        only_receiver: Vec<HeldSnapshot>,
    },
    /// There is nothing to build on.
    Unrelated {
        /// Why.
        reason: UnrelatedReason,
        /// The receiver's volume.
        receiver_volume: VolumeId,
        /// The receiver's newest snapshot.
        receiver_tip: Option<HeldSnapshot>,
    },
    /// It would be a fast-forward, and the head that it would replace has changes that no snapshot holds.
    Dirty {
        /// The receiver's newest snapshot.
        tip: Option<HeldSnapshot>,
    },
}

/// A snapshot that both sides hold and that a delta builds on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Base {
    /// As the sender holds it.
    pub snapshot: HeldSnapshot,
    /// As the receiver names it.
    pub on_receiver: SnapshotKey,
}

/// The snapshot that was asked for is not in the sender's lineage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("snapshot {0} is not in the sender's lineage")]
pub struct WantMissing(pub SnapshotId);

/// Compares what the sender has with what the receiver has, for one wanted snapshot of the sender.
///
/// Works in O(n log n) of all that is listed; the lists may come from a peer and hold anything. Where both sides tell of one
/// snapshot's parents, the receiver's word counts: it is its history that would get something on top.
pub fn compare(sender: &Sender<'_>, receiver: &Receiver<'_>, want: SnapshotId) -> Result<Relation, WantMissing> {
    let held = told(receiver.lineage).chain(told(sender.lineage));
    let descent = Descent::of(held.chain(receiver.forgotten.iter()).chain(sender.forgotten.iter()));
    let ours = Side::of(sender.lineage, &descent);
    if !ours.holds(want) {
        return Err(WantMissing(want));
    }
    let incoming = ours.ancestry(want);

    let Some(volume) = receiver.volume else {
        return Ok(into_new_volume(&ours, &incoming, want, receiver.elsewhere));
    };
    let theirs = Side::of(receiver.lineage, &descent);
    let tip = receiver.lineage.tip().cloned();
    if volume.id != receiver.lands_in {
        let reason = UnrelatedReason::OtherVolumeId;
        return Ok(Relation::Unrelated { reason, receiver_volume: volume.id, receiver_tip: tip });
    }

    if let Some(&held_at) = theirs.at.get(&want) {
        let newer = changes_after(&theirs, Some(held_at), &incoming);
        return Ok(if newer.is_empty() {
            Relation::UpToDate
        } else {
            Relation::Behind { newer, common: Some(theirs.list[held_at].clone()) }
        });
    }
    let is_common = |held: &HeldSnapshot| ours.holds(held.snapshot.id) && incoming.contains(&held.snapshot.id);
    let common = theirs.list.iter().rposition(is_common);
    let changes = changes_after(&theirs, common, &incoming);
    if changes.last().is_some_and(|newest| follows(newest.snapshot.id, want, &ours, &theirs)) {
        return Ok(Relation::Behind { newer: changes, common: common.map(|at| theirs.list[at].clone()) });
    }
    let Some(common) = common.map(|at| &theirs.list[at]) else {
        if tip.is_some() {
            let reason = UnrelatedReason::NoCommonSnapshot;
            return Ok(Relation::Unrelated { reason, receiver_volume: volume.id, receiver_tip: tip });
        }
        return Ok(unless_dirty(receiver, None, ours.path(None, want)));
    };
    let base = &ours.list[ours.at[&common.snapshot.id]];
    let mut missing = ours.path(Some(base.snapshot.id), want);
    if !changes.is_empty() {
        return Ok(Relation::Diverged { common: common.clone(), only_sender: missing, only_receiver: changes });
    }
    // What the receiver has on top and the wanted one descends from, though the sender holds it no more: only what descends
    // from it follows, so that the receiver never goes back to a state without it.
    if let Some(newest) = theirs.list.iter().rfind(|held| incoming.contains(&held.snapshot.id))
        && newest.snapshot.id != common.snapshot.id
    {
        let descendants = ours.descendants(newest.snapshot.id);
        if let Some(first) = missing.iter().position(|held| descendants.contains(&held.snapshot.id)) {
            missing.drain(..first);
        }
    }
    let base = Base { snapshot: base.clone(), on_receiver: common.key() };
    Ok(unless_dirty(receiver, Some(base), missing))
}

/// A fast-forward, unless it would replace a head with changes.
fn unless_dirty(receiver: &Receiver<'_>, base: Option<Base>, missing: Vec<HeldSnapshot>) -> Relation {
    match receiver.head {
        HeadState::Clean => Relation::FastForward { base, missing },
        HeadState::Dirty => Relation::Dirty { tip: receiver.lineage.tip().cloned() },
    }
}

/// For a volume that is not there: from the newest ancestor that another volume of the receiver holds, or in full.
fn into_new_volume(
    ours: &Side<'_>,
    incoming: &BTreeSet<SnapshotId>,
    want: SnapshotId,
    elsewhere: &[SnapshotKey],
) -> Relation {
    let places = elsewhere.iter().filter_map(|key| {
        // The wanted snapshot itself is no base: the new volume needs a snapshot of its own.
        let &at = ours.at.get(&key.snapshot).filter(|_| key.snapshot != want && incoming.contains(&key.snapshot))?;
        Some((at, ours.list[at].volume == key.volume, std::cmp::Reverse(*key)))
    });
    let base = places.max().map(|(at, _, key)| (&ours.list[at], key.0));
    Relation::FastForward {
        missing: ours.path(base.map(|(base, _)| base.snapshot.id), want),
        base: base.map(|(base, on_receiver)| Base { snapshot: base.clone(), on_receiver }),
    }
}

/// Tells whether one of the receiver's snapshots descends from the wanted one, in the order of either side.
fn follows(newest: SnapshotId, want: SnapshotId, ours: &Side<'_>, theirs: &Side<'_>) -> bool {
    theirs.ancestry(newest).contains(&want) || (ours.holds(newest) && ours.ancestry(newest).contains(&want))
}

/// Returns a side's snapshots after `common` (after nothing: all) that hold changes the incoming history lacks.
fn changes_after(side: &Side<'_>, common: Option<usize>, incoming: &BTreeSet<SnapshotId>) -> Vec<HeldSnapshot> {
    // Snapshots whose contents the incoming history has at one of its own.
    let mut repeating = BTreeSet::new();
    let start = common.map_or(0, |at| at + 1);
    let mut changes = Vec::new();
    for (at, held) in side.list.iter().enumerate() {
        let snapshot = &held.snapshot;
        let contained = |id: &SnapshotId| incoming.contains(id) || repeating.contains(id);
        if incoming.contains(&snapshot.id) || (held.unchanged && snapshot.parents.first().is_some_and(contained)) {
            repeating.insert(snapshot.id);
        } else if at >= start {
            changes.push(held.clone());
        }
    }
    changes
}
