//! The kernel's send stream, read command by command: no command of a peer's stream reaches `btrfs receive` before its head was
//! read.
//!
//! Owns the framing (kernel: `fs/btrfs/send.h`), the few attributes that the driver decides by, and what it puts in their
//! place. A stream is a magic and a version, then commands (`u32` length, `u16` kind, `u32` CRC-32C), each with attributes
//! (`u16` kind, `u16` length, bytes); all little-endian. The first command names the subvolume, its uuid and its
//! `ctransid`, the number of the last transaction that changed it, and the same of the parent of an incremental stream.
//! Refuses to know programs and pools.

use std::borrow::Cow;

use uuid::Uuid;

use crate::{drivers::pieces::Pieces, tree::entry::Time};

const MAGIC: &[u8; 13] = b"btrfs-stream\0";
const STREAM_HEAD: usize = MAGIC.len() + 4;
const COMMAND_HEAD: usize = 10;

/// The longest command, its head apart. The kernel's largest carries 128 KiB of data and two paths.
const COMMAND_LIMIT: usize = 256 * 1024;

/// How many time stamps are held back to be compared later; a stream with more is a change.
const TOUCHED_LIMIT: usize = 10_000;

mod kind {
    pub(super) const SUBVOLUME: u16 = 1;
    pub(super) const SNAPSHOT: u16 = 2;
    pub(super) const CLONE: u16 = 16;
    pub(super) const UTIMES: u16 = 20;
    pub(super) const END: u16 = 21;
    /// The last one of version 1, `UPDATE_EXTENT`.
    pub(super) const LAST_OF_1: u16 = 22;
    /// The last one of version 2, `ENCODED_WRITE`.
    pub(super) const LAST_OF_2: u16 = 25;
}

mod attribute {
    pub(super) const UUID: u16 = 1;
    pub(super) const CTRANSID: u16 = 2;
    pub(super) const MTIME: u16 = 10;
    pub(super) const PATH: u16 = 15;
    pub(super) const CLONE_UUID: u16 = 20;
    pub(super) const CLONE_CTRANSID: u16 = 21;
}

/// What is wrong with a stream, in words.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(super) struct StreamError(pub(super) String);

fn wrong<T>(what: impl Into<String>) -> Result<T, StreamError> {
    Err(StreamError(what.into()))
}

/// What a stream says of itself in its first command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Header {
    /// The subvolume's received uuid where it has one, else its uuid.
    pub(super) uuid: Uuid,
    /// The last transaction that changed it, on the sender's file system.
    pub(super) ctransid: u64,
    /// The same two of the parent, for an incremental stream.
    pub(super) parent: Option<(Uuid, u64)>,
}

/// A directory entry whose times a stream sets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Touched {
    pub(super) path: Vec<u8>,
    pub(super) mtime: Time,
}

/// What a stream changes, so far.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Changes {
    /// Nothing but, perhaps, these times: reading a file sets its atime, which brings its mtime along.
    OnlyTimes(Vec<Touched>),
    /// Something.
    Some,
}

/// Whose names an incoming stream may use, and what is put in their place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Naming {
    /// What the received subvolume is called.
    pub(super) name: &'static str,
    /// The uuid of the parent as it is here; `None` where only a full stream fits.
    pub(super) parent: Option<Uuid>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Start,
    First,
    Commands,
    Ended,
}

/// What is to be done with what comes next in a stream.
enum Next {
    /// It takes this many bytes from its beginning on to tell.
    Needs(usize),
    /// It is of this length, all there, and is looked at.
    Item(usize),
    /// It is of this length, and passed on unseen but for its head.
    Passed(usize),
}

/// Reads a stream that is cut anywhere.
#[derive(Debug)]
pub(super) struct Reader {
    state: State,
    highest_version: u32,
    last_kind: u16,
    /// The beginning of what cannot be judged yet.
    held: Vec<u8>,
    /// How much is still to come of a command that is passed on as it is.
    passing: usize,
    header: Option<Header>,
    changes: Changes,
    naming: Option<Naming>,
}

impl Reader {
    /// Reads a stream of a version up to this one as it is.
    pub(super) fn new(highest_version: u32) -> Self {
        let changes = Changes::OnlyTimes(Vec::new());
        let (state, held) = (State::Start, Vec::new());
        Self { state, highest_version, last_kind: 0, held, passing: 0, header: None, changes, naming: None }
    }

