//! A tree's inventory: every entry in walk order, in one append-only file.
//!
//! Layout: the magic text, then records of u32 little-endian length, postcard bytes, and the first 8 bytes of their
//! BLAKE3. The last record holds the count, so a file that was cut is noticed. Read and written as a stream, through
//! buffers that are kept from one entry to the next. Refuses to make anything durable: whoever publishes it does.

use std::{
    fs::File,
    io::{BufReader, BufWriter, Read, Write as _},
    mem,
    path::{Path, PathBuf},
    sync::mpsc::{Receiver, sync_channel},
    thread::{self, JoinHandle},
    vec,
};

use serde::{Deserialize, Serialize};

use super::{
    behind::Behind,
    entry::{Entry, EntryKind, Stat},
    path::TreePath,
    xattr::XATTRS_LIMIT,
};
use crate::error::{Error, ErrorKind, Result};

const MAGIC: &[u8] = b"flocker-inventory/1\n";

/// The longest record: an entry with all its attributes, two paths, and room.
const RECORD_LIMIT: usize = XATTRS_LIMIT + 256 * 1024;

/// Bytes before each record: the length of its body.
const LENGTH: usize = 4;

const CHECK_LENGTH: usize = 8;

/// One entry and what else is known of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InventoryEntry {
    /// The entry. Write `stat.nlink` as the number of names within the volume (the head's), not within the pool.
    pub entry: Entry,
    /// The stat of the head's file that this one was copied from. Two snapshots of one head whose origins are
    /// unchanged hold the same data and metadata, though their own inodes differ.
    pub origin: Option<Stat>,
    /// BLAKE3 of a regular file's contents, where it was read.
    pub digest: Option<[u8; 32]>,
}

impl InventoryEntry {
    /// Tells whether it is a regular file, and the first of its names.
    pub fn is_file(&self) -> bool {
        matches!(self.entry.kind, EntryKind::File { .. })
    }
}

#[derive(Deserialize)]
#[expect(clippy::large_enum_variant, reason = "all but one of the values are the large one, and none is kept")]
enum Record {
    Entry(InventoryEntry),
    End { entries: u64 },
}

/// A [`Record`] to be written, with the same bytes.
#[derive(Serialize)]
enum RecordRef<'a> {
    Entry(&'a InventoryEntry),
    End { entries: u64 },
}

/// Appends a record as it lies in the file.
fn put_frame(record: &RecordRef<'_>, mut to: Vec<u8>) -> std::result::Result<Vec<u8>, ErrorKind> {
    let head = to.len();
    to.extend_from_slice(&[0; LENGTH]);
    let mut to = postcard::to_extend(record, to).map_err(|error| ErrorKind::Corrupt(error.to_string()))?;
    let start = head + LENGTH;
    let length = to.len() - start;
    if length > RECORD_LIMIT {
        return Err(ErrorKind::Unsupported("an entry's attributes are larger than 8 MiB".to_owned()));
    }
    to[head..start].copy_from_slice(&(length as u32).to_le_bytes());
    let check = blake3::hash(&to[start..]);
    to.extend_from_slice(&check.as_bytes()[..CHECK_LENGTH]);
    Ok(to)
}

/// An entry's record as it lies in the file, apart from any file: what is put in one as it is.
#[derive(Debug, Default)]
pub(super) struct Frame(Vec<u8>);

impl Frame {
    /// Makes it of an entry, in place of what it was.
    pub(super) fn set(&mut self, entry: &InventoryEntry) -> std::result::Result<(), ErrorKind> {
        self.0.clear();
        self.0 = put_frame(&RecordRef::Entry(entry), mem::take(&mut self.0))?;
        Ok(())
    }

    pub(super) fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Reads the next one, in place of what it was, from where this process has put it.
    pub(super) fn read_from(&mut self, input: &mut impl Read) -> std::io::Result<()> {
        self.0.resize(LENGTH, 0);
        input.read_exact(&mut self.0)?;
        let length = self.0.first_chunk().map_or(0, |length| u32::from_le_bytes(*length) as usize).min(RECORD_LIMIT);
        self.0.resize(LENGTH + length + CHECK_LENGTH, 0);
        input.read_exact(&mut self.0[LENGTH..])
    }

