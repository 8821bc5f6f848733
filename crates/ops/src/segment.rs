//! Selection, addition and reduction of rows by number, as on the edges of a graph.
//!
//! Rows are what lies behind the first axis of a tensor.

use std::sync::Arc;

use burn::backend::Shape;
use burn::tensor::{IndexingUpdateOp, Int, Tensor};
use burn_flex::FlexTensor;

use crate::flex::{floats, tensor};
use crate::function::{Function, apply, runs_natively};
use crate::rows::{ByRange, Ids, Kind, for_rows, gather, scatter};
use crate::simd;

/// The rows of `x` with the given numbers.
///
/// # Shapes
/// - x: `[rows, ...]`
/// - ids: `[n]`
/// - output: `[n, ...]`
///
/// # Panics
/// On the CPU when an id is not below `rows`.
pub fn index_select<const D: usize>(x: Tensor<D>, ids: Tensor<1, Int>) -> Tensor<D> {
    if !runs_natively(&x) {
        return x.select(0, ids);
    }
    let ids = Ids::new(ids, x.dims()[0], Kind::Row);
    Tensor::from_dispatch(apply(&IndexSelect { ids }, [x.into_dispatch()]))
}

/// `target` with row `source[i]` added to its row `ids[i]`, for every `i`.
///
/// # Shapes
/// - target, output: `[rows, ...]`
/// - ids: `[n]`
/// - source: `[n, ...]`
///
/// # Panics
/// When the shapes do not fit; on the CPU when an id is not below `rows`.
pub fn index_add<const D: usize>(target: Tensor<D>, ids: Tensor<1, Int>, source: Tensor<D>) -> Tensor<D> {
    assert_rows(&ids, source.dims());
    assert_eq!(target.dims()[1..], source.dims()[1..], "rows added must have the shape of the target's");
    if !runs_natively(&target) || !runs_natively(&source) {
        return target.select_assign(0, ids, source, IndexingUpdateOp::Add);
    }
    let ids = Ids::new(ids, target.dims()[0], Kind::Row);
    Tensor::from_dispatch(apply(&IndexAdd { ids }, [target.into_dispatch(), source.into_dispatch()]))
}

/// The sum of the rows in every segment; 0 for a segment without rows.
///
/// # Shapes
/// - x: `[n, ...]`
/// - segments: `[n]`, the segment of each row, in any order
/// - output: `[count, ...]`
///
/// # Panics
/// When there is not one segment for every row; on the CPU when a segment is not below `count`.
pub fn segment_sum<const D: usize>(x: Tensor<D>, segments: Tensor<1, Int>, count: usize) -> Tensor<D> {
    reduce(x, segments, count, false)
}

/// The mean of the rows in every segment; 0 for a segment without rows.
///
/// Shapes and panics are those of [`segment_sum`].
pub fn segment_mean<const D: usize>(x: Tensor<D>, segments: Tensor<1, Int>, count: usize) -> Tensor<D> {
    reduce(x, segments, count, true)
}

fn reduce<const D: usize>(x: Tensor<D>, segments: Tensor<1, Int>, count: usize, mean: bool) -> Tensor<D> {
    assert_rows(&segments, x.dims());
    if !runs_natively(&x) {
        let mut shape = x.dims();
        shape[0] = count;
        let sums = Tensor::zeros(shape, (&x.device(), x.dtype()));
        let sums = sums.select_assign(0, segments.clone(), x.clone(), IndexingUpdateOp::Add);
        if !mean {
            return sums;
        }
        let ones = Tensor::<1>::ones(segments.dims(), (&x.device(), x.dtype()));
        let sizes = Tensor::<1>::zeros([count], (&x.device(), x.dtype()));
        let sizes = sizes.select_assign(0, segments, ones, IndexingUpdateOp::Add).clamp_min(1.0);
        let mut shape = [1; D];
        shape[0] = count;
        return sums / sizes.reshape(shape);
    }
    let segments = Ids::new(segments, count, Kind::Segment);
    let factors = mean.then(|| {
        let mut sizes = vec![0.0f32; count];
        segments.iter().for_each(|&segment| sizes[segment as usize] += 1.0);
        sizes.into_iter().map(|size| 1.0 / size.max(1.0)).collect()
    });
    let function = SegmentSum { segments, count, factors };
    Tensor::from_dispatch(apply(&function, [x.into_dispatch()]))
}

