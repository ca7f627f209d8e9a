//! Takes in `flocker-tree/1`, pushed in pieces cut anywhere, and makes the target tree beneath a directory.
//!
//! The stream is hostile: each record is checked before it is acted on, names are single and in strict order, and
//! everything is made by one name in a directory that was opened beneath the destination. A broken rule ends the
//! stream with [`ErrorKind::Corrupt`].
//!
//! | state | `Start` | entry record | `Contents`, `Data`, `Hole` | `Checkpoint` | `End` | end of bytes |
//! |---|---|---|---|---|---|---|
//! | start | → entries | corrupt | corrupt | corrupt | corrupt | corrupt |
//! | entries | corrupt | made | corrupt | verified, made durable | → ended | corrupt |
//! | in a file | corrupt | file done, made | written | verified, made durable | file done, → ended | corrupt |
//! | ended | corrupt | corrupt | corrupt | corrupt | corrupt | done |
//!
//! Records after a checkpoint may be taken in a second time, after a break: each has the same result then.

mod file;
mod tail;
mod waiting;

use std::{fmt, os::fd::AsFd as _};

use bytes::Bytes;
use rustix::fs::{AtFlags, FileType, StatxFlags};

use self::{
    file::OpenFile,
    tail::{Step, Tail},
};
use super::{
    arrivals::Arrivals,
    builder::Builder,
    checkpoints::OnCheckpoint,
    data::Reflinks,
    entry::Metadata,
    path::TreePath,
    root::Root,
    wire::{FRAME_HEAD, FRAME_LIMIT, Place, Position, Record, Rule},
    write::Summary,
};
use crate::{
    delta::ResumePoint,
    driver::Finding,
    error::{Error, ErrorKind, Result},
};

/// The most bytes of extended attributes that directories on the way may hold back until they are left.
const HELD_BACK_LIMIT: usize = 64 * 1024 * 1024;

/// What the destination shares with the base snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sharing {
    /// Its files are hard links into the base's tree: none is modified, each is replaced.
    HardLinked,
    /// Nothing at the level of inodes (a writable clone, a real copy, or an empty directory): files are modified in
    /// place, but for those with several names.
    Exclusive,
}

/// What was made.
#[derive(Debug)]
pub struct Applied {
    /// The target's totals, as the sender counted them.
    pub summary: Summary,
    /// What could not be kept, and why.
    pub findings: Vec<Finding>,
    /// What is known of the files that were written, where that was asked for.
    pub arrivals: Option<Arrivals>,
}

/// Takes in one stream. After an error nothing more is taken; dropping it leaves the destination as it is.
pub struct Applier {
    builder: Builder,
    base: Option<Root>,
    sharing: Sharing,
    on_checkpoint: Option<OnCheckpoint>,
    state: State,
    /// Bytes of a frame that is not complete.
    buffer: Vec<u8>,
    /// What is done behind: the digest, and what files are given when they have their data.
    tail: Tail,
    /// What is known of each file is taken down.
    notes: bool,
    /// Where the stream was told to start.
    resume: Option<Position>,
    /// How far it is.
    position: Option<Position>,
    /// In each directory on the way: the last name, and the size of the attributes held back.
    levels: Vec<Level>,
    held_back: usize,
    file: Option<OpenFile>,
    reflinks: Reflinks,
    left_out: bool,
    summary: Summary,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Start,
    Entries,
    Ended,
    Failed,
}

#[derive(Debug, Default)]
struct Level {
    last: Vec<u8>,
    held_back: usize,
}

impl Applier {
    /// Starts to make the target in `dest`, which holds the base (or is empty where there is none), or what an earlier
    /// applier left, if `resume` is the last point that it reported. `base` is the base snapshot's own tree. Without
    /// `on_checkpoint` the stream is not gone on with after a break, and nothing is durable before its end.
    pub fn new(
        dest: Root,
        base: Option<Root>,
        sharing: Sharing,
        resume: Option<ResumePoint>,
        on_checkpoint: Option<OnCheckpoint>,
    ) -> Result<Self> {
        let resume = resume.as_ref().map(Position::from_point).transpose()?;
        Ok(Self {
            tail: Tail::new(&dest, None),
            builder: Builder::new(dest),
            base,
            sharing,
            on_checkpoint,
            state: State::Start,
            buffer: Vec::new(),
            notes: false,
            position: resume.clone(),
            resume,
            levels: Vec::new(),
            held_back: 0,
            file: None,
            reflinks: Reflinks::Untried,
            left_out: false,
            summary: Summary::default(),
        })
    }

