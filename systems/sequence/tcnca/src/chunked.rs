//! Attention inside chunks of the sequence, at a cost that grows linearly with the length.
//!
//! ```text
//! a_i = Σ_j w(q_i · k_j / √z + bias(i, j)) v_j        j in the chunk of i, and not after i where causal
//! ```
//!
//! The last chunk may be shorter and is computed at its own length. What lies in other chunks is reached through the mixer
//! alone.

use std::ops::Range;

use burn::tensor::{Bool, Device, Int, Tensor, TensorData};
use clap::ValueEnum;
use kiln_ops::{AttentionOptions, attention, matmul};
use serde::{Deserialize, Serialize};

/// How scores become weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AttentionFunction {
    /// They sum to 1
    #[default]
    Softmax,
    /// Each by itself, as the distribution function of a Gaussian: MEGA's choice for long-range classification
    Laplace,
}

/// How the bias depends on the distance of query and key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BiasKind {
    /// Two vectors, rotated by the positions
    #[default]
    Rotary,
    /// A number for every distance
    Simple,
}

/// Mean and deviation of the Laplace function (MEGA, Eq. 16): `√½` and `√(1 / 4π)`.
const LAPLACE: (f64, f64) = (std::f64::consts::FRAC_1_SQRT_2, 0.282_095);

/// Configuration of attention inside chunks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkedAttentionConfig {
    /// Steps of a chunk, C; 0 takes the whole sequence as one.
    pub chunk: usize,
    /// Whether a step sees only those up to itself.
    pub causal: bool,
    /// How scores become weights.
    pub function: AttentionFunction,
}

/// What is added to the score of positions `i` and `j` of a chunk.
#[derive(Debug, Clone)]
#[allow(clippy::large_enum_variant)]
pub enum RelativeBias {
    /// `⟨rot_i α, rot_j β⟩`, where a rotation turns entry `c` and `c + z/2` by the angle `position · 10000^(-2c/z)`;
    /// vectors `[1, z]`.
    Rotary {
        /// α
        alpha: Tensor<2>,
        /// β
        beta: Tensor<2>,
    },
    /// Entry `(len - 1) / 2 + j - i` of a table `[2 C - 1]`.
    Simple(Tensor<1>),
}

impl RelativeBias {
    /// The bias of positions `queries` with `keys`.
    pub fn matrix(&self, queries: Range<usize>, keys: Range<usize>) -> Tensor<2> {
        match self {
            Self::Rotary { alpha, beta } => {
                rotated(alpha.clone(), queries).matmul(rotated(beta.clone(), keys).transpose())
            }
            Self::Simple(table) => {
                let centre = (table.dims()[0] - 1) / 2;
                let (rows, columns) = (queries.len(), keys.len());
                let entry = |i: usize| keys.clone().map(move |j| (centre + j - i) as i64);
                let entries: Vec<i64> = queries.flat_map(entry).collect();
                let entries =
                    Tensor::<1, Int>::from_data(TensorData::new(entries, [rows * columns]), &table.device());
                table.clone().select(0, entries).reshape([rows, columns])
            }
        }
    }
}

/// A vector `[1, z]` rotated by every position, `[positions, z]`.
fn rotated(vector: Tensor<2>, positions: Range<usize>) -> Tensor<2> {
    let half = vector.dims()[1] / 2;
    let angle = |position: usize, c: usize| position as f64 * 10_000f64.powf(-(c as f64) / half as f64);
    let waves = |wave: fn(f64) -> f64| {
        let values: Vec<f32> =
            positions.clone().flat_map(|p| (0..half).map(move |c| wave(angle(p, c)) as f32)).collect();
        Tensor::<2>::from_data(TensorData::new(values, [positions.len(), half]), &vector.device())
    };
    let (cos, sin) = (waves(f64::cos), waves(f64::sin));
    let (first, second) = (vector.clone().narrow(1, 0, half), vector.narrow(1, half, half));
    Tensor::cat(
        vec![first.clone() * cos.clone() - second.clone() * sin.clone(), second * cos + first * sin],
        1,
    )
}

