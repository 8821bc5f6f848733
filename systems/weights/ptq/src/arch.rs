//! The networks that Kiln trains to be quantised: a residual one, one of inverted residuals, and a small Transformer.

use burn::module::Module;
use burn::nn::PaddingConfig2d;
use burn::tensor::{Device, Int, Tensor};
use clap::ValueEnum;
use kiln_core::{Error, Result};
use kiln_nn::{
    AdaptiveAvgPool2d, AdaptiveAvgPool2dConfig, BatchNorm, BatchNormConfig, Conv2d, Conv2dConfig, Dropout,
    DropoutConfig, Embedding, EmbeddingConfig, LayerNorm, LayerNormConfig, Linear, LinearConfig,
};
use kiln_ops::{Activation, activate, matmul, softmax};
use serde::{Deserialize, Serialize};

/// Which network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Arch {
    /// Residual blocks with a bottleneck, as in ResNet-50
    #[value(name = "resnet-s")]
    #[serde(rename = "resnet-s")]
    Resnet,
    /// Inverted residuals with convolutions by channel, as in MobileNetV2
    #[value(name = "mobilenetv2-s")]
    #[serde(rename = "mobilenetv2-s")]
    Mobilenet,
    /// A Transformer encoder, as BERT
    #[value(name = "bert-s")]
    #[serde(rename = "bert-s")]
    Bert,
}

/// What a network looks at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Input {
    /// Channels, height and width.
    Image([usize; 3]),
    /// Texts as token numbers.
    Text {
        /// How many tokens there are.
        vocabulary: usize,
        /// Tokens of a text, the rest is cut off.
        length: usize,
    },
}

/// Configuration of a [`Classifier`].
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct ClassifierConfig {
    /// Which network.
    pub arch: Arch,
    /// What it looks at.
    pub input: Input,
    /// Number of classes.
    pub classes: usize,
    /// Factor of all widths.
    pub width: f64,
}

/// The token that fills texts up.
pub const PAD: i64 = 0;

/// Channels of bottlenecks of the residual network's stages, two blocks each; outputs are four times as wide.
const STAGES: [usize; 4] = [16, 32, 64, 128];

/// Channels, blocks and stride of the stages of inverted residuals (MobileNetV2, table 2, for small images).
const INVERTED: [(usize, usize, usize); 5] = [(24, 2, 1), (32, 2, 2), (64, 3, 2), (96, 2, 1), (160, 1, 1)];

/// Channels within an inverted residual over those at its ends.
const EXPANSION: usize = 6;

/// Width of the Transformer.
const WIDTH: usize = 128;

/// Its heads.
const HEADS: usize = 4;

/// Its blocks.
const BLOCKS: usize = 4;

impl ClassifierConfig {
    /// The network at its usual width.
    pub fn new(arch: Arch, input: Input, classes: usize) -> Self {
        Self { arch, input, classes, width: if arch == Arch::Mobilenet { 0.5 } else { 1.0 } }
    }

    /// Makes sure that the numbers fit.
    ///
    /// # Errors
    /// Names those that do not.
    pub fn check(&self) -> Result<()> {
        if self.classes < 2 {
            let message = format!("there must be at least two classes, not {}", self.classes);
            return Err(Error::usage(message).hint("with a single label there is nothing to learn"));
        }
        if !(self.width.is_finite() && self.width > 0.0 && self.width <= 16.0) {
            return Err(Error::usage(format!("--width {} is not between 0 and 16", self.width)));
        }
        match (self.arch, self.input) {
            (Arch::Bert, Input::Image(_)) => {
                Err(Error::usage("bert-s reads texts, not images").hint("--arch resnet-s or mobilenetv2-s"))
            }
            (Arch::Resnet | Arch::Mobilenet, Input::Text { .. }) => {
                Err(Error::usage("this network reads images, not texts").hint("--arch bert-s"))
            }
            (_, Input::Image(shape)) if shape.contains(&0) => {
                Err(Error::usage(format!("images of {shape:?} have no pixels")))
            }
            (_, Input::Text { vocabulary, length }) if vocabulary < 2 || length < 2 => {
                Err(Error::usage("a text must have at least two tokens of at least two"))
            }
            _ => Ok(()),
        }
    }

