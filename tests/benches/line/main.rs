//! Pushes the same data by flocker, by `tar | zstd -1 | ssh` and by the same over TLS over lines that are long, lossy or narrow.
//!
//! `cargo bench -p flocker-tests --bench line`; the settings are in [`Settings`]. Needs root and TUN. The line is
//! [`flocker_tests::line`], the same for all of them. The contenders take turns (A B, A B, …); medians are compared. Times end when
//! the data is durable. TCP's congestion control is said with each, since kernels differ in their default.
#![allow(clippy::unwrap_used)]

mod contender;
#[path = "../push/ssh.rs"]
mod ssh;
#[path = "../push/tls.rs"]
mod tls;

use std::{fs, process::Command, thread, time::Duration};

use flocker_tests::{
    Cluster, Node, Options, Scratch,
    data::write_random,
    line::{Bottleneck, Line, Quality},
    needs::program,
    require,
};

use crate::contender::{Contender, Field};

/// What the environment says.
struct Settings {
    /// `FLOCKER_BENCH_MIB`: how much is pushed.
    mebibytes: u64,
    /// `FLOCKER_BENCH_RUNS`: how often each contender runs.
    runs: usize,
    /// `FLOCKER_BENCH_CASES`: some of [`LINES`], `share` and `tiny`.
    cases: String,
    /// `FLOCKER_BENCH_CONTENDERS`: `flocker`, `ssh-TCP` and `tls-TCP`, where TCP is a congestion control that the
    /// kernel allows in a network namespace. Reno is always there; with these losses Cubic's window is Reno's (RFC 9438, section 4.3).
    contenders: String,
}

impl Settings {
    fn read() -> Self {
        let text = |name: &str| std::env::var(name).ok();
        Self {
            mebibytes: text("FLOCKER_BENCH_MIB").and_then(|text| text.parse().ok()).unwrap_or(32),
            runs: text("FLOCKER_BENCH_RUNS").and_then(|text| text.parse().ok()).unwrap_or(3).max(1),
            cases: text("FLOCKER_BENCH_CASES").unwrap_or_else(|| "long,lossy,very-lossy,narrow,share,tiny".to_owned()),
            contenders: text("FLOCKER_BENCH_CONTENDERS")
                .unwrap_or_else(|| "flocker,ssh-reno,ssh-bbr,tls-reno,tls-bbr".to_owned()),
        }
    }
}

/// One way; there and back it is twice as long.
const DELAY: Duration = Duration::from_millis(50);

/// 20 Mbit/s, and a queue of 64 packets.
const NARROW: Bottleneck = Bottleneck { bytes_per_second: 2_500_000, queue: 64 };

/// The lines: a name, what the table says, how good it is.
const LINES: [(&str, &str, Quality); 4] = [
    ("long", "100 ms, no loss", Quality { delay: DELAY, loss: 0.0, bottleneck: None }),
    ("lossy", "100 ms, 0.1 % lost", Quality { delay: DELAY, loss: 0.001, bottleneck: None }),
    ("very-lossy", "100 ms, 1 % lost", Quality { delay: DELAY, loss: 0.01, bottleneck: None }),
    ("narrow", "100 ms, 20 Mbit/s, queue of 64 packets", Quality { delay: DELAY, loss: 0.0, bottleneck: Some(NARROW) }),
];

const SEED: u64 = 26;

fn main() {
    let settings = Settings::read();
    build_release_binary();
    let missing: Vec<_> =
        ["tar", "zstd", "ssh", "sshd", "socat", "openssl"].into_iter().filter(|name| program(name).is_none()).collect();
    if !missing.is_empty() {
        eprintln!("the benchmark compares with programs that are not installed: {}", missing.join(", "));
        return;
    }
    if !require("tun") {
        return;
    }
    let contenders: Vec<_> = settings.contenders.split(',').map(|name| Contender::named(name.trim())).collect();
    println!("{} MiB that do not compress, {} runs of each contender in turn.\n", settings.mebibytes, settings.runs);
    println!("| line | contender | median s | spread s | ratio | MB/s |");
    println!("|---|---|---:|---:|---:|---:|");
    for case in settings.cases.split(',').map(str::trim) {
        let scratch = Scratch::new();
        let line = Line::start(SEED);
        let [left, right] = line.ends.each_ref().map(|end| Options {
            end: Some(end.clone()),
            listen: Some(end.listen()),
            ..Options::default()
        });
        let field = Field::start(&scratch, &line);
        let mut cluster = Cluster::with(scratch, vec![left, right]);
        let (a, b) = cluster.pair();
        match case {
            "tiny" => tiny(&settings, &line, a, b),
            "share" => {
                line.set(LINES[3].2);
                share(&settings, &field, a, b, &contenders);
            }
            name => {
                let found = LINES.iter().find(|(known, ..)| *known == name);
                let (_, title, quality) = found.unwrap_or_else(|| panic!("there is no line {name}"));
                line.set(*quality);
                compare(&settings, title, &field, a, b, &contenders);
            }
        }
        eprintln!("{case}: {} packets lost at random, {} at a full queue", line.lost(), line.overflowed());
    }
    println!("\nRatio: the median beside flocker's; above 1 flocker was faster. Times end when the data is durable.");
}

