//! Rows of bytes times panels of weights.

use rayon::prelude::*;

use super::kernel::{Block, GROUP, Level, PANEL, level, multiply};
use super::{Affine, Panels, Requantise};
use crate::simd;

/// The unsigned operand of a [`Product`]: rows of bytes that stand for floats.
#[derive(Debug, Clone, PartialEq)]
pub struct Bytes {
    data: Vec<u8>,
    rows: usize,
    inner: usize,
    /// What stands for 0.
    zero: i32,
}

impl Bytes {
    /// Quantises rows of `inner` floats.
    ///
    /// # Panics
    /// When the floats are not whole rows.
    pub fn quantise(x: &[f32], inner: usize, affine: &Affine) -> Self {
        Self::fill(x, inner, affine.zero.into(), |x, q| affine.quantise_into(x, q))
    }

    /// Rows of `inner` bytes whose zero is `zero`.
    ///
    /// # Panics
    /// When the bytes are not whole rows.
    pub fn unsigned(q: &[u8], inner: usize, zero: u8) -> Self {
        Self::fill(q, inner, zero.into(), |from, to| to.copy_from_slice(from))
    }

    /// Rows of `inner` signed bytes around 0.
    ///
    /// # Panics
    /// When the bytes are not whole rows.
    pub fn signed(q: &[i8], inner: usize) -> Self {
        Self::fill(q, inner, 128, |from, to| {
            to.iter_mut().zip(from).for_each(|(to, &from)| *to = from as u8 ^ 128);
        })
    }

    /// Copies rows to where each begins a group.
    fn fill<T: Sync>(from: &[T], inner: usize, zero: i32, copy: impl Fn(&[T], &mut [u8]) + Sync) -> Self {
        let inner = inner.max(1);
        assert!(from.len().is_multiple_of(inner), "operands of a product must be whole rows");
        let (rows, stride) = (from.len() / inner, inner.next_multiple_of(GROUP));
        let mut data = vec![0; rows * stride];
        const WORTH_SHARING: usize = 1 << 15;
        if stride == inner {
            let pieces = data.par_chunks_mut(WORTH_SHARING).zip(from.par_chunks(WORTH_SHARING));
            pieces.for_each(|(to, from)| copy(from, to));
        } else {
            for (to, from) in data.chunks_mut(stride).zip(from.chunks(inner)) {
                copy(from, &mut to[..inner]);
            }
        }
        Self { data, rows, inner, zero }
    }
}

/// Products of bytes in all: fewer stay on the calling thread.
const WORTH_SHARING: usize = 1 << 20;

/// Rows of a task.
const ROWS_AT_ONCE: usize = 48;

/// A matrix product in whole numbers: `sum[r, c] = Σ_k (rows[r, k] - zero) panels[k, c]`, exactly.
#[derive(Debug, Clone, Copy)]
pub struct Product<'a> {
    rows: &'a Bytes,
    panels: &'a Panels,
    level: Level,
}

impl<'a> Product<'a> {
    /// With the fastest instructions of this machine.
    ///
    /// # Panics
    /// When the inner extents differ.
    pub fn new(rows: &'a Bytes, panels: &'a Panels) -> Self {
        assert_eq!(rows.inner, panels.inner, "inner extents of a product must agree");
        Self { rows, panels, level: level() }
    }

    /// With others.
    pub fn with_level(self, level: Level) -> Self {
        Self { level, ..self }
    }

    /// The sums, `[rows, columns]`.
    pub fn sums(&self) -> Vec<i32> {
        let corrections = self.corrections();
        self.compute(0, |first, sums: &[i32], out| {
            let corrections = &corrections[first..];
            out.iter_mut().zip(sums).zip(corrections).for_each(|((out, sum), c)| *out = sum.wrapping_add(*c));
        })
    }

    /// `scale (sum + bias)`, within the ends, `[rows, columns]`.
    ///
    /// # Panics
    /// When there is not one scale and one bias a column.
    pub fn floats(&self, requantise: &Requantise<'_>) -> Vec<f32> {
        let bias = self.corrected(requantise);
        let requantise = Requantise { bias: &bias, ..*requantise };
        self.compute(0.0, |first, sums, out| {
            simd(
                #[inline(always)]
                || requantise.columns(first, sums, out),
            );
        })
    }

