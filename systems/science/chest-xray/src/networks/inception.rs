//! Inception v3 (Szegedy et al. 2016, arXiv 1512.00567), with its auxiliary classifier.

#![allow(non_snake_case, reason = "torchvision's names")]

use burn::module::Module;
use burn::nn::PaddingConfig2d;
use burn::tensor::{Device, Tensor};
use kiln_nn::{
    AvgPool2dConfig, BatchNorm, BatchNormConfig, Conv2d, Dropout, DropoutConfig, Linear, LinearConfig,
};

use super::parts::{conv, conv_norm, global_mean, max_pool, relu, scaled};

/// Added to variances.
const EPSILON: f64 = 1e-3;
/// Window and stride of the auxiliary classifier's mean.
const AUX_POOL: (usize, usize) = (5, 3);
/// Rows and columns from which its two convolutions can see anything.
const AUX_LEAST: usize = AUX_POOL.0 + 4 * AUX_POOL.1;

/// Configuration of an [`Inception`].
#[derive(Debug, Clone, PartialEq)]
pub struct InceptionConfig {
    /// Factor of all widths.
    pub width: f64,
    /// Number of classes.
    pub classes: usize,
}

impl InceptionConfig {
    /// Version 3.
    pub fn inception_v3(classes: usize) -> Self {
        Self { width: 1.0, classes }
    }

    /// Draws the parameters.
    pub fn init(&self, device: &Device) -> Inception {
        let d = Draw { width: self.width, device };
        let [w32, w64, w80, w192] = [32, 64, 80, 192].map(|width| d.scaled(width));
        let Mixed_5b = d.mixed_5(w192, 32);
        let Mixed_5c = d.mixed_5(Mixed_5b.outputs(), 64);
        let Mixed_5d = d.mixed_5(Mixed_5c.outputs(), 64);
        let Mixed_6a = d.mixed_6a(Mixed_5d.outputs());
        let inputs = Mixed_5d.outputs() + d.scaled(384) + d.scaled(96);
        let wide = 4 * d.scaled(192);
        let Mixed_7a = d.mixed_7a(wide);
        let inputs_7b = wide + d.scaled(320) + d.scaled(192);
        let outputs = d.scaled(320) + 4 * d.scaled(384) + d.scaled(192);
        Inception {
            Conv2d_1a_3x3: d.conv([3, w32], [3, 3], 2, [0, 0]),
            Conv2d_2a_3x3: d.conv([w32, w32], [3, 3], 1, [0, 0]),
            Conv2d_2b_3x3: d.conv([w32, w64], [3, 3], 1, [1, 1]),
            Conv2d_3b_1x1: d.conv([w64, w80], [1, 1], 1, [0, 0]),
            Conv2d_4a_3x3: d.conv([w80, w192], [3, 3], 1, [0, 0]),
            Mixed_5b,
            Mixed_5c,
            Mixed_5d,
            Mixed_6a,
            Mixed_6b: d.mixed_6(inputs, 128),
            Mixed_6c: d.mixed_6(wide, 160),
            Mixed_6d: d.mixed_6(wide, 160),
            Mixed_6e: d.mixed_6(wide, 192),
            AuxLogits: Aux {
                conv0: d.conv([wide, d.scaled(128)], [1, 1], 1, [0, 0]),
                conv1: d.conv([d.scaled(128), d.scaled(768)], [5, 5], 1, [0, 0]),
                fc: LinearConfig::new(d.scaled(768), self.classes).init(device),
            },
            Mixed_7a,
            Mixed_7b: d.mixed_7(inputs_7b),
            Mixed_7c: d.mixed_7(outputs),
            dropout: DropoutConfig::new(0.5).init(),
            fc: LinearConfig::new(outputs, self.classes).init(device),
        }
    }
}

/// Draws convolutions of scaled widths.
struct Draw<'a> {
    width: f64,
    device: &'a Device,
}

