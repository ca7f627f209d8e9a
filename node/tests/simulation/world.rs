//! Nodes, their network, and what is asked of them: everything that a scenario acts on.

use std::{
    cell::RefCell,
    collections::{BTreeMap, VecDeque},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    rc::Rc,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use axum::http::Method;
use flocker_node::simulation::{Seat, SeatRequest, Simulated, make_cluster};
use flocker_storage::{
    drivers::memory::{MemoryPool, VolumeSight},
    simulation::{Installed, install},
};
use flocker_transport::Socket;
use serde_json::Value;
use tokio::task::JoinSet;
use turmoil::{Builder, Sim};

use crate::{
    fate::Fates,
    network::{Weather, Wire},
};

/// How long the simulated time of one step is.
const TICK: Duration = Duration::from_millis(5);
const PORT: u16 = 7801;
/// The longest a simulation may run, in simulated time.
const LONGEST: Duration = Duration::from_secs(24 * 3600);

static WORLDS: AtomicU32 = AtomicU32::new(0);

/// The number of a request.
pub(crate) type Ticket = u64;

/// One request to a node, and what becomes of it.
#[derive(Debug, Clone)]
struct Order {
    ticket: Ticket,
    method: Method,
    path: String,
    body: Value,
}

/// What the inside of a node shares with the outside.
#[derive(Default)]
struct Desk {
    orders: VecDeque<Order>,
    answers: BTreeMap<Ticket, (u16, Value)>,
    ready: bool,
    stop: bool,
    stopped: bool,
    failed: Option<String>,
}

/// The outside of a node.
pub(crate) struct Host {
    pub(crate) name: String,
    pub(crate) pool: Arc<MemoryPool>,
    pub(crate) up: bool,
    /// The fault point at which it died last, until somebody takes note.
    pub(crate) died_at: Option<String>,
    desk: Rc<RefCell<Desk>>,
}

/// All of it.
pub(crate) struct World {
    pub(crate) sim: Sim<'static>,
    pub(crate) hosts: Vec<Host>,
    pub(crate) fates: Rc<Fates>,
    pub(crate) weather: Arc<Mutex<Weather>>,
    tickets: Ticket,
    pools: Vec<String>,
    _folder: tempfile::TempDir,
    _hooks: Installed,
}

pub(crate) fn name_of(node: usize) -> String {
    format!("host-{}", char::from(b'a' + node as u8))
}

impl World {
    pub(crate) fn new(seed: u64, nodes: usize, put_back: Option<&'static str>) -> Self {
        let folder = tempfile::Builder::new().prefix("flocker-simulation-").tempdir_in(memory_folder()).unwrap();
        let mut builder = Builder::new();
        builder
            .rng_seed(seed)
            .tick_duration(TICK)
            .simulation_duration(LONGEST)
            .udp_capacity(4096)
            .min_message_latency(Duration::from_millis(1))
            .max_message_latency(Duration::from_millis(30));
        let mut sim = builder.build();
        // Pools belong to the process, and several worlds may be in it.
        let number = WORLDS.fetch_add(1, Ordering::Relaxed);
        let pools: Vec<String> = (0..nodes).map(|node| format!("simulation-{number}-{node}")).collect();
        let seats = seats(&folder, &pools, nodes);
        let memory: Vec<_> = pools.iter().map(|pool| MemoryPool::named(pool)).collect();
        let fates = Fates::new(seed, memory.clone(), put_back);
        let hooks = install(fates.clone());
        let weather = Arc::new(Mutex::new(Weather::new(seed)));
        let mut hosts = Vec::new();
        for (node, seat) in seats.into_iter().enumerate() {
            let desk = Rc::new(RefCell::new(Desk::default()));
            let pool = memory[node].clone();
            hosts.push(Host { name: seat.name.clone(), pool, up: true, died_at: None, desk: desk.clone() });
            let inside = Inside { node, seat, desk, fates: fates.clone(), weather: weather.clone() };
            sim.host(inside.seat.addr.ip(), move || run(inside.clone()));
        }
        Self { sim, hosts, fates, weather, tickets: 0, pools, _folder: folder, _hooks: hooks }
    }

    pub(crate) fn ip(&self, node: usize) -> IpAddr {
        address(node).ip()
    }

    /// Lets time go by.
    pub(crate) fn step(&mut self) {
        self.sim.step().unwrap();
        for node in 0..self.hosts.len() {
            if !self.hosts[node].up {
                continue;
            }
            if let Some(point) = self.fates.take_death(node) {
                self.hosts[node].died_at = Some(point);
                self.end_process(node);
            } else if self.hosts[node].desk.borrow().stopped {
                self.end_process(node);
            }
        }
    }

    /// Kills a node now.
    pub(crate) fn crash(&mut self, node: usize) {
        self.fates.kill(node);
        self.end_process(node);
    }

    fn end_process(&mut self, node: usize) {
        let ip = self.ip(node);
        self.sim.crash(ip);
        let host = &mut self.hosts[node];
        host.up = false;
        let mut desk = host.desk.borrow_mut();
        desk.orders.clear();
        desk.ready = false;
    }

    /// Starts a node that is down.
    pub(crate) fn start(&mut self, node: usize) {
        let ip = self.ip(node);
        *self.hosts[node].desk.borrow_mut() = Desk::default();
        self.hosts[node].up = true;
        self.sim.bounce(ip);
    }

    /// Stops a node in order; it takes its time.
    pub(crate) fn stop(&mut self, node: usize) {
        let mut desk = self.hosts[node].desk.borrow_mut();
        (desk.stop, desk.ready) = (true, false);
    }

    /// Whether a node is being stopped.
    pub(crate) fn is_stopping(&self, node: usize) -> bool {
        self.hosts[node].up && self.hosts[node].desk.borrow().stop
    }

    /// Whether a node answers.
    pub(crate) fn is_ready(&self, node: usize) -> bool {
        self.hosts[node].up && self.hosts[node].desk.borrow().ready
    }

    /// Why a node could not start.
    pub(crate) fn failure(&self, node: usize) -> Option<String> {
        self.hosts[node].desk.borrow().failed.clone()
    }

    /// Asks a node; the answer comes later, or never.
    pub(crate) fn ask(&mut self, node: usize, method: Method, path: &str, body: Value) -> Ticket {
        self.tickets += 1;
        let order = Order { ticket: self.tickets, method, path: path.to_owned(), body };
        self.hosts[node].desk.borrow_mut().orders.push_back(order);
        self.tickets
    }

    /// Takes an answer.
    pub(crate) fn answer(&self, node: usize, ticket: Ticket) -> Option<(u16, Value)> {
        self.hosts[node].desk.borrow_mut().answers.remove(&ticket)
    }

    /// Looks into a node's pool.
    pub(crate) fn look(&self, node: usize) -> Vec<VolumeSight> {
        self.hosts[node].pool.look()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for (node, pool) in self.pools.iter().enumerate() {
            if self.hosts[node].up {
                self.fates.kill(node);
                let ip = address(node).ip();
                self.sim.crash(ip);
            }
            MemoryPool::discard(pool);
        }
    }
}

/// A folder in memory where there is one: the state databases sync every write.
fn memory_folder() -> std::path::PathBuf {
    let shm = std::path::PathBuf::from("/dev/shm");
    if tempfile::tempfile_in(&shm).is_ok() { shm } else { std::env::temp_dir() }
}

fn address(node: usize) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::new(192, 168, 7, node as u8 + 1), PORT))
}

