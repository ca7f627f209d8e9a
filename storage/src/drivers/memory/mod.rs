//! The memory driver: pools of this process, for the simulation of several nodes and for tests of what is above drivers.
//!
//! # Participants
//! `pool` keeps the durable part apart from the session that a crash takes away; `tree` is what a volume holds, and the
//! driver's own delta; `folder` makes trees appear as files, for `attach` and for the portable format.
//! # What it can and cannot
//! Everything of the contract; `memory:NAME` is the same pool until the process ends. Owners, extended attributes, fifos and devices
//! are not kept. Each step on a durable thing lies between two pauses, which a simulation chooses, and two fault points:
//! `memory.VERB.before` and `memory.VERB.after`. A receive keeps a durable point to go on from every 16 KiB.
//! # Non-goals
//! Anybody's data: the build of a release does not have it.

use std::{path::PathBuf, sync::Arc};

use async_trait::async_trait;
use bytes::Bytes;

mod folder;
mod pool;
mod receive;
mod tree;

pub use self::pool::{MemoryPool, Sight, VolumeSight};
use self::{
    folder::Folder,
    pool::{Attached, Disk, Open, Session, Stored, Volume, locked},
};
use super::PoolSpec;
use crate::{
    delta::{Compare, DeltaFormat, DeltaReader, DeltaRequest, Partial, ReceiveRequest, Receiving, ResumePoint},
    driver::{Access, Capabilities, Driver, Finding, Scan, SnapshotReport, SnapshotRequest, Target, Usage},
    error::{Blockers, Error, ErrorKind, Result},
    fault,
    model::{HeadState, HeldSnapshot, Lineage, Role, SnapshotKey, VolumeId, VolumeRecord, check_metadata},
    simulation,
};

/// The driver's name before the colon of a pool.
pub const NAME: &str = "memory";
/// The driver's own delta format.
pub const FORMAT: &str = "flocker-memory/1";
/// Behind a pool's name: it neither reads nor writes the driver's own format.
const PORTABLE: &str = ",portable";
/// The size of a chunk of the driver's own delta.
const CHUNK: usize = 16 * 1024;
/// All pools are this large.
const POOL_BYTES: u64 = 1 << 40;

/// Every fault point of this driver (see [`crate::fault`]).
pub const FAULT_POINTS: &[&str] = &[
    "memory.create.before",
    "memory.create.after",
    "memory.set-record.before",
    "memory.set-record.after",
    "memory.destroy.before",
    "memory.destroy.after",
    "memory.snapshot.before",
    "memory.snapshot.after",
    "memory.forget.before",
    "memory.forget.after",
    "memory.rewind.before",
    "memory.rewind.after",
    "memory.split.before",
    "memory.split.after",
    "memory.clone.before",
    "memory.clone.after",
    "memory.receive.checkpoint",
    "memory.receive.before",
    "memory.receive.after",
];

/// An open pool in memory.
pub struct MemoryDriver {
    pool: Arc<MemoryPool>,
    session: Arc<Session>,
    capabilities: Capabilities,
}

impl MemoryDriver {
    /// Opens a pool; see [`super::open`].
    pub async fn open(spec: &PoolSpec) -> Result<Self> {
        let (name, portable) = match spec.place().strip_suffix(PORTABLE) {
            Some(name) => (name, true),
            None => (spec.place(), false),
        };
        let pool = MemoryPool::named(name);
        let session = pool.open(name)?;
        let own = (!portable).then(|| DeltaFormat(FORMAT.to_owned()));
        let formats: Vec<_> = own.into_iter().chain([DeltaFormat::tree()]).collect();
        let capabilities = Capabilities {
            driver: NAME.to_owned(),
            pool: spec.place().to_owned(),
            reads: formats.clone(),
            formats,
            group_atomic: true,
            quota: false,
            facts: [("durable".to_owned(), "no".to_owned())].into(),
        };
        Ok(Self { pool, session, capabilities })
    }

    /// Does one step on the pool, which takes its time. After a crash it never comes to an end.
    async fn step<T>(&self, work: impl FnOnce(&mut Disk, &mut Open) -> Result<T> + Send) -> Result<T> {
        self.wait().await;
        let done = self.now(work);
        self.wait().await;
        done
    }

