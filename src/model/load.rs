//! From named tensors to a decoder: what each tensor is called, and in which order its rows lie.

use std::sync::Arc;

use candle_core::{Device, Tensor};

use super::decoder::{Layer, Linear};
use super::{Config, Decoder, ModelError};
use crate::ops::Compute;
use crate::quant::{FrozenMatrix, RowOrder};
use crate::weights::{Checkpoint, WeightsError};

/// Faults after which a file is given up.
const FAULTS: usize = 64;

impl Decoder {
    /// Loads the decoder of a checkpoint. Matrices stay in the map; norms and biases are copied.
    ///
    /// Missing tensors and wrong shapes are reported all at once.
    pub fn load(checkpoint: &Checkpoint, compute: Compute) -> Result<Self, ModelError> {
        let config = Config::read(checkpoint)?;
        let mut loader = Loader { checkpoint, config: &config, faults: Vec::new() };
        let embedding = loader.embedding();
        let mut layers: Vec<Option<Layer>> = Vec::new();
        for index in 0..config.num_hidden_layers {
            layers.push(loader.layer(index));
            // Enough to tell: a hostile count of layers is not believed further than this.
            if loader.faults.len() > FAULTS {
                break;
            }
        }
        let norm = loader.vector("model.norm.weight", config.hidden_size);
        let head = match config.tie_word_embeddings {
            true => embedding.clone(),
            // A sequence classifier has no logits; whoever loads one reads its score.
            false if loader.is_classifier() => embedding.clone(),
            false => loader.matrix("lm_head.weight", config.vocab_size, config.hidden_size),
        };
        let layers: Option<Vec<Layer>> = layers.into_iter().collect();
        match (embedding, layers, norm, head) {
            (Some(embedding), Some(layers), Some(norm), Some(head)) if loader.faults.is_empty() => {
                let inv_freq = config.inv_freq();
                Ok(Self { config, compute, embedding, layers, norm, head, inv_freq })
            }
            _ => Err(loader.failed()),
        }
    }
}

