//! A daemon dies at each step of each journal in turn: after the restart the old or the new state, nothing half.

use std::{fs, path::Path};

use flocker_tests::{
    Cluster, LONG, Node, SHORT,
    data::{scribble, write_ordinary_tree, write_random},
    invariants::{array, assert_sound, histories, leftovers, wait_tidy},
    tree::assert_equal,
    wait_until,
};

/// The tests share the points out among themselves, so that they run side by side.
const SHARES: usize = 4;

/// Every fault point that a node on a directory pool passes, found in the sources.
fn points() -> Vec<String> {
    let mut points = Vec::new();
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let mut folders = vec![root.join("storage/src"), root.join("node/src")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap().flatten() {
            if entry.file_type().unwrap().is_dir() {
                folders.push(entry.path());
                continue;
            }
            if entry.path().extension().is_none_or(|extension| extension != "rs") {
                continue;
            }
            let text = fs::read_to_string(entry.path()).unwrap();
            let calls = text.split("fault::point(\"").skip(1).filter_map(|rest| rest.split('"').next());
            // Another driver's points are passed on its own pools only; storage/tests/kill.rs dies at those.
            let ours = |name: &&str| name.starts_with("directory.") || name.starts_with("node.");
            points.extend(calls.filter(ours).map(str::to_owned));
        }
    }
    points.sort();
    points.dedup();
    points
}

fn run_share(share: usize) {
    let points = points();
    assert!(points.len() > 10, "{points:?}");
    for point in points.into_iter().skip(share).step_by(SHARES) {
        eprintln!("--- {point}");
        assert!(survives(&point), "the fault point {point} is never passed; is the binary built with fault points?");
    }
}

#[test]
fn dying_at_a_journal_step_leaves_nothing_half_1_of_4() {
    run_share(0);
}

#[test]
fn dying_at_a_journal_step_leaves_nothing_half_2_of_4() {
    run_share(1);
}

#[test]
fn dying_at_a_journal_step_leaves_nothing_half_3_of_4() {
    run_share(2);
}

#[test]
fn dying_at_a_journal_step_leaves_nothing_half_4_of_4() {
    run_share(3);
}

