//! The two passes over the rows: [`Survey`] finds what had to be known of the whole, [`Decider`] says what the result
//! holds.
//!
//! Both keep the directories on the way from the root and evaluate each row by itself ([`super::facets`]). A directory
//! that one side deleted is in the result when something beneath it is, which only the end of it shows: the survey
//! notes those that are. Names of inodes that have several are gathered and decided at the end ([`super::links`]).

use std::collections::{BTreeMap, BTreeSet};

use flocker_storage::tree::{entry::EntryKind, path::TreePath};

use super::{
    CONFLICTS_LIMIT, Conflict, ConflictKind, Copy, Counts, Labels, Outcome, PathText, Resolution, Resolve, Row, Side,
    Taken, Version, beside,
    facets::{Doubt, Draft, Evaluation, Inside, evaluate},
    links::{self, Name},
};

/// There are more than [`CONFLICTS_LIMIT`] conflicts. Nothing was decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("more than {CONFLICTS_LIMIT} paths are in conflict")]
pub struct TooManyConflicts;

/// A version to be kept beside its path, before its place has a name.
#[derive(Debug, Clone)]
pub(super) struct Aside {
    pub(super) from: Side,
    pub(super) source: TreePath,
    pub(super) version: Version,
}

/// A directory on the way to the row at hand.
#[derive(Debug)]
struct Level {
    path: TreePath,
    inside: Inside,
    /// Something in it is in the result.
    needed: bool,
    /// Names in it are not decided yet.
    pending: bool,
    doubt: Option<(Doubt, Draft)>,
    /// The conflict that dropped it: entries beneath are counted there.
    dropped_by: Option<usize>,
}

/// The first pass: takes rows in walk order.
#[derive(Debug)]
pub struct Survey {
    resolve: Resolve,
    levels: Vec<Level>,
    kept: BTreeSet<TreePath>,
    /// Directories that are in the result if one of their names is.
    pending: BTreeMap<TreePath, Option<Draft>>,
    names: BTreeMap<TreePath, Name>,
    conflicts: Vec<(Conflict, Option<Aside>)>,
    counts: Counts,
}

impl Survey {
    /// Starts a survey.
    pub fn new(resolve: Resolve) -> Self {
        Self {
            resolve,
            levels: Vec::new(),
            kept: BTreeSet::new(),
            pending: BTreeMap::new(),
            names: BTreeMap::new(),
            conflicts: Vec::new(),
            counts: Counts::default(),
        }
    }

    /// Takes in a path that is the same in all three trees and has no other names.
    pub fn take_unchanged(&mut self, path: &TreePath, kind: &EntryKind) {
        self.leave(path);
        self.counts.unchanged += 1;
        self.need();
        if *kind == EntryKind::Directory {
            self.enter(path, Inside::Merged, None, None);
        }
    }

    /// Takes in the next row.
    pub fn take(&mut self, row: &Row<'_>) -> Result<(), TooManyConflicts> {
        self.leave(row.path);
        let (inside, dropped_by) = match self.levels.last() {
            Some(level) => (level.inside, level.dropped_by),
            None => (Inside::Merged, None),
        };
        let Evaluation { outcome, if_needed, conflict, beneath } = evaluate(row, self.resolve, inside);
        self.count(row, inside, conflict.is_some());
        if let Some(conflict) = dropped_by.and_then(|at| self.conflicts.get_mut(at)) {
            conflict.0.beneath += u64::from(row.ours.is_some() || row.theirs.is_some());
        }
        let is_directory = |version: Option<&Version>| version.is_some_and(|version| version.kind == EntryKind::Directory);
        let directory = is_directory(row.ours) || is_directory(row.theirs);
        let conflict = conflict.map(|draft| self.name_conflict(row, draft));
        let mut dropped_by = dropped_by.filter(|_| beneath == Some(Inside::Dropped));
        if [row.base, row.ours, row.theirs].into_iter().flatten().any(|version| version.group.is_some()) {
            self.pend();
            let by_structure = matches!(inside, Inside::Dropped | Inside::Whole(_))
                || conflict.as_ref().is_some_and(|(conflict, _)| conflict.kinds == [ConflictKind::DeletedDirectory]);
            let name = Name {
                base: row.base.cloned(),
                ours: row.ours.cloned(),
                theirs: row.theirs.cloned(),
                outcome: outcome.clone(),
                is_fixed: directory || is_directory(row.base) || by_structure,
                conflict,
            };
            self.names.insert(row.path.clone(), name);
        } else if let Some(conflict) = conflict {
            if directory && beneath == Some(Inside::Dropped) {
                dropped_by = Some(self.conflicts.len());
            }
            self.conflicts.push(conflict);
        }
        if self.conflicts.len() > CONFLICTS_LIMIT {
            return Err(TooManyConflicts);
        }
        // What takes a doubtful directory's place needs the directory it lies in.
        if outcome != Outcome::Gone {
            self.need();
        }
        if directory {
            let doubt = if_needed.map(|doubt| {
                let draft = replacement(row, &doubt, self.resolve);
                (doubt, draft)
            });
            let inside = beneath.unwrap_or(Inside::Merged);
            self.enter(row.path, inside, doubt, dropped_by);
        }
        Ok(())
    }

