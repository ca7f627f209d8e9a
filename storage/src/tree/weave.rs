//! Several trees walked side by side: what each has at one path, and whether that is the same.
//!
//! Memory: that of the walks (names of the directories on the way) and two windows for comparing contents. Refuses to
//! know what the trees are to each other. Neighbours: [`super::diff`] compares two, [`super::compose`] makes one of three.

use std::{any::Any, collections::BTreeSet, fmt, os::fd::OwnedFd, path::PathBuf};

use jiff::Timestamp;
use rustix::{fs::OFlags, io::Errno};

use super::{
    blocks::{Blocks, Found, Version},
    entry::{Entry, EntryKind, Time},
    inventory::InventoryReader,
    path::TreePath,
    root::Root,
    walk::{Attributes, Links, Motion, Walk},
    write::Side,
};
use crate::{
    driver::Finding,
    error::{Error, ErrorKind, Result},
};

/// What keeps a tree readable while it lives.
pub type Guard = Box<dyn Any + Send>;

/// How long before a snapshot a file must have been changed last for its times to prove that it was not changed after:
/// some file systems keep whole seconds.
const SETTLED_SECONDS: i64 = 3;

/// A tree to be read once.
pub struct TreeView {
    root: Root,
    links: Links,
    motion: Motion,
    settled: Option<Time>,
    inventory: Option<PathBuf>,
    guard: Option<Guard>,
}

impl fmt::Debug for TreeView {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TreeView").field("root", &self.root).field("motion", &self.motion).finish_non_exhaustive()
    }
}

impl TreeView {
    /// Makes a view of a tree to which nobody writes.
    pub fn still(root: Root, links: Links) -> Self {
        Self { root, links, motion: Motion::Still, settled: None, inventory: None, guard: None }
    }

    /// Makes a view of a head, which may be in use.
    pub fn live(root: Root) -> Self {
        Self { root, links: Links::ByInode, motion: Motion::Live, settled: None, inventory: None, guard: None }
    }

    /// Says when this snapshot of a head was begun. What it has of a file is what the head has, while the head's file
    /// shows the same inode, size and times and was changed a while before that: times move in steps.
    #[must_use]
    pub fn begun(mut self, at: Timestamp) -> Self {
        self.settled = Some(Time { secs: at.as_second().saturating_sub(SETTLED_SECONDS), nanos: 0 });
        self
    }

    /// Says where the tree's inventory lies, for a tree whose files have names in other trees, too.
    #[must_use]
    pub fn inventoried(mut self, path: PathBuf) -> Self {
        self.inventory = Some(path);
        self
    }

    /// Adds what keeps the tree readable. It is dropped after the tree was closed.
    #[must_use]
    pub fn guarded(mut self, guard: Guard) -> Self {
        self.guard = Some(guard);
        self
    }
}

impl TreeView {
    /// Returns the tree's root, which is readable while the view lives.
    pub fn root(&self) -> &Root {
        &self.root
    }

    pub(super) fn into_side(self) -> (Side, Option<Guard>) {
        (Side { root: self.root, links: self.links }, self.guard)
    }
}

/// Which of the trees, by its place in what [`Weave::new`] was given.
pub type StrandIndex = usize;

/// Several trees at one path after the other, in walk order.
pub struct Weave {
    strands: Vec<Strand>,
    path: TreePath,
    buffers: (Vec<u8>, Vec<u8>),
}

struct Strand {
    walk: Walk,
    /// The walk's last entry.
    entry: Option<Entry>,
    /// It lies at the path at hand.
    is_here: bool,
    motion: Motion,
    settled: Option<Time>,
    inventory: Option<PathBuf>,
    /// The first names of inodes that have several in this tree, where link counts do not tell.
    first_names: Option<BTreeSet<TreePath>>,
    // Behind the walk, whose descriptors go first.
    _guard: Option<Guard>,
}

impl fmt::Debug for Weave {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Weave").field("path", &self.path).finish_non_exhaustive()
    }
}

impl Weave {
    /// Starts before the first path, the root.
    pub fn new(views: impl IntoIterator<Item = TreeView>) -> Self {
        let strand = |view: TreeView| {
            let TreeView { root, links, motion, settled, inventory, guard } = view;
            let walk = Walk::with(root, links, motion, Attributes::OnDemand);
            // As if it had been here, so that the first step takes its first entry.
            let (entry, first_names) = (None, None);
            Strand { walk, entry, is_here: true, motion, settled, inventory, first_names, _guard: guard }
        };
        Self { strands: views.into_iter().map(strand).collect(), path: TreePath::root(), buffers: Default::default() }
    }

