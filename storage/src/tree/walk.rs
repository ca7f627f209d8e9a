//! Walks a tree in one fixed order: a directory, then its entries by the bytes of their names.
//!
//! Memory: the names of the directories between the root and where the walk stands, and one small value per inode
//! with several names until all of them were met. Refuses to know contents.

use std::{collections::HashMap, mem::MaybeUninit, os::fd::OwnedFd};

use rustix::{
    fs::{AtFlags, FileType, OFlags, RawDir, StatxFlags},
    io::Errno,
};

use super::{
    entry::{Entry, EntryKind, Status},
    findings::Findings,
    inventory::{InventoryEntry, InventoryReader},
    path::TreePath,
    root::{DirStack, Root, open_entry, read_error},
    xattr::XattrReader,
};
use crate::{
    driver::Finding,
    error::{Error, ErrorKind, Result},
};

/// How a walk knows which paths are names of one inode.
#[derive(Debug)]
pub enum Links {
    /// By device and inode number. Right wherever a tree shares no inode with another tree.
    ByInode,
    /// As the tree's inventory says; for trees whose files are hard links into other snapshots.
    Inventory(Box<InventoryReader>),
}

/// Whether somebody may write to the tree while it is walked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Motion {
    /// Nobody writes: an entry that vanishes is an error.
    Still,
    /// A head in use: an entry that vanishes between two calls is left out, with a finding.
    Live,
}

/// When extended attributes are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Attributes {
    Eager,
    OnDemand,
}

/// An iterator over a tree's entries in walk order, the root first. After an error it ends.
#[derive(Debug)]
pub struct Walk {
    dirs: DirStack,
    /// The names still to visit in each directory from the root down.
    names: Vec<Names>,
    groups: Groups,
    motion: Motion,
    attributes: Attributes,
    reader: XattrReader,
    findings: Findings,
    position: Position,
    last_type: FileType,
    /// What the inode is, where the last entry is a further name of one.
    linked_kind: Option<EntryKind>,
}

#[derive(Debug)]
enum Position {
    Start,
    /// The last entry was a directory (by its name in the directory on top), which is gone into next.
    AtDirectory(Vec<u8>),
    /// The last entry was of this name.
    AtEntry(Vec<u8>),
    End,
}

impl Walk {
    /// Starts a walk of a tree to which nobody writes.
    pub fn new(root: Root, links: Links) -> Self {
        Self::with(root, links, Motion::Still, Attributes::Eager)
    }

    /// Starts a walk of a tree that may be in use.
    pub fn live(root: Root) -> Self {
        Self::with(root, Links::ByInode, Motion::Live, Attributes::Eager)
    }

    pub(super) fn with(root: Root, links: Links, motion: Motion, attributes: Attributes) -> Self {
        Self {
            dirs: DirStack::new(root),
            names: Vec::new(),
            groups: Groups::new(links),
            motion,
            attributes,
            reader: XattrReader::new(),
            findings: Findings::default(),
            position: Position::Start,
            last_type: FileType::Unknown,
            linked_kind: None,
        }
    }

    /// Returns what was left out so far: sockets, and what vanished from a live tree.
    pub fn take_findings(&mut self) -> Vec<Finding> {
        self.findings.take()
    }

    /// Leaves out what is in the directory that was returned last.
    pub fn skip_contents(&mut self) {
        if let Position::AtDirectory(name) = &mut self.position {
            self.position = Position::AtEntry(std::mem::take(name));
        }
    }

    /// Opens the entry that was returned last (`O_NOFOLLOW` and `O_CLOEXEC` are added).
    pub fn open_last(&mut self, flags: OFlags) -> Result<OwnedFd> {
        let (Position::AtDirectory(name) | Position::AtEntry(name)) = &self.position else {
            return Err(Error::new("open", self.dirs.show(b""), ErrorKind::NotFound));
        };
        let name = if name.is_empty() { &b"."[..] } else { name };
        let opened = open_entry(self.dirs.top()?, name, flags);
        opened.map_err(|error| read_error("open", self.dirs.show(name), error))
    }

    /// Returns the tree's root.
    pub(super) fn root(&self) -> &Root {
        self.dirs.root()
    }

    /// Returns the type of the entry that was returned last; for a hard link, that of its inode.
    pub(super) fn last_type(&self) -> FileType {
        self.last_type
    }

    /// Returns what the inode of the entry that was returned last is, where that entry is a hard link.
    pub(super) fn linked_kind(&self) -> Option<&EntryKind> {
        self.linked_kind.as_ref()
    }

    /// Returns what the inventory says about the entry that was returned last.
    pub fn recorded(&self) -> Option<&InventoryEntry> {
        self.groups.recorded.as_ref()
    }