    /// Ends the survey. `is_taken` tells whether any of the trees has something at a path.
    pub fn finish(mut self, labels: &Labels, mut is_taken: impl FnMut(&TreePath) -> bool) -> Result<Plan, TooManyConflicts> {
        while let Some(level) = self.levels.pop() {
            self.close(level);
        }
        let resolved = links::resolve(std::mem::take(&mut self.names), self.resolve);
        self.conflicts.extend(resolved.conflicts);
        for (path, outcome) in &resolved.outcomes {
            if *outcome == Outcome::Gone {
                continue;
            }
            let mut parent = path.parent();
            while let Some(directory) = parent {
                if let Some(draft) = self.pending.remove(&directory) {
                    self.keep(directory.clone(), draft);
                }
                parent = directory.parent();
            }
        }
        if self.conflicts.len() > CONFLICTS_LIMIT {
            return Err(TooManyConflicts);
        }
        self.conflicts.sort_by(|(a, _), (b, _)| (&a.path, &a.kinds).cmp(&(&b.path, &b.kinds)));
        let mut copies: BTreeMap<TreePath, Copy> = BTreeMap::new();
        let mut conflicts = Vec::with_capacity(self.conflicts.len());
        for (mut conflict, aside) in self.conflicts {
            if let Some(Aside { from, source, version }) = aside {
                let path = beside(&source, labels.of(from), |path| copies.contains_key(path) || is_taken(path));
                conflict.done = Resolution::Both(PathText::of(&path));
                copies.insert(path.clone(), Copy { path, from, source, version });
            }
            conflicts.push(conflict);
        }
        Ok(Plan {
            resolve: self.resolve,
            kept: self.kept,
            names: resolved.outcomes,
            copies: copies.into_values().collect(),
            conflicts,
            counts: self.counts,
        })
    }

    fn name_conflict(&self, row: &Row<'_>, mut draft: Draft) -> (Conflict, Option<Aside>) {
        let aside = draft.aside.take();
        let loser = aside_of(row, aside);
        (draft.into_conflict(row), loser)
    }

    fn count(&mut self, row: &Row<'_>, inside: Inside, in_conflict: bool) {
        if in_conflict || matches!(inside, Inside::Whole(_) | Inside::Dropped) {
            return;
        }
        let alike = super::facets::alike;
        let counter = match (alike(row.base, row.ours), alike(row.base, row.theirs)) {
            (true, true) => &mut self.counts.unchanged,
            (false, true) => &mut self.counts.ours,
            (true, false) => &mut self.counts.theirs,
            (false, false) if alike(row.ours, row.theirs) => &mut self.counts.same,
            (false, false) => &mut self.counts.combined,
        };
        *counter += 1;
    }

    /// Notes that something in the directory on top is in the result.
    fn need(&mut self) {
        if let Some(level) = self.levels.last_mut() {
            level.needed = true;
        }
    }

    fn pend(&mut self) {
        if let Some(level) = self.levels.last_mut() {
            level.pending = true;
        }
    }

    fn enter(&mut self, path: &TreePath, inside: Inside, doubt: Option<(Doubt, Draft)>, dropped_by: Option<usize>) {
        let needed = doubt.as_ref().is_some_and(|(doubt, _)| doubt.needed);
        self.levels.push(Level { path: path.clone(), inside, needed, pending: false, doubt, dropped_by });
    }

    /// Leaves the directories that a path does not lie in.
    fn leave(&mut self, path: &TreePath) {
        while self.levels.last().is_some_and(|level| !path.is_within(&level.path)) {
            if let Some(level) = self.levels.pop() {
                self.close(level);
            }
        }
    }

