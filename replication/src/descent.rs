//! Who descends from whom, by all that two sides know together.
//!
//! Owns the graph: snapshots that are held and ancestors that nobody holds any more, by their parents. Refuses to know what follows
//! from it. Neighbours: [`crate::divergence`] compares two sides, [`crate::merge`] looks for what they have in common.
//!
//! What is told may come from a peer and be anything, cycles and all: every walk meets an id once.

use std::collections::{BTreeMap, BTreeSet};

use flocker_storage::model::{HeldSnapshot, Lineage, SnapshotId};

/// Parents and children by id.
pub(crate) struct Descent<'a> {
    parents: BTreeMap<SnapshotId, &'a [SnapshotId]>,
    children: BTreeMap<SnapshotId, Vec<SnapshotId>>,
}

/// Returns what a lineage tells of descent.
pub(crate) fn told(lineage: &Lineage) -> impl Iterator<Item = (SnapshotId, &[SnapshotId])> {
    lineage.snapshots.iter().map(|held| (held.snapshot.id, held.snapshot.parents.as_slice()))
}

impl<'a> Descent<'a> {
    /// Takes in what is told. Of what is told twice of one snapshot the first counts.
    pub(crate) fn of(told: impl Iterator<Item = (SnapshotId, &'a [SnapshotId])>) -> Self {
        let mut parents = BTreeMap::new();
        for (id, of) in told {
            parents.entry(id).or_insert(of);
        }
        let mut children: BTreeMap<SnapshotId, Vec<SnapshotId>> = BTreeMap::new();
        for (id, of) in &parents {
            for parent in *of {
                children.entry(*parent).or_default().push(*id);
            }
        }
        Self { parents, children }
    }

    fn parents(&self, id: SnapshotId) -> &'a [SnapshotId] {
        self.parents.get(&id).copied().unwrap_or_default()
    }

    fn children(&self, id: SnapshotId) -> &[SnapshotId] {
        self.children.get(&id).map(Vec::as_slice).unwrap_or_default()
    }

    /// Returns all that descend from some, by way of nothing but what `enter` lets in.
    fn descending(
        &self,
        from: impl Iterator<Item = SnapshotId>,
        enter: impl Fn(SnapshotId) -> bool,
    ) -> BTreeSet<SnapshotId> {
        reach(from, |id| self.children(id).iter().copied().filter(|child| enter(*child)))
    }
}

/// One side's snapshots in the graph.
///
/// A lineage lists them oldest first. Where nothing is known of how a snapshot's parents lead to one that the side holds (they are
/// gone, and nobody remembers them), the one before it in the list stands for them.
pub(crate) struct Side<'a> {
    pub(crate) list: &'a [HeldSnapshot],
    pub(crate) at: BTreeMap<SnapshotId, usize>,
    descent: &'a Descent<'a>,
    /// Those for which the one before stands, by their places.
    orphaned: BTreeSet<usize>,
    /// What the side does not hold and that descends from what it holds.
    leading: BTreeSet<SnapshotId>,
}

impl<'a> Side<'a> {
    pub(crate) fn of(lineage: &'a Lineage, descent: &'a Descent<'a>) -> Self {
        let list = lineage.snapshots.as_slice();
        let at: BTreeMap<SnapshotId, usize> =
            list.iter().enumerate().map(|(at, held)| (held.snapshot.id, at)).collect();
        let is_held = |id: SnapshotId| at.contains_key(&id);
        let leading = descent.descending(at.keys().copied(), |id| !is_held(id));
        let unknown = descent.children.keys().copied().filter(|id| !descent.parents.contains_key(id));
        let unknown: BTreeSet<SnapshotId> = unknown.collect();
        let open_ended = descent.descending(unknown.iter().copied(), |id| !is_held(id));
        let is_orphaned = |place: &usize| {
            let parents = descent.parents(list[*place].snapshot.id);
            let leads = |id: &SnapshotId| match at.get(id) {
                Some(parent) => parent < place,
                None => leading.contains(id),
            };
            let is_open = |id: &SnapshotId| is_held(*id) || unknown.contains(id) || open_ended.contains(id);
            !parents.iter().any(leads) && parents.iter().any(is_open)
        };
        let orphaned = (1..list.len()).filter(is_orphaned).collect();
        Self { list, at, descent, orphaned, leading }
    }

    pub(crate) fn holds(&self, id: SnapshotId) -> bool {
        self.at.contains_key(&id)
    }

    /// Of two that the side holds the parent comes before the child, or is none.
    fn is_in_order(&self, parent: SnapshotId, child: SnapshotId) -> bool {
        match (self.at.get(&parent), self.at.get(&child)) {
            (Some(parent), Some(child)) => parent < child,
            _ => true,
        }
    }

    fn parents(&self, id: SnapshotId) -> impl Iterator<Item = SnapshotId> {
        let stands_in =
            self.at.get(&id).filter(|at| self.orphaned.contains(at)).map(|at| self.list[at - 1].snapshot.id);
        let named = self.descent.parents(id).iter().copied();
        named.filter(move |parent| self.is_in_order(*parent, id)).chain(stands_in)
    }

    fn children(&self, id: SnapshotId) -> impl Iterator<Item = SnapshotId> {
        let next = self.at.get(&id).map(|at| at + 1).filter(|at| self.orphaned.contains(at));
        let stood_in_for = next.map(|at| self.list[at].snapshot.id);
        let naming = self.descent.children(id).iter().copied();
        naming.filter(move |child| self.is_in_order(id, *child)).chain(stood_in_for)
    }

    /// Returns a snapshot and all its ancestors, held or not.
    pub(crate) fn ancestry(&self, id: SnapshotId) -> BTreeSet<SnapshotId> {
        let mut found = reach([id].into_iter(), |id| self.parents(id));
        found.insert(id);
        found
    }

    /// Returns a snapshot and all that descend from it.
    pub(crate) fn descendants(&self, id: SnapshotId) -> BTreeSet<SnapshotId> {
        let mut found = reach([id].into_iter(), |id| self.children(id));
        found.insert(id);
        found
    }

    /// Returns the snapshots held that lead from `base` (left out) to `to` (kept), along first parents where these lead there;
    /// without a base, along first parents from the very first one.
    pub(crate) fn path(&self, base: Option<SnapshotId>, to: SnapshotId) -> Vec<HeldSnapshot> {
        let descendants = base.map(|base| self.descendants(base));
        let leads = |id: &SnapshotId| match &descendants {
            Some(descendants) => descendants.contains(id),
            None => self.holds(*id) || self.leading.contains(id),
        };
        let mut path = Vec::new();
        let mut met = BTreeSet::new();
        let mut next = Some(to);
        while let Some(id) = next.filter(|id| Some(*id) != base && met.insert(*id)) {
            path.extend(self.at.get(&id).map(|&at| self.list[at].clone()));
            next = self.parents(id).find(leads);
        }
        path.reverse();
        path
    }
}

/// Returns all that some lead to in one step or more.
fn reach<I: Iterator<Item = SnapshotId>>(
    from: impl Iterator<Item = SnapshotId>,
    steps: impl Fn(SnapshotId) -> I,
) -> BTreeSet<SnapshotId> {
    let mut open: Vec<SnapshotId> = from.collect();
    let mut found = BTreeSet::new();
    while let Some(id) = open.pop() {
        open.extend(steps(id).filter(|next| found.insert(*next)));
    }
    found
}
