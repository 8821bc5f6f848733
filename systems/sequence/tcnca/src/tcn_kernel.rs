//! One block of the TCN on the CPU, `x + W silu(conv(x) + b) + c`. Rows pass through convolution, SiLU and product while
//! they are in the cache; nothing but the input is kept for the backward pass, which computes the rest again.

use burn_flex::FlexTensor;
use kiln_ops::dilated_conv::{Taps, by_channel, by_tap, convolve, correlate};
use kiln_ops::flex::{floats, tensor};
use kiln_ops::gemm::Out;
use kiln_ops::vector::sigmoid;
use kiln_ops::{Function, Mat, gemm, simd};
use rayon::prelude::*;

/// Rows that go through a block at once.
const ROWS: usize = 256;
/// Stretches of rows that gradients of parameters are summed over side by side; they are then added in order, so that a
/// sum does not depend on the number of threads.
const STRETCHES: usize = 32;

/// A block as a function of x `[batch, time, channels]`, filters `[channels, kernel]` and their bias `[channels]`, W
/// `[channels, channels]` and c `[channels]`.
#[derive(Debug, Clone)]
pub(crate) struct FusedBlock {
    pub taps: Taps,
}

impl Function<5> for FusedBlock {
    type Saved = [FlexTensor; 5];

    fn forward(&self, inputs: [FlexTensor; 5]) -> (FlexTensor, [FlexTensor; 5]) {
        let data = inputs.each_ref().map(floats);
        let block = Block::new(self.taps, [&data[0], &data[1], &data[2], &data[3], &data[4]]);
        let shape = inputs[0].layout().shape().clone();
        let mut output = vec![0.0; data[0].len()];
        let pieces = pieces(&mut output, shape[1], block.channels, ROWS);
        pieces.into_par_iter().for_each(|(sequence, start, y)| {
            let x = block.sequence(block.x, sequence, shape[1]);
            let mut hidden = block.filtered(x, start, y.len());
            silu(&mut hidden);
            y.copy_from_slice(&x[start * block.channels..][..y.len()]);
            add_to_rows(y, block.mix_bias);
            block.product(y, Out::Add, &hidden, block.mix());
        });
        drop(data);
        (tensor(output, shape), inputs)
    }

    fn backward(
        &self,
        inputs: [FlexTensor; 5],
        upstream: FlexTensor,
        _: [bool; 5],
    ) -> [Option<FlexTensor>; 5] {
        let data = inputs.each_ref().map(floats);
        let block = Block::new(self.taps, [&data[0], &data[1], &data[2], &data[3], &data[4]]);
        let (shape, channels) = (inputs[0].layout().shape().clone(), block.channels);
        let time = shape[1];
        let d_y = floats(&upstream);
        let rows = (shape[0] * time).div_ceil(STRETCHES).next_multiple_of(ROWS);

        // Down to the filters' output u.
        let mut d_u = vec![0.0; d_y.len()];
        let parts: Vec<[Vec<f32>; 3]> = pieces(&mut d_u, time, channels, rows)
            .into_par_iter()
            .map(|(sequence, start, d_u)| {
                let (x, d_y) =
                    (block.sequence(block.x, sequence, time), block.sequence(&d_y, sequence, time));
                block.pull_back_mix(d_u, &d_y[start * channels..], x, start)
            })
            .collect();
        let [d_mix, d_mix_bias, d_bias] = summed(parts);

        // Through the filters, beside the residual path.
        let mut d_x = vec![0.0; d_y.len()];
        let parts: Vec<[Vec<f32>; 1]> = pieces(&mut d_x, time, channels, rows)
            .into_par_iter()
            .map(|(sequence, start, d_x)| {
                let (x, d_u) =
                    (block.sequence(block.x, sequence, time), block.sequence(&d_u, sequence, time));
                let here = start * channels..start * channels + d_x.len();
                d_x.copy_from_slice(&block.sequence(&d_y, sequence, time)[here.clone()]);
                convolve(d_x, start, d_u, &block.filters, channels, self.taps.reversed());
                let mut d_filters = vec![0.0; block.filters.len()];
                correlate(&mut d_filters, start, &d_u[here], x, channels, self.taps);
                [d_filters]
            })
            .collect();
        let [d_filters] = summed(parts);

        let shape_of = |input: usize| inputs[input].layout().shape().clone();
        [
            Some(tensor(d_x, shape)),
            Some(tensor(by_channel(&d_filters, channels), shape_of(1))),
            Some(tensor(d_bias, shape_of(2))),
            Some(tensor(d_mix, shape_of(3))),
            Some(tensor(d_mix_bias, shape_of(4))),
        ]
    }
}

/// A block's operands.
struct Block<'a> {
    taps: Taps,
    channels: usize,
    x: &'a [f32],
    /// `[kernel, channels]`
    filters: Vec<f32>,
    bias: &'a [f32],
    /// W `[channels, channels]`
    mix: &'a [f32],
    mix_bias: &'a [f32],
}