    /// Reads the path, and the kind, without the rest.
    pub(super) fn head(&self) -> Option<(&[u8], EntryKind)> {
        let ((tag, path, kind), _) = postcard::take_from_bytes::<(u32, &[u8], EntryKind)>(self.body()?).ok()?;
        (tag == 0).then_some((path, kind))
    }

    /// Reads all of it.
    pub(super) fn entry(&self) -> Option<InventoryEntry> {
        match postcard::from_bytes(self.body()?).ok()? {
            Record::Entry(entry) => Some(entry),
            Record::End { .. } => None,
        }
    }

    fn body(&self) -> Option<&[u8]> {
        self.0.get(LENGTH..self.0.len().checked_sub(CHECK_LENGTH)?)
    }
}

/// How many entries, and how many bytes of records, go from thread to thread at once.
const BATCH_ENTRIES: usize = 128;
const BATCH_BYTES: usize = 128 * 1024;

type Batch = Vec<InventoryEntry>;

/// What is to be written next: records that are made already, and between them entries.
#[derive(Debug, Default)]
struct Pending {
    frames: Vec<u8>,
    /// Each with the number of bytes of `frames` that come before it.
    entries: Vec<(usize, InventoryEntry)>,
}

impl Pending {
    fn is_full(&self) -> bool {
        self.entries.len() >= BATCH_ENTRIES || self.frames.len() >= BATCH_BYTES
    }
}

/// Writes an inventory. Dropped before [`finish`](Self::finish) it leaves a file that is read as truncated. From the second
/// hundred of entries on they are written on a thread of their own: that one may not be shows at a later call.
#[derive(Debug)]
pub struct InventoryWriter {
    /// The path added last, once there are entries.
    last: TreePath,
    entries: u64,
    pending: Pending,
    path: PathBuf,
    work: Behind<Encoder, Pending>,
}

impl InventoryWriter {
    /// Creates the file, which must not exist, with mode 0600.
    pub fn create(path: &Path) -> Result<Self> {
        use std::os::unix::fs::OpenOptionsExt as _;
        let file = File::options().write(true).create_new(true).mode(0o600).open(path);
        let file = file.map_err(|error| Error::io("create inventory", path.display(), error))?;
        let out = BufWriter::with_capacity(64 * 1024, file);
        let mut encoder = Encoder { out, path: path.to_owned(), frame: Vec::new() };
        encoder.put(MAGIC)?;
        let work = Behind::new("inventory", encoder, Encoder::take);
        Ok(Self { last: TreePath::root(), entries: 0, pending: Pending::default(), path: path.to_owned(), work })
    }

    /// Adds the next entry in walk order.
    pub fn add(&mut self, entry: InventoryEntry) -> Result<()> {
        self.advance(&entry.entry.path)?;
        self.pending.entries.push((self.pending.frames.len(), entry));
        self.hand_over_if_full()
    }

    /// Adds the next entry in walk order, whose path this is, as a record that was made already.
    pub(super) fn add_frame(&mut self, path: &TreePath, frame: &Frame) -> Result<()> {
        self.advance(path)?;
        self.pending.frames.extend_from_slice(frame.as_bytes());
        self.hand_over_if_full()
    }

    fn advance(&mut self, path: &TreePath) -> Result<()> {
        if self.entries > 0 && self.last >= *path {
            let why = format!("{path} is out of order");
            return Err(Error::new("write inventory", self.path.display(), ErrorKind::Corrupt(why)));
        }
        self.last.clone_from(path);
        self.entries += 1;
        Ok(())
    }

    fn hand_over_if_full(&mut self) -> Result<()> {
        if !self.pending.is_full() {
            return Ok(());
        }
        let pending = mem::take(&mut self.pending);
        self.work.hand_over(pending).map_err(|error| self.work.take_failure().unwrap_or(error))
    }

