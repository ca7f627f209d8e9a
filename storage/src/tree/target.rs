//! What a delta leads to: a tree that is walked, or one that is put together of several, entry by entry.
//!
//! Owns the one interface that [`super::write`] sees of either. Refuses to know what becomes of the entries.

use super::{
    entry::Entry,
    inventory::InventoryEntry,
    walk::{READING, Walk},
};
use crate::{driver::Finding, error::Result};

/// The tree that a delta leads to: one that is walked, or one that is put together of several.
pub(super) trait Target: std::fmt::Debug + Send {
    /// Returns the next entry in walk order; its attributes may be left out.
    fn next(&mut self) -> Result<Option<Entry>>;
    /// Reads the attributes of the entry that was returned last.
    fn load_attributes(&mut self, entry: &mut Entry) -> Result<()>;
    /// Opens the file that was returned last.
    fn open_last(&mut self) -> Result<std::os::fd::OwnedFd>;
    /// Returns what an inventory says about the entry that was returned last.
    fn recorded(&self) -> Option<&InventoryEntry>;
    /// Returns what was left out.
    fn take_findings(&mut self) -> Vec<Finding>;
}

impl Target for Walk {
    fn next(&mut self) -> Result<Option<Entry>> {
        Iterator::next(self).transpose()
    }

    fn load_attributes(&mut self, entry: &mut Entry) -> Result<()> {
        Self::load_attributes(self, entry)
    }

    fn open_last(&mut self) -> Result<std::os::fd::OwnedFd> {
        Self::open_last(self, READING)
    }

    fn recorded(&self) -> Option<&InventoryEntry> {
        Self::recorded(self)
    }

    fn take_findings(&mut self) -> Vec<Finding> {
        Self::take_findings(self)
    }
}

impl Target for Box<dyn Target> {
    fn next(&mut self) -> Result<Option<Entry>> {
        (**self).next()
    }

    fn load_attributes(&mut self, entry: &mut Entry) -> Result<()> {
        (**self).load_attributes(entry)
    }

    fn open_last(&mut self) -> Result<std::os::fd::OwnedFd> {
        (**self).open_last()
    }

    fn recorded(&self) -> Option<&InventoryEntry> {
        (**self).recorded()
    }

    fn take_findings(&mut self) -> Vec<Finding> {
        (**self).take_findings()
    }
}

/// A walk and the entry it stands at. The walk is moved on only after that entry was dealt with, so that the entry's
/// file can still be opened.
#[derive(Debug)]
pub(super) struct Ahead<W> {
    pub(super) walk: W,
    pub(super) next: Option<Entry>,
    shown: String,
}

impl<W: Target> Ahead<W> {
    pub(super) fn new(shown: String, walk: W) -> Result<Self> {
        let mut ahead = Self { walk, next: None, shown };
        ahead.advance()?;
        Ok(ahead)
    }

    pub(super) fn advance(&mut self) -> Result<()> {
        self.next = self.walk.next()?;
        Ok(())
    }

    pub(super) fn walk_root(&self) -> &str {
        &self.shown
    }
}
