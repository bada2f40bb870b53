//! What goes wrong on the simulated network, and when: drawn from a seed, or written down. Neighbours: `proxy` carries
//! it out. What was done is kept, so that a failing seed can be written down as a script.

use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

/// What can happen to a frame on its way from a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The stream is cut before the frame arrives.
    CutBefore,
    /// The stream is cut when half of the frame has arrived.
    CutInside,
    /// The frame arrives; the stream is cut when the next answer is on its way: the handler has run, nobody knows.
    CutAfter,
    /// All that this stream carried arrives again when it is over, as another stream.
    Duplicate,
    /// The frame comes late.
    Delay {
        /// How late.
        ms: u32,
    },
    /// A bit of the frame's last byte is flipped. (TLS would not let this through; what is behind it must stand it
    /// anyhow.)
    Corrupt,
    /// A bit of the next answer's last byte is flipped.
    CorruptAnswer,
}

/// Chances of each fault, for each frame.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct FaultRates {
    /// Of [`Fault::CutBefore`].
    pub cut_before: f64,
    /// Of [`Fault::CutInside`].
    pub cut_inside: f64,
    /// Of [`Fault::CutAfter`].
    pub cut_after: f64,
    /// Of [`Fault::Duplicate`].
    pub duplicate: f64,
    /// Of [`Fault::Delay`].
    pub delay: f64,
    /// Longest delay.
    pub delay_ms_max: u32,
    /// Of [`Fault::Corrupt`].
    pub corrupt: f64,
    /// Of [`Fault::CorruptAnswer`].
    pub corrupt_answer: f64,
}

/// A fault that happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Injected {
    /// Which frame, counted from 0 over all streams of the network.
    pub frame: u64,
    /// What happened to it.
    pub fault: Fault,
}

/// Decides for each frame. Clones share one course of events.
#[derive(Debug, Clone)]
pub struct Faults(Arc<Mutex<Course>>);

#[derive(Debug)]
struct Course {
    source: Source,
    frames: u64,
    injected: Vec<Injected>,
}

#[derive(Debug)]
enum Source {
    Nothing,
    Seeded { random: Box<ChaCha8Rng>, rates: FaultRates, left: u32 },
    Scripted(BTreeMap<u64, Fault>),
}

impl Faults {
    /// Nothing goes wrong.
    pub fn none() -> Self {
        Self::from(Source::Nothing)
    }

    /// Faults drawn from a seed, `faults_max` at most, so that a link that retries comes through in the end.
    pub fn seeded(seed: u64, rates: FaultRates, faults_max: u32) -> Self {
        let random = Box::new(ChaCha8Rng::seed_from_u64(seed));
        Self::from(Source::Seeded { random, rates, left: faults_max })
    }

    /// These faults at these frames, counted from 0 over all streams of the network.
    pub fn scripted(script: impl IntoIterator<Item = (u64, Fault)>) -> Self {
        Self::from(Source::Scripted(script.into_iter().collect()))
    }

    fn from(source: Source) -> Self {
        Self(Arc::new(Mutex::new(Course { source, frames: 0, injected: Vec::new() })))
    }

    /// What has happened, in order.
    pub fn injected(&self) -> Vec<Injected> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).injected.clone()
    }

    /// Whether a stream should remember what it carries.
    pub(super) fn may_duplicate(&self) -> bool {
        !matches!(self.0.lock().unwrap_or_else(PoisonError::into_inner).source, Source::Nothing)
    }

    /// What happens to the next frame.
    pub(super) fn next(&self) -> Option<Fault> {
        let mut course = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let frame = course.frames;
        course.frames += 1;
        let fault = match &mut course.source {
            Source::Nothing | Source::Seeded { left: 0, .. } => None,
            Source::Scripted(script) => script.remove(&frame),
            Source::Seeded { random, rates, left } => {
                let fault = rates.draw(random);
                *left -= u32::from(fault.is_some());
                fault
            }
        };
        course.injected.extend(fault.map(|fault| Injected { frame, fault }));
        fault
    }
}

impl FaultRates {
    fn draw(&self, random: &mut ChaCha8Rng) -> Option<Fault> {
        // Both are drawn for every frame, so that changing one rate does not shift all that follows.
        let (mut point, ms) = (random.random::<f64>(), random.random_range(0..=self.delay_ms_max));
        let chances = [
            (self.cut_before, Fault::CutBefore),
            (self.cut_inside, Fault::CutInside),
            (self.cut_after, Fault::CutAfter),
            (self.duplicate, Fault::Duplicate),
            (self.delay, Fault::Delay { ms }),
            (self.corrupt, Fault::Corrupt),
            (self.corrupt_answer, Fault::CorruptAnswer),
        ];
        chances.into_iter().find_map(|(chance, fault)| {
            point -= chance;
            (point < 0.0).then_some(fault)
        })
    }
}
