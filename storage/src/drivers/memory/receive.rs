//! A receive into a pool in memory: bytes are kept as they come, and become a tree at the commit.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;

use super::{
    folder,
    pool::{Disk, MemoryPool, Open, Session, Stored, Volume, locked},
    refuse_blocked, tree, unsupported,
};
use crate::{
    delta::{DeltaFormat, Partial, ReceiveRequest, Receiving, ResumePoint},
    driver::Target,
    error::{Blockers, Error, ErrorKind, Result},
    fault,
    model::{HeldSnapshot, Role},
    simulation,
};

const OPERATION: &str = "receive snapshot";
pub(super) const IS_OPEN: &str = "another receive for this volume is open";
/// How many bytes lie between two points to go on from.
const CHECKPOINT: usize = 16 * 1024;

/// Reads how far a receive was.
pub(super) fn offset(point: &[u8]) -> Option<usize> {
    usize::try_from(u64::from_le_bytes(point.try_into().ok()?)).ok()
}

fn point(offset: usize) -> ResumePoint {
    ResumePoint(Bytes::copy_from_slice(&(offset as u64).to_le_bytes()))
}

/// Checks a request and takes its volume; returns what was kept of it.
pub(super) fn start(disk: &mut Disk, open: &mut Open, request: &ReceiveRequest, known: bool) -> Result<Vec<u8>> {
    let (volume, snapshot) = (request.volume.id, request.snapshot.id);
    if !known {
        return Err(unsupported(OPERATION, snapshot, "the delta format is not known here"));
    }
    super::check_record(OPERATION, &request.volume)?;
    let own = disk.volumes.get(&volume).into_iter().flat_map(|volume| &volume.snapshots);
    if own.into_iter().any(|stored| stored.held.snapshot.id == snapshot) {
        return Err(Error::new(OPERATION, snapshot, ErrorKind::AlreadyExists));
    }
    if let Some(base) = request.base {
        disk.stored(OPERATION, base)?;
    }
    if open.receiving.contains(&volume) {
        return Err(unsupported(OPERATION, volume, IS_OPEN));
    }
    let taken = match &request.resume {
        None => {
            disk.partials.remove(&volume);
            Vec::new()
        }
        Some(point) => {
            let stale = |why: &str| Error::new(OPERATION, snapshot, ErrorKind::ResumeStale(why.to_owned()));
            let kept = disk.partials.get(&volume);
            let (partial, taken) = kept.ok_or_else(|| stale("nothing was kept of this receive"))?;
            let same = partial.snapshot == request.snapshot
                && partial.base == request.base
                && partial.format == request.format;
            if !same || partial.point != *point {
                return Err(stale("what was kept is of another step"));
            }
            taken.clone()
        }
    };
    open.receiving.insert(volume);
    Ok(taken)
}

/// An open receive.
pub(super) struct MemoryReceiving {
    pool: Arc<MemoryPool>,
    session: Arc<Session>,
    request: ReceiveRequest,
    taken: Vec<u8>,
    kept: usize,
    /// What was kept is to stay when this is dropped.
    suspended: bool,
}

impl MemoryReceiving {
    pub(super) fn new(pool: Arc<MemoryPool>, session: Arc<Session>, request: ReceiveRequest, taken: Vec<u8>) -> Self {
        Self { pool, session, request, kept: taken.len(), taken, suspended: false }
    }

    async fn wait(&self) {
        simulation::pause().await;
        if self.session.is_over() {
            std::future::pending::<()>().await;
        }
    }

    /// The portable format has points of its own, which this driver does not keep.
    fn can_go_on(&self) -> bool {
        self.request.format != DeltaFormat::tree()
    }

    fn keep(&mut self) {
        let ReceiveRequest { volume, snapshot, base, format, .. } = self.request.clone();
        let from = std::mem::replace(&mut self.kept, self.taken.len());
        let (point, received_bytes) = (point(self.kept), self.kept as u64);
        let partial = Partial { volume: volume.id, snapshot, base, format, point, received_bytes };
        let mut disk = locked(&self.pool.disk);
        match disk.partials.get_mut(&volume.id) {
            Some((known, bytes)) if bytes.len() == from => {
                *known = partial;
                bytes.extend_from_slice(&self.taken[from..]);
            }
            _ => {
                disk.partials.insert(volume.id, (partial, self.taken.clone()));
            }
        }
    }

    fn publish(&self) -> Result<HeldSnapshot> {
        let (volume, snapshot) = (self.request.volume.id, self.request.snapshot.id);
        let mut disk = locked(&self.pool.disk);
        let mut open = locked(&self.session.open);
        open.absorb();
        let base = self.request.base.map(|base| disk.stored(OPERATION, base)).transpose()?.map(|stored| &stored.tree);
        let tree = match self.can_go_on() {
            true => tree::apply(base, &self.taken),
            false => Some(folder::apply_portable(base, &self.taken)?),
        };
        let damaged = || ErrorKind::Corrupt("it is no whole delta".to_owned());
        let tree = tree.ok_or_else(|| Error::new(OPERATION, snapshot, damaged()))?;
        let parent = self.request.snapshot.parents.first().copied();
        let held = HeldSnapshot {
            snapshot: self.request.snapshot.clone(),
            volume,
            unchanged: base == Some(&tree) && self.request.base.map(|base| base.snapshot) == parent,
            logical_bytes: tree.logical_bytes(),
        };
        let is_replica = disk.volumes.get(&volume).is_some_and(|known| known.record.role == Role::Replica);
        if is_replica {
            let in_use = open.attached.get(&Target::Head(volume)).is_some_and(|attached| attached.serves.is_none());
            refuse_blocked(OPERATION, volume, Blockers { attached: in_use, ..Blockers::default() })?;
            if !disk.is_clean(&open, volume)? {
                return Err(unsupported(OPERATION, volume, "the replica's head has changes that no snapshot holds"));
            }
            open.heads.remove(&volume);
        }
        let new = || Volume { record: self.request.volume.clone(), head: None, snapshots: Vec::new() };
        let known = disk.volumes.entry(volume).or_insert_with(new);
        if is_replica {
            known.head = None;
        }
        known.snapshots.push(Stored { held: held.clone(), tree });
        disk.partials.remove(&volume);
        Ok(held)
    }
}

impl Drop for MemoryReceiving {
    fn drop(&mut self) {
        if self.session.is_over() {
            return;
        }
        locked(&self.session.open).receiving.remove(&self.request.volume.id);
        if !self.suspended {
            locked(&self.pool.disk).partials.remove(&self.request.volume.id);
        }
    }
}

#[async_trait]
impl Receiving for MemoryReceiving {
    async fn write(&mut self, chunk: Bytes) -> Result<()> {
        self.wait().await;
        self.taken.extend_from_slice(&chunk);
        if self.can_go_on() && self.taken.len() - self.kept >= CHECKPOINT {
            self.keep();
            fault::point("memory.receive.checkpoint");
        }
        Ok(())
    }

    async fn commit(mut self: Box<Self>) -> Result<HeldSnapshot> {
        self.wait().await;
        fault::point("memory.receive.before");
        let published = self.publish();
        fault::point("memory.receive.after");
        self.wait().await;
        published
    }

    async fn suspend(mut self: Box<Self>) -> Result<Option<ResumePoint>> {
        self.wait().await;
        if !self.can_go_on() || self.taken.is_empty() {
            return Ok(None);
        }
        self.keep();
        self.suspended = true;
        Ok(Some(point(self.kept)))
    }
}
