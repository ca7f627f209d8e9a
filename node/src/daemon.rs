//! The daemon: what a node is made of, how it starts and how it stops.
//!
//! Owns the order of start-up (lock, pool, state, catalogue, mounts, endpoint, API) and of shutdown: stop the API, stop
//! accepting, let receivers reach a commit or suspend, cancel the rest, close the endpoint, report what is left.

use std::{fs, io, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use flocker_certs::{Authority, ErrorKind as CertErrorKind, Identity, NodeId, PeerIdentity};
use flocker_storage::{
    driver::Driver,
    drivers::{self, PoolSpec},
    model::{HostId, NodeName},
};
use flocker_transport::{ALPN, CloseCode, ENROL_ALPN, Endpoint, Limits, PeerFault, Router, Socket};
use jiff::{Timestamp, tz::TimeZone};
use rustix::{
    fs::FlockOperation,
    process::{Resource, getrlimit, setrlimit},
};
use tokio::{
    net::{UnixListener, UnixStream},
    signal::unix::{Signal, SignalKind, signal},
    sync::Semaphore,
    task::JoinSet,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    api,
    api::types::{ApiProblem, NodeResource, PoolResource},
    catalog::{Catalog, Pins},
    config::{Config, ConfigError, DEFAULT_PORT, Paths, WIPE_IS_NOT_KEPT},
    events::Events,
    export::TARBALLS_LIMIT,
    handoff::HandOffs,
    inbox::Inbox,
    kept::Kept,
    lanes::Lanes,
    limits::SendLimits,
    metrics::Metrics,
    mounts::{Mounts, symlink_note},
    outbox::Outbox,
    ownership::Superseded,
    peers::{Enrolment, MEMBER_ALPN, Membership, Peers},
    problem::{Result, chain},
    serve::Replication,
    state::State,
    transfers::Transfers,
};

/// How long a stop waits for work to reach an end or a point to go on from.
const GRACE: Duration = Duration::from_secs(10);
/// How long start-up waits for peers to take note of it.
const ANNOUNCE_TIMEOUT: Duration = Duration::from_secs(3);
/// How often parked streams and receives are looked through.
const TIDY_INTERVAL: Duration = Duration::from_secs(5);

/// How many files may be open at once; programs that are started inherit it, and some go through all that there may be.
const OPEN_FILES: u64 = 16 * 1024;

/// The largest block, in bytes, that the allocator takes out of memory which it keeps.
const KEPT_BLOCK: usize = 4 * 1024 * 1024;

/// How many connections peers may have open at once: those of the exchanges that are served, and as many again and more that
/// wait for their next use.
const CONNECTIONS_LIMIT: usize = 192;

/// What `flocker node start` was asked for.
pub struct DaemonRequest {
    /// Where the node keeps its things.
    pub paths: Paths,
    /// Another configuration file than the state folder's.
    pub config_file: Option<PathBuf>,
    /// Where to listen, instead of the configured address.
    pub listen: Option<SocketAddr>,
    /// Whether the pool's file or device is formatted, whatever it holds (but a pool of flocker). For one start only.
    pub wipe: bool,
    /// Called once the API answers.
    pub ready: Box<dyn FnOnce(&NodeResource) + Send>,
    /// Stops the node when cancelled (SIGTERM and SIGINT do, too).
    pub stop: CancellationToken,
}

/// A daemon that could not start or stopped with an error.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DaemonError {
    /// The configuration cannot be used.
    #[error("cannot read the node's configuration")]
    Config(#[source] ConfigError),
    /// The node was not set up.
    #[error("there is no node in {}: run `flocker init` for a new cluster, or `flocker join TOKEN` for an existing one", .0.display())]
    NotInitialised(PathBuf),
    /// The identity cannot be used.
    #[error("cannot load the node's identity")]
    Identity(#[source] flocker_certs::Error),
    /// Another daemon runs on this state folder.
    #[error("another flocker node runs on {}", .0.display())]
    AlreadyRunning(PathBuf),
    /// The pool cannot be opened.
    #[error("cannot open the pool")]
    Pool(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// A part of start-up failed.
    #[error("cannot start the node")]
    Start(#[source] ApiProblem),
    /// The endpoint cannot listen.
    #[error("cannot listen for peers")]
    Listen(#[source] flocker_transport::Error),
    /// The API's socket cannot be made.
    #[error("cannot serve the API on {}", .path.display())]
    Socket {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A running node.
pub(crate) struct Node {
    pub(crate) name: NodeName,
    pub(crate) identity: Arc<Identity>,
    pub(crate) authority: Option<Authority>,
    pub(crate) config: Config,
    pub(crate) paths: Paths,
    pub(crate) driver: Arc<dyn Driver>,
    pub(crate) state: State,
    pub(crate) events: Arc<Events>,
    pub(crate) catalog: Catalog,
    pub(crate) pins: Arc<Pins>,
    pub(crate) mounts: Mounts,
    /// Whether mounts are real (root) or symlinks.
    pub(crate) mounts_really: bool,
    pub(crate) peers: Peers,
    pub(crate) transfers: Transfers,
    pub(crate) outbox: Outbox,
    pub(crate) inbox: Inbox,
    pub(crate) handoffs: HandOffs,
    pub(crate) superseded: Superseded,
    pub(crate) kept: Kept,
    pub(crate) lanes: Lanes,
    pub(crate) limits: SendLimits,
    pub(crate) metrics: Metrics,
    /// Places for exports and imports.
    pub(crate) tarballs: Arc<Semaphore>,
    pub(crate) endpoint: Endpoint,
    pub(crate) tasks: TaskTracker,
    pub(crate) cancel: CancellationToken,
    started: Timestamp,
    pub(crate) listen: SocketAddr,
    /// Whether nobody watches it but a simulation, whose seed says all that happens.
    pub(crate) is_simulated: bool,
}

/// Returns the configured pool. Whether it is wiped is said by each start, never by the configuration.
fn pool_of(
    config: &Config,
    paths: &Paths,
    wipe: bool,
) -> std::result::Result<PoolSpec, Box<dyn std::error::Error + Send + Sync>> {
    let pool = config.pool.clone().unwrap_or_else(|| paths.default_pool());
    let spec: PoolSpec = pool.parse()?;
    if spec.wipes() {
        return Err(WIPE_IS_NOT_KEPT.into());
    }
    Ok(if wipe { spec.wiping()? } else { spec })
}

/// Runs a node until it is told to stop.
pub async fn run(request: DaemonRequest) -> std::result::Result<(), DaemonError> {
    let DaemonRequest { paths, config_file, listen, wipe, ready, stop } = request;
    let signals = Signals::install();
    allow_open_files();
    keep_freed_memory();
    let config_path = config_file.unwrap_or_else(|| paths.config.clone());
    if !config_path.exists() {
        return Err(DaemonError::NotInitialised(paths.state));
    }
    let config = Config::load(&config_path).map_err(DaemonError::Config)?;
    let identity = Identity::load(&paths.identity()).map_err(|error| match error.kind {
        CertErrorKind::NotFound => DaemonError::NotInitialised(paths.state.clone()),
        _ => DaemonError::Identity(error),
    })?;
    let spec = pool_of(&config, &paths, wipe).map_err(DaemonError::Pool)?;
    let _lock = lock_state(&paths)?;
    let listener = listen_for_api(&paths).await?;
    let node = Node::open(paths, config, identity, Listen::At(listen), &spec).await?;
    let accepting = stop.child_token();
    let services = node.begin(&accepting).await;
    let stop_api = CancellationToken::new();
    let mut api = JoinSet::new();
    api.spawn(api::server::serve(listener, node.clone(), stop_api.clone()));
    let resource = node.resource();
    tracing::info!(name = %node.name, id = %node.identity.node_id, listen = %node.listen, socket = %node.paths.socket.display(), "ready");
    ready(&resource);
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    signals.wait(&stop).await;
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    tracing::info!("stopping");
    node.events.end();
    stop_api.cancel();
    let _ = tokio::time::timeout(GRACE, api.join_next()).await;
    accepting.cancel();
    node.end(services).await;
    let _ = fs::remove_file(&node.paths.socket);
    Ok(())
}

/// Raises the limit of open files as far as it may go and is of use: each of many receives has some tens of files open, and
/// what a shell or systemd gives is 1,024.
fn allow_open_files() {
    let mut limit = getrlimit(Resource::Nofile);
    let wanted = limit.maximum.map_or(OPEN_FILES, |maximum| maximum.min(OPEN_FILES));
    if limit.current.is_some_and(|current| current < wanted) {
        limit.current = Some(wanted);
        if let Err(error) = setrlimit(Resource::Nofile, limit) {
            tracing::warn!(%error, wanted, "the limit of open files stays as it is");
        }
    }
}

/// Has the allocator keep what is freed. glibc's gives it back to the kernel where some hundred KiB lie free, and gets it again with the
/// next buffer, page by page and cleared: of data that does not compress, half went through such pages. It keeps twice as much as the
/// largest block that it has ever given back whole (`M_MMAP_THRESHOLD` in mallopt(3)), so it is lent one.
fn keep_freed_memory() {
    drop(std::hint::black_box(Vec::<u8>::with_capacity(KEPT_BLOCK)));
}

/// SIGTERM and SIGINT, caught from the first moment: a stop that comes during start-up is obeyed after it.
struct Signals {
    caught: Option<(Signal, Signal)>,
}

impl Signals {
    fn install() -> Self {
        Self {
            caught: signal(SignalKind::terminate()).and_then(|term| Ok((term, signal(SignalKind::interrupt())?))).ok(),
        }
    }

    async fn wait(self, stop: &CancellationToken) {
        let Some((mut terminate, mut interrupt)) = self.caught else { return stop.cancelled().await };
        tokio::select! {
            biased;
            () = stop.cancelled() => {}
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    }
}

/// Holds the state folder against a second daemon, until the file is dropped.
fn lock_state(paths: &Paths) -> std::result::Result<fs::File, DaemonError> {
    let path = paths.state.join("node.lock");
    let file = fs::File::options().create(true).truncate(false).write(true).open(&path);
    let file = file.map_err(|source| DaemonError::Config(ConfigError::Write { path, source }))?;
    rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive)
        .map_err(|_| DaemonError::AlreadyRunning(paths.state.clone()))?;
    Ok(file)
}

/// Makes the API's socket, for its owner only. A dead socket of an earlier daemon is removed; a live one is not.
async fn listen_for_api(paths: &Paths) -> std::result::Result<UnixListener, DaemonError> {
    let path = &paths.socket;
    let failed = |source: io::Error| DaemonError::Socket { path: path.clone(), source };
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).map_err(failed)?;
    }
    if path.exists() {
        if UnixStream::connect(path).await.is_ok() {
            return Err(failed(io::Error::new(io::ErrorKind::AddrInUse, "another daemon answers there")));
        }
        fs::remove_file(path).map_err(failed)?;
    }
    // The socket must never be open to others, not even between its making and a chmod.
    let umask = rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o177));
    let listener = UnixListener::bind(path);
    rustix::process::umask(umask);
    listener.map_err(failed)
}

/// How a node gets its socket.
pub(crate) enum Listen {
    /// It binds an address, the configured one where none is given.
    At(Option<SocketAddr>),
    /// It is given one.
    #[cfg_attr(not(feature = "simulation"), allow(dead_code))]
    On(Socket),
}

impl Node {
    pub(crate) async fn open(
        paths: Paths,
        config: Config,
        identity: Identity,
        listen: Listen,
        spec: &PoolSpec,
    ) -> std::result::Result<Arc<Self>, DaemonError> {
        let start = |error: ApiProblem| DaemonError::Start(error);
        let authority = match Authority::load(&paths.authority()) {
            Ok(authority) => Some(authority),
            Err(error) if matches!(error.kind, CertErrorKind::NotFound) => None,
            Err(error) => return Err(DaemonError::Identity(error)),
        };
        let driver = drivers::open(spec).await.map_err(|error| DaemonError::Pool(Box::new(error)))?;
        let state = State::open(&paths.database()).map_err(|error| start(error.into()))?;
        let peers = Peers::load(&state).await.map_err(start)?;
        let events = Arc::<Events>::default();
        let transfers = Transfers::load(&state, &events).await.map_err(start)?;
        let identity = Arc::new(identity);
        // Nodes of a simulation share one process, and so one table of mounts.
        let alone = matches!(listen, Listen::At(_));
        let endpoint = match listen {
            Listen::On(socket) => Endpoint::on(socket, identity.clone(), Limits::default()),
            Listen::At(addr) => {
                let addr = addr.or(config.listen).unwrap_or_else(|| SocketAddr::from(([0, 0, 0, 0], DEFAULT_PORT)));
                Endpoint::bind(addr, identity.clone(), Limits::default())
            }
        };
        let endpoint = endpoint.map_err(DaemonError::Listen)?;
        let listen = endpoint.local_addr().map_err(DaemonError::Listen)?;
        // How many processors there are is nothing that a simulation should depend on.
        let lanes = Lanes::new(if alone { config.lanes.map(usize::from) } else { Some(1) });
        let limits = SendLimits::new(&config.limits, &TimeZone::system());
        let node = Arc::new(Self {
            name: config.name.clone(),
            identity,
            authority,
            config,
            paths,
            driver,
            state,
            catalog: Catalog::new(events.clone()),
            events,
            pins: Arc::default(),
            mounts: Mounts::default(),
            mounts_really: alone && rustix::process::geteuid().is_root(),
            peers,
            transfers,
            outbox: Outbox::default(),
            inbox: Inbox::default(),
            handoffs: HandOffs::default(),
            superseded: Superseded::default(),
            kept: Kept::default(),
            lanes,
            limits,
            metrics: Metrics::default(),
            tarballs: Arc::new(Semaphore::new(TARBALLS_LIMIT)),
            endpoint,
            tasks: TaskTracker::new(),
            cancel: CancellationToken::new(),
            started: Timestamp::now(),
            listen,
            is_simulated: !alone,
        });
        if !node.mounts_really {
            tracing::info!("{}", symlink_note());
        }
        let weak = Arc::downgrade(&node);
        node.endpoint.set_peer_check(Arc::new(move |peer| match weak.upgrade() {
            Some(node) if !node.check_peer(peer) => Err(PeerFault::WrongNode),
            _ => Ok(()),
        }));
        node.finish_operations().await.map_err(start)?;
        node.catalog.reload(&*node.driver).await.map_err(|error| start(error.into()))?;
        node.tidy_memory().await.map_err(start)?;
        for orphan in node.catalog.orphans() {
            tracing::warn!(place = orphan.place, "nobody knows this, it is left alone: {}", orphan.reason);
        }
        node.restore_mounts().await.map_err(start)?;
        Ok(node)
    }

    async fn tidy(self: Arc<Self>) {
        loop {
            tokio::select! {
                biased;
                () = self.cancel.cancelled() => return,
                () = tokio::time::sleep(TIDY_INTERVAL) => {}
            }
            self.outbox.drop_stale();
            self.inbox.suspend_stale().await;
            self.kept.tidy();
        }
    }

    /// Serves peers, and goes on with what was interrupted.
    pub(crate) async fn begin(self: &Arc<Self>, accepting: &CancellationToken) -> JoinSet<()> {
        let router = Router::new()
            .max_connections(CONNECTIONS_LIMIT)
            .members(ALPN, Arc::new(Replication::new(self.clone())))
            .members(MEMBER_ALPN, Arc::new(Membership(self.clone())))
            .anyone(ENROL_ALPN, Arc::new(Enrolment(self.clone())));
        let mut services = JoinSet::new();
        let (endpoint, accept) = (self.endpoint.clone(), accepting.clone());
        services.spawn(async move { router.serve(endpoint, accept).await });
        // Peers are told where this node listens before it says that it is ready.
        let _ = tokio::time::timeout(ANNOUNCE_TIMEOUT, self.sync_members()).await;
        self.tasks.spawn(self.clone().keep_members_in_sync());
        self.tasks.spawn(self.clone().tidy());
        self.resume_transfers();
        self.settle_handoffs();
        self.tasks.spawn(self.clone().follow_newer_primaries());
        services
    }

    /// Ends all work, where nobody is accepted any more.
    pub(crate) async fn end(&self, mut services: JoinSet<()>) {
        self.cancel.cancel();
        // Who was receiving parks what has arrived; only then is it suspended.
        let _ = tokio::time::timeout(GRACE, services.join_next()).await;
        self.shut_down().await;
    }

    async fn shut_down(&self) {
        self.tasks.close();
        if tokio::time::timeout(GRACE, self.tasks.wait()).await.is_err() {
            tracing::warn!(left = self.tasks.len(), "work did not come to an end in time");
        }
        self.inbox.suspend_all(GRACE).await;
        self.endpoint.shutdown(CloseCode::ShuttingDown).await;
    }

    /// This node's id in the words of snapshots.
    pub(crate) fn host_id(&self) -> HostId {
        let NodeId(bytes) = self.identity.node_id;
        HostId(bytes)
    }

    /// Shows this node as the API does.
    pub(crate) fn resource(&self) -> NodeResource {
        let (resident_bytes, peak_resident_bytes) = memory();
        NodeResource {
            name: self.name.clone(),
            id: self.identity.node_id.to_string(),
            cluster: self.identity.cluster.to_string(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            listen: self.listen.to_string(),
            addresses: self.advertised(),
            authority: self.authority.is_some(),
            certificate_expires: self.identity.not_after(),
            pid: std::process::id(),
            started: self.started,
            resident_bytes,
            peak_resident_bytes,
        }
    }

    /// Shows the pool as the API does.
    pub(crate) async fn pool_resource(&self) -> Result<PoolResource> {
        let scan = self.driver.scan().await?;
        Ok(PoolResource {
            capabilities: self.driver.capabilities().clone(),
            usage: self.driver.usage().await?,
            volumes: scan.volumes.len() as u64,
            orphans: scan.orphans,
        })
    }

    /// Refuses a peer whose name is known for another node.
    pub(crate) fn check_peer(&self, peer: &PeerIdentity) -> bool {
        let Some(known) = self.name_conflict(peer) else { return true };
        tracing::warn!(name = peer.name, id = %peer.node_id, %known, "refused a peer: its name belongs to another node");
        false
    }
}

/// Returns resident memory now and at its highest, in bytes (proc_pid_status(5): VmRSS, VmHWM, in kB).
fn memory() -> (u64, u64) {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name))?;
        let kilobytes: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
        Some(kilobytes * 1024)
    };
    (field("VmRSS:").unwrap_or(0), field("VmHWM:").unwrap_or(0))
}

/// Logs why something that has no caller to tell failed.
pub(crate) fn log_error(error: &dyn std::error::Error) {
    tracing::error!("{}", chain(error));
}
