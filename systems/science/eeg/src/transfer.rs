//! Ways to carry a network from one site to another, and what they bring.

use std::fmt;
use std::str::FromStr;

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use kiln_core::{Context, Error, Result, TensorFile};
use kiln_nn::{Trained, WeightSpec, initialise, train};
use serde::{Deserialize, Serialize};

use crate::model::{Model, ModelConfig, freeze};
use crate::train::{Classifier, EegTask, training};
use crate::windows::WindowSet;

/// By how much the learning rate falls from block to block towards the input (Howard and Ruder 2018).
pub const DISCRIMINATIVE_FACTOR: f64 = 2.6;

/// A way to a network for the target site.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum Protocol {
    /// A new network learns from the target alone: the baseline.
    Scratch,
    /// The source's network as it is.
    ZeroShot,
    /// Only the classifier of the source's network learns.
    LinearProbe,
    /// All of the source's network learns.
    FineTune,
    /// All but the first blocks of the source's network learn.
    Freeze(usize),
    /// All of it learns, blocks nearer to the input more slowly.
    Discriminative,
    /// A new network learns from source and target together.
    Joint,
}

impl FromStr for Protocol {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "scratch" => Ok(Self::Scratch),
            "zero-shot" => Ok(Self::ZeroShot),
            "linear-probe" => Ok(Self::LinearProbe),
            "fine-tune" => Ok(Self::FineTune),
            "discriminative" => Ok(Self::Discriminative),
            "joint" => Ok(Self::Joint),
            _ => match text.strip_prefix("freeze:").and_then(|count| count.parse().ok()) {
                Some(count) => Ok(Self::Freeze(count)),
                None => Err(Error::usage(format!("there is no protocol \"{text}\"")).hint(
                    "there are scratch, zero-shot, linear-probe, fine-tune, freeze:K, discriminative and joint",
                )),
            },
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Scratch => f.write_str("scratch"),
            Self::ZeroShot => f.write_str("zero-shot"),
            Self::LinearProbe => f.write_str("linear-probe"),
            Self::FineTune => f.write_str("fine-tune"),
            Self::Freeze(count) => write!(f, "freeze:{count}"),
            Self::Discriminative => f.write_str("discriminative"),
            Self::Joint => f.write_str("joint"),
        }
    }
}

impl From<Protocol> for String {
    fn from(protocol: Protocol) -> Self {
        protocol.to_string()
    }
}

impl TryFrom<String> for Protocol {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

/// What is learned from, and how long.
pub struct Target<'a> {
    /// Windows of the target site.
    pub train: &'a WindowSet,
    /// Windows by whose loss the best moment is chosen; where there are none, the last counts.
    pub valid: Option<&'a WindowSet>,
    /// Windows of the source site, for [`Protocol::Joint`].
    pub source: Option<&'a WindowSet>,
    /// Windows of a step.
    pub batch: usize,
    /// Passes through the windows.
    pub epochs: usize,
    /// Learning rate.
    pub lr: f64,
}

