//! Making entries in a destination tree, in walk order.
//!
//! Owns the order of system calls: data, owner, extended attributes, mode, times. A directory is held at `u+rwx` while
//! things are made in it and gets its own metadata when it is left. What the user may not set becomes a finding.
//! Everything is made in the directory on top of a [`DirStack`], by a single name, so nothing outside can be reached.

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use rustix::{
    fs::{AtFlags, FileType, Gid, Mode, OFlags, StatxFlags, Timespec, Timestamps, Uid},
    io::Errno,
};

use super::{
    entry::{Entry, EntryKind, Metadata, Status, Time},
    findings::Findings,
    path::TreePath,
    root::{DirStack, Root, open_entry},
    walk::Names,
    xattr::{self, XattrReader},
};
use crate::{
    driver::Finding,
    error::{Error, ErrorKind, Result},
};

/// Whether an entry was just made, or was there and may carry attributes of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Origin {
    Fresh,
    Existing,
}

const EVERY_DIRECTORY: Mode = Mode::RWXU;
const FRESH_FILE: Mode = Mode::RUSR.union(Mode::WUSR);

/// Makes a tree in walk order.
#[derive(Debug)]
pub(super) struct Builder {
    dirs: DirStack,
    /// What the directories on the stack get when they are left, the root first. As long as the stack, or one longer
    /// once the root was entered.
    pending: Vec<(Metadata, Origin)>,
    reader: XattrReader,
    findings: Findings,
}

impl Builder {
    pub(super) fn new(dest: Root) -> Self {
        let (dirs, reader) = (DirStack::new(dest), XattrReader::new());
        Self { dirs, pending: Vec::new(), reader, findings: Findings::default() }
    }

    pub(super) fn root(&self) -> &Root {
        self.dirs.root()
    }

    /// The directory that entries are made in.
    pub(super) fn path(&self) -> &TreePath {
        self.dirs.path()
    }

    /// The number of directories entered, the root included.
    pub(super) fn entered(&self) -> usize {
        self.pending.len()
    }

