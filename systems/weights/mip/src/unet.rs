//! A small U-Net: what is lost on the way down comes back from the side.

use burn::module::Module;
use burn::nn::PaddingConfig2d;
use burn::tensor::ops::MaxPoolOptions;
use burn::tensor::{Device, Tensor, TensorData};
use kiln_core::{Error, Result};
use kiln_nn::{Conv2d, Conv2dConfig};
use kiln_ops::{matmul, max_pool2d};
use serde::{Deserialize, Serialize};

use crate::hypernet::{Nonlinearity, OutputInit};

/// The parameters that depend on the condition by default. Blocks of the output layer are drawn with a deviation of
/// `gain / √elements`: for a bias of a few numbers that is far above what the network has of its own, and what it sees.
pub const WEIGHTS: &str = "*.weight";

/// How the output layer of the hypernetwork is drawn by default. The paper's fan-out makes kernels `8 / √channels` times as
/// large as they should be where hidden layers end in 128; seven layers of 1 to 16 channels multiply that to logits of
/// hundreds.
pub const OUTPUT_INIT: OutputInit = OutputInit::Hyperfan;

/// Largest norm of a gradient by default: without it one run in several is thrown out of a good network by a single step.
pub const CLIP: f64 = 1.0;

/// Configuration of a [`UNet`]: 8, 16 and 16 channels on the way down, 16, 16 and 8 on the way up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct UNetConfig {
    /// Channels of the input.
    pub inputs: usize,
    /// Channels of the output.
    pub outputs: usize,
}

