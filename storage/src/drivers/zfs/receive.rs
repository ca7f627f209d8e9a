//! Taking in a delta, and publishing what arrived.
//!
//! A stream of `zfs send` goes to `zfs receive` all but its last record, without which nothing is published; `commit` sends
//! that one. An increment goes straight into the volume's dataset, where ZFS keeps it aside until then; everything else
//! lands in `ROOT/incoming` and is renamed. A stream of the tree format is applied to a clone in `ROOT/incoming`, which
//! then takes the place of the volume's dataset.
//!
//! | state | dropped or failed | suspended | killed, then opened |
//! |---|---|---|---|
//! | open, can go on | thrown away | kept | kept |
//! | open, else | thrown away | thrown away | thrown away |
//! | last record sent | – | – | the snapshot gets its record, if it is there |
//! | published | – | – | the rest is cleared away |

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use uuid::Uuid;

use super::{
    arrival::Arrival,
    catalog::{self, options},
    delta::features,
    graft::Graft,
    journal::{Note, ReceiveNote, Swap, receive_key},
    listing::Found,
    pool::Pool,
    program::{Class, Trouble},
    resume, run,
    volume::{StoredSnapshot, Volume},
};
use crate::{
    delta::{DeltaFormat, Partial, ReceiveRequest, Receiving, ResumePoint},
    driver::Finding,
    drivers::intake::Intake,
    error::{Blockers, Error, ErrorKind, Result},
    fault,
    model::{HeldSnapshot, VolumeId},
};

pub(super) const OPERATION: &str = "receive snapshot";

/// How long a program may take to notice that its input ended.
pub(super) const GOODBYE: Duration = Duration::from_secs(10);

/// Where a receive goes.
#[derive(Debug, Clone)]
pub(super) enum Destination {
    /// A volume that is there.
    Volume(Arc<Volume>),
    /// A volume that the commit makes.
    New,
}

/// What a receive needs to know whoever takes the bytes.
pub(super) struct Task {
    pub(super) pool: Arc<Pool>,
    pub(super) request: ReceiveRequest,
    pub(super) destination: Destination,
    _slot: Slot,
}

impl Task {
    pub(super) fn failed(&self, kind: ErrorKind) -> Error {
        Error::new(OPERATION, self.request.snapshot.id, kind)
    }

    pub(super) fn trouble(&self, trouble: Trouble) -> Error {
        self.failed(trouble.into_kind())
    }

    /// Where what is no increment of a volume lands.
    pub(super) fn incoming(&self) -> String {
        self.pool.incoming_dataset(self.request.volume.id, self.request.snapshot.id)
    }

    /// Tells whether the base is what the new snapshot follows.
    pub(super) fn follows(&self) -> bool {
        let parent = self.request.snapshot.parents.first().copied();
        self.request.base.is_some() && self.request.base.map(|base| base.snapshot) == parent
    }

    pub(super) fn sequence(&self) -> u64 {
        match &self.destination {
            Destination::Volume(volume) => volume.next_sequence(),
            Destination::New => 1,
        }
    }
}

