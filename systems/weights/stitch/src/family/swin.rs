//! Transformers with attention in windows that shift from block to block (Liu et al., "Swin Transformer",
//! arXiv 2103.14030).

use burn::module::{Module, Param};
use burn::nn::Initializer;
use burn::tensor::{Bool, Device, Int, Tensor, TensorData};
use kiln_core::{Error, Result};
use kiln_nn::{Conv2d, Conv2dConfig, LayerNorm, Linear, LinearConfig};
use kiln_ops::AttentionOptions;
use serde::{Deserialize, Serialize};

use super::vit::{KEPT, Mlp, SelfAttention, attention_cost, mlp_cost, norm};
use super::{check_common, check_heads, only, patch_grid};
use crate::anchor::{Anchor, Cost, Extent, Feature, Grid, Outline, Segment, linear_cost};

/// Deviation of the biases by relative position before training.
const BIAS_STD: f64 = 0.02;

/// Configuration of a [`Swin`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SwinConfig {
    /// Channels, height and width of an image.
    pub image: [usize; 3],
    /// Side of a patch, in pixels.
    pub patch: usize,
    /// Width of a token in the first stage; each later one has twice the width and a quarter of the tokens.
    pub width: usize,
    /// Blocks of each stage.
    pub depths: Vec<usize>,
    /// Heads of attention in the first stage; each later one has twice as many.
    pub heads: usize,
    /// Side of a window in tokens, at most; one that does not divide the side of a stage shrinks to a divisor.
    pub window: usize,
    /// Number of classes.
    pub classes: usize,
}

/// Patches become tokens, stages of blocks follow with attention in windows, and a linear layer reads the mean token.
/// Parts that a stitched network does not need may be absent.
#[derive(Module, Debug)]
pub struct Swin {
    /// Patches to tokens.
    pub patch_embed: Option<Conv2d>,
    /// After it.
    pub patch_norm: Option<LayerNorm>,
    /// The blocks of all stages.
    pub blocks: Vec<SwinBlock>,
    /// Before the head.
    pub norm: Option<LayerNorm>,
    /// The mean token to logits.
    pub head: Option<Linear>,
    #[module(skip)]
    config: SwinConfig,
}

/// `x + attn(norm1(x))`, then `x + mlp(norm2(x))`; the first block of a later stage merges patches before.
#[derive(Module, Debug)]
pub struct SwinBlock {
    /// Where a stage begins.
    pub merge: Option<PatchMerging>,
    /// Before the attention.
    pub norm1: LayerNorm,
    /// Attention in windows.
    pub attn: WindowAttention,
    /// Before the perceptron.
    pub norm2: LayerNorm,
    /// For every token alone.
    pub mlp: Mlp,
}

/// Four neighbours become one token of twice the width.
#[derive(Module, Debug)]
pub struct PatchMerging {
    /// Over the four together, `[4 width]`.
    pub norm: LayerNorm,
    /// `[4 width, 2 width]`
    pub reduction: Linear,
    /// Rows and columns of tokens before.
    pub grid: [usize; 2],
}

/// Attention among the tokens of a window, with a bias by relative position.
#[derive(Module, Debug)]
pub struct WindowAttention {
    /// Projections and heads.
    pub inner: SelfAttention,
    /// `[(2 rows - 1) (2 columns - 1), heads]`
    pub relative_bias: Param<Tensor<2>>,
    /// Rows and columns of tokens.
    pub grid: [usize; 2],
    /// Rows and columns of a window.
    pub window: [usize; 2],
    /// How far windows are shifted.
    pub shift: [usize; 2],
}

/// The place of a block.
struct Place {
    stage: usize,
    width: usize,
    heads: usize,
    /// Whether four neighbours become one before.
    merges: bool,
    /// Rows and columns of tokens within the block.
    grid: [usize; 2],
    window: [usize; 2],
    shift: [usize; 2],
}

impl SwinConfig {
    /// Checks that the extents fit one another.
    ///
    /// # Errors
    /// Tells what does not.
    pub fn check(&self) -> Result<()> {
        let doublings = u32::try_from(self.depths.len().saturating_sub(1)).unwrap_or(u32::MAX);
        let widest = 1usize.checked_shl(doublings).and_then(|factor| self.width.checked_mul(factor));
        check_common(self.image, self.classes, &[self.width, widest.unwrap_or(usize::MAX)], &self.depths)?;
        check_heads(self.width, self.heads)?;
        if self.depths.is_empty() || self.window == 0 {
            return Err(Error::usage("a network needs at least one stage and windows of at least one token"));
        }
        let mut grid = patch_grid(self.image, self.patch)?;
        for _ in 1..self.depths.len() {
            if grid.iter().any(|side| side % 2 != 0) {
                return Err(Error::usage(format!(
                    "{} x {} tokens cannot be merged four by four",
                    grid[0], grid[1]
                ))
                .hint("each stage halves the rows and columns: choose fewer stages or a smaller --patch"));
            }
            grid = grid.map(|side| side / 2);
        }
        Ok(())
    }

