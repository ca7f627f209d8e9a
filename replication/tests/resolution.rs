//! The table of policies is the one in the documentation, and forks have the names it promises.
#![allow(clippy::unwrap_used)]

mod support;

use flocker_replication::{
    message::DivergencePolicy,
    plan::{Direction, Outcome, Point, Points, UnrelatedReason, Verdict},
    resolution::{Found, Way, incoming_name, planned, way},
};
use flocker_storage::model::HeadState;
use support::*;

const POLICIES: [DivergencePolicy; 4] =
    [DivergencePolicy::Refuse, DivergencePolicy::Fork, DivergencePolicy::Theirs, DivergencePolicy::Ours];

fn word(way: Way) -> &'static str {
    match way {
        Way::Straight => "straight",
        Way::Refuse => "refuse",
        Way::Contained => "contained",
        Way::Beside => "beside",
        Way::Succeed => "succeed",
        Way::Rename => "rename",
        Way::Reverse => "reverse",
    }
}

fn name(found: Found) -> &'static str {
    match found {
        Found::UpToDate => "up to date",
        Found::FastForward => "fast-forward",
        Found::Behind => "behind",
        Found::Diverged => "diverged",
        Found::Dirty => "dirty",
        Found::OtherVolume => "other volume",
        Found::NothingInCommon => "nothing in common",
    }
}

#[test]
fn the_documentation_has_this_table() {
    let text = include_str!("../../docs/DIVERGENCE.md");
    let after = text.split("| outcome | refuse | fork | theirs | ours |").nth(1).unwrap();
    let documented: Vec<&str> = after.lines().skip(2).take_while(|line| line.starts_with('|')).collect();
    let row = |found: Found| {
        let ways = POLICIES.map(|policy| word(way(policy, found)));
        format!("| {} | {} |", name(found), ways.join(" | "))
    };
    assert_eq!(documented, Found::ALL.map(row));
}

#[test]
fn refusing_never_acts_and_a_fork_never_touches_the_receivers_volume() {
    for found in Found::ALL {
        assert!(matches!(way(DivergencePolicy::Refuse, found), Way::Refuse | Way::Straight), "{found:?}");
        assert!(matches!(way(DivergencePolicy::Fork, found), Way::Beside | Way::Contained | Way::Straight));
    }
}

fn outcome(verdict: Verdict) -> Outcome {
    Outcome {
        direction: Direction::Push,
        volume: "db".parse().unwrap(),
        name: "db".parse().unwrap(),
        sender: host("host-a"),
        receiver: host("host-b"),
        want: Point::from(&held(2, &[1])),
        verdict,
    }
}

#[test]
fn a_dry_run_says_what_would_land_where_and_what_would_be_kept() {
    let mut theirs = held(3, &[1]);
    theirs.snapshot.host = host("host-c");
    let diverged = outcome(Verdict::Diverged {
        common: Point::from(&held(1, &[])),
        only_sender: Points::new(&[held(2, &[1])]),
        only_receiver: Points::new(&[theirs]),
        receiver_name: "s1".parse().unwrap(),
        head: HeadState::Clean,
    });
    let told = |policy| {
        planned(policy, &diverged).map(|resolution| {
            let kept = resolution.kept.map(|kept| format!("{}:{}", kept.place.host, kept.place.volume));
            (format!("{}:{}", resolution.landed.host, resolution.landed.volume), kept)
        })
    };
    assert_eq!(told(DivergencePolicy::Refuse), None);
    assert_eq!(told(DivergencePolicy::Fork), Some(("host-b:db.host-a.00000002".to_owned(), None)));
    // The host is the one that the losing snapshot was taken on, whoever keeps it.
    let kept = Some("host-b:db.host-c.00000003".to_owned());
    assert_eq!(told(DivergencePolicy::Theirs), Some(("host-b:db".to_owned(), kept)));
    let kept = Some("host-a:db.host-a.00000002".to_owned());
    assert_eq!(told(DivergencePolicy::Ours), Some(("host-a:db".to_owned(), kept)));
    assert_eq!(planned(DivergencePolicy::Theirs, &outcome(Verdict::UpToDate)), None);
    let apart = Verdict::Unrelated {
        reason: UnrelatedReason::NoCommonSnapshot,
        receiver_volume: volume(DB),
        receiver_tip: None,
    };
    assert_eq!(planned(DivergencePolicy::Theirs, &outcome(apart)), None);
}

#[test]
fn who_brings_a_history_does_not_change_its_forks_name() {
    let mut tip = held(0xab, &[]);
    tip.snapshot.host = host("host-c");
    assert_eq!(incoming_name(&"db".parse().unwrap(), &Point::from(&tip)).as_str(), "db.host-c.000000ab");
}
