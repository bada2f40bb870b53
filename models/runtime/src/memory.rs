//! Memory that work needs, told from a package's shape before anything is allocated, and memory that there is. Whoever
//! opens a model or trains it asks [`check`] first; `measure.rs` tells what was taken in the end.
//!
//! The constants below are fitted to the peaks that `edge-client bench` measures (docs/performance.md); the test holds
//! them within a factor of 1.3 of those. Change them with the graphs, in this file alone.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use commonweal_package::{CacheForm, EncoderConfig, ModelConfig, Package, TrainGraph};

use crate::{classify::ClassifyOptions, model::OpenOptions};

/// The program, the runtime library and its threads.
const PROCESS_BYTES: f64 = 38e6;
/// Bytes in memory for a byte of weights while a session is opened: the bytes themselves and the kernels' packed copies.
const OPEN_COPIES: f64 = 2.05;
/// The same once it is open: pages of the file that the kernels no longer need are given back.
const SETTLED_COPIES: f64 = 1.1;
/// Of a block's widest values of a token, how many are alive at once while a prompt is read: the runtime's arena
/// grows in powers of two.
const READ_WIDTHS: f64 = 6.3;
/// Of each block's values of a token, how many the gradient graph keeps for its way back.
const TRAIN_WIDTHS: f64 = 1.1;
/// Of the vocabulary's values of a token, how many are alive at once: the logits of a chunk, and what is made of them.
const TRAIN_LOGITS: f64 = 1.3;
/// Copies of the adapter: values, start, two moments, gradients twice.
const TRAIN_ADAPTERS: f64 = 7.0;
/// What a gradient session takes at any size.
const TRAIN_SESSION_BYTES: f64 = 40e6;

const FLOAT: f64 = size_of::<f32>() as f64;

/// A package's part in the memory that work needs.
#[derive(Clone, Copy, Debug)]
pub struct Shape<'m> {
    /// Dimensions.
    pub model: &'m ModelConfig,
    /// How keys and values are kept.
    pub cache: CacheForm,
    /// Bytes of `weights.bin`.
    pub weights_bytes: u64,
}

impl<'m> Shape<'m> {
    /// The part of an open package.
    pub fn of(package: &'m Package) -> io::Result<Self> {
        let weights_bytes = fs::metadata(package.weights())?.len();
        let manifest = package.manifest();
        Ok(Self { model: &manifest.model, cache: manifest.cache, weights_bytes })
    }

    /// Options with which the package fits in the memory that is available: the base, the reading of a prompt and one
    /// cache of a whole conversation must; the caches of more rows side by side get the half of what is left.
    pub fn fit(
        &self,
        what: &'static str,
        options: OpenOptions,
        available: Option<Available>,
        lower: &'static str,
    ) -> Result<OpenOptions, MemoryError> {
        self.fit_for(usize::MAX, what, options, available, lower)
    }

    /// The same for conversations of so many tokens at most: what longer ones need is not asked for.
    pub fn fit_for(
        &self,
        tokens: usize,
        what: &'static str,
        options: OpenOptions,
        available: Option<Available>,
        lower: &'static str,
    ) -> Result<OpenOptions, MemoryError> {
        let tokens = tokens.min(self.model.context).min(options.context_max.unwrap_or(usize::MAX));
        let needed = self.device_bytes(1, tokens, options.prefill_tokens_max.min(tokens));
        check(what, needed, available, lower)?;
        let left = available.map_or(u64::MAX, |available| available.bytes - needed) / 2;
        let cache_bytes_max = options.cache_bytes_max.min(usize::try_from(left).unwrap_or(usize::MAX));
        Ok(OpenOptions { cache_bytes_max, ..options })
    }

    /// Bytes of the whole process with the inference session open.
    pub fn open_bytes(&self) -> u64 {
        (PROCESS_BYTES + OPEN_COPIES * self.weights_bytes as f64) as u64
    }

    /// Bytes of the whole process once the session is open.
    pub fn settled_bytes(&self) -> u64 {
        (PROCESS_BYTES + SETTLED_COPIES * self.weights_bytes as f64) as u64
    }

    /// Bytes of the whole process that opens the session and then answers.
    pub fn device_bytes(&self, rows: usize, tokens: usize, chunk: usize) -> u64 {
        self.open_bytes().max(self.settled_bytes() + self.answer_bytes(rows, tokens, chunk))
    }

