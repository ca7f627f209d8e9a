//! Fault points: places where a test makes the process die, compiled in for tests only.
//!
//! With the feature `fault-points`, `FLOCKER_FAULT=NAME` kills the process with SIGKILL when it passes the point of that
//! name, `FLOCKER_FAULT=NAME:N` at the Nth pass, `FLOCKER_FAULT=NAME,NAME` at the first of several; its last words name the
//! point. With the feature `simulation`, a simulation decides. Without them the calls are empty.

/// Dies here when a test asks for it.
#[inline]
pub fn point(name: &str) {
    #[cfg(feature = "simulation")]
    if let Some(hooks) = crate::simulation::hooks() {
        hooks.passed(name);
    }
    die_by_environment(name);
}

/// Tells whether a test has put a bug back that was fixed.
#[inline]
pub fn is_put_back(_bug: &str) -> bool {
    #[cfg(feature = "simulation")]
    if let Some(hooks) = crate::simulation::hooks() {
        return hooks.is_put_back(_bug);
    }
    false
}

#[cfg(feature = "fault-points")]
fn die_by_environment(name: &str) {
    use std::sync::atomic::{AtomicU32, Ordering};
    static PASSES: AtomicU32 = AtomicU32::new(0);
    let Ok(wanted) = std::env::var("FLOCKER_FAULT") else { return };
    let is_due = |wanted: &str| match wanted.split_once(':') {
        Some((wanted, at)) => wanted == name && at.parse() == Ok(PASSES.fetch_add(1, Ordering::SeqCst) + 1),
        None => wanted == name,
    };
    if wanted.split(',').any(is_due) {
        eprintln!("fault point {name}: killing this process");
        let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
        std::thread::park();
    }
}

#[cfg(not(feature = "fault-points"))]
#[inline]
fn die_by_environment(_name: &str) {}
