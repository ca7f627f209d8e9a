//! The records of `flocker-tree/1` as bytes; see docs/PROTOCOL.md.
//!
//! A frame is a u32 little-endian length and a postcard record. Owns layout and limits; refuses to know files.

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::{
    entry::{EntryKind, Metadata},
    path::{TreePath, check_name},
    xattr::{self, XATTRS_LIMIT},
};
use crate::{
    delta::{RESUME_POINT_LIMIT, ResumePoint},
    error::{Error, ErrorKind, Result},
};

/// The longest frame body: an entry with all its attributes, two paths, and room.
pub(super) const FRAME_LIMIT: usize = XATTRS_LIMIT + 256 * 1024;

/// Bytes before each record: its length.
pub(super) const FRAME_HEAD: usize = 4;

/// The first field of each stream and of each resume point.
pub(super) const MAGIC: [u8; 6] = *b"fltre1";

/// The most data one record carries.
pub(super) const DATA_LIMIT: usize = 256 * 1024;

/// The longest target of a symbolic link (`PATH_MAX` less the NUL).
const TARGET_LIMIT: usize = 4095;

/// Bytes that are borrowed from the frame and copied as one piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Raw<'a>(pub(super) &'a [u8]);

impl Serialize for Raw<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.serialize_bytes(self.0)
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Raw<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        <&[u8]>::deserialize(deserializer).map(Raw)
    }
}

/// Where an entry lies: in the last announced directory of the level above, by this name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Place<'a> {
    /// The number of names in the path: 0 for the root.
    pub(super) level: u32,
    /// The last name; empty for the root.
    #[serde(borrow)]
    pub(super) name: Raw<'a>,
}

/// What a file's data builds on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Basis {
    /// Nothing: one hole of the file's size.
    Fresh,
    /// The base's file of this path, cut or grown by a hole to the file's size.
    Existing,
}

/// How far a stream was taken in: this path and all before it are done, or this file up to an offset.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Position {
    pub(super) path: TreePath,
    pub(super) inside: Option<u64>,
}

impl Position {
    pub(super) fn to_point(&self) -> Result<ResumePoint> {
        let bytes = postcard::to_stdvec(&(MAGIC, self));
        let bytes = bytes.map_err(|error| Error::new("write resume point", &self.path, corrupt(error)))?;
        Ok(ResumePoint(bytes.into()))
    }

    pub(super) fn from_point(point: &ResumePoint) -> Result<Self> {
        let stale = |why: &str| Error::new("read resume point", "of a delta", ErrorKind::ResumeStale(why.to_owned()));
        if point.0.len() > RESUME_POINT_LIMIT {
            return Err(stale("it is too long"));
        }
        match postcard::take_from_bytes::<([u8; 6], Self)>(&point.0) {
            Ok(((MAGIC, position), [])) => Ok(position),
            Ok(_) => Err(stale("it is of another format")),
            Err(_) => Err(stale("it cannot be read")),
        }
    }
}

fn corrupt(error: postcard::Error) -> ErrorKind {
    ErrorKind::Corrupt(error.to_string())
}

/// One record. The order of the variants is the wire format: never change it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Record<'a> {
    /// The first record, and only that.
    Start { magic: [u8; 6], resume: Option<Position> },
    /// A directory; what follows may lie in it. Its metadata is set when the stream leaves it.
    Directory {
        #[serde(borrow)]
        at: Place<'a>,
        metadata: Metadata,
    },
    /// A regular file; its data follows. `from`: it goes on at that offset.
    File {
        #[serde(borrow)]
        at: Place<'a>,
        metadata: Metadata,
        size: u64,
        basis: Basis,
        from: Option<u64>,
    },
    /// Bytes of the file announced last, behind those before them.
    Data {
        offset: u64,
        #[serde(borrow)]
        bytes: Raw<'a>,
    },
    /// A hole in the file announced last, where the base has data.
    Hole { offset: u64, length: u64 },
    /// A symbolic link, fifo or device.
    Node {
        #[serde(borrow)]
        at: Place<'a>,
        metadata: Metadata,
        kind: NodeKind,
    },
    /// A further name of an entry before it.
    HardLink {
        #[serde(borrow)]
        at: Place<'a>,
        to: TreePath,
    },
    /// What is at the path goes, a directory with all in it.
    Remove {
        #[serde(borrow)]
        at: Place<'a>,
    },
    /// The receiver can resume here. `digest`: BLAKE3 of the frames since the start or the last checkpoint.
    Checkpoint { digest: [u8; 32] },
    /// The last record, and only that. Counts are those of the whole target tree.
    End { entries: u64, logical_bytes: u64, digest: [u8; 32] },
    /// BLAKE3 of all that the file announced last will hold, which is made of nothing else than the data that follows. Comes before
    /// it; none of the data counts in the stream's digest then.
    Contents { digest: [u8; 32] },
}

