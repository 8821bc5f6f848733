//! The Transformer that reads a labelled table and classifies further rows in one pass.

use burn::module::{Module, Param};
use burn::nn::{Gelu, Initializer};
use burn::tensor::{Device, Tensor};
use kiln_core::{Error, Result};
use kiln_nn::{LayerNorm, LayerNormConfig, Linear, LinearConfig};
use kiln_ops::{Activation, AttentionOptions, attention, linear};
use serde::{Deserialize, Serialize};

/// Configuration of a [`TabPfn`]. In files the fields bear the names of the reference implementation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TabPfnConfig {
    /// Columns of a table; narrower ones are padded with zeros.
    #[serde(rename = "num_features")]
    pub max_features: usize,
    /// Classes of a table.
    #[serde(rename = "max_num_classes")]
    pub max_classes: usize,
    /// Width E of the residual stream.
    pub emsize: usize,
    /// Encoder layers.
    #[serde(rename = "nlayers")]
    pub layers: usize,
    /// Attention heads; divides `emsize`.
    #[serde(rename = "nhead")]
    pub heads: usize,
    /// Width of the feed-forward part and of the decoder.
    #[serde(rename = "nhid")]
    pub hidden: usize,
}

impl Default for TabPfnConfig {
    /// The network that Kiln ships.
    fn default() -> Self {
        Self { max_features: 100, max_classes: 10, emsize: 128, layers: 6, heads: 4, hidden: 256 }
    }
}

impl TabPfnConfig {
    /// Checks that the numbers fit.
    ///
    /// # Errors
    /// Names those that do not.
    pub fn check(&self) -> Result<()> {
        let extents = [
            ("columns", self.max_features, 1),
            ("classes", self.max_classes, 2),
            ("embedding width", self.emsize, 1),
            ("layers", self.layers, 1),
            ("hidden width", self.hidden, 1),
        ];
        if let Some((name, value, least)) = extents.into_iter().find(|(_, value, least)| value < least) {
            return Err(Error::usage(format!("the network has {value} {name}, but needs at least {least}")));
        }
        if self.heads == 0 || !self.emsize.is_multiple_of(self.heads) {
            let message = format!("{} heads do not divide the embedding width {}", self.heads, self.emsize);
            return Err(Error::usage(message).hint("choose --emsize as a multiple of --heads"));
        }
        Ok(())
    }

    /// Draws the parameters. What each layer adds to the residual stream is 0 at first.
    pub fn init(&self, device: &Device) -> TabPfn {
        TabPfn {
            encoder: LinearConfig::new(self.max_features, self.emsize).init(device),
            y_encoder: LinearConfig::new(1, self.emsize).init(device),
            transformer_encoder: TransformerEncoder {
                layers: (0..self.layers).map(|_| self.init_layer(device)).collect(),
            },
            decoder: (
                LinearConfig::new(self.emsize, self.hidden).init(device),
                Gelu::new(),
                LinearConfig::new(self.hidden, self.max_classes).init(device),
            ),
            config: self.clone(),
        }
    }

    fn init_layer(&self, device: &Device) -> EncoderLayer {
        let (width, hidden) = (self.emsize, self.hidden);
        let zero = |inputs, outputs| LinearConfig::new(inputs, outputs).with_initializer(Initializer::Zeros);
        let xavier = Initializer::XavierUniform { gain: 1.0 };
        EncoderLayer {
            self_attn: SelfAttention {
                in_proj_weight: xavier.init_with([3 * width, width], Some(width), Some(3 * width), device),
                in_proj_bias: Initializer::Zeros.init([3 * width], device),
                out_proj: zero(width, width).init(device),
                heads: self.heads,
            },
            linear1: LinearConfig::new(width, hidden).init(device),
            linear2: zero(hidden, width).init(device),
            norm1: LayerNormConfig::new(width).init(device),
            norm2: LayerNormConfig::new(width).init(device),
        }
    }
}

/// A set-valued classifier: labelled rows and rows to classify go in, the latters' logits come out.
///
/// Every row, labelled or not, attends to the labelled rows and to nothing else. There are no positions, so that
/// the order of rows means nothing, and rows to classify do not see each other.
#[derive(Module, Debug)]
pub struct TabPfn {
    /// A row's columns to its embedding.
    pub encoder: Linear,
    /// A row's label, as a number, to what its embedding gains from it.
    pub y_encoder: Linear,
    /// The layers.
    pub transformer_encoder: TransformerEncoder,
    /// An embedding to logits. The module between the two maps only keeps their published names, `decoder.0` and
    /// `decoder.2`.
    pub decoder: (Linear, Gelu, Linear),
    #[module(skip)]
    config: TabPfnConfig,
}

/// Keys and values of the labelled rows in every layer: all that rows to classify need of them.
#[derive(Debug, Clone)]
pub struct LabelledRows {
    layers: Vec<KeysValues>,
}

impl TabPfn {
    /// The configuration it was made from.
    pub fn config(&self) -> &TabPfnConfig {
        &self.config
    }

