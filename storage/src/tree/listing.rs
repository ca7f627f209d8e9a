//! Whole trees as values, for tests and for showing what differs. Holds everything in memory: not for large trees.

use std::{os::fd::AsFd as _, path::Path};

use rustix::fs::OFlags;

use super::{
    data::{next_data, read_at},
    entry::{Entry, EntryKind},
    root::Root,
    walk::{Links, Walk},
};
use crate::error::{Error, Result};

/// One entry with what is in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// The entry.
    pub entry: Entry,
    /// BLAKE3 of a regular file's contents.
    pub digest: Option<[u8; 32]>,
    /// Where a regular file has data rather than holes, as start and end. Depends on the file system's block size.
    pub data: Vec<(u64, u64)>,
}

/// Lists a tree in walk order, reading every file; names of one inode are hard links.
pub fn listing(path: &Path) -> Result<Vec<Listed>> {
    let mut walk = Walk::new(Root::open(path)?, Links::ByInode);
    let mut listed = Vec::new();
    while let Some(entry) = walk.next() {
        let entry = entry?;
        let (mut digest, mut data) = (None, Vec::new());
        if let EntryKind::File { size } = entry.kind {
            let file = walk.open_last(OFlags::RDONLY)?;
            let failed = |error| Error::io("read", &entry.path, error);
            let mut hasher = blake3::Hasher::new();
            let mut buffer = vec![0; 256 * 1024];
            let mut offset = 0;
            loop {
                let count = read_at(file.as_fd(), &mut buffer, offset).map_err(failed)?;
                if count == 0 {
                    break;
                }
                hasher.update(&buffer[..count]);
                offset += count as u64;
            }
            digest = Some(*hasher.finalize().as_bytes());
            let mut offset = 0;
            while let Some((start, end)) = next_data(file.as_fd(), offset, size).map_err(failed)? {
                data.push((start, end));
                offset = end;
            }
        }
        listed.push(Listed { entry, digest, data });
    }
    Ok(listed)
}

/// Compares two trees in all that a delta preserves: paths, kinds, link groups, owners, modes, times, extended
/// attributes, contents. Returns one line for each difference; none when the trees are equal.
pub fn differences(left: &Path, right: &Path) -> Result<Vec<String>> {
    let (left, right) = (listing(left)?, listing(right)?);
    let mut found = Vec::new();
    let (mut l, mut r) = (left.iter().peekable(), right.iter().peekable());
    loop {
        match (l.peek(), r.peek()) {
            (None, None) => return Ok(found),
            (Some(a), Some(b)) if a.entry.path == b.entry.path => {
                compare(a, b, &mut found);
                l.next();
                r.next();
            }
            (Some(a), b) if b.is_none_or(|b| a.entry.path < b.entry.path) => {
                found.push(format!("{}: only on the left ({})", a.entry.path, a.entry.kind.word()));
                l.next();
            }
            (_, b) => {
                if let Some(b) = b {
                    found.push(format!("{}: only on the right ({})", b.entry.path, b.entry.kind.word()));
                }
                r.next();
            }
        }
    }
}

fn compare(a: &Listed, b: &Listed, found: &mut Vec<String>) {
    let path = &a.entry.path;
    if a.entry.kind != b.entry.kind {
        found.push(format!("{path}: {:?} against {:?}", a.entry.kind, b.entry.kind));
    }
    if a.digest != b.digest {
        found.push(format!("{path}: contents differ"));
    }
    if !a.entry.has_metadata_of(&b.entry) {
        let show = |entry: &Entry| {
            let Entry { mode, uid, gid, mtime, xattrs, .. } = entry;
            format!("mode {mode:o} owner {uid}:{gid} mtime {}.{:09} xattrs {xattrs:?}", mtime.secs, mtime.nanos)
        };
        found.push(format!("{path}: {} against {}", show(&a.entry), show(&b.entry)));
    }
}
