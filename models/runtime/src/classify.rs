//! Classifies whole texts, alone or in pairs, with an encoder's package: the probability of each label. A way of its own
//! beside `model.rs`: no cache, no adapter, no generation. A guard of `commonweal-safety` may be one of these.
//!
//! Nothing is cut off unseen. A text that does not fit the network is an error of [`Classifier::classify`], or is read
//! in overlapping windows (`windows.rs`) by [`Classifier::window_logits`], whose caller decides which window counts.

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use commonweal_package::{EncoderManifest, EncoderPackage, Probabilities};
use ort::{
    session::{Session, SessionInputValue},
    value::Tensor,
};
use tokenizers::Encoding;

use crate::{
    cancel::{Cancel, Run, RunError},
    library::Library,
    measure,
    memory::{self, encoder_bytes},
    model::{Asking, OpenError},
    opening::{Graph, OpenSession, Use},
    tokenize::{TokenizeError, Tokenizer},
    windows::{CROSSED_MAX, READINGS_MAX, cut, reading_count, readings, share, window_count},
};

/// Longest text that is tokenized. The default windows hold about 1,024 · 768 tokens, 3 MB of English.
const TEXT_BYTES_MAX: usize = 4 << 20;

/// How texts are run.
#[derive(Clone, Debug)]
pub struct ClassifyOptions {
    /// Longest row in tokens, special ones included; the package's own limit if that is lower. `None` for the package's.
    /// Attention takes heads · tokens² floats: 64 MiB for 16 heads and 1,024 tokens, 4 GiB for 8,192.
    pub context_max: Option<usize>,
    /// Rows that run side by side.
    pub batch_max: usize,
    /// Tokens of one run, padding included: bounds the memory for activations. A single row may have more.
    pub tokens_max: usize,
    /// Windows of a text and its pair up to which each of the one is read with each of the other.
    pub crossed_max: usize,
    /// Windows of a text, or of a text and its pair; what needs more is an error.
    pub windows_max: usize,
}

impl Default for ClassifyOptions {
    fn default() -> Self {
        let (crossed_max, windows_max) = (CROSSED_MAX, READINGS_MAX);
        Self { context_max: Some(1024), batch_max: 16, tokens_max: 2048, crossed_max, windows_max }
    }
}

