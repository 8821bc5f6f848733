//! A small U-Net: what is lost on the way down comes back from the side.

use burn::module::Module;
use burn::nn::PaddingConfig2d;
use burn::tensor::ops::MaxPoolOptions;
use burn::tensor::{Device, Tensor};
use kiln_nn::{Conv2d, Conv2dConfig};
use kiln_ops::max_pool2d;
use serde::{Deserialize, Serialize};

use crate::hypernet::Nonlinearity;

/// Configuration of a [`UNet`]: 8, 16 and 16 channels on the way down, 16, 16 and 8 on the way up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct UNetConfig {
    /// Channels of the input.
    pub inputs: usize,
    /// Channels of the output.
    pub outputs: usize,
}

impl UNetConfig {
    /// Draws the parameters; the output is small at first.
    pub fn init(&self, device: &Device) -> UNet {
        let conv =
            |from, to| Conv2dConfig::new([from, to], [3, 3]).with_padding(PaddingConfig2d::Same).init(device);
        UNet {
            down: vec![conv(self.inputs, 8), conv(8, 16), conv(16, 16)],
            up: vec![conv(32, 16), conv(24, 16), conv(16, 8)],
            out: conv(8, self.outputs),
        }
    }
}

/// Three levels, each half the size of the one before.
#[derive(Module, Debug)]
pub struct UNet {
    down: Vec<Conv2d>,
    up: Vec<Conv2d>,
    out: Conv2d,
}

impl UNet {
    /// Applies the network; an odd extent loses a row on the way down and gets it back as a copy of its neighbour.
    ///
    /// # Shapes
    /// - x: `[images, inputs, height, width]`, at least 4 x 4
    /// - output: `[images, outputs, height, width]`
    pub fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let act = |x| Nonlinearity::LeakyRelu.apply(x);
        let pool = |x| max_pool2d(x, MaxPoolOptions::new([2, 2]));
        let first = act(self.down[0].forward(x));
        let second = act(self.down[1].forward(pool(first.clone())));
        let third = act(self.down[2].forward(pool(second.clone())));
        let x = Tensor::cat(vec![enlarged(third, &second), second], 1);
        let x = act(self.up[0].forward(x));
        let x = act(self.up[1].forward(Tensor::cat(vec![enlarged(x, &first), first], 1)));
        self.out.forward(act(self.up[2].forward(x)))
    }
}

/// `x` with every pixel twice in both directions, as large as `like`.
fn enlarged(x: Tensor<4>, like: &Tensor<4>) -> Tensor<4> {
    let [images, channels, height, width] = x.dims();
    let [.., tall, wide] = like.dims();
    let twice = x
        .reshape([images, channels, height, 1, width, 1])
        .expand([images, channels, height, 2, width, 2])
        .reshape([images, channels, 2 * height, 2 * width]);
    let grown = |x: Tensor<4>, axis: usize, extent: usize| match x.dims()[axis] {
        short if short < extent => {
            Tensor::cat(vec![x.clone(), x.narrow(axis, short - 1, extent - short)], axis)
        }
        _ => x,
    };
    grown(grown(twice, 2, tall), 3, wide)
}
