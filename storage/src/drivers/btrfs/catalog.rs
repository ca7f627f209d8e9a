//! Which volumes and snapshots a pool holds, read from their records: there is no index on the disk to fall out of step.
//!
//! Owns the records of volumes and snapshots, scan, lineage, and the verbs that touch records and whole directories
//! only: create, set_record, destroy, forget. Refuses to know what is inside the trees. The layout of the records is that
//! of the directory driver; the driver keeps its own numbers beside them.

use std::{fs, io, path::Path, str::FromStr, sync::Arc};

use serde::{Deserialize, Serialize};

use uuid::Uuid;

use super::{pool::Pool, subvolume};
use crate::{
    driver::{Orphan, Scan, Target},
    drivers::{
        folder::{is_ours, make_dir},
        published::{Histories, Listed, Record},
    },
    error::{Blockers, Error, ErrorKind, Result},
    fault,
    model::{HeldSnapshot, Role, Snapshot, SnapshotId, SnapshotKey, VolumeId, VolumeRecord, check_metadata},
    records::{self, RecordError, sync_dir},
};

const VOLUME_RECORD: &str = "volume.json";
const SNAPSHOT_RECORD: &str = "snapshot.json";

/// A snapshot's record as kept beside its tree.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct StoredSnapshot {
    /// Grows along the volume's own snapshots; clocks do not order them.
    pub(super) sequence: u64,
    /// Whether nothing differs from its first parent.
    pub(super) unchanged: bool,
    /// The sum of the sizes of its regular files.
    pub(super) logical_bytes: u64,
    /// Its entries, the root included.
    pub(super) entries: u64,
    /// What the kernel calls its contents on every file system they are sent to: the received uuid, else the uuid.
    pub(super) identity: Uuid,
    /// The last transaction that changed it, read after all was written. Another number means that somebody changed it.
    pub(super) ctransid: u64,
    /// The snapshot as given.
    pub(super) snapshot: Snapshot,
}

impl Record for StoredSnapshot {
    fn sequence(&self) -> u64 {
        self.sequence
    }
    fn id(&self) -> SnapshotId {
        self.snapshot.id
    }
    fn held(self, volume: VolumeId) -> HeldSnapshot {
        let Self { unchanged, logical_bytes, snapshot, .. } = self;
        HeldSnapshot { snapshot, volume, unchanged, logical_bytes }
    }
}

impl StoredSnapshot {
    pub(super) fn write(&self, dir: &Path) -> io::Result<()> {
        records::write("snapshot", dir, SNAPSHOT_RECORD, self)
    }
}

impl Pool {
    /// Refuses what this pool cannot keep.
    pub(super) fn check_record(&self, operation: &'static str, record: &VolumeRecord) -> Result<()> {
        if record.quota_bytes.is_some() && !self.capabilities().quota {
            let why = "quotas are off in this pool's file system; `btrfs quota enable` and a restart turn them on";
            return Err(Error::new(operation, &record.name, ErrorKind::Unsupported(why.to_owned())));
        }
        check_metadata(&record.metadata)
            .map_err(|error| Error::new(operation, &record.name, ErrorKind::Unsupported(error.to_string())))
    }

    /// Holds a head to its volume's quota.
    pub(super) fn limit_head(&self, operation: &'static str, head: &Path, quota_bytes: Option<u64>) -> Result<()> {
        if !self.capabilities().quota || quota_bytes.is_none() {
            return Ok(());
        }
        subvolume::limit(head, quota_bytes).map_err(|error| Error::new(operation, head.display(), error.into_kind()))
    }
}

pub(super) fn write_volume(dir: &Path, record: &VolumeRecord) -> io::Result<()> {
    records::write("volume", dir, VOLUME_RECORD, record)
}

/// Makes what every volume has, head and snapshots apart.
pub(super) fn lay_out_volume(dir: &Path, record: &VolumeRecord) -> io::Result<()> {
    for folder in [dir.to_owned(), dir.join("snapshots")] {
        make_dir(&folder)?;
    }
    write_volume(dir, record)
}

impl Histories for Pool {
    type Record = StoredSnapshot;

    fn record(&self, volume: VolumeId) -> std::result::Result<VolumeRecord, RecordError> {
        read_volume(&self.volume_dir(volume), volume)
    }

