//! The order of an epoch, and the packed rows of a micro-batch.

use std::collections::BTreeSet;
use std::ops::Range;

use quantune_adapters::rng::Stream;

use super::{Example, Examples};
use crate::ops::Segment;

/// Settings that the order of an epoch depends on. Names are transformers' and TRL's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EpochSettings {
    /// Seed of the run.
    pub seed: u64,
    /// Index of the epoch, from 0.
    pub epoch: u64,
    /// Whether the rows are shuffled each epoch, or kept in file order.
    pub shuffle: bool,
    /// Whether several examples are packed into one bin.
    pub packing: bool,
    /// Maximum number of tokens of a packed bin. A longer example gets a separate bin.
    pub max_length: usize,
    /// Bins per micro-batch; 0 counts as 1.
    pub batch_size: usize,
    /// Micro-batches per optimizer step; 0 counts as 1.
    pub gradient_accumulation_steps: usize,
}

/// The order of one epoch: micro-batches of bins of row indices. Takes at most eight bytes per row,
/// since a file may have many.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EpochPlan {
    /// The row indices of all bins, concatenated.
    rows: Vec<u32>,
    /// End of each bin in `rows`; `None` if each row is a separate bin.
    ends: Option<Vec<u32>>,
    batch_size: usize,
    gradient_accumulation_steps: usize,
}

impl EpochPlan {
    /// Orders `examples` for one epoch; each is in exactly one bin.
    pub fn new(examples: &[Example], settings: &EpochSettings) -> Self {
        let rows = (0..examples.len() as u32).collect();
        Self::of(rows, |index| examples[index].tokens.len(), settings)
    }

    /// Orders the given rows for one epoch; a row may occur several times. `length` gives the number of
    /// tokens of a row.
    pub fn of(rows: Vec<u32>, length: impl Fn(usize) -> usize, settings: &EpochSettings) -> Self {
        let &EpochSettings { seed, epoch, shuffle, packing, .. } = settings;
        let mut order = rows;
        if shuffle {
            Stream::new(seed, "shuffle", &[epoch]).shuffle(&mut order);
        }
        let (rows, ends) = match packing {
            true => {
                let length = |row: u32| length(row as usize);
                let shuffled = shuffle.then(|| Stream::new(seed, "pack", &[epoch]));
                let (rows, ends) = pack(&order, settings.max_length, length, shuffled);
                (rows, Some(ends))
            }
            false => (order, None),
        };
        Self {
            rows,
            ends,
            batch_size: settings.batch_size.max(1),
            gradient_accumulation_steps: settings.gradient_accumulation_steps.max(1),
        }
    }

    /// Number of bins.
    pub fn bins(&self) -> usize {
        self.ends.as_ref().map_or(self.rows.len(), Vec::len)
    }

    /// The row indices of a bin.
    ///
    /// # Panics
    /// If `bin` is out of range.
    pub fn bin(&self, bin: usize) -> Vec<usize> {
        let rows = match &self.ends {
            Some(ends) => {
                let start = bin.checked_sub(1).map_or(0, |before| ends[before]);
                &self.rows[start as usize..ends[bin] as usize]
            }
            None => &self.rows[bin..bin + 1],
        };
        rows.iter().map(|&row| row as usize).collect()
    }

    /// Number of micro-batches.
    pub fn micro_batches(&self) -> usize {
        self.bins().div_ceil(self.batch_size.max(1))
    }

    /// Number of optimizer steps of the epoch. As in transformers, a final step over fewer micro-batches
    /// counts.
    ///
    /// It is the same for every epoch and seed, since the number of bins depends only on lengths.
    pub fn steps(&self) -> usize {
        self.micro_batches().div_ceil(self.gradient_accumulation_steps.max(1))
    }

    /// The micro-batches of a step, each a list of bins; empty after the last step.
    pub fn step(&self, step: usize) -> Vec<Vec<Vec<usize>>> {
        let first = step * self.gradient_accumulation_steps;
        let last = self.micro_batches().min(first + self.gradient_accumulation_steps);
        let bins = |micro: usize| {
            let first = micro * self.batch_size;
            (first..self.bins().min(first + self.batch_size)).map(|bin| self.bin(bin)).collect()
        };
        (first..last).map(bins).collect()
    }
}

