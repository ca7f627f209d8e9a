//! Flocker beside what an operator would do without it: the same data, the same machine, in turn, several rounds; the results are
//! what docs/BENCHMARKS.md shows.
//!
//! `cargo run --release -p flocker-bench` compares everything; `--help` says how to compare less. Owns the cases ([`case`]), the
//! contenders ([`contender`] and the modules behind it), turn-taking ([`course`]) and what is counted ([`account`]). Refuses to know
//! the program from inside: flocker competes by its command line, as the others do. Neighbour: the harness of the tests, which makes the nodes,
//! the pools and the line.
#![allow(clippy::unwrap_used)]

mod account;
mod case;
mod contender;
mod copy;
mod course;
mod document;
mod ground;
mod line;
mod programs;
mod rsync;
mod ssh;
mod table;
mod tar;
mod tls;

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, ensure};
use clap::Parser;
use flocker_tests::needs::program;

use crate::{case::Kind, document::Section, ground::Ground};

/// Compares flocker with ssh pipelines, rsync, TLS over TCP, `btrfs send`, `zfs send` and syncoid, on this machine, and prints Markdown.
#[derive(Debug, Parser)]
struct Arguments {
    /// What the pools are, or the line that is pushed over.
    #[arg(long, value_delimiter = ',', default_values = ["directory", "btrfs", "zfs", "line"])]
    grounds: Vec<Ground>,
    /// Some cases only; those that a ground does not have are left out there.
    #[arg(long, value_delimiter = ',')]
    cases: Vec<Kind>,
    /// How much data: 1 is a file of 1 GiB, 200,000 small ones, 100 snapshots in one push.
    #[arg(long, default_value_t = 1.0)]
    scale: f64,
    /// How many tiny changes there are that are pushed one by one.
    #[arg(long, default_value_t = 500)]
    deltas: u64,
    /// How often each contender runs. A case of many pushes in a row runs once.
    #[arg(long, default_value_t = 3)]
    runs: usize,
    /// Where all files lie: on a tmpfs the programs are compared and not the disk.
    #[arg(long, default_value = "/dev/shm")]
    dir: PathBuf,
    /// Puts the tables into a document, each in the place of the one that was measured there before.
    #[arg(long, value_name = "FILE")]
    write: Option<PathBuf>,
}

/// The programs without which nothing is compared.
const NEEDED: [&str; 8] = ["tar", "zstd", "ssh", "sshd", "ssh-keygen", "rsync", "socat", "openssl"];

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    ensure!(arguments.scale > 0.0, "--scale {}: nothing would be sent", arguments.scale);
    ensure!(arguments.deltas > 0, "--deltas 0: nothing would be sent");
    ensure!(arguments.runs > 0, "--runs 0: nothing would be measured");
    ensure!(arguments.dir.is_dir(), "--dir {}: there is no such folder", arguments.dir.display());
    let missing: Vec<_> = NEEDED.into_iter().filter(|name| program(name).is_none()).collect();
    ensure!(missing.is_empty(), "these programs are compared with and not installed: {}", missing.join(", "));
    for ground in &arguments.grounds {
        ground.check()?;
    }
    build_release_binary()?;
    for ground in &arguments.grounds {
        let mut section = Section::new(*ground, &arguments.dir, arguments.scale, arguments.runs)?;
        println!("{}", section.text());
        for kind in Kind::of(*ground).filter(|kind| arguments.cases.is_empty() || arguments.cases.contains(kind)) {
            for outcome in ground.compare(kind, &arguments) {
                let rows = table::rows(&outcome);
                print!("{rows}");
                section.add(&rows);
            }
        }
        println!();
        if let Some(path) = &arguments.write {
            write(path, &section)?;
        }
    }
    Ok(())
}

fn write(path: &Path, section: &Section) -> anyhow::Result<()> {
    let document = std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    let document = section.put_into(&document)?;
    std::fs::write(path, document).with_context(|| format!("write {}", path.display()))
}

/// Builds flocker as it is released, unless `FLOCKER_TEST_BINARY` names one that was built before.
fn build_release_binary() -> anyhow::Result<()> {
    if std::env::var_os("FLOCKER_TEST_BINARY").is_some() {
        return Ok(());
    }
    let cargo = std::env::var_os("CARGO").unwrap_or("cargo".into());
    let built = Command::new(cargo).args(["build", "--release", "--locked", "-p", "flocker"]).status();
    ensure!(built.context("run cargo")?.success(), "the release binary does not build");
    Ok(())
}
