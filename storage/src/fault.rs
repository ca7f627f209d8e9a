//! Fault points: places where a test makes the process die, compiled in for tests only.
//!
//! With the feature `fault-points`, `FLOCKER_FAULT=NAME` kills the process with SIGKILL when it passes the point of that
//! name, `FLOCKER_FAULT=NAME:N` at the Nth pass. Without the feature the call is empty.

/// Dies here when the environment asks for it.
#[cfg(feature = "fault-points")]
pub fn point(name: &str) {
    use std::sync::atomic::{AtomicU32, Ordering};
    static PASSES: AtomicU32 = AtomicU32::new(0);
    let Ok(wanted) = std::env::var("FLOCKER_FAULT") else { return };
    let (wanted, at) = match wanted.split_once(':') {
        Some((wanted, at)) => (wanted.to_owned(), at.parse().unwrap_or(1)),
        None => (wanted, 1),
    };
    if wanted == name && PASSES.fetch_add(1, Ordering::SeqCst) + 1 == at {
        eprintln!("fault point {name}: killing this process");
        let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
        std::thread::park();
    }
}

/// Does nothing: fault points are not compiled in.
#[cfg(not(feature = "fault-points"))]
#[inline]
pub fn point(_name: &str) {}
