//! The API's client: one typed method per route, over the daemon's unix socket.
//!
//! Owns paths, headers, limits and the reading of problems. Refuses to know what a caller does with an answer.
//! Neighbours: [`super::types`] for what travels; the CLI, and tests, call it.
//!
//! Each request opens its own connection: the socket is local, and a client that lives for one command needs no pool
//! of connections. Dropping a method's future closes that connection; the daemon finishes what it has begun.

use std::{
    fmt, io,
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, LengthLimitError, Limited};
use hyper::{Method, Request, StatusCode, client::conn::http1, header};
use hyper_util::rt::TokioIo;
use serde::{Serialize, de::DeserializeOwned};
use tokio::{net::UnixStream, time::timeout};

pub use flocker_replication::{
    message::DivergencePolicy,
    plan::{Outcome, Point, Points, UnrelatedReason, Verdict},
    resolution::{Kept, Place, Resolution},
};
pub use flocker_storage::{
    delta::Compare,
    driver::{Access, Capabilities, Finding, Orphan, Usage},
    model::{
        HeadState, Host, HostId, Metadata, NodeName, ParseError, Role, SnapshotId, SnapshotName, SnapshotRef, VolumeId,
        VolumeName, check_metadata,
    },
};

use super::types::{
    ApiProblem, CloneSnapshot, CreateSnapshot, CreateToken, CreateVolume, HistoryResource, MountResource, MountVolume,
    NodeResource, PatchVolume, PeerResource, PoolResource, Rollback, SnapshotResource, StartTransfer, TokenResource,
    TransferResource, Verification, VolumeResource,
};

/// The longest path of a unix socket, in bytes: `sun_path` holds 108 with its closing NUL (unix(7)).
pub const SOCKET_PATH_LIMIT: usize = 107;

/// The largest answer taken in, in bytes: a hundred thousand snapshots with some metadata each.
pub const RESPONSE_LIMIT: usize = 64 * 1024 * 1024;

/// How long a connection may take. The socket is local: a daemon that is alive accepts at once.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// How long a question may take. Reading changes nothing, but a head of millions of files is slow to compare.
/// Verbs have no limit: a snapshot of a big volume without reflinks copies it.
const READ_LIMIT: Duration = Duration::from_secs(600);

/// A request that failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// No daemon answers. Nothing was changed, unless the reason is [`Unreachable::Lost`].
    #[error("cannot reach the flocker daemon at {}", .socket.display())]
    Unreachable {
        /// Where it was sought.
        socket: PathBuf,
        /// What happened instead.
        #[source]
        why: Unreachable,
    },
    /// The socket's path does not fit. Nothing was sent.
    #[error(
        "the socket path {} has {} bytes, and a unix socket's path may have {SOCKET_PATH_LIMIT} at most",
        .socket.display(),
        .socket.as_os_str().len()
    )]
    SocketPath {
        /// The path.
        socket: PathBuf,
    },
    /// The daemon says no.
    #[error(transparent)]
    Problem(ApiProblem),
    /// The text is no id of a transfer. Nothing was sent.
    #[error("{0:?} is not a transfer id: it must hold only letters, digits and '-', 64 bytes at most")]
    NotAnId(String),
    /// What answers does not speak this API.
    #[error("the answer to {request} is not one of the flocker API: {what}")]
    Protocol {
        /// The request, as method and path.
        request: String,
        /// What is wrong with the answer.
        what: String,
    },
}

/// Why no daemon answers.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Unreachable {
    /// There is no socket.
    #[error("there is no socket at this path: no daemon is running here")]
    Missing,
    /// A socket file is there, and nobody listens.
    #[error("the socket is there, and nobody listens on it: the daemon has stopped")]
    Refused,
    /// This user may not open it.
    #[error("permission denied: the socket belongs to another user")]
    Denied,
    /// Nothing was heard in time.
    #[error("no answer within {} s", .0.as_secs())]
    Silent(Duration),
    /// The daemon went away before its answer was complete. It may have done what was asked.
    #[error("the connection was lost before the answer was complete; what was asked for may have been done: {0}")]
    Lost(String),
    /// Any other failure of the operating system.
    #[error("{0}")]
    Io(io::Error),
}

