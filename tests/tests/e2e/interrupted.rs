//! A push that loses a daemon or the line in the middle: nothing shows at the receiver, and it goes on where it was.

use std::{fs, path::Path};

use flocker_tests::{
    Cluster, LONG, Node, Options, SHORT, Scratch,
    data::{write_ordinary_tree, write_random},
    invariants::{array, assert_sound, histories, text},
    node::free_address,
    proxy::Proxy,
    tree::{Listing, assert_equal, assert_same},
    wait_until,
};
use serde_json::Value;

/// Two nodes with a line between them that can be slowed down and cut: the second is reached through it.
pub(crate) fn behind_a_line(scratch: Scratch) -> (Cluster, Proxy) {
    let listen = free_address();
    let proxy = Proxy::start(listen);
    let behind = Options { listen: Some(listen), advertise: Some(proxy.address), ..Options::default() };
    (Cluster::with(scratch, vec![Options::default(), behind]), proxy)
}

const MEBIBYTE: u64 = 1 << 20;

/// Slow enough that a push of [`write_large`] takes a while, fast enough for a test.
const SLOW: u64 = 24 * MEBIBYTE;

/// About 200 MiB that do not compress: small files, some large ones, and one very large one.
fn write_large(root: &Path) {
    write_ordinary_tree(root, 60, 1024);
    for number in 0..4 {
        write_random(&root.join(format!("part-{number}")), 61 + number, 20 * MEBIBYTE);
    }
    write_random(&root.join("very-large"), 70, 120 * MEBIBYTE);
}

pub(crate) fn progress(transfer: &Value, field: &str) -> u64 {
    transfer["progress"][field].as_u64().unwrap_or_else(|| panic!("no {field} in {transfer}"))
}

/// Starts a push and waits until a part of it has been taken in by the receiver.
pub(crate) fn push_half_way(a: &Node, snapshot: &str, until_bytes: u64) -> String {
    let id = text(&a.cli(&["push", snapshot, "host-b", "--detach"]).ok().json()["id"]);
    wait_until("the push is half way", LONG, || {
        let transfer = a.transfer(&id);
        assert_ne!(transfer["state"], "done", "too fast to be interrupted: {transfer}");
        (progress(&transfer, "delta_bytes") > until_bytes).then_some(())
    });
    id
}

/// Waits until the newest transfer of a node that was started again is done, asking again where it was given up.
fn finish(a: &Node, snapshot: &str) -> Value {
    let transfers = array(&a.cli(&["transfers"]).ok().json());
    let newest = transfers.first().expect("the transfer is remembered").clone();
    assert!(
        ["interrupted", "running", "done"].contains(&newest["state"].as_str().unwrap()),
        "a transfer that lost its peer is not lost itself: {newest}"
    );
    a.cli(&["push", snapshot, "host-b"]).ok();
    let transfers = array(&a.cli(&["transfers"]).ok().json());
    let carried = transfers.into_iter().find(|transfer| transfer["id"] == newest["id"]).expect("it is remembered");
    if carried["state"] == "done" { carried } else { a.wait_done(&text(&newest["id"]), LONG) }
}

fn assert_went_on(transfer: &Value, before_bytes: u64) {
    assert!(progress(transfer, "resumed") >= 1, "{transfer}");
    let (volume, delta) = (progress(transfer, "volume_bytes"), progress(transfer, "delta_bytes"));
    // Whatever is counted in `delta_bytes` (all attempts, or the last one), a restart from zero would be seen here.
    assert!(delta < volume + before_bytes / 2 + 8 * MEBIBYTE, "it started over: {transfer}");
}

#[test]
fn a_receiver_killed_in_the_middle_shows_nothing_and_goes_on_after_its_restart() {
    let (mut cluster, proxy) = behind_a_line(Scratch::new());
    let (a, b) = cluster.pair();
    let mount = a.create_mounted("db");
    write_large(&mount);
    a.cli(&["snapshot", "db@one"]).ok();
    proxy.limit(SLOW);
    push_half_way(a, "db@one", 100 * MEBIBYTE);
    let before = proxy.forwarded_bytes();

    b.kill9();
    b.start();
    assert!(histories(b).is_empty(), "nothing shows before it is whole");
    let done = finish(a, "db@one");

    assert_went_on(&done, before);
    assert!(proxy.forwarded_bytes() < before + 160 * MEBIBYTE, "most of the first half travelled once only");
    assert_equal(&mount, &b.mount("db"));
    assert_sound(b);
}

#[test]
fn a_sender_killed_in_the_middle_goes_on_after_its_restart() {
    let (mut cluster, proxy) = behind_a_line(Scratch::new());
    let (a, b) = cluster.pair();
    let mount = a.create_mounted("db");
    write_large(&mount);
    a.cli(&["snapshot", "db@one"]).ok();
    proxy.limit(SLOW);
    push_half_way(a, "db@one", 100 * MEBIBYTE);
    let before = proxy.forwarded_bytes();

    a.kill9();
    assert!(histories(b).is_empty(), "nothing shows before it is whole");
    a.start();
    let done = finish(a, "db@one");

    assert_went_on(&done, before);
    assert!(proxy.forwarded_bytes() < before + 160 * MEBIBYTE, "most of the first half travelled once only");
    assert_equal(&mount, &b.mount("db"));
    assert_sound(b);
}

