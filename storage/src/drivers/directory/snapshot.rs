//! Taking snapshots of heads: what did not change is linked to the previous snapshot, the rest is copied.
//!
//! Two passes. The first walks the head beside its baseline, makes the tree in staging and writes the next baseline (what
//! each file was when it was copied). The second walks the new tree beside that baseline and writes its inventory.
//! See docs/adr/0001-unchanged-files-are-hard-linked.md.

use std::{fs::File, io, sync::Arc};

use rustix::fs::OFlags;

use super::{
    catalog::StoredSnapshot,
    compare::{Joined, Likeness, Pair, Trust, same_contents},
    head::{Reference, baseline_name, drop_other_baselines, file_system_time, inode, logical_bytes},
    pool::{Pool, Stage},
    verify::digest_beneath,
};
use crate::{
    delta::Compare,
    driver::{Finding, SnapshotReport, SnapshotRequest},
    drivers::{
        folder::{make_dir, sync_file_system},
        published::{Histories, Record},
    },
    error::{Error, ErrorKind, Result},
    fault,
    model::{SnapshotKey, VolumeId},
    records::sync_dir,
    tree::{
        copy::{Copied, Copier, How},
        entry::{Entry, EntryKind, Time},
        inventory::{InventoryEntry, InventoryReader, InventoryWriter},
        root::Root,
        walk::{Links, Walk},
    },
};

const OPERATION: &str = "take snapshot of";

/// A snapshot made in staging.
struct Prepared {
    stage: Stage,
    key: SnapshotKey,
    baseline: String,
    stored: StoredSnapshot,
    warnings: Vec<Finding>,
}

impl Pool {
    /// Makes all snapshots in staging first, so that nothing is published when one of them fails.
    pub(super) fn snapshot(self: &Arc<Self>, requests: &[SnapshotRequest]) -> Result<Vec<SnapshotReport>> {
        let prepared = requests.iter().map(|request| self.prepare(request)).collect::<Result<Vec<_>>>()?;
        self.sync(OPERATION)?;
        let _publishing = self.publishing();
        fault::point("directory.snapshot.before-publish");
        prepared.into_iter().map(|prepared| self.publish_snapshot(prepared)).collect()
    }

    fn prepare(self: &Arc<Self>, request: &SnapshotRequest) -> Result<Prepared> {
        let volume = request.volume;
        let key = SnapshotKey { volume, snapshot: request.snapshot.id };
        self.volume(OPERATION, volume)?;
        if self.snapshot_dir(key).exists() {
            return Err(Error::new(OPERATION, request.snapshot.id, ErrorKind::AlreadyExists));
        }
        self.materialise_head(OPERATION, volume)?;
        let failed = |error: io::Error| Error::io(OPERATION, volume, error);
        let stage = self.stage(OPERATION, "snapshot")?;
        make_dir(&stage.path().join("snapshot")).map_err(failed)?;
        make_dir(&stage.path().join("snapshot/tree")).map_err(failed)?;
        let head = self.head_dir(volume);
        let taken = file_system_time(stage.path()).map_err(failed)?;
        // A page that is mapped and dirty is written to without a new ctime. Writing it back takes the right to write
        // from it, so that the next store faults and stamps the file. `taken` lies before: stores that come in between
        // have a ctime that counts as too recent to prove anything.
        sync_file_system(&head).map_err(failed)?;
        let tip = self.tip(volume)?;
        let mut made = Making::start(self, &stage, volume, tip, request.compare)?.run()?;
        if !write_inventory(&stage, Previous::Linked)? {
            // A file that was linked is not what it was when its snapshot was taken. The head still has the right one.
            let again = stage.path().join("snapshot");
            self.clear_away(&again);
            make_dir(&again).and_then(|()| make_dir(&again.join("tree"))).map_err(failed)?;
            std::fs::remove_file(stage.path().join("baseline")).map_err(failed)?;
            made = Making::start(self, &stage, volume, None, request.compare)?.run()?;
            let what = "files of the previous snapshot were changed after it was taken; nothing was shared with it";
            made.warnings.push(Finding { path: ".".to_owned(), what: what.to_owned() });
            write_inventory(&stage, Previous::Untouched)?;
        }
        let Made { changed, logical_bytes, mut warnings } = made;
        let tip = tip.map(|tip| tip.snapshot);
        let stored = StoredSnapshot {
            sequence: self.next_sequence(OPERATION, volume)?,
            unchanged: !changed && tip.is_some() && request.snapshot.parents.first().copied() == tip,
            logical_bytes,
            snapshot: request.snapshot.clone(),
        };
        stored.stage(&stage.path().join("snapshot")).map_err(failed)?;
        let baseline = baseline_name(request.snapshot.id, inode(&head).map_err(failed)?, taken);
        warnings.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(Prepared { stage, key, baseline, stored, warnings })
    }

