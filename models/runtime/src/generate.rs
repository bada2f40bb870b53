//! Generates text for prompts that are all there at the start: reads them (`infer.rs`), then decodes them side by side
//! until each has stopped (`row.rs`). Prompts that come and go are `together.rs`'s.

use crate::{
    adapt::PreparedAdapter,
    cache::Cache,
    cancel::{Cancel, Run},
    conversation::Prompt,
    copy::{Copying, GUESS_MAX},
    infer::{InferError, Lane, check_prompt, check_tokens},
    model::Model,
    prefix::SharedPrefix,
    row::Row,
};

/// How text is generated.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateOptions {
    /// Most tokens of an answer; the context may end it sooner.
    pub max_new_tokens: usize,
    /// 0 takes the most probable token each time; 1 samples from the network's own distribution.
    pub temperature: f32,
    /// Samples only from the most probable tokens that together reach this probability; 1 from all.
    pub top_p: f32,
    /// Texts that end an answer; they are not part of it.
    pub stop: Vec<String>,
    /// Whether answers mostly copy their prompts, as rewrites do: guesses from the prompt are then checked several
    /// tokens at a time, each by the rule that chooses it otherwise. Prompts run one after another. With fast
    /// kernels rounding may tip two tokens that are about as probable, and the answer parts from the one without guesses;
    /// exact kernels differ in the last bits alone.
    pub copying: bool,
    /// Tokens that every answer begins with, whatever the network would choose: to begin an answer, or to measure one.
    pub begin: Vec<u32>,
    /// Seed of the random numbers; each row draws its own, whatever else runs beside it.
    pub seed: u64,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        let (stop, begin) = (Vec::new(), Vec::new());
        Self { max_new_tokens: 256, temperature: 0.0, top_p: 1.0, stop, copying: false, begin, seed: 0 }
    }
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopReason {
    /// The network ended it with one of the package's end tokens.
    EndToken,
    /// A stop text was reached.
    StopText,
    /// `max_new_tokens` was reached.
    Length,
    /// The context was full.
    Context,
}

/// One answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Generated {
    /// The answer's text, without special tokens and without the stop text.
    pub text: String,
    /// The tokens generated, the end token and those of the stop text included.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub stop: StopReason,
    /// Sum of the tokens' log-probabilities under the network's own distribution.
    pub logprob: f64,
}

/// Receives text as it is generated: the prompt's index and the new piece. The pieces of a row make up its text.
pub type OnText<'f> = &'f mut dyn FnMut(usize, &str);

impl Model {
    /// An answer for every prompt, in their order.
    pub fn generate(
        &self,
        adapter: &PreparedAdapter,
        prompts: &[Prompt],
        options: &GenerateOptions,
        cancel: &Cancel,
    ) -> Result<Vec<Generated>, InferError> {
        self.generate_streaming(adapter, None, prompts, options, &mut |_, _| (), cancel)
    }

    /// Like [`Model::generate`], with a shared prefix for the prompts that begin with it and with the text as it comes.
    pub fn generate_streaming(
        &self,
        adapter: &PreparedAdapter,
        prefix: Option<&SharedPrefix>,
        prompts: &[Prompt],
        options: &GenerateOptions,
        on_text: OnText<'_>,
        cancel: &Cancel,
    ) -> Result<Vec<Generated>, InferError> {
        options.check()?;
        check_tokens(self, 0, &options.begin)?;
        for (row, prompt) in prompts.iter().enumerate() {
            check_prompt(self, row, &prompt.ids, self.context() - 1)?;
        }
        if let Some(prefix) = prefix {
            prefix.check(adapter)?;
        }
        let run = Run::new(cancel)?;
        let mut answers: Vec<Option<Generated>> = vec![None; prompts.len()];
        for group in self.groups(prompts, options) {
            let mut batch = Batch { model: self, adapter, prefix, run: &run, options };
            match group.as_slice() {
                &[row] if options.copying => {
                    answers[row] = Some(batch.generate_copying(&prompts[row].ids, row, on_text)?);
                }
                group => batch.generate(prompts, group, on_text, &mut answers)?,
            }
        }
        Ok(answers.into_iter().flatten().collect())
    }

