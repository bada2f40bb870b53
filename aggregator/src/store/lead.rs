//! `Lead` where there is one process: the lock of the state directory keeps every other one away.

use std::time::Duration;

use super::{Lead, StoreError};

/// Always has the lead.
#[derive(Clone, Copy, Debug, Default)]
pub struct SoleLead;

impl Lead for SoleLead {
    fn lead(&self, _: &str, _: Duration) -> Result<bool, StoreError> {
        Ok(true)
    }

    fn resign(&self, _: &str) -> Result<(), StoreError> {
        Ok(())
    }

    fn is_shared(&self) -> bool {
        false
    }
}
