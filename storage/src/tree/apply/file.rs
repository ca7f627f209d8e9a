//! Regular files of a stream: opening them for what arrives, writing it, and giving them what they have besides data.

use std::os::fd::{AsFd as _, OwnedFd};

use rustix::{
    fs::{AtFlags, FileType, Mode, OFlags, StatxFlags},
    io::Errno,
};

use super::{
    Applier, Sharing,
    tail::{Becomes, Before, Closed, Step},
    waiting::Waiting,
};
use crate::{
    error::{Error, ErrorKind, Result},
    tree::{
        builder::Origin,
        data,
        entry::{Metadata, Status},
        path::TreePath,
        root::{magic_path, open_entry},
        wire::{Basis, Rule},
    },
};

pub(super) const STATED_GAP: Rule = "the digest of its contents is stated, and there is a gap in its data";

/// The file whose data is arriving.
pub(super) struct OpenFile {
    fd: OwnedFd,
    path: TreePath,
    metadata: Metadata,
    origin: Origin,
    size: u64,
    /// The end of what was written, which the next piece must not lie before.
    written: u64,
    /// The length of the file now.
    length: u64,
    /// How much of it, from its beginning on, arrived as data without a gap; `None` where what is before is not of the stream.
    whole: Option<u64>,
    contents: Contents,
}

/// Where the digest of a file's contents is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Contents {
    /// It may be stated yet: the file is made of data alone, and none has arrived.
    Open,
    /// Stated in a record.
    Stated([u8; 32]),
    /// In the digest of the stream, as far as data arrives.
    Counted,
}

impl OpenFile {
    fn name(&self) -> &[u8] {
        self.path.name()
    }
}

impl Applier {
    pub(super) fn open_file(
        &mut self,
        path: TreePath,
        metadata: Metadata,
        size: u64,
        basis: Basis,
        from: Option<u64>,
    ) -> Result<()> {
        let name = path.name();
        let is_resumed = self.resume.as_ref().is_some_and(|resume| resume.path == path && resume.inside == from);
        let (fd, origin) = match (from, basis) {
            (Some(_), _) if !is_resumed => return Err(self.corrupt_at(name, "it goes on where it was not left")),
            (Some(from), _) => (self.continue_file(&path, name, from)?, Origin::Existing),
            (None, Basis::Fresh) => (self.builder.create_file(name, &metadata)?, Origin::Fresh),
            (None, Basis::Existing) => self.take_base(&path, name, &metadata)?,
        };
        let is_new = (from, basis) == (None, Basis::Fresh);
        let length = if is_new { 0 } else { self.length(&fd, name)? };
        let written = from.unwrap_or(0);
        let whole = is_new.then_some(0);
        let contents = if basis == Basis::Fresh { Contents::Open } else { Contents::Counted };
        let mut file = OpenFile { fd, path, metadata, origin, size, written, length, whole, contents };
        if file.length > size || (from.is_none() && file.length > 0) {
            // To its size at once, so that what the base has behind it reads as a hole when it grows again.
            self.resize(&mut file)?;
        }
        self.advance(&file.path, Some(written));
        self.file = Some(file);
        Ok(())
    }

    /// Opens a file whose first part arrived before the break. Other names that it may have by now were made by an
    /// earlier applier, behind the point; the base's own inode it must not be.
    fn continue_file(&mut self, path: &TreePath, name: &[u8], from: u64) -> Result<OwnedFd> {
        let why = match self.builder.status(name)?.filter(|is| is.file_type == FileType::RegularFile) {
            None => "the file that was half done is not there",
            Some(is) if is.stat.size < from => "the file that was half done is shorter",
            Some(is) if self.sharing == Sharing::HardLinked && self.is_of_base(path, &is)? => {
                "the file that was half done is the base's own"
            }
            Some(_) => return self.builder.open_file(name),
        };
        Err(Error::new("resume delta at", self.show(name), ErrorKind::ResumeStale(why.to_owned())))
    }

