//! Long lineages in few bytes: what is put together again is what was there, whatever either side has besides or lacks.
#![allow(clippy::unwrap_used)]

mod support;

use flocker_replication::{
    message::{Description, LINEAGE_LIMIT, Message, Rest},
    outline::{Block, Piece, Puzzle, WHOLE_LIMIT, cut, of_blocks, outline, pack, pack_beside, unpack},
};
use flocker_storage::model::{HeadState, HeldSnapshot, Lineage};
use proptest::prelude::*;
use support::{DB, answer, chain, host, id, lineage, offer, record};

/// Numbers whose last byte looks random, as that of an id does.
fn numbers(count: u128) -> Vec<u128> {
    (1..=count)
        .map(|number| (number << 64) | (number.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 24 & 0xFFFF_FFFF))
        .collect()
}

fn long(count: u128) -> Vec<HeldSnapshot> {
    chain(&numbers(count))
}

fn want(snapshots: &[HeldSnapshot]) -> flocker_storage::model::SnapshotId {
    snapshots.last().unwrap().snapshot.id
}

/// Lets a receiver take in an offer, and returns the lineage and how many snapshots it had to ask for.
fn arrive(sender: &[HeldSnapshot], receiver: &[HeldSnapshot]) -> (Lineage, usize) {
    let whole = lineage(sender);
    let (older, newest) = cut(whole.clone(), want(sender));
    Message::Rest(Rest { older: older.clone(), ..Rest::default() }).validate().unwrap();
    let puzzle = Puzzle::begin(older, &lineage(receiver));
    let sent = of_blocks(&whole, &puzzle.missing());
    let asked = sent.len();
    (puzzle.finish(sent, newest).unwrap(), asked)
}

fn bytes(message: &Message) -> usize {
    postcard::to_allocvec(message).unwrap().len()
}

#[test]
fn ten_thousand_snapshots_that_both_have_are_compared_by_a_few_kibibytes() {
    let sender = long(10_000);
    let receiver = &sender[..9_990];
    let mut answered = answer(Some(receiver));
    let (older, newest) = cut(lineage(&sender), want(&sender));
    let mut offered = offer(&sender, 1);
    offered.want = want(&sender);
    let whole = bytes(&Message::Offer(Box::new(offered.clone())));
    offered.lineage = newest;

    let travelled =
        bytes(&Message::Offer(Box::new(offered.clone()))) + bytes(&Message::Rest(Rest { older, ..Rest::default() }));
    answered.pack(&lineage(&sender));

    assert!(whole > 500_000, "{whole}");
    assert!(travelled < 40_000, "{travelled}");
    assert!(bytes(&Message::Answer(Box::new(answered.clone()))) < 500);
    Message::Offer(Box::new(offered)).validate().unwrap();
    assert_eq!(arrive(&sender, receiver), (lineage(&sender), 0));
    answered.lineage = Lineage::default();
    answered.unpack(&lineage(&sender)).unwrap();
    assert_eq!(answered.lineage, lineage(receiver));
}

#[test]
fn a_history_that_both_have_is_shown_without_its_records() {
    let (asker, asked) = (long(10_000), long(10_003));
    let question = Message::Rest(Rest { older: outline(&lineage(&asker)), ..Rest::default() });
    question.validate().unwrap();
    assert!(bytes(&question) < 6_000, "{}", bytes(&question));
    let Message::Rest(Rest { older, .. }) = question else { unreachable!() };
    let mut description = description(lineage(&asked));
    description.pack(&older);
    let mut answer: Description = postcard::from_bytes(&postcard::to_allocvec(&description).unwrap()).unwrap();
    let size = bytes(&Message::Description(Box::new(answer.clone())));
    // What follows the last end of a block that both have.
    assert!(size < 40_000, "{size}");
    answer.unpack(&lineage(&asker)).unwrap();
    assert_eq!(answer.lineage, lineage(&asked));
    // Beside another lineage than the one that was outlined the pieces point beyond it.
    assert_eq!(description.unpack(&Lineage::default()).unwrap_err().message, "Description");
}

fn description(lineage: Lineage) -> Description {
    Description {
        volume: record(DB, "db"),
        lineage,
        pieces: Vec::new(),
        head: HeadState::Clean,
        mounted: None,
        formats: Vec::new(),
        host: host("host-b"),
    }
}

#[test]
fn what_one_side_has_destroyed_costs_the_blocks_around_it_only() {
    let sender = long(5_000);
    let mut receiver = sender.clone();
    receiver.remove(3_210);
    receiver.remove(120);
    let (whole, asked) = arrive(&sender, &receiver);
    assert_eq!(whole, lineage(&sender));
    assert!((2..2_000).contains(&asked), "{asked}");
    // A receiver that has nothing asks for all but the newest.
    let (whole, asked) = arrive(&sender, &[]);
    assert_eq!(whole, lineage(&sender));
    assert!((4_000..5_000).contains(&asked), "{asked}");
}

