//! What a decoder is, read from the checkpoint: a row of properties per family.

use std::fs;
use std::path::Path;

use serde_json::Value;

use super::ModelError;
use crate::weights::{Checkpoint, Gguf};

/// What tells one family from another.
#[derive(Debug, PartialEq, Eq)]
pub struct Family {
    /// `model_type` in a `config.json`.
    pub model_type: &'static str,
    /// `general.architecture` in a GGUF.
    pub architecture: &'static str,
    /// Whether q, k and v always have a bias. Without, the checkpoint says.
    pub qkv_bias: bool,
    /// Whether llama.cpp's converter interleaves the rows of q and k of each head.
    pub interleaved_in_gguf: bool,
}

/// The families that run.
pub const FAMILIES: &[Family] = &[
    Family {
        model_type: "llama",
        architecture: "llama",
        qkv_bias: false,
        interleaved_in_gguf: true,
    },
    Family {
        model_type: "qwen2",
        architecture: "qwen2",
        qkv_bias: true,
        interleaved_in_gguf: false,
    },
];

/// How rotary frequencies differ from `theta^(-2i / head_dim)`.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// All divided by `factor` (position interpolation, Chen et al. 2023).
    Linear {
        /// By how much the context grew.
        factor: f64,
    },
    /// Low frequencies divided by `factor`, high ones kept, a ramp between (Llama 3.1).
    Llama3 {
        /// By how much low frequencies are divided.
        factor: f64,
        /// Wavelengths above `original / low_freq_factor` are divided.
        low_freq_factor: f64,
        /// Wavelengths below `original / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// The context the model was first trained with.
        original_max_position_embeddings: f64,
    },
    /// Each divided by its own factor: a GGUF's `rope_freqs.weight`, `head_dim / 2` values.
    Factors(Vec<f32>),
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
    /// Added to the mean square in norms.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Scaling of the rotary frequencies.
    pub rope_scaling: RopeScaling,
    /// Whether the head is the embedding.
    pub tie_word_embeddings: bool,
    /// Whether q, k and v have a bias.
    pub qkv_bias: bool,
    /// Whether o has a bias.
    pub o_bias: bool,
    /// Whether gate, up and down have a bias.
    pub mlp_bias: bool,
}