    /// The largest divisor of a side that is no larger than the window.
    fn window_of(&self, side: usize) -> usize {
        (1..=self.window.min(side)).rev().find(|window| side.is_multiple_of(*window)).unwrap_or(1)
    }

    fn places(&self) -> Vec<Place> {
        let mut grid = [self.image[1] / self.patch, self.image[2] / self.patch];
        let mut places = Vec::new();
        for (stage, &depth) in self.depths.iter().enumerate() {
            for block in 0..depth {
                let merges = stage > 0 && block == 0;
                if merges {
                    grid = grid.map(|side| side / 2);
                }
                let window = grid.map(|side| self.window_of(side));
                // Every second block; a window as large as the grid has nowhere to go.
                let moves = |axis: usize| block % 2 == 1 && window[axis] < grid[axis];
                places.push(Place {
                    stage,
                    width: self.width << stage,
                    heads: self.heads << stage,
                    merges,
                    grid,
                    window,
                    shift: [0, 1].map(|axis| if moves(axis) { window[axis] / 2 } else { 0 }),
                });
            }
        }
        places
    }

    /// The layout of the network.
    pub fn outline(&self) -> Outline {
        let grid = [self.image[1] / self.patch, self.image[2] / self.patch];
        let places = self.places();
        let tokens = |width, [rows, columns]: [usize; 2]| Extent {
            channels: width,
            grid: Grid::Tokens(rows * columns),
        };
        let mut extents = vec![tokens(self.width, grid)];
        extents.extend(places.iter().map(|place| tokens(place.width, place.grid)));
        let last_width = places.last().map_or(self.width, |place| place.width);
        let norm = |width: usize| Cost { flops: 0, params: 2 * width as u64 };
        let patch = self.image[0] * self.patch * self.patch;
        Outline {
            image: self.image,
            classes: self.classes,
            stages: places.iter().map(|place| place.stage).collect(),
            extents,
            embed: linear_cost(grid[0] * grid[1], patch, self.width) + norm(self.width),
            blocks: places.iter().map(Place::cost).collect(),
            head: norm(last_width) + linear_cost(1, last_width, self.classes),
        }
    }

    /// Draws the parameters.
    pub fn init(&self, device: &Device) -> Swin {
        let places = self.places();
        let last_width = places.last().map_or(self.width, |place| place.width);
        let patch = [self.patch, self.patch];
        Swin {
            patch_embed: Some(
                Conv2dConfig::new([self.image[0], self.width], patch).with_stride(patch).init(device),
            ),
            patch_norm: Some(norm(self.width, device)),
            blocks: places.iter().map(|place| place.init(device)).collect(),
            norm: Some(norm(last_width, device)),
            head: Some(LinearConfig::new(last_width, self.classes).init(device)),
            config: self.clone(),
        }
    }
}

impl Place {
    fn cost(&self) -> Cost {
        let (width, tokens) = (self.width, self.grid[0] * self.grid[1]);
        let norm = |width: usize| Cost { flops: 0, params: 2 * width as u64 };
        let window = self.window[0] * self.window[1];
        let offsets = (2 * self.window[0] - 1) * (2 * self.window[1] - 1);
        let bias = Cost { flops: 0, params: (offsets * self.heads) as u64 };
        let attention = attention_cost(tokens, window, width) + bias;
        let merge = match self.merges {
            // The reduction has no bias.
            true => {
                let weights = 2 * width as u64 * width as u64;
                norm(2 * width) + Cost { flops: tokens as u64 * weights, params: weights }
            }
            false => Cost::default(),
        };
        merge + norm(width) + attention + norm(width) + mlp_cost(tokens, width)
    }

