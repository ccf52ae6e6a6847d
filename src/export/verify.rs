//! Opens a written model again and compares it with its source.

use std::path::Path;

use quantune_adapters::rng::Stream;

use super::{ExportError, FileType};
use crate::model::{ActiveAdapter, Adapters, Config, Decoder, Rows};
use crate::ops::Compute;
use crate::text::{AddedTokenSpec, Special, Tokenizer};
use crate::weights::Checkpoint;

/// A text of several languages, code, digits and emoji.
const TEXT: &str = "The ferryman said: \"In 1987 there were 365 boats on the river.\" She'd no money, \
    so she walked.\n\nfn total(boats: &[Boat]) -> f64 { boats.iter().map(|b| b.seats * 3.5).sum() }\n\
    Die Fähre fährt um acht Uhr; Паром идёт через реку. 渡し船 🚀";

/// Maximum number of tokens that are compared.
const TOKENS: usize = 96;

/// Distance between two models on some tokens.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Distance {
    /// Mean Kullback-Leibler divergence from the first, in nats per token.
    pub mean_kl: f64,
    /// Largest difference between the log-probs of a next token.
    pub worst_logp: f64,
    /// Number of tokens compared.
    pub tokens: usize,
}

/// Result of [`verify`].
#[derive(Debug, Clone, Copy)]
pub struct Verified {
    /// Distance between the written model and its source.
    pub distance: Distance,
    /// Whether the tokenizers differ on some texts of many scripts: llama.cpp has no name for how some
    /// tokenizers split accents and letters beyond ASCII, and a GGUF no key for Unicode normalization.
    pub cut_otherwise: bool,
}

impl Verified {
    /// A warning about the model written to `path`, if there is one.
    pub fn warning(&self, path: &Path) -> Option<String> {
        self.cut_otherwise.then(|| {
            format!(
                "{} splits some words differently from the base's tokenizer (accents apart from their letters, or \
                 letters neither of ASCII nor of one case): the format cannot say how that one does",
                path.display()
            )
        })
    }
}

/// Largest allowed distance between a written model and its source.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct VerifyBounds {
    mean_kl: f64,
    worst_logp: f64,
}

impl VerifyBounds {
    /// F32: differences only by the order of sums.
    pub const F32: Self = Self { mean_kl: 1e-6, worst_logp: 1e-3 };
    /// F16: 11 significant bits.
    pub const F16: Self = Self { mean_kl: 1e-2, worst_logp: 0.5 };
    /// BF16: 8 significant bits.
    pub const BF16: Self = Self { mean_kl: 0.2, worst_logp: 4.0 };
    /// Quantized: any distance, but it must be a number.
    pub const QUANTIZED: Self = Self { mean_kl: f64::MAX, worst_logp: f64::MAX };

    /// The bounds of a file type; quantized ones are unbounded.
    pub fn of(file_type: FileType) -> Self {
        match file_type {
            FileType::F32 => Self::F32,
            FileType::F16 => Self::F16,
            FileType::BF16 => Self::BF16,
            _ => Self::QUANTIZED,
        }
    }

    /// Checks that a distance is within the bounds.
    ///
    /// # Errors
    /// With a clause about the distance, if it is not or is NaN.
    pub fn check(self, distance: Distance) -> Result<(), String> {
        let Distance { mean_kl, worst_logp, .. } = distance;
        if mean_kl <= self.mean_kl && worst_logp <= self.worst_logp {
            return Ok(());
        }
        Err(format!(
            "its log-probs are off by up to {worst_logp:.1e} and its mean KL is {mean_kl:.1e}, \
             allowed were {:.0e} and {:.0e}",
            self.worst_logp, self.mean_kl
        ))
    }
}

/// Log-softmax of the logits of all tokens `(tokens, vocab_size)`, one row at a time.
fn log_probs(
    decoder: &Decoder,
    active: &[ActiveAdapter],
    tokens: &[u32],
) -> Result<Vec<Vec<f32>>, ExportError> {
    let hidden = decoder.hidden(&Rows::new(&[tokens]), Adapters::Same(active))?;
    let rows = decoder.logits(&hidden, Adapters::Same(active))?.to_vec2::<f32>()?;
    Ok(rows.into_iter().map(log_softmax).collect())
}

pub(super) fn log_softmax(mut row: Vec<f32>) -> Vec<f32> {
    let most = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = row.iter().map(|l| f64::from(l - most).exp()).sum();
    let log = f64::from(most) + sum.ln();
    row.iter_mut().for_each(|l| *l = (f64::from(*l) - log) as f32);
    row
}

/// `KL(p, q)` of two rows of log-probs, in nats.
pub(super) fn divergence(p: &[f32], q: &[f32]) -> f64 {
    let terms = p.iter().zip(q).map(|(p, q)| {
        let (p, q) = (f64::from(*p), f64::from(*q));
        p.exp() * (p - q)
    });
    terms.sum::<f64>().max(0.0)
}

