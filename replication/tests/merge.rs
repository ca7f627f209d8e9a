//! Three-way merges of random trees against the laws a merge must keep. Every case is a seed; a failure prints it.
#![allow(clippy::unwrap_used)]

mod support;

use std::collections::{BTreeMap, BTreeSet};

use flocker_replication::merge::{
    Conflict, ConflictKind, Decider, Group, Label, Labels, Meta, Outcome, Plan, Resolve, Row, Side, Survey, Version,
    common_ancestor, with_merged,
};
use flocker_storage::{
    model::{HeadState, HeldSnapshot, Lineage},
    tree::{
        entry::{EntryKind, Time},
        path::TreePath,
    },
};
use support::{chain, held, id, lineage};

const CASES: u64 = 30_000;

/// Small and good enough: xorshift64*.
#[derive(Clone)]
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) % sides
    }
}

/// A file system: names of inodes.
#[derive(Debug, Clone)]
struct Model {
    inodes: Vec<Version>,
    names: BTreeMap<TreePath, usize>,
}

type Listing = BTreeMap<TreePath, Version>;

fn path(text: &str) -> TreePath {
    TreePath::parse(text.as_bytes()).unwrap()
}

fn meta(mtime: i64) -> Meta {
    Meta { mode: 0o644, owner: (0, 0), mtime: Time { secs: mtime, nanos: 0 }, xattrs: Vec::new() }
}

impl Model {
    fn new() -> Self {
        let root = Version { kind: EntryKind::Directory, content: 0, meta: meta(0), group: None };
        Self { inodes: vec![root], names: BTreeMap::from([(TreePath::root(), 0)]) }
    }

    fn listing(&self) -> Listing {
        let mut first: BTreeMap<usize, (&TreePath, u32)> = BTreeMap::new();
        for (path, ino) in &self.names {
            first.entry(*ino).or_insert((path, 0)).1 += 1;
        }
        let version = |(path, ino): (&TreePath, &usize)| {
            let (head, count) = first[ino];
            let group = (count > 1).then(|| head.clone());
            (path.clone(), Version { group, ..self.inodes[*ino].clone() })
        };
        self.names.iter().map(version).collect()
    }

    fn pick(&self, dice: &mut Dice, wanted: impl Fn(&Version) -> bool) -> Option<TreePath> {
        let fit: Vec<&TreePath> =
            self.names.iter().filter(|(_, ino)| wanted(&self.inodes[**ino])).map(|(p, _)| p).collect();
        (!fit.is_empty()).then(|| fit[dice.roll(fit.len() as u64) as usize].clone())
    }

    fn free(&self, dice: &mut Dice) -> Option<TreePath> {
        let parent = self.pick(dice, |version| version.kind == EntryKind::Directory)?;
        let name = ["a", "b", "c", "d"][dice.roll(4) as usize];
        let path = parent.child(name.as_bytes()).unwrap();
        (path.level() < 4 && !self.names.contains_key(&path)).then_some(path)
    }

    fn remove(&mut self, gone: &TreePath) {
        self.names.retain(|path, _| !path.is_within(gone));
    }

    fn add(&mut self, at: TreePath, dice: &mut Dice) {
        let size = 1 + dice.roll(3);
        let (kind, content) = match dice.roll(10) {
            0..=5 => (EntryKind::File { size }, size * 10 + dice.roll(2)),
            6 => (EntryKind::Symlink { target: vec![b'0' + size as u8] }, 0),
            7 => (EntryKind::Fifo, 0),
            _ => (EntryKind::Directory, 0),
        };
        let meta = meta(dice.roll(9) as i64);
        self.inodes.push(Version { kind, content, meta, group: None });
        self.names.insert(at, self.inodes.len() - 1);
    }

