//! Pushes the same data by flocker, by `tar | zstd -1 | ssh`, by `rsync -a` over ssh and by `tar` over TLS, on loopback in one run.
//!
//! `cargo bench -p flocker-tests --bench push`; the settings are in [`Settings`]. Each case runs all contenders in turn
//! (A B C, A B C, …) and compares medians. All times include making the data durable at the receiver. The result is a
//! Markdown table on standard output. `FLOCKER_TEST_BINARY` names a binary that was built before.
#![allow(clippy::unwrap_used)]

mod account;
mod case;
mod ssh;
mod table;
mod tls;

use std::process::Command;

use flocker_tests::{Cluster, Options, Scratch};

use crate::{
    case::{CASES, Case},
    ssh::Ssh,
    table::Runs,
    tls::Tls,
};

/// What the environment says.
struct Settings {
    /// `FLOCKER_BENCH_SCALE`: 1 is the full size; 0.05 is a quick look.
    scale: f64,
    /// `FLOCKER_BENCH_RUNS`: how often each contender runs.
    runs: usize,
    /// `FLOCKER_BENCH_CASES`: some of [`CASES`].
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
            cases: text("FLOCKER_BENCH_CASES").unwrap_or_else(|| CASES.to_owned()),
            folder: text("FLOCKER_BENCH_DIR"),
        }
    }
}

fn main() {
    let settings = Settings::read();
    build_release_binary();
    let missing: Vec<_> = ["tar", "zstd", "ssh", "sshd", "rsync", "socat", "openssl"]
        .into_iter()
        .filter(|name| flocker_tests::needs::program(name).is_none())
        .collect();
    if !missing.is_empty() {
        eprintln!("the benchmark compares with programs that are not installed: {}", missing.join(", "));
        return;
    }
    table::print_head(settings.scale, settings.runs);
    for name in settings.cases.split(',').map(str::trim) {
        let scratch = match &settings.folder {
            Some(folder) => Scratch::below(std::path::Path::new(folder)),
            None => Scratch::new(),
        };
        measure(name, &settings, scratch);
    }
    table::print_notes();
}

/// Runs one case with new nodes.
fn measure(name: &str, settings: &Settings, scratch: Scratch) {
    let servers = (Ssh::start(&scratch), Tls::new(&scratch));
    let mut cluster = Cluster::with(scratch, vec![Options::default(), Options::default()]);
    let place = cluster.scratch.path().to_owned();
    let (a, b) = cluster.pair();
    let mut case = Case::prepare(name, settings.scale, a, &place);
    let mut contenders: Vec<_> = case.contenders().iter().map(|contender| Runs::of(contender)).collect();
    for number in 0..settings.runs {
        for (runs, taken) in contenders.iter_mut().zip(case.run(a, b, &servers, number)) {
            runs.runs.push(taken);
        }
    }
    table::print_case(&case.title, &contenders);
}

fn build_release_binary() {
    if std::env::var_os("FLOCKER_TEST_BINARY").is_some() {
        return;
    }
    let cargo = std::env::var_os("CARGO").unwrap_or("cargo".into());
    let built = Command::new(cargo).args(["build", "--release", "--locked", "-p", "flocker"]).status().unwrap();
    assert!(built.success(), "the release binary builds");
}
