//! Quantizes a block: fits its scales, and packs its integers in the layout of `blocks.rs`.

use half::{bf16, f16};

use super::fit::{KBlock, KBounds, affine, both_ends, k_block, one_end, symmetric, top};

#[inline(always)]
pub fn f32_value(x: &[f32; 1], _: &[f32; 1], b: &mut [u8; 4]) {
    *b = x[0].to_le_bytes();
}

#[inline(always)]
pub fn f16_value(x: &[f32; 1], _: &[f32; 1], b: &mut [u8; 2]) {
    *b = f16::from_f32(x[0]).to_le_bytes();
}

#[inline(always)]
pub fn bf16_value(x: &[f32; 1], _: &[f32; 1], b: &mut [u8; 2]) {
    *b = bf16::from_f32(x[0]).to_le_bytes();
}

/// Stores a value that is exact in `f16`.
#[inline(always)]
fn put(b: &mut [u8], at: usize, v: f32) {
    b[at..at + 2].copy_from_slice(&f16::from_f32(v).to_le_bytes());
}

#[inline(always)]
pub fn q4_0(x: &[f32; 32], w: &[f32; 32], b: &mut [u8; 18]) {
    let mut q = [0f32; 32];
    let top = top(x);
    let d = symmetric(x, w, (-8.0, 7.0), both_ends(top, -8.0), top / -8.0, &mut q);
    put(b, 0, d);
    for j in 0..16 {
        b[2 + j] = (q[j] + 8.0) as u8 | ((q[j + 16] + 8.0) as u8) << 4;
    }
}

#[inline(always)]
pub fn q4_1(x: &[f32; 32], w: &[f32; 32], b: &mut [u8; 20]) {
    let mut q = [0f32; 32];
    let (d, m) = affine(x, w, 15.0, &mut q);
    put(b, 0, d);
    put(b, 2, m);
    for j in 0..16 {
        b[4 + j] = q[j] as u8 | (q[j + 16] as u8) << 4;
    }
}

/// Nibbles and fifth bits of 32 values below 32.
#[inline(always)]
fn five_bits(q: &[f32; 32], high: &mut [u8], nibbles: &mut [u8]) {
    let mut bits = 0u32;
    for j in 0..16 {
        let (first, second) = (q[j] as u32, q[j + 16] as u32);
        nibbles[j] = (first & 15 | (second & 15) << 4) as u8;
        bits |= (first >> 4) << j | (second >> 4) << (j + 16);
    }
    high.copy_from_slice(&bits.to_le_bytes());
}

#[inline(always)]
pub fn q5_0(x: &[f32; 32], w: &[f32; 32], b: &mut [u8; 22]) {
    let mut q = [0f32; 32];
    let top = top(x);
    let d = symmetric(x, w, (-16.0, 15.0), both_ends(top, -16.0), top / -16.0, &mut q);
    put(b, 0, d);
    let (high, nibbles) = b[2..].split_at_mut(4);
    five_bits(&q.map(|q| q + 16.0), high, nibbles);
}

#[inline(always)]
pub fn q5_1(x: &[f32; 32], w: &[f32; 32], b: &mut [u8; 24]) {
    let mut q = [0f32; 32];
    let (d, m) = affine(x, w, 31.0, &mut q);
    put(b, 0, d);
    put(b, 2, m);
    let (high, nibbles) = b[4..].split_at_mut(4);
    five_bits(&q, high, nibbles);
}

/// -128 is not used, because products of signed bytes assume 7-bit magnitudes.
#[inline(always)]
pub fn q8_0(x: &[f32; 32], w: &[f32; 32], b: &mut [u8; 34]) {
    let mut q = [0f32; 32];
    let top = top(x).abs();
    let d = symmetric(x, w, (-127.0, 127.0), one_end(top, 127.0), top / 127.0, &mut q);
    put(b, 0, d);
    for j in 0..32 {
        b[2 + j] = q[j] as i8 as u8;
    }
}

/// The runs of a block.
#[inline(always)]
fn runs<const N: usize, const S: usize>(x: &[f32; 256]) -> &[[f32; N]; S] {
    x.as_chunks::<N>().0.try_into().expect("N · S is 256")
}

/// Packs run `i` of 16 two-bit values; four runs share 16 bytes.
#[inline(always)]
fn put_two_bits(b: &mut [u8], i: usize, q: &[u8; 16]) {
    let (stretch, shift) = (&mut b[32 * (i / 8) + 16 * (i % 2)..][..16], i % 8 / 2 * 2);
    for j in 0..16 {
        stretch[j] |= (q[j] & 3) << shift;
    }
}

