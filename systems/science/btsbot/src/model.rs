//! The network of the paper, §3.2, and its two halves as baselines.

use burn::module::Module;
use burn::nn::PaddingConfig2d;
use burn::tensor::{Device, Tensor, activation};
use clap::ValueEnum;
use kiln_core::{Error, Result};
use kiln_nn::{
    BatchNorm, BatchNormConfig, Conv2d, Conv2dConfig, Dropout, DropoutConfig, Linear, LinearConfig,
    MaxPool2d, MaxPool2dConfig,
};
use serde::{Deserialize, Serialize};

use crate::features::FEATURES;
use crate::triplet::SIDE;

/// Steps of the two poolings.
const POOLS: [usize; 2] = [2, 4];

/// Which of an alert's two kinds of input a network sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum Mode {
    /// Images and metadata
    MmCnn,
    /// Images alone
    UmCnn,
    /// Metadata alone
    UmNn,
}

impl Mode {
    /// Whether images are seen.
    pub fn sees_images(self) -> bool {
        self != Self::UmNn
    }

    /// Whether metadata are seen.
    pub fn sees_metadata(self) -> bool {
        self != Self::UmCnn
    }

    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::MmCnn => "mm_cnn",
            Self::UmCnn => "um_cnn",
            Self::UmNn => "um_nn",
        }
    }
}

/// Configuration of an [`MmCnn`]; the defaults are those of the network in production.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MmCnnConfig {
    /// What the network sees.
    pub mode: Mode,
    /// Pixels of a side of the stamps.
    pub side: usize,
    /// Filters of the first and the second pair of convolutions.
    pub channels: [usize; 2],
    /// Pixels of a side of their kernels, an odd number.
    pub kernel: usize,
    /// Dropout of whole channels after each pair.
    pub conv_dropout: [f64; 2],
    /// Widths of the metadata branch.
    pub meta_hidden: [usize; 2],
    /// Dropout between them.
    pub meta_dropout: f64,
    /// Widths of the layers over both branches; none for metadata alone.
    pub head_hidden: Vec<usize>,
    /// Dropout before the last layer.
    pub head_dropout: f64,
}

impl Default for MmCnnConfig {
    fn default() -> Self {
        Self {
            mode: Mode::MmCnn,
            side: SIDE,
            channels: [32, 64],
            kernel: 5,
            conv_dropout: [0.50, 0.55],
            meta_hidden: [128, 128],
            meta_dropout: 0.25,
            head_hidden: vec![8],
            head_dropout: 0.20,
        }
    }
}

impl MmCnnConfig {
    /// The network in production, with 227,811 parameters.
    pub fn new() -> Self {
        Self::default()
    }

    /// With other numbers of filters.
    #[must_use]
    pub fn with_channels(self, channels: [usize; 2]) -> Self {
        Self { channels, ..self }
    }

    /// With other input.
    #[must_use]
    pub fn with_mode(self, mode: Mode) -> Self {
        Self { mode, ..self }
    }

    /// For stamps of another size.
    #[must_use]
    pub fn with_side(self, side: usize) -> Self {
        Self { side, ..self }
    }

    /// Makes sure that the network can be built.
    ///
    /// # Errors
    /// Tells what does not fit.
    pub fn check(&self) -> Result<()> {
        if self.side < POOLS[0] * POOLS[1] || self.side > 1024 {
            return Err(Error::usage(format!("stamps of {0} x {0} pixels", self.side))
                .hint("a network sees stamps of 8 to 1024 pixels a side"));
        }
        if self.kernel.is_multiple_of(2) || self.kernel > self.side {
            return Err(Error::usage(format!("kernels of {0} x {0} pixels", self.kernel))
                .hint("their side must be odd and not above that of the stamps"));
        }
        let widths = self.channels.iter().chain(&self.meta_hidden).chain(&self.head_hidden);
        if let Some(width) = widths.into_iter().find(|&&width| width == 0 || width > 1 << 14) {
            return Err(
                Error::usage(format!("a layer of width {width}")).hint("widths lie between 1 and 16384")
            );
        }
        let drops = self.conv_dropout.iter().chain([&self.meta_dropout, &self.head_dropout]);
        if let Some(drop) = drops.into_iter().find(|drop| !(0.0..1.0).contains(*drop)) {
            return Err(Error::usage(format!("a dropout of {drop}, which must be in [0, 1)")));
        }
        Ok(())
    }