    /// The directory that entries are made in, open.
    pub(super) fn top(&mut self) -> Result<BorrowedFd<'_>> {
        self.dirs.top()
    }

    pub(super) fn take_findings(&mut self) -> Vec<Finding> {
        self.findings.take()
    }

    pub(super) fn note(&mut self, name: &[u8], what: impl Into<String>) {
        let mut path = self.dirs.path().clone();
        if !name.is_empty() {
            path.push(name);
        }
        self.findings.add(&path, what);
    }

    pub(super) fn error(&self, operation: &'static str, name: &[u8], error: Errno) -> Error {
        Error::io(operation, self.dirs.show(name), error)
    }

    /// Starts with the root, which exists.
    pub(super) fn enter_root(&mut self, metadata: Metadata) -> Result<()> {
        let opened = self.open_up(b"").and_then(|()| xattr::drop_default_acl(self.dirs.root().as_fd()));
        opened.map_err(|error| self.error("make directory", b"", error))?;
        self.pending.push((metadata, Origin::Existing));
        Ok(())
    }

    /// Goes into a directory, making it where there is none.
    pub(super) fn enter(&mut self, name: &[u8], metadata: Metadata) -> Result<()> {
        let mut origin = Origin::Fresh;
        let mut made = rustix::fs::mkdirat(self.dirs.top()?, name, EVERY_DIRECTORY);
        if made == Err(Errno::EXIST) {
            if self.file_type(name)? == Some(FileType::Directory) {
                origin = Origin::Existing;
                made = self.open_up(name);
            } else {
                self.clear(name)?;
                made = rustix::fs::mkdirat(self.dirs.top()?, name, EVERY_DIRECTORY);
            }
        }
        made.map_err(|error| self.error("make directory", name, error))?;
        self.dirs.push(name)?;
        self.pending.push((metadata, origin));
        if origin == Origin::Existing {
            let dropped = xattr::drop_default_acl(self.dirs.top()?);
            dropped.map_err(|error| self.error("make directory", b"", error))?;
        }
        Ok(())
    }

    /// Leaves directories until `entered` are left, giving each its own metadata.
    pub(super) fn leave_to(&mut self, entered: usize) -> Result<()> {
        while self.pending.len() > entered {
            let Some((metadata, origin)) = self.pending.pop() else { break };
            let finished = self.finish_directory(&metadata, origin);
            if self.dirs.level() > 0 {
                self.dirs.pop();
            }
            finished?;
        }
        Ok(())
    }

    fn finish_directory(&mut self, metadata: &Metadata, origin: Origin) -> Result<()> {
        let operation = "set metadata of";
        let fd =
            self.dirs.top()?.try_clone_to_owned().map_err(|error| Error::io("open", self.dirs.show(b""), error))?;
        let owned = rustix::fs::fchown(&fd, owner(metadata).0, owner(metadata).1);
        let keeps_owner = self.owner_was_set(b"", owned, metadata, &fd)?;
        self.write_xattrs(fd.as_fd(), b"", metadata, origin)?;
        let set = rustix::fs::fchmod(&fd, mode(metadata, keeps_owner))
            .and_then(|()| rustix::fs::futimens(&fd, &times(metadata.mtime)));
        set.map_err(|error| self.error(operation, b"", error))
    }

    /// Removes what is at a name, a directory with all that is in it. Done when nothing is there.
    pub(super) fn clear(&mut self, name: &[u8]) -> Result<()> {
        match rustix::fs::unlinkat(self.dirs.top()?, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => return Ok(()),
            Err(Errno::ISDIR) => {}
            Err(error) => return Err(self.error("remove", name, error)),
        }
        let mut trees = vec![(name.to_vec(), self.descend(name)?)];
        while let Some((directory, names)) = trees.last_mut() {
            let Some(name) = names.next() else {
                let directory = std::mem::take(directory);
                trees.pop();
                self.dirs.pop();
                let removed = rustix::fs::unlinkat(self.dirs.top()?, directory.as_slice(), AtFlags::REMOVEDIR);
                removed.map_err(|error| self.error("remove", &directory, error))?;
                continue;
            };
            match rustix::fs::unlinkat(self.dirs.top()?, name.as_slice(), AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(Errno::ISDIR) => {
                    let names = self.descend(&name)?;
                    trees.push((name, names));
                }
                Err(error) => return Err(self.error("remove", &name, error)),
            }
        }
        Ok(())
    }

    fn descend(&mut self, name: &[u8]) -> Result<Names> {
        self.open_up(name).map_err(|error| self.error("remove", name, error))?;
        self.dirs.push(name)?;
        let names = Names::read(self.dirs.top()?);
        names.map_err(|error| self.error("remove", b"", error))
    }

    /// Gives the user all rights on a directory of the directory on top, so that it can be filled or emptied.
    fn open_up(&mut self, name: &[u8]) -> std::result::Result<(), Errno> {
        let top = self.dirs.top().map_err(|_| Errno::IO)?;
        let name = if name.is_empty() { b"." } else { name };
        let found = rustix::fs::statx(top, name, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::MODE);
        if let Ok(found) = found
            && u32::from(found.stx_mode) & 0o700 == 0o700
        {
            return Ok(());
        }
        let fd = open_entry(top, name, OFlags::PATH | OFlags::DIRECTORY)?;
        change_mode(fd.as_fd(), EVERY_DIRECTORY)
    }

    pub(super) fn file_type(&mut self, name: &[u8]) -> Result<Option<FileType>> {
        Ok(self.status(name)?.map(|status| status.file_type))
    }

    /// Returns what is at a name of the directory on top.
    pub(super) fn status(&mut self, name: &[u8]) -> Result<Option<Status>> {
        match rustix::fs::statx(self.dirs.top()?, name, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::BASIC_STATS) {
            Ok(found) => Ok(Some(found.into())),
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(self.error("read", name, error)),
        }
    }

    /// Makes an empty file in place of whatever is at the name, with the rights of the mode it will have, so that most
    /// files need no further call for them; but one that is to get attributes must be open to its owner for that.
    pub(super) fn create_file(&mut self, name: &[u8], metadata: &Metadata) -> Result<OwnedFd> {
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let rights = if metadata.xattrs.is_empty() { Mode::from_raw_mode(metadata.mode & 0o777) } else { FRESH_FILE };
        let mut made = rustix::fs::openat(self.dirs.top()?, name, flags, rights);
        if matches!(made, Err(Errno::EXIST)) {
            self.clear(name)?;
            made = rustix::fs::openat(self.dirs.top()?, name, flags, rights);
        }
        made.map_err(|error| self.error("create", name, error))
    }

    /// Opens an existing regular file for reading and writing, whatever its mode.
    pub(super) fn open_file(&mut self, name: &[u8]) -> Result<OwnedFd> {
        let top = self.dirs.top()?;
        let mut opened = open_entry(top, name, OFlags::RDWR | OFlags::NONBLOCK);
        if matches!(opened, Err(Errno::ACCESS)) {
            opened = open_entry(top, name, OFlags::PATH)
                .and_then(|fd| change_mode(fd.as_fd(), FRESH_FILE))
                .and_then(|()| open_entry(top, name, OFlags::RDWR | OFlags::NONBLOCK));
        }
        opened.map_err(|error| self.error("open", name, error))
    }

    /// Makes a symbolic link, fifo or device in place of whatever is at the name. `false`: the user may not.
    pub(super) fn make(&mut self, name: &[u8], kind: &EntryKind) -> Result<bool> {
        let mut made = make_node(self.dirs.top()?, name, kind);
        if made == Err(Errno::EXIST) {
            self.clear(name)?;
            made = make_node(self.dirs.top()?, name, kind);
        }
        match made {
            Ok(()) => Ok(true),
            Err(Errno::PERM) if matches!(kind, EntryKind::CharDevice { .. } | EntryKind::BlockDevice { .. }) => {
                self.note(name, format!("only root may make a {}; it is left out", kind.word()));
                Ok(false)
            }
            Err(error) => Err(self.error("create", name, error)),
        }
    }

    /// Makes `name` a further name of an entry of an open directory. `false`: links are not possible here.
    pub(super) fn link(&mut self, from: BorrowedFd<'_>, from_name: &[u8], name: &[u8]) -> Result<bool> {
        let mut made = rustix::fs::linkat(from, from_name, self.dirs.top()?, name, AtFlags::empty());
        if made == Err(Errno::EXIST) {
            let flags = AtFlags::SYMLINK_NOFOLLOW;
            let wanted = rustix::fs::statx(from, from_name, flags, StatxFlags::BASIC_STATS).map(Status::from);
            let wanted = wanted.map_err(|error| self.error("link", name, error))?.stat;
            if self.status(name)?.is_some_and(|is| (is.stat.dev, is.stat.ino) == (wanted.dev, wanted.ino)) {
                return Ok(true);
            }
            self.clear(name)?;
            made = rustix::fs::linkat(from, from_name, self.dirs.top()?, name, AtFlags::empty());
        }
        match made {
            Ok(()) => Ok(true),
            Err(Errno::MLINK | Errno::XDEV | Errno::PERM) => Ok(false),
            Err(error) => Err(self.error("link", name, error)),
        }
    }

    /// Gives a file its owner, attributes, mode and times; its data must be complete.
    pub(super) fn finish_file(
        &mut self,
        file: &OwnedFd,
        name: &[u8],
        metadata: &Metadata,
        origin: Origin,
    ) -> Result<()> {
        let operation = "set metadata of";
        if origin == Origin::Fresh && metadata.xattrs.is_empty() {
            let finished = finish_plain(file, metadata).map_err(|error| self.error(operation, name, error))?;
            if !finished.1 {
                self.note(name, owner_finding(metadata));
            }
            return Ok(());
        }
        let owned = rustix::fs::fchown(file, owner(metadata).0, owner(metadata).1);
        let keeps_owner = self.owner_was_set(name, owned, metadata, file)?;
        let top = self.dirs.top()?.try_clone_to_owned();
        let top = top.map_err(|error| Error::io("open", self.dirs.show(b""), error))?;
        self.write_xattrs(top.as_fd(), name, metadata, origin)?;
        let set = rustix::fs::fchmod(file, mode(metadata, keeps_owner))
            .and_then(|()| rustix::fs::futimens(file, &times(metadata.mtime)));
        set.map_err(|error| self.error(operation, name, error))
    }

    /// Returns what an open file is.
    pub(super) fn status_of(&self, file: &OwnedFd, name: &[u8]) -> Result<Status> {
        status_of(file).map_err(|error| self.error("read", name, error))
    }

    /// Returns the entry that a file of the directory on top has become.
    pub(super) fn entry_of(&mut self, file: &OwnedFd, path: TreePath) -> Result<Entry> {
        let Status { mode, uid, gid, stat, .. } = self.status_of(file, path.name())?;
        let xattrs = self.reader.read_open(file.as_fd());
        let xattrs = xattrs.map_err(|error| self.error("read extended attributes of", path.name(), error))?;
        let kind = EntryKind::File { size: stat.size };
        Ok(Entry { path, kind, mode, uid, gid, mtime: stat.mtime, xattrs, stat })
    }

    /// Gives a fresh symbolic link, fifo or device its owner, attributes, mode and times.
    pub(super) fn finish_node(&mut self, name: &[u8], metadata: &Metadata, kind: &EntryKind) -> Result<()> {
        let top =
            self.dirs.top()?.try_clone_to_owned().map_err(|error| Error::io("open", self.dirs.show(b""), error))?;
        let fd = open_entry(top.as_fd(), name, OFlags::PATH).map_err(|error| self.error("open", name, error))?;
        let (uid, gid) = owner(metadata);
        let owned = rustix::fs::chownat(&top, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW);
        let keeps_owner = self.owner_was_set(name, owned, metadata, &fd)?;
        self.write_xattrs(top.as_fd(), name, metadata, Origin::Fresh)?;
        let mut set = Ok(());
        if !matches!(kind, EntryKind::Symlink { .. }) {
            set = change_mode(fd.as_fd(), mode(metadata, keeps_owner));
        }
        let set =
            set.and_then(|()| rustix::fs::utimensat(&top, name, &times(metadata.mtime), AtFlags::SYMLINK_NOFOLLOW));
        set.map_err(|error| self.error("set metadata of", name, error))
    }

    fn write_xattrs(&mut self, top: BorrowedFd<'_>, name: &[u8], metadata: &Metadata, origin: Origin) -> Result<()> {
        let present = match origin {
            Origin::Fresh => Ok(Vec::new()),
            Origin::Existing => self.reader.read(top, name),
        };
        let refused = present.and_then(|present| xattr::write(top, name, &present, &metadata.xattrs));
        let refused = refused.map_err(|error| self.error("set extended attributes of", name, error))?;
        for key in refused {
            self.note(name, format!("the attribute {} could not be set", String::from_utf8_lossy(&key)));
        }
        Ok(())
    }

    /// Judges the result of a chown: a user who may not is a finding. Tells whether the owner is as wanted.
    fn owner_was_set(
        &mut self,
        name: &[u8],
        result: std::result::Result<(), Errno>,
        metadata: &Metadata,
        fd: &OwnedFd,
    ) -> Result<bool> {
        let set = owner_was_set(result, metadata, fd).map_err(|error| self.error("set owner of", name, error))?;
        if !set {
            self.note(name, owner_finding(metadata));
        }
        Ok(set)
    }
}

