//! The search for scales, over blocks whose sizes are known at compile time.
//!
//! Sums are computed in eight lanes, so that they vectorize and have the same bits on every ISA level.

use half::f16;

/// Below this all values of a block are zero.
const TINY: f32 = 1e-15;

/// 1.5 · 2²³: adding and subtracting it rounds to an integer.
const MAGIC: f32 = 12_582_912.0;

/// Number of refits of scales to the resulting integers.
const REFITS: usize = 3;

/// The nearest integer within bounds, ties to even.
#[inline(always)]
fn nearest(v: f32, low: f32, high: f32) -> f32 {
    (v.max(low).min(high) + MAGIC) - MAGIC
}

#[inline(always)]
fn inverse(v: f32) -> f32 {
    if v == 0.0 { 0.0 } else { 1.0 / v }
}

#[inline(always)]
fn sum(lanes: [f32; 8]) -> f32 {
    let [a, b, c, d, e, f, g, h] = lanes;
    ((a + e) + (b + f)) + ((c + g) + (d + h))
}

#[inline(always)]
fn rounded(v: f32) -> f32 {
    f16::from_f32(v).to_f32()
}

/// The value with the largest magnitude.
#[inline(always)]
pub fn top(x: &[f32]) -> f32 {
    x.iter().fold(0.0, |top: f32, &v| if v.abs() > top.abs() { v } else { top })
}

/// The integers `q` nearest to `(x - min) / scale`, and `Σ w (scale · q + min - x)²`.
#[inline(always)]
fn quants<const N: usize>(
    x: &[f32; N],
    w: &[f32; N],
    (scale, min): (f32, f32),
    (low, high): (f32, f32),
    q: &mut [f32; N],
) -> f32 {
    let inverse = inverse(scale);
    let mut error = [0f32; 8];
    for i in (0..N).step_by(8) {
        for lane in 0..8 {
            let (x, w) = (x[i + lane], w[i + lane]);
            let l = nearest((x - min) * inverse, low, high);
            q[i + lane] = l;
            let off = scale * l + min - x;
            error[lane] += w * off * off;
        }
    }
    sum(error)
}

/// The sums for least squares: `Σ w q x`, `Σ w q²`, `Σ w q` for the `q` of an inverse scale.
#[inline(always)]
fn moments<const N: usize>(
    x: &[f32; N],
    w: &[f32; N],
    (inverse, min): (f32, f32),
    (low, high): (f32, f32),
) -> (f32, f32, f32) {
    let (mut qx, mut qq, mut q1) = ([0f32; 8], [0f32; 8], [0f32; 8]);
    for i in (0..N).step_by(8) {
        for lane in 0..8 {
            let (x, w) = (x[i + lane], w[i + lane]);
            let l = nearest((x - min) * inverse, low, high);
            qx[lane] += w * l * x;
            qq[lane] += w * l * l;
            q1[lane] += w * l;
        }
    }
    (sum(qx), sum(qq), sum(q1))
}

/// The best `scale` of `x ≈ scale · q`, `q` within bounds, of the least squares fits to the `q`
/// that each inverse scale gives.
#[inline(always)]
pub fn scale<const N: usize>(
    x: &[f32; N],
    w: &[f32; N],
    bounds: (f32, f32),
    inverses: impl Iterator<Item = f32>,
) -> f32 {
    let (mut best, mut gain) = (0.0, 0.0);
    for inverse in inverses {
        let (qx, qq, _) = moments(x, w, (inverse, 0.0), bounds);
        if qq > 0.0 && qx * qx > gain * qq {
            gain = qx * qx / qq;
            best = qx / qq;
        }
    }
    best
}

/// Inverse scales that bring `top` near an end of `[low, high]`, `low = -high - 1`: near the lower
/// one, which has room for one more, and near the upper one.
#[inline(always)]
pub fn both_ends(top: f32, low: f32) -> impl Iterator<Item = f32> {
    let lower = (-9..=9).map(move |tenths| (low - 0.1 * tenths as f32) / top);
    let upper = (-18..=-2).map(move |tenths| (0.1 * tenths as f32 - low) / top);
    lower.chain(upper)
}

