//! The two passes over the rows: [`Survey`] finds what had to be known of the whole, [`Decider`] says what the result
//! holds.
//!
//! Both keep the directories on the way from the root and evaluate each row by itself ([`super::facets`]). A directory
//! that one side deleted is in the result when something beneath it is, which only the end of it shows: the survey
//! notes those that are. Names of inodes that have several are gathered and decided at the end ([`super::links`]).

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use flocker_storage::tree::{entry::EntryKind, path::TreePath};

use super::{
    CONFLICTS_LIMIT, Conflict, ConflictKind, Counts, KeptBeside, Labels, Outcome, PathText, Resolution, Resolve, Row,
    Side, Version, beside,
    facets::{Doubt, Evaluation, Inside, alike, describe, evaluate},
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
    doubt: Option<Doubt>,
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
    pending: BTreeMap<TreePath, Doubt>,
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
        let is_directory =
            |version: Option<&Version>| version.is_some_and(|version| version.kind == EntryKind::Directory);
        let directory = is_directory(row.ours) || is_directory(row.theirs);
        let conflict = conflict.map(|draft| {
            let aside = draft.kept_beside(row.path);
            (draft.into_conflict(row), aside)
        });
        let mut dropped_by = dropped_by.filter(|_| beneath == Some(Inside::Dropped));
        if [row.base, row.ours, row.theirs].into_iter().flatten().any(|version| version.group.is_some()) {
            self.pend();
            let by_structure = matches!(inside, Inside::Dropped | Inside::Whole(_))
                || conflict.as_ref().is_some_and(|(conflict, _)| conflict.kinds == [ConflictKind::DeletedDirectory]);
            let is_fixed = directory || is_directory(row.base) || by_structure;
            if is_fixed && outcome != Outcome::Gone {
                self.need();
            }
            let name = Name {
                base: row.base.cloned(),
                ours: row.ours.cloned(),
                theirs: row.theirs.cloned(),
                outcome: outcome.clone(),
                is_fixed,
                conflict,
            };
            self.names.insert(row.path.clone(), name);
        } else {
            if outcome != Outcome::Gone {
                self.need();
            }
            if let Some(conflict) = conflict {
                if directory && beneath == Some(Inside::Dropped) {
                    dropped_by = Some(self.conflicts.len());
                }
                self.conflicts.push(conflict);
            }
        }
        if self.conflicts.len() > CONFLICTS_LIMIT {
            return Err(TooManyConflicts);
        }
        if directory {
            self.enter(row.path, beneath.unwrap_or(Inside::Merged), if_needed, dropped_by);
        }
        Ok(())
    }

    /// Ends the survey. `is_taken` tells whether any of the trees has something at a path.
    pub fn finish(
        mut self,
        labels: &Labels,
        mut is_taken: impl FnMut(&TreePath) -> bool,
    ) -> Result<Plan, TooManyConflicts> {
        while let Some(level) = self.levels.pop() {
            self.close(level);
        }
        let mut resolved = links::resolve(std::mem::take(&mut self.names), self.resolve);
        self.conflicts.append(&mut resolved.conflicts);
        for (path, outcome) in &resolved.outcomes {
            if *outcome == Outcome::Gone {
                continue;
            }
            let mut parent = path.parent();
            while let Some(directory) = parent {
                if let Some(doubt) = self.pending.remove(&directory) {
                    self.keep(directory.clone(), doubt);
                }
                parent = directory.parent();
            }
        }
        links::regroup(&mut resolved.outcomes, &self.kept);
        if self.conflicts.len() > CONFLICTS_LIMIT {
            return Err(TooManyConflicts);
        }
        self.conflicts.sort_by(|(a, _), (b, _)| (&a.path, &a.kinds).cmp(&(&b.path, &b.kinds)));
        let mut copies: BTreeMap<TreePath, KeptBeside> = BTreeMap::new();
        let mut conflicts = Vec::with_capacity(self.conflicts.len());
        for (mut conflict, aside) in self.conflicts {
            if let Some(Aside { from, source, version }) = aside {
                let path = beside(&source, labels.of(from), |path| copies.contains_key(path) || is_taken(path));
                conflict.done = Resolution::Both(PathText::of(&path));
                copies.insert(path.clone(), KeptBeside { path, from, source, version });
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

    fn count(&mut self, row: &Row<'_>, inside: Inside, in_conflict: bool) {
        if in_conflict || matches!(inside, Inside::Whole(_) | Inside::Dropped) {
            return;
        }
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

    fn enter(&mut self, path: &TreePath, inside: Inside, doubt: Option<Doubt>, dropped_by: Option<usize>) {
        let needed = doubt.as_ref().is_some_and(|doubt| doubt.needed);
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
        let Some(doubt) = doubt else { return };
        if needed {
            self.need();
            self.keep(path, doubt);
        } else if pending {
            self.pending.insert(path, doubt);
        }
    }

    /// A directory that one side deleted is in the result after all. What that side put in its place is in conflict.
    fn keep(&mut self, path: TreePath, doubt: Doubt) {
        if let Some(replaced) = doubt.replaced {
            let winner = doubt.directory.body;
            let (directory, other) = ("directory".to_owned(), describe(&replaced, &[]));
            let (ours, theirs, done) = match winner {
                Side::Ours => (directory, other, Resolution::Ours),
                Side::Theirs => (other, directory, Resolution::Theirs),
            };
            let kinds = vec![ConflictKind::Type];
            let conflict = Conflict { path: path.clone(), kinds, ours, theirs, done, beneath: 0, names: Vec::new() };
            let aside = Aside { from: winner.other(), source: path.clone(), version: replaced };
            self.conflicts.push((conflict, self.resolve.winner().is_none().then_some(aside)));
        }
        self.kept.insert(path);
    }
}

/// What a merge comes to.
#[derive(Debug, Clone)]
pub struct Plan {
    resolve: Resolve,
    /// Directories that one side deleted and that are in the result.
    kept: BTreeSet<TreePath>,
    names: BTreeMap<TreePath, Outcome>,
    copies: Vec<KeptBeside>,
    conflicts: Vec<Conflict>,
    counts: Counts,
}

impl Plan {
    /// Returns all conflicts, in walk order.
    pub fn conflicts(&self) -> &[Conflict] {
        &self.conflicts
    }

    /// Returns the entries of the result that lie at paths of no row, in walk order.
    pub fn copies(&self) -> &[KeptBeside] {
        &self.copies
    }

    /// Returns how many paths went which way.
    pub fn counts(&self) -> Counts {
        self.counts
    }
}

/// The second pass: the same rows in the same order.
#[derive(Debug)]
pub struct Decider {
    plan: Arc<Plan>,
    levels: Vec<(TreePath, Inside)>,
}

impl Decider {
    /// Starts the second pass.
    pub fn new(plan: Arc<Plan>) -> Self {
        Self { plan, levels: Vec::new() }
    }

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
        let is_directory =
            |version: Option<&Version>| version.is_some_and(|version| version.kind == EntryKind::Directory);
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
