//! Three-way merges: two nodes go apart, one of them puts both together, and the other one follows.

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::Path,
};

use flocker_tests::{
    Cluster, LONG, Node, Options, Scratch,
    data::{scribble, write_ordinary_tree},
    invariants::{array, assert_sound, histories, text, wait_tidy},
    require,
    scratch::FileSystem,
    tree::{Listing, assert_equal, assert_same},
    wait_until,
};
use serde_json::Value;

/// host-a and host-b have `db@one`; both go on: host-a to `db@a1`, host-b to `db@b1`. Nothing is mounted at the end.
fn diverge(a: &Node, b: &Node) {
    let here = a.create_mounted("db");
    write_ordinary_tree(&here, 200, 4096);
    fs::write(here.join("ours"), "one").unwrap();
    fs::write(here.join("theirs"), "one").unwrap();
    a.cli(&["snapshot", "db@one"]).ok();
    a.push("db@one", "host-b");
    b.cli(&["promote", "db", "--force"]).ok();
    let there = b.mount("db");

    scribble(&here.join("data.bin"), 201, 10);
    fs::write(here.join("ours"), "changed on host-a").unwrap();
    fs::write(here.join("from-a"), "added on host-a").unwrap();
    fs::remove_dir_all(here.join("many/d0000")).unwrap();
    fs::set_permissions(here.join("theirs"), fs::Permissions::from_mode(0o600)).unwrap();
    a.cli(&["snapshot", "db@a1"]).ok();
    a.cli(&["unmount", "db"]).ok();

    fs::write(there.join("theirs"), "changed on host-b").unwrap();
    fs::create_dir(there.join("from-b")).unwrap();
    fs::write(there.join("from-b/file"), "added on host-b").unwrap();
    fs::hard_link(there.join("from-b/file"), there.join("from-b/second-name")).unwrap();
    fs::remove_file(there.join("link")).unwrap();
    b.cli(&["snapshot", "db@b1"]).ok();
    b.cli(&["unmount", "db"]).ok();
}

/// What both have done.
fn assert_merged(tree: &Path) {
    let read = |path: &str| fs::read_to_string(tree.join(path)).unwrap();
    assert_eq!(read("ours"), "changed on host-a");
    assert_eq!(read("theirs"), "changed on host-b");
    assert_eq!(fs::metadata(tree.join("theirs")).unwrap().mode() & 0o777, 0o600);
    assert_eq!((read("from-a"), read("from-b/file")), ("added on host-a".to_owned(), "added on host-b".to_owned()));
    let inode = |path: &str| fs::metadata(tree.join(path)).unwrap().ino();
    assert_eq!(inode("from-b/file"), inode("from-b/second-name"));
    assert_eq!(inode("script.sh"), inode("many/again.sh"));
    assert!(!tree.join("many/d0000").exists() && fs::symlink_metadata(tree.join("link")).is_err());
}

fn pools(pools: [Option<String>; 2], scratch: Scratch) -> Cluster {
    Cluster::with(scratch, pools.map(|pool| Options { pool, ..Options::default() }).to_vec())
}

