//! Making a node: the first one of a new cluster (`init`), or a further one with a token (`join`).
//!
//! Owns the contents of a fresh state folder. Refuses to touch one that holds a node already. The identity's
//! certificate is written last, so that a setup that dies leaves no node, and can be run again.

use std::{fs, io, net::SocketAddr, os::unix::fs::DirBuilderExt, path::PathBuf, time::Duration};

use flocker_certs::{
    Authority, ClusterId, EnrolRefusal, EnrolReply, EnrolRequest, Identity, NewKey, Token, TokenError,
};
use flocker_storage::{drivers::PoolSpec, model::NodeName};
use flocker_transport::{CloseCode, ENROL_ALPN, Limits, connect_newcomer};
use jiff::Timestamp;

use crate::{
    config::{Config, ConfigError, Paths, WIPE_IS_NOT_KEPT},
    peers::{CERTIFICATE_TTL, resolve},
    state::{PeerRow, State},
};

/// The longest wait for the member's answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(15);

/// What both ways of making a node take.
#[derive(Debug, Clone, Default)]
pub struct NodeRequest {
    /// The node's name; the host's name when left out.
    pub name: Option<NodeName>,
    /// The pool, `DRIVER:PLACE`; a directory in the state folder when left out.
    pub pool: Option<String>,
    /// Where to listen for peers.
    pub listen: Option<SocketAddr>,
    /// Where peers are told to find it.
    pub advertise: Vec<String>,
}

/// Makes a new cluster with this node as its first.
pub type InitRequest = NodeRequest;

/// Joins an existing cluster.
#[derive(Debug, Clone, Default)]
pub struct JoinRequest {
    /// What `flocker token create` printed.
    pub token: String,
    /// The node.
    pub node: NodeRequest,
}

/// A node that was made.
#[derive(Debug, Clone, serde::Serialize)]
pub struct NewNode {
    /// Its name.
    pub name: NodeName,
    /// Its identity, 64 hexadecimal digits.
    pub id: String,
    /// Its cluster.
    pub cluster: String,
    /// Its state folder.
    pub state: PathBuf,
    /// Its pool.
    pub pool: String,
    /// The other members known to it.
    pub members: Vec<String>,
}

