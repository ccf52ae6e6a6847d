//! Differentiable operations, a file each.
//!
//! Every operation has two forms. The *portable* one is written in ordinary differentiable candle
//! ops and defines the answer on every device. The *fast* one is a CPU kernel with a hand-written
//! gradient; `parity` tests compare its output and every gradient with the portable form.
//!
//! candle drops gradients silently in `QMatMul`, `softmax_last_dim`, `rms_norm`, `layer_norm`,
//! `rotary_emb` and `sdpa` (they have no backward pass): none of them may be used in a
//! training path, and a test searches for their names outside this module.
//!
//! Activations are packed (varlen): the tokens of all rows of a batch are concatenated as `(N, ..)`, and a row
//! is a [`Segment`], a range of tokens that may share the prefix of an earlier row. There is no padding.

pub(crate) mod adapted_row_dot;
pub(crate) mod attention;
mod cpu;
mod device;
mod device_matrix;
pub(crate) mod frozen_linear;
pub(crate) mod gemm;
pub(crate) mod half_tape;
pub(crate) mod lanes;
pub(crate) mod linear_cross_entropy;
pub(crate) mod low_rank;
pub(crate) mod rms_norm;
pub(crate) mod rope;
pub(crate) mod row_dot;
pub(crate) mod segment;
pub(crate) mod swiglu;
pub(crate) mod worker_pool;

use crate::isa::Isa;
use crate::quant::BlockType;
use crate::string_enum::string_enum;
pub use attention::Heads;
pub use attention::{AttentionConfig, causal_attention};
pub(crate) use cpu::{Values, exp, par_for_each};
pub use device::{DeviceError, DeviceName};
pub(crate) use device_matrix::DeviceMatrix;
pub use frozen_linear::few_rows;
pub use frozen_linear::frozen_linear;
use gemm::PanelType;
pub(crate) use linear_cross_entropy::capped_log_probs;
pub use linear_cross_entropy::{LogitSoftcap, linear_log_probs};
pub use rms_norm::rms_norm;
pub(crate) use rope::rope;
pub use segment::Segment;
pub(crate) use swiglu::gated;
pub use swiglu::{Gate, swiglu};

string_enum! {
    /// A compute engine with its own types for hidden states, KV cache, gradients and optimizer state.
    #[derive(Debug)]
    pub enum BackendKind {
        /// Hand-written kernels for the CPU, forward and backward, in any [`Precision`].
        Cpu = "cpu",
        /// Differentiable candle ops in F32 on any candle device: slow, and the definition of the
        /// answer that every other backend is tested against.
        Reference = "reference",
    }
}

string_enum! {
    /// The numeric precision of matrix products.
    #[derive(Debug)]
    pub enum Precision {
        /// Exact `f32`: weights are read panel by panel from the mapped file.
        F32 = "f32",
        /// 16-bit block-floating integers, forward and backward: twice the speed, at an error of 1e-4 of a
        /// product, a twentieth of bfloat16's. For the backward pass, gate, up and attention's output are
        /// kept as `f16`.
        Int16 = "int16",
        /// Forward products of the base in 8-bit integers, at an error of 1e-2 of a product; adapters,
        /// gradients and decode steps as [`Precision::Int16`].
        Int8 = "int8",
    }
}

#[allow(clippy::derivable_impls)] // string_enum! marks no variant as the default
impl Default for BackendKind {
    fn default() -> Self {
        Self::Cpu
    }
}

#[allow(clippy::derivable_impls)]
impl Default for Precision {
    fn default() -> Self {
        Self::Int16
    }
}

/// A backend and the precision that it computes in.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Compute {
    /// The backend.
    pub backend: BackendKind,
    /// The precision of matrix products.
    pub precision: Precision,
}

/// The precision, or `portable` for the reference backend.
impl std::fmt::Display for Compute {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.backend {
            BackendKind::Cpu => self.precision.fmt(f),
            BackendKind::Reference => f.write_str("portable"),
        }
    }
}

impl BackendKind {
    /// Whether the backend supports a precision.
    pub fn has(self, precision: Precision) -> bool {
        match self {
            Self::Cpu => true,
            Self::Reference => precision == Precision::F32,
        }
    }