impl<'a> Block<'a> {
    fn new(taps: Taps, [x, filters, bias, mix, mix_bias]: [&'a [f32]; 5]) -> Self {
        let channels = bias.len();
        Self { taps, channels, x, filters: by_tap(filters, channels), bias, mix, mix_bias }
    }

    fn mix(&self) -> Mat<'a> {
        Mat::new(self.mix, self.channels, self.channels)
    }

    /// The rows of one sequence.
    fn sequence<'b>(&self, values: &'b [f32], sequence: usize, time: usize) -> &'b [f32] {
        &values[sequence * time * self.channels..][..time * self.channels]
    }

    /// u, the filters' output in `len / channels` rows of the sequence x from `start` on.
    fn filtered(&self, x: &[f32], start: usize, len: usize) -> Vec<f32> {
        let mut u = self.bias.repeat(len / self.channels);
        convolve(&mut u, start, x, &self.filters, self.channels, self.taps);
        u
    }

    /// `out = rows · matrix` or `out += rows · matrix`.
    fn product(&self, out: &mut [f32], mode: Out, rows: &[f32], matrix: Mat<'_>) {
        let count = rows.len() / self.channels;
        gemm(out, self.channels, mode, Mat::new(rows, count, self.channels), matrix);
    }

    /// The gradient of u in the rows from `start` on, and the gradients of W, c and the filters' bias that these rows add.
    fn pull_back_mix(&self, d_u: &mut [f32], d_y: &[f32], x: &[f32], start: usize) -> [Vec<f32>; 3] {
        let channels = self.channels;
        let mut d_mix = vec![0.0; channels * channels];
        let [mut d_mix_bias, mut d_bias] = [vec![0.0; channels], vec![0.0; channels]];
        for (tile, d_u) in d_u.chunks_mut(ROWS * channels).enumerate() {
            let at = tile * ROWS;
            let d_y = &d_y[at * channels..][..d_u.len()];
            let mut hidden = self.filtered(x, start + at, d_u.len());
            self.product(d_u, Out::Set, d_y, self.mix().t());
            silu_and_gradient(&mut hidden, d_u);
            let rows = d_u.len() / channels;
            let (hidden, d_rows) = (Mat::new(&hidden, rows, channels), Mat::new(d_y, rows, channels));
            gemm(&mut d_mix, channels, Out::Add, hidden.t(), d_rows);
            add_rows_up(&mut d_mix_bias, d_y);
            add_rows_up(&mut d_bias, d_u);
        }
        [d_mix, d_mix_bias, d_bias]
    }
}

/// `u ← silu(u)`
fn silu(u: &mut [f32]) {
    simd(
        #[inline(always)]
        || u.iter_mut().for_each(|u| *u *= sigmoid(*u)),
    );
}

/// `u ← silu(u)` and `d ← d silu'(u)`.
fn silu_and_gradient(u: &mut [f32], d: &mut [f32]) {
    simd(
        #[inline(always)]
        || {
            for (u, d) in u.iter_mut().zip(d) {
                let gate = sigmoid(*u);
                *d *= gate * (1.0 + *u * (1.0 - gate));
                *u *= gate;
            }
        },
    );
}

fn add_to_rows(rows: &mut [f32], added: &[f32]) {
    simd(
        #[inline(always)]
        || {
            for row in rows.chunks_exact_mut(added.len()) {
                row.iter_mut().zip(added).for_each(|(x, a)| *x += a);
            }
        },
    );
}

fn add_rows_up(sum: &mut [f32], rows: &[f32]) {
    simd(
        #[inline(always)]
        || {
            for row in rows.chunks_exact(sum.len()) {
                sum.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
            }
        },
    );
}

/// Sums of lists of the same lengths, in order; nothing where there are none.
fn summed<const N: usize>(parts: Vec<[Vec<f32>; N]>) -> [Vec<f32>; N] {
    let mut parts = parts.into_iter();
    let Some(mut sums) = parts.next() else { return std::array::from_fn(|_| Vec::new()) };
    for part in parts {
        for (sum, part) in sums.iter_mut().zip(part) {
            sum.iter_mut().zip(part).for_each(|(sum, x)| *sum += x);
        }
    }
    sums
}

/// The rows of sequences of `time` steps, `rows` at a time, each piece with the number of its sequence and of its first row.
fn pieces(values: &mut [f32], time: usize, channels: usize, rows: usize) -> Vec<(usize, usize, &mut [f32])> {
    let of_sequence = |(sequence, values)| {
        let values: &mut [f32] = values;
        let pieces = values.chunks_mut(rows * channels).enumerate();
        pieces.map(move |(piece, values)| (sequence, piece * rows, values))
    };
    values.chunks_exact_mut(time * channels).enumerate().flat_map(of_sequence).collect()
}
