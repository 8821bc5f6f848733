//! What can be stitched: a chain of blocks between an embedding and a head.

use std::iter::Sum;
use std::ops::{Add, Range};

use burn::module::Module;
use burn::tensor::Tensor;
use kiln_core::{Error, Result};
use kiln_nn::BatchNorm;
use serde::{Deserialize, Serialize};

/// What passes from block to block.
#[derive(Debug, Clone)]
pub enum Feature {
    /// `[batch, tokens, channels]`
    Tokens(Tensor<3>),
    /// `[batch, channels, height, width]`
    Map(Tensor<4>),
}

impl Feature {
    /// One row of channels for every token, or for every place of a map from left to right and top to bottom:
    /// `[batch, positions, channels]`.
    pub fn into_tokens(self) -> Tensor<3> {
        match self {
            Self::Tokens(x) => x,
            Self::Map(x) => x.flatten::<3>(2, 3).swap_dims(1, 2),
        }
    }

    /// The map `[batch, channels, height, width]`, for networks that pass nothing else on.
    ///
    /// # Panics
    /// When these are tokens.
    pub fn into_map(self) -> Tensor<4> {
        match self {
            Self::Map(x) => x,
            Self::Tokens(x) => panic!("a map was expected, not tokens {:?}", x.dims()),
        }
    }

    /// The inverse of [`into_tokens`](Self::into_tokens) for a place that takes this extent.
    pub fn from_tokens(x: Tensor<3>, extent: &Extent) -> Self {
        match extent.grid {
            Grid::Tokens(_) => Self::Tokens(x),
            Grid::Map([height, width]) => {
                let [batch, _, channels] = x.dims();
                Self::Map(x.swap_dims(1, 2).reshape([batch, channels, height, width]))
            }
        }
    }
}

/// How the positions of a feature are laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Grid {
    /// So many tokens.
    Tokens(usize),
    /// Height and width of a map.
    Map([usize; 2]),
}

/// The shape of a feature for one image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extent {
    /// Numbers a position.
    pub channels: usize,
    /// The positions.
    pub grid: Grid,
}

impl Extent {
    /// How many positions there are.
    pub fn positions(&self) -> usize {
        match self.grid {
            Grid::Tokens(count) => count,
            Grid::Map([height, width]) => height * width,
        }
    }

    /// Whether a linear map of the channels makes this feature one of the other extent.
    pub fn can_become(&self, other: &Self) -> bool {
        match (self.grid, other.grid) {
            (Grid::Map(a), Grid::Map(b)) => a == b,
            _ => self.positions() == other.positions(),
        }
    }
}

/// What a piece of network costs for one image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Cost {
    /// Multiplications that are added up (MACs), in products of matrices and convolutions.
    pub flops: u64,
    /// Trained numbers.
    pub params: u64,
}

impl Add for Cost {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { flops: self.flops + other.flops, params: self.params + other.params }
    }
}

impl Sum for Cost {
    fn sum<I: Iterator<Item = Self>>(costs: I) -> Self {
        costs.fold(Self::default(), Add::add)
    }
}

/// A linear layer with a bias, at so many positions.
pub(crate) fn linear_cost(positions: usize, inputs: usize, outputs: usize) -> Cost {
    let weights = (inputs * outputs) as u64;
    Cost { flops: positions as u64 * weights, params: weights + outputs as u64 }
}

/// The layout of an anchor, without its weights.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outline {
    /// Channels, height and width of an image.
    pub image: [usize; 3],
    /// Classes that the head tells apart.
    pub classes: usize,
    /// The stage of each block, from 0 on and never falling; networks without stages have one.
    pub stages: Vec<usize>,
    /// What each block takes, and last what the head takes.
    pub extents: Vec<Extent>,
    /// Of the embedding.
    pub embed: Cost,
    /// Of each block.
    pub blocks: Vec<Cost>,
    /// Of the head, with the norm before it.
    pub head: Cost,
}

impl Outline {
    /// Number of blocks.
    pub fn depth(&self) -> usize {
        self.blocks.len()
    }

    /// Number of stages.
    pub fn stage_count(&self) -> usize {
        self.stages.last().map_or(0, |last| last + 1)
    }

    /// The blocks of a stage.
    pub fn stage(&self, stage: usize) -> Range<usize> {
        let start = self.stages.partition_point(|&s| s < stage);
        start..self.stages.partition_point(|&s| s <= stage)
    }

    /// Channels that a block takes.
    pub fn width_of(&self, block: usize) -> usize {
        self.extents[block].channels
    }

    /// The cost of blocks.
    pub fn blocks_cost(&self, blocks: Range<usize>) -> Cost {
        self.blocks[blocks].iter().copied().sum()
    }

    /// The cost of the whole network.
    pub fn total(&self) -> Cost {
        self.embed + self.blocks_cost(0..self.depth()) + self.head
    }

