//! Causal attention with grouped heads over packed rows: a row sees itself and nothing else.
//!
//! The fast form works through 64 queries at a time, so its memory is `64 x T` per thread, and
//! keeps only the log-sum-exp of each query for the backward pass, which recomputes the weights
//! (as in FlashAttention-2, Dao 2023).

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use candle_core::{CpuStorage, CustomOp3, D, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::Compute;
use super::cpu::{Mat, Target, Values, exp, gemm, values};
use crate::isa::Isa;

/// Queries taken at a time.
const BLOCK: usize = 64;

/// How the heads lie in `q (N, heads · head_dim)` and in `k`, `v (N, kv_heads · head_dim)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heads {
    /// Query heads, a multiple of `kv_heads`: head `h` reads key head `h / (heads / kv_heads)`.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
}

impl Heads {
    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    fn q_width(&self) -> usize {
        self.heads * self.head_dim
    }

    fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }
}

/// `softmax(q · kᵀ / sqrt(head_dim)) · v` per head, each token over the tokens of its own segment
/// up to itself.
///
/// Shapes: `q (N, heads · head_dim)`, `k`, `v (N, kv_heads · head_dim)`, F32 → as `q`. `segments`
/// are the rows of the batch, end to end from 0 to N.
pub fn causal_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    heads: Heads,
    segments: &Arc<[Range<usize>]>,
    compute: Compute,
) -> Result<Tensor> {
    check(q, k, v, heads, segments)?;
    match compute {
        Compute::F32 | Compute::Int16 | Compute::Int8 => {
            let op = CausalAttention { heads, segments: segments.clone(), lse: OnceLock::new() };
            q.contiguous()?.apply_op3(&k.contiguous()?, &v.contiguous()?, op)
        }
        Compute::Portable => portable(q, k, v, heads, segments),
    }
}

fn check(q: &Tensor, k: &Tensor, v: &Tensor, heads: Heads, rows: &[Range<usize>]) -> Result<()> {
    let (n, width) = q.dims2()?;
    let mut end = 0;
    let end_to_end = rows.iter().all(|row| std::mem::replace(&mut end, row.end) == row.start);
    if !end_to_end || end != n {
        candle_core::bail!("segments {rows:?} do not part {n} tokens");
    }
    let kv = [n, heads.kv_width()];
    if width != heads.q_width() || k.dims() != kv || v.dims() != kv {
        let (q, k, v) = (q.dims(), k.dims(), v.dims());
        candle_core::bail!("attention: q is {q:?}, k {k:?}, v {v:?} for {heads:?}");
    }
    Ok(())
}

fn portable(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    heads: Heads,
    segments: &[Range<usize>],
) -> Result<Tensor> {
    let Heads { heads: q_heads, kv_heads, head_dim } = heads;
    let rows = segments.iter().filter(|row| !row.is_empty()).map(|row| {
        let t = row.len();
        let part = |x: &Tensor, n| {
            x.narrow(0, row.start, t)?.reshape((t, n, head_dim))?.transpose(0, 1)?.contiguous()
        };
        let repeat = |x: Tensor| {
            x.unsqueeze(1)?.repeat((1, heads.group(), 1, 1))?.reshape((q_heads, t, head_dim))
        };
        let (q, k, v) = (part(q, q_heads)?, part(k, kv_heads)?, part(v, kv_heads)?);
        let (k, v) = (repeat(k)?, repeat(v)?); // (heads, T, head_dim)
        let scores = (q.matmul(&k.t()?)? * f64::from(heads.scale()))?; // (heads, T, T)
        let mask: Vec<f32> =
            (0..t * t).map(|i| if i % t > i / t { f32::NEG_INFINITY } else { 0.0 }).collect();
        let scores = scores.broadcast_add(&Tensor::from_vec(mask, (t, t), q.device())?)?;
        let weights = candle_nn::ops::softmax(&scores, D::Minus1)?;
        weights.matmul(&v)?.transpose(0, 1)?.reshape((t, heads.q_width()))
    });
    Tensor::cat(&rows.collect::<Result<Vec<_>>>()?, 0)
}

