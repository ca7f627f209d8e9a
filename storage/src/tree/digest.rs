//! The digest of a tree: one BLAKE3 hash of everything that is preserved, the same wherever an equal tree lies.
//!
//! Owns the canonical form: the entries in walk order, each as its path, kind, mode, owner, time of change and extended
//! attributes; a further name of an inode as its path and the first one; behind a file the blocks of it that are not all
//! zero, each with its offset, so that holes and written zeroes are the same. Refuses to know what a digest is compared with.

use std::{fmt, os::fd::AsFd as _, str::FromStr};

use rustix::{fs::OFlags, io::Errno};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::{
    data::{next_data, read_at},
    entry::{Entry, EntryKind},
    root::Root,
    walk::{Links, Walk},
    weave::TreeView,
};
use crate::error::{Error, ErrorKind, Result};

/// What is hashed, and in which version of the form.
const CONTEXT: &str = "flocker 2026 tree digest 1";

/// The unit in which zeroes are left out, in bytes. A part of the form.
const BLOCK: usize = 64 * 1024;

/// Stands behind the last block of a file: no file has a block there.
const END_OF_FILE: u64 = u64::MAX;

/// The digest of a tree. As text 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct TreeDigest([u8; 32]);

impl fmt::Display for TreeDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for TreeDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TreeDigest({self})")
    }
}

impl FromStr for TreeDigest {
    type Err = blake3::HexError;
    fn from_str(text: &str) -> std::result::Result<Self, Self::Err> {
        Ok(Self(*blake3::Hash::from_hex(text)?.as_bytes()))
    }
}

impl Serialize for TreeDigest {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for TreeDigest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

impl TreeDigest {
    /// Reads a tree to which nobody writes. `stop` is asked again and again; where it says yes, the call fails.
    pub fn of(root: Root, links: Links, stop: &dyn Fn() -> bool) -> Result<Self> {
        let shown = root.path().display().to_string();
        let mut walk = Walk::new(root, links);
        let mut form = Form { hasher: blake3::Hasher::new_derive_key(CONTEXT), block: vec![0; BLOCK], shown, stop };
        while let Some(entry) = walk.next() {
            let entry = entry?;
            form.entry(&entry)?;
            if let EntryKind::File { size } = entry.kind {
                form.file(&mut walk, &entry, size)?;
            }
        }
        Ok(Self(*form.hasher.finalize().as_bytes()))
    }

    /// Reads what a view shows; the view must be of a snapshot.
    pub fn of_view(view: TreeView, stop: &dyn Fn() -> bool) -> Result<Self> {
        let (side, guard) = view.into_side();
        let digest = Self::of(side.root, side.links, stop);
        drop(guard);
        digest
    }
}

struct Form<'a> {
    hasher: blake3::Hasher,
    block: Vec<u8>,
    shown: String,
    stop: &'a dyn Fn() -> bool,
}

