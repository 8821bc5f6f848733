//! The parameters of one rank: which part of the network's they are, and flat memory for values and gradients.

use std::ops::Range;
use std::sync::mpsc::Sender;

use burn::tensor::{Device, Tensor};
use rand_distr::{Distribution, Normal};
use serde::{Deserialize, Serialize};

use kiln_core::random_stream;

use crate::layout::ParallelLayout;
use crate::model::GptConfig;
use crate::real::{self, Real};

/// How the tensor group shares a parameter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Split {
    /// Every rank has all of it.
    Whole,
    /// Each has some outputs of a matrix `[out, in]`, or some elements of a vector.
    Outputs,
    /// Each has some inputs of a matrix `[out, in]`.
    Inputs,
    /// Each has some rows of the word embedding, padded so that all have the same number.
    Vocabulary,
}

/// A parameter as one rank has it.
#[derive(Debug, Clone)]
pub struct Spec {
    /// Its name in a model folder.
    pub name: String,
    /// Its shape in a model folder: `[out, in]`, `[rows, width]` or `[n]`.
    pub whole: Vec<usize>,
    /// How it is shared.
    pub split: Split,
    /// Where this rank's part lies in the flat memory: a linear weight as `[in, out]`, all others as in the folder.
    pub range: Range<usize>,
    /// The shape in that memory.
    pub shape: Vec<usize>,
    /// Whether weight decay applies: to matrices only.
    pub decayed: bool,
    /// Whether this rank is the one that counts the parameter in global norms and writes it into checkpoints.
    pub counted: bool,
}

impl Spec {
    fn is_linear(&self) -> bool {
        self.whole.len() == 2 && !self.name.starts_with("embedding.")
    }

    /// This rank's part of a whole parameter given in the folder's order, padding 0; in the order of the flat memory.
    pub fn cut<T: Copy + Default>(&self, whole: &[T], tensor: usize, ranks: usize) -> Vec<T> {
        match (self.split, &self.whole[..]) {
            (Split::Whole, _) if !self.is_linear() => whole.to_vec(),
            (Split::Outputs, &[n]) => whole[tensor * n / ranks..(tensor + 1) * n / ranks].to_vec(),
            (Split::Vocabulary, &[rows, width]) => {
                let mine = self.shape[0];
                let first = (tensor * mine).min(rows);
                let last = ((tensor + 1) * mine).min(rows);
                let mut part = whole[first * width..last * width].to_vec();
                part.resize(mine * width, T::default());
                part
            }
            (split, &[outputs, inputs]) => {
                let (out, into) = linear_part(split, outputs, inputs, tensor, ranks);
                into.flat_map(|i| out.clone().map(move |o| whole[o * inputs + i])).collect()
            }
            (split, shape) => unreachable!("{split:?} of a parameter of the shape {shape:?}"),
        }
    }

    /// Puts this rank's part, in the order of the flat memory, to its place in the whole parameter.
    pub fn place<T: Copy>(&self, part: &[T], whole: &mut [T], tensor: usize, ranks: usize) {
        match (self.split, &self.whole[..]) {
            (Split::Whole, _) if !self.is_linear() => whole.copy_from_slice(part),
            (Split::Outputs, &[n]) => {
                whole[tensor * n / ranks..(tensor + 1) * n / ranks].copy_from_slice(part)
            }
            (Split::Vocabulary, &[rows, width]) => {
                let mine = self.shape[0];
                let first = (tensor * mine).min(rows);
                let last = ((tensor + 1) * mine).min(rows);
                whole[first * width..last * width].copy_from_slice(&part[..(last - first) * width]);
            }
            (split, &[outputs, inputs]) => {
                let (out, into) = linear_part(split, outputs, inputs, tensor, ranks);
                let mut values = part.iter();
                for i in into {
                    for (o, &value) in out.clone().zip(values.by_ref()) {
                        whole[o * inputs + i] = value;
                    }
                }
            }
            (split, shape) => unreachable!("{split:?} of a parameter of the shape {shape:?}"),
        }
    }
}

/// The outputs and inputs of a linear weight that a rank has.
fn linear_part(
    split: Split,
    outputs: usize,
    inputs: usize,
    tensor: usize,
    ranks: usize,
) -> (Range<usize>, Range<usize>) {
    let part = |n: usize| tensor * n / ranks..(tensor + 1) * n / ranks;
    match split {
        Split::Outputs => (part(outputs), 0..inputs),
        Split::Inputs => (0..outputs, part(inputs)),
        Split::Whole | Split::Vocabulary => (0..outputs, 0..inputs),
    }
}

