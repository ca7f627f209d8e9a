//! What a receiver lets in, and how a plan meets it.
#![allow(clippy::unwrap_used)]

mod support;

use flocker_replication::{
    divergence::{Receiver, Sender, compare},
    inbound::{Inbound, Next},
    message::{After, Answer, BeginStep, Mode, Offer, ProblemCode, StepStream},
    plan::{Direction, Parties, Plan, Step, plan},
};
use flocker_storage::{delta::DeltaFormat, model::*};
use proptest::prelude::*;
use support::*;
use uuid::Uuid;

fn planned(offer: &Offer, answer: &Answer) -> Vec<Step> {
    let relation = compare(&Sender::from(offer), &Receiver::from(answer), offer.want).unwrap();
    let parties = Parties {
        direction: Direction::Push,
        volume: offer.volume.name.clone(),
        name: offer.name.clone(),
        sender: offer.sender.clone(),
        receiver: answer.receiver.clone(),
    };
    match plan(&offer.lineage, offer.want, relation, &parties, &offer.formats, answer).unwrap() {
        Plan::FastForward(_, steps) => steps,
        Plan::UpToDate(_) | Plan::Refuse(_) => Vec::new(),
    }
}

fn begin(number: u32, step: &Step) -> BeginStep {
    BeginStep {
        step: number,
        snapshot: step.snapshot.snapshot.clone(),
        unchanged: step.snapshot.unchanged,
        logical_bytes: step.snapshot.logical_bytes,
        base: step.base.map(|base| base.on_receiver),
        format: step.format.clone(),
        stream: StepStream { id: Uuid::from_u128(1), oldest_frame: 0 },
        resume: None,
        after: After::More,
    }
}

fn code(result: Result<Next, flocker_replication::message::Problem>) -> ProblemCode {
    result.unwrap_err().code
}

#[test]
fn the_planned_steps_are_let_in_one_after_the_other() {
    let (offer, answer) = (offer(&chain(&[1, 2, 3]), 3), answer(Some(&chain(&[1]))));
    let steps = planned(&offer, &answer);
    let mut inbound = Inbound::new(&offer, &answer);
    let mut here = answer.lineage.clone();
    for (number, step) in (0..).zip(&steps) {
        assert!(!inbound.is_complete());
        assert_eq!(inbound.begin(&begin(number, step), &here), Ok(Next::Receive));
        here.snapshots.push(step.snapshot.clone());
    }
    assert!(inbound.is_complete());
    assert_eq!(steps.len(), 2);
    assert_eq!(inbound.outcome(here.tip().unwrap()).want.id, id(3));
}

#[test]
fn a_clone_lands_on_its_origin_elsewhere_and_goes_on_in_its_own_volume() {
    let offer = offer(&chain(&[1, 2, 3]), 3);
    let origin = SnapshotKey { volume: volume(77), snapshot: id(1) };
    let answer = Answer { elsewhere: vec![origin], ..answer(None) };
    let bases: Vec<_> = planned(&offer, &answer).iter().map(|step| step.base.unwrap().on_receiver).collect();
    assert_eq!(bases, [origin, SnapshotKey { volume: volume(DB), snapshot: id(2) }]);
    let mut inbound = Inbound::new(&offer, &answer);
    let first = begin(0, &planned(&offer, &answer)[0]);
    assert_eq!(inbound.begin(&first, &Lineage::default()), Ok(Next::Receive));
}

#[test]
fn a_snapshot_that_landed_meanwhile_is_skipped() {
    let (offer, answer) = (offer(&chain(&[1, 2, 3]), 3), answer(Some(&chain(&[1]))));
    let steps = planned(&offer, &answer);
    let mut inbound = Inbound::new(&offer, &answer);
    let here = lineage(&chain(&[1, 2]));
    let skipped = Ok(Next::Skip(here.snapshots[1].clone()));
    assert_eq!(inbound.begin(&begin(0, &steps[0]), &here), skipped);
    assert_eq!(inbound.begin(&begin(0, &steps[0]), &here), skipped, "once more is no harm");
    assert_eq!(inbound.begin(&begin(1, &steps[1]), &here), Ok(Next::Receive));
}

