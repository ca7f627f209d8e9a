//! What an endpoint sends and receives through: the operating system's UDP, or a network made for a test.
//!
//! The one seam to quinn's socket and runtime traits. Refuses to know what travels. Neighbour: [`crate::endpoint`].

use std::{
    io,
    net::{SocketAddr, UdpSocket},
    sync::Arc,
};

use quinn::{AsyncUdpSocket, EndpointConfig, Runtime, TokioRuntime};

use crate::batch::Batches;

/// Asked of the kernel for the socket, which may give less; a burst of a whole round trip fits.
const BUFFER: usize = 4 * 1024 * 1024;

/// The largest datagram, in bytes of UDP payload, where the path carries it: each costs its own encryption, headers and
/// acknowledgement. Two fill a send to the kernel; still larger ones gain no more than some hundredths (docs/BENCHMARKS.md).
pub(crate) const DATAGRAM_LIMIT: u16 = 32_000;

/// A bound socket, what drives it, and QUIC's parameters for it.
#[derive(Debug)]
pub struct Socket {
    pub(crate) udp: Arc<dyn AsyncUdpSocket>,
    pub(crate) runtime: Arc<dyn Runtime>,
    pub(crate) config: EndpointConfig,
}

impl Socket {
    /// Binds an address of this machine. Must be called within a tokio runtime.
    pub fn bind(addr: SocketAddr) -> io::Result<Self> {
        let socket = UdpSocket::bind(addr)?;
        widen_buffers(&socket);
        let runtime = TokioRuntime;
        let mut config = EndpointConfig::default();
        // What this side can receive is what the peer's discovery of the path's MTU goes up to; quinn's default is 1,472.
        config.max_udp_payload_size(DATAGRAM_LIMIT).map_err(io::Error::other)?;
        Ok(Self { udp: Arc::new(Batches::over(runtime.wrap_udp_socket(socket)?)), runtime: Arc::new(runtime), config })
    }

    /// Takes a socket of another network. Its tasks and timers are tokio's; `config` may carry a seed. The endpoint puts its own
    /// reset key and connection ids in.
    pub fn over(udp: Arc<dyn AsyncUdpSocket>, config: EndpointConfig) -> Self {
        Self { udp, runtime: Arc::new(TokioRuntime), config }
    }

    /// Returns what a bare endpoint of quinn is made of, for comparison.
    pub fn into_parts(self) -> (Arc<dyn AsyncUdpSocket>, Arc<dyn Runtime>, EndpointConfig) {
        (self.udp, self.runtime, self.config)
    }
}

/// Best effort: the kernel caps the sizes for users without `CAP_NET_ADMIN` (net.core.rmem_max), and a small buffer only costs
/// speed: a burst overruns it, and the congestion controller slows down.
fn widen_buffers(socket: &UdpSocket) {
    use rustix::net::sockopt::{
        set_socket_recv_buffer_size, set_socket_recv_buffer_size_force, set_socket_send_buffer_size,
    };
    if set_socket_recv_buffer_size_force(socket, BUFFER).is_err() {
        let _ = set_socket_recv_buffer_size(socket, BUFFER);
    }
    let _ = set_socket_send_buffer_size(socket, BUFFER);
}
