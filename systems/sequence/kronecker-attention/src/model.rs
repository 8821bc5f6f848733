//! A Transformer whose attention looks at tuples of tokens, for labels of tokens or of whole sequences.

use burn::module::{Module, Param};
use burn::nn::{Embedding, EmbeddingConfig, Initializer};
use burn::tensor::{Bool, Device, Int, Tensor, TensorData};
use clap::ValueEnum;
use kiln_core::{Error, Result};
use kiln_nn::{Dropout, DropoutConfig, LayerNorm, LayerNormConfig, Linear, LinearConfig};
use kiln_ops::Activation;
use serde::{Deserialize, Serialize};

use crate::layer::{Implementation, KroneckerAttention, KroneckerAttentionConfig};

/// What a label belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Target {
    /// Every token has a label
    Token,
    /// The whole sequence has a label
    Sequence,
}

/// How tokens become vectors.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Input {
    /// A learned vector for every symbol of a vocabulary of this size.
    Embed(usize),
    /// Cosines and sines of residues: `cos, sin (2π f x / modulus)` for f = 1 to `frequencies`.
    Fourier {
        /// The modulus.
        modulus: u64,
        /// How many frequencies.
        frequencies: usize,
    },
    /// Vectors of this many numbers.
    Numeric(usize),
}

/// Tokens of a batch.
#[derive(Debug, Clone)]
pub enum Tokens {
    /// Symbols or residues, `[batch, n]`
    Ids(Tensor<2, Int>),
    /// Vectors, `[batch, n, width]`
    Vectors(Tensor<3>),
}

/// Configuration of a [`KroneckerTransformer`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct KroneckerTransformerConfig {
    /// How tokens become vectors.
    pub input: Input,
    /// What a label belongs to.
    pub target: Target,
    /// Number of classes.
    pub classes: usize,
    /// Width of the residual stream.
    pub d_model: usize,
    /// Attention heads.
    pub heads: usize,
    /// For every block how many tokens a tuple has; 1 is ordinary, pairwise attention.
    pub orders: Vec<usize>,
    /// Factor of the scores; by default `1 / head width`.
    pub scale: Option<f64>,
    /// How attention is computed.
    pub implementation: Implementation,
    /// Whether a token sees only those before it.
    pub causal: bool,
    /// Whether the places of tokens matter: sines of different wave lengths are added to them.
    pub positions: bool,
    /// Probability that a channel of the heads' outputs or of a feed-forward layer is dropped in training.
    #[serde(default)]
    pub dropout: f64,
}

impl KroneckerTransformerConfig {
    /// One block that looks at pairs, without regard to places.
    pub fn new(input: Input, target: Target, classes: usize, d_model: usize, heads: usize) -> Self {
        Self {
            input,
            target,
            classes,
            d_model,
            heads,
            orders: vec![2],
            scale: None,
            implementation: Implementation::Exact,
            causal: false,
            positions: false,
            dropout: 0.0,
        }
    }

    /// Blocks with these orders.
    pub fn with_orders(mut self, orders: Vec<usize>) -> Self {
        self.orders = orders;
        self
    }

    /// Another factor of the scores.
    pub fn with_scale(mut self, scale: Option<f64>) -> Self {
        self.scale = scale;
        self
    }

    fn attention(&self, order: usize) -> KroneckerAttentionConfig {
        KroneckerAttentionConfig::new(self.d_model, self.heads)
            .with_order(order)
            .with_scale(self.scale)
            .with_impl(self.implementation)
            .with_causal(self.causal)
            .with_dropout(self.dropout)
    }

    /// Checks that the numbers fit.
    ///
    /// # Errors
    /// Names those that do not.
    pub fn check(&self) -> Result<()> {
        if self.orders.is_empty() {
            return Err(Error::usage("a model needs at least one layer"));
        }
        if self.classes < 2 {
            let message = format!("there must be at least two classes, not {}", self.classes);
            return Err(Error::usage(message).hint("with a single label there is nothing to learn"));
        }
        match self.input {
            Input::Fourier { modulus, .. } if modulus < 2 => {
                return Err(Error::usage(format!("the modulus is {modulus}, must be at least 2")));
            }
            Input::Embed(0) | Input::Numeric(0) | Input::Fourier { frequencies: 0, .. } => {
                return Err(Error::usage("tokens must have a vocabulary or a width of at least 1"));
            }
            _ => {}
        }
        self.orders.iter().try_for_each(|&order| self.attention(order).check())
    }

    /// Draws the parameters.
    pub fn init(&self, device: &Device) -> KroneckerTransformer {
        let d = self.d_model;
        let normal = |std: f64| Initializer::Normal { mean: 0.0, std };
        let features = match self.input {
            Input::Embed(_) => 0,
            Input::Fourier { frequencies, .. } => 2 * frequencies,
            Input::Numeric(width) => width,
        };
        let embedding = |symbols| EmbeddingConfig::new(symbols, d).with_initializer(normal(1.0)).init(device);
        // Half the squares of cosines and sines are 1, so that this keeps the variance.
        let std = (features as f64 / 2.0).sqrt().recip();
        let block = |&order: &usize| Block {
            attention: self.attention(order).init(device),
            norm: LayerNormConfig::new(d).init(device),
            up: LinearConfig::new(d, 4 * d).init(device),
            down: LinearConfig::new(4 * d, d).init(device),
            dropout: DropoutConfig::new(self.dropout).init(),
        };
        KroneckerTransformer {
            embedding: if let Input::Embed(symbols) = self.input { Some(embedding(symbols)) } else { None },
            input: (features > 0)
                .then(|| LinearConfig::new(features, d).with_initializer(normal(std)).init(device)),
            blank: normal(0.02).init([1, 1, d], device),
            blocks: self.orders.iter().map(block).collect(),
            head: LinearConfig::new(d, self.classes).init(device),
            config: self.clone(),
        }
    }
}