impl Pool {
    pub(super) fn receive(self: &Arc<Self>, request: ReceiveRequest) -> Result<ZfsReceiving> {
        let (id, object) = (request.volume.id, request.snapshot.id);
        let is_tree = request.format == DeltaFormat::tree();
        let native = features(&request.format).filter(|_| self.capabilities().reads.contains(&request.format));
        if native.is_none() && !is_tree {
            let why = ErrorKind::Unsupported(format!("the delta format {} is not read here", request.format));
            return Err(Error::new(OPERATION, object, why));
        }
        self.check_record(OPERATION, &request.volume)?;
        let slot = Slot::take(self, id)?;
        let destination = match self.known(OPERATION, id) {
            Ok(volume) => Destination::Volume(volume),
            Err(error) if matches!(error.kind, ErrorKind::NotFound) => Destination::New,
            Err(error) => return Err(error),
        };
        if let Destination::Volume(volume) = &destination
            && volume.has(object)
        {
            return Err(Error::new(OPERATION, object, ErrorKind::AlreadyExists));
        }
        if let Some(base) = request.base {
            let read = match &destination {
                Destination::Volume(volume) => Some(&**volume),
                Destination::New => None,
            };
            self.find(OPERATION, base, read)?;
        }
        let going_on = self.reopen(&request)?;
        if let Destination::Volume(volume) = &destination {
            // What nobody has mounted since is what it was. Where somebody has, past us, ZFS refuses an increment by itself.
            match native.is_some() && going_on.is_none() && self.is_level(id) {
                true => self.free_head(OPERATION, volume)?,
                false => self.head_gives_way(OPERATION, volume)?,
            }
        }
        let task = Task { pool: Arc::clone(self), request, destination, _slot: slot };
        let taker = match native {
            Some(features) => Taker::Native(Box::new(Arrival::open(&task, features, going_on)?)),
            None => Taker::Tree(Box::new(Graft::open(&task)?)),
        };
        fault::point("zfs.receive.opened");
        Ok(ZfsReceiving { intake: Intake::new(OPERATION, Work { taker, task }, Work::take) })
    }

    /// Clears away what an earlier receive for the volume left, or finds that this one goes on with it: then returns the
    /// bytes that had arrived.
    fn reopen(&self, request: &ReceiveRequest) -> Result<Option<u64>> {
        let stale = |why: &str| Error::new(OPERATION, request.snapshot.id, ErrorKind::ResumeStale(why.to_owned()));
        let Some(point) = &request.resume else {
            self.clear_partial(request.volume.id)?;
            return Ok(None);
        };
        let kept = self.read_partial(request.volume.id)?;
        let partial = kept.ok_or_else(|| stale("nothing was kept of this receive"))?;
        if partial.snapshot != request.snapshot || partial.base != request.base || partial.format != request.format {
            return Err(stale("what was kept is of another step"));
        }
        if partial.point != *point {
            return Err(stale("what was kept ends elsewhere"));
        }
        Ok(Some(partial.received_bytes))
    }

    pub(super) fn partial(&self, volume: VolumeId) -> Result<Option<Partial>> {
        if self.receiving().contains(&volume) { Ok(None) } else { self.read_partial(volume) }
    }

    fn read_partial(&self, volume: VolumeId) -> Result<Option<Partial>> {
        let Some(note) = self.receive_note(volume)? else { return Ok(None) };
        let token = self.token_of(&note).map_err(|trouble| trouble.into_error(OPERATION, volume))?;
        let Some((_, token)) = token else { return Ok(None) };
        let said = self.decode_token(&token);
        let of_stream = said.get("bytes").and_then(|text| resume::number(text)).unwrap_or_default();
        let ReceiveNote { volume, snapshot, base, format, received_bytes, .. } = note;
        let received_bytes = received_bytes.max(of_stream);
        Ok(Some(Partial { volume, snapshot, base, format, point: ResumePoint(token.into()), received_bytes }))
    }

    fn receive_note(&self, volume: VolumeId) -> Result<Option<ReceiveNote>> {
        if !self.is_noted(&receive_key(volume)) {
            return Ok(None);
        }
        let found = self.read_notes()?.into_iter().find_map(|note| match note {
            Note::Receive(note) if note.volume == volume => Some(*note),
            _ => None,
        });
        Ok(found)
    }

    pub(super) fn discard_partial(self: &Arc<Self>, volume: VolumeId) -> Result<()> {
        let _slot = Slot::take(self, volume)?;
        self.clear_partial(volume)
    }

    pub(super) fn clear_partial(&self, volume: VolumeId) -> Result<()> {
        let Some(note) = self.receive_note(volume)? else { return Ok(()) };
        let incoming = self.incoming_dataset(volume, note.snapshot.id);
        for dataset in [&incoming, &self.volume_dataset(volume)] {
            self.discard_partial_state(dataset);
        }
        self.delete(&incoming);
        self.unnote(OPERATION, &receive_key(volume))
    }