fn two_nodes_go_apart_and_agree_again(mut cluster: Cluster) {
    let (a, b) = cluster.pair();
    diverge(a, b);
    a.cli(&["pull", "db", "host-b", "--as", "fork"]).ok();
    let ours = Listing::of(&a.mount_to_read("db"));
    a.cli(&["unmount", "db"]).ok();

    let report = a.cli(&["merge", "db", "fork"]).ok().json();

    assert_eq!(report["state"], "merged", "{report}");
    assert_eq!(array(&report["conflicts"]), [] as [Value; 0]);
    assert_eq!((text(&report["base"]["name"]), text(&report["theirs"]["name"])), ("one".into(), "b1".into()));
    let made = text(&report["snapshot"]["name"]);
    let parents = [&report["ours"]["id"], &report["theirs"]["id"]];
    assert_eq!(array(&report["snapshot"]["parents"]).iter().collect::<Vec<_>>(), parents);
    let head = a.cli(&["inspect", "db"]).ok().json();
    assert_eq!((&head["head"], &head["role"]), (&"clean".into(), &"primary".into()));
    let merged = a.mount("db");
    assert_merged(&merged);
    assert_eq!(histories(a)["db"], ["one", "a1", &made]);
    // Ours is as it was, as a snapshot.
    a.cli(&["clone", "db@a1", "was"]).ok();
    assert_same(&ours.without_folder_times(), &Listing::of(&a.mount("was")).without_folder_times());

    // A fast-forward for the other side, on top of what it has.
    let transfer = a.push(&format!("db@{made}"), "host-b");
    assert_eq!(transfer["progress"]["steps_total"], 1, "{transfer}");
    let base = &transfer["outcome"]["verdict"]["fast-forward"]["base"];
    assert_eq!(base["name"], "b1", "{transfer}");
    assert!(transfer["progress"]["delta_bytes"].as_u64().unwrap() < 1 << 20, "{transfer}");
    assert_eq!(histories(b)["db"], ["one", "b1", &made]);
    assert_equal(&merged, &b.mount_to_read("db"));
    for node in [&*a, &*b] {
        assert_sound(node);
    }
    wait_tidy(a);
}

#[test]
fn on_directories_two_nodes_go_apart_and_agree_again() {
    two_nodes_go_apart_and_agree_again(Cluster::start(2));
}

#[test]
fn on_btrfs_two_nodes_go_apart_and_agree_again() {
    if !require("btrfs") {
        return;
    }
    let scratch = Scratch::new();
    let btrfs = |name| Some(format!("btrfs:{}", scratch.mount(FileSystem::Btrfs, name, 512).join("pool").display()));
    let places = [btrfs("left"), btrfs("right")];
    two_nodes_go_apart_and_agree_again(pools(places, scratch));
}

#[test]
fn on_btrfs_and_a_directory_two_nodes_go_apart_and_agree_again() {
    if !require("btrfs") {
        return;
    }
    let scratch = Scratch::new();
    let place = scratch.mount(FileSystem::Btrfs, "left", 512).join("pool");
    two_nodes_go_apart_and_agree_again(pools([Some(format!("btrfs:{}", place.display())), None], scratch));
}

/// One node with `db@base` and a clone `fork` of it; what both did since then is snapshots `db@mine` and `fork@other`.
fn local(node: &Node, base: impl Fn(&Path), ours: impl Fn(&Path), theirs: impl Fn(&Path)) {
    let tree = node.create_mounted("db");
    base(&tree);
    node.cli(&["snapshot", "db@base"]).ok();
    node.cli(&["clone", "db@base", "fork"]).ok();
    ours(&tree);
    node.cli(&["snapshot", "db@mine"]).ok();
    node.cli(&["unmount", "db"]).ok();
    let fork = node.mount("fork");
    theirs(&fork);
    node.cli(&["snapshot", "fork@other"]).ok();
}

fn write(tree: &Path, files: &[(&str, &str)]) {
    for (path, text) in files {
        fs::create_dir_all(tree.join(path).parent().unwrap()).unwrap();
        fs::write(tree.join(path), text).unwrap();
    }
}

