//! Random functions: perceptrons with sparse random weights and noise after every layer.

use kiln_ops::gemm::{Mat, Out, gemm};
use rand::{Rng, RngExt};
use rand_distr::{Distribution, Zipf};

use super::draws::{choose, normal, positive, probability, small_count};

/// What follows every linear map but the last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Nonlinearity {
    /// `tanh x`
    Tanh,
    /// `x`
    Identity,
    /// `max(x, 0)`
    Relu,
}

/// The weights of one layer.
#[derive(Debug, Clone)]
pub struct Layer {
    /// Extent of the input.
    pub inputs: usize,
    /// Extent of the output.
    pub outputs: usize,
    /// `[inputs, outputs]`; a zero is an edge that is not there.
    pub weights: Vec<f32>,
    /// Standard deviation of the noise at every output.
    noise: Vec<f32>,
}

/// A perceptron drawn at random. Its layers after the first are what values can be read from: the nodes of a causal
/// graph, whose edges are the weights.
#[derive(Debug, Clone)]
pub struct RandomFunction {
    /// From the causes on.
    pub layers: Vec<Layer>,
    nonlinearity: Nonlinearity,
}

/// Widths of a [`RandomFunction`].
#[derive(Debug, Clone, Copy)]
pub struct Widths {
    /// Numbers it begins from.
    pub causes: usize,
    /// Nodes of a layer.
    pub hidden: usize,
    /// Nodes of the last layer.
    pub outputs: usize,
}

/// Layers have at most this many nodes, unless more are read from them.
pub const WIDEST: usize = 130;

/// A layer's width as the prior draws it.
pub fn hidden_width(rng: &mut impl Rng) -> usize {
    small_count(4, 3.0, 100.0, rng).min(WIDEST)
}

impl RandomFunction {
    /// Draws depth, nonlinearity, weights and noise.
    pub fn draw(widths: Widths, rng: &mut impl Rng) -> Self {
        let depth = small_count(2, 2.0, 3.0, rng);
        let nonlinearity = choose(&[Nonlinearity::Tanh, Nonlinearity::Identity, Nonlinearity::Relu], rng);
        let sparsity = Sparsity::draw(rng);
        let weight_std = positive([0.01, 10.0], rng);
        let noise_std = positive([1e-4, 0.3], rng);
        let noise_by_node = rng.random::<bool>();
        let mut layers = Vec::with_capacity(depth);
        for index in 0..depth {
            let inputs = if index == 0 { widths.causes } else { widths.hidden };
            let outputs = if index == depth - 1 { widths.outputs } else { widths.hidden };
            let mut noise = vec![0.0; outputs];
            if index > 0 {
                let factor = |rng: &mut _| if noise_by_node { normal(rng).abs() } else { 1.0 };
                noise.iter_mut().for_each(|std| *std = noise_std as f32 * factor(rng));
            }
            let weights = sparsity.weights([inputs, outputs], weight_std, index == 0, rng);
            layers.push(Layer { inputs, outputs, weights, noise });
        }
        Self { layers, nonlinearity }
    }

    /// The nodes of every layer after the first for rows of `causes [rows, causes]`: `[layer][rows, outputs]`.
    pub fn run(&self, causes: &[f32], rng: &mut impl Rng) -> Vec<Vec<f32>> {
        let rows = causes.len() / self.layers[0].inputs;
        let mut nodes: Vec<Vec<f32>> = Vec::with_capacity(self.layers.len());
        for (index, layer) in self.layers.iter().enumerate() {
            let activated: Option<Vec<f32>> =
                nodes.last().map(|before| before.iter().map(|&x| self.nonlinearity.of(x)).collect());
            let input = activated.as_deref().unwrap_or(causes);
            let mut output = vec![0.0; rows * layer.outputs];
            let (a, b) =
                (Mat::new(input, rows, layer.inputs), Mat::new(&layer.weights, layer.inputs, layer.outputs));
            gemm(&mut output, layer.outputs, Out::Set, a, b);
            if index > 0 {
                for row in output.chunks_exact_mut(layer.outputs) {
                    row.iter_mut().zip(&layer.noise).for_each(|(x, std)| *x += std * normal(rng));
                }
            }
            nodes.push(output);
        }
        nodes.remove(0);
        nodes
    }
}

