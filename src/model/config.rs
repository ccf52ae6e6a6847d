//! The configuration of a decoder, read from its checkpoint: its family and its sizes.

mod family;
mod gguf;
mod json;

use std::path::Path;

use super::ModelError;
use crate::ops::attention::Heads;
use crate::ops::{AttentionConfig, LogitSoftcap};
use crate::weights::Checkpoint;
pub use family::{FAMILIES, Family, NormPlacement, QkNorm, Windows};

/// How rotary frequencies differ from `theta^(-2i / head_dim)`.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// Unscaled.
    None,
    /// All divided by `factor` (position interpolation, Chen et al. 2023).
    Linear {
        /// Factor of the context extension.
        factor: f64,
    },
    /// Low frequencies divided by `factor`, high ones kept, a ramp between (Llama 3.1).
    Llama3 {
        /// Divisor of low frequencies.
        factor: f64,
        /// Wavelengths above `original / low_freq_factor` are divided.
        low_freq_factor: f64,
        /// Wavelengths below `original / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// The original context length.
        original_max_position_embeddings: f64,
    },
    /// Fast pairs kept, slow ones divided by `factor`, a ramp over pairs between; queries and keys
    /// are scaled too (YaRN, Peng et al. 2023).
    Yarn {
        /// Factor of the context extension.
        factor: f64,
        /// The original context length.
        original_max_position_embeddings: f64,
        /// Pairs with more rotations than this in the original context are kept.
        beta_fast: f64,
        /// Pairs with fewer rotations than this in the original context are divided.
        beta_slow: f64,
        /// Whether the ramp is truncated to whole pairs.
        truncate: bool,
        /// Factor of cosines and sines.
        attention_factor: f64,
    },
    /// Each divided by its own factor: a GGUF's `rope_freqs.weight`, `head_dim / 2` values.
    Factors(Vec<f32>),
    /// Each divided by its own factor, which differs between long and short rows; queries and keys
    /// are scaled too (Ding et al. 2024).
    LongRope {
        /// The factors of rows of at most `original_max_position_embeddings` tokens.
        short_factor: Vec<f32>,
        /// Those of longer rows.
        long_factor: Vec<f32>,
        /// The original context length.
        original_max_position_embeddings: usize,
        /// Factor of cosines and sines.
        attention_factor: f64,
    },
}

/// The properties of one decoder. Names are those of `config.json`.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Its family.
    pub family: &'static Family,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads.
    pub num_key_value_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Width of the feed-forward layer.
    pub intermediate_size: usize,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Positions the model was trained for.
    pub max_position_embeddings: usize,
    /// Epsilon of norms.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Scaling of the rotary frequencies.
    pub rope_scaling: RopeScaling,
    /// Whether lm_head is tied to the embedding.
    pub tie_word_embeddings: bool,
    /// Whether q, k and v have a bias.
    pub qkv_bias: bool,
    /// Whether o has a bias.
    pub o_bias: bool,
    /// Whether gate, up and down have a bias.
    pub mlp_bias: bool,
    /// Properties that only some families have.
    pub variation: Variation,
}

/// Properties that only some families have, none by default.
#[derive(Debug, Clone, PartialEq)]
pub struct Variation {
    /// Factor of the embeddings.
    pub embedding_multiplier: f64,
    /// Factor of the outputs of attention and feed-forward block before the residual addition.
    pub residual_multiplier: f64,
    /// Factor of the logits.
    pub logits_multiplier: f64,
    /// Scale of attention scores, instead of `1 / sqrt(head_dim)`.
    pub attention_scale: Option<f64>,
    /// Softcap of attention scores: `cap · tanh(score / cap)`.
    pub attn_logit_softcapping: Option<f64>,
    /// Softcap of the final logits.
    pub final_logit_softcapping: Option<f64>,
    /// Size of the window of layers with sliding-window attention.
    pub sliding_window: Option<usize>,
    /// Whether each layer uses sliding-window attention; empty if none does.
    pub windowed: Vec<bool>,
    /// Whether each layer applies rotary embeddings; empty if all do.
    pub rotated: Vec<bool>,
    /// Base of the (unscaled) rotary frequencies of sliding-window layers, if it differs.
    pub local_rope_theta: Option<f64>,
    /// Dimensions of a head that rotate, the first ones, if not all (partial rotary).
    pub rotary_dim: Option<usize>,
}

