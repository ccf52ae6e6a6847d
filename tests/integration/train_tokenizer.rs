//! Trained tokenizers compared with Python's tokenizers library on the same text.

use std::path::Path;

use proptest::prelude::*;
use quantune::text::{PreTokenizerKind, SPECIAL_TOKENS, Special, Tokenizer, TokenizerTrainer};
use serde_json::Value;

use crate::binary::{Lab, error, every_flag, last_json, quantune, strings};
use crate::support::{golden_json, ids};

fn train(text: &str, vocab_size: usize, cut: PreTokenizerKind, folder: &Path) -> Tokenizer {
    let mut trainer = TokenizerTrainer::new(vocab_size, cut).unwrap();
    trainer.add(&[text]).unwrap();
    trainer.train().unwrap().write(folder).unwrap();
    Tokenizer::from_folder(folder).unwrap()
}

/// A tokenizer trained on the golden text, and its folder.
fn golden_tokenizer(cut: PreTokenizerKind) -> (Tokenizer, tempfile::TempDir) {
    let golden = golden_json("text/trained.json");
    let folder = tempfile::tempdir().unwrap();
    let size = golden["vocab_size"].as_u64().unwrap() as usize;
    let tokenizer = train(golden["text"].as_str().unwrap(), size, cut, folder.path());
    (tokenizer, folder)
}

#[test]
fn trained_tokenizer_matches_python() {
    let golden = golden_json("text/trained.json");
    let texts = golden_json("text/tokens.json")["texts"].take();
    for cut in PreTokenizerKind::ALL {
        let needed = &golden["cuts"][cut.name()];
        let (tokenizer, folder) = golden_tokenizer(cut);
        let json = std::fs::read(folder.path().join("tokenizer.json")).unwrap();
        let json: Value = serde_json::from_slice(&json).unwrap();
        for key in needed["tokenizer"].as_object().unwrap().keys() {
            assert!(json[key] == needed["tokenizer"][key], "{cut:?}: {key} is another");
        }
        for (i, text) in texts.as_array().unwrap().iter().enumerate() {
            let text = text.as_str().unwrap();
            for (special, key) in [(Special::Parse, "parsed"), (Special::AsText, "as_text")] {
                let found = tokenizer.encode(text, special).unwrap();
                assert_eq!(found, ids(&needed[key][i]), "{cut:?} {special:?} {text:?}");
            }
        }
    }
}

/// The order of texts and their split into calls do not matter.
#[test]
fn trained_tokenizer_depends_only_on_word_counts() {
    let golden = golden_json("text/trained.json");
    let lines: Vec<&str> = golden["text"].as_str().unwrap().split_inclusive('\n').collect();
    let json = |chunks: &[Vec<&str>]| {
        let mut trainer = TokenizerTrainer::new(320, PreTokenizerKind::Smollm).unwrap();
        chunks.iter().for_each(|chunk| trainer.add(chunk).unwrap());
        let trained = trainer.train().unwrap();
        let folder = tempfile::tempdir().unwrap();
        trained.write(folder.path()).unwrap();
        (trained.report, std::fs::read_to_string(folder.path().join("tokenizer.json")).unwrap())
    };
    let (report, whole) = json(std::slice::from_ref(&lines));
    assert_eq!((report.vocab_size, report.bytes), (320, lines.concat().len() as u64));
    assert!(report.bytes_per_token > 1.2, "{report:?}");
    let backwards: Vec<Vec<&str>> = lines.iter().rev().map(|line| vec![*line]).collect();
    assert!(json(&backwards) == (report, whole));
}

