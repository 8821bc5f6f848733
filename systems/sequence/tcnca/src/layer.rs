//! One layer: a mixer along the sequence, attention inside chunks, and a feed-forward map.

use burn::module::{Module, Param};
use burn::nn::Initializer;
use burn::tensor::{Bool, Device, Tensor};
use clap::ValueEnum;
use kiln_core::{Error, HostTensor, Result, TensorFile};
use kiln_nn::{Dropout, DropoutConfig, LayerNorm, LayerNormConfig, Linear};
use kiln_ops::{Activation, activate, gated};
use serde::{Deserialize, Serialize};

use crate::chunked::{BiasKind, ChunkState, ChunkedAttentionConfig, RelativeBias};
use crate::ema::{EmaState, MultiHeadEma, MultiHeadEmaConfig};
use crate::tcn::{Tcn, TcnConfig, TcnState, linear};

/// Standard deviation of the scales and biases that attention draws.
const STD: f64 = 0.02;

/// How the mixer's output is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Variant {
    /// With MEGA's gates
    #[default]
    Full,
    /// Attention over the mixer's output, without gates
    Simplified,
}

/// What mixes steps of all distances.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MixerKind {
    /// Dilated convolutions
    #[default]
    Tcn,
    /// MEGA's moving average
    Ema,
}

/// Configuration of a [`TcncaLayer`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TcncaLayerConfig {
    /// Width of the residual stream, D.
    pub dim: usize,
    /// Width of queries and keys, z.
    pub z_dim: usize,
    /// Width of values, h.
    pub h_dim: usize,
    /// Width inside the feed-forward map.
    pub ffn_dim: usize,
    /// How the mixer's output is used.
    pub variant: Variant,
    /// What mixes the steps.
    pub mixer: MixerKind,
    /// The TCN, where it is the mixer.
    pub tcn: TcnConfig,
    /// The EMA, where it is the mixer.
    pub ema: MultiHeadEmaConfig,
    /// Attention inside chunks.
    pub attention: ChunkedAttentionConfig,
    /// How its bias depends on the distance.
    pub bias: BiasKind,
    /// Share of elements that training drops after attention and inside the feed-forward map.
    pub dropout: f64,
}

impl TcncaLayerConfig {
    /// The full variant with a causal TCN and chunks of 128 steps; z is half, h and the feed-forward width twice D.
    pub fn new(dim: usize) -> Self {
        Self {
            dim,
            z_dim: dim / 2,
            h_dim: 2 * dim,
            ffn_dim: 2 * dim,
            variant: Variant::Full,
            mixer: MixerKind::Tcn,
            tcn: TcnConfig::new(dim),
            ema: MultiHeadEmaConfig::new(dim),
            attention: ChunkedAttentionConfig::new(128),
            bias: BiasKind::Rotary,
            dropout: 0.0,
        }
    }

    /// Checks that the numbers fit.
    ///
    /// # Errors
    /// Names those that do not.
    pub fn check(&self) -> Result<()> {
        let widths = [
            ("width", self.dim),
            ("z width", self.z_dim),
            ("h width", self.h_dim),
            ("feed-forward width", self.ffn_dim),
        ];
        if let Some((name, _)) = widths.into_iter().find(|(_, width)| *width == 0) {
            return Err(Error::usage(format!("the {name} is 0, must be at least 1")));
        }
        match self.bias {
            BiasKind::Rotary if !self.z_dim.is_multiple_of(2) => {
                return Err(Error::usage(format!("rotations need an even z width, not {}", self.z_dim))
                    .hint("--bias simple takes any"));
            }
            BiasKind::Simple if self.attention.chunk == 0 => {
                return Err(Error::usage("a bias for every distance needs chunks of a given length")
                    .hint("choose --chunk, or --bias rotary"));
            }
            _ => {}
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return Err(Error::usage(format!("dropout {} is not in [0, 1)", self.dropout)));
        }
        match self.mixer {
            MixerKind::Tcn => self.tcn.check(),
            MixerKind::Ema => self.ema.check(),
        }
    }

