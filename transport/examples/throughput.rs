//! Measures the bulk pipeline over loopback, with QUIC and TLS: `cargo run --release -p flocker-transport --example throughput`.
#![allow(clippy::unwrap_used)]

#[path = "../tests/common/mod.rs"]
mod common;

use std::time::Instant;

use async_trait::async_trait;
use bytes::Bytes;
use common::*;
use flocker_transport::{BoxError, ChunkSink, ChunkSource, Incoming, Outgoing, OutgoingLimits};
use rand::{RngCore, SeedableRng, rngs::StdRng};
use tokio::task::JoinSet;

const CHUNK: usize = 256 * 1024;

/// The same chunk again and again.
struct Repeat {
    chunks: Vec<Bytes>,
    left: usize,
}

#[async_trait]
impl ChunkSource for Repeat {
    async fn next(&mut self) -> Result<Option<Bytes>, BoxError> {
        if self.left == 0 {
            return Ok(None);
        }
        self.left -= 1;
        Ok(Some(self.chunks[self.left % self.chunks.len()].clone()))
    }
}

struct Discard;

#[async_trait]
impl ChunkSink for Discard {
    async fn write(&mut self, _: Bytes) -> Result<(), BoxError> {
        Ok(())
    }
}

#[tokio::main]
async fn main() {
    let mib: usize = std::env::args().nth(1).map_or(1024, |text| text.parse().unwrap());
    for what in ["incompressible", "mixed", "text"] {
        let data = match what {
            "incompressible" => {
                let mut data = vec![0; 64 * CHUNK];
                StdRng::seed_from_u64(1).fill_bytes(&mut data);
                data
            }
            "mixed" => mixed_data(1, 64 * CHUNK),
            _ => (0..).flat_map(|n: u64| format!("{n}: a row of {}\n", n * n).into_bytes()).take(64 * CHUNK).collect(),
        };
        let chunks = data.chunks(CHUNK).map(Bytes::copy_from_slice).collect();
        let mut source = Repeat { chunks, left: mib * 4 };
        let pair = Pair::new();
        let (client, server) = pair.connect().await;
        let begin = Instant::now();
        let send = async {
            let link = client.open_bulk(1).await.unwrap();
            Outgoing::new(OutgoingLimits::default()).run(link, 0, &mut source, &|_| ()).await.unwrap()
        };
        let mut receiver = JoinSet::new();
        receiver.spawn(async move {
            let link = server.accept_bulk(1).await.unwrap();
            Incoming::new().run(link, &mut Discard, &|_| ()).await.unwrap();
            server
        });
        let (sent, _server) = tokio::join!(send, receiver.join_next());
        let seconds = begin.elapsed().as_secs_f64();
        println!(
            "{what:>15}: {:>7.1} MB/s raw, {:>7.1} MB/s on the wire, ratio {:.2}",
            sent.raw_bytes as f64 / seconds / 1e6,
            sent.wire_bytes as f64 / seconds / 1e6,
            sent.raw_bytes as f64 / sent.wire_bytes as f64
        );
    }
}
