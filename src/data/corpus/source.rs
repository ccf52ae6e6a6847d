//! The specification of a source on the command line, and its files.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::CorpusError;

/// One source of a mixture: `NAME=WEIGHT:GLOB`, such as `wiki=0.7:data/wiki/**/*.txt`.
///
/// `WEIGHT`, divided by the sum of all weights, is the fraction of rows drawn from the source. Of the files
/// that match `GLOB`, those ending in `.jsonl` or `.ndjson` have a `text` per line, or `messages` that the
/// chat template renders; those ending in `.parquet` have a column `text`. All other files are plain text:
/// one document, or several separated by `<|endoftext|>` lines.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SourceSpec {
    /// Name in reports: letters, digits, `_`, `-` and `.`.
    pub name: String,
    /// Weight in the mixture, above 0.
    pub weight: f64,
    /// A glob pattern, or a file.
    pub glob: String,
}

impl FromStr for SourceSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts = || {
            let (name, rest) = text.split_once('=')?;
            let (weight, glob) = rest.split_once(':')?;
            Some((name, weight, glob))
        };
        let Some((name, weight, glob)) = parts() else {
            return Err(format!("{text:?} is not a source, needed NAME=WEIGHT:GLOB"));
        };
        let is_plain = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
        if name.is_empty() || name.starts_with('.') || !name.chars().all(is_plain) {
            return Err(format!(
                "{name:?} is not a valid source name, needed letters, digits, `_`, `-` and `.`"
            ));
        }
        let number =
            weight.parse::<f64>().ok().filter(|weight| weight.is_finite() && *weight > 0.0);
        let Some(weight) = number else {
            return Err(format!("the weight of {name:?} is {weight:?}, needed a number above 0"));
        };
        if glob.is_empty() {
            return Err(format!("source {name:?} has no files, needed NAME=WEIGHT:GLOB"));
        }
        Ok(Self { name: name.into(), weight, glob: glob.into() })
    }
}

impl fmt::Display for SourceSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}:{}", self.name, self.weight, self.glob)
    }
}

impl TryFrom<String> for SourceSpec {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<SourceSpec> for String {
    fn from(spec: SourceSpec) -> Self {
        spec.to_string()
    }
}

/// The files that match a glob pattern, sorted by name. A pattern that is the path of a file matches that
/// file.
///
/// # Errors
/// If no file matches, or a folder cannot be read.
pub(crate) fn matching_files(pattern: &str) -> Result<Vec<PathBuf>, CorpusError> {
    if Path::new(pattern).is_file() {
        return Ok(vec![pattern.into()]);
    }
    let matches = glob::glob(pattern).map_err(|problem| CorpusError::Pattern {
        pattern: pattern.into(),
        problem: problem.msg.into(),
    })?;
    let mut files = Vec::new();
    for path in matches {
        let path = path.map_err(|error| CorpusError::Io {
            action: "read",
            path: error.path().into(),
            source: error.into(),
        })?;
        if path.is_file() {
            files.push(path);
        }
    }
    if files.is_empty() {
        return Err(CorpusError::NoFile { pattern: pattern.into() });
    }
    files.sort();
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn source_specs_parse_and_print() {
        let check = |text: &str, needed: Result<(&str, f64, &str), &str>| match (
            text.parse::<SourceSpec>(),
            needed,
        ) {
            (Ok(found), Ok((name, weight, glob))) => {
                assert_eq!((&*found.name, found.weight, &*found.glob), (name, weight, glob));
                assert_eq!(found.to_string().parse(), Ok(found.clone()));
                let json = serde_json::to_string(&found).unwrap();
                assert_eq!(serde_json::from_str::<SourceSpec>(&json).unwrap(), found);
            }
            (Err(found), Err(words)) => assert!(found.contains(words), "{found}"),
            (found, needed) => panic!("{text}: {found:?}, needed {needed:?}"),
        };
        check("wiki=0.7:data/*.txt", Ok(("wiki", 0.7, "data/*.txt")));
        check("a-b_c.2=3:C:\\x=1.txt", Ok(("a-b_c.2", 3.0, "C:\\x=1.txt")));
        check("data/*.txt", Err("needed NAME=WEIGHT:GLOB"));
        check("wiki=0.7", Err("needed NAME=WEIGHT:GLOB"));
        check("wiki=0.7:", Err("has no files"));
        check("=1:x", Err("is not a valid source name"));
        check("../x=1:x", Err("is not a valid source name"));
        check("wiki=0:x", Err("needed a number above 0"));
        check("wiki=-1:x", Err("needed a number above 0"));
        check("wiki=inf:x", Err("needed a number above 0"));
        check("wiki=much:x", Err("\"wiki\" is \"much\""));
    }
}
