//! The journal: records, on a dataset of their own, of verbs that take more than one step; and what opening a pool does with
//! what it finds.
//!
//! | record | written | at the next open |
//! |---|---|---|
//! | `receive.<volume>` without `stored` | before the first byte, where a receive can go on | kept while there is something to go on with |
//! | `receive.<volume>` with `stored` | before the last record of the stream | the snapshot gets its record, if it arrived and has none |
//! | `back.<volume>` | before a replica's newest snapshot goes | the head goes back to the one named |
//! | `split.<volume>` | before the first step of a split | carried out |
//! | `swap.<volume>` | before a received dataset takes the place of the volume's | carried out |
//!
//! They are taken out when the verb is done; that of an increment stays until the next of its volume, or the next open.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{
    catalog::{PENDING, PROPERTIES, RECORD, gone, is_passing},
    listing::{self, Found},
    pool::{Pool, locked},
    program::{Class, Trouble, unless},
    property,
    split::Split,
    volume::StoredSnapshot,
};
use crate::{
    delta::DeltaFormat,
    error::{Error, Result},
    model::{Snapshot, SnapshotId, SnapshotKey, VolumeId},
};

const KIND: &str = "note";

/// What all holds of this driver are called.
pub(super) const HOLD: &str = "org.flocker";

/// One record of the journal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Note {
    /// A receive.
    Receive(Box<ReceiveNote>),
    /// The head of a replica goes back to one of its snapshots.
    Back(Back),
    /// A split.
    Split(Box<Split>),
    /// What was received takes the place of a volume's dataset.
    Swap(Swap),
}

/// What this process knows of a record of the journal.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Written {
    generation: u64,
    chunks: usize,
    is_over: bool,
}

/// A dataset on its way into the place of another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Swap {
    pub(super) volume: VolumeId,
    pub(super) snapshot: SnapshotId,
    /// What the old dataset is called in the trash.
    pub(super) trash: Uuid,
}

/// What is known of a receive.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ReceiveNote {
    pub(super) volume: VolumeId,
    pub(super) snapshot: Snapshot,
    pub(super) base: Option<SnapshotKey>,
    pub(super) format: DeltaFormat,
    /// Stream bytes of earlier attempts.
    pub(super) received_bytes: u64,
    /// Set once all has arrived and was found right: what the snapshot's record is to be, and its guid.
    pub(super) stored: Option<(StoredSnapshot, u64)>,
}

/// A head on its way back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Back {
    pub(super) volume: VolumeId,
    pub(super) to: SnapshotId,
}

impl Note {
    fn key(&self) -> String {
        match self {
            Self::Receive(note) => receive_key(note.volume),
            Self::Back(back) => format!("back.{}", back.volume),
            Self::Split(split) => format!("split.{}", split.record.id),
            Self::Swap(swap) => format!("swap.{}", swap.volume),
        }
    }
}

pub(super) fn receive_key(volume: VolumeId) -> String {
    format!("receive.{volume}")
}

impl Pool {
    /// Writes a record of the journal, by one atomic step.
    pub(super) fn note(&self, operation: &'static str, note: &Note) -> Result<()> {
        let key = note.key();
        let journal = self.folder("journal");
        let failed = |trouble: Trouble| trouble.into_error(operation, &journal);
        let mut notes = locked(&self.notes);
        let Written { generation, chunks, .. } = notes.get(&key).copied().unwrap_or_default();
        let encoded = property::encode(KIND, &key, generation + 1, note);
        let encoded = encoded.map_err(|error| Error::io(operation, &journal, error))?;
        self.set_all(&journal, &encoded.chunks).map_err(failed)?;
        self.set(&journal, &encoded.header.0, &encoded.header.1).map_err(failed)?;
        let written = Written { generation: generation + 1, chunks: encoded.chunks.len(), is_over: false };
        notes.insert(key.clone(), written);
        self.drop_chunks(&key, generation, chunks);
        Ok(())
    }

    /// Takes a record out of the journal, by one atomic step.
    pub(super) fn unnote(&self, operation: &'static str, key: &str) -> Result<()> {
        let journal = self.folder("journal");
        let mut notes = locked(&self.notes);
        let Some(Written { generation, chunks, .. }) = notes.get(key).copied() else { return Ok(()) };
        let done = self.programs.zfs(&["inherit", &property::name(key), &journal]);
        done.map_err(|trouble| trouble.into_error(operation, &journal))?;
        notes.remove(key);
        self.drop_chunks(key, generation, chunks);
        Ok(())
    }

    /// Leaves a record of the journal to be overwritten by the next of its key, or taken out at the next open: nothing is left to
    /// be done of it. That saves one of the steps of which a push of many snapshots takes as many.
    pub(super) fn leave_note(&self, key: &str) {
        if let Some(written) = locked(&self.notes).get_mut(key) {
            written.is_over = true;
        }
    }

