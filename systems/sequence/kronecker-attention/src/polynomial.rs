//! Tensor attention in near-linear time for bounded entries: the exponential of every score is replaced by a polynomial,
//! whose value is a scalar product of monomial features (paper, §4).
//!
//! With `P(x) = Σ_t a_t xᵗ` and multi-indices `e` of total degree `t = |e| ≤ g`, the multinomial theorem gives
//!
//! ```text
//! P(s Σ_c q_c k1_c … kr_c) = Σ_e φ_e(q) ψ_e(k1) … ψ_e(kr)
//! φ_e(q) = a_t t!/∏ e_c! sᵗ ∏ q_c^e_c        ψ_e(k) = ∏ k_c^e_c
//! ```
//!
//! so that sums over tuples become products of sums over rows: `w_l = Σ_j ψ(K_l j)` and `M_l = Σ_j ψ(K_l j) ⊗ V_l j`.

use burn::tensor::{Device, Int, Tensor, TensorData};
use clap::ValueEnum;
use kiln_core::{Error, Result};
use serde::Serialize;

use crate::attention::AttentionOptions;

/// Rows whose features are in memory at once.
const ROWS: usize = 4096;
/// Above this degree the coefficients of a Chebyshev polynomial in powers of x lose their digits.
pub const MAX_DEGREE: usize = 12;
/// Points on which the error of a polynomial is looked at.
const GRID: usize = 4001;

/// Which polynomial stands for the exponential.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Basis {
    /// The power series around 0
    Taylor,
    /// The interpolant at Chebyshev points of the scores' range: smaller degree for the same error
    Chebyshev,
}

/// A polynomial for the exponential on a range of scores.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ExpPolynomial {
    /// `a_0 .. a_g`
    pub coefficients: Vec<f64>,
    /// The scores lie in `[-range, range]`.
    pub range: f64,
    /// `sup |P(x) / exp(x) - 1|` over the range, looked up on a fine grid.
    pub relative_error: f64,
}

impl ExpPolynomial {
    /// The polynomial of a degree on `[-range, range]`.
    ///
    /// # Errors
    /// When the degree is too high for coefficients in powers of x.
    pub fn new(basis: Basis, degree: usize, range: f64) -> Result<Self> {
        if degree > MAX_DEGREE && basis == Basis::Chebyshev {
            return Err(Error::usage(format!("degree {degree} is above {MAX_DEGREE}"))
                .hint("from there on the coefficients cancel; use --basis taylor or --impl exact"));
        }
        let coefficients = match basis {
            Basis::Taylor => taylor(degree),
            // All scores 0: nothing to interpolate between.
            Basis::Chebyshev if range == 0.0 => taylor(degree),
            Basis::Chebyshev => chebyshev(degree, range),
        };
        let error_at = |i: usize| {
            let x = range * (2.0 * i as f64 / (GRID - 1) as f64 - 1.0);
            let error = (evaluate(&coefficients, x) / x.exp() - 1.0).abs();
            // Beyond the range of f64 nothing is certain.
            if error.is_nan() { f64::INFINITY } else { error }
        };
        let relative_error = (0..GRID).map(error_at).fold(0.0, f64::max);
        Ok(Self { coefficients, range, relative_error })
    }

    /// The polynomial of the smallest degree whose [`certificate`](Self::certificate) is at most `epsilon`.
    ///
    /// # Errors
    /// When no degree up to [`MAX_DEGREE`] is enough; the message tells what that one reaches.
    pub fn within(basis: Basis, epsilon: f64, range: f64) -> Result<Self> {
        let mut best = f64::INFINITY;
        for degree in 0..=MAX_DEGREE {
            let polynomial = Self::new(basis, degree, range)?;
            if polynomial.certificate() <= epsilon {
                return Ok(polynomial);
            }
            best = best.min(polynomial.certificate());
        }
        Err(Error::usage(format!(
            "scores up to {range:.3} are too large: no polynomial of degree {MAX_DEGREE} keeps the error below {epsilon}"
        ))
        .hint(format!("degree {MAX_DEGREE} certifies {best:.1e}; use --impl exact, or scale the entries down")))
    }

    /// g
    pub fn degree(&self) -> usize {
        self.coefficients.len() - 1
    }

    /// Bound of the output's error as a multiple of `∏ |V_l|∞`: `2 ε / (1 - ε)`; infinite where the polynomial may vanish.
    pub fn certificate(&self) -> f64 {
        let epsilon = self.relative_error;
        if epsilon < 1.0 { 2.0 * epsilon / (1.0 - epsilon) } else { f64::INFINITY }
    }
}

fn taylor(degree: usize) -> Vec<f64> {
    (0..=degree)
        .scan(1.0, |factorial, t| {
            *factorial *= if t == 0 { 1.0 } else { t as f64 };
            Some(1.0 / *factorial)
        })
        .collect()
}

