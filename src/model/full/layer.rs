//! A decoder layer all of whose weights train, forward and backward by hand over plain buffers.
//!
//! Linear layers that share their input pack it once and hand all their products to the threads
//! together; on the way back the products of weights' gradients join those of inputs' gradients.
//! Residuals are what sums begin with.

use super::{Layer, Linear};
use crate::isa::{Isa, multiversion};
use crate::model::Config;
use crate::model::config::QkNorm;
use crate::model::layer::qkv;
use crate::ops::attention::{self, Attended, QkvGrad};
use crate::ops::gemm::{
    Init, Out, PackedRows, PanelType, Product, Strided, Term, Weights, multiply,
};
use crate::ops::rope::{Direction, Rotation};
use crate::ops::{Gate, Segment, rms_norm, swiglu};

use rayon::prelude::*;

/// What a layer keeps for the way down. No product need be computed again from it.
#[derive(Debug, Default)]
pub(super) struct Tape {
    /// Its input `(N, hidden_size)`.
    pub x: Vec<f32>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    attended: Vec<f32>,
    lse: Vec<f32>,
    /// Queries and keys before their norms, where they have some.
    raw_q: Vec<f32>,
    raw_k: Vec<f32>,
    /// The residual stream between attention and feed-forward layer.
    middle: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
}

impl Tape {
    /// Numbers of a token.
    pub fn width(config: &Config) -> usize {
        let q = config.num_attention_heads * config.head_dim;
        let kv = config.num_key_value_heads * config.head_dim;
        let residual = 2 * config.hidden_size + 2 * config.intermediate_size;
        let raw = if config.family.qk_norm == QkNorm::None { 0 } else { q + kv };
        residual + raw + 2 * q + 2 * kv + config.num_attention_heads
    }
}

/// Buffers that all layers share.
#[derive(Debug, Default)]
pub(super) struct Workspace {
    normed: Vec<f32>,
    dnormed: Vec<f32>,
    /// What the feed-forward layer's `down` reads, and on the way back its gradient.
    inner: Vec<f32>,
    dattended: Vec<f32>,
    dq: Vec<f32>,
    dk: Vec<f32>,
    dv: Vec<f32>,
    /// Gradients of queries or keys before their norms.
    draw: Vec<f32>,
    /// Inputs, or gradients of outputs, and the latter turned.
    packed: [PackedRows; 3],
    turned: [PackedRows; 4],
    shares: Vec<f32>,
}

impl Workspace {
    /// Numbers of a token.
    pub fn width(config: &Config) -> usize {
        let q = config.num_attention_heads * config.head_dim;
        let kv = config.num_key_value_heads * config.head_dim;
        let widest = (q + 2 * kv).max(2 * config.intermediate_size);
        let panels = 2 * (widest + config.hidden_size);
        let draw = if config.family.qk_norm == QkNorm::None { 0 } else { q };
        2 * config.hidden_size + config.intermediate_size + draw + 2 * q + 2 * kv + panels
    }

    /// Room for shares of a norm's gradient.
    pub fn shares(&mut self) -> &mut Vec<f32> {
        &mut self.shares
    }
}

/// One layer of one pass.
pub(super) struct LayerPass<'a> {
    pub config: &'a Config,
    pub layer: &'a Layer,
    /// Of all parameters.
    pub values: &'a [&'a [f32]],
    pub segments: &'a [Segment],
    pub rotation: &'a Rotation,
    pub isa: Isa,
    /// Of the way up and of the way back.
    pub panels: (PanelType, PanelType),
    pub tokens: usize,
}

