//! A port for a process that is killed and comes back to it: below those that systems give to sockets that name none
//! (32768 and up on Linux, 49152 elsewhere), or a device's next socket could have it meanwhile.

use std::{
    io::{Error, ErrorKind},
    net::UdpSocket,
    ops::Range,
};

const PORTS: Range<u16> = 20_000..32_000;
const TRIES: usize = 100;

/// One that nobody has now, on the loopback.
///
/// # Errors
/// When a hundred drawn ones were all taken.
pub fn lasting() -> Result<u16, Error> {
    let drawn = (0..TRIES).map(|_| rand::random_range(PORTS));
    let mut free = drawn.filter(|&port| UdpSocket::bind(("127.0.0.1", port)).is_ok());
    free.next().ok_or_else(|| {
        Error::new(ErrorKind::AddrInUse, format!("expected a free port in {PORTS:?}, found none"))
    })
}
