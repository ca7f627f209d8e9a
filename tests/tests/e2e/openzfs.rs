//! What only OpenZFS can do: receives that go on by token, encrypted data that travels as it lies, holds. These tests run in
//! the test machine (tests/vm), where two hosts are two network namespaces with a pool each.

use std::{fs, sync::Arc};

use flocker_tests::{
    Cluster, LONG, Options, Scratch, ZfsHost,
    data::{random, seed, write_ordinary_tree, write_random},
    invariants::{assert_sound, histories, text},
    require,
    tree::{Listing, assert_equal, assert_same},
    wait_until,
};
use rand::Rng;
use serde_json::Value;

const MEBIBYTE: u64 = 1 << 20;

/// Two nodes on two hosts.
fn pair() -> Option<(Cluster, [Arc<ZfsHost>; 2])> {
    if !require("openzfs") {
        return None;
    }
    let scratch = Scratch::new();
    let hosts = ZfsHost::pair(&scratch)?;
    let options = hosts.each_ref().map(ZfsHost::options);
    Some((Cluster::with(scratch, options.to_vec()), hosts))
}

fn progress(transfer: &Value, field: &str) -> u64 {
    transfer["progress"][field].as_u64().unwrap_or_else(|| panic!("no {field} in {transfer}"))
}

/// The tokens of half-received datasets of a host.
fn tokens(host: &ZfsHost) -> Vec<String> {
    let printed =
        host.zfs(&["get", "-Hp", "-r", "-t", "filesystem", "-o", "value", "receive_resume_token", host.root()]);
    printed.lines().filter(|value| *value != "-").map(str::to_owned).collect()
}

/// Pushes over a slow line; at random places of the stream one of the daemons is killed and started again.
fn push_through_kills(cluster: &mut Cluster, hosts: &[Arc<ZfsHost>; 2], snapshot: &str, bytes: u64, seed: u64) {
    let mut random = random(seed);
    let (a, b) = cluster.pair();
    let before = histories(b);
    hosts[0].limit_line(12);
    let id = text(&a.cli(&["push", snapshot, "host-b", "--detach"]).ok().json()["id"]);
    let (mut went_on, mut kills) = (0, 0);
    for part in 0..3 {
        let until = random.random_range(bytes * part / 4..bytes * (part + 1) / 4) + bytes / 8;
        let transfer = wait_until("the push gets there", LONG, || {
            let transfer = a.transfer(&id);
            let over = transfer["state"] == "done";
            (over || progress(&transfer, "delta_bytes") >= until).then_some(transfer)
        });
        if transfer["state"] == "done" {
            break;
        }
        let killed = if random.random() { "sender" } else { "receiver" };
        eprintln!("killing the {killed} at {} of about {bytes} bytes", progress(&transfer, "delta_bytes"));
        if killed == "sender" {
            a.kill9();
            let has_landed = histories(b) != before;
            a.start();
            if has_landed {
                // All was on its way. That it is whole the caller sees, and below that nothing was left to send.
                kills += 1;
                break;
            }
        } else {
            b.kill9();
            went_on += tokens(&hosts[1]).len();
            b.start();
            // The sender goes on at once, and may be through with it already.
            let now = histories(b);
            assert!(now == before || a.wait_done(&id, LONG)["state"] == "done", "half of it shows: {now:?}");
        }
        kills += 1;
    }
    assert!(kills > 0, "it was over before anybody was killed");
    hosts[0].free_line();
    a.cli(&["push", snapshot, "host-b"]).ok();
    let done = if a.transfer(&id)["state"] == "done" { a.transfer(&id) } else { a.wait_done(&id, LONG) };
    eprintln!("{kills} kills, {went_on} tokens seen, in the end: {done}");
    assert_eq!(tokens(&hosts[1]), [""; 0], "nothing half is left");
    // Where the sender died when all was on its way, the receiver commits without it, be it while the next attempt compares histories:
    // there is nothing left to go on with, and nothing is sent.
    let was_there = done["outcome"]["verdict"] == "up-to-date" || progress(&done, "delta_bytes") == 0;
    assert!(was_there || progress(&done, "resumed") >= 1, "{done}");
}

