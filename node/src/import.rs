//! `flocker import db < tar`: a volume out of a tarball.
//!
//! Owns the order of things and what becomes of the ids. Refuses to know what is in a tarball
//! ([`flocker_storage::tarball`]). What arrives is unpacked into the head of a volume of its own, which nobody knows of; from
//! there it is taken in by the driver as a full delta, like one from a peer, so that volume and snapshot appear by one atomic
//! step, on every driver. Then the volume it was unpacked into is destroyed.
//!
//! | step | a crash before it | a crash after it |
//! |---|---|---|
//! | the intent is written | nothing has happened | the intent is forgotten at the next start |
//! | a volume to unpack into is made | ″ | the next start destroys it |
//! | the tarball is unpacked and digested | ″ | ″ |
//! | the driver commits volume and snapshot | ″ | the import is done; the next start destroys what it was unpacked into |
//! | what it was unpacked into is destroyed | the import is done | the intent is forgotten at the next start |
//! | the intent is forgotten | the import is done | the import is done |
//!
//! | the tarball | becomes |
//! |---|---|
//! | holds the bytes that were exported | the same snapshot of the same volume, as a replica |
//! | the same, and the volume is here without that snapshot | the same snapshot, in a fork of the volume, as a replica |
//! | the same, and the snapshot is here | refused: it is here |
//! | was changed, or cannot be kept here in full, or is another's | a new volume with a new snapshot without parents |

use std::{io, sync::Arc, time::Duration};

use axum::body::Body;
use bytes::{Buf as _, Bytes};
use flocker_replication::binding;
use flocker_storage::{
    clock,
    delta::{Compare, DeltaFormat, ReceiveRequest},
    driver::{Access, Finding, Target},
    error::ErrorKind,
    fault,
    model::{HeldSnapshot, Metadata, Role, Snapshot, SnapshotId, SnapshotName, VolumeId, VolumeName, VolumeRecord},
    tarball::{self, Unpacked, manifest::Manifest},
    tree::{
        digest::TreeDigest,
        root::Root,
        walk::Links,
        write::{DeltaWriter, Side},
    },
};
use http_body_util::BodyExt as _;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::{
    api::{
        tarball::{Identity, ImportKind, ImportReport},
        types::ApiProblem,
    },
    catalog::Volume,
    daemon::Node,
    merge::{blocking, feed},
    problem::{self, Result, problem},
    state::Operation,
    volumes::snapshot_resource,
};

/// How many pieces of the body wait to be unpacked.
const PIECES_AHEAD: usize = 8;

/// How long the rest of a refused body is read: a client that looks for an answer while it sends has long read it.
const LINGER: Duration = Duration::from_secs(10);

/// The name of the snapshot of a tarball that says none.
const FOREIGN_SNAPSHOT: &str = "imported";

/// What a tarball becomes.
struct Landing {
    record: VolumeRecord,
    snapshot: Snapshot,
    kind: ImportKind,
    why: Option<String>,
}

impl Node {
    /// Makes a volume out of a tarball. Dropping the future ends the work and clears it away; the commit is not interrupted.
    pub(crate) async fn import(
        self: &Arc<Self>,
        name: VolumeName,
        identity: Identity,
        body: Body,
    ) -> Result<ImportReport> {
        let stop = self.cancel.child_token();
        let _guard = stop.clone().drop_guard();
        // A task of its own: a client that goes away takes this future with it, and what was begun must be cleared away.
        let (node, mut body) = (self.clone(), body);
        let task = self.tasks.spawn(async move {
            let imported = node.import_to_the_end(name, identity, &mut body, stop).await;
            if imported.is_err() {
                node.tasks.spawn(linger(body, node.cancel.clone()));
            }
            imported
        });
        task.await.map_err(problem::internal)?
    }

