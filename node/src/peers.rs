//! The other nodes: who they are, where they listen, how newcomers join and how members learn of each other.
//!
//! Owns the binding of a peer's name to its NodeId (the first one known wins; another one is refused and logged) and two
//! small protocols: enrolment (`flocker-enrol/1`, for newcomers) and membership (`flocker-member/1`, between members,
//! who exchange all they know whenever one starts or moves, and now and then). Refuses to know volumes.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use flocker_certs::{EnrolRefusal, EnrolReply, EnrolRequest, Member, NodeId, PeerIdentity, Token};
use flocker_storage::{clock, model::NodeName};
use flocker_transport::{ALPN, CloseCode, Connection, ErrorKind as LinkErrorKind, Exchange, Handler};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::sync::{Mutex, MutexGuard, PoisonError};
use tokio::sync::{Notify, futures::Notified};
use tokio_util::sync::CancellationToken;

use crate::{
    addresses,
    api::{
        events::Event,
        types::{ApiProblem, PeerResource, TokenResource},
    },
    daemon::Node,
    problem::{self, PEER_BUSY, Result, chain, problem},
    state::{PeerRow, State},
    transfers::Failure,
};

/// The protocol by which members tell each other of members.
pub(crate) const MEMBER_ALPN: &[u8] = b"flocker-member/1";
/// How long a certificate is good for. It is renewed by joining anew; see docs/ARCHITECTURE.md.
pub(crate) const CERTIFICATE_TTL: Duration = Duration::from_secs(365 * 24 * 3600);
/// How long a token is good for when nothing else is said.
const TOKEN_TTL: Duration = Duration::from_secs(3600);
/// The longest a token may be good for: it is a key to the cluster.
const TOKEN_TTL_LIMIT: Duration = Duration::from_secs(30 * 24 * 3600);
/// The longest wait for one answer of these small protocols.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// The most members one message may name.
const MEMBERS_LIMIT: usize = 4096;
/// The most addresses of one member that are tried and remembered.
const ADDRESSES_LIMIT: usize = 16;

/// All that one member knows of members, itself first.
#[derive(Debug, Serialize, Deserialize)]
struct Members {
    members: Vec<Member>,
}

/// The known peers, in memory; the state database holds the same.
#[derive(Default)]
pub(crate) struct Peers {
    rows: Mutex<BTreeMap<String, PeerRow>>,
    /// By NodeId: told whenever the peer was heard from.
    heard: Mutex<BTreeMap<String, Arc<Notify>>>,
    /// Told whenever a peer said where it is.
    told: Notify,
}

impl Peers {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, PeerRow>> {
        self.rows.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads the peers from the state database.
    pub(crate) async fn load(state: &State) -> Result<Self> {
        let rows = state.peers().await?.into_iter().map(|row| (row.node_id.clone(), row)).collect();
        Ok(Self { rows: Mutex::new(rows), heard: Mutex::default(), told: Notify::new() })
    }

    fn heard(&self, node_id: &str) -> Arc<Notify> {
        let mut heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        heard.entry(node_id.to_owned()).or_default().clone()
    }

    /// Ends when a peer says where it is.
    pub(crate) fn told(&self) -> Notified<'_> {
        self.told.notified()
    }

    /// Tells whether a peer may be the one at this address, by all that is known.
    pub(crate) fn may_be_at(&self, node_id: &str, at: SocketAddr) -> bool {
        self.lock().get(node_id).is_none_or(|row| addresses::may_be_at(&row.addresses, at))
    }

    /// Returns the addresses of a peer as they are now.
    fn addresses(&self, row: &PeerRow) -> Vec<String> {
        self.lock().get(&row.node_id).unwrap_or(row).addresses.clone()
    }

    /// Returns an address of a peer that was not tried yet: one that it has now, else one that it had.
    fn untried_address(&self, row: &PeerRow, tried: &BTreeSet<String>) -> Option<String> {
        self.addresses(row).into_iter().chain(row.addresses.iter().cloned()).find(|address| !tried.contains(address))
    }

