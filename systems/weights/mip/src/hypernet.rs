//! The hypernetwork: a perceptron from an encoded condition to the weights of another network.

use burn::module::{Module, Param};
use burn::nn::Initializer;
use burn::tensor::{Device, Distribution, Tensor, activation};
use clap::ValueEnum;
use kiln_core::{Error, Result};
use kiln_nn::{LayerNorm, LayerNormConfig, Linear, LinearConfig, WeightSpec};
use serde::{Deserialize, Serialize};

use crate::encoding::Encoding;

/// Slope of LeakyReLU below 0.
const LEAK: f64 = 0.01;

/// What follows a hidden layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum Nonlinearity {
    /// `max(x, 0)`
    Relu,
    /// `x` above 0, `0.01 x` below
    LeakyRelu,
    /// `x Φ(x)`
    Gelu,
    /// `x σ(x)`
    Silu,
    /// `tanh x`
    Tanh,
}

impl Nonlinearity {
    /// Applies it.
    pub fn apply<const D: usize>(self, x: Tensor<D>) -> Tensor<D> {
        match self {
            Self::Relu => activation::relu(x),
            Self::LeakyRelu => activation::leaky_relu(x, LEAK),
            Self::Gelu => kiln_ops::activate(x, kiln_ops::Activation::Gelu),
            Self::Silu => kiln_ops::activate(x, kiln_ops::Activation::Silu),
            Self::Tanh => kiln_ops::activate(x, kiln_ops::Activation::Tanh),
        }
    }
}

/// How the output layer is drawn. A block is the part of it that makes one tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum OutputInit {
    /// `gain / √(elements of the tensor)` for each block, as the paper has it: for layers of many channels about as large as
    /// the weights that it is added to, for a few channels several times as large
    FanOut,
    /// `gain / √(hidden width)` throughout
    FanIn,
    /// So that a layer with the weights made keeps the variance of what it sees (Chang et al., ICLR 2020)
    Hyperfan,
}

/// Configuration of a [`HyperNet`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HyperNetConfig {
    /// Components of a condition, k.
    pub gamma_dim: usize,
    /// How the condition enters.
    pub encoding: Encoding,
    /// Widths of the hidden layers.
    pub hidden: Vec<usize>,
    /// What follows each.
    pub activation: Nonlinearity,
    /// Whether a layer norm comes before it.
    pub layer_norm: bool,
    /// How the output layer is drawn.
    pub output_init: OutputInit,
    /// Makes the output layer a product of two matrices with so many numbers between them.
    pub rank: Option<usize>,
}

impl HyperNetConfig {
    /// The paper's hypernetwork for conditions of `gamma_dim` numbers: hidden layers of 16, 64 and 128.
    pub fn new(gamma_dim: usize) -> Self {
        Self {
            gamma_dim,
            encoding: Encoding::CosSin,
            hidden: vec![16, 64, 128],
            activation: Nonlinearity::LeakyRelu,
            layer_norm: false,
            output_init: OutputInit::FanOut,
            rank: None,
        }
    }

    /// Checks that the numbers fit.
    ///
    /// # Errors
    /// Names those that do not.
    pub fn check(&self) -> Result<()> {
        if self.gamma_dim == 0 {
            return Err(
                Error::usage("a condition needs at least one number").hint("choose --gamma-dim 1 or more")
            );
        }
        if self.hidden.is_empty() || self.hidden.contains(&0) {
            return Err(Error::usage(format!(
                "hidden layers of widths {:?} make no hypernetwork",
                self.hidden
            ))
            .hint("give at least one width, each at least 1"));
        }
        if self.rank == Some(0) {
            return Err(Error::usage("a rank of 0 makes no weights"));
        }
        Ok(())
    }