    /// Learns from the inventories which inodes have several names in their trees, so that [`Weave::group`] can tell. Memory
    /// grows with such inodes only.
    pub fn learn_groups(&mut self) -> Result<()> {
        for strand in &mut self.strands {
            let Some(path) = &strand.inventory else { continue };
            let mut first_names = BTreeSet::new();
            for entry in InventoryReader::open(path)? {
                if let EntryKind::HardLink { to } = entry?.entry.kind {
                    first_names.insert(to);
                }
            }
            strand.first_names = Some(first_names);
        }
        Ok(())
    }

    /// Goes on to the next path that any of the trees has; `false` at the end.
    pub fn advance(&mut self) -> Result<bool> {
        for strand in self.strands.iter_mut().filter(|strand| strand.is_here) {
            strand.entry = strand.walk.next().transpose()?;
            strand.is_here = false;
        }
        let next = self.strands.iter().filter_map(|strand| strand.entry.as_ref()).map(|entry| &entry.path).min();
        let Some(next) = next.cloned() else { return Ok(false) };
        for strand in &mut self.strands {
            strand.is_here = strand.entry.as_ref().is_some_and(|entry| entry.path == next);
        }
        self.path = next;
        Ok(true)
    }

    /// Returns the path at hand.
    pub fn path(&self) -> &TreePath {
        &self.path
    }

    /// Returns what a tree has here, its extended attributes left out until [`Weave::load`].
    pub fn entry(&self, of: StrandIndex) -> Option<&Entry> {
        let strand = self.strands.get(of).filter(|strand| strand.is_here)?;
        strand.entry.as_ref()
    }

    /// Returns what lies here in a tree: of a hard link, what its inode is.
    pub fn kind(&self, of: StrandIndex) -> Option<&EntryKind> {
        let entry = self.entry(of)?;
        match &entry.kind {
            EntryKind::HardLink { .. } => self.strands[of].walk.linked_kind(),
            kind => Some(kind),
        }
    }

    /// Returns the first name of the inode that lies here in a tree, where it has several there. For trees with an
    /// inventory only after [`Weave::learn_groups`].
    pub fn group(&self, of: StrandIndex) -> Option<&TreePath> {
        let entry = self.entry(of)?;
        match &entry.kind {
            EntryKind::HardLink { to } => Some(to),
            EntryKind::Directory => None,
            _ => match &self.strands[of].first_names {
                Some(first_names) => first_names.contains(&entry.path),
                None => entry.stat.nlink > 1,
            }
            .then_some(&entry.path),
        }
    }

    /// Reads the extended attributes of what a tree has here.
    pub fn load(&mut self, of: StrandIndex) -> Result<()> {
        let Some(strand) = self.strands.get_mut(of).filter(|strand| strand.is_here) else { return Ok(()) };
        let Some(entry) = &mut strand.entry else { return Ok(()) };
        match strand.walk.load_attributes(entry) {
            Err(error) if strand.motion == Motion::Live && is_gone(&error) => Ok(()),
            other => other,
        }
    }

    /// Tells, without reading contents, that two trees have the same here in every respect. `false` says nothing.
    pub fn is_same(&self, a: StrandIndex, b: StrandIndex) -> bool {
        let (Some(one), Some(other)) = (self.entry(a), self.entry(b)) else { return false };
        let plain = |entry: &Entry| (entry.mode, entry.uid, entry.gid, entry.mtime);
        if one.kind != other.kind || plain(one) != plain(other) {
            return false;
        }
        let (left, right) = (&self.strands[a], &self.strands[b]);
        let origin = |strand: &Strand| strand.walk.recorded().and_then(|recorded| recorded.origin);
        let (live, still, settled) = match (left.motion, right.motion) {
            (Motion::Still, Motion::Still) => {
                let origins = (origin(left), origin(right));
                return one.stat.is_unchanged_since(&other.stat)
                    || matches!(origins, (Some(a), Some(b)) if a.is_unchanged_since(&b));
            }
            (Motion::Live, Motion::Still) => (&one.stat, origin(right).unwrap_or(other.stat), right.settled),
            (Motion::Still, Motion::Live) => (&other.stat, origin(left).unwrap_or(one.stat), left.settled),
            (Motion::Live, Motion::Live) => return false,
        };
        live.is_unchanged_since(&still) && settled.is_some_and(|settled| live.ctime < settled)
    }

