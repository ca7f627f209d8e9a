//! Real files for the demonstration's volume: copied from what the machine has, or made up where it has too little.

use std::{
    collections::BTreeSet,
    fs,
    io::{self, Seek as _, SeekFrom, Write as _},
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
};

/// The most files, directories and links copied: enough for a tree, few enough that taking them away again is quick.
const ENTRIES_LIMIT: u64 = 5_000;

/// How near to the budget is near enough; hunting for small files that fit would only make empty directories.
const NEAR_ENOUGH: u64 = 256 << 10;

/// The largest file copied, as a part of the whole: one huge file is no tree.
const LARGEST_PART: u64 = 8;

/// The size of one made-up file.
const MADE_UP_BYTES: u64 = 256 << 10;

/// How many files get a line appended.
const EDITED: usize = 5;

/// What was written.
#[derive(Debug, Default)]
pub(super) struct Written {
    /// Regular files.
    pub(super) files: u64,
    /// Files, directories and links.
    entries: u64,
    /// Their bytes.
    pub(super) bytes: u64,
    /// Where they come from.
    pub(super) from: Vec<String>,
}

impl Written {
    fn is_enough(&self, budget: u64) -> bool {
        self.bytes + NEAR_ENOUGH >= budget || self.entries >= ENTRIES_LIMIT
    }
}

/// Fills a folder with about `budget` bytes of files.
pub(super) fn fill(place: &Path, budget: u64, stop: &AtomicBool) -> io::Result<Written> {
    let mut written = Written::default();
    for (number, source) in sources().into_iter().enumerate() {
        if written.is_enough(budget) {
            break;
        }
        let files_before = written.files;
        copy_tree(&source, &place.join(format!("tree-{number}")), budget, &mut written, stop)?;
        if written.files > files_before {
            written.from.push(source.display().to_string());
        }
    }
    // Where the machine has little to copy, or little with many files: text that nobody wrote.
    if written.bytes < budget / 2 {
        make_up(&place.join("made-up"), budget, &mut written, stop)?;
        written.from.push("made-up text".to_owned());
    }
    Ok(written)
}

/// Trees of ordinary files that a machine with a Rust toolchain, or any Linux, has.
fn sources() -> Vec<PathBuf> {
    let home = std::env::var_os("HOME").map(PathBuf::from);
    let rustup = std::env::var_os("RUSTUP_HOME").map(PathBuf::from).or(home.map(|home| home.join(".rustup")));
    let toolchains = rustup.and_then(|rustup| fs::read_dir(rustup.join("toolchains")).ok());
    let toolchains: BTreeSet<_> = toolchains.into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    let inside = toolchains.iter().flat_map(|one| [one.join("lib/rustlib/src"), one.join("share/doc/rust/html/std")]);
    let system = ["/usr/share/doc", "/usr/share", "/usr/lib"].map(PathBuf::from);
    inside.chain(system).filter(|place| place.is_dir()).collect()
}

fn copy_tree(from: &Path, to: &Path, budget: u64, written: &mut Written, stop: &AtomicBool) -> io::Result<()> {
    let mut waiting = vec![(from.to_owned(), to.to_owned())];
    while let Some((from, to)) = waiting.pop() {
        // What this user may not read is left out.
        let Ok(entries) = fs::read_dir(&from) else { continue };
        fs::create_dir_all(&to)?;
        let mut entries: Vec<_> = entries.flatten().collect();
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            going_on(stop)?;
            if written.is_enough(budget) {
                return Ok(());
            }
            let target = to.join(entry.file_name());
            let Ok(facts) = entry.metadata() else { continue };
            written.entries += 1;
            if facts.is_dir() {
                waiting.push((entry.path(), target));
            } else if facts.is_symlink() {
                if let Ok(link) = fs::read_link(entry.path()) {
                    symlink(link, target)?;
                }
            } else if facts.is_file() && facts.len() <= (budget / LARGEST_PART).min(budget - written.bytes) {
                copy_file(&entry.path(), &target, written)?;
            }
        }
    }
    Ok(())
}

fn copy_file(from: &Path, to: &Path, written: &mut Written) -> io::Result<()> {
    let Ok(mut source) = fs::File::open(from) else { return Ok(()) };
    let mut copy = fs::File::create(to)?;
    written.bytes += io::copy(&mut source, &mut copy)?;
    written.files += 1;
    // Some variety of modes, and always writable for the owner, who is to change some.
    let mode = source.metadata()?.permissions().mode();
    copy.set_permissions(fs::Permissions::from_mode(mode & 0o777 | 0o600))
}

