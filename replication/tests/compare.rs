//! Comparing two histories: a table of the cases people meet, and random histories against a naive model.
#![allow(clippy::unwrap_used)]

mod support;

use std::collections::{BTreeMap, BTreeSet};

use flocker_replication::{
    ancestry::{Ancestor, Forgotten, Memory, answered, offered},
    binding::{Binding, bind, sibling},
    divergence::{Receiver, Relation, Sender, UnrelatedReason, WantMissing, compare},
    message::{Answer, Offer},
};
use flocker_storage::model::*;
use proptest::prelude::*;
use support::*;

const CLEAN: HeadState = HeadState::Clean;
const DIRTY: HeadState = HeadState::Dirty;

#[test]
fn each_history_gets_its_outcome() {
    let merged = [held(1, &[]), held(2, &[1]), held(4, &[2, 3])];
    let with_branch = [held(1, &[]), held(3, &[1]), held(2, &[1]), held(4, &[2, 3])];
    type Case<'a> =
        (&'a str, Vec<HeldSnapshot>, Vec<HeldSnapshot>, HeadState, u128, (&'a str, Option<u128>, Vec<u128>, Vec<u128>));
    let table: Vec<Case<'_>> = vec![
        ("empty receiver", chain(&[1, 2]), vec![], CLEAN, 2, ("fast-forward", None, vec![1, 2], vec![])),
        ("empty receiver with a written head", chain(&[1]), vec![], DIRTY, 1, ("dirty", None, vec![], vec![])),
        ("equal", chain(&[1, 2]), chain(&[1, 2]), CLEAN, 2, ("up-to-date", None, vec![], vec![])),
        ("equal and dirty", chain(&[1, 2]), chain(&[1, 2]), DIRTY, 2, ("up-to-date", None, vec![], vec![])),
        ("ahead by one", chain(&[1, 2]), chain(&[1]), CLEAN, 2, ("fast-forward", Some(1), vec![2], vec![])),
        (
            "ahead by three",
            chain(&[1, 2, 3, 4]),
            chain(&[1]),
            CLEAN,
            4,
            ("fast-forward", Some(1), vec![2, 3, 4], vec![]),
        ),
        ("ahead onto a dirty head", chain(&[1, 2]), chain(&[1]), DIRTY, 2, ("dirty", Some(1), vec![], vec![])),
        ("receiver ahead", chain(&[1]), chain(&[1, 2, 3]), CLEAN, 1, ("behind", Some(1), vec![], vec![2, 3])),
        ("receiver ahead and dirty", chain(&[1]), chain(&[1, 2]), DIRTY, 1, ("behind", Some(1), vec![], vec![2])),
        ("diverged", chain(&[1, 2]), chain(&[1, 3]), CLEAN, 2, ("diverged", Some(1), vec![2], vec![3])),
        ("diverged and dirty", chain(&[1, 2]), chain(&[1, 3]), DIRTY, 2, ("diverged", Some(1), vec![2], vec![3])),
        (
            "an unchanged snapshot of the receiver is no divergence",
            chain(&[1, 2]),
            vec![held(1, &[]), same(3, &[1])],
            CLEAN,
            2,
            ("fast-forward", Some(1), vec![2], vec![]),
        ),
        (
            "nor is it newer",
            chain(&[1]),
            vec![held(1, &[]), same(3, &[1])],
            CLEAN,
            1,
            ("up-to-date", None, vec![], vec![]),
        ),
        (
            "an unchanged one on a change is part of that",
            chain(&[1, 2]),
            vec![held(1, &[]), held(3, &[1]), same(4, &[3])],
            CLEAN,
            2,
            ("diverged", Some(1), vec![2], vec![3, 4]),
        ),
        (
            "an unchanged one whose parent is gone may hold changes",
            chain(&[1, 2]),
            vec![held(1, &[]), same(4, &[3])],
            CLEAN,
            2,
            ("diverged", Some(1), vec![2], vec![4]),
        ),
        ("renamed", chain(&[1, 2]), vec![named(1, &[], "other")], CLEAN, 2, ("fast-forward", Some(1), vec![2], vec![])),
        (
            "an equal name is not an equal snapshot",
            chain(&[1, 2]),
            vec![held(1, &[]), named(9, &[1], "s2")],
            CLEAN,
            2,
            ("diverged", Some(1), vec![2], vec![9]),
        ),
        (
            "middle pruned at the sender",
            vec![held(1, &[]), held(4, &[3])],
            chain(&[1]),
            CLEAN,
            4,
            ("fast-forward", Some(1), vec![4], vec![]),
        ),
        (
            "middle pruned at the sender, held by the receiver",
            vec![held(1, &[]), held(3, &[2])],
            chain(&[1, 2]),
            CLEAN,
            3,
            ("fast-forward", Some(1), vec![3], vec![]),
        ),
        (
            "middle pruned at the receiver",
            chain(&[1, 2, 3, 4]),
            vec![held(1, &[]), held(3, &[2])],
            CLEAN,
            4,
            ("fast-forward", Some(3), vec![4], vec![]),
        ),
        (
            "wanted one pruned at the receiver",
            chain(&[1, 2, 3]),
            vec![held(1, &[]), held(3, &[2])],
            CLEAN,
            2,
            ("behind", Some(1), vec![], vec![3]),
        ),
        (
            "wanted one and all before it pruned at the receiver",
            chain(&[1, 2]),
            vec![held(3, &[2])],
            CLEAN,
            2,
            ("behind", None, vec![], vec![3]),
        ),
        ("base pruned at the sender", vec![held(3, &[2])], chain(&[1]), CLEAN, 3, ("unrelated", None, vec![], vec![])),
        ("recreated", chain(&[5, 6]), chain(&[1, 2]), CLEAN, 6, ("unrelated", None, vec![], vec![])),
        (
            "rolled back, then a new one",
            vec![held(1, &[]), held(3, &[1])],
            chain(&[1, 2]),
            CLEAN,
            3,
            ("diverged", Some(1), vec![3], vec![2]),
        ),
        (
            "wanted one older than the receiver's newest",
            chain(&[1, 2, 3]),
            chain(&[1, 2, 3]),
            CLEAN,
            2,
            ("behind", Some(2), vec![], vec![3]),
        ),
        (
            "wanted one not the newest",
            chain(&[1, 2, 3]),
            chain(&[1]),
            CLEAN,
            2,
            ("fast-forward", Some(1), vec![2], vec![]),
        ),
        (
            "older ones that only the receiver has",
            vec![held(2, &[1]), held(3, &[2])],
            chain(&[1, 2]),
            CLEAN,
            3,
            ("fast-forward", Some(2), vec![3], vec![]),
        ),
        (
            "a merge of what the receiver has",
            merged.to_vec(),
            vec![held(1, &[]), held(3, &[1])],
            CLEAN,
            4,
            ("fast-forward", Some(1), vec![4], vec![]),
        ),
        (
            "a merge whose other parent is held",
            with_branch.to_vec(),
            vec![held(1, &[]), held(3, &[1])],
            CLEAN,
            4,
            ("fast-forward", Some(3), vec![4], vec![]),
        ),
        (
            "a merge to a receiver of the trunk",
            with_branch.to_vec(),
            chain(&[1]),
            CLEAN,
            4,
            ("fast-forward", Some(1), vec![2, 4], vec![]),
        ),
        (
            "a merge, and the receiver went on",
            merged.to_vec(),
            vec![held(1, &[]), held(3, &[1]), held(5, &[3])],
            CLEAN,
            4,
            ("diverged", Some(1), vec![2, 4], vec![5]),
        ),
    ];
    for (case, sender, receiver, head, want, wanted) in table {
        assert_eq!(numbers(&relate(&sender, &receiver, head, want)), wanted, "{case}");
    }
}

