//! What the device's owner decides: what happens to harmful samples, how hard to revise, how much to train, when, and at what
//! cost.
//!
//! Read from `policy.toml` in the state directory; every value has a default. Used by `filter.rs`, `revise.rs` and
//! `train.rs`; `pipeline.rs` passes it along.

use std::collections::BTreeMap;

use commonweal_package::TrainGraph;
use commonweal_safety::{CategoryId, GuardConfig};
use serde::{Deserialize, Serialize};

use crate::{budget::BudgetPolicy, units::Span, when::WhenPolicy};

/// A policy fits in a page; more is a wrong file.
const FILE_BYTES_MAX: usize = 64 * 1024;

/// The whole policy.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Policy {
    /// What the guard's judgement leads to.
    pub filter: FilterPolicy,
    /// How a flagged sample is rewritten.
    pub revise: RevisePolicy,
    /// How much is trained at most.
    pub train: TrainPolicy,
    /// What the local endpoint may do.
    pub serve: ServePolicy,
    /// How long samples are kept.
    pub store: StorePolicy,
    /// When the device may work.
    pub when: WhenPolicy,
    /// What it may cost. Left out where it is the default, so that a round that a program of before began goes on.
    #[serde(skip_serializing_if = "BudgetPolicy::is_default")]
    pub budget: BudgetPolicy,
}

/// What happens to a sample that the guard finds unsafe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// Train on it as it is.
    Keep,
    /// Leave it out.
    Drop,
    /// Train on a refusal in place of the reply.
    Refuse,
    /// Rewrite the reply by the constitution, then judge again.
    Revise,
}

impl Action {
    /// The word of `policy.toml`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Keep => "keep",
            Self::Drop => "drop",
            Self::Refuse => "refuse",
            Self::Revise => "revise",
        }
    }
}

/// The filter stage.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FilterPolicy {
    /// Off only for measuring what the filter is worth; said in every log when off.
    pub enabled: bool,
    /// Unsafe from this calibrated probability on; the guard's own threshold where absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub threshold: Option<f64>,
    /// For unsafe samples of a category without its own rule.
    pub action: Action,
    /// Rules by category.
    pub categories: BTreeMap<CategoryId, CategoryRule>,
}

/// A rule for one category; what is absent falls back to the filter's own.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CategoryRule {
    /// Unsafe from this calibrated probability on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub threshold: Option<f64>,
    /// What then happens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub action: Option<Action>,
}

/// What happens when revision did not make a sample safe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Otherwise {
    /// Train on the constitution's refusal.
    Refuse,
    /// Leave the sample out.
    Drop,
}

/// The revise stage.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RevisePolicy {
    /// Rewrites tried before giving up, 1 to 8.
    pub attempts_max: u32,
    /// What happens then.
    pub otherwise: Otherwise,
}

/// What training imitates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// Supervised: the tokens of the reply.
    Sft,
    /// Direct preference optimization on (revised, original) and published pairs; samples without a pair are SFT.
    Dpo,
}

/// The train stage.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainPolicy {
    /// SFT or DPO.
    pub method: Method,
    /// DPO's temperature.
    pub beta: f32,
    /// Rows of one forward pass; more need more memory.
    pub batch_rows: usize,
    /// `full`; `frugal`: the same gradients in less memory and more time; `upper`: only the upper half of the layers
    /// learns, in less of both.
    pub graph: TrainGraph,
    /// Tokens of one sample; of a longer one the oldest exchanges are left out, then the end of the reply. The
    /// model's context where absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sample_tokens_max: Option<usize>,
    /// Optimizer steps of a round at most, whatever the aggregator asks.
    pub steps_max: u32,
    /// Samples of a round at most.
    pub samples_max: usize,
    /// Steps between two checkpoints on disk: what a crash can cost.
    pub checkpoint_steps: u32,
}

/// Where the guard stands when the local endpoint answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Guarding {
    /// Nowhere: it judges what it is asked about (`/v1/moderations`).
    #[default]
    Off,
    /// Before and behind: what it finds unsafe is answered by the constitution's refusal. An answer goes out once it is
    /// whole.
    Refuse,
}

impl Guarding {
    /// The word of `policy.toml`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Refuse => "refuse",
        }
    }
}

/// The local endpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ServePolicy {
    /// Where the guard stands.
    pub guard: Guarding,
    /// Whether chats may become samples: then those for which it is asked, by `--keep-chats` or by a request, do.
    pub keep_chats: bool,
}

