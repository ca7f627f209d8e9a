//! Reading a delta: a blocking thread takes it from `zfs send` or from two trees, a bounded channel hands it out.
//!
//! A delta of `zfs-send/1` or `/2` is a preamble (eight bytes of magic, then three little-endian `u64`: the entries of the
//! target, the bytes of its files, and 1 where it equals the base) and the stream of `zfs send`. `/1` is what zfs-fuse
//! writes and reads; `/2` is what OpenZFS writes (`-L -c -e`, and `-w` for an encrypted volume). The two have names of their
//! own because a zfs-fuse takes some streams of OpenZFS, says it is done, and cannot read what it took.

use std::{
    io,
    process::ChildStdout,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use async_trait::async_trait;
use bytes::Bytes;
use tokio::{runtime::Handle, sync::mpsc};

use super::{
    FORMAT_1, FORMAT_2,
    catalog::missing,
    pool::{Pool, locked},
    program::Trouble,
    resume,
    snapshot::{PIECE, Totals},
    stream::{PLAIN, RICH},
    view::{Leaving, View},
    volume::{StoredSnapshot, Volume},
};
use crate::{
    command::{Input, Running, append},
    delta::{Compare, DeltaFormat, DeltaReader, DeltaRequest},
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

const PREAMBLE_MAGIC: &[u8; 8] = b"flkzfs\0\x01";
pub(super) const PREAMBLE: usize = 32;

/// What the sender says of the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Announced {
    pub(super) totals: Totals,
    pub(super) unchanged: bool,
}

/// Returns what a stream of a format may announce; `None` for formats that are not of `zfs send`.
pub(super) fn features(format: &DeltaFormat) -> Option<u64> {
    match &*format.0 {
        FORMAT_1 => Some(PLAIN),
        FORMAT_2 => Some(RICH),
        _ => None,
    }
}

fn preamble(stored: &StoredSnapshot) -> Vec<u8> {
    let numbers = [stored.entries, stored.logical_bytes, u64::from(stored.unchanged)];
    PREAMBLE_MAGIC.iter().copied().chain(numbers.into_iter().flat_map(u64::to_le_bytes)).collect()
}

pub(super) fn parse_preamble(bytes: &[u8]) -> Option<Announced> {
    let numbers = bytes.strip_prefix(PREAMBLE_MAGIC)?;
    let number = |at: usize| Some(u64::from_le_bytes(numbers.get(at..at + 8)?.try_into().ok()?));
    let totals = Totals { entries: number(0)?, logical_bytes: number(8)? };
    Some(Announced { totals, unchanged: number(16)? == 1 })
}

/// Reads what `zfs send -nP` prints: lines of fields, the last of them `size` and a number (zfs-send(8)).
fn estimated(said: &str) -> Option<u64> {
    said.lines().rev().find_map(|line| line.strip_prefix("size")?.trim().parse().ok())
}

/// Keeps snapshots from being destroyed by somebody else while they are read.
struct Held {
    pool: Arc<Pool>,
    names: Vec<String>,
}

impl Held {
    fn new(pool: &Arc<Pool>, names: Vec<String>) -> std::result::Result<Self, Trouble> {
        pool.pin(&names)?;
        Ok(Self { pool: Arc::clone(pool), names })
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.pool.unpin(&self.names);
    }
}

/// Where a delta comes from. The fields go in this order: first the files are closed, last the snapshots are let go.
pub(super) struct Source {
    from: From,
    _views: Vec<View>,
    held: Held,
}

impl Source {
    /// Counts it among what is let go of, until the guard goes.
    fn leaving(&self) -> Leaving {
        self.held.pool.views.leaving()
    }
}

enum From {
    /// Two trees.
    Trees(Box<DeltaWriter>),
    /// `zfs send`.
    Program(Sending),
}

/// A running `zfs send`.
struct Sending {
    running: Arc<Running>,
    stdout: ChildStdout,
    /// What is handed out before its output.
    first: Vec<u8>,
    /// The data is encrypted, and sent as it lies.
    is_raw: bool,
}

impl Pool {
    /// Opens what a request asks for.
    pub(super) fn delta_source(self: &Arc<Self>, request: &DeltaRequest) -> Result<Source> {
        let is_tree = request.format == DeltaFormat::tree();
        if !is_tree && !self.capabilities().formats.contains(&request.format) {
            let why = ErrorKind::Unsupported(format!("the delta format {} is not written here", request.format));
            return Err(Error::new(OPERATION, request.target.snapshot, why));
        }
        let volume = self.known(OPERATION, request.target.volume)?;
        let target = volume.find(request.target.snapshot).ok_or_else(|| missing(OPERATION, request.target.snapshot))?;
        if let Some(base) = request.base {
            self.find(OPERATION, base, Some(&volume))?;
        }
        let names = request.base.into_iter().chain([request.target]).map(|key| self.snapshot_name(key)).collect();
        let held = Held::new(self, names).map_err(|it| it.into_error(OPERATION, request.target.snapshot))?;
        let mut views = Vec::new();
        let from = if is_tree {
            let mut side = |key: SnapshotKey| -> Result<Side> {
                let view = self.view(OPERATION, key)?;
                let root = Root::open(view.path())?;
                views.push(view);
                Ok(Side { root, links: Links::ByInode })
            };
            let base = request.base.map(&mut side).transpose()?;
            let target = side(request.target)?;
            // zfs-fuse keeps whole seconds: a file that was rewritten right after a snapshot looks the same.
            let compare = if self.abilities.modern { request.compare } else { Compare::Contents };
            From::Trees(Box::new(DeltaWriter::new(base, target, compare, request.resume.as_ref())?))
        } else {
            From::Program(self.start_sending(request, &volume, target)?)
        };
        Ok(Source { from, _views: views, held })
    }

    /// Asks `zfs send` how long the stream will be. Of the portable format it tells how long its own would be, uncompressed: the
    /// blocks that changed are in both. Only OpenZFS can tell.
    pub(super) fn estimate(&self, request: &DeltaRequest) -> Result<Option<u64>> {
        let volume = self.known(OPERATION, request.target.volume)?;
        let is_native = features(&request.format).is_some();
        let asked = DeltaRequest {
            format: DeltaFormat(FORMAT_2.into()),
            resume: request.resume.clone().filter(|_| is_native),
            ..request.clone()
        };
        let mut words = match self.words(&asked, &volume) {
            Err(Error { kind: ErrorKind::FormatUnfit(_), .. }) if !is_native => return Ok(None),
            words => words?,
        };
        if !is_native {
            words.retain(|word| word != "-c");
        }
        words.splice(1..1, ["-n", "-P"].map(str::to_owned));
        // A zfs that cannot tell is no reason for anything.
        Ok(self.programs.zfs(&words).ok().and_then(|said| estimated(&String::from_utf8_lossy(&said))))
    }

    /// Returns the words that start `zfs send`.
    fn words(&self, request: &DeltaRequest, volume: &Volume) -> Result<Vec<String>> {
        let failed = |kind: ErrorKind| Error::new(OPERATION, request.target.snapshot, kind);
        let mut words = vec!["send".to_owned()];
        if let Some(point) = &request.resume {
            let token = resume::token(point).map_err(|why| failed(ErrorKind::ResumeStale(why)))?;
            self.check_token(request, volume, &token).map_err(|why| failed(ErrorKind::ResumeStale(why)))?;
            words.extend(["-t".to_owned(), token]);
        } else {
            if request.format.0 == FORMAT_2 {
                words.extend(["-L", "-c", "-e"].map(str::to_owned));
                if self.is_encrypted(volume).map_err(|trouble| failed(trouble.into_kind()))? {
                    words.push("-w".to_owned());
                }
            }
            if let Some(base) = request.base {
                let name = self.snapshot_name(base);
                if base.volume != volume.id() && volume.found.property("origin") != Some(&name) {
                    let why = "the base is not what the volume is a clone of in this pool".to_owned();
                    return Err(failed(ErrorKind::FormatUnfit(why)));
                }
                words.extend(["-i".to_owned(), name]);
            }
            words.push(self.snapshot_name(request.target));
        }
        Ok(words)
    }

    fn start_sending(&self, request: &DeltaRequest, volume: &Volume, target: &StoredSnapshot) -> Result<Sending> {
        let failed = |kind: ErrorKind| Error::new(OPERATION, target.snapshot.id, kind);
        let words = self.words(request, volume)?;
        // A token has the word `-w` in it.
        let is_raw = match &request.resume {
            Some(_) => self.is_encrypted(volume).map_err(|it| failed(it.into_kind()))?,
            None => words.iter().any(|word| word == "-w"),
        };
        let running = self.programs.start_zfs(&words, Input::Nothing).map_err(|it| failed(it.into_kind()))?;
        let Some(stdout) = running.take_stdout() else {
            return Err(failed(ErrorKind::Io(io::Error::other("zfs send has no output"))));
        };
        Ok(Sending { running: Arc::new(running), stdout, first: preamble(target), is_raw })
    }

    /// Tells whether a volume's data is encrypted at rest; it is sent as it lies then.
    fn is_encrypted(&self, volume: &Volume) -> std::result::Result<bool, Trouble> {
        let found = self.look(&volume.found.name, "encryption")?;
        Ok(found.property("encryption").is_some_and(|value| value != "off"))
    }
}

impl Sending {
    fn next_chunk(&mut self) -> Result<Option<Bytes>> {
        let failed = |kind: ErrorKind| Error::new(OPERATION, "snapshot", kind);
        let mut chunk = std::mem::take(&mut self.first);
        let more = PIECE.saturating_sub(chunk.len());
        append(&self.stdout, &mut chunk, more).map_err(|error| failed(ErrorKind::from_io(error)))?;
        if chunk.len() < PIECE {
            // It has ended. Its own words go before what it wrote last.
            let ended = self.running.finish().map_err(Trouble::from);
            ended.map_err(|trouble| failed(trouble.into_kind()))?;
        }
        Ok((!chunk.is_empty()).then(|| chunk.into()))
    }
}

enum Stopper {
    Flag(Arc<AtomicBool>),
    Program(Arc<Running>),
}

/// Hands out what the blocking thread reads. Dropping it ends the thread.
pub(super) struct ZfsDeltaReader {
    chunks: mpsc::Receiver<Result<Option<Bytes>>>,
    stop: Stopper,
    ended: bool,
    is_packed: bool,
    findings: Arc<Mutex<Vec<Finding>>>,
}

impl Drop for ZfsDeltaReader {
    fn drop(&mut self) {
        match &self.stop {
            Stopper::Flag(flag) => flag.store(true, Ordering::Relaxed),
            Stopper::Program(running) if !self.ended => running.kill(),
            Stopper::Program(_) => {}
        }
    }
}

impl ZfsDeltaReader {
    /// Starts the thread. It keeps the pool open until it ends.
    pub(super) fn start(mut source: Source) -> Self {
        let stop = match &source.from {
            From::Trees(writer) => Stopper::Flag(writer.stopper()),
            From::Program(sending) => Stopper::Program(Arc::clone(&sending.running)),
        };
        let is_packed = matches!(&source.from, From::Program(sending) if sending.is_raw);
        let (sender, chunks) = mpsc::channel(CHUNKS_AHEAD);
        let findings: Arc<Mutex<Vec<Finding>>> = Arc::default();
        let found = Arc::clone(&findings);
        tokio::task::spawn_blocking(move || {
            loop {
                let chunk = match &mut source.from {
                    From::Trees(writer) => writer.next_chunk(),
                    From::Program(sending) => sending.next_chunk(),
                };
                if !matches!(chunk, Ok(Some(_))) {
                    if let From::Trees(writer) = &mut source.from {
                        locked(&found).append(&mut writer.take_findings());
                    }
                    // Only who wants to destroy the snapshots waits until they are let go of, and nobody while there is no room.
                    if let Ok(place) = Handle::current().block_on(sender.reserve()) {
                        let leaving = source.leaving();
                        place.send(chunk);
                        drop(source);
                        drop(leaving);
                    }
                    break;
                }
                if sender.blocking_send(chunk).is_err() {
                    break;
                }
            }
        });
        Self { chunks, stop, ended: false, is_packed, findings }
    }
}

#[async_trait]
impl DeltaReader for ZfsDeltaReader {
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

    fn is_packed(&self) -> bool {
        self.is_packed
    }

    fn take_findings(&mut self) -> Vec<Finding> {
        std::mem::take(&mut locked(&self.findings))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_size_is_read_from_the_dry_run_of_a_send() {
        let said = "incremental\ta\tp/v@b\t1048576\nsize\t1048624\n";
        assert_eq!(estimated(said), Some(1_048_624));
        assert_eq!(estimated("full\tp/v@b\t12\n"), None);
    }

    #[test]
    fn the_bytes_of_a_preamble_stay_as_they_are() {
        let bytes = b"flkzfs\0\x01\x03\0\0\0\0\0\0\0\x04\x03\x02\x01\0\0\0\0\x01\0\0\0\0\0\0\0";
        let totals = Totals { entries: 3, logical_bytes: 0x0102_0304 };
        assert_eq!(parse_preamble(bytes), Some(Announced { totals, unchanged: true }));
        assert_eq!(bytes.len(), PREAMBLE);
        assert_eq!(parse_preamble(&bytes[..31]), None);
        assert_eq!(parse_preamble(&[0; PREAMBLE]), None);
    }
}