    /// Bytes on top of an open session to read prompts `chunk` tokens at a time with `rows` caches of `tokens` each.
    pub fn answer_bytes(&self, rows: usize, tokens: usize, chunk: usize) -> u64 {
        let component = self.cache.component_bytes() as f64;
        let cache = self.model.layers as f64 * 2.0 * self.model.kv_size() as f64 * component;
        let reading = READ_WIDTHS * self.width() * FLOAT;
        (rows as f64 * tokens as f64 * cache + chunk as f64 * reading) as u64
    }

    /// Bytes on top of an open model for a training step that runs `tokens` tokens at once, all rows of a run together,
    /// padding included, for an adapter of so many values.
    pub fn train_bytes(&self, tokens: usize, graph: TrainGraph, adapter_values: usize) -> u64 {
        let (layers, hidden) = (self.model.layers as f64, self.model.hidden_size as f64);
        let whole = TRAIN_WIDTHS * self.width();
        // The chunks of the frugal graph are a quarter as large; between layers it keeps the residual stream alone.
        let (kept, logits) = match graph {
            TrainGraph::Full => (layers * whole, TRAIN_LOGITS),
            TrainGraph::Upper => (layers / 2.0 * (whole + hidden), TRAIN_LOGITS),
            TrainGraph::Frugal => (layers * hidden + 3.0 * whole, TRAIN_LOGITS / 3.0),
        };
        let token = (kept + logits * self.model.vocab_size as f64) * FLOAT;
        let adapters = TRAIN_ADAPTERS * adapter_values as f64 * FLOAT;
        // The backward reads the weights in the file again.
        (TRAIN_SESSION_BYTES + self.weights_bytes as f64 + adapters + tokens as f64 * token) as u64
    }

    /// Values of a token in a block: gate, up and their product, queries, keys and values, and the residual stream thrice.
    fn width(&self) -> f64 {
        (3 * self.model.intermediate_size + self.model.qkv_size() + 3 * self.model.hidden_size) as f64
    }
}

/// Bytes of the whole process that opens an encoder's package and classifies with it: the weights and one run of as many
/// tokens as the options allow, whose attention scores and their softmax are the largest part.
pub fn encoder_bytes(encoder: &EncoderConfig, weights_bytes: u64, options: &ClassifyOptions) -> u64 {
    let context = encoder.context.min(options.context_max.unwrap_or(usize::MAX)) as f64;
    let tokens = context.max(options.tokens_max as f64);
    let width = (3 * encoder.intermediate_size + 6 * encoder.hidden_size) as f64;
    let scores = 2.0 * encoder.heads as f64 * context;
    let run = tokens * (READ_WIDTHS * width + scores) * FLOAT;
    (PROCESS_BYTES + OPEN_COPIES * weights_bytes as f64 + run) as u64
}

/// Memory that the process could still get.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Available {
    /// How much.
    pub bytes: u64,
    /// What sets the bound.
    pub bound: Bound,
}

/// What bounds a process's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bound {
    /// What the kernel calls available.
    Machine,
    /// The limit of the process's control group (a container, a service).
    ControlGroup,
    /// What the process's owner allows it.
    Budget,
}

impl Bound {
    fn name(self) -> &'static str {
        match self {
            Self::Machine => "the machine",
            Self::ControlGroup => "the control group of this process",
            Self::Budget => "this process's memory budget",
        }
    }
}

/// There is not enough memory to begin.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{what} needs about {} MB of memory, {} has {} MB left; {lower}",
    megabytes(*needed),
    available.bound.name(),
    megabytes(available.bytes)
)]
pub struct MemoryError {
    /// The work.
    pub what: &'static str,
    /// Bytes that it needs.
    pub needed: u64,
    /// Bytes that there are.
    pub available: Available,
    /// The setting that lowers what it needs.
    pub lower: &'static str,
}

fn megabytes(bytes: u64) -> u64 {
    bytes.div_ceil(1_000_000)
}

/// Refuses work that does not fit in what is available. Where the system does not say (others than Linux), nothing is
/// refused.
pub fn check(
    what: &'static str,
    needed: u64,
    available: Option<Available>,
    lower: &'static str,
) -> Result<(), MemoryError> {
    match available {
        Some(available) if needed > available.bytes => Err(MemoryError { what, needed, available, lower }),
        _ => Ok(()),
    }
}

/// What the process's owner allows it.
static BUDGET: AtomicU64 = AtomicU64::new(u64::MAX);

/// Sets how much memory this process may hold, whatever there is; `None` for no such bound.
pub fn set_budget(bytes: Option<u64>) {
    BUDGET.store(bytes.unwrap_or(u64::MAX), Ordering::Relaxed);
}

