//! What a hypernetwork sees (the review's first and third criterion): the inputs C.
//!
//! Several conditionings are put one after another. A task is *static*: a finite, known set of C. Data, noise and given
//! descriptors are *dynamic*: new C come at test time.

use burn::module::{Module, Param};
use burn::nn::Initializer;
use burn::tensor::{Device, Int, Tensor, TensorData, activation};
use clap::ValueEnum;
use kiln_core::{Error, Result};
use kiln_nn::{Linear, LinearConfig};
use kiln_ops::Activation;
use rand::{Rng, RngExt};
use serde::{Deserialize, Serialize};

use crate::training::normals;

/// One input of a hypernetwork.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Conditioning {
    /// A learned vector for every task, drawn from N(0, 1): tasks share weights softly.
    Task {
        /// Number of tasks.
        tasks: usize,
        /// Width of the vectors.
        dim: usize,
    },
    /// A code of the data themselves: of one row, or of a support set, whose order does not matter.
    Data {
        /// Width of a row.
        inputs: usize,
        /// Width of the code.
        dim: usize,
    },
    /// Noise of mean 0 and variance 1: the weights become a distribution.
    Noise {
        /// Width of the noise.
        dim: usize,
        /// How it is drawn.
        #[serde(default)]
        law: NoiseLaw,
    },
    /// A given descriptor: attributes, hyper-parameters.
    Given {
        /// Its width.
        dim: usize,
    },
}

/// How noise is drawn. Both laws have the mean 0 and the variance 1, so that the output layer begins the same.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NoiseLaw {
    /// N(0, 1)
    #[default]
    Normal,
    /// Evenly from -√3 to √3
    Uniform,
}

impl NoiseLaw {
    /// Draws noise, `[rows, width]`.
    pub fn draw(self, rows: usize, width: usize, rng: &mut impl Rng, device: &Device) -> Tensor<2> {
        match self {
            Self::Normal => normals(rows, width, rng, device),
            Self::Uniform => {
                let end = 3f32.sqrt();
                let values: Vec<f32> = (0..rows * width).map(|_| rng.random_range(-end..end)).collect();
                Tensor::from_data(TensorData::new(values, [rows, width]), device)
            }
        }
    }
}

impl Conditioning {
    /// Width of its code.
    pub fn dim(&self) -> usize {
        match *self {
            Self::Task { dim, .. }
            | Self::Data { dim, .. }
            | Self::Noise { dim, .. }
            | Self::Given { dim } => dim,
        }
    }

    /// Width of its code as the generator sees it; with a constant norm, a descriptor has a cosine and a sine for each number.
    pub fn code_width(&self, constant_norm: bool) -> usize {
        match self {
            Self::Given { dim } if constant_norm => 2 * dim,
            _ => self.dim(),
        }
    }

    /// Whether every C that will ever occur is known, so that the weights can be kept.
    pub fn is_static(&self) -> bool {
        matches!(self, Self::Task { .. })
    }

    fn check(&self) -> Result<()> {
        match *self {
            Self::Task { tasks: 0, .. } => Err(Error::usage("a task conditioning needs at least one task")),
            Self::Data { inputs: 0, .. } => {
                Err(Error::usage("a data conditioning needs rows of at least one number"))
            }
            _ if self.dim() == 0 => Err(Error::usage(format!("the conditioning {self:?} has the width 0"))),
            _ => Ok(()),
        }
    }
}

/// Values of the conditionings for a batch.
#[derive(Debug, Clone, Default)]
pub struct Condition {
    /// Numbers of tasks, `[batch]`
    pub tasks: Option<Vec<usize>>,
    /// Support sets, `[batch, rows, inputs]`
    pub support: Option<Tensor<3>>,
    /// `[batch, dim]`
    pub noise: Option<Tensor<2>>,
    /// `[batch, dim]`
    pub given: Option<Tensor<2>>,
}

