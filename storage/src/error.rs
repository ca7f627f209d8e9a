//! What can go wrong on a pool: what was tried, on what, and why.

use std::{fmt, io, path::PathBuf};

use crate::model::{SnapshotId, VolumeId};

/// The result of a storage operation.
pub type Result<T> = std::result::Result<T, Error>;

/// A storage operation that failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {operation} {object}")]
pub struct Error {
    /// What was tried, as a verb phrase ("create volume", "read delta of").
    pub operation: &'static str,
    /// On what: a path, an id, a name.
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

    /// Wraps an I/O error, telling apart no space and no permission.
    pub fn io(operation: &'static str, object: impl fmt::Display, error: impl Into<io::Error>) -> Self {
        Self::new(operation, object, ErrorKind::from_io(error.into()))
    }
}

/// Why a storage operation failed. Unless a variant says otherwise, nothing was changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The volume or snapshot is not on this pool.
    #[error("it does not exist on this pool")]
    NotFound,
    /// The id is taken.
    #[error("it exists already")]
    AlreadyExists,
    /// Something depends on what would be destroyed.
    #[error("{0}")]
    Blocked(Blockers),
    /// The pool or the volume's quota is full.
    #[error("no space left on the pool")]
    NoSpace,
    /// The daemon's user may not do this.
    #[error("permission denied; the node's user must be able to do this")]
    PermissionDenied,
    /// Another process has the pool open.
    #[error("the pool is in use by another flocker node{}", .pid.map(|pid| format!(" (process {pid})")).unwrap_or_default())]
    PoolBusy {
        /// The process that holds the pool's lock, where it is known.
        pid: Option<u32>,
    },
    /// The pool is not what a pool should be.
    #[error("the pool cannot be used: {0}")]
    PoolUnusable(String),
    /// A stream or a record is malformed, truncated or hostile.
    #[error("malformed data: {0}")]
    Corrupt(String),
    /// A snapshot differs from its inventory: somebody changed it behind the node's back.
    #[error("the snapshot was changed after it was taken: {path}: {what}", path = .path.display())]
    Tampered {
        /// The first path that differs, relative to the snapshot's root.
        path: PathBuf,
        /// What differs.
        what: String,
    },
    /// The resume point does not fit what is here; start the step from its beginning.
    #[error("the resume point does not fit: {0}")]
    ResumeStale(String),
    /// This delta cannot travel in this format, for instance because the receiver's copy of the base came in another
    /// one; the same step in the portable format ([`TREE_FORMAT`](crate::delta::TREE_FORMAT)) can.
    #[error("the delta format does not fit here: {0}")]
    FormatUnfit(String),
    /// This driver cannot do it.
    #[error("the driver cannot do this: {0}")]
    Unsupported(String),
    /// Any other failure of the operating system.
    #[error("{0}")]
    Io(io::Error),
}

impl ErrorKind {
    /// Sorts an I/O error into no space, no permission, or any other.
    pub fn from_io(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::NoSpace,
            io::ErrorKind::PermissionDenied => Self::PermissionDenied,
            _ => Self::Io(error),
        }
    }
}

/// What stands in the way of a `rewind`, `forget` or `destroy`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Blockers {
    /// Snapshots newer than the one to go back to, oldest first.
    pub newer: Vec<SnapshotId>,
    /// Volumes cloned from a snapshot that would go.
    pub clones: Vec<VolumeId>,
    /// Whether the volume is attached.
    pub attached: bool,
}

impl Blockers {
    /// Tells whether nothing stands in the way.
    pub fn is_empty(&self) -> bool {
        self.newer.is_empty() && self.clones.is_empty() && !self.attached
    }
}

impl fmt::Display for Blockers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts = Vec::new();
        if !self.newer.is_empty() {
            parts.push(format!("{} newer snapshot(s) exist", self.newer.len()));
        }
        if !self.clones.is_empty() {
            parts.push(format!("{} volume(s) were cloned from it", self.clones.len()));
        }
        if self.attached {
            parts.push("it is attached".to_owned());
        }
        f.write_str(&parts.join(", "))
    }
}
