//! Every situation two nodes can be in, under every policy, by push and by pull: what both sides hold afterwards; and
//! that a crash in the middle leaves the old or the new state.

use std::{collections::BTreeMap, fs, io::Write as _, path::Path};

use flocker_tests::{
    Cluster, LONG, Node, Options, Scratch,
    invariants::{array, assert_sound, histories, text, wait_tidy},
    wait_until,
};

/// Two nodes that grant each other everything.
fn open_cluster(scratch: Scratch, options: Vec<Options>) -> Cluster {
    let mut cluster = Cluster::with(scratch, options);
    for node in &mut cluster.nodes {
        node.stop();
        let mut config = fs::File::options().append(true).open(node.state.join("config.toml")).unwrap();
        let right = "\n[[rights]]\npeer = \"*\"\nvolumes = \"*\"\nverbs = [\"read\", \"push\", \"force\"]\n";
        config.write_all(right.as_bytes()).unwrap();
        node.start();
    }
    cluster
}

/// The pools the matrix runs on.
fn directories() -> Cluster {
    open_cluster(Scratch::new(), vec![Options::default(); 2])
}

fn write(node: &Node, volume: &str, contents: &str) {
    let mount = node.mount(volume);
    fs::write(mount.join("file"), contents).unwrap();
    node.cli(&["unmount", volume]).ok();
}

fn take(node: &Node, volume: &str, snapshot: &str) {
    node.cli(&["snapshot", &format!("{volume}@{snapshot}")]).ok();
}

fn write_and_take(node: &Node, volume: &str, snapshot: &str) {
    write(node, volume, snapshot);
    take(node, volume, snapshot);
}

/// What a node holds: each volume's own snapshots and, behind `=`, what its head's file says. Ids in the names of forks
/// and of snapshots that the node took by itself are left out.
fn holdings(node: &Node, of: &str) -> BTreeMap<String, String> {
    let mut held = BTreeMap::new();
    for (volume, snapshots) in histories(node) {
        let name = volume.splitn(3, '.').take(2).collect::<Vec<_>>().join(".");
        if name.split('.').next() != Some(of) {
            continue;
        }
        let names: Vec<&str> =
            snapshots.iter().map(|name| if name.starts_with("before-") { "before" } else { name }).collect();
        let head = fs::read_to_string(node.mount_to_read(&volume).join("file")).unwrap();
        node.cli(&["unmount", &volume]).ok();
        let known = held.insert(name.clone(), format!("{} = {head}", names.join(" ")));
        assert!(known.is_none(), "{name} twice on {}", node.name);
    }
    held
}

fn told(expected: &[(&str, &str)], of: &str) -> BTreeMap<String, String> {
    let name = |name: &&str| name.replace('*', of);
    expected.iter().map(|(volume, held)| (name(volume), (*held).to_owned())).collect()
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Situation {
    UpToDate,
    FastForward,
    Idle,
    Behind,
    Diverged,
    Dirty,
    OtherVolume,
    NothingInCommon,
}
use Situation::*;

const SITUATIONS: [Situation; 8] = [UpToDate, FastForward, Idle, Behind, Diverged, Dirty, OtherVolume, NothingInCommon];

/// Makes the situation; returns the snapshot that a sends.
fn arrange(a: &Node, b: &Node, volume: &str, situation: Situation) -> &'static str {
    a.cli(&["create", volume]).ok();
    write_and_take(a, volume, "one");
    if situation == OtherVolume {
        b.cli(&["create", volume]).ok();
        write_and_take(b, volume, "other");
        return "one";
    }
    a.push(&format!("{volume}@one"), "host-b");
    match situation {
        Idle | Behind | Diverged | Dirty => drop(b.cli(&["promote", volume, "--force"]).ok()),
        _ => {}
    }
    match situation {
        UpToDate => "one",
        Behind => {
            write_and_take(b, volume, "newer");
            "one"
        }
        Diverged => {
            write_and_take(a, volume, "left");
            write_and_take(b, volume, "right");
            "left"
        }
        Idle => {
            take(b, volume, "idle");
            write_and_take(a, volume, "two");
            "two"
        }
        Dirty => {
            write(b, volume, "precious");
            write_and_take(a, volume, "two");
            "two"
        }
        NothingInCommon => {
            write_and_take(a, volume, "two");
            a.cli(&["destroy", &format!("{volume}@one")]).ok();
            "two"
        }
        FastForward => {
            write_and_take(a, volume, "two");
            "two"
        }
        OtherVolume => unreachable!("made above"),
    }
}

