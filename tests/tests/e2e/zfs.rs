//! The ZFS driver: natively between two hosts, mixed with directories and btrfs, and through kills.
//!
//! Each test runs on zfs-fuse here, and on OpenZFS in the test machine (tests/vm), unless it says otherwise.

use std::{collections::BTreeMap, fs, path::Path};

use flocker_tests::{
    Cluster, LONG, Node, Options, Scratch, ZfsHost,
    data::{scribble, write_ordinary_tree, write_random},
    invariants::{array, assert_sound, histories, text},
    require,
    scratch::FileSystem,
    situations::{Pools, Situation, arrange, holdings, told, write_and_take},
    tree::{Listing, assert_equal, assert_same},
    wait_until,
};
use serde_json::{Value, json};

const MEBIBYTE: u64 = 1 << 20;

/// How a history is carried from pool to pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Carried {
    Natively,
    AsTrees,
}

/// How exactly times are compared: zfs-fuse sets whole seconds when it is told a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Times {
    Exact,
    WholeSeconds,
}

impl Times {
    fn of(host: &ZfsHost) -> Self {
        if host.is_fuse() { Self::WholeSeconds } else { Self::Exact }
    }

    #[track_caller]
    fn assert_equal(self, left: &Path, right: &Path) {
        let listing = |path: &Path| match self {
            Self::Exact => Listing::of(path),
            Self::WholeSeconds => Listing::of(path).in_whole_seconds(),
        };
        assert_same(&listing(left), &listing(right));
    }
}

/// The guids of a host's snapshots. A native stream keeps them, a tree makes new ones.
fn guids(host: &ZfsHost) -> BTreeMap<String, String> {
    let printed = host.zfs(&["get", "-Hp", "-r", "-o", "name,value", "guid", &format!("{}/volumes", host.root())]);
    let lines = printed.lines().filter_map(|line| line.split_once('\t'));
    let snapshots = lines.filter_map(|(name, guid)| Some((name.split_once('@')?.1.to_owned(), guid.to_owned())));
    snapshots.collect()
}

#[track_caller]
fn assert_carried(how: Carried, left: &ZfsHost, right: &ZfsHost) {
    let (left, right) = (guids(left), guids(right));
    assert_eq!(left.keys().collect::<Vec<_>>(), right.keys().collect::<Vec<_>>());
    let same = left.iter().filter(|(name, guid)| right[*name] == **guid).count();
    assert_eq!(same, if how == Carried::Natively { left.len() } else { 0 }, "{how:?}\n{left:?}\n{right:?}");
}

fn native_format(host: &ZfsHost) -> &'static str {
    if host.is_fuse() { "zfs-send/1" } else { "zfs-send/2" }
}

fn delta_bytes(transfer: &Value) -> u64 {
    transfer["progress"]["delta_bytes"].as_u64().unwrap_or_else(|| panic!("no progress in {transfer}"))
}

fn on_directory(scratch: &Scratch) -> Options {
    Options { pool: Some(format!("directory:{}", scratch.folder("pool").display())), ..Options::default() }
}

/// Three snapshots there, a clone, promotion and a change on the way home; a pull of the result by the first.
fn history_goes_there_and_back(scratch: Scratch, options: [Options; 2], times: Times, best_format: &str) -> Cluster {
    let mut cluster = Cluster::with(scratch, options.to_vec());
    let (a, b) = cluster.pair();
    let formats = a.cli(&["pool", "status"]).ok().json()["capabilities"]["formats"].clone();
    assert_eq!(
        (&formats[0], formats.as_array().unwrap().last().unwrap()),
        (&json!(best_format), &json!("flocker-tree/1"))
    );
    let mount = a.create_mounted("db");
    write_ordinary_tree(&mount, 210, 2 * 1024);
    write_random(&mount.join("large"), 211, 4 * MEBIBYTE);
    a.cli(&["snapshot", "db@one", "-m", "why=first"]).ok();
    a.push("db@one", "host-b");
    scribble(&mount.join("large"), 212, 5);
    a.cli(&["snapshot", "db@two"]).ok();
    fs::remove_file(mount.join("data.bin")).unwrap();
    a.cli(&["snapshot", "db@three"]).ok();
    let transfer = a.push("db@three", "host-b");
    assert!(delta_bytes(&transfer) < 2 * MEBIBYTE, "{transfer}");
    assert!(transfer["warnings"].is_null(), "{transfer}");
    times.assert_equal(&mount, &b.mount("db"));
    let inspected = b.cli(&["inspect", "db@one"]).ok().json();
    assert_eq!((&inspected["metadata"]["why"], &inspected["host"]["name"]), (&"first".into(), &"host-a".into()));

    b.cli(&["clone", "db@two", "was"]).ok();
    assert!(b.mount("was").join("data.bin").exists());
    b.cli(&["unmount", "was"]).ok();
    b.cli(&["destroy", "was"]).ok();
    b.cli(&["unmount", "db"]).ok();
    b.cli(&["promote", "db", "--force"]).ok();
    let there = b.mount("db");
    fs::write(there.join("order"), "taken on host-b").unwrap();
    b.cli(&["snapshot", "db@four"]).ok();
    a.cli(&["unmount", "db"]).ok();
    let transfer = a.cli(&["pull", "db@four", "host-b"]).ok().json();
    assert!(delta_bytes(&transfer) < MEBIBYTE, "{transfer}");
    times.assert_equal(&there, &a.mount("db"));
    assert_eq!(histories(a), histories(b));
    assert_sound(a);
    assert_sound(b);
    cluster
}