    fn init(&self, device: &Device) -> SwinBlock {
        let Self { width, heads, grid, window, shift, .. } = *self;
        let offsets = (2 * window[0] - 1) * (2 * window[1] - 1);
        SwinBlock {
            merge: self.merges.then(|| PatchMerging {
                norm: norm(2 * width, device),
                reduction: LinearConfig::new(2 * width, width).with_bias(false).init(device),
                grid: grid.map(|side| 2 * side),
            }),
            norm1: norm(width, device),
            attn: WindowAttention {
                inner: SelfAttention::new(width, heads, device),
                relative_bias: Initializer::Normal { mean: 0.0, std: BIAS_STD }
                    .init([offsets, heads], device),
                grid,
                window,
                shift,
            },
            norm2: norm(width, device),
            mlp: Mlp::new(width, device),
        }
    }
}

impl Anchor for Swin {
    fn outline(&self) -> Outline {
        self.config.outline()
    }

    fn embed(&self, images: Tensor<4>) -> Feature {
        let patches = Feature::Map(self.patch_embed.as_ref().expect(KEPT).forward(images));
        Feature::Tokens(self.patch_norm.as_ref().expect(KEPT).forward(patches.into_tokens()))
    }

    fn block(&self, index: usize, x: Feature) -> Feature {
        Feature::Tokens(self.blocks[index].forward(x.into_tokens()))
    }

    fn head(&self, x: Feature) -> Tensor<2> {
        let tokens = self.norm.as_ref().expect(KEPT).forward(x.into_tokens());
        self.head.as_ref().expect(KEPT).forward(tokens.mean_dim(1).squeeze_dim::<2>(1))
    }

    fn keep(self, segment: &Segment) -> Self {
        Self {
            patch_embed: self.patch_embed.filter(|_| segment.embed),
            patch_norm: self.patch_norm.filter(|_| segment.embed),
            blocks: only(self.blocks, &segment.blocks),
            norm: self.norm.filter(|_| segment.head),
            head: self.head.filter(|_| segment.head),
            config: self.config,
        }
    }
}

impl SwinBlock {
    /// Applies the block.
    ///
    /// # Shapes
    /// - x: `[batch, tokens, width]`; twice the tokens in both directions and half the width where the block merges
    /// - output: `[batch, tokens, width]`
    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let x = match &self.merge {
            Some(merge) => merge.forward(x),
            None => x,
        };
        let x = x.clone() + self.attn.forward(self.norm1.forward(x));
        x.clone() + self.mlp.forward(self.norm2.forward(x))
    }
}

impl PatchMerging {
    /// Applies the layer.
    ///
    /// # Shapes
    /// - x: `[batch, rows columns, width]`
    /// - output: `[batch, rows columns / 4, 2 width]`
    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let [batch, _, width] = x.dims();
        let [rows, columns] = self.grid.map(|side| side / 2);
        let neighbours = x.reshape([batch, rows, 2, columns, 2, width]).permute([0, 1, 3, 4, 2, 5]);
        let joined = neighbours.reshape([batch, rows * columns, 4 * width]);
        self.reduction.forward(self.norm.forward(joined))
    }
}

