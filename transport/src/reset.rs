//! What of an endpoint outlives its process: the key by which a restarted node ends the connections that the dead one left behind.
//!
//! A peer goes on sending to a connection that the new process knows nothing of. The new process answers with a stateless reset
//! (RFC 9000, section 10.3), which the peer believes when it ends in the token that came with the connection id. So that the
//! new process says the same token, tokens are made with a key that is derived from the node's private key. Owns this key and the
//! connection ids. Neighbour: [`crate::endpoint`].

use std::{sync::Arc, time::Duration};

use flocker_certs::Identity;
use quinn::{
    ConnectionId, ConnectionIdGenerator, EndpointConfig,
    crypto::{CryptoError, HmacKey},
};
use rustls::crypto::CryptoProvider;

use crate::{error::ErrorKind, tls};

const TOKEN_CONTEXT: &str = "flocker 2026-11-23 stateless reset token";
/// Random bytes of a connection id. No id may come twice under one key, over all restarts of a node, since its token was shown.
const ID_LEN: usize = 12;

/// Makes the endpoint's reset tokens those of this node, whichever process it runs as.
pub(crate) fn outlive_restarts(config: &mut EndpointConfig, identity: &Identity) -> Result<(), ErrorKind> {
    let provider = tls::provider();
    let mut probe = [0; ID_LEN];
    provider
        .secure_random
        .fill(&mut probe)
        .map_err(|_| ErrorKind::Tls("the system gives no random bytes".to_owned()))?;
    let key = blake3::derive_key(TOKEN_CONTEXT, identity.private_key().secret_der());
    config.reset_key(Arc::new(TokenKey(key)));
    config.cid_generator(move || Box::new(Ids(provider.clone())));
    Ok(())
}

/// Makes reset tokens out of connection ids: keyed BLAKE3.
struct TokenKey([u8; blake3::KEY_LEN]);

impl HmacKey for TokenKey {
    fn sign(&self, data: &[u8], signature_out: &mut [u8]) {
        signature_out.copy_from_slice(blake3::keyed_hash(&self.0, data).as_bytes());
    }

    fn signature_len(&self) -> usize {
        blake3::OUT_LEN
    }

    fn verify(&self, data: &[u8], signature: &[u8]) -> Result<(), CryptoError> {
        // Compared in constant time.
        if blake3::keyed_hash(&self.0, data) == *signature { Ok(()) } else { Err(CryptoError) }
    }
}

/// Connection ids: random numbers. Quinn's own have 3 random bytes and a tag under a random key, by which a new process would
/// take the ids of the dead one for a stranger's and say nothing.
struct Ids(Arc<CryptoProvider>);

impl ConnectionIdGenerator for Ids {
    fn generate_cid(&mut self) -> ConnectionId {
        let mut id = [0; ID_LEN];
        // It gave bytes when the endpoint was made; quinn makes another id where this one is in use.
        let _ = self.0.secure_random.fill(&mut id);
        ConnectionId::new(&id)
    }

    fn cid_len(&self) -> usize {
        ID_LEN
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        None
    }
}
