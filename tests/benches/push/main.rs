//! Pushes the same data by flocker, by `tar | zstd -1 | ssh` and by `rsync -a` over ssh, on loopback in one run.
//!
//! `cargo bench -p flocker-tests`; the settings are in [`Settings`]. Each case runs all contenders in turn (A B C, A B C,
//! …) and compares medians. All times include making the data durable at the receiver.
#![allow(clippy::unwrap_used)]

mod case;
mod ssh;

use std::{process::Command, time::Duration};

use flocker_tests::{Cluster, Options, Scratch};

use crate::{case::Case, ssh::Ssh};

/// What the environment says.
struct Settings {
    /// `FLOCKER_BENCH_SCALE`: 1 is the full size; 0.05 is a quick look.
    scale: f64,
    /// `FLOCKER_BENCH_RUNS`: how often each contender runs.
    runs: usize,
    /// `FLOCKER_BENCH_CASES`: some of `real,delta,small,big`.
    cases: String,
    /// `FLOCKER_BENCH_DIR`: where the data lies; the temporary folder when left out.
    folder: Option<String>,
}

impl Settings {
    fn read() -> Self {
        let text = |name: &str| std::env::var(name).ok();
        Self {
            scale: text("FLOCKER_BENCH_SCALE").and_then(|text| text.parse().ok()).unwrap_or(1.0),
            runs: text("FLOCKER_BENCH_RUNS").and_then(|text| text.parse().ok()).unwrap_or(3).max(1),
            cases: text("FLOCKER_BENCH_CASES").unwrap_or_else(|| "real,delta,small,big".to_owned()),
            folder: text("FLOCKER_BENCH_DIR"),
        }
    }
}

/// One contender's times in one case.
#[derive(Default)]
struct Times(Vec<Duration>);

impl Times {
    fn median(&self) -> f64 {
        let mut sorted: Vec<_> = self.0.iter().map(Duration::as_secs_f64).collect();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len() / 2;
        if sorted.len() % 2 == 1 { sorted[middle] } else { f64::midpoint(sorted[middle - 1], sorted[middle]) }
    }

    fn spread(&self) -> String {
        let seconds = || self.0.iter().map(Duration::as_secs_f64);
        format!("{:.2}–{:.2}", seconds().fold(f64::INFINITY, f64::min), seconds().fold(0.0, f64::max))
    }
}

fn main() {
    let settings = Settings::read();
    build_release_binary();
    let missing: Vec<_> = ["tar", "zstd", "ssh", "sshd", "rsync"]
        .into_iter()
        .filter(|name| flocker_tests::needs::program(name).is_none())
        .collect();
    if !missing.is_empty() {
        eprintln!("the benchmark compares with programs that are not installed: {}", missing.join(", "));
        return;
    }
    println!("scale {}, {} runs each, medians; times in seconds", settings.scale, settings.runs);
    println!(
        "{:<34} {:>9} {:>12} {:>9} {:>12} {:>9} {:>12} | {:>7} {:>7} | {:>9} {:>9} | {:>6} {:>6}",
        "case",
        "flocker",
        "(range)",
        "tar+zstd",
        "(range)",
        "rsync",
        "(range)",
        "tar/f",
        "rsync/f",
        "delta MiB",
        "wire MiB",
        "peak A",
        "peak B"
    );
    for name in settings.cases.split(',').map(str::trim) {
        let scratch = match &settings.folder {
            Some(folder) => Scratch::below(std::path::Path::new(folder)),
            None => Scratch::new(),
        };
        measure(name, &settings, scratch);
    }
    println!(
        "tar/f and rsync/f: how many times as long the other took. peak: highest resident memory of each daemon, MiB."
    );
}

/// Runs one case with new nodes, so that the memory shown is of this case alone.
fn measure(name: &str, settings: &Settings, scratch: Scratch) {
    let ssh = Ssh::start(&scratch);
    let mut cluster = Cluster::with(scratch, vec![Options::default(), Options::default()]);
    let place = cluster.scratch.path().to_owned();
    let (a, b) = cluster.pair();
    let mut case = Case::prepare(name, settings.scale, a, &place);
    let mut times = [Times::default(), Times::default(), Times::default()];
    for run in 0..settings.runs {
        case.prepare_receivers(a, b, &ssh, run);
        times[0].0.push(case.by_flocker(a, run));
        times[1].0.push(case.by_tar(&ssh));
        times[2].0.push(case.by_rsync(&ssh));
        case.forget_receivers(b, run);
    }
    let [flocker, tar, rsync] = times;
    let ratio = |other: &Times| format!("{:.2}x", other.median() / flocker.median());
    let peak = |node: &flocker_tests::Node| node.peak_resident_bytes() >> 20;
    println!(
        "{:<34} {:>9.2} {:>12} {:>9.2} {:>12} {:>9.2} {:>12} | {:>7} {:>7} | {:>9} {:>9} | {:>6} {:>6}",
        case.title,
        flocker.median(),
        flocker.spread(),
        tar.median(),
        tar.spread(),
        rsync.median(),
        rsync.spread(),
        ratio(&tar),
        ratio(&rsync),
        mebibytes(case.delta_bytes),
        mebibytes(case.wire_bytes),
        peak(a),
        peak(b),
    );
    if peak(a) >= 128 || peak(b) >= 128 {
        println!("  a daemon took 128 MiB or more");
    }
}

fn mebibytes(bytes: u64) -> String {
    format!("{:.1}", bytes as f64 / 1_048_576.0)
}

fn build_release_binary() {
    let cargo = std::env::var_os("CARGO").unwrap_or("cargo".into());
    let built = Command::new(cargo).args(["build", "--release", "--locked", "-p", "flocker"]).status().unwrap();
    assert!(built.success(), "the release binary builds");
}
