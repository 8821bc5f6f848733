//! Scaled dot-product attention without the matrix of scores in memory (Dao et al., "FlashAttention",
//! arXiv 2205.14135): blocks of keys pass by a block of queries, whose softmax is corrected as larger scores
//! turn up; the backward pass computes the scores again from the logarithm of each row's sum.

use burn::backend::{BackendTensor, DispatchTensorKind};
use burn::tensor::ops::AttentionModuleOptions;
use burn::tensor::{Bool, Tensor};
use burn_flex::FlexTensor;
use rayon::prelude::*;

use crate::flex::tensor;
use crate::function::{Function, apply, runs_natively};
use crate::gemm::{Mat, Out, gemm};
use crate::rows::add_rows;
use crate::simd;
use crate::softmax::{exp_all, exp_below, max};
use crate::vector::dot;

/// Queries of one block.
const QUERIES: usize = 64;
/// Keys of one block: with [`QUERIES`], the scores at hand stay in a core's cache.
const KEYS: usize = 384;

/// Which keys a query sees and how its scores are formed.
#[derive(Debug, Clone, Default)]
pub struct AttentionOptions {
    /// Query `i` sees the keys up to `i + source - time` only, so that the last query sees them all.
    pub causal: bool,
    /// What products of queries and keys are multiplied by, `dim^-½` where it is not given.
    pub scale: Option<f64>,
    /// Keys that queries do not see, `[batch or 1, heads or 1, time or 1, source]`; true hides a key.
    pub mask: Option<Tensor<4, Bool>>,
    /// What is added to the scores, `[batch or 1, heads or 1, time or 1, source]`. Only where its gradient is
    /// asked for does it take the memory of all scores.
    pub bias: Option<Tensor<4>>,
}

/// `softmax(scale Q Kᵀ + bias) V` for every head; 0 for a query that sees no key.
///
/// Where there are fewer heads of keys and values than of queries, each serves the same number of
/// successive query heads.
///
/// # Shapes
/// - q: `[batch, heads, time, dim]`
/// - k: `[batch, kv_heads, source, dim]`, `kv_heads` a divisor of `heads`
/// - v: `[batch, kv_heads, source, value_dim]`
/// - output: `[batch, heads, time, value_dim]`, which lies in memory as `[batch, time, heads, value_dim]`
///
/// # Panics
/// When the shapes do not fit.
pub fn attention(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, options: AttentionOptions) -> Tensor<4> {
    let shape = Extents::of(&q, &k, &v);
    let scores = [shape.batch, shape.heads, shape.time, shape.source];
    let mask = options.mask.map(|mask| mask.expand(scores));
    let bias = options.bias.map(|bias| bias.expand(scores));
    let scale = options.scale.unwrap_or_else(|| (shape.dim as f64).powf(-0.5));
    if !runs_natively(&q) || !runs_natively(&k) || !runs_natively(&v) {
        let options = AttentionModuleOptions { scale: Some(scale), softcap: None, is_causal: options.causal };
        let (k, v) = (shape.repeat(k), shape.repeat(v));
        return burn::tensor::module::attention(q, k, v, mask, bias, options);
    }
    let function = Attention { shape, causal: options.causal, scale: scale as f32, mask: mask.map(bools) };
    let bias = match bias {
        Some(bias) => bias.into_dispatch(),
        None => Tensor::<1>::empty([0], &q.device()).into_dispatch(),
    };
    Tensor::from_dispatch(apply(&function, [q.into_dispatch(), k.into_dispatch(), v.into_dispatch(), bias]))
}

/// The extents of queries `[batch, heads, time, dim]`, keys `[batch, kv_heads, source, dim]` and values
/// `[batch, kv_heads, source, value_dim]`.
#[allow(missing_docs, reason = "each is an extent")]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttentionExtents {
    pub batch: usize,
    pub heads: usize,
    /// A divisor of `heads`.
    pub kv_heads: usize,
    pub time: usize,
    pub source: usize,
    pub dim: usize,
    pub value_dim: usize,
}

use AttentionExtents as Extents;

