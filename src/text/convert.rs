//! Conversion of tokenizers: the files of a Hugging Face folder to the keys of a GGUF, and back.
//! Properties that the target format cannot hold are errors.

use std::collections::HashMap;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::folder::{object, template_texts, text, token_text};
use super::gguf::{BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED};
use super::tokenizer::Roles;
use super::{AddedTokenSpec, TextError, Tokenizer, gguf, pre_tokenizer, sentencepiece};
use crate::weights::{Checkpoint, Gguf, OwnedValue, ValueType};

/// The files of a folder that hold its tokenizer and chat template.
pub const FILES: &[&str] = &[
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "additional_chat_templates/tool_use.jinja",
];

/// The `tokenizer.*` keys of a GGUF for a folder's tokenizer with added tokens, as llama.cpp's converter
/// writes them. Ids up to `vocab_size` without a token are marked unused.
///
/// The scores of a SentencePiece vocabulary follow the ranks of its merges, as `tokenizer.json` has no
/// scores: the order of merges is the same. Where such a tokenizer adds a space only at the beginning of a
/// text, llama.cpp also adds one after every special token.
///
/// # Errors
/// If it is neither byte-level BPE nor SentencePiece with byte fallback, has a property that no key holds,
/// or is malformed; if an added token is matched only in some places.
pub fn to_gguf(
    folder: &Path,
    vocab_size: usize,
    added: &[AddedTokenSpec],
) -> Result<Vec<(String, OwnedValue)>, TextError> {
    let path = folder.join("tokenizer.json");
    let bad = |reason: String| TextError::format(&path, reason);
    // Reads and checks all files.
    let tokenizer = super::folder::read(folder, added)?;
    tokenizer.check_found_anywhere(&path)?;
    let mut json = object(&path)?;
    put_added(&mut json, &tokenizer);
    let model = &json["model"];
    let of_sentencepiece = sentencepiece::is_model(&json);
    let unsupported = |fault: String| bad(format!("{fault}, which no GGUF key says"));
    let (kind, pre, in_front) = if of_sentencepiece {
        let in_front = sentencepiece::space_in_front(&json).map_err(unsupported)?;
        ("llama", "default", Some(in_front))
    } else {
        if let Some(fault) = inexpressible(&json) {
            return Err(unsupported(fault));
        }
        let ignore_merges = model["ignore_merges"] == true;
        let Some(pre) = tokenizer.pre_tokenizer_name(ignore_merges) else {
            let known = pre_tokenizer::known();
            return Err(bad(format!("the pre-tokenizer matches none of llama.cpp: {known}")));
        };
        ("gpt2", pre, None)
    };

    if tokenizer.vocab_size() > vocab_size {
        let (found, most) = (tokenizer.vocab_size(), vocab_size);
        return Err(bad(format!("token {} is beyond the model's {most} rows", found - 1)));
    }
    let vocabulary = Vocabulary::read(&json, vocab_size, of_sentencepiece).map_err(bad)?;
    let Vocabulary { tokens, merges, scores } = vocabulary;

    let mut keys: Vec<(String, OwnedValue)> = Vec::new();
    let mut put = |key: &str, value: OwnedValue| keys.push((format!("tokenizer.{key}"), value));
    put("ggml.model", kind.into());
    put("ggml.pre", pre.into());
    put("ggml.tokens", OwnedValue::strings(tokens.iter().map(|(token, _)| token)));
    let types = tokens.iter().map(|(_, of)| OwnedValue::I32(*of)).collect();
    put("ggml.token_type", OwnedValue::Array(ValueType::I32, types));
    match scores {
        Some(scores) => {
            let scores = scores.into_iter().map(OwnedValue::F32).collect();
            put("ggml.scores", OwnedValue::Array(ValueType::F32, scores));
        }
        None => {
            let lines = merges.iter().map(|(left, right)| format!("{left} {right}"));
            put("ggml.merges", OwnedValue::strings(lines));
        }
    }
    if let Some(in_front) = in_front {
        put("ggml.add_space_prefix", OwnedValue::Bool(in_front));
    }
    let config_path = folder.join("tokenizer_config.json");
    let config = object(&config_path)?;
    let sizes = (vocab_size, of_sentencepiece);
    for (role, id) in role_ids(folder, &tokenizer, model, &config, sizes)? {
        if let Some(id) = id {
            put(&format!("ggml.{role}_token_id"), OwnedValue::U32(id));
        }
    }
    put("ggml.add_bos_token", OwnedValue::Bool(tokenizer.adds_bos()));
    if let Some((default, tool_use)) =
        template_texts(folder, &config_path, &config["chat_template"])?
    {
        put("chat_template", default.as_str().into());
        if let Some(tool_use) = tool_use {
            put("chat_templates", OwnedValue::strings(["tool_use"]));
            put("chat_template.tool_use", tool_use.as_str().into());
        }
    }
    Ok(keys)
}

