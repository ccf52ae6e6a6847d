//! The product with a frozen matrix in any block type, differentiable in its input only.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, Device, Layout, Result, Shape, Tensor};

use super::cpu::{Values, values};
use super::gemm::{Init, Out, PackedRows, PanelType, Product, Strided, Term, Weights, multiply};
use super::{Compute, OpForm, row_dot};
use crate::isa::Isa;
use crate::quant::FrozenMatrix;

/// `y = x · Wᵀ` for a frozen `W`, differentiable in `x` only.
///
/// Shapes: `x (.., in)` F32, `W (out, in)` in any block type → `y (.., out)` F32.
/// Backward: `dx = dy · W`. `W` is dequantized panel by panel, without keeping a copy.
pub fn frozen_linear(x: &Tensor, weight: &Arc<FrozenMatrix>, compute: Compute) -> Result<Tensor> {
    match compute.op_form() {
        OpForm::Kernel => {
            let (forward, backward) = compute.precision.panels();
            let op = FrozenLinear { weight: weight.clone(), forward, backward };
            x.contiguous()?.apply_op1(op)
        }
        OpForm::Portable => portable(x, weight),
    }
}

/// [`frozen_linear`] without a gradient, for few rows `x (m, in)`: weights are read in place,
/// once for every four or eight rows. A row gives the same bits in any batch. Returns `y (m, out)` on the host.
pub fn few_rows(x: &Tensor, weight: &Arc<FrozenMatrix>, compute: Compute) -> Result<Vec<f32>> {
    let (rows, width) = x.dims2()?;
    if compute.op_form() == OpForm::Portable || width != weight.cols() {
        return frozen_linear(&x.detach(), weight, compute)?.flatten_all()?.to_vec1();
    }
    let x = x.contiguous()?;
    let mut y = vec![0f32; rows * weight.rows()];
    match compute.precision.forward_panel() {
        PanelType::F32 => row_dot::f32(Isa::current(), &Values::of(&x)?, weight, &mut y),
        PanelType::Int16 | PanelType::Int8 => {
            row_dot::int16(Isa::current(), &Values::of(&x)?, weight, &mut y);
        }
    }
    Ok(y)
}

/// Dequantizes the whole of `W` and multiplies.
fn portable(x: &Tensor, weight: &FrozenMatrix) -> Result<Tensor> {
    let w = dequantize(weight, x.device())?; // (out, in)
    x.broadcast_matmul(&w.t()?)
}

/// All of a frozen matrix as an F32 tensor `(rows, cols)`.
pub(crate) fn dequantize(weight: &FrozenMatrix, device: &Device) -> Result<Tensor> {
    let (rows, cols) = (weight.rows(), weight.cols());
    let mut w = vec![0f32; rows * cols];
    weight.read_tile(0..rows, 0..cols, &mut w);
    Tensor::from_vec(w, (rows, cols), device)
}

/// Rows of a frozen matrix as an F32 tensor `(rows.len(), cols)`: an embedding look-up.
///
/// Fails if an index is out of range.
pub(crate) fn frozen_rows(weight: &FrozenMatrix, rows: &[u32], device: &Device) -> Result<Tensor> {
    let mut out = Vec::new();
    read_rows(weight, rows, &mut out)?;
    Tensor::from_vec(out, (rows.len(), weight.cols()), device)
}

/// [`frozen_rows`] into a buffer, which is overwritten: `(rows.len(), cols)`.
pub(crate) fn read_rows(weight: &FrozenMatrix, rows: &[u32], out: &mut Vec<f32>) -> Result<()> {
    let cols = weight.cols();
    if let Some(row) = rows.iter().find(|&&row| row as usize >= weight.rows()) {
        candle_core::bail!("token {row} is outside the vocabulary of {}", weight.rows());
    }
    out.resize(rows.len() * cols, 0.0);
    for (&row, out) in rows.iter().zip(out.chunks_exact_mut(cols)) {
        weight.read_row(row as usize, out);
    }
    Ok(())
}

struct FrozenLinear {
    weight: Arc<FrozenMatrix>,
    forward: PanelType,
    backward: PanelType,
}

