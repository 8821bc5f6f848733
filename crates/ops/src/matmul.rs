//! Products of batches of matrices.

use burn::tensor::Tensor;
use burn_flex::{FlexTensor, Layout};
use rayon::prelude::*;

use crate::flex::tensor;
use crate::function::{Function, apply, runs_natively};
use crate::gemm::{Mat, Out, gemm, gemm_parallel};

/// `a b` for every matrix of a batch; axes of one element before the last two repeat, as in
/// [`Tensor::matmul`].
///
/// # Shapes
/// - a: `[..., rows, inner]`
/// - b: `[..., inner, columns]`
/// - output: `[..., rows, columns]`
///
/// # Panics
/// When the shapes do not fit.
pub fn matmul<const D: usize>(a: Tensor<D>, b: Tensor<D>) -> Tensor<D> {
    if !runs_natively(&a) || !runs_natively(&b) {
        return a.matmul(b);
    }
    Tensor::from_dispatch(apply(&Matmul, [a.into_dispatch(), b.into_dispatch()]))
}

#[derive(Debug, Clone)]
struct Matmul;

impl Function<2> for Matmul {
    type Saved = [FlexTensor; 2];

    fn forward(&self, factors: [FlexTensor; 2]) -> (FlexTensor, [FlexTensor; 2]) {
        let factors = factors.map(readable);
        let pairs = Pairs::new(factors[0].layout(), factors[1].layout());
        let products =
            pairs.multiply(&pairs.output, |pair| (matrix(&factors[0], pair.a), matrix(&factors[1], pair.b)));
        (products, factors)
    }

    /// `dA = dY Bᵀ`, `dB = Aᵀ dY`, summed over the batch where a factor repeats.
    fn backward(
        &self,
        [a, b]: [FlexTensor; 2],
        upstream: FlexTensor,
        [wants_a, wants_b]: [bool; 2],
    ) -> [Option<FlexTensor>; 2] {
        let pairs = Pairs::new(a.layout(), b.layout());
        let upstream = readable(upstream);
        let d_a = wants_a.then(|| {
            let shape = dims(a.layout());
            pairs
                .regrouped(|pair| pair.a)
                .multiply(&shape, |pair| (matrix(&upstream, pair.output), matrix(&b, pair.b).t()))
        });
        let d_b = wants_b.then(|| {
            let shape = dims(b.layout());
            pairs
                .regrouped(|pair| pair.b)
                .multiply(&shape, |pair| (matrix(&a, pair.a).t(), matrix(&upstream, pair.output)))
        });
        [d_a, d_b]
    }
}

/// Which matrices of a batch are multiplied, by their numbers.
#[derive(Clone, Copy)]
struct Pair {
    a: usize,
    b: usize,
    output: usize,
}

/// The products of a batch, those that add up to the same matrix together.
struct Pairs {
    groups: Vec<Vec<Pair>>,
    /// The shape of the product.
    output: Vec<usize>,
}

impl Pairs {
    fn new(a: &Layout, b: &Layout) -> Self {
        let (a, b) = (dims(a), dims(b));
        let fit = a.len() == b.len()
            && a.len() >= 2
            && a[a.len() - 1] == b[b.len() - 2]
            && a.iter().zip(&b).take(a.len() - 2).all(|(&a, &b)| a == b || a == 1 || b == 1);
        assert!(fit, "matrices of {a:?} and {b:?} cannot be multiplied");
        let batch = a.len() - 2;
        let repeated: Vec<usize> =
            a.iter().zip(&b).take(batch).map(|(&a, &b)| if a == 1 { b } else { a }).collect();
        let count: usize = repeated.iter().product();
        // The number of the matrix that a factor of shape `own` has at place `index` of the product's batch.
        let number = |own: &[usize], index: usize| {
            let (mut rest, mut number, mut step) = (index, 0, 1);
            for axis in (0..batch).rev() {
                let at = rest % repeated[axis];
                rest /= repeated[axis];
                number += if own[axis] == 1 { 0 } else { at * step };
                step *= own[axis];
            }
            number
        };
        let pair = |output| vec![Pair { a: number(&a, output), b: number(&b, output), output }];
        let groups = (0..count).map(pair).collect();
        let output = [&repeated[..], &[a[batch], b[batch + 1]]].concat();
        Self { groups, output }
    }

    /// The same pairs, grouped by the matrix that `key` names.
    fn regrouped(&self, key: impl Fn(&Pair) -> usize) -> Self {
        let count = self.groups.iter().flatten().map(|pair| key(pair) + 1).max().unwrap_or(0);
        let mut groups = vec![Vec::new(); count];
        for pair in self.groups.iter().flatten() {
            groups[key(pair)].push(*pair);
        }
        Self { groups, output: self.output.clone() }
    }

    /// A tensor of `shape` whose matrices are the sums of the products of each group.
    fn multiply<'a>(
        &self,
        shape: &[usize],
        factors: impl Fn(&Pair) -> (Mat<'a>, Mat<'a>) + Sync,
    ) -> FlexTensor {
        let columns = shape[shape.len() - 1];
        let size = shape[shape.len() - 2] * columns;
        let mut output = vec![0.0; shape.iter().product()];
        if self.groups.len() == 1 {
            for pair in &self.groups[0] {
                let (a, b) = factors(pair);
                gemm_parallel(&mut output, columns, Out::Add, a, b);
            }
        } else if size > 0 {
            output.par_chunks_mut(size).zip(&self.groups).for_each(|(output, group)| {
                for pair in group {
                    let (a, b) = factors(pair);
                    gemm(output, columns, Out::Add, a, b);
                }
            });
        }
        tensor(output, shape.to_vec())
    }
}

fn dims(layout: &Layout) -> Vec<usize> {
    layout.shape().to_vec()
}

/// The tensor itself if its matrices are dense or transposed dense ones, one after another; else a copy.
fn readable(x: FlexTensor) -> FlexTensor {
    if orientation(x.layout()).is_some() { x } else { x.to_contiguous() }
}

/// How the matrices of a tensor lie in memory.
enum Orientation {
    RowMajor,
    ColumnMajor,
}

fn orientation(layout: &Layout) -> Option<Orientation> {
    let (shape, strides) = (layout.shape(), layout.strides());
    let rank = shape.num_dims();
    let [rows, columns] = [shape[rank - 2], shape[rank - 1]];
    let [row_stride, column_stride] = [strides[rank - 2], strides[rank - 1]];
    // The batch axes must follow one another without gaps.
    let mut expected = (rows * columns) as isize;
    for axis in (0..rank - 2).rev() {
        if shape[axis] != 1 && strides[axis] != expected {
            return None;
        }
        expected *= shape[axis] as isize;
    }
    match (row_stride, column_stride) {
        (row, 1) if row == columns as isize => Some(Orientation::RowMajor),
        (1, column) if column == rows as isize => Some(Orientation::ColumnMajor),
        _ => None,
    }
}

/// Matrix `number` of a [`readable`] tensor.
fn matrix(x: &FlexTensor, number: usize) -> Mat<'_> {
    let shape = x.layout().shape();
    let rank = shape.num_dims();
    let [rows, columns] = [shape[rank - 2], shape[rank - 1]];
    let start = x.layout().start_offset() + number * rows * columns;
    let data = &x.storage::<f32>()[start..];
    match orientation(x.layout()) {
        Some(Orientation::ColumnMajor) => Mat::new(data, columns, rows).t(),
        _ => Mat::new(data, rows, columns),
    }
}
