//! A tree put together of several, as the target of a delta: entry by entry from one of them, with metadata of its own.
//!
//! Owns how such a tree looks to [`DeltaWriter`]: order, inodes with several names, entries that lie elsewhere than in
//! their own tree. Refuses to know why an entry is taken; that is its caller's to decide.

use std::{collections::VecDeque, fmt, os::fd::OwnedFd};

use super::{
    entry::{Entry, EntryKind, Stat, Time, Xattrs},
    inventory::InventoryEntry,
    path::TreePath,
    target::Target,
    weave::{Guard, StrandIndex, TreeView, Weave},
    write::DeltaWriter,
};
use crate::{
    delta::Compare,
    driver::Finding,
    error::{Error, ErrorKind, Result},
};

/// An entry of the tree at the path at hand.
#[derive(Debug, Clone)]
pub struct Composed {
    /// The tree that has it.
    pub body: StrandIndex,
    /// What is set on it; `None` where that is as its tree has it.
    pub metadata: Option<ComposedMetadata>,
    /// The first name of its inode and the number of names, where it has several in this tree.
    pub group: Option<(TreePath, u32)>,
}

/// What is set on an entry.
#[derive(Debug, Clone)]
pub struct ComposedMetadata {
    /// Permissions.
    pub mode: u32,
    /// The owner.
    pub uid: u32,
    /// The owning group.
    pub gid: u32,
    /// When the contents changed.
    pub mtime: Time,
    /// Extended attributes, sorted by name.
    pub xattrs: Xattrs,
}

/// An entry that lies elsewhere than in its own tree. Not a directory.
#[derive(Debug, Clone)]
pub struct Moved {
    /// Where it goes. None of the trees has anything there, and its directory is in the result.
    pub path: TreePath,
    /// The tree that has it.
    pub from: StrandIndex,
    /// Where it lies there.
    pub source: TreePath,
    /// What it is, hard links resolved.
    pub kind: EntryKind,
    /// What is set on it.
    pub metadata: ComposedMetadata,
}

/// Says what the tree has at the path at hand of the weave, if anything.
pub type Decide = Box<dyn FnMut(&mut Weave) -> Result<Option<Composed>> + Send>;

/// Starts a delta from `base` to a tree put together of others: `decide` is asked at each path of the weave; `moved` are
/// in walk order.
pub fn compose(base: TreeView, weave: Weave, decide: Decide, moved: Vec<Moved>) -> Result<DeltaWriter> {
    let (base, guard) = base.into_side();
    let target = Composite { weave, decide, moved: moved.into(), at: At::Start, _guard: guard };
    DeltaWriter::to(Some(base), Box::new(target), "the merged tree".to_owned(), Compare::Metadata, None)
}

struct Composite {
    weave: Weave,
    decide: Decide,
    moved: VecDeque<Moved>,
    at: At,
    /// The delta's base stays readable as long as its target does.
    _guard: Option<Guard>,
}

enum At {
    Start,
    /// The weave stands at a path that was not asked about yet.
    Before,
    /// The last entry is the one of the weave's path.
    Weave {
        body: StrandIndex,
        is_own: bool,
    },
    /// It is one that lies elsewhere; the weave stands behind it (`true`) or has ended.
    Moved(Moved, bool),
    End,
}

impl fmt::Debug for Composite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Composite").field("weave", &self.weave).finish_non_exhaustive()
    }
}

impl Composite {
    /// Makes the entry of what was decided.
    fn entry(&mut self, composed: Composed) -> Result<Entry> {
        let Composed { body, metadata, group } = composed;
        let (Some(own), Some(kind)) = (self.weave.entry(body), self.weave.kind(body)) else {
            let why = "it was decided to take what a tree does not have".to_owned();
            return Err(Error::new("merge", self.weave.path(), ErrorKind::Corrupt(why)));
        };
        let path = own.path.clone();
        let (first, nlink) = group.map_or((None, 1), |(first, names)| (Some(first), names));
        let kind = match first {
            Some(to) if to != path => EntryKind::HardLink { to },
            _ => kind.clone(),
        };
        let is_own = metadata.is_none();
        let mut entry = Entry { kind, ..own.clone() };
        match metadata {
            None => entry.stat.nlink = nlink,
            Some(ComposedMetadata { mode, uid, gid, mtime, xattrs }) => {
                // No stat: nothing may take it for the unchanged inode of its tree.
                let size = entry.stat.size;
                entry = Entry { mode, uid, gid, mtime, xattrs, stat: Stat { size, nlink, ..Stat::default() }, ..entry };
            }
        }
        self.at = At::Weave { body, is_own };
        Ok(entry)
    }
}

impl Target for Composite {
    fn next(&mut self) -> Result<Option<Entry>> {
        let mut more = match std::mem::replace(&mut self.at, At::End) {
            At::Start | At::Weave { .. } => self.weave.advance()?,
            At::Before => true,
            At::Moved(_, more) => more,
            At::End => return Ok(None),
        };
        loop {
            let is_next = |moved: &Moved| !more || moved.path < *self.weave.path();
            if self.moved.front().is_some_and(is_next)
                && let Some(moved) = self.moved.pop_front()
            {
                let ComposedMetadata { mode, uid, gid, mtime, xattrs } = moved.metadata.clone();
                let size = match moved.kind {
                    EntryKind::File { size } => size,
                    _ => 0,
                };
                let stat = Stat { size, nlink: 1, ..Stat::default() };
                let (path, kind) = (moved.path.clone(), moved.kind.clone());
                self.at = At::Moved(moved, more);
                return Ok(Some(Entry { path, kind, mode, uid, gid, mtime, xattrs, stat }));
            }
            if !more {
                return Ok(None);
            }
            self.at = At::Before;
            if let Some(composed) = (self.decide)(&mut self.weave)? {
                return self.entry(composed).map(Some);
            }
            more = self.weave.advance()?;
        }
    }

    fn load_attributes(&mut self, entry: &mut Entry) -> Result<()> {
        if let At::Weave { body, is_own: true } = self.at {
            self.weave.load(body)?;
            if let Some(own) = self.weave.entry(body) {
                entry.xattrs.clone_from(&own.xattrs);
            }
        }
        Ok(())
    }

    fn open_last(&mut self) -> Result<OwnedFd> {
        let missing = |path: &TreePath| Error::new("open", path, ErrorKind::NotFound);
        match &self.at {
            At::Weave { body, .. } => {
                let body = *body;
                self.weave.open(body)?.ok_or_else(|| missing(self.weave.path()))
            }
            At::Moved(moved, _) => self.weave.open_at(moved.from, &moved.source),
            At::Start | At::Before | At::End => Err(missing(self.weave.path())),
        }
    }

    fn recorded(&self) -> Option<&InventoryEntry> {
        match self.at {
            At::Weave { body, is_own: true } => self.weave.recorded(body),
            _ => None,
        }
    }

    fn take_findings(&mut self) -> Vec<Finding> {
        Vec::new()
    }
}
