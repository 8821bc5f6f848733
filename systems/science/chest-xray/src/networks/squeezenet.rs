//! SqueezeNet (Iandola et al. 2016, arXiv 1602.07360).

use burn::module::Module;
use burn::nn::Relu;
use burn::tensor::{Device, Tensor};
use kiln_nn::{Conv2d, MaxPool2d};

use super::parts::{Layer, apply, conv_with_bias, dropout, global_mean, max_pool, relu, scaled};

/// Configuration of a [`SqueezeNet`].
#[derive(Debug, Clone, PartialEq)]
pub struct SqueezeNetConfig {
    /// Whether it is version 1.1, which pools earlier and costs less than half.
    pub early: bool,
    /// Factor of all widths.
    pub width: f64,
    /// Number of classes.
    pub classes: usize,
}

impl SqueezeNetConfig {
    /// Version 1.0.
    pub fn squeezenet1_0(classes: usize) -> Self {
        Self { early: false, width: 1.0, classes }
    }

    /// Version 1.1.
    pub fn squeezenet1_1(classes: usize) -> Self {
        Self { early: true, width: 1.0, classes }
    }

    /// Draws the parameters.
    pub fn init(&self, device: &Device) -> SqueezeNet {
        // Places of the three maxima among the fire modules, counted before each of the eight.
        let (first, kernel, pools) = if self.early { (64, 3, [0, 2, 4]) } else { (96, 7, [0, 3, 7]) };
        let first = scaled(first, self.width);
        let mut features = vec![
            Part::Layer(Layer::Conv(conv_with_bias([3, first], kernel, 2, 0, device))),
            Part::Layer(Layer::Relu(Relu)),
        ];
        let mut inputs = first;
        for (number, squeeze) in [16, 16, 32, 32, 48, 48, 64, 64].into_iter().enumerate() {
            if pools.contains(&number) {
                features.push(Part::Pool(max_pool(3, 2, 0, true)));
            }
            let squeeze = scaled(squeeze, self.width);
            features.push(Part::Fire(Fire::new(inputs, squeeze, device)));
            inputs = 8 * squeeze;
        }
        let classifier = vec![
            dropout(0.5),
            Layer::Conv(conv_with_bias([inputs, self.classes], 1, 1, 0, device)),
            Layer::Relu(Relu),
        ];
        SqueezeNet { features, classifier }
    }
}

/// A small network of fire modules.
#[derive(Module, Debug)]
pub struct SqueezeNet {
    features: Vec<Part>,
    classifier: Vec<Layer>,
}

#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant, reason = "a network has a dozen")]
enum Part {
    Layer(Layer),
    Pool(MaxPool2d),
    Fire(Fire),
}

/// Few channels, then many: half of them see 3 × 3.
#[derive(Module, Debug)]
struct Fire {
    squeeze: Conv2d,
    expand1x1: Conv2d,
    expand3x3: Conv2d,
}

impl Fire {
    fn new(inputs: usize, squeeze: usize, device: &Device) -> Self {
        Self {
            squeeze: conv_with_bias([inputs, squeeze], 1, 1, 0, device),
            expand1x1: conv_with_bias([squeeze, 4 * squeeze], 1, 1, 0, device),
            expand3x3: conv_with_bias([squeeze, 4 * squeeze], 3, 1, 1, device),
        }
    }

    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let x = relu(self.squeeze.forward(x));
        relu(Tensor::cat(vec![self.expand1x1.forward(x.clone()), self.expand3x3.forward(x)], 1))
    }
}

fn run(parts: &[Part], x: Tensor<4>) -> Tensor<4> {
    parts.iter().fold(x, |x, part| match part {
        Part::Layer(layer) => apply(std::slice::from_ref(layer), x),
        Part::Pool(pool) => pool.forward(x),
        Part::Fire(fire) => fire.forward(x),
    })
}

impl SqueezeNet {
    /// The output of the last fire module.
    ///
    /// # Shapes
    /// - x: `[batch, 3, height, width]`
    /// - output: `[batch, channels, about height / 16, about width / 16]`
    pub fn activations(&self, x: Tensor<4>) -> Tensor<4> {
        run(&self.features, x)
    }

    /// The output of the last fire module before the third maximum, about `[batch, channels, height / 8, width / 8]`.
    pub fn middle(&self, x: Tensor<4>) -> Tensor<4> {
        let is_pool = |(place, part): (usize, &Part)| matches!(part, Part::Pool(_)).then_some(place);
        let third =
            self.features.iter().enumerate().filter_map(is_pool).nth(2).unwrap_or(self.features.len());
        run(&self.features[..third], x)
    }

    /// Logits of activations, `[batch, classes]`: means of rectified planes, one a class.
    pub fn head(&self, activations: Tensor<4>) -> Tensor<2> {
        global_mean(apply(&self.classifier, activations))
    }
}
