//! Residual networks of basic blocks (He et al., arXiv 1512.03385), narrow enough for small images.

use burn::module::Module;
use burn::nn::PaddingConfig2d;
use burn::tensor::{Device, Tensor};
use kiln_core::{Error, Result};
use kiln_nn::{BatchNorm, BatchNormConfig, Conv2d, Conv2dConfig, Linear, LinearConfig};
use kiln_ops::{Activation, activate};
use serde::{Deserialize, Serialize};

use super::vit::KEPT;
use super::{check_common, only};
use crate::anchor::{Anchor, Cost, Extent, Feature, Grid, Outline, Segment, linear_cost};

/// Configuration of a [`Resnet`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResnetConfig {
    /// Channels, height and width of an image.
    pub image: [usize; 3],
    /// Step of the first convolution.
    pub patch: usize,
    /// Channels of the first stage; each later one has twice as many and half the height and width.
    pub width: usize,
    /// Blocks of each stage.
    pub depths: Vec<usize>,
    /// Number of classes.
    pub classes: usize,
}

/// A convolution, stages of residual blocks, the mean of each channel and a linear layer. Parts that a stitched network
/// does not need may be absent.
#[derive(Module, Debug)]
pub struct Resnet {
    /// The first convolution.
    pub conv1: Option<Conv2d>,
    /// After it.
    pub bn1: Option<BatchNorm>,
    /// The blocks of all stages.
    pub blocks: Vec<ResnetBlock>,
    /// Means of channels to logits.
    pub fc: Option<Linear>,
    #[module(skip)]
    config: ResnetConfig,
}

/// `relu(bn2(conv2(relu(bn1(conv1(x))))) + downsample(x))`
#[derive(Module, Debug)]
pub struct ResnetBlock {
    /// 3 x 3, with the block's step.
    pub conv1: Conv2d,
    /// After it.
    pub bn1: BatchNorm,
    /// 3 x 3.
    pub conv2: Conv2d,
    /// After it.
    pub bn2: BatchNorm,
    /// 1 x 1, where the block changes the extent.
    pub downsample: Option<Conv2d>,
}

/// The place of a block.
struct Place {
    stage: usize,
    inputs: usize,
    outputs: usize,
    stride: usize,
    /// Height and width that it takes and gives.
    sides: [[usize; 2]; 2],
}

impl ResnetConfig {
    /// Checks that the extents fit one another.
    ///
    /// # Errors
    /// Tells what does not.
    pub fn check(&self) -> Result<()> {
        let doublings = u32::try_from(self.depths.len().saturating_sub(1)).unwrap_or(u32::MAX);
        let widest = 1usize.checked_shl(doublings).and_then(|factor| self.width.checked_mul(factor));
        check_common(self.image, self.classes, &[self.width, widest.unwrap_or(usize::MAX)], &self.depths)?;
        if self.depths.is_empty() || self.patch == 0 {
            return Err(Error::usage("a network needs at least one stage and a step of at least 1"));
        }
        Ok(())
    }

    /// Height and width after a convolution that keeps them but for its step.
    fn stepped(sides: [usize; 2], stride: usize) -> [usize; 2] {
        sides.map(|side| side.div_ceil(stride))
    }

    fn places(&self) -> Vec<Place> {
        let mut sides = Self::stepped([self.image[1], self.image[2]], self.patch);
        let mut inputs = self.width;
        let mut places = Vec::new();
        for (stage, &depth) in self.depths.iter().enumerate() {
            for block in 0..depth {
                let stride = if stage > 0 && block == 0 { 2 } else { 1 };
                let (outputs, after) = (self.width << stage, Self::stepped(sides, stride));
                places.push(Place { stage, inputs, outputs, stride, sides: [sides, after] });
                (inputs, sides) = (outputs, after);
            }
        }
        places
    }

    /// The layout of the network.
    pub fn outline(&self) -> Outline {
        let places = self.places();
        let stem = Self::stepped([self.image[1], self.image[2]], self.patch);
        let extent = |channels, sides| Extent { channels, grid: Grid::Map(sides) };
        let (last_width, last_sides) = places.last().map_or((self.width, stem), |p| (p.outputs, p.sides[1]));
        let mut extents: Vec<Extent> = places.iter().map(|p| extent(p.inputs, p.sides[0])).collect();
        extents.push(extent(last_width, last_sides));
        Outline {
            image: self.image,
            classes: self.classes,
            stages: places.iter().map(|place| place.stage).collect(),
            extents,
            embed: conv_cost(self.image[0], self.width, 3, stem) + norm_cost(self.width),
            blocks: places.iter().map(Place::cost).collect(),
            head: linear_cost(1, last_width, self.classes),
        }
    }

