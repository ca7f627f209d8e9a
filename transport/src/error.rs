//! What can go wrong between two nodes: what was tried, on what, and why.

use std::{fmt, io, time::Duration};

use flocker_certs::PeerIdentity;
use quinn::{ConnectionError, ReadError, WriteError};

use crate::{close::CloseCode, tls};

/// The result of a transport operation.
pub type Result<T> = std::result::Result<T, Error>;

/// A transport operation that failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {operation} {object}")]
pub struct Error {
    /// What was tried, as a verb phrase ("connect to", "receive from").
    pub operation: &'static str,
    /// On what: an address.
    pub object: String,
    /// Why it failed.
    #[source]
    pub kind: ErrorKind,
}

impl Error {
    /// Builds an error from its three parts.
    pub fn new(operation: &'static str, object: impl fmt::Display, kind: ErrorKind) -> Self {
        Self { operation, object: object.to_string(), kind }
    }
}

/// Why a transport operation failed. Unless a variant says otherwise, the connection is gone.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ErrorKind {
    /// Another process listens there.
    #[error("another process uses this address")]
    AddressInUse,
    /// The address is not one of this host's.
    #[error("this host does not have this address")]
    AddressUnavailable,
    /// The daemon's user may not listen there (a port below 1024?).
    #[error("permission denied")]
    PermissionDenied,
    /// Nothing answered at the address, or no route leads there.
    #[error("nothing answers there: is the node running, and does UDP reach it?")]
    Unreachable,
    /// The peer was silent for too long. A stream that was being read or written is reset.
    #[error("no progress for {} s", .0.as_secs_f32())]
    TimedOut(Duration),
    /// The line was cut: no packet came for the idle time, or the peer was restarted.
    #[error("the connection was lost")]
    ConnectionLost,
    /// This side closed the connection, or the endpoint.
    #[error("the connection was closed by this side")]
    ClosedHere,
    /// The peer closed the connection.
    #[error("the peer closed the connection: {code}{}", said(.reason))]
    ClosedByPeer {
        /// Its code.
        code: CloseCode,
        /// What it said; text from a peer, for logs only.
        reason: String,
    },
    /// The peer's certificate was not accepted here.
    #[error("the peer is not who it should be: {fault}{}", claim(.claimed.as_deref()))]
    PeerRejected {
        /// What is wrong with it.
        fault: PeerFault,
        /// Who it says it is; not verified.
        claimed: Option<Box<PeerIdentity>>,
    },
    /// The peer did not accept this node's certificate.
    #[error("the peer rejected this node: {0}")]
    RejectedByPeer(PeerFault),
    /// The peer does not speak the protocol (ALPN) that was asked for.
    #[error("the peer does not speak this protocol")]
    NoCommonProtocol,
    /// The peer ended this stream properly, where a message could begin. The connection lives on.
    #[error("the peer ended the stream")]
    StreamEnded,
    /// The peer reset or stopped this stream. The connection lives on.
    #[error("the peer reset the stream: {0}")]
    StreamReset(CloseCode),
    /// The peer sent what the protocol does not allow.
    #[error("the peer violated the protocol: {0}")]
    Protocol(String),
    /// A message of this side is too long to be sent. Nothing was sent; the stream can be used on.
    #[error("a message of {length} bytes is over the limit of {limit}")]
    MessageTooLong {
        /// Its length.
        length: usize,
        /// The limit.
        limit: usize,
    },
    /// The endpoint's own configuration cannot be used.
    #[error("the TLS configuration cannot be used: {0}")]
    Tls(String),
    /// Any other failure of the operating system.
    #[error("{0}")]
    Io(io::Error),
}

impl ErrorKind {
    /// Whether trying again, unchanged, may succeed.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Unreachable | Self::TimedOut(_) | Self::ConnectionLost => true,
            Self::ClosedByPeer { code, .. } | Self::StreamReset(code) => code.is_transient(),
            _ => false,
        }
    }

    /// Sorts an I/O error of a socket.
    pub fn from_io(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::AddrInUse => Self::AddressInUse,
            io::ErrorKind::AddrNotAvailable => Self::AddressUnavailable,
            io::ErrorKind::PermissionDenied => Self::PermissionDenied,
            io::ErrorKind::NetworkUnreachable | io::ErrorKind::HostUnreachable => Self::Unreachable,
            _ => Self::Io(error),
        }
    }

    pub(crate) fn from_connection(error: ConnectionError) -> Self {
        match error {
            ConnectionError::TimedOut | ConnectionError::Reset => Self::ConnectionLost,
            ConnectionError::LocallyClosed => Self::ClosedHere,
            ConnectionError::ApplicationClosed(close) => Self::ClosedByPeer {
                code: close.error_code.into(),
                reason: String::from_utf8_lossy(&close.reason).into_owned(),
            },
            ConnectionError::ConnectionClosed(close) => tls::from_close_frame(&close),
            ConnectionError::TransportError(error) => tls::from_transport_error(error.code, error.to_string()),
            ConnectionError::VersionMismatch => Self::NoCommonProtocol,
            ConnectionError::CidsExhausted => Self::ClosedByPeer { code: CloseCode::Busy, reason: String::new() },
        }
    }

    pub(crate) fn from_read(error: ReadError) -> Self {
        match error {
            ReadError::Reset(code) => Self::StreamReset(code.into()),
            ReadError::ConnectionLost(error) => Self::from_connection(error),
            ReadError::ClosedStream | ReadError::IllegalOrderedRead | ReadError::ZeroRttRejected => Self::ClosedHere,
        }
    }

    pub(crate) fn from_write(error: WriteError) -> Self {
        match error {
            WriteError::Stopped(code) => Self::StreamReset(code.into()),
            WriteError::ConnectionLost(error) => Self::from_connection(error),
            WriteError::ClosedStream | WriteError::ZeroRttRejected => Self::ClosedHere,
        }
    }
}

/// What is wrong with a certificate, as both sides of a handshake name it: the one that refuses from its verifier, the one
/// that is refused from the TLS alert.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
#[non_exhaustive]
pub enum PeerFault {
    /// It was not issued by this cluster's authority (alert `unknown_ca`).
    #[error("its certificate was not issued by this cluster's authority")]
    ForeignAuthority,
    /// It belongs to another cluster (alert `access_denied`).
    #[error("it belongs to another cluster")]
    OtherCluster,
    /// Its NodeId is not the one known for this name or address (alert `bad_certificate`).
    #[error("its node id is not the one that is known for it")]
    WrongNode,
    /// Its certificate's time is over, or has not begun (alert `certificate_expired`); clocks may differ.
    #[error("its certificate is expired or not valid yet (compare the clocks of both hosts)")]
    Expired,
    /// It was revoked (alert `certificate_revoked`).
    #[error("it was revoked")]
    Revoked,
    /// Its certificate is for something else (alert `unsupported_certificate`).
    #[error("its certificate is not meant for this use")]
    WrongPurpose,
    /// A signature is wrong (alert `decrypt_error`).
    #[error("a signature is wrong")]
    BadSignature,
    /// Its certificate is not one that a flocker authority makes (alert `certificate_unknown`).
    #[error("its certificate is malformed")]
    Malformed,
}

fn said(reason: &str) -> String {
    if reason.is_empty() { String::new() } else { format!(" ({})", reason.escape_debug()) }
}

fn claim(claimed: Option<&PeerIdentity>) -> String {
    claimed.map_or_else(String::new, |peer| {
        format!(" (it says it is {}, node {}, of cluster {})", peer.name, peer.node_id.short(), peer.cluster)
    })
}