/// Interpolates at the Chebyshev points and turns the Chebyshev series into powers of x.
fn chebyshev(degree: usize, range: f64) -> Vec<f64> {
    let points = degree + 1;
    let angle = |i: usize| std::f64::consts::PI * (i as f64 + 0.5) / points as f64;
    let series: Vec<f64> = (0..points)
        .map(|t| {
            let sum: f64 =
                (0..points).map(|i| (range * angle(i).cos()).exp() * (t as f64 * angle(i)).cos()).sum();
            sum * if t == 0 { 1.0 } else { 2.0 } / points as f64
        })
        .collect();
    // T_0 = 1, T_1 = y, T_{t+1} = 2 y T_t - T_{t-1}, in y = x / range
    let mut coefficients = vec![0.0; points];
    let (mut before, mut now) = (vec![0.0; points], vec![0.0; points]);
    now[0] = 1.0;
    for (t, weight) in series.iter().enumerate() {
        coefficients.iter_mut().zip(&now).for_each(|(sum, c)| *sum += weight * c);
        let factor = if t == 0 { 1.0 } else { 2.0 };
        let mut next: Vec<f64> = before.iter().map(|c| -c).collect();
        for (power, c) in now.iter().enumerate().take(points - 1) {
            next[power + 1] += factor * c;
        }
        (before, now) = (now, next);
    }
    coefficients.iter().enumerate().map(|(power, c)| c / range.powi(power as i32)).collect()
}

fn evaluate(coefficients: &[f64], x: f64) -> f64 {
    coefficients.iter().rev().fold(0.0, |sum, a| sum * x + a)
}

/// The monomials of `width` variables up to a degree, each made from one of a degree less.
#[derive(Debug, Clone)]
pub struct Monomials {
    /// For every degree from 1: the places of the parents among the monomials of the degree before, and the coordinate
    /// that each is multiplied by.
    steps: Vec<(Vec<i64>, Vec<i64>)>,
    /// `t! / ∏ e_c!` of every monomial.
    multinomials: Vec<f64>,
    /// Total degree of every monomial.
    degrees: Vec<usize>,
}

impl Monomials {
    /// All monomials of `width` variables up to `degree`: `C(width + degree, degree)` of them.
    pub fn new(width: usize, degree: usize) -> Self {
        let mut monomials = Self { steps: Vec::new(), multinomials: vec![1.0], degrees: vec![0] };
        // The exponents of the degree at hand; a monomial grows only by coordinates from its last one on.
        let mut level = vec![vec![0usize; width]];
        for t in 1..=degree {
            let (mut parents, mut coordinates, mut next) = (Vec::new(), Vec::new(), Vec::new());
            for (parent, exponents) in level.iter().enumerate() {
                let last = exponents.iter().rposition(|&e| e > 0).unwrap_or(0);
                for c in last..width {
                    let mut exponents = exponents.clone();
                    exponents[c] += 1;
                    parents.push(parent as i64);
                    coordinates.push(c as i64);
                    next.push(exponents);
                }
            }
            let factorial = |n: usize| (1..=n).map(|i| i as f64).product::<f64>();
            let multinomial =
                |e: &Vec<usize>| factorial(t) / e.iter().map(|&e| factorial(e)).product::<f64>();
            monomials.multinomials.extend(next.iter().map(multinomial));
            monomials.degrees.extend(std::iter::repeat_n(t, next.len()));
            monomials.steps.push((parents, coordinates));
            level = next;
        }
        monomials
    }

    /// How many there would be: `C(width + degree, degree)`.
    pub fn count(width: usize, degree: usize) -> f64 {
        (1..=degree).map(|i| (width + i) as f64 / i as f64).product::<f64>().round()
    }

    /// ρ, their number.
    pub fn rank(&self) -> usize {
        self.degrees.len()
    }

    /// ψ of every row.
    ///
    /// # Shapes
    /// - x: `[batch, heads, rows, width]`
    /// - output: `[batch, heads, rows, rank]`
    fn features(&self, x: &Tensor<4>) -> Tensor<4> {
        let [batch, heads, rows, _] = x.dims();
        let device = x.device();
        let indices = |values: &[i64]| -> Tensor<1, Int> {
            Tensor::from_data(TensorData::new(values.to_vec(), [values.len()]), &device)
        };
        let mut level = Tensor::ones([batch, heads, rows, 1], &device);
        let mut all = vec![level.clone()];
        for (parents, coordinates) in &self.steps {
            level = level.select(3, indices(parents)) * x.clone().select(3, indices(coordinates));
            all.push(level.clone());
        }
        Tensor::cat(all, 3)
    }

    /// What turns ψ of a query into φ, `[1, 1, 1, rank]`.
    fn query_factors(&self, polynomial: &ExpPolynomial, scale: f64, device: &Device) -> Tensor<4> {
        let factor = |(&multinomial, &t): (&f64, &usize)| {
            (polynomial.coefficients[t] * multinomial * scale.powi(t as i32)) as f32
        };
        let factors: Vec<f32> = self.multinomials.iter().zip(&self.degrees).map(factor).collect();
        Tensor::from_data(TensorData::new(factors, [1, 1, 1, self.rank()]), device)
    }
}

