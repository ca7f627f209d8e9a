//! Bytes of regular files: where a file has data and where holes, and copying one file into another.

use std::{
    os::fd::BorrowedFd,
    sync::mpsc::{Receiver, SyncSender, sync_channel},
    thread::Scope,
};

use rustix::{
    fs::{FallocateFlags, SeekFrom},
    io::Errno,
};

/// How much is moved through memory at once.
const BUFFER: usize = 256 * 1024;

/// How much one copy_file_range(2) is asked to move, so that a kill does not wait for minutes.
const RANGE: usize = 64 * 1024 * 1024;

/// From this size on a file is hashed beside the thread that copies it: below, starting one costs more.
const HASHED_BESIDE: u64 = 4 * 1024 * 1024;

/// Returns the first stretch of data at or behind `offset` and below `size`, as start and end; `None` when only a hole
/// follows. A file system that knows no holes shows one stretch. Moves the file's position.
pub(crate) fn next_data(file: BorrowedFd<'_>, offset: u64, size: u64) -> Result<Option<(u64, u64)>, Errno> {
    if offset >= size {
        return Ok(None);
    }
    let start = match rustix::fs::seek(file, SeekFrom::Data(offset)) {
        Ok(start) => start,
        Err(Errno::NXIO) => return Ok(None),
        Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(Some((offset, size))),
        Err(error) => return Err(error),
    };
    if start >= size {
        return Ok(None);
    }
    let end = match rustix::fs::seek(file, SeekFrom::Hole(start)) {
        Ok(end) => end.min(size),
        // It shrank in between.
        Err(Errno::NXIO) => size,
        Err(error) => return Err(error),
    };
    Ok(Some((start, end)))
}

/// Tells whether a file of this size has no holes. Moves the file's position.
pub(crate) fn is_without_holes(file: BorrowedFd<'_>, size: u64) -> Result<bool, Errno> {
    Ok(size == 0 || next_data(file, 0, size)? == Some((0, size)))
}

