//! Tokens that were added to a vocabulary, behind its own: what a base's files do not have and a run,
//! or the folder of an adapter, brings.
//!
//! Ids follow on from the tokenizer's own, as transformers gives them (`add_tokens`). A token that is
//! there keeps its id, and is from then on found in a text before the text is cut into words. Fillers
//! that a GGUF has up to the rows of its embedding (`[PAD151665]`) are no tokens: new ones take their
//! ids.

use std::collections::HashSet;
use std::path::Path;

use super::{TextError, Tokenizer, folder};
use crate::weights::Checkpoint;

/// The file that says which tokens there are.
const FILE: &str = "tokenizer.json";

/// A token that was added.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AddedTokenSpec {
    /// How it is written.
    pub text: String,
    /// Whether it is a mark, as `<|im_end|>` is: left out of text for people, and no token where marks
    /// are taken as text ([`super::Special::AsText`]).
    pub special: bool,
    /// Whether a `tokenizer.json` looks for it in the text that its normalizer leaves, not in the text as
    /// it stands.
    pub normalized: bool,
}

impl AddedTokenSpec {
    /// Tokens as a user names them, the special ones last.
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
    /// The tokenizer of a base with the tokens that adapters in these folders came with: those of a
    /// `tokenizer.json` there beyond the base's own.
    ///
    /// # Errors
    /// As [`Tokenizer::open`], and if such a file says otherwise of a token that both have.
    pub fn open_beside(checkpoint: &Checkpoint, folders: &[&Path]) -> Result<Self, TextError> {
        let mut tokenizer = Self::open(checkpoint)?;
        for folder in folders.iter().filter(|folder| folder.join(FILE).is_file()) {
            let more = tokenizer.missing(folder)?;
            tokenizer = tokenizer.grown(checkpoint, &more)?;
        }
        Ok(tokenizer)
    }

    /// The same tokenizer with further tokens, which are found wherever they stand; `checkpoint` is the
    /// one it is of.
    ///
    /// A normalizer that puts something in front of a text does so to a token too, when that is to be
    /// found in normalized text: transformers finds it behind a space and at the beginning only. Such
    /// tokens are looked for in the text as it stands, as in a GGUF.
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
        self.grown(checkpoint, &more)
    }

    /// With tokens as they are given.
    fn grown(self, checkpoint: &Checkpoint, more: &[AddedTokenSpec]) -> Result<Self, TextError> {
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

    /// The tokens that the tokenizer in a folder has and this one has not, or not as ones that are found
    /// before words are; none if it has fewer than this one has without those added to it.
    ///
    /// # Errors
    /// If the folder's cannot be read, skips an id, has another token where both have one, or looks
    /// otherwise for one that was added to this.
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
                    if let Some(added) = self.found_otherwise(&theirs, &text) {
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

    /// A token that was added to this tokenizer, if another one finds it in other texts. As a mark it is
    /// another kind of token, which stands for both.
    fn found_otherwise(&self, other: &Self, text: &str) -> Option<&AddedTokenSpec> {
        let added = self.added().iter().find(|added| added.text == text)?;
        let token = other.added_token(text)?;
        let differs = token.special == added.special && token.normalized != added.normalized;
        (differs && self.normalizes()).then_some(added)
    }

    /// That no added token is found only where the normalizer has written it as it does one alone, which
    /// nothing in a GGUF says; `path` is of what is at fault.
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

/// The tokens that adapters in these folders came with and a base lacks. The base's tokenizer, which
/// may be of a kind that is not read here, is asked for only if a folder has one.
///
/// # Errors
/// As [`Tokenizer::open_beside`].
pub fn added_beside(
    checkpoint: &Checkpoint,
    folders: &[&Path],
) -> Result<Vec<AddedTokenSpec>, TextError> {
    match folders.iter().any(|folder| folder.join(FILE).is_file()) {
        true => Ok(Tokenizer::open_beside(checkpoint, folders)?.added().to_vec()),
        false => Ok(Vec::new()),
    }
}