impl Unreachable {
    fn from_connect(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::NotFound => Self::Missing,
            io::ErrorKind::ConnectionRefused => Self::Refused,
            io::ErrorKind::PermissionDenied => Self::Denied,
            _ => Self::Io(error),
        }
    }
}

impl ClientError {
    /// Returns the exit code the CLI ends with (see [`ApiProblem::exit_code`]).
    pub fn exit_code(&self) -> i32 {
        match self {
            Self::Unreachable { .. } => 5,
            Self::SocketPath { .. } | Self::NotAnId(_) => 2,
            Self::Problem(problem) => problem.exit_code(),
            Self::Protocol { .. } => 1,
        }
    }
}

/// The result of a request.
pub type Result<T> = std::result::Result<T, ClientError>;

/// A client of one daemon. Cheap; holds no connection.
#[derive(Debug, Clone)]
pub struct Client {
    socket: PathBuf,
}

/// The node.
impl Client {
    /// Makes a client of the daemon behind this socket. Nothing is opened yet.
    pub fn new(socket: PathBuf) -> Self {
        Self { socket }
    }

    /// Returns the socket's path.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Describes the node.
    pub async fn node(&self) -> Result<NodeResource> {
        self.read("/v1/node".into()).await
    }

    /// Describes the node's pool.
    pub async fn pool(&self) -> Result<PoolResource> {
        self.read("/v1/pool".into()).await
    }

    /// Lists the other nodes of the cluster.
    pub async fn peers(&self) -> Result<Vec<PeerResource>> {
        self.read("/v1/peers".into()).await
    }

    /// Makes a join token.
    pub async fn create_token(&self, request: &CreateToken) -> Result<TokenResource> {
        self.post("/v1/tokens".into(), request).await
    }

    /// Returns once the daemon says that it is ready for requests; fails when it is not.
    pub async fn ready(&self) -> Result<()> {
        self.send(Method::GET, "/readyz".into(), None).await.map(drop)
    }
}

/// Volumes.
impl Client {
    /// Lists all volumes.
    pub async fn volumes(&self) -> Result<Vec<VolumeResource>> {
        self.read("/v1/volumes".into()).await
    }

    /// Creates a volume.
    pub async fn create_volume(&self, request: &CreateVolume) -> Result<VolumeResource> {
        self.post("/v1/volumes".into(), request).await
    }

    /// Describes a volume, its head included.
    pub async fn volume(&self, name: &VolumeName) -> Result<VolumeResource> {
        self.read(volume_path(name, "")).await
    }

    /// Shows a volume's history as a graph; with `all_hosts` the peers are asked, too.
    pub async fn history(&self, name: &VolumeName, all_hosts: bool) -> Result<HistoryResource> {
        self.read(volume_path(name, if all_hosts { "/history?all_hosts=true" } else { "/history" })).await
    }

    /// Changes a volume's metadata.
    pub async fn patch_volume(&self, name: &VolumeName, request: &PatchVolume) -> Result<VolumeResource> {
        self.json(Method::PATCH, volume_path(name, ""), request).await
    }

    /// Destroys a volume with its snapshots.
    pub async fn destroy_volume(&self, name: &VolumeName) -> Result<()> {
        self.send(Method::DELETE, volume_path(name, ""), None).await.map(drop)
    }

    /// Mounts a volume.
    pub async fn mount(&self, name: &VolumeName, request: &MountVolume) -> Result<MountResource> {
        self.post(volume_path(name, "/mount"), request).await
    }

    /// Unmounts a volume.
    pub async fn unmount(&self, name: &VolumeName) -> Result<()> {
        self.send(Method::POST, volume_path(name, "/unmount"), None).await.map(drop)
    }

    /// Puts a volume back to one of its snapshots.
    pub async fn rollback(&self, name: &VolumeName, request: &Rollback) -> Result<VolumeResource> {
        self.post(volume_path(name, "/rollback"), request).await
    }
}

