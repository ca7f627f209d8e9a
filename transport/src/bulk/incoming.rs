use super::{BulkError, BulkStream, ChunkSink, Progress, Received};
use std::time::Duration;

/// What a receiver allows its peer.
#[derive(Debug, Clone)]
pub struct IncomingLimits {
    /// How long the sender may be silent.
    pub no_progress: Duration,
}

impl Default for IncomingLimits {
    fn default() -> Self {
        Self { no_progress: crate::NO_PROGRESS }
    }
}

/// The receiver's state of one delta.
#[derive(Debug)]
pub struct Incoming {}

impl Incoming {
    /// A delta of which nothing has arrived.
    pub fn new(_limits: IncomingLimits) -> Self {
        todo!()
    }
    /// The sequence number the sender goes on from.
    pub fn next_sequence(&self) -> u64 {
        todo!()
    }
    /// Receives
    pub async fn run(
        &mut self,
        _link: BulkStream,
        _sink: &mut dyn ChunkSink,
        _progress: &(dyn Fn(Progress) + Send + Sync),
    ) -> Result<Received, BulkError> {
        todo!()
    }
}
