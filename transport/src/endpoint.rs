//! One UDP socket: it connects to peers and receives them.
//!
//! Owns the socket, QUIC's parameters and this node's credentials. Which protocols are served is [`crate::router`]'s
//! business; who is let in, [`crate::tls`]'s.

use std::{
    net::SocketAddr,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use flocker_certs::{Fingerprint, Identity, NodeId, PeerIdentity};
use quinn::{IdleTimeout, MtuDiscoveryConfig, TransportConfig, VarInt, crypto::rustls as quic};
use tokio::time::timeout;

use crate::{
    close::CloseCode,
    congestion::PatientConfig,
    connection::Connection,
    error::{Error, ErrorKind, PeerFault, Result},
    reset,
    socket::{DATAGRAM_LIMIT, Socket},
    tls::{self, Credentials, TLS_NAME, Verdict},
};

/// Bytes on the way before the first acknowledgement, some 45 ordinary datagrams. With quinn's own (14,720, as RFC 9002, section
/// 7.2, has it) the first large probe for the MTU fills it, and quinn sends no CONNECTION_CLOSE while it is full, so that a
/// refusal would be lost.
const INITIAL_WINDOW: u64 = 65_000;
/// How long `shutdown` waits until the peers know.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(2);

/// What the node knows about a peer beyond its certificate: is it the node known by that name, is it revoked? Called within the
/// handshake, on both sides; must not block.
pub type PeerCheck = Arc<dyn Fn(&PeerIdentity) -> std::result::Result<(), PeerFault> + Send + Sync>;

/// What an endpoint allows itself and its peers.
#[derive(Debug, Clone)]
pub struct Limits {
    /// How long a connection lives without a packet.
    pub idle: Duration,
    /// How often a silent connection sends one; a silent side learns of the peer's restart by it.
    pub keep_alive: Duration,
    /// How long `connect` and the acceptance of a connection may take.
    pub connect: Duration,
    /// Bytes a peer may send ahead on one stream.
    pub stream_window: u32,
    /// Bytes a peer may send ahead on one connection.
    pub connection_window: u32,
    /// Bytes this side keeps for one connection until the peer has them.
    pub send_window: u32,
    /// Streams a peer may have open at once on one connection.
    pub streams: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            idle: Duration::from_secs(20),
            keep_alive: Duration::from_secs(2),
            connect: Duration::from_secs(10),
            stream_window: 4 * 1024 * 1024,
            connection_window: 8 * 1024 * 1024,
            send_window: 4 * 1024 * 1024,
            streams: 32,
        }
    }
}

impl Limits {
    /// Returns QUIC's parameters for these limits.
    pub fn transport(&self) -> TransportConfig {
        let mut discovery = MtuDiscoveryConfig::default();
        discovery.upper_bound(DATAGRAM_LIMIT);
        let mut config = TransportConfig::default();
        config
            .congestion_controller_factory(Arc::new(PatientConfig::new(INITIAL_WINDOW)))
            .max_idle_timeout(Some(IdleTimeout::try_from(self.idle).unwrap_or_else(|_| VarInt::MAX.into())))
            .keep_alive_interval(Some(self.keep_alive))
            .stream_receive_window(VarInt::from_u32(self.stream_window))
            .receive_window(VarInt::from_u32(self.connection_window))
            .send_window(u64::from(self.send_window))
            .max_concurrent_bidi_streams(VarInt::from_u32(self.streams))
            .max_concurrent_uni_streams(VarInt::from_u32(1))
            .datagram_receive_buffer_size(None)
            .mtu_discovery_config(Some(discovery));
        config
    }
}

/// A bound UDP socket that speaks QUIC in both roles; clones are the same socket.
#[derive(Clone)]
pub struct Endpoint {
    quic: quinn::Endpoint,
    shared: Arc<Shared>,
}

struct Shared {
    credentials: RwLock<Arc<Credentials>>,
    check: RwLock<Option<PeerCheck>>,
    transport: Arc<TransportConfig>,
    limits: Limits,
}

impl Endpoint {
    /// Binds the address. Must be called within a tokio runtime.
    pub fn bind(addr: SocketAddr, identity: Arc<Identity>, limits: Limits) -> Result<Self> {
        let socket = Socket::bind(addr).map_err(|error| Error::new("listen on", addr, ErrorKind::from_io(error)))?;
        Self::on(socket, identity, limits)
    }

    /// Uses a socket that is bound already. Must be called within a tokio runtime.
    pub fn on(socket: Socket, identity: Arc<Identity>, limits: Limits) -> Result<Self> {
        let Socket { udp, runtime, mut config } = socket;
        let addr = udp.local_addr().map_or_else(|_| "a socket".to_owned(), |addr| addr.to_string());
        let failed = |kind| Error::new("listen on", &addr, kind);
        let credentials = Credentials::new(&identity).map_err(failed)?;
        reset::outlive_restarts(&mut config, &identity).map_err(failed)?;
        let transport = Arc::new(limits.transport());
        let initial = server_config(&credentials, Vec::new(), None, Verdict::default(), &transport).map_err(failed)?;
        let quic = quinn::Endpoint::new_with_abstract_socket(config, Some(initial), udp, runtime)
            .map_err(|error| failed(ErrorKind::from_io(error)))?;
        let shared =
            Shared { credentials: RwLock::new(Arc::new(credentials)), check: RwLock::new(None), transport, limits };
        Ok(Self { quic, shared: Arc::new(shared) })
    }