/// Name, shape and sharing of every parameter of a layer, in the order in which they lie in memory.
fn layer_parameters(layer: usize, h: usize) -> Vec<(String, Vec<usize>, Split)> {
    let rows = [
        ("ln1.weight", vec![h], Split::Whole),
        ("ln1.bias", vec![h], Split::Whole),
        ("attention.qkv.weight", vec![3 * h, h], Split::Outputs),
        ("attention.qkv.bias", vec![3 * h], Split::Outputs),
        ("attention.dense.weight", vec![h, h], Split::Inputs),
        ("attention.dense.bias", vec![h], Split::Whole),
        ("ln2.weight", vec![h], Split::Whole),
        ("ln2.bias", vec![h], Split::Whole),
        ("mlp.fc1.weight", vec![4 * h, h], Split::Outputs),
        ("mlp.fc1.bias", vec![4 * h], Split::Outputs),
        ("mlp.fc2.weight", vec![h, 4 * h], Split::Inputs),
        ("mlp.fc2.bias", vec![h], Split::Whole),
    ];
    rows.into_iter().map(|(name, shape, split)| (format!("layers.{layer}.{name}"), shape, split)).collect()
}

/// The parameters of one rank of the pipeline and of the tensor group, in the order in which they lie in memory:
/// embedding, layers chunk by chunk, last norm. A last stage on another rank than the first has the word embedding too.
pub fn specs(config: &GptConfig, layout: &ParallelLayout, pipe: usize, tensor: usize) -> Vec<Spec> {
    let (h, ranks) = (config.hidden, layout.tensor);
    let (first, last) = (pipe == 0, pipe == layout.pipeline - 1);
    let word = || ("embedding.word".to_string(), vec![config.vocab, h], Split::Vocabulary);
    let mut names = Vec::new();
    if first {
        names.push(word());
        names.push(("embedding.position".into(), vec![config.max_seq, h], Split::Whole));
    }
    for chunk in 0..layout.chunks {
        for layer in layout.layers_of(chunk * layout.pipeline + pipe, config.layers) {
            names.extend(layer_parameters(layer, h));
        }
    }
    if last {
        names.push(("final_ln.weight".into(), vec![h], Split::Whole));
        names.push(("final_ln.bias".into(), vec![h], Split::Whole));
        if !first {
            names.push(word());
        }
    }
    let mut at = 0;
    let spec = |(name, whole, split): (String, Vec<usize>, Split)| {
        let shape = match (split, &whole[..]) {
            (Split::Vocabulary, &[_, width]) => vec![config.padded_vocab(ranks) / ranks, width],
            (Split::Outputs, &[n]) => vec![n / ranks],
            (Split::Outputs, &[outputs, inputs]) => vec![inputs, outputs / ranks],
            (Split::Inputs, &[outputs, inputs]) => vec![inputs / ranks, outputs],
            _ => whole.clone(),
        };
        let range = at..at + shape.iter().product::<usize>();
        at = range.end;
        // A copy of the word embedding on the last stage is the first stage's; what all tensor ranks have is the first's.
        let copy = name == "embedding.word" && !first;
        let counted = !copy && (tensor == 0 || split != Split::Whole);
        Spec { decayed: whole.len() == 2, counted, name, whole, split, range, shape }
    };
    names.into_iter().map(spec).collect()
}

/// The initial values of a parameter in the folder's order. They depend on its name and the seed alone, not on the layout.
pub fn initial_values(config: &GptConfig, name: &str, shape: &[usize], seed: u64) -> Vec<f32> {
    const SPREAD: f64 = 0.02;
    let count = shape.iter().product();
    if shape.len() == 1 {
        let norm = name.contains("ln") && name.ends_with("weight");
        return vec![if norm { 1.0 } else { 0.0 }; count];
    }
    // Weights that write into the residual stream are drawn narrower, so that its variance does not grow with depth.
    let residual = name.ends_with("dense.weight") || name.ends_with("fc2.weight");
    let spread = if residual { SPREAD / (2.0 * config.layers as f64).sqrt() } else { SPREAD };
    let normal = Normal::new(0.0, spread).expect("the spread is positive");
    let mut rng = random_stream(seed, &format!("init {name}"), 0);
    (0..count).map(|_| normal.sample(&mut rng) as f32).collect()
}

