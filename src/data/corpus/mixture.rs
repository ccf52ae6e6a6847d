//! Which source a row comes from, and which row of the source it is, as pure functions of the row index.

use quantune_adapters::rng::Stream;

/// The fraction 1, in units of 2⁻³².
const ONE: u64 = 1 << 32;

/// The interleaving of sources.
///
/// A source gets a fixed fraction of the rows that the sources before it leave, evenly spread: of the first
/// `n` of these, `n · share` rounded. So the source of any row is computed without the rows before it, and
/// after any number `n` of rows, the count of each of K sources differs from `n · weight` by at most K / 2.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mixture {
    /// For each source its fraction of the rows that the sources before it leave, in units of 2⁻³².
    shares: Vec<u64>,
}

impl Mixture {
    /// A mixture with these weights, which are above 0.
    pub(crate) fn new(weights: &[f64]) -> Self {
        let shares = (0..weights.len()).map(|source| {
            let left: f64 = weights[source..].iter().sum();
            let share = (weights[source] / left * ONE as f64).round() as u64;
            // The last source takes all rows that are left. A share that rounds to 0 becomes the smallest.
            if source + 1 == weights.len() { ONE } else { share.clamp(1, ONE) }
        });
        Self { shares: shares.collect() }
    }

    /// The source of a row, and how many earlier rows have the same source.
    pub(crate) fn place(&self, row: u64) -> (usize, u64) {
        let mut left = row;
        for (source, &share) in self.shares.iter().enumerate() {
            let before = taken(left, share);
            if taken(left + 1, share) > before {
                return (source, before);
            }
            left -= before;
        }
        unreachable!("the last source takes every row that is left")
    }

    /// How many of the first `rows` rows come from each source.
    pub(crate) fn counts(&self, rows: u64) -> Vec<u64> {
        let mut left = rows;
        let counts = self.shares.iter().map(|&share| {
            let count = taken(left, share);
            left -= count;
            count
        });
        counts.collect()
    }
}

/// `rows · share`, rounded. In integer arithmetic, so that one more row adds at most one.
fn taken(rows: u64, share: u64) -> u64 {
    ((u128::from(rows) * u128::from(share) + u128::from(ONE / 2)) >> 32) as u64
}

/// A permutation of `0..n` in constant memory: a Feistel network over the next power of four, applied again
/// while the result is outside of `0..n` (cycle walking, Black and Rogaway 2002).
#[derive(Debug, Clone)]
pub(super) struct Permutation {
    n: u64,
    /// Half the number of bits.
    half: u32,
    keys: [u64; 6],
}

impl Permutation {
    /// A random permutation of `0..n`, for `n` of at least 1.
    pub(crate) fn new(n: u64, random: &mut Stream) -> Self {
        let bits = u64::BITS - (n - 1).leading_zeros();
        Self { n, half: bits.div_ceil(2).max(1), keys: std::array::from_fn(|_| random.next_u64()) }
    }

    /// The image of `i`, which is below `n`.
    pub(crate) fn of(&self, i: u64) -> u64 {
        let mut place = self.round_trip(i);
        while place >= self.n {
            place = self.round_trip(place);
        }
        place
    }

    fn round_trip(&self, i: u64) -> u64 {
        let mask = (1u64 << self.half) - 1;
        let (mut left, mut right) = (i >> self.half, i & mask);
        for &key in &self.keys {
            let mixed = Stream::new(key, "", &[right]).next_u64();
            (left, right) = (right, left ^ (mixed & mask));
        }
        left << self.half | right
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn sources_have_their_shares_at_any_time(
            weights in proptest::collection::vec(1e-6f64..10.0, 1..9),
            far in 0u64..1 << 40,
        ) {
            let mixture = Mixture::new(&weights);
            let sum: f64 = weights.iter().sum();
            for start in [0, far] {
                let mut counts = mixture.counts(start);
                for row in start..start + 300 {
                    let (source, before) = mixture.place(row);
                    prop_assert_eq!(counts[source], before);
                    counts[source] += 1;
                    let rows = row + 1;
                    prop_assert_eq!(&counts, &mixture.counts(rows));
                    prop_assert_eq!(counts.iter().sum::<u64>(), rows);
                    for (&count, weight) in counts.iter().zip(&weights) {
                        let off = (count as f64 - rows as f64 * weight / sum).abs();
                        // 0.5 per source, plus the error of rounding shares to 2⁻³².
                        let bound = weights.len() as f64 * (0.5 + rows as f64 / ONE as f64);
                        prop_assert!(off <= bound, "{count} of {rows} rows for {weight} of {sum}");
                    }
                }
            }
        }

        #[test]
        fn a_permutation_has_every_number_once(n in 1u64..3000, seed: u64) {
            let permutation = Permutation::new(n, &mut Stream::new(seed, "test", &[]));
            let mut places: Vec<u64> = (0..n).map(|i| permutation.of(i)).collect();
            if n > 20 {
                prop_assert!(!places.is_sorted());
            }
            places.sort_unstable();
            prop_assert!(places.into_iter().eq(0..n));
        }
    }

    #[test]
    fn large_permutations_are_spread_out() {
        let n = 10_000_000_000;
        let permutation = Permutation::new(n, &mut Stream::new(1, "test", &[]));
        let mean = (0..1000).map(|i| permutation.of(i) as f64).sum::<f64>() / 1000.0 / n as f64;
        assert!((mean - 0.5).abs() < 0.05, "{mean}");
    }
}