/// Has a node's log name each program that it starts, and each that found something busy and is started again.
const PROGRAMS_LOGGED: &str = "info,flocker_storage::command=debug,flocker_storage::drivers::zfs::program=debug";

/// Counts the programs that a node has started, those once that it started again.
fn programs(node: &Node) -> usize {
    let log = node.log_text();
    log.matches("starts a program").count() - log.matches("is tried again").count()
}

/// Starts a node's daemon anew and counts the programs that this takes.
fn programs_to_start(node: &mut Node) -> usize {
    node.stop();
    let before = programs(node);
    node.start();
    programs(node) - before
}

#[test]
fn a_snapshot_and_a_push_of_it_take_few_programs() {
    let scratch = Scratch::new();
    let Some(hosts) = ZfsHost::pair(&scratch) else { return };
    let mut cluster = Cluster::with(scratch, hosts.iter().map(|host| host.options()).collect());
    for node in &mut cluster.nodes {
        node.log_filter = Some(PROGRAMS_LOGGED.to_owned());
        programs_to_start(node);
    }
    let (a, b) = cluster.pair();
    let mount = a.create_mounted("db");
    let mut snapshots = Vec::new();
    // Of the sender and of the receiver, by one snapshot and by two.
    let mut pushes = [[Vec::new(), Vec::new()], [Vec::new(), Vec::new()]];
    for number in 1..=15 {
        fs::write(mount.join("file"), number.to_string()).unwrap();
        let snapshot = format!("db@s{number}");
        let before = programs(a);
        a.cli(&["snapshot", &snapshot]).ok();
        snapshots.push(programs(a) - before);
        if number % 3 == 2 {
            continue;
        }
        let before = [programs(a), programs(b)];
        a.push(&snapshot, "host-b");
        let after = [programs(a), programs(b)];
        for side in 0..2 {
            pushes[usize::from(number % 3 == 0)][side].push(after[side] - before[side]);
        }
    }
    let least = |counted: &[usize]| counted[1..].iter().copied().min().unwrap();
    assert!((3..=9).contains(&least(&snapshots)), "{snapshots:?} for snapshots");
    // Of increments. Four at the sender: the listing, and hold, send, release; where a push takes longer than a second, zfs-fuse sends
    // once more, to be counted. At the receiver the look at the head that the answer takes, and what arrived being read. zfs-fuse takes
    // one more for each view that is unmounted. What is listed at the beginning holds for all steps, however many snapshots there are.
    let [[sender, receiver], [sender_of_two, receiver_of_two]] = &pushes;
    assert!((4..=7).contains(&least(sender)), "{pushes:?} for pushes");
    assert!((4..=11).contains(&least(receiver)), "{pushes:?} for pushes");
    assert!((7..=13).contains(&least(sender_of_two)), "{pushes:?} for pushes");
    assert!((8..=18).contains(&least(receiver_of_two)), "{pushes:?} for pushes");
}

#[test]
fn a_start_takes_as_many_programs_whatever_the_pool_holds() {
    let scratch = Scratch::new();
    let Some(hosts) = ZfsHost::pair(&scratch) else { return };
    let mut cluster = Cluster::with(scratch, vec![hosts[0].options()]);
    let node = &mut cluster.nodes[0];
    node.log_filter = Some(PROGRAMS_LOGGED.to_owned());
    programs_to_start(node);
    let empty = programs_to_start(node);
    for volume in ["db", "web", "mail"] {
        node.cli(&["create", volume]).ok();
        for number in 0..3 {
            node.cli(&["snapshot", &format!("{volume}@s{number}")]).ok();
        }
    }
    let full = programs_to_start(node);
    // The first start after the heads were in use unmounts them.
    let again = programs_to_start(node);
    assert!((1..20).contains(&empty), "{empty}");
    assert!(full <= empty + 3, "{full} programs, {empty} with an empty pool");
    assert_eq!(again, empty);
    assert_eq!(array(&node.cli(&["snapshots", "mail"]).ok().json()).len(), 3);
}

