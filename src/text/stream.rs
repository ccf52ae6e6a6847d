//! Text that arrives token by token.

use super::{TextError, Tokenizer};

/// Turns ids into text as they come, and never splits a character: what is not yet UTF-8 waits
/// for the tokens that complete it.
#[derive(Debug)]
pub struct DecodeStream<'a> {
    tokenizer: &'a Tokenizer,
    skip_special: bool,
    /// The tokens since the last text was given out, and before them those of that text: some
    /// decoders write a token differently at the very start.
    ids: Vec<u32>,
    given: usize,
}

impl<'a> DecodeStream<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer, skip_special: bool) -> Self {
        Self { tokenizer, skip_special, ids: Vec::new(), given: 0 }
    }

    /// The next token; what can be shown of the text now, if anything.
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

    /// What still waits at the end, bytes that never became a character as U+FFFD.
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