/// What [`attend`] computes with, in slices.
pub struct AttentionInputs<'a> {
    /// `[batch, heads, time, dim]`
    pub q: Heads<'a, f32>,
    /// `[batch, kv_heads, source, dim]`
    pub k: Heads<'a, f32>,
    /// `[batch, kv_heads, source, value_dim]`
    pub v: Heads<'a, f32>,
    /// Added to the scores, `[batch, heads, time, source]`.
    pub bias: Option<Heads<'a, f32>>,
    /// Hides keys where it is not 0, `[batch, heads, time, source]`.
    pub mask: Option<Heads<'a, u8>>,
}

use AttentionInputs as Inputs;

/// [`attention`] over slices: the output is `[batch, time, heads, value_dim]`.
///
/// # Panics
/// When a slice is too short for its extents.
pub fn attend(
    extents: AttentionExtents,
    causal: bool,
    scale: f32,
    inputs: &AttentionInputs<'_>,
    output: &mut [f32],
) {
    let mut log_sums = vec![0.0; extents.batch * extents.time * extents.heads];
    let attention = Attention { shape: extents, causal, scale, mask: None };
    attention.attend(inputs, &mut output[..log_sums.len() * extents.value_dim], &mut log_sums);
}

impl Extents {
    fn of(q: &Tensor<4>, k: &Tensor<4>, v: &Tensor<4>) -> Self {
        let ([batch, heads, time, dim], [_, kv_heads, source, _], [.., value_dim]) =
            (q.dims(), k.dims(), v.dims());
        let fit = k.dims() == [batch, kv_heads, source, dim]
            && v.dims() == [batch, kv_heads, source, value_dim]
            && heads.is_multiple_of(kv_heads);
        assert!(
            fit,
            "keys {:?} and values {:?} do not fit queries {:?}: they need the same batch and source, keys the \
             queries' last axis, and a number of heads that divides theirs",
            k.dims(),
            v.dims(),
            q.dims()
        );
        Self { batch, heads, kv_heads, time, source, dim, value_dim }
    }

    /// Query heads that share a head of keys and values.
    fn group(&self) -> usize {
        self.heads.checked_div(self.kv_heads).unwrap_or(0)
    }

    /// Keys or values with every head as often as it has query heads.
    fn repeat(&self, x: Tensor<4>) -> Tensor<4> {
        let [batch, kv_heads, source, width] = x.dims();
        let group = self.group();
        if group == 1 {
            return x;
        }
        x.reshape([batch, kv_heads, 1, source, width])
            .expand([batch, kv_heads, group, source, width])
            .reshape([batch, kv_heads * group, source, width])
    }
}

/// Truth values on the CPU.
fn bools(x: Tensor<4, Bool>) -> FlexTensor {
    match x.into_dispatch().kind {
        DispatchTensorKind::Flex(BackendTensor::Bool(x)) => x,
        other => panic!("a CPU kernel was given another backend's truth values: {other:?}"),
    }
}

/// A function of queries, keys, values and a bias for all scores, which has no elements where there is none.
#[derive(Debug, Clone)]
struct Attention {
    shape: Extents,
    causal: bool,
    scale: f32,
    /// `[batch, heads, time, source]`
    mask: Option<FlexTensor>,
}

/// What the backward pass of [`Attention`] needs.
#[derive(Clone)]
struct Saved {
    inputs: [FlexTensor; 4],
    output: FlexTensor,
    log_sums: Vec<f32>,
}

impl Function<4> for Attention {
    type Saved = Saved;

    fn forward(&self, inputs: [FlexTensor; 4]) -> (FlexTensor, Saved) {
        let inputs = inputs.map(with_whole_rows);
        let mask = self.mask.clone().map(with_whole_rows);
        let Extents { batch, heads, time, value_dim, .. } = self.shape;
        let mut output = vec![0.0; batch * time * heads * value_dim];
        let mut log_sums = vec![0.0; batch * time * heads];
        self.attend(&Inputs::of(&inputs, mask.as_ref()), &mut output, &mut log_sums);
        let output = tensor(output, [batch, time, heads, value_dim]).transpose(1, 2);
        (output.clone(), Saved { inputs, output, log_sums })
    }

    fn backward(&self, saved: Saved, upstream: FlexTensor, wanted: [bool; 4]) -> [Option<FlexTensor>; 4] {
        self.pull_back(&saved, &with_whole_rows(upstream), wanted)
    }
}

