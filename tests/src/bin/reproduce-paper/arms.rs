//! Which federations are compared. An arm is data; `federation.rs` turns it into the aggregator's configuration and the
//! devices' policy, `clients.rs` into who holds what.

use aggregator::config::{Config, Gates, Rule};
use commonweal_protocol::Mode;
use edge_client::policy::{Action, Policy};
use serde::Serialize;

/// How a device trains and how its update is averaged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Averaging {
    /// Both factors, averaged each by itself.
    Fedavg,
    /// The same with control variates.
    Scaffold,
    /// A frozen, B averaged.
    Ffa,
    /// Products averaged exactly.
    Exact,
}

/// What the merge does about updates that are too long or too heavy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Merging {
    /// Nothing: a weighted mean.
    Mean,
    /// Lengths and weights are cut to the round's median.
    Clipped,
    /// The same, and of each value the median.
    Robust,
}

/// Who holds which benign conversations.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Split {
    /// Drawn from one urn, of the sources whose name begins so.
    Iid(&'static str),
    /// A client has one source, or the few that fill it; of those whose name begins so.
    Sources(&'static str),
}

/// One federation's settings.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Arm {
    /// Unique; the name in the results.
    pub(crate) name: String,
    /// The table or plot it belongs to.
    pub(crate) family: &'static str,
    /// The x of its plot.
    pub(crate) x: Option<f64>,
    /// Without rounds it is the base.
    pub(crate) trains: bool,
    pub(crate) averaging: Averaging,
    /// What devices do with what the guard calls unsafe; `None`: there is no filter.
    pub(crate) action: Option<&'static str>,
    /// In place of the guard's own.
    pub(crate) threshold: Option<f64>,
    /// Steps of the server's alignment; 0 for none.
    pub(crate) align_steps: u32,
    /// Whether a candidate that measures badly is held back.
    pub(crate) gates: bool,
    pub(crate) merging: Merging,
    /// Of an uploaded value.
    pub(crate) bits: u8,
    /// LoRA rank, where not the package's.
    pub(crate) rank: Option<u32>,
    pub(crate) harm_share: f64,
    pub(crate) split: Split,
    pub(crate) hostile_share: f64,
}

/// Steps of the server's alignment where an arm does not vary them.
pub(crate) const ALIGN_STEPS: u32 = 50;
const HARM_SHARE: f64 = 0.3;
const HOSTILE_SHARE: f64 = 0.1;

impl Arm {
    /// Plain federated averaging.
    fn plain(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            family: TABLE,
            x: None,
            trains: true,
            averaging: Averaging::Fedavg,
            action: None,
            threshold: None,
            align_steps: 0,
            gates: false,
            merging: Merging::Mean,
            bits: 3,
            rank: None,
            harm_share: HARM_SHARE,
            split: Split::Iid(""),
            hostile_share: 0.0,
        }
    }

    /// Filter and revision on the device, alignment and gates on the server.
    fn ours(name: &str) -> Self {
        let (action, align_steps) = (Some("revise"), ALIGN_STEPS);
        Self { action, align_steps, gates: true, merging: Merging::Clipped, ..Self::plain(name) }
    }

    /// One point of a plot.
    fn point(family: &'static str, label: &str, x: f64) -> Self {
        Self { family, x: Some(x), ..Self::ours(&format!("{family}: {label}")) }
    }

    /// The aggregator's settings: those given, with what this arm changes.
    pub(crate) fn config(&self, common: &Config) -> Config {
        let mut config = common.clone();
        config.align.enabled = self.align_steps > 0;
        config.align.steps = self.align_steps.max(1);
        config.train.mode = match self.averaging {
            Averaging::Fedavg | Averaging::Scaffold => Mode::Fedit,
            Averaging::Ffa => Mode::Ffa,
            Averaging::Exact => Mode::Exact,
        };
        config.train.scaffold = self.averaging == Averaging::Scaffold;
        config.compress.bits = self.bits;
        let merge = &mut config.merge;
        merge.rule = if self.merging == Merging::Robust { Rule::Median } else { Rule::Mean };
        if self.merging == Merging::Mean {
            (merge.clip_median_factor, merge.weight_median_factor) = (0.0, 0.0);
        }
        if !self.gates {
            // Nothing reads this measurement: the shortest.
            (config.evaluate.rows_max, config.evaluate.answer_tokens_max) = (1, 1);
            config.evaluate.gates = Gates::off();
        }
        config
    }

    /// The device owner's settings.
    pub(crate) fn policy(&self) -> Policy {
        let mut policy = Policy::default();
        policy.filter.enabled = self.action.is_some();
        policy.filter.action = match self.action {
            Some("drop") => Action::Drop,
            Some("refuse") => Action::Refuse,
            _ => Action::Revise,
        };
        policy.filter.threshold = self.threshold;
        // A round is short; what a kill costs is a round.
        policy.train.checkpoint_steps = u32::MAX;
        policy
    }
}

/// Of arms of the table.
pub(crate) const TABLE: &str = "main";
/// Share of the harmful samples that the paper's filter finds.
pub(crate) const PAPER_RECALL: f64 = 0.737;

