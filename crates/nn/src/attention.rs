//! Causal softmax attention with rotary positions and a key-value cache.

use burn::config::Config;
use burn::module::Module;
use burn::nn::Initializer;
use burn::tensor::{Device, Tensor};
use kiln_ops::{AttentionOptions, attention};

use crate::{Linear, LinearConfig, RotaryTable};

/// Configuration of a [`CausalSelfAttention`].
#[derive(Config, Debug)]
pub struct CausalSelfAttentionConfig {
    /// Width of input and output; a multiple of `heads`.
    pub d_model: usize,
    /// Number of heads.
    pub heads: usize,
    /// How the query, key and value projections are drawn.
    #[config(default = "Initializer::XavierUniform{gain: 1.0}")]
    pub initializer: Initializer,
    /// How the output projection, which writes into the residual stream, is drawn.
    #[config(default = "Initializer::XavierUniform{gain: 1.0}")]
    pub residual_initializer: Initializer,
}

/// Every position attends to itself and to those before it.
#[derive(Module, Debug)]
pub struct CausalSelfAttention {
    /// `[d_model, d_model]`
    pub q_proj: Linear,
    /// `[d_model, d_model]`
    pub k_proj: Linear,
    /// `[d_model, d_model]`
    pub v_proj: Linear,
    /// `[d_model, d_model]`
    pub o_proj: Linear,
    /// Number of heads.
    pub heads: usize,
}

/// Keys and values of the tokens read so far, each `[batch, heads, time, head_dim]`.
#[derive(Debug, Clone)]
pub struct KvCache {
    keys: Tensor<4>,
    values: Tensor<4>,
}

impl CausalSelfAttentionConfig {
    /// Draws the parameters.
    ///
    /// # Panics
    /// When `d_model` is not a multiple of `heads`.
    pub fn init(&self, device: &Device) -> CausalSelfAttention {
        assert_eq!(self.d_model % self.heads, 0, "{} heads must divide width {}", self.heads, self.d_model);
        let linear = |initializer: &Initializer| {
            LinearConfig::new(self.d_model, self.d_model)
                .with_bias(false)
                .with_initializer(initializer.clone())
                .init(device)
        };
        CausalSelfAttention {
            q_proj: linear(&self.initializer),
            k_proj: linear(&self.initializer),
            v_proj: linear(&self.initializer),
            o_proj: linear(&self.residual_initializer),
            heads: self.heads,
        }
    }
}

impl CausalSelfAttention {
    /// Attends over the cached positions and the new ones; returns the output of the new ones and the
    /// cache with them added.
    ///
    /// `positions` are the rotary angles of the new positions.
    ///
    /// # Shapes
    /// - x: `[batch, time, d_model]`
    /// - output: `[batch, time, d_model]`
    pub fn forward(
        &self,
        x: Tensor<3>,
        positions: &RotaryTable,
        cache: Option<KvCache>,
    ) -> (Tensor<3>, KvCache) {
        let [batch, time, d_model] = x.dims();
        let head_dim = d_model / self.heads;
        let split = |y: Tensor<3>| y.reshape([batch, time, self.heads, head_dim]).swap_dims(1, 2);

        let queries = positions.apply(split(self.q_proj.forward(x.clone())));
        let keys = positions.apply(split(self.k_proj.forward(x.clone())));
        let values = split(self.v_proj.forward(x));
        let cache = match cache {
            Some(old) => KvCache {
                keys: Tensor::cat(vec![old.keys, keys], 2),
                values: Tensor::cat(vec![old.values, values], 2),
            },
            None => KvCache { keys, values },
        };
        // The causal mask ends at the last key, so that new queries see the whole cache.
        let causal = AttentionOptions { causal: true, ..AttentionOptions::default() };
        let context = attention(queries, cache.keys.clone(), cache.values.clone(), causal);
        let output = self.o_proj.forward(context.swap_dims(1, 2).reshape([batch, time, d_model]));
        (output, cache)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Rotary;
    use crate::init::test_module;
    use burn::tensor::{Int, Tolerance};

    #[test]
    fn a_later_token_leaves_earlier_outputs_untouched() {
        let device = Device::flex();
        let layer = test_module(|device| CausalSelfAttentionConfig::new(8, 2).init(device));
        let positions = Rotary { dim: 4, base: 10_000.0 }.table(0, 5, &device);
        let x = Tensor::<1, Int>::arange(0..80, &device).float().sin().reshape([2, 5, 8]);
        let changed = x.clone().slice_assign([0..2, 4..5, 0..8], Tensor::ones([2, 1, 8], &device));
        let (a, _) = layer.forward(x, &positions, None);
        let (b, _) = layer.forward(changed, &positions, None);
        assert_eq!(a.clone().narrow(1, 0, 4).into_data(), b.clone().narrow(1, 0, 4).into_data());
        assert_ne!(a.narrow(1, 4, 1).into_data(), b.narrow(1, 4, 1).into_data());
    }

    #[test]
    fn equal_keys_average_the_values() {
        // With zero queries every weight is 1 / (t + 1): outputs are running means of the values.
        let device = Device::flex();
        let mut layer = test_module(|device| CausalSelfAttentionConfig::new(2, 1).init(device));
        let eye = || Tensor::<2>::eye(2, &device);
        layer.q_proj.weight = layer.q_proj.weight.map(|w| w.zeros_like());
        layer.v_proj.weight = layer.v_proj.weight.map(|_| eye());
        layer.o_proj.weight = layer.o_proj.weight.map(|_| eye());
        let positions = Rotary { dim: 2, base: 10_000.0 }.table(0, 3, &device);
        let x = Tensor::<3>::from_floats([[[3.0, 0.0], [1.0, 2.0], [2.0, 1.0]]], &device);
        let (y, _) = layer.forward(x, &positions, None);
        let expected = Tensor::<3>::from_floats([[[3.0, 0.0], [2.0, 1.0], [2.0, 1.0]]], &device);
        expected.into_data().assert_approx_eq::<f32>(&y.into_data(), Tolerance::absolute(1e-6));
    }
}
