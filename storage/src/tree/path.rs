//! Paths within a tree: relative, as bytes, and ordered as a tree is walked.
//!
//! Owns the rules a name keeps. Refuses to know file descriptors; [`super::root`] opens what is named here.

use std::{cmp::Ordering, fmt, path::Path};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::error::{Error, ErrorKind, Result};

/// The longest name of one entry, in bytes: `NAME_MAX` of Linux.
pub const NAME_LIMIT: usize = 255;

/// The longest path within a tree, in bytes. Eight times what one system call takes (`PATH_MAX`), and little enough
/// that a [`ResumePoint`](crate::delta::ResumePoint) can carry it.
pub const PATH_LIMIT: usize = 32 * 1024;

/// A path relative to a tree's root, its names joined by `/`; empty for the root itself.
///
/// The order is that of a walk: a directory, then what is in it, names by their bytes.
#[derive(Default, PartialEq, Eq, Hash)]
pub struct TreePath(Vec<u8>);

impl Clone for TreePath {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }

    fn clone_from(&mut self, source: &Self) {
        self.0.clone_from(&source.0);
    }
}

impl TreePath {
    /// Returns the path of the tree's root.
    pub fn root() -> Self {
        Self::default()
    }

    /// Reads a path; refuses absolute ones, empty names, `.`, `..`, NUL, and what is too long.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let refuse = |rule| Err(Error::new("read path", show(bytes), ErrorKind::Corrupt(String::from(rule))));
        if bytes.len() > PATH_LIMIT {
            return refuse("a path is longer than 32 KiB");
        }
        if !bytes.is_empty() {
            for name in bytes.split(|byte| *byte == b'/') {
                if let Err(rule) = check_name(name) {
                    return refuse(rule);
                }
            }
        }
        Ok(Self(bytes.to_vec()))
    }

    /// Returns the path as bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Returns the path as the standard library names it; to be joined to the root's own path.
    pub fn as_path(&self) -> &Path {
        use std::os::unix::ffi::OsStrExt as _;
        Path::new(std::ffi::OsStr::from_bytes(&self.0))
    }

    /// Tells whether this is the root itself.
    pub fn is_root(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns the names from the root on.
    pub fn names(&self) -> impl Iterator<Item = &[u8]> {
        self.0.split(|byte| *byte == b'/').filter(|name| !name.is_empty())
    }

    /// Returns the number of names: 0 for the root.
    pub fn level(&self) -> usize {
        if self.0.is_empty() { 0 } else { self.0.iter().filter(|byte| **byte == b'/').count() + 1 }
    }

    /// Returns the last name; empty for the root.
    pub fn name(&self) -> &[u8] {
        self.0.rsplit(|byte| *byte == b'/').next().unwrap_or_default()
    }

    /// Returns the directory the entry lies in; `None` for the root.
    pub fn parent(&self) -> Option<Self> {
        self.parent_bytes().map(|parent| Self(parent.to_vec()))
    }

    /// Returns the path of the directory the entry lies in, as bytes; `None` for the root.
    pub(super) fn parent_bytes(&self) -> Option<&[u8]> {
        if self.0.is_empty() {
            return None;
        }
        let end = self.0.iter().rposition(|byte| *byte == b'/').unwrap_or(0);
        Some(&self.0[..end])
    }

    /// Returns the path of an entry of this directory.
    pub fn child(&self, name: &[u8]) -> Result<Self> {
        let mut path = Self(Vec::with_capacity(self.0.len() + 1 + name.len()));
        path.0.extend_from_slice(&self.0);
        match check_name(name) {
            Ok(()) => path.push(name),
            Err(rule) => {
                path.push(name);
                return Err(Error::new("read path", &path, ErrorKind::Corrupt(rule.to_owned())));
            }
        }
        if path.0.len() > PATH_LIMIT {
            return Err(Error::new("read path", &path, ErrorKind::Unsupported("a path is longer than 32 KiB".into())));
        }
        Ok(path)
    }

    /// Tells whether this is `directory` or lies beneath it.
    pub fn is_within(&self, directory: &Self) -> bool {
        directory.0.is_empty()
            || (self.0.starts_with(&directory.0) && matches!(self.0.get(directory.0.len()), None | Some(b'/')))
    }

    /// Makes it another path, which was one before.
    pub(super) fn set(&mut self, bytes: &[u8]) {
        self.0.clear();
        self.0.extend_from_slice(bytes);
    }

    pub(super) fn push(&mut self, name: &[u8]) {
        if !self.0.is_empty() {
            self.0.push(b'/');
        }
        self.0.extend_from_slice(name);
    }

    pub(super) fn pop(&mut self) {
        let end = self.0.iter().rposition(|byte| *byte == b'/').unwrap_or(0);
        self.0.truncate(end);
    }
}

