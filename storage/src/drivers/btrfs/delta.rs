//! Reading a delta: a blocking thread takes it from the kernel or from two trees, a bounded channel hands it out.
//!
//! A delta of `btrfs-send/1` or `/2` is a preamble (eight bytes of magic, then two little-endian `u64`: the entries of the
//! target and the bytes of its files) and the kernel's send stream of a version up to that number. The stream says itself
//! whether it builds on the base; where the base here was changed since it was taken, it does not.

use std::{
    io::{self, Read},
    process::ChildStdout,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::mpsc;

use super::{
    FORMAT_1, FORMAT_2,
    pool::Pool,
    snapshot::Totals,
    stream::{Header, Reader},
    subvolume::{self, PIECE, STREAM_VERSION},
};
use crate::{
    command::{Running, append},
    delta::{DeltaFormat, DeltaReader, DeltaRequest},
    driver::Finding,
    error::{Error, ErrorKind, Result},
    model::SnapshotKey,
    tree::{
        root::Root,
        walk::Links,
        write::{DeltaWriter, Side},
    },
};

const OPERATION: &str = "read delta of";

/// How many chunks wait for the reader: enough to keep the disk busy, and 1.6 MiB of memory at most.
const CHUNKS_AHEAD: usize = 4;

const PREAMBLE_MAGIC: &[u8; 8] = b"flkbtrfs";
pub(super) const PREAMBLE: usize = 24;

/// Returns the version of the kernel's stream that a format carries; `None` for other formats.
pub(super) fn stream_version(pool: &Pool, format: &DeltaFormat) -> Option<u32> {
    let version = match &*format.0 {
        FORMAT_1 => 1,
        FORMAT_2 => 2,
        _ => return None,
    };
    pool.capabilities().formats.contains(format).then_some(version)
}

pub(super) fn preamble(totals: Totals) -> Vec<u8> {
    [PREAMBLE_MAGIC, &totals.entries.to_le_bytes()[..], &totals.logical_bytes.to_le_bytes()].concat()
}

pub(super) fn parse_preamble(bytes: &[u8]) -> Option<Totals> {
    let numbers = bytes.strip_prefix(PREAMBLE_MAGIC)?;
    let number = |at: usize| Some(u64::from_le_bytes(numbers.get(at..at + 8)?.try_into().ok()?));
    Some(Totals { entries: number(0)?, logical_bytes: number(8)? })
}

/// Where a delta comes from.
pub(super) enum Source {
    /// Two trees.
    Trees(Box<DeltaWriter>),
    /// The kernel.
    Kernel(Sending),
}

/// A running `btrfs send`.
pub(super) struct Sending {
    running: Arc<Running>,
    stdout: ChildStdout,
    /// What was read of it already, and the preamble.
    first: Vec<u8>,
    findings: Vec<Finding>,
}

impl Pool {
    pub(super) fn delta_source(&self, request: &DeltaRequest) -> Result<Source> {
        if request.format == DeltaFormat::tree() {
            let base = request.base.map(|base| self.side(base)).transpose()?;
            let target = self.side(request.target)?;
            return DeltaWriter::new(base, target, request.compare, request.resume.as_ref())
                .map(|writer| Source::Trees(Box::new(writer)));
        }
        let object = request.target.snapshot;
        let Some(version) = stream_version(self, &request.format) else {
            let why = ErrorKind::Unsupported(format!("the delta format {} is not known here", request.format));
            return Err(Error::new(OPERATION, object, why));
        };
        if request.resume.is_some() {
            let why = "the kernel's stream starts at its beginning only".to_owned();
            return Err(Error::new(OPERATION, object, ErrorKind::ResumeStale(why)));
        }
        let error = match self.start_sending(version, request.base, request.target) {
            Ok(sending) => return Ok(Source::Kernel(sending)),
            Err(error) => error,
        };
        self.refuse_tampered(OPERATION, request.target)?;
        let changed = request.base.map_or(Ok(None), |base| self.tampering(OPERATION, base))?;
        let (Some(base), Some(what)) = (request.base, changed) else { return Err(error) };
        // What was written to the base here is not in the base there, and the kernel would not notice.
        let mut sending = self.start_sending(version, None, request.target)?;
        let name = |key| Ok(self.stored(OPERATION, key)?.snapshot.name);
        let (base, target) = (name(base)?, name(request.target)?);
        let what = format!("snapshot {target} is sent in full: {base}, which it builds on, was changed ({what})");
        sending.findings.push(Finding { path: ".".to_owned(), what });
        Ok(Source::Kernel(sending))
    }

    /// Compares two trees as the portable format does, whatever the format: for an estimate, which no program is started for.
    pub(super) fn comparing(&self, request: &DeltaRequest) -> Result<DeltaWriter> {
        let side = |key| Ok(Side { root: Root::open(self.tree_dir(key))?, links: Links::ByInode });
        let base = request.base.map(side).transpose()?;
        DeltaWriter::new(base, side(request.target)?, request.compare, None)
    }

    /// Opens one side of a delta. A snapshot that somebody changed is not sent.
    fn side(&self, key: SnapshotKey) -> Result<Side> {
        self.refuse_tampered(OPERATION, key)?;
        Ok(Side { root: Root::open(self.tree_dir(key))?, links: Links::ByInode })
    }

    /// Starts to send, and holds what the stream says of both sides against their records: the kernel keeps both
    /// read-only from then on.
    fn start_sending(&self, version: u32, base: Option<SnapshotKey>, target: SnapshotKey) -> Result<Sending> {
        let failed = |kind: ErrorKind| Error::new(OPERATION, target.snapshot, kind);
        let stored = self.stored(OPERATION, target)?;
        let known = base.map(|base| self.stored(OPERATION, base)).transpose()?;
        let options: &[&str] = if version >= 2 { &["--proto", "2", "--compressed-data"] } else { &[] };
        let base_tree = base.map(|base| self.tree_dir(base));
        let running = subvolume::send(options, base_tree.as_deref(), &self.tree_dir(target))
            .map_err(|error| failed(error.into_kind()))?;
        let Some(mut stdout) = running.take_stdout() else {
            return Err(failed(ErrorKind::Io(io::Error::other("btrfs send has no output"))));
        };
        let mut first = preamble(Totals { entries: stored.entries, logical_bytes: stored.logical_bytes });
        let mut reader = Reader::new(STREAM_VERSION);
        let mut buffer = [0; 4096];
        while reader.header().is_none() {
            let length = read(&mut stdout, &mut buffer).map_err(|error| failed(ErrorKind::from_io(error)))?;
            if length == 0 {
                running.finish().map_err(|error| failed(error.into_kind()))?;
                return Err(failed(ErrorKind::Io(io::Error::other("btrfs send ended before its first command"))));
            }
            first.extend_from_slice(&buffer[..length]);
            let taken = reader.take(&buffer[..length]);
            taken.map_err(|error| failed(ErrorKind::Corrupt(error.to_string())))?;
        }
        let expected = Header {
            uuid: stored.identity,
            ctransid: stored.ctransid,
            parent: known.map(|known| (known.identity, known.ctransid)),
        };
        if reader.header() != Some(&expected) {
            let what = "it, or the base of the delta, was changed while it was opened".to_owned();
            return Err(failed(ErrorKind::Tampered { path: ".".into(), what }));
        }
        Ok(Sending { running: Arc::new(running), stdout, first, findings: Vec::new() })
    }
}

fn read(from: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        match from.read(buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

impl Sending {
    fn next_chunk(&mut self) -> Result<Option<Bytes>> {
        let failed = |kind: ErrorKind| Error::new(OPERATION, "snapshot", kind);
        let mut chunk = std::mem::take(&mut self.first);
        let more = PIECE.saturating_sub(chunk.len());
        append(&self.stdout, &mut chunk, more).map_err(|error| failed(ErrorKind::from_io(error)))?;
        if !chunk.is_empty() {
            return Ok(Some(chunk.into()));
        }
        self.running.finish().map_err(|error| failed(error.into_kind()))?;
        Ok(None)
    }
}

enum Stopper {
    Flag(Arc<AtomicBool>),
    Program(Arc<Running>),
}

/// Hands out what the blocking thread reads. Dropping it ends the thread.
pub(super) struct BtrfsDeltaReader {
    chunks: mpsc::Receiver<Result<Option<Bytes>>>,
    findings: Arc<Mutex<Vec<Finding>>>,
    stop: Stopper,
    ended: bool,
}

impl Drop for BtrfsDeltaReader {
    fn drop(&mut self) {
        match &self.stop {
            Stopper::Flag(flag) => flag.store(true, Ordering::Relaxed),
            Stopper::Program(running) if !self.ended => running.kill(),
            Stopper::Program(_) => {}
        }
    }
}

impl BtrfsDeltaReader {
    /// Starts the thread. It keeps the pool open until it ends.
    pub(super) fn start(pool: Arc<Pool>, mut source: Source) -> Self {
        let stop = match &source {
            Source::Trees(writer) => Stopper::Flag(writer.stopper()),
            Source::Kernel(sending) => Stopper::Program(Arc::clone(&sending.running)),
        };
        let (sender, chunks) = mpsc::channel(CHUNKS_AHEAD);
        let findings = Arc::<Mutex<Vec<Finding>>>::default();
        let found = Arc::clone(&findings);
        tokio::task::spawn_blocking(move || {
            loop {
                let chunk = match &mut source {
                    Source::Trees(writer) => writer.next_chunk(),
                    Source::Kernel(sending) => sending.next_chunk(),
                };
                let last = !matches!(chunk, Ok(Some(_)));
                if last {
                    let mut all = match &mut source {
                        Source::Trees(writer) => writer.take_findings(),
                        Source::Kernel(sending) => std::mem::take(&mut sending.findings),
                    };
                    found.lock().unwrap_or_else(PoisonError::into_inner).append(&mut all);
                }
                if sender.blocking_send(chunk).is_err() || last {
                    break;
                }
            }
            drop(source);
            drop(pool);
        });
        Self { chunks, findings, stop, ended: false }
    }
}

#[async_trait]
impl DeltaReader for BtrfsDeltaReader {
    async fn next(&mut self) -> Result<Option<Bytes>> {
        if self.ended {
            return Ok(None);
        }
        let next = self.chunks.recv().await.unwrap_or_else(|| {
            let why = ErrorKind::Io(io::Error::other("the thread that reads it stopped"));
            Err(Error::new(OPERATION, "snapshot", why))
        });
        self.ended = !matches!(next, Ok(Some(_)));
        next
    }

    fn take_findings(&mut self) -> Vec<Finding> {
        std::mem::take(&mut self.findings.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bytes_of_a_preamble_stay_as_they_are() {
        let totals = Totals { entries: 3, logical_bytes: 0x0102_0304 };
        let bytes = preamble(totals);
        assert_eq!(bytes, b"flkbtrfs\x03\0\0\0\0\0\0\0\x04\x03\x02\x01\0\0\0\0");
        assert_eq!((bytes.len(), parse_preamble(&bytes)), (PREAMBLE, Some(totals)));
        assert_eq!(parse_preamble(b"flkbtrfs\x03\0\0"), None);
        assert_eq!(parse_preamble(&[0; PREAMBLE]), None);
    }
}
