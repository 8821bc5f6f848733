//! The two passes over the tensor that a sweep makes, without a Khatri–Rao product.
//!
//! The factors of pairs do not change between the updates of time and of animals, so one contraction serves both:
//! `y[t,w,r] = Σ_p x[t,w,p] c[p,r]`. The update of pairs needs `m[p,r] = Σ_tw x[t,w,p] a[t,r] b[w,r]`. Both are products
//! of the tensor, seen as a matrix of `T·W` rows, with a narrow matrix, summed in f64.

use kiln_core::Result;
use kiln_data::Matrix;
use kiln_ops::simd;
use rayon::prelude::*;

use crate::tensor::{AffinityTensor, Element};

/// Components that are summed side by side.
const LANES: usize = 8;
/// Rows of the tensor that share what is loaded of the factor.
const ROWS: usize = 4;
/// Pairs whose sums stay in the nearest cache: 512 · 8 · 8 bytes.
const PAIRS: usize = 512;
/// Rows of the tensor that one task takes.
const ROWS_OF_TASK: usize = 64;

/// `y[t,w,r] = Σ_p x[t,w,p] c[p,r]`, as `[T·W, R]`.
///
/// # Errors
/// When the tensor lies in a file that cannot be read.
pub fn contract_pairs<E: Element>(tensor: &AffinityTensor<E>, c: &Matrix) -> Result<Matrix> {
    let rank = c.columns;
    let lanes = in_lanes(c);
    let mut y = vec![0.0; tensor.frames * tensor.animals * rank];
    tensor.pass(|first, x| {
        let y = &mut y[first * rank..][..x.len() / tensor.pairs * rank];
        let tasks = y.par_chunks_mut(ROWS_OF_TASK * rank).zip(x.par_chunks(ROWS_OF_TASK * tensor.pairs));
        tasks.for_each(|(y, x)| {
            simd(
                #[inline(always)]
                || contract_rows_of_task(y, x, tensor.pairs, rank, &lanes),
            )
        });
        Ok(())
    })?;
    Ok(Matrix::new(tensor.frames * tensor.animals, rank, y))
}

#[inline(always)]
fn contract_rows_of_task<E: Element>(
    y: &mut [f64],
    x: &[E],
    pairs: usize,
    rank: usize,
    lanes: &[Vec<[f64; LANES]>],
) {
    for (y, x) in y.chunks_mut(ROWS * rank).zip(x.chunks(ROWS * pairs)) {
        for (group, c) in lanes.iter().enumerate() {
            let components = group * LANES..((group + 1) * LANES).min(rank);
            let mut keep = |row: usize, sums: [f64; LANES]| {
                y[row * rank..][components.clone()].copy_from_slice(&sums[..components.len()]);
            };
            if x.len() == ROWS * pairs {
                let sums = dots::<E, ROWS>(std::array::from_fn(|row| &x[row * pairs..][..pairs]), c);
                sums.into_iter().enumerate().for_each(|(row, sums)| keep(row, sums));
            } else {
                for (row, x) in x.chunks(pairs).enumerate() {
                    let [sums] = dots::<E, 1>([x], c);
                    keep(row, sums);
                }
            }
        }
    }
}

/// The products of N rows with the columns of one group.
#[inline(always)]
fn dots<E: Element, const N: usize>(rows: [&[E]; N], c: &[[f64; LANES]]) -> [[f64; LANES]; N] {
    let mut sums = [[0.0; LANES]; N];
    let rows = rows.map(|row| &row[..c.len()]);
    for (p, c) in c.iter().enumerate() {
        for (sums, row) in sums.iter_mut().zip(&rows) {
            let x = row[p].widen();
            for (sum, c) in sums.iter_mut().zip(c) {
                *sum = x.mul_add(*c, *sum);
            }
        }
    }
    sums
}

