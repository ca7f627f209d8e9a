//! Writes a tree as a tarball.

use std::{
    fs::File,
    io::{Read as _, Write},
    os::fd::AsFd as _,
};

use super::{
    BUFFER, TAR, XATTRS,
    compression::{Compression, Encoder},
    failed, io_failed,
    manifest::Manifest,
};
use crate::{
    command::{Input, Running},
    error::Result,
    tree::root::Root,
};

/// How tar ends when a file's time of change moved while it was read (info tar, "Exit status"): another snapshot that links
/// to the same file does that. A snapshot's contents stand still; the digest in the manifest tells if they did not.
const DIFFERS: i32 = 1;

/// Writes a snapshot's tree, its manifest first. Where this fails, what was written is not a whole tarball, and readers
/// notice. `out` gets pieces of any size.
pub fn pack(root: &Root, manifest: &Manifest, compression: Compression, out: impl Write) -> Result<()> {
    const OPERATION: &str = "write tarball of";
    let shown = root.path().display().to_string();
    let broken = io_failed(OPERATION, &shown);
    let directory = File::from(root.as_fd().try_clone_to_owned().map_err(&broken)?);
    let mut out = Encoder::new(compression, out).map_err(&broken)?;
    out.write_all(&manifest.blocks().map_err(&broken)?).map_err(&broken)?;
    let tar = Running::start_holding(TAR, &arguments(), Input::Nothing, &directory);
    let tar = tar.map_err(|error| failed(OPERATION, &shown, error))?;
    if let Some(mut members) = tar.take_stdout() {
        let mut buffer = vec![0; BUFFER];
        loop {
            match members.read(&mut buffer).map_err(&broken)? {
                0 => break,
                count => out.write_all(&buffer[..count]).map_err(&broken)?,
            }
        }
    }
    match tar.finish() {
        Err(error) if error.code() != Some(DIFFERS) => return Err(failed(OPERATION, &shown, error)),
        _ => {}
    }
    out.finish().map_err(broken)
}

fn arguments() -> Vec<&'static str> {
    let mut arguments = vec![
        "--create",
        "--format=posix",
        // When a file was read is nobody's business, and equal trees make equal tarballs without it.
        "--pax-option=delete=atime,delete=ctime",
        "--sort=name",
        "--sparse",
        "--numeric-owner",
        "--acls",
        "--warning=no-file-changed",
    ];
    arguments.extend(XATTRS);
    // Its standard input is the directory.
    arguments.extend(["--file=-", "--directory=/proc/self/fd/0", "."]);
    arguments
}