/// Inverse scales that bring `top` near `high`.
#[inline(always)]
pub fn one_end(top: f32, high: f32) -> impl Iterator<Item = f32> {
    (-9..=9).map(move |tenths| (high + 0.1 * tenths as f32) / top)
}

/// `x ≈ d · q` of one block.
#[inline(always)]
pub fn symmetric<const N: usize>(
    x: &[f32; N],
    w: &[f32; N],
    bounds: (f32, f32),
    inverses: impl Iterator<Item = f32>,
    plain: f32,
    q: &mut [f32; N],
) -> f32 {
    // The scale without a search is tried first.
    let mut best = rounded(plain);
    let mut error = quants(x, w, (best, 0.0), bounds, q);
    let mut d = scale(x, w, bounds, inverses);
    let mut trial = [0f32; N];
    for _ in 0..REFITS {
        let kept = rounded(d);
        let found = quants(x, w, (kept, 0.0), bounds, &mut trial);
        if found < error {
            (best, error, *q) = (kept, found, trial);
        }
        let (qx, qq, _) = moments(x, w, (inverse(kept), 0.0), bounds);
        if qq <= 0.0 {
            break;
        }
        d = qx / qq;
    }
    best
}

/// The least squares `(scale, min)` of `x ≈ scale · q + min`, or of `scale · q` where `min` would be
/// more than `most`, from moments and `Σ w`, `Σ w x`.
#[inline(always)]
fn line((qx, qq, q1): (f32, f32, f32), (w1, wx): (f32, f32), most: f32) -> Option<(f32, f32)> {
    let determinant = w1 * qq - q1 * q1;
    if determinant <= 0.0 {
        return None;
    }
    let min = (qq * wx - q1 * qx) / determinant;
    if min > most {
        return Some(((qx - most * q1) / qq, most));
    }
    Some(((w1 * qx - wx * q1) / determinant, min))
}

/// Steps of the search for a scale with a minimum.
const LINE_STEPS: usize = 36;

/// The best `(scale, min)` of `x ≈ scale · q + min` with `q` in `[0, high]` and `min <= most`.
#[inline(always)]
pub fn scale_and_min<const N: usize>(
    x: &[f32; N],
    w: &[f32; N],
    high: f32,
    most: f32,
) -> (f32, f32) {
    let lowest = x.iter().fold(f32::INFINITY, |m, &v| m.min(v)).min(most);
    let highest = x.iter().fold(f32::NEG_INFINITY, |m, &v| m.max(v));
    if highest - lowest < TINY {
        return (0.0, lowest);
    }
    let (mut w1, mut wx) = ([0f32; 8], [0f32; 8]);
    for i in (0..N).step_by(8) {
        for lane in 0..8 {
            w1[lane] += w[i + lane];
            wx[lane] += w[i + lane] * x[i + lane];
        }
    }
    let sums = (sum(w1), sum(wx));
    let bounds = (0.0, high);
    let mut q = [0f32; N];
    let mut best = ((highest - lowest) / high, lowest);
    let mut error = quants(x, w, best, bounds, &mut q);
    for step in 0..=LINE_STEPS {
        let inverse = (high - 0.9 + 0.05 * step as f32) / (highest - lowest);
        let found = line(moments(x, w, (inverse, lowest), bounds), sums, most);
        let Some(found) = found else { continue };
        let off = quants(x, w, found, bounds, &mut q);
        if off < error {
            (best, error) = (found, off);
        }
    }
    for _ in 0..REFITS {
        let found = line(moments(x, w, (inverse(best.0), best.1), bounds), sums, most);
        let Some(found) = found else { break };
        let off = quants(x, w, found, bounds, &mut q);
        if off >= error {
            break;
        }
        (best, error) = (found, off);
    }
    best
}

