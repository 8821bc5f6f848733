//! Which of the two algorithms suits given matrices, and why.

use burn::tensor::Tensor;
use kiln_core::Result;
use serde::Serialize;

use crate::polynomial::{Basis, ExpPolynomial, Monomials};

/// The way to compute tensor attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Algorithm {
    /// All tuples, blockwise.
    Exact,
    /// Monomial features.
    Poly,
}

/// What both algorithms cost on given matrices, a head.
#[derive(Debug, Clone, Serialize)]
pub struct Plan {
    /// r
    pub order: usize,
    /// Rows of the queries.
    pub queries: usize,
    /// Columns of queries and keys.
    pub width: usize,
    /// B, the largest absolute entry of queries and keys.
    pub largest_entry: f64,
    /// B once the columns of the matrices are rescaled against each other, which leaves every score as it is.
    pub balanced_entry: f64,
    /// R, a bound of every score: `s Σ_c max|Q_c| max|K1_c| … max|Kr_c|`, which no rescaling of columns changes.
    pub score_bound: f64,
    /// What `s d B^{r+1}` would give, without looking at columns.
    pub plain_score_bound: f64,
    /// The error that is asked for.
    pub epsilon: f64,
    /// g, the smallest degree that certifies it; `None` where none does.
    pub degree: Option<usize>,
    /// ρ, the number of monomials; `None` as above.
    pub rank: Option<usize>,
    /// The certified error at that degree, as a multiple of `∏ |V_l|∞`.
    pub certificate: Option<f64>,
    /// The rank that the power series would need instead of the Chebyshev interpolant.
    pub taylor_rank: Option<usize>,
    /// Multiplications of the exact algorithm.
    pub exact_operations: f64,
    /// Multiplications of the polynomial one.
    pub poly_operations: Option<f64>,
    /// The cheaper algorithm that is within the error.
    pub recommended: Algorithm,
}

/// Compares the two algorithms on given matrices, `[batch, heads, rows, width]` each.
///
/// # Errors
/// When no polynomial can be made at all.
pub fn plan(
    q: &Tensor<4>,
    keys: &[Tensor<4>],
    values: &[Tensor<4>],
    scale: f64,
    basis: Basis,
    epsilon: f64,
) -> Result<Plan> {
    let (order, [_, _, queries, width]) = (keys.len(), q.dims());
    let maxima = column_maxima(q, keys);
    let largest_entry = maxima.iter().flatten().copied().fold(0.0, f64::max);
    let largest_product = products(&maxima).into_iter().fold(0.0, f64::max);
    let score_bound = score_bound(q, keys, scale);

    let polynomial = ExpPolynomial::within(basis, epsilon, score_bound).ok();
    let rank = |polynomial: &ExpPolynomial| Monomials::count(width, polynomial.degree()) as usize;
    let taylor = ExpPolynomial::within(Basis::Taylor, epsilon, score_bound).ok();
    let recommended = polynomial.as_ref().map_or(Algorithm::Exact, |p| cheaper(q, keys, values, p));
    Ok(Plan {
        order,
        queries,
        width,
        largest_entry,
        balanced_entry: largest_product.powf(1.0 / (order + 1) as f64),
        score_bound,
        plain_score_bound: scale.abs() * width as f64 * largest_entry.powi(order as i32 + 1),
        epsilon,
        degree: polynomial.as_ref().map(ExpPolynomial::degree),
        rank: polynomial.as_ref().map(rank),
        certificate: polynomial.as_ref().map(ExpPolynomial::certificate),
        taylor_rank: taylor.as_ref().map(rank),
        exact_operations: exact_operations(q, keys, values),
        poly_operations: polynomial.as_ref().map(|p| poly_operations(q, keys, values, rank(p))),
        recommended,
    })
}

/// A bound of every score: `s Σ_c max|Q_c| max|K1_c| … max|Kr_c|`.
pub fn score_bound(q: &Tensor<4>, keys: &[Tensor<4>], scale: f64) -> f64 {
    scale.abs() * products(&column_maxima(q, keys)).iter().sum::<f64>()
}

/// The algorithm with fewer multiplications.
pub fn cheaper(
    q: &Tensor<4>,
    keys: &[Tensor<4>],
    values: &[Tensor<4>],
    polynomial: &ExpPolynomial,
) -> Algorithm {
    let rank = Monomials::count(q.dims()[3], polynomial.degree()) as usize;
    let poly = poly_operations(q, keys, values, rank);
    if poly < exact_operations(q, keys, values) { Algorithm::Poly } else { Algorithm::Exact }
}