pub(super) fn distance(
    source: (&Decoder, &[ActiveAdapter]),
    written: &Decoder,
    active: &[ActiveAdapter],
    tokens: &[u32],
) -> Result<Distance, ExportError> {
    let theirs = log_probs(source.0, source.1, tokens)?;
    let ours = log_probs(written, active, tokens)?;
    let (mut kl, mut worst) = (0.0, 0f64);
    for (i, (p, q)) in theirs.iter().zip(&ours).enumerate() {
        kl += divergence(p, q);
        if let Some(next) = tokens.get(i + 1) {
            let off = f64::from(p[*next as usize] - q[*next as usize]).abs();
            worst = if off.is_nan() { f64::NAN } else { worst.max(off) };
        }
    }
    let tokens = tokens.len();
    Ok(Distance { mean_kl: kl / tokens as f64, worst_logp: worst, tokens })
}

/// Opens the model written to `out` and compares it with the base with `active` adapters: the tokens of a
/// text, then the log-probs of the next tokens. A model that does not load, tokenizes differently or
/// exceeds `bounds` is removed.
///
/// # Errors
/// If the written model differs, or the base cannot be read.
pub fn verify(
    base: &Checkpoint,
    active: &[ActiveAdapter],
    written: &Path,
    bounds: VerifyBounds,
) -> Result<Verified, ExportError> {
    verify_with_added_tokens(base, &[], active, written, bounds)
}

/// [`verify`] of a base with added tokens, which are compared too.
///
/// # Errors
/// As [`verify`].
pub fn verify_with_added_tokens(
    base: &Checkpoint,
    added: &[AddedTokenSpec],
    active: &[ActiveAdapter],
    written: &Path,
    bounds: VerifyBounds,
) -> Result<Verified, ExportError> {
    let source = load_with_added_tokens(base, added)?;
    compare(&source, (base, added), active, written, bounds).map_err(|reason| {
        let path = written.to_path_buf();
        let _ = if path.is_dir() {
            std::fs::remove_dir_all(&path)
        } else {
            std::fs::remove_file(&path)
        };
        ExportError::Differs { path, reason }
    })
}

/// The F32 decoder of a base, with rows for added tokens.
///
/// # Errors
/// If the model or its tokenizer cannot be read.
pub fn load_with_added_tokens(
    base: &Checkpoint,
    added: &[AddedTokenSpec],
) -> Result<Decoder, ExportError> {
    let decoder = Decoder::load(base, Compute::F32)?;
    match added {
        // Without added tokens, a base may have a tokenizer that is not supported.
        [] => Ok(decoder),
        added => {
            let tokenizer = Tokenizer::open_with(base, added)?;
            Ok(decoder.with_vocabulary(tokenizer.rows_needed())?)
        }
    }
}

fn compare(
    source: &Decoder,
    (base, added): (&Checkpoint, &[AddedTokenSpec]),
    active: &[ActiveAdapter],
    written: &Path,
    bounds: VerifyBounds,
) -> Result<Verified, String> {
    let text = |e: &dyn std::fmt::Display| e.to_string();
    let checkpoint = Checkpoint::open(written).map_err(|e| text(&e))?;
    let decoder = Decoder::load(&checkpoint, Compute::F32).map_err(|e| text(&e))?;
    let mut cut_otherwise = false;
    if let Ok(theirs) = Tokenizer::open_with(base, added) {
        let ours = Tokenizer::open(&checkpoint).map_err(|e| text(&e))?;
        let between: String = added.iter().map(|token| format!(" a{}b", token.text)).collect();
        for (sample, special) in [(TEXT, Special::AsText), (&*between, Special::Parse)] {
            let theirs = theirs.encode(sample, special).map_err(|e| text(&e))?;
            if ours.encode(sample, special).map_err(|e| text(&e))? != theirs {
                return Err("its tokenizer cuts text differently".into());
            }
        }
        cut_otherwise = theirs.splits_differently(&ours);
    }
    let mut tokens = tokens(base, &source.config).map_err(|e| text(&e))?;
    if let (false, Ok(tokenizer)) = (added.is_empty(), Tokenizer::open_with(base, added)) {
        let ids = added.iter().filter_map(|token| tokenizer.id_of(&token.text));
        let room = source.config.max_position_embeddings.saturating_sub(tokens.len());
        tokens.extend(ids.take(room.min(TOKENS)));
    }
    let found = distance((source, active), &decoder, &[], &tokens).map_err(|e| text(&e))?;
    bounds.check(found).map(|()| Verified { distance: found, cut_otherwise })
}

/// The tokens that are compared: those of a text, or random ones where a base has no tokenizer.
///
/// # Errors
/// If the tokenizer fails on the text.
pub fn tokens(base: &Checkpoint, config: &Config) -> Result<Vec<u32>, ExportError> {
    let vocab_size = config.vocab_size as u32;
    let tokens: Vec<u32> = match Tokenizer::open(base) {
        Ok(tokenizer) => tokenizer.encode(TEXT, Special::AsText)?,
        Err(_) => {
            let mut stream = Stream::new(0, "verify", &[]);
            (0..TOKENS).map(|_| (stream.next_u64() % u64::from(vocab_size)) as u32).collect()
        }
    };
    let most = TOKENS.min(config.max_position_embeddings);
    Ok(tokens.into_iter().filter(|id| *id < vocab_size).take(most).collect())
}