#[test]
fn whatever_does_not_fit_is_refused() {
    let (offer, answer) = (offer(&chain(&[1, 2, 3]), 3), answer(Some(&chain(&[1]))));
    let steps = planned(&offer, &answer);
    let here = &answer.lineage;
    let good = begin(0, &steps[0]);
    let judge = |begin: &BeginStep, here: &Lineage| code(Inbound::new(&offer, &answer).begin(begin, here));

    let other_base = SnapshotKey { volume: volume(DB), snapshot: id(9) };
    assert_eq!(judge(&BeginStep { base: Some(other_base), ..good.clone() }, here), ProblemCode::StepMismatch);
    assert_eq!(judge(&BeginStep { base: None, ..good.clone() }, here), ProblemCode::StepMismatch);
    assert_eq!(judge(&BeginStep { step: 5, ..good.clone() }, here), ProblemCode::StepMismatch);
    assert_eq!(judge(&begin(1, &steps[1]), here), ProblemCode::StepMismatch, "a step left out");
    assert_eq!(judge(&BeginStep { unchanged: true, ..good.clone() }, here), ProblemCode::StepMismatch);
    let format = DeltaFormat("zfs-send/1".to_owned());
    assert_eq!(judge(&BeginStep { format, ..good.clone() }, here), ProblemCode::UnknownFormat);
    let mut parents = good.clone();
    parents.snapshot.parents.clear();
    assert_eq!(judge(&parents, here), ProblemCode::StepMismatch);
    assert_eq!(judge(&good, &lineage(&chain(&[1, 9]))), ProblemCode::StepMismatch, "a snapshot was taken meanwhile");
    assert_eq!(judge(&good, &Lineage::default()), ProblemCode::StepMismatch, "the base was destroyed meanwhile");
    let mut metadata = good.clone();
    metadata.snapshot.metadata.insert("why".to_owned(), "test".to_owned());
    assert_eq!(Inbound::new(&offer, &answer).begin(&metadata, here), Ok(Next::Receive), "metadata travels here");
}

#[test]
fn nothing_is_let_in_where_histories_have_gone_apart_or_on_a_dry_run() {
    let sender = offer(&chain(&[1, 2]), 2);
    let step = planned(&sender, &answer(Some(&chain(&[1])))).remove(0);
    let dry = Offer { mode: Mode::DryRun, ..sender.clone() };
    let fitting = answer(Some(&chain(&[1])));
    let apart = answer(Some(&chain(&[1, 3])));
    let dirty = Answer { head: HeadState::Dirty, ..fitting.clone() };
    for (offer, answer) in [(&dry, &fitting), (&sender, &apart), (&sender, &dirty)] {
        let judged = Inbound::new(offer, answer).begin(&begin(0, &step), &answer.lineage);
        assert_eq!(code(judged), ProblemCode::StepMismatch);
    }
}

#[derive(Debug, Clone)]
enum Event {
    Begin { number: u32, snapshot: u128, parent: Option<u128>, base: Option<(u128, u128)> },
    Planned(usize),
    Land,
    Take(u128),
    Forget,
}

fn event() -> impl Strategy<Value = Event> {
    let maybe = || prop::option::of(0_u128..8);
    let base = prop::option::of((prop_oneof![Just(DB), Just(77)], 0_u128..8));
    prop_oneof![
        (0_u32..5, 0_u128..8, maybe(), base).prop_map(|(number, snapshot, parent, base)| Event::Begin {
            number,
            snapshot,
            parent,
            base
        }),
        (0_usize..5).prop_map(Event::Planned),
        Just(Event::Land),
        Just(Event::Land),
        (20_u128..24).prop_map(Event::Take),
        Just(Event::Forget),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 10_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_order_of_events_lets_in_a_step_whose_base_is_not_held(
        ahead in 1_u128..6, common in 0_u128..6, events in prop::collection::vec(event(), 0..16),
    ) {
        let numbers: Vec<u128> = (1..=ahead).collect();
        let offer = offer(&chain(&numbers), ahead);
        let answer = answer(Some(&chain(&numbers[..numbers.len().min(common as usize)])));
        let steps = planned(&offer, &answer);
        let mut inbound = Inbound::new(&offer, &answer);
        let mut here = answer.lineage.clone();
        let mut arriving: Option<HeldSnapshot> = None;
        for event in events {
            let step = match event {
                Event::Land => {
                    here.snapshots.extend(arriving.take());
                    continue;
                }
                Event::Take(number) => {
                    here.snapshots.push(held(number, &[]));
                    continue;
                }
                Event::Forget => {
                    here.snapshots.pop();
                    continue;
                }
                Event::Planned(at) if at < steps.len() => begin(at as u32, &steps[at]),
                Event::Planned(_) => continue,
                Event::Begin { number, snapshot, parent, base } => {
                    let snapshot = held(snapshot, parent.as_slice());
                    let mut step = begin(number, &Step { snapshot, base: None, format: DeltaFormat::tree() });
                    step.base = base.map(|(place, number)| SnapshotKey { volume: volume(place), snapshot: id(number) });
                    step
                }
            };
            match inbound.begin(&step, &here) {
                Ok(Next::Receive) => {
                    let tip = here.tip().map(HeldSnapshot::key);
                    prop_assert_eq!(step.base, tip, "a linear history is extended at its tip");
                    prop_assert!(here.find(step.snapshot.id).is_none());
                    prop_assert!(offer.lineage.find(step.snapshot.id).is_some());
                    arriving = offer.lineage.find(step.snapshot.id).cloned();
                }
                Ok(Next::Skip(held)) => prop_assert_eq!(here.find(step.snapshot.id), Some(&held)),
                Err(_) => {}
            }
        }
    }
}
