//! Data files with weights, and the rows of each that an epoch uses.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use quantune_adapters::rng::Stream;
use serde::{Deserialize, Serialize};

/// A data file on the command line: `PATH`, or `PATH=WEIGHT` to use each row WEIGHT times per epoch on
/// average, such as 2 or 0.5.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DataFile {
    /// The file.
    pub path: PathBuf,
    /// How often each row is used per epoch, on average; above 0.
    pub weight: f64,
}

impl FromStr for DataFile {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some((path, weight)) = text.rsplit_once('=')
            && let Ok(weight) = weight.parse::<f64>()
            && !std::path::Path::new(text).exists()
        {
            return match weight.is_finite() && weight > 0.0 && !path.is_empty() {
                true => Ok(Self { path: path.into(), weight }),
                false => Err(format!("{text:?}: needed PATH or PATH=WEIGHT, the weight above 0")),
            };
        }
        Ok(text.into()) // a file name may contain `=`
    }
}

impl From<&str> for DataFile {
    fn from(path: &str) -> Self {
        PathBuf::from(path).into()
    }
}

impl From<PathBuf> for DataFile {
    fn from(path: PathBuf) -> Self {
        Self { path, weight: 1.0 }
    }
}

impl TryFrom<String> for DataFile {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<DataFile> for String {
    fn from(file: DataFile) -> Self {
        file.to_string()
    }
}

impl fmt::Display for DataFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.weight == 1.0 {
            true => write!(f, "{}", self.path.display()),
            false => write!(f, "{}={}", self.path.display(), self.weight),
        }
    }
}

/// The examples that an epoch uses, in order, as indices into the concatenation of all files. `files` gives
/// the number of examples and the weight of each file.
///
/// The examples of a file are used in passes; each pass has every example once, in a different order. An
/// epoch takes `count · weight` examples, rounded, starting where the previous epoch ended. So with weight
/// 0.5, two epochs together use each example once; with 2.5, an epoch uses each twice and half of them a
/// third time, and the next epoch uses the other half a third time.
///
/// Indices have 32 bits, which allows four billion rows, since a plan holds one per row.
pub(crate) fn epoch_examples(files: &[(usize, f64)], seed: u64, epoch: u64) -> Vec<u32> {
    let mut all = Vec::new();
    let mut first: u32 = 0;
    for (file, &(count, weight)) in (0u64..).zip(files) {
        let until = |epochs: u64| (count as f64 * weight * epochs as f64).round() as u64;
        let (mut at, end) = (until(epoch), until(epoch + 1));
        while at < end && count > 0 {
            let (pass, skip) = (at / count as u64, (at % count as u64) as usize);
            let take = (count - skip).min((end - at) as usize);
            if take == count {
                all.extend(first..first + count as u32);
            } else {
                let mut order: Vec<u32> = (0..count as u32).collect();
                Stream::new(seed, "mixture", &[file, pass]).shuffle(&mut order);
                let mut part = order[skip..skip + take].to_vec();
                part.sort_unstable();
                all.extend(part.iter().map(|place| first + place));
            }
            at += take as u64;
        }
        first += count as u32;
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_may_have_a_weight() {
        let check = |text: &str, path: &str, weight| {
            let file: DataFile = text.parse().unwrap();
            assert_eq!(file, DataFile { path: path.into(), weight });
            assert_eq!(file.to_string().parse(), Ok(file));
        };
        check("a.jsonl", "a.jsonl", 1.0);
        check("a.jsonl=2.5", "a.jsonl", 2.5);
        check("day=2024/a.jsonl", "day=2024/a.jsonl", 1.0);
        check("day=2024/a.jsonl=0.5", "day=2024/a.jsonl", 0.5);
        for wrong in ["a=0", "a=-1", "a=inf", "=2"] {
            assert!(wrong.parse::<DataFile>().unwrap_err().contains("PATH=WEIGHT"), "{wrong}");
        }
    }

    #[test]
    fn epochs_have_their_share_of_each_file() {
        let files = [(10, 1.0), (7, 0.5), (4, 2.5), (3, 2.0)];
        let mut counts = [0u64; 24];
        for epoch in 0..20 {
            let rows = epoch_examples(&files, 3, epoch);
            assert_eq!(rows, epoch_examples(&files, 3, epoch));
            rows.iter().for_each(|&row| counts[row as usize] += 1);
            let most = |range: std::ops::Range<usize>| counts[range].iter().max().copied().unwrap();
            let least =
                |range: std::ops::Range<usize>| counts[range].iter().min().copied().unwrap();
            for (range, weight) in [(0..10, 1.0), (10..17, 0.5), (17..21, 2.5), (21..24, 2.0)] {
                // In every epoch each row has come as often as any other, but for one pass.
                let mean = weight * (epoch + 1) as f64;
                assert!(most(range.clone()) as f64 <= mean + 1.0, "{epoch} {range:?}");
                assert!(least(range.clone()) as f64 >= mean - 1.0, "{epoch} {range:?}");
            }
        }
        assert_eq!(epoch_examples(&[(5, 1.0)], 9, 4), [0, 1, 2, 3, 4]);
        assert_ne!(epoch_examples(&[(50, 0.5)], 1, 0), epoch_examples(&[(50, 0.5)], 2, 0));
    }
}
