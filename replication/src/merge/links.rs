//! Names of inodes that have several: decided group by group, once all of them were met.
//!
//! Names that are names of one inode in any of the three trees belong to one component. A component that one side left
//! alone is the other side's whole; where both left the links alone, each name is decided as any other path; else all
//! of it is one conflict. Memory grows with such names only.

use std::collections::{BTreeMap, BTreeSet};

use flocker_storage::tree::{entry::EntryKind, path::TreePath};

use super::{
    Conflict, ConflictKind, Group, Outcome, Resolution, Resolve, Side, Version,
    facets::{alike, describe},
    survey::Aside,
};

/// One name.
#[derive(Debug, Clone)]
pub(super) struct Name {
    pub(super) base: Option<Version>,
    pub(super) ours: Option<Version>,
    pub(super) theirs: Option<Version>,
    /// What the row by itself comes to.
    pub(super) outcome: Outcome,
    /// The same, of a directory on a side or beneath a conflict: it stands whatever the component comes to.
    pub(super) is_fixed: bool,
    /// What the row by itself has in conflict.
    pub(super) conflict: Option<(Conflict, Option<Aside>)>,
}

impl Name {
    fn of(&self, side: Side) -> Option<&Version> {
        match side {
            Side::Ours => self.ours.as_ref(),
            Side::Theirs => self.theirs.as_ref(),
        }
    }

    fn versions(&self) -> [Option<&Version>; 3] {
        [self.base.as_ref(), self.ours.as_ref(), self.theirs.as_ref()]
    }
}

/// What the names come to.
#[derive(Debug, Default)]
pub(super) struct Resolved {
    pub(super) outcomes: BTreeMap<TreePath, Outcome>,
    pub(super) conflicts: Vec<(Conflict, Option<Aside>)>,
}

/// What a component comes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Whole(Side),
    EachByItself,
    Conflict,
}

/// Decides all names.
pub(super) fn resolve(names: BTreeMap<TreePath, Name>, resolve: Resolve) -> Resolved {
    let mut resolved = Resolved::default();
    for component in components(&names) {
        let members: Vec<(&TreePath, &Name)> = component.into_iter().map(|path| (path, &names[path])).collect();
        decide(&members, resolve, &mut resolved);
    }
    resolved
}

/// Sorts names into components. In walk order, as are the names in each.
fn components(names: &BTreeMap<TreePath, Name>) -> Vec<Vec<&TreePath>> {
    let paths: Vec<&TreePath> = names.keys().collect();
    let place: BTreeMap<&TreePath, usize> = paths.iter().enumerate().map(|(at, path)| (*path, at)).collect();
    let mut parent: Vec<usize> = (0..paths.len()).collect();
    fn root(parent: &mut [usize], mut at: usize) -> usize {
        while parent[at] != at {
            parent[at] = parent[parent[at]];
            at = parent[at];
        }
        at
    }
    for (at, path) in paths.iter().enumerate() {
        for first in names[*path].versions().into_iter().flatten().filter_map(|version| version.group.as_ref()) {
            let Some(&other) = place.get(first) else { continue };
            let (low, high) = (root(&mut parent, at), root(&mut parent, other));
            parent[low.max(high)] = low.min(high);
        }
    }
    let mut components: BTreeMap<usize, Vec<&TreePath>> = BTreeMap::new();
    for (at, path) in paths.iter().enumerate() {
        components.entry(root(&mut parent, at)).or_default().push(path);
    }
    components.into_values().collect()
}

type Pick = fn(&Name) -> Option<&Version>;

/// Tells whether two trees have the same names of the same inodes.
fn linked_alike(members: &[(&TreePath, &Name)], a: Pick, b: Pick) -> bool {
    members.iter().all(|(_, name)| a(name).is_some() == b(name).is_some() && group(a(name)) == group(b(name)))
}

