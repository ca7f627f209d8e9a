//! Exports and imports that fail or are broken off: it is told, and nothing is left.

use std::{fs, io::Write as _, process::Stdio};

use flocker_tests::{
    Cluster, LONG, SHORT, Scratch,
    command::{code_of, flocker},
    data::{write_ordinary_tree, write_random},
    invariants::histories,
    require,
    scratch::FileSystem,
    terminal::OnTerminal,
    wait_until,
};
use serde_json::json;

use super::{assert_nothing_left, export, import, tar, volumes_in_pool, with_pools};

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
