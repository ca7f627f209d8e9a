//! The network between simulated nodes: turmoil's UDP behind quinn's socket trait, with loss on top.

use std::{
    fmt, io,
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
};

use quinn::{
    AsyncUdpSocket, UdpPoller,
    udp::{RecvMeta, Transmit},
};
use rand::{Rng, SeedableRng, rngs::SmallRng};
use turmoil::net::UdpSocket;

/// What the network does to datagrams besides turmoil's latencies and partitions. One for all sockets, so that the seed decides.
#[derive(Debug)]
pub(crate) struct Weather {
    rng: SmallRng,
    /// Of how many datagrams one is lost; none are when it is 0.
    pub(crate) lost_of: u32,
    /// Of how many datagrams one comes twice.
    pub(crate) doubled_of: u32,
}

impl Weather {
    pub(crate) fn new(seed: u64) -> Self {
        Self { rng: SmallRng::seed_from_u64(seed ^ 0x77ea_74e4), lost_of: 0, doubled_of: 0 }
    }

    fn copies(&mut self) -> usize {
        let mut hits = |of: u32| of > 0 && self.rng.random_range(0..of) == 0;
        if hits(self.lost_of) { 0 } else { 1 + usize::from(hits(self.doubled_of)) }
    }
}

type Readable = Pin<Box<dyn Future<Output = io::Result<()>> + Send>>;

/// One node's socket.
pub(crate) struct Wire {
    udp: Arc<UdpSocket>,
    weather: Arc<Mutex<Weather>>,
    /// The node is dead and only its process does not know yet.
    dead: Arc<AtomicBool>,
    readable: Mutex<Option<Readable>>,
}

impl Wire {
    pub(crate) fn new(udp: UdpSocket, weather: Arc<Mutex<Weather>>, dead: Arc<AtomicBool>) -> Self {
        Self { udp: Arc::new(udp), weather, dead, readable: Mutex::new(None) }
    }
}

impl fmt::Debug for Wire {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Wire").field("udp", &self.udp).finish_non_exhaustive()
    }
}

#[derive(Debug)]
struct AlwaysWritable;

impl UdpPoller for AlwaysWritable {
    fn poll_writable(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

impl AsyncUdpSocket for Wire {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(AlwaysWritable)
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        if self.dead.load(Ordering::SeqCst) {
            return Ok(());
        }
        let copies = self.weather.lock().unwrap().copies();
        for _ in 0..copies {
            // A partition is a lost datagram, never an error, as on a real network.
            let _ = self.udp.try_send_to(transmit.contents, transmit.destination);
        }
        Ok(())
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [io::IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let mut readable = self.readable.lock().unwrap();
        loop {
            if let Some(waiting) = readable.as_mut() {
                match waiting.as_mut().poll(cx) {
                    Poll::Pending => return Poll::Pending,
                    // It holds the socket's lock until it is dropped.
                    Poll::Ready(_) => *readable = None,
                }
            }
            match self.udp.try_recv_from(&mut bufs[0]) {
                Ok((len, addr)) => {
                    meta[0] = RecvMeta { addr, len, stride: len, ecn: None, dst_ip: None };
                    return Poll::Ready(Ok(1));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let udp = self.udp.clone();
                    *readable = Some(Box::pin(async move { udp.readable().await }));
                }
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.udp.local_addr()
    }

    fn may_fragment(&self) -> bool {
        false
    }
}
