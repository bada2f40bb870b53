//! Judging and rewriting in chunks that are kept, so that a break costs the chunk under way and not the stage.
//!
//! Of `work.rs`; between `filter.rs` and `revise.rs`, whose chunks these are, and the store. A chunk's file lies sealed in
//! `round/` and begins with the digest of all that it follows from: what the round was begun with (task, policy, guard,
//! constitution; `begun.rs`) and its samples. One of anything else, or one that does not open, is made again. Once the
//! round's pairs are on disk, all of them go.

use commonweal_protocol::{Digest, RoundTask};
use commonweal_transport::Link;
use serde::{Serialize, de::DeserializeOwned};

use crate::{
    doing,
    filter::{self, Judgements, Screened},
    kept,
    pipeline::{Device, PipelineError},
    revise::{self, Placed, ReviseCounts, Rewritten, Sorted, TrainingPair},
    sample::{self, Sample, SampleId},
    store::StoreError,
};

/// The samples that the round has drawn, in their order: what is added meanwhile waits for the next round.
const DRAWN: &str = "round/drawn.samples";
const JUDGED: &str = "judged-";
const REWRITTEN: &str = "rewritten-";

impl<L: Link> Device<L> {
    /// The round's samples. Those that were drawn before a break are drawn still, as long as all of them are here.
    pub(crate) fn draw(&self, task: &RoundTask) -> Result<Vec<Sample>, PipelineError> {
        let all = kept::samples(&self.store)?;
        if let Some(drawn) = self.store.read_remade(DRAWN)?
            && let Some(samples) = sample::pick(&all, &drawn)
        {
            return Ok(samples);
        }
        let samples = sample::draw(all, self.policy.train.samples_max, task.seed);
        if !samples.is_empty() {
            kept::mark_used(&self.store, samples.iter())?;
            let ids: Vec<u8> = samples.iter().flat_map(|sample| sample.id().bytes()).collect();
            self.store.write(DRAWN, &ids)?;
        }
        Ok(samples)
    }

    /// Judges the samples; what was judged before a break is not judged again.
    pub(crate) fn judge(
        &self,
        task: &RoundTask,
        samples: Vec<Sample>,
    ) -> Result<Vec<Screened>, PipelineError> {
        if !self.policy.filter.enabled {
            return Ok(filter::unseen(samples));
        }
        let begun = self.begun_with(task)?;
        let mut screened = Vec::with_capacity(samples.len());
        let mut samples = samples.into_iter().peekable();
        for number in 0.. {
            if samples.peek().is_none() {
                break;
            }
            let mut chunk: Vec<Sample> = samples.by_ref().take(filter::CHUNK_SAMPLES).collect();
            let ids: Vec<SampleId> = chunk.iter().map(Sample::id).collect();
            let (name, follows) = (name(JUDGED, number), follows_from(&begun, &ids));
            if let Some(judgements) = self.read_chunk::<Judgements>(&name, follows)? {
                match judgements.over(chunk) {
                    Ok(known) => {
                        screened.extend(known);
                        continue;
                    }
                    Err(others) => chunk = others,
                }
            }
            let judged = filter::screen_chunk(&self.guard, &self.policy, chunk, &self.cancel)?;
            self.keep_chunk(&name, follows, &Judgements::of(&ids, &judged))?;
            screened.extend(judged);
            doing::goes_on();
        }
        Ok(screened)
    }

    /// Rewrites what was flagged; what was rewritten before a break is not rewritten again.
    pub(crate) fn rewrite(
        &self,
        task: &RoundTask,
        screened: Vec<Screened>,
    ) -> Result<(Vec<TrainingPair>, ReviseCounts), PipelineError> {
        let begun = self.begun_with(task)?;
        let mut sorted = Sorted::new(&self.reviser, screened);
        for number in 0.. {
            let Some(chunk) = sorted.next_chunk() else { break };
            let ids: Vec<SampleId> = chunk.iter().map(|(_, one)| one.sample().id()).collect();
            let (name, follows) = (name(REWRITTEN, number), follows_from(&begun, &ids));
            let known = self.read_chunk::<Vec<Rewritten>>(&name, follows)?;
            let rewritten = match known.filter(|known| known.len() == chunk.len()) {
                Some(known) => known,
                None => self.rewrite_chunk(task, &chunk, &name, follows)?,
            };
            sorted.take(&self.policy, chunk, rewritten);
        }
        Ok(sorted.into_pairs())
    }

    fn rewrite_chunk(
        &self,
        task: &RoundTask,
        chunk: &[Placed],
        name: &str,
        follows: Digest,
    ) -> Result<Vec<Rewritten>, PipelineError> {
        let Self { guard, reviser, policy, cancel, .. } = self;
        let rewritten = revise::rewrite(guard, reviser, policy, chunk, task.seed, cancel)?;
        self.keep_chunk(name, follows, &rewritten)?;
        doing::goes_on();
        Ok(rewritten)
    }

    /// After the round's pairs are on disk.
    pub(crate) fn remove_chunks(&self) -> Result<(), StoreError> {
        for name in self.store.list("round")? {
            if name.starts_with(JUDGED) || name.starts_with(REWRITTEN) {
                self.store.remove(&format!("round/{name}"))?;
            }
        }
        self.store.remove(DRAWN)
    }

    fn read_chunk<T: DeserializeOwned>(&self, name: &str, follows: Digest) -> Result<Option<T>, StoreError> {
        let Some(bytes) = self.store.read_remade(name)? else { return Ok(None) };
        let of_this = bytes.strip_prefix(&follows.0);
        Ok(of_this.and_then(|bytes| postcard::from_bytes(bytes).ok()))
    }

    fn keep_chunk(&self, name: &str, follows: Digest, done: &impl Serialize) -> Result<(), StoreError> {
        let bytes = postcard::to_extend(done, follows.0.to_vec()).map_err(|error| {
            let reason = format!("chunk does not encode: {error}");
            StoreError::Damaged { path: self.store.path(name), reason }
        })?;
        self.store.write_within(name, &bytes)
    }
}

fn name(stage: &str, number: usize) -> String {
    format!("round/{stage}{number:04}.bin")
}

fn follows_from(begun: &[u8], ids: &[SampleId]) -> Digest {
    let ids = ids.iter().flat_map(|id| id.bytes());
    let all: Vec<u8> = Digest::of(begun).0.into_iter().chain(ids).collect();
    Digest::of(&all)
}
