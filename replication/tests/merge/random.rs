//! Random trees: a small file system that is edited at random. The same seed makes the same trees.

use std::collections::BTreeMap;

use flocker_replication::merge::Version;
use flocker_storage::tree::{entry::EntryKind, path::TreePath};

use crate::rig::{Listing, meta};

/// Small and good enough: xorshift64*.
#[derive(Clone)]
pub(crate) struct Dice(pub(crate) u64);

impl Dice {
    pub(crate) fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) % sides
    }
}

/// A file system: names of inodes.
#[derive(Debug, Clone)]
pub(crate) struct Model {
    inodes: Vec<Version>,
    names: BTreeMap<TreePath, usize>,
}

impl Model {
    pub(crate) fn new() -> Self {
        let root = Version { kind: EntryKind::Directory, content: 0, meta: meta(0), group: None };
        Self { inodes: vec![root], names: BTreeMap::from([(TreePath::root(), 0)]) }
    }

    pub(crate) fn listing(&self) -> Listing {
        let mut first: BTreeMap<usize, (&TreePath, u32)> = BTreeMap::new();
        for (path, ino) in &self.names {
            first.entry(*ino).or_insert((path, 0)).1 += 1;
        }
        let version = |(path, ino): (&TreePath, &usize)| {
            let (head, count) = first[ino];
            let group = (count > 1).then(|| head.clone());
            (path.clone(), Version { group, ..self.inodes[*ino].clone() })
        };
        self.names.iter().map(version).collect()
    }

    fn pick(&self, dice: &mut Dice, wanted: impl Fn(&Version) -> bool) -> Option<TreePath> {
        let fit: Vec<&TreePath> =
            self.names.iter().filter(|(_, ino)| wanted(&self.inodes[**ino])).map(|(p, _)| p).collect();
        (!fit.is_empty()).then(|| fit[dice.roll(fit.len() as u64) as usize].clone())
    }

    fn free(&self, dice: &mut Dice) -> Option<TreePath> {
        let parent = self.pick(dice, |version| version.kind == EntryKind::Directory)?;
        let name = ["a", "b", "c", "d"][dice.roll(4) as usize];
        let path = parent.child(name.as_bytes()).unwrap();
        (path.level() < 4 && !self.names.contains_key(&path)).then_some(path)
    }

    fn remove(&mut self, gone: &TreePath) {
        self.names.retain(|path, _| !path.is_within(gone));
    }

    fn add(&mut self, at: TreePath, dice: &mut Dice) {
        let size = 1 + dice.roll(3);
        let (kind, content) = match dice.roll(10) {
            0..=5 => (EntryKind::File { size }, size * 10 + dice.roll(2)),
            6 => (EntryKind::Symlink { target: vec![b'0' + size as u8] }, 0),
            7 => (EntryKind::Fifo, 0),
            _ => (EntryKind::Directory, 0),
        };
        let meta = meta(dice.roll(9) as i64);
        self.inodes.push(Version { kind, content, meta, group: None });
        self.names.insert(at, self.inodes.len() - 1);
    }

    pub(crate) fn edit(&mut self, dice: &mut Dice) {
        let is_plain = |version: &Version| version.kind != EntryKind::Directory;
        let any = |_: &Version| true;
        match dice.roll(14) {
            0..=3 => {
                if let Some(at) = self.free(dice) {
                    self.add(at, dice);
                }
            }
            4 | 5 => match self.pick(dice, any) {
                Some(at) if !at.is_root() => self.remove(&at),
                _ => {}
            },
            6 | 7 => {
                if let Some(at) = self.pick(dice, |version| matches!(version.kind, EntryKind::File { .. })) {
                    let ino = self.names[&at];
                    let size = 1 + dice.roll(3);
                    self.inodes[ino].kind = EntryKind::File { size };
                    self.inodes[ino].content = size * 10 + dice.roll(2);
                    self.inodes[ino].meta.mtime.secs = dice.roll(9) as i64;
                }
            }
            8 | 9 => {
                if let Some(at) = self.pick(dice, any) {
                    let meta = &mut self.inodes[self.names[&at]].meta;
                    match dice.roll(4) {
                        0 => meta.mode = 0o600 + dice.roll(3) as u32,
                        1 => meta.owner.0 = dice.roll(3) as u32,
                        2 => meta.mtime.secs = dice.roll(9) as i64,
                        _ => {
                            let name = [b"user.a".to_vec(), b"user.b".to_vec()][dice.roll(2) as usize].clone();
                            meta.xattrs.retain(|(key, _)| *key != name);
                            if dice.roll(3) > 0 {
                                meta.xattrs.push((name, vec![b'0' + dice.roll(3) as u8]));
                                meta.xattrs.sort();
                            }
                        }
                    }
                }
            }
            10 | 11 => {
                if let (Some(of), Some(at)) = (self.pick(dice, is_plain), self.free(dice)) {
                    self.names.insert(at, self.names[&of]);
                }
            }
            12 => {
                if let Some(at) = self.pick(dice, any).filter(|at| !at.is_root()) {
                    self.remove(&at);
                    self.add(at, dice);
                }
            }
            _ => {
                // A rename, of a directory with all that is in it.
                if let (Some(from), Some(to)) = (self.pick(dice, any), self.free(dice))
                    && !from.is_root()
                    && !to.is_within(&from)
                {
                    let moved: Vec<_> =
                        self.names.iter().filter(|(p, _)| p.is_within(&from)).map(|(p, i)| (p.clone(), *i)).collect();
                    self.remove(&from);
                    for (old, ino) in moved {
                        let rest = &old.as_bytes()[from.as_bytes().len()..];
                        let new = TreePath::parse(&[to.as_bytes(), rest].concat()).unwrap();
                        self.names.insert(new, ino);
                    }
                }
            }
        }
    }

    pub(crate) fn edited(&self, dice: &mut Dice, most: u64) -> Self {
        let mut edited = self.clone();
        (0..dice.roll(most + 1)).for_each(|_| edited.edit(dice));
        edited
    }
}

pub(crate) fn three(seed: u64) -> (Listing, Listing, Listing) {
    let mut dice = Dice(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
    let mut base = Model::new();
    (0..dice.roll(14)).for_each(|_| base.edit(&mut dice));
    let most = 1 + dice.roll(6);
    let (ours, theirs) = (base.edited(&mut dice, most), base.edited(&mut dice, most));
    (base.listing(), ours.listing(), theirs.listing())
}
