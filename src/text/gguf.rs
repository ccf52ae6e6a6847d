//! The tokenizer inside a GGUF, as llama.cpp reads it (`src/llama-vocab.cpp`): byte-level BPE here, and
//! what it shares with SentencePiece's.

use std::collections::{HashMap, HashSet};

use tokenizers::AddedToken;
use tokenizers::models::bpe::BPE;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

use super::pre_tokenizer::{self, PreTokenizer};
use super::special_tokens::{SpecialToken, SpecialTokens};
use super::tokenizer::{EOG_TOKENS, Roles, eog_by_text};
use super::{AddedTokenSpec, ChatTemplate, TextError, Tokenizer, sentencepiece};
use crate::weights::Gguf;

/// `enum llama_token_type`.
pub(super) const NORMAL: i32 = 1;
pub(super) const UNKNOWN: i32 = 2;
pub(super) const CONTROL: i32 = 3;
pub(super) const USER_DEFINED: i32 = 4;
pub(super) const UNUSED: i32 = 5;
pub(super) const BYTE: i32 = 6;

/// Tokens of code completion (fill in the middle) that are special although some files call them text.
const FIM_TOKENS: &[&str] = &[
    "<|fim_prefix|>",
    "<fim-prefix>",
    "<fim_prefix>",
    "<｜fim▁begin｜>",
    "<PRE>",
    "▁<PRE>",
    "<|code_prefix|>",
    "<|prefix|>",
    "<|fim_suffix|>",
    "<fim-suffix>",
    "<fim_suffix>",
    "<｜fim▁hole｜>",
    "<SUF>",
    "▁<SUF>",
    "<|code_suffix|>",
    "<|suffix|>",
    "<|fim_middle|>",
    "<fim-middle>",
    "<fim_middle>",
    "<｜fim▁end｜>",
    "<MID>",
    "▁<MID>",
    "<|code_middle|>",
    "<|middle|>",
];

/// Tokens of code completion that end generation too.
const FIM_EOG_TOKENS: &[(&str, &[&str])] = &[
    ("fim_pad", &["<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"]),
    ("fim_rep", &["<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"]),
    ("fim_sep", &["<|file_sep|>"]),
];

/// Never special tokens, independent of the file (the channels of gpt-oss).
const TEXT: &[&str] = &["<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"];

pub(super) fn read(file: &Gguf, added: &[AddedTokenSpec]) -> Result<Tokenizer, TextError> {
    if is_sentencepiece(file)? {
        return sentencepiece::read(file, added);
    }
    let pre = kind(file)?;
    let (tokens, len) = tokens_with(file, added)?;
    let ids = ids(file, &tokens)?;
    let mut bpe = BPE::new(collected(BPE::new, &tokens), merges(file, &ids)?);
    bpe.ignore_merges = pre.ignore_merges;

    let mut inner = tokenizers::Tokenizer::new(bpe);
    let broken = |error: tokenizers::Error| bad(file, error.to_string());
    inner.with_pre_tokenizer(Some(pre.build(|c| ids.contains_key(c)).map_err(broken)?));
    inner.with_decoder(Some(ByteLevel::default()));
    let defaults = Defaults { bos: None, eos: None, adds_bos: pre.adds_bos };
    let roles = roles(file, defaults, &tokens, &ids)?;
    let special_tokens = special_tokens(file, &tokens, &roles, added)?;
    let found = special_tokens
        .iter()
        .map(|token| AddedToken::from(&*token.text, token.special).normalized(false));
    inner.add_tokens(found).map_err(broken)?;

    let template = template(file, &template_variables(&tokens, &roles))?;
    let tokenizer =
        Tokenizer::new(inner, SpecialTokens::new(special_tokens), roles, tokens.len(), template);
    Ok(tokenizer.of_tokens(len, added))
}

/// Whether its tokenizer is SentencePiece's.
pub(super) fn is_sentencepiece(file: &Gguf) -> Result<bool, TextError> {
    Ok(file.str("tokenizer.ggml.model")? == Some("llama"))
}

/// The special tokens by the names of variables in chat templates.
pub(super) fn template_variables<'t>(
    tokens: &'t [String],
    roles: &Roles,
) -> [(&'static str, Option<&'t str>); 3] {
    let text = |id: Option<u32>| id.map(|id| &*tokens[id as usize]);
    [("bos_token", text(roles.bos)), ("eos_token", text(roles.eos)), ("pad_token", text(roles.pad))]
}

