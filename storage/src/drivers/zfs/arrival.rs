//! A stream of `zfs send` on its way into the pool.
//!
//! Owns the child `zfs receive`: what it is told, when it sees which bytes, and how it ends. zfs-fuse hands the pipe to its
//! daemon, which goes on when the child is killed; so a receive is given up by closing the pipe first.

use std::{
    io,
    io::Write,
    process::ChildStdin,
    sync::Arc,
    thread::{self, Builder},
};

use super::{
    catalog::PROPERTIES,
    delta::{Announced, PREAMBLE, parse_preamble},
    journal::{Note, ReceiveNote, receive_key},
    pool::Pool,
    program::Trouble,
    receive::{Destination, GOODBYE, OPERATION, Task, arrived},
    stream::{Begin, Reader},
    view::View,
    volume::{StoredSnapshot, Volume},
};
use crate::{
    command::{Input, Running},
    delta::ResumePoint,
    error::{Blockers, ErrorKind, Result},
    fault,
    model::SnapshotKey,
};

/// A receive of a stream.
pub(super) struct Arrival {
    pool: Arc<Pool>,
    features: u64,
    /// Bytes of earlier attempts, where this one goes on.
    going_on: Option<u64>,
    preamble: Vec<u8>,
    reader: Reader,
    received_bytes: u64,
    program: Option<Program>,
    /// The dataset that a half received state would lie on; nothing once it is published or kept.
    stage: Option<String>,
}

/// A running `zfs receive`. Dropping it closes its pipe, waits for it, and only then kills it.
struct Program {
    running: Running,
    stdin: Option<ChildStdin>,
}

impl Program {
    fn end(&mut self) -> std::result::Result<(), Trouble> {
        drop(self.stdin.take());
        self.running.finish().map_err(Trouble::from)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        drop(self.stdin.take());
        if !self.running.ends_within(GOODBYE) {
            tracing::warn!("zfs receive does not end by itself, and is killed");
        }
    }
}

impl Arrival {
    pub(super) fn open(task: &Task, features: u64, going_on: Option<u64>) -> Result<Self> {
        let pool = &task.pool;
        match (&task.destination, task.request.base) {
            (Destination::Volume(volume), Some(base)) if base.volume == volume.id() => {
                // What came after the base is in the way, unless it changed nothing.
                if volume.changed_after(base.snapshot) {
                    let why = "the base is an older snapshot than the newest one here".to_owned();
                    return Err(task.failed(ErrorKind::FormatUnfit(why)));
                }
                pool.level_head(task, volume)?;
            }
            (Destination::Volume(_), _) => {
                let why = "the volume is there, and the delta does not build on one of its own snapshots".to_owned();
                return Err(task.failed(ErrorKind::FormatUnfit(why)));
            }
            (Destination::New, _) => {}
        }
        let stage = match &task.destination {
            Destination::Volume(volume) => volume.found.name.clone(),
            Destination::New => task.incoming(),
        };
        if pool.abilities.resume && going_on.is_none() {
            pool.note(OPERATION, &Note::Receive(Box::new(note(task, 0))))?;
        }
        Ok(Self {
            pool: Arc::clone(pool),
            features,
            going_on,
            preamble: Vec::new(),
            reader: Reader::default(),
            received_bytes: going_on.unwrap_or_default(),
            program: None,
            stage: Some(stage),
        })
    }

    pub(super) fn write(&mut self, task: &Task, mut chunk: &[u8]) -> Result<()> {
        self.received_bytes += chunk.len() as u64;
        if self.preamble.len() < PREAMBLE {
            let (head, rest) = chunk.split_at(chunk.len().min(PREAMBLE - self.preamble.len()));
            self.preamble.extend_from_slice(head);
            chunk = rest;
            if self.preamble.len() == PREAMBLE && parse_preamble(&self.preamble).is_none() {
                return Err(task.failed(ErrorKind::Corrupt("the stream is of another format".to_owned())));
            }
        }
        let taken = self.reader.take(chunk);
        let pieces = taken.map_err(|error| task.failed(ErrorKind::Corrupt(error.to_string())))?;
        if self.program.is_none() {
            let Some(begin) = self.reader.begin() else { return Ok(()) };
            self.check(task, begin)?;
            self.program = Some(self.start(task)?);
        }
        pieces.iter().try_for_each(|piece| self.pass_on(task, piece))
    }

