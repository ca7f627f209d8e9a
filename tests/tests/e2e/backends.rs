//! The drivers on real file systems: the directory driver with reflinks where there are some and hard links to the previous
//! snapshot elsewhere; the btrfs driver natively, and mixed with directories.

use std::{fs, path::Path};

use flocker_tests::{
    Cluster, Options, Scratch,
    data::{scribble, write_ordinary_tree, write_random, write_small_files},
    invariants::{assert_sound, histories},
    require,
    scratch::FileSystem,
    tree::{Listing, assert_equal, assert_same},
};

const MEBIBYTE: u64 = 1 << 20;

fn used_bytes(place: &Path) -> u64 {
    // What is still on its way to the disk is not counted yet.
    rustix::fs::syncfs(fs::File::open(place).unwrap()).unwrap();
    let stat = rustix::fs::statvfs(place).unwrap();
    (stat.f_blocks - stat.f_bfree) * stat.f_frsize
}

fn on(file_system: FileSystem) -> Option<(Cluster, std::path::PathBuf)> {
    if !require(file_system.name()) {
        return None;
    }
    let scratch = Scratch::new();
    let place = scratch.mount(file_system, "disk", 1024);
    let pool = |name: &str| Some(format!("directory:{}", place.join(name).display()));
    let options = ["a", "b"].map(|name| Options { pool: pool(name), ..Options::default() });
    Some((Cluster::with(scratch, options.to_vec()), place))
}

fn snapshots_share_and_arrive(file_system: FileSystem) {
    let Some((mut cluster, place)) = on(file_system) else { return };
    let (a, b) = cluster.pair();
    let mount = a.create_mounted("db");
    write_ordinary_tree(&mount, 110, 20 * 1024);
    write_small_files(&mount.join("small"), 111, 5_000, 4000);
    write_random(&mount.join("large"), 112, 100 * MEBIBYTE);
    a.cli(&["snapshot", "db@one"]).ok();
    let at_one = Listing::of(&mount);
    let used = used_bytes(&place);

    for number in 0..10 {
        fs::write(mount.join(format!("small/d0000/f{number:06}")), "changed").unwrap();
    }
    a.cli(&["snapshot", "db@two"]).ok();
    let grown = used_bytes(&place).saturating_sub(used);
    assert!(grown < 30 * MEBIBYTE, "ten changed files of 5,000 and 130 MiB took {} MiB", grown >> 20);

    a.push("db@two", "host-b");
    assert_equal(&mount, &b.mount("db"));
    b.cli(&["clone", "db@one", "was"]).ok();
    assert_same(&at_one, &Listing::of(&b.mount("was")));
    assert_sound(a);
    assert_sound(b);
}

#[test]
fn on_xfs_snapshots_share_and_arrive() {
    snapshots_share_and_arrive(FileSystem::Xfs);
}

#[test]
fn on_btrfs_snapshots_share_and_arrive() {
    snapshots_share_and_arrive(FileSystem::Btrfs);
}

#[test]
fn on_ext4_snapshots_share_and_arrive() {
    snapshots_share_and_arrive(FileSystem::Ext4);
}

fn a_snapshot_copies_nothing(file_system: FileSystem) {
    let Some((cluster, place)) = on(file_system) else { return };
    let node = &cluster.nodes[0];
    let mount = node.create_mounted("db");
    write_random(&mount.join("large"), 113, 300 * MEBIBYTE);
    let used = used_bytes(&place);

    node.cli(&["snapshot", "db@one"]).ok();
    scribble(&mount.join("large"), 114, 10);
    node.cli(&["snapshot", "db@two"]).ok();
    node.cli(&["clone", "db@one", "copy"]).ok();

    let grown = used_bytes(&place).saturating_sub(used);
    assert!(grown < 20 * MEBIBYTE, "two snapshots and a clone of 300 MiB took {} MiB", grown >> 20);
    let facts = node.cli(&["pool", "status"]).ok().json()["capabilities"]["facts"].clone();
    assert!(facts["reflink"].as_str().is_some_and(|fact| fact.starts_with("yes")), "{facts}");
}

#[test]
fn on_xfs_a_snapshot_copies_nothing() {
    a_snapshot_copies_nothing(FileSystem::Xfs);
}

#[test]
fn on_btrfs_a_snapshot_copies_nothing() {
    a_snapshot_copies_nothing(FileSystem::Btrfs);
}

