//! The SentencePiece tokenizer inside a GGUF (`tokenizer.ggml.model` = `llama`), as llama.cpp reads it:
//! starting from single characters, the neighbours whose merged token has the highest score are merged, and
//! characters without a token fall back to bytes.
//!
//! The tokenizers crate merges by ranked pairs instead: every split of a token into two others is such a
//! pair, ranked by the token's score. The two differ only where one token could be merged from two
//! overlapping pairs, and for characters that are a token only together with others.

use std::cmp::Ordering;
use std::collections::HashMap;

use serde_json::{Map, Value, json};
use tokenizers::AddedToken;
use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence as Decoders;
use tokenizers::decoders::strip::Strip;
use tokenizers::models::bpe::BPE;
use tokenizers::normalizers::replace::Replace;
use tokenizers::normalizers::{Prepend, Sequence as Normalizers};

use super::gguf::{self, Defaults, NORMAL, UNUSED, USER_DEFINED};
use super::special_tokens::SpecialTokens;
use super::{AddedTokenSpec, TextError, Tokenizer};
use crate::weights::Gguf;

/// The character that replaces a space.
const SPACE: &str = "\u{2581}";

/// Default ids of roles, and whether BOS is added.
pub(super) const DEFAULTS: Defaults = Defaults { bos: Some(1), eos: Some(2), adds_bos: true };

pub(super) fn read(file: &Gguf, added: &[AddedTokenSpec]) -> Result<Tokenizer, TextError> {
    let bad = |reason: String| TextError::format(file.path(), reason);
    let broken = |error: tokenizers::Error| bad(error.to_string());
    let (tokens, len) = gguf::tokens_with(file, added)?;
    let ids = gguf::ids(file, &tokens)?;
    let own = gguf::tokens(file)?; // no joint token is one that was added
    let merges = merges(file, &own, &gguf::ids(file, &own)?)?;
    let mut bpe = BPE::new(gguf::collected(BPE::new, &tokens), merges);
    bpe.byte_fallback = true;
    bpe.fuse_unk = true;
    let unknown = file.u64("tokenizer.ggml.unknown_token_id")?.unwrap_or(0);
    bpe.unk_token = tokens.get(unknown as usize).cloned();

    let mut inner = tokenizers::Tokenizer::new(bpe);
    let spaces = |from: &str, to: &str| Replace::new(from, to).map_err(broken);
    // A space in front of every text, and after every special token in it.
    let in_front = in_front(file)?;
    let mut normalizers = Vec::new();
    if in_front {
        normalizers.push(Prepend::new(SPACE.into()).into());
    }
    normalizers.push(spaces(" ", SPACE)?.into());
    inner.with_normalizer(Some(Normalizers::new(normalizers))).map_err(broken)?;
    let mut decoders =
        vec![spaces(SPACE, " ")?.into(), ByteFallback::new().into(), Fuse::new().into()];
    if in_front {
        decoders.push(Strip::new(' ', 1, 0).into());
    }
    inner.with_decoder(Some(Decoders::new(decoders)));
    let roles = gguf::roles(file, DEFAULTS, &tokens, &ids)?;
    let special_tokens = gguf::special_tokens(file, &tokens, &roles, added)?;
    let found = special_tokens
        .iter()
        .map(|token| AddedToken::from(&*token.text, token.special).normalized(false));
    inner.add_tokens(found).map_err(broken)?;
    let template = gguf::template(file, &gguf::template_variables(&tokens, &roles))?;
    let tokenizer =
        Tokenizer::new(inner, SpecialTokens::new(special_tokens), roles, tokens.len(), template);
    let tokenizer = tokenizer.of_tokens(len, added);
    tokenizer.check_found_anywhere(file.path())?;
    Ok(tokenizer)
}

/// The parts of a `tokenizer.json` that describe the merging of a GGUF's vocabulary.
pub(super) struct Parts {
    pub normalizer: Value,
    pub decoder: Value,
    /// The model without its vocabulary.
    pub model: Map<String, Value>,
}

