//! A stream of the tree format on its way into the pool: applied to a dataset in `ROOT/incoming`.
//!
//! That dataset is a clone of what the delta builds on, or a new one. An increment of a volume is grafted onto a clone of the
//! volume's newest snapshot, since it follows that one in the pool. Where the base is an older snapshot (the sender has
//! destroyed what came after it), the clone is first made to hold what the base holds.

use std::{fs, path::PathBuf, sync::Arc};

use super::{
    pool::Pool,
    program::{Class, Trouble},
    receive::{Destination, OPERATION, Task},
    snapshot::{count, sync},
    view::View,
    volume::{StoredSnapshot, Volume},
};
use crate::{
    delta::Compare,
    driver::Finding,
    error::{Error, ErrorKind, Result},
    model::SnapshotKey,
    tree::{
        apply::{Applier, Sharing},
        root::Root,
        walk::Links,
        write::{DeltaWriter, Side},
    },
};
use bytes::Bytes;

/// A receive of a tree. The fields go in this order: first the files are closed.
pub(super) struct Graft {
    applier: Option<Applier>,
    base: Option<View>,
    stage: Stage,
}

/// The dataset in `incoming`, destroyed when dropped, unless it was published: then it has another name.
struct Stage {
    pool: Arc<Pool>,
    dataset: String,
    path: PathBuf,
    is_published: bool,
}

impl Drop for Stage {
    fn drop(&mut self) {
        if !self.is_published {
            self.pool.delete(&self.dataset);
        }
    }
}

impl Graft {
    pub(super) fn open(task: &Task) -> Result<Self> {
        let pool = &task.pool;
        let dataset = task.incoming();
        let from = match &task.destination {
            Destination::New => task.request.base,
            Destination::Volume(volume) => Some(top_of(task, volume)?),
        };
        let make = || match from {
            Some(from) => {
                let words = ["clone", "-o", "canmount=noauto", "-o", "readonly=off"];
                let name = pool.snapshot_name(from);
                pool.programs.zfs_patiently(&[&words[..], &[&name, &dataset]].concat())
            }
            None => pool.programs.zfs(&["create", "-o", "canmount=noauto", "-o", "readonly=off", &dataset]),
        };
        let made = match make() {
            // What an earlier attempt left, where it could not be destroyed then.
            Err(trouble) if trouble.class == Class::Exists => {
                pool.delete(&dataset);
                make()
            }
            made => made,
        };
        made.map_err(|trouble: Trouble| task.trouble(trouble))?;
        let path = pool.mount_point(&dataset);
        let stage = Stage { pool: Arc::clone(pool), dataset, path, is_published: false };
        pool.mount(&stage.dataset).map_err(|trouble| task.trouble(trouble))?;
        let base = match task.request.base {
            Some(base) => Some(pool.view(OPERATION, base)?),
            None => {
                clear(&stage.path).map_err(|error| Error::io(OPERATION, stage.path.display(), error))?;
                None
            }
        };
        if let (Destination::Volume(volume), Some(from), Some(base)) = (&task.destination, from, &base)
            && volume.changed_after(task.request.base.unwrap_or(from).snapshot)
        {
            let top = pool.view(OPERATION, from)?;
            put_back(pool, &stage, &top, base)?;
        }
        let root = base.as_ref().map(|view| Root::open(view.path())).transpose()?;
        let destination = Root::open(&stage.path)?;
        let applier = Applier::new(destination, root, Sharing::Exclusive, None, None)?;
        Ok(Self { applier: Some(applier), base, stage })
    }

    pub(super) fn write(&mut self, chunk: Bytes) -> Result<()> {
        match &mut self.applier {
            Some(applier) => applier.feed(chunk),
            None => Err(Error::new(OPERATION, "stream", ErrorKind::Corrupt("the receive failed before".to_owned()))),
        }
    }

    /// Returns what could not be kept so far.
    pub(super) fn take_findings(&mut self) -> Vec<Finding> {
        self.applier.as_mut().map(Applier::take_findings).unwrap_or_default()
    }

    pub(super) fn commit(mut self, task: &Task) -> Result<StoredSnapshot> {
        let pool = &task.pool;
        let Some(applier) = self.applier.take() else {
            return Err(task.failed(ErrorKind::Corrupt("the receive failed before".to_owned())));
        };
        for finding in applier.finish()?.findings {
            tracing::warn!(snapshot = %task.request.snapshot.id, path = finding.path, "not kept: {}", finding.what);
        }
        drop(self.base.take());
        sync(OPERATION, &self.stage.path)?;
        let totals = count(Root::open(&self.stage.path)?)?;
        pool.unmount(&self.stage.path).map_err(|trouble| task.trouble(trouble))?;
        let name = format!("{}@{}", self.stage.dataset, task.request.snapshot.id);
        pool.programs.zfs_patiently(&["snapshot", &name]).map_err(|trouble| task.trouble(trouble))?;
        let same = match task.request.base.filter(|_| task.follows()) {
            Some(base) => pool.is_as(OPERATION, base, &name)?,
            None => false,
        };
        let stored = StoredSnapshot {
            sequence: task.sequence(),
            unchanged: same,
            logical_bytes: totals.logical_bytes,
            entries: totals.entries,
            snapshot: task.request.snapshot.clone(),
        };
        match &task.destination {
            Destination::New => pool.publish_new(task, &stored)?,
            Destination::Volume(volume) => pool.publish_in_place(task, volume, &stored)?,
        }
        self.stage.is_published = true;
        Ok(stored)
    }
}

/// Returns the snapshot that an increment of a volume is grafted onto: its newest.
fn top_of(task: &Task, volume: &Volume) -> Result<SnapshotKey> {
    volume.tip().ok_or_else(|| {
        let why = "the volume is there and has no snapshot; destroy it first".to_owned();
        task.failed(ErrorKind::Unsupported(why))
    })
}

/// Has a stage, a clone of `top`, hold what `base` holds. Only what differs is written.
fn put_back(pool: &Pool, stage: &Stage, top: &View, base: &View) -> Result<()> {
    let side = |view: &View| Ok::<_, Error>(Side { root: Root::open(view.path())?, links: Links::ByInode });
    // zfs-fuse keeps whole seconds: a file that was rewritten right after a snapshot looks the same.
    let compare = if pool.abilities.modern { Compare::Metadata } else { Compare::Contents };
    let mut writer = DeltaWriter::new(Some(side(top)?), side(base)?, compare, None)?;
    let (destination, root) = (Root::open(&stage.path)?, Root::open(top.path())?);
    let mut applier = Applier::new(destination, Some(root), Sharing::Exclusive, None, None)?;
    while let Some(chunk) = writer.next_chunk()? {
        applier.feed(chunk)?;
    }
    applier.finish()?;
    Ok(())
}

/// Removes what is in a directory.
fn clear(path: &std::path::Path) -> std::io::Result<()> {
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() { fs::remove_dir_all(entry.path())? } else { fs::remove_file(entry.path())? }
    }
    Ok(())
}
