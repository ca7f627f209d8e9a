//! Waiting for a condition with a deadline.

use std::{
    thread,
    time::{Duration, Instant},
};

/// The deadline of what takes a moment: a start, an answer. Generous, since CI machines are slow and shared.
pub const SHORT: Duration = Duration::from_secs(60);

/// The deadline of what moves a lot of data.
pub const LONG: Duration = Duration::from_secs(300);

/// How often a condition is looked at.
const INTERVAL: Duration = Duration::from_millis(20);

/// Waits until `condition` gives a value and returns it.
///
/// # Panics
/// When the deadline passes; `what` says what was waited for.
#[track_caller]
pub fn wait_until<T>(what: &str, within: Duration, mut condition: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + within;
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(Instant::now() < deadline, "waited {within:?} in vain for: {what}");
        thread::sleep(INTERVAL);
    }
}