impl Draw<'_> {
    fn scaled(&self, channels: usize) -> usize {
        scaled(channels, self.width)
    }

    /// Channels as they are.
    fn conv(&self, channels: [usize; 2], kernel: [usize; 2], stride: usize, padding: [usize; 2]) -> ConvNorm {
        ConvNorm {
            conv: conv(channels, kernel, stride, padding, self.device),
            bn: BatchNormConfig::new(channels[1]).with_epsilon(EPSILON).init(self.device),
        }
    }

    /// Outputs scaled, inputs as they are, with the padding that keeps the plane.
    fn same(&self, inputs: usize, outputs: usize, [rows, columns]: [usize; 2]) -> ConvNorm {
        self.conv([inputs, self.scaled(outputs)], [rows, columns], 1, [rows / 2, columns / 2])
    }

    /// 35 × 35 (figure 5).
    fn mixed_5(&self, inputs: usize, pooled: usize) -> Mixed5 {
        Mixed5 {
            branch1x1: self.same(inputs, 64, [1, 1]),
            branch5x5_1: self.same(inputs, 48, [1, 1]),
            branch5x5_2: self.same(self.scaled(48), 64, [5, 5]),
            branch3x3dbl_1: self.same(inputs, 64, [1, 1]),
            branch3x3dbl_2: self.same(self.scaled(64), 96, [3, 3]),
            branch3x3dbl_3: self.same(self.scaled(96), 96, [3, 3]),
            branch_pool: self.same(inputs, pooled, [1, 1]),
        }
    }

    /// To 17 × 17 (figure 10).
    fn mixed_6a(&self, inputs: usize) -> Mixed6a {
        Mixed6a {
            branch3x3: self.conv([inputs, self.scaled(384)], [3, 3], 2, [0, 0]),
            branch3x3dbl_1: self.same(inputs, 64, [1, 1]),
            branch3x3dbl_2: self.same(self.scaled(64), 96, [3, 3]),
            branch3x3dbl_3: self.conv([self.scaled(96), self.scaled(96)], [3, 3], 2, [0, 0]),
        }
    }

    /// 17 × 17 (figure 6).
    fn mixed_6(&self, inputs: usize, inner: usize) -> Mixed6 {
        let c = self.scaled(inner);
        Mixed6 {
            branch1x1: self.same(inputs, 192, [1, 1]),
            branch7x7_1: self.same(inputs, inner, [1, 1]),
            branch7x7_2: self.same(c, inner, [1, 7]),
            branch7x7_3: self.same(c, 192, [7, 1]),
            branch7x7dbl_1: self.same(inputs, inner, [1, 1]),
            branch7x7dbl_2: self.same(c, inner, [7, 1]),
            branch7x7dbl_3: self.same(c, inner, [1, 7]),
            branch7x7dbl_4: self.same(c, inner, [7, 1]),
            branch7x7dbl_5: self.same(c, 192, [1, 7]),
            branch_pool: self.same(inputs, 192, [1, 1]),
        }
    }

    /// To 8 × 8.
    fn mixed_7a(&self, inputs: usize) -> Mixed7a {
        let c = self.scaled(192);
        Mixed7a {
            branch3x3_1: self.same(inputs, 192, [1, 1]),
            branch3x3_2: self.conv([c, self.scaled(320)], [3, 3], 2, [0, 0]),
            branch7x7x3_1: self.same(inputs, 192, [1, 1]),
            branch7x7x3_2: self.same(c, 192, [1, 7]),
            branch7x7x3_3: self.same(c, 192, [7, 1]),
            branch7x7x3_4: self.conv([c, c], [3, 3], 2, [0, 0]),
        }
    }

    /// 8 × 8 (figure 7).
    fn mixed_7(&self, inputs: usize) -> Mixed7 {
        let c = self.scaled(384);
        Mixed7 {
            branch1x1: self.same(inputs, 320, [1, 1]),
            branch3x3_1: self.same(inputs, 384, [1, 1]),
            branch3x3_2a: self.same(c, 384, [1, 3]),
            branch3x3_2b: self.same(c, 384, [3, 1]),
            branch3x3dbl_1: self.same(inputs, 448, [1, 1]),
            branch3x3dbl_2: self.same(self.scaled(448), 384, [3, 3]),
            branch3x3dbl_3a: self.same(c, 384, [1, 3]),
            branch3x3dbl_3b: self.same(c, 384, [3, 1]),
            branch_pool: self.same(inputs, 192, [1, 1]),
        }
    }
}

/// A network of modules with several branches.
#[derive(Module, Debug)]
pub struct Inception {
    Conv2d_1a_3x3: ConvNorm,
    Conv2d_2a_3x3: ConvNorm,
    Conv2d_2b_3x3: ConvNorm,
    Conv2d_3b_1x1: ConvNorm,
    Conv2d_4a_3x3: ConvNorm,
    Mixed_5b: Mixed5,
    Mixed_5c: Mixed5,
    Mixed_5d: Mixed5,
    Mixed_6a: Mixed6a,
    Mixed_6b: Mixed6,
    Mixed_6c: Mixed6,
    Mixed_6d: Mixed6,
    Mixed_6e: Mixed6,
    AuxLogits: Aux,
    Mixed_7a: Mixed7a,
    Mixed_7b: Mixed7,
    Mixed_7c: Mixed7,
    dropout: Dropout,
    fc: Linear,
}

