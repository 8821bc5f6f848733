//! One sweep over the modes time, animals, pairs.

use kiln_core::Result;
use kiln_data::Matrix;

use super::missing::{Missing, cross_gram, gram_of_rows};
use super::mttkrp::{contract_pairs, contract_rows};
use super::{Descent, Factors};
use crate::tensor::{AffinityTensor, Element};

/// Keeps the division by `G[r,r]` finite for a component that has vanished.
const DAMPING: f64 = 1e-12;

/// How a factor follows from the products M of the tensor with the others, and their Gram matrices G.
pub type Update = fn(&mut Matrix, &Matrix, &[f64]);

/// A factorisation in progress.
pub struct Sweeper<'a, E> {
    tensor: &'a AffinityTensor<E>,
    missing: Option<Missing>,
    factors: Factors,
    update: Update,
    squared_norm: f64,
}

impl<'a, E: Element> Sweeper<'a, E> {
    pub fn new(tensor: &'a AffinityTensor<E>, start: Factors, update: Update) -> Result<Self> {
        let squared_norm = tensor.squared_norm()?;
        Ok(Self { tensor, missing: Missing::of(tensor), factors: start.absorbed(), update, squared_norm })
    }

    /// `‖x − x̂‖ / ‖x‖` over observed entries, from `⟨x, x̂⟩ = Σ m[p,r] c[p,r]` and the norms.
    fn error(&self, observed: &Matrix) -> f64 {
        let Factors { time: a, animals: b, pairs: c, .. } = &self.factors;
        let inner: f64 = observed.values.iter().zip(&c.values).map(|(m, c)| m * c).sum();
        let aa = gram(a);
        let mut model: f64 = hadamard(&hadamard(&aa, &gram(b)), &gram(c)).iter().sum();
        if let Some(missing) = &self.missing {
            for (b, gram) in b.values.chunks(b.columns).zip(missing.grams(c)) {
                let entries = gram.iter().zip(&aa).enumerate();
                model -= entries.map(|(qr, (s, a))| s * a * b[qr / b.len()] * b[qr % b.len()]).sum::<f64>();
            }
        }
        ((self.squared_norm - 2.0 * inner + model).max(0.0) / self.squared_norm).sqrt()
    }
}

impl<E: Element> Descent for Sweeper<'_, E> {
    fn factors(&self) -> Factors {
        self.factors.clone()
    }

    /// Updates the three factors in turn; the relative error afterwards.
    fn sweep(&mut self) -> Result<f64> {
        let rank = self.factors.rank();
        let animals = self.tensor.animals;
        let old = self.missing.as_ref().map(|_| self.factors.clone());
        let Factors { time: a, animals: b, pairs: c, .. } = &mut self.factors;

        let y = contract_pairs(self.tensor, c)?; // [T·W, R]
        let missing_grams = self.missing.as_ref().map(|missing| missing.grams(c));
        let cc = gram(c);

        // m_a[t,r] = Σ_w b[w,r] y[t,w,r]
        let mut m = Matrix::new(a.rows, rank, vec![0.0; a.rows * rank]);
        for (m, y) in m.values.chunks_mut(rank).zip(y.values.chunks(animals * rank)) {
            for (b, y) in b.values.chunks(rank).zip(y.chunks(rank)) {
                (0..rank).for_each(|r| m[r] += b[r] * y[r]);
            }
        }
        if let Some(grams) = &missing_grams {
            // Σ_w b[w,r] b[w,q] s_w[q,r], then times a[t,q]
            let mut within = vec![0.0; rank * rank];
            for (b, gram) in b.values.chunks(rank).zip(grams) {
                (0..rank * rank).for_each(|qr| within[qr] += b[qr / rank] * b[qr % rank] * gram[qr]);
            }
            add_product(&mut m, a, &within);
        }
        (self.update)(a, &m, &hadamard(&gram(b), &cc));

        // m_b[w,r] = Σ_t a[t,r] y[t,w,r]
        let mut m = Matrix::new(animals, rank, vec![0.0; animals * rank]);
        for (a, y) in a.values.chunks(rank).zip(y.values.chunks(animals * rank)) {
            for (m, y) in m.values.chunks_mut(rank).zip(y.chunks(rank)) {
                (0..rank).for_each(|r| m[r] += a[r] * y[r]);
            }
        }
        // Σ_t a_old[t,q] a[t,r]: what the old reconstruction needs of the new time factor
        let turned =
            old.as_ref().map(|old| cross_gram(old.time.values.chunks(rank).zip(a.values.chunks(rank)), rank));
        if let (Some(grams), Some(turned)) = (&missing_grams, &turned) {
            for ((m, b), gram) in m.values.chunks_mut(rank).zip(b.values.chunks(rank)).zip(grams) {
                for (qr, (gram, turned)) in gram.iter().zip(turned).enumerate() {
                    m[qr % rank] += b[qr / rank] * gram * turned;
                }
            }
        }
        (self.update)(b, &m, &hadamard(&gram(a), &cc));

        let rows = a
            .values
            .chunks(rank)
            .flat_map(|a| b.values.chunks(rank).flat_map(move |b| a.iter().zip(b).map(|(a, b)| a * b)));
        let h = Matrix::new(a.rows * animals, rank, rows.collect());
        let observed = contract_rows(self.tensor, &h)?; // [P, R]
        let mut m = observed.clone();
        if let (Some(missing), Some(old), Some(turned)) = (&self.missing, &old, &turned) {
            missing.add_to_pairs(&mut m, old, b, turned);
        }
        (self.update)(c, &m, &hadamard(&gram(a), &gram(b)));
        Ok(self.error(&observed))
    }
}

/// `F[:,r] ← max(0, F[:,r] + (M[:,r] − F G[:,r]) / G[r,r])`, columns in order, each seeing those before it.
pub fn hals(factor: &mut Matrix, m: &Matrix, g: &[f64]) {
    let rank = factor.columns;
    for (row, m) in factor.values.chunks_mut(rank).zip(m.values.chunks(rank)) {
        for r in 0..rank {
            let product: f64 = row.iter().zip(&g[r * rank..]).map(|(f, g)| f * g).sum(); // G is symmetric
            row[r] = (row[r] + (m[r] - product) / (g[r * rank + r] + DAMPING)).max(0.0);
        }
    }
}

/// `F ← F ∘ M / (F G)`
pub fn multiplicative(factor: &mut Matrix, m: &Matrix, g: &[f64]) {
    let rank = factor.columns;
    for (row, m) in factor.values.chunks_mut(rank).zip(m.values.chunks(rank)) {
        let product = |r: usize| row.iter().zip(&g[r * rank..]).map(|(f, g)| f * g).sum::<f64>();
        let products: Vec<f64> = (0..rank).map(product).collect();
        for ((f, m), product) in row.iter_mut().zip(m).zip(products) {
            *f *= m / (product + DAMPING);
        }
    }
}

fn gram(matrix: &Matrix) -> Vec<f64> {
    gram_of_rows(matrix.values.chunks(matrix.columns), matrix.columns)
}

fn hadamard(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a * b).collect()
}

/// `m[i,r] += Σ_q f[i,q] k[q,r]`
fn add_product(m: &mut Matrix, f: &Matrix, k: &[f64]) {
    let rank = f.columns;
    for (m, f) in m.values.chunks_mut(rank).zip(f.values.chunks(rank)) {
        for (f, k) in f.iter().zip(k.chunks(rank)) {
            m.iter_mut().zip(k).for_each(|(m, k)| *m += f * k);
        }
    }
}
