//! Tokens added to the end of a base's vocabulary, by a run's settings or by the `tokenizer.json` in an
//! adapter's folder.
//!
//! Ids follow those of the tokenizer, as with `add_tokens` of transformers. A token that is in the
//! vocabulary already keeps its id, and is matched before pre-tokenization from then on. Padding entries of
//! a GGUF up to the rows of its embedding (`[PAD151665]`) do not count as tokens: new tokens take their
//! ids.

use std::collections::HashSet;
use std::path::Path;

use super::{TextError, Tokenizer, folder};
use crate::weights::Checkpoint;

/// The file of a tokenizer in a folder.
const FILE: &str = "tokenizer.json";

/// A token that was added.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AddedTokenSpec {
    /// Its text.
    pub text: String,
    /// Whether it is a special token like `<|im_end|>`: skipped when decoding for display, and text under
    /// [`super::Special::AsText`].
    pub special: bool,
    /// Whether a `tokenizer.json` matches it in the normalized text instead of the original text.
    pub normalized: bool,
}

impl AddedTokenSpec {
    /// Tokens from settings, the special ones last.
    ///
    /// # Errors
    /// If one is empty, or named twice.
    pub fn list(tokens: &[String], special_tokens: &[String]) -> Result<Vec<Self>, TextError> {
        let fault = |reason: String| Err(TextError::Tokenizer(reason));
        // As transformers adds them.
        let added = |special: bool| {
            move |text: &String| Self { text: text.clone(), special, normalized: !special }
        };
        let plain = tokens.iter().map(added(false));
        let all: Vec<Self> = plain.chain(special_tokens.iter().map(added(true))).collect();
        let mut seen = HashSet::new();
        for token in &all {
            if token.text.is_empty() {
                return fault("an added token is empty, needed at least a character".into());
            }
            if !seen.insert(&token.text) {
                return fault(format!("the added token {:?} is named twice", token.text));
            }
        }
        Ok(all)
    }
}

impl Tokenizer {
    /// The tokenizer of a base with the tokens that the adapters in these folders add: those of their
    /// `tokenizer.json` that the base does not have.
    ///
    /// # Errors
    /// As [`Tokenizer::open`], and if such a file contradicts the base about a token of both.
    pub fn open_with_adapters(
        checkpoint: &Checkpoint,
        folders: &[&Path],
    ) -> Result<Self, TextError> {
        let mut tokenizer = Self::open(checkpoint)?;
        for folder in folders.iter().filter(|folder| folder.join(FILE).is_file()) {
            let more = tokenizer.missing(folder)?;
            tokenizer = tokenizer.with_tokens(checkpoint, &more)?;
        }
        Ok(tokenizer)
    }

    /// This tokenizer with additional tokens, which are matched anywhere in a text; `checkpoint` is the
    /// base of the tokenizer.
    ///
    /// A normalizer that adds a prefix to a text also adds it to tokens matched in normalized text:
    /// transformers matches these only after a space and at the beginning. Such tokens are matched in the
    /// original text here, as in a GGUF.
    ///
    /// # Errors
    /// As [`Tokenizer::open`].
    pub fn with_added(
        self,
        checkpoint: &Checkpoint,
        more: &[AddedTokenSpec],
    ) -> Result<Self, TextError> {
        let mut more = more.to_vec();
        for token in &mut more {
            token.normalized &= self.written_alone(&token.text)?.is_none();
        }
        self.with_tokens(checkpoint, &more)
    }

    /// This tokenizer with additional tokens, unchanged.
    fn with_tokens(
        self,
        checkpoint: &Checkpoint,
        more: &[AddedTokenSpec],
    ) -> Result<Self, TextError> {
        let is_there = |token: &&AddedTokenSpec| {
            self.added_as(&token.text).is_some_and(|special| special || !token.special)
        };
        let more: Vec<AddedTokenSpec> =
            more.iter().filter(|token| !is_there(token)).cloned().collect();
        if more.is_empty() {
            return Ok(self);
        }
        let mut all = self.added().to_vec();
        for token in more {
            match all.iter_mut().find(|known| known.text == token.text) {
                Some(known) => *known = token,
                None => all.push(token),
            }
        }
        Self::open_with(checkpoint, &all)
    }

