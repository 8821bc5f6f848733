//! The chunkwise block-parallel form on the CPU (paper §4.2–4.4), forward and backward, over slices.
//!
//! Everything is laid out time-major, as the projections produce it: q, k, g `[batch, time, heads, key]`,
//! v and o `[batch, time, heads, value]`, states `[.., heads, key, value]`. A row of time then belongs to
//! one chunk whole, so chunks run in parallel without sharing anything.
//!
//! One pass has three steps: what each chunk adds to the state (parallel), the state at the start of each
//! chunk (a short scan), and the outputs (parallel). The backward pass mirrors it and recomputes the rest.
//! Only log decays enter, and every exponent is a sum of log decays over a stretch of time, hence ≤ 0:
//! nothing can overflow, and what underflows is truly negligible.

use kiln_ops::gemm::{Mat, Out, gemm};
use kiln_ops::simd;
use kiln_ops::vector::{axpy, dot, exp, fma};
use rayon::prelude::*;

/// Extents of one call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Dims {
    pub batch: usize,
    pub time: usize,
    pub heads: usize,
    pub key: usize,
    pub value: usize,
}

impl Dims {
    /// Elements of one state over all heads.
    pub fn state(&self) -> usize {
        self.heads * self.key * self.value
    }

    /// The query scale K^-1/2.
    fn scale(&self) -> f32 {
        1.0 / (self.key as f32).sqrt()
    }
}

/// A stretch of rows that starts from a state of its own: a batch row, or a document packed into one.
///
/// Rows count through the whole batch, so row `b * time + t` is step `t` of batch row `b`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Segment {
    pub start: usize,
    pub len: usize,
}

/// The sizes of chunks and of the sub-blocks inside them (paper §4.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Blocks {
    pub chunk: usize,
    pub sub_chunk: usize,
}

/// q, k, v and log decays g of one call.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Inputs<'a> {
    pub q: &'a [f32],
    pub k: &'a [f32],
    pub v: &'a [f32],
    pub g: &'a [f32],
    /// The state each segment starts from, `[segments, heads, key, value]`.
    pub initial: &'a [f32],
}

/// The states around every chunk: what the backward pass keeps.
#[derive(Debug, Clone)]
pub(crate) struct States {
    /// At the start of each chunk, `[chunks, heads, key, value]`.
    starts: Vec<f32>,
    /// At the end of each segment, `[segments, heads, key, value]`.
    pub finals: Vec<f32>,
}

/// Gradients with respect to [`Inputs`].
pub(crate) struct Gradients {
    pub q: Vec<f32>,
    pub k: Vec<f32>,
    pub v: Vec<f32>,
    pub g: Vec<f32>,
    pub initial: Vec<f32>,
}

/// The states at all chunk boundaries: the first two steps of the forward pass.
pub(crate) fn states(dims: Dims, blocks: Blocks, segments: &[Segment], x: Inputs<'_>) -> States {
    let chunks = split_into_chunks(segments, blocks.chunk);
    let mut starts = vec![0.0; chunks.len() * dims.state()];
    let mut decays = vec![0.0; chunks.len() * dims.heads * dims.key];
    for_each_chunk(
        &chunks,
        starts.par_chunks_mut(dims.state().max(1)).zip(decays.par_chunks_mut((dims.heads * dims.key).max(1))),
        |chunk, (added, decay)| {
            simd(
                #[inline(always)]
                || chunk_adds_to_state(dims, chunk, x, added, decay),
            )
        },
    );

    // S_[i+1] = diag(exp B) S_[i] + added_[i]; each slot of `starts` turns from `added` into its start state.
    let mut finals = x.initial.to_vec();
    scan_segments(dims, blocks, segments, &mut starts, &decays, &mut finals, Direction::Forward);
    States { starts, finals }
}

