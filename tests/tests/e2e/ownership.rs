//! Who may write a volume: promotion when the primary answers and when it does not, primaries that come back, and
//! volumes that are handed over in order.

use std::{
    fs,
    io::Write as _,
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use flocker_tests::{
    Cluster, LONG, Node, Options, Scratch,
    invariants::{array, assert_sound, histories, text, wait_tidy},
    needs, require,
    situations::write,
    wait_until,
};
use serde_json::Value;

fn inspect(node: &Node, volume: &str) -> Value {
    node.cli(&["inspect", volume]).ok().json()
}

fn role(node: &Node, volume: &str) -> String {
    text(&inspect(node, volume)["role"]).to_owned()
}

fn read(node: &Node, volume: &str) -> String {
    let text = fs::read_to_string(node.mount_to_read(volume).join("file")).unwrap();
    node.cli(&["unmount", volume]).ok();
    text
}

/// `db@one` on all nodes, the first one its primary.
fn replicated(nodes: usize) -> Cluster {
    let cluster = Cluster::start(nodes);
    let a = &cluster.nodes[0];
    a.cli(&["create", "db"]).ok();
    write(a, "db", "one");
    a.cli(&["snapshot", "db@one"]).ok();
    for peer in &cluster.nodes[1..] {
        a.push("db@one", &peer.name);
    }
    cluster
}

fn wait_role(node: &Node, volume: &str, wanted: &str) {
    wait_until(&format!("{} is the {wanted} of {volume}", node.name), LONG, || {
        (role(node, volume) == wanted).then_some(())
    });
}

/// Finds the only fork of `db` on a node and returns what its file says.
fn forked(node: &Node) -> String {
    let forks: Vec<String> = histories(node).into_keys().filter(|name| name.starts_with("db.")).collect();
    let [fork] = forks.as_slice() else { panic!("{}: {forks:?}", node.name) };
    read(node, fork)
}

#[test]
fn inspect_tells_how_far_each_peer_is() {
    let mut cluster = replicated(3);
    let [a, b, c] = cluster.nodes.as_mut_slice() else { unreachable!("three nodes") };
    for name in ["two", "three"] {
        write(a, "db", name);
        a.cli(&["snapshot", &format!("db@{name}")]).ok();
    }
    a.push("db@two", "host-b");
    c.kill9();
    let shown = inspect(a, "db");
    assert_eq!(
        (&shown["role"], &shown["primary"], &shown["head"]),
        (&"primary".into(), &"host-a".into(), &"clean".into())
    );
    let expected = serde_json::json!([
        {"host": "host-b", "common": "two", "behind": 1},
        {"host": "host-c", "common": "one", "behind": 2},
    ]);
    assert_eq!(shown["peers"], expected);
    let replica = inspect(b, "db");
    assert_eq!((&replica["role"], &replica["primary"]), (&"replica".into(), &"host-a".into()));
    assert_eq!(replica["peers"], serde_json::json!([{"host": "host-a", "common": "two", "behind": 0}]));
    let told = b.cli_for_people(&["inspect", "db"]).ok().stdout;
    assert!(told.contains("replica of host-a (epoch 0)") && told.contains("host-a has two, the newest"), "{told}");
}

#[test]
fn a_replica_is_not_promoted_while_its_primary_answers_or_may_live() {
    let mut cluster = replicated(2);
    let (a, b) = cluster.pair();
    b.cli(&["promote", "db"]).ends_with(4).says(&["host-a is its primary", "flocker handoff db host-b"]);
    assert_eq!(role(b, "db"), "replica");

    a.kill9();
    b.cli(&["promote", "db"]).ends_with(4).says(&[
        "host-a may be its primary",
        "--force",
        "wrote after db@one",
        "fork",
    ]);
    assert_eq!(role(b, "db"), "replica");

    let promoted = b.cli(&["promote", "db", "--force"]).ok().says(&["host-a", "db@one"]).json();
    assert_eq!(
        (&promoted["role"], &promoted["epoch"], &promoted["primary"]),
        (&"primary".into(), &1.into(), &"host-b".into())
    );
    assert!(text(&promoted["warnings"][0]).contains("wrote after db@one"), "{promoted}");

    // A primary that says it has none any more is in nobody's way.
    a.start();
    wait_role(a, "db", "replica");
    b.cli(&["destroy", "db"]).ok();
    let promoted = a.cli(&["promote", "db"]).ok().json();
    assert_eq!((&promoted["epoch"], promoted.get("warnings")), (&2.into(), None));
}

#[test]
fn a_primary_that_comes_back_follows_the_new_one_and_keeps_its_own_as_a_fork() {
    let mut cluster = replicated(2);
    let (a, b) = cluster.pair();
    write(a, "db", "two");
    a.cli(&["snapshot", "db@two"]).ok();
    write(a, "db", "unsaved");
    a.kill9();
    b.cli(&["promote", "db", "--force"]).ok();
    write(b, "db", "written on host-b");
    b.cli(&["snapshot", "db@b"]).ok();

    a.start();
    wait_role(a, "db", "replica");
    wait_until("host-a has what host-b wrote", LONG, || (histories(a)["db"] == ["one", "b"]).then_some(()));
    assert_eq!((read(a, "db"), forked(a)), ("written on host-b".to_owned(), "unsaved".to_owned()));
    let shown = inspect(a, "db");
    assert_eq!((&shown["epoch"], &shown["primary"]), (&1.into(), &"host-b".into()));
    write(b, "db", "more");
    b.cli(&["snapshot", "db@more"]).ok();
    b.push("db@more", "host-a");
    assert_eq!(read(a, "db"), "more");
    for node in [&*a, &*b] {
        assert_sound(node);
        wait_tidy(node);
    }
}

#[test]
fn a_primary_that_comes_back_clean_only_changes_its_role() {
    let mut cluster = replicated(2);
    let (a, b) = cluster.pair();
    a.kill9();
    b.cli(&["promote", "db", "--force"]).ok();
    a.start();
    wait_role(a, "db", "replica");
    assert_eq!(histories(a).into_keys().collect::<Vec<_>>(), ["db"]);
}

#[test]
fn a_mounted_volume_of_a_primary_that_comes_back_waits_for_its_user() {
    let mut cluster = replicated(2);
    let (a, b) = cluster.pair();
    let mount = a.mount("db");
    a.kill9();
    b.cli(&["promote", "db", "--force"]).ok();
    write(b, "db", "written on host-b");
    b.cli(&["snapshot", "db@b"]).ok();
    a.start();
    wait_until("host-a knows", LONG, || inspect(a, "db").get("warnings").map(drop));
    fs::write(mount.join("file"), "written on host-a").unwrap();
    assert_eq!(role(a, "db"), "primary");
    let told = a.cli_for_people(&["inspect", "db"]).ok().stdout;
    assert!(told.contains("host-b is the primary since epoch 1"), "{told}");

    a.cli(&["unmount", "db"]).ok();
    wait_role(a, "db", "replica");
    wait_until("host-a has what host-b wrote", LONG, || (histories(a)["db"] == ["one", "b"]).then_some(()));
    assert_eq!(forked(a), "written on host-a");
    assert_eq!(inspect(a, "db").get("warnings"), None);
}

#[test]
fn replicas_that_were_promoted_apart_agree_on_one_primary() {
    let mut cluster = replicated(3);
    let [a, b, c] = cluster.nodes.as_mut_slice() else { unreachable!("three nodes") };
    a.kill9();
    c.kill9();
    b.cli(&["promote", "db", "--force"]).ok();
    write(b, "db", "b");
    b.kill9();
    c.start();
    c.cli(&["promote", "db", "--force"]).ok();
    write(c, "db", "c");
    assert_eq!(inspect(c, "db")["epoch"], 1);
    b.start();
    a.start();
    let nodes = [&*a, &*b, &*c];
    wait_until("one of them is the primary", LONG, || {
        (nodes.iter().filter(|node| role(node, "db") == "primary").count() == 1).then_some(())
    });
    assert_eq!(role(a, "db"), "replica");
    // What the one wrote that gave way is a fork there, and the other one is as it was.
    let (winner, loser) = if role(b, "db") == "primary" { (&*b, &*c) } else { (&*c, &*b) };
    assert_eq!(read(winner, "db"), winner.name[5..]);
    wait_until("its fork is there", LONG, || (histories(loser).len() == 2).then_some(()));
    assert_eq!(forked(loser), loser.name[5..]);
    for node in nodes {
        assert_sound(node);
        wait_tidy(node);
    }
}

/// Appends lines to a file as long as it is there; returns how many were written.
fn append_until_gone(path: &Path, begun: &AtomicBool) -> usize {
    for line in 0.. {
        let Ok(mut file) = fs::File::options().append(true).open(path) else { return line };
        if writeln!(file, "{line}").is_err() {
            return line;
        }
        begun.store(line > 100, Ordering::Relaxed);
    }
    unreachable!("the volume is never unmounted")
}

#[test]
fn a_volume_is_handed_over_while_it_is_written_and_no_line_is_lost() {
    let mut cluster = Cluster::start(2);
    let (a, b) = cluster.pair();
    let mount = a.create_mounted("db");
    flocker_tests::data::write_random(&mount.join("bulk"), 7, 16 << 20);
    let log = mount.join("log");
    fs::write(&log, "").unwrap();
    let begun = AtomicBool::new(false);
    let (written, report) = thread::scope(|scope| {
        let writer = scope.spawn(|| append_until_gone(&log, &begun));
        wait_until("something is written", LONG, || begun.load(Ordering::Relaxed).then_some(()));
        let report = a.cli(&["handoff", "db", "host-b"]).ok().json();
        (writer.join().unwrap(), report)
    });
    eprintln!("{written} lines, then nobody could write for {} ms: {report}", report["writes_stopped_ms"]);
    let lines = fs::read_to_string(b.mount("db").join("log")).unwrap();
    let expected: String = (0..written).map(|line| format!("{line}\n")).collect();
    assert!(lines == expected, "{} of {written} lines arrived", lines.lines().count());
    assert!(report["delta_bytes"][1].as_u64() < report["delta_bytes"][0].as_u64(), "{report}");

    assert_eq!((role(a, "db"), role(b, "db")), ("replica".to_owned(), "primary".to_owned()));
    assert_eq!((&inspect(a, "db")["primary"], &inspect(a, "db")["epoch"]), (&"host-b".into(), &1.into()));
    a.cli(&["handoff", "db", "host-b"]).ends_with(4).says(&["replica here, its primary is host-b"]);
    b.cli(&["unmount", "db"]).ok();
    let back = b.cli(&["handoff", "db", "host-a"]).ok().json();
    assert_eq!((&back["primary"], &back["epoch"]), (&"host-a".into(), &2.into()));
    assert_eq!((role(a, "db"), role(b, "db")), ("primary".to_owned(), "replica".to_owned()));
}

#[test]
fn what_cannot_be_handed_over_stays_where_it_is() {
    if !needs::is_root() {
        return assert!(!require("root"));
    }
    let mut cluster = replicated(2);
    let (a, b) = cluster.pair();
    let mount = a.mount("db");
    let still_here = |a: &Node| {
        assert_eq!((role(a, "db"), &inspect(a, "db")["mount"]["read_only"]), ("primary".to_owned(), &false.into()));
        fs::write(mount.join("file"), "still writable").unwrap();
    };

    let user = fs::File::open(mount.join("file")).unwrap();
    a.cli(&["handoff", "db", "host-b", "--wait", "1s"]).ends_with(4).says(&["stop what writes to db", "mounted here"]);
    still_here(a);
    drop(user);

    b.cli(&["mount", "db"]).ok();
    a.cli(&["handoff", "db", "host-b"]).ends_with(4).says(&["host-b answers", "is mounted"]);
    still_here(a);
    assert_eq!(role(b, "db"), "replica");
    b.cli(&["unmount", "db"]).ok();

    b.kill9();
    a.cli(&["handoff", "db", "host-b"]).ends_with(5).says(&["host-b"]);
    still_here(a);
    b.start();
    a.cli(&["handoff", "db", "host-c"]).ends_with(3).says(&["no peer host-c"]);
    a.cli(&["handoff", "db", "host-b"]).ok();
    assert_eq!(role(b, "db"), "primary");
    wait_tidy(a);
    wait_tidy(b);
}

/// A node whose primary died after it had asked; `db` is at its second snapshot.
fn asked_and_dead(point: &str) -> Cluster {
    let mut cluster = replicated(2);
    let (a, b) = cluster.pair();
    write(a, "db", "two");
    a.kill9();
    a.fault = Some(point.to_owned());
    a.start();
    a.mount("db");
    let running = a.start_cli(&["handoff", "db", "host-b"]);
    wait_until(&format!("host-a dies at {point}"), LONG, || a.is_dead().then_some(()));
    running.finish(LONG).ends_with(5);
    a.kill9();
    a.fault = None;
    assert_eq!(histories(b)["db"].len(), 2, "the live part has arrived");
    cluster
}

#[test]
fn a_crash_of_the_old_primary_leaves_one_primary() {
    for point in ["journalled", "unmounted", "delivered", "stepped-down", "asking", "answered", "recorded"] {
        let mut cluster = asked_and_dead(&format!("handoff.{point}"));
        let (a, b) = cluster.pair();
        a.start();
        if ["asking", "answered", "recorded"].contains(&point) {
            wait_role(b, "db", "primary");
            wait_role(a, "db", "replica");
            wait_until("it is settled", LONG, || inspect(a, "db").get("handing_over_to").is_none().then_some(()));
            assert_eq!(inspect(a, "db")["mount"], Value::Null, "{point}");
        } else {
            assert_eq!((role(a, "db"), role(b, "db")), ("primary".to_owned(), "replica".to_owned()), "{point}");
            assert_eq!(inspect(a, "db")["mount"]["read_only"], false, "mounted again after {point}");
            a.cli(&["handoff", "db", "host-b"]).ok();
        }
        assert_eq!(read(b, "db"), "two", "{point}");
        for node in [&*a, &*b] {
            assert_sound(node);
            wait_tidy(node);
        }
    }
}

#[test]
fn a_crash_while_it_is_taken_back_leaves_it_here_and_asks_nobody_again() {
    for point in ["handoff.taken-back", "handoff.mounted-again"] {
        let mut cluster = replicated(2);
        let (a, b) = cluster.pair();
        b.mount_to_read("db");
        a.kill9();
        a.fault = Some(point.to_owned());
        a.start();
        let mount = a.mount("db");
        a.start_cli(&["handoff", "db", "host-b"]).finish(LONG).ends_with(5);
        wait_until(&format!("host-a dies at {point}"), LONG, || a.is_dead().then_some(()));
        a.kill9();
        a.fault = None;
        // Now it would be free to say yes.
        b.cli(&["unmount", "db"]).ok();
        a.start();
        let shown = inspect(a, "db");
        assert_eq!((&shown["role"], shown.get("handing_over_to")), (&"primary".into(), None), "{point}");
        fs::write(mount.join("file"), "still written here").unwrap();
        a.cli(&["snapshot", "db@two"]).ok();
        a.push("db@two", "host-b");
        assert_eq!((role(b, "db").as_str(), read(b, "db").as_str()), ("replica", "still written here"), "{point}");
        assert_sound(a);
        wait_tidy(a);
    }
}

#[test]
fn a_crash_of_the_new_primary_is_waited_for() {
    for point in ["takeover.before-record", "takeover.recorded"] {
        let mut cluster = replicated(2);
        let (a, b) = cluster.pair();
        b.kill9();
        b.fault = Some(point.to_owned());
        b.start();
        write(a, "db", "two");
        let running = a.start_cli(&["handoff", "db", "host-b"]);
        wait_until(&format!("host-b dies at {point}"), LONG, || b.is_dead().then_some(()));
        b.kill9();
        b.fault = None;
        b.start();
        let report = running.finish(LONG).ok().json();
        assert_eq!(
            (&report["epoch"], role(b, "db").as_str(), role(a, "db").as_str()),
            (&1.into(), "primary", "replica")
        );
        assert_eq!(read(b, "db"), "two");
    }
}

#[test]
fn nobody_writes_while_a_hand_over_is_in_doubt_until_it_is_forced() {
    let mut cluster = asked_and_dead("handoff.asking");
    let (a, b) = cluster.pair();
    b.kill9();
    a.start();
    assert_eq!((role(a, "db").as_str(), &inspect(a, "db")["handing_over_to"]), ("replica", &"host-b".into()));
    a.cli(&["mount", "db"]).ends_with(4).says(&["host-b was asked to be the primary of db"]);
    a.cli(&["promote", "db"]).ends_with(4).says(&["flocker promote db --force"]);
    a.cli(&["snapshot", "db@no"]).ends_with(4);
    a.cli(&["destroy", "db"]).ends_with(4).says(&["host-b was asked to be the primary of db"]);

    let forced = a.cli(&["promote", "db", "--force"]).ok().json();
    assert_eq!((&forced["role"], forced.get("handing_over_to")), (&"primary".into(), None));
    let epoch = forced["epoch"].as_u64().unwrap();
    write(a, "db", "three");
    a.cli(&["snapshot", "db@three"]).ok();
    b.start();
    a.push("db@three", "host-b");
    assert_eq!((role(a, "db").as_str(), role(b, "db").as_str()), ("primary", "replica"));
    assert_eq!((read(b, "db").as_str(), inspect(b, "db")["epoch"].as_u64()), ("three", Some(epoch)));
    a.restart_after_kill();
    assert_eq!(role(a, "db"), "primary", "what was taken back is not asked again");
}

#[test]
fn a_question_that_waits_for_the_peer_does_not_undo_a_promotion_by_force() {
    let mut cluster = asked_and_dead("handoff.asking");
    let (a, b) = cluster.pair();
    let before = inspect(b, "db")["epoch"].as_u64().unwrap();
    // The peer was asked to begin the next epoch, and may do so when it comes to the question.
    let forced = b.frozen(|| {
        a.start();
        a.cli(&["promote", "db", "--force"]).ok().json()
    });
    assert_eq!((&forced["role"], forced["epoch"].as_u64()), (&"primary".into(), Some(before + 2)));
    write(a, "db", "three");
    a.cli(&["snapshot", "db@three"]).ok();
    a.push("db@three", "host-b");
    assert_eq!((role(a, "db").as_str(), role(b, "db").as_str()), ("primary", "replica"));
    assert_eq!((read(a, "db").as_str(), read(b, "db").as_str()), ("three", "three"));
}

#[test]
fn a_hand_over_needs_the_right_to_push() {
    let mut cluster = Cluster::with(Scratch::new(), vec![Options::default(); 2]);
    let (a, b) = cluster.pair();
    a.cli(&["create", "db"]).ok();
    b.stop();
    let config = b.state.join("config.toml");
    let mut text = fs::read_to_string(&config).unwrap();
    text.push_str("\n[[rights]]\npeer = \"*\"\nvolumes = \"*\"\nverbs = [\"read\"]\n");
    fs::write(&config, text).unwrap();
    b.start();
    a.cli(&["handoff", "db", "host-b"]).ends_with(1).says(&["host-a has no right to push db here"]);
    assert_eq!(role(a, "db"), "primary");
    assert!(array(&b.cli(&["list"]).ok().json()).is_empty());
}
