//! Products of matrices with weights that stay the same: packed once, in the order in which the kernel reads them.
//!
//! The kernel computes a tile of [`ROWS`] × [`LANES`] results in registers: for every place of the inner axis, `ROWS` elements of the left
//! factor times `LANES` of the right one. A left factor is packed in panels of `ROWS` rows, a right one in strips of `LANES`
//! columns; what fills up the last panel and strip is 0. A stretch of a strip stays in a core's first cache while the panels' come from the
//! second (Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication", 2008).

use std::borrow::Cow;
use std::ops::Range;

use rayon::prelude::*;

use crate::conv::Finish;
use crate::simd;
use crate::vector::fma;

/// Rows of a tile: with two vectors of eight floats in each, as many as the sixteen registers of AVX2 hold.
pub(crate) const ROWS: usize = 6;
/// Columns of a tile.
pub(crate) const LANES: usize = 16;
/// Places of the inner axis that are summed up at once: so much of a strip fills half of a core's first cache.
pub(crate) const DEPTH: usize = 256;

type Lanes = [f32; LANES];

/// A left factor.
#[derive(Debug, Clone, Default)]
pub(crate) struct LeftFactor {
    /// `[panels, inner]`
    panels: Vec<[f32; ROWS]>,
    inner: usize,
}

impl LeftFactor {
    /// The matrix `[rows, inner]` in `values`, whose rows start `stride` elements apart.
    pub fn new(values: &[f32], rows: usize, inner: usize, stride: usize) -> Self {
        let mut panels = vec![[0.0; ROWS]; rows.div_ceil(ROWS) * inner];
        panels.par_chunks_mut(inner.max(1)).enumerate().with_min_len(4).for_each(|(panel, places)| {
            for row in 0..ROWS.min(rows - panel * ROWS) {
                let values = &values[(panel * ROWS + row) * stride..][..inner];
                places.iter_mut().zip(values).for_each(|(place, value)| place[row] = *value);
            }
        });
        Self { panels, inner }
    }

    /// Bytes of the packed matrix.
    pub fn bytes(&self) -> usize {
        size_of_val(&self.panels[..])
    }

    /// The rows from a panel on in the product with `right`, as many as there are in `rows`; to each an element of `bias` is added,
    /// if it has any.
    pub fn multiply(&self, panel: usize, right: &RightFactor, bias: &[f32], rows: &mut [&mut [f32]]) {
        multiply(self, panel, right, 0..right.width() / LANES, bias, rows);
    }
}

/// Left factors of several products: as they are, or packed because they stay the same.
#[derive(Debug)]
pub(crate) enum LeftFactors<'a> {
    Plain(Cow<'a, [f32]>),
    Packed(Vec<LeftFactor>),
}

impl LeftFactors<'_> {
    /// Bytes of all factors.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Plain(values) => size_of_val(&values[..]),
            Self::Packed(factors) => factors.iter().map(LeftFactor::bytes).sum(),
        }
    }
}

/// A right factor.
#[derive(Debug, Clone, Default)]
pub struct RightFactor {
    /// `[strips, inner]`
    strips: Vec<Lanes>,
    inner: usize,
    columns: usize,
}

impl RightFactor {
    /// The matrix `[inner, columns]` whose element at a row and a column lies where `strides` say.
    ///
    /// # Panics
    /// When the values do not reach as far.
    pub fn new(values: &[f32], [inner, columns]: [usize; 2], strides: [usize; 2]) -> Self {
        let mut packed = Self::default();
        if strides[1] == 1 {
            packed.pack(values, [inner, columns], strides[0]);
            return packed;
        }
        packed.resize(inner, columns);
        for column in 0..columns {
            let strip = &mut packed.strips[column / LANES * inner..][..inner];
            for (row, lanes) in strip.iter_mut().enumerate() {
                lanes[column % LANES] = values[row * strides[0] + column * strides[1]];
            }
        }
        packed
    }

    /// Packs another matrix, `[inner, columns]`, whose rows start `stride` elements apart.
    pub(crate) fn pack(&mut self, values: &[f32], [inner, columns]: [usize; 2], stride: usize) {
        self.resize(inner, columns);
        self.strips.par_chunks_mut(inner.max(1)).enumerate().with_min_len(4).for_each(|(strip, rows)| {
            let first = strip * LANES;
            let own = LANES.min(columns - first);
            for (row, lanes) in rows.iter_mut().enumerate() {
                let values = &values[row * stride + first..][..own];
                match <&Lanes>::try_from(values) {
                    Ok(values) => *lanes = *values,
                    Err(_) => {
                        *lanes = [0.0; LANES];
                        lanes[..own].copy_from_slice(values);
                    }
                }
            }
        });
    }