/// The same tensor with the elements of every row side by side and no row backwards.
fn with_whole_rows(x: FlexTensor) -> FlexTensor {
    let layout = x.layout();
    let last = layout.num_dims() - 1;
    let side_by_side = layout.shape()[last] <= 1 || layout.strides()[last] == 1;
    if side_by_side && layout.strides().iter().all(|&stride| stride >= 0) { x } else { x.to_contiguous() }
}

/// The matrices in the last two axes of a tensor with four, read where they lie.
#[derive(Clone, Copy)]
pub struct Heads<'a, T> {
    /// From the first element on.
    pub data: &'a [T],
    /// Distances between batches, heads and rows.
    pub strides: [usize; 3],
    /// Elements of a row, which lie side by side.
    pub columns: usize,
}

impl<'a, T> Heads<'a, T> {
    fn new(data: &'a [T], x: &FlexTensor) -> Self {
        let layout = x.layout();
        let [batch, head, row] = [0, 1, 2].map(|axis| layout.strides()[axis].unsigned_abs());
        let data = if layout.num_elements() == 0 { &[] } else { &data[layout.start_offset()..] };
        Self { data, strides: [batch, head, row], columns: layout.shape()[3] }
    }

    /// One matrix from its row `row` on.
    fn rows_from(&self, [batch, head]: [usize; 2], row: usize) -> &'a [T] {
        let at = batch * self.strides[0] + head * self.strides[1] + row * self.strides[2];
        self.data.get(at..).unwrap_or_default()
    }

    fn row(&self, head: [usize; 2], row: usize) -> &'a [T] {
        &self.rows_from(head, row)[..self.columns]
    }
}

impl<'a> Heads<'a, f32> {
    fn of(x: &'a FlexTensor) -> Self {
        Self::new(x.storage(), x)
    }

    /// `rows` successive rows of one matrix.
    fn block(&self, head: [usize; 2], first: usize, rows: usize) -> Mat<'a> {
        Mat::strided(self.rows_from(head, first), rows, self.columns, self.strides[2])
    }
}

impl<'a> Inputs<'a> {
    fn of([q, k, v, bias]: &'a [FlexTensor; 4], mask: Option<&'a FlexTensor>) -> Self {
        Self {
            q: Heads::of(q),
            k: Heads::of(k),
            v: Heads::of(v),
            bias: (bias.layout().num_dims() == 4).then(|| Heads::of(bias)),
            mask: mask.map(|mask| Heads::new(mask.storage(), mask)),
        }
    }

    /// Adds the bias to the scores of one query with successive keys, and hides those that are masked.
    #[inline(always)]
    fn finish(&self, scores: &mut [f32], head: [usize; 2], query: usize, first_key: usize) {
        if let Some(bias) = &self.bias {
            let bias = &bias.row(head, query)[first_key..];
            for (score, bias) in scores.iter_mut().zip(bias) {
                *score += bias;
            }
        }
        if let Some(mask) = &self.mask {
            let mask = &mask.row(head, query)[first_key..];
            for (score, &hidden) in scores.iter_mut().zip(mask) {
                *score = if hidden == 0 { *score } else { f32::NEG_INFINITY };
            }
        }
    }
}

impl Attention {
    /// How many keys, from the first on, a query may see.
    fn visible(&self, query: usize) -> usize {
        let Extents { time, source, .. } = self.shape;
        if self.causal { (query + 1 + source).saturating_sub(time) } else { source }
    }

    /// The output `[batch, time, heads, value_dim]`, and the logarithm of every query's sum of exponentials
    /// `[batch, time, heads]`.
    fn attend(&self, inputs: &Inputs<'_>, output: &mut [f32], log_sums: &mut [f32]) {
        let shape = self.shape;
        let Extents { batch, heads, time, source, value_dim, .. } = shape;
        output.fill(0.0);
        // The sum of no exponentials is 0; +∞ in the place of its logarithm makes all probabilities 0.
        log_sums.fill(f32::INFINITY);

        if source > 0 && time == 1 {
            // One query of each head: a task has the queries that share keys and values.
            let heads = batch * shape.kv_heads;
            let tasks = pieces(output, heads).zip(pieces(log_sums, heads)).enumerate();
            run(tasks.collect(), source * (shape.dim + value_dim), |(task, (output, log_sums))| {
                self.attend_singly(inputs, [task / shape.kv_heads, task % shape.kv_heads], output, log_sums);
            });
        } else if source > 0 {
            // A task has a block of queries of all heads.
            let blocks = pieces(output, batch).zip(pieces(log_sums, batch)).enumerate();
            let tasks = blocks.flat_map(|(b, (output, log_sums))| {
                let rows = |width| QUERIES * heads * width;
                let blocks = chunks(output, rows(value_dim)).zip(chunks(log_sums, rows(1))).enumerate();
                blocks.map(move |(block, block_out)| (b, block * QUERIES, block_out))
            });
            let work = QUERIES.min(time) * heads * source * (shape.dim + value_dim);
            run(tasks.collect(), work, |(b, first, (output, log_sums))| {
                self.attend_block(inputs, b, first, output, log_sums);
            });
        }
    }

