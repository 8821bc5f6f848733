//! The networks of the case studies: what they are made of, what they compute, and their losses.

mod examples;

use std::collections::BTreeMap;

use burn::tensor::{Device, DispatchTensor, IndexingUpdateOp, Int, Tensor, TensorData, activation, module};
use kiln_compiler::{Graph, capture};
use kiln_core::{HostTensor, Network, Port, PortKind, Result, TensorFile, random_stream};
use rand_distr::{Distribution, Normal};
use serde::{Deserialize, Serialize};

use crate::graph::Logical;

pub use examples::{Columns, Examples};

/// The slug, which models name as their kind.
pub const KIND: &str = "oneflow";
/// Numbers in a row of the click data.
pub const NUMERIC: usize = 13;
/// Words in a row of the click data.
pub const CATEGORICAL: usize = 26;

/// A network with its sizes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "case", rename_all = "kebab-case")]
pub enum Case {
    /// Two layers with ReLU between.
    Mlp {
        /// Numbers of an example.
        inputs: usize,
        /// Units between.
        hidden: usize,
        /// Classes.
        classes: usize,
    },
    /// Faces to identities: an embedding, and cosines to the centres of very many classes with an angular margin (ArcFace).
    SoftmaxHead {
        /// Numbers of an example.
        inputs: usize,
        /// Width of the embedding.
        embedding: usize,
        /// Identities.
        classes: usize,
    },
    /// Clicks from numbers and words: a linear model of the words beside a network of their embeddings.
    WideDeep {
        /// Rows of the tables, which all words share by their hash.
        rows: usize,
        /// Width of an embedding.
        width: usize,
        /// Units of the network.
        hidden: usize,
    },
    /// A decoder-only Transformer, with norms before the sublayers.
    HybridGpt {
        /// Token ids.
        vocab: usize,
        /// Tokens of a sample.
        seq: usize,
        /// Width.
        hidden: usize,
        /// Attention heads.
        heads: usize,
        /// Layers.
        layers: usize,
    },
}

/// ArcFace's scale and margin.
const SCALE: f64 = 64.0;
const MARGIN: f64 = 0.5;
const EPSILON: f64 = 1e-5;

/// A weight before training.
struct Weight {
    name: String,
    shape: Vec<usize>,
    init: Init,
}

#[derive(Clone, Copy)]
enum Init {
    Zeros,
    Ones,
    /// Normal, of this deviation.
    Normal(f64),
}

