//! Multi-head tensor attention as a layer.

use burn::module::Module;
use burn::nn::Initializer;
use burn::tensor::{Bool, Device, Tensor};
use clap::ValueEnum;
use kiln_core::{Error, Result};
use kiln_nn::{Dropout, DropoutConfig, Linear, LinearConfig};
use serde::{Deserialize, Serialize};

use crate::attention::{AttentionOptions, MAX_ORDER, tensor_attention};
use crate::plan::{self, Algorithm};
use crate::polynomial::{Basis, ExpPolynomial, tensor_attention_poly};

/// The error, as a multiple of the values, that a polynomial in a layer must certify.
const EPSILON: f64 = 1e-3;

/// How a layer computes attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Implementation {
    /// Over all tuples
    Exact,
    /// By monomial features wherever some degree certifies an error of 1e-3, however costly
    Poly,
    /// Whichever is cheaper for the entries at hand, within a certified error of 1e-3
    Auto,
}

/// Configuration of a [`KroneckerAttention`] layer.
#[derive(Debug, Clone, PartialEq)]
pub struct KroneckerAttentionConfig {
    /// Width of input and output.
    pub d_model: usize,
    /// Heads; divides `d_model`.
    pub heads: usize,
    /// Tokens in a tuple, r; 1 is ordinary attention.
    pub order: usize,
    /// Factor of the scores; `None` is the paper's `1 / head width`.
    pub scale: Option<f64>,
    /// How it is computed.
    pub implementation: Implementation,
    /// Whether a token sees only tuples of tokens up to itself.
    pub causal: bool,
    /// Probability that a channel of the heads' outputs is dropped in training.
    pub dropout: f64,
}

impl KroneckerAttentionConfig {
    /// Pairs of tokens, computed exactly.
    pub fn new(d_model: usize, heads: usize) -> Self {
        Self {
            d_model,
            heads,
            order: 2,
            scale: None,
            implementation: Implementation::Exact,
            causal: false,
            dropout: 0.0,
        }
    }

    /// Tuples of `order` tokens.
    pub fn with_order(mut self, order: usize) -> Self {
        self.order = order;
        self
    }

    /// Another factor of the scores.
    pub fn with_scale(mut self, scale: Option<f64>) -> Self {
        self.scale = scale;
        self
    }

    /// Another way to compute it.
    pub fn with_impl(mut self, implementation: Implementation) -> Self {
        self.implementation = implementation;
        self
    }

    /// A token sees only tuples of tokens up to itself.
    pub fn with_causal(mut self, causal: bool) -> Self {
        self.causal = causal;
        self
    }

    /// Drops channels of the heads' outputs in training. The weights of tuples themselves, which are never in memory, are
    /// not dropped.
    pub fn with_dropout(mut self, dropout: f64) -> Self {
        self.dropout = dropout;
        self
    }

    /// Checks that the numbers fit.
    ///
    /// # Errors
    /// Names those that do not.
    pub fn check(&self) -> Result<()> {
        if self.heads == 0 || self.d_model == 0 || !self.d_model.is_multiple_of(self.heads) {
            let message = format!("{} heads do not divide the width {}", self.heads, self.d_model);
            return Err(Error::usage(message).hint("choose --dim as a multiple of --heads"));
        }
        if !(1..=MAX_ORDER).contains(&self.order) {
            return Err(Error::usage(format!("order {} is not 1 to {MAX_ORDER}", self.order))
                .hint("the exact cost grows as n^(order + 1)"));
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return Err(Error::usage(format!("the dropout {} is not in [0, 1)", self.dropout)));
        }
        if self.causal && self.implementation == Implementation::Poly {
            return Err(Error::usage("polynomial attention cannot be causal").hint("use --impl exact"));
        }
        Ok(())
    }

    /// Draws the parameters. Queries and keys keep the variance of the input: with small projections the score, a product
    /// of r + 1 of them, and its gradient would vanish, and the layer would not begin to learn.
    pub fn init(&self, device: &Device) -> KroneckerAttention {
        let d = self.d_model;
        let std = (d as f64).sqrt().recip();
        let projection = || {
            let config = LinearConfig::new(d, d).with_bias(false);
            config.with_initializer(Initializer::Normal { mean: 0.0, std }).init(device)
        };
        KroneckerAttention {
            q_proj: projection(),
            k_projs: (0..self.order).map(|_| projection()).collect(),
            v_projs: (0..self.order).map(|_| projection()).collect(),
            o_proj: projection(),
            dropout: DropoutConfig::new(self.dropout).init(),
            config: self.clone(),
        }
    }
}