/// `m[p,r] = Σ_q x[q,p] h[q,r]` over the `T·W` rows q of the tensor, as `[P, R]`.
///
/// # Errors
/// When the tensor lies in a file that cannot be read.
pub fn contract_rows<E: Element>(tensor: &AffinityTensor<E>, h: &Matrix) -> Result<Matrix> {
    let (rank, pairs) = (h.columns, tensor.pairs);
    let lanes = in_lanes(h);
    let mut m = vec![0.0; pairs * rank];
    tensor.pass(|first, x| {
        let rows = first..first + x.len() / pairs;
        m.par_chunks_mut(PAIRS * rank).enumerate().for_each(|(block, m)| {
            let mut sums = vec![[0.0; LANES]; m.len() / rank];
            for (group, h) in lanes.iter().enumerate() {
                sums.fill([0.0; LANES]);
                simd(
                    #[inline(always)]
                    || add_rows(&mut sums, &x[block * PAIRS..], pairs, &h[rows.clone()]),
                );
                let components = group * LANES..((group + 1) * LANES).min(rank);
                for (m, sums) in m.chunks_mut(rank).zip(&sums) {
                    m[components.clone()].iter_mut().zip(sums).for_each(|(m, sum)| *m += sum);
                }
            }
        });
        Ok(())
    })?;
    Ok(Matrix::new(pairs, rank, m))
}

/// Adds all rows of the tensor, each times its row of `h`, for as many pairs as there are sums.
#[inline(always)]
fn add_rows<E: Element>(sums: &mut [[f64; LANES]], x: &[E], pairs: usize, h: &[[f64; LANES]]) {
    let count = sums.len();
    let row = |q: usize| &x[q * pairs..][..count];
    let whole = h.len() / ROWS * ROWS;
    for q in (0..whole).step_by(ROWS) {
        let rows: [&[E]; ROWS] = std::array::from_fn(|i| row(q + i));
        let h: [[f64; LANES]; ROWS] = std::array::from_fn(|i| h[q + i]);
        add_block(sums, rows, h);
    }
    for (q, h) in h.iter().enumerate().skip(whole) {
        add_block(sums, [row(q)], [*h]);
    }
}

#[inline(always)]
fn add_block<E: Element, const N: usize>(sums: &mut [[f64; LANES]], rows: [&[E]; N], h: [[f64; LANES]; N]) {
    let rows = rows.map(|row| &row[..sums.len()]);
    for (p, sums) in sums.iter_mut().enumerate() {
        for (row, h) in rows.iter().zip(&h) {
            let x = row[p].widen();
            for (sum, h) in sums.iter_mut().zip(h) {
                *sum = x.mul_add(*h, *sum);
            }
        }
    }
}

/// The columns of a matrix in groups of eight, the last filled up with zeros.
fn in_lanes(matrix: &Matrix) -> Vec<Vec<[f64; LANES]>> {
    let group = |start: usize| {
        let rows = matrix.values.chunks(matrix.columns);
        let lane = |row: &[f64]| std::array::from_fn(|i| row.get(start + i).copied().unwrap_or(0.0));
        rows.map(lane).collect()
    };
    (0..matrix.columns).step_by(LANES).map(group).collect()
}

#[cfg(test)]
mod tests {
    use rand::RngExt;

    use super::*;

    /// Extents that fill neither blocks of rows nor of pairs nor groups of components.
    #[test]
    fn both_contractions_are_the_plain_sums() {
        let (frames, animals, pairs, rank) = (23, 3, 2 * PAIRS + 77, LANES + 3);
        let mut rng = kiln_core::random_stream(0, "mttkrp", 0);
        let mut draw = |n: usize| (0..n).map(|_| rng.random::<f64>()).collect::<Vec<f64>>();
        let values = draw(frames * animals * pairs);
        let tensor = AffinityTensor::new([frames, animals, pairs], values.clone(), None);
        let c = Matrix::new(pairs, rank, draw(pairs * rank));
        let h = Matrix::new(frames * animals, rank, draw(frames * animals * rank));
        let (y, m) = (contract_pairs(&tensor, &c).unwrap(), contract_rows(&tensor, &h).unwrap());
        let x = |q: usize, p: usize| values[q * pairs + p];
        for r in 0..rank {
            for q in 0..y.rows {
                let plain: f64 = (0..pairs).map(|p| x(q, p) * c.at(p, r)).sum();
                assert!((y.at(q, r) - plain).abs() < 1e-10 * plain);
            }
            for p in 0..pairs {
                let plain: f64 = (0..h.rows).map(|q| x(q, p) * h.at(q, r)).sum();
                assert!((m.at(p, r) - plain).abs() < 1e-10 * plain);
            }
        }
    }
}
