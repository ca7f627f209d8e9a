//! Taking in a delta: into a subvolume in staging, checked there, published by one rename.
//!
//! `staging/receive-<volume>-<snapshot>/incoming/` becomes the snapshot's directory. A stream of the kernel's format goes
//! through [`Reader`](super::stream::Reader) to `btrfs receive`, which sees nothing of the pool but that directory (chroot)
//! and a copy of the base with a uuid of its own. A stream of the tree format is applied to a writable snapshot of the
//! base; from its first checkpoint on it can go on after a restart (see [`partial`]).
//!
//! | state | dropped or failed | `suspend` | killed, then opened |
//! |---|---|---|---|
//! | open, the kernel's format | cleared away | cleared away | cleared away |
//! | open, before the first checkpoint | cleared away | cleared away | cleared away |
//! | open, after a checkpoint | cleared away | kept | kept, as of the checkpoint |
//! | published | – | – | the rest is cleared away |

use std::{
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
    process::ChildStdin,
    sync::Arc,
};

use async_trait::async_trait;
use bytes::Bytes;
use uuid::Uuid;

use super::{
    catalog::{StoredSnapshot, lay_out_volume},
    delta::{PREAMBLE, parse_preamble, stream_version},
    pool::{Pool, Stage},
    run,
    snapshot::{Totals, count},
    stream::{Changes, Header, Naming, Reader, StreamError},
    subvolume::{self, Mode, PROGRAM, Trouble},
};
use crate::{
    command::{Input, Running},
    delta::{DeltaFormat, Partial, ReceiveRequest, Receiving, ResumePoint},
    driver::Finding,
    drivers::{
        folder::make_dir,
        intake::Intake,
        partial::{self, Progress},
        published::{Histories, Record},
    },
    error::{Error, ErrorKind, Result},
    fault,
    model::{HeldSnapshot, SnapshotKey, VolumeId},
    tree::{
        apply::{Applier, Sharing},
        root::Root,
    },
};

const OPERATION: &str = "receive snapshot";

/// What a received subvolume is called, whatever the sender called it.
const TREE: &str = "tree";

/// Where in its place a receive's subvolume is.
const INCOMING_TREE: &str = "incoming/tree";

/// Tells whether a place in staging is a receive that can go on; takes back what its commit had begun.
pub(super) fn is_suspended(path: &Path) -> bool {
    if let Err(error) = partial::take_back(path, "incoming") {
        tracing::warn!(path = %path.display(), %error, "a receive cannot go on");
        return false;
    }
    partial::read(path, INCOMING_TREE).is_ok()
}

impl Pool {
    pub(super) fn partial(&self, volume: VolumeId) -> Result<Option<Partial>> {
        if self.receiving().contains(&volume) {
            return Ok(None);
        }
        partial::find(&self.staging_dir(), volume, INCOMING_TREE)
            .map_err(|error| Error::io("look for a partial receive of", volume, error))
    }

    pub(super) fn discard_partial(self: &Arc<Self>, volume: VolumeId) -> Result<()> {
        let _slot = Slot::take(self, volume)?;
        self.clear_partials(volume)
    }

    pub(super) fn clear_partials(&self, volume: VolumeId) -> Result<()> {
        const OPERATION: &str = "discard a partial receive of";
        let places = partial::places(&self.staging_dir(), volume);
        for path in places.map_err(|error| Error::io(OPERATION, volume, error))? {
            let trashed = self.trash(OPERATION, &path)?;
            self.delete_trashed(trashed);
        }
        Ok(())
    }