/// The outputs o, given the states: the last step of the forward pass.
pub(crate) fn outputs(
    dims: Dims,
    blocks: Blocks,
    segments: &[Segment],
    x: Inputs<'_>,
    states: &States,
) -> Vec<f32> {
    let chunks = split_into_chunks(segments, blocks.chunk);
    let mut o = vec![0.0; dims.batch * dims.time * dims.heads * dims.value];
    let rows = split_rows(&mut o, &chunks, dims.heads * dims.value);
    for_each_chunk(
        &chunks,
        rows.into_par_iter().zip(states.starts.par_chunks(dims.state().max(1))),
        |chunk, (o, start)| {
            simd(
                #[inline(always)]
                || chunk_outputs(dims, blocks, chunk, x, start, o),
            )
        },
    );
    o
}

/// All gradients, given those of o and of the final states `[segments, heads, key, value]`.
pub(crate) fn backward(
    dims: Dims,
    blocks: Blocks,
    segments: &[Segment],
    x: Inputs<'_>,
    states: &States,
    d_o: &[f32],
    d_finals: &[f32],
) -> Gradients {
    let chunks = split_into_chunks(segments, blocks.chunk);
    let mut d_ends = vec![0.0; chunks.len() * dims.state()];
    let mut decays = vec![0.0; chunks.len() * dims.heads * dims.key];
    for_each_chunk(
        &chunks,
        d_ends.par_chunks_mut(dims.state().max(1)).zip(decays.par_chunks_mut((dims.heads * dims.key).max(1))),
        |chunk, (added, decay)| {
            simd(
                #[inline(always)]
                || chunk_adds_to_state_gradient(dims, chunk, x, d_o, added, decay),
            )
        },
    );
    // dS_[i] = diag(exp B) dS_[i+1] + added_[i]; each slot turns from `added` into the gradient of its end state.
    let mut d_initial = d_finals.to_vec();
    scan_segments(dims, blocks, segments, &mut d_ends, &decays, &mut d_initial, Direction::Backward);

    let (key_row, value_row) = (dims.heads * dims.key, dims.heads * dims.value);
    let rows = dims.batch * dims.time;
    let mut gradients = Gradients {
        q: vec![0.0; rows * key_row],
        k: vec![0.0; rows * key_row],
        v: vec![0.0; rows * value_row],
        g: vec![0.0; rows * key_row],
        initial: d_initial,
    };
    let ends = end_states(dims, &chunks, states);
    let q = split_rows(&mut gradients.q, &chunks, key_row);
    let k = split_rows(&mut gradients.k, &chunks, key_row);
    let v = split_rows(&mut gradients.v, &chunks, value_row);
    let g = split_rows(&mut gradients.g, &chunks, key_row);
    let slots = (q, k, v, g).into_par_iter();
    let around =
        (states.starts.par_chunks(dims.state().max(1)), ends, d_ends.par_chunks(dims.state().max(1)));
    for_each_chunk(&chunks, slots.zip(around.into_par_iter()), |chunk, ((dq, dk, dv, dg), around)| {
        let (start, end, d_end) = around;
        let around = Around { start, end, d_end };
        simd(
            #[inline(always)]
            || chunk_backward(dims, blocks, chunk, x, around, d_o, RowGradients { dq, dk, dv, dg }),
        );
    });
    gradients
}

/// A chunk: consecutive rows of one segment.
#[derive(Debug, Clone, Copy)]
struct Chunk {
    start: usize,
    len: usize,
    segment: usize,
    /// Whether the segment ends with it.
    last: bool,
}

fn split_into_chunks(segments: &[Segment], size: usize) -> Vec<Chunk> {
    let mut chunks = Vec::new();
    for (segment, &Segment { start, len }) in segments.iter().enumerate() {
        for offset in (0..len).step_by(size) {
            let rows = size.min(len - offset);
            chunks.push(Chunk { start: start + offset, len: rows, segment, last: offset + rows == len });
        }
    }
    chunks
}

/// Splits an array of rows into the rows of each chunk; chunks lie one after another without gaps.
fn split_rows<'a>(mut rows: &'a mut [f32], chunks: &[Chunk], width: usize) -> Vec<&'a mut [f32]> {
    let mut parts = Vec::with_capacity(chunks.len());
    for chunk in chunks {
        let (part, rest) = rows.split_at_mut(chunk.len * width);
        parts.push(part);
        rows = rest;
    }
    parts
}

