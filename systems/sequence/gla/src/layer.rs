//! The GLA layer (paper §4.4): projections, the low-rank gate, the operator, a norm per head, an output gate.

use burn::module::Module;
use burn::nn::Initializer;
use burn::tensor::{Bool, Device, Tensor};
use kiln_core::{Error, Result};
use kiln_nn::{Linear, LinearConfig, RmsNorm, RmsNormConfig};
use kiln_ops::{Activation, activate, gated};
use serde::{Deserialize, Serialize};

use crate::op::{GlaOpConfig, gla_chunk, gla_chunk_packed, gla_chunk_with_state, zero_state};
use crate::short_conv::{ShortConv, ShortConvConfig};

/// Width of the gate's bottleneck.
const GATE_RANK: usize = 16;
/// Xavier gain of all projections, 2^-2.5.
const PROJECTION_GAIN: f64 = 0.176_776_695_296_636_9;

/// What decides how much of the state each step keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Gate {
    /// A gate computed from the token, per key channel: gated linear attention.
    Data,
    /// A fixed decay per head, `1 - 2^(-5-h)`: retention.
    Fixed,
    /// Nothing is forgotten: linear attention.
    Open,
}

/// A map applied to queries and keys, elementwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum FeatureMap {
    /// `max(x, 0)`.
    #[serde(rename = "relu")]
    Relu,
    /// `elu(x) + 1`.
    #[serde(rename = "elu+1", alias = "elu")]
    EluPlusOne,
    /// `x σ(x)`.
    #[serde(rename = "silu", alias = "swish")]
    Silu,
    /// The identity.
    #[serde(rename = "none", alias = "identity")]
    None,
}

impl FeatureMap {
    fn apply(self, x: Tensor<3>) -> Tensor<3> {
        match self {
            Self::Relu => activate(x, Activation::Relu),
            Self::EluPlusOne => {
                let negative = x.clone().clamp_max(0.0).exp();
                activate(x, Activation::Relu) + negative
            }
            Self::Silu => activate(x, Activation::Silu),
            Self::None => x,
        }
    }
}

/// Configuration of a [`GatedLinearAttention`] layer; `new` gives the paper's defaults.
#[derive(Debug, Clone, PartialEq)]
pub struct GatedLinearAttentionConfig {
    /// Width of the residual stream, d.
    pub d_model: usize,
    /// Heads, H.
    pub heads: usize,
    /// Heads of keys, values and gates; divides `heads`.
    pub kv_heads: usize,
    /// Width of all keys together over d.
    pub expand_k: f64,
    /// Width of all values together over d.
    pub expand_v: f64,
    /// How the state decays.
    pub gate: Gate,
    /// Temperature τ: `g = log σ(·) / τ`.
    pub tau: f64,
    /// Least log decay, if bounded.
    pub clamp_min: Option<f64>,
    /// Map of queries and keys.
    pub feature_map: FeatureMap,
    /// Kernel size of causal depthwise convolutions on q, k and v, if any.
    pub short_conv: Option<usize>,
    /// Whether the output is gated by `swish(x Wr)`.
    pub output_gate: bool,
    /// ε of the norm per head.
    pub norm_eps: f64,
    /// How the operator cuts the sequence.
    pub op: GlaOpConfig,
}

impl GatedLinearAttentionConfig {
    /// The paper's layer of width `d_model` with `heads` heads.
    pub fn new(d_model: usize, heads: usize) -> Self {
        Self {
            d_model,
            heads,
            kv_heads: heads,
            expand_k: 0.5,
            expand_v: 1.0,
            gate: Gate::Data,
            tau: 16.0,
            clamp_min: None,
            feature_map: FeatureMap::None,
            short_conv: None,
            output_gate: true,
            norm_eps: 1e-6,
            op: GlaOpConfig::default(),
        }
    }

    /// Width of all keys together, dk.
    pub fn key_width(&self) -> usize {
        (self.d_model as f64 * self.expand_k) as usize
    }

