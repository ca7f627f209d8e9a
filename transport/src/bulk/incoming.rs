//! The receiving side of a delta.
//!
//! Three stages run at once: `read` takes frames off the link, and off further lanes and has them unpacked on blocking threads; `consume` hashes
//! them and gives them to the sink, in order; `acknowledge` tells the sender how far that is, and that this side lives.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use bytes::Bytes;
use futures_util::stream::{FuturesUnordered, StreamExt as _};
use tokio::{
    sync::{Notify, mpsc, watch},
    task::JoinHandle,
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use super::{
    BoxError, BulkError, BulkStream, ChunkSink, Expected, Integrity, Progress, Reader, Received, StopReason,
    compression::decompress,
    frame::{Ack, END_LEN, End, HEADER_LEN, Header, Kind},
    lanes::{Lanes, Next, Numbered},
    nobody,
    outgoing::SIGNS_OF_LIFE,
    stage::{Stage, Waits},
};
use crate::{
    NO_PROGRESS,
    close::CloseCode,
    error::{Error, ErrorKind},
};

/// Frames that are read ahead of the sink: with the largest frames 4 MiB.
const READ_AHEAD: usize = 4;

/// The most connections that carry one delta at once.
pub const LANES_LIMIT: usize = 8;

/// What a receiver allows its peer.
#[derive(Debug, Clone)]
pub struct IncomingLimits {
    /// How long the sender may be silent. Both sides should use the same.
    pub no_progress: Duration,
    /// Who checks the bytes.
    pub integrity: Integrity,
}

impl Default for IncomingLimits {
    fn default() -> Self {
        Self { no_progress: NO_PROGRESS, integrity: Integrity::default() }
    }
}

/// The receiver's state of one delta; outlives its links.
#[derive(Debug)]
pub struct Incoming {
    limits: IncomingLimits,
    next_seq: AtomicU64,
    progress: Progress,
    expected: Expected,
    /// Absent while a frame is with the sink: a run that was dropped there cannot be taken up.
    hasher: Option<blake3::Hasher>,
    received: Option<Received>,
}

impl Incoming {
    /// A delta of which nothing has arrived.
    pub fn new() -> Self {
        Self::with_limits(IncomingLimits::default())
    }

    /// The same with limits of one's own.
    pub fn with_limits(limits: IncomingLimits) -> Self {
        Self {
            limits,
            next_seq: AtomicU64::new(0),
            progress: Progress::default(),
            expected: Expected::default(),
            hasher: Some(blake3::Hasher::new()),
            received: None,
        }
    }

    /// The frame the sender goes on from.
    pub fn next_sequence(&self) -> u64 {
        self.next_seq.load(Ordering::Acquire)
    }

    /// Returns how much the sink has consumed.
    pub fn progress(&self) -> Progress {
        self.progress
    }

    /// Receives into the sink until the delta's end, and says yes only to exactly what was sent.
    ///
    /// After [`BulkError::Interrupted`] it can be run again with a new link and the same sink; after any other error the
    /// transfer is over. After success it can be run again, too, for a sender that lost the last acknowledgement. Dropping the future while the sink
    /// works ends the transfer.
    pub async fn run(
        &mut self,
        link: BulkStream,
        sink: &mut dyn ChunkSink,
        progress: &(dyn Fn(Progress) + Send + Sync),
    ) -> Result<Received, BulkError> {
        self.run_in_lanes(link, &mut nobody(), sink, progress).await
    }

    /// The same, taking frames from further streams of the same sender, too, as they join: [`LANES_LIMIT`] in all. The loss of one of
    /// them interrupts all.
    pub async fn run_in_lanes(
        &mut self,
        link: BulkStream,
        joining: &mut mpsc::Receiver<BulkStream>,
        sink: &mut dyn ChunkSink,
        progress: &(dyn Fn(Progress) + Send + Sync),
    ) -> Result<Received, BulkError> {
        let BulkStream { connection, mut send, recv } = link;
        let mut reader = Reader::new(recv);
        let no_progress = self.limits.no_progress;
        let (begin, beginning) = mpsc::channel(LANES_LIMIT);
        let mut arrived = Lanes::new(beginning);
        let (outcome_said, outcome) = watch::channel(Outcome::Open);
        let (consumed, link_lost) = (Notify::new(), CancellationToken::new());
        let first = self.next_sequence();
        let mut state = Consumer {
            integrity: self.limits.integrity,
            next_seq: &self.next_seq,
            progress: &mut self.progress,
            expected: &self.expected,
            hasher: &mut self.hasher,
            received: &mut self.received,
            consumed: &consumed,
            link_lost: &link_lost,
            waits: Waits::default(),
        };
        let is_over = state.received.is_some();
        let read = async {
            tokio::select! {
                biased;
                () = link_lost.cancelled() => {}
                () = read_lanes(&mut reader, joining, first, (no_progress, &self.expected), begin), if !is_over => {}
            }
        };
        let consume = async {
            let ended = if is_over { Ok(()) } else { state.consume(&mut arrived, sink, progress).await };
            drop(arrived);
            let _ = outcome_said.send(match &ended {
                Ok(()) => Outcome::Done,
                Err(Ended::Sink(_)) => Outcome::Stop(StopReason::Sink),
                Err(Ended::Corrupt(_)) => Outcome::Stop(StopReason::Corrupt),
                Err(Ended::Lost(_)) => Outcome::Lost,
            });
            link_lost.cancel();
            ended
        };
        let acknowledge = async {
            let said = acknowledge(&mut send, &self.next_seq, &consumed, outcome, no_progress).await;
            link_lost.cancel();
            said
        };
        let ((), ended, said) = tokio::join!(read, consume, acknowledge);
        let lost = |kind| BulkError::Interrupted(Error::new("receive from", connection.remote_address(), kind));
        match (ended, said) {
            (Ok(()), _) => self.received.ok_or_else(|| BulkError::Corrupt("the delta has no end".to_owned())),
            (Err(Ended::Sink(error)), _) => {
                reader.stop(CloseCode::Failed);
                Err(BulkError::Sink(error))
            }
            (Err(Ended::Corrupt(what)), _) => {
                reader.stop(CloseCode::Protocol);
                tracing::warn!(peer = %connection.remote_address(), reason = %what, "refused a corrupt delta");
                Err(BulkError::Corrupt(what))
            }
            (Err(Ended::Lost(None)), Err(kind)) | (Err(Ended::Lost(Some(kind))), _) => {
                let _ = send.reset(CloseCode::TimedOut.varint());
                reader.stop(CloseCode::TimedOut);
                Err(lost(kind))
            }
            (Err(Ended::Lost(None)), Ok(())) => Err(lost(ErrorKind::StreamEnded)),
        }
    }
}

impl Default for Incoming {
    fn default() -> Self {
        Self::new()
    }
}

#[derive(Clone, Copy)]
enum Outcome {
    Open,
    Done,
    Stop(StopReason),
    Lost,
}

enum Ended {
    /// The link; with its error where the reading side found it.
    Lost(Option<ErrorKind>),
    Sink(BoxError),
    Corrupt(String),
}

enum Piece {
    Data { seq: u64, wire: u64, raw: Unpacked },
    End { seq: u64, end: End },
    Lost(ErrorKind),
    Corrupt(String),
}

impl Numbered for Piece {
    fn sequence(&self) -> Option<u64> {
        match self {
            Self::Data { seq, .. } | Self::End { seq, .. } => Some(*seq),
            Self::Lost(_) | Self::Corrupt(_) => None,
        }
    }
}

enum Unpacked {
    Already(Bytes),
    /// Awaited by the consumer; short, so that one left behind by a dropped run ends by itself.
    Soon(JoinHandle<Result<Bytes, BoxError>>),
}

/// Reads the link, and lanes as they join, until nobody wants what arrives.
async fn read_lanes(
    reader: &mut Reader,
    joining: &mut mpsc::Receiver<BulkStream>,
    first: u64,
    signs: (Duration, &Expected),
    begin: mpsc::Sender<mpsc::Receiver<Piece>>,
) {
    let mut link = std::pin::pin!(read(reader, first, signs, lane(&begin)));
    let mut further = FuturesUnordered::new();
    let mut link_ended = false;
    // Gone when no further lane can begin: nobody waits for one then.
    let mut begin = Some(begin);
    let mut lanes = 1;
    loop {
        tokio::select! {
            biased;
            () = &mut link, if !link_ended => link_ended = true,
            Some(()) = further.next() => {}
            joined = joining.recv(), if begin.is_some() => {
                if let (Some(BulkStream { recv, .. }), Some(to)) = (joined, begin.take()) {
                    let (mut reader, pieces) = (Reader::new(recv), lane(&to));
                    further.push(async move { read(&mut reader, first, signs, pieces).await });
                    lanes += 1;
                    begin = (lanes < LANES_LIMIT).then_some(to);
                }
            }
            else => return,
        }
    }
}

/// Begins a lane; there is room for [`LANES_LIMIT`].
fn lane(begin: &mpsc::Sender<mpsc::Receiver<Piece>>) -> mpsc::Sender<Piece> {
    let (pieces, arrivals) = mpsc::channel(READ_AHEAD);
    let _ = begin.try_send(arrivals);
    pieces
}

/// Reads frames until the end, an error, or nobody wants them.
async fn read(reader: &mut Reader, mut lowest: u64, signs: (Duration, &Expected), pieces: mpsc::Sender<Piece>) {
    loop {
        let piece = match read_frame(reader, lowest, signs).await {
            Ok(None) => continue,
            Ok(Some(piece)) => piece,
            Err(piece) => piece,
        };
        let is_last = !matches!(piece, Piece::Data { .. });
        lowest = piece.sequence().map_or(lowest, |sequence| sequence + 1);
        if pieces.send(piece).await.is_err() || is_last {
            return;
        }
    }
}

async fn read_frame(
    reader: &mut Reader,
    lowest: u64,
    (no_progress, expected): (Duration, &Expected),
) -> Result<Option<Piece>, Piece> {
    let head = reader.take(HEADER_LEN, no_progress).await.map_err(Piece::Lost)?;
    let corrupt = |error: BoxError| Piece::Corrupt(error.to_string());
    let head: &[u8; HEADER_LEN] = head.as_ref().try_into().map_err(|_| Piece::Corrupt("a short head".to_owned()))?;
    let header = Header::decode(head).map_err(corrupt)?;
    if header.kind == Kind::Alive {
        expected.set(header.seq);
        return Ok(None);
    }
    if header.seq < lowest || header.seq == u64::MAX {
        return Err(Piece::Corrupt(format!("frame {} came behind frame {lowest}", header.seq)));
    }
    let payload = reader.take(header.payload as usize, no_progress).await.map_err(Piece::Lost)?;
    let wire = (HEADER_LEN + payload.len()) as u64;
    let raw = match header.kind {
        Kind::End => {
            let end = End::decode(&payload).map_err(corrupt)?;
            return Ok(Some(Piece::End { seq: header.seq, end }));
        }
        Kind::Zstd => Unpacked::Soon(super::threads::start(move || decompress(&payload, header.raw as usize))),
        Kind::Stored | Kind::Alive => Unpacked::Already(payload),
    };
    Ok(Some(Piece::Data { seq: header.seq, wire, raw }))
}

struct Consumer<'a> {
    integrity: Integrity,
    next_seq: &'a AtomicU64,
    progress: &'a mut Progress,
    expected: &'a Expected,
    hasher: &'a mut Option<blake3::Hasher>,
    received: &'a mut Option<Received>,
    consumed: &'a Notify,
    link_lost: &'a CancellationToken,
    waits: Waits,
}

