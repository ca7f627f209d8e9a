//! A daemon that dies at each point of an import, on each driver: the volume is there whole or not at all.

use std::path::{Path, PathBuf};

use flocker_tests::{
    Cluster, Node, SHORT, Scratch, ZfsHost,
    data::write_ordinary_tree,
    invariants::{assert_sound, histories, leftovers},
    require, wait_until,
};

use super::{btrfs_pool, import, tar, volumes_in_pool, with_pools};

/// The fault points of an import, in the order they are passed.
const POINTS: [&str; 6] = [
    "node.import.journalled",
    "node.import.staged",
    "node.import.unpacked",
    "node.import.before-commit",
    "node.import.committed",
    "node.import.cleared",
];

/// Dies at each point of an import; afterwards the volume is there whole or not at all, and nothing else is.
fn dies_at_each_point(node: &mut Node, file: &Path) {
    for (number, point) in POINTS.iter().enumerate() {
        node.kill9();
        node.fault = Some((*point).to_owned());
        node.start();

        node.cli(&["import", "db", file.to_str().unwrap()]).ends_with(5);

        wait_until("the daemon is gone", SHORT, || node.is_dead().then_some(()));
        node.kill9();
        node.fault = None;
        node.start();
        let committed = number >= 4;
        let expected: Vec<&str> = if committed { vec!["db"] } else { vec![] };
        assert_eq!(histories(node).keys().collect::<Vec<_>>(), expected, "{point}");
        assert_eq!(volumes_in_pool(node), u64::from(committed), "{point}");
        assert_sound(node);
        wait_until("nothing lies about", SHORT, || leftovers(&node.pool()).is_empty().then_some(()));
        if committed {
            assert_eq!(histories(node)["db"], ["imported"], "{point}");
            node.cli(&["destroy", "db"]).ok();
        }
    }
    import(node, "db", file);
    assert_eq!(node.cli(&["inspect", "db"]).ok().json()["head"], "clean");
}

fn a_foreign_tarball(scratch: &Scratch) -> PathBuf {
    let (tree, file) = (scratch.folder("tree"), scratch.path().join("foreign.tar"));
    write_ordinary_tree(&tree, 314, 512);
    tar(&["-cf", file.to_str().unwrap(), "."], &tree);
    file
}

#[test]
fn on_a_directory_an_import_that_dies_is_whole_or_not_there() {
    let mut cluster = Cluster::start(1);
    let file = a_foreign_tarball(&cluster.scratch);
    dies_at_each_point(&mut cluster.nodes[0], &file);
}

#[test]
fn on_btrfs_an_import_that_dies_is_whole_or_not_there() {
    if !require("btrfs") {
        return;
    }
    let scratch = Scratch::new();
    let (file, pool) = (a_foreign_tarball(&scratch), btrfs_pool(&scratch, "btrfs"));
    let mut cluster = with_pools(vec![pool], scratch);
    dies_at_each_point(&mut cluster.nodes[0], &file);
}

#[test]
fn on_zfs_an_import_that_dies_is_whole_or_not_there() {
    let scratch = Scratch::new();
    let Some([host, _]) = ZfsHost::pair(&scratch) else { return };
    let file = a_foreign_tarball(&scratch);
    let mut cluster = Cluster::with(scratch, vec![host.options()]);
    dies_at_each_point(&mut cluster.nodes[0], &file);
}
