//! The attention core: the heads of one rank, from their queries, keys and values to their contexts.

use burn::tensor::{Bool, Tensor};
use kiln_ops::{AttentionOptions, attention, matmul, softmax};

use crate::dropout::{DropoutKey, Site};
use crate::real::{self, Real};
use crate::tape::{gradient, leaf, pull_back};

/// Extents of a micro-batch in one layer of one rank.
#[derive(Debug, Clone)]
pub(crate) struct Heads {
    /// Samples of the micro-batch.
    pub batch: usize,
    /// Tokens of a sample.
    pub time: usize,
    /// Which of all heads are this rank's.
    pub heads: std::ops::Range<usize>,
    /// Width of a head.
    pub dim: usize,
    /// Number of the layer, for dropout.
    pub layer: usize,
}

/// What the backward pass of the core needs.
#[derive(Debug)]
pub(crate) struct CoreSaved {
    inputs: [Tensor<4>; 3],
    output: Tensor<4>,
}

impl Heads {
    /// Causal attention of every head.
    ///
    /// # Shapes
    /// - qkv: `[tokens, heads · 3 · dim]`, each head's query, key and value
    /// - output: `[tokens, heads · dim]`
    pub fn forward<T: Real>(&self, qkv: &Tensor<2>, dropout: &DropoutKey) -> (Tensor<2>, CoreSaved) {
        let Self { batch, time, dim, .. } = *self;
        let heads = self.heads.len();
        let qkv = qkv.clone().reshape([batch, time, heads, 3 * dim]);
        let part = |part: usize| leaf(qkv.clone().narrow(3, part * dim, dim).swap_dims(1, 2));
        let inputs = [part(0), part(1), part(2)];
        let [q, k, v] = inputs.clone();
        let output = if dropout.probability > 0.0 {
            self.with_dropout::<T>(q, k, v, dropout)
        } else {
            attention(q, k, v, AttentionOptions { causal: true, ..AttentionOptions::default() })
        };
        let context = output.clone().inner().swap_dims(1, 2).reshape([batch * time, heads * dim]);
        (context, CoreSaved { inputs, output })
    }

    /// The probabilities are in memory here, as some of them are dropped.
    fn with_dropout<T: Real>(
        &self,
        q: Tensor<4>,
        k: Tensor<4>,
        v: Tensor<4>,
        dropout: &DropoutKey,
    ) -> Tensor<4> {
        let Self { batch, time, dim, layer, .. } = *self;
        let device = q.device().inner();
        let shape = [batch, self.heads.len(), time, time];
        let future = Tensor::<2, Bool>::tril_mask([time, time], 0, &device).unsqueeze::<4>().expand(shape);
        let scores = matmul(q, k.swap_dims(2, 3)).mul_scalar((dim as f64).powf(-0.5));
        let probabilities = softmax(scores.mask_fill(future, f64::NEG_INFINITY), 3);
        let factors: Vec<T> =
            dropout.factors(Site::Probabilities, layer, batch, self.heads.clone(), time * time, &device);
        matmul(probabilities * real::tensor::<T, 4>(factors, shape, &device).autodiff(), v)
    }

    /// The gradient of `qkv`, given that of the contexts.
    pub fn backward(&self, saved: CoreSaved, upstream: Tensor<2>) -> Tensor<2> {
        let Self { batch, time, dim, .. } = *self;
        let heads = self.heads.len();
        let upstream = upstream.reshape([batch, time, heads, dim]).swap_dims(1, 2);
        let mut gradients = pull_back(saved.output, upstream);
        let parts = saved.inputs.iter().map(|part| gradient(part, &mut gradients).swap_dims(1, 2));
        Tensor::cat(parts.collect(), 3).reshape([batch * time, heads * 3 * dim])
    }
}
