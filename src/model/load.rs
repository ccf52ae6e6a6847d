//! Loads a decoder from named tensors: the name of each tensor and the order of its rows, per format.

use std::sync::Arc;

use candle_core::{Device, Tensor};

use super::config::{Family, NormPlacement, QkNorm, RopeScaling};
use super::layers::{self, Layer, LayerSource, Linear, Norm, norm_names};
use super::{Config, Decoder, ModelError};
use crate::ops::Compute;
use crate::quant::{BlockType, FrozenMatrix, RowOrder};
use crate::weights::{Checkpoint, WeightsError};

/// Errors after which loading stops.
const FAULTS: usize = 64;

impl Decoder {
    /// Loads the decoder of a checkpoint. Matrices stay in the map; norms and biases are copied.
    ///
    /// Missing tensors and wrong shapes are reported all at once.
    pub fn load(checkpoint: &Checkpoint, compute: Compute) -> Result<Self, ModelError> {
        Self::load_as(checkpoint, compute, None)
    }

    /// [`Self::load`] of a folder with its matrices quantized, one after the other, to `load_type`:
    /// memory holds little more than what they become. As llama-quantize does, a head, or the
    /// embedding that is one, gets no fewer than 6 bits, and rows that are no whole blocks another
    /// type.
    ///
    /// # Errors
    /// As [`Self::load`], and if the checkpoint is a GGUF, which keeps its types.
    pub fn load_as(
        checkpoint: &Checkpoint,
        compute: Compute,
        load_type: Option<BlockType>,
    ) -> Result<Self, ModelError> {
        let config = Config::read(checkpoint)?;
        if let (Checkpoint::Gguf(gguf), Some(of)) = (checkpoint, load_type) {
            let path = gguf.path().display().to_string();
            let reason = format!("a GGUF keeps its types; only a folder is loaded as {of}");
            return Err(ModelError::Tensors { path, reason });
        }
        let mut loader = Loader { checkpoint, config: &config, load_type, faults: Vec::new() };
        let embedding = loader.embedding();
        let mut built: Vec<Option<Layer>> = Vec::new();
        for index in 0..config.num_hidden_layers {
            built.push(layers::build(&config, index, &mut loader));
            // Stops after many errors, so that a hostile number of layers is not tried further.
            if loader.faults.len() > FAULTS {
                break;
            }
        }
        let norm = loader.norm_factors("model.norm", config.hidden_size);
        let head = match config.tie_word_embeddings {
            true => embedding.clone(),
            // A sequence classifier has no lm_head; its score head is used instead.
            false if loader.is_classifier() => embedding.clone(),
            false => loader.matrix("lm_head.weight", config.vocab_size, config.hidden_size),
        };
        let layers: Option<Vec<Layer>> = built.into_iter().collect();
        match (embedding, layers, norm, head) {
            (Some(embedding), Some(layers), Some(norm), Some(head)) if loader.faults.is_empty() => {
                let inv_freq = config.inv_freq();
                let (device, uploaded_head) = (Device::Cpu, None);
                Ok(Self {
                    config,
                    compute,
                    device,
                    embedding,
                    layers,
                    norm,
                    head,
                    uploaded_head,
                    inv_freq,
                })
            }
            _ => Err(loader.failed()),
        }
    }
}

struct Loader<'a> {
    checkpoint: &'a Checkpoint,
    config: &'a Config,
    load_type: Option<BlockType>,
    faults: Vec<String>,
}

