//! Pairs that an animal lacks, by expectation–maximisation: at the start of a sweep they take the values of the current
//! reconstruction. Those are never written down, as their part in every sum follows from small matrices.

use kiln_data::Matrix;

use super::Factors;
use crate::tensor::{AffinityTensor, Element};

/// The missing pairs of every animal.
#[derive(Debug)]
pub struct Missing(Vec<Vec<usize>>);

impl Missing {
    /// Of a tensor; `None` when nothing is missing.
    pub fn of<E: Element>(tensor: &AffinityTensor<E>) -> Option<Self> {
        let lacks = |w: usize| (0..tensor.pairs).filter(|&p| !tensor.has(w, p)).collect();
        let missing: Vec<Vec<usize>> = (0..tensor.animals).map(lacks).collect();
        missing.iter().any(|pairs| !pairs.is_empty()).then_some(Self(missing))
    }

    /// `s_w[q,r] = Σ_p c[p,q] c[p,r]` over the pairs that each animal lacks, `[W][R · R]`.
    pub fn grams(&self, c: &Matrix) -> Vec<Vec<f64>> {
        let gram = |pairs: &Vec<usize>| gram_of_rows(pairs.iter().map(|&p| c.row(p)), c.columns);
        self.0.iter().map(gram).collect()
    }

    /// Adds `Σ x̂[t,w,p] a[t,r] b[w,r]` over missing entries to `m[p,r]`, where x̂ comes from `old` and `ka[q,r]` is
    /// `Σ_t a_old[t,q] a[t,r]`.
    pub fn add_to_pairs(&self, m: &mut Matrix, old: &Factors, b: &Matrix, ka: &[f64]) {
        let rank = b.columns;
        for (w, pairs) in self.0.iter().enumerate() {
            // t[q,r] = b_old[w,q] ka[q,r] b[w,r]
            let t: Vec<f64> = (0..rank * rank)
                .map(|qr| old.animals.at(w, qr / rank) * ka[qr] * b.at(w, qr % rank))
                .collect();
            for &p in pairs {
                let row = &mut m.values[p * rank..(p + 1) * rank];
                for (c, t) in old.pairs.row(p).iter().zip(t.chunks(rank)) {
                    row.iter_mut().zip(t).for_each(|(m, t)| *m += c * t);
                }
            }
        }
    }
}

/// `Σ row ⊗ row`, `[R · R]`.
pub fn gram_of_rows<'a>(rows: impl Iterator<Item = &'a [f64]>, rank: usize) -> Vec<f64> {
    cross_gram(rows.map(|row| (row, row)), rank)
}

/// `Σ left ⊗ right`, `[R · R]`.
pub fn cross_gram<'a>(rows: impl Iterator<Item = (&'a [f64], &'a [f64])>, rank: usize) -> Vec<f64> {
    let mut gram = vec![0.0; rank * rank];
    for (left, right) in rows {
        for (q, left) in left.iter().enumerate() {
            gram[q * rank..(q + 1) * rank]
                .iter_mut()
                .zip(right)
                .for_each(|(sum, right)| *sum += left * right);
        }
    }
    gram
}