    /// Draws a hypernetwork that makes the parameters of `spec`.
    pub fn init(&self, spec: &WeightSpec, device: &Device) -> HyperNet {
        let gain = (2.0 / (1.0 + LEAK * LEAK)).sqrt();
        let widths: Vec<usize> =
            [self.encoding.width(self.gamma_dim)].into_iter().chain(self.hidden.iter().copied()).collect();
        let hidden = widths.windows(2).map(|pair| {
            let std = gain / (pair[0] as f64).sqrt();
            let config = LinearConfig::new(pair[0], pair[1]);
            let mut layer = config.with_initializer(Initializer::Normal { mean: 0.0, std }).init(device);
            layer.bias = Some(Initializer::Zeros.init([pair[1]], device));
            layer
        });
        let norm = |&width: &usize| LayerNormConfig::new(width).init(device);
        let mut net = HyperNet {
            hidden: hidden.collect(),
            norms: self.hidden.iter().filter(|_| self.layer_norm).map(norm).collect(),
            factor: None,
            output: Linear { weight: Initializer::Zeros.init([1, 1], device), bias: None },
            encoding: self.encoding,
            activation: self.activation,
        };
        let mut width = widths[widths.len() - 1];
        if let Some(rank) = self.rank {
            // Columns of unit length keep the size of what passes through.
            let std = (width as f64).sqrt().recip();
            let config = LinearConfig::new(width, rank).with_bias(false);
            net.factor = Some(config.with_initializer(Initializer::Normal { mean: 0.0, std }).init(device));
            width = rank;
        }
        let square = net.mean_square(self.gamma_dim, device);
        let block = |param: &kiln_nn::ParamSpec| {
            let std = match self.output_init {
                OutputInit::FanOut => gain / (param.len() as f64).sqrt(),
                OutputInit::FanIn => gain / (width as f64).sqrt(),
                OutputInit::Hyperfan => {
                    // Weights and biases of a layer share its variance in halves; the gain makes up for LeakyReLU.
                    let fan_in = param.fan_in().unwrap_or(1) as f64;
                    (2.0 * fan_in * width as f64 * square).recip().sqrt() * gain
                }
            };
            Tensor::<2>::random([width, param.len()], Distribution::Normal(0.0, std), device)
        };
        let blocks: Vec<Tensor<2>> = spec.params().iter().map(block).collect();
        net.output.weight = Param::from_tensor(Tensor::cat(blocks, 1));
        net
    }
}

/// A perceptron whose output is the weights of another network, without a bias: what does not depend on the condition
/// stands beside it, by name, in the network whose weights it makes.
#[derive(Module, Debug)]
pub struct HyperNet {
    /// Hidden layers.
    pub hidden: Vec<Linear>,
    /// A layer norm for each, or none.
    pub norms: Vec<LayerNorm>,
    /// The first of the two factors of the output layer, where it has two.
    pub factor: Option<Linear>,
    /// `[width, weights]`
    pub output: Linear,
    #[module(skip)]
    encoding: Encoding,
    #[module(skip)]
    activation: Nonlinearity,
}

impl HyperNet {
    /// Weights for conditions.
    ///
    /// # Shapes
    /// - gamma: `[batch, k]`
    /// - output: `[batch, weights]`
    pub fn forward(&self, gamma: Tensor<2>) -> Tensor<2> {
        self.output.forward(self.features(gamma))
    }

    /// What the output layer sees, `[batch, width]`.
    fn features(&self, gamma: Tensor<2>) -> Tensor<2> {
        let mut a = self.encoding.encode(gamma);
        for (index, layer) in self.hidden.iter().enumerate() {
            a = layer.forward(a);
            if let Some(norm) = self.norms.get(index) {
                a = norm.forward(a);
            }
            a = self.activation.apply(a);
        }
        match &self.factor {
            Some(factor) => factor.forward(a),
            None => a,
        }
    }

    /// Mean square of what the output layer sees, over conditions along the diagonal of their cube.
    fn mean_square(&self, gamma_dim: usize, device: &Device) -> f64 {
        let places: Vec<f32> = (0..64).map(|i| (i as f32 + 0.5) / 64.0).collect();
        let gamma = Tensor::<1>::from_floats(places.as_slice(), device).unsqueeze_dim::<2>(1);
        let square = self.features(gamma.repeat_dim(1, gamma_dim)).powi_scalar(2).mean().into_scalar::<f32>();
        f64::from(square)
    }
}
