//! What peers may open a conversation with: a push, a wish to pull, a question, a volume that is handed over.
//!
//! Owns who may ask what (the configuration's rights) and how many are served at once. Refuses to know how anything is
//! carried out: [`crate::receive`], [`crate::push`], [`crate::ownership`].

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use flocker_certs::PeerIdentity;
use flocker_replication::{
    message::{Description, Message, PROTOCOL, PullRequest, strip},
    plan::Direction,
};
use flocker_storage::{
    delta::Compare,
    model::{NodeName, VolumeName},
};
use flocker_transport::{CloseCode, Connection, Handler, NO_PROGRESS};
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio_util::sync::CancellationToken;

use crate::{
    api::types::ApiProblem,
    config::Verb,
    daemon::Node,
    kept::SERVED_IDLE,
    line::Line,
    problem::{self, problem},
    push::{self, Sending},
    receive::{self, Receipt},
    transfers::Failure,
};

/// Serves pushes, pulls and questions of members.
pub(crate) struct Replication {
    node: Arc<Node>,
    slots: Semaphore,
}

/// How many exchanges are served at once, each with up to a transfer's memory; more wait a while and are sent away as busy.
const EXCHANGES_LIMIT: usize = 64;
/// How long an exchange waits for another one to end.
const SLOT_TIMEOUT: Duration = Duration::from_secs(20);

#[async_trait]
impl Handler for Replication {
    async fn handle(&self, connection: Connection, _cancel: CancellationToken) {
        let node = &self.node;
        let Some(peer) = connection.peer() else {
            return connection.close(CloseCode::AnonymousNotAllowed, "");
        };
        let Ok(name) = peer.name.parse::<NodeName>() else {
            return connection.close(CloseCode::Refused, "not a node name");
        };
        // The node's own stop is what ends an exchange; the peer must see it as such, and go on later.
        let _watch = node.close_on_stop(&connection);
        loop {
            if !node.check_peer(&peer) {
                return connection.close(CloseCode::Refused, "another node has this name");
            }
            let exchange = match tokio::time::timeout(SERVED_IDLE, connection.accept_exchange()).await {
                Ok(Ok(exchange)) => exchange,
                Ok(Err(error)) => return tracing::debug!(peer = %name, "no request came: {}", problem::chain(&error)),
                Err(_) => return connection.close(CloseCode::Done, "idle"),
            };
            let Ok(Ok(slot)) = tokio::time::timeout(SLOT_TIMEOUT, self.slots.acquire()).await else {
                tracing::warn!(peer = %name, "refused an exchange: {EXCHANGES_LIMIT} are served");
                return connection.close(CloseCode::Busy, "");
            };
            let mut line = Line::served(name.clone(), &connection, exchange);
            if let Err(failure) = self.serve(&mut line, peer.clone(), slot).await {
                tracing::warn!(peer = %name, "an exchange failed: {}", failure.problem);
                if !failure.problem.code.starts_with("peer_") {
                    line.report(&problem::to_peer(&failure.problem)).await;
                }
                return;
            }
            // The peer may open the next one; what was said last still reaches it.
            line.exchange.finish();
        }
    }
}

impl Replication {
    /// Serves them for a node.
    pub(crate) fn new(node: Arc<Node>) -> Self {
        Self { node, slots: Semaphore::new(EXCHANGES_LIMIT) }
    }

