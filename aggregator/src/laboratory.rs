//! The model with its guard and reviser over one base, opened once, for `align` and `evaluate`.
//!
//! Reads a package and the operator's sets; keeps them for the life of the process.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use commonweal_adapter::{Adapter, AdapterFacts, AdapterKind, AdapterLayout, ReadError, disk};
use commonweal_package::Package;
use commonweal_protocol::BaseHash;
use commonweal_runtime::{
    AdaptError, Cancel, ConversationError, DeviceError, GenerateOptions, InferError, Library, LibraryError,
    Message, Model, OpenError, OpenOptions, PreparedAdapter, Prompt, TrainError,
};
use commonweal_safety::{
    ConfigError, Constitution, ConstitutionError, Guard, GuardConfig, GuardError, Judgement, Pair,
    ReviseError, Reviser,
};

use crate::config::Config;
use crate::evaluate::sets::{SetError, Sets};

/// Why model work cannot be done.
#[derive(Debug, thiserror::Error)]
pub enum LaboratoryError {
    /// The runtime library.
    #[error("the runtime library cannot be used")]
    Library(#[from] LibraryError),
    /// What the model shall run on.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The package.
    #[error("the package cannot be used")]
    Package(#[from] commonweal_package::OpenError),
    /// The model.
    #[error("the model cannot be opened")]
    Open(#[from] OpenError),
    /// A file of the package.
    #[error("{}: cannot be read", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The package's guard.
    #[error("guard.toml of the package cannot be used")]
    GuardConfig(#[from] ConfigError),
    /// The package's constitution.
    #[error("constitution.toml of the package cannot be used")]
    Constitution(#[from] ConstitutionError),
    /// An adapter file.
    #[error("{name}: expected an adapter for this base")]
    Adapter {
        /// Which.
        name: String,
        /// Why.
        #[source]
        source: ReadError,
    },
    /// An adapter of another base or kind.
    #[error("{name}: expected {expected}, got {got}")]
    Facts {
        /// Which.
        name: String,
        /// What would do.
        expected: String,
        /// What it says.
        got: String,
    },
    /// A set.
    #[error("an evaluation or alignment set cannot be used")]
    Set(#[from] SetError),
    /// Alignment needs a guard.
    #[error("alignment needs guard.toml in the package; attach one, or set align.enabled = false")]
    NoGuard,
    /// The guard does not judge.
    #[error("the guard failed")]
    Guard(#[from] GuardError),
    /// The reviser does not revise.
    #[error("the reviser failed")]
    Revise(#[from] ReviseError),
    /// The adapter does not fit.
    #[error("the adapter does not fit the model")]
    Adapt(#[from] AdaptError),
    /// The model does not run, or was cancelled.
    #[error("the model failed")]
    Infer(#[from] InferError),
    /// A conversation does not become tokens.
    #[error("a row of a set does not become tokens")]
    Conversation(#[from] ConversationError),
    /// Tuning failed.
    #[error("tuning failed")]
    Train(#[from] TrainError),
    /// The process is ending.
    #[error("cancelled")]
    Cancelled,
}

impl LaboratoryError {
    /// Whether the candidate is innocent: the machine or the process is why, and another try may work.
    pub fn is_unavailable(&self) -> bool {
        matches!(
            self,
            Self::Library(_) | Self::Package(_) | Self::Open(_) | Self::File { .. } | Self::Cancelled
        )
    }
}

/// Which base the federation trains on, and its adapter's shape: enough to read and write adapter files.
#[derive(Clone, Debug)]
pub struct Base {
    /// The frozen base.
    pub hash: BaseHash,
    /// The adapter's shape.
    pub layout: Arc<AdapterLayout>,
}

/// Opens and verifies a package.
pub fn open_package(directory: &Path) -> Result<(Package, Base), LaboratoryError> {
    let package = Package::open(directory)?;
    let base = Base { hash: BaseHash(package.base().0), layout: Arc::new(package.layout().clone()) };
    Ok((package, base))
}

/// Whether a package can judge.
pub fn has_guard(package: &Package) -> bool {
    package.file("guard.toml").is_some()
}

impl Base {
    /// The bytes of an assistant's adapter file.
    pub fn write(&self, adapter: &Adapter) -> Result<Vec<u8>, commonweal_adapter::AdapterError> {
        self.write_as(adapter, AdapterKind::Assistant)
    }

    /// The bytes of a file of this kind.
    pub fn write_as(
        &self,
        adapter: &Adapter,
        kind: AdapterKind,
    ) -> Result<Vec<u8>, commonweal_adapter::AdapterError> {
        disk::write(adapter, &AdapterFacts { base: self.hash.0, kind })
    }

    /// Reads an adapter file of this base.
    pub fn read(&self, name: &str, bytes: &[u8], kind: AdapterKind) -> Result<Adapter, LaboratoryError> {
        let (adapter, facts) =
            disk::read(bytes).map_err(|source| LaboratoryError::Adapter { name: name.to_owned(), source })?;
        let refuse = |expected: String, got: String| {
            Err(LaboratoryError::Facts { name: name.to_owned(), expected, got })
        };
        if facts.base != self.hash.0 {
            return refuse(format!("base {}", self.hash), BaseHash(facts.base).to_string());
        }
        if facts.kind != kind {
            return refuse(format!("an adapter of kind {kind}"), facts.kind.to_string());
        }
        let may_differ = matches!(kind, AdapterKind::Guard | AdapterKind::Reviser);
        if !may_differ && **adapter.layout() != *self.layout {
            return refuse(self.layout.to_string(), adapter.layout().to_string());
        }
        Ok(adapter)
    }
}

fn text_of(package: &Package, name: &str) -> Result<Option<String>, LaboratoryError> {
    let Some(path) = package.file(name) else { return Ok(None) };
    std::fs::read_to_string(&path).map(Some).map_err(|source| LaboratoryError::File { path, source })
}

/// See the module.
#[derive(Debug)]
pub struct Laboratory {
    /// The open model.
    pub model: Model,
    /// Judges answers, if the package has one.
    pub guard: Option<Guard>,
    /// Rewrites answers, if the package has a guard to judge the rewritings.
    pub reviser: Option<Reviser>,
    /// The operator's files, read.
    pub sets: Sets,
    /// Ends running model calls when the process ends.
    pub cancel: Cancel,
}

impl Laboratory {
    /// Loads everything.
    pub fn open(
        package: &Package,
        base: &Base,
        config: &Config,
        cancel: &Cancel,
    ) -> Result<Self, LaboratoryError> {
        let sets = Sets::read(config)?;
        let threads = config.threads.and_then(NonZeroUsize::new);
        let library = Library::load_with(config.runtime_library.as_deref(), threads)?;
        if let Some(provider) = &config.provider {
            library.add_provider(provider)?;
        }
        let (library, choice) = library.choose(&config.device, package)?;
        tracing::info!("{choice}");
        let model = Model::open(&library, package, OpenOptions::default())?;
        let optional = |name: &str, kind| -> Result<Option<Adapter>, LaboratoryError> {
            let Some(path) = package.file(name) else { return Ok(None) };
            let bytes = std::fs::read(&path).map_err(|source| LaboratoryError::File { path, source })?;
            base.read(name, &bytes, kind).map(Some)
        };
        let (guard, reviser) = match text_of(package, "guard.toml")? {
            None => (None, None),
            Some(text) => {
                let adapter = optional("adapters/guard.safetensors", AdapterKind::Guard)?;
                let guard = Guard::open(&model, GuardConfig::from_toml(&text)?, adapter.as_ref(), cancel)?;
                let text = text_of(package, "constitution.toml")?;
                let text = text.as_deref().unwrap_or_else(|| Constitution::default_text());
                let adapter = optional("adapters/reviser.safetensors", AdapterKind::Reviser)?;
                let reviser = Reviser::open(&model, Constitution::from_toml(text)?, adapter.as_ref())?;
                (Some(guard), Some(reviser))
            }
        };
        Ok(Self { model, guard, reviser, sets, cancel: cancel.clone() })
    }

    /// Greedy answers to prompts, with their last question.
    pub fn answer<'set>(
        &self,
        adapter: &PreparedAdapter,
        conversations: &[&'set [Message]],
        tokens_max: usize,
    ) -> Result<Vec<Answered<'set>>, LaboratoryError> {
        let chat = self.model.chat();
        let room = self.model.context().saturating_sub(tokens_max + 1).max(1);
        let mut kept = Vec::with_capacity(conversations.len());
        let mut prompts: Vec<Prompt> = Vec::with_capacity(conversations.len());
        for conversation in conversations {
            let prompt = chat.prompt(conversation)?;
            if prompt.ids.len() > room {
                tracing::warn!(tokens = prompt.ids.len(), room, "a prompt is too long for the context");
                continue;
            }
            prompts.push(prompt);
            kept.push(conversation.last().map_or("", |message| message.content.as_str()));
        }
        let options = GenerateOptions { max_new_tokens: tokens_max, ..GenerateOptions::default() };
        let answers = self.model.generate(adapter, &prompts, &options, &self.cancel)?;
        Ok(kept
            .into_iter()
            .zip(answers)
            .map(|(question, generated)| Answered { question, answer: generated.text })
            .collect())
    }

    /// The guard's word on answers; none without a guard.
    pub fn judge(&self, answered: &[Answered<'_>]) -> Result<Option<Vec<Judgement>>, LaboratoryError> {
        let Some(guard) = &self.guard else { return Ok(None) };
        let pairs: Vec<Pair<'_>> = answered
            .iter()
            .map(|answered| Pair { prompt: answered.question, response: Some(&answered.answer) })
            .collect();
        Ok(Some(guard.judge(&pairs, &self.cancel)?))
    }
}

/// A question of the operator's and the model's answer.
#[derive(Clone, Debug)]
pub struct Answered<'set> {
    /// The last message of the user.
    pub question: &'set str,
    /// What the model said.
    pub answer: String,
}
