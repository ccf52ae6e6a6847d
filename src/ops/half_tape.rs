//! Activations stored as `f16` for the backward pass.

use half::f16;
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;

/// Values per task.
const CHUNK: usize = 1 << 14;

/// Rounds `values` to `f16`, a relative error of 2^-11; values out of range are clamped.
pub(crate) fn narrow(values: &[f32], kept: &mut Vec<f16>) {
    kept.resize(values.len(), f16::ZERO);
    kept.par_chunks_mut(CHUNK).zip(values.par_chunks(CHUNK)).for_each(|(kept, values)| {
        let mut within = [0f32; 256];
        for (kept, values) in kept.chunks_mut(256).zip(values.chunks(256)) {
            let within = &mut within[..values.len()];
            for (within, value) in within.iter_mut().zip(values) {
                *within = value.clamp(f16::MIN.to_f32_const(), f16::MAX.to_f32_const());
            }
            kept.convert_from_f32_slice(within);
        }
    });
}

/// Converts them back to `f32`.
pub(crate) fn widen(kept: &[f16], values: &mut Vec<f32>) {
    values.resize(kept.len(), 0.0);
    let chunks = values.par_chunks_mut(CHUNK).zip(kept.par_chunks(CHUNK));
    chunks.for_each(|(values, kept)| kept.convert_to_f32_slice(values));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_round_trip_is_exact_to_half_a_unit() {
        let values: Vec<f32> = (0..40_000).map(|i| (i as f32 - 2e4) * 0.37).collect();
        let (mut kept, mut back) = (Vec::new(), Vec::new());
        narrow(&values, &mut kept);
        widen(&kept, &mut back);
        for (value, back) in values.iter().zip(&back) {
            assert!((value - back).abs() <= value.abs() / 2048.0, "{value} came back as {back}");
        }
        narrow(&[1e9, -1e9, f32::NAN], &mut kept);
        widen(&kept, &mut back);
        assert_eq!(back[..2], [65504.0, -65504.0]);
        assert!(back[2].is_nan());
    }
}