    pub(super) fn receive(self: &Arc<Self>, request: ReceiveRequest) -> Result<BtrfsReceiving> {
        let (volume, object) = (request.volume.id, request.snapshot.id);
        let version = stream_version(self, &request.format);
        if version.is_none() && request.format != DeltaFormat::tree() {
            let why = ErrorKind::Unsupported(format!("the delta format {} is not known here", request.format));
            return Err(Error::new(OPERATION, object, why));
        }
        self.check_record(OPERATION, &request.volume)?;
        let slot = Slot::take(self, volume)?;
        if self.volume_dir(volume).exists() {
            self.volume(OPERATION, volume)?;
            if self.snapshot_dir(SnapshotKey { volume, snapshot: object }).exists() {
                return Err(Error::new(OPERATION, object, ErrorKind::AlreadyExists));
            }
        }
        let (stage, taken_before) = self.place_of(&request)?;
        let progress = Progress::new(taken_before, request.resume.clone());
        let taker = match version {
            Some(version) => Taker::Kernel(Box::new(self.take_stream(&request, &stage, version)?)),
            None => Taker::Tree(Box::new(self.take_tree(&request, &stage, &progress)?)),
        };
        fault::point("btrfs.receive.opened");
        let pool = Arc::clone(self);
        let work = Work { taker, stage, progress, request, pool, _slot: slot };
        Ok(BtrfsReceiving { intake: Intake::new(OPERATION, work, Work::take) })
    }

    /// Makes the receive's place in staging, or finds what an earlier one left there; with the bytes it had taken in.
    fn place_of(self: &Arc<Self>, request: &ReceiveRequest) -> Result<(Stage, u64)> {
        let (volume, object) = (request.volume.id, request.snapshot.id);
        let path = self.staging_dir().join(partial::place(volume, object));
        if let Some(point) = &request.resume {
            // Only a receive in the tree format ever leaves something to be found.
            let received_bytes = partial::check(&path, INCOMING_TREE, request, point)?;
            // A commit that died may have come this far.
            let tree = path.join(INCOMING_TREE);
            partial::clear_beside(&tree).map_err(|error| Error::io(OPERATION, object, error))?;
            subvolume::set_read_only(&tree, false).map_err(|error| Error::new(OPERATION, object, error.into_kind()))?;
            return Ok((self.stage_found(path), received_bytes));
        }
        self.clear_partials(volume)?;
        let stage = self.stage_at(OPERATION, path)?;
        make_dir(&stage.path().join("incoming")).map_err(|error| Error::io(OPERATION, object, error))?;
        Ok((stage, 0))
    }

    fn take_tree(&self, request: &ReceiveRequest, stage: &Stage, progress: &Arc<Progress>) -> Result<Applier> {
        let tree = stage.path().join(INCOMING_TREE);
        let made = match (request.base, &request.resume) {
            (_, Some(_)) => Ok(()),
            (Some(base), None) => subvolume::snapshot(&self.tree_dir(base), &tree, Mode::Writable),
            (None, None) => subvolume::create(&tree),
        };
        made.map_err(|error| Error::new(OPERATION, request.snapshot.id, error.into_kind()))?;
        let base = match request.base {
            None => None,
            Some(base) => {
                // After the copy was made: a change that is in it is noticed.
                self.refuse_tampered(OPERATION, base)?;
                Some(Root::open(self.tree_dir(base))?)
            }
        };
        let on_checkpoint = progress.recorder(request, stage.path(), "btrfs.receive.checkpoint");
        Applier::new(Root::open(tree)?, base, Sharing::Exclusive, request.resume.clone(), Some(on_checkpoint))
    }

