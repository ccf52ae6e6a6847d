//! The tokenizer of a Hugging Face folder.

use std::collections::BTreeSet;
use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use serde_json::Value;
use tokenizers::AddedToken;

use super::special_tokens::SpecialTokens;
use super::tokenizer::{Roles, eog_by_text};
use super::{AddedTokenSpec, ChatTemplate, TextError, Tokenizer};

pub(super) fn read(folder: &Path, added: &[AddedTokenSpec]) -> Result<Tokenizer, TextError> {
    let path = folder.join("tokenizer.json");
    let Some(json) = text(&path)? else {
        return Err(TextError::format(folder, "no tokenizer.json in this folder"));
    };
    let bad = |error: tokenizers::Error| TextError::format(&path, error.to_string());
    let mut inner = tokenizers::Tokenizer::from_bytes(json).map_err(bad)?;
    // `data` truncates and pads rows itself.
    inner.with_truncation(None).map_err(bad)?;
    inner.with_padding(None);
    let token = |token: &AddedTokenSpec| {
        AddedToken::from(token.text.clone(), token.special).normalized(token.normalized)
    };
    let len = |inner: &tokenizers::Tokenizer| {
        inner.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1)
    };
    let own_len = len(&inner);
    inner.add_tokens(added.iter().map(token)).map_err(bad)?;

    let config_path = folder.join("tokenizer_config.json");
    let config = object(&config_path)?;
    let named = |key: &str| -> Result<Option<String>, TextError> {
        token_text(&config[key]).ok_or_else(|| {
            TextError::format(&config_path, format!("{key} is {}, needed a token", config[key]))
        })
    };
    let (bos, eos, pad) = (named("bos_token")?, named("eos_token")?, named("pad_token")?);
    let unk = named("unk_token")?;
    let id_of = |token: &Option<String>| inner.token_to_id(token.as_ref()?);
    let roles = Roles {
        bos: id_of(&bos),
        eos: id_of(&eos),
        pad: id_of(&pad),
        adds_bos: match (&config["add_bos_token"], config["tokenizer_class"].as_str()) {
            // Only Llama's class rebuilds its post-processor from the key when it is loaded.
            (Value::Bool(adds), Some("LlamaTokenizer" | "LlamaTokenizerFast")) => *adds,
            // Else the post-processor decides: does it add BOS to an empty text?
            (adds, _) => match inner.encode("", true).map_err(bad)?.get_ids().first() {
                Some(first) => Some(*first) == id_of(&bos),
                None => *adds == Value::Bool(true),
            },
        },
        ends: ends(folder, &inner, id_of(&eos))?,
    };
    let special = [
        ("bos_token", bos.as_deref()),
        ("eos_token", eos.as_deref()),
        ("pad_token", pad.as_deref()),
        ("unk_token", unk.as_deref()),
    ];
    let template = template(folder, &config_path, &config["chat_template"], &special)?;
    let vocab_size = if added.is_empty() { own_len } else { len(&inner) };
    // Of overlapping tokens transformers matches the leftmost, as the crate does by itself.
    let special_tokens = SpecialTokens::default();
    let tokenizer = Tokenizer::new(inner, special_tokens, roles, vocab_size, template);
    Ok(tokenizer.of_tokens((vocab_size, own_len), added))
}

/// EOS of all files that name one, and the end-of-generation tokens by their text.
fn ends(
    folder: &Path,
    inner: &tokenizers::Tokenizer,
    eos: Option<u32>,
) -> Result<BTreeSet<u32>, TextError> {
    let mut ends = eog_by_text(|token| inner.token_to_id(token));
    ends.extend(eos);
    for name in ["generation_config.json", "config.json"] {
        let path = folder.join(name);
        let config = object(&path)?;
        let found = &config["eos_token_id"];
        let ids = match found {
            Value::Null => &[],
            Value::Array(ids) => &**ids,
            id => std::slice::from_ref(id),
        };
        for id in ids {
            let id = id.as_u64().and_then(|id| u32::try_from(id).ok()).ok_or_else(|| {
                TextError::format(&path, format!("eos_token_id is {found}, needed ids"))
            })?;
            ends.insert(id);
        }
    }
    Ok(ends)
}

fn template(
    folder: &Path,
    config_path: &Path,
    config: &Value,
    special: &[(&str, Option<&str>)],
) -> Result<Option<ChatTemplate>, TextError> {
    let Some((default, tool_use)) = template_texts(folder, config_path, config)? else {
        return Ok(None);
    };
    ChatTemplate::new(&default, tool_use.as_deref(), special).map(Some)
}

/// The texts of the default chat template and of the one for tools, from `chat_template.jinja`, else from
/// the config, which holds one template or several with names.
pub(super) fn template_texts(
    folder: &Path,
    config_path: &Path,
    config: &Value,
) -> Result<Option<(String, Option<String>)>, TextError> {
    let tool_use = text(&folder.join("additional_chat_templates/tool_use.jinja"))?;
    if let Some(default) = text(&folder.join("chat_template.jinja"))? {
        return Ok(Some((default, tool_use)));
    }
    match config {
        Value::Null => Ok(None),
        Value::String(template) => Ok(Some((template.clone(), tool_use))),
        Value::Array(named) => {
            let get =
                |name: &str| named.iter().find(|entry| entry["name"] == name)?["template"].as_str();
            let names: Vec<&str> =
                named.iter().filter_map(|entry| entry["name"].as_str()).collect();
            let default = get("default").ok_or_else(|| {
                TextError::format(
                    config_path,
                    format!("chat_template has {names:?}, needed one named \"default\""),
                )
            })?;
            Ok(Some((default.to_owned(), get("tool_use").map(str::to_owned))))
        }
        _ => Err(TextError::format(config_path, "chat_template is neither text nor a list")),
    }
}

/// A token given as text or as an object with its `content`; `None` if it is neither.
pub(super) fn token_text(value: &Value) -> Option<Option<String>> {
    match value {
        Value::Null => Some(None),
        Value::String(token) => Some(Some(token.clone())),
        Value::Object(token) => Some(Some(token.get("content")?.as_str()?.to_owned())),
        _ => None,
    }
}

/// A JSON object; an empty one if there is no such file.
pub(super) fn object(path: &Path) -> Result<Value, TextError> {
    let Some(json) = text(path)? else { return Ok(Value::Object(Default::default())) };
    match serde_json::from_str(&json) {
        Ok(object @ Value::Object(_)) => Ok(object),
        Ok(_) => Err(TextError::format(path, "not a JSON object")),
        Err(error) => Err(TextError::format(path, error.to_string())),
    }
}

/// A file's text; `None` if there is no such file.
pub(super) fn text(path: &Path) -> Result<Option<String>, TextError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(source) => Err(TextError::Io { path: path.into(), source }),
    }
}