    /// Tells whether the journal has something that is not over.
    pub(super) fn is_noted(&self, key: &str) -> bool {
        locked(&self.notes).get(key).is_some_and(|written| !written.is_over)
    }

    fn drop_chunks(&self, key: &str, generation: u64, chunks: usize) {
        for name in property::chunk_names(key, generation, chunks) {
            if let Err(error) = self.programs.zfs(&["inherit", &name, &self.folder("journal")]) {
                tracing::warn!(name, error = %error.error, "an old part of the journal stays");
            }
        }
    }

    /// Reads the journal.
    pub(super) fn read_notes(&self) -> Result<Vec<Note>> {
        const OPERATION: &str = "read journal of";
        let journal = self.folder("journal");
        let words = ["get", "-Hp", "-s", "local", "-o", listing::FIELDS, "all", &journal];
        let output = self.programs.zfs(&words).map_err(|trouble| trouble.into_error(OPERATION, &journal))?;
        let found = listing::parse(&output).into_iter().next().unwrap_or_default();
        let mut read = Vec::new();
        for (name, value) in &found.properties {
            let Some(key) = name.strip_prefix(property::MODULE) else { continue };
            // Chunks have two more parts.
            if key.split('.').count() != 2 {
                continue;
            }
            if let Ok(header) = property::header(value) {
                let (generation, chunks) = (header.generation, header.chunks);
                let mut notes = locked(&self.notes);
                let is_over = notes.get(key).is_some_and(|known| known.is_over && known.generation == generation);
                notes.insert(key.to_owned(), Written { generation, chunks, is_over });
            }
            match property::decode::<Note>(KIND, key, value, |chunk| found.property(chunk)) {
                Ok(note) if note.key() == key => read.push(note),
                Ok(_) => tracing::error!(name, "a record of the journal is not what its name says, and is left alone"),
                Err(error) => tracing::error!(name, %error, "a record of the journal is left alone"),
            }
        }
        Ok(read)
    }

    /// Finishes or clears away what an earlier run left.
    pub(super) fn recover(&self) -> Result<()> {
        const OPERATION: &str = "open pool";
        let failed = |trouble: Trouble| trouble.into_error(OPERATION, self.root());
        self.unmount_all();
        let mut kept = Vec::new();
        for note in self.read_notes()? {
            match note {
                Note::Split(split) => self.carry_out(&split)?,
                Note::Swap(swap) => self.carry_out_swap(&swap)?,
                Note::Back(back) => {
                    self.clear_passing(back.volume)?;
                    self.go_back(OPERATION, back.volume, back.to)?;
                }
                Note::Receive(note) => kept.extend(self.finish_receive(&note)?),
            }
        }
        let all = self.list(self.root(), PROPERTIES).map_err(failed)?;
        let beneath = |folder: &str| format!("{}/", self.folder(folder));
        for it in all.iter().filter(|it| it.snapshot().is_none()) {
            let inside = |folder: &str| it.name.strip_prefix(&beneath(folder)).is_some_and(|rest| !rest.contains('/'));
            if inside("views") || inside("trash") || (inside("incoming") && !kept.contains(&it.name)) {
                self.discard_partial_state(&it.name);
                self.delete(&it.name);
            }
        }
        let volumes = beneath("volumes");
        for it in all.iter().filter(|it| it.name.starts_with(&volumes)) {
            let Some(name) = it.snapshot() else { continue };
            let unfinished = it.property(PENDING).is_some() && it.property(&property::name(RECORD)).is_none();
            if is_passing(name) || unfinished {
                self.delete_snapshot(&it.name);
            } else if it.property("userrefs").is_some_and(|count| count != "0") {
                self.release(&[&it.name]);
            }
        }
        Ok(())
    }

    /// Destroys the snapshots of a volume that were made for a moment.
    fn clear_passing(&self, volume: VolumeId) -> Result<()> {
        let dataset = self.volume_dataset(volume);
        let listed = self.list(&dataset, "type").map_err(|it| it.into_error("open pool", volume))?;
        for it in listed.iter().filter(|it| it.dataset() == dataset && it.snapshot().is_some_and(is_passing)) {
            self.delete_snapshot(&it.name);
        }
        Ok(())
    }

    pub(super) fn note_back(&self, operation: &'static str, volume: VolumeId, to: SnapshotId) -> Result<()> {
        self.note(operation, &Note::Back(Back { volume, to }))
    }

