//! Streams that a hostile peer could send: each rule has its test, and nothing outside is ever touched.
#![allow(clippy::unwrap_used)]

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use super::{
    apply::{Applier, Sharing},
    entry::{Metadata, Time},
    path::TreePath,
    root::Root,
    stream_digest::StreamDigest,
    wire::{Basis, MAGIC, NodeKind, Place, Position, Raw, Record},
};
use crate::error::{Error, ErrorKind};
use bytes::Bytes;

struct Yard {
    folder: tempfile::TempDir,
    dest: PathBuf,
}

impl Yard {
    /// A destination with some contents, and a neighbour that must stay as it is.
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let dest = folder.path().join("dest");
        fs::create_dir(&dest).unwrap();
        fs::create_dir(folder.path().join("outside")).unwrap();
        fs::write(folder.path().join("outside/canary"), b"untouched").unwrap();
        symlink(folder.path().join("outside"), dest.join("door")).unwrap();
        symlink("../outside", dest.join("relative-door")).unwrap();
        fs::create_dir(dest.join("dir")).unwrap();
        fs::write(dest.join("file"), b"old").unwrap();
        Self { folder, dest }
    }

    fn applier(&self) -> Applier {
        let dest = Root::open(&self.dest).unwrap();
        Applier::new(dest, None, Sharing::Exclusive, None, None).unwrap()
    }

    fn check_outside(&self) {
        let names: Vec<_> =
            fs::read_dir(self.folder.path().join("outside")).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names, ["canary"]);
        assert_eq!(fs::read(self.folder.path().join("outside/canary")).unwrap(), b"untouched");
        assert_eq!(fs::read_dir(self.folder.path()).unwrap().count(), 2);
    }

    #[track_caller]
    fn refused(&self, records: &[Record<'_>], rule: &str) {
        self.refused_bytes(&stream(records), rule);
    }

    #[track_caller]
    fn refused_bytes(&self, bytes: &[u8], rule: &str) {
        let mut applier = self.applier();
        let result = applier.feed(Bytes::copy_from_slice(bytes)).and_then(|()| applier.finish().map(drop));
        self.check_outside();
        match result {
            Err(Error { kind: ErrorKind::Corrupt(why), .. }) if why.contains(rule) => {}
            other => panic!("wanted {rule:?}, got {other:?}"),
        }
    }

    #[track_caller]
    fn accepted(&self, records: &[Record<'_>]) {
        let mut applier = self.applier();
        applier.feed(stream(records).into()).unwrap();
        applier.finish().unwrap();
        self.check_outside();
    }
}

fn frame(record: &Record<'_>) -> Vec<u8> {
    let body = postcard::to_stdvec(record).unwrap();
    [&(body.len() as u32).to_le_bytes()[..], &body].concat()
}

/// A whole stream of these records, its start and its end being right.
fn stream(records: &[Record<'_>]) -> Vec<u8> {
    let (mut bytes, mut digest) = (Vec::new(), StreamDigest::default());
    for record in std::iter::once(&START).chain(records) {
        let frame = frame(record);
        if record.place().is_some() && digest.has_data() {
            digest.end_data();
        }
        match record {
            Record::Data { bytes, .. } => {
                digest.frames(&frame[..frame.len() - bytes.0.len()]);
                digest.data(bytes.0);
            }
            record if record.is_digest() => {}
            Record::Contents { .. } => {
                digest.frames(&frame);
                digest.state();
            }
            _ => digest.frames(&frame),
        }
        bytes.extend(frame);
    }
    let digest = digest.end(1, 0);
    bytes.extend(frame(&Record::End { entries: 1, logical_bytes: 0, digest }));
    bytes
}

const START: Record<'static> = Record::Start { magic: MAGIC, resume: None };

fn metadata() -> Metadata {
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    Metadata { mode: 0o755, uid, gid, mtime: Time::default(), xattrs: Vec::new() }
}

fn at(level: u32, name: &[u8]) -> Place<'_> {
    Place { level, name: Raw(name) }
}

fn root() -> Record<'static> {
    Record::Directory { at: at(0, b""), metadata: metadata() }
}