/// Keys `[batch, steps, z]` and values `[batch, steps, h]` of the chunk that is being read.
#[derive(Debug, Clone)]
pub struct ChunkState {
    pub(crate) keys: Tensor<3>,
    pub(crate) values: Tensor<3>,
}

impl ChunkedAttentionConfig {
    /// Causal softmax attention in chunks of so many steps.
    pub fn new(chunk: usize) -> Self {
        Self { chunk, causal: true, function: AttentionFunction::Softmax }
    }

    /// Steps of a chunk in a sequence of so many.
    fn chunk_of(&self, time: usize) -> usize {
        if self.chunk == 0 { time } else { self.chunk }
    }

    /// Attention of whole sequences. `kept [batch, time]` is true for steps and false for padding.
    ///
    /// # Shapes
    /// - q, k: `[batch, time, z]`
    /// - v, output: `[batch, time, h]`
    pub fn forward(
        &self,
        q: Tensor<3>,
        k: Tensor<3>,
        v: Tensor<3>,
        bias: &RelativeBias,
        kept: Option<&Tensor<2, Bool>>,
    ) -> Tensor<3> {
        let [_, time, _] = q.dims();
        let chunk = self.chunk_of(time);
        let whole = time - time % chunk.max(1);
        let part = |start: usize, steps: usize| {
            let of = |x: &Tensor<3>| x.clone().narrow(1, start, steps);
            let kept = kept.map(|kept| kept.clone().narrow(1, start, steps));
            self.in_chunks([of(&q), of(&k), of(&v)], chunk.min(steps), bias, kept)
        };
        match (whole, time - whole) {
            (_, 0) => self.in_chunks([q, k, v], chunk, bias, kept.cloned()),
            (0, rest) => part(0, rest),
            (whole, rest) => Tensor::cat(vec![part(0, whole), part(whole, rest)], 1),
        }
    }

    /// Attention of steps that fill chunks of the given length.
    fn in_chunks(
        &self,
        qkv: [Tensor<3>; 3],
        chunk: usize,
        bias: &RelativeBias,
        kept: Option<Tensor<2, Bool>>,
    ) -> Tensor<3> {
        let [batch, time, _] = qkv[0].dims();
        let chunks = batch * time / chunk;
        let [q, k, v] = qkv.map(|x| {
            let width = x.dims()[2];
            x.reshape([chunks, chunk, width])
        });
        let kept = kept.map(|kept| kept.reshape([chunks, chunk]));
        let a = self.attend(q, k, v, bias, kept);
        let width = a.dims()[2];
        a.reshape([batch, time, width])
    }

    /// As [`forward`](Self::forward), continuing a chunk of which `state` has been read; only causal attention can.
    pub fn forward_with_state(
        &self,
        q: Tensor<3>,
        k: Tensor<3>,
        v: Tensor<3>,
        bias: &RelativeBias,
        state: Option<ChunkState>,
    ) -> (Tensor<3>, Option<ChunkState>) {
        let [_, time, _] = q.dims();
        let read = state.as_ref().map_or(0, |state| state.keys.dims()[1]);
        let chunk = self.chunk_of(read + time);
        let mut outputs = Vec::new();
        // The chunk that was begun before.
        let first = time.min(chunk - read);
        let (mut keys, mut values) = (k.clone().narrow(1, 0, first), v.clone().narrow(1, 0, first));
        if let Some(state) = state {
            keys = Tensor::cat(vec![state.keys, keys], 1);
            values = Tensor::cat(vec![state.values, values], 1);
        }
        outputs.push(self.attend(q.clone().narrow(1, 0, first), keys.clone(), values.clone(), bias, None));
        let mut state = (self.chunk == 0 || read + first < chunk).then_some(ChunkState { keys, values });
        // Chunks that lie in this piece.
        if first < time {
            let part = |x: Tensor<3>, start: usize| x.narrow(1, start, time - start);
            outputs.push(self.forward(
                part(q, first),
                part(k.clone(), first),
                part(v.clone(), first),
                bias,
                None,
            ));
            let begun = (time - first) % chunk;
            state = (begun > 0)
                .then(|| ChunkState { keys: part(k, time - begun), values: part(v, time - begun) });
        }
        (Tensor::cat(outputs, 1), state)
    }