/// Attention of new queries over keys and values that are already there, without gradients: row
/// `i` of the batch has the queries `segments[i]` and sees all of `keys[i]`, `values[i]`, of which
/// the last `segments[i].len()` positions are its own.
///
/// Shapes: `q (N, heads · head_dim)`; each of `keys`, `values` is `(T, kv_heads · head_dim)` with
/// `T` at least the row's queries → as `q`.
pub(crate) fn attend_to_cache(
    qs: &[f32],
    keys: &[&[f32]],
    values: &[&[f32]],
    heads: Heads,
    segments: &[Range<usize>],
    out: &mut [f32],
) {
    let target = Target::new(out);
    // A row may have no new tokens; its range may then lie behind the last of them.
    let rows = (0..segments.len()).filter(|&row| !segments[row].is_empty());
    let tasks = rows.flat_map(|row| (0..heads.heads).map(move |h| (row, h)));
    let tasks: Vec<(usize, usize)> = tasks.collect();
    tasks.into_par_iter().for_each_init(Vec::new, |scores, (row, head)| {
        let segment = &segments[row];
        let view = HeadView {
            q: head_of(qs, segment.start, heads.q_width(), head * heads.head_dim),
            k: head_of(keys[row], 0, heads.kv_width(), head / heads.group() * heads.head_dim),
            v: head_of(values[row], 0, heads.kv_width(), head / heads.group() * heads.head_dim),
            queries: segment.len(),
            keys: keys[row].len() / heads.kv_width(),
            head_dim: heads.head_dim,
            scale: heads.scale(),
        };
        let at = segment.start * heads.q_width() + head * heads.head_dim;
        // SAFETY: each task writes the columns of its own head in the rows of its own segment.
        unsafe { view.forward(target.at(at), heads.q_width(), |_, _| (), scores) };
    });
}

/// Queries, keys and values.
pub(crate) type Qkv<'a> = (&'a [f32], &'a [f32], &'a [f32]);

struct CausalAttention {
    heads: Heads,
    segments: Arc<[Range<usize>]>,
    /// Log-sum-exp of each query's scores, `(N, heads)`, left by the forward pass.
    lse: OnceLock<Vec<f32>>,
}

/// Attention of whole rows. `out` as q; `lse (N, heads)` gets each query's log-sum-exp.
pub(crate) fn forward(
    _isa: Isa,
    qkv: Qkv,
    heads: Heads,
    segments: &[Range<usize>],
    out: &mut [f32],
    lse: &mut [f32],
) {
    let width = heads.q_width();
    let (target, lse_target) = (Target::new(out), Target::new(lse));
    tasks(heads, segments).into_par_iter().for_each_init(Vec::new, |scores, (row, kv_head)| {
        for head in kv_head * heads.group()..(kv_head + 1) * heads.group() {
            let at = row.start * width + head * heads.head_dim;
            let keep = |query: usize, value: f32| {
                let at = (row.start + query) * heads.heads + head;
                // SAFETY: each task writes its own heads in the rows of its own segment.
                unsafe { lse_target.at(at).slice(1)[0] = value };
            };
            // SAFETY: as above.
            unsafe {
                head_view(heads, qkv, &row, head).forward(target.at(at), width, keep, scores);
            }
        }
    });
}

/// The gradients of q, k and v, from what the forward pass left.
pub(crate) fn backward(
    _isa: Isa,
    qkv: Qkv,
    heads: Heads,
    segments: &[Range<usize>],
    (outs, lse): (&[f32], &[f32]),
    douts: &[f32],
    (dq, dk, dv): (&mut [f32], &mut [f32], &mut [f32]),
) {
    let (q_width, kv_width) = (heads.q_width(), heads.kv_width());
    dk.fill(0.0);
    dv.fill(0.0);
    let (dq_t, dk_t, dv_t) = (Target::new(dq), Target::new(dk), Target::new(dv));
    tasks(heads, segments).into_par_iter().for_each_init(
        Scratch::default,
        |scratch, (row, kv_head)| {
            let kv_at = row.start * kv_width + kv_head * heads.head_dim;
            for head in kv_head * heads.group()..(kv_head + 1) * heads.group() {
                let at = row.start * q_width + head * heads.head_dim;
                let gradients = Gradients {
                    out: head_of(outs, row.start, q_width, head * heads.head_dim),
                    dout: head_of(douts, row.start, q_width, head * heads.head_dim),
                    lse: Mat {
                        values: &lse[row.start * heads.heads + head..],
                        row_stride: heads.heads,
                        col_stride: 1,
                    },
                    dq: (dq_t.at(at), q_width),
                    dk: (dk_t.at(kv_at), kv_width),
                    dv: (dv_t.at(kv_at), kv_width),
                };
                // SAFETY: each task writes the heads of one key head in the rows of one segment.
                unsafe { head_view(heads, qkv, &row, head).backward(gradients, scratch) };
            }
        },
    );
}

