//! Export and import: snapshots as tarballs, and volumes out of anybody's.

use std::{
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use flocker_tests::{
    Cluster, LONG, Node, Options, SHORT, Scratch, ZfsHost,
    command::{code_of, flocker},
    data::{write_ordinary_tree, write_random, write_small_files},
    invariants::{array, assert_sound, histories, leftovers, text, wait_tidy},
    require,
    scratch::{FileSystem, run},
    terminal::OnTerminal,
    tree::{Listing, assert_equal, assert_same},
    wait_until,
};
use serde_json::{Value, json};

use crate::everything::{set_times, write_acls, write_everything, write_for_root};

/// The fault points of an import, in the order they are passed.
const POINTS: [&str; 6] = [
    "node.import.journalled",
    "node.import.staged",
    "node.import.unpacked",
    "node.import.before-commit",
    "node.import.committed",
    "node.import.cleared",
];

#[track_caller]
fn export(node: &Node, snapshot: &str, path: &Path) {
    node.cli(&["export", snapshot, "-o", path.to_str().unwrap()]).ok();
}

#[track_caller]
fn import(node: &Node, volume: &str, path: &Path) -> Value {
    node.cli(&["import", volume, path.to_str().unwrap()]).ok().json()
}

fn snapshot(node: &Node, snapshot: &str) -> Value {
    node.cli(&["inspect", snapshot]).ok().json()
}

fn tar(arguments: &[&str], folder: &Path) {
    run(Command::new("tar").arg("-C").arg(folder).args(arguments));
}

/// How many volumes the pool itself holds, whoever knows of them.
fn volumes_in_pool(node: &Node) -> u64 {
    node.cli(&["pool", "status"]).ok().json()["volumes"].as_u64().unwrap()
}

/// Nothing of an import is left, not even where nobody looks.
#[track_caller]
fn assert_nothing_left(node: &Node, volumes: u64) {
    wait_until("what was unpacked is gone", SHORT, || (volumes_in_pool(node) == volumes).then_some(()));
    wait_tidy(node);
    assert_sound(node);
}

fn with_pools(pools: Vec<Option<String>>, scratch: Scratch) -> Cluster {
    Cluster::with(scratch, pools.into_iter().map(|pool| Options { pool, ..Options::default() }).collect())
}

fn btrfs_pool(scratch: &Scratch, name: &str) -> Option<String> {
    Some(format!("btrfs:{}", scratch.mount(FileSystem::Btrfs, name, 1024).join("pool").display()))
}

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
fn an_imported_replica_follows_the_rules_of_promotion() {
    let mut cluster = Cluster::start(2);
    let folder = cluster.scratch.folder("out");
    let (a, b) = cluster.pair();
    fs::write(a.create_mounted("db").join("file"), "one").unwrap();
    a.cli(&["snapshot", "db@one"]).ok();
    export(a, "db@one", &folder.join("db.tar"));
    import(b, "db", &folder.join("db.tar"));

    b.cli(&["snapshot", "db@two"]).ends_with(4).says(&["replica"]);
    b.cli(&["promote", "db"]).ends_with(4).says(&["host-a"]);
    a.cli(&["unmount", "db"]).ok();
    a.cli(&["destroy", "db"]).ok();
    // Restored where it came from, nobody else being the primary: one word makes it writable, in a new epoch.
    import(a, "db", &folder.join("db.tar"));
    let promoted = a.cli(&["promote", "db"]).ok().json();
    assert_eq!((&promoted["role"], &promoted["epoch"]), (&json!("primary"), &json!(1)));
    assert_eq!(fs::read_to_string(a.mount("db").join("file")).unwrap(), "one");

    // Two that were promoted apart are a divergence like any other.
    b.cli(&["promote", "db", "--force"]).ok();
    for node in [&*a, &*b] {
        fs::write(node.mount("db").join("file"), &node.name).unwrap();
        node.cli(&["snapshot", &format!("db@{}", node.name)]).ok();
    }
    let refused = b.cli(&["push", "db@host-b", "host-a"]).ends_with(4).json();
    assert_eq!(refused["outcome"]["verdict"]["diverged"]["common"]["name"], "one", "{refused}");
}

#[test]
fn an_edited_tarball_becomes_a_new_snapshot_that_claims_nothing() {
    let mut cluster = Cluster::start(2);
    let folder = cluster.scratch.folder("out");
    let (a, b) = cluster.pair();
    write_ordinary_tree(&a.create_mounted("db"), 303, 64);
    a.cli(&["snapshot", "db@zero"]).ok();
    a.cli(&["snapshot", "db@one", "-m", "k=v"]).ok();
    let file = folder.join("db.tar");
    export(a, "db@one", &file);
    fs::write(folder.join("smuggled"), "x").unwrap();
    tar(&["-rf", file.to_str().unwrap(), "./smuggled"], &folder);

    let imported = b.cli(&["import", "db", file.to_str().unwrap()]).ok().says(&["changed"]).json();

    assert_eq!(imported["kind"], "new", "{imported}");
    assert_eq!((&imported["snapshot"]["parents"], &imported["volume"]["role"]), (&json!([]), &json!("primary")));
    assert_eq!((&imported["snapshot"]["name"], &imported["snapshot"]["metadata"]), (&json!("one"), &json!({"k": "v"})));
    let one = snapshot(a, "db@one");
    assert_ne!(imported["snapshot"]["id"], one["id"]);
    assert_ne!(imported["volume"]["id"], a.cli(&["inspect", "db"]).ok().json()["id"]);
    assert_eq!(fs::read_to_string(b.mount("db").join("smuggled")).unwrap(), "x");
    a.cli(&["push", "db@one", "host-b"]).ends_with(4).says(&["another volume"]);
}

#[test]
fn a_tarball_of_anybody_becomes_a_volume_that_can_be_written() {
    let cluster = Cluster::start(1);
    let (node, folder) = (&cluster.nodes[0], cluster.scratch.folder("out"));
    let tree = cluster.scratch.folder("tree");
    write_ordinary_tree(&tree, 304, 256);
    let from_tree = |arguments: &[&str]| tar(arguments, &tree);
    let path = |name: &str| folder.join(name).to_str().unwrap().to_owned();
    from_tree(&["-cf", &path("plain"), "."]);
    from_tree(&["-czf", &path("gzip"), "."]);
    from_tree(&["--zstd", "-cf", &path("zstd"), "."]);
    from_tree(&["--format=gnu", "-cf", &path("gnu"), "."]);

    for name in ["plain", "gzip", "zstd", "gnu"] {
        let imported = import(node, name, &folder.join(name));

        assert_eq!((text(&imported["kind"]), &imported["why"]), ("new".into(), &Value::Null), "{imported}");
        assert_eq!(imported["snapshot"]["name"], "imported");
        let listing =
            |path: &Path| if name == "plain" { Listing::of(path) } else { Listing::of(path).in_whole_seconds() };
        let mount = node.mount(name);
        assert_same(&listing(&tree).in_whole_seconds(), &listing(&mount).in_whole_seconds());
        fs::write(mount.join("new"), "x").unwrap();
        node.cli(&["snapshot", &format!("{name}@next")]).ok();
    }
    fs::write(folder.join("xz"), b"\xfd7zXZ\0 and what follows").unwrap();
    node.cli(&["import", "xz", &path("xz")]).ends_with(2).says(&["xz -dc"]);
    assert_nothing_left(node, 4);
}

#[test]
fn what_is_here_already_is_not_imported_over() {
    let mut cluster = Cluster::start(2);
    let folder = cluster.scratch.folder("out");
    let (a, b) = cluster.pair();
    let mount = a.create_mounted("db");
    write_ordinary_tree(&mount, 305, 64);
    a.cli(&["snapshot", "db@one"]).ok();
    a.push("db@one", "host-b");
    fs::write(mount.join("two"), "two").unwrap();
    a.cli(&["snapshot", "db@two"]).ok();
    let (one, two) = (folder.join("one.tar"), folder.join("two.tar"));
    export(a, "db@one", &one);
    export(a, "db@two", &two);
    let before = histories(b);

    b.cli(&["import", "db", two.to_str().unwrap()]).ends_with(4).says(&["db", "exists"]);
    b.cli(&["import", "other", one.to_str().unwrap()]).ends_with(4).says(&["db@one", "--as-new"]);
    assert_eq!(histories(b), before);
    assert_nothing_left(b, 1);

    let forked = import(b, "fork", &two);
    assert_eq!(forked["kind"], "fork", "{forked}");
    assert_eq!(forked["snapshot"]["id"], snapshot(a, "db@two")["id"]);
    assert_eq!(forked["snapshot"]["parents"][0], snapshot(a, "db@one")["id"]);
    assert_ne!(forked["volume"]["id"], b.cli(&["inspect", "db"]).ok().json()["id"]);
    // The history goes on in the volume, beside the fork, and in the fork.
    a.push("db@two", "host-b");
    fs::write(mount.join("three"), "three").unwrap();
    a.cli(&["snapshot", "db@three"]).ok();
    let next = a.cli(&["push", "db@three", "host-b", "--as", "fork"]).ok().json();
    assert_eq!(next["outcome"]["verdict"]["fast-forward"]["base"]["name"], "two", "{next}");

    let new = b.cli(&["import", "new", one.to_str().unwrap(), "--as-new"]).ok().json();
    assert_eq!((text(&new["kind"]), text(&new["volume"]["role"])), ("new".into(), "primary".into()), "{new}");
    assert_ne!(new["snapshot"]["id"], snapshot(a, "db@one")["id"]);
    assert_nothing_left(b, 3);
}

/// The answer comes while the client still sends.
#[test]
fn a_refusal_before_the_end_of_a_long_tarball_is_told() {
    let cluster = Cluster::start(1);
    let node = &cluster.nodes[0];
    node.cli(&["create", "db"]).ok();
    let file = cluster.scratch.path().join("long");
    write_random(&file, 306, 20 << 20);

    for _ in 0..20 {
        node.cli(&["import", "db", file.to_str().unwrap()]).ends_with(4).says(&["exists already"]);
        node.cli(&["import", "garbage", file.to_str().unwrap()]).ends_with(2).says(&["tarball"]);
    }
    assert_nothing_left(node, 1);
}

#[test]
fn a_hostile_or_broken_tarball_leaves_nothing() {
    let cluster = Cluster::start(1);
    let (node, folder) = (&cluster.nodes[0], cluster.scratch.folder("out"));
    let tree = cluster.scratch.folder("tree");
    write_ordinary_tree(&tree, 307, 512);
    let path = |name: &str| folder.join(name).to_str().unwrap().to_owned();
    tar(&["-cf", &path("good"), "."], &tree);
    tar(&["-czf", &path("good.gz"), "."], &tree);
    tar(&["--zstd", "-cf", &path("good.zst"), "."], &tree);
    tar(&["-Pcf", &path("dots"), "../tree/link", "--transform=s,^,../../../,"], &tree);
    let cut = |name: &str, length: usize| {
        let bytes = fs::read(folder.join(name)).unwrap();
        fs::write(folder.join(format!("{name}.{length}")), &bytes[..length.min(bytes.len() - 9)]).unwrap();
        format!("{name}.{length}")
    };
    let mut bad = vec!["dots".to_owned(), cut("good", 10_240), cut("good", 100_001), cut("good", 300_032)];
    bad.extend([cut("good.gz", 40_000), cut("good.zst", 40_000), cut("good.zst", usize::MAX)]);
    for (name, bytes) in [("empty", &b""[..]), ("text", b"no tarball at all\n"), ("zeroes", &[0; 600])] {
        fs::write(folder.join(name), bytes).unwrap();
        bad.push(name.to_owned());
    }

    for name in &bad {
        node.cli(&["import", "db", &path(name)]).ends_with(2).says(&["tarball"]);
        assert_eq!(histories(node).len(), 0, "{name}");
    }
    assert_nothing_left(node, 0);
    assert!(!cluster.scratch.path().join("link").exists());
    let answer = node.http("PUT", "/v1/volumes/db/import", Some(&json!({"not": "a tarball"})));
    answer.is_problem(422, "bad_tarball");
    import(node, "db", &folder.join("good"));
}

#[test]
fn a_client_that_goes_away_ends_what_it_asked_for() {
    let cluster = Cluster::start(1);
    let node = &cluster.nodes[0];
    let file = cluster.scratch.path().join("db.tar");
    write_random(&node.create_mounted("db").join("data"), 308, 30 << 20);
    node.cli(&["snapshot", "db@one"]).ok();
    export(node, "db@one", &file);
    let bytes = fs::read(&file).unwrap();

    let mut importing =
        flocker(&node.state, &["import", "copy"]).stdin(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut stdin = importing.stdin.take().unwrap();
    stdin.write_all(&bytes[..bytes.len() / 2]).unwrap();
    wait_until("the import is under way", SHORT, || (volumes_in_pool(node) == 2).then_some(()));
    importing.kill().unwrap();
    importing.wait().unwrap();
    assert_nothing_left(node, 1);

    // An export that nobody reads lets go of its snapshot.
    let mut exporting = flocker(&node.state, &["export", "db@one"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut start = [0; 512];
    std::io::Read::read_exact(exporting.stdout.as_mut().unwrap(), &mut start).unwrap();
    node.cli(&["destroy", "db@one"]).ends_with(4).says(&["using it"]);
    exporting.kill().unwrap();
    exporting.wait().unwrap();
    wait_until("the snapshot can be destroyed", LONG, || (node.cli(&["destroy", "db@one"]).code == 0).then_some(()));
}

#[test]
fn an_export_that_does_not_come_to_its_end_is_no_success() {
    let cluster = Cluster::start(1);
    let node = &cluster.nodes[0];
    write_random(&node.create_mounted("db").join("data"), 309, 30 << 20);
    node.cli(&["snapshot", "db@one"]).ok();

    let mut exporting =
        flocker(&node.state, &["export", "db@one"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(exporting.stdout.take());
    let output = exporting.wait_with_output().unwrap();

    assert_eq!(code_of(output.status), 1);
    assert!(String::from_utf8_lossy(&output.stderr).contains("not whole"), "{output:?}");
    node.cli(&["export", "db@none", "-o", "/dev/null"]).ends_with(3);
    node.cli(&["export", "none", "-o", "/dev/null"]).ends_with(3);
    let missing = cluster.scratch.path().join("no/such/folder/db.tar");
    node.cli(&["export", "db@one", "-o", missing.to_str().unwrap()]).ends_with(1).says(&["no/such/folder"]);
    node.cli(&["import", "copy", missing.to_str().unwrap()]).ends_with(3).says(&["no/such/folder"]);
}

#[test]
fn ctrl_c_ends_an_export_and_leaves_no_file() {
    let cluster = Cluster::start(1);
    let node = &cluster.nodes[0];
    node.create_mounted("db");
    node.cli(&["snapshot", "db@one"]).ok();
    let folder = cluster.scratch.folder("out");
    let file = folder.join("db.tar");

    let output = node.frozen(|| {
        let exporting = node.start_cli(&["export", "db@one", "-o", file.to_str().unwrap()]);
        wait_until("the export waits for the daemon", SHORT, || {
            fs::read_dir(&folder).unwrap().next().map(|found| found.unwrap())
        });
        let pid = rustix::process::Pid::from_raw(exporting.pid().try_into().unwrap()).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
        exporting.finish(SHORT)
    });

    output.ends_with(130).says(&["db.tar", "was not written"]);
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 0);
}

#[test]
fn a_terminal_gets_no_tarball_and_gives_none() {
    let cluster = Cluster::start(1);
    let node = &cluster.nodes[0];
    node.create_mounted("db");
    node.cli(&["snapshot", "db@one"]).ok();

    for (call, hint) in [(["export", "db@one"], "-o FILE"), (["import", "copy"], "flocker import copy FILE")] {
        let (code, said) = OnTerminal::start(&mut flocker(&node.state, &call)).finish(SHORT);
        assert_eq!(code, 2, "{said}");
        assert!(said.contains(hint), "{said}");
    }
    assert_eq!(histories(node).len(), 1);
}

#[test]
fn a_full_disk_is_told_in_words_and_the_space_is_given_back() {
    if !require("ext4") {
        return;
    }
    let scratch = Scratch::new();
    let place = scratch.mount(FileSystem::Ext4, "small", 64);
    let file = scratch.path().join("large.tar");
    let tree = scratch.folder("tree");
    write_random(&tree.join("large"), 310, 120 << 20);
    tar(&["-cf", file.to_str().unwrap(), "."], &tree);
    let cluster = with_pools(vec![Some(format!("directory:{}", place.join("pool").display()))], scratch);
    let node = &cluster.nodes[0];
    let free = || {
        let stat = rustix::fs::statvfs(&place).unwrap();
        stat.f_bavail * stat.f_frsize
    };
    let before = free();

    node.cli(&["import", "db", file.to_str().unwrap()]).ends_with(1).says(&["no space left on the pool"]);

    assert_nothing_left(node, 0);
    wait_until("the space is given back", SHORT, || (free() + (1 << 20) > before).then_some(()));
}

#[test]
fn an_ordinary_user_is_told_what_cannot_be_kept() {
    if !require("root") || !require("setpriv") {
        return;
    }
    let scratch = Scratch::new();
    let file = scratch.path().join("db.tar");
    let mut cluster =
        Cluster::with(scratch, vec![Options::default(), Options { user: Some("nobody"), ..Options::default() }]);
    let (a, b) = cluster.pair();
    let mount = a.create_mounted("db");
    write_ordinary_tree(&mount, 311, 64);
    run(Command::new("mknod").arg(mount.join("null")).args(["c", "1", "3"]));
    run(Command::new("mknod").arg(mount.join("loop")).args(["b", "7", "200"]));
    a.cli(&["snapshot", "db@one"]).ok();
    export(a, "db@one", &file);

    let imported = b.cli(&["import", "db", file.to_str().unwrap()]).ok().says(&["does not run as root"]).json();

    assert_eq!(imported["kind"], "new", "{imported}");
    let warnings = array(&imported["warnings"]);
    let left_out: Vec<String> =
        warnings.iter().map(|finding| text(&finding["path"])).filter(|path| path != ".").collect();
    assert_eq!(left_out, ["loop", "null"], "{imported}");
    assert_eq!(fs::read(b.mount("db").join("data.bin")).unwrap(), fs::read(mount.join("data.bin")).unwrap());

    // What is this user's own is the same at another place of this user's.
    let mine = b.create_mounted("mine");
    let as_nobody = ["--reuid=nobody", "--regid=nogroup", "--clear-groups", "touch"];
    run(Command::new("setpriv").args(as_nobody).arg(mine.join("file")));
    b.cli(&["snapshot", "mine@one"]).ok();
    export(b, "mine@one", &b.state.join("mine.tar"));
    b.cli(&["unmount", "mine"]).ok();
    b.cli(&["destroy", "mine"]).ok();
    assert_eq!(import(b, "mine", &b.state.join("mine.tar"))["kind"], "same");
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

/// Dies at each point of an import; afterwards the volume is there whole or not at all, and nothing else is.
fn dies_at_each_point(node: &mut Node, file: &Path) {
    for (number, point) in POINTS.iter().enumerate() {
        node.kill9();
        node.fault = Some((*point).to_owned());
        node.start();

        node.cli(&["import", "db", file.to_str().unwrap()]).ends_with(5);

        wait_until("the daemon is gone", SHORT, || node.is_dead().then_some(()));
        node.kill9();
        node.fault = None;
        node.start();
        let committed = number >= 4;
        let expected: Vec<&str> = if committed { vec!["db"] } else { vec![] };
        assert_eq!(histories(node).keys().collect::<Vec<_>>(), expected, "{point}");
        assert_eq!(volumes_in_pool(node), u64::from(committed), "{point}");
        assert_sound(node);
        wait_until("nothing lies about", SHORT, || leftovers(&node.pool()).is_empty().then_some(()));
        if committed {
            assert_eq!(histories(node)["db"], ["imported"], "{point}");
            node.cli(&["destroy", "db"]).ok();
        }
    }
    import(node, "db", file);
    assert_eq!(node.cli(&["inspect", "db"]).ok().json()["head"], "clean");
}

fn a_foreign_tarball(scratch: &Scratch) -> PathBuf {
    let (tree, file) = (scratch.folder("tree"), scratch.path().join("foreign.tar"));
    write_ordinary_tree(&tree, 314, 512);
    tar(&["-cf", file.to_str().unwrap(), "."], &tree);
    file
}

#[test]
fn on_a_directory_an_import_that_dies_is_whole_or_not_there() {
    let mut cluster = Cluster::start(1);
    let file = a_foreign_tarball(&cluster.scratch);
    dies_at_each_point(&mut cluster.nodes[0], &file);
}

#[test]
fn on_btrfs_an_import_that_dies_is_whole_or_not_there() {
    if !require("btrfs") {
        return;
    }
    let scratch = Scratch::new();
    let (file, pool) = (a_foreign_tarball(&scratch), btrfs_pool(&scratch, "btrfs"));
    let mut cluster = with_pools(vec![pool], scratch);
    dies_at_each_point(&mut cluster.nodes[0], &file);
}

#[test]
fn on_zfs_an_import_that_dies_is_whole_or_not_there() {
    let scratch = Scratch::new();
    let Some([host, _]) = ZfsHost::pair(&scratch) else { return };
    let file = a_foreign_tarball(&scratch);
    let mut cluster = Cluster::with(scratch, vec![host.options()]);
    dies_at_each_point(&mut cluster.nodes[0], &file);
}
