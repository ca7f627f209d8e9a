//! Snapshots that were destroyed are still known as ancestors: what descends from them is a fast-forward.

use std::{fs, path::Path};

use flocker_tests::{
    Cluster, Node,
    invariants::{assert_sound, histories, text},
    situations::{Pools, take, write_and_take},
};
use serde_json::Value;

fn destroy(node: &Node, snapshot: &str) {
    node.cli(&["destroy", snapshot]).ok();
}

fn inspect(node: &Node, snapshot: &str) -> Value {
    node.cli(&["inspect", snapshot]).ok().json()
}

/// Writes a snapshot's name into a mounted volume and takes it.
fn next(node: &Node, mount: &Path, snapshot: &str) {
    fs::write(mount.join("file"), snapshot).unwrap();
    take(node, "db", snapshot);
}

fn head_says(node: &Node) -> String {
    let said = fs::read_to_string(node.mount_to_read("db").join("file")).unwrap();
    node.cli(&["unmount", "db"]).ok();
    said
}

fn is_fast_forward(transfer: &Value) -> bool {
    transfer["state"] == "done" && transfer["outcome"]["verdict"]["fast-forward"].is_object()
}

/// `host-b` has `one` and `two`; `host-a` went on to `four` and has destroyed `two` and `three`.
fn two_destroyed_in_a_row(a: &Node, b: &Node) {
    let mount = a.create_mounted("db");
    next(a, &mount, "one");
    next(a, &mount, "two");
    a.push("db@two", &b.name);
    next(a, &mount, "three");
    next(a, &mount, "four");
    destroy(a, "db@two");
    destroy(a, "db@three");
    assert_eq!(histories(a)["db"], ["one", "four"]);
}

/// `host-b` has `one` and `two`; `host-a` has destroyed `two` before it took `three`.
fn newest_destroyed_before_the_next(a: &Node, b: &Node) {
    let mount = a.create_mounted("db");
    next(a, &mount, "one");
    next(a, &mount, "two");
    a.push("db@two", &b.name);
    let two = inspect(a, "db@two")["id"].clone();
    destroy(a, "db@two");
    next(a, &mount, "three");
    assert_eq!(inspect(a, "db@three")["parents"], Value::Array(vec![two]), "the head descends from it");
    assert_eq!(histories(a)["db"], ["one", "three"]);
}

/// Both, by a push and by a pull, on one kind of pool.
fn on(pools: Pools) {
    for arrange in [two_destroyed_in_a_row, newest_destroyed_before_the_next] {
        for pull in [false, true] {
            let Some(mut cluster) = pools.cluster() else { return };
            let (a, b) = cluster.pair();
            arrange(a, b);
            let newest = histories(a)["db"].last().unwrap().clone();
            // What is remembered is on disk.
            a.restart_after_kill();

            let transfer = match pull {
                false => a.push(&format!("db@{newest}"), "host-b"),
                true => b.cli(&["pull", "db", "host-a"]).ok().json(),
            };

            assert!(is_fast_forward(&transfer), "{transfer}");
            assert_eq!(histories(b)["db"], ["one", "two", &newest]);
            assert_eq!(histories(b).len(), 1, "no fork");
            assert_eq!(head_says(b), newest);
            assert_sound(b);
            // The way back says who is ahead.
            let behind = b.cli(&["push", "db@two", "host-a"]).ends_with(4);
            behind.says(&["newer"]);
        }
    }
}

#[test]
fn destroyed_ancestors_are_known_on_directories() {
    on(Pools::Directory);
}

#[test]
fn destroyed_ancestors_are_known_on_btrfs() {
    on(Pools::Btrfs);
}

#[test]
fn destroyed_ancestors_are_known_on_zfs() {
    on(Pools::Zfs);
}

#[test]
fn what_is_remembered_goes_on_to_a_third_node() {
    for arrange in [two_destroyed_in_a_row, newest_destroyed_before_the_next] {
        let mut cluster = Cluster::start(3);
        let [a, b, c] = &mut cluster.nodes[..] else { panic!("three nodes") };
        arrange(a, b);
        let newest = histories(a)["db"].last().unwrap().clone();
        a.push(&format!("db@{newest}"), "host-c");
        a.kill9();
        c.restart_after_kill();
        c.wait_knows("host-b");

        let transfer = c.push(&format!("db@{newest}"), "host-b");

        assert!(is_fast_forward(&transfer), "{transfer}");
        assert_eq!(histories(b)["db"], ["one", "two", &newest]);
        assert_eq!(head_says(b), newest);
    }
}

