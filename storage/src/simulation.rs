//! What a simulation takes into its own hands: time, ids, pauses, crashes, and bugs that are put back.
//!
//! Compiled in with the feature `simulation` only, and without effect until a thread installs [`Hooks`]. Owns nothing but the
//! place where they are kept: one per thread, because all nodes of a simulation run on one.

use std::{cell::RefCell, rc::Rc, time::Duration};

use jiff::Timestamp;
use uuid::Uuid;

/// What a simulation decides. Each is asked on the thread that installed it, by whatever node is running there.
pub trait Hooks {
    /// The wall clock of the node that asks.
    fn now(&self) -> Timestamp;
    /// A new id, with the time of the node that asks in its upper bits.
    fn mint(&self) -> Uuid;
    /// A fault point was passed. May unwind, which is the death of the node as far as its pool can tell.
    fn passed(&self, fault_point: &str);
    /// How long the next step on a pool takes.
    fn pause(&self) -> Duration;
    /// The node that asks does something that is counted: it tells a peer something, or reads a lineage.
    fn noted(&self, what: &'static str);
    /// Whether a bug that was fixed is put back, to see that the harness finds it.
    fn is_put_back(&self, bug: &str) -> bool;
}

thread_local! {
    static HOOKS: RefCell<Option<Rc<dyn Hooks>>> = const { RefCell::new(None) };
}

/// Installs hooks on this thread until the guard is dropped.
#[must_use]
pub fn install(hooks: Rc<dyn Hooks>) -> Installed {
    HOOKS.set(Some(hooks));
    Installed(())
}

/// Takes the hooks away when it is dropped.
#[derive(Debug)]
pub struct Installed(());

impl Drop for Installed {
    fn drop(&mut self) {
        HOOKS.set(None);
    }
}

/// Tells whether a simulation runs on this thread.
pub fn is_running() -> bool {
    HOOKS.with_borrow(Option::is_some)
}

/// Returns this thread's hooks.
pub(crate) fn hooks() -> Option<Rc<dyn Hooks>> {
    HOOKS.with_borrow(Clone::clone)
}

/// Takes note of something that is counted.
pub fn noted(what: &'static str) {
    if let Some(hooks) = hooks() {
        hooks.noted(what);
    }
}

/// Lets a step on a pool take its time.
pub(crate) async fn pause() {
    let pause = hooks().map(|hooks| hooks.pause());
    if let Some(pause) = pause {
        tokio::time::sleep(pause).await;
    }
}
