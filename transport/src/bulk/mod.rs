//! The byte pipeline: one delta over one bidirectional stream, and over as many connections as it takes.
//!
//! ## Participants
//! The *sender* ([`Outgoing`]) numbers frames and keeps those that were not acknowledged; the *receiver* ([`Incoming`])
//! acknowledges what its sink has consumed. Both survive the loss of a link: [`run`](Outgoing::run) again with a new one.
//!
//! ## Goals
//! Disk, CPU and network work at the same time; memory is bounded whatever the other side does; the receiver says yes only to
//! exactly the bytes that were sent (length and BLAKE3 of the whole); a dead peer is noticed in bounded time while a slow one
//! is waited for.
//!
//! ## Non-goals
//! Surviving a restart of either process (the driver's resume point does), and knowing what the bytes are.
//!
//! Several connections can share the work (*lanes*): each carries frames in rising order, the receiver puts them back into one row.
//!
//! Neighbours: [`frame`] is the layout, [`queue`] what a sender keeps, [`lanes`] the receiver's row, [`compression`] the choice of the level, [`rate`] what holds a sender back.

mod buffers;
mod compression;
mod frame;
#[cfg(test)]
mod hostile;
mod incoming;
mod lanes;
mod outgoing;
mod pieces;
mod queue;
mod rate;
mod stage;
mod threads;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use buffers::Buffer;
use bytes::Bytes;
use tokio::sync::mpsc;

pub use self::{
    incoming::{Incoming, IncomingLimits, LANES_LIMIT},
    outgoing::{Outgoing, OutgoingLimits},
    rate::Gate,
    stage::Stage,
};
use crate::{
    close::CloseCode,
    error::{Error, ErrorKind},
};

/// An error of the caller's source or sink, handed back as it came.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Where the sender's bytes come from.
#[async_trait]
pub trait ChunkSource: Send {
    /// The next bytes, of any length but best 200 to 400 KiB; nothing at the end. Awaited to its end even when the link is lost
    /// meanwhile. Blocking work belongs on other threads.
    async fn next(&mut self) -> Result<Option<Bytes>, BoxError>;
}

/// Where the receiver's bytes go.
#[async_trait]
pub trait ChunkSink: Send {
    /// Takes the next bytes; they count as consumed, and are never sent again, once it returns. Awaited to its end even when the link
    /// is lost meanwhile.
    async fn write(&mut self, bytes: Bytes) -> Result<(), BoxError>;
    /// Acts on all that was taken: called once, behind the last bytes, before the sender is told that all was consumed. Does nothing
    /// unless it is overridden.
    async fn flush(&mut self) -> Result<(), BoxError> {
        Ok(())
    }
}

/// Who finds out when bytes arrive that are not those that were sent. Both sides choose the same, by what the bytes are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Integrity {
    /// The pipeline: it hashes all of them on both sides.
    #[default]
    Pipeline,
    /// Whoever consumes them: they carry digests that cover all of them. Only their number is compared here.
    Content,
}

/// How far a transfer is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Progress {
    /// Bytes of the delta that the receiver has consumed.
    pub raw_bytes: u64,
    /// What they took on the wire, with frame headers, without QUIC's own.
    pub wire_bytes: u64,
    /// The stage that the others waited for most in the last half second of waiting; none as long as there was none.
    pub slowest: Option<Stage>,
    /// What the sender told the receiver to expect ([`Expected`]); none as long as it has not, and at the sender.
    pub expected_bytes: Option<u64>,
}

/// How long a delta and those behind it are expected to be, as the sender learns it; clones are the same. The receiver is told.
#[derive(Debug, Clone, Default)]
pub struct Expected(Arc<AtomicU64>);

impl Expected {
    /// Says it, in raw bytes from the delta's beginning on.
    pub fn set(&self, bytes: u64) {
        self.0.store(bytes, Ordering::Relaxed);
    }

    /// Returns it; `None` while nobody knows.
    pub fn get(&self) -> Option<u64> {
        Some(self.number()).filter(|bytes| *bytes > 0)
    }

