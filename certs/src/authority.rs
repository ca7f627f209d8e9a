//! The cluster's certificate authority: the one key that makes nodes members.
//!
//! Owns creating, keeping and issuing. Decides nothing about who may join: the caller checks the token first.

use std::{fmt, path::Path, time::Duration};

use jiff::Timestamp;
use rand::{TryRngCore, rngs::OsRng};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PKCS_ED25519, PublicKeyData, SanType,
    SerialNumber,
};
use rustls::pki_types::{CertificateDer, CertificateSigningRequestDer, PrivatePkcs8KeyDer};
use time::OffsetDateTime;

use crate::{
    error::{Error, ErrorKind, Result},
    identity::crypto,
    node_id::{ClusterId, Fingerprint, NodeId, is_node_name},
    peer::{CLUSTER_URI, NAME_URI, NODE_URI, SERVER_NAME, cluster_of_authority, is_signed_by},
    store::{self, Content},
};

const KEY_FILE: &str = "authority.key";
const CERTIFICATE_FILE: &str = "authority.crt";
/// Certificates are valid from a little before they are made, for nodes whose clocks lag.
const CLOCK_SKEW: Duration = Duration::from_secs(5 * 60);
/// An authority outlives its hosts; nodes' certificates are the short-lived ones.
const AUTHORITY_TTL: Duration = Duration::from_secs(30 * 365 * 24 * 60 * 60);
/// A request that says nothing but a key has a few hundred bytes.
const CSR_LIMIT: usize = 16 * 1024;

/// The cluster's authority, with its key.
pub struct Authority {
    cluster: ClusterId,
    certificate: Vec<u8>,
    issuer: Issuer<'static, KeyPair>,
}

/// A node certificate fresh from the authority.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IssuedCertificate {
    /// The certificate (DER).
    pub certificate: Vec<u8>,
    /// The node it is for.
    pub node_id: NodeId,
    /// When it ends.
    pub not_after: Timestamp,
}

impl Authority {
    /// Makes a new authority for a new cluster.
    pub fn create(cluster: ClusterId, now: Timestamp) -> Result<Self> {
        let failed = |error: rcgen::Error| crypto("create", "an authority", &error);
        let key = KeyPair::generate_for(&PKCS_ED25519).map_err(failed)?;
        let mut params = validity(now, AUTHORITY_TTL)?;
        params.distinguished_name.push(DnType::CommonName, format!("flocker cluster {cluster}"));
        params.subject_alt_names = vec![uri(CLUSTER_URI, &cluster)?];
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let certificate = params.self_signed(&key).map_err(failed)?.der().to_vec();
        Self::assemble(cluster, certificate, key)
    }

    /// Reads what [`save`](Self::save) wrote. [`ErrorKind::NotFound`] means that this node does not hold the authority.
    pub fn load(dir: &Path) -> Result<Self> {
        let key_path = dir.join(KEY_FILE);
        let key_der = store::read(dir, KEY_FILE, Content::PrivateKey)?;
        let key = KeyPair::try_from(&PrivatePkcs8KeyDer::from(key_der))
            .map_err(|_| Error::new("read", key_path.display(), ErrorKind::Malformed("it is not a key".to_owned())))?;
        let certificate = store::read(dir, CERTIFICATE_FILE, Content::Certificate)?;
        Self::assemble(cluster_of_authority(&certificate)?, certificate, key)
    }

    /// Writes key (0600) and certificate into `dir` (0700).
    pub fn save(&self, dir: &Path) -> Result<()> {
        store::ensure_dir(dir)?;
        store::write(dir, KEY_FILE, Content::PrivateKey, self.issuer.key().serialized_der())?;
        store::write(dir, CERTIFICATE_FILE, Content::Certificate, &self.certificate)
    }

    /// The cluster this authority speaks for.
    pub fn cluster(&self) -> ClusterId {
        self.cluster
    }

    /// The authority's own certificate (DER).
    pub fn certificate_der(&self) -> &[u8] {
        &self.certificate
    }

    /// What join tokens pin.
    pub fn fingerprint(&self) -> Fingerprint {
        Fingerprint::of_certificate(&self.certificate)
    }