/// Checks one name of a path; the error is the rule it breaks.
pub(super) fn check_name(name: &[u8]) -> std::result::Result<(), &'static str> {
    match name {
        b"" => Err("a name is empty"),
        b"." | b".." => Err("a name is '.' or '..'"),
        _ if name.len() > NAME_LIMIT => Err("a name is longer than 255 bytes"),
        _ if name.contains(&b'/') => Err("a name holds '/'"),
        _ if name.contains(&0) => Err("a name holds NUL"),
        _ => Ok(()),
    }
}

fn show(bytes: &[u8]) -> String {
    if bytes.is_empty() {
        return ".".to_owned();
    }
    let cut = &bytes[..bytes.len().min(1024)];
    String::from_utf8_lossy(cut).replace('\0', "\\0")
}

impl Ord for TreePath {
    fn cmp(&self, other: &Self) -> Ordering {
        // '/' sorts before every byte a name can hold, so that a directory's entries directly follow it.
        let key = |byte: &u8| if *byte == b'/' { 0 } else { *byte };
        let shared = shared_prefix(&self.0, &other.0);
        self.0.get(shared).map(key).cmp(&other.0.get(shared).map(key))
    }
}

/// Returns how many bytes two paths begin with alike: neighbours in a walk share most of theirs.
fn shared_prefix(one: &[u8], other: &[u8]) -> usize {
    const STEP: usize = 8;
    let (steps, others) = (one.as_chunks::<STEP>().0, other.as_chunks::<STEP>().0);
    let whole = STEP * steps.iter().zip(others).take_while(|(one, other)| one == other).count();
    whole + one[whole..].iter().zip(&other[whole..]).take_while(|(one, other)| one == other).count()
}

impl PartialOrd for TreePath {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl fmt::Display for TreePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&show(&self.0))
    }
}

impl fmt::Debug for TreePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TreePath({:?})", show(&self.0))
    }
}

impl Serialize for TreePath {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&self.0)
    }
}

impl<'de> Deserialize<'de> for TreePath {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        let bytes = <&[u8]>::deserialize(deserializer)?;
        Self::parse(bytes).map_err(|error| de::Error::custom(error.kind))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn paths_that_leave_the_tree_are_refused() {
        for bad in [&b"/a"[..], b"a//b", b"a/", b"..", b"a/../b", b"./a", b"a\0b", &[b'x'; 256], &vec![b'x'; 40_000]] {
            assert!(matches!(TreePath::parse(bad).unwrap_err().kind, ErrorKind::Corrupt(_)), "{bad:?}");
        }
        for good in [&b""[..], b"a", b"a/b", b"...", b"\xff\xfe/\n", &[b'x'; 255]] {
            assert_eq!(TreePath::parse(good).unwrap().as_bytes(), good);
        }
    }

    #[test]
    fn the_order_is_that_of_a_walk() {
        let sorted =
            ["", "a", "a/b", "a/b/c", "a/c", "a!", "a-b", "b", "long-name/x", "long-name/y/z", "long-name0", "m"];
        for pair in sorted.windows(2) {
            let [low, high] = [pair[0], pair[1]].map(|text| TreePath::parse(text.as_bytes()).unwrap());
            assert!(low < high, "{low:?} < {high:?}");
        }
    }

    #[test]
    fn parents_children_and_levels_agree() {
        let path = TreePath::parse(b"a/bc/d").unwrap();
        assert_eq!(path.level(), 3);
        assert_eq!(path.name(), b"d");
        let parent = path.parent().unwrap();
        assert_eq!(parent.as_bytes(), b"a/bc");
        assert_eq!(parent.child(b"d").unwrap(), path);
        assert!(path.is_within(&parent) && !TreePath::parse(b"a/bcd").unwrap().is_within(&parent));
        assert_eq!(TreePath::root().level(), 0);
    }
}
