//! The rows of a batch as ranges of its tokens, with the prefix that each attends to.

use std::ops::Range;

/// A row of a batch: a range of its tokens, each of which attends to those of the row up to itself.
///
/// Rows that continue the same prompt need not repeat it: the prompt is a row, and each of the others has
/// that row's tokens as its `prefix`. The result equals that of rows of prompt and continuation, if all of
/// them use the same adapters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// The tokens of the row.
    pub tokens: Range<usize>,
    /// All tokens of an earlier row without a prefix, which precede its own; empty if it has no prefix.
    pub prefix: Range<usize>,
}

impl Segment {
    /// A row without a prefix.
    pub fn whole(tokens: Range<usize>) -> Self {
        Self { tokens, prefix: 0..0 }
    }

    /// The number of tokens, without the prefix.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether it has no tokens besides the prefix.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Number of positions: those of the prefix, then its own.
    pub(crate) fn positions(&self) -> usize {
        self.prefix.len() + self.tokens.len()
    }

    /// The token at a position.
    pub(crate) fn token(&self, position: usize) -> usize {
        match position.checked_sub(self.prefix.len()) {
            Some(own) => self.tokens.start + own,
            None => self.prefix.start + position,
        }
    }
}

/// The first error in the rows of `n` tokens, if any: rows must be contiguous from 0 to `n`, and a
/// prefix must be an earlier row without a prefix.
pub(crate) fn fault(segments: &[Segment], n: usize) -> Option<String> {
    let mut end = 0;
    for (i, segment) in segments.iter().enumerate() {
        let Segment { tokens, prefix } = segment;
        if tokens.start != end || tokens.end < end {
            return Some(format!("row {i} is {tokens:?}, expected a range that begins at {end}"));
        }
        end = tokens.end;
        let is_whole = |row: &Segment| row.prefix.is_empty() && row.tokens == *prefix;
        if !prefix.is_empty() && !segments[..i].iter().rev().any(is_whole) {
            return Some(format!(
                "the prefix {prefix:?} of row {i} is not an earlier row without a prefix"
            ));
        }
    }
    (end != n).then(|| format!("the rows end at {end}, expected {n} tokens"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_must_partition_the_tokens_and_prefixes_must_be_earlier_whole_rows() {
        let row = |tokens, prefix| Segment { tokens, prefix };
        let cases: &[(&[Segment], bool)] = &[
            (&[row(0..3, 0..0), row(3..3, 0..0), row(3..6, 2..2)], true),
            (&[row(0..2, 0..0), row(2..4, 0..2), row(4..6, 0..2)], true),
            (&[row(0..5, 0..0)], false),
            (&[row(0..7, 0..0)], false),
            (&[row(0..3, 0..0), row(4..6, 0..0)], false),
            (&[row(0..2, 0..0), row(2..6, 0..1)], false), // a part of a row
            (&[row(0..2, 0..0), row(2..4, 0..2), row(4..6, 2..4)], false), // a row with a prefix
            (&[row(0..2, 2..6), row(2..6, 0..0)], false), // a row behind
        ];
        for (rows, good) in cases {
            assert_eq!(fault(rows, 6).is_none(), *good, "{rows:?}: {:?}", fault(rows, 6));
        }
        let row = row(4..6, 0..2);
        let tokens: Vec<usize> = (0..row.positions()).map(|position| row.token(position)).collect();
        assert_eq!(tokens, [0, 1, 4, 5]);
    }
}