    /// The tokens that the tokenizer in a folder has and this one does not have, or does not match before
    /// pre-tokenization; none if it has fewer tokens than this one without its added tokens.
    ///
    /// # Errors
    /// If the folder's tokenizer cannot be read, skips an id, has another token for the same id, or matches
    /// a token that was added to this one differently.
    pub fn missing(&self, folder: &Path) -> Result<Vec<AddedTokenSpec>, TextError> {
        let theirs = folder::read(folder, &[])?;
        let fault = |reason: String| Err(TextError::format(&folder.join(FILE), reason));
        let found = |text: String| {
            let token = theirs.added_token(&text);
            let special = token.is_some_and(|token| token.special);
            let normalized = token.is_some_and(|token| token.normalized);
            AddedTokenSpec { text, special, normalized }
        };
        let own_len = self.own_len();
        if theirs.len() < own_len {
            return Ok(Vec::new());
        }
        let (mut missing, mut beyond) = (Vec::new(), Vec::new());
        for id in 0..theirs.len() as u32 {
            let own = self.token(id).filter(|_| (id as usize) < self.len());
            let Some(text) = theirs.token(id) else {
                if id as usize >= self.len() {
                    return fault(format!("has no token {id}, but {} in all", theirs.len()));
                }
                continue;
            };
            match own {
                None if id as usize >= self.len() => beyond.push(found(text)),
                Some(own) if own == text => {
                    if let Some(added) = self.matched_differently(&theirs, &text) {
                        return fault(format!(
                            "normalized of the token {text:?} is {}, needed {}, as another adapter \
                             has it: the two cannot be active together",
                            !added.normalized, added.normalized
                        ));
                    }
                    let is_more = theirs.added_as(&text) > self.added_as(&text);
                    missing.extend(is_more.then(|| found(text)));
                }
                Some(own) if id as usize >= own_len => {
                    return fault(format!(
                        "token {id} is {text:?}, needed {own:?}, which was added already: adapters \
                         with other tokens of their own cannot be active together"
                    ));
                }
                Some(own) if theirs.len() > own_len => {
                    return fault(format!(
                        "token {id} is {text:?}, needed the base's {own:?}: the adapter is of \
                         another base, or other tokens were added to it"
                    ));
                }
                _ => {}
            }
        }
        missing.extend(beyond);
        Ok(missing)
    }

    /// A token that was added to this tokenizer, if another tokenizer matches it in other texts. A token
    /// that is special in only one of the two is treated as special.
    fn matched_differently(&self, other: &Self, text: &str) -> Option<&AddedTokenSpec> {
        let added = self.added().iter().find(|added| added.text == text)?;
        let token = other.added_token(text)?;
        let differs = token.special == added.special && token.normalized != added.normalized;
        (differs && self.normalizes()).then_some(added)
    }

    /// Checks that no added token is matched only where the normalizer writes it as at the beginning of a
    /// text, for which a GGUF has no key; errors name `path`.
    pub(super) fn check_found_anywhere(&self, path: &Path) -> Result<(), TextError> {
        for token in self.added().iter().filter(|token| token.normalized) {
            if let Some(alone) = self.written_alone(&token.text)? {
                let reason = format!(
                    "the added token {:?} is looked for as the normalizer writes it alone, {alone:?}, \
                     which no GGUF key says",
                    token.text
                );
                return Err(TextError::format(path, reason));
            }
        }
        Ok(())
    }
}

/// The tokens that the adapters in these folders add to a base. The base's tokenizer, which may be of an
/// unsupported kind, is read only if one of the folders has one.
///
/// # Errors
/// As [`Tokenizer::open_with_adapters`].
pub fn added_by_adapters(
    checkpoint: &Checkpoint,
    folders: &[&Path],
) -> Result<Vec<AddedTokenSpec>, TextError> {
    if folders.iter().any(|folder| folder.join(FILE).is_file()) {
        Ok(Tokenizer::open_with_adapters(checkpoint, folders)?.added().to_vec())
    } else {
        Ok(Vec::new())
    }
}
