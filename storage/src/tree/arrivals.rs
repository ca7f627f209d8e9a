//! What a receive knows of the files it has written, so that nothing has to be read again to make the tree's inventory.
//!
//! Owns a file of entries in the order of the stream (which is that of a walk) and the first names of inodes that were
//! given further ones. The file has no name, so nothing of it outlives the process. A file counts as known only while
//! inode, size and times are those it was left with; for everything else whoever asks reads the tree. So it need not be
//! complete: a receive that goes on after a restart begins a new one. Neighbours: [`super::apply`] writes it, the directory
//! driver's commit reads it.

use std::{collections::HashSet, path::Path};

use super::{
    entry::Entry,
    inventory::{InventoryEntry, InventoryReader, InventoryWriter},
    path::TreePath,
};
use crate::error::{Error, Result};

/// How many first names are kept: some 10 MB. Where a tree has more inodes with several names, they are told by inode.
const FURTHER_NAMES_LIMIT: usize = 100_000;

/// Takes down what arrives.
#[derive(Debug)]
pub struct Arrivals {
    writer: InventoryWriter,
    further: Option<HashSet<TreePath>>,
}

impl Arrivals {
    /// Makes the file in a folder, where nothing is called `arrivals`, and takes its name away at once.
    pub fn begin(folder: &Path, sight: Sight) -> Result<Self> {
        let path = folder.join("arrivals");
        let writer = InventoryWriter::create(&path)?;
        std::fs::remove_file(&path).map_err(|error| Error::io("take the name of", path.display(), error))?;
        Ok(Self { writer, further: (sight == Sight::Whole).then(HashSet::new) })
    }

    /// Notes a file as it was left.
    pub(super) fn file(&mut self, entry: Entry, digest: Option<[u8; 32]>) -> Result<()> {
        self.writer.add(&InventoryEntry { entry, origin: None, digest })
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
        Ok(Known { reader: self.writer.into_reader()?, ahead: None, further: self.further })
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
    reader: InventoryReader,
    ahead: Option<InventoryEntry>,
    further: Option<HashSet<TreePath>>,
}

impl Known {
    /// Takes out the first names of inodes that were given further ones; `None` where not all are known.
    pub fn take_further_names(&mut self) -> Option<HashSet<TreePath>> {
        self.further.take()
    }

    /// Returns what is known of a file that lies where `entry` says; attributes only if they have not changed since, which
    /// moves the ctime. Paths must not go back.
    pub fn of(&mut self, entry: &Entry) -> Result<Option<Facts>> {
        while self.ahead.as_ref().is_none_or(|ahead| ahead.entry.path < entry.path) {
            self.ahead = self.reader.next().transpose()?;
            if self.ahead.is_none() {
                return Ok(None);
            }
        }
        let Some(known) = self.ahead.take_if(|ahead| ahead.entry.path == entry.path) else { return Ok(None) };
        let InventoryEntry { entry: Entry { xattrs, stat, .. }, digest, .. } = known;
        if (stat.ino, stat.size, stat.mtime) != (entry.stat.ino, entry.stat.size, entry.stat.mtime) {
            return Ok(None);
        }
        let xattrs = entry.stat.is_unchanged_since(&stat).then_some(xattrs);
        Ok(Some(Facts { xattrs, digest }))
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
