//! What an operator reads, word by word.
#![allow(clippy::unwrap_used)]

mod support;

use flocker_replication::{
    plan::{Direction, Outcome, Point, Points, Refusal, UnrelatedReason, Verdict},
    refusal::fork_name,
};
use flocker_storage::model::{HeadState, HeldSnapshot, NAME_LIMIT};
use support::*;

fn written(number: u128, on: &str, name: &str) -> HeldSnapshot {
    let mut held = named(number, &[], name);
    held.snapshot.host = host(on);
    held.logical_bytes = 300 * 1024 * 1024;
    held
}

fn refusal(direction: Direction, verdict: Verdict) -> String {
    Refusal(Outcome {
        direction,
        volume: "db".parse().unwrap(),
        name: "db".parse().unwrap(),
        sender: host("host-a"),
        receiver: host("host-b"),
        want: Point::from(&written(2, "host-a", "two")),
        verdict,
    })
    .render()
}

fn diverged(head: HeadState) -> Verdict {
    let theirs: Vec<HeldSnapshot> =
        (10..17).map(|number| written(number, "host-b", &format!("theirs-{number}"))).collect();
    Verdict::Diverged {
        common: Point::from(&written(1, "host-a", "one")),
        only_sender: Points::new(&[written(2, "host-a", "two")]),
        only_receiver: Points::new(&theirs),
        receiver_name: "one".parse().unwrap(),
        head,
    }
}

#[test]
fn refusals_read_as_written_down() {
    let behind = || Verdict::Behind { newer: Points::new(&[written(3, "host-b", "three")]) };
    let unrelated = |reason| Verdict::Unrelated {
        reason,
        receiver_volume: volume(5),
        receiver_tip: Some(Point::from(&written(3, "host-b", "three"))),
    };
    let texts = [
        refusal(Direction::Push, diverged(HeadState::Clean)),
        refusal(Direction::Pull, diverged(HeadState::Dirty)),
        refusal(Direction::Push, behind()),
        refusal(Direction::Pull, behind()),
        refusal(Direction::Push, unrelated(UnrelatedReason::OtherVolumeId)),
        refusal(Direction::Push, unrelated(UnrelatedReason::NoCommonSnapshot)),
        refusal(Direction::Push, Verdict::Dirty { tip: Some(Point::from(&written(1, "host-a", "one"))) }),
        refusal(Direction::Pull, Verdict::Dirty { tip: None }),
    ];
    let text = texts.join("\n----\n");
    assert_eq!(text, include_str!("../testdata/refusals.txt"));
}

#[test]
fn a_forks_name_is_a_name_however_long_its_parts() {
    let fork = fork_name(&"v".repeat(NAME_LIMIT).parse().unwrap(), &"h".repeat(NAME_LIMIT).parse().unwrap(), id(1));
    assert!(fork.as_str().len() <= NAME_LIMIT && fork.as_str().ends_with(".00000001"), "{fork}");
    assert_eq!(fork_name(&"db".parse().unwrap(), &"host-a".parse().unwrap(), id(0xab)).as_str(), "db.host-a.000000ab");
}
