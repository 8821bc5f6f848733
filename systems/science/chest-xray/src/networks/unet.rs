//! U-Net (Ronneberger et al. 2015, arXiv 1505.04597), and the one with a modified expansive path.

use burn::module::Module;
use burn::nn::Relu;
use burn::tensor::{Device, Tensor};
use clap::ValueEnum;
use kiln_nn::{Conv2d, ConvTranspose2d, ConvTranspose2dConfig};
use serde::{Deserialize, Serialize};

use super::parts::{Layer, apply, conv, conv_with_bias, max_pool, norm};
use crate::bilinear::resize;

/// Halvings, by which sizes must be divisible.
const LEVELS: usize = 4;
/// What heights and widths must be divisible by.
pub const DIVISOR: usize = 1 << LEVELS;

/// Which expansive path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Segmenter {
    /// U-Net: transposed convolutions, skips concatenated
    Unet,
    /// modified U-Net: bilinear upsampling, skips added
    UnetModified,
}

/// Configuration of a [`UNet`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct UNetConfig {
    /// Channels of the first level; every level has twice as many.
    pub width: usize,
    /// Which expansive path.
    pub net: Segmenter,
}

impl UNetConfig {
    /// The original with `width` channels in the first level (the paper has 64).
    pub fn new(width: usize) -> Self {
        Self { width, net: Segmenter::Unet }
    }

    /// Whether the expansive path is the modified one.
    #[must_use]
    pub fn with_modified(self, modified: bool) -> Self {
        Self { net: if modified { Segmenter::UnetModified } else { Segmenter::Unet }, ..self }
    }

    /// Draws the parameters.
    pub fn init(&self, device: &Device) -> UNet {
        let width = |level: usize| self.width << level;
        let is_modified = self.net == Segmenter::UnetModified;
        let enc = (0..=LEVELS)
            .map(|level| block(if level == 0 { 1 } else { width(level - 1) }, width(level), device))
            .collect();
        // From the deepest level up.
        let levels = || (0..LEVELS).rev();
        let up = levels().map(|level| {
            let channels = [width(level + 1), width(level)];
            match is_modified {
                true => Up::Bilinear(conv_with_bias(channels, 1, 1, 0, device)),
                false => Up::Transposed(
                    ConvTranspose2dConfig::new(channels, [2, 2]).with_stride([2, 2]).init(device),
                ),
            }
        });
        let joined = if is_modified { 1 } else { 2 };
        let dec = levels().map(|level| block(joined * width(level), width(level), device));
        UNet {
            enc,
            up: up.collect(),
            dec: dec.collect(),
            out: conv_with_bias([self.width, 1], 1, 1, 0, device),
        }
    }
}

/// Two convolutions of 3 × 3, each with batch norm and rectifier.
fn block(inputs: usize, outputs: usize, device: &Device) -> Vec<Layer> {
    let conv = |inputs| Layer::Conv(conv([inputs, outputs], [3; 2], 1, [1; 2], device));
    let norm = || Layer::Norm(norm(outputs, device));
    vec![conv(inputs), norm(), Layer::Relu(Relu), conv(outputs), norm(), Layer::Relu(Relu)]
}

/// A network that gives every pixel a logit.
#[derive(Module, Debug)]
pub struct UNet {
    enc: Vec<Vec<Layer>>,
    up: Vec<Up>,
    dec: Vec<Vec<Layer>>,
    out: Conv2d,
}

#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant, reason = "a network has four of one kind")]
enum Up {
    Transposed(ConvTranspose2d),
    Bilinear(Conv2d),
}

impl UNet {
    /// Logits of lung.
    ///
    /// # Shapes
    /// - x, output: `[batch, 1, height, width]`, both divisible by [`DIVISOR`]
    pub fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let mut skips = Vec::new();
        let mut x = x;
        for (level, block) in self.enc.iter().enumerate() {
            if level > 0 {
                x = max_pool(2, 2, 0, false).forward(x);
            }
            x = apply(block, x);
            skips.push(x.clone());
        }
        skips.pop(); // the deepest level goes on itself
        for ((up, block), skip) in self.up.iter().zip(&self.dec).zip(skips.into_iter().rev()) {
            let [_, _, height, width] = skip.dims();
            let joined = match up {
                Up::Transposed(conv) => Tensor::cat(vec![skip, conv.forward(x)], 1),
                // A convolution of 1 × 1 before the upsampling is the same and costs a quarter.
                Up::Bilinear(conv) => skip + resize(conv.forward(x), [height, width]),
            };
            x = apply(block, joined);
        }
        self.out.forward(x)
    }
}