    /// A step that changes the pool: one that a crash may come before or after.
    async fn change<T>(
        &self,
        points: (&str, &str),
        work: impl FnOnce(&mut Disk, &mut Open) -> Result<T> + Send,
    ) -> Result<T> {
        self.wait().await;
        fault::point(points.0);
        let done = self.now(work);
        fault::point(points.1);
        self.wait().await;
        done
    }

    async fn wait(&self) {
        simulation::pause().await;
        if self.session.is_over() {
            std::future::pending::<()>().await;
        }
    }

    fn now<T>(&self, work: impl FnOnce(&mut Disk, &mut Open) -> Result<T>) -> Result<T> {
        let mut disk = locked(&self.pool.disk);
        let mut open = locked(&self.session.open);
        open.absorb();
        work(&mut disk, &mut open)
    }
}

impl Drop for MemoryDriver {
    fn drop(&mut self) {
        self.pool.close(&self.session);
    }
}

fn unsupported(operation: &'static str, object: impl std::fmt::Display, why: &str) -> Error {
    Error::new(operation, object, ErrorKind::Unsupported(why.to_owned()))
}

fn check_record(operation: &'static str, record: &VolumeRecord) -> Result<()> {
    if record.quota_bytes.is_some() {
        return Err(unsupported(operation, &record.name, "it has no quotas"));
    }
    check_metadata(&record.metadata).map_err(|error| unsupported(operation, &record.name, &error.to_string()))
}

fn refuse_blocked(operation: &'static str, object: impl std::fmt::Display, blockers: Blockers) -> Result<()> {
    match blockers.is_empty() {
        true => Ok(()),
        false => Err(Error::new(operation, object, ErrorKind::Blocked(blockers))),
    }
}

impl Disk {
    fn refuse_taken(&self, operation: &'static str, record: &VolumeRecord) -> Result<()> {
        match self.volumes.contains_key(&record.id) {
            true => Err(Error::new(operation, record.id, ErrorKind::AlreadyExists)),
            false => check_record(operation, record),
        }
    }

    fn clones_of(&self, depends: impl Fn(SnapshotKey) -> bool) -> Vec<VolumeId> {
        let records = self.volumes.values().map(|volume| &volume.record);
        records.filter(|record| record.origin.is_some_and(&depends)).map(|record| record.id).collect()
    }

    fn take_snapshot(&mut self, open: &Open, request: &SnapshotRequest) -> Result<SnapshotReport> {
        const OPERATION: &str = "take snapshot of";
        let tree = self.head(open, request.volume)?;
        let tip = self.tip(request.volume);
        let parent = request.snapshot.parents.first().copied();
        let unchanged = tip.is_some_and(|tip| Some(tip.held.snapshot.id) == parent && tip.tree == tree);
        let held = HeldSnapshot {
            snapshot: request.snapshot.clone(),
            volume: request.volume,
            unchanged,
            logical_bytes: tree.logical_bytes(),
        };
        let volume = self.volumes.get_mut(&request.volume);
        let volume = volume.ok_or_else(|| Error::new(OPERATION, request.volume, ErrorKind::NotFound))?;
        volume.snapshots.push(Stored { held: held.clone(), tree });
        Ok(SnapshotReport { held, warnings: Vec::new() })
    }

    fn split(&mut self, keep: SnapshotKey, fork: &VolumeRecord, head: tree::Tree) {
        let Some(old) = self.volumes.get_mut(&keep.volume) else { return };
        let at = old.snapshots.iter().position(|stored| stored.held.snapshot.id == keep.snapshot);
        let mut moved = old.snapshots.split_off(at.map_or(0, |at| at + 1));
        old.head = None;
        for stored in &mut moved {
            stored.held.volume = fork.id;
        }
        for volume in self.volumes.values_mut() {
            let origin = volume.record.origin.filter(|origin| origin.volume == keep.volume);
            if let Some(origin) = origin
                && moved.iter().any(|stored| stored.held.snapshot.id == origin.snapshot)
            {
                volume.record.origin = Some(SnapshotKey { volume: fork.id, ..origin });
            }
        }
        self.volumes.insert(fork.id, Volume { record: fork.clone(), head: Some(head), snapshots: moved });
    }
}

impl Open {
    fn is_attached(&self, snapshot: impl Fn(SnapshotKey) -> bool, head: Option<VolumeId>) -> bool {
        self.attached.iter().any(|(target, attached)| {
            let by_target = match *target {
                Target::Head(volume) => head == Some(volume),
                Target::Snapshot(volume, id) => snapshot(SnapshotKey { volume, snapshot: id }),
            };
            by_target || attached.serves.is_some_and(&snapshot)
        })
    }
}