    /// Reads a peer's stream and puts names of this pool in the place of its own. It may name nothing but itself and its
    /// parent: no other subvolume of the pool can be read through it.
    pub(super) fn renaming(highest_version: u32, naming: Naming) -> Self {
        Self { naming: Some(naming), ..Self::new(highest_version) }
    }

    pub(super) fn header(&self) -> Option<&Header> {
        self.header.as_ref()
    }
    pub(super) fn has_ended(&self) -> bool {
        self.state == State::Ended
    }
    pub(super) fn changes(&self) -> &Changes {
        &self.changes
    }

    /// Takes the next bytes, and returns what may be passed on. Data is passed on where it lies, before its command is complete.
    pub(super) fn take<'a>(&mut self, bytes: &'a [u8]) -> Result<Vec<Cow<'a, [u8]>>, StreamError> {
        let mut pieces = Pieces::of(bytes);
        loop {
            let passed = self.passing.min(pieces.rest().len());
            pieces.pass(passed);
            self.passing -= passed;
            let rest = pieces.rest();
            let seen = if self.held.is_empty() { rest } else { &self.held };
            if seen.is_empty() {
                break;
            }
            match self.next(seen)? {
                Next::Needs(_) if rest.is_empty() => break,
                Next::Needs(length) => {
                    let more = (length - self.held.len()).min(rest.len());
                    self.held.extend_from_slice(&rest[..more]);
                    pieces.skip(more);
                }
                Next::Item(length) if self.held.is_empty() => match self.item(&rest[..length])? {
                    None => pieces.pass(length),
                    Some(changed) => {
                        pieces.put(changed);
                        pieces.skip(length);
                    }
                },
                Next::Item(_) => {
                    let held = std::mem::take(&mut self.held);
                    pieces.put(self.item(&held)?.unwrap_or(held));
                }
                Next::Passed(length) => {
                    self.changes = Changes::Some;
                    self.passing = length - self.held.len();
                    if !self.held.is_empty() {
                        pieces.put(std::mem::take(&mut self.held));
                    }
                }
            }
        }
        Ok(pieces.finish())
    }

    /// Judges what stands at the beginning.
    fn next(&self, seen: &[u8]) -> Result<Next, StreamError> {
        match self.state {
            State::Ended => return wrong("bytes follow the end of the stream"),
            State::Start => {
                let length = seen.len().min(MAGIC.len());
                if seen[..length] != MAGIC[..length] {
                    return wrong("it is no send stream");
                }
                let Some(version) = u32_at(seen, MAGIC.len()) else { return Ok(Next::Needs(STREAM_HEAD)) };
                if version == 0 || version > self.highest_version {
                    return wrong(format!("it has version {version}, where {} was agreed on", self.highest_version));
                }
                return Ok(Next::Item(STREAM_HEAD));
            }
            State::First | State::Commands => {}
        }
        let (Some(length), Some(kind), true) = (u32_at(seen, 0), u16_at(seen, 4), seen.len() >= COMMAND_HEAD) else {
            return Ok(Next::Needs(COMMAND_HEAD));
        };
        let length = length as usize;
        if length > COMMAND_LIMIT {
            return wrong(format!("a command has {length} bytes"));
        }
        if kind == 0 || kind > self.last_kind {
            return wrong(format!("there is no command {kind}"));
        }
        let is_first = matches!(kind, kind::SUBVOLUME | kind::SNAPSHOT);
        match (is_first, self.state == State::First) {
            (true, false) => return wrong("it holds a second subvolume"),
            (false, true) => return wrong("it does not begin with a subvolume"),
            _ => {}
        }
        let is_looked_at = match kind {
            kind::UTIMES => matches!(self.changes, Changes::OnlyTimes(_)),
            kind => is_first || matches!(kind, kind::CLONE | kind::END),
        };
        let length = COMMAND_HEAD + length;
        Ok(match is_looked_at {
            false => Next::Passed(length),
            true if seen.len() < length => Next::Needs(length),
            true => Next::Item(length),
        })
    }

    /// Looks at the head of the stream or at a command; returns what is put in its place.
    fn item(&mut self, item: &[u8]) -> Result<Option<Vec<u8>>, StreamError> {
        if self.state == State::Start {
            self.state = State::First;
            let version = u32_at(item, MAGIC.len());
            self.last_kind = if version == Some(1) { kind::LAST_OF_1 } else { kind::LAST_OF_2 };
            return Ok(None);
        }
        match u16_at(item, 4).unwrap_or_default() {
            kind @ (kind::SUBVOLUME | kind::SNAPSHOT) => return self.first(kind, item),
            kind::CLONE => return self.clone_range(item),
            kind::END => self.state = State::Ended,
            _ => self.touch(item)?,
        }
        Ok(None)
    }

    fn first(&mut self, kind: u16, command: &[u8]) -> Result<Option<Vec<u8>>, StreamError> {
        let mut attributes = parse(command)?;
        let uuid = uuid_of(&attributes, attribute::UUID)?;
        let ctransid = number_of(&attributes, attribute::CTRANSID)?;
        let parent = match kind {
            kind::SNAPSHOT => {
                Some((uuid_of(&attributes, attribute::CLONE_UUID)?, number_of(&attributes, attribute::CLONE_CTRANSID)?))
            }
            _ => None,
        };
        if parent.is_none() {
            self.changes = Changes::Some;
        }
        self.header = Some(Header { uuid, ctransid, parent });
        self.state = State::Commands;
        let Some(naming) = &self.naming else { return Ok(None) };
        replace(&mut attributes, attribute::PATH, naming.name.as_bytes())?;
        if kind == kind::SNAPSHOT {
            let Some(here) = naming.parent else { return wrong("it builds on a snapshot, where a full one was due") };
            replace(&mut attributes, attribute::CLONE_UUID, here.as_bytes())?;
        }
        Ok(Some(build(kind, &attributes)))
    }

    fn clone_range(&mut self, command: &[u8]) -> Result<Option<Vec<u8>>, StreamError> {
        self.changes = Changes::Some;
        let (Some(naming), Some(header)) = (&self.naming, &self.header) else { return Ok(None) };
        let mut attributes = parse(command)?;
        let from = uuid_of(&attributes, attribute::CLONE_UUID)?;
        if from != header.uuid {
            match (header.parent, naming.parent) {
                (Some((sent, _)), Some(here)) if sent == from => {
                    replace(&mut attributes, attribute::CLONE_UUID, here.as_bytes())?;
                }
                _ => return wrong(format!("it takes data from another subvolume ({from})")),
            }
        }
        Ok(Some(build(kind::CLONE, &attributes)))
    }

    fn touch(&mut self, command: &[u8]) -> Result<(), StreamError> {
        let Changes::OnlyTimes(touched) = &mut self.changes else { return Ok(()) };
        if touched.len() == TOUCHED_LIMIT {
            self.changes = Changes::Some;
            return Ok(());
        }
        let attributes = parse(command)?;
        let time = bytes_of(&attributes, attribute::MTIME)?;
        let (Some(secs), Some(nanos)) = (u64_at(time, 0), u32_at(time, 8)) else { return wrong("a time is cut short") };
        let path = bytes_of(&attributes, attribute::PATH)?.to_vec();
        touched.push(Touched { path, mtime: Time { secs: secs as i64, nanos } });
        Ok(())
    }
}

