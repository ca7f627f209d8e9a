//! Pushes by flocker and by the pipe that an operator would build by hand from the same file system's own programs:
//! `… send | zstd -1 | ssh | … receive`, on the same pools, in one run, on loopback.
//!
//! `cargo bench -p flocker-tests --bench native`; the settings are in [`Settings`]. Needs root. Both contenders send the
//! same bytes from the same pool in turn (A B, A B, …); medians are compared. Times end when the data is durable.
//! Also shown: what a tiny delta costs from the command to its end, with the programs that both daemons started for it,
//! and what it takes to list many snapshots.
#![allow(clippy::unwrap_used)]

mod byhand;
#[path = "../push/ssh.rs"]
mod ssh;

use std::{
    fs,
    process::Command,
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use flocker_tests::{
    Cluster, Node, Scratch,
    data::{scribble, write_random},
    require,
};

use crate::{byhand::ByHand, ssh::Ssh};

/// What the environment says.
struct Settings {
    /// `FLOCKER_BENCH_SCALE`: 1 is the full size, 1 GiB.
    scale: f64,
    /// `FLOCKER_BENCH_SNAPSHOTS`: how many there are to list, 10,000 at full size. Taking them is what lasts.
    snapshots: u64,
    /// `FLOCKER_BENCH_STEPS`: how many small snapshots go in one push, 100 at full size.
    steps: u64,
    /// `FLOCKER_BENCH_RUNS`: how often each contender runs.
    runs: usize,
    /// `FLOCKER_BENCH_CASES`: some of `btrfs,zfs`.
    cases: String,
}

impl Settings {
    fn read() -> Self {
        let text = |name: &str| std::env::var(name).ok();
        let scale = text("FLOCKER_BENCH_SCALE").and_then(|text| text.parse().ok()).unwrap_or(1.0);
        let number = |name: &str| text(name).and_then(|text| text.parse().ok());
        Self {
            scale,
            snapshots: number("FLOCKER_BENCH_SNAPSHOTS").unwrap_or((10_000.0 * scale) as u64),
            steps: number("FLOCKER_BENCH_STEPS").unwrap_or((100.0 * scale) as u64).max(1),
            runs: text("FLOCKER_BENCH_RUNS").and_then(|text| text.parse().ok()).unwrap_or(3).max(1),
            cases: text("FLOCKER_BENCH_CASES").unwrap_or_else(|| "btrfs,zfs".to_owned()),
        }
    }

    fn scaled(&self, full: u64) -> u64 {
        ((full as f64 * self.scale) as u64).max(1)
    }
}

const FILES: u64 = 4;
/// How many snapshots of those that are listed a volume has.
const SNAPSHOTS_EACH: u64 = 100;
/// How many volumes are filled at once.
const FILLERS: usize = 4;
const MEBIBYTE: u64 = 1 << 20;

fn main() {
    let settings = Settings::read();
    let cargo = std::env::var_os("CARGO").unwrap_or("cargo".into());
    let built = Command::new(cargo).args(["build", "--release", "--locked", "-p", "flocker"]).status().unwrap();
    assert!(built.success(), "the release binary builds");
    println!("scale {}, {} runs each, medians; times in seconds", settings.scale, settings.runs);
    for case in settings.cases.split(',').map(str::trim) {
        let wanted = match case {
            "btrfs" => require("btrfs"),
            "zfs" => flocker_tests::zfs::has_openzfs() || require("zfs-fuse"),
            other => panic!("FLOCKER_BENCH_CASES has btrfs, zfs; not {other}"),
        };
        if wanted && require("ssh") {
            measure(case, &settings);
        }
    }
}

fn measure(case: &str, settings: &Settings) {
    let scratch = Scratch::below(&std::env::temp_dir());
    let (by_hand, options) = ByHand::prepare(case, &scratch);
    let ssh = by_hand.start_ssh(&scratch);
    let mut cluster = Cluster::with(scratch, options);
    let (a, b) = cluster.pair();
    for node in [&mut *a, &mut *b] {
        node.log_filter = Some("info,flocker_storage::command=debug".to_owned());
        node.stop();
        node.start();
    }
    println!("{}:", by_hand.name());
    deltas(settings, &ssh, &by_hand, a, b);
    steps(settings, &ssh, &by_hand, a);
    tiny(settings, a, b);
    listing(settings, a);
    let peak = |node: &Node| node.peak_resident_bytes() >> 20;
    println!("  highest resident memory of the daemons: {} and {} MiB", peak(a), peak(b));
}

/// The first push and 1 % of it changed.
fn deltas(settings: &Settings, ssh: &Ssh, by_hand: &ByHand, a: &Node, b: &Node) {
    let mount = a.create_mounted("data");
    let bytes = settings.scaled(1024 * MEBIBYTE);
    for number in 0..FILES {
        write_random(&mount.join(format!("table-{number}")), number, bytes / FILES);
    }
    by_hand.copy_head(&mount);
    a.cli(&["snapshot", "data@base"]).ok();
    by_hand.snapshot("base");
    let mut first = <[Vec<f64>; 3]>::default();
    let copy = |run| format!("data-{run}");
    for run in 0..settings.runs {
        first[0].push(push(a, "data@base", &copy(run)).0);
        first[1].push(by_hand.send(ssh, None, "base").as_secs_f64());
        by_hand.forget(&["base"]);
        if let Some(took) = by_hand.syncoid(ssh) {
            first[2].push(took.as_secs_f64());
            by_hand.forget(&["base"]);
        }
    }
    let blocks = (bytes / 100 / 4096 / FILES).max(1) as u32;
    for number in 0..FILES {
        let table = format!("table-{number}");
        scribble(&mount.join(&table), 100 + number, blocks);
        scribble(&by_hand.head().join(&table), 100 + number, blocks);
    }
    a.cli(&["snapshot", "data@new"]).ok();
    by_hand.snapshot("new");
    let mut delta = <[Vec<f64>; 3]>::default();
    for run in 0..settings.runs {
        delta[0].push(push(a, "data@new", &copy(run)).0);
        b.cli(&["destroy", &copy(run)]).ok();
        by_hand.send(ssh, None, "base");
        delta[1].push(by_hand.send(ssh, Some("base"), "new").as_secs_f64());
        by_hand.forget(&["new", "base"]);
        if by_hand.has_syncoid() {
            by_hand.send(ssh, None, "base");
            delta[2].extend(by_hand.syncoid(ssh).map(|took| took.as_secs_f64()));
            by_hand.forget(&["new", "base"]);
        }
    }
    show(&format!("first push of {} MiB", bytes / MEBIBYTE), &mut first);
    show("1 % of it changed", &mut delta);
}

/// Many small snapshots in one push.
fn steps(settings: &Settings, ssh: &Ssh, by_hand: &ByHand, a: &Node) {
    let mount = a.create_mounted("steps");
    let names: Vec<String> = (0..=settings.steps).map(|step| format!("t{step}")).collect();
    for name in &names {
        for head in [&mount, &by_hand.head()] {
            fs::write(head.join("small"), name).unwrap();
        }
        a.cli(&["snapshot", &format!("steps@{name}")]).ok();
        by_hand.snapshot(name);
    }
    let mut times = <[Vec<f64>; 3]>::default();
    for run in 0..settings.runs {
        let copy = format!("steps-{run}");
        push(a, "steps@t0", &copy);
        times[0].push(push(a, &format!("steps@t{}", settings.steps), &copy).0);
        by_hand.send(ssh, None, "t0");
        times[1].push(by_hand.send_all(ssh, &names).as_secs_f64());
        by_hand.forget(&names);
        if by_hand.has_syncoid() {
            by_hand.send(ssh, None, "t0");
            times[2].extend(by_hand.syncoid(ssh).map(|took| took.as_secs_f64()));
            by_hand.forget(&names);
        }
    }
    show(&format!("{} snapshots, a small file changed before each", settings.steps), &mut times);
}

/// Pushes under a name; returns the time in seconds and what travelled.
fn push(a: &Node, snapshot: &str, name: &str) -> (f64, serde_json::Value) {
    let started = Instant::now();
    let done = a.cli(&["push", snapshot, "host-b", "--as", name]).ok();
    (started.elapsed().as_secs_f64(), done.json())
}

/// What a delta of one small file costs, and how many programs it takes.
fn tiny(settings: &Settings, a: &Node, b: &Node) {
    let mount = a.create_mounted("tiny");
    fs::write(mount.join("file"), "0").unwrap();
    a.cli(&["snapshot", "tiny@s0"]).ok();
    push(a, "tiny@s0", "tiny");
    let mut times = Vec::new();
    let mut programs = 0;
    for run in 1..=settings.runs.max(5) {
        fs::write(mount.join("file"), run.to_string()).unwrap();
        let snapshot = format!("tiny@s{run}");
        a.cli(&["snapshot", &snapshot]).ok();
        let before = started_programs(a) + started_programs(b);
        times.push(push(a, &snapshot, "tiny").0);
        programs = started_programs(a) + started_programs(b) - before;
    }
    let median = median(&mut times);
    println!("  a tiny delta, from the command to its end: {median:.3} s, {programs} programs started by both daemons");
}

/// How long it takes to list many snapshots from the pool, as a daemon does when it starts.
fn listing(settings: &Settings, a: &mut Node) {
    let volumes = settings.snapshots.div_ceil(SNAPSHOTS_EACH);
    let next = AtomicU64::new(0);
    let fill = || {
        loop {
            let volume = next.fetch_add(1, Ordering::Relaxed);
            if volume >= volumes {
                break;
            }
            a.cli(&["create", &format!("many-{volume}")]).ok();
            for number in volume * SNAPSHOTS_EACH..((volume + 1) * SNAPSHOTS_EACH).min(settings.snapshots) {
                let body = serde_json::json!({ "name": format!("s{number}") });
                a.http("POST", &format!("/v1/volumes/many-{volume}/snapshots"), Some(&body)).is(201);
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..FILLERS {
            scope.spawn(fill);
        }
    });
    a.stop();
    let before = started_programs(a);
    let started = Instant::now();
    a.start();
    let took = started.elapsed();
    let programs = started_programs(a) - before;
    let listed = (0..volumes).map(|volume| {
        a.cli(&["snapshots", &format!("many-{volume}")]).ok().json().as_array().map_or(0, Vec::len) as u64
    });
    let listed: u64 = listed.sum();
    assert_eq!(listed, settings.snapshots);
    println!(
        "  start with {listed} snapshots in {volumes} volumes: {:.2} s, {programs} programs started",
        took.as_secs_f64()
    );
}

/// Counts the programs that a daemon has started so far, by its log.
fn started_programs(node: &Node) -> usize {
    node.log_text().matches("starts a program").count()
}

fn show(what: &str, times: &mut [Vec<f64>; 3]) {
    let spread = |times: &[f64]| {
        let (low, high) = times.iter().fold((f64::INFINITY, 0.0_f64), |(low, high), t| (low.min(*t), high.max(*t)));
        format!("{low:.2}–{high:.2}")
    };
    let flocker = median(&mut times[0]);
    println!("  {what}: flocker {flocker:.2} ({})", spread(&times[0]));
    for (name, times) in ["by hand", "syncoid"].iter().zip(&mut times[1..]).filter(|(_, times)| !times.is_empty()) {
        let (spread, median) = (spread(times), median(times));
        println!("    {name} {median:.2} ({spread}): {:.2} times as long", median / flocker);
    }
}

fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    let middle = times.len() / 2;
    if times.len() % 2 == 1 { times[middle] } else { f64::midpoint(times[middle - 1], times[middle]) }
}

/// Runs a shell line whose every part must succeed.
fn timed(script: &str) -> Duration {
    let started = Instant::now();
    flocker_tests::scratch::run(Command::new("bash").args(["-o", "pipefail", "-ec", script]));
    started.elapsed()
}
