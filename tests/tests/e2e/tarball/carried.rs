//! What a tarball carries: a snapshot arrives as if it had been pushed, and plain `tar` reads it.

use std::{
    fs,
    process::{Command, Stdio},
};

use flocker_tests::{
    Cluster, Scratch, ZfsHost,
    command::flocker,
    data::{write_ordinary_tree, write_random, write_small_files},
    invariants::{assert_sound, text, wait_tidy},
    require,
    scratch::run,
    tree::{Listing, assert_equal, assert_same},
};
use serde_json::{Value, json};

use super::{btrfs_pool, export, import, snapshot, volumes_in_pool, with_pools};
use crate::everything::{set_times, write_acls, write_everything, write_for_root};

/// A snapshot goes by a file from host-a to host-b, is the same there, and pushes and pulls go on from it.
fn a_tarball_is_as_good_as_a_push(mut cluster: Cluster) {
    let folder = cluster.scratch.folder("tarballs");
    let (a, b) = cluster.pair();
    let mount = a.create_mounted("db");
    a.cli(&["set", "db", "team=storage"]).ok();
    write_everything(&mount);
    if require("acl") {
        write_acls(&mount);
    }
    if require("root") {
        write_for_root(&mount);
    }
    a.cli(&["snapshot", "db@zero"]).ok();
    a.cli(&["snapshot", "db@one", "-m", "why=to be carried"]).ok();
    let exported = folder.join("db.tar.zst");

    export(a, "db@one", &exported);
    let report = import(b, "db", &exported);

    assert_eq!((text(&report["kind"]), &report["why"]), ("same".into(), &Value::Null), "{report}");
    assert_eq!(report.get("warnings"), None, "{report}");
    let (here, there) = (snapshot(a, "db@one"), snapshot(b, "db@one"));
    for field in ["id", "name", "parents", "host", "created", "metadata", "logical_bytes"] {
        assert_eq!(here[field], there[field], "{field}");
    }
    let (here, there) = (a.cli(&["inspect", "db"]).ok().json(), b.cli(&["inspect", "db"]).ok().json());
    for field in ["id", "name", "metadata", "created", "epoch", "primary"] {
        assert_eq!(here[field], there[field], "{field}");
    }
    assert_eq!((&here["role"], &there["role"]), (&json!("primary"), &json!("replica")));
    let arrived = b.mount("db");
    assert_equal(&mount, &arrived);
    b.cli(&["unmount", "db"]).ok();

    // It is there already, and what follows is a difference.
    let again = a.push("db@one", "host-b");
    assert_eq!(again["outcome"]["verdict"], "up-to-date", "{again}");
    fs::write(mount.join("plain"), "changed").unwrap();
    a.cli(&["snapshot", "db@two"]).ok();
    let next = a.push("db@two", "host-b");
    assert_eq!(next["outcome"]["verdict"]["fast-forward"]["base"]["name"], "one", "{next}");
    assert!(next["progress"]["delta_bytes"].as_u64().unwrap() < 1 << 20, "{next}");
    assert_equal(&mount, &b.mount("db"));
    for node in [&*a, &*b] {
        assert_sound(node);
        wait_tidy(node);
    }
    assert_eq!((volumes_in_pool(a), volumes_in_pool(b)), (1, 1));
}

#[test]
fn between_directories_a_tarball_is_as_good_as_a_push() {
    a_tarball_is_as_good_as_a_push(Cluster::start(2));
}

#[test]
fn between_btrfs_pools_a_tarball_is_as_good_as_a_push() {
    if !require("btrfs") {
        return;
    }
    let scratch = Scratch::new();
    let pools = vec![btrfs_pool(&scratch, "left"), btrfs_pool(&scratch, "right")];
    a_tarball_is_as_good_as_a_push(with_pools(pools, scratch));
}

#[test]
fn from_btrfs_to_a_directory_a_tarball_is_as_good_as_a_push() {
    if !require("btrfs") {
        return;
    }
    let scratch = Scratch::new();
    let pools = vec![btrfs_pool(&scratch, "left"), None];
    a_tarball_is_as_good_as_a_push(with_pools(pools, scratch));
}

