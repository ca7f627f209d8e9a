//! Pushes over lines that are long and lose packets, and a sender that moves to another network in the middle.

use std::{fs, net::Ipv4Addr, path::PathBuf, time::Duration};

use flocker_tests::{
    Cluster, LONG, Node, Options, SHORT, Scratch,
    data::{seed, write_ordinary_tree, write_random},
    invariants::{assert_sound, text},
    line::{Bottleneck, Line, Quality},
    require,
    tree::assert_equal,
    wait_until,
};
use serde_json::Value;

const MEBIBYTE: u64 = 1 << 20;

const PUSH: [&str; 4] = ["push", "db@one", "host-b", "--detach"];

/// A line on which nothing is lost, slow enough that a node moves in the middle of a push.
const NARROW: Quality = Quality {
    delay: Duration::from_millis(5),
    loss: 0.0,
    bottleneck: Some(Bottleneck { bytes_per_second: 4 * MEBIBYTE, queue: 200 }),
};

/// Two nodes at the ends of a line. The sender listens everywhere, as a host does that may move.
fn at_its_ends(line: &Line) -> Cluster {
    let [left, right] = &line.ends;
    let anywhere = (Ipv4Addr::UNSPECIFIED, left.listen().port()).into();
    let options = vec![
        Options {
            end: Some(left.clone()),
            listen: Some(anywhere),
            advertise: Some(left.listen()),
            ..Options::default()
        },
        Options { end: Some(right.clone()), listen: Some(right.listen()), ..Options::default() },
    ];
    Cluster::with(Scratch::new(), options)
}

/// Makes `db@one` of 12 MiB that do not compress; returns where it is mounted.
#[track_caller]
fn twelve_mebibytes(node: &Node, seed: u64) -> PathBuf {
    let mount = node.create_mounted("db");
    write_random(&mount.join("data"), seed, 12 * MEBIBYTE);
    node.cli(&["snapshot", "db@one"]).ok();
    mount
}

/// Starts a transfer over a narrow line; returns its id when a third has arrived.
#[track_caller]
fn under_way(line: &Line, by: &Node, arguments: &[&str]) -> String {
    line.set(NARROW);
    let id = text(&by.cli(arguments).ok().json()["id"]);
    wait_until("a third is there", SHORT, || (delta_bytes(&by.transfer(&id)) > 4 * MEBIBYTE).then_some(()));
    id
}

/// Waits for the end of a transfer that went on so many times, and has sent nothing twice.
#[track_caller]
fn ends_whole(by: &Node, id: &str, resumed: u64) {
    let done = by.wait_done(id, LONG);
    assert_eq!(done["progress"]["resumed"], resumed, "{done}");
    assert!(delta_bytes(&done) < 13 * MEBIBYTE, "nothing was sent twice: {done}");
}

fn delta_bytes(transfer: &Value) -> u64 {
    transfer["progress"]["delta_bytes"].as_u64().unwrap()
}

/// Moves an end to another network while a transfer is under way.
#[track_caller]
fn moves(line: &Line, by: &Node, id: &str, end: usize) {
    line.ends[end].move_to(Ipv4Addr::new(10, 77, 9, 9));
    assert_ne!(by.transfer(id)["state"], "done", "too fast to move in the middle of it");
}

#[test]
fn a_push_over_a_long_line_that_loses_one_packet_in_a_hundred_arrives_whole() {
    if !require("tun") {
        return;
    }
    let line = Line::start(seed());
    let mut cluster = at_its_ends(&line);
    let (a, b) = cluster.pair();
    let mount = a.create_mounted("db");
    write_ordinary_tree(&mount, 80, 4096);
    a.cli(&["snapshot", "db@one"]).ok();
    line.set(Quality { delay: Duration::from_millis(50), loss: 0.01, bottleneck: None });

    a.push("db@one", "host-b");

    assert!(line.lost() > 10, "the line lost {} packets", line.lost());
    assert_equal(&mount, &b.mount("db"));
    assert_sound(b);
}