/// Attention in which every token looks at tuples of tokens.
#[derive(Module, Debug)]
pub struct KroneckerAttention {
    /// Queries.
    pub q_proj: Linear,
    /// r key projections.
    pub k_projs: Vec<Linear>,
    /// r value projections.
    pub v_projs: Vec<Linear>,
    /// Output.
    pub o_proj: Linear,
    /// Before the output projection.
    pub dropout: Dropout,
    #[module(skip)]
    config: KroneckerAttentionConfig,
}

impl KroneckerAttention {
    /// Applies the layer; `mask [batch, n]` is true where a token may be seen.
    ///
    /// # Shapes
    /// - x, output: `[batch, n, d_model]`
    pub fn forward(&self, x: Tensor<3>, mask: Option<Tensor<2, Bool>>) -> Tensor<3> {
        let tuples = x.clone();
        self.forward_cross(x, tuples, mask)
    }

    /// Applies the layer with tuples from another sequence than the queries.
    ///
    /// # Shapes
    /// - x, output: `[batch, n, d_model]`
    /// - tuples: `[batch, m, d_model]`, mask: `[batch, m]`
    pub fn forward_cross(&self, x: Tensor<3>, tuples: Tensor<3>, mask: Option<Tensor<2, Bool>>) -> Tensor<3> {
        let [batch, n, d] = x.dims();
        let (q, keys, values) = self.project(x, &tuples);
        let o = self.attend(q, &keys, &values, &self.options(mask));
        self.o_proj.forward(self.dropout.forward(o.swap_dims(1, 2).reshape([batch, n, d])))
    }

    /// Queries, keys and values by heads, `[batch, heads, n, head width]`.
    pub(crate) fn project(
        &self,
        x: Tensor<3>,
        tuples: &Tensor<3>,
    ) -> (Tensor<4>, Vec<Tensor<4>>, Vec<Tensor<4>>) {
        let split = |x: Tensor<3>| {
            let [batch, n, d] = x.dims();
            x.reshape([batch, n, self.config.heads, d / self.config.heads]).swap_dims(1, 2)
        };
        let of_tuples = |projections: &[Linear]| -> Vec<Tensor<4>> {
            projections.iter().map(|projection| split(projection.forward(tuples.clone()))).collect()
        };
        (split(self.q_proj.forward(x)), of_tuples(&self.k_projs), of_tuples(&self.v_projs))
    }

    pub(crate) fn options(&self, mask: Option<Tensor<2, Bool>>) -> AttentionOptions {
        let head_width = self.config.d_model / self.config.heads;
        let scale = self.config.scale.unwrap_or(1.0 / head_width as f64);
        let options = AttentionOptions::new(scale).causal(self.config.causal);
        match mask {
            Some(mask) => options.masked(mask, self.config.order),
            None => options,
        }
    }

    fn attend(
        &self,
        q: Tensor<4>,
        keys: &[Tensor<4>],
        values: &[Tensor<4>],
        options: &AttentionOptions,
    ) -> Tensor<4> {
        if self.config.implementation == Implementation::Exact || options.causal {
            return tensor_attention(q, keys, values, options);
        }
        let range = plan::score_bound(&q, keys, options.scale);
        let certified = ExpPolynomial::within(Basis::Chebyshev, EPSILON, range).ok();
        let forced = self.config.implementation == Implementation::Poly;
        let wanted = |p: &ExpPolynomial| forced || plan::cheaper(&q, keys, values, p) == Algorithm::Poly;
        match certified.filter(wanted) {
            Some(polynomial) => tensor_attention_poly(q, keys, values, options, &polynomial),
            None => tensor_attention(q, keys, values, options),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::TensorData;

    #[test]
    fn dropout_thins_training_only() {
        let device = Device::flex();
        let x: Vec<f32> = (0..40).map(|i| (i as f32).sin()).collect();
        let x = Tensor::<3>::from_data(TensorData::new(x, [1, 5, 8]), &device);
        let outputs = |dropout: f64| {
            let layer = KroneckerAttentionConfig::new(8, 2).with_dropout(dropout).init(&device);
            let same = |layer: &KroneckerAttention| {
                layer.forward(x.clone(), None).into_data().try_to_vec::<f32>().unwrap()
            };
            let evaluated = same(&layer);
            (evaluated, same(&layer.train()))
        };
        let (evaluated, trained) = outputs(0.0);
        assert_eq!(evaluated, trained);
        let (evaluated, trained) = outputs(0.5);
        assert_ne!(evaluated, trained);
        assert!(KroneckerAttentionConfig::new(8, 2).with_dropout(1.0).check().is_err());
    }
}