/// What transformers makes of such a vocabulary when it turns SentencePiece's own file into a
/// `tokenizer.json`: a BPE with byte fallback, whose merges are ordered by the scores of their results.
pub(super) fn to_json(file: &Gguf) -> Result<Parts, TextError> {
    let tokens = gguf::tokens(file)?; // no joint token is one that was added
    let mut pairs = pairs(file, &tokens, &gguf::ids(file, &tokens)?)?;
    let length = |id: u32| tokens[id as usize].chars().count();
    pairs.sort_by(|a, b| {
        let scores = b.0.partial_cmp(&a.0).unwrap_or(Ordering::Equal);
        scores.then(length(b.1).cmp(&length(a.1))).then(length(b.2).cmp(&length(a.2)))
    });
    let text = |id: u32| &tokens[id as usize];
    let merges: Value = pairs.iter().map(|pair| json!([text(pair.1), text(pair.2)])).collect();
    let unknown = file.u64("tokenizer.ggml.unknown_token_id")?.unwrap_or(0);
    let replace = |from: &str, to: &str| json!({ "type": "Replace", "pattern": { "String": from }, "content": to });
    let (mut normalizers, mut decoders) = (Vec::new(), vec![replace(SPACE, " ")]);
    decoders.extend([json!({ "type": "ByteFallback" }), json!({ "type": "Fuse" })]);
    if in_front(file)? {
        normalizers.push(json!({ "type": "Prepend", "prepend": SPACE }));
        decoders.push(json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
    }
    normalizers.push(replace(" ", SPACE));
    let model = json!({
        "type": "BPE",
        "dropout": null,
        "unk_token": tokens.get(unknown as usize),
        "continuing_subword_prefix": null,
        "end_of_word_suffix": null,
        "fuse_unk": true,
        "byte_fallback": true,
        "ignore_merges": false,
        "merges": merges,
    });
    Ok(Parts {
        normalizer: json!({ "type": "Sequence", "normalizers": normalizers }),
        decoder: json!({ "type": "Sequence", "decoders": decoders }),
        model: model.as_object().cloned().unwrap_or_default(),
    })
}

/// Whether a space is added in front of texts.
fn in_front(file: &Gguf) -> Result<bool, TextError> {
    Ok(file.bool("tokenizer.ggml.add_space_prefix")?.unwrap_or(true))
}

/// Whether a `tokenizer.json`'s model is one of SentencePiece's.
pub(super) fn is_model(json: &Value) -> bool {
    json["model"]["type"].as_str().unwrap_or("BPE") == "BPE"
        && json["model"]["byte_fallback"] == true
}

/// Whether a `tokenizer.json` of a SentencePiece vocabulary adds a space in front of texts.
///
/// # Errors
/// With a property that llama.cpp does not support.
pub(super) fn space_in_front(json: &Value) -> Result<bool, String> {
    let mut in_front = false;
    let (mut spaces_are_marked, own) = (false, &json["normalizer"]);
    let steps: Vec<&Value> = match own["type"].as_str() {
        None => Vec::new(),
        Some("Sequence") => own["normalizers"].as_array().into_iter().flatten().collect(),
        Some(_) => vec![own],
    };
    for step in steps {
        match step["type"].as_str() {
            Some("Prepend") if step["prepend"] == SPACE => in_front = true,
            Some("Replace") if step["pattern"]["String"] == " " && step["content"] == SPACE => {
                spaces_are_marked = true;
            }
            _ => return Err(format!("the normalizer does {step}")),
        }
    }
    let words = &json["pre_tokenizer"];
    match words["type"].as_str() {
        None => {}
        // Finds nothing where spaces are marked before.
        Some("Split") if spaces_are_marked && words["pattern"]["String"] == " " => {}
        Some("Metaspace") if words["replacement"] == SPACE && words["split"] == false => {
            spaces_are_marked = true;
            in_front |= words["prepend_scheme"] != "never";
        }
        Some(_) => return Err(format!("words are cut by {words}")),
    }
    if spaces_are_marked { Ok(in_front) } else { Err(format!("spaces do not become {SPACE:?}")) }
}

/// Scores of tokens by a `tokenizer.json`'s merges: those that come first have the highest. Tokens whose
/// merges are interleaved have the same; those without a merge have the lowest.
pub(super) fn scores(merges: &[(String, String)], ids: &HashMap<&str, u32>) -> Vec<f32> {
    // Of each token the first and last merge that gives it.
    let mut spans: HashMap<u32, (usize, usize)> = HashMap::new();
    let mut given = Vec::new();
    for (rank, (left, right)) in merges.iter().enumerate() {
        let Some(&id) = ids.get(format!("{left}{right}").as_str()) else { continue };
        spans.entry(id).or_insert((rank, rank)).1 = rank;
        given.push((rank, id));
    }
    let lowest = -(merges.len() as f32) - 1.0;
    let mut scores = vec![lowest; ids.len()];
    let (mut group, mut end) = (0usize, 0usize);
    for (rank, id) in given {
        if rank > end {
            group += 1;
        }
        end = end.max(spans[&id].1);
        scores[id as usize] = -(group as f32);
    }
    scores
}

/// Every way to part a token of text into two tokens: those of the highest score first, and for one
/// token those whose parts have the lowest ids.
fn merges(
    file: &Gguf,
    tokens: &[String],
    ids: &HashMap<&str, u32>,
) -> Result<Vec<(String, String)>, TextError> {
    let mut pairs = pairs(file, tokens, ids)?;
    pairs.sort_by(|a, b| {
        b.0.partial_cmp(&a.0).unwrap_or(Ordering::Equal).then((a.1, a.2).cmp(&(b.1, b.2)))
    });
    let text = |id: u32| tokens[id as usize].clone();
    Ok(pairs.into_iter().map(|(_, left, right)| (text(left), text(right))).collect())
}

/// Every way to part a token of text into two tokens, with its score: by ids, and of one token by where
/// it is parted.
fn pairs(
    file: &Gguf,
    tokens: &[String],
    ids: &HashMap<&str, u32>,
) -> Result<Vec<(f32, u32, u32)>, TextError> {
    let counted = |key: &str, found: usize| {
        if found == tokens.len() {
            Ok(())
        } else {
            Err(TextError::format(
                file.path(),
                format!("{key} has {found} items, needed {}", tokens.len()),
            ))
        }
    };
    let (scores_key, types_key) = ("tokenizer.ggml.scores", "tokenizer.ggml.token_type");
    let scores = file.f32s(scores_key)?.ok_or_else(|| file.missing_key(scores_key))?;
    counted(scores_key, scores.len())?;
    let types = match file.i32s(types_key)? {
        Some(types) => types,
        None => vec![NORMAL; tokens.len()],
    };
    counted(types_key, types.len())?;

    let mut pairs: Vec<(f32, u32, u32)> = Vec::new();
    let is_text = |of: i32| [NORMAL, USER_DEFINED, UNUSED].contains(&of);
    for ((token, &score), _) in
        tokens.iter().zip(&scores).zip(&types).filter(|(_, of)| is_text(**of))
    {
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if let (Some(&left), Some(&right)) = (ids.get(left), ids.get(right)) {
                pairs.push((score, left, right));
            }
        }
    }
    Ok(pairs)
}
