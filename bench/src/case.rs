//! The data of each case, and what changes in it.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use clap::ValueEnum;
use flocker_tests::data::{scribble, write_half_random, write_random, write_small_files};

use crate::ground::Ground;

const GIBIBYTE: f64 = 1_073_741_824.0;

/// How large a small file is at most, in bytes.
const SMALL: usize = 2000;

/// How many files the delta is of, and how many of their blocks change.
const TABLES: u64 = 4;
const SHARE_CHANGED: u64 = 100;

/// The cases.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Kind {
    /// One file that does not compress.
    Big,
    /// One file of which half compresses.
    Half,
    /// Small files.
    Small,
    /// 1 % of the blocks of some files, beside others.
    Delta,
    /// Small files, of which none has changed.
    Noop,
    /// Small changes, a push each.
    Tiny,
    /// Small changes, a snapshot each, in one push.
    Steps,
    /// Programs and documentation of this machine.
    Real,
    /// A line of 100 ms.
    Long,
    /// A line of 100 ms that loses 0.1 %.
    Lossy,
    /// A line of 100 ms that loses 1 %.
    VeryLossy,
    /// A line of 100 ms and 20 Mbit/s, with a short queue.
    Narrow,
    /// The narrow line, two at the same time.
    Share,
    /// A tiny change over a line of 100 ms.
    Kept,
}

/// How the changes of a case are sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pushes {
    /// So many snapshots in one push.
    OneOf(u64),
    /// So many, a push each.
    OneEach(u64),
}

impl Kind {
    /// Returns the cases that a ground has, in the order of the table.
    pub(crate) fn of(ground: Ground) -> impl Iterator<Item = Self> {
        let kinds: &[Self] = match ground {
            Ground::Directory => &[Self::Big, Self::Half, Self::Small, Self::Delta, Self::Noop, Self::Tiny, Self::Real],
            Ground::Btrfs | Ground::Zfs => {
                &[Self::Big, Self::Half, Self::Small, Self::Delta, Self::Noop, Self::Tiny, Self::Steps]
            }
            Ground::Line => &[Self::Long, Self::Lossy, Self::VeryLossy, Self::Narrow, Self::Share, Self::Kept],
        };
        kinds.iter().copied()
    }
}

/// A case of some size.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Case {
    pub(crate) kind: Kind,
    /// 1 is the full size.
    pub(crate) scale: f64,
    /// How many tiny deltas there are.
    pub(crate) deltas: u64,
}

impl Case {
    /// Returns whether the receivers have something before.
    pub(crate) fn has_base(&self) -> bool {
        matches!(self.kind, Kind::Delta | Kind::Noop | Kind::Tiny | Kind::Steps)
    }

    /// Returns how many changes there are, and how they are sent.
    pub(crate) fn pushes(&self) -> Pushes {
        match self.kind {
            Kind::Tiny => Pushes::OneEach(self.deltas),
            Kind::Steps => Pushes::OneOf(self.scaled(100.0)),
            _ => Pushes::OneOf(1),
        }
    }

    /// Makes the data in each of the heads. Returns what the table calls it.
    pub(crate) fn fill(&self, heads: &[PathBuf]) -> String {
        let texts: Vec<_> = heads.iter().map(|head| self.fill_one(head)).collect();
        texts[0].clone()
    }

    /// Makes a change in each of the heads. Returns how many bytes the blocks have that it touched, where that is known.
    pub(crate) fn change(&self, heads: &[PathBuf], number: u64) -> Option<u64> {
        let changed: Vec<_> = heads.iter().map(|head| self.change_one(head, number)).collect();
        changed[0]
    }