    /// Rows that run side by side: of similar length, as many as the options and the cache's memory allow.
    fn groups(&self, prompts: &[Prompt], options: &GenerateOptions) -> Vec<Vec<usize>> {
        let mut order: Vec<usize> = (0..prompts.len()).collect();
        order.sort_by_key(|&row| std::cmp::Reverse(prompts[row].ids.len()));
        let mut groups: Vec<Vec<usize>> = Vec::new();
        let mut group_max = 0;
        for row in order {
            match groups.last_mut() {
                Some(group) if group.len() < group_max => group.push(row),
                _ => {
                    let bytes = Cache::row_bytes(self.manifest(), capacity(self, &prompts[row].ids, options));
                    let most = if options.copying { 1 } else { self.options().batch_max };
                    group_max = (self.cache_bytes_max() / bytes.max(1)).clamp(1, most);
                    groups.push(vec![row]);
                }
            }
        }
        groups
    }
}

impl GenerateOptions {
    pub(crate) fn check(&self) -> Result<(), InferError> {
        let refuse = |name, expected, got| Err(InferError::Option { name, expected, got });
        if self.max_new_tokens == 0 {
            return refuse("max_new_tokens", "at least 1", 0.0);
        }
        if !self.temperature.is_finite() || self.temperature < 0.0 {
            return refuse("temperature", "a number of at least 0", f64::from(self.temperature));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return refuse("top_p", "above 0 and at most 1", f64::from(self.top_p));
        }
        if self.stop.iter().any(String::is_empty) {
            return refuse("stop", "texts of at least 1 character", 0.0);
        }
        Ok(())
    }
}

/// Cache positions that a prompt and its answer need.
pub(crate) fn capacity(model: &Model, ids: &[u32], options: &GenerateOptions) -> usize {
    model.context().min(ids.len().saturating_add(options.max_new_tokens))
}

/// One group of rows on its way.
struct Batch<'a> {
    model: &'a Model,
    adapter: &'a PreparedAdapter,
    prefix: Option<&'a SharedPrefix>,
    run: &'a Run,
    options: &'a GenerateOptions,
}