    /// A width, scaled, in whole multiples of `unit`.
    fn scaled(&self, channels: usize, unit: usize) -> usize {
        ((channels as f64 * self.width / unit as f64).round() as usize).max(1) * unit
    }

    /// Draws the parameters.
    ///
    /// # Panics
    /// When the configuration has not passed [`check`](Self::check).
    pub fn init(&self, device: &Device) -> Classifier {
        match (self.arch, self.input) {
            (Arch::Resnet, Input::Image([channels, ..])) => Classifier::Resnet(self.resnet(channels, device)),
            (Arch::Mobilenet, Input::Image([channels, ..])) => {
                Classifier::Mobilenet(self.mobilenet(channels, device))
            }
            (Arch::Bert, Input::Text { vocabulary, length }) => {
                Classifier::Bert(self.bert(vocabulary, length, device))
            }
            (arch, input) => panic!("{arch:?} does not read {input:?}"),
        }
    }

    fn resnet(&self, channels: usize, device: &Device) -> Resnet {
        let first = self.scaled(STAGES[0], 1);
        let mut width = first;
        let mut blocks = Vec::new();
        for (stage, &inner) in STAGES.iter().enumerate() {
            for block in 0..2 {
                let stride = if stage > 0 && block == 0 { 2 } else { 1 };
                let (inner, outer) = (self.scaled(inner, 1), 4 * self.scaled(inner, 1));
                blocks.push(Bottleneck {
                    reduce: Normed::new([width, inner], 1, 1, 1, device),
                    middle: Normed::new([inner, inner], 3, stride, 1, device),
                    expand: Normed::new([inner, outer], 1, 1, 1, device),
                    shortcut: (width != outer || stride != 1)
                        .then(|| Normed::new([width, outer], 1, stride, 1, device)),
                });
                width = outer;
            }
        }
        Resnet {
            stem: Normed::new([channels, first], 3, 1, 1, device),
            blocks,
            pool: AdaptiveAvgPool2dConfig::new([1, 1]).init(),
            head: LinearConfig::new(width, self.classes).init(device),
        }
    }

    fn mobilenet(&self, channels: usize, device: &Device) -> Mobilenet {
        let (first, second) = (self.scaled(32, 4), self.scaled(16, 4));
        let mut width = second;
        let mut blocks = Vec::new();
        for (channels, count, stride) in INVERTED {
            for block in 0..count {
                let (inner, outer) = (EXPANSION * width, self.scaled(channels, 4));
                let stride = if block == 0 { stride } else { 1 };
                blocks.push(Inverted {
                    expand: Some(Normed::new([width, inner], 1, 1, 1, device)),
                    spatial: Normed::new([inner, inner], 3, stride, inner, device),
                    project: Normed::new([inner, outer], 1, 1, 1, device),
                    residual: stride == 1 && width == outer,
                });
                width = outer;
            }
        }
        let opening = Inverted {
            expand: None,
            spatial: Normed::new([first, first], 3, 1, first, device),
            project: Normed::new([first, second], 1, 1, 1, device),
            residual: false,
        };
        blocks.insert(0, opening);
        let last = self.scaled(512, 4);
        Mobilenet {
            stem: Normed::new([channels, first], 3, 1, 1, device),
            blocks,
            last: Normed::new([width, last], 1, 1, 1, device),
            pool: AdaptiveAvgPool2dConfig::new([1, 1]).init(),
            head: LinearConfig::new(last, self.classes).init(device),
        }
    }

    fn bert(&self, vocabulary: usize, length: usize, device: &Device) -> Bert {
        let d = self.scaled(WIDTH, HEADS);
        let linear = |from, to| LinearConfig::new(from, to).init(device);
        let block = |_| Block {
            query: linear(d, d),
            key: linear(d, d),
            value: linear(d, d),
            output: linear(d, d),
            attention_norm: LayerNormConfig::new(d).init(device),
            up: linear(d, 4 * d),
            down: linear(4 * d, d),
            norm: LayerNormConfig::new(d).init(device),
            dropout: DropoutConfig::new(0.1).init(),
        };
        Bert {
            tokens: EmbeddingConfig::new(vocabulary, d).init(device),
            places: EmbeddingConfig::new(length, d).init(device),
            norm: LayerNormConfig::new(d).init(device),
            dropout: DropoutConfig::new(0.1).init(),
            blocks: (0..BLOCKS).map(block).collect(),
            pooler: linear(d, d),
            head: linear(d, self.classes),
        }
    }
}

