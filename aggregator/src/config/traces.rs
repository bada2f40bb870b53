//! `[traces]` of the configuration: where spans go, if anywhere. `traces` of the aggregator makes them.

use commonweal_traces::Endpoint;
use serde::{Deserialize, Serialize};

/// Spans of rounds and updates.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Traces {
    /// An OpenTelemetry collector, `http://HOST:PORT`; none, and there are no spans.
    pub endpoint: Option<String>,
}

impl Traces {
    /// Where that is.
    pub(crate) fn collector(&self) -> Result<Option<Endpoint>, String> {
        self.endpoint.as_deref().map(str::parse).transpose()
    }

    /// What cannot be used. The text is not told again: there may be a password in it.
    pub(super) fn problems(&self) -> Option<String> {
        self.collector().err().map(|problem| format!("traces.endpoint: {problem}"))
    }
}