/// Natively, and to a directory. On zfs-fuse the stream is counted, OpenZFS is asked.
#[test]
fn a_dry_run_says_how_much_would_be_sent_before_anything_is() {
    let scratch = Scratch::new();
    let Some(hosts) = ZfsHost::pair(&scratch) else { return };
    let [left, right] = &hosts;
    // The third node lives on the second one's host, with another pool.
    let listen = right.options().listen.map(|mut address| {
        address.set_port(address.port() + 1);
        address
    });
    let beside = Options { host: Some(right.clone()), listen, ..on_directory(&scratch) };
    let mut cluster = Cluster::with(scratch, vec![left.options(), right.options(), beside]);
    let a = &mut cluster.nodes[0];
    let mount = a.create_mounted("db");
    write_random(&mount.join("stays"), 230, 6 * MEBIBYTE);
    a.cli(&["snapshot", "db@one"]).ok();
    for number in [231, 232] {
        write_random(&mount.join("changes"), number, MEBIBYTE);
        a.cli(&["snapshot", &format!("db@s{number}")]).ok();
    }
    for peer in ["host-b", "host-c"] {
        a.wait_knows(peer);
        a.push("db@one", peer);

        let dry = a.cli(&["push", "db@s232", peer, "--dry-run"]).ok().json();
        let sent = delta_bytes(&a.push("db@s232", peer));

        let expected = dry["progress"]["expected_bytes"].as_u64().unwrap_or_else(|| panic!("no estimate in {dry}"));
        assert_eq!(delta_bytes(&dry), 0, "{dry}");
        assert!(sent > 2 * MEBIBYTE, "{sent}");
        assert!((sent - sent / 8..sent + sent / 4).contains(&expected), "{expected} of {sent} to {peer}");
    }
}

#[test]
fn history_goes_natively_between_zfs_pools() {
    let scratch = Scratch::new();
    let Some(hosts) = ZfsHost::pair(&scratch) else { return };
    let [left, right] = &hosts;
    let options = [left.options(), right.options()];
    let cluster = history_goes_there_and_back(scratch, options, Times::Exact, native_format(left));
    assert_carried(Carried::Natively, left, right);
    drop(cluster);
}

#[test]
fn history_goes_from_zfs_to_a_directory_and_back() {
    let scratch = Scratch::new();
    let Some([host, other]) = ZfsHost::pair(&scratch) else { return };
    let beside = Options { host: Some(other.clone()), listen: other.options().listen, ..on_directory(&scratch) };
    history_goes_there_and_back(scratch, [host.options(), beside], Times::of(&host), native_format(&host));
}

#[test]
fn history_goes_from_a_directory_to_zfs_and_back() {
    let scratch = Scratch::new();
    let Some([host, other]) = ZfsHost::pair(&scratch) else { return };
    let beside = Options { host: Some(other.clone()), listen: other.options().listen, ..on_directory(&scratch) };
    history_goes_there_and_back(scratch, [beside, host.options()], Times::of(&host), "flocker-tree/1");
}

fn btrfs(scratch: &Scratch) -> Option<Options> {
    let pool = || format!("btrfs:{}", scratch.mount(FileSystem::Btrfs, "btrfs", 512).join("pool").display());
    require("btrfs").then(|| Options { pool: Some(pool()), ..Options::default() })
}

/// On zfs-fuse only: the kernel of the test machine has no btrfs.
#[test]
fn history_goes_from_zfs_to_btrfs_and_back() {
    let scratch = Scratch::new();
    if !require("zfs-fuse") {
        return;
    }
    let Some(([host, _], beside)) = ZfsHost::pair(&scratch).zip(btrfs(&scratch)) else { return };
    history_goes_there_and_back(scratch, [host.options(), beside], Times::of(&host), "zfs-send/1");
}

/// On zfs-fuse only: the kernel of the test machine has no btrfs.
#[test]
fn history_goes_from_btrfs_to_zfs_and_back() {
    let scratch = Scratch::new();
    if !require("zfs-fuse") {
        return;
    }
    let Some(([host, _], beside)) = ZfsHost::pair(&scratch).zip(btrfs(&scratch)) else { return };
    history_goes_there_and_back(scratch, [beside, host.options()], Times::of(&host), "btrfs-send/2");
}