    /// Draws the parameters.
    pub fn init(&self, device: &Device) -> Resnet {
        let places = self.places();
        let last_width = places.last().map_or(self.width, |place| place.outputs);
        let block = |place: &Place| {
            let Place { inputs, outputs, stride, .. } = *place;
            ResnetBlock {
                conv1: conv(inputs, outputs, stride, device),
                bn1: BatchNormConfig::new(outputs).init(device),
                conv2: conv(outputs, outputs, 1, device),
                bn2: BatchNormConfig::new(outputs).init(device),
                downsample: place.changes().then(|| {
                    let config = Conv2dConfig::new([inputs, outputs], [1, 1]).with_bias(false);
                    config.with_stride([stride, stride]).init(device)
                }),
            }
        };
        Resnet {
            conv1: Some(conv(self.image[0], self.width, self.patch, device)),
            bn1: Some(BatchNormConfig::new(self.width).init(device)),
            blocks: places.iter().map(block).collect(),
            fc: Some(LinearConfig::new(last_width, self.classes).init(device)),
            config: self.clone(),
        }
    }
}

impl Place {
    fn changes(&self) -> bool {
        self.inputs != self.outputs || self.stride != 1
    }

    fn cost(&self) -> Cost {
        let (inputs, outputs, sides) = (self.inputs, self.outputs, self.sides[1]);
        let convolutions = conv_cost(inputs, outputs, 3, sides) + conv_cost(outputs, outputs, 3, sides);
        let shortcut = if self.changes() { conv_cost(inputs, outputs, 1, sides) } else { Cost::default() };
        convolutions + norm_cost(outputs) + norm_cost(outputs) + shortcut
    }
}

/// Of a convolution without a bias that gives maps of these sides.
fn conv_cost(inputs: usize, outputs: usize, kernel: usize, sides: [usize; 2]) -> Cost {
    let weights = (kernel * kernel * inputs * outputs) as u64;
    Cost { flops: weights * (sides[0] * sides[1]) as u64, params: weights }
}

/// Of a batch norm: scale and shift. The running mean and variance are not trained.
fn norm_cost(channels: usize) -> Cost {
    Cost { flops: 0, params: 2 * channels as u64 }
}

/// A 3 x 3 convolution that keeps height and width but for its step.
fn conv(inputs: usize, outputs: usize, stride: usize, device: &Device) -> Conv2d {
    let config = Conv2dConfig::new([inputs, outputs], [3, 3]).with_stride([stride, stride]).with_bias(false);
    config.with_padding(PaddingConfig2d::Explicit(1, 1, 1, 1)).init(device)
}

impl Anchor for Resnet {
    fn outline(&self) -> Outline {
        self.config.outline()
    }

    fn embed(&self, images: Tensor<4>) -> Feature {
        let x = self.conv1.as_ref().expect(KEPT).forward(images);
        Feature::Map(activate(self.bn1.as_ref().expect(KEPT).forward(x), Activation::Relu))
    }

    fn block(&self, index: usize, x: Feature) -> Feature {
        Feature::Map(self.blocks[index].forward(x.into_map()))
    }

    fn head(&self, x: Feature) -> Tensor<2> {
        let means = x.into_map().flatten::<3>(2, 3).mean_dim(2).squeeze_dim::<2>(2);
        self.fc.as_ref().expect(KEPT).forward(means)
    }

    fn keep(self, segment: &Segment) -> Self {
        Self {
            conv1: self.conv1.filter(|_| segment.embed),
            bn1: self.bn1.filter(|_| segment.embed),
            blocks: only(self.blocks, &segment.blocks),
            fc: self.fc.filter(|_| segment.head),
            config: self.config,
        }
    }

    fn batch_norms(&mut self) -> Vec<&mut BatchNorm> {
        let blocks = self.blocks.iter_mut().flat_map(|block| [&mut block.bn1, &mut block.bn2]);
        self.bn1.iter_mut().chain(blocks).collect()
    }
}

impl ResnetBlock {
    /// Applies the block.
    ///
    /// # Shapes
    /// - x: `[batch, channels, height, width]`
    /// - output: `[batch, channels', height', width']`
    pub fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let inner = activate(self.bn1.forward(self.conv1.forward(x.clone())), Activation::Relu);
        let inner = self.bn2.forward(self.conv2.forward(inner));
        let shortcut = match &self.downsample {
            Some(conv) => conv.forward(x),
            None => x,
        };
        activate(inner + shortcut, Activation::Relu)
    }
}
