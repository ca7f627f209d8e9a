//! Reads a tarball into a directory.
//!
//! What arrives is hostile. GNU tar keeps it beneath the directory: it takes leading slashes off, refuses names with `..`, and
//! makes links that lead outside only after everything else. Owns which of its complaints are harmless: what it says
//! besides them, a tarball without an end, or a stream that breaks off is an error.

use std::{
    fs::File,
    io::{self, Read, Write as _},
    os::fd::AsFd as _,
};

use super::{
    BLOCK, BUFFER, TAR, XATTRS,
    compression::decode,
    failed, io_failed,
    manifest::{Front, Manifest, read_front},
};
use crate::{
    command::{CommandError, Input, Running, STDERR_LIMIT},
    driver::Finding,
    error::{Error, ErrorKind, Result},
    tree::root::Root,
};

const OPERATION: &str = "read";
const OBJECT: &str = "the tarball";

/// How many lines of tar's complaints are told.
const LINES_TOLD: usize = 5;

/// How many remarks are kept.
const FINDINGS_LIMIT: usize = 1000;

/// A tarball ends with two blocks of zeroes (pax(1)).
const END: usize = 2 * BLOCK;

/// What was unpacked.
#[derive(Debug)]
pub struct Unpacked {
    /// What it says it is.
    pub manifest: Option<Manifest>,
    /// What could not be kept, and a manifest that could not be read.
    pub findings: Vec<Finding>,
}

/// Unpacks a tarball, compressed or not, into an empty directory. Where this fails, what is in the directory is rubbish.
pub fn unpack(input: impl Read, into: &Root) -> Result<Unpacked> {
    let mut input = decode(input).map_err(corrupt)?;
    let (front, start) = read_front(&mut *input).map_err(corrupt)?;
    let heard = extract(&start, &mut *input, into)?;
    let mut findings: Vec<Finding> = Vec::new();
    for finding in heard.lines().filter_map(remark).take(FINDINGS_LIMIT) {
        if !findings.contains(&finding) {
            findings.push(finding);
        }
    }
    let manifest = match front {
        Front::Manifest(manifest) => Some(*manifest),
        Front::Nothing => None,
        Front::Unreadable(what) => {
            findings.push(Finding { path: ".".to_owned(), what });
            None
        }
    };
    Ok(Unpacked { manifest, findings })
}

/// Has tar extract `start` and the rest of `input`; returns what it says.
fn extract(start: &[u8], input: &mut dyn Read, into: &Root) -> Result<String> {
    let broken = io_failed(OPERATION, OBJECT);
    let directory = File::from(into.as_fd().try_clone_to_owned().map_err(&broken)?);
    let tar = Running::start_holding(TAR, &arguments(), Input::Pipe, &directory);
    let tar = tar.map_err(|error| failed(OPERATION, OBJECT, error))?;
    let mut pipe = tar.take_stdin();
    let mut end = End::default();
    let mut give = |bytes: &[u8]| {
        end.see(bytes);
        let Some(open) = &mut pipe else { return Ok(()) };
        match open.write_all(bytes) {
            // It has seen the end, or has given up; the rest is read all the same, since it may be cut.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => pipe = None,
            other => other.map_err(&broken)?,
        }
        Ok(())
    };
    give(start)?;
    let mut buffer = vec![0; BUFFER];
    loop {
        // Where this fails, dropping `tar` kills it: it must not take what has arrived for all there is.
        match input.read(&mut buffer).map_err(corrupt)? {
            0 => break,
            count => give(&buffer[..count])?,
        }
    }
    drop(pipe);
    let heard = match tar.finish_hearing() {
        Ok(heard) => heard,
        Err(error) if is_harmless(&error) => error.stderr().to_owned(),
        Err(error) => return Err(complaint(error)),
    };
    if !end.is_seen() {
        return Err(Error::new(OPERATION, OBJECT, ErrorKind::Corrupt("it is cut short: it has no end".to_owned())));
    }
    Ok(heard)
}

fn arguments() -> Vec<&'static str> {
    let is_root = rustix::process::geteuid().is_root();
    let mut arguments = vec![
        "--extract",
        "--preserve-permissions",
        // Nobody but root may give a file away.
        if is_root { "--same-owner" } else { "--no-same-owner" },
        "--numeric-owner",
        "--acls",
        "--delay-directory-restore",
        "--warning=no-timestamp",
        "--warning=no-unknown-keyword",
    ];
    arguments.extend(XATTRS);
    // Its standard output is the directory.
    arguments.extend(["--file=-", "--directory=/proc/self/fd/1"]);
    arguments
}

