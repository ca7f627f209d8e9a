//! One connection to one peer, and its two kinds of streams.
//!
//! Owns the first bytes of a stream, which tell its kind: `1` an exchange; `2` and a u64 little-endian tag a bulk stream. One transfer
//! uses one connection, so streams are accepted in the order both sides know; another kind or tag is a protocol violation.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use flocker_certs::PeerIdentity;
use rustls::pki_types::CertificateDer;
use tokio::time::timeout;

use crate::{
    NO_PROGRESS,
    bulk::BulkStream,
    close::CloseCode,
    error::{Error, ErrorKind, Result},
    exchange::Exchange,
};

const EXCHANGE: u8 = 1;
const BULK: u8 = 2;
/// What a server says on a unidirectional stream once it has accepted the client: only then `connect` returns, so that
/// it can report a refusal of the client's certificate, which in TLS 1.3 comes after the client's handshake is done.
const WELCOME: &[u8; 4] = b"flk1";

/// A connection to a peer; clones are the same connection. When the last one is dropped, it closes.
#[derive(Debug, Clone)]
pub struct Connection {
    quic: quinn::Connection,
    peer: Option<Arc<PeerIdentity>>,
    alpn: Arc<[u8]>,
}

impl Connection {
    /// Takes over a connection whose handshake is done; the verifiers have checked the certificate.
    pub(crate) fn new(quic: quinn::Connection) -> Result<Self> {
        let certificates = quic.peer_identity().and_then(|any| any.downcast::<Vec<CertificateDer<'static>>>().ok());
        let malformed = |_| Error::new("identify", quic.remote_address(), ErrorKind::Tls("no identity".to_owned()));
        let peer = match certificates.as_deref().and_then(|chain| chain.first()) {
            Some(certificate) => Some(Arc::new(PeerIdentity::from_certificate_der(certificate).map_err(malformed)?)),
            None => None,
        };
        let alpn = quic
            .handshake_data()
            .and_then(|any| any.downcast::<quinn::crypto::rustls::HandshakeData>().ok())
            .and_then(|data| data.protocol)
            .unwrap_or_default();
        Ok(Self { quic, peer, alpn: alpn.into() })
    }

    /// The peer by its verified certificate; none for a newcomer that enrols.
    pub fn peer(&self) -> Option<PeerIdentity> {
        self.peer.as_deref().cloned()
    }

    /// Where the peer's packets come from.
    pub fn remote_addr(&self) -> SocketAddr {
        self.quic.remote_address()
    }

    /// The protocol both sides agreed on.
    pub fn alpn(&self) -> &[u8] {
        &self.alpn
    }

    /// The smoothed round-trip time.
    pub fn rtt(&self) -> Duration {
        self.quic.rtt()
    }

    /// Returns the largest UDP payload, in bytes, that the path is known to carry at the moment.
    pub fn mtu(&self) -> u16 {
        self.quic.stats().path.current_mtu
    }

    /// Bytes sent and received in UDP datagrams since the connection began.
    pub fn wire_bytes(&self) -> (u64, u64) {
        let stats = self.quic.stats();
        (stats.udp_tx.bytes, stats.udp_rx.bytes)
    }

    /// Opens a stream of messages.
    pub async fn open_exchange(&self) -> Result<Exchange> {
        let (send, recv) = self.open(&[EXCHANGE]).await?;
        Ok(Exchange::new(self.quic.clone(), send, recv))
    }

    /// Waits, as long as the connection lives, for the peer to open a stream of messages. Cancel-safe until a stream is
    /// there; a stream dropped while its first byte is awaited is reset.
    pub async fn accept_exchange(&self) -> Result<Exchange> {
        let (send, mut recv) = self.accept().await?;
        let mut kind = [0; 1];
        self.read_head(&mut recv, &mut kind, NO_PROGRESS).await?;
        if kind != [EXCHANGE] {
            return Err(self.violated(format!("a stream of kind {} came where an exchange was due", kind[0])));
        }
        Ok(Exchange::new(self.quic.clone(), send, recv))
    }

    /// Opens a stream of bytes; the peer accepts it by the same tag.
    pub async fn open_bulk(&self, tag: u64) -> Result<BulkStream> {
        let mut head = [BULK; 9];
        head[1..].copy_from_slice(&tag.to_le_bytes());
        let (send, recv) = self.open(&head).await?;
        Ok(BulkStream::new(self.quic.clone(), send, recv))
    }

    /// Waits for the peer to open the stream of bytes with this tag, at most [`NO_PROGRESS`].
    pub async fn accept_bulk(&self, tag: u64) -> Result<BulkStream> {
        let late = |_| self.error("accept a stream from", ErrorKind::TimedOut(NO_PROGRESS));
        let (send, mut recv) = timeout(NO_PROGRESS, self.accept()).await.map_err(late)??;
        let mut kind = [0; 1];
        self.read_head(&mut recv, &mut kind, NO_PROGRESS).await?;
        if kind != [BULK] {
            return Err(self.violated(format!("a stream of kind {} came where bulk was due", kind[0])));
        }
        let mut found = [0; 8];
        self.read_head(&mut recv, &mut found, NO_PROGRESS).await?;
        let found = u64::from_le_bytes(found);
        if found != tag {
            return Err(self.violated(format!("bulk stream {found} came where {tag} was due")));
        }
        Ok(BulkStream::new(self.quic.clone(), send, recv))
    }

    /// Closes the connection at once; what is still on its way is lost. The peer sees the code.
    pub fn close(&self, code: CloseCode, reason: &str) {
        self.quic.close(code.varint(), reason.as_bytes());
    }

    /// Waits until the connection is closed, by whomever, and says why.
    pub async fn closed(&self) -> Error {
        self.error("stay connected to", ErrorKind::from_connection(self.quic.closed().await))
    }

    /// Why the connection is closed, if it is.
    pub fn close_reason(&self) -> Option<ErrorKind> {
        self.quic.close_reason().map(ErrorKind::from_connection)
    }

    /// Tells the client that it is accepted.
    pub(crate) async fn welcome(&self) -> Result<()> {
        let lost = |error| self.error("accept", ErrorKind::from_connection(error));
        let mut stream = self.quic.open_uni().await.map_err(lost)?;
        stream.write_all(WELCOME).await.map_err(|error| self.error("accept", ErrorKind::from_write(error)))?;
        let _ = stream.finish();
        Ok(())
    }

    /// Waits for the server's word that this client is accepted.
    pub(crate) async fn await_welcome(&self) -> Result<()> {
        let lost = |error| self.error("connect to", ErrorKind::from_connection(error));
        let mut stream = self.quic.accept_uni().await.map_err(lost)?;
        let mut word = [0; WELCOME.len()];
        match stream.read_exact(&mut word).await {
            Ok(()) if &word == WELCOME => Ok(()),
            Err(quinn::ReadExactError::ReadError(error)) => Err(self.error("connect to", ErrorKind::from_read(error))),
            Ok(()) | Err(quinn::ReadExactError::FinishedEarly(_)) => {
                Err(self.violated("the peer's greeting is not flocker's".to_owned()))
            }
        }
    }

    async fn open(&self, head: &[u8]) -> Result<(quinn::SendStream, quinn::RecvStream)> {
        let operation = "open a stream to";
        let opened = timeout(NO_PROGRESS, async {
            let (mut send, recv) = self.quic.open_bi().await.map_err(ErrorKind::from_connection)?;
            send.write_all(head).await.map_err(ErrorKind::from_write)?;
            Ok((send, recv))
        });
        match opened.await {
            Ok(opened) => opened.map_err(|kind| self.error(operation, kind)),
            Err(_) => Err(self.error(operation, ErrorKind::TimedOut(NO_PROGRESS))),
        }
    }

    async fn accept(&self) -> Result<(quinn::SendStream, quinn::RecvStream)> {
        let lost = |error| self.error("accept a stream from", ErrorKind::from_connection(error));
        self.quic.accept_bi().await.map_err(lost)
    }

    async fn read_head(&self, recv: &mut quinn::RecvStream, head: &mut [u8], no_progress: Duration) -> Result<()> {
        match timeout(no_progress, recv.read_exact(head)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(quinn::ReadExactError::ReadError(error))) => {
                Err(self.error("accept a stream from", ErrorKind::from_read(error)))
            }
            Ok(Err(quinn::ReadExactError::FinishedEarly(_))) => {
                Err(self.violated("a stream ended within its head".to_owned()))
            }
            Err(_) => Err(self.error("accept a stream from", ErrorKind::TimedOut(no_progress))),
        }
    }

    fn violated(&self, what: String) -> Error {
        tracing::warn!(peer = %self.remote_addr(), reason = %what, "closing a connection for a protocol violation");
        self.close(CloseCode::Protocol, "unexpected stream");
        self.error("accept a stream from", ErrorKind::Protocol(what))
    }

    fn error(&self, operation: &'static str, kind: ErrorKind) -> Error {
        Error::new(operation, self.remote_addr(), kind)
    }
}