    /// Numbers that the images become.
    fn image_features(&self) -> usize {
        let side = self.side / POOLS[0] / POOLS[1];
        self.channels[1] * side * side
    }

    /// Draws the parameters.
    ///
    /// # Panics
    /// When [`check`](Self::check) refuses.
    pub fn init(&self, device: &Device) -> MmCnn {
        let sees_images = self.mode.sees_images();
        let sees_metadata = self.mode.sees_metadata();
        let [first, second] = self.channels;
        let conv = |from: usize, to: usize| {
            let padding = PaddingConfig2d::Same;
            let config = Conv2dConfig::new([from, to], [self.kernel; 2]).with_padding(padding);
            sees_images.then(|| config.init(device))
        };
        let meta = |from: usize, to: usize| sees_metadata.then(|| LinearConfig::new(from, to).init(device));
        let mut width = if sees_images { self.image_features() } else { 0 };
        width += if sees_metadata { self.meta_hidden[1] } else { 0 };
        let hidden: &[usize] = if sees_images { &self.head_hidden } else { &[] };
        let mut comb_fc = Vec::new();
        for &next in hidden {
            comb_fc.push(LinearConfig::new(width, next).init(device));
            width = next;
        }
        let pool = |size: usize| MaxPool2dConfig::new([size; 2]).with_strides([size; 2]).init();
        MmCnn {
            conv1: conv(3, first),
            conv2: conv(first, first),
            conv3: conv(first, second),
            conv4: conv(second, second),
            pools: POOLS.map(pool).into(),
            conv_drops: self.conv_dropout.map(|prob| DropoutConfig::new(prob).init()).into(),
            meta_bn: sees_metadata.then(|| BatchNormConfig::new(FEATURES.len()).init(device)),
            meta_fc1: meta(FEATURES.len(), self.meta_hidden[0]),
            meta_fc2: meta(self.meta_hidden[0], self.meta_hidden[1]),
            meta_drop: DropoutConfig::new(self.meta_dropout).init(),
            comb_fc,
            head_drop: DropoutConfig::new(self.head_dropout).init(),
            out: LinearConfig::new(width, 1).init(device),
        }
    }
}

/// The network. A baseline lacks the branch that it does not see.
#[derive(Module, Debug)]
pub struct MmCnn {
    /// Convolutions over the three stamps, `[filters, channels, kernel, kernel]`.
    pub conv1: Option<Conv2d>,
    /// See `conv1`.
    pub conv2: Option<Conv2d>,
    /// See `conv1`.
    pub conv3: Option<Conv2d>,
    /// See `conv1`.
    pub conv4: Option<Conv2d>,
    /// Maxima after each pair,
    pub pools: Vec<MaxPool2d>,
    /// and dropout of channels after that.
    pub conv_drops: Vec<Dropout>,
    /// Batch norm of the raw metadata.
    pub meta_bn: Option<BatchNorm>,
    /// The metadata branch.
    pub meta_fc1: Option<Linear>,
    /// See `meta_fc1`.
    pub meta_fc2: Option<Linear>,
    /// Dropout between its layers.
    pub meta_drop: Dropout,
    /// Layers over both branches: image features first, as `[filter, row, column]`.
    pub comb_fc: Vec<Linear>,
    /// Dropout before the last layer.
    pub head_drop: Dropout,
    /// The last layer.
    pub out: Linear,
}

impl MmCnn {
    /// Applies the network.
    ///
    /// # Shapes
    /// - images: `[batch, 3, side, side]`, science, template and difference
    /// - meta: `[batch, 25]`, the features in the order of [`FEATURES`]
    /// - output, logits: `[batch, 1]`
    pub fn forward(&self, images: Tensor<4>, meta: Tensor<2>) -> Tensor<2> {
        self.forward_parts(Some(images), Some(meta))
    }

