//! QUIC with mutual TLS between nodes: connections, typed exchanges and the bulk pipeline.
//!
//! Owns who may connect, how messages and bytes are framed, and what their limits are. Knows no volumes and no
//! transfers: those are the business of `node`. Reads no clock but tokio's, for time-outs.
//!
//! - [`Endpoint`] binds, connects and accepts; [`Router`] hands accepted connections to a [`Handler`] by ALPN.
//! - [`Connection`] opens and accepts two kinds of streams: an [`Exchange`] of typed messages, and a [`BulkStream`]
//!   on which [`Outgoing`] and [`Incoming`] move bytes.

mod batch;
mod bulk;
mod close;
mod codec;
mod congestion;
mod connection;
mod endpoint;
mod error;
mod exchange;
mod reset;
mod router;
mod socket;
mod tls;

pub use bulk::{
    BoxError, BulkError, BulkStream, ChunkSink, ChunkSource, Expected, Gate, Incoming, IncomingLimits, Integrity,
    LANES_LIMIT, Outgoing, OutgoingLimits, Progress, Received, Sent, Stage, StopReason,
};
pub use close::CloseCode;
pub use codec::MESSAGE_LIMIT;
pub use connection::Connection;
pub use endpoint::{Access, Arrival, Endpoint, Limits, PeerCheck, Protocol, connect_newcomer};
pub use error::{Error, ErrorKind, PeerFault, Result};
pub use exchange::Exchange;
pub use router::{Handler, Router};
pub use socket::Socket;

/// The protocol of members.
pub const ALPN: &[u8] = b"flocker/1";
/// The protocol of newcomers, who have no certificate yet.
pub const ENROL_ALPN: &[u8] = b"flocker-enrol/1";
/// How long a wait for the peer may go without a sign of life, unless the caller says otherwise.
pub const NO_PROGRESS: std::time::Duration = std::time::Duration::from_secs(60);
