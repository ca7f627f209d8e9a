//! The btrfs driver: volumes as subvolumes, snapshots as read-only ones, deltas as the kernel's send streams. Needs root.
//!
//! # Participants
//! `place` mounts; `pool` knows where things lie and locks them; `catalog` reads the records; `head`, `snapshot`, `split`,
//! `receive` and `delta` are the verbs; `subvolume` runs the program; `stream` reads what it writes; `trash` deletes.
//! # How a verb is atomic
//! As in the directory driver: what is new is made in `staging/` and published by one rename; what goes is renamed into
//! `trash/` first. Opening a pool clears both. Only `split` needs a journal.
//! # What the kernel does not promise
//! It applies an incremental stream to whatever it finds by uuid, and sends the difference from a parent that somebody
//! changed. So each record keeps the transaction that last changed its snapshot, both sides compare it before they use
//! one, and a receive finds its parent by our id, never by the uuid of the stream.
//! # Non-goals
//! Locks per volume and names: the node has them. A native receive that goes on after a restart: the kernel's stream
//! cannot (docs/adr/0005-a-native-btrfs-receive-starts-over.md).

use std::{path::PathBuf, sync::Arc};

use async_trait::async_trait;

mod catalog;
mod delta;
mod head;
mod place;
mod pool;
mod receive;
mod snapshot;
mod split;
mod stream;
mod subvolume;
mod trash;

use self::pool::Pool;
use super::{PoolSpec, estimate, published::Histories};
use crate::{
    delta::{Compare, DeltaReader, DeltaRequest, Partial, ReceiveRequest, Receiving},
    driver::{Access, Capabilities, Driver, Finding, Scan, SnapshotReport, SnapshotRequest, Target, Usage},
    error::{Error, ErrorKind, Result},
    model::{HeadState, Lineage, SnapshotKey, VolumeId, VolumeRecord},
    tree::weave::TreeView,
};

/// The driver's name before the colon of a pool.
pub const NAME: &str = "btrfs";

/// The kernel's send stream, version 1.
const FORMAT_1: &str = "btrfs-send/1";
/// The kernel's send stream, version 2: compressed data travels and lands as it lies.
const FORMAT_2: &str = "btrfs-send/2";

/// Every fault point of this driver (see [`crate::fault`]), for tests that die at each of them.
pub const FAULT_POINTS: &[&str] = &[
    "btrfs.create.before-publish",
    "btrfs.create.published",
    "btrfs.set-record.before-write",
    "btrfs.set-record.written",
    "btrfs.destroy.before-trash",
    "btrfs.destroy.trashed",
    "btrfs.snapshot.before-publish",
    "btrfs.snapshot.published",
    "btrfs.forget.before-trash",
    "btrfs.forget.trashed",
    "btrfs.materialise.before-publish",
    "btrfs.materialise.published",
    "btrfs.rewind.before-publish",
    "btrfs.rewind.trashed",
    "btrfs.rewind.published",
    "btrfs.clone.before-publish",
    "btrfs.clone.published",
    "btrfs.split.before-journal",
    "btrfs.split.journalled",
    "btrfs.split.fork-created",
    "btrfs.split.head-moved",
    "btrfs.split.snapshot-moved",
    "btrfs.split.clones-moved",
    "btrfs.split.done",
    "btrfs.receive.opened",
    "btrfs.receive.checkpoint",
    "btrfs.receive.before-publish",
    "btrfs.receive.head-trashed",
    "btrfs.receive.published",
    "btrfs.trash.deleting",
];

/// An open btrfs pool.
pub struct BtrfsDriver {
    pool: Arc<Pool>,
}

impl BtrfsDriver {
    /// Opens a pool; see [`super::open`].
    pub async fn open(spec: &PoolSpec) -> Result<Self> {
        let spec = spec.clone();
        let pool = run("open pool", move || Pool::open(&spec)).await?;
        Ok(Self { pool })
    }

    async fn with<T: Send + 'static>(
        &self,
        operation: &'static str,
        work: impl FnOnce(&Arc<Pool>) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let pool = Arc::clone(&self.pool);
        run(operation, move || work(&pool)).await
    }
}

