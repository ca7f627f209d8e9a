//! The ZFS driver: volumes as datasets, snapshots as snapshots, deltas as streams of `zfs send`. Needs root, and the programs
//! `zfs`, `zpool` and `zdb` of OpenZFS or of zfs-fuse 0.7.
//!
//! # Participants
//! `place` finds or makes the pool; `pool` knows where things lie and locks them; `program` runs the programs and reads
//! their complaints, `listing` what they list; `property` keeps records on datasets; `catalog` reads them, `volume` remembers what was
//! read, `touches` knows how long that holds; `head`,
//! `snapshot`, `split`, `delta` and `receive` (with `arrival` and `graft`) are the verbs; `stream` reads streams as they
//! pass; `resume` knows tokens; `view` mounts; `journal` holds what takes several steps; `trash` destroys.
//! # How a verb is atomic
//! Most are one command, or end with the one property or rename that counts. The others have a journal.
//! # What ZFS does not promise
//! That a received stream is what was meant, that a stream of one implementation can be read by the other, that a name stays
//! with its snapshot. So guids are compared, roots are read, formats have names, and the last record of a stream is held back.
//! # Non-goals
//! Locks per volume and names: the node has them.

use std::{path::PathBuf, sync::Arc};

use async_trait::async_trait;

mod arrival;
mod catalog;
mod delta;
mod graft;
mod head;
mod journal;
mod listing;
mod place;
mod pool;
mod program;
mod property;
mod receive;
mod resume;
mod snapshot;
mod split;
mod stream;
mod touches;
mod trash;
mod view;
mod volume;

use self::pool::Pool;
use super::PoolSpec;
use crate::{
    delta::{Compare, DeltaFormat, DeltaReader, DeltaRequest, Partial, ReceiveRequest, Receiving},
    driver::{Access, Capabilities, Driver, Finding, Scan, SnapshotReport, SnapshotRequest, Target, Usage},
    error::{Error, ErrorKind, Result},
    model::{HeadState, Lineage, SnapshotKey, VolumeId, VolumeRecord},
    tree::weave::TreeView,
};

/// The driver's name before the colon of a pool.
pub const NAME: &str = "zfs";

/// Streams that every ZFS since pool version 23 reads; written by zfs-fuse only.
const FORMAT_1: &str = "zfs-send/1";
/// Streams of OpenZFS: compressed data, large blocks and encrypted data travel as they lie.
const FORMAT_2: &str = "zfs-send/2";

/// Every fault point of this driver (see [`crate::fault`]), for tests that die at each of them.
pub const FAULT_POINTS: &[&str] = &[
    "zfs.create.before-publish",
    "zfs.create.published",
    "zfs.set-record.before-write",
    "zfs.set-record.written",
    "zfs.destroy.before-trash",
    "zfs.destroy.trashed",
    "zfs.snapshot.taken",
    "zfs.snapshot.before-publish",
    "zfs.snapshot.published",
    "zfs.forget.before-trash",
    "zfs.forget.trashed",
    "zfs.rewind.before-rollback",
    "zfs.rewind.rolled-back",
    "zfs.clone.before-publish",
    "zfs.clone.published",
    "zfs.split.before-journal",
    "zfs.split.journalled",
    "zfs.split.cloned",
    "zfs.split.promoted",
    "zfs.split.head-moved",
    "zfs.split.renamed",
    "zfs.split.fork-recorded",
    "zfs.split.clones-moved",
    "zfs.split.done",
    "zfs.receive.opened",
    "zfs.receive.before-publish",
    "zfs.receive.journalled",
    "zfs.receive.promoted",
    "zfs.receive.moved-away",
    "zfs.receive.in-place",
    "zfs.receive.landed",
    "zfs.receive.published",
    "zfs.trash.deleting",
];

/// An open ZFS pool.
pub struct ZfsDriver {
    pool: Arc<Pool>,
}

impl ZfsDriver {
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
        run(operation, move || pool.forgetting(work(&pool))).await
    }

    /// Does what clones of snapshots stand in the way of.
    async fn when_settled<T: Send + 'static>(
        &self,
        operation: &'static str,
        work: impl FnOnce(&Arc<Pool>) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let settled = move |pool: &Arc<Pool>| {
            pool.settle_views();
            work(pool)
        };
        self.with(operation, settled).await
    }

    /// Reads a stream to its end for its length: the `zfs send` of a zfs-fuse has no dry run. Of the portable format it reads
    /// the stream that it would have sent in its place.
    async fn count(&self, request: DeltaRequest) -> Result<Option<u64>> {
        let is_native = delta::features(&request.format).is_some();
        let resume = request.resume.clone().filter(|_| is_native);
        let counted = DeltaRequest { format: DeltaFormat(FORMAT_1.into()), resume, ..request };
        let mut reader = match self.read_delta(counted).await {
            Err(Error { kind: ErrorKind::FormatUnfit(_), .. }) if !is_native => return Ok(None),
            reader => reader?,
        };
        let mut length = 0;
        while let Some(chunk) = reader.next().await? {
            length += chunk.len() as u64;
        }
        Ok(Some(length))
    }
}

/// Whoever opens the pool next finds it closed.
impl Drop for ZfsDriver {
    fn drop(&mut self) {
        self.pool.settle_views();
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
impl Driver for ZfsDriver {
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
        self.when_settled("destroy volume", move |pool| pool.destroy(volume)).await
    }

    async fn snapshot(&self, requests: &[SnapshotRequest]) -> Result<Vec<SnapshotReport>> {
        let requests = requests.to_vec();
        self.with("take snapshot of", move |pool| pool.snapshot(&requests)).await
    }

    async fn forget(&self, snapshot: SnapshotKey) -> Result<()> {
        self.when_settled("forget snapshot", move |pool| pool.forget(snapshot)).await
    }

    async fn rewind(&self, snapshot: SnapshotKey) -> Result<()> {
        self.when_settled("rewind to snapshot", move |pool| pool.rewind(snapshot)).await
    }

    async fn split(&self, keep: SnapshotKey, fork: &VolumeRecord) -> Result<()> {
        let fork = fork.clone();
        self.when_settled("split volume", move |pool| pool.split(keep, &fork)).await
    }

    async fn clone_from(&self, record: &VolumeRecord) -> Result<()> {
        let record = record.clone();
        self.with("clone volume", move |pool| pool.clone_from(&record)).await
    }

    async fn attach(&self, target: Target, access: Access) -> Result<PathBuf> {
        self.with("attach", move |pool| pool.attach(target, access)).await
    }

    async fn detach(&self, target: Target) -> Result<()> {
        self.with("detach", move |pool| pool.detach(target)).await
    }

    async fn view(&self, target: Target) -> Result<TreeView> {
        self.with("read", move |pool| pool.tree_view(target)).await
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
        if !self.pool.abilities.modern {
            return self.count(request).await;
        }
        self.with("estimate delta of", move |pool| pool.estimate(&request)).await
    }

    async fn read_delta(&self, request: DeltaRequest) -> Result<Box<dyn DeltaReader>> {
        let source = self.with("read delta of", move |pool| pool.delta_source(&request)).await?;
        Ok(Box::new(delta::ZfsDeltaReader::start(source)))
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
