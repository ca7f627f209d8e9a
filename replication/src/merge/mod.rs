//! Three-way merge of two trees by a common ancestor: decisions only, path by path.
//!
//! # Participants
//! The caller walks three trees (base, ours, theirs) side by side and gives each path's [`Row`] to a [`Survey`], in
//! walk order. [`Survey::finish`] gives the [`Plan`]: every conflict, and what had to be known of the whole. The caller
//! then walks once more and asks a [`Decider`] what the result holds at each path, and adds the plan's [`KeptBeside`] entries.
//! # Goals
//! Memory grows with conflicts and with names of inodes that have several, never with the tree. What one side changed
//! and the other did not is taken; what both changed the same way is taken; each property (contents, mode, owner, each
//! extended attribute) counts by itself; all else is a conflict that is named. Nothing is lost that is not named.
//! # Non-goals
//! No I/O. Whether two files hold the same is the caller's to say ([`Version::content`]).
//!
//! # Rules beyond the obvious
//! - Times are no conflict: the side that changed it, else the later one.
//! - A directory that one side deleted stays as far as something in it survives: what the other side changed in it
//!   (each a conflict), or added to it (a conflict).
//! - Names of one inode are decided together where one side left all of them alone, or both left the links alone;
//!   otherwise they are one conflict.
//! - `keep-both` keeps ours at the path and puts theirs beside it under another name; of a directory and something else
//!   the directory keeps the path.

mod ancestry;
mod facets;
mod links;
mod survey;

pub use ancestry::{CommonAncestor, common_ancestor, with_merged};
use flocker_storage::{
    model::{NodeName, SnapshotId},
    tree::{
        entry::{EntryKind, Time, Xattrs},
        path::{NAME_LIMIT, TreePath},
    },
};
use serde::{Deserialize, Serialize};
pub use survey::{Decider, Plan, Survey, TooManyConflicts};

/// The most conflicts of one merge: all of them are named, so there must be an end.
pub const CONFLICTS_LIMIT: usize = 100_000;

/// One of the two histories that are merged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Side {
    /// The volume that is merged into.
    Ours,
    /// The one that is merged in.
    Theirs,
}

impl Side {
    /// Returns the other one.
    pub fn other(self) -> Self {
        match self {
            Self::Ours => Self::Theirs,
            Self::Theirs => Self::Ours,
        }
    }
}

/// What becomes of conflicts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Resolve {
    /// Nothing is made of a merge with conflicts; they are listed. Decided as with `KeepBoth`.
    #[default]
    Stop,
    /// Both versions stay.
    KeepBoth,
    /// Ours stays.
    Ours,
    /// Theirs stays.
    Theirs,
}

impl Resolve {
    /// Returns the side that wins every conflict, where one does.
    fn winner(self) -> Option<Side> {
        match self {
            Self::Stop | Self::KeepBoth => None,
            Self::Ours => Some(Side::Ours),
            Self::Theirs => Some(Side::Theirs),
        }
    }

    /// Tells whether what a side has stays in a conflict with nothing on the other side.
    fn keeps(self, side: Side) -> bool {
        self.winner().is_none_or(|winner| winner == side)
    }
}

/// What one tree has at a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Version {
    /// What it is, hard links resolved: never [`EntryKind::HardLink`].
    pub kind: EntryKind,
    /// Equal for two files of one row that hold the same bytes, different for others. 0 for all but files.
    pub content: u64,
    /// Owner, mode, time, extended attributes.
    pub meta: Meta,
    /// The first path, in walk order, of all names of its inode in this tree; `None` where it has one name.
    pub group: Option<TreePath>,
}

/// What is set on an entry besides its contents.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Meta {
    /// Permissions.
    pub mode: u32,
    /// Owner and group.
    pub owner: (u32, u32),
    /// When the contents changed.
    pub mtime: Time,
    /// Extended attributes, sorted by name.
    pub xattrs: Xattrs,
}

/// What three trees have at one path.
#[derive(Debug, Clone, Copy)]
pub struct Row<'a> {
    /// The path.
    pub path: &'a TreePath,
    /// In the common ancestor.
    pub base: Option<&'a Version>,
    /// In the tree that is merged into.
    pub ours: Option<&'a Version>,
    /// In the one that is merged in.
    pub theirs: Option<&'a Version>,
}

impl<'a> Row<'a> {
    fn of(&self, side: Side) -> Option<&'a Version> {
        match side {
            Side::Ours => self.ours,
            Side::Theirs => self.theirs,
        }
    }
}

/// What the result has at one path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Nothing.
    Gone,
    /// This.
    Keep(Taken),
}

/// An entry of the result.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Taken {
    /// Whose kind and contents it has.
    pub body: Side,
    /// What is set on it.
    pub meta: Meta,
    /// The inode it is a name of, where that has several in the result.
    pub group: Option<Group>,
}

/// Names of one inode in the result.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    /// The first of them in walk order.
    pub first: TreePath,
    /// How many there are.
    pub names: u32,
}

/// A version that is kept beside the path it was at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeptBeside {
    /// Where it goes. Nothing else is there in any of the trees.
    pub path: TreePath,
    /// Whose it is.
    pub from: Side,
    /// Where it lies in that tree.
    pub source: TreePath,
    /// What it is. Never a directory.
    pub version: Version,
}

