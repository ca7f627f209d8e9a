//! The receiver's state machine for one attempt: which steps it lets in.
//!
//! Owns the check of a sender's steps against what the receiver holds. Refuses to know bytes and drivers: where the
//! bytes of a step start is the node's to say, for it knows what it has open. The sender is not trusted: the receiver
//! makes the same comparison by itself and lets in only what follows from it.
//!
//! | state | the step expected | one that was done | any other |
//! |---|---|---|---|
//! | closed (no fast-forward, or a dry run) | – | – | refused |
//! | waiting for step n | [`Next::Receive`], or [`Next::Skip`] where it landed meanwhile; then waiting for n + 1 | [`Next::Skip`] | refused |
//! | all steps done | – | [`Next::Skip`] | refused |
//!
//! A step that was let in and did not land is not expected again in this attempt: its stream is broken, the next
//! attempt makes a new `Inbound`. The caller passes the volume's lineage as it is now, under the volume's lock, so that
//! a snapshot taken here meanwhile is noticed.

use std::collections::BTreeSet;

use flocker_storage::model::{HeldSnapshot, Lineage, SnapshotId, SnapshotKey};

use crate::{
    ancestry::{Ancestor, learnt},
    divergence::{Receiver, Relation, Sender, compare},
    message::{Answer, BeginStep, Mode, Offer, Problem, ProblemCode},
    plan::{Direction, Outcome, Parties, Point, Points, Verdict},
};

/// What the receiver expects of one attempt.
#[derive(Debug, Clone)]
pub struct Inbound {
    offer: Offer,
    answer: Answer,
    base: Option<SnapshotKey>,
    base_point: Option<Point>,
    missing: Vec<HeldSnapshot>,
    next: usize,
    tip: Option<SnapshotId>,
}

/// What is to be done about a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Next {
    /// Take in its bytes.
    Receive,
    /// Answer [`StepDone`](crate::message::StepDone) at once: the snapshot is here.
    Skip(HeldSnapshot),
}

impl Inbound {
    /// Starts an attempt with what was offered and what was answered, both valid.
    pub fn new(offer: &Offer, answer: &Answer) -> Self {
        let (base, missing) = match compare(&Sender::from(offer), &Receiver::from(answer), offer.want) {
            Ok(Relation::FastForward { base, missing }) if offer.mode == Mode::Run => (base, missing),
            _ => (None, Vec::new()),
        };
        Self {
            offer: offer.clone(),
            answer: answer.clone(),
            base_point: base.as_ref().map(|base| Point::from(&base.snapshot)),
            base: base.map(|base| base.on_receiver),
            missing,
            next: 0,
            tip: answer.lineage.tip().map(|held| held.snapshot.id),
        }
    }

    /// Judges a step. `here` is the lineage of the volume that it lands in, as it is now; empty where there is none.
    ///
    /// An error changes nothing; it is what the sender is told.
    pub fn begin(&mut self, begin: &BeginStep, here: &Lineage) -> Result<Next, Problem> {
        let refuse = |rule: &str| {
            let problem = Problem::new(ProblemCode::StepMismatch).with("step", begin.step);
            Err(problem.with("snapshot", &begin.snapshot.name).with("rule", rule))
        };
        let number = begin.step as usize;
        let Some(expected) = self.missing.get(number) else {
            return refuse("no such step follows from what was offered and what is here");
        };
        if number > self.next {
            return refuse("a step before it was left out");
        }
        if !is_as_offered(begin, expected) {
            return refuse("it is not the snapshot that was offered for this step");
        }
        if let Some(held) = here.find(begin.snapshot.id) {
            if number == self.next {
                self.next += 1;
                self.tip = here.tip().map(|held| held.snapshot.id);
            }
            return Ok(Next::Skip(held.clone()));
        }
        if number < self.next {
            return refuse("it was begun before in this attempt and did not land");
        }
        if begin.base != self.expected_base() {
            return refuse("it does not build on what the receiver would build it on");
        }
        if here.tip().map(|held| held.snapshot.id) != self.tip {
            return refuse("the receiver's history has moved on meanwhile");
        }
        if !self.holds(begin.base, here) {
            return refuse("the snapshot that it builds on is gone");
        }
        if !self.answer.formats.contains(&begin.format) {
            return Err(Problem::new(ProblemCode::UnknownFormat).with("format", &begin.format));
        }
        self.next += 1;
        self.tip = Some(begin.snapshot.id);
        Ok(Next::Receive)
    }

    /// Returns the ancestors of the snapshots that are to arrive which this node does not hold, by the sender's word: to be
    /// remembered before the first one lands.
    pub fn learnt(&self) -> Vec<Ancestor> {
        let elsewhere = self.answer.elsewhere.iter().map(|key| key.snapshot);
        let here: BTreeSet<SnapshotId> =
            self.answer.lineage.snapshots.iter().map(|held| held.snapshot.id).chain(elsewhere).collect();
        learnt(&self.offer, &here, &self.missing)
    }

    /// Says what an attempt whose steps have all landed has done, for the one who asked for a pull. `held` is the last
    /// snapshot as it is held here.
    pub fn outcome(&self, held: &HeldSnapshot) -> Outcome {
        let offer = &self.offer;
        let existing = self.answer.volume.as_ref();
        let parties = Parties {
            direction: Direction::Pull,
            volume: offer.volume.name.clone(),
            name: existing.map_or_else(|| offer.name.clone(), |record| record.name.clone()),
            sender: offer.sender.clone(),
            receiver: self.answer.receiver.clone(),
        };
        let verdict = Verdict::FastForward { base: self.base_point.clone(), missing: Points::new(&self.missing) };
        let Parties { direction, volume, name, sender, receiver } = parties;
        Outcome { direction, volume, name, sender, receiver, want: Point::from(held), verdict }
    }

    /// Tells whether all steps have begun or were skipped: whether a sender may finish.
    pub fn is_complete(&self) -> bool {
        self.next == self.missing.len()
    }

    fn expected_base(&self) -> Option<SnapshotKey> {
        match self.next.checked_sub(1) {
            None => self.base,
            Some(before) => {
                let snapshot = self.missing[before].snapshot.id;
                Some(SnapshotKey { volume: self.answer.lands_in, snapshot })
            }
        }
    }

    /// Tells whether a base is held: in the volume's lineage, or (for a new volume) where the answer said.
    fn holds(&self, base: Option<SnapshotKey>, here: &Lineage) -> bool {
        let Some(base) = base else { return true };
        let in_lineage = here.find(base.snapshot).is_some_and(|held| held.key() == base);
        in_lineage || (here.snapshots.is_empty() && self.answer.elsewhere.contains(&base))
    }
}

/// A step's snapshot is the offered one, with its metadata.
fn is_as_offered(begin: &BeginStep, offered: &HeldSnapshot) -> bool {
    let mut stripped = begin.snapshot.clone();
    stripped.metadata.clear();
    stripped == offered.snapshot && begin.unchanged == offered.unchanged && begin.logical_bytes == offered.logical_bytes
}
