//! How much a transfer has to send: asked of the driver when the transfer runs for a while, or by a dry run, and told to who started it.
//!
//! The sender knows, whoever started the transfer: a push tells its own user, of a pull the receiver is told by the pipeline, or by a
//! message where nothing is sent.
//! Neighbour: [`crate::push`].

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use flocker_replication::plan::Step;
use flocker_storage::{
    delta::{Compare, DeltaRequest},
    model::SnapshotKey,
};
use flocker_transport::Expected;
use tokio::time::Instant;

use crate::{daemon::Node, problem, transfers::Job};

/// How long a push runs until it is asked how much there is to send: most are over by then.
const ESTIMATE_AFTER: Duration = Duration::from_secs(1);
/// The most deltas that the driver is asked about. Of more snapshots it is asked about some, from the first to the last, and the
/// others count as much as the one before them.
const ASKED_STEPS: usize = 64;
/// How long a push that runs asks about one step after the other, as some drivers have to read much for an answer; a dry run
/// asks until it knows.
const ASKING: Duration = Duration::from_secs(1);

/// What is known of the lengths of a transfer's deltas, and who waits to know.
#[derive(Default)]
pub(crate) struct Expectations(Mutex<State>);

#[derive(Default)]
struct State {
    /// Of each step: what it has, and all behind it. Empty until that is known.
    rest: Vec<u64>,
    current: Option<(usize, Expected)>,
}

impl Expectations {
    /// A step's delta begins to flow.
    pub(crate) fn begin(&self, step: usize, told: &Expected) {
        let mut state = self.state();
        state.current = Some((step, told.clone()));
        state.tell();
    }

    /// The lengths of all deltas are known.
    fn know(&self, lengths: &[u64]) {
        let mut state = self.state();
        state.rest = lengths.to_vec();
        for step in (1..lengths.len()).rev() {
            state.rest[step - 1] += state.rest[step];
        }
        state.tell();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn tell(&self) {
        if let Some((step, told)) = &self.current
            && let Some(rest) = self.rest.get(*step)
        {
            told.set(*rest);
        }
    }
}

/// Tells the user how much there is to send, where sending takes long enough to ask for it: by the transfer, or through a receiver
/// that pulls.
pub(crate) async fn estimate(
    node: &Node,
    job: Option<&Arc<Job>>,
    compare: Compare,
    steps: &[Step],
    expectations: &Expectations,
) {
    // What is drawn for a simulation would depend on whether a push runs long enough to be watched.
    if node.is_simulated || job.is_some_and(|job| !job.is_unestimated()) {
        return;
    }
    let before = job.map_or(0, |job| job.resource().progress.delta_bytes);
    tokio::time::sleep(ESTIMATE_AFTER).await;
    let Some(lengths) = lengths(node, compare, steps, Some(Instant::now() + ASKING)).await else { return };
    match job {
        Some(job) => job.expects(before + lengths.iter().sum::<u64>()),
        None => expectations.know(&lengths),
    }
}

/// Tells how much a transfer would have to send, before it is started. `None` where there is nothing to send, or no way to know.
pub(crate) async fn beforehand(node: &Node, compare: Compare, steps: &[Step]) -> Option<u64> {
    if node.is_simulated || steps.is_empty() {
        return None;
    }
    Some(lengths(node, compare, steps, None).await?.iter().sum())
}

/// Asks how long the delta of each step is. From a time on no further step is asked about.
async fn lengths(node: &Node, compare: Compare, steps: &[Step], until: Option<Instant>) -> Option<Vec<u64>> {
    let is_late = || until.is_some_and(|until| Instant::now() >= until);
    let mut lengths: Vec<u64> = Vec::with_capacity(steps.len());
    for (number, step) in steps.iter().enumerate() {
        let length = match (step.base, lengths.last()) {
            (None, _) => step.snapshot.logical_bytes,
            // The first step may be a full copy, which says nothing about others.
            (Some(_), Some(last)) if number > 1 && (is_late() || !is_asked_about(number, steps.len())) => *last,
            (Some(base), _) => length_of(node, base.on_sender, step, compare).await?,
        };
        lengths.push(length);
    }
    Some(lengths)
}

/// Chooses [`ASKED_STEPS`] of the steps, as far from each other as can be.
fn is_asked_about(number: usize, steps: usize) -> bool {
    number == 0 || steps <= ASKED_STEPS || number * ASKED_STEPS / steps != (number - 1) * ASKED_STEPS / steps
}

async fn length_of(node: &Node, base: SnapshotKey, step: &Step, compare: Compare) -> Option<u64> {
    let (target, format) = (step.snapshot.key(), step.format.clone());
    let request = DeltaRequest { base: Some(base), target, format, compare, resume: None };
    node.driver.estimate_delta(request).await.unwrap_or_else(|error| {
        let (snapshot, error) = (step.snapshot.snapshot.id, problem::chain(&error));
        tracing::debug!(%snapshot, error, "no estimate of what is to be sent");
        None
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_many_steps_some_are_asked_about_from_the_first_to_the_last() {
        for steps in [1, 63, 64, 65, 100, 500, 10_000] {
            let asked: Vec<_> = (0..steps).filter(|number| is_asked_about(*number, steps)).collect();
            assert_eq!(asked.len(), steps.min(ASKED_STEPS), "{steps} steps");
            let gaps = asked.windows(2).map(|pair| pair[1] - pair[0]).chain([steps - asked[asked.len() - 1]]);
            assert!(gaps.max().unwrap_or(0) <= steps.div_ceil(ASKED_STEPS), "{steps} steps: {asked:?}");
        }
    }

    #[test]
    fn each_step_is_told_what_it_and_those_behind_it_have() {
        let expectations = Expectations::default();
        let told = [Expected::default(), Expected::default(), Expected::default()];
        expectations.begin(0, &told[0]);
        assert_eq!(told[0].get(), None);
        expectations.know(&[1, 20, 300]);
        assert_eq!(told[0].get(), Some(321));
        expectations.begin(1, &told[1]);
        expectations.begin(2, &told[2]);
        expectations.begin(3, &told[2]);
        assert_eq!([told[1].get(), told[2].get()], [Some(320), Some(300)]);
    }
}
