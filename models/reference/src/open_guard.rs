//! The guard that a command works with, from files that are not yet a package: its configuration, the base or the guard's
//! own package, its adapter, and its words.

use std::{fs, path::PathBuf};

use anyhow::{Context, Result, ensure};
use clap::Args;
use commonweal_adapter::{Adapter, disk::AdapterKind};
use commonweal_package::{EncoderPackage, Package};
use commonweal_runtime::{Cancel, Classifier, ClassifyOptions, Library, Model, OpenOptions};
use commonweal_safety::{Guard, GuardConfig, Kind, Words};

use crate::adapter_file;

#[derive(Args)]
pub(crate) struct GuardFiles {
    /// The compiled package of the base, or of the guard itself
    #[arg(long)]
    package: PathBuf,
    /// The guard's configuration
    #[arg(long, default_value = "models/reference/guard.toml")]
    pub(crate) config: PathBuf,
    /// The guard's adapter; without one the base is judged as it is
    #[arg(long)]
    guard: Option<PathBuf>,
    /// The guard's words [default: the file that the configuration names, from the configuration's directory]
    #[arg(long)]
    words: Option<PathBuf>,
}

impl GuardFiles {
    /// `--package` is the guard's own, whatever path the configuration gives to others. The model is open besides,
    /// where the guard is one that is asked.
    pub(crate) fn open(
        &self,
        library: &Library,
        mut config: GuardConfig,
        words: Option<Words>,
    ) -> Result<(Guard, Option<Model>)> {
        if config.kind == Kind::Classifier {
            ensure!(self.guard.is_none(), "a classifier has no adapter, got --guard");
            let package = EncoderPackage::open(&self.package)?;
            let classifier = Classifier::open(library, &package, ClassifyOptions::default())?;
            return Ok((Guard::of_classifier(classifier, config, words)?, None));
        }
        let model = Model::open(library, &Package::open_base(&self.package)?, OpenOptions::default())?;
        config.package = None;
        let adapter =
            self.guard.as_ref().map(|file| read_adapter(file, &model, AdapterKind::Guard)).transpose()?;
        let guard = Guard::open_with_words(&model, config, adapter.as_ref(), words, &Cancel::new())?;
        Ok((guard, Some(model)))
    }

    /// The words of `--words`, or those that the configuration names.
    pub(crate) fn read_words(&self, config: &GuardConfig) -> Result<Option<Words>> {
        let beside = |file: &String| self.config.parent().map(|directory| directory.join(file));
        let named = config.words.as_ref().and_then(|words| beside(&words.file));
        let Some(path) = self.words.clone().or(named) else { return Ok(None) };
        let bytes = fs::read(&path).with_context(|| format!("{} cannot be read", path.display()))?;
        Ok(Some(Words::read(&bytes).with_context(|| path.display().to_string())?))
    }
}

pub(crate) fn read_adapter(path: &PathBuf, model: &Model, kind: AdapterKind) -> Result<Adapter> {
    let bytes = fs::read(path).with_context(|| format!("{} cannot be read", path.display()))?;
    adapter_file::read(&bytes, model, kind).with_context(|| path.display().to_string())
}
