//! Transfers that are held back: by a limit of their rate, and by a pause.

use flocker_tests::{
    Cluster, LONG, Node, SHORT,
    data::write_random,
    invariants::{array, assert_sound, histories, text},
    tree::assert_equal,
    wait_until,
};
use serde_json::Value;

const MEBIBYTE: u64 = 1 << 20;

fn progress(transfer: &Value, field: &str) -> u64 {
    transfer["progress"][field].as_u64().unwrap_or_else(|| panic!("no {field} in {transfer}"))
}

fn state(node: &Node, id: &str) -> String {
    text(&node.transfer(id)["state"])
}

/// No faster than 4 MiB a second, and not much slower; how precise it is where nothing else runs is measured, not tested.
#[track_caller]
fn assert_held_back(transfer: &Value) {
    assert_eq!(transfer["limit_bytes_per_second"], 4 * MEBIBYTE, "{transfer}");
    let rate = progress(transfer, "wire_bytes") * 1000 / progress(transfer, "elapsed_ms");
    assert!((MEBIBYTE..9 * MEBIBYTE / 2).contains(&rate), "{rate} bytes per second: {transfer}");
}

#[test]
fn a_limit_holds_back_a_push_and_a_pull() {
    let mut cluster = Cluster::start(2);
    let (a, b) = cluster.pair();
    let mount = a.create_mounted("db");
    write_random(&mount.join("data"), 140, 12 * MEBIBYTE);
    a.cli(&["snapshot", "db@one"]).ok();

    let push = a.cli(&["push", "db@one", "host-b", "--limit", "4M"]).ok().json();
    let pull = b.cli(&["pull", "db@one", "host-a", "--as", "copy", "--limit", "4M"]).ok().json();

    assert_held_back(&push);
    assert_held_back(&pull);
    assert_equal(&mount, &b.mount("db"));
    assert_equal(&mount, &b.mount("copy"));
    a.cli(&["push", "db@one", "host-b", "--limit", "10"]).ends_with(2).says(&["at least 1024"]);
}

/// Starts a transfer that takes some ten seconds, and waits until a part of it has arrived.
fn start_slowly(node: &Node, verb: &str, peer: &str) -> String {
    let started = node.cli(&[verb, "db@one", peer, "--detach", "--limit", "4M"]).ok().json();
    let id = text(&started["id"]);
    wait_until("a part has arrived", LONG, || {
        (progress(&node.transfer(&id), "delta_bytes") > 6 * MEBIBYTE).then_some(())
    });
    id
}

fn assert_goes_on_where_it_stopped(verb: &str) {
    let mut cluster = Cluster::start(2);
    let (a, b) = cluster.pair();
    let mount = a.create_mounted("db");
    write_random(&mount.join("data"), 141, 32 * MEBIBYTE);
    a.cli(&["snapshot", "db@one"]).ok();
    let (starter, peer) = if verb == "push" { (&*a, "host-b") } else { (&*b, "host-a") };
    let id = start_slowly(starter, verb, peer);

    let paused = starter.cli(&["transfers", "pause", &id]).ok().json();
    assert_eq!(paused["state"], "paused", "{paused}");
    let arrived = progress(&starter.transfer(&id), "delta_bytes");
    assert!(histories(b).is_empty());
    // It stays where it is, whatever else goes on between the two.
    a.cli(&["create", "other"]).ok();
    a.cli(&["snapshot", "other@one"]).ok();
    a.push("other@one", "host-b");
    starter.cli(&["transfers", "pause", &id]).ok();
    assert_eq!(progress(&starter.transfer(&id), "delta_bytes"), arrived);

    starter.cli(&["transfers", "resume", &id]).ok();
    let done = starter.wait_done(&id, LONG);

    assert_eq!(progress(&done, "resumed"), 1, "{done}");
    assert!(progress(&done, "delta_bytes") < 34 * MEBIBYTE, "it started over: {done}");
    assert_equal(&mount, &b.mount("db"));
    starter.cli(&["transfers", "resume", &id]).ends_with(4).says(&["over", "done"]);
    starter.cli(&["transfers", "pause", &id]).ends_with(4).says(&["over", "done"]);
}

#[test]
fn a_paused_push_goes_on_where_it_stopped() {
    assert_goes_on_where_it_stopped("push");
}

#[test]
fn a_paused_pull_goes_on_where_it_stopped() {
    assert_goes_on_where_it_stopped("pull");
}

#[test]
fn a_paused_transfer_stays_so_over_restarts_of_both_daemons() {
    let mut cluster = Cluster::start(2);
    let (a, b) = cluster.pair();
    let mount = a.create_mounted("db");
    write_random(&mount.join("data"), 142, 24 * MEBIBYTE);
    a.cli(&["snapshot", "db@one"]).ok();
    let id = start_slowly(a, "push", "host-b");
    a.cli(&["transfers", "pause", &id]).ok();

    a.kill9();
    b.stop();
    b.start();
    a.start();
    a.wait_knows("host-b");

    assert_eq!(state(a, &id), "paused");
    assert!(histories(b).is_empty());
    // Asking for the same goes on with it.
    let again = a.cli(&["push", "db@one", "host-b", "--limit", "4M"]).ok().json();
    assert_eq!(again["id"], Value::String(id));
    assert_eq!(histories(b)["db"], ["one"]);
    assert_equal(&mount, &b.mount("db"));
    assert_sound(b);
}

#[test]
fn a_paused_transfer_can_be_cancelled() {
    let mut cluster = Cluster::start(2);
    let (a, b) = cluster.pair();
    let mount = a.create_mounted("db");
    write_random(&mount.join("data"), 143, 24 * MEBIBYTE);
    a.cli(&["snapshot", "db@one"]).ok();
    let id = start_slowly(a, "push", "host-b");
    a.cli(&["transfers", "pause", &id]).ok();

    a.cli(&["transfers", "cancel", &id]).ok();

    wait_until("it is cancelled", SHORT, || (state(a, &id) == "cancelled").then_some(()));
    assert!(histories(b).is_empty());
    // A limit is no part of what is asked for once nothing is under way.
    a.push("db@one", "host-b");
    assert_equal(&mount, &b.mount("db"));
    assert_eq!(array(&a.cli(&["transfers"]).ok().json()).len(), 2);
}
