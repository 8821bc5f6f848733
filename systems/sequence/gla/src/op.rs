//! The operator `o = GLA(q, k, v, g)` in its three exact forms, as differentiable Burn operations.
//!
//! Per head, with state `S_t [key, value]` and log decay `g_t = ln α_t ≤ 0` per key channel (paper Eq. 3):
//!
//! ```text
//! S_t = diag(exp g_t) S_{t-1} + k_t v_tᵀ        o_t = (K^-1/2 q_t)ᵀ S_t
//! ```
//!
//! All tensors of the public functions are `[batch, heads, time, key]` (q, k, g) or
//! `[batch, heads, time, value]` (v, o); states are `[batch, heads, key, value]`.

use std::sync::Arc;

use burn::backend::TensorMetadata;
use burn::tensor::{Device, Tensor};
use burn_flex::FlexTensor;
use kiln_core::{Error, Result};
use kiln_ops::flex::{floats, tensor};
use kiln_ops::{Function, apply, runs_natively};

use crate::kernel::{self, Blocks, Dims, Inputs, Segment, States};

/// How the chunkwise form cuts the sequence; results differ between settings only by rounding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GlaOpConfig {
    /// Rows per chunk, C.
    pub chunk: usize,
    /// Rows per sub-block inside a chunk, c; divides `chunk`.
    pub sub_chunk: usize,
    /// Whether the backward pass recomputes the chunk states instead of keeping them: memory
    /// O(T (K + V)) instead of O(T (K + V) + T/C · K V), for one more pass over k and v.
    pub recompute: bool,
}

impl Default for GlaOpConfig {
    fn default() -> Self {
        Self { chunk: 64, sub_chunk: 16, recompute: false }
    }
}

impl GlaOpConfig {
    /// Checks that sub-blocks fill a chunk.
    ///
    /// # Errors
    /// When a size is 0 or `sub_chunk` does not divide `chunk`.
    pub fn check(&self) -> Result<()> {
        if self.chunk == 0 || self.sub_chunk == 0 || !self.chunk.is_multiple_of(self.sub_chunk) {
            return Err(Error::usage(format!(
                "a chunk of {} rows cannot be cut into sub-blocks of {}",
                self.chunk, self.sub_chunk
            ))
            .hint("choose --chunk as a multiple of --sub-chunk, for example 64 and 16"));
        }
        Ok(())
    }

    fn blocks(&self) -> Blocks {
        Blocks { chunk: self.chunk, sub_chunk: self.sub_chunk }
    }
}

/// The token-by-token form: the definition, O(T K V) work in T sequential steps.
///
/// Returns o and the final state.
pub fn gla_recurrent(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    g: Tensor<4>,
    initial: Option<Tensor<4>>,
) -> (Tensor<4>, Tensor<4>) {
    let [batch, heads, time, key] = q.dims();
    let value = v.dims()[3];
    let mut state = initial.unwrap_or_else(|| Tensor::zeros([batch, heads, key, value], &q.device()));
    let q = q.mul_scalar((key as f64).powf(-0.5));
    let row =
        |x: &Tensor<4>, t: usize, width: usize| x.clone().slice([0..batch, 0..heads, t..t + 1, 0..width]);
    let mut rows = Vec::with_capacity(time);
    for t in 0..time {
        let decay = row(&g, t, key).exp().swap_dims(2, 3); // [batch, heads, key, 1]
        let k_t = row(&k, t, key).swap_dims(2, 3);
        state = decay * state + k_t.matmul(row(&v, t, value));
        rows.push(row(&q, t, key).matmul(state.clone()));
    }
    (Tensor::cat(rows, 2), state)
}

/// The parallel form in log space: O(T² K) work and memory, for short sequences and as a reference.
///
/// `o_t = Σ_{s ≤ t} Σ_c q_tc k_sc exp(b_tc - b_sc) v_s` with `b` the running sum of `g`; what lies above the
/// diagonal is set to -∞ before the exponential. Returns o and the final state.
pub fn gla_parallel(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    g: Tensor<4>,
    initial: Option<Tensor<4>>,
) -> (Tensor<4>, Tensor<4>) {
    let [batch, heads, time, key] = q.dims();
    let device = q.device();
    let q = q.mul_scalar((key as f64).powf(-0.5));
    let b = g.cumsum(2);
    let exponents = b.clone().unsqueeze_dim::<5>(3) - b.clone().unsqueeze_dim::<5>(2); // [batch, heads, t, s, key]
    let above = Tensor::<2, burn::tensor::Bool>::tril_mask([time, time], 0, &device)
        .reshape([1, 1, time, time, 1])
        .expand([batch, heads, time, time, key]);
    let weights = exponents.mask_fill(above, f32::NEG_INFINITY).exp();
    let scores = (q.clone().unsqueeze_dim::<5>(3) * k.clone().unsqueeze_dim::<5>(2) * weights).sum_dim(4);
    let mut o = scores.squeeze_dim::<4>(4).matmul(v.clone());
    let end = b.clone().slice([0..batch, 0..heads, time - 1..time, 0..key]);
    let mut state = (k * (end.clone() - b.clone()).exp()).swap_dims(2, 3).matmul(v);
    if let Some(initial) = initial {
        o = o + (q * b.exp()).matmul(initial.clone());
        state = state + end.exp().swap_dims(2, 3) * initial;
    }
    (o, state)
}