    /// The default precision.
    pub fn default_precision(self) -> Precision {
        match self {
            Self::Cpu => Precision::default(),
            Self::Reference => Precision::F32,
        }
    }
}

impl Precision {
    /// Panel type of forward products.
    pub(crate) fn forward_panel(self) -> PanelType {
        match self {
            Self::F32 => PanelType::F32,
            Self::Int16 => PanelType::Int16,
            Self::Int8 => PanelType::Int8,
        }
    }

    /// Panel type of gradient products.
    pub(crate) fn backward_panel(self) -> PanelType {
        match self {
            Self::F32 => PanelType::F32,
            Self::Int16 | Self::Int8 => PanelType::Int16,
        }
    }

    /// Panel types of forward products and of gradient products.
    pub(crate) fn panels(self) -> (PanelType, PanelType) {
        (self.forward_panel(), self.backward_panel())
    }
}

/// The implementation of a differentiable op that is used on candle's tape.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OpForm {
    /// A CPU kernel with a hand-written gradient.
    Kernel,
    /// Plain candle ops.
    Portable,
}

impl Compute {
    pub(crate) fn op_form(self) -> OpForm {
        match self.backend {
            BackendKind::Cpu => OpForm::Kernel,
            BackendKind::Reference => OpForm::Portable,
        }
    }

    /// The CPU backend in exact F32.
    pub const F32: Self = Self::cpu(Precision::F32);
    /// The CPU backend in 16-bit block-floating integers.
    pub const INT16: Self = Self::cpu(Precision::Int16);
    /// The CPU backend in 8-bit integers.
    pub const INT8: Self = Self::cpu(Precision::Int8);
    /// The reference backend.
    pub const REFERENCE: Self = Self { backend: BackendKind::Reference, precision: Precision::F32 };

    /// The CPU backend in this precision.
    pub const fn cpu(precision: Precision) -> Self {
        Self { backend: BackendKind::Cpu, precision }
    }

    /// The name of the kernel for matrices of a block type in a decode step.
    pub fn decode_kernel(self, block_type: BlockType) -> String {
        let isa = Isa::current().name();
        let floats = matches!(block_type, BlockType::F32 | BlockType::F16 | BlockType::BF16);
        match (self.backend, self.precision) {
            (BackendKind::Reference, _) => "portable".into(),
            (BackendKind::Cpu, Precision::Int16 | Precision::Int8) if !floats => {
                format!("int16 rows {isa}")
            }
            (BackendKind::Cpu, _) => format!("f32 rows {isa}"),
        }
    }

    /// The name of the kernel for frozen linear layers.
    pub fn linear_kernel(self) -> String {
        let isa = Isa::current().name();
        match (self.backend, self.precision) {
            (BackendKind::Reference, _) => "portable".into(),
            (BackendKind::Cpu, Precision::F32) => format!("f32 {isa}"),
            (BackendKind::Cpu, Precision::Int16) => format!("int16 {isa}"),
            (BackendKind::Cpu, Precision::Int8) => format!("int8 {isa}, gradients int16 {isa}"),
        }
    }
}

#[cfg(test)]
pub(crate) mod testing {
    use candle_core::{Device, Result, Tensor, Var};
    use quantune_adapters::rng::Stream;

    /// A tensor of standard normal values keyed by `seed`.
    pub(crate) fn normal(seed: u64, shape: &[usize]) -> Tensor {
        let mut stream = Stream::new(seed, "test", &[]);
        let values: Vec<f32> = (0..shape.iter().product()).map(|_| stream.normal()).collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    }

    /// `|a - b| / |b|` in Frobenius norms.
    pub(crate) fn relative_error(a: &Tensor, b: &Tensor) -> f64 {
        let norm = |t: Tensor| {
            f64::from(t.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap()).sqrt()
        };
        norm((a - b).unwrap()) / norm(b.clone()).max(1e-30)
    }

    /// Compares `fast` with `portable`: output and the gradient of every input, for a random upstream
    /// gradient, to a relative error of 1e-5.
    pub(crate) fn parity(
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

    /// Compares the gradient of `f` with central differences along random directions, to 1 %.
    pub(crate) fn finite_differences(inputs: &[Tensor], f: impl Fn(&[Tensor]) -> Result<Tensor>) {
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
