//! How long a delta between two trees will be, found by the walk that a delta takes, without reading a file.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use crate::{
    error::{Error, ErrorKind, Result},
    tree::write::DeltaWriter,
};

const OPERATION: &str = "estimate delta of";

/// Ends the walk of a caller who has gone away.
struct Stop(Arc<AtomicBool>);

impl Drop for Stop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Walks on a thread of its own. Dropping the future ends it.
pub(super) async fn by_walk(writer: DeltaWriter) -> Result<Option<u64>> {
    let _stop = Stop(writer.stopper());
    match tokio::task::spawn_blocking(move || writer.estimate()).await {
        Ok(bytes) => bytes.map(Some),
        Err(error) => Err(Error::new(OPERATION, "snapshot", ErrorKind::Io(std::io::Error::other(error)))),
    }
}
