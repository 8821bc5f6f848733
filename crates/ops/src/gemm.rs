//! Matrix products over slices, by `faer`.

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};

/// A matrix in a slice; rows may lie further apart than they are long.
#[derive(Debug, Clone, Copy)]
pub struct Mat<'a>(MatRef<'a, f32>);

impl<'a> Mat<'a> {
    /// `rows × columns`, rows one after another.
    pub fn new(data: &'a [f32], rows: usize, columns: usize) -> Self {
        Self(MatRef::from_row_major_slice(&data[..rows * columns], rows, columns))
    }

    /// `rows × columns`, the start of each row `stride` elements after that of the one before.
    pub fn strided(data: &'a [f32], rows: usize, columns: usize, stride: usize) -> Self {
        let needed = if rows == 0 { 0 } else { (rows - 1) * stride + columns };
        Self(MatRef::from_row_major_slice_with_stride(&data[..needed], rows, columns, stride))
    }

    /// The transpose, without moving anything.
    pub fn t(self) -> Self {
        Self(self.0.transpose())
    }
}

/// What happens to the old contents of a product's destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Out {
    /// They are overwritten.
    Set,
    /// The product is added to them.
    Add,
}

/// `out = a b` or `out += a b`, where `out` is row-major with rows `stride` elements apart; on one thread.
///
/// # Panics
/// When the shapes do not fit.
pub fn gemm(out: &mut [f32], stride: usize, mode: Out, a: Mat<'_>, b: Mat<'_>) {
    multiply(out, stride, mode, a, b, 1);
}

/// Multiplications that outweigh waking another thread.
const WORTH_SHARING: usize = 3 << 20;

/// As [`gemm`], on all threads where that is faster.
///
/// # Panics
/// When the shapes do not fit.
pub fn gemm_parallel(out: &mut [f32], stride: usize, mode: Out, a: Mat<'_>, b: Mat<'_>) {
    multiply(out, stride, mode, a, b, worthwhile_pieces(a, b));
}

/// As [`gemm_parallel`] with [`Out::Set`] into rows that follow one another; every finished part of a row is handed
/// to `finish`, with the place of its first element in `out`, while it is in a cache.
///
/// # Panics
/// When the shapes do not fit.
pub fn gemm_finished(out: &mut [f32], a: Mat<'_>, b: Mat<'_>, finish: &(impl Fn(usize, &mut [f32]) + Sync)) {
    let (rows, columns) = (a.0.nrows(), b.0.ncols());
    assert_eq!(a.0.ncols(), b.0.nrows(), "inner extents of a matrix product must agree");
    if rows == 0 || columns == 0 {
        return;
    }
    let last =
        |mut part: MatMut<'_, f32>, [row, column]: [usize; 2], a: MatRef<'_, f32>, b: MatRef<'_, f32>| {
            matmul(part.as_mut(), Accum::Replace, a, b, 1.0, Par::Seq);
            for (i, row_values) in part.row_iter_mut().enumerate() {
                let values = row_values.try_as_row_major_mut().expect("rows of the output lie side by side");
                finish((row + i) * columns + column, values.as_slice_mut());
            }
        };
    divide(whole(out, rows, columns, columns), [0, 0], a.0, b.0, worthwhile_pieces(a, b), &last);
}

/// Into how many pieces to divide a product: twice as many as threads, for a thread that is slower than the others.
fn worthwhile_pieces(a: Mat<'_>, b: Mat<'_>) -> usize {
    let work = a.0.nrows() * a.0.ncols() * b.0.ncols();
    (2 * work / WORTH_SHARING).min(2 * rayon::current_num_threads())
}

fn multiply(out: &mut [f32], stride: usize, mode: Out, a: Mat<'_>, b: Mat<'_>, pieces: usize) {
    let (rows, columns) = (a.0.nrows(), b.0.ncols());
    assert_eq!(a.0.ncols(), b.0.nrows(), "inner extents of a matrix product must agree");
    if rows == 0 || columns == 0 {
        return;
    }
    let accumulate = match mode {
        Out::Set => Accum::Replace,
        Out::Add => Accum::Add,
    };
    divide(whole(out, rows, columns, stride), [0, 0], a.0, b.0, pieces, &|out, _, a, b| {
        matmul(out, accumulate, a, b, 1.0, Par::Seq);
    });
}

/// A matrix with rows `stride` elements apart.
fn whole(out: &mut [f32], rows: usize, columns: usize, stride: usize) -> MatMut<'_, f32> {
    let out = &mut out[..(rows - 1) * stride + columns];
    // faer 0.24 swaps the strides in its row-major constructor with a stride; the transpose of a column-major view is the same matrix.
    MatMut::from_column_major_slice_with_stride_mut(out, columns, rows, stride).transpose_mut()
}