type Held = &'static [(&'static str, &'static str)];

/// What each side holds afterwards, and the exit code. `*` is the volume.
fn expected(situation: Situation, policy: &str, pull: bool) -> (i32, Held, Held) {
    match (situation, policy) {
        (UpToDate, _) => (0, &[("*", "one = one")], &[("*", "one = one")]),
        (FastForward, _) => (0, &[("*", "one two = two")], &[("*", "one two = two")]),
        (Idle, _) => (0, &[("*", "one two = two")], &[("*", "one idle two = two")]),

        (Behind, "refuse") => (4, &[("*", "one = one")], &[("*", "one newer = newer")]),
        (Behind, "fork") => (0, &[("*", "one = one")], &[("*", "one newer = newer")]),
        (Behind, "theirs") => (0, &[("*", "one = one")], &[("*", "one = one"), ("*.host-b", "newer = newer")]),
        (Behind, _) => (0, &[("*", "one newer = newer")], &[("*", "one newer = newer")]),

        (Diverged, "refuse") => (4, &[("*", "one left = left")], &[("*", "one right = right")]),
        (Diverged, "fork") => {
            (0, &[("*", "one left = left")], &[("*", "one right = right"), ("*.host-a", "left = left")])
        }
        (Diverged, "theirs") => {
            (0, &[("*", "one left = left")], &[("*", "one left = left"), ("*.host-b", "right = right")])
        }
        (Diverged, _) => (0, &[("*", "one right = right"), ("*.host-a", "left = left")], &[("*", "one right = right")]),

        (Dirty, "refuse") => (4, &[("*", "one two = two")], &[("*", "one = precious")]),
        (Dirty, "fork") => (0, &[("*", "one two = two")], &[("*", "one = precious"), ("*.host-a", "two = two")]),
        (Dirty, "theirs") => {
            (0, &[("*", "one two = two")], &[("*", "one two = two"), ("*.host-b", "before = precious")])
        }
        // The peer's head is not this node's to snapshot: its newest snapshot is what wins. The own head's changes are.
        (Dirty, _) if pull => {
            (0, &[("*", "one before = precious"), ("*.host-a", "two = two")], &[("*", "one before = precious")])
        }
        (Dirty, _) => (0, &[("*", "one = one"), ("*.host-a", "two = two")], &[("*", "one = precious")]),

        (OtherVolume, "refuse") => (4, &[("*", "one = one")], &[("*", "other = other")]),
        (OtherVolume, "fork") => (0, &[("*", "one = one")], &[("*", "other = other"), ("*.host-a", "one = one")]),
        (OtherVolume, "theirs") => (0, &[("*", "one = one")], &[("*", "one = one"), ("*.host-b", "other = other")]),
        (OtherVolume, _) => (0, &[("*", "other = other"), ("*.host-a", "one = one")], &[("*", "other = other")]),

        (NothingInCommon, "fork") => (0, &[("*", "two = two")], &[("*", "one = one"), ("*.host-a", "two = two")]),
        (NothingInCommon, _) => (4, &[("*", "two = two")], &[("*", "one = one")]),
    }
}

