//! Multi-head attention (Vaswani et al., "Attention Is All You Need", arXiv 1706.03762).

use burn::config::Config;
use burn::module::Module;
use burn::nn::{Dropout, DropoutConfig, Initializer, Linear, LinearConfig};
use burn::tensor::activation::quiet_softmax;
use burn::tensor::{Bool, Device, Tensor};
use kiln_ops::{AttentionOptions, attention, softmax};

/// Configuration of a [`MultiHeadAttention`].
#[derive(Config, Debug)]
pub struct MultiHeadAttentionConfig {
    /// Width of inputs and output; a multiple of `n_heads`.
    pub d_model: usize,
    /// Number of heads.
    pub n_heads: usize,
    /// Probability that an attention weight is dropped in training.
    #[config(default = 0.1)]
    pub dropout: f64,
    /// The score of a hidden key, where weights are computed.
    #[config(default = -1.0e4)]
    pub min_float: f64,
    /// Whether weights are `e^x_i / (1 + Σ_j e^x_j)`, so that a head can attend to nothing.
    #[config(default = false)]
    pub quiet_softmax: bool,
    /// How the projections are drawn; by default uniformly within `1 / √d_model` of 0.
    #[config(default = "Initializer::KaimingUniform{gain: 1.0 / 3.0f64.sqrt(), fan_out_only: false}")]
    pub initializer: Initializer,
    /// Whether the keys' projection has a bias.
    #[config(default = true)]
    pub key_bias: bool,
    /// Whether the values' projection has a bias.
    #[config(default = true)]
    pub value_bias: bool,
    /// Whether the queries' projection has a bias.
    #[config(default = true)]
    pub query_bias: bool,
    /// Whether the output's projection has a bias.
    #[config(default = true)]
    pub output_bias: bool,
}

/// `output(concat_h softmax(Q_h K_hᵀ / √d_k) V_h)` with projected queries, keys and values; a replacement of
/// [`burn::nn::attention::MultiHeadAttention`] with the same parameters.
///
/// What differs: the weights are not in memory but computed where [`MhaOutput::weights`] asks for them, unless
/// dropout or the quiet softmax need them anyway. A query whose keys are all hidden has the context 0, where
/// Burn's has the mean of all values.
#[derive(Module, Debug)]
pub struct MultiHeadAttention {
    /// `[d_model, d_model]`
    pub query: Linear,
    /// `[d_model, d_model]`
    pub key: Linear,
    /// `[d_model, d_model]`
    pub value: Linear,
    /// `[d_model, d_model]`
    pub output: Linear,
    /// Drops attention weights.
    pub dropout: Dropout,
    /// Width of inputs and output.
    pub d_model: usize,
    /// Number of heads.
    pub n_heads: usize,
    /// Width of a head.
    pub d_k: usize,
    /// The score of a hidden key.
    pub min_float: f64,
    /// Whether a head can attend to nothing.
    pub quiet_softmax: bool,
}

impl MultiHeadAttentionConfig {
    /// Draws the parameters.
    ///
    /// # Panics
    /// When `d_model` is not a multiple of `n_heads`.
    pub fn init(&self, device: &Device) -> MultiHeadAttention {
        let Self { d_model, n_heads, .. } = *self;
        assert_eq!(d_model % n_heads, 0, "{n_heads} heads must divide width {d_model}");
        let linear = |bias| {
            let config = LinearConfig::new(d_model, d_model).with_bias(bias);
            config.with_initializer(self.initializer.clone()).init(device)
        };
        MultiHeadAttention {
            query: linear(self.query_bias),
            key: linear(self.key_bias),
            value: linear(self.value_bias),
            output: linear(self.output_bias),
            dropout: DropoutConfig::new(self.dropout).init(),
            d_model,
            n_heads,
            d_k: d_model / n_heads,
            min_float: self.min_float,
            quiet_softmax: self.quiet_softmax,
        }
    }
}