type Attributes<'a> = Vec<(u16, Cow<'a, [u8]>)>;

/// Reads the attributes of a command whose checksum is right. Not for commands of version 2 that carry data.
fn parse(command: &[u8]) -> Result<Attributes<'_>, StreamError> {
    let (Some(sum), Some(mut rest)) = (u32_at(command, 6), command.get(COMMAND_HEAD..)) else {
        return wrong("a command is cut short");
    };
    let head = [&command[..6], &[0; 4]].concat();
    if crc32c(crc32c(0, &head), rest) != sum {
        return wrong("the checksum of a command does not match");
    }
    let mut attributes = Attributes::new();
    while !rest.is_empty() {
        let (Some(kind), Some(length)) = (u16_at(rest, 0), u16_at(rest, 2)) else {
            return wrong("an attribute is cut short");
        };
        let end = 4 + usize::from(length);
        let Some(value) = rest.get(4..end) else { return wrong("an attribute is cut short") };
        attributes.push((kind, value.into()));
        rest = &rest[end..];
    }
    Ok(attributes)
}

/// Makes a command.
fn build(kind: u16, attributes: &Attributes<'_>) -> Vec<u8> {
    let length: usize = attributes.iter().map(|(_, value)| 4 + value.len()).sum();
    let mut out = Vec::with_capacity(COMMAND_HEAD + length);
    out.extend_from_slice(&(length as u32).to_le_bytes());
    out.extend_from_slice(&kind.to_le_bytes());
    out.extend_from_slice(&[0; 4]);
    for (kind, value) in attributes {
        out.extend_from_slice(&kind.to_le_bytes());
        out.extend_from_slice(&(value.len() as u16).to_le_bytes());
        out.extend_from_slice(value);
    }
    let sum = crc32c(0, &out);
    out[6..COMMAND_HEAD].copy_from_slice(&sum.to_le_bytes());
    out
}

