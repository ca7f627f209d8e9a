//! Which volumes and snapshots a pool holds, read from their properties: there is no index on the disk to fall out of step.
//!
//! Owns the records of volumes and snapshots, scan, lineage, and the verbs that touch records and whole datasets only:
//! create, set_record, destroy, forget. Refuses to know what is inside the trees.
//!
//! A snapshot is there once it has its record: `zfs snapshot` alone publishes nothing. Names of snapshots that are no ids:
//! `trash.…` is being destroyed, `compare.…` was taken to look at a head; both are cleared away at the next open.

use std::{collections::BTreeSet, io, str::FromStr, sync::Arc};

use serde::{Serialize, de::DeserializeOwned};
use uuid::Uuid;

use super::{
    listing::Found,
    pool::Pool,
    program::{Class, Trouble, unless},
    property::{self, Encoded},
    volume::{Any, StoredSnapshot, Volume},
};
use crate::{
    driver::{Orphan, Scan, Target},
    error::{Blockers, Error, ErrorKind, Result},
    fault,
    model::{HeldSnapshot, Lineage, Role, SnapshotId, SnapshotKey, VolumeId, VolumeRecord, check_metadata},
    records::RecordError,
};

/// The key of the record of a volume on its dataset, and of a snapshot on it.
pub(super) const RECORD: &str = "record";

/// The property of a snapshot that is not finished.
pub(super) const PENDING: &str = "org.flocker:pending";

/// What is asked of every dataset and snapshot.
pub(super) const PROPERTIES: &str =
    "type,guid,origin,userrefs,readonly,refquota,org.flocker:record,org.flocker:pending";

impl Pool {
    /// Refuses what this pool cannot keep.
    pub(super) fn check_record(&self, operation: &'static str, record: &VolumeRecord) -> Result<()> {
        check_metadata(&record.metadata)
            .map_err(|error| Error::new(operation, &record.name, ErrorKind::Unsupported(error.to_string())))
    }

    /// Reads a volume: one command, and one more for each record that is too long for one property.
    pub(super) fn volume(&self, operation: &'static str, volume: VolumeId) -> Result<Arc<Volume>> {
        let object = format!("volume {volume}");
        let (dataset, mark) = (self.volume_dataset(volume), self.mark(volume));
        let found = self.list(&dataset, PROPERTIES).map_err(|trouble| trouble.into_error(operation, &object))?;
        let read = self.assemble(&found, volume).map_err(|error| error.into_error(operation, object))?;
        let read = Arc::new(read);
        self.remember(&read, mark);
        Ok(read)
    }

    /// Makes a volume of what was found of its dataset.
    fn assemble(&self, found: &[Found], id: VolumeId) -> std::result::Result<Volume, RecordError> {
        let dataset = found.first().ok_or(RecordError::Missing)?;
        let record: VolumeRecord = self.read_record("volume", dataset)?;
        if record.id != id {
            return Err(RecordError::Damaged(format!("it is the record of volume {}", record.id)));
        }
        let mut volume =
            Volume { record, found: dataset.clone(), snapshots: Vec::new(), all: Vec::new(), orphans: Vec::new() };
        let is_arriving = self.receiving().contains(&id);
        for it in &found[1..] {
            let Some(name) = it.snapshot().filter(|_| it.dataset() == dataset.name) else {
                volume.orphans.push(orphan(it, "a dataset inside a volume".to_owned()));
                continue;
            };
            volume.all.push(Any { name: name.to_owned(), guid: it.guid() });
            match identify::<SnapshotId>(name) {
                Some(id) => match self.read_stored(it, id) {
                    Ok(stored) => volume.snapshots.push(stored),
                    // Not published yet: it is being taken, or has arrived.
                    Err(RecordError::Missing) if is_arriving || it.property(PENDING).is_some() => {}
                    Err(error) => volume.orphans.push(orphan(it, format!("its snapshot record: {error}"))),
                },
                None if is_passing(name) => {}
                None => volume.orphans.push(orphan(it, "not named like a snapshot".to_owned())),
            }
        }
        volume.snapshots.sort_by_key(|stored| (stored.sequence, stored.snapshot.id));
        Ok(volume)
    }