    /// Draws the parameters.
    pub fn init(&self, device: &Device) -> TcncaLayer {
        let Self { dim, z_dim, h_dim, ffn_dim, .. } = *self;
        let norm = || LayerNormConfig::new(dim).init(device);
        let normal = || Initializer::Normal { mean: 0.0, std: STD };
        let full = self.variant == Variant::Full;
        let if_full = |d_input, d_output| full.then(|| linear(d_input, d_output, device));
        let if_simplified = |d_input, d_output| (!full).then(|| linear(d_input, d_output, device));
        let rotary = || (self.bias == BiasKind::Rotary).then(|| normal().init([1, z_dim], device));
        TcncaLayer {
            norm: norm(),
            tcn: (self.mixer == MixerKind::Tcn).then(|| self.tcn.init(device)),
            ema: (self.mixer == MixerKind::Ema).then(|| self.ema.init(device)),
            v_proj: linear(dim, h_dim, device),
            mx_proj: if_full(dim, dim + z_dim + h_dim + dim),
            h_proj: if_full(h_dim, dim),
            gamma: full.then(|| normal().init([2, z_dim], device)),
            beta: full.then(|| Initializer::Zeros.init([2, z_dim], device)),
            q_proj: if_simplified(dim, z_dim),
            k_proj: if_simplified(dim, z_dim),
            o_proj: if_simplified(h_dim, dim),
            rot_alpha: rotary(),
            rot_beta: rotary(),
            rel_bias: (self.bias == BiasKind::Simple)
                .then(|| normal().init([(2 * self.attention.chunk).max(2) - 1], device)),
            ffn_norm: norm(),
            ffn1: linear(dim, ffn_dim, device),
            ffn2: linear(ffn_dim, dim, device),
            dropout: DropoutConfig::new(self.dropout).init(),
            config: *self,
        }
    }
}

/// A layer of either variant; parameters that it does not have are absent.
#[derive(Module, Debug)]
pub struct TcncaLayer {
    /// Before the mixer.
    pub norm: LayerNorm,
    /// The TCN mixer.
    pub tcn: Option<Tcn>,
    /// The EMA mixer.
    pub ema: Option<MultiHeadEma>,
    /// D to h: values.
    pub v_proj: Linear,
    /// Full: D to the update gate (D), z and the output gate r (z + h), and s (D).
    pub mx_proj: Option<Linear>,
    /// Full: h to D.
    pub h_proj: Option<Linear>,
    /// Full: scales of queries and keys, `[2, z]`
    pub gamma: Option<Param<Tensor<2>>>,
    /// Full: shifts of queries and keys, `[2, z]`
    pub beta: Option<Param<Tensor<2>>>,
    /// Simplified: D to z, queries.
    pub q_proj: Option<Linear>,
    /// Simplified: D to z, keys.
    pub k_proj: Option<Linear>,
    /// Simplified: h to D.
    pub o_proj: Option<Linear>,
    /// α of the rotary bias, `[1, z]`
    pub rot_alpha: Option<Param<Tensor<2>>>,
    /// β of the rotary bias, `[1, z]`
    pub rot_beta: Option<Param<Tensor<2>>>,
    /// The bias of every distance, `[2 C - 1]`
    pub rel_bias: Option<Param<Tensor<1>>>,
    /// Before the feed-forward map.
    pub ffn_norm: LayerNorm,
    /// D to the feed-forward width.
    pub ffn1: Linear,
    /// The feed-forward width to D.
    pub ffn2: Linear,
    /// Of attention's output and inside the feed-forward map.
    pub dropout: Dropout,
    #[module(skip)]
    config: TcncaLayerConfig,
}

/// Which steps of a batch are no padding.
#[derive(Debug, Clone)]
pub struct Kept {
    /// True for steps, `[batch, time]`
    pub steps: Tensor<2, Bool>,
    /// 1 for steps and 0 for padding, `[batch, time, 1]`
    pub factor: Tensor<3>,
}

impl Kept {
    /// From what is true for steps and false for padding, `[batch, time]`.
    pub fn new(steps: Tensor<2, Bool>) -> Self {
        Self { factor: steps.clone().float().unsqueeze_dim(2), steps }
    }
}

/// What a causal layer remembers.
#[derive(Debug, Clone)]
pub struct LayerState {
    mixer: MixerState,
    chunk: Option<ChunkState>,
}

#[derive(Debug, Clone)]
#[allow(clippy::large_enum_variant)]
enum MixerState {
    Tcn(TcnState),
    Ema(EmaState),
}

const VARIANT: &str = "a layer has the parameters of its variant";
const MIXER: &str = "a layer has the mixer of its configuration";

