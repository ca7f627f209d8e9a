//! The README's first command.

use std::{fs, os::unix::fs::chown, process::Command};

use flocker_tests::{
    LONG, Running, Scratch,
    command::clean,
    flocker_binary,
    needs::{program, user},
    require,
    scratch::mounts_below,
};

#[test]
fn the_demo_tells_its_story_and_cleans_up() {
    let scratch = Scratch::new();
    let mut command = Command::new(flocker_binary());
    clean(&mut command);
    command.arg("demo").env("TMPDIR", scratch.path());

    let story = Running::start(&mut command).finish(LONG).ok();

    let told = format!("{}{}", story.stdout, story.stderr);
    for word in ["host-a", "host-b", "db@one", "push", "equal"] {
        assert!(told.contains(word), "the demo does not tell of {word:?}:\n{told}");
    }
    assert!(mounts_below(scratch.path()).is_empty());
    let left: Vec<_> = std::fs::read_dir(scratch.path()).unwrap().flatten().map(|entry| entry.path()).collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn the_demo_needs_no_root() {
    if !require("root") || !require("setpriv") {
        return;
    }
    let scratch = Scratch::new();
    let (uid, gid) = user("nobody").unwrap();
    let home = scratch.folder("home");
    chown(&home, Some(uid), Some(gid)).unwrap();
    // The build's folder may be closed to other users.
    let binary = home.join("flocker");
    fs::copy(flocker_binary(), &binary).unwrap();
    let mut command = Command::new(program("setpriv").unwrap());
    clean(&mut command);
    command.args([format!("--reuid={uid}"), format!("--regid={gid}"), "--clear-groups".to_owned()]);
    command.arg(&binary).args(["demo", "--size", "20M"]).env("TMPDIR", &home).env("HOME", &home).current_dir(&home);

    let story = Running::start(&mut command).finish(LONG).ok();

    let told = format!("{}{}", story.stdout, story.stderr);
    assert!(told.contains("all equal") && told.contains("symlink"), "{told}");
    let left: Vec<_> = fs::read_dir(&home).unwrap().flatten().map(|entry| entry.path()).collect();
    assert_eq!(left, [binary]);
}
