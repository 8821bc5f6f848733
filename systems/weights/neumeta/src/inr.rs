//! The implicit function: from a coordinate to a kernel (§3.2).

use burn::module::{Module, ModuleVisitor, Param, RunningState};
use burn::tensor::{Device, Tensor, TensorData};
use kiln_core::{Error, Result};
use kiln_nn::{Linear, LinearConfig, WeightSpec, initialise};
use kiln_ops::Activation;
use rand::Rng;
use serde::{Deserialize, Serialize};

use crate::coords::{WeightCoords, encoded_width};
use crate::graph::TensorSpec;

/// Strength of a residual block at the start.
const INITIAL_SCALE: f32 = 0.1;

/// Configuration of an [`Inr`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct InrConfig {
    /// Hidden width.
    pub hidden: usize,
    /// Layers before the last: one that reads the coordinate, the others residual.
    pub layers: usize,
    /// Frequencies of the encoding.
    pub frequencies: usize,
    /// Numbers of the largest kernel of the family: what comes out for a coordinate.
    pub taps: usize,
    /// Networks, one for each tensor of the family.
    pub tensors: usize,
    /// What sizes are divided by: the full width.
    pub norm: f64,
    /// Whether hidden layers add to what comes in; without that it is a plain perceptron.
    pub residual: bool,
}

impl InrConfig {
    /// The paper's: four layers of 256, sixteen frequencies.
    pub fn new(tensors: usize, taps: usize, norm: f64) -> Self {
        Self { hidden: 256, layers: 4, frequencies: 16, taps, tensors, norm, residual: true }
    }

    /// Checks that it makes a network.
    ///
    /// # Errors
    /// Names what does not.
    pub fn check(&self) -> Result<()> {
        let limits = [
            ("--hidden", self.hidden, 1, 8192),
            ("--layers", self.layers, 1, 64),
            ("--num-freqs", self.frequencies, 0, 24),
        ];
        for (name, value, least, most) in limits {
            if !(least..=most).contains(&value) {
                return Err(Error::usage(format!("{name} {value} makes no implicit function"))
                    .hint(format!("it must be {least} to {most}")));
            }
        }
        if !(self.norm.is_finite() && self.norm > 0.0 && self.tensors > 0 && self.taps > 0) {
            return Err(Error::usage("an implicit function needs tensors to write and a width above 0"));
        }
        Ok(())
    }

    /// Number of parameters.
    pub fn numel(&self) -> usize {
        let (input, hidden) = (encoded_width(self.frequencies), self.hidden);
        let block = hidden * hidden + hidden + usize::from(self.residual);
        let mlp = (input + 1) * hidden + (self.layers - 1) * block + (hidden + 1) * self.taps;
        self.tensors * mlp
    }

    /// Draws the parameters, all of them uniformly within `1/√fan_in`; with `quiet`, last layers that put out 0.
    pub fn init(&self, quiet: bool, device: &Device, rng: &mut impl Rng) -> Inr {
        let linear = |from, to, device: &Device| LinearConfig::new(from, to).init(device);
        let scale = |device: &Device| Param::from_tensor(Tensor::from_floats([INITIAL_SCALE], device));
        let mlps: Vec<Mlp> = initialise(device, rng, |device| {
            let mlp = |_| Mlp {
                input: linear(encoded_width(self.frequencies), self.hidden, device),
                blocks: (1..self.layers).map(|_| linear(self.hidden, self.hidden, device)).collect(),
                scales: (1..self.layers).filter(|_| self.residual).map(|_| scale(device)).collect(),
                output: match quiet {
                    false => linear(self.hidden, self.taps, device),
                    true => Linear {
                        weight: Param::from_tensor(Tensor::zeros([self.hidden, self.taps], device)),
                        bias: Some(Param::from_tensor(Tensor::zeros([self.taps], device))),
                    },
                },
            };
            (0..self.tensors).map(mlp).collect()
        });
        let average = RunningState::new(flat(&mlps));
        Inr { mlps, average }
    }
}