    async fn import_to_the_end(
        self: &Arc<Self>,
        name: VolumeName,
        identity: Identity,
        body: &mut Body,
        stop: CancellationToken,
    ) -> Result<ImportReport> {
        let _permit = self.tarball_permit()?;
        let _reserved = self.catalog.reserve(&name)?;
        blocking(tarball::check_program).await?;
        let staging = VolumeId::mint();
        let operation = journal_entry(staging);
        self.state.begin(operation.clone(), &Operation::Import { staging, into: None }).await?;
        fault::point("node.import.journalled");
        let imported = self.import_through(staging, &name, identity, body, &stop).await;
        if let Err(problem) = &imported {
            tracing::info!(volume = %name, "an import failed: {}", problem.detail);
        }
        match self.clear_import(staging, None).await {
            Ok(()) => {
                fault::point("node.import.cleared");
                self.state.end(operation).await?;
            }
            // What was imported is there all the same.
            Err(problem) => tracing::error!(
                volume = %name,
                "cannot clear away what a tarball was unpacked into, the next start tries again: {}", problem.detail
            ),
        }
        imported
    }

    /// Destroys what a tarball was unpacked into, and what the driver had taken in of it when it was interrupted.
    pub(crate) async fn clear_import(&self, staging: VolumeId, into: Option<VolumeId>) -> Result<()> {
        if let Some(into) = into {
            self.driver.discard_partial(into).await?;
        }
        let cleared = match self.driver.detach(Target::Head(staging)).await {
            Ok(()) => self.driver.destroy(staging).await,
            failed => failed,
        };
        match cleared {
            Err(error) if !matches!(error.kind, ErrorKind::NotFound) => Err(error.into()),
            _ => Ok(()),
        }
    }

    async fn import_through(
        self: &Arc<Self>,
        staging: VolumeId,
        name: &VolumeName,
        identity: Identity,
        body: &mut Body,
        stop: &CancellationToken,
    ) -> Result<ImportReport> {
        let record = self.new_record(staging, format!("importing.{}", staging.short()).parse()?, Metadata::new());
        self.driver.create(&record).await?;
        fault::point("node.import.staged");
        let path = self.driver.attach(Target::Head(staging), Access::ReadWrite).await?;
        let root = blocking(move || Root::open(path)).await?;
        let into = root.try_clone()?;
        let Unpacked { manifest, mut findings } = unpack(body, into, stop).await?;
        fault::point("node.import.unpacked");
        let (tree, stopped) = (root.try_clone()?, stop.clone());
        let digest = blocking(move || TreeDigest::of(tree, Links::ByInode, &|| stopped.is_cancelled())).await?;
        let landing = self.land(name, identity, manifest, digest, &findings)?;
        if landing.kind != ImportKind::New {
            // All that is preserved was kept, whatever tar could not do besides.
            findings.clear();
        }
        let held = self.take_in_tree(staging, &landing, root, stop, &mut findings).await?;
        fault::point("node.import.committed");
        let volume = Volume::new(landing.record, vec![held.clone()]);
        self.catalog.put(volume.clone());
        Ok(ImportReport {
            volume: self.volume_resource(&volume),
            snapshot: snapshot_resource(name, &held),
            kind: landing.kind,
            why: landing.why,
            warnings: findings,
        })
    }

