//! Opens a package: the inference session at once, the gradient session when training first needs it. Both read the
//! frozen base from the same mapped file. `generate.rs`, `score.rs` and `train.rs` run what is opened here.

use std::{
    fmt,
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use commonweal_adapter::{Adapter, AdapterLayout};
use commonweal_package::{Manifest, Package, Tokens};
use ort::session::{Session, builder::GraphOptimizationLevel};

use crate::{
    adapt::{AdaptError, PreparedAdapter},
    conversation::Chat,
    library::Library,
    template::{ChatTemplate, SpecialTokens, TemplateError},
    tokenize::{TokenizeError, Tokenizer},
};

/// How a model is opened.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// Longest sequence in tokens; the package's own limit if that is lower. `None` for the package's limit.
    pub context_max: Option<usize>,
    /// Rows that run side by side; more rows are run in groups of this many.
    pub batch_max: usize,
    /// Tokens of one run while prompts are read: bounds the memory for activations.
    pub prefill_tokens_max: usize,
    /// Memory for the cache of one call, in bytes; fewer rows run side by side when they would need more.
    pub cache_bytes_max: usize,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self { context_max: None, batch_max: 16, prefill_tokens_max: 512, cache_bytes_max: 1 << 30 }
    }
}

/// An open package. Cheap to clone; all clones share its sessions, whose runs take turns.
#[derive(Clone)]
pub struct Model {
    inner: Arc<Inner>,
}

struct Inner {
    identity: u64,
    library: Library,
    package: Package,
    layout: Arc<AdapterLayout>,
    chat: Chat,
    options: OpenOptions,
    context: usize,
    infer: Mutex<Session>,
    train: Mutex<Option<Session>>,
}

/// Why a package could not be opened for running.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// An option cannot be obeyed.
    #[error("option {name} must be at least 1, got 0")]
    Option {
        /// The option.
        name: &'static str,
    },
    /// The tokenizer does not open.
    #[error(transparent)]
    Tokenizer(#[from] TokenizeError),
    /// The chat template does not open.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// The tokenizer knows more tokens than the model.
    #[error("tokenizer must have at most the model's {expected} tokens, got {got}")]
    Vocabulary {
        /// Rows of the model's embedding.
        expected: usize,
        /// Tokens of the tokenizer.
        got: usize,
    },
    /// The runtime library refused a graph.
    #[error("graph {graph} does not open")]
    Graph {
        /// The file.
        graph: String,
        /// What the library said.
        #[source]
        source: ort::Error,
    },
    /// The graph lacks an input or output that the runtime needs.
    #[error("graph {graph} must have {name}, which is absent; the package was made by another version")]
    Interface {
        /// The file.
        graph: String,
        /// The missing input or output.
        name: String,
    },
}

impl Model {
    /// Opens the inference graph of a package whose hashes were verified (`Package::open`).
    pub fn open(library: &Library, package: &Package, options: OpenOptions) -> Result<Self, OpenError> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        for (name, value) in [
            ("context_max", options.context_max.unwrap_or(1)),
            ("batch_max", options.batch_max),
            ("prefill_tokens_max", options.prefill_tokens_max),
        ] {
            if value == 0 {
                return Err(OpenError::Option { name });
            }
        }
        let manifest = package.manifest();
        let tokenizer = Tokenizer::open(&package.tokenizer())?;
        if tokenizer.vocab_size() > manifest.model.vocab_size {
            let (expected, got) = (manifest.model.vocab_size, tokenizer.vocab_size());
            return Err(OpenError::Vocabulary { expected, got });
        }
        let template =
            ChatTemplate::open(&package.chat_template(), special_tokens(&manifest.tokens, &tokenizer))?;
        let context = manifest.model.context.min(options.context_max.unwrap_or(usize::MAX));
        let layout = Arc::new(package.layout().clone());
        let infer = open_infer(library, package)?;
        Ok(Self {
            inner: Arc::new(Inner {
                identity: NEXT.fetch_add(1, Ordering::Relaxed),
                library: library.clone(),
                package: package.clone(),
                layout,
                chat: Chat::new(tokenizer, template),
                options,
                context,
                infer: Mutex::new(infer),
                train: Mutex::new(None),
            }),
        })
    }

    /// An adapter in the form that the graph takes; `None` is the base alone. Preparing copies the adapter once,
    /// after that any number of calls may name it, and several adapters may alternate over this one base.
    pub fn prepare(&self, adapter: Option<&Adapter>) -> Result<PreparedAdapter, AdaptError> {
        PreparedAdapter::new(self.inner.identity, &self.manifest().model, adapter)
    }

    /// What the package says about itself.
    pub fn manifest(&self) -> &Manifest {
        self.inner.package.manifest()
    }

    /// The package it was opened from.
    pub fn package(&self) -> &Package {
        &self.inner.package
    }

    /// The adapter tensors that the package trains by default.
    pub fn layout(&self) -> &Arc<AdapterLayout> {
        &self.inner.layout
    }

    /// Turns conversations into tokens.
    pub fn chat(&self) -> &Chat {
        &self.inner.chat
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        self.inner.chat.tokenizer()
    }

    /// Longest sequence in tokens, prompt and answer together.
    pub fn context(&self) -> usize {
        self.inner.context
    }

    /// Gives back the memory of the gradient session (weights' working set and activations). The next training step
    /// opens it again.
    pub fn close_training(&self) {
        drop(lock(&self.inner.train).take());
    }

    pub(crate) fn identity(&self) -> u64 {
        self.inner.identity
    }

    pub(crate) fn options(&self) -> &OpenOptions {
        &self.inner.options
    }

    pub(crate) fn infer_session(&self) -> MutexGuard<'_, Session> {
        lock(&self.inner.infer)
    }

    /// Runs with the gradient session, which is opened first if it is not.
    pub(crate) fn with_train_session<T, E: From<OpenError>>(
        &self,
        run: impl FnOnce(&mut Session) -> Result<T, E>,
    ) -> Result<T, E> {
        let mut slot = lock(&self.inner.train);
        let session = match &mut *slot {
            Some(session) => session,
            empty => empty.insert(open_train(&self.inner.library, &self.inner.package)?),
        };
        run(session)
    }
}

