//! Where each setting comes from: its default, the file, the environment, a flag, `--set`; each overrules those before
//! it. What cannot be used is gathered, not met one at a time: [`Settings::checked`] tells all of it, with where it came
//! from.
//!
//! In the environment `round.goal` is `COMMONWEAL_AGGREGATOR_ROUND__GOAL`. Values there and behind `--set` are TOML; what
//! is no TOML is a string, so that paths and addresses need no quotes. `OTEL_EXPORTER_OTLP_ENDPOINT` is `traces.endpoint`
//! where nothing else says it.

use std::collections::BTreeMap;
use std::path::Path;

use commonweal_traces::Endpoint;
use serde::Serialize;
use toml::{Table, Value};

use super::{Config, ConfigError, FILE};
use crate::store::place::is_secret;

/// What names of settings in the environment begin with.
pub const PREFIX: &str = "COMMONWEAL_AGGREGATOR_";
/// The setting that OpenTelemetry's own variables stand for.
const TRACES: &str = "traces.endpoint";

/// Settings that are URLs.
const URLS: [&str; 4] = ["storage.coordination", "storage.objects", "storage.endpoint", TRACES];
/// Shown in place of what may be a secret.
const HIDDEN: &str = "(not shown)";

/// Where a setting comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// Nobody said anything.
    Default,
    /// `aggregator.toml`.
    File,
    /// A variable of this name.
    Environment(String),
    /// A flag of its own, or that flag's variable.
    Flag,
    /// `--set`.
    Set,
}

impl std::fmt::Display for Source {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Default => formatter.write_str("default"),
            Self::File => formatter.write_str(FILE),
            Self::Environment(name) => formatter.write_str(name),
            Self::Flag => formatter.write_str("flag"),
            Self::Set => formatter.write_str("--set"),
        }
    }
}

/// One setting as it is in force.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Setting {
    /// Its name, such as `round.goal`.
    pub key: String,
    /// Its value.
    pub value: Value,
    /// Where it comes from.
    pub source: Source,
}

/// See the module.
#[derive(Clone, Debug)]
pub struct Settings {
    config: Config,
    table: Table,
    sources: BTreeMap<String, Source>,
    problems: Vec<String>,
}

impl Settings {
    /// The defaults.
    pub fn new() -> Self {
        Self {
            config: Config::default(),
            table: Table::new(),
            sources: BTreeMap::new(),
            problems: Vec::new(),
        }
    }

    /// The file of a state directory. A single problem of its form is told with its line.
    pub fn read(dir: &Path) -> Result<Self, ConfigError> {
        let path = dir.join(FILE);
        let text = Config::text(&path)?;
        Self::of_text(&text, &path)
    }

    /// The same of the file's text.
    pub(crate) fn of_text(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let mut settings = Self::new();
        let whole = Config::of_text(text, path).err();
        // What is no TOML at all has no keys to be looked at one by one.
        let Ok(table) = toml::from_str::<Table>(text) else { return whole.map_or(Ok(settings), Err) };
        for (key, value) in leaves(&table) {
            settings.put(&key, value, Source::File);
        }
        match whole {
            Some(error) if settings.problems.len() <= 1 => Err(error),
            _ => Ok(settings),
        }
    }

    /// Overrules by the environment; whatever has the prefix and names no setting is a problem.
    #[must_use]
    pub fn with_environment(mut self, variables: impl IntoIterator<Item = (String, String)>) -> Self {
        let variables: BTreeMap<String, String> = variables.into_iter().collect();
        // What all programs with OpenTelemetry are told, unless this one was told otherwise.
        let told = self.sources.contains_key(TRACES);
        if let Some((name, endpoint)) = Endpoint::named(|name| variables.get(name).cloned()).filter(|_| !told)
        {
            self.put(TRACES, Value::String(endpoint), Source::Environment(name.to_owned()));
        }
        let ours = variables.into_iter().filter(|(name, _)| name.starts_with(PREFIX));
        for (name, text) in ours {
            let key = name[PREFIX.len()..].to_lowercase().replace("__", ".");
            self.put(&key, parse(&text), Source::Environment(name));
        }
        self
    }

    /// Overrules by `key=value`.
    #[must_use]
    pub fn with_set(mut self, changes: &[String]) -> Self {
        for change in changes {
            match change.split_once('=') {
                Some((key, text)) => self.put(key.trim(), parse(text), Source::Set),
                None => self.problems.push(format!("--set: expected KEY=VALUE, got `{change}`")),
            }
        }
        self
    }

    /// Overrules by flags, which change the settings themselves; what they changed is known by comparison.
    #[must_use]
    pub fn with_flags(mut self, change: impl FnOnce(&mut Config)) -> Self {
        let before = all_leaves(&self.config);
        change(&mut self.config);
        for (key, value) in all_leaves(&self.config) {
            if before.get(&key) != Some(&value) {
                insert(&mut self.table, &key, value);
                self.sources.insert(key, Source::Flag);
            }
        }
        self
    }