#[test]
fn special_tokens_end_documents_and_turns() {
    let (tokenizer, folder) = golden_tokenizer(PreTokenizerKind::Smollm);
    let id = |token| tokenizer.id_of(token);
    assert_eq!(SPECIAL_TOKENS.map(id), [Some(0), Some(1), Some(2)]);
    assert_eq!((tokenizer.bos(), tokenizer.eos(), tokenizer.pad()), (Some(0), Some(0), Some(0)));
    assert!(!tokenizer.adds_bos());
    let ends: Vec<u32> = (0..387).filter(|&id| tokenizer.is_end_of_generation(id)).collect();
    assert_eq!(ends, [0, 2]);
    let turn = serde_json::json!({"role": "user", "content": "Hi"});
    let text = tokenizer.chat_template().unwrap().render(&[turn], None, true).unwrap();
    assert_eq!(text, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n");
    let second = TokenizerTrainer::new(300, PreTokenizerKind::Gpt2).map(|mut trainer| {
        trainer.add(&["some text"]).unwrap();
        trainer.train().unwrap().write(folder.path()).unwrap_err().to_string()
    });
    assert!(second.unwrap().ends_with("has a tokenizer.json, needed a new folder"));
}

/// Byte lengths of tokens add up to those of the text, also when tokens split characters.
fn check_round_trip(tokenizer: &Tokenizer, lengths: &[u32], text: &str) {
    let tokens = tokenizer.encode(text, Special::AsText).unwrap();
    assert_eq!(tokenizer.decode(&tokens, false).unwrap(), text);
    assert!(tokens.iter().all(|token| *token > 2), "{text:?} has special tokens");
    let bytes: u32 = tokens.iter().map(|token| lengths[*token as usize]).sum();
    assert_eq!(bytes as usize, text.len(), "{text:?}");

    let marked = format!("{text}<|im_end|>{text}<|endoftext|>");
    let parsed = tokenizer.encode(&marked, Special::Parse).unwrap();
    assert_eq!(tokenizer.decode(&parsed, false).unwrap(), marked);
    let parts: Vec<&[u32]> = parsed.split(|token| *token <= 2).collect();
    if !text.contains("<|") {
        assert_eq!(parts, [&*tokens, &tokens, &[]], "{text:?}: a mark is merged over");
    }
}

#[test]
fn any_text_round_trips() {
    for cut in PreTokenizerKind::ALL {
        let (tokenizer, _folder) = golden_tokenizer(cut);
        let lengths = tokenizer.byte_lengths();
        assert_eq!(lengths[..3], [0, 0, 0]);
        for text in ["", " ", "<|im_end|>", "\0\r\n\t", "é🚢\u{301} 日本", "\u{fffd}\u{10ffff}"]
        {
            check_round_trip(&tokenizer, &lengths, text);
        }
        proptest!(ProptestConfig::with_cases(64), |(text: String, plain in "[ a-z0-9'\n]{0,80}")| {
            check_round_trip(&tokenizer, &lengths, &text);
            check_round_trip(&tokenizer, &lengths, &plain);
        });
    }
}

#[test]
fn the_command_trains_from_files_of_all_kinds() {
    let golden = golden_json("text/trained.json");
    let text = golden["text"].as_str().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let (first, second) = text.split_at(text.find("Der").unwrap());
    std::fs::write(path("a.txt"), format!("{first}\n<|endoftext|>\n")).unwrap();
    let row = serde_json::json!({"id": 1, "text": second});
    std::fs::write(path("b.jsonl"), format!("{row}\n")).unwrap();

    let run = |data: &str, size: &str, more: &[&str]| {
        let mut args = strings(&["tokenizer", "train", "--data", &path(data), "--json"]);
        args.extend(strings(&["--vocab-size", size, "--out", &path("out")]));
        args.extend(strings(more));
        quantune(&args)
    };
    let found = last_json(&run("*.*", "400", &["--pre-tokenizer", "gpt-2"]));
    assert_eq!(found["bytes"].as_u64(), Some(text.len() as u64));
    assert_eq!(
        (found["vocab_size"].as_u64(), &found["pre_tokenizer"]),
        (Some(394), &"gpt-2".into())
    );
    let json = std::fs::read(Path::new(&path("out")).join("tokenizer.json")).unwrap();
    let json: Value = serde_json::from_slice(&json).unwrap();
    assert_eq!(json["model"], golden["cuts"]["gpt-2"]["tokenizer"]["model"]);

    let check = |data: &str, size: &str, more: &[&str], words: &str| {
        let found = error(&run(data, size, more));
        assert!(found.contains(words), "{found:?} says nothing of {words:?}");
    };
    check("*.*", "400", &[], "has a tokenizer.json, needed a new folder");
    std::fs::remove_dir_all(path("out")).unwrap();
    check("*.*", "258", &[], "a vocabulary of 258 tokens, needed at least 259");
    check("*.html", "400", &[], "no file matches");
    check("[", "400", &[], "is not a valid glob pattern");
    std::fs::write(path("c.txt"), b"fine \xff").unwrap();
    check("c.txt", "400", &[], "c.txt: byte 5 is not UTF-8");
    std::fs::write(path("c.txt"), b" \n").unwrap();
    check("c.txt", "400", &[], "no words in the text");
    assert!(!Path::new(&path("out")).exists());
}

#[test]
fn every_tokenizer_flag_changes_the_result() {
    let lab = Lab::new();
    let (text, other) = (lab.path("text.txt"), lab.path("other.txt"));
    lab.write("other.txt", &"another text of 365 words, or of 366. ".repeat(9));
    let base_args: &[(&str, &str)] = &[
        ("--data", &text),
        ("--vocab-size", "280"),
        ("--out", "OUT"),
        ("--threads", "1"),
        ("--json", ""),
    ];
    let table: &[&[(&str, &str)]] = &[
        &[("--data", &other)],
        &[("--vocab-size", "270")],
        &[("--pre-tokenizer", "gpt-2")],
        &[("--out", "OUT/elsewhere")],
        &[("--threads", "2")],
        &[("--json", "-")],
    ];
    every_flag(&["tokenizer", "train"], base_args, table, &[], &lab);
}