#[test]
fn natives_whose_base_came_as_a_tree_fall_back_to_trees() {
    let scratch = Scratch::new();
    let Some(hosts) = ZfsHost::pair(&scratch) else { return };
    let [left, right] = &hosts;
    // The third node lives on the first one's host, with another pool.
    let listen = left.options().listen.map(|mut address| {
        address.set_port(address.port() + 1);
        address
    });
    let source = Options { host: Some(left.clone()), listen, ..on_directory(&scratch) };
    let mut cluster = Cluster::with(scratch, vec![left.options(), right.options(), source]);
    let c = &cluster.nodes[2];
    let mount = c.create_mounted("db");
    write_ordinary_tree(&mount, 220, 2 * 1024);
    c.cli(&["snapshot", "db@one"]).ok();
    c.wait_knows("host-b");
    c.push("db@one", "host-a");
    c.push("db@one", "host-b");
    let (a, b) = cluster.pair();
    assert_carried(Carried::AsTrees, left, right);
    a.cli(&["promote", "db", "--force"]).ok();
    let mount = a.mount("db");
    scribble(&mount.join("data.bin"), 221, 3);
    a.cli(&["snapshot", "db@two"]).ok();

    let transfer = a.push("db@two", "host-b");

    assert!(transfer["warnings"].is_array(), "the user is told: {transfer}");
    assert!(delta_bytes(&transfer) < MEBIBYTE, "{transfer}");
    assert_carried(Carried::AsTrees, left, right);
    assert_equal(&mount, &b.mount("db"));
    assert_eq!(histories(b)["db"], ["one", "two"]);
    a.cli(&["snapshot", "db@three"]).ok();
    if left.is_fuse() {
        // It unmounts what reads a volume that a tree is put in place of: nothing is taken from underneath a user.
        let push = a.cli(&["push", "db@three", "host-b"]).ends_with(4);
        push.says(&["db", "is mounted"]);
        assert_equal(&mount, &b.mount("db"));
        assert_eq!(histories(b)["db"], ["one", "two"]);
        b.cli(&["unmount", "db"]).ok();
    }
    a.push("db@three", "host-b");
    assert_eq!(histories(b)["db"], ["one", "two", "three"]);
    assert_sound(a);
    assert_sound(b);
}

#[test]
fn clones_arrive_as_clones_or_as_trees_and_keep_their_origin() {
    let scratch = Scratch::new();
    let Some(hosts) = ZfsHost::pair(&scratch) else { return };
    let [left, right] = &hosts;
    let mut cluster = Cluster::with(scratch, vec![left.options(), right.options()]);
    let (a, b) = cluster.pair();
    let mount = a.create_mounted("db");
    write_random(&mount.join("large"), 230, 3 * MEBIBYTE);
    a.cli(&["snapshot", "db@one"]).ok();
    a.push("db@one", "host-b");
    a.cli(&["clone", "db@one", "copy"]).ok();
    let copy = a.mount("copy");
    fs::write(copy.join("small"), "of the copy").unwrap();
    a.cli(&["snapshot", "copy@changed"]).ok();

    let transfer = a.push("copy@changed", "host-b");

    assert!(delta_bytes(&transfer) < MEBIBYTE, "what they share stays: {transfer}");
    assert_equal(&copy, &b.mount("copy"));
    let origins = right.zfs(&["get", "-Hp", "-r", "-o", "value", "origin", &format!("{}/volumes", right.root())]);
    assert!(origins.lines().any(|origin| origin.contains("/volumes/")), "it is a clone there: {origins}");
    if !left.is_fuse() {
        assert_carried(Carried::Natively, left, right);
    }
    fs::write(copy.join("small"), "once more").unwrap();
    a.cli(&["snapshot", "copy@again"]).ok();
    b.cli(&["unmount", "copy"]).ok();
    a.push("copy@again", "host-b");
    assert_equal(&copy, &b.mount("copy"));
    assert_sound(b);
}

#[test]
fn what_the_sender_has_destroyed_is_not_in_the_way() {
    let Some(mut cluster) = Pools::Zfs.cluster() else { return };
    let (a, b) = cluster.pair();
    arrange(a, b, "db", Situation::PrunedHere);
    a.push("db@three", "host-b");
    assert_eq!(holdings(b, "db"), told(&[("*", "one two three = three")], "db"));
    // It stays there, and what comes next builds on the newest one.
    write_and_take(a, "db", "four");
    let transfer = a.push("db@four", "host-b");
    assert_eq!(holdings(b, "db"), told(&[("*", "one two three four = four")], "db"), "{transfer}");
    assert_sound(b);
}