impl Default for Variation {
    fn default() -> Self {
        Self {
            embedding_multiplier: 1.0,
            residual_multiplier: 1.0,
            logits_multiplier: 1.0,
            attention_scale: None,
            attn_logit_softcapping: None,
            final_logit_softcapping: None,
            sliding_window: None,
            windowed: Vec::new(),
            rotated: Vec::new(),
            local_rope_theta: None,
            rotary_dim: None,
        }
    }
}

/// The rotary frequencies of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerRope {
    /// Those of the model.
    Global,
    /// Those of sliding-window layers.
    Local,
    /// The layer does not rotate.
    None,
}

impl Config {
    /// The heads of attention.
    pub(super) fn heads(&self) -> Heads {
        Heads {
            heads: self.num_attention_heads,
            kv_heads: self.num_key_value_heads,
            head_dim: self.head_dim,
        }
    }

    /// Reads the properties of a checkpoint.
    pub fn read(checkpoint: &Checkpoint) -> Result<Self, ModelError> {
        let mut faults = Vec::new();
        let config = match checkpoint {
            Checkpoint::Gguf(gguf) => gguf::config(gguf, &mut faults)?,
            Checkpoint::HuggingFace(folder) => {
                json::config(&json::read(&folder.config_path())?, &mut faults)
            }
        };
        let path = checkpoint.path().display().to_string();
        match config {
            Some(config) if faults.is_empty() => config.checked(path),
            _ => Err(ModelError::Config { path, reason: faults.join("; ") }),
        }
    }

    /// Reads a `config.json`.
    pub fn from_file(path: &Path) -> Result<Self, ModelError> {
        let mut faults = Vec::new();
        let config = json::config(&json::read(path)?, &mut faults);
        let path = path.display().to_string();
        match config {
            Some(config) if faults.is_empty() => config.checked(path),
            _ => Err(ModelError::Config { path, reason: faults.join("; ") }),
        }
    }

    /// Dimensions of a head that rotate.
    pub fn rotary_dim(&self) -> usize {
        self.variation.rotary_dim.unwrap_or(self.head_dim)
    }