    /// Reads the extended attributes of the entry that was returned last.
    pub(super) fn load_attributes(&mut self, entry: &mut Entry) -> Result<()> {
        if self.attributes == Attributes::OnDemand
            && let Position::AtDirectory(name) | Position::AtEntry(name) = &self.position
        {
            let read = self.reader.read(self.dirs.top()?, name);
            entry.xattrs =
                read.map_err(|error| read_error("read extended attributes of", self.dirs.show(name), error))?;
        }
        Ok(())
    }

    fn step(&mut self) -> Result<Option<Entry>> {
        match std::mem::replace(&mut self.position, Position::End) {
            Position::Start => {
                let root = self.entry(Vec::new(), true)?;
                return root.map(Some).ok_or_else(|| Error::new("read", self.dirs.show(b""), ErrorKind::NotFound));
            }
            Position::AtDirectory(name) => self.descend(&name)?,
            Position::AtEntry(_) => {}
            Position::End => return Ok(None),
        }
        while let Some(names) = self.names.last_mut() {
            let Some(name) = names.next() else {
                self.names.pop();
                if self.dirs.level() > 0 {
                    self.dirs.pop();
                }
                continue;
            };
            if let Some(entry) = self.entry(name, false)? {
                return Ok(Some(entry));
            }
        }
        Ok(None)
    }

    fn descend(&mut self, name: &[u8]) -> Result<()> {
        if !name.is_empty() {
            match self.dirs.push(name) {
                Ok(()) => {}
                Err(_) if self.motion == Motion::Live && self.is_gone(name)? => {
                    self.note(name, "it vanished while the tree was read");
                    return Ok(());
                }
                Err(error) => return Err(error),
            }
        }
        // The root's own descriptor may have been read before: open it anew, to start at its first entry.
        let listed = match self.dirs.level() {
            0 => open_entry(self.dirs.top()?, b".", OFlags::RDONLY | OFlags::DIRECTORY).and_then(Names::read),
            _ => Names::read(self.dirs.top()?),
        };
        self.names.push(listed.map_err(|error| read_error("list directory", self.dirs.show(b""), error))?);
        Ok(())
    }

    /// Tells whether a directory that could not be opened is no directory any more.
    fn is_gone(&mut self, name: &[u8]) -> Result<bool> {
        let found = rustix::fs::statx(self.dirs.top()?, name, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::TYPE);
        Ok(match found {
            Err(error) => error == Errno::NOENT,
            Ok(found) => FileType::from_raw_mode(u32::from(found.stx_mode)) != FileType::Directory,
        })
    }

    /// Reads one entry of the directory on top (the root itself where the name is empty).
    fn entry(&mut self, name: Vec<u8>, is_root: bool) -> Result<Option<Entry>> {
        let path = if is_root { TreePath::root() } else { self.dirs.path().child(&name)? };
        match self.read_entry(&name, &path) {
            Ok(Some(entry)) => {
                let directory = entry.kind == EntryKind::Directory;
                self.position = if directory { Position::AtDirectory(name) } else { Position::AtEntry(name) };
                Ok(Some(entry))
            }
            Ok(None) => {
                self.note(&name, "it is a socket, which is left out");
                Ok(None)
            }
            Err(Errno::NOENT) if self.motion == Motion::Live => {
                self.note(&name, "it vanished while the tree was read");
                Ok(None)
            }
            Err(error) => Err(read_error("read", self.dirs.show(&name), error)),
        }
    }

    fn read_entry(&mut self, name: &[u8], path: &TreePath) -> std::result::Result<Option<Entry>, Errno> {
        let directory = self.dirs.top().map_err(|_| Errno::NOENT)?;
        let flags = if name.is_empty() { AtFlags::EMPTY_PATH } else { AtFlags::SYMLINK_NOFOLLOW };
        let status = Status::from(rustix::fs::statx(directory, name, flags, StatxFlags::BASIC_STATS)?);
        let mut stat = status.stat;
        self.last_type = status.file_type;
        self.linked_kind = None;
        let mut kind = match status.file_type {
            FileType::Directory => EntryKind::Directory,
            FileType::RegularFile => EntryKind::File { size: stat.size },
            FileType::Symlink => {
                EntryKind::Symlink { target: rustix::fs::readlinkat(directory, name, Vec::new())?.into_bytes() }
            }
            FileType::Fifo => EntryKind::Fifo,
            FileType::CharacterDevice => EntryKind::CharDevice { major: status.rdev.0, minor: status.rdev.1 },
            FileType::BlockDevice => EntryKind::BlockDevice { major: status.rdev.0, minor: status.rdev.1 },
            _ => return Ok(None),
        };
        let xattrs = match self.attributes {
            Attributes::Eager => self.reader.read(directory, name)?,
            Attributes::OnDemand => Vec::new(),
        };
        if let Some(to) = self.groups.place(path, &kind, &mut stat) {
            self.linked_kind = Some(std::mem::replace(&mut kind, EntryKind::HardLink { to }));
        }
        let (mode, uid, gid) = (status.mode, status.uid, status.gid);
        Ok(Some(Entry { path: path.clone(), kind, mode, uid, gid, mtime: stat.mtime, xattrs, stat }))
    }

