//! The directory driver on real file systems: reflinks where there are some, hard links to the previous snapshot elsewhere.

use std::{fs, path::Path};

use flocker_tests::{
    Cluster, Options, Scratch,
    data::{scribble, write_ordinary_tree, write_random, write_small_files},
    invariants::assert_sound,
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