    /// Radians per position of each pair of a head, `rotary_dim / 2` values. LongRope: those of
    /// short rows.
    pub fn inv_freq(&self) -> Vec<f32> {
        let width = self.rotary_dim();
        let plain = |i: usize| self.rope_theta.powf(-2.0 * i as f64 / width as f64);
        let scaled = |i: usize| match &self.rope_scaling {
            RopeScaling::None => plain(i),
            RopeScaling::Linear { factor } => plain(i) / factor,
            RopeScaling::Factors(factors) | RopeScaling::LongRope { short_factor: factors, .. } => {
                plain(i) / f64::from(factors[i])
            }
            RopeScaling::Yarn {
                factor,
                original_max_position_embeddings: original,
                beta_fast,
                beta_slow,
                truncate,
                ..
            } => {
                // The pair that turns so often in the original context.
                let pair = |turns: f64| {
                    let positions = original / (turns * std::f64::consts::TAU);
                    width as f64 * positions.ln() / (2.0 * self.rope_theta.ln())
                };
                let (mut low, mut high) = (pair(*beta_fast), pair(*beta_slow));
                if *truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                (low, high) = (low.max(0.0), high.min(width as f64 - 1.0));
                if low == high {
                    high += 0.001; // as transformers does
                }
                let divided = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                plain(i) * (1.0 - divided + divided / factor)
            }
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings: original,
            } => {
                let turns = original * plain(i) / std::f64::consts::TAU;
                let kept = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                let kept = kept.clamp(0.0, 1.0);
                plain(i) * (kept + (1.0 - kept) / factor)
            }
        };
        (0..width / 2).map(|i| scaled(i) as f32).collect()
    }

    /// LongRope: the number of tokens beyond which rows use other frequencies, and those frequencies.
    pub fn long_inv_freq(&self) -> Option<(usize, Vec<f32>)> {
        let RopeScaling::LongRope {
            long_factor, original_max_position_embeddings: original, ..
        } = &self.rope_scaling
        else {
            return None;
        };
        let scaled =
            Self { rope_scaling: RopeScaling::Factors(long_factor.clone()), ..self.clone() };
        Some((*original, scaled.inv_freq()))
    }

    /// [`Self::inv_freq`] of sliding-window layers, if they have their own base.
    pub fn local_inv_freq(&self) -> Option<Vec<f32>> {
        let (theta, width) = (self.variation.local_rope_theta?, self.rotary_dim());
        let of = |i: usize| theta.powf(-2.0 * i as f64 / width as f64) as f32;
        Some((0..width / 2).map(of).collect())
    }

    /// Factor of queries and keys that are rotated by [`Self::inv_freq`] (`attention_factor`, mscale).
    pub fn rope_attention_factor(&self) -> f32 {
        match self.rope_scaling {
            RopeScaling::Yarn { attention_factor, .. }
            | RopeScaling::LongRope { attention_factor, .. } => attention_factor as f32,
            _ => 1.0,
        }
    }

    /// The rotary frequencies of a layer.
    pub fn rope_of(&self, layer: usize) -> LayerRope {
        let Variation { rotated, windowed, local_rope_theta, .. } = &self.variation;
        if rotated.get(layer) == Some(&false) {
            return LayerRope::None;
        }
        match local_rope_theta {
            Some(_) if windowed.get(layer) == Some(&true) => LayerRope::Local,
            _ => LayerRope::Global,
        }
    }

    /// Scale, softcap and window of attention in a layer.
    pub fn attention_config(&self, layer: usize) -> AttentionConfig {
        let Variation { windowed, sliding_window, .. } = &self.variation;
        AttentionConfig {
            window: sliding_window.filter(|_| windowed.get(layer) == Some(&true)),
            scale: self.variation.attention_scale.map(|scale| scale as f32),
            cap: self.variation.attn_logit_softcapping.map(|cap| cap as f32),
        }
    }

    /// Softcap of logits that are divided by `temperature`, if the model has one.
    pub fn logit_softcap(&self, temperature: f64) -> Option<LogitSoftcap> {
        let cap = self.variation.final_logit_softcapping? as f32;
        Some(LogitSoftcap { cap, temperature: temperature as f32 })
    }

    /// The family in a `config.json` of this decoder: of those that a GGUF does not distinguish,
    /// the first that can have its windows.
    pub fn hf_family(&self) -> &'static Family {
        let (of, windowed) = (self.family, !self.variation.windowed.is_empty());
        let fits = |f: &&Family| {
            f.architecture == of.architecture && !(windowed && f.windows == Windows::Never)
        };
        if of.windows != Windows::Never || !windowed {
            return of;
        }
        FAMILIES.iter().find(fits).unwrap_or(of)
    }

    /// What each frequency is divided by, `head_dim / 2` values, where they are neither all kept nor
    /// all divided alike: a GGUF's `rope_freqs.weight`.
    pub fn rope_factors(&self) -> Option<Vec<f32>> {
        match &self.rope_scaling {
            RopeScaling::None
            | RopeScaling::Linear { .. }
            | RopeScaling::Yarn { .. }
            | RopeScaling::LongRope { .. } => None,
            RopeScaling::Factors(factors) => Some(factors.clone()),
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings: original,
            } => {
                let pairs = (0..self.head_dim / 2).map(|i| {
                    let plain = self.rope_theta.powf(-2.0 * i as f64 / self.head_dim as f64);
                    let turns = original * plain / std::f64::consts::TAU;
                    let kept = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    let kept = kept.clamp(0.0, 1.0);
                    (1.0 / (kept + (1.0 - kept) / factor)) as f32
                });
                Some(pairs.collect())
            }
        }
    }

    /// Validates the properties; `path` names their file in errors.
    pub fn checked(self, path: String) -> Result<Self, ModelError> {
        let mut faults = Vec::new();
        let sizes = [
            ("hidden_size", self.hidden_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads),
            ("head_dim", self.head_dim),
            ("intermediate_size", self.intermediate_size),
            ("vocab_size", self.vocab_size),
        ];
        for (name, size) in sizes {
            if size == 0 || size > 1 << 30 {
                faults.push(format!("{name} is {size}"));
            }
        }
        if !self.head_dim.is_multiple_of(2) {
            faults.push(format!("head_dim {} is odd", self.head_dim));
        }
        let (heads, kv) = (self.num_attention_heads, self.num_key_value_heads);
        if kv > 0 && !heads.is_multiple_of(kv) {
            faults.push(format!("{heads} query heads are not a multiple of {kv} key heads"));
        }
        let finite = [("rms_norm_eps", self.rms_norm_eps), ("rope_theta", self.rope_theta)];
        for (name, value) in finite {
            if !value.is_finite() || value <= 0.0 {
                faults.push(format!("{name} is {value}"));
            }
        }
        if !self.rope_scaling.is_sound(self.rope_theta) {
            faults.push(format!("invalid rope scaling {:?}", self.rope_scaling));
        }
        let v = &self.variation;
        let numbers = [
            ("the multiplier of embeddings", Some(v.embedding_multiplier)),
            ("the multiplier of residuals", Some(v.residual_multiplier)),
            ("the multiplier of logits", Some(v.logits_multiplier)),
            ("the scale of attention", v.attention_scale),
            ("attn_logit_softcapping", v.attn_logit_softcapping),
            ("final_logit_softcapping", v.final_logit_softcapping),
            ("the rope_theta of layers with a window", v.local_rope_theta),
        ];
        for (name, value) in numbers {
            if let Some(value) = value.filter(|&value| !positive(value)) {
                faults.push(format!("{name} is {value}"));
            }
        }
        if v.sliding_window == Some(0) {
            faults.push("sliding_window is 0".into());
        }
        for (name, layers) in [("layer_types", &v.windowed), ("no_rope_layers", &v.rotated)] {
            if !layers.is_empty() && layers.len() != self.num_hidden_layers {
                let (found, needed) = (layers.len(), self.num_hidden_layers);
                faults.push(format!("{name} names {found} layers, needed {needed}"));
            }
        }
        if self.max_position_embeddings < 2 {
            faults.push(format!("max_position_embeddings is {}", self.max_position_embeddings));
        }
        let rotary = self.rotary_dim();
        if !rotary.is_multiple_of(2) || rotary == 0 || rotary > self.head_dim {
            let width = self.head_dim;
            faults
                .push(format!("{rotary} numbers of heads of {width} rotate, needed pairs of them"));
        }
        let factors: &[(&str, &Vec<f32>)] = match &self.rope_scaling {
            RopeScaling::Factors(factors) => &[("rope_freqs.weight", factors)],
            RopeScaling::LongRope { short_factor, long_factor, .. } => {
                &[("short_factor", short_factor), ("long_factor", long_factor)]
            }
            _ => &[],
        };
        for (name, factors) in factors {
            let (found, needed) = (factors.len(), rotary / 2);
            if found != needed {
                faults.push(format!("{name} has {found} values, needed {needed}"));
            }
        }
        if faults.is_empty() {
            Ok(self)
        } else {
            Err(ModelError::Config { path, reason: faults.join("; ") })
        }
    }
}

