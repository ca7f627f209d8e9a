//! Copies a tree entry by entry, in walk order: shares extents where the file system can, else copies data and holes.
//!
//! Neighbours: a [`Walk`](super::walk::Walk) yields what to copy; the directory driver decides which entries are
//! copied and which are linked to an earlier snapshot.

use std::os::fd::{AsFd as _, OwnedFd};

use rustix::{
    fs::{AtFlags, FileType, OFlags, StatxFlags},
    io::Errno,
};

use super::{
    builder::{Builder, Origin, orphan},
    data::{self, Reflinks},
    entry::{Entry, EntryKind, Metadata, Status},
    path::TreePath,
    root::{Nearby, Root},
    xattr::XattrReader,
};
use crate::{
    driver::Finding,
    error::{Error, ErrorKind, Result},
};

/// How often a file that changes while it is copied is copied before it is taken as it is.
const ATTEMPTS: u32 = 5;

/// How an entry came about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// A file that shares its extents with the source.
    Reflinked,
    /// A file whose data was copied.
    Copied,
    /// A further name of an inode.
    Linked,
    /// Something without data of its own: a directory, a symbolic link, a fifo, a device.
    Made,
    /// Nothing was made: the entry is gone from the source, is no such thing any more, or the user may not make it.
    LeftOut,
}

/// What [`Copier::copy`] did.
#[derive(Debug, Clone)]
pub struct Copied {
    /// The entry as it was when it was copied, with the stat of the source.
    pub entry: Entry,
    /// How it came about.
    pub how: How,
    /// `false` for a file that changed during each attempt to copy it.
    pub steady: bool,
    /// BLAKE3 of what was written, for a file whose data passed through memory: one that was copied and has no holes.
    pub digest: Option<[u8; 32]>,
}

/// Makes a tree in a directory from entries in walk order. What is there under the same names is replaced.
///
/// A directory gets its own metadata when it is left: by a later call or by [`finish`](Self::finish).
#[derive(Debug)]
pub struct Copier {
    builder: Builder,
    reader: XattrReader,
    reflinks: Reflinks,
    /// Where entries are copied from, and where they are linked from.
    copied_from: Nearby,
    linked_from: Nearby,
}

impl Copier {
    /// Starts in an existing directory.
    pub fn new(dest: Root) -> Self {
        Self {
            builder: Builder::new(dest),
            reader: XattrReader::new(),
            reflinks: Reflinks::Untried,
            copied_from: Nearby::default(),
            linked_from: Nearby::default(),
        }
    }

    /// Copies one entry of the tree `source`, which may be in use. A hard link is made within the destination. The
    /// root's entry sets the destination's own metadata.
    pub fn copy(&mut self, source: &Root, entry: &Entry) -> Result<Copied> {
        self.stand(&entry.path)?;
        let name = entry.path.name();
        let how = match &entry.kind {
            EntryKind::Directory if entry.path.is_root() => {
                self.builder.enter_root(entry.into())?;
                How::Made
            }
            EntryKind::Directory => {
                self.builder.enter(name, entry.into())?;
                How::Made
            }
            EntryKind::File { .. } => return self.copy_file(source, entry),
            EntryKind::HardLink { to } => self.link_within(to, name)?,
            kind => {
                if self.builder.make(name, kind)? {
                    self.builder.finish_node(name, &Metadata::from(entry), kind)?;
                    How::Made
                } else {
                    How::LeftOut
                }
            }
        };
        Ok(Copied { entry: entry.clone(), how, steady: true, digest: None })
    }

    /// Makes an entry (no directory) a further name of the same path in the tree `from`; copies it where the file
    /// system allows no further name. Names of one inode in `from` are names of one inode here.
    pub fn link(&mut self, from: &Root, entry: &Entry) -> Result<How> {
        if entry.kind == EntryKind::Directory {
            return Err(Error::new("link", &entry.path, ErrorKind::Unsupported("a directory has one name".into())));
        }
        self.stand(&entry.path)?;
        let parent = self.linked_from.parent(from, &entry.path)?;
        let name = entry.path.name();
        if self.builder.link(parent, name, name)? { Ok(How::Linked) } else { Ok(self.copy(from, entry)?.how) }
    }

    /// Leaves all directories. Returns what could not be kept, and why.
    pub fn finish(&mut self) -> Result<Vec<Finding>> {
        self.builder.leave_to(0)?;
        Ok(self.builder.take_findings())
    }