impl Case {
    /// Its name on the command line.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Mlp { .. } => "mlp",
            Self::SoftmaxHead { .. } => "softmax-head",
            Self::WideDeep { .. } => "wide-deep",
            Self::HybridGpt { .. } => "hybrid-gpt",
        }
    }

    /// Makes sure that the sizes fit each other.
    ///
    /// # Errors
    /// What does not.
    pub fn check(&self) -> Result<(), String> {
        let sizes: Vec<usize> = match *self {
            Self::Mlp { inputs, hidden, classes } => vec![inputs, hidden, classes],
            Self::SoftmaxHead { inputs, embedding, classes } => vec![inputs, embedding, classes],
            Self::WideDeep { rows, width, hidden } => vec![rows, width, hidden],
            Self::HybridGpt { vocab, seq, hidden, heads, layers } => {
                if heads > 0 && hidden % heads != 0 {
                    return Err(format!("a width of {hidden} is not divisible by {heads} heads"));
                }
                vec![vocab, seq, hidden, heads, layers]
            }
        };
        const MOST: usize = 1 << 28;
        match sizes.into_iter().find(|size| !(1..=MOST).contains(size)) {
            Some(size) => {
                Err(format!("a size of {} is {size}, and must be between 1 and {MOST}", self.name()))
            }
            None => Ok(()),
        }
    }

    fn weights(&self) -> Vec<Weight> {
        let mut weights = Vec::new();
        let mut add = |name: &str, shape: &[usize], init| {
            weights.push(Weight { name: name.into(), shape: shape.to_vec(), init });
        };
        // Variance 1 / inputs, or 2 / inputs before a ReLU.
        let scaled = |gain: f64, inputs: usize| Init::Normal((gain / inputs as f64).sqrt());
        match *self {
            Self::Mlp { inputs, hidden, classes } => {
                add("hidden.weight", &[inputs, hidden], scaled(2.0, inputs));
                add("hidden.bias", &[hidden], Init::Zeros);
                add("head.weight", &[hidden, classes], scaled(1.0, hidden));
                add("head.bias", &[classes], Init::Zeros);
            }
            Self::SoftmaxHead { inputs, embedding, classes } => {
                add("embed.weight", &[inputs, embedding], scaled(1.0, inputs));
                add("head.weight", &[embedding, classes], Init::Normal(1.0));
            }
            Self::WideDeep { rows, width, hidden } => {
                let inputs = NUMERIC + CATEGORICAL * width;
                add("wide.table", &[rows, 1], Init::Zeros);
                add("deep.table", &[rows, width], Init::Normal(0.05));
                add("deep.hidden.weight", &[inputs, hidden], scaled(2.0, inputs));
                add("deep.hidden.bias", &[hidden], Init::Zeros);
                add("deep.head.weight", &[hidden, 1], scaled(1.0, hidden));
                add("bias", &[1], Init::Zeros);
            }
            Self::HybridGpt { vocab, seq, hidden, layers, .. } => {
                add("tokens.weight", &[vocab, hidden], Init::Normal(0.02));
                add("positions.weight", &[seq, hidden], Init::Normal(0.02));
                for layer in 0..layers {
                    let name = |part: &str| format!("layers.{layer}.{part}");
                    for norm in ["norm1", "norm2"] {
                        add(&name(&format!("{norm}.weight")), &[hidden], Init::Ones);
                        add(&name(&format!("{norm}.bias")), &[hidden], Init::Zeros);
                    }
                    for part in ["query", "key", "value", "attention"] {
                        add(&name(&format!("{part}.weight")), &[hidden, hidden], Init::Normal(0.02));
                        add(&name(&format!("{part}.bias")), &[hidden], Init::Zeros);
                    }
                    add(&name("up.weight"), &[hidden, 4 * hidden], Init::Normal(0.02));
                    add(&name("up.bias"), &[4 * hidden], Init::Zeros);
                    add(&name("down.weight"), &[4 * hidden, hidden], Init::Normal(0.02));
                    add(&name("down.bias"), &[hidden], Init::Zeros);
                }
                add("norm.weight", &[hidden], Init::Ones);
                add("norm.bias", &[hidden], Init::Zeros);
                add("head.weight", &[hidden, vocab], Init::Normal(0.02));
            }
        }
        weights
    }

    /// Its weights before training, by name.
    pub fn initial(&self, seed: u64) -> BTreeMap<String, TensorData> {
        let draw = |(number, weight): (usize, Weight)| {
            let count: usize = weight.shape.iter().product();
            let values: Vec<f32> = match weight.init {
                Init::Zeros => vec![0.0; count],
                Init::Ones => vec![1.0; count],
                Init::Normal(deviation) => {
                    let mut rng = random_stream(seed, "weights", number as u64);
                    let normal = Normal::new(0.0, deviation as f32).expect("deviations are finite");
                    normal.sample_iter(&mut rng).take(count).collect()
                }
            };
            (weight.name, TensorData::new(values, weight.shape))
        };
        self.weights().into_iter().enumerate().map(draw).collect()
    }

    /// What an example has, without what is to be predicted.
    fn inputs(&self, batch: usize) -> Vec<Port> {
        let port =
            |name: &str, kind, shape: &[usize]| Port { name: name.into(), kind, shape: shape.to_vec() };
        match *self {
            Self::Mlp { inputs, .. } | Self::SoftmaxHead { inputs, .. } => {
                vec![port("x", PortKind::Float, &[batch, inputs])]
            }
            Self::WideDeep { .. } => {
                vec![
                    port("numbers", PortKind::Float, &[batch, NUMERIC]),
                    port("words", PortKind::Int, &[batch, CATEGORICAL]),
                ]
            }
            Self::HybridGpt { seq, .. } => vec![port("tokens", PortKind::Int, &[batch, seq])],
        }
    }

    /// What is to be predicted.
    fn target(&self, batch: usize) -> Port {
        let (kind, shape) = match *self {
            Self::Mlp { .. } | Self::SoftmaxHead { .. } => (PortKind::Int, vec![batch, 1]),
            Self::WideDeep { .. } => (PortKind::Float, vec![batch, 1]),
            Self::HybridGpt { seq, .. } => (PortKind::Int, vec![batch * seq, 1]),
        };
        Port { name: "target".into(), kind, shape }
    }

    /// What comes out: scores of all classes, cosines for the softmax head, the logarithm of the odds for clicks.
    fn output(&self, batch: usize) -> Port {
        let shape = match *self {
            Self::Mlp { classes, .. } | Self::SoftmaxHead { classes, .. } => vec![batch, classes],
            Self::WideDeep { .. } => vec![batch, 1],
            Self::HybridGpt { vocab, seq, .. } => vec![batch * seq, vocab],
        };
        Port { name: "scores".into(), kind: PortKind::Float, shape }
    }

    /// The graph of a batch's loss; weights are inputs.
    ///
    /// # Errors
    /// As [`capture`].
    pub fn objective(&self, batch: usize) -> Result<Graph> {
        capture(Box::new(Loss { case: self.clone(), batch, device: Device::flex() }))
    }

    /// The training graph with the variables beside it: the loss of a batch and its gradients.
    ///
    /// # Errors
    /// When an operation has no derivative.
    pub fn logical(&self, batch: usize, values: &BTreeMap<String, TensorData>) -> Result<Logical> {
        Logical::training(&self.objective(batch)?, "loss", values)
    }

    /// The loss of a batch and its gradients, in the order of the weights' names; weights are inputs.
    ///
    /// # Errors
    /// When an operation has no derivative.
    pub fn gradients(&self, batch: usize) -> Result<Graph> {
        let mut names: Vec<String> = self.weights().into_iter().map(|weight| weight.name).collect();
        names.sort_unstable();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        self.objective(batch)?.gradient("loss", &names)
    }

    /// The network alone, with its weights as constants.
    ///
    /// # Errors
    /// When weights are missing or have other shapes.
    pub fn predictor(&self, batch: usize, mut weights: TensorFile) -> Result<Predictor> {
        let mut read = BTreeMap::new();
        for Weight { name, shape, .. } in self.weights() {
            let tensor = weights.take(&name)?;
            let values = tensor.as_floats().filter(|_| tensor.shape == shape).map(<[f32]>::to_vec);
            let values = values.ok_or_else(|| {
                kiln_core::Error::input(
                    weights.source().display(),
                    format!("\"{name}\" has the shape {:?}, expected floats {shape:?}", tensor.shape),
                )
            })?;
            if let Some(place) = values.iter().position(|value| !value.is_finite()) {
                return Err(kiln_core::Error::input(
                    weights.source().display(),
                    format!("\"{name}\" is {} at {place}", values[place]),
                ));
            }
            read.insert(name, HostTensor::float(shape, values));
        }
        Ok(Predictor { case: self.clone(), batch, weights: read, device: Device::flex() })
    }

    /// Scores of a batch.
    fn scores(&self, given: &Given) -> Tensor<2> {
        match *self {
            Self::Mlp { .. } => {
                given.linear("head", activation::relu(given.linear("hidden", given.float::<2>("x"))))
            }
            Self::SoftmaxHead { .. } => {
                let embedded = given.float::<2>("x").matmul(given.float::<2>("embed.weight"));
                normalised(embedded, 1).matmul(normalised(given.float::<2>("head.weight"), 0))
            }
            Self::WideDeep { width, .. } => {
                let numbers = given.float::<2>("numbers");
                let [batch, _] = numbers.dims();
                let words = given.int::<2>("words");
                let wide = module::embedding(given.float::<2>("wide.table"), words.clone());
                let wide = wide.sum_dim(1).reshape([batch, 1]);
                let deep = module::embedding(given.float::<2>("deep.table"), words)
                    .reshape([batch, CATEGORICAL * width]);
                // The first rows of the weight read the numbers, the others the words.
                let weight = given.float::<2>("deep.hidden.weight");
                let [inputs, hidden] = weight.dims();
                let of_numbers = weight.clone().slice([0..NUMERIC, 0..hidden]);
                let of_words = weight.slice([NUMERIC..inputs, 0..hidden]);
                let bias = given.float::<1>("deep.hidden.bias").reshape([1, hidden]);
                let units = activation::relu(numbers.matmul(of_numbers) + deep.matmul(of_words) + bias);
                units.matmul(given.float::<2>("deep.head.weight"))
                    + wide
                    + given.float::<1>("bias").reshape([1, 1])
            }
            Self::HybridGpt { seq, hidden, heads, layers, .. } => {
                let tokens = given.int::<2>("tokens");
                let [batch, _] = tokens.dims();
                let places = given.float::<2>("positions.weight").reshape([1, seq, hidden]);
                let mut x = module::embedding(given.float::<2>("tokens.weight"), tokens) + places;
                for layer in 0..layers {
                    let at = |part: &str| format!("layers.{layer}.{part}");
                    let y = given.norm(&at("norm1"), x.clone());
                    // [batch, seq, hidden] → [batch, heads, seq, hidden / heads]
                    let split = |part: &str| {
                        let projected = given.linear(&at(part), y.clone());
                        projected.reshape([batch, seq, heads, hidden / heads]).swap_dims(1, 2)
                    };
                    let (query, key, value) = (split("query"), split("key"), split("value"));
                    let scores = query.matmul(key.swap_dims(2, 3)) / ((hidden / heads) as f64).sqrt();
                    let scores = scores + given.float::<4>("causal");
                    let mixed = activation::softmax(scores, 3).matmul(value);
                    let mixed = mixed.swap_dims(1, 2).reshape([batch, seq, hidden]);
                    x = x + given.linear(&at("attention"), mixed);
                    let y = given.norm(&at("norm2"), x.clone());
                    x = x + given.linear(&at("down"), activation::gelu(given.linear(&at("up"), y)));
                }
                let x = given.norm("norm", x).reshape([batch * seq, hidden]);
                x.matmul(given.float::<2>("head.weight"))
            }
        }
    }

    /// The mean loss of a batch, `[1]`.
    fn loss(&self, given: &Given) -> Tensor<1> {
        let scores = self.scores(given);
        match self {
            Self::Mlp { .. } | Self::HybridGpt { .. } => cross_entropy(scores, given.int::<2>("target")),
            Self::SoftmaxHead { .. } => {
                let target = given.int::<2>("target");
                let cosine = scores.clone().gather(1, target.clone());
                // cos(θ + m) in the place of cos θ; the sine stays away from 0, where its slope is infinite.
                let sine = (cosine.clone().powi_scalar(2).neg() + 1.0).clamp_min(1e-6).sqrt();
                let apart = cosine.clone() * MARGIN.cos() - sine * MARGIN.sin();
                let scores = scores.scatter(1, target.clone(), apart - cosine, IndexingUpdateOp::Add);
                cross_entropy(scores * SCALE, target)
            }
            Self::WideDeep { .. } => {
                // −log σ(x) for clicks, −log σ(−x) for the others.
                let target = given.float::<2>("target");
                let certain = activation::log_sigmoid(scores.clone());
                ((target.neg() + 1.0) * scores - certain).mean()
            }
        }
    }
}

