//! The programs `zfs`, `zpool` and `zdb`: how they are run, and what their complaints mean.
//!
//! Owns every start of a child, the classes of errors with their patterns, and the patience with a pool that is busy for a
//! moment. Each child holds the pool's lock while it runs, so that nobody opens the pool while a child of a daemon that was
//! killed still works on it. Refuses to know volumes.
//!
//! Nothing here destroys to converge: `receive -F`, `destroy -r`, `destroy -R` and `rollback -R` are never written; a test
//! reads the sources of this driver for them.

use std::{
    ffi::OsStr,
    fmt,
    fs::File,
    time::{Duration, Instant},
};

use super::touches::Touches;
use crate::{
    command::{self, CommandError, Input, Running},
    error::{Error, ErrorKind},
};

/// How long a dataset that is busy is waited for: zfs-fuse takes back a mount some time after umount(2) returned.
const PATIENCE: Duration = Duration::from_secs(10);

/// The first and the longest pause between two tries.
const PAUSE: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(250));

/// What a complaint means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Class {
    /// Somebody uses it at the moment, or holds it.
    Busy,
    /// There is no such dataset or snapshot.
    NotFound,
    /// The name is taken.
    Exists,
    /// It is mounted already.
    Mounted,
    /// It is not mounted.
    NotMounted,
    /// A clone depends on it.
    HasClones,
    /// There are newer snapshots.
    HasNewer,
    /// The destination of a receive was written to.
    Modified,
    /// The stream does not build on the newest snapshot there.
    WrongBase,
    /// The stream builds on a snapshot that is not in the pool.
    NoOrigin,
    /// The stream is cut short or damaged.
    BadStream,
    /// The pool or the program does not know what the stream needs.
    Unsupported,
    /// A half received state stands in the way, or does not fit the stream.
    StaleState,
    /// The pool or a quota is full.
    NoSpace,
    /// The key of an encrypted dataset is not loaded.
    KeyMissing,
    /// The hold is not there.
    NoSuchTag,
    /// The user may not.
    Denied,
    /// The program knows no such command, option or property.
    Usage,
    /// Anything else.
    Other,
}

/// A pattern of the table: how a line, or the whole complaint, begins, and what it holds behind that.
struct Pattern {
    begins: &'static str,
    holds: &'static str,
    class: Class,
}

const fn pattern(begins: &'static str, holds: &'static str, class: Class) -> Pattern {
    Pattern { begins, holds, class }
}