    /// Notes that a peer was there. Where it said meanwhile that it is elsewhere than when `row` was read, that stays.
    fn note_seen(&self, row: &PeerRow, now: Timestamp) -> PeerRow {
        let mut rows = self.lock();
        let known = rows.entry(row.node_id.clone()).or_insert_with(|| row.clone());
        known.last_seen = Some(now);
        known.clone()
    }

    fn by_name(&self, name: &NodeName) -> Option<PeerRow> {
        self.lock().values().find(|row| row.name == *name).cloned()
    }

    fn all(&self) -> Vec<PeerRow> {
        let mut rows: Vec<PeerRow> = self.lock().values().cloned().collect();
        rows.sort_by(|a, b| a.name.cmp(&b.name));
        rows
    }
}

impl Node {
    /// Lists the peers.
    pub(crate) fn peer_resources(&self) -> Vec<PeerResource> {
        let rows = self.peers.all().into_iter();
        rows.map(|row| PeerResource {
            name: row.name,
            id: row.node_id,
            addresses: row.addresses,
            last_seen: row.last_seen,
        })
        .collect()
    }

    /// Finds a peer by name; where it is not known, the known ones are asked first.
    pub(crate) async fn find_peer(&self, name: &NodeName) -> Result<PeerRow> {
        if *name == self.name {
            return Err(problem(400, "bad_request", format!("{name} is this node; name another one")));
        }
        if let Some(row) = self.peers.by_name(name) {
            return Ok(row);
        }
        self.sync_members().await;
        self.peers.by_name(name).ok_or_else(|| {
            let known: Vec<String> = self.peers.all().iter().map(|row| row.name.to_string()).collect();
            problem::peer_not_found(name, &known)
        })
    }

    /// Connects to a peer. Its NodeId must be the one known for its name.
    pub(crate) async fn connect(&self, row: &PeerRow, alpn: &'static [u8]) -> std::result::Result<Connection, Failure> {
        let name = &row.name;
        let expected: NodeId = row.node_id.parse().map_err(|error| Failure {
            transient: false,
            problem: problem::internal(format!("the NodeId remembered for {name} is damaged: {error}")),
        })?;
        let unreachable = |why: String| Failure { transient: true, problem: problem::peer_unreachable(name, why) };
        let mut last = unreachable("no address is known for it; is it started?".to_owned());
        // Who is somebody else says nothing about the peer: it counts where nothing else was met.
        let mut met_others_only = true;
        let mut tried = BTreeSet::new();
        while let Some(address) = self.peers.untried_address(row, &tried) {
            tried.insert(address.clone());
            let resolved = match resolve(&address).await {
                Ok(resolved) => resolved,
                Err(why) => {
                    (last, met_others_only) = (unreachable(format!("{address}: {why}")), false);
                    continue;
                }
            };
            let error = match self.dial(row, (&address, resolved), expected, alpn).await {
                Ok(Some(connection)) => {
                    self.seen(row).await;
                    return Ok(connection);
                }
                Ok(None) => {
                    tracing::info!(peer = %name, %address, "it says that it is elsewhere");
                    continue;
                }
                Err(error) => error,
            };
            let failure = match &error.kind {
                // One address of a peer that listens everywhere is loopback, where this node may listen, too.
                LinkErrorKind::PeerRejected { claimed: Some(other), .. } if other.node_id == self.identity.node_id => {
                    unreachable(format!("{address} is this node itself"))
                }
                kind => {
                    tracing::warn!(peer = %name, %address, "{}", chain(&error));
                    Failure { transient: kind.is_transient(), problem: link_problem(name, &error) }
                }
            };
            let is_other = matches!(error.kind, LinkErrorKind::PeerRejected { .. });
            if !is_other || met_others_only {
                last = failure;
            }
            met_others_only &= is_other;
        }
        Err(last)
    }

    /// Connects to one address, as it is written and as it is. A handshake that waits for its next try begins anew, once, when the
    /// peer is heard from: it may have just started. `None`: it was heard from, and is elsewhere.
    async fn dial(
        &self,
        row: &PeerRow,
        (written, address): (&str, SocketAddr),
        expected: NodeId,
        alpn: &'static [u8],
    ) -> flocker_transport::Result<Option<Connection>> {
        let heard = self.peers.heard(&row.node_id);
        let heard = heard.notified();
        tokio::select! {
            biased;
            connected = self.endpoint.connect(address, Some(expected), alpn) => return connected.map(Some),
            () = heard => {}
        }
        if !self.peers.addresses(row).iter().any(|known| known == written) {
            return Ok(None);
        }
        self.endpoint.connect(address, Some(expected), alpn).await.map(Some)
    }

