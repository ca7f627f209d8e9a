//! The comparison itself: with little data, all contenders of a ground bring over what they were given, and the document has their figures.
#![allow(clippy::unwrap_used)]

use std::{fs, process::Command};

use flocker_tests::{Scratch, flocker_binary, require, scratch::run};

const WORDS: &str = "# Benchmarks\n\nwhat somebody wrote\n";

/// Runs cases on one ground, and then the first of them again; checks that each contender has a row in each case.
#[track_caller]
fn compares(ground: &str, cases: &[&str], outcomes: usize, contenders: &[&str]) {
    let scratch = Scratch::new();
    let document = scratch.path().join("RESULTS.md");
    fs::write(&document, WORDS).unwrap();
    for (cases, outcomes) in [(cases, outcomes), (&cases[..1], 1)] {
        run(Command::new(env!("CARGO_BIN_EXE_flocker-bench"))
            .env("FLOCKER_TEST_BINARY", flocker_binary())
            .args(["--grounds", ground, "--cases", &cases.join(","), "--scale", "0.02", "--deltas", "2", "--runs", "1"])
            .arg("--dir")
            .arg(scratch.path())
            .arg("--write")
            .arg(&document));
        let written = fs::read_to_string(&document).unwrap();
        let section = written.strip_prefix(WORDS).expect("what was there before is there still");
        assert_eq!(
            section.matches("<!-- measured: ").count(),
            1,
            "one section, however often it is measured:\n{written}"
        );
        let rows: Vec<Vec<&str>> = section.lines().filter(|line| line.starts_with("| ")).skip(1).map(cells).collect();
        assert_eq!(rows.iter().filter(|row| !row[0].is_empty()).count(), outcomes, "the cases:\n{written}");
        for contender in contenders {
            let own: Vec<_> = rows.iter().filter(|row| row[1] == *contender).collect();
            assert!(!own.is_empty(), "{contender} has its rows:\n{written}");
            for row in own {
                assert!(row[2].parse::<f64>().unwrap() > 0.0, "{contender} took some time:\n{written}");
            }
        }
    }
}

fn cells(line: &str) -> Vec<&str> {
    line.trim_matches('|').split('|').map(str::trim).collect()
}

#[test]
fn directories_are_compared_with_ssh_rsync_and_tls() {
    if require("ssh") && require("rsync") && require("socat") {
        let contenders = ["flocker", "tar, zstd -1, ssh", "rsync -a, ssh"];
        compares("directory", &["big", "small", "delta", "tiny"], 4, &contenders);
    }
}

#[test]
fn btrfs_is_compared_with_its_own_programs() {
    if require("btrfs") && require("ssh") {
        let contenders =
            ["flocker", "btrfs send, zstd -1, ssh, btrfs receive", "btrfs send, btrfs receive: no other host"];
        compares("btrfs", &["big", "delta", "steps"], 3, &contenders);
    }
}

#[test]
fn zfs_is_compared_with_its_own_programs_and_syncoid() {
    if require("zfs-fuse") && require("syncoid") && require("ssh") {
        let contenders =
            ["flocker", "zfs send, zstd -1, ssh, zfs receive", "zfs send, zfs receive: no other host", "syncoid"];
        compares("zfs", &["big", "tiny", "steps"], 3, &contenders);
    }
}

#[test]
fn a_line_is_shared_with_tcp() {
    if require("tun") && require("ssh") && require("socat") {
        let contenders = ["flocker", "tar, zstd -1, ssh (TCP reno)", "tar, zstd -1, TLS over TCP (TCP bbr)"];
        // One outcome with each of the four beside flocker and with a second flocker, besides the two other cases.
        compares("line", &["long", "share", "kept"], 7, &contenders);
    }
}

#[test]
fn what_cannot_be_compared_is_refused_with_a_reason() {
    for (arguments, reason) in [
        (["--scale", "0"], "nothing would be sent"),
        (["--deltas", "0"], "nothing would be sent"),
        (["--runs", "0"], "nothing would be measured"),
        (["--dir", "/does/not/exist"], "no such folder"),
        (["--cases", "huge"], "invalid value 'huge'"),
    ] {
        let output = Command::new(env!("CARGO_BIN_EXE_flocker-bench")).args(arguments).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.contains(reason), "{arguments:?}: {said}");
    }
}
