use super::{BulkError, BulkStream, ChunkSource, Progress, Sent};
use std::time::Duration;

/// What a sender allows itself.
#[derive(Debug, Clone)]
pub struct OutgoingLimits {
    /// Bytes that may be on their way: read from the source, and not consumed by the receiver.
    pub window: usize,
    /// How long the receiver may be silent.
    pub no_progress: Duration,
}

impl Default for OutgoingLimits {
    fn default() -> Self {
        Self { window: 8 * 1024 * 1024, no_progress: crate::NO_PROGRESS }
    }
}

/// The sender's state of one delta.
#[derive(Debug)]
pub struct Outgoing {}

impl Outgoing {
    /// A delta of which nothing was sent.
    pub fn new(_limits: OutgoingLimits) -> Self {
        todo!()
    }
    /// Sends
    pub async fn run(
        &mut self,
        _link: BulkStream,
        _resume_from_seq: u64,
        _source: &mut dyn ChunkSource,
        _progress: &(dyn Fn(Progress) + Send + Sync),
    ) -> Result<Sent, BulkError> {
        todo!()
    }
}