/// The largest element of the rows in every segment, column by column; 0 for a segment without rows.
///
/// The gradient goes to the first row that has it. Shapes and panics are those of [`segment_sum`].
pub fn segment_max<const D: usize>(x: Tensor<D>, segments: Tensor<1, Int>, count: usize) -> Tensor<D> {
    assert_rows(&segments, x.dims());
    if !runs_natively(&x) {
        return composed_max(x, segments, count);
    }
    let segments = Ids::new(segments, count, Kind::Segment);
    Tensor::from_dispatch(apply(&SegmentMax { segments, count }, [x.into_dispatch()]))
}

/// [`segment_max`] out of Burn's operations: finds the first row with the largest element, then gathers.
fn composed_max<const D: usize>(x: Tensor<D>, segments: Tensor<1, Int>, count: usize) -> Tensor<D> {
    let options = (&x.device(), x.dtype());
    let [rows, width] = [x.dims()[0], x.dims()[1..].iter().product()];
    let mut shape = x.dims();
    shape[0] = count;
    let x = x.reshape([rows, width]);
    let lowest = Tensor::<2>::full([count, width], f64::NEG_INFINITY, options);
    let largest = lowest.select_assign(0, segments.clone(), x.clone().detach(), IndexingUpdateOp::Max);
    let loses = x.clone().detach().lower(largest.select(0, segments.clone()));
    let row_of_each = Tensor::<1, Int>::arange(0..rows as i64, options.0).float().cast(options.1);
    let row_of_each = row_of_each.reshape([rows, 1]).expand([rows, width]);
    let none = Tensor::<2>::full([count, width], rows as f64, options);
    let candidates = row_of_each.mask_fill(loses, rows as f64);
    let first = none.select_assign(0, segments, candidates, IndexingUpdateOp::Min).int();
    let empty = first.clone().equal_scalar(rows as i64);
    x.gather(0, first.mask_fill(empty.clone(), 0)).mask_fill(empty, 0).reshape(shape)
}

fn assert_rows<const D: usize>(ids: &Tensor<1, Int>, rows: [usize; D]) {
    let [given] = ids.dims();
    assert_eq!(given, rows[0], "the rows of {rows:?} need a number each, not {given}");
}

/// The shape of `x` with another number of rows.
fn with_rows(x: &FlexTensor, rows: usize) -> Shape {
    let mut shape = x.layout().shape().clone();
    shape[0] = rows;
    shape
}

/// The elements in a row.
fn row_width(x: &FlexTensor) -> usize {
    x.layout().shape().iter().skip(1).product()
}

#[derive(Debug, Clone)]
struct IndexSelect {
    ids: Ids,
}

impl Function<1> for IndexSelect {
    /// The shape of the input.
    type Saved = Shape;

    fn forward(&self, [x]: [FlexTensor; 1]) -> (FlexTensor, Shape) {
        let rows = gather(&floats(&x), row_width(&x), &self.ids);
        (tensor(rows, with_rows(&x, self.ids.len())), x.layout().shape().clone())
    }

    fn backward(&self, shape: Shape, upstream: FlexTensor, _: [bool; 1]) -> [Option<FlexTensor>; 1] {
        [Some(scattered(&upstream, &self.ids, shape[0]))]
    }
}

/// The sums of the rows of `x` with the same number.
fn scattered(x: &FlexTensor, ids: &[i64], count: usize) -> FlexTensor {
    let (values, width) = (floats(x), row_width(x));
    let mut sums = vec![0.0; count * width];
    scatter(&mut sums, width, ids, |position| (&values[position * width..(position + 1) * width], 1.0));
    tensor(sums, with_rows(x, count))
}

#[derive(Debug, Clone)]
struct IndexAdd {
    ids: Ids,
}

impl Function<2> for IndexAdd {
    type Saved = ();

    fn forward(&self, [target, source]: [FlexTensor; 2]) -> (FlexTensor, ()) {
        let (values, width) = (floats(&source), row_width(&source));
        let mut sums = floats(&target).into_owned();
        scatter(&mut sums, width, &self.ids, |position| {
            (&values[position * width..(position + 1) * width], 1.0)
        });
        (tensor(sums, target.layout().shape().clone()), ())
    }

