//! The minimal API by the command line, on one node.

use std::fs;

use flocker_tests::{
    Cluster,
    invariants::{array, text},
    tree::{Listing, assert_same},
};
use serde_json::json;

#[test]
fn a_volume_is_created_listed_inspected_and_destroyed() {
    let cluster = Cluster::start(1);
    let node = &cluster.nodes[0];

    let created = node.cli(&["create", "db", "-m", "team=storage", "-m", "tier=gold"]).ok().json();
    assert_eq!(created["name"], "db");
    assert_eq!(created["metadata"], json!({"team": "storage", "tier": "gold"}));
    assert_eq!(created["role"], "primary");

    let listed = array(&node.cli(&["list"]).ok().json());
    assert_eq!(listed.len(), 1);
    assert_eq!(listed[0]["id"], created["id"]);
    let inspected = node.cli(&["inspect", "db"]).ok().json();
    assert_eq!(inspected["id"], created["id"]);
    assert_eq!(inspected["head"], "clean");

    node.cli(&["destroy", "db"]).ok();
    assert!(array(&node.cli(&["list"]).ok().json()).is_empty());
    node.cli(&["inspect", "db"]).ends_with(3).says(&["db"]);
}

#[test]
fn metadata_is_set_key_by_key() {
    let cluster = Cluster::start(1);
    let node = &cluster.nodes[0];
    node.cli(&["create", "db", "-m", "a=1", "-m", "b=2"]).ok();

    node.cli(&["set", "db", "b=3", "c=with = sign and ünïcode"]).ok();

    let inspected = node.cli(&["inspect", "db"]).ok().json();
    assert_eq!(inspected["metadata"], json!({"a": "1", "b": "3", "c": "with = sign and ünïcode"}));
}

#[test]
fn a_snapshot_carries_metadata_host_and_time() {
    let cluster = Cluster::start(1);
    let node = &cluster.nodes[0];
    let mount = node.create_mounted("db");
    fs::write(mount.join("file"), "12345").unwrap();

    let taken = node.cli(&["snapshot", "db@one", "-m", "why=before the upgrade"]).ok().json();
    assert_eq!(taken["name"], "one");
    assert_eq!(taken["host"]["name"], "host-a");
    assert_eq!(taken["host"]["id"], node.cli(&["node", "status"]).ok().json()["id"]);
    assert_eq!(taken["metadata"], json!({"why": "before the upgrade"}));
    assert_eq!(taken["logical_bytes"], 5);
    assert!(text(&taken["created"]).contains('T'), "{taken}");

    let listed = array(&node.cli(&["snapshots", "db"]).ok().json());
    assert_eq!(listed.len(), 1);
    assert_eq!(listed[0]["id"], taken["id"]);
    assert_eq!(node.cli(&["inspect", "db@one"]).ok().json()["id"], taken["id"]);
}

#[test]
fn snapshots_are_listed_oldest_first_and_destroyed_one_by_one() {
    let cluster = Cluster::start(1);
    let node = &cluster.nodes[0];
    let mount = node.create_mounted("db");
    for name in ["one", "two", "three"] {
        fs::write(mount.join(name), name).unwrap();
        node.cli(&["snapshot", &format!("db@{name}")]).ok();
    }

    node.cli(&["destroy", "db@two"]).ok();

    let names: Vec<_> = array(&node.cli(&["snapshots", "db"]).ok().json()).iter().map(|s| text(&s["name"])).collect();
    assert_eq!(names, ["one", "three"]);
    assert_eq!(fs::read_to_string(mount.join("two")).unwrap(), "two");
}

#[test]
fn a_clone_equals_its_snapshot_and_is_written_apart_from_it() {
    let cluster = Cluster::start(1);
    let node = &cluster.nodes[0];
    let mount = node.create_mounted("db");
    flocker_tests::data::write_ordinary_tree(&mount, 1, 256);
    node.cli(&["snapshot", "db@one"]).ok();
    let at_snapshot = Listing::of(&mount);
    fs::write(mount.join("later"), "after the snapshot").unwrap();

    let clone = node.cli(&["clone", "db@one", "db2", "-m", "kind=copy"]).ok().json();
    let clone_mount = node.mount("db2");

    assert_eq!(clone["origin"]["name"], "db@one");
    assert_eq!(clone["metadata"], json!({"kind": "copy"}));
    assert_same(&at_snapshot, &Listing::of(&clone_mount));
    fs::write(clone_mount.join("data.bin"), "other").unwrap();
    assert_ne!(fs::read(mount.join("data.bin")).unwrap(), b"other");
    node.cli(&["destroy", "db@one"]).ends_with(4).says(&["clone"]);
}

