//! Pushes and pulls that go well: everything arrives, and only what is needed travels.

use std::fs;

use flocker_tests::{
    Cluster, LONG, Node,
    data::{scribble, write_ordinary_tree, write_random, write_small_files},
    invariants::{array, assert_sound, histories, text},
    tree::{Listing, assert_equal, assert_same},
    wait_until,
};
use serde_json::Value;

fn delta_bytes(transfer: &Value) -> u64 {
    transfer["progress"]["delta_bytes"].as_u64().unwrap()
}

#[test]
fn a_first_push_carries_the_whole_volume() {
    let mut cluster = Cluster::start(2);
    let (a, b) = cluster.pair();
    let mount = a.create_mounted("db");
    a.cli(&["set", "db", "team=storage"]).ok();
    write_ordinary_tree(&mount, 10, 4096);
    let taken = a.cli(&["snapshot", "db@one", "-m", "k=v"]).ok().json();

    let transfer = a.push("db@one", "host-b");

    assert_eq!(transfer["progress"]["steps_done"], 1);
    assert_equal(&mount, &b.mount("db"));
    let arrived = b.cli(&["inspect", "db@one"]).ok().json();
    for same in ["id", "name", "host", "created", "metadata", "logical_bytes", "parents"] {
        assert_eq!(arrived[same], taken[same], "{same}");
    }
    let (here, there) = (a.cli(&["inspect", "db"]).ok().json(), b.cli(&["inspect", "db"]).ok().json());
    assert_eq!(here["id"], there["id"]);
    assert_eq!(here["metadata"], there["metadata"]);
    assert_eq!(there["role"], "replica");
    assert_eq!(there["head"], "clean");
}

#[test]
fn a_second_push_carries_only_the_difference() {
    let mut cluster = Cluster::start(2);
    let (a, b) = cluster.pair();
    let mount = a.create_mounted("db");
    write_ordinary_tree(&mount, 11, 32 * 1024);
    a.cli(&["snapshot", "db@one"]).ok();
    let full = a.push("db@one", "host-b");

    scribble(&mount.join("data.bin"), 12, 20);
    fs::write(mount.join("new"), "a new file").unwrap();
    fs::rename(mount.join("script.sh"), mount.join("renamed.sh")).unwrap();
    fs::remove_dir_all(mount.join("many/d0000")).unwrap();
    a.cli(&["snapshot", "db@two"]).ok();
    let incremental = a.push("db@two", "host-b");

    assert!(delta_bytes(&full) > 32 << 20, "{full}");
    assert!(delta_bytes(&incremental) < 1 << 20, "20 changed blocks and some names: {incremental}");
    assert_equal(&mount, &b.mount("db"));
    assert_eq!(histories(b)["db"], ["one", "two"]);
}

#[test]
fn one_push_carries_several_snapshots_in_a_row() {
    let mut cluster = Cluster::start(2);
    let (a, b) = cluster.pair();
    let mount = a.create_mounted("db");
    let mut listings = Vec::new();
    for name in ["one", "two", "three", "four"] {
        write_random(&mount.join(name), 13, 300_000);
        fs::write(mount.join("current"), name).unwrap();
        a.cli(&["snapshot", &format!("db@{name}")]).ok();
        listings.push((name, Listing::of(&mount)));
    }

    let transfer = a.push("db@four", "host-b");

    assert_eq!(transfer["progress"]["steps_total"], 4);
    assert_eq!(histories(b)["db"], ["one", "two", "three", "four"]);
    for (name, listing) in listings {
        b.cli(&["clone", &format!("db@{name}"), &format!("was-{name}")]).ok();
        assert_same(&listing, &Listing::of(&b.mount(&format!("was-{name}"))));
    }
}

