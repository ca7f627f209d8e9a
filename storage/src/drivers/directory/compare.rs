//! Comparing a tree with an inventory, both in walk order, as two streams.
//!
//! Owns the question "is this still what it was": by metadata where that can be trusted, by contents where not.

use std::{fs::File, io::Read};

use rustix::fs::OFlags;

use crate::{
    delta::Compare,
    error::{Error, Result},
    tree::{
        entry::{Entry, EntryKind, Time},
        inventory::{InventoryEntry, InventoryReader},
        root::Root,
        walk::{Attributes, Links, Motion, Walk},
    },
};

/// How long before the baseline was taken a file may have changed for its times to prove nothing: file systems stamp
/// files with a clock that moves every few milliseconds (up to 10 ms with HZ=100), so a later write may bear the same time.
const RACY_NANOS: i128 = 50_000_000;

/// The same for file systems that keep whole seconds.
const RACY_COARSE_NANOS: i128 = 2_000_000_000;

const BUFFER: usize = 64 * 1024;

/// What lies at one path of the two.
#[derive(Debug)]
pub(super) enum Pair {
    /// In both.
    Both(Entry, Box<InventoryEntry>),
    /// In the tree only.
    New(Entry),
    /// In the inventory only.
    Gone(Box<InventoryEntry>),
}

/// A walk of a tree beside an inventory.
pub(super) struct Joined {
    walk: Walk,
    known: Option<InventoryReader>,
    entry: Option<Entry>,
    record: Option<InventoryEntry>,
}

impl Joined {
    pub(super) fn new(walk: Walk, known: Option<InventoryReader>) -> Self {
        Self { walk, known, entry: None, record: None }
    }

    /// Puts a head beside its baseline. Entries come without extended attributes, for [`Joined::judge`] to say of the few
    /// that its stats do not speak for.
    pub(super) fn with_head(head: Root, known: Option<InventoryReader>) -> Self {
        Self::new(Walk::with(head, Links::ByInode, Motion::Live, Attributes::OnDemand), known)
    }

    /// Judges the last pair by metadata, and completes the entry's extended attributes.
    pub(super) fn judge(
        &mut self,
        entry: &mut Entry,
        record: &InventoryEntry,
        trust: Trust,
        compare: Compare,
    ) -> Result<Likeness> {
        if is_settled(entry, record, trust, compare) {
            entry.xattrs.clone_from(&record.entry.xattrs);
            return Ok(Likeness::Same);
        }
        self.walk.load_attributes(entry)?;
        Ok(judge(entry, record, trust, compare))
    }

    /// Returns the walk; the entry of the last pair is its last one, too.
    pub(super) fn walk(&mut self) -> &mut Walk {
        &mut self.walk
    }

    pub(super) fn next(&mut self) -> Result<Option<Pair>> {
        if self.entry.is_none() {
            self.entry = self.walk.next().transpose()?;
        }
        if self.record.is_none() {
            self.record = self.known.as_mut().and_then(Iterator::next).transpose()?;
        }
        Ok(match (self.entry.take(), self.record.take()) {
            (None, None) => None,
            (Some(entry), None) => Some(Pair::New(entry)),
            (None, Some(record)) => Some(Pair::Gone(Box::new(record))),
            (Some(entry), Some(record)) => Some(match entry.path.cmp(&record.entry.path) {
                std::cmp::Ordering::Equal => Pair::Both(entry, Box::new(record)),
                std::cmp::Ordering::Less => {
                    self.record = Some(record);
                    Pair::New(entry)
                }
                std::cmp::Ordering::Greater => {
                    self.entry = Some(entry);
                    Pair::Gone(Box::new(record))
                }
            }),
        })
    }
}

/// What metadata say about two versions of one path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Likeness {
    /// Nothing differs.
    Same,
    /// Something differs.
    Different,
    /// Only reading both files tells.
    Unclear,
}

/// What an inventory's stats are worth for a head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Trust {
    /// They are those of this head, taken at this time by the clock of the file system.
    TakenAt(Time),
    /// They are those of other inodes.
    No,
}

/// Tells that nothing about an inode has changed, extended attributes included, since any change moves its ctime.
fn is_settled(entry: &Entry, record: &InventoryEntry, trust: Trust, compare: Compare) -> bool {
    let plain = |entry: &Entry| (entry.mode, entry.uid, entry.gid, entry.mtime);
    let Trust::TakenAt(taken) = trust else { return false };
    compare == Compare::Metadata
        && entry.kind == record.entry.kind
        && plain(entry) == plain(&record.entry)
        && entry.stat.is_unchanged_since(&record.entry.stat)
        && !is_racy(entry.stat.ctime, taken)
}

