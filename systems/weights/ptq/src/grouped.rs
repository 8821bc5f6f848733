//! Linear layers whose weights alone are quantised: four bits each, with a scale for every few neighbours of a row, on inputs
//! that stay floats. Memory holds the packed weights; some rows at a time become floats while they are multiplied.

use kiln_ops::gemm::Out;
use kiln_ops::quantised::pack_nibbles;
use kiln_ops::{Mat, gemm};
use rayon::prelude::*;

use crate::unit::{Unit, Weights};

/// Rows of weights that are floats at once.
const ROWS_AT_ONCE: usize = 32;

/// Weights `[outputs, inner]` with a scale for every `group` of a row.
#[derive(Debug, Clone, PartialEq)]
pub struct Grouped {
    /// Two weights in a byte, the first in the low half.
    packed: Vec<u8>,
    /// `[outputs, inner / group]`
    scales: Vec<f32>,
    bias: Vec<f32>,
    inner: usize,
    group: usize,
}

impl Grouped {
    /// Whether a unit's rows are whole groups, each of whole bytes.
    pub fn fits(inner: usize, group: usize) -> bool {
        group > 0 && group.is_multiple_of(2) && inner.is_multiple_of(group)
    }

    /// Packs the weights of a linear layer; a group may be a whole row.
    ///
    /// # Panics
    /// When the weights have more than four bits.
    pub fn new(unit: &Unit, weights: &Weights, bias: Vec<f32>) -> Self {
        let (inner, group) = (unit.shape[1], weights.width());
        Self { packed: pack_nibbles(&weights.q, inner), scales: weights.scales.clone(), bias, inner, group }
    }

    /// `x Wᵀ + b` for rows `x`, `[rows, inner]`.
    pub fn multiply(&self, x: &[f32]) -> Vec<f32> {
        let (rows, outputs) = (x.len() / self.inner, self.bias.len());
        let parts: Vec<Vec<f32>> = (0..outputs)
            .into_par_iter()
            .step_by(ROWS_AT_ONCE)
            .map(|first| {
                let count = ROWS_AT_ONCE.min(outputs - first);
                let weights = self.floats(first, count);
                let mut part: Vec<f32> =
                    (0..rows).flat_map(|_| &self.bias[first..first + count]).copied().collect();
                let (x, w) = (Mat::new(x, rows, self.inner), Mat::new(&weights, count, self.inner));
                gemm(&mut part, count, Out::Add, x, w.t());
                part
            })
            .collect();
        let mut y = vec![0.0; rows * outputs];
        for (part, first) in parts.iter().zip((0..outputs).step_by(ROWS_AT_ONCE)) {
            let count = ROWS_AT_ONCE.min(outputs - first);
            for (y, part) in y.chunks_mut(outputs).zip(part.chunks(count)) {
                y[first..first + count].copy_from_slice(part);
            }
        }
        y
    }

    /// Some rows of weights as floats, `[count, inner]`.
    fn floats(&self, first: usize, count: usize) -> Vec<f32> {
        let width = self.inner.div_ceil(2);
        let groups = self.inner.div_ceil(self.group);
        let mut floats = vec![0.0; count * self.inner];
        let rows =
            self.packed[first * width..].chunks(width).zip(self.scales[first * groups..].chunks(groups));
        for (row, (packed, scales)) in floats.chunks_mut(self.inner).zip(rows) {
            kiln_ops::simd(
                #[inline(always)]
                || {
                    for (pair, &byte) in row.chunks_mut(2).zip(packed) {
                        pair[0] = f32::from((byte << 4) as i8 >> 4);
                        if let Some(high) = pair.get_mut(1) {
                            *high = f32::from(byte as i8 >> 4);
                        }
                    }
                    for (part, scale) in row.chunks_mut(self.group).zip(scales) {
                        part.iter_mut().for_each(|w| *w *= scale);
                    }
                },
            );
        }
        floats
    }
}