#[test]
fn a_push_goes_on_by_token_after_kills_of_either_daemon() {
    let Some((mut cluster, hosts)) = pair() else { return };
    let seed = seed();
    let mount = cluster.nodes[0].create_mounted("db");
    write_ordinary_tree(&mount, seed, 512);
    write_random(&mount.join("large"), seed ^ 1, 12 * MEBIBYTE);
    cluster.nodes[0].cli(&["snapshot", "db@one"]).ok();
    push_through_kills(&mut cluster, &hosts, "db@one", 12 * MEBIBYTE, seed ^ 2);
    let at_one = Listing::of(&mount);
    let b = &cluster.nodes[1];
    assert_same(&at_one, &Listing::of(&b.mount("db")));
    b.cli(&["unmount", "db"]).ok();

    write_random(&mount.join("large"), seed ^ 3, 12 * MEBIBYTE);
    cluster.nodes[0].cli(&["snapshot", "db@two"]).ok();
    push_through_kills(&mut cluster, &hosts, "db@two", 12 * MEBIBYTE, seed ^ 4);

    let (a, b) = cluster.pair();
    assert_equal(&mount, &b.mount("db"));
    b.cli(&["clone", "db@one", "was"]).ok();
    assert_same(&at_one, &Listing::of(&b.mount("was")));
    assert_sound(a);
    assert_sound(b);
}

#[test]
fn a_half_received_snapshot_goes_on_where_its_token_says() {
    let Some((mut cluster, hosts)) = pair() else { return };
    let (a, b) = cluster.pair();
    let mount = a.create_mounted("db");
    write_random(&mount.join("large"), 250, 16 * MEBIBYTE);
    a.cli(&["snapshot", "db@one"]).ok();
    hosts[0].limit_line(12);
    let id = text(&a.cli(&["push", "db@one", "host-b", "--detach"]).ok().json()["id"]);
    wait_until("most of it has arrived", LONG, || {
        (progress(&a.transfer(&id), "delta_bytes") > 12 * MEBIBYTE).then_some(())
    });

    b.stop();
    assert_eq!(tokens(&hosts[1]).len(), 1, "a receive that was stopped in order is kept");
    b.start();
    hosts[0].free_line();
    a.cli(&["push", "db@one", "host-b"]).ok();

    let done = a.wait_done(&id, LONG);
    assert!(progress(&done, "resumed") >= 1, "{done}");
    assert!(progress(&done, "delta_bytes") < 24 * MEBIBYTE, "it did not begin anew: {done}");
    assert_equal(&mount, &b.mount("db"));
    assert_sound(b);
}

#[test]
fn an_encrypted_volume_travels_as_it_lies_and_comes_back() {
    if !require("openzfs") {
        return;
    }
    let scratch = Scratch::new();
    let Some([left, right]) = ZfsHost::pair(&scratch) else { return };
    let key = scratch.path().join("key");
    fs::write(&key, [7; 32]).unwrap();
    let location = format!("keylocation=file://{}", key.display());
    let secret = format!("{}/secret", left.root());
    left.zfs(&[
        "create",
        "-o",
        "encryption=on",
        "-o",
        "keyformat=raw",
        "-o",
        &location,
        "-o",
        "mountpoint=none",
        &secret,
    ]);
    let encrypted = Options { pool: Some(format!("zfs:{secret}")), ..left.options() };
    let mut cluster = Cluster::with(scratch, vec![encrypted, right.options()]);
    let (a, b) = cluster.pair();
    let mount = a.create_mounted("db");
    let words = "the plain text that nobody else may see. ".repeat(1000);
    fs::write(mount.join("letter"), &words).unwrap();
    write_ordinary_tree(&mount, 260, 256);
    a.cli(&["snapshot", "db@one"]).ok();
    a.push("db@one", "host-b");
    fs::write(mount.join("answer"), &words).unwrap();
    a.cli(&["snapshot", "db@two"]).ok();
    let transfer = a.push("db@two", "host-b");
    assert!(transfer["warnings"].is_null(), "{transfer}");
    let contents = Listing::of(&mount);

    assert_eq!(histories(b)["db"], ["one", "two"]);
    let volumes = format!("{}/volumes", right.root());
    let listed =
        right.zfs(&["list", "-H", "-r", "-d", "1", "-t", "filesystem", "-o", "name,encryption,keystatus", &volumes]);
    let replica = listed.lines().find(|line| line.split('\t').next() != Some(&*volumes)).expect("the replica");
    let fields: Vec<_> = replica.split('\t').collect();
    assert!(fields[1].starts_with("aes-") && fields[2] == "unavailable", "{replica}");
    b.cli(&["mount", "db", "--read-only"]).ends_with(2).says(&["key is not loaded here"]);

    // The first node loses it and gets it back; whoever has the key reads it.
    a.cli(&["unmount", "db"]).ok();
    a.cli(&["destroy", "db"]).ok();
    assert!(histories(a).is_empty());
    a.cli(&["pull", "db", "host-b"]).ok();
    assert_eq!(histories(a)["db"], ["one", "two"]);
    let id = text(&a.cli(&["inspect", "db"]).ok().json()["id"]);
    left.zfs(&["load-key", "-L", &format!("file://{}", key.display()), &format!("{secret}/volumes/{id}")]);
    assert_same(&contents, &Listing::of(&a.mount_to_read("db")));
}