impl Loader<'_> {
    fn embedding(&mut self) -> Option<Arc<FrozenMatrix>> {
        let (rows, cols) = (self.config.vocab_size, self.config.hidden_size);
        self.matrix("model.embed_tokens.weight", rows, cols)
    }

    fn is_classifier(&self) -> bool {
        let has = |name: &str| self.checkpoint.contains(name);
        has("score.weight") && !has("lm_head.weight")
    }

    /// The factors of a norm as they multiply.
    fn norm_factors(&mut self, module: &str, width: usize) -> Option<Tensor> {
        let name = format!("{module}.weight");
        let norm = self.vector(&name, width)?;
        let above = gguf_offset(self.config, &name);
        let short = f64::from(above - stored_offset(self.checkpoint, self.config, &name));
        let norm = if short == 0.0 { Ok(norm) } else { (norm + short).map_err(|e| e.to_string()) };
        self.note(norm)
    }

    fn matrix(&mut self, name: &str, rows: usize, cols: usize) -> Option<Arc<FrozenMatrix>> {
        let stored = self.stored_name(name);
        let read = || -> Result<FrozenMatrix, String> {
            let tensor = self.checkpoint.tensor(&stored).map_err(|e| self.short(&stored, e))?;
            if tensor.shape != [rows, cols] {
                return Err(format!("{stored} is {:?}, needed [{rows}, {cols}]", tensor.shape));
            }
            let matrix = tensor.matrix().map_err(|e| e.to_string())?;
            let matrix = matrix.with_order(self.order(name));
            let matrix = match self.type_of(name, cols) {
                Some(of) => matrix.and_then(|matrix| {
                    let quantized = matrix.quantized(of);
                    matrix.forget(); // only the quantized matrix is used from here on
                    quantized
                }),
                None => matrix,
            };
            matrix.map_err(|e| format!("{stored}: {e}"))
        };
        self.note(read()).map(Arc::new)
    }

    /// The type that a matrix is quantized to, if any.
    fn type_of(&self, name: &str, cols: usize) -> Option<BlockType> {
        use BlockType::{Q2_K, Q3_K, Q4_0, Q4_1, Q4_K, Q5_0, Q5_1, Q5_K, Q6_K};
        let tied = self.config.tie_word_embeddings && name.starts_with("model.embed_tokens.");
        let wanted = match self.load_type? {
            Q2_K | Q3_K | Q4_0 | Q4_1 | Q4_K | Q5_0 | Q5_1 | Q5_K
                if tied || name.starts_with("lm_head.") =>
            {
                Q6_K
            }
            of => of,
        };
        Some(wanted.for_rows_of(cols))
    }

    fn vector(&mut self, name: &str, len: usize) -> Option<Tensor> {
        let stored = self.stored_name(name);
        let read = || -> Result<Tensor, String> {
            let tensor = self.checkpoint.tensor(&stored).map_err(|e| self.short(&stored, e))?;
            if tensor.shape != [len] {
                return Err(format!("{stored} is {:?}, needed [{len}]", tensor.shape));
            }
            let values = tensor.vector().map_err(|e| e.to_string())?;
            // A bias has the order of its matrix's rows.
            let rows = FrozenMatrix::from_f32(&values, len, 1).map_err(|e| e.to_string())?;
            let rows = rows.with_order(self.order(name)).map_err(|e| format!("{stored}: {e}"))?;
            let mut values = vec![0f32; len];
            rows.read_tile(0..len, 0..1, &mut values);
            Tensor::from_vec(values, len, &Device::Cpu).map_err(|e| e.to_string())
        };
        self.note(read())
    }

    fn order(&self, name: &str) -> RowOrder {
        stored_order(self.checkpoint, self.config, name)
    }

    /// The name of a tensor in this checkpoint.
    fn stored_name(&self, name: &str) -> String {
        stored_name(self.checkpoint, self.config, name)
    }

    /// The text of an error without the file, which the list of errors names once.
    fn short(&self, name: &str, error: WeightsError) -> String {
        match error {
            WeightsError::MissingTensor { .. } => format!("no tensor {name:?}"),
            other => other.to_string(),
        }
    }

    fn note<T>(&mut self, read: Result<T, String>) -> Option<T> {
        read.map_err(|fault| self.faults.push(fault)).ok()
    }

    fn failed(&self) -> ModelError {
        const SHOWN: usize = 6;
        let mut reason = self.faults[..self.faults.len().min(SHOWN)].join("; ");
        if self.faults.len() > SHOWN {
            reason += &format!("; and {} more", self.faults.len() - SHOWN);
        }
        ModelError::Tensors { path: self.checkpoint.path().display().to_string(), reason }
    }
}