    fn edit(&mut self, dice: &mut Dice) {
        let is_plain = |version: &Version| version.kind != EntryKind::Directory;
        let any = |_: &Version| true;
        match dice.roll(14) {
            0..=3 => {
                if let Some(at) = self.free(dice) {
                    self.add(at, dice);
                }
            }
            4 | 5 => match self.pick(dice, any) {
                Some(at) if !at.is_root() => self.remove(&at),
                _ => {}
            },
            6 | 7 => {
                if let Some(at) = self.pick(dice, |version| matches!(version.kind, EntryKind::File { .. })) {
                    let ino = self.names[&at];
                    let size = 1 + dice.roll(3);
                    self.inodes[ino].kind = EntryKind::File { size };
                    self.inodes[ino].content = size * 10 + dice.roll(2);
                    self.inodes[ino].meta.mtime.secs = dice.roll(9) as i64;
                }
            }
            8 | 9 => {
                if let Some(at) = self.pick(dice, any) {
                    let meta = &mut self.inodes[self.names[&at]].meta;
                    match dice.roll(4) {
                        0 => meta.mode = 0o600 + dice.roll(3) as u32,
                        1 => meta.owner.0 = dice.roll(3) as u32,
                        2 => meta.mtime.secs = dice.roll(9) as i64,
                        _ => {
                            let name = [b"user.a".to_vec(), b"user.b".to_vec()][dice.roll(2) as usize].clone();
                            meta.xattrs.retain(|(key, _)| *key != name);
                            if dice.roll(3) > 0 {
                                meta.xattrs.push((name, vec![b'0' + dice.roll(3) as u8]));
                                meta.xattrs.sort();
                            }
                        }
                    }
                }
            }
            10 | 11 => {
                if let (Some(of), Some(at)) = (self.pick(dice, is_plain), self.free(dice)) {
                    self.names.insert(at, self.names[&of]);
                }
            }
            12 => {
                if let Some(at) = self.pick(dice, any).filter(|at| !at.is_root()) {
                    self.remove(&at);
                    self.add(at, dice);
                }
            }
            _ => {
                // A rename, of a directory with all that is in it.
                if let (Some(from), Some(to)) = (self.pick(dice, any), self.free(dice))
                    && !from.is_root()
                    && !to.is_within(&from)
                {
                    let moved: Vec<_> =
                        self.names.iter().filter(|(p, _)| p.is_within(&from)).map(|(p, i)| (p.clone(), *i)).collect();
                    self.remove(&from);
                    for (old, ino) in moved {
                        let rest = &old.as_bytes()[from.as_bytes().len()..];
                        let new = TreePath::parse(&[to.as_bytes(), rest].concat()).unwrap();
                        self.names.insert(new, ino);
                    }
                }
            }
        }
    }

    fn edited(&self, dice: &mut Dice, most: u64) -> Self {
        let mut edited = self.clone();
        (0..dice.roll(most + 1)).for_each(|_| edited.edit(dice));
        edited
    }
}

fn labels() -> Labels {
    let label = |host: &str, tip: u128| Label { host: host.parse().unwrap(), tip: id(tip) };
    Labels { ours: label("host-a", 0xaaaa), theirs: label("host-b", 0xbbbb) }
}

struct Merged {
    plan: std::sync::Arc<Plan>,
    result: Listing,
}

fn merge(base: &Listing, ours: &Listing, theirs: &Listing, resolve: Resolve) -> Merged {
    let paths: BTreeSet<&TreePath> = base.keys().chain(ours.keys()).chain(theirs.keys()).collect();
    let row = |path| Row { path, base: base.get(path), ours: ours.get(path), theirs: theirs.get(path) };
    // What a real walk tells without a closer look.
    let same = |row: &Row<'_>| {
        row.base == row.ours && row.base == row.theirs && row.base.is_some_and(|base| base.group.is_none())
    };
    let mut survey = Survey::new(resolve);
    for path in &paths {
        let row = row(*path);
        match row.base.filter(|_| same(&row)) {
            Some(base) => survey.take_unchanged(path, &base.kind),
            None => survey.take(&row).unwrap(),
        }
    }
    let plan = survey.finish(&labels(), |path| paths.contains(path)).unwrap();
    let plan = std::sync::Arc::new(plan);
    let mut decider = Decider::new(plan.clone());
    let mut result = Listing::new();
    let mut sizes: BTreeMap<TreePath, u32> = BTreeMap::new();
    for path in &paths {
        let row = row(*path);
        if let Some(base) = row.base.filter(|_| same(&row)) {
            decider.pass_unchanged(path, &base.kind);
            result.insert((*path).clone(), base.clone());
            continue;
        }
        let Outcome::Keep(taken) = decider.decide(&row) else { continue };
        let body = match taken.body {
            Side::Ours => row.ours,
            Side::Theirs => row.theirs,
        };
        let body = body.unwrap_or_else(|| panic!("{path}: the result has what its side does not have"));
        let group = taken.group.map(|Group { first, names }| {
            sizes.insert(first.clone(), names);
            first
        });
        let version = Version { kind: body.kind.clone(), content: body.content, meta: taken.meta, group };
        result.insert((*path).clone(), version);
    }
    for copy in plan.copies() {
        let version = Version { group: None, ..copy.version.clone() };
        assert!(result.insert(copy.path.clone(), version).is_none(), "{}: something is there already", copy.path);
    }
    for (first, names) in sizes {
        let members = result.values().filter(|version| version.group.as_ref() == Some(&first)).count();
        assert_eq!(members, names as usize, "names of {first}");
    }
    Merged { plan, result }
}

