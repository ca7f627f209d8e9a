//! Where hashing and compressing happen: on threads for blocking work, so that the reactor stays free.
//!
//! A runtime of one thread does it itself. Nothing would be won there by another thread but an order of events that no seed of a
//! simulation repeats.

use tokio::{
    runtime::{Handle, RuntimeFlavor},
    task::{JoinHandle, JoinSet},
};

fn is_alone() -> bool {
    Handle::current().runtime_flavor() == RuntimeFlavor::CurrentThread
}

/// Starts work that keeps a processor busy. Somebody awaits it.
pub(super) fn start<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
    if is_alone() {
        // The task is awaited by whoever holds the handle.
        #[expect(clippy::disallowed_methods)]
        tokio::task::spawn(async move { work() })
    } else {
        tokio::task::spawn_blocking(work)
    }
}

/// Starts such work as one of a set.
pub(super) fn start_in<T: Send + 'static>(set: &mut JoinSet<T>, work: impl FnOnce() -> T + Send + 'static) {
    if is_alone() {
        set.spawn(async move { work() });
    } else {
        set.spawn_blocking(work);
    }
}
