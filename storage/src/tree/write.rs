//! Writes `flocker-tree/1`: walks base and target side by side and says what turns one into the other.
//!
//! Memory: two walks (names of the directories on the way), the metadata of the directories on the way, a window of
//! 256 KiB of each version of the current file, the output buffer, and one small value per changed inode with several
//! names until all of them were met.

use std::{
    cmp::Ordering,
    collections::HashMap,
    os::fd::AsFd as _,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering as Memory},
    },
};

use bytes::Bytes;
use rustix::{
    fs::{FileType, OFlags},
    io::Errno,
};

use super::{
    blocks::{Blocks, Found, Version},
    data::is_without_holes,
    entry::{Entry, EntryKind, Metadata, Stat},
    output::Output,
    path::TreePath,
    root::Root,
    target::{Ahead, Target},
    walk::{Attributes, Links, Motion, Walk},
    wire::{Basis, DATA_LIMIT, MAGIC, NodeKind, Place, Position, Raw, Record},
};
use crate::{
    delta::{Compare, ResumePoint},
    driver::Finding,
    error::{Error, ErrorKind, Result},
};

/// How much stream lies between two checkpoints: a broken transfer sends again what came since the last but one, at most. Each costs
/// the receiver one syncfs(2), beside its work.
pub const CHECKPOINT_INTERVAL: u64 = 32 * 1024 * 1024;

/// One of the two trees.
#[derive(Debug)]
pub struct Side {
    /// The tree.
    pub root: Root,
    /// How its hard links are known.
    pub links: Links,
}

/// Totals of a tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Summary {
    /// Its entries, the root included.
    pub entries: u64,
    /// The sum of the sizes of its regular files, each inode once.
    pub logical_bytes: u64,
}

/// Produces a delta as chunks. The same two trees give the same bytes. After an error it must be dropped.
#[derive(Debug)]
pub struct DeltaWriter {
    base: Option<Ahead<Walk>>,
    target: Ahead<Box<dyn Target>>,
    compare: Compare,
    /// Where the stream starts; `None` once that was passed.
    resume: Option<Position>,
    out: Output,
    /// The target's directories from the root to where the walk stands.
    directories: Vec<Announced>,
    /// First names of inodes that were sent: their further names are sent too. With the number still to come.
    sent: HashMap<TreePath, u32>,
    file: Option<FileJob>,
    buffers: (Vec<u8>, Vec<u8>),
    summary: Summary,
    stop: Arc<AtomicBool>,
    ended: bool,
    /// What files would have to be read for, where only the length of the stream is asked for.
    unread_bytes: Option<u64>,
}

#[derive(Debug)]
struct Announced {
    name: Vec<u8>,
    metadata: Metadata,
    sent: bool,
}

/// A file being compared and sent.
#[derive(Debug)]
struct FileJob {
    path: TreePath,
    blocks: Blocks,
    size: u64,
    basis: Basis,
    from: Option<u64>,
    /// What the record before the data holds; taken when it is sent.
    metadata: Option<Metadata>,
    nlink: u32,
    /// The digest of its contents, where that is known.
    digest: Option<[u8; 32]>,
}

impl FileJob {
    /// Returns what goes before the file's data, once.
    fn record(&mut self) -> Option<Record<'_>> {
        let metadata = self.metadata.take()?;
        let (size, basis, from) = (self.size, self.basis, self.from);
        Some(Record::File { at: place(&self.path), metadata, size, basis, from })
    }

    /// Returns the digest of a piece that is all of the file, where it is known.
    fn digest_of(&self, length: usize) -> Option<[u8; 32]> {
        self.digest.filter(|_| length as u64 == self.size)
    }

    fn error(&self, error: Errno) -> Error {
        if error != Errno::STALE {
            return Error::io("read", &self.path, error);
        }
        let what = "it became shorter while it was read".to_owned();
        Error::new("read", &self.path, ErrorKind::Tampered { path: self.path.as_path().to_owned(), what })
    }
}

