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
    fn weave(self) -> Result<Weave> {
        let mut weave = Weave::new([self.base, self.ours, self.theirs]);
        weave.learn_groups()?;
        Ok(weave)
    }
}

/// Finds all conflicts, and what else must be known before anything is made.
pub(super) fn survey(trees: Trees, resolve: Resolve, labels: &Labels) -> Result<Plan> {
    let mut weave = trees.weave()?;
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
    compose(ours_again, trees.weave()?, Box::new(decide), moved)
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::{
        collections::{BTreeMap, BTreeSet},
        fs,
        os::unix::fs::{FileExt as _, PermissionsExt as _, symlink},
        path::{Path, PathBuf},
    };

    use flocker_replication::merge::Label;
    use flocker_storage::{
        model::SnapshotId,
        tree::{
            apply::{Applier, Sharing},
            copy::Copier,
            listing::listing,
            path::TreePath,
            root::Root,
            walk::{Links, Walk},
        },
    };
    use rand::{Rng as _, SeedableRng as _, rngs::StdRng};

    use super::*;

    const CASES: u64 = 150;

    fn view(path: &Path) -> TreeView {
        TreeView::still(Root::open(path).unwrap(), Links::ByInode)
    }

    fn trees(paths: &[PathBuf; 3]) -> Trees {
        Trees { base: view(&paths[0]), ours: view(&paths[1]), theirs: view(&paths[2]) }
    }

    fn copy(from: &Path, to: &Path) {
        fs::create_dir(to).unwrap();
        let source = Root::open(from).unwrap();
        let mut copier = Copier::new(Root::open(to).unwrap());
        for entry in Walk::new(source.try_clone().unwrap(), Links::ByInode) {
            copier.copy(&source, &entry.unwrap()).unwrap();
        }
        copier.finish().unwrap();
    }

    fn labels() -> Labels {
        let label = |name: &str| Label { host: name.parse().unwrap(), tip: SnapshotId::mint() };
        Labels { ours: label("host-a"), theirs: label("host-b") }
    }

    /// Changes something, as far as it can be done.
    fn edit(root: &Path, dice: &mut StdRng) {
        let pick = |dice: &mut StdRng| {
            let first = root.join(["a", "b", "c", "c-"][dice.random_range(0..4)]);
            if dice.random() { first } else { first.join(["a", "b"][dice.random_range(0..2)]) }
        };
        let path = pick(dice);
        let is_file = fs::symlink_metadata(&path).is_ok_and(|found| found.is_file());
        let _ = match dice.random_range(0..12) {
            0..=2 => fs::create_dir(&path),
            3..=5 if is_file || !path.exists() => {
                fs::write(&path, vec![dice.random_range(0..3); dice.random_range(1..3) * 5000])
            }
            6 if is_file => {
                let file = fs::File::options().write(true).open(&path).unwrap();
                file.write_all_at(&[dice.random_range(0..3); 10], dice.random_range(0..3) * 4096)
            }
            7 => fs::remove_file(&path).or_else(|_| fs::remove_dir_all(&path)),
            8 => fs::hard_link(&path, pick(dice)),
            9 => symlink(["x", "y"][dice.random_range(0..2)], &path),
            10 if is_file => {
                fs::set_permissions(&path, fs::Permissions::from_mode([0o600, 0o640][dice.random_range(0..2)]))
            }
            _ => fs::rename(&path, pick(dice)),
        };
    }

    /// A tree as the decisions see it, read by code of its own.
    fn versions(path: &Path) -> BTreeMap<TreePath, Version> {
        let listed = listing(path).unwrap();
        let content = |digest: [u8; 32]| u64::from_le_bytes(*digest.first_chunk().unwrap());
        let mut versions: BTreeMap<TreePath, Version> = BTreeMap::new();
        for listed in listed {
            let Entry { mode, uid, gid, mtime, xattrs, kind, path, .. } = listed.entry;
            let meta = Meta { mode, owner: (uid, gid), mtime, xattrs };
            let version = match kind {
                EntryKind::HardLink { to } => {
                    let first = versions.get_mut(&to).unwrap();
                    first.group = Some(to);
                    first.clone()
                }
                kind => Version { kind, content: listed.digest.map_or(0, content), meta, group: None },
            };
            versions.insert(path, version);
        }
        versions
    }

    /// What the decisions make of three trees in memory.
    fn in_memory(
        all: &[BTreeMap<TreePath, Version>; 3],
        resolve: Resolve,
        labels: &Labels,
    ) -> BTreeMap<TreePath, Version> {
        let paths: BTreeSet<&TreePath> = all.iter().flat_map(|tree| tree.keys()).collect();
        let row = |path| Row { path, base: all[0].get(path), ours: all[1].get(path), theirs: all[2].get(path) };
        let mut survey = Survey::new(resolve);
        paths.iter().for_each(|path| survey.take(&row(path)).unwrap());
        let plan = Arc::new(survey.finish(labels, |path| paths.contains(path)).unwrap());
        let mut decider = Decider::new(plan.clone());
        let mut result = BTreeMap::new();
        for path in &paths {
            let Outcome::Keep(Taken { body, meta, group }) = decider.decide(&row(path)) else { continue };
            let own = &all[strand(body)][*path];
            let group = group.map(|group| group.first);
            result.insert((*path).clone(), Version { meta, group, ..own.clone() });
        }
        for copy in plan.copies() {
            result.insert(copy.path.clone(), Version { group: None, ..copy.version.clone() });
        }
        result
    }

    /// Merges on disk: the delta taken in onto a copy of ours.
    fn on_disk(paths: &[PathBuf; 3], result: &Path, resolve: Resolve, labels: &Labels) {
        let plan = Arc::new(survey(trees(paths), resolve, labels).unwrap());
        let mut writer = write(trees(paths), view(&paths[1]), plan).unwrap();
        copy(&paths[1], result);
        let (dest, base) = (Root::open(result).unwrap(), Root::open(&paths[1]).unwrap());
        let mut applier = Applier::new(dest, Some(base), Sharing::Exclusive, None, None).unwrap();
        while let Some(chunk) = writer.next_chunk().unwrap() {
            applier.feed(chunk).unwrap();
        }
        let applied = applier.finish().unwrap();
        assert_eq!(applied.summary.entries, listing(result).unwrap().len() as u64);
    }

    #[test]
    fn what_is_on_disk_is_what_was_decided() {
        for seed in 0..CASES {
            let mut dice = StdRng::seed_from_u64(seed);
            let folder = tempfile::tempdir().unwrap();
            let paths = ["base", "ours", "theirs"].map(|name| folder.path().join(name));
            fs::create_dir(&paths[0]).unwrap();
            (0..dice.random_range(0..25)).for_each(|_| edit(&paths[0], &mut dice));
            copy(&paths[0], &paths[1]);
            copy(&paths[0], &paths[2]);
            (0..dice.random_range(0..10)).for_each(|_| edit(&paths[1], &mut dice));
            (0..dice.random_range(0..10)).for_each(|_| edit(&paths[2], &mut dice));
            let (all, labels) = (paths.each_ref().map(|path| versions(path)), labels());
            for (number, resolve) in [Resolve::KeepBoth, Resolve::Ours, Resolve::Theirs].into_iter().enumerate() {
                let result = folder.path().join(format!("result-{number}"));
                on_disk(&paths, &result, resolve, &labels);
                assert_eq!(versions(&result), in_memory(&all, resolve, &labels), "seed {seed}, {resolve:?}");
            }
            assert_eq!(paths.each_ref().map(|path| versions(path)), all, "seed {seed}: a merge changed a side");
        }
    }
}
