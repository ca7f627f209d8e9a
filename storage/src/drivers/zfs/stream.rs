//! The stream of `zfs send`: its records, read as they pass.
//!
//! Owns the record format (OpenZFS `include/sys/zfs_ioctl.h`, `dmu_replay_record`; the same in zfs-fuse, with fewer kinds):
//! a header of 312 bytes in the byte order of the sender, then a payload whose length the header gives. Refuses to know
//! pools. The stream is hostile: one substream, one beginning, one end, nothing behind it; and its last record, which makes
//! `zfs receive` publish, is held back.

use std::{borrow::Cow, collections::BTreeSet};

use crate::drivers::pieces::Pieces;

/// The length of a record's header.
pub(super) const HEADER: usize = 312;

/// The longest payload: a block of 16 MiB, the largest there is, and a good deal of room for what describes it.
const PAYLOAD_LIMIT: u64 = 20 * 1024 * 1024;

const MAGIC: u64 = 0x0002_f5ba_cbac;

/// What a stream can announce in its beginning (`DMU_BACKUP_FEATURE_*`).
mod feature {
    pub(super) const SPILL: u64 = 1 << 2;
    pub(super) const EMBEDDED: u64 = 1 << 16;
    pub(super) const LZ4: u64 = 1 << 17;
    pub(super) const LARGE_BLOCKS: u64 = 1 << 19;
    pub(super) const RESUMING: u64 = 1 << 20;
    pub(super) const COMPRESSED: u64 = 1 << 22;
    pub(super) const LARGE_DNODE: u64 = 1 << 23;
    pub(super) const RAW: u64 = 1 << 24;
    pub(super) const ZSTD: u64 = 1 << 25;
    pub(super) const SWITCH_TO_LARGE_BLOCKS: u64 = 1 << 27;
    pub(super) const LONG_NAME: u64 = 1 << 28;
}

/// What a stream of the plain form may announce.
pub(super) const PLAIN: u64 = feature::SPILL;

/// What a stream of the rich form may announce. Deduplicated, redacted and held streams are not among it.
pub(super) const RICH: u64 = feature::SPILL
    | feature::EMBEDDED
    | feature::LZ4
    | feature::LARGE_BLOCKS
    | feature::RESUMING
    | feature::COMPRESSED
    | feature::LARGE_DNODE
    | feature::RAW
    | feature::ZSTD
    | feature::SWITCH_TO_LARGE_BLOCKS
    | feature::LONG_NAME;

/// What the first record says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Begin {
    pub(super) to_guid: u64,
    /// 0: a full stream.
    pub(super) from_guid: u64,
    /// It builds on a snapshot of another dataset.
    pub(super) is_clone: bool,
    features: u64,
}

impl Begin {
    pub(super) fn is_resuming(&self) -> bool {
        self.features & feature::RESUMING != 0
    }

    pub(super) fn is_raw(&self) -> bool {
        self.features & feature::RAW != 0
    }

    /// Tells whether it announces nothing but these features.
    pub(super) fn keeps_to(&self, features: u64) -> bool {
        self.features & !features == 0
    }
}