/// Snapshots.
impl Client {
    /// Lists a volume's own snapshots, oldest first.
    pub async fn snapshots(&self, volume: &VolumeName) -> Result<Vec<SnapshotResource>> {
        self.read(volume_path(volume, "/snapshots")).await
    }

    /// Takes a snapshot.
    pub async fn create_snapshot(&self, volume: &VolumeName, request: &CreateSnapshot) -> Result<SnapshotResource> {
        self.post(volume_path(volume, "/snapshots"), request).await
    }

    /// Describes a snapshot.
    pub async fn snapshot(&self, snapshot: &SnapshotRef) -> Result<SnapshotResource> {
        self.read(snapshot_path(snapshot, "")).await
    }

    /// Destroys a snapshot.
    pub async fn destroy_snapshot(&self, snapshot: &SnapshotRef) -> Result<()> {
        self.send(Method::DELETE, snapshot_path(snapshot, ""), None).await.map(drop)
    }

    /// Clones a snapshot into a new volume.
    pub async fn clone_snapshot(&self, snapshot: &SnapshotRef, request: &CloneSnapshot) -> Result<VolumeResource> {
        self.post(snapshot_path(snapshot, "/clone"), request).await
    }

    /// Compares a snapshot with its inventory.
    pub async fn verify(&self, snapshot: &SnapshotRef, compare: Compare) -> Result<Verification> {
        let query = match compare {
            Compare::Metadata => "/verify?compare=metadata",
            Compare::Contents => "/verify?compare=contents",
        };
        self.act(snapshot_path(snapshot, query)).await
    }
}

/// Transfers.
impl Client {
    /// Starts a push. The answer comes at once; the transfer goes on in the daemon.
    pub async fn push(&self, volume: &VolumeName, request: &StartTransfer) -> Result<TransferResource> {
        self.post(volume_path(volume, "/push"), request).await
    }

    /// Starts a pull; `volume` is the name at the peer. The answer comes at once; the transfer goes on in the daemon.
    pub async fn pull(&self, volume: &VolumeName, request: &StartTransfer) -> Result<TransferResource> {
        self.post(volume_path(volume, "/pull"), request).await
    }

    /// Lists the transfers the daemon remembers, newest first.
    pub async fn transfers(&self) -> Result<Vec<TransferResource>> {
        self.read("/v1/transfers".into()).await
    }

    /// Describes a transfer as soon as it is over, or after `wait`; the daemon waits ten seconds at most.
    pub async fn transfer(&self, id: &str, wait: Duration) -> Result<TransferResource> {
        self.read(transfer_path(id, &format!("?wait_ms={}", wait.as_millis()))?).await
    }

    /// Cancels a transfer.
    pub async fn cancel_transfer(&self, id: &str) -> Result<TransferResource> {
        self.act(transfer_path(id, "/cancel")?).await
    }

    /// Lets a transfer rest until it is resumed.
    pub async fn pause_transfer(&self, id: &str) -> Result<TransferResource> {
        self.act(transfer_path(id, "/pause")?).await
    }

    /// Goes on with a transfer that was paused.
    pub async fn resume_transfer(&self, id: &str) -> Result<TransferResource> {
        self.act(transfer_path(id, "/resume")?).await
    }
}

/// How requests travel.
impl Client {
    async fn read<T: DeserializeOwned>(&self, path: String) -> Result<T> {
        let (request, asked) = (describe(&Method::GET, &path), self.send(Method::GET, path, None));
        match timeout(READ_LIMIT, asked).await {
            Ok(body) => decode(&request, &body?),
            Err(_) => Err(self.unreachable(Unreachable::Silent(READ_LIMIT))),
        }
    }

    async fn act<T: DeserializeOwned>(&self, path: String) -> Result<T> {
        let request = describe(&Method::POST, &path);
        decode(&request, &self.send(Method::POST, path, None).await?)
    }

    pub(super) async fn post<T: DeserializeOwned>(&self, path: String, body: &impl Serialize) -> Result<T> {
        self.json(Method::POST, path, body).await
    }