/// First match wins. Each has a recorded sample in `testdata/complaints.txt`.
const PATTERNS: &[Pattern] = &[
    pattern("cannot receive", "contains partially-complete state", Class::StaleState),
    pattern("cannot receive resume stream:", "kernel modules must be upgraded", Class::StaleState),
    pattern("cannot resume send:", "", Class::StaleState),
    pattern("cannot receive", "has been modified since most recent snapshot", Class::Modified),
    pattern("cannot receive", "does not match incremental source", Class::WrongBase),
    pattern("cannot receive", "local origin for clone", Class::NoOrigin),
    pattern("cannot receive", "out of space", Class::NoSpace),
    pattern("cannot receive", "space quota exceeded", Class::NoSpace),
    pattern("cannot receive", "must be upgraded to receive this stream", Class::Unsupported),
    pattern("cannot receive", "stream has unsupported feature", Class::Unsupported),
    pattern("cannot receive", "invalid backup stream", Class::BadStream),
    pattern("cannot receive", "invalid stream", Class::BadStream),
    pattern("cannot receive", "incomplete stream", Class::BadStream),
    pattern("cannot receive", "checksum mismatch", Class::BadStream),
    pattern("cannot receive", "failed to read from stream", Class::BadStream),
    pattern("cannot receive", "destination already exists", Class::Exists),
    pattern("cannot receive", "exists must specify -F", Class::Exists),
    pattern("cannot restore to", "destination already exists", Class::Exists),
    pattern("cannot receive", "dataset is busy", Class::Busy),
    pattern("cannot", "encryption key not loaded", Class::KeyMissing),
    pattern("cannot", "encryption key must be loaded", Class::KeyMissing),
    pattern("cannot", "dataset key must be loaded", Class::KeyMissing),
    pattern("cannot mount", "filesystem already mounted", Class::Mounted),
    pattern("cannot unmount", "not currently mounted", Class::NotMounted),
    pattern("cannot unmount", "Device or resource busy", Class::Busy),
    pattern("cannot unmount", "umount failed", Class::Busy),
    pattern("cannot unmount", "pool or dataset is busy", Class::Busy),
    pattern("umount:", "target is busy", Class::Busy),
    pattern("umount:", "not mounted", Class::NotMounted),
    pattern("cannot rollback", "clones of previous snapshots exist", Class::HasClones),
    pattern("cannot rollback", "more recent snapshots", Class::HasNewer),
    // What zfs-fuse says while it takes down a mount that the kernel has given up already; nothing was done.
    pattern("cannot rollback", "I/O error", Class::Busy),
    pattern("cannot destroy", "snapshot has dependent clones", Class::HasClones),
    pattern("cannot destroy", "filesystem has dependent clones", Class::HasClones),
    pattern("cannot destroy", "filesystem has children", Class::HasNewer),
    pattern("cannot destroy", "it's being held", Class::Busy),
    pattern("cannot release", "no such tag on this dataset", Class::NoSuchTag),
    pattern("cannot", "dataset already exists", Class::Exists),
    pattern("cannot", "dataset does not exist", Class::NotFound),
    pattern("could not find any snapshots to destroy", "", Class::NotFound),
    pattern("cannot", "no such pool", Class::NotFound),
    pattern("cannot", "dataset is busy", Class::Busy),
    pattern("cannot", "pool or dataset is busy", Class::Busy),
    pattern("cannot", "pool is busy", Class::Busy),
    pattern("cannot", "out of space", Class::NoSpace),
    pattern("cannot", "No space left on device", Class::NoSpace),
    pattern("cannot", "quota exceeded", Class::NoSpace),
    pattern("cannot", "size is less than current used", Class::NoSpace),
    pattern("cannot", "permission denied", Class::Denied),
    pattern("unrecognized command", "", Class::Usage),
    pattern("invalid option", "", Class::Usage),
    pattern("bad property list", "", Class::Usage),
    pattern("warning: cannot send", "dataset key must be loaded", Class::KeyMissing),
];

/// Says what a complaint means. Messages run over several lines, so the whole of it is looked at with its white space made
/// one, and each line by itself.
pub(super) fn classify(stderr: &str) -> Class {
    let joined = stderr.split_whitespace().collect::<Vec<_>>().join(" ");
    let texts = || std::iter::once(joined.as_str()).chain(stderr.lines().map(str::trim));
    let fits = |pattern: &&Pattern| {
        texts().any(|text| text.strip_prefix(pattern.begins).is_some_and(|rest| rest.contains(pattern.holds)))
    };
    PATTERNS.iter().find(fits).map_or(Class::Other, |pattern| pattern.class)
}

/// A program that failed, and what its complaint means.
#[derive(Debug)]
pub(super) struct Trouble {
    pub(super) class: Class,
    pub(super) error: CommandError,
}

impl From<CommandError> for Trouble {
    fn from(error: CommandError) -> Self {
        Self { class: classify(error.stderr()), error }
    }
}

impl Trouble {
    pub(super) fn into_kind(self) -> ErrorKind {
        match self.class {
            Class::NotFound => ErrorKind::NotFound,
            Class::Exists => ErrorKind::AlreadyExists,
            Class::NoSpace => ErrorKind::NoSpace,
            Class::Denied => ErrorKind::PermissionDenied,
            Class::BadStream => ErrorKind::Corrupt(self.error.to_string()),
            Class::WrongBase | Class::NoOrigin | Class::Unsupported => ErrorKind::FormatUnfit(self.error.to_string()),
            Class::StaleState => ErrorKind::ResumeStale(self.error.to_string()),
            Class::KeyMissing => {
                ErrorKind::Unsupported("the volume is encrypted and its key is not loaded here".to_owned())
            }
            Class::Modified | Class::HasNewer | Class::HasClones => ErrorKind::Unsupported(self.error.to_string()),
            _ => self.error.into_kind(),
        }
    }

    pub(super) fn into_error(self, operation: &'static str, object: impl fmt::Display) -> Error {
        Error::new(operation, object, self.into_kind())
    }
}

