//! Differentiable operations, a file each.
//!
//! Every operation has two forms. The *portable* one is written in ordinary differentiable candle
//! ops and defines the answer on every device. The *fast* one is a CPU kernel with a hand-written
//! gradient; `parity` tests hold its output and every gradient to the portable form.
//!
//! candle drops gradients silently in `QMatMul`, `softmax_last_dim`, `rms_norm`, `layer_norm`,
//! `rotary_emb` and `sdpa` (they are applied without a backward): none of them may stand in a
//! training path, and a test looks for their names outside this room.
//!
//! Activations are flat: the tokens of all rows of a batch lie end to end as `(N, ..)`, and a row
//! is a [`Segment`], a range of tokens, perhaps after those of an earlier one. Nothing is padded.

pub(crate) mod adapted_row_dot;
pub mod attention;
mod cpu;
pub mod device;
pub mod device_matrix;
pub mod frozen_linear;
pub(crate) mod gemm;
pub(crate) mod half_tape;
pub(crate) mod lanes;
pub mod linear_cross_entropy;
pub(crate) mod low_rank;
pub mod rms_norm;
pub mod rope;
pub(crate) mod row_dot;
pub(crate) mod segment;
pub mod swiglu;
pub(crate) mod worker_pool;

use serde::{Deserialize, Serialize};

use crate::isa::Isa;
use crate::quant::BlockType;
pub use attention::{AttentionConfig, causal_attention};
pub(crate) use cpu::{Values, exp, par_for_each};
pub use device::{DeviceError, DeviceName};
pub use device_matrix::DeviceMatrix;
pub use frozen_linear::frozen_linear;
use gemm::PanelType;
pub use linear_cross_entropy::{LogitSoftcap, capped_log_probs, linear_log_probs};
pub use rms_norm::rms_norm;
pub use rope::rope;
pub use segment::Segment;
pub use swiglu::{Gate, gated, swiglu};

/// Which form of the operations runs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Compute {
    /// Fast CPU kernels in exact `f32`: weights are read panel by panel from where they lie.
    F32,
    /// The same with products in 16-bit block-floating integers, forward and backward: twice the
    /// speed, at an error of 1e-4 of a product, a twentieth of bfloat16's. For the way down, gate, up
    /// and attention's output are kept as `f16`.
    #[default]
    Int16,
    /// Forward products of the base in bytes, an error of 1e-2 of a product; adapters, the way back
    /// and decoding steps as `int16`.
    Int8,
    /// The portable form in plain candle ops: slow, and the definition of the answer.
    Portable,
}

impl std::fmt::Display for Compute {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::Int16 => "int16",
            Self::Int8 => "int8",
            Self::Portable => "portable",
        })
    }
}

impl Compute {
    /// The panels of forward products, or none for the portable form.
    pub(crate) fn forward_panel(self) -> Option<PanelType> {
        match self {
            Self::F32 => Some(PanelType::F32),
            Self::Int16 => Some(PanelType::Int16),
            Self::Int8 => Some(PanelType::Int8),
            Self::Portable => None,
        }
    }

    /// The panels of the products of gradients, or none for the portable form.
    pub(crate) fn backward_panel(self) -> Option<PanelType> {
        match self {
            Self::F32 => Some(PanelType::F32),
            Self::Int16 | Self::Int8 => Some(PanelType::Int16),
            Self::Portable => None,
        }
    }

    /// The name of the kernel that serves matrices of a type in a decoding step.
    pub fn decode_kernel(self, block_type: BlockType) -> String {
        let isa = Isa::current().name();
        let floats = matches!(block_type, BlockType::F32 | BlockType::F16 | BlockType::BF16);
        match self {
            Self::Portable => "portable".into(),
            Self::Int16 | Self::Int8 if !floats => format!("int16 rows {isa}"),
            Self::F32 | Self::Int16 | Self::Int8 => format!("f32 rows {isa}"),
        }
    }

    /// The name of the kernel that serves frozen linear layers.
    pub fn linear_kernel(self) -> String {
        let isa = Isa::current().name();
        match self {
            Self::F32 => format!("f32 {isa}"),
            Self::Int16 => format!("int16 {isa}"),
            Self::Int8 => format!("int8 {isa}, gradients int16 {isa}"),
            Self::Portable => "portable".into(),
        }
    }
}

