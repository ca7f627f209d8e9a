//! Deltas on their way to a receiver, and those whose line was cut.
//!
//! Owns what becomes of a stream that lost its receiver: it waits, open, for [`PARK_TIME`], and goes on at the frame that the receiver
//! wants. One transfer has one stream at a time: where a receiver asks anew before this node has noticed that the line is gone, the
//! older exchange is ended, so that its stream can go on. Refuses to know what is sent. Neighbours: [`crate::push`];
//! [`crate::inbox`] is the receiver's half.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use flocker_replication::plan::Step;
use flocker_storage::{
    delta::{DeltaFormat, DeltaReader},
    model::{NodeName, SnapshotKey},
};
use flocker_transport::{BoxError, ChunkSource, CloseCode, Connection, Expected, Gate, Outgoing, OutgoingLimits};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{line::integrity, problem::problem, transfers::Failure};

/// How long a cut stream waits for its receiver to come back before its frames are let go.
pub(crate) const PARK_TIME: Duration = Duration::from_secs(120);
/// How long a new attempt waits for the old one of the same transfer to notice that its line is gone.
pub(crate) const TAKE_OVER_TIMEOUT: Duration = Duration::from_secs(15);

/// A delta on its way: what it is, the driver's reader, and the frames the receiver has not consumed.
pub(crate) struct Stream {
    pub(crate) id: Uuid,
    target: SnapshotKey,
    base: Option<SnapshotKey>,
    format: DeltaFormat,
    gates: Vec<Arc<Gate>>,
    pub(crate) outgoing: Outgoing,
    /// What the receiver is told of the length.
    pub(crate) expected: Expected,
    pub(crate) source: Option<DeltaSource>,
    parked: Instant,
}

impl Stream {
    pub(crate) fn new(step: &Step, gates: Vec<Arc<Gate>>) -> Self {
        let expected = Expected::default();
        Self {
            id: Uuid::new_v4(),
            target: step.snapshot.key(),
            base: step.base.map(|base| base.on_sender),
            format: step.format.clone(),
            outgoing: outgoing(&gates, &step.format, &expected, false),
            gates,
            expected,
            source: None,
            parked: Instant::now(),
        }
    }

    pub(crate) fn fits(&self, step: &Step) -> bool {
        self.target == step.snapshot.key()
            && self.base == step.base.map(|base| base.on_sender)
            && self.format == step.format
    }

    pub(crate) fn oldest_frame(&self) -> u64 {
        self.outgoing.oldest_sequence()
    }

    /// Sends what a reader gives, and returns the first frame's number; frames of an earlier reading are let go.
    pub(crate) fn open(&mut self, reader: Box<dyn DeltaReader>) -> u64 {
        self.outgoing = outgoing(&self.gates, &self.format, &self.expected, reader.is_packed());
        self.source = Some(DeltaSource(reader));
        0
    }
}

fn outgoing(gates: &[Arc<Gate>], format: &DeltaFormat, expected: &Expected, is_packed: bool) -> Outgoing {
    let (gates, integrity, expected) = (gates.to_vec(), integrity(format), expected.clone());
    Outgoing::new(OutgoingLimits { gates, integrity, expected, is_packed, ..OutgoingLimits::default() })
}

/// What a driver reads, as the pipeline takes it.
pub(crate) struct DeltaSource(pub(crate) Box<dyn DeltaReader>);

#[async_trait]
impl ChunkSource for DeltaSource {
    async fn next(&mut self) -> Result<Option<Bytes>, BoxError> {
        self.0.next().await.map_err(Into::into)
    }
}

/// A peer, and a transfer with it.
type Key = (NodeName, Uuid);

/// Streams whose line was cut, and the exchanges in which peers are served.
#[derive(Default)]
pub(crate) struct Outbox {
    contents: Mutex<Contents>,
}

#[derive(Default)]
struct Contents {
    parked: HashMap<Key, Stream>,
    served: HashMap<Key, Served>,
}

#[derive(Clone)]
struct Served {
    connection: Connection,
    over: CancellationToken,
}

impl Outbox {
    fn lock(&self) -> MutexGuard<'_, Contents> {
        self.contents.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes out a stream that waits.
    pub(crate) fn take(&self, peer: &NodeName, transfer: Uuid) -> Option<Stream> {
        self.lock().parked.remove(&(peer.clone(), transfer))
    }

    /// Lets a stream wait for its receiver to come back.
    pub(crate) fn park(&self, peer: &NodeName, transfer: Uuid, mut stream: Stream) {
        stream.parked = Instant::now();
        self.lock().parked.insert((peer.clone(), transfer), stream);
    }

    /// Lets go of streams whose receiver did not come back.
    pub(crate) fn drop_stale(&self) {
        self.lock().parked.retain(|_, stream| stream.parked.elapsed() < PARK_TIME);
    }

    /// Begins to serve a peer that pulls, which it does once a transfer: an exchange whose line is gone is ended first.
    pub(crate) async fn serve(
        &self,
        peer: &NodeName,
        transfer: Uuid,
        connection: &Connection,
    ) -> Result<Serving<'_>, Failure> {
        let key = (peer.clone(), transfer);
        for _ in 0..2 {
            let Some(old) = self.begin(&key, connection) else { return Ok(Serving { outbox: self, key }) };
            old.connection.close(CloseCode::Done, "superseded");
            let _ = tokio::time::timeout(TAKE_OVER_TIMEOUT, old.over.cancelled()).await;
        }
        let detail = format!("transfer {transfer} of {peer} is under way already");
        Err(Failure { transient: true, problem: problem(409, "busy", detail) })
    }

    fn begin(&self, key: &Key, connection: &Connection) -> Option<Served> {
        let mut contents = self.lock();
        if let Some(old) = contents.served.get(key) {
            return Some(old.clone());
        }
        let served = Served { connection: connection.clone(), over: CancellationToken::new() };
        contents.served.insert(key.clone(), served);
        None
    }
}

/// An exchange in which a peer that pulls is served; dropped, it is over.
pub(crate) struct Serving<'a> {
    outbox: &'a Outbox,
    key: Key,
}

impl Drop for Serving<'_> {
    fn drop(&mut self) {
        if let Some(served) = self.outbox.lock().served.remove(&self.key) {
            served.over.cancel();
        }
    }
}
