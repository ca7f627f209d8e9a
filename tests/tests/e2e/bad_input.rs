//! Bad input gets a clear error, the right exit code, and nothing changes.

use std::{fs, os::unix::fs::PermissionsExt, path::Path};

use flocker_tests::{
    Cluster, Node, Options, Running, Scratch,
    command::flocker,
    data::write_random,
    invariants::{histories, wait_tidy},
    require,
    scratch::FileSystem,
    tree::{Listing, assert_same},
};

#[test]
fn bad_calls_are_usage_errors_and_change_nothing() {
    let cluster = Cluster::start(1);
    let node = &cluster.nodes[0];
    node.cli(&["create", "db"]).ok();
    node.cli(&["snapshot", "db@one"]).ok();
    let before = histories(node);

    let long = "x".repeat(129);
    let table: &[(&[&str], &str)] = &[
        (&["create", ""], "name"),
        (&["create", "../evil"], "evil"),
        (&["create", ".hidden"], "hidden"),
        (&["create", "-dash"], "dash"),
        (&["create", "a/b"], "a/b"),
        (&["create", "sp ace"], "sp ace"),
        (&["create", "ünïcode"], "name"),
        (&["create", &long], "128"),
        (&["create", "db2", "-m", "no-equal-sign"], "no-equal-sign"),
        (&["create", "db2", "-m", "=no-key"], "key"),
        (&["snapshot", "db"], "@"),
        (&["snapshot", "db@"], "name"),
        (&["snapshot", "db@a@b"], "a@b"),
        (&["snapshot", "db@a/b"], "a/b"),
        (&["clone", "db@one", "bad/name"], "bad/name"),
        (&["push", "db@one"], "usage"),
        (&["no-such-verb"], "no-such-verb"),
        (&["list", "--no-such-flag"], "no-such-flag"),
        (&["push", "db@one", "host-b", "--on-divergence", "overwrite"], "overwrite"),
        (&["push", "db@one", "host-b", "--on-divergence", "ours", "--as", "copy"], "--as"),
    ];
    for (call, word) in table {
        let output = node.cli(call);
        assert_eq!(output.code, 2, "{call:?}: {}", output.stderr);
        output.says(&[word]);
    }
    assert_eq!(before, histories(node));
}

#[test]
fn unknown_things_are_not_found_and_known_ones_are_in_the_way() {
    let cluster = Cluster::start(1);
    let node = &cluster.nodes[0];
    node.cli(&["create", "db"]).ok();
    node.cli(&["snapshot", "db@one"]).ok();

    let not_found: &[&[&str]] = &[
        &["inspect", "nope"],
        &["destroy", "nope"],
        &["mount", "nope"],
        &["set", "nope", "a=b"],
        &["snapshot", "nope@one"],
        &["snapshots", "nope"],
        &["inspect", "db@nope"],
        &["destroy", "db@nope"],
        &["rollback", "db@nope"],
        &["clone", "db@nope", "copy"],
        &["push", "nope@one", "host-b"],
        &["push", "db@nope", "host-b"],
        &["push", "db@one", "nobody"],
        &["pull", "db", "nobody"],
        &["transfers", "cancel", "00000000-0000-0000-0000-000000000000"],
        &["transfers", "pause", "00000000-0000-0000-0000-000000000000"],
        &["transfers", "resume", "00000000-0000-0000-0000-000000000000"],
    ];
    for call in not_found {
        let output = node.cli(call);
        assert_eq!(output.code, 3, "{call:?}: {}", output.stderr);
        assert!(!output.stderr.trim().is_empty(), "{call:?} says why");
    }
    node.cli(&["create", "db"]).ends_with(4).says(&["db"]);
    node.cli(&["snapshot", "db@one"]).ends_with(4).says(&["one"]);
    node.cli(&["clone", "db@one", "db"]).ends_with(4).says(&["db"]);
    node.cli(&["unmount", "db"]).ends_with(4).says(&["mounted"]);
    assert_eq!(histories(node).len(), 1);
}

