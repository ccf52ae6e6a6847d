//! Which source a row comes from, and which of the source's rows it is: pure functions of numbers.

use quantune_adapters::rng::Stream;

/// One, as a share.
const ONE: u64 = 1 << 32;

/// The order in which sources take turns.
///
/// A source gets its share of the rows that the sources before it have left, evenly spread: of the
/// first `n` of these, `n · share` rounded. So any row is found without the rows before it, and after
/// any number `n` of rows the rows of each of K sources differ from `n · weight` by K / 2 at most.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mixture {
    /// For each source its share of what those before it leave, in 2⁻³².
    shares: Vec<u64>,
}

impl Mixture {
    /// From weights above 0.
    pub fn new(weights: &[f64]) -> Self {
        let shares = (0..weights.len()).map(|source| {
            let left: f64 = weights[source..].iter().sum();
            let share = (weights[source] / left * ONE as f64).round() as u64;
            // The last takes all that is left; one that would round to nothing still has its turns.
            if source + 1 == weights.len() { ONE } else { share.clamp(1, ONE) }
        });
        Self { shares: shares.collect() }
    }

    /// The source of a row, and how many rows before this one are the source's too.
    pub fn place(&self, row: u64) -> (usize, u64) {
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

    /// How many of the first rows each source has.
    pub fn counts(&self, rows: u64) -> Vec<u64> {
        let mut left = rows;
        let counts = self.shares.iter().map(|&share| {
            let count = taken(left, share);
            left -= count;
            count
        });
        counts.collect()
    }
}

/// `rows · share`, rounded. In integers, so that a further row adds one at most.
fn taken(rows: u64, share: u64) -> u64 {
    ((u128::from(rows) * u128::from(share) + u128::from(ONE / 2)) >> 32) as u64
}

/// A permutation of `0..n` that needs no memory: a Feistel network over the next power of four, in
/// which whatever falls outside is sent round again (cycle walking, Black and Rogaway 2002).
#[derive(Debug, Clone)]
pub(super) struct Permutation {
    n: u64,
    /// Bits of half a number.
    half: u32,
    keys: [u64; 6],
}

impl Permutation {
    /// One of `n` numbers, at least one, by the numbers of a stream.
    pub fn new(n: u64, random: &mut Stream) -> Self {
        let bits = u64::BITS - (n - 1).leading_zeros();
        Self { n, half: bits.div_ceil(2).max(1), keys: std::array::from_fn(|_| random.next_u64()) }
    }

    /// Where `i`, below `n`, goes.
    pub fn of(&self, i: u64) -> u64 {
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
                        // Half a source each, and what rounding the shares to 2⁻³² adds.
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