/// The vocabulary of a `tokenizer.json` as the keys of a GGUF hold it.
struct Vocabulary {
    /// Each token with its `llama_token_type`.
    tokens: Vec<(String, i32)>,
    merges: Vec<(String, String)>,
    /// Of a SentencePiece vocabulary, the score of each token.
    scores: Option<Vec<f32>>,
}

impl Vocabulary {
    /// Reads the vocabulary of a `tokenizer.json` with `vocab_size` ids, those without a token unused.
    ///
    /// # Errors
    /// With what is malformed.
    fn read(json: &Value, vocab_size: usize, of_sentencepiece: bool) -> Result<Self, String> {
        let model = &json["model"];
        let mut tokens: Vec<(String, i32)> =
            (0..vocab_size).map(|id| (format!("[PAD{id}]"), UNUSED)).collect();
        let whole = |id: &Value| id.as_u64().map(|id| id as usize).filter(|id| *id < vocab_size);
        for (token, id) in model["vocab"].as_object().into_iter().flatten() {
            let id = whole(id).ok_or_else(|| format!("token {token:?} has the id {id}"))?;
            let of = if of_sentencepiece && model["unk_token"] == **token {
                UNKNOWN
            } else if of_sentencepiece && is_byte(token) {
                BYTE
            } else {
                NORMAL
            };
            tokens[id] = (token.clone(), of);
        }
        let merges = merges(&model["merges"]).ok_or("merges are not pairs")?;
        let scores = of_sentencepiece.then(|| {
            let ids: HashMap<&str, u32> =
                tokens.iter().map(|(token, _)| token.as_str()).zip(0..).collect();
            sentencepiece::scores(&merges, &ids)
        });
        for added in json["added_tokens"].as_array().into_iter().flatten() {
            let (content, id) = (added["content"].as_str(), whole(&added["id"]));
            let (Some(token), Some(id)) = (content, id) else {
                return Err(format!("an added token is {added}"));
            };
            let of = if added["special"] != true && !looks_special(token) {
                USER_DEFINED
            } else if tokens[id].1 == UNKNOWN {
                UNKNOWN
            } else {
                CONTROL
            };
            // Such tokens are matched before spaces are escaped.
            let spaced = of_sentencepiece && of == USER_DEFINED;
            let token = if spaced { token.replace('\u{2581}', " ") } else { token.to_owned() };
            tokens[id] = (token, of);
        }
        Ok(Self { tokens, merges, scores })
    }
}