#[test]
fn a_snapshot_in_the_middle_is_pushed_up_to_itself_only() {
    let mut cluster = Cluster::start(2);
    let (a, b) = cluster.pair();
    let mount = a.create_mounted("db");
    for name in ["one", "two", "three"] {
        fs::write(mount.join("current"), name).unwrap();
        a.cli(&["snapshot", &format!("db@{name}")]).ok();
    }

    a.push("db@two", "host-b");
    assert_eq!(histories(b)["db"], ["one", "two"]);
    a.push("db@three", "host-b");

    assert_eq!(histories(b)["db"], ["one", "two", "three"]);
    assert_equal(&mount, &b.mount("db"));
}

#[test]
fn a_clone_whose_origin_the_peer_has_travels_as_the_difference() {
    let mut cluster = Cluster::start(2);
    let (a, b) = cluster.pair();
    let mount = a.create_mounted("db");
    write_ordinary_tree(&mount, 14, 32 * 1024);
    a.cli(&["snapshot", "db@one"]).ok();
    a.push("db@one", "host-b");
    a.cli(&["clone", "db@one", "staging"]).ok();
    let clone = a.mount("staging");
    fs::write(clone.join("only-in-staging"), "x").unwrap();
    a.cli(&["snapshot", "staging@s1"]).ok();

    let transfer = a.push("staging@s1", "host-b");

    assert!(delta_bytes(&transfer) < 1 << 20, "only the difference: {transfer}");
    assert_equal(&clone, &b.mount("staging"));
    let origin = b.cli(&["inspect", "staging"]).ok().json()["origin"].clone();
    assert_eq!(origin["name"], "db@one", "the clone hangs on the same snapshot there");
}

#[test]
fn a_pull_brings_a_volume_and_then_only_the_difference() {
    let mut cluster = Cluster::start(2);
    let (a, b) = cluster.pair();
    let mount = a.create_mounted("db");
    write_ordinary_tree(&mount, 15, 8 * 1024);
    a.cli(&["snapshot", "db@one"]).ok();

    let first = b.cli(&["pull", "db@one", "host-a"]).ok().json();
    assert_eq!(first["direction"], "pull");
    assert_eq!(first["state"], "done");
    scribble(&mount.join("data.bin"), 16, 5);
    a.cli(&["snapshot", "db@two"]).ok();
    let second = b.cli(&["pull", "db", "host-a"]).ok().json();

    assert!(delta_bytes(&second) < 1 << 20, "{second}");
    assert_eq!(histories(b)["db"], ["one", "two"], "without a name it takes the newest");
    assert_equal(&mount, &b.mount("db"));
}

#[test]
fn a_dry_run_says_what_would_be_done_and_changes_nothing() {
    let mut cluster = Cluster::start(2);
    let (a, b) = cluster.pair();
    let mount = a.create_mounted("db");
    write_ordinary_tree(&mount, 17, 512);
    a.cli(&["snapshot", "db@one"]).ok();
    let before = Listing::of(&b.pool());

    let answer = a.cli(&["push", "db@one", "host-b", "--dry-run"]).ok().json();

    assert_eq!(answer["dry_run"], true);
    let verdict = &answer["outcome"]["verdict"]["fast-forward"];
    assert!(verdict["base"].is_null() && verdict.is_object(), "{answer}");
    assert_same(&before, &Listing::of(&b.pool()));
    assert!(histories(b).is_empty());
}

