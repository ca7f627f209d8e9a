//! A tree held against its inventory: whether somebody changed it since.
//!
//! Owns what counts as a change, and the inventory that goes along with a walk. Refuses to know what becomes of a changed
//! tree. Neighbour: [`super::walk`], which asks about each entry.

use std::path::PathBuf;

use super::{
    entry::{Entry, EntryKind},
    inventory::{InventoryEntry, InventoryReader},
    path::TreePath,
};
use crate::error::{Error, ErrorKind};

/// An inventory that a walk is held against, and the words for saying what it is not.
#[derive(Debug)]
pub struct Witness {
    pub(super) inventory: Box<InventoryReader>,
    operation: &'static str,
    object: String,
}

impl Witness {
    /// Makes one of a tree's inventory; an error names what was done, on what.
    pub fn new(inventory: InventoryReader, operation: &'static str, object: impl std::fmt::Display) -> Self {
        Self { inventory: Box::new(inventory), operation, object: object.to_string() }
    }

    pub(super) fn tampered(&self, path: &TreePath, what: impl Into<String>) -> Error {
        let path = if path.is_root() { PathBuf::from(".") } else { path.as_path().to_owned() };
        Error::new(self.operation, &self.object, ErrorKind::Tampered { path, what: what.into() })
    }
}

/// Says what differs between an entry and its record, of all that a link into a further snapshot leaves alone (which the
/// ctime and the links are not).
pub fn difference(entry: &Entry, record: &Entry) -> Option<String> {
    let of = |what: &str| Some(format!("its {what} changed"));
    match (&entry.kind, &record.kind) {
        (EntryKind::File { size: now }, EntryKind::File { size: then }) if now != then => {
            return Some(format!("its size changed from {then} to {now} bytes"));
        }
        (now, then) if now.word() != then.word() => {
            return Some(format!("it changed from a {} to a {}", then.word(), now.word()));
        }
        (EntryKind::Symlink { target: now }, EntryKind::Symlink { target: then }) if now != then => {
            return of("target");
        }
        (now, then) if now != then => return of("kind"),
        _ => {}
    }
    if entry.mode != record.mode {
        return Some(format!("its mode changed from {:04o} to {:04o}", record.mode, entry.mode));
    }
    if (entry.uid, entry.gid) != (record.uid, record.gid) {
        return of("owner");
    }
    if entry.mtime != record.mtime {
        return of("modification time");
    }
    if entry.xattrs != record.xattrs {
        return of("extended attributes");
    }
    if entry.stat.ino != record.stat.ino {
        return Some("it was replaced by another inode".to_owned());
    }
    None
}

/// Tells whether an entry's extended attributes must be those of its record: whatever changes them moves the ctime.
pub(super) fn has_attributes_of(entry: &Entry, record: &InventoryEntry) -> bool {
    entry.stat.is_unchanged_since(&record.entry.stat)
}