/// The ids of `ggml.{role}_token_id` for a folder's tokenizer whose model is `model`.
fn role_ids(
    folder: &Path,
    tokenizer: &Tokenizer,
    model: &Value,
    config: &Value,
    (vocab_size, of_sentencepiece): (usize, bool),
) -> Result<[(&'static str, Option<u32>); 4], TextError> {
    let unk = token_text(&config["unk_token"]).flatten();
    let unknown = model["unk_token"].as_str().filter(|_| of_sentencepiece);
    let unk = unk.or_else(|| unknown.map(str::to_owned));
    let unk = unk.and_then(|token| tokenizer.id_of(&token));
    // llama.cpp has default ids for roles that a file does not name.
    let of_model = |key: &str| -> Result<Option<u32>, TextError> {
        for name in ["config.json", "generation_config.json"] {
            let config = object(&folder.join(name))?;
            let id = match &config[key] {
                Value::Array(ids) => ids.first().and_then(Value::as_u64),
                id => id.as_u64(),
            };
            if let Some(id) = id.filter(|id| (*id as usize) < vocab_size) {
                return Ok(Some(id as u32));
            }
        }
        Ok(None)
    };
    let or_of_model = |id: Option<u32>, key| id.map_or_else(|| of_model(key), |id| Ok(Some(id)));
    Ok([
        ("bos", or_of_model(tokenizer.bos(), "bos_token_id")?),
        ("eos", or_of_model(tokenizer.eos(), "eos_token_id")?),
        ("unknown", unk),
        ("padding", or_of_model(tokenizer.pad(), "pad_token_id")?),
    ])
}

/// Inserts the tokens that were added to a tokenizer into its `tokenizer.json`.
fn put_added(json: &mut Value, tokenizer: &Tokenizer) {
    for AddedTokenSpec { text, special, normalized } in tokenizer.added() {
        let Some(id) = tokenizer.id_of(text) else { continue };
        let token = json!({
            "id": id,
            "content": text,
            "single_word": false,
            "lstrip": false,
            "rstrip": false,
            "normalized": normalized,
            "special": special,
        });
        let tokens = json.get_mut("added_tokens").and_then(Value::as_array_mut);
        let Some(tokens) = tokens else {
            json["added_tokens"] = json!([token]);
            continue;
        };
        match tokens.iter_mut().find(|known| known["id"] == id) {
            Some(known) => *known = token,
            None => tokens.push(token),
        }
    }
}

/// Inserts the tokens that were added to a tokenizer into `added_tokens_decoder` of its
/// `tokenizer_config.json`, if that has it.
fn put_decoder(config: &mut Value, tokenizer: &Tokenizer) {
    let decoder = config.get_mut("added_tokens_decoder").and_then(Value::as_object_mut);
    let Some(decoder) = decoder else { return };
    for AddedTokenSpec { text, special, normalized } in tokenizer.added() {
        let Some(id) = tokenizer.id_of(text) else { continue };
        let token = json!({
            "content": text,
            "lstrip": false,
            "normalized": normalized,
            "rstrip": false,
            "single_word": false,
            "special": special,
        });
        decoder.insert(id.to_string(), token);
    }
}

/// The score that llama.cpp's converter gives tokens that were added.
const ADDED_SCORE: f32 = -1000.0;

/// The keys of a GGUF's tokenizer that change with added tokens, up to `rows` rows of the model.
///
/// # Errors
/// If its tokenizer cannot be read.
pub fn keys_with_added_tokens(
    file: &Gguf,
    rows: usize,
    added: &[AddedTokenSpec],
) -> Result<Vec<(&'static str, OwnedValue)>, TextError> {
    let own = gguf::tokens(file)?.len();
    let (mut tokens, (len, _)) = gguf::tokens_with(file, added)?;
    tokens.extend((tokens.len()..rows).map(|id| format!("[PAD{id}]")));
    let mut types = file.i32s("tokenizer.ggml.token_type")?.unwrap_or_else(|| vec![NORMAL; own]);
    types.resize(tokens.len(), NORMAL);
    types[len..].fill(UNUSED);
    for (token, of) in tokens.iter().zip(&mut types) {
        if let Some(added) = added.iter().find(|added| added.text == *token) {
            *of = if added.special { CONTROL } else { USER_DEFINED };
        }
    }
    let mut keys = vec![("tokenizer.ggml.tokens", OwnedValue::strings(&tokens))];
    let types = types.into_iter().map(OwnedValue::I32).collect();
    keys.push(("tokenizer.ggml.token_type", OwnedValue::Array(ValueType::I32, types)));
    if let Some(mut scores) = file.f32s("tokenizer.ggml.scores")? {
        scores.resize(tokens.len(), ADDED_SCORE);
        let scores = scores.into_iter().map(OwnedValue::F32).collect();
        keys.push(("tokenizer.ggml.scores", OwnedValue::Array(ValueType::F32, scores)));
    }
    Ok(keys)
}

/// The tokenizer files to save with an adapter: those of the base with the added tokens.
///
/// # Errors
/// If the base's tokenizer cannot be read or converted.
pub fn files_for_adapter(
    checkpoint: &Checkpoint,
    tokenizer: &Tokenizer,
) -> Result<Vec<(&'static str, String)>, TextError> {
    let mut files = match checkpoint {
        Checkpoint::HuggingFace(folder) => {
            files_with_added_tokens(folder.path(), tokenizer.added())?
        }
        Checkpoint::Gguf(gguf) if gguf.str("tokenizer.ggml.model")? == Some("llama") => {
            let named = |id: Option<u32>| id.and_then(|id| tokenizer.token(id));
            let config = json!({
                "add_bos_token": tokenizer.adds_bos(),
                "bos_token": named(tokenizer.bos()),
                "eos_token": named(tokenizer.eos()),
                "pad_token": named(tokenizer.pad()),
                "clean_up_tokenization_spaces": false,
                "tokenizer_class": "PreTrainedTokenizerFast",
                "chat_template": gguf.str("tokenizer.chat_template")?,
            });
            let config = format!("{config:#}\n");
            vec![("tokenizer.json", tokenizer.to_json()?), ("tokenizer_config.json", config)]
        }
        Checkpoint::Gguf(gguf) => to_folder(gguf, tokenizer.added())?,
    };
    files.retain(|(name, _)| FILES.contains(name));
    Ok(files)
}

/// [`files`] of a folder with added tokens.
///
/// # Errors
/// If one of them cannot be read.
pub fn files_with_added_tokens(
    folder: &Path,
    added: &[AddedTokenSpec],
) -> Result<Vec<(&'static str, String)>, TextError> {
    let mut files = files(folder)?;
    if added.is_empty() {
        return Ok(files);
    }
    let tokenizer = super::folder::read(folder, added)?;
    for (name, text) in &mut files {
        let put: fn(&mut Value, &Tokenizer) = match *name {
            "tokenizer.json" => put_added,
            "tokenizer_config.json" => put_decoder,
            _ => continue,
        };
        let mut json = object(&folder.join(&**name))?;
        put(&mut json, &tokenizer);
        *text = format!("{json:#}\n");
    }
    Ok(files)
}

/// A property of a `tokenizer.json` that a GGUF of byte-level BPE cannot hold.
fn inexpressible(json: &Value) -> Option<String> {
    let model = &json["model"];
    let kind = model["type"].as_str().unwrap_or("BPE");
    if kind != "BPE" || model["vocab"].as_object().is_none() {
        return Some(format!("the model is {kind:?}, needed \"BPE\""));
    }
    if model["byte_fallback"] == true || !json["decoder"].to_string().contains("ByteLevel") {
        return Some("the BPE is not byte-level".into());
    }
    for key in ["continuing_subword_prefix", "end_of_word_suffix"] {
        if model[key].as_str().is_some_and(|part| !part.is_empty()) {
            return Some(format!("the model has {key} {}", model[key]));
        }
    }
    // llama.cpp's converter ignores NFC too: most text is in NFC.
    match json["normalizer"]["type"].as_str() {
        None | Some("NFC") => None,
        Some("Sequence") if json["normalizer"]["normalizers"] == json!([]) => None,
        Some(other) => Some(format!("the normalizer is {other:?}")),
    }
}

/// Whether the converter makes it a control token, independent of `tokenizer.json`.
fn looks_special(token: &str) -> bool {
    let within = |open: &str, close: &str| token.starts_with(open) && token.ends_with(close);
    within("<|", "|>") || within("<｜", "｜>") || ["<pad>", "<mask>"].contains(&token)
}

/// Whether a token of a SentencePiece vocabulary stands for a byte.
fn is_byte(token: &str) -> bool {
    let digits = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
    digits.is_some_and(|digits| digits.len() == 2 && u8::from_str_radix(digits, 16).is_ok())
}

/// Merges, from lines or pairs.
fn merges(merges: &Value) -> Option<Vec<(String, String)>> {
    let pair = |merge: &Value| match merge {
        Value::String(line) => {
            // A first part may itself start with a space.
            let (at, _) = line.char_indices().skip(1).find(|&(_, c)| c == ' ')?;
            Some((line[..at].to_string(), line[at + 1..].to_string()))
        }
        Value::Array(pair) => match &pair[..] {
            [Value::String(left), Value::String(right)] => Some((left.clone(), right.clone())),
            _ => None,
        },
        _ => None,
    };
    merges.as_array()?.iter().map(pair).collect()
}

/// Names and texts of the files of a folder for a GGUF's tokenizer with added tokens.
///
/// # Errors
/// If its tokenizer cannot be read, or pre-tokenizes by expressions that other implementations of
/// `tokenizer.json` do not support.
pub fn to_folder(
    file: &Gguf,
    added: &[AddedTokenSpec],
) -> Result<Vec<(&'static str, String)>, TextError> {
    let tokenizer = gguf::read(file, added)?;
    let (tokens, _) = gguf::tokens_with(file, added)?;
    let ids = gguf::ids(file, &tokens)?;
    let TokenizerParts { normalizer, pre_tokenizer, decoder, mut model, defaults } =
        tokenizer_parts(file, &ids)?;
    let roles = gguf::roles(file, defaults, &tokens, &ids)?;
    let special_tokens = gguf::special_tokens(file, &tokens, &roles, added)?;
    let types = file.i32s("tokenizer.ggml.token_type")?.unwrap_or_default();

    let filler =
        |id: usize, token: &str| types.get(id) == Some(&UNUSED) && token == format!("[PAD{id}]");
    let vocab = tokens.iter().enumerate().filter(|(id, token)| !filler(*id, token));
    let vocab: Map<String, Value> = vocab.map(|(id, token)| (token.clone(), id.into())).collect();
    model.insert("vocab".into(), vocab.into());
    let added = special_tokens.iter().map(|token| {
        json!({
            "id": token.id,
            "content": token.text,
            "single_word": false,
            "lstrip": false,
            "rstrip": false,
            "normalized": false,
            "special": token.special,
        })
    });
    let text_of = |id: Option<u32>| id.map(|id| tokens[id as usize].as_str());
    let post_processor = match text_of(roles.bos).filter(|_| roles.adds_bos) {
        None => Value::Null,
        Some(bos) => {
            let begin = json!({ "SpecialToken": { "id": bos, "type_id": 0 } });
            let sequence = |id: &str, of: usize| json!({ "Sequence": { "id": id, "type_id": of } });
            json!({
                "type": "TemplateProcessing",
                "single": [begin, sequence("A", 0)],
                "pair": [begin, sequence("A", 0), sequence("B", 1)],
                "special_tokens": { bos: { "id": bos, "ids": [roles.bos], "tokens": [bos] } },
            })
        }
    };
    let json = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added.collect::<Vec<_>>(),
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": post_processor,
        "decoder": decoder,
        "model": model,
    });

    let pretty = |value: Value| format!("{value:#}\n");
    Ok(vec![
        ("tokenizer.json", pretty(json)),
        ("tokenizer_config.json", pretty(tokenizer_config(file, &roles, &tokens)?.into())),
        (
            "generation_config.json",
            pretty(generation_config(&tokenizer, &roles, tokens.len()).into()),
        ),
    ])
}

