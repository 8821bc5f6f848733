//! Convolutions whose groups have one input channel each: too little for a matrix product.

use std::ops::Range;

use rayon::prelude::*;

use super::Finish;
use super::geometry::{Geometry, Run};
use crate::simd;
use crate::vector::{axpy, dot, fma};

/// `y = w ∗ x + b`.
pub(super) fn forward(
    geometry: &Geometry,
    x: &[f32],
    weight: &[f32],
    bias: &[f32],
    y: &mut [f32],
    finish: &impl Finish,
) {
    let (plane, taps) = (geometry.output_plane(), geometry.taps());
    let channels = geometry.groups * geometry.outputs;
    let phases = (geometry.input[0] == 1 && geometry.kernel[0] == 1).then(|| Phases::new(geometry));
    let runs = phases.is_none().then(|| geometry.runs(&(0..plane)));
    let work = |scratch: &mut Scratch, (row, y): (usize, &mut [f32])| {
        let (channel, x) = (row % channels, plane_of(geometry, x, row));
        let weight = &weight[channel * taps..][..taps];
        let bias = bias.get(channel).copied().unwrap_or(0.0);
        if let Some(phases) = &phases {
            phases.convolve(x, weight, bias, scratch, y);
        }
        if let Some(runs) = &runs {
            y.fill(bias);
            each_seen(runs, geometry.stride[2], |tap, outputs, inputs| {
                add(weight[tap], &x[inputs], geometry.stride[2], &mut y[outputs]);
            });
        }
        finish.call(row * plane, y);
    };
    y.par_chunks_mut(plane.max(1))
        .enumerate()
        .with_min_len((TASK / plane.max(1)).max(1))
        .for_each_init(Scratch::default, work);
}

/// Outputs below which a plane does not make a task of its own.
const TASK: usize = 1 << 12;
/// Outputs that are summed up together, in registers.
const LANES: usize = 32;

/// How a plane lies for [`Phases::convolve`]: padded, and divided into one plane for each pair of remainders of row and column by the
/// strides, so that what neighbouring outputs see through one tap lies side by side.
struct Phases {
    /// Height and width of the input and of the output.
    input: [usize; 2],
    output: [usize; 2],
    stride: [usize; 2],
    before: [usize; 2],
    /// Rows and columns of one phase.
    rows: usize,
    columns: usize,
    /// Where the first output finds its input for every tap.
    starts: Vec<usize>,
}

/// Room for a plane in phases and for its outputs, with a gap after each row.
#[derive(Default)]
struct Scratch {
    phases: Vec<f32>,
    outputs: Vec<f32>,
}

impl Phases {
    fn new(geometry: &Geometry) -> Self {
        let last_two = |extents: [usize; 3]| [extents[1], extents[2]];
        let [input, output, kernel] = [geometry.input, geometry.output, geometry.kernel].map(last_two);
        let [stride, dilation, before] = [geometry.stride, geometry.dilation, geometry.before].map(last_two);
        // Every output finds all of its taps in there.
        let extent = |axis: usize| {
            let reach = (output[axis].max(1) - 1) * stride[axis] + dilation[axis] * (kernel[axis] - 1) + 1;
            reach.max(before[axis] + input[axis]).div_ceil(stride[axis])
        };
        let (rows, columns) = (extent(0), extent(1));
        let start = |tap: usize| {
            let [row, column] = [tap / kernel[1] * dilation[0], tap % kernel[1] * dilation[1]];
            let phase = row % stride[0] * stride[1] + column % stride[1];
            (phase * rows + row / stride[0]) * columns + column / stride[1]
        };
        let starts = (0..kernel[0] * kernel[1]).map(start).collect();
        Self { input, output, stride, before, rows, columns, starts }
    }

    fn convolve(&self, x: &[f32], weight: &[f32], bias: f32, scratch: &mut Scratch, y: &mut [f32]) {
        let phase = self.rows * self.columns;
        let len = (self.output[0] * self.columns).next_multiple_of(LANES);
        // The padding stays 0 from plane to plane; the last block of outputs reads beyond the last phase.
        let furthest = self.starts.iter().max().copied().unwrap_or(0) + len;
        scratch.phases.resize(furthest.max(self.stride[0] * self.stride[1] * phase), 0.0);
        scratch.outputs.resize(len, 0.0);
        self.divide(x, &mut scratch.phases);
        // Nine taps in one pass, since most kernels have so many.
        let (starts, rest) = self.starts.as_chunks::<9>();
        let (weights, rest_of_weight) = weight.as_chunks::<9>();
        let mut base = Some(bias);
        for (starts, weights) in starts.iter().zip(weights) {
            add_taps(starts, weights, &scratch.phases, base.take(), &mut scratch.outputs);
        }
        for (&start, &weight) in rest.iter().zip(rest_of_weight) {
            add_taps(&[start], &[weight], &scratch.phases, base.take(), &mut scratch.outputs);
        }
        let width = self.output[1];
        for (y, outputs) in y.chunks_exact_mut(width.max(1)).zip(scratch.outputs.chunks(self.columns)) {
            y.copy_from_slice(&outputs[..width]);
        }
    }