/// What this process could still get: the least of the machine's, its control groups' and its owner's.
pub fn available() -> Option<Available> {
    available_below(Path::new("/"), BUDGET.load(Ordering::Relaxed))
}

/// The same for a figure of a whole process, such as [`Shape::device_bytes`]: what the program and its libraries hold
/// already is a part of the figure, and no second time needed.
pub fn available_for_process() -> Option<Available> {
    for_process_below(Path::new("/"), BUDGET.load(Ordering::Relaxed))
}

/// Each bound counts another part of what is held, so the tightest of them can be another one than of what is left.
fn for_process_below(root: &Path, budget: u64) -> Option<Available> {
    least(bounds_below(root, budget).map(|available| with_own(root, available)))
}

/// Sessions and caches that are held are another package's: of what is held, the program's own part counts at most. Pages of
/// files are available as far as the kernel goes, though the process holds them.
fn with_own(root: &Path, available: Available) -> Available {
    let name = if available.bound == Bound::Budget { "VmRSS:" } else { "RssAnon:" };
    let own = status(root, name).unwrap_or(0).min(PROCESS_BYTES as u64);
    Available { bytes: available.bytes.saturating_add(own), ..available }
}

/// What this process holds now, mapped files included; unknown on systems other than Linux.
pub fn held() -> Option<u64> {
    held_below(Path::new("/"))
}

fn held_below(root: &Path) -> Option<u64> {
    status(root, "VmRSS:")
}

fn status(root: &Path, name: &str) -> Option<u64> {
    kilobytes(&fs::read_to_string(root.join("proc/self/status")).ok()?, name)
}

fn available_below(root: &Path, budget: u64) -> Option<Available> {
    least(bounds_below(root, budget))
}

fn least(bounds: impl Iterator<Item = Available>) -> Option<Available> {
    bounds.min_by_key(|available| available.bytes)
}

/// What each bound that there is leaves.
fn bounds_below(root: &Path, budget: u64) -> impl Iterator<Item = Available> {
    let machine =
        fs::read_to_string(root.join("proc/meminfo")).ok().and_then(|text| kilobytes(&text, "MemAvailable:"));
    let machine = machine.map(|bytes| Available { bytes, bound: Bound::Machine });
    let groups = fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    let group = group_left(root, &groups).map(|bytes| Available { bytes, bound: Bound::ControlGroup });
    let own = if budget == u64::MAX { None } else { held_below(root) };
    let own = own.map(|held| Available { bytes: budget.saturating_sub(held), bound: Bound::Budget });
    machine.into_iter().chain(group).chain(own)
}

/// A number of one of the kernel's tables, in bytes.
fn kilobytes(table: &str, name: &str) -> Option<u64> {
    let line = table.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
}