impl Condition {
    /// These tasks.
    pub fn tasks(tasks: impl Into<Vec<usize>>) -> Self {
        Self { tasks: Some(tasks.into()), ..Self::default() }
    }

    /// A support set each, `[batch, rows, inputs]`.
    pub fn support(support: Tensor<3>) -> Self {
        Self { support: Some(support), ..Self::default() }
    }

    /// Noise, `[batch, dim]`.
    pub fn noise(noise: Tensor<2>) -> Self {
        Self { noise: Some(noise), ..Self::default() }
    }

    /// Descriptors, `[batch, dim]`.
    pub fn given(given: Tensor<2>) -> Self {
        Self { given: Some(given), ..Self::default() }
    }
}

/// C as the generator sees it: for every conditioning `[batch, tokens, dim]`, of one token unless it is a support set.
#[derive(Debug, Clone)]
pub struct Code(pub Vec<Tensor<3>>);

impl Code {
    /// The means over tokens, side by side: `[batch, Σ dim]`.
    pub fn pooled(&self) -> Tensor<2> {
        Tensor::cat(self.0.iter().map(|part| part.clone().mean_dim(1).squeeze_dim(1)).collect(), 1)
    }
}

/// From conditions to codes.
#[derive(Module, Debug)]
pub struct Conditioner {
    /// Vectors of tasks, `[tasks, dim]` each.
    pub tables: Vec<Param<Tensor<2>>>,
    /// Encoders of data, two layers each.
    pub encoders: Vec<Encoder>,
    #[module(skip)]
    parts: Vec<Conditioning>,
    /// Whether every token of a code has a constant norm.
    constant_norm: bool,
}

/// Codes `[batch, tokens, dim]` of norm √dim: the numbers of a descriptor, whose size means something, squeezed between 0 and
/// 1 and each as a point on a quarter of a circle (`[cos(π/2 γ), sin(π/2 γ)]`); other codes by their direction.
fn with_constant_norm(part: &Conditioning, code: Tensor<3>) -> Tensor<3> {
    if let Conditioning::Given { .. } = part {
        let angle = activation::sigmoid(code) * std::f64::consts::FRAC_PI_2;
        return Tensor::cat(vec![angle.clone().cos(), angle.sin()], 2);
    }
    let norm = (code.clone().powi_scalar(2).sum_dim(2) + 1e-12).sqrt();
    code / norm * (part.dim() as f64).sqrt()
}

/// A row of data as a code.
#[derive(Module, Debug)]
pub struct Encoder {
    /// To four times the width of the code.
    pub hidden: Linear,
    /// To the code.
    pub output: Linear,
}

impl Conditioner {
    /// Draws the parameters.
    ///
    /// # Errors
    /// When there are no conditionings, one occurs twice, or one has an extent of 0.
    pub fn new(parts: &[Conditioning], constant_norm: bool, device: &Device) -> Result<Self> {
        if parts.is_empty() {
            return Err(Error::usage("a hypernetwork needs at least one conditioning"));
        }
        for (i, part) in parts.iter().enumerate() {
            part.check()?;
            if parts[..i].iter().any(|other| std::mem::discriminant(other) == std::mem::discriminant(part)) {
                return Err(Error::usage(format!("the conditioning {part:?} occurs twice")));
            }
        }
        let normal = Initializer::Normal { mean: 0.0, std: 1.0 };
        let (mut tables, mut encoders) = (Vec::new(), Vec::new());
        for part in parts {
            match *part {
                Conditioning::Task { tasks, dim } => tables.push(normal.init([tasks, dim], device)),
                Conditioning::Data { inputs, dim } => encoders.push(Encoder {
                    hidden: LinearConfig::new(inputs, 4 * dim).init(device),
                    output: LinearConfig::new(4 * dim, dim).init(device),
                }),
                Conditioning::Noise { .. } | Conditioning::Given { .. } => {}
            }
        }
        Ok(Self { tables, encoders, parts: parts.to_vec(), constant_norm })
    }

