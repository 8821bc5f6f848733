//! Match3: which tokens take part in a triple whose sum is 0 modulo M, by one head of tensor attention with weights in
//! closed form.

use burn::tensor::{Device, Tensor, TensorData};
use clap::ValueEnum;
use kiln_core::{Error, Result};
use rand::{Rng, RngExt};
use serde::{Deserialize, Serialize};

use crate::attention::{AttentionOptions, tensor_attention};

/// Which triples count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Convention {
    /// Indices may coincide
    Any,
    /// Three different tokens
    Distinct,
}

/// A sequence of residues.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Instance {
    /// The modulus.
    #[serde(rename = "M")]
    pub modulus: u64,
    /// Residues below the modulus.
    pub x: Vec<u64>,
}

impl Instance {
    /// `n` residues drawn uniformly.
    pub fn draw(n: usize, modulus: u64, rng: &mut impl Rng) -> Self {
        Self { modulus, x: (0..n).map(|_| rng.random_range(0..modulus)).collect() }
    }

    /// Makes sure that it can be solved; `place` says where it comes from.
    ///
    /// # Errors
    /// When the modulus is below 2, there is no token, or a token is not below the modulus.
    pub fn check(&self, place: impl std::fmt::Display) -> Result<()> {
        if self.modulus < 2 {
            return Err(Error::input(
                place,
                format!("the modulus M is {}, must be at least 2", self.modulus),
            ));
        }
        if self.x.is_empty() {
            return Err(Error::input(place, "\"x\" has no tokens"));
        }
        match self.x.iter().position(|&x| x >= self.modulus) {
            Some(at) => {
                let found =
                    format!("token {at} is {}, must be below the modulus {}", self.x[at], self.modulus);
                Err(Error::input(place, found))
            }
            None => Ok(()),
        }
    }

    /// The labels by enumeration of all pairs of partners.
    pub fn labels(&self, convention: Convention) -> Vec<bool> {
        let n = self.x.len();
        let counts = |i: usize, j: usize, k: usize| match convention {
            Convention::Any => true,
            Convention::Distinct => i != j && i != k && j != k,
        };
        let sums_to_0 = |i: usize, j: usize, k: usize| {
            let sum = u128::from(self.x[i]) + u128::from(self.x[j]) + u128::from(self.x[k]);
            sum.is_multiple_of(u128::from(self.modulus))
        };
        (0..n).map(|i| (0..n).any(|j| (j..n).any(|k| counts(i, j, k) && sums_to_0(i, j, k)))).collect()
    }
}

/// One head that answers [`Convention::Any`].
///
/// With the angle `a = 2π x/M` of a token the trilinear form of its query and two keys is `c cos(a_i + a_j + a_k)`, at its
/// maximum iff the sum is 0 modulo M. A blank pair scores half-way between that and the next lower value, so that it
/// takes all the weight unless there is a match; `c` makes the matter clear-cut for n² pairs.
#[derive(Debug, Clone, Copy)]
pub struct MatchConstruction {
    /// M
    pub modulus: u64,
}

impl MatchConstruction {
    /// Near 1 for each token with a match, near 0 for the others.
    pub fn solve(&self, tokens: &[u64], device: &Device) -> Vec<f32> {
        let n = tokens.len();
        let m = self.modulus as f64;
        let sharpness = 4.0 * m * m * (4.0 * (n * n) as f64).ln() / std::f64::consts::PI.powi(2);
        let blank = 0.5 * (1.0 + (2.0 * std::f64::consts::PI / m).cos());
        let rows = |of_token: &dyn Fn(f64, f64) -> [f64; 5], of_blank: [f64; 5]| {
            let of_tokens = tokens.iter().flat_map(|&x| {
                let angle = 2.0 * std::f64::consts::PI * x as f64 / m;
                of_token(angle.cos(), angle.sin())
            });
            let values: Vec<f32> = of_blank.into_iter().chain(of_tokens).map(|x| x as f32).collect();
            Tensor::<4>::from_data(TensorData::new(values, [1, 1, n + 1, 5]), device)
        };
        let q = rows(&|c, s| [c, -c, -s, -s, 1.0].map(|x| x * sharpness), [0.0; 5]);
        // cos(a_i + a_j + a_k) = CCC - CSS - SCS - SSC
        let k1 = rows(&|c, s| [c, s, c, s, 0.0], [0.0, 0.0, 0.0, 0.0, 1.0]);
        let k2 = rows(&|c, s| [c, s, s, c, 0.0], [0.0, 0.0, 0.0, 0.0, blank]);
        let mut seen = vec![1.0f32; n + 1];
        seen[0] = 0.0;
        let v = Tensor::<4>::from_data(TensorData::new(seen, [1, 1, n + 1, 1]), device);
        let o = tensor_attention(q, &[k1, k2], &[v.clone(), v], &AttentionOptions::new(1.0));
        o.into_data().iter::<f32>().skip(1).collect()
    }
}