/// What a node remembers when it has destroyed snapshots of a history.
fn memory(parents: &[(u128, &[u128])]) -> Memory {
    parents.iter().map(|(number, of)| (id(*number), of.iter().map(|&parent| id(parent)).collect())).collect()
}

/// Compares as two nodes do that exchange what they remember.
fn relate_remembering(
    (sender, sender_memory): (&[HeldSnapshot], &Memory),
    (receiver, receiver_memory): (&[HeldSnapshot], &Memory),
    want: u128,
) -> Relation {
    let forgotten = offered(&lineage(sender), sender_memory);
    let offer = Offer { forgotten, ..offer(sender, want) };
    let forgotten = answered(&lineage(receiver), receiver_memory, &offer);
    let answer = Answer { forgotten, ..answer(Some(receiver)) };
    compare(&Sender::from(&offer), &Receiver::from(&answer), id(want)).unwrap()
}

#[test]
fn a_destroyed_ancestor_is_known_by_who_remembers_it() {
    let none = Memory::new();
    // 2 and 3 were destroyed in a row.
    let pruned = [held(1, &[]), held(4, &[3])];
    let knows = memory(&[(3, &[2]), (2, &[1])]);
    let to_two = |memory: &Memory| relate_remembering((&pruned, memory), (&chain(&[1, 2]), &none), 4);
    assert_eq!(numbers(&to_two(&knows)), ("fast-forward", Some(1), vec![4], vec![]));
    assert_eq!(numbers(&to_two(&none)).0, "diverged", "nobody knows, which is the safe side");
    let from_two = |memory: &Memory| relate_remembering((&chain(&[1, 2]), &none), (&pruned, memory), 2);
    assert_eq!(numbers(&from_two(&knows)), ("behind", Some(1), vec![], vec![4]));
    // The receiver holds both, and knows their parents from them.
    let to_three = relate_remembering((&pruned, &none), (&chain(&[1, 2, 3]), &none), 4);
    assert_eq!(numbers(&to_three), ("fast-forward", Some(1), vec![4], vec![]));
    // The newest was destroyed before the next was taken.
    let next = [held(1, &[]), held(3, &[2])];
    let to_newest = relate_remembering((&next, &memory(&[(2, &[1])])), (&chain(&[1, 2]), &none), 3);
    assert_eq!(numbers(&to_newest), ("fast-forward", Some(1), vec![3], vec![]));
    // All before was destroyed here; what is left of it there is older.
    let far = relate_remembering((&chain(&[1, 2]), &none), (&[held(5, &[4])], &memory(&[(4, &[3]), (3, &[2])])), 2);
    assert_eq!(numbers(&far), ("behind", None, vec![], vec![5]));
    // What was discarded is remembered, and is no ancestor.
    let rolled_back = [held(1, &[]), held(3, &[1])];
    let discarded = relate_remembering((&rolled_back, &memory(&[(2, &[1])])), (&chain(&[1, 2]), &none), 3);
    assert_eq!(numbers(&discarded).0, "diverged");
}