    fn own(&self, volume: VolumeId) -> io::Result<Arc<Vec<StoredSnapshot>>> {
        self.published.own(volume, &self.snapshots_dir(volume), || self.own_snapshots(volume))
    }
}

impl Pool {
    /// Reads a volume's record.
    pub(super) fn volume(&self, operation: &'static str, volume: VolumeId) -> Result<VolumeRecord> {
        read_volume(&self.volume_dir(volume), volume)
            .map_err(|error| error.into_error(operation, format_args!("volume {volume}")))
    }

    /// Reads a snapshot's record.
    pub(super) fn stored(&self, operation: &'static str, key: SnapshotKey) -> Result<StoredSnapshot> {
        self.read_snapshot(&self.snapshot_dir(key), key.snapshot)
            .map_err(|error| error.into_error(operation, format_args!("snapshot {}", key.snapshot)))
    }

    fn read_snapshot(&self, dir: &Path, id: SnapshotId) -> std::result::Result<StoredSnapshot, RecordError> {
        let stored: StoredSnapshot = records::read("snapshot", &dir.join(SNAPSHOT_RECORD))?;
        if stored.snapshot.id != id {
            return Err(RecordError::Damaged(format!("it is the record of snapshot {}", stored.snapshot.id)));
        }
        if !subvolume::is_subvolume(&dir.join("tree")) {
            return Err(RecordError::Damaged("its subvolume is missing".to_owned()));
        }
        Ok(stored)
    }

    /// Reads the volume's own snapshots oldest first, and what else lies among them.
    pub(super) fn own_snapshots(&self, volume: VolumeId) -> io::Result<Listed<StoredSnapshot>> {
        let (mut snapshots, mut orphans) = (Vec::new(), Vec::new());
        let entries = match fs::read_dir(self.snapshots_dir(volume)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok((snapshots, orphans)),
            entries => entries?,
        };
        for entry in entries {
            let path = entry?.path();
            match identify::<SnapshotId>(&path).map(|id| self.read_snapshot(&path, id)) {
                Some(Ok(stored)) => snapshots.push(stored),
                Some(Err(error)) => orphans.push(orphan(&path, format!("its snapshot record: {error}"))),
                None => orphans.push(orphan(&path, "not named like a snapshot".to_owned())),
            }
        }
        snapshots.sort_by_key(|stored| (stored.sequence, stored.snapshot.id));
        Ok((snapshots, orphans))
    }

