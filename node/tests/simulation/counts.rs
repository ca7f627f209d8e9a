//! What must not grow, by counting and not by a clock: how often two nodes wait for each other, what is read and said for many
//! small things, and how much goes on at once.

use axum::http::Method;
use serde_json::{Value, json};

use crate::world::World;

/// How long one request may take, in steps.
const PATIENCE: u32 = 20_000;

fn steps_until<T>(world: &mut World, what: &str, mut look: impl FnMut(&World) -> Option<T>) -> T {
    for _ in 0..PATIENCE {
        if let Some(found) = look(world) {
            return found;
        }
        world.step();
    }
    panic!("{what} never came");
}

fn ask(world: &mut World, method: Method, path: &str, body: Value) -> Value {
    let ticket = world.ask(0, method, path, body);
    let (status, answer) = steps_until(world, path, |world| world.answer(0, ticket));
    assert!((200..300).contains(&status), "{path}: {status} {answer}");
    answer
}

fn two_nodes() -> World {
    let mut world = World::new(1, 2, None);
    steps_until(&mut world, "a node", |world| (0..2).all(|node| world.is_ready(node)).then_some(()));
    world
}

fn take(world: &mut World, volume: &str, snapshot: &str) {
    ask(world, Method::POST, &format!("/v1/volumes/{volume}/snapshots"), json!({"name": snapshot}));
}

fn start_push(world: &mut World, volume: &str, snapshot: &str) -> String {
    let path = format!("/v1/volumes/{volume}/push");
    let started = ask(world, Method::POST, &path, json!({"peer": "host-b", "snapshot": snapshot}));
    format!("/v1/transfers/{}", started["id"].as_str().unwrap())
}

fn wait_done(world: &mut World, transfer: &str) -> Value {
    for _ in 0..PATIENCE {
        let shown = ask(world, Method::GET, transfer, Value::Null);
        match shown["state"].as_str() {
            Some("running" | "interrupted") => (0..20).for_each(|_| world.step()),
            Some("done") => return shown,
            _ => panic!("{shown}"),
        }
    }
    panic!("{transfer} never ends");
}

/// Takes a snapshot, pushes it, and returns what both nodes did meanwhile.
fn push_one(world: &mut World, snapshot: &str) -> Vec<(usize, &'static str)> {
    take(world, "db", snapshot);
    world.fates.take_noted();
    let transfer = start_push(world, "db", snapshot);
    wait_done(world, &transfer);
    world.fates.take_noted()
}

fn how_often(noted: &[(usize, &'static str)], what: &str) -> usize {
    noted.iter().filter(|(_, noted)| *noted == what).count()
}

const A: usize = 0;
const B: usize = 1;

#[test]
fn a_push_of_one_step_over_a_kept_connection_takes_three_round_trips() {
    let mut world = two_nodes();
    ask(&mut world, Method::POST, "/v1/volumes", json!({"name": "db"}));
    push_one(&mut world, "one");

    let mut said = push_one(&mut world, "two");

    said.retain(|(_, what)| *what != "lineage");
    let wanted =
        [(A, "Offer"), (A, "Rest"), (B, "Answer"), (A, "BeginStep"), (B, "StepReady"), (A, "delta"), (B, "StepDone")];
    assert_eq!(said, wanted);
    let turns = said.windows(2).filter(|pair| pair[0].0 == A && pair[1].0 == B).count();
    assert_eq!(turns, 3);
}

#[test]
fn five_hundred_snapshots_go_in_one_push_and_lineages_are_not_read_again_for_each() {
    const COUNT: usize = 500;
    let mut world = two_nodes();
    ask(&mut world, Method::POST, "/v1/volumes", json!({"name": "db"}));
    world.fates.take_noted();
    (0..COUNT).for_each(|number| take(&mut world, "db", &format!("s{number}")));
    let taking = world.fates.take_noted();
    assert_eq!(how_often(&taking, "lineage"), 0, "a snapshot is taken without reading those before");

    let transfer = start_push(&mut world, "db", &format!("s{}", COUNT - 1));
    let done = wait_done(&mut world, &transfer);

    assert_eq!(done["progress"]["steps_done"], COUNT);
    let names = |world: &World, node: usize| -> Vec<String> {
        world.look(node)[0].snapshots.iter().map(|sight| sight.held.snapshot.name.to_string()).collect()
    };
    assert_eq!(names(&world, B).len(), COUNT);
    assert_eq!(names(&world, B), names(&world, A));
    let noted = world.fates.take_noted();
    // The receiver has nothing of it yet, and asks for what the offer only outlines.
    for (what, times) in
        [("Offer", 1), ("Want", 1), ("Answer", 1), ("BeginStep", COUNT), ("StepReady", COUNT), ("StepDone", COUNT)]
    {
        assert_eq!(how_often(&noted, what), times, "{what}");
    }
    // While the receiver makes a step durable, the next one's delta is opened.
    assert_eq!(how_often(&noted, "ahead"), COUNT - 1);
    let turns = noted.iter().filter(|(_, what)| matches!(*what, "ahead" | "BeginStep"));
    assert!(
        turns
            .map(|(_, what)| *what)
            .eq(std::iter::repeat_n(["BeginStep", "ahead"], COUNT).flatten().take(2 * COUNT - 1))
    );
    assert!(how_often(&noted, "lineage") <= 5, "{} lineages read", how_often(&noted, "lineage"));

    let next = push_one(&mut world, "next");
    assert_eq!((how_often(&next, "Answer"), how_often(&next, "Want")), (1, 0), "what both have is not asked for");
    ask(&mut world, Method::DELETE, "/v1/volumes/db/snapshots/s7", Value::Null);
    let last = push_one(&mut world, "last");
    assert_eq!((how_often(&last, "Answer"), how_often(&last, "Want")), (1, 1), "a block that is another here is");
    assert_eq!((names(&world, A).len(), names(&world, B).len()), (COUNT + 1, COUNT + 2));
}

#[test]
fn a_hundred_volumes_are_pushed_at_once_and_all_arrive() {
    const COUNT: usize = 100;
    /// As many as a node serves at once (node/src/serve.rs).
    const SERVED: i32 = 64;
    let mut world = two_nodes();
    for number in 0..COUNT {
        ask(&mut world, Method::POST, "/v1/volumes", json!({"name": format!("v{number}")}));
        take(&mut world, &format!("v{number}"), "one");
    }
    world.fates.take_noted();

    let body = json!({"peer": "host-b", "snapshot": "one"});
    let push = |number: usize| (Method::POST, format!("/v1/volumes/v{number}/push"));
    let tickets: Vec<u64> = (0..COUNT)
        .map(|number| {
            let (method, path) = push(number);
            world.ask(A, method, &path, body.clone())
        })
        .collect();
    let started = tickets.into_iter().map(|ticket| {
        let (status, transfer) = steps_until(&mut world, "a transfer", |world| world.answer(A, ticket));
        assert!((200..300).contains(&status), "{transfer}");
        format!("/v1/transfers/{}", transfer["id"].as_str().unwrap())
    });
    let transfers: Vec<String> = started.collect();
    transfers.iter().for_each(|transfer| drop(wait_done(&mut world, transfer)));

    assert_eq!(world.look(B).iter().filter(|volume| volume.snapshots.len() == 1).count(), COUNT);
    let (mut open, mut most) = (0, 0);
    for (_, what) in world.fates.take_noted() {
        open += i32::from(what == "StepReady") - i32::from(what == "StepDone");
        most = most.max(open);
    }
    assert_eq!(open, 0);
    assert!((1..=SERVED).contains(&most), "{most} at once");
}
