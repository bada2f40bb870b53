//! Time as an argument: certificates are issued and judged by it. Neighbours: `authority`, `tls` and `serve` take one;
//! tests set it by hand.

use rustls_pki_types::UnixTime;
use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

/// The wall clock, or one that is set by hand. Clones share it.
#[derive(Clone)]
pub struct Clock(Source);

#[derive(Clone)]
enum Source {
    System,
    Manual(Arc<AtomicU64>),
}

impl Clock {
    /// The machine's clock.
    pub fn system() -> Self {
        Self(Source::System)
    }

    /// A clock that stands still until it is set.
    pub fn manual(unix_ms: u64) -> Self {
        Self(Source::Manual(Arc::new(AtomicU64::new(unix_ms))))
    }

    /// Sets a manual clock; false for the machine's, which it leaves alone.
    pub fn set(&self, unix_ms: u64) -> bool {
        match &self.0 {
            Source::System => false,
            Source::Manual(now) => {
                now.store(unix_ms, Ordering::SeqCst);
                true
            }
        }
    }

    /// Ms since 1970.
    pub fn unix_ms(&self) -> u64 {
        match &self.0 {
            // A clock before 1970 counts as 1970: every certificate is then not yet valid, which is an error to see.
            Source::System => {
                let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
                u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
            }
            Source::Manual(now) => now.load(Ordering::SeqCst),
        }
    }

    pub(crate) fn tls_time(&self) -> UnixTime {
        UnixTime::since_unix_epoch(Duration::from_millis(self.unix_ms()))
    }
}

impl fmt::Debug for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Source::System => f.write_str("Clock(system)"),
            Source::Manual(_) => write!(f, "Clock({} ms)", self.unix_ms()),
        }
    }
}

impl rustls::time_provider::TimeProvider for Clock {
    fn current_time(&self) -> Option<UnixTime> {
        Some(self.tls_time())
    }
}