/// The last bytes of a stream.
#[derive(Default)]
struct End {
    zeroes: usize,
}

impl End {
    fn see(&mut self, bytes: &[u8]) {
        let zeroes = bytes.iter().rev().take(END).take_while(|byte| **byte == 0).count();
        if zeroes < bytes.len() {
            self.zeroes = zeroes;
        } else {
            self.zeroes = END.min(self.zeroes + zeroes);
        }
    }

    fn is_seen(&self) -> bool {
        self.zeroes >= END
    }
}

fn corrupt(error: io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::ConnectionAborted => Error::io(OPERATION, OBJECT, error),
        _ => Error::new(OPERATION, OBJECT, ErrorKind::Corrupt(error.to_string())),
    }
}

/// What tar says when an ordinary user may not make a device.
const NO_DEVICE: &str = ": Cannot mknod: Operation not permitted";

/// What it says at the end, whatever went wrong.
const AT_THE_END: &str = "tar: Exiting with failure status due to previous errors";

/// Tells whether all that went wrong is that the user may not make devices, which a receive leaves out, too.
fn is_harmless(error: &CommandError) -> bool {
    let said = error.stderr();
    let harmless = |line: &str| line.ends_with(NO_DEVICE) || line == AT_THE_END || is_warning(line);
    error.code() == Some(2) && said.len() < STDERR_LIMIT && said.lines().all(harmless)
}

/// Tells whether tar only warns.
fn is_warning(line: &str) -> bool {
    line.starts_with("tar: Removing leading ") || cannot_set(line).is_some()
}

/// Returns what tar could not set on a file, as it says it behind the name of a system call:
/// `tar: setxattrat: Cannot set 'trusted.t' extended attribute for file './f': Operation not permitted`.
fn cannot_set(line: &str) -> Option<&str> {
    let (call, rest) = line.strip_prefix("tar: ")?.split_once(": Cannot set ")?;
    call.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_').then_some(rest)
}

/// Turns what tar says into a remark.
fn remark(line: &str) -> Option<Finding> {
    let line = line.strip_prefix("tar: ")?;
    if line.starts_with("Exiting ") {
        return None;
    }
    // For each file, also for those without one.
    if cannot_set(&format!("tar: {line}")).is_some_and(|what| what.starts_with("POSIX ACLs ")) {
        return Some(Finding { path: ".".to_owned(), what: "access control lists could not be set".to_owned() });
    }
    match line.strip_suffix(&NO_DEVICE) {
        Some(path) => {
            let path = path.strip_prefix("./").unwrap_or(path).to_owned();
            Some(Finding { path, what: "only root may make a device; it is left out".to_owned() })
        }
        None => Some(Finding { path: ".".to_owned(), what: format!("tar: {line}") }),
    }
}

fn complaint(error: CommandError) -> Error {
    // A file that takes no more than a part is how tar meets a full disk first.
    let is_full = error.stderr().lines().any(|line| line.contains(": Wrote only ") && line.ends_with(" bytes"));
    let lines: Vec<String> = error.stderr().lines().take(LINES_TOLD).map(str::to_owned).collect();
    let kind = match error.into_kind() {
        _ if is_full => ErrorKind::NoSpace,
        ErrorKind::NoSpace => ErrorKind::NoSpace,
        other if lines.is_empty() => other,
        _ => ErrorKind::Corrupt(lines.join("; ")),
    };
    Error::new(OPERATION, OBJECT, kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_is_seen_however_finely_it_comes() {
        for size in [1, 7, 512, 5000] {
            let mut end = End::default();
            let bytes = [vec![1; 700], vec![0; END]].concat();
            bytes.chunks(size).for_each(|piece| end.see(piece));
            assert!(end.is_seen(), "{size}");
            end.see(b"x");
            assert!(!end.is_seen(), "{size}");
        }
    }

    #[test]
    fn a_remark_names_what_was_left_out() {
        let found = remark("tar: ./dev/null: Cannot mknod: Operation not permitted");
        assert_eq!(found.map(|finding| finding.path), Some("dev/null".to_owned()));
        assert_eq!(remark(AT_THE_END), None);
        let acls = "tar: acl_set_file_at: Cannot set POSIX ACLs for file './f': Operation not supported";
        assert_eq!(remark(acls).map(|finding| finding.path), Some(".".to_owned()));
        assert!(is_warning(acls) && !is_warning("tar: Cannot set 'x: Cannot open: Permission denied"));
    }
}
