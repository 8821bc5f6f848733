//! How far a factorisation is from the tensor, entry by entry, and the slope of that in all factors: the generalised CP
//! decomposition of Hong, Kolda and Duersch (arXiv 1808.07452).

use clap::ValueEnum;
use kiln_core::{Error, Result};
use kiln_data::Matrix;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::Factors;
use crate::tensor::{AffinityTensor, Element};

/// Keeps logarithms and quotients of the model finite.
const LEAST: f64 = 1e-10;
/// Parts that the rows of a tensor are divided into; as many sums are kept side by side.
const PARTS: usize = 16;

/// What is minimised over the observed entries x, with m those of the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Loss {
    /// (x − m)²
    #[default]
    Squared,
    /// m − x ln m, as for counts; the Kullback–Leibler divergence up to a constant
    Poisson,
    /// x / m + ln m, as for positive values whose spread grows with them
    Gamma,
}

impl Loss {
    #[inline(always)]
    fn value(self, x: f64, m: f64) -> f64 {
        match self {
            Self::Squared => (x - m) * (x - m),
            Self::Poisson => m - x * (m + LEAST).ln(),
            Self::Gamma => x / (m + LEAST) + (m + LEAST).ln(),
        }
    }

    /// Its derivative by m.
    #[inline(always)]
    fn slope(self, x: f64, m: f64) -> f64 {
        match self {
            Self::Squared => 2.0 * (m - x),
            Self::Poisson => 1.0 - x / (m + LEAST),
            Self::Gamma => (1.0 - x / (m + LEAST)) / (m + LEAST),
        }
    }

    /// Makes sure that the loss is defined for a tensor.
    ///
    /// # Errors
    /// Names the first observed entry that it is not defined for.
    pub fn check<E: Element>(self, tensor: &AffinityTensor<E>) -> Result<()> {
        if self != Self::Gamma {
            return Ok(());
        }
        tensor.pass(|first, rows| {
            for (row, values) in rows.chunks(tensor.pairs).enumerate() {
                let (t, w) = ((first + row) / tensor.animals, (first + row) % tensor.animals);
                let is_zero = |&p: &usize| values[p].widen() == 0.0 && tensor.has(w, p);
                if let Some(p) = (0..tensor.pairs).find(is_zero) {
                    return Err(Error::input(
                        &tensor.place,
                        format!("the entry [{t}, {w}, {p}] is 0, for which the gamma loss has no minimum"),
                    )
                    .hint("affinities are 0 where neurons are at rest; use --loss squared or poisson"));
                }
            }
            Ok(())
        })
    }

    /// The loss summed over the observed entries.
    pub fn total<E: Element>(self, tensor: &AffinityTensor<E>, factors: &Factors) -> Result<f64> {
        Ok(pass(tensor, factors, |x, m| (self.value(x, m), 0.0))?.0)
    }

    /// The same, and its gradient in the factors of time, animals and pairs; weights count as 1.
    pub fn gradient<E: Element>(
        self,
        tensor: &AffinityTensor<E>,
        factors: &Factors,
    ) -> Result<(f64, [Matrix; 3])> {
        pass(tensor, factors, |x, m| (self.value(x, m), self.slope(x, m)))
    }
}

/// `Σ x / m` and `Σ 1` over the observed entries, each times the other two factors: the quotients of the multiplicative update
/// of the Kullback–Leibler divergence.
pub fn quotients<E: Element>(tensor: &AffinityTensor<E>, factors: &Factors) -> Result<[[Matrix; 3]; 2]> {
    let (_, above) = pass(tensor, factors, |x, m| (0.0, x / (m + LEAST)))?;
    let (_, below) = pass(tensor, factors, |_, _| (0.0, 1.0))?;
    Ok([above, below])
}