/// The implicit function of one tensor.
#[derive(Module, Debug)]
pub struct Mlp {
    /// Reads the encoded coordinate.
    pub input: Linear,
    /// Hidden layers.
    pub blocks: Vec<Linear>,
    /// What each of them counts, `[1]`; none in a plain perceptron.
    pub scales: Vec<Param<Tensor<1>>>,
    /// Writes the kernel.
    pub output: Linear,
}

impl Mlp {
    /// `h = relu(W e + b)`, `h ← h + s relu(W h + b)` for each block, and a linear layer.
    ///
    /// # Shapes
    /// - encoded: `[kernels, 6 + 12 frequencies]`
    /// - output: `[kernels, taps]`
    pub fn forward(&self, encoded: Tensor<2>) -> Tensor<2> {
        let mut h = self.input.forward_activated(encoded, Activation::Relu);
        for (index, block) in self.blocks.iter().enumerate() {
            let inner = block.forward_activated(h.clone(), Activation::Relu);
            h = match self.scales.get(index) {
                Some(scale) => h + inner * scale.val().unsqueeze::<2>(),
                None => inner,
            };
        }
        self.output.forward(h)
    }
}

/// The implicit function of a family, and its average over the last steps of training.
#[derive(Module, Debug)]
pub struct Inr {
    /// One network for each tensor of the family.
    pub mlps: Vec<Mlp>,
    /// All of their parameters, averaged.
    pub average: RunningState<Tensor<1>>,
}

impl Inr {
    /// What is written at coordinates of tensor number `tensor`, divided by `C_in`.
    ///
    /// # Shapes
    /// - output: `[kernels, taps]`
    pub fn raw(
        &self,
        tensor: usize,
        coords: &WeightCoords,
        config: &InrConfig,
        device: &Device,
    ) -> Tensor<2> {
        let kernels = coords.rows.len();
        let encoded = coords.encode(config.norm, config.frequencies);
        let shape = [kernels, encoded_width(config.frequencies)];
        let encoded = Tensor::<2>::from_data(TensorData::new(encoded, shape), device);
        let fan_ins = Tensor::<2>::from_data(TensorData::new(coords.fan_ins(), [kernels, 1]), device);
        self.mlps[tensor].forward(encoded) / fan_ins
    }

    /// Lets the average keep `decay` of what it is and take the rest from the parameters as they are.
    pub fn update_average(&self, decay: f64) {
        let now = flat(&self.mlps).detach();
        let before = self.average.value_sync().to_device(&now.device());
        self.average.update((before * decay + now * (1.0 - decay)).detach());
    }

    /// The function with its averaged parameters.
    ///
    /// # Errors
    /// When the average does not fit, as in a damaged file.
    pub fn averaged(&self) -> Result<Self> {
        let spec = WeightSpec::of(&self.mlps);
        let mlps = spec.split(self.average.value_sync())?.fill(&self.mlps)?;
        Ok(Self { mlps, average: self.average.clone() })
    }
}

/// All parameters, one after another in the order of [`WeightSpec`].
fn flat(mlps: &Vec<Mlp>) -> Tensor<1> {
    let mut parts = Parts(Vec::new());
    mlps.visit(&mut parts);
    Tensor::cat(parts.0, 0)
}

struct Parts(Vec<Tensor<1>>);

impl ModuleVisitor for Parts {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.0.push(param.val().reshape([-1]));
    }
}

/// Which entries of a raw output a tensor takes: the middle of the flat vector for a kernel (a 3 x 3 kernel takes
/// entries 8 to 16 of 25), the first for linear weights and biases.
pub fn crop(raw: Tensor<2>, spec: &TensorSpec) -> Tensor<2> {
    let [_, _, taps] = spec.extents();
    let start = if spec.shape.len() > 2 { raw.dims()[1] / 2 - taps / 2 } else { 0 };
    raw.narrow(1, start, taps)
}