    /// The same, where what the network does not see may be missing.
    ///
    /// # Panics
    /// When what it sees is missing.
    pub fn forward_parts(&self, images: Option<Tensor<4>>, meta: Option<Tensor<2>>) -> Tensor<2> {
        let x = self.embed(images, meta);
        self.out.forward(if self.comb_fc.is_empty() { x } else { self.head_drop.forward(x) })
    }

    /// How many numbers are learned.
    pub fn parameters(&self) -> usize {
        // Burn counts running statistics, too.
        let statistics = self.meta_bn.as_ref().map_or(0, |norm| 2 * norm.gamma.dims()[0]);
        self.num_params() - statistics
    }

    /// What the last layer sees.
    ///
    /// # Shapes
    /// - output: `[batch, width]`
    ///
    /// # Panics
    /// As [`forward_parts`](Self::forward_parts).
    pub fn embed(&self, images: Option<Tensor<4>>, meta: Option<Tensor<2>>) -> Tensor<2> {
        let images = images.and_then(|images| self.image_features(images));
        let meta = meta.and_then(|meta| self.meta_features(meta));
        let mut branches: Vec<Tensor<2>> = images.into_iter().chain(meta).collect();
        let both = if branches.len() > 1 { Tensor::cat(branches, 1) } else { branches.remove(0) };
        self.comb_fc.iter().fold(both, |x, layer| activation::relu(layer.forward(x)))
    }

    /// The images as numbers, where the network sees them: `[batch, filters × rows × columns]`.
    pub fn image_features(&self, x: Tensor<4>) -> Option<Tensor<2>> {
        let convs = [&self.conv1, &self.conv2, &self.conv3, &self.conv4];
        let mut x = x;
        for (pair, (pool, drop)) in convs.chunks(2).zip(self.pools.iter().zip(&self.conv_drops)) {
            for conv in pair {
                x = activation::relu(conv.as_ref()?.forward(x));
            }
            x = drop_channels(pool.forward(x), drop);
        }
        Some(x.flatten(1, 3))
    }

    /// The metadata branch, where the network has one: `[batch, hidden]`.
    pub fn meta_features(&self, x: Tensor<2>) -> Option<Tensor<2>> {
        let (norm, first, second) =
            (self.meta_bn.as_ref()?, self.meta_fc1.as_ref()?, self.meta_fc2.as_ref()?);
        let x = activation::relu(first.forward(norm.forward(x)));
        Some(activation::relu(second.forward(self.meta_drop.forward(x))))
    }
}

/// Sets whole channels to 0 at random and enlarges the others accordingly, in training.
fn drop_channels(x: Tensor<4>, drop: &Dropout) -> Tensor<4> {
    if !x.device().is_autodiff() || !drop.training.is_enabled() || drop.prob == 0.0 {
        return x;
    }
    let [batch, channels, _, _] = x.dims();
    let kept = drop.forward(Tensor::ones([batch, channels, 1, 1], &x.device()));
    x * kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_production_network_has_the_papers_number_of_parameters() {
        let device = Device::flex();
        let count = |mode| MmCnnConfig::new().with_mode(mode).init(&device).parameters();
        assert_eq!(count(Mode::MmCnn), 227_811);
        assert_eq!(count(Mode::UmNn), 50 + 25 * 128 + 128 + 128 * 128 + 128 + 129);
        assert_eq!(count(Mode::UmCnn), 227_811 - count(Mode::UmNn) + 129 - 128 * 8);
    }

    #[test]
    fn dropout_takes_whole_channels_and_only_in_training() {
        let drop = DropoutConfig::new(0.5).init();
        let ones = Tensor::<4>::ones([4, 16, 2, 2], &Device::flex());
        assert_eq!(drop_channels(ones.clone(), &drop).into_data(), ones.clone().into_data());
        let autodiff = Tensor::<4>::ones([4, 16, 2, 2], &Device::flex().autodiff());
        let values: Vec<f32> = drop_channels(autodiff, &drop).into_data().iter().collect();
        assert!(values.chunks(4).all(|channel| channel == [0.0; 4] || channel == [2.0; 4]));
        let dropped = values.iter().filter(|&&x| x == 0.0).count();
        assert!((60..200).contains(&dropped), "{dropped} of 256");
    }
}
