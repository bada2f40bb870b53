//! Counts and standing in the OpenMetrics text form. Names carry their unit; docs/operations.md lists them all.

use std::sync::atomic::AtomicU64;

use commonweal_protocol::{Direction, Gate, Metric};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::{encode_eof, encode_registry};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};

use super::{Counts, Standing};

/// Every phase of a round, as `Phase::name` has them.
const PHASES: [&str; 6] = ["waiting", "collecting", "merging", "aligning", "evaluating", "publishing"];

type Gauges<L> = Family<L, Gauge<f64, AtomicU64>>;

/// One label of one of a few values.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct State {
    state: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Phase {
    phase: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Part {
    part: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct GateLabels {
    metric: &'static str,
    direction: &'static str,
}

/// The whole text.
pub(super) fn expose(counts: &Counts, standing: &Standing) -> String {
    let mut text = String::new();
    let written = encode_registry(&mut text, counts.registry())
        .and_then(|()| encode_registry(&mut text, &gauges(standing)))
        .and_then(|()| encode_eof(&mut text));
    debug_assert!(written.is_ok(), "a string takes everything");
    text
}

fn gauges(standing: &Standing) -> Registry {
    let mut registry = Registry::with_prefix("commonweal");
    let labels = [("version", standing.program), ("method", &standing.method)];
    registry.register("build", "The program and how it merges", Info::new(labels.map(owned).to_vec()));
    seconds(&mut registry, "start_timestamp", "When the server started", standing.started_ms);
    whole(&mut registry, "ready", "1 if devices are served", u64::from(standing.obstacles.is_empty()));
    let help = "1 if this process drives the rounds; of several that share a database, one does";
    whole(&mut registry, "driving", help, standing.driving.into());
    release(&mut registry, standing);
    round(&mut registry, standing);
    devices(&mut registry, standing);
    store(&mut registry, standing);
    registry
}

fn release(registry: &mut Registry, standing: &Standing) {
    if let Some(release) = &standing.release {
        whole(registry, "release_version", "The release in force", release.version.0);
        seconds(registry, "release_created_timestamp", "When it was published", release.created_ms);
    }
    let Some(card) = &standing.card else { return };
    for (name, help, value) in [
        ("candidate_safe_rate", "Share of safe answers to harmful prompts", card.safe_rate),
        (
            "candidate_attack_success_rate",
            "Share of harmful prompts that are answered",
            card.attack_success_rate,
        ),
        ("candidate_over_refusal_rate", "Share of benign prompts that are refused", card.over_refusal_rate),
        ("candidate_held_out_loss", "Loss on held-out conversations, nats a token", card.held_out_loss),
    ] {
        if let Some(value) = value {
            registry.register(name, format!("{help}, of the last candidate"), ConstGauge::new(value));
        }
    }
    let [values, thresholds, passed] = [(); 3].map(|()| Gauges::<GateLabels>::default());
    for gate in &card.gates {
        let labels = gate_labels(gate);
        values.get_or_create(&labels).set(gate.value);
        thresholds.get_or_create(&labels).set(gate.threshold);
        passed.get_or_create(&labels).set(f64::from(u8::from(gate.passed)));
    }
    registry.register("gate_value", "What the last candidate's gate measured", values);
    registry.register("gate_threshold", "What it had to reach", thresholds);
    registry.register("gate_passed", "1 if it did", passed);
}

fn gate_labels(gate: &Gate) -> GateLabels {
    GateLabels {
        metric: match gate.metric {
            Metric::SafeRate => "safe_rate",
            Metric::AttackSuccessRate => "attack_success_rate",
            Metric::OverRefusalRate => "over_refusal_rate",
            Metric::HeldOutLoss => "held_out_loss",
            Metric::HeldOutLossRise => "held_out_loss_rise",
        },
        direction: match gate.direction {
            Direction::AtLeast => "at_least",
            Direction::AtMost => "at_most",
        },
    }
}

fn round(registry: &mut Registry, standing: &Standing) {
    let round = &standing.round;
    whole(registry, "round_number", "The round under way, or the next one", round.round.0);
    whole(registry, "round_devices_selected", "Devices with a task of this round", round.selected.into());
    whole(registry, "round_updates", "Updates of this round", round.received.into());
    whole(registry, "round_updates_target", "Updates at which it closes", round.target.into());
    let phases = Gauges::<Phase>::default();
    for phase in PHASES {
        phases.get_or_create(&Phase { phase }).set(f64::from(u8::from(phase == round.phase)));
    }
    registry.register("round_phase", "1 for the phase that the round is in", phases);
}

fn devices(registry: &mut Registry, standing: &Standing) {
    let devices = &standing.devices;
    let states = Gauges::<State>::default();
    for (state, count) in
        [("active", devices.active), ("expired", devices.expired), ("revoked", devices.revoked)]
    {
        states.get_or_create(&State { state }).set(count as f64);
    }
    registry.register("devices", "Enrolled devices", states);
    whole(registry, "devices_online", "Active devices that asked within five minutes", devices.online as u64);
    whole(registry, "devices_current", "Active devices with the release in force", devices.current as u64);
    whole(registry, "invitations_open", "Tokens that can be used", standing.invitations_open as u64);
    whole(registry, "connections_open", "Open connections", standing.connections_open as u64);
    registry.register(
        "requests_throttled",
        "Requests that came too fast",
        ConstCounter::new(standing.requests_throttled),
    );
}

fn store(registry: &mut Registry, standing: &Standing) {
    let store = &standing.store;
    let parts = Gauges::<Part>::default();
    for (part, bytes) in
        [("database", store.database_bytes), ("blobs", store.blobs_bytes), ("partials", store.partials_bytes)]
    {
        parts.get_or_create(&Part { part }).set(bytes as f64);
    }
    registry.register_with_unit("store", "What the state directory holds", Unit::Bytes, parts);
    if let Some(free) = store.free_bytes {
        let help = "Free disk for unfinished uploads and for what is kept";
        registry.register_with_unit("store_free", help, Unit::Bytes, ConstGauge::new(free));
    }
}

fn whole(registry: &mut Registry, name: &str, help: &str, value: u64) {
    registry.register(name, help, ConstGauge::new(value));
}

fn seconds(registry: &mut Registry, name: &str, help: &str, unix_ms: u64) {
    let value = ConstGauge::new(unix_ms as f64 / 1_000.0);
    registry.register_with_unit(name, format!("{help}, since 1970"), Unit::Seconds, value);
}

fn owned((name, value): (&'static str, &str)) -> (&'static str, String) {
    (name, value.to_owned())
}

#[cfg(test)]
mod tests {
    use crate::round::Rounds;

    #[test]
    fn the_phase_of_a_new_aggregator_is_among_the_phases() {
        assert!(super::PHASES.contains(&Rounds::default().phase.name()));
    }
}
