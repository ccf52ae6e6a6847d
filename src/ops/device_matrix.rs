//! A frozen matrix that was uploaded to a device, and the product with it, in plain candle ops.
//!
//! Block types that candle supports are uploaded quantized and dequantized on the device for each product,
//! so that a device holds little more than the file. Other types (IQ4_NL, IQ4_XS, MXFP4)
//! are uploaded as `f32`: exact, but larger.

use std::sync::Arc;

use candle_core::backend::BackendStorage;
use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{
    CpuStorage, CudaStorage, CustomOp2, DType, Device, Layout, MetalStorage, Result, Shape, Tensor,
};

use super::frozen_linear::dequantize;
use crate::quant::{BlockType, FrozenMatrix};

/// A frozen `(rows, cols)` matrix on a device, its rows in their logical order.
#[derive(Debug)]
pub(crate) struct DeviceMatrix {
    kept: DeviceStorage,
    /// Appended rows, F32.
    more: Option<Tensor>,
    cols: usize,
}

#[derive(Debug)]
enum DeviceStorage {
    /// Quantized blocks.
    Blocks(QTensor),
    /// F32, F16 or BF16.
    Values(Tensor),
}

impl DeviceMatrix {
    /// Uploads a matrix to a device directly from the mapped file.
    pub(crate) fn upload(weight: &FrozenMatrix, device: &Device) -> Result<Self> {
        let shape = (weight.own_rows(), weight.cols());
        let values = |dtype| {
            let bytes = weight.bytes_in_order();
            Tensor::from_raw_buffer(&bytes, dtype, &[weight.own_rows(), weight.cols()], device)
        };
        let kept = match upload_as(weight.block_type()) {
            UploadAs::Values(dtype) => DeviceStorage::Values(values(dtype)?),
            UploadAs::Blocks(dtype) => {
                let mut bytes = weight.bytes_in_order();
                // candle casts bytes to its block structs, which need an even address.
                if !bytes.as_ptr().addr().is_multiple_of(align_of::<u16>()) {
                    bytes = bytes.into_owned().into();
                }
                let storage = QStorage::from_data(bytes, device, dtype)?;
                DeviceStorage::Blocks(QTensor::new(storage, shape)?)
            }
            UploadAs::Dequantized => {
                let own = dequantize(weight, device)?;
                DeviceStorage::Values(own.narrow(0, 0, weight.own_rows())?)
            }
        };
        let more = weight.more_rows().map(|more| dequantize(more, device)).transpose()?;
        Ok(Self { kept, more, cols: weight.cols() })
    }

    /// `y = x · Wᵀ`, differentiable in `x` only.
    ///
    /// Shapes: `x (.., in)` F32, `W (out, in)` → `y (.., out)` F32. Backward: `dx = dy · W`. The
    /// dequantized weights are freed after each of the two products.
    pub(crate) fn linear(self: &Arc<Self>, x: &Tensor) -> Result<Tensor> {
        let mut dims = x.dims().to_vec();
        let x = x.reshape(((), self.cols))?; // (m, in)
        let y = x.detach().matmul(&self.values()?.t()?)?; // (m, out)
        *dims.last_mut().expect("x has a last dimension") = y.dim(1)?;
        x.apply_op2(&y, DeviceLinear(self.clone()))?.reshape(dims)
    }

    /// The whole matrix dequantized, `(out, in)` F32.
    fn values(&self) -> Result<Tensor> {
        let own = match &self.kept {
            DeviceStorage::Blocks(blocks) => blocks.dequantize(&blocks.device())?,
            DeviceStorage::Values(values) => values.to_dtype(DType::F32)?,
        };
        match &self.more {
            Some(more) => Tensor::cat(&[&own, more], 0),
            None => Ok(own),
        }
    }
}

/// How a block type is stored on a device.
enum UploadAs {
    Values(DType),
    Blocks(GgmlDType),
    Dequantized,
}

fn upload_as(block_type: BlockType) -> UploadAs {
    match block_type {
        BlockType::F32 => UploadAs::Values(DType::F32),
        BlockType::F16 => UploadAs::Values(DType::F16),
        BlockType::BF16 => UploadAs::Values(DType::BF16),
        BlockType::Q4_0 => UploadAs::Blocks(GgmlDType::Q4_0),
        BlockType::Q4_1 => UploadAs::Blocks(GgmlDType::Q4_1),
        BlockType::Q5_0 => UploadAs::Blocks(GgmlDType::Q5_0),
        BlockType::Q5_1 => UploadAs::Blocks(GgmlDType::Q5_1),
        BlockType::Q8_0 => UploadAs::Blocks(GgmlDType::Q8_0),
        BlockType::Q2_K => UploadAs::Blocks(GgmlDType::Q2K),
        BlockType::Q3_K => UploadAs::Blocks(GgmlDType::Q3K),
        BlockType::Q4_K => UploadAs::Blocks(GgmlDType::Q4K),
        BlockType::Q5_K => UploadAs::Blocks(GgmlDType::Q5K),
        BlockType::Q6_K => UploadAs::Blocks(GgmlDType::Q6K),
        BlockType::IQ4_NL | BlockType::IQ4_XS | BlockType::MXFP4 => UploadAs::Dequantized,
    }
}

