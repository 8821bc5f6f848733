//! The first layer of ShallowFBCSPNet and Deep4Net, and what convolutions over time share.

use burn::module::{Module, Param};
use burn::nn::Initializer;
use burn::tensor::ops::ConvOptions;
use burn::tensor::{Device, Tensor};
use kiln_nn::{Conv2d, Conv2dConfig};
use kiln_ops::conv1d;

/// Filters over time for every channel, then filters over channels, with nothing between them:
/// `y[s, t] = Σ_f Σ_c w[s, f, c] (b[f] + Σ_k v[f, k] x[c, t + k])`.
///
/// Both are linear, so that they are computed as one convolution with the weights `Σ_f w[s, f, c] v[f, k]`: a filter over
/// `channels × taps` in place of `taps` and `filters × channels`. Gradients reach both weights through their product.
#[derive(Module, Debug)]
pub struct ConvTimeSpat {
    /// weight `[filters_time, 1, taps, 1]`, bias `[filters_time]`
    pub conv_time: Conv2d,
    /// weight `[filters_spat, filters_time, 1, channels]`
    pub conv_spat: Conv2d,
}

impl ConvTimeSpat {
    /// Draws the layer.
    pub fn init(channels: usize, [time, spat]: [usize; 2], taps: usize, device: &Device) -> Self {
        Self {
            conv_time: conv([1, time], [taps, 1], true, device),
            conv_spat: conv([time, spat], [1, channels], false, device),
        }
    }

    /// Applies the layer at every `stride`-th step.
    ///
    /// # Shapes
    /// - x: `[batch, channels, samples]`
    /// - output: `[batch, filters_spat, steps]`
    pub fn forward(&self, x: Tensor<3>, stride: usize) -> Tensor<3> {
        let [spat, time, _, channels] = self.conv_spat.weight.dims();
        let [_, _, taps, _] = self.conv_time.weight.dims();
        let over_time = self.conv_time.weight.val().reshape([time, taps]);
        let over_channels = self.conv_spat.weight.val().reshape([spat, time, channels]);
        // [spat, channels, time] x [time, taps]
        let weight = over_channels.clone().swap_dims(1, 2).reshape([spat * channels, time]).matmul(over_time);
        let bias = self.conv_time.bias.as_ref().map(|bias| {
            let sums: Tensor<2> = over_channels.sum_dim(2).squeeze_dim(2);
            sums.matmul(bias.val().unsqueeze_dim(1)).squeeze_dim(1)
        });
        let weight = weight.reshape([spat, channels, taps]);
        conv1d(x, weight, bias, ConvOptions::new_with_padding([stride], [(0, 0)], [1], 1))
    }
}

/// A convolution drawn as Glorot and Bengio do, with a bias of zeros.
pub(super) fn conv(channels: [usize; 2], kernel: [usize; 2], bias: bool, device: &Device) -> Conv2d {
    let config = Conv2dConfig::new(channels, kernel)
        .with_bias(false)
        .with_initializer(Initializer::XavierUniform { gain: 1.0 });
    Conv2d { bias: bias.then(|| Initializer::Zeros.init([channels[1]], device)), ..config.init(device) }
}

/// Applies a convolution over time whose weight has an axis of one for channels.
///
/// # Shapes
/// - x: `[batch, filters, steps]`
/// - weight of `layer`: `[outputs, filters, taps, 1]` or `[outputs, filters, 1, taps]`
pub(super) fn over_time(x: Tensor<3>, layer: &Conv2d, stride: usize, dilation: usize) -> Tensor<3> {
    let [outputs, inputs, a, b] = layer.weight.dims();
    let weight = layer.weight.val().reshape([outputs, inputs, a * b]);
    let options = ConvOptions::new_with_padding([stride], [(0, 0)], [dilation], 1);
    conv1d(x, weight, layer.bias.as_ref().map(Param::val), options)
}

/// The last layer.
#[derive(Module, Debug)]
pub struct FinalLayer {
    /// weight `[classes, filters, steps, 1]` or `[classes, filters, 1, steps]`, bias `[classes]`
    pub conv_classifier: Conv2d,
}
