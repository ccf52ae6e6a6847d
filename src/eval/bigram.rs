//! A bigram model, as a baseline that a language model has to beat.

use std::collections::HashMap;

/// Counts of tokens and of pairs, smoothed after Witten and Bell (1991): the probability mass of unseen pairs
/// grows with the number of distinct tokens that followed the first token.
#[derive(Debug, Clone)]
pub(crate) struct Bigram {
    vocab_size: usize,
    tokens: HashMap<u32, u64>,
    total: u64,
    pairs: HashMap<(u32, u32), u64>,
    /// For each token: how many tokens followed it, and how many distinct ones.
    followed: HashMap<u32, (u64, u64)>,
}

impl Bigram {
    /// An untrained model over `vocab_size` tokens.
    pub(crate) fn new(vocab_size: usize) -> Self {
        Self {
            vocab_size,
            tokens: HashMap::new(),
            total: 0,
            pairs: HashMap::new(),
            followed: HashMap::new(),
        }
    }

    /// Counts the tokens and pairs of a text.
    pub(crate) fn learn(&mut self, tokens: &[u32]) {
        for &token in tokens {
            *self.tokens.entry(token).or_default() += 1;
            self.total += 1;
        }
        for pair in tokens.windows(2) {
            let count = self.pairs.entry((pair[0], pair[1])).or_default();
            *count += 1;
            let (times, kinds) = self.followed.entry(pair[0]).or_default();
            *times += 1;
            *kinds += u64::from(*count == 1);
        }
    }

    /// Summed negative log-likelihood, in nats, of all tokens but the first, each given the previous one.
    pub(crate) fn nats(&self, tokens: &[u32]) -> f64 {
        tokens.windows(2).map(|pair| -self.probability(pair[0], pair[1]).ln()).sum()
    }

    fn probability(&self, before: u32, token: u32) -> f64 {
        let kinds = self.tokens.len() as f64;
        let seen = self.tokens.get(&token).copied().unwrap_or_default() as f64;
        let uniform = 1.0 / self.vocab_size as f64;
        let alone = (seen + kinds * uniform) / (self.total as f64 + kinds).max(1.0);
        let alone = if self.total == 0 { uniform } else { alone };
        let Some(&(times, kinds)) = self.followed.get(&before) else { return alone };
        let (times, kinds) = (times as f64, kinds as f64);
        let pair = self.pairs.get(&(before, token)).copied().unwrap_or_default() as f64;
        (pair + kinds * alone) / (times + kinds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probabilities_sum_to_one_and_follow_the_counts() {
        let mut model = Bigram::new(5);
        assert!((model.nats(&[0, 1]) - 5f64.ln()).abs() < 1e-12);
        model.learn(&[0, 1, 0, 1, 0, 2, 3]);
        for before in 0..5 {
            let sum: f64 = (0..5).map(|token| model.probability(before, token)).sum();
            assert!((sum - 1.0).abs() < 1e-12, "{before}: {sum}");
        }
        assert!(model.probability(0, 1) > model.probability(0, 2));
        assert!(model.probability(0, 2) > model.probability(0, 3));
        assert!(model.probability(4, 4) > 0.0); // neither was seen in training
    }
}
