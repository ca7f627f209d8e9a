//! The names a node, a cluster and an authority are known by.
//!
//! Owns the identifiers and their text and serde forms (hex for people, bytes on the wire). Knows no certificate:
//! [`crate::peer`] takes these out of one.

use std::{fmt, str::FromStr};

use aws_lc_rs::digest::{SHA256, digest};
use data_encoding::HEXLOWER;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};
use uuid::Uuid;

/// A text that is not the identifier it should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a {what}: {expected}")]
pub struct ParseIdError {
    what: &'static str,
    expected: &'static str,
}

macro_rules! hash_id {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub [u8; 32]);

        impl $name {
            /// The first eight hexadecimal digits, for people.
            pub fn short(&self) -> String {
                HEXLOWER.encode(&self.0[..4])
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&HEXLOWER.encode(&self.0))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self)
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                let error = ParseIdError { what: $what, expected: "64 lower-case hexadecimal digits are expected" };
                let bytes = HEXLOWER.decode(text.as_bytes()).map_err(|_| error)?;
                bytes.try_into().map(Self).map_err(|_| error)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                if serializer.is_human_readable() { serializer.collect_str(self) } else { self.0.serialize(serializer) }
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                if deserializer.is_human_readable() {
                    String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
                } else {
                    <[u8; 32]>::deserialize(deserializer).map(Self)
                }
            }
        }
    };
}

hash_id! {
    /// A node: the SHA-256 of its certificate's SubjectPublicKeyInfo (DER). Survives renewal, since the key does.
    NodeId, "node id"
}

hash_id! {
    /// An authority: the SHA-256 of its certificate (DER).
    Fingerprint, "fingerprint"
}

hash_id! {
    /// A join token as a member remembers it: the SHA-256 of its secret, which does not give the secret away.
    TokenId, "token id"
}

impl NodeId {
    /// The node that holds this public key (SubjectPublicKeyInfo, DER).
    pub fn of_public_key(spki_der: &[u8]) -> Self {
        Self(sha256(spki_der))
    }
}

impl Fingerprint {
    /// The fingerprint of this certificate (DER).
    pub fn of_certificate(certificate_der: &[u8]) -> Self {
        Self(sha256(certificate_der))
    }
}

/// The cluster a node belongs to: minted by `flocker init`, carried in every certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ClusterId(pub Uuid);

impl fmt::Display for ClusterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.hyphenated().fmt(f)
    }
}

impl FromStr for ClusterId {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Uuid::parse_str(text).map(Self).map_err(|_| ParseIdError { what: "cluster id", expected: "a UUID is expected" })
    }
}

/// Tells whether a node may be called this: `[a-zA-Z0-9][a-zA-Z0-9_.-]{0,127}`.
pub fn is_node_name(name: &str) -> bool {
    let mut bytes = name.bytes();
    name.len() <= 128
        && bytes.next().is_some_and(|first| first.is_ascii_alphanumeric())
        && bytes.all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-'))
}

pub(crate) fn sha256(bytes: &[u8]) -> [u8; 32] {
    digest(&SHA256, bytes).as_ref().try_into().expect("a SHA-256 digest has 32 bytes")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn an_id_survives_its_text_and_its_json() {
        let id = NodeId::of_public_key(b"key");
        assert_eq!(id.to_string().parse::<NodeId>().unwrap(), id);
        assert_eq!(id.to_string().len(), 64);
        assert_eq!(id.short(), id.to_string()[..8]);
        assert_eq!(postcard::from_bytes::<NodeId>(&postcard::to_stdvec(&id).unwrap()).unwrap(), id);
        assert_eq!(postcard::to_stdvec(&id).unwrap(), id.0);
    }

    #[test]
    fn a_wrong_id_is_refused_in_words() {
        let error = "12ab".parse::<NodeId>().unwrap_err();
        assert_eq!(error.to_string(), "not a node id: 64 lower-case hexadecimal digits are expected");
        assert!("x".repeat(64).parse::<Fingerprint>().is_err());
        assert!("not-a-uuid".parse::<ClusterId>().is_err());
    }

    #[test]
    fn node_names_are_checked() {
        assert!(is_node_name("host-a"));
        assert!(is_node_name("7.b_c"));
        for wrong in ["", "-a", ".a", "a b", "a/b", "ä", &"a".repeat(129)] {
            assert!(!is_node_name(wrong), "{wrong}");
        }
    }
}
