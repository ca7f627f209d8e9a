//! Trees in memory, and the driver's own delta between two of them.
//!
//! Owns what a tree is here: directories, regular files, hard links among them and symbolic links, with mode and mtime. Owners,
//! extended attributes, fifos and devices are not kept.

use std::{collections::BTreeMap, sync::Arc};

use serde::{Deserialize, Serialize};

/// Begins every delta; then come a digest and the body.
const MAGIC: &[u8] = b"flocker-memory/1\n";
const DIGEST: usize = 32;

/// A path relative to the root, as bytes. The root itself is empty.
pub(super) type Path = Vec<u8>;

/// What is at a path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Entry {
    pub(super) kind: Kind,
    pub(super) mode: u32,
    /// Seconds and nanoseconds.
    pub(super) mtime: (i64, i64),
}

/// What kind of thing is at a path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Kind {
    Directory,
    File(Contents),
    /// A further name of the file at that path, the first of them in the order of paths.
    Twin(Path),
    Link(Vec<u8>),
}

/// The bytes of a file, shared between trees.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Contents(pub(super) Arc<Vec<u8>>);

impl Serialize for Contents {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&self.0)
    }
}

impl<'de> Deserialize<'de> for Contents {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(Self(Arc::new(<Vec<u8>>::deserialize(deserializer)?)))
    }
}

/// A tree: every path and what is there, the root included.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Tree(pub(super) BTreeMap<Path, Entry>);

impl Default for Tree {
    /// An empty directory.
    fn default() -> Self {
        let root = Entry { kind: Kind::Directory, mode: 0o40755, mtime: (0, 0) };
        Self(BTreeMap::from([(Path::new(), root)]))
    }
}

impl Tree {
    /// Writes a file into the root directory.
    pub(super) fn write(&mut self, name: &str, contents: &[u8]) {
        let kind = Kind::File(Contents(Arc::new(contents.to_vec())));
        self.0.insert(name.as_bytes().to_vec(), Entry { kind, mode: 0o100_644, mtime: (0, 0) });
    }

    /// Removes a file from the root directory.
    pub(super) fn remove(&mut self, name: &str) {
        self.0.remove(name.as_bytes());
    }

    /// Tells whether nothing is in it.
    pub(super) fn is_empty(&self) -> bool {
        self.0.len() <= 1
    }

    /// Returns the sum of the sizes of its files, each counted once.
    pub(super) fn logical_bytes(&self) -> u64 {
        let files = self.0.values().filter_map(|entry| match &entry.kind {
            Kind::File(contents) => Some(contents.0.len() as u64),
            _ => None,
        });
        files.sum()
    }

    /// Returns a digest of all of it.
    pub(super) fn digest(&self) -> [u8; 32] {
        // Maps of byte strings and plain enums: serialising them cannot fail.
        *blake3::hash(&postcard::to_stdvec(self).unwrap_or_default()).as_bytes()
    }
}

/// What turns one tree into another.
#[derive(Debug, Serialize, Deserialize)]
struct Delta {
    gone: Vec<Path>,
    put: Vec<(Path, Entry)>,
    /// Those of which only mode or time changed.
    touched: Vec<(Path, u32, (i64, i64))>,
}

/// Writes the delta from `base` to `target`. The same two trees give the same bytes.
pub(super) fn write(base: Option<&Tree>, target: &Tree) -> Vec<u8> {
    let none = BTreeMap::new();
    let base = base.map_or(&none, |base| &base.0);
    let gone = base.keys().filter(|path| !target.0.contains_key(*path)).cloned().collect();
    let (mut put, mut touched) = (Vec::new(), Vec::new());
    for (path, entry) in &target.0 {
        match base.get(path) {
            Some(known) if known == entry => {}
            Some(known) if known.kind == entry.kind => touched.push((path.clone(), entry.mode, entry.mtime)),
            _ => put.push((path.clone(), entry.clone())),
        }
    }
    let delta = Delta { gone, put, touched };
    let body = postcard::to_stdvec(&delta).unwrap_or_default();
    [MAGIC, blake3::hash(&body).as_bytes(), &body].concat()
}

/// Applies a delta to `base`; `None` when it is no whole delta.
pub(super) fn apply(base: Option<&Tree>, delta: &[u8]) -> Option<Tree> {
    let rest = delta.strip_prefix(MAGIC)?;
    let (digest, body) = rest.split_at_checked(DIGEST)?;
    if blake3::hash(body).as_bytes() != digest {
        return None;
    }
    let Delta { gone, put, touched } = postcard::from_bytes(body).ok()?;
    let mut tree = Tree(base.map(|base| base.0.clone()).unwrap_or_default());
    for path in gone {
        tree.0.remove(&path)?;
    }
    tree.0.extend(put);
    for (path, mode, mtime) in touched {
        let entry = tree.0.get_mut(&path)?;
        (entry.mode, entry.mtime) = (mode, mtime);
    }
    tree.0.contains_key(&Path::new()).then_some(tree)
}