    fn read_stored(&self, found: &Found, id: SnapshotId) -> std::result::Result<StoredSnapshot, RecordError> {
        let stored: StoredSnapshot = self.read_record("snapshot", found)?;
        if stored.snapshot.id != id {
            return Err(RecordError::Damaged(format!("it is the record of snapshot {}", stored.snapshot.id)));
        }
        Ok(stored)
    }

    /// Reads the record of a dataset or snapshot that was listed.
    fn read_record<T: DeserializeOwned>(&self, kind: &str, found: &Found) -> std::result::Result<T, RecordError> {
        let value = found.property(&property::name(RECORD)).ok_or(RecordError::Missing)?;
        let header = property::header(value)?;
        if header.chunks == 0 {
            return property::decode(kind, RECORD, value, |_| None);
        }
        let names = property::chunk_names(RECORD, header.generation, header.chunks).join(",");
        let chunks = self.look(&found.name, &names);
        let chunks = chunks.map_err(|trouble| RecordError::Io(io::Error::other(trouble.error)))?;
        property::decode(kind, RECORD, value, |name| chunks.property(name))
    }

    /// Reads a snapshot of a volume that is there.
    pub(super) fn stored(&self, operation: &'static str, key: SnapshotKey) -> Result<StoredSnapshot> {
        self.find(operation, key, None)
    }

    /// The same where one volume was read already.
    pub(super) fn find(
        &self,
        operation: &'static str,
        key: SnapshotKey,
        read: Option<&Volume>,
    ) -> Result<StoredSnapshot> {
        let found = match read.filter(|volume| volume.id() == key.volume) {
            Some(volume) => volume.find(key.snapshot).cloned(),
            None => self.known(operation, key.volume)?.find(key.snapshot).cloned(),
        };
        found.ok_or_else(|| missing(operation, key.snapshot))
    }

    pub(super) fn scan(&self) -> Result<Scan> {
        const OPERATION: &str = "scan pool";
        let _publishing = self.publishing();
        let mut scan = Scan::default();
        let all = self.list(self.root(), PROPERTIES).map_err(|it| it.into_error(OPERATION, self.root()))?;
        let volumes = self.folder("volumes");
        let known: Vec<String> = super::pool::FOLDERS.iter().map(|folder| self.folder(folder)).collect();
        for group in by_volume(&all, &volumes) {
            let dataset = &group[0];
            match identify(dataset.name.strip_prefix(&format!("{volumes}/")).unwrap_or_default()) {
                Some(id) => match self.assemble(group, id) {
                    Ok(volume) => {
                        scan.orphans.extend(volume.orphans);
                        let held = volume.snapshots.into_iter().map(|stored| stored.held(id)).collect();
                        scan.volumes.push((volume.record, held));
                    }
                    Err(error) => scan.orphans.push(orphan(dataset, format!("its volume record: {error}"))),
                },
                None => scan.orphans.push(orphan(dataset, "not named like a volume".to_owned())),
            }
        }
        for it in &all {
            let inside = |folder: &String| it.name == *folder || it.name.starts_with(&format!("{folder}/"));
            let is_known = it.name == self.root() || known.iter().any(inside);
            let is_snapshot_of_folder = it.snapshot().is_some() && known.iter().any(|folder| it.dataset() == folder);
            if !is_known || is_snapshot_of_folder {
                scan.orphans.push(orphan(it, "no part of a pool".to_owned()));
            }
        }
        scan.volumes.sort_by_key(|(record, _)| record.id);
        scan.orphans.sort_by(|a, b| a.place.cmp(&b.place));
        Ok(scan)
    }

    /// Reads all volumes that are readable: one command.
    pub(super) fn volumes(&self, operation: &'static str) -> Result<Vec<Volume>> {
        let folder = self.folder("volumes");
        let all = self.list(&folder, PROPERTIES).map_err(|it| it.into_error(operation, &folder))?;
        let read = |group: &[Found]| {
            let id = identify(group[0].name.strip_prefix(&format!("{folder}/"))?)?;
            self.assemble(group, id).ok()
        };
        Ok(by_volume(&all, &folder).into_iter().filter_map(read).collect())
    }