    /// The codes of a batch.
    ///
    /// # Errors
    /// When the condition lacks a part, has one of another width, or names a task that is not there.
    pub fn encode(&self, condition: &Condition) -> Result<Code> {
        let missing = |what: &str| {
            Error::usage(format!("the hypernetwork is conditioned on {what}, which is not given"))
        };
        let fits = |what: &str, found: usize, dim: usize| match found == dim {
            true => Ok(()),
            false => Err(Error::usage(format!("the {what} has the width {found}, expected {dim}"))),
        };
        let parts = self.parts.iter().map(|part| match part {
            Conditioning::Task { tasks, .. } => {
                let table = self.tables[0].val();
                let numbers = condition.tasks.as_ref().ok_or_else(|| missing("tasks"))?;
                if let Some(task) = numbers.iter().find(|&task| task >= tasks) {
                    return Err(Error::usage(format!("there is no task {task}"))
                        .hint(format!("there are {tasks}, numbered from 0")));
                }
                let numbers: Vec<i64> = numbers.iter().map(|&task| task as i64).collect();
                let count = numbers.len();
                let numbers = Tensor::<1, Int>::from_data(TensorData::new(numbers, [count]), &table.device());
                Ok(table.select(0, numbers).unsqueeze_dim(1))
            }
            Conditioning::Data { inputs, .. } => {
                let support = condition.support.clone().ok_or_else(|| missing("data"))?;
                fits("support set", support.dims()[2], *inputs)?;
                let encoder = &self.encoders[0];
                Ok(encoder.output.forward(encoder.hidden.forward_activated(support, Activation::Relu)))
            }
            Conditioning::Noise { dim, .. } => {
                let noise = condition.noise.clone().ok_or_else(|| missing("noise"))?;
                fits("noise", noise.dims()[1], *dim)?;
                Ok(noise.unsqueeze_dim(1))
            }
            Conditioning::Given { dim } => {
                let given = condition.given.clone().ok_or_else(|| missing("a descriptor"))?;
                fits("descriptor", given.dims()[1], *dim)?;
                Ok(given.unsqueeze_dim(1))
            }
        });
        let codes = parts.collect::<Result<Vec<Tensor<3>>>>()?;
        Ok(Code(match self.constant_norm {
            true => self.parts.iter().zip(codes).map(|(part, code)| with_constant_norm(part, code)).collect(),
            false => codes,
        }))
    }

    /// Adds one more task; its vector begins as the mean of the others.
    ///
    /// # Errors
    /// When the hypernetwork is not conditioned on tasks.
    pub fn add_task(mut self) -> Result<Self> {
        let Some(table) = self.tables.pop() else {
            return Err(Error::usage("the hypernetwork is not conditioned on tasks"));
        };
        let table = table.val();
        self.tables.push(Param::from_tensor(Tensor::cat(vec![table.clone(), table.mean_dim(0)], 0)));
        for part in &mut self.parts {
            if let Conditioning::Task { tasks, .. } = part {
                *tasks += 1;
            }
        }
        Ok(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn noise_of_either_law_has_the_mean_0_and_the_variance_1() {
        for law in [NoiseLaw::Normal, NoiseLaw::Uniform] {
            let noise = law.draw(2000, 5, &mut kiln_core::random_stream(0, "noise", 0), &Device::flex());
            let values: Vec<f32> = noise.into_data().iter().collect();
            let mean = values.iter().sum::<f32>() / 1e4;
            let variance = values.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / 1e4;
            assert!(mean.abs() < 0.05 && (variance - 1.0).abs() < 0.05, "{law:?} {mean} {variance}");
            let largest = values.iter().fold(0f32, |largest, x| largest.max(x.abs()));
            assert_eq!(largest <= 3f32.sqrt(), law == NoiseLaw::Uniform);
        }
    }
}
