//! One row by itself: property by property, and what a directory in it means for the rows beneath.
//!
//! Owns the table of cases. Refuses to know hard links ([`super::links`]) and what lies beneath a directory
//! ([`super::survey`], which tells by [`Inside`]).

use flocker_storage::tree::{
    entry::{EntryKind, Time, Xattrs},
    path::TreePath,
};

use super::{Conflict, ConflictKind, Meta, Outcome, Resolution, Resolve, Row, Side, Taken, Version, survey::Aside};

/// What the directory a row lies in says about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Inside {
    /// It is in the result.
    Merged,
    /// One side deleted it: it is in the result when something in it is.
    Doubtful {
        /// Who deleted it.
        deleted_by: Side,
    },
    /// It is this side's whole, after a conflict.
    Whole(Side),
    /// It is not in the result, after a conflict.
    Dropped,
}

/// What a row by itself comes to.
#[derive(Debug)]
pub(super) struct Evaluation {
    /// In the result. Of a directory that is doubtful: when nothing in it survives.
    pub(super) outcome: Outcome,
    /// Instead, when something in it survives.
    pub(super) if_needed: Option<Doubt>,
    /// What is in conflict here.
    pub(super) conflict: Option<Draft>,
    /// For the rows beneath, where the path is a directory on a side.
    pub(super) beneath: Option<Inside>,
}

/// A directory that one side deleted.
#[derive(Debug, Clone)]
pub(super) struct Doubt {
    /// It, as the other side has it.
    pub(super) directory: Taken,
    /// What the deleting side has in its place, where it does: that is in conflict when the directory survives.
    pub(super) replaced: Option<Version>,
    /// The directory survives whatever lies in it.
    pub(super) needed: bool,
}

/// A conflict before it has its name.
#[derive(Debug, Clone)]
pub(super) struct Draft {
    pub(super) kinds: Vec<ConflictKind>,
    /// Who is in the result at the path.
    pub(super) winner: Side,
    /// The other side's version is to be kept beside.
    pub(super) aside: Option<Version>,
}

impl Draft {
    /// Returns the losing side's version, where that is to be kept.
    pub(super) fn kept_beside(&self, path: &TreePath) -> Option<Aside> {
        let version = self.aside.clone()?;
        Some(Aside { from: self.winner.other(), source: path.clone(), version })
    }

    pub(super) fn into_conflict(self, row: &Row<'_>) -> Conflict {
        let words =
            |version: Option<&Version>| version.map_or_else(|| "nothing".to_owned(), |v| describe(v, &self.kinds));
        Conflict {
            path: row.path.clone(),
            ours: words(row.ours),
            theirs: words(row.theirs),
            done: match self.winner {
                Side::Ours => Resolution::Ours,
                Side::Theirs => Resolution::Theirs,
            },
            kinds: self.kinds,
            beneath: 0,
            names: Vec::new(),
        }
    }
}

/// How many bytes of an attribute's value a report shows.
const VALUE_SHOWN: usize = 4096;

/// Says what a version is, as far as a conflict is about it.
pub(super) fn describe(version: &Version, kinds: &[ConflictKind]) -> String {
    let mut text = match &version.kind {
        EntryKind::File { size } => format!("file of {size} bytes"),
        EntryKind::Symlink { target } => format!("symbolic link to {}", String::from_utf8_lossy(target)),
        EntryKind::CharDevice { major, minor } | EntryKind::BlockDevice { major, minor } => {
            format!("{} {major}:{minor}", version.kind.word())
        }
        other => other.word().to_owned(),
    };
    if kinds.contains(&ConflictKind::Mode) {
        text.push_str(&format!(", mode {:04o}", version.meta.mode));
    }
    if kinds.contains(&ConflictKind::Owner) {
        text.push_str(&format!(", owner {}:{}", version.meta.owner.0, version.meta.owner.1));
    }
    if kinds.contains(&ConflictKind::Xattrs) {
        for (name, value) in &version.meta.xattrs {
            let shown = value[..value.len().min(VALUE_SHOWN)].escape_ascii();
            text.push_str(&format!(", {}={shown}", String::from_utf8_lossy(name)));
        }
    }
    text
}

impl Version {
    /// Tells whether all but times and links agree.
    pub(super) fn is_like(&self, other: &Self) -> bool {
        (&self.kind, self.content) == (&other.kind, other.content)
            && (self.meta.mode, self.meta.owner) == (other.meta.mode, other.meta.owner)
            && self.meta.xattrs == other.meta.xattrs
    }

    fn is_directory(&self) -> bool {
        self.kind == EntryKind::Directory
    }

    /// Tells whether both are of one kind, whatever is in them.
    fn is_of_kind(&self, other: &Self) -> bool {
        std::mem::discriminant(&self.kind) == std::mem::discriminant(&other.kind)
    }

    pub(super) fn taken(&self, body: Side) -> Taken {
        Taken { body, meta: self.meta.clone(), group: None }
    }
}

