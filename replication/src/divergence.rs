//! Compares two histories of one volume: one pure function, six typed outcomes with their evidence.
//!
//! Owns the answer to "what has the receiver to do with the snapshot that the sender wants it to have". Refuses to
//! know formats, names, clocks and what is done about the answer. Neighbour: [`crate::plan`], which turns a
//! [`Relation`] into steps or a refusal.
//!
//! # Rules
//! - By id only. Names and times are carried for people and never looked at.
//! - A history is a DAG by parents; a lineage lists it oldest first. Where all parents of a snapshot are gone from the
//!   list (pruned), the one before it in the list stands for them.
//! - A snapshot that only the receiver has counts as a change unless it is `unchanged` against a first parent that
//!   still is there and that the incoming history has too (directly, or by such snapshots in between), or unless it
//!   is itself an ancestor of the wanted snapshot that the sender has pruned.
//! - Where a merge took in what the receiver has, only what descends from that follows: the receiver goes from its tip
//!   to the merge, not by way of the other branch.
//! - Older snapshots that only the receiver has (before the newest common one) never count.

use std::collections::{BTreeMap, BTreeSet};

use flocker_storage::model::{HeadState, HeldSnapshot, Lineage, SnapshotId, SnapshotKey, VolumeId, VolumeRecord};

use crate::message::Answer;
pub use crate::plan::UnrelatedReason;

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
}

