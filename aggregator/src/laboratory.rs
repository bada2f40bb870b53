//! The model with its guard and reviser over one base, opened once, for `align` and `evaluate`.
//!
//! Reads a package and the operator's sets; keeps them for the life of the process.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use commonweal_adapter::{Adapter, AdapterFacts, AdapterKind, AdapterLayout, ReadError, disk};
use commonweal_package::Package;
use commonweal_protocol::BaseHash;
use commonweal_runtime::memory::{self, Shape};
use commonweal_runtime::{
    AdaptError, Cancel, ConversationError, DeviceError, GenerateOptions, InferError, Library, LibraryError,
    MemoryError, Message, Model, OpenError, OpenOptions, PreparedAdapter, Prompt, TrainError,
};
use commonweal_safety::{Guard, GuardError, Judgement, Pair, ReviseError, Reviser};

use crate::config::Config;
use crate::evaluate::sets::{Conversation, SetError, Sets};

/// Tokens that stand beside a conversation and its answer: the chat template's, a critique and what it is asked with.
const AROUND_TOKENS: usize = 512;

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
    /// The machine has no room for it.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A file of the package.
    #[error("{}: cannot be read", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The package's guard or reviser, or the package that the guard has to itself.
    #[error("the package's guard and reviser cannot be used")]
    Safety(#[source] Box<commonweal_safety::OpenError>),
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
    /// A prompt that nobody could answer: leaving it out would leave unmeasured what it asks.
    #[error(
        "{set}: expected prompts of at most {room} tokens, which the context leaves beside an answer, got {got}"
    )]
    PromptTooLong {
        /// Where it is from.
        set: &'static str,
        /// Tokens that a prompt can have.
        room: usize,
        /// The first one's that has more.
        got: usize,
    },
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
        // The guard is opened before the candidate is looked at.
        matches!(
            self,
            Self::Library(_)
                | Self::Package(_)
                | Self::Open(_)
                | Self::Memory(_)
                | Self::Safety(_)
                | Self::File { .. }
                | Self::Cancelled
        )
    }
}

impl From<commonweal_safety::OpenError> for LaboratoryError {
    fn from(error: commonweal_safety::OpenError) -> Self {
        Self::Safety(Box::new(error))
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

/// What of a package tells the memory that work on it needs.
pub(crate) fn shape(package: &Package) -> Result<Shape<'_>, LaboratoryError> {
    Shape::of(package).map_err(|source| LaboratoryError::File { path: package.weights(), source })
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
    pub fn open(package: &Package, config: &Config, cancel: &Cancel) -> Result<Self, LaboratoryError> {
        let sets = Sets::read(config)?;
        let threads = config.threads.and_then(NonZeroUsize::new);
        let library = Library::load_with(config.runtime_library.as_deref(), threads)?;
        if let Some(provider) = &config.provider {
            library.add_provider(provider)?;
        }
        // A token has a byte at least. A base's whole context may be a hundred times what is in any set.
        let answer = config.evaluate.answer_tokens_max.max(config.align.answer_tokens_max);
        let tokens = sets.bytes_longest().saturating_add(answer).saturating_add(AROUND_TOKENS);
        let options = shape(package)?.fit_for(
            tokens,
            "opening the package",
            OpenOptions::default(),
            memory::available_for_process(),
            "a package of fewer bits or layers needs less",
        )?;
        // It opens the package already, where devices are tried.
        let (library, choice) = library.choose(&config.device, package)?;
        tracing::info!("{choice}");
        let model = Model::open(&library, package, options)?;
        // As a device opens them: a guard in a package of its own is a guard here too.
        let (guard, reviser) = if has_guard(package) {
            (Some(Guard::from_package(&model, cancel)?), Some(Reviser::from_package(&model)?))
        } else {
            (None, None)
        };
        Ok(Self { model, guard, reviser, sets, cancel: cancel.clone() })
    }

    /// Refuses sets with a prompt that has no room, which `answer` would refuse in the middle of a round.
    pub fn check_prompts(&self, config: &Config) -> Result<(), LaboratoryError> {
        let (sets, evaluate) = (&self.sets, &config.evaluate);
        let measured = |set: &'static str, rows: &[Conversation]| {
            let rows = rows.iter().take(evaluate.rows_max).map(Vec::as_slice);
            self.prompts(set, rows, evaluate.answer_tokens_max).map(drop)
        };
        measured(HARMFUL, &sets.harmful)?;
        measured(BENIGN, &sets.benign)?;
        if config.align.enabled && !config.plain {
            let rows = sets.redteam.iter().map(Vec::as_slice);
            self.prompts(REDTEAM, rows, config.align.answer_tokens_max)?;
        }
        Ok(())
    }

    /// Each conversation as a prompt that leaves room for an answer.
    fn prompts<'set>(
        &self,
        set: &'static str,
        conversations: impl Iterator<Item = &'set [Message]>,
        tokens_max: usize,
    ) -> Result<Vec<Prompt>, LaboratoryError> {
        let room = self.model.context().saturating_sub(tokens_max.saturating_add(1));
        let mut prompts = Vec::new();
        for conversation in conversations {
            let prompt = self.model.chat().prompt(conversation)?;
            if prompt.ids.len() > room {
                return Err(LaboratoryError::PromptTooLong { set, room, got: prompt.ids.len() });
            }
            prompts.push(prompt);
        }
        Ok(prompts)
    }

    /// Greedy answers to the prompts of a set, with their last question. Each is answered, or none.
    pub fn answer<'set>(
        &self,
        adapter: &PreparedAdapter,
        set: &'static str,
        conversations: &[&'set [Message]],
        tokens_max: usize,
    ) -> Result<Vec<Answered<'set>>, LaboratoryError> {
        let prompts = self.prompts(set, conversations.iter().copied(), tokens_max)?;
        let options = GenerateOptions { max_new_tokens: tokens_max, ..GenerateOptions::default() };
        let answers = self.model.generate(adapter, &prompts, &options, &self.cancel)?;
        let question =
            |conversation: &&'set [Message]| conversation.last().map_or("", |last| last.content.as_str());
        Ok(conversations
            .iter()
            .map(question)
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

/// What errors call the sets of prompts.
pub(crate) const HARMFUL: &str = "the harmful prompts";
pub(crate) const BENIGN: &str = "the benign prompts";
pub(crate) const REDTEAM: &str = "the red-team prompts";

/// A question of the operator's and the model's answer.
#[derive(Clone, Debug)]
pub struct Answered<'set> {
    /// The last message of the user.
    pub question: &'set str,
    /// What the model said.
    pub answer: String,
}
