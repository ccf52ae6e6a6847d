//! The weights of a layer: norms, linear layers, attention and feed-forward, frozen or trainable.
//!
//! Another kind of feed-forward block is a variant of [`FeedForward`]: its weights are here, its passes in a
//! file in `layer/`, and its reference form in `layer/reference.rs`.

use std::borrow::Cow;
use std::sync::Arc;

use candle_core::{Device, Result, Tensor};

use super::config::{Config, Family, LayerRope, NormPlacement, QkNorm};
use crate::ops::gemm::Weights;
use crate::ops::{AttentionConfig, DeviceMatrix, Values};
use crate::quant::FrozenMatrix;

/// A tensor of a model, and the index of its gradient if it is trainable.
#[derive(Debug, Clone)]
pub(super) struct Parameter {
    /// F32.
    pub value: Tensor,
    /// Index of its gradient; `None` if frozen.
    pub gradient: Option<usize>,
}

impl Parameter {
    pub(super) fn frozen(value: Tensor) -> Self {
        Self { value, gradient: None }
    }

    fn upload(&mut self, device: &Device) -> Result<()> {
        self.value = self.value.to_device(device)?;
        Ok(())
    }
}

/// The weight of a root mean square norm.
#[derive(Debug, Clone)]
pub(super) struct Norm {
    pub weight: Parameter,
    /// Added to the weight: 1 for families that store weights minus 1.
    pub offset: f32,
}

impl Norm {
    pub(super) fn frozen(weight: Tensor) -> Self {
        Self { weight: Parameter::frozen(weight), offset: 0.0 }
    }

    /// The effective weight, on the tape of the stored weight.
    pub(super) fn factors(&self) -> Result<Tensor> {
        match self.offset {
            0.0 => Ok(self.weight.value.clone()),
            offset => &self.weight.value + f64::from(offset),
        }
    }

    /// Calls `f` with the effective weight.
    pub(super) fn with_factors<R>(&self, f: impl FnOnce(&[f32]) -> R) -> Result<R> {
        let values = Values::of(&self.weight.value)?;
        let factors: Cow<[f32]> = match self.offset {
            0.0 => Cow::Borrowed(&values),
            offset => values.iter().map(|w| w + offset).collect(),
        };
        Ok(f(&factors))
    }

    pub(super) fn upload(&mut self, device: &Device) -> Result<()> {
        self.weight.upload(device)
    }
}

/// The matrix of a linear layer, `(rows, cols)`.
#[derive(Debug, Clone)]
pub(super) enum LinearWeight {
    Frozen {
        matrix: Arc<FrozenMatrix>,
        /// A frozen matrix on another device.
        uploaded: Option<Arc<DeviceMatrix>>,
    },
    Trainable {
        /// F32.
        value: Tensor,
        /// Index of its gradient.
        gradient: usize,
    },
}

/// A linear layer: `y = x · Wᵀ + b`.
#[derive(Debug, Clone)]
pub(super) struct Linear {
    /// The Hugging Face module path, by which adapters refer to it.
    pub name: String,
    pub weight: LinearWeight,
    pub bias: Option<Parameter>,
    rows: usize,
    cols: usize,
}

/// A weight borrowed for a product.
pub(super) enum WeightValues<'a> {
    Frozen(&'a FrozenMatrix),
    Dense(Values<'a>, usize),
}

impl WeightValues<'_> {
    pub(super) fn weights(&self) -> Weights<'_> {
        match self {
            Self::Frozen(matrix) => Weights::Frozen(matrix),
            Self::Dense(values, cols) => Weights::Dense { values, cols: *cols, scale: 1.0 },
        }
    }
}

impl Linear {
    pub(super) fn frozen(name: String, matrix: Arc<FrozenMatrix>, bias: Option<Tensor>) -> Self {
        let (rows, cols) = (matrix.rows(), matrix.cols());
        let weight = LinearWeight::Frozen { matrix, uploaded: None };
        Self { name, weight, bias: bias.map(Parameter::frozen), rows, cols }
    }

    /// A layer of this shape with a trainable weight.
    ///
    /// # Panics
    /// If the weight has no gradient.
    pub(super) fn trainable(
        name: String,
        weight: Parameter,
        bias: Option<Parameter>,
        rows: usize,
        cols: usize,
    ) -> Self {
        let gradient = weight.gradient.expect("a trainable weight");
        let weight = LinearWeight::Trainable { value: weight.value, gradient };
        Self { name, weight, bias, rows, cols }
    }

    /// Outputs.
    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    /// Inputs.
    pub(super) fn cols(&self) -> usize {
        self.cols
    }

    /// The frozen matrix.
    ///
    /// # Errors
    /// If the weight is trainable: adapters and decode steps need a frozen base.
    pub(super) fn matrix(&self) -> Result<&Arc<FrozenMatrix>> {
        match &self.weight {
            LinearWeight::Frozen { matrix, .. } => Ok(matrix),
            LinearWeight::Trainable { .. } => {
                candle_core::bail!("{}: the weight is trainable, needed a frozen one", self.name)
            }
        }
    }

