#![allow(clippy::unwrap_used)]

use std::{
    fs,
    os::unix::fs::{FileExt as _, symlink},
    path::Path,
    process::Command,
};

use super::{compression::Compression, manifest::tests::sample, *};
use crate::tree::{digest::TreeDigest, root::Root, walk::Links};

/// A member of a tarball made by hand, as no honest program would make it.
struct Member<'a> {
    name: &'a str,
    kind: u8,
    link: &'a str,
    contents: &'a [u8],
}

fn file<'a>(name: &'a str, contents: &'a [u8]) -> Member<'a> {
    Member { name, kind: b'0', link: "", contents }
}

fn link<'a>(name: &'a str, kind: u8, link: &'a str) -> Member<'a> {
    Member { name, kind, link, contents: b"" }
}

fn tarball(members: &[Member<'_>]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for Member { name, kind, link, contents } in members {
        let mut header = vec![0; BLOCK];
        let mut put = |at: usize, text: &[u8]| header[at..at + text.len()].copy_from_slice(text);
        put(0, name.as_bytes());
        put(100, b"0000644\0");
        put(108, b"0000000\0");
        put(116, b"0000000\0");
        put(124, format!("{:011o}\0", contents.len()).as_bytes());
        put(136, b"00000000000\0");
        put(148, b"        ");
        put(156, &[*kind]);
        put(157, link.as_bytes());
        put(257, b"ustar\x0000");
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        bytes.extend_from_slice(&header);
        bytes.extend_from_slice(contents);
        bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
    }
    bytes.resize(bytes.len() + 2 * BLOCK, 0);
    bytes
}

/// An empty directory with something beside it that a hostile tarball is after.
struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("into")).unwrap();
        fs::write(folder.path().join("precious"), "precious").unwrap();
        Self { folder }
    }

    fn inside(&self) -> std::path::PathBuf {
        self.folder.path().join("into")
    }

    fn unpack(&self, bytes: &[u8]) -> Result<Unpacked> {
        unpack(bytes, &Root::open(self.inside()).unwrap())
    }

    fn assert_nothing_beside(&self) {
        let mut names: Vec<_> =
            fs::read_dir(self.folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["into", "precious"]);
        assert_eq!(fs::read(self.folder.path().join("precious")).unwrap(), b"precious");
    }
}

fn digest(path: &Path) -> TreeDigest {
    TreeDigest::of(Root::open(path).unwrap(), Links::ByInode, &|| false).unwrap()
}

fn odd_tree(path: &Path) {
    fs::create_dir(path.join("folder")).unwrap();
    fs::write(path.join("folder/file"), "contents").unwrap();
    fs::hard_link(path.join("folder/file"), path.join("name")).unwrap();
    symlink("../../etc", path.join("folder/link")).unwrap();
    let sparse = fs::File::create(path.join("sparse")).unwrap();
    sparse.set_len(50 << 20).unwrap();
    sparse.write_all_at(b"data", 30 << 20).unwrap();
    assert!(Command::new("mkfifo").arg(path.join("fifo")).status().unwrap().success());
}

#[test]
fn a_tree_comes_back_as_it_was_in_every_compression() {
    let tree = tempfile::tempdir().unwrap();
    odd_tree(tree.path());
    for compression in [Compression::None, Compression::Zstd, Compression::Gzip] {
        let mut bytes = Vec::new();
        pack(&Root::open(tree.path()).unwrap(), &sample(), compression, &mut bytes).unwrap();
        let place = Place::new();
        let unpacked = place.unpack(&bytes).unwrap();
        assert_eq!(unpacked.manifest, Some(sample()), "{compression}");
        assert!(unpacked.findings.is_empty(), "{:?}", unpacked.findings);
        assert_eq!(digest(&place.inside()), digest(tree.path()), "{compression}");
    }
}

#[test]
fn a_tarball_cut_anywhere_is_an_error() {
    let tree = tempfile::tempdir().unwrap();
    odd_tree(tree.path());
    let mut bytes = Vec::new();
    pack(&Root::open(tree.path()).unwrap(), &sample(), Compression::None, &mut bytes).unwrap();
    let members = bytes.len() - bytes.iter().rev().take_while(|byte| **byte == 0).count();
    for cut in (0..members + BLOCK).step_by(BLOCK).chain([1, 100, members - 1]) {
        let place = Place::new();
        let error = place.unpack(&bytes[..cut]).expect_err("it is cut");
        assert!(matches!(error.kind, ErrorKind::Corrupt(_)), "cut at {cut}: {error:?}");
    }
}

#[test]
fn garbage_is_an_error() {
    let garbage: Vec<u8> = (0..20_000u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    for bytes in [&garbage[..], &garbage[..300], b"hello", b"", b"\x1f\x8b\x08rest", b"\x28\xb5\x2f\xfdrest"] {
        let place = Place::new();
        let error = place.unpack(bytes).expect_err("it is garbage");
        assert!(matches!(error.kind, ErrorKind::Corrupt(_)), "{error:?}");
        place.assert_nothing_beside();
    }
}

#[test]
fn names_and_links_that_lead_outside_reach_nothing() {
    let evil = file("evil", b"evil");
    let cases: [(&str, Vec<Member<'_>>); 8] = [
        ("a name with ..", vec![file("../precious", b"evil")]),
        ("a name with .. inside", vec![file("a/../../precious", b"evil")]),
        ("through a link up", vec![link("up", b'2', ".."), file("up/precious", b"evil")]),
        ("through a link of a link", vec![link("a", b'2', "."), link("a/b", b'2', ".."), file("b/precious", b"evil")]),
        ("over a link up", vec![link("name", b'2', "../precious"), file("name", b"evil")]),
        ("a hard link up", vec![link("name", b'1', "../precious"), file("name", b"evil")]),
        ("a hard link to a link up", vec![link("a", b'2', "../precious"), link("b", b'1', "a"), file("b", b"evil")]),
        ("a link to a link up", vec![link("a", b'2', ".."), link("b", b'2', "a"), file("b/precious", b"evil")]),
    ];
    for (what, mut members) in cases {
        members.push(Member { ..evil });
        let place = Place::new();
        let _ = place.unpack(&tarball(&members));
        eprintln!("{what}");
        place.assert_nothing_beside();
    }
}

#[test]
fn an_absolute_name_lands_beneath_the_directory_and_is_told() {
    let place = Place::new();
    let outside = place.folder.path().join("outside");
    let name = outside.to_str().unwrap();
    let unpacked = place.unpack(&tarball(&[file(name, b"evil")])).unwrap();
    place.assert_nothing_beside();
    assert!(place.inside().join(name.trim_start_matches('/')).exists());
    assert!(unpacked.findings.iter().any(|finding| finding.what.contains("leading")), "{:?}", unpacked.findings);
}

#[test]
fn a_name_with_dots_is_refused_in_words() {
    let error = Place::new().unpack(&tarball(&[file("../precious", b"evil"), file("good", b"")])).unwrap_err();
    assert!(error.kind.to_string().contains(".."), "{}", error.kind);
}