fn judge(members: &[(&TreePath, &Name)]) -> Verdict {
    if members.len() == 1 {
        // Its other names are gone, or lie where no tree of these is.
        return Verdict::EachByItself;
    }
    let equal = |a: Pick, b: Pick| members.iter().all(|(_, name)| a(name) == b(name));
    let like =
        |a: Pick, b: Pick| members.iter().all(|(_, name)| alike(a(name), b(name)) && group(a(name)) == group(b(name)));
    let [base, ours, theirs]: [Pick; 3] =
        [|name| name.base.as_ref(), |name| name.ours.as_ref(), |name| name.theirs.as_ref()];
    if equal(base, theirs) || equal(ours, theirs) {
        Verdict::Whole(Side::Ours)
    } else if equal(base, ours) {
        Verdict::Whole(Side::Theirs)
    } else if like(ours, theirs) || (linked_alike(members, base, ours) && linked_alike(members, base, theirs)) {
        Verdict::EachByItself
    } else if like(base, theirs) {
        Verdict::Whole(Side::Ours)
    } else if like(base, ours) {
        Verdict::Whole(Side::Theirs)
    } else {
        Verdict::Conflict
    }
}

fn group(version: Option<&Version>) -> Option<&TreePath> {
    version.and_then(|version| version.group.as_ref())
}

/// An inode of the result: whose it is, and its first name there.
type Inode<'a> = (Side, &'a TreePath);

fn decide(members: &[(&TreePath, &Name)], resolve: Resolve, resolved: &mut Resolved) {
    let verdict = judge(members);
    let whole = match verdict {
        Verdict::Whole(side) => Some(side),
        Verdict::EachByItself => None,
        Verdict::Conflict => resolve.winner(),
    };
    let mut inodes: BTreeMap<Inode<'_>, Vec<&TreePath>> = BTreeMap::new();
    let mut outcomes: BTreeMap<&TreePath, Outcome> = BTreeMap::new();
    let mut asides: Vec<(&TreePath, &Name)> = Vec::new();
    for &(path, name) in members {
        let (outcome, inode) = if name.is_fixed {
            let inode = match &name.outcome {
                Outcome::Keep(taken) if whole.is_none_or(|side| side == taken.body) && verdict != Verdict::Conflict => {
                    name.of(taken.body).and_then(|version| version.group.as_ref()).map(|first| (taken.body, first))
                }
                _ => None,
            };
            (name.outcome.clone(), inode)
        } else if let Some(side) = whole {
            let outcome = name.of(side).map_or(Outcome::Gone, |version| Outcome::Keep(version.taken(side)));
            (outcome, group(name.of(side)).map(|first| (side, first)))
        } else if verdict == Verdict::EachByItself {
            (name.outcome.clone(), group(name.ours.as_ref()).map(|first| (Side::Ours, first)))
        } else {
            both(path, name, &mut asides)
        };
        if let (Some(inode), Outcome::Keep(_)) = (inode, &outcome) {
            inodes.entry(inode).or_default().push(path);
        }
        outcomes.insert(path, outcome);
    }
    for names in inodes.values().filter(|names| names.len() > 1) {
        // Times are decided name by name, and an inode has one.
        let times = names.iter().filter_map(|path| match outcomes.get(*path) {
            Some(Outcome::Keep(taken)) => Some(taken.meta.mtime),
            _ => None,
        });
        let latest = times.max();
        for path in names {
            if let Some(Outcome::Keep(taken)) = outcomes.get_mut(*path) {
                taken.meta.mtime = latest.unwrap_or(taken.meta.mtime);
                taken.group = Some(Group { first: names[0].clone(), names: names.len() as u32 });
            }
        }
    }
    tell(members, verdict, resolve, &asides, resolved);
    resolved.outcomes.extend(outcomes.into_iter().map(|(path, outcome)| (path.clone(), outcome)));
}