/// The parts of a `tokenizer.json` that depend on the kind of tokenizer, its vocabulary excepted.
struct TokenizerParts {
    normalizer: Value,
    pre_tokenizer: Value,
    decoder: Value,
    model: Map<String, Value>,
    defaults: gguf::Defaults,
}

/// [`TokenizerParts`] of a GGUF whose tokens have these ids.
fn tokenizer_parts(file: &Gguf, ids: &HashMap<&str, u32>) -> Result<TokenizerParts, TextError> {
    if gguf::is_sentencepiece(file)? {
        let sentencepiece::Parts { normalizer, decoder, model } = sentencepiece::to_json(file)?;
        let (pre_tokenizer, defaults) = (Value::Null, sentencepiece::DEFAULTS);
        Ok(TokenizerParts { normalizer, pre_tokenizer, decoder, model, defaults })
    } else {
        let pre = gguf::kind(file)?;
        let pre_tokenizer = pre.to_json().ok_or_else(|| {
            TextError::format(
                file.path(),
                "its tokenizer.ggml.pre splits words in a way that no portable tokenizer.json supports",
            )
        })?;
        let decoder = json!({
            "type": "ByteLevel",
            "add_prefix_space": false,
            "trim_offsets": false,
            "use_regex": false,
        });
        let model = json!({
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": pre.ignore_merges,
            "merges": gguf::merges(file, ids)?,
        });
        let model = model.as_object().cloned().unwrap_or_default();
        let defaults = gguf::Defaults { bos: None, eos: None, adds_bos: pre.adds_bos };
        let normalizer = Value::Null;
        Ok(TokenizerParts { normalizer, pre_tokenizer, decoder, model, defaults })
    }
}

