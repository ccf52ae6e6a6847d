//! Benchmarks of single operations, at the shapes of SmolLM2-135M and Qwen2.5-0.5B.
//!
//! `cargo bench --bench ops [-- FILTER]`; `RAYON_NUM_THREADS` sets the number of threads. An element of
//! the throughput is a floating-point operation (a multiply-add counts as two), so that Gelem/s are
//! GFLOP/s; for norm and activation it is a value of the output.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor, Var};
use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main};
use quantune::ops::attention::Heads;
use quantune::ops::frozen_linear::few_rows;
use quantune::ops::{
    Compute, Segment, causal_attention, frozen_linear, linear_log_probs, rms_norm, swiglu,
};
use quantune::quant::{BlockType, Bytes, FrozenMatrix};

const COMPUTE: &[Compute] = &[Compute::F32, Compute::INT16, Compute::INT8];

/// Sequence length in tokens.
const T: usize = 512;

const BLOCK_TYPES: &[BlockType] = &[
    BlockType::F32,
    BlockType::Q4_0,
    BlockType::Q4_1,
    BlockType::Q8_0,
    BlockType::Q4_K,
    BlockType::Q6_K,
];

/// `(out, in)` of the widest layers; 576 and 896 are not multiples of the block length of K-quants.
const LINEARS: &[(usize, usize)] = &[(1536, 576), (576, 1536), (4864, 896), (896, 4864)];

fn linears(c: &mut Criterion) {
    let mut group = c.benchmark_group("frozen_linear");
    for &block_type in BLOCK_TYPES {
        for &(rows, cols) in LINEARS {
            let Some(weight) = matrix(block_type, rows, cols) else { continue };
            for &compute in COMPUTE {
                let case = |m| format!("{block_type} {cols}to{rows} {m} rows {compute:?}");
                let x = var(&[T, cols]);
                let run = || frozen_linear(&x, &weight, compute).unwrap(); // (T, rows)
                bench(&mut group, format!("forward {}", case(T)), 2 * T * rows * cols, run);
                let y = run();
                let back = || y.backward().unwrap();
                bench(&mut group, format!("backward {}", case(T)), 2 * T * rows * cols, back);
                for m in [1, 4] {
                    let x = var(&[m, cols]);
                    let run = || few_rows(&x, &weight, compute).unwrap(); // (m, rows)
                    bench(&mut group, format!("decode {}", case(m)), 2 * m * rows * cols, run);
                }
            }
        }
    }
}

fn attention(c: &mut Criterion) {
    let mut group = c.benchmark_group("causal_attention");
    for (heads, kv_heads) in [(9, 3), (14, 2)] {
        let heads = Heads { heads, kv_heads, head_dim: 64 };
        for (rows, t) in [(4, T), (1, 4 * T)] {
            let row = |i| Segment::whole(i * t..(i + 1) * t);
            let segments: Arc<[Segment]> = (0..rows).map(row).collect();
            let q = var(&[rows * t, heads.heads * heads.head_dim]);
            let k = var(&[rows * t, kv_heads * heads.head_dim]);
            let v = var(&[rows * t, kv_heads * heads.head_dim]);
            // One product: two operations for each pair of tokens under the causal mask, half of all pairs.
            let product = rows * t * t * heads.heads * heads.head_dim;
            for &compute in COMPUTE {
                let case = format!("{rows}x{t} {}of{kv_heads} heads {compute:?}", heads.heads);
                let run = || causal_attention(&q, &k, &v, heads, &segments, None, compute).unwrap();
                bench(&mut group, format!("forward {case}"), 2 * product, run);
                let y = run();
                let back = || y.backward().unwrap();
                bench(&mut group, format!("backward {case}"), 5 * product, back);
            }
        }
    }
}

fn head(c: &mut Criterion) {
    let mut group = c.benchmark_group("linear_log_probs");
    group.sample_size(10);
    for (vocabulary, hidden) in [(49_152, 576), (151_936, 896)] {
        let weight = matrix(BlockType::Q8_0, vocabulary, hidden).expect("whole blocks");
        let targets: Vec<u32> = (0..T).map(|i| (i * 97 % vocabulary) as u32).collect();
        let product = 2 * T * vocabulary * hidden;
        for &compute in COMPUTE {
            let case = format!("{hidden}to{vocabulary} {compute:?}");
            let x = var(&[T, hidden]);
            let run = |x: &Tensor| linear_log_probs(x, &weight, &targets, compute).unwrap();
            bench(&mut group, format!("forward {case}"), product, || run(&x.detach()));
            let both = || run(&x).backward().unwrap();
            bench(&mut group, format!("forward and backward {case}"), 2 * product, both);
        }
    }
}

fn elementwise(c: &mut Criterion) {
    let mut group = c.benchmark_group("elementwise");
    let x = var(&[4 * T, 576]);
    let w = Tensor::ones(576, DType::F32, &Device::Cpu).unwrap();
    let (gate, up) = (var(&[4 * T, 1536]), var(&[4 * T, 1536]));
    for &compute in COMPUTE {
        let norm = || rms_norm(&x, &w, 1e-5, compute).unwrap();
        let activation = || swiglu(&gate, &up, compute).unwrap();
        let ops: [(&str, &dyn Fn() -> Tensor); 2] = [("rms_norm", &norm), ("swiglu", &activation)];
        for (name, run) in ops {
            let y = run();
            bench(&mut group, format!("forward {name} {compute:?}"), y.elem_count(), run);
            let back = || y.backward().unwrap();
            bench(&mut group, format!("backward {name} {compute:?}"), y.elem_count(), back);
        }
    }
}

fn bench<O>(
    group: &mut BenchmarkGroup<'_, WallTime>,
    name: String,
    operations: usize,
    run: impl FnMut() -> O,
) {
    let mut run = run;
    group.throughput(Throughput::Elements(operations as u64));
    group.bench_function(name, |b| b.iter(&mut run));
}

/// A variable with values between -1 and 1.
fn var(shape: &[usize]) -> Tensor {
    let values =
        (0..shape.iter().product()).map(|i: usize| ((i * 37 % 256) as f32 - 127.5) / 128.0);
    let values: Vec<f32> = values.collect();
    Var::from_vec(values, shape, &Device::Cpu).unwrap().into_inner()
}

/// A matrix of arbitrary blocks, or `None` if its rows are not whole blocks. All bytes are between 0x20 and
/// 0x2F, so that scales are small normal numbers in every block type.
fn matrix(block_type: BlockType, rows: usize, cols: usize) -> Option<Arc<FrozenMatrix>> {
    let bytes = block_type.bytes_for(cols)? * rows;
    let bytes: Vec<u8> = (0..bytes).map(|i| 0x20 + (i * 37 % 253 % 16) as u8).collect();
    let bytes = Bytes::new(Arc::new(bytes));
    Some(Arc::new(FrozenMatrix::new(bytes, block_type, rows, cols).expect("the right size")))
}

criterion_group!(benches, linears, attention, head, elementwise);
criterion_main!(benches);