    /// Leaves directories until the one that `path` lies in is on top.
    fn stand(&mut self, path: &TreePath) -> Result<()> {
        let level = path.level();
        if level > self.builder.entered() {
            return Err(orphan(path));
        }
        self.builder.leave_to(level)?;
        if path.parent_bytes().is_some_and(|parent| parent != self.builder.path().as_bytes()) {
            return Err(orphan(path));
        }
        Ok(())
    }

    fn link_within(&mut self, to: &TreePath, name: &[u8]) -> Result<How> {
        // What the group's first name could not be, the others cannot be either.
        let parent = self.builder.root().open_parent(to)?;
        let found = rustix::fs::statx(&parent, to.name(), AtFlags::SYMLINK_NOFOLLOW, StatxFlags::TYPE);
        if found.is_err() {
            self.builder.note(name, format!("it is another name of {to}, which was left out"));
            return Ok(How::LeftOut);
        }
        if self.builder.link(parent.as_fd(), to.name(), name)? {
            return Ok(How::Linked);
        }
        let why = format!("the file system allows no further name of {to}");
        Err(Error::new("link", self.builder.path(), ErrorKind::Unsupported(why)))
    }

    fn copy_file(&mut self, source: &Root, entry: &Entry) -> Result<Copied> {
        let name = entry.path.name();
        let gone = |copier: &mut Self, what: &str| {
            copier.builder.clear(name)?;
            copier.builder.note(name, what);
            Ok(Copied { entry: entry.clone(), how: How::LeftOut, steady: true, digest: None })
        };
        let mut taken = entry.clone();
        for attempt in 1..=ATTEMPTS {
            let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY;
            let from = match self.copied_from.open(source, &entry.path, flags) {
                Ok(from) => from,
                Err(Error { kind: ErrorKind::Io(error), .. }) if is_gone(&error) => {
                    return gone(self, "it vanished before it was copied");
                }
                Err(error) => return Err(error),
            };
            let before = self.status(&from, source, &entry.path)?;
            if before.file_type != FileType::RegularFile {
                return gone(self, "it stopped being a file before it was copied");
            }
            self.refresh(&mut taken, &before, &from, source)?;
            let to = self.builder.create_file(name, &Metadata::from(&taken))?;
            let shared = before.stat.size > 0 && self.share(&from, &to, name)?;
            let digest = if shared {
                None
            } else {
                let copied = data::copy_and_hash(from.as_fd(), to.as_fd(), before.stat.size);
                copied.map_err(|error| Error::io("copy", source.show(&entry.path), error))?
            };
            let after = self.status(&from, source, &entry.path)?;
            let steady = after.stat.is_unchanged_since(&before.stat);
            if steady || attempt == ATTEMPTS {
                self.builder.finish_file(&to, name, &Metadata::from(&taken), Origin::Fresh)?;
                let how = if shared { How::Reflinked } else { How::Copied };
                return Ok(Copied { entry: taken, how, steady, digest });
            }
        }
        unreachable!("the last attempt returns")
    }

    fn share(&mut self, from: &OwnedFd, to: &OwnedFd, name: &[u8]) -> Result<bool> {
        let shared = self.reflinks.share(from.as_fd(), to.as_fd());
        shared.map_err(|error| self.builder.error("copy", name, error))
    }

    fn status(&self, file: &OwnedFd, source: &Root, path: &TreePath) -> Result<Status> {
        let found = rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS);
        found.map(Status::from).map_err(|error| Error::io("read", source.show(path), error))
    }

    /// Takes over metadata that changed since the entry was walked.
    fn refresh(&mut self, entry: &mut Entry, now: &Status, file: &OwnedFd, source: &Root) -> Result<()> {
        if now.stat.is_unchanged_since(&entry.stat) {
            return Ok(());
        }
        let xattrs = self.reader.read_open(file.as_fd());
        entry.xattrs =
            xattrs.map_err(|error| Error::io("read extended attributes of", source.show(&entry.path), error))?;
        entry.kind = EntryKind::File { size: now.stat.size };
        (entry.mode, entry.uid, entry.gid, entry.mtime) = (now.mode, now.uid, now.gid, now.stat.mtime);
        let nlink = entry.stat.nlink;
        entry.stat = now.stat;
        entry.stat.nlink = nlink;
        Ok(())
    }
}

fn is_gone(error: &std::io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::NOENT | Errno::LOOP | Errno::NOTDIR | Errno::NXIO))
}