/// The `tokenizer_config.json` for a GGUF's tokenizer.
fn tokenizer_config(
    file: &Gguf,
    roles: &Roles,
    tokens: &[String],
) -> Result<Map<String, Value>, TextError> {
    let mut config = Map::new();
    config.insert("add_bos_token".into(), roles.adds_bos.into());
    for (name, id) in [
        ("bos_token", roles.bos),
        ("eos_token", roles.eos),
        ("pad_token", roles.pad),
        ("unk_token", file.u64("tokenizer.ggml.unknown_token_id")?.map(|id| id as u32)),
    ] {
        if let Some(token) = id.and_then(|id| tokens.get(id as usize)) {
            config.insert(name.into(), token.as_str().into());
        }
    }
    config.insert("clean_up_tokenization_spaces".into(), false.into());
    config.insert("tokenizer_class".into(), "PreTrainedTokenizerFast".into());
    if let Some(default) = file.str("tokenizer.chat_template")? {
        let template = match file.str("tokenizer.chat_template.tool_use")? {
            None => default.into(),
            Some(tool_use) => json!([
                { "name": "default", "template": default },
                { "name": "tool_use", "template": tool_use },
            ]),
        };
        config.insert("chat_template".into(), template);
    }
    Ok(config)
}

/// The `generation_config.json` of a tokenizer of this many tokens.
fn generation_config(tokenizer: &Tokenizer, roles: &Roles, tokens: usize) -> Map<String, Value> {
    let mut generation = Map::new();
    for (name, id) in [("bos_token_id", roles.bos), ("pad_token_id", roles.pad)] {
        if let Some(id) = id {
            generation.insert(name.into(), id.into());
        }
    }
    // EOS first, for readers that use one.
    let others = (0..tokens as u32).filter(|id| tokenizer.is_end_of_generation(*id));
    let ends: Vec<u32> =
        roles.eos.into_iter().chain(others.filter(|id| Some(*id) != roles.eos)).collect();
    match &ends[..] {
        [] => {}
        [one] => drop(generation.insert("eos_token_id".into(), (*one).into())),
        many => drop(generation.insert("eos_token_id".into(), many.into())),
    }
    generation
}

