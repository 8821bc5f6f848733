//! Convolutional layers.

use burn::config::Config;
use burn::module::{Module, Param};
use burn::nn::{Initializer, PaddingConfig1d, PaddingConfig2d, PaddingConfig3d};
use burn::tensor::ops::ConvOptions;
use burn::tensor::{Device, Tensor};
use kiln_ops::{conv1d, conv2d, conv3d};

use crate::padding::Pairs;

/// Configuration of a [`Conv1d`].
#[derive(Config, Debug)]
pub struct Conv1dConfig {
    /// Channels of the input.
    pub channels_in: usize,
    /// Channels of the output.
    pub channels_out: usize,
    /// Size of the kernel.
    pub kernel_size: usize,
    /// Step between outputs.
    #[config(default = "1")]
    pub stride: usize,
    /// Step between the taps of the kernel.
    #[config(default = "1")]
    pub dilation: usize,
    /// Groups of channels that do not see one another.
    #[config(default = "1")]
    pub groups: usize,
    /// Zeros around the input.
    #[config(default = "PaddingConfig1d::Valid")]
    pub padding: PaddingConfig1d,
    /// Whether a bias is added.
    #[config(default = true)]
    pub bias: bool,
    /// How the parameters are drawn.
    #[config(default = "Initializer::KaimingUniform { gain: 1.0 / 3.0f64.sqrt(), fan_out_only: false }")]
    pub initializer: Initializer,
}

/// A convolution over one axis; [`kiln_ops::conv1d`] has the formula.
#[derive(Module, Debug)]
pub struct Conv1d {
    /// `[channels_out, channels_in / groups, kernel_size]`
    pub weight: Param<Tensor<3>>,
    /// `[channels_out]`
    pub bias: Option<Param<Tensor<1>>>,
    /// Step between outputs.
    pub stride: usize,
    /// Size of the kernel.
    pub kernel_size: usize,
    /// Step between the taps of the kernel.
    pub dilation: usize,
    /// Groups of channels that do not see one another.
    pub groups: usize,
    /// Zeros around the input.
    #[module(skip)]
    pub padding: PaddingConfig1d,
}

impl Conv1dConfig {
    /// Draws the parameters.
    ///
    /// # Panics
    /// When the groups do not divide the channels.
    pub fn init(&self, device: &Device) -> Conv1d {
        check_groups(self.channels_in, self.channels_out, self.groups);
        let taps = self.kernel_size;
        let fan_in = self.channels_in / self.groups * taps;
        let fan_out = self.channels_out / self.groups * taps;
        let shape = [self.channels_out, self.channels_in / self.groups, self.kernel_size];
        Conv1d {
            weight: self.initializer.init_with(shape, Some(fan_in), Some(fan_out), device),
            bias: self.bias.then(|| {
                self.initializer.init_with([self.channels_out], Some(fan_in), Some(fan_out), device)
            }),
            stride: self.stride,
            kernel_size: self.kernel_size,
            dilation: self.dilation,
            groups: self.groups,
            padding: self.padding.clone(),
        }
    }
}

impl Conv1d {
    /// Applies the layer.
    ///
    /// # Shapes
    /// - x: `[batch, channels_in, length]`
    /// - output: `[batch, channels_out, length']`
    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let [_, _, length] = x.dims();
        let padding = self.padding.pairs([length], [self.kernel_size], [self.stride]);
        let options = ConvOptions::new_with_padding([self.stride], padding, [self.dilation], self.groups);
        conv1d(x, self.weight.val(), self.bias.as_ref().map(Param::val), options)
    }
}

/// Configuration of a [`Conv2d`].
#[derive(Config, Debug)]
pub struct Conv2dConfig {
    /// Channels of input and output.
    pub channels: [usize; 2],
    /// Size of the kernel.
    pub kernel_size: [usize; 2],
    /// Step between outputs.
    #[config(default = "[1, 1]")]
    pub stride: [usize; 2],
    /// Step between the taps of the kernel.
    #[config(default = "[1, 1]")]
    pub dilation: [usize; 2],
    /// Groups of channels that do not see one another.
    #[config(default = "1")]
    pub groups: usize,
    /// Zeros around the input.
    #[config(default = "PaddingConfig2d::Valid")]
    pub padding: PaddingConfig2d,
    /// Whether a bias is added.
    #[config(default = true)]
    pub bias: bool,
    /// How the parameters are drawn.
    #[config(default = "Initializer::KaimingUniform { gain: 1.0 / 3.0f64.sqrt(), fan_out_only: false }")]
    pub initializer: Initializer,
}

/// A convolution over two axes; [`kiln_ops::conv2d`] has the formula.
#[derive(Module, Debug)]
pub struct Conv2d {
    /// `[channels_out, channels_in / groups, kernel_size...]`
    pub weight: Param<Tensor<4>>,
    /// `[channels_out]`
    pub bias: Option<Param<Tensor<1>>>,
    /// Step between outputs.
    pub stride: [usize; 2],
    /// Size of the kernel.
    pub kernel_size: [usize; 2],
    /// Step between the taps of the kernel.
    pub dilation: [usize; 2],
    /// Groups of channels that do not see one another.
    pub groups: usize,
    /// Zeros around the input.
    #[module(skip)]
    pub padding: PaddingConfig2d,
}

