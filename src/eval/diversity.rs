//! How different replies are from one another: what a policy that was pushed too far loses first.

use std::collections::HashSet;

use serde::Serialize;

/// A reply as tokens, without the end-of-sequence token.
#[derive(Debug, Clone, Copy)]
pub struct Reply<'a> {
    /// Its tokens.
    pub tokens: &'a [u32],
    /// Whether it ended of itself, not by the limit.
    pub finished: bool,
}

/// What is counted over all replies.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Diversity {
    /// Replies.
    pub replies: usize,
    /// Of all tokens the share that are different.
    pub distinct_1: f64,
    /// Of all pairs of neighbouring tokens the share that are different.
    pub distinct_2: f64,
    /// Of all triples the share that are different.
    pub distinct_3: f64,
    /// Tokens of a reply.
    pub mean_length: f64,
    /// The share of replies cut off by the limit.
    pub truncated: f64,
    /// The share of replies that an earlier one already is, token by token.
    pub duplicates: f64,
}

/// Counts over replies; all 0 if there are none.
pub fn diversity(replies: &[Reply]) -> Diversity {
    let lists: Vec<&[u32]> = replies.iter().map(|reply| reply.tokens).collect();
    let share = |count: usize| count as f64 / replies.len().max(1) as f64;
    let different: HashSet<&[u32]> = lists.iter().copied().collect();
    Diversity {
        replies: replies.len(),
        distinct_1: distinct(&lists, 1),
        distinct_2: distinct(&lists, 2),
        distinct_3: distinct(&lists, 3),
        mean_length: share(lists.iter().map(|tokens| tokens.len()).sum()),
        truncated: share(replies.iter().filter(|reply| !reply.finished).count()),
        duplicates: share(replies.len() - different.len()),
    }
}

/// distinct-n (Li et al. 2016) over all replies together: different runs of `n` tokens by all there
/// are; 0 if there are none. It falls with the number of replies and their length: compare like
/// with like.
pub fn distinct(replies: &[&[u32]], n: usize) -> f64 {
    let runs = replies.iter().flat_map(|tokens| tokens.windows(n.max(1)));
    let (mut different, mut all) = (HashSet::new(), 0);
    for run in runs {
        different.insert(run);
        all += 1;
    }
    different.len() as f64 / all.max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_counted_over_all_replies() {
        let check = |replies: &[&[u32]], shares: [f64; 3]| {
            let found = [1, 2, 3].map(|n| distinct(replies, n));
            assert_eq!(found, shares, "{replies:?}");
        };
        check(&[], [0.0; 3]);
        check(&[&[]], [0.0; 3]);
        check(&[&[7]], [1.0, 0.0, 0.0]);
        check(&[&[1, 2, 3, 4]], [1.0; 3]);
        check(&[&[1, 1, 1, 1]], [0.25, 1.0 / 3.0, 0.5]);
        // A run does not go over the end of a reply.
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
