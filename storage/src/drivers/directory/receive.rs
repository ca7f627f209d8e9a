//! Taking in a delta: the base's tree is linked into staging, the stream is applied to it, one rename publishes it.
//!
//! A receive lies in `staging/receive-<volume>-<snapshot>/`: `snapshot/` becomes the snapshot, `receive.json` says where
//! it can go on. It has that record from its first checkpoint on; without one it is cleared away at the next open.
//!
//! | state | dropped or failed | `suspend` | killed, then opened |
//! |---|---|---|---|
//! | before the first checkpoint | cleared away | cleared away | cleared away |
//! | after a checkpoint | cleared away | kept | kept, as of the checkpoint |
//! | published | – | – | the rest is cleared away |

use std::{
    fs::{self, File},
    io,
    os::fd::AsFd as _,
    path::Path,
    sync::Arc,
};

use async_trait::async_trait;
use bytes::Bytes;
use rustix::fs::OFlags;

use super::{
    catalog::{StoredSnapshot, check_record, lay_out_volume, refuse_blocked},
    head::logical_bytes,
    pool::{Pool, Stage},
    run,
    verify::digest,
};
use crate::{
    delta::{DeltaFormat, Partial, ReceiveRequest, Receiving, ResumePoint},
    driver::{Finding, Target},
    drivers::{
        folder::make_dir,
        intake::Intake,
        partial::{self, Progress},
        published::{Histories, Record},
    },
    error::{Blockers, Error, ErrorKind, Result},
    fault,
    model::{HeadState, HeldSnapshot, Role, SnapshotKey, VolumeId},
    tree::{
        apply::{Applier, Sharing},
        arrivals::{Arrivals, Sight},
        copy::Copier,
        data::is_without_holes,
        entry::{Entry, EntryKind},
        inventory::{InventoryEntry, InventoryReader, InventoryWriter},
        received::{Met, ReceivedWalk},
        root::Root,
        walk::{Attributes, Links, Motion, Walk},
    },
};

const OPERATION: &str = "receive snapshot";

/// Where in its place a receive's files arrive.
const TREE: &str = "snapshot/tree";

/// Tells whether a place in staging is a receive that can go on; takes back what its commit had begun.
pub(super) fn is_suspended(path: &Path) -> bool {
    if let Err(error) = partial::take_back(path, "snapshot") {
        tracing::warn!(path = %path.display(), %error, "a receive cannot go on");
        return false;
    }
    partial::read(path, TREE).is_ok()
}