    fn take_stream(&self, request: &ReceiveRequest, stage: &Stage, version: u32) -> Result<Stream> {
        let failed = |kind: ErrorKind| Error::new(OPERATION, request.snapshot.id, kind);
        let parent = match request.base {
            None => None,
            Some(base) => {
                // Its own uuid makes the copy the one subvolume that the program can mean.
                let copy = stage.path().join("base");
                subvolume::snapshot(&self.tree_dir(base), &copy, Mode::ReadOnly)
                    .map_err(|error| failed(error.into_kind()))?;
                self.refuse_tampered(OPERATION, base)?;
                Some(subvolume::uuid(&copy).map_err(|error| error.into_error(OPERATION, base.snapshot))?)
            }
        };
        let incoming = stage.path().join("incoming");
        let words = ["receive", "-q", "-C", "-e"].map(AsRef::as_ref);
        let arguments: Vec<_> = words.into_iter().chain([incoming.as_os_str()]).collect();
        let running = Running::start(PROGRAM, &arguments, Input::Pipe).map_err(|error| failed(error.into_kind()))?;
        let stdin = running.take_stdin();
        let reader = Reader::renaming(version, Naming { name: TREE, parent });
        let base = request.base.map(|base| Ok(self.stored(OPERATION, base)?.identity)).transpose()?;
        Ok(Stream { running, stdin, preamble: Vec::new(), reader, base })
    }
}

/// The right to the one open receive of a volume.
struct Slot {
    pool: Arc<Pool>,
    volume: VolumeId,
}

impl Slot {
    fn take(pool: &Arc<Pool>, volume: VolumeId) -> Result<Self> {
        if !pool.receiving().insert(volume) {
            let why = ErrorKind::Unsupported("another receive for this volume is open".to_owned());
            return Err(Error::new(OPERATION, volume, why));
        }
        Ok(Self { pool: Arc::clone(pool), volume })
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.pool.receiving().remove(&self.volume);
    }
}

/// Who takes the bytes.
enum Taker {
    Tree(Box<Applier>),
    Kernel(Box<Stream>),
}

/// A stream on its way to `btrfs receive`.
struct Stream {
    running: Running,
    stdin: Option<ChildStdin>,
    preamble: Vec<u8>,
    reader: Reader,
    /// What the base here is called, if it came by the kernel's format: as at the sender.
    base: Option<Uuid>,
}

/// What arrived.
struct Arrived {
    totals: Totals,
    unchanged: bool,
    /// What a subvolume that `btrfs receive` has finished is called.
    received: Option<Uuid>,
}

impl Stream {
    /// Says that the stream cannot be taken: it is at fault, or the base here is, where it came by the tree format and so
    /// lacks what that leaves out.
    fn unfit(&self, what: String) -> ErrorKind {
        let sent = self.reader.header().and_then(|header| header.parent).map(|(uuid, _)| uuid);
        if sent.is_some() && self.base.is_some() && sent != self.base {
            return ErrorKind::FormatUnfit(format!("{what}; the snapshot it builds on came here in another format"));
        }
        ErrorKind::Corrupt(what)
    }