/// Lets each contender move the same data, again and again.
fn compare(settings: &Settings, title: &str, field: &Field, a: &Node, b: &Node, contenders: &[Contender]) {
    let source = new_data(settings, a, "data");
    let mut times = vec![Vec::new(); contenders.len()];
    for number in 0..settings.runs {
        for (contender, times) in contenders.iter().zip(&mut times) {
            times.push(contender.run(field, a, "data", &source, number));
            contender.clean(field, b, "data", number);
        }
    }
    let first = median(&times[0]);
    for (contender, times) in contenders.iter().zip(&times) {
        let middle = median(times);
        println!(
            "| {title} | {} | {middle:.2} | {} | {:.2} | {:.2} |",
            contender.title(),
            spread(times),
            middle / first,
            (settings.mebibytes << 20) as f64 / middle / 1e6
        );
    }
}

/// Lets flocker and each contender move the same data at the same time over a narrow line.
fn share(settings: &Settings, field: &Field, a: &Node, b: &Node, contenders: &[Contender]) {
    let sources = ["data", "other"].map(|volume| new_data(settings, a, volume));
    let flocker = Contender::named("flocker");
    for contender in contenders {
        let mut times = [Vec::new(), Vec::new()];
        for number in 0..settings.runs {
            let (mine, its) = thread::scope(|scope| {
                let its = scope.spawn(|| contender.run(field, a, "other", &sources[1], number));
                (flocker.run(field, a, "data", &sources[0], number), its.join().unwrap())
            });
            times[0].push(mine);
            times[1].push(its);
            flocker.clean(field, b, "data", number);
            contender.clean(field, b, "other", number);
        }
        let [mine, its] = times.each_ref().map(|times| median(times));
        println!(
            "| 20 Mbit/s, at the same time | flocker and {} | {mine:.2} and {its:.2} | {} and {} | {:.2} | |",
            contender.title(),
            spread(&times[0]),
            spread(&times[1]),
            its / mine
        );
    }
}

/// Measures what a tiny delta takes over a connection that is there, and with a new one.
fn tiny(settings: &Settings, line: &Line, a: &Node, b: &mut Node) {
    let source = a.create_mounted("data");
    write_random(&source.join("file"), 1, 1000);
    a.cli(&["snapshot", "data@base"]).ok();
    a.push("data@base", "host-b");
    line.set(LINES[0].2);
    let change = |number: usize| {
        fs::write(source.join("file"), number.to_string()).unwrap();
        a.cli(&["snapshot", &format!("data@{number}")]).ok();
        contender::seconds(|| drop(a.push(&format!("data@{number}"), "host-b")))
    };
    let (mut kept, mut new) = (Vec::new(), Vec::new());
    for number in 0..settings.runs {
        b.stop();
        b.start();
        new.push(change(2 * number));
        kept.push(change(2 * number + 1));
    }
    for (what, times) in [("a connection that is there", kept), ("a new connection", new)] {
        println!("| 100 ms, a tiny delta | flocker, {what} | {:.2} | {} | | |", median(&times), spread(&times));
    }
}

fn new_data(settings: &Settings, a: &Node, volume: &str) -> std::path::PathBuf {
    let source = a.create_mounted(volume);
    write_random(&source.join("file"), 1, settings.mebibytes << 20);
    a.cli(&["snapshot", &format!("{volume}@new")]).ok();
    source
}

fn median(times: &[f64]) -> f64 {
    let mut sorted = times.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 { sorted[middle] } else { f64::midpoint(sorted[middle - 1], sorted[middle]) }
}

fn spread(times: &[f64]) -> String {
    let (low, high) =
        times.iter().fold((f64::INFINITY, 0.0_f64), |(low, high), time| (low.min(*time), high.max(*time)));
    format!("{low:.2}–{high:.2}")
}

fn build_release_binary() {
    if std::env::var_os("FLOCKER_TEST_BINARY").is_some() {
        return;
    }
    let cargo = std::env::var_os("CARGO").unwrap_or("cargo".into());
    let built = Command::new(cargo).args(["build", "--release", "--locked", "-p", "flocker"]).status().unwrap();
    assert!(built.success(), "the release binary builds");
}
