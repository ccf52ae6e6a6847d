//! Rows taken in turn, round after round.

use quantune_adapters::rng::Stream;

/// All of `count` rows in turn, in another order each time around. Where a run stands needs no state:
/// the order of a round is a function of its number.
#[derive(Debug, Clone)]
pub struct Rounds {
    purpose: &'static str,
    seed: u64,
    shuffled: bool,
    count: usize,
    /// The last round that was asked for, and its order.
    round: Option<(u64, Vec<u32>)>,
}

impl Rounds {
    /// Rows that come as they stand if not `shuffled`.
    pub fn new(purpose: &'static str, seed: u64, shuffled: bool, count: usize) -> Self {
        Self { purpose, seed, shuffled, count, round: None }
    }

    /// The row at a place, counted from 0 over all rounds. Places in turn order each round once.
    pub fn at(&mut self, place: u64) -> usize {
        let (round, place) = (place / self.count as u64, place % self.count as u64);
        let order = match self.round.take() {
            Some((last, order)) if last == round => order,
            _ => {
                let mut order: Vec<u32> = (0..self.count as u32).collect();
                if self.shuffled {
                    Stream::new(self.seed, self.purpose, &[round]).shuffle(&mut order);
                }
                order
            }
        };
        let row = order[place as usize];
        self.round = Some((round, order));
        row as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_round_has_all_rows_and_is_the_same_from_anywhere() {
        let check = |shuffled: bool, count: usize| {
            let new = || Rounds::new("rows", 7, shuffled, count);
            let mut rounds = new();
            let rows: Vec<usize> = (0..3 * count as u64).map(|place| rounds.at(place)).collect();
            for (round, rows) in rows.chunks(count).enumerate() {
                let mut order: Vec<usize> = (0..count).collect();
                if shuffled {
                    Stream::new(7, "rows", &[round as u64]).shuffle(&mut order);
                }
                assert_eq!(rows, order, "round {round} of {count}");
            }
            for (place, &row) in (0..).zip(&rows) {
                assert_eq!(new().at(place), row, "place {place} of {count}");
            }
        };
        check(true, 1);
        check(true, 5);
        check(false, 4);
    }
}