/// The values of a norm or bias as Hugging Face has them.
pub(super) fn read_vector(
    checkpoint: &Checkpoint,
    config: &Config,
    name: &str,
    len: usize,
) -> Result<Vec<f32>, ModelError> {
    let mut loader = Loader { checkpoint, config, load_type: None, faults: Vec::new() };
    let Some(vector) = loader.vector(name, len) else { return Err(loader.failed()) };
    let mut values = vector.to_vec1::<f32>()?;
    let above = stored_offset(checkpoint, config, name);
    if above != 0.0 {
        values.iter_mut().for_each(|value| *value -= above);
    }
    Ok(values)
}

impl LayerSource for Loader<'_> {
    fn norm(&mut self, module: String, width: usize) -> Option<Norm> {
        self.norm_factors(&module, width).map(Norm::frozen)
    }

    fn linear(&mut self, name: String, rows: usize, cols: usize, bias: bool) -> Option<Linear> {
        let weight = self.matrix(&format!("{name}.weight"), rows, cols);
        let bias_name = format!("{name}.bias");
        let stored = self.stored_name(&bias_name);
        let bias = match bias {
            true => Some(self.vector(&bias_name, rows)?),
            false if self.checkpoint.contains(&stored) => {
                self.faults.push(format!("{stored} is there, but the config says no bias"));
                None
            }
            false => None,
        };
        Some(Linear::frozen(name, weight?, bias))
    }
}

/// The name in a checkpoint of the tensor that Hugging Face calls `name`.
pub fn stored_name(checkpoint: &Checkpoint, config: &Config, name: &str) -> String {
    match checkpoint {
        Checkpoint::Gguf(_) => gguf_name(config.family, name),
        Checkpoint::HuggingFace(_) => name.to_string(),
    }
}

/// The row order in a checkpoint of the tensor that Hugging Face calls `name`.
pub fn stored_order(checkpoint: &Checkpoint, config: &Config, name: &str) -> RowOrder {
    match checkpoint {
        Checkpoint::Gguf(_) => gguf_order(config, name),
        Checkpoint::HuggingFace(_) => RowOrder::Straight,
    }
}

/// The row order in a GGUF of the tensor that Hugging Face calls `name`.
pub fn gguf_order(config: &Config, name: &str) -> RowOrder {
    let rotated = name.contains(".q_proj.") || name.contains(".k_proj.");
    match rotated && config.family.interleaved_in_gguf {
        true => RowOrder::Interleaved { head_dim: config.head_dim },
        false => RowOrder::Straight,
    }
}

/// A checkpoint's values of the tensor that Hugging Face calls `name`, less Hugging Face's.
pub fn stored_offset(checkpoint: &Checkpoint, config: &Config, name: &str) -> f32 {
    match checkpoint {
        Checkpoint::Gguf(_) => gguf_offset(config, name),
        Checkpoint::HuggingFace(_) => 0.0,
    }
}

/// A GGUF's values of the tensor that Hugging Face calls `name`, less Hugging Face's: 1 for the norms of
/// families whose folders store them less 1.
pub fn gguf_offset(config: &Config, name: &str) -> f32 {
    let is_norm = name.ends_with("norm.weight");
    if is_norm && config.family.norm_weight_offset { 1.0 } else { 0.0 }
}

