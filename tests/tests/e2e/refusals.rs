//! Pushes that would lose something are refused: the operator sees who wrote what and when, and nothing changes.

use std::{fs, os::unix::fs::FileExt as _};

use flocker_tests::{
    Cluster, Node,
    invariants::{array, histories, text},
    scratch::run,
    tree::{Listing, assert_same},
};
use serde_json::Value;

/// Two nodes that share `db@one`.
fn sharing_one() -> Cluster {
    let mut cluster = Cluster::start(2);
    let (a, b) = cluster.pair();
    let mount = a.create_mounted("db");
    fs::write(mount.join("file"), "one").unwrap();
    a.cli(&["snapshot", "db@one"]).ok();
    a.push("db@one", "host-b");
    drop_mount(a);
    let _ = b;
    cluster
}

fn drop_mount(node: &Node) {
    node.cli(&["unmount", "db"]).ok();
}

fn write_and_snapshot(node: &Node, name: &str) {
    let mount = node.mount("db");
    fs::write(mount.join("file"), name).unwrap();
    node.cli(&["snapshot", &format!("db@{name}")]).ok();
    drop_mount(node);
}

/// Pushes, expects the refusal, and holds that the receiver has not changed by a bit.
fn refused(a: &Node, b: &Node, snapshot: &str, words: &[&str]) -> Value {
    let (files, names) = (Listing::of(&b.pool()), histories(b));
    let output = a.cli(&["push", snapshot, "host-b"]).ends_with(4).says(words);
    assert_same(&files.without_folder_times(), &Listing::of(&b.pool()).without_folder_times());
    assert_eq!(names, histories(b));
    let transfer = output.json();
    assert_eq!(transfer["state"], "refused", "{transfer}");
    assert_eq!(transfer["outcome"]["sender"]["name"], "host-a");
    assert_eq!(transfer["outcome"]["receiver"]["name"], "host-b");
    transfer
}

fn day(node: &Node, snapshot: &str) -> String {
    text(&node.cli(&["inspect", snapshot]).ok().json()["created"])[..10].to_owned()
}

#[test]
fn histories_that_went_apart_are_shown_with_both_sides_and_what_they_share() {
    let mut cluster = sharing_one();
    let (a, b) = cluster.pair();
    write_and_snapshot(a, "left");
    b.cli(&["promote", "db", "--force"]).ok();
    write_and_snapshot(b, "right");

    let today = day(b, "db@right");
    let words = ["host-a", "host-b", "one", "left", "right", &today, "flocker "];
    let transfer = refused(a, b, "db@left", &words);

    let verdict = &transfer["outcome"]["verdict"]["diverged"];
    assert_eq!(verdict["common"]["name"], "one", "{transfer}");
    assert!(verdict["only_sender"].to_string().contains("\"left\""), "{verdict}");
    assert!(verdict["only_receiver"].to_string().contains("\"right\""), "{verdict}");
    assert!(verdict["only_receiver"].to_string().contains("\"host-b\""), "{verdict}");
}

#[test]
fn a_receiver_that_is_ahead_is_not_put_back() {
    let mut cluster = sharing_one();
    let (a, b) = cluster.pair();
    b.cli(&["promote", "db", "--force"]).ok();
    write_and_snapshot(b, "newer");

    let transfer = refused(a, b, "db@one", &["host-b", "newer", "one"]);

    assert!(transfer["outcome"]["verdict"]["behind"].is_object(), "{transfer}");
}

#[test]
fn another_volume_of_the_same_name_is_not_written_to() {
    let mut cluster = Cluster::start(2);
    let (a, b) = cluster.pair();
    for node in [&*a, &*b] {
        let mount = node.create_mounted("db");
        fs::write(mount.join("file"), &node.name).unwrap();
        node.cli(&["snapshot", "db@one"]).ok();
        drop_mount(node);
    }

    let transfer = refused(a, b, "db@one", &["host-b", "db", "--on-divergence fork"]);

    assert_eq!(transfer["outcome"]["verdict"]["unrelated"]["reason"], "other-volume-id", "{transfer}");
}

#[test]
fn a_volume_with_no_snapshot_in_common_any_more_is_not_overwritten() {
    let mut cluster = sharing_one();
    let (a, b) = cluster.pair();
    write_and_snapshot(a, "two");
    a.cli(&["destroy", "db@one"]).ok();

    let transfer = refused(a, b, "db@two", &["host-b"]);

    assert_eq!(transfer["outcome"]["verdict"]["unrelated"]["reason"], "no-common-snapshot", "{transfer}");
}

