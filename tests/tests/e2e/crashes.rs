//! `kill -9` at random moments: after each restart the old or the new state, nothing half, and in the end all agrees.

use std::{
    collections::BTreeMap,
    fs, thread,
    time::{Duration, Instant},
};

use flocker_tests::{
    Cluster, LONG, Node,
    data::{random, scribble, seed, write_ordinary_tree},
    invariants::{Histories, array, assert_sound, histories, wait_tidy},
    tree::{Listing, allocated_bytes, assert_equal, assert_same},
    wait_until,
};
use rand::{Rng, rngs::StdRng};

/// Kills per victim; two tests make 60.
const KILLS: u32 = 30;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victim {
    Sender,
    Receiver,
}

#[test]
fn a_sender_killed_at_random_moments_is_never_half() {
    kill_at_random_moments(Victim::Sender);
}

#[test]
fn a_receiver_killed_at_random_moments_is_never_half() {
    kill_at_random_moments(Victim::Receiver);
}

/// What the volume `db` looked like at each of its snapshots.
struct World {
    random: StdRng,
    listings: BTreeMap<String, Listing>,
    next: u32,
}

/// A call and what the sender's histories are once it is done.
struct Operation {
    call: Vec<String>,
    expected: Histories,
}

fn kill_at_random_moments(victim: Victim) {
    let mut cluster = Cluster::start(2);
    let (a, b) = cluster.pair();
    let mount = a.create_mounted("db");
    write_ordinary_tree(&mount, 80, 3000);
    a.cli(&["unmount", "db"]).ok();
    let mut world = World { random: random(seed()), listings: BTreeMap::new(), next: 0 };
    change_and_snapshot(a, &mut world);
    let mut usual = BTreeMap::<String, Duration>::new();

    for round in 0..KILLS {
        let before = histories(a);
        let operation = world.choose(a, &before, victim);
        let verb = operation.call[0].clone();
        let head_before = head_listing(a);
        let received = histories(b);

        let most = usual.get(&verb).copied().unwrap_or(Duration::from_millis(400));
        let moment = most.mul_f64(world.random.random_range(0.0..1.1));
        let started = Instant::now();
        let mut running = a.start_cli(&operation.call);
        while started.elapsed() < moment && !running.is_over() {
            thread::sleep(Duration::from_millis(1));
        }
        let ended_first = running.is_over();
        match victim {
            Victim::Sender => a.kill9(),
            Victim::Receiver => b.kill9(),
        }
        if ended_first {
            usual.insert(verb.clone(), started.elapsed());
        }
        match victim {
            Victim::Sender => a.start(),
            Victim::Receiver => b.start(),
        }
        let output = running.finish(LONG);
        eprintln!("round {round}: {:?} killed after {moment:?}, exit code {}", operation.call, output.code);

        let after = histories(a);
        assert!(after == before || after == operation.expected, "half done: {before:?} became {after:?}");
        assert!(output.code != 0 || after == operation.expected, "said done and was not: {output:?}");
        let head = head_listing(a);
        let rolled_back = operation.call.get(1).and_then(|name| world.listings.get(name.trim_start_matches("db@")));
        assert!(
            head == head_before || (verb == "rollback" && Some(&head) == rolled_back),
            "the head is half rolled back"
        );
        settle(a);
        assert_received(a, b, &received);
        wait_tidy(a);
        wait_tidy(b);
        if round % 5 == 4 {
            assert_sound(a);
            assert_sound(b);
        }
        change_and_snapshot(a, &mut world);
    }
    converge(a, b, &mut world);
}

