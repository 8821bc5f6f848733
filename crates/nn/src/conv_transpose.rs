//! Transposed convolutional layers.

use burn::config::Config;
use burn::module::{Module, Param};
use burn::nn::Initializer;
use burn::tensor::ops::ConvTransposeOptions;
use burn::tensor::{Device, Tensor};
use kiln_ops::{conv_transpose1d, conv_transpose2d, conv_transpose3d};

use crate::conv::check_groups;

/// Configuration of a [`ConvTranspose1d`].
#[derive(Config, Debug)]
pub struct ConvTranspose1dConfig {
    /// Channels of input and output.
    pub channels: [usize; 2],
    /// Size of the kernel.
    pub kernel_size: usize,
    /// Step between the places where neighbouring inputs are added.
    #[config(default = "1")]
    pub stride: usize,
    /// Step between the taps of the kernel.
    #[config(default = "1")]
    pub dilation: usize,
    /// Groups of channels that do not see one another.
    #[config(default = "1")]
    pub groups: usize,
    /// Elements left out at both ends of the output.
    #[config(default = "0")]
    pub padding: usize,
    /// Elements added at the far end of the output.
    #[config(default = "0")]
    pub padding_out: usize,
    /// Whether a bias is added.
    #[config(default = true)]
    pub bias: bool,
    /// How the parameters are drawn.
    #[config(default = "Initializer::KaimingUniform { gain: 1.0 / 3.0f64.sqrt(), fan_out_only: false }")]
    pub initializer: Initializer,
}

/// A transposed convolution over one axis; [`kiln_ops::conv_transpose1d`] has the formula.
#[derive(Module, Debug)]
pub struct ConvTranspose1d {
    /// `[channels_in, channels_out / groups, kernel_size]`
    pub weight: Param<Tensor<3>>,
    /// `[channels_out]`
    pub bias: Option<Param<Tensor<1>>>,
    /// Step between the places where neighbouring inputs are added.
    pub stride: usize,
    /// Size of the kernel.
    pub kernel_size: usize,
    /// Step between the taps of the kernel.
    pub dilation: usize,
    /// Groups of channels that do not see one another.
    pub groups: usize,
    /// Elements left out at both ends of the output.
    pub padding: usize,
    /// Elements added at the far end of the output.
    pub padding_out: usize,
    /// Channels of input and output.
    pub channels: [usize; 2],
}

impl ConvTranspose1dConfig {
    /// Draws the parameters.
    ///
    /// # Panics
    /// When the groups do not divide the channels.
    pub fn init(&self, device: &Device) -> ConvTranspose1d {
        let [channels_in, channels_out] = self.channels;
        check_groups(channels_in, channels_out, self.groups);
        let fan_in = channels_out / self.groups * self.kernel_size;
        let shape = [channels_in, channels_out / self.groups, self.kernel_size];
        ConvTranspose1d {
            weight: self.initializer.init_with(shape, Some(fan_in), None, device),
            bias: self.bias.then(|| self.initializer.init_with([channels_out], Some(fan_in), None, device)),
            stride: self.stride,
            kernel_size: self.kernel_size,
            dilation: self.dilation,
            groups: self.groups,
            padding: self.padding,
            padding_out: self.padding_out,
            channels: self.channels,
        }
    }
}

impl ConvTranspose1d {
    /// Applies the layer.
    ///
    /// # Shapes
    /// - x: `[batch, channels_in, length]`
    /// - output: `[batch, channels_out, length']`
    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let options = ConvTransposeOptions::new(
            [self.stride],
            [self.padding],
            [self.padding_out],
            [self.dilation],
            self.groups,
        );
        conv_transpose1d(x, self.weight.val(), self.bias.as_ref().map(Param::val), options)
    }
}

/// Configuration of a [`ConvTranspose2d`].
#[derive(Config, Debug)]
pub struct ConvTranspose2dConfig {
    /// Channels of input and output.
    pub channels: [usize; 2],
    /// Size of the kernel.
    pub kernel_size: [usize; 2],
    /// Step between the places where neighbouring inputs are added.
    #[config(default = "[1, 1]")]
    pub stride: [usize; 2],
    /// Step between the taps of the kernel.
    #[config(default = "[1, 1]")]
    pub dilation: [usize; 2],
    /// Groups of channels that do not see one another.
    #[config(default = "1")]
    pub groups: usize,
    /// Elements left out at both ends of the output.
    #[config(default = "[0, 0]")]
    pub padding: [usize; 2],
    /// Elements added at the far end of the output.
    #[config(default = "[0, 0]")]
    pub padding_out: [usize; 2],
    /// Whether a bias is added.
    #[config(default = true)]
    pub bias: bool,
    /// How the parameters are drawn.
    #[config(default = "Initializer::KaimingUniform { gain: 1.0 / 3.0f64.sqrt(), fan_out_only: false }")]
    pub initializer: Initializer,
}

/// A transposed convolution over two axes; [`kiln_ops::conv_transpose2d`] has the formula.
#[derive(Module, Debug)]
pub struct ConvTranspose2d {
    /// `[channels_in, channels_out / groups, kernel_size...]`
    pub weight: Param<Tensor<4>>,
    /// `[channels_out]`
    pub bias: Option<Param<Tensor<1>>>,
    /// Step between the places where neighbouring inputs are added.
    pub stride: [usize; 2],
    /// Size of the kernel.
    pub kernel_size: [usize; 2],
    /// Step between the taps of the kernel.
    pub dilation: [usize; 2],
    /// Groups of channels that do not see one another.
    pub groups: usize,
    /// Elements left out at both ends of the output.
    pub padding: [usize; 2],
    /// Elements added at the far end of the output.
    pub padding_out: [usize; 2],
    /// Channels of input and output.
    pub channels: [usize; 2],
}

