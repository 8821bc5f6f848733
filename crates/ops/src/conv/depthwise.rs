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
    let runs = geometry.runs(&(0..plane));
    y.par_chunks_mut(plane.max(1)).enumerate().for_each(|(row, y)| {
        let (channel, x) = (row % channels, plane_of(geometry, x, row));
        let weight = &weight[channel * taps..][..taps];
        y.fill(bias.get(channel).copied().unwrap_or(0.0));
        each_seen(&runs, geometry.stride[2], |tap, outputs, inputs| {
            add(weight[tap], &x[inputs], geometry.stride[2], &mut y[outputs]);
        });
        finish.call(row * plane, y);
    });
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