/// Multiplications of the exact algorithm, a head.
pub fn exact_operations(q: &Tensor<4>, keys: &[Tensor<4>], values: &[Tensor<4>]) -> f64 {
    let tuples: f64 = keys.iter().map(|k| k.dims()[2] as f64).product();
    q.dims()[2] as f64 * tuples * (q.dims()[3] + values[0].dims()[3]) as f64
}

/// Multiplications with so many monomials, a head.
fn poly_operations(q: &Tensor<4>, keys: &[Tensor<4>], values: &[Tensor<4>], rank: usize) -> f64 {
    let rows = q.dims()[2] + keys.iter().map(|k| k.dims()[2]).sum::<usize>();
    (rows * rank * (values[0].dims()[3] + 2)) as f64
}

/// The largest absolute value of every column of the queries and of each key matrix.
fn column_maxima(q: &Tensor<4>, keys: &[Tensor<4>]) -> Vec<Vec<f64>> {
    let of_matrix = |x: &Tensor<4>| {
        let width = x.dims()[3];
        let columns = x.clone().detach().abs().reshape([-1, width as isize]).max_dim(0);
        columns.into_data().iter::<f64>().collect()
    };
    std::iter::once(q).chain(keys).map(of_matrix).collect()
}

/// The products over the matrices, column by column.
fn products(maxima: &[Vec<f64>]) -> Vec<f64> {
    let width = maxima[0].len();
    (0..width).map(|c| maxima.iter().map(|maxima| maxima[c]).product()).collect()
}

/// For every order the largest B whose scores (scale `1/d`, so `R = B^{r+1}`) a polynomial approximates within `epsilon`
/// with at most `√n` monomials of `width` variables: the higher the order, the smaller the admissible entries.
///
/// # Errors
/// When no polynomial can be made at all.
pub fn admissible_entries(
    n: usize,
    width: usize,
    epsilon: f64,
    orders: &[usize],
) -> Result<Vec<(usize, f64)>> {
    let most = (n as f64).sqrt();
    let fits = |range: f64| {
        ExpPolynomial::within(Basis::Chebyshev, epsilon, range)
            .is_ok_and(|p| Monomials::count(width, p.degree()) <= most)
    };
    // The needed degree grows with the range: bisect the largest range that fits.
    let (mut low, mut high) = (0.0, 64.0);
    for _ in 0..40 {
        let middle = 0.5 * (low + high);
        if fits(middle) { low = middle } else { high = middle }
    }
    Ok(orders.iter().map(|&order| (order, low.powf(1.0 / (order + 1) as f64))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;

    #[test]
    fn balancing_columns_tightens_the_bound_of_entries_and_not_that_of_scores() {
        let device = Device::flex();
        let q = Tensor::<4>::from_floats([[[[4.0, 0.5], [-4.0, 0.25]]]], &device);
        let k = Tensor::<4>::from_floats([[[[0.5, 2.0], [0.25, -2.0]]]], &device);
        let plan = plan(&q, &[k.clone(), k.clone()], &[k.clone(), k], 0.5, Basis::Chebyshev, 1e-3).unwrap();
        assert_eq!(plan.largest_entry, 4.0);
        // Columns: 4 · 0.5 · 0.5 = 1 and 0.5 · 2 · 2 = 2.
        assert!((plan.balanced_entry - 2f64.cbrt()).abs() < 1e-12);
        assert_eq!(plan.score_bound, 1.5);
        assert_eq!(plan.plain_score_bound, 64.0);
        assert!(plan.rank < plan.taylor_rank, "{plan:?}");
    }

    #[test]
    fn large_entries_leave_only_the_exact_algorithm() {
        let x = Tensor::<4>::full([1, 1, 10, 4], 9.0, &Device::flex());
        let both = [x.clone(), x.clone()];
        let plan = plan(&x, &both, &both, 0.25, Basis::Chebyshev, 1e-3).unwrap();
        assert_eq!((plan.degree, plan.recommended), (None, Algorithm::Exact));
    }

    #[test]
    fn the_higher_the_order_the_smaller_the_admissible_entries() {
        let entries = admissible_entries(100_000, 4, 1e-2, &[1, 2, 3, 4]).unwrap();
        assert!(entries[0].1 > 1.0, "{entries:?}");
        assert!(entries.windows(2).all(|pair| pair[1].1 < pair[0].1), "{entries:?}");
    }
}
