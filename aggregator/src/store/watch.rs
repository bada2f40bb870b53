//! `Watch` within one process: a counter and a condition variable.

use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use super::Watch;

/// Wakes threads of this process.
#[derive(Debug, Default)]
pub struct LocalWatch {
    count: Mutex<u64>,
    changed: Condvar,
}

impl Watch for LocalWatch {
    fn notify(&self) {
        let mut count = self.count.lock().unwrap_or_else(PoisonError::into_inner);
        *count = count.wrapping_add(1);
        self.changed.notify_all();
    }

    fn mark(&self) -> u64 {
        *self.count.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait(&self, mark: u64, timeout: Duration) {
        let count = self.count.lock().unwrap_or_else(PoisonError::into_inner);
        // A timeout is as good as a hint: the caller looks either way.
        drop(self.changed.wait_timeout_while(count, timeout, |count| *count == mark));
    }
}