    /// Renames what lies in `incoming` into its place as a new volume: the one step that publishes it.
    pub(super) fn publish_new(&self, task: &Task, stored: &StoredSnapshot) -> Result<()> {
        let (incoming, record) = (task.incoming(), &task.request.volume);
        self.write_record(OPERATION, "snapshot", &arrived(&incoming, task), stored)?;
        let encoded = catalog::encode(OPERATION, "volume", 1, record)?;
        let set: Vec<_> = options(record, &encoded)
            .into_iter()
            .filter_map(|option| option.split_once('=').map(|(name, value)| (name.to_owned(), value.to_owned())))
            .collect();
        self.set_all(&incoming, &set).map_err(|trouble| task.trouble(trouble))?;
        self.unmount(&self.mount_point(&incoming)).map_err(|trouble| task.trouble(trouble))?;
        fault::point("zfs.receive.before-publish");
        let _publishing = self.publishing();
        let renamed = self.rename(&incoming, &self.volume_dataset(record.id));
        renamed.map_err(|trouble| task.trouble(trouble))?;
        fault::point("zfs.receive.published");
        self.unnote(OPERATION, &receive_key(record.id))
    }

    /// Has what lies in `incoming`, a clone of the volume's newest snapshot with the new one on it, take the volume's place.
    pub(super) fn publish_in_place(
        self: &Arc<Self>,
        task: &Task,
        volume: &Volume,
        stored: &StoredSnapshot,
    ) -> Result<()> {
        let incoming = task.incoming();
        self.settle_views();
        self.write_record(OPERATION, "snapshot", &arrived(&incoming, task), stored)?;
        // The record may have changed meanwhile, and somebody may have used the head.
        let now = self.volume(OPERATION, volume.id())?;
        self.head_gives_way(OPERATION, &now)?;
        let newest = |volume: &Volume| volume.newest().map(|newest| newest.snapshot.id);
        let strange = now
            .all
            .iter()
            .rev()
            .map(|it| it.name.as_str())
            .take_while(|name| newest(&now).is_none_or(|newest| *name != newest.to_string()));
        let strange: Vec<&str> = strange.filter(|name| !catalog::is_passing(name)).collect();
        if newest(&now) != newest(volume) || !strange.is_empty() {
            let why = format!("somebody took snapshots of the volume: {}", strange.join(", "));
            return Err(task.failed(ErrorKind::Unsupported(why)));
        }
        // There, renaming a dataset unmounts every clone of its snapshots, and fails half-way where one is read.
        let attached = !self.abilities.modern && self.has_readers(volume.id());
        catalog::refuse_blocked(OPERATION, volume.id(), Blockers { attached, ..Blockers::default() })?;
        let kept = self.local_properties(&now).map_err(|trouble| task.trouble(trouble))?;
        self.set_all(&incoming, &kept).map_err(|trouble| task.trouble(trouble))?;
        self.unmount(&self.mount_point(&incoming)).map_err(|trouble| task.trouble(trouble))?;
        let swap = Swap { volume: volume.id(), snapshot: task.request.snapshot.id, trash: Uuid::now_v7() };
        let _publishing = self.publishing();
        fault::point("zfs.receive.before-publish");
        self.note(OPERATION, &Note::Swap(swap.clone()))?;
        fault::point("zfs.receive.journalled");
        self.carry_out_swap(&swap)?;
        fault::point("zfs.receive.published");
        Ok(())
    }

    /// Lists what was set on a volume's dataset, our records among it.
    fn local_properties(&self, volume: &Volume) -> std::result::Result<Vec<(String, String)>, Trouble> {
        let words = ["get", "-Hp", "-s", "local", "-o", super::listing::FIELDS, "all", &volume.found.name];
        let found = super::listing::parse(&self.programs.zfs(&words)?).into_iter().next().unwrap_or_default();
        let is_of_place = |name: &str| matches!(name, "mountpoint" | "quota" | "reservation" | "refreservation");
        Ok(found.properties.into_iter().filter(|(name, _)| !is_of_place(name)).collect())
    }