    /// Index of the weight's gradient, if it is trainable.
    pub(super) fn gradient(&self) -> Option<usize> {
        match self.weight {
            LinearWeight::Frozen { .. } => None,
            LinearWeight::Trainable { gradient, .. } => Some(gradient),
        }
    }

    pub(super) fn values(&self) -> Result<WeightValues<'_>> {
        match &self.weight {
            LinearWeight::Frozen { matrix, .. } => Ok(WeightValues::Frozen(matrix)),
            LinearWeight::Trainable { value, .. } => {
                Ok(WeightValues::Dense(Values::of(value)?, self.cols))
            }
        }
    }

    fn upload(&mut self, device: &Device) -> Result<()> {
        match &mut self.weight {
            LinearWeight::Frozen { matrix, uploaded } => {
                *uploaded = Some(Arc::new(DeviceMatrix::upload(matrix, device)?));
            }
            LinearWeight::Trainable { value, .. } => *value = value.to_device(device)?,
        }
        self.bias.iter_mut().try_for_each(|bias| bias.upload(device))
    }
}

/// Linear layers that share their input.
#[derive(Debug, Clone)]
pub(super) enum Projection {
    /// A module for each output.
    Separate(Vec<Linear>),
    /// One module whose outputs are concatenated (Phi-3's `qkv_proj` and `gate_up_proj`).
    Fused(Linear),
}

impl Projection {
    pub(super) fn linears(&self) -> &[Linear] {
        match self {
            Self::Separate(linears) => linears,
            Self::Fused(linear) => std::slice::from_ref(linear),
        }
    }

    pub(super) fn linears_mut(&mut self) -> &mut [Linear] {
        match self {
            Self::Separate(linears) => linears,
            Self::Fused(linear) => std::slice::from_mut(linear),
        }
    }
}

/// Self-attention between its norms.
#[derive(Debug, Clone)]
pub(super) struct Attention {
    pub qkv: Projection,
    /// Norms of queries and keys: per head, `(head_dim)`, or over all heads of a token.
    pub q_norm: Option<Norm>,
    pub k_norm: Option<Norm>,
    pub o: Linear,
    pub config: AttentionConfig,
    pub rope: LayerRope,
}

/// The feed-forward block.
#[derive(Debug, Clone)]
pub(super) enum FeedForward {
    Dense(DenseFeedForward),
}

/// `down(act(gate(x)) ⊙ up(x))`.
#[derive(Debug, Clone)]
pub(super) struct DenseFeedForward {
    pub gate_up: Projection,
    pub down: Linear,
}

impl FeedForward {
    /// Linear layers grouped by the input they share, in the order of the forward pass.
    pub(super) fn groups(&self) -> Vec<&[Linear]> {
        match self {
            Self::Dense(dense) => {
                vec![dense.gate_up.linears(), std::slice::from_ref(&dense.down)]
            }
        }
    }

    fn linears_mut(&mut self) -> Vec<&mut Linear> {
        match self {
            Self::Dense(dense) => {
                dense.gate_up.linears_mut().iter_mut().chain([&mut dense.down]).collect()
            }
        }
    }
}

/// Linear layers that share an input: the index of `Layer::groups`, in the order of the forward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct LinearGroup(pub(super) usize);

impl LinearGroup {
    pub(super) const ATTENTION_INPUT: Self = Self(0);
    pub(super) const ATTENTION_OUTPUT: Self = Self(1);
    /// Of a dense feed-forward block.
    pub(super) const GATE_UP: Self = Self(2);
    pub(super) const DOWN: Self = Self(3);
}

/// A decoder layer.
#[derive(Debug, Clone)]
pub(super) struct Layer {
    /// Before attention.
    pub input_norm: Option<Norm>,
    pub attention: Attention,
    /// After attention, before the residual addition.
    pub post_attention_norm: Option<Norm>,
    /// Before the feed-forward block.
    pub pre_feedforward_norm: Option<Norm>,
    pub feed_forward: FeedForward,
    /// After the feed-forward block, before the residual addition.
    pub post_feedforward_norm: Option<Norm>,
}

impl Layer {
    /// Linear layers grouped by the input they share, in the order of the forward pass.
    pub(super) fn groups(&self) -> Vec<&[Linear]> {
        let attention = &self.attention;
        let mut groups = vec![attention.qkv.linears(), std::slice::from_ref(&attention.o)];
        groups.extend(self.feed_forward.groups());
        groups
    }

    pub(super) fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.groups().into_iter().flatten()
    }

    /// Copies everything a pass reads to a device.
    pub(super) fn upload(&mut self, device: &Device) -> Result<()> {
        let attention = &mut self.attention;
        let linears = attention.qkv.linears_mut().iter_mut().chain([&mut attention.o]);
        for linear in linears.chain(self.feed_forward.linears_mut()) {
            linear.upload(device)?;
        }
        let norms = [
            &mut self.input_norm,
            &mut attention.q_norm,
            &mut attention.k_norm,
            &mut self.post_attention_norm,
            &mut self.pre_feedforward_norm,
            &mut self.post_feedforward_norm,
        ];
        norms.into_iter().flatten().try_for_each(|norm| norm.upload(device))
    }
}

