//! The vision transformer (Dosovitskiy et al., arXiv 2010.11929) as DeiT has it (Touvron et al., arXiv 2012.12877).
//! Parameters bear the names of `timm`, so that its files can be read.

use burn::module::{Module, Param};
use burn::nn::Initializer;
use burn::tensor::{Device, Tensor};
use kiln_core::Result;
use kiln_nn::{Conv2d, Conv2dConfig, LayerNorm, LayerNormConfig, Linear, LinearConfig};
use kiln_ops::{Activation, AttentionOptions, attention};
use serde::{Deserialize, Serialize};

use super::{check_common, check_heads, only, patch_grid};
use crate::anchor::{Anchor, Cost, Extent, Feature, Grid, Outline, Segment, linear_cost};

/// What layer norms add to the variance.
pub(super) const EPSILON: f64 = 1e-6;
/// Width of the hidden layer of a perceptron over that of its input.
pub(super) const MLP_RATIO: usize = 4;
/// Deviation of the class token and the positions before training.
const TOKEN_STD: f64 = 0.02;

/// Configuration of a [`Vit`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VitConfig {
    /// Channels, height and width of an image.
    pub image: [usize; 3],
    /// Side of a patch, in pixels.
    pub patch: usize,
    /// Width of a token.
    pub width: usize,
    /// Number of blocks.
    pub depth: usize,
    /// Heads of attention.
    pub heads: usize,
    /// Number of classes.
    pub classes: usize,
}

/// Patches become tokens beside a class token, blocks of attention and perceptrons follow, and a linear layer reads the
/// class token. Parts that a stitched network does not need may be absent.
#[derive(Module, Debug)]
pub struct Vit {
    /// Patches to tokens.
    pub patch_embed: Option<PatchEmbed>,
    /// `[1, 1, width]`
    pub cls_token: Option<Param<Tensor<3>>>,
    /// `[1, patches + 1, width]`
    pub pos_embed: Option<Param<Tensor<3>>>,
    /// The blocks.
    pub blocks: Vec<VitBlock>,
    /// Before the head.
    pub norm: Option<LayerNorm>,
    /// The class token to logits.
    pub head: Option<Linear>,
    #[module(skip)]
    config: VitConfig,
}

/// A linear map of every patch.
#[derive(Module, Debug)]
pub struct PatchEmbed {
    /// A convolution whose kernels are as far apart as they are wide.
    pub proj: Conv2d,
}

/// `x + attn(norm1(x))`, then `x + mlp(norm2(x))`.
#[derive(Module, Debug)]
pub struct VitBlock {
    /// Before the attention.
    pub norm1: LayerNorm,
    /// Attention of all tokens to all.
    pub attn: SelfAttention,
    /// Before the perceptron.
    pub norm2: LayerNorm,
    /// For every token alone.
    pub mlp: Mlp,
}

/// Multi-head attention with one projection for queries, keys and values, in this order.
#[derive(Module, Debug)]
pub struct SelfAttention {
    /// `[width, 3 width]`
    pub qkv: Linear,
    /// `[width, width]`
    pub proj: Linear,
    /// Heads of attention.
    pub heads: usize,
}

/// `fc2(gelu(fc1(x)))`
#[derive(Module, Debug)]
pub struct Mlp {
    /// `[width, 4 width]`
    pub fc1: Linear,
    /// `[4 width, width]`
    pub fc2: Linear,
}

impl VitConfig {
    /// Checks that the extents fit one another.
    ///
    /// # Errors
    /// Tells what does not.
    pub fn check(&self) -> Result<()> {
        check_common(self.image, self.classes, &[self.width], &[self.depth])?;
        patch_grid(self.image, self.patch)?;
        check_heads(self.width, self.heads)
    }

    fn patches(&self) -> usize {
        let [_, height, width] = self.image;
        (height / self.patch) * (width / self.patch)
    }

    /// The layout of the network.
    pub fn outline(&self) -> Outline {
        let (width, tokens) = (self.width, self.patches() + 1);
        let mut embed = linear_cost(self.patches(), self.image[0] * self.patch * self.patch, width);
        embed.params += ((tokens + 1) * width) as u64;
        let norm = Cost { flops: 0, params: 2 * width as u64 };
        let block = norm + attention_cost(tokens, tokens, width) + norm + mlp_cost(tokens, width);
        Outline {
            image: self.image,
            classes: self.classes,
            stages: vec![0; self.depth],
            extents: vec![Extent { channels: width, grid: Grid::Tokens(tokens) }; self.depth + 1],
            embed,
            blocks: vec![block; self.depth],
            head: norm + linear_cost(1, width, self.classes),
        }
    }