    /// The same as a frame has it: 0 while nobody knows.
    fn number(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A delta that was sent, consumed and acknowledged to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sent {
    /// Its length.
    pub raw_bytes: u64,
    /// What it took on the wire, resent frames included.
    pub wire_bytes: u64,
    /// BLAKE3 of all of it; zeros where the content is left to its consumer ([`Integrity::Content`]).
    pub digest: [u8; 32],
}

/// A delta that was received and consumed to its end, equal in length and digest to what was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Received {
    /// Its length.
    pub raw_bytes: u64,
    /// What it took on the wire.
    pub wire_bytes: u64,
    /// BLAKE3 of all of it; zeros where the content is left to its consumer ([`Integrity::Content`]).
    pub digest: [u8; 32],
}

/// Why a run ended early.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BulkError {
    /// The link was lost or silent. All state is kept: run again with a new link.
    #[error("the transfer was interrupted")]
    Interrupted(#[source] Error),
    /// The source failed. The transfer is over.
    #[error("the data could not be read")]
    Source(#[source] BoxError),
    /// The sink failed. The transfer is over, and the sender was told.
    #[error("the data could not be written")]
    Sink(#[source] BoxError),
    /// The receiver gave up; the exchange carries its reason. The transfer is over.
    #[error("the receiver gave up: {0}")]
    Stopped(StopReason),
    /// The peer broke the protocol, or the digest differs. The transfer is over; the other side was told.
    #[error("the data is corrupt: {0}")]
    Corrupt(String),
}

/// Why a receiver gave up. The numbers are the wire format: append only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StopReason {
    /// Its sink failed.
    #[error("it could not write the data")]
    Sink,
    /// What it got was malformed, or has another digest.
    #[error("the data did not arrive as it was sent")]
    Corrupt,
    /// A number that this version does not know.
    #[error("reason {0}")]
    Other(u64),
}

impl StopReason {
    fn number(self) -> u64 {
        match self {
            Self::Sink => 1,
            Self::Corrupt => 2,
            Self::Other(number) => number,
        }
    }

    fn from_number(number: u64) -> Self {
        match number {
            1 => Self::Sink,
            2 => Self::Corrupt,
            other => Self::Other(other),
        }
    }
}

/// One bidirectional stream: frames one way, acknowledgements the other. A run uses it up.
#[derive(Debug)]
pub struct BulkStream {
    connection: quinn::Connection,
    send: quinn::SendStream,
    recv: quinn::RecvStream,
}

impl BulkStream {
    pub(crate) fn new(connection: quinn::Connection, send: quinn::SendStream, recv: quinn::RecvStream) -> Self {
        Self { connection, send, recv }
    }
}

/// Where no further lane joins from.
fn nobody() -> mpsc::Receiver<BulkStream> {
    mpsc::channel(1).1
}

/// Reads exact pieces off a stream. Cancel-safe: what has arrived is kept.
struct Reader {
    recv: quinn::RecvStream,
    /// The piece that has arrived in part.
    begun: Option<Buffer>,
    /// What lies behind it.
    arrived: Bytes,
}

/// How much is taken from the stream at once.
const READ_CHUNK: usize = 256 * 1024;

impl Reader {
    fn new(recv: quinn::RecvStream) -> Self {
        Self { recv, begun: None, arrived: Bytes::new() }
    }

    /// The next `length` bytes, at most those of a frame; waits at most `no_progress` for each piece.
    async fn take(&mut self, length: usize, no_progress: Duration) -> Result<Bytes, ErrorKind> {
        if self.begun.is_none() && self.arrived.len() >= length {
            return Ok(self.arrived.split_to(length));
        }
        loop {
            let piece = self.begun.get_or_insert_with(|| Buffer::with_room(length)).bytes();
            let lacks = length.saturating_sub(piece.len());
            piece.extend_from_slice(&self.arrived.split_to(lacks.min(self.arrived.len())));
            if piece.len() >= length {
                return Ok(self.begun.take().map(Buffer::freeze).unwrap_or_default());
            }
            self.arrived = match tokio::time::timeout(no_progress, self.recv.read_chunk(READ_CHUNK, true)).await {
                Ok(Ok(Some(chunk))) => chunk.bytes,
                Ok(Ok(None)) => return Err(ErrorKind::StreamEnded),
                Ok(Err(error)) => return Err(ErrorKind::from_read(error)),
                Err(_) => return Err(ErrorKind::TimedOut(no_progress)),
            };
        }
    }

    fn stop(&mut self, code: CloseCode) {
        let _ = self.recv.stop(code.varint());
    }
}