    /// Does what is left to do of a swap.
    pub(super) fn carry_out_swap(&self, swap: &Swap) -> Result<()> {
        let failed = |trouble: Trouble| trouble.into_error(OPERATION, swap.volume);
        let old = self.volume_dataset(swap.volume);
        let new = self.incoming_dataset(swap.volume, swap.snapshot);
        let trash = format!("{}/{}", self.folder("trash"), swap.trash);
        match self.look(&new, "origin") {
            Ok(found) => {
                let origin = found.property("origin").unwrap_or_default().to_owned();
                self.unmount_head(OPERATION, swap.volume)?;
                self.unmount(&self.mount_point(&new)).map_err(failed)?;
                if origin.starts_with(&format!("{old}@")) {
                    self.programs.zfs_patiently(&["promote", &new]).map_err(failed)?;
                }
                fault::point("zfs.receive.promoted");
                match self.rename(&old, &trash) {
                    Err(trouble) if trouble.class == Class::NotFound => {}
                    other => other.map_err(failed)?,
                }
                fault::point("zfs.receive.moved-away");
                self.rename(&new, &old).map_err(failed)?;
            }
            Err(trouble) if trouble.class == Class::NotFound => {}
            Err(trouble) => return Err(failed(trouble)),
        }
        fault::point("zfs.receive.in-place");
        self.unnote(OPERATION, &format!("swap.{}", swap.volume))?;
        self.delete(&trash);
        Ok(())
    }
}

/// What has just arrived on a dataset, which has no record yet.
pub(super) fn arrived(dataset: &str, task: &Task) -> Found {
    Found { name: format!("{dataset}@{}", task.request.snapshot.id), ..Found::default() }
}

/// The right to the one open receive of a volume.
pub(super) struct Slot {
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
        self.pool.delete_outlived(self.volume);
    }
}

/// Who takes the bytes.
enum Taker {
    Native(Box<Arrival>),
    Tree(Box<Graft>),
}

/// An open receive. A dropped future leaves the work whole in its thread: it ends by itself and clears its place away.
pub(super) struct ZfsReceiving {
    intake: Intake<Work>,
}

/// The order of the fields is the order in which they go: first the program, last the volume is free.
struct Work {
    taker: Taker,
    task: Task,
}

impl Work {
    fn take(&mut self, chunk: Bytes) -> Result<()> {
        self.task.pool.forgetting(match &mut self.taker {
            Taker::Native(arrival) => arrival.write(&self.task, &chunk),
            Taker::Tree(graft) => graft.write(chunk),
        })
    }
}

#[async_trait]
impl Receiving for ZfsReceiving {
    async fn write(&mut self, chunk: Bytes) -> Result<()> {
        self.intake.write(chunk).await
    }

    async fn settle(&mut self) -> Result<()> {
        self.intake.settle().await
    }

    fn take_findings(&mut self) -> Vec<Finding> {
        match self.intake.work().map(|work| &mut work.taker) {
            Some(Taker::Tree(graft)) => graft.take_findings(),
            _ => Vec::new(),
        }
    }

    async fn commit(self: Box<Self>) -> Result<HeldSnapshot> {
        let Work { taker, task } = self.intake.into_work().await?;
        run(OPERATION, move || {
            let stored = match taker {
                Taker::Native(arrival) => arrival.commit(&task),
                Taker::Tree(graft) => graft.commit(&task),
            };
            Ok(task.pool.forgetting(stored)?.held(task.request.volume.id))
        })
        .await
    }

    async fn suspend(self: Box<Self>) -> Result<Option<ResumePoint>> {
        let Work { taker, task } = self.intake.into_work().await?;
        run(OPERATION, move || match taker {
            Taker::Native(arrival) => arrival.suspend(&task),
            Taker::Tree(_) => Ok(None),
        })
        .await
    }
}