impl World {
    fn choose(&mut self, a: &Node, before: &Histories, victim: Victim) -> Operation {
        self.next += 1;
        let number = self.next;
        let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
        let mut expected = before.clone();
        let snapshots = before["db"].clone();
        let newest = snapshots.last().expect("there is always one").clone();
        let clones: Vec<_> = before.keys().filter(|name| *name != "db").cloned().collect();
        let pick = if victim == Victim::Receiver { 4 } else { self.random.random_range(0..7) };
        let call = match pick {
            0 => {
                expected.get_mut("db").unwrap().push(format!("k{number}"));
                words(&["snapshot", &format!("db@k{number}")])
            }
            1 => {
                expected.insert(format!("clone{number}"), Vec::new());
                words(&["clone", &format!("db@{newest}"), &format!("clone{number}")])
            }
            2 if !clones.is_empty() => {
                let clone = &clones[self.random.random_range(0..clones.len())];
                expected.remove(clone);
                words(&["destroy", clone])
            }
            3 if snapshots.len() > 2 && follows_what_is_held(a, &snapshots[snapshots.len() - 2]) => {
                // The newest one before the last push stays, so that there is something in common.
                let at = snapshots.len() - 2;
                expected.get_mut("db").unwrap().remove(at);
                words(&["destroy", &format!("db@{}", snapshots[at])])
            }
            5 | 6 => {
                expected.insert("db".to_owned(), snapshots.clone());
                words(&["rollback", &format!("db@{newest}"), "--discard-newer"])
            }
            _ => words(&["push", &format!("db@{newest}"), "host-b"]),
        };
        if call[0] == "snapshot" || call[0] == "rollback" {
            let mount = a.mount("db");
            scribble(&mount.join("data.bin"), u64::from(number), 30);
            a.cli(&["unmount", "db"]).ok();
        }
        Operation { call, expected }
    }
}

/// Tells whether the snapshot's parent is held too. Of two destroyed in a row no record says any more what the first one was, and
/// a peer that holds it looks as if it had gone another way (docs/DIVERGENCE.md).
fn follows_what_is_held(a: &Node, name: &str) -> bool {
    let held = array(&a.cli(&["snapshots", "db"]).ok().json());
    let snapshot = held.iter().find(|snapshot| snapshot["name"] == name).unwrap();
    snapshot["parents"].as_array().unwrap().iter().all(|parent| held.iter().any(|other| other["id"] == *parent))
}

fn change_and_snapshot(a: &Node, world: &mut World) {
    world.next += 1;
    let name = format!("s{}", world.next);
    let mount = a.mount("db");
    scribble(&mount.join("data.bin"), u64::from(world.next), 30);
    fs::write(mount.join(format!("file-{}", world.next % 7)), &name).unwrap();
    a.cli(&["snapshot", &format!("db@{name}")]).ok();
    world.listings.insert(name, Listing::of(&mount));
    a.cli(&["unmount", "db"]).ok();
}

fn head_listing(a: &Node) -> Listing {
    let listing = Listing::of(&a.mount("db"));
    a.cli(&["unmount", "db"]).ok();
    listing
}

/// Waits until nothing goes on by itself any more.
fn settle(a: &Node) {
    wait_until("all transfers come to rest", LONG, || {
        let transfers = array(&a.cli(&["transfers"]).ok().json());
        transfers
            .iter()
            .all(|transfer| transfer["state"] != "running" && transfer["state"] != "interrupted")
            .then_some(())
    });
}

/// The receiver has what it had, and what it got besides is of the sender's history in its order.
fn assert_received(a: &Node, b: &Node, before: &Histories) {
    let (here, there) = (histories(a), histories(b));
    let had = before.get("db").cloned().unwrap_or_default();
    let has = there.get("db").cloned().unwrap_or_default();
    assert_eq!(had[..], has[..had.len().min(has.len())], "the receiver lost history");
    let order: Vec<_> = here["db"].iter().filter(|name| has.contains(name)).collect();
    let same: Vec<_> = has.iter().filter(|name| here["db"].contains(name)).collect();
    assert_eq!(order, same);
}

fn converge(a: &Node, b: &Node, world: &mut World) {
    change_and_snapshot(a, world);
    let newest = histories(a)["db"].last().unwrap().clone();
    a.push(&format!("db@{newest}"), "host-b");
    let (left, right) = (a.mount_to_read("db"), b.mount_to_read("db"));
    assert_equal(&left, &right);
    assert_same(&world.listings[&newest], &Listing::of(&right));
    assert_sound(a);
    assert_sound(b);
    for node in [a, b] {
        node.cli(&["unmount", "db"]).ok();
        let mut names: Vec<_> = histories(node).into_keys().collect();
        // Clones first.
        names.sort_by_key(|name| name == "db");
        for name in names {
            node.cli(&["destroy", &name]).ok();
        }
        wait_until(&format!("the pool of {} is empty", node.name), LONG, || {
            (allocated_bytes(&node.pool()) < 1 << 20).then_some(())
        });
    }
}
