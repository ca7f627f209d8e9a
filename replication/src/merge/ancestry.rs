//! Which snapshot two histories went apart at, and histories that merges brought in.
//!
//! Works on lineages as the drivers list them; parents by id. Neighbours: [`crate::descent`], and [`crate::divergence`],
//! which compares them.

use std::collections::{BTreeMap, BTreeSet};

use flocker_storage::model::{HeldSnapshot, Lineage, SnapshotId};

use crate::{
    descent::{Descent, Side, told},
    message::LINEAGE_LIMIT,
};

/// Where two histories went apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommonAncestor {
    /// The newest snapshot that both descend from, as the first of the two holds it.
    pub snapshot: HeldSnapshot,
    /// Others that are as new, where histories were merged crosswise. Changes that only one of them has look like
    /// changes of both sides, which is seldom a conflict and never a loss.
    pub further: Vec<HeldSnapshot>,
}

/// Finds where the tips of two lineages went apart. The same whichever is first, but for who holds it.
pub fn common_ancestor(ours: &Lineage, theirs: &Lineage) -> Option<CommonAncestor> {
    let (our_descent, their_descent) = (Descent::of(told(ours)), Descent::of(told(theirs)));
    let (our_tip, their_tip) = (ours.tip()?.snapshot.id, theirs.tip()?.snapshot.id);
    let (ours, theirs) = (Side::of(ours, &our_descent), Side::of(theirs, &their_descent));
    let (mine, other) = (ours.ancestry(our_tip), theirs.ancestry(their_tip));
    let mut covered = BTreeSet::new();
    let mut newest: Vec<&HeldSnapshot> = Vec::new();
    // Backwards no snapshot comes before one that descends from it.
    for held in ours.list.iter().rev() {
        let id = held.snapshot.id;
        if mine.contains(&id) && other.contains(&id) && theirs.holds(id) && !covered.contains(&id) {
            covered.extend(ours.ancestry(id));
            newest.push(held);
        }
    }
    let descends = |from: SnapshotId, to: SnapshotId| {
        [&ours, &theirs].iter().any(|side| side.holds(from) && side.holds(to) && side.ancestry(to).contains(&from))
    };
    let ids: Vec<SnapshotId> = newest.iter().map(|held| held.snapshot.id).collect();
    newest.retain(|held| {
        let id = held.snapshot.id;
        !ids.iter().any(|&later| later != id && descends(id, later))
    });
    newest.sort_by_key(|held| held.snapshot.id);
    let mut found = newest.into_iter().rev().cloned();
    Some(CommonAncestor { snapshot: found.next()?, further: found.collect() })
}

/// Adds to a lineage the snapshots that merges in it descend from and that lie in other volumes, each before the first
/// one that descends from it: so a receiver that has them gets the merge as a step on top. `elsewhere` lists all that other
/// volumes hold, where it is asked for. A lineage that would become longer than a message takes stays as it is.
pub fn with_merged(lineage: Lineage, elsewhere: impl FnOnce() -> Vec<HeldSnapshot>) -> Lineage {
    let own: BTreeSet<SnapshotId> = lineage.snapshots.iter().map(|held| held.snapshot.id).collect();
    if lineage.snapshots.iter().all(|held| held.snapshot.parents.iter().skip(1).all(|id| own.contains(id))) {
        return lineage;
    }
    let elsewhere = elsewhere();
    let mut others: BTreeMap<SnapshotId, &HeldSnapshot> = BTreeMap::new();
    for held in elsewhere.iter().filter(|held| !own.contains(&held.snapshot.id)) {
        others.entry(held.snapshot.id).or_insert(held);
    }
    let mut snapshots = Vec::with_capacity(lineage.snapshots.len());
    let mut added = BTreeSet::new();
    for held in &lineage.snapshots {
        if held.snapshot.parents.len() > 1 {
            for parent in &held.snapshot.parents {
                add(*parent, &others, &mut added, &mut snapshots);
            }
        }
        snapshots.push(held.clone());
    }
    if snapshots.len() > LINEAGE_LIMIT { lineage } else { Lineage { snapshots } }
}

/// Adds a snapshot behind all its ancestors.
fn add(
    id: SnapshotId,
    others: &BTreeMap<SnapshotId, &HeldSnapshot>,
    added: &mut BTreeSet<SnapshotId>,
    list: &mut Vec<HeldSnapshot>,
) {
    let mut open = vec![(id, false)];
    while let Some((id, after)) = open.pop() {
        let Some(held) = others.get(&id) else { continue };
        if after {
            list.push((*held).clone());
        } else if added.insert(id) {
            open.push((id, true));
            open.extend(held.snapshot.parents.iter().map(|parent| (*parent, false)));
        }
    }
}