/// What a [`MultiHeadAttention`] reads.
#[derive(Debug, Clone)]
pub struct MhaInput {
    /// `[batch, time, d_model]`
    query: Tensor<3>,
    /// `[batch, source, d_model]`
    key: Tensor<3>,
    /// `[batch, source, d_model]`
    value: Tensor<3>,
    /// `[batch, source]`
    mask_pad: Option<Tensor<2, Bool>>,
    /// `[batch, time, source]`
    mask_attn: Option<Tensor<3, Bool>>,
}

impl MhaInput {
    /// A sequence that attends to itself, `[batch, time, d_model]`.
    pub fn self_attn(x: Tensor<3>) -> Self {
        Self::new(x.clone(), x.clone(), x)
    }

    /// Queries `[batch, time, d_model]`, keys and values `[batch, source, d_model]`, before their projections.
    pub fn new(query: Tensor<3>, key: Tensor<3>, value: Tensor<3>) -> Self {
        Self { query, key, value, mask_pad: None, mask_attn: None }
    }

    /// Hides the keys `[batch, source]` at which the mask is true.
    pub fn mask_pad(self, mask: Tensor<2, Bool>) -> Self {
        Self { mask_pad: Some(mask), ..self }
    }

    /// Hides from each query the keys `[batch, time, source]` at which the mask is true.
    pub fn mask_attn(self, mask: Tensor<3, Bool>) -> Self {
        Self { mask_attn: Some(mask), ..self }
    }
}

/// What a [`MultiHeadAttention`] gives.
#[derive(Debug, Clone)]
pub struct MhaOutput {
    /// `[batch, time, d_model]`
    pub context: Tensor<3>,
    weights: Weights,
}

/// Attention weights and what they follow from.
#[derive(Debug, Clone)]
struct Weights {
    scores: Scores,
    /// Where the layer computed them.
    computed: Option<Tensor<4>>,
}

/// Scaled products of queries and keys, before the softmax.
#[derive(Debug, Clone)]
struct Scores {
    /// `[batch, heads, time, d_k]`
    query: Tensor<4>,
    /// `[batch, heads, source, d_k]`
    key: Tensor<4>,
    /// True where a key is hidden, `[batch, 1, time or 1, source]`.
    mask: Option<Tensor<4, Bool>>,
    min_float: f64,
    quiet: bool,
}

impl MhaOutput {
    /// The attention weights, `[batch, heads, time, source]`: after dropout in training, and computed now where
    /// the layer did without.
    pub fn weights(&self) -> Tensor<4> {
        let Weights { scores, computed } = &self.weights;
        computed.clone().unwrap_or_else(|| scores.weights())
    }
}

impl Scores {
    fn weights(&self) -> Tensor<4> {
        let scale = (self.query.dims()[3] as f64).sqrt();
        let mut scores = self.query.clone().matmul(self.key.clone().transpose()).div_scalar(scale);
        if let Some(mask) = &self.mask {
            scores = scores.mask_fill(mask.clone(), self.min_float);
        }
        if self.quiet { quiet_softmax(scores, 3) } else { softmax(scores, 3) }
    }
}

impl MultiHeadAttention {
    /// Applies the layer.
    ///
    /// # Panics
    /// When the shapes in `input` do not fit.
    pub fn forward(&self, input: MhaInput) -> MhaOutput {
        let mask = mask(input.mask_pad, input.mask_attn);
        let query = self.heads(self.query.forward(input.query));
        let key = self.heads(self.key.forward(input.key));
        let value = self.heads(self.value.forward(input.value));
        let (context, weights) = self.attend(query, key, value, mask);
        MhaOutput { context: self.output.forward(context), weights }
    }