impl Target<'_> {
    /// A network for the target; `source` is that of the source site.
    ///
    /// # Errors
    /// When the protocol asks for blocks or data that are not there, or training fails.
    pub fn adapt(
        &self,
        protocol: Protocol,
        source: &Model,
        config: &ModelConfig,
        cx: &Context,
    ) -> Result<Model> {
        let last = config.blocks() - 1;
        let source = copy(source, config, cx)?;
        let start = match protocol {
            Protocol::ZeroShot => return Ok(source),
            Protocol::Scratch | Protocol::Joint => new_model(config, cx),
            Protocol::FineTune | Protocol::Discriminative => source,
            Protocol::LinearProbe => freeze(source, |name| config.block_of(name) < last),
            Protocol::Freeze(count) if count > last => {
                return Err(Error::usage(format!("freeze:{count} leaves nothing to learn")).hint(format!(
                    "the network has {} blocks, so that at most {last} are frozen",
                    config.blocks()
                )));
            }
            Protocol::Freeze(count) => freeze(source, |name| config.block_of(name) < count),
        };
        let joined;
        let windows = match (protocol, self.source) {
            (Protocol::Joint, Some(source)) => {
                joined = self.train.clone().joined(source);
                &joined
            }
            (Protocol::Joint, None) => {
                return Err(Error::usage("joint training needs recordings of the source site"));
            }
            _ => self.train,
        };
        if protocol == Protocol::Discriminative {
            let (paced, setting) = Paced::new(&start, config)?;
            let trained = self.train_module(paced, windows, setting.clone(), cx)?;
            return self.chosen(trained).network(&setting);
        }
        let trained = self.train_module(start, windows, (), cx)?;
        Ok(self.chosen(trained).unfreeze())
    }

    fn train_module<M: Classifier>(
        &self,
        module: M,
        windows: &WindowSet,
        setting: M::Setting,
        cx: &Context,
    ) -> Result<Trained<M>> {
        let per_epoch = crate::train::steps_per_epoch(windows.len(), self.batch);
        let mut config = training(self.epochs * per_epoch, self.lr);
        if self.valid.is_some() {
            config.eval_every = per_epoch;
        }
        let mut task = EegTask::new(windows, self.valid.unwrap_or(windows), self.batch, setting, cx);
        let trained = train(module, &mut task, &config, None, false, cx)?;
        match trained.outcome {
            kiln_nn::Outcome::Interrupted => {
                Err(Error::interrupted("stopped before the network was adapted"))
            }
            _ => Ok(trained),
        }
    }

    /// The best network where there is something to judge by, otherwise the last.
    fn chosen<M>(&self, trained: Trained<M>) -> M {
        if self.valid.is_some() { trained.model } else { trained.last }
    }
}

/// A network with the same weights that shares nothing: clones share the running statistics of their batch norms.
fn copy(model: &Model, config: &ModelConfig, cx: &Context) -> Result<Model> {
    TensorFile::from_module(model).into_module(config.init(&cx.device))
}

/// An untrained network.
pub fn new_model(config: &ModelConfig, cx: &Context) -> Model {
    initialise(&cx.device, &mut cx.rng("init", 0), |device| config.init(device))
}

/// A network whose blocks learn at paces of their own: `θ = θ0 + pace · δ`, of which δ learns.
///
/// Steps of Adam have the size of the learning rate whatever the size of the gradient, so that a parameter moves by `pace`
/// times the learning rate. Weights decay towards where they began, not towards 0: δ has one axis, and is left undecayed.
#[derive(Module, Debug)]
pub struct Paced {
    /// δ of all parameters, one after another.
    delta: Param<Tensor<1>>,
}

/// What [`Paced`] moves away from.
#[derive(Debug, Clone)]
pub struct PacedSetting {
    network: Model,
    spec: WeightSpec,
    start: Tensor<1>,
    pace: Tensor<1>,
}

impl Paced {
    fn new(network: &Model, config: &ModelConfig) -> Result<(Self, PacedSetting)> {
        let spec = WeightSpec::of(network);
        let start = spec.read(network)?;
        let last = config.blocks() - 1;
        let paces: Vec<f32> = spec
            .params()
            .iter()
            .flat_map(|param| {
                let depth = (last - config.block_of(&param.name)) as i32;
                std::iter::repeat_n(DISCRIMINATIVE_FACTOR.powi(-depth) as f32, param.len())
            })
            .collect();
        let pace = Tensor::from_floats(paces.as_slice(), &start.device());
        let delta = Param::from_tensor(start.zeros_like());
        Ok((Self { delta }, PacedSetting { network: network.clone(), spec, start, pace }))
    }
}

impl Classifier for Paced {
    type Setting = PacedSetting;

    fn network(&self, setting: &PacedSetting) -> Result<Model> {
        let moved = setting.start.clone() + self.delta.val() * setting.pace.clone();
        setting.spec.split(moved)?.fill(&setting.network)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn protocols_have_names() {
        for name in
            ["scratch", "zero-shot", "linear-probe", "fine-tune", "freeze:2", "discriminative", "joint"]
        {
            assert_eq!(name.parse::<Protocol>().unwrap().to_string(), name);
        }
        assert!("freeze".parse::<Protocol>().is_err() && "freeze:-1".parse::<Protocol>().is_err());
    }
}
