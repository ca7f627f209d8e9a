//! The README's first command.

use std::process::Command;

use flocker_tests::{LONG, Running, Scratch, command::clean, flocker_binary, scratch::mounts_below};

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
