//! How fast a node sends: the configuration's limits, what holds a transfer up, and the numbers for monitoring.

use std::{fs, io::Write as _};

use flocker_tests::{
    Cluster, LONG, Node, Scratch,
    data::write_random,
    invariants::{assert_sound, text},
    tree::assert_equal,
    wait_until,
};
use serde_json::Value;

use crate::interrupted::behind_a_line;

const MEBIBYTE: u64 = 1 << 20;

fn configure(node: &Node, text: &str) {
    let mut file = fs::File::options().append(true).open(node.state.join("config.toml")).unwrap();
    file.write_all(text.as_bytes()).unwrap();
}

fn prepare(node: &Node, volume: &str, seed: u64, mebibytes: u64) -> std::path::PathBuf {
    let mount = node.create_mounted(volume);
    write_random(&mount.join("data"), seed, mebibytes * MEBIBYTE);
    node.cli(&["snapshot", &format!("{volume}@one")]).ok();
    mount
}

#[track_caller]
fn wait_held_up(node: &Node, id: &str, by: &str) {
    wait_until(&format!("the transfer is held up by {by}"), LONG, || {
        let transfer = node.transfer(id);
        assert_eq!(transfer["state"], "running", "it ended before it was seen to be held up by {by}: {transfer}");
        (transfer["progress"]["limited_by"] == by).then_some(())
    });
}

#[test]
fn a_configured_limit_is_shared_by_all_transfers_to_a_peer() {
    let mut cluster = Cluster::start(2);
    let (a, b) = cluster.pair();
    let mounts = ["db", "web"].map(|volume| prepare(a, volume, 150, 6));
    a.stop();
    configure(a, "\n[[limits]]\npeer = \"host-*\"\nrate = \"4M\"\n");
    a.start();

    let ids =
        ["db@one", "web@one"].map(|snapshot| text(&a.cli(&["push", snapshot, "host-b", "--detach"]).ok().json()["id"]));
    for id in &ids {
        wait_held_up(a, id, "limit");
    }
    let done = ids.map(|id| a.wait_done(&id, LONG));

    // Together no faster than the limit; how precise and how even it is, the transport's own tests show by their own clock.
    let wire: u64 = done.iter().map(|transfer| transfer["progress"]["wire_bytes"].as_u64().unwrap()).sum();
    let longest = done.iter().map(|transfer| transfer["progress"]["elapsed_ms"].as_u64().unwrap()).max().unwrap();
    assert!(wire * 1000 / longest < 9 * MEBIBYTE / 2, "{wire} bytes in {longest} ms");
    for (mount, volume) in mounts.iter().zip(["db", "web"]) {
        assert_equal(mount, &b.mount(volume));
    }
    // What this node pulls is sent by the other, which has no limit.
    let pulled = a.cli(&["pull", "db", "host-b", "--as", "back"]).ok().json();
    assert_eq!(pulled["state"], "done");
    assert_sound(a);
    assert_sound(b);
}

#[test]
fn a_limit_that_cannot_be_kept_is_refused_with_its_place() {
    let mut cluster = Cluster::start(1);
    let node = &mut cluster.nodes[0];
    node.stop();
    configure(node, "\n[[limits]]\nrate = \"20M\"\nfrom = \"08:00\"\n");
    node.spawn();
    assert_ne!(node.wait_end(), 0);
    let log = node.log_text();
    assert!(log.contains("config.toml:") && log.contains("both `from` and `until`"), "{log}");
}

#[test]
fn a_slow_line_is_told_from_a_slow_receiver() {
    let (mut cluster, proxy) = behind_a_line(Scratch::new());
    let (a, b) = cluster.pair();
    let mount = prepare(a, "db", 151, 24);
    proxy.limit(4 * MEBIBYTE);
    let id = text(&a.cli(&["push", "db@one", "host-b", "--detach"]).ok().json()["id"]);
    wait_held_up(a, &id, "line");
    proxy.limit(0);
    let done = a.wait_done(&id, LONG);
    assert_eq!(done["progress"]["limited_by"], Value::Null, "{done}");
    assert_equal(&mount, &b.mount("db"));
}

#[test]
fn how_much_there_is_to_send_shows_while_it_is_sent() {
    let mut cluster = Cluster::start(2);
    let (a, b) = cluster.pair();
    let mount = prepare(a, "db", 153, 3);
    a.push("db@one", "host-b");
    write_random(&mount.join("more"), 154, 6 * MEBIBYTE);
    a.cli(&["snapshot", "db@two"]).ok();

    expects(a, &["push", "db@two", "host-b"], 6 * MEBIBYTE);
    assert_equal(&mount, &b.mount("db"));
}

