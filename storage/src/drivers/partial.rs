//! Receives that can go on after a restart: the record that one keeps in its place in a pool's `staging/`.
//!
//! Owns the names of such places, the record in them and how far a running receive is. Refuses to know how a driver makes
//! and clears its places. A place is `staging/receive-<volume>-<snapshot>/`; from the first checkpoint of its stream on it
//! has a record, and without one it is nothing but rubbish of a process that died.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use crate::{
    delta::{Partial, ReceiveRequest, ResumePoint},
    error::{Error, ErrorKind, Result},
    fault,
    model::{SnapshotId, VolumeId},
    records::{self, RecordError},
    tree::checkpoints::OnCheckpoint,
};

const RECORD: &str = "receive.json";

/// Returns how the place of a receive is called.
pub(super) fn place(volume: VolumeId, snapshot: SnapshotId) -> String {
    format!("receive-{volume}-{snapshot}")
}

/// Reads the record of a place; `tree` is where in it the files arrive.
pub(super) fn read(path: &Path, tree: &str) -> std::result::Result<Partial, RecordError> {
    let partial: Partial = records::read("receive", &path.join(RECORD))?;
    let name = place(partial.volume, partial.snapshot.id);
    if path.file_name().is_none_or(|it| it.to_str() != Some(&name)) || !path.join(tree).is_dir() {
        return Err(RecordError::Damaged("it does not belong here".to_owned()));
    }
    Ok(partial)
}

/// Undoes what a commit had begun before the process died, so that the receive can go on: `incoming` is the folder in
/// the place that becomes the snapshot's. A place without a record, and one where nothing was begun, stay as they are.
pub(super) fn take_back(path: &Path, incoming: &str) -> io::Result<()> {
    let volume = path.join("volume");
    if !path.join(RECORD).exists() || !volume.exists() {
        return Ok(());
    }
    let snapshots = volume.join("snapshots");
    if snapshots.exists() {
        for entry in fs::read_dir(snapshots)? {
            fs::rename(entry?.path(), path.join(incoming))?;
        }
    }
    fs::remove_dir_all(volume)
}

/// Clears away what a commit writes beside the files: the next one writes it again.
pub(super) fn clear_beside(tree: &Path) -> io::Result<()> {
    let Some(folder) = tree.parent() else { return Ok(()) };
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path != tree {
            fs::remove_file(path)?;
        }
    }
    Ok(())
}

/// Lists the places of all receives for a volume.
pub(super) fn places(staging: &Path, volume: VolumeId) -> io::Result<Vec<PathBuf>> {
    let prefix = format!("receive-{volume}-");
    let mut places = Vec::new();
    for entry in fs::read_dir(staging)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(&prefix) {
            places.push(entry.path());
        }
    }
    Ok(places)
}

/// Returns what an interrupted receive for a volume left.
pub(super) fn find(staging: &Path, volume: VolumeId, tree: &str) -> io::Result<Option<Partial>> {
    Ok(places(staging, volume)?.iter().find_map(|path| read(path, tree).ok()))
}

/// Checks that a place holds what a request wants to go on with; returns how many bytes of it were taken in.
pub(super) fn check(path: &Path, tree: &str, request: &ReceiveRequest, point: &ResumePoint) -> Result<u64> {
    let stale = |why: &str| Error::new("receive snapshot", request.snapshot.id, ErrorKind::ResumeStale(why.to_owned()));
    let partial = read(path, tree).map_err(|_| stale("nothing was kept of this receive"))?;
    if partial.snapshot != request.snapshot || partial.base != request.base || partial.format != request.format {
        return Err(stale("what was kept is of another step"));
    }
    if partial.point != *point {
        return Err(stale("what was kept ends elsewhere"));
    }
    Ok(partial.received_bytes)
}

/// How far a receive is, shared with its checkpoints.
pub(super) struct Progress {
    received_bytes: AtomicU64,
    kept: Mutex<Option<ResumePoint>>,
}

impl Progress {
    pub(super) fn new(received_bytes: u64, kept: Option<ResumePoint>) -> Arc<Self> {
        Arc::new(Self { received_bytes: received_bytes.into(), kept: Mutex::new(kept) })
    }

    pub(super) fn took(&self, bytes: usize) {
        self.received_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Returns the last checkpoint.
    pub(super) fn kept(&self) -> Option<ResumePoint> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Returns what keeps each checkpoint durably, once the tree is.
    pub(super) fn recorder(
        self: &Arc<Self>,
        request: &ReceiveRequest,
        dir: &Path,
        fault_point: &'static str,
    ) -> OnCheckpoint {
        let (progress, dir) = (Arc::clone(self), dir.to_owned());
        let (volume, snapshot, base, format) =
            (request.volume.id, request.snapshot.clone(), request.base, request.format.clone());
        Box::new(move |point| {
            let received_bytes = progress.received_bytes.load(Ordering::Relaxed);
            let (snapshot, format) = (snapshot.clone(), format.clone());
            let partial = Partial { volume, snapshot, base, format, point, received_bytes };
            let (progress, dir) = (Arc::clone(&progress), dir.clone());
            Box::new(move || {
                records::write("receive", &dir, RECORD, &partial)
                    .map_err(|error| Error::io("keep the checkpoint of", volume, error))?;
                *progress.kept.lock().unwrap_or_else(PoisonError::into_inner) = Some(partial.point);
                fault::point(fault_point);
                Ok(())
            })
        })
    }
}