#[test]
fn a_dry_run_says_how_much_would_be_sent_before_anything_is() {
    let mut cluster = Cluster::start(2);
    let (a, b) = cluster.pair();
    let mount = a.create_mounted("db");
    write_random(&mount.join("large"), 41, 6 << 20);
    write_random(&mount.join("changes"), 42, 1 << 20);
    a.cli(&["snapshot", "db@one"]).ok();
    let expected = |transfer: &Value| transfer["progress"]["expected_bytes"].as_u64().unwrap();
    let full = expected(&a.cli(&["push", "db@one", "host-b", "--dry-run"]).ok().json());
    a.push("db@one", "host-b");
    write_random(&mount.join("changes"), 43, 1 << 20);
    a.cli(&["snapshot", "db@two"]).ok();
    write_random(&mount.join("changes"), 44, 1 << 20);
    a.cli(&["snapshot", "db@three"]).ok();

    let push = a.cli(&["push", "db@three", "host-b", "--dry-run"]).ok().json();
    let pull = b.cli(&["pull", "db@three", "host-a", "--dry-run"]).ok().json();
    let said = a.cli_for_people(&["push", "db@three", "host-b", "--dry-run"]).ok();
    assert_eq!(histories(b)["db"], ["one"], "nothing was sent");
    let done = a.push("db@three", "host-b");

    assert!((7 << 20..8 << 20).contains(&full), "{full}");
    assert!((2 << 20..3 << 20).contains(&expected(&push)), "{push}");
    assert_eq!(expected(&push), expected(&pull), "the sender says so to whoever asks");
    assert_eq!(delta_bytes(&push) + delta_bytes(&pull), 0);
    // The headers of data records are not counted.
    assert!(delta_bytes(&done) < expected(&push) + (64 << 10), "{done}\n{push}");
    let sentence = "would send 2 snapshots (two, three), beginning with the difference to one (taken on host-a), 2.0 MiB of delta at most";
    assert!(said.stdout.contains(sentence) || said.stderr.contains(sentence), "{said:?}");
}

#[test]
fn a_push_of_what_is_there_is_up_to_date() {
    let mut cluster = Cluster::start(2);
    let (a, b) = cluster.pair();
    let mount = a.create_mounted("db");
    write_ordinary_tree(&mount, 18, 512);
    a.cli(&["snapshot", "db@one"]).ok();
    a.push("db@one", "host-b");
    let before = Listing::of(&b.pool().join("volumes"));

    let again = a.push("db@one", "host-b");

    assert_eq!(again["outcome"]["verdict"], "up-to-date");
    assert_eq!(delta_bytes(&again), 0);
    assert_same(&before, &Listing::of(&b.pool().join("volumes")));
}

#[test]
fn a_volume_takes_another_name_at_the_peer_and_keeps_it() {
    let mut cluster = Cluster::start(2);
    let (a, b) = cluster.pair();
    let mount = a.create_mounted("db");
    fs::write(mount.join("file"), "1").unwrap();
    a.cli(&["snapshot", "db@one"]).ok();

    let transfer = a.cli(&["push", "db@one", "host-b", "--as", "db-from-a"]).ok().json();
    assert_eq!(transfer["as_name"], "db-from-a");
    fs::write(mount.join("file"), "2").unwrap();
    a.cli(&["snapshot", "db@two"]).ok();
    a.cli(&["push", "db@two", "host-b", "--as", "db-from-a"]).ok();

    assert_eq!(histories(b)["db-from-a"], ["one", "two"]);
    assert_equal(&mount, &b.mount("db-from-a"));
}

#[test]
fn a_detached_push_is_waited_for_by_its_id() {
    let mut cluster = Cluster::start(2);
    let (a, b) = cluster.pair();
    let mount = a.create_mounted("db");
    write_random(&mount.join("data"), 19, 20 << 20);
    a.cli(&["snapshot", "db@one"]).ok();

    let started = a.cli(&["push", "db@one", "host-b", "--detach"]).ok().json();
    let id = text(&started["id"]);
    let done = a.cli(&["transfers", "wait", &id]).ok().json();

    assert_eq!(done["state"], "done");
    assert_eq!(array(&a.cli(&["transfers"]).ok().json())[0]["id"], id.as_str());
    assert_equal(&mount, &b.mount("db"));
}

