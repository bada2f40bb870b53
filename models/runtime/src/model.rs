//! Opens a package: the session for the base alone at once, those with an adapter and with gradients when they are first
//! needed. A model at rest has none of them until a call needs it. All read the frozen base from the same mapped file
//! (`frozen.rs`). `opening.rs` opens them; `generate.rs`, `score.rs` and `train.rs` run what is opened here.

use std::{
    fmt, io,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, TryLockError, Weak,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
};

use commonweal_adapter::{Adapter, AdapterLayout};
use commonweal_package::{Manifest, Package, Tokens, TrainGraph};
use ort::session::Session;

use crate::{
    adapt::{AdaptError, PreparedAdapter},
    cache,
    cancel::Cancel,
    conversation::Chat,
    device::Device,
    frozen::{Frozen, FrozenError},
    library::Library,
    measure,
    memory::{self, MemoryError, Shape},
    opening::{Graph, OpenSession, Use},
    prefix::Row,
    template::{ChatTemplate, SpecialTokens, TemplateError},
    tokenize::{TokenizeError, Tokenizer},
};

/// How a model is opened.
#[derive(Clone, Copy, Debug)]
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

/// How memory is asked for before something at rest is opened: the words of the error, should there be too little.
#[derive(Clone, Copy, Debug)]
pub struct Asking {
    /// The work.
    pub what: &'static str,
    /// The setting that lowers what it needs.
    pub lower: &'static str,
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
    /// The options' own, or less if memory was short when a model at rest was opened.
    cache_bytes_max: AtomicUsize,
    context: usize,
    /// Of a model that rests now and then.
    asking: Option<Asking>,
    /// Whether it was asked for since it rested.
    has_room: AtomicBool,
    base: Mutex<Option<Opened>>,
    adapted: Mutex<Option<Opened>>,
    train: Mutex<Option<(TrainGraph, OpenSession)>>,
    /// What prefixes hold, as long as somebody has them.
    prefixes: Mutex<Vec<Weak<Mutex<Row>>>>,
    frozen: Arc<Frozen>,
}

/// An inference session, and which opening it is: closed and opened again, it is another one.
struct Opened {
    opening: u64,
    open: OpenSession,
}

