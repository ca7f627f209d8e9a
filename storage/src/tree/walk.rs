//! Walks a tree in one fixed order: a directory, then its entries by the bytes of their names.
//!
//! Memory: the names of the directories between the root and where the walk stands, and one small value per inode
//! with several names until all of them were met. Refuses to know contents.

use std::{collections::HashSet, mem::MaybeUninit, os::fd::OwnedFd};

use rustix::{
    fs::{AtFlags, FileType, OFlags, RawDir, StatxFlags},
    io::Errno,
};

use super::{
    entry::{Entry, EntryKind, Status},
    findings::Findings,
    groups::Groups,
    inventory::{InventoryEntry, InventoryReader},
    path::TreePath,
    root::{DirStack, Root, open_entry, open_quietly, read_error},
    witness::{self, Witness},
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
    /// The same; and an entry that is not as the inventory says, one that it does not know and one that is missing end the
    /// walk with [`ErrorKind::Tampered`]. What [`Walk::skip_contents`] leaves out is not looked at.
    Witnessed(Witness),
    /// By inode, in a tree that was made of links into one with this inventory and has been changed since. An inode that the
    /// inventory knows and gives one name has one, unless it is among the first names of inodes that were given further
    /// ones since; so memory grows with those only. `None`: those are not known.
    Linked(Box<InventoryReader>, Option<HashSet<TreePath>>),
}

impl Links {
    pub(super) fn inventory(&self) -> Option<&InventoryReader> {
        match self {
            Self::ByInode => None,
            Self::Inventory(inventory) | Self::Linked(inventory, _) => Some(inventory),
            Self::Witnessed(witness) => Some(&witness.inventory),
        }
    }

