//! Who is let in: the TLS configurations, and the verifiers behind them.
//!
//! A peer is accepted when its chain ends in the cluster's authority, it says so (cluster id), its NodeId is its key's hash
//! and, on the client's side, the expected one; the node may object to a peer it knows better ([`PeerCheck`]).
//! Each objection is one [`PeerFault`], and each fault is one TLS alert, so that the other side learns the same word.

use std::{
    fmt,
    sync::{Arc, Mutex, OnceLock, PoisonError},
};

use flocker_certs::{ClusterId, Fingerprint, Identity, NodeId, PeerIdentity, SERVER_NAME};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, OtherError, RootCertStore, ServerConfig,
    SignatureScheme,
    client::{
        Resumption, WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::{
        WebPkiClientVerifier,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
    sign::{CertifiedKey, SingleCertAndKey},
};

use crate::{
    close::CloseCode,
    endpoint::PeerCheck,
    error::{ErrorKind, PeerFault},
};

const NO_APPLICATION_PROTOCOL: u64 = 120;
const CONNECTION_REFUSED: u64 = 2;

/// What a verifier found wrong, for this side's error.
#[derive(Debug, Clone, Default)]
pub(crate) struct Verdict(Arc<Mutex<Option<Objection>>>);

#[derive(Debug, Clone)]
struct Objection {
    fault: PeerFault,
    claimed: Option<Box<PeerIdentity>>,
}

impl Verdict {
    /// The fault the verifier found, or `otherwise`.
    pub(crate) fn or(&self, otherwise: ErrorKind) -> ErrorKind {
        match self.0.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(Objection { fault, claimed }) => ErrorKind::PeerRejected { fault, claimed },
            None => otherwise,
        }
    }

    fn object(&self, fault: PeerFault, claimed: Option<PeerIdentity>) -> rustls::Error {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) =
            Some(Objection { fault, claimed: claimed.map(Box::new) });
        rustls::Error::InvalidCertificate(certificate_error(fault))
    }
}

/// An identity made ready for TLS.
pub(crate) struct Credentials {
    cluster: ClusterId,
    certified: Arc<CertifiedKey>,
    roots: Arc<RootCertStore>,
}

impl Credentials {
    pub(crate) fn new(identity: &Identity) -> Result<Self, ErrorKind> {
        let unusable = |error: rustls::Error| ErrorKind::Tls(error.to_string());
        let certified =
            CertifiedKey::from_der(identity.chain(), identity.private_key(), &provider()).map_err(unusable)?;
        let roots = roots(identity.authority_der()).map_err(unusable)?;
        Ok(Self { cluster: identity.cluster, certified: Arc::new(certified), roots })
    }

    /// For a connection to a member.
    pub(crate) fn client(
        &self,
        alpn: &[u8],
        expected: Option<NodeId>,
        check: Option<PeerCheck>,
        verdict: Verdict,
    ) -> Result<ClientConfig, ErrorKind> {
        let webpki = WebPkiServerVerifier::builder_with_provider(self.roots.clone(), provider())
            .build()
            .map_err(|error| ErrorKind::Tls(error.to_string()))?;
        let judge = Judge { cluster: Some(self.cluster), expected, check, verdict };
        let resolver = Arc::new(SingleCertAndKey::from(self.certified.clone()));
        let builder = client_builder(Arc::new(MemberServer { webpki, judge }))?;
        Ok(client_config(builder.with_client_cert_resolver(resolver), alpn))
    }

    /// For connections from members and, without a certificate, from newcomers.
    pub(crate) fn server(
        &self,
        alpns: Vec<Vec<u8>>,
        check: Option<PeerCheck>,
        verdict: Verdict,
    ) -> Result<ServerConfig, ErrorKind> {
        let webpki = WebPkiClientVerifier::builder_with_provider(self.roots.clone(), provider())
            .allow_unauthenticated()
            .build()
            .map_err(|error| ErrorKind::Tls(error.to_string()))?;
        let judge = Judge { cluster: Some(self.cluster), expected: None, check, verdict };
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| ErrorKind::Tls(error.to_string()))?
            .with_client_cert_verifier(Arc::new(MemberClient { webpki, judge }))
            .with_cert_resolver(Arc::new(SingleCertAndKey::from(self.certified.clone())));
        config.alpn_protocols = alpns;
        // Every connection verifies its peer anew: a resumed session would not.
        config.send_tls13_tickets = 0;
        config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
        Ok(config)
    }
}

/// For a newcomer: no certificate of its own, and the server's chain must hold the authority with this fingerprint.
pub(crate) fn pinned_client(alpn: &[u8], pin: Fingerprint, verdict: Verdict) -> Result<ClientConfig, ErrorKind> {
    let judge = Judge { cluster: None, expected: None, check: None, verdict };
    let builder = client_builder(Arc::new(PinnedServer { pin, judge }))?;
    Ok(client_config(builder.with_no_client_auth(), alpn))
}