#[test]
fn how_much_there_is_to_send_shows_of_many_snapshots() {
    const SNAPSHOTS: u64 = 96;
    let mut cluster = Cluster::start(2);
    let (a, b) = cluster.pair();
    let mount = prepare(a, "db", 158, 3);
    a.push("db@one", "host-b");
    for number in 0..SNAPSHOTS {
        write_random(&mount.join(format!("{number}")), number, 6 * MEBIBYTE / SNAPSHOTS);
        a.cli(&["snapshot", &format!("db@{number}")]).ok();
    }

    expects(a, &["push", &format!("db@{}", SNAPSHOTS - 1), "host-b"], 6 * MEBIBYTE);
    assert_equal(&mount, &b.mount("db"));
}

#[test]
fn how_much_there_is_to_send_shows_where_it_is_pulled() {
    let mut cluster = Cluster::start(2);
    let (a, b) = cluster.pair();
    let mount = prepare(a, "db", 155, 3);
    a.push("db@one", "host-b");
    for (name, seed) in [("two", 156), ("three", 157)] {
        write_random(&mount.join(name), seed, 4 * MEBIBYTE);
        a.cli(&["snapshot", &format!("db@{name}")]).ok();
    }

    // Both steps, and nothing of what is there.
    expects(b, &["pull", "db@three", "host-a"], 8 * MEBIBYTE);
    assert_equal(&mount, &b.mount("db"));
}

/// Runs a transfer, which shows on its way that it has so much to send, and has in the end.
#[track_caller]
fn expects(node: &Node, transfer: &[&str], bytes: u64) {
    let id = text(&node.cli(&[transfer, &["--limit", "2M", "--detach"]].concat()).ok().json()["id"]);
    let expected = wait_until("it shows how much there is to send", LONG, || {
        let transfer = node.transfer(&id);
        assert_eq!(transfer["state"], "running", "it ended before: {transfer}");
        transfer["progress"]["expected_bytes"].as_u64()
    });
    assert!((bytes..bytes + MEBIBYTE).contains(&expected), "{expected} bytes");
    let done = node.wait_done(&id, LONG);
    let sent = done["progress"]["delta_bytes"].as_u64().unwrap();
    assert!(sent.abs_diff(expected) < MEBIBYTE / 8, "{sent} bytes of {expected}");
    // A pull takes what was left out of the reckoning as it comes: the next step is told what is left.
    let in_the_end = done["progress"]["expected_bytes"].as_u64().unwrap();
    assert!(in_the_end.abs_diff(sent) <= expected.abs_diff(sent), "{sent} bytes of {in_the_end}, before {expected}");
}

/// Returns a sample of the numbers by its name with labels.
fn sample(node: &Node, name: &str) -> Option<f64> {
    let answer = node.http("GET", "/metrics", None).is(200);
    assert!(answer.content_type.starts_with("application/openmetrics-text"), "{}", answer.content_type);
    let text = String::from_utf8(answer.body).unwrap();
    assert!(text.ends_with("# EOF\n"), "{text}");
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
}

#[test]
fn what_was_moved_shows_in_the_numbers_of_both_sides() {
    let mut cluster = Cluster::start(2);
    let (a, b) = cluster.pair();
    prepare(a, "db", 152, 2);
    let pushed = a.push("db@one", "host-b");
    b.cli(&["pull", "nope", "host-a"]).ends_with(3);

    let number = |field: &str| pushed["progress"][field].as_f64();
    assert_eq!(sample(a, "flocker_transfers_total{direction=\"push\",state=\"done\"}"), Some(1.0));
    assert_eq!(sample(b, "flocker_transfers_total{direction=\"pull\",state=\"failed\"}"), Some(1.0));
    assert_eq!(sample(a, "flocker_transfer_duration_seconds_count{direction=\"push\"}"), Some(1.0));
    for (unit, field) in [("delta", "delta_bytes"), ("wire", "wire_bytes")] {
        let sent = sample(a, &format!("flocker_{unit}_bytes_total{{direction=\"sent\",peer=\"host-b\"}}"));
        let received = sample(b, &format!("flocker_{unit}_bytes_total{{direction=\"received\",peer=\"host-a\"}}"));
        assert_eq!((sent, received), (number(field), number(field)));
    }
    assert_eq!(sample(a, "flocker_volumes{role=\"primary\"}"), Some(1.0));
    assert_eq!(sample(b, "flocker_volumes{role=\"replica\"}"), Some(1.0));
    assert_eq!(sample(b, "flocker_snapshots"), Some(1.0));
    assert_eq!(sample(a, "flocker_open_transfers{state=\"running\"}"), Some(0.0));
    let pool = a.http("GET", "/v1/pool", None).is(200).json();
    assert_eq!(sample(a, "flocker_pool_size_bytes"), pool["usage"]["total_bytes"].as_f64());
    assert!(sample(a, "flocker_resident_memory_bytes").unwrap() > 1e6);
}
