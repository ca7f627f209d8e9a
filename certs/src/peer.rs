//! Who a certificate says it is.
//!
//! Owns reading a node certificate; checks that it is consistent with itself (the NodeId is the key's hash). Whether its
//! issuer can be trusted is the business of the one who verifies the chain.

use jiff::Timestamp;
use x509_parser::prelude::{FromDer, GeneralName, ParsedExtension, X509Certificate};

use crate::{
    error::{Error, ErrorKind, Result},
    node_id::{ClusterId, NodeId, is_node_name},
};

/// The DNS name every node certificate carries, and every client asks for: QUIC wants a server name, ours says nothing.
pub const SERVER_NAME: &str = "flocker.internal";

pub(crate) const NODE_URI: &str = "flocker://node/";
pub(crate) const CLUSTER_URI: &str = "flocker://cluster/";
pub(crate) const NAME_URI: &str = "flocker://name/";

/// What a node certificate says about its holder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerIdentity {
    /// The node, by its key.
    pub node_id: NodeId,
    /// The cluster it belongs to.
    pub cluster: ClusterId,
    /// The name it joined with.
    pub name: String,
    /// When the certificate ends.
    pub not_after: Timestamp,
}

impl PeerIdentity {
    /// Reads a node certificate (DER). Fails unless it holds exactly one node id, cluster id and name, and the node id is
    /// the hash of the certificate's key.
    pub fn from_certificate_der(der: &[u8]) -> Result<Self> {
        let certificate = parse(der)?;
        let uris = Uris::of(&certificate);
        let node_id = uris.one(NODE_URI)?.parse::<NodeId>().map_err(|error| malformed(error.to_string()))?;
        let cluster = uris.one(CLUSTER_URI)?.parse::<ClusterId>().map_err(|error| malformed(error.to_string()))?;
        let name = uris.one(NAME_URI)?;
        if !is_node_name(name) {
            return Err(failed(ErrorKind::InvalidName));
        }
        if NodeId::of_public_key(certificate.public_key().raw) != node_id {
            return Err(failed(ErrorKind::NodeIdMismatch));
        }
        let not_after = Timestamp::from_second(certificate.validity().not_after.timestamp())
            .map_err(|_| failed(ErrorKind::TimeOutOfRange))?;
        Ok(Self { node_id, cluster, name: name.to_owned(), not_after })
    }
}

/// The cluster an authority's certificate (DER) was made for.
pub(crate) fn cluster_of_authority(der: &[u8]) -> Result<ClusterId> {
    let certificate = parse(der)?;
    Uris::of(&certificate).one(CLUSTER_URI)?.parse().map_err(|error| malformed(format!("{error}")))
}

/// Whether the key in `authority_der` signed `certificate_der`.
pub(crate) fn is_signed_by(certificate_der: &[u8], authority_der: &[u8]) -> Result<bool> {
    let (certificate, authority) = (parse(certificate_der)?, parse(authority_der)?);
    Ok(certificate.verify_signature(Some(authority.public_key())).is_ok())
}

fn parse(der: &[u8]) -> Result<X509Certificate<'_>> {
    match X509Certificate::from_der(der) {
        Ok(([], certificate)) => Ok(certificate),
        Ok(_) => Err(malformed("bytes follow the certificate")),
        Err(_) => Err(malformed("it is not an X.509 certificate")),
    }
}

struct Uris<'a>(Vec<&'a str>);

impl<'a> Uris<'a> {
    fn of(certificate: &'a X509Certificate<'a>) -> Self {
        let names = certificate.extensions().iter().filter_map(|extension| match extension.parsed_extension() {
            ParsedExtension::SubjectAlternativeName(names) => Some(&names.general_names),
            _ => None,
        });
        Self(
            names
                .flatten()
                .filter_map(|name| match name {
                    GeneralName::URI(uri) => Some(*uri),
                    _ => None,
                })
                .collect(),
        )
    }

    fn one(&self, prefix: &str) -> Result<&'a str> {
        let mut found = self.0.iter().filter_map(|uri| uri.strip_prefix(prefix));
        match (found.next(), found.next()) {
            (Some(value), None) => Ok(value),
            (None, _) => Err(malformed(format!("it has no {prefix} name"))),
            (Some(_), Some(_)) => Err(malformed(format!("it has several {prefix} names"))),
        }
    }
}

fn failed(kind: ErrorKind) -> Error {
    Error::new("read", "the certificate", kind)
}

fn malformed(what: impl Into<String>) -> Error {
    failed(ErrorKind::Malformed(what.into()))
}