/// Does blocking work on a thread for it. Dropping the future does not stop the work: each verb runs to its end.
async fn run<T: Send + 'static>(
    operation: &'static str,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(Error::new(operation, "pool", ErrorKind::Io(std::io::Error::other(error)))),
    }
}

#[async_trait]
impl Driver for BtrfsDriver {
    fn capabilities(&self) -> &Capabilities {
        self.pool.capabilities()
    }

    async fn usage(&self) -> Result<Usage> {
        self.with("measure pool", |pool| pool.usage()).await
    }

    async fn scan(&self) -> Result<Scan> {
        self.with("scan pool", |pool| pool.scan()).await
    }

    async fn create(&self, record: &VolumeRecord) -> Result<()> {
        let record = record.clone();
        self.with("create volume", move |pool| pool.create(&record)).await
    }

    async fn set_record(&self, record: &VolumeRecord) -> Result<()> {
        let record = record.clone();
        self.with("write record of", move |pool| pool.set_record(&record)).await
    }

    async fn destroy(&self, volume: VolumeId) -> Result<()> {
        self.with("destroy volume", move |pool| pool.destroy(volume)).await
    }

    async fn snapshot(&self, requests: &[SnapshotRequest]) -> Result<Vec<SnapshotReport>> {
        let requests = requests.to_vec();
        self.with("take snapshot of", move |pool| pool.snapshot(&requests)).await
    }

    async fn forget(&self, snapshot: SnapshotKey) -> Result<()> {
        self.with("forget snapshot", move |pool| pool.forget(snapshot)).await
    }

    async fn rewind(&self, snapshot: SnapshotKey) -> Result<()> {
        self.with("rewind to snapshot", move |pool| pool.rewind(snapshot)).await
    }

    async fn split(&self, keep: SnapshotKey, fork: &VolumeRecord) -> Result<()> {
        let fork = fork.clone();
        self.with("split volume", move |pool| pool.split(keep, &fork)).await
    }

    async fn clone_from(&self, record: &VolumeRecord) -> Result<()> {
        let record = record.clone();
        self.with("clone volume", move |pool| pool.clone_from(&record)).await
    }

    async fn attach(&self, target: Target, access: Access) -> Result<PathBuf> {
        self.with("attach", move |pool| pool.attach(target, access)).await
    }

    async fn detach(&self, target: Target) -> Result<()> {
        self.pool.detach(target);
        Ok(())
    }

    async fn view(&self, target: Target) -> Result<TreeView> {
        self.with("read", move |pool| pool.view(target)).await
    }

    async fn lineage(&self, volume: VolumeId) -> Result<Lineage> {
        self.with("read lineage of", move |pool| pool.lineage(volume)).await
    }

    async fn head_state(&self, volume: VolumeId) -> Result<HeadState> {
        self.with("compare head of", move |pool| pool.head_state(volume)).await
    }

    async fn verify(&self, snapshot: SnapshotKey, compare: Compare) -> Result<Vec<Finding>> {
        self.with("verify snapshot", move |pool| pool.verify(snapshot, compare)).await
    }

    async fn estimate_delta(&self, request: DeltaRequest) -> Result<Option<u64>> {
        let writer = self.with("estimate delta of", move |pool| pool.comparing(&request)).await?;
        estimate::by_walk(writer).await
    }

    async fn read_delta(&self, request: DeltaRequest) -> Result<Box<dyn DeltaReader>> {
        let source = self.with("read delta of", move |pool| pool.delta_source(&request)).await?;
        Ok(Box::new(delta::BtrfsDeltaReader::start(Arc::clone(&self.pool), source)))
    }

    async fn receive(&self, request: ReceiveRequest) -> Result<Box<dyn Receiving>> {
        Ok(Box::new(self.with("receive snapshot", move |pool| pool.receive(request)).await?))
    }

    async fn partial(&self, volume: VolumeId) -> Result<Option<Partial>> {
        self.with("look for a partial receive of", move |pool| pool.partial(volume)).await
    }

    async fn discard_partial(&self, volume: VolumeId) -> Result<()> {
        self.with("discard a partial receive of", move |pool| pool.discard_partial(volume)).await
    }
}
