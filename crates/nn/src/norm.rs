//! Layer norm and RMS norm over the last axis.

use burn::config::Config;
use burn::module::{Module, Param};
use burn::nn::Initializer;
use burn::tensor::{Device, Tensor};

/// Configuration of a [`LayerNorm`].
#[derive(Config, Debug)]
pub struct LayerNormConfig {
    /// Width of the input.
    pub d_model: usize,
    /// Added to the variance.
    #[config(default = 1e-5)]
    pub epsilon: f64,
    /// Whether a bias is added.
    #[config(default = true)]
    pub bias: bool,
}

/// `(x - mean) / √(variance + ε) · gamma + beta`; a replacement of [`burn::nn::LayerNorm`] with the same
/// parameters.
#[derive(Module, Debug)]
pub struct LayerNorm {
    /// `[d_model]`
    pub gamma: Param<Tensor<1>>,
    /// `[d_model]`
    pub beta: Option<Param<Tensor<1>>>,
    epsilon: f64,
}

impl LayerNormConfig {
    /// A norm with scale 1 and shift 0.
    pub fn init(&self, device: &Device) -> LayerNorm {
        LayerNorm {
            gamma: Initializer::Ones.init([self.d_model], device),
            beta: self.bias.then(|| Initializer::Zeros.init([self.d_model], device)),
            epsilon: self.epsilon,
        }
    }
}

impl LayerNorm {
    /// Applies the norm.
    ///
    /// # Shapes
    /// - x, output: `[..., d_model]`
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        kiln_ops::layer_norm(x, self.gamma.val(), self.beta.as_ref().map(Param::val), self.epsilon)
    }
}

/// Configuration of an [`RmsNorm`].
#[derive(Config, Debug)]
pub struct RmsNormConfig {
    /// Width of the input.
    pub d_model: usize,
    /// Added to the mean square.
    #[config(default = 1e-5)]
    pub epsilon: f64,
}

/// `x / √(mean of x² + ε) · gamma`; a replacement of [`burn::nn::RmsNorm`] with the same parameters.
#[derive(Module, Debug)]
pub struct RmsNorm {
    /// `[d_model]`
    pub gamma: Param<Tensor<1>>,
    epsilon: f64,
}

impl RmsNormConfig {
    /// A norm with scale 1.
    ///
    /// # Panics
    /// When epsilon is not positive.
    pub fn init(&self, device: &Device) -> RmsNorm {
        assert!(self.epsilon > 0.0, "epsilon must be positive, not {}", self.epsilon);
        RmsNorm { gamma: Initializer::Ones.init([self.d_model], device), epsilon: self.epsilon }
    }
}

impl RmsNorm {
    /// Applies the norm.
    ///
    /// # Shapes
    /// - x, output: `[..., d_model]`
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        kiln_ops::rms_norm(x, self.gamma.val(), self.epsilon)
    }
}