    fn pass_on(&mut self, task: &Task, bytes: &[u8]) -> Result<()> {
        let Some(program) = &mut self.program else { return Ok(()) };
        let Some(stdin) = &mut program.stdin else {
            return Err(task.failed(ErrorKind::Corrupt("the receive failed before".to_owned())));
        };
        match stdin.write_all(bytes) {
            Ok(()) => Ok(()),
            // It ended early: its own words say why.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(match program.end() {
                Err(trouble) => task.trouble(trouble),
                Ok(()) => task.failed(ErrorKind::Corrupt("zfs receive ended before the stream did".to_owned())),
            }),
            Err(error) => Err(task.failed(ErrorKind::from_io(error))),
        }
    }

    /// Holds the stream's beginning against what was announced, before any program sees it.
    fn check(&self, task: &Task, begin: Begin) -> Result<()> {
        let corrupt = |what: &str| Err(task.failed(ErrorKind::Corrupt(what.to_owned())));
        let unfit = |what: &str| Err(task.failed(ErrorKind::FormatUnfit(what.to_owned())));
        if !begin.keeps_to(self.features) {
            return corrupt("the stream announces what its format does not have");
        }
        if begin.is_resuming() != self.going_on.is_some() {
            return corrupt("the stream goes on where nothing was kept, or begins anew where something was");
        }
        let Some(base) = task.request.base else {
            return if begin.from_guid == 0 { Ok(()) } else { corrupt("the stream builds on a snapshot") };
        };
        let known = match &task.destination {
            Destination::Volume(volume) if volume.id() == base.volume => volume.guid_of(base.snapshot),
            _ => None,
        };
        let guid = match known {
            Some(guid) => guid,
            None => self.pool.guid_of(OPERATION, base)?,
        };
        if guid != begin.from_guid {
            return unfit("the base came here in another format, and is another snapshot to it");
        }
        match &task.destination {
            Destination::Volume(_) if begin.is_clone => unfit("the base belongs to another volume at the sender"),
            Destination::New if self.pool.abilities.modern => Ok(()),
            Destination::New if !begin.is_clone => unfit("the base belongs to the same volume at the sender"),
            // zfs-fuse cannot be told the origin: it takes the first snapshot of that guid in the whole pool.
            Destination::New if !self.pool.is_only_one(begin.from_guid).map_err(|it| task.trouble(it))? => {
                unfit("another snapshot of the same origin lies in the pool, and zfs-fuse cannot tell them apart")
            }
            _ => Ok(()),
        }
    }

    fn start(&self, task: &Task) -> Result<Program> {
        let mut words = vec!["receive".to_owned(), "-u".to_owned()];
        if self.pool.abilities.resume {
            words.push("-s".to_owned());
        }
        let is_new = matches!(task.destination, Destination::New);
        if is_new && self.pool.abilities.modern && self.going_on.is_none() {
            let origin = task.request.base.map(|base| format!("origin={}", self.pool.snapshot_name(base)));
            let set = ["canmount=noauto", "readonly=on"].map(str::to_owned).into_iter().chain(origin);
            words.extend(set.flat_map(|option| ["-o".to_owned(), option]));
        }
        words.push(self.name(task));
        let running = self.pool.programs.start_zfs(&words, Input::Pipe).map_err(|it| task.trouble(it))?;
        let stdin = running.take_stdin();
        Ok(Program { running, stdin })
    }

    /// The full name of what arrives.
    fn name(&self, task: &Task) -> String {
        let dataset = self.stage.clone().unwrap_or_else(|| task.incoming());
        format!("{dataset}@{}", task.request.snapshot.id)
    }

    pub(super) fn commit(mut self, task: &Task) -> Result<StoredSnapshot> {
        let announced = parse_preamble(&self.preamble);
        let (Some(announced), Some(begin), Some(end)) = (announced, self.reader.begin(), self.reader.end()) else {
            return Err(task.failed(ErrorKind::Corrupt("the stream is truncated".to_owned())));
        };
        let end = end.to_vec();
        let name = self.name(task);
        let mut stored = StoredSnapshot {
            sequence: task.sequence(),
            unchanged: task.follows() && !self.reader.changes() && self.going_on.is_none(),
            logical_bytes: announced.totals.logical_bytes,
            entries: announced.totals.entries,
            snapshot: task.request.snapshot.clone(),
        };
        match &task.destination {
            Destination::New => {
                self.finish(task, &end)?;
                drop(self.probe(task, &name, begin)?);
                let origin = self.pool.look(task.incoming().as_str(), "origin").map_err(|it| task.trouble(it))?;
                let expected = task.request.base.map(|base| self.pool.snapshot_name(base));
                if origin.property("origin") != expected.as_deref() {
                    let why = "it became a clone of another snapshot than was meant".to_owned();
                    return Err(task.failed(ErrorKind::FormatUnfit(why)));
                }
                self.settle_unchanged(task, &name, announced, &mut stored)?;
                self.pool.publish_new(task, &stored)?;
            }
            Destination::Volume(volume) => {
                let attached = self.pool.is_head_in_use(volume.id());
                let blockers = Blockers { attached, ..Blockers::default() };
                super::catalog::refuse_blocked(OPERATION, volume.id(), blockers)?;
                self.pool.unmount_head(OPERATION, volume.id())?;
                let mut note = note(task, self.received_bytes);
                note.stored = Some((stored.clone(), begin.to_guid));
                self.pool.note(OPERATION, &Note::Receive(Box::new(note)))?;
                let before = self.pool.before_adding(volume.id());
                fault::point("zfs.receive.before-publish");
                self.finish(task, &end)?;
                fault::point("zfs.receive.landed");
                let view = match self.probe(task, &name, begin) {
                    Ok(view) => view,
                    Err(error) => {
                        self.take_back(task, volume, &name)?;
                        return Err(error);
                    }
                };
                self.settle_unchanged(task, &name, announced, &mut stored)?;
                let publish = || {
                    let publishing = self.pool.publishing();
                    self.pool.write_record(OPERATION, "snapshot", &arrived(&volume.found.name, task), &stored)?;
                    fault::point("zfs.receive.published");
                    self.pool.added(before, &stored, Some(begin.to_guid), true);
                    drop(publishing);
                    self.pool.leave_note(&receive_key(volume.id()));
                    Ok(())
                };
                if let Some(view) = view {
                    view.leave();
                }
                let published = publish();
                self.pool.settle_views();
                published?;
            }
        }
        self.stage = None;
        Ok(stored)
    }

    /// Sends the last record, which makes the snapshot, and waits.
    fn finish(&mut self, task: &Task, end: &[u8]) -> Result<()> {
        self.pass_on(task, end)?;
        match self.program.take() {
            Some(mut program) => program.end().map_err(|trouble| task.trouble(trouble)),
            None => Err(task.failed(ErrorKind::Corrupt("the stream is truncated".to_owned()))),
        }
    }

    /// Holds what arrived against what was announced: its guid, and that its root can be read. Returns the view in which that was
    /// done; without its key a snapshot can be kept and passed on, and not be read.
    fn probe(&self, task: &Task, name: &str, begin: Begin) -> Result<Option<View>> {
        let pool = &self.pool;
        let look = || pool.look(name, PROPERTIES);
        let view = || pool.view_of(OPERATION, name, format!("probe.{}", task.request.snapshot.id));
        let (found, view) = thread::scope(|scope| {
            let looking = Builder::new().name("zfs".to_owned()).spawn_scoped(scope, look);
            let view = (!begin.is_raw()).then(view).transpose();
            let found = match looking {
                Ok(thread) => thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
                Err(_) => look(),
            };
            (found, view)
        });
        if found.map_err(|trouble| task.trouble(trouble))?.guid() != Some(begin.to_guid) {
            return Err(task.failed(ErrorKind::Corrupt("another snapshot arrived than was announced".to_owned())));
        }
        let Some(view) = view? else { return Ok(None) };
        let read = std::fs::read_dir(view.path()).and_then(|mut entries| entries.try_for_each(|entry| entry.map(drop)));
        read.map_err(|error: io::Error| {
            task.failed(ErrorKind::Corrupt(format!("what arrived cannot be read: {error}")))
        })?;
        Ok(Some(view))
    }

    /// The stream holds something, and the sender says that nothing differs from the base: that is looked at here.
    fn settle_unchanged(
        &self,
        task: &Task,
        name: &str,
        announced: Announced,
        stored: &mut StoredSnapshot,
    ) -> Result<()> {
        let Some(base) = task.request.base.filter(|_| task.follows() && announced.unchanged && !stored.unchanged)
        else {
            return Ok(());
        };
        stored.unchanged = self.pool.is_as(OPERATION, base, name).unwrap_or(false);
        Ok(())
    }

    /// Undoes an increment that was published by the program and is not what was meant.
    fn take_back(&self, task: &Task, volume: &Volume, name: &str) -> Result<()> {
        let Some(newest) = volume.newest() else { return Ok(()) };
        self.pool.note_back(OPERATION, volume.id(), newest.snapshot.id)?;
        let trashed = format!("{}@trash.{}", volume.found.name, uuid::Uuid::now_v7());
        self.pool.programs.zfs_patiently(&["rename", name, &trashed]).map_err(|trouble| task.trouble(trouble))?;
        self.pool.unnote(OPERATION, &receive_key(volume.id()))?;
        self.pool.delete_snapshot(&trashed);
        self.pool.go_back(OPERATION, volume.id(), newest.snapshot.id)
    }

    /// Keeps what has arrived, where the pool can.
    pub(super) fn suspend(mut self, task: &Task) -> Result<Option<ResumePoint>> {
        if !self.pool.abilities.resume || self.program.is_none() {
            return Ok(None);
        }
        if let Some(mut program) = self.program.take()
            && let Err(trouble) = program.end()
        {
            tracing::debug!(error = %trouble.error, "the receive was cut on purpose");
        }
        let note = note(task, self.received_bytes);
        let token = self.pool.token_of(&note).map_err(|trouble| task.trouble(trouble))?;
        let Some((_, token)) = token else { return Ok(None) };
        self.pool.note(OPERATION, &Note::Receive(Box::new(note)))?;
        self.stage = None;
        Ok(Some(ResumePoint(token.into())))
    }
}