#[test]
fn short_lineages_and_old_snapshots_travel_whole() {
    let short = long(WHOLE_LIMIT as u128);
    assert_eq!(cut(lineage(&short), want(&short)), (Vec::new(), lineage(&short)));
    let sender = long(1_000);
    assert_eq!(cut(lineage(&sender), sender[10].snapshot.id), (Vec::new(), lineage(&sender)));
}

#[test]
fn what_is_not_what_the_outline_says_is_refused() {
    let sender = long(1_000);
    let (older, newest) = cut(lineage(&sender), want(&sender));
    let finish = |change: &dyn Fn(&mut Vec<HeldSnapshot>)| {
        let puzzle = Puzzle::begin(older.clone(), &Lineage::default());
        let mut sent = of_blocks(&lineage(&sender), &puzzle.missing());
        change(&mut sent);
        puzzle.finish(sent, newest.clone())
    };
    assert_eq!(finish(&|_| ()), Ok(lineage(&sender)));
    assert!(finish(&|sent| sent.swap(0, 1)).unwrap_err().contains("not those of its outline"));
    assert!(finish(&|sent| drop(sent.pop())).unwrap_err().contains("left out"));
    assert!(finish(&|sent| sent.push(sent[0].clone())).unwrap_err().contains("not asked for"));

    let rule = |older: Vec<Block>| Message::Rest(Rest { older, ..Rest::default() }).validate().unwrap_err().rule;
    let block = |count: u32| Block { digest: [0; 16], count };
    assert!(rule(vec![block(0)]).contains("has not 1 to"));
    assert!(rule(vec![block(u32::MAX)]).contains("at most"));
    assert!(rule(vec![block(500); LINEAGE_LIMIT / 500 + 1]).contains("at most"));
    assert!(Message::Want(vec![1, 1]).validate().unwrap_err().rule.contains("out of order"));
    // Who asks for blocks that are not there gets nothing for them.
    assert_eq!(of_blocks(&lineage(&sender), &[4_000_000_000]), Vec::new());
}

#[test]
fn an_answer_that_points_beyond_the_offer_is_refused() {
    let offered = lineage(&chain(&[1, 2, 3]));
    let refused = |pieces: Vec<Piece>| unpack(pieces, &offered).unwrap_err();
    assert!(refused(vec![Piece::Offered { first: 2, count: 2 }]).contains("were not offered"));
    assert!(refused(vec![Piece::Offered { first: u32::MAX, count: u32::MAX }]).contains("were not offered"));
    assert!(refused(vec![Piece::Offered { first: 0, count: 3 }; LINEAGE_LIMIT / 3 + 1]).contains("more than"));
    let mut twice = answer(Some(&[]));
    twice.pieces = vec![Piece::Offered { first: 0, count: 2 }, Piece::Offered { first: 1, count: 1 }];
    assert!(twice.unpack(&offered).unwrap_err().rule.contains("twice"));
}

/// Some of a long lineage's snapshots, with others between them, some with other records.
fn like(sender: Vec<HeldSnapshot>) -> impl Strategy<Value = Vec<HeldSnapshot>> {
    let fates = proptest::collection::vec(0..40_u8, sender.len());
    fates.prop_map(move |fates| {
        let mut like = Vec::new();
        for (held, fate) in sender.iter().zip(fates) {
            match fate {
                0 => {}
                1 => like.push(HeldSnapshot { logical_bytes: held.logical_bytes + 1, ..held.clone() }),
                2 => {
                    let mut other = held.clone();
                    other.snapshot.id = id(held.snapshot.id.0.as_u128() ^ (1 << 100));
                    like.extend([other, held.clone()]);
                }
                _ => like.push(held.clone()),
            }
        }
        like
    })
}

proptest! {
    #[test]
    fn both_sides_get_what_the_other_has(
        (sender, receiver) in (200..700_u128).prop_flat_map(|count| (Just(long(count)), like(long(count))))
    ) {
        prop_assert_eq!(arrive(&sender, &receiver).0, lineage(&sender));
        let pieces = pack(&lineage(&receiver), &lineage(&sender));
        prop_assert_eq!(unpack(pieces, &lineage(&sender)).unwrap(), lineage(&receiver));
        let beside = pack_beside(&lineage(&receiver), &outline(&lineage(&sender)));
        prop_assert_eq!(unpack(beside, &lineage(&sender)).unwrap(), lineage(&receiver));
    }
}
