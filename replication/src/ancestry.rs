//! What is remembered of snapshots that are held no more: which ones they followed.
//!
//! Owns the shape in which such ancestors travel ([`Forgotten`]), which of them matter to a peer, and which of a peer's are
//! worth keeping. Refuses to know where they are kept (node) and what follows from them ([`crate::divergence`]).
//!
//! # Rules
//! - Nothing here says that anybody holds anything. What a side holds is its lineage, and a lineage's parents count before
//!   what is remembered; what a node knows by itself is never replaced by what a peer says.
//! - A peer that lies about descent gains what a lie about a snapshot's parents gains: a fast-forward in place of a refusal. A
//!   fast-forward destroys nothing: the receiver's snapshots stay, and a head with changes is not replaced.
//! - All of it is bounded by [`FORGOTTEN_LIMIT`]. What is beyond counts as unknown, which makes a divergence of what is none: the
//!   safe side.

use std::collections::{BTreeMap, BTreeSet};

use flocker_storage::model::{HeldSnapshot, Lineage, SnapshotId};
use serde::{Deserialize, Serialize};

use crate::message::{Offer, PARENTS_LIMIT, demand};

/// The most ancestors that one message carries, and that a node keeps of one volume: two weeks of a snapshot every five minutes,
/// and 64 KiB where each follows the next one.
pub const FORGOTTEN_LIMIT: usize = 4096;

/// A snapshot that is not held any more, or never was.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ancestor {
    /// Its id.
    pub id: SnapshotId,
    /// The snapshots it followed.
    pub parents: Vec<SnapshotId>,
}

/// All that a node remembers of a volume: parents by id.
pub type Memory = BTreeMap<SnapshotId, Vec<SnapshotId>>;

/// Ancestors as they travel: most of them follow one another, and then the next one's id is the parent.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Forgotten {
    runs: Vec<Run>,
}

/// Some that follow one another, newest first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Run {
    /// Each followed the next one. Never empty.
    ids: Vec<SnapshotId>,
    /// What the last one followed.
    parents: Vec<SnapshotId>,
}

impl FromIterator<Ancestor> for Forgotten {
    fn from_iter<I: IntoIterator<Item = Ancestor>>(ancestors: I) -> Self {
        let mut runs: Vec<Run> = Vec::new();
        for Ancestor { id, parents } in ancestors {
            match runs.last_mut() {
                Some(run) if run.parents == [id] => {
                    run.ids.push(id);
                    run.parents = parents;
                }
                _ => runs.push(Run { ids: vec![id], parents }),
            }
        }
        Self { runs }
    }
}

impl Forgotten {
    /// Returns each one with its parents.
    pub fn iter(&self) -> impl Iterator<Item = (SnapshotId, &[SnapshotId])> {
        self.runs.iter().flat_map(|run| {
            let parents = |at: usize| run.ids.get(at + 1..at + 2).unwrap_or(&run.parents);
            run.ids.iter().enumerate().map(move |(at, id)| (*id, parents(at)))
        })
    }

    /// Returns how many there are.
    pub fn len(&self) -> usize {
        self.runs.iter().map(|run| run.ids.len()).sum()
    }

    /// Tells whether there is none.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    pub(crate) fn check(&self) -> Result<(), String> {
        let count = self.len();
        demand(count <= FORGOTTEN_LIMIT, || format!("it names {count} ancestors, {FORGOTTEN_LIMIT} are allowed"))?;
        demand(self.runs.iter().all(|run| !run.ids.is_empty()), || "it has a run of no ancestors".to_owned())?;
        let mut seen = BTreeSet::new();
        for (id, parents) in self.iter() {
            demand(parents.len() <= PARENTS_LIMIT, || format!("ancestor {id} has {} parents", parents.len()))?;
            demand(!parents.contains(&id), || format!("ancestor {id} is its own parent"))?;
            demand(parents.len() < 2 || parents[0] != parents[1], || format!("ancestor {id} has a parent twice"))?;
            demand(seen.insert(id), || format!("it names ancestor {id} twice"))?;
        }
        Ok(())
    }
}