    /// Takes down what is known of each file when it is written.
    #[must_use]
    pub fn noting(mut self, arrivals: Arrivals) -> Self {
        self.notes = true;
        self.tail = Tail::new(self.builder.root(), Some(arrivals));
        self
    }

    /// Takes the next bytes. That they were damaged may show at a later call; when the last ones were fed it has shown.
    pub fn feed(&mut self, bytes: Bytes) -> Result<()> {
        self.take(bytes).map_err(|error| {
            self.state = State::Failed;
            // What failed behind was earlier in the stream.
            self.tail.take_failure().unwrap_or(error)
        })
    }

    /// Takes out what could not be kept so far, and why.
    pub fn take_findings(&mut self) -> Vec<Finding> {
        let mut findings = self.builder.take_findings();
        findings.append(&mut self.tail.take_findings());
        findings
    }

    /// Waits until all that was fed is checked, and the checkpoints that were passed are durable and told.
    pub fn settle(&mut self) -> Result<()> {
        self.tail.settle()
    }

    /// Checks that the stream was complete, and makes all of it durable.
    pub fn finish(self) -> Result<Applied> {
        let root = self.builder.root().try_clone()?;
        let applied = self.complete()?;
        root.sync()?;
        Ok(applied)
    }

    /// Checks that the stream was complete. What it made is durable only once the caller has synced the file system.
    pub fn complete(mut self) -> Result<Applied> {
        if self.state != State::Ended {
            return Err(self.corrupt("the stream is truncated"));
        }
        let mut findings = self.builder.take_findings();
        let (mut behind, arrivals) = self.tail.finish()?;
        findings.append(&mut behind);
        Ok(Applied { summary: self.summary, findings, arrivals })
    }

    fn take(&mut self, mut bytes: Bytes) -> Result<()> {
        if self.state == State::Failed {
            return Err(self.corrupt("the stream has failed before"));
        }
        while !bytes.is_empty() {
            let whole = if self.buffer.is_empty() { self.whole_frames(&bytes)? } else { 0 };
            if whole > 0 {
                self.frames(&bytes.split_to(whole))?;
                continue;
            }
            if self.state == State::Ended {
                return Err(self.corrupt("bytes follow the end of the stream"));
            }
            // A frame cut by the end of the piece: gather as much as it lacks.
            let wanted = self.frame_length(&self.buffer)?.unwrap_or(FRAME_HEAD);
            let count = (wanted - self.buffer.len()).min(bytes.len());
            self.buffer.extend_from_slice(&bytes.split_to(count));
            if self.frame_length(&self.buffer)? == Some(self.buffer.len()) {
                let frame = std::mem::take(&mut self.buffer);
                self.frames(&frame.into())?;
            }
        }
        Ok(())
    }

    /// Returns how many of the bytes are frames that are complete.
    fn whole_frames(&self, bytes: &[u8]) -> Result<usize> {
        let mut whole = 0;
        while let Some(length) = self.frame_length(&bytes[whole..])?.filter(|length| bytes.len() - whole >= *length) {
            whole += length;
        }
        Ok(whole)
    }

    /// Acts on frames. They are taken into the digest behind, in the same order.
    fn frames(&mut self, frames: &Bytes) -> Result<()> {
        let (mut at, mut told) = (0, 0);
        while let Some(length) = self.frame_length(&frames[at..])? {
            if self.state == State::Ended {
                return Err(self.corrupt("bytes follow the end of the stream"));
            }
            let end = at + length;
            let record = Record::decode(&frames[at + FRAME_HEAD..end]).map_err(|rule| self.corrupt(rule))?;
            if let Record::Data { bytes, .. } = &record {
                let data = end - bytes.0.len();
                self.tail.add(Step::Frames(told..data));
                self.tail.add(Step::Data(data..end));
                told = end;
            } else if record.is_digest() {
                self.tail.add(Step::Frames(told..at));
                told = end;
            } else if record.place().is_some() && self.file.is_some() {
                self.tail.add(Step::Frames(told..at));
                told = at;
            }
            self.act(record)?;
            at = end;
            if self.tail.is_full() {
                self.tail.hand_over(frames)?;
            }
        }
        self.tail.add(Step::Frames(told..frames.len()));
        self.tail.hand_over(frames)?;
        // Whoever has fed all of a stream knows whether it was whole.
        if self.state == State::Ended { self.tail.rest() } else { Ok(()) }
    }