/// One task per row and key head: the query heads of a group add to the same `dk` and `dv`.
fn tasks(heads: Heads, segments: &[Range<usize>]) -> Vec<(Range<usize>, usize)> {
    let rows = segments.iter().filter(|row| !row.is_empty());
    rows.flat_map(|row| (0..heads.kv_heads).map(move |h| (row.clone(), h))).collect()
}

fn head_view<'a>(
    heads: Heads,
    (q, k, v): Qkv<'a>,
    row: &Range<usize>,
    head: usize,
) -> HeadView<'a> {
    let Heads { head_dim, .. } = heads;
    let kv_at = head / heads.group() * head_dim;
    HeadView {
        q: head_of(q, row.start, heads.q_width(), head * head_dim),
        k: head_of(k, row.start, heads.kv_width(), kv_at),
        v: head_of(v, row.start, heads.kv_width(), kv_at),
        queries: row.len(),
        keys: row.len(),
        head_dim,
        scale: heads.scale(),
    }
}

impl CustomOp3 for CausalAttention {
    fn name(&self) -> &'static str {
        "causal_attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let qkv = (values(q, q_layout)?, values(k, k_layout)?, values(v, v_layout)?);
        let mut out = vec![0f32; qkv.0.len()];
        let mut lse = vec![0f32; qkv.0.len() / self.heads.q_width() * self.heads.heads];
        forward(Isa::current(), qkv, self.heads, &self.segments, &mut out, &mut lse);
        // A tape runs an op's forward once; were it run again, the values would be the same.
        let _ = self.lse.set(lse);
        Ok((CpuStorage::F32(out), q_layout.shape().clone()))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        out: &Tensor,
        dout: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let dout = dout.contiguous()?;
        let (qs, ks, vs) = (Values::of(q)?, Values::of(k)?, Values::of(v)?);
        let (outs, douts) = (Values::of(out)?, Values::of(&dout)?);
        let (qkv, outs, douts) = ((&*qs, &*ks, &*vs), &*outs, &*douts);
        let lse = self.lse.get().expect("the forward pass came first");
        let heads = self.heads;
        let mut dq = vec![0f32; qkv.0.len()];
        let (mut dk, mut dv) = (vec![0f32; qkv.1.len()], vec![0f32; qkv.2.len()]);
        backward(
            Isa::current(),
            qkv,
            heads,
            &self.segments,
            (outs, lse),
            douts,
            (&mut dq, &mut dk, &mut dv),
        );
        let tensor = |values, like: &Tensor| Tensor::from_vec(values, like.shape(), like.device());
        Ok((Some(tensor(dq, q)?), Some(tensor(dk, k)?), Some(tensor(dv, v)?)))
    }
}

fn head_of(values: &[f32], row: usize, width: usize, column: usize) -> Mat<'_> {
    Mat::rows(&values[(row * width + column).min(values.len())..], width)
}

/// One query head of one row. Query `i` sees keys `0..=keys - queries + i`.
struct HeadView<'a> {
    q: Mat<'a>,
    k: Mat<'a>,
    v: Mat<'a>,
    queries: usize,
    keys: usize,
    head_dim: usize,
    scale: f32,
}

struct Gradients<'a> {
    out: Mat<'a>,
    dout: Mat<'a>,
    lse: Mat<'a>,
    dq: (Target, usize),
    dk: (Target, usize),
    dv: (Target, usize),
}

#[derive(Default)]
struct Scratch {
    weights: Vec<f32>,
    dweights: Vec<f32>,
}

