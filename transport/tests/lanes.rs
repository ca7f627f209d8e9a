//! One delta over several connections.
#![allow(clippy::unwrap_used)]

mod common;

use std::sync::atomic::{AtomicBool, Ordering};

use common::*;
use flocker_transport::{BulkError, BulkStream, CloseCode, Connection, Incoming, Outgoing, OutgoingLimits, Progress};
use tokio::sync::mpsc;

const LANES: usize = 3;

/// Connections of two members, and a stream over each.
struct Several {
    clients: Vec<Connection>,
    servers: Vec<Connection>,
}

impl Several {
    async fn connect(pair: &Pair) -> Self {
        let mut several = Self { clients: Vec::new(), servers: Vec::new() };
        for _ in 0..LANES {
            let (client, server) = pair.connect().await;
            several.clients.push(client);
            several.servers.push(server);
        }
        several
    }

    /// Returns the first stream of each side, and where the others join from.
    async fn open(&self) -> [(BulkStream, mpsc::Receiver<BulkStream>); 2] {
        let [(to_client, of_client), (to_server, of_server)] = [mpsc::channel(LANES), mpsc::channel(LANES)];
        let mut first = None;
        for (client, server) in self.clients.iter().zip(&self.servers) {
            let (sent, received) = tokio::join!(client.open_bulk(1), server.accept_bulk(1));
            let both = (sent.unwrap(), received.unwrap());
            match &first {
                None => first = Some(both),
                Some(_) => {
                    to_client.send(both.0).await.unwrap();
                    to_server.send(both.1).await.unwrap();
                }
            }
        }
        let (sent, received) = first.unwrap();
        [(sent, of_client), (received, of_server)]
    }
}

fn quiet(_: Progress) {}

#[tokio::test(flavor = "multi_thread")]
async fn several_connections_carry_one_delta() {
    let (pair, data) = (Pair::new(), mixed_data(1, 40_000_000));
    let several = Several::connect(&pair).await;
    let [(outbound, mut join_sender), (inbound, mut join_receiver)] = several.open().await;
    let (mut source, mut sink) = (Pieces::new(data.clone(), 100_000), Collect::new());
    let send = async {
        let mut outgoing = Outgoing::new(OutgoingLimits::default());
        outgoing.run_in_lanes(outbound, &mut join_sender, 0, &mut source, &quiet).await.unwrap()
    };
    let receive = async { Incoming::new().run_in_lanes(inbound, &mut join_receiver, &mut sink, &quiet).await.unwrap() };
    let (sent, received) = tokio::time::timeout(DEADLINE, async { tokio::join!(send, receive) }).await.unwrap();

    assert_eq!((sent.digest, sent.raw_bytes), (received.digest, received.raw_bytes));
    assert!(*sink.data.lock().unwrap() == data);
    // Each has its part; and together they carried nothing twice.
    let carried: Vec<u64> = several.servers.iter().map(|connection| connection.wire_bytes().1).collect();
    assert!(carried.iter().all(|bytes| *bytes > sent.wire_bytes / 20), "{carried:?} of {}", sent.wire_bytes);
    assert!(carried.iter().sum::<u64>() < sent.wire_bytes * 11 / 10, "{carried:?} of {}", sent.wire_bytes);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lane_that_is_lost_interrupts_and_what_was_consumed_is_not_sent_again() {
    // Before a cut 4 MB are consumed, and what the sender may have on its way, 8 MiB: some is left for the last one.
    let (pair, data) = (Pair::new(), mixed_data(2, 60_000_000));
    let (mut source, mut sink) = (Pieces::new(data.clone(), 100_000), Collect::new());
    let (mut outgoing, mut incoming) = (Outgoing::new(OutgoingLimits::default()), Incoming::new());
    for lost in 0..LANES {
        let several = Several::connect(&pair).await;
        let [(outbound, mut join_sender), (inbound, mut join_receiver)] = several.open().await;
        let (before, is_cut) = (incoming.progress().raw_bytes, AtomicBool::new(false));
        let cut = |progress: Progress| {
            if progress.raw_bytes > before + 4_000_000 && !is_cut.swap(true, Ordering::Relaxed) {
                several.clients[lost].close(CloseCode::Failed, "cut");
            }
        };
        let resume = incoming.next_sequence();
        let send = outgoing.run_in_lanes(outbound, &mut join_sender, resume, &mut source, &cut);
        let receive = incoming.run_in_lanes(inbound, &mut join_receiver, &mut sink, &quiet);
        let both = tokio::time::timeout(DEADLINE, async { tokio::join!(send, receive) }).await.unwrap();
        for error in [both.0.unwrap_err(), both.1.unwrap_err()] {
            assert!(matches!(error, BulkError::Interrupted(_)), "lane {lost}: {error:?}");
        }
        assert!(incoming.progress().raw_bytes > before, "lane {lost}");
    }
    let (client, server) = pair.connect().await;
    let (outbound, inbound) = tokio::join!(client.open_bulk(1), server.accept_bulk(1));
    let resume = incoming.next_sequence();
    let send = outgoing.run(outbound.unwrap(), resume, &mut source, &quiet);
    let receive = incoming.run(inbound.unwrap(), &mut sink, &quiet);
    let (sent, received) = tokio::time::timeout(DEADLINE, async { tokio::join!(send, receive) }).await.unwrap();
    assert_eq!(sent.unwrap().digest, received.unwrap().digest);
    assert!(*sink.data.lock().unwrap() == data);
}
