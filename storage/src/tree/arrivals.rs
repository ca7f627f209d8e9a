//! What a receive knows of the files it has written, so that nothing has to be read again to make the tree's inventory.
//!
//! Owns a file of entries in the order of the stream (which is that of a walk) and the first names of inodes that were
//! given further ones. The file has no name, so nothing of it outlives the process. What arrived under one name is as it was
//! left: nobody else writes to a tree that is being received. For everything else whoever asks looks at the tree. So it need
//! not be complete: a receive that goes on after a restart begins a new one. Neighbours: [`super::apply`] writes it, the walk
//! of the directory driver's commit reads it.

use std::{collections::HashSet, path::Path};

use super::{
    entry::Entry,
    inventory::{Checks, InventoryEntry, InventoryReader, InventoryWriter},
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
        let writer = InventoryWriter::with(&path, Checks::None)?;
        std::fs::remove_file(&path).map_err(|error| Error::io("take the name of", path.display(), error))?;
        Ok(Self { writer, further: (sight == Sight::Whole).then(HashSet::new) })
    }

    /// Notes a file as it was left.
    pub(super) fn file(&mut self, entry: Entry, digest: Option<[u8; 32]>) -> Result<()> {
        self.writer.add(InventoryEntry { entry, origin: None, digest })
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
    /// Returns the first names of inodes that were given further ones; `None` where not all are known.
    pub fn further_names(&self) -> Option<HashSet<TreePath>> {
        self.further.clone()
    }

    /// Returns what is known of the file at a path, and whether nothing can have touched it since. Paths must not go back.
    pub(super) fn at(&mut self, path: &TreePath) -> Result<Option<(InventoryEntry, bool)>> {
        while self.ahead.as_ref().is_none_or(|ahead| ahead.entry.path < *path) {
            self.ahead = self.reader.next().transpose()?;
            if self.ahead.is_none() {
                return Ok(None);
            }
        }
        let Some(known) = self.ahead.take_if(|ahead| ahead.entry.path == *path) else { return Ok(None) };
        let has_one_name = self.further.as_ref().is_some_and(|further| !further.contains(path));
        Ok(Some((known, has_one_name)))
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