    /// Logits of the rows after the labelled ones. A NaN in `x` counts as 0.
    ///
    /// # Shapes
    /// - x: `[batch, rows, max_features]`
    /// - y: `[batch, labelled]`, the classes of the first rows as numbers from 0
    /// - output: `[batch, rows - labelled, max_classes]`
    ///
    /// # Panics
    /// When there are more labels than rows.
    pub fn forward(&self, x: Tensor<3>, y: Tensor<2>) -> Tensor<3> {
        let [_, rows, _] = x.dims();
        let [_, labelled] = y.dims();
        let mut h = self.embed(x);
        let (with_label, without) =
            (h.clone().narrow(1, 0, labelled), h.narrow(1, labelled, rows - labelled));
        h = Tensor::cat(vec![with_label + self.embed_labels(y), without], 1);
        for layer in &self.transformer_encoder.layers {
            let seen = layer.self_attn.keys_values(h.clone().narrow(1, 0, labelled));
            h = layer.forward(h, &seen);
        }
        self.decode(h.narrow(1, labelled, rows - labelled))
    }

    /// Passes the labelled rows through all layers, once for however many rows are classified after.
    ///
    /// # Shapes
    /// - x: `[batch, labelled, max_features]`
    /// - y: `[batch, labelled]`
    pub fn context(&self, x: Tensor<3>, y: Tensor<2>) -> LabelledRows {
        let mut h = self.embed(x) + self.embed_labels(y);
        let layers = self.transformer_encoder.layers.iter().map(|layer| {
            let seen = layer.self_attn.keys_values(h.clone());
            h = layer.forward(h.clone(), &seen);
            seen
        });
        LabelledRows { layers: layers.collect() }
    }

    /// Logits of rows in the light of the labelled ones.
    ///
    /// # Shapes
    /// - x: `[batch, rows, max_features]`
    /// - output: `[batch, rows, max_classes]`
    pub fn query(&self, context: &LabelledRows, x: Tensor<3>) -> Tensor<3> {
        let layers = self.transformer_encoder.layers.iter().zip(&context.layers);
        self.decode(layers.fold(self.embed(x), |h, (layer, seen)| layer.forward(h, seen)))
    }

    fn embed(&self, x: Tensor<3>) -> Tensor<3> {
        let missing = x.clone().is_nan();
        self.encoder.forward(x.mask_fill(missing, 0.0))
    }

    fn embed_labels(&self, y: Tensor<2>) -> Tensor<3> {
        self.y_encoder.forward(y.unsqueeze_dim::<3>(2))
    }

    fn decode(&self, h: Tensor<3>) -> Tensor<3> {
        let (inner, _, outer) = &self.decoder;
        outer.forward(inner.forward_activated(h, Activation::Gelu))
    }
}

/// The stack of layers.
#[derive(Module, Debug)]
pub struct TransformerEncoder {
    /// From the first to the last.
    pub layers: Vec<EncoderLayer>,
}

/// `h = LN1(h + attention)`, then `h = LN2(h + W2 gelu(W1 h))`.
#[derive(Module, Debug)]
pub struct EncoderLayer {
    /// Attention to the labelled rows.
    pub self_attn: SelfAttention,
    /// W1.
    pub linear1: Linear,
    /// W2.
    pub linear2: Linear,
    /// After attention.
    pub norm1: LayerNorm,
    /// After the feed-forward part.
    pub norm2: LayerNorm,
}

impl EncoderLayer {
    /// `h [batch, rows, emsize]` attends to what is `seen`.
    fn forward(&self, h: Tensor<3>, seen: &KeysValues) -> Tensor<3> {
        let h = self.norm1.forward(h.clone() + self.self_attn.forward(h, seen));
        let inner = self.linear1.forward_activated(h.clone(), Activation::Gelu);
        self.norm2.forward(h + self.linear2.forward(inner))
    }
}

/// Multi-head attention with the projections of queries, keys and values stacked, as PyTorch keeps them.
#[derive(Module, Debug)]
pub struct SelfAttention {
    /// `[3 emsize, emsize]`
    pub in_proj_weight: Param<Tensor<2>>,
    /// `[3 emsize]`
    pub in_proj_bias: Param<Tensor<1>>,
    /// Output.
    pub out_proj: Linear,
    heads: usize,
}

/// Keys and values of one layer, each `[batch, heads, labelled, emsize / heads]`.
#[derive(Debug, Clone)]
struct KeysValues {
    keys: Tensor<4>,
    values: Tensor<4>,
}

impl SelfAttention {
    fn keys_values(&self, h: Tensor<3>) -> KeysValues {
        let [_, _, width] = h.dims();
        let both = self.project(h, width, 2 * width);
        KeysValues {
            keys: self.split_heads(both.clone().narrow(2, 0, width)),
            values: self.split_heads(both.narrow(2, width, width)),
        }
    }

    fn forward(&self, h: Tensor<3>, seen: &KeysValues) -> Tensor<3> {
        let [batch, rows, width] = h.dims();
        let queries = self.split_heads(self.project(h, 0, width));
        let (keys, values) = (seen.keys.clone(), seen.values.clone());
        let o = attention(queries, keys, values, AttentionOptions::default());
        self.out_proj.forward(o.swap_dims(1, 2).reshape([batch, rows, width]))
    }

    /// Applies `rows` rows of the stacked projection, from row `first` on.
    fn project(&self, h: Tensor<3>, first: usize, rows: usize) -> Tensor<3> {
        let weight = self.in_proj_weight.val().narrow(0, first, rows).transpose();
        let bias = self.in_proj_bias.val().narrow(0, first, rows);
        linear(h, weight, Some(bias), Activation::Identity)
    }

    fn split_heads(&self, x: Tensor<3>) -> Tensor<4> {
        let [batch, rows, width] = x.dims();
        x.reshape([batch, rows, self.heads, width / self.heads]).swap_dims(1, 2)
    }
}
