//! Makes the part of a tree that a checkpoint closes durable, while what follows is taken in.
//!
//! Owns one thread at a time. Refuses to know what a point is kept in. A point is told only when all before it is durable;
//! that some of what follows may be durable, too, is as it is after any break: records are taken in a second time.

use std::thread::{self, JoinHandle};

use super::root::Root;
use crate::{
    delta::ResumePoint,
    error::{Error, Result},
};

/// Keeps a point durably. Called once, when all before the point is durable.
pub type Keep = Box<dyn FnOnce() -> Result<()> + Send>;

/// Called with each place that the stream can be resumed at, as soon as the stream is there.
pub type OnCheckpoint = Box<dyn FnMut(ResumePoint) -> Keep + Send>;

/// The checkpoint that is being made durable, if there is one.
#[derive(Default)]
pub(super) struct Durable {
    running: Option<JoinHandle<Result<()>>>,
}

impl Durable {
    /// Begins with the next one; waits for the one before, so that no more than two intervals are ever not durable.
    pub(super) fn begin(&mut self, root: Root, keep: Keep) -> Result<()> {
        self.settle()?;
        let shown = root.path().display().to_string();
        let work = move || {
            root.sync()?;
            keep()
        };
        let started = thread::Builder::new().name("checkpoint".to_owned()).spawn(work);
        self.running = Some(started.map_err(|error| Error::io("start to make durable", shown, error))?);
        Ok(())
    }

    /// Waits until what was begun is durable and kept.
    pub(super) fn settle(&mut self) -> Result<()> {
        match self.running.take().map(JoinHandle::join) {
            None => Ok(()),
            Some(Ok(kept)) => kept,
            Some(Err(panic)) => std::panic::resume_unwind(panic),
        }
    }
}

impl Drop for Durable {
    /// Nothing may write to the receive's place once it is given up.
    fn drop(&mut self) {
        if let Some(Ok(Err(error))) = self.running.take().map(JoinHandle::join) {
            tracing::warn!(%error, "a checkpoint of a receive that was given up could not be kept");
        }
    }
}