#[test]
fn what_is_being_sent_is_held_against_the_operators_destroy() {
    let Some((mut cluster, hosts)) = pair() else { return };
    let (a, b) = cluster.pair();
    let mount = a.create_mounted("db");
    write_random(&mount.join("large"), 270, 16 * MEBIBYTE);
    a.cli(&["snapshot", "db@one"]).ok();
    a.push("db@one", "host-b");
    // More than what waits in buffers on the way: `zfs send` shall not be through with it.
    write_random(&mount.join("large"), 271, 16 * MEBIBYTE);
    a.cli(&["snapshot", "db@two"]).ok();
    let listed =
        hosts[0].zfs(&["list", "-H", "-r", "-t", "snapshot", "-o", "name", &format!("{}/volumes", hosts[0].root())]);
    hosts[0].limit_line(8);
    let id = text(&a.cli(&["push", "db@two", "host-b", "--detach"]).ok().json()["id"]);
    wait_until("it is under way", LONG, || (progress(&a.transfer(&id), "delta_bytes") > MEBIBYTE).then_some(()));

    for snapshot in listed.lines() {
        let refused = hosts[0].command("zfs".as_ref()).args(["destroy", snapshot]).output().unwrap();
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(!refused.status.success() && said.contains("held"), "{snapshot}: {said}");
    }

    hosts[0].free_line();
    a.wait_done(&id, LONG);
    assert_equal(&mount, &b.mount("db"));
    wait_until("nothing is held any more", LONG, || {
        let held = |snapshot: &str| hosts[0].zfs(&["holds", "-H", snapshot]);
        listed.lines().all(|snapshot| held(snapshot).is_empty()).then_some(())
    });
}

#[test]
fn bookmarks_of_an_operator_are_in_nobodys_way() {
    let Some((mut cluster, hosts)) = pair() else { return };
    let (a, b) = cluster.pair();
    let mount = a.create_mounted("db");
    write_ordinary_tree(&mount, 280, 64);
    a.cli(&["snapshot", "db@one"]).ok();
    a.push("db@one", "host-b");
    let bookmark = |host: &ZfsHost| {
        let volumes = format!("{}/volumes", host.root());
        let listed = host.zfs(&["list", "-H", "-r", "-t", "snapshot", "-o", "name", &volumes]);
        for snapshot in listed.lines() {
            let (dataset, name) = snapshot.split_once('@').expect("the name of a snapshot");
            host.zfs(&["bookmark", snapshot, &format!("{dataset}#mine-{name}")]);
        }
        host.zfs(&["list", "-H", "-r", "-t", "bookmark", "-o", "name", &volumes]).lines().count()
    };
    assert_eq!(hosts.each_ref().map(|host| bookmark(host)), [1, 1]);

    // Listed by a daemon that starts, too.
    a.stop();
    a.start();
    assert_eq!(histories(a)["db"], ["one"]);
    let mount = a.mount("db");
    fs::write(mount.join("more"), "more").unwrap();
    a.cli(&["snapshot", "db@two"]).ok();
    a.push("db@two", "host-b");
    assert_eq!(histories(b)["db"], ["one", "two"]);
    assert_same(&Listing::of(&mount), &Listing::of(&b.mount_to_read("db")));
    b.cli(&["unmount", "db"]).ok();
    b.cli(&["clone", "db@one", "copy"]).ok();
    a.cli(&["unmount", "db"]).ok();
    a.cli(&["rollback", "db@one", "--discard-newer"]).ok();
    assert_eq!(histories(a)["db"], ["one"]);
    b.cli(&["destroy", "copy"]).ok();
    for node in [&*a, &*b] {
        assert_sound(node);
        node.cli(&["destroy", "db"]).ok();
        assert!(histories(node).is_empty());
    }
}