    fn write(&mut self, mut chunk: &[u8]) -> std::result::Result<(), ErrorKind> {
        if self.preamble.len() < PREAMBLE {
            let (head, rest) = chunk.split_at(chunk.len().min(PREAMBLE - self.preamble.len()));
            self.preamble.extend_from_slice(head);
            chunk = rest;
            if self.preamble.len() == PREAMBLE && parse_preamble(&self.preamble).is_none() {
                return Err(ErrorKind::Corrupt("the stream is of another format".to_owned()));
            }
        }
        let pieces = self.reader.take(chunk).map_err(|error| ErrorKind::Corrupt(error.to_string()))?;
        let Some(stdin) = &mut self.stdin else {
            return Err(ErrorKind::Corrupt("the receive failed before".to_owned()));
        };
        match pieces.iter().try_for_each(|piece| stdin.write_all(piece)) {
            Ok(()) => Ok(()),
            // It ended early: its own words say why.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(self
                .end()
                .err()
                .unwrap_or_else(|| ErrorKind::Corrupt("btrfs receive ended before the stream did".to_owned()))),
            Err(error) => Err(ErrorKind::from_io(error)),
        }
    }

    fn end(&mut self) -> std::result::Result<(), ErrorKind> {
        drop(self.stdin.take());
        self.running.finish().map_err(|error| match error.stderr().trim().to_owned() {
            stderr if stderr.is_empty() => error.into_kind(),
            stderr => match error.into_kind() {
                ErrorKind::NoSpace => ErrorKind::NoSpace,
                _ => self.unfit(format!("btrfs receive does not take it: {stderr}")),
            },
        })
    }

    /// Waits for the end and checks what came: one subvolume, as large as announced where it can be otherwise.
    fn finish(mut self, incoming: &Path, base: Option<PathBuf>) -> std::result::Result<Arrived, ErrorKind> {
        let corrupt = |what: &str| ErrorKind::Corrupt(what.to_owned());
        let (Some(totals), true) = (parse_preamble(&self.preamble), self.reader.has_ended()) else {
            return Err(corrupt("the stream is truncated"));
        };
        self.end()?;
        let Some(header) = self.reader.header() else { return Err(corrupt("the stream has no beginning")) };
        let names: io::Result<Vec<_>> =
            fs::read_dir(incoming).and_then(|entries| entries.map(|entry| Ok(entry?.file_name())).collect());
        if names.map_err(ErrorKind::from_io)? != [TREE] {
            return Err(corrupt("the stream made something beside its subvolume"));
        }
        // Where the base is the very one that the sender has, only what changed came, and all else is not looked at.
        if header.parent.is_none() || header.parent.map(|(uuid, _)| uuid) != self.base {
            let counted = count(OPERATION, &incoming.join(TREE)).map_err(|error| error.kind)?;
            if counted != totals {
                return Err(self.unfit(format!(
                    "it has {} entries and {} bytes, where {} and {} were announced",
                    counted.entries, counted.logical_bytes, totals.entries, totals.logical_bytes
                )));
            }
        }
        let unchanged = match (self.reader.changes(), base) {
            (Changes::OnlyTimes(touched), Some(base)) => subvolume::are_as_before(touched, &base),
            _ => false,
        };
        Ok(Arrived { totals, unchanged, received: Some(header.uuid) })
    }
}

/// Reads what the kernel says of what arrived. `btrfs receive` names a subvolume after the sent one and makes it read-only
/// last.
fn header_of(tree: &Path, received: Option<Uuid>) -> std::result::Result<Header, Trouble> {
    let is_garbled = |probed: &std::result::Result<Header, Trouble>| match probed {
        Ok(header) => received.is_some_and(|received| received != header.uuid),
        Err(trouble) => received.is_some() && trouble.is_of_writable(),
    };
    let probed = subvolume::probe(tree);
    if is_garbled(&probed) {
        return Err(StreamError("the received subvolume is garbled: it was not finished".to_owned()).into());
    }
    probed
}

/// An open receive. A dropped future leaves the work whole in its thread: it ends by itself and clears its place away.
pub(super) struct BtrfsReceiving {
    intake: Intake<Work>,
}

/// The order of the fields is the order in which they go: first the program, last the volume is free.
struct Work {
    taker: Taker,
    stage: Stage,
    progress: Arc<Progress>,
    request: ReceiveRequest,
    pool: Arc<Pool>,
    _slot: Slot,
}

#[async_trait]
impl Receiving for BtrfsReceiving {
    async fn write(&mut self, chunk: Bytes) -> Result<()> {
        self.intake.write(chunk).await
    }

    async fn settle(&mut self) -> Result<()> {
        self.intake.settle().await
    }

    fn take_findings(&mut self) -> Vec<Finding> {
        match self.intake.work().map(|work| &mut work.taker) {
            Some(Taker::Tree(applier)) => applier.take_findings(),
            _ => Vec::new(),
        }
    }

    async fn commit(self: Box<Self>) -> Result<HeldSnapshot> {
        let work = self.intake.into_work().await?;
        run(OPERATION, move || work.commit()).await
    }

    async fn suspend(self: Box<Self>) -> Result<Option<ResumePoint>> {
        let work = self.intake.into_work().await?;
        run(OPERATION, move || {
            let Work { taker, stage, progress, .. } = work;
            drop(taker);
            match progress.kept() {
                Some(point) if is_suspended(stage.path()) => {
                    stage.keep();
                    Ok(Some(point))
                }
                _ => Ok(None),
            }
        })
        .await
    }
}

