//! `[traces]` of the configuration: where spans go, if anywhere. `traces` of the aggregator makes them.

use commonweal_traces::Endpoint;
use serde::{Deserialize, Serialize};

/// Spans of rounds and updates.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Traces {
    /// An OpenTelemetry collector, `http://HOST:PORT`; none, and there are no spans.
    pub endpoint: Option<Endpoint>,
}
