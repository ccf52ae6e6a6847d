//! Rows to tokens and masks against TRL, bad files, the split, and the order of epochs.

use std::collections::HashSet;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use proptest::prelude::*;
use quantune::data::checks::Check;
use quantune::data::{
    AlpacaPrompt, Batch, Cache, ComparisonKind, ComparisonSettings, Comparisons, DataError,
    DataReport, Dataset, EpochPlan, EpochSettings, Example, LengthLimits, LoadSettings,
    ModelLimits, Row, WhenTooLong, is_held_out,
};
use quantune::ops::Segment;
use quantune::text::{Special, Tokenizer};
use serde_json::{Value, json};

use crate::support::{golden, golden_json};

fn tokenizer(name: &str) -> Tokenizer {
    Tokenizer::from_folder(golden(&format!("data/{name}"))).unwrap()
}

/// A stop flag that is never set.
static GOES_ON: AtomicBool = AtomicBool::new(false);

/// A loaded file.
struct Loaded {
    examples: Vec<Example>,
    report: DataReport,
}

/// Loads a file with these bytes, which errors call rows.jsonl.
fn load(bytes: &[u8], tokenizer: &Tokenizer, max_length: usize) -> Result<Loaded, String> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rows.jsonl");
    std::fs::write(&path, bytes).unwrap();
    Dataset::load(&path, tokenizer, max_length, &GOES_ON)
        .map(|data| Loaded { examples: data.rows.iter().collect(), report: data.report })
        .map_err(|error| error.to_string().replace(&format!("{}/", folder.path().display()), ""))
}

fn lines(rows: &[Value]) -> Vec<u8> {
    rows.iter().flat_map(|row| format!("{row}\n").into_bytes()).collect()
}

/// Labels as in transformers: the token id where a token is learned, else -100. The first token is never
/// learned, since nothing predicts it.
fn labels(example: &Example) -> Vec<i64> {
    let label = |(&id, &learned): (&u32, &bool)| if learned { i64::from(id) } else { -100 };
    example.tokens.iter().zip(&example.learned).map(label).collect()
}

