//! The bulk pipeline over real sockets: whole, cut, slow, full and silent.
#![allow(clippy::unwrap_used)]

mod common;

use std::{
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use common::*;
use flocker_transport::{
    BoxError, BulkError, ChunkSink, ChunkSource, CloseCode, Connection, ErrorKind, Incoming, IncomingLimits, Outgoing,
    OutgoingLimits, Progress, Received, Sent, StopReason,
};
use rand::{Rng, RngCore, SeedableRng, rngs::StdRng};

fn quiet(_: Progress) {}

/// Sends all of a source from one member to the other.
async fn carry(
    (client, server): &(Connection, Connection),
    source: &mut dyn ChunkSource,
    sink: &mut dyn ChunkSink,
    progress: &(dyn Fn(Progress) + Send + Sync),
) -> (Result<Sent, BulkError>, Result<Received, BulkError>) {
    let send = async {
        let link = client.open_bulk(1).await.unwrap();
        Outgoing::new(OutgoingLimits::default()).run(link, 0, source, progress).await
    };
    let receive = async {
        let link = server.accept_bulk(1).await.unwrap();
        Incoming::new().run(link, sink, &quiet).await
    };
    tokio::join!(send, receive)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_sent_arrives() {
    for (length, size) in [(0, 1), (1, 1), (300_000, 70), (5_000_000, 100_000), (9_000_001, 3_000_000)] {
        let pair = Pair::new();
        let data = mixed_data(length as u64, length);
        let (mut source, mut sink) = (Pieces::new(data.clone(), size), Collect::new());
        let seen = Mutex::new(Progress::default());
        let keep = |progress| *seen.lock().unwrap() = progress;
        let (sent, received) = carry(&pair.connect().await, &mut source, &mut sink, &keep).await;
        let (sent, received) = (sent.unwrap(), received.unwrap());
        assert!(*sink.data.lock().unwrap() == data);
        assert_eq!(sent.raw_bytes, length as u64);
        assert_eq!((sent.raw_bytes, sent.digest), (received.raw_bytes, received.digest));
        assert_eq!(sent.digest, *blake3::hash(&data).as_bytes());
        assert_eq!(seen.lock().unwrap().raw_bytes, length as u64);
    }
}

/// Takes everything, and finds at the end that it was wrong.
struct Late;

#[async_trait::async_trait]
impl ChunkSink for Late {
    async fn write(&mut self, _: Bytes) -> Result<(), BoxError> {
        Ok(())
    }

    async fn flush(&mut self) -> Result<(), BoxError> {
        Err("a digest differs".into())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_sink_finds_at_the_end_is_told_before_the_sender_is_done() {
    let pair = Pair::new();
    let mut source = Pieces::new(mixed_data(1, 300_000), 70_000);
    let (sent, received) = carry(&pair.connect().await, &mut source, &mut Late, &quiet).await;
    assert!(matches!(sent, Err(BulkError::Stopped(StopReason::Sink))), "{sent:?}");
    assert!(matches!(&received, Err(BulkError::Sink(why)) if why.to_string() == "a digest differs"), "{received:?}");
}

/// Ten datagrams of such a size are more than one send to the kernel takes; where such sends fail, quinn falls back to 1,200 bytes.
#[tokio::test(flavor = "multi_thread")]
async fn datagrams_become_as_large_as_the_path_carries_and_stay_so() {
    let pair = Pair::new();
    let members = pair.connect().await;
    let (mut source, mut sink) = (Pieces::new(mixed_data(1, 64_000_000), 256 << 10), Collect::new());
    let (_, received) = carry(&members, &mut source, &mut sink, &quiet).await;
    assert_eq!(received.unwrap().raw_bytes, 64_000_000);
    assert!((31_900..=32_000).contains(&members.0.mtu()), "{} bytes", members.0.mtu());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transfer_that_is_cut_again_and_again_gives_the_same_bytes() {
    let mut cuts = 0;
    for seed in 0..12 {
        let mut rng = StdRng::seed_from_u64(seed);
        println!("seed {seed}");
        let data = mixed_data(seed, 8_000_000);
        let (mut source, mut sink) = (Pieces::new(data.clone(), rng.random_range(1_000..400_000)), Collect::new());
        let (mut outgoing, mut incoming) = (Outgoing::new(OutgoingLimits::default()), Incoming::new());
        let pair = Pair::new();
        loop {
            let (client, server) = pair.connect().await;
            let cut_after = incoming.next_sequence() + rng.random_range(0..6);
            let (from_client, consumed) = (rng.random_bool(0.5), AtomicU64::new(incoming.next_sequence()));
            let cut = |_| {
                if consumed.fetch_add(1, Ordering::Relaxed) >= cut_after {
                    let side = if from_client { &client } else { &server };
                    side.close(CloseCode::Failed, "cut");
                }
            };
            let resume = incoming.next_sequence();
            let send = async {
                let link = client.open_bulk(1).await.unwrap();
                outgoing.run(link, resume, &mut source, &quiet).await
            };
            let receive = async {
                let link = server.accept_bulk(1).await.unwrap();
                incoming.run(link, &mut sink, &cut).await
            };
            match tokio::time::timeout(DEADLINE, async { tokio::join!(send, receive) }).await.unwrap() {
                (Ok(sent), Ok(received)) => {
                    assert_eq!(sent.digest, received.digest);
                    break;
                }
                (sent, received) => {
                    for error in [sent.err(), received.err()].into_iter().flatten() {
                        assert!(matches!(error, BulkError::Interrupted(_)), "{error:?}");
                    }
                    cuts += 1;
                }
            }
        }
        assert!(*sink.data.lock().unwrap() == data, "seed {seed}");
    }
    // What has arrived when the line is cut is consumed none the less, so that large pieces are through after few cuts.
    assert!(cuts > 24, "{cuts}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sink_that_fails_stops_both_sides() {
    let pair = Pair::new();
    let (client, server) = pair.connect().await;
    let mut source = Pieces::new(mixed_data(1, 30_000_000), 200_000);
    let mut sink = Collect { capacity: 2_000_000, ..Collect::new() };
    let send = async {
        let link = client.open_bulk(1).await.unwrap();
        Outgoing::new(OutgoingLimits::default()).run(link, 0, &mut source, &quiet).await.unwrap_err()
    };
    let receive = async {
        let link = server.accept_bulk(1).await.unwrap();
        Incoming::new().run(link, &mut sink, &quiet).await.unwrap_err()
    };
    let (sent, received) = tokio::time::timeout(DEADLINE, async { tokio::join!(send, receive) }).await.unwrap();
    assert!(matches!(sent, BulkError::Stopped(StopReason::Sink)), "{sent:?}");
    let BulkError::Sink(error) = received else { panic!("{received:?}") };
    assert_eq!(error.downcast_ref::<DiskFull>(), Some(&DiskFull));
    // The connection lives on for the reason.
    let mut exchange = server.open_exchange().await.unwrap();
    exchange.send("disk full").await.unwrap();
    assert_eq!(client.accept_exchange().await.unwrap().recv::<String>().await.unwrap(), "disk full");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_receiver_holds_the_sender_back() {
    let pair = Pair::new();
    let (client, server) = pair.connect().await;
    let mut random = vec![0; 24_000_000];
    StdRng::seed_from_u64(5).fill_bytes(&mut random);
    let mut source = Watched { inner: Pieces::new(random, 256 * 1024), read: AtomicU64::new(0).into() };
    let read = source.read.clone();
    let mut sink = Collect { pause: Duration::from_millis(4), ..Collect::new() };
    let written = sink.data.clone();
    let most = AtomicU64::new(0);
    let watch = |_| {
        let ahead = read.load(Ordering::SeqCst).saturating_sub(written.lock().unwrap().len() as u64);
        most.fetch_max(ahead, Ordering::SeqCst);
    };
    let send = async {
        let link = client.open_bulk(1).await.unwrap();
        Outgoing::new(OutgoingLimits { window: 4 << 20, ..OutgoingLimits::default() })
            .run(link, 0, &mut source, &watch)
            .await
            .unwrap()
    };
    let receive = async {
        let link = server.accept_bulk(1).await.unwrap();
        Incoming::new().run(link, &mut sink, &quiet).await.unwrap()
    };
    tokio::join!(send, receive);
    let most = most.load(Ordering::SeqCst);
    assert!(most > 1 << 20 && most <= 5 << 20, "{most}");
}

struct Watched {
    inner: Pieces,
    read: std::sync::Arc<AtomicU64>,
}

#[async_trait::async_trait]
impl flocker_transport::ChunkSource for Watched {
    async fn next(&mut self) -> Result<Option<bytes::Bytes>, flocker_transport::BoxError> {
        let chunk = self.inner.next().await?;
        self.read.fetch_add(chunk.as_ref().map_or(0, |chunk| chunk.len() as u64), Ordering::SeqCst);
        Ok(chunk)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn data_that_does_not_shrink_is_stored_and_data_that_does_is_compressed() {
    let mut random = vec![0; 8_000_000];
    StdRng::seed_from_u64(7).fill_bytes(&mut random);
    let text = b"a line of a log file, much like the one before\n".repeat(170_000);
    // What a compressing file system sends as it lies: letters of a small alphabet shrink once, and then no further.
    let letters: Vec<u8> = random.iter().map(|byte| b'a' + byte % 16).collect();
    let packed = zstd::encode_all(&letters[..], 1).unwrap();
    let length = packed.len() as u64;
    let cases = [
        (random, false, 8_000_000..8_001_000),
        (packed, false, length..length + 1_000),
        (text.clone(), false, 1_000..400_000),
        (text.clone(), true, text.len() as u64..text.len() as u64 + 1_000),
    ];
    for (data, is_packed, wanted) in cases {
        let pair = Pair::new();
        let (client, server) = pair.connect().await;
        let (mut source, mut sink) = (Pieces::new(data.clone(), 256 * 1024), Collect::new());
        let send = async {
            let link = client.open_bulk(1).await.unwrap();
            let limits = OutgoingLimits { is_packed, ..OutgoingLimits::default() };
            Outgoing::new(limits).run(link, 0, &mut source, &quiet).await.unwrap()
        };
        let receive = async {
            let link = server.accept_bulk(1).await.unwrap();
            Incoming::new().run(link, &mut sink, &quiet).await.unwrap()
        };
        let (sent, received) = tokio::join!(send, receive);
        assert!(wanted.contains(&sent.wire_bytes), "{}", sent.wire_bytes);
        assert!(received.wire_bytes <= sent.wire_bytes);
        assert!(*sink.data.lock().unwrap() == data);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_peer_interrupts_both_roles() {
    let no_progress = Duration::from_millis(100);
    let pair = Pair::new();
    let (client, server) = pair.connect().await;
    let link = client.open_bulk(1).await.unwrap();
    let _held = server.accept_bulk(1).await.unwrap();
    let mut outgoing = Outgoing::new(OutgoingLimits { no_progress, ..OutgoingLimits::default() });
    let error = outgoing.run(link, 0, &mut Pieces::new(vec![1; 1000], 100), &quiet).await.unwrap_err();
    assert!(
        matches!(&error, BulkError::Interrupted(error) if matches!(error.kind, ErrorKind::TimedOut(_))),
        "{error:?}"
    );

    let _held = client.open_bulk(2).await.unwrap();
    let link = server.accept_bulk(2).await.unwrap();
    let mut incoming = Incoming::with_limits(IncomingLimits { no_progress, ..IncomingLimits::default() });
    let error = incoming.run(link, &mut Collect::new(), &quiet).await.unwrap_err();
    assert!(
        matches!(&error, BulkError::Interrupted(error) if matches!(error.kind, ErrorKind::TimedOut(_))),
        "{error:?}"
    );
}

/// Gives one chunk after a long time.
struct Sleepy(Option<Duration>);

#[async_trait::async_trait]
impl flocker_transport::ChunkSource for Sleepy {
    async fn next(&mut self) -> Result<Option<bytes::Bytes>, flocker_transport::BoxError> {
        let Some(pause) = self.0.take() else { return Ok(None) };
        tokio::time::sleep(pause).await;
        Ok(Some(bytes::Bytes::from_static(b"at last")))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_source_and_a_slow_sink_are_waited_for() {
    let no_progress = Duration::from_millis(400);
    let pair = Pair::new();
    let (client, server) = pair.connect().await;
    let mut sink = Collect { pause: Duration::from_millis(1000), ..Collect::new() };
    let send = async {
        let link = client.open_bulk(1).await.unwrap();
        Outgoing::new(OutgoingLimits { no_progress, ..OutgoingLimits::default() })
            .run(link, 0, &mut Sleepy(Some(Duration::from_millis(1000))), &quiet)
            .await
            .unwrap()
    };
    let receive = async {
        let link = server.accept_bulk(1).await.unwrap();
        Incoming::with_limits(IncomingLimits { no_progress, ..IncomingLimits::default() })
            .run(link, &mut sink, &quiet)
            .await
            .unwrap()
    };
    assert_eq!(tokio::join!(send, receive).1.raw_bytes, 7);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sender_that_lost_the_last_acknowledgement_is_told_again() {
    let pair = Pair::new();
    let (client, server) = pair.connect().await;
    let (mut outgoing, mut incoming) = (Outgoing::new(OutgoingLimits::default()), Incoming::new());
    let (mut source, mut sink) = (Pieces::new(vec![3; 100_000], 9_000), Collect::new());
    let send = async {
        let link = client.open_bulk(1).await.unwrap();
        outgoing.run(link, 0, &mut source, &quiet).await.unwrap()
    };
    let receive = async {
        let link = server.accept_bulk(1).await.unwrap();
        incoming.run(link, &mut sink, &quiet).await.unwrap()
    };
    tokio::join!(send, receive);
    let resume = incoming.next_sequence();
    let send = async {
        let link = client.open_bulk(2).await.unwrap();
        outgoing.run(link, resume, &mut source, &quiet).await.unwrap()
    };
    let receive = async {
        let link = server.accept_bulk(2).await.unwrap();
        incoming.run(link, &mut sink, &quiet).await.unwrap()
    };
    let (sent, received) = tokio::join!(send, receive);
    assert_eq!(sent.digest, received.digest);
}

/// Fails at its second chunk.
struct Broken(u32);

#[async_trait::async_trait]
impl flocker_transport::ChunkSource for Broken {
    async fn next(&mut self) -> Result<Option<bytes::Bytes>, flocker_transport::BoxError> {
        self.0 += 1;
        if self.0 > 1 {
            return Err(DiskFull.into());
        }
        Ok(Some(bytes::Bytes::from(vec![1; 200_000])))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_fails_ends_both_sides() {
    let pair = Pair::new();
    let (client, server) = pair.connect().await;
    let mut sink = Collect::new();
    // Accepted before it begins: a reset may overtake the stream's head.
    let (outbound, inbound) = (client.open_bulk(1).await.unwrap(), server.accept_bulk(1).await.unwrap());
    let send =
        async { Outgoing::new(OutgoingLimits::default()).run(outbound, 0, &mut Broken(0), &quiet).await.unwrap_err() };
    let receive = async { Incoming::new().run(inbound, &mut sink, &quiet).await.unwrap_err() };
    let (sent, received) = tokio::join!(send, receive);
    assert!(matches!(sent, BulkError::Source(_)), "{sent:?}");
    let BulkError::Interrupted(error) = received else { panic!("{received:?}") };
    assert!(matches!(error.kind, ErrorKind::StreamReset(CloseCode::Failed)), "{error:?}");
    assert!(!error.kind.is_transient());
}