#[test]
fn a_rollback_puts_the_head_back_and_refuses_to_lose_newer_history_by_itself() {
    let cluster = Cluster::start(1);
    let node = &cluster.nodes[0];
    let mount = node.create_mounted("db");
    flocker_tests::data::write_ordinary_tree(&mount, 2, 256);
    node.cli(&["snapshot", "db@one"]).ok();
    let at_one = Listing::of(&mount);
    fs::write(mount.join("script.sh"), "changed").unwrap();
    fs::remove_file(mount.join("data.bin")).unwrap();
    node.cli(&["snapshot", "db@two"]).ok();
    let at_two = Listing::of(&mount);

    node.cli(&["rollback", "db@one"]).ends_with(4).says(&["mounted"]);
    node.cli(&["unmount", "db"]).ok();
    node.cli(&["rollback", "db@one"]).ends_with(4).says(&["two"]);
    assert_same(&at_two, &Listing::of(&node.mount("db")));
    node.cli(&["unmount", "db"]).ok();

    node.cli(&["rollback", "db@one", "--fork-newer", "db-newer"]).ok();
    assert_same(&at_one, &Listing::of(&node.mount("db")));
    assert_same(&at_two, &Listing::of(&node.mount("db-newer")));
    let kept = array(&node.cli(&["snapshots", "db-newer"]).ok().json());
    assert_eq!(kept.iter().map(|s| text(&s["name"])).collect::<Vec<_>>(), ["two"]);
}

#[test]
fn a_rollback_discards_newer_history_when_told_to() {
    let cluster = Cluster::start(1);
    let node = &cluster.nodes[0];
    let mount = node.create_mounted("db");
    fs::write(mount.join("file"), "one").unwrap();
    node.cli(&["snapshot", "db@one"]).ok();
    fs::write(mount.join("file"), "two").unwrap();
    node.cli(&["snapshot", "db@two"]).ok();
    fs::write(mount.join("file"), "not even snapshotted").unwrap();
    node.cli(&["unmount", "db"]).ok();

    node.cli(&["rollback", "db@one", "--discard-newer"]).ok();

    assert_eq!(fs::read_to_string(node.mount("db").join("file")).unwrap(), "one");
    assert_eq!(array(&node.cli(&["snapshots", "db"]).ok().json()).len(), 1);
    assert_eq!(node.cli(&["inspect", "db"]).ok().json()["head"], "clean");
}

#[test]
fn a_rollback_of_unsnapshotted_changes_asks_first() {
    let cluster = Cluster::start(1);
    let node = &cluster.nodes[0];
    let mount = node.create_mounted("db");
    fs::write(mount.join("file"), "one").unwrap();
    node.cli(&["snapshot", "db@one"]).ok();
    fs::write(mount.join("file"), "precious").unwrap();
    node.cli(&["unmount", "db"]).ok();

    node.cli(&["rollback", "db@one"]).ends_with(4).says(&["db", "one", "changes that no snapshot holds"]);

    assert_eq!(fs::read_to_string(node.mount("db").join("file")).unwrap(), "precious");
}

#[test]
fn the_node_the_pool_and_no_peers_are_reported() {
    let cluster = Cluster::start(1);
    let node = &cluster.nodes[0];

    let status = node.cli(&["node", "status"]).ok().json();
    assert_eq!(status["name"], "host-a");
    assert_eq!(status["authority"], true);
    assert_eq!(status["pid"], node.pid());
    assert_eq!(text(&status["id"]).len(), 64);
    assert!(status["peak_resident_bytes"].as_u64().unwrap() > 0);

    let pool = node.cli(&["pool", "status"]).ok().json();
    assert_eq!(pool["capabilities"]["driver"], "directory");
    assert_eq!(pool["volumes"], 0);
    assert!(pool["usage"]["total_bytes"].as_u64().unwrap() > 0);
    assert!(array(&node.cli(&["peers"]).ok().json()).is_empty());
    assert!(array(&node.cli(&["transfers"]).ok().json()).is_empty());
}

#[test]
fn output_for_people_names_what_it_lists() {
    let cluster = Cluster::start(1);
    let node = &cluster.nodes[0];
    node.create_mounted("db");
    node.cli(&["snapshot", "db@one"]).ok();

    assert!(node.cli_for_people(&["list"]).ok().stdout.contains("db"));
    let snapshots = node.cli_for_people(&["snapshots", "db"]).ok().stdout;
    assert!(snapshots.contains("one") && snapshots.contains("host-a"), "{snapshots}");
    assert!(node.cli_for_people(&["node", "status"]).ok().stdout.contains("host-a"));
    let lines = node.cli_for_people(&["--output", "jsonl", "snapshots", "db"]).ok().stdout;
    assert_eq!(lines.lines().count(), 1, "{lines}");
}

#[test]
fn a_tampered_snapshot_is_noticed() {
    let cluster = Cluster::start(1);
    let node = &cluster.nodes[0];
    let mount = node.create_mounted("db");
    fs::write(mount.join("file"), "as it was taken").unwrap();
    let taken = node.cli(&["snapshot", "db@one"]).ok().json();
    let verify = "/v1/volumes/db/snapshots/one/verify?compare=contents";
    assert_eq!(node.http("POST", verify, None).is(200).json()["findings"], json!([]));

    let id = text(&taken["id"]);
    let found = flocker_tests::scratch::run(std::process::Command::new("find").arg(node.pool()).args([
        "-path",
        &format!("*{id}*/file"),
        "-type",
        "f",
    ]));
    let inside = found.lines().next().expect("the snapshot is a plain tree in the pool");
    fs::write(inside, "as somebody made it").unwrap();

    let findings = array(&node.http("POST", verify, None).is(200).json()["findings"]);
    assert_eq!(text(&findings[0]["path"]), "file");
}