impl UNetConfig {
    /// Checks that it makes a network of a reasonable size.
    ///
    /// # Errors
    /// When a number of channels does not.
    pub fn check(&self) -> Result<()> {
        const MOST: usize = 4096;
        match [self.inputs, self.outputs].into_iter().find(|channels| !(1..=MOST).contains(channels)) {
            None => Ok(()),
            Some(channels) => Err(Error::usage(format!("{channels} channels make no U-Net"))
                .hint(format!("images have 1 to {MOST}"))),
        }
    }

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
        self.halving(x, &mut |x| Nonlinearity::LeakyRelu.apply(x))
    }

    /// As [`forward_at`](Self::forward_at), or as [`forward`](Self::forward) without a factor, with the root mean square of
    /// what each convolution puts out.
    pub fn traced(&self, x: Tensor<4>, factor: Option<f64>) -> (Tensor<4>, Vec<Tensor<1>>) {
        let mut sizes = Vec::new();
        let size = |x: &Tensor<4>| x.clone().powi_scalar(2).mean().sqrt();
        let mut act = |x: Tensor<4>| {
            sizes.push(size(&x));
            Nonlinearity::LeakyRelu.apply(x)
        };
        let y = match factor {
            Some(factor) => self.shrinking(x, factor, &mut act),
            None => self.halving(x, &mut act),
        };
        sizes.push(size(&y));
        (y, sizes)
    }

    fn halving(&self, x: Tensor<4>, act: &mut dyn FnMut(Tensor<4>) -> Tensor<4>) -> Tensor<4> {
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

impl UNet {
    /// As [`forward`](Self::forward), but images shrink to `factor` of their size on each of the two ways down, not to half
    /// (Ortiz et al., "Scale-Space Hypernetworks", arXiv 2304.05448): small factors are cheap, large ones see more.
    ///
    /// # Shapes
    /// - x: `[images, inputs, height, width]`
    /// - output: `[images, outputs, height, width]`
    pub fn forward_at(&self, x: Tensor<4>, factor: f64) -> Tensor<4> {
        self.shrinking(x, factor, &mut |x| Nonlinearity::LeakyRelu.apply(x))
    }

    fn shrinking(&self, x: Tensor<4>, factor: f64, act: &mut dyn FnMut(Tensor<4>) -> Tensor<4>) -> Tensor<4> {
        let [_, _, height, width] = x.dims();
        let [_, middle, small] = levels([height, width], factor);
        let first = act(self.down[0].forward(x));
        let second = act(self.down[1].forward(resized(first.clone(), middle)));
        let third = act(self.down[2].forward(resized(second.clone(), small)));
        let x = act(self.up[0].forward(Tensor::cat(vec![resized(third, middle), second], 1)));
        let x = Tensor::cat(vec![resized(x, [height, width]), first], 1);
        let x = act(self.up[1].forward(x));
        self.out.forward(act(self.up[2].forward(x)))
    }

    /// Multiplications and additions of the convolutions for one image in [`forward_at`](Self::forward_at).
    pub fn operations(&self, image: [usize; 2], factor: f64) -> u64 {
        let levels = levels(image, factor);
        let at = |layer: &Conv2d, level: usize| {
            let count: usize = layer.weight.val().dims().iter().product();
            2 * (count * levels[level][0] * levels[level][1]) as u64
        };
        let down = self.down.iter().zip([0, 1, 2]);
        let up = self.up.iter().zip([1, 0, 0]);
        down.chain(up).chain([(&self.out, 0)]).map(|(layer, level)| at(layer, level)).sum()
    }
}

/// Heights and widths of the three levels; none is below 2.
fn levels(image: [usize; 2], factor: f64) -> [[usize; 2]; 3] {
    let smaller = |extents: [usize; 2]| {
        extents.map(|extent| ((extent as f64 * factor).round() as usize).clamp(2.min(extent), extent))
    };
    let middle = smaller(image);
    [image, middle, smaller(middle)]
}

/// Images of another size: every pixel is the mean of those that it covers, or lies between its neighbours.
fn resized(x: Tensor<4>, [tall, wide]: [usize; 2]) -> Tensor<4> {
    let [images, channels, height, width] = x.dims();
    if [tall, wide] == [height, width] {
        return x;
    }
    let device = x.device();
    let along = |x: Tensor<3>, from: usize, to: usize| match from == to {
        true => x,
        false => matmul(x, mixing(from, to, &device)),
    };
    let x = along(x.reshape([1, images * channels * height, width]), width, wide);
    let x = x.reshape([images * channels, height, wide]).swap_dims(1, 2).reshape([
        1,
        images * channels * wide,
        height,
    ]);
    let x = along(x, height, tall).reshape([images * channels, wide, tall]).swap_dims(1, 2);
    x.reshape([images, channels, tall, wide])
}

/// What each of `from` pixels counts for each of `to`, `[1, from, to]`: a triangle about the place of the new pixel, as wide
/// as the larger of both pixels.
fn mixing(from: usize, to: usize, device: &Device) -> Tensor<3> {
    let step = from as f64 / to as f64;
    let mut shares = vec![0.0f32; from * to];
    for new in 0..to {
        let centre = (new as f64 + 0.5) * step - 0.5;
        let weight = |old: usize| (1.0 - (old as f64 - centre).abs() / step.max(1.0)).max(0.0);
        let sum: f64 = (0..from).map(weight).sum();
        for old in 0..from {
            shares[old * to + new] = (weight(old) / sum) as f32;
        }
    }
    Tensor::from_data(TensorData::new(shares, [1, from, to]), device)
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

#[cfg(test)]
mod tests {
    use super::*;

    fn values(x: Tensor<4>) -> Vec<f32> {
        x.into_data().iter().collect()
    }

    #[test]
    fn another_size_keeps_what_is_even_and_means_what_it_covers() {
        let device = Device::flex();
        let even = Tensor::<4>::full([2, 3, 5, 4], 0.7, &device);
        assert!(values(resized(even, [3, 9])).iter().all(|x| (x - 0.7).abs() < 1e-6));
        let ramp = Tensor::<1>::from_floats([0.0, 1.0, 2.0, 3.0], &device).reshape([1, 1, 1, 4]);
        // Triangles of half-width 2 about 0.5 and 2.5, cut off at the border: (0·0.75 + 1·0.75 + 2·0.25) / 1.75.
        let half = values(resized(ramp.clone(), [1, 2]));
        assert!(
            (half[0] - 1.25 / 1.75).abs() < 1e-6 && (half[1] - (3.0 - 1.25 / 1.75)).abs() < 1e-6,
            "{half:?}"
        );
        assert_eq!(values(resized(ramp.clone(), [1, 4])), values(ramp));
    }

    #[test]
    fn operations_grow_with_the_factor_and_are_counted_by_hand() {
        let net = UNetConfig { inputs: 1, outputs: 1 }.init(&Device::flex());
        // Weights times pixels of the layers at 8 x 8, 4 x 4 and 2 x 2, each a multiplication and an addition.
        let full = 72 + 24 * 16 * 9 + 16 * 8 * 9 + 72;
        let expected = 2 * (64 * full + 16 * (8 * 16 * 9 + 32 * 16 * 9) + 4 * 16 * 16 * 9);
        assert_eq!(net.operations([8, 8], 0.5), expected as u64);
        assert!(net.operations([8, 8], 0.25) < net.operations([8, 8], 0.5));
        assert_eq!(levels([8, 8], 0.0)[2], [2, 2]);
        assert_eq!(levels([8, 6], 1.0), [[8, 6]; 3]);
    }
}
