//! The gated feed-forward layer (Shazeer, "GLU Variants Improve Transformer", arXiv 2002.05202).

use burn::config::Config;
use burn::module::Module;
use burn::nn::Initializer;
use burn::tensor::{Device, Tensor};
use kiln_ops::{Activation, gated};

use crate::{Linear, LinearConfig};

/// Configuration of a [`SwiGlu`].
#[derive(Config, Debug)]
pub struct SwiGluConfig {
    /// Width of input and output.
    pub d_model: usize,
    /// Width between the projections.
    pub hidden: usize,
    /// How the gate and up projections are drawn.
    #[config(default = "Initializer::XavierUniform{gain: 1.0}")]
    pub initializer: Initializer,
    /// How the down projection, which writes into the residual stream, is drawn.
    #[config(default = "Initializer::XavierUniform{gain: 1.0}")]
    pub residual_initializer: Initializer,
}

/// `down( silu(gate(x)) * up(x) )`, without biases.
#[derive(Module, Debug)]
pub struct SwiGlu {
    /// `[d_model, hidden]`
    pub gate_proj: Linear,
    /// `[d_model, hidden]`
    pub up_proj: Linear,
    /// `[hidden, d_model]`
    pub down_proj: Linear,
}

impl SwiGluConfig {
    /// Draws the parameters.
    pub fn init(&self, device: &Device) -> SwiGlu {
        let inward = LinearConfig::new(self.d_model, self.hidden)
            .with_bias(false)
            .with_initializer(self.initializer.clone());
        let outward = LinearConfig::new(self.hidden, self.d_model)
            .with_bias(false)
            .with_initializer(self.residual_initializer.clone());
        SwiGlu {
            gate_proj: inward.init(device),
            up_proj: inward.init(device),
            down_proj: outward.init(device),
        }
    }
}

impl SwiGlu {
    /// Applies the layer.
    ///
    /// # Shapes
    /// - x: `[..., d_model]`
    /// - output: `[..., d_model]`
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let gate = self.gate_proj.forward(x.clone());
        self.down_proj.forward(gated(gate, self.up_proj.forward(x), Activation::Silu))
    }
}

/// The usual hidden width: two thirds of `d * ratio`, rounded up to a multiple of 256.
///
/// Two thirds, because the gate is a third matrix; so the layer has as many parameters as a plain one
/// with hidden width `d * ratio`.
pub fn swiglu_hidden(d: usize, ratio: f64) -> usize {
    ((d as f64 * ratio * 2.0 / 3.0) as usize).div_ceil(256) * 256
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hidden_width_matches_published_models() {
        assert_eq!(swiglu_hidden(1024, 4.0), 2816);
        assert_eq!(swiglu_hidden(2048, 4.0), 5632);
        assert_eq!(swiglu_hidden(64, 4.0), 256);
    }

    #[test]
    fn forward_is_the_gated_product() {
        let device = Device::flex();
        let layer = crate::init::test_module(|device| SwiGluConfig::new(2, 3).init(device));
        let x = Tensor::<2>::from_floats([[0.5, -1.0]], &device);
        let weight = |linear: &Linear| linear.weight.val();
        let gate = x.clone().matmul(weight(&layer.gate_proj));
        let by_hand = (gate.clone() / (gate.neg().exp() + 1.0) * x.clone().matmul(weight(&layer.up_proj)))
            .matmul(weight(&layer.down_proj));
        by_hand
            .into_data()
            .assert_approx_eq::<f32>(&layer.forward(x).into_data(), burn::tensor::Tolerance::absolute(1e-6));
    }
}