impl Nonlinearity {
    fn of(self, x: f32) -> f32 {
        match self {
            Self::Tanh => x.tanh(),
            Self::Identity => x,
            Self::Relu => x.max(0.0),
        }
    }
}

/// Which weights are missing.
#[derive(Debug, Clone, Copy)]
enum Sparsity {
    /// Each with this probability, except in the first layer.
    Independent(f64),
    /// All but diagonal blocks.
    Blocks,
}

impl Sparsity {
    fn draw(rng: &mut impl Rng) -> Self {
        if rng.random() { Self::Blocks } else { Self::Independent(probability(0.9, rng)) }
    }

    /// Normal weights, larger where more of them are missing.
    fn weights(self, [inputs, outputs]: [usize; 2], std: f64, first: bool, rng: &mut impl Rng) -> Vec<f32> {
        match self {
            Self::Independent(missing) => {
                let missing = if first { 0.0 } else { missing };
                let scale = (std / (1.0 - missing).sqrt()) as f32;
                let mut draw = || if rng.random::<f64>() < missing { 0.0 } else { scale * normal(rng) };
                (0..inputs * outputs).map(|_| draw()).collect()
            }
            Self::Blocks => {
                let most = (inputs.min(outputs) as f64).sqrt().ceil() as usize;
                let blocks = rng.random_range(1..=most);
                let (height, width) = (inputs / blocks, outputs / blocks);
                let kept = (blocks * height * width) as f64 / (inputs * outputs) as f64;
                let scale = (std / kept.sqrt()) as f32;
                let mut weights = vec![0.0; inputs * outputs];
                for block in 0..blocks {
                    for row in weights.chunks_exact_mut(outputs).skip(block * height).take(height) {
                        row[block * width..][..width].iter_mut().for_each(|w| *w = scale * normal(rng));
                    }
                }
                weights
            }
        }
    }
}

/// Values of causes, `[rows, causes]`.
pub fn draw_causes(rows: usize, causes: usize, rng: &mut impl Rng) -> Vec<f32> {
    let mut values = vec![0.0; rows * causes];
    let mixed = rng.random::<bool>();
    let (odds_of_normal, odds_of_categories) = (rng.random::<f64>() * 0.66, rng.random::<f64>() * 0.66);
    for cause in 0..causes {
        let column = if !mixed || rng.random::<f64>() < odds_of_normal {
            normal_cause(rows, rng)
        } else if rng.random::<f64>() < odds_of_categories {
            categorical_cause(rows, rng)
        } else {
            zipf_cause(rows, rng)
        };
        values.iter_mut().skip(cause).step_by(causes).zip(column).for_each(|(value, x)| *value = x);
    }
    values
}

/// Normal, about a mean and with a deviation that are drawn first.
fn normal_cause(rows: usize, rng: &mut impl Rng) -> Vec<f32> {
    let (mean, std) = (normal(rng), normal(rng).abs());
    (0..rows).map(|_| mean + std * normal(rng)).collect()
}

/// One of 2 to 10 categories of unequal probabilities, standardised.
fn categorical_cause(rows: usize, rng: &mut impl Rng) -> Vec<f32> {
    let weights: Vec<f32> = (0..rng.random_range(2..=10)).map(|_| rng.random()).collect();
    let total: f32 = weights.iter().sum();
    let draw = |rng: &mut _| {
        let mut left = RngExt::random::<f32>(rng) * total;
        let category = weights.iter().position(|weight| {
            left -= weight;
            left < 0.0
        });
        category.unwrap_or(weights.len() - 1) as f32
    };
    let values: Vec<f32> = (0..rows).map(|_| draw(rng)).collect();
    let mean = values.iter().sum::<f32>() / rows as f32;
    let variance = values.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / rows as f32;
    values.iter().map(|x| (x - mean) / (variance.sqrt() + 1e-6)).collect()
}

/// Zipf-distributed with an exponent of 2 to 4, at most 10, centred.
fn zipf_cause(rows: usize, rng: &mut impl Rng) -> Vec<f32> {
    let zipf = Zipf::<f64>::new(1e6, rng.random_range(2.0..=4.0)).expect("the exponent is positive");
    let values: Vec<f32> = (0..rows).map(|_| zipf.sample(rng).min(10.0) as f32).collect();
    let mean = values.iter().sum::<f32>() / rows as f32;
    values.iter().map(|x| x - mean).collect()
}
