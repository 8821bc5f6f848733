//! The four networks of the paper, each with the names, shapes and outputs that `braindecode` gives it.
//!
//! All map `[batch, channels, samples]` to logits `[batch, classes, predictions]`. Trial-wise, one prediction is made of a
//! whole window. A *dense* network makes one for every place of its receptive field in a longer window, at once: strides
//! become dilations of all that follows, so that prediction `p` equals the trial-wise output for the samples from `p` on.

mod deep4;
mod eegnet;
mod freeze;
mod shallow;
mod state;
mod tcn;
mod time_spat;
mod timeline;

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use clap::ValueEnum;
use kiln_core::{Error, Result};
use serde::{Deserialize, Serialize};

pub use deep4::{Deep4, Deep4Config};
pub use eegnet::{EegNet, EegNetConfig};
pub use freeze::freeze;
pub use shallow::{ShallowNet, ShallowNetConfig};
pub use state::{from_braindecode, to_braindecode};
pub use tcn::{Tcn, TcnConfig};
pub use time_spat::ConvTimeSpat;

/// Steps of the last convolution.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum FinalConv {
    /// So many.
    Steps(usize),
    /// As many as make one prediction of a window.
    Auto(Auto),
}

/// The word `auto`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Auto {
    /// The word itself.
    Auto,
}

impl Default for FinalConv {
    fn default() -> Self {
        Self::Auto(Auto::Auto)
    }
}

impl FinalConv {
    /// The steps, where `features` come before.
    fn steps(self, features: usize) -> usize {
        match self {
            Self::Steps(steps) => steps,
            Self::Auto(_) => features,
        }
    }
}

/// Which network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Arch {
    /// ShallowFBCSPNet: one layer of filters and their power
    Shallow,
    /// Deep4Net: four layers of convolution and pooling
    Deep4,
    /// TCN: dilated causal convolutions
    Tcn,
    /// EEGNet v4: few parameters
    #[value(name = "eegnet")]
    EegNet,
}

/// Configuration of a [`Model`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "model", rename_all = "lowercase")]
pub enum ModelConfig {
    /// ShallowFBCSPNet
    Shallow(ShallowNetConfig),
    /// Deep4Net
    Deep4(Deep4Config),
    /// TCN
    Tcn(TcnConfig),
    /// EEGNet v4
    EegNet(EegNetConfig),
}

/// Calls the same method of whichever network it is.
macro_rules! each {
    ($enum:ident, $value:expr, $network:ident => $call:expr) => {
        match $value {
            $enum::Shallow($network) => $call,
            $enum::Deep4($network) => $call,
            $enum::Tcn($network) => $call,
            $enum::EegNet($network) => $call,
        }
    };
}

impl ModelConfig {
    /// The paper's network for windows of so many channels and samples, trial-wise.
    pub fn new(arch: Arch, n_chans: usize, n_outputs: usize, n_times: usize) -> Self {
        match arch {
            Arch::Shallow => Self::Shallow(ShallowNetConfig::new(n_chans, n_outputs, n_times)),
            Arch::Deep4 => Self::Deep4(Deep4Config::new(n_chans, n_outputs, n_times)),
            Arch::Tcn => Self::Tcn(TcnConfig::new(n_chans, n_outputs, n_times)),
            Arch::EegNet => Self::EegNet(EegNetConfig::new(n_chans, n_outputs, n_times)),
        }
    }

    /// The dense form of the network. Its last convolution is shortened, where it has one that would span the window, so
    /// that a window holds several predictions: to `final_conv` steps, by default those of the paper or half of the window.
    #[must_use]
    pub fn dense(self, final_conv: Option<usize>) -> Self {
        match self {
            Self::Shallow(config) => Self::Shallow(config.dense(final_conv)),
            Self::Deep4(config) => Self::Deep4(config.dense(final_conv)),
            // Has no strides and makes every prediction that it can.
            Self::Tcn(config) => Self::Tcn(config),
            Self::EegNet(config) => Self::EegNet(config.dense(final_conv)),
        }
    }

    /// The same with `width` times the filters.
    #[must_use]
    pub fn scaled(self, width: f64) -> Self {
        each!(Self, self, config => config.scaled(width).into())
    }

