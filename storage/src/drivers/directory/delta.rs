//! Reading a delta: a blocking thread writes it, a bounded channel hands it out.

use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicBool, Ordering},
};

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::mpsc;

use super::pool::Pool;
use crate::{
    delta::{DeltaFormat, DeltaReader, DeltaRequest},
    driver::Finding,
    error::{Error, ErrorKind, Result},
    model::SnapshotKey,
    tree::{
        root::Root,
        write::{DeltaWriter, Side},
    },
};

const OPERATION: &str = "read delta of";

/// How many chunks wait for the reader: enough to keep the disk busy, and 1.6 MiB of memory at most.
const CHUNKS_AHEAD: usize = 4;

impl Pool {
    pub(super) fn delta_writer(&self, request: &DeltaRequest) -> Result<DeltaWriter> {
        if request.format != DeltaFormat::tree() {
            let why = ErrorKind::Unsupported(format!("the delta format {} is not known here", request.format));
            return Err(Error::new(OPERATION, request.target.snapshot, why));
        }
        let base = request.base.map(|base| self.side(base)).transpose()?;
        let target = self.side(request.target)?;
        DeltaWriter::new(base, target, request.compare, request.resume.as_ref())
    }

    /// Opens one side of a delta. A snapshot that somebody changed is not sent: each entry is held against the inventory
    /// before anything is said of it, in the same walk, and the first one that differs ends the delta.
    fn side(&self, key: SnapshotKey) -> Result<Side> {
        self.stored(OPERATION, key)?;
        Ok(Side { root: Root::open(self.tree_dir(key))?, links: self.witness(OPERATION, key)? })
    }
}

/// Hands out what the blocking thread writes. Dropping it ends the thread.
pub(super) struct DirectoryDeltaReader {
    chunks: mpsc::Receiver<Result<Option<Bytes>>>,
    findings: Arc<Mutex<Vec<Finding>>>,
    stop: Arc<AtomicBool>,
    ended: bool,
}

impl Drop for DirectoryDeltaReader {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

impl DirectoryDeltaReader {
    /// Starts the thread. It keeps the pool open until it ends.
    pub(super) fn start(pool: Arc<Pool>, mut writer: DeltaWriter) -> Self {
        let stop = writer.stopper();
        let (sender, chunks) = mpsc::channel(CHUNKS_AHEAD);
        let findings = Arc::<Mutex<Vec<Finding>>>::default();
        let found = Arc::clone(&findings);
        tokio::task::spawn_blocking(move || {
            loop {
                let chunk = writer.next_chunk();
                let last = !matches!(chunk, Ok(Some(_)));
                if last {
                    found.lock().unwrap_or_else(PoisonError::into_inner).append(&mut writer.take_findings());
                }
                if sender.blocking_send(chunk).is_err() || last {
                    break;
                }
            }
            drop(pool);
        });
        Self { chunks, findings, stop, ended: false }
    }
}

#[async_trait]
impl DeltaReader for DirectoryDeltaReader {
    async fn next(&mut self) -> Result<Option<Bytes>> {
        if self.ended {
            return Ok(None);
        }
        let next = self.chunks.recv().await.unwrap_or_else(|| {
            let why = ErrorKind::Io(std::io::Error::other("the thread that reads it stopped"));
            Err(Error::new(OPERATION, "snapshot", why))
        });
        self.ended = !matches!(next, Ok(Some(_)));
        next
    }

    fn take_findings(&mut self) -> Vec<Finding> {
        std::mem::take(&mut self.findings.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
