//! VGG (Simonyan and Zisserman 2015, arXiv 1409.1556), without batch norm.

use burn::module::Module;
use burn::nn::Relu;
use burn::tensor::{Device, Tensor};
use kiln_nn::LinearConfig;
use kiln_ops::adaptive_avg_pool2d;

use super::parts::{Layer, apply, apply_flat, conv_with_bias, dropout, max_pool, scaled};

/// Channels of the convolutions; a maximum over 2 × 2 closes each stage.
const STAGES: [(usize, usize); 5] = [(64, 2), (128, 2), (256, 4), (512, 4), (512, 4)];
/// Rows and columns that the classifier sees.
const PLANE: usize = 7;
/// Its inner width.
const HIDDEN: usize = 4096;

/// Configuration of a [`Vgg`].
#[derive(Debug, Clone, PartialEq)]
pub struct VggConfig {
    /// Factor of all widths.
    pub width: f64,
    /// Number of classes.
    pub classes: usize,
}

impl VggConfig {
    /// 19 layers.
    pub fn vgg19(classes: usize) -> Self {
        Self { width: 1.0, classes }
    }

    /// Draws the parameters.
    pub fn init(&self, device: &Device) -> Vgg {
        let mut inputs = 3;
        let mut features = Vec::new();
        for (channels, count) in STAGES {
            for _ in 0..count {
                let outputs = scaled(channels, self.width);
                features.push(Layer::Conv(conv_with_bias([inputs, outputs], 3, 1, 1, device)));
                features.push(Layer::Relu(Relu));
                inputs = outputs;
            }
            features.push(Layer::MaxPool(max_pool(2, 2, 0, false)));
        }
        let linear = |inputs, outputs| Layer::Linear(LinearConfig::new(inputs, outputs).init(device));
        let hidden = scaled(HIDDEN, self.width);
        let classifier = vec![
            linear(inputs * PLANE * PLANE, hidden),
            Layer::Relu(Relu),
            dropout(0.5),
            linear(hidden, hidden),
            Layer::Relu(Relu),
            dropout(0.5),
            linear(hidden, self.classes),
        ];
        Vgg { features, classifier }
    }
}

/// A deep stack of convolutions of 3 × 3.
#[derive(Module, Debug)]
pub struct Vgg {
    features: Vec<Layer>,
    classifier: Vec<Layer>,
}

impl Vgg {
    /// The output of the last rectifier before the last maximum.
    ///
    /// # Shapes
    /// - x: `[batch, 3, height, width]`
    /// - output: `[batch, channels, height / 16, width / 16]`
    pub fn activations(&self, x: Tensor<4>) -> Tensor<4> {
        apply(&self.features[..self.features.len() - 1], x)
    }

    /// The output of the last rectifier before the fourth maximum, `[batch, channels, height / 8, width / 8]`.
    pub fn middle(&self, x: Tensor<4>) -> Tensor<4> {
        let is_pool = |(place, layer): (usize, &Layer)| matches!(layer, Layer::MaxPool(_)).then_some(place);
        let fourth =
            self.features.iter().enumerate().filter_map(is_pool).nth(3).unwrap_or(self.features.len());
        apply(&self.features[..fourth], x)
    }

    /// Logits of activations, `[batch, classes]`.
    pub fn head(&self, activations: Tensor<4>) -> Tensor<2> {
        let x = apply(&self.features[self.features.len() - 1..], activations);
        apply_flat(&self.classifier, adaptive_avg_pool2d(x, [PLANE; 2]).flatten(1, 3))
    }
}