/// Tells whether two optional versions agree in all but times and links.
pub(super) fn alike(a: Option<&Version>, b: Option<&Version>) -> bool {
    match (a, b) {
        (None, None) => true,
        (Some(a), Some(b)) => a.is_like(b),
        _ => false,
    }
}

/// Evaluates one row.
pub(super) fn evaluate(row: &Row<'_>, resolve: Resolve, inside: Inside) -> Evaluation {
    match inside {
        Inside::Dropped => return gone(Some(Inside::Dropped)),
        Inside::Whole(side) => {
            let outcome = row.of(side).map_or(Outcome::Gone, |version| Outcome::Keep(version.taken(side)));
            return Evaluation { outcome, if_needed: None, conflict: None, beneath: Some(Inside::Whole(side)) };
        }
        Inside::Merged | Inside::Doubtful { .. } => {}
    }
    match (row.ours, row.theirs) {
        (None, None) => gone(None),
        (Some(ours), None) => lone(Side::Ours, row.base, ours, resolve, inside),
        (None, Some(theirs)) => lone(Side::Theirs, row.base, theirs, resolve, inside),
        (Some(ours), Some(theirs)) => match (ours.is_directory(), theirs.is_directory()) {
            (true, true) => combine(row.base, ours, theirs, resolve),
            (true, false) => unlike(Side::Ours, row.base, ours, theirs, resolve),
            (false, true) => unlike(Side::Theirs, row.base, theirs, ours, resolve),
            (false, false) if ours.is_of_kind(theirs) => combine(row.base, ours, theirs, resolve),
            (false, false) => replaced(row.base, ours, theirs, resolve),
        },
    }
}

fn gone(beneath: Option<Inside>) -> Evaluation {
    Evaluation { outcome: Outcome::Gone, if_needed: None, conflict: None, beneath }
}

fn keep(taken: Taken) -> Evaluation {
    Evaluation { outcome: Outcome::Keep(taken), if_needed: None, conflict: None, beneath: Some(Inside::Merged) }
}

/// Only `side` has something here.
fn lone(side: Side, base: Option<&Version>, version: &Version, resolve: Resolve, inside: Inside) -> Evaluation {
    let conflict = |kind, winner| Some(Draft { kinds: vec![kind], winner, aside: None });
    let winner = if resolve.keeps(side) { side } else { side.other() };
    let Some(base) = base else {
        if inside != (Inside::Doubtful { deleted_by: side.other() }) {
            return keep(version.taken(side));
        }
        let conflict = conflict(ConflictKind::DeletedDirectory, winner);
        if winner == side {
            return Evaluation { conflict, ..keep(version.taken(side)) };
        }
        return Evaluation { conflict, ..gone(Some(Inside::Dropped)) };
    };
    let changed = !version.is_like(base);
    if version.is_directory() && base.is_directory() {
        let conflict = if changed { conflict(ConflictKind::DeleteEdit, winner) } else { None };
        let needed = changed && winner == side;
        let doubt = Doubt { directory: version.taken(side), replaced: None, needed };
        let beneath = Some(Inside::Doubtful { deleted_by: side.other() });
        return Evaluation { outcome: Outcome::Gone, if_needed: Some(doubt), conflict, beneath };
    }
    match (changed, winner == side) {
        (false, _) => gone(None),
        (true, true) => Evaluation {
            conflict: conflict(ConflictKind::DeleteEdit, winner),
            beneath: Some(Inside::Whole(side)),
            ..keep(version.taken(side))
        },
        (true, false) => {
            Evaluation { conflict: conflict(ConflictKind::DeleteEdit, winner), ..gone(Some(Inside::Dropped)) }
        }
    }
}

/// `side` has a directory, the other one something else.
fn unlike(side: Side, base: Option<&Version>, directory: &Version, other: &Version, resolve: Resolve) -> Evaluation {
    if base.is_some_and(|base| base.is_like(directory)) {
        // The other side put something in the directory's place, and with that deleted what was in it.
        let replaced = Some(other.clone());
        return Evaluation {
            outcome: Outcome::Keep(other.taken(side.other())),
            if_needed: Some(Doubt { directory: directory.taken(side), replaced, needed: false }),
            conflict: None,
            beneath: Some(Inside::Doubtful { deleted_by: side.other() }),
        };
    }
    if base.is_some_and(|base| base.is_like(other)) {
        return keep(directory.taken(side));
    }
    let kinds = vec![ConflictKind::Type];
    match resolve.winner() {
        Some(winner) if winner != side => Evaluation {
            outcome: Outcome::Keep(other.taken(winner)),
            if_needed: None,
            conflict: Some(Draft { kinds, winner, aside: None }),
            beneath: Some(Inside::Dropped),
        },
        winner => {
            let aside = winner.is_none().then(|| other.clone());
            Evaluation {
                conflict: Some(Draft { kinds, winner: side, aside }),
                beneath: Some(Inside::Whole(side)),
                ..keep(directory.taken(side))
            }
        }
    }
}