    /// Draws the parameters.
    pub fn init(&self, device: &Device) -> Vit {
        let width = self.width;
        let token = |count| Initializer::Normal { mean: 0.0, std: TOKEN_STD }.init([1, count, width], device);
        let patch = [self.patch, self.patch];
        let block = |_| VitBlock {
            norm1: norm(width, device),
            attn: SelfAttention::new(width, self.heads, device),
            norm2: norm(width, device),
            mlp: Mlp::new(width, device),
        };
        Vit {
            patch_embed: Some(PatchEmbed {
                proj: Conv2dConfig::new([self.image[0], width], patch).with_stride(patch).init(device),
            }),
            cls_token: Some(token(1)),
            pos_embed: Some(token(self.patches() + 1)),
            blocks: (0..self.depth).map(block).collect(),
            norm: Some(norm(width, device)),
            head: Some(LinearConfig::new(width, self.classes).init(device)),
            config: self.clone(),
        }
    }
}

/// A layer norm with the epsilon of DeiT.
pub(super) fn norm(width: usize, device: &Device) -> LayerNorm {
    LayerNormConfig::new(width).with_epsilon(EPSILON).init(device)
}

/// Of attention in which each of `tokens` sees `seen`.
pub(super) fn attention_cost(tokens: usize, seen: usize, width: usize) -> Cost {
    let scores = Cost { flops: 2 * (tokens * seen) as u64 * width as u64, params: 0 };
    linear_cost(tokens, width, 3 * width) + scores + linear_cost(tokens, width, width)
}

/// Of an [`Mlp`].
pub(super) fn mlp_cost(tokens: usize, width: usize) -> Cost {
    linear_cost(tokens, width, MLP_RATIO * width) + linear_cost(tokens, MLP_RATIO * width, width)
}

/// An absent part was asked for: stitched networks are put together so that this cannot happen.
pub(super) const KEPT: &str = "a segment runs only the parts that it keeps";

impl Anchor for Vit {
    fn outline(&self) -> Outline {
        self.config.outline()
    }

    fn embed(&self, images: Tensor<4>) -> Feature {
        let patches = self.patch_embed.as_ref().expect(KEPT).proj.forward(images);
        let patches = Feature::Map(patches).into_tokens();
        let [batch, _, width] = patches.dims();
        let class = self.cls_token.as_ref().expect(KEPT).val().expand([batch, 1, width]);
        let tokens = Tensor::cat(vec![class, patches], 1);
        Feature::Tokens(tokens + self.pos_embed.as_ref().expect(KEPT).val())
    }

    fn block(&self, index: usize, x: Feature) -> Feature {
        Feature::Tokens(self.blocks[index].forward(x.into_tokens()))
    }

    fn head(&self, x: Feature) -> Tensor<2> {
        let class = x.into_tokens().narrow(1, 0, 1).squeeze_dim::<2>(1);
        self.head.as_ref().expect(KEPT).forward(self.norm.as_ref().expect(KEPT).forward(class))
    }

    fn keep(self, segment: &Segment) -> Self {
        Self {
            patch_embed: self.patch_embed.filter(|_| segment.embed),
            cls_token: self.cls_token.filter(|_| segment.embed),
            pos_embed: self.pos_embed.filter(|_| segment.embed),
            blocks: only(self.blocks, &segment.blocks),
            norm: self.norm.filter(|_| segment.head),
            head: self.head.filter(|_| segment.head),
            config: self.config,
        }
    }
}

impl VitBlock {
    /// Applies the block.
    ///
    /// # Shapes
    /// - x, output: `[batch, tokens, width]`
    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let x = x.clone() + self.attn.forward(self.norm1.forward(x), AttentionOptions::default());
        x.clone() + self.mlp.forward(self.norm2.forward(x))
    }
}

impl SelfAttention {
    /// Draws the parameters.
    pub(super) fn new(width: usize, heads: usize, device: &Device) -> Self {
        Self {
            qkv: LinearConfig::new(width, 3 * width).init(device),
            proj: LinearConfig::new(width, width).init(device),
            heads,
        }
    }

    /// Applies the layer.
    ///
    /// # Shapes
    /// - x, output: `[batch, tokens, width]`
    pub fn forward(&self, x: Tensor<3>, options: AttentionOptions) -> Tensor<3> {
        let [batch, tokens, width] = x.dims();
        let qkv = self.qkv.forward(x);
        let part = |index: usize| {
            let part = qkv.clone().narrow(2, index * width, width);
            part.reshape([batch, tokens, self.heads, width / self.heads]).swap_dims(1, 2)
        };
        let seen = attention(part(0), part(1), part(2), options);
        self.proj.forward(seen.swap_dims(1, 2).reshape([batch, tokens, width]))
    }
}

impl Mlp {
    /// Draws the parameters.
    pub(super) fn new(width: usize, device: &Device) -> Self {
        Self {
            fc1: LinearConfig::new(width, MLP_RATIO * width).init(device),
            fc2: LinearConfig::new(MLP_RATIO * width, width).init(device),
        }
    }

    /// Applies the layer.
    ///
    /// # Shapes
    /// - x, output: `[batch, tokens, width]`
    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        self.fc2.forward(self.fc1.forward_activated(x, Activation::Gelu))
    }
}