/// Runs `work` for every chunk with its slot, in parallel where there is more than one.
fn for_each_chunk<S: Send>(
    chunks: &[Chunk],
    slots: impl IndexedParallelIterator<Item = S>,
    work: impl Fn(Chunk, S) + Sync + Send,
) {
    chunks.par_iter().zip(slots).for_each(|(&chunk, slot)| work(chunk, slot));
}

/// The state at the end of each chunk: the start of the next, or the segment's final one.
fn end_states<'a>(dims: Dims, chunks: &[Chunk], states: &'a States) -> Vec<&'a [f32]> {
    let size = dims.state();
    let slot = |states: &'a [f32], index: usize| &states[index * size..(index + 1) * size];
    chunks
        .iter()
        .enumerate()
        .map(|(i, chunk)| match chunk.last {
            true => slot(&states.finals, chunk.segment),
            false => slot(&states.starts, i + 1),
        })
        .collect()
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    Forward,
    Backward,
}

/// Walks the chunks of every segment in one direction with a running state, `carry = decay carry + slot`,
/// and leaves in each slot the state that the walk met it with. Segments run in parallel.
fn scan_segments(
    dims: Dims,
    blocks: Blocks,
    segments: &[Segment],
    slots: &mut [f32],
    decays: &[f32],
    carries: &mut [f32],
    direction: Direction,
) {
    let (size, channels) = (dims.state(), dims.heads * dims.key);
    if size == 0 {
        return;
    }
    let mut walks = Vec::with_capacity(segments.len());
    let (mut slots, mut decays) = (slots, decays);
    for (segment, carry) in segments.iter().zip(carries.chunks_mut(size)) {
        let count = segment.len.div_ceil(blocks.chunk);
        let (own_slots, other_slots) = slots.split_at_mut(count * size);
        let (own_decays, other_decays) = decays.split_at(count * channels);
        walks.push((own_slots, own_decays, carry));
        (slots, decays) = (other_slots, other_decays);
    }
    walks.into_par_iter().for_each(|(slots, decays, carry)| {
        let pairs = slots.chunks_mut(size).zip(decays.chunks(channels));
        let step = |(slot, decay): (&mut [f32], &[f32])| {
            simd(
                #[inline(always)]
                || decay_and_swap(dims.value, slot, decay, carry),
            );
        };
        match direction {
            Direction::Forward => pairs.for_each(step),
            Direction::Backward => pairs.rev().for_each(step),
        }
    });
}

/// `slot, carry = carry, decay carry + slot`, where a decay belongs to a row of `value` elements.
#[inline(always)]
fn decay_and_swap(value: usize, slot: &mut [f32], decay: &[f32], carry: &mut [f32]) {
    let rows = slot.chunks_exact_mut(value).zip(carry.chunks_exact_mut(value));
    for ((slot, carry), &decay) in rows.zip(decay) {
        for (slot, carry) in slot.iter_mut().zip(carry) {
            let next = fma(decay, *carry, *slot);
            *slot = *carry;
            *carry = next;
        }
    }
}

/// One head's rows of a chunk, gathered: log decays and their running sum b over the chunk `[len, key]`.
struct Decays {
    g: Vec<f32>,
    b: Vec<f32>,
}

impl Decays {
    #[inline(always)]
    fn gather(dims: Dims, chunk: Chunk, head: usize, g: &[f32]) -> Self {
        let g = gather(g, chunk, dims.heads, head, dims.key);
        let mut b = g.clone();
        for r in 1..chunk.len {
            let (before, row) = b.split_at_mut(r * dims.key);
            for (b, &last) in row[..dims.key].iter_mut().zip(&before[(r - 1) * dims.key..]) {
                *b += last;
            }
        }
        Self { g, b }
    }

    /// The running sum at row `r`.
    #[inline(always)]
    fn b(&self, r: usize, key: usize) -> &[f32] {
        &self.b[r * key..(r + 1) * key]
    }
}

/// Copies one head's rows out of `[time, heads, width]`.
#[inline(always)]
fn gather(data: &[f32], chunk: Chunk, heads: usize, head: usize, width: usize) -> Vec<f32> {
    let mut rows = Vec::with_capacity(chunk.len * width);
    for row in chunk.start..chunk.start + chunk.len {
        let at = (row * heads + head) * width;
        rows.extend_from_slice(&data[at..at + width]);
    }
    rows
}

