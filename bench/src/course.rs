//! One case: the data is made once, and the contenders run in turn, A B C, A B C, ….

use std::{path::PathBuf, process::Command, time::Instant};

use flocker_tests::scratch::run as call;

use crate::{
    account::{Memory, Spent, wait_idle},
    case::{Case, Pushes},
    contender::{Contender, Role},
    table::{Run, Runs},
};

/// What a case came to.
#[derive(Debug)]
pub(crate) struct Outcome {
    /// What was sent.
    pub(crate) title: String,
    /// How many bytes the blocks of 4 KiB have that changed, where that is what the case is about.
    pub(crate) changed_bytes: Option<u64>,
    /// The first is the one that the others are compared with.
    pub(crate) contenders: Vec<Runs>,
}

/// Runs a case. Each of the heads gets the data; who competes sends from one of them.
pub(crate) fn run(case: &Case, runs: usize, heads: &[PathBuf], contenders: &mut [Box<dyn Contender + '_>]) -> Outcome {
    let title = case.fill(heads);
    let mut results: Vec<_> = contenders.iter().map(|contender| Runs::of(contender.title())).collect();
    let mut changed_bytes = None;
    match case.pushes() {
        Pushes::OneOf(count) => {
            let base = case.has_base().then(|| "base".to_owned());
            if let Some(base) = &base {
                take(contenders, base, Role::Base);
            }
            let snapshots: Vec<_> = (0..count).map(|number| format!("new-{number}")).collect();
            for (number, snapshot) in snapshots.iter().enumerate() {
                changed_bytes = case.change(heads, number as u64);
                take(contenders, snapshot, Role::New);
            }
            for number in 0..runs {
                contenders.iter_mut().for_each(|contender| contender.prepare(base.as_deref()));
                for (contender, results) in contenders.iter_mut().zip(&mut results) {
                    results.runs.push(timed(contender.as_mut(), base.as_deref(), &snapshots));
                }
                finish(contenders, (number == 0).then(|| &heads[0]));
            }
            weigh(contenders, &mut results, base.as_deref(), &snapshots, 1);
        }
        Pushes::OneEach(count) => {
            let mut before = "base".to_owned();
            take(contenders, &before, Role::Base);
            contenders.iter_mut().for_each(|contender| contender.prepare(Some(&before)));
            for number in 0..count {
                let snapshot = [format!("new-{number}")];
                case.change(heads, number);
                take(contenders, &snapshot[0], Role::New);
                for (contender, results) in contenders.iter_mut().zip(&mut results) {
                    results.add(timed(contender.as_mut(), Some(&before), &snapshot));
                }
                if number + 1 == count {
                    weigh(contenders, &mut results, Some(&before), &snapshot, count);
                }
                [before] = snapshot;
            }
            finish(contenders, Some(&heads[0]));
        }
    }
    Outcome { title, changed_bytes, contenders: results }
}

fn take(contenders: &mut [Box<dyn Contender + '_>], snapshot: &str, role: Role) {
    contenders.iter_mut().for_each(|contender| contender.take(snapshot, role));
}

/// Lets one contender send once.
fn timed(contender: &mut dyn Contender, base: Option<&str>, snapshots: &[String]) -> Run {
    call(&mut Command::new("sync"));
    contender.get_set();
    let counted = contender.counted();
    let (memory, before) = (Memory::start(&counted), Spent::so_far(&counted));
    let started = Instant::now();
    let wire_bytes = contender.send(base, snapshots);
    let seconds = started.elapsed().as_secs_f64();
    wait_idle(&counted);
    let cpu_seconds = Spent::so_far(&counted).since(before);
    Run { seconds, cost: Some((cpu_seconds, memory.stop())), wire_bytes }
}

/// Holds what has arrived against the head, where that is wanted, and takes it away.
fn finish(contenders: &mut [Box<dyn Contender + '_>], wanted: Option<&PathBuf>) {
    for contender in contenders {
        if let Some((head, arrived)) = wanted.and_then(|head| Some((head, contender.arrived()?))) {
            call(Command::new("diff").args(["-r", "--no-dereference"]).arg(head).arg(arrived));
        }
        contender.clean();
    }
}

/// Finds out what travels where nobody said so, of `times` such sends.
fn weigh(
    contenders: &mut [Box<dyn Contender + '_>],
    results: &mut [Runs],
    base: Option<&str>,
    snapshots: &[String],
    times: u64,
) {
    for (contender, results) in contenders.iter_mut().zip(results) {
        if results.wire_bytes().is_none() {
            results.weighed = contender.weigh(base, snapshots).map(|bytes| bytes * times);
        }
    }
}