    /// Takes a value if the settings still have their form with it.
    fn put(&mut self, key: &str, value: Value, source: Source) {
        let mut table = self.table.clone();
        insert(&mut table, key, value);
        match Config::try_from_table(table.clone()) {
            Ok(config) => {
                (self.config, self.table) = (config, table);
                self.sources.insert(key.to_owned(), source);
            }
            Err(reason) => self.problems.push(format!("{key}: {reason} ({source})")),
        }
    }

    /// The settings, if nothing is wrong with them; otherwise every problem, with where the values came from.
    pub fn checked(&self) -> Result<Config, ConfigError> {
        let mut problems = self.problems.clone();
        if let Err(ConfigError::Values(values)) = self.config.check() {
            problems.extend(values.into_iter().map(|problem| self.attribute(problem)));
        }
        if problems.is_empty() { Ok(self.config.clone()) } else { Err(ConfigError::Values(problems)) }
    }

    /// The settings of a directory that was checked by whoever serves it: only what has no form is refused.
    pub fn formed(self) -> Result<Config, ConfigError> {
        if self.problems.is_empty() { Ok(self.config) } else { Err(ConfigError::Values(self.problems)) }
    }

    /// Every setting by name, to be shown: a URL that may hold a password is not. Those without a value and without a
    /// default are not there.
    pub fn all(&self) -> Vec<Setting> {
        let source = |key: &String| self.sources.get(key).cloned().unwrap_or(Source::Default);
        let shown = |key: &String, value: Value| match &value {
            Value::String(url) if URLS.contains(&key.as_str()) && is_secret(url) => {
                Value::String(HIDDEN.to_owned())
            }
            _ => value,
        };
        all_leaves(&self.config)
            .into_iter()
            .map(|(key, value)| Setting { source: source(&key), value: shown(&key, value), key })
            .collect()
    }

    /// A problem with the sources of the settings that it names.
    fn attribute(&self, problem: String) -> String {
        let named: Vec<String> = self
            .sources
            .iter()
            .filter(|(key, _)| is_named(&problem, key))
            .map(|(key, source)| format!("{key} from {source}"))
            .collect();
        if named.is_empty() { problem } else { format!("{problem} ({})", named.join(", ")) }
    }
}

impl Default for Settings {
    fn default() -> Self {
        Self::new()
    }
}

impl Config {
    fn try_from_table(table: Table) -> Result<Self, String> {
        Value::Table(table).try_into().map_err(|error: toml::de::Error| {
            // The last line has the reason; what stands before it points into a text that nobody wrote.
            error.message().lines().last().unwrap_or_default().to_owned()
        })
    }
}

/// Whether a problem speaks of a setting: by its full name, or by the last part of it behind its section.
fn is_named(problem: &str, key: &str) -> bool {
    let is_word = |text: &str, word: &str| {
        text.match_indices(word).any(|(at, _)| {
            let is_edge =
                |byte: Option<&u8>| byte.is_none_or(|byte| !byte.is_ascii_alphanumeric() && *byte != b'_');
            let bytes = text.as_bytes();
            is_edge(at.checked_sub(1).and_then(|at| bytes.get(at))) && is_edge(bytes.get(at + word.len()))
        })
    };
    let behind = key.rsplit_once('.').is_some_and(|(section, last)| {
        problem.split_once(':').is_some_and(|(about, rest)| is_word(about, section) && is_word(rest, last))
    });
    behind || is_word(problem, key)
}

/// TOML, or else a string.
fn parse(text: &str) -> Value {
    let table = toml::from_str::<Table>(&format!("value = {text}"));
    let value = table.ok().filter(|table| table.len() == 1).and_then(|mut table| table.remove("value"));
    value.unwrap_or_else(|| Value::String(text.to_owned()))
}

fn insert(table: &mut Table, key: &str, value: Value) {
    match key.split_once('.') {
        None => drop(table.insert(key.to_owned(), value)),
        Some((section, rest)) => {
            let inner = table.entry(section).or_insert_with(|| Value::Table(Table::new()));
            if !inner.is_table() {
                *inner = Value::Table(Table::new());
            }
            if let Value::Table(inner) = inner {
                insert(inner, rest, value);
            }
        }
    }
}

/// Every value that is no table, by its full name.
fn leaves(table: &Table) -> BTreeMap<String, Value> {
    let mut all = BTreeMap::new();
    for (key, value) in table {
        match value {
            Value::Table(inner) if !inner.is_empty() => {
                all.extend(leaves(inner).into_iter().map(|(rest, value)| (format!("{key}.{rest}"), value)));
            }
            value => drop(all.insert(key.clone(), value.clone())),
        }
    }
    all
}

