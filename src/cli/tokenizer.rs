//! `quantune tokenizer`.

use std::path::PathBuf;

use anyhow::Result;
use serde_json::{Value, json};

use super::read_text;
use crate::text::Special;
use crate::weights::Checkpoint;

#[derive(Debug, clap::Subcommand)]
pub enum TokenizerCommand {
    /// The token ids of a text, without any added
    Encode(Encode),
}

#[derive(Debug, clap::Args)]
pub struct Encode {
    /// The base: a GGUF file or a Hugging Face folder
    #[arg(long)]
    base: PathBuf,
    /// The text, a UTF-8 file
    #[arg(long)]
    text: PathBuf,
    /// Take special tokens in the text for what they are, not for text
    #[arg(long)]
    parse_special: bool,
}

impl TokenizerCommand {
    pub fn run(self, json: bool) -> Result<Value> {
        let Self::Encode(Encode { base, text, parse_special }) = self;
        let tokenizer = crate::text::Tokenizer::open(&Checkpoint::open(base)?)?;
        let special = if parse_special { Special::Parse } else { Special::AsText };
        let ids = tokenizer.encode(&read_text(&text)?, special)?;
        if !json {
            let ids: Vec<String> = ids.iter().map(u32::to_string).collect();
            crate::cli::say!("{}", ids.join(" "));
        }
        Ok(json!({ "tokens": ids.len(), "token_ids": ids }))
    }
}
