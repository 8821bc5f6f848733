//! Rows of a matrix taken and added to by their numbers.

use std::ops::Deref;

use burn::backend::{BackendTensor, DispatchTensorKind};
use burn::tensor::{DType, Int, Tensor};
use burn_flex::FlexTensor;
use rayon::prelude::*;

use crate::blocks::{BLOCK, in_place};
use crate::simd;
use crate::vector::{axpy, fma};

/// Ranges of rows that are added to side by side.
const RANGES: usize = 64;

/// What numbers stand for, in messages.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Kind {
    Row,
    Segment,
}

/// Numbers of rows that exist.
#[derive(Debug, Clone)]
pub(crate) struct Ids(FlexTensor);

impl Ids {
    /// The numbers in a tensor, in its memory.
    ///
    /// # Panics
    /// When one is not below `rows`.
    pub(crate) fn new(ids: Tensor<1, Int>, rows: usize, kind: Kind) -> Self {
        let ids = match ids.cast(DType::I64).into_dispatch().kind {
            DispatchTensorKind::Flex(BackendTensor::Int(ids)) => Self(ids.to_contiguous()),
            other => panic!("a CPU kernel was given another backend's integers: {other:?}"),
        };
        if let Some(id) = ids.iter().find(|&&id| id < 0 || id >= rows as i64) {
            match kind {
                Kind::Row => panic!("the id {id} is none of the table's {rows} rows"),
                Kind::Segment => panic!("the segment {id} is none of the {rows} segments"),
            }
        }
        ids
    }
}

impl Deref for Ids {
    type Target = [i64];

    fn deref(&self) -> &[i64] {
        self.0.as_slice().expect("the numbers are contiguous")
    }
}

/// The rows of `table` with the given numbers.
pub(crate) fn gather(table: &[f32], width: usize, ids: &[i64]) -> Vec<f32> {
    let mut output = vec![0.0; ids.len() * width];
    for_rows(&mut output, width, |first, rows| {
        for (row, &id) in rows.chunks_exact_mut(width).zip(&ids[first..]) {
            let id = id as usize;
            row.copy_from_slice(&table[id * width..(id + 1) * width]);
        }
    });
    output
}

/// Hands `work` some rows of `values` at a time with the number of the first, on all threads where there is
/// much to do.
pub(crate) fn for_rows(values: &mut [f32], width: usize, work: impl Fn(usize, &mut [f32]) + Sync) {
    in_place(values, width, |first, values| work(first / width, values));
}

/// Positions in a list of row numbers, sorted by the range of rows that they fall in, so that tasks with a
/// range each find theirs; within a range the order is that of the list.
pub(crate) struct ByRange {
    order: Vec<usize>,
    /// Where in `order` each range starts, and the end.
    starts: Vec<usize>,
    /// Rows in a range.
    rows: usize,
}

impl ByRange {
    pub(crate) fn new(ids: &[i64], rows: usize) -> Self {
        let rows = rows.div_ceil(RANGES).max(1);
        let mut starts = vec![0; RANGES + 1];
        let range = |id: &i64| *id as usize / rows;
        for id in ids {
            starts[range(id) + 1] += 1;
        }
        for range in 0..RANGES {
            starts[range + 1] += starts[range];
        }
        let mut next = starts.clone();
        let mut order = vec![0; ids.len()];
        for (position, id) in ids.iter().enumerate() {
            let next = &mut next[range(id)];
            order[*next] = position;
            *next += 1;
        }
        Self { order, starts, rows }
    }

    /// Hands `work` every range of a matrix of rows: the positions that fall into it, the number of its first
    /// row and its rows; on all threads where there is much to do.
    pub(crate) fn for_each<T: Send>(
        &self,
        matrix: &mut [T],
        width: usize,
        work: impl Fn(&[usize], usize, &mut [T]) + Sync,
    ) {
        let work = |(range, rows): (usize, &mut [T])| {
            work(&self.order[self.starts[range]..self.starts[range + 1]], range * self.rows, rows);
        };
        let ranges = self.rows * width;
        if ranges == 0 {
            return;
        }
        if self.order.len() * width <= BLOCK {
            matrix.chunks_mut(ranges).enumerate().for_each(work);
        } else {
            matrix.par_chunks_mut(ranges).enumerate().with_max_len(1).for_each(work);
        }
    }
}

/// Adds to row `ids[i]` of `matrix` the row `added(i)` times its factor, for every `i` in turn.
pub(crate) fn scatter<'a>(
    matrix: &mut [f32],
    width: usize,
    ids: &[i64],
    added: impl Fn(usize) -> (&'a [f32], f32) + Sync,
) {
    let rows = matrix.len().checked_div(width).unwrap_or(0);
    ByRange::new(ids, rows).for_each(matrix, width, |positions, first, matrix| {
        simd(
            #[inline(always)]
            || {
                for &position in positions {
                    let (source, factor) = added(position);
                    let row = (ids[position] as usize - first) * width;
                    matrix[row..row + width].iter_mut().zip(source).for_each(|(y, x)| *y += factor * x);
                }
            },
        );
    });
}

/// `total += Σ_i factor_i row_i`, with the total in registers.
#[inline(always)]
pub(crate) fn add_rows<'a>(total: &mut [f32], rows: impl Iterator<Item = (&'a [f32], f32)> + Clone) {
    const LANES: usize = 64;
    let width = total.len();
    let (body, tail) = total.as_chunks_mut::<LANES>();
    for (chunk, total) in body.iter_mut().enumerate() {
        let mut sums = *total;
        for (row, factor) in rows.clone() {
            let part = row[..width].as_chunks::<LANES>().0[chunk];
            for lane in 0..LANES {
                sums[lane] = fma(factor, part[lane], sums[lane]);
            }
        }
        *total = sums;
    }
    if !tail.is_empty() {
        for (row, factor) in rows {
            axpy(factor, &row[width - tail.len()..], tail);
        }
    }
}