    fn is_of_base(&self, path: &TreePath, is: &Status) -> Result<bool> {
        let Some(base) = &self.base else { return Ok(false) };
        let Ok(parent) = base.open_parent(path) else { return Ok(false) };
        match rustix::fs::statx(&parent, path.name(), AtFlags::SYMLINK_NOFOLLOW, StatxFlags::BASIC_STATS) {
            Ok(found) => Ok(Status::from(found).stat.ino == is.stat.ino),
            Err(Errno::NOENT) => Ok(false),
            Err(error) => Err(Error::io("read", base.show(path), error)),
        }
    }

    /// Opens a file that holds what the base has at the path and that nothing else shares.
    fn take_base(&mut self, path: &TreePath, name: &[u8], metadata: &Metadata) -> Result<(OwnedFd, Origin)> {
        let is = self.builder.status(name)?.filter(|is| is.file_type == FileType::RegularFile);
        if self.sharing == Sharing::Exclusive && is.is_some_and(|is| is.stat.nlink == 1) {
            return Ok((self.builder.open_file(name)?, Origin::Existing));
        }
        if let Some(base) = &self.base {
            let from = match base.open_beneath(path, OFlags::RDONLY | OFlags::NONBLOCK) {
                Ok(from) => from,
                Err(Error { kind: ErrorKind::Io(_), .. }) => return Err(self.no_base(name)),
                Err(error) => return Err(error),
            };
            let found = rustix::fs::statx(&from, "", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS);
            let found = found.map(Status::from).map_err(|error| self.builder.error("read", name, error))?;
            if found.file_type != FileType::RegularFile {
                return Err(self.no_base(name));
            }
            let to = self.builder.create_file(name, metadata)?;
            self.copy(&from, &to, found.stat.size, name)?;
            return Ok((to, Origin::Fresh));
        }
        let Some(is) = is.filter(|_| self.sharing == Sharing::Exclusive) else { return Err(self.no_base(name)) };
        // Copied without a name, so that a half copy is never taken for the base's file after a break.
        let top = self.builder.top()?;
        let from = open_entry(top, name, OFlags::RDONLY | OFlags::NONBLOCK);
        let mode = Mode::RUSR | Mode::WUSR;
        let to = rustix::fs::openat(top, ".", OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC, mode);
        let (from, to) =
            from.and_then(|from| Ok((from, to?))).map_err(|error| self.builder.error("copy", name, error))?;
        self.copy(&from, &to, is.stat.size, name)?;
        self.builder.clear(name)?;
        let unnamed = magic_path(to.as_fd(), b"");
        let unnamed = unnamed.strip_suffix(b"/.").unwrap_or(&unnamed);
        let named = rustix::fs::linkat(rustix::fs::CWD, unnamed, self.builder.top()?, name, AtFlags::SYMLINK_FOLLOW);
        named.map_err(|error| self.builder.error("copy", name, error))?;
        Ok((to, Origin::Fresh))
    }

    fn no_base(&self, name: &[u8]) -> Error {
        self.corrupt_at(name, "it builds on a file that the base does not have")
    }

    fn copy(&mut self, from: &OwnedFd, to: &OwnedFd, size: u64, name: &[u8]) -> Result<()> {
        let shared = if size == 0 { Ok(true) } else { self.reflinks.share(from.as_fd(), to.as_fd()) };
        let copied =
            shared.and_then(|shared| if shared { Ok(()) } else { data::copy_all(from.as_fd(), to.as_fd(), size) });
        copied.map_err(|error| self.builder.error("copy", name, error))
    }

    pub(super) fn data(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        let mut file = self.piece(offset, bytes.len() as u64)?;
        data::write_at(file.fd.as_fd(), bytes, offset)
            .map_err(|error| self.builder.error("write", file.name(), error))?;
        if file.whole == Some(offset) {
            file.whole = Some(offset + bytes.len() as u64);
        }
        file.written = offset + bytes.len() as u64;
        file.length = file.length.max(file.written);
        self.wrote(file);
        Ok(())
    }

    pub(super) fn hole(&mut self, offset: u64, length: u64) -> Result<()> {
        let mut file = self.piece(offset, length)?;
        if matches!(file.contents, Contents::Stated(_)) {
            return Err(self.corrupt_at(file.name(), STATED_GAP));
        }
        data::punch(file.fd.as_fd(), offset, length)
            .map_err(|error| self.builder.error("write", file.name(), error))?;
        file.written = offset + length;
        self.wrote(file);
        Ok(())
    }