/// The kinds of entries without data.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum NodeKind {
    Symlink { target: Vec<u8> },
    Fifo,
    CharDevice { major: u32, minor: u32 },
    BlockDevice { major: u32, minor: u32 },
}

impl NodeKind {
    /// `None` for directories, files and hard links, which have records of their own.
    pub(super) fn of(kind: &EntryKind) -> Option<Self> {
        Some(match kind {
            EntryKind::Symlink { target } => Self::Symlink { target: target.clone() },
            EntryKind::Fifo => Self::Fifo,
            EntryKind::CharDevice { major, minor } => Self::CharDevice { major: *major, minor: *minor },
            EntryKind::BlockDevice { major, minor } => Self::BlockDevice { major: *major, minor: *minor },
            EntryKind::Directory | EntryKind::File { .. } | EntryKind::HardLink { .. } => return None,
        })
    }

    pub(super) fn into_entry_kind(self) -> EntryKind {
        match self {
            Self::Symlink { target } => EntryKind::Symlink { target },
            Self::Fifo => EntryKind::Fifo,
            Self::CharDevice { major, minor } => EntryKind::CharDevice { major, minor },
            Self::BlockDevice { major, minor } => EntryKind::BlockDevice { major, minor },
        }
    }
}

/// Appends what stands before the bytes of a data record, in its frame.
pub(super) fn data_head(offset: u64, length: usize, to: Vec<u8>) -> postcard::Result<Vec<u8>> {
    const DATA: u32 = 3;
    postcard::to_extend(&(DATA, offset, length as u64), to)
}

/// A record that breaks a rule.
pub(super) type Rule = &'static str;

impl<'a> Record<'a> {
    /// Tells whether it has the digest of what stands before it, and so is not hashed itself.
    pub(super) fn is_digest(&self) -> bool {
        matches!(self, Self::Checkpoint { .. } | Self::End { .. })
    }

    /// Reads a frame's body and checks all that can be checked without the tree.
    pub(super) fn decode(body: &'a [u8]) -> std::result::Result<Self, Rule> {
        let (record, rest) =
            postcard::take_from_bytes::<Self>(body).map_err(|_| "a record cannot be read or is of an unknown kind")?;
        if !rest.is_empty() {
            return Err("a record has bytes behind its end");
        }
        record.check()?;
        Ok(record)
    }

    fn check(&self) -> std::result::Result<(), Rule> {
        if let Some(at) = self.place() {
            if at.level == 0 {
                if !at.name.0.is_empty() || !matches!(self, Self::Directory { .. }) {
                    return Err("the root is not a directory");
                }
            } else {
                check_name(at.name.0)?;
            }
        }
        match self {
            Self::Start { magic, .. } if *magic != MAGIC => Err("it is not a flocker-tree/1 stream"),
            Self::Directory { metadata, .. } => check_metadata(metadata),
            Self::File { metadata, size, from, .. } => {
                if i64::try_from(*size).is_err() {
                    return Err("a size is larger than 2^63-1");
                }
                if from.is_some_and(|from| from > *size) {
                    return Err("a file goes on behind its end");
                }
                check_metadata(metadata)
            }
            Self::Node { metadata, kind, .. } => {
                if let NodeKind::Symlink { target } = kind
                    && (target.is_empty() || target.len() > TARGET_LIMIT || target.contains(&0))
                {
                    return Err("a symbolic link's target is empty, too long or holds NUL");
                }
                check_metadata(metadata)
            }
            Self::Data { bytes, .. } if bytes.0.is_empty() || bytes.0.len() > DATA_LIMIT => {
                Err("a data record is empty or longer than 256 KiB")
            }
            Self::Hole { length: 0, .. } => Err("a hole is empty"),
            _ => Ok(()),
        }
    }

    /// Where the entry lies, for records about one.
    pub(super) fn place(&self) -> Option<Place<'a>> {
        match self {
            Self::Directory { at, .. }
            | Self::File { at, .. }
            | Self::Node { at, .. }
            | Self::HardLink { at, .. }
            | Self::Remove { at } => Some(*at),
            _ => None,
        }
    }
}

