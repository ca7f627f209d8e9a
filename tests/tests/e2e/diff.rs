//! Comparing snapshots and heads, of one volume and of several.

use std::{fs, os::unix::fs::PermissionsExt, path::Path};

use flocker_tests::{Cluster, Node, Options, Scratch, invariants::array, require, scratch::FileSystem};

fn shows_what_differs(node: &Node) {
    let tree = node.create_mounted("db");
    fs::create_dir(tree.join("folder")).unwrap();
    for name in ["changed", "removed", "mode", "folder/same"] {
        fs::write(tree.join(name), "first").unwrap();
    }
    std::os::unix::fs::symlink("one", tree.join("link")).unwrap();
    node.cli(&["snapshot", "db@one"]).ok();
    fs::write(tree.join("changed"), "other").unwrap();
    fs::remove_file(tree.join("removed")).unwrap();
    fs::set_permissions(tree.join("mode"), fs::Permissions::from_mode(0o600)).unwrap();
    fs::write(tree.join("folder/added"), "seven b").unwrap();
    fs::hard_link(tree.join("folder/same"), tree.join("name")).unwrap();
    fs::remove_file(tree.join("link")).unwrap();
    std::os::unix::fs::symlink("two", tree.join("link")).unwrap();
    let wanted =
        "M changed (content, times)\n+ folder/added\nM link (target, times)\nM mode (mode)\n+ name\n- removed\n";

    // The head, a snapshot of it, and a clone's head.
    let head = node.cli_for_people(&["diff", "db@one", "db"]).ok();
    assert_eq!(head.stdout, wanted);
    assert!(head.stderr.contains("2 added (7 B), 1 removed (5 B)"), "{}", head.stderr);
    node.cli(&["snapshot", "db@two"]).ok();
    assert_eq!(node.cli_for_people(&["diff", "db@one", "db@two"]).ok().stdout, wanted);
    node.cli(&["clone", "db@one", "copy"]).ok();
    assert_eq!(node.cli_for_people(&["diff", "copy", "db@two"]).ok().stdout, wanted);
    let back = node.cli_for_people(&["diff", "db@two", "copy"]).ok().stdout;
    assert!(back.contains("+ removed\n") && back.contains("- folder/added\n"), "{back}");
    for equal in [["db@two", "db"], ["db", "db"], ["copy", "db@one"]] {
        assert_eq!(array(&node.cli(&["diff", equal[0], equal[1]]).ok().json()).len(), 0, "{equal:?}");
    }

    let changes = array(&node.cli(&["diff", "db@one", "db@two"]).ok().json());
    let changed = changes.iter().find(|change| change["path"] == "changed").unwrap();
    assert_eq!((&changed["change"], &changed["bytes"]), (&"changed".into(), &5.into()));
    let name = changes.iter().find(|change| change["path"] == "name").unwrap();
    assert_eq!(name["kind"], "hard link to folder/same");
    let stat = node.cli(&["diff", "db@one", "db@two", "--stat"]).ok().json();
    assert_eq!((&stat["added"], &stat["removed"], &stat["removed_bytes"]), (&2.into(), &1.into(), &5.into()));
    node.cli(&["diff", "db@one", "db@three"]).ends_with(3);
    node.cli(&["diff", "db@one", "nothing"]).ends_with(3);
}

#[test]
fn on_a_directory_a_comparison_shows_what_differs() {
    let cluster = Cluster::start(1);
    shows_what_differs(&cluster.nodes[0]);
}

#[test]
fn on_btrfs_a_comparison_shows_what_differs() {
    if !require("btrfs") {
        return;
    }
    let scratch = Scratch::new();
    let pool = format!("btrfs:{}", scratch.mount(FileSystem::Btrfs, "btrfs", 512).join("pool").display());
    let cluster = Cluster::with(scratch, vec![Options { pool: Some(pool), ..Options::default() }]);
    shows_what_differs(&cluster.nodes[0]);
}

#[test]
fn a_comparison_of_a_hundred_thousand_paths_takes_little_memory() {
    const FILES: u32 = 100_000;
    let cluster = Cluster::start(1);
    let node = &cluster.nodes[0];
    let tree = node.create_mounted("db");
    node.cli(&["snapshot", "db@empty"]).ok();
    many_files(&tree, FILES);
    let before = node.peak_resident_bytes();

    let output = node.cli(&["diff", "db@empty", "db", "--output", "jsonl"]).ok();

    let grown = node.peak_resident_bytes() - before;
    assert!(output.stdout.lines().count() > FILES as usize);
    assert!(grown < 24 << 20, "the daemon grew by {} KiB", grown >> 10);
}

fn many_files(tree: &Path, files: u32) {
    for number in 0..files {
        let folder = tree.join(format!("d{:03}", number / 1000));
        if number % 1000 == 0 {
            fs::create_dir(&folder).unwrap();
        }
        fs::File::create(folder.join(format!("f{number}"))).unwrap();
    }
}
