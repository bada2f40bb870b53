//! Who holds which data: conversations are read once as `edge-client`'s samples and dealt to clients by a seed.
//!
//! Every arm of a seed deals alike, so that arms differ in what is done with the samples and in nothing else.

use std::{collections::BTreeMap, fs::File, io::BufReader, path::Path};

use anyhow::{Context, Result, bail};
use commonweal_runtime::Cancel;
use commonweal_safety::{Confusion, Guard};
use edge_client::{
    filter, forms,
    policy::{Action, Policy},
    rows::{self, Form, RowError},
    sample::Sample,
};
use rand::{
    SeedableRng,
    seq::{IndexedRandom, SliceRandom},
};
use rand_chacha::ChaCha8Rng;

use crate::arms::{Arm, Split};

/// Everything that clients can hold.
pub(crate) struct Pool {
    /// With the source of each.
    benign: Vec<(String, Sample)>,
    /// With the kind of each: whose words it has, and whose answer.
    harmful: Vec<(String, Sample)>,
}

/// One client's samples.
#[derive(Clone, Debug)]
pub(crate) struct Client {
    pub(crate) samples: Vec<Sample>,
    /// It trains on harm alone and lies about it.
    pub(crate) is_hostile: bool,
}

/// How the filter does on what clients hold.
#[derive(Default)]
pub(crate) struct Screening {
    /// At the guard's own threshold.
    pub(crate) confusion: Confusion,
    /// Of each kind of harmful sample how many were found and how many there were.
    pub(crate) kinds: BTreeMap<String, (u32, u32)>,
    /// Probabilities of the harmful samples, ascending.
    harmful: Vec<f64>,
}

impl Screening {
    /// The threshold at which a share `recall` of the harmful samples is found.
    pub(crate) fn threshold(&self, recall: f64) -> Option<f64> {
        let missed = (self.harmful.len() as f64 * (1.0 - recall)).round() as usize;
        self.harmful.get(missed).copied()
    }
}

impl Pool {
    /// `clients.jsonl` and `harmful.jsonl` of a folder.
    pub(crate) fn read(folder: &Path) -> Result<Self> {
        let benign = read(&folder.join("clients.jsonl"))?;
        Ok(Self { benign, harmful: read(&folder.join("harmful.jsonl"))? })
    }

    /// All samples, for the check against evaluation prompts.
    pub(crate) fn samples(&self) -> impl Iterator<Item = &Sample> {
        self.benign.iter().chain(&self.harmful).map(|(_, sample)| sample)
    }

    /// What the filter says of benign and of harmful samples, at most `rows` of each.
    pub(crate) fn screen(&self, guard: &Guard, rows: usize, cancel: &Cancel) -> Result<Screening> {
        let mut random = ChaCha8Rng::seed_from_u64(0);
        let mut screening = Screening::default();
        for (is_harmful, pool) in [(false, &self.benign), (true, &self.harmful)] {
            let drawn: Vec<&(String, Sample)> = pool.choose_multiple(&mut random, rows).collect();
            let samples = drawn.iter().map(|(_, sample)| sample.clone()).collect();
            let screened = filter::screen(guard, &Policy::default(), samples, cancel, |_| ())?;
            for ((kind, _), screened) in drawn.into_iter().zip(screened) {
                let verdict = screened.verdict();
                let is_found = verdict.action != Action::Keep;
                screening.confusion.add(is_harmful, is_found);
                if is_harmful {
                    screening.harmful.push(verdict.probability.unwrap_or_default());
                    let (found, of) = screening.kinds.entry(kind.clone()).or_default();
                    (*found, *of) = (*found + u32::from(is_found), *of + 1);
                }
            }
        }
        screening.harmful.sort_by(f64::total_cmp);
        Ok(screening)
    }