type ClientBuilder = rustls::ConfigBuilder<ClientConfig, rustls::client::WantsClientCert>;

fn client_builder(verifier: Arc<dyn ServerCertVerifier>) -> Result<ClientBuilder, ErrorKind> {
    Ok(ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|error| ErrorKind::Tls(error.to_string()))?
        .dangerous()
        .with_custom_certificate_verifier(verifier))
}

fn client_config(mut config: ClientConfig, alpn: &[u8]) -> ClientConfig {
    config.alpn_protocols = vec![alpn.to_vec()];
    config.resumption = Resumption::disabled();
    config
}

pub(crate) fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: OnceLock<Arc<CryptoProvider>> = OnceLock::new();
    PROVIDER.get_or_init(|| Arc::new(rustls::crypto::aws_lc_rs::default_provider())).clone()
}

fn roots(authority_der: &[u8]) -> Result<Arc<RootCertStore>, rustls::Error> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from(authority_der.to_vec()))?;
    Ok(Arc::new(roots))
}

/// What is asked of a certificate once its chain has been looked at.
struct Judge {
    cluster: Option<ClusterId>,
    expected: Option<NodeId>,
    check: Option<PeerCheck>,
    verdict: Verdict,
}

impl Judge {
    fn rule(&self, certificate: &CertificateDer<'_>, chain: Result<(), rustls::Error>) -> Result<(), rustls::Error> {
        let peer = PeerIdentity::from_certificate_der(certificate).ok();
        match self.fault(peer.as_ref(), chain) {
            None => Ok(()),
            Some(fault) => Err(self.verdict.object(fault, peer)),
        }
    }

    fn fault(&self, peer: Option<&PeerIdentity>, chain: Result<(), rustls::Error>) -> Option<PeerFault> {
        // A certificate of another cluster has another authority, too; the operator is better served by the cluster.
        if let (Some(peer), Some(cluster)) = (peer, self.cluster)
            && peer.cluster != cluster
        {
            return Some(PeerFault::OtherCluster);
        }
        if let Err(error) = chain {
            return Some(chain_fault(&error));
        }
        let Some(peer) = peer else { return Some(PeerFault::Malformed) };
        if self.expected.is_some_and(|expected| expected != peer.node_id) {
            return Some(PeerFault::WrongNode);
        }
        self.check.as_ref().and_then(|check| check(peer).err())
    }
}

fn chain_fault(error: &rustls::Error) -> PeerFault {
    use CertificateError as E;
    match error {
        rustls::Error::InvalidCertificate(error) => match error {
            E::Expired | E::ExpiredContext { .. } | E::NotValidYet | E::NotValidYetContext { .. } => PeerFault::Expired,
            E::InvalidPurpose | E::InvalidPurposeContext { .. } => PeerFault::WrongPurpose,
            E::BadEncoding | E::UnhandledCriticalExtension | E::NotValidForName | E::NotValidForNameContext { .. } => {
                PeerFault::Malformed
            }
            // An authority with our authority's name but another key shows as a bad signature.
            _ => PeerFault::ForeignAuthority,
        },
        _ => PeerFault::ForeignAuthority,
    }
}

/// The certificate error whose TLS alert stands for a fault.
fn certificate_error(fault: PeerFault) -> CertificateError {
    match fault {
        PeerFault::ForeignAuthority => CertificateError::UnknownIssuer,
        PeerFault::OtherCluster => CertificateError::ApplicationVerificationFailure,
        PeerFault::WrongNode => CertificateError::NotValidForName,
        PeerFault::Expired => CertificateError::Expired,
        PeerFault::Revoked => CertificateError::Revoked,
        PeerFault::WrongPurpose => CertificateError::InvalidPurpose,
        PeerFault::BadSignature => CertificateError::BadSignature,
        PeerFault::Malformed => CertificateError::Other(OtherError(Arc::new(fault))),
    }
}

/// The fault a TLS alert (RFC 8446, 6.2) stands for.
fn fault_of_alert(alert: u64) -> Option<PeerFault> {
    match alert {
        42 => Some(PeerFault::WrongNode),
        43 => Some(PeerFault::WrongPurpose),
        44 => Some(PeerFault::Revoked),
        45 => Some(PeerFault::Expired),
        46 => Some(PeerFault::Malformed),
        48 => Some(PeerFault::ForeignAuthority),
        49 => Some(PeerFault::OtherCluster),
        51 => Some(PeerFault::BadSignature),
        _ => None,
    }
}

/// QUIC carries an alert as error 0x100 + alert (RFC 9001, 4.8).
fn alert_of(code: quinn::TransportErrorCode) -> Option<u64> {
    u64::from(code).checked_sub(0x100).filter(|&alert| alert < 0x100)
}

