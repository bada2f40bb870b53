//! Whom an address is counted to. Neighbours: `server` seats handshakes and enrolments by it.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

/// One IPv4 address; of IPv6 the 64 bits that one network is given, whose other half its owner chooses freely.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Source(IpAddr);

impl From<SocketAddr> for Source {
    fn from(address: SocketAddr) -> Self {
        Self(match address.ip().to_canonical() {
            IpAddr::V6(ip) => Ipv6Addr::from_bits(ip.to_bits() >> 64 << 64).into(),
            ip @ IpAddr::V4(_) => ip,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_counted_to_its_owner() {
        let source = |text: &str| Source::from(text.parse::<SocketAddr>().unwrap());
        assert_eq!(source("192.0.2.7:1"), source("192.0.2.7:2"));
        assert_eq!(source("192.0.2.7:1"), source("[::ffff:192.0.2.7]:1"), "a socket for both families");
        assert_ne!(source("192.0.2.7:1"), source("192.0.2.8:1"));
        assert_eq!(source("[2001:db8::1]:1"), source("[2001:db8::ffff:0:2]:1"));
        assert_ne!(source("[2001:db8::1]:1"), source("[2001:db8:0:1::1]:1"));
    }
}
