//! What the bulk pipeline makes of a connection: its throughput over loopback beside that of a bare QUIC stream with the same parameters,
//! and of TLS over TCP.
//!
//! `cargo bench -p flocker-transport --bench wire`; `FLOCKER_BENCH_MIB` and `FLOCKER_BENCH_RUNS` set how much and how often.
//! The data does not compress and is the same; the pipeline hashes it, too, on both sides. The contenders take turns; medians
//! are compared.
#![allow(clippy::unwrap_used)]

mod bare;
#[path = "../tests/common/mod.rs"]
mod common;

use std::{net::Ipv4Addr, sync::Arc, time::Instant};

use async_trait::async_trait;
use bare::*;
use bytes::Bytes;
use common::*;
use flocker_transport::{
    BoxError, ChunkSink, ChunkSource, Incoming, IncomingLimits, Integrity, Outgoing, OutgoingLimits,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinSet,
};
use tokio_rustls::{TlsAcceptor, TlsConnector};

struct Source(Repeat);

#[async_trait]
impl ChunkSource for Source {
    async fn next(&mut self) -> Result<Option<Bytes>, BoxError> {
        Ok(self.0.next())
    }
}

struct Discard;

#[async_trait]
impl ChunkSink for Discard {
    async fn write(&mut self, _: Bytes) -> Result<(), BoxError> {
        Ok(())
    }
}

/// Who carries the data, as the table calls them and as `FLOCKER_BENCH_CONTENDERS` does.
const CONTENDERS: [(&str, &str); 5] = [
    ("bulk", "bulk pipeline, hashed by it"),
    ("content", "bulk pipeline, content with digests of its own"),
    ("quic", "bare QUIC stream"),
    ("lanes", "two bare QUIC connections at once, half of the data on each"),
    ("tls", "TLS over TCP"),
];
/// The one that the others are compared with.
const BARE: &str = "quic";

#[tokio::main]
async fn main() {
    let text = |name: &str| std::env::var(name).ok();
    let number = |name: &str, otherwise| text(name).and_then(|text| text.parse().ok()).unwrap_or(otherwise);
    let (mebibytes, runs) = (number("FLOCKER_BENCH_MIB", 512), number("FLOCKER_BENCH_RUNS", 5));
    let wanted = text("FLOCKER_BENCH_CONTENDERS");
    let contenders: Vec<_> = CONTENDERS
        .into_iter()
        .filter(|(name, _)| wanted.as_ref().is_none_or(|wanted| wanted.split(',').any(|it| it == *name)))
        .collect();
    rustls::crypto::aws_lc_rs::default_provider().install_default().unwrap();
    let data = Repeat::of(mebibytes);
    let mut times = vec![Vec::new(); contenders.len()];
    for _ in 0..runs {
        for ((name, _), times) in contenders.iter().zip(&mut times) {
            times.push(match *name {
                "bulk" => by_bulk(data.clone(), Integrity::Pipeline).await,
                "content" => by_bulk(data.clone(), Integrity::Content).await,
                "quic" => by_quic(data.clone()).await,
                "lanes" => {
                    let half = Repeat { left: data.left / 2, ..data.clone() };
                    let (mut lanes, begin) = (JoinSet::new(), Instant::now());
                    (0..2).for_each(|_| drop(lanes.spawn(by_quic(half.clone()))));
                    lanes.join_all().await;
                    begin.elapsed().as_secs_f64()
                }
                _ => by_tls(data.clone()).await,
            });
        }
    }
    for times in &mut times {
        times.sort_by(f64::total_cmp);
    }
    println!("{mebibytes} MiB that do not compress, {runs} runs in turn, over loopback.\n");
    println!("| contender | median MB/s | spread MB/s | of the bare stream's |");
    println!("|---|---:|---:|---:|");
    let median = |times: &Vec<f64>| times[times.len() / 2];
    let bare = contenders.iter().position(|(name, _)| *name == BARE).map(|at| median(&times[at]));
    let speed = |seconds: f64| (mebibytes << 20) as f64 / seconds / 1e6;
    for ((_, title), times) in contenders.iter().zip(&times) {
        let part = bare.map_or("–".to_owned(), |bare| format!("{:.0} %", 100.0 * bare / median(times)));
        let (slowest, fastest) = (speed(*times.last().unwrap()), speed(times[0]));
        println!("| {title} | {:.0} | {slowest:.0}–{fastest:.0} | {part} |", speed(median(times)));
    }
}

async fn by_bulk(data: Repeat, integrity: Integrity) -> f64 {
    let pair = Pair::new();
    let (client, server) = pair.connect().await;
    let mut receiver = JoinSet::new();
    receiver.spawn(async move {
        let link = server.accept_bulk(1).await.unwrap();
        let limits = IncomingLimits { integrity, ..IncomingLimits::default() };
        Incoming::with_limits(limits).run(link, &mut Discard, &|_| ()).await.unwrap();
        server
    });
    let begin = Instant::now();
    let link = client.open_bulk(1).await.unwrap();
    let limits = OutgoingLimits { integrity, ..OutgoingLimits::default() };
    Outgoing::new(limits).run(link, 0, &mut Source(data), &|_| ()).await.unwrap();
    begin.elapsed().as_secs_f64()
}

async fn by_tls(data: Repeat) -> f64 {
    let tls = Tls::new();
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let mut receiver = JoinSet::new();
    receiver.spawn(async move {
        let (socket, _) = listener.accept().await.unwrap();
        let mut stream = TlsAcceptor::from(Arc::new(tls.server)).accept(socket).await.unwrap();
        let mut buffer = vec![0; CHUNK];
        while stream.read(&mut buffer).await.unwrap() > 0 {}
        stream.write_all(b"x").await.unwrap();
        stream.shutdown().await.unwrap();
    });
    let socket = TcpStream::connect(address).await.unwrap();
    socket.set_nodelay(true).unwrap();
    let connector = TlsConnector::from(Arc::new(tls.client));
    let mut stream = connector.connect(SERVER.try_into().unwrap(), socket).await.unwrap();
    let begin = Instant::now();
    for chunk in data {
        stream.write_all(&chunk).await.unwrap();
    }
    stream.shutdown().await.unwrap();
    stream.read_exact(&mut [0]).await.unwrap();
    begin.elapsed().as_secs_f64()
}
