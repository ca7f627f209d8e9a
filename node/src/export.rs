//! `flocker export db@snap`: a snapshot as a tarball, as a stream.
//!
//! Owns that the snapshot stays while it is read, and that nobody reads for a client who is gone. Refuses to know what is
//! in a tarball ([`flocker_storage::tarball`]) and how the stream travels ([`crate::api::tarball`]).
//!
//! The snapshot is read twice: for the digest that stands in front, and for the members.

use std::{
    io::{self, Write},
    sync::Arc,
};

use bytes::{Bytes, BytesMut};
use flocker_storage::{
    driver::Target,
    model::{HeldSnapshot, Role, SnapshotRef, VolumeRecord},
    tarball::{
        self,
        compression::Compression,
        manifest::{ExportedVolume, Manifest},
    },
    tree::digest::TreeDigest,
};
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio_util::sync::CancellationToken;

use crate::{
    daemon::Node,
    merge::blocking,
    problem::{Result, chain, problem},
};

/// How many tarballs are written and read at once: each has a thread and a program.
pub(crate) const TARBALLS_LIMIT: usize = 8;

/// How much is handed over at once, in bytes.
const PIECE: usize = 256 * 1024;

/// How many pieces wait for the client.
const PIECES_AHEAD: usize = 8;

/// The next piece of a tarball; an error where it cannot be ended.
pub(crate) type Piece = io::Result<Bytes>;

impl Node {
    /// Starts to write a snapshot as a tarball. Dropping the receiver ends the work.
    pub(crate) async fn export(
        self: &Arc<Self>,
        wanted: &SnapshotRef,
        compression: Compression,
    ) -> Result<mpsc::Receiver<Piece>> {
        let permit = self.tarball_permit()?;
        let volume = self.catalog.find(&wanted.volume)?;
        let held = volume.snapshot(&wanted.snapshot)?.clone();
        let pin = self.pins.pin([held.key()]);
        blocking(tarball::check_program).await?;

        let target = Target::Snapshot(held.volume, held.snapshot.id);
        let view = self.driver.view(target).await?;
        let stop = CancellationToken::new();
        let _guard = stop.clone().drop_guard();
        let digest = blocking(move || TreeDigest::of_view(view, &|| stop.is_cancelled())).await?;
        let manifest = self.manifest(volume.record, held, digest);

        let view = self.driver.view(target).await?;
        let (pieces, receiver) = mpsc::channel(PIECES_AHEAD);
        let shown = wanted.to_string();
        self.tasks.spawn_blocking(move || {
            let mut out = Pieces { pieces, buffer: BytesMut::with_capacity(PIECE) };
            let packed = tarball::pack(view.root(), &manifest, compression, &mut out);
            if let Err(error) = packed {
                if out.pieces.is_closed() {
                    tracing::info!(snapshot = shown, "nobody waits for an export any more");
                } else {
                    tracing::error!(snapshot = shown, "an export failed: {}", chain(&error));
                }
                // An end that is none: the client must not take it for the tarball's.
                let _ = out.pieces.blocking_send(Err(io::Error::other("the export failed")));
            }
            drop((view, pin, permit));
        });
        Ok(receiver)
    }

    fn manifest(&self, volume: VolumeRecord, held: HeldSnapshot, digest: TreeDigest) -> Manifest {
        let own = || (volume.role == Role::Primary).then(|| self.host());
        let primary = volume.primary.clone().or_else(own);
        let VolumeRecord { id, name, metadata, created, epoch, .. } = volume;
        let volume = ExportedVolume { id, name, metadata, created, epoch, primary };
        Manifest { volume, snapshot: held.snapshot, logical_bytes: held.logical_bytes, digest }
    }

    /// Takes one of the places for tarballs.
    pub(crate) fn tarball_permit(&self) -> Result<OwnedSemaphorePermit> {
        self.tarballs.clone().try_acquire_owned().map_err(|_| {
            let detail = format!("{TARBALLS_LIMIT} exports and imports are under way, and a node does no more at once");
            problem(409, "busy", detail).hint("wait until one has ended")
        })
    }
}

/// Cuts what is written into pieces.
struct Pieces {
    pieces: mpsc::Sender<Piece>,
    buffer: BytesMut,
}

impl Pieces {
    fn send(&mut self) -> io::Result<()> {
        let piece = self.buffer.split().freeze();
        self.pieces.blocking_send(Ok(piece)).map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))
    }
}

impl Write for &mut Pieces {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = bytes.len().min(PIECE - self.buffer.len());
        self.buffer.extend_from_slice(&bytes[..count]);
        if self.buffer.len() == PIECE {
            self.send()?;
        }
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.buffer.is_empty() { Ok(()) } else { self.send() }
    }
}
