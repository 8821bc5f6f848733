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
    let work = a.0.nrows() * a.0.ncols() * b.0.ncols();
    // Twice as many pieces as threads, for a thread that is slower than the others.
    let pieces = (2 * work / WORTH_SHARING).min(2 * rayon::current_num_threads());
    multiply(out, stride, mode, a, b, pieces);
}

fn multiply(out: &mut [f32], stride: usize, mode: Out, a: Mat<'_>, b: Mat<'_>, pieces: usize) {
    let (rows, columns) = (a.0.nrows(), b.0.ncols());
    assert_eq!(a.0.ncols(), b.0.nrows(), "inner extents of a matrix product must agree");
    if rows == 0 || columns == 0 {
        return;
    }
    let out = &mut out[..(rows - 1) * stride + columns];
    // faer 0.24 swaps the strides in its row-major constructor with a stride; the transpose of a column-major view is the same matrix.
    let out = MatMut::from_column_major_slice_with_stride_mut(out, columns, rows, stride).transpose_mut();
    let accumulate = match mode {
        Out::Set => Accum::Replace,
        Out::Add => Accum::Add,
    };
    divide(out, accumulate, a.0, b.0, pieces);
}

/// Halves the longer side of the product until there are enough pieces, and computes each on one thread.
fn divide(out: MatMut<'_, f32>, accumulate: Accum, a: MatRef<'_, f32>, b: MatRef<'_, f32>, pieces: usize) {
    if pieces < 2 {
        return matmul(out, accumulate, a, b, 1.0, Par::Seq);
    }
    let (rows, columns) = (out.nrows(), out.ncols());
    if rows >= columns {
        let (top, bottom) = out.split_at_row_mut(rows / 2);
        let (a_top, a_bottom) = a.split_at_row(rows / 2);
        rayon::join(
            || divide(top, accumulate, a_top, b, pieces / 2),
            || divide(bottom, accumulate, a_bottom, b, pieces / 2),
        );
    } else {
        let (left, right) = out.split_at_col_mut(columns / 2);
        let (b_left, b_right) = b.split_at_col(columns / 2);
        rayon::join(
            || divide(left, accumulate, a, b_left, pieces / 2),
            || divide(right, accumulate, a, b_right, pieces / 2),
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
    fn empty_products_do_nothing() {
        gemm(&mut [], 0, Out::Set, Mat::new(&[], 0, 3), Mat::new(&[0.0; 6], 3, 2));
        let mut out = [2.0];
        gemm(&mut out, 1, Out::Set, Mat::new(&[], 1, 0), Mat::new(&[], 0, 1));
        assert_eq!(out, [0.0]);
    }
}
