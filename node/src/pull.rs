//! A pull: this node opens the line, the peer runs the sender's story ([`crate::push::send`]), and this node the
//! receiver's ([`crate::receive`]).

use std::sync::Arc;

use flocker_replication::{
    message::{Message, Mode, Offer, PROTOCOL, PullRequest},
    plan::Outcome,
};
use flocker_transport::{CloseCode, NO_PROGRESS};

use crate::{
    daemon::Node,
    line::Line,
    peers::PUSH_ALPN,
    receive::{self, Receipt},
    transfers::{Failure, Job},
};

/// One attempt of a pull started here.
pub(crate) async fn attempt(node: &Arc<Node>, job: &Arc<Job>) -> Result<Outcome, Failure> {
    let row = node.find_peer(&job.request.peer).await?;
    let connection = node.connect(&row, PUSH_ALPN).await?;
    let _watch = node.close_on_cancel(&connection, &job.cancel);
    let mut line = Line::open(row.name, &connection).await?;
    let request = PullRequest {
        protocol: PROTOCOL,
        transfer: job.id,
        volume: job.volume.clone(),
        snapshot: job.request.snapshot.clone(),
        name: job.request.as_name.clone().unwrap_or_else(|| job.volume.clone()),
        policy: job.request.on_divergence,
        mode: if job.request.dry_run { Mode::DryRun } else { Mode::Run },
        receiver: node.host(),
    };
    line.send(&Message::PullRequest(Box::new(request.clone()))).await?;
    let offer: Offer = match line.recv(NO_PROGRESS).await? {
        Message::Offer(offer) => *offer,
        other => return Err(line.broke(format!("{} instead of an offer", other.kind())).into()),
    };
    if offer.transfer != job.id || offer.name != request.name || offer.mode != request.mode {
        return Err(line.broke("its offer is not what was asked for").into());
    }
    job.met_peer();
    let receipt = Receipt { offer, job: Some(job.clone()) };
    let outcome = receive::receive(node, &mut line, receipt).await?;
    // The peer's story ends with this node's last message: it must arrive before the line is closed.
    let _ = line.exchange.flush(NO_PROGRESS).await;
    connection.close(CloseCode::Done, "");
    Ok(outcome)
}
