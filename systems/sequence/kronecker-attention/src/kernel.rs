//! Exact tensor attention on the CPU: blocks of queries and of prefixes, forward and backward.

use std::ops::Range;
use std::sync::Arc;

use burn_flex::FlexTensor;
use kiln_ops::flex::{floats, tensor};
use kiln_ops::gemm::{Mat, Out, gemm};
use kiln_ops::vector::{axpy, dot, exp, fold, sum_of};
use kiln_ops::{Function, simd};
use rayon::prelude::*;

/// Queries of a block.
const QUERIES: usize = 16;
/// Prefixes of a block; together with [`QUERIES`] the rows of its matrix products.
const PREFIXES: usize = 16;
/// Pieces of a head's queries that the backward pass sums apart: enough for a machine's cores, and always as many, so
/// that the sums come out the same whatever the number of threads.
const SLICES: usize = 8;

/// Which rows of each key matrix may be seen, `[batch, rows]`.
#[derive(Debug)]
pub(crate) struct Masks(pub Vec<Option<Vec<bool>>>);

/// Exact tensor attention of `(q, k_1..k_r, v_1..v_r)`, `N = 2 r + 1`.
#[derive(Debug, Clone)]
pub(crate) struct Exact {
    pub scale: f32,
    pub causal: bool,
    pub masks: Arc<Masks>,
}

/// Inputs, output, and the log-sum-exp of each query's scores, `[batch, heads, queries]`.
#[derive(Clone)]
pub(crate) struct Saved<const N: usize> {
    inputs: [FlexTensor; N],
    output: FlexTensor,
    log_sums: Vec<f32>,
}

impl<const N: usize> Function<N> for Exact {
    type Saved = Saved<N>;

    fn forward(&self, inputs: [FlexTensor; N]) -> (FlexTensor, Saved<N>) {
        let inputs = inputs.map(|x| x.to_contiguous());
        let data = inputs.each_ref().map(floats);
        let shapes = Shapes::of(&inputs);
        let mut output = vec![0.0; shapes.batch * shapes.heads * shapes.queries * shapes.value_width];
        let mut log_sums = vec![0.0; shapes.batch * shapes.heads * shapes.queries];
        if !output.is_empty() {
            let heads = output
                .par_chunks_exact_mut(shapes.queries * shapes.value_width)
                .zip(log_sums.par_chunks_exact_mut(shapes.queries));
            heads.enumerate().for_each(|(head, (output, log_sums))| {
                let head = Head::new(self, &shapes, &data, head);
                let blocks =
                    output.par_chunks_mut(QUERIES * shapes.value_width).zip(log_sums.par_chunks_mut(QUERIES));
                blocks.enumerate().for_each(|(block, (output, log_sums))| {
                    let first = block * QUERIES;
                    head.attend(first..first + log_sums.len(), output, log_sums);
                });
            });
        }
        drop(data);
        let output = tensor(output, [shapes.batch, shapes.heads, shapes.queries, shapes.value_width]);
        (output.clone(), Saved { inputs, output, log_sums })
    }

    fn backward(
        &self,
        Saved { inputs, output, log_sums }: Saved<N>,
        upstream: FlexTensor,
        _: [bool; N],
    ) -> [Option<FlexTensor>; N] {
        let data = inputs.each_ref().map(floats);
        let (output, upstream) = (floats(&output), floats(&upstream));
        let shapes = Shapes::of(&inputs);
        let slice = shapes.queries.div_ceil(SLICES).next_multiple_of(QUERIES).max(1);
        let slices = shapes.queries.div_ceil(slice);
        // Every slice of every head by itself, then those of a head one after the other.
        let parts: Vec<Gradients> = (0..shapes.batch * shapes.heads * slices)
            .into_par_iter()
            .map(|part| {
                let (number, first) = (part / slices, part % slices * slice);
                let head = Head::new(self, &shapes, &data, number);
                let mut gradients = Gradients::zeros(&shapes);
                let last = shapes.queries.min(first + slice);
                for first in (first..last).step_by(QUERIES) {
                    let rows = first..last.min(first + QUERIES);
                    let at = number * shapes.queries;
                    let values = |x: &'_ [f32]| -> Vec<f32> {
                        x[(at + rows.start) * shapes.value_width..(at + rows.end) * shapes.value_width]
                            .to_vec()
                    };
                    let log_sums = &log_sums[at + rows.start..at + rows.end];
                    head.pull_back(
                        rows.clone(),
                        &values(&output),
                        &values(&upstream),
                        log_sums,
                        &mut gradients,
                    );
                }
                gradients
            })
            .collect();