/// Judges by metadata, all of which is there.
fn judge(entry: &Entry, record: &InventoryEntry, trust: Trust, compare: Compare) -> Likeness {
    if entry.kind != record.entry.kind || !entry.has_metadata_of(&record.entry) {
        return Likeness::Different;
    }
    if !matches!(entry.kind, EntryKind::File { size } if size > 0) {
        return Likeness::Same;
    }
    match trust {
        Trust::TakenAt(taken)
            if compare == Compare::Metadata
                && entry.stat.is_unchanged_since(&record.entry.stat)
                && !is_racy(entry.stat.ctime, taken) =>
        {
            Likeness::Same
        }
        _ => Likeness::Unclear,
    }
}

/// Tells whether a file may have been written again after the baseline was taken without its times showing it.
fn is_racy(ctime: Time, taken: Time) -> bool {
    let nanos = |time: Time| i128::from(time.secs) * 1_000_000_000 + i128::from(time.nanos);
    let window = if ctime.nanos == 0 { RACY_COARSE_NANOS } else { RACY_NANOS };
    nanos(ctime) + window >= nanos(taken)
}

/// Reads two files to their ends. Different when the first one changed while it was read.
pub(super) fn same_contents(mut live: File, entry: &Entry, kept: &Root) -> Result<bool> {
    let failed = |error: std::io::Error| Error::io("compare", kept.show(&entry.path), error);
    let mut kept_file = File::from(kept.open_beneath(&entry.path, OFlags::RDONLY | OFlags::NONBLOCK)?);
    let (mut left, mut right) = (vec![0; BUFFER], vec![0; BUFFER]);
    loop {
        let length = fill(&mut live, &mut left).map_err(failed)?;
        if fill(&mut kept_file, &mut right).map_err(failed)? != length || left[..length] != right[..length] {
            return Ok(false);
        }
        if length < BUFFER {
            break;
        }
    }
    let now = rustix::fs::fstat(&live).map_err(|error| failed(error.into()))?;
    let ctime = Time { secs: now.st_ctime, nanos: now.st_ctime_nsec as u32 };
    Ok(ctime == entry.stat.ctime)
}

fn fill(file: &mut File, buffer: &mut [u8]) -> std::io::Result<usize> {
    let mut length = 0;
    while length < buffer.len() {
        match file.read(&mut buffer[length..])? {
            0 => break,
            read => length += read,
        }
    }
    Ok(length)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::tree::{entry::Stat, path::TreePath};

    fn file(ctime: Time) -> Entry {
        Entry {
            path: TreePath::parse(b"f").unwrap(),
            kind: EntryKind::File { size: 1 },
            mode: 0o600,
            uid: 0,
            gid: 0,
            mtime: Time { secs: 1, nanos: 1 },
            xattrs: Vec::new(),
            stat: Stat { ino: 1, size: 1, ctime, ..Stat::default() },
        }
    }

    fn likeness(ctime: Time, taken: Time) -> Likeness {
        let entry = file(ctime);
        let record = InventoryEntry { entry: entry.clone(), origin: None, digest: None };
        judge(&entry, &record, Trust::TakenAt(taken), Compare::Metadata)
    }

    #[test]
    fn a_file_changed_in_the_moment_of_the_baseline_is_read() {
        let taken = Time { secs: 100, nanos: 500_000_000 };
        assert_eq!(likeness(Time { secs: 100, nanos: 400_000_000 }, taken), Likeness::Same);
        assert_eq!(likeness(Time { secs: 100, nanos: 460_000_000 }, taken), Likeness::Unclear);
        assert_eq!(likeness(Time { secs: 100, nanos: 500_000_000 }, taken), Likeness::Unclear);
        assert_eq!(likeness(Time { secs: 101, nanos: 1 }, taken), Likeness::Unclear);
    }

    #[test]
    fn a_file_system_of_whole_seconds_has_a_wider_window() {
        let taken = Time { secs: 100, nanos: 500_000_000 };
        assert_eq!(likeness(Time { secs: 99, nanos: 0 }, taken), Likeness::Unclear);
        assert_eq!(likeness(Time { secs: 98, nanos: 0 }, taken), Likeness::Same);
    }

    #[test]
    fn reading_is_asked_for_where_the_user_wants_it_or_the_stats_are_of_another_inode() {
        let (entry, taken) = (file(Time { secs: 1, nanos: 1 }), Time { secs: 100, nanos: 0 });
        let record = InventoryEntry { entry: entry.clone(), origin: None, digest: None };
        assert_eq!(judge(&entry, &record, Trust::TakenAt(taken), Compare::Contents), Likeness::Unclear);
        assert_eq!(judge(&entry, &record, Trust::No, Compare::Metadata), Likeness::Unclear);
    }
}
