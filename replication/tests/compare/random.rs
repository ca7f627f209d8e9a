//! Random histories against a naive model, and whatever a peer may say against the promise of an answer.

use std::collections::{BTreeMap, BTreeSet};

use flocker_replication::{
    ancestry::{Ancestor, Memory},
    divergence::{Receiver, Relation, Sender, compare},
    message::{Answer, Offer},
};
use flocker_storage::model::*;
use proptest::prelude::*;

use crate::support::*;

/// A world: a DAG of snapshots with contents, and what two nodes still hold of two lines through it.
#[derive(Debug, Clone)]
struct World {
    sender: Vec<HeldSnapshot>,
    receiver: Vec<HeldSnapshot>,
    parents: BTreeMap<u128, Vec<u128>>,
    content: BTreeMap<u128, u128>,
    want: u128,
}

/// Bytes that steer the making of a world; any bytes make one.
fn world(seed: Vec<u8>) -> World {
    let mut bytes = seed.into_iter().cycle();
    let mut draw = move |below: usize| usize::from(bytes.next().unwrap()) % below;
    let mut parents: BTreeMap<u128, Vec<u128>> = BTreeMap::new();
    let mut content = BTreeMap::new();
    let mut next = 1;
    let mut lines: [Vec<u128>; 2] = [Vec::new(), Vec::new()];
    let mut grow =
        |line: &mut Vec<u128>, unchanged: bool, merge: Option<u128>, parents: &mut BTreeMap<u128, Vec<u128>>| {
            let mut of: Vec<u128> = line.last().copied().into_iter().collect();
            of.extend(merge.filter(|other| !of.contains(other)));
            let contents = line.last().filter(|_| unchanged && of.len() == 1).map_or(next, |tip| content[tip]);
            content.insert(next, contents);
            parents.insert(next, of);
            line.push(next);
            next += 1;
        };
    for _ in 0..draw(6) {
        grow(&mut lines[0], false, None, &mut parents);
    }
    lines[1] = lines[0].clone();
    for side in [0, 1] {
        // Roll back, then go on; a merge takes in the other line's newest snapshot.
        let keep = lines[side].len() - draw(2).min(lines[side].len());
        lines[side].truncate(keep);
        for _ in 0..draw(4) {
            let merge = (side == 1 && draw(6) == 0).then(|| lines[0].last().copied()).flatten();
            let unchanged = draw(3) == 0;
            grow(&mut lines[side], unchanged, merge, &mut parents);
        }
    }
    if draw(2) == 0 {
        lines.swap(0, 1);
    }
    if lines[0].is_empty() {
        grow(&mut lines[0], false, None, &mut parents);
    }
    let want = lines[0][lines[0].len() - 1 - draw(2).min(lines[0].len() - 1)];
    let one_in = 2 + draw(4);
    let mut hold = |line: &[u128], kept: Option<u128>| {
        let mut list = Vec::new();
        for &number in line {
            if draw(one_in) == 0 && kept != Some(number) {
                continue;
            }
            let of = &parents[&number];
            let mut one = named(number, of, &format!("n{}", draw(3)));
            one.unchanged = of.first().is_some_and(|parent| content[parent] == content[&number]);
            list.push(one);
        }
        list
    };
    let (sender, receiver) = (hold(&lines[0], Some(want)), hold(&lines[1], None));
    World { sender, receiver, parents, content, want }
}

fn ancestors(parents: &BTreeMap<u128, Vec<u128>>, of: u128) -> BTreeSet<u128> {
    let mut all = BTreeSet::from([of]);
    for parent in &parents[&of] {
        all.extend(ancestors(parents, *parent));
    }
    all
}

fn list(held: &[HeldSnapshot]) -> Vec<u128> {
    held.iter().map(|held| held.snapshot.id.0.as_u128()).collect()
}

