//! Comparisons, labels and prompts: tokens against TRL's, invalid rows, dropped rows and the held-out split.

use std::path::Path;
use std::sync::atomic::AtomicBool;

use quantune::data::{
    Cache, Comparison, ComparisonKind, ComparisonSettings, Comparisons, DataError, LengthLimits,
    PreferencePair, PromptSettings, Prompts, WhenTooLong,
};
use quantune::text::{Special, Tokenizer};
use serde_json::{Value, json};

use crate::support::{golden, golden_json, ids};

/// A stop flag that is never set.
static GOES_ON: AtomicBool = AtomicBool::new(false);

const ALL: LengthLimits = LengthLimits { max_length: usize::MAX, when_long: WhenTooLong::Drop };

fn tokenizer(name: &str) -> Tokenizer {
    Tokenizer::from_folder(golden(&format!("data/{name}"))).unwrap()
}

/// Loads a file with these bytes, which errors call rows.jsonl.
fn in_file<T>(bytes: &[u8], load: impl FnOnce(&Path) -> Result<T, DataError>) -> Result<T, String> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rows.jsonl");
    std::fs::write(&path, bytes).unwrap();
    load(&path)
        .map_err(|error| error.to_string().replace(&format!("{}/", folder.path().display()), ""))
}

fn load(
    rows: &[Value],
    tokenizer: &Tokenizer,
    limits: LengthLimits,
    kind: ComparisonKind,
) -> Result<Comparisons, String> {
    in_file(&lines(rows), |path| Comparisons::load(path, tokenizer, limits, kind, &GOES_ON))
}

fn lines(rows: &[Value]) -> Vec<u8> {
    rows.iter().flat_map(|row| format!("{row}\n").into_bytes()).collect()
}

fn sequences(comparison: &Comparison) -> Vec<Vec<u32>> {
    let whole = |response: &Vec<u32>| [comparison.prompt.clone(), response.clone()].concat();
    comparison.responses.iter().map(whole).collect()
}

#[test]
fn tokens_match_trl() {
    let cases = golden_json("data/comparisons.json");
    let cases = cases.as_array().unwrap();
    assert!(cases.len() > 140, "{} rows", cases.len());
    for case in cases {
        let tokenizer = tokenizer(case["tokenizer"].as_str().unwrap());
        let max_length = case["max_length"].as_u64().map_or(usize::MAX, |most| most as usize);
        let rows = [case["row"].clone()];
        let load = |when_long, kind| {
            load(&rows, &tokenizer, LengthLimits { max_length, when_long }, kind)
                .map(|found| found.rows.get(0))
        };
        let found = match case["maker"].as_str().unwrap() {
            "reward" => load(WhenTooLong::Drop, ComparisonKind::Pairs),
            "dpo" => load(WhenTooLong::Cut, ComparisonKind::Pairs),
            "kto" => load(WhenTooLong::Cut, ComparisonKind::Labels),
            _ => {
                in_file(&lines(&rows), |path| Prompts::load(path, &tokenizer, max_length, &GOES_ON))
                    .map(|found| Comparison {
                        prompt: Vec::new(),
                        responses: vec![found.rows.get(0).tokens],
                        pairs: Vec::new(),
                        label: None,
                        row: 0,
                        line: 1,
                    })
            }
        };
        check(case, found);
    }

    fn check(case: &Value, found: Result<Comparison, String>) {
        let what = format!("{} of {}: {}", case["maker"], case["tokenizer"], case["row"]);
        if case["sequences"].is_null() {
            let error = found.expect_err(&what);
            assert!(error.contains("nothing to compare in any of 1 rows"), "{what}: {error}");
            return;
        }
        let found = found.unwrap_or_else(|error| panic!("{what}: {error}"));
        let expected: Vec<_> = case["sequences"].as_array().unwrap().iter().map(ids).collect();
        assert_eq!(sequences(&found), expected, "{what}");
        if let Some(length) = case["prompt_length"].as_u64() {
            assert_eq!(found.prompt.len() as u64, length, "{what}");
        }
        if let Some(label) = case["row"]["label"].as_bool() {
            assert_eq!(found.label, Some(label), "{what}");
        } else if case["maker"] != "prompts" {
            assert_eq!(
                found.pairs,
                [PreferencePair { better: 0, worse: 1, margin: 0.0 }],
                "{what}"
            );
        }
    }
}