/// What is in conflict at a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ConflictKind {
    /// Both sides changed a file's bytes (or where a symbolic link points).
    Content,
    /// Both sides changed the permissions.
    Mode,
    /// Both sides changed the owner.
    Owner,
    /// Both sides changed an extended attribute.
    Xattrs,
    /// Different things are there.
    Type,
    /// One side deleted what the other changed.
    DeleteEdit,
    /// One side added to a directory that the other deleted.
    DeletedDirectory,
    /// Both sides changed names or contents of an inode with several names.
    Links,
}

/// How a conflict ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Resolution {
    /// Ours is in the result, theirs is not.
    Ours,
    /// Theirs is in the result, ours is not.
    Theirs,
    /// Both are: the other one lies at this path.
    Both(PathText),
}

/// A path as text: bytes that are not UTF-8 are shown as U+FFFD. Made by [`PathText::of`].
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PathText(pub String);

impl PathText {
    /// Shows a path in full.
    pub fn of(path: &TreePath) -> Self {
        Self(if path.is_root() { ".".to_owned() } else { String::from_utf8_lossy(path.as_bytes()).into_owned() })
    }
}

/// One conflict.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Conflict {
    /// Where.
    pub path: TreePath,
    /// What is in conflict, at least one.
    pub kinds: Vec<ConflictKind>,
    /// What ours has there, in words.
    pub ours: String,
    /// What theirs has there, in words.
    pub theirs: String,
    /// How it ended; with [`Resolve::Stop`], how `keep-both` would end it.
    pub done: Resolution,
    /// Entries of a directory that went with the losing side.
    pub beneath: u64,
    /// All names of the inode, or of those that are linked with it on a side, where it has several.
    pub names: Vec<TreePath>,
}

/// How many paths went which way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Counts {
    /// Paths that are in none but changed on one side: ours.
    pub ours: u64,
    /// Changed by theirs only: what is new to the volume that is merged into.
    pub theirs: u64,
    /// Changed by both in the same way.
    pub same: u64,
    /// Changed by both in ways that go together.
    pub combined: u64,
    /// Changed by neither.
    pub unchanged: u64,
}

/// Who a side is, for the names of versions that are kept beside.
#[derive(Debug, Clone)]
pub struct Label {
    /// The host of its newest snapshot.
    pub host: NodeName,
    /// Its newest snapshot.
    pub tip: SnapshotId,
}

/// Who both sides are.
#[derive(Debug, Clone)]
pub struct Labels {
    /// Ours.
    pub ours: Label,
    /// Theirs.
    pub theirs: Label,
}

impl Labels {
    fn of(&self, side: Side) -> &Label {
        match side {
            Side::Ours => &self.ours,
            Side::Theirs => &self.theirs,
        }
    }
}

/// Returns the path beside `path` at which a version of one side is kept: `NAME.conflict-HOST-SHORTID`, with a number
/// behind it while that is taken. Long names are cut so that it stays a name; the same inputs give the same path.
fn beside(path: &TreePath, label: &Label, mut is_taken: impl FnMut(&TreePath) -> bool) -> TreePath {
    let mut parent = path.parent().unwrap_or_default();
    let mut number = 1_u64;
    loop {
        let counter = if number > 1 { format!("-{number}") } else { String::new() };
        let suffix = format!(".conflict-{}-{}{counter}", label.host, label.tip.short());
        let mut cut = path.name().len().min(NAME_LIMIT - suffix.len().min(NAME_LIMIT - 1));
        // Not within a character, where the name is text.
        while cut > 1 && path.name().get(cut).is_some_and(|byte| byte & 0xc0 == 0x80) {
            cut -= 1;
        }
        let name = [&path.name()[..cut], suffix.as_bytes()].concat();
        let name = &name[..name.len().min(NAME_LIMIT)];
        let mut bytes = parent.as_bytes().to_vec();
        if !bytes.is_empty() {
            bytes.push(b'/');
        }
        bytes.extend_from_slice(name);
        match TreePath::parse(&bytes) {
            Ok(candidate) if !is_taken(&candidate) => return candidate,
            // A path that is longer than the format allows: it goes to the top of the tree.
            Err(_) => parent = TreePath::root(),
            Ok(_) => number += 1,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn label() -> Label {
        Label { host: "host-b".parse().unwrap(), tip: "018f0000-0000-7000-8000-0000deadbeef".parse().unwrap() }
    }

    #[test]
    fn a_version_kept_beside_is_named_after_its_host_and_snapshot() {
        let path = TreePath::parse(b"a/notes.txt").unwrap();
        let beside = beside(&path, &label(), |_| false);
        assert_eq!(beside.as_bytes(), b"a/notes.txt.conflict-host-b-deadbeef");
    }

    #[test]
    fn names_are_cut_to_what_a_file_system_takes_and_never_collide() {
        let long = TreePath::parse("ä".repeat(127).as_bytes()).unwrap();
        let first = beside(&long, &label(), |_| false);
        assert!(first.name().len() <= 255 && std::str::from_utf8(first.name()).is_ok(), "{first:?}");
        let second = beside(&long, &label(), |path| *path == first);
        assert!(second != first && second.name().ends_with(b"deadbeef-2"), "{second:?}");
        let host = Label { host: "h".repeat(128).parse().unwrap(), ..label() };
        assert!(beside(&long, &host, |_| false).name().len() <= 255);
    }
}