/// `x ≈ d · q + m` of one block; the scale and minimum without a search are tried too.
#[inline(always)]
pub fn affine<const N: usize>(
    x: &[f32; N],
    w: &[f32; N],
    high: f32,
    q: &mut [f32; N],
) -> (f32, f32) {
    let lowest = x.iter().fold(f32::INFINITY, |m, &v| m.min(v));
    let highest = x.iter().fold(f32::NEG_INFINITY, |m, &v| m.max(v));
    let plain = ((highest - lowest) / high, lowest);
    let mut best = (rounded(plain.0), rounded(plain.1));
    let mut error = quants(x, w, best, (0.0, high), q);
    let found = scale_and_min(x, w, high, f32::INFINITY);
    let found = (rounded(found.0), rounded(found.1));
    let mut trial = [0f32; N];
    if quants(x, w, found, (0.0, high), &mut trial) < error {
        error = quants(x, w, found, (0.0, high), q);
        best = found;
    }
    debug_assert!(error.is_finite());
    best
}

/// A K-quant block: `S` runs of `N` values, run `j` is `d · scales[j] · q - dmin · mins[j]`.
pub struct KBlock<const N: usize, const S: usize> {
    pub d: f32,
    pub dmin: f32,
    pub scales: [f32; S],
    pub mins: [f32; S],
    pub q: [[f32; N]; S],
}

impl<const N: usize, const S: usize> KBlock<N, S> {
    pub const ZERO: Self =
        Self { d: 0.0, dmin: 0.0, scales: [0.0; S], mins: [0.0; S], q: [[0.0; N]; S] };
}

/// Ranges of a K-quant's integers.
#[derive(Clone, Copy)]
pub struct KBounds {
    pub q: (f32, f32),
    pub scale: (f32, f32),
    /// Maximum of minima, from 0; `None` if the type has no minima.
    pub min: Option<f32>,
}

/// Rounds of choosing the runs' integers and refitting `d` and `dmin` to them.
const ROUNDS: usize = 4;

/// The best block found for the runs of `x`.
#[inline(always)]
pub fn k_block<const N: usize, const S: usize>(
    x: &[[f32; N]; S],
    w: &[[f32; N]; S],
    bounds: KBounds,
) -> KBlock<N, S> {
    let (mut scales, mut mins, mut weights) = ([0f32; S], [0f32; S], [0f32; S]);
    for j in 0..S {
        match bounds.min {
            Some(_) => {
                let (scale, min) = scale_and_min(&x[j], &w[j], bounds.q.1, 0.0);
                (scales[j], mins[j]) = (scale, -min);
            }
            None => {
                let top = top(&x[j]);
                if top.abs() > TINY {
                    scales[j] = scale(&x[j], &w[j], bounds.q, both_ends(top, bounds.q.0));
                }
            }
        }
        weights[j] = w[j].iter().sum();
    }

    // Two initial values: the largest scale at the end of its range, and the least squares scale.
    let (largest, most) = (top(&scales), top(&mins));
    if largest.abs() < TINY && most < TINY {
        return KBlock::ZERO;
    }
    let end = if bounds.min.is_some() { bounds.scale.1 } else { bounds.scale.0 };
    let plain = (largest / end, bounds.min.map_or(0.0, |high| most / high));
    let mut fitted = plain;
    if largest.abs() > TINY {
        fitted.0 = match bounds.min {
            Some(_) => scale(&scales, &weights, bounds.scale, one_end(largest, bounds.scale.1)),
            None => scale(&scales, &weights, bounds.scale, both_ends(largest, bounds.scale.0)),
        };
    }
    if let Some(high) = bounds.min.filter(|_| most > TINY) {
        fitted.1 = scale(&mins, &weights, (0.0, high), one_end(most, high));
    }

    let mut best = KBlock::ZERO;
    let mut error = f32::INFINITY;
    for begin in [plain, fitted] {
        let mut block = KBlock::ZERO;
        let mut wanted = begin;
        for round in 0..ROUNDS {
            (block.d, block.dmin) = (rounded(wanted.0), rounded(wanted.1));
            if round == 0 {
                let (d, dmin) = (inverse(block.d), inverse(block.dmin));
                for j in 0..S {
                    block.scales[j] = nearest(scales[j] * d, bounds.scale.0, bounds.scale.1);
                    block.mins[j] = nearest(mins[j] * dmin, 0.0, bounds.min.unwrap_or(0.0));
                }
            }
            let off = choose(x, w, bounds, &mut block);
            if off < error {
                error = off;
                best = KBlock { q: block.q, ..block };
            }
            match refit(x, w, &block) {
                Some(found) if found != wanted => wanted = found,
                _ => break,
            }
        }
    }
    best
}