/// A node that could not be made. No node is left in the state folder.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SetupError {
    /// There is one already.
    #[error("there is a node in {} already; use another --state, or remove the folder if you mean to start over", .0.display())]
    Exists(PathBuf),
    /// The host's name is no node name.
    #[error("the host's name {0:?} cannot be a node name; choose one with --name")]
    HostName(String),
    /// The pool is not written as one.
    #[error("cannot use the pool {pool:?}")]
    Pool {
        /// As given.
        pool: String,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The state folder cannot be made.
    #[error("cannot make the state folder {}", .path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The configuration cannot be written.
    #[error("cannot write the configuration")]
    Config(#[source] ConfigError),
    /// Keys or certificates cannot be made.
    #[error("cannot make the node's identity")]
    Certificates(#[source] flocker_certs::Error),
    /// The state database cannot be made.
    #[error("cannot make the state database")]
    State(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The text is no token.
    #[error("cannot read the join token")]
    Token(#[source] TokenError),
    /// No member answered.
    #[error("cannot reach the cluster at {tried}: {why}")]
    Unreachable {
        /// The addresses tried.
        tried: String,
        /// Why the last one failed.
        why: String,
    },
    /// A member answered and refused.
    #[error("the cluster refused this node")]
    Refused(#[source] EnrolRefusal),
    /// Whoever answered at the token's address is not of the token's cluster.
    #[error("who answered at {address} is not the cluster of this token: {why}")]
    WrongCluster {
        /// The address.
        address: String,
        /// What was wrong.
        why: String,
    },
}

impl SetupError {
    /// Returns the exit code the CLI ends with: 4 exists or refused, 5 unreachable, 2 bad input, else 1.
    pub fn exit_code(&self) -> i32 {
        match self {
            Self::Exists(_) | Self::Refused(_) => 4,
            Self::Unreachable { .. } => 5,
            Self::HostName(_) | Self::Pool { .. } | Self::Token(_) => 2,
            _ => 1,
        }
    }
}

struct Prepared {
    name: NodeName,
    pool: String,
    config: Config,
}

/// Checks all input before anything is written.
fn prepare(paths: &Paths, request: &NodeRequest) -> Result<Prepared, SetupError> {
    match Identity::load(&paths.identity()) {
        Err(error) if matches!(error.kind, flocker_certs::ErrorKind::NotFound) => {}
        _ => return Err(SetupError::Exists(paths.state.clone())),
    }
    let name = match &request.name {
        Some(name) => name.clone(),
        None => {
            let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
            let short = host.split('.').next().unwrap_or_default().to_owned();
            short.parse().map_err(|_| SetupError::HostName(host))?
        }
    };
    let pool = request.pool.clone().unwrap_or_else(|| paths.default_pool());
    let checked = match pool.parse::<PoolSpec>() {
        Ok(spec) if spec.wipes() => Err(WIPE_IS_NOT_KEPT.into()),
        Ok(_) => Ok(()),
        Err(error) => Err(error.into()),
    };
    if let Err(source) = checked {
        return Err(SetupError::Pool { pool, source });
    }
    let config = Config {
        name: name.clone(),
        pool: request.pool.clone(),
        listen: request.listen,
        advertise: request.advertise.clone(),
        rights: Vec::new(),
        limits: Vec::new(),
        lanes: None,
    };
    Ok(Prepared { name, pool, config })
}

fn make_folder(paths: &Paths) -> Result<(), SetupError> {
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(&paths.state);
    made.map_err(|source| SetupError::Folder { path: paths.state.clone(), source })
}

/// Makes the first node of a new cluster.
pub fn init(paths: &Paths, request: &InitRequest) -> Result<NewNode, SetupError> {
    let prepared = prepare(paths, request)?;
    make_folder(paths)?;
    let now = Timestamp::now();
    let cluster = ClusterId(uuid::Uuid::new_v4());
    let authority = Authority::create(cluster, now).map_err(SetupError::Certificates)?;
    let key = NewKey::generate().map_err(SetupError::Certificates)?;
    let request = key.csr_der().map_err(SetupError::Certificates)?;
    let issued =
        authority.issue(&request, prepared.name.as_str(), now, CERTIFICATE_TTL).map_err(SetupError::Certificates)?;
    let identity = Identity::new(key, issued.certificate, authority.certificate_der().to_vec())
        .map_err(SetupError::Certificates)?;
    authority.save(&paths.authority()).map_err(SetupError::Certificates)?;
    finish(paths, &prepared, &identity, Vec::new())
}

fn finish(
    paths: &Paths,
    prepared: &Prepared,
    identity: &Identity,
    members: Vec<String>,
) -> Result<NewNode, SetupError> {
    prepared.config.save(&paths.config).map_err(SetupError::Config)?;
    identity.save(&paths.identity()).map_err(SetupError::Certificates)?;
    Ok(NewNode {
        name: prepared.name.clone(),
        id: identity.node_id.to_string(),
        cluster: identity.cluster.to_string(),
        state: paths.state.clone(),
        pool: prepared.pool.clone(),
        members,
    })
}

/// Makes a further node of the cluster that a token is of.
pub async fn join(paths: &Paths, request: &JoinRequest) -> Result<NewNode, SetupError> {
    let token: Token = request.token.trim().parse().map_err(SetupError::Token)?;
    let prepared = prepare(paths, &request.node)?;
    let key = NewKey::generate().map_err(SetupError::Certificates)?;
    let enrol = EnrolRequest {
        token_secret: token.secret,
        csr: key.csr_der().map_err(SetupError::Certificates)?,
        name: prepared.name.to_string(),
    };
    make_folder(paths)?;
    let (certificate, authority, members) = ask(&token, &enrol).await?;
    let identity = Identity::new(key, certificate, authority).map_err(SetupError::Certificates)?;
    let state = State::open(&paths.database()).map_err(|error| SetupError::State(Box::new(error)))?;
    let mut names = Vec::new();
    for member in members {
        let Ok(name) = member.name.parse::<NodeName>() else { continue };
        names.push(name.to_string());
        let row = PeerRow { node_id: member.node_id.to_string(), name, addresses: member.addresses, last_seen: None };
        state.put_peer(&row).await.map_err(|error| SetupError::State(Box::new(error)))?;
    }
    finish(paths, &prepared, &identity, names)
}

type Accepted = (Vec<u8>, Vec<u8>, Vec<flocker_certs::Member>);

async fn ask(token: &Token, request: &EnrolRequest) -> Result<Accepted, SetupError> {
    let mut why = "the token names no address".to_owned();
    for address in &token.addresses {
        let reply = match ask_at(address, token, request).await {
            Ok(reply) => reply,
            Err(Unanswered::WrongCluster(why)) => {
                return Err(SetupError::WrongCluster { address: address.clone(), why });
            }
            Err(Unanswered::Unreachable(reason)) => {
                why = reason;
                continue;
            }
        };
        return match reply {
            EnrolReply::Accepted { certificate, authority, members } => Ok((certificate, authority, members)),
            EnrolReply::Refused(refusal) => Err(SetupError::Refused(refusal)),
        };
    }
    Err(SetupError::Unreachable { tried: token.addresses.join(", "), why })
}

enum Unanswered {
    Unreachable(String),
    WrongCluster(String),
}

async fn ask_at(address: &str, token: &Token, request: &EnrolRequest) -> Result<EnrolReply, Unanswered> {
    let unreachable = |error: flocker_transport::Error| match error.kind {
        flocker_transport::ErrorKind::PeerRejected { .. } => Unanswered::WrongCluster(crate::problem::chain(&error)),
        _ => Unanswered::Unreachable(crate::problem::chain(&error)),
    };
    let resolved = resolve(address).await.map_err(Unanswered::Unreachable)?;
    let connection =
        connect_newcomer(resolved, token.authority, ENROL_ALPN, &Limits::default()).await.map_err(unreachable)?;
    let mut exchange = connection.open_exchange().await.map_err(unreachable)?;
    exchange.send_within(request, ANSWER_TIMEOUT).await.map_err(unreachable)?;
    let reply = exchange.recv_within(ANSWER_TIMEOUT).await.map_err(unreachable)?;
    connection.close(CloseCode::Done, "");
    Ok(reply)
}