impl DeltaWriter {
    /// Starts a delta from `base` (nothing where there is none) to `target`, going on at `resume`.
    pub fn new(base: Option<Side>, target: Side, compare: Compare, resume: Option<&ResumePoint>) -> Result<Self> {
        let shown = target.root.path().display().to_string();
        let walk = walk(target);
        // Without a base all files are sent.
        let walk = if base.is_none() { walk.opening() } else { walk };
        Self::to(base, Box::new(walk), shown, compare, resume)
    }

    /// Starts a delta to any tree; `shown` names it in messages.
    pub(super) fn to(
        base: Option<Side>,
        target: Box<dyn Target>,
        shown: String,
        compare: Compare,
        resume: Option<&ResumePoint>,
    ) -> Result<Self> {
        let resume = resume.map(Position::from_point).transpose()?;
        let base = base.map(|base| Ahead::new(base.root.path().display().to_string(), walk(base)));
        let mut writer = Self {
            base: base.transpose()?,
            target: Ahead::new(shown, target)?,
            compare,
            resume: resume.clone(),
            out: Output::new(),
            directories: Vec::new(),
            sent: HashMap::new(),
            file: None,
            buffers: Default::default(),
            summary: Summary::default(),
            stop: Arc::default(),
            ended: false,
            unread_bytes: None,
        };
        writer.out.put(&Record::Start { magic: MAGIC, resume })?;
        Ok(writer)
    }

    /// Sets how many bytes lie between two checkpoints; [`CHECKPOINT_INTERVAL`] otherwise.
    #[must_use]
    pub fn checkpoint_every(mut self, bytes: u64) -> Self {
        self.out.checkpoint_every(bytes);
        self
    }

