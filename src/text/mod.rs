//! Tokenizer and chat template, from a GGUF or from a Hugging Face folder. Training, chat and generation
//! use the same code. This module does not know models.
//!
//! A GGUF's byte-level BPE gives llama.cpp's ids, a folder's `tokenizer.json` those of the `tokenizers`
//! crate. Encoding never adds BOS or EOS; [`Tokenizer::with_bos`] adds BOS.

mod added;
pub mod convert;
mod error;
mod folder;
mod gguf;
mod pre_tokenizer;
mod python;
mod sentencepiece;
mod special_tokens;
mod stream;
mod template;
mod tokenizer;
mod train;

pub use added::{AddedTokenSpec, added_by_adapters};
pub use error::TextError;
pub use stream::DecodeStream;
pub(crate) use template::today;
pub use template::{ChatTemplate, first_second};
pub use tokenizer::{Encoding, Special, Tokenizer};
pub use train::{
    PreTokenizerKind, SPECIAL_TOKENS, TokenizerTrainer, TrainedTokenizer, TrainingReport,
};