fn normalised(x: Tensor<2>, axis: usize) -> Tensor<2> {
    let length = (x.clone() * x.clone()).sum_dim(axis).clamp_min(1e-12).sqrt();
    x / length
}

fn cross_entropy(scores: Tensor<2>, target: Tensor<2, Int>) -> Tensor<1> {
    activation::log_softmax(scores, 1).gather(1, target).mean().neg()
}

/// Tensors by name.
struct Given(BTreeMap<String, DispatchTensor>);

impl Given {
    fn float<const D: usize>(&self, name: &str) -> Tensor<D> {
        Tensor::from_dispatch(self.0[name].clone())
    }

    fn int<const D: usize>(&self, name: &str) -> Tensor<D, Int> {
        Tensor::from_dispatch(self.0[name].clone())
    }

    fn linear<const D: usize>(&self, name: &str, x: Tensor<D>) -> Tensor<D> {
        module::linear(x, self.float(&format!("{name}.weight")), Some(self.float(&format!("{name}.bias"))))
    }

    fn norm(&self, name: &str, x: Tensor<3>) -> Tensor<3> {
        let (gamma, beta) = (self.float(&format!("{name}.weight")), self.float(&format!("{name}.bias")));
        module::layer_norm(x, gamma, Some(beta), EPSILON)
    }
}

