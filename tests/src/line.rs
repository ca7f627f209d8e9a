//! A line between two hosts that is as bad as a test wants it: long, lossy, narrow, or cut.
//!
//! Each [`End`] is a network namespace with a TUN device, through which everything but itself is reached. Two threads of the
//! test carry IP packets from one device to the other, so that UDP and TCP fare alike. A packet is lost, queued and delayed
//! by the [`Quality`] of the line and a seed; nothing else drops one. Nodes with [`Options::end`](crate::Options) run in a
//! namespace; what they have on disk and their sockets are the machine's.
//!
//! The devices go with the threads, the namespaces with the processes that hold them, which the kernel kills with the test.
//! Neighbour: [`crate::proxy`], which needs no root, and knows UDP only.

use std::{
    collections::VecDeque,
    fs::{self, File},
    net::{Ipv4Addr, SocketAddr},
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use rand::{Rng as _, rngs::StdRng};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    thread::{LinkNameSpaceType, move_into_link_name_space},
};
use tun_rs::{DeviceBuilder, SyncDevice};

use crate::{
    data,
    needs::program,
    scratch::run,
    wait::{SHORT, wait_until},
};

/// The name of the device in each namespace.
const DEVICE: &str = "line";

/// The longest packet, as on Ethernet.
const MTU: u16 = 1500;

/// Packets that a device holds until its thread takes them: enough that the line alone drops any.
const DEVICE_QUEUE: u32 = 20_000;

/// Packets taken in a row before those that are due get their turn.
const BURST: usize = 64;

/// How soon a thread notices that the line is over.
const IDLE: Duration = Duration::from_millis(20);

/// Where nodes listen, each in its own namespace.
const PORT: u16 = 7801;

/// How good a line is, the same in both directions.
#[derive(Debug, Clone, Copy, Default)]
pub struct Quality {
    /// How long a packet takes, one way.
    pub delay: Duration,
    /// The share of packets that are lost at random, from 0 to 1.
    pub loss: f64,
    /// Its narrowest place, where it has one.
    pub bottleneck: Option<Bottleneck>,
}

/// A place where packets queue up.
#[derive(Debug, Clone, Copy)]
pub struct Bottleneck {
    /// How fast it lets bytes through, those of IP headers included.
    pub bytes_per_second: u64,
    /// How many packets may wait; further ones are dropped.
    pub queue: usize,
}

/// One end of a line: a network namespace. Gone when it is dropped.
#[derive(Debug)]
pub struct End {
    holder: Child,
    address: Mutex<Ipv4Addr>,
}

/// A line that carries packets. Ends when it is dropped.
#[derive(Debug)]
pub struct Line {
    /// The two ends of it.
    pub ends: [Arc<End>; 2],
    state: Arc<State>,
    carriers: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct State {
    quality: Mutex<Quality>,
    cut: AtomicBool,
    over: AtomicBool,
    carried_bytes: AtomicU64,
    lost: AtomicU64,
    overflowed: AtomicU64,
    dropped: AtomicU64,
}

impl Line {
    /// Makes two ends and a perfect line between them. Needs what `require("tun")` asks for.
    #[track_caller]
    pub fn start(seed: u64) -> Self {
        let ends = [1, 2].map(|number| Arc::new(End::make(Ipv4Addr::new(10, 77, 0, number))));
        let [left, right] = ends.each_ref().map(|end| Arc::new(end.open_device()));
        for end in &ends {
            end.ip(&["link", "set", "lo", "up"]);
            end.ip(&["link", "set", DEVICE, "up"]);
            end.settle(end.address());
        }
        let state = Arc::new(State {
            quality: Mutex::default(),
            cut: AtomicBool::new(false),
            over: AtomicBool::new(false),
            carried_bytes: AtomicU64::new(0),
            lost: AtomicU64::new(0),
            overflowed: AtomicU64::new(0),
            dropped: AtomicU64::new(0),
        });
        let ways = [(Arc::clone(&left), Arc::clone(&right)), (right, left)];
        let carriers = (0..).zip(ways).map(|(number, (from, to))| {
            let (state, random) = (Arc::clone(&state), data::random(seed.wrapping_add(number)));
            thread::spawn(move || carry(&from, &to, &state, random))
        });
        Self { carriers: carriers.collect(), ends, state }
    }

    /// Makes the line as good as this from now on. What is on its way keeps its time.
    pub fn set(&self, quality: Quality) {
        *self.state.quality.lock().expect("no panic under the lock") = quality;
    }

    /// Drops everything from now on.
    pub fn cut(&self) {
        self.state.cut.store(true, Ordering::SeqCst);
    }

    /// Lets everything through again.
    pub fn mend(&self) {
        self.state.cut.store(false, Ordering::SeqCst);
    }

    /// Returns how many packets were dropped because the line was cut.
    pub fn dropped(&self) -> u64 {
        self.state.dropped.load(Ordering::SeqCst)
    }

    /// Returns how many packets were lost at random.
    pub fn lost(&self) -> u64 {
        self.state.lost.load(Ordering::SeqCst)
    }

    /// Returns how many packets found the bottleneck's queue full.
    pub fn overflowed(&self) -> u64 {
        self.state.overflowed.load(Ordering::SeqCst)
    }

