//! What it costs to find out how two long histories relate: bytes that travel, and time on one processor, of both sides together.
//!
//! `cargo bench -p flocker-replication --bench lineage`. Each history is a chain; the receiver lacks the ten newest snapshots. What is timed
//! goes from the sender's lineage to the relation that both sides have found, messages written and read included. Medians; and the most that the process had in memory meanwhile (both
//! sides' histories and messages included).
#![allow(clippy::unwrap_used)]
#![expect(clippy::disallowed_methods, reason = "a benchmark has a clock")]

#[path = "../tests/support/mod.rs"]
mod support;

use std::{hint::black_box, time::Instant};

use flocker_replication::{
    divergence::{Receiver, Relation, Sender, compare},
    message::{Answer, Message, Offer, Rest},
    outline::{Puzzle, cut, of_blocks},
};
use flocker_storage::model::Lineage;
use support::{answer, chain, lineage, offer};

const ROUNDS: usize = 21;
const LACKING: usize = 10;

fn main() {
    println!(
        "| snapshots | of them sent anew | bytes that travel | in full | ms | MiB |\n|---:|---:|---:|---:|---:|---:|"
    );
    for count in [100, 1_000, 10_000, 20_000] {
        // Counts the highest use from here on (proc(5)).
        std::fs::write("/proc/self/clear_refs", "5").unwrap();
        let mut rounds: Vec<Round> = (0..ROUNDS).map(|_| round(count)).collect();
        rounds.sort_by(|a, b| a.milliseconds.total_cmp(&b.milliseconds));
        let Round { missing, bytes, whole, milliseconds } = rounds.swap_remove(ROUNDS / 2);
        println!("| {count} | {missing} | {bytes} | {whole} | {milliseconds:.2} | {} |", highest_resident_mib());
    }
}

fn highest_resident_mib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1024
}

struct Round {
    /// How many snapshots the relation says are to be sent.
    missing: usize,
    bytes: usize,
    whole: usize,
    milliseconds: f64,
}

fn round(count: usize) -> Round {
    // Ids are random; of chains of small numbers every block would look the same.
    let number = |at: u128| (at << 64) | (at.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 24 & 0xFFFF_FFFF);
    let numbers: Vec<u128> = (1..=count as u128).map(number).collect();
    let whole = chain(&numbers);
    let (want, here) = (whole.last().unwrap().snapshot.id, lineage(&whole));
    let there = lineage(&whole[..count - LACKING]);
    let offered = Offer { want, lineage: Lineage::default(), ..offer(&whole, 1) };
    let answered = Answer { lineage: Lineage::default(), ..answer(Some(&whole[..1])) };
    let in_full = bytes(&Message::Offer(Box::new(Offer { lineage: here.clone(), ..offered.clone() })));

    let begun = Instant::now();
    let (older, newest) = cut(here.clone(), want);
    let first = Message::Offer(Box::new(Offer { lineage: newest, ..offered.clone() }));
    let rest = Message::Rest(Rest { older, ..Rest::default() });
    let mut travelled = bytes(&first) + bytes(&rest);
    // The receiver puts it together, compares, and says what it has.
    let (Message::Offer(first), Message::Rest(rest)) = (again(&first), again(&rest)) else { unreachable!() };
    let puzzle = Puzzle::begin(rest.older, &there);
    let sent = of_blocks(&here, &puzzle.missing());
    travelled += sent.len() * (in_full / count);
    let put_together = puzzle.finish(sent, first.lineage).unwrap();
    let at_receiver = relate(&Offer { lineage: put_together, ..offered.clone() }, &there, &answered);
    let mut reply = Answer { lineage: there.clone(), ..answered.clone() };
    reply.pack(&here);
    let reply = Message::Answer(Box::new(reply));
    travelled += bytes(&reply);
    // The sender reads it and compares, too.
    let Message::Answer(mut reply) = again(&reply) else { unreachable!() };
    reply.unpack(&here).unwrap();
    let at_sender = relate(&Offer { lineage: here.clone(), ..offered }, &reply.lineage, &answered);
    let milliseconds = begun.elapsed().as_secs_f64() * 1e3;

    let Relation::FastForward { missing, .. } = &at_receiver else { panic!("{at_receiver:?}") };
    assert_eq!(missing.len(), LACKING);
    assert_eq!(format!("{at_sender:?}"), format!("{at_receiver:?}"));
    Round { missing: missing.len(), bytes: black_box(travelled), whole: in_full, milliseconds }
}

fn relate(offer: &Offer, there: &Lineage, answered: &Answer) -> Relation {
    let answer = Answer { lineage: there.clone(), ..answered.clone() };
    compare(&Sender::from(offer), &Receiver::from(&answer), offer.want).unwrap()
}

fn bytes(message: &Message) -> usize {
    postcard::to_allocvec(message).unwrap().len()
}

fn again(message: &Message) -> Message {
    let read: Message = postcard::from_bytes(&postcard::to_allocvec(message).unwrap()).unwrap();
    read.validate().unwrap();
    read
}
