//! Taking snapshots of heads, and what is written down of a read-only subvolume so that a change of it is noticed.

use std::{io, path::Path, sync::Arc};

use super::{
    catalog::StoredSnapshot,
    pool::{Pool, Stage},
    subvolume::{self, GAP_INODE, Mode, Trouble},
};
use crate::{
    delta::Compare,
    driver::{Finding, SnapshotReport, SnapshotRequest},
    drivers::{
        folder::make_dir,
        published::{Histories, Record},
    },
    error::{Error, ErrorKind, Result},
    fault,
    model::SnapshotKey,
    tree::{
        entry::EntryKind,
        root::Root,
        walk::{Attributes, Links, Motion, Walk},
    },
};

const OPERATION: &str = "take snapshot of";

/// How many nested subvolumes an error names.
const NAMED_LIMIT: usize = 20;

/// How many findings one verify returns at most.
const FINDINGS_LIMIT: usize = 1000;

/// Totals of a tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Totals {
    /// Its entries, the root included, sockets not.
    pub(super) entries: u64,
    /// The sum of the sizes of its regular files, each inode once.
    pub(super) logical_bytes: u64,
}

/// A snapshot made in staging.
struct Prepared {
    stage: Stage,
    key: SnapshotKey,
    stored: StoredSnapshot,
}

impl Trouble {
    pub(super) fn into_error(self, operation: &'static str, object: impl std::fmt::Display) -> Error {
        let kind = match self {
            Self::Program(error) => error.into_kind(),
            Self::Io(error) => ErrorKind::from_io(error),
            Self::Stream(error) => ErrorKind::Corrupt(error.to_string()),
        };
        Error::new(operation, object, kind)
    }
}

impl Pool {
    /// Makes all snapshots in staging first, so that nothing is published when one of them fails.
    pub(super) fn snapshot(self: &Arc<Self>, requests: &[SnapshotRequest]) -> Result<Vec<SnapshotReport>> {
        let prepared = requests.iter().map(|request| self.prepare(request)).collect::<Result<Vec<_>>>()?;
        self.sync(OPERATION)?;
        let _publishing = self.publishing();
        fault::point("btrfs.snapshot.before-publish");
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
        let dir = stage.path().join("snapshot");
        make_dir(&dir).map_err(failed)?;
        let tree = dir.join("tree");
        subvolume::snapshot(&self.head_dir(volume), &tree, Mode::ReadOnly)
            .map_err(|error| Error::new(OPERATION, volume, error.into_kind()))?;
        let tip = self.tip(volume)?;
        let known = match tip {
            Some(tip) if self.is_as(tip, &tree)? => Some(self.stored(OPERATION, tip)?),
            _ => None,
        };
        let totals = match &known {
            Some(known) => Totals { entries: known.entries, logical_bytes: known.logical_bytes },
            None => count(OPERATION, &tree)?,
        };
        let tip = tip.map(|tip| tip.snapshot);
        let follows = tip.is_some() && request.snapshot.parents.first().copied() == tip;
        let stored = self.describe(OPERATION, &tree, request, totals, known.is_some() && follows)?;
        stored.write(&dir).map_err(failed)?;
        Ok(Prepared { stage, key, stored })
    }

    fn describe(
        &self,
        operation: &'static str,
        tree: &Path,
        request: &SnapshotRequest,
        totals: Totals,
        unchanged: bool,
    ) -> Result<StoredSnapshot> {
        self.sync(operation)?;
        let header = subvolume::probe(tree).map_err(|error| error.into_error(operation, request.snapshot.id))?;
        Ok(StoredSnapshot {
            sequence: self.next_sequence(operation, request.volume)?,
            unchanged,
            logical_bytes: totals.logical_bytes,
            entries: totals.entries,
            identity: header.uuid,
            ctransid: header.ctransid,
            snapshot: request.snapshot.clone(),
        })
    }

    fn publish_snapshot(&self, prepared: Prepared) -> Result<SnapshotReport> {
        let Prepared { stage, key, stored } = prepared;
        let change = self.published.change(key.volume);
        stage.publish(OPERATION, "snapshot", &self.snapshot_dir(key))?;
        change.added(&self.snapshots_dir(key.volume), &stored);
        fault::point("btrfs.snapshot.published");
        Ok(SnapshotReport { held: stored.held(key.volume), warnings: Vec::new() })
    }