#[test]
fn where_memory_ends_on_the_way_the_snapshot_before_stands_for_the_rest() {
    // 5 follows 4, which followed 3; of 3 nobody knows anything.
    let pruned = [held(1, &[]), held(5, &[4])];
    let relation = relate_remembering((&pruned, &memory(&[(4, &[3])])), (&chain(&[1]), &Memory::new()), 5);
    assert_eq!(numbers(&relation), ("fast-forward", Some(1), vec![5], vec![]));
    // The same in the middle of what is sent.
    let longer = [held(1, &[]), held(5, &[4]), held(6, &[5])];
    let relation = relate_remembering((&longer, &memory(&[(4, &[3])])), (&chain(&[1]), &Memory::new()), 6);
    assert_eq!(numbers(&relation), ("fast-forward", Some(1), vec![5, 6], vec![]));
}

#[test]
fn what_is_remembered_leads_through_what_nobody_holds() {
    // To a new volume all goes that leads to the wanted one.
    let pruned = [held(1, &[]), held(5, &[4])];
    let forgotten = offered(&lineage(&pruned), &memory(&[(4, &[1])]));
    let offer = Offer { forgotten, ..offer(&pruned, 5) };
    let relation = compare(&Sender::from(&offer), &Receiver::from(&answer(None)), id(5)).unwrap();
    assert_eq!(numbers(&relation), ("fast-forward", None, vec![1, 5], vec![]));
    // One parent of a merge is known to lead to 1; so that the other is unknown does not make 2 an ancestor.
    let merged = [held(1, &[]), held(2, &[1]), held(5, &[4, 8])];
    let relation = relate_remembering((&merged, &memory(&[(4, &[1])])), (&chain(&[1, 2]), &Memory::new()), 5);
    assert_eq!(numbers(&relation), ("diverged", Some(1), vec![5], vec![2]));
}

