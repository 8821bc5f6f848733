//! TCN (Bai, Kolter and Koltun 2018, arXiv 1803.01271; for EEG: Chrabaszcz et al.): residual blocks of two causal
//! convolutions whose dilation doubles from block to block.

use burn::module::{Module, Param};
use burn::nn::Initializer;
use burn::tensor::ops::ConvOptions;
use burn::tensor::{Device, Tensor, activation};
use kiln_nn::{Conv1d, Conv1dConfig, Dropout, DropoutConfig, Linear, LinearConfig};
use kiln_ops::conv1d;
use serde::{Deserialize, Serialize};

use super::scale;

/// Deviation of the first weights.
const WEIGHT_DEVIATION: f64 = 0.01;

/// Configuration of a [`Tcn`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TcnConfig {
    /// Channels.
    pub n_chans: usize,
    /// Classes.
    pub n_outputs: usize,
    /// Samples of a window.
    pub n_times: usize,
    /// Blocks.
    pub n_blocks: usize,
    /// Filters of every block.
    pub n_filters: usize,
    /// Taps of every convolution.
    pub kernel_size: usize,
    /// Share of filters that are dropped after every convolution.
    pub drop_prob: f64,
}

impl Default for TcnConfig {
    fn default() -> Self {
        Self {
            n_chans: 21,
            n_outputs: 2,
            n_times: 6000,
            n_blocks: 5,
            n_filters: 55,
            kernel_size: 16,
            drop_prob: 0.5,
        }
    }
}

impl TcnConfig {
    /// The paper's network.
    pub fn new(n_chans: usize, n_outputs: usize, n_times: usize) -> Self {
        Self { n_chans, n_outputs, n_times, ..Self::default() }
    }

    /// With `width` times the filters.
    #[must_use]
    pub fn scaled(self, width: f64) -> Self {
        Self { n_filters: scale(self.n_filters, width), ..self }
    }

    pub(super) fn receptive(&self) -> usize {
        let dilations = (1usize << self.n_blocks.min(30)) - 1; // 1 + 2 + 4 + …
        dilations.saturating_mul(2 * self.kernel_size.saturating_sub(1)).saturating_add(1)
    }

    pub(super) fn predictions(&self, samples: usize) -> usize {
        (samples + 1).saturating_sub(self.receptive())
    }

    pub(super) fn widths(&self) -> Vec<usize> {
        vec![self.n_blocks, self.n_filters, self.kernel_size]
    }

    pub(super) fn block_names(&self) -> Vec<Vec<String>> {
        let blocks = (0..self.n_blocks).map(|block| vec![format!("temporal_blocks.{block}.")]);
        blocks.chain([vec!["final_layer.".into()]]).collect()
    }

    /// Draws the parameters.
    pub fn init(&self, device: &Device) -> Tcn {
        let block = |number: usize| {
            let inputs = if number == 0 { self.n_chans } else { self.n_filters };
            let conv =
                |inputs| NormedConv::init(inputs, self.n_filters, self.kernel_size, 1 << number, device);
            let one = Conv1dConfig::new(inputs, self.n_filters, 1)
                .with_initializer(Initializer::Normal { mean: 0.0, std: WEIGHT_DEVIATION });
            TemporalBlock {
                conv1: conv(inputs),
                conv2: conv(self.n_filters),
                drop: DropoutConfig::new(self.drop_prob).init(),
                downsample: (inputs != self.n_filters).then(|| one.init(device)),
            }
        };
        Tcn {
            temporal_blocks: (0..self.n_blocks).map(block).collect(),
            final_layer: TcnFinal { fc: LinearConfig::new(self.n_filters, self.n_outputs).init(device) },
            receptive: self.receptive(),
        }
    }
}

/// The network; parameters bear the names that they have in `braindecode`, except that blocks are numbered there as
/// `temporal_block_0` and weights under `parametrizations` (see [`from_braindecode`](super::from_braindecode)).
#[derive(Module, Debug)]
pub struct Tcn {
    /// The blocks.
    pub temporal_blocks: Vec<TemporalBlock>,
    /// The classifier.
    pub final_layer: TcnFinal,
    /// Samples that an output sees.
    pub receptive: usize,
}