fn directory(level: u32, name: &[u8]) -> Record<'_> {
    Record::Directory { at: at(level, name), metadata: metadata() }
}

fn file(name: &[u8], size: u64) -> Record<'_> {
    Record::File { at: at(1, name), metadata: metadata(), size, basis: Basis::Fresh, from: None }
}

fn data(offset: u64, bytes: &[u8]) -> Record<'_> {
    Record::Data { offset, bytes: Raw(bytes) }
}

fn contents(bytes: &[u8]) -> Record<'static> {
    Record::Contents { digest: *blake3::hash(bytes).as_bytes() }
}

fn link<'a>(name: &'a [u8], target: &[u8]) -> Record<'a> {
    Record::Node { at: at(1, name), metadata: metadata(), kind: NodeKind::Symlink { target: target.to_vec() } }
}

fn hard_link<'a>(name: &'a [u8], to: &[u8]) -> Record<'a> {
    Record::HardLink { at: at(1, name), to: TreePath::parse(to).unwrap() }
}

#[test]
fn a_right_stream_is_accepted() {
    Yard::new().accepted(&[root(), file(b"f", 3), data(0, b"abc"), link(b"l", b"/etc")]);
}

#[test]
fn names_that_leave_the_directory_are_refused() {
    for (name, rule) in [
        (&b".."[..], "'.' or '..'"),
        (b".", "'.' or '..'"),
        (b"", "empty"),
        (b"a/b", "holds '/'"),
        (b"../outside", "holds '/'"),
        (b"/etc", "holds '/'"),
        (b"a\0b", "NUL"),
        (&[b'x'; 256], "255"),
    ] {
        Yard::new().refused(&[root(), file(name, 0)], rule);
        Yard::new().refused(&[root(), directory(1, name)], rule);
        Yard::new().refused(&[root(), Record::Remove { at: at(1, name) }], rule);
        Yard::new().refused(&[root(), link(name, b"t")], rule);
    }
}

#[test]
fn nothing_is_made_through_a_symbolic_link() {
    let yard = Yard::new();
    // The stream makes the link itself, then treats it as a directory.
    let inside = Record::File { at: at(2, b"x"), metadata: metadata(), size: 0, basis: Basis::Fresh, from: None };
    yard.refused(&[root(), link(b"l", b"../outside"), inside.clone()], "not announced");
    // A link of the base that is announced as a directory becomes one.
    Yard::new().accepted(&[root(), directory(1, b"door"), inside]);
    // A file is written in place of a link, never through it.
    let yard = Yard::new();
    yard.accepted(&[root(), file(b"door", 1), data(0, b"x")]);
    assert!(fs::symlink_metadata(yard.dest.join("door")).unwrap().is_file());
    let existing =
        Record::File { at: at(1, b"door"), metadata: metadata(), size: 1, basis: Basis::Existing, from: None };
    Yard::new().refused(&[root(), existing, data(0, b"x")], "base does not have");
}

#[test]
fn hard_links_stay_inside_and_point_back() {
    let missing = if rustix::process::geteuid().is_root() { "not there" } else { "" };
    if !missing.is_empty() {
        Yard::new().refused(&[root(), hard_link(b"l", b"door/canary")], missing);
        Yard::new().refused(&[root(), hard_link(b"l", b"absent")], missing);
        Yard::new().refused(&[root(), hard_link(b"l", b"dir")], missing);
    }
    Yard::new().refused(&[root(), hard_link(b"a", b"file")], "before");
    Yard::new().refused(&[root(), hard_link(b"file", b"file")], "before");
    let to_parent = Record::HardLink { at: at(2, b"x"), to: TreePath::parse(b"dir").unwrap() };
    Yard::new().refused(&[root(), directory(1, b"dir"), to_parent], "before");
    let body = [&[6, 1, 1, b'n', 4], &b"../x"[..]].concat();
    let mut bytes = [frame(&START), frame(&root())].concat();
    bytes.extend((body.len() as u32).to_le_bytes());
    bytes.extend(body);
    Yard::new().refused_bytes(&bytes, "cannot be read");
}

