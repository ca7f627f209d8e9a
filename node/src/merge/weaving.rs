//! Three trees on disk as the rows that a merge is decided by, and its result as a delta. Everything here blocks.
//!
//! Owns the translation between what a [`Weave`] shows and what [`flocker_replication::merge`] decides. Refuses to know
//! volumes. Files are read only where both sides may have changed them, or where nothing else tells that they did not.

use std::sync::Arc;

use flocker_replication::merge::{
    Decider, Labels, Meta, Outcome, Plan, Resolve, Row, Side, Survey, Taken, TooManyConflicts, Version,
};
use flocker_storage::{
    error::{Error, ErrorKind, Result},
    tree::{
        compose::{Composed, ComposedMetadata, Moved, compose},
        entry::{Entry, EntryKind},
        weave::{StrandIndex, TreeView, Weave},
        write::DeltaWriter,
    },
};

const BASE: StrandIndex = 0;
const OURS: StrandIndex = 1;
const THEIRS: StrandIndex = 2;

/// The three trees of a merge.
pub(super) struct Trees {
    pub(super) base: TreeView,
    pub(super) ours: TreeView,
    pub(super) theirs: TreeView,
}

impl Trees {
    fn weave(self) -> Weave {
        Weave::new([self.base, self.ours, self.theirs])
    }
}

/// Finds all conflicts, and what else must be known before anything is made.
pub(super) fn survey(trees: Trees, resolve: Resolve, labels: &Labels) -> Result<Plan> {
    let mut weave = trees.weave();
    let mut survey = Survey::new(resolve);
    while weave.advance()? {
        match look(&mut weave)? {
            Seen::Unchanged(kind) => survey.take_unchanged(weave.path(), &kind),
            Seen::Versions(versions) => survey.take(&versions.row(&weave)).map_err(too_many)?,
        }
    }
    survey.finish(labels, |path| weave.is_taken(path)).map_err(too_many)
}

fn too_many(error: TooManyConflicts) -> Error {
    Error::new("merge", "trees", ErrorKind::Unsupported(error.to_string()))
}

/// Writes what turns ours into the result. `ours_again` is another view of ours, which the delta builds on.
pub(super) fn write(trees: Trees, ours_again: TreeView, plan: Arc<Plan>) -> Result<DeltaWriter> {
    let moved = plan.copies().iter().map(|copy| {
        let from = strand(copy.from);
        let (path, source, kind) = (copy.path.clone(), copy.source.clone(), copy.version.kind.clone());
        Moved { path, from, source, kind, metadata: metadata(&copy.version.meta) }
    });
    let moved = moved.collect();
    let mut decider = Decider::new(plan);
    let decide = move |weave: &mut Weave| {
        let (outcome, versions) = match look(weave)? {
            Seen::Unchanged(kind) => {
                decider.pass_unchanged(weave.path(), &kind);
                return Ok(Some(Composed { body: OURS, metadata: None, group: None }));
            }
            Seen::Versions(versions) => (decider.decide(&versions.row(weave)), versions),
        };
        let Outcome::Keep(Taken { body, meta, group }) = outcome else { return Ok(None) };
        let is_own = versions.of(body).is_some_and(|version| version.meta == meta);
        Ok(Some(Composed {
            body: strand(body),
            metadata: (!is_own).then(|| metadata(&meta)),
            group: group.map(|group| (group.first, group.names)),
        }))
    };
    compose(ours_again, trees.weave(), Box::new(decide), moved)
}

fn strand(side: Side) -> StrandIndex {
    match side {
        Side::Ours => OURS,
        Side::Theirs => THEIRS,
    }
}

fn metadata(meta: &Meta) -> ComposedMetadata {
    let Meta { mode, owner: (uid, gid), mtime, xattrs } = meta.clone();
    ComposedMetadata { mode, uid, gid, mtime, xattrs }
}

/// What lies at the path at hand.
enum Seen {
    /// The same in all three, with one name.
    Unchanged(EntryKind),
    Versions(Box<Versions>),
}

struct Versions([Option<Version>; 3]);

impl Versions {
    fn row<'a>(&'a self, weave: &'a Weave) -> Row<'a> {
        let [base, ours, theirs] = &self.0;
        Row { path: weave.path(), base: base.as_ref(), ours: ours.as_ref(), theirs: theirs.as_ref() }
    }

    fn of(&self, side: Side) -> Option<&Version> {
        self.0[strand(side)].as_ref()
    }
}

fn look(weave: &mut Weave) -> Result<Seen> {
    let has_one_name = [BASE, OURS, THEIRS].iter().all(|of| weave.group(*of).is_none());
    if has_one_name
        && weave.is_same(BASE, OURS)
        && weave.is_same(BASE, THEIRS)
        && let Some(kind) = weave.kind(OURS)
    {
        return Ok(Seen::Unchanged(kind.clone()));
    }
    for of in [BASE, OURS, THEIRS] {
        weave.load(of)?;
    }
    let [base, ours, theirs] = contents(weave)?;
    Ok(Seen::Versions(Box::new(Versions([
        version(weave, BASE, base),
        version(weave, OURS, ours),
        version(weave, THEIRS, theirs),
    ]))))
}

/// Numbers the contents of the files at hand: the same number for the same bytes.
fn contents(weave: &mut Weave) -> Result<[u64; 3]> {
    let is_file = |weave: &Weave, of| matches!(weave.kind(of), Some(EntryKind::File { .. }));
    let (mut base, mut theirs) = (0, 0);
    let ours = u64::from(is_file(weave, OURS));
    if is_file(weave, BASE) {
        let same = ours > 0 && weave.same_contents(BASE, OURS)?;
        base = if same { ours } else { 2 };
    }
    if is_file(weave, THEIRS) {
        // What the inodes say comes first: a file that only ours changed is not read.
        theirs = if base > 0 && weave.is_same(BASE, THEIRS) {
            base
        } else if ours > 0 && weave.same_contents(OURS, THEIRS)? {
            ours
        } else if base == 2 && weave.same_contents(BASE, THEIRS)? {
            base
        } else {
            3
        };
    }
    Ok([base, ours, theirs])
}

fn version(weave: &Weave, of: StrandIndex, content: u64) -> Option<Version> {
    let Entry { mode, uid, gid, mtime, xattrs, .. } = weave.entry(of)?.clone();
    let meta = Meta { mode, owner: (uid, gid), mtime, xattrs };
    Some(Version { kind: weave.kind(of)?.clone(), content, meta, group: weave.group(of).cloned() })
}
