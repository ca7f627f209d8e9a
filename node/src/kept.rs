//! Connections to peers that wait for their next use, so that a small transfer costs no handshake.
//!
//! Owns which connections are kept, how long and how many. One exchange has a connection for itself: it takes one that waits, or
//! a new one, and gives it back only when all was said; a connection on which anything else happened is closed. So an exchange can
//! be cancelled by closing its connection, which happens here, too, and no exchange waits for the window of another. Refuses to know
//! what is said. Neighbours: [`crate::peers`] dials, [`crate::line`] notices that a kept connection is dead, [`crate::addresses`] that
//! the peer is elsewhere.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::Ordering},
    time::Duration,
};

use flocker_storage::model::NodeName;
use flocker_transport::{CloseCode, Connection};
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::{
    daemon::Node,
    peers::PUSH_ALPN,
    state::PeerRow,
    transfers::{Failure, Job},
};

/// How long a connection waits for its next use. Shorter than [`SERVED_IDLE`], so that mostly the side that opened it closes it.
const IDLE: Duration = Duration::from_secs(3 * 60);
/// How long the side that was connected to waits for the next exchange.
pub(crate) const SERVED_IDLE: Duration = Duration::from_secs(5 * 60);
/// How old a connection may be to be used once more: certificates and what is known of peers are checked when it begins.
const AGE: Duration = Duration::from_secs(3600);
/// How many wait for each peer; a burst of transfers needs more, and closes the surplus.
const PER_PEER: usize = 2;

/// The connections that wait, newest last.
#[derive(Default)]
pub(crate) struct Kept {
    waiting: Mutex<BTreeMap<NodeName, Vec<Waiting>>>,
}

struct Waiting {
    connection: Connection,
    dialled: Instant,
    since: Instant,
    /// What had been received when it was last looked at.
    received_bytes: u64,
}

impl Waiting {
    fn is_usable(&self) -> bool {
        self.connection.close_reason().is_none() && self.since.elapsed() < IDLE && self.dialled.elapsed() < AGE
    }
}

impl Kept {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<NodeName, Vec<Waiting>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self, peer: &NodeName) -> Option<Waiting> {
        let mut waiting = self.lock();
        let of_peer = waiting.get_mut(peer)?;
        std::iter::from_fn(|| of_peer.pop()).find(Waiting::is_usable)
    }

    fn put(&self, peer: NodeName, connection: Connection, dialled: Instant) {
        let (_, received_bytes) = connection.wire_bytes();
        let now = Waiting { connection, dialled, since: Instant::now(), received_bytes };
        let mut waiting = self.lock();
        let of_peer = waiting.entry(peer).or_default();
        of_peer.retain(Waiting::is_usable);
        if of_peer.len() < PER_PEER && now.is_usable() {
            of_peer.push(now);
        } else {
            now.connection.close(CloseCode::Done, "");
        }
    }

    /// Lets go of all connections to a peer: one was found dead.
    pub(crate) fn forget(&self, peer: &NodeName) {
        for waiting in self.lock().remove(peer).into_iter().flatten() {
            waiting.connection.close(CloseCode::Done, "");
        }
    }

    /// Lets go of those that have waited too long, and of those over which nothing came since the last time: a live peer sends
    /// a sign of life more often than this is called.
    pub(crate) fn tidy(&self) {
        self.lock().retain(|_, of_peer| {
            of_peer.retain_mut(|waiting| {
                let (_, received_bytes) = waiting.connection.wire_bytes();
                let is_heard = received_bytes > waiting.received_bytes;
                waiting.received_bytes = received_bytes;
                let stays = is_heard && waiting.is_usable();
                if !stays {
                    waiting.connection.close(CloseCode::Done, "");
                }
                stays
            });
            !of_peer.is_empty()
        });
    }
}

/// A connection while it is used. Dropped, it closes; [`Node::give_back`] keeps it.
pub(crate) struct Lent {
    /// The connection.
    pub(crate) connection: Connection,
    /// Whether it had waited: then the peer may be gone without a word.
    pub(crate) was_kept: bool,
    peer: NodeName,
    dialled: Instant,
}

impl Node {
    /// Takes a connection to a peer that waits, or makes one.
    pub(crate) async fn lend(&self, row: &PeerRow) -> Result<Lent, Failure> {
        let peer = row.name.clone();
        if let Some(Waiting { connection, dialled, .. }) = self.kept.take(&peer) {
            return Ok(Lent { connection, was_kept: true, peer, dialled });
        }
        let connection = self.connect(row, PUSH_ALPN).await?;
        tracing::info!(%peer, "connected");
        Ok(Lent { connection, was_kept: false, peer, dialled: Instant::now() })
    }

    /// Keeps a connection on which all was said for its next use.
    pub(crate) fn give_back(&self, lent: Lent) {
        self.kept.put(lent.peer, lent.connection, lent.dialled);
    }

    /// Closes a connection that was accepted when the node stops; until the guard is dropped.
    pub(crate) fn close_on_stop(&self, connection: &Connection) -> DropGuard {
        let over = CancellationToken::new();
        let (connection, node, watch) = (connection.clone(), self.cancel.clone(), over.clone());
        self.tasks.spawn(async move {
            tokio::select! {
                biased;
                () = watch.cancelled() => {}
                () = node.cancelled() => connection.close(CloseCode::ShuttingDown, ""),
            }
        });
        over.drop_guard()
    }

    /// Closes a connection that was dialled when a user cancels or pauses the job, the node stops or the peer has moved, so that
    /// whoever uses it unwinds; until the guard is dropped.
    pub(crate) fn close_lent_on_stop(self: &Arc<Self>, lent: &Lent, job: Option<&Arc<Job>>) -> DropGuard {
        let Some(job) = job.cloned() else { return self.close_on_stop(&lent.connection) };
        let over = CancellationToken::new();
        let (connection, node, watch, paused) = (lent.connection.clone(), self.clone(), over.clone(), job.pause());
        self.tasks.spawn(async move {
            let code = tokio::select! {
                biased;
                () = watch.cancelled() => return,
                () = job.cancel.cancelled() => CloseCode::Cancelled,
                () = paused.cancelled() => CloseCode::Paused,
                () = node.cancel.cancelled() => CloseCode::ShuttingDown,
                () = node.is_left(&connection) => {
                    job.peer_moved.store(true, Ordering::Relaxed);
                    CloseCode::TimedOut
                }
            };
            connection.close(code, "");
        });
        over.drop_guard()
    }
}
