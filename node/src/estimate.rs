//! How much a transfer has to send: asked of the driver when the transfer runs for a while, and told to who started it.
//!
//! The sender knows, whoever started the transfer: a push tells its own user, of a pull the receiver is told by the pipeline.
//! Neighbour: [`crate::push`].

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use flocker_replication::plan::Step;
use flocker_storage::delta::{Compare, DeltaRequest};
use flocker_transport::Expected;

use crate::{daemon::Node, problem, transfers::Job};

/// How long a push runs until it is asked how much there is to send: most are over by then.
const ESTIMATE_AFTER: Duration = Duration::from_secs(1);
/// The most snapshots whose deltas are estimated; of more, their number says enough.
const ESTIMATED_STEPS: usize = 64;

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
    if node.is_simulated || steps.len() > ESTIMATED_STEPS || job.is_some_and(|job| !job.is_unestimated()) {
        return;
    }
    let before = job.map_or(0, |job| job.resource().progress.delta_bytes);
    tokio::time::sleep(ESTIMATE_AFTER).await;
    let mut lengths = Vec::new();
    for step in steps {
        let Some(base) = step.base.map(|base| base.on_sender) else {
            lengths.push(step.snapshot.logical_bytes);
            continue;
        };
        let (target, format) = (step.snapshot.key(), step.format.clone());
        let request = DeltaRequest { base: Some(base), target, format, compare, resume: None };
        match node.driver.estimate_delta(request).await {
            Ok(Some(length)) => lengths.push(length),
            Ok(None) => return,
            Err(error) => {
                let (snapshot, error) = (step.snapshot.snapshot.id, problem::chain(&error));
                tracing::debug!(%snapshot, error, "no estimate of what is to be sent");
                return;
            }
        }
    }
    match job {
        Some(job) => job.expects(before + lengths.iter().sum::<u64>()),
        None => expectations.know(&lengths),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
