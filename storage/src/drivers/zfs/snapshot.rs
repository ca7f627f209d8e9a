//! Taking snapshots of heads, comparing and counting what is in them.

use std::{collections::BTreeSet, fs::File, io, path::Path, sync::Arc};

use rustix::fs::OFlags;

use super::{
    catalog::PENDING,
    pool::Pool,
    program::Trouble,
    stream::Reader,
    view::is_mounted,
    volume::{StoredSnapshot, Volume},
};
use crate::{
    command::Input,
    delta::Compare,
    driver::{Finding, SnapshotReport, SnapshotRequest},
    error::{Error, ErrorKind, Result},
    fault,
    model::SnapshotKey,
    tree::{
        entry::{Entry, EntryKind},
        root::Root,
        walk::{Attributes, Links, Motion, Walk},
    },
};

const OPERATION: &str = "take snapshot of";

/// How many findings one verify returns at most.
const FINDINGS_LIMIT: usize = 1000;

/// How much of a stream is read to find out whether anything changed. What changes more than that is taken as changed;
/// less may be a file that was touched and put back, so the trees are compared.
const GLANCE_BYTES: usize = 1024 * 1024;

/// How much is read at once.
pub(super) const PIECE: usize = 256 * 1024;

/// Totals of a tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Totals {
    /// Its entries, the root included, sockets not.
    pub(super) entries: u64,
    /// The sum of the sizes of its regular files, each inode once.
    pub(super) logical_bytes: u64,
}

/// What a stream from one snapshot to the next tells of the two.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Glance {
    Equal,
    Different,
    /// Only reading tells: these inodes, or all where it is not known which.
    Unclear(Option<BTreeSet<u64>>),
}

/// Snapshots that were taken and have no record yet. They are destroyed unless they are published.
struct Taken<'a> {
    pool: &'a Pool,
    names: Vec<String>,
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        for name in &self.names {
            self.pool.delete_snapshot(name);
        }
    }
}

impl Pool {
    /// Takes all snapshots first, so that nothing is published when one of them fails.
    pub(super) fn snapshot(self: &Arc<Self>, requests: &[SnapshotRequest]) -> Result<Vec<SnapshotReport>> {
        let taken = self.again_if_gone(|| self.try_snapshot(requests));
        self.settle_views();
        taken
    }

    fn try_snapshot(self: &Arc<Self>, requests: &[SnapshotRequest]) -> Result<Vec<SnapshotReport>> {
        let volumes = requests.iter().map(|request| self.known(OPERATION, request.volume));
        let volumes = volumes.collect::<Result<Vec<_>>>()?;
        for (request, volume) in requests.iter().zip(&volumes) {
            if volume.has(request.snapshot.id) {
                return Err(Error::new(OPERATION, request.snapshot.id, ErrorKind::AlreadyExists));
            }
            self.sync_head(OPERATION, volume)?;
        }
        let before: Vec<_> = requests.iter().map(|request| self.before_adding(request.volume)).collect();
        let mut taken = self.take(requests)?;
        fault::point("zfs.snapshot.taken");
        let described = requests.iter().zip(&volumes).map(|(request, volume)| self.describe(request, volume));
        let described = described.collect::<Result<Vec<_>>>()?;
        drop(volumes);
        let _publishing = self.publishing();
        fault::point("zfs.snapshot.before-publish");
        let mut reports = Vec::new();
        for ((stored, request), before) in described.into_iter().zip(requests).zip(before) {
            let name = self.snapshot_name(SnapshotKey { volume: request.volume, snapshot: request.snapshot.id });
            let found = super::listing::Found { name: name.clone(), ..Default::default() };
            self.write_record(OPERATION, "snapshot", &found, &stored)?;
            taken.names.retain(|it| *it != name);
            fault::point("zfs.snapshot.published");
            self.added(before, &stored, None, false);
            reports.push(SnapshotReport { held: stored.held(request.volume), warnings: Vec::new() });
        }
        Ok(reports)
    }

    /// What programs wrote, the mapped pages among it, is in a snapshot only once the file system has it.
    pub(super) fn sync_head(&self, operation: &'static str, volume: &Volume) -> Result<()> {
        let path = self.mount_point(&volume.found.name);
        if !is_mounted(&path) {
            return Ok(());
        }
        let synced = File::open(&path).and_then(|dir| Ok(rustix::fs::syncfs(dir)?));
        synced.map_err(|error| Error::io(operation, volume.id(), error))
    }