    pub(super) fn scan(&self) -> Result<Scan> {
        let _publishing = self.publishing();
        let failed = |error: io::Error| Error::io("scan pool", self.root().display(), error);
        let mut scan = Scan::default();
        for entry in fs::read_dir(self.volumes_dir()).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            match identify::<VolumeId>(&path).map(|id| read_volume(&path, id)) {
                Some(Ok(record)) => {
                    let (own, orphans) = self.own_snapshots(record.id).map_err(failed)?;
                    let held = own.into_iter().map(|stored| stored.held(record.id)).collect();
                    scan.orphans.extend(orphans);
                    scan.volumes.push((record, held));
                }
                Some(Err(error)) => scan.orphans.push(orphan(&path, format!("its volume record: {error}"))),
                None => scan.orphans.push(orphan(&path, "not named like a volume".to_owned())),
            }
        }
        for entry in fs::read_dir(self.root()).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            if !is_ours(&entry.file_name()) && entry.file_name() != "lost+found" {
                scan.orphans.push(orphan(&entry.path(), "no part of a pool".to_owned()));
            }
        }
        scan.volumes.sort_by_key(|(record, _)| record.id);
        scan.orphans.sort_by(|a, b| a.place.cmp(&b.place));
        Ok(scan)
    }

    /// Reads all volume records that are readable.
    pub(super) fn volumes(&self, operation: &'static str) -> Result<Vec<VolumeRecord>> {
        let failed = |error: io::Error| Error::io(operation, self.root().display(), error);
        let mut volumes = Vec::new();
        for entry in fs::read_dir(self.volumes_dir()).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            volumes.extend(identify::<VolumeId>(&path).and_then(|id| read_volume(&path, id).ok()));
        }
        volumes.sort_by_key(|record| record.id);
        Ok(volumes)
    }

    pub(super) fn create(self: &Arc<Self>, record: &VolumeRecord) -> Result<()> {
        const OPERATION: &str = "create volume";
        self.check_record(OPERATION, record)?;
        self.refuse_taken(OPERATION, record)?;
        let stage = self.stage(OPERATION, "create")?;
        let dir = stage.path().join("volume");
        let failed = |error: io::Error| Error::io(OPERATION, &record.name, error);
        lay_out_volume(&dir, record).map_err(failed)?;
        make_head(OPERATION, &dir.join("head"))?;
        self.limit_head(OPERATION, &dir.join("head"), record.quota_bytes)?;
        self.sync(OPERATION)?;
        fault::point("btrfs.create.before-publish");
        stage.publish(OPERATION, "volume", &self.volume_dir(record.id))?;
        fault::point("btrfs.create.published");
        Ok(())
    }

    pub(super) fn refuse_taken(&self, operation: &'static str, record: &VolumeRecord) -> Result<()> {
        if self.volume_dir(record.id).exists() {
            return Err(Error::new(operation, &record.name, ErrorKind::AlreadyExists));
        }
        Ok(())
    }

    pub(super) fn set_record(&self, record: &VolumeRecord) -> Result<()> {
        const OPERATION: &str = "write record of";
        self.check_record(OPERATION, record)?;
        let before = self.volume(OPERATION, record.id)?;
        let head = self.head_dir(record.id);
        if self.capabilities().quota && before.quota_bytes != record.quota_bytes && head.exists() {
            subvolume::limit(&head, record.quota_bytes)
                .map_err(|error| Error::new(OPERATION, &record.name, error.into_kind()))?;
        }
        fault::point("btrfs.set-record.before-write");
        write_volume(&self.volume_dir(record.id), record).map_err(|error| Error::io(OPERATION, &record.name, error))?;
        fault::point("btrfs.set-record.written");
        Ok(())
    }

    pub(super) fn destroy(&self, volume: VolumeId) -> Result<()> {
        const OPERATION: &str = "destroy volume";
        let publishing = self.publishing();
        self.volume(OPERATION, volume)?;
        let clones = self.clones_of(OPERATION, |origin| origin.volume == volume)?;
        let attached = self.is_attached(|key| key.volume == volume, Some(volume));
        refuse_blocked(OPERATION, volume, Blockers { newer: Vec::new(), clones, attached })?;
        fault::point("btrfs.destroy.before-trash");
        let change = self.published.change(volume);
        let trashed = self.trash(OPERATION, &self.volume_dir(volume))?;
        drop(change);
        drop(publishing);
        fault::point("btrfs.destroy.trashed");
        // What was on its way into the volume has nowhere to go.
        if !self.receiving().contains(&volume)
            && let Err(error) = self.clear_partials(volume)
        {
            tracing::warn!(%volume, %error, "a partial receive of a destroyed volume stays");
        }
        self.delete_trashed(trashed);
        Ok(())
    }

    pub(super) fn forget(self: &Arc<Self>, key: SnapshotKey) -> Result<()> {
        const OPERATION: &str = "forget snapshot";
        let publishing = self.publishing();
        self.stored(OPERATION, key)?;
        let clones = self.clones_of(OPERATION, |origin| origin == key)?;
        let attached = self.is_attached(|served| served == key, None);
        refuse_blocked(OPERATION, key.snapshot, Blockers { newer: Vec::new(), clones, attached })?;
        // A missing head equals the newest snapshot. A primary's head must not lose its contents with it, so it is made
        // first; a replica's head is whatever snapshot is the newest.
        drop(publishing);
        let role = self.volume(OPERATION, key.volume)?.role;
        let is_tip = self.tip(key.volume)? == Some(key);
        if role == Role::Primary && is_tip && !self.head_dir(key.volume).exists() {
            self.materialise_head(OPERATION, key.volume)?;
        }
        let publishing = self.publishing();
        fault::point("btrfs.forget.before-trash");
        let change = self.published.change(key.volume);
        let trashed = self.trash(OPERATION, &self.snapshot_dir(key))?;
        change.removed(&self.snapshots_dir(key.volume), key.snapshot);
        drop(publishing);
        fault::point("btrfs.forget.trashed");
        self.delete_trashed(trashed);
        Ok(())
    }

    pub(super) fn clones_of(
        &self,
        operation: &'static str,
        depends: impl Fn(SnapshotKey) -> bool,
    ) -> Result<Vec<VolumeId>> {
        let volumes = self.volumes(operation)?.into_iter();
        Ok(volumes.filter(|record| record.origin.is_some_and(&depends)).map(|record| record.id).collect())
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
}