    /// Ends the inventory. It is whole, but not durable yet.
    pub fn finish(mut self) -> Result<()> {
        let handed = self.work.here(mem::take(&mut self.pending));
        handed.map_err(|error| self.work.take_failure().unwrap_or(error))?;
        let mut encoder = self.work.into_work()?;
        encoder.record(&RecordRef::End { entries: self.entries })?;
        encoder.out.flush().map_err(|error| Error::io("write inventory", encoder.path.display(), error))
    }
}

struct Encoder {
    out: BufWriter<File>,
    path: PathBuf,
    /// Kept from one record to the next.
    frame: Vec<u8>,
}

impl Encoder {
    fn take(&mut self, Pending { frames, entries }: Pending) -> Result<()> {
        let mut done = 0;
        for (before, entry) in &entries {
            self.put(&frames[done..*before])?;
            self.record(&RecordRef::Entry(entry))?;
            done = *before;
        }
        self.put(&frames[done..])
    }

    fn record(&mut self, record: &RecordRef<'_>) -> Result<()> {
        self.frame.clear();
        let frame = put_frame(record, mem::take(&mut self.frame));
        let frame = frame.map_err(|kind| Error::new("write inventory", self.path.display(), kind))?;
        self.put(&frame)?;
        self.frame = frame;
        Ok(())
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.out.write_all(bytes).map_err(|error| Error::io("write inventory", self.path.display(), error))
    }
}

/// Reads an inventory, entry by entry. After an error it ends. What comes behind the first hundred of entries is read ahead,
/// on a thread of its own.
#[derive(Debug)]
pub struct InventoryReader {
    /// Entries that were read and not returned yet.
    ready: vec::IntoIter<InventoryEntry>,
    source: Source,
}

#[derive(Debug)]
enum Source {
    Here(Box<Decoder>),
    Ahead { batches: Receiver<Result<Batch>>, thread: JoinHandle<()> },
    Ended,
}

impl InventoryReader {
    /// Opens an inventory.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|error| Error::io("open inventory", path.display(), error))?;
        let input = BufReader::with_capacity(64 * 1024, file);
        let (path, last) = (path.to_owned(), TreePath::root());
        let mut decoder = Decoder { input, path, last, entries: 0, ended: false, failed: None, body: Vec::new() };
        let mut magic = [0; MAGIC.len()];
        decoder.fill(&mut magic)?;
        if magic != MAGIC {
            return Err(decoder.corrupt("it is not an inventory"));
        }
        Ok(Self { ready: Batch::new().into_iter(), source: Source::Here(Box::new(decoder)) })
    }

    /// Returns the next entry, which stays the next one; `None` at the end.
    pub(super) fn peek(&mut self) -> Result<Option<&InventoryEntry>> {
        if self.ready.as_slice().is_empty() {
            self.ready = self.read_on()?.into_iter();
        }
        Ok(self.peeked())
    }

    /// Returns what was returned by [`peek`](Self::peek) last, and was not passed since.
    pub(super) fn peeked(&self) -> Option<&InventoryEntry> {
        self.ready.as_slice().first()
    }

    /// Passes the next entry, if it has been looked at.
    pub(super) fn skip(&mut self) {
        drop(self.ready.next());
    }

    /// Returns the next entries; none at the end.
    fn read_on(&mut self) -> Result<Batch> {
        match mem::replace(&mut self.source, Source::Ended) {
            Source::Here(mut decoder) => {
                let batch = decoder.batch()?;
                if batch.len() >= BATCH_ENTRIES {
                    self.source = ahead(decoder)?;
                } else if !batch.is_empty() {
                    self.source = Source::Here(decoder);
                }
                Ok(batch)
            }
            Source::Ahead { batches, thread } => match batches.recv() {
                Ok(Ok(batch)) => {
                    self.source = Source::Ahead { batches, thread };
                    Ok(batch)
                }
                Ok(Err(error)) => Err(error),
                Err(_) => match thread.join() {
                    Ok(()) => Ok(Batch::new()),
                    Err(panic) => std::panic::resume_unwind(panic),
                },
            },
            Source::Ended => Ok(Batch::new()),
        }
    }
}