/// A stream that breaks the rules.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the stream is not one of zfs send: {0}")]
pub(super) struct StreamError(&'static str);

/// Reads a stream that is cut anywhere.
#[derive(Debug, Default)]
pub(super) struct Reader {
    /// Of a header that is not complete.
    buffer: Vec<u8>,
    /// How much of the payload is still to come.
    payload: u64,
    swapped: bool,
    begin: Option<Begin>,
    changes: bool,
    /// The inodes that records were of, where they are wanted.
    objects: Option<BTreeSet<u64>>,
    end: Option<Vec<u8>>,
}

impl Reader {
    /// Starts to read a stream that is short, and keeps which inodes are in it.
    pub(super) fn of_short() -> Self {
        Self { objects: Some(BTreeSet::new()), ..Self::default() }
    }

    /// Returns the inodes that changed, and some that lie beside them. None that is not among them has changed.
    pub(super) fn into_objects(self) -> BTreeSet<u64> {
        self.objects.unwrap_or_default()
    }

    /// Takes bytes, and returns those that may be passed on, nearly all where they lie: all but the last record.
    pub(super) fn take<'a>(&mut self, bytes: &'a [u8]) -> Result<Vec<Cow<'a, [u8]>>, StreamError> {
        let mut pieces = Pieces::of(bytes);
        while !pieces.rest().is_empty() {
            let rest = pieces.rest();
            if self.end.is_some() {
                return Err(StreamError("something follows its end"));
            }
            if self.payload > 0 {
                let length = usize::try_from(self.payload).unwrap_or(usize::MAX).min(rest.len());
                pieces.pass(length);
                self.payload -= length as u64;
            } else if let (true, Some(record)) = (self.buffer.is_empty(), rest.get(..HEADER)) {
                if self.header(record)? {
                    self.end = Some(record.to_vec());
                    pieces.skip(HEADER);
                } else {
                    pieces.pass(HEADER);
                }
            } else {
                let length = (HEADER - self.buffer.len()).min(rest.len());
                self.buffer.extend_from_slice(&rest[..length]);
                pieces.skip(length);
                if self.buffer.len() == HEADER {
                    let record = std::mem::take(&mut self.buffer);
                    if self.header(&record)? {
                        self.end = Some(record);
                    } else {
                        pieces.put(record);
                    }
                }
            }
        }
        Ok(pieces.finish())
    }

    /// Returns the beginning, once it was read.
    pub(super) fn begin(&self) -> Option<Begin> {
        self.begin
    }

    /// Tells whether there was any record between beginning and end: without one, nothing changed.
    pub(super) fn changes(&self) -> bool {
        self.changes
    }

    /// Returns the last record, which was held back.
    pub(super) fn end(&self) -> Option<&[u8]> {
        self.end.as_deref()
    }

    /// Reads a header; `true`: it is the end.
    fn header(&mut self, record: &[u8]) -> Result<bool, StreamError> {
        if self.begin.is_none() {
            self.swapped = match (number_at(record, 8, 8, false), number_at(record, 8, 8, true)) {
                (MAGIC, _) => false,
                (_, MAGIC) => true,
                _ => return Err(StreamError("it does not begin like one")),
            };
        }
        let swapped = self.swapped;
        let number = |at: usize, length: usize| number_at(record, at, length, swapped);
        let kind = number(0, 4);
        if (kind == 0) != self.begin.is_none() {
            return Err(StreamError("a beginning is missing, or there is a second one"));
        }
        let round = |length: u64| length.div_ceil(8) * 8;
        let payload = match kind {
            0 => {
                let version = number(16, 8);
                if version & 3 != 1 || number(32, 4) != 2 {
                    return Err(StreamError("it is not of one file system"));
                }
                self.begin = Some(Begin {
                    to_guid: number(40, 8),
                    from_guid: number(48, 8),
                    is_clone: number(36, 4) & 1 != 0,
                    features: (version >> 2) & 0x3fff_ffff,
                });
                number(4, 4)
            }
            // OBJECT: raw_bonuslen, or bonuslen.
            1 => match number(36, 4) {
                0 => round(number(28, 4)),
                raw => raw,
            },
            // FREEOBJECTS, FREE, WRITE_BYREF, OBJECT_RANGE.
            2 | 4 | 6 | 9 => 0,
            // WRITE: compressed_size where compressiontype is set, else logical_size.
            3 if number(50, 1) != 0 => number(96, 8),
            3 => number(32, 8),
            5 => return Ok(true),
            // SPILL: compressed_size, or length.
            7 => match number(40, 8) {
                0 => number(16, 8),
                compressed => compressed,
            },
            // WRITE_EMBEDDED: psize.
            8 => round(number(52, 4)),
            _ => return Err(StreamError("it holds a record of an unknown kind")),
        };
        self.changes |= kind != 0;
        if let Some(objects) = &mut self.objects
            && matches!(kind, 1 | 3 | 4 | 6 | 7 | 8)
        {
            objects.insert(number(8, 8));
        }
        if payload > PAYLOAD_LIMIT {
            return Err(StreamError("it holds a record that is too large"));
        }
        self.payload = payload;
        Ok(false)
    }
}