impl CustomOp1 for FrozenLinear {
    fn name(&self) -> &'static str {
        "frozen_linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = values(x, layout)?;
        let mut dims = layout.dims().to_vec();
        let width = dims.last_mut().expect("x has a last dimension");
        if *width != self.weight.cols() {
            candle_core::bail!("input is {width} wide, the weight needs {}", self.weight.cols());
        }
        *width = self.weight.rows();
        let mut y = vec![0f32; dims.iter().product()];
        matmul_transposed(self.forward, x, &self.weight, &mut y, &mut PackedRows::default());
        Ok((CpuStorage::F32(y), dims.into()))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let dy = dy.contiguous()?;
        let mut dx = vec![0f32; x.elem_count()];
        let packed = &mut PackedRows::default();
        matmul(self.backward, &Values::of(&dy)?, &self.weight, &mut dx, packed);
        Ok(Some(Tensor::from_vec(dx, x.shape(), x.device())?))
    }
}

/// `y (m, out) = x (m, in) · Wᵀ`.
pub(super) fn matmul_transposed(
    panel: PanelType,
    x: &[f32],
    weight: &FrozenMatrix,
    y: &mut [f32],
    packed: &mut PackedRows,
) {
    product(panel, (x, weight.cols()), weight, true, (y, weight.rows()), packed);
}

/// `dx (m, in) = dy (m, out) · W`.
pub(super) fn matmul(
    panel: PanelType,
    dy: &[f32],
    weight: &FrozenMatrix,
    dx: &mut [f32],
    packed: &mut PackedRows,
) {
    product(panel, (dy, weight.rows()), weight, false, (dx, weight.cols()), packed);
}

fn product(
    panel: PanelType,
    (x, depth): (&[f32], usize),
    weight: &FrozenMatrix,
    transposed: bool,
    (y, width): (&mut [f32], usize),
    packed: &mut PackedRows,
) {
    let isa = Isa::current();
    packed.pack(isa, panel, Strided { values: x, stride: depth }, x.len() / depth, depth);
    let terms = vec![Term { x: packed, weights: Weights::Frozen(weight), transposed }];
    let product = Product { terms, init: Init::Zero, out: Out::new(y, width) };
    multiply(isa, &mut [product]);
}

#[cfg(test)]
mod tests {
    use super::super::testing::{finite_differences, normal, parity};
    use super::*;
    use crate::quant::{BlockType, Bytes, RowOrder};

    /// A matrix of random blocks whose scales are small and finite.
    fn matrix(block_type: BlockType, rows: usize, cols: usize) -> Arc<FrozenMatrix> {
        let bytes = crate::quant::testing::random_blocks(block_type, rows * cols, 5);
        Arc::new(FrozenMatrix::new(Bytes::new(Arc::new(bytes)), block_type, rows, cols).unwrap())
    }

    #[test]
    fn parity_over_every_block_type() {
        for &block_type in BlockType::ALL {
            for (m, rows, cols) in [(1, 40, 256), (7, 130, 512)] {
                let w = matrix(block_type, rows, cols);
                parity(
                    &[normal(1, &[m, cols])],
                    |x| frozen_linear(&x[0], &w, Compute::F32),
                    |x| frozen_linear(&x[0], &w, Compute::REFERENCE),
                );
            }
        }
    }

    #[test]
    fn parity_on_odd_widths_and_interleaved_rows() {
        let order = RowOrder::Interleaved { head_dim: 8 };
        let w = (*matrix(BlockType::Q8_0, 72, 96)).clone().with_order(order).unwrap();
        let w = Arc::new(w);
        let x = [normal(2, &[2, 5, 96])];
        parity(
            &x,
            |x| frozen_linear(&x[0], &w, Compute::F32),
            |x| frozen_linear(&x[0], &w, Compute::REFERENCE),
        );
        finite_differences(&x, |x| frozen_linear(&x[0], &w, Compute::F32));
    }

    #[test]
    fn a_wrong_width_is_an_error() {
        let w = matrix(BlockType::F32, 4, 8);
        let x = normal(1, &[2, 7]);
        let error = frozen_linear(&x, &w, Compute::F32).unwrap_err().to_string();
        assert!(error.contains("7 wide") && error.contains("8"), "{error}");
        assert!(frozen_rows(&w, &[3, 4], &Device::Cpu).is_err());
    }
}
