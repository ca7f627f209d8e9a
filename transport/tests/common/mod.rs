//! A cluster in a test: an authority, its nodes, endpoints on loopback and data.
#![allow(dead_code, clippy::unwrap_used, missing_docs, unreachable_pub)]

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::{Arc, Mutex},
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use flocker_certs::{Authority, ClusterId, Identity, NewKey};
use flocker_transport::{
    ALPN, Access, BoxError, ChunkSink, ChunkSource, Connection, Endpoint, Limits, Protocol, Result,
};
use jiff::Timestamp;
use rand::{Rng, RngCore, SeedableRng, rngs::StdRng};
use uuid::Uuid;

pub const DAY: Duration = Duration::from_secs(24 * 60 * 60);
pub const DEADLINE: Duration = Duration::from_secs(30);

pub fn authority() -> Authority {
    Authority::create(ClusterId(Uuid::now_v7()), Timestamp::now()).unwrap()
}

pub fn member(authority: &Authority, name: &str) -> Arc<Identity> {
    member_at(authority, name, Timestamp::now())
}

pub fn member_at(authority: &Authority, name: &str, issued: Timestamp) -> Arc<Identity> {
    let key = NewKey::generate().unwrap();
    let issued = authority.issue(&key.csr_der().unwrap(), name, issued, DAY).unwrap();
    Arc::new(Identity::new(key, issued.certificate, authority.certificate_der().to_vec()).unwrap())
}

pub fn endpoint(identity: &Arc<Identity>) -> Endpoint {
    endpoint_with(identity, Limits::default())
}

pub fn endpoint_with(identity: &Arc<Identity>, limits: Limits) -> Endpoint {
    Endpoint::bind((Ipv4Addr::LOCALHOST, 0).into(), identity.clone(), limits).unwrap()
}

pub fn addr(endpoint: &Endpoint) -> SocketAddr {
    endpoint.local_addr().unwrap()
}

pub fn members_only() -> Vec<Protocol> {
    vec![Protocol { alpn: ALPN.to_vec(), access: Access::Members }]
}

/// Both ends' results of one attempt to connect.
pub async fn attempt(client: &Endpoint, server: &Endpoint) -> (Result<Connection>, Result<Connection>) {
    let accept = async { server.accept(&members_only()).await.unwrap().establish().await };
    let both = async { tokio::join!(client.connect(addr(server), None, ALPN), accept) };
    tokio::time::timeout(DEADLINE, both).await.unwrap()
}

/// Two members and a connection between them, again and again.
pub struct Pair {
    pub client: Endpoint,
    pub server: Endpoint,
}

impl Pair {
    pub fn new() -> Self {
        let authority = authority();
        let (a, b) = (member(&authority, "host-a"), member(&authority, "host-b"));
        Self { client: endpoint(&a), server: endpoint(&b) }
    }

    pub async fn connect(&self) -> (Connection, Connection) {
        let (client, server) = attempt(&self.client, &self.server).await;
        (client.unwrap(), server.unwrap())
    }
}

/// Half of it shrinks well, half does not.
pub fn mixed_data(seed: u64, length: usize) -> Vec<u8> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut data = vec![0; length];
    for block in data.chunks_mut(100_000) {
        if rng.random_bool(0.5) {
            rng.fill_bytes(block);
        } else {
            let words = [b"insert ", b"update ", b"commit "];
            for piece in block.chunks_mut(7) {
                piece.copy_from_slice(&words[rng.random_range(0..3)][..piece.len()]);
            }
        }
    }
    data
}

pub struct Pieces {
    pub data: Bytes,
    pub at: usize,
    pub size: usize,
}

impl Pieces {
    pub fn new(data: Vec<u8>, size: usize) -> Self {
        Self { data: data.into(), at: 0, size }
    }
}

#[async_trait]
impl ChunkSource for Pieces {
    async fn next(&mut self) -> std::result::Result<Option<Bytes>, BoxError> {
        let end = (self.at + self.size).min(self.data.len());
        let piece = self.data.slice(self.at..end);
        self.at = end;
        Ok((!piece.is_empty()).then_some(piece))
    }
}

/// Keeps what it gets; waits `pause` before each write, fails once it has `capacity`.
pub struct Collect {
    pub data: Arc<Mutex<Vec<u8>>>,
    pub pause: Duration,
    pub capacity: usize,
}

impl Collect {
    pub fn new() -> Self {
        Self { data: Arc::default(), pause: Duration::ZERO, capacity: usize::MAX }
    }
}

#[derive(Debug, PartialEq, thiserror::Error)]
#[error("the disk is full")]
pub struct DiskFull;

#[async_trait]
impl ChunkSink for Collect {
    async fn write(&mut self, bytes: Bytes) -> std::result::Result<(), BoxError> {
        if !self.pause.is_zero() {
            tokio::time::sleep(self.pause).await;
        }
        let mut data = self.data.lock().unwrap();
        if data.len() + bytes.len() > self.capacity {
            return Err(DiskFull.into());
        }
        data.extend_from_slice(&bytes);
        Ok(())
    }
}