/// A name of a component that stays as ours has it, with what theirs has kept beside it.
fn both<'a>(
    path: &'a TreePath,
    name: &'a Name,
    asides: &mut Vec<(&'a TreePath, &'a Name)>,
) -> (Outcome, Option<Inode<'a>>) {
    match (&name.ours, &name.theirs) {
        (Some(ours), theirs) => {
            let is_new =
                theirs.as_ref().is_some_and(|theirs| !theirs.is_like(ours) && !alike(Some(theirs), name.base.as_ref()));
            if is_new {
                asides.push((path, name));
            }
            (Outcome::Keep(ours.taken(Side::Ours)), ours.group.as_ref().map(|first| (Side::Ours, first)))
        }
        (None, Some(theirs)) if !alike(Some(theirs), name.base.as_ref()) => {
            (Outcome::Keep(theirs.taken(Side::Theirs)), None)
        }
        _ => (Outcome::Gone, None),
    }
}

/// Names the conflicts of a component.
fn tell(
    members: &[(&TreePath, &Name)],
    verdict: Verdict,
    resolve: Resolve,
    asides: &[(&TreePath, &Name)],
    resolved: &mut Resolved,
) {
    for (path, name) in members {
        let Some(conflict) = &name.conflict else { continue };
        // Further names of one inode have the conflict of the first.
        let is_first = group(name.ours.as_ref()).is_none_or(|first| first == *path);
        if name.is_fixed || (verdict == Verdict::EachByItself && is_first) {
            let (mut conflict, aside) = conflict.clone();
            let inode = group(name.ours.as_ref());
            let others = members.iter().filter(|(_, other)| inode.is_some() && group(other.ours.as_ref()) == inode);
            conflict.names = others.map(|(path, _)| (*path).clone()).collect();
            resolved.conflicts.push((conflict, aside));
        }
    }
    if verdict != Verdict::Conflict {
        return;
    }
    let Some((path, name)) = members.iter().find(|(_, name)| !name.is_fixed).or(members.first()) else { return };
    let words = |version: Option<&Version>| version.map_or_else(|| "nothing".to_owned(), |v| describe(v, &[]));
    let winner = resolve.winner().unwrap_or(Side::Ours);
    let mut conflict = Conflict {
        path: (*path).clone(),
        kinds: vec![ConflictKind::Links],
        ours: words(name.ours.as_ref()),
        theirs: words(name.theirs.as_ref()),
        done: if winner == Side::Ours { Resolution::Ours } else { Resolution::Theirs },
        beneath: 0,
        names: members.iter().map(|(path, _)| (*path).clone()).collect(),
    };
    // One file for each inode of theirs.
    let mut kept: Vec<&TreePath> = Vec::new();
    for (path, name) in asides {
        let Some(theirs) = name.theirs.as_ref().filter(|theirs| theirs.kind != EntryKind::Directory) else { continue };
        if let Some(first) = &theirs.group {
            if kept.contains(&first) {
                continue;
            }
            kept.push(first);
        }
        let aside = Aside { from: Side::Theirs, source: (*path).clone(), version: theirs.clone() };
        conflict.path = (*path).clone();
        resolved.conflicts.push((conflict.clone(), Some(aside)));
    }
    if asides.is_empty() {
        resolved.conflicts.push((conflict, None));
    }
}

/// Takes names out of their groups at which a directory stays after all.
pub(super) fn regroup(outcomes: &mut BTreeMap<TreePath, Outcome>, kept: &BTreeSet<TreePath>) {
    let group_of = |outcome: &Outcome| match outcome {
        Outcome::Keep(taken) => taken.group.as_ref().map(|group| group.first.clone()),
        Outcome::Gone => None,
    };
    let lost: BTreeSet<TreePath> = kept.iter().filter_map(|path| outcomes.get(path).and_then(group_of)).collect();
    for first in lost {
        let members = outcomes
            .iter()
            .filter(|(path, outcome)| group_of(outcome).as_ref() == Some(&first) && !kept.contains(*path));
        let members: Vec<TreePath> = members.map(|(path, _)| path.clone()).collect();
        for path in &members {
            if let Some(Outcome::Keep(taken)) = outcomes.get_mut(path) {
                let group = Group { first: members[0].clone(), names: members.len() as u32 };
                taken.group = (members.len() > 1).then_some(group);
            }
        }
    }
}
