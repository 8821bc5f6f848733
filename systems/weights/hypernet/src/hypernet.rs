//! The hypernetwork: `Θ = H(C; Φ)` for a target network `y = F(x; Θ)`.
//!
//! How Θ, a vector of N numbers, comes out of the generator is the review's second criterion:
//!
//! | scheme | pieces | output layers | parameters of the output |
//! |---|---|---|---|
//! | once | 1 | one, of N | d N |
//! | heads | 1 | one for every tensor or layer | d N |
//! | component | one a tensor, each with an embedding | one, of the largest tensor | d max + emb K |
//! | chunk | ⌈N / chunk⌉, each with an embedding | one, of a chunk | d chunk + emb ⌈N / chunk⌉ |

use std::ops::Range;

use burn::module::{Module, Param};
use burn::tensor::{Device, Distribution, Tensor};
use clap::ValueEnum;
use kiln_core::{Context, Error, Result};
use kiln_nn::{ParamSpec, WeightSpec, Weights, initialise};
use serde::{Deserialize, Serialize};

use crate::conditioning::{Code, Condition, Conditioner, Conditioning, NoiseLaw};
use crate::generator::Arch;
use crate::maker::Maker;

/// How many codes the spread of the features is measured over.
const PROBES: usize = 256;
/// The standard deviation of output layers that begin small, as a part of Kaiming's.
const SMALL: f64 = 0.1;

/// What the generator makes at a time (the review's second criterion).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OutputScheme {
    /// All weights in one output layer
    Once,
    /// One output layer for every tensor, or for every layer
    Heads {
        /// Whether weight and bias of a layer come from one output layer.
        by_layer: bool,
    },
    /// One tensor a call, told apart by an embedding; the output is as long as the largest, and cropped
    Component {
        /// Width of the embeddings.
        emb_dim: usize,
    },
    /// Equal chunks of Θ, told apart by an embedding; what the last has too much is dropped
    Chunk {
        /// Numbers in a chunk.
        chunk: usize,
        /// Width of the embeddings.
        emb_dim: usize,
    },
}

/// How the output layer is drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Init {
    /// Weights of variance 2 / fan-in of the target, biases 0 (Chang et al. 2020)
    Hyperfan,
    /// Standard deviation √(2 / width of the features), as for a layer of its own
    Kaiming,
    /// A tenth of that
    Small,
    /// Learned weights of the target beside those made, drawn as usual; what is made begins near 0
    Base,
    /// The same, and every input enters with a constant norm (magnitude invariant, arXiv 2304.07645)
    Mip,
}

impl Init {
    /// Whether what is made is added to weights that are learned directly.
    fn has_base(self) -> bool {
        matches!(self, Self::Base | Self::Mip)
    }
}

/// Which tensors of the target come from one generator; the codes they come from are everyone's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Share {
    /// Every tensor has a generator of its own
    None,
    /// Every layer of the target has one, for its weight and its bias
    Layer,
    /// One generator makes all
    #[default]
    All,
}

impl Share {
    /// The tensors in runs that share a generator.
    fn groups(self, params: &[ParamSpec]) -> Vec<&[ParamSpec]> {
        params
            .chunk_by(|a, b| match self {
                Self::None => false,
                Self::Layer => layer_of(a) == layer_of(b),
                Self::All => true,
            })
            .collect()
    }

    fn is_all(&self) -> bool {
        *self == Self::All
    }
}

/// `fc1` for `fc1.weight` and `fc1.bias`.
pub(crate) fn layer_of(param: &ParamSpec) -> &str {
    param.name.rsplit_once('.').map_or(&param.name, |(layer, _)| layer)
}

/// Configuration of a [`HyperNet`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HyperNetConfig {
    /// The tensors of the target, in order.
    pub target: WeightSpec,
    /// Patterns of the tensors that are made; the others are ordinary parameters.
    pub predict: Vec<String>,
    /// What the hypernetwork sees.
    pub conditioning: Vec<Conditioning>,
    /// What it makes at a time.
    pub scheme: OutputScheme,
    /// How.
    pub arch: Arch,
    /// How the output layer is drawn.
    pub init: Init,
    /// Which tensors come from one generator.
    #[serde(default, skip_serializing_if = "Share::is_all")]
    pub share: Share,
    /// Makes changes of so low a rank to weights of the target that stay as they are (Hu et al., LoRA, arXiv 2106.09685).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lora: Option<usize>,
    /// Divides the weights of a generator of linear layers by their largest singular value (Miyato et al., arXiv 1802.05957).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub spectral: bool,
}