impl Consumer<'_> {
    async fn consume(
        &mut self,
        arrived: &mut Lanes<Piece>,
        sink: &mut dyn ChunkSink,
        progress: &(dyn Fn(Progress) + Send + Sync),
    ) -> Result<(), Ended> {
        loop {
            let began = Instant::now();
            let due = self.next_seq.load(Ordering::Acquire);
            let next = arrived.next(due).await;
            self.waits.waited_for(Stage::Arrival, began.elapsed());
            let (wire, raw) = match next {
                Next::Nothing => return Err(Ended::Lost(None)),
                // The other half of the link is gone, and the lanes with it.
                Next::Gap(_) if self.link_lost.is_cancelled() => return Err(Ended::Lost(None)),
                Next::Gap(found) => return Err(Ended::Corrupt(format!("frame {found} came where {due} was due"))),
                Next::Due(Piece::Lost(kind)) => return Err(Ended::Lost(Some(kind))),
                Next::Due(Piece::Corrupt(what)) => return Err(Ended::Corrupt(what)),
                Next::Due(Piece::End { end, .. }) => {
                    let began = Instant::now();
                    sink.flush().await.map_err(Ended::Sink)?;
                    self.waits.waited_for(Stage::Receiver, began.elapsed());
                    self.end(end)?;
                    progress(*self.progress);
                    return Ok(());
                }
                Next::Due(Piece::Data { wire, raw: Unpacked::Already(raw), .. }) => (wire, raw),
                Next::Due(Piece::Data { wire, raw: Unpacked::Soon(unpacking), .. }) => match unpacking.await {
                    Ok(Ok(raw)) => (wire, raw),
                    Ok(Err(error)) => return Err(Ended::Corrupt(error.to_string())),
                    Err(error) => return Err(Ended::Corrupt(error.to_string())),
                },
            };
            let raw_len = raw.len() as u64;
            let began = Instant::now();
            self.hash_and_write(raw, sink).await?;
            self.waits.waited_for(Stage::Receiver, began.elapsed());
            self.progress.raw_bytes += raw_len;
            self.progress.wire_bytes += wire;
            self.progress.slowest = self.waits.slowest();
            self.progress.expected_bytes = self.expected.get();
            self.advance();
            progress(*self.progress);
        }
    }

    async fn hash_and_write(&mut self, raw: Bytes, sink: &mut dyn ChunkSink) -> Result<(), Ended> {
        let dropped = || Ended::Corrupt("an earlier run was dropped in the middle of a write".to_owned());
        let mut hasher = self.hasher.take().ok_or_else(dropped)?;
        if self.integrity == Integrity::Content {
            sink.write(raw).await.map_err(Ended::Sink)?;
            *self.hasher = Some(hasher);
            return Ok(());
        }
        let hashed = raw.clone();
        let hashing = super::threads::start(move || {
            hasher.update(&hashed);
            hasher
        });
        let (hasher, written) = tokio::join!(hashing, sink.write(raw));
        written.map_err(Ended::Sink)?;
        *self.hasher = Some(hasher.map_err(|error| Ended::Corrupt(error.to_string()))?);
        Ok(())
    }

    fn end(&mut self, end: End) -> Result<(), Ended> {
        let hasher = self.hasher.as_ref().ok_or_else(|| Ended::Corrupt("an earlier run was dropped".to_owned()))?;
        let digest = match self.integrity {
            Integrity::Pipeline => *hasher.finalize().as_bytes(),
            Integrity::Content => [0; 32],
        };
        if end.raw_bytes != self.progress.raw_bytes {
            return Err(Ended::Corrupt(format!(
                "{} bytes were sent and {} arrived",
                end.raw_bytes, self.progress.raw_bytes
            )));
        }
        if end.digest != digest {
            return Err(Ended::Corrupt("the digest differs".to_owned()));
        }
        self.progress.wire_bytes += (HEADER_LEN + END_LEN) as u64;
        let Progress { raw_bytes, wire_bytes, .. } = *self.progress;
        *self.received = Some(Received { raw_bytes, wire_bytes, digest });
        self.advance();
        Ok(())
    }

    fn advance(&self) {
        self.next_seq.fetch_add(1, Ordering::AcqRel);
        self.consumed.notify_one();
    }
}

/// Says how far the sink is whenever it got further, and at least every so often; then the outcome.
async fn acknowledge(
    send: &mut quinn::SendStream,
    next_seq: &AtomicU64,
    consumed: &Notify,
    mut outcome: watch::Receiver<Outcome>,
    no_progress: Duration,
) -> Result<(), ErrorKind> {
    loop {
        let last = *outcome.borrow();
        let ack = match last {
            Outcome::Lost => return Ok(()),
            Outcome::Stop(reason) => Ack::Stop(reason),
            Outcome::Open | Outcome::Done => Ack::Consumed(next_seq.load(Ordering::Acquire)),
        };
        match tokio::time::timeout(no_progress, send.write_all(&ack.encode())).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return Err(ErrorKind::from_write(error)),
            Err(_) => return Err(ErrorKind::TimedOut(no_progress)),
        }
        if !matches!(last, Outcome::Open) {
            let _ = send.finish();
            return Ok(());
        }
        tokio::select! {
            biased;
            _ = outcome.changed() => {}
            () = consumed.notified() => {}
            () = tokio::time::sleep(no_progress / SIGNS_OF_LIFE) => {}
        }
    }
}
