//! Several nodes in one process, for the simulation: a cluster made without joining, and nodes over sockets and clocks of a test.
//!
//! Owns the way in; what runs behind it is the daemon's own code, from the endpoint to the API's handlers. Only the unix socket, the
//! signals and the lock of the state folder are left out.

use std::{net::SocketAddr, path::PathBuf, sync::Arc};

use axum::{
    Router,
    body::Body,
    http::{Method, Request},
};
use flocker_certs::{Authority, ClusterId, Identity, NewKey};
use flocker_storage::drivers::PoolSpec;
use flocker_transport::Socket;
use http_body_util::BodyExt;
use jiff::Timestamp;
use serde_json::Value;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;

use crate::{
    api::server,
    config::{Config, Paths},
    daemon::{DaemonError, Listen, Node},
    peers::CERTIFICATE_TTL,
    state::{PeerRow, State},
};

/// Anything that goes wrong before a test has begun.
pub type SetupError = Box<dyn std::error::Error + Send + Sync>;

/// A place for one node: its folder, its identity and its configuration.
#[derive(Debug, Clone)]
pub struct Seat {
    /// The node's name.
    pub name: String,
    /// Where it is found.
    pub addr: SocketAddr,
    paths: Paths,
    config: Config,
    identity: PathBuf,
    node_id: String,
}

/// A node to be made.
#[derive(Debug, Clone)]
pub struct SeatRequest {
    /// Its name.
    pub name: String,
    /// Where it keeps its things.
    pub folder: PathBuf,
    /// Where it is found.
    pub addr: SocketAddr,
    /// The text of its configuration file, without its name and address.
    pub config: String,
}

/// Makes the nodes of a new cluster, each with all others as its peers.
pub async fn make_cluster(requests: &[SeatRequest]) -> Result<Vec<Seat>, SetupError> {
    let now = Timestamp::now();
    let authority = Authority::create(ClusterId(uuid::Uuid::new_v4()), now)?;
    let mut seats = Vec::new();
    // Keys are new in each run, and claims are compared by the ids that are made of them: their order at least is always the same.
    let mut keys = requests.iter().map(|_| NewKey::generate()).collect::<Result<Vec<_>, _>>()?;
    keys.sort_by_key(NewKey::node_id);
    for (request, key) in requests.iter().zip(keys) {
        let text = format!("name = {:?}\nadvertise = [\"{}\"]\n{}", request.name, request.addr, request.config);
        let config: Config = toml::from_str(&text)?;
        std::fs::create_dir_all(&request.folder)?;
        let paths = Paths::resolve(Some(request.folder.clone()), Some(request.folder.join("s")))?;
        let issued = authority.issue(&key.csr_der()?, &request.name, now, CERTIFICATE_TTL)?;
        let identity = Identity::new(key, issued.certificate, authority.certificate_der().to_vec())?;
        identity.save(&paths.identity())?;
        seats.push(Seat {
            name: request.name.clone(),
            addr: request.addr,
            node_id: identity.node_id.to_string(),
            identity: paths.identity(),
            paths,
            config,
        });
    }
    for seat in &seats {
        let state = State::open(&seat.paths.database())?;
        for peer in seats.iter().filter(|peer| peer.name != seat.name) {
            let addresses = vec![peer.addr.to_string()];
            let row = PeerRow { node_id: peer.node_id.clone(), name: peer.name.parse()?, addresses, last_seen: None };
            state.put_peer(&row).await?;
        }
    }
    Ok(seats)
}

/// A node that runs.
pub struct Simulated {
    node: Arc<Node>,
    api: Router,
    services: JoinSet<()>,
    accepting: CancellationToken,
}

/// Asks a node what its API can be asked.
#[derive(Clone)]
pub struct Client(Router);

impl Simulated {
    /// Starts a node over a socket, with what is in its folder and its pool.
    pub async fn start(seat: &Seat, socket: Socket) -> Result<Self, DaemonError> {
        let identity = Identity::load(&seat.identity).map_err(DaemonError::Identity)?;
        let pool = seat.config.pool.clone().unwrap_or_else(|| seat.paths.default_pool());
        let pool: PoolSpec = pool.parse().map_err(|error| DaemonError::Pool(Box::new(error)))?;
        let (paths, config) = (seat.paths.clone(), seat.config.clone());
        let node = Node::open(paths, config, identity, Listen::On(socket), &pool).await?;
        let accepting = CancellationToken::new();
        let services = node.begin(&accepting).await;
        Ok(Self { api: server::router(node.clone()), node, services, accepting })
    }

    /// Returns a way to ask it.
    pub fn client(&self) -> Client {
        Client(self.api.clone())
    }

    /// Stops it in order.
    pub async fn stop(self) {
        self.accepting.cancel();
        self.node.end(self.services).await;
    }
}

impl Client {
    /// Asks; returns the status and the body, null when it is no JSON.
    pub async fn ask(self, method: Method, path: &str, body: &Value) -> (u16, Value) {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let Ok(request) = Request::builder().method(method).uri(path).body(Body::from(body)) else {
            return (400, Value::Null);
        };
        let answer = match self.0.oneshot(request).await {
            Ok(answer) => answer,
            Err(never) => match never {},
        };
        let status = answer.status().as_u16();
        let body = answer.into_body().collect().await.map(|body| body.to_bytes()).unwrap_or_default();
        (status, serde_json::from_slice(&body).unwrap_or(Value::Null))
    }
}
