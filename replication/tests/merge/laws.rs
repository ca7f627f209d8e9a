//! The laws that a merge must keep, on random trees. Every case is a seed; a failure prints it.

use std::collections::BTreeMap;

use flocker_replication::merge::{Conflict, ConflictKind, Resolve, Version};
use flocker_storage::tree::{entry::EntryKind, path::TreePath};

use crate::{
    random::{Dice, Model, three},
    rig::{Listing, Merged, merge},
};

const CASES: u64 = 30_000;

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