#[test]
fn a_pool_path_that_is_a_file_is_refused() {
    let scratch = Scratch::new();
    let file = scratch.path().join("file");
    fs::write(&file, "precious").unwrap();
    let pool = Some(format!("directory:{}", file.display()));
    let mut node = Node::new(&scratch, "host-a", Options { pool, ..Options::default() });

    let made = node.cli(&node.setup_arguments(&["init"]));
    if made.code == 0 {
        node.spawn();
        assert_ne!(node.wait_end(), 0);
        node.wait_logged(file.to_str().unwrap());
    } else {
        made.says(&[file.to_str().unwrap()]);
    }
    assert_eq!(fs::read_to_string(&file).unwrap(), "precious");
}

#[test]
fn an_unknown_driver_is_refused_with_those_there_are() {
    let scratch = Scratch::new();
    let pool = Some("floppy:/dev/fd0".to_owned());
    let node = Node::new(&scratch, "host-a", Options { pool, ..Options::default() });

    let refused = node.cli(&node.setup_arguments(&["init"]));

    assert_ne!(refused.code, 0);
    refused.says(&["floppy", "directory"]);
}

#[test]
fn a_second_daemon_on_the_same_state_or_pool_is_refused() {
    let mut cluster = Cluster::start(1);
    let first = &mut cluster.nodes[0];
    first.cli(&["create", "db"]).ok();
    let pool = Some(format!("directory:{}", first.pool().display()));

    let mut other = Node::init(&cluster.scratch, "other", Options { pool, ..Options::default() });
    other.spawn();
    assert_ne!(other.wait_end(), 0);
    other.wait_logged("pool");

    let first = &cluster.nodes[0];
    let mut twice = flocker(&first.state, &["node", "start", "--listen", "127.0.0.1:0"]);
    let twice = Running::start(&mut twice).finish(flocker_tests::SHORT);
    assert_ne!(twice.code, 0);
    first.cli(&["inspect", "db"]).ok();
}

#[test]
fn a_pool_without_permission_is_an_error_in_words() {
    if !require("root") || !require("setpriv") {
        return;
    }
    let scratch = Scratch::new();
    let closed = scratch.folder("closed");
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o700)).unwrap();
    let pool = Some(format!("directory:{}/pool", closed.display()));
    let mut node = Node::new(&scratch, "host-a", Options { pool, user: Some("nobody"), ..Options::default() });

    let made = node.cli(&node.setup_arguments(&["init"]));
    let said = if made.code == 0 {
        node.spawn();
        assert_ne!(node.wait_end(), 0);
        node.log_text()
    } else {
        made.stderr
    };
    assert!(said.contains("permission") || said.contains("may not write"), "{said}");
    assert!(said.contains(closed.to_str().unwrap()), "{said}");
}

#[test]
fn a_socket_path_that_is_too_long_is_an_error_that_says_so() {
    let scratch = Scratch::new();
    let long = scratch.folder(&"x".repeat(100));

    let refused = Running::start(&mut flocker(&long, &["init", "--name", "host-a"])).finish(flocker_tests::SHORT);

    assert_ne!(refused.code, 0);
    refused.says(&["socket", "107"]);
    assert_eq!(fs::read_dir(&long).unwrap().count(), 0);
}

#[test]
fn a_broken_configuration_is_named_with_line_and_column() {
    let scratch = Scratch::new();
    let mut node = Node::init(&scratch, "host-a", Options::default());
    let config = node.state.join("config.toml");
    let good = fs::read_to_string(&config).unwrap();
    let lines = good.lines().count();

    for (broken, line) in [("\"oops", lines + 1), ("unknown_key = 1", lines + 1), ("name = [", lines + 1)] {
        fs::write(&config, format!("{}\n{broken}\n", good.trim_end())).unwrap();
        let before = fs::metadata(&node.log).map_or(0, |log| log.len());
        node.spawn();
        assert_ne!(node.wait_end(), 0, "{broken}");
        let said = node.log_text()[before as usize..].to_owned();
        assert!(said.contains(&format!("config.toml:{line}:")) || broken.starts_with("name"), "{broken}: {said}");
        assert!(said.contains("config.toml:"), "{broken}: {said}");
    }
    fs::write(&config, good).unwrap();
    node.start();
}

