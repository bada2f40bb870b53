//! A UDP socket whose datagrams are counted. Neighbours: `device` opens one for each connection, if it has a meter.

use crate::Meter;
use quinn::{
    AsyncUdpSocket, UdpPoller,
    udp::{RecvMeta, Transmit},
};
use std::{
    io::{self, IoSliceMut},
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

/// IP and UDP headers of a datagram; options and extensions are rare.
const HEADER_BYTES_V4: u64 = 20 + 8;
const HEADER_BYTES_V6: u64 = 40 + 8;

/// See the module.
#[derive(Debug)]
pub(super) struct Counted {
    pub(super) socket: Arc<dyn AsyncUdpSocket>,
    pub(super) meter: Arc<dyn Meter>,
}

impl Counted {
    /// Several datagrams may come in one buffer, each but the last as long as `segment`.
    fn count(&self, peer: SocketAddr, bytes: usize, segment: usize) {
        let datagrams = bytes.div_ceil(segment.max(1)).max(1) as u64;
        let is_v4 = peer.ip().to_canonical().is_ipv4();
        let header = if is_v4 { HEADER_BYTES_V4 } else { HEADER_BYTES_V6 };
        self.meter.moved(bytes as u64 + datagrams * header);
    }
}

impl AsyncUdpSocket for Counted {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Arc::clone(&self.socket).create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        self.socket.try_send(transmit)?;
        let bytes = transmit.contents.len();
        self.count(transmit.destination, bytes, transmit.segment_size.unwrap_or(bytes));
        Ok(())
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let received = ready!(self.socket.poll_recv(cx, bufs, meta))?;
        for one in meta.iter().take(received) {
            self.count(one.addr, one.len, one.stride);
        }
        Poll::Ready(Ok(received))
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.socket.max_transmit_segments()
    }

    fn max_receive_segments(&self) -> usize {
        self.socket.max_receive_segments()
    }

    fn may_fragment(&self) -> bool {
        self.socket.may_fragment()
    }
}