impl Batch<'_> {
    fn generate(
        &mut self,
        prompts: &[Prompt],
        group: &[usize],
        on_text: OnText<'_>,
        answers: &mut [Option<Generated>],
    ) -> Result<(), InferError> {
        let vocab_size = self.model.manifest().model.vocab_size;
        let ids: Vec<&[u32]> = group.iter().map(|&row| prompts[row].ids.as_slice()).collect();
        let (mut lane, mut logits) = self.read_prompts(&ids)?;
        let start = |(&row, ids): (&usize, &&[u32])| Row::new(self.model, self.options, row, ids.len());
        let mut rows: Vec<Row<'_>> = group.iter().zip(&ids).map(start).collect();
        loop {
            for (row, logits) in rows.iter_mut().zip(logits.chunks_exact(vocab_size)) {
                row.choose(self.options, logits, on_text)?;
            }
            for row in rows.iter_mut().filter(|row| row.stop.is_some()) {
                if answers[row.prompt].is_none() {
                    answers[row.prompt] = Some(row.answer(on_text)?);
                }
            }
            let running = rows.iter().filter(|row| row.stop.is_none()).count();
            if running == 0 {
                return Ok(());
            }
            // Rows that have ended cost as much as running ones: leave them behind once they are half of all.
            if running * 2 <= rows.len() {
                let keep = |(at, row): (usize, &Row<'_>)| row.stop.is_none().then_some((at, row.length));
                let kept: Vec<(usize, usize)> = rows.iter().enumerate().filter_map(keep).collect();
                lane = lane.kept(&kept, lane.cache.capacity)?;
                rows.retain(|row| row.stop.is_none());
            }
            let tokens: Vec<u32> = rows.iter().map(|row| row.last).collect();
            let lengths: Vec<usize> = rows.iter().map(|row| row.length).collect();
            logits = lane.decode(self.run, &tokens, &lengths)?.to_vec();
            // An ended row writes its token to the same place again and again, so it never outgrows the cache.
            rows.iter_mut().filter(|row| row.stop.is_none()).for_each(|row| row.length += 1);
        }
    }

    /// One answer that is expected to copy its prompt: each run reads the last token and a guess of those that follow.
    fn generate_copying(
        &mut self,
        prompt: &[u32],
        index: usize,
        on_text: OnText<'_>,
    ) -> Result<Generated, InferError> {
        let vocab_size = self.model.manifest().model.vocab_size;
        let (mut lane, logits) = self.read_prompts(&[prompt])?;
        let mut row = Row::new(self.model, self.options, index, prompt.len());
        let mut copying = Copying::new(prompt);
        row.choose(self.options, &logits, on_text)?;
        while row.stop.is_none() {
            copying.push(row.last);
            // The cache ends with the longest answer, so the last tokens are not guessed.
            let guess = copying.guess(lane.cache.capacity.saturating_sub(row.length + 1).min(GUESS_MAX));
            let tokens = [&[row.last], guess].concat();
            let logits = lane.extend(self.run, &tokens, row.length)?;
            row.length += 1;
            let mut right = 0;
            for (logits, guess) in
                logits.chunks_exact(vocab_size).zip(tokens[1..].iter().map(Some).chain([None]))
            {
                row.choose(self.options, logits, on_text)?;
                if row.stop.is_some() || guess != Some(&row.last) {
                    break;
                }
                copying.push(row.last);
                row.length += 1;
                right += 1;
            }
            copying.learn(tokens.len() - 1, right);
        }
        row.answer(on_text)
    }

    /// Fills a lane with the prompts; the logits behind each prompt.
    fn read_prompts(&self, ids: &[&[u32]]) -> Result<(Lane, Vec<f32>), InferError> {
        let vocab_size = self.model.manifest().model.vocab_size;
        let capacity = ids.iter().map(|ids| capacity(self.model, ids, self.options)).max().unwrap_or(1);
        let mut lane = Lane::new(self.model, self.adapter, ids.len(), capacity)?;
        let mut logits = vec![0.0; ids.len() * vocab_size];
        let mut put = |row: usize, from: &[f32]| {
            logits[row * vocab_size..][..vocab_size].copy_from_slice(from);
            Ok(())
        };
        let lengths: Vec<usize> = ids.iter().map(|ids| ids.len()).collect();
        if self.prefix.is_none() && Lane::fits_padded(self.model, &lengths, ids.len()) {
            let lasts: Vec<Vec<usize>> = lengths.iter().map(|length| vec![length - 1]).collect();
            lane.read_padded(self.run, ids, &lasts, |row, _, from| put(row, from))?;
            return Ok((lane, logits));
        }
        // The attention operator takes several new tokens behind a past only for one row at a time.
        let longest = lengths.iter().copied().max().unwrap_or(1);
        let mut alone = Lane::new(self.model, self.adapter, 1, longest)?;
        for (row, ids) in ids.iter().enumerate() {
            let shared = match self.prefix {
                Some(prefix) => prefix.lane_for(self.run, ids)?.map(|lane| (lane, prefix.ids().len())),
                None => None,
            };
            let last = [ids.len() - 1];
            if let Some((mut shared, start)) = shared {
                shared.read(self.run, ids, start, &last, |_, from| put(row, from))?;
                lane.cache.copy_row(row, &shared.cache, 0, ids.len())?;
            } else {
                alone.read(self.run, ids, 0, &last, |_, from| put(row, from))?;
                lane.cache.copy_row(row, &alone.cache, 0, ids.len())?;
            }
        }
        Ok((lane, logits))
    }
}