/// Reads on, a few batches ahead of whoever takes them.
fn ahead(mut decoder: Box<Decoder>) -> Result<Source> {
    let (ready, batches) = sync_channel(2);
    let shown = decoder.path.display().to_string();
    let run = move || {
        loop {
            match decoder.batch() {
                Ok(batch) if batch.is_empty() => return,
                batch => {
                    let is_last = batch.is_err();
                    if ready.send(batch).is_err() || is_last {
                        return;
                    }
                }
            }
        }
    };
    let thread = thread::Builder::new().name("inventory".to_owned()).spawn(run);
    let thread = thread.map_err(|error| Error::io("read inventory", shown, error))?;
    Ok(Source::Ahead { batches, thread })
}

impl Drop for InventoryReader {
    /// The file is closed when this returns: a pool that lies on it may be going.
    fn drop(&mut self) {
        if let Source::Ahead { batches, thread } = mem::replace(&mut self.source, Source::Ended) {
            drop(batches);
            let _ = thread.join();
        }
    }
}

impl Iterator for InventoryReader {
    type Item = Result<InventoryEntry>;

    fn next(&mut self) -> Option<Self::Item> {
        if let Some(entry) = self.ready.next() {
            return Some(Ok(entry));
        }
        match self.read_on() {
            Ok(batch) => {
                self.ready = batch.into_iter();
                self.ready.next().map(Ok)
            }
            Err(error) => Some(Err(error)),
        }
    }
}

#[derive(Debug)]
struct Decoder {
    input: BufReader<File>,
    path: PathBuf,
    /// The path read last, once there were entries.
    last: TreePath,
    entries: u64,
    ended: bool,
    /// What comes behind the entries that were whole.
    failed: Option<Error>,
    body: Vec<u8>,
}

