//! Bytes of regular files: where a file has data and where holes, and copying one file into another.

use std::os::fd::BorrowedFd;

use rustix::{
    fs::{FallocateFlags, SeekFrom},
    io::Errno,
};

/// How much is moved through memory at once.
const BUFFER: usize = 256 * 1024;

/// How much one copy_file_range(2) is asked to move, so that a kill does not wait for minutes.
const RANGE: usize = 64 * 1024 * 1024;

/// Returns the first stretch of data at or behind `offset` and below `size`, as start and end; `None` when only a hole
/// follows. A file system that knows no holes shows one stretch.
pub(super) fn next_data(file: BorrowedFd<'_>, offset: u64, size: u64) -> Result<Option<(u64, u64)>, Errno> {
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
    if size > 0 && next_data(from, 0, size)? != Some((0, size)) {
        copy_all(from, to, size)?;
        return Ok(None);
    }
    rustix::fs::ftruncate(to, size)?;
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; BUFFER.min(size as usize)];
    let mut at = 0;
    while at < size {
        let room = buffer.len().min((size - at) as usize);
        let count = read_at(from, &mut buffer[..room], at)?;
        if count == 0 {
            return Ok(None);
        }
        write_at(to, &buffer[..count], at)?;
        hasher.update(&buffer[..count]);
        at += count as u64;
    }
    Ok(Some(*hasher.finalize().as_bytes()))
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
