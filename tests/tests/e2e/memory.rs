//! Memory stays bounded however large the file and however many the files; open files are allowed as many as are of use.

use std::fs;

use flocker_tests::{
    Cluster,
    data::{write_random, write_small_files},
    tree::assert_equal,
};
use rustix::process::{Resource, getrlimit, setrlimit};

/// What the issue allows each daemon; the benchmark shows the same bound at 4 GiB and 200,000 files.
const PEAK_LIMIT: u64 = 128 << 20;

#[test]
fn a_large_file_and_many_small_ones_stay_below_128_mebibytes_in_each_daemon() {
    let mut cluster = Cluster::start(2);
    let (a, b) = cluster.pair();
    let mount = a.create_mounted("db");
    write_random(&mount.join("large"), 100, 512 << 20);
    write_small_files(&mount.join("small"), 101, 20_000, 400);

    a.cli(&["snapshot", "db@one"]).ok();
    a.push("db@one", "host-b");

    for node in [&*a, &*b] {
        let peak = node.peak_resident_bytes();
        eprintln!("{}: peak {} MiB", node.name, peak >> 20);
        assert!(peak < PEAK_LIMIT, "{}: {} MiB", node.name, peak >> 20);
        let told = node.cli(&["node", "status"]).ok().json()["peak_resident_bytes"].as_u64().unwrap();
        assert!(told >= peak && told < PEAK_LIMIT, "the API tells the same: {told} and {peak}");
    }
    assert_equal(&mount, &b.mount("db"));
}

#[test]
fn a_daemon_allows_itself_more_open_files_than_it_is_given() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = Some(500);
    setrlimit(Resource::Nofile, limit).expect("lower the limit of this process and those it starts");
    let cluster = Cluster::start(1);
    let limits = fs::read_to_string(format!("/proc/{}/limits", cluster.nodes[0].pid())).expect("read the limits");
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files")).expect("a limit of open files");
    let allowed: Vec<_> = line.split_whitespace().map(|word| word.parse::<u64>().unwrap_or(u64::MAX)).collect();
    assert_eq!(allowed[0], limit.maximum.unwrap_or(u64::MAX).min(16 * 1024), "{line}");
}

#[test]
fn a_large_file_goes_through_memory_that_the_daemons_have() {
    const MEBIBYTES: u64 = 192;
    let mut cluster = Cluster::start(2);
    let (a, b) = cluster.pair();
    let mount = a.create_mounted("db");
    let mut seen = Vec::new();
    for snapshot in ["db@one", "db@two"] {
        write_random(&mount.join(snapshot), 102, MEBIBYTES << 20);
        a.cli(&["snapshot", snapshot]).ok();
        let before = [&*a, &*b].map(|node| node.pages_got());
        a.push(snapshot, "host-b");
        seen.push([0, 1].map(|which| [&*a, &*b][which].pages_got() - before[which]));
    }
    // With the first push it grows. Half of what arrives went through new pages before the allocator kept what it had.
    let pages = (MEBIBYTES << 20) / 4096;
    assert!(seen[1].iter().all(|got| *got < pages / 10), "{seen:?} of {pages}");
}