/// The least that a control group of this process, or one around it, has left: version 2 (`0::/path`) or the memory
/// controller of version 1. Inside a container the path may name a folder that is not mounted; the root then counts.
fn group_left(root: &Path, groups: &str) -> Option<u64> {
    let files = groups.lines().filter_map(|line| {
        let mut parts = line.splitn(3, ':');
        let (_, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
        let path = PathBuf::from(path.trim_start_matches('/'));
        match controllers {
            "" => Some((root.join("sys/fs/cgroup"), path, "memory.max", "memory.current", "inactive_file")),
            list if list.split(',').any(|controller| controller == "memory") => {
                let mount = root.join("sys/fs/cgroup/memory");
                let (limit, used) = ("memory.limit_in_bytes", "memory.usage_in_bytes");
                Some((mount, path, limit, used, "total_inactive_file"))
            }
            _ => None,
        }
    });
    let left = files.flat_map(|(mount, path, limit, used, reclaimable)| {
        let levels: Vec<PathBuf> = path.ancestors().map(|level| mount.join(level)).collect();
        levels.into_iter().filter_map(move |level| {
            // `max` is no number: no limit.
            let limit = number(&fs::read_to_string(level.join(limit)).ok()?)?;
            let used = number(&fs::read_to_string(level.join(used)).ok()?)?;
            let statistics = fs::read_to_string(level.join("memory.stat")).unwrap_or_default();
            let cached = statistics.lines().find_map(|line| {
                let (name, bytes) = line.split_once(' ')?;
                (name == reclaimable).then(|| number(bytes))?
            });
            // Files that were read and are not in use give way.
            Some(limit.saturating_sub(used.saturating_sub(cached.unwrap_or(0))))
        })
    });
    left.min()
}

fn number(text: &str) -> Option<u64> {
    text.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Llama with heads of 64.
    fn config(
        hidden: usize,
        intermediate: usize,
        layers: usize,
        heads: (usize, usize),
        vocab: usize,
    ) -> ModelConfig {
        serde_json::from_value(serde_json::json!({
            "architecture": "llama", "name": "x", "hidden_size": hidden, "intermediate_size": intermediate,
            "layers": layers, "heads": heads.0, "kv_heads": heads.1, "head_dim": 64, "vocab_size": vocab,
            "context": 2048, "rope_theta": 10_000.0, "rms_norm_eps": 1e-5, "tied": true,
        }))
        .unwrap()
    }

    /// Peaks that `scripts/bench-device` printed (docs/performance.md), in MB: load, prefill of 512, decode of one and of
    /// eight rows at 512, a training step on 256 tokens in each graph.
    #[test]
    fn estimates_are_near_what_was_measured() {
        let shapes = [
            (
                config(576, 1536, 30, (9, 3), 49_152),
                (78_678_272, 2_442_240),
                [205.0, 239.0, 262.0, 431.0, 568.0, 400.0, 461.0],
            ),
            (
                config(896, 4864, 24, (14, 2), 151_936),
                (263_560_704, 4_399_104),
                [589.0, 587.0, 587.0, 587.0, 1336.0, 893.0, 998.0],
            ),
        ];
        for (model, (weights_bytes, adapter), measured) in shapes {
            let shape = Shape { model: &model, cache: CacheForm::Float, weights_bytes };
            // A prompt of 448 tokens is read, then the rows decode up to 512; the prefix has a cache of its own.
            let trained = |graph| shape.settled_bytes() + shape.train_bytes(256, graph, adapter);
            let estimated = [
                shape.open_bytes(),
                shape.device_bytes(1, 513, 512),
                shape.device_bytes(2, 512, 448),
                shape.device_bytes(9, 512, 448),
                trained(TrainGraph::Full),
                trained(TrainGraph::Frugal),
                trained(TrainGraph::Upper),
            ];
            for (estimated, measured) in estimated.into_iter().zip(measured) {
                let factor = estimated as f64 / 1e6 / measured;
                assert!((1.0 / 1.3..1.3).contains(&factor), "{measured} MB, estimated {estimated}: {factor}");
            }
        }
    }

    #[test]
    fn an_8_bit_cache_takes_a_quarter_of_the_rows() {
        let model = config(576, 1536, 30, (9, 3), 49_152);
        let rows = |cache| {
            let shape = Shape { model: &model, cache, weights_bytes: 0 };
            shape.answer_bytes(3, 1000, 0)
        };
        let text = commonweal_package::Hash([0; 32]);
        assert_eq!(rows(CacheForm::Float), 3 * 1000 * 30 * 2 * 192 * 4);
        assert_eq!(rows(CacheForm::Int8 { tokens: 512, text }) * 4, rows(CacheForm::Float));
    }

    #[test]
    fn what_does_not_fit_is_refused_with_both_figures_and_the_remedy() {
        let available = |bytes| Some(Available { bytes, bound: Bound::ControlGroup });
        check("training", 100, available(100), "use less").unwrap();
        check("training", u64::MAX, None, "use less").unwrap();
        let error =
            check("training", 2_000_000_000, available(900_000_000), "--context N takes less").unwrap_err();
        assert_eq!(
            error.to_string(),
            "training needs about 2000 MB of memory, the control group of this process has 900 MB left; \
             --context N takes less"
        );
    }

    #[test]
    fn an_encoder_takes_its_weights_and_the_scores_of_its_attention() {
        let encoder: EncoderConfig = serde_json::from_value(serde_json::json!({
            "architecture": "bert", "name": "x", "hidden_size": 768, "intermediate_size": 3072, "layers": 12,
            "heads": 12, "vocab_size": 30_522, "context": 512, "token_types": 2, "pad": 0,
            "probabilities": "softmax", "labels": ["safe", "unsafe"],
        }))
        .unwrap();
        let bytes = |options: ClassifyOptions| encoder_bytes(&encoder, 60_000_000, &options);
        let whole = bytes(ClassifyOptions::default());
        assert!(whole > 2 * 60_000_000 + 2 * 12 * 2048 * 512 * 4, "{whole}");
        assert!(bytes(ClassifyOptions { tokens_max: 512, ..ClassifyOptions::default() }) < whole);
    }

    /// A root directory with the kernel's files.
    fn root(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = root.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        root
    }

    #[test]
    fn the_tightest_bound_counts() {
        let meminfo = ("proc/meminfo", "MemTotal: 9000 kB\nMemAvailable:    8000 kB\n");
        let machine = Available { bytes: 8000 << 10, bound: Bound::Machine };
        let group = |bytes| Some(Available { bytes, bound: Bound::ControlGroup });
        assert_eq!(available_below(root(&[meminfo]).path(), u64::MAX), Some(machine));
        assert_eq!(available_below(root(&[]).path(), u64::MAX), None);
        let second = |limit, used, stat| {
            available_below(
                root(&[
                    meminfo,
                    ("proc/self/cgroup", "0::/a.slice/b.service\n"),
                    ("sys/fs/cgroup/a.slice/memory.max", limit),
                    ("sys/fs/cgroup/a.slice/memory.current", used),
                    ("sys/fs/cgroup/a.slice/memory.stat", stat),
                    ("sys/fs/cgroup/a.slice/b.service/memory.max", "max\n"),
                    ("sys/fs/cgroup/a.slice/b.service/memory.current", "7\n"),
                ])
                .path(),
                u64::MAX,
            )
        };
        assert_eq!(second("5000\n", "3000\n", "anon 1\ninactive_file 1000\n"), group(3000));
        assert_eq!(second("5000\n", "6000\n", ""), group(0));
        assert_eq!(second("max\n", "3000\n", ""), Some(machine));
        let first = root(&[
            meminfo,
            ("proc/self/cgroup", "12:cpu,cpuacct:/x\n5:memory:/x\n"),
            ("sys/fs/cgroup/memory/x/memory.limit_in_bytes", "9223372036854771712\n"),
            ("sys/fs/cgroup/memory/x/memory.usage_in_bytes", "10\n"),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "4096\n"),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "96\n"),
        ]);
        assert_eq!(available_below(first.path(), u64::MAX), group(4000));
    }

    #[test]
    fn what_the_program_holds_is_not_asked_for_twice() {
        let with = |held_kb: u64, bound| {
            let text = format!("VmRSS:  {held_kb} kB\nRssAnon:  {} kB\n", held_kb / 2);
            with_own(root(&[("proc/self/status", &text)]).path(), Available { bytes: 100, bound }).bytes
        };
        assert_eq!(with(20, Bound::Budget), 100 + (20 << 10));
        // Pages of its files are available as they are.
        assert_eq!([with(20, Bound::Machine), with(20, Bound::ControlGroup)], [100 + (10 << 10); 2]);
        // What is held beyond the program itself is another package, and is needed as well.
        assert_eq!(with(1 << 30, Bound::Machine), 100 + PROCESS_BYTES as u64);
        let unknown = Available { bytes: 100, bound: Bound::Machine };
        assert_eq!(with_own(root(&[]).path(), unknown), unknown);
        // The budget has least left, and counts the pages of files, which the machine does not.
        let system = root(&[
            ("proc/meminfo", "MemAvailable: 1000 kB\n"),
            ("proc/self/status", "VmRSS: 600 kB\nRssAnon: 100 kB\n"),
        ]);
        let own = |kilobytes: u64, bound| Some(Available { bytes: kilobytes << 10, bound });
        assert_eq!(available_below(system.path(), 1500 << 10), own(900, Bound::Budget));
        assert_eq!(for_process_below(system.path(), 1500 << 10), own(1100, Bound::Machine));
    }

    #[test]
    fn an_owners_budget_counts_what_the_process_holds_already() {
        let meminfo = ("proc/meminfo", "MemAvailable:    8000 kB\n");
        let status = ("proc/self/status", "VmPeak:   9000 kB\nVmRSS:     600 kB\nRssAnon:   300 kB\n");
        let system = root(&[meminfo, status]);
        let own = |bytes| Some(Available { bytes, bound: Bound::Budget });
        assert_eq!(available_below(system.path(), 1000 << 10), own(400 << 10));
        assert_eq!(available_below(system.path(), 500 << 10), own(0));
        let machine = Available { bytes: 8000 << 10, bound: Bound::Machine };
        assert_eq!(available_below(system.path(), 9000 << 10), Some(machine));
        let refused = check("training", 500 << 10, own(400 << 10), "use less").unwrap_err().to_string();
        assert!(refused.contains("this process's memory budget has 1 MB left"), "{refused}");
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn this_machine_says_what_it_has() {
        assert!(available().unwrap().bytes > 0);
        assert!(held().unwrap() > 0);
    }
}
