//! A UDP socket whose sends fit the kernel: a batch of datagrams that is larger than one send may be goes in several.
//!
//! quinn hands over up to ten datagrams of one size at a time, to be cut by the kernel (UDP_SEGMENT, udp(7)). All of them
//! together may have 65,507 bytes at most, as one datagram over IPv4 may; a larger batch fails with EMSGSIZE, which quinn takes
//! for a path that does not carry such datagrams any more. Neighbour: [`crate::socket`].

use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use quinn::{
    AsyncUdpSocket, UdpPoller,
    udp::{RecvMeta, Transmit},
};

/// The largest payload of one send, in bytes: 65,535 without the headers of IPv4 and UDP.
const SEND_LIMIT: usize = 65_507;

/// A socket that takes batches of any size.
#[derive(Debug)]
pub(crate) struct Batches<S: ?Sized>(Arc<S>);

impl<S: ?Sized> Batches<S> {
    pub(crate) fn over(socket: Arc<S>) -> Self {
        Self(socket)
    }
}

impl<S: AsyncUdpSocket + ?Sized> AsyncUdpSocket for Batches<S> {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        self.0.clone().create_io_poller()
    }

    /// What is refused half-way is handed over again from its beginning; QUIC drops what arrives twice.
    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let Some(size) = transmit.segment_size.filter(|_| transmit.contents.len() > SEND_LIMIT) else {
            return self.0.try_send(transmit);
        };
        let most = (SEND_LIMIT / size).max(1) * size;
        transmit.contents.chunks(most).try_for_each(|contents| {
            let segment_size = Some(size).filter(|size| contents.len() > *size);
            self.0.try_send(&Transmit { contents, segment_size, ..transmit.clone() })
        })
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [io::IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        self.0.poll_recv(cx, bufs, meta)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.0.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.0.max_transmit_segments()
    }

    fn max_receive_segments(&self) -> usize {
        self.0.max_receive_segments()
    }

    fn may_fragment(&self) -> bool {
        self.0.may_fragment()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::{net::UdpSocket, time::Duration};

    use quinn::{Runtime as _, TokioRuntime};

    use super::*;

    #[tokio::test]
    async fn a_batch_of_any_size_arrives_as_its_datagrams() {
        let receiver = UdpSocket::bind("127.0.0.1:0").unwrap();
        receiver.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
        let sender = Arc::new(Batches::over(TokioRuntime.wrap_udp_socket(sender).unwrap()));
        let mut poller = sender.clone().create_io_poller();
        let mut buffer = vec![0; 1 << 16];
        for (size, count, last) in
            [(1_200, 10, 1_200), (6_551, 10, 1), (16_000, 10, 16_000), (32_000, 5, 9_000), (65_507, 3, 7)]
        {
            let mut sent: Vec<u8> = (0..count).flat_map(|nth| vec![nth; size]).collect();
            sent.truncate(size * (usize::from(count) - 1) + last);
            let (destination, segment_size) = (receiver.local_addr().unwrap(), Some(size));
            let transmit = Transmit { destination, ecn: None, contents: &sent, segment_size, src_ip: None };
            std::future::poll_fn(|cx| poller.as_mut().poll_writable(cx)).await.unwrap();
            sender.try_send(&transmit).unwrap();
            for datagram in sent.chunks(size) {
                let length = receiver.recv(&mut buffer).unwrap();
                assert!(buffer[..length] == *datagram, "{size}, {count}: {length} of {} bytes", datagram.len());
            }
        }
    }
}