#[cfg(test)]
pub(crate) mod testing {
    use candle_core::{Device, Result, Tensor, Var};
    use quantune_adapters::rng::Stream;

    /// A tensor of standard normal values keyed by `seed`.
    pub fn normal(seed: u64, shape: &[usize]) -> Tensor {
        let mut stream = Stream::new(seed, "test", &[]);
        let values: Vec<f32> = (0..shape.iter().product()).map(|_| stream.normal()).collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    }

    /// `|a - b| / |b|` in Frobenius norms.
    pub fn relative_error(a: &Tensor, b: &Tensor) -> f64 {
        let norm = |t: Tensor| {
            f64::from(t.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap()).sqrt()
        };
        norm((a - b).unwrap()) / norm(b.clone()).max(1e-30)
    }

    /// Holds `fast` to `portable`: output and the gradient of every input, for a random upstream
    /// gradient, to a relative error of 1e-5.
    pub fn parity(
        inputs: &[Tensor],
        fast: impl Fn(&[Tensor]) -> Result<Tensor>,
        portable: impl Fn(&[Tensor]) -> Result<Tensor>,
    ) {
        let run = |form: &dyn Fn(&[Tensor]) -> Result<Tensor>| {
            let vars: Vec<Var> = inputs.iter().map(|t| Var::from_tensor(t).unwrap()).collect();
            let tensors: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
            let y = form(&tensors).unwrap();
            let upstream = normal(99, y.dims());
            let grads = (&y * upstream).unwrap().sum_all().unwrap().backward().unwrap();
            let grads: Vec<Tensor> =
                vars.iter().map(|v| grads.get(v).expect("a gradient").clone()).collect();
            (y, grads)
        };
        let (y_fast, grads_fast) = run(&fast);
        let (y, grads) = run(&portable);
        assert_eq!(y_fast.dims(), y.dims());
        let error = relative_error(&y_fast, &y);
        assert!(error < 1e-5, "output differs by {error:e}");
        for (i, (fast, portable)) in grads_fast.iter().zip(&grads).enumerate() {
            assert_eq!(fast.dims(), portable.dims());
            let error = relative_error(fast, portable);
            assert!(error < 1e-5, "gradient of input {i} differs by {error:e}");
        }
    }

    /// Holds the gradient of `f` to central differences along random directions, to 1 %.
    pub fn finite_differences(inputs: &[Tensor], f: impl Fn(&[Tensor]) -> Result<Tensor>) {
        let shape = f(inputs).unwrap().dims().to_vec();
        let upstream = normal(98, &shape);
        let value = |inputs: &[Tensor]| -> f64 {
            let y: Vec<f32> =
                (f(inputs).unwrap() * &upstream).unwrap().flatten_all().unwrap().to_vec1().unwrap();
            y.iter().map(|&v| f64::from(v)).sum()
        };
        let vars: Vec<Var> = inputs.iter().map(|t| Var::from_tensor(t).unwrap()).collect();
        let tensors: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
        let y = (f(&tensors).unwrap() * &upstream).unwrap();
        let grads = y.sum_all().unwrap().backward().unwrap();
        for (i, var) in vars.iter().enumerate() {
            let direction = normal(200 + i as u64, var.dims());
            let analytic = (grads.get(var).expect("a gradient") * &direction).unwrap();
            let analytic = f64::from(analytic.sum_all().unwrap().to_scalar::<f32>().unwrap());
            let h = 1e-2;
            let moved = |sign: f64| {
                let mut moved = inputs.to_vec();
                moved[i] = (&inputs[i] + (&direction * (sign * h)).unwrap()).unwrap();
                value(&moved)
            };
            let numeric = (moved(1.0) - moved(-1.0)) / (2.0 * h);
            let error = (analytic - numeric).abs() / numeric.abs().max(1e-2);
            assert!(error < 1e-2, "input {i}: gradient {analytic}, differences {numeric}");
        }
    }
}
