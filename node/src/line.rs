//! A conversation with a peer: messages that are in order, and failures of the line in an operator's words.
//!
//! Owns the check of every message that comes in. Refuses to know what the messages mean. Neighbours: [`crate::push`] and
//! [`crate::receive`], the two sides of each conversation.

use std::{sync::Arc, time::Duration};

use flocker_replication::message::{Message, Problem};
use flocker_storage::{driver::Finding, model::NodeName};
use flocker_transport::{CloseCode, Connection, Exchange, NO_PROGRESS};

use crate::{
    api::types::ApiProblem,
    peers::link_problem,
    problem::{self, problem},
    transfers::{Failure, Job},
};

/// A conversation with a peer: its name for errors, the connection and the control stream.
pub(crate) struct Line<'a> {
    /// The peer's name.
    pub(crate) peer: NodeName,
    /// The connection.
    pub(crate) connection: &'a Connection,
    /// The control stream.
    pub(crate) exchange: Exchange,
}

impl<'a> Line<'a> {
    /// Opens the control stream of a new connection.
    pub(crate) async fn open(peer: NodeName, connection: &'a Connection) -> Result<Self, Failure> {
        let exchange = connection
            .open_exchange()
            .await
            .map_err(|error| Failure { transient: error.kind.is_transient(), problem: link_problem(&peer, &error) })?;
        Ok(Self { peer, connection, exchange })
    }

    /// Turns a failure of the line into words.
    pub(crate) fn failed(&self, error: flocker_transport::Error) -> Failure {
        Failure { transient: error.kind.is_transient(), problem: link_problem(&self.peer, &error) }
    }

    /// Sends a message.
    pub(crate) async fn send(&mut self, message: &Message) -> Result<(), Failure> {
        self.exchange.send_within(message, NO_PROGRESS).await.map_err(|error| self.failed(error))
    }

    /// Receives a message that is in order. A problem the peer reports becomes a failure.
    pub(crate) async fn recv(&mut self, wait: Duration) -> Result<Message, Failure> {
        let message = self.exchange.recv_within(wait).await.map_err(|error| self.failed(error))?;
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

    /// The peer does not keep to the protocol.
    pub(crate) fn broke(&self, rule: impl std::fmt::Display) -> ApiProblem {
        problem(502, "protocol", format!("{} does not keep to the protocol: {rule}", self.peer))
            .hint("both nodes should run the same version of flocker")
    }

    /// Tells the peer what went wrong here, as far as the line still carries it.
    pub(crate) async fn report(&mut self, problem: &Problem) {
        let _ = self.exchange.send_within(&Message::Problem(problem.clone()), NO_PROGRESS).await;
        self.exchange.finish();
        let _ = tokio::time::timeout(Duration::from_secs(5), self.connection.closed()).await;
    }
}
