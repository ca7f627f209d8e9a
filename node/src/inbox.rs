//! Which volumes are being received into, and receives whose line was cut.
//!
//! Owns the rule that one volume takes in one snapshot at a time ([`Claim`]), the name under which a volume arrives that is not
//! here yet, and what becomes of a receive that lost its sender: it waits, open, and is suspended into a resume point after
//! [`PARK_TIME`] or when the node stops. Refuses to know what arrives. Neighbour: [`crate::receive`].

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use flocker_replication::message::{BeginStep, StepStart};
use flocker_storage::{
    delta::Receiving,
    model::{SnapshotId, VolumeId, VolumeName},
};
use flocker_transport::{CloseCode, Connection, Incoming};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{
    api::types::ApiProblem,
    catalog::Volume,
    daemon::Node,
    line::Line,
    outbox::{PARK_TIME, TAKE_OVER_TIMEOUT},
    problem::{self, problem},
    receive::{self, Receipt},
    transfers::Failure,
};

/// An open receive and where its bytes go on.
pub(crate) struct Open {
    pub(crate) start: StepStart,
    pub(crate) incoming: Incoming,
    pub(crate) receiving: Box<dyn Receiving>,
}

/// Which volumes are being received into, and receives that wait for their sender.
#[derive(Default)]
pub(crate) struct Inbox {
    contents: Mutex<Contents>,
}

#[derive(Default)]
struct Contents {
    active: BTreeMap<VolumeId, Active>,
    parked: BTreeMap<VolumeId, Parked>,
    /// Under which names volumes arrive, or began to, that are not here yet.
    names: BTreeMap<VolumeId, VolumeName>,
}

struct Active {
    transfer: Uuid,
    connection: Connection,
    over: CancellationToken,
}

pub(crate) struct Parked {
    pub(crate) stream: Uuid,
    pub(crate) snapshot: SnapshotId,
    pub(crate) incoming: Incoming,
    pub(crate) receiving: Box<dyn Receiving>,
    since: Instant,
}

impl Inbox {
    fn lock(&self) -> MutexGuard<'_, Contents> {
        self.contents.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Refuses when a volume is being received into.
    pub(crate) fn check_quiet(&self, volume: &Volume, what: &str) -> Result<(), ApiProblem> {
        let contents = self.lock();
        let Some(active) = contents.active.get(&volume.record.id) else { return Ok(()) };
        let detail = format!("cannot {what} {}: a snapshot of it is arriving", volume.record.name);
        Err(problem(409, "busy", detail).hint("wait until it is there").with("transfer", active.transfer))
    }

    /// Returns the name under which a volume arrives that is not here yet, or last began to.
    pub(crate) fn arriving(&self, volume: VolumeId) -> Option<VolumeName> {
        self.lock().names.get(&volume).cloned()
    }

    /// Tells whether a receive into a volume waits for its sender.
    pub(crate) fn is_parked(&self, volume: VolumeId) -> bool {
        self.lock().parked.contains_key(&volume)
    }

    /// Takes out a receive that waits.
    pub(crate) fn take_parked(&self, volume: VolumeId) -> Option<Parked> {
        self.lock().parked.remove(&volume)
    }

    /// Lets a receive wait for its sender to come back.
    pub(crate) fn park(&self, volume: VolumeId, transfer: Uuid, begin: &BeginStep, open: Open) {
        tracing::info!(%volume, %transfer, "the line is cut; waiting for the sender");
        let parked = Parked {
            stream: begin.stream.id,
            snapshot: begin.snapshot.id,
            incoming: open.incoming,
            receiving: open.receiving,
            since: Instant::now(),
        };
        self.lock().parked.insert(volume, parked);
    }

    /// Turns a receive that waits into a resume point on the pool: what is about to be done to its volume needs the
    /// volume to itself, and may still be refused.
    pub(crate) async fn suspend_one(&self, volume: VolumeId) {
        suspend(self.take_parked(volume).into_iter().collect()).await;
    }