    /// Says what a tarball becomes that was unpacked and has this digest.
    fn land(
        &self,
        name: &VolumeName,
        identity: Identity,
        manifest: Option<Manifest>,
        digest: TreeDigest,
        findings: &[Finding],
    ) -> Result<Landing> {
        let Some(manifest) = manifest else {
            let snapshot = self.new_snapshot(FOREIGN_SNAPSHOT.parse()?, Metadata::new());
            let record = self.new_record(VolumeId::mint(), name.clone(), Metadata::new());
            return Ok(Landing { record, snapshot, kind: ImportKind::New, why: None });
        };
        let Manifest { volume, snapshot, .. } = manifest;
        let why = match identity {
            Identity::New => Some("it was asked for as new".to_owned()),
            Identity::Kept if digest != manifest.digest => Some(not_the_same(findings)),
            Identity::Kept => None,
        };
        if why.is_some() {
            let record = self.new_record(VolumeId::mint(), name.clone(), volume.metadata);
            let snapshot = self.new_snapshot(snapshot.name, snapshot.metadata);
            return Ok(Landing { record, snapshot, kind: ImportKind::New, why });
        }
        if let Some(held) = self.held_snapshots().iter().find(|held| held.snapshot.id == snapshot.id) {
            return Err(self.is_here(name, held));
        }
        let (id, kind, why) = match self.catalog.get(volume.id) {
            None => (volume.id, ImportKind::Same, None),
            Some(here) => {
                let fork = binding::sibling(volume.id, name);
                if let Some(known) = self.catalog.get(fork) {
                    let detail = format!("cannot import {name}: a fork of that name is here as {}", known.record.name);
                    return Err(problem(409, "volume_exists", detail).hint("choose another name"));
                }
                (
                    fork,
                    ImportKind::Fork,
                    Some(format!("its volume is here as {}, without this snapshot", here.record.name)),
                )
            }
        };
        let record = VolumeRecord {
            id,
            name: name.clone(),
            metadata: volume.metadata,
            created: volume.created,
            origin: None,
            // Whoever is the primary goes on being it: a tarball makes none. Promotion asks the others first.
            role: Role::Replica,
            epoch: volume.epoch,
            primary: volume.primary,
            quota_bytes: None,
        };
        Ok(Landing { record, snapshot, kind, why })
    }

    fn is_here(&self, name: &VolumeName, held: &HeldSnapshot) -> ApiProblem {
        let shown = self.catalog.display(held.key()).unwrap_or_else(|| held.snapshot.id.to_string());
        problem(409, "snapshot_exists", format!("cannot import {name}: the tarball's snapshot is here as {shown}"))
            .hint(format!("`flocker clone {shown} {name}` makes a volume of it without a copy; --as-new makes a new one of the tarball"))
            .with("snapshot", shown)
    }

    fn new_record(&self, id: VolumeId, name: VolumeName, metadata: Metadata) -> VolumeRecord {
        VolumeRecord {
            id,
            name,
            metadata,
            created: clock::now(),
            origin: None,
            role: Role::Primary,
            epoch: 0,
            primary: Some(self.host()),
            quota_bytes: None,
        }
    }

    fn new_snapshot(&self, name: SnapshotName, metadata: Metadata) -> Snapshot {
        let (id, created) = (SnapshotId::mint(), clock::now());
        Snapshot { id, name, parents: Vec::new(), host: self.host(), created, metadata }
    }

    /// Has the driver take the tree in, as the one snapshot of a volume that is made by the same step.
    async fn take_in_tree(
        &self,
        staging: VolumeId,
        landing: &Landing,
        root: Root,
        stop: &CancellationToken,
        findings: &mut Vec<Finding>,
    ) -> Result<HeldSnapshot> {
        let volume = Volume::new(landing.record.clone(), Vec::new());
        let id = volume.record.id;
        let _guard = self.catalog.work_on(id).await;
        // A peer may be bringing the same volume.
        self.inbox.check_quiet(&volume, "import")?;
        self.inbox.suspend_one(id).await;
        if self.catalog.get(id).is_some() {
            let detail =
                format!("cannot import {}: its volume has arrived from elsewhere meanwhile", volume.record.name);
            return Err(problem(409, "busy", detail).hint("import it again"));
        }
        let request = ReceiveRequest {
            volume: volume.record,
            snapshot: landing.snapshot.clone(),
            base: None,
            format: DeltaFormat::tree(),
            resume: None,
        };
        self.state.begin(journal_entry(staging), &Operation::Import { staging, into: Some(id) }).await?;
        let arrived = self.feed_driver(request, root, stop, findings).await;
        if arrived.is_err() {
            self.driver.discard_partial(id).await?;
        }
        arrived
    }