        let sums = parts.chunks(slices.max(1)).map(Gradients::total);
        let mut all: [Vec<f32>; N] = std::array::from_fn(|_| Vec::new());
        for sum in sums {
            let of_head = std::iter::once(sum.q).chain(sum.keys).chain(sum.values);
            all.iter_mut().zip(of_head).for_each(|(all, gradient)| all.extend(gradient));
        }
        let mut shapes = inputs.iter().map(|x| x.layout().shape().clone());
        all.map(|gradient| shapes.next().map(|shape| tensor(gradient, shape)))
    }
}

/// Extents of the inputs.
struct Shapes {
    batch: usize,
    heads: usize,
    queries: usize,
    width: usize,
    value_width: usize,
    /// Rows of each key matrix.
    rows: Vec<usize>,
}

impl Shapes {
    fn of<const N: usize>(inputs: &[FlexTensor; N]) -> Self {
        let order = (N - 1) / 2;
        let q = inputs[0].layout().shape();
        Self {
            batch: q[0],
            heads: q[1],
            queries: q[2],
            width: q[3],
            value_width: inputs[N - 1].layout().shape()[3],
            rows: inputs[1..=order].iter().map(|k| k.layout().shape()[2]).collect(),
        }
    }
}

/// The matrices of one head.
struct Head<'a> {
    shapes: &'a Shapes,
    scale: f32,
    causal: bool,
    /// `[queries, width]`
    q: &'a [f32],
    /// r of `[rows, width]`
    keys: Vec<&'a [f32]>,
    /// r of `[rows, value width]`
    values: Vec<&'a [f32]>,
    /// r times which rows may be seen
    masks: Vec<Option<&'a [bool]>>,
}

/// One block: the products of its queries and prefixes, and what they see.
struct Block {
    /// The prefixes' indices `(j_1..j_{r-1})`, one after another.
    indices: Vec<usize>,
    /// Products of the prefixes' keys, `[prefixes, width]`
    prefix_keys: Vec<f32>,
    /// Products of the prefixes' values, `[prefixes, value width]`
    prefix_values: Vec<f32>,
    /// Products of queries and prefix keys, `[queries · prefixes, width]`
    composite: Vec<f32>,
    /// Scores, then weights, `[queries · prefixes, last rows]`
    scores: Vec<f32>,
}