    fn note(&mut self, name: &[u8], what: &str) {
        let mut path = self.dirs.path().clone();
        path.push(name);
        self.findings.add(&path, what);
    }
}

impl Iterator for Walk {
    type Item = Result<Entry>;

    fn next(&mut self) -> Option<Self::Item> {
        let next = match self.step() {
            Ok(next) => self.groups.take_error().map_or(Ok(next), Err),
            Err(error) => Err(error),
        };
        if !matches!(next, Ok(Some(_))) {
            self.position = Position::End;
            self.names.clear();
        }
        next.transpose()
    }
}

/// A directory's names, sorted, in one allocation; 1,000,000 names take some 30 MB.
#[derive(Debug)]
pub(super) struct Names {
    bytes: Vec<u8>,
    /// Start and length of each name, last one first.
    spans: Vec<(u32, u8)>,
}

impl Names {
    pub(super) fn read(directory: impl std::os::fd::AsFd) -> std::result::Result<Self, Errno> {
        let mut buffer = [MaybeUninit::uninit(); 32 * 1024];
        let mut entries = RawDir::new(directory, &mut buffer);
        let mut bytes = Vec::new();
        let mut spans = Vec::new();
        while let Some(entry) = entries.next() {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            if name == b"." || name == b".." {
                continue;
            }
            let start = u32::try_from(bytes.len()).map_err(|_| Errno::FBIG)?;
            spans.push((start, u8::try_from(name.len()).map_err(|_| Errno::NAMETOOLONG)?));
            bytes.extend_from_slice(name);
        }
        let name = |span: &(u32, u8)| &bytes[span.0 as usize..span.0 as usize + usize::from(span.1)];
        spans.sort_unstable_by(|a, b| name(b).cmp(name(a)));
        // A directory that is written to while it is listed may show a name twice (readdir(3)).
        spans.dedup_by(|a, b| name(a) == name(b));
        Ok(Self { bytes, spans })
    }

    pub(super) fn next(&mut self) -> Option<Vec<u8>> {
        let (start, length) = self.spans.pop()?;
        Some(self.bytes[start as usize..start as usize + usize::from(length)].to_vec())
    }
}

/// Tells which paths are names of one inode.
#[derive(Debug)]
struct Groups {
    links: Links,
    /// By device and inode: the first path, and how many names are still to come.
    open: HashMap<(u64, u64), (TreePath, u32)>,
    /// The inventory's entry at or behind the walk's place.
    ahead: Option<InventoryEntry>,
    recorded: Option<InventoryEntry>,
    error: Option<Error>,
}

impl Groups {
    fn new(links: Links) -> Self {
        Self { links, open: HashMap::new(), ahead: None, recorded: None, error: None }
    }

    /// Returns the group's first path when this is a further name; sets `stat.nlink` to the names in the tree.
    fn place(&mut self, path: &TreePath, kind: &EntryKind, stat: &mut super::entry::Stat) -> Option<TreePath> {
        if let Links::Inventory(inventory) = &mut self.links {
            self.recorded = None;
            while self.ahead.as_ref().is_none_or(|ahead| ahead.entry.path < *path) {
                match inventory.next() {
                    Some(Ok(next)) => self.ahead = Some(next),
                    Some(Err(error)) => {
                        self.error = Some(error);
                        return None;
                    }
                    None => break,
                }
            }
            self.recorded = self.ahead.take_if(|ahead| ahead.entry.path == *path);
            let recorded = self.recorded.as_ref()?;
            if *kind == EntryKind::Directory {
                return None;
            }
            stat.nlink = recorded.entry.stat.nlink;
            return match &recorded.entry.kind {
                EntryKind::HardLink { to } => Some(to.clone()),
                _ => None,
            };
        }
        if stat.nlink < 2 || *kind == EntryKind::Directory {
            return None;
        }
        let key = (stat.dev, stat.ino);
        match self.open.get_mut(&key) {
            Some((first, left)) => {
                let first = first.clone();
                *left -= 1;
                if *left == 0 {
                    self.open.remove(&key);
                }
                Some(first)
            }
            None => {
                self.open.insert(key, (path.clone(), stat.nlink - 1));
                None
            }
        }
    }

    fn take_error(&mut self) -> Option<Error> {
        self.error.take()
    }
}