fn number_at(record: &[u8], at: usize, length: usize, swapped: bool) -> u64 {
    let bytes = record[at..at + length].iter();
    let add = |sum: u64, byte: &u8| (sum << 8) | u64::from(*byte);
    if cfg!(target_endian = "little") == swapped { bytes.fold(0, add) } else { bytes.rev().fold(0, add) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// Recorded of zfs-fuse 0.7: an increment that changes one file, one that changes nothing, a full one and one of a clone.
    const STEP: &[u8] = include_bytes!("testdata/step.stream");
    const EMPTY: &[u8] = include_bytes!("testdata/empty.stream");
    const FULL: &[u8] = include_bytes!("testdata/full.stream");
    const CLONE: &[u8] = include_bytes!("testdata/clone.stream");

    fn read(stream: &[u8], piece: usize) -> Result<(Reader, Vec<u8>), StreamError> {
        let (mut reader, mut out) = (Reader::default(), Vec::new());
        for piece in stream.chunks(piece) {
            out.extend(reader.take(piece)?.iter().flat_map(|piece| piece.iter()));
        }
        Ok((reader, out))
    }

    #[test]
    fn a_recorded_stream_is_read_however_it_is_cut_and_its_end_is_held_back() {
        for stream in [STEP, EMPTY, FULL, CLONE] {
            for piece in [1, 7, 311, 312, 313, 100_000] {
                let (reader, out) = read(stream, piece).unwrap();
                assert_eq!(reader.end().unwrap(), &stream[stream.len() - HEADER..]);
                assert_eq!(out, &stream[..stream.len() - HEADER]);
            }
        }
    }

    #[test]
    fn records_are_passed_on_where_they_lie() {
        let pieces = Reader::default().take(FULL).unwrap();
        assert!(matches!(pieces[..], [Cow::Borrowed(all)] if all.len() == FULL.len() - HEADER));
    }

    #[test]
    fn the_beginning_says_what_the_stream_builds_on() {
        let begin = |stream: &[u8]| read(stream, 4096).unwrap().0.begin().unwrap();
        assert_eq!((begin(STEP).to_guid, begin(STEP).from_guid), (0xea5c_db63_eb5c_1455, 0x7b3e_8197_aa53_d799));
        assert_eq!((begin(FULL).to_guid, begin(FULL).from_guid), (0x7b3e_8197_aa53_d799, 0));
        assert!(begin(CLONE).is_clone && !begin(STEP).is_clone);
        assert_eq!(begin(CLONE).from_guid, begin(FULL).to_guid);
        assert!([STEP, EMPTY, FULL, CLONE].into_iter().all(|stream| begin(stream).keeps_to(PLAIN)));
    }

    #[test]
    fn the_inodes_of_a_stream_are_kept_where_they_are_wanted() {
        let mut reader = Reader::of_short();
        reader.take(STEP).unwrap();
        assert_eq!(reader.into_objects(), BTreeSet::from([1, 2, 3, 4, 5]));
        assert_eq!(read(STEP, 4096).unwrap().0.into_objects(), BTreeSet::new());
    }

    #[test]
    fn only_a_stream_without_records_changes_nothing() {
        assert!(!read(EMPTY, 4096).unwrap().0.changes());
        assert!(read(STEP, 4096).unwrap().0.changes());
    }

    #[test]
    fn what_breaks_the_rules_ends_the_stream() {
        assert!(read(&[STEP, STEP].concat(), 4096).is_err(), "twice");
        assert!(read(&[STEP, b"x"].concat(), 4096).is_err(), "a byte behind the end");
        assert!(read(&STEP[HEADER..], 4096).is_err(), "no beginning");
        assert!(read(&[&STEP[..HEADER], STEP].concat(), 4096).is_err(), "two beginnings");
        assert!(read(&[0x5a; 4096], 4096).is_err(), "noise");
        let mut huge = FULL.to_vec();
        huge[HEADER] = 3;
        huge[HEADER + 32..HEADER + 40].fill(0x7f);
        assert!(read(&huge, 4096).is_err(), "a huge record");
        let mut compound = FULL.to_vec();
        compound[16] = compound[16] & !3 | 2;
        assert!(read(&compound, 4096).is_err(), "a compound stream");
        let cut = read(&STEP[..STEP.len() - 1], 4096).unwrap().0;
        assert!(cut.end().is_none());
    }
}