/// Names and texts of those [`FILES`] that a folder has.
///
/// # Errors
/// If one of them cannot be read.
pub fn files(folder: &Path) -> Result<Vec<(&'static str, String)>, TextError> {
    let read = |name: &&'static str| Ok(text(&folder.join(name))?.map(|text| (*name, text)));
    FILES.iter().map(read).filter_map(Result::transpose).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::Special;
    use crate::weights::write_gguf;

    fn golden(name: &str) -> std::path::PathBuf {
        let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/text/sentencepiece");
        tests.join(name)
    }

    fn read_json(name: &str) -> Value {
        serde_json::from_str(&std::fs::read_to_string(golden(name)).unwrap()).unwrap()
    }

    /// Checks that a tokenizer gives llama.cpp's ids for all texts, with special tokens parsed, or also as text.
    fn gives_llama_cpps_ids(tokenizer: &Tokenizer, name: &str, also_as_text: bool) {
        let (texts, golden) = (read_json("prefixed.json"), read_json(&format!("{name}.json")));
        for (i, text) in texts["texts"].as_array().unwrap().iter().enumerate() {
            let text = text.as_str().unwrap();
            let (parsed, as_text) = (&golden["ids"][i], &golden["as_text"][i]);
            let as_text = if as_text.is_null() { parsed } else { as_text };
            let ways = [(Special::Parse, parsed), (Special::AsText, as_text)];
            for (special, needed) in ways.into_iter().take(1 + usize::from(also_as_text)) {
                let found = tokenizer.encode(text, special).unwrap();
                assert_eq!(&json!(found), needed, "{name} {i}: {text:?} {special:?}");
            }
        }
    }

    #[test]
    fn sentencepiece_round_trips_through_a_folder() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["prefixed", "plain"] {
            let file = Gguf::open(golden(&format!("{name}.gguf"))).unwrap();
            for (name, text) in to_folder(&file, &[]).unwrap() {
                std::fs::write(folder.path().join(name), text).unwrap();
            }
            let tokenizer = Tokenizer::from_folder(folder.path()).unwrap();
            gives_llama_cpps_ids(&tokenizer, name, true);

            let keys = to_gguf(folder.path(), tokenizer.vocab_size(), &[]).unwrap();
            let path = folder.path().join("again.gguf");
            write_gguf(&path, &keys, &[]).unwrap();
            let again = Gguf::open(&path).unwrap();
            gives_llama_cpps_ids(&Tokenizer::from_gguf(&again).unwrap(), name, false);
            let tokens = |file: &Gguf| gguf::tokens(file).unwrap();
            assert_eq!(tokens(&again), tokens(&file), "{name}");
            // As in the converter, what looks like a special token becomes one.
            let types = |file: &Gguf| file.i32s("tokenizer.ggml.token_type").unwrap().unwrap();
            for ((found, needed), token) in
                types(&again).iter().zip(types(&file)).zip(tokens(&file))
            {
                let needed = if token == "<|user|>" { CONTROL } else { needed };
                assert_eq!(*found, needed, "{name}: {token}");
            }
            // Scores have the same order, where a merge gives the token.
            let scores = |file: &Gguf| file.f32s("tokenizer.ggml.scores").unwrap().unwrap();
            let (old, new) = (scores(&file), scores(&again));
            let lowest = new.iter().copied().fold(0f32, f32::min);
            let mut both: Vec<(f32, f32)> = new.into_iter().zip(old).collect();
            both.retain(|(new, _)| *new > lowest);
            both.sort_by(|a, b| b.0.total_cmp(&a.0));
            assert!(both.len() > 100 && both.is_sorted_by(|a, b| a.1 >= b.1), "{name}");
        }
    }

    #[test]
    fn unsupported_sentencepiece_options_are_errors() {
        let folder = tempfile::tempdir().unwrap();
        let file = Gguf::open(golden("prefixed.gguf")).unwrap();
        let files = to_folder(&file, &[]).unwrap();
        let path = folder.path().join("tokenizer.json");
        let json: Value = serde_json::from_str(&files[0].1).unwrap();
        let metaspace = |split: bool, scheme: &str| json!({ "type": "Metaspace", "replacement": "\u{2581}", "prepend_scheme": scheme, "split": split });
        for (normalizer, words, needed) in [
            (Value::Null, metaspace(false, "first"), Ok(true)),
            (Value::Null, metaspace(false, "never"), Ok(false)),
            (Value::Null, metaspace(true, "first"), Err("words are cut by")),
            (json!({ "type": "NFKC" }), Value::Null, Err("the normalizer does")),
            (Value::Null, Value::Null, Err("spaces do not become")),
        ] {
            let mut json = json.clone();
            (json["normalizer"], json["pre_tokenizer"]) = (normalizer, words);
            std::fs::write(&path, json.to_string()).unwrap();
            let found = to_gguf(folder.path(), 700, &[]);
            match needed {
                Ok(in_front) => {
                    let in_front = ("tokenizer.ggml.add_space_prefix", OwnedValue::Bool(in_front));
                    let keys = found.unwrap();
                    assert!(
                        keys.iter()
                            .any(|(key, value)| (&**key, value) == (in_front.0, &in_front.1))
                    );
                }
                Err(words) => {
                    let error = found.unwrap_err().to_string();
                    assert!(error.contains(words), "{error}");
                }
            }
        }
    }
}