impl Decoder {
    fn corrupt(&self, why: &str) -> Error {
        Error::new("read inventory", self.path.display(), ErrorKind::Corrupt(why.to_owned()))
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<()> {
        self.input.read_exact(bytes).map_err(|error| match error.kind() {
            std::io::ErrorKind::UnexpectedEof => self.corrupt("it is truncated"),
            _ => Error::io("read inventory", self.path.display(), error),
        })
    }

    /// Reads entries, as many as go at once; none at the end.
    fn batch(&mut self) -> Result<Batch> {
        if let Some(error) = self.failed.take() {
            return Err(error);
        }
        let (mut batch, mut bytes) = (Batch::with_capacity(BATCH_ENTRIES), 0);
        while !self.ended && batch.len() < BATCH_ENTRIES && bytes < BATCH_BYTES {
            match self.read() {
                Ok(Some(entry)) => batch.push(entry),
                Ok(None) => self.ended = true,
                Err(error) => {
                    self.ended = true;
                    if batch.is_empty() {
                        return Err(error);
                    }
                    self.failed = Some(error);
                }
            }
            bytes += self.body.len();
        }
        Ok(batch)
    }

    fn read(&mut self) -> Result<Option<InventoryEntry>> {
        let mut length = [0; LENGTH];
        self.fill(&mut length)?;
        let length = u32::from_le_bytes(length) as usize;
        if length > RECORD_LIMIT {
            return Err(self.corrupt("a record is too long"));
        }
        let mut body = mem::take(&mut self.body);
        body.resize(length, 0);
        self.fill(&mut body)?;
        let mut check = [0; CHECK_LENGTH];
        self.fill(&mut check)?;
        if blake3::hash(&body).as_bytes()[..CHECK_LENGTH] != check {
            return Err(self.corrupt("a checksum differs"));
        }
        let record = postcard::from_bytes(&body).map_err(|_| self.corrupt("a record cannot be read"))?;
        self.body = body;
        match record {
            Record::Entry(entry) => {
                if self.entries > 0 && self.last >= entry.entry.path {
                    return Err(self.corrupt("its entries are out of order"));
                }
                self.last.clone_from(&entry.entry.path);
                self.entries += 1;
                Ok(Some(entry))
            }
            Record::End { entries } if entries == self.entries => {
                match self
                    .input
                    .read(&mut [0])
                    .map_err(|error| Error::io("read inventory", self.path.display(), error))?
                {
                    0 => Ok(None),
                    _ => Err(self.corrupt("bytes follow its end")),
                }
            }
            Record::End { .. } => Err(self.corrupt("entries are missing")),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::tree::entry::Time;

    fn entry(path: &str) -> InventoryEntry {
        InventoryEntry {
            entry: Entry {
                path: TreePath::parse(path.as_bytes()).unwrap(),
                kind: EntryKind::HardLink { to: TreePath::parse(b"a").unwrap() },
                mode: 0o640,
                uid: 1,
                gid: 2,
                mtime: Time { secs: -5, nanos: 999_999_999 },
                xattrs: vec![(b"user.x".to_vec(), b"\0\xff".to_vec())],
                stat: Stat::default(),
            },
            origin: Some(Stat { ino: 7, ..Stat::default() }),
            digest: Some([9; 32]),
        }
    }

    fn written(folder: &Path) -> (PathBuf, Vec<InventoryEntry>) {
        let path = folder.join("inventory");
        let entries: Vec<_> = ["", "a", "a/b", "a!"].map(entry).into();
        let mut writer = InventoryWriter::create(&path).unwrap();
        entries.iter().for_each(|entry| writer.add(entry.clone()).unwrap());
        writer.finish().unwrap();
        (path, entries)
    }

    #[test]
    fn an_inventory_comes_back_as_written() {
        let folder = tempfile::tempdir().unwrap();
        let (path, entries) = written(folder.path());
        let back: Vec<_> = InventoryReader::open(&path).unwrap().map(Result::unwrap).collect();
        assert_eq!(back, entries);
    }

    #[test]
    fn records_that_were_made_before_lie_among_entries_in_order() {
        let folder = tempfile::tempdir().unwrap();
        let (whole, entries) = written(folder.path());
        let path = folder.path().join("mixed");
        let mut writer = InventoryWriter::create(&path).unwrap();
        let mut frame = Frame::default();
        for (number, item) in entries.iter().enumerate() {
            frame.set(item).unwrap();
            assert_eq!(frame.entry().as_ref(), Some(item));
            assert_eq!(frame.head().unwrap(), (item.entry.path.as_bytes(), item.entry.kind.clone()));
            match number {
                1 | 2 => writer.add_frame(&item.entry.path, &frame).unwrap(),
                _ => writer.add(item.clone()).unwrap(),
            }
        }
        assert!(writer.add_frame(&entries[1].entry.path, &frame).is_err(), "out of order");
        writer.finish().unwrap();
        assert_eq!(std::fs::read(path).unwrap(), std::fs::read(whole).unwrap());
    }

    #[test]
    fn a_cut_or_changed_inventory_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let (path, _) = written(folder.path());
        let bytes = std::fs::read(&path).unwrap();
        for cut in 0..bytes.len() {
            std::fs::write(&path, &bytes[..cut]).unwrap();
            let failed = InventoryReader::open(&path).and_then(|reader| reader.collect::<Result<Vec<_>>>()).is_err();
            assert!(failed, "cut at {cut}");
        }
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= 1;
            std::fs::write(&path, &changed).unwrap();
            let failed = InventoryReader::open(&path).and_then(|reader| reader.collect::<Result<Vec<_>>>()).is_err();
            assert!(failed, "changed at {at}");
        }
    }

    #[test]
    fn entries_out_of_order_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = InventoryWriter::create(&folder.path().join("i")).unwrap();
        writer.add(entry("b")).unwrap();
        assert!(writer.add(entry("a")).is_err());
        assert!(writer.add(entry("b")).is_err());
    }
}