    fn publish_snapshot(&self, prepared: Prepared) -> Result<SnapshotReport> {
        let Prepared { stage, key, baseline, stored, warnings } = prepared;
        let baselines = self.baselines_dir(key.volume);
        // It counts from the moment on when its snapshot is there.
        std::fs::rename(stage.path().join("baseline"), baselines.join(&baseline))
            .and_then(|()| sync_dir(&baselines))
            .map_err(|error| Error::io(OPERATION, key.volume, error))?;
        fault::point("directory.snapshot.baseline-placed");
        let change = self.published.change(key.volume);
        stage.publish(OPERATION, "snapshot", &self.snapshot_dir(key))?;
        change.added(&self.snapshots_dir(key.volume), &stored);
        fault::point("directory.snapshot.published");
        drop_other_baselines(&baselines, &baseline);
        Ok(SnapshotReport { held: stored.held(key.volume), warnings })
    }
}

/// The first pass.
struct Making {
    head: Root,
    previous: Option<Root>,
    trust: Trust,
    compare: Compare,
    joined: Joined,
    tree: Root,
    copier: Copier,
    baseline: InventoryWriter,
    changed: bool,
    logical_bytes: u64,
    warnings: Vec<Finding>,
    copied: u64,
    linked: u64,
}

/// What the first pass found.
struct Made {
    changed: bool,
    logical_bytes: u64,
    warnings: Vec<Finding>,
}

impl Making {
    fn start(pool: &Pool, stage: &Stage, volume: VolumeId, tip: Option<SnapshotKey>, compare: Compare) -> Result<Self> {
        let head = Root::open(pool.head_dir(volume))?;
        let (previous, known, trust) = match tip {
            None => (None, None, Trust::No),
            Some(tip) => {
                let Reference { inventory, trust } = pool.reference(volume, tip)?;
                (Some(Root::open(pool.tree_dir(tip))?), Some(inventory), trust)
            }
        };
        Ok(Self {
            joined: Joined::with_head(head.try_clone()?, known),
            head,
            previous,
            trust,
            compare,
            copier: Copier::new(Root::open(stage.path().join("snapshot/tree"))?),
            tree: Root::open(stage.path().join("snapshot/tree"))?,
            baseline: InventoryWriter::create(&stage.path().join("baseline"))?,
            changed: false,
            logical_bytes: 0,
            warnings: Vec::new(),
            copied: 0,
            linked: 0,
        })
    }

    fn run(mut self) -> Result<Made> {
        while let Some(pair) = self.joined.next()? {
            match pair {
                Pair::Gone(_) => self.changed = true,
                Pair::New(mut entry) => {
                    self.changed = true;
                    self.joined.walk().load_attributes(&mut entry)?;
                    self.copy(&entry)?;
                }
                Pair::Both(entry, record) => self.keep(entry, *record)?,
            }
        }
        self.warnings.append(&mut self.joined.walk().take_findings());
        self.warnings.append(&mut self.copier.finish()?);
        self.baseline.finish()?;
        tracing::debug!(linked = self.linked, copied = self.copied, "snapshot made");
        Ok(Made { changed: self.changed, logical_bytes: self.logical_bytes, warnings: self.warnings })
    }

