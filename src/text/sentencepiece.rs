//! The SentencePiece tokenizer inside a GGUF (`tokenizer.ggml.model` = `llama`), as llama.cpp reads it:
//! neighbours are joined whose joint token has the highest score, from single characters on, and what is
//! no token falls back to bytes.
//!
//! The tokenizers crate joins by ranked pairs instead: every way to part a token into two others is such
//! a pair, ranked by the token's score. The two differ only where one token could be joined from two
//! different pairs that overlap, and for characters that are a token only together with others.

use std::cmp::Ordering;
use std::collections::HashMap;

use tokenizers::AddedToken;
use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence as Decoders;
use tokenizers::decoders::strip::Strip;
use tokenizers::models::bpe::BPE;
use tokenizers::normalizers::replace::Replace;
use tokenizers::normalizers::{Prepend, Sequence as Normalizers};

use super::gguf::{self, Defaults, NORMAL, UNUSED, USER_DEFINED};
use super::marks::Marks;
use super::{Added, TextError, Tokenizer};
use crate::weights::Gguf;

/// What stands for a space.
const SPACE: &str = "\u{2581}";

/// Ids of roles that a file does not name, and whether texts begin with BOS.
const DEFAULTS: Defaults = Defaults { bos: Some(1), eos: Some(2), adds_bos: true };

pub(super) fn read(file: &Gguf, added: &[Added]) -> Result<Tokenizer, TextError> {
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
    // A space in front of every text, and behind every mark in it.
    let in_front = file.bool("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
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
    let marks = gguf::marks(file, &tokens, &roles, added)?;
    let found =
        marks.iter().map(|mark| AddedToken::from(&*mark.text, mark.special).normalized(false));
    inner.add_tokens(found).map_err(broken)?;
    let template = gguf::template(file, &gguf::special_tokens(&tokens, &roles))?;
    let tokenizer = Tokenizer::new(inner, Marks::new(marks), roles, tokens.len(), template);
    Ok(tokenizer.of_tokens(len, added))
}

/// Every way to part a token of text into two tokens: those of the highest score first, and for one
/// token those whose parts have the lowest ids.
fn merges(
    file: &Gguf,
    tokens: &[String],
    ids: &HashMap<&str, u32>,
) -> Result<Vec<(String, String)>, TextError> {
    let counted = |key: &str, found: usize| match found == tokens.len() {
        true => Ok(()),
        false => Err(TextError::format(
            file.path(),
            format!("{key} has {found} items, needed {}", tokens.len()),
        )),
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
    pairs.sort_by(|a, b| {
        b.0.partial_cmp(&a.0).unwrap_or(Ordering::Equal).then((a.1, a.2).cmp(&(b.1, b.2)))
    });
    let text = |id: u32| tokens[id as usize].clone();
    Ok(pairs.into_iter().map(|(_, left, right)| (text(left), text(right))).collect())
}
