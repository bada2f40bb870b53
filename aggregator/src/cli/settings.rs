//! `aggregator config`, and where the verbs get their settings.

use std::path::Path;

use serde_json::json;

use super::{CliError, Flags, say, say_json};
use crate::config::{Config, ConfigError, Settings};
use crate::directory::Directory;

#[derive(Debug, clap::Args)]
pub(super) struct ConfigVerb {
    #[command(flatten)]
    flags: Flags,
    /// Without a state directory: the aggregator.toml that `init` would write, to begin a lost one again with.
    #[arg(long)]
    defaults: bool,
}

/// The text of `aggregator.toml`. Which devices a draw chooses nobody can know before.
pub(super) fn written(mut config: Config) -> Result<String, CliError> {
    config.round.sampling_seed = rand::random::<u32>().into();
    toml::to_string(&config).map_err(|error| CliError::other("the configuration", error))
}

/// The file of a directory, overruled by the environment.
pub(super) fn of(dir: &Path) -> Result<Settings, ConfigError> {
    Ok(Settings::read(dir)?.with_environment(environment()))
}

/// The process's environment; what is no UTF-8 names no setting of ours.
pub(super) fn environment() -> impl Iterator<Item = (String, String)> {
    std::env::vars_os().filter_map(|(name, value)| {
        // A value that is no UTF-8 is still said, so that it is refused and not overlooked.
        Some((name.into_string().ok()?, value.to_string_lossy().into_owned()))
    })
}

pub(super) fn config(dir: &Path, verb: &ConfigVerb, set: &[String], json: bool) -> Result<(), CliError> {
    let settings = if verb.defaults {
        Settings::new().with_environment(environment())
    } else {
        Directory::open(dir)?;
        of(dir)?
    };
    let settings = settings.with_flags(|config| verb.flags.apply(config)).with_set(set);
    if verb.defaults && !json {
        // What is refused may hold a password, and is not shown.
        say(written(settings.checked()?)?.trim_end());
        return Ok(());
    }
    for setting in settings.all() {
        if json {
            say_json(&json!({
                "key": setting.key,
                "value": setting.value,
                "source": setting.source.to_string(),
            }))?;
        } else {
            say(&format!("{} = {}  # {}", setting.key, setting.value, setting.source));
        }
    }
    settings.checked()?;
    Ok(())
}