/// Defaults of a kind of tokenizer, where a file has no key.
#[derive(Debug, Clone, Copy)]
pub(super) struct Defaults {
    pub bos: Option<u32>,
    pub eos: Option<u32>,
    pub adds_bos: bool,
}

/// The pre-tokenizer of the file, if it is supported.
pub(super) fn kind(file: &Gguf) -> Result<&'static PreTokenizer, TextError> {
    let model = required(file, "tokenizer.ggml.model")?;
    if model != "gpt2" {
        let needed = "\"gpt2\" (byte-level BPE) or \"llama\" (SentencePiece)";
        return Err(bad(file, format!("tokenizer.ggml.model is {model:?}, needed {needed}")));
    }
    let known = pre_tokenizer::known;
    let Some(name) = file.str("tokenizer.ggml.pre")? else {
        return Err(bad(
            file,
            format!("no tokenizer.ggml.pre names the pre-tokenizer, needed one of {}", known()),
        ));
    };
    pre_tokenizer::find(name).ok_or_else(|| {
        bad(file, format!("tokenizer.ggml.pre is {name:?}, needed one of {}", known()))
    })
}

pub(super) fn tokens(file: &Gguf) -> Result<Vec<String>, TextError> {
    let key = "tokenizer.ggml.tokens";
    let tokens = file.strings(key)?.ok_or_else(|| file.missing_key(key))?;
    let text = |(id, bytes): (usize, &[u8])| match std::str::from_utf8(bytes) {
        Ok("") => Ok(format!("[EMPTY_{id}]")),
        Ok(token) => Ok(token.to_owned()),
        Err(_) => Err(bad(file, format!("token {id} of {key} is not UTF-8"))),
    };
    let tokens: Vec<String> = tokens.enumerate().map(text).collect::<Result<_, _>>()?;
    match tokens.len() {
        0 => Err(bad(file, format!("{key} is empty"))),
        _ => Ok(tokens),
    }
}

/// The file's tokens with added ones, which replace padding entries at the end; and the numbers of tokens
/// without padding, with and without the added ones.
pub(super) fn tokens_with(
    file: &Gguf,
    added: &[AddedTokenSpec],
) -> Result<(Vec<String>, (usize, usize)), TextError> {
    let mut tokens = tokens(file)?;
    let types = file.i32s("tokenizer.ggml.token_type")?.unwrap_or_default();
    let filler = |id: usize| types.get(id) == Some(&UNUSED) && tokens[id] == format!("[PAD{id}]");
    let len = (0..tokens.len()).rev().find(|id| !filler(*id)).map_or(0, |last| last + 1);
    let known: HashSet<&str> = tokens.iter().map(|token| &**token).collect();
    let new = added.iter().map(|token| token.text.clone());
    let new: Vec<String> = new.filter(|text| !known.contains(&**text)).collect();
    if new.is_empty() {
        return Ok((tokens, (len, len)));
    }
    tokens.truncate(len);
    tokens.extend(new);
    let grown = tokens.len();
    Ok((tokens, (grown, len)))
}

/// The id of each token.
pub(super) fn ids<'t>(
    file: &Gguf,
    tokens: &'t [String],
) -> Result<HashMap<&'t str, u32>, TextError> {
    let ids: HashMap<&str, u32> = tokens.iter().map(|t| &**t).zip(0..).collect();
    if ids.len() < tokens.len() {
        let twice = (0..).zip(tokens).find(|(id, token)| ids[&***token] != *id);
        let name = twice.map_or("", |(_, token)| token);
        return Err(bad(file, format!("token {name:?} is in the vocabulary twice")));
    }
    Ok(ids)
}

/// The merges. Checked here, since [`BPE::new`] panics on a merge of unknown tokens.
pub(super) fn merges(
    file: &Gguf,
    ids: &HashMap<&str, u32>,
) -> Result<Vec<(String, String)>, TextError> {
    let key = "tokenizer.ggml.merges";
    let lines = file.strings(key)?.ok_or_else(|| file.missing_key(key))?;
    let mut merges = Vec::with_capacity(lines.len());
    let mut seen = HashSet::with_capacity(lines.len());
    let mut joined = String::new();
    for (rank, line) in lines.enumerate() {
        // A first part may itself start with a space.
        let parts = std::str::from_utf8(line).ok().and_then(|line| {
            let (at, _) = line.char_indices().skip(1).find(|&(_, c)| c == ' ')?;
            Some((&line[..at], &line[at + 1..]))
        });
        let Some((left, right)) = parts else {
            let line = String::from_utf8_lossy(line);
            return Err(bad(file, format!("merge {rank} is {line:?}, needed two tokens")));
        };
        joined.clear();
        joined.push_str(left);
        joined.push_str(right);
        for part in [left, right, &joined] {
            if !ids.contains_key(part) {
                return Err(bad(
                    file,
                    format!(
                        "merge {rank} needs the token {part:?}, which is not in the vocabulary"
                    ),
                ));
            }
        }
        if seen.insert((left, right)) {
            merges.push((left.to_owned(), right.to_owned()));
        }
    }
    Ok(merges)
}