#[test]
fn a_volume_moves_between_file_systems() {
    if !require("xfs") || !require("ext4") {
        return;
    }
    let scratch = Scratch::new();
    let places = [scratch.mount(FileSystem::Xfs, "xfs", 512), scratch.mount(FileSystem::Ext4, "ext4", 512)];
    let options = places.map(|place| Options {
        pool: Some(format!("directory:{}", place.join("pool").display())),
        ..Options::default()
    });
    let mut cluster = Cluster::with(scratch, options.to_vec());
    let (a, b) = cluster.pair();
    let mount = a.create_mounted("db");
    write_ordinary_tree(&mount, 115, 10 * 1024);
    a.cli(&["snapshot", "db@one"]).ok();
    a.push("db@one", "host-b");
    scribble(&mount.join("data.bin"), 116, 10);
    a.cli(&["snapshot", "db@two"]).ok();

    let transfer = a.push("db@two", "host-b");

    assert!(transfer["progress"]["delta_bytes"].as_u64().unwrap() < MEBIBYTE, "{transfer}");
    assert_equal(&mount, &b.mount("db"));
}

/// Two nodes, one volume there and back: three snapshots out, a clone, promotion and a change on the way home.
fn history_goes_there_and_back(pools: [String; 2], scratch: Scratch, best_format: &str) {
    let options = pools.map(|pool| Options { pool: Some(pool), ..Options::default() });
    let mut cluster = Cluster::with(scratch, options.to_vec());
    let (a, b) = cluster.pair();
    let formats = a.cli(&["pool", "status"]).ok().json()["capabilities"]["formats"].clone();
    assert_eq!(formats[0], best_format, "{formats}");
    let mount = a.create_mounted("db");
    write_ordinary_tree(&mount, 130, 10 * 1024);
    write_random(&mount.join("large"), 131, 30 * MEBIBYTE);
    a.cli(&["snapshot", "db@one", "-m", "why=first"]).ok();
    a.push("db@one", "host-b");
    scribble(&mount.join("large"), 132, 10);
    a.cli(&["snapshot", "db@two"]).ok();
    fs::remove_file(mount.join("data.bin")).unwrap();
    a.cli(&["snapshot", "db@three"]).ok();
    let transfer = a.push("db@three", "host-b");
    assert!(transfer["progress"]["delta_bytes"].as_u64().unwrap() < 5 * MEBIBYTE, "{transfer}");
    assert_equal(&mount, &b.mount("db"));
    let inspected = b.cli(&["inspect", "db@one"]).ok().json();
    assert_eq!((&inspected["metadata"]["why"], &inspected["host"]["name"]), (&"first".into(), &"host-a".into()));

    b.cli(&["clone", "db@two", "was"]).ok();
    assert!(b.mount("was").join("data.bin").exists());
    b.cli(&["unmount", "db"]).ok();
    b.cli(&["promote", "db", "--force"]).ok();
    let there = b.mount("db");
    fs::write(there.join("order"), "taken on host-b").unwrap();
    b.cli(&["snapshot", "db@four"]).ok();
    a.cli(&["unmount", "db"]).ok();
    let transfer = b.push("db@four", "host-a");
    assert!(transfer["progress"]["delta_bytes"].as_u64().unwrap() < MEBIBYTE, "{transfer}");
    assert_equal(&there, &a.mount("db"));
    assert_eq!(histories(a)["db"], ["one", "two", "three", "four"]);
    assert_eq!(histories(a)["db"], histories(b)["db"]);
    for snapshot in ["db@one", "db@two", "db@three", "db@four"] {
        let [here, there] = [&*a, &*b].map(|node| node.cli(&["inspect", snapshot]).ok().json());
        for field in ["id", "created", "host", "parents", "metadata", "logical_bytes"] {
            assert_eq!(here[field], there[field], "{field} of {snapshot}");
        }
    }
    assert_sound(a);
    assert_sound(b);
}

fn btrfs_pool(scratch: &Scratch, name: &str) -> String {
    format!("btrfs:{}", scratch.mount(FileSystem::Btrfs, name, 512).join("pool").display())
}

#[test]
fn history_goes_natively_between_btrfs_pools() {
    if !require("btrfs") {
        return;
    }
    let scratch = Scratch::new();
    let pools = [btrfs_pool(&scratch, "left"), btrfs_pool(&scratch, "right")];
    history_goes_there_and_back(pools, scratch, "btrfs-send/2");
}

#[test]
fn history_goes_from_a_directory_to_btrfs_and_back() {
    if !require("btrfs") {
        return;
    }
    let scratch = Scratch::new();
    let pools = [format!("directory:{}", scratch.folder("pool").display()), btrfs_pool(&scratch, "right")];
    history_goes_there_and_back(pools, scratch, "flocker-tree/1");
}

#[test]
fn history_goes_from_btrfs_to_a_directory_and_back() {
    if !require("btrfs") {
        return;
    }
    let scratch = Scratch::new();
    let pools = [btrfs_pool(&scratch, "left"), format!("directory:{}", scratch.folder("pool").display())];
    history_goes_there_and_back(pools, scratch, "btrfs-send/2");
}