impl WindowAttention {
    /// Applies the layer.
    ///
    /// # Shapes
    /// - x, output: `[batch, tokens, width]`
    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let [batch, tokens, width] = x.dims();
        let ([rows, columns], [high, wide]) = (self.grid, self.window);
        let windows = [rows / high, columns / wide];
        let grid = self.rolled(x.reshape([batch, rows, columns, width]), self.shift);
        let inside = grid
            .reshape([batch, windows[0], high, windows[1], wide, width])
            .permute([0, 1, 3, 2, 4, 5])
            .reshape([batch * windows[0] * windows[1], high * wide, width]);
        let options = AttentionOptions {
            bias: Some(self.bias(&inside.device())),
            mask: self.mask(batch, &inside.device()),
            ..AttentionOptions::default()
        };
        let seen = self
            .inner
            .forward(inside, options)
            .reshape([batch, windows[0], windows[1], high, wide, width])
            .permute([0, 1, 3, 2, 4, 5])
            .reshape([batch, rows, columns, width]);
        let back = [rows - self.shift[0], columns - self.shift[1]];
        self.rolled(seen, back).reshape([batch, tokens, width])
    }

    /// Moves the grid up and to the left; what leaves it comes in again on the other side.
    fn rolled(&self, x: Tensor<4>, by: [usize; 2]) -> Tensor<4> {
        [0, 1].into_iter().fold(x, |x, axis| {
            let (side, by) = (self.grid[axis], by[axis] % self.grid[axis]);
            if by == 0 {
                return x;
            }
            let ahead = x.clone().narrow(axis + 1, by, side - by);
            Tensor::cat(vec![ahead, x.narrow(axis + 1, 0, by)], axis + 1)
        })
    }

    /// The bias of each pair of tokens of a window, `[1, heads, tokens, tokens]`.
    fn bias(&self, device: &Device) -> Tensor<4> {
        let [high, wide] = self.window;
        let tokens = high * wide;
        let mut index = Vec::with_capacity(tokens * tokens);
        for query in 0..tokens {
            for key in 0..tokens {
                let row = query / wide + high - 1 - key / wide;
                let column = query % wide + wide - 1 - key % wide;
                index.push((row * (2 * wide - 1) + column) as i64);
            }
        }
        let index = Tensor::<1, Int>::from_data(TensorData::new(index, [tokens * tokens]), device);
        let bias = self.relative_bias.val().select(0, index);
        bias.reshape([tokens, tokens, self.inner.heads]).permute([2, 0, 1]).unsqueeze_dim::<4>(0)
    }

    /// True for pairs that only the shift has brought into one window, `[batch windows, 1, tokens, tokens]`; none where
    /// nothing is shifted.
    fn mask(&self, batch: usize, device: &Device) -> Option<Tensor<4, Bool>> {
        if self.shift == [0, 0] {
            return None;
        }
        let ([rows, columns], [high, wide]) = (self.grid, self.window);
        // Of each axis: the part of the grid that a place of the shifted grid comes from.
        let region = |place: usize, axis: usize| usize::from(place >= self.grid[axis] - self.shift[axis]);
        let tokens = high * wide;
        let mut hidden = Vec::with_capacity(rows / high * (columns / wide) * tokens * tokens);
        for window in 0..rows / high * (columns / wide) {
            let origin = [window / (columns / wide) * high, window % (columns / wide) * wide];
            let of =
                |token: usize| [region(origin[0] + token / wide, 0), region(origin[1] + token % wide, 1)];
            for query in 0..tokens {
                hidden.extend((0..tokens).map(|key| of(query) != of(key)));
            }
        }
        let windows = hidden.len() / (tokens * tokens);
        let mask =
            Tensor::<4, Bool>::from_data(TensorData::new(hidden, [windows, 1, tokens, tokens]), device);
        Some(mask.repeat_dim(0, batch))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_core::random_stream;
    use kiln_nn::initialise;

    /// The tokens of a grid of 4 x 4, in windows of 2 x 2, that change when one of them does.
    fn changed(shift: usize, token: usize) -> Vec<usize> {
        let place = Place {
            stage: 0,
            width: 4,
            heads: 2,
            merges: false,
            grid: [4, 4],
            window: [2, 2],
            shift: [shift, shift],
        };
        let device = Device::flex();
        let block = initialise(&device, &mut random_stream(0, "test", 0), |device| place.init(device));
        let output = |bump: f32| -> Vec<f32> {
            let mut values: Vec<f32> = (0..64).map(|i| (i % 7) as f32).collect();
            values[4 * token] += bump;
            let x = Tensor::<3>::from_data(TensorData::new(values, [1, 16, 4]), &device);
            block.attn.forward(x).into_data().try_to_vec().unwrap()
        };
        let (before, after) = (output(0.0), output(1.0));
        (0..16).filter(|t| before[4 * t..4 * t + 4] != after[4 * t..4 * t + 4]).collect()
    }

    #[test]
    fn attention_stays_within_windows_and_shifted_windows_do_not_join_opposite_borders() {
        assert_eq!(changed(0, 5), [0, 1, 4, 5]);
        assert_eq!(changed(1, 5), [5, 6, 9, 10]);
        // A corner is alone in its part of a shifted window; a border has one neighbour.
        assert_eq!(changed(1, 0), [0]);
        assert_eq!(changed(1, 1), [1, 2]);
        assert_eq!(changed(1, 15), [15]);
    }

    #[test]
    fn windows_shrink_to_divisors_and_stages_halve_the_grid() {
        let config = SwinConfig {
            image: [1, 28, 28],
            patch: 1,
            width: 4,
            depths: vec![2, 1, 1],
            heads: 1,
            window: 8,
            classes: 2,
        };
        config.check().unwrap();
        let windows: Vec<_> = config.places().iter().map(|p| (p.grid[0], p.window[0], p.shift[0])).collect();
        assert_eq!(windows, [(28, 7, 0), (28, 7, 3), (14, 7, 0), (7, 7, 0)]);
        assert!(SwinConfig { depths: vec![1; 4], ..config }.check().is_err());
    }
}