/// Two things of different kinds, neither a directory.
fn replaced(base: Option<&Version>, ours: &Version, theirs: &Version, resolve: Resolve) -> Evaluation {
    if base.is_some_and(|base| base.is_like(ours)) {
        return keep(theirs.taken(Side::Theirs));
    }
    if base.is_some_and(|base| base.is_like(theirs)) {
        return keep(ours.taken(Side::Ours));
    }
    let winner = resolve.winner().unwrap_or(Side::Ours);
    let (kept, lost) = match winner {
        Side::Ours => (ours, theirs),
        Side::Theirs => (theirs, ours),
    };
    let aside = resolve.winner().is_none().then(|| lost.clone());
    Evaluation { conflict: Some(Draft { kinds: vec![ConflictKind::Type], winner, aside }), ..keep(kept.taken(winner)) }
}

/// What a three-way comparison of one property comes to.
enum Three {
    Same,
    From(Side),
    Conflict,
}

fn three<T: PartialEq>(base: Option<&T>, ours: &T, theirs: &T) -> Three {
    if ours == theirs {
        Three::Same
    } else if base == Some(ours) {
        Three::From(Side::Theirs)
    } else if base == Some(theirs) {
        Three::From(Side::Ours)
    } else {
        Three::Conflict
    }
}

/// Two things of one kind: property by property.
fn combine(base: Option<&Version>, ours: &Version, theirs: &Version, resolve: Resolve) -> Evaluation {
    let base = base.filter(|base| base.is_of_kind(ours));
    let winner = resolve.winner().unwrap_or(Side::Ours);
    let mut kinds = Vec::new();
    let mut choose = |three: Three, kind: ConflictKind| match three {
        Three::Same => Side::Ours,
        Three::From(side) => side,
        Three::Conflict => {
            kinds.push(kind);
            winner
        }
    };
    let body = |version: &Version| (version.kind.clone(), version.content);
    let body = choose(three(base.map(body).as_ref(), &body(ours), &body(theirs)), ConflictKind::Content);
    let pick = |side| match side {
        Side::Ours => &ours.meta,
        Side::Theirs => &theirs.meta,
    };
    let old = base.map(|base| &base.meta);
    let mode = choose(three(old.map(|old| &old.mode), &ours.meta.mode, &theirs.meta.mode), ConflictKind::Mode);
    let owner = choose(three(old.map(|old| &old.owner), &ours.meta.owner, &theirs.meta.owner), ConflictKind::Owner);
    let (xattrs, clash) = combine_xattrs(old.map(|old| &old.xattrs), &ours.meta.xattrs, &theirs.meta.xattrs, winner);
    if clash {
        kinds.push(ConflictKind::Xattrs);
    }
    let mtime = combine_times(old.map(|old| old.mtime), ours.meta.mtime, theirs.meta.mtime);
    let meta = Meta { mode: pick(mode).mode, owner: pick(owner).owner, mtime, xattrs };
    let lost = match winner {
        Side::Ours => theirs,
        Side::Theirs => ours,
    };
    // Permissions and owners are named in full in the report; only what can be large is kept as a file.
    let large = kinds.iter().any(|kind| matches!(kind, ConflictKind::Content | ConflictKind::Xattrs));
    let aside = (resolve.winner().is_none() && large && !lost.is_directory()).then(|| lost.clone());
    let conflict = (!kinds.is_empty()).then_some(Draft { kinds, winner, aside });
    Evaluation { conflict, ..keep(Taken { body, meta, group: None }) }
}

fn combine_times(base: Option<Time>, ours: Time, theirs: Time) -> Time {
    match three(base.as_ref(), &ours, &theirs) {
        Three::Same | Three::From(Side::Ours) => ours,
        Three::From(Side::Theirs) => theirs,
        Three::Conflict => ours.max(theirs),
    }
}

/// Each attribute by itself. The flag says that one is in conflict.
fn combine_xattrs(base: Option<&Xattrs>, ours: &Xattrs, theirs: &Xattrs, winner: Side) -> (Xattrs, bool) {
    if ours == theirs {
        return (ours.clone(), false);
    }
    let find = |list: &Xattrs, name: &[u8]| list.iter().find(|(key, _)| key == name).map(|(_, value)| value.clone());
    let mut names: Vec<&Vec<u8>> = ours.iter().chain(theirs).map(|(name, _)| name).collect();
    names.sort();
    names.dedup();
    let mut clash = false;
    let mut merged = Vec::new();
    for name in names {
        // An attribute that is not there is a value like any other, in the base too, where there is a base.
        let old = base.map(|base| find(base, name)).or(Some(None));
        let (mine, other) = (find(ours, name), find(theirs, name));
        let value = match three(old.as_ref(), &mine, &other) {
            Three::Same | Three::From(Side::Ours) => mine,
            Three::From(Side::Theirs) => other,
            Three::Conflict => {
                clash = true;
                if winner == Side::Ours { mine } else { other }
            }
        };
        if let Some(value) = value {
            merged.push((name.clone(), value));
        }
    }
    (merged, clash)
}
