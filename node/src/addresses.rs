//! Where nodes are found, while they move: what this node tells its peers, and when, and what it does when one of them is elsewhere.
//!
//! QUIC lets the side that connected change its address in the middle; the other side may not (RFC 9000, section 9). So a node looks
//! at its own address, tells its peers at once when it has another one, and whoever had connected to it there connects anew.
//! Refuses to know transfers; neighbours: [`crate::peers`] remembers the addresses, [`crate::kept`] closes what is left.

use std::{
    net::{IpAddr, SocketAddr, UdpSocket},
    sync::Arc,
    time::Duration,
};

use flocker_transport::Connection;

use crate::daemon::Node;

/// How often members compare notes without a reason.
const SYNC_INTERVAL: Duration = Duration::from_secs(30);
/// How soon they are told again, at first, where a new address did not reach them all.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// How often this node looks whether its address is another one.
const LOOK: Duration = Duration::from_secs(1);
/// How long a peer that has another address may be silent at the old one: more than the interval of QUIC's signs of life.
const SILENCE: Duration = Duration::from_secs(3);

impl Node {
    /// Where peers are told to find this node: what the configuration says, else where it listens, else (listening
    /// everywhere) the address that this host's default route leaves from, and loopback.
    pub(crate) fn advertised(&self) -> Vec<String> {
        if !self.config.advertise.is_empty() {
            return self.config.advertise.clone();
        }
        if !self.listen.ip().is_unspecified() {
            return vec![self.listen.to_string()];
        }
        let port = self.listen.port();
        let outward = outward_address().map(|ip| SocketAddr::new(ip, port).to_string());
        let loopback = SocketAddr::from(([127, 0, 0, 1], port)).to_string();
        outward.into_iter().chain([loopback]).collect()
    }

    /// Ends when this node is to be found elsewhere than it said. A host between two networks, with loopback alone, waits for the next.
    async fn moves(&self, said: &[String]) {
        if !self.config.advertise.is_empty() || !self.listen.ip().is_unspecified() {
            return std::future::pending().await;
        }
        loop {
            tokio::time::sleep(LOOK).await;
            let now = self.advertised();
            if now != said && now.len() >= said.len() {
                return;
            }
        }
    }

    /// Compares notes with the members when the node starts, now and then, and whenever its address is another one, until it stops.
    pub(crate) async fn keep_members_in_sync(self: Arc<Self>) {
        let (mut said, mut pause) = (self.advertised(), SYNC_INTERVAL);
        loop {
            let sync = async {
                self.sync_members().await;
                tokio::time::sleep(pause).await;
            };
            tokio::select! {
                biased;
                () = self.cancel.cancelled() => return,
                () = self.moves(&said) => {
                    (said, pause) = (self.advertised(), FIRST_PAUSE);
                    tracing::info!(addresses = ?said, "this node has another address, its peers are told");
                }
                () = sync => pause = SYNC_INTERVAL.min(pause * 2),
            }
        }
    }

    /// Ends when the peer says that it is elsewhere, and nothing comes over this connection any more.
    pub(crate) async fn is_left(&self, connection: &Connection) {
        let Some(peer) = connection.peer() else { return std::future::pending().await };
        let node_id = peer.node_id.to_string();
        loop {
            let mut told = std::pin::pin!(self.peers.told());
            told.as_mut().enable();
            while !self.peers.may_be_at(&node_id, connection.remote_addr()) {
                let (_, before) = connection.wire_bytes();
                tokio::time::sleep(SILENCE).await;
                if connection.wire_bytes().1 == before {
                    return;
                }
            }
            told.await;
        }
    }
}

/// Tells whether somebody with these addresses may be the one at `at`. A name may stand for any, and so may nothing.
pub(crate) fn may_be_at(addresses: &[String], at: SocketAddr) -> bool {
    addresses.is_empty()
        || addresses.iter().any(|address| match address.parse::<SocketAddr>() {
            Ok(known) => known.port() == at.port() && known.ip().to_canonical() == at.ip().to_canonical(),
            Err(_) => true,
        })
}

/// Finds the address that packets to elsewhere leave from; no packet is sent (RFC 5737 address).
fn outward_address() -> Option<IpAddr> {
    let socket = UdpSocket::bind(("0.0.0.0", 0)).ok()?;
    socket.connect(("192.0.2.1", 9)).ok()?;
    let ip = socket.local_addr().ok()?.ip();
    (!ip.is_loopback() && !ip.is_unspecified()).then_some(ip)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_is_elsewhere_when_no_address_of_it_is_this_one() {
        let at = SocketAddr::from(([10, 0, 0, 7], 7801));
        let known = |addresses: &[&str]| {
            let addresses: Vec<String> = addresses.iter().map(|address| (*address).to_owned()).collect();
            may_be_at(&addresses, at)
        };

        assert!(known(&["127.0.0.1:7801", "10.0.0.7:7801"]));
        assert!(known(&["[::ffff:10.0.0.7]:7801"]), "the same, as a socket for both families writes it");
        assert!(known(&["db1.example:7801"]), "a name may stand for any address");
        assert!(known(&[]), "it has not said where it is");
        assert!(!known(&["10.0.0.8:7801", "127.0.0.1:7801"]));
        assert!(!known(&["10.0.0.7:7802"]));
    }
}