    async fn json<T: DeserializeOwned>(&self, method: Method, path: String, body: &impl Serialize) -> Result<T> {
        let request = describe(&method, &path);
        let body = serde_json::to_vec(body).map_err(|error| protocol(&request, &error))?;
        decode(&request, &self.send(method, path, Some(body)).await?)
    }

    /// Sends one request on a connection of its own and returns the body of a good answer.
    async fn send(&self, method: Method, path: String, body: Option<Vec<u8>>) -> Result<Bytes> {
        let described = describe(&method, &path);
        // The host is a formality that HTTP/1.1 asks for (RFC 9112, 3.2).
        let mut request = Request::builder().method(method).uri(path).header(header::HOST, "flocker");
        if body.is_some() {
            request = request.header(header::CONTENT_TYPE, "application/json");
        }
        let body = Full::new(Bytes::from(body.unwrap_or_default()));
        let request = request.body(body).map_err(|error| protocol(&described, &error))?;

        let (mut sender, connection) = http1::handshake(TokioIo::new(self.connect().await?))
            .await
            .map_err(|error| self.unreachable(Unreachable::Lost(error.to_string())))?;
        let exchange = async move {
            let response = sender.send_request(request).await.map_err(|error| self.broken(&described, &error))?;
            let (parts, body) = response.into_parts();
            let body = Limited::new(body, RESPONSE_LIMIT).collect().await.map_err(|error| {
                if error.is::<LengthLimitError>() {
                    protocol(&described, &format_args!("it is longer than {RESPONSE_LIMIT} bytes"))
                } else {
                    self.unreachable(Unreachable::Lost(error.to_string()))
                }
            })?;
            judge(&described, parts.status, &parts.headers, body.to_bytes())
        };
        tokio::pin!(exchange);
        // The connection does the reading and writing that the exchange waits for; once it has ended, so has the
        // answer or the hope of one.
        tokio::select! {
            biased;
            answer = &mut exchange => answer,
            _ = connection => exchange.await,
        }
    }

    pub(super) async fn connect(&self) -> Result<UnixStream> {
        if self.socket.as_os_str().as_bytes().len() > SOCKET_PATH_LIMIT {
            return Err(ClientError::SocketPath { socket: self.socket.clone() });
        }
        match timeout(CONNECT_LIMIT, UnixStream::connect(&self.socket)).await {
            Ok(connected) => connected.map_err(|error| self.unreachable(Unreachable::from_connect(error))),
            Err(_) => Err(self.unreachable(Unreachable::Silent(CONNECT_LIMIT))),
        }
    }

    pub(super) fn unreachable(&self, why: Unreachable) -> ClientError {
        ClientError::Unreachable { socket: self.socket.clone(), why }
    }

    pub(super) fn broken(&self, request: &str, error: &hyper::Error) -> ClientError {
        if error.is_parse() { protocol(request, error) } else { self.unreachable(Unreachable::Lost(error.to_string())) }
    }
}

pub(super) fn volume_path(name: &VolumeName, rest: &str) -> String {
    format!("/v1/volumes/{name}{rest}")
}

pub(super) fn snapshot_path(snapshot: &SnapshotRef, rest: &str) -> String {
    format!("/v1/volumes/{}/snapshots/{}{rest}", snapshot.volume, snapshot.snapshot)
}

fn transfer_path(id: &str, rest: &str) -> Result<String> {
    let plain = id.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
    if plain && !id.is_empty() && id.len() <= 64 {
        Ok(format!("/v1/transfers/{id}{rest}"))
    } else {
        Err(ClientError::NotAnId(id.chars().take(80).collect()))
    }
}

pub(super) fn describe(method: &Method, path: &str) -> String {
    format!("{method} {path}")
}

pub(super) fn protocol(request: &str, what: &dyn fmt::Display) -> ClientError {
    ClientError::Protocol { request: request.to_owned(), what: what.to_string() }
}