#[inline(always)]
pub fn q2_k(x: &[f32; 256], w: &[f32; 256], b: &mut [u8; 84]) {
    let bounds = KBounds { q: (0.0, 3.0), scale: (0.0, 15.0), min: Some(15.0) };
    let block: KBlock<16, 16> = k_block(runs(x), runs(w), bounds);
    b.fill(0);
    put(b, 80, block.d);
    put(b, 82, block.dmin);
    for i in 0..16 {
        b[i] = block.scales[i] as u8 | (block.mins[i] as u8) << 4;
        put_two_bits(&mut b[16..80], i, &block.q[i].map(|q| q as u8));
    }
}

#[inline(always)]
pub fn q3_k(x: &[f32; 256], w: &[f32; 256], b: &mut [u8; 110]) {
    let bounds = KBounds { q: (-4.0, 3.0), scale: (-32.0, 31.0), min: None };
    let block: KBlock<16, 16> = k_block(runs(x), runs(w), bounds);
    b.fill(0);
    put(b, 108, block.d);
    for i in 0..16 {
        let scale = (block.scales[i] + 32.0) as u8;
        b[96 + i % 8] |= (scale & 15) << (4 * (i / 8));
        b[104 + i % 4] |= (scale >> 4) << (2 * (i / 4));
        let q = block.q[i].map(|q| (q + 4.0) as u8);
        put_two_bits(&mut b[32..96], i, &q);
        let high = &mut b[16 * (i % 2)..][..16];
        for j in 0..16 {
            high[j] |= (q[j] >> 2) << (i / 2);
        }
    }
}

/// Packs 8 pairs of 6 bits into 12 bytes.
#[inline(always)]
fn put_scales_and_mins(b: &mut [u8], block: &KBlock<32, 8>) {
    for i in 0..8 {
        let (scale, min) = (block.scales[i] as u8, block.mins[i] as u8);
        if i < 4 {
            b[i] |= scale;
            b[i + 4] |= min;
        } else {
            b[i + 4] |= scale & 15 | min << 4;
            b[i - 4] |= scale >> 4 << 6;
            b[i] |= min >> 4 << 6;
        }
    }
}

#[inline(always)]
pub fn q4_k(x: &[f32; 256], w: &[f32; 256], b: &mut [u8; 144]) {
    let bounds = KBounds { q: (0.0, 15.0), scale: (0.0, 63.0), min: Some(63.0) };
    let block = k_block(runs(x), runs(w), bounds);
    b.fill(0);
    put(b, 0, block.d);
    put(b, 2, block.dmin);
    put_scales_and_mins(&mut b[4..16], &block);
    for i in 0..8 {
        let (nibbles, shift) = (&mut b[16 + 32 * (i / 2)..][..32], 4 * (i % 2));
        for (nibble, q) in nibbles.iter_mut().zip(&block.q[i]) {
            *nibble |= (*q as u8) << shift;
        }
    }
}

#[inline(always)]
pub fn q5_k(x: &[f32; 256], w: &[f32; 256], b: &mut [u8; 176]) {
    let bounds = KBounds { q: (0.0, 31.0), scale: (0.0, 63.0), min: Some(63.0) };
    let block = k_block(runs(x), runs(w), bounds);
    b.fill(0);
    put(b, 0, block.d);
    put(b, 2, block.dmin);
    put_scales_and_mins(&mut b[4..16], &block);
    let (high, nibbles) = b[16..].split_at_mut(32);
    for i in 0..8 {
        let (nibbles, shift) = (&mut nibbles[32 * (i / 2)..][..32], 4 * (i % 2));
        for j in 0..32 {
            let q = block.q[i][j] as u8;
            nibbles[j] |= (q & 15) << shift;
            high[j] |= (q >> 4) << i;
        }
    }
}

#[inline(always)]
pub fn q6_k(x: &[f32; 256], w: &[f32; 256], b: &mut [u8; 210]) {
    let bounds = KBounds { q: (-32.0, 31.0), scale: (-128.0, 127.0), min: None };
    let block: KBlock<16, 16> = k_block(runs(x), runs(w), bounds);
    b.fill(0);
    put(b, 208, block.d);
    for i in 0..16 {
        b[192 + i] = block.scales[i] as i8 as u8;
        let (of_half, k, stretch) = (i / 8, i % 8 / 2, i % 2);
        let q = block.q[i].map(|q| (q + 32.0) as u8);
        let low = &mut b[64 * of_half + 32 * (k % 2) + 16 * stretch..][..16];
        for j in 0..16 {
            low[j] |= (q[j] & 15) << (4 * (k / 2));
        }
        let high = &mut b[128 + 32 * of_half + 16 * stretch..][..16];
        for j in 0..16 {
            high[j] |= (q[j] >> 4) << (2 * k);
        }
    }
}