#[test]
fn a_daemon_that_does_not_run_is_exit_code_5_and_how_to_start_it() {
    let scratch = Scratch::new();
    let node = Node::init(&scratch, "host-a", Options::default());

    node.cli(&["list"]).ends_with(5).says(&["node start"]);
}

#[test]
fn a_state_folder_without_a_node_says_how_to_make_one() {
    let scratch = Scratch::new();
    let empty = scratch.folder("empty");

    let refused = Running::start(&mut flocker(&empty, &["node", "start"])).finish(flocker_tests::SHORT);

    assert_ne!(refused.code, 0);
    refused.says(&["no node", empty.to_str().unwrap(), "init", "join"]);
}

#[test]
fn a_peer_that_is_down_is_exit_code_5_and_named() {
    let mut cluster = Cluster::start(2);
    let (a, b) = cluster.pair();
    a.create_mounted("db");
    a.cli(&["snapshot", "db@one"]).ok();
    b.stop();

    a.cli(&["push", "db@one", "host-b"]).ends_with(5).says(&["host-b"]);
}

/// A cluster whose second node has its pool on a file system of its own.
fn with_small_receiver(scratch: Scratch, mebibytes: u64) -> (Cluster, std::path::PathBuf) {
    let place = scratch.mount(FileSystem::Ext4, "small", mebibytes);
    let pool = Some(format!("directory:{}", place.join("pool").display()));
    let cluster = Cluster::with(scratch, vec![Options::default(), Options { pool, ..Options::default() }]);
    (cluster, place)
}

fn free_bytes(place: &Path) -> u64 {
    let stat = rustix::fs::statvfs(place).unwrap();
    stat.f_bavail * stat.f_frsize
}

#[test]
fn a_full_disk_at_the_receiver_is_told_in_words_and_the_space_is_given_back() {
    if !require("ext4") {
        return;
    }
    let (mut cluster, place) = with_small_receiver(Scratch::new(), 64);
    let (a, b) = cluster.pair();
    let mount = a.create_mounted("db");
    write_random(&mount.join("fits"), 40, 10 << 20);
    a.cli(&["snapshot", "db@one"]).ok();
    a.push("db@one", "host-b");
    let replica = b.mount("db");
    let (listing, free) = (Listing::of(&replica), free_bytes(&place));
    write_random(&mount.join("does-not"), 41, 120 << 20);
    a.cli(&["snapshot", "db@two"]).ok();

    let failed = a.cli(&["push", "db@two", "host-b"]);

    assert_ne!(failed.code, 0);
    let failed = failed.says(&["space", "host-b"]);
    assert_eq!(failed.json()["problem"]["code"], "peer_no_space", "{}", failed.stdout);
    assert_eq!(histories(b)["db"], ["one"]);
    assert_same(&listing, &Listing::of(&replica));
    flocker_tests::wait_until("the space is given back", flocker_tests::SHORT, || {
        (free_bytes(&place) + (1 << 20) > free).then_some(())
    });
    wait_tidy(b);
}

#[test]
fn a_full_disk_at_a_snapshot_leaves_the_volume_as_it_was() {
    if !require("ext4") {
        return;
    }
    let scratch = Scratch::new();
    let place = scratch.mount(FileSystem::Ext4, "small", 64);
    let pool = Some(format!("directory:{}", place.join("pool").display()));
    let cluster = Cluster::with(scratch, vec![Options { pool, ..Options::default() }]);
    let node = &cluster.nodes[0];
    let mount = node.create_mounted("db");
    write_random(&mount.join("more-than-half"), 42, 35 << 20);
    let free = free_bytes(&place);

    let failed = node.cli(&["snapshot", "db@one"]);

    assert_ne!(failed.code, 0);
    failed.says(&["space"]);
    assert!(histories(node)["db"].is_empty());
    flocker_tests::wait_until("the space is given back", flocker_tests::SHORT, || {
        (free_bytes(&place) + (1 << 20) > free).then_some(())
    });
    wait_tidy(node);
}