impl Inception {
    /// The output of the last module.
    ///
    /// # Shapes
    /// - x: `[batch, 3, height, width]`, at least 75 pixels each
    /// - output: `[batch, channels, about height / 32 - 1, about width / 32 - 1]`
    pub fn activations(&self, x: Tensor<4>) -> Tensor<4> {
        self.late(self.early(x))
    }

    /// Logits of activations, `[batch, classes]`.
    pub fn head(&self, activations: Tensor<4>) -> Tensor<2> {
        self.fc.forward(self.dropout.forward(global_mean(activations)))
    }

    /// Logits and those of the auxiliary classifier, which sees nothing in images of less than about 300 pixels.
    ///
    /// # Shapes
    /// - x: as in [`activations`](Self::activations)
    /// - outputs: `[batch, classes]`
    pub fn forward_with_aux(&self, x: Tensor<4>) -> (Tensor<2>, Option<Tensor<2>>) {
        let early = self.early(x);
        let [_, _, height, width] = early.dims();
        let aux = (height.min(width) >= AUX_LEAST).then(|| self.AuxLogits.forward(early.clone()));
        (self.head(self.late(early)), aux)
    }

    /// The output of the third module, about `[batch, channels, height / 8 - 2, width / 8 - 2]`.
    pub fn middle(&self, x: Tensor<4>) -> Tensor<4> {
        let x = self.Conv2d_1a_3x3.forward(x);
        let x = self.Conv2d_2b_3x3.forward(self.Conv2d_2a_3x3.forward(x));
        let x = max_pool(3, 2, 0, false).forward(x);
        let x = self.Conv2d_4a_3x3.forward(self.Conv2d_3b_1x1.forward(x));
        let x = max_pool(3, 2, 0, false).forward(x);
        [&self.Mixed_5b, &self.Mixed_5c, &self.Mixed_5d].into_iter().fold(x, |x, module| module.forward(x))
    }

    fn early(&self, x: Tensor<4>) -> Tensor<4> {
        let x = self.Mixed_6a.forward(self.middle(x));
        let modules = [&self.Mixed_6b, &self.Mixed_6c, &self.Mixed_6d, &self.Mixed_6e];
        modules.into_iter().fold(x, |x, module| module.forward(x))
    }

    fn late(&self, x: Tensor<4>) -> Tensor<4> {
        self.Mixed_7c.forward(self.Mixed_7b.forward(self.Mixed_7a.forward(x)))
    }
}

/// Convolution, batch norm and rectifier.
#[derive(Module, Debug)]
struct ConvNorm {
    conv: Conv2d,
    bn: BatchNorm,
}

impl ConvNorm {
    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        relu(conv_norm(&self.conv, &self.bn, x))
    }

    fn outputs(&self) -> usize {
        self.conv.weight.dims()[0]
    }
}

/// Layers in turn.
fn chain<const N: usize>(layers: [&ConvNorm; N], x: Tensor<4>) -> Tensor<4> {
    layers.into_iter().fold(x, |x, layer| layer.forward(x))
}

/// Means over 3 × 3 with the zeros around.
fn mean_3(x: Tensor<4>) -> Tensor<4> {
    let padding = PaddingConfig2d::Explicit(1, 1, 1, 1);
    AvgPool2dConfig::new([3, 3]).with_strides([1, 1]).with_padding(padding).init().forward(x)
}

#[derive(Module, Debug)]
struct Mixed5 {
    branch1x1: ConvNorm,
    branch5x5_1: ConvNorm,
    branch5x5_2: ConvNorm,
    branch3x3dbl_1: ConvNorm,
    branch3x3dbl_2: ConvNorm,
    branch3x3dbl_3: ConvNorm,
    branch_pool: ConvNorm,
}

impl Mixed5 {
    fn outputs(&self) -> usize {
        [&self.branch1x1, &self.branch5x5_2, &self.branch3x3dbl_3, &self.branch_pool]
            .map(ConvNorm::outputs)
            .iter()
            .sum()
    }

    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let branches = vec![
            self.branch1x1.forward(x.clone()),
            chain([&self.branch5x5_1, &self.branch5x5_2], x.clone()),
            chain([&self.branch3x3dbl_1, &self.branch3x3dbl_2, &self.branch3x3dbl_3], x.clone()),
            self.branch_pool.forward(mean_3(x)),
        ];
        Tensor::cat(branches, 1)
    }
}

