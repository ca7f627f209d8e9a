//! Histories made of small numbers.
#![allow(dead_code, clippy::unwrap_used)]

use flocker_replication::{
    ancestry::{Forgotten, Memory, answered, offered},
    divergence::{Receiver, Relation, Sender, compare},
    message::{Answer, DivergencePolicy, Mode, Offer, PROTOCOL},
};
use flocker_storage::{delta::DeltaFormat, model::*};
use uuid::Uuid;

pub(crate) const DB: u128 = 1000;

pub(crate) fn volume(id: u128) -> VolumeId {
    VolumeId(Uuid::from_u128(id))
}

pub(crate) fn id(number: u128) -> SnapshotId {
    SnapshotId(Uuid::from_u128(number))
}

pub(crate) fn host(name: &str) -> Host {
    Host { id: HostId([name.as_bytes()[name.len() - 1]; 32]), name: name.parse().unwrap() }
}

pub(crate) fn record(number: u128, name: &str) -> VolumeRecord {
    VolumeRecord {
        id: volume(number),
        name: name.parse().unwrap(),
        metadata: Metadata::new(),
        created: "2026-01-01T00:00:00Z".parse().unwrap(),
        origin: None,
        role: Role::Primary,
        epoch: 1,
        primary: None,
        quota_bytes: None,
    }
}

pub(crate) fn held(number: u128, parents: &[u128]) -> HeldSnapshot {
    HeldSnapshot {
        snapshot: Snapshot {
            id: id(number),
            name: format!("s{number}").parse().unwrap(),
            parents: parents.iter().map(|&parent| id(parent)).collect(),
            host: host("host-a"),
            created: "2026-01-02T03:04:05Z".parse().unwrap(),
            metadata: Metadata::new(),
        },
        volume: volume(DB),
        unchanged: false,
        logical_bytes: 1000 * number as u64,
    }
}

pub(crate) fn same(number: u128, parents: &[u128]) -> HeldSnapshot {
    HeldSnapshot { unchanged: true, ..held(number, parents) }
}

pub(crate) fn named(number: u128, parents: &[u128], name: &str) -> HeldSnapshot {
    let mut held = held(number, parents);
    held.snapshot.name = name.parse().unwrap();
    held
}

pub(crate) fn lineage(snapshots: &[HeldSnapshot]) -> Lineage {
    Lineage { snapshots: snapshots.to_vec() }
}

/// A chain of these, each on the one before.
pub(crate) fn chain(numbers: &[u128]) -> Vec<HeldSnapshot> {
    let parent = |at: usize| at.checked_sub(1).map(|before| numbers[before]);
    numbers.iter().enumerate().map(|(at, &number)| held(number, parent(at).as_slice())).collect()
}

pub(crate) fn relate(sender: &[HeldSnapshot], receiver: &[HeldSnapshot], head: HeadState, want: u128) -> Relation {
    let (db, none) = (record(DB, "db"), Forgotten::default());
    let receiver = lineage(receiver);
    let receiver =
        Receiver { volume: Some(&db), lands_in: db.id, lineage: &receiver, head, elsewhere: &[], forgotten: &none };
    compare(&Sender { lineage: &lineage(sender), forgotten: &none }, &receiver, id(want)).unwrap()
}

/// Compares as two nodes do that exchange what they remember.
pub(crate) fn relate_remembering(
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

pub(crate) fn relate_new(sender: &[HeldSnapshot], elsewhere: &[SnapshotKey], want: u128) -> Relation {
    let answer = Answer { elsewhere: elsewhere.to_vec(), ..answer(None) };
    compare(&Sender::from(&offer(sender, want)), &Receiver::from(&answer), id(want)).unwrap()
}

pub(crate) fn offer(sender: &[HeldSnapshot], want: u128) -> Offer {
    Offer {
        protocol: PROTOCOL,
        transfer: Uuid::from_u128(7),
        volume: record(DB, "db"),
        name: "db".parse().unwrap(),
        lineage: lineage(sender),
        want: id(want),
        formats: vec![DeltaFormat::tree()],
        policy: DivergencePolicy::Refuse,
        mode: Mode::Run,
        sender: host("host-a"),
        forgotten: Forgotten::default(),
    }
}

pub(crate) fn answer(receiver: Option<&[HeldSnapshot]>) -> Answer {
    Answer {
        volume: receiver.map(|_| record(DB, "db")),
        lands_in: volume(DB),
        lineage: lineage(receiver.unwrap_or_default()),
        pieces: Vec::new(),
        head: HeadState::Clean,
        mounted: None,
        elsewhere: Vec::new(),
        formats: vec![DeltaFormat::tree()],
        partial: None,
        receiver: host("host-b"),
        forgotten: Forgotten::default(),
    }
}

/// A relation as numbers: its kind, the base or common snapshot, what is missing or ours, what is the receiver's.
pub(crate) fn numbers(relation: &Relation) -> (&'static str, Option<u128>, Vec<u128>, Vec<u128>) {
    let number = |held: &HeldSnapshot| held.snapshot.id.0.as_u128();
    let all = |list: &[HeldSnapshot]| list.iter().map(number).collect();
    match relation {
        Relation::UpToDate => ("up-to-date", None, vec![], vec![]),
        Relation::FastForward { base, missing } => {
            ("fast-forward", base.as_ref().map(|base| number(&base.snapshot)), all(missing), vec![])
        }
        Relation::Behind { newer, common } => ("behind", common.as_ref().map(number), vec![], all(newer)),
        Relation::Diverged { common, only_sender, only_receiver } => {
            ("diverged", Some(number(common)), all(only_sender), all(only_receiver))
        }
        Relation::Unrelated { .. } => ("unrelated", None, vec![], vec![]),
        Relation::Dirty { tip } => ("dirty", tip.as_ref().map(number), vec![], vec![]),
    }
}
