//! The hypernetwork: a perceptron from an encoded condition to the weights of another network.

use burn::module::{Module, Param};
use burn::nn::Initializer;
use burn::tensor::{Device, Distribution, Tensor, TensorData, activation};
use clap::ValueEnum;
use kiln_core::{Error, Result};
use kiln_nn::{Embedding, EmbeddingConfig, LayerNorm, LayerNormConfig, Linear, LinearConfig, WeightSpec};
use serde::{Deserialize, Serialize};

use crate::encoding::Encoding;

/// Slope of LeakyReLU below 0.
const LEAK: f64 = 0.01;

/// Numbers that stand for a category.
const CATEGORY_WIDTH: usize = 8;

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
    /// For each component of a condition the number of its categories, 0 for a number; empty where all are numbers. A
    /// category enters γ as its place among them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub categories: Vec<usize>,
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
            categories: Vec::new(),
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
        if !self.categories.is_empty() && self.categories.len() != self.gamma_dim {
            let (found, wanted) = (self.categories.len(), self.gamma_dim);
            return Err(Error::usage(format!("numbers of categories for {found} of {wanted} components"))
                .hint("give one for each component, 0 for one that is a number"));
        }
        match self.categories.contains(&1) {
            true => Err(Error::usage("a single category is no condition").hint("give two or more")),
            false => Ok(()),
        }
    }

    /// Numbers that the first layer sees.
    fn inputs(&self) -> usize {
        let categories = self.categories.iter().filter(|count| **count > 0).count();
        self.encoding.width(self.gamma_dim - categories) + categories * CATEGORY_WIDTH
    }

    /// Draws a hypernetwork that makes the parameters of `spec`.
    pub fn init(&self, spec: &WeightSpec, device: &Device) -> HyperNet {
        let gain = (2.0 / (1.0 + LEAK * LEAK)).sqrt();
        let widths: Vec<usize> = [self.inputs()].into_iter().chain(self.hidden.iter().copied()).collect();
        let embedding = |&count: &usize| EmbeddingConfig::new(count, CATEGORY_WIDTH).init(device);
        let hidden = widths.windows(2).map(|pair| {
            let std = gain / (pair[0] as f64).sqrt();
            let config = LinearConfig::new(pair[0], pair[1]);
            let mut layer = config.with_initializer(Initializer::Normal { mean: 0.0, std }).init(device);
            layer.bias = Some(Initializer::Zeros.init([pair[1]], device));
            layer
        });
        let norm = |&width: &usize| LayerNormConfig::new(width).init(device);
        let mut net = HyperNet {
            embeddings: self.categories.iter().filter(|count| **count > 0).map(embedding).collect(),
            hidden: hidden.collect(),
            norms: self.hidden.iter().filter(|_| self.layer_norm).map(norm).collect(),
            factor: None,
            output: Linear { weight: Initializer::Zeros.init([1, 1], device), bias: None },
            encoding: self.encoding,
            activation: self.activation,
            categories: self.categories.clone(),
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
    /// A vector for every category of each component that is one.
    pub embeddings: Vec<Embedding>,
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
    #[module(skip)]
    categories: Vec<usize>,
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

    /// What the first layer sees: the encoding of the numbers, then a vector for each category, whose norm is constant as
    /// that of an encoding is.
    ///
    /// # Shapes
    /// - gamma: `[batch, k]`
    /// - output: `[batch, inputs]`
    pub fn encode(&self, gamma: Tensor<2>) -> Tensor<2> {
        if self.categories.is_empty() {
            return self.encoding.encode(gamma);
        }
        let (mut numbers, mut vectors, mut embeddings) = (Vec::new(), Vec::new(), self.embeddings.iter());
        for (index, &count) in self.categories.iter().enumerate() {
            let component = gamma.clone().narrow(1, index, 1);
            if count == 0 {
                numbers.push(component);
            } else if let Some(embedding) = embeddings.next() {
                let place = component.round().clamp(0.0, (count - 1) as f32).int();
                let vector = embedding.forward(place).squeeze_dim::<2>(1);
                let norm = vector.clone().powi_scalar(2).sum_dim(1).sqrt();
                vectors.push(vector / norm * (CATEGORY_WIDTH as f64).sqrt());
            }
        }
        if !numbers.is_empty() {
            vectors.insert(0, self.encoding.encode(Tensor::cat(numbers, 1)));
        }
        Tensor::cat(vectors, 1)
    }

    /// The condition whose numbers are all `gamma`, and whose categories are the first.
    pub(crate) fn diagonal(&self, gamma: f64, gamma_dim: usize) -> Vec<f32> {
        let is_number = |index: usize| self.categories.get(index).is_none_or(|&count| count == 0);
        (0..gamma_dim).map(|index| if is_number(index) { gamma as f32 } else { 0.0 }).collect()
    }

    /// What the output layer sees, `[batch, width]`.
    fn features(&self, gamma: Tensor<2>) -> Tensor<2> {
        let mut a = self.encode(gamma);
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

    /// Mean square of what the output layer sees, over conditions along the diagonal of their cube and all categories.
    fn mean_square(&self, gamma_dim: usize, device: &Device) -> f64 {
        const PLACES: usize = 64;
        let component = |place: usize, index: usize| match self.categories.get(index) {
            Some(&count) if count > 0 => (place % count) as f32,
            _ => (place as f32 + 0.5) / PLACES as f32,
        };
        let gammas: Vec<f32> =
            (0..PLACES).flat_map(|place| (0..gamma_dim).map(move |index| component(place, index))).collect();
        let gammas = Tensor::<2>::from_data(TensorData::new(gammas, [PLACES, gamma_dim]), device);
        f64::from(self.features(gammas).powi_scalar(2).mean().into_scalar::<f32>())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn categories_have_vectors_of_one_norm_beside_the_encoding_of_numbers() {
        let device = Device::flex();
        let config = HyperNetConfig { categories: vec![3, 0, 2], ..HyperNetConfig::new(3) };
        config.check().unwrap();
        let net = config.init(&WeightSpec::of(&LinearConfig::new(2, 2).init(&device)), &device);
        let gamma = Tensor::<2>::from_floats([[0.0, 0.3, 1.0], [2.0, 0.3, 1.0], [2.0, 0.9, 0.0]], &device);
        let encoded: Vec<f32> = net.encode(gamma).into_data().iter().collect();
        let rows: Vec<&[f32]> = encoded.chunks(2 + 2 * CATEGORY_WIDTH).collect();
        for row in &rows {
            let squares: f32 = row.iter().map(|x| x * x).sum();
            assert!((squares - (1 + 2 * CATEGORY_WIDTH) as f32).abs() < 1e-4, "{squares}");
        }
        let (numbers, first) = (&rows[0][..2], &rows[0][2..2 + CATEGORY_WIDTH]);
        assert_eq!(numbers, &rows[1][..2]);
        assert_ne!(first, &rows[1][2..2 + CATEGORY_WIDTH]);
        assert_eq!(rows[1][2..2 + CATEGORY_WIDTH], rows[2][2..2 + CATEGORY_WIDTH]);
        assert_eq!(net.diagonal(0.5, 3), [0.0, 0.5, 0.0]);
        let refused =
            |categories| HyperNetConfig { categories, ..HyperNetConfig::new(2) }.check().unwrap_err();
        assert!(refused(vec![2]).to_string().contains("1 of 2"));
        assert!(refused(vec![1, 0]).to_string().contains("single category"));
    }

    #[test]
    fn vectors_of_categories_are_learned() {
        let device = Device::flex();
        let config = HyperNetConfig { categories: vec![3], hidden: vec![4], ..HyperNetConfig::new(1) };
        let net = config.init(&WeightSpec::of(&LinearConfig::new(2, 2).init(&device)), &device).train();
        let loss = net.forward(Tensor::from_floats([[1.0]], &device)).powi_scalar(2).sum();
        let gradients = loss.backward();
        let gradient: Vec<f32> =
            net.embeddings[0].weight.val().grad(&gradients).unwrap().into_data().iter().collect();
        let size = |row: usize| {
            gradient[row * CATEGORY_WIDTH..][..CATEGORY_WIDTH].iter().map(|x| x.abs()).sum::<f32>()
        };
        assert!(size(0) == 0.0 && size(1) > 0.0 && size(2) == 0.0, "{gradient:?}");
    }
}