    /// Deals `rows` samples to each client; of each is told in how many rounds it takes part.
    pub(crate) fn deal(&self, arm: &Arm, turns: &[u32], rows: usize, seed: u64) -> Result<Vec<Client>> {
        let count = turns.len();
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let mut numbers: Vec<usize> = (0..count).collect();
        numbers.shuffle(&mut random);
        let hostile = hostile(&numbers, turns, arm.hostile_share);
        let mut harmful: Vec<&Sample> = self.harmful.iter().map(|(_, sample)| sample).collect();
        harmful.shuffle(&mut random);
        let benign = self.benign(&arm.split, &mut random);
        let mut harmful = harmful.into_iter();
        let mut benign = benign.into_iter();
        let of_harm = (rows as f64 * arm.harm_share).round() as usize;
        let mut clients = Vec::with_capacity(count);
        for number in 0..count {
            let mut samples: Vec<Sample> = benign.by_ref().take(rows - of_harm).cloned().collect();
            samples.extend(harmful.by_ref().take(of_harm).cloned());
            if samples.len() < rows {
                bail!("{}: client {number} gets {} of {rows} samples", arm.name, samples.len());
            }
            samples.shuffle(&mut random);
            clients.push(Client { samples, is_hostile: false });
        }
        // They may hold what others hold; their own places are dealt above, so that the others' are the same.
        for number in hostile {
            let drawn = self.harmful.choose_multiple(&mut random, rows);
            let samples: Vec<Sample> = drawn.map(|(_, sample)| sample.clone()).collect();
            if samples.len() < rows {
                bail!("{}: a hostile client gets {} of {rows} samples", arm.name, samples.len());
            }
            clients[number] = Client { samples, is_hostile: true };
        }
        Ok(clients)
    }

    fn benign(&self, split: &Split, random: &mut ChaCha8Rng) -> Vec<&Sample> {
        match split {
            Split::Iid(kind) => {
                let of_kind = self.benign.iter().filter(|(source, _)| source.starts_with(kind));
                let mut samples: Vec<&Sample> = of_kind.map(|(_, sample)| sample).collect();
                samples.shuffle(random);
                samples
            }
            Split::Sources(kind) => {
                let of_kind = |(source, _): &&(String, Sample)| source.starts_with(kind);
                let mut sources: Vec<&String> =
                    self.benign.iter().filter(of_kind).map(|(source, _)| source).collect();
                sources.sort();
                sources.dedup();
                sources.shuffle(random);
                let mut samples = Vec::new();
                for source in sources {
                    let mut own: Vec<&Sample> =
                        self.benign.iter().filter(|(name, _)| name == source).map(|(_, one)| one).collect();
                    own.shuffle(random);
                    samples.extend(own);
                }
                samples
            }
        }
    }
}

/// Which clients are hostile: a share of them, with as near as can be the same share of all turns. Drawn without regard to
/// turns, they would be in no round of some seeds and in every one of others.
fn hostile(drawn: &[usize], turns: &[u32], share: f64) -> Vec<usize> {
    let count = (turns.len() as f64 * share).round() as usize;
    let goal = f64::from(turns.iter().sum::<u32>()) * share;
    let mut left = goal;
    let mut others = drawn.to_vec();
    let mut hostile = Vec::with_capacity(count);
    for remaining in (1..=count).rev() {
        let each = left / remaining as f64;
        let far = |number: usize| (f64::from(turns[number]) - each).abs();
        let nearest =
            (0..others.len()).min_by(|&one, &other| far(others[one]).total_cmp(&far(others[other])));
        let Some(place) = nearest else { break };
        let number = others.remove(place);
        left -= f64::from(turns[number]);
        hostile.push(number);
    }
    // Where clients with that many turns are used up, the last may be far off: one of them for another who makes up for it.
    // That is who was hostile in the runs that docs/results.md tells of; all choices are looked through where it is not enough.
    let wanted = left.round() as i64;
    if wanted == 0 {
        return hostile;
    }
    let gain =
        |&(one, other): &(usize, usize)| i64::from(turns[others[other]]) - i64::from(turns[hostile[one]]);
    let mut exchanges = (0..hostile.len()).flat_map(|one| (0..others.len()).map(move |other| (one, other)));
    match exchanges.find(|exchange| gain(exchange) == wanted) {
        Some((one, other)) => hostile[one] = others[other],
        // Several would have to be exchanged at once, or none can be.
        None => hostile = nearest(drawn, turns, count, goal),
    }
    hostile
}

/// Of all choices of so many clients one whose turns add up nearest to the goal.
fn nearest(drawn: &[usize], turns: &[u32], count: usize, goal: f64) -> Vec<usize> {
    // A choice for each number of clients and sum of turns that the clients so far can make.
    let mut choices = BTreeMap::from([((0, 0), Vec::new())]);
    for &number in drawn {
        let mut more = Vec::new();
        for (&(chosen, sum), choice) in choices.range(..(count, 0)) {
            more.push(((chosen + 1, sum + turns[number]), [choice.as_slice(), &[number]].concat()));
        }
        for (key, choice) in more {
            choices.entry(key).or_insert(choice);
        }
    }
    let whole = choices.into_iter().filter(|((chosen, _), _)| *chosen == count);
    let far = |sum: u32| (f64::from(sum) - goal).abs();
    whole.min_by(|((_, one), _), ((_, other), _)| far(*one).total_cmp(&far(*other))).unwrap_or_default().1
}