#[test]
fn a_parent_that_is_listed_behind_its_child_is_none() {
    let out_of_order = [held(9, &[]), held(2, &[1]), held(1, &[])];
    let relation = relate(&out_of_order, &[held(1, &[])], HeadState::Clean, 2);
    assert_eq!(numbers(&relation).0, "unrelated", "{relation:?}");
}

#[test]
fn what_is_remembered_makes_nobody_hold_anything() {
    // By the receiver's memory it could build on 2.
    let relation =
        relate_remembering((&chain(&[1, 2, 3]), &Memory::new()), (&[held(1, &[])], &memory(&[(2, &[1])])), 3);
    assert_eq!(numbers(&relation), ("fast-forward", Some(1), vec![2, 3], vec![]));
    // What the receiver holds counts before what it is told.
    let lie = memory(&[(9, &[2]), (2, &[])]);
    let relation = relate_remembering((&[held(1, &[]), held(4, &[9])], &lie), (&chain(&[1, 2]), &Memory::new()), 4);
    assert_eq!(numbers(&relation), ("fast-forward", Some(1), vec![4], vec![]));
}

#[test]
fn only_what_may_matter_travels() {
    let knows = memory(&[(9, &[8]), (3, &[2]), (2, &[1]), (4, &[3])]);
    let told = |forgotten: &Forgotten| forgotten.iter().map(|(id, _)| id.0.as_u128()).collect::<Vec<_>>();
    let forgotten = offered(&lineage(&[held(1, &[]), held(5, &[4])]), &knows);
    assert_eq!(told(&forgotten), [4, 3, 2], "newest first; 9 is nobody's ancestor, and 1 is held");
    let pruned = lineage(&[held(1, &[]), held(5, &[4])]);
    let all = offer(&chain(&[1, 2, 3]), 3);
    assert_eq!(told(&answered(&pruned, &knows, &all)), [4], "the sender knows 3 itself");
    assert_eq!(answered(&pruned, &knows, &offer(&chain(&[7, 8]), 8)).len(), 0, "nothing leads there");
}

#[test]
fn a_clone_builds_on_its_origin_where_the_receiver_holds_that_elsewhere() {
    let elsewhere = |place: u128, number| SnapshotKey { volume: volume(place), snapshot: id(number) };
    let sender = chain(&[1, 2, 3]);
    let relation = relate_new(&sender, &[elsewhere(77, 1), elsewhere(55, 2), elsewhere(66, 2)], 3);
    let Relation::FastForward { base: Some(base), missing } = relation else { panic!("{relation:?}") };
    assert_eq!(base.on_receiver, elsewhere(55, 2));
    assert_eq!(missing.len(), 1);
    // Where several volumes hold it, the one that the sender has it in.
    let relation = relate_new(&sender, &[elsewhere(0, 2), elsewhere(DB, 2), elsewhere(55, 2)], 3);
    let Relation::FastForward { base: Some(base), .. } = relation else { panic!("{relation:?}") };
    assert_eq!(base.on_receiver, elsewhere(DB, 2));
    // The wanted one itself needs a place in the new volume.
    assert_eq!(numbers(&relate_new(&sender, &[elsewhere(77, 3)], 3)), ("fast-forward", None, vec![1, 2, 3], vec![]));
    // Newer ones than the wanted one are no base.
    assert_eq!(numbers(&relate_new(&sender, &[elsewhere(77, 3)], 2)), ("fast-forward", None, vec![1, 2], vec![]));
}

#[test]
fn another_volume_of_that_name_is_unrelated_whatever_it_holds() {
    let other = record(5, "db");
    let answer = Answer { volume: Some(other.clone()), ..answer(Some(&chain(&[1]))) };
    let relation = compare(&Sender::from(&offer(&chain(&[1, 2]), 2)), &Receiver::from(&answer), id(2)).unwrap();
    let Relation::Unrelated { reason, receiver_volume, .. } = relation else { panic!("{relation:?}") };
    assert_eq!((reason, receiver_volume), (UnrelatedReason::OtherVolumeId, other.id));
}

