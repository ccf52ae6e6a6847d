//! Streaming detokenization.

use super::{TextError, Tokenizer};

/// Decodes ids one by one without splitting characters: bytes that are not valid UTF-8 yet are held back
/// until tokens complete them.
#[derive(Debug)]
pub struct DecodeStream<'a> {
    tokenizer: &'a Tokenizer,
    skip_special: bool,
    /// The tokens since the last returned text, after those of that text: some decoders write a token
    /// differently at the beginning.
    ids: Vec<u32>,
    given: usize,
}

impl<'a> DecodeStream<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer, skip_special: bool) -> Self {
        Self { tokenizer, skip_special, ids: Vec::new(), given: 0 }
    }

    /// Adds the next token and returns the text that is complete now, if any.
    ///
    /// # Errors
    /// If the id is not in the vocabulary.
    pub fn push(&mut self, id: u32) -> Result<Option<String>, TextError> {
        self.ids.push(id);
        let fresh = self.fresh()?;
        if fresh.is_empty() || fresh.ends_with(char::REPLACEMENT_CHARACTER) {
            return Ok(None);
        }
        self.ids.drain(..self.given);
        self.given = self.ids.len();
        Ok(Some(fresh))
    }

    /// Returns the text that was held back, with U+FFFD for incomplete characters.
    ///
    /// # Errors
    /// As [`DecodeStream::push`].
    pub fn finish(self) -> Result<String, TextError> {
        self.fresh()
    }

    fn fresh(&self) -> Result<String, TextError> {
        let before = self.tokenizer.decode(&self.ids[..self.given], self.skip_special)?;
        let text = self.tokenizer.decode(&self.ids, self.skip_special)?;
        Ok(text.get(before.len()..).unwrap_or_default().into())
    }
}