#[test]
fn a_head_that_is_rolled_back_or_moved_to_a_fork_descends_from_what_it_holds() {
    let mut cluster = Cluster::start(2);
    let (a, b) = cluster.pair();
    newest_destroyed_before_the_next(a, b);
    let (one, three) = (inspect(a, "db@one")["id"].clone(), inspect(a, "db@three")["id"].clone());
    destroy(a, "db@three");
    a.cli(&["unmount", "db"]).ok();

    a.cli(&["rollback", "db@one", "--fork-newer", "side"]).ok();
    take(a, "side", "kept");
    write_and_take(a, "db", "anew");

    assert_eq!(inspect(a, "side@kept")["parents"], Value::Array(vec![three]));
    assert_eq!(inspect(a, "db@anew")["parents"], Value::Array(vec![one]));
    // So the fork is what host-b's volume became, and the volume went another way.
    a.cli(&["push", "db@anew", "host-b"]).ends_with(4).says(&["gone apart"]);
}

#[test]
fn a_replica_whose_newest_was_destroyed_descends_from_the_one_before() {
    let mut cluster = Cluster::start(2);
    let (a, b) = cluster.pair();
    let mount = a.create_mounted("db");
    next(a, &mount, "one");
    next(a, &mount, "two");
    a.push("db@two", "host-b");
    destroy(b, "db@two");
    assert_eq!(head_says(b), "one");

    b.cli(&["promote", "db", "--force"]).ok();
    write_and_take(b, "db", "other");

    assert_eq!(inspect(b, "db@other")["parents"], Value::Array(vec![inspect(b, "db@one")["id"].clone()]));
    b.cli(&["push", "db@other", "host-a"]).ends_with(4).says(&["gone apart"]);
}

#[test]
fn a_crash_before_the_snapshot_is_gone_leaves_it_and_its_place_in_history() {
    let mut cluster = Cluster::start(2);
    let (a, b) = cluster.pair();
    let mount = a.create_mounted("db");
    next(a, &mount, "one");
    next(a, &mount, "two");
    a.push("db@two", "host-b");
    a.stop();
    a.fault = Some("node.snapshot.remembered".to_owned());
    a.start();
    a.cli(&["destroy", "db@two"]).ends_with(5);
    a.fault = None;
    a.wait_end();
    a.start();

    assert_eq!(histories(a)["db"], ["one", "two"]);
    write_and_take(a, "db", "three");
    let two = inspect(a, "db@two")["id"].clone();
    assert_eq!(inspect(a, "db@three")["parents"], Value::Array(vec![two]));
    assert!(is_fast_forward(&a.push("db@three", "host-b")));
    assert_eq!(histories(b)["db"], ["one", "two", "three"]);
}

#[test]
fn the_log_draws_one_line_past_what_was_destroyed() {
    let mut cluster = Cluster::start(2);
    let (a, b) = cluster.pair();
    two_destroyed_in_a_row(a, b);

    let graph = a.cli(&["log", "db"]).ok().json();

    let (one, four) = (text(&inspect(a, "db@one")["id"]), text(&inspect(a, "db@four")["id"]));
    assert_eq!(graph["edges"], serde_json::json!([{"child": four, "parent": one}]));
    let drawn = a.cli_for_people(&["log", "db", "--graph"]).ok().stdout;
    assert_eq!(drawn.lines().filter(|line| line.starts_with("*  ")).count(), 2, "{drawn}");
}

#[test]
fn a_node_whose_memory_is_lost_is_on_the_safe_side() {
    let mut cluster = Cluster::start(2);
    let (a, b) = cluster.pair();
    two_destroyed_in_a_row(a, b);
    a.cli(&["unmount", "db"]).ok();
    a.stop();
    for file in ["state.db", "state.db-wal", "state.db-shm"] {
        let _ = fs::remove_file(a.state.join(file));
    }
    a.start();

    b.cli(&["pull", "db", "host-a"]).ends_with(4).says(&["gone apart"]);

    assert_eq!(histories(b)["db"], ["one", "two"]);
    assert_eq!(histories(a)["db"], ["one", "four"]);
}