impl TcncaLayer {
    /// The configuration it was made with.
    pub fn config(&self) -> &TcncaLayerConfig {
        &self.config
    }

    /// The layer on whole sequences; nothing that is kept depends on padding.
    ///
    /// # Shapes
    /// - x, output: `[batch, time, D]`
    pub fn forward(&self, x: Tensor<3>, kept: Option<&Kept>) -> Tensor<3> {
        let factor = kept.map(|kept| &kept.factor);
        let mix = |y| match self.config.mixer {
            MixerKind::Tcn => self.tcn.as_ref().expect(MIXER).forward(y, factor),
            MixerKind::Ema => self.ema.as_ref().expect(MIXER).forward(y, factor),
        };
        let steps = kept.map(|kept| &kept.steps);
        self.combine(x, mix, |q, k, v| self.config.attention.forward(q, k, v, &self.relative_bias(), steps))
    }

    /// As [`forward`](Self::forward), continuing from `state`; only causal layers can.
    pub fn forward_with_state(&self, x: Tensor<3>, state: LayerState) -> (Tensor<3>, LayerState) {
        let LayerState { mut mixer, mut chunk } = state;
        let mix = |y| match &mut mixer {
            MixerState::Tcn(state) => {
                let tcn = self.tcn.as_ref().expect(MIXER);
                let (m, next) = tcn.forward_with_state(y, std::mem::take(state));
                *state = next;
                m
            }
            MixerState::Ema(state) => {
                let (m, next) = self.ema.as_ref().expect(MIXER).forward_with_state(y, state.clone());
                *state = next;
                m
            }
        };
        let attend = |q, k, v| {
            let attention = &self.config.attention;
            let (a, next) = attention.forward_with_state(q, k, v, &self.relative_bias(), chunk.take());
            chunk = next;
            a
        };
        let x = self.combine(x, mix, attend);
        (x, LayerState { mixer, chunk })
    }

    /// The state before a sequence.
    pub fn initial_state(&self, batch: usize, device: &Device) -> LayerState {
        let mixer = match self.config.mixer {
            MixerKind::Tcn => MixerState::Tcn(self.tcn.as_ref().expect(MIXER).initial_state(batch, device)),
            MixerKind::Ema => MixerState::Ema(self.ema.as_ref().expect(MIXER).initial_state(batch, device)),
        };
        LayerState { mixer, chunk: None }
    }

    /// Names the tensors of a state.
    pub(crate) fn state_to_tensors(state: LayerState) -> TensorFile {
        let mut file = TensorFile::new();
        let mut insert = |name: String, tensor| file.insert(name, HostTensor::from_tensor(tensor));
        match state.mixer {
            MixerState::Tcn(blocks) => {
                blocks.into_iter().enumerate().for_each(|(b, before)| insert(format!("tcn.{b}"), before));
            }
            MixerState::Ema(EmaState { h, past }) => {
                insert("ema.h".into(), h);
                past.into_iter().for_each(|past| insert("ema.past".into(), past));
            }
        }
        if let Some(ChunkState { keys, values }) = state.chunk {
            insert("chunk.keys".into(), keys);
            insert("chunk.values".into(), values);
        }
        file
    }

    /// Takes a state out of a file.
    ///
    /// # Errors
    /// When a tensor is missing or does not fit this layer.
    pub(crate) fn state_from_tensors(&self, file: &mut TensorFile, device: &Device) -> Result<LayerState> {
        let mut state = self.initial_state(1, device);
        match &mut state.mixer {
            MixerState::Tcn(blocks) => {
                for (b, before) in blocks.iter_mut().enumerate() {
                    *before = file.take_shaped(&format!("tcn.{b}"), before.dims(), device)?;
                }
            }
            MixerState::Ema(EmaState { h, past }) => {
                *h = file.take_shaped("ema.h", h.dims(), device)?;
                if let Some(past) = past {
                    *past = file.take_shaped("ema.past", past.dims(), device)?;
                }
            }
        }
        if let Some(steps) = file.get("chunk.keys").and_then(|keys| keys.shape.get(1).copied()) {
            if self.config.attention.chunk > 0 && steps >= self.config.attention.chunk {
                let found =
                    format!("a state of {steps} steps, but a chunk has {}", self.config.attention.chunk);
                return Err(Error::input(file.source().display(), found));
            }
            state.chunk = Some(ChunkState {
                keys: file.take_shaped("chunk.keys", [1, steps, self.config.z_dim], device)?,
                values: file.take_shaped("chunk.values", [1, steps, self.config.h_dim], device)?,
            });
        }
        Ok(state)
    }

