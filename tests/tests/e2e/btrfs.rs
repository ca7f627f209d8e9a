//! The btrfs driver under the real binary: pools in files and on devices, what the pool says of itself, and what the user
//! is told of a transfer.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use flocker_tests::{
    Cluster, LONG, Node, Options, SHORT, Scratch,
    data::{write_ordinary_tree, write_random},
    require,
    scratch::{FileSystem, run},
    tree::{Listing, assert_equal, assert_same},
    wait_until,
};

const MEBIBYTE: u64 = 1 << 20;

fn with_pool(pool: String) -> Options {
    Options { pool: Some(pool), ..Options::default() }
}

fn is_mounted(place: &Path) -> bool {
    fs::read_to_string("/proc/self/mountinfo").unwrap().contains(&format!(" {} ", place.display()))
}

/// The kernel lets a loop device go with its last user, which may be a moment after the mount.
fn wait_detached(image: &Path) {
    wait_until("no loop device has the file, as after a reboot", SHORT, || {
        run(Command::new("losetup").arg("--associated").arg(image)).is_empty().then_some(())
    });
}

#[test]
fn a_pool_in_a_file_is_made_and_mounted_again_after_a_reboot() {
    if !require("btrfs") {
        return;
    }
    let scratch = Scratch::new();
    let (image, place) = (scratch.path().join("pool.btrfs"), scratch.path().join("pool.btrfs.mounted"));
    let mut cluster = Cluster::with(scratch, vec![with_pool(format!("btrfs:{},size=512M", image.display()))]);
    let node = &mut cluster.nodes[0];
    assert!(is_mounted(&place) && fs::metadata(&image).unwrap().len() == 512 * MEBIBYTE);
    let mount = node.create_mounted("db");
    write_ordinary_tree(&mount, 140, 5 * 1024);
    node.cli(&["snapshot", "db@one"]).ok();
    let before = Listing::of(&mount);

    node.cli(&["unmount", "db"]).ok();
    node.stop();
    assert!(!is_mounted(&place));
    wait_detached(&image);
    node.start();
    assert_same(&before, &Listing::of(&node.mount("db")));

    // A power cut: what was mounted is gone without anybody having stopped.
    node.kill9();
    let mounts = flocker_tests::scratch::mounts_below(cluster.scratch.path());
    for mount in mounts.iter().rev() {
        run(Command::new("umount").arg(mount));
    }
    wait_detached(&image);
    let node = &mut cluster.nodes[0];
    node.start();
    assert_same(&before, &Listing::of(&node.mount("db")));
    node.restart_after_kill();
    assert_same(&before, &Listing::of(&node.mount("db")));
}

/// A loop device, which stands for a disk. Detached when dropped.
struct Disk(PathBuf);

