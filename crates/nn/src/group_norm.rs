//! Group normalisation (Wu and He, arXiv 1803.08494) and instance normalisation (Ulyanov et al.,
//! arXiv 1607.08022).

use burn::config::Config;
use burn::module::{Module, Param};
use burn::nn::Initializer;
use burn::tensor::{Device, Tensor};
use kiln_ops::group_norm;

/// Configuration of a [`GroupNorm`].
#[derive(Config, Debug)]
pub struct GroupNormConfig {
    /// Number of groups; divides the channels.
    pub num_groups: usize,
    /// Number of channels.
    pub num_channels: usize,
    /// Added to the variance.
    #[config(default = 1e-5)]
    pub epsilon: f64,
    /// Whether there are γ and β.
    #[config(default = true)]
    pub affine: bool,
}

/// `(x - mean) / √(variance + ε) γ + β` with the statistics of each image's groups of channels.
#[derive(Module, Debug)]
pub struct GroupNorm {
    /// γ, `[num_channels]`
    pub gamma: Option<Param<Tensor<1>>>,
    /// β, `[num_channels]`
    pub beta: Option<Param<Tensor<1>>>,
    /// Number of groups.
    pub num_groups: usize,
    /// Number of channels.
    pub num_channels: usize,
    /// Added to the variance.
    pub epsilon: f64,
    /// Whether there are γ and β.
    pub affine: bool,
}

impl GroupNormConfig {
    /// The layer with γ = 1 and β = 0.
    ///
    /// # Panics
    /// When the groups do not divide the channels.
    pub fn init(&self, device: &Device) -> GroupNorm {
        assert!(
            self.num_groups > 0 && self.num_channels.is_multiple_of(self.num_groups),
            "{} groups must divide {} channels",
            self.num_groups,
            self.num_channels
        );
        let parameter = |drawn: Initializer| self.affine.then(|| drawn.init([self.num_channels], device));
        GroupNorm {
            gamma: parameter(Initializer::Ones),
            beta: parameter(Initializer::Zeros),
            num_groups: self.num_groups,
            num_channels: self.num_channels,
            epsilon: self.epsilon,
            affine: self.affine,
        }
    }
}

impl GroupNorm {
    /// Applies the layer.
    ///
    /// # Shapes
    /// - x, output: `[batch, num_channels, ...]`
    ///
    /// # Panics
    /// When the input has other channels.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        check_channels(&x, self.num_channels);
        let (gamma, beta) = (self.gamma.as_ref().map(Param::val), self.beta.as_ref().map(Param::val));
        group_norm(x, gamma, beta, self.num_groups, self.epsilon)
    }
}

/// Configuration of an [`InstanceNorm`].
#[derive(Config, Debug)]
pub struct InstanceNormConfig {
    /// Number of channels.
    pub num_channels: usize,
    /// Added to the variance.
    #[config(default = 1e-5)]
    pub epsilon: f64,
    /// Whether there are γ and β.
    #[config(default = true)]
    pub affine: bool,
}

/// [`GroupNorm`] with every channel as a group.
#[derive(Module, Debug)]
pub struct InstanceNorm {
    /// γ, `[num_channels]`
    pub gamma: Option<Param<Tensor<1>>>,
    /// β, `[num_channels]`
    pub beta: Option<Param<Tensor<1>>>,
    /// Number of channels.
    pub num_channels: usize,
    /// Added to the variance.
    pub epsilon: f64,
    /// Whether there are γ and β.
    pub affine: bool,
}

impl InstanceNormConfig {
    /// The layer with γ = 1 and β = 0.
    pub fn init(&self, device: &Device) -> InstanceNorm {
        let parameter = |drawn: Initializer| self.affine.then(|| drawn.init([self.num_channels], device));
        InstanceNorm {
            gamma: parameter(Initializer::Ones),
            beta: parameter(Initializer::Zeros),
            num_channels: self.num_channels,
            epsilon: self.epsilon,
            affine: self.affine,
        }
    }
}

impl InstanceNorm {
    /// Applies the layer.
    ///
    /// # Shapes
    /// - x, output: `[batch, num_channels, ...]`
    ///
    /// # Panics
    /// When the input has other channels.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        check_channels(&x, self.num_channels);
        let (gamma, beta) = (self.gamma.as_ref().map(Param::val), self.beta.as_ref().map(Param::val));
        group_norm(x, gamma, beta, self.num_channels, self.epsilon)
    }
}

fn check_channels<const D: usize>(x: &Tensor<D>, channels: usize) {
    assert_eq!(x.dims()[1], channels, "a norm of {channels} channels does not fit the input {:?}", x.dims());
}