    /// Makes sure that the parts fit one another.
    ///
    /// # Errors
    /// Tells what does not.
    pub fn check(&self) -> Result<()> {
        let depth = self.depth();
        if depth == 0 || self.stages.len() != depth || self.extents.len() != depth + 1 {
            return Err(Error::usage(format!(
                "an anchor of {depth} blocks has {} stage numbers and {} extents",
                self.stages.len(),
                self.extents.len()
            ))
            .hint("a block has one stage number and one extent, and the head has an extent after theirs"));
        }
        if !self.stages.is_sorted() || self.stages[0] != 0 {
            return Err(Error::usage(format!("an anchor has its blocks in the stages {:?}", self.stages))
                .hint("stages begin with 0 and never fall"));
        }
        Ok(())
    }
}

/// Consecutive parts of an anchor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// Whether the embedding is among them.
    pub embed: bool,
    /// Which blocks are.
    pub blocks: Range<usize>,
    /// Whether the head is.
    pub head: bool,
}

/// A network that can be stitched: a chain embedding, blocks, head, in which every block takes what the one before
/// gives. Implement it for your own Burn module, or for an enum of modules where anchors are of several kinds:
///
/// ```
/// use burn::module::Module;
/// use burn::tensor::{Device, Tensor, activation::relu};
/// use kiln_nn::{Linear, LinearConfig};
/// use kiln_stitch::{Anchor, Cost, Extent, Feature, Grid, Outline, Segment, SnNetConfig};
///
/// /// Residual layers over the pixels of 4 x 4 images.
/// #[derive(Module, Debug)]
/// struct Mlp {
///     input: Option<Linear>,
///     layers: Vec<Linear>,
///     output: Option<Linear>,
///     width: usize,
/// }
///
/// impl Mlp {
///     fn new(width: usize, depth: usize, device: &Device) -> Self {
///         let linear = |from, to| LinearConfig::new(from, to).init(device);
///         let layers = (0..depth).map(|_| linear(width, width)).collect();
///         Self { input: Some(linear(16, width)), layers, output: Some(linear(width, 3)), width }
///     }
/// }
///
/// impl Anchor for Mlp {
///     fn outline(&self) -> Outline {
///         let (width, depth) = (self.width as u64, self.layers.len());
///         let linear = |from: u64, to: u64| Cost { flops: from * to, params: (from + 1) * to };
///         Outline {
///             image: [1, 4, 4],
///             classes: 3,
///             stages: vec![0; depth],
///             extents: vec![Extent { channels: self.width, grid: Grid::Tokens(1) }; depth + 1],
///             embed: linear(16, width),
///             blocks: vec![linear(width, width); depth],
///             head: linear(width, 3),
///         }
///     }
///     fn embed(&self, images: Tensor<4>) -> Feature {
///         let pixels: Tensor<2> = images.flatten(1, 3);
///         Feature::Tokens(self.input.as_ref().unwrap().forward(pixels).unsqueeze_dim(1))
///     }
///     fn block(&self, index: usize, x: Feature) -> Feature {
///         let x = x.into_tokens();
///         Feature::Tokens(x.clone() + relu(self.layers[index].forward(x)))
///     }
///     fn head(&self, x: Feature) -> Tensor<2> {
///         self.output.as_ref().unwrap().forward(x.into_tokens().squeeze_dim(1))
///     }
///     fn keep(self, segment: &Segment) -> Self {
///         Self {
///             input: self.input.filter(|_| segment.embed),
///             layers: self.layers[segment.blocks.clone()].to_vec(),
///             output: self.output.filter(|_| segment.head),
///             width: self.width,
///         }
///     }
/// }
///
/// let device = Device::flex();
/// let anchors = vec![Mlp::new(8, 3, &device), Mlp::new(16, 3, &device)];
/// let net = SnNetConfig::new(anchors).init(&device)?;
/// assert_eq!(net.space().configurations()[2].name(), "s0>s1@0>1");
/// assert_eq!(net.export(2)?.forward(Tensor::zeros([5, 1, 4, 4], &device)).dims(), [5, 3]);
/// # Ok::<(), kiln_core::Error>(())
/// ```
pub trait Anchor: Module {
    /// The layout, with the costs.
    fn outline(&self) -> Outline;

    /// Images `[batch, channels, height, width]` to what the first block takes.
    fn embed(&self, images: Tensor<4>) -> Feature;

    /// One block.
    fn block(&self, index: usize, x: Feature) -> Feature;

    /// What the last block gives to logits `[batch, classes]`.
    fn head(&self, x: Feature) -> Tensor<2>;

    /// Drops everything but these parts; the first block that stays is then block 0.
    #[must_use]
    fn keep(self, segment: &Segment) -> Self;

    /// The batch norms in the order in which they run: every network of a space can have running statistics of its own
    /// for them. Networks without any need not implement it.
    fn batch_norms(&mut self) -> Vec<&mut BatchNorm> {
        Vec::new()
    }

    /// The logits `[batch, classes]` of the whole network.
    fn forward(&self, images: Tensor<4>) -> Tensor<2> {
        let x = self.embed(images);
        self.head(self.run(0..self.outline().depth(), x))
    }

    /// Some of the blocks, one after another.
    fn run(&self, blocks: Range<usize>, x: Feature) -> Feature {
        blocks.fold(x, |x, index| self.block(index, x))
    }
}