impl Disk {
    fn new(scratch: &Scratch) -> Self {
        let image = scratch.path().join("disk");
        fs::File::create(&image).unwrap().set_len(400 * MEBIBYTE).unwrap();
        Self(run(Command::new("losetup").args(["--find", "--show"]).arg(&image)).trim().into())
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let mounted = Path::new("/run/flocker").join(format!("{}.mounted", self.0.file_name().unwrap().display()));
        let _ = Command::new("umount").arg(mounted).output();
        let _ = Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}

#[test]
fn a_disk_that_holds_something_is_named_and_wiped_only_on_demand() {
    if !require("btrfs") || !require("ext4") {
        return;
    }
    let scratch = Scratch::new();
    let disk = Disk::new(&scratch);
    run(Command::new("mkfs.ext4").args(["-q", "-F", "-L", "accounts"]).arg(&disk.0));
    let pool = format!("btrfs:{}", disk.0.display());
    let mut node = Node::new(&scratch, "host-a", with_pool(format!("{pool},wipe")));
    // Kept in the configuration it would hold for whatever the disk's name means after the next start.
    node.cli(&node.setup_arguments(&["init"]).iter().map(String::as_str).collect::<Vec<_>>())
        .ends_with(2)
        .says(&["node start --wipe"]);
    drop(node);
    node = Node::init(&scratch, "host-b", with_pool(pool));
    node.cli(&["node", "start"]).ends_with(1).says(&["ext4 (label \"accounts\")", "--wipe"]);
    assert!(run(Command::new("blkid").args(["-p", "-o", "export"]).arg(&disk.0)).contains("LABEL=accounts"));

    node.start_arguments = vec!["--wipe".to_owned()];
    node.start();
    node.cli(&["create", "db"]).ok();
    node.stop();
    node.start();
    assert_eq!(node.cli(&["inspect", "db"]).ok().json()["name"], "db", "a pool is never wiped");
    node.stop();
    node.start_arguments.clear();
    node.start();
    assert_eq!(node.cli(&["inspect", "db"]).ok().json()["name"], "db");
    node.stop();
}

#[test]
fn the_pool_status_shows_what_btrfs_says_and_holds_a_volume_to_its_quota() {
    if !require("btrfs") {
        return;
    }
    let scratch = Scratch::new();
    let place = scratch.mount(FileSystem::Btrfs, "disk", 512);
    let mut cluster = Cluster::with(scratch, vec![with_pool(format!("btrfs:{}/pool", place.display()))]);
    let node = &mut cluster.nodes[0];
    node.cli(&["create", "db", "--quota", "20M"]).ends_with(2).says(&["quotas are off", "btrfs quota enable"]);
    let shown = node.cli_for_people(&["pool", "status"]).ok().stdout;
    for line in ["profile of data: single", "profile of metadata: DUP", "send stream version: ", "quotas: "] {
        let said: String = shown.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(said.contains(line.trim()), "{line}: {shown}");
    }
    let status = node.cli(&["pool", "status"]).ok().json();
    let usage = run(Command::new("btrfs").args(["filesystem", "usage", "-b"]).arg(&place));
    let size: u64 =
        usage.lines().find_map(|line| line.trim().strip_prefix("Device size:")).unwrap().trim().parse().unwrap();
    assert_eq!(status["usage"]["total_bytes"], size);
    assert!(status["capabilities"]["facts"]["quotas"].as_str().unwrap().starts_with("off"), "{status}");

    node.stop();
    run(Command::new("btrfs").args(["quota", "enable"]).arg(&place));
    node.start();
    let status = node.cli(&["pool", "status"]).ok().json();
    assert_eq!(status["capabilities"]["facts"]["quotas"], "on", "{status}");
    node.cli(&["create", "db", "--quota", "20M"]).ok();
    let file = fs::File::create(node.mount("db").join("data")).unwrap();
    let error = (0..40)
        .try_for_each(|_| {
            std::io::Write::write_all(&mut &file, &vec![1; MEBIBYTE as usize])?;
            file.sync_data()
        })
        .unwrap_err();
    let full = [std::io::ErrorKind::QuotaExceeded, std::io::ErrorKind::StorageFull];
    assert!(full.contains(&error.kind()), "{error}");
}

/// Makes a snapshot writable, changes a file in it, and makes it read-only again.
fn tamper(pool: &Path, node: &Node, snapshot: &str) {
    let volume = node.cli(&["inspect", "db"]).ok().json()["id"].as_str().unwrap().to_owned();
    let held = node.cli(&["inspect", &format!("db@{snapshot}")]).ok().json()["id"].as_str().unwrap().to_owned();
    let tree = pool.join(format!("volumes/{volume}/snapshots/{held}/tree"));
    let property = |value: &str| {
        run(Command::new("btrfs").args(["property", "set", "-f", "-ts"]).arg(&tree).args(["ro", value]));
    };
    property("false");
    fs::write(tree.join("large"), "changed behind the node's back").unwrap();
    property("true");
}

#[test]
fn who_pushes_or_pulls_is_told_that_a_snapshot_went_in_full() {
    if !require("btrfs") {
        return;
    }
    let scratch = Scratch::new();
    let pools = ["left", "right"].map(|name| scratch.mount(FileSystem::Btrfs, name, 512).join("pool"));
    let options = pools.iter().map(|pool| with_pool(format!("btrfs:{}", pool.display()))).collect();
    let mut cluster = Cluster::with(scratch, options);
    let (a, b) = cluster.pair();
    let mount = a.create_mounted("db");
    write_random(&mount.join("large"), 141, 20 * MEBIBYTE);
    a.cli(&["snapshot", "db@one"]).ok();
    let transfer = a.push("db@one", "host-b");
    assert!(transfer.get("warnings").is_none(), "{transfer}");
    fs::write(mount.join("small"), "2").unwrap();
    a.cli(&["snapshot", "db@two"]).ok();
    tamper(&pools[0], a, "one");

    let pushed = a.cli(&["push", "db@two", "host-b"]).ok().says(&["warning", "two is sent in full", "one"]).json();

    let warnings = pushed["warnings"].as_array().unwrap();
    assert_eq!(warnings.len(), 1, "{pushed}");
    assert!(pushed["progress"]["delta_bytes"].as_u64().unwrap() > 20 * MEBIBYTE, "{pushed}");
    assert_equal(&mount, &b.mount("db"));
    b.cli(&["unmount", "db"]).ok();

    fs::write(mount.join("small"), "3").unwrap();
    a.cli(&["snapshot", "db@three"]).ok();
    tamper(&pools[0], a, "two");
    let pulled = b.cli(&["pull", "db@three", "host-a"]).ok().says(&["warning", "three is sent in full", "two"]).json();
    assert_eq!(pulled["warnings"].as_array().unwrap().len(), 1, "{pulled}");
    let id = pulled["id"].as_str().unwrap();
    assert!(b.cli_for_people(&["transfers", "show", id]).ok().stdout.contains("three is sent in full"));
    assert_equal(&mount, &b.mount("db"));
}

#[test]
fn a_native_step_that_does_not_fit_goes_on_in_the_portable_format_by_itself() {
    if !require("btrfs") {
        return;
    }
    let scratch = Scratch::new();
    let pools = ["left", "right"].map(|name| scratch.mount(FileSystem::Btrfs, name, 512).join("pool"));
    let [left, right] = pools.map(|pool| with_pool(format!("btrfs:{}", pool.display())));
    let mut cluster = Cluster::with(scratch, vec![left, Options::default(), right]);
    let [a, by_way_of, c] = cluster.nodes.as_mut_slice() else { panic!("three nodes") };
    a.wait_knows("host-c");
    by_way_of.wait_knows("host-c");
    let mount = a.create_mounted("db");
    write_ordinary_tree(&mount, 142, 1024);
    let socket = std::os::unix::net::UnixListener::bind(mount.join("socket")).unwrap();
    a.cli(&["snapshot", "db@one"]).ok();
    // A directory cannot take the socket, and so host-c gets the snapshot without it.
    a.cli(&["push", "db@one", "host-b"]).ok().says(&["warning: socket: it is a socket, which is left out"]);
    by_way_of.push("db@one", "host-c");
    drop(socket);
    fs::remove_file(mount.join("socket")).unwrap();
    fs::write(mount.join("more"), "more").unwrap();
    a.cli(&["snapshot", "db@two"]).ok();

    let pushed = a.cli(&["push", "db@two", "host-c"]).ok().says(&["warning", "portable format"]).json();

    assert_eq!(pushed["state"], "done", "{pushed}");
    assert_equal(&mount, &c.mount("db"));
    c.cli(&["unmount", "db"]).ok();

    // A pull from there is told the same.
    let socket = std::os::unix::net::UnixListener::bind(mount.join("socket")).unwrap();
    a.cli(&["snapshot", "db@three"]).ok();
    a.push("db@three", "host-b");
    by_way_of.push("db@three", "host-c");
    drop(socket);
    fs::remove_file(mount.join("socket")).unwrap();
    a.cli(&["snapshot", "db@four"]).ok();
    c.cli(&["pull", "db@four", "host-a"]).ok().says(&["warning", "portable format"]);
    assert_equal(&mount, &c.mount("db"));
}

#[test]
fn a_portable_receive_into_btrfs_goes_on_after_both_daemons_were_killed() {
    if !require("btrfs") {
        return;
    }
    let scratch = Scratch::new();
    let place = scratch.mount(FileSystem::Btrfs, "disk", 1024);
    let options = vec![Options::default(), with_pool(format!("btrfs:{}/pool", place.display()))];
    let mut cluster = Cluster::with(scratch, options);
    let (a, b) = cluster.pair();
    let mount = a.create_mounted("db");
    for number in 0..3 {
        write_random(&mount.join(format!("large-{number}")), 143 + number, 60 * MEBIBYTE);
    }
    a.cli(&["snapshot", "db@one"]).ok();
    b.kill9();
    b.fault = Some("btrfs.receive.checkpoint:2".to_owned());
    b.start();
    let id = a.cli(&["push", "db@one", "host-b", "--detach"]).ok().json()["id"].as_str().unwrap().to_owned();
    wait_until("the receiver dies at its second checkpoint", LONG, || b.is_dead().then_some(()));
    b.kill9();
    a.kill9();
    b.fault = None;
    b.start();
    a.start();

    let transfer = a.wait_done(&id, LONG);

    assert_eq!(transfer["progress"]["resumed"], 1, "{transfer}");
    assert_equal(&mount, &b.mount("db"));
}

#[test]
fn a_push_of_a_small_change_takes_few_programs() {
    if !require("btrfs") {
        return;
    }
    let scratch = Scratch::new();
    let pools = ["a", "b"].map(|name| scratch.mount(FileSystem::Btrfs, name, 256).join("pool"));
    let options = pools.map(|pool| with_pool(format!("btrfs:{}", pool.display())));
    let mut cluster = Cluster::with(scratch, options.to_vec());
    for node in &mut cluster.nodes {
        node.log_filter = Some("info,flocker_storage::command=debug".to_owned());
        node.stop();
        node.start();
    }
    let (a, b) = cluster.pair();
    let programs = || [&*a, &*b].map(|node: &Node| node.log_text().matches("starts a program").count());
    let mount = a.create_mounted("db");
    let mut pushes = Vec::new();
    for number in 1..=5 {
        fs::write(mount.join("file"), number.to_string()).unwrap();
        let snapshot = format!("db@s{number}");
        a.cli(&["snapshot", &snapshot]).ok();
        let before = programs();
        a.push(&snapshot, "host-b");
        let after = programs();
        pushes.push([after[0] - before[0], after[1] - before[1]]);
    }
    // Of an increment the sender starts `send` only. The receiver copies the base, looks whether it is as it was, asks the copy for
    // its name, receives, reads what arrived, and deletes the copy, which may fall into the next push.
    let increments = &pushes[1..];
    assert!(increments.iter().all(|[sender, receiver]| *sender == 1 && (5..=7).contains(receiver)), "{pushes:?}");
}
