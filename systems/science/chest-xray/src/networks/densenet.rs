//! DenseNet (Huang et al. 2017, arXiv 1608.06993); with 121 layers it is the network of CheXNet (arXiv 1711.05225).

use burn::module::Module;
use burn::nn::PaddingConfig2d;
use burn::tensor::{Device, Tensor};
use kiln_nn::{AvgPool2dConfig, BatchNorm, Conv2d, Linear, LinearConfig};

use super::parts::{conv, conv_norm, global_mean, max_pool, norm, relu, scaled};

/// Channels within a layer over those that it adds.
const BOTTLENECK: usize = 4;

/// Configuration of a [`DenseNet`].
#[derive(Debug, Clone, PartialEq)]
pub struct DenseNetConfig {
    /// Layers of the four blocks.
    pub layers: [usize; 4],
    /// Factor of all widths.
    pub width: f64,
    /// Number of classes.
    pub classes: usize,
}

impl DenseNetConfig {
    /// 121 layers.
    pub fn densenet121(classes: usize) -> Self {
        Self { layers: [6, 12, 24, 16], width: 1.0, classes }
    }

    /// 201 layers.
    pub fn densenet201(classes: usize) -> Self {
        Self { layers: [6, 12, 48, 32], width: 1.0, classes }
    }

    /// Draws the parameters.
    pub fn init(&self, device: &Device) -> DenseNet {
        let growth = scaled(32, self.width);
        let first = 2 * growth;
        let mut channels = first;
        let mut block = |number: usize| {
            let layer = |_| {
                let inputs = channels;
                channels += growth;
                DenseLayer {
                    norm1: norm(inputs, device),
                    conv1: conv([inputs, BOTTLENECK * growth], [1; 2], 1, [0; 2], device),
                    norm2: norm(BOTTLENECK * growth, device),
                    conv2: conv([BOTTLENECK * growth, growth], [3; 2], 1, [1; 2], device),
                }
            };
            let block = DenseBlock { denselayer: (0..self.layers[number]).map(layer).collect() };
            let outputs = channels;
            let transition = (number < 3).then(|| {
                channels /= 2;
                Transition {
                    norm: norm(outputs, device),
                    conv: conv([outputs, outputs / 2], [1; 2], 1, [0; 2], device),
                }
            });
            (block, transition)
        };
        let ((denseblock1, transition1), (denseblock2, transition2)) = (block(0), block(1));
        let ((denseblock3, transition3), (denseblock4, _)) = (block(2), block(3));
        DenseNet {
            features: Features {
                conv0: conv([3, first], [7; 2], 2, [3; 2], device),
                norm0: norm(first, device),
                denseblock1,
                transition1,
                denseblock2,
                transition2,
                denseblock3,
                transition3,
                denseblock4,
                norm5: norm(channels, device),
            },
            classifier: LinearConfig::new(channels, self.classes).init(device),
        }
    }
}

/// A densely connected network.
#[derive(Module, Debug)]
pub struct DenseNet {
    features: Features,
    classifier: Linear,
}

#[derive(Module, Debug)]
struct Features {
    conv0: Conv2d,
    norm0: BatchNorm,
    denseblock1: DenseBlock,
    transition1: Option<Transition>,
    denseblock2: DenseBlock,
    transition2: Option<Transition>,
    denseblock3: DenseBlock,
    transition3: Option<Transition>,
    denseblock4: DenseBlock,
    norm5: BatchNorm,
}

/// Layers of which each sees what all before it put out. They are called `denselayer1`, … by `torchvision`.
#[derive(Module, Debug)]
struct DenseBlock {
    denselayer: Vec<DenseLayer>,
}

#[derive(Module, Debug)]
struct DenseLayer {
    norm1: BatchNorm,
    conv1: Conv2d,
    norm2: BatchNorm,
    conv2: Conv2d,
}

/// Halves channels and extents.
#[derive(Module, Debug)]
struct Transition {
    norm: BatchNorm,
    conv: Conv2d,
}

impl DenseNet {
    /// The output of the last batch norm, before its rectifier.
    ///
    /// # Shapes
    /// - x: `[batch, 3, height, width]`
    /// - output: `[batch, channels, height / 32, width / 32]`
    pub fn activations(&self, x: Tensor<4>) -> Tensor<4> {
        let f = &self.features;
        let x = self.middle(x);
        let x = f.transition2.iter().fold(x, |x, transition| transition.forward(x));
        let x = f.denseblock3.forward(x);
        let x = f.transition3.iter().fold(x, |x, transition| transition.forward(x));
        f.norm5.forward(f.denseblock4.forward(x))
    }

    /// The output of the second block, `[batch, channels, height / 8, width / 8]`.
    pub fn middle(&self, x: Tensor<4>) -> Tensor<4> {
        let f = &self.features;
        let x = max_pool(3, 2, 1, false).forward(relu(conv_norm(&f.conv0, &f.norm0, x)));
        let x = f.denseblock1.forward(x);
        let x = f.transition1.iter().fold(x, |x, transition| transition.forward(x));
        f.denseblock2.forward(x)
    }

    /// Logits of activations, `[batch, classes]`.
    pub fn head(&self, activations: Tensor<4>) -> Tensor<2> {
        self.classifier.forward(global_mean(relu(activations)))
    }
}

impl DenseBlock {
    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        self.denselayer.iter().fold(x, |x, layer| layer.forward(x))
    }
}

impl DenseLayer {
    /// The input with the layer's output behind it.
    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let y = relu(conv_norm(&self.conv1, &self.norm2, relu(self.norm1.forward(x.clone()))));
        Tensor::cat(vec![x, self.conv2.forward(y)], 1)
    }
}

impl Transition {
    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let pool = AvgPool2dConfig::new([2, 2]).with_padding(PaddingConfig2d::Valid).init();
        pool.forward(self.conv.forward(relu(self.norm.forward(x))))
    }
}