    fn backward(&self, (): (), upstream: FlexTensor, wanted: [bool; 2]) -> [Option<FlexTensor>; 2] {
        let source = wanted[1].then(|| {
            let rows = gather(&floats(&upstream), row_width(&upstream), &self.ids);
            tensor(rows, with_rows(&upstream, self.ids.len()))
        });
        [Some(upstream), source]
    }
}

#[derive(Debug, Clone)]
struct SegmentSum {
    segments: Ids,
    count: usize,
    /// What the sum of every segment is multiplied by.
    factors: Option<Arc<[f32]>>,
}

impl Function<1> for SegmentSum {
    type Saved = ();

    fn forward(&self, [x]: [FlexTensor; 1]) -> (FlexTensor, ()) {
        let (values, width) = (floats(&x), row_width(&x));
        let mut sums = vec![0.0; self.count * width];
        scatter(&mut sums, width, &self.segments, |position| {
            let factor =
                self.factors.as_ref().map_or(1.0, |factors| factors[self.segments[position] as usize]);
            (&values[position * width..(position + 1) * width], factor)
        });
        (tensor(sums, with_rows(&x, self.count)), ())
    }

    fn backward(&self, (): (), upstream: FlexTensor, _: [bool; 1]) -> [Option<FlexTensor>; 1] {
        let width = row_width(&upstream);
        let mut gradient = gather(&floats(&upstream), width, &self.segments);
        if let Some(factors) = &self.factors {
            for_rows(&mut gradient, width, |first, rows| {
                for (row, &segment) in rows.chunks_exact_mut(width).zip(&self.segments[first..]) {
                    row.iter_mut().for_each(|x| *x *= factors[segment as usize]);
                }
            });
        }
        [Some(tensor(gradient, with_rows(&upstream, self.segments.len())))]
    }
}

#[derive(Debug, Clone)]
struct SegmentMax {
    segments: Ids,
    count: usize,
}

/// The largest element so far and the row that it comes from.
type Winner = (f32, usize);
/// The row of a segment's winner before there is one.
const NOBODY: usize = usize::MAX;

impl Function<1> for SegmentMax {
    /// The row of the largest element, for every segment and column.
    type Saved = Vec<usize>;

    fn forward(&self, [x]: [FlexTensor; 1]) -> (FlexTensor, Vec<usize>) {
        let (values, width) = (floats(&x), row_width(&x));
        let mut winners: Vec<Winner> = vec![(0.0, NOBODY); self.count * width];
        let ranges = ByRange::new(&self.segments, self.count);
        ranges.for_each(&mut winners, width, |positions, first, winners| {
            simd(
                #[inline(always)]
                || {
                    for &position in positions {
                        let at = (self.segments[position] as usize - first) * width;
                        let row = &values[position * width..(position + 1) * width];
                        for (winner, &x) in winners[at..at + width].iter_mut().zip(row) {
                            // The first NaN wins over all numbers.
                            let wins =
                                winner.1 == NOBODY || x > winner.0 || (x.is_nan() && !winner.0.is_nan());
                            *winner = if wins { (x, position) } else { *winner };
                        }
                    }
                },
            );
        });
        let (largest, rows) = winners.into_iter().unzip();
        (tensor(largest, with_rows(&x, self.count)), rows)
    }

    fn backward(&self, winners: Vec<usize>, upstream: FlexTensor, _: [bool; 1]) -> [Option<FlexTensor>; 1] {
        let (values, width) = (floats(&upstream), row_width(&upstream));
        let rows = self.segments.len();
        let mut gradient = vec![0.0; rows * width];
        for_rows(&mut gradient, width, |first, gradients| {
            for (position, gradient) in (first..).zip(gradients.chunks_exact_mut(width)) {
                let segment = self.segments[position] as usize;
                let at = segment * width..(segment + 1) * width;
                let columns = winners[at.clone()].iter().zip(&values[at]);
                for (gradient, (&winner, &upstream)) in gradient.iter_mut().zip(columns) {
                    *gradient = if winner == position { upstream } else { 0.0 };
                }
            }
        });
        [Some(tensor(gradient, with_rows(&upstream, rows)))]
    }
}