/// What was not published or kept is thrown away.
impl Drop for Arrival {
    fn drop(&mut self) {
        drop(self.program.take());
        let Some(stage) = self.stage.take() else { return };
        self.pool.discard_partial_state(&stage);
        if stage.starts_with(&self.pool.folder("incoming")) {
            self.pool.delete(&stage);
        }
        let volume = super::catalog::identify(
            stage.rsplit('/').next().and_then(|name| name.split('.').next()).unwrap_or_default(),
        );
        if let Some(volume) = volume
            && let Err(error) = self.pool.unnote(OPERATION, &receive_key(volume))
        {
            tracing::warn!(%error, "the journal keeps a receive that was given up");
        }
    }
}

fn note(task: &Task, received_bytes: u64) -> ReceiveNote {
    ReceiveNote {
        volume: task.request.volume.id,
        snapshot: task.request.snapshot.clone(),
        base: task.request.base,
        format: task.request.format.clone(),
        received_bytes,
        stored: None,
    }
}

impl Pool {
    /// Returns the guid of a snapshot of ours.
    pub(super) fn guid_of(&self, operation: &'static str, key: SnapshotKey) -> Result<u64> {
        let found = self.look(&self.snapshot_name(key), "guid");
        let found = found.map_err(|trouble| trouble.into_error(operation, key.snapshot))?;
        found.guid().ok_or_else(|| super::catalog::missing(operation, key.snapshot))
    }