/// The chunkwise form: the training path. O(T C (K + V) + T K V) work in parallel over chunks.
pub fn gla_chunk(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    g: Tensor<4>,
    initial: Option<Tensor<4>>,
    config: GlaOpConfig,
) -> Tensor<4> {
    if !runs_natively(&q) {
        return gla_chunk_composed(q, k, v, g, initial, config).0;
    }
    let [batch, _, time, _] = q.dims();
    let segments = (0..batch).map(|row| Segment { start: row * time, len: time }).collect();
    let o = chunk_on_cpu(q, k, v, g, initial, ChunkForm { segments, config, with_state: false });
    Tensor::<4>::from_dispatch(o).swap_dims(1, 2)
}

/// The chunkwise form with the final state, for sequences that come in pieces.
pub fn gla_chunk_with_state(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    g: Tensor<4>,
    initial: Option<Tensor<4>>,
    config: GlaOpConfig,
) -> (Tensor<4>, Tensor<4>) {
    if !runs_natively(&q) {
        return gla_chunk_composed(q, k, v, g, initial, config);
    }
    let [batch, heads, time, key] = q.dims();
    let value = v.dims()[3];
    let segments = (0..batch).map(|row| Segment { start: row * time, len: time }).collect();
    let packed = chunk_on_cpu(q, k, v, g, initial, ChunkForm { segments, config, with_state: true });
    let packed = Tensor::<1>::from_dispatch(packed);
    let outputs = batch * time * heads * value;
    let states = batch * heads * key * value;
    let o = packed.clone().narrow(0, 0, outputs).reshape([batch, time, heads, value]).swap_dims(1, 2);
    (o, packed.narrow(0, outputs, states).reshape([batch, heads, key, value]))
}

/// The chunkwise form over documents packed into one row: the state is zero at the start of each.
///
/// `offsets` are the starts of the documents followed by the length of the row (`cu_seqlens`), for tensors
/// with batch 1.
///
/// # Panics
/// When the batch is not 1 or the offsets do not rise from 0 to the length.
pub fn gla_chunk_packed(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    g: Tensor<4>,
    offsets: &[usize],
    config: GlaOpConfig,
) -> Tensor<4> {
    let [batch, _, time, _] = q.dims();
    assert_eq!(batch, 1, "packed documents lie in one batch row");
    assert!(
        offsets.first() == Some(&0) && offsets.last() == Some(&time) && offsets.is_sorted_by(|a, b| a < b),
        "document offsets must rise from 0 to the length {time}"
    );
    let documents = offsets.windows(2).map(|pair| pair[0]..pair[1]);
    if !runs_natively(&q) {
        let part = |x: &Tensor<4>, at: &std::ops::Range<usize>| x.clone().slice_dim(2, at.clone());
        let parts = documents.map(|at| {
            gla_chunk_composed(part(&q, &at), part(&k, &at), part(&v, &at), part(&g, &at), None, config).0
        });
        return Tensor::cat(parts.collect(), 2);
    }
    let segments = documents.map(|at| Segment { start: at.start, len: at.len() }).collect();
    let o = chunk_on_cpu(q, k, v, g, None, ChunkForm { segments, config, with_state: false });
    Tensor::<4>::from_dispatch(o).swap_dims(1, 2)
}

/// The chunkwise form out of Burn's own operations, for devices without a kernel and for capture:
/// the parallel form inside sub-blocks, the recurrence between them.
pub fn gla_chunk_composed(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    g: Tensor<4>,
    initial: Option<Tensor<4>>,
    config: GlaOpConfig,
) -> (Tensor<4>, Tensor<4>) {
    let [_, _, time, _] = q.dims();
    let mut state = initial;
    let mut blocks = Vec::with_capacity(time.div_ceil(config.sub_chunk));
    for start in (0..time).step_by(config.sub_chunk) {
        let rows = start..time.min(start + config.sub_chunk);
        let block = |x: &Tensor<4>| x.clone().slice_dim(2, rows.clone());
        let (o, end) = gla_parallel(block(&q), block(&k), block(&v), block(&g), state);
        blocks.push(o);
        state = Some(end);
    }
    let state = state.expect("a sequence has at least one row");
    (Tensor::cat(blocks, 2), state)
}

