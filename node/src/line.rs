//! A conversation with a peer: messages that are in order, and failures of the line in an operator's words.
//!
//! Owns the check of every message that comes in. Refuses to know what the messages mean. Neighbours: [`crate::push`] and
//! [`crate::receive`], the two sides of each conversation.

use std::{sync::Arc, time::Duration};

use flocker_replication::{
    message::{Answer, Message, Offer, Problem, strip},
    outline::{self, Block, Puzzle},
};
use flocker_storage::{
    delta::DeltaFormat,
    driver::Finding,
    model::{Lineage, NodeName},
};
use flocker_transport::{CloseCode, Connection, ErrorKind, Exchange, Integrity, NO_PROGRESS};
use tokio::time::Instant;

use crate::{
    api::types::ApiProblem,
    kept::Lent,
    peers::link_problem,
    problem::{self, STALE_LINE, problem},
    transfers::{Failure, Job},
};

/// How long a peer on a kept connection may be silent altogether, without so much as an acknowledgement, until it counts as gone.
const SILENCE: Duration = Duration::from_secs(3);
/// How often it is looked whether something came.
const LOOK: Duration = Duration::from_millis(250);

/// A conversation with a peer: its name for errors, the connection and the control stream.
pub(crate) struct Line<'a> {
    /// The peer's name.
    pub(crate) peer: NodeName,
    /// The connection.
    pub(crate) connection: &'a Connection,
    /// The control stream.
    pub(crate) exchange: Exchange,
    /// On a kept connection until the peer's first message: the bytes received before. The peer may be gone, and a failure says
    /// nothing yet.
    untried: Option<u64>,
}

impl<'a> Line<'a> {
    /// Opens a control stream on a connection, new or kept.
    pub(crate) async fn open(peer: NodeName, lent: &'a Lent) -> Result<Self, Failure> {
        let connection = &lent.connection;
        let untried = lent.was_kept.then(|| connection.wire_bytes().1);
        match connection.open_exchange().await {
            Ok(exchange) => Ok(Self { peer, connection, exchange, untried }),
            Err(error) => Err(failure(&peer, &error, untried)),
        }
    }

    /// Takes over a control stream that the peer opened.
    pub(crate) fn served(peer: NodeName, connection: &'a Connection, exchange: Exchange) -> Self {
        Self { peer, connection, exchange, untried: None }
    }

    /// Turns a failure of the line into words.
    pub(crate) fn failed(&self, error: flocker_transport::Error) -> Failure {
        failure(&self.peer, &error, self.untried)
    }

    /// Sends a message.
    pub(crate) async fn send(&mut self, message: &Message) -> Result<(), Failure> {
        noted(message.kind());
        self.exchange.send_within(message, NO_PROGRESS).await.map_err(|error| self.failed(error))
    }

    /// Receives a message that is in order. A problem the peer reports becomes a failure.
    pub(crate) async fn recv(&mut self, wait: Duration) -> Result<Message, Failure> {
        let message = match self.untried {
            None => self.exchange.recv_within(wait).await,
            Some(before) => tokio::select! {
                biased;
                message = self.exchange.recv_within(wait) => message,
                () = silence(self.connection, before) => return Err(stale(&self.peer, "it is silent")),
            },
        };
        let message = message.map_err(|error| self.failed(error))?;
        self.untried = None;
        self.understand(message)
    }

    /// Checks a message. A problem the peer reports becomes a failure.
    pub(crate) fn understand(&self, message: Message) -> Result<Message, Failure> {
        if let Err(violation) = message.validate() {
            self.connection.close(CloseCode::Protocol, "");
            return Err(self.broke(violation).into());
        }
        match message {
            Message::Problem(said) => {
                Err(Failure { transient: said.is_transient(), problem: problem::from_peer(&self.peer, &said) })
            }
            message => Ok(message),
        }
    }

    /// Lets the user know, where the transfer was started: at this node, which has a job then, or at the peer.
    pub(crate) async fn remark(&mut self, job: Option<&Arc<Job>>, findings: Vec<Finding>) -> Result<(), Failure> {
        match job {
            _ if findings.is_empty() => Ok(()),
            Some(job) => {
                job.warn(findings);
                Ok(())
            }
            None => self.send(&Message::remarks(findings)).await,
        }
    }

    /// Receives a message that is in order where the peer's remarks may come before it.
    pub(crate) async fn recv_behind_remarks(
        &mut self,
        job: Option<&Arc<Job>>,
        wait: Duration,
    ) -> Result<Message, Failure> {
        match self.recv(wait).await? {
            Message::Remarks(remarks) => {
                if let Some(job) = job {
                    job.warn(remarks);
                }
                self.recv(wait).await
            }
            other => Ok(other),
        }
    }

