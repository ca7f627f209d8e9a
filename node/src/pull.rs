//! A pull: this node opens the line, the peer runs the sender's story ([`crate::push::send`]), and this node the
//! receiver's ([`crate::receive`]).

use std::sync::Arc;

use flocker_replication::{
    message::{DivergencePolicy, Message, Mode, Offer, PROTOCOL, PullRequest},
    resolution::{self, Way},
};
use flocker_storage::model::{SnapshotName, VolumeName};
use flocker_transport::NO_PROGRESS;

use crate::{
    daemon::Node,
    line::Line,
    push,
    receive::{self, Receipt},
    resolve::Concluded,
    transfers::{Failure, Job},
};

/// What is asked of the peer.
pub(crate) struct Wanted {
    /// The volume's name at the peer.
    pub(crate) volume: VolumeName,
    /// The snapshot's name there; the newest one where this is `None`.
    pub(crate) snapshot: Option<SnapshotName>,
    /// The name here.
    pub(crate) name: VolumeName,
    /// What shall happen when the histories have gone apart.
    pub(crate) policy: DivergencePolicy,
    /// Whether to act.
    pub(crate) mode: Mode,
}

/// One attempt of a pull started here.
pub(crate) async fn attempt(node: &Arc<Node>, job: &Arc<Job>) -> Result<Concluded, Failure> {
    let policy = job.request.on_divergence;
    let mode = if job.request.dry_run { Mode::DryRun } else { Mode::Run };
    let wanted = Wanted {
        volume: job.volume.clone(),
        snapshot: job.request.snapshot.clone(),
        name: job.request.as_name.clone().unwrap_or_else(|| job.volume.clone()),
        policy,
        mode,
    };
    let concluded = fetch(node, job, wanted).await?;
    if resolution::way(policy, (&concluded.outcome.verdict).into()) == Way::Reverse && mode == Mode::Run {
        return push::impose(node, job, concluded.outcome).await;
    }
    Ok(concluded)
}

/// Fetches a history from the transfer's peer.
pub(crate) async fn fetch(node: &Arc<Node>, job: &Arc<Job>, wanted: Wanted) -> Result<Concluded, Failure> {
    let row = node.find_peer(&job.request.peer).await?;
    let lent = node.lend(&row).await?;
    let watch = node.close_lent_on_stop(&lent, Some(job));
    let mut line = Line::open(row.name, &lent).await?;
    let Wanted { volume, snapshot, name, policy, mode } = wanted;
    let request = PullRequest {
        protocol: PROTOCOL,
        transfer: job.id,
        volume,
        snapshot,
        name,
        policy,
        mode,
        receiver: node.host(),
        limit_bytes_per_second: job.request.limit_bytes_per_second,
    };
    line.send(&Message::PullRequest(Box::new(request.clone()))).await?;
    let mut offer: Offer = match line.recv(NO_PROGRESS).await? {
        Message::Offer(offer) => *offer,
        other => return Err(line.broke(format!("{} instead of an offer", other.kind())).into()),
    };
    let as_asked = offer.transfer == job.id
        && offer.name == request.name
        && offer.mode == request.mode
        && offer.policy == request.policy;
    if !as_asked {
        return Err(line.broke("its offer is not what was asked for").into());
    }
    receive::rest_of_offer(node, &mut line, &mut offer).await?;
    job.met_peer();
    let receipt = Receipt { offer, job: Some(job.clone()), pusher: None };
    let concluded = receive::receive(node, &mut line, receipt).await?;
    // The peer's story ends with this node's last message: only then the connection is free.
    line.exchange.flush(NO_PROGRESS).await.map_err(|error| line.failed(error))?;
    drop((line, watch));
    node.give_back(lent);
    Ok(concluded)
}