/// A decoder's tensors by Hugging Face's names, with their shapes: what [`Decoder::load`] reads, in
/// the order of the forward pass.
pub fn tensors(config: &Config) -> Vec<(String, Vec<usize>)> {
    let c = config;
    let (hidden, inner) = (c.hidden_size, c.intermediate_size);
    let (q, kv) = (c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim);
    let mut tensors = vec![("model.embed_tokens.weight".to_string(), vec![c.vocab_size, hidden])];
    for index in 0..c.num_hidden_layers {
        let qkv: &[_] = match c.family.fused {
            true => &[("self_attn.qkv_proj", q + 2 * kv, hidden, c.qkv_bias)],
            false => &[
                ("self_attn.q_proj", q, hidden, c.qkv_bias),
                ("self_attn.k_proj", kv, hidden, c.qkv_bias),
                ("self_attn.v_proj", kv, hidden, c.qkv_bias),
            ],
        };
        let gate_up: &[_] = match c.family.fused {
            true => &[("mlp.gate_up_proj", 2 * inner, hidden, c.mlp_bias)],
            false => &[
                ("mlp.gate_proj", inner, hidden, c.mlp_bias),
                ("mlp.up_proj", inner, hidden, c.mlp_bias),
            ],
        };
        let o = [("self_attn.o_proj", hidden, q, c.o_bias)];
        let down = [("mlp.down_proj", hidden, inner, c.mlp_bias)];
        let linears = qkv.iter().chain(&o).chain(gate_up).chain(&down).copied();
        let mut put = |name: String, shape: Vec<usize>| {
            tensors.push((format!("model.layers.{index}.{name}"), shape));
        };
        for name in norm_names(c.family).into_iter().flatten() {
            put(format!("{name}.weight"), vec![hidden]);
        }
        let of_heads = match c.family.qk_norm {
            QkNorm::None => None,
            QkNorm::Head => Some((c.head_dim, c.head_dim)),
            QkNorm::Width => Some((q, kv)),
        };
        if let Some((q, k)) = of_heads {
            put("self_attn.q_norm.weight".into(), vec![q]);
            put("self_attn.k_norm.weight".into(), vec![k]);
        }
        for (name, rows, cols, bias) in linears {
            put(format!("{name}.weight"), vec![rows, cols]);
            if bias {
                put(format!("{name}.bias"), vec![rows]);
            }
        }
    }
    tensors.push(("model.norm.weight".into(), vec![hidden]));
    if !c.tie_word_embeddings {
        tensors.push(("lm_head.weight".into(), vec![c.vocab_size, hidden]));
    }
    tensors
}

/// The tensors of a GGUF that scale rotary frequencies, where metadata keys cannot.
pub fn rope_tensors(config: &Config) -> Vec<(&'static str, Vec<f32>)> {
    match &config.rope_scaling {
        RopeScaling::LongRope { short_factor, long_factor, .. } => vec![
            ("rope_factors_long.weight", long_factor.clone()),
            ("rope_factors_short.weight", short_factor.clone()),
        ],
        _ => config.rope_factors().map(|of| ("rope_freqs.weight", of)).into_iter().collect(),
    }
}

/// llama.cpp's name of a tensor that Hugging Face calls `name` (its `gguf-py` tensor mapping).
pub fn gguf_name(family: &Family, name: &str) -> String {
    const PARTS: &[(&str, &str)] = &[
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
        ("self_attn.qkv_proj", "attn_qkv"),
        ("mlp.gate_up_proj", "ffn_up"),
        ("self_attn.q_norm", "attn_q_norm"),
        ("self_attn.k_norm", "attn_k_norm"),
        ("input_layernorm", "attn_norm"),
        ("pre_feedforward_layernorm", "ffn_norm"),
        ("post_feedforward_layernorm", "post_ffw_norm"),
    ];
    let Some(name) = name.strip_prefix("model.layers.") else {
        return match name {
            "model.embed_tokens.weight" => "token_embd.weight".into(),
            "model.norm.weight" => "output_norm.weight".into(),
            "lm_head.weight" => "output.weight".into(),
            other => other.into(),
        };
    };
    let after_attention = match family.norms {
        NormPlacement::Pre => "ffn_norm",
        NormPlacement::Sandwich | NormPlacement::Post => "post_attention_norm",
    };
    let mut name = format!("blk.{name}");
    for (from, to) in PARTS.iter().chain(&[("post_attention_layernorm", after_attention)]) {
        name = name.replace(&format!(".{from}."), &format!(".{to}."));
    }
    name
}