    /// Receives what follows an offer at once. Returns the outline of the older part of a long lineage.
    pub(crate) async fn recv_rest(&mut self, offer: &mut Offer) -> Result<Vec<Block>, Failure> {
        match self.recv(NO_PROGRESS).await? {
            Message::Rest(rest) => {
                offer.forgotten = rest.forgotten;
                Ok(rest.older)
            }
            other => Err(self.broke(format!("{} instead of the rest of its offer", other.kind())).into()),
        }
    }

    /// Puts the older part of a long lineage back into an offer: what this node has too, and what it asks for.
    pub(crate) async fn complete(
        &mut self,
        offer: &mut Offer,
        older: Vec<Block>,
        own: &Lineage,
    ) -> Result<(), Failure> {
        let puzzle = Puzzle::begin(older, &strip(own));
        let missing = puzzle.missing();
        let sent = if missing.is_empty() {
            Vec::new()
        } else {
            self.send(&Message::Want(missing)).await?;
            match self.recv(NO_PROGRESS).await? {
                Message::Snapshots(snapshots) => snapshots,
                other => return Err(self.broke(format!("{} instead of the snapshots it offers", other.kind())).into()),
            }
        };
        offer.complete(puzzle, sent).map_err(|violation| self.broke(violation).into())
    }

    /// Receives the answer to an offer.
    pub(crate) async fn recv_answer(&mut self, offered: &Lineage) -> Result<Answer, Failure> {
        let message = match self.recv(NO_PROGRESS).await? {
            Message::Want(blocks) => {
                self.send(&Message::Snapshots(outline::of_blocks(offered, &blocks))).await?;
                self.recv(NO_PROGRESS).await?
            }
            message => message,
        };
        match message {
            Message::Answer(answer) => self.unpacked(*answer, offered),
            other => Err(self.broke(format!("{} instead of an answer", other.kind())).into()),
        }
    }

    /// Reads an answer that points into what was offered.
    pub(crate) fn unpacked(&self, mut answer: Answer, offered: &Lineage) -> Result<Answer, Failure> {
        answer.unpack(offered).map_err(|violation| self.broke(violation))?;
        Ok(answer)
    }

    /// The peer does not keep to the protocol.
    pub(crate) fn broke(&self, rule: impl std::fmt::Display) -> ApiProblem {
        problem(502, "protocol", format!("{} does not keep to the protocol: {rule}", self.peer))
            .hint(problem::SAME_VERSION)
    }

    /// Tells the peer what went wrong here, as far as the line still carries it.
    pub(crate) async fn report(&mut self, problem: &Problem) {
        let _ = self.exchange.send_within(&Message::Problem(problem.clone()), NO_PROGRESS).await;
        self.exchange.finish();
        let _ = tokio::time::timeout(Duration::from_secs(5), self.connection.closed()).await;
    }
}

/// Tells who checks the bytes of a delta: the portable format has digests of its own, which the receiver verifies before it keeps
/// anything; of the streams of file systems nobody here knows what they check.
pub(crate) fn integrity(format: &DeltaFormat) -> Integrity {
    if *format == DeltaFormat::tree() { Integrity::Content } else { Integrity::Pipeline }
}

/// Lets a simulation count what a node says to a peer.
pub(crate) fn noted(_what: &'static str) {
    #[cfg(feature = "simulation")]
    flocker_storage::simulation::noted(_what);
}

fn failure(peer: &NodeName, error: &flocker_transport::Error, untried: Option<u64>) -> Failure {
    let is_gone =
        error.kind.is_transient() || matches!(error.kind, ErrorKind::ClosedByPeer { .. } | ErrorKind::ClosedHere);
    match untried {
        Some(_) if is_gone => stale(peer, problem::chain(error)),
        _ => Failure { transient: error.kind.is_transient(), problem: link_problem(peer, error) },
    }
}

fn stale(peer: &NodeName, why: impl std::fmt::Display) -> Failure {
    let detail = format!("the kept connection to {peer} cannot be used any more: {why}");
    Failure { transient: true, problem: problem(502, STALE_LINE, detail) }
}

/// Ends when nothing at all came over a connection for [`SILENCE`].
async fn silence(connection: &Connection, before: u64) {
    let began = Instant::now();
    while began.elapsed() < SILENCE {
        if connection.wire_bytes().1 > before {
            return std::future::pending().await;
        }
        tokio::time::sleep(LOOK).await;
    }
}