    async fn serve(&self, line: &mut Line<'_>, peer: PeerIdentity, slot: SemaphorePermit<'_>) -> Result<(), Failure> {
        let node = &self.node;
        match line.recv(NO_PROGRESS).await? {
            Message::Offer(mut offer) => {
                check_protocol(offer.protocol)?;
                node.check_right(&peer, &offer.name, Verb::Push)?;
                receive::rest_of_offer(node, line, &mut offer).await?;
                receive::receive(node, line, Receipt { offer: *offer, job: None, pusher: Some(peer) }).await.map(|_| ())
            }
            Message::PullRequest(request) => {
                check_protocol(request.protocol)?;
                node.check_right(&peer, &request.volume, Verb::Read)?;
                serve_pull(node, line, *request).await
            }
            Message::Describe(request) => {
                check_protocol(request.protocol)?;
                let known = match line.recv(NO_PROGRESS).await? {
                    Message::Rest(rest) => rest.older,
                    other => return Err(line.broke(format!("{} instead of an outline", other.kind())).into()),
                };
                node.check_right(&peer, &request.volume, Verb::Read)?;
                let mut description = describe(node, &request.volume).await?;
                description.pack(&known);
                line.send(&Message::Description(Box::new(description))).await
            }
            Message::TakeOver(request) => {
                check_protocol(request.protocol)?;
                node.check_right(&peer, &node.name_here(&request), Verb::Push)?;
                let taken = node.take_over(&request, &line.peer).await?;
                line.send(&Message::TakenOver(taken)).await
            }
            Message::AskClaims(request) => {
                check_protocol(request.protocol)?;
                line.send(&Message::Claims(node.claims_of(&request.volumes, &peer))).await
            }
            Message::Lane(lane) => {
                check_protocol(lane.protocol)?;
                // It belongs to an exchange that has a place already.
                drop(slot);
                node.lanes.serve(line, lane).await
            }
            other => Err(line.broke(format!("it opened with {}", other.kind())).into()),
        }
    }
}

fn check_protocol(theirs: u32) -> Result<(), Failure> {
    if theirs == PROTOCOL {
        return Ok(());
    }
    Err(problem(
        409,
        "version_mismatch",
        format!("the peer speaks revision {theirs} of the protocol, this node {PROTOCOL}"),
    )
    .hint(problem::SAME_VERSION)
    .with("ours", PROTOCOL)
    .with("theirs", theirs)
    .into())
}

async fn serve_pull(node: &Arc<Node>, line: &mut Line<'_>, request: PullRequest) -> Result<(), Failure> {
    let _serving = node.outbox.serve(&line.peer, request.transfer, line.connection).await?;
    let volume = node.catalog.find(&request.volume)?;
    let want = match &request.snapshot {
        Some(name) => node.sendable(&volume, name).await?,
        None => match volume.snapshots.last() {
            Some(held) => held.snapshot.id,
            None => {
                let detail = format!("volume {} has no snapshot of its own yet", request.volume);
                return Err(problem(404, "snapshot_not_found", detail).into());
            }
        },
    };
    let sending = Sending {
        transfer: request.transfer,
        direction: Direction::Pull,
        volume,
        want,
        name: request.name,
        policy: request.policy,
        mode: request.mode,
        compare: Compare::Metadata,
        gates: node.limits.gates(&line.peer, request.limit_bytes_per_second),
    };
    push::send(node, line, &sending, None).await.map(|_| ())
}

async fn describe(node: &Node, name: &VolumeName) -> Result<Description, Failure> {
    let volume = node.catalog.find(name)?;
    let id = volume.record.id;
    let lineage = node.driver.lineage(id).await.map_err(ApiProblem::from)?;
    Ok(Description {
        head: node.look_at_head(id).await?,
        lineage: strip(&lineage),
        pieces: Vec::new(),
        mounted: node.mounts.of(id).map(|row| row.path),
        formats: node.driver.capabilities().formats.clone(),
        host: node.host(),
        volume: volume.record,
    })
}

impl Node {
    /// Looks whether a peer may do something with a volume here.
    pub(crate) fn check_right(&self, peer: &PeerIdentity, volume: &VolumeName, verb: Verb) -> Result<(), Failure> {
        if self.config.permits(&peer.name, volume.as_str(), verb) {
            return Ok(());
        }
        let verb = verb.word();
        let detail = format!("{} has no right to {verb} {volume} here", peer.name);
        Err(problem(403, "not_permitted", detail).with("verb", verb).with("volume", volume).into())
    }
}