/// Fills `buffer` from `offset` on as far as the file goes; returns how much that was.
pub(super) fn read_at(file: BorrowedFd<'_>, buffer: &mut [u8], offset: u64) -> Result<usize, Errno> {
    let mut done = 0;
    while done < buffer.len() {
        match rustix::io::pread(file, &mut buffer[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

/// Appends `length` bytes of a file, from `offset` on; fewer where the file ends before. Reads as much more as there is room for, so
/// that no room is filled with zeroes first, and lets go of it.
pub(super) fn append_from(
    file: BorrowedFd<'_>,
    bytes: &mut Vec<u8>,
    length: usize,
    offset: u64,
) -> Result<usize, Errno> {
    let start = bytes.len();
    bytes.reserve(length);
    while bytes.len() - start < length {
        let at = offset + (bytes.len() - start) as u64;
        match rustix::io::pread(file, rustix::buffer::spare_capacity(bytes), at) {
            Ok(0) => break,
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
    bytes.truncate(start + length);
    Ok(bytes.len() - start)
}

/// Writes all of `bytes` at `offset`.
pub(super) fn write_at(file: BorrowedFd<'_>, mut bytes: &[u8], mut offset: u64) -> Result<(), Errno> {
    while !bytes.is_empty() {
        match rustix::io::pwrite(file, bytes, offset) {
            Ok(0) => return Err(Errno::IO),
            Ok(count) => {
                bytes = &bytes[count..];
                offset += count as u64;
            }
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Makes a range of a file read as zeroes without growing it: a hole where the file system has them.
pub(super) fn punch(file: BorrowedFd<'_>, offset: u64, length: u64) -> Result<(), Errno> {
    loop {
        match rustix::fs::fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, length) {
            Err(Errno::INTR) => {}
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => break,
            other => return other,
        }
    }
    let zeroes = vec![0; BUFFER];
    let end = (offset + length).min(rustix::fs::fstat(file)?.st_size.unsigned_abs());
    let mut at = offset;
    while at < end {
        let count = (end - at).min(BUFFER as u64) as usize;
        write_at(file, &zeroes[..count], at)?;
        at += count as u64;
    }
    Ok(())
}

/// Copies all data of `from` into the empty file `to`, holes kept, `size` bytes long.
pub(super) fn copy_all(from: BorrowedFd<'_>, to: BorrowedFd<'_>, size: u64) -> Result<(), Errno> {
    rustix::fs::ftruncate(to, size)?;
    let mut offset = 0;
    while let Some((start, end)) = next_data(from, offset, size)? {
        copy_range(from, to, start, end)?;
        offset = end;
    }
    Ok(())
}

/// Copies as [`copy_all`] does and hashes what it writes. `None`: the file has holes (hashing a terabyte of nothing takes
/// its time) or shrank meanwhile.
pub(super) fn copy_and_hash(from: BorrowedFd<'_>, to: BorrowedFd<'_>, size: u64) -> Result<Option<[u8; 32]>, Errno> {
    if !is_without_holes(from, size)? {
        copy_all(from, to, size)?;
        return Ok(None);
    }
    rustix::fs::ftruncate(to, size)?;
    let mut hasher = blake3::Hasher::new();
    if size >= HASHED_BESIDE
        && let Some(digest) = std::thread::scope(|scope| {
            let beside = Beside::start(scope, &mut hasher).ok()?;
            Some(beside.copy(from, to, size))
        })
    {
        return digest.map(|whole| whole.then(|| *hasher.finalize().as_bytes()));
    }
    let whole = copy_pieces(from, to, size, |piece| {
        hasher.update(&piece);
        piece
    })?;
    Ok(whole.then(|| *hasher.finalize().as_bytes()))
}

/// Copies a file piece by piece. `each` sees what was written, and gives back a buffer for the next piece. `false`: the file
/// shrank meanwhile.
fn copy_pieces(
    from: BorrowedFd<'_>,
    to: BorrowedFd<'_>,
    size: u64,
    mut each: impl FnMut(Vec<u8>) -> Vec<u8>,
) -> Result<bool, Errno> {
    let mut buffer = Vec::new();
    let mut at = 0;
    while at < size {
        buffer.resize((size - at).min(BUFFER as u64) as usize, 0);
        let count = read_at(from, &mut buffer, at)?;
        if count == 0 {
            return Ok(false);
        }
        buffer.truncate(count);
        write_at(to, &buffer, at)?;
        at += count as u64;
        buffer = each(buffer);
    }
    Ok(true)
}

/// A thread that hashes what another copies.
struct Beside {
    written: SyncSender<Vec<u8>>,
    hashed: Receiver<Vec<u8>>,
}

impl Beside {
    /// Fails where no thread can be started.
    fn start<'scope>(scope: &'scope Scope<'scope, '_>, hasher: &'scope mut blake3::Hasher) -> std::io::Result<Self> {
        let (written, arriving) = sync_channel::<Vec<u8>>(1);
        // What does not fit is let go of, and another is made.
        let (give_back, hashed) = sync_channel(2);
        let run = move || {
            for piece in arriving {
                hasher.update(&piece);
                let _ = give_back.try_send(piece);
            }
        };
        std::thread::Builder::new().name("hash".to_owned()).spawn_scoped(scope, run)?;
        Ok(Self { written, hashed })
    }

    fn copy(self, from: BorrowedFd<'_>, to: BorrowedFd<'_>, size: u64) -> Result<bool, Errno> {
        copy_pieces(from, to, size, |piece| {
            // It takes pieces until it is told that there is none.
            let _ = self.written.send(piece);
            self.hashed.try_recv().unwrap_or_default()
        })
    }
}

fn copy_range(from: BorrowedFd<'_>, to: BorrowedFd<'_>, start: u64, end: u64) -> Result<(), Errno> {
    let mut at = start;
    while at < end {
        let (mut read, mut written) = (at, at);
        let count = (end - at).min(RANGE as u64) as usize;
        match rustix::fs::copy_file_range(from, Some(&mut read), to, Some(&mut written), count) {
            // The source ended: it shrank while it was read.
            Ok(0) => return Ok(()),
            Ok(count) => at += count as u64,
            Err(Errno::INTR | Errno::AGAIN) => {}
            Err(Errno::XDEV | Errno::INVAL | Errno::OPNOTSUPP | Errno::NOSYS | Errno::PERM) => break,
            Err(error) => return Err(error),
        }
    }
    let mut buffer = Vec::new();
    while at < end {
        buffer.resize((end - at).min(BUFFER as u64) as usize, 0);
        let count = read_at(from, &mut buffer, at)?;
        if count == 0 {
            return Ok(());
        }
        write_at(to, &buffer[..count], at)?;
        at += count as u64;
    }
    Ok(())
}

/// Whether files of a tree can share extents with those of another; learned by trying.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reflinks {
    Untried,
    Refused,
    Work,
}

impl Reflinks {
    /// Makes the empty file `to` share all extents of `from`. `false`: nothing was done, copy instead.
    pub(super) fn share(&mut self, from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> Result<bool, Errno> {
        if *self == Self::Refused {
            return Ok(false);
        }
        match rustix::fs::ioctl_ficlone(to, from) {
            Ok(()) => {
                *self = Self::Work;
                Ok(true)
            }
            Err(Errno::OPNOTSUPP | Errno::NOTTY | Errno::XDEV | Errno::NOSYS) => {
                *self = Self::Refused;
                Ok(false)
            }
            // For this file only: a swap file, a file without checksums, an odd block size (ioctl_ficlone(2)).
            Err(Errno::INVAL | Errno::TXTBSY | Errno::PERM | Errno::ISDIR) => Ok(false),
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::{fs::File, io::Write, os::fd::AsFd};

    use super::*;

    #[test]
    fn what_is_copied_has_the_hash_that_is_told_whatever_its_size() {
        let dir = tempfile::tempdir().unwrap();
        let sizes = [0, 1, BUFFER, BUFFER + 1, HASHED_BESIDE as usize - 1, HASHED_BESIDE as usize, 9 * 1024 * 1024 + 7];
        for size in sizes {
            let bytes: Vec<u8> = (0..size).map(|at| (at / 251 + at % 251) as u8).collect();
            let (source, copy) = (dir.path().join("source"), dir.path().join("copy"));
            File::create(&source).unwrap().write_all(&bytes).unwrap();
            let (from, to) = (File::open(&source).unwrap(), File::create(&copy).unwrap());
            let digest = copy_and_hash(from.as_fd(), to.as_fd(), size as u64).unwrap();
            assert_eq!(digest, Some(*blake3::hash(&bytes).as_bytes()), "{size} bytes");
            assert!(std::fs::read(&copy).unwrap() == bytes, "{size} bytes");
        }
    }

    #[test]
    fn a_file_that_shrinks_while_it_is_copied_has_no_hash() {
        let dir = tempfile::tempdir().unwrap();
        for there in [1, HASHED_BESIDE as usize + 1] {
            let mut source = tempfile::tempfile().unwrap();
            source.write_all(&vec![7; there]).unwrap();
            let to = File::create(dir.path().join("copy")).unwrap();
            let mut seen = 0;
            let whole = copy_pieces(source.as_fd(), to.as_fd(), there as u64 + 1, |piece| {
                seen += piece.len();
                piece
            });
            assert_eq!((whole, seen), (Ok(false), there));
        }
    }
}
