//! A tree with everything that must be preserved.

use std::{
    fs,
    io::{Seek as _, Write as _},
    os::{
        fd::OwnedFd,
        unix::{
            ffi::OsStrExt as _,
            fs::{MetadataExt as _, PermissionsExt as _, symlink},
            net::UnixListener,
        },
    },
    path::Path,
};

use flocker_storage::tree::{
    apply::Sharing,
    entry::{EntryKind, Xattrs},
    listing::{Listed, listing},
    root::Root,
    walk::{Links, Walk},
};
use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Timespec, Timestamps, Uid, XattrFlags};

use super::rig::{Folder, apply, assert_equal, delta, is_root, stage, stage_copied, stage_linked};

pub(crate) fn set_times(path: &Path, secs: i64, nanos: i64) {
    let time = Timespec { tv_sec: secs, tv_nsec: nanos };
    let times = Timestamps { last_access: time, last_modification: time };
    rustix::fs::utimensat(rustix::fs::CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

fn set_xattr(path: &Path, name: &str, value: &[u8]) {
    rustix::fs::lsetxattr(path, name, value, XattrFlags::empty()).unwrap_or_else(|error| panic!("{name}: {error}"));
}

/// A POSIX ACL as the kernel takes it (acl(5), `linux/posix_acl_xattr.h`): version 2, then tag, permissions, id.
fn acl(entries: &[(u16, u16, u32)]) -> Vec<u8> {
    let mut bytes = 2u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        bytes.extend_from_slice(&tag.to_le_bytes());
        bytes.extend_from_slice(&permissions.to_le_bytes());
        bytes.extend_from_slice(&id.to_le_bytes());
    }
    bytes
}

fn access_acl() -> Vec<u8> {
    const NOBODY: u32 = u32::MAX;
    acl(&[(0x01, 6, NOBODY), (0x02, 4, 1234), (0x04, 4, NOBODY), (0x10, 4, NOBODY), (0x20, 0, NOBODY)])
}

fn deep(root: &Path, name: &[u8], levels: usize) -> (OwnedFd, u64) {
    let mut at = rustix::fs::open(root, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).unwrap();
    for _ in 0..levels {
        rustix::fs::mkdirat(&at, name, Mode::RWXU).unwrap();
        at = rustix::fs::openat(&at, name, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).unwrap();
    }
    let file = rustix::fs::openat(&at, "bottom", OFlags::CREATE | OFlags::RDWR, Mode::RUSR | Mode::WUSR).unwrap();
    rustix::io::write(&file, b"deep down").unwrap();
    let inode = rustix::fs::fstat(&file).unwrap().st_ino;
    (at, inode)
}

/// Fills an existing folder.
pub(crate) fn fill(root: &Path) {
    let join = |name: &str| root.join(name);
    fs::write(join("plain"), b"hello").unwrap();
    fs::write(join("empty"), b"").unwrap();
    fs::write(join("large"), (0..700_000u32).flat_map(u32::to_le_bytes).collect::<Vec<_>>()).unwrap();

    fs::create_dir_all(join("a/b")).unwrap();
    fs::write(join("a/first"), b"one inode").unwrap();
    fs::hard_link(join("a/first"), join("a/b/second")).unwrap();
    fs::hard_link(join("a/first"), join("z-third")).unwrap();

    let mut sparse = fs::File::create(join("sparse")).unwrap();
    sparse.set_len(8 << 20).unwrap();
    sparse.seek(std::io::SeekFrom::Start(3 << 20)).unwrap();
    sparse.write_all(&[7; 10_000]).unwrap();
    fs::File::create(join("all-hole")).unwrap().set_len(5 << 20).unwrap();

    symlink("plain", join("link")).unwrap();
    symlink("/etc/passwd", join("absolute-link")).unwrap();
    symlink("nowhere/at/all", join("dangling")).unwrap();
    rustix::fs::symlinkat(b"\xff\xfe".as_slice(), rustix::fs::CWD, join("odd-target")).unwrap();
    rustix::fs::mknodat(rustix::fs::CWD, join("fifo"), FileType::Fifo, Mode::RUSR, 0).unwrap();
    drop(UnixListener::bind(join("socket")).unwrap());

    fs::write(root.join(std::ffi::OsStr::from_bytes(b"not-utf8-\xff\xfe\n")), b"x").unwrap();
    fs::write(join(&"n".repeat(255)), b"long name").unwrap();
    fs::create_dir(join("empty-dir")).unwrap();
    deep(&join("empty-dir/.."), &[b'p'; 250], 20);
    deep(&join("a"), b"d", 2000);

    set_xattr(&join("plain"), "user.mime", b"text/plain");
    set_xattr(&join("plain"), "user.empty", b"");
    set_xattr(&join("a"), "user.dir", &[0, 255, 1]);
    set_xattr(root, "user.root", b"the root's own");
    set_xattr(&join("empty"), "system.posix_acl_access", &access_acl());
    set_xattr(&join("a"), "system.posix_acl_default", &access_acl());

    for (name, mode) in [("plain", 0o640), ("large", 0o4755), ("sparse", 0o2711), ("all-hole", 0o400)] {
        fs::set_permissions(join(name), fs::Permissions::from_mode(mode)).unwrap();
    }
    fs::create_dir(join("sticky")).unwrap();
    fs::set_permissions(join("sticky"), fs::Permissions::from_mode(0o1777)).unwrap();
    fs::create_dir(join("read-only")).unwrap();
    fs::write(join("read-only/inside"), b"locked in").unwrap();

    if is_root() {
        let device = |name, kind, major, minor| {
            let device = rustix::fs::makedev(major, minor);
            rustix::fs::mknodat(rustix::fs::CWD, join(name), kind, Mode::RUSR | Mode::WUSR, device).unwrap();
        };
        device("null", FileType::CharacterDevice, 1, 3);
        device("loop", FileType::BlockDevice, 7, 200);
        let owned = |name: &str, uid, gid| {
            let (uid, gid) = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
            rustix::fs::chownat(rustix::fs::CWD, join(name), uid, gid, AtFlags::SYMLINK_NOFOLLOW).unwrap();
        };
        owned("link", 4242, 4343);
        owned("a/first", 1000, 1001);
        owned("fifo", 5, 6);
        owned("empty-dir", 7, 8);
        owned("large", 9, 10);
        fs::set_permissions(join("large"), fs::Permissions::from_mode(0o4755)).unwrap();
        set_xattr(&join("plain"), "trusted.flocker", b"t");
        set_xattr(&join("link"), "trusted.on-a-link", b"l");
        set_xattr(&join("fifo"), "trusted.on-a-fifo", b"f");
        // cap_net_raw+ep, revision 2 (capability.h): permitted and effective.
        let capability = [0x0200_0001u32, 1 << 13, 0, 0, 0].iter().flat_map(|word| word.to_le_bytes());
        set_xattr(&join("large"), "security.capability", &capability.collect::<Vec<_>>());
    }

    set_times(&join("plain"), -86_400, 123_456_789);
    set_times(&join("link"), 1_000_000_000, 999_999_999);
    set_times(&join("fifo"), 5, 1);
    set_times(&join("empty-dir"), 1, 2);
    set_times(&join("a/b"), 1_700_000_000, 42);
    set_times(&join("a"), -1, 999_999_999);
    fs::set_permissions(join("read-only"), fs::Permissions::from_mode(0o555)).unwrap();
    fs::set_permissions(root, fs::Permissions::from_mode(0o751)).unwrap();
    set_times(root, 1_234_567_890, 987_654_321);
}

fn find<'a>(listed: &'a [Listed], path: &str) -> &'a Listed {
    listed.iter().find(|listed| listed.entry.path.as_bytes() == path.as_bytes()).unwrap()
}

