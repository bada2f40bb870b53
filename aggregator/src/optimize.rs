//! What the server's optimizer remembers, release by release: which files hold its moments.
//!
//! Between `merge`, whose delta it steps along, and `publish`, which stores this beside the release. It belongs to the
//! release: a candidate that is refused takes it along, and after a roll-back that of the earlier release goes on.

use commonweal_adapter::{Adaptive, ServerOptimizer};
use commonweal_protocol::Digest;
use serde::{Deserialize, Serialize};

use crate::config::{Merge, Optimizer};

/// Files of an adapter's form, named by their hash. Each is there if the optimizer has such a moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OptimizerState {
    /// Whose moments they are; another optimizer begins anew.
    pub optimizer: Optimizer,
    /// `m`.
    pub momentum: Option<Digest>,
    /// `v`.
    pub variance: Option<Digest>,
}

impl Default for OptimizerState {
    fn default() -> Self {
        Self { optimizer: Optimizer::Fedavg, momentum: None, variance: None }
    }
}

impl OptimizerState {
    /// Its files.
    pub fn digests(&self) -> impl Iterator<Item = Digest> {
        self.momentum.into_iter().chain(self.variance)
    }
}

impl Merge {
    /// The server's optimizer with its constants.
    pub fn server_optimizer(&self) -> ServerOptimizer {
        let adaptive =
            || Adaptive { betas: (f64::from(self.beta1), f64::from(self.beta2)), tau: f64::from(self.tau) };
        match self.optimizer {
            Optimizer::Fedavg => ServerOptimizer::FedAvg,
            Optimizer::Fedavgm => ServerOptimizer::FedAvgM { beta: f64::from(self.beta1) },
            Optimizer::Fedadam => ServerOptimizer::FedAdam(adaptive()),
            Optimizer::Fedyogi => ServerOptimizer::FedYogi(adaptive()),
        }
    }
}

impl Optimizer {
    /// Its name in configurations and report cards.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Fedavg => "fedavg",
            Self::Fedavgm => "fedavgm",
            Self::Fedadam => "fedadam",
            Self::Fedyogi => "fedyogi",
        }
    }
}