fn check_metadata(metadata: &Metadata) -> std::result::Result<(), Rule> {
    if metadata.mode > 0o7777 {
        return Err("a mode has unknown bits");
    }
    if metadata.mtime.nanos > 999_999_999 {
        return Err("a time has more than 999,999,999 nanoseconds");
    }
    xattr::check(&metadata.xattrs)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::tree::entry::Time;

    fn hex(record: &Record<'_>) -> String {
        postcard::to_stdvec(record).unwrap().iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// These bytes are the format. A change here is a new format, not a new expectation.
    #[test]
    fn the_records_have_these_bytes() {
        let metadata = || Metadata {
            mode: 0o755,
            uid: 1000,
            gid: 100,
            mtime: Time { secs: -1, nanos: 5 },
            xattrs: vec![(b"user.a".to_vec(), b"b".to_vec())],
        };
        let at = Place { level: 1, name: Raw(b"n") };
        let to = TreePath::parse(b"a/b").unwrap();
        let meta = "ed03e807640105010675736572 2e610162".replace(' ', "");
        let golden = [
            (Record::Start { magic: MAGIC, resume: None }, "00666c7472653100".to_owned()),
            (
                Record::Start { magic: MAGIC, resume: Some(Position { path: to.clone(), inside: Some(300) }) },
                "00666c747265310103612f6201ac02".to_owned(),
            ),
            (Record::Directory { at, metadata: metadata() }, format!("0101016e{meta}")),
            (
                Record::File { at, metadata: metadata(), size: 4096, basis: Basis::Existing, from: None },
                format!("0201016e{meta}80200100"),
            ),
            (Record::Data { offset: 128, bytes: Raw(b"xyz") }, "0380010378797a".to_owned()),
            (Record::Hole { offset: 1, length: 2 }, "040102".to_owned()),
            (
                Record::Node { at, metadata: metadata(), kind: NodeKind::Symlink { target: b"t".to_vec() } },
                format!("0501016e{meta}000174"),
            ),
            (Record::Node { at, metadata: metadata(), kind: NodeKind::Fifo }, format!("0501016e{meta}01")),
            (
                Record::Node { at, metadata: metadata(), kind: NodeKind::CharDevice { major: 1, minor: 3 } },
                format!("0501016e{meta}020103"),
            ),
            (
                Record::Node { at, metadata: metadata(), kind: NodeKind::BlockDevice { major: 8, minor: 1 } },
                format!("0501016e{meta}030801"),
            ),
            (Record::HardLink { at, to }, "0601016e03612f62".to_owned()),
            (Record::Remove { at }, "0701016e".to_owned()),
            (Record::Checkpoint { digest: [1; 32] }, format!("08{}", "01".repeat(32))),
            (Record::End { entries: 1, logical_bytes: 2, digest: [0xff; 32] }, format!("090102{}", "ff".repeat(32))),
            (Record::Contents { digest: [2; 32] }, format!("0a{}", "02".repeat(32))),
        ];
        for (record, bytes) in golden {
            assert_eq!(hex(&record), bytes, "{record:?}");
            let encoded = postcard::to_stdvec(&record).unwrap();
            assert_eq!(Record::decode(&encoded).unwrap(), record);
        }
    }

    #[test]
    fn the_head_of_data_is_that_of_its_record() {
        for (offset, length) in [(0, 1), (128, 127), (300, 128), (u64::MAX, DATA_LIMIT)] {
            let bytes = vec![7; length];
            let record = postcard::to_stdvec(&Record::Data { offset, bytes: Raw(&bytes) }).unwrap();
            assert_eq!([data_head(offset, length, Vec::new()).unwrap(), bytes].concat(), record);
        }
    }

    #[test]
    fn a_resume_point_comes_back_and_garbage_is_stale() {
        let position = Position { path: TreePath::parse(b"a/b").unwrap(), inside: Some(9) };
        let point = position.to_point().unwrap();
        assert_eq!(Position::from_point(&point).unwrap(), position);
        for bad in [&b""[..], b"garbage", &point.0[..point.0.len() - 1], &[&point.0[..], b"x"].concat()] {
            let error = Position::from_point(&ResumePoint(bad.to_vec().into())).unwrap_err();
            assert!(matches!(error.kind, ErrorKind::ResumeStale(_)), "{error:?}");
        }
    }
}