#[test]
fn a_snapshot_that_the_sender_lacks_cannot_be_wanted() {
    let (offer, answer) = (offer(&chain(&[1]), 1), answer(None));
    assert_eq!(compare(&Sender::from(&offer), &Receiver::from(&answer), id(9)), Err(WantMissing(id(9))));
}

#[test]
fn offers_are_bound_by_id_and_name() {
    let name = |text: &str| text.parse::<VolumeName>().unwrap();
    let offered = record(1, "db");
    let beside = sibling(offered.id, &name("copy"));
    let copy = VolumeRecord { id: beside, ..record(0, "copy") };
    let (db, renamed, foreign) = (record(1, "db"), record(1, "copy"), record(9, "db"));
    let bound = |wanted: &str, held: &[VolumeRecord]| {
        let binding = bind(&offered, &name(wanted), held);
        let kind = match binding {
            Binding::Existing(_) => "existing",
            Binding::New(_) => "new",
            Binding::Taken(..) => "taken",
        };
        (kind, binding.lands_in())
    };
    assert_eq!(bound("db", &[]), ("new", offered.id));
    assert_eq!(bound("copy", &[]), ("new", offered.id));
    assert_eq!(bound("db", std::slice::from_ref(&db)), ("existing", offered.id));
    assert_eq!(bound("db", std::slice::from_ref(&renamed)), ("existing", offered.id));
    assert_eq!(bound("copy", &[renamed]), ("existing", offered.id));
    assert_eq!(bound("db", &[foreign]), ("taken", offered.id));
    assert_eq!(bound("copy", std::slice::from_ref(&db)), ("new", beside));
    assert_eq!(bound("copy", &[db, copy]), ("existing", beside));
}

#[test]
fn ten_thousand_snapshots_are_compared_with_what_is_left_of_them() {
    const COUNT: u128 = 10_000;
    let all: Vec<u128> = (1..=COUNT).collect();
    let whole = chain(&all);
    // The receiver has every second one of the first 8,000, and remembers the others.
    let number = |held: &HeldSnapshot| held.snapshot.id.0.as_u128();
    let is_left = |held: &&HeldSnapshot| number(held).is_multiple_of(2) && number(held) <= 8_000;
    let left: Vec<HeldSnapshot> = whole.iter().filter(is_left).cloned().collect();
    let memory: Memory = whole.iter().map(|held| (held.snapshot.id, held.snapshot.parents.clone())).collect();
    let none = Memory::new();

    let forward = relate_remembering((&whole, &none), (&left, &memory), COUNT);
    let (kind, base, missing, _) = numbers(&forward);
    assert_eq!((kind, base, missing.len()), ("fast-forward", Some(8_000), 2_000));
    let behind = relate_remembering((&left, &memory), (&whole, &none), 8_000);
    let (kind, common, _, newer) = numbers(&behind);
    assert_eq!((kind, common, newer.len()), ("behind", Some(8_000), 2_000));
    let first_alone = [held(2, &[1])];
    let (kind, base, missing, _) = numbers(&relate_remembering((&left, &memory), (&first_alone, &none), 8_000));
    assert_eq!((kind, base, missing.len()), ("fast-forward", Some(2), 3_999));
    assert_eq!(offered(&lineage(&left), &memory).len(), 4_000);
}

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
        let relation = relate(&world.sender, &world.receiver, CLEAN, world.want);
        judge(&world, &relation);
        // A dirty head changes fast-forwards only, and running a fast-forward makes it up to date.
        let dirty = relate(&world.sender, &world.receiver, DIRTY, world.want);
        if let Relation::FastForward { missing, .. } = &relation {
            prop_assert_eq!(numbers(&dirty).0, "dirty");
            let mut landed = world.receiver.clone();
            landed.extend(missing.iter().cloned());
            prop_assert_eq!(relate(&world.sender, &landed, CLEAN, world.want), Relation::UpToDate);
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
        relate(&sender, &receiver, CLEAN, want);
    }
}
