//! Training of tokenizers: byte-level BPE (Sennrich et al. 2016) on the words of a text.
//!
//! Words are counted while the text is streamed; the tokenizers crate learns the merges from the counts. The
//! result is written as files of a Hugging Face folder. The pre-tokenizer is one that llama.cpp has a name
//! for, so that a GGUF with this vocabulary gives the same ids.

use std::collections::HashMap;
use std::path::Path;

use rayon::prelude::*;
use serde::Serialize;
use serde_json::json;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::tokenizer::normalizer::SplitDelimiterBehavior;
use tokenizers::{
    AddedToken, Model, OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer as _,
};

use super::{TextError, pre_tokenizer};
use crate::weights::write_atomically;

/// The special tokens, which have the first ids: end of document, and start and end of a chat turn.
pub const SPECIAL_TOKENS: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];

/// Minimum vocabulary size: the special tokens and one token for each byte.
pub(crate) const SMALLEST_VOCABULARY: usize = SPECIAL_TOKENS.len() + 256;

/// ChatML.
const CHAT_TEMPLATE: &str = "{% for message in messages %}\
    {{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}\
    {% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

/// Minimum frequency of a pair to become a token, as in the byte-level trainer of the tokenizers library.
const MIN_FREQUENCY: u64 = 2;
/// Maximum number of distinct words; beyond it the rarest are dropped, so that a corpus of any size takes at
/// most about a gigabyte.
const MOST_WORDS: usize = 1 << 20;
/// Maximum bytes of a word that merges are learned from: the trainer's time grows with the square.
const LONGEST_WORD: usize = 512;

/// The pre-tokenizer that splits text into words before merges, with llama.cpp's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PreTokenizerKind {
    /// GPT-2's words.
    Gpt2,
    /// GPT-2's words, with single digits as words.
    Smollm,
    /// Llama 3's words: punctuation joins the word after it, digits are in groups of three.
    LlamaBpe,
}

impl PreTokenizerKind {
    /// All kinds.
    pub const ALL: [Self; 3] = [Self::Gpt2, Self::Smollm, Self::LlamaBpe];

    /// The name in `tokenizer.ggml.pre` of a GGUF.
    pub fn name(self) -> &'static str {
        match self {
            Self::Gpt2 => "gpt-2",
            Self::Smollm => "smollm",
            Self::LlamaBpe => "llama-bpe",
        }
    }

    /// The pre-tokenizer of `tokenizer.json`, in the same form as in the folders of published models.
    fn build(self) -> Result<PreTokenizerWrapper, TextError> {
        let bytes = |use_regex| ByteLevel::new(false, true, use_regex).into();
        Ok(match self {
            Self::Gpt2 => bytes(true),
            Self::Smollm => Sequence::new(vec![Digits::new(true).into(), bytes(true)]).into(),
            Self::LlamaBpe => {
                let pattern = SplitPattern::Regex(pre_tokenizer::LLAMA3.into());
                let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false);
                Sequence::new(vec![split.map_err(failed)?.into(), bytes(false)]).into()
            }
        })
    }

    /// Whether a word that is a token is not split, whatever the merges are (`ignore_merges`).
    fn ignores_merges(self) -> bool {
        matches!(self, Self::LlamaBpe)
    }
}

impl std::str::FromStr for PreTokenizerKind {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|cut| cut.name() == name).ok_or_else(|| {
            let known = Self::ALL.map(Self::name).join(", ");
            format!("{name:?} is none of {known}")
        })
    }
}

/// Counts words and learns merges from them.
#[derive(Debug)]
pub struct TokenizerTrainer {
    cut: PreTokenizerKind,
    pre_tokenizer: PreTokenizerWrapper,
    vocab_size: usize,
    most_words: usize,
    /// Words in printable characters, one for each byte, as [`ByteLevel`] maps them.
    words: HashMap<Box<str>, u64>,
    report: TrainingReport,
}

/// Statistics of training a tokenizer, and its compression of the text.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct TrainingReport {
    /// Vocabulary size: smaller than requested if the text has no more pairs.
    pub vocab_size: usize,
    /// Bytes of text.
    pub bytes: u64,
    /// Tokens of all counted words.
    pub tokens: u64,
    /// Bytes of counted words per token.
    pub bytes_per_token: f64,
    /// Distinct words.
    pub words: usize,
    /// Rare words that were dropped; a word counts again each time.
    pub words_forgotten: u64,
    /// Words that were too long.
    pub words_too_long: u64,
}

impl TokenizerTrainer {
    /// # Errors
    /// If the vocabulary would not hold the special tokens and all bytes.
    pub fn new(vocab_size: usize, cut: PreTokenizerKind) -> Result<Self, TextError> {
        if vocab_size < SMALLEST_VOCABULARY {
            return Err(TextError::Tokenizer(format!(
                "a vocabulary of {vocab_size} tokens, needed at least {SMALLEST_VOCABULARY}: \
                 {} special ones and one for each byte",
                SPECIAL_TOKENS.len()
            )));
        }
        Ok(Self {
            cut,
            pre_tokenizer: cut.build()?,
            vocab_size,
            most_words: MOST_WORDS,
            words: HashMap::new(),
            report: TrainingReport::default(),
        })
    }