impl Work {
    fn take(&mut self, chunk: Bytes) -> Result<()> {
        self.progress.took(chunk.len());
        match &mut self.taker {
            Taker::Tree(applier) => applier.feed(chunk),
            Taker::Kernel(stream) => {
                let object = self.request.snapshot.id;
                stream.write(&chunk).map_err(|kind| Error::new(OPERATION, object, kind))
            }
        }
    }

    fn commit(self) -> Result<HeldSnapshot> {
        let Self { taker, stage, request, pool, _slot, .. } = self;
        let (volume, object) = (request.volume.id, request.snapshot.id);
        let key = SnapshotKey { volume, snapshot: object };
        let failed = |error: io::Error| Error::io(OPERATION, object, error);
        let incoming = stage.path().join("incoming");
        let tree = incoming.join(TREE);
        let arrived = match taker {
            Taker::Kernel(stream) => stream
                .finish(&incoming, request.base.map(|base| pool.tree_dir(base)))
                .map_err(|kind| Error::new(OPERATION, object, kind))?,
            Taker::Tree(applier) => {
                for finding in applier.finish()?.findings {
                    tracing::warn!(snapshot = %object, path = finding.path, "not kept: {}", finding.what);
                }
                pool.sync(OPERATION)?;
                subvolume::set_read_only(&tree, true)
                    .map_err(|error| Error::new(OPERATION, object, error.into_kind()))?;
                let unchanged = request.base.map_or(Ok(false), |base| pool.is_as(base, &tree))?;
                Arrived { totals: count(OPERATION, &tree)?, unchanged, received: None }
            }
        };
        // Receiving a subvolume changes it a last time; what is read now stays.
        pool.sync(OPERATION)?;
        let header = header_of(&tree, arrived.received).map_err(|error| error.into_error(OPERATION, object))?;
        let extends = pool.volume_dir(volume).exists();
        let parent = request.snapshot.parents.first().copied();
        let follows = request.base.is_some() && request.base.map(|base| base.snapshot) == parent;
        let stored = StoredSnapshot {
            sequence: if extends { pool.next_sequence(OPERATION, volume)? } else { 1 },
            unchanged: arrived.unchanged && follows,
            logical_bytes: arrived.totals.logical_bytes,
            entries: arrived.totals.entries,
            identity: header.uuid,
            ctransid: header.ctransid,
            snapshot: request.snapshot.clone(),
        };
        stored.write(&incoming).map_err(failed)?;
        if extends {
            let head = pool.head_to_replace(OPERATION, volume)?;
            pool.sync(OPERATION)?;
            fault::point("btrfs.receive.before-publish");
            let publishing = pool.publishing();
            // Head first: a replica without a head is as its newest snapshot, whichever that is.
            let trashed = head.then(|| pool.trash(OPERATION, &pool.head_dir(volume))).transpose()?;
            fault::point("btrfs.receive.head-trashed");
            let change = pool.published.change(volume);
            stage.publish(OPERATION, "incoming", &pool.snapshot_dir(key))?;
            change.added(&pool.snapshots_dir(volume), &stored);
            drop(publishing);
            fault::point("btrfs.receive.published");
            if let Some(trashed) = trashed {
                pool.delete_trashed(trashed);
            }
        } else {
            let new = stage.path().join("volume");
            lay_out_volume(&new, &request.volume).map_err(failed)?;
            fs::rename(&incoming, new.join("snapshots").join(object.to_string())).map_err(failed)?;
            pool.sync(OPERATION)?;
            fault::point("btrfs.receive.before-publish");
            let _publishing = pool.publishing();
            stage.publish(OPERATION, "volume", &pool.volume_dir(volume))?;
            fault::point("btrfs.receive.published");
        }
        Ok(stored.held(volume))
    }
}