/// Chooses for each run the best integers around the current ones; returns the total error.
#[inline(always)]
fn choose<const N: usize, const S: usize>(
    x: &[[f32; N]; S],
    w: &[[f32; N]; S],
    bounds: KBounds,
    block: &mut KBlock<N, S>,
) -> f32 {
    let mut error = 0.0;
    let mut q = [0f32; N];
    for j in 0..S {
        let (scale, min) = (block.scales[j], block.mins[j]);
        let mut least = f32::INFINITY;
        for by in [0.0, -1.0, 1.0] {
            let scale = scale + by;
            if scale < bounds.scale.0 || scale > bounds.scale.1 {
                continue;
            }
            for by in [0.0, -1.0, 1.0] {
                let min = min + by;
                if min < 0.0 || min > bounds.min.unwrap_or(0.0) {
                    continue;
                }
                // The same order of operations as in dequantization: products first.
                let of = (block.d * scale, -(block.dmin * min));
                let off = quants(&x[j], &w[j], of, bounds.q, &mut q);
                if off < least {
                    least = off;
                    (block.scales[j], block.mins[j], block.q[j]) = (scale, min, q);
                }
            }
        }
        error += least;
    }
    error
}

/// The least squares `(d, dmin)` for the integers of a block.
#[inline(always)]
fn refit<const N: usize, const S: usize>(
    x: &[[f32; N]; S],
    w: &[[f32; N]; S],
    block: &KBlock<N, S>,
) -> Option<(f32, f32)> {
    // x ≈ d · a - dmin · b with a = scale · q and b = min.
    let (mut aa, mut ab, mut bb, mut ax, mut bx) = (0f64, 0f64, 0f64, 0f64, 0f64);
    for j in 0..S {
        let (mut qq, mut q1, mut w1, mut qx, mut wx) =
            ([0f32; 8], [0f32; 8], [0f32; 8], [0f32; 8], [0f32; 8]);
        for i in (0..N).step_by(8) {
            for lane in 0..8 {
                let (x, w, q) = (x[j][i + lane], w[j][i + lane], block.q[j][i + lane]);
                qq[lane] += w * q * q;
                q1[lane] += w * q;
                w1[lane] += w;
                qx[lane] += w * q * x;
                wx[lane] += w * x;
            }
        }
        let (scale, min) = (f64::from(block.scales[j]), f64::from(block.mins[j]));
        aa += scale * scale * f64::from(sum(qq));
        ab += scale * min * f64::from(sum(q1));
        bb += min * min * f64::from(sum(w1));
        ax += scale * f64::from(sum(qx));
        bx += min * f64::from(sum(wx));
    }
    let determinant = aa * bb - ab * ab;
    if bb > 0.0 && determinant > 1e-9 * aa * bb {
        let (d, dmin) = (ax * bb - ab * bx, ab * ax - aa * bx);
        return Some(((d / determinant) as f32, (dmin / determinant) as f32));
    }
    // No minima, or minima proportional to the scales.
    (aa > 0.0).then(|| (((ax + f64::from(block.dmin) * ab) / aa) as f32, block.dmin))
}