    /// The same as bytes.
    ///
    /// # Panics
    /// When there is not one scale and one bias a column.
    pub fn bytes(&self, requantise: &Requantise<'_>, to: &Affine) -> Vec<u8> {
        let bias = self.corrected(requantise);
        let requantise = Requantise { bias: &bias, ..*requantise };
        self.compute(0, |first, sums, out: &mut [u8]| {
            let mut floats = [0.0; 4 * PANEL];
            let floats = &mut floats[..out.len()];
            simd(
                #[inline(always)]
                || {
                    requantise.columns(first, sums, floats);
                    to.bytes(floats, out);
                },
            );
        })
    }

    /// What the zero of the rows takes from every column.
    fn corrections(&self) -> Vec<i32> {
        self.panels.sums.iter().map(|sum| self.rows.zero.wrapping_mul(*sum).wrapping_neg()).collect()
    }

    fn corrected(&self, requantise: &Requantise<'_>) -> Vec<i32> {
        let columns = self.panels.columns;
        assert!(
            requantise.scales.len() == columns && requantise.bias.len() == columns,
            "one scale and bias a column"
        );
        self.corrections().iter().zip(requantise.bias).map(|(a, b)| a.wrapping_add(*b)).collect()
    }

    /// Lets `write` turn the sums of some columns, from the first on, into results.
    fn compute<T: Copy + Send + Sync>(
        &self,
        empty: T,
        write: impl Fn(usize, &[i32], &mut [T]) + Sync,
    ) -> Vec<T> {
        let (rows, panels) = (self.rows, self.panels);
        let (columns, stride) = (panels.columns, rows.inner.next_multiple_of(GROUP));
        let groups = stride / GROUP;
        let mut out = vec![empty; rows.rows * columns];
        if out.is_empty() {
            return out;
        }
        let panel_count = columns.div_ceil(PANEL);
        let panel_bytes = groups * panels.kind.group_bytes();
        let work = out.len() * rows.inner;
        if work < WORTH_SHARING || rows.rows > ROWS_AT_ONCE || rayon::current_num_threads() == 1 {
            let at_once = if work < WORTH_SHARING { rows.rows } else { ROWS_AT_ONCE };
            out.par_chunks_mut(at_once * columns).enumerate().for_each(|(task, out)| {
                let block = Block {
                    kind: panels.kind,
                    rows: &rows.data[task * at_once * stride..],
                    row_count: out.len() / columns,
                    stride,
                    groups,
                    panels: &panels.bytes,
                    panel_count,
                };
                multiply(self.level, &block, |row, first, sums| {
                    let end = (first + sums.len()).min(columns);
                    write(first, sums, &mut out[row * columns..][first..end]);
                });
            });
            return out;
        }
        // Few rows: tasks share the columns, and each has its part of the result to itself.
        let at_once = panel_count.div_ceil(rayon::current_num_threads()).next_multiple_of(4);
        let parts: Vec<Vec<T>> = (0..panel_count.div_ceil(at_once))
            .into_par_iter()
            .map(|task| {
                let from = task * at_once;
                let panel_count = at_once.min(panel_count - from);
                let width = (panel_count * PANEL).min(columns - from * PANEL);
                let mut part = vec![empty; rows.rows * width];
                let block = Block {
                    kind: panels.kind,
                    rows: &rows.data,
                    row_count: rows.rows,
                    stride,
                    groups,
                    panels: &panels.bytes[from * panel_bytes..],
                    panel_count,
                };
                multiply(self.level, &block, |row, first, sums| {
                    let end = (first + sums.len()).min(width);
                    write(from * PANEL + first, sums, &mut part[row * width..][first..end]);
                });
                part
            })
            .collect();
        for (task, part) in parts.iter().enumerate() {
            let from = task * at_once * PANEL;
            let width = part.len() / rows.rows;
            for (out, part) in out.chunks_mut(columns).zip(part.chunks(width)) {
                out[from..from + width].copy_from_slice(part);
            }
        }
        out
    }
}
