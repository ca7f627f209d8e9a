//! The sending side of a delta.
//!
//! Three stages run at once: `feed` reads the source, hashes, and has frames compressed on blocking threads; `write` puts
//! frames onto the link in order, and each further lane takes the next one that none has; `listen` takes acknowledgements and lets go of
//! frames. They share the queue of frames that are not acknowledged, which outlives the link.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use futures_util::stream::{FuturesUnordered, StreamExt as _};
use tokio::{
    sync::{Notify, mpsc},
    task::JoinSet,
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use super::{
    BoxError, BulkError, BulkStream, ChunkSource, Expected, Integrity, Progress, Reader, Sent,
    compression::{Choice, Compressors, Pacer},
    frame::{ACK_LEN, Ack, FRAME_RAW, HEADER_LEN, Header, Kind},
    nobody,
    pieces::Pieces,
    queue::{Frame, Queue, Slot},
    rate::{self, Gate},
    stage::Stage,
    threads,
};
use crate::{
    NO_PROGRESS,
    close::CloseCode,
    error::{Error, ErrorKind},
};

/// Smaller chunks of the source are put together until there is this much.
const GATHER: usize = 200 * 1024;
/// Frames compressed at once: as many as processors, and no more, so that waiting for them shows that the processors
/// are the bottleneck.
const MOST_ENCODERS: usize = 4;
/// A congestion window counts as full from this part of it on: the smoothed round-trip time is behind what happens.
const FULL_WINDOW: f64 = 3.0;
/// A sign of life is sent this many times within `no_progress`.
pub(super) const SIGNS_OF_LIFE: u32 = 4;

/// What a sender allows itself.
#[derive(Debug, Clone)]
pub struct OutgoingLimits {
    /// Bytes that may be on their way: read from the source and not consumed by the receiver.
    pub window: usize,
    /// How long the receiver may be silent. Both sides should use the same.
    pub no_progress: Duration,
    /// What holds frames back on their way to the wire; as fast as it goes where there is none.
    pub gates: Vec<Arc<Gate>>,
    /// Who checks the bytes.
    pub integrity: Integrity,
    /// What the receiver is told of the length.
    pub expected: Expected,
    /// The bytes are known not to shrink, encrypted as they are: no frame is compressed.
    pub is_packed: bool,
}

impl Default for OutgoingLimits {
    fn default() -> Self {
        let (no_progress, integrity) = (NO_PROGRESS, Integrity::default());
        let expected = Expected::default();
        Self { window: 8 * 1024 * 1024, no_progress, gates: Vec::new(), integrity, expected, is_packed: false }
    }
}

/// The sender's state of one delta; outlives its links.
#[derive(Debug)]
pub struct Outgoing {
    limits: OutgoingLimits,
    shared: Arc<Shared>,
    feeder: Feeder,
}

impl Outgoing {
    /// A delta of which nothing was sent.
    pub fn new(limits: OutgoingLimits) -> Self {
        let shared = Shared {
            queue: Mutex::new(Queue::new(if limits.is_packed { Pacer::off() } else { Pacer::new() })),
            room: Notify::new(),
            ready: Notify::new(),
            compressors: Compressors::default(),
        };
        Self { limits, shared: Arc::new(shared), feeder: Feeder::default() }
    }

    /// Returns the sequence number of the oldest frame that is still kept: the first that a receiver may ask for.
    pub fn oldest_sequence(&self) -> u64 {
        self.shared.queue().first
    }

    /// Returns how far the receiver is, as it has said.
    pub fn progress(&self) -> Progress {
        self.shared.queue().acknowledged
    }

    /// Sends what the receiver lacks from `resume_from_seq` on (its [`next_sequence`](super::Incoming::next_sequence)),
    /// goes on with the source to its end, and returns when the receiver has consumed all of it.
    ///
    /// After [`BulkError::Interrupted`] it can be run again with a new link and the same source; after any other error the transfer
    /// is over. Dropping the future loses the chunk that was being read, so the transfer is over then, too.
    pub async fn run(
        &mut self,
        link: BulkStream,
        resume_from_seq: u64,
        source: &mut dyn ChunkSource,
        progress: &(dyn Fn(Progress) + Send + Sync),
    ) -> Result<Sent, BulkError> {
        self.run_in_lanes(link, &mut nobody(), resume_from_seq, source, progress).await
    }

    /// The same, sharing the work with further streams of the same receiver, on connections of their own, as they join. The loss of
    /// one of them interrupts all.
    pub async fn run_in_lanes(
        &mut self,
        link: BulkStream,
        joining: &mut mpsc::Receiver<BulkStream>,
        resume_from_seq: u64,
        source: &mut dyn ChunkSource,
        progress: &(dyn Fn(Progress) + Send + Sync),
    ) -> Result<Sent, BulkError> {
        let BulkStream { connection, mut send, recv } = link;
        let mut acks = Reader::new(recv);
        let encoders = std::thread::available_parallelism().map_or(1, |count| count.get().min(MOST_ENCODERS));
        let run = Run {
            shared: &self.shared,
            limits: &self.limits,
            connection: &connection,
            encoders,
            began: Instant::now(),
            written_before: self.shared.queue().wire_bytes,
            link_lost: CancellationToken::new(),
        };
        if let Err(what) = self.shared.queue().check_resume(resume_from_seq) {
            connection.close(CloseCode::Protocol.varint(), b"resume");
            return Err(BulkError::Corrupt(what));
        }
        self.shared.queue().next_unwritten = resume_from_seq;
        let source_failed = CancellationToken::new();
        let feed = async {
            let fed = run.feed(&mut self.feeder, source).await;
            if fed.is_err() {
                source_failed.cancel();
            }
            fed
        };
        let link = async {
            let outcome = tokio::select! {
                biased;
                () = source_failed.cancelled() => Ok(()),
                heard = run.listen(&mut acks, progress) => heard,
                written = run.write_in_lanes(&mut send, joining) => written,
            };
            run.link_lost.cancel();
            outcome
        };
        let (fed, linked) = tokio::join!(feed, link);
        if let Err(error) = fed {
            let _ = send.reset(CloseCode::Failed.varint());
            return Err(BulkError::Source(error));
        }
        match linked {
            Ok(()) => {
                let _ = send.finish();
                let queue = self.shared.queue();
                Ok(Sent { raw_bytes: queue.end.raw_bytes, wire_bytes: queue.wire_bytes, digest: queue.end.digest })
            }
            Err(LinkError::Stopped(reason)) => Err(BulkError::Stopped(reason)),
            Err(LinkError::Corrupt(what)) => {
                connection.close(CloseCode::Protocol.varint(), b"bulk");
                Err(BulkError::Corrupt(what))
            }
            Err(LinkError::Lost(kind)) => {
                let _ = send.reset(CloseCode::TimedOut.varint());
                acks.stop(CloseCode::TimedOut);
                Err(BulkError::Interrupted(Error::new("send to", connection.remote_address(), kind)))
            }
        }
    }
}

enum LinkError {
    Lost(ErrorKind),
    Stopped(super::StopReason),
    Corrupt(String),
}

#[derive(Debug)]
struct Shared {
    queue: Mutex<Queue>,
    /// There may be room in the window.
    room: Notify,
    /// There may be a frame to write.
    ready: Notify,
    compressors: Compressors,
}

impl Shared {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The state of the stage that reads the source.
#[derive(Debug, Default)]
struct Feeder {
    gathered: BytesMut,
    /// What a long chunk still holds.
    rest: Bytes,
    /// What was read and did not fit into the frame before.
    ahead: Option<Bytes>,
    source_done: bool,
    hasher: Option<blake3::Hasher>,
    hashing: JoinSet<blake3::Hasher>,
    encoding: JoinSet<()>,
}

impl Feeder {
    /// The next frame's bytes; nothing at the end. Two pieces where both fit: what there is to do for each frame is threads that wake
    /// each other, and of data that compresses that is a tenth of a push.
    async fn next(&mut self, source: &mut dyn ChunkSource) -> Result<Option<Pieces>, BoxError> {
        let Some(first) = self.piece(source).await? else { return Ok(None) };
        match self.piece(source).await? {
            Some(second) if first.len() + second.len() <= FRAME_RAW => Ok(Some(Pieces::of(first, second))),
            second => {
                self.ahead = second;
                Ok(Some(first.into()))
            }
        }
    }

    async fn piece(&mut self, source: &mut dyn ChunkSource) -> Result<Option<Bytes>, BoxError> {
        loop {
            if let Some(ahead) = self.ahead.take() {
                return Ok(Some(ahead));
            }
            if !self.rest.is_empty() {
                let length = self.rest.len().min(FRAME_RAW);
                return Ok(Some(self.rest.split_to(length)));
            }
            if self.gathered.len() >= GATHER || (self.source_done && !self.gathered.is_empty()) {
                self.rest = self.gathered.split().freeze();
                continue;
            }
            if self.source_done {
                return Ok(None);
            }
            match source.next().await? {
                None => self.source_done = true,
                Some(chunk) if self.gathered.is_empty() && chunk.len() >= GATHER => self.rest = chunk,
                Some(chunk) => self.gathered.extend_from_slice(&chunk),
            }
        }
    }

    /// Hashes behind the caller's back, one chunk at a time.
    async fn hash(&mut self, raw: Pieces) -> Result<(), BoxError> {
        let mut hasher = self.hashed().await?;
        threads::start_in(&mut self.hashing, move || {
            for piece in raw.iter() {
                hasher.update(piece);
            }
            hasher
        });
        Ok(())
    }

    async fn hashed(&mut self) -> Result<blake3::Hasher, BoxError> {
        match self.hashing.join_next().await {
            Some(hasher) => Ok(hasher?),
            None => Ok(self.hasher.take().unwrap_or_default()),
        }
    }
}

/// One link's time.
struct Run<'a> {
    shared: &'a Arc<Shared>,
    limits: &'a OutgoingLimits,
    connection: &'a quinn::Connection,
    encoders: usize,
    /// When this link's time began, and what had been written before.
    began: Instant,
    written_before: u64,
    link_lost: CancellationToken,
}

impl Run<'_> {
    /// Reads the source while there is room, until it ends or the link is lost.
    async fn feed(&self, feeder: &mut Feeder, source: &mut dyn ChunkSource) -> Result<(), BoxError> {
        while !self.shared.queue().ended {
            if !self.wait_for_room().await {
                return Ok(());
            }
            self.wait_for_encoder(feeder).await?;
            match feeder.next(source).await? {
                Some(raw) => {
                    if self.limits.integrity == Integrity::Pipeline {
                        feeder.hash(raw.clone()).await?;
                    }
                    self.submit(feeder, raw);
                }
                None => {
                    let digest = match self.limits.integrity {
                        Integrity::Pipeline => *feeder.hashed().await?.finalize().as_bytes(),
                        Integrity::Content => [0; 32],
                    };
                    while let Some(encoded) = feeder.encoding.join_next().await {
                        encoded?;
                    }
                    let mut queue = self.shared.queue();
                    queue.end.digest = digest;
                    queue.push_end();
                    drop(queue);
                    self.shared.ready.notify_one();
                }
            }
        }
        Ok(())
    }

    /// Waits until a frame fits into the window; false when the link is lost meanwhile.
    async fn wait_for_room(&self) -> bool {
        let since = Instant::now();
        let mut has_waited = false;
        loop {
            if self.link_lost.is_cancelled() {
                return false;
            }
            if self.shared.queue().has_room(self.limits.window) {
                if has_waited {
                    // A limit makes bytes on the line dear.
                    let stage = if self.limits.gates.is_empty() { self.beyond() } else { Stage::Limit };
                    self.shared.queue().pacer.waited_for(stage, since.elapsed());
                }
                return true;
            }
            has_waited = true;
            tokio::select! {
                biased;
                () = self.link_lost.cancelled() => return false,
                () = self.shared.room.notified() => {}
            }
        }
    }

    /// Waits until one more frame may be compressed.
    async fn wait_for_encoder(&self, feeder: &mut Feeder) -> Result<(), BoxError> {
        while let Some(encoded) = feeder.encoding.try_join_next() {
            encoded?;
        }
        if feeder.encoding.len() < self.encoders {
            return Ok(());
        }
        let since = Instant::now();
        if let Some(encoded) = feeder.encoding.join_next().await {
            encoded?;
        }
        self.shared.queue().pacer.waited_for_encoder(since.elapsed());
        Ok(())
    }

    /// Numbers a frame, and has it compressed where that pays.
    fn submit(&self, feeder: &mut Feeder, raw: Pieces) {
        let mut queue = self.shared.queue();
        let (seq, raw_len) = (queue.next(), raw.len() as u32);
        queue.end.raw_bytes += u64::from(raw_len);
        queue.held += raw.len();
        let stored = Header { kind: Kind::Stored, seq, raw: raw_len, payload: raw_len };
        match queue.pacer.choose() {
            Choice::Store => {
                queue.frames.push_back(Slot::Ready(Frame { header: stored, payload: raw }));
                drop(queue);
                self.shared.ready.notify_one();
            }
            Choice::Compress { level } => {
                queue.frames.push_back(Slot::Encoding { raw: raw.len() });
                drop(queue);
                let shared = self.shared.clone();
                threads::start_in(&mut feeder.encoding, move || {
                    let compressed = shared.compressors.compress(&raw, level);
                    let mut queue = shared.queue();
                    queue.pacer.observe(compressed.is_some());
                    queue.fill(match compressed {
                        Some(payload) => {
                            let header = Header { kind: Kind::Zstd, payload: payload.len() as u32, ..stored };
                            Frame { header, payload: payload.into() }
                        }
                        None => Frame { header: stored, payload: raw },
                    });
                    drop(queue);
                    shared.ready.notify_one();
                    shared.room.notify_one();
                });
            }
        }
    }

    /// Writes to the link, and to those that join; ends with the first of them only.
    async fn write_in_lanes(
        &self,
        send: &mut quinn::SendStream,
        joining: &mut mpsc::Receiver<BulkStream>,
    ) -> Result<(), LinkError> {
        let mut first = std::pin::pin!(self.write(send));
        let mut further = FuturesUnordered::new();
        loop {
            tokio::select! {
                biased;
                ended = &mut first => return ended,
                Some(ended) = further.next() => return ended,
                Some(BulkStream { mut send, .. }) = joining.recv() => {
                    further.push(async move { self.write(&mut send).await });
                }
            }
        }
    }

    /// Writes frames that no other lane has, in order, and signs of life between them; ends with the lane only.
    async fn write(&self, send: &mut quinn::SendStream) -> Result<(), LinkError> {
        let mut told = 0;
        loop {
            let expected = self.limits.expected.number();
            if expected != told {
                self.sent(send.write_all(&Header::alive(expected).encode()).await).await?;
                told = expected;
            }
            let frame = self.shared.queue().take();
            let Some(Frame { header, payload }) = frame else {
                self.wait_for_frame(send).await?;
                continue;
            };
            let written = HEADER_LEN + payload.len();
            let header = Bytes::copy_from_slice(&header.encode());
            self.sent(self.write_pieces(send, [header].into_iter().chain(payload)).await).await?;
            let mut queue = self.shared.queue();
            queue.wire_bytes += written as u64;
            queue.pacer.frame_written();
        }
    }

    /// Writes a frame no faster than the gates let it through.
    async fn write_pieces(
        &self,
        send: &mut quinn::SendStream,
        pieces: impl Iterator<Item = Bytes>,
    ) -> Result<(), quinn::WriteError> {
        for mut rest in pieces {
            while !rest.is_empty() {
                let piece = match rate::piece(&self.limits.gates) {
                    None => std::mem::take(&mut rest),
                    Some(most) => {
                        let piece = rest.split_to(rest.len().min(most));
                        let began = Instant::now();
                        rate::admit(&self.limits.gates, piece.len()).await;
                        self.waited_for(Stage::Limit, began);
                        piece
                    }
                };
                let began = Instant::now();
                send.write_chunk(piece).await?;
                self.waited_for(self.beyond(), began);
            }
        }
        Ok(())
    }

    /// Waits until there is something to write, or shows a sign of life.
    async fn wait_for_frame(&self, send: &mut quinn::SendStream) -> Result<(), LinkError> {
        let signs = self.limits.no_progress / SIGNS_OF_LIFE;
        let is_full = |queue: &Queue| queue.ended || !queue.has_room(self.limits.window);
        let (is_encoding, is_full) = {
            let mut queue = self.shared.queue();
            let next = queue.next_unwritten;
            (queue.slot(next).is_some(), is_full(&queue))
        };
        let stage = match (is_encoding, is_full) {
            (true, _) => Stage::Compression,
            (false, true) => self.beyond(),
            (false, false) => Stage::Source,
        };
        let began = Instant::now();
        let ready = tokio::time::timeout(signs, self.shared.ready.notified()).await;
        self.waited_for(stage, began);
        if ready.is_err() {
            self.sent(send.write_all(&Header::alive(self.limits.expected.number()).encode()).await).await?;
        }
        Ok(())
    }

    fn waited_for(&self, stage: Stage, since: Instant) {
        self.shared.queue().waits.waited_for(stage, since.elapsed());
    }

    /// Tells what takes no more of what was written. Both the network and a receiver that is slow to read show in the same way; but
    /// as long as the receiver is what is waited for, the congestion window is far from full.
    fn beyond(&self) -> Stage {
        let path = self.connection.stats().path;
        let written = self.shared.queue().wire_bytes - self.written_before;
        let per_second = written as f64 / self.began.elapsed().as_secs_f64().max(0.001);
        if per_second * path.rtt.as_secs_f64() * FULL_WINDOW >= path.cwnd as f64 {
            Stage::Line
        } else {
            Stage::Receiver
        }
    }

    /// A receiver that gives up stops the stream and says why in an acknowledgement: then `listen` has the word.
    async fn sent(&self, written: Result<(), quinn::WriteError>) -> Result<(), LinkError> {
        match written {
            Ok(()) => Ok(()),
            Err(quinn::WriteError::Stopped(_)) => std::future::pending().await,
            Err(error) => Err(LinkError::Lost(ErrorKind::from_write(error))),
        }
    }

    /// Takes acknowledgements until all is acknowledged.
    async fn listen(&self, acks: &mut Reader, progress: &(dyn Fn(Progress) + Send + Sync)) -> Result<(), LinkError> {
        let corrupt = |error: BoxError| LinkError::Corrupt(error.to_string());
        loop {
            let bytes = acks.take(ACK_LEN, self.limits.no_progress).await.map_err(LinkError::Lost)?;
            let next = match Ack::decode(&bytes).map_err(corrupt)? {
                Ack::Consumed(next) => next,
                Ack::Stop(reason) => return Err(LinkError::Stopped(reason)),
            };
            let (acknowledged, done) = {
                let mut queue = self.shared.queue();
                queue.acknowledge(next).map_err(LinkError::Corrupt)?;
                queue.acknowledged.slowest = queue.waits.slowest();
                (queue.acknowledged, queue.is_done())
            };
            progress(acknowledged);
            if done {
                return Ok(());
            }
            self.shared.room.notify_one();
        }
    }
}