/// The store of samples.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct StorePolicy {
    /// Samples that are older are forgotten, with what was computed from them, at the start and once a day. For ever where
    /// absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep: Option<Span>,
}

impl Default for FilterPolicy {
    fn default() -> Self {
        Self { enabled: true, threshold: None, action: Action::Revise, categories: BTreeMap::new() }
    }
}

impl Default for RevisePolicy {
    fn default() -> Self {
        Self { attempts_max: 2, otherwise: Otherwise::Refuse }
    }
}

impl Default for TrainPolicy {
    fn default() -> Self {
        Self {
            method: Method::Sft,
            beta: 0.1,
            batch_rows: 8,
            graph: TrainGraph::Full,
            sample_tokens_max: None,
            steps_max: 1_000,
            samples_max: 4_096,
            checkpoint_steps: 10,
        }
    }
}

/// Why a policy cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    /// Larger than any real policy.
    #[error("policy has {bytes} bytes, expected at most {FILE_BYTES_MAX}")]
    TooLarge {
        /// Its size.
        bytes: usize,
    },
    /// Not TOML, or a field is unknown or of another type.
    #[error("policy does not parse")]
    Parse(#[source] Box<toml::de::Error>),
    /// Rules for kinds of harm that the guard does not name: they would never apply.
    #[error("policy has a rule for {}, the guard names {}", .unknown.join(", "), .known.join(", "))]
    Categories {
        /// The policy's.
        unknown: Vec<String>,
        /// The guard's.
        known: Vec<String>,
    },
    /// Every value out of its range.
    #[error("policy is not valid: {}", .0.join("; "))]
    Invalid(Vec<String>),
}

impl Policy {
    /// Parses and checks `policy.toml`; every problem is listed at once.
    pub fn from_toml(text: &str) -> Result<Self, PolicyError> {
        if text.len() > FILE_BYTES_MAX {
            return Err(PolicyError::TooLarge { bytes: text.len() });
        }
        let policy: Self = toml::from_str(text).map_err(|source| PolicyError::Parse(Box::new(source)))?;
        let problems = policy.problems();
        if problems.is_empty() { Ok(policy) } else { Err(PolicyError::Invalid(problems)) }
    }

    /// What a round's work follows from. The rest can change while a round is in progress without beginning it anew.
    #[must_use]
    pub fn of_work(&self) -> Self {
        let (serve, store, when) = (ServePolicy::default(), StorePolicy::default(), WhenPolicy::default());
        Self { serve, store, when, budget: BudgetPolicy::default(), ..self.clone() }
    }

    fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let mut require = |holds: bool, text: String| {
            if !holds {
                problems.push(text);
            }
        };
        let probability = |value: f64| value > 0.0 && value <= 1.0;
        if let Some(threshold) = self.filter.threshold {
            require(
                probability(threshold),
                format!("filter.threshold: expected a probability above 0, got {threshold}"),
            );
        }
        for (id, rule) in &self.filter.categories {
            if let Some(threshold) = rule.threshold {
                let text = format!(
                    "filter.categories.{id}.threshold: expected a probability above 0, got {threshold}"
                );
                require(probability(threshold), text);
            }
        }
        let RevisePolicy { attempts_max, .. } = self.revise;
        require(
            (1..=8).contains(&attempts_max),
            format!("revise.attempts_max: expected 1 to 8, got {attempts_max}"),
        );
        let train = &self.train;
        require(
            (1..=256).contains(&train.batch_rows),
            format!("train.batch_rows: expected 1 to 256, got {}", train.batch_rows),
        );
        require(
            train.beta > 0.0 && train.beta <= 10.0,
            format!("train.beta: expected above 0, at most 10, got {}", train.beta),
        );
        require(train.steps_max >= 1, "train.steps_max: expected at least 1, got 0".into());
        require(train.samples_max >= 1, "train.samples_max: expected at least 1, got 0".into());
        require(train.checkpoint_steps >= 1, "train.checkpoint_steps: expected at least 1, got 0".into());
        require(
            train.sample_tokens_max.is_none_or(|tokens| tokens >= 16),
            "train.sample_tokens_max: expected at least 16".into(),
        );
        require(
            self.store.keep.is_none_or(|keep| keep >= Span::of_seconds(60)),
            "store.keep: expected at least 1m".into(),
        );
        problems.extend(self.when.problems());
        problems.extend(self.budget.problems());
        problems
    }

    /// Sets the guard's thresholds to the owner's. The guard then names the category wherever a rule could apply, and
    /// what is rewritten is judged by the same measure as what was flagged.
    pub fn set_thresholds(&self, guard: &mut GuardConfig) -> Result<(), PolicyError> {
        let filter = &self.filter;
        let is_known = |id: &&CategoryId| guard.categories.iter().any(|category| category.id == **id);
        let unknown: Vec<String> =
            filter.categories.keys().filter(|id| !is_known(id)).map(ToString::to_string).collect();
        if !unknown.is_empty() {
            let known = guard.categories.iter().map(|category| category.id.to_string()).collect();
            return Err(PolicyError::Categories { unknown, known });
        }
        if let Some(threshold) = filter.threshold {
            guard.threshold = threshold;
            (guard.prompt.threshold, guard.pair.threshold) = (None, None);
        }
        for category in &mut guard.categories {
            let rule = filter.categories.get(&category.id).and_then(|rule| rule.threshold);
            category.threshold = rule.or(filter.threshold).or(category.threshold);
        }
        Ok(())
    }

    /// The action for a judgement: what its category's rule says, else what the filter says; `Keep` below the
    /// threshold. `guard_threshold` is the guard's own for this category.
    pub fn action(&self, probability: f64, category: Option<&CategoryId>, guard_threshold: f64) -> Action {
        let rule = category.and_then(|id| self.filter.categories.get(id));
        let threshold =
            rule.and_then(|rule| rule.threshold).or(self.filter.threshold).unwrap_or(guard_threshold);
        if !self.filter.enabled || probability < threshold {
            return Action::Keep;
        }
        rule.and_then(|rule| rule.action).unwrap_or(self.filter.action)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::Limit;

    #[test]
    fn an_empty_file_is_the_default_and_a_rule_wins_over_it() {
        assert_eq!(Policy::from_toml("").unwrap(), Policy::default());
        let policy = Policy::from_toml(
            "[filter]\naction = \"refuse\"\n[filter.categories.weapons]\nthreshold = 0.2\naction = \"drop\"\n\
             [filter.categories.hate]\nthreshold = 0.9\n",
        )
        .unwrap();
        let weapons = "weapons".parse().unwrap();
        let hate = "hate".parse().unwrap();
        assert_eq!(policy.action(0.3, Some(&weapons), 0.5), Action::Drop);
        assert_eq!(policy.action(0.3, None, 0.5), Action::Keep);
        assert_eq!(policy.action(0.6, None, 0.5), Action::Refuse);
        assert_eq!(policy.action(0.8, Some(&hate), 0.5), Action::Keep);
        assert_eq!(policy.action(0.95, Some(&hate), 0.5), Action::Refuse);
    }

    #[test]
    fn the_guard_judges_by_the_owners_thresholds() {
        let guard = include_str!("../../models/reference/guard.toml");
        let set = |policy: &str| {
            let mut guard = GuardConfig::from_toml(guard).unwrap();
            Policy::from_toml(policy).unwrap().set_thresholds(&mut guard).map(|()| guard)
        };
        assert_eq!(set("").unwrap(), GuardConfig::from_toml(guard).unwrap());
        let (weapons, drugs) = ("weapons".parse().unwrap(), "drugs".parse().unwrap());
        // A category's low threshold makes the guard ask for categories from there on.
        let own = set("[filter.categories.weapons]\nthreshold = 0.1\n").unwrap();
        assert_eq!((own.threshold_for(Some(&weapons), true), own.threshold_min()), (0.1, 0.1));
        let guards = set("").unwrap();
        for with_response in [false, true] {
            let own = (own.threshold_for(Some(&drugs), with_response), own.threshold);
            assert_eq!(own, (guards.threshold_for(None, with_response), guards.threshold));
        }
        let own = set("[filter]\nthreshold = 0.9\n[filter.categories.weapons]\nthreshold = 0.2\n").unwrap();
        assert_eq!(
            (own.threshold_for(Some(&drugs), true), own.threshold_for(Some(&weapons), true)),
            (0.9, 0.2)
        );
        let error = set("[filter.categories.wepons]\naction = \"drop\"\n").unwrap_err();
        assert!(error.to_string().contains("wepons") && error.to_string().contains("weapons"), "{error}");
    }

    #[test]
    fn nothing_that_is_said_to_the_endpoint_is_kept_unless_the_owner_says_so() {
        assert!(!Policy::from_toml("").unwrap().serve.keep_chats);
        let policy = Policy::from_toml("[serve]\nguard = \"refuse\"\nkeep_chats = true\n").unwrap();
        assert_eq!(policy.serve, ServePolicy { guard: Guarding::Refuse, keep_chats: true });
        assert!(Policy::from_toml("[serve]\nguard = \"maybe\"\n").is_err());
    }

    #[test]
    fn samples_are_kept_for_ever_unless_the_owner_says_so() {
        assert_eq!(Policy::from_toml("").unwrap().store.keep, None);
        let policy = Policy::from_toml("[store]\nkeep = \"90d\"\n").unwrap();
        assert_eq!(policy.store.keep, Some("90d".parse().unwrap()));
        for wrong in ["90", "0s", "forever"] {
            assert!(Policy::from_toml(&format!("[store]\nkeep = \"{wrong}\"\n")).is_err(), "{wrong}");
        }
        // A round in progress goes on under it.
        assert_eq!(policy.of_work(), Policy::default());
    }

    #[test]
    fn the_rules_of_when_to_work_have_defaults_and_bounds() {
        let text = "[when]\nidle = \"10m\"\nhours = \"22:00-06:00\"\nmemory_free_min = \"500MB\"\n";
        let policy = Policy::from_toml(text).unwrap();
        assert_eq!(policy.when.idle, "10m".parse().unwrap());
        assert!(policy.when.power && policy.when.unmetered && policy.when.hours.is_some());
        assert_eq!(Policy::from_toml(&toml::to_string(&policy).unwrap()).unwrap(), policy);
        assert_eq!(policy.of_work(), Policy::default());
        for wrong in [
            "nice = 20",
            "temperature_max_c = 0",
            "load_max = -1.0",
            "hours = \"25:00-1:00\"",
            "idel = \"5m\"",
        ] {
            assert!(Policy::from_toml(&format!("[when]\n{wrong}\n")).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_budget_is_read_in_sizes_or_off_and_a_round_goes_on_under_another() {
        let text = "[budget]\nbytes_per_day = \"200 MB\"\nbytes_per_month = \"off\"\nmemory = \"1GB\"\n";
        let policy = Policy::from_toml(text).unwrap();
        assert_eq!(policy.budget.bytes_per_day.count(), Some(200_000_000));
        assert_eq!(
            (policy.budget.bytes_per_month, policy.budget.disk.count()),
            (Limit::OFF, Some(20_000_000_000))
        );
        assert_eq!(Policy::from_toml(&toml::to_string(&policy).unwrap()).unwrap(), policy);
        assert_eq!(policy.of_work(), Policy::default());
        let of_work = serde_json::to_string(&policy.of_work()).unwrap();
        assert!(!of_work.contains("budget") && !of_work.contains("idle_hint"), "{of_work}");
        let error = Policy::from_toml("[budget]\nbytes_per_day = \"15MB\"\nmemory = \"1MB\"\n").unwrap_err();
        let text = error.to_string();
        assert!(text.contains("budget.bytes_per_day") && text.contains("16MB, or off, got 15MB"), "{text}");
        assert!(text.contains("budget.memory"), "{text}");
        for wrong in ["disk = \"much\"", "disk = 5", "bytes_per_year = \"1GB\""] {
            assert!(Policy::from_toml(&format!("[budget]\n{wrong}\n")).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_disabled_filter_keeps_everything() {
        let policy = Policy::from_toml("[filter]\nenabled = false\n").unwrap();
        assert_eq!(policy.action(1.0, None, 0.5), Action::Keep);
    }

    #[test]
    fn every_problem_is_listed() {
        let error = Policy::from_toml(
            "[filter]\nthreshold = 2.0\n[revise]\nattempts_max = 0\n[train]\nbatch_rows = 0\n",
        )
        .unwrap_err();
        let text = error.to_string();
        for place in ["filter.threshold", "revise.attempts_max", "train.batch_rows"] {
            assert!(text.contains(place), "{text}");
        }
        assert!(matches!(Policy::from_toml("[filter]\nsurprise = 1"), Err(PolicyError::Parse(_))));
    }
}
