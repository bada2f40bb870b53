//! The kinds of work that a device does, each as a run of a fixed size over any package, with what it must read and
//! compute. Tokens are arbitrary: the time does not depend on them. Called by `bench.rs`.

use std::time::Instant;

use anyhow::{Result, bail};
use clap::ValueEnum;
use commonweal_adapter::{Adapter, AdapterDelta, CompressOptions, Residual, Trainable, compress};
use commonweal_package::TrainGraph;
use commonweal_runtime::{
    Cancel, GenerateOptions, Model, PreparedAdapter, Prompt, SharedPrefix, TrainOptions, Trainer, TrainingRow,
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::Figure;

const PREFILL_TOKENS: usize = 512;
/// Decoding goes on behind this many tokens and reaches a context of 512.
const DECODE_BEHIND: usize = 448;
const DECODE_TOKENS: usize = 64;
const POLICY_TOKENS: usize = 300;
const SAMPLE_TOKENS: usize = 60;
const SAMPLES: usize = 32;
const TRAIN_TOKENS: usize = 256;
const ANSWER_TOKENS: usize = 200;
/// One token in so many is new in a rewrite.
const CHANGED: usize = 10;
const REWRITES: usize = 4;

/// A kind of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Work {
    /// Open a package until it can answer
    Load,
    /// Read a prompt of 512 tokens
    Prefill,
    /// Generate one answer
    Decode,
    /// Generate two answers side by side
    Decode2,
    /// Generate four answers side by side
    Decode4,
    /// Generate eight answers side by side
    Decode8,
    /// Judge samples of 60 tokens behind a policy of 300 that all share
    Screen,
    /// Judge the same samples, the policy read again for each
    ScreenApart,
    /// Rewrite an answer of 200 tokens, of which one in ten changes
    Revise,
    /// A training step on 256 tokens, every linear adapted
    Train,
    /// The same step in little memory: layers are computed again in the backward
    TrainFrugal,
    /// The same step, only the upper half of the layers trained
    TrainUpper,
    /// Pack an update
    Compress,
    /// Judge, rewrite and train in one process: the memory of a whole device
    Device,
    /// Cancel each kind of a visit's work at random moments, eight for each run: milliseconds until it returns
    Stop,
}

impl Work {
    pub(super) fn all() -> Vec<Self> {
        Self::value_variants().to_vec()
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Load => "load",
            Self::Prefill => "prefill",
            Self::Decode => "decode",
            Self::Decode2 => "decode2",
            Self::Decode4 => "decode4",
            Self::Decode8 => "decode8",
            Self::Screen => "screen",
            Self::ScreenApart => "screen-apart",
            Self::Revise => "revise",
            Self::Train => "train",
            Self::TrainFrugal => "train-frugal",
            Self::TrainUpper => "train-upper",
            Self::Compress => "compress",
            Self::Device => "device",
            Self::Stop => "stop",
        }
    }

    /// The median of some runs, after one that is not counted. What `stop.rs` measures has no rate.
    pub(super) fn measure(self, repeats: usize, open: &dyn Fn() -> Result<Model>) -> Result<Figure> {
        let bench = || -> Result<Bench> {
            let model = open()?;
            Ok(Bench { base: model.prepare(None)?, size: Size::of(&model), model, repeats })
        };
        match self {
            Self::Load => {
                let seconds = median(repeats, || open().map(drop))?;
                Ok(self.figure(1.0 / seconds, "loads/s", 0.0, 0.0))
            }
            Self::Prefill => bench()?.prefill(),
            Self::Decode => bench()?.decode(self, 1),
            Self::Decode2 => bench()?.decode(self, 2),
            Self::Decode4 => bench()?.decode(self, 4),
            Self::Decode8 => bench()?.decode(self, 8),
            Self::Screen => bench()?.screen(self, true),
            Self::ScreenApart => bench()?.screen(self, false),
            Self::Revise => bench()?.revise(),
            Self::Train => bench()?.train(self, TrainGraph::Full),
            Self::TrainFrugal => bench()?.train(self, TrainGraph::Frugal),
            Self::TrainUpper => bench()?.train(self, TrainGraph::Upper),
            Self::Compress => bench()?.compress(),
            Self::Device => bench()?.device(),
            Self::Stop => bail!("{} is measured elsewhere", self.name()),
        }
    }

    fn figure(self, rate: f64, unit: &str, bytes: f64, flops: f64) -> Figure {
        Figure {
            work: self.name().into(),
            rate,
            unit: unit.into(),
            bytes,
            flops,
            peak_mb: None,
            profile: Vec::new(),
        }
    }
}

/// What a model's passes read and compute.
struct Size {
    /// Weights of the blocks.
    blocks: f64,
    /// Weights of the head.
    head: f64,
    /// Bytes of a stored weight, its share of a scale included.
    weight_bytes: f64,
    /// Floats of keys and values of a token.
    cache: f64,
    /// Multiplications of a query with a key and of a probability with a value, all heads and layers.
    attention: f64,
}