/// Halves the longer side of the product until there are enough pieces, and hands each to `compute` on one thread, with the
/// row and column where it starts.
fn divide<F>(
    out: MatMut<'_, f32>,
    start @ [row, column]: [usize; 2],
    a: MatRef<'_, f32>,
    b: MatRef<'_, f32>,
    pieces: usize,
    compute: &F,
) where
    F: Fn(MatMut<'_, f32>, [usize; 2], MatRef<'_, f32>, MatRef<'_, f32>) + Sync,
{
    if pieces < 2 {
        return compute(out, start, a, b);
    }
    let (rows, columns) = (out.nrows(), out.ncols());
    if rows >= columns {
        let (top, bottom) = out.split_at_row_mut(rows / 2);
        let (a_top, a_bottom) = a.split_at_row(rows / 2);
        rayon::join(
            || divide(top, start, a_top, b, pieces / 2, compute),
            || divide(bottom, [row + rows / 2, column], a_bottom, b, pieces / 2, compute),
        );
    } else {
        let (left, right) = out.split_at_col_mut(columns / 2);
        let (b_left, b_right) = b.split_at_col(columns / 2);
        rayon::join(
            || divide(left, start, a, b_left, pieces / 2, compute),
            || divide(right, [row, column + columns / 2], a, b_right, pieces / 2, compute),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_with_strides_and_transposes_match_the_definition() {
        let (m, k, n) = (5, 7, 3);
        let a: Vec<f32> = (0..m * 9).map(|i| (i % 11) as f32 - 4.0).collect();
        let b: Vec<f32> = (0..n * k).map(|i| (i % 5) as f32 * 0.5).collect();
        let mut out = vec![1.0; m * 4];
        gemm(&mut out, 4, Out::Add, Mat::strided(&a, m, k, 9), Mat::new(&b, n, k).t());
        for i in 0..m {
            for j in 0..n {
                let exact: f32 = (0..k).map(|l| a[i * 9 + l] * b[j * k + l]).sum();
                assert_eq!(out[i * 4 + j], exact + 1.0);
            }
            if i + 1 < m {
                assert_eq!(out[i * 4 + 3], 1.0, "what lies between rows is left alone");
            }
        }
    }

    #[test]
    fn shared_products_equal_those_of_one_thread() {
        for (m, k, n) in [(300, 130, 200), (7, 400, 2500), (2500, 400, 7), (1, 3000, 3000)] {
            let a: Vec<f32> = (0..m * k).map(|i| (i % 13) as f32 * 0.25 - 1.0).collect();
            let b: Vec<f32> = (0..k * n).map(|i| (i % 7) as f32 - 3.0).collect();
            let [mut alone, mut shared] = [vec![0.5; m * n], vec![0.5; m * n]];
            gemm(&mut alone, n, Out::Add, Mat::new(&a, m, k), Mat::new(&b, k, n));
            gemm_parallel(&mut shared, n, Out::Add, Mat::new(&a, m, k), Mat::new(&b, k, n));
            // All terms are multiples of a quarter, so that every order of summation is exact.
            assert_eq!(alone, shared);
        }
    }

    #[test]
    fn every_element_is_finished_once_at_its_place() {
        for (m, k, n) in [(300, 130, 200), (7, 400, 2500), (3, 2, 1)] {
            let a: Vec<f32> = (0..m * k).map(|i| (i % 13) as f32 * 0.25 - 1.0).collect();
            let b: Vec<f32> = (0..k * n).map(|i| (i % 7) as f32 - 3.0).collect();
            let [mut plain, mut finished] = [vec![0.0; m * n], vec![0.0; m * n]];
            gemm(&mut plain, n, Out::Set, Mat::new(&a, m, k), Mat::new(&b, k, n));
            gemm_finished(&mut finished, Mat::new(&a, m, k), Mat::new(&b, k, n), &|at, values| {
                values.iter_mut().zip(at..).for_each(|(value, at)| *value += at as f32);
            });
            let expected: Vec<f32> = plain.iter().zip(0..).map(|(value, at)| value + at as f32).collect();
            assert_eq!(finished, expected);
        }
    }

    #[test]
    fn empty_products_do_nothing() {
        gemm(&mut [], 0, Out::Set, Mat::new(&[], 0, 3), Mat::new(&[0.0; 6], 3, 2));
        let mut out = [2.0];
        gemm(&mut out, 1, Out::Set, Mat::new(&[], 1, 0), Mat::new(&[], 0, 1));
        assert_eq!(out, [0.0]);
    }
}
