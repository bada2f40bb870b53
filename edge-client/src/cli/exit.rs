//! Which exit code an error means: 1 failed, 3 bad input, 4 refused by the aggregator, 5 unavailable. Clap gives 2.

use commonweal_protocol::InvitationError;
use commonweal_runtime::{DeviceError, LibraryError, MemoryError};
use commonweal_transport::LinkError;

use crate::{
    pipeline_error::PipelineError, policy::PolicyError, rows::ReadError, settings::SettingsError,
    store::StoreError, train::TrainingError,
};

/// What a person gave cannot be used; the text says why.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct BadInput(pub(crate) String);

/// Walks the causes; the first that says something decides.
pub fn code(error: &anyhow::Error) -> u8 {
    error.chain().find_map(code_of).unwrap_or(1)
}

fn code_of(cause: &(dyn std::error::Error + 'static)) -> Option<u8> {
    if let Some(link) = cause.downcast_ref::<LinkError>() {
        return Some(if link.is_unavailable() { 5 } else { 4 });
    }
    if cause.is::<LibraryError>() || cause.is::<DeviceError>() || cause.is::<MemoryError>() {
        return Some(5);
    }
    // Where an error says of itself what its cause is, that is none of the chain.
    let is_want_of_memory = matches!(cause.downcast_ref(), Some(TrainingError::Memory(_)))
        || matches!(cause.downcast_ref(), Some(commonweal_safety::OpenError::Memory(_)));
    if is_want_of_memory {
        return Some(5);
    }
    let wrong_base = matches!(cause.downcast_ref(), Some(PipelineError::Base { .. }));
    let wrong_place = matches!(
        cause.downcast_ref(),
        Some(
            StoreError::Directory { .. }
                | StoreError::Full { .. }
                | StoreError::OverBudget { .. }
                | StoreError::KeyLost { .. }
                | StoreError::KeyWrong { .. }
                | StoreError::Key(_)
        )
    );
    let bad_input = wrong_base
        || wrong_place
        || cause.is::<BadInput>()
        || cause.is::<PolicyError>()
        || cause.is::<SettingsError>()
        || cause.is::<ReadError>()
        || cause.is::<InvitationError>()
        || cause.is::<commonweal_package::OpenError>()
        || cause.is::<commonweal_safety::OpenError>()
        || cause.is::<commonweal_safety::ConstitutionError>();
    bad_input.then_some(3)
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;
    use commonweal_runtime::memory::{Available, Bound};

    #[test]
    fn the_cause_decides_the_code() {
        let missing = || anyhow::Error::new(LibraryError::Missing { tried: Vec::new() });
        assert_eq!(code(&missing().context("open")), 5);
        assert_eq!(code(&anyhow::anyhow!("x")), 1);
        let bad: anyhow::Result<()> = Err(BadInput("x".into()).into());
        assert_eq!(code(&bad.context("y").unwrap_err()), 3);
        let cut = LinkError::Stalled { during: "x", stall_ms: 1 };
        assert_eq!(code(&anyhow::Error::new(cut)), 5);
        let memory = MemoryError {
            what: "x",
            needed: 2,
            available: Available { bytes: 1, bound: Bound::Machine },
            lower: "y",
        };
        assert_eq!(code(&anyhow::Error::new(TrainingError::Memory(memory.clone()))), 5);
        assert_eq!(code(&anyhow::Error::new(PipelineError::Memory(memory.clone()))), 5);
        assert_eq!(code(&anyhow::Error::new(commonweal_safety::OpenError::Memory(memory))), 5);
        let untrusted = LinkError::Untrusted { reason: "x".into() };
        assert_eq!(code(&anyhow::Error::new(untrusted)), 4);
    }
}