impl Size {
    fn of(model: &Model) -> Self {
        let (config, quantization) = (&model.manifest().model, &model.manifest().quantization);
        let (hidden, layers) = (config.hidden_size as f64, config.layers as f64);
        let linears =
            config.qkv_size() as f64 + config.query_size() as f64 + 3.0 * config.intermediate_size as f64;
        let bits = quantization.bits.count() as f64;
        let scale = if bits < 32.0 { 4.0 / quantization.block_size as f64 } else { 0.0 };
        Self {
            blocks: layers * hidden * linears,
            head: config.vocab_size as f64 * hidden,
            weight_bytes: bits / 8.0 + scale,
            cache: layers * 2.0 * config.kv_size() as f64,
            attention: layers * 2.0 * config.query_size() as f64,
        }
    }

    /// Arithmetic of reading a token in the middle of `tokens`: each sees half of them. The head is not counted.
    fn read_flops(&self, tokens: usize) -> f64 {
        2.0 * self.blocks + 2.0 * self.attention * tokens as f64 / 2.0
    }
}

struct Bench {
    model: Model,
    base: PreparedAdapter,
    size: Size,
    repeats: usize,
}

impl Bench {
    fn ids(&self, seed: u64, tokens: usize) -> Vec<u32> {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let vocab_size = self.model.manifest().model.vocab_size as u32;
        (0..tokens).map(|_| random.random_range(0..vocab_size)).collect()
    }

    fn answer(&self, prefix: Option<&SharedPrefix>, prompts: &[Prompt], tokens: usize) -> Result<usize> {
        // Sampled: greedy answers of some models run in circles and end at once.
        let options = GenerateOptions { max_new_tokens: tokens, temperature: 1.0, ..Default::default() };
        let (silent, cancel) = (&mut |_: usize, _: &str| (), Cancel::new());
        let answers =
            self.model.generate_streaming(&self.base, prefix, prompts, &options, silent, &cancel)?;
        Ok(answers.iter().map(|answer| answer.tokens.len()).sum())
    }

    fn prefill(&self) -> Result<Figure> {
        let prompts = [Prompt::from(self.ids(0, PREFILL_TOKENS))];
        let seconds = median(self.repeats, || self.answer(None, &prompts, 1).map(drop))?;
        let rate = PREFILL_TOKENS as f64 / seconds;
        Ok(Work::Prefill.figure(rate, "tokens/s", 0.0, self.size.read_flops(PREFILL_TOKENS)))
    }

    /// The prompt is read beforehand, so that only its last two tokens count beside the generated ones.
    fn decode(&self, work: Work, rows: usize) -> Result<Figure> {
        let behind = self.ids(0, DECODE_BEHIND);
        let prefix = self.model.share_prefix(&self.base, &behind, &Cancel::new())?;
        let prompt = |seed| Prompt::from([behind.clone(), self.ids(seed, 2)].concat());
        let prompts: Vec<Prompt> = (1..=rows as u64).map(prompt).collect();
        let mut tokens = 0;
        let seconds = median(self.repeats, || {
            tokens = self.answer(Some(&prefix), &prompts, DECODE_TOKENS)?;
            Ok(())
        })?;
        let rate = tokens as f64 / seconds;
        let Size { blocks, head, weight_bytes, cache, attention } = self.size;
        let context = (DECODE_BEHIND + DECODE_TOKENS / 2) as f64;
        let bytes = (blocks + head) * weight_bytes / rows as f64 + 4.0 * cache * context;
        Ok(work.figure(rate, "tokens/s", bytes, 2.0 * (blocks + head) + 2.0 * attention * context))
    }

    fn screen(&self, work: Work, shared: bool) -> Result<Figure> {
        let policy = self.ids(0, POLICY_TOKENS);
        let sample = |seed| Prompt::from([policy.clone(), self.ids(seed, SAMPLE_TOKENS)].concat());
        let samples: Vec<Prompt> = (1..=SAMPLES as u64).map(sample).collect();
        let cancel = Cancel::new();
        let seconds = median(self.repeats, || {
            // The policy is read once for all samples of a run, and its time counts.
            let prefix =
                if shared { Some(self.model.share_prefix(&self.base, &policy, &cancel)?) } else { None };
            self.model.score_next(&self.base, prefix.as_ref(), &samples, &[1, 2], &cancel)?;
            Ok(())
        })?;
        let tokens = SAMPLE_TOKENS as f64 + if shared { 0.0 } else { POLICY_TOKENS as f64 };
        let flops = tokens * self.size.read_flops(POLICY_TOKENS + SAMPLE_TOKENS);
        Ok(work.figure(SAMPLES as f64 / seconds, "samples/s", 0.0, flops))
    }