/// One of the networks.
#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant, reason = "there is one at a time")]
pub enum Classifier {
    /// Of residual blocks.
    Resnet(Resnet),
    /// Of inverted residuals.
    Mobilenet(Mobilenet),
    /// A Transformer.
    Bert(Bert),
}

/// What a classifier reads.
#[derive(Debug, Clone)]
pub enum Batch {
    /// `[batch, channels, height, width]`
    Images(Tensor<4>),
    /// `[batch, length]`
    Tokens(Tensor<2, Int>),
}

impl Classifier {
    /// Logits, `[batch, classes]`.
    ///
    /// # Panics
    /// When a network for images is given texts, or the other way round.
    pub fn forward(&self, batch: Batch) -> Tensor<2> {
        match (self, batch) {
            (Self::Resnet(net), Batch::Images(x)) => net.forward(x),
            (Self::Mobilenet(net), Batch::Images(x)) => net.forward(x),
            (Self::Bert(net), Batch::Tokens(ids)) => net.forward(ids),
            (_, batch) => panic!("the network does not read {batch:?}"),
        }
    }
}

/// A convolution and a batch norm.
#[derive(Module, Debug)]
pub struct Normed {
    /// Without bias: the norm has one.
    pub conv: Conv2d,
    /// The norm.
    pub norm: BatchNorm,
}

impl Normed {
    fn new([from, to]: [usize; 2], kernel: usize, stride: usize, groups: usize, device: &Device) -> Self {
        let side = kernel / 2;
        let conv = Conv2dConfig::new([from, to], [kernel, kernel])
            .with_stride([stride, stride])
            .with_padding(PaddingConfig2d::Explicit(side, side, side, side))
            .with_groups(groups)
            .with_bias(false);
        Self { conv: conv.init(device), norm: BatchNormConfig::new(to).init(device) }
    }

    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        self.norm.forward(self.conv.forward(x))
    }
}

/// A residual network (He et al., arXiv 1512.03385).
#[derive(Module, Debug)]
pub struct Resnet {
    /// The first convolution.
    pub stem: Normed,
    /// Its blocks.
    pub blocks: Vec<Bottleneck>,
    /// The mean over all pixels.
    pub pool: AdaptiveAvgPool2d,
    /// To the classes.
    pub head: Linear,
}

/// `relu(x + expand(relu(middle(relu(reduce x)))))`
#[derive(Module, Debug)]
pub struct Bottleneck {
    /// 1 × 1, to few channels.
    pub reduce: Normed,
    /// 3 × 3.
    pub middle: Normed,
    /// 1 × 1, to four times as many.
    pub expand: Normed,
    /// Where the shape changes.
    pub shortcut: Option<Normed>,
}

fn relu(x: Tensor<4>) -> Tensor<4> {
    activate(x, Activation::Relu)
}

fn relu6(x: Tensor<4>) -> Tensor<4> {
    x.clamp(0.0, 6.0)
}

impl Resnet {
    fn forward(&self, x: Tensor<4>) -> Tensor<2> {
        let x = relu(self.stem.forward(x));
        let x = self.blocks.iter().fold(x, |x, block| block.forward(x));
        self.head.forward(self.pool.forward(x).flatten(1, 3))
    }
}

impl Bottleneck {
    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let y = relu(self.reduce.forward(x.clone()));
        let y = relu(self.middle.forward(y));
        let shortcut = match &self.shortcut {
            Some(shortcut) => shortcut.forward(x),
            None => x,
        };
        relu(self.expand.forward(y) + shortcut)
    }
}

/// A network of inverted residuals (Sandler et al., arXiv 1801.04381).
#[derive(Module, Debug)]
pub struct Mobilenet {
    /// The first convolution.
    pub stem: Normed,
    /// Its blocks.
    pub blocks: Vec<Inverted>,
    /// 1 × 1, before the mean.
    pub last: Normed,
    /// The mean over all pixels.
    pub pool: AdaptiveAvgPool2d,
    /// To the classes.
    pub head: Linear,
}

