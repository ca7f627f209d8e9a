//! A daemon dies at each step of each journal in turn: after the restart the old or the new state, nothing half.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

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
    // Neighbours, which one verb passes, go to different shares.
    let mut left: Vec<_> = points.into_iter().skip(share).step_by(SHARES).collect();
    while !left.is_empty() {
        let passed = Doomed::start(&left).run();
        assert!(!passed.is_empty(), "{left:?} are never passed; is the binary built with fault points?");
        left.retain(|point| !passed.contains(point));
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

/// Two nodes, each of which dies once at each of some fault points.
struct Doomed {
    cluster: Cluster,
    /// Those that each of them still dies at.
    left: [Vec<String>; 2],
    passed: BTreeSet<String>,
}

impl Doomed {
    fn start(points: &[String]) -> Self {
        let mut cluster = Cluster::start(2);
        for node in &mut cluster.nodes {
            node.kill9();
            node.fault = Some(points.join(","));
            node.start();
        }
        Self { cluster, left: [points.to_vec(), points.to_vec()], passed: BTreeSet::new() }
    }

    /// Runs every verb once; returns the points at which one died.
    fn run(mut self) -> BTreeSet<String> {
        let tarball = self.cluster.scratch.path().join("db.tar").to_str().unwrap().to_owned();
        self.step(0, &["create", "db", "-m", "k=v"]);
        self.step(0, &["mount", "db"]);
        let mount = self.mount("db");
        write_ordinary_tree(&mount, 90, 1024);
        self.step(0, &["snapshot", "db@one"]);
        self.step(0, &["push", "db@one", "host-b"]);
        // A head that the next receive puts away.
        self.step(1, &["promote", "db", "--force"]);
        self.step(1, &["mount", "db"]);
        self.step(1, &["unmount", "db"]);
        scribble(&mount.join("data.bin"), 91, 20);
        write_random(&mount.join("large"), 94, 70 << 20);
        self.step(0, &["snapshot", "db@two"]);
        self.step(0, &["push", "db@two", "host-b"]);
        self.step(0, &["clone", "db@two", "copy"]);
        self.step(0, &["snapshot", "copy@c1"]);
        self.step(0, &["push", "copy@c1", "host-b"]);
        self.step(0, &["clone", "db@two", "branch"]);
        self.step(0, &["snapshot", "branch@b1"]);
        self.step(0, &["mount", "branch"]);
        write_random(&self.mount("branch").join("unsaved"), 96, 4096);
        self.step(0, &["unmount", "branch"]);
        // What no snapshot of the branch holds is kept first.
        self.step(0, &["merge", "copy", "branch"]);
        self.step(0, &["destroy", "branch"]);
        scribble(&mount.join("data.bin"), 92, 20);
        self.step(0, &["snapshot", "db@three"]);
        scribble(&mount.join("data.bin"), 93, 20);
        self.step(0, &["snapshot", "db@four"]);
        self.step(0, &["clone", "db@four", "late"]);
        self.step(0, &["unmount", "db"]);
        self.step(0, &["rollback", "db@three", "--fork-newer", "newer"]);
        self.step(0, &["mount", "db"]);
        scribble(&mount.join("data.bin"), 95, 20);
        self.step(0, &["unmount", "db"]);
        self.step(0, &["rollback", "db@three", "--discard-newer"]);
        self.step(0, &["destroy", "late"]);
        self.step(0, &["destroy", "newer"]);
        self.step(0, &["rollback", "db@two", "--discard-newer"]);
        self.step(0, &["export", "db@two", "-o", &tarball]);
        self.step(0, &["import", "new", &tarball, "--as-new"]);
        self.step(0, &["destroy", "new"]);
        self.step(0, &["set", "db", "k=w"]);
        self.step(1, &["destroy", "copy"]);
        self.step(0, &["destroy", "copy"]);
        self.step(1, &["destroy", "db@one"]);

        for (node, expected) in self.cluster.nodes.iter().zip([vec!["one", "two"], vec!["two"]]) {
            let found = histories(node);
            assert_eq!(found.keys().collect::<Vec<_>>(), ["db"], "{} after {:?}", node.name, self.passed);
            assert_eq!(found["db"], expected, "{} after {:?}", node.name, self.passed);
            assert_sound(node);
            wait_tidy(node);
        }
        let (a, b) = self.cluster.pair();
        assert_eq!(a.cli(&["inspect", "db"]).ok().json()["metadata"]["k"], "w");
        assert_equal(&a.mount_to_read("db"), &b.mount_to_read("db"));
        self.passed
    }

    fn mount(&self, volume: &str) -> PathBuf {
        let inspected = self.cluster.nodes[0].cli(&["inspect", volume]).ok().json();
        inspected["mount"]["path"].as_str().expect("it is mounted").into()
    }

    /// Runs one call to its end, again as long as somebody dies of a fault meanwhile.
    fn step(&mut self, who: usize, call: &[&str]) {
        // Each node dies at each point once.
        let most = self.left.iter().map(Vec::len).sum::<usize>() + 1;
        for attempt in 0..most {
            let mut running = self.cluster.nodes[who].start_cli(call);
            let mut died = 0;
            while !running.is_over() {
                died += self.heal();
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
            let output = running.finish(LONG);
            if output.code == 5 && died == 0 {
                // The line is lost a moment before the process is gone.
                let nodes = &mut self.cluster.nodes;
                wait_until("the daemon is gone", SHORT, || nodes.iter_mut().any(Node::is_dead).then_some(()));
            }
            died += self.heal();
            let done_before = attempt > 0 && (output.code == 4 || output.code == 3);
            if output.code == 0 || done_before {
                return;
            }
            assert!(died > 0, "{call:?} failed and nobody died\n{}\n{}", output.stderr, output.stdout);
        }
        panic!("{call:?} does not get done");
    }

    /// Starts dead daemons again, first without a fault, and looks at what they left; returns how many died.
    fn heal(&mut self) -> u32 {
        let mut died = 0;
        for (node, left) in self.cluster.nodes.iter_mut().zip(&mut self.left) {
            while node.is_dead() {
                died += 1;
                node.kill9();
                let point = died_at(node);
                eprintln!("--- {} at {point}", node.name);
                let known = left.len();
                left.retain(|other| *other != point);
                assert!(left.len() < known, "{} died at {point}, of which it should not", node.name);
                node.fault = None;
                node.start();
                assert_sound(node);
                let transfers = array(&node.cli(&["transfers"]).ok().json());
                assert!(transfers.iter().all(|transfer| transfer["state"] != "failed"), "{transfers:?}");
                wait_until("only an interrupted receive is left over", LONG, || {
                    (leftovers(&node.pool()).len() <= 1).then_some(())
                });
                self.passed.insert(point);
                if !left.is_empty() {
                    node.stop();
                    node.fault = Some(left.join(","));
                    // It may die on its way up.
                    node.start_or_die();
                }
            }
        }
        died
    }
}

/// Returns the fault point that a node has died at, by its last words.
fn died_at(node: &Node) -> String {
    let log = node.log_text();
    let (_, last) = log.rsplit_once("fault point ").unwrap_or_else(|| panic!("{} died of something else", node.name));
    last.split_once(": killing").expect("a fault point has a name").0.to_owned()
}
