//! Subvolumes: what the `btrfs` program does to one of them, and what the kernel says of it.
//!
//! Owns every call of `btrfs subvolume`, `property` and `send --no-data`, and the reading of their output.

use std::{
    io::{self, Read},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::fs::{AtFlags, OFlags};
use uuid::Uuid;

use super::stream::{Changes, Header, Reader, StreamError, Touched};
use crate::{
    command::{self, CommandError, Input, Running},
    tree::{entry::Time, path::TreePath, root::Root},
};

pub(super) const PROGRAM: &str = "btrfs";

/// The inode number of the root of every subvolume (`BTRFS_FIRST_FREE_OBJECTID`).
const ROOT_INODE: u64 = 256;

/// The inode number of the empty directory that a snapshot holds in the place of a subvolume
/// (`BTRFS_EMPTY_SUBVOL_DIR_OBJECTID`).
pub(super) const GAP_INODE: u64 = 2;

/// How much of a stream is read at once.
pub(super) const PIECE: usize = 256 * 1024;

/// The highest version of the kernel's stream that this driver reads.
pub(super) const STREAM_VERSION: u32 = 2;

/// Whether a snapshot may be written to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    ReadOnly,
    Writable,
}

/// Why something about a subvolume could not be found out.
#[derive(Debug, thiserror::Error)]
pub(super) enum Trouble {
    #[error("{0}")]
    Program(CommandError),
    #[error("{0}")]
    Stream(#[from] StreamError),
    #[error("{0}")]
    Io(#[from] io::Error),
}

impl Trouble {
    /// Tells whether `btrfs send` refused a subvolume because it may be written to.
    pub(super) fn is_of_writable(&self) -> bool {
        matches!(self, Self::Program(error) if error.stderr().contains("is not read-only"))
    }
}

pub(super) fn is_subvolume(path: &Path) -> bool {
    std::fs::symlink_metadata(path).is_ok_and(|stat| stat.is_dir() && stat.ino() == ROOT_INODE)
}

fn text(path: &Path) -> &std::ffi::OsStr {
    path.as_os_str()
}

pub(super) fn create(path: &Path) -> Result<(), CommandError> {
    command::run(PROGRAM, &["subvolume".as_ref(), "create".as_ref(), text(path)]).map(drop)
}

/// Makes a snapshot at a path where nothing is. (Where a directory is, btrfs would make it inside.)
pub(super) fn snapshot(from: &Path, to: &Path, mode: Mode) -> Result<(), CommandError> {
    let mut arguments = vec!["subvolume".as_ref(), "snapshot".as_ref()];
    if mode == Mode::ReadOnly {
        arguments.push("-r".as_ref());
    }
    arguments.extend([text(from), text(to)]);
    command::run(PROGRAM, &arguments).map(drop)
}

pub(super) fn delete(path: &Path) -> Result<(), CommandError> {
    command::run(PROGRAM, &["subvolume".as_ref(), "delete".as_ref(), text(path)]).map(drop)
}

pub(super) fn set_read_only(path: &Path, read_only: bool) -> Result<(), CommandError> {
    let value = if read_only { "true" } else { "false" };
    let words = ["property", "set", "-ts"].map(AsRef::as_ref);
    let words: Vec<_> = words.into_iter().chain([text(path), "ro".as_ref(), value.as_ref()]).collect();
    command::run(PROGRAM, &words).map(drop)
}

/// Limits what a subvolume may hold (where quotas are on).
pub(super) fn limit(path: &Path, quota_bytes: Option<u64>) -> Result<(), CommandError> {
    let limit = quota_bytes.map_or_else(|| "none".to_owned(), |bytes| bytes.to_string());
    command::run(PROGRAM, &["qgroup".as_ref(), "limit".as_ref(), limit.as_ref(), text(path)]).map(drop)
}

/// Forgets the limits of subvolumes that are gone.
pub(super) fn clear_stale_limits(path: &Path) -> Result<(), CommandError> {
    command::run(PROGRAM, &["qgroup".as_ref(), "clear-stale".as_ref(), text(path)]).map(drop)
}

/// Returns what `btrfs filesystem usage` says, in bytes.
pub(super) fn file_system_usage(path: &Path) -> Result<String, CommandError> {
    let output = command::run(PROGRAM, &["filesystem".as_ref(), "usage".as_ref(), "-b".as_ref(), text(path)])?;
    Ok(String::from_utf8_lossy(&output).into_owned())
}

/// Waits until the cleaner has given back the space of deleted subvolumes, or this time has passed.
pub(super) fn wait_for_cleaner(path: &Path, at_most: Duration) -> Result<(), CommandError> {
    let deleted = command::run(PROGRAM, &["subvolume".as_ref(), "list".as_ref(), "-d".as_ref(), text(path)])?;
    let commit = || command::run(PROGRAM, &["filesystem".as_ref(), "sync".as_ref(), text(path)]).map(drop);
    if deleted.is_empty() {
        // What the cleaner has let go of is free from the next commit on.
        return commit();
    }
    // The kernel's cleaner would look for work every 30 seconds only; a commit asked for this way wakes it.
    commit()?;
    let running = Running::start(
        PROGRAM,
        &["subvolume".as_ref(), "sync".as_ref(), "-s".as_ref(), "1".as_ref(), text(path)],
        Input::Nothing,
    )?;
    if !running.ends_within(at_most) {
        tracing::info!(path = %path.display(), "deleted subvolumes are still being cleaned up; their space is not counted yet");
        return Ok(());
    }
    running.finish()?;
    commit()
}

/// Returns a subvolume's own uuid, which a stream of a received one does not have.
pub(super) fn uuid(path: &Path) -> Result<Uuid, Trouble> {
    let output =
        command::run(PROGRAM, &["subvolume".as_ref(), "show".as_ref(), text(path)]).map_err(Trouble::Program)?;
    shown_uuid(&String::from_utf8_lossy(&output))
        .ok_or_else(|| io::Error::other("`btrfs subvolume show` said something unexpected").into())
}

fn shown_uuid(output: &str) -> Option<Uuid> {
    // The first line is a path, which may look like anything.
    let mut lines = output.lines().skip(1);
    lines.find_map(|line| line.trim().strip_prefix("UUID:"))?.trim().parse().ok()
}

/// Starts to send a snapshot, relative to another one or whole.
pub(super) fn send(arguments: &[&str], base: Option<&Path>, target: &Path) -> Result<Running, CommandError> {
    let mut all = vec!["send".as_ref(), "-q".as_ref()];
    all.extend(arguments.iter().map(|it| std::ffi::OsStr::new(*it)));
    if let Some(base) = base {
        all.extend(["-p".as_ref(), text(base)]);
    }
    all.push(text(target));
    Running::start(PROGRAM, &all, Input::Nothing)
}

/// Reads what the kernel says of a read-only snapshot at the beginning of a stream. It is the only place where a program
/// prints a subvolume's `ctransid` exactly; see docs/adr/0003-btrfs-parents-are-checked-in-the-stream.md.
///
/// The stream is the difference to itself, which is its beginning and its end: of one without a base the kernel would go on with
/// what the snapshot holds until pipes are full.
pub(super) fn probe(path: &Path) -> Result<Header, Trouble> {
    let running = send(&["--no-data"], Some(path), path).map_err(Trouble::Program)?;
    let mut reader = Reader::new(STREAM_VERSION);
    read_while(&running, |bytes| {
        reader.take(bytes)?;
        Ok(reader.header().is_none())
    })?;
    match reader.header() {
        Some(header) => Ok(Header { parent: None, ..header.clone() }),
        None => Err(running
            .finish()
            .err()
            .map_or_else(|| StreamError("it has no header".to_owned()).into(), Trouble::Program)),
    }
}

/// Reads a program's output until it ends or `wanted` says that it is enough.
pub(super) fn read_while(
    running: &Running,
    mut wanted: impl FnMut(&[u8]) -> Result<bool, StreamError>,
) -> Result<(), Trouble> {
    let Some(mut stdout) = running.take_stdout() else { return Ok(()) };
    let mut buffer = vec![0; 64 * 1024];
    loop {
        match stdout.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(length) if !wanted(&buffer[..length])? => return Ok(()),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Tells whether two read-only snapshots hold the same. Reads what differs in metadata, up to the first change.
pub(super) fn are_equal(base: &Path, target: &Path) -> Result<bool, Trouble> {
    let running = send(&["--no-data"], Some(base), target).map_err(Trouble::Program)?;
    let mut reader = Reader::new(STREAM_VERSION);
    read_while(&running, |bytes| {
        reader.take(bytes)?;
        Ok(*reader.changes() != Changes::Some)
    })?;
    let Changes::OnlyTimes(touched) = reader.changes() else { return Ok(false) };
    running.finish().map_err(Trouble::Program)?;
    if !reader.has_ended() {
        return Err(StreamError("it has no end".to_owned()).into());
    }
    Ok(are_as_before(touched, base))
}

/// Tells whether the mtimes that a stream sets are those that the base has already.
pub(super) fn are_as_before(touched: &[Touched], base: &Path) -> bool {
    let Ok(root) = Root::open(base) else { return false };
    touched.iter().all(|touched| mtime(&root, &touched.path) == Some(touched.mtime))
}

fn mtime(root: &Root, path: &[u8]) -> Option<Time> {
    let path = if path.is_empty() { TreePath::root() } else { TreePath::parse(path).ok()? };
    let file = root.open_beneath(&path, OFlags::PATH).ok()?;
    let stat = rustix::fs::statat(&file, "", AtFlags::EMPTY_PATH).ok()?;
    Some(Time { secs: stat.st_mtime, nanos: stat.st_mtime_nsec as u32 })
}

/// Deletes a place with all subvolumes in it. What is gone already is fine.
pub(super) fn delete_all(path: &Path) -> Result<(), Trouble> {
    let mut waiting: Vec<(PathBuf, bool)> = vec![(path.to_owned(), false)];
    while let Some((path, emptied)) = waiting.pop() {
        let stat = match std::fs::symlink_metadata(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            stat => stat?,
        };
        if !stat.is_dir() {
            std::fs::remove_file(&path)?;
            continue;
        }
        if is_subvolume(&path) {
            match delete(&path) {
                Ok(()) => continue,
                // Subvolumes inside it keep it; with those gone it goes.
                Err(error) if emptied => return Err(Trouble::Program(error)),
                Err(_) => {
                    waiting.push((path.clone(), true));
                    waiting.extend(subvolumes_in(&path)?.into_iter().map(|inner| (inner, false)));
                }
            }
        } else if emptied {
            std::fs::remove_dir(&path)?;
        } else {
            waiting.push((path.clone(), true));
            for entry in std::fs::read_dir(&path)? {
                waiting.push((entry?.path(), false));
            }
        }
    }
    Ok(())
}

/// Finds the subvolumes right beneath one, however deep in its directories.
fn subvolumes_in(path: &Path) -> io::Result<Vec<PathBuf>> {
    let (mut found, mut waiting) = (Vec::new(), vec![path.to_owned()]);
    while let Some(dir) = waiting.pop() {
        for entry in std::fs::read_dir(&dir)? {
            let entry = entry?;
            if !entry.file_type()?.is_dir() {
                continue;
            }
            let path = entry.path();
            if is_subvolume(&path) { found.push(path) } else { waiting.push(path) }
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_output_of_subvolume_show_is_read() {
        let shown = shown_uuid(include_str!("testdata/show.txt")).unwrap();
        assert_eq!(shown.to_string(), "306c0ec3-0c4e-8240-b6c3-e36cc18c52ea");
        assert_eq!(shown_uuid("UUID: 306c0ec3-0c4e-8240-b6c3-e36cc18c52ea"), None);
        assert_eq!(shown_uuid("v\n\tUUID: x"), None);
    }
}