#[derive(Module, Debug)]
struct Mixed6a {
    branch3x3: ConvNorm,
    branch3x3dbl_1: ConvNorm,
    branch3x3dbl_2: ConvNorm,
    branch3x3dbl_3: ConvNorm,
}

impl Mixed6a {
    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let branches = vec![
            self.branch3x3.forward(x.clone()),
            chain([&self.branch3x3dbl_1, &self.branch3x3dbl_2, &self.branch3x3dbl_3], x.clone()),
            max_pool(3, 2, 0, false).forward(x),
        ];
        Tensor::cat(branches, 1)
    }
}

#[derive(Module, Debug)]
struct Mixed6 {
    branch1x1: ConvNorm,
    branch7x7_1: ConvNorm,
    branch7x7_2: ConvNorm,
    branch7x7_3: ConvNorm,
    branch7x7dbl_1: ConvNorm,
    branch7x7dbl_2: ConvNorm,
    branch7x7dbl_3: ConvNorm,
    branch7x7dbl_4: ConvNorm,
    branch7x7dbl_5: ConvNorm,
    branch_pool: ConvNorm,
}

impl Mixed6 {
    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let double = [
            &self.branch7x7dbl_1,
            &self.branch7x7dbl_2,
            &self.branch7x7dbl_3,
            &self.branch7x7dbl_4,
            &self.branch7x7dbl_5,
        ];
        let branches = vec![
            self.branch1x1.forward(x.clone()),
            chain([&self.branch7x7_1, &self.branch7x7_2, &self.branch7x7_3], x.clone()),
            chain(double, x.clone()),
            self.branch_pool.forward(mean_3(x)),
        ];
        Tensor::cat(branches, 1)
    }
}

#[derive(Module, Debug)]
struct Mixed7a {
    branch3x3_1: ConvNorm,
    branch3x3_2: ConvNorm,
    branch7x7x3_1: ConvNorm,
    branch7x7x3_2: ConvNorm,
    branch7x7x3_3: ConvNorm,
    branch7x7x3_4: ConvNorm,
}

impl Mixed7a {
    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let seven = [&self.branch7x7x3_1, &self.branch7x7x3_2, &self.branch7x7x3_3, &self.branch7x7x3_4];
        let branches = vec![
            chain([&self.branch3x3_1, &self.branch3x3_2], x.clone()),
            chain(seven, x.clone()),
            max_pool(3, 2, 0, false).forward(x),
        ];
        Tensor::cat(branches, 1)
    }
}

#[derive(Module, Debug)]
struct Mixed7 {
    branch1x1: ConvNorm,
    branch3x3_1: ConvNorm,
    branch3x3_2a: ConvNorm,
    branch3x3_2b: ConvNorm,
    branch3x3dbl_1: ConvNorm,
    branch3x3dbl_2: ConvNorm,
    branch3x3dbl_3a: ConvNorm,
    branch3x3dbl_3b: ConvNorm,
    branch_pool: ConvNorm,
}

impl Mixed7 {
    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let three = self.branch3x3_1.forward(x.clone());
        let double = chain([&self.branch3x3dbl_1, &self.branch3x3dbl_2], x.clone());
        let branches = vec![
            self.branch1x1.forward(x.clone()),
            self.branch3x3_2a.forward(three.clone()),
            self.branch3x3_2b.forward(three),
            self.branch3x3dbl_3a.forward(double.clone()),
            self.branch3x3dbl_3b.forward(double),
            self.branch_pool.forward(mean_3(x)),
        ];
        Tensor::cat(branches, 1)
    }
}

/// The classifier at the middle of the network, which only training uses.
#[derive(Module, Debug)]
struct Aux {
    conv0: ConvNorm,
    conv1: ConvNorm,
    fc: Linear,
}

impl Aux {
    fn forward(&self, x: Tensor<4>) -> Tensor<2> {
        let (kernel, stride) = AUX_POOL;
        let pool = AvgPool2dConfig::new([kernel; 2]).with_strides([stride; 2]).init();
        let x = chain([&self.conv0, &self.conv1], pool.forward(x));
        self.fc.forward(global_mean(x))
    }
}