    /// Makes the holder of the request's key a member called `name`, for `ttl`. The request's signature is verified and
    /// its key is used; whatever else it asks for is ignored.
    pub fn issue(&self, csr_der: &[u8], name: &str, now: Timestamp, ttl: Duration) -> Result<IssuedCertificate> {
        let failed = |kind| Error::new("issue a certificate for", name, kind);
        if !is_node_name(name) {
            return Err(failed(ErrorKind::InvalidName));
        }
        if csr_der.len() > CSR_LIMIT {
            return Err(failed(ErrorKind::Malformed("the request is too long".to_owned())));
        }
        let request = CertificateSigningRequestDer::from(csr_der);
        let request = CertificateSigningRequestParams::from_der(&request).map_err(|error| match error {
            rcgen::Error::InvalidCertificationRequestSignature => failed(ErrorKind::BadSignature),
            other => failed(ErrorKind::Malformed(format!("the request is refused: {other}"))),
        })?;
        let node_id = NodeId::of_public_key(&request.public_key.subject_public_key_info());
        let params = self.node_params(node_id, name, now, ttl)?;
        let certificate = params
            .signed_by(&request.public_key, &self.issuer)
            .map_err(|error| failed(ErrorKind::Crypto(error.to_string())))?;
        let not_after =
            Timestamp::from_second(params.not_after.unix_timestamp()).map_err(|_| failed(ErrorKind::TimeOutOfRange))?;
        Ok(IssuedCertificate { certificate: certificate.der().to_vec(), node_id, not_after })
    }

    fn node_params(&self, node_id: NodeId, name: &str, now: Timestamp, ttl: Duration) -> Result<CertificateParams> {
        let mut params = validity(now, ttl)?;
        params.distinguished_name.push(DnType::CommonName, format!("flocker node {}", node_id.short()));
        params.subject_alt_names = vec![
            SanType::DnsName(SERVER_NAME.try_into().map_err(|error| crypto("write", SERVER_NAME, &error))?),
            uri(NODE_URI, &node_id)?,
            uri(CLUSTER_URI, &self.cluster)?,
            uri(NAME_URI, &name)?,
        ];
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        Ok(params)
    }

    fn assemble(cluster: ClusterId, certificate: Vec<u8>, key: KeyPair) -> Result<Self> {
        let issuer = Issuer::from_ca_cert_der(&CertificateDer::from(certificate.as_slice()), key)
            .map_err(|error| crypto("use", "the authority's certificate", &error))?;
        let authority = Self { cluster, certificate, issuer };
        if !authority.has_its_own_key()? {
            return Err(Error::new("use", "the authority's certificate", ErrorKind::KeyMismatch));
        }
        Ok(authority)
    }

    fn has_its_own_key(&self) -> Result<bool> {
        let mut probe = CertificateParams::default();
        probe.serial_number = Some(SerialNumber::from_slice(&[1]));
        let probe =
            probe.self_signed(self.issuer.key()).map_err(|error| crypto("use", "the authority's key", &error))?;
        is_signed_by(probe.der(), &self.certificate)
    }
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority")
            .field("cluster", &self.cluster)
            .field("fingerprint", &self.fingerprint())
            .finish_non_exhaustive()
    }
}

fn validity(now: Timestamp, ttl: Duration) -> Result<CertificateParams> {
    let out_of_range = || Error::new("make", "a certificate", ErrorKind::TimeOutOfRange);
    let from = now.checked_sub(CLOCK_SKEW).map_err(|_| out_of_range())?;
    let until = now.checked_add(ttl).map_err(|_| out_of_range())?;
    let moment = |at: Timestamp| OffsetDateTime::from_unix_timestamp(at.as_second()).map_err(|_| out_of_range());
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.not_before = moment(from)?;
    params.not_after = moment(until)?;
    params.serial_number = Some(random_serial()?);
    Ok(params)
}

fn random_serial() -> Result<SerialNumber> {
    let mut bytes = [0; 16];
    OsRng
        .try_fill_bytes(&mut bytes)
        .map_err(|error| Error::new("make", "a serial number", ErrorKind::Crypto(error.to_string())))?;
    // Positive and never shortened (RFC 5280, 4.1.2.2).
    bytes[0] = bytes[0] & 0x7f | 0x40;
    Ok(SerialNumber::from_slice(&bytes))
}

fn uri(prefix: &str, value: &dyn fmt::Display) -> Result<SanType> {
    let text = format!("{prefix}{value}");
    text.as_str().try_into().map(SanType::URI).map_err(|error| crypto("write", text, &error))
}
