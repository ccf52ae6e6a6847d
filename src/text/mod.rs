//! Tokenizer and chat template, from the file that holds the weights or from the folder beside
//! them. One engine for training, chat and serving; what a token means to a model is not known.
//!
//! A GGUF's byte-level BPE gives llama.cpp's ids, a folder's `tokenizer.json` those of the
//! `tokenizers` crate. Encoding never adds BOS or EOS: whoever wants BOS asks for it once.

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

pub use added::{AddedTokenSpec, added_beside};
pub use error::TextError;
pub use stream::DecodeStream;
pub use template::{ChatTemplate, first_second, today};
pub use tokenizer::{Encoding, Special, Tokenizer};
pub use train::{
    SMALLEST_VOCABULARY, SPECIAL_TOKENS, TokenizerTrainer, TrainedTokenizer, TrainingReport,
    WordCut,
};
