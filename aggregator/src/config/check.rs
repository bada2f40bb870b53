//! Every problem of a configuration at once, in the operator's words.

use std::path::Path;

use commonweal_adapter::AdapterLayout;
use commonweal_adapter::layout::RANK_MAX;
use commonweal_adapter::merge::{ROBUST_DEVICES_MAX, ROBUST_VALUES_MAX};
use commonweal_protocol::{
    BaseHash, Digest, Mode, PollReply, ReconnectWindow, Reply, RoundId, RoundTask, Scaffold, Start, Version,
    encode,
};

use super::{Config, ConfigError, Optimizer, Rule};
use crate::evaluate::sets;
use crate::round::{GOAL_MAX, TASKS_MAX};
use crate::store::PAGE_MAX;

const _: () =
    assert!((GOAL_MAX + TASKS_MAX) as usize <= PAGE_MAX, "a round's updates are listed by one call");

impl Config {
    /// Refuses values that cannot work, all named together.
    pub fn check(&self) -> Result<(), ConfigError> {
        let mut problems: Vec<String> =
            self.round.problems().into_iter().map(|problem| problem.to_string()).collect();
        problems.extend(self.storage.problems());
        problems.extend(self.traces.problems());
        let mut require = |holds: bool, text: String| {
            if !holds {
                problems.push(text);
            }
        };
        if let Err(error) = encode(&Reply::Poll(self.probe())) {
            let cause =
                std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string);
            require(false, format!("train or compress: {cause}"));
        }
        require(
            self.package.join("package.toml").is_file(),
            format!(
                "package: expected a model package, found no package.toml in `{}`",
                self.package.display()
            ),
        );
        require(
            self.threads.is_none_or(|threads| (1..=1024).contains(&threads)),
            "threads: expected 1 to 1024".to_owned(),
        );
        require(
            (1..=3650).contains(&self.certificate_days),
            format!("certificate_days: expected 1 to 3650, got {}", self.certificate_days),
        );
        let receive = &self.receive;
        require(
            receive.requests_burst >= 4 && receive.requests_per_second >= 0.1,
            "receive: expected requests_burst of at least 4 and requests_per_second of at least 0.1"
                .to_owned(),
        );
        require(
            receive.resends_max >= 1 && receive.releases_kept >= 2 && receive.norm_max > 0.0,
            "receive: expected resends_max ≥ 1, releases_kept ≥ 2, norm_max > 0".to_owned(),
        );
        require(
            (0.01..=1e6).contains(&receive.visits_per_second),
            format!("receive.visits_per_second: expected 0.01 to 1000000, got {}", receive.visits_per_second),
        );
        let release = &self.release;
        require(
            (0.0..1.0).contains(&release.canary_share)
                && (5..=256).contains(&release.canary_reports)
                && (0.01..=10_000.0).contains(&release.canary_hours)
                && (0.0..=10.0).contains(&release.canary_loss_rise)
                && (0.0..1.0).contains(&release.canary_failures),
            "release: expected canary_share 0 to below 1, canary_reports 5 to 256, canary_hours 0.01 to 10000, \
             canary_loss_rise 0 to 10, canary_failures 0 to below 1"
                .to_owned(),
        );
        let merge = &self.merge;
        require(
            (0.0..0.5).contains(&merge.trimmed_share),
            format!("merge.trimmed_share: expected 0 to below 0.5, got {}", merge.trimmed_share),
        );
        require(
            merge.server_learning_rate > 0.0 && merge.server_learning_rate <= 10.0,
            format!("merge.server_learning_rate: expected 0 to 10, got {}", merge.server_learning_rate),
        );
        for (name, value) in [("beta1", merge.beta1), ("beta2", merge.beta2)] {
            require((0.0..1.0).contains(&value), format!("merge.{name}: expected 0 to below 1, got {value}"));
        }
        require(
            merge.tau > 0.0 && merge.tau <= 1.0,
            format!("merge.tau: expected above 0 and at most 1, got {}", merge.tau),
        );
        for (name, value) in [
            ("clip_median_factor", merge.clip_median_factor),
            ("clip_norm", merge.clip_norm),
            ("weight_median_factor", merge.weight_median_factor),
        ] {
            require(
                value.is_finite() && value >= 0.0,
                format!("merge.{name}: expected 0 or more, got {value}"),
            );
        }
        let robust = merge.rule != Rule::Mean && !self.plain;
        let updates = self.updates_max();
        require(
            !robust || updates <= ROBUST_DEVICES_MAX,
            format!(
                "{}: expected at most {ROBUST_DEVICES_MAX} with a robust merge.rule, got {updates}",
                self.updates_name()
            ),
        );
        require(
            !robust || !self.train.scaffold,
            format!(
                "train.scaffold: needs merge.rule mean, got {}: what a robust rule leaves out of the control \
                     variate its device would still count on",
                merge.rule.name()
            ),
        );
        if self.round.is_buffered() {
            let mode = self.train.mode;
            require(
                !self.train.scaffold,
                "train.scaffold: expected false with round.mode buffered: control variates are those of one round and \
                 one release"
                    .to_owned(),
            );
            require(
                mode != Mode::Rolora,
                "train.mode: expected fedit or ffa with round.mode buffered, got rolora: updates of other rounds train \
                 the other factor"
                    .to_owned(),
            );
            require(
                mode != Mode::Exact,
                "train.mode: expected fedit or ffa with round.mode buffered, got exact: products of factors that began \
                 from other releases cannot be moved to the current one"
                    .to_owned(),
            );
            let kept_min = u64::from(self.round.staleness_max) + 1;
            require(
                receive.releases_kept > kept_min,
                format!(
                    "receive.releases_kept: expected more than {kept_min}, so that every release that devices train from \
                     is kept, got {}",
                    receive.releases_kept
                ),
            );
        }
        if self.train.mode == Mode::Exact {
            let why = "train.mode exact factors the adapter anew";
            require(
                !robust,
                format!(
                    "merge.rule: expected mean, got {}: {why}, by the mean of products",
                    merge.rule.name()
                ),
            );
            require(
                merge.optimizer == Optimizer::Fedavg
                    && (merge.server_learning_rate - 1.0).abs() < f32::EPSILON,
                format!(
                    "merge.optimizer: expected fedavg with server_learning_rate 1, got {} with {}: {why}, which moments \
                     and steps of before do not fit",
                    merge.optimizer.name(),
                    merge.server_learning_rate
                ),
            );
            require(
                !self.train.scaffold,
                format!("train.scaffold: expected false: {why}, which control variates of before do not fit"),
            );
        }
        let honest_min = merge.byzantine.saturating_mul(2).saturating_add(3);
        require(
            !robust || merge.rule != Rule::MultiKrum || self.round.quorum as usize >= honest_min,
            format!(
                "round.quorum: expected at least {honest_min} (2 · merge.byzantine + 3) with multi-krum, got {}",
                self.round.quorum
            ),
        );
        let align = &self.align;
        require(
            (1..=10_000).contains(&align.prompts)
                && (1..=10_000).contains(&align.steps)
                && (2..=RANK_MAX).contains(&align.batch)
                && (1..=16).contains(&align.attempts_max)
                && (1..=4096).contains(&align.answer_tokens_max),
            "align: expected prompts and steps 1 to 10000, batch 2 to 512, attempts_max 1 to 16, \
             answer_tokens_max 1 to 4096"
                .to_owned(),
        );
        require(
            align.learning_rate > 0.0 && align.learning_rate <= 1.0,
            format!("align.learning_rate: expected 0 to 1, got {}", align.learning_rate),
        );
        require(
            self.evaluate.rows_max > 0 && (1..=4096).contains(&self.evaluate.answer_tokens_max),
            "evaluate: expected rows_max ≥ 1 and answer_tokens_max 1 to 4096".to_owned(),
        );
        let gates = &self.evaluate.gates;
        for (name, value, high) in [
            ("safe_rate_min", gates.safe_rate_min, 1.0),
            ("safe_rate_drop_max", gates.safe_rate_drop_max, 1.0),
            ("attack_success_rate_max", gates.attack_success_rate_max, 1.0),
            ("over_refusal_max", gates.over_refusal_max, 1.0),
            ("over_refusal_rise_max", gates.over_refusal_rise_max, 1.0),
            ("held_out_loss_max", gates.held_out_loss_max, 1e6),
            ("held_out_loss_rise_max", gates.held_out_loss_rise_max, 1e6),
        ] {
            require(
                value.is_none_or(|value| (0.0..=high).contains(&value)),
                format!("evaluate.gates.{name}: expected 0 to {high}, got {}", value.unwrap_or_default()),
            );
        }
        let prompts = [&self.evaluate.harmful, &self.evaluate.benign, &align.redteam];
        for path in prompts.into_iter().flatten() {
            check_set(path, |path| sets::read_prompts(path).map(drop), &mut require);
        }
        for path in [&self.evaluate.held_out, &align.replay].into_iter().flatten() {
            check_set(path, |path| sets::read_conversations(path).map(drop), &mut require);
        }
        if problems.is_empty() { Ok(()) } else { Err(ConfigError::Values(problems)) }
    }

    /// Refuses values that cannot work with a package of this context, in tokens, and this layout: they would be found
    /// out after devices have trained.
    pub fn check_package(&self, context: usize, layout: &AdapterLayout) -> Result<(), ConfigError> {
        let mut problems = Vec::new();
        let answers = [
            ("align", self.align.answer_tokens_max, self.align.enabled && !self.plain),
            ("evaluate", self.evaluate.answer_tokens_max, true),
        ];
        // A prompt has a token, and so has the answer's end.
        let most = context.saturating_sub(2);
        for (section, got, is_used) in answers {
            if is_used && got > most {
                problems.push(format!(
                    "{section}.answer_tokens_max: expected at most {most}, as the package's context is {context}, got {got}"
                ));
            }
        }
        // Rounds that alternate between the factors are even and odd.
        let values = |round| layout.trainable_parameters(self.train.trainable(RoundId(round)));
        let trainable = values(0).max(values(1));
        let most = ROBUST_VALUES_MAX / trainable.max(1);
        let updates = self.updates_max();
        if self.merge.rule != Rule::Mean && !self.plain && updates > most {
            problems.push(format!(
                "{}: expected at most {most} with a robust merge.rule, as an update has {trainable} values, got {updates}",
                self.updates_name()
            ));
        }
        if problems.is_empty() { Ok(()) } else { Err(ConfigError::Values(problems)) }
    }

    /// Updates that a merge may have to take.
    pub fn updates_max(&self) -> usize {
        self.round.updates_max(self.storage.coordination.is_some()) as usize
    }

    /// What decides that number, for messages.
    fn updates_name(&self) -> &'static str {
        if self.storage.coordination.is_some() {
            "round.goal with round.over_selection, as several processes receive"
        } else {
            "round.goal"
        }
    }

    /// A reply with this configuration's settings: what does not encode would be refused by devices.
    fn probe(&self) -> PollReply {
        let task = RoundTask {
            round: RoundId(1),
            base: BaseHash([0; 32]),
            start: Start { version: Version(0), digest: Digest([0; 32]), length: 1 },
            mode: self.train.mode,
            train: self.train.settings(),
            scaffold: Scaffold::Off,
            compress: self.compress.settings(),
            seed: 0,
            deadline_ms: self.round.deadline_ms,
        };
        let reconnect = ReconnectWindow {
            after_ms: self.receive.reconnect_after_ms,
            spread_ms: self.receive.reconnect_spread_ms,
        };
        PollReply { task: Some(task), release: None, successions: vec![], reconnect }
    }
}