/// Gives a fresh file that gets no attributes its owner, mode and times; its data must be complete. What it has already is
/// not set again: each such call is a transaction of the file system. Returns what it is then, and whether the owner is as
/// wanted.
pub(super) fn finish_plain(file: &OwnedFd, metadata: &Metadata) -> std::result::Result<(Status, bool), Errno> {
    rustix::fs::futimens(file, &times(metadata.mtime))?;
    let is = status_of(file)?;
    if (is.uid, is.gid, is.mode) == (metadata.uid, metadata.gid, metadata.mode) {
        return Ok((is, true));
    }
    let owned = rustix::fs::fchown(file, owner(metadata).0, owner(metadata).1);
    let keeps_owner = owner_was_set(owned, metadata, file)?;
    rustix::fs::fchmod(file, mode(metadata, keeps_owner))?;
    Ok((status_of(file)?, keeps_owner))
}

fn status_of(file: &OwnedFd) -> std::result::Result<Status, Errno> {
    rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS).map(Status::from)
}

/// What is said of an entry whose owner could not be set.
pub(super) fn owner_finding(metadata: &Metadata) -> String {
    format!("the owner {}:{} could not be set", metadata.uid, metadata.gid)
}

/// Tells whether the owner is as wanted after a chown, with this result.
fn owner_was_set(
    result: std::result::Result<(), Errno>,
    metadata: &Metadata,
    fd: &OwnedFd,
) -> std::result::Result<bool, Errno> {
    match result {
        Ok(()) => return Ok(true),
        Err(Errno::PERM | Errno::INVAL | Errno::OPNOTSUPP) => {}
        Err(error) => return Err(error),
    }
    let flags = AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW;
    // The group alone may be one of the user's.
    let _ = rustix::fs::chownat(fd, "", None, owner(metadata).1, flags);
    let is = rustix::fs::statx(fd, "", flags, StatxFlags::UID | StatxFlags::GID)?;
    Ok((is.stx_uid, is.stx_gid) == (metadata.uid, metadata.gid))
}

