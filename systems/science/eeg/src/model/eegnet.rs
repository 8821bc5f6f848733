//! EEGNet v4 (Lawhern et al. 2018, arXiv 1611.08024): filters over time, for each of them filters over channels, and a
//! separable convolution.

use burn::module::Module;
use burn::nn::Initializer;
use burn::tensor::ops::{AvgPoolOptions, ConvOptions};
use burn::tensor::{Device, Tensor, activation};
use kiln_nn::{BatchNorm, BatchNormConfig, Conv2d, Conv2dConfig, Dropout, DropoutConfig};
use kiln_ops::{avg_pool1d, conv1d, conv2d};
use serde::{Deserialize, Serialize};

use super::time_spat::{FinalLayer, conv, over_time};
use super::{FinalConv, receptive_of, scale, steps_of};

/// Averages after the first and the second block.
const POOLS: [usize; 2] = [4, 8];
/// Largest length of a filter over channels.
const MAX_NORM: f64 = 1.0;

/// Configuration of an [`EegNet`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EegNetConfig {
    /// Channels.
    pub n_chans: usize,
    /// Classes.
    pub n_outputs: usize,
    /// Samples of a window.
    pub n_times: usize,
    /// F1: filters over time.
    #[serde(alias = "F1")]
    pub f1: usize,
    /// D: filters over channels for each.
    #[serde(alias = "D")]
    pub d: usize,
    /// F2: filters of the separable convolution.
    #[serde(alias = "F2")]
    pub f2: usize,
    /// Taps of the filters over time.
    pub kernel_length: usize,
    /// Taps of the separable convolution.
    pub depthwise_kernel_length: usize,
    /// Steps of the last convolution.
    pub final_conv_length: FinalConv,
    /// Dropout after each block.
    pub drop_prob: f64,
    /// Whether convolutions see zeros beyond the ends of the window. A dense network has none: its predictions would not be
    /// those of windows, each of which brings zeros of its own.
    pub padded: bool,
    /// Whether strides are dilations.
    pub dense: bool,
}

impl Default for EegNetConfig {
    fn default() -> Self {
        Self {
            n_chans: 21,
            n_outputs: 2,
            n_times: 6000,
            f1: 8,
            d: 2,
            f2: 16,
            kernel_length: 64,
            depthwise_kernel_length: 16,
            final_conv_length: FinalConv::default(),
            drop_prob: 0.25,
            padded: true,
            dense: false,
        }
    }
}

impl EegNetConfig {
    /// The paper's network, trial-wise.
    pub fn new(n_chans: usize, n_outputs: usize, n_times: usize) -> Self {
        Self { n_chans, n_outputs, n_times, ..Self::default() }
    }

    /// The dense form, see [`ModelConfig::dense`](super::ModelConfig::dense), without padding.
    #[must_use]
    pub fn dense(self, final_conv: Option<usize>) -> Self {
        let config = Self { padded: false, ..self };
        let half = steps_of(config.n_times, config.features()).div_ceil(2).max(1);
        Self { dense: true, final_conv_length: FinalConv::Steps(final_conv.unwrap_or(half)), ..config }
    }

    /// With `width` times the filters.
    #[must_use]
    pub fn scaled(self, width: f64) -> Self {
        Self { f1: scale(self.f1, width), f2: scale(self.f2, width), ..self }
    }

    /// Zeros at each end, before the first and the second convolution over time.
    fn padding(&self) -> [usize; 2] {
        match self.padded {
            true => [self.kernel_length / 2, self.depthwise_kernel_length / 2],
            false => [0, 0],
        }
    }

    /// Kernel and stride of what comes before the last convolution; zeros at the ends shorten the kernels.
    fn features(&self) -> [(usize, usize); 4] {
        [
            (self.kernel_length, 1),
            (POOLS[0], POOLS[0]),
            (self.depthwise_kernel_length, 1),
            (POOLS[1], POOLS[1]),
        ]
    }

    /// Steps before the last convolution.
    fn feature_steps(&self, samples: usize) -> usize {
        let [first, second] = self.padding();
        let [time, pool, separable, last_pool] = self.features();
        let steps = steps_of(samples + 2 * first, [time, pool]);
        if steps == 0 { 0 } else { steps_of(steps + 2 * second, [separable, last_pool]) }
    }

    fn final_steps(&self) -> usize {
        self.final_conv_length.steps(self.feature_steps(self.n_times).max(1))
    }

    /// Samples that one prediction sees; with padding, the least that a window must have.
    pub(super) fn receptive(&self) -> usize {
        match self.padded {
            true => (1..).find(|&samples| self.feature_steps(samples) >= self.final_steps()).unwrap_or(1),
            false => receptive_of(self.features().into_iter().chain([(self.final_steps(), 1)])),
        }
    }

    pub(super) fn predictions(&self, samples: usize) -> usize {
        match self.dense {
            true => (samples + 1).saturating_sub(self.receptive()),
            false => (self.feature_steps(samples) + 1).saturating_sub(self.final_steps()),
        }
    }

    pub(super) fn widths(&self) -> Vec<usize> {
        vec![self.f1, self.d, self.f2, self.kernel_length, self.depthwise_kernel_length, self.final_steps()]
    }

    pub(super) fn block_names(&self) -> Vec<Vec<String>> {
        let names = |names: &[&str]| names.iter().map(ToString::to_string).collect();
        vec![
            names(&["conv_temporal.", "bnorm_temporal."]),
            names(&["conv_spatial.", "bnorm_1."]),
            names(&["conv_separable_", "bnorm_2."]),
            names(&["final_layer."]),
        ]
    }

