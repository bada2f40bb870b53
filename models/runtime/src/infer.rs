//! Runs the inference graph over a cache: reads prompts (in chunks, padded batches or after a shared prefix) and
//! decodes one token a row. `generate.rs` and `score.rs` decide what to run; this file knows how.

use std::fmt;

use ort::{
    memory::Allocator,
    session::{IoBinding, Session},
    value::Tensor,
};

use crate::{
    adapt::PreparedAdapter,
    cache::Cache,
    cancel::{Run, RunError},
    device::Device,
    model::{Model, OpenError},
    tokenize::TokenizeError,
};

/// Most logits of one run: 2^24 floats are 64 MiB. A vocabulary of 151,936 leaves 110 rows.
const LOGITS_MAX: usize = 1 << 24;

/// Why a call to the inference graph gave no result.
#[derive(Debug, thiserror::Error)]
pub enum InferError {
    /// The call's [`Cancel`](crate::Cancel) handle was used.
    #[error("call was cancelled")]
    Cancelled,
    /// A prompt has no tokens.
    #[error("prompt {row} must have at least 1 token, got 0")]
    Empty {
        /// Index of the prompt.
        row: usize,
    },
    /// A prompt leaves no room in the context.
    #[error("prompt {row} must have at most {limit} tokens, got {got}")]
    TooLong {
        /// Index of the prompt.
        row: usize,
        /// Most tokens that this call accepts.
        limit: usize,
        /// Tokens of the prompt.
        got: usize,
    },
    /// A token is none of the model's.
    #[error("token of row {row} must be below {vocab_size}, got {got}")]
    Token {
        /// Index of the row.
        row: usize,
        /// Number of the model's tokens.
        vocab_size: usize,
        /// The token.
        got: u32,
    },
    /// A row's weights are not one per token, or not finite.
    #[error("row {row} must have a finite weight for each of its {expected} tokens, got {got} weights")]
    Weights {
        /// Index of the row.
        row: usize,
        /// Number of tokens.
        expected: usize,
        /// Number of weights.
        got: usize,
    },
    /// An option cannot be obeyed.
    #[error("option {name} must be {expected}, got {got}")]
    Option {
        /// The option.
        name: &'static str,
        /// What it may be.
        expected: &'static str,
        /// What it is.
        got: f64,
    },
    /// The adapter was prepared for another model, or the prefix was read under another adapter.
    #[error("{what} belongs to another {owner}")]
    Foreign {
        /// What was passed.
        what: &'static str,
        /// What it should have been made with.
        owner: &'static str,
    },
    /// The network's output holds no probabilities (NaN or all minus infinity).
    #[error("network's output for row {row} must be finite, got a value that is not")]
    NotFinite {
        /// Index of the row.
        row: usize,
    },
    /// The tokens made no text.
    #[error(transparent)]
    Tokenize(#[from] TokenizeError),
    /// The inference graph does not open.
    #[error(transparent)]
    Open(OpenError),
    /// The runtime library failed.
    #[error("inference graph does not run")]
    Engine(#[from] ort::Error),
}

impl From<OpenError> for InferError {
    /// A cancelled call is the same whatever it waited for.
    fn from(error: OpenError) -> Self {
        match error {
            OpenError::Cancelled => Self::Cancelled,
            error => Self::Open(error),
        }
    }
}

impl From<RunError> for InferError {
    fn from(error: RunError) -> Self {
        match error {
            RunError::Cancelled => Self::Cancelled,
            RunError::Engine(source) => Self::Engine(source),
        }
    }
}

/// Rows that run side by side under one adapter: their cache, bound to the graph.
pub(crate) struct Lane {
    /// Holds its session open, so it is dropped before the model, whose weights the session reads.
    bound: Option<Bound>,
    pub(crate) cache: Cache,
    logits: Tensor<f32>,
    adapter: PreparedAdapter,
    model: Model,
}

/// A lane's tensors, bound to one opening of a session.
struct Bound {
    opening: u64,
    binding: IoBinding,
}

impl Bound {
    fn new(
        session: &Session,
        opening: u64,
        adapter: &PreparedAdapter,
        cache: &mut Cache,
        logits: &mut Tensor<f32>,
    ) -> Result<Self, ort::Error> {
        let mut binding = session.create_binding()?;
        for (name, tensor) in adapter.inputs() {
            binding.bind_input(name, tensor)?;
        }
        for (layer, (key, value)) in cache.layers.iter_mut().enumerate() {
            // The same buffer in and out: the graph extends it in place.
            binding.bind_input(format!("past.{layer}.key"), key)?;
            binding.bind_input(format!("past.{layer}.value"), value)?;
            binding.bind_output(format!("present.{layer}.key"), key)?;
            binding.bind_output(format!("present.{layer}.value"), value)?;
        }
        binding.bind_output("logits", logits)?;
        Ok(Self { opening, binding })
    }
}

impl Lane {
    pub(crate) fn new(
        model: &Model,
        adapter: &PreparedAdapter,
        batch: usize,
        capacity: usize,
    ) -> Result<Self, InferError> {
        if adapter.model() != model.identity() {
            return Err(InferError::Foreign { what: "adapter", owner: "model" });
        }
        let manifest = model.manifest();
        let cache = Cache::new(manifest, batch, capacity)?;
        let logits = Tensor::new(&Allocator::default(), [batch, manifest.model.vocab_size])?;
        Ok(Self { bound: None, cache, logits, adapter: adapter.clone(), model: model.clone() })
    }

    /// Lets go of the session; the cache stays, and the next run binds it anew.
    pub(crate) fn unbind(&mut self) {
        self.bound = None;
    }

    fn vocab_size(&self) -> usize {
        self.model.manifest().model.vocab_size
    }

    /// The same rows with room for more tokens; the first `length` positions are kept.
    pub(crate) fn grown(&self, capacity: usize, length: usize) -> Result<Self, InferError> {
        self.kept(&(0..self.cache.batch).map(|row| (row, length)).collect::<Vec<_>>(), capacity)
    }

    /// As small a lane as there is, for the same model and adapter.
    pub(crate) fn emptied(&self) -> Result<Self, InferError> {
        Self::new(&self.model, &self.adapter, 1, 1)
    }

    /// Some rows of this lane, each with the number of its positions that are kept.
    pub(crate) fn kept(&self, rows: &[(usize, usize)], capacity: usize) -> Result<Self, InferError> {
        let mut lane = Self::new(&self.model, &self.adapter, rows.len(), capacity)?;
        for (to, &(from, length)) in rows.iter().enumerate() {
            lane.cache.copy_row(to, &self.cache, from, length)?;
        }
        Ok(lane)
    }

    /// Reads tokens into a lane of one row after its first `start` positions, in chunks. `wanted` are positions, in
    /// rising order, whose logits are handed to `take`.
    pub(crate) fn read(
        &mut self,
        run: &Run,
        ids: &[u32],
        start: usize,
        wanted: &[usize],
        mut take: impl FnMut(usize, &[f32]) -> Result<(), InferError>,
    ) -> Result<(), InferError> {
        let vocab_size = self.vocab_size();
        let mut wanted = wanted.iter().copied().peekable();
        let mut at = start;
        while at < ids.len() {
            let picked = LOGITS_MAX / vocab_size;
            // The graph wants at least one row of logits; a chunk without any wanted gives its last, unread.
            let (mut positions, mut end) = (Vec::new(), chunk_end(&self.model, at, ids.len()));
            while let Some(position) = wanted.next_if(|&position| position < end) {
                positions.push(position);
                if positions.len() >= picked.max(1) {
                    end = position + 1;
                }
            }
            let rows: Vec<i64> = match positions.as_slice() {
                [] => vec![(end - at - 1) as i64],
                positions => positions.iter().map(|position| (position - at) as i64).collect(),
            };
            let logits = self.step(run, &ids[at..end], &[end - 1], end, rows)?;
            for (position, logits) in positions.iter().zip(logits.chunks_exact(vocab_size)) {
                take(*position, logits)?;
            }
            at = end;
        }
        Ok(())
    }

    /// Whether rows can be read in one padded run.
    pub(crate) fn fits_padded(model: &Model, lengths: &[usize], wanted: usize) -> bool {
        let longest = lengths.iter().copied().max().unwrap_or(0);
        lengths.len() * longest <= model.options().prefill_tokens_max
            && wanted * model.manifest().model.vocab_size <= LOGITS_MAX
    }

    /// Reads a fresh lane's rows in one run, all padded to the longest. Padding is on the right and attention is
    /// causal, so it changes no row; what it leaves in the cache is overwritten before it is looked at.
    pub(crate) fn read_padded(
        &mut self,
        run: &Run,
        rows: &[&[u32]],
        wanted: &[Vec<usize>],
        mut take: impl FnMut(usize, usize, &[f32]) -> Result<(), InferError>,
    ) -> Result<(), InferError> {
        let vocab_size = self.vocab_size();
        let longest = rows.iter().map(|row| row.len()).max().unwrap_or(0);
        let pad = self.model.manifest().tokens.pad;
        let mut ids = Vec::with_capacity(rows.len() * longest);
        for row in rows {
            ids.extend_from_slice(row);
            ids.resize(ids.len() + longest - row.len(), pad);
        }
        let picks: Vec<(usize, usize)> = wanted
            .iter()
            .enumerate()
            .flat_map(|(row, positions)| positions.iter().map(move |&position| (row, position)))
            .collect();
        let flat = picks.iter().map(|(row, position)| (row * longest + position) as i64).collect();
        let lasts = vec![longest - 1; rows.len()];
        let logits = self.step(run, &ids, &lasts, longest, flat)?;
        for (&(row, position), logits) in picks.iter().zip(logits.chunks_exact(vocab_size)) {
            take(row, position, logits)?;
        }
        Ok(())
    }

    /// Appends one token to every row, each after its own length; the logits of all rows.
    pub(crate) fn decode(
        &mut self,
        run: &Run,
        tokens: &[u32],
        lengths: &[usize],
    ) -> Result<&[f32], InferError> {
        let total = lengths.iter().copied().max().unwrap_or(0) + 1;
        self.step(run, tokens, lengths, total, (0..tokens.len() as i64).collect())
    }

    /// Appends several tokens to a lane of one row after its first `start` positions; the logits behind each.
    pub(crate) fn extend(&mut self, run: &Run, tokens: &[u32], start: usize) -> Result<&[f32], InferError> {
        let total = start + tokens.len();
        self.step(run, tokens, &[total - 1], total, (0..tokens.len() as i64).collect())
    }

    /// One run of the graph. `lasts` is each row's last position, `total` the tokens of the longest row.
    fn step(
        &mut self,
        run: &Run,
        ids: &[u32],
        lasts: &[usize],
        total: usize,
        logit_rows: Vec<i64>,
    ) -> Result<&[f32], InferError> {
        run.check()?;
        let (batch, picked, vocab_size) = (self.cache.batch, logit_rows.len(), self.vocab_size());
        let ids = ids.iter().map(|&id| i64::from(id)).collect::<Vec<_>>();
        let lasts = lasts.iter().map(|&last| last as i32).collect::<Vec<_>>();
        let Self { bound, cache, logits, adapter, model } = self;
        model.with_infer_session(adapter.is_adapted(), run.cancel(), |session, opening| {
            // A session that was closed since has another successor, which knows nothing of the old one's tensors.
            bound.take_if(|bound| bound.opening != opening);
            let Bound { binding, .. } = match bound {
                Some(bound) => bound,
                empty => empty.insert(Bound::new(session, opening, adapter, cache, logits)?),
            };
            if model.device() != Device::Cpu {
                // A device with memory of its own got a copy of the cache when it was bound; what the last run added
                // came back to the buffer, not to that copy.
                for (layer, (key, value)) in cache.layers.iter().enumerate() {
                    binding.bind_input(format!("past.{layer}.key"), key)?;
                    binding.bind_input(format!("past.{layer}.value"), value)?;
                }
            }
            binding
                .bind_input("input_ids", &Tensor::from_array(([batch, ids.len() / batch.max(1)], ids))?)?;
            binding.bind_input("seqlens_k", &Tensor::from_array(([batch], lasts))?)?;
            binding.bind_input("total_seq", &Tensor::from_array(([1], vec![total as i32]))?)?;
            binding.bind_input("logit_rows", &Tensor::from_array(([picked], logit_rows))?)?;
            if logits.shape()[0] != picked as i64 {
                *logits = Tensor::new(&Allocator::default(), [picked, vocab_size])?;
                binding.bind_output("logits", logits)?;
            }
            run.explain(session.run_binding_with_options(binding, run.options())).map(drop)?;
            Ok::<_, InferError>(())
        })?;
        Ok(self.logits.extract_tensor().1)
    }
}

impl fmt::Debug for Lane {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Cache { batch, capacity, .. } = self.cache;
        formatter
            .debug_struct("Lane")
            .field("batch", &batch)
            .field("capacity", &capacity)
            .finish_non_exhaustive()
    }
}

/// Where the chunk ends that is read next of a prompt.
pub(crate) fn chunk_end(model: &Model, at: usize, length: usize) -> usize {
    let chunk = model.options().prefill_tokens_max.min(length - at);
    // A last chunk of one token would be rounded by another kernel than the others.
    if at + chunk + 1 == length && chunk > 2 { at + chunk - 1 } else { at + chunk }
}

/// Refuses tokens that are none of the model's, before they reach a kernel that would read outside its table.
pub(crate) fn check_tokens(model: &Model, row: usize, ids: &[u32]) -> Result<(), InferError> {
    let vocab_size = model.manifest().model.vocab_size;
    match ids.iter().find(|&&id| id as usize >= vocab_size) {
        Some(&got) => Err(InferError::Token { row, vocab_size, got }),
        None => Ok(()),
    }
}

/// Refuses a prompt that is empty, too long or holds foreign tokens.
pub(crate) fn check_prompt(model: &Model, row: usize, ids: &[u32], limit: usize) -> Result<(), InferError> {
    match ids.len() {
        0 => Err(InferError::Empty { row }),
        got if got > limit => Err(InferError::TooLong { row, limit, got }),
        _ => check_tokens(model, row, ids),
    }
}
