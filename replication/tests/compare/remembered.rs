//! Histories of which snapshots were destroyed, and what the nodes remember of them.

use flocker_replication::{
    ancestry::{Forgotten, Memory, answered, offered},
    divergence::{Receiver, Sender, compare},
    message::Offer,
};
use flocker_storage::model::*;

use crate::support::*;

/// What a node remembers when it has destroyed snapshots of a history.
fn memory(parents: &[(u128, &[u128])]) -> Memory {
    parents.iter().map(|(number, of)| (id(*number), of.iter().map(|&parent| id(parent)).collect())).collect()
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