    /// Width of all values together, dv.
    pub fn value_width(&self) -> usize {
        (self.d_model as f64 * self.expand_v) as usize
    }

    /// Checks that heads divide the widths.
    ///
    /// # Errors
    /// Names the numbers that do not fit.
    pub fn check(&self) -> Result<()> {
        self.op.check()?;
        let (key, value) = (self.key_width(), self.value_width());
        if self.heads == 0 || key == 0 || value == 0 || key % self.heads != 0 || value % self.heads != 0 {
            return Err(Error::usage(format!(
                "{} heads do not divide the key width {key} and the value width {value}",
                self.heads
            ))
            .hint("the widths are d-model × expand-k and d-model × expand-v"));
        }
        if self.kv_heads == 0 || !self.heads.is_multiple_of(self.kv_heads) {
            let message = format!("{} key/value heads do not divide {} heads", self.kv_heads, self.heads);
            return Err(Error::usage(message).hint("choose a divisor of the number of heads"));
        }
        if !(self.tau > 0.0 && self.tau.is_finite()) {
            return Err(Error::usage(format!("the gate temperature tau is {}, must be > 0", self.tau)));
        }
        if let Some(least) = self.clamp_min.filter(|least| least.is_nan() || *least > 0.0) {
            let message = format!("the least log decay clamp_min is {least}, must be ≤ 0");
            return Err(Error::usage(message).hint("a log decay above 0 would let the state grow"));
        }
        Ok(())
    }

    /// Initialises the layer on `device`.
    pub fn init(&self, device: &Device) -> GatedLinearAttention {
        let groups = self.heads / self.kv_heads;
        let (key, value) = (self.key_width(), self.value_width());
        let projection = |from, to| {
            LinearConfig::new(from, to)
                .with_bias(false)
                .with_initializer(Initializer::XavierUniform { gain: PROJECTION_GAIN })
                .init(device)
        };
        let conv = |channels| {
            self.short_conv.map(|kernel| ShortConvConfig::new(channels, kernel).with_bias(false).init(device))
        };
        let gate = || {
            let mut up = LinearConfig::new(GATE_RANK, key / groups)
                .with_initializer(Initializer::XavierUniform { gain: PROJECTION_GAIN })
                .init(device);
            up.bias = Some(Initializer::Zeros.init([key / groups], device));
            vec![projection(self.d_model, GATE_RANK), up]
        };
        GatedLinearAttention {
            q_proj: projection(self.d_model, key),
            k_proj: projection(self.d_model, key / groups),
            v_proj: projection(self.d_model, value / groups),
            q_conv1d: conv(key),
            k_conv1d: conv(key / groups),
            v_conv1d: conv(value / groups),
            gk_proj: (self.gate == Gate::Data).then(gate),
            g_proj: self.output_gate.then(|| projection(self.d_model, value)),
            g_norm_swish_gate: RmsNormConfig::new(value / self.heads)
                .with_epsilon(self.norm_eps)
                .init(device),
            o_proj: projection(value, self.d_model),
            config: self.clone(),
        }
    }
}

/// What a layer remembers of the past; its size does not depend on how long that was.
#[derive(Debug, Clone)]
pub struct GlaLayerState {
    /// S, `[batch, heads, key, value]`.
    pub state: Tensor<4>,
    /// The last inputs of the short convolutions on q, k and v, `[batch, kernel - 1, channels]` each.
    pub tails: Option<[Tensor<3>; 3]>,
}

/// Multi-head gated linear attention; parameters are named as in the reference implementation.
#[derive(Module, Debug)]
pub struct GatedLinearAttention {
    /// Queries, d → dk.
    pub q_proj: Linear,
    /// Keys, d → dk / groups.
    pub k_proj: Linear,
    /// Values, d → dv / groups.
    pub v_proj: Linear,
    /// Short convolution on the queries.
    pub q_conv1d: Option<ShortConv>,
    /// Short convolution on the keys.
    pub k_conv1d: Option<ShortConv>,
    /// Short convolution on the values.
    pub v_conv1d: Option<ShortConv>,
    /// The gate, d → 16 → dk / groups, where it depends on the data.
    pub gk_proj: Option<Vec<Linear>>,
    /// The output gate, d → dv.
    pub g_proj: Option<Linear>,
    /// The norm over the value channels of each head, shared by the heads.
    pub g_norm_swish_gate: RmsNorm,
    /// The output, dv → d.
    pub o_proj: Linear,
    #[module(skip)]
    config: GatedLinearAttentionConfig,
}