    /// In one command, and so of one moment, where the program takes several.
    fn take(&self, requests: &[SnapshotRequest]) -> Result<Taken<'_>> {
        let mut taken = Taken { pool: self, names: Vec::new() };
        let pending = format!("{PENDING}=yes");
        let name =
            |it: &SnapshotRequest| self.snapshot_name(SnapshotKey { volume: it.volume, snapshot: it.snapshot.id });
        let names: Vec<String> = requests.iter().map(name).collect();
        let several = if self.abilities.modern { names.len().max(1) } else { 1 };
        for names in names.chunks(several) {
            let words = ["snapshot", "-o", &pending].into_iter().chain(names.iter().map(String::as_str));
            let done = self.programs.zfs_patiently(&words.collect::<Vec<_>>());
            done.map_err(|trouble: Trouble| trouble.into_error(OPERATION, names.join(" ")))?;
            taken.names.extend_from_slice(names);
        }
        Ok(taken)
    }

    fn describe(self: &Arc<Self>, request: &SnapshotRequest, volume: &Volume) -> Result<StoredSnapshot> {
        let key = SnapshotKey { volume: request.volume, snapshot: request.snapshot.id };
        let name = self.snapshot_name(key);
        let tip = self.tip(OPERATION, volume)?;
        let glance = match &tip {
            Some((tip, _)) => self.glance(&self.snapshot_name(*tip), &name),
            None => Glance::Different,
        };
        let (totals, equal) = match (&tip, glance) {
            (Some((_, known)), Glance::Equal) => (known.totals(), true),
            (tip, glance) => {
                let view = self.view(OPERATION, key)?;
                let totals = count(Root::open(view.path())?)?;
                let equal = match (tip, glance) {
                    (Some((tip, known)), Glance::Unclear(inodes)) if known.totals() == totals => {
                        let before = self.view(OPERATION, *tip)?;
                        let equal = are_equal(&Root::open(before.path())?, &Root::open(view.path())?, inodes.as_ref())?;
                        before.leave();
                        equal
                    }
                    _ => false,
                };
                view.leave();
                (totals, equal)
            }
        };
        let tip = tip.as_ref().map(|(tip, _)| tip.snapshot);
        let follows = tip.is_some() && request.snapshot.parents.first().copied() == tip;
        Ok(StoredSnapshot {
            sequence: volume.next_sequence(),
            unchanged: equal && follows,
            logical_bytes: totals.logical_bytes,
            entries: totals.entries,
            snapshot: request.snapshot.clone(),
        })
    }

    /// Returns the snapshot that a clean head equals, if the pool holds it.
    pub(super) fn tip(
        &self,
        operation: &'static str,
        volume: &Volume,
    ) -> Result<Option<(SnapshotKey, StoredSnapshot)>> {
        let Some(tip) = volume.tip() else { return Ok(None) };
        if let Some(own) = volume.newest() {
            return Ok(Some((tip, own.clone())));
        }
        match self.stored(operation, tip) {
            Ok(stored) => Ok(Some((tip, stored))),
            Err(error) if matches!(error.kind, ErrorKind::NotFound) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Tells whether a snapshot, by its name, holds what a snapshot of ours holds.
    pub(super) fn is_as(self: &Arc<Self>, operation: &'static str, snapshot: SnapshotKey, other: &str) -> Result<bool> {
        match self.glance(&self.snapshot_name(snapshot), other) {
            Glance::Equal => Ok(true),
            Glance::Different => Ok(false),
            Glance::Unclear(inodes) => {
                let one = self.view(operation, snapshot)?;
                let two = self.view_of(operation, other, format!("compared.{}", uuid::Uuid::now_v7()))?;
                are_equal(&Root::open(one.path())?, &Root::open(two.path())?, inodes.as_ref())
            }
        }
    }

    /// Looks at what would be sent. That costs what was changed, not what is there.
    fn glance(&self, base: &str, other: &str) -> Glance {
        let Ok(running) = self.programs.start_zfs(&["send", "-i", base, other], Input::Nothing) else {
            return Glance::Unclear(None);
        };
        let (mut reader, mut passed) = (Reader::of_short(), 0);
        let mut buffer = vec![0; PIECE];
        if let Some(mut stdout) = running.take_stdout() {
            while let Ok(length @ 1..) = read(&mut stdout, &mut buffer) {
                passed += length;
                if reader.take(&buffer[..length]).is_err() {
                    return Glance::Unclear(None);
                }
                if passed > GLANCE_BYTES {
                    return Glance::Different;
                }
            }
        }
        match running.finish().is_ok() && reader.end().is_some() {
            true if !reader.changes() => Glance::Equal,
            true => Glance::Unclear(Some(reader.into_objects())),
            false => Glance::Unclear(None),
        }
    }

    /// Lists how a snapshot differs from what was taken. The file system holds it unchanged by itself; with contents, all is
    /// read, and with that the checksum of every block is compared.
    pub(super) fn verify(self: &Arc<Self>, key: SnapshotKey, compare: Compare) -> Result<Vec<Finding>> {
        const OPERATION: &str = "verify snapshot";
        let stored = self.stored(OPERATION, key)?;
        if compare == Compare::Metadata {
            return Ok(Vec::new());
        }
        let view = self.view(OPERATION, key)?;
        let mut findings = Vec::new();
        let mut totals = Totals { entries: 0, logical_bytes: 0 };
        let mut walk = Walk::new(Root::open(view.path())?, Links::ByInode);
        while let Some(entry) = walk.next() {
            let entry = entry?;
            totals.add(&entry);
            if findings.len() < FINDINGS_LIMIT && matches!(entry.kind, EntryKind::File { .. }) {
                let file = walk.open_last(OFlags::RDONLY | OFlags::NONBLOCK)?;
                if let Err(error) = io::copy(&mut File::from(file), &mut io::sink()) {
                    let what = format!("it cannot be read: {error}");
                    findings.push(Finding { path: entry.path.to_string(), what });
                }
            }
        }
        let known = stored.totals();
        if totals != known {
            let what = format!(
                "it holds {} entries and {} bytes, where {} and {} were counted",
                totals.entries, totals.logical_bytes, known.entries, known.logical_bytes
            );
            findings.push(Finding { path: ".".to_owned(), what });
        }
        Ok(findings)
    }
}

impl Totals {
    fn add(&mut self, entry: &Entry) {
        self.entries += 1;
        if let EntryKind::File { size } = entry.kind {
            self.logical_bytes += size;
        }
    }
}

/// Counts a tree.
pub(super) fn count(root: Root) -> Result<Totals> {
    let mut totals = Totals { entries: 0, logical_bytes: 0 };
    for entry in Walk::with(root, Links::ByInode, Motion::Still, Attributes::OnDemand) {
        totals.add(&entry?);
    }
    Ok(totals)
}

/// Compares two snapshots of one volume. Files are read where their inodes are among those given, or none are given: times
/// are no proof, since zfs-fuse keeps whole seconds.
fn are_equal(one: &Root, two: &Root, inodes: Option<&BTreeSet<u64>>) -> Result<bool> {
    let mut left = Walk::new(one.try_clone()?, Links::ByInode);
    let mut right = Walk::new(two.try_clone()?, Links::ByInode);
    loop {
        let (a, b) = match (left.next().transpose()?, right.next().transpose()?) {
            (None, None) => return Ok(true),
            (Some(a), Some(b)) => (a, b),
            _ => return Ok(false),
        };
        if a.path != b.path || a.kind != b.kind || !a.has_metadata_of(&b) {
            return Ok(false);
        }
        let is_file = matches!(a.kind, EntryKind::File { .. });
        if is_file && inodes.is_none_or(|inodes| a.stat.ino != b.stat.ino || inodes.contains(&b.stat.ino)) {
            let open = |walk: &mut Walk| walk.open_last(OFlags::RDONLY | OFlags::NONBLOCK).map(File::from);
            if !same_contents(open(&mut left)?, open(&mut right)?)
                .map_err(|error| Error::io("compare", a.path.to_string(), error))?
            {
                return Ok(false);
            }
        }
    }
}

fn same_contents(mut one: File, mut two: File) -> io::Result<bool> {
    let (mut left, mut right) = (vec![0; PIECE], vec![0; PIECE]);
    loop {
        let length = fill(&mut one, &mut left)?;
        if fill(&mut two, &mut right)? != length || left[..length] != right[..length] {
            return Ok(false);
        }
        if length < PIECE {
            return Ok(true);
        }
    }
}

/// Reads until the buffer is full or the file ends.
fn fill(from: &mut impl io::Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut length = 0;
    while length < buffer.len() {
        match read(from, &mut buffer[length..])? {
            0 => break,
            read => length += read,
        }
    }
    Ok(length)
}

/// Reads again when a signal came between.
pub(super) fn read(from: &mut impl io::Read, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        match from.read(buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

/// Makes all that was written beneath a path durable.
pub(super) fn sync(operation: &'static str, path: &Path) -> Result<()> {
    let synced = File::open(path).and_then(|dir| Ok(rustix::fs::syncfs(dir)?));
    synced.map_err(|error| Error::io(operation, path.display(), error))
}
