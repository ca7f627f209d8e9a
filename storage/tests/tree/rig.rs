//! Shared by the tests: staging folders as the directory driver makes them, streams, and asserting equality.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use bytes::Bytes;
use flocker_storage::{
    delta::{CHUNK_LIMIT, Compare, ResumePoint},
    error::Result,
    tree::{
        apply::{Applied, Applier, Sharing},
        checkpoints::OnCheckpoint,
        copy::Copier,
        entry::EntryKind,
        listing::differences,
        root::Root,
        walk::{Links, Walk},
        write::{DeltaWriter, Side},
    },
};

pub(crate) fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("SKIPPED in part: owners, devices and trusted attributes need root");
    }
    root
}

pub(crate) struct Folder(tempfile::TempDir);

impl Folder {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    pub(crate) fn make(&self, name: &str) -> PathBuf {
        let path = self.path().join(name);
        fs::create_dir(&path).unwrap();
        path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // Read-only directories stop an ordinary user from removing the folder.
        fn open_up(path: &Path) {
            let Ok(found) = fs::symlink_metadata(path) else { return };
            if found.is_dir() {
                let _ = fs::set_permissions(path, fs::Permissions::from_mode(0o700));
                for entry in fs::read_dir(path).into_iter().flatten().flatten() {
                    open_up(&entry.path());
                }
            }
        }
        if !rustix::process::geteuid().is_root() {
            open_up(self.path());
        }
    }
}

pub(crate) fn side(path: &Path) -> Side {
    Side { root: Root::open(path).unwrap(), links: Links::ByInode }
}

pub(crate) fn writer(base: Option<&Path>, target: &Path, resume: Option<&ResumePoint>) -> Result<DeltaWriter> {
    DeltaWriter::new(base.map(side), side(target), Compare::Metadata, resume)
}

pub(crate) fn drain(mut writer: DeltaWriter) -> Vec<u8> {
    let mut stream = Vec::new();
    while let Some(chunk) = writer.next_chunk().unwrap() {
        assert!(!chunk.is_empty() && chunk.len() <= CHUNK_LIMIT, "a chunk of {} bytes", chunk.len());
        stream.extend_from_slice(&chunk);
    }
    stream
}

pub(crate) fn delta(base: Option<&Path>, target: &Path) -> Vec<u8> {
    drain(writer(base, target, None).unwrap())
}

pub(crate) type Points = Arc<Mutex<Vec<ResumePoint>>>;

pub(crate) fn applier(
    dest: &Path,
    base: Option<&Path>,
    sharing: Sharing,
    resume: Option<ResumePoint>,
    points: &Points,
) -> Result<Applier> {
    let points = Arc::clone(points);
    let on_checkpoint: OnCheckpoint = Box::new(move |point| {
        let points = Arc::clone(&points);
        Box::new(move || {
            points.lock().unwrap().push(point);
            Ok(())
        })
    });
    Applier::new(Root::open(dest)?, base.map(Root::open).transpose()?, sharing, resume, Some(on_checkpoint))
}

pub(crate) fn apply(stream: &[u8], dest: &Path, base: Option<&Path>, sharing: Sharing) -> Result<Applied> {
    let mut applier = applier(dest, base, sharing, None, &Points::default())?;
    // Cut at odd places: the applier must not depend on where.
    for piece in stream.chunks(4099) {
        applier.feed(Bytes::copy_from_slice(piece))?;
    }
    applier.finish()
}

/// Makes `dest` (which exists) a tree whose files are hard links into `base`.
pub(crate) fn stage_linked(base: &Path, dest: &Path) {
    let root = Root::open(base).unwrap();
    let mut copier = Copier::new(Root::open(dest).unwrap());
    for entry in Walk::new(root.try_clone().unwrap(), Links::ByInode) {
        let entry = entry.unwrap();
        if entry.kind == EntryKind::Directory {
            copier.copy(&root, &entry).unwrap();
        } else {
            copier.link(&root, &entry).unwrap();
        }
    }
    copier.finish().unwrap();
}

/// Makes `dest` (which exists) a copy of `base` that shares no inode with it.
pub(crate) fn stage_copied(base: &Path, dest: &Path) {
    let root = Root::open(base).unwrap();
    let mut copier = Copier::new(Root::open(dest).unwrap());
    for entry in Walk::new(root.try_clone().unwrap(), Links::ByInode) {
        assert!(copier.copy(&root, &entry.unwrap()).unwrap().steady);
    }
    copier.finish().unwrap();
}

pub(crate) fn stage(sharing: Sharing, base: &Path, dest: &Path) {
    match sharing {
        Sharing::HardLinked => stage_linked(base, dest),
        Sharing::Exclusive => stage_copied(base, dest),
    }
}

#[track_caller]
pub(crate) fn assert_equal(left: &Path, right: &Path) {
    let found = differences(left, right).unwrap();
    assert!(found.is_empty(), "{} differences:\n{}", found.len(), found.join("\n"));
}