impl Conv2dConfig {
    /// Draws the parameters.
    ///
    /// # Panics
    /// When the groups do not divide the channels.
    pub fn init(&self, device: &Device) -> Conv2d {
        let [channels_in, channels_out] = self.channels;
        check_groups(channels_in, channels_out, self.groups);
        let taps = self.kernel_size.iter().product::<usize>();
        let fan_in = channels_in / self.groups * taps;
        let fan_out = channels_out / self.groups * taps;
        let shape = [channels_out, channels_in / self.groups, self.kernel_size[0], self.kernel_size[1]];
        Conv2d {
            weight: self.initializer.init_with(shape, Some(fan_in), Some(fan_out), device),
            bias: self
                .bias
                .then(|| self.initializer.init_with([channels_out], Some(fan_in), Some(fan_out), device)),
            stride: self.stride,
            kernel_size: self.kernel_size,
            dilation: self.dilation,
            groups: self.groups,
            padding: self.padding.clone(),
        }
    }
}

impl Conv2d {
    /// Applies the layer.
    ///
    /// # Shapes
    /// - x: `[batch, channels_in, height, width]`
    /// - output: `[batch, channels_out, height', width']`
    pub fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let [_, _, height, width] = x.dims();
        let padding = self.padding.pairs([height, width], self.kernel_size, self.stride);
        let options = ConvOptions::new_with_padding(self.stride, padding, self.dilation, self.groups);
        conv2d(x, self.weight.val(), self.bias.as_ref().map(Param::val), options)
    }
}

/// Configuration of a [`Conv3d`].
#[derive(Config, Debug)]
pub struct Conv3dConfig {
    /// Channels of input and output.
    pub channels: [usize; 2],
    /// Size of the kernel.
    pub kernel_size: [usize; 3],
    /// Step between outputs.
    #[config(default = "[1, 1, 1]")]
    pub stride: [usize; 3],
    /// Step between the taps of the kernel.
    #[config(default = "[1, 1, 1]")]
    pub dilation: [usize; 3],
    /// Groups of channels that do not see one another.
    #[config(default = "1")]
    pub groups: usize,
    /// Zeros around the input.
    #[config(default = "PaddingConfig3d::Valid")]
    pub padding: PaddingConfig3d,
    /// Whether a bias is added.
    #[config(default = true)]
    pub bias: bool,
    /// How the parameters are drawn.
    #[config(default = "Initializer::KaimingUniform { gain: 1.0 / 3.0f64.sqrt(), fan_out_only: false }")]
    pub initializer: Initializer,
}

/// A convolution over three axes; [`kiln_ops::conv3d`] has the formula.
#[derive(Module, Debug)]
pub struct Conv3d {
    /// `[channels_out, channels_in / groups, kernel_size...]`
    pub weight: Param<Tensor<5>>,
    /// `[channels_out]`
    pub bias: Option<Param<Tensor<1>>>,
    /// Step between outputs.
    pub stride: [usize; 3],
    /// Size of the kernel.
    pub kernel_size: [usize; 3],
    /// Step between the taps of the kernel.
    pub dilation: [usize; 3],
    /// Groups of channels that do not see one another.
    pub groups: usize,
    /// Zeros around the input.
    #[module(skip)]
    pub padding: PaddingConfig3d,
}

impl Conv3dConfig {
    /// Draws the parameters.
    ///
    /// # Panics
    /// When the groups do not divide the channels.
    pub fn init(&self, device: &Device) -> Conv3d {
        let [channels_in, channels_out] = self.channels;
        check_groups(channels_in, channels_out, self.groups);
        let taps = self.kernel_size.iter().product::<usize>();
        let fan_in = channels_in / self.groups * taps;
        let fan_out = channels_out / self.groups * taps;
        let shape = [
            channels_out,
            channels_in / self.groups,
            self.kernel_size[0],
            self.kernel_size[1],
            self.kernel_size[2],
        ];
        Conv3d {
            weight: self.initializer.init_with(shape, Some(fan_in), Some(fan_out), device),
            bias: self
                .bias
                .then(|| self.initializer.init_with([channels_out], Some(fan_in), Some(fan_out), device)),
            stride: self.stride,
            kernel_size: self.kernel_size,
            dilation: self.dilation,
            groups: self.groups,
            padding: self.padding.clone(),
        }
    }
}

impl Conv3d {
    /// Applies the layer.
    ///
    /// # Shapes
    /// - x: `[batch, channels_in, depth, height, width]`
    /// - output: `[batch, channels_out, depth', height', width']`
    pub fn forward(&self, x: Tensor<5>) -> Tensor<5> {
        let [_, _, depth, height, width] = x.dims();
        let padding = self.padding.pairs([depth, height, width], self.kernel_size, self.stride);
        let options = ConvOptions::new_with_padding(self.stride, padding, self.dilation, self.groups);
        conv3d(x, self.weight.val(), self.bias.as_ref().map(Param::val), options)
    }
}

/// # Panics
/// When the groups do not divide the channels.
pub(crate) fn check_groups(channels_in: usize, channels_out: usize, groups: usize) {
    assert!(
        channels_in.is_multiple_of(groups) && channels_out.is_multiple_of(groups),
        "{groups} groups must divide {channels_in} input and {channels_out} output channels"
    );
}