    /// Checks that the network can be built and sees at least one whole receptive field in its window.
    ///
    /// # Errors
    /// Tells what does not fit.
    pub fn check(&self) -> Result<()> {
        let (channels, samples) = (self.n_chans(), self.n_times());
        if channels == 0 || self.n_outputs() == 0 {
            return Err(Error::usage(format!(
                "a network of {channels} channels and {} classes",
                self.n_outputs()
            ))
            .hint("both must be at least 1"));
        }
        let drop = each!(Self, self, config => config.drop_prob);
        if !(0.0..1.0).contains(&drop) {
            return Err(Error::usage(format!("a dropout of {drop}, which must be in [0, 1)")));
        }
        let widths = each!(Self, self, config => config.widths());
        if let Some(width) = widths.iter().find(|&&width| width == 0 || width > 1 << 16) {
            return Err(Error::usage(format!("a layer of {width} filters or taps"))
                .hint("every number of filters, blocks and taps must be at least 1"));
        }
        let least = self.receptive();
        if self.predictions(samples) == 0 {
            return Err(Error::usage(format!("a window of {samples} samples is too short for this network"))
                .hint(format!("it must have at least {least}: use a longer --window or a smaller network")));
        }
        Ok(())
    }

    /// Channels of the input.
    pub fn n_chans(&self) -> usize {
        each!(Self, self, config => config.n_chans)
    }

    /// Classes.
    pub fn n_outputs(&self) -> usize {
        each!(Self, self, config => config.n_outputs)
    }

    /// Samples of a window.
    pub fn n_times(&self) -> usize {
        each!(Self, self, config => config.n_times)
    }

    /// Samples that one prediction sees.
    pub fn receptive(&self) -> usize {
        each!(Self, self, config => config.receptive())
    }

    /// Predictions for so many samples.
    pub fn predictions(&self, samples: usize) -> usize {
        each!(Self, self, config => config.predictions(samples))
    }

    /// How many blocks the network has, the classifier last: what `freeze:K` counts.
    pub fn blocks(&self) -> usize {
        each!(Self, self, config => config.block_names().len())
    }

    /// The block that a parameter belongs to, counted from the input.
    pub fn block_of(&self, parameter: &str) -> usize {
        let names = each!(Self, self, config => config.block_names());
        let holds = |block: &Vec<String>| block.iter().any(|prefix| parameter.starts_with(prefix.as_str()));
        names.iter().position(holds).unwrap_or(names.len() - 1)
    }

    /// Draws the parameters.
    ///
    /// # Panics
    /// When [`check`](Self::check) refuses.
    pub fn init(&self, device: &Device) -> Model {
        match self {
            Self::Shallow(config) => Model::Shallow(config.init(device)),
            Self::Deep4(config) => Model::Deep4(config.init(device)),
            Self::Tcn(config) => Model::Tcn(config.init(device)),
            Self::EegNet(config) => Model::EegNet(config.init(device)),
        }
    }
}

macro_rules! from_config {
    ($($config:ident => $variant:ident),+) => {
        $(impl From<$config> for ModelConfig {
            fn from(config: $config) -> Self {
                Self::$variant(config)
            }
        })+
    };
}

from_config!(ShallowNetConfig => Shallow, Deep4Config => Deep4, TcnConfig => Tcn, EegNetConfig => EegNet);

/// One of the networks.
#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant, reason = "there is one network at a time")]
pub enum Model {
    /// ShallowFBCSPNet
    Shallow(ShallowNet),
    /// Deep4Net
    Deep4(Deep4),
    /// TCN
    Tcn(Tcn),
    /// EEGNet v4
    EegNet(EegNet),
}

impl Model {
    /// Applies the network.
    ///
    /// # Shapes
    /// - x: `[batch, channels, samples]`
    /// - output, logits: `[batch, classes, predictions]`
    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        self.trace(x, &mut |_| {})
    }

    /// Applies the network and shows what every block puts out, the logits last.
    ///
    /// # Shapes
    /// As [`forward`](Self::forward); a block's output is `[batch, filters, steps]`.
    pub fn trace(&self, x: Tensor<3>, see: &mut dyn FnMut(&Tensor<3>)) -> Tensor<3> {
        each!(Self, self, network => network.trace(x, see))
    }
}

/// Filters scaled by `width`, at least one.
fn scale(filters: usize, width: f64) -> usize {
    ((filters as f64 * width).round() as usize).max(1)
}

/// Windows of `kernel` at every `stride`-th of `length` steps; 0 where none fits.
fn windows(length: usize, kernel: usize, stride: usize) -> usize {
    if length < kernel { 0 } else { (length - kernel) / stride + 1 }
}

/// How many samples one step sees after layers of (kernel, stride).
fn receptive_of(layers: impl IntoIterator<Item = (usize, usize)>) -> usize {
    let (seen, _) = layers
        .into_iter()
        .fold((1, 1), |(seen, step), (kernel, stride)| (seen + (kernel - 1) * step, step * stride));
    seen
}

/// How many steps come of `length` after layers of (kernel, stride).
fn steps_of(length: usize, layers: impl IntoIterator<Item = (usize, usize)>) -> usize {
    layers.into_iter().fold(length, |length, (kernel, stride)| windows(length, kernel, stride))
}