    /// The queries of batch `b` from `first` on, for all heads: as many as there are `log_sums` `[rows, heads]`.
    fn attend_block(
        &self,
        inputs: &Inputs<'_>,
        b: usize,
        first: usize,
        output: &mut [f32],
        log_sums: &mut [f32],
    ) {
        let Extents { heads, dim, value_dim, .. } = self.shape;
        let rows = log_sums.len() / heads;
        let last_key = self.visible(first + rows - 1);
        let mut queries = vec![0.0; rows * dim];
        let mut scores = vec![0.0; rows * KEYS.min(last_key)];
        for head in 0..heads {
            let at = [b, head];
            let kv = [b, head / self.shape.group()];
            self.scaled_queries(inputs, at, first, &mut queries);
            let mut largest = [f32::NEG_INFINITY; QUERIES];
            let mut sums = [0.0; QUERIES];
            let output = &mut output[head * value_dim..];
            let stride = heads * value_dim;

            for start in (0..last_key).step_by(KEYS) {
                let keys = KEYS.min(last_key - start);
                let k = inputs.k.block(kv, start, keys);
                gemm(&mut scores, keys, Out::Set, Mat::new(&queries, rows, dim), k.t());
                simd(
                    #[inline(always)]
                    || {
                        for (row, scores) in scores.chunks_exact_mut(keys).take(rows).enumerate() {
                            let seen = self.visible(first + row).saturating_sub(start).min(keys);
                            let (scores, hidden) = scores.split_at_mut(seen);
                            hidden.fill(0.0);
                            inputs.finish(scores, at, first + row, start);
                            let new_largest = max(scores).max(largest[row]);
                            // As long as nothing is seen there is nothing to shift.
                            let shift = if new_largest == f32::NEG_INFINITY { 0.0 } else { new_largest };
                            let correction = exp_below(largest[row] - shift);
                            largest[row] = new_largest;
                            sums[row] = sums[row] * correction + exp_all(scores, shift);
                            if start > 0 {
                                let output = &mut output[row * stride..][..value_dim];
                                for x in output.iter_mut() {
                                    *x *= correction;
                                }
                            }
                        }
                    },
                );
                let mode = if start == 0 { Out::Set } else { Out::Add };
                gemm(output, stride, mode, Mat::new(&scores, rows, keys), inputs.v.block(kv, start, keys));
            }

            for row in 0..rows {
                let output = &mut output[row * stride..][..value_dim];
                if sums[row] == 0.0 {
                    output.fill(0.0);
                } else {
                    for x in output.iter_mut() {
                        *x /= sums[row];
                    }
                    log_sums[row * heads + head] = largest[row] + sums[row].ln();
                }
            }
        }
    }

    /// One query of each head that `kv` serves, without matrix products: `output` is `[group, value_dim]`.
    fn attend_singly(
        &self,
        inputs: &Inputs<'_>,
        kv @ [b, kv_head]: [usize; 2],
        output: &mut [f32],
        log_sums: &mut [f32],
    ) {
        let group = log_sums.len();
        let mut scores = vec![0.0; self.shape.source];
        for (i, (output, log_sum)) in pieces(output, group).zip(log_sums).enumerate() {
            let head = [b, kv_head * group + i];
            let query = inputs.q.row(head, 0);
            simd(
                #[inline(always)]
                || {
                    for (key, score) in scores.iter_mut().enumerate() {
                        *score = self.scale * dot(query, inputs.k.row(kv, key));
                    }
                    inputs.finish(&mut scores, head, 0, 0);
                    let largest = max(&scores);
                    let shift = if largest == f32::NEG_INFINITY { 0.0 } else { largest };
                    let sum = exp_all(&mut scores, shift);
                    if sum == 0.0 {
                        return;
                    }
                    *log_sum = largest + sum.ln();
                    let values = scores.iter().enumerate();
                    add_rows(
                        output,
                        values.map(
                            #[inline(always)]
                            |(key, &weight)| (inputs.v.row(kv, key), weight),
                        ),
                    );
                    for x in output.iter_mut() {
                        *x /= sum;
                    }
                },
            );
        }
    }