    fn resize(&mut self, inner: usize, columns: usize) {
        self.strips.resize(columns.div_ceil(LANES) * inner, [0.0; LANES]);
        (self.inner, self.columns) = (inner, columns);
    }

    /// Columns with those that fill the last strip.
    pub(crate) fn width(&self) -> usize {
        self.columns.next_multiple_of(LANES)
    }

    /// Bytes of the packed matrix.
    pub fn bytes(&self) -> usize {
        size_of_val(&self.strips[..])
    }

    /// `x W` into `out`, `[rows, columns]`, on all threads; `x` is `[rows, inner]` with rows that start `stride` elements apart. Every
    /// finished part of a row is handed to `finish` while it is in a cache.
    ///
    /// # Panics
    /// When `x` is too short.
    pub fn multiply(&self, x: &[f32], stride: usize, out: &mut [f32], finish: &impl Finish) {
        /// Panels whose part of the inner axis stays in a core's second cache.
        const PANELS: usize = 22;
        /// Fewest and most strips of a task.
        const STRIPS: [usize; 2] = [4, 32];
        if out.is_empty() {
            return;
        }
        let rows = out.len() / self.columns;
        let left = LeftFactor::new(x, rows, self.inner, stride);
        let pieces = 2 * rayon::current_num_threads();
        let wide = self.columns.div_ceil(LANES * pieces).clamp(STRIPS[0], STRIPS[1]);
        let groups = self.columns.div_ceil(wide * LANES);
        let mut tasks: Vec<Vec<&mut [f32]>> = Vec::new();
        tasks.resize_with(rows.div_ceil(PANELS * ROWS) * groups, || Vec::with_capacity(PANELS * ROWS));
        for (row, out) in out.chunks_exact_mut(self.columns).enumerate() {
            for (group, piece) in out.chunks_mut(wide * LANES).enumerate() {
                tasks[row / (PANELS * ROWS) * groups + group].push(piece);
            }
        }
        tasks.into_par_iter().enumerate().for_each(|(task, mut pieces)| {
            let [panel, first] = [task / groups * PANELS, task % groups * wide];
            let strips = first..(first + wide).min(self.width() / LANES);
            multiply(&left, panel, self, strips, &[], &mut pieces);
            for (piece, row) in pieces.into_iter().zip(panel * ROWS..) {
                finish.call(row * self.columns + first * LANES, piece);
            }
        });
    }
}

/// The product of the rows from a panel on with some strips, one row for each in `out`, with a bias for each row if there are any.
fn multiply(
    left: &LeftFactor,
    panel: usize,
    right: &RightFactor,
    strips: Range<usize>,
    bias: &[f32],
    out: &mut [&mut [f32]],
) {
    let inner = left.inner;
    let bias_of = |row: usize| bias.get(row).copied().unwrap_or(0.0);
    if inner == 0 {
        out.iter_mut().enumerate().for_each(|(row, values)| values.fill(bias_of(row)));
    }
    simd(
        #[inline(always)]
        || {
            for start in (0..inner).step_by(DEPTH) {
                let stretch = start..(start + DEPTH).min(inner);
                for (strip, first) in strips.clone().zip((0..).step_by(LANES)) {
                    let strip = &right.strips[strip * inner..][stretch.clone()];
                    for (number, rows) in out.chunks_mut(ROWS).enumerate() {
                        let panel = &left.panels[(panel + number) * inner..][stretch.clone()];
                        let base = (start == 0).then(|| {
                            std::array::from_fn(
                                #[inline(always)]
                                |row| bias_of(number * ROWS + row),
                            )
                        });
                        match rows.len() {
                            1 => add_tile::<1>(panel, strip, base, first, rows),
                            2 => add_tile::<2>(panel, strip, base, first, rows),
                            3 => add_tile::<3>(panel, strip, base, first, rows),
                            4 => add_tile::<4>(panel, strip, base, first, rows),
                            5 => add_tile::<5>(panel, strip, base, first, rows),
                            _ => add_tile::<ROWS>(panel, strip, base, first, rows),
                        }
                    }
                }
            }
        },
    );
}

