//! What is done with a stream behind the thread that acts on it: its digest is made and compared, files that have all their
//! data get their owner, mode and times, and what arrived is taken down. So of many small files the next is made meanwhile.
//!
//! Steps are done in order, so a checkpoint is told only when the digest before it was right and every file before it is whole.
//! An error shows at a later call, at the latest when all is settled. Neighbour: [`super::Applier`], which makes the steps.

use std::{
    mem,
    ops::Range,
    os::fd::{AsFd as _, OwnedFd},
    path::PathBuf,
};

use bytes::Bytes;
use rustix::io::Errno;

use super::{
    file::{STATED_GAP, verify_contents},
    waiting::{self, Waiting},
};
use crate::{
    driver::Finding,
    error::{Error, ErrorKind, Result},
    tree::{
        arrivals::Arrivals,
        behind::Behind,
        builder,
        checkpoints::{Durable, Keep},
        data,
        entry::{Entry, EntryKind, Metadata, Xattrs},
        findings::Findings,
        path::TreePath,
        root::Root,
        stream_digest::StreamDigest,
        wire::DATA_LIMIT,
        xattr::XattrReader,
    },
};

/// How many files may be closed in one batch: they are open until the batch is done, and another one waits. The more there
/// are, the rarer the two threads wait for each other, and the longer each runs on a processor of its own.
const CLOSED_LIMIT: usize = 512;

/// How many there may be where this process has few files left to open.
const CLOSED_LIMIT_OF_FEW: usize = 32;

/// How many bytes of a stream are not worth a thread.
const AT_ONCE_LIMIT: usize = 64 * 1024;

/// How much of a file may be holes that are hashed as zeroes after a break, in bytes: minutes of a processor.
const HASHED_HOLES_LIMIT: u64 = 1 << 40;

/// One thing to be done. Ranges are of the batch's bytes.
pub(super) enum Step {
    /// Frames, or the part of one before its data.
    Frames(Range<usize>),
    /// Data of the open file.
    Data(Range<usize>),
    /// The digest of the open file's contents is stated; of what arrived before a break, the file holds it.
    Stated(Option<Before>),
    /// All of a file is written.
    Closed(Box<Closed>),
    /// An inode was given a further name.
    FurtherName(TreePath),
    /// The digest of all since the last one. What is to be made durable and kept then, where there is something.
    Checkpoint { digest: [u8; 32], behind: Option<TreePath>, keep: Option<(Root, Keep)> },
    /// The digest of the rest.
    End { entries: u64, logical_bytes: u64, digest: [u8; 32], behind: Option<TreePath> },
}

/// The beginning of a file that arrived before a break.
pub(super) struct Before {
    pub(super) file: OwnedFd,
    pub(super) path: TreePath,
    pub(super) length: u64,
}

/// A file that is written.
pub(super) struct Closed {
    pub(super) path: TreePath,
    pub(super) becomes: Becomes,
    /// What the digest of its contents must be.
    pub(super) stated: Option<[u8; 32]>,
    /// All of it arrived as data, so the digest of that is the file's.
    pub(super) is_whole: bool,
}

/// What is left to be done with it.
pub(super) enum Becomes {
    /// Fresh and without attributes of its own: everything but the data.
    Plain(Waiting, Metadata),
    /// Nothing. What it is, where that is wanted.
    Finished(Option<Entry>),
}

struct Batch {
    bytes: Bytes,
    steps: Vec<Step>,
}

/// Hands steps on.
pub(super) struct Tail {
    work: Behind<Work, Batch>,
    steps: Vec<Step>,
    closed: usize,
    /// Bytes whose steps were done at once.
    at_once: usize,
}

impl Tail {
    /// `root` is where the files lie, for messages. What is known of each file is noted, where that is wanted.
    pub(super) fn new(root: &Root, arrivals: Option<Arrivals>) -> Self {
        let work = Work::new(root.path().to_owned(), arrivals);
        Self { work: Behind::new("receive-tail", work, Work::take), steps: Vec::new(), closed: 0, at_once: 0 }
    }