pub(super) fn judge(request: &str, status: StatusCode, headers: &header::HeaderMap, body: Bytes) -> Result<Bytes> {
    if status.is_success() {
        return Ok(body);
    }
    let kind = headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    if kind.starts_with("application/problem+json") {
        return Err(ClientError::Problem(decode(request, &body)?));
    }
    let start: String = String::from_utf8_lossy(&body).chars().take(200).collect();
    Err(protocol(request, &format_args!("status {status}, and no problem in it: {start:?}")))
}

pub(super) fn decode<T: DeserializeOwned>(request: &str, body: &[u8]) -> Result<T> {
    serde_json::from_slice(body).map_err(|error| protocol(request, &error))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use axum::{
        Json, Router,
        extract::Path as Segments,
        http::{HeaderMap, StatusCode, header::CONTENT_TYPE},
        response::IntoResponse,
        routing::{delete, get, post},
    };
    use serde_json::{Value, json};
    use tempfile::TempDir;
    use tokio::{io::AsyncWriteExt as _, net::UnixListener, task::JoinSet};

    use super::*;

    struct Fake {
        folder: TempDir,
        _server: JoinSet<()>,
    }

    impl Fake {
        fn serving(router: Router) -> Self {
            let folder = tempfile::tempdir().unwrap();
            let listener = UnixListener::bind(folder.path().join("api.sock")).unwrap();
            let mut server = JoinSet::new();
            server.spawn(async move { axum::serve(listener, router).await.unwrap() });
            Self { folder, _server: server }
        }

        /// Answers each connection with these bytes and closes it.
        fn answering(bytes: &'static [u8]) -> Self {
            let folder = tempfile::tempdir().unwrap();
            let listener = UnixListener::bind(folder.path().join("api.sock")).unwrap();
            let mut server = JoinSet::new();
            server.spawn(async move {
                while let Ok((mut stream, _)) = listener.accept().await {
                    let mut request = [0; 1024];
                    let _ = tokio::io::AsyncReadExt::read(&mut stream, &mut request).await;
                    let _ = stream.write_all(bytes).await;
                }
            });
            Self { folder, _server: server }
        }

        fn client(&self) -> Client {
            Client::new(self.folder.path().join("api.sock"))
        }
    }

    fn token() -> Value {
        json!({"token": "secret", "expires": "2026-01-02T03:04:05Z"})
    }

    #[tokio::test]
    async fn a_request_carries_its_body_and_the_answer_comes_back_typed() {
        let answer = |headers: HeaderMap, Json(body): Json<Value>| async move {
            assert_eq!(headers["content-type"], "application/json");
            assert_eq!(body, json!({"ttl_seconds": 60}));
            (StatusCode::CREATED, Json(token()))
        };
        let fake = Fake::serving(Router::new().route("/v1/tokens", post(answer)));
        let made = fake.client().create_token(&CreateToken { ttl_seconds: Some(60) }).await.unwrap();
        assert_eq!(made.token, "secret");
    }

    #[tokio::test]
    async fn an_empty_answer_is_enough_for_a_deletion() {
        let answer = |Segments((volume, snapshot)): Segments<(String, String)>| async move {
            assert_eq!((volume.as_str(), snapshot.as_str()), ("db", "one"));
            StatusCode::NO_CONTENT
        };
        let fake = Fake::serving(Router::new().route("/v1/volumes/{volume}/snapshots/{snapshot}", delete(answer)));
        fake.client().destroy_snapshot(&"db@one".parse().unwrap()).await.unwrap();
    }

    #[tokio::test]
    async fn a_verification_names_what_to_compare() {
        let answer = |query: axum::extract::RawQuery| async move {
            assert_eq!(query.0.as_deref(), Some("compare=contents"));
            Json(json!({"snapshot": "db@one", "compare": "contents", "findings": []}))
        };
        let fake = Fake::serving(Router::new().route("/v1/volumes/db/snapshots/one/verify", post(answer)));
        let found = fake.client().verify(&"db@one".parse().unwrap(), Compare::Contents).await.unwrap();
        assert!(found.findings.is_empty());
    }

    #[tokio::test]
    async fn a_problem_comes_back_with_its_code_and_evidence() {
        let answer = || async {
            let problem = json!({"status": 409, "code": "blocked", "detail": "cannot destroy db", "hint": "unmount it",
                "evidence": {"clones": ["db2"]}});
            (StatusCode::CONFLICT, [(CONTENT_TYPE, "application/problem+json")], problem.to_string()).into_response()
        };
        let fake = Fake::serving(Router::new().route("/v1/volumes/db", delete(answer)));
        let error = fake.client().destroy_volume(&"db".parse().unwrap()).await.unwrap_err();
        assert_eq!(error.exit_code(), 4);
        let ClientError::Problem(problem) = error else { panic!("{error:?}") };
        assert_eq!((problem.code.as_str(), problem.evidence.len()), ("blocked", 1));
    }

    #[tokio::test]
    async fn an_error_that_is_no_problem_is_a_protocol_error() {
        let fake = Fake::serving(Router::new().route("/v1/node", get(|| async { (StatusCode::BAD_GATEWAY, "proxy") })));
        let error = fake.client().node().await.unwrap_err();
        assert!(matches!(error, ClientError::Protocol { .. }), "{error:?}");
        assert!(error.to_string().contains("GET /v1/node"), "{error}");
    }

    #[tokio::test]
    async fn an_answer_of_another_shape_is_a_protocol_error() {
        let fake = Fake::serving(Router::new().route("/v1/node", get(|| async { Json(json!([1])) })));
        assert!(matches!(fake.client().node().await.unwrap_err(), ClientError::Protocol { .. }));
    }

    #[tokio::test]
    async fn an_answer_beyond_the_limit_is_refused() {
        let huge = || async { axum::body::Body::from(vec![b' '; RESPONSE_LIMIT + 1]) };
        let fake = Fake::serving(Router::new().route("/v1/peers", get(huge)));
        let error = fake.client().peers().await.unwrap_err();
        assert!(error.to_string().contains("longer than"), "{error}");
    }

    #[tokio::test]
    async fn a_missing_socket_and_one_nobody_listens_on_are_told_apart() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("api.sock");
        let missing = Client::new(socket.clone()).node().await.unwrap_err();
        drop(UnixListener::bind(&socket).unwrap());
        let refused = Client::new(socket).node().await.unwrap_err();
        assert!(matches!(missing, ClientError::Unreachable { why: Unreachable::Missing, .. }), "{missing:?}");
        assert!(matches!(refused, ClientError::Unreachable { why: Unreachable::Refused, .. }), "{refused:?}");
        assert_eq!((missing.exit_code(), refused.exit_code()), (5, 5));
    }

    #[tokio::test]
    async fn a_daemon_that_goes_away_in_the_middle_is_unreachable() {
        let fake = Fake::answering(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{");
        let error = fake.client().node().await.unwrap_err();
        assert!(matches!(error, ClientError::Unreachable { why: Unreachable::Lost(_), .. }), "{error:?}");
    }

    #[tokio::test]
    async fn something_that_speaks_no_http_is_a_protocol_error() {
        let fake = Fake::answering(b"220 mail.example ESMTP\r\n");
        let error = fake.client().node().await.unwrap_err();
        assert!(matches!(error, ClientError::Protocol { .. }), "{error:?}");
    }

    #[tokio::test]
    async fn a_socket_path_that_cannot_fit_says_the_limit() {
        let error = Client::new(PathBuf::from(format!("/{}", "x".repeat(107)))).node().await.unwrap_err();
        assert!(error.to_string().contains("108 bytes") && error.to_string().contains("107 at most"), "{error}");
        assert_eq!(error.exit_code(), 2);
    }

    #[tokio::test]
    async fn a_transfer_id_that_would_change_the_path_is_not_sent() {
        let error = Client::new("/nowhere".into()).transfer("../volumes/db", Duration::ZERO).await.unwrap_err();
        assert!(matches!(error, ClientError::NotAnId(_)), "{error:?}");
    }
}