    fn close(&mut self, level: Level) {
        let Level { path, needed, pending, doubt, .. } = level;
        if pending {
            self.pend();
        }
        let Some((doubt, draft)) = doubt else { return };
        let draft = doubt.replaced.is_some().then_some(draft);
        if needed {
            self.need();
            self.keep(path, draft);
        } else if pending {
            self.pending.insert(path, draft);
        }
    }

    /// A directory that one side deleted is in the result after all.
    fn keep(&mut self, path: TreePath, replaced: Option<Draft>) {
        if let Some(mut draft) = replaced {
            let aside = draft.aside.take().map(|version| Aside { from: draft.winner.other(), source: path.clone(), version });
            let words = |side| match (side == draft.winner, &aside) {
                (true, _) => "directory".to_owned(),
                (false, Some(aside)) => super::facets::describe(&aside.version, &[]),
                (false, None) => "something else".to_owned(),
            };
            let conflict = Conflict {
                path: path.clone(),
                kinds: vec![ConflictKind::Type],
                ours: words(Side::Ours),
                theirs: words(Side::Theirs),
                done: if draft.winner == Side::Ours { Resolution::Ours } else { Resolution::Theirs },
                beneath: 0,
                names: Vec::new(),
            };
            self.conflicts.push((conflict, aside.filter(|_| self.resolve.winner().is_none())));
        }
        self.kept.insert(path);
    }
}

/// The conflict there is when a directory survives in whose place the other side put something.
fn replacement(row: &Row<'_>, doubt: &Doubt, _resolve: Resolve) -> Draft {
    let _ = row;
    Draft { kinds: vec![ConflictKind::Type], winner: doubt.directory.body, aside: doubt.replaced.clone() }
}

/// Finds whose a version is that is to be kept beside.
fn aside_of(row: &Row<'_>, aside: Option<Version>) -> Option<Aside> {
    let version = aside?;
    let from = if row.theirs == Some(&version) { Side::Theirs } else { Side::Ours };
    Some(Aside { from, source: row.path.clone(), version })
}

/// What a merge comes to.
#[derive(Debug, Clone)]
pub struct Plan {
    resolve: Resolve,
    /// Directories that one side deleted and that are in the result.
    kept: BTreeSet<TreePath>,
    names: BTreeMap<TreePath, Outcome>,
    copies: Vec<Copy>,
    conflicts: Vec<Conflict>,
    counts: Counts,
}

impl Plan {
    /// Returns all conflicts, in walk order.
    pub fn conflicts(&self) -> &[Conflict] {
        &self.conflicts
    }

    /// Returns the entries of the result that lie at paths of no row, in walk order.
    pub fn copies(&self) -> &[Copy] {
        &self.copies
    }

    /// Returns how many paths went which way.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// Starts the second pass.
    pub fn decider(&self) -> Decider<'_> {
        Decider { plan: self, levels: Vec::new() }
    }
}

/// The second pass: the same rows in the same order.
#[derive(Debug)]
pub struct Decider<'a> {
    plan: &'a Plan,
    levels: Vec<(TreePath, Inside)>,
}

impl Decider<'_> {
    /// Says that a path is as it was in all three trees; it is in the result as ours has it.
    pub fn pass_unchanged(&mut self, path: &TreePath, kind: &EntryKind) {
        self.leave(path);
        if *kind == EntryKind::Directory {
            self.levels.push((path.clone(), Inside::Merged));
        }
    }

    /// Says what the result has at a row's path.
    pub fn decide(&mut self, row: &Row<'_>) -> Outcome {
        self.leave(row.path);
        let inside = self.levels.last().map_or(Inside::Merged, |(_, inside)| *inside);
        let Evaluation { outcome, if_needed, beneath, .. } = evaluate(row, self.plan.resolve, inside);
        let is_directory = |version: Option<&Version>| version.is_some_and(|version| version.kind == EntryKind::Directory);
        if is_directory(row.ours) || is_directory(row.theirs) {
            self.levels.push((row.path.clone(), beneath.unwrap_or(Inside::Merged)));
        }
        match if_needed {
            Some(Doubt { directory, .. }) if self.plan.kept.contains(row.path) => return Outcome::Keep(directory),
            _ => {}
        }
        self.plan.names.get(row.path).cloned().unwrap_or(outcome)
    }

    fn leave(&mut self, path: &TreePath) {
        while self.levels.last().is_some_and(|(level, _)| !path.is_within(level)) {
            self.levels.pop();
        }
    }
}

/// Returns a side's entry as it is.
impl From<(&Version, Side)> for Taken {
    fn from((version, side): (&Version, Side)) -> Self {
        version.taken(side)
    }
}
