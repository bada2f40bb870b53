//! The carrier for real: QUIC over UDP, TLS 1.3 with certificates on both sides, both ALPNs on one port.
//! Neighbours: `tls` says who is trusted; `serve` and `session` speak over the streams opened here.
//!
//! | number | value | why |
//! |---|---|---|
//! | windows | see `limits` | what peers can make us hold |
//! | streams | 16 in both directions, none in one | a device needs two |
//! | socket buffers | 4 MiB | loss in a burst of 200 connections falls from 8–10 % to under 0.4 % |
//! | idle time-out | twice the stall window | a stall is told before the connection goes |
//! | keep-alive | every 10 s, on a connection that transfers | a sleeping device must not be woken by its own pings |

mod socket;
mod counted;
mod path;
mod source;
mod server;
mod device;

pub use device::{QuicWire, enroll};
pub use server::{BindError, QuicServer};

use crate::{
    IdentityError,
    limits::{CONNECTION_WINDOW_BYTES, Congestion},
};
use quinn::{
    IdleTimeout, TransportConfig, VarInt,
    congestion::{BbrConfig, ControllerFactory, CubicConfig},
};
use std::{sync::Arc, time::Duration};

const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// Application codes of a closed connection.
mod code {
    use quinn::VarInt;

    /// Nothing is wrong.
    pub(super) const DONE: VarInt = VarInt::from_u32(0);
    /// No certificate on an ALPN that needs one, or one that names no device.
    pub(super) const NO_IDENTITY: VarInt = VarInt::from_u32(1);
    /// Too many connections.
    pub(super) const BUSY: VarInt = VarInt::from_u32(2);
}

fn transport(stall_ms: u64, congestion: Congestion) -> Result<TransportConfig, IdentityError> {
    let idle = Duration::from_millis(stall_ms.saturating_mul(2));
    let idle = IdleTimeout::try_from(idle).map_err(|_| IdentityError::Time)?;
    let mut config = TransportConfig::default();
    config
        .stream_receive_window(VarInt::from_u32(CONNECTION_WINDOW_BYTES))
        .receive_window(VarInt::from_u32(CONNECTION_WINDOW_BYTES))
        .send_window(u64::from(CONNECTION_WINDOW_BYTES))
        .max_concurrent_bidi_streams(VarInt::from_u32(0))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .datagram_receive_buffer_size(None)
        .max_idle_timeout(Some(idle))
        .congestion_controller_factory(controllers(congestion));
    Ok(config)
}

fn controllers(congestion: Congestion) -> Arc<dyn ControllerFactory + Send + Sync> {
    match congestion {
        Congestion::Cubic => Arc::new(CubicConfig::default()),
        Congestion::Bbr => Arc::new(BbrConfig::default()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use quinn::congestion::{Bbr, Cubic};

    #[test]
    fn quinn_gets_the_congestion_control_that_is_named() {
        let one = |congestion| controllers(congestion).build(std::time::Instant::now(), 1_200).into_any();
        assert!(one(Congestion::default()).is::<Cubic>() && one(Congestion::Bbr).is::<Bbr>());
    }
}