/// Why a package could not be opened for running.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The call's [`Cancel`] handle was used while it waited for a session.
    #[error("opening was cancelled")]
    Cancelled,
    /// There is no thread to open a session on.
    #[error("no thread can be had to open a session on")]
    Thread(#[source] io::Error),
    /// What rested does not fit in memory now.
    #[error("package is not opened")]
    Memory(#[source] MemoryError),
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
    /// The tokenizer has a token that the model has not.
    #[error("tokenizer must number its tokens below the model's {expected}, the largest is {}", got.saturating_sub(1))]
    Vocabulary {
        /// Rows of the model's embedding.
        expected: usize,
        /// One more than the tokenizer's largest number.
        got: usize,
    },
    /// A classifier's special tokens leave no room for texts.
    #[error("tokenizer must put 1 to {} special tokens around texts, got {got}", context.saturating_sub(2))]
    Frame {
        /// Longest row in tokens.
        context: usize,
        /// The special tokens.
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
    /// The package was compiled without that graph.
    #[error("package must have {file}, which it lacks; compile the checkpoint again")]
    Absent {
        /// The graph's file.
        file: &'static str,
    },
    /// The package's cache is of a form that only the processor's kernels take.
    #[error(
        "a cache of 8 bits must run on device cpu, got {device}; compile the checkpoint with --cache 32 for it"
    )]
    Cache {
        /// What was asked for.
        device: Device,
    },
    /// The frozen weights cannot be given to a session.
    #[error("graph {graph} does not open with the package's weights")]
    Frozen {
        /// The file.
        graph: String,
        /// Why.
        #[source]
        source: FrozenError,
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
        Self::open_with(library, package, options, &Cancel::new())
    }

    /// The same under a handle that ends it.
    pub fn open_with(
        library: &Library,
        package: &Package,
        options: OpenOptions,
        cancel: &Cancel,
    ) -> Result<Self, OpenError> {
        let model = Self::closed(library, package, options, None)?;
        model.with_infer_session(false, cancel, |_, _| Ok::<_, OpenError>(()))?;
        Ok(model)
    }

    /// The same with no session open yet: the call that first needs one opens it, after memory was asked for. What is
    /// wrong with the package is told here all the same, but for its graphs. [`Model::close`] puts it to rest again.
    pub fn at_rest(
        library: &Library,
        package: &Package,
        options: OpenOptions,
        asking: Asking,
    ) -> Result<Self, OpenError> {
        Self::closed(library, package, options, Some(asking))
    }

    fn closed(
        library: &Library,
        package: &Package,
        mut options: OpenOptions,
        asking: Option<Asking>,
    ) -> Result<Self, OpenError> {
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
        cache::check_device(package.manifest().cache, library.device())?;
        // Rows of different lengths side by side: WebGPU's attention (1.27) goes by the longest and spoils the others.
        if library.device() != Device::Cpu {
            options.batch_max = 1;
        }
        let manifest = package.manifest();
        let tokenizer = Tokenizer::open(&package.tokenizer())?;
        if tokenizer.ids_end() > manifest.model.vocab_size {
            let (expected, got) = (manifest.model.vocab_size, tokenizer.ids_end());
            return Err(OpenError::Vocabulary { expected, got });
        }
        let template =
            ChatTemplate::open(&package.chat_template(), special_tokens(&manifest.tokens, &tokenizer))?;
        let context = manifest.model.context.min(options.context_max.unwrap_or(usize::MAX));
        let layout = Arc::new(package.layout().clone());
        let frozen = Frozen::map(&package.weights()).map_err(of_weights)?;
        Ok(Self {
            inner: Arc::new(Inner {
                identity: NEXT.fetch_add(1, Ordering::Relaxed),
                library: library.clone(),
                package: package.clone(),
                layout,
                chat: Chat::new(tokenizer, template),
                options,
                cache_bytes_max: AtomicUsize::new(options.cache_bytes_max),
                context,
                asking,
                has_room: AtomicBool::new(false),
                base: Mutex::new(None),
                adapted: Mutex::new(None),
                train: Mutex::new(None),
                prefixes: Mutex::default(),
                frozen: Arc::new(frozen),
            }),
        })
    }

    /// An adapter in the form that the graph takes; `None` is the base alone. Preparing copies the adapter once,
    /// after that any number of calls may name it, and several adapters may alternate over this one base.
    pub fn prepare(&self, adapter: Option<&Adapter>) -> Result<PreparedAdapter, AdaptError> {
        PreparedAdapter::new(self.inner.identity, &self.manifest().model, adapter, self.has_base_graph())
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

    /// The library that it was opened with, and with it what its sessions run on: for another model beside this one.
    pub fn library(&self) -> &Library {
        &self.inner.library
    }

    /// What its sessions run on.
    pub fn device(&self) -> Device {
        self.inner.library.device()
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        self.inner.chat.tokenizer()
    }

    /// Longest sequence in tokens, prompt and answer together.
    pub fn context(&self) -> usize {
        self.inner.context
    }

    /// Gives back the memory of the inference sessions, but for the weights' prepared form, which a gradient session
    /// shares, and that of prefixes. The next call opens them again, and the next with a
    /// [`SharedPrefix`](crate::SharedPrefix) reads that again.
    pub fn close_inference(&self) {
        drop(lock(&self.inner.base).take());
        drop(lock(&self.inner.adapted).take());
        lock(&self.inner.prefixes).iter().filter_map(Weak::upgrade).for_each(|row| Row::forget(&row));
    }

    /// A prefix's row is forgotten with the inference sessions.
    pub(crate) fn know_row(&self, row: &Arc<Mutex<Row>>) {
        let mut rows = lock(&self.inner.prefixes);
        rows.retain(|row| row.strong_count() > 0);
        rows.push(Arc::downgrade(row));
    }

    /// Gives back the memory of the gradient session (weights' working set and activations). The next training step
    /// opens it again.
    pub fn close_training(&self) {
        drop(lock(&self.inner.train).take());
    }

    /// Gives back all that was opened, the weights' prepared form included. The tokenizer stays, and the next call opens
    /// again what it needs.
    pub fn close(&self) {
        self.close_training();
        self.close_inference();
        self.inner.frozen.forget();
        self.inner.has_room.store(false, Ordering::Relaxed);
    }

    /// Whether a session is open, or being opened.
    pub fn is_open(&self) -> bool {
        let Inner { base, adapted, train, .. } = &*self.inner;
        is_filled(base) || is_filled(adapted) || is_filled(train)
    }

    /// Whether it holds none of its weights: no session is open, and what the kernels prepared was given back.
    pub fn is_at_rest(&self) -> bool {
        !self.is_open() && !self.inner.frozen.is_lent()
    }

    pub(crate) fn identity(&self) -> u64 {
        self.inner.identity
    }

    pub(crate) fn options(&self) -> &OpenOptions {
        &self.inner.options
    }

    /// Memory for the cache of one call.
    pub(crate) fn cache_bytes_max(&self) -> usize {
        self.inner.cache_bytes_max.load(Ordering::Relaxed)
    }

    /// Asks for the memory that a package at rest needs, once until it rests again.
    fn make_room(&self) -> Result<(), OpenError> {
        let Inner { package, options, asking, has_room, cache_bytes_max, .. } = &*self.inner;
        let Some(Asking { what, lower }) = *asking else { return Ok(()) };
        if has_room.load(Ordering::Relaxed) {
            return Ok(());
        }
        let file = || package.weights().display().to_string();
        let shape =
            Shape::of(package).map_err(|source| of_weights(FrozenError::Read { file: file(), source }))?;
        let fitting =
            shape.fit(what, *options, memory::available_for_process(), lower).map_err(OpenError::Memory)?;
        cache_bytes_max.store(fitting.cache_bytes_max, Ordering::Relaxed);
        has_room.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Runs with the inference session with or without an adapter's inputs, which is opened first if it is not. A
    /// package without a graph for the base alone runs it with an adapter of zeros.
    pub(crate) fn with_infer_session<T, E: From<OpenError>>(
        &self,
        adapted: bool,
        cancel: &Cancel,
        run: impl FnOnce(&mut Session, u64) -> Result<T, E>,
    ) -> Result<T, E> {
        static OPENINGS: AtomicU64 = AtomicU64::new(0);
        measure::count_call();
        let is_base = !adapted && self.has_base_graph();
        let mut slot = lock(if is_base { &self.inner.base } else { &self.inner.adapted });
        let opened = match &mut *slot {
            Some(opened) => opened,
            empty => {
                self.make_room()?;
                let open = self.infer_graph(is_base).open(cancel)?;
                empty.insert(Opened { opening: OPENINGS.fetch_add(1, Ordering::Relaxed), open })
            }
        };
        run(&mut opened.open.session, opened.opening)
    }

    fn infer_graph(&self, is_base: bool) -> Graph {
        let package = &self.inner.package;
        let path = package.infer_base_graph().filter(|_| is_base).unwrap_or_else(|| package.infer_graph());
        let layers = 0..package.manifest().model.layers;
        let mut inputs = ["input_ids", "seqlens_k", "total_seq", "logit_rows"].map(String::from).to_vec();
        inputs.extend(layers.clone().map(|layer| format!("past.{layer}.key")));
        inputs.extend(layers.filter(|_| !is_base).map(|layer| format!("lora.{layer}.qkv.a")));
        let (library, frozen) = (self.inner.library.clone(), Some(Arc::clone(&self.inner.frozen)));
        Graph { library, frozen, path, purpose: Use::Inference, inputs, outputs: &["logits"] }
    }

    /// Whether the base alone has a graph of its own.
    pub(crate) fn has_base_graph(&self) -> bool {
        self.inner.package.infer_base_graph().is_some()
    }

    /// Runs with the session of a gradient graph, which is opened first if it is not; another one is closed.
    pub(crate) fn with_train_session<T, E: From<OpenError>>(
        &self,
        graph: TrainGraph,
        cancel: &Cancel,
        run: impl FnOnce(&mut Session) -> Result<T, E>,
    ) -> Result<T, E> {
        measure::count_call();
        let mut slot = lock(&self.inner.train);
        slot.take_if(|(open, _)| *open != graph);
        let (_, open) = match &mut *slot {
            Some(open) => open,
            empty => empty.insert((graph, self.train_graph(graph)?.open(cancel)?)),
        };
        run(&mut open.session)
    }

    fn train_graph(&self, graph: TrainGraph) -> Result<Graph, OpenError> {
        let package = &self.inner.package;
        let path = package.train_graph(graph).ok_or(OpenError::Absent { file: graph.file() })?;
        let mut inputs = ["input_ids", "targets", "weights", "lora_scale"].map(String::from).to_vec();
        inputs.extend(package.layout().tensors().into_iter().map(|spec| spec.name()));
        let (library, frozen) = (self.inner.library.clone(), Some(Arc::clone(&self.inner.frozen)));
        let outputs = &["loss", "token_logprob"];
        Ok(Graph { library, frozen, path, purpose: Use::Training, inputs, outputs })
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

/// Whether there is something; whoever uses it now holds it.
fn is_filled<T>(slot: &Mutex<Option<T>>) -> bool {
    match slot.try_lock() {
        Ok(slot) => slot.is_some(),
        Err(TryLockError::Poisoned(slot)) => slot.into_inner().is_some(),
        Err(TryLockError::WouldBlock) => true,
    }
}

fn of_weights(source: FrozenError) -> OpenError {
    OpenError::Frozen { graph: "weights.bin".into(), source }
}

pub(crate) fn special_tokens(tokens: &Tokens, tokenizer: &Tokenizer) -> SpecialTokens {
    let spell = |token: Option<u32>| token.and_then(|token| tokenizer.spelling(token)).unwrap_or_default();
    SpecialTokens {
        bos_token: spell(tokens.bos),
        eos_token: spell(tokens.eos.first().copied()),
        pad_token: spell(Some(tokens.pad)),
    }
}
