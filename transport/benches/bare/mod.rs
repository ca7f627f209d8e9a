//! A bare QUIC stream over loopback, with the parameters of the pipeline's connections, and what it carries.

use std::{net::Ipv4Addr, sync::Arc, time::Instant};

use bytes::Bytes;
use flocker_transport::{Limits, Socket};
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rand::{RngCore, SeedableRng, rngs::StdRng};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::task::JoinSet;

pub(crate) const CHUNK: usize = 256 * 1024;
pub(crate) const SERVER: &str = "localhost";

/// Some chunks again and again.
#[derive(Clone)]
pub(crate) struct Repeat {
    pub(crate) chunks: Arc<[Bytes]>,
    pub(crate) left: usize,
}

impl Repeat {
    /// As many MiB of noise.
    pub(crate) fn of(mebibytes: usize) -> Self {
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

/// A certificate that both other contenders use.
pub(crate) struct Tls {
    pub(crate) server: rustls::ServerConfig,
    pub(crate) client: rustls::ClientConfig,
}

impl Tls {
    pub(crate) fn new() -> Self {
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

/// Sends it over a new connection; returns how many seconds that takes.
pub(crate) async fn by_quic(data: Repeat) -> f64 {
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
