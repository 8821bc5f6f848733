//! Between floats and bytes.

use crate::simd;

/// 1.5 · 2²³: around it floats have no fraction, and the next float is the next whole number.
const SHIFT: f32 = 12_582_912.0;

/// Rounds to the nearest whole number, halves to the even one; for sizes below 2²².
#[inline(always)]
pub fn round_even(x: f32) -> f32 {
    (x + SHIFT) - SHIFT
}

/// The same as a whole number. A cast would look for what does not fit, one number at a time.
#[inline(always)]
pub fn rounded(x: f32) -> i32 {
    (x + SHIFT).to_bits().wrapping_sub(SHIFT.to_bits()) as i32
}

/// Numbers as unsigned bytes: `x ≈ scale (q - zero)` with `q` between 0 and `most`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Affine {
    /// The difference of neighbours; above 0.
    pub scale: f32,
    /// What stands for 0.
    pub zero: u8,
    /// The largest: 255 with eight bits, 15 with four.
    pub most: u8,
}

impl Affine {
    /// `clamp(round(x / scale) + zero, 0, most)` of every number; NaN becomes the least.
    ///
    /// # Panics
    /// When `q` is shorter than `x`.
    pub fn quantise_into(&self, x: &[f32], q: &mut [u8]) {
        let q = &mut q[..x.len()];
        simd(
            #[inline(always)]
            || self.bytes(x, q),
        );
    }

    /// As [`quantise_into`](Self::quantise_into), within a loop that is compiled for the machine already.
    #[inline(always)]
    pub(super) fn bytes(&self, x: &[f32], q: &mut [u8]) {
        let (inverse, zero) = (self.scale.recip(), f32::from(self.zero));
        let (low, high) = (-zero, f32::from(self.most) - zero);
        let zero = i32::from(self.zero);
        for (q, &x) in q.iter_mut().zip(x) {
            *q = (rounded((x * inverse).max(low).min(high)) + zero) as u8;
        }
    }

    /// As [`quantise_into`](Self::quantise_into).
    pub fn quantise(&self, x: &[f32]) -> Vec<u8> {
        let mut q = vec![0; x.len()];
        self.quantise_into(x, &mut q);
        q
    }

    /// What bytes stand for.
    pub fn floats(&self, q: &[u8]) -> Vec<f32> {
        let (scale, zero) = (self.scale, i32::from(self.zero));
        simd(
            #[inline(always)]
            || q.iter().map(|&q| scale * (i32::from(q) - zero) as f32).collect(),
        )
    }
}

/// Where results are cut off, as an activation does that follows at once.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Ends {
    /// Nothing is less.
    pub least: f32,
    /// Nothing is more.
    pub most: f32,
}

impl Ends {
    /// None.
    pub const OPEN: Self = Self { least: f32::NEG_INFINITY, most: f32::INFINITY };

    /// `max(x, 0)`.
    pub const RELU: Self = Self { least: 0.0, most: f32::INFINITY };
}

/// From sums to floats or bytes: one scale and one whole-number bias a row of weights.
#[derive(Debug, Clone, Copy)]
pub struct Requantise<'a> {
    /// Scale of the activations times that of each row of weights.
    pub scales: &'a [f32],
    /// Added to the sums, in units of the scale.
    pub bias: &'a [i32],
    /// Where results are cut off.
    pub ends: Ends,
}

impl Requantise<'_> {
    /// `scale (sum + bias)` of a row's sums where each has a scale of its own, from column `first` on.
    #[inline(always)]
    pub(super) fn columns(&self, first: usize, sums: &[i32], out: &mut [f32]) {
        let scales = &self.scales[first..][..out.len()];
        let bias = &self.bias[first..][..out.len()];
        for (((out, &sum), &scale), &bias) in out.iter_mut().zip(sums).zip(scales).zip(bias) {
            *out = (scale * sum.wrapping_add(bias) as f32).max(self.ends.least).min(self.ends.most);
        }
    }

    /// The same where all have that of row `row`.
    #[inline(always)]
    pub(super) fn row(&self, row: usize, sums: &[i32], out: &mut [f32]) {
        let (scale, bias) = (self.scales[row], self.bias[row]);
        for (out, &sum) in out.iter_mut().zip(sums) {
            *out = (scale * sum.wrapping_add(bias) as f32).max(self.ends.least).min(self.ends.most);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_go_to_the_even_neighbour_and_ends_hold() {
        let affine = Affine { scale: 0.5, zero: 3, most: 15 };
        let x = [0.0, 0.25, 0.75, -0.25, -9.0, 99.0, 1.0, f32::NEG_INFINITY];
        assert_eq!(affine.quantise(&x), [3, 3, 5, 3, 0, 15, 5, 0]);
        assert_eq!(affine.floats(&[3, 0, 15]), [0.0, -1.5, 6.0]);
        assert_eq!(affine.quantise(&[f32::NAN]), [0]);
        for x in [-128.0f32, -2.5, -1.5, -0.5, -0.0, 0.5, 1.49, 1.5, 2.5, 127.0, 4_000_000.0] {
            assert_eq!((round_even(x), rounded(x)), (x.round_ties_even(), x.round_ties_even() as i32));
        }
    }
}
