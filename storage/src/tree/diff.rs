//! What differs between two trees, path by path in walk order, as a stream.
//!
//! Memory: that of a [`Weave`]. Nothing is kept of what was yielded. Two equal trees yield nothing.

use serde::{Deserialize, Serialize};

use super::{
    entry::{Entry, EntryKind},
    path::TreePath,
    weave::{TreeView, Weave},
};
use crate::error::Result;

/// What a difference is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Property {
    /// Another kind of thing is there.
    Type,
    /// A file's bytes.
    Content,
    /// Where a symbolic link points, or a device's numbers.
    Target,
    /// Permissions.
    Mode,
    /// Owner or group.
    Owner,
    /// Extended attributes, access control lists among them.
    Xattrs,
    /// The time of the last change.
    Times,
    /// Which names its inode has.
    Links,
}

/// Which tree has a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Difference {
    /// Only the second one.
    Added,
    /// Only the first one.
    Removed,
    /// Both, and they differ.
    Changed,
}

/// One path that differs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// The path.
    pub path: TreePath,
    /// Who has it.
    pub difference: Difference,
    /// What differs; empty unless both have it.
    pub properties: Vec<Property>,
    /// What is there, in the second tree where it has it.
    pub kind: EntryKind,
    /// Bytes of files: all that was added or removed, or the blocks that changed. Further names of an inode count none.
    pub bytes: u64,
}

/// An iterator over the differences. After an error it ends.
#[derive(Debug)]
pub struct TreeDiff {
    weave: Weave,
    ended: bool,
}

const FROM: usize = 0;
const TO: usize = 1;

impl TreeDiff {
    /// Starts to compare.
    pub fn new(from: TreeView, to: TreeView) -> Self {
        Self { weave: Weave::new([from, to]), ended: false }
    }

    fn step(&mut self) -> Result<Option<Change>> {
        while self.weave.advance()? {
            let lone = match (self.weave.entry(FROM), self.weave.entry(TO)) {
                (Some(_), Some(_)) => {
                    if let Some(change) = self.both()? {
                        return Ok(Some(change));
                    }
                    continue;
                }
                (Some(entry), None) => (entry, Difference::Removed),
                (None, Some(entry)) => (entry, Difference::Added),
                (None, None) => continue,
            };
            let (entry, difference) = lone;
            let bytes = size(&entry.kind);
            let (path, kind) = (entry.path.clone(), entry.kind.clone());
            return Ok(Some(Change { path, difference, properties: Vec::new(), kind, bytes }));
        }
        Ok(None)
    }

    fn both(&mut self) -> Result<Option<Change>> {
        if self.weave.is_same(FROM, TO) {
            return Ok(None);
        }
        self.weave.load(FROM)?;
        self.weave.load(TO)?;
        let mut properties = Vec::new();
        let kinds = self.weave.kind(FROM).zip(self.weave.kind(TO));
        let mut is_file = false;
        if let Some((old, new)) = kinds {
            if std::mem::discriminant(old) != std::mem::discriminant(new) {
                properties.push(Property::Type);
            } else if matches!(new, EntryKind::File { .. }) {
                is_file = true;
            } else if old != new {
                properties.push(Property::Target);
            }
        }
        let mut bytes = 0;
        if is_file {
            bytes = self.weave.changed_bytes(FROM, TO)?;
            if bytes > 0 {
                properties.push(Property::Content);
            }
        }
        let (Some(old), Some(new)) = (self.weave.entry(FROM), self.weave.entry(TO)) else { return Ok(None) };
        if old.mode != new.mode {
            properties.push(Property::Mode);
        }
        if (old.uid, old.gid) != (new.uid, new.gid) {
            properties.push(Property::Owner);
        }
        if old.xattrs != new.xattrs {
            properties.push(Property::Xattrs);
        }
        if old.mtime != new.mtime {
            properties.push(Property::Times);
        }
        if first_name(old) != first_name(new) && !properties.contains(&Property::Type) {
            properties.push(Property::Links);
        }
        if matches!(new.kind, EntryKind::HardLink { .. }) {
            bytes = 0;
        } else if properties.contains(&Property::Type) {
            bytes = size(&new.kind);
        }
        let (path, kind) = (new.path.clone(), new.kind.clone());
        let change = Change { path, difference: Difference::Changed, properties, kind, bytes };
        Ok((!change.properties.is_empty()).then_some(change))
    }
}

impl Iterator for TreeDiff {
    type Item = Result<Change>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        let next = self.step();
        self.ended = !matches!(next, Ok(Some(_)));
        next.transpose()
    }
}

fn first_name(entry: &Entry) -> &TreePath {
    match &entry.kind {
        EntryKind::HardLink { to } => to,
        _ => &entry.path,
    }
}

fn size(kind: &EntryKind) -> u64 {
    match kind {
        EntryKind::File { size } => *size,
        _ => 0,
    }
}
