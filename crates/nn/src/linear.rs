//! The linear layer.

use burn::config::Config;
use burn::module::{Module, Param};
use burn::nn::Initializer;
use burn::tensor::{Device, Tensor};
use kiln_ops::{Activation, linear};

/// Configuration of a [`Linear`] layer.
#[derive(Config, Debug)]
pub struct LinearConfig {
    /// Width of the input.
    pub d_input: usize,
    /// Width of the output.
    pub d_output: usize,
    /// Whether a bias is added.
    #[config(default = true)]
    pub bias: bool,
    /// How weight and bias are drawn; by default uniformly within `1 / √d_input` of 0.
    #[config(default = "Initializer::KaimingUniform{gain: 1.0 / 3.0f64.sqrt(), fan_out_only: false}")]
    pub initializer: Initializer,
}

/// `x W + b`; a replacement of [`burn::nn::Linear`] with the same parameters.
#[derive(Module, Debug)]
pub struct Linear {
    /// `[d_input, d_output]`
    pub weight: Param<Tensor<2>>,
    /// `[d_output]`
    pub bias: Option<Param<Tensor<1>>>,
}

impl LinearConfig {
    /// Draws the parameters.
    pub fn init(&self, device: &Device) -> Linear {
        let fans = (Some(self.d_input), Some(self.d_output));
        let bias = || self.initializer.init_with([self.d_output], fans.0, fans.1, device);
        Linear {
            weight: self.initializer.init_with([self.d_input, self.d_output], fans.0, fans.1, device),
            bias: self.bias.then(bias),
        }
    }
}

impl Linear {
    /// Applies the layer.
    ///
    /// # Shapes
    /// - x: `[..., d_input]`
    /// - output: `[..., d_output]`
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        self.forward_activated(x, Activation::Identity)
    }

    /// Applies the layer and an activation, in one pass over the output.
    ///
    /// # Shapes
    /// - x: `[..., d_input]`
    /// - output: `[..., d_output]`
    pub fn forward_activated<const D: usize>(&self, x: Tensor<D>, activation: Activation) -> Tensor<D> {
        linear(x, self.weight.val(), self.bias.as_ref().map(Param::val), activation)
    }
}