fn xattr<'a>(xattrs: &'a Xattrs, name: &str) -> Option<&'a [u8]> {
    xattrs.iter().find(|(key, _)| key == name.as_bytes()).map(|(_, value)| value.as_slice())
}

/// The comparison that the tests rest on must itself see everything.
#[track_caller]
fn check_listing(root: &Path) {
    let listed = listing(root).unwrap();
    let plain = &find(&listed, "plain").entry;
    assert_eq!((plain.mtime.secs, plain.mtime.nanos, plain.mode), (-86_400, 123_456_789, 0o640));
    assert_eq!(xattr(&plain.xattrs, "user.mime"), Some(b"text/plain".as_slice()));
    assert_eq!(
        find(&listed, "a/first").entry.kind,
        EntryKind::HardLink { to: find(&listed, "a/b/second").entry.path.clone() }
    );
    assert!(matches!(find(&listed, "z-third").entry.kind, EntryKind::HardLink { .. }));
    assert_eq!(xattr(&find(&listed, "empty").entry.xattrs, "system.posix_acl_access"), Some(access_acl().as_slice()));
    assert_eq!(xattr(&find(&listed, "a").entry.xattrs, "system.posix_acl_default"), Some(access_acl().as_slice()));
    assert!(listed.iter().all(|listed| listed.entry.path.as_bytes() != b"socket"));
    assert!(listed.iter().any(|listed| listed.entry.path.as_bytes().len() > 5000));
    assert!(listed.iter().any(|listed| listed.entry.path.level() > 2000));
    let sparse: u64 = find(&listed, "sparse").data.iter().map(|(start, end)| end - start).sum();
    assert!(sparse < 1 << 20, "the hole of sparse is gone: {sparse} bytes of data");
    assert!(find(&listed, "all-hole").data.is_empty());
    if is_root() {
        let large = &find(&listed, "large").entry;
        assert_eq!((large.mode, large.uid, large.gid), (0o4755, 9, 10));
        assert!(xattr(&large.xattrs, "security.capability").is_some());
        assert_eq!(xattr(&find(&listed, "link").entry.xattrs, "trusted.on-a-link"), Some(b"l".as_slice()));
        assert_eq!(find(&listed, "null").entry.kind, EntryKind::CharDevice { major: 1, minor: 3 });
    }
}

