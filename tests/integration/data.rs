//! Rows to tokens and masks against TRL, bad files, the split, and the order of epochs.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use quantune::data::{
    Batch, DataError, Dataset, EpochPlan, EpochSettings, Example, Row, is_held_out,
};
use quantune::text::Tokenizer;
use serde_json::{Value, json};

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/data")
}

fn tokenizer(name: &str) -> Tokenizer {
    Tokenizer::from_folder(&golden().join(name)).unwrap()
}

/// The dataset of a file with these bytes, called rows.jsonl in its errors.
fn load(bytes: &[u8], tokenizer: &Tokenizer, max_length: usize) -> Result<Dataset, String> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rows.jsonl");
    std::fs::write(&path, bytes).unwrap();
    Dataset::load(&path, tokenizer, max_length)
        .map_err(|error| error.to_string().replace(&format!("{}/", folder.path().display()), ""))
}

fn lines(rows: &[Value]) -> Vec<u8> {
    rows.iter().flat_map(|row| format!("{row}\n").into_bytes()).collect()
}

/// Tokens, and where a token is learned its id, else -100: as transformers writes labels. The
/// first token has none, nothing predicts it.
fn labels(example: &Example) -> Vec<i64> {
    let label = |(&id, &learned): (&u32, &bool)| if learned { i64::from(id) } else { -100 };
    example.tokens.iter().zip(&example.learned).map(label).collect()
}

#[test]
fn tokens_and_labels_are_trls() {
    let cases = std::fs::read(golden().join("trl.json")).unwrap();
    let cases: Vec<Value> = serde_json::from_slice(&cases).unwrap();
    let mut rows = 0;
    for case in &cases {
        let max_length = case["max_length"].as_u64().unwrap_or(u64::MAX) as usize;
        for name in case["tokenizers"].as_array().unwrap() {
            let tokenizer = tokenizer(name.as_str().unwrap());
            for row in case["rows"].as_array().unwrap() {
                check(case, name, row, load(&lines(&[row["row"].clone()]), &tokenizer, max_length));
                rows += 1;
            }
        }
    }
    assert!(rows > 60, "{rows} rows");

    fn check(case: &Value, name: &Value, row: &Value, found: Result<Dataset, String>) {
        let what = format!("{} with {name}: {}", case["kind"], row["row"]);
        let ints = |key: &str| -> Vec<i64> {
            row[key].as_array().unwrap().iter().map(|v| v.as_i64().unwrap()).collect()
        };
        // A row TRL drops, or one whose only label is that of its first token, which nothing predicts.
        if row["input_ids"].is_null() || ints("labels")[1..].iter().all(|&l| l == -100) {
            let error = found.expect_err(&what);
            assert!(error.contains("nothing to learn in any of 1 rows"), "{what}: {error}");
            return;
        }
        let found = found.unwrap_or_else(|error| panic!("{what}: {error}"));
        let example = &found.examples[0];
        let mut expected = ints("labels");
        expected[0] = -100;
        assert_eq!(
            example.tokens.iter().map(|&t| i64::from(t)).collect::<Vec<_>>(),
            ints("input_ids"),
            "{what}"
        );
        assert_eq!(labels(example), expected, "{what}");
    }
}