/// Judges an outcome by the whole truth, which neither node knows: safe always, exact where nothing was pruned.
fn judge(world: &World, relation: &Relation) {
    let World { parents, content, want, .. } = world;
    let (sender, receiver) = (list(&world.sender), list(&world.receiver));
    let incoming = ancestors(parents, *want);
    let incoming_contents: BTreeSet<u128> = incoming.iter().map(|number| content[number]).collect();
    let is_lost = |number: &&u128| !incoming.contains(*number) && !incoming_contents.contains(&content[*number]);
    let (kind, base, missing, theirs) = numbers(relation);
    match kind {
        "up-to-date" => {
            let at = receiver.iter().position(|number| number == want).unwrap();
            assert_eq!(receiver[at..].iter().find(is_lost), None, "something newer counts");
        }
        "behind" => {
            let tip = theirs.last().unwrap();
            let newest = receiver.iter().rfind(|number| sender.contains(number) && incoming.contains(number));
            assert_eq!(
                base.as_ref(),
                if receiver.contains(want) { Some(want) } else { newest },
                "the newest common one"
            );
            assert!(receiver.contains(want) || ancestors(parents, *tip).contains(want));
        }
        "fast-forward" => {
            assert!(!receiver.contains(want));
            assert_eq!(missing.last(), Some(want));
            assert!(missing.iter().all(|number| sender.contains(number) && incoming.contains(number)));
            let from = base.map_or(0, |base| {
                assert!(sender.contains(&base) && incoming.contains(&base));
                receiver.iter().position(|number| *number == base).expect("the base is held") + 1
            });
            assert!(base.is_some() || receiver.is_empty());
            assert_eq!(receiver[from..].iter().find(is_lost), None, "a fast-forward would bury a change");
        }
        "diverged" => {
            let common = base.unwrap();
            assert!(sender.contains(&common) && receiver.contains(&common) && !receiver.contains(want));
            let newest = receiver.iter().rfind(|number| sender.contains(number) && incoming.contains(number));
            assert_eq!(newest, Some(&common), "not the newest common one");
            assert!(!theirs.is_empty() && !missing.is_empty());
        }
        "unrelated" => assert!(!receiver.iter().any(|number| sender.contains(number) && incoming.contains(number))),
        other => panic!("a clean head is not {other}"),
    }
    let whole = sender.iter().chain(&receiver).all(|number| {
        let line = if sender.contains(number) { &sender } else { &receiver };
        parents[number].first().is_none_or(|parent| line.contains(parent))
    });
    let single = sender.iter().chain(&receiver).all(|number| parents[number].len() < 2);
    if whole && single && kind == "diverged" {
        assert!(theirs.iter().any(|number| !incoming.contains(number)), "no change is in the way");
    }
}

/// What a node remembers that has held all ancestors of what it holds.
fn whole_memory(world: &World, held: &[HeldSnapshot]) -> Memory {
    let all: BTreeSet<u128> = list(held).into_iter().flat_map(|number| ancestors(&world.parents, number)).collect();
    all.into_iter().map(|number| (id(number), world.parents[&number].iter().map(|&of| id(of)).collect())).collect()
}