    /// Tells whether one snapshot only has this guid, in and out of our part of the pool.
    fn is_only_one(&self, guid: u64) -> std::result::Result<bool, Trouble> {
        self.settle_views();
        let pool = self.root().split('/').next().unwrap_or_default();
        let of_guid =
            self.list(pool, "guid")?.into_iter().filter(|it| it.snapshot().is_some() && it.guid() == Some(guid));
        Ok(of_guid.count() == 1)
    }

    /// Takes off the head what counts as a change for ZFS and not for us (a mount leaves some): the head is clean, and no
    /// receive goes over a head that ZFS calls modified.
    fn level_head(&self, task: &Task, volume: &Volume) -> Result<()> {
        let Some(newest) = volume.newest().filter(|_| !self.is_level(volume.id())) else { return Ok(()) };
        let key = SnapshotKey { volume: volume.id(), snapshot: newest.snapshot.id };
        if self.abilities.modern {
            let written = self.look(&volume.found.name, "written").map_err(|trouble| task.trouble(trouble))?;
            if written.property("written") == Some("0") {
                return Ok(());
            }
        }
        match self.roll_back(OPERATION, volume, key) {
            // Snapshots of somebody else are newer. ZFS takes the increment if they are empty.
            Err(error) if matches!(error.kind, ErrorKind::Unsupported(_)) => Ok(()),
            other => other,
        }
    }
}