/// Starts a push and waits until the receiver has taken in this much of it.
#[track_caller]
fn push_until(a: &Node, snapshot: &str, bytes: u64) -> String {
    let id = text(&a.cli(&["push", snapshot, "host-b", "--detach"]).ok().json()["id"]);
    wait_until("the push is under way", LONG, || {
        let transfer = a.transfer(&id);
        assert_ne!(transfer["state"], "done", "too fast to be interrupted: {transfer}");
        (delta_bytes(&transfer) > bytes).then_some(())
    });
    id
}

/// Waits for the transfer that was interrupted, which goes on by itself, or asks for it once more.
#[track_caller]
fn finish(a: &Node, snapshot: &str) -> Value {
    let newest = array(&a.cli(&["transfers"]).ok().json()).first().expect("it is remembered").clone();
    a.cli(&["push", snapshot, "host-b"]).ok();
    let transfer = a.transfer(&text(&newest["id"]));
    if transfer["state"] == "done" { transfer } else { a.wait_done(&text(&newest["id"]), LONG) }
}

/// A daemon is killed in the middle of a first push, and in the middle of an increment.
fn a_killed_daemon_leaves_the_old_lineage(kill: impl Fn(&mut Node, &mut Node)) {
    let scratch = Scratch::new();
    if !require("zfs-fuse") {
        return;
    }
    let Some([left, right]) = ZfsHost::pair(&scratch) else { return };
    let listen = flocker_tests::node::free_address();
    let proxy = flocker_tests::proxy::Proxy::start(listen);
    let behind = Options { listen: Some(listen), advertise: Some(proxy.address), ..right.options() };
    let mut cluster = Cluster::with(scratch, vec![left.options(), behind]);
    let (a, b) = cluster.pair();
    let mount = a.create_mounted("db");
    write_random(&mount.join("large"), 240, 40 * MEBIBYTE);
    a.cli(&["snapshot", "db@one"]).ok();
    proxy.limit(12 * MEBIBYTE);

    push_until(a, "db@one", 10 * MEBIBYTE);
    kill(a, b);
    assert!(histories(b).is_empty(), "nothing shows before it is whole");
    proxy.limit(0);
    finish(a, "db@one");
    let at_one = Listing::of(&mount);
    assert_same(&at_one, &Listing::of(&b.mount("db")));
    b.cli(&["unmount", "db"]).ok();

    write_random(&mount.join("large"), 241, 40 * MEBIBYTE);
    a.cli(&["snapshot", "db@two"]).ok();
    proxy.limit(12 * MEBIBYTE);
    push_until(a, "db@two", 10 * MEBIBYTE);
    kill(a, b);
    assert_eq!(histories(b)["db"], ["one"]);
    assert_same(&at_one, &Listing::of(&b.mount("db")));
    b.cli(&["unmount", "db"]).ok();
    proxy.limit(0);
    finish(a, "db@two");
    assert_equal(&mount, &b.mount("db"));
    assert_carried(Carried::Natively, &left, &right);
    assert_sound(a);
    assert_sound(b);
}

#[test]
fn a_receiver_killed_in_the_middle_keeps_the_old_lineage_and_gets_the_new_one_later() {
    a_killed_daemon_leaves_the_old_lineage(|_, b| b.restart_after_kill());
}

#[test]
fn a_sender_killed_in_the_middle_leaves_the_old_lineage_and_sends_the_rest_later() {
    a_killed_daemon_leaves_the_old_lineage(|a, _| a.restart_after_kill());
}

#[test]
fn a_pool_in_a_file_is_made_and_found_again() {
    let scratch = Scratch::new();
    let Some([host, _other]) = ZfsHost::pair(&scratch) else { return };
    let pool = format!("zfs:{},size=256M", scratch.path().join("pool.zfs").display());
    let mut node = Node::init(&scratch, "host-a", Options { pool: Some(pool), ..host.options() });
    node.start();
    let mount = node.create_mounted("db");
    fs::write(mount.join("file"), "contents").unwrap();
    node.cli(&["snapshot", "db@one"]).ok();
    node.stop();
    node.start();
    assert_eq!(histories(&node)["db"], ["one"]);
    assert_eq!(fs::read_to_string(node.mount("db").join("file")).unwrap(), "contents");
    assert_sound(&node);
    assert!(Path::new(&scratch.path().join("pool.zfs")).exists());
}
