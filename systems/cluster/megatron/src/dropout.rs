//! Dropout that does not depend on the layout: what is dropped is decided by step, sample, layer and head.
//!
//! Activations that all tensor ranks have are dropped alike on all of them; those of a head on the rank that has the head.
//! A pass that is computed again drops the same.

use burn::tensor::{Device, Tensor};
use kiln_core::random_stream;
use kiln_ops::dropout;
use rand::RngExt;

use crate::real::{self, Real};

/// Where in the network something is dropped.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Site {
    Embedding,
    Probabilities,
    Attention,
    Mlp,
}

/// What decides the dropout of one micro-batch.
#[derive(Debug, Clone, Copy)]
pub struct DropoutKey {
    /// Probability; 0 drops nothing.
    pub probability: f64,
    /// Seed of the run.
    pub seed: u64,
    /// Step of the optimiser.
    pub step: usize,
    /// Number of the micro-batch's first sample in the whole batch.
    pub first_sample: usize,
}

impl DropoutKey {
    /// No dropout.
    pub const NONE: Self = Self { probability: 0.0, seed: 0, step: 0, first_sample: 0 };

    /// Factors, 0 or `1 / (1 - probability)`, for `samples` samples of `heads` parts of `elements` each.
    pub(crate) fn factors<T: Real>(
        &self,
        site: Site,
        layer: usize,
        samples: usize,
        heads: std::ops::Range<usize>,
        elements: usize,
        device: &Device,
    ) -> Vec<T> {
        let mut factors = Vec::with_capacity(samples * heads.len() * elements);
        for sample in self.first_sample..self.first_sample + samples {
            let mut rng =
                random_stream(self.seed, &format!("dropout {site:?} {layer} {}", self.step), sample as u64);
            let key: u64 = rng.random();
            for head in heads.clone() {
                let seed = key ^ (head as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
                let ones: Tensor<1> = real::tensor(vec![T::of(1.0); elements], [elements], device);
                real::read(&dropout(ones, self.probability, seed), |part: &[T]| {
                    factors.extend_from_slice(part)
                });
            }
        }
        factors
    }
}
