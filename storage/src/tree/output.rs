//! The stream as it grows: records become frames, frames become chunks, and a digest is taken of all.
//!
//! A chunk ends with a record, so that who takes it in need not put one together from two; only what is longer than a chunk is
//! cut. Bytes of files are read to where they are sent from.

use bytes::Bytes;

use super::{
    stream_digest::StreamDigest,
    wire::{DATA_LIMIT, FRAME_HEAD, FRAME_LIMIT, Record, data_head},
    write::{CHECKPOINT_INTERVAL, Summary},
};
use crate::{
    delta::CHUNK_LIMIT,
    error::{Error, ErrorKind, Result},
};

/// How long a chunk is at least, but for the last: a piece of a file.
const CHUNK: usize = DATA_LIMIT;

/// What a chunk of many records has room for before it grows.
const ROOM: usize = CHUNK + 16 * 1024;

/// Room for what stands in a frame besides the bytes of a piece of a file. A chunk of one piece has little more, since
/// reading fills all the room there is.
const DATA_HEAD: usize = 32;

/// Records on their way to be chunks.
#[derive(Debug)]
pub(super) struct Output {
    bytes: Vec<u8>,
    /// How much of that went into the digest.
    hashed: usize,
    /// Bytes of records that were handed over and did not fit a chunk.
    cut: Bytes,
    digest: StreamDigest,
    since_checkpoint: u64,
    interval: u64,
}

impl Output {
    pub(super) fn new() -> Self {
        Self {
            bytes: Vec::new(),
            hashed: 0,
            cut: Bytes::new(),
            digest: StreamDigest::default(),
            since_checkpoint: 0,
            interval: CHECKPOINT_INTERVAL,
        }
    }

    /// Sets how many bytes lie between two checkpoints.
    pub(super) fn checkpoint_every(&mut self, bytes: u64) {
        self.interval = bytes;
    }

    /// Appends a record. After an error nothing more may be asked for.
    pub(super) fn put(&mut self, record: &Record<'_>) -> Result<()> {
        self.put_known(record, None)
    }

    /// Appends a record; `digest`: that of its data, which is all of its file, where it is known.
    pub(super) fn put_known(&mut self, record: &Record<'_>, digest: Option<[u8; 32]>) -> Result<()> {
        if record.place().is_some() && self.digest.has_data() {
            self.hash();
            self.digest.end_data();
        }
        let start = self.begin_frame(ROOM);
        self.write(|bytes| postcard::to_extend(record, bytes))?;
        let length = self.bytes.len() - start - FRAME_HEAD;
        if length > FRAME_LIMIT {
            let why = "the extended attributes are larger than 8 MiB".to_owned();
            return Err(Error::new("write delta", "record", ErrorKind::Unsupported(why)));
        }
        self.end_frame(start, record.is_digest());
        match record {
            Record::Data { bytes, .. } => self.hash_data(bytes.0.len(), digest),
            Record::Contents { .. } => self.digest.state(),
            record if record.is_digest() => self.hashed = self.bytes.len(),
            _ => {}
        }
        Ok(())
    }

    /// Appends a data record whose `length` bytes `read` appends; `digest` as before. After an error nothing more may be asked for.
    pub(super) fn put_data(
        &mut self,
        offset: u64,
        length: usize,
        digest: Option<[u8; 32]>,
        read: impl FnOnce(&mut Vec<u8>) -> Result<()>,
    ) -> Result<()> {
        let start = self.begin_frame(DATA_HEAD + length);
        self.write(|bytes| data_head(offset, length, bytes))?;
        self.bytes.reserve(length);
        read(&mut self.bytes)?;
        self.end_frame(start, false);
        self.hash_data(length, digest);
        Ok(())
    }

    fn begin_frame(&mut self, room: usize) -> usize {
        if self.bytes.is_empty() {
            self.bytes = Vec::with_capacity(room);
        }
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&[0; FRAME_HEAD]);
        start
    }

    fn write(&mut self, serialize: impl FnOnce(Vec<u8>) -> postcard::Result<Vec<u8>>) -> Result<()> {
        self.bytes = serialize(std::mem::take(&mut self.bytes))
            .map_err(|error| Error::new("write delta", "record", ErrorKind::Corrupt(error.to_string())))?;
        Ok(())
    }

    fn end_frame(&mut self, start: usize, is_digest: bool) {
        let length = self.bytes.len() - start - FRAME_HEAD;
        self.bytes[start..start + FRAME_HEAD].copy_from_slice(&(length as u32).to_le_bytes());
        if !is_digest {
            self.since_checkpoint += (FRAME_HEAD + length) as u64;
        }
    }

    /// Takes in what was written, of which the last `length` bytes are a file's.
    fn hash_data(&mut self, length: usize, known: Option<[u8; 32]>) {
        let (frames, data) = self.bytes[self.hashed..].split_at(self.bytes.len() - self.hashed - length);
        self.digest.frames(frames);
        match known {
            Some(digest) => self.digest.known_data(digest),
            None if self.digest.counts_data() => self.digest.data(data),
            None => {}
        }
        self.hashed = self.bytes.len();
    }

    /// Tells whether a chunk can be taken before the end.
    pub(super) fn has_chunk(&self) -> bool {
        !self.cut.is_empty() || self.bytes.len() >= CHUNK
    }

    /// Hands out what there is, if there is any: a chunk.
    pub(super) fn take_chunk(&mut self) -> Option<Bytes> {
        if self.cut.is_empty() {
            self.hash();
            self.hashed = 0;
            self.cut = std::mem::take(&mut self.bytes).into();
        }
        let length = self.cut.len().min(CHUNK_LIMIT);
        (length > 0).then(|| self.cut.split_to(length))
    }

    /// Throws away what was written, and returns how much it was.
    pub(super) fn forget(&mut self) -> usize {
        let length = self.bytes.len();
        self.bytes.clear();
        self.hashed = 0;
        length
    }

    pub(super) fn checkpoint_if_due(&mut self) -> Result<()> {
        if self.since_checkpoint < self.interval {
            return Ok(());
        }
        self.hash();
        self.since_checkpoint = 0;
        let digest = self.digest.take();
        self.put(&Record::Checkpoint { digest })
    }

    pub(super) fn end(&mut self, Summary { entries, logical_bytes }: Summary) -> Result<()> {
        self.hash();
        let digest = self.digest.end(entries, logical_bytes);
        self.put(&Record::End { entries, logical_bytes, digest })
    }

    fn hash(&mut self) {
        self.digest.frames(&self.bytes[self.hashed..]);
        self.hashed = self.bytes.len();
    }
}