fn bytes_of<'a>(attributes: &'a Attributes<'_>, kind: u16) -> Result<&'a [u8], StreamError> {
    match attributes.iter().find(|(it, _)| *it == kind) {
        Some((_, value)) => Ok(value),
        None => wrong(format!("a command lacks its attribute {kind}")),
    }
}

fn uuid_of(attributes: &Attributes<'_>, kind: u16) -> Result<Uuid, StreamError> {
    Uuid::from_slice(bytes_of(attributes, kind)?).or_else(|_| wrong("a uuid is cut short"))
}

fn number_of(attributes: &Attributes<'_>, kind: u16) -> Result<u64, StreamError> {
    u64_at(bytes_of(attributes, kind)?, 0).map_or_else(|| wrong("a number is cut short"), Ok)
}

fn replace<'a>(attributes: &mut Attributes<'a>, kind: u16, value: &[u8]) -> Result<(), StreamError> {
    let mut found = 0;
    for (_, it) in attributes.iter_mut().filter(|(it, _)| *it == kind) {
        *it = value.to_vec().into();
        found += 1;
    }
    if found == 1 { Ok(()) } else { wrong(format!("a command has {found} attributes {kind}")) }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

/// The CRC-32C (Castagnoli, reflected) without the usual inversions, as the kernel computes it here.
fn crc32c(seed: u32, bytes: &[u8]) -> u32 {
    bytes.iter().fold(seed, |crc, byte| (crc >> 8) ^ TABLE[usize::from((crc as u8) ^ byte)])
}

const TABLE: [u32; 256] = {
    let mut table = [0; 256];
    let mut at = 0;
    while at < 256 {
        let (mut value, mut bit) = (at as u32, 0);
        while bit < 8 {
            value = if value & 1 == 1 { (value >> 1) ^ 0x82f6_3b78 } else { value >> 1 };
            bit += 1;
        }
        table[at] = value;
        at += 1;
    }
    table
};

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// `btrfs send -p s1 s2` of kernel 6.18: two files of two bytes are new.
    const STEP: &[u8] = include_bytes!("testdata/step.stream");

    fn read(bytes: &[u8], piece: usize, naming: Option<Naming>) -> Result<(Reader, Vec<u8>), StreamError> {
        let mut reader = naming.map_or_else(|| Reader::new(1), |naming| Reader::renaming(1, naming));
        let mut out = Vec::new();
        for chunk in bytes.chunks(piece) {
            out.extend(reader.take(chunk)?.iter().flat_map(|piece| piece.iter()));
        }
        Ok((reader, out))
    }

    #[test]
    fn a_recorded_stream_is_read_and_passed_on_as_it_is_however_it_is_cut() {
        for piece in [1, 7, 100, 10_000] {
            let (reader, out) = read(STEP, piece, None).unwrap();
            assert_eq!(out, STEP);
            assert!(reader.has_ended());
            assert_eq!(*reader.changes(), Changes::Some);
            let parent = Some(("4d91c3ca-b7a3-ae46-ab4e-faf4d0fa9f61".parse().unwrap(), 7));
            let uuid = "fba6fa6d-54e5-0f43-adf1-26df73240f7f".parse().unwrap();
            assert_eq!(reader.header(), Some(&Header { uuid, ctransid: 8, parent }));
        }
    }

    #[test]
    fn data_is_passed_on_where_it_lies() {
        let mut reader = Reader::renaming(1, Naming { name: "tree", parent: Some(Uuid::nil()) });
        let data = [&[0; 2][..], &[7; 9000]].concat();
        let write = build(15, &vec![(19, data.as_slice().into())]);
        let begin = STREAM_HEAD + COMMAND_HEAD + 0x46;
        let stream = [&STEP[..begin], &write, &write].concat();
        let pieces = reader.take(&stream[..begin + 5000]).unwrap();
        assert!(matches!(pieces[..], [Cow::Borrowed(_), Cow::Owned(_), Cow::Borrowed(data)] if data.len() == 5000));
        let pieces = reader.take(&stream[begin + 5000..]).unwrap();
        assert!(matches!(pieces[..], [Cow::Borrowed(data)] if data.len() == 2 * write.len() - 5000));
    }

    #[test]
    fn names_are_replaced_and_the_checksums_with_them() {
        let here = Uuid::from_u128(42);
        let (_, out) = read(STEP, 64, Some(Naming { name: "tree", parent: Some(here) })).unwrap();
        let (reader, again) = read(&out, 64, None).unwrap();
        assert_eq!(again, out);
        assert_eq!(reader.header().unwrap().parent, Some((here, 7)));
        assert!(out.windows(4).any(|it| it == b"tree"));
        let error = read(STEP, 64, Some(Naming { name: "tree", parent: None })).unwrap_err();
        assert!(error.0.contains("full one was due"), "{error}");
    }

    #[test]
    fn a_stream_that_takes_data_from_elsewhere_is_refused() {
        let mut stream = STEP[..STREAM_HEAD].to_vec();
        let uuid = Uuid::from_u128(1);
        let first = vec![
            (attribute::PATH, b"s".as_slice().into()),
            (attribute::UUID, uuid.as_bytes().as_slice().into()),
            (attribute::CTRANSID, [0; 8].as_slice().into()),
        ];
        stream.extend(build(kind::SUBVOLUME, &first));
        let naming = || Some(Naming { name: "tree", parent: None });
        for (from, fine) in [(uuid, true), (Uuid::from_u128(2), false)] {
            let mut stream = stream.clone();
            stream.extend(build(kind::CLONE, &vec![(attribute::CLONE_UUID, from.as_bytes().as_slice().into())]));
            assert_eq!(read(&stream, 64, naming()).is_ok(), fine);
        }
        let mut twice = stream.clone();
        twice.extend(build(kind::SUBVOLUME, &first));
        assert!(read(&twice, 64, naming()).unwrap_err().0.contains("second"));
    }

    #[test]
    fn garbage_of_any_kind_is_an_error_or_no_end() {
        for cut in 0..STEP.len() {
            assert!(read(&STEP[..cut], 64, None).map_or(true, |(reader, _)| !reader.has_ended()));
        }
        for at in 0..STREAM_HEAD + COMMAND_HEAD + 0x46 {
            let mut damaged = STEP.to_vec();
            damaged[at] ^= 0x81;
            let naming = Naming { name: "tree", parent: Some(Uuid::nil()) };
            let ended = read(&damaged, 64, Some(naming)).is_ok_and(|(reader, _)| reader.has_ended());
            assert!(!ended, "byte {at}");
        }
        assert!(read(&[STEP, STEP].concat(), 64, None).is_err());
        let mut newer = STEP.to_vec();
        newer[MAGIC.len()] = 2;
        assert!(read(&newer, 64, None).unwrap_err().0.contains("version 2"));
    }

    #[test]
    fn a_read_file_is_told_from_a_change_by_its_mtime() {
        let mut stream = STEP[..STREAM_HEAD + COMMAND_HEAD + 0x46].to_vec();
        let time = [5_u64.to_le_bytes().as_slice(), &7_u32.to_le_bytes()].concat();
        let touch = vec![(attribute::PATH, b"a/b".as_slice().into()), (attribute::MTIME, time.as_slice().into())];
        stream.extend(build(kind::UTIMES, &touch));
        stream.extend(build(kind::END, &Vec::new()));
        let (reader, _) = read(&stream, 3, None).unwrap();
        let touched = Touched { path: b"a/b".to_vec(), mtime: Time { secs: 5, nanos: 7 } };
        assert_eq!(*reader.changes(), Changes::OnlyTimes(vec![touched]));
        assert!(reader.has_ended());
    }
}
