//! ResNet (He et al. 2016, arXiv 1512.03385).

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use kiln_nn::{BatchNorm, Conv2d, Linear, LinearConfig};

use super::parts::{conv, conv_norm, global_mean, max_pool, norm, relu, scaled};

/// Configuration of a [`ResNet`].
#[derive(Debug, Clone, PartialEq)]
pub struct ResNetConfig {
    /// Blocks of the four stages.
    pub blocks: [usize; 4],
    /// Whether blocks have three convolutions, the outer ones of 1 × 1, instead of two.
    pub bottleneck: bool,
    /// Factor of all widths.
    pub width: f64,
    /// Number of classes.
    pub classes: usize,
}

impl ResNetConfig {
    /// 18 layers.
    pub fn resnet18(classes: usize) -> Self {
        Self { blocks: [2, 2, 2, 2], bottleneck: false, width: 1.0, classes }
    }

    /// 50 layers.
    pub fn resnet50(classes: usize) -> Self {
        Self { blocks: [3, 4, 6, 3], bottleneck: true, width: 1.0, classes }
    }

    /// 101 layers.
    pub fn resnet101(classes: usize) -> Self {
        Self { blocks: [3, 4, 23, 3], bottleneck: true, width: 1.0, classes }
    }

    /// Draws the parameters.
    pub fn init(&self, device: &Device) -> ResNet {
        let first = scaled(64, self.width);
        let mut inputs = first;
        let mut stage = |number: usize| {
            let inner = first << number;
            let outputs = if self.bottleneck { 4 * inner } else { inner };
            let block = |block: usize| {
                let stride = if number > 0 && block == 0 { 2 } else { 1 };
                let channels = [std::mem::replace(&mut inputs, outputs), inner, outputs];
                match self.bottleneck {
                    true => Block::Bottleneck(Bottleneck::new(channels, stride, device)),
                    false => Block::Basic(Basic::new(channels, stride, device)),
                }
            };
            (0..self.blocks[number]).map(block).collect::<Vec<_>>()
        };
        let stages = [stage(0), stage(1), stage(2), stage(3)];
        let [layer1, layer2, layer3, layer4] = stages;
        ResNet {
            conv1: conv([3, first], [7; 2], 2, [3; 2], device),
            bn1: norm(first, device),
            layer1,
            layer2,
            layer3,
            layer4,
            fc: LinearConfig::new(inputs, self.classes).init(device),
        }
    }
}

/// A residual network.
#[derive(Module, Debug)]
pub struct ResNet {
    conv1: Conv2d,
    bn1: BatchNorm,
    layer1: Vec<Block>,
    layer2: Vec<Block>,
    layer3: Vec<Block>,
    layer4: Vec<Block>,
    fc: Linear,
}

impl ResNet {
    /// The output of the last stage.
    ///
    /// # Shapes
    /// - x: `[batch, 3, height, width]`
    /// - output: `[batch, channels, ⌈height / 32⌉, ⌈width / 32⌉]`
    pub fn activations(&self, x: Tensor<4>) -> Tensor<4> {
        stages([&self.layer3, &self.layer4], self.middle(x))
    }

    /// The output of the second stage, `[batch, channels, ⌈height / 8⌉, ⌈width / 8⌉]`.
    pub fn middle(&self, x: Tensor<4>) -> Tensor<4> {
        let x = relu(conv_norm(&self.conv1, &self.bn1, x));
        stages([&self.layer1, &self.layer2], max_pool(3, 2, 1, false).forward(x))
    }

    /// Logits of activations, `[batch, classes]`.
    pub fn head(&self, activations: Tensor<4>) -> Tensor<2> {
        self.fc.forward(global_mean(activations))
    }
}

/// Applies stages in turn.
fn stages(stages: [&Vec<Block>; 2], x: Tensor<4>) -> Tensor<4> {
    stages.into_iter().flatten().fold(x, |x, block| match block {
        Block::Basic(block) => block.forward(x),
        Block::Bottleneck(block) => block.forward(x),
    })
}

/// A residual block.
#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant, reason = "a network has blocks of one kind")]
pub enum Block {
    /// Two convolutions
    Basic(Basic),
    /// Three convolutions
    Bottleneck(Bottleneck),
}

/// Convolution and batch norm that bring the input of a block to the shape of its output.
type Downsample = Option<(Conv2d, BatchNorm)>;

fn downsample(inputs: usize, outputs: usize, stride: usize, device: &Device) -> Downsample {
    (inputs != outputs || stride != 1)
        .then(|| (conv([inputs, outputs], [1; 2], stride, [0; 2], device), norm(outputs, device)))
}

fn shortcut(downsample: &Downsample, x: Tensor<4>) -> Tensor<4> {
    match downsample {
        Some((conv, norm)) => conv_norm(conv, norm, x),
        None => x,
    }
}

/// Two convolutions of 3 × 3.
#[derive(Module, Debug)]
pub struct Basic {
    conv1: Conv2d,
    bn1: BatchNorm,
    conv2: Conv2d,
    bn2: BatchNorm,
    downsample: Downsample,
}

impl Basic {
    fn new([inputs, inner, outputs]: [usize; 3], stride: usize, device: &Device) -> Self {
        Self {
            conv1: conv([inputs, inner], [3; 2], stride, [1; 2], device),
            bn1: norm(inner, device),
            conv2: conv([inner, outputs], [3; 2], 1, [1; 2], device),
            bn2: norm(outputs, device),
            downsample: downsample(inputs, outputs, stride, device),
        }
    }

    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let y = relu(conv_norm(&self.conv1, &self.bn1, x.clone()));
        relu(conv_norm(&self.conv2, &self.bn2, y) + shortcut(&self.downsample, x))
    }
}

/// Convolutions of 1 × 1, 3 × 3 and 1 × 1; the second has the stride.
#[derive(Module, Debug)]
pub struct Bottleneck {
    conv1: Conv2d,
    bn1: BatchNorm,
    conv2: Conv2d,
    bn2: BatchNorm,
    conv3: Conv2d,
    bn3: BatchNorm,
    downsample: Downsample,
}

impl Bottleneck {
    fn new([inputs, inner, outputs]: [usize; 3], stride: usize, device: &Device) -> Self {
        Self {
            conv1: conv([inputs, inner], [1; 2], 1, [0; 2], device),
            bn1: norm(inner, device),
            conv2: conv([inner, inner], [3; 2], stride, [1; 2], device),
            bn2: norm(inner, device),
            conv3: conv([inner, outputs], [1; 2], 1, [0; 2], device),
            bn3: norm(outputs, device),
            downsample: downsample(inputs, outputs, stride, device),
        }
    }

    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let y = relu(conv_norm(&self.conv1, &self.bn1, x.clone()));
        let y = relu(conv_norm(&self.conv2, &self.bn2, y));
        relu(conv_norm(&self.conv3, &self.bn3, y) + shortcut(&self.downsample, x))
    }
}