    async fn seen(&self, row: &PeerRow) {
        let row = self.peers.note_seen(row, clock::now());
        if let Err(error) = self.state.put_peer(&row).await {
            tracing::error!("{}", chain(&error));
        }
    }

    /// Creates a join token.
    pub(crate) async fn create_token(&self, ttl_seconds: Option<u64>) -> Result<TokenResource> {
        let Some(authority) = &self.authority else {
            return Err(problem(
                409,
                "not_authority",
                "this node does not hold the cluster's authority, so it cannot let nodes in",
            )
            .hint("run `flocker token create` on the node where `flocker init` was run"));
        };
        let ttl = ttl_seconds.map_or(TOKEN_TTL, Duration::from_secs);
        if ttl.is_zero() || ttl > TOKEN_TTL_LIMIT {
            return Err(problem(400, "bad_request", "a token's time must be between a second and 30 days"));
        }
        let expires = clock::now()
            .checked_add(jiff::SignedDuration::from_secs(ttl.as_secs() as i64))
            .map_err(|error| problem(400, "bad_request", error))?;
        let addresses = self.advertised();
        let token = Token::create(self.identity.cluster, authority.fingerprint(), addresses, expires)
            .map_err(|error| problem::internal(chain(&error)))?;
        self.state.put_token(token.id().to_string(), expires).await?;
        Ok(TokenResource { token: token.to_string(), expires })
    }

    fn as_member(&self) -> Member {
        Member { node_id: self.identity.node_id, name: self.name.to_string(), addresses: self.advertised() }
    }

    fn known_members(&self) -> Vec<Member> {
        let peers = self.peers.all();
        let rows = peers.iter().filter_map(|row| {
            Some(Member {
                node_id: row.node_id.parse().ok()?,
                name: row.name.to_string(),
                addresses: row.addresses.clone(),
            })
        });
        std::iter::once(self.as_member()).chain(rows).take(MEMBERS_LIMIT).collect()
    }

    /// Takes in what a member says of members. Addresses of a known node are only believed from itself.
    async fn learn(&self, members: Vec<Member>, from: &PeerIdentity) {
        for member in members.into_iter().take(MEMBERS_LIMIT) {
            let Ok(name) = member.name.parse::<NodeName>() else { continue };
            let itself = member.node_id == from.node_id;
            if member.node_id == self.identity.node_id || (itself && member.name != from.name) {
                continue;
            }
            let node_id = member.node_id.to_string();
            let known = self.peers.lock().get(&node_id).cloned();
            let taken = self.peers.by_name(&name).filter(|row| row.node_id != node_id);
            if name == self.name || taken.is_some() {
                tracing::warn!(%name, %node_id, said_by = from.name, "refused a member: this name belongs to another node");
                continue;
            }
            let mut addresses = member.addresses;
            addresses.truncate(ADDRESSES_LIMIT);
            let row = match known {
                Some(row) if !itself => row,
                Some(row) if addresses.is_empty() => PeerRow { last_seen: Some(clock::now()), ..row },
                _ => PeerRow { node_id, name, addresses, last_seen: itself.then(clock::now) },
            };
            self.peers.lock().insert(row.node_id.clone(), row.clone());
            self.peers.told.notify_waiters();
            if let Err(error) = self.state.put_peer(&row).await {
                tracing::error!("{}", chain(&error));
            }
        }
    }

    /// Compares notes with every known peer; those that do not answer are left for the next time.
    pub(crate) async fn sync_members(&self) {
        let rows = self.peers.all();
        let all = rows.iter().map(|row| async move {
            if let Err(error) = self.sync_with(row).await {
                tracing::debug!(peer = %row.name, "no membership news: {error}");
            }
        });
        futures_util::future::join_all(all).await;
    }

