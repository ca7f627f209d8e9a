//! Lines that are long, lossy or narrow. The line is [`flocker_tests::line`], the same for all contenders, UDP and TCP alike.

use std::{
    net::SocketAddr,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use flocker_tests::{
    Cluster, Node, Options, Scratch,
    data::write_random,
    line::{Bottleneck, Line, Quality},
};

use crate::{
    Arguments,
    case::{Case, Kind},
    contender::{Contender, Flocker, Role},
    course::{self, Outcome},
    ssh::Ssh,
    table::{Run, Runs},
    tar::Tar,
    tls::Tls,
};

/// One way; there and back it is twice as long.
const DELAY: Duration = Duration::from_millis(50);

/// 20 Mbit/s, and a queue of 64 packets.
const NARROW: Bottleneck = Bottleneck { bytes_per_second: 2_500_000, queue: 64 };

/// How TCP reacts to loss. Reno is always there; with these losses Cubic's window, which is Linux's default, is Reno's (RFC 9438, section
/// 4.3).
const TCP: [&str; 2] = ["reno", "bbr"];

const SSH_PORT: u16 = 2222;
const SEED: u64 = 26;

/// Lets all contenders run a case over a line.
pub(crate) fn compare(case: &Case, arguments: &Arguments) -> Vec<Outcome> {
    let scratch = Scratch::below(&arguments.dir);
    let line = Line::start(SEED);
    let [left, right] = line.ends.each_ref().map(|end| Options {
        end: Some(end.clone()),
        listen: Some(end.listen()),
        ..Options::default()
    });
    let (receiver, tls) = (&line.ends[1], Tls::new(&scratch));
    let address = SocketAddr::from((receiver.address(), SSH_PORT));
    let ssh = Ssh::start_at(&scratch, address, |program| receiver.command(program));
    let mut cluster = Cluster::with(scratch, vec![left, right]);
    let place = cluster.scratch.folder("others");
    let (a, b) = cluster.pair();
    let source = a.create_mounted("data");
    let (text, quality) = quality(case.kind);
    line.set(quality);
    if case.kind == Kind::Kept {
        return vec![tiny(case, text, &source, a, b, arguments.runs)];
    }
    let mut contenders: Vec<Box<dyn Contender + '_>> = vec![Box::new(Flocker::new(a, b))];
    for tcp in TCP {
        contenders.push(Box::new(Tar::over_ssh(&ssh, &source, &place).at(&line, tcp)));
        contenders.push(Box::new(Tar::over_tls(&tls, &source, &place).at(&line, tcp)));
    }
    let mut outcomes = match case.kind {
        Kind::Share => beside_each_other(case, &source, &mut contenders, a, b, arguments.runs),
        _ => vec![course::run(case, arguments.runs, std::slice::from_ref(&source), &mut contenders)],
    };
    outcomes.iter_mut().for_each(|outcome| outcome.title = format!("{text}: {}", outcome.title));
    outcomes
}

fn quality(kind: Kind) -> (&'static str, Quality) {
    let lossy = |loss: f64| Quality { delay: DELAY, loss, bottleneck: None };
    match kind {
        Kind::Lossy => ("100 ms, 0.1 % lost", lossy(0.001)),
        Kind::VeryLossy => ("100 ms, 1 % lost", lossy(0.01)),
        Kind::Narrow => ("100 ms, 20 Mbit/s, queue of 64 packets", Quality { bottleneck: Some(NARROW), ..lossy(0.0) }),
        Kind::Share => ("the same line, two at the same time", Quality { bottleneck: Some(NARROW), ..lossy(0.0) }),
        _ => ("100 ms", lossy(0.0)),
    }
}

/// Lets flocker and each contender, flocker among them, move the same data at the same time.
fn beside_each_other(
    case: &Case,
    source: &Path,
    contenders: &mut [Box<dyn Contender + '_>],
    a: &Node,
    b: &Node,
    runs: usize,
) -> Vec<Outcome> {
    let title = case.fill(&[source.to_owned()]);
    let snapshot = ["new".to_owned()];
    contenders[0].take(&snapshot[0], Role::New);
    let mut outcomes = Vec::new();
    for contender in contenders {
        let mut mine = Flocker::beside(a, b);
        let mut times = [Runs::of("flocker".to_owned()), Runs::of(format!("beside it: {}", contender.title()))];
        for _ in 0..runs {
            mine.prepare(None);
            contender.prepare(None);
            contender.get_set();
            let (one, other) = thread::scope(|scope| {
                let other = scope.spawn(|| seconds_of(|| contender.send(None, &snapshot)));
                (seconds_of(|| mine.send(None, &snapshot)), other.join().unwrap())
            });
            for (runs, seconds) in times.iter_mut().zip([one, other]) {
                runs.runs.push(Run { seconds, cost: None, wire_bytes: None });
            }
            mine.clean();
            contender.clean();
        }
        outcomes.push(Outcome { title: title.clone(), changed_bytes: None, contenders: times.into() });
    }
    outcomes
}

/// Measures what a tiny delta takes over a connection that is there, and with a new one.
fn tiny(case: &Case, text: &str, source: &Path, a: &Node, b: &mut Node, runs: usize) -> Outcome {
    let title = case.fill(&[source.to_owned()]);
    a.cli(&["snapshot", "data@base"]).ok();
    a.push("data@base", "host-b");
    let mut number = 0;
    let mut change = || {
        number += 1;
        write_random(&source.join("file"), number, 1000);
        a.cli(&["snapshot", &format!("data@{number}")]).ok();
        let seconds = seconds_of(|| a.push(&format!("data@{number}"), "host-b"));
        Run { seconds, cost: None, wire_bytes: None }
    };
    let [mut kept, mut new] = ["kept", "new"].map(|what| Runs::of(format!("flocker, the connection is {what}")));
    for _ in 0..runs {
        b.stop();
        b.start();
        new.runs.push(change());
        kept.runs.push(change());
    }
    Outcome { title: format!("{text}: {title}"), changed_bytes: None, contenders: vec![kept, new] }
}

fn seconds_of<T>(work: impl FnOnce() -> T) -> f64 {
    let started = Instant::now();
    let _ = work();
    started.elapsed().as_secs_f64()
}
