//! What a tarball becomes: the snapshot it says it is, a fork, or a new one that claims nothing; and who may write it.

use std::{fs, path::Path, process::Command};

use flocker_tests::{
    Cluster, Options, Scratch,
    data::write_ordinary_tree,
    invariants::{array, histories, text},
    require,
    scratch::run,
    tree::{Listing, assert_same},
};
use serde_json::{Value, json};

use super::{assert_nothing_left, export, import, snapshot, tar};

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