    /// The rewrite is given beforehand, so that what it copies does not depend on the weights; the work is that of
    /// finding it.
    fn revise(&self) -> Result<Figure> {
        let answer = self.ids(1, ANSWER_TOKENS);
        let mut rewrite = answer.clone();
        for (at, other) in (0..ANSWER_TOKENS).step_by(CHANGED).zip(self.ids(2, ANSWER_TOKENS)) {
            rewrite[at] = other;
        }
        let prompts = [Prompt::from([self.ids(0, SAMPLE_TOKENS), answer].concat())];
        let begin = rewrite[1..].to_vec();
        let options =
            GenerateOptions { max_new_tokens: begin.len(), begin, copying: true, ..Default::default() };
        let (mut tokens, mut seconds) = (0, Vec::new());
        for _ in 0..=self.repeats {
            // The time of the rewrite alone: what it takes longer than its first token.
            let first = GenerateOptions { max_new_tokens: 1, ..options.clone() };
            let begun = Instant::now();
            self.model.generate(&self.base, &prompts, &first, &Cancel::new())?;
            let reading = begun.elapsed();
            let begun = Instant::now();
            tokens = self.model.generate(&self.base, &prompts, &options, &Cancel::new())?[0].tokens.len() - 1;
            seconds.push(begun.elapsed().saturating_sub(reading).as_secs_f64());
        }
        let rate = tokens as f64 / middle(seconds.split_off(1));
        Ok(Work::Revise.figure(rate, "tokens/s", 0.0, self.size.read_flops(SAMPLE_TOKENS + ANSWER_TOKENS)))
    }

    fn trainer(&self, graph: TrainGraph) -> Result<(Trainer, TrainingRow)> {
        let row = TrainingRow { ids: self.ids(0, TRAIN_TOKENS + 1), weights: vec![1.0; TRAIN_TOKENS + 1] };
        let start = Adapter::init(self.model.layout().clone(), 0);
        Ok((Trainer::new(&self.model, start, TrainOptions { graph, ..TrainOptions::default() })?, row))
    }

    fn train(&self, work: Work, graph: TrainGraph) -> Result<Figure> {
        let (mut trainer, row) = self.trainer(graph)?;
        let seconds = median(self.repeats, || {
            trainer.step(std::slice::from_ref(&row), &Cancel::new()).map(drop).map_err(Into::into)
        })?;
        // The base is frozen: its backward is one product a matrix, and so is its forward.
        let (layers, head) = (self.size.read_flops(TRAIN_TOKENS), 2.0 * self.size.head);
        let backward = if graph == TrainGraph::Upper { layers / 2.0 } else { layers };
        let flops = layers + backward + 2.0 * head;
        Ok(work.figure(TRAIN_TOKENS as f64 / seconds, "tokens/s", 0.0, flops))
    }

    fn compress(&self) -> Result<Figure> {
        let layout = self.model.layout();
        let mut random = ChaCha8Rng::seed_from_u64(0);
        let values: Vec<f32> =
            (0..layout.parameters()).map(|_| random.random_range(-1e-3..1e-3_f32)).collect();
        let delta = AdapterDelta::from_values(layout.clone(), Trainable::Both, values)?;
        let options = CompressOptions::default();
        let seconds = median(self.repeats, || {
            let mut residual = Residual::zeros(layout.clone(), Trainable::Both);
            compress(&delta, &mut residual, &options, &mut random)?;
            Ok(())
        })?;
        let rate = layout.parameters() as f64 / seconds / 1e6;
        Ok(Work::Compress.figure(rate, "M values/s", 0.0, 0.0))
    }

    fn device(&self) -> Result<Figure> {
        let policy = self.ids(0, POLICY_TOKENS);
        let sample = |seed| Prompt::from([policy.clone(), self.ids(seed, SAMPLE_TOKENS)].concat());
        let samples: Vec<Prompt> = (1..=SAMPLES as u64).map(sample).collect();
        let cancel = Cancel::new();
        let begun = Instant::now();
        let prefix = self.model.share_prefix(&self.base, &policy, &cancel)?;
        self.model.score_next(&self.base, Some(&prefix), &samples, &[1, 2], &cancel)?;
        self.answer(None, &samples[..REWRITES], SAMPLE_TOKENS)?;
        self.model.close_inference();
        let (mut trainer, row) = self.trainer(TrainGraph::Frugal)?;
        for _ in 0..2 {
            trainer.step(std::slice::from_ref(&row), &cancel)?;
        }
        let rate = SAMPLES as f64 / begun.elapsed().as_secs_f64();
        Ok(Work::Device.figure(rate, "samples/s", 0.0, 0.0))
    }
}

fn median(repeats: usize, mut run: impl FnMut() -> Result<()>) -> Result<f64> {
    run()?;
    let mut seconds = Vec::with_capacity(repeats);
    for _ in 0..repeats {
        let begun = Instant::now();
        run()?;
        seconds.push(begun.elapsed().as_secs_f64());
    }
    Ok(middle(seconds))
}

pub(super) fn middle(mut seconds: Vec<f64>) -> f64 {
    seconds.sort_by(f64::total_cmp);
    seconds[seconds.len() / 2]
}
