//! What a run costs in processor time and memory: of the daemons, and of the programs that a pipe is made of.
//!
//! Owns the reading of proc(5). Processor time is that of processes and of the children they have waited for. Memory of a
//! daemon is the kernel's own peak; that of a pipe is the highest sum over its processes, looked at again and again.

use std::{
    collections::HashMap,
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
pub(crate) const SENDER: usize = 0;
pub(crate) const RECEIVER: usize = 1;

/// The processes whose costs are counted.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Counted {
    /// Two daemons.
    Daemons(u32, u32),
    /// All children of this process but these, and all children of the last one, a server.
    Pipe { daemons: (u32, u32), server: u32 },
}

/// What was spent so far.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Spent(f64);

impl Spent {
    /// Reads the clocks: of the command line too, which is a child of this process that was waited for.
    pub(crate) fn so_far(counted: Counted) -> Self {
        let own = times(std::process::id()).map_or(0.0, |times| times.children);
        let others = match counted {
            Counted::Daemons(a, b) => {
                [a, b].into_iter().filter_map(times).map(|times| times.own + times.children).sum()
            }
            Counted::Pipe { server, .. } => times(server).map_or(0.0, |times| times.children),
        };
        Self(own + others)
    }

    /// Returns the seconds since an earlier reading.
    pub(crate) fn since(self, earlier: Self) -> f64 {
        (self.0 - earlier.0).max(0.0)
    }
}

/// Waits until a server has waited for all of its children, so that their time is in its account.
pub(crate) fn wait_idle(server: u32) {
    wait_until("the server's sessions end", SHORT, || {
        processes().values().all(|process| process.parent != server).then_some(())
    });
}

/// Measures the memory of a run.
pub(crate) struct Memory {
    counted: Counted,
    sampler: Option<(SyncSender<()>, JoinHandle<[u64; 2]>)>,
}

impl Memory {
    pub(crate) fn start(counted: Counted) -> Self {
        let sampler = match counted {
            Counted::Daemons(a, b) => {
                for daemon in [a, b] {
                    // Puts the peak back to what is resident now (proc_pid_clear_refs(5)).
                    fs::write(format!("/proc/{daemon}/clear_refs"), "5").unwrap();
                }
                None
            }
            Counted::Pipe { daemons, server } => {
                let (stop, stopped) = sync_channel(1);
                let sample = move || {
                    let mut peak = [0; 2];
                    while stopped.recv_timeout(INTERVAL) == Err(RecvTimeoutError::Timeout) {
                        for (peak, now) in peak.iter_mut().zip(resident(daemons, server)) {
                            *peak = now.max(*peak);
                        }
                    }
                    peak
                };
                Some((stop, thread::spawn(sample)))
            }
        };
        Self { counted, sampler }
    }

    /// Returns the peaks of both sides, in bytes.
    pub(crate) fn stop(self) -> [u64; 2] {
        match (self.counted, self.sampler) {
            (Counted::Daemons(a, b), _) => [a, b].map(|daemon| status_bytes(daemon, "VmHWM:")),
            (_, Some((stop, sampler))) => {
                drop(stop);
                sampler.join().unwrap()
            }
            (_, None) => [0; 2],
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

struct Process {
    parent: u32,
}

fn processes() -> HashMap<u32, Process> {
    let mut found = HashMap::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Some(process) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        let parent = fields(process).and_then(|fields| fields.get(1)?.parse().ok());
        found.extend(parent.map(|parent| (process, Process { parent })));
    }
    found
}

/// What the processes of a pipe have in memory now, at the sender and at the receiver.
fn resident(daemons: (u32, u32), server: u32) -> [u64; 2] {
    let own = std::process::id();
    let processes = processes();
    let mut sums = [0; 2];
    for process in processes.keys().copied() {
        let mut at = process;
        let side = loop {
            match processes.get(&at).map(|found| found.parent) {
                Some(parent) if parent == server => break Some(RECEIVER),
                Some(parent) if parent == own => {
                    break (![server, daemons.0, daemons.1].contains(&at)).then_some(SENDER);
                }
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