#[test]
fn a_transfer_that_is_cancelled_leaves_nothing_at_the_receiver() {
    let scratch = flocker_tests::Scratch::new();
    let (mut cluster, proxy) = behind_a_line(scratch);
    let (a, b) = cluster.pair();
    let mount = a.create_mounted("db");
    write_random(&mount.join("data"), 20, 64 << 20);
    a.cli(&["snapshot", "db@one"]).ok();
    proxy.limit(4 << 20);
    let id = text(&a.cli(&["push", "db@one", "host-b", "--detach"]).ok().json()["id"]);
    flocker_tests::wait_until("the push is on its way", flocker_tests::SHORT, || {
        (delta_bytes(&a.transfer(&id)) > 1 << 20).then_some(())
    });

    a.cli(&["transfers", "cancel", &id]).ok();

    flocker_tests::wait_until("it is cancelled", flocker_tests::SHORT, || {
        (a.transfer(&id)["state"] == "cancelled").then_some(())
    });
    assert!(histories(b).is_empty());
    proxy.limit(0);
    a.push("db@one", "host-b");
    assert_equal(&mount, &b.mount("db"));
}

/// Two nodes with a line between them that can be slowed down and cut.
fn behind_a_line(scratch: flocker_tests::Scratch) -> (Cluster, flocker_tests::proxy::Proxy) {
    crate::interrupted::behind_a_line(scratch)
}

fn connections_made(node: &Node) -> usize {
    node.log_text().matches(" connected peer=").count()
}

#[test]
fn exchanges_one_after_the_other_share_a_connection() {
    let mut cluster = Cluster::start(2);
    let (a, b) = cluster.pair();
    let mount = a.create_mounted("db");
    for number in 0..5 {
        fs::write(mount.join("file"), number.to_string()).unwrap();
        a.cli(&["snapshot", &format!("db@s{number}")]).ok();
        a.push(&format!("db@s{number}"), "host-b");
        a.cli(&["log", "db", "--all-hosts"]).ok();
    }
    a.cli(&["pull", "db@s4", "host-b"]).ok();

    assert_eq!(connections_made(a), 1, "{}", a.log_text());
    assert_eq!(histories(b)["db"].len(), 5);
    assert_equal(&mount, &b.mount("db"));
}

/// A node serves 64 exchanges at once; there are a hundred.
#[test]
fn more_pushes_at_once_than_a_node_serves_all_arrive() {
    let mut cluster = Cluster::start(2);
    let (a, b) = cluster.pair();
    let names: Vec<String> = (0..100).map(|number| format!("v{number}")).collect();
    for name in &names {
        fs::write(a.create_mounted(name).join("file"), name).unwrap();
        a.cli(&["snapshot", &format!("{name}@one")]).ok();
    }
    let request = serde_json::json!({"peer": "host-b", "snapshot": "one"});
    for name in &names {
        a.http("POST", &format!("/v1/volumes/{name}/push"), Some(&request)).is(202);
    }
    flocker_tests::wait_until("all pushes come to rest", flocker_tests::LONG, || {
        let transfers = array(&a.cli(&["transfers"]).ok().json());
        transfers.iter().all(|transfer| transfer["finished"] != Value::Null).then_some(())
    });

    let there = histories(b);
    assert!(names.iter().all(|name| there[name] == ["one"]), "{there:?}");
    for name in &names {
        assert_eq!(fs::read_to_string(b.mount(name).join("file")).unwrap(), *name);
    }
}