    async fn sync_with(&self, row: &PeerRow) -> Result<()> {
        let connection = self.connect(row, MEMBER_ALPN).await.map_err(|error| error.problem)?;
        let failed = |error: flocker_transport::Error| link_problem(&row.name, &error);
        let mut exchange = connection.open_exchange().await.map_err(failed)?;
        exchange.send_within(&Members { members: self.known_members() }, ANSWER_TIMEOUT).await.map_err(failed)?;
        let answer: Members = exchange.recv_within(ANSWER_TIMEOUT).await.map_err(failed)?;
        if let Some(peer) = connection.peer() {
            self.learn(answer.members, &peer).await;
        }
        connection.close(CloseCode::Done, "");
        Ok(())
    }

    async fn admit(&self, request: EnrolRequest) -> std::result::Result<EnrolReply, EnrolRefusal> {
        let failed = |error: crate::state::StateError| {
            tracing::error!("{}", chain(&error));
            EnrolRefusal::Failed
        };
        let authority = self.authority.as_ref().ok_or(EnrolRefusal::NotAuthority)?;
        let name: NodeName = request.name.parse().map_err(|_| EnrolRefusal::InvalidName)?;
        let token_id = request.token_secret.id().to_string();
        let token = self.state.token(token_id.clone()).await.map_err(failed)?.ok_or(EnrolRefusal::UnknownToken)?;
        if token.used_by.is_some() {
            return Err(EnrolRefusal::UsedToken);
        }
        if clock::now() > token.expires {
            return Err(EnrolRefusal::ExpiredToken);
        }
        if name == self.name || self.peers.by_name(&name).is_some() {
            return Err(EnrolRefusal::NameTaken);
        }
        let issued = authority.issue(&request.csr, name.as_str(), clock::now(), CERTIFICATE_TTL).map_err(|error| {
            tracing::warn!("{}", chain(&error));
            EnrolRefusal::InvalidRequest
        })?;
        if !self.state.use_token(token_id, issued.node_id.to_string()).await.map_err(failed)? {
            return Err(EnrolRefusal::UsedToken);
        }
        let row = PeerRow { node_id: issued.node_id.to_string(), name, addresses: Vec::new(), last_seen: None };
        self.state.put_peer(&row).await.map_err(failed)?;
        let members = self.known_members();
        self.peers.lock().insert(row.node_id.clone(), row);
        Ok(EnrolReply::Accepted {
            certificate: issued.certificate,
            authority: authority.certificate_der().to_vec(),
            members,
        })
    }

    /// Tells whether a member may be who it says: its name must not be known for another node.
    pub(crate) fn name_conflict(&self, peer: &PeerIdentity) -> Option<String> {
        let name: NodeName = peer.name.parse().ok()?;
        if name == self.name {
            return Some(self.identity.node_id.to_string());
        }
        let known = self.peers.by_name(&name)?;
        (known.node_id != peer.node_id.to_string()).then_some(known.node_id)
    }
}

/// Puts a failure of the line into words.
pub(crate) fn link_problem(name: &NodeName, error: &flocker_transport::Error) -> ApiProblem {
    let why = chain(error);
    match &error.kind {
        LinkErrorKind::PeerRejected { .. } => problem(
            502,
            "peer_rejected",
            format!("refused to talk to {name}: {why}"),
        )
        .hint(format!(
                    "a name stays bound to the node that had it first: if {name} was made anew, let it join under another name; if not, somebody else answers at its address"
                )),
        LinkErrorKind::RejectedByPeer(_) => {
            problem(502, "rejected_by_peer", format!("{name} refused to talk to this node: {why}"))
                .hint("compare `flocker node status` on both nodes: they must be of one cluster")
        }
        LinkErrorKind::ClosedByPeer { code: CloseCode::Busy, .. } => {
            problem(503, PEER_BUSY, format!("{name} is busy with other transfers"))
                .hint("it is tried again for a while; start fewer transfers at once")
        }
        _ => problem::peer_unreachable(name, why),
    }
}

/// Resolves `host:port`; the first address is taken.
pub(crate) async fn resolve(address: &str) -> std::result::Result<SocketAddr, String> {
    let mut found = tokio::net::lookup_host(address).await.map_err(|error| error.to_string())?;
    found.next().ok_or_else(|| "the name has no address".to_owned())
}