/// Tensor attention with `polynomial` in place of the exponential, in time O(n ρ) for sequences of any length.
/// Differentiable.
///
/// # Shapes
/// - q: `[batch, heads, queries, width]`
/// - keys: r tensors `[batch, heads, rows, width]`
/// - values: r tensors `[batch, heads, rows, value width]`
/// - output: `[batch, heads, queries, value width]`
///
/// # Panics
/// When the options ask for causal attention, whose sums over tuples are not products of sums.
pub fn tensor_attention_poly(
    q: Tensor<4>,
    keys: &[Tensor<4>],
    values: &[Tensor<4>],
    options: &AttentionOptions,
    polynomial: &ExpPolynomial,
) -> Tensor<4> {
    assert!(!options.causal, "polynomial attention cannot be causal");
    let [_, _, queries, width] = q.dims();
    let monomials = Monomials::new(width, polynomial.degree());
    // A column of ones beside the values makes the normaliser come out as one more channel.
    let sums = keys.iter().zip(values).enumerate().map(|(l, (k, v))| {
        let [batch, heads, rows, _] = v.dims();
        let ones = Tensor::ones([batch, heads, rows, 1], &v.device());
        let v = Tensor::cat(vec![v.clone(), ones], 3);
        // Rows that may not be seen add nothing to either.
        let v = match options.key_masks.get(l).and_then(Option::as_ref) {
            Some(mask) => v * mask.clone().float().reshape([batch, 1, rows, 1]),
            None => v,
        };
        blocks(rows)
            .map(|(start, len)| {
                let features = monomials.features(&k.clone().narrow(2, start, len));
                features.swap_dims(2, 3).matmul(v.clone().narrow(2, start, len))
            })
            .reduce(|sum, block| sum + block)
            .expect("a key matrix has at least one row")
    });
    let sums = sums.reduce(|product, sum| product * sum).expect("the order is at least 1");

    let factors = monomials.query_factors(polynomial, options.scale, &q.device());
    let attend = |(start, len)| {
        let phi = monomials.features(&q.clone().narrow(2, start, len)) * factors.clone();
        let o = phi.matmul(sums.clone());
        let channels = o.dims()[3] - 1;
        o.clone().narrow(3, 0, channels) / o.narrow(3, channels, 1)
    };
    Tensor::cat(blocks(queries).map(attend).collect(), 2)
}

/// Starts and lengths of the blocks of so many rows.
fn blocks(rows: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..rows).step_by(ROWS).map(move |start| (start, ROWS.min(rows - start)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_of_monomials_is_the_binomial() {
        // C(4 + 6, 6) = 210, C(1 + 5, 5) = 6, C(6 + 2, 2) = 28
        for (width, degree, rank) in [(4, 6, 210), (1, 5, 6), (6, 2, 28), (3, 0, 1)] {
            assert_eq!(Monomials::new(width, degree).rank(), rank);
            assert_eq!(Monomials::count(width, degree), rank as f64);
        }
    }

    #[test]
    fn chebyshev_coefficients_interpolate_and_beat_the_power_series() {
        for degree in 0..=MAX_DEGREE {
            let chebyshev = ExpPolynomial::new(Basis::Chebyshev, degree, 2.0).unwrap();
            for i in 0..=degree {
                let x = 2.0 * (std::f64::consts::PI * (i as f64 + 0.5) / (degree + 1) as f64).cos();
                assert!(
                    (evaluate(&chebyshev.coefficients, x) - x.exp()).abs() < 1e-9,
                    "degree {degree} at {x}"
                );
            }
            let taylor = ExpPolynomial::new(Basis::Taylor, degree, 2.0).unwrap();
            if degree > 0 {
                assert!(chebyshev.relative_error < taylor.relative_error, "degree {degree}");
            }
        }
    }

    #[test]
    fn the_certificate_is_below_the_remainder_of_the_series() {
        // R^{g+1} / (g+1)! · e^{2R} bounds the relative error of the power series.
        for (degree, range) in [(2, 1.0f64), (4, 1.0), (6, 2.0), (8, 3.0)] {
            let polynomial = ExpPolynomial::new(Basis::Taylor, degree, range).unwrap();
            let factorial: f64 = (1..=degree + 1).map(|i| i as f64).product();
            let bound = range.powi(degree as i32 + 1) / factorial * (2.0 * range).exp();
            assert!(polynomial.relative_error <= bound, "{} {bound}", polynomial.relative_error);
        }
    }

    #[test]
    fn the_smallest_degree_within_an_error_is_found_or_its_lack_is_told() {
        let polynomial = ExpPolynomial::within(Basis::Chebyshev, 1e-3, 1.0).unwrap();
        assert!(polynomial.certificate() <= 1e-3);
        let lower = ExpPolynomial::new(Basis::Chebyshev, polynomial.degree() - 1, 1.0).unwrap();
        assert!(lower.certificate() > 1e-3);
        let error = ExpPolynomial::within(Basis::Chebyshev, 1e-3, 40.0).unwrap_err();
        assert!(error.to_string().contains("too large"), "{error}");
    }
}