/// The vocabulary in the map `BPE::new` takes, whose type the crate does not let us name.
pub(super) fn collected<V: FromIterator<(String, u32)>, M>(
    _: fn(V, M) -> BPE,
    tokens: &[String],
) -> V {
    tokens.iter().cloned().zip(0..).collect()
}

pub(super) fn roles(
    file: &Gguf,
    defaults: Defaults,
    tokens: &[String],
    ids: &HashMap<&str, u32>,
) -> Result<Roles, TextError> {
    let role = |name: &str| -> Result<Option<u32>, TextError> {
        let key = format!("tokenizer.ggml.{name}_token_id");
        let Some(id) = file.u64(&key)? else { return Ok(None) };
        match u32::try_from(id).ok().filter(|&id| (id as usize) < tokens.len()) {
            Some(id) => Ok(Some(id)),
            None => Err(bad(file, format!("{key} is {id}, needed an id below {}", tokens.len()))),
        }
    };
    let id_of = |token: &str| ids.get(token).copied();
    let known = |id: Option<u32>| id.filter(|&id| (id as usize) < tokens.len());
    let bos = role("bos")?.or(known(defaults.bos));
    let (eos, pad) = (role("eos")?.or(known(defaults.eos)), role("padding")?);
    let adds_bos = file.bool("tokenizer.ggml.add_bos_token")?.unwrap_or(defaults.adds_bos);
    let mut ends = eog_by_text(id_of);
    ends.extend(eos);
    ends.extend(role("eot")?);
    ends.extend(role("eom")?);
    for (name, tokens) in FIM_EOG_TOKENS {
        ends.extend(role(name)?.or_else(|| tokens.iter().find_map(|token| id_of(token))));
    }
    Ok(Roles { bos, eos, pad, adds_bos, ends })
}

/// The tokens that are matched before pre-tokenization.
pub(super) fn special_tokens(
    file: &Gguf,
    tokens: &[String],
    roles: &Roles,
    added: &[AddedTokenSpec],
) -> Result<Vec<SpecialToken>, TextError> {
    let key = "tokenizer.ggml.token_type";
    let types = file.i32s(key)?;
    let added: HashMap<&str, bool> = added.iter().map(|t| (&*t.text, t.special)).collect();
    if let Some(types) = &types
        && let Some(id) = (types.len()..tokens.len()).find(|&id| !added.contains_key(&*tokens[id]))
    {
        let (found, needed) = (types.len(), id + 1);
        return Err(bad(file, format!("{key} has {found} items, needed {needed}")));
    }
    let mut special_tokens = Vec::new();
    for (id, token) in (0..).zip(tokens) {
        if let Some(&special) = added.get(&**token) {
            special_tokens.push(SpecialToken { text: token.clone(), id, special });
            continue;
        }
        let is_special = EOG_TOKENS.contains(&&**token) && roles.ends.contains(&id)
            || FIM_TOKENS.contains(&&**token)
            || FIM_EOG_TOKENS.iter().any(|(_, names)| names.contains(&&**token));
        let special = match types.as_ref().map(|types| types[id as usize]) {
            _ if TEXT.contains(&&**token) => false,
            _ if is_special => true,
            Some(UNKNOWN | CONTROL) => !EOG_TOKENS.contains(&&**token),
            Some(USER_DEFINED) => false,
            _ => continue,
        };
        special_tokens.push(SpecialToken { text: token.clone(), id, special });
    }
    Ok(special_tokens)
}

pub(super) fn template(
    file: &Gguf,
    special: &[(&str, Option<&str>)],
) -> Result<Option<ChatTemplate>, TextError> {
    let Some(default) = file.str("tokenizer.chat_template")? else { return Ok(None) };
    let tool_use = file.str("tokenizer.chat_template.tool_use")?;
    ChatTemplate::new(default, tool_use, special).map(Some)
}

fn required<'a>(file: &'a Gguf, key: &str) -> Result<&'a str, TextError> {
    Ok(file.str(key)?.ok_or_else(|| file.missing_key(key))?)
}

fn bad(file: &Gguf, reason: impl Into<String>) -> TextError {
    TextError::format(file.path(), reason)
}
