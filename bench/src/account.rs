//! What a run costs in processor time and memory: of the daemons, and of the programs that a pipe is made of.
//!
//! Owns the reading of proc(5). Processor time is that of processes and of the children they have waited for. Memory of a
//! daemon is the kernel's own peak; that of a pipe is the highest sum over its processes, looked at again and again.

use std::{
    collections::{HashMap, HashSet},
    fs,
    sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel},
    thread::{self, JoinHandle},
    time::Duration,
};

use flocker_tests::{SHORT, wait_until};

/// How often the processes of a pipe are looked at: seldom enough to take no time from them.
const INTERVAL: Duration = Duration::from_millis(100);

/// The kernel's unit of processor time in proc(5) on every architecture (`USER_HZ`).
const TICKS_PER_SECOND: f64 = 100.0;

/// Which side of a transfer, as its index in a pair.
const SENDER: usize = 0;
const RECEIVER: usize = 1;

/// The processes whose costs are counted, besides the children of this one.
#[derive(Debug, Clone, Default)]
pub(crate) struct Counted {
    /// The daemons of both sides; without them what competes is a pipe of programs.
    pub(crate) daemons: Option<[u32; 2]>,
    /// What starts the programs of a pipe's other side.
    pub(crate) server: Option<u32>,
    /// Those that do what a kernel does elsewhere: their time counts, their memory does not.
    pub(crate) systems: Vec<u32>,
}

/// What was spent so far.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Spent(f64);

impl Spent {
    /// Reads the clocks: of the command line too, which is a child of this process that was waited for.
    pub(crate) fn so_far(counted: &Counted) -> Self {
        let all = |process: &u32| times(*process).map_or(0.0, |times| times.own + times.children);
        let children = |process: u32| times(process).map_or(0.0, |times| times.children);
        let others = counted.daemons.iter().flatten().chain(&counted.systems).map(all).sum::<f64>();
        Self(children(std::process::id()) + counted.server.map_or(0.0, children) + others)
    }

    /// Returns the seconds since an earlier reading.
    pub(crate) fn since(self, earlier: Self) -> f64 {
        (self.0 - earlier.0).max(0.0)
    }
}

/// Waits until a server has waited for all of its children, so that their time is in its account.
pub(crate) fn wait_idle(counted: &Counted) {
    let Some(server) = counted.server else { return };
    wait_until("the server's sessions end", SHORT, || {
        processes().values().all(|parent| *parent != server).then_some(())
    });
}

/// Measures the memory of a run.
pub(crate) enum Memory {
    Daemons([u32; 2]),
    Pipe { stop: SyncSender<()>, sampler: JoinHandle<[u64; 2]> },
}

impl Memory {
    pub(crate) fn start(counted: &Counted) -> Self {
        if let Some(daemons) = counted.daemons {
            for daemon in daemons {
                // Puts the peak back to what is resident now (proc_pid_clear_refs(5)).
                fs::write(format!("/proc/{daemon}/clear_refs"), "5").unwrap();
            }
            return Self::Daemons(daemons);
        }
        let server = counted.server;
        let (stop, stopped) = sync_channel(1);
        let there_before: HashSet<u32> = processes().into_keys().collect();
        let sample = move || {
            let mut peak = [0; 2];
            while stopped.recv_timeout(INTERVAL) == Err(RecvTimeoutError::Timeout) {
                for (peak, now) in peak.iter_mut().zip(resident(server, &there_before)) {
                    *peak = now.max(*peak);
                }
            }
            peak
        };
        Self::Pipe { stop, sampler: thread::spawn(sample) }
    }

    /// Returns the peaks of both sides, in bytes.
    pub(crate) fn stop(self) -> [u64; 2] {
        match self {
            Self::Daemons(daemons) => daemons.map(|daemon| status_bytes(daemon, "VmHWM:")),
            Self::Pipe { stop, sampler } => {
                drop(stop);
                sampler.join().unwrap()
            }
        }
    }
}

struct Times {
    own: f64,
    children: f64,
}

/// The fields of `/proc/PID/stat` behind the name, which may hold anything.
fn fields(process: u32) -> Option<Vec<String>> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    let (_, rest) = stat.rsplit_once(')')?;
    Some(rest.split_whitespace().map(str::to_owned).collect())
}

fn times(process: u32) -> Option<Times> {
    let fields = fields(process)?;
    // Fields 14 to 17 of proc_pid_stat(5), counted from 1; the name is the second.
    let ticks = |number: usize| fields.get(number - 3).and_then(|text| text.parse::<f64>().ok()).unwrap_or(0.0);
    Some(Times {
        own: (ticks(14) + ticks(15)) / TICKS_PER_SECOND,
        children: (ticks(16) + ticks(17)) / TICKS_PER_SECOND,
    })
}

/// All processes, and the parent of each.
fn processes() -> HashMap<u32, u32> {
    let mut found = HashMap::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Some(process) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        let parent = fields(process).and_then(|fields| fields.get(1)?.parse().ok());
        found.extend(parent.map(|parent| (process, parent)));
    }
    found
}

/// What the processes of a pipe have in memory now, at the sender and at the receiver: those below this process that were not there
/// before, and those below the server.
fn resident(server: Option<u32>, there_before: &HashSet<u32>) -> [u64; 2] {
    let own = std::process::id();
    let processes = processes();
    let mut sums = [0; 2];
    for process in processes.keys().copied().filter(|process| !there_before.contains(process)) {
        let mut at = process;
        let side = loop {
            match processes.get(&at).copied() {
                Some(parent) if Some(parent) == server => break Some(RECEIVER),
                Some(parent) if parent == own => break (!there_before.contains(&at)).then_some(SENDER),
                Some(parent) if parent > 1 => at = parent,
                _ => break None,
            }
        };
        if let Some(side) = side {
            sums[side] += status_bytes(process, "VmRSS:");
        }
    }
    sums
}

/// Reads a line of `/proc/PID/status`; nothing where the process is gone or has no memory of its own.
fn status_bytes(process: u32, key: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(key));
    let kibibytes = line.and_then(|line| line.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    kibibytes.unwrap_or(0) * 1024
}
