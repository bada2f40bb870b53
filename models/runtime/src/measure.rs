//! How much memory this process holds, for reports and for policies that bound it, and whether it worked meanwhile.

use std::sync::atomic::{AtomicU64, Ordering};

static CALLS: AtomicU64 = AtomicU64::new(0);

/// How often this process has used a session of any model so far. As long as it does not change, nothing was opened.
pub fn calls() -> u64 {
    CALLS.load(Ordering::Relaxed)
}

pub(crate) fn count_call() {
    CALLS.fetch_add(1, Ordering::Relaxed);
}

/// Resident memory of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Bytes resident now, mapped weights included.
    pub resident_bytes: u64,
    /// The most bytes that were resident at any time.
    pub resident_bytes_max: u64,
}

/// The kernel's figures; `None` where it does not give them (other systems than Linux).
pub fn memory() -> Option<Memory> {
    parse(&std::fs::read_to_string("/proc/self/status").ok()?)
}

fn parse(status: &str) -> Option<Memory> {
    let bytes = |key: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(key))?;
        let kibibytes: u64 = line.split_whitespace().next()?.parse().ok()?;
        kibibytes.checked_mul(1024)
    };
    Some(Memory { resident_bytes: bytes("VmRSS:")?, resident_bytes_max: bytes("VmHWM:")? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_kernels_form() {
        let status = "Name:\tx\nVmHWM:\t    2048 kB\nVmRSS:\t    1024 kB\nThreads:\t1\n";
        assert_eq!(parse(status), Some(Memory { resident_bytes: 1 << 20, resident_bytes_max: 2 << 20 }));
        assert_eq!(parse("Name:\tx\n"), None);
    }
}