#[async_trait]
impl Driver for MemoryDriver {
    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    async fn usage(&self) -> Result<Usage> {
        let used = |disk: &mut Disk, _: &mut Open| {
            let stored = disk.volumes.values().flat_map(|volume| &volume.snapshots);
            Ok(stored.map(|stored| stored.held.logical_bytes).sum::<u64>())
        };
        let used = self.step(used).await?;
        Ok(Usage { total_bytes: POOL_BYTES, available_bytes: POOL_BYTES.saturating_sub(used) })
    }

    async fn scan(&self) -> Result<Scan> {
        self.step(|disk, _| {
            let volumes = disk.volumes.values().map(|volume| {
                (volume.record.clone(), volume.snapshots.iter().map(|stored| stored.held.clone()).collect())
            });
            Ok(Scan { volumes: volumes.collect(), orphans: Vec::new() })
        })
        .await
    }

    async fn create(&self, record: &VolumeRecord) -> Result<()> {
        self.change(("memory.create.before", "memory.create.after"), |disk, _| {
            disk.refuse_taken("create volume", record)?;
            let volume = Volume { record: record.clone(), head: None, snapshots: Vec::new() };
            disk.volumes.insert(record.id, volume);
            Ok(())
        })
        .await
    }

    async fn set_record(&self, record: &VolumeRecord) -> Result<()> {
        self.change(("memory.set-record.before", "memory.set-record.after"), |disk, _| {
            check_record("write record of", record)?;
            let volume = disk.volumes.get_mut(&record.id);
            let volume = volume.ok_or_else(|| Error::new("write record of", record.id, ErrorKind::NotFound))?;
            volume.record = record.clone();
            Ok(())
        })
        .await
    }

    async fn destroy(&self, volume: VolumeId) -> Result<()> {
        self.change(("memory.destroy.before", "memory.destroy.after"), |disk, open| {
            disk.volume("destroy volume", volume)?;
            let clones = disk.clones_of(|origin| origin.volume == volume);
            let attached = open.is_attached(|key| key.volume == volume, Some(volume));
            refuse_blocked("destroy volume", volume, Blockers { newer: Vec::new(), clones, attached })?;
            disk.volumes.remove(&volume);
            open.heads.remove(&volume);
            if !open.receiving.contains(&volume) {
                disk.partials.remove(&volume);
            }
            Ok(())
        })
        .await
    }

    async fn snapshot(&self, requests: &[SnapshotRequest]) -> Result<Vec<SnapshotReport>> {
        self.change(("memory.snapshot.before", "memory.snapshot.after"), |disk, open| {
            const OPERATION: &str = "take snapshot of";
            for request in requests {
                let volume = disk.volume(OPERATION, request.volume)?;
                if volume.snapshots.iter().any(|stored| stored.held.snapshot.id == request.snapshot.id) {
                    return Err(Error::new(OPERATION, request.snapshot.id, ErrorKind::AlreadyExists));
                }
            }
            let taken = requests.iter().map(|request| disk.take_snapshot(open, request)).collect();
            disk.sync(open);
            if fault::is_put_back("a-snapshot-is-acknowledged-before-it-is-durable") {
                let keys = requests.iter().map(|it| SnapshotKey { volume: it.volume, snapshot: it.snapshot.id });
                open.not_durable.extend(keys);
            }
            taken
        })
        .await
    }

    async fn forget(&self, snapshot: SnapshotKey) -> Result<()> {
        self.change(("memory.forget.before", "memory.forget.after"), |disk, open| {
            disk.stored("forget snapshot", snapshot)?;
            let clones = disk.clones_of(|origin| origin == snapshot);
            let attached = open.is_attached(|served| served == snapshot, None);
            refuse_blocked("forget snapshot", snapshot.snapshot, Blockers { newer: Vec::new(), clones, attached })?;
            let head = disk.head(open, snapshot.volume)?;
            if let Some(volume) = disk.volumes.get_mut(&snapshot.volume) {
                // A primary's head must not lose its contents with its newest snapshot; a replica's follows.
                if volume.record.role == Role::Primary {
                    volume.head = Some(head);
                    open.heads.remove(&snapshot.volume);
                }
                volume.snapshots.retain(|stored| stored.held.snapshot.id != snapshot.snapshot);
            }
            Ok(())
        })
        .await
    }