/// A node lets an exchange wait 20 s for one of its 64 places.
#[test]
fn a_push_to_a_node_that_is_busy_is_told_so_and_arrives_when_there_is_room() {
    let mut cluster = Cluster::start(2);
    let (a, b) = cluster.pair();
    let names: Vec<String> = (0..65).map(|number| format!("v{number}")).collect();
    for (seed, name) in (0..).zip(&names) {
        write_random(&a.create_mounted(name).join("file"), seed, 1 << 20);
        a.cli(&["snapshot", &format!("{name}@one")]).ok();
    }
    let (last, slow) = names.split_last().unwrap();
    let request = serde_json::json!({"peer": "host-b", "snapshot": "one", "limit_bytes_per_second": 1024});
    let start =
        |name: &String| text(&a.http("POST", &format!("/v1/volumes/{name}/push"), Some(&request)).is(202).json()["id"]);
    let ids: Vec<String> = slow.iter().map(start).collect();
    flocker_tests::wait_until("all places are taken", flocker_tests::SHORT, || {
        ids.iter().all(|id| a.transfer(id)["outcome"] != Value::Null).then_some(())
    });

    let request = serde_json::json!({"peer": "host-b", "snapshot": "one"});
    let id = text(&a.http("POST", &format!("/v1/volumes/{last}/push"), Some(&request)).is(202).json()["id"]);
    let told = flocker_tests::wait_until("the peer says that it is busy", flocker_tests::LONG, || {
        let transfer = a.transfer(&id);
        (transfer["state"] == "interrupted").then_some(transfer)
    });
    for id in &ids {
        a.cli(&["transfers", "cancel", id]).ok();
    }
    a.wait_done(&id, flocker_tests::LONG);

    assert_eq!(told["problem"]["code"], "peer_busy", "{told}");
    assert_eq!(histories(b)[last], ["one"]);
}

#[test]
fn a_kept_connection_to_a_peer_that_was_killed_is_in_nobodys_way() {
    let mut cluster = Cluster::start(2);
    let (a, b) = cluster.pair();
    let mount = a.create_mounted("db");
    fs::write(mount.join("file"), "one").unwrap();
    a.cli(&["snapshot", "db@one"]).ok();
    a.push("db@one", "host-b");
    fs::write(mount.join("file"), "two").unwrap();
    a.cli(&["snapshot", "db@two"]).ok();

    b.kill9();
    b.start();
    let transfer = a.push("db@two", "host-b");

    assert_eq!(transfer["problem"], Value::Null);
    assert_equal(&mount, &b.mount("db"));
    // Where nobody answers any more, that is what is said.
    b.kill9();
    a.cli(&["push", "db@two", "host-b"]).ends_with(5).says(&["cannot reach host-b"]);
}

#[test]
fn two_pushes_of_one_volume_at_a_time_end_with_one_history() {
    let mut cluster = Cluster::start(2);
    let (a, b) = cluster.pair();
    let mount = a.create_mounted("db");
    write_random(&mount.join("data"), 21, 20 << 20);
    a.cli(&["snapshot", "db@one"]).ok();

    let first = a.start_cli(&["push", "db@one", "host-b"]);
    let second = a.start_cli(&["push", "db@one", "host-b"]);
    let codes = [first.finish(flocker_tests::LONG).code, second.finish(flocker_tests::LONG).code];

    assert!(codes.contains(&0), "{codes:?}");
    assert_eq!(histories(b)["db"], ["one"]);
    assert_equal(&mount, &b.mount("db"));
}

/// Both go on where they were when they are resumed, in whatever order: neither has taken the other's place.
#[test]
fn two_copies_of_a_volume_that_is_not_there_yet_arrive_beside_each_other() {
    let mut cluster = Cluster::start(2);
    let (a, b) = cluster.pair();
    let mount = a.create_mounted("db");
    write_random(&mount.join("data"), 24, 24 << 20);
    a.cli(&["snapshot", "db@one"]).ok();
    let push = |name| ["push", "db@one", "host-b", "--as", name, "--limit", "4M", "--detach"];
    let ids = ["left", "right"].map(|name| text(&a.cli(&push(name)).ok().json()["id"]));

    let both = wait_until("both have begun", LONG, || {
        let both = ids.each_ref().map(|id| a.transfer(id));
        both.iter().all(|transfer| delta_bytes(transfer) > 0).then_some(both)
    });
    assert!(both.iter().all(|transfer| transfer["state"] == "running"), "one waited for the other: {both:?}");
    for id in &ids {
        a.cli(&["transfers", "pause", id]).ok();
    }
    for id in ids.iter().rev() {
        a.cli(&["transfers", "resume", id]).ok();
    }
    let done = ids.map(|id| a.wait_done(&id, LONG));

    for (transfer, name) in done.iter().zip(["left", "right"]) {
        assert_eq!(transfer["progress"]["resumed"], 1, "{transfer}");
        assert_eq!(histories(b)[name], ["one"]);
        assert_equal(&mount, &b.mount_to_read(name));
    }
    // Each goes on by itself.
    write_random(&mount.join("more"), 25, 1000);
    a.cli(&["snapshot", "db@two"]).ok();
    for name in ["right", "left"] {
        a.cli(&["push", "db@two", "host-b", "--as", name]).ok();
    }
    assert_eq!(histories(b).into_values().collect::<Vec<_>>(), [["one", "two"], ["one", "two"]]);
    assert_sound(a);
    assert_sound(b);
}