    pub(super) fn inventory_mut(&mut self) -> Option<&mut InventoryReader> {
        match self {
            Self::ByInode => None,
            Self::Inventory(inventory) | Self::Linked(inventory, _) => Some(inventory),
            Self::Witnessed(witness) => Some(&mut witness.inventory),
        }
    }
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
pub enum Attributes {
    /// With each entry.
    Eager,
    /// When [`Walk::load_attributes`] asks for them: entries come without. A witnessed walk knows them without asking.
    OnDemand,
}

/// How the files of a walk are opened to be read: what stands in a file's place, a fifo say, does not hold it up.
pub(super) const READING: OFlags = OFlags::RDONLY.union(OFlags::NONBLOCK);

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
    /// The name of the last entry in the directory on top; empty for the root.
    name: Vec<u8>,
    last_type: FileType,
    /// What the inode is, where the last entry is a further name of one.
    linked_kind: Option<EntryKind>,
    /// Files are opened before they are looked at.
    opens: bool,
    /// The last entry, where it was opened.
    opened: Option<OwnedFd>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Position {
    Start,
    /// The last entry was a directory, which is gone into next.
    AtDirectory,
    /// It was anything else, or is not gone into.
    AtEntry,
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

    /// Starts a walk with every choice made.
    pub fn with(root: Root, links: Links, motion: Motion, attributes: Attributes) -> Self {
        Self {
            dirs: DirStack::new(root),
            names: Vec::new(),
            groups: Groups::new(links),
            motion,
            attributes,
            reader: XattrReader::new(),
            findings: Findings::default(),
            position: Position::Start,
            name: Vec::new(),
            last_type: FileType::Unknown,
            linked_kind: None,
            opens: false,
            opened: None,
        }
    }

    /// Opens each file that the inventory knows before it looks at it, which saves going by its path twice: for a walk whose
    /// files are all read.
    #[must_use]
    pub(super) fn opening(mut self) -> Self {
        self.opens = true;
        self
    }

    /// Returns what was left out so far: sockets, and what vanished from a live tree.
    pub fn take_findings(&mut self) -> Vec<Finding> {
        self.findings.take()
    }

    /// Leaves out what is in the directory that was returned last.
    pub fn skip_contents(&mut self) {
        if self.position == Position::AtDirectory {
            self.position = Position::AtEntry;
            let mut path = self.dirs.path().clone();
            if !self.name.is_empty() {
                path.push(&self.name);
            }
            self.groups.skip(path);
        }
    }

    /// Opens the entry that was returned last for reading (`O_NOFOLLOW` and `O_CLOEXEC` are added); its access time stays.
    pub fn open_last(&mut self, flags: OFlags) -> Result<OwnedFd> {
        if !self.is_at_entry() {
            return Err(Error::new("open", self.dirs.show(b""), ErrorKind::NotFound));
        }
        let name = if self.name.is_empty() { &b"."[..] } else { &self.name };
        if let Some(opened) = self.opened.take().filter(|_| flags == READING) {
            return Ok(opened);
        }
        let opened = open_quietly(self.dirs.top()?, name, flags);
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
        self.groups.recorded()
    }

    /// Tells whether the inventory of [`Links::Linked`] has an entry that the tree has not; final at the end of the walk.
    pub fn lacks_some(&self) -> bool {
        self.groups.lacks_some()
    }

    /// Reads the extended attributes of the entry that was returned last, if it came without. One that is gone from a live
    /// tree by now has none.
    pub fn load_attributes(&mut self, entry: &mut Entry) -> Result<()> {
        let is_known = self.attributes == Attributes::Eager || matches!(self.groups.links, Links::Witnessed(_));
        if is_known || !self.is_at_entry() {
            return Ok(());
        }
        match self.reader.read(self.dirs.top()?, &self.name) {
            Ok(xattrs) => entry.xattrs = xattrs,
            Err(Errno::NOENT) if self.motion == Motion::Live => {}
            Err(error) => {
                return Err(read_error("read extended attributes of", self.dirs.show(&self.name), error));
            }
        }
        Ok(())
    }

    fn is_at_entry(&self) -> bool {
        matches!(self.position, Position::AtDirectory | Position::AtEntry)
    }

    fn step(&mut self) -> Result<Option<Entry>> {
        while self.go_on()? {
            let path = self.path_here()?;
            if let Some(entry) = self.look(path)? {
                return Ok(Some(entry));
            }
        }
        Ok(None)
    }

    /// Goes to the next name; `false` at the end. Whoever calls it then [looks](Self::look) at it or [passes](Self::pass) it.
    pub(super) fn go_on(&mut self) -> Result<bool> {
        match std::mem::replace(&mut self.position, Position::End) {
            Position::Start => return Ok(true),
            Position::AtDirectory => self.descend()?,
            Position::AtEntry => {}
            Position::End => return Ok(false),
        }
        while let Some(names) = self.names.last_mut() {
            if names.next_into(&mut self.name) {
                return Ok(true);
            }
            self.names.pop();
            if self.dirs.level() > 0 {
                self.dirs.pop();
            }
        }
        Ok(false)
    }

    /// Returns the path of the name that was gone to.
    pub(super) fn path_here(&self) -> Result<TreePath> {
        if self.name.is_empty() { Ok(TreePath::root()) } else { self.dirs.path().child(&self.name) }
    }

    /// Leaves the name that was gone to, which is a file's with one name, without looking at it.
    pub(super) fn pass(&mut self, path: &TreePath) {
        self.position = Position::AtEntry;
        self.last_type = FileType::RegularFile;
        self.linked_kind = None;
        self.groups.seek(path);
    }

    /// Ends the walk where there is nothing more, or an error.
    pub(super) fn conclude<T>(&mut self, mut next: Result<Option<T>>) -> Result<Option<T>> {
        if matches!(next, Ok(None)) {
            self.groups.end();
        }
        if let (Ok(_), Some(error)) = (&next, self.groups.take_error()) {
            next = Err(error);
        }
        if !matches!(next, Ok(Some(_))) {
            self.position = Position::End;
            self.names.clear();
        }
        next
    }

    fn descend(&mut self) -> Result<()> {
        if !self.name.is_empty() {
            match self.dirs.push(&self.name) {
                Ok(()) => {}
                Err(_) if self.motion == Motion::Live && self.is_gone()? => {
                    self.note("it vanished while the tree was read");
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
    fn is_gone(&mut self) -> Result<bool> {
        let found = rustix::fs::statx(self.dirs.top()?, &self.name, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::TYPE);
        Ok(match found {
            Err(error) => error == Errno::NOENT,
            Ok(found) => FileType::from_raw_mode(u32::from(found.stx_mode)) != FileType::Directory,
        })
    }

    /// Reads the entry of the name that was gone to; `None` where it is left out.
    pub(super) fn look(&mut self, path: TreePath) -> Result<Option<Entry>> {
        self.position = Position::AtEntry;
        let is_root = path.is_root();
        match self.read_entry(path) {
            Ok(Some(entry)) => {
                if entry.kind == EntryKind::Directory {
                    self.position = Position::AtDirectory;
                }
                Ok(Some(entry))
            }
            Ok(None) => {
                self.note("it is a socket, which is left out");
                if let Links::Witnessed(witness) = &self.groups.links {
                    return Err(witness.tampered(&self.path_here()?, "it was added"));
                }
                Ok(None)
            }
            Err(Errno::NOENT) if self.motion == Motion::Live && !is_root => {
                self.note("it vanished while the tree was read");
                Ok(None)
            }
            Err(error) => Err(read_error("read", self.dirs.show(&self.name), error)),
        }
    }

    fn read_entry(&mut self, path: TreePath) -> std::result::Result<Option<Entry>, Errno> {
        self.groups.seek(&path);
        let name = self.name.as_slice();
        let directory = self.dirs.top().map_err(|_| Errno::NOENT)?;
        let expects_file = self.opens && self.groups.recorded().is_some_and(InventoryEntry::is_file);
        // Why it cannot be opened is told by a look at it.
        self.opened = if expects_file { open_quietly(directory, name, READING).ok() } else { None };
        let status = match &self.opened {
            Some(file) => rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS)?,
            None if name.is_empty() => rustix::fs::statx(directory, "", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS)?,
            None => rustix::fs::statx(directory, name, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::BASIC_STATS)?,
        };
        let status = Status::from(status);
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
        let is_witnessed = matches!(self.groups.links, Links::Witnessed(_));
        let xattrs = match self.attributes {
            Attributes::Eager if !is_witnessed => self.reader.read(directory, name)?,
            _ => Vec::new(),
        };
        if let Some(to) = self.groups.place(&path, &kind, &mut stat) {
            self.linked_kind = Some(std::mem::replace(&mut kind, EntryKind::HardLink { to }));
        }
        let (mode, uid, gid) = (status.mode, status.uid, status.gid);
        let mut entry = Entry { path, kind, mode, uid, gid, mtime: stat.mtime, xattrs, stat };
        if let Some(record) = self.groups.recorded().filter(|_| is_witnessed) {
            if witness::has_attributes_of(&entry, record) {
                entry.xattrs.clone_from(&record.entry.xattrs);
            } else {
                entry.xattrs = self.reader.read(directory, name)?;
            }
            self.groups.testify(&entry);
        }
        Ok(Some(entry))
    }

    fn note(&mut self, what: &str) {
        let mut path = self.dirs.path().clone();
        path.push(&self.name);
        self.findings.add(&path, what);
    }
}

impl Iterator for Walk {
    type Item = Result<Entry>;

    fn next(&mut self) -> Option<Self::Item> {
        let next = self.step();
        self.conclude(next).transpose()
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
        let mut name = Vec::new();
        self.next_into(&mut name).then_some(name)
    }

    /// Puts the next name in place of another one; `false` when there is none.
    fn next_into(&mut self, name: &mut Vec<u8>) -> bool {
        let Some((start, length)) = self.spans.pop() else { return false };
        name.clear();
        name.extend_from_slice(&self.bytes[start as usize..start as usize + usize::from(length)]);
        true
    }
}
