//! Tokenizers and chat templates compared with Python's libraries on the same files.

use std::fs;
use std::path::Path;

use quantune::data::Row;
use quantune::text::{
    ChatTemplate, DecodeStream, Encoding, Special, TextError, Tokenizer, first_second,
};
use quantune::weights::{Checkpoint, Gguf, OwnedValue, ValueType, write_gguf};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::support::{golden, golden_json, ids, model_path};

fn open(name: &str) -> Tokenizer {
    Tokenizer::open(&Checkpoint::open(model_path(name)).unwrap()).unwrap()
}

/// A GGUF with changed metadata of a golden one.
fn changed_gguf(change: impl Fn(&mut Vec<(String, OwnedValue)>)) -> Result<Tokenizer, TextError> {
    let source = Gguf::open(model_path("llama-q8_0")).unwrap();
    let mut metadata: Vec<(String, OwnedValue)> =
        source.metadata().map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
    change(&mut metadata);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("changed.gguf");
    write_gguf(&path, &metadata, &[]).unwrap();
    Tokenizer::from_gguf(&Gguf::open(&path).unwrap())
}

/// A folder with a golden tokenizer and other files beside it.
fn folder_with(files: &[(&str, &str)]) -> Result<Tokenizer, TextError> {
    let folder = tempfile::tempdir().unwrap();
    let tokenizer = golden("model/llama-tiny/tokenizer.json");
    fs::copy(tokenizer, folder.path().join("tokenizer.json")).unwrap();
    for (name, text) in files {
        let path = folder.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    Tokenizer::from_folder(folder.path())
}

fn user(text: &str) -> Vec<Value> {
    vec![json!({"role": "user", "content": text})]
}

/// Falcon's vocabulary lacks bytes: their neighbours are not merged across them, as in llama.cpp.
#[test]
fn byte_without_token_separates_neighbours() {
    let source = Gguf::open(model_path("llama-q8_0")).unwrap();
    let merges = source.strings("tokenizer.ggml.merges").unwrap().unwrap();
    let mut merges = merges.map(|line| str::from_utf8(line).unwrap().split_once(' ').unwrap());
    let is_letter = |text: &str| text.len() == 1 && text.is_ascii();
    let (left, right) = merges.find(|(left, right)| is_letter(left) && is_letter(right)).unwrap();
    let tokenizer = changed_gguf(|metadata| {
        for (key, value) in metadata {
            if let (true, OwnedValue::Array(_, tokens)) = (key == "tokenizer.ggml.tokens", value) {
                // The character of byte 0x0B.
                let at = tokens.iter().position(|token| *token == "\u{10b}".into()).unwrap();
                tokens[at] = "gone".into();
            }
        }
    })
    .unwrap();
    let encode = |text: &str| tokenizer.encode(text, Special::Parse).unwrap();
    let parts = [tokenizer.id_of(left).unwrap(), tokenizer.id_of(right).unwrap()];
    assert_eq!(encode(&format!("{left}{right}")).len(), 1);
    assert_eq!(encode(&format!("{left}\u{b}{right}")), parts);
}

/// Ids match llama-tokenize with the same vocabulary: of overlapping special tokens the longest matches, even
/// if another begins first.
#[test]
fn longest_of_overlapping_special_tokens_matches() {
    // The last tokens, which nothing is merged from, become special ones.
    let marks = [(508, "<a><b"), (509, "<b><c>"), (510, "<b>"), (511, "<d>")];
    let tokenizer = changed_gguf(|metadata| {
        let array = |metadata: &mut Vec<(String, OwnedValue)>, key: &str| {
            let at = metadata.iter().position(|(k, _)| k == key).unwrap();
            let OwnedValue::Array(_, items) = metadata.swap_remove(at).1 else { panic!("{key}") };
            items
        };
        let mut tokens = array(metadata, "tokenizer.ggml.tokens");
        let mut types = array(metadata, "tokenizer.ggml.token_type");
        let mut merges = array(metadata, "tokenizer.ggml.merges");
        merges.truncate(merges.len() - marks.len()); // a merge a token, in one order
        for (id, text) in marks {
            tokens[id] = text.into();
            types[id] = OwnedValue::I32(if text == "<b>" { 4 } else { 3 }); // user-defined, control
        }
        metadata
            .push(("tokenizer.ggml.tokens".into(), OwnedValue::Array(ValueType::String, tokens)));
        metadata
            .push(("tokenizer.ggml.token_type".into(), OwnedValue::Array(ValueType::I32, types)));
        metadata
            .push(("tokenizer.ggml.merges".into(), OwnedValue::Array(ValueType::String, merges)));
    })
    .unwrap();
    let check = |text: &str, parsed: &[u32], as_text: &[u32]| {
        for (special, expected) in [(Special::Parse, parsed), (Special::AsText, as_text)] {
            let found = tokenizer.encode_with_offsets(text, special).unwrap();
            assert_eq!(found.ids, expected, "{text:?} {special:?}");
            assert_eq!(tokenizer.encode(text, special).unwrap(), expected);
            let parts: String = found.offsets.iter().map(|&(from, to)| &text[from..to]).collect();
            assert_eq!(parts, text);
            assert_eq!(tokenizer.decode(expected, false).unwrap(), text);
        }
    };
    check("<a><b><c>", &[30, 67, 32, 509], &[30, 67, 32, 510, 30, 69, 32]);
    check("x<a><b><d>y", &[90, 508, 32, 511, 91], &[90, 30, 67, 32, 510, 30, 70, 32, 91]);
    check("<a><b><b><c>", &[508, 32, 509], &[30, 67, 32, 510, 510, 30, 69, 32]);
    check("<b><c><a><b", &[509, 508], &[510, 30, 69, 32, 30, 67, 32, 30, 68]);
    check("", &[], &[]);
}

#[test]
fn ids_and_offsets_match_python_tokenizers() {
    let golden = golden_json("text/tokens.json");
    let texts = golden["texts"].as_array().unwrap();
    for name in ["llama-tiny", "qwen2-tiny"] {
        let (tokenizer, golden) = (open(name), &golden[name]);
        for (i, text) in texts.iter().enumerate() {
            let text = text.as_str().unwrap();
            let parsed = ids(&golden["parsed"][i]);
            let offsets = golden["offsets"][i].as_array().unwrap();
            let offsets = offsets.iter().map(ids).map(|o| (o[0] as usize, o[1] as usize));
            let encoding = Encoding { ids: parsed.clone(), offsets: offsets.collect() };
            let found = tokenizer.encode_with_offsets(text, Special::Parse).unwrap();
            assert_eq!(found, encoding, "{name} {text:?}");
            assert_eq!(tokenizer.encode(text, Special::Parse).unwrap(), parsed);
            let as_text = tokenizer.encode(text, Special::AsText).unwrap();
            assert_eq!(as_text, ids(&golden["as_text"][i]), "{name} {text:?}");
            assert_eq!(tokenizer.decode(&as_text, false).unwrap(), text);
        }
    }
}

/// The golden folders pre-tokenize like these GGUFs.
#[test]
fn a_gguf_and_a_folder_with_one_vocabulary_agree() {
    let golden = golden_json("text/tokens.json");
    for (gguf, folder) in [("llama-q8_0", "llama-tiny"), ("qwen2-mix", "qwen2-tiny")] {
        let (gguf, folder) = (open(gguf), open(folder));
        for text in golden["texts"].as_array().unwrap() {
            let text = text.as_str().unwrap();
            for special in [Special::Parse, Special::AsText] {
                let found = gguf.encode_with_offsets(text, special).unwrap();
                assert_eq!(found, folder.encode_with_offsets(text, special).unwrap(), "{text:?}");
            }
        }
        assert_eq!(
            (gguf.bos(), gguf.eos(), gguf.pad(), gguf.adds_bos(), gguf.vocab_size()),
            (folder.bos(), folder.eos(), folder.pad(), folder.adds_bos(), folder.vocab_size())
        );
        for id in 0..gguf.vocab_size() as u32 {
            assert_eq!(gguf.token(id), folder.token(id));
            assert_eq!(gguf.is_special(id), folder.is_special(id));
            assert_eq!(gguf.is_end_of_generation(id), folder.is_end_of_generation(id));
            assert_eq!(gguf.id_of(&gguf.token(id).unwrap()), Some(id));
        }
        let prompt = |t: &Tokenizer| t.chat_template().unwrap().render(&user("Hi"), None, true);
        assert_eq!(prompt(&gguf).unwrap(), prompt(&folder).unwrap());
    }
}

#[test]
fn special_tokens_have_their_roles() {
    let tokenizer = open("llama-q8_0");
    assert_eq!(tokenizer.bos(), Some(1));
    assert_eq!(tokenizer.eos(), Some(2));
    assert_eq!(tokenizer.token(2).as_deref(), Some("<|im_end|>"));
    let flags = |id| (tokenizer.is_special(id), tokenizer.is_end_of_generation(id));
    assert_eq!(
        [0, 1, 2, 3].map(flags),
        [(true, true), (true, false), (true, true), (false, false)]
    );
    assert_eq!(tokenizer.decode(&[1, 36, 2], true).unwrap(), "B");
    assert_eq!(tokenizer.decode(&[1, 36, 2], false).unwrap(), "<|im_start|>B<|im_end|>");
    let error = tokenizer.decode(&[512], false).unwrap_err().to_string();
    assert_eq!(error, "tokenizer: no token 512 in a vocabulary of 512");
}

#[test]
fn bos_is_added_once_and_only_if_needed() {
    assert_eq!(open("llama-q8_0").with_bos(vec![5]), [5]);
    let adding = changed_gguf(|metadata| {
        set(metadata, "tokenizer.ggml.add_bos_token", OwnedValue::Bool(true));
    });
    let adding = adding.unwrap();
    assert!(adding.adds_bos());
    assert_eq!(adding.encode("B", Special::Parse).unwrap(), [36]);
    assert_eq!(adding.with_bos(vec![5]), [1, 5]);
    assert_eq!(adding.with_bos(vec![1, 5]), [1, 5]);
    assert_eq!(adding.with_bos(Vec::new()), [1]);
}

fn set(metadata: &mut Vec<(String, OwnedValue)>, key: &str, value: OwnedValue) {
    metadata.retain(|(k, _)| k != key);
    metadata.push((key.into(), value));
}

/// Streaming gives the same text as decoding at once, without partial characters.
#[test]
fn a_stream_never_splits_a_character() {
    let tokenizer = open("llama-q8_0");
    let text = "naïve 日本語 🦙👩‍🚀 e\u{301}<|im_end|>.";
    let ids = tokenizer.encode(text, Special::Parse).unwrap();
    assert!(ids.len() > text.chars().count(), "characters of several tokens are wanted here");
    for skip_special in [false, true] {
        let mut stream: DecodeStream = tokenizer.decode_stream(skip_special);
        let mut streamed = String::new();
        for &id in &ids {
            let piece = stream.push(id).unwrap();
            assert!(piece.as_ref().is_none_or(|p| !p.is_empty() && !p.contains('\u{fffd}')));
            streamed += &piece.unwrap_or_default();
        }
        assert_eq!(stream.finish().unwrap(), "");
        assert_eq!(streamed, tokenizer.decode(&ids, skip_special).unwrap());
    }
    let llama = tokenizer.encode("🦙", Special::AsText).unwrap();
    let mut stream = tokenizer.decode_stream(false);
    assert_eq!(stream.push(llama[0]).unwrap(), None);
    assert_eq!(stream.finish().unwrap(), "\u{fffd}");
}

#[test]
fn templates_match_transformers() {
    let golden = golden_json("text/templates.json");
    let special: Vec<(&str, Option<&str>)> = golden["special"]
        .as_object()
        .unwrap()
        .iter()
        .map(|(name, token)| (&**name, token.as_str()))
        .collect();
    let mut wrong = Vec::new();
    for case in golden["cases"].as_array().unwrap() {
        let name = case["template"].as_str().unwrap();
        let source = golden["templates"][name].as_str().unwrap();
        let template = ChatTemplate::new(source, None, &special).unwrap();
        let chat = &golden["chats"][case["chat"].as_str().unwrap()];
        let messages = chat["messages"].as_array().unwrap();
        let tools = Some(&chat["tools"]).filter(|tools| !tools.is_null());
        let prompt = case["add_generation_prompt"].as_bool().unwrap();
        let found = template.render(messages, tools, prompt);
        let title = format!("{name}, {}, {prompt}", case["chat"]);
        match (found, case["text"].as_str()) {
            (Ok(found), Some(text)) if found == text => {}
            (Err(TextError::Template { line, reason }), None) => {
                let words = case["error"].as_str().unwrap();
                assert!(line > 0, "{title}");
                assert!(name != "raise" || reason == words, "{title}: {reason}");
            }
            (found, text) => wrong.push(format!("{title}\n  found {found:?}\n needed {text:?}")),
        }
        let spans = template.render_with_generation_spans(messages, tools);
        match case.get("spans").filter(|_| !prompt) {
            Some(needed) => {
                let (text, spans) = spans.unwrap().unwrap();
                assert_eq!(text, case["text"].as_str().unwrap());
                let found: Vec<_> =
                    spans.iter().map(|span| json!([span.start, span.end])).collect();
                assert_eq!(&json!(found), needed, "{title}");
            }
            None if name != "generation" => assert!(matches!(spans, Ok(None)), "{title}"),
            None => {}
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Templates of published models on data rows: from the line to the text.
#[test]
fn real_templates_match_transformers() {
    let golden = golden_json("text/real_templates.json");
    let special: Vec<(&str, Option<&str>)> = golden["special"]
        .as_object()
        .unwrap()
        .iter()
        .map(|(name, token)| (&**name, token.as_str()))
        .collect();
    let (mut wrong, mut whole) = (Vec::new(), 0);
    for case in golden["cases"].as_array().unwrap() {
        let name = case["template"].as_str().unwrap();
        let source = golden["templates"][name]["text"].as_str().unwrap();
        let mut template = ChatTemplate::new(source, None, &special).unwrap();
        template.set_now(first_second(golden["today"].as_str().unwrap()).unwrap());
        if let Some(variables) = case.get("variables") {
            template.set_variables(variables.as_object().unwrap()).unwrap();
        }
        let number = case["row"].as_u64().unwrap() as usize;
        let row = Row::parse(golden["rows"][number].to_string().as_bytes()).unwrap();
        let Row::Messages { messages, tools } = row else { panic!("row {number}") };
        let messages: Vec<Value> = messages.into_iter().map(|message| message.value).collect();
        let prompt = case["add_generation_prompt"].as_bool().unwrap();
        let found = template.render(&messages, tools.as_ref(), prompt);
        let same = match &found {
            Ok(text) => {
                let sha256: String =
                    Sha256::digest(text).iter().take(8).map(|b| format!("{b:02x}")).collect();
                whole += u64::from(case["text"].is_string());
                let of_whole = case["text"].as_str().is_none_or(|needed| needed == text);
                of_whole && case["bytes"] == text.len() && case["sha256"] == *sha256
            }
            Err(TextError::Template { reason, .. }) => case["error"] == **reason,
            Err(_) => false,
        };
        if !same {
            wrong.push(format!("{name}, row {number}: found {found:?}, needed {case}"));
        }
    }
    assert!(wrong.is_empty(), "{} wrong: {}", wrong.len(), wrong[0]);
    assert!(whole > 70, "{whole} texts are there whole");
}

#[test]
fn numbers_keep_their_type_in_templates() {
    let template = ChatTemplate::new("{{ messages[0].a + 1 }} {{ messages[0].b * 2 }}", None, &[]);
    let message: Value = serde_json::from_str(r#"{"a": 41, "b": 1.25}"#).unwrap();
    assert_eq!(template.unwrap().render(&[message], None, false).unwrap(), "42 2.5");
}

#[test]
fn tool_template_is_used_with_tools() {
    let config = r#"{"chat_template": [{"name": "default", "template": "plain"},
                     {"name": "tool_use", "template": "{{ tools | length }} tools"}]}"#;
    let tokenizer = folder_with(&[("tokenizer_config.json", config)]).unwrap();
    let template = tokenizer.chat_template().unwrap();
    assert_eq!(template.render(&[], None, false).unwrap(), "plain");
    assert_eq!(template.render(&[], Some(&json!([{}, {}])), false).unwrap(), "2 tools");
}

#[test]
fn folder_matches_transformers() {
    let tokenizer = folder_with(&[
        (
            "tokenizer_config.json",
            r#"{"bos_token": {"content": "<|im_start|>", "lstrip": false}, "eos_token": "B",
                "pad_token": null, "add_bos_token": true, "chat_template": "from the config"}"#,
        ),
        ("chat_template.jinja", "{{ bos_token }}from the file{{ pad_token }}"),
        ("generation_config.json", r#"{"eos_token_id": [7, 8]}"#),
        ("config.json", r#"{"eos_token_id": 9, "rope_theta": 1e4}"#),
    ]);
    let tokenizer = tokenizer.unwrap();
    assert_eq!((tokenizer.bos(), tokenizer.eos(), tokenizer.pad()), (Some(1), Some(36), None));
    assert!(tokenizer.adds_bos());
    let ends: Vec<u32> = (0..512).filter(|&id| tokenizer.is_end_of_generation(id)).collect();
    assert_eq!(ends, [0, 2, 7, 8, 9, 36]);
    let text = tokenizer.chat_template().unwrap().render(&[], None, false).unwrap();
    assert_eq!(text, "<|im_start|>from the file");
    assert!(folder_with(&[]).unwrap().chat_template().is_none());
}

fn refused(found: Result<Tokenizer, TextError>, words: &str) {
    let error = found.map(|_| ()).unwrap_err().to_string();
    assert!(error.contains(words), "{error:?} says nothing of {words:?}");
    assert!(!error.contains('\n'), "{error:?} is more than a line");
}

#[test]
fn invalid_tokenizers_are_errors() {
    let gguf = |key: &'static str, value: OwnedValue| {
        changed_gguf(move |metadata| set(metadata, key, value.clone()))
    };
    let string = |text: &str| OwnedValue::String(text.into());
    let without = |key: &'static str| changed_gguf(|metadata| metadata.retain(|(k, _)| k != key));
    refused(gguf("tokenizer.ggml.model", string("bert")), "\"bert\", needed \"gpt2\"");
    refused(gguf("tokenizer.ggml.model", string("llama")), "tokenizer.ggml.scores");
    refused(gguf("tokenizer.ggml.pre", string("mystery")), "\"mystery\", needed one of gpt-2,");
    refused(without("tokenizer.ggml.pre"), "no tokenizer.ggml.pre");
    refused(without("tokenizer.ggml.model"), "tokenizer.ggml.model");
    refused(without("tokenizer.ggml.tokens"), "tokenizer.ggml.tokens");
    refused(without("tokenizer.ggml.merges"), "tokenizer.ggml.merges");
    refused(gguf("tokenizer.ggml.eos_token_id", OwnedValue::U32(512)), "an id below 512");
    refused(gguf("tokenizer.chat_template", string("\n{% if %}")), "chat template, line 2");
    refused(folder_with(&[("tokenizer.json", "{}")]), "tokenizer.json");
    refused(folder_with(&[("tokenizer_config.json", "[]")]), "not a JSON object");
    refused(folder_with(&[("tokenizer_config.json", r#"{"eos_token": 2}"#)]), "eos_token is 2");
    refused(folder_with(&[("config.json", r#"{"eos_token_id": "x"}"#)]), "needed ids");
    refused(Tokenizer::from_folder(Path::new("/nowhere")), "no tokenizer.json");
}

/// SentencePiece vocabularies in GGUFs: 500 texts id for id as llama.cpp has them, and back to text.
#[test]
fn sentencepiece_ids_match_llama_cpp() {
    let shared = golden_json("text/sentencepiece/prefixed.json");
    let texts: Vec<&str> =
        shared["texts"].as_array().unwrap().iter().map(|text| text.as_str().unwrap()).collect();
    assert_eq!(texts.len(), 500);
    for name in ["prefixed", "plain"] {
        let file = Gguf::open(golden(&format!("text/sentencepiece/{name}.gguf"))).unwrap();
        let tokenizer = Tokenizer::from_gguf(&file).unwrap();
        assert_eq!(
            (tokenizer.bos(), tokenizer.eos(), tokenizer.adds_bos()),
            (Some(1), Some(2), true)
        );
        let json = golden_json(&format!("text/sentencepiece/{name}.json"));
        let (parsed, as_text) = (&json["ids"], &json["as_text"]);
        for (i, text) in texts.iter().enumerate() {
            let needed = ids(&parsed[i]);
            let found = tokenizer.encode(text, Special::Parse).unwrap();
            assert_eq!(found, needed, "{name} {i}: {text:?}");
            let needed = if as_text[i].is_null() { needed } else { ids(&as_text[i]) };
            let found = tokenizer.encode(text, Special::AsText).unwrap();
            assert_eq!(found, needed, "{name} {i} as text: {text:?}");
            // Unknown characters come back through their bytes. A space that stands for itself does not.
            if !text.contains(['<', '\u{2581}']) {
                assert_eq!(&tokenizer.decode(&found, false).unwrap(), text, "{name} {i}");
            }
        }
    }
}