impl HeadView<'_> {
    /// Blocks of queries, each with the number of keys its last query sees.
    fn blocks(&self) -> impl Iterator<Item = (Range<usize>, usize)> {
        let (queries, before) = (self.queries, self.keys - self.queries);
        (0..queries).step_by(BLOCK).map(move |start| {
            let end = queries.min(start + BLOCK);
            (start..end, before + end)
        })
    }

    fn visible(&self, query: usize) -> usize {
        self.keys - self.queries + query + 1
    }

    /// `scores (block, seen) = q · kᵀ`, unscaled.
    fn scores(&self, block: &Range<usize>, seen: usize, scores: &mut Vec<f32>) {
        scores.resize(block.len() * seen, 0.0);
        let size = (block.len(), seen, self.head_dim);
        // SAFETY: the buffer is this thread's.
        unsafe {
            gemm(size, Target::new(scores), seen, false, rows_from(self.q, block.start), self.k.t())
        };
    }

    /// Writes the head's output and hands each query's log-sum-exp to `keep`.
    ///
    /// # Safety
    /// No other thread may touch the head's elements of `out`.
    unsafe fn forward(
        &self,
        out: Target,
        out_stride: usize,
        keep: impl Fn(usize, f32),
        scores: &mut Vec<f32>,
    ) {
        for (block, seen) in self.blocks() {
            self.scores(&block, seen, scores);
            for (query, row) in block.clone().zip(scores.chunks_exact_mut(seen)) {
                let (row, hidden) = row.split_at_mut(self.visible(query));
                let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let mut sum = 0f32;
                for s in row.iter_mut() {
                    *s = exp((*s - max) * self.scale);
                    sum += *s;
                }
                for s in row.iter_mut() {
                    *s /= sum;
                }
                hidden.fill(0.0);
                keep(query, max * self.scale + sum.ln());
            }
            let size = (block.len(), self.head_dim, seen);
            let weights = Mat::rows(scores, seen);
            // SAFETY: the caller's promise.
            unsafe {
                gemm(size, out.at(block.start * out_stride), out_stride, false, weights, self.v)
            };
        }
    }

    /// With weights `p` and `dp = dout · vᵀ`: `ds = p (dp - Σ dout · out)`, then
    /// `dv += pᵀ · dout`, `dq = ds · k`, `dk += dsᵀ · q`, the last two scaled.
    ///
    /// # Safety
    /// No other thread may touch the head's elements of `dq`, `dk` and `dv`.
    unsafe fn backward(&self, g: Gradients, scratch: &mut Scratch) {
        let Scratch { weights, dweights } = scratch;
        let head_dim = self.head_dim;
        for (block, seen) in self.blocks() {
            self.scores(&block, seen, weights);
            for (query, row) in block.clone().zip(weights.chunks_exact_mut(seen)) {
                let lse = g.lse.values[query * g.lse.row_stride];
                let (row, hidden) = row.split_at_mut(self.visible(query));
                for s in row {
                    *s = exp(*s * self.scale - lse);
                }
                hidden.fill(0.0);
            }
            let dout = rows_from(g.dout, block.start);
            let out = rows_from(g.out, block.start);
            dweights.resize(block.len() * seen, 0.0);
            let p = Mat::rows(weights, seen);
            // SAFETY: the buffer is this thread's; dv by the caller's promise.
            unsafe {
                let size = (block.len(), seen, head_dim);
                gemm(size, Target::new(dweights), seen, false, dout, self.v.t());
                gemm((seen, head_dim, block.len()), g.dv.0, g.dv.1, true, p.t(), dout);
            }
            let rows = dweights.chunks_exact_mut(seen).zip(weights.chunks_exact(seen));
            for (i, (ds, p)) in rows.enumerate() {
                let row = |m: Mat| i * m.row_stride..i * m.row_stride + head_dim;
                let products = dout.values[row(dout)].iter().zip(&out.values[row(out)]);
                let mean: f32 = products.map(|(a, b)| a * b).sum();
                for (ds, p) in ds.iter_mut().zip(p) {
                    *ds = p * (*ds - mean) * self.scale;
                }
            }
            let ds = Mat::rows(dweights, seen);
            // SAFETY: the caller's promise.
            unsafe {
                let at = g.dq.0.at(block.start * g.dq.1);
                gemm((block.len(), head_dim, seen), at, g.dq.1, false, ds, self.k);
                let q = rows_from(self.q, block.start);
                gemm((seen, head_dim, block.len()), g.dk.0, g.dk.1, true, ds.t(), q);
            }
        }
    }
}

fn rows_from(m: Mat, first: usize) -> Mat {
    Mat { values: &m.values[first * m.row_stride..], ..m }
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init)] // a batch of one row is one range
mod tests {
    use super::super::testing::{finite_differences, normal, parity, relative_error};
    use super::*;