    /// Applies the layer to a sequence that grows by one token at a time: from the second call on only the last
    /// token of `input` is read, and the context is that of all tokens so far.
    ///
    /// Burn's layer computes all attention weights anew in every call; these are those of the new queries.
    ///
    /// # Panics
    /// When the shapes in `input` do not fit each other or the cache.
    pub fn forward_cache(&self, input: MhaInput, cache: &mut MhaCache) -> MhaOutput {
        let grown = |x: Tensor<3>| {
            let time = x.dims()[1];
            if cache.context.is_some() { x.narrow(1, time - 1, 1) } else { x }
        };
        let query = self.heads(self.query.forward(grown(input.query)));
        let mask = mask(
            input.mask_pad,
            input.mask_attn.map(|mask| {
                let (seen, new) = (mask.dims()[1], query.dims()[2]);
                mask.narrow(1, seen - new, new)
            }),
        );
        let project = |linear: &Linear, x: Tensor<3>, old: Option<Tensor<4>>| match old {
            Some(old) if cache.fixed_source => old,
            Some(old) => Tensor::cat(vec![old, self.heads(linear.forward(grown(x)))], 2),
            None => self.heads(linear.forward(x)),
        };
        let key = project(&self.key, input.key, cache.key.clone());
        let value = project(&self.value, input.value, cache.value.clone());

        let (context, weights) = self.attend(query, key.clone(), value.clone(), mask);
        let context = self.output.forward(context);
        let context = match cache.context.take() {
            Some(old) => Tensor::cat(vec![old, context], 1),
            None => context,
        };
        (cache.key, cache.value, cache.context) = (Some(key), Some(value), Some(context.clone()));
        MhaOutput { context, weights }
    }

    /// The context `[batch, time, d_model]` of all heads before the output's projection.
    fn attend(
        &self,
        query: Tensor<4>,
        key: Tensor<4>,
        value: Tensor<4>,
        mask: Option<Tensor<4, Bool>>,
    ) -> (Tensor<3>, Weights) {
        let [batch, _, time, _] = query.dims();
        let scores = Scores {
            query: query.clone(),
            key: key.clone(),
            mask: mask.clone(),
            min_float: self.min_float,
            quiet: self.quiet_softmax,
        };
        let drops = self.dropout.prob > 0.0 && self.dropout.training.is_enabled() && query.is_autodiff();
        let (context, computed) = if drops || self.quiet_softmax {
            let weights = self.dropout.forward(scores.weights());
            (weights.clone().matmul(value), Some(weights))
        } else {
            let options = AttentionOptions { mask, ..AttentionOptions::default() };
            (attention(query, key, value, options), None)
        };
        (context.swap_dims(1, 2).reshape([batch, time, self.d_model]), Weights { scores, computed })
    }

    /// `[batch, time, d_model]` to `[batch, heads, time, d_k]`.
    fn heads(&self, x: Tensor<3>) -> Tensor<4> {
        let [batch, time, _] = x.dims();
        x.reshape([batch, time, self.n_heads, self.d_k]).swap_dims(1, 2)
    }
}

/// Both masks in one, `[batch, 1, time or 1, source]`.
fn mask(pad: Option<Tensor<2, Bool>>, attn: Option<Tensor<3, Bool>>) -> Option<Tensor<4, Bool>> {
    let pad = pad.map(|mask| mask.unsqueeze_dims::<4>(&[1, 2]));
    let attn = attn.map(|mask| mask.unsqueeze_dim::<4>(1));
    match (pad, attn) {
        (Some(pad), Some(attn)) => Some(pad.expand(attn.dims()).bool_or(attn)),
        (pad, attn) => pad.or(attn),
    }
}

/// What [`MultiHeadAttention::forward_cache`] keeps from one token to the next.
#[derive(Debug, Clone)]
pub struct MhaCache {
    /// `[batch, heads, source, d_k]`
    key: Option<Tensor<4>>,
    /// `[batch, heads, source, d_k]`
    value: Option<Tensor<4>>,
    /// `[batch, time, d_model]`
    context: Option<Tensor<3>>,
    /// Whether keys and values are those of the first call.
    fixed_source: bool,
}

impl MhaCache {
    /// For a sequence that attends to itself.
    pub fn autoregressive() -> Self {
        Self { key: None, value: None, context: None, fixed_source: false }
    }

    /// For a sequence that attends to another one, which does not change.
    pub fn autoregressive_cross_attention() -> Self {
        Self { fixed_source: true, ..Self::autoregressive() }
    }
}
