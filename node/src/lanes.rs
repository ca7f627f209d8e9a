//! Further connections that share the work of one step, where one would keep a single processor busy with encryption.
//!
//! Owns when a sender opens them and how a receiver finds the step that one is for. A lane is an exchange on a connection of its
//! own: `Lane`, `LaneReady`, a bulk stream, `Finished` when the step is over. None of them is needed: one that cannot be had is done
//! without, one that is lost interrupts the step as any loss of a line does. Refuses to know frames ([`flocker_transport`]).

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use flocker_replication::{
    message::{Lane, Message, PROTOCOL},
    plan::Step,
};
use flocker_storage::model::NodeName;
use flocker_transport::{BulkStream, LANES_LIMIT, NO_PROGRESS};
use tokio::sync::mpsc;
use tokio_util::sync::{CancellationToken, DropGuard};
use uuid::Uuid;

use crate::{daemon::Node, line::Line, state::PeerRow, transfers::Failure, transfers::Job};

/// A step of at least so many bytes has its lanes at once, if that is known; any other when it has run for [`LATER`].
const LARGE: u64 = 64 * 1024 * 1024;
const LATER: Duration = Duration::from_secs(1);
/// So many processors for each connection: encryption takes one, and the other stages of a transfer want some.
const PROCESSORS_PER_LANE: usize = 4;
/// The most lanes unless the configuration says otherwise.
const LANES_BY_ITSELF: usize = 4;
/// The tag of a lane's bulk stream.
const TAG: u64 = 0;

/// The lanes of a node: how many a sender uses, and the steps that some may join.
pub(crate) struct Lanes {
    count: usize,
    steps: Mutex<BTreeMap<Uuid, Joinable>>,
}

/// A step that is being received.
#[derive(Clone)]
struct Joinable {
    peer: NodeName,
    joining: mpsc::Sender<BulkStream>,
    over: CancellationToken,
}

/// What a step is joined by, while it is received. Dropped, it is over.
pub(crate) struct Joined<'a> {
    lanes: &'a Lanes,
    stream: Uuid,
    /// Where they come from.
    pub(crate) joining: mpsc::Receiver<BulkStream>,
    _over: DropGuard,
}

impl Drop for Joined<'_> {
    fn drop(&mut self) {
        self.lanes.lock().remove(&self.stream);
    }
}

impl Lanes {
    /// As many as the configuration says, else as the processors allow.
    pub(crate) fn new(configured: Option<usize>) -> Self {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let count = configured.unwrap_or((processors / PROCESSORS_PER_LANE).min(LANES_BY_ITSELF));
        Self { count: count.clamp(1, LANES_LIMIT), steps: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Uuid, Joinable>> {
        self.steps.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets lanes of a peer join a step.
    pub(crate) fn expect(&self, stream: Uuid, peer: NodeName) -> Joined<'_> {
        let (joining, joined) = mpsc::channel(LANES_LIMIT);
        let over = CancellationToken::new();
        self.lock().insert(stream, Joinable { peer, joining, over: over.clone() });
        Joined { lanes: self, stream, joining: joined, _over: over.drop_guard() }
    }

    /// Serves a lane: hands its bulk stream to the step, and waits until that is over.
    pub(crate) async fn serve(&self, line: &mut Line<'_>, lane: Lane) -> Result<(), Failure> {
        let step = self.lock().get(&lane.stream).filter(|step| step.peer == line.peer).cloned();
        if let Some(Joinable { joining, over, .. }) = step {
            line.send(&Message::LaneReady).await?;
            let link = line.connection.accept_bulk(TAG).await.map_err(|error| line.failed(error))?;
            if joining.send(link).await.is_ok() {
                tokio::select! {
                    biased;
                    () = over.cancelled() => {}
                    error = line.connection.closed() => return Err(line.failed(error)),
                }
            }
        }
        line.send(&Message::Finished).await
    }
}

/// Opens lanes for a step that is about to be sent, in the background: returns where they join from, and what ends them.
pub(crate) fn open(
    node: &Arc<Node>,
    peer: &NodeName,
    job: Option<&Arc<Job>>,
    stream: Uuid,
    step: &Step,
) -> (mpsc::Receiver<BulkStream>, DropGuard) {
    let (joining, joined) = mpsc::channel(LANES_LIMIT);
    let over = CancellationToken::new();
    let is_large = step.base.is_none() && step.snapshot.logical_bytes >= LARGE;
    let open = Arc::new(AtomicU32::new(1));
    for _ in 1..node.lanes.count {
        let (node, peer, job, over) = (node.clone(), peer.clone(), job.cloned(), over.clone());
        let (joining, open) = (joining.clone(), open.clone());
        node.clone().tasks.spawn(async move {
            if !is_large {
                tokio::select! {
                    biased;
                    () = over.cancelled() => return,
                    () = tokio::time::sleep(LATER) => {}
                }
            }
            let carried = async {
                let row = node.find_peer(&peer).await?;
                carry(&node, row, job.as_ref(), stream, &joining, &open, &over).await
            };
            if let Err(failure) = carried.await {
                tracing::debug!(%peer, "done without a further connection: {}", failure.problem);
            }
        });
    }
    (joined, over.drop_guard())
}

async fn carry(
    node: &Arc<Node>,
    row: PeerRow,
    job: Option<&Arc<Job>>,
    stream: Uuid,
    joining: &mpsc::Sender<BulkStream>,
    open: &AtomicU32,
    over: &CancellationToken,
) -> Result<(), Failure> {
    let lent = node.lend(&row).await?;
    let watch = node.close_lent_on_stop(&lent, job);
    let mut line = Line::open(row.name, &lent).await?;
    line.send(&Message::Lane(Lane { protocol: PROTOCOL, stream })).await?;
    match line.recv(NO_PROGRESS).await? {
        Message::LaneReady => {
            let link = line.connection.open_bulk(TAG).await.map_err(|error| line.failed(error))?;
            if joining.send(link).await.is_ok() {
                let count = open.fetch_add(1, Ordering::Relaxed) + 1;
                if let Some(job) = job {
                    job.carried_by(count);
                }
                over.cancelled().await;
            }
            match line.recv(NO_PROGRESS).await? {
                Message::Finished => {}
                other => return Err(line.broke(format!("{} at the end of a lane", other.kind())).into()),
            }
        }
        // The step was over before.
        Message::Finished => {}
        other => return Err(line.broke(format!("{} instead of a lane", other.kind())).into()),
    }
    drop((line, watch));
    node.give_back(lent);
    Ok(())
}