#[test]
fn a_sender_whose_address_changes_in_the_middle_goes_on_with_the_same_connection() {
    if !require("tun") {
        return;
    }
    let line = Line::start(seed());
    let mut cluster = at_its_ends(&line);
    let (a, b) = cluster.pair();
    let mount = twelve_mebibytes(a, 81);
    let id = under_way(&line, a, &PUSH);

    moves(&line, a, &id, 0);

    ends_whole(a, &id, 0);
    assert_equal(&mount, &b.mount("db"));
    assert_sound(b);
}

/// Two nodes that listen everywhere, and tell their peers no address but the one their host has at the time.
fn that_may_both_move(line: &Line) -> Cluster {
    let anywhere = line.ends[0].listen().port();
    let options = line.ends.each_ref().map(|end| Options {
        end: Some(end.clone()),
        listen: Some((Ipv4Addr::UNSPECIFIED, anywhere).into()),
        ..Options::default()
    });
    Cluster::with(Scratch::new(), options.into())
}

#[test]
fn a_receiver_whose_address_changes_in_the_middle_of_a_push_tells_the_sender_which_goes_on() {
    if !require("tun") {
        return;
    }
    let line = Line::start(seed());
    let mut cluster = that_may_both_move(&line);
    let (a, b) = cluster.pair();
    let mount = twelve_mebibytes(a, 82);
    let id = under_way(&line, a, &PUSH);

    moves(&line, a, &id, 1);

    ends_whole(a, &id, 1);
    assert_equal(&mount, &b.mount("db"));
    assert_sound(b);
    let peers = a.http("GET", "/v1/peers", None).is(200).json();
    assert_eq!(peers[0]["addresses"], serde_json::json!(["10.77.9.9:7801", "127.0.0.1:7801"]), "{peers}");
}

#[test]
fn a_push_whose_line_is_cut_for_long_goes_on_where_both_sides_listen_on_the_same_port() {
    if !require("tun") {
        return;
    }
    let line = Line::start(seed());
    let mut cluster = that_may_both_move(&line);
    let (a, b) = cluster.pair();
    let mount = twelve_mebibytes(a, 84);
    let id = under_way(&line, a, &PUSH);

    line.cut();
    // The peer's other address is loopback, where the sender finds itself: that says nothing about the peer.
    let refused = wait_until("it has tried to connect anew in vain", LONG, || {
        let transfer = a.transfer(&id);
        assert_ne!(transfer["state"], "failed", "{transfer}");
        let detail = transfer["problem"]["detail"].as_str().unwrap_or_default();
        detail.contains("nothing answers").then(|| transfer.clone())
    });
    line.mend();

    ends_whole(a, &id, 1);
    assert_eq!((&refused["state"], &refused["problem"]["code"]), (&"interrupted".into(), &"peer_unreachable".into()));
    assert_equal(&mount, &b.mount("db"));
}

#[test]
fn a_push_that_begins_while_the_peer_is_between_two_networks_finds_it_in_the_other() {
    if !require("tun") {
        return;
    }
    let line = Line::start(seed());
    let mut cluster = that_may_both_move(&line);
    let (a, b) = cluster.pair();
    let mount = a.create_mounted("db");
    fs::write(mount.join("data"), "data").unwrap();
    a.cli(&["snapshot", "db@one"]).ok();
    line.cut();
    let before = line.dropped();
    let push = a.start_cli(&["push", "db@one", "host-b"]);
    wait_until("the push asks where the peer was", SHORT, || (line.dropped() > before).then_some(()));

    line.ends[1].move_to(Ipv4Addr::new(10, 77, 9, 9));
    line.mend();

    push.finish(SHORT).ok();
    assert_equal(&mount, &b.mount("db"));
}

#[test]
fn a_sender_whose_address_changes_in_the_middle_of_a_pull_tells_the_receiver_which_goes_on() {
    if !require("tun") {
        return;
    }
    let line = Line::start(seed());
    let mut cluster = that_may_both_move(&line);
    let (a, b) = cluster.pair();
    let mount = twelve_mebibytes(a, 83);
    let id = under_way(&line, b, &["pull", "db@one", "host-a", "--detach"]);

    moves(&line, b, &id, 0);

    ends_whole(b, &id, 1);
    assert_equal(&mount, &b.mount("db"));
    assert_sound(b);
}