    /// Returns how long a frame is, head included; `None` while its head is not complete.
    fn frame_length(&self, bytes: &[u8]) -> Result<Option<usize>> {
        let Some(head) = bytes.first_chunk::<FRAME_HEAD>() else { return Ok(None) };
        match u32::from_le_bytes(*head) as usize {
            0 => Err(self.corrupt("a record is empty")),
            length if length > FRAME_LIMIT => Err(self.corrupt("a record is longer than 8.25 MiB")),
            length => Ok(Some(FRAME_HEAD + length)),
        }
    }

    fn act(&mut self, record: Record<'_>) -> Result<()> {
        match (self.state, &record) {
            (State::Start, Record::Start { resume, .. }) => {
                if *resume != self.resume {
                    return Err(self.corrupt("the stream starts elsewhere than was asked for"));
                }
                self.state = State::Entries;
            }
            (State::Start, _) => return Err(self.corrupt("the stream does not start as one")),
            (_, Record::Start { .. }) => return Err(self.corrupt("the stream starts twice")),
            _ => {}
        }
        match record {
            Record::Start { .. } => Ok(()),
            Record::Data { offset, bytes } => self.data(offset, bytes.0),
            Record::Hole { offset, length } => self.hole(offset, length),
            Record::Contents { digest } => self.contents(digest),
            Record::Checkpoint { digest } => self.checkpoint(digest),
            Record::End { entries, logical_bytes, digest } => {
                self.close_file()?;
                let behind = self.behind();
                self.tail.add(Step::End { entries, logical_bytes, digest, behind });
                self.builder.leave_to(0)?;
                self.summary = Summary { entries, logical_bytes };
                self.state = State::Ended;
                Ok(())
            }
            entry => self.entry(entry),
        }
    }

    /// Acts on a record about one path.
    fn entry(&mut self, record: Record<'_>) -> Result<()> {
        let Some(at) = record.place() else { return Err(self.corrupt("a record cannot be read")) };
        self.close_file()?;
        let path = self.stand(at)?;
        let name = at.name.0;
        match record {
            Record::Directory { metadata, .. } => self.directory(&path, name, metadata)?,
            Record::File { metadata, size, basis, from, .. } => {
                return self.open_file(path, metadata, size, basis, from);
            }
            Record::Node { metadata, kind, .. } => {
                let kind = kind.into_entry_kind();
                if self.builder.make(name, &kind)? {
                    self.builder.finish_node(name, &metadata, &kind)?;
                } else {
                    self.left_out = true;
                }
            }
            Record::HardLink { to, .. } => self.hard_link(&path, name, &to)?,
            _ => self.builder.clear(name)?,
        }
        self.advance(&path, None);
        Ok(())
    }

    /// Goes to the directory a record is about, and checks the order of names in it.
    fn stand(&mut self, at: Place<'_>) -> Result<TreePath> {
        let level = at.level as usize;
        if level == 0 {
            if self.builder.entered() > 0 {
                return Err(self.corrupt("the root comes twice"));
            }
            return Ok(TreePath::root());
        }
        if level > self.builder.entered() {
            return Err(self.corrupt_at(at.name.0, "its directory was not announced before it"));
        }
        self.builder.leave_to(level)?;
        for gone in self.levels.drain(level..) {
            self.held_back -= gone.held_back;
        }
        let path = self.builder.path().child(at.name.0);
        let path = path.map_err(|_| self.corrupt_at(at.name.0, "a path is longer than 32 KiB"))?;
        let Some(directory) = self.levels.last_mut() else { return Err(self.corrupt("the root is missing")) };
        if !directory.last.is_empty() && directory.last.as_slice() >= at.name.0 {
            return Err(self.corrupt_at(at.name.0, "it is out of order or comes twice"));
        }
        directory.last.clear();
        directory.last.extend_from_slice(at.name.0);
        Ok(path)
    }

