//! Extended attributes and POSIX ACLs of any kind of entry, reached without opening it.
//!
//! Uses the `l*` calls on `/proc/self/fd/N/NAME`: the directory's descriptor keeps the path beneath the tree, and the
//! last name is not followed. That is the one way that also works for symbolic links, fifos and devices.

use std::os::fd::BorrowedFd;

use rustix::{fs::XattrFlags, io::Errno};

use super::{entry::Xattrs, root::magic_path};

/// The longest list of names and the longest value that Linux knows (`XATTR_LIST_MAX`, `XATTR_SIZE_MAX`).
pub(super) const XATTR_LIMIT: usize = 64 * 1024;

/// The most bytes of names and values together that one entry may carry, so that a record stays bounded.
pub(super) const XATTRS_LIMIT: usize = 8 * 1024 * 1024;

/// The longest name of an attribute (`XATTR_NAME_MAX`).
const NAME_LIMIT: usize = 255;

const DEFAULT_ACL: &[u8] = b"system.posix_acl_default";
const ACCESS_ACL: &[u8] = b"system.posix_acl_access";

/// Tells whether an attribute is preserved. Others (`system.nfs4_acl`, `btrfs.*`) belong to one file system.
pub(super) fn is_preserved(name: &[u8]) -> bool {
    [&b"user."[..], b"trusted.", b"security."]
        .iter()
        .any(|prefix| name.len() > prefix.len() && name.starts_with(prefix))
        || name == ACCESS_ACL
        || name == DEFAULT_ACL
}

/// Checks attributes that came from a peer; the error is the rule that is broken.
pub(super) fn check(xattrs: &[(Vec<u8>, Vec<u8>)]) -> Result<(), &'static str> {
    let mut names = 0;
    let mut total = 0;
    for (at, (name, value)) in xattrs.iter().enumerate() {
        if name.len() > NAME_LIMIT || name.contains(&0) || !is_preserved(name) {
            return Err("an extended attribute's name is not allowed");
        }
        if value.len() > XATTR_LIMIT {
            return Err("an extended attribute is longer than 64 KiB");
        }
        if at > 0 && xattrs[at - 1].0 >= *name {
            return Err("extended attributes are not in order");
        }
        names += name.len() + 1;
        total += name.len() + value.len();
    }
    match () {
        () if names > XATTR_LIMIT => Err("the list of extended attributes is longer than 64 KiB"),
        () if total > XATTRS_LIMIT => Err("the extended attributes are larger than 8 MiB"),
        () => Ok(()),
    }
}

/// How long a list of names is asked for first, in bytes: the kernel makes a buffer of the length that is offered it, and most
/// entries have few attributes.
const SHORT_LIST: usize = 256;

/// Reads attributes; keeps its buffers from one entry to the next.
#[derive(Debug)]
pub(super) struct XattrReader {
    list: Vec<u8>,
    value: Vec<u8>,
}

impl XattrReader {
    pub(super) fn new() -> Self {
        Self { list: vec![0; XATTR_LIMIT], value: vec![0; XATTR_LIMIT] }
    }

    fn list(&mut self, ask: impl Fn(&mut [u8]) -> Result<usize, Errno>) -> Result<usize, Errno> {
        match ask(&mut self.list[..SHORT_LIST]) {
            Err(Errno::RANGE) => ask(&mut self.list),
            other => other,
        }
    }

    /// Reads the preserved attributes of an entry (of the directory itself where the name is empty), sorted by name.
    pub(super) fn read(&mut self, directory: BorrowedFd<'_>, name: &[u8]) -> Result<Xattrs, Errno> {
        let path = magic_path(directory, name);
        let listed = self.list(|list| rustix::fs::llistxattr(path.as_slice(), list));
        self.values(listed, |key, value| rustix::fs::lgetxattr(path.as_slice(), key, value))
    }

    /// Reads the preserved attributes of an open file, sorted by name.
    pub(super) fn read_open(&mut self, file: BorrowedFd<'_>) -> Result<Xattrs, Errno> {
        let listed = self.list(|list| rustix::fs::flistxattr(file, list));
        self.values(listed, |key, value| rustix::fs::fgetxattr(file, key, value))
    }

    fn values(
        &mut self,
        listed: Result<usize, Errno>,
        get: impl Fn(&[u8], &mut [u8]) -> Result<usize, Errno>,
    ) -> Result<Xattrs, Errno> {
        let length = match listed {
            Ok(length) => length,
            Err(Errno::OPNOTSUPP) => 0,
            Err(error) => return Err(error),
        };
        let mut xattrs = Vec::new();
        for key in self.list[..length].split(|byte| *byte == 0).filter(|key| is_preserved(key)) {
            match get(key, &mut self.value) {
                Ok(length) => xattrs.push((key.to_vec(), self.value[..length].to_vec())),
                // Gone between the two calls, or not backed by the file system (SELinux shows such names).
                Err(Errno::NODATA | Errno::OPNOTSUPP) => {}
                Err(error) => return Err(error),
            }
        }
        xattrs.sort_unstable();
        Ok(xattrs)
    }
}

/// Sets the attributes of an entry to exactly `wanted`, given those it has. Returns the names that the user may not
/// set or remove, or that this file system does not take.
pub(super) fn write(
    directory: BorrowedFd<'_>,
    name: &[u8],
    present: &Xattrs,
    wanted: &Xattrs,
) -> Result<Vec<Vec<u8>>, Errno> {
    let mut refused = Vec::new();
    if present.is_empty() && wanted.is_empty() {
        return Ok(refused);
    }
    let path = magic_path(directory, name);
    let mut note = |key: &[u8], result: Result<(), Errno>| match result {
        Ok(()) | Err(Errno::NODATA) => Ok(()),
        Err(Errno::PERM | Errno::ACCESS | Errno::OPNOTSUPP) => {
            refused.push(key.to_vec());
            Ok(())
        }
        Err(error) => Err(error),
    };
    for (key, _) in present {
        if wanted.binary_search_by(|(other, _)| other.cmp(key)).is_err() {
            note(key, rustix::fs::lremovexattr(path.as_slice(), key.as_slice()))?;
        }
    }
    for (key, value) in wanted {
        let same = present.binary_search_by(|(other, _)| other.cmp(key)).is_ok_and(|at| present[at].1 == *value);
        if !same {
            note(key, rustix::fs::lsetxattr(path.as_slice(), key.as_slice(), value, XattrFlags::empty()))?;
        }
    }
    Ok(refused)
}

/// Takes the default ACL off a directory, so that what is made in it does not inherit it. Set again on leaving.
pub(super) fn drop_default_acl(directory: BorrowedFd<'_>) -> Result<(), Errno> {
    match rustix::fs::fremovexattr(directory, DEFAULT_ACL) {
        Ok(()) | Err(Errno::NODATA | Errno::OPNOTSUPP) => Ok(()),
        Err(error) => Err(error),
    }
}