    /// Puts the head of a replica back to a snapshot that is its newest now. Whoever wrote the note knew that the head held
    /// nothing of its own.
    pub(super) fn go_back(&self, operation: &'static str, volume: VolumeId, to: SnapshotId) -> Result<()> {
        let failed = |trouble: Trouble| trouble.into_error(operation, volume);
        self.unmount_head(operation, volume)?;
        let name = self.snapshot_name(SnapshotKey { volume, snapshot: to });
        unless(Class::NotFound, self.programs.zfs_patiently(&["rollback", &name])).map_err(failed)?;
        self.unnote(operation, &format!("back.{volume}"))
    }

    /// Gives a snapshot that has arrived its record. Returns the dataset of a receive that can go on.
    fn finish_receive(&self, note: &ReceiveNote) -> Result<Option<String>> {
        const OPERATION: &str = "finish receive of";
        let key = receive_key(note.volume);
        let failed = |trouble: Trouble| trouble.into_error(OPERATION, note.snapshot.id);
        if let Some((stored, guid)) = &note.stored {
            let at = SnapshotKey { volume: note.volume, snapshot: note.snapshot.id };
            match self.look(&self.snapshot_name(at), PROPERTIES) {
                // It was published: by this receive, with a record that may be newer by now, or by a later one.
                Ok(found) if found.property(&property::name(RECORD)).is_some() => {}
                Ok(found) if found.guid() == Some(*guid) => self.write_record(OPERATION, "snapshot", &found, stored)?,
                Ok(_) => tracing::error!(snapshot = %note.snapshot.id, "another snapshot lies in its place"),
                Err(trouble) if trouble.class == Class::NotFound => {}
                Err(trouble) => return Err(failed(trouble)),
            }
            self.discard_partial_state(&self.volume_dataset(note.volume));
            self.unnote(OPERATION, &key)?;
            return Ok(None);
        }
        match self.token_of(note).map_err(failed)? {
            Some((dataset, _)) => Ok(Some(dataset)),
            None => {
                self.unnote(OPERATION, &key)?;
                Ok(None)
            }
        }
    }

    /// Returns where a receive stopped, and on which dataset: an increment on the volume, a first one on its own.
    pub(super) fn token_of(&self, note: &ReceiveNote) -> std::result::Result<Option<(String, String)>, Trouble> {
        if !self.abilities.resume {
            return Ok(None);
        }
        for dataset in [self.incoming_dataset(note.volume, note.snapshot.id), self.volume_dataset(note.volume)] {
            match self.look(&dataset, "receive_resume_token") {
                Ok(Found { mut properties, .. }) => {
                    if let Some(token) = properties.remove("receive_resume_token") {
                        return Ok(Some((dataset, token)));
                    }
                }
                Err(trouble) if trouble.class == Class::NotFound => {}
                Err(trouble) => return Err(trouble),
            }
        }
        Ok(None)
    }

    /// Throws away what a receive that was cut left on a dataset.
    pub(super) fn discard_partial_state(&self, dataset: &str) {
        if self.abilities.resume
            && self.look(dataset, "receive_resume_token").is_ok_and(|it| !it.properties.is_empty())
            && let Err(trouble) = self.programs.zfs_patiently(&["receive", "-A", dataset])
        {
            tracing::warn!(dataset, error = %trouble.error, "a half received state stays");
        }
    }

    /// Keeps snapshots from being destroyed by somebody else while they are read: all of them, or none.
    pub(super) fn pin(&self, names: &[String]) -> std::result::Result<(), Trouble> {
        let mut pins = locked(&self.pins);
        let new: Vec<&str> = names.iter().map(String::as_str).filter(|name| !pins.contains_key(*name)).collect();
        if !new.is_empty()
            && let Err(trouble) = self.programs.zfs(&[&["hold", HOLD], &new[..]].concat())
        {
            // zfs-fuse holds one after the other.
            self.release(&new);
            return Err(trouble);
        }
        for name in names {
            *pins.entry(name.clone()).or_default() += 1;
        }
        Ok(())
    }

    /// Lets go of them.
    pub(super) fn unpin(&self, names: &[String]) {
        let mut pins = locked(&self.pins);
        let mut last = Vec::new();
        for name in names {
            let Some(readers) = pins.get_mut(name) else { continue };
            *readers -= 1;
            if *readers == 0 {
                pins.remove(name);
                last.push(name.as_str());
            }
        }
        self.release(&last);
    }

    /// Lets go of snapshots that were held: by one command, and where that fails, because one of them is gone or is not held,
    /// by one for each.
    pub(super) fn release(&self, names: &[&str]) {
        let release = |names: &[&str]| self.programs.zfs(&[&["release", HOLD], names].concat());
        if names.is_empty() || (names.len() > 1 && release(names).is_ok()) {
            return;
        }
        for name in names {
            match gone(release(&[name])) {
                Err(trouble) if trouble.class != Class::NoSuchTag => {
                    tracing::warn!(name, error = %trouble.error, "a hold stays");
                }
                _ => {}
            }
        }
    }
}