    /// Follows the origins back. What an origin names and the pool does not hold ends the lineage.
    pub(super) fn lineage(&self, volume: VolumeId) -> Result<Lineage> {
        const OPERATION: &str = "read lineage of";
        let _publishing = self.publishing();
        let mut at = self.volume(OPERATION, volume)?;
        let held = |volume: &Volume, count: usize| -> Vec<HeldSnapshot> {
            let own = volume.snapshots[..count].iter().rev();
            own.map(|stored| stored.clone().held(volume.id())).collect()
        };
        let mut newest_first = held(&at, at.snapshots.len());
        let mut seen = BTreeSet::from([volume]);
        while let Some(origin) = at.record.origin {
            let Ok(parent) = self.volume(OPERATION, origin.volume) else { break };
            if !seen.insert(origin.volume) {
                break;
            }
            let Some(place) = parent.snapshots.iter().position(|it| it.snapshot.id == origin.snapshot) else { break };
            newest_first.extend(held(&parent, place + 1));
            at = parent;
        }
        newest_first.reverse();
        Ok(Lineage { snapshots: newest_first })
    }

    pub(super) fn create(&self, record: &VolumeRecord) -> Result<()> {
        const OPERATION: &str = "create volume";
        self.check_record(OPERATION, record)?;
        let encoded = encode(OPERATION, "volume", 1, record)?;
        let _publishing = self.publishing();
        fault::point("zfs.create.before-publish");
        let mut words = vec!["create".to_owned()];
        words.extend(options(record, &encoded));
        words.push(self.volume_dataset(record.id));
        self.programs.zfs(&words).map_err(|trouble| trouble.into_error(OPERATION, &record.name))?;
        fault::point("zfs.create.published");
        Ok(())
    }

    pub(super) fn refuse_taken(&self, operation: &'static str, record: &VolumeRecord) -> Result<()> {
        let dataset = self.volume_dataset(record.id);
        match super::place::exists(&self.programs, &dataset) {
            Ok(false) => Ok(()),
            Ok(true) => Err(Error::new(operation, &record.name, ErrorKind::AlreadyExists)),
            Err(trouble) => Err(trouble.into_error(operation, dataset)),
        }
    }

    pub(super) fn set_record(&self, record: &VolumeRecord) -> Result<()> {
        const OPERATION: &str = "write record of";
        self.check_record(OPERATION, record)?;
        let before = self.volume(OPERATION, record.id)?;
        self.set_quota(OPERATION, &before, record.quota_bytes)?;
        if record.role == Role::Replica && !before.is_read_only() && !self.is_head_in_use(record.id) {
            self.unmount_head(OPERATION, record.id)?;
            self.set(&before.found.name, "readonly", "on").map_err(|it| it.into_error(OPERATION, &record.name))?;
        }
        fault::point("zfs.set-record.before-write");
        self.write_record(OPERATION, "volume", &before.found, record)?;
        fault::point("zfs.set-record.written");
        Ok(())
    }

    /// Holds a head to its volume's quota.
    pub(super) fn set_quota(&self, operation: &'static str, volume: &Volume, quota_bytes: Option<u64>) -> Result<()> {
        let before = volume.found.property("refquota").unwrap_or("0");
        let after = quota_bytes.unwrap_or(0).to_string();
        if before == after || (before == "none" && after == "0") {
            return Ok(());
        }
        let value = if after == "0" { "none" } else { &after };
        let dataset = &volume.found.name;
        self.set(dataset, "refquota", value).map_err(|trouble| trouble.into_error(operation, dataset))
    }

    /// Sets one property.
    pub(super) fn set(&self, name: &str, property: &str, value: &str) -> std::result::Result<(), Trouble> {
        self.programs.zfs_patiently(&["set", &format!("{property}={value}"), name]).map(drop)
    }