#[test]
fn an_incremental_push_killed_in_the_middle_keeps_the_old_lineage_until_it_is_whole() {
    let (mut cluster, proxy) = behind_a_line(Scratch::new());
    let (a, b) = cluster.pair();
    let mount = a.create_mounted("db");
    write_ordinary_tree(&mount, 62, 4096);
    a.cli(&["snapshot", "db@one"]).ok();
    a.push("db@one", "host-b");
    let at_one = Listing::of(&mount);
    write_random(&mount.join("data.bin"), 63, 60 * MEBIBYTE);
    write_random(&mount.join("new"), 64, 30 * MEBIBYTE);
    a.cli(&["snapshot", "db@two"]).ok();
    proxy.limit(SLOW);
    push_half_way(a, "db@two", 30 * MEBIBYTE);

    b.kill9();
    b.start();
    assert_eq!(histories(b)["db"], ["one"]);
    assert_same(&at_one, &Listing::of(&b.mount("db")));
    b.cli(&["unmount", "db"]).ok();
    finish(a, "db@two");

    assert_eq!(histories(b)["db"], ["one", "two"]);
    assert_equal(&mount, &b.mount("db"));
    assert_sound(b);
}

#[test]
fn a_line_that_is_cut_for_a_while_is_no_failure() {
    let (mut cluster, proxy) = behind_a_line(Scratch::new());
    let (a, b) = cluster.pair();
    let mount = a.create_mounted("db");
    write_large(&mount);
    a.cli(&["snapshot", "db@one"]).ok();
    proxy.limit(SLOW);
    let id = push_half_way(a, "db@one", 50 * MEBIBYTE);

    proxy.cut();
    let stalled = progress(&a.transfer(&id), "delta_bytes");
    // Longer than any connection lives without a word from the other side.
    wait_until("the sender notices", LONG, || {
        let transfer = a.transfer(&id);
        let noticed = transfer["state"] == "interrupted" || !transfer["problem"].is_null();
        let logged = a.log_text().to_lowercase();
        (noticed || logged.contains("lost") || logged.contains("timed out")).then_some(())
    });
    assert!(histories(b).is_empty());
    proxy.mend();
    let done = a.wait_done(&id, LONG);

    assert!(progress(&done, "delta_bytes") >= stalled);
    assert!(progress(&done, "resumed") >= 1, "{done}");
    assert!(proxy.forwarded_bytes() < 240 * MEBIBYTE, "about 200 MiB travelled once only");
    assert_equal(&mount, &b.mount("db"));
}

#[test]
fn a_destroy_that_is_blocked_does_not_cost_the_half_received_snapshot() {
    let (mut cluster, proxy) = behind_a_line(Scratch::new());
    let (a, b) = cluster.pair();
    let mount = a.create_mounted("db");
    write_ordinary_tree(&mount, 67, 64);
    a.cli(&["snapshot", "db@one"]).ok();
    a.push("db@one", "host-b");
    b.cli(&["clone", "db@one", "copy"]).ok();
    write_random(&mount.join("data"), 68, 80 * MEBIBYTE);
    a.cli(&["snapshot", "db@two"]).ok();
    proxy.limit(SLOW);
    let id = push_half_way(a, "db@two", 40 * MEBIBYTE);
    let before = proxy.forwarded_bytes();
    proxy.cut();
    b.wait_logged("waiting for the sender");

    b.cli(&["destroy", "db"]).ends_with(4).says(&["copy"]);
    proxy.mend();
    let done = a.wait_done(&id, LONG);

    assert!(progress(&done, "resumed") >= 1, "{done}");
    assert!(proxy.forwarded_bytes() < before + 60 * MEBIBYTE, "the first half travelled once only");
    assert_equal(&mount, &b.mount("db"));
    b.cli(&["unmount", "db"]).ok();
    b.cli(&["destroy", "copy"]).ok();
    b.cli(&["destroy", "db"]).ok();
    assert_sound(b);
}

#[test]
fn a_short_cut_is_not_even_noticed() {
    let (mut cluster, proxy) = behind_a_line(Scratch::new());
    let (a, b) = cluster.pair();
    let mount = a.create_mounted("db");
    write_random(&mount.join("data"), 65, 60 * MEBIBYTE);
    a.cli(&["snapshot", "db@one"]).ok();
    proxy.limit(SLOW);
    let id = push_half_way(a, "db@one", 10 * MEBIBYTE);

    for _ in 0..3 {
        let (at, dropped) = (proxy.forwarded_bytes(), proxy.dropped());
        proxy.cut();
        wait_until("both sides have tried in vain", SHORT, || (proxy.dropped() > dropped + 10).then_some(()));
        proxy.mend();
        wait_until("bytes flow again", SHORT, || (proxy.forwarded_bytes() > at + MEBIBYTE).then_some(()));
    }

    a.wait_done(&id, LONG);
    assert_equal(&mount, &b.mount("db"));
}

#[test]
fn a_stopped_daemon_suspends_its_receive_and_goes_on() {
    let (mut cluster, proxy) = behind_a_line(Scratch::new());
    let (a, b) = cluster.pair();
    let mount = a.create_mounted("db");
    write_random(&mount.join("data"), 66, 80 * MEBIBYTE);
    fs::write(mount.join("small"), "x").unwrap();
    a.cli(&["snapshot", "db@one"]).ok();
    proxy.limit(SLOW);
    push_half_way(a, "db@one", 30 * MEBIBYTE);

    b.stop();
    b.start();
    finish(a, "db@one");

    assert_equal(&mount, &b.mount("db"));
}