impl Config {
    /// Reads the properties of a checkpoint.
    pub fn read(checkpoint: &Checkpoint) -> Result<Self, ModelError> {
        let mut faults = Vec::new();
        let config = match checkpoint {
            Checkpoint::Gguf(gguf) => from_gguf(gguf, &mut faults)?,
            Checkpoint::HuggingFace(folder) => {
                from_json(&read_json(&folder.config_path())?, &mut faults)
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
        let config = from_json(&read_json(path)?, &mut faults);
        let path = path.display().to_string();
        match config {
            Some(config) if faults.is_empty() => config.checked(path),
            _ => Err(ModelError::Config { path, reason: faults.join("; ") }),
        }
    }

    /// Radians per position of each pair of a head, `head_dim / 2` values.
    pub fn inv_freq(&self) -> Vec<f32> {
        let pairs = self.head_dim / 2;
        let plain = |i: usize| self.rope_theta.powf(-2.0 * i as f64 / self.head_dim as f64);
        let scaled = |i: usize| match &self.rope_scaling {
            RopeScaling::None => plain(i),
            RopeScaling::Linear { factor } => plain(i) / factor,
            RopeScaling::Factors(factors) => plain(i) / f64::from(factors[i]),
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
        (0..pairs).map(|i| scaled(i) as f32).collect()
    }

    /// What each frequency is divided by, `head_dim / 2` values, where they are neither all kept nor
    /// all divided alike: a GGUF's `rope_freqs.weight`.
    pub fn rope_factors(&self) -> Option<Vec<f32>> {
        match &self.rope_scaling {
            RopeScaling::None | RopeScaling::Linear { .. } => None,
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

    /// The properties, if they make sense; `path` says where they are from.
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
            faults.push(format!("{heads} query heads are no multiple of {kv} key heads"));
        }
        let finite = [("rms_norm_eps", self.rms_norm_eps), ("rope_theta", self.rope_theta)];
        for (name, value) in finite {
            if !value.is_finite() || value <= 0.0 {
                faults.push(format!("{name} is {value}"));
            }
        }
        let positive = |value: f64| value.is_finite() && value > 0.0;
        let sound = match &self.rope_scaling {
            RopeScaling::None => true,
            RopeScaling::Linear { factor } => positive(*factor),
            RopeScaling::Llama3 {
                factor,
                low_freq_factor: low,
                high_freq_factor: high,
                original_max_position_embeddings: original,
            } => [factor, low, high, original].iter().all(|v| positive(**v)) && high > low,
            RopeScaling::Factors(factors) => factors.iter().all(|&f| positive(f64::from(f))),
        };
        if !sound {
            faults.push(format!("rope scaling {:?} makes no sense", self.rope_scaling));
        }
        if self.max_position_embeddings < 2 {
            faults.push(format!("max_position_embeddings is {}", self.max_position_embeddings));
        }
        if let RopeScaling::Factors(factors) = &self.rope_scaling
            && factors.len() != self.head_dim / 2
        {
            let (found, needed) = (factors.len(), self.head_dim / 2);
            faults.push(format!("rope_freqs.weight has {found} values, needed {needed}"));
        }
        if faults.is_empty() {
            Ok(self)
        } else {
            Err(ModelError::Config { path, reason: faults.join("; ") })
        }
    }
}

fn read_json(path: &Path) -> Result<Value, ModelError> {
    let fail = |reason: String| ModelError::Config { path: path.display().to_string(), reason };
    let text = fs::read_to_string(path).map_err(|e| fail(e.to_string()))?;
    serde_json::from_str(&text).map_err(|e| fail(e.to_string()))
}

fn known<T: std::fmt::Display>(name: impl Fn(&'static Family) -> T) -> String {
    FAMILIES.iter().map(|f| name(f).to_string()).collect::<Vec<_>>().join(", ")
}

fn from_json(json: &Value, faults: &mut Vec<String>) -> Option<Config> {
    let model_type = json["model_type"].as_str().unwrap_or_default();
    let Some(family) = FAMILIES.iter().find(|f| f.model_type == model_type) else {
        let known = known(|f| f.model_type);
        faults.push(format!("model_type {model_type:?} is not one that runs here ({known})"));
        return None;
    };
    let number = |at: &Value, key: &str| at[key].as_f64();
    let mut size = |key: &str, default: Option<usize>| {
        let found = json[key].as_u64().map(|n| n as usize);
        found.or(default.filter(|_| json[key].is_null())).unwrap_or_else(|| {
            faults.push(format!("{key} is {}, needed a whole number", json[key]));
            0
        })
    };
    let hidden_size = size("hidden_size", None);
    let heads = size("num_attention_heads", None);
    let sizes = (
        size("num_hidden_layers", None),
        size("num_key_value_heads", Some(heads)),
        size("head_dim", Some(hidden_size / heads.max(1))),
        size("intermediate_size", None),
        size("vocab_size", None),
        size("max_position_embeddings", Some(2048)),
    );
    let (layers, kv_heads, head_dim, intermediate_size, vocab_size, max_positions) = sizes;

    if let Some(act) = json["hidden_act"].as_str().filter(|act| *act != "silu") {
        faults.push(format!("hidden_act is {act:?}, needed \"silu\""));
    }
    if json["use_sliding_window"].as_bool() == Some(true) {
        faults.push("use_sliding_window is true, and sliding windows do not run here".into());
    }
    // transformers 5 gathers what 4 spread over rope_theta and rope_scaling.
    let rope = if json["rope_parameters"].is_object() {
        &json["rope_parameters"]
    } else {
        &json["rope_scaling"]
    };
    let rope_theta = number(rope, "rope_theta").or(number(json, "rope_theta"));
    let flag = |key: &str| json[key].as_bool().unwrap_or(false);
    Some(Config {
        family,
        hidden_size,
        num_hidden_layers: layers,
        num_attention_heads: heads,
        num_key_value_heads: kv_heads,
        head_dim,
        intermediate_size,
        vocab_size,
        max_position_embeddings: max_positions,
        rms_norm_eps: number(json, "rms_norm_eps").unwrap_or(1e-6),
        rope_theta: rope_theta.unwrap_or(10_000.0),
        rope_scaling: rope_scaling(rope, faults),
        tie_word_embeddings: flag("tie_word_embeddings"),
        qkv_bias: family.qkv_bias || flag("attention_bias"),
        o_bias: !family.qkv_bias && flag("attention_bias"),
        mlp_bias: flag("mlp_bias"),
    })
}

fn rope_scaling(rope: &Value, faults: &mut Vec<String>) -> RopeScaling {
    let kind = rope["rope_type"].as_str().or(rope["type"].as_str()).unwrap_or("default");
    let mut need = |key: &str| {
        rope[key].as_f64().unwrap_or_else(|| {
            faults.push(format!("rope scaling {kind:?} has no {key}"));
            1.0
        })
    };
    match kind {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: need("factor") },
        "llama3" => RopeScaling::Llama3 {
            factor: need("factor"),
            low_freq_factor: need("low_freq_factor"),
            high_freq_factor: need("high_freq_factor"),
            original_max_position_embeddings: need("original_max_position_embeddings"),
        },
        other => {
            faults.push(format!(
                "rope scaling {other:?} does not run here (default, linear, llama3 do)"
            ));
            RopeScaling::None
        }
    }
}

fn from_gguf(gguf: &Gguf, faults: &mut Vec<String>) -> Result<Option<Config>, ModelError> {
    let architecture = gguf.str("general.architecture")?.unwrap_or_default().to_string();
    let Some(family) = FAMILIES.iter().find(|f| f.architecture == architecture) else {
        let known = known(|f| f.architecture);
        faults.push(format!(
            "general.architecture {architecture:?} is not one that runs here ({known})"
        ));
        return Ok(None);
    };
    let key = |name: &str| format!("{architecture}.{name}");
    let mut size = |name: &str, default: Option<usize>| -> Result<usize, ModelError> {
        let found = gguf.u64(&key(name))?.map(|n| n as usize).or(default);
        Ok(found.unwrap_or_else(|| {
            faults.push(format!("no metadata key {:?}", key(name)));
            0
        }))
    };
    let hidden_size = size("embedding_length", None)?;
    let heads = size("attention.head_count", None)?;
    let head_dim = size("attention.key_length", Some(hidden_size / heads.max(1)))?;
    let value_dim = size("attention.value_length", Some(head_dim))?;
    let rotated = size("rope.dimension_count", Some(head_dim))?;
    let layers = size("block_count", None)?;
    let kv_heads = size("attention.head_count_kv", Some(heads))?;
    let intermediate_size = size("feed_forward_length", None)?;
    let max_positions = size("context_length", None)?;
    if value_dim != head_dim || rotated != head_dim {
        faults.push(format!(
            "heads are {head_dim} wide with {rotated} rotated and values of {value_dim}; \
             only equal widths run here"
        ));
    }
    // The embedding knows the size of the vocabulary; a metadata key for it is optional.
    let vocab_size = match gguf.tensor_info("token_embd.weight") {
        Some(embedding) => *embedding.shape.first().unwrap_or(&0),
        None => {
            faults.push("no tensor \"token_embd.weight\"".into());
            0
        }
    };
    let rms_norm_eps = gguf.f64(&key("attention.layer_norm_rms_epsilon"))?.unwrap_or_else(|| {
        faults.push(format!("no metadata key {:?}", key("attention.layer_norm_rms_epsilon")));
        1e-5
    });
    let rope_scaling = if gguf.tensor_info("rope_freqs.weight").is_some() {
        RopeScaling::Factors(gguf.tensor("rope_freqs.weight")?.vector()?)
    } else {
        // As llama.cpp: linear unless named otherwise, an older key for the factor, 0 for none.
        let factor = match gguf.f64(&key("rope.scaling.factor"))? {
            None => gguf.f64(&key("rope.scale_linear"))?.unwrap_or(0.0),
            Some(factor) => factor,
        };
        match gguf.str(&key("rope.scaling.type"))? {
            Some("none") => RopeScaling::None,
            None | Some("linear") if factor == 0.0 => RopeScaling::None,
            None | Some("linear") => RopeScaling::Linear { factor },
            Some(other) => {
                faults.push(format!("rope scaling {other:?} does not run here"));
                RopeScaling::None
            }
        }
    };
    Ok(Some(Config {
        family,
        hidden_size,
        num_hidden_layers: layers,
        num_attention_heads: heads,
        num_key_value_heads: kv_heads,
        head_dim,
        intermediate_size,
        vocab_size,
        max_position_embeddings: max_positions,
        rms_norm_eps,
        rope_theta: gguf.f64(&key("rope.freq_base"))?.unwrap_or(10_000.0),
        rope_scaling,
        tie_word_embeddings: gguf.tensor_info("output.weight").is_none(),
        qkv_bias: family.qkv_bias || gguf.tensor_info("blk.0.attn_q.bias").is_some(),
        o_bias: gguf.tensor_info("blk.0.attn_output.bias").is_some(),
        mlp_bias: gguf.tensor_info("blk.0.ffn_up.bias").is_some(),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(json: &str) -> Result<Config, Vec<String>> {
        let mut faults = Vec::new();
        let config = from_json(&serde_json::from_str(json).unwrap(), &mut faults);
        config.filter(|_| faults.is_empty()).ok_or(faults)
    }

    const LLAMA: &str = r#"{"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4,
        "num_hidden_layers": 2, "intermediate_size": 96, "vocab_size": 300, "rms_norm_eps": 1e-05,
        "rope_theta": 500000.0"#;

    #[test]
    fn both_spellings_of_rope_are_read() {
        let old = format!(
            r#"{LLAMA}, "rope_scaling": {{"rope_type": "llama3", "factor": 8.0,
            "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64}}}}"#
        );
        let new = old.replace("rope_scaling", "rope_parameters");
        let (old, new) = (config(&old).unwrap(), config(&new).unwrap());
        assert_eq!(old, new);
        assert_eq!(old.rope_theta, 500_000.0);
        let plain = config(&format!("{LLAMA}}}")).unwrap();
        let (scaled, plain) = (old.inv_freq(), plain.inv_freq());
        assert_eq!(scaled[0], plain[0]); // the highest frequency is kept
        assert!((plain[7] / scaled[7] - 8.0).abs() < 1e-4); // the lowest is divided
    }

    #[test]
    fn what_does_not_run_is_refused_by_name() {
        let cases = [
            (r#"{"model_type": "mamba"}"#.to_string(), "\"mamba\""),
            (format!(r#"{LLAMA}, "hidden_act": "gelu"}}"#), "gelu"),
            (format!(r#"{LLAMA}, "rope_scaling": {{"rope_type": "yarn"}}}}"#), "yarn"),
            (format!(r#"{LLAMA}, "use_sliding_window": true}}"#), "use_sliding_window"),
            (LLAMA.replace("\"hidden_size\": 64", "\"hidden_size\": \"x\"") + "}", "hidden_size"),
        ];
        for (json, words) in cases {
            let faults = config(&json).unwrap_err().join("; ");
            assert!(faults.contains(words), "{faults}");
        }
    }
}