    async fn rewind(&self, snapshot: SnapshotKey) -> Result<()> {
        self.change(("memory.rewind.before", "memory.rewind.after"), |disk, open| {
            const OPERATION: &str = "rewind to snapshot";
            disk.stored(OPERATION, snapshot)?;
            let own = disk.volume(OPERATION, snapshot.volume)?.snapshots.iter();
            let newer = own.skip_while(|stored| stored.held.snapshot.id != snapshot.snapshot).skip(1);
            let newer = newer.map(|stored| stored.held.snapshot.id).collect();
            let attached = open.attached.contains_key(&Target::Head(snapshot.volume));
            refuse_blocked(OPERATION, snapshot.snapshot, Blockers { newer, clones: Vec::new(), attached })?;
            open.heads.remove(&snapshot.volume);
            if let Some(volume) = disk.volumes.get_mut(&snapshot.volume) {
                volume.head = None;
            }
            Ok(())
        })
        .await
    }

    async fn split(&self, keep: SnapshotKey, fork: &VolumeRecord) -> Result<()> {
        self.change(("memory.split.before", "memory.split.after"), |disk, open| {
            const OPERATION: &str = "split volume";
            disk.refuse_taken(OPERATION, fork)?;
            if fork.origin != Some(keep) {
                return Err(unsupported(OPERATION, keep.volume, "the fork's origin must be the snapshot that is kept"));
            }
            disk.stored(OPERATION, keep)?;
            let attached = open.is_attached(|key| key.volume == keep.volume, Some(keep.volume));
            refuse_blocked(OPERATION, keep.volume, Blockers { attached, ..Blockers::default() })?;
            let head = disk.head(open, keep.volume)?;
            open.heads.remove(&keep.volume);
            disk.split(keep, fork, head);
            Ok(())
        })
        .await
    }

    async fn clone_from(&self, record: &VolumeRecord) -> Result<()> {
        self.change(("memory.clone.before", "memory.clone.after"), |disk, _| {
            const OPERATION: &str = "clone volume";
            disk.refuse_taken(OPERATION, record)?;
            let origin = record.origin;
            let origin = origin.ok_or_else(|| unsupported(OPERATION, &record.name, "its record names no origin"))?;
            disk.stored(OPERATION, origin)?;
            let volume = Volume { record: record.clone(), head: None, snapshots: Vec::new() };
            disk.volumes.insert(record.id, volume);
            Ok(())
        })
        .await
    }

    async fn attach(&self, target: Target, access: Access) -> Result<PathBuf> {
        self.step(|disk, open| {
            const OPERATION: &str = "attach";
            let (tree, serves) = match target {
                Target::Snapshot(volume, snapshot) => {
                    let key = SnapshotKey { volume, snapshot };
                    let tree = disk.stored(OPERATION, key)?.tree.clone();
                    if access == Access::ReadWrite {
                        return Err(unsupported(OPERATION, snapshot, "a snapshot is read-only; clone it to write"));
                    }
                    (tree, Some(key))
                }
                Target::Head(volume) => {
                    let as_newest = disk.volume(OPERATION, volume)?.head.is_none() && !open.heads.contains_key(&volume);
                    let serves = disk.tip(volume).map(|tip| tip.held.key());
                    (disk.head(open, volume)?, serves.filter(|_| as_newest && access == Access::ReadOnly))
                }
            };
            let known = open.attached.get_mut(&target).filter(|known| known.serves == serves);
            if let Some(known) = known {
                if access == Access::ReadWrite {
                    known.access = access;
                }
                return Ok(known.folder.path().join("tree"));
            }
            let folder = Folder::new().map_err(|error| Error::io(OPERATION, "folder", error))?;
            let path = folder.path().join("tree");
            folder::export(&tree, &path).map_err(|error| Error::io(OPERATION, path.display(), error))?;
            open.attached.insert(target, Attached { access, folder, serves });
            Ok(path)
        })
        .await
    }

    async fn detach(&self, target: Target) -> Result<()> {
        self.step(|_, open| {
            open.attached.remove(&target);
            Ok(())
        })
        .await
    }

