//! MobileNetV2 (Sandler et al. 2018, arXiv 1801.04381).

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use kiln_nn::{BatchNorm, Conv2d, LinearConfig};

use super::parts::{Layer, apply_flat, conv, conv_norm, depthwise, dropout, global_mean, norm};

/// Expansion, channels, blocks and stride of the stages (table 2).
const STAGES: [(usize, usize, usize, usize); 7] = [
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
];

/// Configuration of a [`MobileNet`].
#[derive(Debug, Clone, PartialEq)]
pub struct MobileNetConfig {
    /// Factor of all widths; the last is not reduced.
    pub width: f64,
    /// Number of classes.
    pub classes: usize,
}

impl MobileNetConfig {
    /// Version 2.
    pub fn mobilenet_v2(classes: usize) -> Self {
        Self { width: 1.0, classes }
    }

    /// Draws the parameters.
    pub fn init(&self, device: &Device) -> MobileNet {
        let first = multiple_of_8(32.0 * self.width);
        let mut inputs = first;
        let mut features = vec![Stage::ConvNorm(conv_norm_pair([3, first], 3, 2, device))];
        for (expansion, channels, blocks, stride) in STAGES {
            let outputs = multiple_of_8(channels as f64 * self.width);
            for block in 0..blocks {
                let stride = if block == 0 { stride } else { 1 };
                features.push(Stage::Residual(Inverted::new([inputs, outputs], expansion, stride, device)));
                inputs = outputs;
            }
        }
        let last = multiple_of_8(1280.0 * self.width.max(1.0));
        features.push(Stage::ConvNorm(conv_norm_pair([inputs, last], 1, 1, device)));
        let classifier =
            vec![dropout(0.2), Layer::Linear(LinearConfig::new(last, self.classes).init(device))];
        MobileNet { features, classifier }
    }
}

/// The nearest multiple of 8, but not more than a tenth less.
fn multiple_of_8(channels: f64) -> usize {
    let rounded = ((channels + 4.0) as usize / 8 * 8).max(8);
    if (rounded as f64) < 0.9 * channels { rounded + 8 } else { rounded }
}

/// A network of inverted residuals.
#[derive(Module, Debug)]
pub struct MobileNet {
    features: Vec<Stage>,
    classifier: Vec<Layer>,
}

#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant, reason = "most are of the larger kind")]
enum Stage {
    ConvNorm((Conv2d, BatchNorm)),
    Residual(Inverted),
}

/// Many channels between few.
#[derive(Module, Debug)]
struct Inverted {
    conv: Vec<Piece>,
}

#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant, reason = "half are of the larger kind")]
enum Piece {
    /// With a rectifier that ends at 6.
    ConvNorm((Conv2d, BatchNorm)),
    Conv(Conv2d),
    Norm(BatchNorm),
}

fn conv_norm_pair(
    channels: [usize; 2],
    kernel: usize,
    stride: usize,
    device: &Device,
) -> (Conv2d, BatchNorm) {
    (conv(channels, [kernel; 2], stride, [kernel / 2; 2], device), norm(channels[1], device))
}

/// `min(max(x, 0), 6)`
fn relu6(x: Tensor<4>) -> Tensor<4> {
    x.clamp(0.0, 6.0)
}

impl Inverted {
    fn new([inputs, outputs]: [usize; 2], expansion: usize, stride: usize, device: &Device) -> Self {
        let inner = expansion * inputs;
        let mut pieces = Vec::new();
        if expansion > 1 {
            pieces.push(Piece::ConvNorm(conv_norm_pair([inputs, inner], 1, 1, device)));
        }
        pieces.push(Piece::ConvNorm((depthwise(inner, stride, device), norm(inner, device))));
        pieces.push(Piece::Conv(conv([inner, outputs], [1; 2], 1, [0; 2], device)));
        pieces.push(Piece::Norm(norm(outputs, device)));
        Self { conv: pieces }
    }

    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let mut y = x.clone();
        let mut pieces = self.conv.iter().peekable();
        while let Some(piece) = pieces.next() {
            y = match (piece, pieces.peek()) {
                (Piece::ConvNorm((conv, norm)), _) => relu6(conv_norm(conv, norm, y)),
                (Piece::Conv(conv), Some(Piece::Norm(norm))) => {
                    pieces.next();
                    conv_norm(conv, norm, y)
                }
                (Piece::Conv(conv), _) => conv.forward(y),
                (Piece::Norm(norm), _) => norm.forward(y),
            };
        }
        if y.dims() == x.dims() { x + y } else { y }
    }
}

fn run(stages: &[Stage], x: Tensor<4>) -> Tensor<4> {
    stages.iter().fold(x, |x, stage| match stage {
        Stage::ConvNorm((conv, norm)) => relu6(conv_norm(conv, norm, x)),
        Stage::Residual(block) => block.forward(x),
    })
}

impl MobileNet {
    /// The output of the last convolution.
    ///
    /// # Shapes
    /// - x: `[batch, 3, height, width]`
    /// - output: `[batch, channels, ⌈height / 32⌉, ⌈width / 32⌉]`
    pub fn activations(&self, x: Tensor<4>) -> Tensor<4> {
        run(&self.features, x)
    }

    /// The output of the third stage, `[batch, channels, ⌈height / 8⌉, ⌈width / 8⌉]`.
    pub fn middle(&self, x: Tensor<4>) -> Tensor<4> {
        let blocks: usize = STAGES[..3].iter().map(|(_, _, blocks, _)| blocks).sum();
        run(&self.features[..=blocks], x)
    }

    /// Logits of activations, `[batch, classes]`.
    pub fn head(&self, activations: Tensor<4>) -> Tensor<2> {
        apply_flat(&self.classifier, global_mean(activations))
    }
}