#[test]
fn conflicts_stop_a_merge_and_leave_everything_as_it_was() {
    let cluster = Cluster::start(1);
    let node = &cluster.nodes[0];
    local(
        node,
        |tree| write(tree, &[("file", "base"), ("gone", "base"), ("folder/old", "base")]),
        |tree| {
            write(tree, &[("file", "ours"), ("fine", "ours")]);
            fs::remove_file(tree.join("gone")).unwrap();
            fs::remove_dir_all(tree.join("folder")).unwrap();
        },
        |tree| write(tree, &[("file", "theirs!"), ("gone", "edited"), ("folder/new", "theirs")]),
    );
    let before = Listing::of(&node.mount_to_read("db"));
    node.cli(&["unmount", "db"]).ok();

    let output = node.cli(&["merge", "db", "fork"]).ends_with(4).says(&["3 paths are in conflict", "keep-both"]);

    let report = output.json();
    assert_eq!(report["state"], "conflicts");
    let found: Vec<(String, String)> = array(&report["conflicts"])
        .iter()
        .map(|conflict| (text(&conflict["path"]), text(&conflict["kinds"][0])))
        .collect();
    let wanted = [("file", "content"), ("folder/new", "deleted-directory"), ("gone", "delete-edit")];
    assert_eq!(found, wanted.map(|(path, kind)| (path.to_owned(), kind.to_owned())));
    assert_eq!(histories(node)["db"], ["base", "mine"]);
    assert_same(&before, &Listing::of(&node.mount_to_read("db")));
    node.cli(&["unmount", "db"]).ok();
    let people = node.cli_for_people(&["merge", "db", "fork"]).ends_with(4);
    assert!(people.stdout.contains("C gone (deleted and edited)"), "{}", people.stdout);

    // A dry run says the same and changes nothing; the policies end it.
    let dry = node.cli(&["merge", "db", "fork", "--conflicts", "keep-both", "--dry-run"]).ok().json();
    assert_eq!((&dry["state"], array(&dry["conflicts"]).len()), (&"dry-run".into(), 3));
    assert_eq!(histories(node)["db"], ["base", "mine"]);
    let report = node.cli(&["merge", "db", "fork", "--conflicts=keep-both", "--snapshot", "both"]).ok().json();
    let beside = text(&report["conflicts"][0]["done"]["both"]);
    let short = &text(&report["theirs"]["id"]).replace('-', "")[24..];
    assert_eq!(beside, format!("file.conflict-host-a-{short}"));
    let tree = node.mount("db");
    let read = |path: &str| fs::read_to_string(tree.join(path)).unwrap();
    assert_eq!((read("file"), read(&beside), read("gone")), ("ours".into(), "theirs!".into(), "edited".into()));
    assert_eq!((read("folder/new"), read("fine")), ("theirs".into(), "ours".into()));
    assert!(!tree.join("folder/old").exists());
    assert_eq!(histories(node)["db"], ["base", "mine", "both"]);
    assert_sound(node);
}

#[test]
fn each_side_can_win_every_conflict() {
    for (policy, file, has_gone) in [("ours", "ours", false), ("theirs", "theirs", true)] {
        let cluster = Cluster::start(1);
        let node = &cluster.nodes[0];
        local(
            node,
            |tree| write(tree, &[("file", "base"), ("gone", "base")]),
            |tree| {
                write(tree, &[("file", "ours")]);
                fs::remove_file(tree.join("gone")).unwrap();
            },
            |tree| write(tree, &[("file", "theirs"), ("gone", "edited")]),
        );
        let report = node.cli(&["merge", "db", "fork", "--conflicts", policy]).ok().json();
        assert_eq!(array(&report["conflicts"]).len(), 2);
        let tree = node.mount("db");
        assert_eq!(fs::read_to_string(tree.join("file")).unwrap(), file);
        assert_eq!(tree.join("gone").exists(), has_gone);
    }
}

#[test]
fn a_second_merge_starts_from_the_first_one() {
    let cluster = Cluster::start(1);
    let node = &cluster.nodes[0];
    let same = |text: &'static str| move |tree: &Path| write(tree, &[("file", text)]);
    local(node, same("base"), same("ours"), same("theirs"));
    node.cli(&["merge", "db", "fork", "--conflicts=ours"]).ok();
    // Nothing new: nothing to merge.
    assert_eq!(node.cli(&["merge", "db", "fork"]).ok().json()["state"], "up-to-date");
    let fork = node.seen(&node.state.join("mounts/fork").display().to_string());
    write(&fork, &[("later", "theirs")]);
    node.cli(&["snapshot", "fork@later"]).ok();

    let report = node.cli(&["merge", "db", "fork"]).ok().json();

    assert_eq!((&report["state"], &report["base"]["name"]), (&"merged".into(), &"other".into()));
    let tree = node.mount("db");
    assert_eq!(fs::read_to_string(tree.join("file")).unwrap(), "ours");
    assert_eq!(fs::read_to_string(tree.join("later")).unwrap(), "theirs");
}