/// What is added to the scores of tokens that a token must not see, `[1, 1, seq, seq]`.
fn causal(case: &Case, device: &Device) -> Option<DispatchTensor> {
    let Case::HybridGpt { seq, .. } = *case else { return None };
    let values: Vec<f32> = (0..seq * seq).map(|at| if at % seq > at / seq { -1e9 } else { 0.0 }).collect();
    Some(Tensor::<4>::from_data(TensorData::new(values, [1, 1, seq, seq]), device).into_dispatch())
}

/// From weights and examples to the loss.
struct Loss {
    case: Case,
    batch: usize,
    /// Where it computes.
    device: Device,
}

impl Network for Loss {
    fn kind(&self) -> &str {
        KIND
    }

    fn inputs(&self) -> Vec<Port> {
        let weights = self.case.weights().into_iter();
        let weights =
            weights.map(|weight| Port { name: weight.name, kind: PortKind::Float, shape: weight.shape });
        weights.chain(self.case.inputs(self.batch)).chain([self.case.target(self.batch)]).collect()
    }

    fn outputs(&self) -> Vec<Port> {
        vec![Port { name: "loss".into(), kind: PortKind::Float, shape: vec![1] }]
    }

    fn move_to(&mut self, device: &Device) {
        self.device = device.clone();
    }