fn seats(folder: &tempfile::TempDir, pools: &[String], nodes: usize) -> Vec<Seat> {
    let rights = "[[rights]]\npeer = \"*\"\nvolumes = \"*\"\nverbs = [\"read\", \"push\", \"force\"]\n";
    let requests: Vec<_> = (0..nodes)
        .map(|node| SeatRequest {
            name: name_of(node),
            folder: folder.path().join(name_of(node)),
            addr: address(node),
            // The last node knows the portable format alone.
            config: match node + 1 == nodes {
                true => format!("pool = \"memory:{},portable\"\n{rights}", pools[node]),
                false => format!("pool = \"memory:{}\"\n{rights}", pools[node]),
            },
        })
        .collect();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(make_cluster(&requests)).unwrap()
}

#[derive(Clone)]
struct Inside {
    node: usize,
    seat: Seat,
    desk: Rc<RefCell<Desk>>,
    fates: Rc<Fates>,
    weather: Arc<Mutex<Weather>>,
}

/// The process of a node. Whatever dies in it dies in tasks of its own: the simulation goes on.
async fn run(inside: Inside) -> turmoil::Result {
    let mut process = JoinSet::new();
    process.spawn_local(serve(inside));
    let _ = process.join_next().await;
    std::future::pending().await
}

async fn serve(inside: Inside) {
    let Inside { node, seat, desk, fates, weather } = inside;
    let dead = fates.born(node);
    let udp = turmoil::net::UdpSocket::bind((Ipv4Addr::UNSPECIFIED, PORT)).await.unwrap();
    let mut config = quinn::EndpointConfig::default();
    config.rng_seed(Some(fates.random()));
    let socket = Socket::over(Arc::new(Wire::new(udp, weather, dead)), config);
    let running = match Simulated::start(&seat, socket).await {
        Ok(running) => running,
        Err(error) => {
            let source = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
            desk.borrow_mut().failed = Some(format!("{error}: {source}"));
            return;
        }
    };
    desk.borrow_mut().ready = true;
    let mut tasks = JoinSet::new();
    while !desk.borrow().stop {
        let orders: Vec<Order> = desk.borrow_mut().orders.drain(..).collect();
        for order in orders {
            let (client, desk) = (running.client(), desk.clone());
            tasks.spawn_local(async move {
                let answer = client.ask(order.method, &order.path, &order.body).await;
                desk.borrow_mut().answers.insert(order.ticket, answer);
            });
        }
        while tasks.try_join_next().is_some() {}
        tokio::time::sleep(TICK).await;
    }
    tasks.shutdown().await;
    running.stop().await;
    desk.borrow_mut().stopped = true;
}
