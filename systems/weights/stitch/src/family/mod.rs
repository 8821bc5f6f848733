//! The networks that come with the system, one family a file.

mod resnet;
mod swin;
mod vit;

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use kiln_core::{Error, Result};
use kiln_nn::BatchNorm;
use serde::{Deserialize, Serialize};

use crate::anchor::{Anchor, Feature, Outline, Segment};

pub use resnet::{Resnet, ResnetBlock, ResnetConfig};
pub use swin::{PatchMerging, Swin, SwinBlock, SwinConfig, WindowAttention};
pub use vit::{Mlp, PatchEmbed, SelfAttention, Vit, VitBlock, VitConfig};

/// Larger extents are taken for a mistake, or for an attack on the memory.
const LARGEST: usize = 1 << 16;
/// Most positions of a feature.
const MOST_POSITIONS: usize = 1 << 20;
/// Most blocks of a network.
const MOST_BLOCKS: usize = 1 << 12;

/// A network of one of the families.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "family", rename_all = "lowercase")]
pub enum AnchorConfig {
    /// A vision transformer.
    Vit(VitConfig),
    /// Residual blocks of convolutions in stages.
    Resnet(ResnetConfig),
    /// Attention within windows, in stages.
    Swin(SwinConfig),
}

impl AnchorConfig {
    /// The name of the family.
    pub fn family(&self) -> &'static str {
        match self {
            Self::Vit(_) => "vit",
            Self::Resnet(_) => "resnet",
            Self::Swin(_) => "swin",
        }
    }

    /// Checks that the extents fit one another.
    ///
    /// # Errors
    /// Tells what does not.
    pub fn check(&self) -> Result<()> {
        match self {
            Self::Vit(config) => config.check(),
            Self::Resnet(config) => config.check(),
            Self::Swin(config) => config.check(),
        }
    }

    /// The layout of the network.
    ///
    /// # Panics
    /// When [`check`](Self::check) fails.
    pub fn outline(&self) -> Outline {
        match self {
            Self::Vit(config) => config.outline(),
            Self::Resnet(config) => config.outline(),
            Self::Swin(config) => config.outline(),
        }
    }

    /// Draws the parameters.
    ///
    /// # Panics
    /// When [`check`](Self::check) fails.
    pub fn init(&self, device: &Device) -> AnchorNet {
        match self {
            Self::Vit(config) => AnchorNet::Vit(config.init(device)),
            Self::Resnet(config) => AnchorNet::Resnet(config.init(device)),
            Self::Swin(config) => AnchorNet::Swin(config.init(device)),
        }
    }
}

/// One of the networks.
#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant, reason = "there are a few of them at most")]
pub enum AnchorNet {
    /// A vision transformer.
    Vit(Vit),
    /// Residual blocks of convolutions in stages.
    Resnet(Resnet),
    /// Attention within windows, in stages.
    Swin(Swin),
}

impl Anchor for AnchorNet {
    fn outline(&self) -> Outline {
        match self {
            Self::Vit(net) => net.outline(),
            Self::Resnet(net) => net.outline(),
            Self::Swin(net) => net.outline(),
        }
    }

    fn embed(&self, images: Tensor<4>) -> Feature {
        match self {
            Self::Vit(net) => net.embed(images),
            Self::Resnet(net) => net.embed(images),
            Self::Swin(net) => net.embed(images),
        }
    }

    fn block(&self, index: usize, x: Feature) -> Feature {
        match self {
            Self::Vit(net) => net.block(index, x),
            Self::Resnet(net) => net.block(index, x),
            Self::Swin(net) => net.block(index, x),
        }
    }

    fn head(&self, x: Feature) -> Tensor<2> {
        match self {
            Self::Vit(net) => net.head(x),
            Self::Resnet(net) => net.head(x),
            Self::Swin(net) => net.head(x),
        }
    }

    fn keep(self, segment: &Segment) -> Self {
        match self {
            Self::Vit(net) => Self::Vit(net.keep(segment)),
            Self::Resnet(net) => Self::Resnet(net.keep(segment)),
            Self::Swin(net) => Self::Swin(net.keep(segment)),
        }
    }

    fn batch_norms(&mut self) -> Vec<&mut BatchNorm> {
        match self {
            Self::Vit(net) => net.batch_norms(),
            Self::Resnet(net) => net.batch_norms(),
            Self::Swin(net) => net.batch_norms(),
        }
    }
}

/// Drops the elements outside the range.
fn only<T>(items: Vec<T>, range: &std::ops::Range<usize>) -> Vec<T> {
    items.into_iter().take(range.end).skip(range.start).collect()
}

/// Checks what networks of all families have.
fn check_common(image: [usize; 3], classes: usize, widths: &[usize], depths: &[usize]) -> Result<()> {
    let extents = image.iter().chain([&classes]).chain(widths).chain(depths);
    if let Some(extent) = extents.into_iter().find(|&&extent| extent == 0 || extent > LARGEST) {
        return Err(Error::usage(format!("an extent of {extent} is impossible"))
            .hint(format!("image size, widths, depths and classes lie between 1 and {LARGEST}")));
    }
    if classes < 2 {
        return Err(Error::usage("there must be at least two classes, not one")
            .hint("with a single class there is nothing to learn"));
    }
    let blocks: usize = depths.iter().sum();
    if blocks > MOST_BLOCKS {
        return Err(
            Error::usage(format!("{blocks} blocks are too many")).hint(format!("at most {MOST_BLOCKS}"))
        );
    }
    Ok(())
}

/// Checks that patches fill an image, and gives their number in both directions.
fn patch_grid(image: [usize; 3], patch: usize) -> Result<[usize; 2]> {
    let [_, height, width] = image;
    if patch == 0 || height % patch != 0 || width % patch != 0 {
        return Err(Error::usage(format!(
            "patches of {patch} x {patch} pixels do not fill {height} x {width}"
        ))
        .hint("choose a --patch that divides height and width"));
    }
    let grid = [height / patch, width / patch];
    if grid[0] * grid[1] > MOST_POSITIONS {
        return Err(Error::usage(format!("{} x {} patches are too many", grid[0], grid[1]))
            .hint("choose a larger --patch"));
    }
    Ok(grid)
}

/// Checks that heads divide a width.
fn check_heads(width: usize, heads: usize) -> Result<()> {
    if heads == 0 || !width.is_multiple_of(heads) {
        return Err(Error::usage(format!("{heads} heads do not divide a width of {width}"))
            .hint("choose a --width that is a multiple of --heads"));
    }
    Ok(())
}