    /// Adds a step of the piece at hand.
    pub(super) fn add(&mut self, step: Step) {
        self.closed += usize::from(matches!(step, Step::Closed(_)));
        self.steps.push(step);
    }

    /// Tells whether the steps are to be handed over before more are added.
    pub(super) fn is_full(&self) -> bool {
        self.closed >= CLOSED_LIMIT_OF_FEW && (self.closed >= CLOSED_LIMIT || waiting::are_many())
    }

    /// Has the steps done, whose ranges are of `bytes`; waits for room. Why that failed, [`take_failure`](Self::take_failure) tells.
    pub(super) fn hand_over(&mut self, bytes: &Bytes) -> Result<()> {
        self.closed = 0;
        if self.steps.is_empty() {
            return Ok(());
        }
        let batch = Batch { bytes: bytes.clone(), steps: mem::take(&mut self.steps) };
        if self.at_once + bytes.len() > AT_ONCE_LIMIT {
            return self.work.hand_over(batch);
        }
        self.at_once += bytes.len();
        self.work.here(batch)
    }

    /// Rests, and takes out why something failed behind.
    pub(super) fn take_failure(&mut self) -> Option<Error> {
        self.work.take_failure()
    }

    /// Waits until all that was handed over is done.
    pub(super) fn rest(&mut self) -> Result<()> {
        self.work.rest().map(drop)
    }

    /// Rests, and waits until the last checkpoint is durable.
    pub(super) fn settle(&mut self) -> Result<()> {
        self.work.rest()?.durable.settle()
    }

    /// Settles, and gives back what was taken down.
    pub(super) fn finish(mut self) -> Result<(Vec<Finding>, Option<Arrivals>)> {
        self.settle()?;
        let mut work = self.work.into_work()?;
        Ok((work.findings.take(), work.arrivals))
    }

    /// Takes out what could not be kept so far.
    pub(super) fn take_findings(&mut self) -> Vec<Finding> {
        self.work.work().map(|work| work.findings.take()).unwrap_or_default()
    }
}

struct Work {
    root: PathBuf,
    digest: StreamDigest,
    durable: Durable,
    arrivals: Option<Arrivals>,
    findings: Findings,
    reader: XattrReader,
    /// The directory in which a fresh file was found to have no attributes.
    bare: Option<TreePath>,
}

impl Work {
    fn new(root: PathBuf, arrivals: Option<Arrivals>) -> Self {
        Self {
            root,
            digest: StreamDigest::default(),
            durable: Durable::default(),
            arrivals,
            findings: Findings::default(),
            reader: XattrReader::new(),
            bare: None,
        }
    }

    fn take(&mut self, Batch { bytes, steps }: Batch) -> Result<()> {
        steps.into_iter().try_for_each(|step| self.step(step, &bytes))
    }

    fn step(&mut self, step: Step, bytes: &[u8]) -> Result<()> {
        match step {
            Step::Frames(range) => self.digest.frames(&bytes[range]),
            Step::Data(range) => self.digest.data(&bytes[range]),
            Step::Stated(before) => {
                self.digest.state();
                if let Some(before) = before {
                    self.read_again(&before)?;
                }
            }
            Step::Closed(closed) => self.close(*closed)?,
            Step::FurtherName(first) => {
                if let Some(arrivals) = &mut self.arrivals {
                    arrivals.further_name(&first);
                }
            }
            Step::Checkpoint { digest, behind, keep } => {
                verify(self.digest.take(), digest, behind)?;
                if let Some((root, keep)) = keep {
                    self.durable.begin(root, keep)?;
                }
            }
            Step::End { entries, logical_bytes, digest, behind } => {
                verify(self.digest.end(entries, logical_bytes), digest, behind)?;
            }
        }
        Ok(())
    }