impl Pool {
    pub(super) fn partial(&self, volume: VolumeId) -> Result<Option<Partial>> {
        if self.receiving().contains(&volume) {
            return Ok(None);
        }
        partial::find(&self.staging_dir(), volume, TREE)
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

    pub(super) fn receive(self: &Arc<Self>, request: ReceiveRequest) -> Result<DirectoryReceiving> {
        let volume = request.volume.id;
        if request.format != DeltaFormat::tree() {
            let why = ErrorKind::Unsupported(format!("the delta format {} is not known here", request.format));
            return Err(Error::new(OPERATION, request.snapshot.id, why));
        }
        check_record(OPERATION, &request.volume)?;
        let slot = Slot::take(self, volume)?;
        if self.volume_dir(volume).exists() {
            self.volume(OPERATION, volume)?;
            if self.snapshot_dir(SnapshotKey { volume, snapshot: request.snapshot.id }).exists() {
                return Err(Error::new(OPERATION, request.snapshot.id, ErrorKind::AlreadyExists));
            }
        }
        if let Some(base) = request.base {
            self.stored(OPERATION, base)?;
        }
        let (stage, taken_before, sight) = match &request.resume {
            Some(point) => {
                let (stage, taken_before) = self.stage_again(&request, point)?;
                (stage, taken_before, Sight::Rest)
            }
            None => (self.stage_anew(&request)?, 0, Sight::Whole),
        };
        let progress = Progress::new(taken_before, request.resume.clone());
        let base = request.base.map(|base| Root::open(self.tree_dir(base))).transpose()?;
        // Without a base there is nothing that the staged files could share.
        let sharing = if base.is_some() { Sharing::HardLinked } else { Sharing::Exclusive };
        let tree = Root::open(stage.path().join(TREE))?;
        let written_by = tree.try_clone()?;
        let on_checkpoint = progress.recorder(&request, stage.path(), "directory.receive.checkpoint");
        let applier = Applier::new(tree, base, sharing, request.resume.clone(), Some(on_checkpoint))?
            .noting(Arrivals::begin(stage.path(), sight)?);
        fault::point("directory.receive.opened");
        let work = Work { applier, written_by, stage, request, progress, pool: Arc::clone(self), _slot: slot };
        Ok(DirectoryReceiving { intake: Intake::new(OPERATION, work, Work::take) })
    }

    fn stage_anew(self: &Arc<Self>, request: &ReceiveRequest) -> Result<Stage> {
        self.clear_partials(request.volume.id)?;
        let stage = self.stage_at(OPERATION, self.receive_dir(request.volume.id, request.snapshot.id))?;
        let tree = stage.path().join(TREE);
        make_dir(&stage.path().join("snapshot"))
            .and_then(|()| make_dir(&tree))
            .map_err(|error| Error::io(OPERATION, tree.display(), error))?;
        if let Some(base) = request.base {
            self.link_tree(base, &tree)?;
        }
        Ok(stage)
    }

    fn stage_again(self: &Arc<Self>, request: &ReceiveRequest, point: &ResumePoint) -> Result<(Stage, u64)> {
        if let Some(base) = request.base {
            self.refuse_tampered(OPERATION, base)?;
        }
        let path = self.receive_dir(request.volume.id, request.snapshot.id);
        let received_bytes = partial::check(&path, TREE, request, point)?;
        partial::clear_beside(&path.join(TREE)).map_err(|error| Error::io(OPERATION, path.display(), error))?;
        Ok((self.stage_found(path), received_bytes))
    }

    /// Makes a tree whose files are those of a snapshot, by hard links. One that somebody changed is refused: each entry is
    /// held against the inventory before it is linked.
    fn link_tree(&self, from: SnapshotKey, to: &Path) -> Result<()> {
        let source = Root::open(self.tree_dir(from))?;
        let mut copier = Copier::new(Root::open(to)?);
        for entry in self.witnessed(OPERATION, from)? {
            let entry = entry?;
            let linkable = !matches!(entry.kind, EntryKind::Directory | EntryKind::HardLink { .. });
            if linkable {
                copier.link(&source, &entry)?;
            } else {
                copier.copy(&source, &entry)?;
            }
        }
        copier.finish()?;
        Ok(())
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

/// An open receive. A dropped future leaves the work whole in its thread: it ends by itself and clears its place away.
pub(super) struct DirectoryReceiving {
    intake: Intake<Work>,
}

/// The order of the fields is the order in which they go: first the files are closed, last the volume is free.
struct Work {
    applier: Applier,
    /// The tree's root, to sync by.
    written_by: Root,
    stage: Stage,
    request: ReceiveRequest,
    progress: Arc<Progress>,
    pool: Arc<Pool>,
    _slot: Slot,
}

#[async_trait]
impl Receiving for DirectoryReceiving {
    async fn write(&mut self, chunk: Bytes) -> Result<()> {
        self.intake.write(chunk).await
    }

    async fn settle(&mut self) -> Result<()> {
        self.intake.settle().await
    }

    fn take_findings(&mut self) -> Vec<Finding> {
        self.intake.work().map(|work| work.applier.take_findings()).unwrap_or_default()
    }

    async fn commit(self: Box<Self>) -> Result<HeldSnapshot> {
        let work = self.intake.into_work().await?;
        run(OPERATION, move || work.commit()).await
    }

    async fn suspend(self: Box<Self>) -> Result<Option<ResumePoint>> {
        let work = self.intake.into_work().await?;
        run(OPERATION, move || {
            let Work { applier, stage, progress, .. } = work;
            // What was begun may still be kept.
            drop(applier);
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
        self.applier.feed(chunk)
    }

    fn commit(self) -> Result<HeldSnapshot> {
        let Self { applier, written_by, stage, request, pool, _slot, .. } = self;
        let volume = request.volume.id;
        let key = SnapshotKey { volume, snapshot: request.snapshot.id };
        let failed = |error: io::Error| Error::io(OPERATION, request.snapshot.id, error);
        let arrivals = applier.complete()?.arrivals;
        let arrivals = arrivals.map_or_else(|| Arrivals::begin(stage.path(), Sight::Rest), Ok)?;
        let dir = stage.path().join("snapshot");
        let base = request.base.map(|base| InventoryReader::open(&pool.inventory_path(base))).transpose()?;
        let (logical_bytes, changed) = write_inventory(&dir, base, arrivals)?;
        let extends = pool.volume_dir(volume).exists();
        let parent = request.snapshot.parents.first().copied();
        let stored = StoredSnapshot {
            sequence: if extends { pool.next_sequence(OPERATION, volume)? } else { 1 },
            unchanged: !changed && request.base.is_some() && request.base.map(|base| base.snapshot) == parent,
            logical_bytes,
            snapshot: request.snapshot.clone(),
        };
        stored.stage(&dir).map_err(failed)?;
        if extends {
            let head = pool.head_to_replace(volume)?;
            written_by.sync()?;
            fault::point("directory.receive.before-publish");
            let publishing = pool.publishing();
            // Head first: a replica without a head is as its newest snapshot, whichever that is.
            let trashed = head.then(|| pool.trash(OPERATION, &pool.head_dir(volume))).transpose()?;
            fault::point("directory.receive.head-trashed");
            let change = pool.published.change(volume);
            stage.publish(OPERATION, "snapshot", &pool.snapshot_dir(key))?;
            change.added(&pool.snapshots_dir(volume), &stored);
            drop(publishing);
            fault::point("directory.receive.published");
            if let Some(trashed) = trashed {
                pool.delete_trashed(trashed);
            }
        } else {
            let new = stage.path().join("volume");
            lay_out_volume(&new, &request.volume).map_err(failed)?;
            fs::rename(&dir, new.join("snapshots").join(request.snapshot.id.to_string())).map_err(failed)?;
            written_by.sync()?;
            fault::point("directory.receive.before-publish");
            let _publishing = pool.publishing();
            stage.publish(OPERATION, "volume", &pool.volume_dir(volume))?;
            fault::point("directory.receive.published");
        }
        Ok(stored.held(volume))
    }
}

impl Pool {
    /// Tells whether the volume's head makes way for a received snapshot: a replica's does, when nobody changed it.
    fn head_to_replace(&self, volume: VolumeId) -> Result<bool> {
        let record = self.volume(OPERATION, volume)?;
        if record.role == Role::Primary || !self.head_dir(volume).exists() {
            return Ok(false);
        }
        let in_use = self.attached().get(&Target::Head(volume)).is_some_and(|attachment| attachment.serves.is_none());
        refuse_blocked(OPERATION, volume, Blockers { attached: in_use, ..Blockers::default() })?;
        match self.head_state(volume)? {
            HeadState::Clean => Ok(true),
            HeadState::Dirty => {
                let why = "the replica's head has changes that no snapshot holds; take a snapshot of it first";
                Err(Error::new(OPERATION, volume, ErrorKind::Unsupported(why.to_owned())))
            }
        }
    }
}

/// Writes the inventory of a received tree; returns the bytes of its files, and whether it differs from its base. Files
/// of one tree share an inode only within their group, so the inodes tell the groups, however many other snapshots link
/// to them; and a file that the delta left alone has the base's inode, and so its attributes and contents. Of what was
/// written everything is known but what came before a break; only that is read.
fn write_inventory(dir: &Path, base: Option<InventoryReader>, arrivals: Arrivals) -> Result<(u64, bool)> {
    let (mut bytes, mut changed) = (0, false);
    let arrived = arrivals.into_known()?;
    let links = match base {
        Some(base) => Links::Linked(Box::new(base), arrived.further_names()),
        None => Links::ByInode,
    };
    let tree = Root::open(dir.join("tree"))?;
    let mut received = ReceivedWalk::new(Walk::with(tree, links, Motion::Still, Attributes::OnDemand), arrived);
    let mut writer = InventoryWriter::create(&dir.join("inventory"))?;
    while let Some(met) = received.meet()? {
        let (mut entry, facts) = match met {
            Met::Entry(entry, facts) => (entry, facts),
            Met::AsItArrived { size } => {
                received.note(&mut writer)?;
                bytes += size;
                // It was written, so it has an inode that the base has not.
                changed = true;
                continue;
            }
        };
        let walk = &mut received.walk;
        let is_kept =
            |record: &&InventoryEntry| entry.kind != EntryKind::Directory && entry.stat.ino == record.entry.stat.ino;
        let kept = walk.recorded().filter(is_kept).map(|record| (record.entry.xattrs.clone(), record.digest));
        let (xattrs, digest) = match (facts, kept) {
            (Some(facts), _) => (facts.xattrs, facts.digest),
            (None, Some((xattrs, digest))) => (Some(xattrs), digest),
            (None, None) => (None, None),
        };
        match xattrs {
            Some(xattrs) => entry.xattrs = xattrs,
            None => walk.load_attributes(&mut entry)?,
        }
        let mut item = InventoryEntry { entry, origin: None, digest };
        match walk.recorded() {
            Some(record) => {
                let is_other = item.entry.kind != EntryKind::Directory && item.entry.stat.ino != record.entry.stat.ino;
                changed |=
                    is_other || !item.entry.has_metadata_of(&record.entry) || item.entry.kind != record.entry.kind;
            }
            None => {
                changed = true;
                item.digest = item.digest.map_or_else(|| read_again(walk, &item.entry), |digest| Ok(Some(digest)))?;
            }
        }
        bytes += logical_bytes(&item.entry.kind);
        writer.add(item)?;
    }
    writer.finish()?;
    Ok((bytes, changed || received.walk.lacks_some()))
}

/// Hashes a file that came before a break, unless it has holes: then it may be huge.
fn read_again(walk: &mut Walk, entry: &Entry) -> Result<Option<[u8; 32]>> {
    let EntryKind::File { size } = entry.kind else { return Ok(None) };
    match walk.open_last(OFlags::RDONLY | OFlags::NONBLOCK) {
        Ok(file) => {
            let failed = |error| Error::io("read", entry.path.to_string(), error);
            if !is_without_holes(file.as_fd(), size).map_err(|error| failed(error.into()))? {
                return Ok(None);
            }
            digest(File::from(file)).map(Some).map_err(failed)
        }
        // Its mode may keep even its owner from reading it.
        Err(error) if matches!(error.kind, ErrorKind::PermissionDenied) => Ok(None),
        Err(error) => Err(error),
    }
}