/// Blocks of tensor attention and feed-forward layers.
#[derive(Module, Debug)]
pub struct KroneckerTransformer {
    /// `[symbols, d]`, for symbols
    pub embedding: Option<Embedding>,
    /// Features to d, for residues and vectors
    pub input: Option<Linear>,
    /// A learned token before all others, which attention can look at when nothing fits, `[1, 1, d]`
    pub blank: Param<Tensor<3>>,
    /// The blocks.
    pub blocks: Vec<Block>,
    /// d to classes
    pub head: Linear,
    #[module(skip)]
    config: KroneckerTransformerConfig,
}

/// `x + attention(x)`, then `x + mlp(norm(x))`. Attention sees its input without a norm, whose rescaling would blur the
/// products of tokens.
#[derive(Module, Debug)]
pub struct Block {
    /// Tensor attention.
    pub attention: KroneckerAttention,
    /// Norm before the feed-forward layer.
    pub norm: LayerNorm,
    /// d to 4 d
    pub up: Linear,
    /// 4 d to d
    pub down: Linear,
    /// Between them.
    pub dropout: Dropout,
}

impl Block {
    fn forward(&self, x: Tensor<3>, mask: Option<Tensor<2, Bool>>) -> Tensor<3> {
        let x = x.clone() + self.attention.forward(x, mask);
        let hidden = self.up.forward_activated(self.norm.forward(x.clone()), Activation::Relu);
        x + self.down.forward(self.dropout.forward(hidden))
    }
}

impl KroneckerTransformer {
    /// The configuration it was made with.
    pub fn config(&self) -> &KroneckerTransformerConfig {
        &self.config
    }

    /// Logits; `mask [batch, n]` is true for tokens and false for padding.
    ///
    /// # Shapes
    /// - output: `[batch, n, classes]` for labels of tokens, `[batch, 1, classes]` for labels of sequences
    pub fn forward(&self, tokens: Tokens, mask: Option<Tensor<2, Bool>>) -> Tensor<3> {
        let (x, mask) = self.embed(tokens, mask);
        let x = self.blocks.iter().fold(x, |x, block| block.forward(x, mask.clone()));
        let [batch, n, d] = x.dims();
        let x = match self.config.target {
            Target::Token => x.narrow(1, 1, n - 1), // without the blank
            Target::Sequence => match mask {
                Some(mask) => {
                    let kept = mask.float().unsqueeze_dim::<3>(2); // [batch, n, 1]
                    (x * kept.clone()).sum_dim(1) / kept.sum_dim(1)
                }
                None => x.mean_dim(1),
            },
        };
        debug_assert_eq!([x.dims()[0], x.dims()[2]], [batch, d]);
        self.head.forward(x)
    }

    /// The blank and the tokens as vectors, `[batch, 1 + n, d]`, and which of them may be seen.
    pub(crate) fn embed(
        &self,
        tokens: Tokens,
        mask: Option<Tensor<2, Bool>>,
    ) -> (Tensor<3>, Option<Tensor<2, Bool>>) {
        let x = match (tokens, &self.config.input) {
            (Tokens::Ids(ids), Input::Fourier { modulus, frequencies }) => {
                fourier(ids, *modulus, *frequencies)
            }
            (Tokens::Ids(ids), _) => self.embedding.as_ref().expect("ids are embedded").forward(ids),
            (Tokens::Vectors(x), _) => x,
        };
        let x = match &self.input {
            Some(input) => input.forward(x),
            None => x,
        };
        let [batch, n, d] = x.dims();
        let device = x.device();
        let x = if self.config.positions { x + waves(n, d, &device) } else { x };
        let x = Tensor::cat(vec![self.blank.val().expand([batch, 1, d]), x], 1);
        let mask = mask.map(|mask| {
            let blank = Tensor::<2, Int>::ones([batch, 1], &mask.device()).equal_elem(1);
            Tensor::cat(vec![blank, mask], 1)
        });
        (x, mask)
    }
}

/// Cosines and sines of residues, `[batch, n, 2 frequencies]`.
fn fourier(ids: Tensor<2, Int>, modulus: u64, frequencies: usize) -> Tensor<3> {
    let device = ids.device();
    let angle = |f: usize| (2.0 * std::f64::consts::PI * f as f64 / modulus as f64) as f32;
    let angles: Vec<f32> = (1..=frequencies).map(angle).collect();
    let angles = Tensor::<1>::from_floats(angles.as_slice(), &device).unsqueeze::<3>();
    let turned = ids.float().unsqueeze_dim::<3>(2) * angles;
    Tensor::cat(vec![turned.clone().cos(), turned.sin()], 2)
}

/// Sines and cosines of the places `0..n`, `[1, n, d]` (Vaswani et al., arXiv 1706.03762, §3.5).
fn waves(n: usize, d: usize, device: &Device) -> Tensor<3> {
    let at = |place: usize, c: usize| {
        let angle = place as f64 / 10_000f64.powf((c / 2 * 2) as f64 / d as f64);
        (if c.is_multiple_of(2) { angle.sin() } else { angle.cos() }) as f32
    };
    let values: Vec<f32> = (0..n).flat_map(|place| (0..d).map(move |c| at(place, c))).collect();
    Tensor::from_data(TensorData::new(values, [1, n, d]), device)
}
