//! A UDP socket whose datagrams are counted. Neighbours: `socket` opens one for each connection, if there is a meter.

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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::PutOff;
    use std::{
        sync::atomic::{AtomicU64, Ordering},
        task::Waker,
    };

    #[derive(Debug, Default)]
    struct Sum(AtomicU64);

    impl Meter for Sum {
        fn moved(&self, bytes: u64) {
            self.0.fetch_add(bytes, Ordering::Relaxed);
        }

        fn count(&self) -> u64 {
            self.0.load(Ordering::Relaxed)
        }

        fn may_begin(&self, _: u64) -> Result<(), PutOff> {
            Ok(())
        }

        fn may_go_on(&self, _: u64) -> Result<(), PutOff> {
            Ok(())
        }
    }

    /// Never asked.
    #[derive(Debug)]
    struct Silent;

    impl AsyncUdpSocket for Silent {
        fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
            unreachable!("nothing is sent")
        }

        fn try_send(&self, _: &Transmit<'_>) -> io::Result<()> {
            Ok(())
        }

        fn poll_recv(
            &self,
            _: &mut Context<'_>,
            _: &mut [IoSliceMut<'_>],
            _: &mut [RecvMeta],
        ) -> Poll<io::Result<usize>> {
            Poll::Pending
        }

        fn local_addr(&self) -> io::Result<SocketAddr> {
            Err(io::ErrorKind::Unsupported.into())
        }
    }

    /// What was received is counted when it is handed on, each buffer by its own length.
    #[derive(Debug)]
    struct Received;

    impl AsyncUdpSocket for Received {
        fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
            unreachable!("nothing is sent")
        }

        fn try_send(&self, _: &Transmit<'_>) -> io::Result<()> {
            Err(io::ErrorKind::WouldBlock.into())
        }

        fn poll_recv(
            &self,
            _: &mut Context<'_>,
            _: &mut [IoSliceMut<'_>],
            meta: &mut [RecvMeta],
        ) -> Poll<io::Result<usize>> {
            let addr = SocketAddr::from(([192, 0, 2, 1], 1));
            for (one, (len, stride)) in meta.iter_mut().zip([(3_000, 1_200), (40, 40), (9_999, 9_999)]) {
                *one = RecvMeta { addr, len, stride, ..RecvMeta::default() };
            }
            Poll::Ready(Ok(2))
        }

        fn local_addr(&self) -> io::Result<SocketAddr> {
            Err(io::ErrorKind::Unsupported.into())
        }
    }

    #[test]
    fn what_is_received_counts_and_what_could_not_be_sent_does_not() {
        let meter = Arc::new(Sum::default());
        let counted = Counted { socket: Arc::new(Received), meter: meter.clone() };
        let mut meta = [RecvMeta::default(); 3];
        let received = counted.poll_recv(&mut Context::from_waker(Waker::noop()), &mut [], &mut meta);
        assert!(matches!(received, Poll::Ready(Ok(2))));
        // Three datagrams and one.
        assert_eq!(meter.count(), 3_000 + 40 + 4 * HEADER_BYTES_V4);
        let transmit = Transmit {
            destination: SocketAddr::from(([192, 0, 2, 1], 1)),
            ecn: None,
            contents: &[0; 100],
            segment_size: None,
            src_ip: None,
        };
        counted.try_send(&transmit).unwrap_err();
        assert_eq!(meter.count(), 3_000 + 40 + 4 * HEADER_BYTES_V4);
    }

    #[test]
    fn each_datagram_has_the_headers_of_its_family() {
        let meter = Arc::new(Sum::default());
        let counted = Counted { socket: Arc::new(Silent), meter: meter.clone() };
        let count = |peer: &str, bytes, segment| {
            let before = meter.count();
            counted.count(peer.parse().unwrap(), bytes, segment);
            meter.count() - before
        };
        let [v4, v6, mapped] = ["192.0.2.1:9", "[2001:db8::1]:9", "[::ffff:192.0.2.1]:9"];
        assert_eq!([v4, v6, mapped].map(|peer| count(peer, 1_200, 1_200)), [1_228, 1_248, 1_228]);
        // Three whole ones, and a short last one.
        assert_eq!([v4, v6].map(|peer| count(peer, 3_700, 1_200)), [3_700 + 4 * 28, 3_700 + 4 * 48]);
        assert_eq!(count(v4, 2_400, 1_200), 2_400 + 2 * 28);
        // An empty datagram has headers too, and nobody divides by the length of its segments.
        assert_eq!([count(v4, 0, 0), count(v6, 0, 1_200)], [28, 48]);
        // What is sent in one piece has no segments.
        let transmit = |segment_size| Transmit {
            destination: v4.parse().unwrap(),
            ecn: None,
            contents: &[7; 3_000],
            segment_size,
            src_ip: None,
        };
        let before = meter.count();
        counted.try_send(&transmit(None)).unwrap();
        counted.try_send(&transmit(Some(1_000))).unwrap();
        assert_eq!(meter.count() - before, 6_000 + (1 + 3) * 28);
    }
}