/// One head's rows in place, as a matrix `[len, width]`.
#[inline(always)]
fn head_rows(data: &[f32], chunk: Chunk, heads: usize, head: usize, width: usize) -> Mat<'_> {
    let start = (chunk.start * heads + head) * width;
    Mat::strided(&data[start..], chunk.len, width, heads * width)
}

/// Multiplies by `exp b`.
#[inline(always)]
fn decay_from_start(rows: &mut [f32], b: &[f32]) {
    for (x, &b) in rows.iter_mut().zip(b) {
        *x *= exp(b);
    }
}

/// Multiplies each row by `exp(b_row - b_start)`, for rows at or after `start`.
#[inline(always)]
fn decay_since(start: &[f32], rows: &mut [f32], b: &[f32]) {
    let key = start.len();
    for (row, b) in rows.chunks_exact_mut(key).zip(b.chunks_exact(key)) {
        for ((x, &b), &start) in row.iter_mut().zip(b).zip(start) {
            *x *= exp(b - start);
        }
    }
}

/// Multiplies each row by `exp(b_end - b_row)`, for rows at or before `end`.
#[inline(always)]
fn decay_until(end: &[f32], rows: &mut [f32], b: &[f32]) {
    let key = end.len();
    for (row, b) in rows.chunks_exact_mut(key).zip(b.chunks_exact(key)) {
        for ((x, &b), &end) in row.iter_mut().zip(b).zip(end) {
            *x *= exp(end - b);
        }
    }
}

/// Multiplies every row by `exp(b_to - b_from)`.
#[inline(always)]
fn decay_between(from: &[f32], to: &[f32], rows: &mut [f32]) {
    let mut step = to.to_vec();
    for (step, from) in step.iter_mut().zip(from) {
        *step = exp(*step - from);
    }
    for row in rows.chunks_exact_mut(from.len()) {
        row.iter_mut().zip(&step).for_each(|(x, step)| *x *= step);
    }
}

/// `added = (K exp(B - b))ᵀ V` and `decay = exp B` for every head (paper §4.2).
#[inline(always)]
fn chunk_adds_to_state(dims: Dims, chunk: Chunk, x: Inputs<'_>, added: &mut [f32], decay: &mut [f32]) {
    let (key, value) = (dims.key, dims.value);
    for head in 0..dims.heads {
        let Decays { b, .. } = Decays::gather(dims, chunk, head, x.g);
        let end = &b[(chunk.len - 1) * key..];
        let mut k = gather(x.k, chunk, dims.heads, head, key);
        decay_until(end, &mut k, &b);
        let v = head_rows(x.v, chunk, dims.heads, head, value);
        let added = &mut added[head * key * value..(head + 1) * key * value];
        gemm(added, value, Out::Set, Mat::new(&k, chunk.len, key).t(), v);
        for (decay, &b) in decay[head * key..(head + 1) * key].iter_mut().zip(end) {
            *decay = exp(b);
        }
    }
}

/// `added = (Q exp b)ᵀ dO` and `decay = exp B` for every head.
#[inline(always)]
fn chunk_adds_to_state_gradient(
    dims: Dims,
    chunk: Chunk,
    x: Inputs<'_>,
    d_o: &[f32],
    added: &mut [f32],
    decay: &mut [f32],
) {
    let (key, value) = (dims.key, dims.value);
    for head in 0..dims.heads {
        let Decays { b, .. } = Decays::gather(dims, chunk, head, x.g);
        let mut q = queries(dims, chunk, head, x.q);
        decay_from_start(&mut q, &b);
        let d_o = head_rows(d_o, chunk, dims.heads, head, value);
        let added = &mut added[head * key * value..(head + 1) * key * value];
        gemm(added, value, Out::Set, Mat::new(&q, chunk.len, key).t(), d_o);
        let end = &b[(chunk.len - 1) * key..];
        for (decay, &b) in decay[head * key..(head + 1) * key].iter_mut().zip(end) {
            *decay = exp(b);
        }
    }
}

