//! Joining a cluster: the token a member prints, and what the two sides say to each other.
//!
//! ## Participants
//! A *member* that holds the authority mints a token and remembers its [`TokenId`]; a *newcomer* connects over TLS pinned to
//! the token's authority and sends an [`EnrolRequest`]; the member answers with an [`EnrolReply`].
//!
//! Owns the token's text and the messages. Keeps no tokens: the node stores their ids, and marks them used.

use std::{fmt, str::FromStr};

use data_encoding::{BASE32_NOPAD, Encoding};
use jiff::Timestamp;
use rand::{TryRngCore, rngs::OsRng};
use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, ErrorKind, Result},
    node_id::{ClusterId, Fingerprint, NodeId, TokenId, sha256},
};

const PREFIX: &str = "flk";
const VERSION: &str = "1";
const BASE32: Encoding = BASE32_NOPAD;
const CHECKSUM_LEN: usize = 4;
/// A token is one line that people paste; a longer text is something else.
const TEXT_LIMIT: usize = 4096;

/// The secret in a token: who shows it may join, once.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct TokenSecret(pub [u8; 32]);

impl TokenSecret {
    /// Draws a secret from the operating system's randomness.
    pub fn generate() -> Result<Self> {
        let mut secret = [0; 32];
        OsRng
            .try_fill_bytes(&mut secret)
            .map_err(|error| Error::new("make", "a token", ErrorKind::Crypto(error.to_string())))?;
        Ok(Self(secret))
    }

    /// What a member stores in the secret's place.
    pub fn id(&self) -> TokenId {
        TokenId(sha256(&self.0))
    }
}

impl fmt::Debug for TokenSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TokenSecret(of {})", self.id().short())
    }
}

/// An invitation: where to knock, whom to trust, and the secret that opens, until it expires.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Token {
    /// The cluster to join.
    pub cluster: ClusterId,
    /// What the newcomer shows.
    pub secret: TokenSecret,
    /// The authority the newcomer pins.
    pub authority: Fingerprint,
    /// `host:port` of members that can enrol, best first.
    pub addresses: Vec<String>,
    /// The last moment it is good for.
    pub expires: Timestamp,
}

impl Token {
    /// Mints a token with a new secret.
    pub fn create(
        cluster: ClusterId,
        authority: Fingerprint,
        addresses: Vec<String>,
        expires: Timestamp,
    ) -> Result<Self> {
        Ok(Self { cluster, secret: TokenSecret::generate()?, authority, addresses, expires })
    }

    /// What a member stores; never the secret.
    pub fn id(&self) -> TokenId {
        self.secret.id()
    }

    /// Tells whether the token's time is over.
    pub fn is_expired(&self, now: Timestamp) -> bool {
        now > self.expires
    }
}

/// The one line `flk1-<base32>`: postcard of the fields and the first four bytes of its SHA-256.
impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let wire = TokenWire {
            cluster: *self.cluster.0.as_bytes(),
            secret: self.secret.0,
            authority: self.authority.0,
            expires_second: self.expires.as_second(),
            addresses: self.addresses.clone(),
        };
        let mut bytes = postcard::to_stdvec(&wire).map_err(|_| fmt::Error)?;
        let checksum = sha256(&bytes);
        bytes.extend_from_slice(&checksum[..CHECKSUM_LEN]);
        write!(f, "{PREFIX}{VERSION}-{}", BASE32.encode(&bytes).to_ascii_lowercase())
    }
}

impl FromStr for Token {
    type Err = TokenError;

    fn from_str(text: &str) -> std::result::Result<Self, TokenError> {
        let text = text.trim();
        if text.len() > TEXT_LIMIT {
            return Err(TokenError::NotAToken);
        }
        let (head, body) = text.split_once('-').ok_or(TokenError::NotAToken)?;
        let version = head.strip_prefix(PREFIX).ok_or(TokenError::NotAToken)?;
        if version.is_empty() || !version.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(TokenError::NotAToken);
        }
        if version != VERSION {
            return Err(TokenError::NewerVersion { version: version.to_owned() });
        }
        let bytes = BASE32.decode(body.to_ascii_uppercase().as_bytes()).map_err(|_| TokenError::Damaged)?;
        let payload_len = bytes.len().checked_sub(CHECKSUM_LEN).ok_or(TokenError::Damaged)?;
        let (payload, checksum) = bytes.split_at(payload_len);
        if sha256(payload)[..CHECKSUM_LEN] != *checksum {
            return Err(TokenError::Damaged);
        }
        let wire: TokenWire = postcard::from_bytes(payload).map_err(|_| TokenError::Damaged)?;
        Ok(Self {
            cluster: ClusterId(uuid::Uuid::from_bytes(wire.cluster)),
            secret: TokenSecret(wire.secret),
            authority: Fingerprint(wire.authority),
            addresses: wire.addresses,
            expires: Timestamp::from_second(wire.expires_second).map_err(|_| TokenError::Damaged)?,
        })
    }
}

#[derive(Serialize, Deserialize)]
struct TokenWire {
    cluster: [u8; 16],
    secret: [u8; 32],
    authority: [u8; 32],
    expires_second: i64,
    addresses: Vec<String>,
}

/// Why a text is not a usable token.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TokenError {
    /// The text is something else.
    #[error("this is not a join token: a token is one line that starts with \"flk1-\"")]
    NotAToken,
    /// Characters were lost or changed on the way.
    #[error("the join token is damaged: copy it again, the whole line")]
    Damaged,
    /// A newer flocker made it.
    #[error("the join token has format {version}, and this flocker knows format 1: upgrade this node")]
    NewerVersion {
        /// The format the token names.
        version: String,
    },
}

/// What a newcomer sends, over a connection pinned to the token's authority.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EnrolRequest {
    /// The token's secret.
    pub token_secret: TokenSecret,
    /// The newcomer's signing request (DER).
    pub csr: Vec<u8>,
    /// The name it wants.
    pub name: String,
}

/// What the member answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum EnrolReply {
    /// The newcomer is a member; the token is used up.
    Accepted {
        /// Its certificate (DER).
        certificate: Vec<u8>,
        /// The authority's certificate (DER); its fingerprint must be the token's.
        authority: Vec<u8>,
        /// The other members.
        members: Vec<Member>,
    },
    /// Nothing was issued.
    Refused(EnrolRefusal),
}

/// A node of the cluster, as one member tells another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// The node.
    pub node_id: NodeId,
    /// Its name.
    pub name: String,
    /// `host:port` where it listens, best first.
    pub addresses: Vec<String>,
}

/// Why a newcomer may not join. The order of the variants is the wire format: append only.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum EnrolRefusal {
    /// No member knows this token.
    #[error("the cluster does not know this join token")]
    UnknownToken,
    /// Somebody joined with it already.
    #[error("this join token was used already: make a new one")]
    UsedToken,
    /// Its time is over.
    #[error("this join token has expired: make a new one")]
    ExpiredToken,
    /// Another node has this name.
    #[error("another node of the cluster has this name: choose another")]
    NameTaken,
    /// This member does not hold the authority, so it cannot issue.
    #[error("this node does not hold the cluster's authority: ask the node that made the token")]
    NotAuthority,
    /// The name is not one a node may have.
    #[error("this is not a node name: letters, digits, '_', '.' and '-', up to 128, starting with a letter or digit")]
    InvalidName,
    /// The signing request is malformed or not signed by its key.
    #[error("the certificate request was malformed")]
    InvalidRequest,
    /// The member failed; its log says why.
    #[error("the node that was asked failed: see its log")]
    Failed,
}
