//! Which paths of a walk are names of one inode, and what the tree's inventory says beside it.
//!
//! Owns the inventory's place, and one small value per inode with several names until all of them were met. Neighbour:
//! [`super::walk`], which asks about each entry in its order.

use std::collections::HashMap;

use super::{
    entry::{Entry, EntryKind, Stat},
    inventory::InventoryEntry,
    path::TreePath,
    walk::Links,
    witness,
};
use crate::error::Error;

/// Tells which paths are names of one inode, and goes through the inventory beside the walk.
#[derive(Debug)]
pub(super) struct Groups {
    pub(super) links: Links,
    /// By device and inode: the first path, and how many names are still to come.
    open: HashMap<(u64, u64), (TreePath, u32)>,
    /// The inventory stands at the walk's place: what it says next is about the same path.
    is_recorded: bool,
    /// The directory whose contents were left out last.
    skipped: Option<TreePath>,
    lacks_some: bool,
    error: Option<Error>,
}

impl Groups {
    pub(super) fn new(links: Links) -> Self {
        Self { links, open: HashMap::new(), is_recorded: false, skipped: None, lacks_some: false, error: None }
    }

    /// Returns what the inventory says about the walk's place.
    pub(super) fn recorded(&self) -> Option<&InventoryEntry> {
        self.links.inventory().filter(|_| self.is_recorded)?.peeked()
    }

    /// Notes that what is in a directory is left out.
    pub(super) fn skip(&mut self, directory: TreePath) {
        self.skipped = Some(directory);
    }

    /// Tells whether the inventory has an entry that the walk did not come to.
    pub(super) fn lacks_some(&self) -> bool {
        self.lacks_some
    }

    /// Takes out what was found to be wrong.
    pub(super) fn take_error(&mut self) -> Option<Error> {
        self.error.take()
    }

    /// Returns the group's first path when this one, which was sought before, is a further name; sets `stat.nlink` to the names
    /// in the tree, where that is known.
    pub(super) fn place(&mut self, path: &TreePath, kind: &EntryKind, stat: &mut Stat) -> Option<TreePath> {
        match (&self.links, self.recorded()) {
            (Links::Witnessed(witness), None) => {
                let error = witness.tampered(path, "it was added");
                self.error.get_or_insert(error);
                None
            }
            (Links::Inventory(_) | Links::Witnessed(_), recorded) => {
                let recorded = recorded.filter(|_| *kind != EntryKind::Directory)?;
                stat.nlink = recorded.entry.stat.nlink;
                match &recorded.entry.kind {
                    EntryKind::HardLink { to } => Some(to.clone()),
                    _ => None,
                }
            }
            _ if stat.nlink < 2 || *kind == EntryKind::Directory => None,
            (Links::Linked(_, Some(further)), Some(recorded))
                if has_one_name(recorded, stat) && !further.contains(path) =>
            {
                stat.nlink = 1;
                None
            }
            _ => self.by_inode(path, stat),
        }
    }

    fn by_inode(&mut self, path: &TreePath, stat: &Stat) -> Option<TreePath> {
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

    /// Goes on in the inventory to the walk's place.
    pub(super) fn seek(&mut self, path: &TreePath) {
        self.leave();
        while let Some(ahead) = self.peek() {
            if ahead.entry.path >= *path {
                self.is_recorded = ahead.entry.path == *path;
                return;
            }
            self.pass();
        }
    }

    /// Leaves what the inventory says about the walk's place.
    fn leave(&mut self) {
        if std::mem::take(&mut self.is_recorded)
            && let Some(inventory) = self.links.inventory_mut()
        {
            inventory.skip();
        }
    }

    fn peek(&mut self) -> Option<&InventoryEntry> {
        match self.links.inventory_mut()?.peek() {
            Ok(ahead) => ahead,
            Err(error) => {
                self.error.get_or_insert(error);
                None
            }
        }
    }

    /// Leaves an entry of the inventory that the walk did not come to.
    fn pass(&mut self) {
        let Some(path) = self.links.inventory().and_then(|inventory| inventory.peeked()).map(|ahead| &ahead.entry.path)
        else {
            return;
        };
        if !self.skipped.as_ref().is_some_and(|skipped| path.is_within(skipped)) {
            self.lacks_some = true;
            if let Links::Witnessed(witness) = &self.links {
                let error = witness.tampered(path, "it is missing");
                self.error.get_or_insert(error);
            }
        }
        if let Some(inventory) = self.links.inventory_mut() {
            inventory.skip();
        }
    }

    /// Holds an entry against its record.
    pub(super) fn testify(&mut self, entry: &Entry) {
        if let (Links::Witnessed(witness), Some(record)) = (&self.links, self.recorded())
            && let Some(what) = witness::difference(entry, &record.entry)
        {
            let error = witness.tampered(&entry.path, what);
            self.error.get_or_insert(error);
        }
    }

    /// Reads the rest of the inventory, where what it says beyond the tree matters.
    pub(super) fn end(&mut self) {
        if !matches!(self.links, Links::Witnessed(_) | Links::Linked(..)) {
            return;
        }
        self.leave();
        while self.error.is_none() && self.peek().is_some() {
            self.pass();
        }
    }
}

/// Tells whether an inode is still the one that an inventory knows, with one name.
fn has_one_name(recorded: &InventoryEntry, stat: &Stat) -> bool {
    let Entry { kind, stat: known, .. } = &recorded.entry;
    known.nlink == 1 && known.ino == stat.ino && !matches!(kind, EntryKind::HardLink { .. } | EntryKind::Directory)
}