/// A part of the gradients, with its place.
pub type Finished<T> = (Range<usize>, Vec<T>);

/// Values, gradients and tensors of a rank's parameters.
#[derive(Debug)]
pub struct Parameters<T> {
    /// What they are.
    pub specs: Vec<Spec>,
    /// All values, one parameter after another.
    pub values: Vec<T>,
    /// The gradients added up so far, in the same order.
    pub gradients: Vec<T>,
    /// Where gradients go that nothing is added to any more, while the last micro-batch goes back.
    pub finished: Option<Sender<Finished<T>>>,
    tensors: Vec<Held>,
    device: Device,
}

/// A parameter as the kernels take it.
#[derive(Debug, Clone)]
enum Held {
    Vector(Tensor<1>),
    Matrix(Tensor<2>),
}

impl<T: Real> Parameters<T> {
    /// Parameters with given values, each in the order of the flat memory.
    pub fn new(specs: Vec<Spec>, values: Vec<T>, device: &Device) -> Self {
        let mut parameters = Self {
            gradients: vec![T::ZERO; values.len()],
            values,
            specs,
            finished: None,
            tensors: Vec::new(),
            device: device.clone(),
        };
        parameters.refresh();
        parameters
    }

    /// The number of a parameter.
    ///
    /// # Panics
    /// When the rank does not have it.
    pub fn id(&self, name: &str) -> usize {
        let at = self.specs.iter().position(|spec| spec.name == name);
        at.unwrap_or_else(|| panic!("this rank has no parameter \"{name}\""))
    }

    /// Makes the tensors anew from values that have changed.
    pub fn refresh(&mut self) {
        let held = |spec: &Spec| {
            let values = self.values[spec.range.clone()].to_vec();
            match spec.shape[..] {
                [rows, columns] => Held::Matrix(real::tensor(values, [rows, columns], &self.device)),
                _ => Held::Vector(real::tensor(values, [spec.range.len()], &self.device)),
            }
        };
        self.tensors = self.specs.iter().map(held).collect();
    }

    /// A parameter with one axis.
    ///
    /// # Panics
    /// When it has two.
    pub fn vector(&self, id: usize) -> Tensor<1> {
        match &self.tensors[id] {
            Held::Vector(x) => x.clone(),
            Held::Matrix(_) => panic!("\"{}\" is a matrix", self.specs[id].name),
        }
    }

    /// A parameter with two axes.
    ///
    /// # Panics
    /// When it has one.
    pub fn matrix(&self, id: usize) -> Tensor<2> {
        match &self.tensors[id] {
            Held::Matrix(x) => x.clone(),
            Held::Vector(_) => panic!("\"{}\" is a vector", self.specs[id].name),
        }
    }

    /// The values of a parameter.
    pub fn values_of(&self, id: usize) -> &[T] {
        &self.values[self.specs[id].range.clone()]
    }

    /// The gradient of a parameter, to be added to.
    pub fn gradient_mut(&mut self, id: usize) -> &mut [T] {
        &mut self.gradients[self.specs[id].range.clone()]
    }

    /// Adds to the gradient of a parameter.
    pub fn add_gradient<const D: usize>(&mut self, id: usize, gradient: &Tensor<D>) {
        let sums = &mut self.gradients[self.specs[id].range.clone()];
        real::read(gradient, |gradient: &[T]| {
            for (sum, &x) in sums.iter_mut().zip(gradient) {
                *sum += x;
            }
        });
    }

    /// Hands on the gradients of neighbouring parameters, `first` to `last`, to which nothing will be added.
    pub fn finish(&self, first: usize, last: usize) {
        if let Some(finished) = &self.finished {
            let range = self.specs[first].range.start..self.specs[last].range.end;
            // Where nobody takes it, its rank has failed, and says so itself.
            drop(finished.send((range.clone(), self.gradients[range].to_vec())));
        }
    }

    /// Forgets all gradients.
    pub fn clear_gradients(&mut self) {
        self.gradients.fill(T::ZERO);
    }

    /// Where tensors live.
    pub fn device(&self) -> &Device {
        &self.device
    }
}