    /// Takes the open file out, if a piece may be written to it there.
    fn piece(&mut self, offset: u64, length: u64) -> Result<OpenFile> {
        let Some(mut file) = self.file.take() else { return Err(self.corrupt("data comes without a file")) };
        if offset < file.written {
            return Err(self.corrupt_at(file.name(), "its data is out of order"));
        }
        if offset.checked_add(length).is_none_or(|end| end > file.size) {
            return Err(self.corrupt_at(file.name(), "its data lies behind its end"));
        }
        match file.contents {
            Contents::Open => file.contents = Contents::Counted,
            Contents::Stated(_) if offset != file.written => return Err(self.corrupt_at(file.name(), STATED_GAP)),
            Contents::Stated(_) | Contents::Counted => {}
        }
        Ok(file)
    }

    /// Puts the open file back.
    fn wrote(&mut self, file: OpenFile) {
        if let Some(position) = &mut self.position
            && position.path == file.path
        {
            position.inside = Some(file.written);
        }
        self.file = Some(file);
    }

    /// Ends the open file. What needs its directory is done here; the rest behind.
    pub(super) fn close_file(&mut self) -> Result<()> {
        let Some(mut file) = self.file.take() else { return Ok(()) };
        let is_whole = file.whole == Some(file.size);
        let stated = match file.contents {
            Contents::Stated(_) if !is_whole => return Err(self.corrupt_at(file.name(), STATED_GAP)),
            Contents::Stated(digest) => Some(digest),
            Contents::Open | Contents::Counted => None,
        };
        self.resize(&mut file)?;
        self.advance(&file.path, None);
        let OpenFile { fd, path, metadata, origin, .. } = file;
        let becomes = if origin == Origin::Fresh && metadata.xattrs.is_empty() {
            Becomes::Plain(Waiting::new(fd), metadata)
        } else {
            self.builder.finish_file(&fd, path.name(), &metadata, origin)?;
            Becomes::Finished(self.notes.then(|| self.builder.entry_of(&fd, path.clone())).transpose()?)
        };
        self.tail.add(Step::Closed(Box::new(Closed { path, becomes, stated, is_whole })));
        Ok(())
    }

    /// Takes in what all of the open file will be. What of it arrived before a break is read again.
    pub(super) fn contents(&mut self, digest: [u8; 32]) -> Result<()> {
        let Some(mut file) = self.file.take() else {
            return Err(self.corrupt("a digest of contents comes without a file"));
        };
        if file.contents != Contents::Open {
            return Err(self.corrupt_at(file.name(), "the digest of its contents comes twice, or builds on other data"));
        }
        let before = if file.written > 0 { Some(self.before(&file)?) } else { None };
        self.tail.add(Step::Stated(before));
        file.whole = Some(file.written);
        file.contents = Contents::Stated(digest);
        self.file = Some(file);
        Ok(())
    }

    fn before(&self, file: &OpenFile) -> Result<Before> {
        let fd = rustix::io::fcntl_dupfd_cloexec(&file.fd, 0);
        let fd = fd.map_err(|error| self.builder.error("open", file.name(), error))?;
        Ok(Before { file: fd, path: file.path.clone(), length: file.written })
    }

    fn resize(&self, file: &mut OpenFile) -> Result<()> {
        if file.length != file.size {
            rustix::fs::ftruncate(&file.fd, file.size)
                .map_err(|error| self.builder.error("write", file.name(), error))?;
            file.length = file.size;
        }
        Ok(())
    }

    fn length(&self, fd: &OwnedFd, name: &[u8]) -> Result<u64> {
        let found = rustix::fs::fstat(fd).map_err(|error: Errno| self.builder.error("read", name, error))?;
        Ok(found.st_size.unsigned_abs())
    }
}

/// Compares a file that has all its data with the digest that was stated.
pub(super) fn verify_contents(path: &TreePath, digest: [u8; 32], stated: [u8; 32]) -> Result<()> {
    if digest == stated {
        return Ok(());
    }
    let rule = "its contents are not those that its snapshot was made with: they were damaged at the sender \
                (`flocker verify --checksum` there tells), or on their way";
    Err(Error::new("apply delta at", path, ErrorKind::Corrupt(rule.to_owned())))
}
