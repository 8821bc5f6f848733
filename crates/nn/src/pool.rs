//! Pooling layers.

use burn::config::Config;
use burn::module::Module;
use burn::nn::{PaddingConfig1d, PaddingConfig2d};
use burn::tensor::Tensor;
use burn::tensor::ops::{AvgPoolOptions, MaxPoolOptions};
use kiln_ops::{adaptive_avg_pool1d, adaptive_avg_pool2d, avg_pool1d, avg_pool2d, max_pool1d, max_pool2d};

use crate::padding::Pairs;

/// Configuration of a [`MaxPool1d`].
#[derive(Config, Debug)]
pub struct MaxPool1dConfig {
    /// Size of a window.
    pub kernel_size: usize,
    /// Step between windows.
    #[config(default = "kernel_size")]
    pub stride: usize,
    /// Elements around the input.
    #[config(default = "PaddingConfig1d::Valid")]
    pub padding: PaddingConfig1d,
    /// Step between the elements of a window.
    #[config(default = "1")]
    pub dilation: usize,
    /// Whether a last window that reaches beyond the input counts.
    #[config(default = "false")]
    pub ceil_mode: bool,
}

/// The maximum over windows of one axis; [`kiln_ops::max_pool1d`] has the details.
#[derive(Module, Debug)]
pub struct MaxPool1d {
    /// Step between windows.
    pub stride: usize,
    /// Size of a window.
    pub kernel_size: usize,
    /// Elements around the input.
    #[module(skip)]
    pub padding: PaddingConfig1d,
    /// Step between the elements of a window.
    pub dilation: usize,
    /// Whether a last window that reaches beyond the input counts.
    pub ceil_mode: bool,
}

impl MaxPool1dConfig {
    /// The layer, which has no parameters.
    pub fn init(&self) -> MaxPool1d {
        MaxPool1d {
            stride: self.stride,
            kernel_size: self.kernel_size,
            padding: self.padding.clone(),
            dilation: self.dilation,
            ceil_mode: self.ceil_mode,
        }
    }
}

impl MaxPool1d {
    /// Applies the layer.
    ///
    /// # Shapes
    /// - x: `[batch, channels, length]`
    /// - output: `[batch, channels, length']`
    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let [_, _, length] = x.dims();
        let padding = self.padding.pairs([length], [self.kernel_size], [self.stride]);
        let options = MaxPoolOptions::new([self.kernel_size])
            .with_stride([self.stride])
            .with_padding_pairs(padding)
            .with_dilation([self.dilation])
            .with_ceil_mode(self.ceil_mode);
        max_pool1d(x, options)
    }
}

/// Configuration of a [`MaxPool2d`].
#[derive(Config, Debug)]
pub struct MaxPool2dConfig {
    /// Size of a window.
    pub kernel_size: [usize; 2],
    /// Step between windows.
    #[config(default = "kernel_size")]
    pub strides: [usize; 2],
    /// Elements around the input.
    #[config(default = "PaddingConfig2d::Valid")]
    pub padding: PaddingConfig2d,
    /// Step between the elements of a window.
    #[config(default = "[1, 1]")]
    pub dilation: [usize; 2],
    /// Whether a last window that reaches beyond the input counts.
    #[config(default = "false")]
    pub ceil_mode: bool,
}

/// The maximum over windows of two axes; [`kiln_ops::max_pool2d`] has the details.
#[derive(Module, Debug)]
pub struct MaxPool2d {
    /// Step between windows.
    pub stride: [usize; 2],
    /// Size of a window.
    pub kernel_size: [usize; 2],
    /// Elements around the input.
    #[module(skip)]
    pub padding: PaddingConfig2d,
    /// Step between the elements of a window.
    pub dilation: [usize; 2],
    /// Whether a last window that reaches beyond the input counts.
    pub ceil_mode: bool,
}

impl MaxPool2dConfig {
    /// The layer, which has no parameters.
    pub fn init(&self) -> MaxPool2d {
        MaxPool2d {
            stride: self.strides,
            kernel_size: self.kernel_size,
            padding: self.padding.clone(),
            dilation: self.dilation,
            ceil_mode: self.ceil_mode,
        }
    }
}

impl MaxPool2d {
    /// Applies the layer.
    ///
    /// # Shapes
    /// - x: `[batch, channels, height, width]`
    /// - output: `[batch, channels, height', width']`
    pub fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let [_, _, height, width] = x.dims();
        let padding = self.padding.pairs([height, width], self.kernel_size, self.stride);
        let options = MaxPoolOptions::new(self.kernel_size)
            .with_stride(self.stride)
            .with_padding_pairs(padding)
            .with_dilation(self.dilation)
            .with_ceil_mode(self.ceil_mode);
        max_pool2d(x, options)
    }
}

/// Configuration of a [`AvgPool1d`].
#[derive(Config, Debug)]
pub struct AvgPool1dConfig {
    /// Size of a window.
    pub kernel_size: usize,
    /// Step between windows.
    #[config(default = "kernel_size")]
    pub stride: usize,
    /// Elements around the input.
    #[config(default = "PaddingConfig1d::Valid")]
    pub padding: PaddingConfig1d,
    /// Whether zeros of the padding count in the mean.
    #[config(default = "true")]
    pub count_include_pad: bool,
    /// Whether a last window that reaches beyond the input counts.
    #[config(default = "false")]
    pub ceil_mode: bool,
}