    /// The bound address, with the port the system chose where 0 was asked for.
    pub fn local_addr(&self) -> Result<SocketAddr> {
        self.quic.local_addr().map_err(|error| Error::new("ask for", "the local address", ErrorKind::from_io(error)))
    }

    /// Uses another certificate (a renewed one) for connections from now on.
    pub fn set_identity(&self, identity: Arc<Identity>) -> Result<()> {
        let credentials =
            Credentials::new(&identity).map_err(|kind| Error::new("use", "the renewed certificate", kind))?;
        *self.shared.credentials.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(credentials);
        Ok(())
    }

    /// Asks `check` about every peer from now on, in both directions.
    pub fn set_peer_check(&self, check: PeerCheck) {
        *self.shared.check.write().unwrap_or_else(PoisonError::into_inner) = Some(check);
    }

    /// Connects to a member. With `expected`, only that node will do. Returns once the peer has accepted this node, too.
    pub async fn connect(&self, addr: SocketAddr, expected: Option<NodeId>, alpn: &[u8]) -> Result<Connection> {
        let verdict = Verdict::default();
        let config = self.shared.credentials().client(alpn, expected, self.shared.check(), verdict.clone());
        self.establish(addr, config, verdict).await
    }

    /// Connects without a certificate to a member of the cluster whose authority has this fingerprint.
    pub async fn connect_pinned(&self, addr: SocketAddr, pin: Fingerprint, alpn: &[u8]) -> Result<Connection> {
        connect_pinned_by(&self.quic, &self.shared.transport, self.shared.limits.connect, addr, pin, alpn).await
    }

    /// Waits for the next connection to arrive; none after `shutdown`. Cancel-safe.
    pub async fn accept(&self, protocols: &[Protocol]) -> Option<Arrival> {
        let incoming = self.quic.accept().await?;
        Some(Arrival { incoming, endpoint: self.clone(), protocols: protocols.to_vec() })
    }

    /// Closes all connections with this code, and waits a moment until the peers know.
    pub async fn shutdown(&self, code: CloseCode) {
        self.quic.close(code.varint(), b"");
        let _ = timeout(SHUTDOWN_GRACE, self.quic.wait_idle()).await;
    }

    async fn establish(
        &self,
        addr: SocketAddr,
        config: std::result::Result<rustls::ClientConfig, ErrorKind>,
        verdict: Verdict,
    ) -> Result<Connection> {
        let config = config.map_err(|kind| Error::new("connect to", addr, kind))?;
        dial(&self.quic, &self.shared.transport, self.shared.limits.connect, addr, config, verdict).await
    }
}

/// Connects from a socket of its own, without any identity: what `flocker join` does on a host that has none yet.
pub async fn connect_newcomer(addr: SocketAddr, pin: Fingerprint, alpn: &[u8], limits: &Limits) -> Result<Connection> {
    let local: SocketAddr = if addr.is_ipv6() {
        (std::net::Ipv6Addr::UNSPECIFIED, 0).into()
    } else {
        (std::net::Ipv4Addr::UNSPECIFIED, 0).into()
    };
    let quic =
        quinn::Endpoint::client(local).map_err(|error| Error::new("connect to", addr, ErrorKind::from_io(error)))?;
    connect_pinned_by(&quic, &Arc::new(limits.transport()), limits.connect, addr, pin, alpn).await
}

async fn connect_pinned_by(
    quic: &quinn::Endpoint,
    transport: &Arc<TransportConfig>,
    patience: Duration,
    addr: SocketAddr,
    pin: Fingerprint,
    alpn: &[u8],
) -> Result<Connection> {
    let verdict = Verdict::default();
    let config = tls::pinned_client(alpn, pin, verdict.clone()).map_err(|kind| Error::new("connect to", addr, kind))?;
    dial(quic, transport, patience, addr, config, verdict).await
}

async fn dial(
    quic: &quinn::Endpoint,
    transport: &Arc<TransportConfig>,
    patience: Duration,
    addr: SocketAddr,
    config: rustls::ClientConfig,
    verdict: Verdict,
) -> Result<Connection> {
    let failed = |kind| Error::new("connect to", addr, kind);
    let crypto = quic::QuicClientConfig::try_from(config).map_err(|error| failed(ErrorKind::Tls(error.to_string())))?;
    let mut config = quinn::ClientConfig::new(Arc::new(crypto));
    config.transport_config(transport.clone());
    let connecting = quic.connect_with(config, addr, TLS_NAME).map_err(|error| {
        failed(match error {
            quinn::ConnectError::EndpointStopping => ErrorKind::ClosedHere,
            quinn::ConnectError::InvalidRemoteAddress(_) => ErrorKind::Unreachable,
            other => ErrorKind::Tls(other.to_string()),
        })
    })?;
    let connected = timeout(patience, async {
        let quic = connecting.await.map_err(|error| {
            failed(match ErrorKind::from_connection(error) {
                ErrorKind::ConnectionLost => ErrorKind::Unreachable,
                kind @ ErrorKind::PeerRejected { .. } => verdict.or(kind),
                kind => kind,
            })
        })?;
        let connection = Connection::new(quic)?;
        connection.await_welcome().await?;
        Ok(connection)
    });
    let connected = connected.await.unwrap_or_else(|_| Err(failed(ErrorKind::Unreachable)));
    connected.inspect_err(|error| warn_of_rejection(error, "connecting"))
}