    fn cached(
        q: &Tensor,
        keys: &[&[f32]],
        values: &[&[f32]],
        heads: Heads,
        segments: &[Range<usize>],
    ) -> Tensor {
        let mut out = vec![0f32; q.elem_count()];
        attend_to_cache(&Values::of(q).unwrap(), keys, values, heads, segments, &mut out);
        Tensor::from_vec(out, q.shape(), q.device()).unwrap()
    }

    fn inputs(n: usize, heads: Heads) -> [Tensor; 3] {
        [
            normal(1, &[n, heads.q_width()]),
            normal(2, &[n, heads.kv_width()]),
            normal(3, &[n, heads.kv_width()]),
        ]
    }

    #[test]
    fn parity_over_packed_rows_and_grouped_heads() {
        let cases: [(Heads, &[Range<usize>]); 4] = [
            (Heads { heads: 4, kv_heads: 2, head_dim: 16 }, &[0..5, 5..6, 6..30]),
            (Heads { heads: 3, kv_heads: 1, head_dim: 8 }, &[0..130]),
            (Heads { heads: 2, kv_heads: 2, head_dim: 12 }, &[0..64, 64..64, 64..193]),
            (Heads { heads: 1, kv_heads: 1, head_dim: 4 }, &[0..1]),
        ];
        for (heads, segments) in cases {
            let segments: Arc<[Range<usize>]> = segments.into();
            let inputs = inputs(segments.last().unwrap().end, heads);
            let run = |compute| {
                let segments = segments.clone();
                move |t: &[Tensor]| causal_attention(&t[0], &t[1], &t[2], heads, &segments, compute)
            };
            parity(&inputs, run(Compute::F32), run(Compute::Portable));
        }
    }

    #[test]
    fn gradients_agree_with_differences() {
        let heads = Heads { heads: 4, kv_heads: 2, head_dim: 8 };
        let segments: Arc<[Range<usize>]> = [0..7, 7..20].into();
        finite_differences(&inputs(20, heads), |t| {
            causal_attention(&t[0], &t[1], &t[2], heads, &segments, Compute::F32)
        });
    }

    #[test]
    fn changing_one_row_leaves_its_neighbours_bit_equal() {
        let heads = Heads { heads: 2, kv_heads: 1, head_dim: 8 };
        let segments: Arc<[Range<usize>]> = [0..70, 70..90, 90..100].into();
        let [q, k, v] = inputs(100, heads);
        let other = normal(9, &[20, heads.kv_width()]);
        let changed = k.slice_assign(&[70..90, 0..heads.kv_width()], &other).unwrap();
        let run = |k: &Tensor| {
            let y = causal_attention(&q, k, &v, heads, &segments, Compute::F32).unwrap();
            y.to_vec2::<f32>().unwrap()
        };
        let (before, after) = (run(&k), run(&changed));
        assert_eq!(before[..70], after[..70]);
        assert_eq!(before[90..], after[90..]);
        assert_ne!(before[70..90], after[70..90]);
    }

    #[test]
    fn the_cache_gives_what_the_whole_row_gives() {
        let heads = Heads { heads: 4, kv_heads: 2, head_dim: 8 };
        let [q, k, v] = inputs(80, heads);
        let whole = causal_attention(&q, &k, &v, heads, &[0..80].into(), Compute::F32).unwrap();
        for new in [1, 3, 80] {
            let (k, v) = (Values::of(&k).unwrap(), Values::of(&v).unwrap());
            let q = q.narrow(0, 80 - new, new).unwrap();
            let y = cached(&q, &[&k], &[&v], heads, &[0..new]);
            let error = relative_error(&y, &whole.narrow(0, 80 - new, new).unwrap());
            assert!(error < 1e-6, "{new} new tokens differ by {error:e}");
            // A row without new tokens behind it.
            let keys: [&[f32]; 2] = [&k, &k];
            let with = cached(&q, &keys, &[&v, &v], heads, &[0..new, new..new]);
            assert_eq!(with.to_vec2::<f32>().unwrap(), y.to_vec2::<f32>().unwrap());
        }
    }

    #[test]
    fn segments_must_part_the_tokens() {
        let heads = Heads { heads: 1, kv_heads: 1, head_dim: 4 };
        let [q, k, v] = inputs(6, heads);
        for segments in [vec![0..5], vec![0..3, 4..6], vec![0..7]] {
            let segments: Arc<[Range<usize>]> = segments.into();
            assert!(causal_attention(&q, &k, &v, heads, &segments, Compute::F32).is_err());
        }
    }
}