/// Runs every verb once with a fault point on both nodes; tells whether one died of it.
fn survives(point: &str) -> bool {
    let mut cluster = Cluster::start(2);
    let tarball = cluster.scratch.path().join("db.tar").to_str().unwrap().to_owned();
    for node in &mut cluster.nodes {
        node.kill9();
        node.fault = Some(point.to_owned());
        node.start();
    }
    let mut deaths = 0;
    let [a, b] = cluster.nodes.as_mut_slice() else { unreachable!("two nodes") };
    let mut step = |who: usize, call: &[&str]| deaths += perform(a, b, who, call);

    step(0, &["create", "db", "-m", "k=v"]);
    step(0, &["mount", "db"]);
    let mount = a_mount(&cluster, "db");
    write_ordinary_tree(&mount, 90, 1024);
    let [a, b] = cluster.nodes.as_mut_slice() else { unreachable!("two nodes") };
    let mut step = |who: usize, call: &[&str]| deaths += perform(a, b, who, call);
    step(0, &["snapshot", "db@one"]);
    step(0, &["push", "db@one", "host-b"]);
    // A head that the next receive puts away.
    step(1, &["promote", "db", "--force"]);
    step(1, &["mount", "db"]);
    step(1, &["unmount", "db"]);
    scribble(&mount.join("data.bin"), 91, 20);
    write_random(&mount.join("large"), 94, 70 << 20);
    step(0, &["snapshot", "db@two"]);
    step(0, &["push", "db@two", "host-b"]);
    step(0, &["clone", "db@two", "copy"]);
    step(0, &["snapshot", "copy@c1"]);
    step(0, &["push", "copy@c1", "host-b"]);
    step(0, &["clone", "db@two", "branch"]);
    step(0, &["snapshot", "branch@b1"]);
    step(0, &["mount", "branch"]);
    write_random(&a_mount(&cluster, "branch").join("unsaved"), 96, 4096);
    let [a, b] = cluster.nodes.as_mut_slice() else { unreachable!("two nodes") };
    let mut step = |who: usize, call: &[&str]| deaths += perform(a, b, who, call);
    step(0, &["unmount", "branch"]);
    // What no snapshot of the branch holds is kept first.
    step(0, &["merge", "copy", "branch"]);
    step(0, &["destroy", "branch"]);
    scribble(&mount.join("data.bin"), 92, 20);
    step(0, &["snapshot", "db@three"]);
    scribble(&mount.join("data.bin"), 93, 20);
    step(0, &["snapshot", "db@four"]);
    step(0, &["clone", "db@four", "late"]);
    step(0, &["unmount", "db"]);
    step(0, &["rollback", "db@three", "--fork-newer", "newer"]);
    step(0, &["mount", "db"]);
    scribble(&mount.join("data.bin"), 95, 20);
    step(0, &["unmount", "db"]);
    step(0, &["rollback", "db@three", "--discard-newer"]);
    step(0, &["destroy", "late"]);
    step(0, &["destroy", "newer"]);
    step(0, &["rollback", "db@two", "--discard-newer"]);
    step(0, &["export", "db@two", "-o", &tarball]);
    step(0, &["import", "new", &tarball, "--as-new"]);
    step(0, &["destroy", "new"]);
    step(0, &["set", "db", "k=w"]);
    step(1, &["destroy", "copy"]);
    step(0, &["destroy", "copy"]);
    step(1, &["destroy", "db@one"]);

    for node in [&*a, &*b] {
        let expected: Vec<&str> = if node.name == "host-a" { vec!["one", "two"] } else { vec!["two"] };
        let found = histories(node);
        assert_eq!(found.keys().collect::<Vec<_>>(), ["db"], "{} after {point}", node.name);
        assert_eq!(found["db"], expected, "{} after {point}", node.name);
        assert_sound(node);
        wait_tidy(node);
    }
    assert_eq!(a.cli(&["inspect", "db"]).ok().json()["metadata"]["k"], "w");
    assert_equal(&a.mount_to_read("db"), &b.mount_to_read("db"));
    deaths > 0
}

fn a_mount(cluster: &Cluster, volume: &str) -> std::path::PathBuf {
    cluster.nodes[0].cli(&["inspect", volume]).ok().json()["mount"]["path"].as_str().expect("it is mounted").into()
}

/// Runs one call to its end, starting again what dies of the fault; returns how many died.
fn perform(a: &mut Node, b: &mut Node, who: usize, call: &[&str]) -> u32 {
    let mut deaths = 0;
    for attempt in 0..4 {
        let node = if who == 0 { &*a } else { &*b };
        let mut running = node.start_cli(call);
        let mut died = 0;
        while !running.is_over() {
            died += heal(a, b);
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        let output = running.finish(LONG);
        if output.code == 5 && died == 0 {
            // The line is lost a moment before the process is gone.
            wait_until("the daemon is gone", SHORT, || (a.is_dead() || b.is_dead()).then_some(()));
        }
        died += heal(a, b);
        deaths += died;
        let done_before = attempt > 0 && (output.code == 4 || output.code == 3);
        if output.code == 0 || done_before {
            return deaths;
        }
        assert!(died > 0, "{call:?} failed and nobody died\n{}\n{}", output.stderr, output.stdout);
    }
    panic!("{call:?} does not get done");
}

/// Starts dead daemons again, without the fault, and looks at what they left.
fn heal(a: &mut Node, b: &mut Node) -> u32 {
    let mut died = 0;
    for node in [a, b] {
        if !node.is_dead() {
            continue;
        }
        died += 1;
        node.kill9();
        node.fault = None;
        node.start();
        assert_sound(node);
        let transfers = array(&node.cli(&["transfers"]).ok().json());
        assert!(transfers.iter().all(|transfer| transfer["state"] != "failed"), "{transfers:?}");
        wait_until("only an interrupted receive is left over", LONG, || {
            (leftovers(&node.pool()).len() <= 1).then_some(())
        });
    }
    died
}