#[test]
fn a_head_with_changes_that_no_snapshot_holds_is_not_overwritten() {
    let mut cluster = sharing_one();
    let (a, b) = cluster.pair();
    write_and_snapshot(a, "two");
    b.cli(&["promote", "db", "--force"]).ok();
    let mount = b.mount("db");
    fs::write(mount.join("file"), "precious").unwrap();
    drop_mount(b);

    let transfer = refused(a, b, "db@two", &["host-b", "changes"]);

    assert!(!transfer["outcome"]["verdict"]["dirty"].is_null(), "{transfer}");
    assert_eq!(fs::read_to_string(b.mount("db").join("file")).unwrap(), "precious");
}

#[test]
fn a_snapshot_that_changed_nothing_is_no_divergence() {
    let mut cluster = sharing_one();
    let (a, b) = cluster.pair();
    b.cli(&["promote", "db", "--force"]).ok();
    b.cli(&["snapshot", "db@idle"]).ok();
    write_and_snapshot(a, "two");

    let transfer = a.push("db@two", "host-b");

    assert!(transfer["outcome"]["verdict"]["fast-forward"].is_object(), "{transfer}");
    assert!(histories(b)["db"].contains(&"two".to_owned()));
}

#[test]
fn reading_a_replica_is_no_divergence() {
    let mut cluster = sharing_one();
    let (a, b) = cluster.pair();
    let replica = b.mount("db");
    assert_eq!(fs::read_to_string(replica.join("file")).unwrap(), "one");
    drop_mount(b);
    write_and_snapshot(a, "two");

    a.push("db@two", "host-b");

    assert_eq!(fs::read_to_string(b.mount("db").join("file")).unwrap(), "two");
}

#[test]
fn a_mounted_replica_without_a_snapshot_is_not_replaced_and_its_mount_is_named() {
    let mut cluster = sharing_one();
    let (a, b) = cluster.pair();
    b.cli(&["destroy", "db@one"]).ok();
    let mount = b.mount("db");
    write_and_snapshot(a, "two");

    let push = a.cli(&["push", "db@two", "host-b"]).ends_with(4);
    push.says(&["mounted", &mount.display().to_string()]);

    drop_mount(b);
    a.push("db@two", "host-b");
}

#[test]
fn a_refused_dry_run_and_a_refused_pull_end_the_same_way() {
    let mut cluster = sharing_one();
    let (a, b) = cluster.pair();
    write_and_snapshot(a, "left");
    b.cli(&["promote", "db", "--force"]).ok();
    write_and_snapshot(b, "right");
    let before = Listing::of(&b.pool()).without_folder_times();

    let dry = a.cli(&["push", "db@left", "host-b", "--dry-run"]);
    assert_eq!(dry.code, 4, "{}", dry.stderr);
    assert!(dry.json()["outcome"]["verdict"]["diverged"].is_object());
    let pull = b.cli(&["pull", "db", "host-a"]).ends_with(4).says(&["left", "right", "host-a", "host-b"]);
    assert!(pull.json()["outcome"]["verdict"]["diverged"].is_object());

    assert_same(&before, &Listing::of(&b.pool()).without_folder_times());
}

#[test]
fn what_rotted_in_a_snapshot_is_not_copied() {
    let mut cluster = Cluster::start(2);
    let (a, b) = cluster.pair();
    let mount = a.create_mounted("db");
    fs::write(mount.join("table"), vec![7; 3_000_000]).unwrap();
    // So that the digest is known on file systems that share extents, too.
    let taken = text(&a.cli(&["snapshot", "db@one", "--checksum"]).ok().json()["id"]).to_owned();
    let pattern = format!("*{taken}*/table");
    let found = run(std::process::Command::new("find").arg(a.pool()).args(["-path", &pattern, "-type", "f"]));
    let inside = fs::File::options().write(true).open(found.trim()).unwrap();
    let modified = inside.metadata().unwrap().modified().unwrap();
    inside.write_all_at(b"rot", 1_000_000).unwrap();
    inside.set_modified(modified).unwrap();

    a.cli(&["push", "db@one", "host-b"]).ends_with(1).says(&["table", "snapshot was made with", "flocker verify"]);
    assert!(array(&b.cli(&["list"]).ok().json()).is_empty());
    let findings = a.cli(&["verify", "db@one", "--checksum"]).ends_with(1).stdout;
    assert!(findings.contains("table"), "{findings}");

    inside.write_all_at(&[7; 3], 1_000_000).unwrap();
    inside.set_modified(modified).unwrap();
    a.push("db@one", "host-b");
    assert_eq!(histories(a), histories(b));
}
