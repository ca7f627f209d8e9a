//! Each conflict by hand: its kind, and what each policy makes of it.

use flocker_replication::merge::{ConflictKind, Meta, Resolve, Version};
use flocker_storage::tree::{
    entry::{EntryKind, Time},
    path::TreePath,
};

use crate::rig::{Listing, Merged, merge, meta, path};

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
