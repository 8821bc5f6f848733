//! Deep4Net (Schirrmeister et al. 2017): four blocks of convolution, batch norm, ELU and max-pooling.

use burn::module::Module;
use burn::tensor::ops::MaxPoolOptions;
use burn::tensor::{Device, Tensor, activation};
use kiln_nn::{BatchNorm, BatchNormConfig, Conv2d, Dropout, DropoutConfig};
use kiln_ops::max_pool1d;
use serde::{Deserialize, Serialize};

use super::time_spat::{ConvTimeSpat, FinalLayer, conv, over_time};
use super::timeline::Timeline;
use super::{FinalConv, scale};

/// Steps of a pooling window, and between windows.
const POOL: usize = 3;
const BLOCKS: usize = 4;

/// Configuration of a [`Deep4`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Deep4Config {
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
    /// Filters of the second block.
    pub n_filters_2: usize,
    /// Filters of the third block.
    pub n_filters_3: usize,
    /// Filters of the fourth block.
    pub n_filters_4: usize,
    /// Taps of every convolution.
    pub filter_time_length: usize,
    /// Steps of the last convolution.
    pub final_conv_length: FinalConv,
    /// Dropout before every block but the first.
    pub drop_prob: f64,
    /// Whether convolutions take the strides in place of the pooling after them.
    pub stride_before_pool: bool,
    /// Whether strides are dilations.
    pub dense: bool,
}

impl Default for Deep4Config {
    fn default() -> Self {
        Self {
            n_chans: 21,
            n_outputs: 2,
            n_times: 6000,
            n_filters_time: 25,
            n_filters_spat: 25,
            n_filters_2: 50,
            n_filters_3: 100,
            n_filters_4: 200,
            filter_time_length: 10,
            final_conv_length: FinalConv::default(),
            drop_prob: 0.5,
            stride_before_pool: false,
            dense: false,
        }
    }
}

impl Deep4Config {
    /// The paper's network, trial-wise.
    pub fn new(n_chans: usize, n_outputs: usize, n_times: usize) -> Self {
        Self { n_chans, n_outputs, n_times, ..Self::default() }
    }

    /// The dense form, see [`ModelConfig::dense`](super::ModelConfig::dense).
    #[must_use]
    pub fn dense(self, final_conv: Option<usize>) -> Self {
        Self { dense: true, final_conv_length: FinalConv::Steps(final_conv.unwrap_or(1)), ..self }
    }

    /// With `width` times the filters.
    #[must_use]
    pub fn scaled(self, width: f64) -> Self {
        Self {
            n_filters_time: scale(self.n_filters_time, width),
            n_filters_spat: scale(self.n_filters_spat, width),
            n_filters_2: scale(self.n_filters_2, width),
            n_filters_3: scale(self.n_filters_3, width),
            n_filters_4: scale(self.n_filters_4, width),
            ..self
        }
    }

    /// Strides of convolution and pooling.
    fn strides(&self) -> [usize; 2] {
        if self.stride_before_pool { [POOL, 1] } else { [1, POOL] }
    }

    /// Kernel and stride of what comes before the last convolution.
    fn features(&self) -> [(usize, usize); 2 * BLOCKS] {
        let [conv, pool] = self.strides();
        std::array::from_fn(|at| if at % 2 == 0 { (self.filter_time_length, conv) } else { (POOL, pool) })
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
        let filters = [self.n_filters_2, self.n_filters_3, self.n_filters_4];
        let first = [
            self.n_filters_time,
            self.n_filters_spat,
            self.filter_time_length,
            self.timeline().final_steps(),
        ];
        first.into_iter().chain(filters).collect()
    }

    pub(super) fn block_names(&self) -> Vec<Vec<String>> {
        let later = |n: usize| vec![format!("conv_{n}."), format!("bnorm_{n}.")];
        let first = vec!["conv_time_spat.".into(), "bnorm.".into()];
        [first, later(2), later(3), later(4), vec!["final_layer.".into()]].into()
    }

    /// Draws the parameters.
    pub fn init(&self, device: &Device) -> Deep4 {
        let widths = [self.n_filters_spat, self.n_filters_2, self.n_filters_3, self.n_filters_4];
        let block =
            |n: usize| conv([widths[n - 2], widths[n - 1]], [self.filter_time_length, 1], false, device);
        let norm = |n: usize| BatchNormConfig::new(widths[n - 1]).init(device);
        let first = [self.n_filters_time, self.n_filters_spat];
        Deep4 {
            conv_time_spat: ConvTimeSpat::init(self.n_chans, first, self.filter_time_length, device),
            bnorm: norm(1),
            conv_2: block(2),
            bnorm_2: norm(2),
            conv_3: block(3),
            bnorm_3: norm(3),
            conv_4: block(4),
            bnorm_4: norm(4),
            drop: DropoutConfig::new(self.drop_prob).init(),
            final_layer: FinalLayer {
                conv_classifier: conv(
                    [self.n_filters_4, self.n_outputs],
                    [self.timeline().final_steps(), 1],
                    true,
                    device,
                ),
            },
            strides: self.strides(),
            dense: self.dense,
        }
    }
}

/// The network; fields bear the names of its parameters in `braindecode`.
#[derive(Module, Debug)]
pub struct Deep4 {
    /// Filters over time and channels.
    pub conv_time_spat: ConvTimeSpat,
    /// Their batch norm.
    pub bnorm: BatchNorm,
    /// The second block's convolution,
    pub conv_2: Conv2d,
    /// and batch norm.
    pub bnorm_2: BatchNorm,
    /// The third block's convolution,
    pub conv_3: Conv2d,
    /// and batch norm.
    pub bnorm_3: BatchNorm,
    /// The fourth block's convolution,
    pub conv_4: Conv2d,
    /// and batch norm.
    pub bnorm_4: BatchNorm,
    /// Dropout before every block but the first.
    pub drop: Dropout,
    /// The classifier.
    pub final_layer: FinalLayer,
    /// Of convolution and pooling.
    pub strides: [usize; 2],
    /// Whether strides are dilations.
    pub dense: bool,
}

impl Deep4 {
    /// Applies the network, see [`Model::trace`](super::Model::trace).
    pub fn trace(&self, x: Tensor<3>, see: &mut dyn FnMut(&Tensor<3>)) -> Tensor<3> {
        let [conv_stride, pool_stride] = self.strides;
        // In the dense form, what a layer would have strided over dilates all that follows.
        let mut step = 1;
        let mut place = |stride: usize| {
            let dilation = step;
            if self.dense {
                step *= stride;
                (1, dilation)
            } else {
                (stride, 1)
            }
        };
        let (stride, _) = place(conv_stride);
        let mut x = self.conv_time_spat.forward(x, stride);
        let later =
            [(&self.conv_2, &self.bnorm_2), (&self.conv_3, &self.bnorm_3), (&self.conv_4, &self.bnorm_4)];
        let mut norm = &self.bnorm;
        for block in 0..BLOCKS {
            let (stride, dilation) = place(pool_stride);
            let pool = MaxPoolOptions::new([POOL]).with_stride([stride]).with_dilation([dilation]);
            x = max_pool1d(activation::elu(norm.forward(x), 1.0), pool);
            see(&x);
            if let Some((conv, its_norm)) = later.get(block) {
                let (stride, dilation) = place(conv_stride);
                x = over_time(self.drop.forward(x), conv, stride, dilation);
                norm = its_norm;
            }
        }
        let logits = over_time(x, &self.final_layer.conv_classifier, 1, place(1).1);
        see(&logits);
        logits
    }
}
