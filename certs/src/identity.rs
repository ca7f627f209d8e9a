//! A node's own key, certificate and the authority it trusts.
//!
//! Owns making a key and keeping it beside its certificate. Does not issue: see [`crate::authority`].

use std::{fmt, path::Path};

use jiff::Timestamp;
use rcgen::{CertificateParams, DistinguishedName, KeyPair, PKCS_ED25519, PublicKeyData};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};

use crate::{
    error::{Error, ErrorKind, Result},
    node_id::{ClusterId, Fingerprint, NodeId},
    peer::{PeerIdentity, cluster_of_authority, is_signed_by},
    store::{self, Content},
};

const KEY_FILE: &str = "node.key";
const CERTIFICATE_FILE: &str = "node.crt";
const AUTHORITY_FILE: &str = "ca.crt";

/// A node's key before it has a certificate.
pub struct NewKey(KeyPair);

impl NewKey {
    /// Makes a key (Ed25519) from the operating system's randomness. Its signatures have one length, so that every handshake
    /// takes the same number of datagrams; a key of another kind that was made earlier is read all the same.
    pub fn generate() -> Result<Self> {
        KeyPair::generate_for(&PKCS_ED25519).map(Self).map_err(|error| crypto("make", "a key", &error))
    }

    /// The node this key makes.
    pub fn node_id(&self) -> NodeId {
        NodeId::of_public_key(&self.0.subject_public_key_info())
    }

    /// A certificate signing request (DER), signed by this key; it says nothing but the key.
    pub fn csr_der(&self) -> Result<Vec<u8>> {
        csr_der(&self.0)
    }

    fn from_pkcs8(der: &[u8], object: impl fmt::Display) -> Result<Self> {
        KeyPair::try_from(&PrivatePkcs8KeyDer::from(der))
            .map(Self)
            .map_err(|_| Error::new("read", object, ErrorKind::Malformed("it is not a key".to_owned())))
    }
}

impl fmt::Debug for NewKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NewKey").field("node_id", &self.node_id()).finish_non_exhaustive()
    }
}

/// A node's identity: its key, the certificate its cluster gave it, and the authority it trusts.
pub struct Identity {
    /// The node.
    pub node_id: NodeId,
    /// The name it joined with.
    pub name: String,
    /// The cluster it belongs to.
    pub cluster: ClusterId,
    not_after: Timestamp,
    key: KeyPair,
    certificate: Vec<u8>,
    authority: Vec<u8>,
}

impl Identity {
    /// Puts together a key, its certificate and the authority (DER). Fails unless the certificate is for this key and
    /// this authority signed it.
    pub fn new(key: NewKey, certificate_der: Vec<u8>, authority_der: Vec<u8>) -> Result<Self> {
        let failed = |kind| Error::new("use", "the node's certificate", kind);
        let holder = PeerIdentity::from_certificate_der(&certificate_der)?;
        if holder.node_id != key.node_id() {
            return Err(failed(ErrorKind::KeyMismatch));
        }
        if !is_signed_by(&certificate_der, &authority_der)? || cluster_of_authority(&authority_der)? != holder.cluster {
            return Err(failed(ErrorKind::ForeignAuthority));
        }
        Ok(Self {
            node_id: holder.node_id,
            name: holder.name,
            cluster: holder.cluster,
            not_after: holder.not_after,
            key: key.0,
            certificate: certificate_der,
            authority: authority_der,
        })
    }

    /// Reads what [`save`](Self::save) wrote. [`ErrorKind::NotFound`] means that this node has no cluster yet.
    pub fn load(dir: &Path) -> Result<Self> {
        let certificate = store::read(dir, CERTIFICATE_FILE, Content::Certificate)?;
        let authority = store::read(dir, AUTHORITY_FILE, Content::Certificate)?;
        let key = store::read(dir, KEY_FILE, Content::PrivateKey)?;
        Self::new(NewKey::from_pkcs8(&key, dir.join(KEY_FILE).display())?, certificate, authority)
    }

    /// Writes key (0600), authority and certificate into `dir` (0700). The certificate goes last, so that a crash in
    /// between leaves no identity, or the old one.
    pub fn save(&self, dir: &Path) -> Result<()> {
        store::ensure_dir(dir)?;
        store::write(dir, KEY_FILE, Content::PrivateKey, self.key.serialized_der())?;
        store::write(dir, AUTHORITY_FILE, Content::Certificate, &self.authority)?;
        store::write(dir, CERTIFICATE_FILE, Content::Certificate, &self.certificate)
    }

    /// The same key with a newer certificate.
    pub fn renewed(&self, certificate_der: Vec<u8>) -> Result<Self> {
        let key = NewKey::from_pkcs8(self.key.serialized_der(), "the node's key")?;
        Self::new(key, certificate_der, self.authority.clone())
    }

    /// A signing request (DER) for a newer certificate of the same key.
    pub fn csr_der(&self) -> Result<Vec<u8>> {
        csr_der(&self.key)
    }

    /// When the certificate ends.
    pub fn not_after(&self) -> Timestamp {
        self.not_after
    }

    /// The fingerprint of the cluster's authority.
    pub fn authority_fingerprint(&self) -> Fingerprint {
        Fingerprint::of_certificate(&self.authority)
    }

    /// The node's certificate (DER).
    pub fn certificate_der(&self) -> &[u8] {
        &self.certificate
    }

    /// The cluster authority's certificate (DER).
    pub fn authority_der(&self) -> &[u8] {
        &self.authority
    }

    /// Certificate and authority, in the order TLS sends them.
    pub fn chain(&self) -> Vec<CertificateDer<'static>> {
        vec![CertificateDer::from(self.certificate.clone()), CertificateDer::from(self.authority.clone())]
    }

    /// The private key, for the TLS configuration only.
    pub fn private_key(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.key.serialized_der().to_vec()))
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity")
            .field("node_id", &self.node_id)
            .field("name", &self.name)
            .field("cluster", &self.cluster)
            .field("not_after", &self.not_after)
            .finish_non_exhaustive()
    }
}

fn csr_der(key: &KeyPair) -> Result<Vec<u8>> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    let request = params.serialize_request(key).map_err(|error| crypto("sign", "a certificate request", &error))?;
    Ok(request.der().to_vec())
}

pub(crate) fn crypto(operation: &'static str, object: impl fmt::Display, error: &rcgen::Error) -> Error {
    Error::new(operation, object, ErrorKind::Crypto(error.to_string()))
}
