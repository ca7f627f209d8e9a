//! Compares two trees entry by entry, by a walk of its own: the proof must not rest on what it proves.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Read as _},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
};

/// How many differences are told.
const TOLD: usize = 20;

/// How much of two files is compared at a time, in bytes.
const BLOCK: usize = 256 << 10;

/// What a comparison gave.
#[derive(Debug)]
pub(super) enum Verdict {
    /// Both are equal.
    Same {
        /// Files, directories and links, the root included.
        entries: usize,
        /// Bytes of contents read from each side.
        bytes: u64,
    },
    /// The first differences, in words.
    Different(Vec<String>),
}

/// What is compared of each entry, contents aside.
#[derive(Debug, PartialEq, Eq)]
struct Facts {
    kind_and_mode: u32,
    /// 0 for directories, whose size is the file system's business.
    size: u64,
    modified: (i64, i64),
    target: Option<PathBuf>,
}

/// Compares two trees: names, kinds, modes, sizes, times, link targets and contents.
pub(super) fn trees(left: &Path, right: &Path, stop: &AtomicBool) -> io::Result<Verdict> {
    let (ours, theirs) = (listing(left, stop)?, listing(right, stop)?);
    let mut differences = Vec::new();
    let mut bytes = 0;
    for (path, facts) in &ours {
        going_on(stop)?;
        let name = if path.as_os_str().is_empty() { "(the root)".to_owned() } else { path.display().to_string() };
        match theirs.get(path) {
            None => differences.push(format!("{name} is missing on the right")),
            Some(other) if other != facts => differences.push(format!("{name}: {facts:?} against {other:?}")),
            Some(_) if facts.is_file() => {
                if !same_contents(&left.join(path), &right.join(path), stop)? {
                    differences.push(format!("{name}: other contents"));
                }
                bytes += facts.size;
            }
            Some(_) => {}
        }
    }
    let extra = theirs.keys().filter(|path| !ours.contains_key(*path));
    differences.extend(extra.map(|path| format!("{} is missing on the left", path.display())));
    if differences.is_empty() {
        return Ok(Verdict::Same { entries: ours.len(), bytes });
    }
    let more = differences.len().saturating_sub(TOLD);
    differences.truncate(TOLD);
    if more > 0 {
        differences.push(format!("and {more} more"));
    }
    Ok(Verdict::Different(differences))
}

impl Facts {
    fn of(path: &Path, found: &fs::Metadata) -> io::Result<Self> {
        Ok(Self {
            kind_and_mode: found.mode(),
            size: if found.is_dir() { 0 } else { found.len() },
            modified: (found.mtime(), found.mtime_nsec()),
            target: found.is_symlink().then(|| fs::read_link(path)).transpose()?,
        })
    }

    fn is_file(&self) -> bool {
        // S_IFMT and S_IFREG, inode(7).
        self.kind_and_mode & 0o170_000 == 0o100_000
    }
}

fn listing(root: &Path, stop: &AtomicBool) -> io::Result<BTreeMap<PathBuf, Facts>> {
    // The root itself may be a symlink: that is what a mount is without root.
    let mut found = BTreeMap::from([(PathBuf::new(), Facts::of(root, &fs::metadata(root)?)?)]);
    let mut waiting = vec![PathBuf::new()];
    while let Some(folder) = waiting.pop() {
        for entry in fs::read_dir(root.join(&folder))? {
            going_on(stop)?;
            let entry = entry?;
            let path = folder.join(entry.file_name());
            let facts = entry.metadata()?;
            if facts.is_dir() {
                waiting.push(path.clone());
            }
            found.insert(path, Facts::of(&entry.path(), &facts)?);
        }
    }
    Ok(found)
}

fn same_contents(left: &Path, right: &Path, stop: &AtomicBool) -> io::Result<bool> {
    let (mut left, mut right) = (fs::File::open(left)?, fs::File::open(right)?);
    let (mut ours, mut theirs) = (Vec::with_capacity(BLOCK), Vec::with_capacity(BLOCK));
    loop {
        going_on(stop)?;
        ours.clear();
        theirs.clear();
        left.by_ref().take(BLOCK as u64).read_to_end(&mut ours)?;
        right.by_ref().take(BLOCK as u64).read_to_end(&mut theirs)?;
        if ours != theirs {
            return Ok(false);
        }
        if ours.is_empty() {
            return Ok(true);
        }
    }
}

fn going_on(stop: &AtomicBool) -> io::Result<()> {
    if stop.load(Ordering::Relaxed) { Err(io::Error::other("stopped")) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::{
        fs::{FileTimes, Permissions},
        os::unix::fs::{PermissionsExt as _, symlink},
        time::{Duration, SystemTime},
    };

    use super::*;

    /// Makes a small tree whose times are all the same.
    fn tree(root: &Path) {
        fs::create_dir_all(root.join("inner")).unwrap();
        fs::write(root.join("inner/file"), "contents").unwrap();
        symlink("inner/file", root.join("link")).unwrap();
        let then = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
        let times = FileTimes::new().set_modified(then).set_accessed(then);
        for path in ["inner/file", "inner", ""] {
            fs::File::open(root.join(path)).unwrap().set_times(times).unwrap();
        }
        let link_time = rustix::fs::Timespec { tv_sec: 1_000_000_000, tv_nsec: 0 };
        let times = rustix::fs::Timestamps { last_access: link_time, last_modification: link_time };
        rustix::fs::utimensat(rustix::fs::CWD, root.join("link"), &times, rustix::fs::AtFlags::SYMLINK_NOFOLLOW)
            .unwrap();
    }

    fn differences(change: impl FnOnce(&Path)) -> Vec<String> {
        let folder = tempfile::tempdir().unwrap();
        let (left, right) = (folder.path().join("left"), folder.path().join("right"));
        tree(&left);
        tree(&right);
        change(&right);
        match trees(&left, &right, &AtomicBool::new(false)).unwrap() {
            Verdict::Same { entries, bytes } => {
                assert_eq!((entries, bytes), (4, 8));
                Vec::new()
            }
            Verdict::Different(list) => list,
        }
    }

    #[test]
    fn equal_trees_are_equal() {
        assert_eq!(differences(|_| ()), Vec::<String>::new());
    }

    #[test]
    fn a_mode_a_time_or_a_byte_is_a_difference() {
        let mode = |root: &Path| fs::set_permissions(root.join("inner/file"), Permissions::from_mode(0o600)).unwrap();
        assert_eq!(differences(mode).len(), 1);
        let time = |root: &Path| fs::File::open(root.join("inner")).unwrap().set_modified(SystemTime::now()).unwrap();
        assert_eq!(differences(time).len(), 1);
        let byte = |root: &Path| {
            let before = fs::metadata(root.join("inner/file")).unwrap().modified().unwrap();
            fs::write(root.join("inner/file"), "Contents").unwrap();
            fs::File::open(root.join("inner/file")).unwrap().set_modified(before).unwrap();
        };
        assert!(differences(byte)[0].contains("other contents"));
    }

    #[test]
    fn what_is_on_one_side_only_is_a_difference() {
        let extra = differences(|root| fs::write(root.join("extra"), "").unwrap());
        assert!(extra.iter().any(|line| line == "extra is missing on the left"), "{extra:?}");
        let missing = differences(|root| fs::remove_file(root.join("link")).unwrap());
        assert!(missing.iter().any(|line| line == "link is missing on the right"), "{missing:?}");
    }
}