    /// Counts the words of some texts in parallel. The counts do not depend on the number of threads.
    ///
    /// # Errors
    /// If an expression of the pre-tokenizer fails on a text.
    pub fn add<T: AsRef<str> + Sync>(&mut self, texts: &[T]) -> Result<(), TextError> {
        let counts = texts.par_iter().map(|text| self.count(text.as_ref()));
        let counts = counts.try_reduce(Default::default, |one, other| Ok(merged(one, other)))?;
        self.report.bytes += texts.iter().map(|text| text.as_ref().len() as u64).sum::<u64>();
        self.report.words_too_long += counts.too_long;
        let words = std::mem::take(&mut self.words);
        self.words = sum_counts(words, counts.words);
        if self.words.len() > self.most_words {
            self.drop_rare_words();
        }
        Ok(())
    }

    /// Learns the merges.
    ///
    /// # Errors
    /// If there are no words, or the tokenizers crate reports an error.
    pub fn train(mut self) -> Result<TrainedTokenizer, TextError> {
        if self.words.is_empty() {
            return Err(TextError::Tokenizer(
                "no words in the text, needed some to learn from".into(),
            ));
        }
        let special = SPECIAL_TOKENS.map(|token| AddedToken::from(token, true).normalized(false));
        let trainer = BpeTrainer::builder()
            .vocab_size(self.vocab_size)
            .min_frequency(MIN_FREQUENCY)
            .special_tokens(special.to_vec())
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .show_progress(false)
            .build();
        let halvings = halvings(&self.words);
        let halved = |count: u64| count.div_ceil(1 << halvings);
        let counts = self.words.iter().map(|(word, &count)| ((&**word).into(), halved(count)));
        let mut bpe = BPE::default();
        trainer.do_train(&counts.collect(), &mut bpe).map_err(failed)?;
        bpe.ignore_merges = self.cut.ignores_merges();

        self.measure(&bpe)?;
        let mut inner = tokenizers::Tokenizer::new(bpe);
        inner.with_pre_tokenizer(Some(self.pre_tokenizer));
        inner.with_decoder(Some(ByteLevel::default()));
        inner.add_special_tokens(special).map_err(failed)?;
        let json = inner.to_string(true).map_err(failed)?;
        Ok(TrainedTokenizer { json, report: self.report })
    }

    fn count(&self, text: &str) -> Result<WordCounts, TextError> {
        let mut pieces = PreTokenizedString::from(text);
        self.pre_tokenizer.pre_tokenize(&mut pieces).map_err(failed)?;
        let mut counts = WordCounts::default();
        for (word, _, _) in pieces.get_splits(OffsetReferential::Normalized, OffsetType::Byte) {
            match counts.words.get_mut(word) {
                Some(count) => *count += 1,
                None if word.chars().count() > LONGEST_WORD => counts.too_long += 1,
                None => _ = counts.words.insert(word.into(), 1),
            }
        }
        Ok(counts)
    }

    /// Keeps the most frequent words, at most half of the maximum number. As in lossy
    /// counting (Manku and Motwani 2002), the remaining counts are slightly too low.
    fn drop_rare_words(&mut self) {
        let mut counts: Vec<u64> = self.words.values().copied().collect();
        counts.sort_unstable_by(|a, b| b.cmp(a));
        let too_rare = counts[self.most_words / 2];
        let before = self.words.len();
        self.words.retain(|_, count| *count > too_rare);
        self.report.words_forgotten += (before - self.words.len()) as u64;
    }

    /// Counts the tokens of all words. Merges stay within words, so that these are all tokens of the text.
    fn measure(&mut self, bpe: &BPE) -> Result<(), TextError> {
        let lengths = self.words.par_iter().map(|(word, count)| {
            let tokens = bpe.tokenize(word).map_err(failed)?.len() as u64;
            Ok((tokens * count, word.chars().count() as u64 * count))
        });
        let sum = |a: (u64, u64), b: (u64, u64)| Ok::<_, TextError>((a.0 + b.0, a.1 + b.1));
        let (tokens, bytes) = lengths.try_reduce(|| (0, 0), sum)?;
        self.report.vocab_size = bpe.get_vocab_size();
        self.report.words = self.words.len();
        self.report.tokens = tokens;
        self.report.bytes_per_token = bytes as f64 / tokens as f64;
        Ok(())
    }
}

#[derive(Default)]
struct WordCounts {
    words: HashMap<Box<str>, u64>,
    too_long: u64,
}

fn merged(one: WordCounts, other: WordCounts) -> WordCounts {
    let too_long = one.too_long + other.too_long;
    WordCounts { words: sum_counts(one.words, other.words), too_long }
}