/// Calls the CPU kernel on `[batch, heads, time, ..]` tensors, whose memory the projections left time-major.
fn chunk_on_cpu(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    g: Tensor<4>,
    initial: Option<Tensor<4>>,
    call: ChunkForm,
) -> burn::tensor::DispatchTensor {
    let [_, heads, _, key] = q.dims();
    let value = v.dims()[3];
    let initial =
        initial.unwrap_or_else(|| Tensor::zeros([call.segments.len(), heads, key, value], &q.device()));
    let [q, k, v, g] = [q, k, v, g].map(|x| x.swap_dims(1, 2).into_dispatch());
    apply(&call, [q, k, v, g, initial.into_dispatch()])
}

/// The chunkwise form on the CPU, of q, k, g `[batch, time, heads, key]`, v `[batch, time, heads, value]` and the
/// initial states `[segments, heads, key, value]`; its result is o `[batch, time, heads, value]`, or o and
/// the final states, flat.
#[derive(Clone, Debug)]
struct ChunkForm {
    segments: Vec<Segment>,
    config: GlaOpConfig,
    /// Whether the output is followed by the final states.
    with_state: bool,
}

/// What the backward pass keeps: the inputs, and the chunk states unless they are recomputed.
#[derive(Clone)]
struct Saved {
    inputs: [FlexTensor; 5],
    states: Option<Arc<States>>,
}

fn dims([q, _, v, _, _]: &[FlexTensor; 5]) -> Dims {
    let (q, v) = (q.shape(), v.shape());
    Dims { batch: q[0], time: q[1], heads: q[2], key: q[3], value: v[3] }
}

impl Function<5> for ChunkForm {
    type Saved = Saved;

    fn forward(&self, inputs: [FlexTensor; 5]) -> (FlexTensor, Saved) {
        let dims = dims(&inputs);
        let data = inputs.each_ref().map(floats);
        let x = Inputs { q: &data[0], k: &data[1], v: &data[2], g: &data[3], initial: &data[4] };
        let blocks = self.config.blocks();
        let states = kernel::states(dims, blocks, &self.segments, x);
        let mut o = kernel::outputs(dims, blocks, &self.segments, x, &states);
        let output = if self.with_state {
            o.extend_from_slice(&states.finals);
            let len = o.len();
            tensor(o, [len])
        } else {
            tensor(o, [dims.batch, dims.time, dims.heads, dims.value])
        };
        drop(data);
        let states = (!self.config.recompute).then(|| Arc::new(states));
        (output, Saved { inputs, states })
    }

    fn backward(
        &self,
        Saved { inputs, states }: Saved,
        upstream: FlexTensor,
        _: [bool; 5],
    ) -> [Option<FlexTensor>; 5] {
        let dims = dims(&inputs);
        let data = inputs.each_ref().map(floats);
        let x = Inputs { q: &data[0], k: &data[1], v: &data[2], g: &data[3], initial: &data[4] };
        let blocks = self.config.blocks();
        let states = states.unwrap_or_else(|| Arc::new(kernel::states(dims, blocks, &self.segments, x)));

        let upstream = floats(&upstream);
        let (d_o, d_finals) = upstream.split_at(dims.batch * dims.time * dims.heads * dims.value);
        let zeros = if self.with_state { Vec::new() } else { vec![0.0; states.finals.len()] };
        let d_finals = if self.with_state { d_finals } else { &zeros };
        let d = kernel::backward(dims, blocks, &self.segments, x, &states, d_o, d_finals);

        let gradients = [d.q, d.k, d.v, d.g, d.initial];
        let mut shapes = inputs.iter().map(|input| input.shape());
        gradients.map(|gradient| shapes.next().map(|shape| tensor(gradient, shape)))
    }
}

/// Checks that log decays from outside are what they must be.
///
/// # Errors
/// Names the first element that is positive or not a number.
pub fn check_log_decays(g: &[f32], place: &str) -> Result<()> {
    match g.iter().position(|&g| g.is_nan() || g > 0.0) {
        Some(at) => Err(Error::input(place, format!("element {at} of \"g\" is {}, must be ≤ 0", g[at]))
            .hint("g is the logarithm of a decay in (0, 1]")),
        None => Ok(()),
    }
}

/// Zeros for a state.
pub fn zero_state(batch: usize, heads: usize, key: usize, value: usize, device: &Device) -> Tensor<4> {
    Tensor::zeros([batch, heads, key, value], device)
}