/// q, k, v and log decays, `[batch, heads, time, key or value]`.
struct Projected {
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    g: Tensor<4>,
    tails: Option<[Tensor<3>; 3]>,
}

impl GatedLinearAttention {
    /// The configuration it was made with.
    pub fn config(&self) -> &GatedLinearAttentionConfig {
        &self.config
    }

    /// Cuts the sequence otherwise from now on; the result differs only by rounding.
    pub fn set_op(&mut self, op: GlaOpConfig) {
        self.config.op = op;
    }

    /// x `[batch, time, d]` → `[batch, time, d]`.
    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let Projected { q, k, v, g, .. } = self.project(x.clone(), None);
        self.finish(x, gla_chunk(q, k, v, g, None, self.config.op))
    }

    /// As [`forward`](Self::forward) for padded rows: `mask [batch, time]` is true where a token is kept.
    ///
    /// Positions left of the first token neither add to the state nor decay it.
    pub fn forward_masked(&self, x: Tensor<3>, mask: Tensor<2, Bool>) -> Tensor<3> {
        let padding = mask.bool_not().unsqueeze_dim::<3>(2);
        let width = x.dims()[2];
        let [batch, time] = [x.dims()[0], x.dims()[1]];
        let x = x.mask_fill(padding.clone().expand([batch, time, width]), 0.0);
        let Projected { q, k, v, g, .. } = self.project(x.clone(), None);
        let g_dims = g.dims();
        let g = g.mask_fill(padding.unsqueeze_dim::<4>(1).expand(g_dims), 0.0);
        self.finish(x, gla_chunk(q, k, v, g, None, self.config.op))
    }

    /// As [`forward`](Self::forward) for documents packed into one row: each starts from an empty state.
    ///
    /// `offsets` are the starts of the documents and the length of the row. Short convolutions see
    /// across the seams.
    pub fn forward_packed(&self, x: Tensor<3>, offsets: &[usize]) -> Tensor<3> {
        let Projected { q, k, v, g, .. } = self.project(x.clone(), None);
        self.finish(x, gla_chunk_packed(q, k, v, g, offsets, self.config.op))
    }

    /// The next `time ≥ 1` rows after `state`, and the state after them.
    pub fn forward_with_state(&self, x: Tensor<3>, state: GlaLayerState) -> (Tensor<3>, GlaLayerState) {
        let Projected { q, k, v, g, tails } = self.project(x.clone(), state.tails);
        let (o, state) = gla_chunk_with_state(q, k, v, g, Some(state.state), self.config.op);
        (self.finish(x, o), GlaLayerState { state, tails })
    }

    /// The state before the first token.
    pub fn initial_state(&self, batch: usize, device: &Device) -> GlaLayerState {
        let config = &self.config;
        let (key, value) = (config.key_width() / config.heads, config.value_width() / config.heads);
        let groups = config.heads / config.kv_heads;
        let tails = config.short_conv.map(|kernel| {
            [config.key_width(), config.key_width() / groups, config.value_width() / groups]
                .map(|channels| Tensor::zeros([batch, kernel - 1, channels], device))
        });
        GlaLayerState { state: zero_state(batch, config.heads, key, value, device), tails }
    }

    /// Log decays of the gate, `[batch, heads, time, key]`, for looking at what the layer remembers.
    pub fn log_decays(&self, x: Tensor<3>) -> Tensor<4> {
        self.project(x, None).g
    }

    fn project(&self, x: Tensor<3>, tails: Option<[Tensor<3>; 3]>) -> Projected {
        let config = &self.config;
        let [batch, time, _] = x.dims();
        let device = x.device();
        let [q_tail, k_tail, v_tail] = tails.map_or([None, None, None], |tails| tails.map(Some));
        let (q, q_tail) = convolve(self.q_conv1d.as_ref(), self.q_proj.forward(x.clone()), q_tail);
        let (k, k_tail) = convolve(self.k_conv1d.as_ref(), self.k_proj.forward(x.clone()), k_tail);
        let (v, v_tail) = convolve(self.v_conv1d.as_ref(), self.v_proj.forward(x.clone()), v_tail);
        let tails = match (q_tail, k_tail, v_tail) {
            (Some(q), Some(k), Some(v)) => Some([q, k, v]),
            _ => None,
        };

        let (heads, kv_heads) = (config.heads, config.kv_heads);
        let key = config.key_width() / heads;
        let g = match (config.gate, &self.gk_proj) {
            (Gate::Data, Some(gate)) => {
                let logits = gate.iter().fold(x, |x, linear| linear.forward(x));
                let g = activate(logits, Activation::LogSigmoid).div_scalar(config.tau);
                let g = match config.clamp_min {
                    Some(least) => g.clamp_min(least),
                    None => g,
                };
                spread(split_heads(g, kv_heads), heads)
            }
            (Gate::Fixed, _) => {
                let decays: Vec<f32> =
                    (0..heads).map(|h| (1.0 - 2f64.powi(-5 - h as i32)).ln() as f32).collect();
                let decays = Tensor::<1>::from_floats(decays.as_slice(), &device);
                decays.reshape([1, 1, heads, 1]).expand([batch, time, heads, key]).swap_dims(1, 2)
            }
            _ => Tensor::zeros([batch, time, heads, key], &device).swap_dims(1, 2),
        };
        let map = config.feature_map;
        Projected {
            q: split_heads(map.apply(q), heads),
            k: spread(split_heads(map.apply(k), kv_heads), heads),
            v: spread(split_heads(v, kv_heads), heads),
            g,
            tails,
        }
    }

    /// `y = (RMSNorm(o) ⊙ swish(x Wr)) Wo`.
    fn finish(&self, x: Tensor<3>, o: Tensor<4>) -> Tensor<3> {
        let [batch, heads, time, value] = o.dims();
        let o = self.g_norm_swish_gate.forward(o.swap_dims(1, 2)).reshape([batch, time, heads * value]);
        let o = match &self.g_proj {
            Some(gate) => gated(gate.forward(x), o, Activation::Silu),
            None => o,
        };
        self.o_proj.forward(o)
    }
}

