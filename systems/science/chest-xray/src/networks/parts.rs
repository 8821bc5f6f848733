//! What the networks are made of.

use burn::module::{Module, Param, ParamId};
use burn::nn::{Initializer, PaddingConfig2d, Relu};
use burn::tensor::{Device, Tensor};
use kiln_nn::{
    BatchNorm, BatchNormConfig, Conv2d, Conv2dConfig, Dropout, DropoutConfig, Linear, MaxPool2d,
    MaxPool2dConfig,
};
use kiln_ops::{Activation, activate, adaptive_avg_pool2d};

/// A layer of a sequence whose places are the numbers in `torchvision`'s names, such as `features.3.weight`.
#[derive(Module, Debug)]
pub enum Layer {
    /// A convolution
    Conv(Conv2d),
    /// A batch norm
    Norm(BatchNorm),
    /// An affine map
    Linear(Linear),
    /// A maximum over windows
    MaxPool(MaxPool2d),
    /// Dropout
    Dropout(Dropout),
    /// `max(x, 0)`
    Relu(Relu),
}

/// Applies layers in turn. A batch norm behind a convolution becomes part of it where nothing learns.
///
/// # Shapes
/// - x: `[batch, channels, height, width]`
/// - output: `[batch, channels', height', width']`
pub fn apply(layers: &[Layer], mut x: Tensor<4>) -> Tensor<4> {
    let mut layers = layers.iter().peekable();
    while let Some(layer) = layers.next() {
        x = match layer {
            Layer::Conv(conv) => match layers.next_if(|next| matches!(next, Layer::Norm(_))) {
                Some(Layer::Norm(norm)) => conv_norm(conv, norm, x),
                _ => conv.forward(x),
            },
            Layer::Norm(norm) => norm.forward(x),
            Layer::Linear(_) => unreachable!("sequences over images have no affine maps"),
            Layer::MaxPool(pool) => pool.forward(x),
            Layer::Dropout(dropout) => dropout.forward(x),
            Layer::Relu(_) => relu(x),
        };
    }
    x
}

/// Applies the affine maps of a classifier, and what lies between them.
///
/// # Shapes
/// - x: `[batch, features]`
/// - output: `[batch, classes]`
pub fn apply_flat(layers: &[Layer], x: Tensor<2>) -> Tensor<2> {
    layers.iter().fold(x, |x, layer| match layer {
        Layer::Linear(linear) => linear.forward(x),
        Layer::Dropout(dropout) => dropout.forward(x),
        Layer::Relu(_) => activate(x, Activation::Relu),
        Layer::Conv(_) | Layer::Norm(_) | Layer::MaxPool(_) => unreachable!("a classifier sees no planes"),
    })
}

/// `max(x, 0)`
pub fn relu(x: Tensor<4>) -> Tensor<4> {
    activate(x, Activation::Relu)
}

/// The mean over each plane, `[batch, channels]`.
pub fn global_mean(x: Tensor<4>) -> Tensor<2> {
    adaptive_avg_pool2d(x, [1, 1]).flatten(1, 3)
}

/// A convolution drawn for a rectifier behind it (He et al. 2015).
pub fn conv(
    channels: [usize; 2],
    kernel: [usize; 2],
    stride: usize,
    padding: [usize; 2],
    device: &Device,
) -> Conv2d {
    conv_config(channels, kernel, stride, padding).init(device)
}

/// The same with a bias, which begins at 0.
pub fn conv_with_bias(
    channels: [usize; 2],
    kernel: usize,
    stride: usize,
    padding: usize,
    device: &Device,
) -> Conv2d {
    let layer = conv(channels, [kernel; 2], stride, [padding; 2], device);
    Conv2d { bias: Some(Initializer::Zeros.init([channels[1]], device)), ..layer }
}

/// A convolution of every channel by itself.
pub fn depthwise(channels: usize, stride: usize, device: &Device) -> Conv2d {
    conv_config([channels; 2], [3; 2], stride, [1; 2]).with_groups(channels).init(device)
}