    /// Suspends receives whose sender did not come back in time.
    pub(crate) async fn suspend_stale(&self) {
        let stale: Vec<Parked> = {
            let mut contents = self.lock();
            let active: BTreeSet<VolumeId> = contents.active.keys().copied().collect();
            let late =
                |volume: &VolumeId, parked: &mut Parked| parked.since.elapsed() > PARK_TIME && !active.contains(volume);
            contents.parked.extract_if(.., late).map(|(_, parked)| parked).collect()
        };
        suspend(stale).await;
    }

    /// Suspends all receives, when the node stops.
    pub(crate) async fn suspend_all(&self, grace: Duration) {
        let all: Vec<Parked> = std::mem::take(&mut self.lock().parked).into_values().collect();
        if tokio::time::timeout(grace, suspend(all)).await.is_err() {
            tracing::warn!("receives could not be suspended in time; they go on from an earlier point");
        }
    }
}

async fn suspend(receives: Vec<Parked>) {
    for parked in receives {
        if let Err(error) = parked.receiving.suspend().await {
            tracing::error!("cannot keep a half-received snapshot: {}", problem::chain(&error));
        }
    }
}

/// The right to receive into one volume: nobody else may at the same time.
pub(crate) struct Claim {
    node: Arc<Node>,
    /// The volume.
    pub(crate) volume: VolumeId,
    over: CancellationToken,
}

impl Claim {
    /// Claims a volume. An attempt of the same transfer whose line is gone is ended first; any other makes this one
    /// wait for later (`ProblemCode::Busy`).
    pub(crate) async fn make(
        node: &Arc<Node>,
        line: &mut Line<'_>,
        receipt: &Receipt,
        volume: VolumeId,
    ) -> Result<Self, Failure> {
        let transfer = receipt.offer.transfer;
        let name = &receipt.offer.name;
        if let Some(claim) = Self::try_make(node, line, receipt, volume).await? {
            return Ok(claim);
        }
        let old = {
            let contents = node.inbox.lock();
            let active = contents.active.get(&volume).filter(|active| active.transfer == transfer);
            active.map(|active| (active.connection.clone(), active.over.clone()))
        };
        if let Some((connection, over)) = old {
            connection.close(CloseCode::Done, "superseded");
            let _ = tokio::time::timeout(TAKE_OVER_TIMEOUT, over.cancelled()).await;
            if let Some(claim) = Self::try_make(node, line, receipt, volume).await? {
                return Ok(claim);
            }
        }
        let failure = problem(409, "busy", format!("another snapshot of {name} is arriving")).with("volume", name);
        Err(Failure { transient: true, problem: failure })
    }

    async fn try_make(
        node: &Arc<Node>,
        line: &Line<'_>,
        receipt: &Receipt,
        volume: VolumeId,
    ) -> Result<Option<Self>, Failure> {
        let (transfer, name) = (receipt.offer.transfer, &receipt.offer.name);
        // Verbs that change the volume hold this lock while they look for claims.
        let _guard = node.catalog.work_on(volume).await;
        let over = CancellationToken::new();
        let is_here = node.catalog.record(volume).is_some();
        // Meanwhile another copy may have arrived, or have begun to, with the id that was to be this one's.
        let still_fits = receive::still_lands_in(node, &receipt.offer, volume);
        let mut contents = node.inbox.lock();
        if !still_fits || contents.active.contains_key(&volume) {
            return Ok(None);
        }
        if !is_here {
            contents.names.insert(volume, name.clone());
        }
        let connection = line.connection.clone();
        contents.active.insert(volume, Active { transfer, connection, over: over.clone() });
        Ok(Some(Self { node: node.clone(), volume, over }))
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let is_here = self.node.catalog.record(self.volume).is_some();
        let mut contents = self.node.inbox.lock();
        contents.active.remove(&self.volume);
        if is_here {
            contents.names.remove(&self.volume);
        }
        drop(contents);
        self.over.cancel();
    }
}