/// A source of layer weights, by Hugging Face module paths. An implementation records its
/// errors and returns `None`.
pub(super) trait LayerSource {
    /// The norm of `width` values.
    fn norm(&mut self, module: String, width: usize) -> Option<Norm>;

    /// The linear layer `(rows, cols)`.
    fn linear(&mut self, module: String, rows: usize, cols: usize, bias: bool) -> Option<Linear>;
}

/// Builds the layer with this index. All tensors are requested even if one is missing, so that all errors
/// are reported at once.
pub(super) fn build(config: &Config, index: usize, source: &mut impl LayerSource) -> Option<Layer> {
    let c = config;
    let (hidden, inner) = (c.hidden_size, c.intermediate_size);
    let q_width = c.num_attention_heads * c.head_dim;
    let kv_width = c.num_key_value_heads * c.head_dim;
    let path = |name: &str| format!("model.layers.{index}.{name}");
    let [input, post_attention, pre_feedforward, post_feedforward] = norm_names(c.family);
    // `Some(None)` if the family has no such norm.
    let norm = |source: &mut _, name: Option<&str>, width| match name {
        Some(name) => LayerSource::norm(source, path(name), width).map(Some),
        None => Some(None),
    };

    let input_norm = norm(source, input, hidden);
    let qkv = [("q_proj", q_width), ("k_proj", kv_width), ("v_proj", kv_width)];
    let qkv = qkv.map(|(name, rows)| (path(&format!("self_attn.{name}")), rows));
    let qkv = projection(c, source, path("self_attn.qkv_proj"), &qkv, c.qkv_bias);
    let o = source.linear(path("self_attn.o_proj"), hidden, q_width, c.o_bias);
    let (q_norm, k_norm) = match c.family.qk_norm {
        QkNorm::None => (Some(None), Some(None)),
        of => {
            let width = |all: usize| if of == QkNorm::Head { c.head_dim } else { all };
            let q_norm = norm(source, Some("self_attn.q_norm"), width(q_width));
            (q_norm, norm(source, Some("self_attn.k_norm"), width(kv_width)))
        }
    };
    let post_attention_norm = norm(source, post_attention, hidden);
    let pre_feedforward_norm = norm(source, pre_feedforward, hidden);
    let gate_up = ["mlp.gate_proj", "mlp.up_proj"].map(|name| (path(name), inner));
    let gate_up = projection(c, source, path("mlp.gate_up_proj"), &gate_up, c.mlp_bias);
    let down = source.linear(path("mlp.down_proj"), hidden, inner, c.mlp_bias);
    let post_feedforward_norm = norm(source, post_feedforward, hidden);
    Some(Layer {
        input_norm: input_norm?,
        attention: Attention {
            qkv: qkv?,
            q_norm: q_norm?,
            k_norm: k_norm?,
            o: o?,
            config: c.attention_config(index),
            rope: c.rope_of(index),
        },
        post_attention_norm: post_attention_norm?,
        pre_feedforward_norm: pre_feedforward_norm?,
        feed_forward: FeedForward::Dense(DenseFeedForward { gate_up: gate_up?, down: down? }),
        post_feedforward_norm: post_feedforward_norm?,
    })
}

/// Linear layers of these names and rows that read the hidden states, or the fused one of all.
fn projection(
    config: &Config,
    source: &mut impl LayerSource,
    fused: String,
    separate: &[(String, usize)],
    bias: bool,
) -> Option<Projection> {
    let cols = config.hidden_size;
    if config.family.fused {
        let rows = separate.iter().map(|(_, rows)| rows).sum();
        return source.linear(fused, rows, cols, bias).map(Projection::Fused);
    }
    let mut linears = Vec::new();
    for (name, rows) in separate {
        linears.push(source.linear(name.clone(), *rows, cols, bias));
    }
    linears.into_iter().collect::<Option<_>>().map(Projection::Separate)
}

/// Hugging Face's names of the norms of a layer: before and after attention, before and after the
/// feed-forward block.
pub(super) fn norm_names(family: &Family) -> [Option<&'static str>; 4] {
    const AFTER: &str = "post_attention_layernorm";
    match family.norms {
        // In these families "post_attention" is the norm before the feed-forward block.
        NormPlacement::Pre => [Some("input_layernorm"), None, Some(AFTER), None],
        NormPlacement::Sandwich => [
            Some("input_layernorm"),
            Some(AFTER),
            Some("pre_feedforward_layernorm"),
            Some("post_feedforward_layernorm"),
        ],
        NormPlacement::Post => [None, Some(AFTER), None, Some("post_feedforward_layernorm")],
    }
}
