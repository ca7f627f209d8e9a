//! What a user does to a transfer under way: lets it rest, goes on with it, cancels it.
//!
//! Owns when these take effect: who makes the attempts ([`crate::transfers`]) ends with the one under way, whose connection is closed,
//! and writes down what became of it. Refuses to know what an attempt does.

use std::{sync::Arc, time::Duration};

use crate::{
    api::types::{TransferResource, TransferState},
    daemon::Node,
    problem::{Result, problem},
    transfers::Job,
};

/// How long a pause waits for the attempt under way to end.
const REST_TIMEOUT: Duration = Duration::from_secs(10);

impl Node {
    /// Lets a transfer rest. Returns once it does, as far as that takes no longer than [`REST_TIMEOUT`].
    pub(crate) async fn pause_transfer(&self, job: &Job) -> Result<TransferResource> {
        check_open(job, "pause")?;
        job.pause().cancel();
        // Who makes attempts ends with the one under way; whatever it ends as is written down then.
        let _ = tokio::time::timeout(REST_TIMEOUT, job.work.lock()).await;
        check_open(job, "pause")?;
        Ok(job.resource())
    }

    /// Goes on with a paused transfer; one that waits for its peer waits no longer.
    pub(crate) async fn resume_transfer(self: &Arc<Self>, job: &Arc<Job>) -> Result<TransferResource> {
        check_open(job, "resume")?;
        if !job.pause().is_cancelled() && job.resource().state != TransferState::Paused {
            job.poke.notify_one();
            return Ok(job.resource());
        }
        let late = |_| problem(409, "busy", "it is still coming to rest").hint("try again in a moment");
        let work = tokio::time::timeout(REST_TIMEOUT, job.work.lock()).await.map_err(late)?;
        check_open(job, "resume")?;
        if job.resource().state == TransferState::Paused {
            job.unpause();
            let resource = job.resource();
            self.state.put_transfer(&job.request, &resource).await?;
            self.tasks.spawn(self.clone().run_transfer(job.clone()));
        }
        drop(work);
        Ok(job.resource())
    }

    /// Cancels a transfer. One that rests has nobody who would notice.
    pub(crate) async fn cancel_transfer(&self, job: &Job) -> TransferResource {
        job.cancel.cancel();
        if let Ok(_work) = job.work.try_lock()
            && job.resource().state == TransferState::Paused
        {
            self.end_transfer(job, TransferState::Cancelled, None).await;
        }
        job.resource()
    }
}

/// Refuses what needs a transfer that is not over.
fn check_open(job: &Job, verb: &str) -> Result<()> {
    let resource = job.resource();
    if !resource.state.is_final() {
        return Ok(());
    }
    let state = serde_json::to_value(resource.state).unwrap_or_default();
    let detail = format!("cannot {verb} transfer {}: it is over ({})", job.id, state.as_str().unwrap_or_default());
    Err(problem(409, "transfer_over", detail).hint("push or pull again").with("state", resource.state))
}
