//! Multiplicative updates of the Kullback–Leibler divergence (Lee and Seung 2001), mode by mode.

use kiln_core::Result;

use super::loss::{Loss, quotients};
use super::{Descent, Factors};
use crate::tensor::{AffinityTensor, Element};

/// Keeps the quotient finite for a component that has vanished.
const DAMPING: f64 = 1e-12;

/// A factorisation in progress.
pub struct Divergence<'a, E> {
    tensor: &'a AffinityTensor<E>,
    factors: Factors,
    /// Observed entries.
    entries: f64,
}

impl<'a, E: Element> Divergence<'a, E> {
    pub fn new(tensor: &'a AffinityTensor<E>, start: Factors) -> Self {
        Self { tensor, factors: start.absorbed(), entries: tensor.observed() as f64 }
    }
}

impl<E: Element> Descent for Divergence<'_, E> {
    /// `F ← F ∘ Σ x / m / Σ 1`, both sums over the observed entries and times the other factors; the mean loss afterwards.
    fn sweep(&mut self) -> Result<f64> {
        for mode in 0..3 {
            let [above, below] = quotients(self.tensor, &self.factors)?;
            let factor = self.factors.modes_mut()[mode].values.iter_mut();
            let quotients = above[mode].values.iter().zip(&below[mode].values);
            for (f, (above, below)) in factor.zip(quotients) {
                *f *= above / (below + DAMPING);
            }
        }
        Ok(Loss::Poisson.total(self.tensor, &self.factors)? / self.entries)
    }

    fn factors(&self) -> Factors {
        self.factors.clone()
    }
}