fn conv_config(
    channels: [usize; 2],
    kernel: [usize; 2],
    stride: usize,
    [rows, columns]: [usize; 2],
) -> Conv2dConfig {
    Conv2dConfig::new(channels, kernel)
        .with_stride([stride; 2])
        .with_padding(PaddingConfig2d::Explicit(rows, columns, rows, columns))
        .with_bias(false)
        .with_initializer(Initializer::KaimingNormal { gain: std::f64::consts::SQRT_2, fan_out_only: false })
}

/// A batch norm as PyTorch has it.
pub fn norm(channels: usize, device: &Device) -> BatchNorm {
    BatchNormConfig::new(channels).init(device)
}

/// Maxima over squares.
pub fn max_pool(kernel: usize, stride: usize, padding: usize, ceil_mode: bool) -> MaxPool2d {
    MaxPool2dConfig::new([kernel; 2])
        .with_strides([stride; 2])
        .with_padding(PaddingConfig2d::Explicit(padding, padding, padding, padding))
        .with_ceil_mode(ceil_mode)
        .init()
}

/// Dropout as a layer of a sequence.
pub fn dropout(prob: f64) -> Layer {
    Layer::Dropout(DropoutConfig::new(prob).init())
}

/// A convolution and the batch norm behind it. Where nothing learns, the two are one convolution.
///
/// # Shapes
/// - x: `[batch, inputs, height, width]`
/// - output: `[batch, outputs, height', width']`
pub fn conv_norm(conv: &Conv2d, norm: &BatchNorm, x: Tensor<4>) -> Tensor<4> {
    if x.device().is_autodiff() && norm.training.is_enabled() {
        return norm.forward(conv.forward(x));
    }
    fold(conv, norm, &x.device()).forward(x)
}

/// The convolution that a convolution with a batch norm behind it is: `w' = w γ / √(variance + ε)`,
/// `b' = β + (b - mean) γ / √(variance + ε)`.
fn fold(conv: &Conv2d, norm: &BatchNorm, device: &Device) -> Conv2d {
    let mean = norm.running_mean.value().to_device(device);
    let variance = norm.running_var.value().to_device(device);
    let scale = norm.gamma.val() / (variance + norm.epsilon).sqrt();
    let shift = match &conv.bias {
        Some(bias) => bias.val() - mean,
        None => mean.neg(),
    };
    let bias = norm.beta.val() + shift * scale.clone();
    let weight = conv.weight.val() * scale.reshape([-1, 1, 1, 1]);
    Conv2d {
        weight: Param::initialized(ParamId::new(), weight),
        bias: Some(Param::initialized(ParamId::new(), bias)),
        ..conv.clone()
    }
}

/// `channels` times `width`, at least one.
pub fn scaled(channels: usize, width: f64) -> usize {
    ((channels as f64 * width).round() as usize).max(1)
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Distribution, TensorData};
    use kiln_core::random_stream;
    use kiln_nn::initialise;

    use super::*;

    #[test]
    fn a_folded_batch_norm_computes_the_same() {
        let device = Device::flex();
        let mut rng = random_stream(0, "fold", 0);
        let conv = initialise(&device, &mut rng, |device| conv_with_bias([3, 5], 3, 2, 1, device));
        let mut norm = norm(5, &device);
        norm.gamma = Param::from_tensor(Tensor::from_floats([1.0, 0.5, -2.0, 3.0, 0.1], &device));
        norm.beta = Param::from_tensor(Tensor::from_floats([0.0, 1.0, -1.0, 0.2, 5.0], &device));
        norm.running_mean.update(Tensor::from_floats([0.3, -0.2, 0.0, 1.0, 2.0], &device));
        norm.running_var.update(Tensor::from_floats([1.0, 0.2, 3.0, 0.5, 0.9], &device));
        let x = TensorData::random::<f32, _, _>([2, 3, 9, 8], Distribution::Normal(0.0, 1.0), &mut rng);
        let x = Tensor::<4>::from_data(x, &device);
        let apart = norm.forward(conv.forward(x.clone()));
        let difference = (conv_norm(&conv, &norm, x) - apart).abs().max().into_scalar::<f32>();
        assert!(difference < 1e-5, "{difference}");
    }
}