#[test]
fn between_zfs_pools_a_tarball_is_as_good_as_a_push() {
    let scratch = Scratch::new();
    let Some(hosts) = ZfsHost::pair(&scratch) else { return };
    let folder = scratch.folder("tarballs");
    let mut cluster = Cluster::with(scratch, hosts.iter().map(ZfsHost::options).collect());
    let (a, b) = cluster.pair();
    let mount = a.create_mounted("db");
    write_ordinary_tree(&mount, 300, 1024);
    run(Command::new("mkfifo").arg(mount.join("fifo")));
    a.cli(&["snapshot", "db@fine"]).ok();
    for path in Listing::of(&mount).0.keys() {
        use std::os::unix::ffi::OsStrExt as _;
        set_times(&mount.join(std::ffi::OsStr::from_bytes(path)), 1_700_000_000, 0);
    }
    a.cli(&["snapshot", "db@whole"]).ok();

    export(a, "db@whole", &folder.join("whole.tar"));
    export(a, "db@fine", &folder.join("fine.tar.gz"));
    let whole = import(b, "db", &folder.join("whole.tar"));
    let fine = import(b, "fine", &folder.join("fine.tar.gz"));

    assert_eq!(whole["kind"], "same", "{whole}");
    assert_eq!(whole["snapshot"]["id"], snapshot(a, "db@whole")["id"]);
    assert_eq!((&fine["kind"], fine.get("warnings")), (&json!("fork"), None), "{fine}");
    assert_same(&Listing::of(&mount), &Listing::of(&b.mount("db")));
    fs::write(mount.join("later"), "x").unwrap();
    a.cli(&["snapshot", "db@later"]).ok();
    b.cli(&["unmount", "db"]).ok();
    let next = a.push("db@later", "host-b");
    assert_eq!(next["outcome"]["verdict"]["fast-forward"]["base"]["name"], "whole", "{next}");
    assert_eq!(volumes_in_pool(b), 2);
    assert_sound(b);
}

#[test]
fn plain_tar_reads_an_export_without_a_word() {
    let cluster = Cluster::start(1);
    let (node, folder) = (&cluster.nodes[0], cluster.scratch.folder("out"));
    let mount = node.create_mounted("db");
    write_ordinary_tree(&mount, 301, 256);
    node.cli(&["snapshot", "db@one"]).ok();

    for (name, magic) in [("db.tar", None), ("db.tgz", Some([0x1f, 0x8b])), ("db.tar.zst", Some([0x28, 0xb5]))] {
        let (file, into) = (folder.join(name), folder.join(format!("{name}.d")));
        let told = node.cli(&["export", "db", "-o", file.to_str().unwrap()]).ok().json();
        fs::create_dir(&into).unwrap();
        let read = Command::new("tar").arg("-xpf").arg(&file).arg("-C").arg(&into).output().unwrap();

        assert!(read.status.success() && read.stderr.is_empty(), "{name}: {}", String::from_utf8_lossy(&read.stderr));
        assert_equal(&mount, &into);
        let bytes = fs::read(&file).unwrap();
        assert_eq!(told["bytes"], bytes.len(), "{told}");
        assert!(magic.is_none_or(|magic| bytes.starts_with(&magic)), "{name}");
    }
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 6, "no half file is left");
}

#[test]
fn a_pipe_carries_an_export_to_an_import() {
    let mut cluster = Cluster::start(2);
    let (a, b) = cluster.pair();
    let mount = a.create_mounted("db");
    write_ordinary_tree(&mount, 302, 3000);
    a.cli(&["snapshot", "db@one"]).ok();

    let mut left =
        flocker(&a.state, &["export", "db@one", "--compress", "gzip"]).stdout(Stdio::piped()).spawn().unwrap();
    let stdin = left.stdout.take().unwrap();
    let right = flocker(&b.state, &["import", "copy"]).stdin(stdin).output().unwrap();

    assert!(left.wait().unwrap().success());
    let said = String::from_utf8_lossy(&right.stderr).into_owned();
    assert!(right.status.success(), "{said}");
    assert!(said.contains("the snapshot that was exported") && said.contains("replica of host-a"), "{said}");
    assert_equal(&mount, &b.mount("copy"));
    // The volume is known by its id, whatever it is called here.
    assert_eq!(a.cli(&["inspect", "db"]).ok().json()["id"], b.cli(&["inspect", "copy"]).ok().json()["id"]);
}

#[test]
fn memory_stays_below_128_mebibytes_however_large_the_tarball() {
    let mut cluster = Cluster::start(2);
    let file = cluster.scratch.path().join("db.tar");
    let (a, b) = cluster.pair();
    let mount = a.create_mounted("db");
    write_random(&mount.join("large"), 312, 200 << 20);
    write_small_files(&mount.join("small"), 313, 3_000, 400);
    a.cli(&["snapshot", "db@one"]).ok();

    export(a, "db@one", &file);
    let imported = import(b, "db", &file);

    assert_eq!(imported["kind"], "same");
    for node in [&*a, &*b] {
        let peak = node.peak_resident_bytes();
        assert!(peak < 128 << 20, "{}: {} MiB", node.name, peak >> 20);
    }
}