/// The outcome by the whole graph, of which nothing was ever destroyed: its kind, the newest common snapshot where it matters, and
/// the receiver's changes.
fn by_the_whole_graph(world: &World) -> (&'static str, Option<u128>, Vec<u128>) {
    let World { parents, want, .. } = world;
    let (sender, receiver) = (list(&world.sender), list(&world.receiver));
    let incoming = ancestors(parents, *want);
    let mut repeating = BTreeSet::new();
    let mut own = BTreeSet::new();
    for held in &world.receiver {
        let number = held.snapshot.id.0.as_u128();
        let contained = |of: &u128| incoming.contains(of) || repeating.contains(of);
        if incoming.contains(&number) || (held.unchanged && parents[&number].first().is_some_and(contained)) {
            repeating.insert(number);
        } else {
            own.insert(number);
        }
    }
    let after = |at: Option<usize>| -> Vec<u128> {
        receiver[at.map_or(0, |at| at + 1)..].iter().copied().filter(|number| own.contains(number)).collect()
    };
    if let Some(at) = receiver.iter().position(|number| number == want) {
        let newer = after(Some(at));
        return if newer.is_empty() { ("up-to-date", None, newer) } else { ("behind", Some(*want), newer) };
    }
    let common = receiver.iter().rposition(|number| sender.contains(number) && incoming.contains(number));
    let changes = after(common);
    let common_number = common.map(|at| receiver[at]);
    match changes.last() {
        Some(newest) if ancestors(parents, *newest).contains(want) => ("behind", common_number, changes),
        _ if common.is_none() && !receiver.is_empty() => ("unrelated", None, Vec::new()),
        None => ("fast-forward", common_number, changes),
        Some(_) => ("diverged", common_number, changes),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 30_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_histories_get_an_outcome_that_loses_nothing(seed in prop::collection::vec(any::<u8>(), 24..48)) {
        let world = world(seed);
        let relation = relate(&world.sender, &world.receiver, HeadState::Clean, world.want);
        judge(&world, &relation);
        // A dirty head changes fast-forwards only, and running a fast-forward makes it up to date.
        let dirty = relate(&world.sender, &world.receiver, HeadState::Dirty, world.want);
        if let Relation::FastForward { missing, .. } = &relation {
            prop_assert_eq!(numbers(&dirty).0, "dirty");
            let mut landed = world.receiver.clone();
            landed.extend(missing.iter().cloned());
            prop_assert_eq!(relate(&world.sender, &landed, HeadState::Clean, world.want), Relation::UpToDate);
        } else {
            prop_assert_eq!(&dirty, &relation);
        }
    }

    #[test]
    fn with_memory_the_outcome_is_that_of_the_whole_graph(seed in prop::collection::vec(any::<u8>(), 24..48)) {
        let world = world(seed);
        let (sender, receiver) = (&world.sender[..], &world.receiver[..]);
        let memories = (whole_memory(&world, sender), whole_memory(&world, receiver));
        let relation = relate_remembering((sender, &memories.0), (receiver, &memories.1), world.want);
        judge(&world, &relation);
        let (kind, common, missing, theirs) = numbers(&relation);
        prop_assert_eq!((kind, common, theirs), by_the_whole_graph(&world));
        if kind == "fast-forward" {
            prop_assert!(missing.is_sorted(), "oldest first: {:?}", missing);
            let mut landed = world.receiver.clone();
            landed.extend(sender.iter().filter(|held| missing.contains(&held.snapshot.id.0.as_u128())).cloned());
            let again = relate_remembering((sender, &memories.0), (&landed, &memories.1), world.want);
            prop_assert_eq!(again, Relation::UpToDate);
        }
    }

    #[test]
    fn whatever_is_said_to_be_remembered_there_is_an_answer(
        seed in prop::collection::vec(any::<u8>(), 24..48),
        said in prop::collection::vec((0_u128..12, prop::collection::vec(0_u128..12, 0..3)), 0..12),
    ) {
        let world = world(seed);
        let said = || said.iter().map(|(number, of)| Ancestor {
            id: id(*number),
            parents: of.iter().map(|&of| id(of)).collect(),
        });
        let offer = Offer { forgotten: said().collect(), ..offer(&world.sender, world.want) };
        let answer = Answer { forgotten: said().rev().collect(), ..answer(Some(&world.receiver)) };
        let relation = compare(&Sender::from(&offer), &Receiver::from(&answer), id(world.want)).unwrap();
        // Lies make nobody hold anything, and what is sent is the sender's.
        let (_, base, missing, theirs) = numbers(&relation);
        let (sender, receiver) = (list(&world.sender), list(&world.receiver));
        prop_assert!(base.is_none_or(|base| receiver.contains(&base)));
        prop_assert!(missing.iter().all(|number| sender.contains(number)));
        prop_assert!(theirs.iter().all(|number| receiver.contains(number)));
        let distinct: BTreeSet<_> = missing.iter().collect();
        prop_assert_eq!(distinct.len(), missing.len());
    }

    #[test]
    fn any_two_lists_get_an_answer(
        sender in prop::collection::vec((0_u128..12, prop::collection::vec(0_u128..12, 0..3), any::<bool>()), 1..10),
        receiver in prop::collection::vec((0_u128..12, prop::collection::vec(0_u128..12, 0..3), any::<bool>()), 0..10),
    ) {
        let make = |list: Vec<(u128, Vec<u128>, bool)>| -> Vec<HeldSnapshot> {
            list.into_iter().map(|(number, parents, unchanged)| HeldSnapshot { unchanged, ..held(number, &parents) }).collect()
        };
        let (sender, receiver) = (make(sender), make(receiver));
        let want = sender[0].snapshot.id.0.as_u128();
        relate(&sender, &receiver, HeadState::Clean, want);
    }
}