/// What the peer's transport close means here.
pub(crate) fn from_close_frame(close: &quinn::ConnectionClose) -> ErrorKind {
    match alert_of(close.error_code) {
        Some(NO_APPLICATION_PROTOCOL) => ErrorKind::NoCommonProtocol,
        Some(alert) => match fault_of_alert(alert) {
            Some(fault) => ErrorKind::RejectedByPeer(fault),
            None => ErrorKind::Protocol(format!("it ended the TLS handshake with alert {alert}")),
        },
        None if u64::from(close.error_code) == CONNECTION_REFUSED => {
            ErrorKind::ClosedByPeer { code: CloseCode::Busy, reason: String::new() }
        }
        None => ErrorKind::Protocol(format!("it reported: {}", close.error_code)),
    }
}

/// What this side's own transport error means.
pub(crate) fn from_transport_error(code: quinn::TransportErrorCode, text: String) -> ErrorKind {
    match alert_of(code) {
        Some(NO_APPLICATION_PROTOCOL) => ErrorKind::NoCommonProtocol,
        Some(alert) => match fault_of_alert(alert) {
            Some(fault) => ErrorKind::PeerRejected { fault, claimed: None },
            None => ErrorKind::Protocol(text),
        },
        None if u64::from(code) == CONNECTION_REFUSED => {
            ErrorKind::ClosedByPeer { code: CloseCode::Busy, reason: String::new() }
        }
        None => ErrorKind::Protocol(text),
    }
}

macro_rules! tls13_signatures {
    () => {
        fn verify_tls12_signature(
            &self,
            _message: &[u8],
            _certificate: &CertificateDer<'_>,
            _signature: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            Err(rustls::Error::General("TLS 1.2 is not spoken".to_owned()))
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            certificate: &CertificateDer<'_>,
            signature: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            verify_tls13_signature(message, certificate, signature, &provider().signature_verification_algorithms)
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            provider().signature_verification_algorithms.supported_schemes()
        }
    };
}

struct MemberServer {
    webpki: Arc<WebPkiServerVerifier>,
    judge: Judge,
}

impl ServerCertVerifier for MemberServer {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let chain = self.webpki.verify_server_cert(certificate, intermediates, server_name, ocsp_response, now);
        self.judge.rule(certificate, chain.map(drop)).map(|()| ServerCertVerified::assertion())
    }

    tls13_signatures!();
}

struct PinnedServer {
    pin: Fingerprint,
    judge: Judge,
}

impl ServerCertVerifier for PinnedServer {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let pinned = intermediates.iter().find(|der| Fingerprint::of_certificate(der) == self.pin);
        let chain = match pinned {
            None => Err(rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer)),
            Some(authority) => WebPkiServerVerifier::builder_with_provider(roots(authority)?, provider())
                .build()
                .map_err(|error| rustls::Error::General(error.to_string()))?
                .verify_server_cert(certificate, &[], server_name, ocsp_response, now),
        };
        self.judge.rule(certificate, chain.map(drop)).map(|()| ServerCertVerified::assertion())
    }

    tls13_signatures!();
}

struct MemberClient {
    webpki: Arc<dyn ClientCertVerifier>,
    judge: Judge,
}

impl ClientCertVerifier for MemberClient {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // No hints: a client of another cluster shows its certificate all the same, and is told why it is refused.
        &[]
    }

    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn verify_client_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let chain = self.webpki.verify_client_cert(certificate, intermediates, now);
        self.judge.rule(certificate, chain.map(drop)).map(|()| ClientCertVerified::assertion())
    }

    tls13_signatures!();
}

macro_rules! opaque_debug {
    ($($name:ident),*) => {$(
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.debug_struct(stringify!($name)).finish_non_exhaustive()
            }
        }
    )*};
}

opaque_debug!(Credentials, MemberServer, PinnedServer, MemberClient);

/// The name clients ask for.
pub(crate) const TLS_NAME: &str = SERVER_NAME;

#[cfg(test)]
mod tests {
    use rustls::AlertDescription;

    use super::*;

    #[test]
    fn every_fault_has_an_alert_of_its_own() {
        let faults = [
            (PeerFault::ForeignAuthority, 48),
            (PeerFault::OtherCluster, 49),
            (PeerFault::WrongNode, 42),
            (PeerFault::Expired, 45),
            (PeerFault::Revoked, 44),
            (PeerFault::WrongPurpose, 43),
            (PeerFault::BadSignature, 51),
            (PeerFault::Malformed, 46),
        ];
        for (fault, alert) in faults {
            assert_eq!(u8::from(AlertDescription::from(certificate_error(fault))), alert);
            assert_eq!(fault_of_alert(u64::from(alert)), Some(fault));
        }
    }
}
