//! ResNet-18 (He et al., "Deep Residual Learning for Image Recognition", arXiv 1512.03385) with the layout
//! and names of torchvision.

use std::cell::RefCell;

use burn::tensor::ops::{ConvOptions, MaxPoolOptions};
use burn::tensor::{Device, Distribution, Tensor};
use kiln_ops::{
    Activation, activate, adaptive_avg_pool2d, batch_norm, batch_norm_train, conv2d, linear, max_pool2d,
};

use super::ParameterMut;

const CLASSES: usize = 1000;
/// Added to the variance of a batch norm.
const EPSILON: f64 = 1e-5;
/// Weight of a batch in the running statistics.
const MOMENTUM: f64 = 0.1;

/// Convolution without a bias, and the batch norm after it.
struct ConvNorm {
    weight: Tensor<4>,
    stride: usize,
    gamma: Tensor<1>,
    beta: Tensor<1>,
    /// Mean and variance.
    running: RefCell<[Tensor<1>; 2]>,
}

impl ConvNorm {
    /// Drawn as torchvision does: normal with variance `2 / fan out`.
    fn new(inputs: usize, outputs: usize, kernel: usize, stride: usize, device: &Device) -> Self {
        let deviation = (2.0 / (outputs * kernel * kernel) as f64).sqrt();
        let shape = [outputs, inputs, kernel, kernel];
        let constant = device.clone().inner();
        Self {
            weight: parameter(Tensor::random(shape, Distribution::Normal(0.0, deviation), device)),
            stride,
            gamma: parameter(Tensor::ones([outputs], device)),
            beta: parameter(Tensor::zeros([outputs], device)),
            running: RefCell::new([Tensor::zeros([outputs], &constant), Tensor::ones([outputs], &constant)]),
        }
    }

    fn forward(&self, x: Tensor<4>, training: bool) -> Tensor<4> {
        let padding = self.weight.dims()[2] / 2;
        let options = ConvOptions::new([self.stride; 2], [padding; 2], [1; 2], 1);
        let y = conv2d(x, self.weight.clone(), None, options);
        let (gamma, beta) = (self.gamma.clone(), self.beta.clone());
        if !training {
            let [mean, variance] = self.running.borrow().clone();
            return batch_norm(y, gamma, beta, mean, variance, EPSILON);
        }
        let normalised = batch_norm_train(y, gamma, beta, EPSILON);
        let mut running = self.running.borrow_mut();
        for (old, new) in running.iter_mut().zip([normalised.mean, normalised.variance]) {
            *old = old.clone() * (1.0 - MOMENTUM) + new.without_autodiff() * MOMENTUM;
        }
        normalised.output
    }
}

/// Two convolutions beside a shortcut.
struct Block {
    first: ConvNorm,
    second: ConvNorm,
    /// Where the shape changes.
    downsample: Option<ConvNorm>,
}

impl Block {
    fn new(inputs: usize, outputs: usize, stride: usize, device: &Device) -> Self {
        let changes = stride != 1 || inputs != outputs;
        Self {
            first: ConvNorm::new(inputs, outputs, 3, stride, device),
            second: ConvNorm::new(outputs, outputs, 3, 1, device),
            downsample: changes.then(|| ConvNorm::new(inputs, outputs, 1, stride, device)),
        }
    }

    fn forward(&self, x: Tensor<4>, training: bool) -> Tensor<4> {
        let y = activate(self.first.forward(x.clone(), training), Activation::Relu);
        let y = self.second.forward(y, training);
        let shortcut = match &self.downsample {
            Some(downsample) => downsample.forward(x, training),
            None => x,
        };
        activate(y + shortcut, Activation::Relu)
    }
}

/// The network.
pub struct ResNet18 {
    stem: ConvNorm,
    blocks: Vec<Block>,
    /// `[512, classes]`
    head: Tensor<2>,
    head_bias: Tensor<1>,
}

impl ResNet18 {
    /// Draws the parameters, on the graph where `device` is an autodiff device.
    pub fn new(device: &Device) -> Self {
        let mut blocks = Vec::new();
        let mut inputs = 64;
        for outputs in [64, 128, 256, 512] {
            let stride = if outputs == inputs { 1 } else { 2 };
            blocks.push(Block::new(inputs, outputs, stride, device));
            blocks.push(Block::new(outputs, outputs, 1, device));
            inputs = outputs;
        }
        let bound = 1.0 / (inputs as f64).sqrt();
        let uniform = Distribution::Uniform(-bound, bound);
        Self {
            stem: ConvNorm::new(3, 64, 7, 2, device),
            blocks,
            head: parameter(Tensor::random([inputs, CLASSES], uniform, device)),
            head_bias: parameter(Tensor::random([CLASSES], uniform, device)),
        }
    }

    /// The classes' scores; with the batch's statistics and updating the running ones in `training`.
    ///
    /// # Shapes
    /// - x: `[batch, 3, height, width]`
    /// - output: `[batch, classes]`
    pub fn forward(&self, x: Tensor<4>, training: bool) -> Tensor<2> {
        let batch = x.dims()[0];
        let x = activate(self.stem.forward(x, training), Activation::Relu);
        let x = max_pool2d(x, MaxPoolOptions::new([3, 3]).with_stride([2, 2]).with_padding([1, 1]));
        let x = self.blocks.iter().fold(x, |x, block| block.forward(x, training));
        let x = adaptive_avg_pool2d(x, [1, 1]).reshape([batch as isize, -1]);
        linear(x, self.head.clone(), Some(self.head_bias.clone()), Activation::Identity)
    }

    /// All parameters.
    pub fn parameters(&mut self) -> Vec<ParameterMut<'_>> {
        let of_blocks = self.blocks.iter_mut().flat_map(|block| {
            [Some(&mut block.first), Some(&mut block.second), block.downsample.as_mut()].into_iter().flatten()
        });
        let of_layers = std::iter::once(&mut self.stem).chain(of_blocks).flat_map(|layer| {
            let [gamma, beta] = [&mut layer.gamma, &mut layer.beta].map(ParameterMut::Vector);
            [ParameterMut::Kernel(&mut layer.weight), gamma, beta]
        });
        let head = [ParameterMut::Matrix(&mut self.head), ParameterMut::Vector(&mut self.head_bias)];
        of_layers.chain(head).collect()
    }
}

/// A leaf of the graph where there is one.
fn parameter<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    if x.device().is_autodiff() { x.require_grad() } else { x }
}