impl<'a> Head<'a> {
    fn new<const N: usize>(
        exact: &'a Exact,
        shapes: &'a Shapes,
        data: &'a [std::borrow::Cow<'a, [f32]>; N],
        number: usize,
    ) -> Self {
        let order = shapes.rows.len();
        let part = |x: &'a [f32], size: usize| &x[number * size..(number + 1) * size];
        let matrices = |from: usize, width: usize| -> Vec<&'a [f32]> {
            shapes.rows.iter().zip(&data[from..]).map(|(rows, x)| part(x, rows * width)).collect()
        };
        let mask = |l: usize| {
            let mask = exact.masks.0.get(l).and_then(Option::as_ref)?;
            let row = number / shapes.heads;
            Some(&mask[row * shapes.rows[l]..(row + 1) * shapes.rows[l]])
        };
        Self {
            shapes,
            scale: exact.scale,
            causal: exact.causal,
            q: part(&data[0], shapes.queries * shapes.width),
            keys: matrices(1, shapes.width),
            values: matrices(1 + order, shapes.value_width),
            masks: (0..order).map(mask).collect(),
        }
    }

    /// Rows of each key matrix that the queries before `end` can see at all.
    fn visible(&self, end: usize) -> Vec<usize> {
        self.shapes.rows.iter().map(|&rows| if self.causal { rows.min(end) } else { rows }).collect()
    }

    /// The blocks of prefixes for some queries, with their scores.
    fn for_each_block(&self, queries: Range<usize>, mut work: impl FnMut(&mut Block, usize)) {
        let visible = self.visible(queries.end);
        let (&last, prefix_rows) = visible.split_last().expect("the order is at least 1");
        let prefixes: usize = if last == 0 { 0 } else { prefix_rows.iter().product() };
        for first in (0..prefixes).step_by(PREFIXES) {
            let count = PREFIXES.min(prefixes - first);
            let mut block = self.block(&queries, prefix_rows, first..first + count);
            block.scores = vec![0.0; queries.len() * count * last];
            let rows = queries.len() * count;
            let keys = Mat::new(self.keys[prefix_rows.len()], last, self.shapes.width);
            let composite = Mat::new(&block.composite, rows, self.shapes.width);
            gemm(&mut block.scores, last, Out::Set, composite, keys.t());
            self.scale_and_hide(&queries, &mut block, count, last);
            work(&mut block, last);
        }
    }

    /// The products of some prefixes, and of the queries with them.
    fn block(&self, queries: &Range<usize>, prefix_rows: &[usize], prefixes: Range<usize>) -> Block {
        let (width, value_width) = (self.shapes.width, self.shapes.value_width);
        let parts = prefix_rows.len();
        let mut indices = vec![0; prefixes.len() * parts];
        let mut prefix_keys = vec![1.0; prefixes.len() * width];
        let mut prefix_values = vec![1.0; prefixes.len() * value_width];
        for (p, number) in prefixes.clone().enumerate() {
            let mut rest = number;
            for l in (0..parts).rev() {
                let index = rest % prefix_rows[l];
                rest /= prefix_rows[l];
                indices[p * parts + l] = index;
                multiply(&mut prefix_keys[p * width..][..width], &self.keys[l][index * width..]);
                multiply(
                    &mut prefix_values[p * value_width..][..value_width],
                    &self.values[l][index * value_width..],
                );
            }
        }
        let mut composite = Vec::with_capacity(queries.len() * prefixes.len() * width);
        for i in queries.clone() {
            let q = &self.q[i * width..][..width];
            for keys in prefix_keys.chunks_exact(width) {
                composite.extend(q.iter().zip(keys).map(|(q, k)| q * k));
            }
        }
        Block { indices, prefix_keys, prefix_values, composite, scores: Vec::new() }
    }

    /// Scales the scores of a block; those that a query may not see become -∞.
    fn scale_and_hide(&self, queries: &Range<usize>, block: &mut Block, count: usize, last: usize) {
        let parts = self.shapes.rows.len() - 1;
        let last_mask = self.masks[parts];
        for (row, scores) in block.scores.chunks_exact_mut(last).enumerate() {
            let (i, p) = (queries.start + row / count, row % count);
            let prefix = &block.indices[p * parts..][..parts];
            let hidden = prefix.iter().enumerate().any(|(l, &index)| {
                self.causal && index > i || self.masks[l].is_some_and(|mask| !mask[index])
            });
            if hidden {
                scores.fill(f32::NEG_INFINITY);
                continue;
            }
            scores.iter_mut().for_each(|score| *score *= self.scale);
            if self.causal && i + 1 < last {
                scores[i + 1..].fill(f32::NEG_INFINITY);
            }
            if let Some(mask) = last_mask {
                let hidden = scores.iter_mut().zip(mask).filter(|(_, seen)| !**seen);
                hidden.for_each(|(score, _)| *score = f32::NEG_INFINITY);
            }
        }
    }

    /// Output and log-sum-exp of some queries, by a running softmax over the blocks of prefixes.
    fn attend(&self, queries: Range<usize>, output: &mut [f32], log_sums: &mut [f32]) {
        let width = self.shapes.value_width;
        let mut highest = vec![f32::NEG_INFINITY; queries.len()];
        let mut sums = vec![0.0f32; queries.len()];
        output.fill(0.0);
        self.for_each_block(queries.clone(), |block, last| {
            let count = block.scores.len() / (queries.len() * last);
            for (i, scores) in block.scores.chunks_exact_mut(count * last).enumerate() {
                let before = highest[i];
                let (now, sum) = simd(
                    #[inline(always)]
                    || exponentiate(scores, before),
                );
                if now == f32::NEG_INFINITY {
                    continue; // nothing seen yet
                }
                let fade = exp(before - now);
                output[i * width..][..width].iter_mut().for_each(|o| *o *= fade);
                (highest[i], sums[i]) = (now, sums[i] * fade + sum);
            }
            let read = self.read_last_values(block, last);
            for (row, read) in read.chunks_exact(width).enumerate() {
                let (i, p) = (row / count, row % count);
                let prefix = &block.prefix_values[p * width..][..width];
                let output = &mut output[i * width..][..width];
                output.iter_mut().zip(prefix).zip(read).for_each(|((o, v), u)| *o += v * u);
            }
        });
        for (i, output) in output.chunks_exact_mut(width).enumerate() {
            let seen = sums[i] != 0.0;
            output.iter_mut().for_each(|o| *o = if seen { *o / sums[i] } else { 0.0 });
            log_sums[i] = if seen { highest[i] + sums[i].ln() } else { f32::NEG_INFINITY };
        }
    }

    /// The weights of a block times the last values, `[queries · prefixes, value width]`.
    fn read_last_values(&self, block: &Block, last: usize) -> Vec<f32> {
        let width = self.shapes.value_width;
        let rows = block.scores.len() / last;
        let values = self.values.last().expect("the order is at least 1");
        let mut read = vec![0.0; rows * width];
        gemm(&mut read, width, Out::Set, Mat::new(&block.scores, rows, last), Mat::new(values, last, width));
        read
    }

    /// Adds the gradients that the outputs of some queries give.
    ///
    /// With `dp = ⟨dO_i, V1 ⊙ … ⊙ Vr⟩` for a tuple of weight `p`, its score has the gradient
    /// `dS = p (dp - ⟨dO_i, O_i⟩)`; everything else is the product rule.
    fn pull_back(
        &self,
        queries: Range<usize>,
        output: &[f32],
        d_output: &[f32],
        log_sums: &[f32],
        gradients: &mut Gradients,
    ) {
        let (width, value_width) = (self.shapes.width, self.shapes.value_width);
        let order = self.shapes.rows.len();
        let of_query = |x: &'_ [f32], i: usize| -> Vec<f32> { x[i * value_width..][..value_width].to_vec() };
        let deltas: Vec<f32> =
            (0..queries.len()).map(|i| dot(&of_query(output, i), &of_query(d_output, i))).collect();
        self.for_each_block(queries.clone(), |block, last| {
            let rows = block.scores.len() / last;
            let count = rows / queries.len();
            let last_keys = Mat::new(self.keys[order - 1], last, width);
            let last_values = Mat::new(self.values[order - 1], last, value_width);

            // The weights, from the scores.
            for (row, scores) in block.scores.chunks_exact_mut(last).enumerate() {
                let log_sum = log_sums[row / count];
                if log_sum == f32::NEG_INFINITY {
                    scores.fill(0.0);
                    continue;
                }
                simd(
                    #[inline(always)]
                    || {
                        for score in scores.iter_mut() {
                            *score = exp(*score - log_sum);
                        }
                    },
                );
            }
            let weights = Mat::new(&block.scores, rows, last);

            // What a prefix's values and the output's gradient make together: [queries · prefixes, value width]
            let mut upstream = Vec::with_capacity(rows * value_width);
            for d_output in d_output.chunks_exact(value_width) {
                for prefix in block.prefix_values.chunks_exact(value_width) {
                    upstream.extend(d_output.iter().zip(prefix).map(|(d, v)| d * v));
                }
            }
            let upstream_matrix = Mat::new(&upstream, rows, value_width);
            let d_values = &mut gradients.values[order - 1];
            gemm(d_values, value_width, Out::Add, weights.t(), upstream_matrix);

            let read = self.read_last_values(block, last);
            let mut d_prefix_values = vec![0.0; count * value_width];
            for (row, read) in read.chunks_exact(value_width).enumerate() {
                let d_output = &d_output[row / count * value_width..][..value_width];
                let sum = &mut d_prefix_values[row % count * value_width..][..value_width];
                sum.iter_mut().zip(read).zip(d_output).for_each(|((sum, u), d)| *sum += u * d);
            }

            let mut d_scores = vec![0.0; rows * last];
            gemm(&mut d_scores, last, Out::Set, upstream_matrix, last_values.t());
            for (row, (d_scores, weights)) in
                d_scores.chunks_exact_mut(last).zip(block.scores.chunks_exact(last)).enumerate()
            {
                let (delta, scale) = (deltas[row / count], self.scale);
                simd(
                    #[inline(always)]
                    || {
                        for (d, p) in d_scores.iter_mut().zip(weights) {
                            *d = scale * p * (*d - delta);
                        }
                    },
                );
            }
            let d_scores_matrix = Mat::new(&d_scores, rows, last);
            let composite = Mat::new(&block.composite, rows, width);
            gemm(&mut gradients.keys[order - 1], width, Out::Add, d_scores_matrix.t(), composite);

            let mut d_composite = vec![0.0; rows * width];
            gemm(&mut d_composite, width, Out::Set, d_scores_matrix, last_keys);
            let mut d_prefix_keys = vec![0.0; count * width];
            for (row, d) in d_composite.chunks_exact(width).enumerate() {
                let (i, p) = (queries.start + row / count, row % count);
                let q = &self.q[i * width..][..width];
                let keys = &block.prefix_keys[p * width..][..width];
                let d_q = &mut gradients.q[i * width..][..width];
                d_q.iter_mut().zip(d).zip(keys).for_each(|((sum, d), k)| *sum += d * k);
                let d_keys = &mut d_prefix_keys[p * width..][..width];
                d_keys.iter_mut().zip(d).zip(q).for_each(|((sum, d), q)| *sum += d * q);
            }

            let parts = order - 1;
            for p in 0..count {
                let prefix = &block.indices[p * parts..][..parts];
                let d = &d_prefix_keys[p * width..][..width];
                share(prefix, &self.keys, d, &mut gradients.keys);
                let d = &d_prefix_values[p * value_width..][..value_width];
                share(prefix, &self.values, d, &mut gradients.values);
            }
        });
    }
}