    /// Gathers a block of queries, times the scale.
    fn scaled_queries(&self, inputs: &Inputs<'_>, head: [usize; 2], first: usize, queries: &mut [f32]) {
        for (row, scaled) in queries.chunks_exact_mut(self.shape.dim.max(1)).enumerate() {
            let query = inputs.q.row(head, first + row);
            for (scaled, x) in scaled.iter_mut().zip(query) {
                *scaled = self.scale * x;
            }
        }
    }

    fn pull_back(&self, saved: &Saved, upstream: &FlexTensor, wanted: [bool; 4]) -> [Option<FlexTensor>; 4] {
        let Extents { batch, heads, kv_heads, time, source, dim, value_dim } = self.shape;
        let shapes = [
            [batch, heads, time, dim],
            [batch, kv_heads, source, dim],
            [batch, kv_heads, source, value_dim],
            [batch, heads, time, source],
        ];
        let [wants_q, wants_k, wants_v, wants_bias] = wanted;
        let has_bias = saved.inputs[3].layout().num_dims() == 4;
        let wanted = [wants_q, wants_k, wants_v, wants_bias && has_bias];
        let mut gradients = [0, 1, 2, 3].map(|i| match wanted[i] {
            true => vec![0.0; shapes[i].iter().product()],
            false => Vec::new(),
        });

        let mask = self.mask.clone().map(with_whole_rows);
        let inputs = Inputs::of(&saved.inputs, mask.as_ref());
        let (output, upstream) = (Heads::of(&saved.output), Heads::of(upstream));
        let tasks = batch * kv_heads;
        if source > 0 && time > 0 {
            let [q, k, v, bias] = &mut gradients;
            let parts = pieces(q, tasks).zip(pieces(k, tasks)).zip(pieces(v, tasks).zip(pieces(bias, tasks)));
            let tasks = parts.map(|((q, k), (v, bias))| Gradients { q, k, v, bias }).enumerate();
            let work = 4 * self.shape.group() * time * source * (dim + value_dim);
            run(tasks.collect(), work, |(task, gradients)| {
                let kv = [task / kv_heads, task % kv_heads];
                self.pull_back_heads(&inputs, &saved.log_sums, output, upstream, kv, gradients);
            });
        }
        let mut shapes = shapes.into_iter();
        gradients.map(|values| {
            let shape = shapes.next().expect("there are as many shapes as gradients");
            (!values.is_empty() || shape.contains(&0)).then(|| tensor(values, shape))
        })
    }