/// The product of `R` rows of a panel with a strip, to the places from `first` on in their rows: onto `base`, or what is there.
#[inline(always)]
fn add_tile<const R: usize>(
    panel: &[[f32; ROWS]],
    strip: &[Lanes],
    base: Option<[f32; ROWS]>,
    first: usize,
    rows: &mut [&mut [f32]],
) {
    let sums = tile::<R>(panel, strip);
    for (number, (sums, row)) in sums.iter().zip(rows).enumerate() {
        let row = &mut row[first..];
        if let Some(row) = row.first_chunk_mut::<LANES>() {
            let before = base.map_or(*row, |base| [base[number]; LANES]);
            for lane in 0..LANES {
                row[lane] = before[lane] + sums[lane];
            }
        } else {
            for (y, sum) in row.iter_mut().zip(sums) {
                *y = base.map_or(*y, |base| base[number]) + sum;
            }
        }
    }
}

/// `Σ_k panel_k strip_kᵀ` of the first `R` rows.
#[inline(always)]
fn tile<const R: usize>(panel: &[[f32; ROWS]], strip: &[Lanes]) -> [Lanes; R] {
    let mut sums = [[0.0; LANES]; R];
    for (left, lanes) in panel.iter().zip(strip) {
        for row in 0..R {
            for lane in 0..LANES {
                sums[row][lane] = fma(left[row], lanes[lane], sums[row][lane]);
            }
        }
    }
    sums
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Multiples of a quarter, so that every order of summation is exact.
    fn some(len: usize) -> Vec<f32> {
        (0..len).map(|i| (i * 7 % 23) as f32 * 0.25 - 2.0).collect()
    }

    fn product(a: &[f32], b: &[f32], [rows, inner, columns]: [usize; 3]) -> Vec<f32> {
        let at = |i: usize, j: usize| (0..inner).map(|k| a[i * inner + k] * b[k * columns + j]).sum();
        (0..rows * columns).map(|place| at(place / columns, place % columns)).collect()
    }

    #[test]
    fn products_with_packed_factors_match_the_definition() {
        for shape in [[1, 1, 1], [6, 5, 16], [7, 33, 17], [13, 4, 300], [140, 600, 257], [3, 0, 5]] {
            let [rows, inner, columns] = shape;
            let (a, b) = (some(rows * inner), some(inner * columns));
            let expected = product(&a, &b, shape);

            let right = RightFactor::new(&b, [inner, columns], [columns, 1]);
            let mut out = vec![9.0; rows * columns];
            right.multiply(&a, inner, &mut out, &());
            assert_eq!(out, expected, "{shape:?}, the right factor packed");

            let left = LeftFactor::new(&a, rows, inner, inner);
            let bias = some(rows);
            let mut out = vec![9.0; rows * columns];
            let mut pieces: Vec<&mut [f32]> = out.chunks_mut(columns).collect();
            for (panel, pieces) in pieces.chunks_mut(ROWS).enumerate() {
                left.multiply(panel, &right, &bias[panel * ROWS..], pieces);
            }
            let expected: Vec<f32> = (0..).zip(&expected).map(|(at, y)| y + bias[at / columns]).collect();
            assert_eq!(out, expected, "{shape:?}, both packed, with a bias");
        }
    }

    #[test]
    fn a_transposed_factor_is_packed_alike() {
        let [inner, columns] = [9, 37];
        let b = some(inner * columns);
        let transposed: Vec<f32> = (0..columns * inner).map(|i| b[i % inner * columns + i / inner]).collect();
        let [plain, turned] = [
            RightFactor::new(&b, [inner, columns], [columns, 1]),
            RightFactor::new(&transposed, [inner, columns], [1, inner]),
        ];
        assert_eq!(plain.strips, turned.strips);
    }

    #[test]
    fn every_result_is_finished_once_at_its_place() {
        let shape @ [rows, inner, columns] = [101, 3, 530];
        let (a, b) = (some(rows * inner), some(inner * columns));
        let mut out = vec![0.0; rows * columns];
        let add_place = |at: usize, values: &mut [f32]| {
            values.iter_mut().zip(at..).for_each(|(value, at)| *value += at as f32);
        };
        RightFactor::new(&b, [inner, columns], [columns, 1]).multiply(&a, inner, &mut out, &add_place);
        let expected: Vec<f32> =
            product(&a, &b, shape).iter().zip(0..).map(|(x, at)| x + at as f32).collect();
        assert_eq!(out, expected);
    }
}