    /// Tells whether two files hold the same bytes, reading them where nothing else tells. A file of a live tree that is
    /// gone by now is not the same.
    pub fn same_contents(&mut self, a: StrandIndex, b: StrandIndex) -> Result<bool> {
        Ok(self.compare(a, b, Depth::First)? == 0)
    }

    /// Counts the bytes of blocks of `to` that `from` does not have at the same place.
    pub fn changed_bytes(&mut self, from: StrandIndex, to: StrandIndex) -> Result<u64> {
        self.compare(from, to, Depth::All)
    }

    fn compare(&mut self, from: StrandIndex, to: StrandIndex, depth: Depth) -> Result<u64> {
        let (Some(EntryKind::File { size: old }), Some(EntryKind::File { size: new })) =
            (self.kind(from), self.kind(to))
        else {
            return Ok(0);
        };
        let (old, new) = (*old, *new);
        let digest = |of: StrandIndex| self.strands[of].walk.recorded().and_then(|recorded| recorded.digest);
        if self.is_same(from, to) || (old == new && matches!((digest(from), digest(to)), (Some(a), Some(b)) if a == b))
        {
            return Ok(0);
        }
        if old != new && depth == Depth::First {
            return Ok(1);
        }
        let mut changed = old.saturating_sub(new);
        let (Some(before), Some(after)) = (self.open(from)?, self.open(to)?) else { return Ok(new.max(1)) };
        let (before, after) = (Version::new(before, old), Version::new(after, new));
        let mut blocks = Blocks::new(after, Some(before), 0, std::mem::take(&mut self.buffers));
        if self.is_live(from) || self.is_live(to) {
            blocks = blocks.unshared();
        }
        loop {
            match blocks.next() {
                Ok(Found::Data(_, range)) => changed += range.len() as u64,
                Ok(Found::Unread(_, length)) => changed += length as u64,
                Ok(Found::Hole(_, length)) => changed += length,
                Ok(Found::Nothing) => {}
                Ok(Found::End) => break,
                // It became shorter while it was read.
                Err(Errno::STALE) if self.is_live(from) || self.is_live(to) => {
                    changed = changed.max(1);
                    break;
                }
                Err(error) => return Err(Error::io("compare", &self.path, error)),
            }
            if depth == Depth::First && changed > 0 {
                break;
            }
        }
        self.buffers = blocks.into_buffers();
        // One that has grown by a hole has no changed block.
        Ok(changed.max(u64::from(old != new)))
    }

    fn is_live(&self, of: StrandIndex) -> bool {
        self.strands[of].motion == Motion::Live
    }

    /// Opens what a tree has here for reading; `None` where a live tree has it no more.
    pub(super) fn open(&mut self, of: StrandIndex) -> Result<Option<OwnedFd>> {
        let strand = &mut self.strands[of];
        match strand.walk.open_last(OFlags::RDONLY | OFlags::NONBLOCK) {
            Ok(file) => Ok(Some(file)),
            Err(error) if strand.motion == Motion::Live && is_gone(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Opens a file of a tree for reading, wherever the weave stands.
    pub(super) fn open_at(&self, of: StrandIndex, path: &TreePath) -> Result<OwnedFd> {
        self.strands[of].walk.root().open_beneath(path, OFlags::RDONLY | OFlags::NONBLOCK)
    }

    /// Tells whether any of the trees has something at a path, wherever the weave stands.
    pub fn is_taken(&self, path: &TreePath) -> bool {
        self.strands.iter().any(|strand| strand.walk.root().open_beneath(path, OFlags::PATH).is_ok())
    }

    /// Returns what a tree's inventory says about what it has here.
    pub(super) fn recorded(&self, of: StrandIndex) -> Option<&super::inventory::InventoryEntry> {
        self.strands.get(of).filter(|strand| strand.is_here)?.walk.recorded()
    }

    /// Returns what was left out of a tree so far.
    pub fn take_findings(&mut self, of: StrandIndex) -> Vec<Finding> {
        self.strands[of].walk.take_findings()
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Depth {
    First,
    All,
}

fn is_gone(error: &Error) -> bool {
    match &error.kind {
        ErrorKind::NotFound => true,
        ErrorKind::Io(error) => error.kind() == std::io::ErrorKind::NotFound,
        _ => false,
    }
}