    /// Sets several properties; where the program takes one at a time, one after the other.
    pub(super) fn set_all(&self, name: &str, properties: &[property::Property]) -> std::result::Result<(), Trouble> {
        let pairs: Vec<String> = properties.iter().map(|(property, value)| format!("{property}={value}")).collect();
        if !self.abilities.modern {
            return pairs.iter().try_for_each(|pair| self.programs.zfs(&["set", pair, name]).map(drop));
        }
        if pairs.is_empty() {
            return Ok(());
        }
        let words = ["set"].into_iter().chain(pairs.iter().map(String::as_str)).chain([name]);
        self.programs.zfs(&words.collect::<Vec<_>>()).map(drop)
    }

    /// Replaces the record of a dataset or snapshot by one atomic step.
    pub(super) fn write_record<T: Serialize>(
        &self,
        operation: &'static str,
        kind: &str,
        target: &Found,
        body: &T,
    ) -> Result<()> {
        let failed = |trouble: Trouble| trouble.into_error(operation, &target.name);
        let before = target.property(&property::name(RECORD)).and_then(|value| property::header(value).ok());
        let (generation, chunks) = before.map_or((0, 0), |header| (header.generation, header.chunks));
        let encoded = encode(operation, kind, generation + 1, body)?;
        self.set_all(&target.name, &encoded.chunks).map_err(failed)?;
        let (name, value) = &encoded.header;
        self.set(&target.name, name, value).map_err(failed)?;
        // What is left of the old one means nothing any more.
        for name in property::chunk_names(RECORD, generation, chunks) {
            self.programs.zfs(&["inherit", &name, &target.name]).map_err(failed)?;
        }
        Ok(())
    }

    pub(super) fn destroy(&self, volume: VolumeId) -> Result<()> {
        const OPERATION: &str = "destroy volume";
        let publishing = self.publishing();
        self.volume(OPERATION, volume)?;
        let clones = self.clones_of(OPERATION, |origin| origin.volume == volume)?;
        let attached = self.is_attached(|key| key.volume == volume, Some(volume));
        refuse_blocked(OPERATION, volume, Blockers { newer: Vec::new(), clones, attached })?;
        self.unmount_head(OPERATION, volume)?;
        fault::point("zfs.destroy.before-trash");
        let trashed = self.trash(OPERATION, &self.volume_dataset(volume))?;
        self.forget_volume(volume);
        drop(publishing);
        fault::point("zfs.destroy.trashed");
        self.delete_trashed(trashed);
        Ok(())
    }

    pub(super) fn forget(self: &Arc<Self>, key: SnapshotKey) -> Result<()> {
        const OPERATION: &str = "forget snapshot";
        let publishing = self.publishing();
        let volume = self.volume(OPERATION, key.volume)?;
        volume.find(key.snapshot).ok_or_else(|| missing(OPERATION, key.snapshot))?;
        let clones = self.clones_of(OPERATION, |origin| origin == key)?;
        let attached = self.is_attached(|served| served == key, None);
        refuse_blocked(OPERATION, key.snapshot, Blockers { newer: Vec::new(), clones, attached })?;
        // The head of a replica equals its newest snapshot, whichever that is. One that has changes of its own stays.
        let older = volume.snapshots.len().checked_sub(2).map(|at| volume.snapshots[at].snapshot.id);
        let is_newest = volume.newest().is_some_and(|newest| newest.snapshot.id == key.snapshot);
        let back_to = older.filter(|_| is_newest && volume.record.role == Role::Replica);
        let back_to = match back_to {
            Some(to) if !self.is_head_in_use(key.volume) && self.head_is_clean(OPERATION, &volume)? => Some(to),
            _ => None,
        };
        if let Some(to) = back_to {
            self.note_back(OPERATION, key.volume, to)?;
        }
        fault::point("zfs.forget.before-trash");
        let trashed = format!("{}@trash.{}", self.volume_dataset(key.volume), Uuid::now_v7());
        let name = self.snapshot_name(key);
        let renamed = self.programs.zfs_patiently(&["rename", &name, &trashed]);
        renamed.map_err(|trouble| trouble.into_error(OPERATION, key.snapshot))?;
        drop(publishing);
        fault::point("zfs.forget.trashed");
        self.delete_snapshot(&trashed);
        if let Some(to) = back_to {
            self.go_back(OPERATION, key.volume, to)?;
        }
        Ok(())
    }