/// One head's queries, scaled by K^-1/2.
#[inline(always)]
fn queries(dims: Dims, chunk: Chunk, head: usize, q: &[f32]) -> Vec<f32> {
    let mut q = gather(q, chunk, dims.heads, head, dims.key);
    let scale = dims.scale();
    q.iter_mut().for_each(|q| *q *= scale);
    q
}

/// Keys decayed to a reference row that moves forward from sub-block to sub-block (paper §4.3).
///
/// After [`advance`](Self::advance) to row n, row s < n holds `k_s exp(b_n - b_s)`.
struct DecayedKeys {
    rows: Vec<f32>,
    reference: Option<usize>,
}

impl DecayedKeys {
    #[inline(always)]
    fn new(k: &[f32]) -> Self {
        Self { rows: k.to_vec(), reference: None }
    }

    #[inline(always)]
    fn advance(&mut self, n: usize, decays: &Decays, key: usize) {
        let end = decays.b(n, key);
        let known = self.reference.unwrap_or(0);
        if let Some(reference) = self.reference {
            // Rows before the last reference were decayed to it already; one factor moves them all on.
            decay_between(decays.b(reference, key), end, &mut self.rows[..known * key]);
        }
        decay_until(end, &mut self.rows[known * key..n * key], &decays.b[known * key..n * key]);
        self.reference = Some(n);
    }
}

/// o for the rows of one chunk: `(Q exp b) S + P V`, P by sub-blocks.
#[inline(always)]
fn chunk_outputs(dims: Dims, blocks: Blocks, chunk: Chunk, x: Inputs<'_>, start: &[f32], o: &mut [f32]) {
    let (key, value, len) = (dims.key, dims.value, chunk.len);
    let stride = dims.heads * value;
    let mut p = vec![0.0; len * len];
    for head in 0..dims.heads {
        let decays = Decays::gather(dims, chunk, head, x.g);
        let q = queries(dims, chunk, head, x.q);
        let k = gather(x.k, chunk, dims.heads, head, key);
        let v = &x.v[(chunk.start * dims.heads + head) * value..];
        let o = &mut o[head * value..];

        let mut q_decayed = q.clone();
        decay_from_start(&mut q_decayed, &decays.b);
        let start = Mat::new(&start[head * key * value..], key, value);
        gemm(o, stride, Out::Set, Mat::new(&q_decayed, len, key), start);

        let mut earlier = DecayedKeys::new(&k);
        for n in (0..len).step_by(blocks.sub_chunk) {
            let m = len.min(n + blocks.sub_chunk);
            if n > 0 {
                // Below the diagonal: P = (Q exp(b - b_n)) (K exp(b_n - b))ᵀ, both exponents ≤ 0.
                earlier.advance(n, &decays, key);
                let mut rows = q[n * key..m * key].to_vec();
                decay_since(decays.b(n, key), &mut rows, &decays.b[n * key..m * key]);
                let rows = Mat::new(&rows, m - n, key);
                gemm(&mut p[n * len..], len, Out::Set, rows, Mat::new(&earlier.rows, n, key).t());
            }
            diagonal_scores(&q, &k, &decays.g, key, n, m, &mut p, len);
            let p = Mat::strided(&p[n * len..], m - n, m, len);
            gemm(&mut o[n * stride..], stride, Out::Add, p, Mat::strided(v, m, value, stride));
        }
    }
}

/// `α = exp g`. A loop, since collecting an iterator would be compiled without the kernel's vector instructions.
#[inline(always)]
fn gates(g: &[f32]) -> Vec<f32> {
    let mut alpha = g.to_vec();
    for alpha in &mut alpha {
        *alpha = exp(*alpha);
    }
    alpha
}

