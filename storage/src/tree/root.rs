//! Opened trees: every path is resolved beneath the root by the kernel, never by joining strings.
//!
//! Owns [`Root`] (one open directory), `DirStack` (the chain of directories a walk stands in, with a bounded
//! number of open descriptors however deep the tree is) and `Nearby` (the one directory that is reached into again and
//! again). Refuses to know what entries mean.

use std::{
    fmt::Write as _,
    os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use rustix::{
    fs::{Mode, OFlags, ResolveFlags},
    io::Errno,
};

use super::path::TreePath;
use crate::error::{Error, ErrorKind, Result};

/// How every path is resolved: beneath the directory it starts at, through no symbolic link (openat2(2)).
const BENEATH: ResolveFlags = ResolveFlags::BENEATH.union(ResolveFlags::NO_SYMLINKS).union(ResolveFlags::NO_MAGICLINKS);

/// The longest path handed to one system call, in bytes: below `PATH_MAX`, which counts the ending NUL.
const PIECE_LIMIT: usize = 4000;

/// How many directories of one chain are kept open; the others are opened again on the way back.
const OPEN_LIMIT: usize = 48;

const DIRECTORY: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// A tree's opened root directory.
#[derive(Debug)]
pub struct Root {
    fd: OwnedFd,
    path: PathBuf,
    /// Which opening of a root this is: what is kept of one is never used with another.
    opening: u64,
}

fn next_opening() -> u64 {
    static OPENED: AtomicU64 = AtomicU64::new(1);
    OPENED.fetch_add(1, Ordering::Relaxed)
}

impl Root {
    /// Opens a directory as the root of a tree. The path itself is trusted: symbolic links in it are followed.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd =
            rustix::fs::open(&path, flags, Mode::empty()).map_err(|error| Error::io("open", path.display(), error))?;
        Ok(Self { fd, path, opening: next_opening() })
    }

    /// Opens the same root once more, for a second reader.
    pub fn try_clone(&self) -> Result<Self> {
        let fd = self.fd.try_clone().map_err(|error| Error::io("open", self.path.display(), error))?;
        Ok(Self { fd, path: self.path.clone(), opening: next_opening() })
    }

    /// Returns where the root was opened, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes all that was written to the root's file system durable. It also says what could not be written since the root
    /// was opened (syncfs(2)), so who writes a tree syncs by the root that it was written by.
    pub fn sync(&self) -> Result<()> {
        rustix::fs::syncfs(&self.fd).map_err(|error| Error::io("make durable", self.path.display(), error))
    }

    /// Names an entry of the tree for a message.
    pub fn show(&self, path: &TreePath) -> String {
        if path.is_root() { self.path.display().to_string() } else { format!("{}/{path}", self.path.display()) }
    }

    /// Opens an entry beneath the root through no symbolic link, however long the path is. `O_CLOEXEC` and
    /// `O_NOFOLLOW` are added.
    pub fn open_beneath(&self, path: &TreePath, flags: OFlags) -> Result<OwnedFd> {
        self.open_raw(path, flags).map_err(|error| Error::io("open", self.show(path), error))
    }

    /// Opens the directory an entry lies in. The entry must not be the root.
    pub fn open_parent(&self, path: &TreePath) -> Result<OwnedFd> {
        let parent = path.parent().unwrap_or_default();
        self.open_beneath(&parent, DIRECTORY)
    }

    fn open_raw(&self, path: &TreePath, flags: OFlags) -> std::result::Result<OwnedFd, Errno> {
        let flags = flags | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        if path.is_root() {
            return open_in(self.fd.as_fd(), b".", flags);
        }
        let mut rest = path.as_bytes();
        let mut at: Option<OwnedFd> = None;
        while rest.len() > PIECE_LIMIT {
            // A name has 255 bytes at most, so there is a '/' in reach.
            let cut = rest[..PIECE_LIMIT].iter().rposition(|byte| *byte == b'/').ok_or(Errno::NAMETOOLONG)?;
            let from = at.as_ref().map_or(self.fd.as_fd(), AsFd::as_fd);
            at = Some(open_in(from, &rest[..cut], OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC)?);
            rest = &rest[cut + 1..];
        }
        open_in(at.as_ref().map_or(self.fd.as_fd(), AsFd::as_fd), rest, flags)
    }
}

impl AsFd for Root {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// The directory of a tree that was reached into last, kept open for its further entries: a tree that is gone through in
/// walk order is resolved from its root once for each directory, not for each entry.
#[derive(Debug, Default)]
pub(super) struct Nearby {
    kept: Option<Kept>,
}

#[derive(Debug)]
struct Kept {
    opening: u64,
    path: TreePath,
    fd: OwnedFd,
}

impl Nearby {
    /// Returns the directory that an entry lies in. The entry must not be the root.
    pub(super) fn parent<'a>(&'a mut self, root: &'a Root, entry: &TreePath) -> Result<BorrowedFd<'a>> {
        let parent = entry.parent_bytes().unwrap_or_default();
        if parent.is_empty() {
            return Ok(root.as_fd());
        }
        let fits = |kept: &Kept| kept.opening == root.opening && kept.path.as_bytes() == parent;
        let kept = match self.kept.take().filter(fits) {
            Some(kept) => kept,
            None => {
                let fd = root.open_parent(entry)?;
                Kept { opening: root.opening, path: entry.parent().unwrap_or_default(), fd }
            }
        };
        Ok(self.kept.insert(kept).fd.as_fd())
    }