#[test]
fn preference_pairs_of_ranked_responses() {
    let chatml = tokenizer("chatml");
    // The other keys of a row with four responses, and its pairs, the preferred response first.
    let check = |rest: Value, expected: &[(usize, usize)], ties: u64| {
        let mut row = json!({"prompt": "p", "responses": [" a", " b", " c", " d"]});
        row.as_object_mut().unwrap().extend(rest.as_object().unwrap().clone());
        let found = load(&[row.clone()], &chatml, ALL, ComparisonKind::Pairs).unwrap();
        let pairs = &found.rows.get(0).pairs;
        let places: Vec<_> = pairs.iter().map(|pair| (pair.better, pair.worse)).collect();
        assert_eq!(places, expected, "{row}");
        assert_eq!((found.report.pairs, found.report.ties), (expected.len() as u64, ties), "{row}");
    };
    check(json!({}), &[(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)], 0);
    check(json!({"ranks": [2, 1, 2, 7]}), &[(1, 0), (0, 3), (1, 2), (1, 3), (2, 3)], 1);
    check(json!({"scores": [0.5, -1e9, 3, 0.5]}), &[(0, 1), (2, 0), (2, 1), (3, 1), (2, 3)], 1);
    // Three responses are equal and one is better, which is in all pairs.
    check(json!({"scores": [1, 1, 1, 2]}), &[(3, 0), (3, 1), (3, 2)], 3);

    let margin = json!({"prompt": "p", "chosen": " a", "rejected": " b", "margin": 1.5, "id": 7});
    let found = load(&[margin], &chatml, ALL, ComparisonKind::Pairs).unwrap();
    assert_eq!(found.rows.get(0).pairs, [PreferencePair { better: 0, worse: 1, margin: 1.5 }]);

    // KTO splits a pair; rows that are only scored need neither pairs nor labels.
    let pair = json!({"prompt": "p", "chosen": " a", "rejected": " b"});
    let found = load(&[pair], &chatml, ALL, ComparisonKind::Labels).unwrap();
    let labels: Vec<_> = found.rows.iter().map(|c| (c.row, c.label)).collect();
    assert_eq!(labels, [(0, Some(true)), (0, Some(false))]);
    assert_eq!((found.report.desirable, found.report.undesirable), (1, 1));
    let said = json!([{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]);
    let rows = [
        json!({"text": "t"}),
        json!({"prompt": "p", "completion": "c"}),
        json!({"messages": said}),
    ];
    let found = load(&rows, &chatml, ALL, ComparisonKind::Any).unwrap();
    assert_eq!((found.report.responses, found.report.pairs), (3, 0));
    let asked = "<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\n";
    assert_eq!(found.rows.get(2).prompt, chatml.encode(asked, Special::Parse).unwrap());
}

#[test]
fn overlong_responses_are_dropped_with_their_pairs() {
    let chatml = tokenizer("chatml");
    let long = " boat".repeat(40);
    let ranked = json!({"prompt": "the river", "responses": [" a", long, " b", long]});
    let pair = json!({"prompt": "the river", "chosen": long, "rejected": " b"});
    let tie = json!({"prompt": "the river", "responses": [" a", " b"], "ranks": [1, 1]});
    let rows = [ranked, pair, tie];
    let limits = |when_long| LengthLimits { max_length: 20, when_long };

    let found = load(&rows, &chatml, limits(WhenTooLong::Drop), ComparisonKind::Pairs).unwrap();
    assert_eq!(found.rows.len(), 1);
    let kept = &found.rows.get(0);
    assert_eq!((kept.responses.len(), kept.row, kept.line), (2, 0, 1));
    assert_eq!(kept.pairs, [PreferencePair { better: 0, worse: 1, margin: 0.0 }]);
    let report = &found.report;
    assert_eq!((report.rows, report.dropped, report.nothing_to_compare), (3, 3, 2));
    assert_eq!((report.ties, report.tokens), (1, kept.tokens() as u64));

    let found = load(&rows, &chatml, limits(WhenTooLong::Cut), ComparisonKind::Pairs).unwrap();
    assert_eq!(found.rows.len(), 2);
    assert_eq!(found.rows.get(0).pairs.len(), 6);
    for comparison in found.rows.iter() {
        let most = sequences(&comparison).iter().map(Vec::len).max();
        assert_eq!(most, Some(20));
    }
    let report = &found.report;
    assert_eq!((report.truncated, report.dropped, report.identical), (3, 0, 1));
    assert!(report.longest > 40);
    let told = "3 rows, 6 responses, 7 pairs, ";
    assert!(report.to_string().starts_with(told), "{report}");

    let none = LengthLimits { max_length: 2, when_long: WhenTooLong::Drop };
    let error = load(&rows, &chatml, none, ComparisonKind::Pairs).unwrap_err();
    assert_eq!(
        error,
        "rows.jsonl: nothing to compare in any of 3 rows (8 responses longer than 2 tokens with \
         their prompts), needs at least one pair or label"
    );
    let error = load(&[], &chatml, none, ComparisonKind::Pairs).unwrap_err();
    assert_eq!(error, "rows.jsonl: contains no rows, needs one JSON object per line");
}

/// The shared prompt ends where the first response deviates from it.
#[test]
fn a_token_that_spans_the_border_belongs_to_the_responses() {
    let chatml = tokenizer("chatml");
    let row = json!({"prompt": "the rive", "chosen": "r", "rejected": "t"});
    let found = load(&[row], &chatml, ALL, ComparisonKind::Pairs).unwrap();
    let comparison = &found.rows.get(0);
    assert_eq!(found.report.boundary_mismatches, 1);
    let own = chatml.encode("the rive", Special::Parse).unwrap();
    assert!(comparison.prompt.len() < own.len() && own.starts_with(&comparison.prompt));
    let texts: Vec<_> =
        sequences(comparison).iter().map(|ids| chatml.decode(ids, true).unwrap()).collect();
    assert_eq!(texts, ["the river", "the rivet"]);
}

/// Each case is the kind of comparison, a row and its error.
#[test]
fn an_invalid_row_is_one_error_with_its_line() {
    use ComparisonKind::{Any, Labels, Pairs};
    let chatml = tokenizer("chatml");
    let good = r#"{"prompt": "p", "chosen": "a", "rejected": "b"}"#;
    let pairs = "needs `chosen` and `rejected`, or ranked `responses`";
    let cases = [
        (Pairs, "[]", "found an empty list, needs a JSON object".to_owned()),
        (Pairs, "{}", format!("unknown kind of row: found the keys (none), {pairs}")),
        (
            Pairs,
            r#"{"prompt": "p", "completion": "c", "label": true}"#,
            format!("unknown kind of row: found the keys `prompt`, `completion`, `label`, {pairs}"),
        ),
        (
            Labels,
            r#"{"prompt": "p", "responses": ["a", "b"]}"#,
            "unknown kind of row: found the keys `prompt`, `responses`, needs `completion` and \
             `label`, or `chosen` and `rejected`"
                .into(),
        ),
        (
            Any,
            r#"{"prompt": "p"}"#,
            "unknown kind of row: found the keys `prompt`, needs `chosen` and `rejected`, \
             `responses`, `completion`, `messages` or `text`"
                .into(),
        ),
        (Pairs, r#"{"chosen": 1, "rejected": "b"}"#, "`chosen` is 1, needs a string".into()),
        (
            Pairs,
            r#"{"prompt": "p", "chosen": [{"role": "user", "content": "a"}], "rejected": "b"}"#,
            "`chosen` is a list of 1, needs a string".into(),
        ),
        (
            Pairs,
            r#"{"chosen": [{"role": "user", "content": "a"}], "rejected": "b"}"#,
            "`rejected` is \"b\", needs a list of messages, like the rest of the row".into(),
        ),
        (
            Pairs,
            r#"{"chosen": [{"role": "user", "content": "a"}], "rejected": []}"#,
            "`rejected` is an empty list, needs at least one message".into(),
        ),
        (
            Pairs,
            r#"{"prompt": "p", "chosen": "a", "rejected": "b", "margin": "big"}"#,
            "`margin` is \"big\", needs a number".into(),
        ),
        (
            Pairs,
            r#"{"prompt": "p", "responses": ["a"]}"#,
            "`responses` is a list of 1, needs two or more responses".into(),
        ),
        (
            Pairs,
            r#"{"prompt": "p", "responses": ["a", 2]}"#,
            "`responses[1]` is 2, needs a string".into(),
        ),
        (
            Pairs,
            r#"{"responses": ["a", "b"], "ranks": [1]}"#,
            "`ranks` is a list of 1, needs one entry per response".into(),
        ),
        (
            Pairs,
            r#"{"responses": ["a", "b"], "ranks": [0, 1]}"#,
            "`ranks[0]` is 0, needs a rank, from 1 for the best".into(),
        ),
        (
            Pairs,
            r#"{"responses": ["a", "b"], "scores": [0.5, "1"]}"#,
            "`scores[1]` is \"1\", needs a number".into(),
        ),
        (
            Pairs,
            r#"{"responses": ["a", "b"], "scores": [1, 2], "ranks": [2, 1]}"#,
            "`ranks` is a list of 2, needs no `scores` beside it: give one of the two".into(),
        ),
        (
            Labels,
            r#"{"prompt": "p", "completion": "c", "label": "good"}"#,
            "`label` is \"good\", needs true or false".into(),
        ),
        (
            Labels,
            r#"{"prompt": "p", "completion": "c"}"#,
            "`label` is missing, needs true or false".into(),
        ),
    ];
    for (kind, row, expected) in cases {
        // After a valid row and a blank line, so that row and line numbers differ.
        let good = if kind == Any { r#"{"text": "t"}"# } else { good };
        let file = format!("{good}\n\n{row}");
        let error =
            in_file(file.as_bytes(), |path| Comparisons::load(path, &chatml, ALL, kind, &GOES_ON))
                .expect_err(row);
        assert_eq!(error, format!("rows.jsonl:3: {expected}"), "{row}");
    }
}

#[test]
fn prompts_keep_their_rows() {
    let bos = tokenizer("bos");
    let row = json!({"prompt": "the river", "answer": 42, "note": null, "price": 3.50});
    let chat = json!({"prompt": [{"role": "user", "content": "u"}]});
    let found =
        in_file(&lines(&[row.clone(), chat]), |path| Prompts::load(path, &bos, 50, &GOES_ON))
            .unwrap();
    let first = &found.rows.get(0);
    assert_eq!(Value::Object(first.row.clone()), row, "the whole row");
    assert_eq!(first.tokens[0], bos.bos().unwrap());
    assert_eq!((first.text.as_str(), first.line), ("the river", 1));
    let second = &found.rows.get(1);
    let asked = "<|endoftext|><|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\n";
    assert_eq!((second.text.as_str(), second.line), (asked, 2));
    assert_eq!(found.report.longest as usize, second.tokens.len());

    let check = |row: &str, most: usize, expected: &str| {
        let file = format!("{{\"prompt\": \"a\"}}\n\n{row}\n");
        let tokenizer = tokenizer("chatml");
        let load = |path: &Path| Prompts::load(path, &tokenizer, most, &GOES_ON);
        let error = in_file(file.as_bytes(), load).expect_err(row);
        assert_eq!(error, format!("rows.jsonl:3: {expected}"), "{row}");
    };
    let needs = "needs `prompt`, a string or a list of messages";
    check(
        r#"{"prompt": null}"#,
        9,
        &format!("unknown kind of row: found the keys `prompt`, {needs}"),
    );
    check(r#"{"text": "a"}"#, 9, &format!("unknown kind of row: found the keys `text`, {needs}"));
    check(r#"{"prompt": 3}"#, 9, "`prompt` is 3, needs a string");
    check(r#"{"prompt": ""}"#, 9, "`prompt` has no tokens, needs at least one");
    check(
        r#"{"prompt": "boat boat boat"}"#,
        2,
        "the prompt has 3 tokens, needs at most 2: the response has to fit into max_length and the \
         model's context window too",
    );
}

#[test]
fn a_split_keeps_prompts_apart() {
    let chatml = tokenizer("chatml");
    // Every prompt twice, with case and spaces changed: both are in the same part.
    let twice = |i: usize| [format!("Question {i}?"), format!("  question   {i}? ")];
    let pair = |prompt: String| json!({"prompt": prompt, "chosen": " a", "rejected": " b"});
    let rows: Vec<Value> = (0..300).flat_map(twice).map(pair).collect();
    let split = in_file(&lines(&rows), |path| {
        Comparisons::load_split(path, &chatml, ALL, ComparisonKind::Pairs, &GOES_ON)
    })
    .unwrap();
    let held_out = split.held_out.unwrap();
    assert_eq!(split.train.report.rows + held_out.report.rows, 600);
    assert!((30..120).contains(&held_out.report.rows), "{}", held_out.report);
    let numbers = |part: &Comparisons| -> Vec<u64> {
        part.rows.iter().map(|comparison| comparison.row / 2).collect()
    };
    let (train, held) = (numbers(&split.train), numbers(&held_out));
    assert!(train.iter().all(|number| !held.contains(number)));
    let written = String::from_utf8(split.held_out_lines.to_vec()).unwrap();
    let expected: String =
        held_out.rows.iter().map(|c| format!("{}\n", rows[c.row as usize])).collect();
    assert_eq!(written, expected);

    // Prompt-only rows with the same prompts are split the same way.
    let split =
        in_file(&lines(&rows), |path| Prompts::load_split(path, &chatml, 50, &GOES_ON)).unwrap();
    let prompts: Vec<u64> = split.held_out.unwrap().rows.iter().map(|p| (p.line - 1) / 2).collect();
    assert_eq!(prompts, held);
    assert_eq!(String::from_utf8(split.held_out_lines.to_vec()).unwrap(), expected);

    // All rows under one prompt that is held out.
    let one = rows[held_out.rows.get(0).row as usize].clone();
    let error = in_file(&lines(&[one.clone(), one]), |path| {
        Comparisons::load_split(path, &chatml, ALL, ComparisonKind::Pairs, &GOES_ON).map(|_| ())
    })
    .unwrap_err();
    assert!(error.contains("all 2 rows fall into the held-out part"), "{error}");
}

/// Cached rows equal those in memory, including whole rows and check results.
#[test]
fn comparisons_and_prompts_are_cached_on_disk() {
    let folder = tempfile::tempdir().unwrap();
    let chatml = tokenizer("chatml");
    let row = |i: usize| {
        let (margin, number) = (i as f64 / 3.0, (i as f64 * 1e-3).sqrt());
        json!({"prompt": format!("Question {}?", i / 2), "chosen": " yes ".repeat(i % 5 + 1),
               "rejected": " no", "margin": margin, "z": null, "number": number, "a": [i]})
    };
    let path = folder.path().join("rows.jsonl");
    std::fs::write(&path, lines(&(0..60).map(row).collect::<Vec<_>>())).unwrap();
    let cache = Some(Cache { folder: folder.path().join("cache"), from_bytes: 1 });
    for time in 0..2 {
        for kind in [ComparisonKind::Pairs, ComparisonKind::Labels] {
            let limits = LengthLimits { max_length: 30, when_long: WhenTooLong::Drop };
            let in_memory = ComparisonSettings::from(limits);
            let on_disk = ComparisonSettings { cache: cache.clone(), ..in_memory.clone() };
            let load = |settings: ComparisonSettings| {
                Comparisons::load_split(&path, &chatml, settings, kind, &GOES_ON).unwrap()
            };
            let (in_memory, on_disk) = (load(in_memory), load(on_disk));
            let (held_out, same) = (in_memory.held_out.unwrap(), on_disk.held_out.unwrap());
            for (a, b) in [(&in_memory.train, &on_disk.train), (&held_out, &same)] {
                assert!(!a.rows.is_empty() && a.rows.iter().eq(b.rows.iter()), "{kind:?} {time}");
                assert_eq!((&a.report, &a.checks), (&b.report, &b.checks));
                assert_eq!((&a.sha256, &a.tokens_sha256), (&b.sha256, &b.tokens_sha256));
                assert_eq!([a.rows.bytes(60)[1], b.rows.bytes(60)[0]], [0, 0]);
            }
            assert_eq!(*in_memory.held_out_lines, *on_disk.held_out_lines);
        }
        let in_memory = PromptSettings::from(100);
        let on_disk = PromptSettings { cache: cache.clone(), ..in_memory.clone() };
        let load = |settings| Prompts::load(&path, &chatml, settings, &GOES_ON).unwrap();
        let (in_memory, on_disk) = (load(in_memory), load(on_disk));
        assert!(in_memory.rows.iter().eq(on_disk.rows.iter()), "{time}");
        assert_eq!(Value::Object(on_disk.rows.get(7).row), row(7));
        assert_eq!((&in_memory.report, in_memory.checks), (&on_disk.report, on_disk.checks));
        let folders = std::fs::read_dir(folder.path().join("cache")).unwrap();
        assert_eq!(folders.filter(|e| e.as_ref().unwrap().path().is_dir()).count(), 3);
    }
}