struct Loader<'a> {
    checkpoint: &'a Checkpoint,
    config: &'a Config,
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

    fn layer(&mut self, index: usize) -> Option<Layer> {
        let c = self.config;
        let (hidden, inner) = (c.hidden_size, c.intermediate_size);
        let q_width = c.num_attention_heads * c.head_dim;
        let kv_width = c.num_key_value_heads * c.head_dim;
        let path = |name: &str| format!("model.layers.{index}.{name}");
        let norm = |name: &str| path(&format!("{name}.weight"));
        // All are tried, so that all faults are told.
        let input_norm = self.vector(&norm("input_layernorm"), hidden);
        let q = self.linear(path("self_attn.q_proj"), q_width, hidden, c.qkv_bias);
        let k = self.linear(path("self_attn.k_proj"), kv_width, hidden, c.qkv_bias);
        let v = self.linear(path("self_attn.v_proj"), kv_width, hidden, c.qkv_bias);
        let o = self.linear(path("self_attn.o_proj"), hidden, q_width, c.o_bias);
        let post_attention_norm = self.vector(&norm("post_attention_layernorm"), hidden);
        let gate = self.linear(path("mlp.gate_proj"), inner, hidden, c.mlp_bias);
        let up = self.linear(path("mlp.up_proj"), inner, hidden, c.mlp_bias);
        let down = self.linear(path("mlp.down_proj"), hidden, inner, c.mlp_bias);
        Some(Layer {
            input_norm: input_norm?,
            q: q?,
            k: k?,
            v: v?,
            o: o?,
            post_attention_norm: post_attention_norm?,
            gate: gate?,
            up: up?,
            down: down?,
        })
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
        Some(Linear { name, weight: weight?, bias })
    }

    fn matrix(&mut self, name: &str, rows: usize, cols: usize) -> Option<Arc<FrozenMatrix>> {
        let stored = self.stored_name(name);
        let read = || -> Result<FrozenMatrix, String> {
            let tensor = self.checkpoint.tensor(&stored).map_err(|e| self.short(&stored, e))?;
            if tensor.shape != [rows, cols] {
                return Err(format!("{stored} is {:?}, needed [{rows}, {cols}]", tensor.shape));
            }
            let matrix = tensor.matrix().map_err(|e| e.to_string())?;
            matrix.with_order(self.order(name)).map_err(|e| format!("{stored}: {e}"))
        };
        self.note(read()).map(Arc::new)
    }

    fn vector(&mut self, name: &str, len: usize) -> Option<Tensor> {
        let stored = self.stored_name(name);
        let read = || -> Result<Tensor, String> {
            let tensor = self.checkpoint.tensor(&stored).map_err(|e| self.short(&stored, e))?;
            if tensor.shape != [len] {
                return Err(format!("{stored} is {:?}, needed [{len}]", tensor.shape));
            }
            let values = tensor.vector().map_err(|e| e.to_string())?;
            // A bias lies in the order of its matrix's rows.
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

    /// What a tensor is called in this checkpoint.
    fn stored_name(&self, name: &str) -> String {
        stored_name(self.checkpoint, name)
    }

    /// Errors name the file; in a list of them once is enough.
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

/// What a checkpoint calls the tensor that Hugging Face calls `name`.
pub fn stored_name(checkpoint: &Checkpoint, name: &str) -> String {
    match checkpoint {
        Checkpoint::Gguf(_) => gguf_name(name),
        Checkpoint::HuggingFace(_) => name.to_string(),
    }
}

/// How a checkpoint orders the rows of the tensor that Hugging Face calls `name`.
pub fn stored_order(checkpoint: &Checkpoint, config: &Config, name: &str) -> RowOrder {
    match checkpoint {
        Checkpoint::Gguf(_) => gguf_order(config, name),
        Checkpoint::HuggingFace(_) => RowOrder::Straight,
    }
}

/// How a GGUF orders the rows of the tensor that Hugging Face calls `name`.
pub fn gguf_order(config: &Config, name: &str) -> RowOrder {
    let rotated = name.contains(".q_proj.") || name.contains(".k_proj.");
    match rotated && config.family.interleaved_in_gguf {
        true => RowOrder::Interleaved { head_dim: config.head_dim },
        false => RowOrder::Straight,
    }
}

/// A decoder's tensors by Hugging Face's names, with their shapes: what [`Decoder::load`] reads, in
/// the order of the forward pass.
pub fn tensors(config: &Config) -> Vec<(String, Vec<usize>)> {
    let c = config;
    let (hidden, inner) = (c.hidden_size, c.intermediate_size);
    let (q, kv) = (c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim);
    let mut tensors = vec![("model.embed_tokens.weight".to_string(), vec![c.vocab_size, hidden])];
    for index in 0..c.num_hidden_layers {
        let linears = [
            ("self_attn.q_proj", q, hidden, c.qkv_bias),
            ("self_attn.k_proj", kv, hidden, c.qkv_bias),
            ("self_attn.v_proj", kv, hidden, c.qkv_bias),
            ("self_attn.o_proj", hidden, q, c.o_bias),
            ("mlp.gate_proj", inner, hidden, c.mlp_bias),
            ("mlp.up_proj", inner, hidden, c.mlp_bias),
            ("mlp.down_proj", hidden, inner, c.mlp_bias),
        ];
        let mut put = |name: String, shape: Vec<usize>| {
            tensors.push((format!("model.layers.{index}.{name}"), shape));
        };
        put("input_layernorm.weight".into(), vec![hidden]);
        put("post_attention_layernorm.weight".into(), vec![hidden]);
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

/// llama.cpp's name of a tensor that Hugging Face calls `name` (its `gguf-py` tensor mapping).
pub fn gguf_name(name: &str) -> String {
    const PARTS: &[(&str, &str)] = &[
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
    ];
    let Some(name) = name.strip_prefix("model.layers.") else {
        return match name {
            "model.embed_tokens.weight" => "token_embd.weight".into(),
            "model.norm.weight" => "output_norm.weight".into(),
            "lm_head.weight" => "output.weight".into(),
            other => other.into(),
        };
    };
    let mut name = format!("blk.{name}");
    for (from, to) in PARTS {
        name = name.replace(&format!(".{from}."), &format!(".{to}."));
    }
    name
}
