//! Diversity of replies, which an overoptimized policy loses first.

use std::collections::HashSet;

use serde::Serialize;

/// A reply as tokens, without the end-of-sequence token.
#[derive(Debug, Clone, Copy)]
pub struct Reply<'a> {
    /// Tokens of the reply.
    pub tokens: &'a [u32],
    /// Whether the reply ended by itself, not at the length limit.
    pub finished: bool,
}

/// Diversity statistics over all replies.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Diversity {
    /// Number of replies.
    pub replies: usize,
    /// Number of distinct tokens divided by the number of tokens.
    pub distinct_1: f64,
    /// Number of distinct bigrams divided by the number of bigrams.
    pub distinct_2: f64,
    /// Number of distinct trigrams divided by the number of trigrams.
    pub distinct_3: f64,
    /// Mean number of tokens per reply.
    pub mean_length: f64,
    /// Fraction of replies truncated by the length limit.
    pub truncated: f64,
    /// Fraction of replies whose tokens are identical to an earlier reply.
    pub duplicates: f64,
}

/// Computes the statistics; all are 0 if there are no replies.
pub fn diversity(replies: &[Reply]) -> Diversity {
    let lists: Vec<&[u32]> = replies.iter().map(|reply| reply.tokens).collect();
    let fraction = |count: usize| count as f64 / replies.len().max(1) as f64;
    let different: HashSet<&[u32]> = lists.iter().copied().collect();
    Diversity {
        replies: replies.len(),
        distinct_1: distinct(&lists, 1),
        distinct_2: distinct(&lists, 2),
        distinct_3: distinct(&lists, 3),
        mean_length: fraction(lists.iter().map(|tokens| tokens.len()).sum()),
        truncated: fraction(replies.iter().filter(|reply| !reply.finished).count()),
        duplicates: fraction(replies.len() - different.len()),
    }
}

/// distinct-n (Li et al. 2016) over all replies together: the number of distinct n-grams divided by the number
/// of n-grams; 0 if there are none. It decreases with the number of replies and their length, so compare
/// only equal numbers of replies of similar length.
pub fn distinct(replies: &[&[u32]], n: usize) -> f64 {
    let n_grams = replies.iter().flat_map(|tokens| tokens.windows(n.max(1)));
    let (mut different, mut all) = (HashSet::new(), 0);
    for n_gram in n_grams {
        different.insert(n_gram);
        all += 1;
    }
    different.len() as f64 / all.max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn n_grams_are_counted_over_all_replies() {
        let check = |replies: &[&[u32]], values: [f64; 3]| {
            let found = [1, 2, 3].map(|n| distinct(replies, n));
            assert_eq!(found, values, "{replies:?}");
        };
        check(&[], [0.0; 3]);
        check(&[&[]], [0.0; 3]);
        check(&[&[7]], [1.0, 0.0, 0.0]);
        check(&[&[1, 2, 3, 4]], [1.0; 3]);
        check(&[&[1, 1, 1, 1]], [0.25, 1.0 / 3.0, 0.5]);
        // An n-gram does not span two replies.
        check(&[&[1, 2], &[1, 2], &[2, 1]], [2.0 / 6.0, 2.0 / 3.0, 0.0]);
    }

    #[test]
    fn replies_are_counted() {
        let reply = |tokens, finished| Reply { tokens, finished };
        let found = diversity(&[
            reply(&[1, 2], true),
            reply(&[1, 2], false),
            reply(&[1, 2], true),
            reply(&[3], true),
        ]);
        assert_eq!((found.replies, found.mean_length), (4, 1.75));
        assert_eq!((found.truncated, found.duplicates), (0.25, 0.5));
        assert_eq!((found.distinct_1, found.distinct_2), (3.0 / 7.0, 1.0 / 3.0));
        let none = diversity(&[]);
        assert_eq!((none.replies, none.mean_length, none.duplicates), (0, 0.0, 0.0));
    }
}