fn positive(value: f64) -> bool {
    value.is_finite() && value > 0.0
}

impl RopeScaling {
    /// Whether its numbers are possible, for frequencies of this base.
    fn is_sound(&self, rope_theta: f64) -> bool {
        match self {
            RopeScaling::None => true,
            RopeScaling::Linear { factor } => positive(*factor),
            RopeScaling::Llama3 {
                factor,
                low_freq_factor: low,
                high_freq_factor: high,
                original_max_position_embeddings: original,
            } => [factor, low, high, original].iter().all(|v| positive(**v)) && high > low,
            RopeScaling::Yarn {
                factor,
                original_max_position_embeddings: original,
                beta_fast: fast,
                beta_slow: slow,
                attention_factor: grown,
                ..
            } => {
                let all = [factor, original, fast, slow, grown].iter().all(|v| positive(**v));
                all && fast > slow && rope_theta > 1.0
            }
            RopeScaling::Factors(factors) => factors.iter().all(|&f| positive(f64::from(f))),
            RopeScaling::LongRope {
                short_factor,
                long_factor,
                original_max_position_embeddings: original,
                attention_factor,
            } => {
                let factors = short_factor.iter().chain(long_factor);
                let all = factors.copied().all(|f| positive(f64::from(f)));
                all && *original > 0 && positive(*attention_factor)
            }
        }
    }
}

fn known<T: std::fmt::Display>(name: impl Fn(&'static Family) -> T) -> String {
    let mut names: Vec<String> = FAMILIES.iter().map(|f| name(f).to_string()).collect();
    names.dedup();
    names.join(", ")
}

/// Default `attention_factor` of YaRN.
pub fn yarn_attention_factor(factor: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * factor.ln() + 1.0 }
}

/// Default `attention_factor` of LongRope, for a context `factor` times `original` tokens.
pub fn longrope_attention_factor(factor: f64, original: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / original.ln()).sqrt() }
}
