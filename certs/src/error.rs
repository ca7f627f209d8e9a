//! What can go wrong with keys, certificates and tokens: what was tried, on what, and why.

use std::{fmt, io};

/// The result of an operation on keys, certificates or tokens.
pub type Result<T> = std::result::Result<T, Error>;

/// An operation on keys, certificates or tokens that failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {operation} {object}")]
pub struct Error {
    /// What was tried, as a verb phrase ("read", "issue a certificate for").
    pub operation: &'static str,
    /// On what: a path, a name, an id. Never a key.
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

/// Why an operation on keys, certificates or tokens failed. Nothing was written, unless a variant says otherwise.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The file is not there: this node was not initialised, or does not hold the authority.
    #[error("it does not exist")]
    NotFound,
    /// The file belongs to somebody else or is closed to this user.
    #[error("permission denied")]
    PermissionDenied,
    /// Bytes that should be a key, certificate or request are not.
    #[error("malformed data: {0}")]
    Malformed(String),
    /// The node name is not `[a-zA-Z0-9][a-zA-Z0-9_.-]{0,127}`.
    #[error("a node name has 1 to 128 letters, digits, '_', '.' or '-', and starts with a letter or digit")]
    InvalidName,
    /// A signature does not fit its key.
    #[error("the signature is wrong")]
    BadSignature,
    /// The certificate was made for another key.
    #[error("the certificate belongs to another key")]
    KeyMismatch,
    /// The certificate was issued by another authority.
    #[error("the certificate was issued by another authority")]
    ForeignAuthority,
    /// The certificate's NodeId is not the hash of its key.
    #[error("the certificate's node id is not the hash of its key")]
    NodeIdMismatch,
    /// A time is outside what a certificate can say.
    #[error("the time is out of range")]
    TimeOutOfRange,
    /// The cryptographic library refused.
    #[error("the cryptographic library failed: {0}")]
    Crypto(String),
    /// Any other failure of the operating system. A file may have been left beside its final name.
    #[error("{0}")]
    Io(io::Error),
}

impl ErrorKind {
    /// Sorts an I/O error into absent, forbidden, or any other.
    pub fn from_io(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::NotFound => Self::NotFound,
            io::ErrorKind::PermissionDenied => Self::PermissionDenied,
            _ => Self::Io(error),
        }
    }
}