/// Sums over the observed entries: the first of what `of(x, m)` gives, and of the second, y, the products
/// `Σ y[t,w,p] b[w,r] c[p,r]`, `Σ y a[t,r] c[p,r]` and `Σ y a[t,r] b[w,r]`. The entries of y are never kept.
fn pass<E: Element>(
    tensor: &AffinityTensor<E>,
    factors: &Factors,
    of: impl Fn(f64, f64) -> (f64, f64) + Sync,
) -> Result<(f64, [Matrix; 3])> {
    let (rank, animals, pairs) = (factors.rank(), tensor.animals, tensor.pairs);
    let part = |first: usize, values: &[E]| {
        let mut sums = Sums::new([values.len() / (animals * pairs), animals, pairs], rank);
        let (mut joint, mut contracted) = (vec![0.0; rank], vec![0.0; rank]);
        for (row, values) in values.chunks(pairs).enumerate() {
            let (t, w) = ((first + row) / animals, row % animals);
            let (a, b) = (factors.time.row(t), factors.animals.row(w));
            joint.iter_mut().zip(a.iter().zip(b)).for_each(|(joint, (a, b))| *joint = a * b);
            contracted.fill(0.0);
            let rows = values.iter().zip(factors.pairs.values.chunks(rank)).zip(sums.pairs.chunks_mut(rank));
            for (_, ((x, c), d_c)) in rows.enumerate().filter(|(p, _)| tensor.has(w, *p)) {
                let m: f64 = joint.iter().zip(c).map(|(joint, c)| joint * c).sum();
                let (value, y) = of(x.widen(), m);
                sums.total += value;
                if y != 0.0 {
                    for r in 0..rank {
                        contracted[r] += y * c[r];
                        d_c[r] += y * joint[r];
                    }
                }
            }
            let (d_a, d_b) = (&mut sums.time[row / animals * rank..], &mut sums.animals[w * rank..]);
            for r in 0..rank {
                d_a[r] += b[r] * contracted[r];
                d_b[r] += a[r] * contracted[r];
            }
        }
        sums
    };
    let add = |sum: &mut Vec<f64>, more: &[f64]| sum.iter_mut().zip(more).for_each(|(sum, x)| *sum += x);
    let mut all = Sums::new([0, animals, pairs], rank);
    tensor.pass(|first, rows| {
        let rows_of_part = (rows.len() / pairs / animals).div_ceil(PARTS) * animals;
        let parts = rows.par_chunks(rows_of_part * pairs).enumerate();
        let parts: Vec<Sums> = parts.map(|(at, values)| part(first + at * rows_of_part, values)).collect();
        for part in &parts {
            all.total += part.total;
            all.time.extend(&part.time);
            add(&mut all.animals, &part.animals);
            add(&mut all.pairs, &part.pairs);
        }
        Ok(())
    })?;
    let matrix = |rows: usize, values: Vec<f64>| Matrix::new(rows, rank, values);
    Ok((all.total, [matrix(tensor.frames, all.time), matrix(animals, all.animals), matrix(pairs, all.pairs)]))
}

/// What one part adds.
struct Sums {
    total: f64,
    time: Vec<f64>,
    animals: Vec<f64>,
    pairs: Vec<f64>,
}

impl Sums {
    fn new(extents: [usize; 3], rank: usize) -> Self {
        let [time, animals, pairs] = extents.map(|rows| vec![0.0; rows * rank]);
        Self { total: 0.0, time, animals, pairs }
    }
}

#[cfg(test)]
mod tests {
    use rand::RngExt;

    use super::*;

    #[test]
    fn the_gradient_is_the_slope_of_the_loss_with_and_without_missing_pairs() {
        let [frames, animals, pairs, rank] = [19, 2, 6, 3];
        let mut rng = kiln_core::random_stream(0, "gcp", 0);
        let mut draw = |n: usize| (0..n).map(|_| rng.random_range(0.2..1.0)).collect::<Vec<f64>>();
        let values = draw(frames * animals * pairs);
        let mut matrix = |rows: usize| Matrix::new(rows, rank, draw(rows * rank));
        let (time, of_animals, of_pairs) = (matrix(frames), matrix(animals), matrix(pairs));
        let factors = Factors { time, animals: of_animals, pairs: of_pairs, weights: vec![1.0; rank] };
        let some: Vec<bool> = (0..animals * pairs).map(|at| at % 5 != 1).collect();
        for mask in [None, Some(some)] {
            let tensor = AffinityTensor::new([frames, animals, pairs], values.clone(), mask);
            for loss in [Loss::Squared, Loss::Poisson, Loss::Gamma] {
                let (total, gradient) = loss.gradient(&tensor, &factors).unwrap();
                assert!((total - loss.total(&tensor, &factors).unwrap()).abs() < 1e-9);
                for (mode, of_mode) in gradient.iter().enumerate() {
                    for at in (0..of_mode.values.len()).step_by(5) {
                        let moved = |by: f64| {
                            let mut moved = factors.clone();
                            moved.modes_mut()[mode].values[at] += by;
                            loss.total(&tensor, &moved).unwrap()
                        };
                        let slope = (moved(1e-6) - moved(-1e-6)) / 2e-6;
                        let found = of_mode.values[at];
                        assert!(
                            (found - slope).abs() < 1e-5 * (1.0 + slope.abs()),
                            "{loss:?}: {found}, {slope}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn the_gamma_loss_names_an_entry_of_zero_that_was_observed() {
        let mut tensor = AffinityTensor::new([1, 1, 3], vec![1.0, 0.0, 2.0f64], None);
        assert!(Loss::Gamma.check(&tensor).unwrap_err().to_string().contains("[0, 0, 1]"));
        assert!(Loss::Poisson.check(&tensor).is_ok());
        tensor.mask = Some(vec![true, false, true]);
        assert!(Loss::Gamma.check(&tensor).is_ok());
    }
}