#[test]
fn wrong_order_and_duplicates_are_refused() {
    Yard::new().refused(&[root(), file(b"b", 0), file(b"a", 0)], "out of order");
    Yard::new().refused(&[root(), file(b"a", 0), file(b"a", 0)], "twice");
    Yard::new().refused(&[root(), directory(1, b"d"), root()], "root comes twice");
    Yard::new().refused(&[root(), directory(1, b"d"), directory(2, b"e"), file(b"c", 0)], "out of order");
    Yard::new().refused(&[file(b"a", 0)], "not announced");
    Yard::new().refused(&[root(), directory(2, b"d")], "not announced");
    Yard::new().refused(&[root(), directory(u32::MAX, b"d")], "not announced");
    Yard::new().refused(&[root(), file(b"a", 0), START], "starts twice");
    let root_file = Record::File { at: at(0, b""), metadata: metadata(), size: 0, basis: Basis::Fresh, from: None };
    Yard::new().refused(&[root_file], "root is not a directory");
}

#[test]
fn absurd_sizes_and_offsets_are_refused() {
    Yard::new().refused(&[root(), file(b"f", 1 << 63)], "2^63");
    Yard::new().refused(&[root(), file(b"f", 2), data(0, b"abc")], "behind its end");
    Yard::new().refused(&[root(), file(b"f", 9), data(u64::MAX, b"abc")], "behind its end");
    Yard::new().refused(&[root(), file(b"f", 9), data(0, b"abc"), data(2, b"c")], "out of order");
    Yard::new().refused(&[root(), file(b"f", 9), Record::Hole { offset: 1, length: u64::MAX }], "behind its end");
    Yard::new().refused(&[root(), file(b"f", 9), Record::Hole { offset: 1, length: 0 }], "hole is empty");
    Yard::new().refused(&[root(), file(b"f", 9), data(0, b"")], "data record is empty");
    Yard::new().refused(&[root(), data(0, b"x")], "without a file");
    Yard::new().refused(&[root(), file(b"f", 1 << 20), data(0, &vec![0; 256 * 1024 + 1])], "256 KiB");
    Yard::new().refused_bytes(&[frame(&START), u32::MAX.to_le_bytes().to_vec()].concat(), "longer than");
    Yard::new().refused_bytes(&[frame(&START), vec![0; 4]].concat(), "empty");
}

#[test]
fn absurd_metadata_is_refused() {
    let with = |change: &dyn Fn(&mut Metadata)| {
        let mut metadata = metadata();
        change(&mut metadata);
        [root(), Record::Node { at: at(1, b"n"), metadata, kind: NodeKind::Fifo }]
    };
    let yard = Yard::new();
    yard.refused(&with(&|m| m.mode = 0o10000), "mode");
    yard.refused(&with(&|m| m.mtime.nanos = 1_000_000_000), "nanoseconds");
    yard.refused(&with(&|m| m.xattrs = vec![(b"user.a".to_vec(), vec![0; 65537])]), "64 KiB");
    let many = (0..700).map(|n| (format!("user.{n:0>100}").into_bytes(), Vec::new())).collect::<Vec<_>>();
    yard.refused(&with(&|m| m.xattrs = many.clone()), "64 KiB");
    yard.refused(&with(&|m| m.xattrs = vec![(b"system.secret".to_vec(), Vec::new())]), "not allowed");
    yard.refused(&with(&|m| m.xattrs = vec![(b"user.a\0b".to_vec(), Vec::new())]), "not allowed");
    let twice = vec![(b"user.a".to_vec(), Vec::new()); 2];
    yard.refused(&with(&|m| m.xattrs = twice.clone()), "not in order");
    yard.refused(&[root(), link(b"l", b"")], "target");
    yard.refused(&[root(), link(b"l", &[b'x'; 4096])], "target");
    yard.refused(&[root(), link(b"l", b"a\0b")], "target");
}