/// P on the diagonal block of rows n..m: `P_rs = Σ_c q_rc k_sc exp(b_rc - b_sc)`.
///
/// For a fixed s the decayed key runs forward, one factor `exp g_r ≤ 1` a row: at most `m - n` roundings,
/// no exponent but of a single log decay, and exact zeros where a gate closes.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn diagonal_scores(
    q: &[f32],
    k: &[f32],
    g: &[f32],
    key: usize,
    n: usize,
    m: usize,
    p: &mut [f32],
    stride: usize,
) {
    let alpha = gates(&g[n * key..m * key]);
    let mut k_decayed = vec![0.0; key];
    for s in n..m {
        k_decayed.copy_from_slice(&k[s * key..(s + 1) * key]);
        p[s * stride + s] = dot(&q[s * key..(s + 1) * key], &k_decayed);
        for r in s + 1..m {
            let alpha = &alpha[(r - n) * key..(r - n + 1) * key];
            k_decayed.iter_mut().zip(alpha).for_each(|(k, alpha)| *k *= alpha);
            p[r * stride + s] = dot(&q[r * key..(r + 1) * key], &k_decayed);
        }
    }
}

/// The states around a chunk and the gradient of the one at its end, all heads.
struct Around<'a> {
    start: &'a [f32],
    end: &'a [f32],
    d_end: &'a [f32],
}

/// Where the gradients of a chunk's rows go.
struct RowGradients<'a> {
    dq: &'a mut [f32],
    dk: &'a mut [f32],
    dv: &'a mut [f32],
    dg: &'a mut [f32],
}

/// The gradients of one chunk's rows (paper §4.4, by recomputation).
#[inline(always)]
fn chunk_backward(
    dims: Dims,
    blocks: Blocks,
    chunk: Chunk,
    x: Inputs<'_>,
    around: Around<'_>,
    d_o: &[f32],
    out: RowGradients<'_>,
) {
    let (key, value, len) = (dims.key, dims.value, chunk.len);
    let mut p = vec![0.0; len * len];
    let mut dp = vec![0.0; len * len];
    for head in 0..dims.heads {
        let decays = Decays::gather(dims, chunk, head, x.g);
        let q = queries(dims, chunk, head, x.q);
        let k = gather(x.k, chunk, dims.heads, head, key);
        let of_head = head * key * value..(head + 1) * key * value;
        let (start, d_end) = (&around.start[of_head.clone()], &around.d_end[of_head.clone()]);
        let (start_mat, d_end_mat) = (Mat::new(start, key, value), Mat::new(d_end, key, value));
        let v = head_rows(x.v, chunk, dims.heads, head, value);
        let d_o_rows = &d_o[(chunk.start * dims.heads + head) * value..];
        let d_o = head_rows(d_o, chunk, dims.heads, head, value);

        // Through the start state: dQ = exp(b) (dO Sᵀ).
        let mut dq = vec![0.0; len * key];
        gemm(&mut dq, key, Out::Set, d_o, start_mat.t());
        decay_from_start(&mut dq, &decays.b);
        // dP = dO Vᵀ; what lies above the diagonal is never read.
        gemm(&mut dp, len, Out::Set, d_o, v.t());

        // Within the chunk, forward over the sub-blocks: P again, and dQ through the decayed keys.
        let mut dk = vec![0.0; len * key];
        let mut q_block = vec![0.0; len * key]; // q exp(b - b_n) for the sub-block that a row is in
        let mut earlier = DecayedKeys::new(&k);
        for n in (0..len).step_by(blocks.sub_chunk) {
            let m = len.min(n + blocks.sub_chunk);
            if n > 0 {
                earlier.advance(n, &decays, key);
                let rows = &mut q_block[n * key..m * key];
                rows.copy_from_slice(&q[n * key..m * key]);
                decay_since(decays.b(n, key), rows, &decays.b[n * key..m * key]);
                let keys = Mat::new(&earlier.rows, n, key);
                gemm(&mut p[n * len..], len, Out::Set, Mat::new(rows, m - n, key), keys.t());
                let mut through = vec![0.0; (m - n) * key];
                gemm(&mut through, key, Out::Set, Mat::strided(&dp[n * len..], m - n, n, len), keys);
                decay_since(decays.b(n, key), &mut through, &decays.b[n * key..m * key]);
                dq[n * key..m * key].iter_mut().zip(&through).for_each(|(dq, through)| *dq += through);
            }
            diagonal_backward(&q, &k, &decays.g, key, n, m, &mut p, &dp, len, &mut dq, &mut dk);
        }

        // dV = Pᵀ dO + (K exp(B - b)) dS; the decayed keys move on to the end of the chunk.
        earlier.advance(len - 1, &decays, key);
        let stride = dims.heads * value;
        let dv = &mut out.dv[head * value..];
        gemm(dv, stride, Out::Set, Mat::new(&earlier.rows, len, key), d_end_mat);
        for n in (0..len).step_by(blocks.sub_chunk) {
            let m = len.min(n + blocks.sub_chunk);
            let p = Mat::strided(&p[n * len..], m - n, m, len);
            gemm(dv, stride, Out::Add, p.t(), Mat::strided(&d_o_rows[n * stride..], m - n, value, stride));
        }

        // dK, backward over the sub-blocks: gradients of the decayed keys, whose reference moves back.
        let mut d_decayed = vec![0.0; len * key];
        gemm(&mut d_decayed, key, Out::Set, v, d_end_mat.t());
        let mut reference = decays.b(len - 1, key);
        for n in (0..len).step_by(blocks.sub_chunk).rev() {
            let m = len.min(n + blocks.sub_chunk);
            let block = &mut d_decayed[n * key..m * key];
            decay_until(reference, block, &decays.b[n * key..m * key]);
            dk[n * key..m * key].iter_mut().zip(block.iter()).for_each(|(dk, d)| *dk += d);
            if n > 0 {
                let before = decays.b(n, key);
                decay_between(before, reference, &mut d_decayed[..n * key]);
                let dp = Mat::strided(&dp[n * len..], m - n, n, len);
                gemm(&mut d_decayed, key, Out::Add, dp.t(), Mat::new(&q_block[n * key..], m - n, key));
                reference = before;
            }
        }

        // dg_t = Σ_{s ≥ t} (q_s dq_s - k_s dk_s), within the chunk; what comes after it sums to S dS at its end.
        let end = &around.end[of_head];
        let mut later = vec![0.0; key];
        let rows = end.chunks_exact(value).zip(d_end.chunks_exact(value));
        for (later, (s, ds)) in later.iter_mut().zip(rows) {
            *later = dot(s, ds);
        }
        let scale = dims.scale();
        for r in (0..len).rev() {
            let own = r * key..(r + 1) * key;
            let at = (r * dims.heads + head) * key;
            let row = own.clone().zip(at..at + key).zip(&mut later);
            for ((i, at), later) in row {
                *later += q[i] * dq[i] - k[i] * dk[i];
                out.dg[at] = *later;
                out.dq[at] = scale * dq[i];
                out.dk[at] = dk[i];
            }
        }
    }
}