    fn fill_one(&self, head: &Path) -> String {
        match self.kind {
            Kind::Half => {
                let bytes = self.scaled(GIBIBYTE);
                write_half_random(&head.join("half"), 3, bytes);
                format!("one file of {}, half of it compressible", size(bytes))
            }
            Kind::Small | Kind::Noop => {
                let count = self.scaled(200_000.0);
                write_small_files(head, 1, count as u32, SMALL);
                let what = if self.kind == Kind::Noop { ", nothing changed" } else { "" };
                format!("{count} small files{what}")
            }
            Kind::Delta => {
                let (bytes, beside) = (self.scaled(6.25e7), copy_real_files(head, self.scaled(2.5e8)));
                (0..TABLES).for_each(|number| write_random(&table(head, number), number, bytes));
                format!("1 % of the blocks of {TABLES} files of {}, beside {} of programs", size(bytes), size(beside))
            }
            Kind::Tiny | Kind::Steps => {
                write_small_files(head, 1, 1000, SMALL);
                match self.pushes() {
                    Pushes::OneEach(count) => format!("{count} times one of 1,000 small files changed, a push each"),
                    Pushes::OneOf(count) => format!("{count} times the same, a snapshot each, one push"),
                }
            }
            Kind::Real => format!("{} of programs and documentation", size(copy_real_files(head, self.scaled(2.5e8)))),
            Kind::Kept => {
                write_random(&head.join("file"), 2, 1000);
                "a tiny delta".to_owned()
            }
            Kind::Big | Kind::Long | Kind::Lossy | Kind::VeryLossy | Kind::Narrow | Kind::Share => {
                let bytes = self.scaled(
                    match self.kind {
                        Kind::Big => 1.0,
                        Kind::Long | Kind::Lossy => 1.0 / 32.0,
                        Kind::Narrow => 1.0 / 64.0,
                        _ => 1.0 / 128.0,
                    } * GIBIBYTE,
                );
                write_random(&head.join("big"), 2, bytes);
                format!("one file of {}, incompressible", size(bytes))
            }
        }
    }

    fn change_one(&self, head: &Path, number: u64) -> Option<u64> {
        match self.kind {
            Kind::Delta => {
                let blocks = (self.scaled(6.25e7) / SHARE_CHANGED / 4096).max(1) as u32;
                let changed = (0..TABLES).map(|number| scribble(&table(head, number), 100 + number, blocks));
                Some(changed.sum::<u64>() * 4096)
            }
            Kind::Tiny | Kind::Steps => {
                let file = number * 7 % 1000;
                write_random(&head.join(format!("d{:04}/f{file:06}", file / 100)), number, 1500);
                None
            }
            _ => None,
        }
    }

    fn scaled(&self, full: f64) -> u64 {
        (full * self.scale).max(1.0) as u64
    }
}

fn table(head: &Path, number: u64) -> PathBuf {
    head.join(format!("table-{number}"))
}

/// Copies what the machine has: programs, libraries, documentation, until there is enough. Returns how much it is.
fn copy_real_files(to: &Path, wanted: u64) -> u64 {
    let toolchain = Command::new("rustc").args(["--print", "sysroot"]).output().ok();
    let toolchain = toolchain.map(|output| PathBuf::from(String::from_utf8_lossy(&output.stdout).trim()));
    let mut copied = 0;
    for root in [Some(PathBuf::from("/usr/share")), Some(PathBuf::from("/usr/lib")), toolchain].into_iter().flatten() {
        copy_some(&root, &to.join(root.file_name().unwrap()), wanted, &mut copied);
    }
    copied
}

fn copy_some(from: &Path, to: &Path, wanted: u64, copied: &mut u64) {
    let Ok(entries) = fs::read_dir(from) else { return };
    let mut entries: Vec<_> = entries.flatten().collect();
    entries.sort_by_key(fs::DirEntry::file_name);
    fs::create_dir_all(to).unwrap();
    for entry in entries {
        if *copied >= wanted {
            return;
        }
        let Ok(kind) = entry.file_type() else { continue };
        let target = to.join(entry.file_name());
        if kind.is_dir() {
            copy_some(&entry.path(), &target, wanted, copied);
        } else if kind.is_file() {
            *copied += fs::copy(entry.path(), target).unwrap_or(0);
        }
    }
}

fn size(bytes: u64) -> String {
    if bytes < 1 << 20 { format!("{} KiB", bytes >> 10) } else { format!("{} MiB", bytes >> 20) }
}
