//! One process at a time has a pool open: a file that is locked (flock(2)) and holds the process id of who locked it.
//!
//! Owns the question whether the holder is gone. Programs that it started may have the lock for longer: each until it has
//! replaced the copy of the process that it began as, some by wish until they end. Refuses to know what is locked.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Seek, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
    time::{Duration, Instant},
};

use rustix::fs::{self as sys, FlockOperation};

use crate::error::ErrorKind;

/// How long is waited between two looks at a lock.
const PAUSE: Duration = Duration::from_millis(20);

/// Why a lock was not taken.
#[derive(Debug)]
pub(super) enum LockError {
    /// A process has it.
    Held { pid: Option<u32> },
    /// The operating system refused.
    Io(io::Error),
}

impl LockError {
    /// Makes a pool's error of it.
    pub(super) fn into_kind(self, otherwise: impl FnOnce(io::Error) -> ErrorKind) -> ErrorKind {
        match self {
            Self::Held { pid } => ErrorKind::PoolBusy { pid },
            Self::Io(error) => otherwise(error),
        }
    }
}

/// Takes a lock. Where the process that had it is gone, those that it started are waited for, so long at most.
pub(super) fn take(path: &Path, children: Duration) -> Result<File, LockError> {
    let deadline = Instant::now() + children;
    take_or(path, || {
        std::thread::sleep(PAUSE);
        Instant::now() < deadline
    })
}

/// `pause` waits; `false` gives up.
fn take_or(path: &Path, mut pause: impl FnMut() -> bool) -> Result<File, LockError> {
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path);
    let mut file = file.map_err(LockError::Io)?;
    loop {
        match sys::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => break,
            Err(rustix::io::Errno::WOULDBLOCK) => {}
            Err(error) => return Err(LockError::Io(error.into())),
        }
        let mut holder = String::new();
        file.rewind().and_then(|()| (&mut file).take(32).read_to_string(&mut holder)).map_err(LockError::Io)?;
        let pid: Option<u32> = holder.trim().parse().ok();
        let lives = pid.is_none_or(|pid| Path::new(&format!("/proc/{pid}")).exists());
        if lives || !pause() {
            return Err(LockError::Held { pid });
        }
    }
    // Only for people and for the question above; the lock itself is the kernel's.
    let written = file.set_len(0).and_then(|()| file.rewind()).and_then(|()| writeln!(file, "{}", std::process::id()));
    written.map_err(LockError::Io)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::{fs, process::Command};

    use super::*;

    /// A process id that nobody has any more.
    fn gone() -> u32 {
        let mut child = Command::new("true").spawn().unwrap();
        child.wait().unwrap();
        child.id()
    }

    #[test]
    fn a_lock_is_taken_once_and_names_who_has_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let lock = take(&path, Duration::ZERO).unwrap();
        let me = std::process::id();
        assert_eq!(fs::read_to_string(&path).unwrap().trim(), me.to_string());
        let refused = take_or(&path, || unreachable!("its holder lives"));
        assert!(matches!(refused, Err(LockError::Held { pid: Some(pid) }) if pid == me), "{refused:?}");
        drop(lock);
        take(&path, Duration::ZERO).unwrap();
    }

    #[test]
    fn what_a_process_that_is_gone_started_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let mut inherited = Some(take(&path, Duration::ZERO).unwrap());
        fs::write(&path, format!("{}\n", gone())).unwrap();
        let refused = take_or(&path, || false);
        assert!(matches!(refused, Err(LockError::Held { .. })), "{refused:?}");
        let mut pauses = 0;
        take_or(&path, || {
            pauses += 1;
            if pauses == 3 {
                inherited = None;
            }
            true
        })
        .unwrap();
        assert_eq!(pauses, 3);
        assert_eq!(fs::read_to_string(&path).unwrap().trim(), std::process::id().to_string());
    }
}