/// Replaces scores by their exponentials relative to the highest of them and of `before`; that and their sum. Where all are
/// -∞ the exponentials are 0.
#[inline(always)]
fn exponentiate(scores: &mut [f32], before: f32) -> (f32, f32) {
    // NaN wins, so that it reaches the output.
    let highest = fold(
        scores,
        before,
        #[inline(always)]
        |score| score,
        #[inline(always)]
        |a, b| if b > a || b.is_nan() { b } else { a },
    );
    let shift = if highest == f32::NEG_INFINITY { 0.0 } else { highest };
    for score in scores.iter_mut() {
        *score = exp(*score - shift);
    }
    let sum = sum_of(
        scores,
        #[inline(always)]
        |weight| weight,
    );
    (highest, sum)
}

/// The gradient `d` of a product of rows, shared out to the rows: each gets `d` times the other rows.
fn share(indices: &[usize], factors: &[&[f32]], d: &[f32], gradients: &mut [Vec<f32>]) {
    let width = d.len();
    for (l, &index) in indices.iter().enumerate() {
        let mut others = d.to_vec();
        for (m, &other) in indices.iter().enumerate().filter(|(m, _)| *m != l) {
            multiply(&mut others, &factors[m][other * width..]);
        }
        axpy(1.0, &others, &mut gradients[l][index * width..][..width]);
    }
}

