//! ShallowFBCSPNet (Schirrmeister et al. 2017): filters over time and channels, and the logarithm of their power.

use burn::module::Module;
use burn::tensor::ops::AvgPoolOptions;
use burn::tensor::{Device, Tensor};
use kiln_nn::{BatchNorm, BatchNormConfig, Dropout, DropoutConfig};
use kiln_ops::avg_pool1d;
use serde::{Deserialize, Serialize};

use super::time_spat::{ConvTimeSpat, FinalLayer, conv, over_time};
use super::timeline::Timeline;
use super::{FinalConv, scale, steps_of};

/// Power below which the logarithm is not taken.
const LEAST_POWER: f64 = 1e-6;
/// Steps of the last convolution of the paper's dense network.
const DENSE_STEPS: usize = 25;

/// Configuration of a [`ShallowNet`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ShallowNetConfig {
    /// Channels.
    pub n_chans: usize,
    /// Classes.
    pub n_outputs: usize,
    /// Samples of a window.
    pub n_times: usize,
    /// Filters over time.
    pub n_filters_time: usize,
    /// Filters over channels.
    pub n_filters_spat: usize,
    /// Taps of the filters over time.
    pub filter_time_length: usize,
    /// Steps over which power is averaged.
    pub pool_time_length: usize,
    /// Steps between the averages.
    pub pool_time_stride: usize,
    /// Steps of the last convolution.
    pub final_conv_length: FinalConv,
    /// Dropout before it.
    pub drop_prob: f64,
    /// Whether strides are dilations.
    pub dense: bool,
}

impl Default for ShallowNetConfig {
    fn default() -> Self {
        Self {
            n_chans: 21,
            n_outputs: 2,
            n_times: 6000,
            n_filters_time: 40,
            n_filters_spat: 40,
            filter_time_length: 25,
            pool_time_length: 75,
            pool_time_stride: 15,
            final_conv_length: FinalConv::default(),
            drop_prob: 0.5,
            dense: false,
        }
    }
}

impl ShallowNetConfig {
    /// The paper's network, trial-wise.
    pub fn new(n_chans: usize, n_outputs: usize, n_times: usize) -> Self {
        Self { n_chans, n_outputs, n_times, ..Self::default() }
    }

    /// The dense form, see [`ModelConfig::dense`](super::ModelConfig::dense).
    #[must_use]
    pub fn dense(self, final_conv: Option<usize>) -> Self {
        let half = steps_of(self.n_times, self.features()).div_ceil(2).max(1);
        let steps = final_conv.unwrap_or(DENSE_STEPS.min(half));
        Self { dense: true, final_conv_length: FinalConv::Steps(steps), ..self }
    }

    /// With `width` times the filters.
    #[must_use]
    pub fn scaled(self, width: f64) -> Self {
        Self {
            n_filters_time: scale(self.n_filters_time, width),
            n_filters_spat: scale(self.n_filters_spat, width),
            ..self
        }
    }

    /// Kernel and stride of what comes before the last convolution.
    fn features(&self) -> [(usize, usize); 2] {
        [(self.filter_time_length, 1), (self.pool_time_length, self.pool_time_stride)]
    }

    fn timeline(&self) -> Timeline {
        Timeline::new(&self.features(), self.final_conv_length, self.n_times, self.dense)
    }

    pub(super) fn receptive(&self) -> usize {
        self.timeline().receptive()
    }

    pub(super) fn predictions(&self, samples: usize) -> usize {
        self.timeline().predictions(samples)
    }

    pub(super) fn widths(&self) -> Vec<usize> {
        vec![
            self.n_filters_time,
            self.n_filters_spat,
            self.filter_time_length,
            self.pool_time_length,
            self.pool_time_stride,
            self.timeline().final_steps(),
        ]
    }

    pub(super) fn block_names(&self) -> Vec<Vec<String>> {
        vec![vec!["conv_time_spat.".into(), "bnorm.".into()], vec!["final_layer.".into()]]
    }

    /// Draws the parameters.
    pub fn init(&self, device: &Device) -> ShallowNet {
        let filters = [self.n_filters_time, self.n_filters_spat];
        ShallowNet {
            conv_time_spat: ConvTimeSpat::init(self.n_chans, filters, self.filter_time_length, device),
            bnorm: BatchNormConfig::new(self.n_filters_spat).init(device),
            drop: DropoutConfig::new(self.drop_prob).init(),
            final_layer: FinalLayer {
                conv_classifier: conv(
                    [self.n_filters_spat, self.n_outputs],
                    [self.timeline().final_steps(), 1],
                    true,
                    device,
                ),
            },
            pool: self.pool_time_length,
            stride: self.pool_time_stride,
            dense: self.dense,
        }
    }
}

/// The network; fields bear the names of its parameters in `braindecode`.
#[derive(Module, Debug)]
pub struct ShallowNet {
    /// Filters over time and channels.
    pub conv_time_spat: ConvTimeSpat,
    /// Their batch norm.
    pub bnorm: BatchNorm,
    /// Dropout before the classifier.
    pub drop: Dropout,
    /// The classifier.
    pub final_layer: FinalLayer,
    /// Steps over which power is averaged.
    pub pool: usize,
    /// Steps between the averages.
    pub stride: usize,
    /// Whether strides are dilations.
    pub dense: bool,
}

impl ShallowNet {
    /// Applies the network, see [`Model::trace`](super::Model::trace).
    pub fn trace(&self, x: Tensor<3>, see: &mut dyn FnMut(&Tensor<3>)) -> Tensor<3> {
        let x = self.bnorm.forward(self.conv_time_spat.forward(x, 1)); // [batch, filters, samples - taps + 1]
        see(&x);
        let (stride, dilation) = if self.dense { (1, self.stride) } else { (self.stride, 1) };
        let pool = AvgPoolOptions::new([self.pool]).with_stride([stride]);
        let power = avg_pool1d(x.clone() * x, pool);
        let features = power.clamp_min(LEAST_POWER).log();
        let logits = over_time(self.drop.forward(features), &self.final_layer.conv_classifier, 1, dilation);
        see(&logits);
        logits
    }
}