/// The diagonal block of rows n..m: P as in [`diagonal_scores`], and what dP passes to dQ and dK.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn diagonal_backward(
    q: &[f32],
    k: &[f32],
    g: &[f32],
    key: usize,
    n: usize,
    m: usize,
    p: &mut [f32],
    dp: &[f32],
    stride: usize,
    dq: &mut [f32],
    dk: &mut [f32],
) {
    let alpha = gates(&g[n * key..m * key]);
    let mut k_decayed = vec![0.0; key];
    let mut decay = vec![0.0; key];
    for s in n..m {
        k_decayed.copy_from_slice(&k[s * key..(s + 1) * key]);
        decay.fill(1.0);
        let dk = &mut dk[s * key..(s + 1) * key];
        for r in s..m {
            if r > s {
                let alpha = &alpha[(r - n) * key..(r - n + 1) * key];
                for ((k, decay), alpha) in k_decayed.iter_mut().zip(&mut decay).zip(alpha) {
                    *k *= alpha;
                    *decay *= alpha;
                }
            }
            let q = &q[r * key..(r + 1) * key];
            let upstream = dp[r * stride + s];
            p[r * stride + s] = dot(q, &k_decayed);
            axpy(upstream, &k_decayed, &mut dq[r * key..(r + 1) * key]);
            for ((dk, q), decay) in dk.iter_mut().zip(q).zip(&decay) {
                *dk = fma(upstream * q, *decay, *dk);
            }
        }
    }
}