    /// Puts a plane into its phases.
    fn divide(&self, x: &[f32], phases: &mut [f32]) {
        let ([_, width], [tall, wide]) = (self.input, self.stride);
        for (row, x) in (self.before[0]..).zip(x.chunks_exact(width)) {
            for phase in 0..wide {
                // The first element whose padded column has this remainder.
                let first = (phase + wide - self.before[1] % wide) % wide;
                let number = row % tall * wide + phase;
                let at = (number * self.rows + row / tall) * self.columns + (self.before[1] + first) / wide;
                let x = x.get(first..).unwrap_or_default();
                match wide {
                    1 => phases[at..at + width].copy_from_slice(x),
                    2 => {
                        let (pairs, last) = x.as_chunks::<2>();
                        let (places, rest) = phases[at..].split_at_mut(pairs.len());
                        simd(
                            #[inline(always)]
                            || places.iter_mut().zip(pairs).for_each(|(place, pair)| *place = pair[0]),
                        );
                        rest.iter_mut().zip(last).for_each(|(place, x)| *place = *x);
                    }
                    _ => {
                        phases[at..].iter_mut().zip(x.iter().step_by(wide)).for_each(|(place, x)| *place = *x)
                    }
                }
            }
        }
    }
}

/// Adds what is seen through some taps to `base`, or to what the outputs are, a multiple of [`LANES`].
fn add_taps<const TAPS: usize>(
    starts: &[usize; TAPS],
    weights: &[f32; TAPS],
    seen: &[f32],
    base: Option<f32>,
    outputs: &mut [f32],
) {
    simd(
        #[inline(always)]
        || {
            for (block, outputs) in outputs.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
                let mut sums = base.map_or(*outputs, |base| [base; LANES]);
                for (start, &weight) in starts.iter().zip(weights) {
                    let seen = seen[start + block * LANES..].first_chunk::<LANES>();
                    let seen = seen.expect("the phases reach beyond the last output");
                    for lane in 0..LANES {
                        sums[lane] = fma(weight, seen[lane], sums[lane]);
                    }
                }
                *outputs = sums;
            }
        },
    );
}

/// The gradient of the input.
pub(super) fn input_gradient(geometry: &Geometry, d_output: &[f32], weight: &[f32]) -> Vec<f32> {
    let (plane, taps, outputs) = (geometry.output_plane(), geometry.taps(), geometry.outputs);
    let mut d_input = vec![0.0; geometry.batch * geometry.groups * geometry.input_plane()];
    let runs = geometry.runs(&(0..plane));
    d_input.par_chunks_mut(geometry.input_plane().max(1)).enumerate().for_each(|(row, d_input)| {
        for output in 0..outputs {
            let d_output = &d_output[(row * outputs + output) * plane..][..plane];
            let weight = &weight[(row % geometry.groups * outputs + output) * taps..][..taps];
            each_seen(&runs, geometry.stride[2], |tap, outputs, inputs| {
                add_back(weight[tap], &d_output[outputs], geometry.stride[2], &mut d_input[inputs]);
            });
        }
    });
    d_input
}

/// The gradient of the weight.
pub(super) fn weight_gradient(geometry: &Geometry, x: &[f32], d_output: &[f32]) -> Vec<f32> {
    let (plane, taps) = (geometry.output_plane(), geometry.taps());
    let channels = geometry.groups * geometry.outputs;
    let mut d_weight = vec![0.0; channels * taps];
    let runs = geometry.runs(&(0..plane));
    d_weight.par_chunks_mut(taps).enumerate().for_each(|(channel, d_weight)| {
        for image in 0..geometry.batch {
            let row = image * channels + channel;
            let (x, d_output) = (plane_of(geometry, x, row), &d_output[row * plane..][..plane]);
            each_seen(&runs, geometry.stride[2], |tap, outputs, inputs| {
                d_weight[tap] += product(&x[inputs], geometry.stride[2], &d_output[outputs]);
            });
        }
    });
    d_weight
}

/// The plane of the input that row `row` of all output channels sees.
fn plane_of<'a>(geometry: &Geometry, x: &'a [f32], row: usize) -> &'a [f32] {
    let plane = geometry.input_plane();
    &x[row / geometry.outputs * plane..][..plane]
}

/// Hands `work` each tap with the outputs that see an input through it, row by row, and those inputs.
fn each_seen(runs: &[Vec<Run>], stride: usize, mut work: impl FnMut(usize, Range<usize>, Range<usize>)) {
    for (tap, runs) in runs.iter().enumerate() {
        for Run { seeing, start } in runs {
            work(tap, seeing.clone(), *start..start + (seeing.len() - 1) * stride + 1);
        }
    }
}

/// `y += a x`, with every `stride`-th element of `x`.
fn add(a: f32, x: &[f32], stride: usize, y: &mut [f32]) {
    simd(
        #[inline(always)]
        || match stride {
            1 => axpy(a, x, y),
            _ => y.iter_mut().zip(x.chunks(stride)).for_each(|(y, x)| *y = fma(a, x[0], *y)),
        },
    );
}

/// `x += a y`, to every `stride`-th element of `x`.
fn add_back(a: f32, y: &[f32], stride: usize, x: &mut [f32]) {
    simd(
        #[inline(always)]
        || match stride {
            1 => axpy(a, y, x),
            _ => x.chunks_mut(stride).zip(y).for_each(|(x, &y)| x[0] = fma(a, y, x[0])),
        },
    );
}

/// `Σ x y`, with every `stride`-th element of `x`.
fn product(x: &[f32], stride: usize, y: &[f32]) -> f32 {
    simd(
        #[inline(always)]
        || match stride {
            1 => dot(x, y),
            _ => x.chunks(stride).zip(y).fold(0.0, |sum, (x, &y)| fma(x[0], y, sum)),
        },
    )
}