pub(super) fn refuse_blocked(
    operation: &'static str,
    object: impl std::fmt::Display,
    blockers: Blockers,
) -> Result<()> {
    if blockers.is_empty() { Ok(()) } else { Err(Error::new(operation, object, ErrorKind::Blocked(blockers))) }
}

/// An empty head is 0755 whatever the umask says.
pub(super) fn make_head(operation: &'static str, path: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    subvolume::create(path).map_err(|error| Error::new(operation, path.display(), error.into_kind()))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))
        .and_then(|()| sync_dir(path))
        .map_err(|error| Error::io(operation, path.display(), error))
}

fn read_volume(dir: &Path, id: VolumeId) -> std::result::Result<VolumeRecord, RecordError> {
    let record: VolumeRecord = records::read("volume", &dir.join(VOLUME_RECORD))?;
    if record.id != id {
        return Err(RecordError::Damaged(format!("it is the record of volume {}", record.id)));
    }
    Ok(record)
}

/// Reads the id that a directory is named by. Only the one spelling that the driver writes counts.
fn identify<T: FromStr + ToString>(path: &Path) -> Option<T> {
    let name = path.file_name()?.to_str()?;
    let id: T = name.parse().ok()?;
    (id.to_string() == name).then_some(id)
}

fn orphan(path: &Path, reason: String) -> Orphan {
    Orphan { place: path.display().to_string(), reason }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::model::{Host, HostId, Role};

    fn volume() -> VolumeRecord {
        VolumeRecord {
            id: "01890000-0000-7000-8000-000000000001".parse().unwrap(),
            name: "db".parse().unwrap(),
            metadata: [("owner".to_owned(), "ops".to_owned())].into(),
            created: "2026-01-02T03:04:05.000000006Z".parse().unwrap(),
            origin: Some(SnapshotKey {
                volume: "01890000-0000-7000-8000-000000000002".parse().unwrap(),
                snapshot: "01890000-0000-7000-8000-000000000003".parse().unwrap(),
            }),
            role: Role::Replica,
            epoch: 7,
            primary: Some(Host { id: HostId([0xab; 32]), name: "host-a".parse().unwrap() }),
            quota_bytes: None,
        }
    }

    fn stored() -> StoredSnapshot {
        StoredSnapshot {
            sequence: 4,
            unchanged: true,
            logical_bytes: 5,
            entries: 6,
            identity: Uuid::from_u128(7),
            ctransid: 8,
            snapshot: Snapshot {
                id: "01890000-0000-7000-8000-000000000003".parse().unwrap(),
                name: "one".parse().unwrap(),
                parents: vec!["01890000-0000-7000-8000-000000000004".parse().unwrap()],
                host: Host { id: HostId([0xab; 32]), name: "host-a".parse().unwrap() },
                created: "1969-12-31T23:59:59.5Z".parse().unwrap(),
                metadata: Default::default(),
            },
        }
    }

    #[test]
    fn the_bytes_of_the_records_stay_as_they_are() {
        let volume = records::encode("volume", &volume()).unwrap();
        assert_eq!(String::from_utf8(volume).unwrap(), include_str!("testdata/volume.json"));
        let stored = records::encode("snapshot", &stored()).unwrap();
        assert_eq!(String::from_utf8(stored).unwrap(), include_str!("testdata/snapshot.json"));
    }

    #[test]
    fn records_written_by_format_1_are_read() {
        let read: VolumeRecord = records::decode("volume", include_bytes!("testdata/volume.json")).unwrap();
        assert_eq!(read, volume());
        let older = include_bytes!("testdata/volume-without-primary.json");
        let read: VolumeRecord = records::decode("volume", older).unwrap();
        assert_eq!(read, VolumeRecord { primary: None, ..volume() });
        let read: StoredSnapshot = records::decode("snapshot", include_bytes!("testdata/snapshot.json")).unwrap();
        assert_eq!(read, stored());
    }
}
