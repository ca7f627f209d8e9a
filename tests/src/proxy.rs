//! A line between two nodes that a test can slow down and cut: a forwarder of UDP datagrams.

use std::{
    collections::HashMap,
    net::{SocketAddr, UdpSocket},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

/// The longest datagram: what fits in one IP packet.
const DATAGRAM_LIMIT: usize = 65_536;

/// A running forwarder. Its threads end with it.
#[derive(Debug)]
pub struct Proxy {
    /// Where it listens; what the node behind it advertises.
    pub address: SocketAddr,
    line: Arc<Line>,
}

#[derive(Debug)]
struct Line {
    cut: AtomicBool,
    over: AtomicBool,
    /// Bytes per second in each direction, 0 for no limit.
    rate: AtomicU64,
    forwarded: AtomicU64,
    dropped: AtomicU64,
}

impl Proxy {
    /// Starts a forwarder to `target`.
    pub fn start(target: SocketAddr) -> Self {
        let socket = UdpSocket::bind("127.0.0.1:0").expect("bind the proxy");
        let address = socket.local_addr().expect("a bound socket has an address");
        let line = Arc::new(Line {
            cut: AtomicBool::new(false),
            over: AtomicBool::new(false),
            rate: AtomicU64::new(0),
            forwarded: AtomicU64::new(0),
            dropped: AtomicU64::new(0),
        });
        let forwarder = Arc::clone(&line);
        thread::spawn(move || forward(&Arc::new(socket), target, &forwarder));
        Self { address, line }
    }

    /// Drops everything from now on.
    pub fn cut(&self) {
        self.line.cut.store(true, Ordering::SeqCst);
    }

    /// Lets everything through again.
    pub fn mend(&self) {
        self.line.cut.store(false, Ordering::SeqCst);
    }

    /// Limits each direction to this many bytes per second; 0 for no limit.
    pub fn limit(&self, bytes_per_second: u64) {
        self.line.rate.store(bytes_per_second, Ordering::SeqCst);
    }

    /// Returns how many datagrams were dropped while the line was cut.
    pub fn dropped(&self) -> u64 {
        self.line.dropped.load(Ordering::SeqCst)
    }

    /// Returns how many bytes have been forwarded in both directions.
    pub fn forwarded_bytes(&self) -> u64 {
        self.line.forwarded.load(Ordering::SeqCst)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.line.over.store(true, Ordering::SeqCst);
    }
}

type Clients = Arc<Mutex<HashMap<SocketAddr, Arc<UdpSocket>>>>;

fn forward(socket: &Arc<UdpSocket>, target: SocketAddr, line: &Arc<Line>) {
    let clients: Clients = Arc::default();
    let mut datagram = vec![0; DATAGRAM_LIMIT];
    let mut pace = Pace::new();
    socket.set_read_timeout(Some(Duration::from_millis(50))).expect("set a time-out");
    while !line.over.load(Ordering::SeqCst) {
        let Ok((length, client)) = socket.recv_from(&mut datagram) else { continue };
        let known = clients.lock().expect("no panic under the lock").get(&client).cloned();
        let upstream = known.unwrap_or_else(|| {
            let upstream = Arc::new(UdpSocket::bind("127.0.0.1:0").expect("bind towards the target"));
            upstream.connect(target).expect("connect towards the target");
            let (back, from, line) = (Arc::clone(socket), Arc::clone(&upstream), Arc::clone(line));
            thread::spawn(move || answer(&back, client, &from, &line));
            clients.lock().expect("no panic under the lock").insert(client, Arc::clone(&upstream));
            upstream
        });
        if pace.lets_through(line, length) {
            let _ = upstream.send(&datagram[..length]);
        }
    }
}

fn answer(socket: &UdpSocket, client: SocketAddr, upstream: &UdpSocket, line: &Line) {
    let mut datagram = vec![0; DATAGRAM_LIMIT];
    let mut pace = Pace::new();
    upstream.set_read_timeout(Some(Duration::from_millis(50))).expect("set a time-out");
    while !line.over.load(Ordering::SeqCst) {
        let Ok(length) = upstream.recv(&mut datagram) else { continue };
        if pace.lets_through(line, length) {
            let _ = socket.send_to(&datagram[..length], client);
        }
    }
}

/// Spaces out the datagrams of one direction. While it holds one back, the kernel's buffer fills and then drops, as a
/// real bottleneck does.
struct Pace {
    free_at: Instant,
}

impl Pace {
    fn new() -> Self {
        Self { free_at: Instant::now() }
    }

    fn lets_through(&mut self, line: &Line, length: usize) -> bool {
        if line.cut.load(Ordering::SeqCst) {
            line.dropped.fetch_add(1, Ordering::SeqCst);
            return false;
        }
        let rate = line.rate.load(Ordering::SeqCst);
        if rate > 0 {
            let now = Instant::now();
            self.free_at = self.free_at.max(now) + Duration::from_secs_f64(length as f64 / rate as f64);
            // Short debts are gathered: the timer is coarser than one datagram takes.
            let debt = self.free_at - now;
            if debt > Duration::from_millis(2) {
                thread::sleep(debt);
            }
        }
        line.forwarded.fetch_add(length as u64, Ordering::SeqCst);
        true
    }
}