    /// Attention inside one chunk; the queries are its last steps.
    ///
    /// # Shapes
    /// - q: `[chunks, queries, z]`; k: `[chunks, steps, z]`; v: `[chunks, steps, h]`
    /// - kept: `[chunks, steps]`
    /// - output: `[chunks, queries, h]`
    fn attend(
        &self,
        q: Tensor<3>,
        k: Tensor<3>,
        v: Tensor<3>,
        bias: &RelativeBias,
        kept: Option<Tensor<2, Bool>>,
    ) -> Tensor<3> {
        let ([_, queries, z], [chunks, steps, _]) = (q.dims(), k.dims());
        let places = steps - queries..steps;
        if self.function == AttentionFunction::Laplace {
            return self.laplace(q, k, v, bias.matrix(places, 0..steps), kept);
        }
        let scale = (z as f64).powf(-0.5);
        let hidden = kept.map(|kept| kept.bool_not().reshape([chunks, 1, 1, steps]));
        let heads = |x: Tensor<3>| x.unsqueeze_dim::<4>(1);
        let options = AttentionOptions { causal: self.causal, mask: hidden, ..AttentionOptions::default() };
        let a = match bias {
            // A product of vectors like the score itself: both in one product, and no matrix of biases.
            RelativeBias::Rotary { alpha, beta } => {
                let beside = |x: Tensor<3>, vector: Tensor<2>| {
                    let [chunks, steps, z] = x.dims();
                    Tensor::cat(vec![x, vector.unsqueeze::<3>().expand([chunks, steps, z])], 2)
                };
                let q = beside(q * scale, rotated(alpha.clone(), places));
                let k = beside(k, rotated(beta.clone(), 0..steps));
                attention(heads(q), heads(k), heads(v), AttentionOptions { scale: Some(1.0), ..options })
            }
            RelativeBias::Simple(_) => {
                let bias = bias.matrix(places, 0..steps).unsqueeze::<4>();
                let options = AttentionOptions { scale: Some(scale), bias: Some(bias), ..options };
                attention(heads(q), heads(k), heads(v), options)
            }
        };
        a.squeeze_dim(1)
    }

    /// Weights `½ (1 + erf((s - μ) / (σ √2)))` of the scores `s = q k / visible + bias`.
    fn laplace(
        &self,
        q: Tensor<3>,
        k: Tensor<3>,
        v: Tensor<3>,
        bias: Tensor<2>,
        kept: Option<Tensor<2, Bool>>,
    ) -> Tensor<3> {
        let ([chunks, queries, _], [_, steps, _]) = (q.dims(), k.dims());
        // [chunks or 1, queries or 1, steps]
        let mut seen = Tensor::<3>::ones([1, 1, steps], &q.device());
        if self.causal {
            seen = seen * causal_mask(queries, steps, &q.device());
        }
        if let Some(kept) = kept {
            seen = seen * kept.float().reshape([chunks, 1, steps]);
        }
        let visible = seen.clone().sum_dim(2).clamp_min(1.0);
        let scores = matmul(q, k.transpose()) / visible + bias.unsqueeze::<3>();
        let (mean, deviation) = LAPLACE;
        let weights = ((scores - mean) / (deviation * std::f64::consts::SQRT_2)).erf() * 0.5 + 0.5;
        matmul(weights * seen, v)
    }
}

/// 1 where one of the last `queries` of `steps` sees a step, `[1, queries, steps]`.
fn causal_mask(queries: usize, steps: usize, device: &Device) -> Tensor<3> {
    let seen = |i: usize| (0..steps).map(move |j| if j <= steps - queries + i { 1.0f32 } else { 0.0 });
    let values: Vec<f32> = (0..queries).flat_map(seen).collect();
    Tensor::from_data(TensorData::new(values, [1, queries, steps]), device)
}