    /// Returns how many bytes were carried in both directions.
    pub fn carried_bytes(&self) -> u64 {
        self.state.carried_bytes.load(Ordering::SeqCst)
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.state.over.store(true, Ordering::SeqCst);
        for carrier in self.carriers.drain(..) {
            let _ = carrier.join();
        }
    }
}

impl End {
    #[track_caller]
    fn make(address: Ipv4Addr) -> Self {
        let waiting = ["--pdeathsig", "KILL", "unshare", "--net", "sleep", "100000"];
        let holder = Command::new("setpriv").args(waiting).stdin(Stdio::null()).spawn().expect("make a namespace");
        let end = Self { holder, address: Mutex::new(address) };
        let own = fs::read_link("/proc/self/ns/net").expect("a network namespace");
        wait_until("the namespace is there", SHORT, || {
            let its = fs::read_link(end.namespace()).ok()?;
            (its != own).then_some(())
        });
        end
    }

    /// Returns its address.
    pub fn address(&self) -> Ipv4Addr {
        *self.address.lock().expect("no panic under the lock")
    }

    /// Returns where its node listens.
    pub fn listen(&self) -> SocketAddr {
        (self.address(), PORT).into()
    }

    /// Takes its address away and gives it another one, as a host does that joins another network.
    #[track_caller]
    pub fn move_to(&self, address: Ipv4Addr) {
        self.ip(&["address", "del", &format!("{}/32", self.address()), "dev", DEVICE]);
        self.settle(address);
        *self.address.lock().expect("no panic under the lock") = address;
    }

    /// Makes a call of a program that runs at it.
    pub fn command(&self, program: &Path) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.namespace().display())).arg("--").arg(program);
        command
    }

    /// Returns the words before a program's name that let it run at it.
    pub fn words(&self) -> String {
        format!("nsenter --net={} --", self.namespace().display())
    }

    fn namespace(&self) -> PathBuf {
        Path::new("/proc").join(self.holder.id().to_string()).join("ns/net")
    }

    /// Gives the device an address, and lets everything go through the device. The kernel drops a device's routes with its last
    /// address.
    #[track_caller]
    fn settle(&self, address: Ipv4Addr) {
        self.ip(&["address", "add", &format!("{address}/32"), "dev", DEVICE]);
        self.ip(&["route", "replace", "default", "dev", DEVICE]);
    }

    #[track_caller]
    fn ip(&self, arguments: &[&str]) {
        run(self.command(&program("ip").expect("the program ip is there")).args(arguments));
    }

    /// Makes the device. A thread of its own enters the namespace, since it does not come back.
    #[track_caller]
    fn open_device(&self) -> SyncDevice {
        let namespace = File::open(self.namespace()).expect("open the namespace");
        let opening = thread::spawn(move || {
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
            let device = DeviceBuilder::new().name(DEVICE).mtu(MTU).tx_queue_len(DEVICE_QUEUE).build_sync()?;
            device.set_nonblocking(true)?;
            std::io::Result::Ok(device)
        });
        opening.join().expect("no panic").expect("make a TUN device")
    }
}

impl Drop for End {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

/// Carries packets one way until the line is over.
fn carry(from: &SyncDevice, to: &SyncDevice, state: &State, random: StdRng) {
    let mut way = Way { random, queued: VecDeque::new() };
    let mut under_way: VecDeque<(Instant, Vec<u8>)> = VecDeque::new();
    let mut packet = [0; MTU as usize];
    while !state.over.load(Ordering::SeqCst) {
        let now = Instant::now();
        for _ in 0..BURST {
            let Ok(length) = from.recv(&mut packet) else { break };
            under_way.extend(way.admit(&packet[..length], now, state).map(|due| (due, packet[..length].to_vec())));
        }
        while let Some((_, packet)) = under_way.pop_front_if(|(due, _)| *due <= now) {
            state.carried_bytes.fetch_add(packet.len() as u64, Ordering::SeqCst);
            let _ = to.send(&packet);
        }
        let until_due = under_way.front().map_or(IDLE, |(due, _)| due.saturating_duration_since(Instant::now()));
        let pause = Timespec { tv_sec: 0, tv_nsec: until_due.min(IDLE).subsec_nanos().into() };
        let _ = poll(&mut [PollFd::new(from, PollFlags::IN)], Some(&pause));
    }
}

/// One direction.
struct Way {
    random: StdRng,
    /// When each packet in the bottleneck will be through it.
    queued: VecDeque<Instant>,
}

impl Way {
    /// Tells when a packet arrives, if it does.
    fn admit(&mut self, packet: &[u8], now: Instant, state: &State) -> Option<Instant> {
        // What the kernel says by itself to its neighbours is IPv6; it would take random numbers at random times.
        if packet.first().is_none_or(|byte| byte >> 4 != 4) {
            return None;
        }
        let drop_as = |counter: &AtomicU64| {
            counter.fetch_add(1, Ordering::SeqCst);
            None
        };
        let quality = *state.quality.lock().expect("no panic under the lock");
        let is_lost = quality.loss > 0.0 && self.random.random_bool(quality.loss);
        if state.cut.load(Ordering::SeqCst) {
            return drop_as(&state.dropped);
        }
        if is_lost {
            return drop_as(&state.lost);
        }
        let Some(narrow) = quality.bottleneck else { return Some(now + quality.delay) };
        while self.queued.pop_front_if(|through| *through <= now).is_some() {}
        if self.queued.len() > narrow.queue {
            return drop_as(&state.overflowed);
        }
        let takes = Duration::from_secs_f64(packet.len() as f64 / narrow.bytes_per_second as f64);
        let through = self.queued.back().map_or(now, |last| *last) + takes;
        self.queued.push_back(through);
        Some(through + quality.delay)
    }
}