    fn forward(&self, inputs: Vec<DispatchTensor>) -> Vec<DispatchTensor> {
        let names = self.inputs().into_iter().map(|port| port.name);
        let mut given: BTreeMap<String, DispatchTensor> = names.zip(inputs).collect();
        if let Some(mask) = causal(&self.case, &self.device) {
            given.insert("causal".into(), mask);
        }
        vec![self.case.loss(&Given(given)).into_dispatch()]
    }
}

/// A trained network.
pub struct Predictor {
    case: Case,
    batch: usize,
    weights: BTreeMap<String, HostTensor>,
    device: Device,
}

impl Predictor {
    /// What it computes.
    ///
    /// # Errors
    /// As [`capture`].
    pub fn graph(self) -> Result<Graph> {
        capture(Box::new(self))
    }
}

impl Network for Predictor {
    fn kind(&self) -> &str {
        KIND
    }

    fn inputs(&self) -> Vec<Port> {
        self.case.inputs(self.batch)
    }

    fn outputs(&self) -> Vec<Port> {
        vec![self.case.output(self.batch)]
    }

    fn move_to(&mut self, device: &Device) {
        self.device = device.clone();
    }

    fn forward(&self, inputs: Vec<DispatchTensor>) -> Vec<DispatchTensor> {
        let names = self.inputs().into_iter().map(|port| port.name);
        let mut given: BTreeMap<String, DispatchTensor> = names.zip(inputs).collect();
        for (name, tensor) in &self.weights {
            let placed = match tensor.shape.len() {
                1 => tensor.to_tensor::<1>(&self.device).map(Tensor::into_dispatch),
                _ => tensor.to_tensor::<2>(&self.device).map(Tensor::into_dispatch),
            };
            given.extend(placed.map(|placed| (name.clone(), placed)));
        }
        given.extend(causal(&self.case, &self.device).map(|mask| ("causal".to_string(), mask)));
        vec![self.case.scores(&Given(given)).into_dispatch()]
    }
}