fn make_up(place: &Path, budget: u64, written: &mut Written, stop: &AtomicBool) -> io::Result<()> {
    const WORDS: [&str; 16] = [
        "flock", "sheep", "meadow", "herd", "gate", "wool", "shepherd", "hill", "dog", "fence", "grass", "stone",
        "brook", "lamb", "barn", "night",
    ];
    fs::create_dir_all(place)?;
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut number = 0;
    while written.bytes < budget {
        going_on(stop)?;
        let mut text = String::with_capacity(MADE_UP_BYTES as usize + 16);
        while (text.len() as u64) < MADE_UP_BYTES.min(budget - written.bytes) {
            // xorshift64: the same words on every machine.
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            text.push_str(WORDS[(state >> 60) as usize]);
            text.push(if state & 0xf0 == 0 { '\n' } else { ' ' });
        }
        fs::write(place.join(format!("{number:05}.txt")), &text)?;
        written.bytes += text.len() as u64;
        written.files += 1;
        number += 1;
    }
    Ok(())
}

/// Changes a little: edits a few files, overwrites the middle of the largest, removes one, adds one. Tells what.
pub(super) fn change(place: &Path, stop: &AtomicBool) -> io::Result<Vec<String>> {
    let mut files = Vec::new();
    let mut waiting = vec![place.to_owned()];
    while let Some(folder) = waiting.pop() {
        for entry in fs::read_dir(folder)? {
            going_on(stop)?;
            let entry = entry?;
            let kind = entry.file_type()?;
            if kind.is_dir() {
                waiting.push(entry.path());
            } else if kind.is_file() {
                files.push((entry.metadata()?.len(), entry.path()));
            }
        }
    }
    files.sort();
    let name = |path: &Path| path.strip_prefix(place).unwrap_or(path).display().to_string();
    let mut told = Vec::new();

    if let Some((bytes, largest)) = files.pop() {
        let mut file = fs::File::options().write(true).open(&largest)?;
        file.seek(SeekFrom::Start(bytes / 2))?;
        file.write_all(b"one line in the middle of the largest file\n")?;
        told.push(format!("wrote one line into the middle of {}, {bytes} bytes", name(&largest)));
    }
    if files.len() > 1 {
        let (_, removed) = files.remove(files.len() / 2);
        fs::remove_file(&removed)?;
        told.push(format!("removed {}", name(&removed)));
    }
    let step = (files.len() / EDITED).max(1);
    let edited: Vec<_> = files.iter().step_by(step).take(EDITED).collect();
    for (_, path) in &edited {
        fs::File::options().append(true).open(path)?.write_all(b"one more line\n")?;
    }
    told.push(format!("appended a line to {} files", edited.len()));
    fs::write(place.join("new-file.txt"), "a file that db@one has not\n")?;
    told.push("added new-file.txt".to_owned());
    Ok(told)
}

fn going_on(stop: &AtomicBool) -> io::Result<()> {
    if stop.load(Ordering::Relaxed) { Err(io::Error::other("stopped")) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::commands::demo::compare::{Verdict, trees};

    #[test]
    fn made_up_files_reach_the_budget_and_a_change_is_seen() {
        let folder = tempfile::tempdir().unwrap();
        let (one, two) = (folder.path().join("one"), folder.path().join("two"));
        let go = AtomicBool::new(false);
        for place in [&one, &two] {
            let mut written = Written::default();
            make_up(place, 3 << 20, &mut written, &go).unwrap();
            assert!(written.bytes >= 3 << 20 && written.files >= 12, "{written:?}");
        }
        assert_eq!(change(&one, &go).unwrap().len(), 4);
        let Verdict::Different(list) = trees(&one, &two, &go).unwrap() else { panic!("they differ") };
        assert!(list.len() >= 4, "{list:?}");
    }

    #[test]
    fn a_tree_is_copied_up_to_its_budget() {
        let folder = tempfile::tempdir().unwrap();
        let (from, to) = (folder.path().join("from"), folder.path().join("to"));
        let mut written = Written::default();
        make_up(&from.join("deep/deeper"), 4 << 20, &mut written, &AtomicBool::new(false)).unwrap();
        symlink("deep", from.join("link")).unwrap();
        let mut copied = Written::default();
        copy_tree(&from, &to, 2 << 20, &mut copied, &AtomicBool::new(false)).unwrap();
        assert!(copied.bytes <= 2 << 20 && copied.bytes > 1 << 20, "{copied:?}");
        assert_eq!(fs::read_link(to.join("link")).unwrap(), Path::new("deep"));
    }

    #[test]
    fn an_interrupted_copy_ends() {
        let folder = tempfile::tempdir().unwrap();
        assert!(make_up(folder.path(), 1 << 20, &mut Written::default(), &AtomicBool::new(true)).is_err());
    }
}