/// The paper's table with ours beside it. At the threshold `blunt` the filter finds as little as the paper's.
pub(crate) fn main_arms(blunt: Option<f64>) -> Vec<Arm> {
    let mut arms = vec![
        Arm { trains: false, ..Arm::plain("base") },
        Arm { harm_share: 0.0, ..Arm::plain("FedAvg, clean data") },
    ];
    for (algorithm, averaging) in [("FedAvg", Averaging::Fedavg), ("SCAFFOLD", Averaging::Scaffold)] {
        for (setting, action, align_steps) in [
            ("plain", None, 0),
            ("+ filter", Some("drop"), 0),
            ("+ constitution", None, ALIGN_STEPS),
            ("+ both", Some("drop"), ALIGN_STEPS),
        ] {
            let name = format!("{algorithm} {setting}");
            arms.push(Arm { averaging, action, align_steps, ..Arm::plain(&name) });
        }
    }
    if blunt.is_some() {
        let filtered = Arm {
            action: Some("drop"),
            threshold: blunt,
            ..Arm::plain("FedAvg + filter of the paper's recall")
        };
        let name = "FedAvg + both, filter of the paper's recall".to_owned();
        arms.push(Arm { name, align_steps: ALIGN_STEPS, ..filtered.clone() });
        arms.push(filtered);
    }
    let hostile_share = HOSTILE_SHARE;
    arms.extend([
        Arm::ours("ours"),
        Arm { averaging: Averaging::Ffa, ..Arm::ours("ours, FFA") },
        Arm { averaging: Averaging::Exact, ..Arm::ours("ours, exact") },
        Arm { hostile_share, ..Arm::plain("FedAvg plain, hostile 1 in 10") },
        Arm { hostile_share, merging: Merging::Mean, ..Arm::ours("ours, hostile 1 in 10, mean") },
        Arm { hostile_share, merging: Merging::Robust, ..Arm::ours("ours, hostile 1 in 10, robust") },
    ]);
    arms
}

/// One thing varied at a time, the rest as in ours or, where the server would hide the effect, without it.
pub(crate) fn ablations(ranks: &[u32], is_real: bool) -> Vec<Arm> {
    let mut arms = Vec::new();
    for harm_share in [0.0, 0.15, 0.3, 0.45, 0.6] {
        let label = format!("{:.0} %", harm_share * 100.0);
        arms.push(Arm { harm_share, ..Arm::point("harm share, ours", &label, harm_share * 100.0) });
        let x = Some(harm_share * 100.0);
        let plain = Arm::plain(&format!("harm share, plain: {label}"));
        arms.push(Arm { harm_share, family: "harm share, plain", x, ..plain });
    }
    let alone = |arm: Arm| Arm { align_steps: 0, gates: false, ..arm };
    for threshold in [0.05, 0.3, 0.6, 0.9, 0.99, 0.999] {
        let arm = alone(Arm::point("filter threshold", &threshold.to_string(), threshold));
        arms.push(Arm { threshold: Some(threshold), action: Some("drop"), ..arm });
    }
    for (x, action) in [(0.0, "drop"), (1.0, "refuse"), (2.0, "revise")] {
        arms.push(Arm { action: Some(action), ..alone(Arm::point("action", action, x)) });
    }
    for align_steps in [0, 10, 25, 50, 100] {
        let arm = Arm::point("alignment steps", &align_steps.to_string(), f64::from(align_steps));
        arms.push(Arm { align_steps, action: None, gates: false, merging: Merging::Mean, ..arm });
    }
    for bits in [2, 3, 4, 8] {
        arms.push(Arm { bits, ..Arm::point("bits of a value", &bits.to_string(), f64::from(bits)) });
    }
    for &rank in ranks {
        arms.push(Arm { rank: Some(rank), ..Arm::point("rank", &rank.to_string(), f64::from(rank)) });
    }
    let splits: &[(&str, Split)] = if is_real {
        &[
            ("IID", Split::Iid("")),
            ("all sources", Split::Sources("")),
            // Who has text of one source alone is measured by that of others too, so each is held against the same text.
            ("STAR, IID", Split::Iid("star/")),
            ("STAR users", Split::Sources("star/")),
            ("MedQuAD, IID", Split::Iid("medquad/")),
            ("MedQuAD institutes", Split::Sources("medquad/")),
        ]
    } else {
        &[("IID", Split::Iid("")), ("topics", Split::Sources(""))]
    };
    for (x, (label, split)) in splits.iter().enumerate() {
        arms.push(Arm { split: split.clone(), ..Arm::point("split", label, x as f64) });
    }
    for hostile in [0.0, 1.0, 2.0, 3.0, 4.0] {
        for (family, merging) in [
            ("hostile in 10, mean", Merging::Mean),
            ("hostile in 10, clipped", Merging::Clipped),
            ("hostile in 10, robust", Merging::Robust),
        ] {
            let arm = Arm::point(family, &hostile.to_string(), hostile);
            arms.push(Arm { hostile_share: hostile / 10.0, merging, ..arm });
        }
    }
    arms
}