impl HyperNetConfig {
    /// One vector for all weights from a hidden layer of 32, conditioned on noise of width 8, drawn by hyperfan-in.
    pub fn new(target: WeightSpec) -> Self {
        Self {
            target,
            predict: vec!["*".into()],
            conditioning: vec![Conditioning::Noise { dim: 8, law: NoiseLaw::Normal }],
            scheme: OutputScheme::Once,
            arch: Arch::Mlp(vec![32]),
            init: Init::Hyperfan,
            share: Share::All,
            lora: None,
            spectral: false,
        }
    }

    /// Changes of a low rank to weights that stay; `base` of [`init`](Self::init) gives them. A tensor that two factors
    /// would not make smaller is changed as a whole.
    pub fn with_lora(mut self, rank: usize) -> Self {
        self.lora = Some(rank);
        self
    }

    /// A generator whose layers do not stretch what passes through them.
    pub fn with_spectral_norm(mut self) -> Self {
        self.spectral = true;
        self
    }

    /// Another input; several are put side by side.
    pub fn with_conditioning(mut self, conditioning: impl Into<Vec<Conditioning>>) -> Self {
        self.conditioning = conditioning.into();
        self
    }

    /// Another scheme.
    pub fn with_scheme(mut self, scheme: OutputScheme) -> Self {
        self.scheme = scheme;
        self
    }

    /// Another architecture.
    pub fn with_arch(mut self, arch: Arch) -> Self {
        self.arch = arch;
        self
    }

    /// Another way to draw the output layer.
    pub fn with_init(mut self, init: Init) -> Self {
        self.init = init;
        self
    }

    /// A generator for all tensors, for every layer, or for every tensor.
    pub fn with_share(mut self, share: Share) -> Self {
        self.share = share;
        self
    }

    /// Makes only tensors whose names match one of these patterns, in which `*` stands for anything.
    pub fn with_predict(mut self, patterns: &[&str]) -> Self {
        self.predict = patterns.iter().map(ToString::to_string).collect();
        self
    }

    /// Draws a hypernetwork that depends on the random stream alone.
    ///
    /// # Errors
    /// When a part of the configuration makes no sense.
    pub fn draw(&self, cx: &Context, stream: &str) -> Result<HyperNet> {
        self.draw_over(None, cx, stream)
    }

    /// As [`draw`](Self::draw), over weights of the target that are given, `[N]`.
    ///
    /// # Errors
    /// As [`init`](Self::init).
    pub fn draw_over(&self, base: Option<Tensor<1>>, cx: &Context, stream: &str) -> Result<HyperNet> {
        let mut failed = None;
        let init = |device: &Device| self.init(base, device);
        let drawn = initialise(&cx.device, &mut cx.rng(stream, 0), |device| match init(device) {
            Ok(hyper) => Some(hyper),
            Err(error) => {
                failed = Some(error);
                None
            }
        });
        drawn.ok_or_else(|| failed.unwrap_or_else(|| Error::usage("the hypernetwork cannot be made")))
    }

    /// The tensors that are made.
    fn predicted(&self) -> Result<WeightSpec> {
        self.target.select(&self.predict.iter().map(String::as_str).collect::<Vec<_>>())
    }

    /// Draws a hypernetwork. The weights of the target that are not made, and with [`Init::Base`] or [`Init::Mip`] those that are, begin as
    /// `base [N]`, by default drawn as for the target alone.
    ///
    /// # Errors
    /// When a part of the configuration makes no sense.
    pub fn init(&self, base: Option<Tensor<1>>, device: &Device) -> Result<HyperNet> {
        let made = self.predicted()?;
        if self.lora == Some(0) {
            return Err(Error::usage("changes of rank 0 change nothing").hint("raise --lora"));
        }
        let base = match base {
            Some(base) if base.dims()[0] != self.target.numel() => {
                let message = format!("{} base weights cannot fill {}", base.dims()[0], self.target.numel());
                return Err(Error::usage(message));
            }
            Some(base) => base,
            None => draw_weights(&self.target, device),
        };
        let partial = made.numel() < self.target.numel() || self.lora.is_some();
        let groups = self.share.groups(made.params());
        let makers =
            groups.iter().map(|group| Maker::new(self, group, device)).collect::<Result<Vec<_>>>()?;
        let mut hyper = HyperNet {
            conditioner: Conditioner::new(&self.conditioning, self.init == Init::Mip, device)?,
            makers,
            base: (partial || self.init.has_base()).then(|| Param::from_tensor(base)),
            made: ranges(&self.target, &made),
            config: self.clone(),
        };
        // Changes to weights that are there begin small, whatever the weights.
        let init = if self.lora.is_some() { Init::Small } else { self.init };
        let largest_fan_in = made.params().iter().filter_map(ParamSpec::fan_in).max().unwrap_or(1);
        let probes = if init == Init::Hyperfan { Some(hyper.probes(device)?) } else { None };
        for (maker, group) in hyper.makers.iter_mut().zip(&groups) {
            match &probes {
                Some(probes) => maker.draw_hyperfan(group, probes, largest_fan_in, device),
                None => maker.draw(if init == Init::Kaiming { 1.0 } else { SMALL }, device),
            }
        }
        Ok(hyper)
    }
}