/// Best-fit decreasing bin packing: rows are placed longest first, each into the fullest bin that still
/// has room. Rows of equal length are placed in the given order, so the packing depends on the order.
/// Within a bin the given order is kept; bins are ordered by their first row, unless `shuffled`. Returns
/// the rows, bin after bin, and the end of each bin.
///
/// The number of bins does not depend on the order: the free room in the bins after each row follows from
/// the lengths so far, and rows are placed longest first in any case.
fn pack(
    order: &[u32],
    max_length: usize,
    length: impl Fn(u32) -> usize,
    shuffled: Option<Stream>,
) -> (Vec<u32>, Vec<u32>) {
    let mut by_length: Vec<u32> = (0..order.len() as u32).collect(); // places in `order`
    by_length.sort_by_cached_key(|&place| std::cmp::Reverse(length(order[place as usize]) as u32));
    let mut bin_of = vec![0; order.len()]; // of each place
    let mut bins: u32 = 0;
    let mut free: BTreeSet<(u32, u32)> = BTreeSet::new(); // (tokens left, bin)
    for place in by_length {
        let needed = length(order[place as usize]) as u32;
        let best = free.range((needed, 0)..).next().copied();
        let (left, bin) = best.unwrap_or_else(|| {
            bins += 1;
            (needed.max(max_length.try_into().unwrap_or(u32::MAX)), bins - 1)
        });
        free.remove(&(left, bin));
        bin_of[place as usize] = bin;
        if left > needed {
            free.insert((left - needed, bin));
        }
    }
    drop(free);

    // Order of the bins by their first row.
    const NONE: u32 = u32::MAX;
    let mut found = Vec::with_capacity(bins as usize);
    let mut rank = vec![NONE; bins as usize];
    for &bin in &bin_of {
        if rank[bin as usize] == NONE {
            rank[bin as usize] = found.len() as u32;
            found.push(bin);
        }
    }
    if let Some(mut stream) = shuffled {
        stream.shuffle(&mut found);
    }
    for (place, &bin) in (0..).zip(&found) {
        rank[bin as usize] = place;
    }
    drop(found);
    // Counting sort: count rows per bin, take prefix sums, then place each row.
    let mut ends = vec![0u32; bins as usize];
    bin_of.iter().for_each(|&bin| ends[rank[bin as usize] as usize] += 1);
    let mut sum = 0;
    for end in &mut ends {
        (*end, sum) = (sum, sum + *end);
    }
    let mut rows = vec![0; order.len()];
    for (&bin, &row) in bin_of.iter().zip(order) {
        let end = &mut ends[rank[bin as usize] as usize];
        rows[*end as usize] = row;
        *end += 1;
    }
    (rows, ends)
}

/// A micro-batch of examples concatenated into N tokens, without padding.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Batch {
    /// Token ids, `(N)`.
    pub tokens: Vec<u32>,
    /// Position of each token in its example, from 0, `(N)`; those of a response continue after its
    /// prompt.
    pub positions: Vec<u32>,
    /// Token range of each row. Attention does not cross rows, except from a response to its prompt.
    pub segments: Vec<Segment>,
    /// For each learned token the index, in N, of the hidden state that predicts it, and its id.
    pub targets: Vec<(u32, u32)>,
    /// For each example or response the index, in N, of its last token, where a score head reads.
    pub ends: Vec<u32>,
    /// For each example or response its range in `targets`.
    pub spans: Vec<Range<usize>>,
    /// For each token the row number of its example in the file and its position in the row, `(N)`. They
    /// key the random numbers, which therefore do not depend on batching. The bits above the lowest 40 of
    /// the row number hold the index of the response in its group, counted from 1.
    pub keys: Vec<(u64, u32)>,
}

impl Batch {
    /// Concatenates the examples of `bins`.
    ///
    /// # Panics
    /// If an index is out of range, because the plan was made for other examples.
    pub fn new(examples: &[Example], bins: &[Vec<usize>]) -> Self {
        let mut batch = Self::default();
        for example in bins.iter().flatten().map(|&i| &examples[i]) {
            batch.push(example);
        }
        batch
    }

    /// Concatenates the examples of `bins` from a row store.
    ///
    /// # Panics
    /// As [`Batch::new`].
    pub fn gather(examples: &Examples, bins: &[Vec<usize>]) -> Self {
        let mut batch = Self::default();
        for &index in bins.iter().flatten() {
            batch.push(&examples.get(index));
        }
        batch
    }

