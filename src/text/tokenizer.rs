//! Text to token ids and back.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::OnceLock;

use serde_json::json;
use sha2::{Digest, Sha256};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, NormalizedString, Normalizer};

use super::special_tokens::{SpecialTokens, TextFragment};
use super::{AddedTokenSpec, ChatTemplate, DecodeStream, TextError, folder, gguf, pre_tokenizer};
use crate::weights::{Checkpoint, Gguf};

/// How special tokens in a text are encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Special {
    /// As their tokens: for text rendered by a template.
    Parse,
    /// As plain text: for untrusted text.
    AsText,
}

/// A tokenized text with byte offsets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encoding {
    /// Token ids.
    pub ids: Vec<u32>,
    /// Start and end of each token's text in bytes. Tokens that share a character all cover the whole
    /// character.
    pub offsets: Vec<(usize, usize)>,
}

/// A tokenizer, with the chat template that came with it.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// The tokenizer without special tokens, created on first use.
    as_text: OnceLock<tokenizers::Tokenizer>,
    /// Special tokens that are matched before `inner` runs.
    special_tokens: SpecialTokens,
    roles: Roles,
    vocab_size: usize,
    /// One more than the highest id without padding entries.
    len: usize,
    /// `len` without added tokens.
    own_len: usize,
    /// Tokens added to those of its files.
    added: Vec<AddedTokenSpec>,
    template: Option<ChatTemplate>,
}

/// BOS, EOS, padding and end-of-generation tokens.
#[derive(Debug, Default)]
pub(super) struct Roles {
    pub bos: Option<u32>,
    pub eos: Option<u32>,
    pub pad: Option<u32>,
    pub adds_bos: bool,
    /// End-of-generation tokens.
    pub ends: BTreeSet<u32>,
}

impl Roles {
    /// The roles as [`Tokenizer::fingerprint`] hashes them. Runs keep the hash: the text must not change
    /// with names in the code.
    fn fingerprint_text(&self) -> String {
        let Self { bos, eos, pad, adds_bos, ends } = self;
        format!(
            "Roles {{ bos: {bos:?}, eos: {eos:?}, pad: {pad:?}, adds_bos: {adds_bos}, ends: {ends:?} }}"
        )
    }
}

impl Tokenizer {
    /// The tokenizer of a base model: the GGUF's own, or the folder's.
    ///
    /// # Errors
    /// As [`Tokenizer::from_gguf`] and [`Tokenizer::from_folder`].
    pub fn open(checkpoint: &Checkpoint) -> Result<Self, TextError> {
        Self::open_with(checkpoint, &[])
    }

    /// [`Tokenizer::open`] with tokens added after those of the files.
    ///
    /// # Errors
    /// As [`Tokenizer::open`].
    pub fn open_with(checkpoint: &Checkpoint, added: &[AddedTokenSpec]) -> Result<Self, TextError> {
        match checkpoint {
            Checkpoint::Gguf(gguf) => gguf::read(gguf, added),
            Checkpoint::HuggingFace(folder) => folder::read(folder.path(), added),
        }
    }

    /// The byte-level BPE in a GGUF, id for id as llama.cpp has it.
    ///
    /// # Errors
    /// If the file's tokenizer is of another kind, has an unknown pre-tokenizer, or is malformed; if its
    /// chat template does not parse.
    pub fn from_gguf(file: &Gguf) -> Result<Self, TextError> {
        gguf::read(file, &[])
    }

    /// `tokenizer.json` of a Hugging Face folder, with what `tokenizer_config.json`,
    /// `chat_template.jinja`, `generation_config.json` and `config.json` add to it.
    ///
    /// # Errors
    /// If `tokenizer.json` is missing, or any of them is malformed.
    pub fn from_folder(path: impl AsRef<Path>) -> Result<Self, TextError> {
        folder::read(path.as_ref(), &[])
    }

    pub(super) fn new(
        inner: tokenizers::Tokenizer,
        special_tokens: SpecialTokens,
        roles: Roles,
        vocab_size: usize,
        template: Option<ChatTemplate>,
    ) -> Self {
        let (as_text, added) = (OnceLock::new(), Vec::new());
        let (len, own_len) = (vocab_size, vocab_size);
        Self { inner, as_text, special_tokens, roles, vocab_size, len, own_len, added, template }
    }