#[test]
fn many_small_files_arrive_and_a_handful_of_changes_stays_a_handful() {
    let mut cluster = Cluster::start(2);
    let (a, b) = cluster.pair();
    let mount = a.create_mounted("db");
    write_small_files(&mount, 22, 10_000, 600);
    a.cli(&["snapshot", "db@one"]).ok();
    a.push("db@one", "host-b");
    for number in (0..10_000).step_by(1000) {
        fs::write(mount.join(format!("d{:04}/f{number:06}", number / 100)), "changed").unwrap();
    }
    a.cli(&["snapshot", "db@two"]).ok();

    let transfer = a.push("db@two", "host-b");

    assert!(delta_bytes(&transfer) < 100_000, "ten changes: {transfer}");
    assert_equal(&mount, &b.mount("db"));
}

#[test]
fn a_file_whose_times_lie_is_found_by_checksum() {
    let mut cluster = Cluster::start(2);
    let (a, b) = cluster.pair();
    let mount = a.create_mounted("db");
    fs::write(mount.join("file"), "one").unwrap();
    a.cli(&["snapshot", "db@one"]).ok();
    a.push("db@one", "host-b");
    let modified = fs::metadata(mount.join("file")).unwrap().modified().unwrap();
    fs::write(mount.join("file"), "two").unwrap();
    fs::File::options().write(true).open(mount.join("file")).unwrap().set_modified(modified).unwrap();

    a.cli(&["snapshot", "db@two", "--checksum"]).ok();
    a.cli(&["push", "db@two", "host-b", "--checksum"]).ok();

    assert_eq!(fs::read_to_string(b.mount("db").join("file")).unwrap(), "two");
}

#[test]
fn a_promoted_replica_pushes_back() {
    let mut cluster = Cluster::start(2);
    let (a, b) = cluster.pair();
    let mount = a.create_mounted("db");
    fs::write(mount.join("file"), "a").unwrap();
    a.cli(&["snapshot", "db@one"]).ok();
    a.push("db@one", "host-b");
    b.cli(&["promote", "db", "--force"]).ok();
    fs::write(b.mount("db").join("file"), "b").unwrap();
    b.cli(&["snapshot", "db@two"]).ok();
    a.cli(&["unmount", "db"]).ok();

    b.push("db@two", "host-a");

    assert_eq!(histories(a)["db"], ["one", "two"]);
    a.cli(&["clone", "db@two", "look"]).ok();
    assert_eq!(fs::read_to_string(a.mount("look").join("file")).unwrap(), "b");
    let taken = a.cli(&["inspect", "db@two"]).ok().json();
    assert_eq!(taken["host"]["name"], "host-b");
}

#[test]
fn a_volume_goes_round_three_nodes() {
    let mut cluster = Cluster::start(3);
    let mount = cluster.nodes[0].create_mounted("db");
    write_ordinary_tree(&mount, 23, 1024);
    let (a, rest) = cluster.nodes.split_at_mut(1);
    let [b, c] = rest else { unreachable!("three nodes") };
    a[0].cli(&["snapshot", "db@one"]).ok();
    a[0].push("db@one", "host-b");
    a[0].push("db@one", "host-c");

    b.push("db@one", "host-c");

    assert_equal(&b.mount("db"), &c.mount("db"));
    assert_eq!(histories(c)["db"], ["one"]);
}