impl Form<'_> {
    fn entry(&mut self, entry: &Entry) -> Result<()> {
        self.check_stop()?;
        let Entry { path, kind, mode, uid, gid, mtime, xattrs, .. } = entry;
        let form = match kind {
            EntryKind::HardLink { .. } => postcard::to_stdvec(&(path, kind)),
            kind => postcard::to_stdvec(&(path, kind, mode, uid, gid, mtime, xattrs)),
        };
        let form = form.map_err(|error| Error::new("digest", path, ErrorKind::Corrupt(error.to_string())))?;
        self.hasher.update(&(form.len() as u64).to_le_bytes()).update(&form);
        Ok(())
    }

    fn file(&mut self, walk: &mut Walk, entry: &Entry, size: u64) -> Result<()> {
        let failed = |error: Errno| Error::io("read", &entry.path, error);
        let file = walk.open_last(OFlags::RDONLY)?;
        let mut offset = 0;
        while let Some((start, end)) = next_data(file.as_fd(), offset, size).map_err(failed)? {
            // Blocks are counted from the file's beginning, wherever its data begins.
            offset = offset.max(start - start % BLOCK as u64);
            while offset < end {
                self.check_stop()?;
                let wanted = usize::try_from(size - offset).map_or(BLOCK, |left| left.min(BLOCK));
                let count = read_at(file.as_fd(), &mut self.block[..wanted], offset).map_err(failed)?;
                if count < wanted {
                    let what = "it became shorter while it was read".to_owned();
                    let kind = ErrorKind::Tampered { path: entry.path.as_path().to_owned(), what };
                    return Err(Error::new("read", &entry.path, kind));
                }
                let block = &self.block[..count];
                if block.iter().any(|byte| *byte != 0) {
                    self.hasher.update(&offset.to_le_bytes()).update(block);
                }
                offset += count as u64;
            }
        }
        self.hasher.update(&END_OF_FILE.to_le_bytes());
        Ok(())
    }

    fn check_stop(&self) -> Result<()> {
        if !(self.stop)() {
            return Ok(());
        }
        Err(Error::io("digest", &self.shown, std::io::Error::from(std::io::ErrorKind::Interrupted)))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::{
        fs::{self, File},
        os::unix::fs::{FileExt as _, PermissionsExt as _, symlink},
        path::Path,
        time::{Duration, SystemTime},
    };

    use super::*;
    use crate::tree::copy::Copier;

    fn digest(path: &Path) -> TreeDigest {
        TreeDigest::of(Root::open(path).unwrap(), Links::ByInode, &|| false).unwrap()
    }

    fn sample(path: &Path) {
        fs::create_dir(path.join("folder")).unwrap();
        fs::write(path.join("folder/file"), "contents").unwrap();
        fs::hard_link(path.join("folder/file"), path.join("name")).unwrap();
        symlink("name", path.join("link")).unwrap();
        let sparse = File::create(path.join("sparse")).unwrap();
        sparse.set_len(300_000).unwrap();
        sparse.write_all_at(b"data", 200_000).unwrap();
    }

    fn copy(from: &Path, to: &Path) {
        let source = Root::open(from).unwrap();
        let mut copier = Copier::new(Root::open(to).unwrap());
        for entry in Walk::new(source.try_clone().unwrap(), Links::ByInode) {
            copier.copy(&source, &entry.unwrap()).unwrap();
        }
        copier.finish().unwrap();
    }

    #[test]
    fn equal_trees_have_one_digest_wherever_they_lie() {
        let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        sample(one.path());
        copy(one.path(), other.path());
        assert_eq!(digest(one.path()), digest(other.path()));
    }

    #[test]
    fn a_hole_and_written_zeroes_are_the_same() {
        let folder = tempfile::tempdir().unwrap();
        sample(folder.path());
        let sparse = File::options().write(true).open(folder.path().join("sparse")).unwrap();
        let modified = sparse.metadata().unwrap().modified().unwrap();
        let before = digest(folder.path());
        sparse.write_all_at(&vec![0; 100_000], 0).unwrap();
        sparse.set_modified(modified).unwrap();
        assert_eq!(digest(folder.path()), before);
    }

    #[test]
    fn whatever_is_preserved_makes_a_difference() {
        let changes: [fn(&Path); 7] = [
            |path| fs::set_permissions(path.join("name"), fs::Permissions::from_mode(0o600)).unwrap(),
            |path| fs::write(path.join("new"), "").unwrap(),
            |path| fs::rename(path.join("link"), path.join("link2")).unwrap(),
            |path| {
                let file = File::options().write(true).open(path.join("name")).unwrap();
                file.set_modified(SystemTime::UNIX_EPOCH + Duration::from_nanos(1)).unwrap();
            },
            |path| {
                let file = File::options().write(true).open(path.join("sparse")).unwrap();
                let modified = file.metadata().unwrap().modified().unwrap();
                file.write_all_at(b"d", 3).unwrap();
                file.set_modified(modified).unwrap();
            },
            |path| {
                let file = File::options().write(true).open(path.join("sparse")).unwrap();
                let modified = file.metadata().unwrap().modified().unwrap();
                file.set_len(300_001).unwrap();
                file.set_modified(modified).unwrap();
            },
            |path| {
                // The same bytes, but an inode of its own.
                let root = fs::metadata(path).unwrap().modified().unwrap();
                let modified = fs::metadata(path.join("name")).unwrap().modified().unwrap();
                fs::remove_file(path.join("name")).unwrap();
                fs::write(path.join("name"), "contents").unwrap();
                File::options().write(true).open(path.join("name")).unwrap().set_modified(modified).unwrap();
                File::open(path).unwrap().set_modified(root).unwrap();
            },
        ];
        for (number, change) in changes.into_iter().enumerate() {
            let folder = tempfile::tempdir().unwrap();
            sample(folder.path());
            let before = digest(folder.path());
            change(folder.path());
            assert_ne!(digest(folder.path()), before, "change {number}");
        }
    }

    #[test]
    fn the_form_stays_as_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        fs::write(path.join("file"), "contents").unwrap();
        for entry in [path.join("file"), path.to_owned()] {
            fs::set_permissions(&entry, fs::Permissions::from_mode(0o700)).unwrap();
            File::open(&entry).unwrap().set_modified(SystemTime::UNIX_EPOCH).unwrap();
        }
        let owner = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        if owner == (0, 0) {
            assert_eq!(digest(path).to_string(), "b301ba31365d9615b70f74ba86532020b616f96cf515e36e0b2d0703fa5beacc");
        }
        assert_eq!(digest(path).to_string().parse::<TreeDigest>().unwrap(), digest(path));
    }

    #[test]
    fn a_digest_that_is_not_wanted_any_more_ends() {
        let folder = tempfile::tempdir().unwrap();
        assert!(TreeDigest::of(Root::open(folder.path()).unwrap(), Links::ByInode, &|| true).is_err());
    }
}