    fn close(&mut self, closed: Closed) -> Result<()> {
        let Closed { path, becomes, stated, is_whole } = closed;
        let digest = self.digest.end_data();
        if let Some(stated) = stated {
            verify_contents(&path, digest, stated)?;
        }
        let entry = match becomes {
            Becomes::Plain(file, metadata) => Some(self.finish_plain(file.file(), path, &metadata)?),
            Becomes::Finished(entry) => entry,
        };
        if let (Some(arrivals), Some(entry)) = (&mut self.arrivals, entry) {
            arrivals.file(entry, is_whole.then_some(digest))?;
        }
        Ok(())
    }

    fn finish_plain(&mut self, file: &OwnedFd, path: TreePath, metadata: &Metadata) -> Result<Entry> {
        let (is, keeps_owner) =
            builder::finish_plain(file, metadata).map_err(|error| self.error("set metadata of", &path, error))?;
        if !keeps_owner {
            self.findings.add(&path, builder::owner_finding(metadata));
        }
        let xattrs = match &self.arrivals {
            Some(_) => self.attributes(file, &path)?,
            None => Xattrs::new(),
        };
        let kind = EntryKind::File { size: is.stat.size };
        let (mode, uid, gid, mtime) = (is.mode, is.uid, is.gid, is.stat.mtime);
        Ok(Entry { path, kind, mode, uid, gid, mtime, xattrs, stat: is.stat })
    }

    /// Returns what attributes a fresh file has that was given none: only a security module can have put some there, and it
    /// does so to every file or to none. So one file of a directory is asked.
    fn attributes(&mut self, file: &OwnedFd, path: &TreePath) -> Result<Xattrs> {
        let parent = path.parent_bytes();
        if self.bare.as_ref().is_some_and(|bare| Some(bare.as_bytes()) == parent) {
            return Ok(Xattrs::new());
        }
        let xattrs = self.reader.read_open(file.as_fd());
        let xattrs = xattrs.map_err(|error| self.error("read extended attributes of", path, error))?;
        self.bare = path.parent().filter(|_| xattrs.is_empty());
        Ok(xattrs)
    }

    fn read_again(&mut self, before: &Before) -> Result<()> {
        let mut buffer = vec![0; DATA_LIMIT];
        let (mut at, mut holes) = (0, 0);
        while at < before.length {
            let stretch = data::next_data(before.file.as_fd(), at, before.length);
            let stretch = stretch.map_err(|error| self.error("read", &before.path, error))?;
            let (start, end) = stretch.unwrap_or((before.length, before.length));
            holes += start - at;
            if holes > HASHED_HOLES_LIMIT {
                return Err(Error::new("apply delta at", &before.path, ErrorKind::Corrupt(STATED_GAP.to_owned())));
            }
            while at < end {
                let room = buffer.len().min((end - at) as usize);
                let count = data::read_at(before.file.as_fd(), &mut buffer[..room], at);
                let count = count.map_err(|error| self.error("read", &before.path, error))?;
                if count == 0 {
                    return Err(self.error("read", &before.path, Errno::STALE));
                }
                self.digest.data(&buffer[..count]);
                at += count as u64;
            }
        }
        Ok(())
    }

    fn error(&self, operation: &'static str, path: &TreePath, error: Errno) -> Error {
        Error::io(operation, format!("{}/{path}", self.root.display()), error)
    }
}

fn verify(found: [u8; 32], told: [u8; 32], behind: Option<TreePath>) -> Result<()> {
    if found == told {
        return Ok(());
    }
    let object = behind.map_or_else(|| "its start".to_owned(), |path| format!("(behind) {path}"));
    let rule = "a digest differs: what arrived was damaged at the sender, or on its way";
    Err(Error::new("apply delta at", object, ErrorKind::Corrupt(rule.to_owned())))
}