/// The sums do not depend on the order of addition.
fn sum_counts(
    one: HashMap<Box<str>, u64>,
    other: HashMap<Box<str>, u64>,
) -> HashMap<Box<str>, u64> {
    let (mut most, fewer) = if one.len() < other.len() { (other, one) } else { (one, other) };
    for (word, count) in fewer {
        *most.entry(word).or_default() += count;
    }
    most
}

/// How often counts must be halved until the trainer, which adds them up in 32 bits, cannot
/// overflow: no pair is more frequent than one of single bytes.
fn halvings(words: &HashMap<Box<str>, u64>) -> u32 {
    let mut pairs: HashMap<(char, char), u64> = HashMap::new();
    for (word, count) in words {
        for pair in word.chars().zip(word.chars().skip(1)) {
            *pairs.entry(pair).or_default() += count;
        }
    }
    // Halving rounds up, each word by less than one, so the sum may be off by one a word.
    let most = pairs.into_values().max().unwrap_or(0);
    let rounding = (words.len() * LONGEST_WORD) as u64;
    (0..64).find(|halvings| (most >> halvings) + rounding <= i32::MAX as u64).unwrap_or(0)
}

/// The files of a new tokenizer.
#[derive(Debug, Clone)]
pub struct TrainedTokenizer {
    json: String,
    /// Statistics of its training.
    pub report: TrainingReport,
}

impl TrainedTokenizer {
    /// Writes `tokenizer.json`, `tokenizer_config.json` and `generation_config.json`.
    ///
    /// A document ends in `<|endoftext|>`, which is also BOS, since a
    /// model trained on packed documents has seen it before each. A turn ends in `<|im_end|>`. Both
    /// end generation. Padding is `<|endoftext|>`, not what a chat's answer is scored or ends at.
    ///
    /// # Errors
    /// If there is a tokenizer already, or the system reports an error.
    pub fn write(&self, folder: &Path) -> Result<(), TextError> {
        let [end_of_text, _, end_of_turn] = SPECIAL_TOKENS;
        let json_path = folder.join("tokenizer.json");
        if json_path.exists() {
            return Err(TextError::format(folder, "has a tokenizer.json, needed a new folder"));
        }
        std::fs::create_dir_all(folder)
            .map_err(|source| TextError::Io { path: folder.into(), source })?;
        let id = |token| SPECIAL_TOKENS.iter().position(|t| *t == token);
        let config = json!({
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": end_of_text,
            "eos_token": end_of_text,
            "pad_token": end_of_text,
            "additional_special_tokens": [SPECIAL_TOKENS[1], end_of_turn],
            "add_bos_token": false,
            "clean_up_tokenization_spaces": false,
            "chat_template": CHAT_TEMPLATE,
        });
        let generation = json!({
            "bos_token_id": id(end_of_text),
            "eos_token_id": [id(end_of_text), id(end_of_turn)],
            "pad_token_id": id(end_of_text),
        });
        let write = |path: &Path, text: &str| {
            use std::io::Write;
            write_atomically(path, |file| file.write_all(text.as_bytes()))
        };
        write(&folder.join("tokenizer_config.json"), &format!("{config:#}\n"))?;
        write(&folder.join("generation_config.json"), &format!("{generation:#}\n"))?;
        // Last, so that a folder with this file is whole.
        write(&json_path, &self.json)?;
        Ok(())
    }
}

fn failed(error: tokenizers::Error) -> TextError {
    TextError::Tokenizer(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn llama_cpp_knows_every_cut_and_its_rules() {
        for cut in PreTokenizerKind::ALL {
            let row = pre_tokenizer::find(cut.name()).unwrap();
            assert_eq!(row.ignore_merges, cut.ignores_merges());
            assert_eq!(cut.name().parse(), Ok(cut));
        }
        assert_eq!(
            "bert".parse::<PreTokenizerKind>().unwrap_err(),
            "\"bert\" is none of gpt-2, smollm, llama-bpe"
        );
    }

    #[test]
    fn rare_words_are_dropped_if_there_are_too_many() {
        let mut trainer = TokenizerTrainer::new(300, PreTokenizerKind::Gpt2).unwrap();
        trainer.most_words = 8;
        trainer.add(&["a a a a b b b b c c c d d e e f f"]).unwrap(); // 7 words, "a" twice
        assert_eq!(trainer.report.words_forgotten, 0);
        trainer.add(&["g", "h", "c"]).unwrap();
        let mut left: Vec<(&str, u64)> = trainer.words.iter().map(|(w, &c)| (&**w, c)).collect();
        left.sort_unstable();
        // Words but the first begin with a space, which is written so.
        assert_eq!(left, [("Ġa", 3), ("Ġb", 4), ("Ġc", 3)]);
        assert_eq!(trainer.report.words_forgotten, 7);
    }

    #[test]
    fn counts_beyond_32_bits_are_halved() {
        let check = |count: u64, halved| {
            let words = HashMap::from([("ab".into(), count), ("abab".into(), count)]);
            assert_eq!(halvings(&words), halved, "{count}");
        };
        check(1 << 20, 0);
        check(1 << 30, 1);
        check(1 << 40, 11);
    }
}