    fn keep(&mut self, mut entry: Entry, record: InventoryEntry) -> Result<()> {
        let same = match self.joined.judge(&mut entry, &record, self.trust, self.compare)? {
            Likeness::Same => true,
            Likeness::Different => false,
            Likeness::Unclear => {
                match (self.joined.walk().open_last(OFlags::RDONLY | OFlags::NONBLOCK), &self.previous) {
                    (Ok(live), Some(previous)) => same_contents(File::from(live), &entry, previous).unwrap_or(false),
                    // Whatever it is, the copy says it better.
                    _ => false,
                }
            }
        };
        if !same {
            self.changed = true;
            return self.copy(&entry);
        }
        // A further name of an inode is linked inside the new tree, never to the previous one: that keeps the groups.
        if is_linkable(&entry.kind)
            && let Some(previous) = &self.previous
            && matches!(self.copier.link(previous, &entry), Ok(How::Linked))
        {
            self.linked += 1;
            return self.add(entry, record.digest);
        }
        self.copy(&entry)
    }

    fn copy(&mut self, entry: &Entry) -> Result<()> {
        let Copied { entry: mut copied, how, steady, digest } = self.copier.copy(&self.head, entry)?;
        match how {
            How::LeftOut => {
                self.changed = true;
                return Ok(());
            }
            How::Reflinked | How::Copied => self.copied += 1,
            How::Linked | How::Made => {}
        }
        if !steady {
            let what = "it changed again and again while it was copied".to_owned();
            self.warnings.push(Finding { path: entry.path.to_string(), what });
            // What was copied is of no one moment, so the next snapshot must not take it as unchanged.
            copied.stat.ctime = Time::default();
        }
        self.add(copied, digest)
    }

    fn add(&mut self, entry: Entry, known: Option<[u8; 32]>) -> Result<()> {
        self.logical_bytes += logical_bytes(&entry.kind);
        let digest = match (known, &entry.kind, self.compare) {
            // Who has every file read has every file's digest kept.
            (None, EntryKind::File { .. }, Compare::Contents) => digest_beneath(&self.tree, &entry.path)?,
            _ => known,
        };
        self.baseline.add(InventoryEntry { entry, origin: None, digest })
    }
}

/// Whether files of the previous snapshot became part of the new one.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Previous {
    Linked,
    Untouched,
}

/// The second pass: the new tree as it lies there, with the groups and digests that the baseline knows. `false`: a file
/// is not what the baseline says, and no inventory was written.
fn write_inventory(stage: &Stage, previous: Previous) -> Result<bool> {
    let known = InventoryReader::open(&stage.path().join("baseline"))?;
    let tree = Root::open(stage.path().join("snapshot/tree"))?;
    let mut writer = InventoryWriter::create(&stage.path().join("snapshot/inventory"))?;
    let mut walk = Walk::new(tree, Links::Inventory(Box::new(known)));
    while let Some(entry) = walk.next() {
        let entry = entry?;
        let record = walk.recorded();
        // What lies there may be of another kind by now; what was to lie there says whether it may have been linked.
        let linked = record.filter(|record| previous == Previous::Linked && is_linkable(&record.entry.kind));
        if linked.is_some_and(|record| !is_faithful(&entry, &record.entry)) {
            return Ok(false);
        }
        let digest = record.and_then(|record| record.digest);
        writer.add(InventoryEntry { entry, origin: None, digest })?;
    }
    writer.finish()?;
    Ok(true)
}

/// Tells whether an entry that did not change becomes a further name of the previous snapshot's.
fn is_linkable(kind: &EntryKind) -> bool {
    !matches!(kind, EntryKind::Directory | EntryKind::HardLink { .. })
}

/// Compares what even a user who may not set owners can keep.
fn is_faithful(made: &Entry, wanted: &Entry) -> bool {
    let are_users = |xattr: &&(Vec<u8>, Vec<u8>)| xattr.0.starts_with(b"user.");
    made.kind == wanted.kind
        && made.mtime == wanted.mtime
        && made.mode & 0o777 == wanted.mode & 0o777
        && made.xattrs.iter().filter(are_users).eq(wanted.xattrs.iter().filter(are_users))
}