/// A short convolution and silu, where there is one; returns the new tail when there was an old one.
fn convolve(
    conv: Option<&ShortConv>,
    x: Tensor<3>,
    tail: Option<Tensor<3>>,
) -> (Tensor<3>, Option<Tensor<3>>) {
    match (conv, tail) {
        (Some(conv), Some(tail)) => {
            let (y, tail) = conv.forward_with_tail(x, tail);
            (activate(y, Activation::Silu), Some(tail))
        }
        (Some(conv), None) => (activate(conv.forward(x), Activation::Silu), None),
        (None, _) => (x, None),
    }
}

/// `[batch, time, heads · width]` → `[batch, heads, time, width]`.
fn split_heads(x: Tensor<3>, heads: usize) -> Tensor<4> {
    let [batch, time, width] = x.dims();
    x.reshape([batch, time, heads, width / heads]).swap_dims(1, 2)
}

/// Repeats each key/value head for the query heads of its group.
fn spread(x: Tensor<4>, heads: usize) -> Tensor<4> {
    let [batch, kv_heads, time, width] = x.dims();
    if kv_heads == heads {
        return x;
    }
    x.unsqueeze_dim::<5>(2)
        .expand([batch, kv_heads, heads / kv_heads, time, width])
        .reshape([batch, heads, time, width])
}