    /// Sets the numbers of tokens without padding entries, with and without added tokens, and the added
    /// tokens.
    pub(super) fn of_tokens(
        self,
        (len, own_len): (usize, usize),
        added: &[AddedTokenSpec],
    ) -> Self {
        Self { len, own_len, added: added.to_vec(), ..self }
    }

    /// The ids of a text. Neither BOS nor EOS is ever added: see [`Tokenizer::with_bos`].
    ///
    /// # Errors
    /// If the tokenizers crate reports an error.
    pub fn encode(&self, text: &str, special: Special) -> Result<Vec<u32>, TextError> {
        let mut ids = Vec::new();
        for part in self.special_tokens.partition(text, special == Special::AsText) {
            match part {
                TextFragment::Text(range) => {
                    let part = self.engine(special).encode_fast(&text[range], false);
                    ids.extend(part.map_err(failed)?.get_ids());
                }
                TextFragment::Special(id, _) => ids.push(id),
            }
        }
        Ok(ids)
    }

    /// [`Tokenizer::encode`] with byte offsets.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_with_offsets(&self, text: &str, special: Special) -> Result<Encoding, TextError> {
        let mut found = Encoding { ids: Vec::new(), offsets: Vec::new() };
        for part in self.special_tokens.partition(text, special == Special::AsText) {
            match part {
                TextFragment::Text(range) => {
                    let start = range.start;
                    let part = self.engine(special).encode(&text[range], false).map_err(failed)?;
                    found.ids.extend(part.get_ids());
                    let offsets = part.get_offsets().iter();
                    found.offsets.extend(offsets.map(|(from, to)| (start + from, start + to)));
                }
                TextFragment::Special(id, range) => {
                    found.ids.push(id);
                    found.offsets.push((range.start, range.end));
                }
            }
        }
        Ok(found)
    }

    /// The text of ids; `skip_special` omits special tokens. Invalid UTF-8 becomes U+FFFD.
    ///
    /// # Errors
    /// If an id is not in the vocabulary.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, TextError> {
        if let Some(id) = ids.iter().find(|&&id| self.inner.id_to_token(id).is_none()) {
            let size = self.vocab_size;
            return Err(TextError::Tokenizer(format!("no token {id} in a vocabulary of {size}")));
        }
        self.inner.decode(ids, skip_special).map_err(failed)
    }

    /// A streaming decoder.
    pub fn decode_stream(&self, skip_special: bool) -> DecodeStream<'_> {
        DecodeStream::new(self, skip_special)
    }

    /// `ids` with BOS in front exactly once, if the model was trained with it.
    pub fn with_bos(&self, mut ids: Vec<u32>) -> Vec<u32> {
        if let Some(bos) = self.roles.bos
            && self.roles.adds_bos
            && ids.first() != Some(&bos)
        {
            ids.insert(0, bos);
        }
        ids
    }

    /// The token that begins a sequence.
    pub fn bos(&self) -> Option<u32> {
        self.roles.bos
    }

    /// Whether the model was trained with BOS in front of every sequence.
    pub fn adds_bos(&self) -> bool {
        self.roles.adds_bos
    }

    /// The token that ends a sequence.
    pub fn eos(&self) -> Option<u32> {
        self.roles.eos
    }

    /// The padding token; often the same as EOS.
    pub fn pad(&self) -> Option<u32> {
        self.roles.pad
    }

    /// Whether a token is special: not text.
    pub fn is_special(&self, id: u32) -> bool {
        let added = self.inner.get_added_vocabulary().get_added_tokens_decoder();
        added.get(&id).is_some_and(|token| token.special)
    }

    /// Whether a token that is matched before pre-tokenization is special; `None` for other tokens.
    pub(super) fn added_as(&self, token: &str) -> Option<bool> {
        self.added_token(token).map(|token| token.special)
    }

    /// The properties of a token that is matched before pre-tokenization.
    pub(super) fn added_token(&self, token: &str) -> Option<&AddedToken> {
        let vocabulary = self.inner.get_added_vocabulary();
        let id = self.inner.token_to_id(token)?;
        vocabulary.get_added_tokens_decoder().get(&id)
    }

    /// Whether there is a normalizer.
    pub(super) fn normalizes(&self) -> bool {
        self.inner.get_normalizer().is_some()
    }

    /// The normalized text of a token alone, if it differs from that in the middle of a text.
    pub(super) fn written_alone(&self, token: &str) -> Result<Option<String>, TextError> {
        let Some(normalizer) = self.inner.get_normalizer() else { return Ok(None) };
        let written = |text: &str| -> Result<String, TextError> {
            let mut text = NormalizedString::from(text);
            normalizer.normalize(&mut text).map_err(failed)?;
            Ok(text.get().to_owned())
        };
        let (alone, before) = (written(token)?, written("a")?);
        let inside = written(&format!("a{token}"))?;
        let same = inside.strip_prefix(&before) == Some(&alone);
        Ok((!same).then_some(alone))
    }

    /// Tokens added to those of its files.
    pub fn added(&self) -> &[AddedTokenSpec] {
        &self.added
    }

    /// Whether a token ends generation: EOS, end of turn, and similar ones.
    pub fn is_end_of_generation(&self, id: u32) -> bool {
        self.roles.ends.contains(&id)
    }

    /// The text of a token in the vocabulary.
    pub fn token(&self, id: u32) -> Option<String> {
        // For added tokens the crate returns the normalized text.
        let added = self.inner.get_added_vocabulary().get_added_tokens_decoder().get(&id);
        added.map(|token| token.content.clone()).or_else(|| self.inner.id_to_token(id))
    }

    /// The id of a token by its text in the vocabulary.
    pub fn id_of(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// One more than the highest id.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// One more than the highest id without padding entries at the end: transformers' `len(tokenizer)`, and
    /// the id of the next added token.
    #[expect(clippy::len_without_is_empty, reason = "a tokenizer always has tokens")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// [`Tokenizer::len`] without added tokens.
    pub(super) fn own_len(&self) -> usize {
        self.own_len
    }

    /// Number of rows that embedding and head need for the added tokens; 0 without added tokens, also for a
    /// base whose files have more tokens than rows.
    pub fn rows_needed(&self) -> usize {
        if self.added.is_empty() { 0 } else { self.len }
    }

    /// The tokenizer as a `tokenizer.json`.
    pub(super) fn to_json(&self) -> Result<String, TextError> {
        self.inner.to_string(true).map_err(failed)
    }

    /// For each id, its number of bytes of text, 0 for special tokens: the denominator of bits per byte.
    /// Exact for byte-level vocabularies, whose tokens have one character for each byte; in others a space
    /// that the tokenizer adds in front of a text is counted too.
    pub fn byte_lengths(&self) -> Vec<u32> {
        let added = self.inner.get_added_vocabulary().get_added_tokens_decoder();
        let alphabet = ByteLevel::alphabet();
        let tokens: Vec<Option<String>> =
            (0..self.vocab_size as u32).map(|id| self.token(id)).collect();
        let mut plain = (0..).zip(&tokens).filter(|(id, _)| !added.contains_key(id));
        let byte_level =
            plain.all(|(_, token)| token.iter().all(|t| t.chars().all(|c| alphabet.contains(&c))));
        let length = |(id, token): (u32, &Option<String>)| match (token, added.get(&id)) {
            (None, _) => 0,
            (Some(_), Some(added)) if added.special => 0,
            (Some(token), Some(_)) => token.len(),
            (Some(token), None) if byte_level => token.chars().count(),
            (Some(token), None) if token.len() == 6 && token.starts_with("<0x") => 1,
            (Some(token), None) => token.replace('\u{2581}', " ").len(),
        };
        (0..).zip(&tokens).map(|token| length(token) as u32).collect()
    }

    /// A hash of everything that token ids depend on.
    ///
    /// # Errors
    /// If the crate cannot serialize the tokenizer.
    pub fn fingerprint(&self) -> Result<String, TextError> {
        let json = self.inner.to_string(false).map_err(failed)?;
        let beside =
            format!("{} {}", self.special_tokens.fingerprint_text(), self.roles.fingerprint_text());
        let digest = Sha256::new().chain_update(json).chain_update(beside);
        Ok(digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// llama.cpp's name of the pre-tokenizer, if it has one.
    pub(super) fn pre_tokenizer_name(&self, ignore_merges: bool) -> Option<&'static str> {
        pre_tokenizer::identify(self.inner.get_pre_tokenizer()?, ignore_merges)
    }

    /// Whether another tokenizer gives other ids for some text of `pre_tokenizer::PROBES`.
    pub fn splits_differently(&self, other: &Self) -> bool {
        let ids = |of: &Self, text| of.encode(text, Special::AsText).ok();
        pre_tokenizer::PROBES.iter().any(|text| ids(self, text) != ids(other, text))
    }

    /// Sets the time that the chat template reads, in seconds since 1970 UTC.
    pub fn set_template_time(&mut self, now: u64) {
        if let Some(template) = &mut self.template {
            template.set_now(now);
        }
    }

    /// Replaces the chat template; its special tokens stay the same.
    ///
    /// # Errors
    /// If it does not parse.
    pub fn set_chat_template(&mut self, text: &str) -> Result<(), TextError> {
        let template = match &self.template {
            Some(template) => template.with_text(text)?,
            None => {
                let named = |id: Option<u32>| id.and_then(|id| self.token(id));
                let Roles { bos, eos, pad, .. } = self.roles;
                let (bos, eos, pad) = (named(bos), named(eos), named(pad));
                let special = [
                    ("bos_token", bos.as_deref()),
                    ("eos_token", eos.as_deref()),
                    ("pad_token", pad.as_deref()),
                ];
                ChatTemplate::new(text, None, &special)?
            }
        };
        self.template = Some(template);
        Ok(())
    }

    /// Replaces the chat template by that of a file, and sets variables, each as `KEY=JSON`.
    ///
    /// # Errors
    /// If the file cannot be read or parsed; if a variable is not valid JSON, as text without quotes and
    /// Python's `False`; if there are variables but no template.
    pub fn change_template(
        &mut self,
        file: Option<&Path>,
        variables: &[String],
    ) -> Result<(), TextError> {
        if let Some(path) = file {
            let io = |source| TextError::Io { path: path.into(), source };
            let text = std::fs::read_to_string(path).map_err(io)?;
            let named = |error| TextError::format(path, format!("{error}"));
            self.set_chat_template(&text).map_err(named)?;
        }
        if variables.is_empty() {
            return Ok(());
        }
        let fault = |reason: String| TextError::Template { line: 0, reason };
        let mut values = serde_json::Map::new();
        for variable in variables {
            let needed =
                || fault(format!("{variable:?}, needed KEY=JSON as enable_thinking=false"));
            let (key, value) = variable.split_once('=').ok_or_else(needed)?;
            let value = serde_json::from_str(value).map_err(|_| needed())?;
            values.insert(key.into(), value);
        }
        let Some(template) = &mut self.template else {
            return Err(fault("there is none to have variables".into()));
        };
        template.set_variables(&values)
    }

    /// The tokens that the chat template writes after the end-of-turn token of an answer, usually a newline;
    /// none without a template.
    pub fn after_turn(&self) -> Result<Vec<u32>, TextError> {
        let Some(template) = self.chat_template() else { return Ok(Vec::new()) };
        let turn = |role: &str| json!({ "role": role, "content": "?" });
        let text = template.render(&[turn("user"), turn("assistant")], None, false)?;
        let tokens = self.encode(&text, Special::Parse)?;
        let end = tokens.iter().rposition(|&token| self.is_end_of_generation(token));
        Ok(end.map_or(Vec::new(), |end| tokens[end + 1..].to_vec()))
    }

    /// The chat template, if the files have one.
    pub fn chat_template(&self) -> Option<&ChatTemplate> {
        self.template.as_ref()
    }

    fn engine(&self, special: Special) -> &tokenizers::Tokenizer {
        match special {
            Special::Parse => &self.inner,
            Special::AsText => self.as_text.get_or_init(|| {
                let mut blind = self.inner.clone();
                blind.set_encode_special_tokens(true);
                blind
            }),
        }
    }
}

/// The crate's errors are boxes; they are already sentences.
fn failed(error: tokenizers::Error) -> TextError {
    TextError::Tokenizer(error.to_string())
}

/// Tokens that end generation by their text, independent of the file (as in llama.cpp).
pub(super) const EOG_TOKENS: &[&str] = &[
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "<｜end▁of▁sentence｜>",
    "[e~[",
];

/// The ids of [`EOG_TOKENS`] in a vocabulary, but for two names that in some families end nothing.
pub(super) fn eog_by_text(id_of: impl Fn(&str) -> Option<u32>) -> BTreeSet<u32> {
    let has = |token: &str| id_of(token).is_some();
    let harmony = has("<|return|>") && has("<|call|>")
        || (has("<|call|>") || has("<|calls|>")) && has("<|flush|>");
    let plain_s = has("<|tool_response>") || has("<|plamo:eos|>");
    let ends = EOG_TOKENS.iter().filter(|&&token| match token {
        "<|end|>" => !harmony,
        "</s>" => !plain_s,
        _ => true,
    });
    ends.filter_map(|token| id_of(token)).collect()
}