fn read(path: &Path) -> Result<Vec<(String, Sample)>> {
    let of = |row: serde_json::Value| -> Result<(String, Sample), RowError> {
        let source = row["group"].as_str().unwrap_or_default().to_owned();
        let messages = serde_json::json!({"messages": row["messages"]});
        Ok((source, forms::sample_of(messages)?))
    };
    let file = File::open(path).with_context(|| path.display().to_string())?;
    let parsed =
        rows::read(BufReader::new(file), Form::Jsonl, of).with_context(|| path.display().to_string())?;
    if let Some(bad) = parsed.bad.first() {
        bail!("{}: {bad}", path.display());
    }
    Ok(parsed.good.into_iter().map(|(_, row)| row).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::federation::turns;

    #[test]
    fn hostile_clients_have_their_share_of_the_turns_too() {
        for seed in 1..=100 {
            let turns = turns(20, 5, seed, 4);
            let mut numbers: Vec<usize> = (0..20).collect();
            numbers.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
            for tenths in 0..=4_u32 {
                let mut hostile = hostile(&numbers, &turns, f64::from(tenths) / 10.0);
                let theirs: u32 = hostile.iter().map(|&number| turns[number]).sum();
                assert_eq!(theirs, 2 * tenths, "seed {seed}: of 20 turns, {turns:?}");
                hostile.sort_unstable();
                hostile.dedup();
                assert_eq!(hostile.len() as u32, 2 * tenths, "seed {seed}");
            }
        }
    }

    #[test]
    fn no_other_choice_of_hostile_clients_is_nearer_to_their_share() {
        for (count, goal, rounds, seed) in (2..=9_usize)
            .flat_map(|count| (1..=count).map(move |goal| (count, goal)))
            .flat_map(|(count, goal)| (1..=6).map(move |rounds| (count, goal, rounds)))
            .flat_map(|(count, goal, rounds)| (1..=5).map(move |seed| (count, goal, rounds, seed)))
        {
            let turns = turns(count, goal, seed, rounds);
            let mut numbers: Vec<usize> = (0..count).collect();
            numbers.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
            for share in (0..=10).map(|tenths| f64::from(tenths) / 10.0) {
                let wanted = f64::from(turns.iter().sum::<u32>()) * share;
                let far = |sum: u32| (f64::from(sum) - wanted).abs();
                let hostile = hostile(&numbers, &turns, share);
                let every = (0..1_u32 << count).filter(|set| set.count_ones() as usize == hostile.len());
                let sums =
                    every.map(|set| (0..count).filter(|at| set >> at & 1 == 1).map(|at| turns[at]).sum());
                let least = sums.map(far).fold(f64::INFINITY, f64::min);
                let theirs = far(hostile.iter().map(|&number| turns[number]).sum());
                assert!(theirs < least + 1e-9, "seed {seed}: {share} of {turns:?}, {hostile:?}");
            }
        }
    }

    #[test]
    fn the_published_runs_hostile_clients_are_who_they_were() {
        // docs/results.md: seeds and rounds of 5 of 20 clients; of the first seed also the ablations' shares.
        let published: [(u64, u64, f64, &[usize]); 7] = [
            (1, 3, 0.1, &[15, 5]),
            (1, 4, 0.1, &[15, 5]),
            (2, 4, 0.1, &[10, 5]),
            (3, 4, 0.1, &[0, 12]),
            (1, 4, 0.2, &[15, 5, 7, 11]),
            (1, 4, 0.3, &[15, 5, 7, 11, 1, 14]),
            (1, 4, 0.4, &[2, 5, 7, 11, 1, 14, 19, 8]),
        ];
        for (seed, rounds, share, expected) in published {
            let turns = turns(20, 5, seed, rounds);
            let mut numbers: Vec<usize> = (0..20).collect();
            numbers.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
            assert_eq!(hostile(&numbers, &turns, share), expected, "seed {seed}, {rounds} rounds, {share}");
        }
    }
}