/// A tree that can be.
fn check_is_tree(result: &Listing) {
    for (path, version) in result {
        if let Some(parent) = path.parent() {
            let kind = result.get(&parent).map(|parent| &parent.kind);
            assert_eq!(kind, Some(&EntryKind::Directory), "{path} lies in no directory");
        }
        if let Some(first) = &version.group {
            let head = result.get(first).unwrap_or_else(|| panic!("{path} is a name of {first}, which is not there"));
            assert!(first <= path && head.group.as_ref() == Some(first), "{path}: {first} is not the first name");
            assert_eq!(
                (&head.kind, head.content, &head.meta),
                (&version.kind, version.content, &version.meta),
                "{path} and {first}"
            );
            assert_ne!(version.kind, EntryKind::Directory, "{path}");
        }
    }
}

fn is_like(a: &Version, b: &Version) -> bool {
    let facets = |v: &Version| (v.kind.clone(), v.content, v.meta.mode, v.meta.owner, v.meta.xattrs.clone());
    facets(a) == facets(b)
}

/// Tells whether a conflict names what happened at a path.
fn is_named(conflicts: &[Conflict], path: &TreePath) -> bool {
    conflicts.iter().any(|conflict| {
        let whole = [ConflictKind::Type, ConflictKind::DeleteEdit, ConflictKind::DeletedDirectory];
        conflict.path == *path
            || conflict.names.contains(path)
            || (path.is_within(&conflict.path) && conflict.kinds.iter().any(|kind| whole.contains(kind)))
    })
}

/// Whatever a side changed is in the result, or a conflict names it.
fn check_nothing_is_lost(base: &Listing, sides: [&Listing; 2], merged: &Merged, resolve: Resolve) {
    let conflicts = merged.plan.conflicts();
    for (side, other) in [(sides[0], sides[1]), (sides[1], sides[0])] {
        for (path, version) in side {
            let before = base.get(path);
            let result = merged.result.get(path);
            if before.is_some_and(|before| is_like(before, version)) {
                continue;
            }
            let body_is_new = before.is_none_or(|b| (&b.kind, b.content) != (&version.kind, version.content));
            if body_is_new && resolve == Resolve::KeepBoth && version.kind != EntryKind::Directory {
                let holds = |other: &Version| (&other.kind, other.content) == (&version.kind, version.content);
                let beside = merged.plan.copies().iter().any(|copy| holds(&copy.version));
                assert!(beside || result.is_some_and(holds), "{path}: its contents are nowhere");
            }
            if is_named(conflicts, path) {
                continue;
            }
            let result = result.unwrap_or_else(|| panic!("{path}: changed on one side, and gone"));
            if body_is_new {
                assert_eq!((&result.kind, result.content), (&version.kind, version.content), "{path}");
            }
            if before.is_none_or(|b| b.meta.mode != version.meta.mode) {
                assert_eq!(result.meta.mode, version.meta.mode, "{path}");
            }
            if before.is_none_or(|b| b.meta.owner != version.meta.owner) {
                assert_eq!(result.meta.owner, version.meta.owner, "{path}");
            }
            for (name, value) in &version.meta.xattrs {
                if before.is_none_or(|b| !b.meta.xattrs.contains(&(name.clone(), value.clone()))) {
                    assert!(result.meta.xattrs.contains(&(name.clone(), value.clone())), "{path}");
                }
            }
        }
        for (path, before) in base {
            let untouched = other.get(path).is_some_and(|other| is_like(other, before));
            let survives =
                before.kind == EntryKind::Directory && merged.result.keys().any(|p| p != path && p.is_within(path));
            if !side.contains_key(path) && untouched && !survives && !is_named(conflicts, path) {
                assert!(!merged.result.contains_key(path), "{path}: deleted on one side, and still there");
            }
        }
    }
    let allowed = |path: &TreePath| sides.iter().any(|side| side.contains_key(path));
    for path in merged.result.keys() {
        let is_copy = merged.plan.copies().iter().any(|copy| copy.path == *path);
        assert!(allowed(path) || is_copy, "{path}: nobody has it");
    }
}