#[test]
fn a_merge_is_refused_with_its_reason_where_it_would_take_something_away() {
    let mut cluster = Cluster::start(2);
    let (a, b) = cluster.pair();
    local(a, |tree| write(tree, &[("file", "base")]), |_| {}, |tree| write(tree, &[("new", "theirs")]));
    let mount = a.mount("db");
    a.cli(&["merge", "db", "fork"]).ends_with(4).says(&["mounted at", &mount.display().to_string()]);
    a.cli(&["unmount", "db"]).ok();
    a.cli(&["create", "other"]).ok();
    a.cli(&["snapshot", "other@one"]).ok();
    a.cli(&["merge", "db", "other"]).ends_with(4).says(&["no snapshot is an ancestor of both"]);
    a.cli(&["merge", "db", "db"]).ends_with(2);
    a.cli(&["merge", "db", "nothing"]).ends_with(3);
    a.cli(&["merge", "db", "fork", "--snapshot", "mine"]).ends_with(4).says(&["has a snapshot mine already"]);
    a.push("db@mine", "host-b");
    b.cli(&["clone", "db@base", "branch"]).ok();
    b.cli(&["snapshot", "branch@one"]).ok();
    b.cli(&["merge", "db", "branch"]).ends_with(4).says(&["it is a replica"]);
    assert_eq!(histories(a)["db"], ["base", "mine"]);
}

#[test]
fn changes_that_no_snapshot_holds_are_kept_in_one_first() {
    let cluster = Cluster::start(1);
    let node = &cluster.nodes[0];
    local(node, |tree| write(tree, &[("file", "base")]), |_| {}, |_| {});
    let tree = node.mount("db");
    write(&tree, &[("unsaved-here", "ours")]);
    node.cli(&["unmount", "db"]).ok();
    write(&node.state.join("mounts/fork"), &[("unsaved-there", "theirs")]);

    let dry = node.cli(&["merge", "db", "fork", "--dry-run"]).ok().json();
    let report = node.cli(&["merge", "db", "fork"]).ok().json();

    assert_eq!(array(&dry["unsaved"]), ["fork", "db"]);
    assert_eq!(array(&report["kept"]).len(), 2, "{report}");
    assert_eq!(histories(node)["db"].len(), 4);
    let tree = node.mount("db");
    assert!(tree.join("unsaved-here").exists() && tree.join("unsaved-there").exists());
}

#[test]
fn dying_within_a_merge_leaves_the_old_or_the_new_state() {
    for (point, done) in [
        ("node.merge.journalled", false),
        ("node.merge.before-commit", false),
        ("node.merge.committed", true),
        ("node.merge.head-put", true),
    ] {
        let mut cluster = Cluster::start(1);
        let node = &mut cluster.nodes[0];
        local(
            node,
            |tree| write(tree, &[("file", "base")]),
            |tree| write(tree, &[("ours", "ours")]),
            |tree| write(tree, &[("file", "theirs"), ("theirs", "theirs")]),
        );
        node.kill9();
        node.fault = Some(point.to_owned());
        node.start();
        node.cli(&["merge", "db", "fork"]).ends_with(5);
        wait_until("the daemon is gone", LONG, || node.is_dead().then_some(()));
        node.kill9();
        node.fault = None;
        node.start();
        assert_sound(node);
        assert_eq!(histories(node)["db"].len(), if done { 3 } else { 2 }, "{point}");
        let inspected = node.cli(&["inspect", "db"]).ok().json();
        assert_eq!(inspected["head"], "clean", "{point}");
        let tree = node.mount("db");
        assert_eq!(tree.join("theirs").exists(), done, "{point}");
        node.cli(&["unmount", "db"]).ok();
        let state = if done { "up-to-date" } else { "merged" };
        assert_eq!(node.cli(&["merge", "db", "fork"]).ok().json()["state"], state, "{point}");
        wait_tidy(node);
    }
}