    async fn lineage(&self, volume: VolumeId) -> Result<Lineage> {
        #[cfg(feature = "simulation")]
        crate::simulation::noted("lineage");
        self.step(|disk, _| {
            let mut newest_first = Vec::new();
            let (mut at, mut until) = (disk.volume("read lineage of", volume)?, None);
            loop {
                let own = at.snapshots.iter().map(|stored| stored.held.clone()).rev();
                newest_first.extend(own.skip_while(|held| until.is_some_and(|until| held.snapshot.id != until)));
                let Some(origin) = at.record.origin else { break };
                let Some(next) = disk.volumes.get(&origin.volume) else { break };
                (at, until) = (next, Some(origin.snapshot));
            }
            newest_first.reverse();
            Ok(Lineage { snapshots: newest_first })
        })
        .await
    }

    async fn head_state(&self, volume: VolumeId) -> Result<HeadState> {
        self.step(|disk, open| {
            disk.volume("compare head of", volume)?;
            Ok(if disk.is_clean(open, volume)? { HeadState::Clean } else { HeadState::Dirty })
        })
        .await
    }

    async fn verify(&self, snapshot: SnapshotKey, _compare: Compare) -> Result<Vec<Finding>> {
        self.step(|disk, _| disk.stored("verify snapshot", snapshot).map(|_| Vec::new())).await
    }

    async fn estimate_delta(&self, request: DeltaRequest) -> Result<Option<u64>> {
        let chunks = self.step(|disk, _| read_delta(disk, &self.capabilities, &request)).await?;
        Ok(Some(chunks.iter().map(|chunk| chunk.len() as u64).sum()))
    }

    async fn read_delta(&self, request: DeltaRequest) -> Result<Box<dyn DeltaReader>> {
        let chunks = self.step(|disk, _| read_delta(disk, &self.capabilities, &request)).await?;
        Ok(Box::new(Reader { chunks: chunks.into_iter(), session: self.session.clone() }))
    }

    async fn receive(&self, request: ReceiveRequest) -> Result<Box<dyn Receiving>> {
        let known = self.capabilities.reads.contains(&request.format);
        let taken = self.step(|disk, open| receive::start(disk, open, &request, known)).await?;
        Ok(Box::new(receive::MemoryReceiving::new(self.pool.clone(), self.session.clone(), request, taken)))
    }

    async fn partial(&self, volume: VolumeId) -> Result<Option<Partial>> {
        self.step(|disk, open| {
            let partial = disk.partials.get(&volume).map(|(partial, _)| partial.clone());
            Ok(partial.filter(|_| !open.receiving.contains(&volume)))
        })
        .await
    }

    async fn discard_partial(&self, volume: VolumeId) -> Result<()> {
        self.step(|disk, open| {
            if open.receiving.contains(&volume) {
                return Err(unsupported("discard a partial receive of", volume, receive::IS_OPEN));
            }
            disk.partials.remove(&volume);
            Ok(())
        })
        .await
    }
}

fn read_delta(disk: &Disk, capabilities: &Capabilities, request: &DeltaRequest) -> Result<Vec<Bytes>> {
    const OPERATION: &str = "read delta of";
    let DeltaRequest { base, target, format, compare, resume } = request;
    if !capabilities.formats.contains(format) {
        return Err(unsupported(OPERATION, target.snapshot, "the delta format is not known here"));
    }
    let base = base.map(|base| disk.stored(OPERATION, base)).transpose()?.map(|stored| &stored.tree);
    let target = disk.stored(OPERATION, *target)?;
    if *format == DeltaFormat::tree() {
        return folder::write_portable(base, &target.tree, *compare, resume.as_ref());
    }
    let stream = tree::write(base, &target.tree);
    let from = match resume {
        Some(ResumePoint(point)) => receive::offset(point).filter(|offset| *offset <= stream.len()),
        None => Some(0),
    };
    let stale = || ErrorKind::ResumeStale("it lies behind the stream's end".to_owned());
    let from = from.ok_or_else(|| Error::new(OPERATION, target.held.snapshot.id, stale()))?;
    Ok(stream[from..].chunks(CHUNK).map(Bytes::copy_from_slice).collect())
}

/// A delta that was written whole before it is read.
struct Reader {
    chunks: std::vec::IntoIter<Bytes>,
    session: Arc<Session>,
}

#[async_trait]
impl DeltaReader for Reader {
    async fn next(&mut self) -> Result<Option<Bytes>> {
        simulation::pause().await;
        if self.session.is_over() {
            std::future::pending::<()>().await;
        }
        Ok(self.chunks.next())
    }
}