/// A protocol that is served, and to whom.
#[derive(Debug, Clone)]
pub struct Protocol {
    /// Its ALPN.
    pub alpn: Vec<u8>,
    /// Who may speak it.
    pub access: Access,
}

/// Who may speak a protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Nodes with a certificate of the cluster.
    Members,
    /// Newcomers without a certificate, too.
    Anyone,
}

/// A connection that has arrived and not been let in yet. Dropping it refuses it.
pub struct Arrival {
    incoming: quinn::Incoming,
    endpoint: Endpoint,
    protocols: Vec<Protocol>,
}

impl Arrival {
    /// Where its packets come from; not verified.
    pub fn remote_addr(&self) -> SocketAddr {
        self.incoming.remote_address()
    }

    /// Sends it away: the client sees [`CloseCode::Busy`].
    pub fn refuse(self) {
        self.incoming.refuse();
    }

    /// Does the handshake, within the endpoint's time limit. Who has no certificate and asks for a protocol of members is sent away
    /// with [`CloseCode::AnonymousNotAllowed`] before a stream is read.
    pub async fn establish(self) -> Result<Connection> {
        let addr = self.remote_addr();
        let patience = self.endpoint.shared.limits.connect;
        let established = timeout(patience, self.shake_hands()).await;
        let established =
            established.unwrap_or_else(|_| Err(Error::new("accept", addr, ErrorKind::TimedOut(patience))));
        established.inspect_err(|error| warn_of_rejection(error, "accepting"))
    }

    async fn shake_hands(self) -> Result<Connection> {
        let addr = self.incoming.remote_address();
        let failed = |kind| Error::new("accept", addr, kind);
        let (shared, verdict) = (&self.endpoint.shared, Verdict::default());
        let alpns = self.protocols.iter().map(|protocol| protocol.alpn.clone()).collect();
        let config = server_config(&shared.credentials(), alpns, shared.check(), verdict.clone(), &shared.transport)
            .map_err(failed)?;
        let refused = |error| match ErrorKind::from_connection(error) {
            kind @ ErrorKind::PeerRejected { .. } => failed(verdict.or(kind)),
            kind => failed(kind),
        };
        let quic = self.incoming.accept_with(Arc::new(config)).map_err(refused)?.await.map_err(refused)?;
        let connection = Connection::new(quic)?;
        let access =
            self.protocols.iter().find(|protocol| protocol.alpn == connection.alpn()).map(|found| found.access);
        match (access, connection.peer()) {
            (Some(Access::Anyone), _) | (Some(Access::Members), Some(_)) => {}
            (Some(Access::Members), None) => {
                connection.close(CloseCode::AnonymousNotAllowed, "");
                tracing::warn!(peer = %addr, "sent a client without a certificate away");
                return Err(failed(ErrorKind::Protocol("it has no certificate".to_owned())));
            }
            (None, _) => {
                connection.close(CloseCode::Protocol, "");
                return Err(failed(ErrorKind::NoCommonProtocol));
            }
        }
        connection.welcome().await?;
        Ok(connection)
    }
}

impl Shared {
    fn credentials(&self) -> Arc<Credentials> {
        self.credentials.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn check(&self) -> Option<PeerCheck> {
        self.check.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl std::fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Endpoint").field("local_addr", &self.quic.local_addr().ok()).finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Arrival {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Arrival").field("remote_addr", &self.remote_addr()).finish_non_exhaustive()
    }
}

fn warn_of_rejection(error: &Error, what: &'static str) {
    match &error.kind {
        kind @ ErrorKind::PeerRejected { .. } => {
            tracing::warn!(peer = %error.object, reason = %kind, "{what}: rejected a peer");
        }
        kind @ ErrorKind::RejectedByPeer(_) => {
            tracing::warn!(peer = %error.object, reason = %kind, "{what}: rejected by a peer");
        }
        kind => tracing::debug!(peer = %error.object, reason = %kind, "{what} failed"),
    }
}

fn server_config(
    credentials: &Credentials,
    alpns: Vec<Vec<u8>>,
    check: Option<PeerCheck>,
    verdict: Verdict,
    transport: &Arc<TransportConfig>,
) -> std::result::Result<quinn::ServerConfig, ErrorKind> {
    let config = credentials.server(alpns, check, verdict)?;
    let crypto = quic::QuicServerConfig::try_from(config).map_err(|error| ErrorKind::Tls(error.to_string()))?;
    let mut config = quinn::ServerConfig::with_crypto(Arc::new(crypto));
    config.transport_config(transport.clone());
    Ok(config)
}