    /// Returns the flag that makes a call in another thread end early, with an error.
    pub fn stopper(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.stop)
    }

    /// Returns the next chunk: [`CHUNK_LIMIT`](crate::delta::CHUNK_LIMIT) at most, never empty, `None` at the end.
    pub fn next_chunk(&mut self) -> Result<Option<Bytes>> {
        while !self.out.has_chunk() && !self.ended {
            self.give_way()?;
            self.step()?;
            if !self.ended {
                self.out.checkpoint_if_due()?;
            }
        }
        Ok(self.out.take_chunk())
    }

    /// Walks to the end without reading a file, and returns how many bytes the stream has at most, but for the heads of its
    /// records. What the file system says of extents that both versions share is taken off.
    pub fn estimate(mut self) -> Result<u64> {
        self.unread_bytes = Some(0);
        let mut bytes = 0;
        while !self.ended {
            self.give_way()?;
            self.step()?;
            bytes += self.out.forget() as u64;
        }
        Ok(bytes + self.unread_bytes.unwrap_or(0))
    }

    /// Returns the target's totals; complete once the last chunk was returned.
    pub fn summary(&self) -> Summary {
        self.summary
    }

    /// Returns what was left out of the target.
    pub fn take_findings(&mut self) -> Vec<Finding> {
        self.target.walk.take_findings()
    }

    fn give_way(&self) -> Result<()> {
        if self.stop.load(Memory::Relaxed) {
            let stopped = std::io::Error::from(std::io::ErrorKind::Interrupted);
            return Err(Error::io("read delta of", self.target.walk_root(), stopped));
        }
        Ok(())
    }

    /// Does a bounded piece of work.
    fn step(&mut self) -> Result<()> {
        if self.file.is_some() {
            return self.step_file();
        }
        let order = match (self.base.as_ref().and_then(|base| base.next.as_ref()), &self.target.next) {
            (None, None) => return self.end(),
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (Some(base), Some(target)) => base.path.cmp(&target.path),
        };
        match order {
            Ordering::Less => self.removed(),
            Ordering::Equal => {
                // The base's walk stays at this entry until it was compared.
                let base = self.base.as_mut().and_then(|base| base.next.take());
                self.present(base)?;
                self.advance(Ordering::Equal)
            }
            Ordering::Greater => {
                self.present(None)?;
                self.advance(Ordering::Greater)
            }
        }
    }

    fn advance(&mut self, order: Ordering) -> Result<()> {
        if order == Ordering::Equal
            && let Some(base) = &mut self.base
        {
            base.advance()?;
        }
        self.target.advance()
    }

    fn removed(&mut self) -> Result<()> {
        let Some(base) = &mut self.base else { return Ok(()) };
        let Some(entry) = base.next.take() else { return Ok(()) };
        base.walk.skip_contents();
        base.advance()?;
        if self.passed(&entry.path) {
            return Ok(());
        }
        let level = entry.path.level();
        self.directories.truncate(level);
        self.announce()?;
        self.out.put(&Record::Remove { at: place(&entry.path) })
    }

    fn end(&mut self) -> Result<()> {
        if let Some(Position { inside: Some(_), path }) = &self.resume {
            return Err(stale(path, "the file is not there"));
        }
        self.out.end(self.summary)?;
        self.ended = true;
        Ok(())
    }

    /// Tells whether the receiver has this path already; forgets the resume point once it was passed.
    fn passed(&mut self, path: &TreePath) -> bool {
        let Some(resume) = &self.resume else { return false };
        match path.cmp(&resume.path) {
            Ordering::Less => true,
            Ordering::Equal => resume.inside.is_none(),
            Ordering::Greater => {
                if resume.inside.is_none() {
                    self.resume = None;
                }
                false
            }
        }
    }

    /// Compares the target's next entry with the base's of the same path, and sends it where they differ.
    fn present(&mut self, base: Option<Entry>) -> Result<()> {
        let Some(mut target) = self.target.next.take() else { return Ok(()) };
        self.summary.entries += 1;
        if let EntryKind::File { size } = target.kind {
            self.summary.logical_bytes += size;
        }
        self.directories.truncate(target.path.level());
        if base.as_ref().is_some_and(|base| base.kind == EntryKind::Directory && target.kind != EntryKind::Directory)
            && let Some(base) = &mut self.base
        {
            base.walk.skip_contents();
        }
        if target.kind == EntryKind::Directory {
            return self.directory(base, target);
        }
        if self.passed(&target.path) {
            return self.skip(base, &target);
        }
        if let Some(Position { path, inside: Some(_) }) = &self.resume
            && *path < target.path
        {
            return Err(stale(path, "the file is not there"));
        }
        match &target.kind {
            EntryKind::HardLink { to } => {
                let to = to.clone();
                let resent = self.met(&to);
                if resent || base.as_ref().is_none_or(|base| base.kind != target.kind) {
                    self.announce()?;
                    self.out.put(&Record::HardLink { at: place(&target.path), to })?;
                }
                Ok(())
            }
            EntryKind::File { .. } => self.start_file(base, target),
            kind => {
                if base.as_ref().is_some_and(|base| self.is_unchanged(base, &target)) {
                    return Ok(());
                }
                let kind = kind.clone();
                self.target.walk.load_attributes(&mut target)?;
                if let Some(mut base) = base.filter(|base| base.kind == kind) {
                    self.load_base(&mut base)?;
                    if base.has_metadata_of(&target) {
                        return Ok(());
                    }
                }
                let Some(kind) = NodeKind::of(&kind) else { return Ok(()) };
                self.announce()?;
                self.mark_sent(&target.path, target.stat.nlink);
                let metadata = Metadata::from(&target);
                self.out.put(&Record::Node { at: place(&target.path), metadata, kind })
            }
        }
    }

    fn directory(&mut self, base: Option<Entry>, mut target: Entry) -> Result<()> {
        self.target.walk.load_attributes(&mut target)?;
        let name = target.path.name().to_vec();
        self.directories.push(Announced { name, metadata: Metadata::from(&target), sent: false });
        if let Some(resume) = &self.resume
            && resume.path.is_within(&target.path)
        {
            // The receiver holds its metadata back until it is left, and does not keep that over a break.
            return self.announce();
        }
        if self.passed(&target.path) {
            return Ok(());
        }
        match base {
            Some(mut base) if base.kind == EntryKind::Directory => {
                self.load_base(&mut base)?;
                if base.has_metadata_of(&target) { Ok(()) } else { self.announce() }
            }
            _ => self.announce(),
        }
    }

    /// An entry before the resume point: notes what later entries depend on.
    fn skip(&mut self, base: Option<Entry>, target: &Entry) -> Result<()> {
        if let EntryKind::HardLink { to } = &target.kind {
            self.met(to);
        } else if base.is_none_or(|base| !self.is_unchanged(&base, target)) {
            // Whether it was sent is not known without reading; sending its other names again does no harm.
            self.mark_sent(&target.path, target.stat.nlink);
        }
        Ok(())
    }

    fn start_file(&mut self, base: Option<Entry>, mut target: Entry) -> Result<()> {
        let from = self.resume.take_if(|resume| resume.path == target.path).and_then(|resume| resume.inside);
        if from.is_none() && base.as_ref().is_some_and(|base| self.is_unchanged(base, &target)) {
            return Ok(());
        }
        let size = target.stat.size;
        if from.is_some_and(|from| from > size) {
            return Err(stale(&target.path, "the file is shorter"));
        }
        self.target.walk.load_attributes(&mut target)?;
        // A file that was a further name and is not any more needs an inode of its own, so it is always sent.
        let mut send = from.is_some();
        let mut same_contents = false;
        let mut old = None;
        let is_file = self.base.as_ref().is_some_and(|base| base.walk.last_type() == FileType::RegularFile);
        if let (Some(mut entry), true) = (base, is_file) {
            self.load_base(&mut entry)?;
            send |= !matches!(entry.kind, EntryKind::File { .. });
            send |= !entry.has_metadata_of(&target) || entry.stat.size != size;
            same_contents = entry.stat.size == size && self.has_equal_digest();
            if let Some(base) = &mut self.base {
                old = Some(Version::new(base.walk.open_last(OFlags::RDONLY)?, entry.stat.size));
            }
        }
        let basis = if old.is_some() { Basis::Existing } else { Basis::Fresh };
        send |= basis == Basis::Fresh;
        let file = Version::new(self.target.walk.open_last()?, size);
        advise(&file);
        let digest = self.recorded_digest(&target).filter(|_| basis == Basis::Fresh);
        let stated = if digest.is_some() && is_worth_stating(&file, &target.path)? { digest } else { None };
        let start = if same_contents { size } else { from.unwrap_or(0) };
        let job = FileJob {
            blocks: Blocks::new(file, old, start, std::mem::take(&mut self.buffers)),
            size,
            basis,
            from,
            metadata: Some(Metadata::from(&target)),
            nlink: target.stat.nlink,
            digest,
            path: target.path,
        };
        if send {
            self.announce()?;
        }
        let job = self.file.insert(job);
        if send {
            let (path, nlink) = (job.path.clone(), job.nlink);
            if let Some(record) = job.record() {
                self.out.put(&record)?;
            }
            if let Some(digest) = stated {
                self.out.put(&Record::Contents { digest })?;
            }
            self.mark_sent(&path, nlink);
        }
        Ok(())
    }

    /// Returns the digest that the inventory has of a file's contents.
    fn recorded_digest(&self, target: &Entry) -> Option<[u8; 32]> {
        let of = |stat: &Stat| (stat.ino, stat.size, stat.mtime);
        let record = self.target.walk.recorded().filter(|record| of(&record.entry.stat) == of(&target.stat));
        record.and_then(|record| record.digest)
    }

    /// Looks at one piece of the current file.
    fn step_file(&mut self) -> Result<()> {
        let Some(mut job) = self.file.take() else { return Ok(()) };
        if let Some(bytes) = &mut self.unread_bytes {
            *bytes += job.blocks.unread_bytes().map_err(|error| Error::io("read", &job.path, error))?;
            self.buffers = job.blocks.into_buffers();
            return Ok(());
        }
        let found = job.blocks.next().map_err(|error| job.error(error))?;
        let is_different = matches!(found, Found::Data(..) | Found::Unread(..) | Found::Hole(..));
        if is_different && job.metadata.is_some() {
            self.announce()?;
            if let Some(record) = job.record() {
                self.out.put(&record)?;
            }
            self.mark_sent(&job.path, job.nlink);
        }
        match found {
            Found::Data(offset, range) => {
                let digest = job.digest_of(range.len());
                self.out.put_known(&Record::Data { offset, bytes: Raw(&job.blocks.window()[range]) }, digest)?;
            }
            Found::Unread(offset, length) => self.out.put_data(offset, length, job.digest_of(length), |bytes| {
                job.blocks.read(bytes, offset, length).map_err(|error| job.error(error))
            })?,
            Found::Hole(offset, length) => self.out.put(&Record::Hole { offset, length })?,
            Found::Nothing => {}
            Found::End => {
                self.buffers = job.blocks.into_buffers();
                return Ok(());
            }
        }
        self.file = Some(job);
        Ok(())
    }

    /// Tells, from what the file systems and inventories say, that nothing about an entry changed.
    fn is_unchanged(&self, base: &Entry, target: &Entry) -> bool {
        if self.compare == Compare::Contents
            || base.kind != target.kind
            || (base.mode, base.uid, base.gid, base.mtime) != (target.mode, target.uid, target.gid, target.mtime)
        {
            return false;
        }
        if target.stat.is_unchanged_since(&base.stat) {
            return true;
        }
        let base = self.base.as_ref().and_then(|base| base.walk.recorded());
        let origins = (base.and_then(|base| base.origin), self.target.walk.recorded().and_then(|target| target.origin));
        matches!(origins, (Some(base), Some(target)) if target.is_unchanged_since(&base))
    }

    /// Tells whether both inventories hold the same digest for the entries at hand.
    fn has_equal_digest(&self) -> bool {
        let base = self.base.as_ref().and_then(|base| base.walk.recorded()).and_then(|base| base.digest);
        let target = self.target.walk.recorded().and_then(|target| target.digest);
        self.compare == Compare::Metadata && base.is_some() && base == target
    }

    fn load_base(&mut self, entry: &mut Entry) -> Result<()> {
        self.base.as_mut().map_or(Ok(()), |base| base.walk.load_attributes(entry))
    }

    /// Remembers that an inode was sent, while names of it are to come.
    fn mark_sent(&mut self, path: &TreePath, nlink: u32) {
        if nlink > 1 {
            self.sent.insert(path.clone(), nlink - 1);
        }
    }

    /// Meets a further name of an inode; tells whether the inode was sent.
    fn met(&mut self, first: &TreePath) -> bool {
        let Some(left) = self.sent.get_mut(first) else { return false };
        *left -= 1;
        if *left == 0 {
            self.sent.remove(first);
        }
        true
    }

    /// Sends the directories on the way that were not sent yet.
    fn announce(&mut self) -> Result<()> {
        for (level, directory) in self.directories.iter_mut().enumerate() {
            if !directory.sent {
                directory.sent = true;
                let at = Place { level: level as u32, name: Raw(&directory.name) };
                self.out.put(&Record::Directory { at, metadata: directory.metadata.clone() })?;
            }
        }
        Ok(())
    }
}

fn walk(side: Side) -> Walk {
    Walk::with(side.root, side.links, Motion::Still, Attributes::OnDemand)
}

fn place(path: &TreePath) -> Place<'_> {
    Place { level: path.level() as u32, name: Raw(path.name()) }
}

fn stale(path: &TreePath, why: &str) -> Error {
    Error::new("resume delta at", path, ErrorKind::ResumeStale(why.to_owned()))
}

/// Tells whether a file needs several records, and all of it is data.
fn is_worth_stating(version: &Version, path: &TreePath) -> Result<bool> {
    if version.size <= DATA_LIMIT as u64 {
        return Ok(false);
    }
    is_without_holes(version.file.as_fd(), version.size).map_err(|error| Error::io("read", path, error))
}

/// Tells the kernel that a large file is read from front to back.
fn advise(version: &Version) {
    const LARGE: u64 = 1024 * 1024;
    if version.size >= LARGE {
        let _ = rustix::fs::fadvise(version.file.as_fd(), 0, None, rustix::fs::Advice::Sequential);
    }
}