/// Serves newcomers.
pub(crate) struct Enrolment(pub(crate) Arc<Node>);

#[async_trait]
impl Handler for Enrolment {
    async fn handle(&self, connection: Connection, _cancel: CancellationToken) {
        let remote = connection.remote_addr();
        if let Err(error) = self.serve(&connection).await {
            tracing::warn!(%remote, "enrolment failed: {}", chain(&error));
        }
    }
}

impl Enrolment {
    async fn serve(&self, connection: &Connection) -> flocker_transport::Result<()> {
        let mut exchange = connection.accept_exchange().await?;
        let request: EnrolRequest = exchange.recv_within(ANSWER_TIMEOUT).await?;
        let name = request.name.clone();
        let reply = match self.0.admit(request).await {
            Ok(reply) => {
                tracing::info!(%name, "a node joined the cluster");
                if let Ok(peer) = name.parse() {
                    self.0.events.tell(Event::PeerJoined { peer });
                }
                reply
            }
            Err(refusal) => {
                tracing::warn!(remote = %connection.remote_addr(), name, "refused a newcomer: {refusal}");
                EnrolReply::Refused(refusal)
            }
        };
        exchange.send_within(&reply, ANSWER_TIMEOUT).await?;
        linger(exchange, connection).await;
        Ok(())
    }
}

/// Serves members' news.
pub(crate) struct Membership(pub(crate) Arc<Node>);

#[async_trait]
impl Handler for Membership {
    async fn handle(&self, connection: Connection, _cancel: CancellationToken) {
        let remote = connection.remote_addr();
        if let Err(error) = self.serve(&connection).await {
            tracing::debug!(%remote, "membership news failed: {}", chain(&error));
        }
    }
}

impl Membership {
    async fn serve(&self, connection: &Connection) -> flocker_transport::Result<()> {
        let Some(peer) = connection.peer() else { return Ok(()) };
        let mut exchange = connection.accept_exchange().await?;
        let news: Members = exchange.recv_within(ANSWER_TIMEOUT).await?;
        self.0.learn(news.members, &peer).await;
        // It is there, and may have just started: what waits for it goes on.
        self.0.peers.heard(&peer.node_id.to_string()).notify_waiters();
        self.0.transfers.peer_is_there(&peer.name);
        exchange.send_within(&Members { members: self.0.known_members() }, ANSWER_TIMEOUT).await?;
        linger(exchange, connection).await;
        Ok(())
    }
}

/// Waits until the peer has read the last message and closed; a connection dropped at once may lose it.
pub(crate) async fn linger(mut exchange: Exchange, connection: &Connection) {
    exchange.finish();
    let _ = tokio::time::timeout(ANSWER_TIMEOUT, connection.closed()).await;
}

/// The protocol of pushes and pulls, for [`Node::connect`].
pub(crate) const PUSH_ALPN: &[u8] = ALPN;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn row(addresses: &[&str]) -> PeerRow {
        let addresses = addresses.iter().map(|address| (*address).to_owned()).collect();
        PeerRow { node_id: "b".to_owned(), name: "host-b".parse().unwrap(), addresses, last_seen: None }
    }

    #[test]
    fn a_peer_that_moves_while_it_is_dialled_is_tried_where_it_is_and_stays_known_there() {
        let (old, new) = (row(&["10.0.0.1:7", "127.0.0.1:7"]), row(&["10.0.0.2:7", "127.0.0.1:7"]));
        let peers = Peers::default();
        let mut tried = BTreeSet::from([old.addresses[0].clone()]);
        peers.lock().insert(new.node_id.clone(), new.clone());

        assert_eq!(peers.untried_address(&old, &tried).unwrap(), new.addresses[0]);
        tried.extend(new.addresses.clone());
        assert_eq!(peers.untried_address(&old, &tried), None);
        assert_eq!(peers.untried_address(&old, &BTreeSet::from_iter(new.addresses.clone())).unwrap(), old.addresses[0]);
        let seen = peers.note_seen(&old, clock::now());
        assert_eq!(
            (&seen.addresses, seen.last_seen.is_some()),
            (&new.addresses, true),
            "what was read before is older"
        );
        assert_eq!(peers.addresses(&old), new.addresses);
    }
}
