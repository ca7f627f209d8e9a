//! How often two nodes wait for each other: counted by what they say, not by a clock.

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

/// Takes a snapshot, pushes it, and returns what was said meanwhile.
fn push_one(world: &mut World, snapshot: &str) -> Vec<(usize, &'static str)> {
    ask(world, Method::POST, "/v1/volumes/db/snapshots", json!({"name": snapshot}));
    world.fates.take_said();
    let started = ask(world, Method::POST, "/v1/volumes/db/push", json!({"peer": "host-b", "snapshot": snapshot}));
    let path = format!("/v1/transfers/{}", started["id"].as_str().unwrap());
    loop {
        let transfer = ask(world, Method::GET, &path, Value::Null);
        match transfer["state"].as_str() {
            Some("running") => (0..20).for_each(|_| world.step()),
            Some("done") => return world.fates.take_said(),
            _ => panic!("{transfer}"),
        }
    }
}

#[test]
fn a_push_of_one_step_over_a_kept_connection_takes_three_round_trips() {
    let mut world = World::new(1, 2, None);
    steps_until(&mut world, "a node", |world| (0..2).all(|node| world.is_ready(node)).then_some(()));
    ask(&mut world, Method::POST, "/v1/volumes", json!({"name": "db"}));
    push_one(&mut world, "one");

    let said = push_one(&mut world, "two");

    let (a, b) = (0, 1);
    let wanted = [
        (a, "Offer"),
        (a, "Forgotten"),
        (b, "Answer"),
        (a, "BeginStep"),
        (b, "StepReady"),
        (a, "delta"),
        (b, "StepDone"),
    ];
    assert_eq!(said, wanted);
    let turns = said.windows(2).filter(|pair| pair[0].0 == a && pair[1].0 == b).count();
    assert_eq!(turns, 3);
}