/// Records `y`, computed off the tape, as a function of `x`. candle's own product would keep the
/// dequantized weight for the backward pass and compute its gradient.
struct DeviceLinear(Arc<DeviceMatrix>);

impl DeviceLinear {
    /// A contiguous copy of `y`.
    fn copy<S: BackendStorage>(y: &S, layout: &Layout) -> Result<(S, Shape)> {
        Ok((y.try_clone(layout)?, layout.shape().clone()))
    }
}

impl CustomOp2 for DeviceLinear {
    fn name(&self) -> &'static str {
        "device_linear"
    }

    fn cpu_fwd(
        &self,
        _x: &CpuStorage,
        _: &Layout,
        y: &CpuStorage,
        layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        Self::copy(y, layout)
    }

    fn cuda_fwd(
        &self,
        _x: &CudaStorage,
        _: &Layout,
        y: &CudaStorage,
        layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        Self::copy(y, layout)
    }

    fn metal_fwd(
        &self,
        _x: &MetalStorage,
        _: &Layout,
        y: &MetalStorage,
        layout: &Layout,
    ) -> Result<(MetalStorage, Shape)> {
        Self::copy(y, layout)
    }

    fn bwd(
        &self,
        _x: &Tensor,
        _y: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        Ok((Some(dy.contiguous()?.matmul(&self.0.values()?)?), None)) // (m, in)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{normal, parity};
    use super::super::{Compute, frozen_linear};
    use super::*;
    use crate::quant::testing::random_blocks;
    use crate::quant::{Bytes, RowOrder};

    /// Every uploaded block type, with the CPU as the device, against the portable form.
    #[test]
    fn parity_over_every_block_type() {
        let check = |block_type, order, shape: &[usize], rows| {
            let cols = *shape.last().unwrap();
            let bytes = Bytes::new(Arc::new(random_blocks(block_type, rows * cols, 5)));
            let w = FrozenMatrix::new(bytes, block_type, rows, cols).unwrap();
            let w = Arc::new(w.with_order(order).unwrap());
            let uploaded = Arc::new(DeviceMatrix::upload(&w, &Device::Cpu).unwrap());
            let blocks = matches!(uploaded.kept, DeviceStorage::Blocks(_));
            assert_eq!(blocks, matches!(upload_as(block_type), UploadAs::Blocks(_)));
            parity(
                &[normal(1, shape)],
                |x| uploaded.linear(&x[0]),
                |x| frozen_linear(&x[0], &w, Compute::REFERENCE),
            );
        };
        let w = FrozenMatrix::new(
            Bytes::new(Arc::new(random_blocks(BlockType::Q4_0, 40 * 64, 5))),
            BlockType::Q4_0,
            40,
            64,
        );
        let w = w.unwrap();
        let grown = Arc::new(w.grown(2, &w.mean_row()).unwrap());
        let uploaded = Arc::new(DeviceMatrix::upload(&grown, &Device::Cpu).unwrap());
        parity(
            &[normal(1, &[3, 64])],
            |x| uploaded.linear(&x[0]),
            |x| frozen_linear(&x[0], &grown, Compute::REFERENCE),
        );
        for &block_type in BlockType::ALL {
            check(block_type, RowOrder::Straight, &[7, 512], 40);
            let order = RowOrder::Interleaved { head_dim: 8 };
            check(block_type, order, &[2, 3, 256], 24);
        }
    }

    /// An odd address, which a mapped file may have and candle would panic on.
    #[test]
    fn blocks_may_lie_anywhere() {
        let blocks = random_blocks(BlockType::Q8_0, 4 * 32, 3);
        let at = |pad: usize| {
            let all: Vec<u8> = vec![0; pad].into_iter().chain(blocks.iter().copied()).collect();
            let bytes = Bytes::new(Arc::new(all)).slice(pad..pad + blocks.len()).unwrap();
            let w = FrozenMatrix::new(bytes, BlockType::Q8_0, 4, 32).unwrap();
            let w = DeviceMatrix::upload(&w, &Device::Cpu).unwrap();
            w.values().unwrap().to_vec2::<f32>().unwrap()
        };
        assert_eq!(at(0), at(1));
    }

    #[test]
    fn the_weight_is_not_kept_on_the_tape() {
        let w = FrozenMatrix::from_f32(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 3, 2).unwrap();
        let w = Arc::new(DeviceMatrix::upload(&w, &Device::Cpu).unwrap());
        let x = candle_core::Var::new(&[[1f32, 1.0]], &Device::Cpu).unwrap();
        let y = w.linear(&x).unwrap();
        assert_eq!(y.to_vec2::<f32>().unwrap(), [[3.0, 7.0, 11.0]]);
        let grads = y.sum_all().unwrap().backward().unwrap();
        assert_eq!(grads.get(&x).unwrap().to_vec2::<f32>().unwrap(), [[9.0, 12.0]]);
        assert!(!w.linear(&x.as_detached_tensor()).unwrap().track_op());
        assert!(w.linear(&normal(1, &[1, 3])).is_err());
    }
}