impl<'a> From<&'a Answer> for Receiver<'a> {
    fn from(answer: &'a Answer) -> Self {
        let Answer { volume, lands_in, lineage, head, elsewhere, .. } = answer;
        Self { volume: volume.as_ref(), lands_in: *lands_in, lineage, head: *head, elsewhere }
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
/// Works in O(n log n) of both lineages; the lists may come from a peer and hold anything.
pub fn compare(sender: &Lineage, receiver: &Receiver<'_>, want: SnapshotId) -> Result<Relation, WantMissing> {
    let ours = History::of(sender);
    let &want_at = ours.at.get(&want).ok_or(WantMissing(want))?;
    let incoming = ours.ancestry(want_at);

    let Some(volume) = receiver.volume else {
        return Ok(into_new_volume(&ours, &incoming, want_at, receiver.elsewhere));
    };
    let theirs = History::of(receiver.lineage);
    let tip = receiver.lineage.tip().cloned();
    if volume.id != receiver.lands_in {
        let reason = UnrelatedReason::OtherVolumeId;
        return Ok(Relation::Unrelated { reason, receiver_volume: volume.id, receiver_tip: tip });
    }

    if let Some(&held_at) = theirs.at.get(&want) {
        let newer = theirs.changes_after(Some(held_at), &incoming);
        return Ok(if newer.is_empty() {
            Relation::UpToDate
        } else {
            Relation::Behind { newer, common: Some(theirs.list[held_at].clone()) }
        });
    }
    let common = theirs.list.iter().rposition(|held| incoming.held.contains_key(&held.snapshot.id));
    let changes = theirs.changes_after(common, &incoming);
    if changes.last().is_some_and(|newest| follows(newest, want, &ours, &theirs)) {
        return Ok(Relation::Behind { newer: changes, common: common.map(|at| theirs.list[at].clone()) });
    }
    let Some(common) = common.map(|at| &theirs.list[at]) else {
        if tip.is_some() {
            let reason = UnrelatedReason::NoCommonSnapshot;
            return Ok(Relation::Unrelated { reason, receiver_volume: volume.id, receiver_tip: tip });
        }
        return Ok(unless_dirty(receiver, None, ours.path(None, want_at)));
    };
    let base_at = incoming.held[&common.snapshot.id];
    let mut missing = ours.path(Some(base_at), want_at);
    if !changes.is_empty() {
        return Ok(Relation::Diverged { common: common.clone(), only_sender: missing, only_receiver: changes });
    }
    // What the receiver has on top and a merge took in, though the sender holds it no more: only what descends from it
    // follows, so that the receiver never goes back to a state without it.
    if let Some(newest) = theirs.list.iter().rfind(|held| incoming.contains(held.snapshot.id)) {
        let follows = |held: &HeldSnapshot| ours.ancestry(ours.at[&held.snapshot.id]).contains(newest.snapshot.id);
        if newest.snapshot.id != common.snapshot.id
            && let Some(first) = missing.iter().position(follows)
        {
            missing.drain(..first);
        }
    }
    let base = Base { snapshot: ours.list[base_at].clone(), on_receiver: common.key() };
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
fn into_new_volume(ours: &History<'_>, incoming: &Ancestry, want_at: usize, elsewhere: &[SnapshotKey]) -> Relation {
    let places = elsewhere.iter().filter_map(|key| {
        let &at = incoming.held.get(&key.snapshot)?;
        // The wanted snapshot itself is no base: the new volume needs a snapshot of its own.
        (at != want_at).then_some((at, ours.list[at].volume == key.volume, std::cmp::Reverse(*key)))
    });
    let base = places.max().map(|(at, _, key)| (at, key.0));
    Relation::FastForward {
        missing: ours.path(base.map(|(at, _)| at), want_at),
        base: base.map(|(at, on_receiver)| Base { snapshot: ours.list[at].clone(), on_receiver }),
    }
}

/// Tells whether one of the receiver's snapshots descends from the wanted one, by either side's knowledge.
fn follows(newest: &HeldSnapshot, want: SnapshotId, ours: &History<'_>, theirs: &History<'_>) -> bool {
    [theirs, ours]
        .iter()
        .any(|side| side.at.get(&newest.snapshot.id).is_some_and(|&at| side.ancestry(at).contains(want)))
}

/// A lineage with an index.
pub(crate) struct History<'a> {
    pub(crate) list: &'a [HeldSnapshot],
    pub(crate) at: BTreeMap<SnapshotId, usize>,
}

/// A snapshot and all its ancestors, as far as one side knows.
pub(crate) struct Ancestry {
    /// Those that the side holds, with their places in its list.
    pub(crate) held: BTreeMap<SnapshotId, usize>,
    /// Those that are only named as parents: pruned, or held elsewhere.
    named: BTreeSet<SnapshotId>,
}

impl Ancestry {
    fn contains(&self, id: SnapshotId) -> bool {
        self.held.contains_key(&id) || self.named.contains(&id)
    }
}

impl<'a> History<'a> {
    pub(crate) fn of(lineage: &'a Lineage) -> Self {
        let list = lineage.snapshots.as_slice();
        let at = list.iter().enumerate().map(|(at, held)| (held.snapshot.id, at)).collect();
        Self { list, at }
    }

    /// Returns the places of a snapshot's parents. All lie before it, so that no list makes a cycle.
    fn parents(&self, at: usize) -> Vec<usize> {
        let named = &self.list[at].snapshot.parents;
        let present = named.iter().filter_map(|id| self.at.get(id).copied()).filter(|&parent| parent < at);
        let present: Vec<usize> = present.collect();
        if present.is_empty() && !named.is_empty() && at > 0 { vec![at - 1] } else { present }
    }

    pub(crate) fn ancestry(&self, at: usize) -> Ancestry {
        let mut ancestry = Ancestry { held: BTreeMap::new(), named: BTreeSet::new() };
        let mut open = vec![at];
        while let Some(at) = open.pop() {
            let snapshot = &self.list[at].snapshot;
            if ancestry.held.insert(snapshot.id, at).is_none() {
                ancestry.named.extend(&snapshot.parents);
                open.extend(self.parents(at));
            }
        }
        ancestry
    }

    /// Returns the snapshots that lead from `base` (left out) to `to` (kept), along first parents where these lead
    /// there; without a base, along first parents from the very first one.
    fn path(&self, base: Option<usize>, to: usize) -> Vec<HeldSnapshot> {
        let mut leads = BTreeSet::from_iter(base);
        if let Some(base) = base {
            for at in base + 1..=to {
                if self.parents(at).iter().any(|parent| leads.contains(parent)) {
                    leads.insert(at);
                }
            }
        }
        let mut path = Vec::new();
        let mut next = Some(to);
        while let Some(at) = next.filter(|&at| Some(at) != base) {
            path.push(self.list[at].clone());
            next = self.parents(at).into_iter().find(|parent| base.is_none() || leads.contains(parent));
        }
        path.reverse();
        path
    }

    /// Returns this side's snapshots after `common` (after nothing: all) that hold changes the incoming history lacks.
    fn changes_after(&self, common: Option<usize>, incoming: &Ancestry) -> Vec<HeldSnapshot> {
        // Places of snapshots whose contents the incoming history has at one of its snapshots.
        let mut contained = BTreeSet::new();
        let start = common.map_or(0, |at| at + 1);
        let mut changes = Vec::new();
        for (at, held) in self.list.iter().enumerate() {
            let first_parent = held.snapshot.parents.first().and_then(|id| self.at.get(id));
            let repeats = held.unchanged && first_parent.is_some_and(|parent| contained.contains(parent));
            if incoming.contains(held.snapshot.id) || repeats {
                contained.insert(at);
            } else if at >= start {
                changes.push(held.clone());
            }
        }
        changes
    }
}
