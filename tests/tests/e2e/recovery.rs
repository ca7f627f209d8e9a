//! What a node knows comes back from the pool; what nobody knows is shown and left alone.

use std::fs;

use flocker_tests::{
    Cluster,
    data::write_ordinary_tree,
    invariants::{array, histories, text},
    tree::{Listing, assert_same},
};

#[test]
fn without_its_state_database_a_node_finds_volumes_and_snapshots_again() {
    let mut cluster = Cluster::start(2);
    let (a, b) = cluster.pair();
    let mount = a.create_mounted("db");
    a.cli(&["set", "db", "team=storage"]).ok();
    write_ordinary_tree(&mount, 50, 512);
    a.cli(&["snapshot", "db@one", "-m", "k=v"]).ok();
    fs::write(mount.join("later"), "x").unwrap();
    a.cli(&["snapshot", "db@two"]).ok();
    a.cli(&["clone", "db@one", "copy"]).ok();
    a.push("db@two", "host-b");
    a.cli(&["unmount", "db"]).ok();
    b.cli(&["clone", "db@one", "copy-on-b"]).ok();

    for node in [&mut *a, &mut *b] {
        let before: Vec<_> = array(&node.cli(&["list"]).ok().json());
        let names = histories(node);
        node.stop();
        for entry in fs::read_dir(&node.state).unwrap().flatten() {
            if entry.file_name().to_string_lossy().starts_with("state.db") {
                fs::remove_file(entry.path()).unwrap();
            }
        }
        node.start();
        assert_eq!(names, histories(node));
        let after = array(&node.cli(&["list"]).ok().json());
        assert_eq!(before, after, "{}", node.name);
    }
    assert_eq!(a.cli(&["inspect", "db@one"]).ok().json()["metadata"]["k"], "v");
    assert!(a.mount("db").join("later").exists());
    fs::write(a.mount("db").join("third"), "x").unwrap();
    a.cli(&["snapshot", "db@three"]).ok();
}

#[test]
fn trees_that_nobody_knows_are_listed_as_orphans_and_left_alone() {
    let mut cluster = Cluster::start(1);
    let node = &mut cluster.nodes[0];
    node.create_mounted("db");
    node.cli(&["unmount", "db"]).ok();
    node.stop();
    let stranger = node.pool().join("volumes/0199aaaa-bbbb-7ccc-8ddd-eeeeffff0000");
    fs::create_dir_all(stranger.join("head")).unwrap();
    fs::write(stranger.join("head/precious"), "do not touch").unwrap();
    fs::write(node.pool().join("volumes/notes.txt"), "an operator's notes").unwrap();
    let before = Listing::of(&stranger);

    node.start();

    let orphans = array(&node.cli(&["pool", "status"]).ok().json()["orphans"]);
    let places: Vec<_> = orphans.iter().map(|orphan| text(&orphan["place"])).collect();
    assert!(places.iter().any(|place| place.contains("0199aaaa")), "{places:?}");
    assert!(places.iter().any(|place| place.contains("notes.txt")), "{places:?}");
    assert!(orphans.iter().all(|orphan| !text(&orphan["reason"]).is_empty()));
    assert_same(&before, &Listing::of(&stranger));
    assert_eq!(histories(node).len(), 1);
}

#[test]
fn a_volume_whose_record_is_damaged_is_an_orphan_and_the_others_live_on() {
    let mut cluster = Cluster::start(1);
    let node = &mut cluster.nodes[0];
    let broken = text(&node.cli(&["create", "broken"]).ok().json()["id"]);
    let mount = node.create_mounted("fine");
    fs::write(mount.join("file"), "x").unwrap();
    node.cli(&["unmount", "fine"]).ok();
    node.stop();
    let folder = node.pool().join("volumes").join(broken);
    for entry in fs::read_dir(&folder).unwrap().flatten().filter(|entry| entry.path().is_file()) {
        fs::write(entry.path(), b"garbage").unwrap();
    }

    node.start();

    assert_eq!(histories(node).keys().collect::<Vec<_>>(), ["fine"]);
    let orphans = array(&node.cli(&["pool", "status"]).ok().json()["orphans"]);
    assert!(!orphans.is_empty());
    assert!(folder.join("head").is_dir());
    assert_eq!(fs::read_to_string(node.mount("fine").join("file")).unwrap(), "x");
}
