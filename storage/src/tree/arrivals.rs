//! What a receive knows of the files it has written, so that nothing has to be read again to make the tree's inventory.
//!
//! Owns a file of entries in the order of the stream (which is that of a walk) and the first names of inodes that were
//! given further ones. The file has no name, so nothing of it outlives the process. An entry lies in it as it will lie in the
//! inventory, behind a byte that tells whether its contents were hashed. What arrived under one name is as it was
//! left: nobody else writes to a tree that is being received. For everything else whoever asks looks at the tree. So it need
//! not be complete: a receive that goes on after a restart begins a new one. Neighbours: [`super::apply`] writes it,
//! [`super::received`] reads it beside a walk.

use std::{
    collections::HashSet,
    fs::File,
    io::{BufReader, BufWriter, Read as _, Seek as _, Write as _},
    path::{Path, PathBuf},
};

use super::{
    entry::{Entry, EntryKind},
    inventory::{Frame, InventoryEntry},
    path::TreePath,
};
use crate::error::{Error, ErrorKind, Result};

/// How many first names are kept: some 10 MB. Where a tree has more inodes with several names, they are told by inode.
const FURTHER_NAMES_LIMIT: usize = 100_000;

/// Before each record: whether its file was hashed.
const HASHED: u8 = 1;
const NOT_HASHED: u8 = 0;

/// Takes down what arrives.
#[derive(Debug)]
pub struct Arrivals {
    out: BufWriter<File>,
    path: PathBuf,
    /// Kept from one entry to the next.
    frame: Frame,
    further: Option<HashSet<TreePath>>,
}

impl Arrivals {
    /// Makes the file in a folder, where nothing is called `arrivals`, and takes its name away at once.
    pub fn begin(folder: &Path, sight: Sight) -> Result<Self> {
        use std::os::unix::fs::OpenOptionsExt as _;
        let path = folder.join("arrivals");
        let file = File::options().read(true).write(true).create_new(true).mode(0o600).open(&path);
        let file = file.map_err(|error| Error::io("create", path.display(), error))?;
        std::fs::remove_file(&path).map_err(|error| Error::io("take the name of", path.display(), error))?;
        let out = BufWriter::with_capacity(64 * 1024, file);
        Ok(Self { out, path, frame: Frame::default(), further: (sight == Sight::Whole).then(HashSet::new) })
    }

    /// Notes a file as it was left. Files come in walk order.
    pub(super) fn file(&mut self, entry: Entry, digest: Option<[u8; 32]>) -> Result<()> {
        let hashed = if digest.is_some() { HASHED } else { NOT_HASHED };
        let set = self.frame.set(&InventoryEntry { entry, origin: None, digest });
        set.map_err(|kind| Error::new("write", self.path.display(), kind))?;
        let written = self.out.write_all(&[hashed]).and_then(|()| self.out.write_all(self.frame.as_bytes()));
        written.map_err(|error| Error::io("write", self.path.display(), error))
    }

    /// Notes that the inode of a path was given a further name.
    pub(super) fn further_name(&mut self, first: &TreePath) {
        if let Some(further) = &mut self.further
            && !further.contains(first)
        {
            if further.len() < FURTHER_NAMES_LIMIT {
                further.insert(first.clone());
            } else {
                self.further = None;
            }
        }
    }

    /// Ends the writing.
    pub fn into_known(self) -> Result<Known> {
        let Self { out, path, frame, further } = self;
        let file = out.into_inner().map_err(std::io::IntoInnerError::into_error).and_then(|mut file| {
            file.rewind()?;
            Ok(file)
        });
        let file = file.map_err(|error| Error::io("write", path.display(), error))?;
        let input = BufReader::with_capacity(64 * 1024, file);
        let ahead = Noted { path: TreePath::root(), size: 0, frame, hashed: false };
        Ok(Known { input, shown: path, ahead, state: State::Before, further })
    }
}

/// How much of a receive is seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sight {
    /// All of it.
    Whole,
    /// What comes after a break.
    Rest,
}

/// What arrived, to be asked in walk order.
#[derive(Debug)]
pub struct Known {
    input: BufReader<File>,
    shown: PathBuf,
    /// The file at or behind the place that was asked for last.
    ahead: Noted,
    state: State,
    further: Option<HashSet<TreePath>>,
}

/// One file that arrived.
#[derive(Debug)]
pub(super) struct Noted {
    pub(super) path: TreePath,
    pub(super) size: u64,
    pub(super) frame: Frame,
    hashed: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Before,
    Reading,
    Ended,
}

/// What is known of a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Presence {
    /// Nothing.
    Absent,
    /// All: it was hashed, and nothing can have touched it since.
    AsLeft,
    /// What it was; something may have touched it since, or it was not hashed.
    AsItWas,
}

impl Known {
    /// Returns the first names of inodes that were given further ones; `None` where not all are known.
    pub fn further_names(&self) -> Option<HashSet<TreePath>> {
        self.further.clone()
    }

    /// Returns what is known of the file at a path. Paths must not go back.
    pub(super) fn seek(&mut self, path: &TreePath) -> Result<Presence> {
        while self.state == State::Before || (self.state == State::Reading && self.ahead.path < *path) {
            self.state = if self.read()? { State::Reading } else { State::Ended };
        }
        if self.state == State::Ended || self.ahead.path != *path {
            return Ok(Presence::Absent);
        }
        let has_one_name = self.further.as_ref().is_some_and(|further| !further.contains(path));
        Ok(if has_one_name && self.ahead.hashed { Presence::AsLeft } else { Presence::AsItWas })
    }

    /// Returns the file that was found last.
    pub(super) fn found(&self) -> &Noted {
        &self.ahead
    }

    /// Reads all that was noted of the file that was found last.
    pub(super) fn entry(&self) -> Result<InventoryEntry> {
        self.ahead.frame.entry().ok_or_else(|| self.corrupt())
    }

    /// Reads the next one; `false` at the end.
    fn read(&mut self) -> Result<bool> {
        let mut hashed = [0];
        let failed = |error| Error::io("read", self.shown.display(), error);
        if self.input.read(&mut hashed).map_err(failed)? == 0 {
            return Ok(false);
        }
        self.ahead.hashed = hashed == [HASHED];
        self.ahead.frame.read_from(&mut self.input).map_err(failed)?;
        let Some((path, EntryKind::File { size })) = self.ahead.frame.head() else { return Err(self.corrupt()) };
        self.ahead.path.set(path);
        self.ahead.size = size;
        Ok(true)
    }

    fn corrupt(&self) -> Error {
        Error::new("read", self.shown.display(), ErrorKind::Corrupt("what was noted there has changed".to_owned()))
    }
}

/// What is known of one file.
#[derive(Debug)]
pub struct Facts {
    /// Its extended attributes, unless something has touched the inode since.
    pub xattrs: Option<super::entry::Xattrs>,
    /// BLAKE3 of its contents, where they passed through memory from front to end.
    pub digest: Option<[u8; 32]>,
}

impl Facts {
    /// Returns what of what is known holds for a file that is `entry` now: attributes only if it has not changed since, which
    /// moves the ctime.
    pub(super) fn holding(known: InventoryEntry, entry: &Entry) -> Option<Self> {
        let InventoryEntry { entry: Entry { xattrs, stat, .. }, digest, .. } = known;
        if (stat.ino, stat.size, stat.mtime) != (entry.stat.ino, entry.stat.size, entry.stat.mtime) {
            return None;
        }
        Some(Self { xattrs: entry.stat.is_unchanged_since(&stat).then_some(xattrs), digest })
    }
}
