//! The causal depthwise convolution over a few steps that linear-time sequence layers put before their
//! recurrence.

use burn::config::Config;
use burn::module::{Module, Param};
use burn::nn::Initializer;
use burn::tensor::{Device, Tensor};

/// Configuration of a [`ShortConv`].
#[derive(Config, Debug)]
pub struct ShortConvConfig {
    /// Number of channels, each convolved on its own.
    pub channels: usize,
    /// Number of steps that an output sees: its own and those just before; at least 1.
    pub kernel: usize,
    /// Whether a learned constant is added to every channel.
    #[config(default = true)]
    pub bias: bool,
}

/// `y_t = bias + Σ_j w_j x_{t - (kernel-1) + j}` in every channel, with zeros before the first step.
#[derive(Module, Debug)]
pub struct ShortConv {
    /// `[channels, 1, kernel]`, the last entry for the present step
    pub weight: Param<Tensor<3>>,
    /// `[channels]`
    pub bias: Option<Param<Tensor<1>>>,
}

impl ShortConvConfig {
    /// Draws weight and bias from U(-1/√kernel, 1/√kernel), as PyTorch's `Conv1d` does.
    pub fn init(&self, device: &Device) -> ShortConv {
        let bound = (self.kernel as f64).sqrt().recip();
        let uniform = Initializer::Uniform { min: -bound, max: bound };
        ShortConv {
            weight: uniform.init([self.channels, 1, self.kernel], device),
            bias: self.bias.then(|| uniform.init([self.channels], device)),
        }
    }
}

impl ShortConv {
    /// Convolves whole sequences.
    ///
    /// # Shapes
    /// - x: `[batch, time, channels]`
    /// - output: `[batch, time, channels]`
    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let tail = self.initial_tail(x.dims()[0], &x.device());
        self.forward_with_tail(x, tail).0
    }

    /// The inputs before a sequence: `[batch, kernel - 1, channels]` of zeros.
    pub fn initial_tail(&self, batch: usize, device: &Device) -> Tensor<3> {
        let [channels, _, kernel] = self.weight.lazy_shape().dims();
        Tensor::zeros([batch, kernel - 1, channels], device)
    }

    /// As [`forward`](Self::forward), continuing after the inputs `tail`; also returns the inputs that the next
    /// piece continues after.
    ///
    /// # Shapes
    /// - x, output: `[batch, time, channels]`
    /// - tail: `[batch, kernel - 1, channels]`
    pub fn forward_with_tail(&self, x: Tensor<3>, tail: Tensor<3>) -> (Tensor<3>, Tensor<3>) {
        let [_, time, _] = x.dims();
        let seen = Tensor::cat(vec![tail, x], 1);
        // `[channels, 1, kernel]` → `[kernel, channels]`
        let weight = self.weight.val().squeeze_dim::<2>(1).transpose();
        let y = kiln_ops::short_conv(seen.clone(), weight, self.bias.as_ref().map(Param::val));
        (y, seen.slice_dim(1, time..))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::{Int, Tolerance};
    use kiln_core::random_stream;
    use kiln_nn::initialise;

    #[test]
    fn an_output_sees_its_own_step_and_those_just_before() {
        let device = Device::flex();
        let x = Tensor::<3>::from_floats([[[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]]], &device);
        let conv = ShortConvConfig::new(2, 2).init(&device);
        let conv = ShortConv {
            weight: conv.weight.map(|_| Tensor::from_floats([[[100.0, 1.0]], [[0.0, 2.0]]], &device)),
            bias: conv.bias.map(|bias| bias.map(|_| Tensor::from_floats([0.5, 0.0], &device))),
        };
        let expected = Tensor::<3>::from_floats([[[1.5, 20.0], [102.5, 40.0], [204.5, 80.0]]], &device);
        conv.forward(x).into_data().assert_eq(&expected.into_data(), true);
    }

    #[test]
    fn pieces_with_the_tail_carried_give_the_whole() {
        let device = Device::flex();
        for kernel in [1, 4] {
            let conv = initialise(&device, &mut random_stream(7, "short-conv", 0), |device| {
                ShortConvConfig::new(3, kernel).with_bias(false).init(device)
            });
            let x = Tensor::<1, Int>::arange(0..54, &device).float().sin().reshape([2, 9, 3]);
            let whole = conv.forward(x.clone());
            let mut tail = conv.initial_tail(2, &device);
            let mut pieces = Vec::new();
            for (start, length) in [(0, 5), (5, 1), (6, 1), (7, 2)] {
                let (y, next) = conv.forward_with_tail(x.clone().narrow(1, start, length), tail);
                pieces.push(y);
                tail = next;
            }
            let pieces = Tensor::cat(pieces, 1);
            whole.into_data().assert_approx_eq::<f32>(&pieces.into_data(), Tolerance::absolute(1e-6));
        }
    }
}