/// Why texts were not classified.
#[derive(Debug, thiserror::Error)]
pub enum ClassifyError {
    /// The call's [`Cancel`] handle was used.
    #[error("call was cancelled")]
    Cancelled,
    /// A text, or a text and its pair, does not fit the network.
    #[error("text {row} must have at most {limit} tokens with its pair, got {got}")]
    TooLong {
        /// Index of the text.
        row: usize,
        /// Tokens that there is room for between the special ones.
        limit: usize,
        /// Tokens of the text and its pair.
        got: usize,
    },
    /// A text is not even tokenized.
    #[error("text {row} must have at most {TEXT_BYTES_MAX} bytes, got {got}")]
    TooLarge {
        /// Index of the text.
        row: usize,
        /// Bytes of the text or of its pair.
        got: usize,
    },
    /// A text needs too many windows.
    #[error("text {row} must fit {limit} windows, got {got}")]
    Windows {
        /// Index of the text.
        row: usize,
        /// The option's limit.
        limit: usize,
        /// Windows that it needs.
        got: usize,
    },
    /// A token or its kind is none of the network's.
    #[error("{what} of text {row} must be below {limit}, got {got}")]
    Token {
        /// Index of the text.
        row: usize,
        /// The token or its kind.
        what: &'static str,
        /// How many the network knows.
        limit: usize,
        /// What the tokenizer gave.
        got: u32,
    },
    /// The network's output is not one finite number for each label.
    #[error("network's output for text {row} must be {labels} finite numbers")]
    Output {
        /// Index of the text.
        row: usize,
        /// Number of labels.
        labels: usize,
    },
    /// The text could not be encoded.
    #[error(transparent)]
    Tokenize(#[from] TokenizeError),
    /// The graph does not open.
    #[error(transparent)]
    Open(OpenError),
    /// The runtime library failed.
    #[error("classifier does not run")]
    Engine(#[from] ort::Error),
}

impl From<OpenError> for ClassifyError {
    /// A cancelled call is the same whatever it waited for.
    fn from(error: OpenError) -> Self {
        match error {
            OpenError::Cancelled => Self::Cancelled,
            error => Self::Open(error),
        }
    }
}

impl From<RunError> for ClassifyError {
    fn from(error: RunError) -> Self {
        match error {
            RunError::Cancelled => Self::Cancelled,
            RunError::Engine(source) => Self::Engine(source),
        }
    }
}

/// An open encoder's package. Cheap to clone; all clones share its session, whose runs take turns.
#[derive(Clone)]
pub struct Classifier {
    inner: Arc<Inner>,
}

struct Inner {
    library: Library,
    package: EncoderPackage,
    tokenizer: Tokenizer,
    options: ClassifyOptions,
    context: usize,
    /// Of one that rests now and then.
    asking: Option<Asking>,
    session: Mutex<Option<OpenSession>>,
}

/// One row of a batch.
struct Row {
    /// Index of its text.
    text: usize,
    ids: Vec<u32>,
    kinds: Vec<u32>,
}

impl Classifier {
    /// Opens the graph of a package whose hashes were verified (`EncoderPackage::open`).
    pub fn open(
        library: &Library,
        package: &EncoderPackage,
        options: ClassifyOptions,
    ) -> Result<Self, OpenError> {
        let classifier = Self::closed(library, package, options, None)?;
        classifier.with_session(&Cancel::new(), |_| Ok::<_, OpenError>(()))?;
        Ok(classifier)
    }

    /// The same with no session open yet: the first call opens it, after memory was asked for. What is wrong with the
    /// package is told here all the same, but for its graph. [`Classifier::close`] puts it to rest again.
    pub fn at_rest(
        library: &Library,
        package: &EncoderPackage,
        options: ClassifyOptions,
        asking: Asking,
    ) -> Result<Self, OpenError> {
        Self::closed(library, package, options, Some(asking))
    }

    fn closed(
        library: &Library,
        package: &EncoderPackage,
        options: ClassifyOptions,
        asking: Option<Asking>,
    ) -> Result<Self, OpenError> {
        for (name, value) in [
            ("context_max", options.context_max.unwrap_or(1)),
            ("batch_max", options.batch_max),
            ("tokens_max", options.tokens_max),
            ("crossed_max", options.crossed_max),
            ("windows_max", options.windows_max),
        ] {
            if value == 0 {
                return Err(OpenError::Option { name });
            }
        }
        let encoder = &package.manifest().encoder;
        let tokenizer = Tokenizer::open(&package.tokenizer())?;
        if tokenizer.ids_end() > encoder.vocab_size {
            let (expected, got) = (encoder.vocab_size, tokenizer.ids_end());
            return Err(OpenError::Vocabulary { expected, got });
        }
        let context = encoder.context.min(options.context_max.unwrap_or(usize::MAX));
        let frame = tokenizer.frame_tokens(true).max(tokenizer.frame_tokens(false));
        // A token of each text at least.
        if tokenizer.frame_tokens(false) == 0 || frame + 2 > context {
            return Err(OpenError::Frame { context, got: frame });
        }
        let (library, package, session) = (library.clone(), package.clone(), Mutex::new(None));
        Ok(Self { inner: Arc::new(Inner { library, package, tokenizer, options, context, asking, session }) })
    }

    /// Gives back the memory of the session; the next call opens it again.
    pub fn close(&self) {
        drop(self.inner.session.lock().unwrap_or_else(PoisonError::into_inner).take());
    }

    /// Runs with the session, which is opened first if it is not.
    fn with_session<T, E: From<OpenError>>(
        &self,
        cancel: &Cancel,
        run: impl FnOnce(&mut Session) -> Result<T, E>,
    ) -> Result<T, E> {
        measure::count_call();
        let mut slot = self.inner.session.lock().unwrap_or_else(PoisonError::into_inner);
        let open = match &mut *slot {
            Some(open) => open,
            empty => {
                self.make_room()?;
                empty.insert(self.graph().open(cancel)?)
            }
        };
        run(&mut open.session)
    }

    fn graph(&self) -> Graph {
        let Inner { library, package, .. } = &*self.inner;
        let mut inputs = vec!["input_ids".to_owned(), "lengths".to_owned()];
        inputs.extend((package.manifest().encoder.token_types > 1).then(|| "token_type_ids".to_owned()));
        let (library, path) = (library.clone(), package.graph());
        Graph { library, frozen: None, path, purpose: Use::Training, inputs, outputs: &["logits"] }
    }

    fn make_room(&self) -> Result<(), OpenError> {
        let Inner { package, options, asking, .. } = &*self.inner;
        let Some(Asking { what, lower }) = *asking else { return Ok(()) };
        // A package that was opened has its weights; if they went away since, the graph says so.
        let weights_bytes = std::fs::metadata(package.weights()).map_or(0, |file| file.len());
        let needed = encoder_bytes(&package.manifest().encoder, weights_bytes, options);
        memory::check(what, needed, memory::available_for_process(), lower).map_err(OpenError::Memory)
    }

    /// What the package says about itself.
    pub fn manifest(&self) -> &EncoderManifest {
        self.inner.package.manifest()
    }

    /// The labels, in the order of the probabilities.
    pub fn labels(&self) -> &[String] {
        &self.manifest().encoder.labels
    }

    /// Longest row in tokens, special ones included.
    pub fn context(&self) -> usize {
        self.inner.context
    }

    /// The probability of each label for each text, which may have a pair (an answer to a prompt, say). Special tokens
    /// written out in a text are defused. A text that does not fit is an error.
    pub fn classify(
        &self,
        texts: &[(&str, Option<&str>)],
        cancel: &Cancel,
    ) -> Result<Vec<Vec<f32>>, ClassifyError> {
        let overlong = |row, limit, got, _| Err(ClassifyError::TooLong { row, limit, got });
        let mut rows = Vec::with_capacity(texts.len());
        for (row, &text) in texts.iter().enumerate() {
            rows.extend(self.rows(row, text, overlong)?);
        }
        let kind = self.manifest().encoder.probabilities;
        Ok(self.run(&rows, cancel)?.iter().map(|logits| probabilities(logits, kind)).collect())
    }

    /// The logits of each window of each text, of which [`probabilities`] makes those; a text that fits has one window.
    ///
    /// A window is as long as the network allows, and shares a quarter with the next. Of a text and its pair, the one
    /// that fits half the room is whole in every window; where neither does, each has half the room, and every window
    /// of the one is read with every window of the other, or with the nearest where that would be too many
    /// ([`readings`]).
    pub fn window_logits(
        &self,
        texts: &[(&str, Option<&str>)],
        cancel: &Cancel,
    ) -> Result<Vec<Vec<Vec<f32>>>, ClassifyError> {
        let limit = self.inner.options.windows_max;
        let enough = |row, _, _, got| {
            if got > limit { Err(ClassifyError::Windows { row, limit, got }) } else { Ok(()) }
        };
        let mut windows = vec![Vec::new(); texts.len()];
        let mut rows: Vec<Row> = Vec::new();
        for (text, &pair) in texts.iter().enumerate() {
            rows.extend(self.rows(text, pair, enough)?);
            // Not all texts at once: their windows may be many.
            if rows.len() >= limit || text + 1 == texts.len() {
                for (row, logits) in rows.iter().zip(self.run(&rows, cancel)?) {
                    windows[row.text].push(logits);
                }
                rows.clear();
            }
        }
        Ok(windows)
    }

    /// The rows of a text. `overlong` decides about one that does not fit, by its index, the room and the tokens that it
    /// has, and the windows that it needs.
    fn rows(
        &self,
        text: usize,
        (first, second): (&str, Option<&str>),
        overlong: impl Fn(usize, usize, usize, usize) -> Result<(), ClassifyError>,
    ) -> Result<Vec<Row>, ClassifyError> {
        let room = self.inner.context - self.inner.tokenizer.frame_tokens(second.is_some());
        let first = self.encode(text, first)?;
        let second = second.map(|second| self.encode(text, second)).transpose()?;
        let lengths = [first.len(), second.as_ref().map_or(0, Encoding::len)];
        let shares = share(room, lengths);
        let counts = [0, 1].map(|side| window_count(lengths[side], shares[side]));
        let crossed_max = self.inner.options.crossed_max;
        let got = reading_count(counts, crossed_max);
        if got > 1 {
            overlong(text, room, lengths[0] + lengths[1], got)?;
        }
        let firsts = cut(first, shares[0]);
        let seconds = second.map(|second| cut(second, shares[1]));
        let row = |[first, other]: [usize; 2]| {
            let second = seconds.as_ref().map(|seconds| seconds[other].clone());
            let framed = self.inner.tokenizer.frame(firsts[first].clone(), second)?;
            self.check(text, &framed)?;
            Ok(Row { text, ids: framed.get_ids().to_vec(), kinds: framed.get_type_ids().to_vec() })
        };
        readings(counts, crossed_max).into_iter().map(row).collect()
    }

    fn encode(&self, row: usize, text: &str) -> Result<Encoding, ClassifyError> {
        if text.len() > TEXT_BYTES_MAX {
            return Err(ClassifyError::TooLarge { row, got: text.len() });
        }
        let tokenizer = &self.inner.tokenizer;
        Ok(tokenizer.encode_with_offsets(&tokenizer.defuse(text))?)
    }

    /// Refuses what a kernel would read outside its table.
    fn check(&self, row: usize, framed: &Encoding) -> Result<(), ClassifyError> {
        let encoder = &self.manifest().encoder;
        let kinds = if encoder.token_types > 1 { encoder.token_types } else { usize::MAX };
        for (what, values, limit) in
            [("token", framed.get_ids(), encoder.vocab_size), ("kind of token", framed.get_type_ids(), kinds)]
        {
            if let Some(&got) = values.iter().find(|&&value| value as usize >= limit) {
                return Err(ClassifyError::Token { row, what, limit, got });
            }
        }
        Ok(())
    }

    /// Runs the rows, those of like length together; the logits, all finite, in the order of the rows.
    fn run(&self, rows: &[Row], cancel: &Cancel) -> Result<Vec<Vec<f32>>, ClassifyError> {
        let run = Run::new(cancel)?;
        let mut order: Vec<usize> = (0..rows.len()).collect();
        order.sort_by_key(|&row| rows[row].ids.len());
        let mut results = vec![Vec::new(); rows.len()];
        let mut rest = order.as_slice();
        while !rest.is_empty() {
            let ClassifyOptions { batch_max, tokens_max, .. } = self.inner.options;
            // In rising order the last of a batch is its longest.
            let fits = |count: &usize| count * rows[rest[count - 1]].ids.len() <= tokens_max;
            let count = (1..=rest.len().min(batch_max)).take_while(fits).last().unwrap_or(1);
            let (batch, others) = rest.split_at(count);
            rest = others;
            let picked: Vec<&Row> = batch.iter().map(|&row| &rows[row]).collect();
            for (&row, logits) in batch.iter().zip(self.run_batch(&picked, &run)?) {
                results[row] = logits;
            }
        }
        Ok(results)
    }

    fn run_batch(&self, rows: &[&Row], run: &Run) -> Result<Vec<Vec<f32>>, ClassifyError> {
        run.check()?;
        let encoder = &self.manifest().encoder;
        let longest = rows.iter().map(|row| row.ids.len()).max().unwrap_or(0);
        let padded = |values: fn(&Row) -> &[u32], fill: u32| -> Vec<i64> {
            let row = |row: &&Row| {
                let values = values(row).iter().copied();
                values.chain(std::iter::repeat(fill)).take(longest).map(i64::from).collect::<Vec<_>>()
            };
            rows.iter().flat_map(row).collect()
        };
        let shape = [rows.len(), longest];
        let lengths: Vec<i64> = rows.iter().map(|row| row.ids.len() as i64).collect();
        let mut inputs: Vec<(&str, SessionInputValue<'_>)> = vec![
            ("input_ids", Tensor::from_array((shape, padded(|row| &row.ids, encoder.pad)))?.into()),
            ("lengths", Tensor::from_array(([rows.len()], lengths))?.into()),
        ];
        if encoder.token_types > 1 {
            inputs.push(("token_type_ids", Tensor::from_array((shape, padded(|row| &row.kinds, 0)))?.into()));
        }
        let labels = encoder.labels.len();
        self.with_session(run.cancel(), |session| {
            let outputs = run.explain(session.run_with_options(inputs, run.options()))?;
            let wrong = |row: usize| ClassifyError::Output { row, labels };
            let logits = outputs.get("logits").ok_or_else(|| wrong(rows[0].text))?;
            let logits = logits.try_extract_tensor::<f32>()?.1;
            if logits.len() != rows.len() * labels {
                return Err(wrong(rows[0].text));
            }
            let each = rows.iter().zip(logits.chunks_exact(labels));
            each.map(|(row, logits)| {
                let is_sound = logits.iter().all(|logit| logit.is_finite());
                if is_sound { Ok(logits.to_vec()) } else { Err(wrong(row.text)) }
            })
            .collect()
        })
    }
}

impl fmt::Debug for Classifier {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let EncoderManifest { encoder, base, .. } = self.manifest();
        formatter
            .debug_struct("Classifier")
            .field("name", &encoder.name)
            .field("base", base)
            .finish_non_exhaustive()
    }
}

/// The probability of each label from finite logits.
pub fn probabilities(logits: &[f32], kind: Probabilities) -> Vec<f32> {
    let wide = logits.iter().map(|&logit| f64::from(logit));
    match kind {
        Probabilities::Sigmoid => wide.map(|logit| (1.0 / (1.0 + (-logit).exp())) as f32).collect(),
        Probabilities::Softmax => {
            let largest = wide.clone().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = wide.clone().map(|logit| (logit - largest).exp()).sum();
            wide.map(|logit| ((logit - largest).exp() / sum) as f32).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probabilities_of_either_kind() {
        assert_eq!(probabilities(&[1000.0, 1000.0, 0.0], Probabilities::Softmax), [0.5, 0.5, 0.0]);
        assert_eq!(probabilities(&[0.0, 1000.0, -1000.0], Probabilities::Sigmoid), [0.5, 1.0, 0.0]);
    }
}