    /// Number of target tokens, which a sum of losses is divided by.
    pub fn count(&self) -> usize {
        self.targets.len()
    }

    /// Appends the tokens of a prompt to the targets; returns how many they are.
    pub fn learn_prompt(&mut self, prompt: Range<usize>) -> usize {
        let targets = prompt.clone().zip(&self.tokens[prompt]).skip(1);
        let targets: Vec<(u32, u32)> = targets.map(|(row, &t)| (row as u32 - 1, t)).collect();
        self.targets.extend(&targets);
        targets.len()
    }

    fn push(&mut self, example: &Example) {
        let (start, first) = (self.tokens.len(), self.targets.len());
        self.segments.push(Segment::whole(start..start + example.tokens.len()));
        self.tokens.extend(&example.tokens);
        for (i, (&token, &learned)) in example.tokens.iter().zip(&example.learned).enumerate() {
            self.positions.push(i as u32);
            self.keys.push((example.row, example.start + i as u32));
            if learned && i > 0 {
                self.targets.push(((start + i - 1) as u32, token));
            }
        }
        self.ends.push(self.tokens.len().saturating_sub(1) as u32);
        self.spans.push(first..self.targets.len());
    }

    /// Appends a row of packed documents: the inputs are all tokens of `row` but the last, and the target
    /// of each is the next token, if that is `learned`. A token that `begins` a document starts a new
    /// segment, with positions from 0. Random numbers are keyed by `key` and the position in the row.
    pub fn push_packed(
        &mut self,
        row: &[u32],
        key: u64,
        begins: impl Fn(u32) -> bool,
        learned: impl Fn(u32) -> bool,
    ) {
        let Some((_, inputs)) = row.split_last() else { return };
        let mut starts: Vec<usize> = (1..inputs.len()).filter(|&i| begins(inputs[i])).collect();
        starts.insert(0, 0);
        starts.push(inputs.len());
        for segment in starts.windows(2) {
            let (start, first) = (self.tokens.len(), self.targets.len());
            for place in segment[0]..segment[1] {
                let next = row[place + 1];
                if learned(next) {
                    self.targets.push((self.tokens.len() as u32, next));
                }
                self.tokens.push(inputs[place]);
                self.positions.push((place - segment[0]) as u32);
                self.keys.push((key, place as u32));
            }
            self.segments.push(Segment::whole(start..self.tokens.len()));
            self.ends.push(self.tokens.len().saturating_sub(1) as u32);
            self.spans.push(first..self.targets.len());
        }
    }

    /// Appends a prompt once, followed by each of its `responses`; each response attends to the prompt as
    /// if it followed its own copy. `key` is the row number of the prompt in the file, below 2⁴⁰.
    ///
    /// Every token of a response is a target; the first is predicted by the last token of the prompt, so
    /// several targets may share one hidden state. Without a prompt, nothing predicts the first token. An
    /// empty response has no targets, and its end is the end of the prompt.
    ///
    /// # Panics
    /// If the prompt and a response are both empty.
    pub fn push_group(&mut self, prompt: &[u32], responses: &[&[u32]], key: u64) {
        let prefix = self.tokens.len()..self.tokens.len() + prompt.len();
        if !prompt.is_empty() {
            self.segments.push(Segment::whole(prefix.clone()));
            self.tokens.extend(prompt);
            self.positions.extend(0..prompt.len() as u32);
            self.keys.extend((0..prompt.len() as u32).map(|place| (key, place)));
        }
        for (i, &response) in (1u64..).zip(responses) {
            assert!(!(prompt.is_empty() && response.is_empty()), "neither prompt nor response");
            let (start, first) = (self.tokens.len(), self.targets.len());
            let tokens = start..start + response.len();
            self.segments.push(Segment { tokens: tokens.clone(), prefix: prefix.clone() });
            self.tokens.extend(response);
            for (place, (row, &token)) in (prompt.len()..).zip(tokens.zip(response)) {
                self.positions.push(place as u32);
                self.keys.push((key | i << 40, place as u32));
                let predicted_by = if row > start { Some(row - 1) } else { prefix.clone().last() };
                self.targets.extend(predicted_by.map(|by| (by as u32, token)));
            }
            let end = if response.is_empty() { prefix.end } else { self.tokens.len() };
            self.ends.push(end as u32 - 1);
            self.spans.push(first..self.targets.len());
        }
    }
}