#[test]
fn unknown_records_and_versions_are_refused() {
    let mut bytes = frame(&START);
    bytes.extend([1, 0, 0, 0, 11]);
    Yard::new().refused_bytes(&bytes, "unknown kind");
    let mut bytes = frame(&START);
    bytes.extend([3, 0, 0, 0, 4, 1, 1, 0]);
    Yard::new().refused_bytes(&[bytes, vec![9]].concat(), "without a file");
    Yard::new().refused_bytes(&frame(&Record::Start { magic: *b"fltre2", resume: None }), "not a flocker-tree/1");
    let mut long = frame(&START);
    long.extend([4, 0, 0, 0, 4, 1, 1, 9]);
    Yard::new().refused_bytes(&long, "bytes behind its end");
}

#[test]
fn each_byte_of_files_and_what_is_between_them_counts() {
    let [f, g] = [file(b"f", 7), file(b"g", 3)];
    let whole = stream(&[
        root(),
        f,
        data(0, b"abc"),
        data(3, b"defg"),
        g,
        data(0, b"abc"),
        file(b"h", 4),
        contents(b"1234"),
        data(0, b"12"),
        data(2, b"34"),
    ]);
    for place in 0..whole.len() {
        for bit in [1, 0x80] {
            let mut damaged = whole.clone();
            damaged[place] ^= bit;
            Yard::new().refused_bytes(&damaged, "");
        }
    }
    let checkpoint = |digest| Record::Checkpoint { digest };
    let half = [root(), file(b"f", 7), data(0, b"abc"), checkpoint([0; 32])];
    Yard::new().refused(&half, "digest differs");
}

#[test]
fn a_stated_digest_is_that_of_all_the_data() {
    Yard::new().accepted(&[root(), file(b"f", 3), contents(b"abc"), data(0, b"abc"), file(b"g", 1), data(0, b"x")]);
    Yard::new().accepted(&[root(), file(b"f", 4), contents(b"abcd"), data(0, b"ab"), data(2, b"cd")]);
    Yard::new().accepted(&[root(), file(b"f", 0), contents(b"")]);
    let refused = |records: &[Record<'_>], rule| {
        Yard::new().refused(&[&[root(), file(b"f", 3)], records].concat(), rule);
    };
    refused(&[contents(b"abd"), data(0, b"abc")], "damaged at the sender");
    refused(&[contents(b"abc"), data(0, b"ab")], "gap");
    refused(&[contents(b"\0bc"), data(1, b"bc")], "gap");
    refused(&[contents(b"a\0c"), data(0, b"a"), data(2, b"c")], "gap");
    refused(&[contents(b"ab\0"), data(0, b"ab"), Record::Hole { offset: 2, length: 1 }], "gap");
    refused(&[contents(b"\0\0\0")], "gap");
    refused(&[data(0, b"abc"), contents(b"abc")], "builds on other data");
    refused(&[contents(b"abc"), contents(b"abc"), data(0, b"abc")], "twice");
    Yard::new().refused(&[root(), contents(b"abc")], "without a file");
    let existing =
        Record::File { at: at(1, b"file"), metadata: metadata(), size: 3, basis: Basis::Existing, from: None };
    Yard::new().refused(&[root(), existing, contents(b"abc"), data(0, b"abc")], "builds on other data");
}

/// Hashing them would keep a processor busy for as long as the peer likes.
#[test]
fn holes_without_end_are_not_hashed_after_a_break() {
    let yard = Yard::new();
    let from = 2 << 40;
    fs::File::create(yard.dest.join("file")).unwrap().set_len(from).unwrap();
    let resume = Some(Position { path: TreePath::parse(b"file").unwrap(), inside: Some(from) });
    let point = resume.as_ref().unwrap().to_point().unwrap();
    let dest = Root::open(&yard.dest).unwrap();
    let mut applier = Applier::new(dest, None, Sharing::Exclusive, Some(point), None).unwrap();
    let (size, basis) = (from + 1, Basis::Fresh);
    let goes_on = Record::File { at: at(1, b"file"), metadata: metadata(), size, basis, from: Some(from) };
    let start = Record::Start { magic: MAGIC, resume };
    let frames: Vec<u8> = [start, root(), goes_on, contents(b"")].iter().flat_map(frame).collect();
    let error = applier.feed(frames.into()).and_then(|()| applier.settle()).unwrap_err();
    assert!(matches!(&error.kind, ErrorKind::Corrupt(why) if why.contains("gap")), "{error:?}");
}