impl LayerPass<'_> {
    /// Turns the tape's `x (N, hidden_size)` into the layer's output `out`.
    pub fn forward(&self, tape: &mut Tape, out: &mut Vec<f32>, work: &mut Workspace) {
        let (layer, isa, n) = (self.layer, self.isa, self.tokens);
        let (hidden, eps) = (self.config.hidden_size, self.config.rms_norm_eps as f32);
        let Tape { x, q, k, v, attended, lse, raw_q, raw_k, middle, gate, up } = tape;
        let Workspace { normed, inner, packed: [packed, ..], .. } = work;
        let (q_width, kv_width, inner_width) = (layer.q.rows, layer.k.rows, layer.gate.rows);
        for (buffer, width) in [
            (&mut *normed, hidden),
            (q, q_width),
            (k, kv_width),
            (v, kv_width),
            (attended, q_width),
            (lse, self.config.num_attention_heads),
            (middle, hidden),
            (gate, inner_width),
            (up, inner_width),
            (inner, inner_width),
            (out, hidden),
        ] {
            buffer.resize(n * width, 0.0);
        }

        rms_norm::forward(isa, x, self.values[layer.input_norm], eps, normed);
        let outs = [(&layer.q, &mut q[..]), (&layer.k, &mut k[..]), (&layer.v, &mut v[..])];
        self.project(outs, normed, None, packed);
        for (norm, heads, raw) in [(layer.q_norm, &mut *q, raw_q), (layer.k_norm, &mut *k, raw_k)] {
            if let Some(norm) = norm {
                raw.resize(heads.len(), 0.0);
                std::mem::swap(raw, heads);
                rms_norm::forward(isa, raw, self.values[norm], eps, heads);
            }
        }
        self.rotation.rotate(isa, Direction::Forward, q, q_width, q_width);
        self.rotation.rotate(isa, Direction::Forward, k, kv_width, kv_width);
        attention::forward(
            isa,
            qkv(self.config.heads(), q, k, v),
            self.config.heads(),
            self.segments,
            None,
            attended,
            lse,
        );
        self.project([(&layer.o, &mut middle[..])], attended, Some(x), packed);

        rms_norm::forward(isa, middle, self.values[layer.post_attention_norm], eps, normed);
        self.project(
            [(&layer.gate, &mut gate[..]), (&layer.up, &mut up[..])],
            normed,
            None,
            packed,
        );
        swiglu::forward(isa, Gate::Silu, gate, up, inner);
        self.project([(&layer.down, &mut out[..])], inner, Some(middle), packed);
    }

    /// Turns `dx`, the gradient of the layer's output, into that of its input, and adds up the
    /// gradients of the layer's parameters. The tape, which [`Self::forward`] left, is used up.
    pub fn backward(
        &self,
        tape: &mut Tape,
        dx: &mut [f32],
        gradients: &mut [Vec<f32>],
        work: &mut Workspace,
    ) {
        let (layer, isa, n) = (self.layer, self.isa, self.tokens);
        let (hidden, eps) = (self.config.hidden_size, self.config.rms_norm_eps as f32);
        let Tape { x, q, k, v, attended, lse, raw_q, raw_k, middle, gate, up } = tape;
        let Workspace {
            normed,
            dnormed,
            inner,
            dattended,
            dq,
            dk,
            dv,
            draw,
            packed,
            turned,
            shares,
        } = work;
        let (q_width, kv_width, inner_width) = (layer.q.rows, layer.k.rows, layer.gate.rows);
        for (buffer, width) in [
            (&mut *normed, hidden),
            (dnormed, hidden),
            (inner, inner_width),
            (dattended, q_width),
            (dq, q_width),
            (dk, kv_width),
            (dv, kv_width),
        ] {
            buffer.resize(n * width, 0.0);
        }

        // `down`'s input is computed again along with what needs its gradient, so that the weight's
        // own waits until then.
        let [of_down, turned @ ..] = turned;
        self.pack_gradients([(&layer.down, &*dx)], packed, std::slice::from_mut(of_down));
        let to_inner = self.to_input(&[&layer.down], packed, inner);
        multiply(isa, &mut [to_inner]);
        swiglu::backward_again(isa, gate, up, inner);
        self.biases_back([(&layer.down, &*dx)], gradients);

        let norm = self.values[layer.post_attention_norm];
        rms_norm::forward(isa, middle, norm, eps, normed);
        let both = [(&layer.gate, &gate[..]), (&layer.up, &up[..])];
        let mut dw = std::mem::take(&mut gradients[layer.down.weight]);
        let of_down = self.to_weight(&layer.down, of_down, inner, &mut dw);
        self.project_back(both, normed, dnormed, Some(of_down), gradients, packed, turned);
        gradients[layer.down.weight] = dw;
        let dw = &mut gradients[layer.post_attention_norm];
        rms_norm::backward_with_weight(isa, middle, norm, eps, dnormed, dx, dw, shares);

        let o = [(&layer.o, &*dx)];
        self.project_back(o, attended, dattended, None, gradients, packed, turned);
        let left = Attended { out: attended, lse };
        let grad = QkvGrad::separate((dq, q_width), (dk, kv_width), (dv, kv_width));
        let heads = self.config.heads();
        let all = qkv(heads, q, k, v);
        attention::backward(isa, all, heads, self.segments, None, left, dattended, grad);
        self.rotation.rotate(isa, Direction::Backward, dq, q_width, q_width);
        self.rotation.rotate(isa, Direction::Backward, dk, kv_width, kv_width);
        for (norm, raw, d) in [(layer.q_norm, &*raw_q, &mut *dq), (layer.k_norm, &*raw_k, &mut *dk)]
        {
            if let Some(norm) = norm {
                draw.clear();
                draw.resize(d.len(), 0.0);
                let (w, dw) = (self.values[norm], &mut gradients[norm]);
                rms_norm::backward_with_weight(isa, raw, w, eps, d, draw, dw, shares);
                std::mem::swap(d, draw);
            }
        }

        let norm = self.values[layer.input_norm];
        rms_norm::forward(isa, x, norm, eps, normed);
        let all = [(&layer.q, &dq[..]), (&layer.k, &dk[..]), (&layer.v, &dv[..])];
        self.project_back(all, normed, dnormed, None, gradients, packed, turned);
        let dw = &mut gradients[layer.input_norm];
        rms_norm::backward_with_weight(isa, x, norm, eps, dnormed, dx, dw, shares);
    }

    fn weights(&self, linear: &Linear) -> Weights<'_> {
        Weights::Dense { values: self.values[linear.weight], cols: linear.cols, scale: 1.0 }
    }

    /// The products of linear layers that share the input `x (N, cols)`, biases included, on top of
    /// `onto (N, rows)` if there is one.
    fn project<const M: usize>(
        &self,
        outs: [(&Linear, &mut [f32]); M],
        x: &[f32],
        onto: Option<&[f32]>,
        packed: &mut PackedRows,
    ) {
        let width = outs[0].0.cols;
        let input = Strided { values: x, stride: width };
        packed.pack(self.isa, self.panels.0, input, self.tokens, width);
        let mut outs = outs.map(|(linear, out)| {
            let bias = linear.bias.map(|bias| self.values[bias]);
            let init = match (onto, bias) {
                (None, None) => Init::Zero,
                (None, Some(bias)) => Init::Bias(bias),
                (Some(values), None) => Init::From(Strided { values, stride: linear.rows }),
                (Some(values), Some(bias)) => {
                    let rows = out.chunks_exact_mut(bias.len()).zip(values.chunks(bias.len()));
                    rows.for_each(|(out, values)| {
                        for ((out, value), b) in out.iter_mut().zip(values).zip(bias) {
                            *out = value + b;
                        }
                    });
                    Init::Add
                }
            };
            let terms = vec![Term { x: packed, weights: self.weights(linear), transposed: true }];
            Product { terms, init, out: Out::new(out, linear.rows) }
        });
        multiply(self.isa, &mut outs);
    }

    /// The way back through linear layers that share the input `x (N, cols)`: `dx` becomes its
    /// gradient, those of weights and biases are added to. A product that has waited is computed
    /// along with them.
    #[allow(clippy::too_many_arguments)] // three gradients, and room
    fn project_back<const M: usize>(
        &self,
        linears: [(&Linear, &[f32]); M],
        x: &[f32],
        dx: &mut [f32],
        waiting: Option<Product>,
        gradients: &mut [Vec<f32>],
        packed: &mut [PackedRows; 3],
        turned: &mut [PackedRows],
    ) {
        self.pack_gradients(linears, packed, turned);
        let mut dws = linears.map(|(linear, _)| std::mem::take(&mut gradients[linear.weight]));
        let mut products = vec![self.to_input(&linears.map(|(linear, _)| linear), packed, dx)];
        for (((linear, _), turned), dw) in linears.iter().zip(&*turned).zip(&mut dws) {
            products.push(self.to_weight(linear, turned, x, dw));
        }
        products.extend(waiting);
        multiply(self.isa, &mut products);
        for ((linear, _), dw) in linears.iter().zip(dws) {
            gradients[linear.weight] = dw;
        }
        self.biases_back(linears, gradients);
    }

    /// Packs gradients of outputs `(N, rows)`, straight and turned.
    fn pack_gradients<const M: usize>(
        &self,
        linears: [(&Linear, &[f32]); M],
        packed: &mut [PackedRows; 3],
        turned: &mut [PackedRows],
    ) {
        let (isa, n, panel) = (self.isa, self.tokens, self.panels.1);
        for ((linear, values), (packed, turned)) in
            linears.iter().zip(packed.iter_mut().zip(turned))
        {
            let dy = Strided { values, stride: linear.rows };
            packed.pack(isa, panel, dy, n, linear.rows);
            turned.pack_turned(isa, panel, dy, linear.rows, n);
        }
    }

    /// `dx = Σ dy · W`.
    fn to_input<'p>(
        &'p self,
        linears: &[&Linear],
        packed: &'p [PackedRows],
        dx: &'p mut [f32],
    ) -> Product<'p> {
        let terms = linears.iter().zip(packed).map(|(linear, x)| Term {
            x,
            weights: self.weights(linear),
            transposed: false,
        });
        let out = Out::new(dx, linears[0].cols);
        Product { terms: terms.collect(), init: Init::Zero, out }
    }

    /// `dW += dyᵀ · x`.
    fn to_weight<'p>(
        &self,
        linear: &Linear,
        turned: &'p PackedRows,
        x: &'p [f32],
        dw: &'p mut [f32],
    ) -> Product<'p> {
        let weights = Weights::Dense { values: x, cols: linear.cols, scale: 1.0 };
        let terms = vec![Term { x: turned, weights, transposed: false }];
        let out = Out::new(dw, linear.cols);
        Product { terms, init: Init::Add, out }
    }

    /// `db += Σ dy` over the tokens.
    fn biases_back<const M: usize>(
        &self,
        linears: [(&Linear, &[f32]); M],
        gradients: &mut [Vec<f32>],
    ) {
        const COLUMNS: usize = 64;
        for (linear, dy) in linears {
            let Some(bias) = linear.bias else { continue };
            let parts = gradients[bias].par_chunks_mut(COLUMNS).enumerate();
            parts.for_each(|(part, sums)| {
                add_rows(self.isa, &dy[part * COLUMNS..], linear.rows, sums);
            });
        }
    }
}

multiversion! {
    /// Adds the first values of each row of `values (.., stride)` to `sums`.
    fn add_rows(isa; values: &[f32], stride: usize, sums: &mut [f32]) {
        for row in values.chunks(stride) {
            for (sum, value) in sums.iter_mut().zip(row) {
                *sum += value;
            }
        }
    }
}
