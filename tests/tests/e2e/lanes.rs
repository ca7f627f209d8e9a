//! One push over several connections.

use std::fs;

use flocker_tests::{Cluster, LONG, Node, Scratch, data::write_random, invariants::assert_sound, tree::assert_equal};

use crate::interrupted::{behind_a_line, progress, push_half_way};

const MEBIBYTE: u64 = 1 << 20;

/// Starts a node again that uses so many connections for a push.
fn with_lanes(node: &mut Node, lanes: &str) {
    node.stop();
    let config = node.state.join("config.toml");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(&config, format!("lanes = {lanes}\n{text}")).unwrap();
}

#[test]
fn a_large_push_is_carried_by_as_many_connections_as_are_configured() {
    let mut cluster = Cluster::start(2);
    let (a, b) = cluster.pair();
    with_lanes(a, "3");
    a.start();
    let mount = a.create_mounted("db");
    write_random(&mount.join("data"), 180, 96 * MEBIBYTE);
    a.cli(&["snapshot", "db@one"]).ok();

    let pushed = a.push("db@one", "host-b");

    assert_eq!(progress(&pushed, "lanes"), 3, "{pushed}");
    assert_equal(&mount, &b.mount("db"));
    // What is small is not worth a second connection, and the ones that were used do not disturb it.
    write_random(&mount.join("more"), 181, MEBIBYTE);
    a.cli(&["snapshot", "db@two"]).ok();
    let pushed = a.push("db@two", "host-b");
    assert!(pushed["progress"]["lanes"].is_null(), "{pushed}");
    // The sender of a pull opens them, too.
    b.cli(&["pull", "db", "host-a", "--as", "copy"]).ok();
    assert_equal(&mount, &b.mount("copy"));
    assert_sound(a);
    assert_sound(b);
}

#[test]
fn a_push_in_lanes_goes_on_after_a_cut_and_sends_nothing_again() {
    let (mut cluster, proxy) = behind_a_line(Scratch::new());
    let (a, b) = cluster.pair();
    with_lanes(a, "3");
    a.start();
    let mount = a.create_mounted("db");
    write_random(&mount.join("data"), 182, 100 * MEBIBYTE);
    a.cli(&["snapshot", "db@one"]).ok();
    proxy.limit(24 * MEBIBYTE);
    let id = push_half_way(a, "db@one", 50 * MEBIBYTE);
    assert_eq!(progress(&a.transfer(&id), "lanes"), 3);

    proxy.cut();
    flocker_tests::wait_until("the sender notices", LONG, || (a.transfer(&id)["state"] == "interrupted").then_some(()));
    proxy.mend();
    let done = a.wait_done(&id, LONG);

    assert!(progress(&done, "resumed") >= 1, "{done}");
    assert!(proxy.forwarded_bytes() < 125 * MEBIBYTE, "100 MiB travelled once only");
    assert_equal(&mount, &b.mount("db"));
    assert_sound(b);
}

#[test]
fn a_number_of_lanes_that_cannot_be_is_refused_with_its_place() {
    let mut cluster = Cluster::start(1);
    let node = &mut cluster.nodes[0];
    with_lanes(node, "9");
    node.spawn();
    assert_ne!(node.wait_end(), 0);
    let log = node.log_text();
    assert!(log.contains("config.toml:1:") && log.contains("1 to 8 connections"), "{log}");
}