fn make_node(top: BorrowedFd<'_>, name: &[u8], kind: &EntryKind) -> std::result::Result<(), Errno> {
    let node = |file_type, major, minor| {
        rustix::fs::mknodat(top, name, file_type, FRESH_FILE, rustix::fs::makedev(major, minor))
    };
    match kind {
        EntryKind::Symlink { target } => rustix::fs::symlinkat(target.as_slice(), top, name),
        EntryKind::Fifo => node(FileType::Fifo, 0, 0),
        EntryKind::CharDevice { major, minor } => node(FileType::CharacterDevice, *major, *minor),
        EntryKind::BlockDevice { major, minor } => node(FileType::BlockDevice, *major, *minor),
        EntryKind::Directory | EntryKind::File { .. } | EntryKind::HardLink { .. } => Err(Errno::INVAL),
    }
}

/// Sets the mode of what an `O_PATH` descriptor names; never follows a symbolic link.
fn change_mode(fd: BorrowedFd<'_>, mode: Mode) -> std::result::Result<(), Errno> {
    use std::os::fd::AsRawFd as _;
    rustix::fs::chmod(format!("/proc/self/fd/{}", fd.as_raw_fd()), mode)
}

fn owner(metadata: &Metadata) -> (Option<Uid>, Option<Gid>) {
    (Some(Uid::from_raw(metadata.uid)), Some(Gid::from_raw(metadata.gid)))
}

/// The mode to set. Without its owner a program must not keep setuid or setgid: it would act as somebody else.
fn mode(metadata: &Metadata, keeps_owner: bool) -> Mode {
    Mode::from_raw_mode(metadata.mode & if keeps_owner { 0o7777 } else { 0o1777 })
}

fn times(mtime: Time) -> Timestamps {
    let omit = Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_OMIT };
    Timestamps { last_access: omit, last_modification: Timespec { tv_sec: mtime.secs, tv_nsec: mtime.nanos.into() } }
}

/// An error for an entry whose directory was not made before it.
pub(super) fn orphan(path: &TreePath) -> Error {
    Error::new("make", path, ErrorKind::Corrupt("its directory was not made before it".into()))
}