    fn combine(
        &self,
        x: Tensor<3>,
        mix: impl FnOnce(Tensor<3>) -> Tensor<3>,
        attend: impl FnOnce(Tensor<3>, Tensor<3>, Tensor<3>) -> Tensor<3>,
    ) -> Tensor<3> {
        let y = self.norm.forward(x.clone());
        let x = match self.config.variant {
            Variant::Full => self.full(x, y, mix, attend),
            Variant::Simplified => self.simplified(x, y, mix, attend),
        };
        let hidden = self.ffn1.forward_activated(self.ffn_norm.forward(x.clone()), Activation::Silu);
        x + self.ffn2.forward(self.dropout.forward(hidden))
    }

    /// ```text
    /// v = silu(W_v y)        m = mixer(y)        [u | z r | s] = W_mx m
    /// q, k = γ ⊙ silu(z) + β        c = silu(s + W_h (attention(q, k, v) ⊙ silu(r)))
    /// x' = x + σ(u) ⊙ (c - x)
    /// ```
    fn full(
        &self,
        x: Tensor<3>,
        y: Tensor<3>,
        mix: impl FnOnce(Tensor<3>) -> Tensor<3>,
        attend: impl FnOnce(Tensor<3>, Tensor<3>, Tensor<3>) -> Tensor<3>,
    ) -> Tensor<3> {
        let TcncaLayerConfig { dim, z_dim, h_dim, .. } = self.config;
        let v = self.v_proj.forward_activated(y.clone(), Activation::Silu);
        let m = mix(y);
        let mx_proj = self.mx_proj.as_ref().expect(VARIANT);
        let (weight, bias) = (mx_proj.weight.val(), mx_proj.bias.as_ref().expect(VARIANT).val());
        // Parts of the weight cost less than parts of the product.
        let part = |start, width, activation| {
            let (weight, bias) =
                (weight.clone().narrow(1, start, width), bias.clone().narrow(0, start, width));
            kiln_ops::linear(m.clone(), weight, Some(bias), activation)
        };
        let z = part(dim, z_dim, Activation::Silu);
        let (gamma, beta) =
            (self.gamma.as_ref().expect(VARIANT).val(), self.beta.as_ref().expect(VARIANT).val());
        let [q, k] = [0, 1].map(|row| {
            let of = |x: &Tensor<2>| x.clone().narrow(0, row, 1).unsqueeze::<3>();
            z.clone() * of(&gamma) + of(&beta)
        });
        let a = gated(part(dim + z_dim, h_dim, Activation::Identity), attend(q, k, v), Activation::Silu);
        let s = part(dim + z_dim + h_dim, dim, Activation::Identity);
        let c = activate(s + self.h_proj.as_ref().expect(VARIANT).forward(a), Activation::Silu);
        let c = self.dropout.forward(c);
        x.clone() + gated(part(0, dim, Activation::Identity), c - x, Activation::Sigmoid)
    }

    /// `m = mixer(y)`, `x' = x + W_o attention(W_q m, W_k m, W_v m)`
    fn simplified(
        &self,
        x: Tensor<3>,
        y: Tensor<3>,
        mix: impl FnOnce(Tensor<3>) -> Tensor<3>,
        attend: impl FnOnce(Tensor<3>, Tensor<3>, Tensor<3>) -> Tensor<3>,
    ) -> Tensor<3> {
        let m = mix(y);
        let project = |proj: &Option<Linear>| proj.as_ref().expect(VARIANT).forward(m.clone());
        let a = attend(project(&self.q_proj), project(&self.k_proj), self.v_proj.forward(m.clone()));
        x + self.dropout.forward(self.o_proj.as_ref().expect(VARIANT).forward(a))
    }

    fn relative_bias(&self) -> RelativeBias {
        match (&self.rot_alpha, &self.rot_beta, &self.rel_bias) {
            (Some(alpha), Some(beta), _) => RelativeBias::Rotary { alpha: alpha.val(), beta: beta.val() },
            (_, _, Some(table)) => RelativeBias::Simple(table.val()),
            _ => unreachable!("a layer has the bias of its configuration"),
        }
    }
}