#[test]
fn damage_and_cuts_are_noticed() {
    let whole = stream(&[root(), file(b"f", 3), data(0, b"abc")]);
    for cut in 0..whole.len() {
        Yard::new().refused_bytes(&whole[..cut], "truncated");
    }
    Yard::new().refused_bytes(&[&whole[..], b"x"].concat(), "bytes follow");
    let mut damaged = whole.clone();
    let place = damaged.windows(3).rposition(|bytes| bytes == b"abc").unwrap();
    damaged[place] ^= 1;
    Yard::new().refused_bytes(&damaged, "digest differs");
    let checkpoint = Record::Checkpoint { digest: [0; 32] };
    Yard::new().refused(&[root(), checkpoint], "digest differs");
}

#[test]
fn a_file_goes_on_only_where_it_was_left() {
    let goes_on =
        Record::File { at: at(1, b"file"), metadata: metadata(), size: 9, basis: Basis::Existing, from: Some(2) };
    Yard::new().refused(&[root(), goes_on], "was not left");
    let resume = Some(Position { path: TreePath::parse(b"file").unwrap(), inside: Some(2) });
    Yard::new().refused_bytes(&frame(&Record::Start { magic: MAGIC, resume }), "elsewhere");
}

#[test]
fn held_back_attributes_are_bounded() {
    let xattrs: Vec<_> = (0..100).map(|n| (format!("user.{n:03}").into_bytes(), vec![0; 65536])).collect();
    let metadata = || Metadata { xattrs: xattrs.clone(), ..metadata() };
    let names: Vec<_> = (0..20).map(|n| format!("d{n}")).collect();
    let mut records = vec![root()];
    for (level, name) in names.iter().enumerate() {
        records.push(Record::Directory { at: at(level as u32 + 1, name.as_bytes()), metadata: metadata() });
    }
    Yard::new().refused(&records, "more than 64 MiB");
}

#[test]
fn an_error_names_path_and_rule() {
    let yard = Yard::new();
    let mut applier = yard.applier();
    let bad = Record::File { at: at(2, b"b"), metadata: metadata(), size: 1, basis: Basis::Existing, from: None };
    let error = applier.feed(stream(&[root(), directory(1, b"dir"), bad]).into()).unwrap_err();
    assert_eq!(error.to_string(), "cannot apply delta at dir/b");
    assert_eq!(error.kind.to_string(), "malformed data: it builds on a file that the base does not have");
    assert!(applier.feed(Bytes::from_static(b"more")).is_err(), "a failed applier takes nothing more");
}

#[test]
fn the_base_is_never_modified_through_a_shared_inode() {
    let yard = Yard::new();
    let base = yard.folder.path().join("outside");
    let dest = yard.dest.join("canary");
    fs::hard_link(base.join("canary"), &dest).unwrap();
    let records = [
        root(),
        Record::File { at: at(1, b"canary"), metadata: metadata(), size: 9, basis: Basis::Existing, from: None },
        data(0, b"U"),
    ];
    let open = |path: &Path| Root::open(path).unwrap();
    for base in [Some(open(&base)), None] {
        let sharing = if base.is_some() { Sharing::HardLinked } else { Sharing::Exclusive };
        let mut applier = Applier::new(open(&yard.dest), base, sharing, None, None).unwrap();
        applier.feed(stream(&records).into()).unwrap();
        applier.finish().unwrap();
        yard.check_outside();
        assert_eq!(fs::read(&dest).unwrap(), b"Untouched");
    }
}