/// `x + project(relu6(spatial(relu6(expand x))))`
#[derive(Module, Debug)]
pub struct Inverted {
    /// 1 × 1, to more channels; not in the first block.
    pub expand: Option<Normed>,
    /// 3 × 3, each channel by itself.
    pub spatial: Normed,
    /// 1 × 1, to few channels.
    pub project: Normed,
    /// Whether the input is added.
    pub residual: bool,
}

impl Mobilenet {
    fn forward(&self, x: Tensor<4>) -> Tensor<2> {
        let x = relu6(self.stem.forward(x));
        let x = self.blocks.iter().fold(x, |x, block| block.forward(x));
        let x = relu6(self.last.forward(x));
        self.head.forward(self.pool.forward(x).flatten(1, 3))
    }
}

impl Inverted {
    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let y = match &self.expand {
            Some(expand) => relu6(expand.forward(x.clone())),
            None => x.clone(),
        };
        let y = self.project.forward(relu6(self.spatial.forward(y)));
        if self.residual { x + y } else { y }
    }
}

/// A Transformer encoder whose first token stands for the text (Devlin et al., arXiv 1810.04805).
#[derive(Module, Debug)]
pub struct Bert {
    /// A vector a token.
    pub tokens: Embedding,
    /// A vector a place.
    pub places: Embedding,
    /// Norm of their sum.
    pub norm: LayerNorm,
    /// After it.
    pub dropout: Dropout,
    /// The blocks.
    pub blocks: Vec<Block>,
    /// Of the first token.
    pub pooler: Linear,
    /// To the classes.
    pub head: Linear,
}

/// Attention and a feed-forward layer, each followed by a norm of its sum with its input.
#[derive(Module, Debug)]
pub struct Block {
    /// d to d
    pub query: Linear,
    /// d to d
    pub key: Linear,
    /// d to d
    pub value: Linear,
    /// d to d
    pub output: Linear,
    /// After attention.
    pub attention_norm: LayerNorm,
    /// d to 4 d
    pub up: Linear,
    /// 4 d to d
    pub down: Linear,
    /// After the feed-forward layer.
    pub norm: LayerNorm,
    /// On what is added.
    pub dropout: Dropout,
}

/// What is added to the score of a padding token.
const HIDDEN: f64 = -1e4;

impl Bert {
    fn forward(&self, ids: Tensor<2, Int>) -> Tensor<2> {
        let [batch, length] = ids.dims();
        let padding = ids.clone().equal_elem(PAD).float() * HIDDEN; // [batch, length]
        let mask = padding.reshape([batch, 1, 1, length]);
        let places = Tensor::<1, Int>::arange(0..length as i64, &ids.device()).reshape([1, length]);
        let x = self.tokens.forward(ids) + self.places.forward(places);
        let x = self.dropout.forward(self.norm.forward(x));
        let x = self.blocks.iter().fold(x, |x, block| block.forward(x, mask.clone()));
        let [batch, _, d] = x.dims();
        let first = x.narrow(1, 0, 1).reshape([batch, d]);
        self.head.forward(activate(self.pooler.forward(first), Activation::Tanh))
    }
}

impl Block {
    /// `x` is `[batch, length, d]`, `mask` `[batch, 1, 1, length]`.
    fn forward(&self, x: Tensor<3>, mask: Tensor<4>) -> Tensor<3> {
        let [batch, length, d] = x.dims();
        let dim = d / HEADS;
        let heads = |y: Tensor<3>| y.reshape([batch, length, HEADS, dim]).swap_dims(1, 2);
        let (q, k, v) =
            (self.query.forward(x.clone()), self.key.forward(x.clone()), self.value.forward(x.clone()));
        // Products of their own, so that each can be quantised.
        let scores = matmul(heads(q), heads(k).swap_dims(2, 3)) * (dim as f64).powf(-0.5) + mask;
        let attended = matmul(softmax(scores, 3), heads(v)); // [batch, heads, length, dim]
        let attended = self.output.forward(attended.swap_dims(1, 2).reshape([batch, length, d]));
        let x = self.attention_norm.forward(x + self.dropout.forward(attended));
        let y = self.down.forward(activate(self.up.forward(x.clone()), Activation::Gelu));
        self.norm.forward(x + self.dropout.forward(y))
    }
}