impl ConvTranspose2dConfig {
    /// Draws the parameters.
    ///
    /// # Panics
    /// When the groups do not divide the channels.
    pub fn init(&self, device: &Device) -> ConvTranspose2d {
        let [channels_in, channels_out] = self.channels;
        check_groups(channels_in, channels_out, self.groups);
        let fan_in = channels_out / self.groups * self.kernel_size.iter().product::<usize>();
        let shape = [channels_in, channels_out / self.groups, self.kernel_size[0], self.kernel_size[1]];
        ConvTranspose2d {
            weight: self.initializer.init_with(shape, Some(fan_in), None, device),
            bias: self.bias.then(|| self.initializer.init_with([channels_out], Some(fan_in), None, device)),
            stride: self.stride,
            kernel_size: self.kernel_size,
            dilation: self.dilation,
            groups: self.groups,
            padding: self.padding,
            padding_out: self.padding_out,
            channels: self.channels,
        }
    }
}

impl ConvTranspose2d {
    /// Applies the layer.
    ///
    /// # Shapes
    /// - x: `[batch, channels_in, height, width]`
    /// - output: `[batch, channels_out, height', width']`
    pub fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let options = ConvTransposeOptions::new(
            self.stride,
            self.padding,
            self.padding_out,
            self.dilation,
            self.groups,
        );
        conv_transpose2d(x, self.weight.val(), self.bias.as_ref().map(Param::val), options)
    }
}

/// Configuration of a [`ConvTranspose3d`].
#[derive(Config, Debug)]
pub struct ConvTranspose3dConfig {
    /// Channels of input and output.
    pub channels: [usize; 2],
    /// Size of the kernel.
    pub kernel_size: [usize; 3],
    /// Step between the places where neighbouring inputs are added.
    #[config(default = "[1, 1, 1]")]
    pub stride: [usize; 3],
    /// Step between the taps of the kernel.
    #[config(default = "[1, 1, 1]")]
    pub dilation: [usize; 3],
    /// Groups of channels that do not see one another.
    #[config(default = "1")]
    pub groups: usize,
    /// Elements left out at both ends of the output.
    #[config(default = "[0, 0, 0]")]
    pub padding: [usize; 3],
    /// Elements added at the far end of the output.
    #[config(default = "[0, 0, 0]")]
    pub padding_out: [usize; 3],
    /// Whether a bias is added.
    #[config(default = true)]
    pub bias: bool,
    /// How the parameters are drawn.
    #[config(default = "Initializer::KaimingUniform { gain: 1.0 / 3.0f64.sqrt(), fan_out_only: false }")]
    pub initializer: Initializer,
}

/// A transposed convolution over three axes; [`kiln_ops::conv_transpose3d`] has the formula.
#[derive(Module, Debug)]
pub struct ConvTranspose3d {
    /// `[channels_in, channels_out / groups, kernel_size...]`
    pub weight: Param<Tensor<5>>,
    /// `[channels_out]`
    pub bias: Option<Param<Tensor<1>>>,
    /// Step between the places where neighbouring inputs are added.
    pub stride: [usize; 3],
    /// Size of the kernel.
    pub kernel_size: [usize; 3],
    /// Step between the taps of the kernel.
    pub dilation: [usize; 3],
    /// Groups of channels that do not see one another.
    pub groups: usize,
    /// Elements left out at both ends of the output.
    pub padding: [usize; 3],
    /// Elements added at the far end of the output.
    pub padding_out: [usize; 3],
    /// Channels of input and output.
    pub channels: [usize; 2],
}

impl ConvTranspose3dConfig {
    /// Draws the parameters.
    ///
    /// # Panics
    /// When the groups do not divide the channels.
    pub fn init(&self, device: &Device) -> ConvTranspose3d {
        let [channels_in, channels_out] = self.channels;
        check_groups(channels_in, channels_out, self.groups);
        let fan_in = channels_out / self.groups * self.kernel_size.iter().product::<usize>();
        let shape = [
            channels_in,
            channels_out / self.groups,
            self.kernel_size[0],
            self.kernel_size[1],
            self.kernel_size[2],
        ];
        ConvTranspose3d {
            weight: self.initializer.init_with(shape, Some(fan_in), None, device),
            bias: self.bias.then(|| self.initializer.init_with([channels_out], Some(fan_in), None, device)),
            stride: self.stride,
            kernel_size: self.kernel_size,
            dilation: self.dilation,
            groups: self.groups,
            padding: self.padding,
            padding_out: self.padding_out,
            channels: self.channels,
        }
    }
}

impl ConvTranspose3d {
    /// Applies the layer.
    ///
    /// # Shapes
    /// - x: `[batch, channels_in, depth, height, width]`
    /// - output: `[batch, channels_out, depth', height', width']`
    pub fn forward(&self, x: Tensor<5>) -> Tensor<5> {
        let options = ConvTransposeOptions::new(
            self.stride,
            self.padding,
            self.padding_out,
            self.dilation,
            self.groups,
        );
        conv_transpose3d(x, self.weight.val(), self.bias.as_ref().map(Param::val), options)
    }
}