fn three(seed: u64) -> (Listing, Listing, Listing) {
    let mut dice = Dice(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
    let mut base = Model::new();
    (0..dice.roll(14)).for_each(|_| base.edit(&mut dice));
    let most = 1 + dice.roll(6);
    let (ours, theirs) = (base.edited(&mut dice, most), base.edited(&mut dice, most));
    (base.listing(), ours.listing(), theirs.listing())
}

const ALL: [Resolve; 4] = [Resolve::Stop, Resolve::KeepBoth, Resolve::Ours, Resolve::Theirs];

/// Runs a law on many cases and names the first that breaks it.
fn for_all(law: impl Fn(u64) + std::panic::RefUnwindSafe) {
    for seed in 1..=CASES {
        let kept = std::panic::catch_unwind(|| law(seed));
        if let Err(panic) = kept {
            eprintln!("seed {seed}");
            let (base, ours, theirs) = three(seed);
            for (name, tree) in [("base", base), ("ours", ours), ("theirs", theirs)] {
                eprintln!("{name}:");
                tree.iter().for_each(|(path, version)| eprintln!("  {path}: {version:?}"));
            }
            std::panic::resume_unwind(panic);
        }
    }
}

#[test]
fn a_side_that_changed_nothing_leaves_the_other_as_it_is() {
    for_all(|seed| {
        let (base, ours, _) = three(seed);
        for resolve in ALL {
            let left = merge(&base, &ours, &base, resolve);
            assert_eq!(left.result, ours);
            assert_eq!(left.plan.conflicts(), []);
            let right = merge(&base, &base, &ours, resolve);
            assert_eq!(right.result, ours);
            assert_eq!(right.plan.conflicts(), []);
        }
    });
}

#[test]
fn two_sides_that_are_equal_are_the_result() {
    for_all(|seed| {
        let (base, ours, _) = three(seed);
        let both = merge(&base, &ours, &ours, Resolve::Stop);
        assert_eq!(both.result, ours);
        assert_eq!(both.plan.conflicts(), []);
    });
}

#[test]
fn a_result_is_a_tree_and_nothing_is_lost_that_is_not_named() {
    let conflicts = std::sync::atomic::AtomicUsize::new(0);
    let clean = std::sync::atomic::AtomicUsize::new(0);
    for_all(|seed| {
        let (base, ours, theirs) = three(seed);
        for resolve in ALL {
            let merged = merge(&base, &ours, &theirs, resolve);
            check_is_tree(&merged.result);
            check_nothing_is_lost(&base, [&ours, &theirs], &merged, resolve);
            let counter = if merged.plan.conflicts().is_empty() { &clean } else { &conflicts };
            counter.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        }
    });
    // The cases are worth something only while both happen often.
    assert!(conflicts.into_inner() > CASES as usize / 2 && clean.into_inner() > CASES as usize / 2);
}

#[test]
fn swapping_the_sides_mirrors_the_result() {
    for_all(|seed| {
        let (base, ours, theirs) = three(seed);
        for (resolve, mirrored) in
            [(Resolve::Ours, Resolve::Theirs), (Resolve::Theirs, Resolve::Ours), (Resolve::KeepBoth, Resolve::KeepBoth)]
        {
            let (one, other) = (merge(&base, &ours, &theirs, resolve), merge(&base, &theirs, &ours, mirrored));
            let places = |merged: &Merged| {
                merged.plan.conflicts().iter().map(|c| (c.path.clone(), c.kinds.clone())).collect::<Vec<_>>()
            };
            if resolve == Resolve::KeepBoth {
                // Which name of an inode in conflict is told first depends on who has it.
                let is_apart =
                    |path: &TreePath| !is_named(one.plan.conflicts(), path) && !is_named(other.plan.conflicts(), path);
                let linked =
                    |merged: &Merged| merged.plan.conflicts().iter().any(|c| c.kinds.contains(&ConflictKind::Links));
                assert_eq!(linked(&one), linked(&other));
                if linked(&one) {
                    continue;
                }
                let apart = |merged: &Merged| {
                    let copies: Vec<_> = merged.plan.copies().iter().map(|copy| copy.path.clone()).collect();
                    let rest = merged.result.iter().filter(|(path, _)| is_apart(path) && !copies.contains(path));
                    // A name that stands alone beside a conflict of its group has no first name to agree on.
                    rest.map(|(path, version)| {
                        (path.clone(), (version.kind.clone(), version.content, version.meta.clone()))
                    })
                    .collect::<BTreeMap<_, _>>()
                };
                assert_eq!(apart(&one), apart(&other));
                assert_eq!(one.plan.copies().len(), other.plan.copies().len());
            } else {
                assert_eq!(one.result, other.result);
            }
            assert_eq!(places(&one), places(&other));
            let (counts, swapped) = (one.plan.counts(), other.plan.counts());
            assert_eq!((counts.ours, counts.theirs), (swapped.theirs, swapped.ours));
        }
    });
}

/// Merges in turn, each time what has come together so far with the next side; `None` where one of them has conflicts.
fn merge_all(base: &Listing, sides: [&Listing; 3]) -> Option<Listing> {
    let clean = |ours: &Listing, theirs: &Listing| {
        let merged = merge(base, ours, theirs, Resolve::Stop);
        merged.plan.conflicts().is_empty().then_some(merged.result)
    };
    clean(&clean(sides[0], sides[1])?, sides[2])
}

/// Commutative and associative: what has no conflicts in two orders has one result.
#[test]
fn the_order_in_which_hosts_are_merged_changes_nothing() {
    let compared = std::sync::atomic::AtomicUsize::new(0);
    for_all(|seed| {
        let mut dice = Dice(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
        let mut base = Model::new();
        (0..dice.roll(14)).for_each(|_| base.edit(&mut dice));
        let [a, b, c] = [(); 3].map(|()| base.edited(&mut dice, 3).listing());
        let base = base.listing();
        let orders = [[&a, &b, &c], [&b, &a, &c], [&b, &c, &a], [&c, &b, &a], [&a, &c, &b], [&c, &a, &b]];
        let results: Vec<Listing> = orders.into_iter().filter_map(|sides| merge_all(&base, sides)).collect();
        if let Some((first, others)) = results.split_first() {
            assert!(others.iter().all(|other| other == first), "{first:#?}\n{others:#?}");
            compared.fetch_add(usize::from(others.len() == 5), std::sync::atomic::Ordering::Relaxed);
        }
    });
    assert!(compared.into_inner() > CASES as usize / 4, "too few of the cases are merged in all six orders");
}

fn file(content: u64) -> Version {
    Version { kind: EntryKind::File { size: content }, content, meta: meta(1), group: None }
}

fn directory() -> Version {
    Version { kind: EntryKind::Directory, content: 0, meta: meta(1), group: None }
}

fn tree(entries: &[(&str, Version)]) -> Listing {
    let root = [(TreePath::root(), directory())];
    root.into_iter().chain(entries.iter().map(|(at, version)| (path(at), version.clone()))).collect()
}

fn kinds(merged: &Merged) -> Vec<(String, Vec<ConflictKind>)> {
    merged.plan.conflicts().iter().map(|c| (c.path.to_string(), c.kinds.clone())).collect()
}

#[test]
fn each_conflict_has_its_kind_and_each_policy_its_result() {
    use ConflictKind::{Content, DeleteEdit, DeletedDirectory, Mode, Type};
    let d = || ("d", directory());
    let private = |mode: u32| Version { meta: Meta { mode, ..meta(1) }, ..file(1) };
    type Case = (&'static str, Listing, Listing, Listing, (&'static str, ConflictKind), [&'static str; 3]);
    // The paths of the result with keep-both, ours, theirs; a file as PATH=CONTENT.
    let table: Vec<Case> = vec![
        (
            "both edit",
            tree(&[("f", file(1))]),
            tree(&[("f", file(2))]),
            tree(&[("f", file(3))]),
            ("f", Content),
            ["f=2 f.conflict-host-b-0000bbbb=3", "f=2", "f=3"],
        ),
        (
            "both add",
            tree(&[]),
            tree(&[("f", file(2))]),
            tree(&[("f", file(3))]),
            ("f", Content),
            ["f=2 f.conflict-host-b-0000bbbb=3", "f=2", "f=3"],
        ),
        (
            "delete and edit",
            tree(&[("f", file(1))]),
            tree(&[]),
            tree(&[("f", file(3))]),
            ("f", DeleteEdit),
            ["f=3", "", "f=3"],
        ),
        (
            "edit and delete",
            tree(&[("f", file(1))]),
            tree(&[("f", file(3))]),
            tree(&[]),
            ("f", DeleteEdit),
            ["f=3", "f=3", ""],
        ),
        (
            "modes",
            tree(&[("f", file(1))]),
            tree(&[("f", private(0o600))]),
            tree(&[("f", private(0o640))]),
            ("f", Mode),
            ["f=1", "f=1", "f=1"],
        ),
        (
            "a directory deleted, added to",
            tree(&[d(), ("d/x", file(1))]),
            tree(&[]),
            tree(&[d(), ("d/x", file(1)), ("d/y", file(2))]),
            ("d/y", DeletedDirectory),
            ["d d/y=2", "", "d d/y=2"],
        ),
        (
            "a directory deleted, edited in",
            tree(&[d(), ("d/x", file(1)), ("d/z", file(1))]),
            tree(&[]),
            tree(&[d(), ("d/x", file(2)), ("d/z", file(1))]),
            ("d/x", DeleteEdit),
            ["d d/x=2", "", "d d/x=2"],
        ),
        (
            "a file and a directory",
            tree(&[]),
            tree(&[("d", file(5))]),
            tree(&[d(), ("d/x", file(1))]),
            ("d", Type),
            ["d d.conflict-host-a-0000aaaa=5 d/x=1", "d=5", "d d/x=1"],
        ),
    ];
    for (name, base, ours, theirs, (at, kind), results) in table {
        for (resolve, wanted) in [Resolve::KeepBoth, Resolve::Ours, Resolve::Theirs].into_iter().zip(results) {
            let merged = merge(&base, &ours, &theirs, resolve);
            assert_eq!(kinds(&merged), [(at.to_owned(), vec![kind])], "{name}");
            let shown: Vec<String> = merged
                .result
                .iter()
                .skip(1)
                .map(|(path, version)| match version.kind {
                    EntryKind::Directory => path.to_string(),
                    _ => format!("{path}={}", version.content),
                })
                .collect();
            let mut wanted: Vec<&str> = wanted.split_whitespace().collect();
            wanted.sort_by_key(|text| path(text.split('=').next().unwrap()));
            assert_eq!(shown, wanted, "{name}, {resolve:?}");
        }
    }
}

#[test]
fn a_directory_that_must_stay_moves_what_took_its_place_aside() {
    let base = tree(&[("d", directory()), ("d/x", file(1))]);
    let ours = tree(&[("d", file(7))]);
    let theirs = tree(&[("d", directory()), ("d/x", file(2))]);
    let merged = merge(&base, &ours, &theirs, Resolve::KeepBoth);
    assert_eq!(
        kinds(&merged),
        [("d".to_owned(), vec![ConflictKind::Type]), ("d/x".to_owned(), vec![ConflictKind::DeleteEdit])]
    );
    assert_eq!(merged.result[&path("d/x")].content, 2);
    assert_eq!(merged.result[&path("d.conflict-host-a-0000aaaa")].content, 7);
}

#[test]
fn independent_properties_of_one_file_are_put_together() {
    let base = tree(&[("f", file(1))]);
    let ours = tree(&[("f", Version { meta: Meta { mode: 0o600, ..meta(1) }, ..file(1) })]);
    let theirs = tree(&[(
        "f",
        Version { meta: Meta { owner: (7, 7), mtime: Time { secs: 9, nanos: 0 }, ..meta(1) }, ..file(2) },
    )]);
    let merged = merge(&base, &ours, &theirs, Resolve::Stop);
    assert_eq!(merged.plan.conflicts(), []);
    let f = &merged.result[&path("f")];
    assert_eq!((f.content, f.meta.mode, f.meta.owner, f.meta.mtime.secs), (2, 0o600, (7, 7), 9));
}

fn number(held: &HeldSnapshot) -> u128 {
    held.snapshot.id.0.as_u128()
}

fn ancestor(ours: &[HeldSnapshot], theirs: &[HeldSnapshot]) -> Option<(u128, usize)> {
    let found = common_ancestor(&lineage(ours), &lineage(theirs))?;
    Some((number(&found.snapshot), found.further.len()))
}

#[test]
fn the_common_ancestor_is_the_newest_one_whatever_was_merged_before() {
    let ours = [held(1, &[]), held(2, &[1]), held(4, &[2, 3]), held(6, &[4])];
    let with_branch = [held(1, &[]), held(2, &[1]), held(3, &[1]), held(4, &[2, 3]), held(6, &[4])];
    let theirs = [held(1, &[]), held(3, &[1]), held(5, &[3])];
    assert_eq!(ancestor(&chain(&[1, 2]), &[held(1, &[]), held(3, &[1])]), Some((1, 0)));
    assert_eq!(ancestor(&with_branch, &theirs), Some((3, 0)), "merged before");
    assert_eq!(ancestor(&theirs, &with_branch), Some((3, 0)), "the other way round");
    assert_eq!(ancestor(&ours, &theirs), Some((1, 0)), "the merged branch is not held any more");
    assert_eq!(ancestor(&chain(&[1, 2, 3]), &chain(&[1, 2])), Some((2, 0)), "an ancestor itself");
    assert_eq!(ancestor(&chain(&[1]), &chain(&[2])), None);
    let crossed = |tip: u128, first: u128, second: u128| {
        [held(1, &[]), held(2, &[1]), held(3, &[1]), held(tip, &[first, second])]
    };
    assert_eq!(ancestor(&crossed(4, 2, 3), &crossed(5, 3, 2)), Some((3, 1)), "merged crosswise");
}

#[test]
fn what_a_merge_brought_in_is_added_before_it_once() {
    let lineage_of = |snapshots: &[HeldSnapshot]| Lineage { snapshots: snapshots.to_vec() };
    let own = lineage_of(&[held(1, &[]), held(2, &[1]), held(5, &[2, 4]), held(6, &[5])]);
    let fork = [held(3, &[1]), held(4, &[3]), held(9, &[4])];
    let numbers: Vec<u128> = with_merged(&own, &fork).snapshots.iter().map(number).collect();
    assert_eq!(numbers, [1, 2, 3, 4, 5, 6]);
    assert_eq!(with_merged(&own, &[]), own);
    assert_eq!(with_merged(&lineage_of(&chain(&[1, 2])), &fork), lineage_of(&chain(&[1, 2])));
}

/// Pushes a merge of 2 (ours) and 3 (theirs), both on 1, to a receiver; returns the base and what is missing.
fn push_of_a_merge(fork: &[HeldSnapshot], receiver: &[HeldSnapshot]) -> (&'static str, Option<u128>, Vec<u128>) {
    let own = lineage(&[held(1, &[]), held(2, &[1]), held(4, &[2, 3])]);
    let sent = with_merged(&own, fork);
    let (kind, base, missing, _) = support::numbers(&support::relate(&sent.snapshots, receiver, HeadState::Clean, 4));
    (kind, base, missing)
}

#[test]
fn a_merge_is_one_step_on_top_of_whichever_side_the_receiver_has() {
    let fork = [held(3, &[1])];
    assert_eq!(push_of_a_merge(&fork, &[held(1, &[]), held(3, &[1])]), ("fast-forward", Some(3), vec![4]));
    assert_eq!(push_of_a_merge(&fork, &chain(&[1, 2])), ("fast-forward", Some(2), vec![4]));
    assert_eq!(push_of_a_merge(&fork, &chain(&[1])), ("fast-forward", Some(1), vec![2, 4]));
    assert_eq!(push_of_a_merge(&fork, &[]), ("fast-forward", None, vec![1, 2, 4]));
    // The fork was destroyed after the merge: the delta is larger, the step the same.
    assert_eq!(push_of_a_merge(&[], &[held(1, &[]), held(3, &[1])]), ("fast-forward", Some(1), vec![4]));
    // The receiver went on.
    let gone_on = [held(1, &[]), held(3, &[1]), held(5, &[3])];
    assert_eq!(push_of_a_merge(&fork, &gone_on), ("diverged", Some(3), vec![4]));
}
