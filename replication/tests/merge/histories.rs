//! Merges in histories: the ancestor that two sides have in common, what a merge brings in, and how it is pushed.

use flocker_replication::merge::{common_ancestor, with_merged};
use flocker_storage::model::{HeadState, HeldSnapshot, Lineage};

use crate::support::{self, chain, held, lineage};

fn number(held: &HeldSnapshot) -> u128 {
    held.snapshot.id.0.as_u128()
}

fn ancestor(ours: &[HeldSnapshot], theirs: &[HeldSnapshot]) -> Option<(u128, usize)> {
    let found = common_ancestor(&lineage(ours), &lineage(theirs))?;
    Some((number(&found.snapshot), found.further.len()))
}

#[test]
fn the_common_ancestor_is_the_newest_one_whatever_was_merged_before() {
    let ours = [held(1, &[]), held(2, &[1]), held(4, &[2, 3]), held(6, &[4])];
    let with_branch = [held(1, &[]), held(2, &[1]), held(3, &[1]), held(4, &[2, 3]), held(6, &[4])];
    let theirs = [held(1, &[]), held(3, &[1]), held(5, &[3])];
    assert_eq!(ancestor(&chain(&[1, 2]), &[held(1, &[]), held(3, &[1])]), Some((1, 0)));
    assert_eq!(ancestor(&with_branch, &theirs), Some((3, 0)), "merged before");
    assert_eq!(ancestor(&theirs, &with_branch), Some((3, 0)), "the other way round");
    assert_eq!(ancestor(&ours, &theirs), Some((1, 0)), "the merged branch is not held any more");
    assert_eq!(ancestor(&chain(&[1, 2, 3]), &chain(&[1, 2])), Some((2, 0)), "an ancestor itself");
    assert_eq!(ancestor(&chain(&[1]), &chain(&[2])), None);
    let crossed = |tip: u128, first: u128, second: u128| {
        [held(1, &[]), held(2, &[1]), held(3, &[1]), held(tip, &[first, second])]
    };
    assert_eq!(ancestor(&crossed(4, 2, 3), &crossed(5, 3, 2)), Some((3, 1)), "merged crosswise");
}

#[test]
fn what_a_merge_brought_in_is_added_before_it_once() {
    let lineage_of = |snapshots: &[HeldSnapshot]| Lineage { snapshots: snapshots.to_vec() };
    let own = lineage_of(&[held(1, &[]), held(2, &[1]), held(5, &[2, 4]), held(6, &[5])]);
    let fork = [held(3, &[1]), held(4, &[3]), held(9, &[4])];
    let numbers: Vec<u128> = with_merged(own.clone(), || fork.to_vec()).snapshots.iter().map(number).collect();
    assert_eq!(numbers, [1, 2, 3, 4, 5, 6]);
    assert_eq!(with_merged(own.clone(), Vec::new), own);
    let unmerged = lineage_of(&chain(&[1, 2]));
    assert_eq!(with_merged(unmerged.clone(), || unreachable!("nothing is missing")), unmerged);
}

/// Pushes a merge of 2 (ours) and 3 (theirs), both on 1, to a receiver; returns the base and what is missing.
fn push_of_a_merge(fork: &[HeldSnapshot], receiver: &[HeldSnapshot]) -> (&'static str, Option<u128>, Vec<u128>) {
    let own = lineage(&[held(1, &[]), held(2, &[1]), held(4, &[2, 3])]);
    let sent = with_merged(own, || fork.to_vec());
    let (kind, base, missing, _) = support::numbers(&support::relate(&sent.snapshots, receiver, HeadState::Clean, 4));
    (kind, base, missing)
}

#[test]
fn a_merge_is_one_step_on_top_of_whichever_side_the_receiver_has() {
    let fork = [held(3, &[1])];
    assert_eq!(push_of_a_merge(&fork, &[held(1, &[]), held(3, &[1])]), ("fast-forward", Some(3), vec![4]));
    assert_eq!(push_of_a_merge(&fork, &chain(&[1, 2])), ("fast-forward", Some(2), vec![4]));
    assert_eq!(push_of_a_merge(&fork, &chain(&[1])), ("fast-forward", Some(1), vec![2, 4]));
    assert_eq!(push_of_a_merge(&fork, &[]), ("fast-forward", None, vec![1, 2, 4]));
    // The fork was destroyed after the merge: the delta is larger, the step the same.
    assert_eq!(push_of_a_merge(&[], &[held(1, &[]), held(3, &[1])]), ("fast-forward", Some(1), vec![4]));
    // The receiver went on.
    let gone_on = [held(1, &[]), held(3, &[1]), held(5, &[3])];
    assert_eq!(push_of_a_merge(&fork, &gone_on), ("diverged", Some(3), vec![4]));
}