/// Where the tensors of a part lie among those of the whole.
fn ranges(whole: &WeightSpec, part: &WeightSpec) -> Vec<Range<usize>> {
    let mut start = 0;
    let mut ranges = Vec::new();
    for param in whole.params() {
        if part.params().contains(param) {
            ranges.push(start..start + param.len());
        }
        start += param.len();
    }
    ranges
}

/// Initial weights of the target alone: variance 2 / fan-in, biases 0, scales of norms 1.
pub fn draw_weights(spec: &WeightSpec, device: &Device) -> Tensor<1> {
    let parts = spec.params().iter().map(|param| match param.fan_in() {
        Some(fan_in) => {
            let std = (2.0 / fan_in as f64).sqrt();
            Tensor::random([param.len()], Distribution::Normal(0.0, std), device)
        }
        None if is_scale(param) => Tensor::ones([param.len()], device),
        None => Tensor::zeros([param.len()], device),
    });
    Tensor::cat(parts.collect(), 0)
}

/// Whether a tensor is the scale of a norm.
fn is_scale(param: &ParamSpec) -> bool {
    param.shape.len() == 1 && param.name.ends_with("weight")
}

/// A network that makes the weights of another.
#[derive(Module, Debug)]
pub struct HyperNet {
    /// From conditions to codes.
    pub conditioner: Conditioner,
    /// From codes to the weights, in order; one where all tensors share it.
    pub makers: Vec<Maker>,
    /// Weights of the target that are learned directly, `[N]`: added to what is made.
    pub base: Option<Param<Tensor<1>>>,
    /// Where among the N numbers those that are made lie.
    #[module(skip)]
    made: Vec<Range<usize>>,
    #[module(skip)]
    config: HyperNetConfig,
}

/// Weights of the target, one set for every element of a batch.
#[derive(Debug, Clone)]
pub struct Theta {
    /// `[batch, N]`
    pub flat: Tensor<2>,
    spec: WeightSpec,
}

impl Theta {
    /// These numbers, `[batch, N]`, as the tensors of `spec`.
    ///
    /// # Panics
    /// When there are more or fewer.
    pub fn new(flat: Tensor<2>, spec: WeightSpec) -> Self {
        assert_eq!(flat.dims()[1], spec.numel(), "there must be one number for each weight");
        Self { flat, spec }
    }

    /// One tensor of the target with the batch before its own axes.
    ///
    /// # Errors
    /// When there is none of that name and rank.
    pub fn tensor<const D: usize>(&self, name: &str) -> Result<Tensor<D>> {
        let mut start = 0;
        for param in self.spec.params() {
            if param.name == name {
                let mut shape = vec![self.flat.dims()[0]];
                shape.extend(&param.shape);
                let shape: [usize; D] = shape.try_into().map_err(|shape| {
                    Error::usage(format!("\"{name}\" has the shape {shape:?}, not {D} axes"))
                })?;
                return Ok(self.flat.clone().narrow(1, start, param.len()).reshape(shape));
            }
            start += param.len();
        }
        let names: Vec<&str> = self.spec.params().iter().map(|param| param.name.as_str()).collect();
        Err(Error::usage(format!("the target has no tensor \"{name}\""))
            .hint(format!("it has {}", names.join(", "))))
    }

    /// The weights of one element of the batch, to fill a module with.
    ///
    /// # Errors
    /// Never for an element of the batch.
    pub fn weights(&self, element: usize) -> Result<Weights> {
        self.spec.split(self.flat.clone().narrow(0, element, 1).squeeze_dim(0))
    }
}

