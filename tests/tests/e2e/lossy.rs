//! Pushes over lines that are long and lose packets, and a sender that moves to another network in the middle.

use std::{net::Ipv4Addr, time::Duration};

use flocker_tests::{
    Cluster, Options, SHORT, Scratch,
    data::{seed, write_ordinary_tree, write_random},
    invariants::{assert_sound, text},
    line::{Bottleneck, Line, Quality},
    require,
    tree::assert_equal,
    wait_until,
};

const MEBIBYTE: u64 = 1 << 20;

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
    let mount = a.create_mounted("db");
    write_random(&mount.join("data"), 81, 12 * MEBIBYTE);
    a.cli(&["snapshot", "db@one"]).ok();
    let narrow = Bottleneck { bytes_per_second: 4 * MEBIBYTE, queue: 200 };
    line.set(Quality { delay: Duration::from_millis(5), loss: 0.0, bottleneck: Some(narrow) });
    let id = text(&a.cli(&["push", "db@one", "host-b", "--detach"]).ok().json()["id"]);
    let delta_bytes = || a.transfer(&id)["progress"]["delta_bytes"].as_u64().unwrap();
    wait_until("the push is half way", SHORT, || (delta_bytes() > 4 * MEBIBYTE).then_some(()));

    line.ends[0].move_to(Ipv4Addr::new(10, 77, 9, 9));
    assert_ne!(a.transfer(&id)["state"], "done", "too fast to move in the middle of it");
    let done = a.wait_done(&id, SHORT);

    assert_eq!(done["progress"]["resumed"], 0, "{done}");
    assert!(delta_bytes() < 13 * MEBIBYTE, "nothing travelled twice: {done}");
    assert_equal(&mount, &b.mount("db"));
    assert_sound(b);
}