    async fn feed_driver(
        &self,
        request: ReceiveRequest,
        root: Root,
        stop: &CancellationToken,
        findings: &mut Vec<Finding>,
    ) -> Result<HeldSnapshot> {
        let mut receiving = self.driver.receive(request).await?;
        let side = Side { root, links: Links::ByInode };
        let writer = blocking(move || DeltaWriter::new(None, side, Compare::Metadata, None)).await?;
        if !feed(writer, &mut *receiving, stop).await? {
            return Err(stopped());
        }
        findings.extend(receiving.take_findings());
        fault::point("node.import.before-commit");
        Ok(receiving.commit().await?)
    }
}

/// Names the operation in the state database.
fn journal_entry(staging: VolumeId) -> String {
    format!("import-{staging}")
}

/// Says why a tarball that names a snapshot does not hold it.
fn not_the_same(findings: &[Finding]) -> String {
    let mut why =
        "what was unpacked is not what was exported: the tarball was changed, or this host cannot keep all of it"
            .to_owned();
    if !rustix::process::geteuid().is_root() {
        why.push_str("; the node does not run as root, so owners are not restored");
    }
    if !findings.is_empty() {
        why.push_str("; see the warnings");
    }
    why
}

fn stopped() -> ApiProblem {
    problem(503, "stopped", "the import was stopped: the client went away, or the node is stopping")
}

/// Unpacks a request's body into a directory while it arrives.
async fn unpack(body: &mut Body, into: Root, stop: &CancellationToken) -> Result<Unpacked> {
    let (pieces, arriving) = mpsc::channel(PIECES_AHEAD);
    let unpacked =
        blocking(move || tarball::unpack(Arriving { pieces: arriving, piece: Bytes::new(), has_ended: false }, &into));
    let (unpacked, ()) = tokio::join!(unpacked, forward(body, pieces, stop));
    if stop.is_cancelled() {
        return Err(stopped());
    }
    unpacked.map_err(|problem| match problem.code.as_str() {
        "corrupt" => ApiProblem { status: 422, code: "bad_tarball".to_owned(), ..problem }
            .hint("nothing was made; `tar -tf FILE` shows what is in a tarball"),
        _ => problem,
    })
}

/// Hands a body on. An empty piece stands for its end: a body that breaks off has none.
async fn forward(body: &mut Body, pieces: mpsc::Sender<Bytes>, stop: &CancellationToken) {
    loop {
        let frame = tokio::select! {
            biased;
            () = stop.cancelled() => return,
            () = pieces.closed() => return,
            frame = body.frame() => frame,
        };
        let piece = match frame {
            None => Bytes::new(),
            Some(Ok(frame)) => match frame.into_data() {
                Ok(data) if !data.is_empty() => data,
                _ => continue,
            },
            Some(Err(_)) => return,
        };
        let is_end = piece.is_empty();
        if pieces.send(piece).await.is_err() || is_end {
            return;
        }
    }
}

/// Reads the rest of a body that was refused: a client that still sends would meet a closed connection and not read why.
async fn linger(mut body: Body, cancel: CancellationToken) {
    let rest = async { while let Some(Ok(_)) = body.frame().await {} };
    tokio::select! {
        biased;
        () = cancel.cancelled() => {}
        _ = tokio::time::timeout(LINGER, rest) => {}
    }
}

/// What has arrived, to be read in a blocking thread.
struct Arriving {
    pieces: mpsc::Receiver<Bytes>,
    piece: Bytes,
    has_ended: bool,
}

impl io::Read for Arriving {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.piece.is_empty() && !self.has_ended {
            let next = self.pieces.blocking_recv();
            self.piece = next.ok_or_else(|| io::Error::new(io::ErrorKind::ConnectionAborted, "it broke off"))?;
            self.has_ended = self.piece.is_empty();
        }
        let count = buffer.len().min(self.piece.len());
        self.piece.copy_to_slice(&mut buffer[..count]);
        Ok(count)
    }
}