    fn directory(&mut self, path: &TreePath, name: &[u8], metadata: Metadata) -> Result<()> {
        let held_back = metadata.xattrs.iter().map(|(key, value)| key.len() + value.len()).sum();
        self.held_back += held_back;
        if self.held_back > HELD_BACK_LIMIT {
            return Err(self.corrupt_at(name, "directories on the way have more than 64 MiB of extended attributes"));
        }
        if path.is_root() {
            self.builder.enter_root(metadata)?
        } else {
            self.builder.enter(name, metadata)?
        }
        self.levels.push(Level { last: Vec::new(), held_back });
        Ok(())
    }

    fn hard_link(&mut self, path: &TreePath, name: &[u8], to: &TreePath) -> Result<()> {
        if to >= path || path.is_within(to) {
            return Err(self.corrupt_at(name, "it is another name of an entry that does not come before it"));
        }
        let found = self.builder.root().open_parent(to).ok().and_then(|parent| {
            let found = rustix::fs::statx(&parent, to.name(), AtFlags::SYMLINK_NOFOLLOW, StatxFlags::TYPE).ok()?;
            let file_type = FileType::from_raw_mode(u32::from(found.stx_mode));
            (file_type != FileType::Directory).then_some(parent)
        });
        let Some(parent) = found else {
            if self.left_out || !rustix::process::geteuid().is_root() {
                self.builder.clear(name)?;
                self.builder.note(name, format!("it is another name of {to}, which was left out"));
                return Ok(());
            }
            return Err(self.corrupt_at(name, "it is another name of an entry that is not there"));
        };
        if self.builder.link(parent.as_fd(), to.name(), name)? {
            if self.notes {
                self.tail.add(Step::FurtherName(to.clone()));
            }
            return Ok(());
        }
        let why = format!("the file system allows no further name of {to}");
        Err(Error::new("link", self.show(name), ErrorKind::Unsupported(why)))
    }

    /// Notes how far the stream is; directories that are announced again after a break do not count.
    fn advance(&mut self, path: &TreePath, inside: Option<u64>) {
        match &mut self.position {
            None => self.position = Some(Position { path: path.clone(), inside }),
            Some(position) if position.path <= *path => {
                position.path.clone_from(path);
                position.inside = inside;
            }
            Some(_) => {}
        }
    }

    fn checkpoint(&mut self, digest: [u8; 32]) -> Result<()> {
        let keep = match (&self.position, &mut self.on_checkpoint) {
            (Some(position), Some(on_checkpoint)) => {
                Some((self.builder.root().try_clone()?, on_checkpoint(position.to_point()?)))
            }
            _ => None,
        };
        let behind = self.behind();
        self.tail.add(Step::Checkpoint { digest, behind, keep });
        Ok(())
    }

    /// The last path that was taken in.
    fn behind(&self) -> Option<TreePath> {
        self.position.as_ref().map(|position| position.path.clone())
    }

    fn show(&self, name: &[u8]) -> String {
        let mut path = self.builder.path().clone();
        if !name.is_empty() {
            path.push(&name[..name.len().min(super::path::NAME_LIMIT)]);
        }
        path.to_string()
    }

    fn corrupt_at(&self, name: &[u8], rule: Rule) -> Error {
        Error::new("apply delta at", self.show(name), ErrorKind::Corrupt(rule.to_owned()))
    }

    /// A broken rule, at the last path that was taken in.
    fn corrupt(&self, rule: Rule) -> Error {
        let path = self.position.as_ref().map(|position| position.path.to_string());
        let object = path.map_or_else(|| "its start".to_owned(), |path| format!("(behind) {path}"));
        Error::new("apply delta at", object, ErrorKind::Corrupt(rule.to_owned()))
    }
}

impl fmt::Debug for Applier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Applier").field("state", &self.state).field("position", &self.position).finish_non_exhaustive()
    }
}
