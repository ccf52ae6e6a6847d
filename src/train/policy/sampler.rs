//! The order in which rows are sampled: all of them in each epoch.

use quantune_adapters::rng::Stream;

/// Samples all of `count` rows in each epoch, shuffled by epoch. It has no state to save: the order of an
/// epoch is a function of its number.
#[derive(Debug, Clone)]
pub(super) struct EpochSampler {
    purpose: &'static str,
    seed: u64,
    shuffled: bool,
    count: usize,
    /// The epoch of the last returned row, and its order.
    epoch: Option<(u64, Vec<u32>)>,
}

impl EpochSampler {
    /// Without `shuffled`, rows are in file order.
    pub(super) fn new(purpose: &'static str, seed: u64, shuffled: bool, count: usize) -> Self {
        Self { purpose, seed, shuffled, count, epoch: None }
    }

    /// The row at a position, counted from 0 over all epochs. With ascending positions each epoch is shuffled
    /// once.
    pub(super) fn row_at(&mut self, place: u64) -> usize {
        let (epoch, place) = (place / self.count as u64, place % self.count as u64);
        let order = match self.epoch.take() {
            Some((last, order)) if last == epoch => order,
            _ => {
                let mut order: Vec<u32> = (0..self.count as u32).collect();
                if self.shuffled {
                    Stream::new(self.seed, self.purpose, &[epoch]).shuffle(&mut order);
                }
                order
            }
        };
        let row = order[place as usize];
        self.epoch = Some((epoch, order));
        row as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_epoch_has_all_rows_in_an_order_that_needs_no_state() {
        let check = |shuffled: bool, count: usize| {
            let new = || EpochSampler::new("rows", 7, shuffled, count);
            let mut sampler = new();
            let rows: Vec<usize> =
                (0..3 * count as u64).map(|place| sampler.row_at(place)).collect();
            for (epoch, rows) in rows.chunks(count).enumerate() {
                let mut order: Vec<usize> = (0..count).collect();
                if shuffled {
                    Stream::new(7, "rows", &[epoch as u64]).shuffle(&mut order);
                }
                assert_eq!(rows, order, "epoch {epoch} of {count}");
            }
            for (place, &row) in (0..).zip(&rows) {
                assert_eq!(new().row_at(place), row, "place {place} of {count}");
            }
        };
        check(true, 1);
        check(true, 5);
        check(false, 4);
    }
}