    pub(super) fn clones_of(
        &self,
        operation: &'static str,
        depends: impl Fn(SnapshotKey) -> bool,
    ) -> Result<Vec<VolumeId>> {
        let volumes = self.volumes(operation)?.into_iter();
        let clones = volumes.filter(|volume| volume.record.origin.is_some_and(&depends));
        Ok(clones.map(|volume| volume.id()).collect())
    }

    /// Tells whether a path into one of these snapshots, or into this volume's head, is handed out.
    pub(super) fn is_attached(&self, snapshot: impl Fn(SnapshotKey) -> bool, head: Option<VolumeId>) -> bool {
        self.attached().iter().any(|(target, attachment)| {
            let by_target = match *target {
                Target::Head(volume) => head == Some(volume),
                Target::Snapshot(volume, id) => snapshot(SnapshotKey { volume, snapshot: id }),
            };
            by_target || attachment.serves.is_some_and(&snapshot)
        })
    }

    /// Tells whether the head itself, not a snapshot in its place, is handed out.
    pub(super) fn is_head_in_use(&self, volume: VolumeId) -> bool {
        self.attached().get(&Target::Head(volume)).is_some_and(|attachment| attachment.serves.is_none())
    }
}

pub(super) fn missing(operation: &'static str, snapshot: SnapshotId) -> Error {
    Error::new(operation, format_args!("snapshot {snapshot}"), ErrorKind::NotFound)
}

pub(super) fn refuse_blocked(
    operation: &'static str,
    object: impl std::fmt::Display,
    blockers: Blockers,
) -> Result<()> {
    if blockers.is_empty() { Ok(()) } else { Err(Error::new(operation, object, ErrorKind::Blocked(blockers))) }
}

pub(super) fn encode<T: Serialize>(operation: &'static str, kind: &str, generation: u64, body: &T) -> Result<Encoded> {
    property::encode(kind, RECORD, generation, body).map_err(|error| Error::io(operation, kind, error))
}

/// The options by which a dataset becomes a volume in the one step that makes it.
pub(super) fn options(record: &VolumeRecord, encoded: &Encoded) -> Vec<String> {
    let mut options = vec!["canmount=noauto".to_owned()];
    options.extend(record.quota_bytes.map(|bytes| format!("refquota={bytes}")));
    options.push(format!("readonly={}", if record.role == Role::Replica { "on" } else { "off" }));
    options.extend(encoded.all().map(|(name, value)| format!("{name}={value}")));
    options.into_iter().flat_map(|option| ["-o".to_owned(), option]).collect()
}

/// Parts a listing into the datasets directly beneath `folder`, each with what is inside it.
fn by_volume<'a>(all: &'a [Found], folder: &str) -> Vec<&'a [Found]> {
    let prefix = format!("{folder}/");
    let top = |found: &Found| {
        let rest = found.dataset().strip_prefix(&prefix)?;
        Some(rest.split('/').next().unwrap_or_default().to_owned())
    };
    all.chunk_by(|a, b| top(a) == top(b)).filter(|group| top(&group[0]).is_some()).collect()
}

/// Tells whether a snapshot's name is one that the driver gives for a moment.
pub(super) fn is_passing(name: &str) -> bool {
    let is = |prefix: &str| name.strip_prefix(prefix).is_some_and(|rest| Uuid::parse_str(rest).is_ok());
    is("trash.") || is("compare.")
}

/// Reads the id that something is named by. Only the one spelling that the driver writes counts.
pub(super) fn identify<T: FromStr + ToString>(name: &str) -> Option<T> {
    let id: T = name.parse().ok()?;
    (id.to_string() == name).then_some(id)
}

fn orphan(found: &Found, reason: String) -> Orphan {
    Orphan { place: found.name.clone(), reason }
}

/// Takes a dataset that is gone already as done.
pub(super) fn gone(result: std::result::Result<Vec<u8>, Trouble>) -> std::result::Result<(), Trouble> {
    unless(Class::NotFound, result).map(drop)
}
