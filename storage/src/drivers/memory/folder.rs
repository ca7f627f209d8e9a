//! Trees as folders: what `attach` hands out, and what the portable format is written from and applied to.

use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::{
        ffi::{OsStrExt, OsStringExt},
        fs::{MetadataExt, PermissionsExt},
    },
    path::{Path as FsPath, PathBuf},
    sync::Arc,
};

use bytes::Bytes;
use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, utimensat};
use uuid::Uuid;

use super::tree::{Contents, Entry, Kind, Path, Tree};
use crate::{
    delta::{Compare, ResumePoint},
    error::{Error, Result},
    tree::{
        apply::{Applier, Sharing},
        root::Root,
        walk::Links,
        write::{DeltaWriter, Side},
    },
};

/// A folder of this process, gone with its value.
#[derive(Debug)]
pub(super) struct Folder(PathBuf);

impl Folder {
    pub(super) fn new() -> io::Result<Self> {
        let path = std::env::temp_dir().join(format!("flocker-memory-{}", Uuid::now_v7()));
        fs::create_dir(&path)?;
        Ok(Self(path))
    }

    pub(super) fn path(&self) -> &FsPath {
        &self.0
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        remove(&self.0);
    }
}

/// Removes a tree, with directories that are closed to their owner.
pub(super) fn remove(path: &FsPath) {
    let _ = fs::set_permissions(path, fs::Permissions::from_mode(0o700));
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove(&entry.path());
        } else {
            let _ = fs::remove_file(entry.path());
        }
    }
    let _ = fs::remove_dir(path);
}

/// Makes a tree's folder; nothing is there yet.
pub(super) fn export(tree: &Tree, root: &FsPath) -> io::Result<()> {
    let at = |path: &Path| match path.is_empty() {
        true => root.to_owned(),
        false => root.join(std::ffi::OsStr::from_bytes(path)),
    };
    for (path, entry) in &tree.0 {
        match &entry.kind {
            Kind::Directory => fs::create_dir(at(path))?,
            Kind::File(contents) => fs::write(at(path), &**contents.0)?,
            Kind::Twin(first) => fs::hard_link(at(first), at(path))?,
            Kind::Link(target) => std::os::unix::fs::symlink(std::ffi::OsStr::from_bytes(target), at(path))?,
        }
    }
    // What is inside a directory comes behind it: backwards, its time and mode are set last.
    for (path, entry) in tree.0.iter().rev() {
        let path = at(path);
        let time = Timespec { tv_sec: entry.mtime.0, tv_nsec: entry.mtime.1 };
        let times = Timestamps { last_access: time, last_modification: time };
        utimensat(CWD, &path, &times, AtFlags::SYMLINK_NOFOLLOW)?;
        if !matches!(entry.kind, Kind::Link(_)) {
            fs::set_permissions(&path, fs::Permissions::from_mode(entry.mode & 0o7777))?;
        }
    }
    Ok(())
}

/// Reads a folder into a tree.
pub(super) fn import(root: &FsPath) -> io::Result<Tree> {
    let mut tree = BTreeMap::new();
    let mut waiting = vec![Path::new()];
    let mut inodes: BTreeMap<u64, Path> = BTreeMap::new();
    let mut found = BTreeMap::new();
    while let Some(path) = waiting.pop() {
        let at = if path.is_empty() { root.to_owned() } else { root.join(std::ffi::OsStr::from_bytes(&path)) };
        let stat = fs::symlink_metadata(&at)?;
        if stat.is_dir() {
            for entry in fs::read_dir(&at)? {
                let name = entry?.file_name().into_vec();
                waiting.push(if path.is_empty() { name } else { [&path[..], b"/", &name].concat() });
            }
        }
        found.insert(path, (at, stat));
    }
    for (path, (at, stat)) in found {
        let kind = match stat.file_type() {
            it if it.is_dir() => Kind::Directory,
            it if it.is_symlink() => Kind::Link(fs::read_link(&at)?.into_os_string().into_vec()),
            it if it.is_file() => match inodes.get(&stat.ino()) {
                Some(first) => Kind::Twin(first.clone()),
                None => {
                    inodes.insert(stat.ino(), path.clone());
                    Kind::File(Contents(Arc::new(fs::read(&at)?)))
                }
            },
            _ => continue,
        };
        let (mode, mtime) = (stat.mode(), (stat.mtime(), stat.mtime_nsec()));
        tree.insert(path, Entry { kind, mode, mtime });
    }
    Ok(Tree(tree))
}

/// Writes the portable delta between two trees, whole.
pub(super) fn write_portable(
    base: Option<&Tree>,
    target: &Tree,
    compare: Compare,
    resume: Option<&ResumePoint>,
) -> Result<Vec<Bytes>> {
    let failed = |error| Error::io("read delta of", "tree", error);
    let folder = Folder::new().map_err(failed)?;
    let side = |name: &str, tree: &Tree| -> Result<Side> {
        let path = folder.path().join(name);
        export(tree, &path).map_err(failed)?;
        Ok(Side { root: Root::open(path)?, links: Links::ByInode })
    };
    let base = base.map(|base| side("base", base)).transpose()?;
    let mut writer = DeltaWriter::new(base, side("target", target)?, compare, resume)?;
    let mut chunks = Vec::new();
    while let Some(chunk) = writer.next_chunk()? {
        chunks.push(chunk);
    }
    Ok(chunks)
}

/// Applies a whole portable delta to a tree.
pub(super) fn apply_portable(base: Option<&Tree>, delta: &[u8]) -> Result<Tree> {
    let failed = |error| Error::io("receive", "tree", error);
    let folder = Folder::new().map_err(failed)?;
    let path = folder.path().join("target");
    export(base.unwrap_or(&Tree::default()), &path).map_err(failed)?;
    let root = Root::open(&path)?;
    let kept = match base {
        Some(base) => {
            let path = folder.path().join("base");
            export(base, &path).map_err(failed)?;
            Some(Root::open(path)?)
        }
        None => None,
    };
    let mut applier = Applier::new(root, kept, Sharing::Exclusive, None, None)?;
    applier.feed(Bytes::copy_from_slice(delta))?;
    applier.finish()?;
    import(&path).map_err(failed)
}