#[test]
fn a_tree_with_everything_arrives_as_it_was() {
    let folder = Folder::new();
    let [source, dest] = ["source", "dest"].map(|name| folder.make(name));
    fill(&source);
    let applied = apply(&delta(None, &source), &dest, None, Sharing::Exclusive).unwrap();
    check_listing(&source);
    check_listing(&dest);
    assert_equal(&source, &dest);
    let listed = listing(&source).unwrap();
    assert_eq!(applied.summary.entries, listed.len() as u64);
    assert!(applied.findings.is_empty(), "{:?}", applied.findings);
}

#[test]
fn copies_and_linked_copies_equal_their_source() {
    let folder = Folder::new();
    let [source, copied, linked] = ["source", "copied", "linked"].map(|name| folder.make(name));
    fill(&source);
    stage_copied(&source, &copied);
    stage_linked(&source, &linked);
    check_listing(&copied);
    assert_equal(&source, &copied);
    assert_equal(&source, &linked);
    assert_eq!(fs::metadata(source.join("plain")).unwrap().ino(), fs::metadata(linked.join("plain")).unwrap().ino());
}

#[test]
fn sockets_are_left_out_with_a_finding() {
    let folder = Folder::new();
    let source = folder.make("source");
    fs::create_dir(source.join("d")).unwrap();
    drop(UnixListener::bind(source.join("d/socket")).unwrap());
    let mut walk = Walk::new(Root::open(&source).unwrap(), Links::ByInode);
    assert_eq!(walk.by_ref().count(), 2);
    let findings = walk.take_findings();
    assert_eq!(findings.len(), 1);
    assert_eq!(findings[0].path, "d/socket");
}

/// Takes a tree with everything through changes of every kind, with the base shared both ways.
#[test]
fn everything_can_change_into_something_else() {
    for sharing in [Sharing::HardLinked, Sharing::Exclusive] {
        let folder = Folder::new();
        let [base, target, dest] = ["base", "target", "dest"].map(|name| folder.make(name));
        fill(&base);
        stage_copied(&base, &target);
        stage(sharing, &base, &dest);
        let before = listing(&base).unwrap();
        let join = |name: &str| target.join(name);

        fs::set_permissions(join("read-only"), fs::Permissions::from_mode(0o755)).unwrap();
        fs::remove_dir_all(join("read-only")).unwrap();
        fs::write(join("read-only"), b"a file now").unwrap();
        fs::remove_file(join("plain")).unwrap();
        fs::create_dir(join("plain")).unwrap();
        fs::write(join("plain/inside"), b"a directory now").unwrap();
        fs::remove_file(join("link")).unwrap();
        fs::write(join("link"), b"not a link").unwrap();
        fs::remove_file(join("empty")).unwrap();
        symlink("..", join("empty")).unwrap();
        // One name of three leaves its group; the group changes.
        fs::remove_file(join("a/b/second")).unwrap();
        fs::write(join("a/b/second"), b"one inode").unwrap();
        fs::write(join("z-third"), b"two names now").unwrap();
        // A hole is punched where data was; data comes where a hole was; a file shrinks; one grows.
        let large = fs::File::options().write(true).open(join("large")).unwrap();
        let flags = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&large, flags, 1 << 20, 1 << 20).unwrap();
        let mut sparse = fs::File::options().write(true).open(join("sparse")).unwrap();
        sparse.write_all(b"data at the start").unwrap();
        sparse.set_len(4 << 20).unwrap();
        fs::set_permissions(join("all-hole"), fs::Permissions::from_mode(0o600)).unwrap();
        fs::File::options().write(true).open(join("all-hole")).unwrap().set_len(9 << 20).unwrap();
        fs::set_permissions(&target, fs::Permissions::from_mode(0o700)).unwrap();
        set_xattr(&target, "user.root", b"changed");
        rustix::fs::lremovexattr(join("a"), "system.posix_acl_default").unwrap();
        rustix::fs::lremovexattr(join("a"), "user.dir").unwrap();

        let stream = delta(Some(&base), &target);
        assert!(stream.len() < 100_000, "{} bytes for a few changes", stream.len());
        apply(&stream, &dest, Some(&base), sharing).unwrap();
        assert_equal(&target, &dest);
        let data = |root: &Path| find(&listing(root).unwrap(), "large").data.clone();
        assert_eq!(data(&target), data(&dest), "holes of large");
        let after = listing(&base).unwrap();
        for (before, after) in before.iter().zip(&after) {
            assert_eq!(before.digest, after.digest, "the base was modified at {}", before.entry.path);
            assert!(before.entry.has_metadata_of(&after.entry), "the base was modified at {}", before.entry.path);
        }
    }
}