fn check_set(
    path: &Path,
    read: impl Fn(&Path) -> Result<(), sets::SetError>,
    require: &mut impl FnMut(bool, String),
) {
    if let Err(error) = read(path) {
        let cause =
            std::error::Error::source(&error).map_or_else(String::new, |source| format!(" ({source})"));
        require(false, format!("{error}{cause}"));
    }
}

#[cfg(test)]
mod tests {
    use commonweal_adapter::CompressOptions;

    use super::*;
    use crate::round::RoundMode;

    fn sound() -> (tempfile::TempDir, Config) {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("package.toml"), "").unwrap();
        let config = Config { package: dir.path().to_owned(), ..Config::default() };
        (dir, config)
    }

    #[test]
    fn the_default_is_sound_and_survives_its_file() {
        let (dir, config) = sound();
        config.check().unwrap();
        let text = toml::to_string(&config).unwrap();
        std::fs::write(dir.path().join(super::super::FILE), text).unwrap();
        assert_eq!(Config::read(dir.path()).unwrap(), config);
    }

    #[test]
    fn all_problems_are_listed_at_once() {
        let (dir, mut config) = sound();
        let bad = dir.path().join("bad.jsonl");
        std::fs::write(&bad, "{\"prompt\":\"a\"}\nnot json\n").unwrap();
        config.round.quorum = 99;
        config.train.learning_rate = f32::NAN;
        config.merge.trimmed_share = 0.5;
        config.evaluate.gates.safe_rate_min = Some(80.0);
        config.evaluate.benign = Some(bad);
        config.align.redteam = Some("absent.jsonl".into());
        config.package = "nowhere".into();
        let text = config.check().unwrap_err().to_string();
        for part in [
            "round.quorum",
            "train or compress: learning_rate",
            "merge.trimmed_share",
            "safe_rate_min: expected 0 to 1, got 80",
            "bad.jsonl, line 2",
            "absent.jsonl: cannot be read",
            "nowhere",
        ] {
            assert!(text.contains(part), "{part} in {text}");
        }
    }

    #[test]
    fn what_cannot_work_with_buffered_rounds_is_refused_by_name() {
        let (_dir, mut config) = sound();
        config.round.mode = RoundMode::Buffered;
        config.check().unwrap();
        assert_eq!(config.method(), "fedit, mean, fedavg, buffered");
        config.train.scaffold = true;
        (config.receive.releases_kept, config.round.staleness_max) = (5, 4);
        for (mode, part) in [
            (Mode::Rolora, "train.mode: expected fedit or ffa with round.mode buffered, got rolora"),
            (Mode::Exact, "train.mode: expected fedit or ffa with round.mode buffered, got exact"),
        ] {
            config.train.mode = mode;
            let text = config.check().unwrap_err().to_string();
            for part in [part, "train.scaffold: expected false with round.mode", "receive.releases_kept"] {
                assert!(text.contains(part), "{part} in {text}");
            }
        }
        (config.train.mode, config.train.scaffold) = (Mode::Ffa, false);
        config.receive.releases_kept = 6;
        config.check().unwrap();
    }

    #[test]
    fn what_devices_could_not_pack_by_is_refused() {
        let (_dir, mut config) = sound();
        config.compress.block = 4;
        let text = config.check().unwrap_err().to_string();
        assert!(text.contains("train or compress: compress block"), "{text}");
        for (block, level) in (0..=4200).map(|block| (block, 1)).chain((0..=30).map(|level| (64, level))) {
            (config.compress.block, config.compress.level) = (block, level);
            let options = CompressOptions {
                block: usize::from(block),
                level: i32::from(level),
                ..CompressOptions::default()
            };
            assert_eq!(config.check().is_ok(), options.validate().is_ok(), "block {block}, level {level}");
        }
    }

    #[test]
    fn a_robust_rule_that_no_round_could_satisfy_is_refused() {
        let (_dir, mut config) = sound();
        config.merge.rule = Rule::MultiKrum;
        let text = config.check().unwrap_err().to_string();
        assert!(text.contains("expected at least 5") && text.contains("got 4"), "{text}");
        (config.round.quorum, config.round.goal) = (5, 2_000);
        assert!(config.check().unwrap_err().to_string().contains("round.goal: expected at most 1024"));
        config.round.goal = 8;
        config.check().unwrap();
        config.storage.coordination = Some("postgres://a@b/c".to_owned());
        config.storage.objects = Some("s3://bucket".to_owned());
        (config.round.goal, config.round.over_selection) = (1_000, 1.1);
        let text = config.check().unwrap_err().to_string();
        assert!(text.contains("expected at most 1024") && text.contains("got 1100"), "{text}");
        (config.merge.rule, config.round.goal) = (Rule::Mean, GOAL_MAX);
        config.check().unwrap();
    }

    #[test]
    fn what_does_not_go_together_is_refused_by_name() {
        let refused = |change: fn(&mut Config), names: &[&str]| {
            let (_dir, mut config) = sound();
            (config.round.quorum, config.round.goal) = (5, 8);
            change(&mut config);
            let text = config.check().unwrap_err().to_string();
            for name in names {
                assert!(text.contains(name), "{name} in {text}");
            }
        };
        refused(
            |config| {
                config.train.mode = Mode::Exact;
                config.train.scaffold = true;
                config.merge.rule = Rule::Median;
                config.merge.optimizer = Optimizer::Fedadam;
            },
            &["merge.rule: expected mean, got median", "got fedadam", "train.scaffold: expected false"],
        );
        refused(
            |config| {
                config.train.mode = Mode::Exact;
                config.merge.server_learning_rate = 0.5;
            },
            &["got fedavg with 0.5"],
        );
        refused(
            |config| {
                config.train.scaffold = true;
                config.merge.rule = Rule::MultiKrum;
            },
            &["train.scaffold: needs merge.rule mean, got multi-krum"],
        );
        refused(|config| (config.merge.beta1, config.merge.tau) = (1.0, 0.0), &["merge.beta1", "merge.tau"]);
        let (_dir, mut config) = sound();
        config.train.mode = Mode::Rolora;
        config.train.scaffold = true;
        config.merge.optimizer = Optimizer::Fedyogi;
        config.check().unwrap();
        config.train = super::super::Train { mode: Mode::Exact, ..super::super::Train::default() };
        config.merge = super::super::Merge::default();
        config.check().unwrap();
    }

    #[test]
    fn what_the_package_does_not_bear_is_refused() {
        use commonweal_adapter::layout::{Module, Target};
        let (_dir, mut config) = sound();
        // 2 · 64 · 2^16 values in a layer, so 2^26 in all: a robust merge takes 16.
        let module = Module { target: Target::Q, inputs: 1 << 16, outputs: 1 << 16 };
        let layout = AdapterLayout::new(8, 64, 8.0, vec![module]).unwrap();
        config.train.mode = Mode::Fedit;
        config.check_package(1024, &layout).unwrap();
        config.evaluate.answer_tokens_max = 1_023;
        let text = config.check_package(1024, &layout).unwrap_err().to_string();
        assert!(
            text.contains("evaluate.answer_tokens_max: expected at most 1022") && !text.contains("align")
        );
        config.evaluate.answer_tokens_max = 1_022;
        (config.merge.rule, config.round.goal) = (Rule::Median, 16);
        config.check_package(1024, &layout).unwrap();
        config.round.goal = 17;
        let text = config.check_package(1024, &layout).unwrap_err().to_string();
        assert!(text.contains("round.goal: expected at most 16") && text.contains("got 17"), "{text}");
        // Several processes take what everybody sends who was asked.
        (config.round.goal, config.round.over_selection) = (12, 1.3);
        config.storage.coordination = Some("postgres://a@b/c".to_owned());
        config.check_package(1024, &layout).unwrap();
        config.round.over_selection = 1.4;
        let text = config.check_package(1024, &layout).unwrap_err().to_string();
        assert!(text.contains("over_selection, as several") && text.contains("got 17"), "{text}");
        config.plain = true;
        config.check_package(1024, &layout).unwrap();
    }

    #[test]
    fn an_unknown_key_is_refused_with_its_line() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(super::super::FILE), "plain = true\nplian = true\n").unwrap();
        let error = Config::read(dir.path()).unwrap_err();
        let cause = std::error::Error::source(&error).unwrap().to_string();
        assert!(cause.contains("line 2") && cause.contains("plian"), "{cause}");
    }
}
