//! How long, how many, how much: the numbers of a link that an operator may change. Neighbours: `frames` stalls by
//! them, `serve` and `quic` admit by them. Bounds of messages are elsewhere (`commonweal_protocol::bounds`).

/// Numbers of the aggregator's side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ServeLimits {
    /// A stream on which less than `bounds::PROGRESS_BYTES_MIN` moves for so long is given up.
    pub stall_ms: u64,
    /// Connections with a certificate at once.
    pub connections_max: usize,
    /// Connections on the enrolment ALPN at once: anybody can open one.
    pub enrolments_max: usize,
    /// Requests served at once, all connections together.
    pub requests_max: usize,
    /// Uploads and downloads among them. Each holds two chunks at most (one read, one being kept): 128 make 256 MiB.
    pub transfers_max: usize,
    /// Handshakes under way above which a newcomer must first prove its address (QUIC retry).
    pub handshakes_before_retry: usize,
    /// Congestion control.
    pub congestion: Congestion,
}

impl Default for ServeLimits {
    fn default() -> Self {
        Self {
            stall_ms: 30_000,
            connections_max: 1024,
            enrolments_max: 32,
            requests_max: 512,
            transfers_max: 128,
            handshakes_before_retry: 64,
            congestion: Congestion::Cubic,
        }
    }
}

/// Numbers of the device's side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinkLimits {
    /// A stream on which less than `bounds::PROGRESS_BYTES_MIN` moves for so long is given up.
    pub stall_ms: u64,
    /// Pause before the first retry; it doubles with each that follows.
    pub retry_first_ms: u64,
    /// Longest pause.
    pub retry_pause_ms_max: u64,
    /// Retries in a row without progress before the request fails.
    pub retries_max: u32,
    /// Seed of the pauses' jitter; different on each device.
    pub seed: u64,
    /// Congestion control.
    pub congestion: Congestion,
}

impl Default for LinkLimits {
    fn default() -> Self {
        Self {
            stall_ms: 30_000,
            retry_first_ms: 500,
            retry_pause_ms_max: 30_000,
            retries_max: 5,
            seed: 0,
            congestion: Congestion::Cubic,
        }
    }
}

/// How fast a sender dares to send.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Congestion {
    /// The default: fair, slow on links that lose at random.
    #[default]
    Cubic,
    /// Far faster at 1 % random loss, but overshoots: never on a metered link.
    Bbr,
}
