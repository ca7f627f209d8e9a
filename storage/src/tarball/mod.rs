//! Tarballs: a tree written as one stream that any `tar` reads, and read back from one that any `tar` wrote.
//!
//! # Participants
//! GNU `tar` writes and reads the members (posix format, with sparse files, attributes, ACLs, numeric owners and nanosecond
//! times; it alone loses none of them). [`manifest`] says in front of them what the tree is; [`compression`] compresses.
//! # Goals
//! Memory that depends on no size. What arrives is hostile: nothing is made outside the directory it is unpacked into.
//! # Non-goals
//! Volumes and what becomes of a tree. All calls block: callers use a blocking thread.

pub mod compression;
pub mod manifest;
mod pack;
mod unpack;

use std::io;

pub use pack::pack;
pub use unpack::{Unpacked, unpack};

use crate::{
    command::{self, CommandError},
    error::{Error, ErrorKind, Result},
};

const TAR: &str = "tar";

/// How much is moved at once, in bytes.
const BUFFER: usize = 256 * 1024;

/// The unit of a tarball, in bytes (pax(1), "ustar Interchange Format").
const BLOCK: usize = 512;

/// Which attributes travel: those that a delta preserves. ACLs have records of their own.
const XATTRS: [&str; 4] =
    ["--xattrs", "--xattrs-include=user.*", "--xattrs-include=trusted.*", "--xattrs-include=security.*"];

/// Checks that the program `tar` is there and is GNU's.
pub fn check_program() -> Result<()> {
    let said = command::run(TAR, &["--version"]).map_err(|error| {
        let missing =
            || ErrorKind::Unsupported("the program tar is not there; install GNU tar on this host".to_owned());
        let kind = if error.is_missing() { missing() } else { error.into_kind() };
        Error::new("run", TAR, kind)
    })?;
    if said.starts_with(b"tar (GNU tar)") {
        return Ok(());
    }
    let why = "the program tar of this host is not GNU tar, and others lose attributes, ACLs or holes".to_owned();
    Err(Error::new("run", TAR, ErrorKind::Unsupported(why)))
}

/// An error of the program that says no more than its exit code.
fn failed(operation: &'static str, object: &str, error: CommandError) -> Error {
    Error::new(operation, object, error.into_kind())
}

fn io_failed(operation: &'static str, object: &str) -> impl Fn(io::Error) -> Error + use<> {
    let object = object.to_owned();
    move |error| Error::io(operation, &object, error)
}

#[cfg(test)]
mod tests;
