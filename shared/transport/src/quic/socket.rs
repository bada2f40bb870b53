//! UDP sockets with buffers that survive a burst. Neighbours: `server` binds one, `device` one for each connection.

use super::counted::Counted;
use crate::Meter;
use quinn::{AsyncUdpSocket, Runtime as _, TokioRuntime};
use socket2::{Domain, Protocol, Socket, Type};
use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    sync::Arc,
};

/// Wanted in each direction. The kernel may give less (`net.core.rmem_max`), which is logged and lived with.
const BUFFER_BYTES: usize = 4 << 20;

/// A socket bound to this address. A wildcard IPv6 address also takes IPv4.
pub(super) fn bind(address: SocketAddr) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
    if address.is_ipv6() && address.ip().is_unspecified() {
        socket.set_only_v6(false)?;
    }
    socket.set_recv_buffer_size(BUFFER_BYTES)?;
    socket.set_send_buffer_size(BUFFER_BYTES)?;
    let (receive, send) = (socket.recv_buffer_size()?, socket.send_buffer_size()?);
    if receive < BUFFER_BYTES || send < BUFFER_BYTES {
        tracing::debug!(receive, send, wanted = BUFFER_BYTES, "the kernel limits the socket's buffers");
    }
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    Ok(socket.into())
}

/// A device's sockets, counted if anything is.
#[derive(Debug, Clone, Default)]
pub(super) struct Sockets {
    pub(super) meter: Option<Arc<dyn Meter>>,
}

impl Sockets {
    /// One on any port, for reaching this address.
    pub(super) fn towards(&self, remote: SocketAddr) -> io::Result<Arc<dyn AsyncUdpSocket>> {
        let socket = TokioRuntime.wrap_udp_socket(bind(any_towards(remote))?)?;
        Ok(match &self.meter {
            Some(meter) => Arc::new(Counted { socket, meter: Arc::clone(meter) }),
            None => socket,
        })
    }
}

/// Any port of the family of this address.
pub(super) fn any_towards(remote: SocketAddr) -> SocketAddr {
    if remote.is_ipv4() { (Ipv4Addr::UNSPECIFIED, 0).into() } else { (Ipv6Addr::UNSPECIFIED, 0).into() }
}