impl fmt::Debug for Model {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Manifest { model, base, .. } = self.manifest();
        formatter.debug_struct("Model").field("name", &model.name).field("base", base).finish_non_exhaustive()
    }
}

/// A panic inside a run leaves no half-made state in a session: the next run starts afresh.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(crate) fn special_tokens(tokens: &Tokens, tokenizer: &Tokenizer) -> SpecialTokens {
    let spell = |token: Option<u32>| token.and_then(|token| tokenizer.spelling(token)).unwrap_or_default();
    SpecialTokens {
        bos_token: spell(tokens.bos),
        eos_token: spell(tokens.eos.first().copied()),
        pad_token: spell(Some(tokens.pad)),
    }
}

fn open_infer(library: &Library, package: &Package) -> Result<Session, OpenError> {
    let path = package.infer_graph();
    let session = open_session(library, &path, true)?;
    let wanted = ["input_ids", "seqlens_k", "total_seq", "logit_rows"].map(String::from);
    let layers = 0..package.manifest().model.layers;
    let cached = layers.flat_map(|layer| [format!("past.{layer}.key"), format!("lora.{layer}.qkv.a")]);
    require(&session, &path, wanted.into_iter().chain(cached), &["logits"])?;
    Ok(session)
}

fn open_train(library: &Library, package: &Package) -> Result<Session, OpenError> {
    let path = package.train_graph();
    let session = open_session(library, &path, false)?;
    let wanted = ["input_ids", "targets", "weights", "lora_scale"].map(String::from);
    let adapter = package.layout().tensors().into_iter().map(|spec| spec.name());
    require(&session, &path, wanted.into_iter().chain(adapter), &["loss", "token_logprob"])?;
    Ok(session)
}

/// `memory_pattern` plans memory once for a shape that repeats: decoding has one, training does not, and pays with
/// twice the memory.
fn open_session(library: &Library, path: &Path, memory_pattern: bool) -> Result<Session, OpenError> {
    let failed = |source| OpenError::Graph { graph: path.display().to_string(), source };
    let open = || {
        Session::builder(library.environment())?
            .with_optimization_level(GraphOptimizationLevel::All)?
            .with_memory_pattern(memory_pattern)?
            .commit_from_file(path)
    };
    open().map_err(failed)
}

fn require(
    session: &Session,
    path: &Path,
    inputs: impl IntoIterator<Item = String>,
    outputs: &[&str],
) -> Result<(), OpenError> {
    let missing = |name| OpenError::Interface { graph: path.display().to_string(), name };
    for name in inputs {
        if !session.inputs().iter().any(|input| input.name() == name) {
            return Err(missing(name));
        }
    }
    for &name in outputs {
        if !session.outputs().iter().any(|output| output.name() == name) {
            return Err(missing(name.to_owned()));
        }
    }
    Ok(())
}
