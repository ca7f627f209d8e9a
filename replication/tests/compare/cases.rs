//! The cases that people meet, each with its outcome; clones and volumes of the same name among them.

use flocker_replication::{
    binding::{Binding, bind, sibling},
    divergence::{Receiver, Relation, Sender, UnrelatedReason, WantMissing, compare},
    message::Answer,
};
use flocker_storage::model::*;

use crate::support::*;

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

#[test]
fn a_parent_that_is_listed_behind_its_child_is_none() {
    let out_of_order = [held(9, &[]), held(2, &[1]), held(1, &[])];
    let relation = relate(&out_of_order, &[held(1, &[])], HeadState::Clean, 2);
    assert_eq!(numbers(&relation).0, "unrelated", "{relation:?}");
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
    let bind = |wanted: &str, held: &[VolumeRecord], arriving: Option<&str>| {
        let binding = bind(&offered, &name(wanted), held, arriving.map(name).as_ref());
        let kind = match binding {
            Binding::Existing(_) => "existing",
            Binding::New(_) => "new",
            Binding::Taken(..) => "taken",
        };
        (kind, binding.lands_in())
    };
    let bound = |wanted: &str, held: &[VolumeRecord]| bind(wanted, held, None);
    assert_eq!(bound("db", &[]), ("new", offered.id));
    assert_eq!(bound("copy", &[]), ("new", offered.id));
    assert_eq!(bound("db", std::slice::from_ref(&db)), ("existing", offered.id));
    assert_eq!(bound("db", std::slice::from_ref(&renamed)), ("existing", offered.id));
    assert_eq!(bound("copy", &[renamed]), ("existing", offered.id));
    assert_eq!(bound("db", &[foreign]), ("taken", offered.id));
    assert_eq!(bound("copy", std::slice::from_ref(&db)), ("new", beside));
    assert_eq!(bound("copy", &[db, copy]), ("existing", beside));
    // While it arrives under a name, another copy need not wait for it; what would go on in that volume has to.
    assert_eq!(bind("copy", &[], Some("db")), ("new", beside));
    assert_eq!(bind("copy", &[], Some("other")), ("new", beside));
    assert_eq!(bind("copy", &[], Some("copy")), ("new", offered.id));
    assert_eq!(bind("db", &[], Some("copy")), ("new", offered.id));
}