#[test]
fn tokens_and_labels_match_trl() {
    let cases = golden_json("data/trl.json");
    let cases = cases.as_array().unwrap();
    let mut rows = 0;
    for case in cases {
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

    fn check(case: &Value, name: &Value, row: &Value, found: Result<Loaded, String>) {
        let what = format!("{} with {name}: {}", case["kind"], row["row"]);
        let ints = |key: &str| -> Vec<i64> {
            row[key].as_array().unwrap().iter().map(|v| v.as_i64().unwrap()).collect()
        };
        // A row TRL drops, or one whose only label is that of its first token, which nothing predicts.
        if row["input_ids"].is_null() || ints("labels")[1..].iter().all(|&l| l == -100) {
            let error = found.map(|_| ()).expect_err(&what);
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

/// Each case is a row (one line of JSON, or any bytes) and its error.
#[test]
fn an_invalid_row_is_one_error_with_its_line() {
    #[track_caller]
    fn check(tokenizer: &Tokenizer, row: &[u8], expected: &str) {
        // After a valid row and a blank line, so that row and line numbers differ.
        let file = [b"{\"text\": \"good\"}\n\n".as_slice(), row].concat();
        let error = load(&file, tokenizer, 100).map(|_| ()).expect_err(expected);
        assert_eq!(error, format!("rows.jsonl:3: {expected}"));
    }
    let chatml = tokenizer("chatml");
    let roles = "needs one of system, user, assistant, tool, developer, function";
    let kinds = "known are `input_ids` (+ `labels`), `messages` (+ `tools`), \
                 `conversations`, `instruction` + `output`, `prompt` + `completion`, and `text`";
    let vocab_size = chatml.vocab_size();
    let text: [(&str, &str); 25] = [
        ("{\"text\": \"a\"", "is not JSON (EOF while parsing an object at column 12)"),
        ("[1, 2]", "found a list of 2, needs a JSON object"),
        ("{}", &format!("unknown kind of row: found the keys (none), {kinds}")),
        (
            r#"{"prompt": "a", "chosen": "b", "rejected": "c", "text": null}"#,
            "is a row of `chosen`/`rejected`, which is data for `reward` and `dpo`, not this command",
        ),
        (
            r#"{"conversation": [], "id": 7}"#,
            &format!("unknown kind of row: found the keys `conversation`, `id`, {kinds}"),
        ),
        (
            r#"{"a": 1, "b": 1, "c": 1, "d": 1, "e": 1, "f": 1, "g": 1, "a key of more than forty characters, all of them": 1, "i": 1, "j": 1}"#,
            &format!(
                "unknown kind of row: found the keys `a`, `b`, `c`, `d`, `e`, `f`, `g`, \
                 `a key of more than forty characters, all...` and 2 more, {kinds}"
            ),
        ),
        (r#"{"text": 3.5}"#, "`text` is 3.5, needs a string"),
        (r#"{"prompt": "a", "completion": ["b"]}"#, "`completion` is a list of 1, needs a string"),
        (
            r#"{"prompt": [], "completion": []}"#,
            "`prompt` is an empty list, needs at least one message",
        ),
        (r#"{"messages": "hi"}"#, "`messages` is \"hi\", needs a list"),
        (r#"{"messages": []}"#, "`messages` is an empty list, needs at least one message"),
        (
            r#"{"messages": ["hi"]}"#,
            "`messages[0]` is \"hi\", needs a message with `role` and `content`",
        ),
        (
            r#"{"messages": [{"role": "user", "content": "a"}, {"role": "bot", "content": "b"}]}"#,
            &format!("`messages[1].role` is \"bot\", {roles}"),
        ),
        (r#"{"messages": [{"content": "a"}]}"#, &format!("`messages[0].role` is missing, {roles}")),
        (
            r#"{"messages": [{"role": "assistant"}]}"#,
            "`messages[0].content` is missing, needs a string or a list of text parts",
        ),
        (
            r#"{"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}]}"#,
            "`messages[0].content[1]` is an object, needs a part {\"type\": \"text\", \"text\": ...}",
        ),
        (
            r#"{"messages": [{"role": "assistant", "content": "a", "train": 1}]}"#,
            "`messages[0].train` is 1, needs true or false",
        ),
        (
            r#"{"messages": [{"role": "user", "content": "a", "train": true}]}"#,
            "`messages[0].train` is true, needs false: only the assistant's messages are learned",
        ),
        (
            r#"{"messages": [{"role": "user", "content": "a"}], "tools": "[}"}"#,
            "`tools` is \"[}\", needs a list of tools or the JSON text of one",
        ),
        (r#"{"input_ids": [1, -2]}"#, "`input_ids[1]` is -2, needs a token id"),
        (r#"{"input_ids": [1, 2.0]}"#, "`input_ids[1]` is 2.0, needs a token id"),
        (
            r#"{"input_ids": [1, 4096]}"#,
            &format!("`input_ids[1]` is 4096, the vocabulary has {vocab_size} tokens"),
        ),
        (r#"{"input_ids": [1, 2], "labels": [1]}"#, "`labels` has 1 entries for 2 `input_ids`"),
        (
            r#"{"input_ids": [1, 2], "labels": [-100, 3]}"#,
            "`labels[1]` is 3, needs -100 or the token id at this position",
        ),
        (
            r#"{"input_ids": [1, 2], "completion_mask": [0, 1]}"#,
            "`completion_mask` is a mask with other entries than 1, needs `labels` with -100 instead",
        ),
    ];
    for (row, expected) in text {
        check(&chatml, row.as_bytes(), expected);
    }
    check(&chatml, b"{\"text\": \"\xff\"}", "byte 11 of the line is not UTF-8");
    check(
        &chatml,
        &format!("{{\"text\": {}1{}}}", "[".repeat(100_000), "]".repeat(100_000)).into_bytes(),
        "is not JSON (recursion limit exceeded at column 136)",
    );
}

#[test]
fn invalid_rows_are_reported_together() {
    #[track_caller]
    fn check(wrong: usize, expected: &str) {
        // Each after valid rows and a blank line, so that they are in different chunks.
        let row =
            |i: usize| format!("{}\n{{\"text\": {i}}}\n", "{\"text\": \"good\"}\n".repeat(700));
        let file: String = (0..wrong).map(row).collect();
        let error =
            load(file.as_bytes(), &tokenizer("chatml"), 100).map(|_| ()).expect_err(expected);
        assert_eq!(error, expected);
    }
    let told = |count: usize| -> String {
        let line = |i| format!("\n  rows.jsonl:{}: `text` is {i}, needs a string", 702 * (i + 1));
        (0..count).map(line).collect()
    };
    check(1, "rows.jsonl:702: `text` is 0, needs a string");
    check(2, &format!("rows.jsonl: 2 of 1402 rows are invalid{}", told(2)));
    check(5, &format!("rows.jsonl: 5 of 3505 rows are invalid{}", told(5)));
    check(7, &format!("rows.jsonl: 7 of 4907 rows are invalid{}\n  and 2 more", told(5)));
}

#[test]
fn a_file_without_anything_to_learn_is_an_error() {
    #[track_caller]
    fn check(file: &str, max_length: usize, expected: &str) {
        let error = load(file.as_bytes(), &tokenizer("chatml"), max_length)
            .map(|_| ())
            .expect_err(expected);
        assert_eq!(error, format!("rows.jsonl: {expected}"));
    }
    let needs = "needs at least one learned token after a row's first";
    check("", 10, "contains no rows, needs one JSON object per line");
    check("\u{feff}\r\n \n", 10, "contains no rows, needs one JSON object per line");
    check(
        "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}]}\n{\"input_ids\": [5]}\n",
        10,
        &format!(
            "nothing to learn in any of 2 rows (0 of them longer than the 10 tokens kept), {needs}"
        ),
    );
    check(
        "{\"text\": \"several tokens\"}",
        1,
        &format!(
            "nothing to learn in any of 1 rows (1 of them longer than the 1 tokens kept), {needs}"
        ),
    );
    let missing =
        Dataset::load(Path::new("no/such/file"), &tokenizer("chatml"), 10, &GOES_ON).unwrap_err();
    assert!(missing.to_string().starts_with("no/such/file: cannot be read: "), "{missing}");
}

/// The chatml tokenizer with another chat template.
fn with_template(template: Option<&str>) -> Tokenizer {
    let folder = tempfile::tempdir().unwrap();
    let source = golden("data/chatml");
    std::fs::copy(source.join("tokenizer.json"), folder.path().join("tokenizer.json")).unwrap();
    let config = std::fs::read(source.join("tokenizer_config.json")).unwrap();
    let mut config: Value = serde_json::from_slice(&config).unwrap();
    config["chat_template"] = template.into();
    std::fs::write(folder.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    Tokenizer::from_folder(folder.path()).unwrap()
}

#[test]
fn chat_templates_must_locate_assistant_messages() {
    let talk = json!({"messages": [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"}, {"role": "assistant", "content": "d", "train": false},
    ]});
    let check = |template: Option<&str>, expected: &str| {
        let error = load(&lines(std::slice::from_ref(&talk)), &with_template(template), 100)
            .map(|_| ())
            .expect_err(expected);
        assert!(error.starts_with("rows.jsonl:1: ") && error.contains(expected), "{error}");
    };
    check(None, "a row of messages needs a chat template, the tokenizer has none");
    // Writes the number of turns first, like templates that drop earlier reasoning.
    check(
        Some("{{ messages | length }}{% for m in messages %}{{ m.content }}\n{% endfor %}"),
        "rewrites the text before `messages[1]`",
    );
    check(
        Some(
            "{% generation %}all{% endgeneration %}{% for m in messages %}{{ m.content }}{% endfor %}",
        ),
        "marks 1 {% generation %} parts for 2 assistant messages",
    );
}

/// Checks the runs of learned tokens of a row, given as text.
#[track_caller]
fn check_learned(tokenizer: &Tokenizer, row: Value, expected: &[&str]) {
    let found = load(&lines(std::slice::from_ref(&row)), tokenizer, 1000).unwrap();
    let runs = labels(&found.examples[0]);
    let runs: Vec<Vec<u32>> = runs
        .split(|&label| label == -100)
        .filter(|run| !run.is_empty())
        .map(|run| run.iter().map(|&id| id as u32).collect())
        .collect();
    let expected: Vec<_> =
        expected.iter().map(|text| tokenizer.encode(text, Special::Parse).unwrap()).collect();
    assert_eq!(runs, expected, "{row}");
}

/// Templates that insert a default system message, or fail on an empty conversation.
#[test]
fn a_conversation_may_begin_with_the_assistant() {
    let turn = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n";
    let asked = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
    let own_system = format!(
        "{{% for m in messages %}}{{% if loop.first and m.role != 'system' %}}<|im_start|>system\n\
         You help.<|im_end|>\n{{% endif %}}{turn}{{% endfor %}}{asked}"
    );
    let fails_on_none = format!(
        "{{% if not messages %}}{{{{ raise_exception('none') }}}}{{% endif %}}\
         {{% for m in messages %}}{turn}{{% endfor %}}{asked}"
    );
    let said = |text: &str| json!({"role": "assistant", "content": text});
    let user = json!({"role": "user", "content": "u"});
    let talk = json!({"messages": [said("one"), user, said("two")]});
    for template in [own_system, fails_on_none] {
        let tokenizer = with_template(Some(&template));
        check_learned(&tokenizer, talk.clone(), &["one<|im_end|>", "two<|im_end|>"]);
    }

    let bare =
        with_template(Some("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"));
    let refused = load(&lines(&[talk]), &bare, 100).map(|_| ()).unwrap_err();
    assert!(
        refused.starts_with("rows.jsonl:1: `messages[0]` is the assistant's, and"),
        "{refused}"
    );
    // Errors that a template raises are reported with its message, as in transformers.
    let strict =
        "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}";
    let talk = json!({"messages": [said("one")]});
    let refused = load(&lines(&[talk]), &with_template(Some(strict)), 100).map(|_| ()).unwrap_err();
    assert_eq!(refused, "rows.jsonl:1: chat template, line 1: user first");
}

#[test]
fn learned_tokens_of_each_kind_of_row() {
    for name in ["chatml", "generation", "bos"] {
        let t = &tokenizer(name);
        let said = |text: &str| json!({"role": "assistant", "content": text});
        let unlearned = json!({"role": "assistant", "content": "one", "train": false});
        let user = json!({"role": "user", "content": "u"});
        let system = json!({"role": "system", "content": [{"type": "text", "text": "s"}]});
        let both = ["one<|im_end|>", "two<|im_end|>"];
        check_learned(
            t,
            json!({"messages": [system, user, said("one"), user, said("two")]}),
            &both,
        );
        check_learned(t, json!({"messages": [user, unlearned, user, said("two")]}), &both[1..]);
        let prompt = json!([user, said("one"), user]);
        check_learned(t, json!({"prompt": prompt, "completion": [said("two")]}), &both[1..]);
        check_learned(t, json!({"prompt": "a", "completion": " b"}), &[" b<|im_end|>"]);
    }
    let ids = |text: &str| tokenizer("chatml").encode(text, Special::Parse).unwrap();
    let (a, b) = (ids("a")[0], ids("b")[0]);
    let row = json!({"input_ids": [a, b, a, b, a], "labels": [a, -100, a, b, -100]});
    check_learned(&tokenizer("chatml"), row, &["ab"]);
}

/// Rows in each supported format, and their learned tokens.
#[test]
fn sft_reads_every_row_format() {
    let bos = &tokenizer("bos");
    let chat = &tokenizer("chatml");
    let turns = json!([
        {"from": "system", "value": "s"}, {"from": "human", "value": "u"},
        {"from": "gpt", "value": "one"}, {"role": "user", "content": "v"},
        {"from": "gpt", "value": "two", "weight": 0}, {"from": "user", "value": "w"},
        {"from": "assistant", "value": "three"}
    ]);
    for t in [bos, chat] {
        let learned = ["one<|im_end|>", "three<|im_end|>"];
        check_learned(t, json!({"conversations": turns, "id": 3}), &learned);
        let row = json!({"instruction": "i", "input": "x", "output": "o"});
        check_learned(t, row, &["o<|im_end|>"]);
        let history = json!([["a", "b"]]);
        let row = json!({"instruction": "i", "output": "o", "history": history, "system": "s"});
        check_learned(t, row, &["b<|im_end|>", "o<|im_end|>"]);
    }

    /// The whole text of a row.
    #[track_caller]
    fn check_text(row: Value, alpaca: Option<AlpacaPrompt>, template: Option<&str>, text: &str) {
        let tokenizer = with_template(template);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rows.jsonl");
        std::fs::write(&path, row.to_string()).unwrap();
        let settings = LoadSettings { alpaca, ..LoadSettings::from(1000) };
        let data = Dataset::load(&path, &tokenizer, settings, &GOES_ON).unwrap();
        assert_eq!(tokenizer.decode(&data.rows.get(0).tokens, false).unwrap(), text);
    }
    let template = "{% if tools %}{{ tools | tojson }}{% endif %}\
                    {% for m in messages %}<|im_start|>{{ m.role }}:{{ m.content }}\
                    {% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}<|im_end|>{% endfor %}\
                    {% if add_generation_prompt %}<|im_start|>assistant:{% endif %}";
    let some = Some(template);
    let row = json!({"instruction": "i", "input": "x", "output": "o"});
    let chat = "<|im_start|>user:i\nx<|im_end|><|im_start|>assistant:o<|im_end|>";
    let text = "Below is an instruction that describes a task, paired with an input that provides \
                further context. Write a response that appropriately completes the request.\n\n\
                ### Instruction:\ni\n\n### Input:\nx\n\n### Response:\no<|im_end|>";
    check_text(row.clone(), None, some, chat);
    check_text(row.clone(), Some(AlpacaPrompt::Chat), some, chat);
    check_text(row.clone(), Some(AlpacaPrompt::Text), some, text);
    check_text(row, None, None, text);
    let bare = "Below is an instruction that describes a task. Write a response that appropriately \
                completes the request.\n\n### Instruction:\ni\n\n### Response:\no<|im_end|>";
    check_text(json!({"instruction": "i", "input": "", "output": "o"}), None, None, bare);
    // Arguments given as JSON text become objects; bare functions are wrapped.
    let call = json!({"name": "f", "arguments": "{\"a\": 1}"});
    let tools = json!([{"name": "f", "parameters": {}}]).to_string();
    let turns = json!([
        {"from": "human", "value": "u"}, {"from": "function_call", "value": call.to_string()},
        {"from": "observation", "value": "r"}, {"from": "gpt", "value": "g"}
    ]);
    check_text(
        json!({"conversations": turns, "tools": tools}),
        None,
        some,
        "[{\"type\": \"function\", \"function\": {\"name\": \"f\", \"parameters\": {}}}]\
         <|im_start|>user:u<|im_end|><|im_start|>assistant:{\"name\": \"f\", \"arguments\": {\"a\": 1}}\
         <|im_end|><|im_start|>tool:r<|im_end|><|im_start|>assistant:g<|im_end|>",
    );
}

/// A Parquet file of pyarrow gives the same rows as the JSON lines.
#[test]
fn parquet_is_read_as_json_lines() {
    let chatml = tokenizer("chatml");
    let load = |name: &str| {
        let path = golden(&format!("data/{name}"));
        Dataset::load_split(&path, &chatml, 1000, &GOES_ON).unwrap()
    };
    let (lines, table) = (load("rows.jsonl"), load("rows.parquet"));
    assert!(lines.train.rows.iter().eq(table.train.rows.iter()));
    assert_eq!(lines.train.rows.len() + lines.held_out.unwrap().rows.len(), 40);
    assert_eq!(lines.train.checks, table.train.checks);
    let rows = |bytes: &[u8]| -> Vec<Value> {
        let lines = std::str::from_utf8(bytes).unwrap().lines();
        let mut rows: Vec<Value> = lines.map(|line| serde_json::from_str(line).unwrap()).collect();
        rows.iter_mut().for_each(Value::sort_all_objects);
        rows
    };
    let held_out = rows(&table.held_out_lines);
    assert!(!held_out.is_empty());
    assert_eq!(held_out, rows(&lines.held_out_lines));
}

/// Cached tokens equal those in memory, and check results are cached too.
#[test]
fn tokens_are_cached_on_disk() {
    let folder = tempfile::tempdir().unwrap();
    let path = golden("data/rows.jsonl");
    let cache = Cache { folder: folder.path().join("cache"), from_bytes: 1 };
    let settings = LoadSettings { cache: Some(cache.clone()), ..LoadSettings::from(90) };
    let chatml = tokenizer("chatml");
    let folders = || {
        let entries = std::fs::read_dir(&cache.folder).unwrap().map(|entry| entry.unwrap().path());
        entries.filter(|path| path.is_dir()).collect::<Vec<_>>()
    };
    for time in 0..2 {
        for (in_memory, on_disk) in [
            (
                Dataset::load(&path, &chatml, 90, &GOES_ON).unwrap(),
                Dataset::load(&path, &chatml, settings.clone(), &GOES_ON).unwrap(),
            ),
            (
                Dataset::load_split(&path, &chatml, 90, &GOES_ON).unwrap().train,
                Dataset::load_split(&path, &chatml, settings.clone(), &GOES_ON).unwrap().train,
            ),
        ] {
            assert!(in_memory.rows.iter().eq(on_disk.rows.iter()), "{time}");
            assert_eq!(in_memory.report, on_disk.report);
            assert_eq!(in_memory.checks, on_disk.checks);
            assert!(in_memory.checks.findings.contains_key(&Check::Cut));
            assert_eq!(in_memory.sha256, on_disk.sha256);
            assert_eq!(in_memory.tokens_sha256, on_disk.tokens_sha256);
        }
        assert_eq!(folders().len(), 2);
    }
    let (in_memory, on_disk) = (
        Dataset::load_split(&path, &chatml, 90, &GOES_ON).unwrap(),
        Dataset::load_split(&path, &chatml, settings.clone(), &GOES_ON).unwrap(),
    );
    assert_eq!(&*in_memory.held_out_lines, &*on_disk.held_out_lines);
    let examples = |data: Option<Dataset>| data.unwrap().rows.iter().collect::<Vec<_>>();
    assert_eq!(examples(in_memory.held_out), examples(on_disk.held_out));
    // Other settings, templates and tokenizers use other folders.
    let other = LoadSettings { max_length: 91, ..settings.clone() };
    Dataset::load(&path, &chatml, other, &GOES_ON).unwrap();
    let bos = &tokenizer("bos");
    Dataset::load(&path, bos, settings.clone(), &GOES_ON).unwrap();
    assert_eq!(folders().len(), 4);

    for folder in folders() {
        let rows = folder.join("train.rows");
        let mut bytes = std::fs::read(&rows).unwrap();
        bytes[9] ^= 1;
        std::fs::write(&rows, bytes).unwrap();
    }
    let error = Dataset::load(&path, &chatml, settings, &GOES_ON).unwrap_err().to_string();
    assert!(
        error.contains("train.rows: has changed since it was written; remove its folder"),
        "{error}"
    );
}

/// One row per defect, among valid rows: exactly these are found, at their lines.
#[test]
fn checks_find_each_defect_and_nothing_else() {
    /// Checks rows against their expected findings.
    fn check(tokenizer: &Tokenizer, rows: &[(Value, &[Check])]) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rows.jsonl");
        let values: Vec<Value> = rows.iter().map(|(row, _)| row.clone()).collect();
        std::fs::write(&path, lines(&values)).unwrap();
        let compared = rows[0].0.get("chosen").is_some();
        let model = Some(ModelLimits { window: 400, vocab_size: tokenizer.vocab_size() - 1 });
        let found = if compared {
            let limits = LengthLimits { max_length: 100, when_long: WhenTooLong::Cut };
            let settings = ComparisonSettings { model, ..limits.into() };
            let kind = ComparisonKind::Pairs;
            Comparisons::examine(&path, tokenizer, &settings, kind, &GOES_ON).unwrap().checks
        } else {
            let settings = LoadSettings { model, ..LoadSettings::from(100) };
            Dataset::examine(&path, tokenizer, &settings, &GOES_ON).unwrap().checks
        };
        let mut expected: Vec<(Check, u64)> = Vec::new();
        for (line, (_, checks)) in (1..).zip(rows) {
            expected.extend(checks.iter().map(|check| (*check, line)));
        }
        expected.sort();
        let lines = found.findings.iter().flat_map(|(check, found)| {
            assert_eq!(found.rows as usize, found.first.len());
            found.first.iter().map(|(line, _)| (*check, *line))
        });
        assert_eq!(lines.collect::<Vec<_>>(), expected, "{:#?}", found.findings);
        let stops: Vec<Check> =
            expected.iter().map(|(check, _)| *check).filter(|check| check.stops()).collect();
        assert_eq!(found.verify(&path, &[]).is_err(), !stops.is_empty());
        found.verify(&path, &stops).unwrap();
        // All findings have file and line.
        let wrong = found.verify(&path, &[]).err().map_or(String::new(), |error| error.to_string());
        for (check, line) in &expected {
            let place = format!("rows.jsonl:{line}: ");
            let warned = found.warnings(&path, &[]).join("\n");
            let first = expected.iter().find(|(other, _)| other == check).unwrap();
            let left_out = expected.iter().any(|(check, _)| check.leaves_out());
            match check.stops() {
                true => assert!(left_out || wrong.contains(&place), "{wrong}: {place}"),
                false => assert!(warned.contains(&place) || first.1 != *line, "{warned}: {place}"),
            }
        }
    }
    let chatml = &tokenizer("chatml");
    let user = |text: &str| json!({"role": "user", "content": text});
    let said = |text: &str| json!({"role": "assistant", "content": text});
    let system = json!({"role": "system", "content": "s"});
    let talk = |messages: &[Value]| json!({ "messages": messages });
    let silent = json!({"role": "assistant", "content": "b", "train": false});
    let calls =
        json!({"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]});
    let long = "word after word ".repeat(23);
    let longer = "word after word ".repeat(99);
    use Check::*;
    check(
        chatml,
        &[
            (talk(&[system.clone(), user("a"), said("b"), user("c"), said("d")]), &[]),
            (talk(&[user("a"), calls, json!({"role": "tool", "content": "r"}), said("b")]), &[]),
            (talk(&[user("nobody answers")]), &[NothingToLearn]),
            (talk(&[user("e"), silent]), &[NothingToLearn]),
            (talk(&[user("f"), said(" ")]), &[EmptyAnswers]),
            (talk(&[said("g"), user("h"), said("i")]), &[AssistantFirst]),
            (talk(&[user("j"), said("k"), said("l")]), &[RepeatedAssistant]),
            (talk(&[user("m"), said("n"), system.clone(), user("o"), said("p")]), &[LateSystem]),
            (talk(&[user("q"), said("r"), user("s")]), &[TrailingUser]),
            (talk(&[system.clone(), user("T "), said("B"), user("c"), said("d")]), &[]),
            (talk(&[system, user(" t"), said("B"), user("c"), said("D")]), &[Duplicates]),
            (talk(&[user(&long), said("b")]), &[Cut]),
            (talk(&[user("a"), said(&longer)]), &[Cut, OverWindow]),
            (talk(&[user("a"), json!({"role": "bot", "content": "b"})]), &[UnknownRoles]),
            (
                json!({"conversations": [{"from": "narrator", "value": "x"}]}),
                &[UnknownRoles, MixedDialects],
            ),
            (json!({"text": "a text among conversations"}), &[MixedDialects]),
            (json!([1]), &[WrongRows]),
        ],
    );
    let of = |prompt: &str, completion: &str| json!({"prompt": prompt, "completion": completion});
    check(
        chatml,
        &[
            (of("a", " b"), &[]),
            (of("the rive", "r"), &[BoundaryMismatch]),
            (of("a", " "), &[EmptyAnswers]),
            (
                json!({"prompt": "a", "completion": " c", "label": true}),
                &[WrongRows, MixedDialects],
            ),
        ],
    );
    let bos = &tokenizer("bos");
    let begin = bos.token(bos.bos().unwrap()).unwrap();
    check(bos, &[(of("a", " b"), &[]), (of(&format!("{begin}{begin}a"), " c"), &[DoubledBos])]);
    let eos = chatml.eos().unwrap();
    let highest = chatml.vocab_size() - 1;
    check(
        chatml,
        &[
            (json!({"input_ids": [5, 6, 7, eos]}), &[]),
            (json!({"input_ids": [5, 6, 8]}), &[]),
            (json!({"input_ids": [5, 6, eos], "labels": [-100, -100, -100]}), &[NothingToLearn]),
            (json!({"input_ids": [5, 9, eos], "labels": [-100, 9, -100]}), &[UntrainedEnd]),
            (json!({"input_ids": [5, highest]}), &[OutOfVocabulary]),
            (json!({"input_ids": [5, 1 << 20]}), &[OutOfVocabulary]),
        ],
    );
    // A template whose answers never end, and one that rewrites earlier text.
    let endless = with_template(Some(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}\
         {% if add_generation_prompt %}[assistant]{% endif %}",
    ));
    check(&endless, &[(talk(&[user("a"), said("b")]), &[UntrainedEnd])]);
    let counts = with_template(Some(
        "{{ messages | length }}{% for m in messages %}{{ m.content }}\n{% endfor %}",
    ));
    check(&counts, &[(talk(&[user("a"), said("b"), user("c"), said("d")]), &[TemplatePrefix])]);
    let pair = |chosen: &str, rejected: &str, margin: f64| json!({"prompt": "a", "chosen": chosen, "rejected": rejected, "margin": margin});
    check(
        chatml,
        &[
            (pair(" b", " c", 1.0), &[]),
            (pair(" d", " d", 0.0), &[IdenticalPairs]),
            (pair(" e", " f", -1.0), &[WrongMargins]),
            (pair(" ", " g", 1.0), &[EmptyAnswers]),
            (pair(" B", " C", 1.0), &[Duplicates]),
            (json!({"prompt": "the rive", "chosen": "r", "rejected": "rs"}), &[BoundaryMismatch]),
            (pair(&long, " h", 1.0), &[Cut]),
            (json!({"text": "b"}), &[WrongRows, MixedDialects]),
        ],
    );
}

/// Rows of a held-out file that are also in the training file.
#[test]
fn held_out_duplicates_are_reported() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, texts: &[&str]| {
        let path = folder.path().join(name);
        let rows: Vec<Value> = texts.iter().map(|text| json!({ "text": text })).collect();
        std::fs::write(&path, lines(&rows)).unwrap();
        Dataset::load(&path, &tokenizer("chatml"), 100, &GOES_ON).unwrap()
    };
    let train = file("train.jsonl", &["one text", "another text", "a third"]);
    let mut held_out = file("held_out.jsonl", &["a new one", "A  third", "One Text"]);
    let path = Path::new("train.jsonl");
    train.hashes.report_held_out_duplicates(path, &held_out.hashes, &mut held_out.checks);
    let found = &held_out.checks.findings[&Check::HeldOutDuplicates];
    let needed = [
        (2, "is trained on: train.jsonl:3".to_string()),
        (3, "is trained on: train.jsonl:1".into()),
    ];
    assert_eq!(found.first, needed);
}

#[test]
fn the_report_counts_rows_and_tokens() {
    let file = lines(&[
        json!({"input_ids": [5, 6, 7, 8, 9]}),
        json!({"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, -100, -100, 9]}),
        json!({"input_ids": [5, 6, 7]}),
        json!({"prompt": "the rive", "completion": "r"}),
    ]);
    let file = [b"\xef\xbb\xbf\n".as_slice(), &file].concat();
    let data = load(&file, &tokenizer("chatml"), 4).unwrap();
    let report = "4 rows, 11 tokens (7 learned), longest 5; 2 truncated, 0 split into 0, \
                  1 with nothing to learn, 1 boundary mismatches";
    assert_eq!(data.report.to_string(), report);
    let places: Vec<_> = data.examples.iter().map(|e| (e.row, e.line)).collect();
    assert_eq!(places, [(0, 2), (2, 4), (3, 5)]);
    assert_eq!(data.examples[0].tokens, [5, 6, 7, 8]);
    assert_eq!(
        serde_json::to_value(&data.report).unwrap(),
        json!({"rows": 4, "tokens": 11, "learned_tokens": 7, "truncated": 2, "split": 0,
               "pieces": 0, "nothing_to_learn": 1, "boundary_mismatches": 1, "longest": 5})
    );
}

/// A text longer than an example is split; other rows are truncated.
#[test]
fn long_texts_are_split_and_other_rows_truncated() {
    let text = "The ferryman mends his nets by the river until the road divides.";
    let rows = [
        json!({"text": text}),
        json!({"prompt": text, "completion": " And the ferryman rings the bell again."}),
        json!({"input_ids": vec![7; 60]}),
        json!({"text": "short"}),
    ];
    for name in ["chatml", "bos"] {
        let tokenizer = &tokenizer(name);
        let load = |max_length| load(&lines(&rows), tokenizer, max_length).unwrap();
        let whole = load(1000).examples.swap_remove(0).tokens;
        // The context token that each piece begins with is not learned.
        let context = |before: u32| if name == "bos" { tokenizer.bos().unwrap() } else { before };
        for most in (2..10).chain([whole.len() - 1, whole.len()]) {
            let data = load(most);
            let pieces: Vec<&Example> = data.examples.iter().filter(|e| e.row == 0).collect();
            let mut joined = pieces[0].tokens.clone();
            for piece in &pieces[1..] {
                assert_eq!(piece.tokens[0], context(*joined.last().unwrap()), "{name} {most}");
                joined.extend(&piece.tokens[1..]);
            }
            assert_eq!(joined, whole, "{name} {most}");
            for piece in &pieces {
                assert!(piece.tokens.len() <= most, "{name} {most}");
                assert!(!piece.learned[0] && piece.learned[1..].iter().all(|&l| l));
            }
            // Other rows: one piece each, or none if no learned token is left.
            let others = data.examples.iter().filter(|e| e.row != 0 && e.row != 3);
            assert!(others.clone().all(|e| e.tokens.len() <= most && e.start == 0));
            assert!(others.clone().is_sorted_by(|a, b| a.row < b.row), "{name} {most}");

            let batch = Batch::new(&data.examples, &[(0..data.examples.len()).collect()]);
            let keys: HashSet<_> = batch.keys.iter().collect();
            assert_eq!(keys.len(), batch.tokens.len(), "{name} {most}: keys are unique");
            let longer = data.examples.iter().filter(|e| e.start > 0);
            let split = longer.map(|e| e.row).collect::<HashSet<_>>();
            let report = &data.report;
            assert_eq!((report.rows, report.split), (4, split.len() as u64), "{name} {most}");
            let of_split = data.examples.iter().filter(|e| split.contains(&e.row)).count();
            assert_eq!(report.pieces, of_split as u64, "{name} {most}");
        }
    }
}

#[test]
fn a_prompt_stays_in_one_part_of_the_split() {
    let user = |text: &str| json!({"role": "user", "content": text});
    let rows: Vec<Value> = (0..400)
        .map(|i| {
            let prompt = format!("What is {}?", i / 2);
            let changed = format!("  what IS\n{}? ", i / 2);
            match i % 4 {
                0 => json!({"messages": [{"role": "system", "content": "s"}, user(&prompt), {"role": "assistant", "content": "a"}]}),
                1 => json!({"prompt": changed, "completion": "b"}),
                2 => json!({"prompt": [user(&prompt)], "completion": [{"role": "assistant", "content": "a"}]}),
                _ => json!({"text": changed}),
            }
        })
        .collect();
    let held: Vec<bool> = rows
        .iter()
        .map(|row| is_held_out(&Row::parse(row.to_string().as_bytes()).unwrap()))
        .collect();
    assert!(held.chunks(2).all(|pair| pair[0] == pair[1]));
    // The same in Python: sha256(" ".join(prompt.lower().split()).encode()).digest()[0] % 10 == 0.
    let places: Vec<usize> = (0..200).filter(|&i| held[2 * i]).collect();
    assert_eq!(
        places,
        [
            18, 34, 54, 57, 61, 62, 79, 82, 95, 109, 112, 114, 117, 134, 150, 154, 173, 179, 185,
            191, 197
        ]
    );

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rows.jsonl");
    // Irregular spacing, carriage returns, no final newline: the lines are kept byte for byte.
    let file = rows.iter().map(|row| format!(" {row}\t\r\n")).collect::<String>();
    std::fs::write(&path, file.trim_end()).unwrap();
    let split = Dataset::load_split(&path, &tokenizer("chatml"), 100, &GOES_ON).unwrap();
    let held_out = split.held_out.unwrap();
    let row_of = |e: Example| e.row as usize;
    assert!(split.train.rows.iter().map(row_of).all(|row| !held[row]));
    assert!(held_out.rows.iter().map(row_of).all(|row| held[row]));
    assert_eq!(held_out.report.rows as usize, held.iter().filter(|&&h| h).count());
    assert_eq!(split.train.report.rows + held_out.report.rows, 400);
    let expected: String =
        file.split_inclusive('\n').zip(&held).filter(|(_, h)| **h).map(|(l, _)| l).collect();
    assert_eq!(String::from_utf8(split.held_out_lines.to_vec()).unwrap(), expected);
    let whole = Dataset::load(&path, &tokenizer("chatml"), 100, &GOES_ON).unwrap();
    assert_eq!((&whole.sha256, &whole.sha256), (&split.train.sha256, &held_out.sha256));

    let one = rows.iter().zip(&held).find(|(_, h)| **h).unwrap().0;
    std::fs::write(&path, lines(std::slice::from_ref(one))).unwrap();
    let error = Dataset::load_split(&path, &tokenizer("chatml"), 100, &GOES_ON).unwrap_err();
    assert!(matches!(error, DataError::AllHeldOut { rows: 1, .. }), "{error}");
}

fn examples(lengths: &[usize]) -> Vec<Example> {
    let example = |(row, &length): (usize, &usize)| Example {
        tokens: (0..length as u32).map(|i| 1000 * row as u32 + i).collect(),
        learned: (0..length).map(|i| i > 0 && i % 3 != row % 3).collect(),
        row: row as u64,
        line: row as u64 + 1,
        start: 0,
    };
    lengths.iter().enumerate().map(example).collect()
}

fn bins(plan: &EpochPlan) -> Vec<Vec<usize>> {
    (0..plan.bins()).map(|bin| plan.bin(bin)).collect()
}

proptest! {
    #[test]
    fn an_epoch_holds_every_example_once(
        lengths in prop::collection::vec(1usize..=32, 1..300),
        seed: u64, epoch in 0u64..5, shuffle: bool, packing: bool,
        batch_size in 1usize..9, gradient_accumulation_steps in 1usize..5,
    ) {
        let examples = examples(&lengths);
        let settings = EpochSettings {
            seed, epoch, shuffle, packing, max_length: 32, batch_size, gradient_accumulation_steps,
        };
        let plan = EpochPlan::new(&examples, &settings);
        prop_assert_eq!(&plan, &EpochPlan::new(&examples, &settings));

        let bins = bins(&plan);
        let mut all = bins.concat();
        if !shuffle && !packing {
            prop_assert!(all.is_sorted(), "file order");
        }
        all.sort_unstable();
        prop_assert_eq!(all, (0..examples.len()).collect::<Vec<_>>());
        let sums: Vec<usize> = bins.iter().map(|bin| bin.iter().map(|&i| lengths[i]).sum()).collect();
        prop_assert!(sums.iter().all(|&sum| sum <= 32));
        if packing {
            // As for any fitting heuristic, no two bins could be merged. And the bound of best-fit decreasing.
            let mut sorted = sums.clone();
            sorted.sort_unstable();
            prop_assert!(sorted.len() < 2 || sorted[0] + sorted[1] > 32);
            let least = lengths.iter().sum::<usize>().div_ceil(32);
            prop_assert!(bins.len() <= 2 * least, "{} bins, at least {least}", bins.len());
        } else {
            prop_assert!(bins.iter().all(|bin| bin.len() == 1));
        }

        let micro = bins.len().div_ceil(batch_size);
        prop_assert_eq!(plan.micro_batches(), micro);
        // len_dataloader // steps + int(len_dataloader % steps > 0), as transformers counts.
        let steps = micro / gradient_accumulation_steps
            + usize::from(micro % gradient_accumulation_steps > 0);
        prop_assert_eq!(plan.steps(), steps);
        let by_step: Vec<_> = (0..steps).flat_map(|step| plan.step(step)).collect();
        let chunks: Vec<_> = bins.chunks(batch_size).map(<[_]>::to_vec).collect();
        prop_assert_eq!(&by_step, &chunks);
        prop_assert!(plan.step(steps).is_empty());

        // The number of steps is the same for every epoch, seed and file order.
        let other = EpochSettings { seed: seed ^ 1, epoch: epoch + 1, shuffle: true, ..settings };
        prop_assert_eq!(EpochPlan::new(&examples, &other).steps(), steps);
    }
}

#[test]
fn epochs_and_seeds_differ() {
    let examples = examples(&[7, 3, 12, 5, 9, 4, 16, 8, 2, 11, 6, 10, 13, 1, 14, 15]);
    for packing in [false, true] {
        let plan = |seed, epoch, shuffle| {
            let settings = EpochSettings {
                seed,
                epoch,
                shuffle,
                packing,
                max_length: 20,
                batch_size: 2,
                gradient_accumulation_steps: 1,
            };
            EpochPlan::new(&examples, &settings)
        };
        let plans = [plan(0, 0, true), plan(0, 1, true), plan(1, 0, true), plan(0, 0, false)];
        for (i, a) in plans.iter().enumerate() {
            assert!(
                plans[..i].iter().all(|b| a != b),
                "packing {packing}: plan {i} is not its own"
            );
        }
        assert_eq!(plan(0, 0, false), plan(5, 3, false), "file order needs no seed");
    }
    // Not only the order of bins differs, but also their content where lengths allow it.
    let examples = self::examples(&[5; 40]);
    let together = |epoch| -> HashSet<Vec<usize>> {
        let settings = EpochSettings {
            seed: 0,
            epoch,
            shuffle: true,
            packing: true,
            max_length: 20,
            batch_size: 1,
            gradient_accumulation_steps: 1,
        };
        bins(&EpochPlan::new(&examples, &settings))
            .into_iter()
            .map(|mut bin| {
                bin.sort();
                bin
            })
            .collect()
    };
    assert_ne!(together(0), together(1));
}

#[test]
fn best_fit_decreasing_fills_bins() {
    let examples = examples(&[4, 8, 1, 4, 2, 1]);
    let settings = EpochSettings {
        seed: 0,
        epoch: 0,
        shuffle: false,
        packing: true,
        max_length: 10,
        batch_size: 8,
        gradient_accumulation_steps: 1,
    };
    // 8 | 8 4 | 8 4+4 | 8+2 4+4 | 8+2 4+4+1 | 8+2 4+4+1+1; in the order of the file.
    assert_eq!(bins(&EpochPlan::new(&examples, &settings)), [vec![0, 2, 3, 5], vec![1, 4]]);
    // An example longer than a bin is kept.
    let settings = EpochSettings { max_length: 3, ..settings };
    assert_eq!(
        bins(&EpochPlan::new(&examples, &settings)),
        [vec![0], vec![1], vec![2, 4], vec![3], vec![5]]
    );
}

#[test]
fn a_batch_concatenates_rows() {
    let examples = [
        Example {
            tokens: vec![5, 6, 7],
            learned: vec![false, true, true],
            row: 4,
            line: 9,
            start: 0,
        },
        // A piece of a text, whose keys continue after the previous piece.
        Example { tokens: vec![8, 9], learned: vec![true, false], row: 2, line: 3, start: 70 },
        Example {
            tokens: vec![1, 2, 3, 4],
            learned: vec![false, false, false, true],
            row: 0,
            line: 1,
            start: 0,
        },
    ];
    let batch = Batch::new(&examples, &[vec![2, 0], vec![1]]);
    let expected = Batch {
        tokens: vec![1, 2, 3, 4, 5, 6, 7, 8, 9],
        positions: vec![0, 1, 2, 3, 0, 1, 2, 0, 1],
        segments: [0..4, 4..7, 7..9].map(Segment::whole).to_vec(),
        // Each target is predicted by the previous token; nothing predicts the first token of a row.
        targets: vec![(2, 4), (4, 6), (5, 7)],
        ends: vec![3, 6, 8],
        spans: vec![0..1, 1..3, 3..3],
        keys: vec![(0, 0), (0, 1), (0, 2), (0, 3), (4, 0), (4, 1), (4, 2), (2, 70), (2, 71)],
    };
    assert_eq!(batch, expected);
    assert_eq!(batch.count(), 3);
}

#[test]
fn a_group_has_its_prompt_once() {
    let mut batch = Batch::default();
    batch.push_group(&[1, 2, 3], &[&[4, 5], &[], &[6]], 9);
    batch.push_group(&[], &[&[7, 8]], 3);
    let response = |row: u64, i: u64| row + (i << 40);
    let after_prompt = |tokens| Segment { tokens, prefix: 0..3 };
    let expected = Batch {
        tokens: vec![1, 2, 3, 4, 5, 6, 7, 8],
        positions: vec![0, 1, 2, 3, 4, 3, 0, 1],
        segments: vec![
            Segment::whole(0..3),
            after_prompt(3..5),
            after_prompt(5..5),
            after_prompt(5..6),
            Segment { tokens: 6..8, prefix: 6..6 },
        ],
        // The first tokens of both responses are predicted by the last prompt token.
        targets: vec![(2, 4), (3, 5), (2, 6), (6, 8)],
        ends: vec![4, 2, 5, 7],
        spans: vec![0..2, 2..2, 2..3, 3..4],
        keys: vec![
            (9, 0),
            (9, 1),
            (9, 2),
            (response(9, 1), 3),
            (response(9, 1), 4),
            (response(9, 3), 3),
            (response(3, 1), 0),
            (response(3, 1), 1),
        ],
    };
    assert_eq!(batch, expected);
}
