//! What a user sees of two histories that have gone apart: whose volume gives way, what is refused, and the drawing.

use std::fs;

use flocker_tests::{
    Cluster,
    invariants::{array, histories, text},
    situations::{Pools, Situation::Diverged, arrange, take, write_and_take},
};

fn directories() -> Cluster {
    Pools::Directory.cluster().expect("directories are everywhere")
}

#[test]
fn a_mounted_volume_is_not_replaced_and_its_mount_is_named() {
    let mut cluster = directories();
    let (a, b) = cluster.pair();
    arrange(a, b, "db", Diverged);
    let mount = b.mount("db");

    let refused = a.cli(&["push", "db@left", "host-b", "--on-divergence", "theirs"]);
    refused.ends_with(4).says(&["mounted", &mount.display().to_string()]);
    b.cli(&["pull", "db@left", "host-a", "--on-divergence", "theirs"]).ends_with(4).says(&["mounted"]);
    assert_eq!(histories(b)["db"], ["one", "right"]);
    assert_eq!(histories(b).len(), 1);

    // A fork does not touch it.
    a.cli(&["push", "db@left", "host-b", "--on-divergence", "fork"]).ok();
    assert_eq!(fs::read_to_string(mount.join("file")).unwrap(), "right");
    assert_eq!(histories(b).len(), 2);
}

#[test]
fn nobody_rewrites_a_peers_volume_without_the_right_to() {
    let mut cluster = Cluster::start(2);
    let (a, b) = cluster.pair();
    arrange(a, b, "db", Diverged);

    a.cli(&["push", "db@left", "host-b", "--on-divergence", "theirs"]).ends_with(1).says(&["force", "db"]);
    b.cli(&["pull", "db@left", "host-a", "--on-divergence", "ours"]).ends_with(1).says(&["force", "db"]);
    assert_eq!(histories(b)["db"], ["one", "right"]);
    assert_eq!(histories(a)["db"], ["one", "left"]);
    // The own volume is the user's to rewrite.
    b.cli(&["pull", "db@left", "host-a", "--on-divergence", "theirs"]).ok();
    assert_eq!(histories(b)["db"], ["one", "left"]);
}

#[test]
fn a_clone_that_has_nothing_of_its_own_to_go_back_to_says_so_on_both_sides() {
    let mut cluster = directories();
    let (a, b) = cluster.pair();
    a.create_mounted("db");
    take(a, "db", "one");
    a.push("db@one", "host-b");
    a.cli(&["clone", "db@one", "copy"]).ok();
    write_and_take(a, "copy", "left");
    a.push("copy@left", "host-b");
    write_and_take(a, "copy", "further");
    a.cli(&["destroy", "copy@left"]).ok();
    b.cli(&["promote", "copy"]).ok();
    write_and_take(b, "copy", "right");
    b.cli(&["destroy", "copy@left"]).ok();

    let say = ["copy has no snapshot of its own", "--on-divergence fork"];
    a.cli(&["push", "copy@further", "host-b", "--on-divergence", "theirs"]).ends_with(4).says(&say);
    b.cli(&["pull", "copy@further", "host-a", "--on-divergence", "theirs"]).ends_with(4).says(&say);
    assert_eq!(histories(a)["copy"], ["further"]);
    assert_eq!(histories(b)["copy"], ["right"]);

    a.cli(&["push", "copy@further", "host-b", "--on-divergence", "fork"]).ok();
    assert_eq!(histories(b)["copy"], ["right"]);
    assert_eq!(histories(b).len(), 3);
}

#[test]
fn a_dry_run_says_what_would_become_of_both() {
    let mut cluster = directories();
    let (a, b) = cluster.pair();
    arrange(a, b, "db", Diverged);

    let fork = a.cli(&["push", "db@left", "host-b", "--on-divergence", "fork", "--dry-run"]).ok().json();
    assert!(text(&fork["resolution"]["landed"]["volume"]).starts_with("db.host-a."), "{fork}");
    let theirs = a.cli(&["push", "db@left", "host-b", "--on-divergence", "theirs", "--dry-run"]).ok().json();
    assert!(text(&theirs["resolution"]["kept"]["place"]["volume"]).starts_with("db.host-b."), "{theirs}");
    assert_eq!(histories(b).len(), 1);

    let done = a.cli(&["push", "db@left", "host-b", "--on-divergence", "theirs"]).ok().json();
    assert_eq!(done["resolution"], theirs["resolution"]);
    assert_eq!(done["outcome"]["name"], "db");
}

#[test]
fn the_log_draws_both_branches_and_marks_who_holds_what() {
    let mut cluster = directories();
    let (a, b) = cluster.pair();
    arrange(a, b, "db", Diverged);
    a.cli(&["push", "db@left", "host-b", "--on-divergence", "fork"]).ok();

    let drawn = b.cli_for_people(&["log", "db", "--graph", "--all-hosts"]).ok().stdout;
    let columns: Vec<&str> = drawn.lines().take(4).map(|line| line.split("  ").next().unwrap()).collect();
    assert!(columns.contains(&"|/") && columns.contains(&"| *"), "{drawn}");
    let place = |name: &str| drawn.lines().find(|line| line.contains(&format!("  {name} ("))).unwrap().to_owned();
    assert!(place("one").contains("host-b:db") && place("one").contains("host-a:db"), "{drawn}");
    assert!(place("left").contains("host-b:db.host-a.") && place("left").contains("host-a:db]"), "{drawn}");
    assert!(place("right").contains("[host-b:db]"), "{drawn}");

    let graph = b.cli(&["log", "db", "--all-hosts"]).ok().json();
    assert_eq!(array(&graph["nodes"]).len(), 3);
    assert_eq!(array(&graph["edges"]).len(), 2);
    assert_eq!(graph["hosts"][1]["answer"], "holds");
    assert_eq!(graph["hosts"][1]["behind"], 1);

    a.kill9();
    let alone = b.cli(&["log", "db", "--all-hosts"]).ok().says(&["host-a", "not known"]).json();
    assert_eq!(alone["hosts"][1]["answer"], "unreachable", "{alone}");
}