    /// Opens an entry for reading as [`Root::open_beneath`] does; its access time stays.
    pub(super) fn open(&mut self, root: &Root, entry: &TreePath, flags: OFlags) -> Result<OwnedFd> {
        if entry.is_root() {
            return root.open_beneath(entry, flags);
        }
        let opened = open_quietly(self.parent(root, entry)?, entry.name(), flags);
        opened.map_err(|error| Error::io("open", root.show(entry), error))
    }
}

/// Opens a path of at most [`PIECE_LIMIT`] bytes beneath `from`.
fn open_in(from: BorrowedFd<'_>, path: &[u8], flags: OFlags) -> std::result::Result<OwnedFd, Errno> {
    loop {
        match rustix::fs::openat2(from, path, flags, Mode::empty(), BENEATH) {
            // A rename somewhere in the system made the kernel unsure (openat2(2)); asking again is the cure.
            Err(Errno::AGAIN | Errno::INTR) => {}
            other => return other,
        }
    }
}

/// Opens one entry of an open directory for reading, through no symbolic link.
pub(super) fn open_entry(directory: BorrowedFd<'_>, name: &[u8], flags: OFlags) -> std::result::Result<OwnedFd, Errno> {
    open_in(directory, name, flags | OFlags::CLOEXEC | OFlags::NOFOLLOW)
}

/// Opens one entry as [`open_entry`] does, so that reading it leaves its access time alone: of a whole tree those would all be
/// written. Only the owner and root may ask for that (open(2)); for others it is as it always was.
pub(super) fn open_quietly(
    directory: BorrowedFd<'_>,
    name: &[u8],
    flags: OFlags,
) -> std::result::Result<OwnedFd, Errno> {
    match open_entry(directory, name, flags | OFlags::NOATIME) {
        Err(Errno::PERM) => open_entry(directory, name, flags),
        other => other,
    }
}

/// A path by which the `l*` calls that take no descriptor reach an entry of an open directory.
pub(super) fn magic_path(directory: BorrowedFd<'_>, name: &[u8]) -> Vec<u8> {
    let mut path = String::with_capacity(24);
    let _ = write!(path, "/proc/self/fd/{}", directory.as_raw_fd());
    let mut path = path.into_bytes();
    path.push(b'/');
    path.extend_from_slice(if name.is_empty() { b"." } else { name });
    path
}

/// The directories from a root down to where a walk stands.
///
/// Only the deepest [`OPEN_LIMIT`] are held open; one that was let go is opened again from the root, beneath it.
#[derive(Debug)]
pub(super) struct DirStack {
    root: Root,
    open: Vec<Option<OwnedFd>>,
    path: TreePath,
}

impl DirStack {
    pub(super) fn new(root: Root) -> Self {
        Self { root, open: Vec::new(), path: TreePath::root() }
    }

    pub(super) fn root(&self) -> &Root {
        &self.root
    }

    /// The directory on top.
    pub(super) fn path(&self) -> &TreePath {
        &self.path
    }

    /// The number of directories below the root.
    pub(super) fn level(&self) -> usize {
        self.open.len()
    }

    /// The descriptor of the directory on top.
    pub(super) fn top(&mut self) -> Result<BorrowedFd<'_>> {
        if let Some(slot @ None) = self.open.last_mut() {
            *slot = Some(self.root.open_beneath(&self.path, DIRECTORY)?);
        }
        Ok(self.open.last().and_then(Option::as_ref).map_or(self.root.as_fd(), AsFd::as_fd))
    }

    /// Goes down into an entry of the directory on top.
    pub(super) fn push(&mut self, name: &[u8]) -> Result<()> {
        let path = self.path.child(name)?;
        let opened = open_entry(self.top()?, name, DIRECTORY);
        let fd = opened.map_err(|error| Error::io("open directory", self.root.show(&path), error))?;
        self.open.push(Some(fd));
        self.path = path;
        if let Some(deep) = self.open.len().checked_sub(OPEN_LIMIT + 1) {
            self.open[deep] = None;
        }
        Ok(())
    }

    pub(super) fn pop(&mut self) {
        self.open.pop();
        self.path.pop();
    }

    /// Names an entry of the directory on top for a message.
    pub(super) fn show(&self, name: &[u8]) -> String {
        let mut path = self.path.clone();
        if !name.is_empty() {
            path.push(name);
        }
        self.root.show(&path)
    }
}

/// An error about an entry, with the way out where the node's user may not read it.
pub(super) fn read_error(operation: &'static str, object: String, error: Errno) -> Error {
    match error {
        Errno::LOOP | Errno::XDEV => {
            Error::new(operation, object, ErrorKind::Corrupt("a symbolic link stands where a directory should".into()))
        }
        error => Error::io(operation, object, error),
    }
}
