//! Comparing two trees: what is told, that nothing else is, and how much memory that takes.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::Path,
};

use flocker_storage::tree::{
    diff::{Change, Difference, Property, TreeDiff},
    entry::{Entry, EntryKind},
    listing::{Listed, listing},
    path::TreePath,
    root::Root,
    walk::Links,
    weave::TreeView,
};
use proptest::prelude::*;

use super::{
    edits::{cases, edit, perform},
    rig::{Folder, stage_copied},
};

fn view(path: &Path) -> TreeView {
    TreeView::still(Root::open(path).unwrap(), Links::ByInode)
}

fn changes(from: &Path, to: &Path) -> Vec<Change> {
    TreeDiff::new(view(from), view(to)).collect::<Result<_, _>>().unwrap()
}

fn find<'a>(changes: &'a [Change], path: &str) -> &'a Change {
    let path = TreePath::parse(path.as_bytes()).unwrap();
    changes.iter().find(|change| change.path == path).unwrap_or_else(|| panic!("{path} is not in {changes:?}"))
}

#[test]
fn each_property_is_told_by_its_name() {
    let folder = Folder::new();
    let [from, to] = ["from", "to"].map(|name| folder.make(name));
    for tree in [&from, &to] {
        for name in ["content", "mode", "xattrs", "type", "removed", "first", "same"] {
            fs::write(tree.join(name), vec![7; 10_000]).unwrap();
        }
        symlink("one", tree.join("target")).unwrap();
    }
    let same = fs::metadata(from.join("same")).unwrap().modified().unwrap();
    fs::File::options().write(true).open(to.join("same")).unwrap().set_modified(same).unwrap();
    fs::write(to.join("content"), [vec![7; 9_000], vec![8; 2_000]].concat()).unwrap();
    fs::set_permissions(to.join("mode"), fs::Permissions::from_mode(0o600)).unwrap();
    let set = rustix::fs::lsetxattr(to.join("xattrs"), "user.a", b"1", rustix::fs::XattrFlags::empty());
    fs::remove_file(to.join("type")).unwrap();
    fs::create_dir(to.join("type")).unwrap();
    fs::remove_file(to.join("removed")).unwrap();
    fs::hard_link(to.join("first"), to.join("second")).unwrap();
    fs::remove_file(to.join("target")).unwrap();
    symlink("two", to.join("target")).unwrap();

    let found = changes(&from, &to);

    let has = |path: &str, property| assert!(find(&found, path).properties.contains(&property), "{path}: {found:?}");
    has("content", Property::Content);
    // Two blocks of 4 KiB hold what changed.
    assert_eq!(find(&found, "content").bytes, 11_000 - 8192);
    has("mode", Property::Mode);
    has("type", Property::Type);
    has("target", Property::Target);
    if set.is_ok() {
        has("xattrs", Property::Xattrs);
    }
    assert_eq!((find(&found, "removed").difference, find(&found, "removed").bytes), (Difference::Removed, 10_000));
    let second = find(&found, "second");
    assert_eq!((second.difference, second.bytes), (Difference::Added, 0));
    assert!(matches!(&second.kind, EntryKind::HardLink { to } if to.as_bytes() == b"first"));
    assert!(!found.iter().any(|change| change.path.as_bytes() == b"same"));
}

/// What two listings differ in, without the code that is tested.
fn naive(from: &[Listed], to: &[Listed]) -> BTreeMap<TreePath, Difference> {
    let index = |list: &[Listed]| -> BTreeMap<TreePath, Listed> {
        list.iter().map(|listed| (listed.entry.path.clone(), listed.clone())).collect()
    };
    let (from, to) = (index(from), index(to));
    let facets =
        |entry: &Entry| (entry.kind.clone(), entry.mode, entry.uid, entry.gid, entry.mtime, entry.xattrs.clone());
    let mut differences = BTreeMap::new();
    for path in from.keys().chain(to.keys()) {
        let difference = match (from.get(path), to.get(path)) {
            (Some(_), None) => Difference::Removed,
            (None, Some(_)) => Difference::Added,
            (Some(a), Some(b)) if facets(&a.entry) == facets(&b.entry) && a.digest == b.digest => continue,
            _ => Difference::Changed,
        };
        differences.insert(path.clone(), difference);
    }
    differences
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(cases()) })]

    #[test]
    fn exactly_what_differs_is_told(
        first in prop::collection::vec(edit(), 0..50),
        second in prop::collection::vec(edit(), 0..25),
    ) {
        let folder = Folder::new();
        let [head, copy] = ["head", "copy"].map(|name| folder.make(name));
        first.iter().for_each(|edit| perform(&head, edit));
        stage_copied(&head, &copy);
        second.iter().for_each(|edit| perform(&copy, edit));

        let found = changes(&head, &copy);

        let told: BTreeMap<TreePath, Difference> =
            found.iter().map(|change| (change.path.clone(), change.difference)).collect();
        prop_assert_eq!(told, naive(&listing(&head).unwrap(), &listing(&copy).unwrap()));
        prop_assert!(found.is_sorted_by(|a, b| a.path < b.path));
        // A further name that became a file, or the other way round, has changed its links and nothing else.
        prop_assert!(found.iter().all(|c| (c.difference == Difference::Changed) != c.properties.is_empty()));
        prop_assert!(changes(&head, &head).is_empty());
    }
}

/// Returns the highest resident memory since the last call, in KiB, and starts anew.
fn peak_kib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    let peak = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    let _ = fs::write("/proc/self/clear_refs", "5");
    peak
}

#[test]
fn memory_does_not_grow_with_the_number_of_paths() {
    const FOLDERS: usize = 150;
    const FILES: usize = 1000;
    let memory = Path::new("/dev/shm");
    let place = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap();
    let [from, to] = ["from", "to"].map(|name| place.path().join(name));
    for (tree, letter) in [(&from, 'a'), (&to, 'b')] {
        for folder in 0..FOLDERS {
            let folder = tree.join(format!("{folder:04}"));
            fs::create_dir_all(&folder).unwrap();
            for file in 0..FILES / 2 {
                fs::File::create(folder.join(format!("both{file:04}"))).unwrap();
                fs::File::create(folder.join(format!("{letter}{file:04}"))).unwrap();
            }
        }
    }
    let diff = TreeDiff::new(view(&from), view(&to));
    peak_kib();
    let before = peak_kib();
    let lone = diff.filter(|change| change.as_ref().unwrap().difference != Difference::Changed).count();
    let grown = peak_kib().saturating_sub(before);
    assert_eq!(lone, FOLDERS * FILES);
    assert!(grown < 4 * 1024, "comparing {} paths took {grown} KiB", FOLDERS * FILES * 3 / 2);
}
