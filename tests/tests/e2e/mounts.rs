//! Where a volume appears, and who may write there.

use std::{fs, io::ErrorKind, path::PathBuf};

use flocker_tests::{Cluster, Options, Scratch, invariants::text, node::is_mount_point, require, tree::assert_equal};

#[test]
fn as_root_a_mount_is_a_bind_mount_at_a_stable_place_that_names_only_the_volume() {
    if !require("root") {
        return;
    }
    let mut cluster = Cluster::start(1);
    let node = &mut cluster.nodes[0];
    node.cli(&["create", "db"]).ok();

    let first = node.cli(&["mount", "db"]).ok().json();
    let place = PathBuf::from(text(&first["path"]));
    assert_eq!(first["kind"], "bind");
    assert_eq!(place, node.state.join("mounts/db"), "no owner, no epoch, no id");
    assert!(is_mount_point(&place));
    fs::write(place.join("file"), "kept").unwrap();
    node.cli(&["unmount", "db"]).ok();
    assert!(!is_mount_point(&place));
    node.stop();
    node.start();

    assert_eq!(node.mount("db"), place);
    assert_eq!(fs::read_to_string(place.join("file")).unwrap(), "kept");
}

#[test]
fn a_mount_is_found_again_when_the_state_database_is_lost() {
    if !require("root") {
        return;
    }
    let mut cluster = Cluster::start(1);
    let node = &mut cluster.nodes[0];
    let place = node.create_mounted("db");
    node.create_mounted("web");
    node.cli(&["unmount", "web"]).ok();
    fs::write(place.join("file"), "1").unwrap();
    // A database that is there is believed.
    node.kill9();
    node.start();
    assert!(!node.log_text().contains("was not remembered"));

    node.kill9();
    for file in ["state.db", "state.db-wal", "state.db-shm"] {
        let _ = fs::remove_file(node.state.join(file));
    }
    node.start();

    assert_eq!(node.log_text().matches("was not remembered").count(), 1);
    assert_eq!(node.cli(&["inspect", "db"]).ok().json()["mount"]["path"], place.to_str().unwrap());
    fs::write(place.join("file"), "2").unwrap();
    node.cli(&["snapshot", "db@one"]).ok();
    node.cli(&["unmount", "db"]).ok();
    assert!(!is_mount_point(&place));
}

#[test]
fn a_mount_outlives_the_daemon() {
    if !require("root") {
        return;
    }
    let mut cluster = Cluster::start(1);
    let node = &mut cluster.nodes[0];
    let place = node.create_mounted("db");
    fs::write(place.join("before"), "1").unwrap();

    node.kill9();
    fs::write(place.join("while-down"), "2").unwrap();
    node.start();

    assert_eq!(node.cli(&["inspect", "db"]).ok().json()["mount"]["path"], place.to_str().unwrap());
    fs::write(place.join("after"), "3").unwrap();
    assert_eq!(fs::read_to_string(place.join("while-down")).unwrap(), "2");
    node.cli(&["unmount", "db"]).ok();
}

#[test]
fn a_mount_goes_where_the_user_says() {
    let cluster = Cluster::start(1);
    let node = &cluster.nodes[0];
    node.cli(&["create", "db"]).ok();
    let place = cluster.scratch.path().join("my-database");

    let mounted = node.cli(&["mount", "db", place.to_str().unwrap()]).ok().json();
    assert_eq!(mounted["path"], place.to_str().unwrap());
    fs::write(place.join("file"), "x").unwrap();
    node.cli(&["unmount", "db"]).ok();
    assert!(!place.join("file").exists());

    fs::create_dir_all(&place).unwrap();
    fs::write(place.join("somebody's"), "do not hide me").unwrap();
    let refused = node.cli(&["mount", "db", place.to_str().unwrap()]);
    assert_ne!(refused.code, 0);
    refused.says(&["my-database"]);
    assert_eq!(fs::read_to_string(place.join("somebody's")).unwrap(), "do not hide me");
}

#[test]
fn as_root_a_read_only_mount_and_a_replica_refuse_writes_by_the_kernel() {
    if !require("root") {
        return;
    }
    let mut cluster = Cluster::start(2);
    let (a, b) = cluster.pair();
    let mount = a.create_mounted("db");
    fs::write(mount.join("file"), "x").unwrap();
    a.cli(&["snapshot", "db@one"]).ok();
    a.push("db@one", "host-b");
    a.cli(&["unmount", "db"]).ok();

    let read_only = a.mount_to_read("db");
    let refused = fs::write(read_only.join("file"), "y").unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ReadOnlyFilesystem);
    let replica = b.cli(&["mount", "db"]).ok().json();
    assert_eq!(replica["read_only"], true);
    let refused = fs::write(format!("{}/file", text(&replica["path"])), "y").unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ReadOnlyFilesystem);
    assert_eq!(fs::read_to_string(format!("{}/file", text(&replica["path"]))).unwrap(), "x");
}

#[test]
fn a_replica_is_not_mounted_for_writing_until_it_is_promoted() {
    let mut cluster = Cluster::start(2);
    let (a, b) = cluster.pair();
    let mount = a.create_mounted("db");
    fs::write(mount.join("file"), "x").unwrap();
    a.cli(&["snapshot", "db@one"]).ok();
    a.push("db@one", "host-b");

    let ask = serde_json::json!({"access": "read-write"});
    b.http("POST", "/v1/volumes/db/mount", Some(&ask)).is_problem(409, "read_only_replica");
    let promoted = b.cli(&["promote", "db", "--force"]).ok().json();
    assert_eq!(promoted["role"], "primary");
    assert!(promoted["epoch"].as_u64() > a.cli(&["inspect", "db"]).ok().json()["epoch"].as_u64());
    let place = b.mount("db");
    fs::write(place.join("file"), "written on host-b").unwrap();
    assert_eq!(fs::read_to_string(mount.join("file")).unwrap(), "x");
}

#[test]
fn without_root_a_mount_is_a_symlink_and_says_so() {
    let ordinary = if flocker_tests::needs::is_root() {
        if !require("setpriv") {
            return;
        }
        Options { user: Some("nobody"), ..Options::default() }
    } else {
        Options::default()
    };
    let mut cluster = Cluster::with(Scratch::new(), vec![ordinary.clone(), ordinary]);
    let (a, b) = cluster.pair();
    a.cli(&["create", "db"]).ok();

    let mounted = a.cli(&["mount", "db"]).ok();
    let place = PathBuf::from(text(&mounted.json()["path"]));
    assert_eq!(mounted.json()["kind"], "symlink");
    mounted.says(&["symlink"]);
    assert!(fs::symlink_metadata(&place).unwrap().is_symlink());

    flocker_tests::data::write_ordinary_tree(&place, 4, 256);
    flocker_tests::scratch::run(
        std::process::Command::new("chown").args(["-Rh", "--reference"]).arg(&a.state).arg(place.join(".")),
    );
    a.cli(&["snapshot", "db@one"]).ok();
    a.push("db@one", "host-b");
    assert_equal(&place.canonicalize().unwrap(), &b.mount("db").canonicalize().unwrap());
    a.cli(&["unmount", "db"]).ok();
    assert!(fs::symlink_metadata(&place).is_err());
}

#[test]
fn a_mounted_volume_is_not_destroyed() {
    let cluster = Cluster::start(1);
    let node = &cluster.nodes[0];
    let place = node.create_mounted("db");
    fs::write(place.join("file"), "x").unwrap();

    node.cli(&["destroy", "db"]).ends_with(4).says(&["mounted"]);

    assert_eq!(fs::read_to_string(place.join("file")).unwrap(), "x");
}