/// The mean over windows of one axis; [`kiln_ops::avg_pool1d`] has the details.
#[derive(Module, Debug)]
pub struct AvgPool1d {
    /// Step between windows.
    pub stride: usize,
    /// Size of a window.
    pub kernel_size: usize,
    /// Elements around the input.
    #[module(skip)]
    pub padding: PaddingConfig1d,
    /// Whether zeros of the padding count in the mean.
    pub count_include_pad: bool,
    /// Whether a last window that reaches beyond the input counts.
    pub ceil_mode: bool,
}

impl AvgPool1dConfig {
    /// The layer, which has no parameters.
    pub fn init(&self) -> AvgPool1d {
        AvgPool1d {
            stride: self.stride,
            kernel_size: self.kernel_size,
            padding: self.padding.clone(),
            count_include_pad: self.count_include_pad,
            ceil_mode: self.ceil_mode,
        }
    }
}

impl AvgPool1d {
    /// Applies the layer.
    ///
    /// # Shapes
    /// - x: `[batch, channels, length]`
    /// - output: `[batch, channels, length']`
    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let [_, _, length] = x.dims();
        let padding = self.padding.pairs([length], [self.kernel_size], [self.stride]);
        let options = AvgPoolOptions::new([self.kernel_size])
            .with_stride([self.stride])
            .with_padding_pairs(padding)
            .with_count_include_pad(self.count_include_pad)
            .with_ceil_mode(self.ceil_mode);
        avg_pool1d(x, options)
    }
}

/// Configuration of a [`AvgPool2d`].
#[derive(Config, Debug)]
pub struct AvgPool2dConfig {
    /// Size of a window.
    pub kernel_size: [usize; 2],
    /// Step between windows.
    #[config(default = "kernel_size")]
    pub strides: [usize; 2],
    /// Elements around the input.
    #[config(default = "PaddingConfig2d::Valid")]
    pub padding: PaddingConfig2d,
    /// Whether zeros of the padding count in the mean.
    #[config(default = "true")]
    pub count_include_pad: bool,
    /// Whether a last window that reaches beyond the input counts.
    #[config(default = "false")]
    pub ceil_mode: bool,
}

/// The mean over windows of two axes; [`kiln_ops::avg_pool2d`] has the details.
#[derive(Module, Debug)]
pub struct AvgPool2d {
    /// Step between windows.
    pub stride: [usize; 2],
    /// Size of a window.
    pub kernel_size: [usize; 2],
    /// Elements around the input.
    #[module(skip)]
    pub padding: PaddingConfig2d,
    /// Whether zeros of the padding count in the mean.
    pub count_include_pad: bool,
    /// Whether a last window that reaches beyond the input counts.
    pub ceil_mode: bool,
}

impl AvgPool2dConfig {
    /// The layer, which has no parameters.
    pub fn init(&self) -> AvgPool2d {
        AvgPool2d {
            stride: self.strides,
            kernel_size: self.kernel_size,
            padding: self.padding.clone(),
            count_include_pad: self.count_include_pad,
            ceil_mode: self.ceil_mode,
        }
    }
}

impl AvgPool2d {
    /// Applies the layer.
    ///
    /// # Shapes
    /// - x: `[batch, channels, height, width]`
    /// - output: `[batch, channels, height', width']`
    pub fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let [_, _, height, width] = x.dims();
        let padding = self.padding.pairs([height, width], self.kernel_size, self.stride);
        let options = AvgPoolOptions::new(self.kernel_size)
            .with_stride(self.stride)
            .with_padding_pairs(padding)
            .with_count_include_pad(self.count_include_pad)
            .with_ceil_mode(self.ceil_mode);
        avg_pool2d(x, options)
    }
}

/// Configuration of an [`AdaptiveAvgPool1d`].
#[derive(Config, Debug)]
pub struct AdaptiveAvgPool1dConfig {
    /// Extent of the output.
    pub output_size: usize,
}

/// The mean over windows that cover one axis evenly; [`kiln_ops::adaptive_avg_pool1d`] has the details.
#[derive(Module, Debug)]
pub struct AdaptiveAvgPool1d {
    /// Extent of the output.
    pub output_size: usize,
}

impl AdaptiveAvgPool1dConfig {
    /// The layer, which has no parameters.
    pub fn init(&self) -> AdaptiveAvgPool1d {
        AdaptiveAvgPool1d { output_size: self.output_size }
    }
}

impl AdaptiveAvgPool1d {
    /// Applies the layer.
    ///
    /// # Shapes
    /// - x: `[batch, channels, length]`
    /// - output: `[batch, channels, output_size]`
    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        adaptive_avg_pool1d(x, self.output_size)
    }
}

/// Configuration of an [`AdaptiveAvgPool2d`].
#[derive(Config, Debug)]
pub struct AdaptiveAvgPool2dConfig {
    /// Extent of the output.
    pub output_size: [usize; 2],
}

/// The mean over windows that cover two axes evenly; [`kiln_ops::adaptive_avg_pool2d`] has the details.
#[derive(Module, Debug)]
pub struct AdaptiveAvgPool2d {
    /// Extent of the output.
    pub output_size: [usize; 2],
}

impl AdaptiveAvgPool2dConfig {
    /// The layer, which has no parameters.
    pub fn init(&self) -> AdaptiveAvgPool2d {
        AdaptiveAvgPool2d { output_size: self.output_size }
    }
}

impl AdaptiveAvgPool2d {
    /// Applies the layer.
    ///
    /// # Shapes
    /// - x: `[batch, channels, height, width]`
    /// - output: `[batch, channels, output_size...]`
    pub fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        adaptive_avg_pool2d(x, self.output_size)
    }
}
