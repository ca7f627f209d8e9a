//! The cluster's authority, node identities and join tokens.
//!
//! Owns who is who: a node is its key ([`NodeId`]), a cluster is its authority. Opens no sockets and reads no clock: `now`
//! is passed in. `transport` verifies peers with what is here; `node` decides who may join.

mod authority;
mod enrol;
mod error;
mod identity;
mod node_id;
mod peer;
mod store;

pub use authority::{Authority, IssuedCertificate};
pub use enrol::{EnrolRefusal, EnrolReply, EnrolRequest, Member, Token, TokenError, TokenSecret};
pub use error::{Error, ErrorKind, Result};
pub use identity::{Identity, NewKey};
pub use node_id::{ClusterId, Fingerprint, NodeId, ParseIdError, TokenId, is_node_name};
pub use peer::{PeerIdentity, SERVER_NAME};