/// The classifier of a [`Tcn`].
#[derive(Module, Debug)]
pub struct TcnFinal {
    /// From filters to classes, the same at every step.
    pub fc: Linear,
}

impl Tcn {
    /// Applies the network, see [`Model::trace`](super::Model::trace). Outputs that would see the zeros before the window
    /// are left out.
    pub fn trace(&self, x: Tensor<3>, see: &mut dyn FnMut(&Tensor<3>)) -> Tensor<3> {
        let [_, _, samples] = x.dims();
        let mut x = x;
        for block in &self.temporal_blocks {
            x = block.forward(x);
            see(&x);
        }
        let kept = x.narrow(2, self.receptive - 1, samples - self.receptive + 1);
        let logits = self.final_layer.fc.forward(kept.swap_dims(1, 2)).swap_dims(1, 2);
        see(&logits);
        logits
    }
}

/// `relu(x + f(x))`, where `f` is two causal convolutions, each with ReLU and dropout of whole filters.
#[derive(Module, Debug)]
pub struct TemporalBlock {
    /// The first convolution.
    pub conv1: NormedConv,
    /// The second.
    pub conv2: NormedConv,
    /// Dropout after each.
    pub drop: Dropout,
    /// What makes the input as wide as the output, where it is not.
    pub downsample: Option<Conv1d>,
}

impl TemporalBlock {
    fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let layer = |x: Tensor<3>, conv: &NormedConv| {
            let y = activation::relu(conv.forward(x));
            if !y.device().is_autodiff() {
                return y;
            }
            let [batch, filters, _] = y.dims();
            let kept = self.drop.forward(Tensor::ones([batch, filters, 1], &y.device()));
            y * kept
        };
        let y = layer(layer(x.clone(), &self.conv1), &self.conv2);
        let beside = match &self.downsample {
            Some(conv) => conv.forward(x),
            None => x,
        };
        activation::relu(y + beside)
    }
}

/// A causal, dilated convolution with a weight of given length and direction, `w = g v / ‖v‖` for every filter.
#[derive(Module, Debug)]
pub struct NormedConv {
    /// g, `[filters, 1, 1]`
    pub weight_g: Param<Tensor<3>>,
    /// v, `[filters, inputs, taps]`
    pub weight_v: Param<Tensor<3>>,
    /// `[filters]`
    pub bias: Param<Tensor<1>>,
    /// Steps between taps.
    pub dilation: usize,
}

impl NormedConv {
    fn init(inputs: usize, filters: usize, taps: usize, dilation: usize, device: &Device) -> Self {
        // A draw at once, not when it is first used: g must be the length of what v is.
        let drawn = Initializer::Normal { mean: 0.0, std: WEIGHT_DEVIATION };
        let v: Param<Tensor<3>> = drawn.init([filters, inputs, taps], device);
        let v = v.val();
        let plain = Conv1dConfig::new(inputs, filters, taps).init(device);
        Self {
            weight_g: Param::from_tensor(lengths(v.clone())),
            weight_v: Param::from_tensor(v),
            bias: plain.bias.unwrap_or_else(|| Initializer::Zeros.init([filters], device)),
            dilation,
        }
    }

    fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let v = self.weight_v.val();
        let [_, _, taps] = v.dims();
        let weight = v.clone() * (self.weight_g.val() / lengths(v));
        let before = (taps - 1) * self.dilation;
        let options = ConvOptions::new_with_padding([1], [(before, 0)], [self.dilation], 1);
        conv1d(x, weight, Some(self.bias.val()), options)
    }
}

/// The length of every filter, `[filters, 1, 1]`.
fn lengths(v: Tensor<3>) -> Tensor<3> {
    (v.clone() * v).sum_dim(2).sum_dim(1).sqrt()
}