/// Runs the programs, each with the pool's lock.
#[derive(Debug)]
pub(super) struct Programs {
    lock: File,
    pub(super) touches: Touches,
}

impl Programs {
    pub(super) fn new(lock: File) -> Self {
        Self { lock, touches: Touches::default() }
    }

    /// Runs `zfs` to its end.
    pub(super) fn zfs<A: AsRef<OsStr>>(&self, arguments: &[A]) -> Result<Vec<u8>, Trouble> {
        self.touches.count(arguments);
        let done = self.run("zfs", arguments);
        self.touches.count(arguments);
        done
    }

    /// Runs a program to its end.
    pub(super) fn run<A: AsRef<OsStr>>(&self, program: &str, arguments: &[A]) -> Result<Vec<u8>, Trouble> {
        command::run_holding(program, arguments, &self.lock).map_err(Trouble::from)
    }

    /// Runs `zfs` again while what it works on is busy, for a bounded time.
    pub(super) fn zfs_patiently<A: AsRef<OsStr>>(&self, arguments: &[A]) -> Result<Vec<u8>, Trouble> {
        patiently(|| self.zfs(arguments))
    }

    /// Starts `zfs` and leaves it running.
    pub(super) fn start_zfs<A: AsRef<OsStr>>(&self, arguments: &[A], input: Input) -> Result<Running, Trouble> {
        Running::start_holding("zfs", arguments, input, &self.lock).map_err(Trouble::from)
    }
}

/// Tries again while the trouble is that something is busy.
pub(super) fn patiently<T>(mut attempt: impl FnMut() -> Result<T, Trouble>) -> Result<T, Trouble> {
    let deadline = Instant::now() + PATIENCE;
    let mut pause = PAUSE.0;
    loop {
        match attempt() {
            Err(trouble) if trouble.class == Class::Busy && Instant::now() < deadline => {
                tracing::debug!(error = %trouble.error, "is tried again");
                std::thread::sleep(pause);
                pause = (pause * 2).min(PAUSE.1);
            }
            other => return other,
        }
    }
}

/// Takes "it is so already" as done.
pub(super) fn unless<T: Default>(class: Class, result: Result<T, Trouble>) -> Result<T, Trouble> {
    match result {
        Err(trouble) if trouble.class == class => Ok(T::default()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// The samples: `== CLASS (where it was recorded)`, then the complaint.
    const COMPLAINTS: &str = include_str!("testdata/complaints.txt");

    fn samples() -> Vec<(String, String)> {
        let parts = COMPLAINTS.split("== ").skip(1);
        parts
            .map(|part| {
                let (head, text) = part.split_once('\n').unwrap();
                (head.split_whitespace().next().unwrap().to_owned(), text.to_owned())
            })
            .collect()
    }

    #[test]
    fn recorded_complaints_are_understood() {
        assert!(samples().len() > 20);
        for (class, text) in samples() {
            assert_eq!(format!("{:?}", classify(&text)), class, "{text}");
        }
    }

    #[test]
    fn words_elsewhere_do_not_decide_a_class() {
        assert_eq!(classify("some words: dataset is busy"), Class::Other);
        assert_eq!(classify(""), Class::Other);
    }

    /// Files of this driver that hold argument lists.
    const SOURCES: &[&str] = &[
        include_str!("arrival.rs"),
        include_str!("catalog.rs"),
        include_str!("delta.rs"),
        include_str!("graft.rs"),
        include_str!("head.rs"),
        include_str!("journal.rs"),
        include_str!("place.rs"),
        include_str!("pool.rs"),
        include_str!("receive.rs"),
        include_str!("resume.rs"),
        include_str!("snapshot.rs"),
        include_str!("split.rs"),
        include_str!("touches.rs"),
        include_str!("trash.rs"),
        include_str!("view.rs"),
        include_str!("volume.rs"),
    ];

    #[test]
    fn no_argument_list_destroys_more_than_one_thing_or_forces_a_receive() {
        for source in SOURCES {
            for line in source.lines() {
                let has = |word: &str| line.contains(&format!("\"{word}\""));
                assert!(!has("-F") && !has("-R"), "{line}");
                assert!(!has("-r") || has("get") || has("list"), "{line}");
            }
        }
    }
}