/// Returns what a sender says of the ancestors of its snapshots that it does not hold, those of newer snapshots first.
pub fn offered(lineage: &Lineage, memory: &Memory) -> Forgotten {
    let held = ids(lineage.snapshots.iter());
    let known = |id: SnapshotId| memory.get(&id).filter(|_| !held.contains(&id)).map(Vec::as_slice);
    behind(lineage.snapshots.iter(), known).take(FORGOTTEN_LIMIT).collect()
}

/// Returns what a receiver says: of the ancestors of its snapshots that it does not hold those that descend from what is offered
/// and that the sender does not know itself.
pub fn answered(lineage: &Lineage, memory: &Memory, offer: &Offer) -> Forgotten {
    if memory.is_empty() {
        return Forgotten::default();
    }
    let held = ids(lineage.snapshots.iter());
    let offered = facts(offer);
    let named: BTreeSet<SnapshotId> = offered.iter().flat_map(|(id, parents)| [&[*id], *parents].concat()).collect();
    let known = |id: SnapshotId| {
        let is_news = !held.contains(&id) && !offered.contains_key(&id);
        memory.get(&id).filter(|_| is_news).map(Vec::as_slice)
    };
    let found: Vec<Ancestor> = behind(lineage.snapshots.iter(), known).collect();
    // Backwards from what the sender names.
    let mut children: BTreeMap<SnapshotId, Vec<SnapshotId>> = BTreeMap::new();
    for ancestor in &found {
        for parent in &ancestor.parents {
            children.entry(*parent).or_default().push(ancestor.id);
        }
    }
    let mut open: Vec<SnapshotId> = named.iter().copied().collect();
    let mut leading: BTreeSet<SnapshotId> = named;
    while let Some(id) = open.pop() {
        for child in children.get(&id).into_iter().flatten() {
            if leading.insert(*child) {
                open.push(*child);
            }
        }
    }
    found.into_iter().filter(|ancestor| leading.contains(&ancestor.id)).take(FORGOTTEN_LIMIT).collect()
}

/// Returns what a receiver of these snapshots is to remember: their ancestors by the sender's word that are neither among them nor
/// held here.
pub fn learnt(offer: &Offer, here: &BTreeSet<SnapshotId>, arriving: &[HeldSnapshot]) -> Vec<Ancestor> {
    let offered = facts(offer);
    let mut held = ids(arriving.iter());
    held.extend(here);
    let known = |id: SnapshotId| offered.get(&id).copied().filter(|_| !held.contains(&id));
    behind(arriving.iter(), known).take(FORGOTTEN_LIMIT).collect()
}

/// All that an offer says of descent.
fn facts(offer: &Offer) -> BTreeMap<SnapshotId, &[SnapshotId]> {
    let mut facts: BTreeMap<SnapshotId, &[SnapshotId]> = offer.forgotten.iter().collect();
    let held = offer.lineage.snapshots.iter();
    facts.extend(held.map(|held| (held.snapshot.id, held.snapshot.parents.as_slice())));
    facts
}

fn ids<'a>(snapshots: impl Iterator<Item = &'a HeldSnapshot>) -> BTreeSet<SnapshotId> {
    snapshots.map(|held| held.snapshot.id).collect()
}

/// Walks from snapshots (oldest first) to the ancestors that `known` tells the parents of, each once: those of newer snapshots
/// first, and along first parents, so that they make long runs.
fn behind<'a>(
    snapshots: impl DoubleEndedIterator<Item = &'a HeldSnapshot>,
    known: impl Fn(SnapshotId) -> Option<&'a [SnapshotId]>,
) -> impl Iterator<Item = Ancestor> {
    let mut snapshots = snapshots.rev();
    let mut open: Vec<SnapshotId> = Vec::new();
    let mut seen = BTreeSet::new();
    std::iter::from_fn(move || {
        loop {
            let Some(id) = open.pop() else {
                open.extend(snapshots.next()?.snapshot.parents.iter().rev());
                continue;
            };
            let Some(parents) = known(id).filter(|_| seen.insert(id)) else { continue };
            open.extend(parents.iter().rev());
            return Some(Ancestor { id, parents: parents.to_vec() });
        }
    })
}
