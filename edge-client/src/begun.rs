//! What the round in progress was begun with: what a kill left of it is gone on with only if nothing of that changed.
//!
//! Written and asked by `pipeline.rs`. Kept pairs are the guard's and the reviser's word: another guard, another
//! constitution or another policy of the owner makes them anew.

use commonweal_protocol::{AggregatorKey, Digest, RoundTask, Scaffold, Signature, SignedControl};
use serde::{Deserialize, Serialize};

use crate::{
    pipeline::Device,
    pipeline_error::damaged,
    policy::Policy,
    store::{StoreError, at},
};

pub(crate) const BEGUN: &str = "round/task.json";

/// See the module.
#[derive(Serialize, Deserialize)]
pub(crate) struct Begun {
    pub(crate) task: RoundTask,
    policy: Policy,
    /// Whose task it is.
    aggregator: AggregatorKey,
    /// Of what screens and rewrites.
    screening: Digest,
}

/// What of a task is the same in every poll: not the time left, nor the signature, which is another one after the key was
/// rotated. `control.rs` checks the one that came.
fn of_itself(task: &RoundTask) -> RoundTask {
    let scaffold = match task.scaffold {
        Scaffold::Control(SignedControl { control, .. }) => {
            Scaffold::Control(SignedControl { control, signature: Signature([0; 64]) })
        }
        unsigned @ (Scaffold::Off | Scaffold::Zero) => unsigned,
    };
    RoundTask { deadline_ms: 0, scaffold, ..*task }
}

impl<L> Device<L> {
    /// As [`Begun`] is kept: what work on this task would be begun with now.
    pub(crate) fn begun_with(&self, task: &RoundTask) -> Result<Vec<u8>, StoreError> {
        let begun = Begun {
            task: of_itself(task),
            policy: self.policy.of_work(),
            aggregator: self.expected.trust.first(),
            screening: self.screening()?,
        };
        serde_json::to_vec(&begun).map_err(|error| damaged(&self.store, BEGUN, &error))
    }

    /// Identifies guard and reviser: their settings, the constitution, and the hashes of the files of the package and
    /// of the guard's own.
    fn screening(&self) -> Result<Digest, StoreError> {
        let guard = self.guard.config();
        let own = guard.package.as_deref().map(|package| {
            let path = self.model.package().directory().join(package).join("package.toml");
            std::fs::read_to_string(&path).map_err(at("read", &path))
        });
        let parts = (guard, self.reviser.constitution(), &self.model.manifest().files, own.transpose()?);
        let bytes = serde_json::to_vec(&parts).map_err(|error| damaged(&self.store, BEGUN, &error))?;
        Ok(Digest::of(&bytes))
    }
}
