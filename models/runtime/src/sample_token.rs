//! Chooses the next token from a row of logits. Pure: the random numbers come from the caller, `generate.rs`.

use rand::Rng;

/// A chosen token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Choice {
    pub(crate) token: u32,
    /// Log-probability under the network's own distribution (temperature 1, nothing cut off).
    pub(crate) logprob: f32,
}

/// `None` when a logit is not a number, or all are minus infinity: the network's output is unusable.
///
/// Temperature 0 takes the most probable token, the lowest id among equals. Otherwise the smallest set of tokens
/// whose probability reaches `top_p` is drawn from (nucleus sampling, Holtzman et al. 2020).
pub(crate) fn choose(logits: &[f32], temperature: f32, top_p: f32, random: &mut impl Rng) -> Option<Choice> {
    let normalizer = log_sum_exp(logits)?;
    let token = if temperature > 0.0 { draw(logits, temperature, top_p, random) } else { argmax(logits) };
    Some(Choice { token: token as u32, logprob: logits[token] - normalizer })
}

/// The log-probabilities of some tokens under a row of logits; `None` when the row is unusable or an id is outside it.
pub(crate) fn logprobs(logits: &[f32], tokens: &[u32]) -> Option<Vec<f32>> {
    let normalizer = log_sum_exp(logits)?;
    tokens.iter().map(|&token| Some(logits.get(token as usize)? - normalizer)).collect()
}

/// The most probable tokens, the best first, the lowest id first among equals; `None` when the row is unusable.
pub(crate) fn best(logits: &[f32], count: usize) -> Option<Vec<Choice>> {
    let normalizer = log_sum_exp(logits)?;
    let order = |left: &usize, right: &usize| logits[*right].total_cmp(&logits[*left]).then(left.cmp(right));
    let mut tokens: Vec<usize> = (0..logits.len()).collect();
    if let Some(last) = count.checked_sub(1).filter(|last| *last < tokens.len()) {
        tokens.select_nth_unstable_by(last, order);
    }
    tokens.truncate(count);
    tokens.sort_by(order);
    let choice = |token| Choice { token: token as u32, logprob: logits[token] - normalizer };
    Some(tokens.into_iter().map(choice).collect())
}

fn log_sum_exp(logits: &[f32]) -> Option<f32> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    // f32::max ignores NaN, the sum does not.
    let sum: f32 = logits.iter().map(|logit| (logit - max).exp()).sum();
    let normalizer = max + sum.ln();
    normalizer.is_finite().then_some(normalizer)
}

fn argmax(logits: &[f32]) -> usize {
    let mut best = 0;
    for (index, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = index;
        }
    }
    best
}

fn draw(logits: &[f32], temperature: f32, top_p: f32, random: &mut impl Rng) -> usize {
    let best = argmax(logits);
    let weight = |logit: &f32| ((logit - logits[best]) / temperature).exp();
    let mut nucleus: Vec<(usize, f32)> = logits.iter().map(weight).enumerate().collect();
    let total: f32 = nucleus.iter().map(|(_, weight)| weight).sum();
    for (_, weight) in &mut nucleus {
        *weight /= total;
    }
    if top_p < 1.0 {
        // Tokens below this share cannot be in the nucleus unless those above already reach top_p.
        let floor = (1.0 - top_p) / (logits.len().max(2) - 1) as f32;
        nucleus.retain(|(_, share)| *share >= floor);
        nucleus.sort_by(|left, right| right.1.total_cmp(&left.1).then(left.0.cmp(&right.0)));
        let mut reached = 0.0;
        let within = nucleus.iter().position(|(_, share)| {
            reached += share;
            reached >= top_p
        });
        nucleus.truncate(within.map_or(nucleus.len(), |last| last + 1).max(1));
    }
    let mass: f32 = nucleus.iter().map(|(_, share)| share).sum();
    let mut left = random.random::<f32>() * mass;
    for (token, share) in &nucleus {
        left -= share;
        if left < 0.0 {
            return *token;
        }
    }
    nucleus.last().map_or(best, |(token, _)| *token)
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    use super::*;

    const LOGITS: [f32; 4] = [1.0, 3.0, 2.0, -1.0];

    fn shares(temperature: f32, top_p: f32) -> [f32; 4] {
        let mut random = ChaCha8Rng::seed_from_u64(7);
        let mut counts = [0.0; 4];
        for _ in 0..20_000 {
            counts[choose(&LOGITS, temperature, top_p, &mut random).unwrap().token as usize] +=
                1.0 / 20_000.0;
        }
        counts
    }

    #[test]
    fn greedy_takes_the_best_with_its_true_logprob() {
        let choice = choose(&LOGITS, 0.0, 1.0, &mut ChaCha8Rng::seed_from_u64(0)).unwrap();
        assert_eq!(choice.token, 1);
        // ln softmax([1, 3, 2, -1])[1], by numpy.
        assert!((choice.logprob - -0.419_716_65).abs() < 1e-5, "{}", choice.logprob);
    }

    #[test]
    fn sampling_follows_the_tempered_distribution() {
        // softmax([1, 3, 2, -1] / 2) = 0.1815, 0.4933, 0.2992, 0.0668 would be temperature 2: computed by hand below.
        let weights: Vec<f32> = LOGITS.iter().map(|logit| (logit / 2.0).exp()).collect();
        let total: f32 = weights.iter().sum();
        for (got, weight) in shares(2.0, 1.0).iter().zip(&weights) {
            assert!((got - weight / total).abs() < 0.015, "{got} {}", weight / total);
        }
    }

    #[test]
    fn nucleus_cuts_the_tail() {
        // Shares at temperature 1: 0.0889, 0.6569, 0.2417, 0.0120. Two tokens reach 0.85.
        let counts = shares(1.0, 0.85);
        assert!(counts[0] == 0.0 && counts[3] == 0.0, "{counts:?}");
        assert!((counts[1] - 0.731).abs() < 0.015, "{counts:?}");
    }

    #[test]
    fn the_best_come_in_order_and_no_more_than_there_are() {
        let tokens =
            |count| best(&LOGITS, count).unwrap().iter().map(|choice| choice.token).collect::<Vec<_>>();
        assert_eq!(tokens(2), [1, 2]);
        assert_eq!((tokens(0), tokens(9)), (vec![], vec![1, 2, 0, 3]));
        assert!((best(&LOGITS, 1).unwrap()[0].logprob - -0.419_716_65).abs() < 1e-5);
        assert_eq!(
            best(&[2.0, 5.0, 5.0], 2).unwrap().iter().map(|one| one.token).collect::<Vec<_>>(),
            [1, 2]
        );
        assert_eq!(best(&[f32::NAN], 1), None);
    }

    #[test]
    fn same_seed_same_tokens() {
        let run = || {
            let mut random = ChaCha8Rng::seed_from_u64(3);
            (0..50).map(|_| choose(&LOGITS, 1.0, 1.0, &mut random).unwrap().token).collect::<Vec<_>>()
        };
        assert_eq!(run(), run());
    }

    #[test]
    fn unusable_logits_are_refused() {
        let mut random = ChaCha8Rng::seed_from_u64(0);
        assert_eq!(choose(&[1.0, f32::NAN], 0.0, 1.0, &mut random), None);
        assert_eq!(choose(&[f32::NEG_INFINITY; 3], 1.0, 1.0, &mut random), None);
        assert_eq!(logprobs(&LOGITS, &[9]), None);
    }
}