fn run(mut cluster: Cluster, policy: &str) {
    let (a, b) = cluster.pair();
    for (number, (situation, pull)) in SITUATIONS.iter().flat_map(|s| [(*s, false), (*s, true)]).enumerate() {
        let volume = format!("v{number}");
        let what = format!("{situation:?} under {policy} by {}", if pull { "pull" } else { "push" });
        let want = arrange(a, b, &volume, situation);
        let snapshot = format!("{volume}@{want}");
        let call = || match pull {
            false => a.cli(&["push", &snapshot, "host-b", "--on-divergence", policy]),
            true => b.cli(&["pull", &snapshot, "host-a", "--on-divergence", policy]),
        };
        let (code, on_a, on_b) = expected(situation, policy, pull);
        let output = call();
        assert_eq!(output.code, code, "{what}\n{}\n{}", output.stdout, output.stderr);
        assert_eq!(holdings(a, &volume), told(on_a, &volume), "host-a after {what}");
        assert_eq!(holdings(b, &volume), told(on_b, &volume), "host-b after {what}");

        // The same again finds it done. What `ours` has moved away has no name there any more.
        if policy != "ours" {
            let again = call();
            assert_eq!(again.code, code, "{what}, again\n{}\n{}", again.stdout, again.stderr);
            assert_eq!(holdings(b, &volume), told(on_b, &volume), "host-b after {what}, again");
        }
    }
    for node in &cluster.nodes {
        assert_sound(node);
        wait_tidy(node);
    }
}

#[test]
fn refusing_changes_nothing() {
    run(directories(), "refuse");
}

#[test]
fn a_fork_keeps_both_and_leaves_the_receivers_volume_alone() {
    run(directories(), "fork");
}

#[test]
fn theirs_takes_the_name_and_keeps_what_gave_way() {
    run(directories(), "theirs");
}

#[test]
fn ours_comes_back_and_keeps_what_gave_way() {
    run(directories(), "ours");
}

#[test]
fn a_mounted_volume_is_not_replaced_and_its_mount_is_named() {
    let mut cluster = directories();
    let (a, b) = cluster.pair();
    arrange(a, b, "db", Diverged);
    let mount = b.mount("db");

    let refused = a.cli(&["push", "db@left", "host-b", "--on-divergence", "theirs"]);
    refused.ends_with(4).says(&["mounted", &mount.display().to_string()]);
    b.cli(&["pull", "db@left", "host-a", "--on-divergence", "theirs"]).ends_with(4).says(&["mounted"]);
    assert_eq!(histories(b)["db"], ["one", "right"]);
    assert_eq!(histories(b).len(), 1);

    // A fork does not touch it.
    a.cli(&["push", "db@left", "host-b", "--on-divergence", "fork"]).ok();
    assert_eq!(fs::read_to_string(mount.join("file")).unwrap(), "right");
    assert_eq!(histories(b).len(), 2);
}

#[test]
fn nobody_rewrites_a_peers_volume_without_the_right_to() {
    let mut cluster = Cluster::start(2);
    let (a, b) = cluster.pair();
    arrange(a, b, "db", Diverged);

    a.cli(&["push", "db@left", "host-b", "--on-divergence", "theirs"]).ends_with(1).says(&["force", "db"]);
    b.cli(&["pull", "db@left", "host-a", "--on-divergence", "ours"]).ends_with(1).says(&["force", "db"]);
    assert_eq!(histories(b)["db"], ["one", "right"]);
    assert_eq!(histories(a)["db"], ["one", "left"]);
    // The own volume is the user's to rewrite.
    b.cli(&["pull", "db@left", "host-a", "--on-divergence", "theirs"]).ok();
    assert_eq!(histories(b)["db"], ["one", "left"]);
}

#[test]
fn a_dry_run_says_what_would_become_of_both() {
    let mut cluster = directories();
    let (a, b) = cluster.pair();
    arrange(a, b, "db", Diverged);

    let fork = a.cli(&["push", "db@left", "host-b", "--on-divergence", "fork", "--dry-run"]).ok().json();
    assert!(text(&fork["resolution"]["landed"]["volume"]).starts_with("db.host-a."), "{fork}");
    let theirs = a.cli(&["push", "db@left", "host-b", "--on-divergence", "theirs", "--dry-run"]).ok().json();
    assert!(text(&theirs["resolution"]["kept"]["place"]["volume"]).starts_with("db.host-b."), "{theirs}");
    assert_eq!(histories(b).len(), 1);

    let done = a.cli(&["push", "db@left", "host-b", "--on-divergence", "theirs"]).ok().json();
    assert_eq!(done["resolution"], theirs["resolution"]);
    assert_eq!(done["outcome"]["name"], "db");
}

