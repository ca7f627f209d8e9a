//! What changed inside one file: both versions compared block by block, holes and shared extents skipped.
//!
//! A pure reader with one position; memory is two windows, whatever the file's size.

use std::os::fd::{AsFd as _, OwnedFd};

use rustix::io::Errno;

use super::{
    data::{append_from, next_data, read_at},
    extents::{Extents, Shared},
    wire::DATA_LIMIT,
};

/// The unit of comparing, in bytes: the page that most databases and file systems write at least.
const BLOCK: usize = 4096;

/// Smaller files are read: asking for their extents costs as much.
const WORTH_ASKING: u64 = 1024 * 1024;

/// The smallest block of any file system, in bytes: a hole is one at least, or the last, cut one.
const SMALLEST_BLOCK: usize = 512;

/// One version of a file.
#[derive(Debug)]
pub(super) struct Version {
    pub(super) file: OwnedFd,
    pub(super) size: u64,
    /// The stretch of data at or behind the last place asked for; both the size when only a hole follows.
    data: (u64, u64),
    known: bool,
}

impl Version {
    pub(super) fn new(file: OwnedFd, size: u64) -> Self {
        Self { file, size, data: (0, 0), known: false }
    }

    /// The first stretch of data that ends behind `offset`.
    fn data(&mut self, offset: u64) -> Result<(u64, u64), Errno> {
        if !self.known || self.data.1 <= offset {
            self.data = next_data(self.file.as_fd(), offset, self.size)?.unwrap_or((u64::MAX, u64::MAX));
            self.known = true;
        }
        Ok((self.data.0.max(offset), self.data.1))
    }
}

/// What was found at the reader's place.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// These bytes of the window differ: offset in the file, range of [`Blocks::window`].
    Data(u64, std::ops::Range<usize>),
    /// The base has no data there, so what the target has was not read: offset, length.
    Unread(u64, usize),
    /// The target has a hole where the base has data.
    Hole(u64, u64),
    /// Nothing in what was looked at; ask again.
    Nothing,
    /// The end.
    End,
}

/// Compares a file with its base, or reads it whole where there is none.
#[derive(Debug)]
pub(super) struct Blocks {
    target: Version,
    base: Option<Version>,
    shared: Option<Shared<Extents>>,
    offset: u64,
    window: Vec<u8>,
    base_window: Vec<u8>,
    /// What of the window has not been compared yet: the offset in the window, and the bytes of base in it.
    rest: Option<(u64, usize, usize)>,
}

impl Blocks {
    /// Starts at `offset`. Buffers are handed on from file to file.
    pub(super) fn new(target: Version, base: Option<Version>, offset: u64, buffers: (Vec<u8>, Vec<u8>)) -> Self {
        let (window, base_window) = buffers;
        let asked = base.as_ref().filter(|_| target.size >= WORTH_ASKING);
        let shared = asked.and_then(|base| Shared::of(&target.file, &base.file));
        Self { target, base, shared, offset, window, base_window, rest: None }
    }

    /// Reads what both seem to share, too: of a file that is being written the kernel may tell extents of before.
    pub(super) fn unshared(mut self) -> Self {
        self.shared = None;
        self
    }

    pub(super) fn into_buffers(self) -> (Vec<u8>, Vec<u8>) {
        (self.window, self.base_window)
    }

    pub(super) fn window(&self) -> &[u8] {
        &self.window
    }

    /// Appends what was found unread.
    pub(super) fn read(&self, bytes: &mut Vec<u8>, offset: u64, length: usize) -> Result<(), Errno> {
        match append_from(self.target.file.as_fd(), bytes, length, offset)? {
            count if count < length => Err(Errno::STALE),
            _ => Ok(()),
        }
    }

