//! What a tree consists of: one value per path.
//!
//! Owns the mapping from the kernel's statx(2) to these values. Neighbours: [`super::walk`] makes them,
//! [`super::inventory`] keeps them, [`super::copy`] and [`super::apply`] make files of them.

use rustix::fs::{FileType, Statx};
use serde::{Deserialize, Serialize};

use super::path::TreePath;

/// A point in time as file systems keep it: may lie before 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct Time {
    /// Seconds since 1970 began.
    pub secs: i64,
    /// Nanoseconds past the second, below 1,000,000,000.
    pub nanos: u32,
}

/// What the file system says about an inode. Means something on one machine only, and never travels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct Stat {
    /// The file system it lies on. Not stable over a reboot.
    pub dev: u64,
    /// The inode's number.
    pub ino: u64,
    /// Bytes, for a regular file.
    pub size: u64,
    /// When its contents changed.
    pub mtime: Time,
    /// When anything about it changed, its own clock.
    pub ctime: Time,
    /// Its names. For entries of a walk over an inventory: its names in the volume, not in the pool.
    pub nlink: u32,
    /// Nothing; records of former versions have its blocks here. They tell nothing of a file: ext4 shows fewer than there is
    /// data while it writes some back (seen on Linux 6.18), btrfs and ZFS show them compressed, and ZFS seconds late.
    pub(crate) reserved: u64,
}

impl Stat {
    /// Tells whether the same inode, or the same inode of two snapshots of one file system, was left unchanged
    /// between the two: number, size, mtime and ctime agree. The device does not count, since every snapshot of a
    /// file system may have its own; nor do links, which change the ctime anyway.
    pub fn is_unchanged_since(&self, earlier: &Self) -> bool {
        self.ino == earlier.ino
            && self.size == earlier.size
            && self.mtime == earlier.mtime
            && self.ctime == earlier.ctime
    }
}

/// What lies at a path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum EntryKind {
    /// A directory.
    Directory,
    /// A regular file.
    File {
        /// Bytes, holes included.
        size: u64,
    },
    /// A symbolic link, which is never followed.
    Symlink {
        /// Where it points, as bytes.
        target: Vec<u8>,
    },
    /// A named pipe.
    Fifo,
    /// A character device.
    CharDevice {
        /// The driver's number.
        major: u32,
        /// The device's number.
        minor: u32,
    },
    /// A block device.
    BlockDevice {
        /// The driver's number.
        major: u32,
        /// The device's number.
        minor: u32,
    },
    /// A further name of an inode that was met before.
    HardLink {
        /// The first path of the group in walk order.
        to: TreePath,
    },
}

impl EntryKind {
    /// Names the kind in words.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Directory => "directory",
            Self::File { .. } => "file",
            Self::Symlink { .. } => "symbolic link",
            Self::Fifo => "fifo",
            Self::CharDevice { .. } => "character device",
            Self::BlockDevice { .. } => "block device",
            Self::HardLink { .. } => "hard link",
        }
    }
}

/// Extended attributes, sorted by name: those in `user.`, `trusted.` and `security.`, and POSIX ACLs.
pub type Xattrs = Vec<(Vec<u8>, Vec<u8>)>;

/// One path of a tree with everything that is preserved but a file's contents.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Where.
    pub path: TreePath,
    /// What.
    pub kind: EntryKind,
    /// Permissions with setuid, setgid and sticky: `0o7777` at most.
    pub mode: u32,
    /// The owner.
    pub uid: u32,
    /// The owning group.
    pub gid: u32,
    /// When the contents changed.
    pub mtime: Time,
    /// Extended attributes, sorted by name.
    pub xattrs: Xattrs,
    /// What only this machine knows.
    pub stat: Stat,
}

impl Entry {
    /// Tells whether owner, mode, times and extended attributes agree (not kinds and not contents).
    pub fn has_metadata_of(&self, other: &Self) -> bool {
        (self.mode, self.uid, self.gid, self.mtime) == (other.mode, other.uid, other.gid, other.mtime)
            && self.xattrs == other.xattrs
    }
}

/// What is set on an entry once it is made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Metadata {
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mtime: Time,
    pub(super) xattrs: Xattrs,
}

impl From<&Entry> for Metadata {
    fn from(entry: &Entry) -> Self {
        let Entry { mode, uid, gid, mtime, .. } = *entry;
        Self { mode, uid, gid, mtime, xattrs: entry.xattrs.clone() }
    }
}

/// What one statx(2) says: the parts of an [`Entry`] that need no further call.
#[derive(Debug, Clone, Copy)]
pub(super) struct Status {
    pub(super) file_type: FileType,
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) rdev: (u32, u32),
    pub(super) stat: Stat,
}

impl From<Statx> for Status {
    fn from(x: Statx) -> Self {
        let time = |t: rustix::fs::StatxTimestamp| Time { secs: t.tv_sec, nanos: t.tv_nsec };
        Self {
            file_type: FileType::from_raw_mode(u32::from(x.stx_mode)),
            mode: u32::from(x.stx_mode) & 0o7777,
            uid: x.stx_uid,
            gid: x.stx_gid,
            rdev: (x.stx_rdev_major, x.stx_rdev_minor),
            stat: Stat {
                dev: rustix::fs::makedev(x.stx_dev_major, x.stx_dev_minor),
                ino: x.stx_ino,
                size: x.stx_size,
                mtime: time(x.stx_mtime),
                ctime: time(x.stx_ctime),
                nlink: x.stx_nlink,
                reserved: 0,
            },
        }
    }
}