fn all_leaves(config: &Config) -> BTreeMap<String, Value> {
    Table::try_from(config).map(|table| leaves(&table)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(settings: &Settings, key: &str) -> (Value, Source) {
        let all = settings.all();
        let setting =
            all.iter().find(|setting| setting.key == key).unwrap_or_else(|| panic!("{key} in {all:?}"));
        (setting.value.clone(), setting.source.clone())
    }

    fn variables(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs.iter().map(|(name, text)| (format!("{PREFIX}{name}"), (*text).to_owned())).collect()
    }

    fn directory(text: &str) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(FILE), text).unwrap();
        dir
    }

    #[test]
    fn each_source_overrules_those_before_it() {
        let dir = directory("threads = 2\n[round]\ngoal = 5\nquorum = 3\nwait_ms = 7\n");
        let settings = Settings::read(dir.path())
            .unwrap()
            .with_environment(variables(&[
                ("ROUND__GOAL", "6"),
                ("ROUND__QUORUM", "4"),
                ("ADMIN__LISTEN", "off"),
            ]))
            .with_flags(|config| config.round.quorum = 1)
            .with_set(&[
                "evaluate.gates.safe_rate_min=off".to_owned(),
                "align.redteam=/a b.jsonl".to_owned(),
            ]);
        let name = |name: &str| Source::Environment(format!("{PREFIX}{name}"));
        for (key, value, from) in [
            ("threads", Value::Integer(2), Source::File),
            ("round.wait_ms", Value::Integer(7), Source::File),
            ("round.goal", Value::Integer(6), name("ROUND__GOAL")),
            ("round.quorum", Value::Integer(1), Source::Flag),
            ("admin.listen", Value::String("off".into()), name("ADMIN__LISTEN")),
            ("evaluate.gates.safe_rate_min", Value::String("off".into()), Source::Set),
            ("align.redteam", Value::String("/a b.jsonl".into()), Source::Set),
            ("certificate_days", Value::Integer(30), Source::Default),
        ] {
            assert_eq!(source(&settings, key), (value, from), "{key}");
        }
        let config = settings.formed().unwrap();
        assert_eq!((config.round.goal, config.round.quorum, config.threads), (6, 1, Some(2)));
    }

    #[test]
    fn every_setting_can_be_said_in_the_environment() {
        for setting in Settings::new().all() {
            let name = setting.key.to_uppercase().replace('.', "__");
            let text = setting.value.to_string();
            let settings = Settings::new().with_environment(variables(&[(&name, &text)]));
            let from = Source::Environment(format!("{PREFIX}{name}"));
            assert_eq!(source(&settings, &setting.key), (setting.value, from));
            settings.formed().unwrap();
        }
    }

    #[test]
    fn all_problems_are_told_with_their_sources() {
        let dir = directory("package = \"nowhere\"\n[round]\nquorum = 99\n[receive]\nrequests_burst = 1\n");
        let settings = Settings::read(dir.path())
            .unwrap()
            .with_environment(variables(&[
                ("ROUND__GAOL", "6"),
                ("THREADS", "many"),
                ("MERGE__TRIMMED_SHARE", "0.5"),
                ("RECEIVE__CONGESTION", "reno"),
            ]))
            .with_set(&["nonsense".to_owned()]);
        let text = settings.checked().unwrap_err().to_string();
        for part in [
            "round.gaol: unknown field `gaol`",
            "(COMMONWEAL_AGGREGATOR_ROUND__GAOL)",
            "threads: invalid type",
            "receive.congestion: unknown variant `reno`, expected `cubic` or `bbr`",
            "--set: expected KEY=VALUE, got `nonsense`",
            "round.quorum from aggregator.toml",
            "package from aggregator.toml",
            "receive.requests_burst from aggregator.toml",
            "merge.trimmed_share from COMMONWEAL_AGGREGATOR_MERGE__TRIMMED_SHARE",
        ] {
            assert!(text.contains(part), "{part} in {text}");
        }
    }

    #[test]
    fn a_password_in_a_url_is_refused_and_shown_nowhere() {
        let settings = Settings::new()
            .with_environment(variables(&[("STORAGE__COORDINATION", "postgres://a:hunter2@b/c")]))
            .with_set(&["storage.objects=s3://key:hunter2@bucket".to_owned()])
            .with_flags(|config| config.traces.endpoint = Some("http://me:hunter2@h:1".to_owned()));
        let shown = format!("{:?} {}", settings.all(), settings.checked().unwrap_err());
        assert!(!shown.contains("hunter2") && shown.contains(HIDDEN), "{shown}");
        for part in [
            "storage.coordination: expected no password",
            "storage.objects: expected s3://",
            "traces.endpoint: expected http://HOST:PORT",
        ] {
            assert!(shown.contains(part), "{part} in {shown}");
        }
        let settings = Settings::new().with_set(&["storage.coordination=postgres://a@b/c".to_owned()]);
        assert_eq!(source(&settings, "storage.coordination").0, Value::String("postgres://a@b/c".to_owned()));
    }

    #[test]
    fn a_file_with_several_wrong_keys_has_them_all_told() {
        let dir = directory("plian = true\n[round]\ngaol = 1\n");
        let text = Settings::read(dir.path()).unwrap().checked().unwrap_err().to_string();
        assert!(
            text.contains("plian: unknown field") && text.contains("round.gaol: unknown field"),
            "{text}"
        );
        let dir = directory("plain = true\nplian = true\n");
        assert!(matches!(Settings::read(dir.path()), Err(ConfigError::Form { .. })));
        let dir = directory("plain = \n");
        assert!(matches!(Settings::read(dir.path()), Err(ConfigError::Form { .. })));
    }
}