    /// Looks at the next piece, of [`DATA_LIMIT`] at most.
    pub(super) fn next(&mut self) -> Result<Found, Errno> {
        if let Some((start, at, base)) = self.rest.take() {
            return Ok(self.compare(start, at, base));
        }
        if self.offset >= self.target.size {
            return Ok(Found::End);
        }
        if self.offset == 0
            && !self.target.known
            && self.target.size <= DATA_LIMIT as u64
            && let Some(found) = self.small()?
        {
            return Ok(found);
        }
        let (data_start, data_end) = self.target.data(self.offset)?;
        if data_start > self.offset {
            return self.hole(data_start.min(self.target.size));
        }
        // What lies behind the base's end in its last block is none of its bytes.
        let common = self.base.as_ref().map_or(0, |base| base.size.min(data_end));
        if self.offset < common
            && let Some(end) = self.shared.as_mut().and_then(|shared| shared.end_at(self.offset))
        {
            self.offset = end.min(common);
            return Ok(Found::Nothing);
        }
        // Windows lie on a fixed grid, so that a resumed comparison sees the same ones.
        let grid = (self.offset / DATA_LIMIT as u64 + 1) * DATA_LIMIT as u64;
        let end = grid.min(data_end).min(self.target.size);
        let start = self.offset;
        let length = (end - start) as usize;
        let Some(base) = self.base.as_mut().filter(|base| start < base.size) else {
            self.offset = end;
            return Ok(Found::Unread(start, length));
        };
        if base.data(start)?.0 >= end {
            self.offset = end;
            return Ok(Found::Unread(start, length));
        }
        self.window.resize(length, 0);
        if read_at(self.target.file.as_fd(), &mut self.window, start)? < length {
            // It is shorter than it was: somebody writes to a snapshot.
            return Err(Errno::STALE);
        }
        self.offset = end;
        let count = ((base.size - start).min(end - start)) as usize;
        self.base_window.resize(count, 0);
        let count = read_at(base.file.as_fd(), &mut self.base_window, start)?;
        Ok(self.compare(start, 0, count))
    }

    /// Returns how many bytes the rest of the file may have to be sent, without reading any: all data that lies elsewhere than
    /// the base's.
    pub(super) fn unread_bytes(&mut self) -> Result<u64, Errno> {
        let mut bytes = 0;
        while self.offset < self.target.size {
            let (data, end) = self.target.data(self.offset)?;
            self.offset = data;
            let end = end.min(self.target.size);
            let common = self.base.as_ref().map_or(0, |base| base.size.min(end));
            while self.offset < end {
                let is_common = self.offset < common;
                match self.shared.as_mut().filter(|_| is_common).and_then(|shared| shared.end_at(self.offset)) {
                    Some(shared) => self.offset = shared.min(common),
                    None => {
                        let next = end.min((self.offset / BLOCK as u64 + 1) * BLOCK as u64);
                        bytes += next - self.offset;
                        self.offset = next;
                    }
                }
            }
        }
        Ok(bytes)
    }

    /// Reads a file of one window without asking where its holes are. `None`: there may be some.
    fn small(&mut self) -> Result<Option<Found>, Errno> {
        let size = self.target.size as usize;
        self.window.resize(size, 0);
        if read_at(self.target.file.as_fd(), &mut self.window, 0)? < size {
            return Err(Errno::STALE);
        }
        if self.window.chunks(SMALLEST_BLOCK).any(|block| block.iter().all(|byte| *byte == 0)) {
            return Ok(None);
        }
        self.offset = self.target.size;
        let Some(base) = self.base.as_ref().filter(|base| base.size > 0) else {
            return Ok(Some(Found::Data(0, 0..size)));
        };
        // Where the base has a hole the target has none, so what is read there differs.
        self.base_window.resize(size.min(base.size as usize), 0);
        let count = read_at(base.file.as_fd(), &mut self.base_window, 0)?;
        Ok(Some(self.compare(0, 0, count)))
    }

    /// The target has a hole from here to `end`.
    fn hole(&mut self, end: u64) -> Result<Found, Errno> {
        let start = self.offset;
        self.offset = end;
        let Some(base) = &mut self.base else { return Ok(Found::Nothing) };
        let (data, _) = base.data(start)?;
        let end = end.min(base.size);
        Ok(if data < end { Found::Hole(data, end - data) } else { Found::Nothing })
    }

    /// Finds the next run of differing blocks in the window, from `at` on; `base` bytes of the base are there.
    fn compare(&mut self, start: u64, at: usize, base: usize) -> Found {
        let length = self.window.len();
        // Blocks lie on a fixed grid of the file, whatever the window's start.
        let next = |at: usize| {
            let place = start + at as u64;
            length.min(at + BLOCK - (place % BLOCK as u64) as usize)
        };
        let differs = |from: usize, to: usize| to > base || self.window[from..to] != self.base_window[from..to];
        let mut from = at;
        while from < length && !differs(from, next(from)) {
            from = next(from);
        }
        if from >= length {
            return Found::Nothing;
        }
        let mut to = next(from);
        while to < length && differs(to, next(to)) {
            to = next(to);
        }
        if to < length {
            self.rest = Some((start, to, base));
        }
        Found::Data(start + from as u64, from..to)
    }
}
