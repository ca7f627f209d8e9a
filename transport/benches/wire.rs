//! What the bulk pipeline makes of a connection: its throughput over loopback beside that of a bare QUIC stream with the same parameters,
//! and of TLS over TCP.
//!
//! `cargo bench -p flocker-transport --bench wire`; `FLOCKER_BENCH_MIB` and `FLOCKER_BENCH_RUNS` set how much and how often.
//! The data does not compress and is the same; the pipeline hashes it, too, on both sides. The contenders take turns; medians
//! are compared.
#![allow(clippy::unwrap_used)]

#[path = "../tests/common/mod.rs"]
mod common;

use std::{net::Ipv4Addr, sync::Arc, time::Instant};

use async_trait::async_trait;
use bytes::Bytes;
use common::*;
use flocker_transport::{
    BoxError, ChunkSink, ChunkSource, Incoming, IncomingLimits, Integrity, Limits, Outgoing, OutgoingLimits, Socket,
};
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rand::{RngCore, SeedableRng, rngs::StdRng};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinSet,
};
use tokio_rustls::{TlsAcceptor, TlsConnector};

const CHUNK: usize = 256 * 1024;
const SERVER: &str = "localhost";

/// Some chunks again and again.
#[derive(Clone)]
struct Repeat {
    chunks: Arc<[Bytes]>,
    left: usize,
}

impl Repeat {
    fn of(mebibytes: usize) -> Self {
        let mut data = vec![0; 64 * CHUNK];
        StdRng::seed_from_u64(1).fill_bytes(&mut data);
        Self { chunks: data.chunks(CHUNK).map(Bytes::copy_from_slice).collect(), left: mebibytes * 4 }
    }
}

impl Iterator for Repeat {
    type Item = Bytes;

    fn next(&mut self) -> Option<Bytes> {
        self.left = self.left.checked_sub(1)?;
        Some(self.chunks[self.left % self.chunks.len()].clone())
    }
}

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

/// A certificate that both other contenders use.
struct Tls {
    server: rustls::ServerConfig,
    client: rustls::ClientConfig,
}

impl Tls {
    fn new() -> Self {
        let made = rcgen::generate_simple_self_signed(vec![SERVER.to_owned()]).unwrap();
        let certificate: CertificateDer<'static> = made.cert.der().clone();
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(made.signing_key.serialize_der()));
        let mut roots = rustls::RootCertStore::empty();
        roots.add(certificate.clone()).unwrap();
        let server = rustls::ServerConfig::builder_with_protocol_versions(&[&rustls::version::TLS13]);
        let client = rustls::ClientConfig::builder_with_protocol_versions(&[&rustls::version::TLS13]);
        Self {
            server: server.with_no_client_auth().with_single_cert(vec![certificate], key).unwrap(),
            client: client.with_root_certificates(roots).with_no_client_auth(),
        }
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

async fn by_quic(data: Repeat) -> f64 {
    let tls = Tls::new();
    let transport = Arc::new(Limits::default().transport());
    let mut server = quinn::ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(tls.server).unwrap()));
    server.transport_config(transport.clone());
    let mut client = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls.client).unwrap()));
    client.transport_config(transport);
    let bind = |server| {
        let (udp, runtime, config) = Socket::bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap().into_parts();
        quinn::Endpoint::new_with_abstract_socket(config, server, udp, runtime).unwrap()
    };
    let (listening, calling) = (bind(Some(server)), bind(None));
    let address = listening.local_addr().unwrap();
    let mut receiver = JoinSet::new();
    receiver.spawn(async move {
        let connection = listening.accept().await.unwrap().await.unwrap();
        let (mut send, mut recv) = connection.accept_bi().await.unwrap();
        while recv.read_chunk(CHUNK, true).await.unwrap().is_some() {}
        send.write_all(b"x").await.unwrap();
        connection.closed().await;
    });
    let connection = calling.connect_with(client, address, SERVER).unwrap().await.unwrap();
    let begin = Instant::now();
    let (mut send, mut recv) = connection.open_bi().await.unwrap();
    for chunk in data {
        send.write_chunk(chunk).await.unwrap();
    }
    send.finish().unwrap();
    recv.read_exact(&mut [0]).await.unwrap();
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
