//! `flocker`: the command line, and the daemon's entry (`flocker node start`).
//!
//! Everything but `node start`, `init`, `join` and `completions` is a client of the daemon's HTTP API.

mod commands;
mod graph;
mod output;
mod progress;
mod report;
mod values;

use std::{io::Write as _, process::ExitCode};

use clap::Parser as _;
use report::Exit;

fn main() -> ExitCode {
    let call = commands::Call::parse();
    let paths = match call.global.paths() {
        Ok(paths) => paths,
        Err(error) => return fail(&error.into(), None),
    };
    match commands::run(call, &paths) {
        Ok(exit) => exit.into(),
        Err(error) => fail(&error, Some(&paths)),
    }
}

fn fail(error: &anyhow::Error, paths: Option<&flocker_node::config::Paths>) -> ExitCode {
    if report::is_closed_pipe(error) {
        return Exit::Done.into();
    }
    // Where nobody can be told, the exit code still says it.
    let _ = std::io::stderr().lock().write_all(output::printable(&report::tell(error, paths)).as_bytes());
    report::exit_of(error).into()
}