#[test]
fn the_log_draws_both_branches_and_marks_who_holds_what() {
    let mut cluster = directories();
    let (a, b) = cluster.pair();
    arrange(a, b, "db", Diverged);
    a.cli(&["push", "db@left", "host-b", "--on-divergence", "fork"]).ok();

    let drawn = b.cli_for_people(&["log", "db", "--graph", "--all-hosts"]).ok().stdout;
    let columns: Vec<&str> = drawn.lines().take(4).map(|line| line.split("  ").next().unwrap()).collect();
    assert!(columns.contains(&"|/") && columns.contains(&"| *"), "{drawn}");
    let place = |name: &str| drawn.lines().find(|line| line.contains(&format!("  {name} ("))).unwrap().to_owned();
    assert!(place("one").contains("host-b:db") && place("one").contains("host-a:db"), "{drawn}");
    assert!(place("left").contains("host-b:db.host-a.") && place("left").contains("host-a:db]"), "{drawn}");
    assert!(place("right").contains("[host-b:db]"), "{drawn}");

    let graph = b.cli(&["log", "db", "--all-hosts"]).ok().json();
    assert_eq!(array(&graph["nodes"]).len(), 3);
    assert_eq!(array(&graph["edges"]).len(), 2);
    assert_eq!(graph["hosts"][1]["answer"], "holds");
    assert_eq!(graph["hosts"][1]["behind"], 1);

    a.kill9();
    let alone = b.cli(&["log", "db", "--all-hosts"]).ok().says(&["host-a", "not known"]).json();
    assert_eq!(alone["hosts"][1]["answer"], "unreachable", "{alone}");
}

/// The fault points of a resolution, found in the source, and the one of the snapshot that keeps a head.
fn points() -> Vec<String> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("node/src/resolve.rs");
    let text = fs::read_to_string(source).unwrap();
    let calls = text.split("fault::point(\"").skip(1).filter_map(|rest| rest.split('"').next());
    calls.chain(["node.head-kept"]).map(str::to_owned).collect()
}

#[test]
fn a_crash_at_any_step_of_a_resolution_is_followed_by_the_rest_of_it() {
    let mut cluster = directories();
    for (number, point) in points().into_iter().enumerate() {
        let (a, b) = cluster.pair();
        let volume = format!("v{number}");
        let situation = if point.contains("rename") { OtherVolume } else { Dirty };
        let want = arrange(a, b, &volume, situation);
        if situation == Dirty {
            write_and_take(a, &volume, "three");
        }
        b.kill9();
        b.fault = Some(point.clone());
        b.start();
        let call = ["push", &format!("{volume}@{}", if situation == Dirty { "three" } else { want }), "host-b"];
        let running = a.start_cli(&[&call[..], &["--on-divergence", "theirs"]].concat());
        wait_until(&format!("host-b dies at {point}"), LONG, || b.is_dead().then_some(()));
        b.kill9();
        b.fault = None;
        // What the crash left is looked at before the sender goes on.
        let found = a.frozen(|| {
            b.start();
            assert_sound(b);
            holdings(b, &volume)
        });
        // What it holds is the old history with the incoming one beside it, or the new one with the old one beside it.
        assert!(
            found.values().any(|held| held.ends_with("= precious") || held.ends_with("= other")),
            "{point}: {found:?}"
        );
        running.finish(LONG).ok();
        let (kept, now) = match situation {
            Dirty => ("before = precious", "one two three = three"),
            _ => ("other = other", "one = one"),
        };
        let wanted = told(&[("*", now), ("*.host-b", kept)], &volume);
        assert_eq!(holdings(b, &volume), wanted, "after {point}");
        assert_sound(b);
        wait_tidy(b);
        let transfers = array(&a.cli(&["transfers"]).ok().json());
        assert!(transfers.iter().all(|transfer| transfer["state"] == "done"), "{transfers:?}");
    }
}