    /// Draws the parameters.
    pub fn init(&self, device: &Device) -> EegNet {
        let spatial = self.f1 * self.d;
        let norm =
            |width: usize| BatchNormConfig::new(width).with_epsilon(1e-3).with_momentum(0.01).init(device);
        let grouped = |width: [usize; 2], kernel: [usize; 2], groups: usize| {
            Conv2dConfig::new(width, kernel)
                .with_groups(groups)
                .with_bias(false)
                .with_initializer(Initializer::XavierUniform { gain: 1.0 })
                .init(device)
        };
        EegNet {
            conv_temporal: conv([1, self.f1], [1, self.kernel_length], false, device),
            bnorm_temporal: norm(self.f1),
            conv_spatial: grouped([self.f1, spatial], [self.n_chans, 1], self.f1),
            bnorm_1: norm(spatial),
            conv_separable_depth: grouped([spatial; 2], [1, self.depthwise_kernel_length], spatial),
            conv_separable_point: conv([spatial, self.f2], [1, 1], false, device),
            bnorm_2: norm(self.f2),
            drop: DropoutConfig::new(self.drop_prob).init(),
            final_layer: FinalLayer {
                conv_classifier: conv([self.f2, self.n_outputs], [1, self.final_steps()], true, device),
            },
            padding: self.padding(),
            dense: self.dense,
        }
    }
}

/// The network; fields bear the names of its parameters in `braindecode`, where the filters over channels are stored as
/// `conv_spatial.parametrizations.weight.original` (see [`from_braindecode`](super::from_braindecode)).
#[derive(Module, Debug)]
pub struct EegNet {
    /// Filters over time, `[F1, 1, 1, taps]`.
    pub conv_temporal: Conv2d,
    /// Their batch norm.
    pub bnorm_temporal: BatchNorm,
    /// Filters over channels, `[F1 D, 1, channels, 1]`; longer ones than 1 are used as if shortened.
    pub conv_spatial: Conv2d,
    /// Their batch norm.
    pub bnorm_1: BatchNorm,
    /// The separable convolution over time, `[F1 D, 1, 1, taps]`,
    pub conv_separable_depth: Conv2d,
    /// and over filters, `[F2, F1 D, 1, 1]`.
    pub conv_separable_point: Conv2d,
    /// Its batch norm.
    pub bnorm_2: BatchNorm,
    /// Dropout after each block.
    pub drop: Dropout,
    /// The classifier.
    pub final_layer: FinalLayer,
    /// Zeros at each end of the two convolutions over time.
    pub padding: [usize; 2],
    /// Whether strides are dilations.
    pub dense: bool,
}

impl EegNet {
    /// Applies the network, see [`Model::trace`](super::Model::trace).
    pub fn trace(&self, x: Tensor<3>, see: &mut dyn FnMut(&Tensor<3>)) -> Tensor<3> {
        let [first, second] = self.padding;
        let [f1, _, _, _] = self.conv_temporal.weight.dims();
        let [spatial, _, channels, _] = self.conv_spatial.weight.dims();
        // [batch, F1, channels, samples]
        let over = ConvOptions::new_with_padding([1, 1], [(0, 0), (first, first)], [1, 1], 1);
        let x = conv2d(x.unsqueeze_dim(1), self.conv_temporal.weight.val(), None, over);
        let x = self.bnorm_temporal.forward(x);
        see(&x.clone().mean_dim(2).squeeze_dim(2)); // the mean over channels stands for them
        let grouped = ConvOptions::new_with_padding([1, 1], [(0, 0), (0, 0)], [1, 1], f1);
        let weight = shortened(self.conv_spatial.weight.val().reshape([spatial, channels]));
        let x = conv2d(x, weight.reshape([spatial, 1, channels, 1]), None, grouped);
        let x: Tensor<3> = x.squeeze_dim(2);
        let x = activation::elu(self.bnorm_1.forward(x), 1.0);
        let (x, step) = self.average(x, POOLS[0], 1);
        see(&x);
        let [_, _, _, taps] = self.conv_separable_depth.weight.dims();
        let depth = self.conv_separable_depth.weight.val().reshape([spatial, 1, taps]);
        let options = ConvOptions::new_with_padding([1], [(second, second)], [step], spatial);
        let x = conv1d(self.drop.forward(x), depth, None, options);
        let x = self.bnorm_2.forward(over_time(x, &self.conv_separable_point, 1, 1));
        let (x, step) = self.average(activation::elu(x, 1.0), POOLS[1], step);
        see(&x);
        let logits = over_time(self.drop.forward(x), &self.final_layer.conv_classifier, 1, step);
        see(&logits);
        logits
    }

    /// The mean of every `size` steps that lie `step` apart, and how far apart the results lie.
    fn average(&self, x: Tensor<3>, size: usize, step: usize) -> (Tensor<3>, usize) {
        if !self.dense {
            return (avg_pool1d(x, AvgPoolOptions::new([size]).with_stride([size])), 1);
        }
        let [_, filters, _] = x.dims();
        let weight = Tensor::full([filters, 1, size], 1.0 / size as f64, &x.device());
        let options = ConvOptions::new_with_padding([1], [(0, 0)], [step], filters);
        (conv1d(x, weight, None, options), step * size)
    }
}

/// Filters `[filters, channels]` with those that are longer than [`MAX_NORM`] shortened to it.
fn shortened(weight: Tensor<2>) -> Tensor<2> {
    let lengths = (weight.clone() * weight.clone()).sum_dim(1).sqrt();
    weight * (lengths.clamp_min(MAX_NORM).recip() * MAX_NORM)
}