/// `a ← a ⊙ b` as far as `a` goes.
fn multiply(a: &mut [f32], b: &[f32]) {
    a.iter_mut().zip(b).for_each(|(a, b)| *a *= b);
}

/// Gradients of one head's inputs.
struct Gradients {
    q: Vec<f32>,
    keys: Vec<Vec<f32>>,
    values: Vec<Vec<f32>>,
}

impl Gradients {
    fn zeros(shapes: &Shapes) -> Self {
        let matrices = |width: usize| shapes.rows.iter().map(|rows| vec![0.0; rows * width]).collect();
        Self {
            q: vec![0.0; shapes.queries * shapes.width],
            keys: matrices(shapes.width),
            values: matrices(shapes.value_width),
        }
    }

    /// The sum of the parts of one head, in their order.
    fn total(parts: &[Self]) -> Self {
        let sum = |pick: &dyn Fn(&Self) -> &Vec<f32>| {
            let mut sum = pick(&parts[0]).clone();
            parts[1..].iter().for_each(|part| axpy(1.0, pick(part), &mut sum));
            sum
        };
        let order = parts[0].keys.len();
        Self {
            q: sum(&|part| &part.q),
            keys: (0..order).map(|l| sum(&|part| &part.keys[l])).collect(),
            values: (0..order).map(|l| sum(&|part| &part.values[l])).collect(),
        }
    }
}
