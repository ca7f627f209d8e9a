//! A tree with everything a file system can hold arrives as it was.

use std::{
    ffi::OsStr,
    fs,
    os::unix::{
        ffi::OsStrExt,
        fs::{FileExt, MetadataExt, PermissionsExt, chown, symlink},
        net::UnixListener,
    },
    path::Path,
    process::Command,
};

use flocker_tests::{
    Cluster,
    data::write_random,
    needs::is_root,
    require,
    scratch::run,
    tree::{Listing, assert_equal, assert_same},
};
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, Timespec, Timestamps, XattrFlags};

pub(crate) fn set_times(path: &Path, seconds: i64, nanos: i64) {
    let time = Timespec { tv_sec: seconds, tv_nsec: nanos };
    let times = Timestamps { last_access: time, last_modification: time };
    rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

fn set_xattr(path: &Path, name: &str, value: &[u8]) {
    rustix::fs::lsetxattr(path, name, value, XattrFlags::empty())
        .unwrap_or_else(|error| panic!("set {name} of {}: {error}", path.display()));
}

/// Makes one of everything that any user may make.
pub(crate) fn write_everything(root: &Path) {
    fs::create_dir_all(root.join("a/b/c")).unwrap();
    fs::create_dir(root.join("empty")).unwrap();
    fs::write(root.join("plain"), "plain").unwrap();
    fs::write(root.join("no-bytes"), "").unwrap();

    fs::write(root.join("a/first"), "linked across folders").unwrap();
    fs::hard_link(root.join("a/first"), root.join("a/b/second")).unwrap();
    fs::hard_link(root.join("a/first"), root.join("z-third")).unwrap();

    let sparse = fs::File::create(root.join("sparse")).unwrap();
    sparse.set_len(64 << 20).unwrap();
    sparse.write_all_at(b"in the middle", 20 << 20).unwrap();
    sparse.write_all_at(b"near the end", 60 << 20).unwrap();
    fs::File::create(root.join("all-hole")).unwrap().set_len(8 << 20).unwrap();
    write_random(&root.join("dense"), 30, 3_000_001);

    symlink("plain", root.join("to-plain")).unwrap();
    symlink("/no/such/place", root.join("dangling")).unwrap();
    symlink(OsStr::from_bytes(b"not\xffutf8"), root.join("a/link-bytes")).unwrap();
    symlink("a/b", root.join("to-folder")).unwrap();
    rustix::fs::mknodat(CWD, root.join("fifo"), FileType::Fifo, Mode::from_raw_mode(0o640), 0).unwrap();

    fs::write(root.join(OsStr::from_bytes(b"bad\xff\xfe name\n\t")), "not UTF-8").unwrap();
    fs::create_dir(root.join(OsStr::from_bytes(b"f\xf6lder"))).unwrap();
    fs::write(root.join(OsStr::from_bytes(b"f\xf6lder")).join("inside"), "x").unwrap();
    fs::write(root.join("n".repeat(255)), "a long name").unwrap();
    fs::create_dir(root.join("d".repeat(255))).unwrap();
    fs::write(root.join("-rf *; $(true) 'quoted' \"so\""), "words a shell would read").unwrap();

    fs::write(root.join("attributes"), "x").unwrap();
    set_xattr(&root.join("attributes"), "user.text", b"value");
    set_xattr(&root.join("attributes"), "user.empty", b"");
    set_xattr(&root.join("attributes"), "user.bytes", &[0, 255, 10, 61]);
    set_xattr(&root.join("a"), "user.on-a-folder", b"yes");

    fs::write(root.join("setuid"), "#!/bin/sh\n").unwrap();
    fs::set_permissions(root.join("setuid"), fs::Permissions::from_mode(0o4755)).unwrap();
    fs::set_permissions(root.join("a/b"), fs::Permissions::from_mode(0o2775)).unwrap();
    fs::create_dir(root.join("sticky")).unwrap();
    fs::set_permissions(root.join("sticky"), fs::Permissions::from_mode(0o1777)).unwrap();
    fs::write(root.join("unreadable"), "mode 000").unwrap();
    fs::set_permissions(root.join("unreadable"), fs::Permissions::from_mode(if is_root() { 0 } else { 0o400 }))
        .unwrap();
    fs::create_dir(root.join("read-only")).unwrap();
    fs::write(root.join("read-only/inside"), "x").unwrap();
    fs::set_permissions(root.join("read-only/inside"), fs::Permissions::from_mode(0o444)).unwrap();
    fs::set_permissions(root.join("read-only"), fs::Permissions::from_mode(0o555)).unwrap();

    set_times(&root.join("plain"), 1_234_567_890, 123_456_789);
    set_times(&root.join("no-bytes"), -86_400 * 365, 999_999_999);
    set_times(&root.join("to-plain"), 1_000_000_000, 1);
    set_times(&root.join("empty"), 4_000_000_000, 5);
    set_times(&root.join("a/b"), 42, 42);
}

/// Makes what only root may make.
pub(crate) fn write_for_root(root: &Path) {
    let device = |name: &str, kind, number| {
        rustix::fs::mknodat(CWD, root.join(name), kind, Mode::from_raw_mode(0o660), number).unwrap();
    };
    device("null", FileType::CharacterDevice, rustix::fs::makedev(1, 3));
    device("loop", FileType::BlockDevice, rustix::fs::makedev(7, 200));
    fs::write(root.join("owned"), "x").unwrap();
    chown(root.join("owned"), Some(12_345), Some(54_321)).unwrap();
    std::os::unix::fs::lchown(root.join("to-plain"), Some(1), Some(2)).unwrap();
    set_times(&root.join("to-plain"), 1_000_000_000, 1);
    fs::write(root.join("trusted"), "x").unwrap();
    set_xattr(&root.join("trusted"), "trusted.secret", b"of the system");
    set_xattr(&root.join("dangling"), "trusted.on-a-link", b"yes");
    set_xattr(&root.join("trusted"), "security.note", b"kept");
    fs::write(root.join("setuid-owned"), "x").unwrap();
    chown(root.join("setuid-owned"), Some(1000), Some(1000)).unwrap();
    fs::set_permissions(root.join("setuid-owned"), fs::Permissions::from_mode(0o6711)).unwrap();
    if require("setcap") {
        fs::write(root.join("capable"), "x").unwrap();
        run(Command::new("setcap").args(["cap_net_raw+ep"]).arg(root.join("capable")));
    }
}

pub(crate) fn write_acls(root: &Path) {
    fs::write(root.join("with-acl"), "x").unwrap();
    run(Command::new("setfacl").args(["-m", "u:1234:rw,g:4321:r"]).arg(root.join("with-acl")));
    run(Command::new("setfacl").args(["-d", "-m", "u:1234:rwx"]).arg(root.join("sticky")));
}

#[test]
fn a_tree_with_everything_arrives_as_it_was() {
    let mut cluster = Cluster::start(2);
    let (a, b) = cluster.pair();
    let mount = a.create_mounted("db");
    write_everything(&mount);
    if require("acl") {
        write_acls(&mount);
    }
    if require("root") {
        write_for_root(&mount);
    }

    a.cli(&["snapshot", "db@one"]).ok();
    a.push("db@one", "host-b");

    let arrived = b.mount("db");
    assert_equal(&mount, &arrived);
    let blocks = |root: &Path, name: &str| fs::metadata(root.join(name)).unwrap().blocks();
    assert!(blocks(&arrived, "sparse") <= blocks(&mount, "sparse") + 64, "holes stay holes");
    assert!(blocks(&arrived, "all-hole") <= 64);
    assert_eq!(a.cli(&["inspect", "db"]).ok().json()["head"], "clean");
}

#[test]
fn changes_of_everything_arrive_as_a_difference() {
    let mut cluster = Cluster::start(2);
    let (a, b) = cluster.pair();
    let mount = a.create_mounted("db");
    write_everything(&mount);
    a.cli(&["snapshot", "db@one"]).ok();
    a.push("db@one", "host-b");

    fs::remove_file(mount.join("a/b/second")).unwrap();
    fs::hard_link(mount.join("plain"), mount.join("a/b/second")).unwrap();
    fs::write(mount.join("attributes"), "other contents").unwrap();
    rustix::fs::lremovexattr(mount.join("attributes"), "user.text").unwrap();
    set_xattr(&mount.join("attributes"), "user.bytes", b"changed");
    fs::remove_file(mount.join("to-folder")).unwrap();
    fs::create_dir(mount.join("to-folder")).unwrap();
    fs::write(mount.join("to-folder/was-a-link"), "x").unwrap();
    fs::remove_dir(mount.join("empty")).unwrap();
    fs::write(mount.join("empty"), "was a folder").unwrap();
    fs::remove_file(mount.join("fifo")).unwrap();
    symlink("was-a-fifo", mount.join("fifo")).unwrap();
    fs::File::options().write(true).open(mount.join("sparse")).unwrap().set_len(1 << 20).unwrap();
    fs::File::options().write(true).open(mount.join("dense")).unwrap().write_all_at(b"xyz", 1_500_000).unwrap();
    fs::set_permissions(mount.join("read-only"), fs::Permissions::from_mode(0o755)).unwrap();
    fs::rename(mount.join("read-only"), mount.join("moved")).unwrap();
    fs::set_permissions(mount.join("setuid"), fs::Permissions::from_mode(0o644)).unwrap();
    fs::remove_dir_all(mount.join(OsStr::from_bytes(b"f\xf6lder"))).unwrap();
    set_times(&mount.join("plain"), -1, 1);
    a.cli(&["snapshot", "db@two"]).ok();
    let transfer = a.push("db@two", "host-b");

    assert_equal(&mount, &b.mount("db"));
    assert!(transfer["progress"]["delta_bytes"].as_u64().unwrap() < 1 << 20, "{transfer}");
}

#[test]
fn sockets_are_left_out_with_a_warning() {
    let mut cluster = Cluster::start(2);
    let (a, b) = cluster.pair();
    let mount = a.create_mounted("db");
    fs::write(mount.join("file"), "x").unwrap();
    let _socket = UnixListener::bind(mount.join("sock")).unwrap();

    let taken = a.cli(&["snapshot", "db@one"]).ok();
    assert!(taken.json()["warnings"].to_string().contains("sock"), "{}", taken.stdout);
    let taken = taken.says(&["sock"]);
    drop(taken);
    a.push("db@one", "host-b");

    let (left, right) = (Listing::of(&mount), Listing::of(&b.mount("db")));
    assert_same(&left.without("sock"), &right);
}

#[test]
fn paths_longer_than_path_max_arrive() {
    let mut cluster = Cluster::start(2);
    let (a, b) = cluster.pair();
    let mount = a.create_mounted("db");
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let mut folder = rustix::fs::open(&mount, flags, Mode::empty()).unwrap();
    let name = "deep".repeat(40);
    for _ in 0..60 {
        rustix::fs::mkdirat(&folder, name.as_str(), Mode::from_raw_mode(0o755)).unwrap();
        folder = rustix::fs::openat(&folder, name.as_str(), flags, Mode::empty()).unwrap();
    }
    let file =
        rustix::fs::openat(&folder, "bottom", OFlags::CREATE | OFlags::WRONLY, Mode::from_raw_mode(0o644)).unwrap();
    rustix::io::write(&file, b"9,600 bytes down").unwrap();
    fs::write(mount.join("top"), "x").unwrap();

    a.cli(&["snapshot", "db@one"]).ok();
    a.push("db@one", "host-b");
    rustix::fs::unlinkat(&folder, "bottom", AtFlags::empty()).unwrap();
    drop((file, folder));
    a.cli(&["snapshot", "db@two"]).ok();
    a.push("db@two", "host-b");

    assert_equal(&mount, &b.mount("db"));
    for node in [&*a, &*b] {
        node.cli(&["unmount", "db"]).ok();
        node.cli(&["destroy", "db"]).ok();
    }
}

#[test]
fn a_file_that_changes_while_the_snapshot_is_taken_is_whole_or_reported() {
    use std::sync::atomic::{AtomicBool, Ordering};
    let cluster = Cluster::start(1);
    let node = &cluster.nodes[0];
    let mount = node.create_mounted("db");
    write_random(&mount.join("moving"), 31, 8 << 20);
    flocker_tests::data::write_small_files(&mount.join("still"), 32, 2_000, 500);
    let over = AtomicBool::new(false);

    let taken = std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut number = 0;
            while !over.load(Ordering::SeqCst) {
                number += 1;
                flocker_tests::data::scribble(&mount.join("moving"), number, 10);
                let _ = fs::write(mount.join("come-and-go"), "x");
                let _ = fs::remove_file(mount.join("come-and-go"));
            }
        });
        let taken = node.cli(&["snapshot", "db@one"]);
        over.store(true, Ordering::SeqCst);
        taken
    });

    let taken = taken.ok().json();
    let verify = node.http("POST", "/v1/volumes/db/snapshots/one/verify?compare=contents", None).is(200).json();
    assert_eq!(verify["findings"], serde_json::json!([]), "what was kept is what the inventory says; {taken}");
    node.cli(&["snapshot", "db@two"]).ok();
    node.cli(&["unmount", "db"]).ok();
}