impl HyperNet {
    /// The configuration it was made with.
    pub fn config(&self) -> &HyperNetConfig {
        &self.config
    }

    /// N, the number of the target's weights.
    pub fn target_len(&self) -> usize {
        self.config.target.numel()
    }

    /// The target's weights for every element of a batch of conditions.
    ///
    /// # Errors
    /// When the condition does not fit the conditioning.
    pub fn generate(&self, condition: &Condition) -> Result<Theta> {
        let code = self.conditioner.encode(condition)?;
        let made = Tensor::cat(self.makers.iter().map(|maker| maker.forward(&code)).collect(), 1);
        let batch = made.dims()[0];
        let flat = match &self.base {
            None => made,
            // Weights that stay take no part in training.
            Some(base) if self.config.lora.is_some() => {
                let base = base.val().without_autodiff().unsqueeze::<2>();
                self.spread(made) + base.expand([batch, self.target_len()])
            }
            Some(base) => self.spread(made) + base.val().unsqueeze::<2>().expand([batch, self.target_len()]),
        };
        Ok(Theta { flat, spec: self.config.target.clone() })
    }

    /// Puts the numbers that are made at their places, with zeros between them: `[batch, N]`.
    fn spread(&self, made: Tensor<2>) -> Tensor<2> {
        let batch = made.dims()[0];
        let device = made.device();
        let (mut parts, mut at, mut taken) = (Vec::new(), 0, 0);
        for range in &self.made {
            if range.start > at {
                parts.push(Tensor::zeros([batch, range.start - at], &device));
            }
            parts.push(made.clone().narrow(1, taken, range.len()));
            (at, taken) = (range.end, taken + range.len());
        }
        if at < self.target_len() {
            parts.push(Tensor::zeros([batch, self.target_len() - at], &device));
        }
        Tensor::cat(parts, 1)
    }

    /// Codes drawn from N(0, 1), or the tasks' own, over which the spread of features is measured.
    fn probes(&self, device: &Device) -> Result<Code> {
        let normal = |shape: [usize; 2]| Tensor::<2>::random(shape, Distribution::Normal(0.0, 1.0), device);
        let mut condition = Condition::default();
        for part in &self.config.conditioning {
            match *part {
                Conditioning::Task { tasks, .. } => {
                    condition.tasks = Some((0..PROBES).map(|probe| probe % tasks).collect());
                }
                Conditioning::Data { inputs, .. } => {
                    condition.support = Some(normal([PROBES, inputs]).unsqueeze_dim(1));
                }
                Conditioning::Noise { dim, .. } => condition.noise = Some(normal([PROBES, dim])),
                Conditioning::Given { dim } => condition.given = Some(normal([PROBES, dim])),
            }
        }
        self.conditioner.encode(&condition)
    }

    /// Adds one more task; its vector begins as the mean of the others.
    ///
    /// # Errors
    /// When the hypernetwork is not conditioned on tasks.
    pub fn add_task(mut self) -> Result<Self> {
        self.conditioner = self.conditioner.add_task()?;
        for part in &mut self.config.conditioning {
            if let Conditioning::Task { tasks, .. } = part {
                *tasks += 1;
            }
        }
        Ok(self)
    }
}

/// Keeps the weights of earlier tasks as they are (von Oswald et al., arXiv 1906.00695, Eq. (2)).
#[derive(Debug, Clone)]
pub struct OutputRegularizer {
    /// Weights of tasks `0..k` before a new one is learned, `[k, N]`
    pub old: Tensor<2>,
}

impl OutputRegularizer {
    /// Remembers what a hypernetwork makes for the first `tasks` tasks.
    ///
    /// # Errors
    /// When it has fewer tasks.
    pub fn snapshot(hyper: &HyperNet, tasks: usize) -> Result<Self> {
        Ok(Self { old: hyper.generate(&Condition::tasks((0..tasks).collect::<Vec<_>>()))?.flat.detach() })
    }

    /// The mean over tasks of `‖H(e_k) - H*(e_k*)‖²`.
    ///
    /// # Errors
    /// When the hypernetwork has fewer tasks.
    pub fn value(&self, hyper: &HyperNet) -> Result<Tensor<1>> {
        let tasks = self.old.dims()[0];
        let now = hyper.generate(&Condition::tasks((0..tasks).collect::<Vec<_>>()))?.flat;
        Ok((now - self.old.clone()).square().sum() / tasks as f64)
    }
}