    /// Tells whether a read-only subvolume holds what a snapshot holds. Where it cannot be found out, it does not.
    pub(super) fn is_as(&self, snapshot: SnapshotKey, tree: &Path) -> Result<bool> {
        if self.tampering(OPERATION, snapshot)?.is_some() {
            return Ok(false);
        }
        subvolume::are_equal(&self.tree_dir(snapshot), tree).or_else(|error| {
            tracing::warn!(snapshot = %snapshot.snapshot, %error, "it cannot be compared with its successor");
            Ok(false)
        })
    }

    /// Says how a snapshot differs from what its record says of it.
    pub(super) fn tampering(&self, operation: &'static str, key: SnapshotKey) -> Result<Option<String>> {
        let stored = self.stored(operation, key)?;
        let found = match subvolume::probe(&self.tree_dir(key)) {
            Ok(header) if header.uuid != stored.identity => Some("another subvolume lies in its place"),
            Ok(header) if header.ctransid != stored.ctransid => Some("it was written to"),
            Ok(_) => None,
            Err(trouble) if trouble.is_of_writable() => Some("it is no longer read-only"),
            Err(error) => return Err(error.into_error(operation, key.snapshot)),
        };
        Ok(found.map(str::to_owned))
    }

    pub(super) fn refuse_tampered(&self, operation: &'static str, key: SnapshotKey) -> Result<()> {
        match self.tampering(operation, key)? {
            None => Ok(()),
            Some(what) => Err(Error::new(operation, key.snapshot, ErrorKind::Tampered { path: ".".into(), what })),
        }
    }

    /// Lists how a snapshot differs from what was taken. With contents, all is read: the file system knows the checksum of
    /// every block.
    pub(super) fn verify(&self, key: SnapshotKey, compare: Compare) -> Result<Vec<Finding>> {
        const OPERATION: &str = "verify snapshot";
        let finding = |path: String, what: String| Finding { path, what };
        let mut findings: Vec<_> =
            self.tampering(OPERATION, key)?.map(|what| finding(".".to_owned(), what)).into_iter().collect();
        if compare == Compare::Metadata {
            return Ok(findings);
        }
        let mut walk = Walk::new(Root::open(self.tree_dir(key))?, Links::ByInode);
        while let Some(entry) = walk.next() {
            let entry = entry?;
            if findings.len() >= FINDINGS_LIMIT {
                break;
            }
            if matches!(entry.kind, EntryKind::File { .. }) {
                let file = walk.open_last(rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::NONBLOCK)?;
                if let Err(error) = io::copy(&mut std::fs::File::from(file), &mut io::sink()) {
                    findings.push(finding(entry.path.to_string(), format!("it cannot be read: {error}")));
                }
            }
        }
        Ok(findings)
    }
}

/// Counts a tree, and refuses one that has gaps: a snapshot leaves out the subvolumes inside a volume.
pub(super) fn count(operation: &'static str, tree: &Path) -> Result<Totals> {
    let mut totals = Totals { entries: 0, logical_bytes: 0 };
    let (mut gaps, mut named) = (0, Vec::new());
    for entry in Walk::with(Root::open(tree)?, Links::ByInode, Motion::Still, Attributes::OnDemand) {
        let entry = entry?;
        totals.entries += 1;
        match entry.kind {
            EntryKind::File { size } => totals.logical_bytes += size,
            EntryKind::Directory if entry.stat.ino == GAP_INODE => {
                gaps += 1;
                if named.len() < NAMED_LIMIT {
                    named.push(entry.path.to_string());
                }
            }
            _ => {}
        }
    }
    if gaps == 0 {
        return Ok(totals);
    }
    let more = if gaps > named.len() { format!(" and {} more", gaps - named.len()) } else { String::new() };
    let why = format!(
        "the volume holds {gaps} subvolume(s), which a snapshot would leave out: {}{more}; make them directories",
        named.join(", ")
    );
    Err(Error::new(operation, tree.display(), ErrorKind::Unsupported(why)))
}