    /// The gradients of the query heads that share one head of keys and values, and of these.
    fn pull_back_heads(
        &self,
        inputs: &Inputs<'_>,
        log_sums: &[f32],
        output: Heads<'_, f32>,
        upstream: Heads<'_, f32>,
        kv @ [b, kv_head]: [usize; 2],
        gradients: Gradients<'_>,
    ) {
        let Extents { heads, time, source, dim, value_dim, .. } = self.shape;
        let group = self.shape.group();
        let mut all_queries = vec![0.0; QUERIES.min(time) * dim];
        let mut probabilities = vec![0.0; QUERIES.min(time) * KEYS.min(source)];
        let mut d_scores = probabilities.clone();

        for (member, first) in
            (0..group).flat_map(|member| (0..time).step_by(QUERIES).map(move |t| (member, t)))
        {
            let head = [b, kv_head * group + member];
            let rows = QUERIES.min(time - first);
            let last_key = self.visible(first + rows - 1);
            let queries = &mut all_queries[..rows * dim];
            self.scaled_queries(inputs, head, first, queries);
            let queries = Mat::new(queries, rows, dim);
            let d_output = upstream.block(head, first, rows);
            let log_sum = |row: usize| log_sums[(b * time + first + row) * heads + head[1]];
            // Σ_j p_j dp_j, which is the product of the output and its gradient.
            let mut means = [0.0; QUERIES];
            simd(
                #[inline(always)]
                || {
                    for (row, mean) in means.iter_mut().enumerate().take(rows) {
                        *mean = dot(output.row(head, first + row), upstream.row(head, first + row));
                    }
                },
            );

            for start in (0..last_key).step_by(KEYS) {
                let keys = KEYS.min(last_key - start);
                let (k, v) = (inputs.k.block(kv, start, keys), inputs.v.block(kv, start, keys));
                gemm(&mut probabilities, keys, Out::Set, queries, k.t());
                simd(
                    #[inline(always)]
                    || {
                        for (row, scores) in probabilities.chunks_exact_mut(keys).take(rows).enumerate() {
                            let seen = self.visible(first + row).saturating_sub(start).min(keys);
                            let (scores, hidden) = scores.split_at_mut(seen);
                            hidden.fill(0.0);
                            inputs.finish(scores, head, first + row, start);
                            let log_sum = log_sum(row);
                            for x in scores {
                                *x = exp_below(*x - log_sum);
                            }
                        }
                    },
                );
                let p = Mat::new(&probabilities, rows, keys);
                if !gradients.v.is_empty() {
                    gemm(&mut gradients.v[start * value_dim..], value_dim, Out::Add, p.t(), d_output);
                }

                gemm(&mut d_scores, keys, Out::Set, d_output, v.t());
                simd(
                    #[inline(always)]
                    || {
                        let rows =
                            d_scores.chunks_exact_mut(keys).zip(probabilities.chunks_exact(keys)).take(rows);
                        for (row, (d_scores, p)) in rows.enumerate() {
                            let mean = means[row];
                            for (d, p) in d_scores.iter_mut().zip(p) {
                                *d = p * (*d - mean);
                            }
                        }
                    },
                );
                if !gradients.bias.is_empty() {
                    for (row, d_scores) in d_scores.chunks_exact(keys).take(rows).enumerate() {
                        let at = (member * time + first + row) * source + start;
                        gradients.bias[at..at + keys].copy_from_slice(d_scores);
                    }
                }
                let d_s = Mat::new(&d_scores, rows, keys);
                if !gradients.q.is_empty() {
                    let at = (member * time + first) * dim;
                    gemm(&mut gradients.q[at..], dim, Out::Add, d_s, k);
                }
                if !gradients.k.is_empty() {
                    gemm(&mut gradients.k[start * dim..], dim, Out::Add, d_s.t(), queries);
                }
            }
        }
        for x in gradients.q.iter_mut() {
            *x *= self.scale;
        }
    }
}

/// Where the gradients of one head of keys and values and of its query heads go; what is not wanted is empty.
struct Gradients<'a> {
    /// `[group, time, dim]`
    q: &'a mut [f32],
    /// `[source, dim]`
    k: &'a mut [f32],
    /// `[source, value_dim]`
    v: &'a mut [f32],
    /// `[group, time, source]`
    bias: &'a mut [f32],
}

/// Splits a slice into `count` pieces of equal length.
fn pieces(values: &mut [f32], count: usize) -> impl Iterator<Item = &mut [f32]> {
    let len = values.len().checked_div(count).unwrap_or(0);
    let mut rest = values;
    (0..count).map(move |_| rest.split_off_mut(..len).expect("all pieces fit"))
}

/// Splits a slice into pieces of `len` and a shorter last one; none where there is nothing to split.
fn chunks(values: &mut [f32], len: usize) -> impl Iterator<Item = &mut [f32]> {
    values.chunks_mut(len.max(1))
}

/// Runs tasks of about `work` multiplications each, on all threads where that pays.
fn run<T: Send>(tasks: Vec<T>, work: usize, f: impl Fn(T) + Sync + Send) {
    /// Multiplications that take as long as waking a thread.
    const WAKE: usize = 1 << 17;
    if tasks.len() * work <= WAKE {
        tasks.into_iter().for_each(f);
    } else {
        tasks.into_par_iter().with_max_len(1).for_each(f);
    }
}
