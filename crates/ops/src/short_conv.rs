//! The depthwise convolution over a few steps of time, channels last.

use burn::tensor::Tensor;
use burn_flex::FlexTensor;
use rayon::prelude::*;

use crate::flex::{floats, tensor};
use crate::function::{Function, apply, runs_natively};
use crate::linear::sum_rows;
use crate::simd;
use crate::vector::fma;

/// Steps that one task computes.
const STEPS: usize = 64;

/// `y_t = bias + Σ_j w_j ⊙ x_{t + j}` wherever all steps that it sees exist: with `kernel - 1` steps before a
/// sequence (zeros, or those of the piece before) it is causal.
///
/// # Shapes
/// - x: `[batch, time + kernel - 1, channels]`
/// - weight: `[kernel, channels]`
/// - bias: `[channels]`
/// - output: `[batch, time, channels]`
///
/// # Panics
/// When the shapes do not fit.
pub fn short_conv(x: Tensor<3>, weight: Tensor<2>, bias: Option<Tensor<1>>) -> Tensor<3> {
    let ([_, seen, channels], [kernel, width]) = (x.dims(), weight.dims());
    assert_eq!(channels, width, "a short convolution has one weight a channel");
    assert!(kernel > 0 && seen + 1 >= kernel, "{kernel} steps of weights do not fit {seen} steps of input");
    let time = seen + 1 - kernel;
    if !runs_natively(&x) || !runs_natively(&weight) {
        let shifted = |j| x.clone().narrow(1, j, time) * weight.clone().narrow(0, j, 1).unsqueeze::<3>();
        let y = (1..kernel).fold(shifted(0), |sum, j| sum + shifted(j));
        return match bias {
            Some(bias) => y + bias.unsqueeze::<3>(),
            None => y,
        };
    }
    let bias = bias.unwrap_or_else(|| Tensor::empty([0], &x.device()));
    let inputs = [x.into_dispatch(), weight.into_dispatch(), bias.into_dispatch()];
    Tensor::from_dispatch(apply(&ShortConv, inputs))
}

#[derive(Debug, Clone)]
struct ShortConv;

#[derive(Clone)]
struct Saved {
    x: FlexTensor,
    weight: FlexTensor,
    bias: bool,
}

/// Extents of a convolution.
#[derive(Clone, Copy)]
struct Extents {
    batch: usize,
    time: usize,
    kernel: usize,
    channels: usize,
}

impl Extents {
    fn of(x: &FlexTensor, weight: &FlexTensor) -> Self {
        let (x, weight) = (x.layout().shape(), weight.layout().shape());
        let (kernel, channels) = (weight[0], weight[1]);
        Self { batch: x[0], time: x[1] + 1 - kernel, kernel, channels }
    }

    /// Elements of a sequence's input.
    fn seen(self) -> usize {
        (self.time + self.kernel - 1) * self.channels
    }

    fn is_empty(self) -> bool {
        self.batch * self.time * self.channels == 0
    }
}

impl Function<3> for ShortConv {
    type Saved = Saved;

    fn forward(&self, [x, weight, bias]: [FlexTensor; 3]) -> (FlexTensor, Saved) {
        let extents @ Extents { batch, time, channels, .. } = Extents::of(&x, &weight);
        let (values, weights, shifts) = (floats(&x), floats(&weight), floats(&bias));
        let mut output = vec![0.0; batch * time * channels];
        if !extents.is_empty() {
            for (y, x) in output.chunks_exact_mut(time * channels).zip(values.chunks_exact(extents.seen())) {
                y.par_chunks_mut(STEPS * channels).enumerate().for_each(|(block, y)| {
                    let x = &x[block * STEPS * channels..];
                    simd(
                        #[inline(always)]
                        || convolve(y, x, &weights, &shifts, channels),
                    );
                });
            }
        }
        let bias = !shifts.is_empty();
        drop((values, weights, shifts));
        (tensor(output, [batch, time, channels]), Saved { x, weight, bias })
    }

    /// `dx_s = Σ_j w_j dy_{s - j}`, `dw_j = Σ_t dy_t x_{t + j}`, `dbias = Σ_t dy_t`
    fn backward(
        &self,
        Saved { x, weight, bias }: Saved,
        upstream: FlexTensor,
        _: [bool; 3],
    ) -> [Option<FlexTensor>; 3] {
        let extents @ Extents { batch, time, kernel, channels } = Extents::of(&x, &weight);
        let (values, weights, d_output) = (floats(&x), floats(&weight), floats(&upstream));
        let mut d_x = vec![0.0; values.len()];
        let mut d_weight = vec![0.0; kernel * channels];
        if !extents.is_empty() {
            let sequences = d_x
                .par_chunks_exact_mut(extents.seen())
                .zip(values.par_chunks_exact(extents.seen()))
                .zip(d_output.par_chunks_exact(time * channels));
            let of_sequences: Vec<Vec<f32>> = sequences
                .map(|((d_x, x), d_y)| {
                    let mut d_weight = vec![0.0; kernel * channels];
                    simd(
                        #[inline(always)]
                        || pull_back(d_x, &mut d_weight, x, d_y, &weights, channels),
                    );
                    d_weight
                })
                .collect();
            for of_sequence in of_sequences {
                d_weight.iter_mut().zip(of_sequence).for_each(|(sum, d)| *sum += d);
            }
        }
        [
            Some(tensor(d_x, [batch, time + kernel - 1, channels])),
            Some(tensor(d_weight, [kernel, channels])),
            bias.then(|| tensor(sum_rows(&d_output, channels), [channels])),
        ]
    }
}

/// The steps of `y`, the first of which sees the first `kernel` steps of `x`.
#[inline(always)]
fn convolve(y: &mut [f32], x: &[f32], weights: &[f32], bias: &[f32], channels: usize) {
    for (t, y) in y.chunks_exact_mut(channels).enumerate() {
        y.iter_mut().zip(bias).for_each(|(y, &b)| *y = b);
        for (j, w) in weights.chunks_exact(channels).enumerate() {
            let x = &x[(t + j) * channels..][..channels];
            for c in 0..channels {
                y[c] = fma(w[c], x[c], y[c]);
            }
        }
    }
}

#[inline(always)]
fn pull_back(
    d_x: &mut [f32],
    d_weight: &mut [f32],
    x: &[f32],
    d_y: &[f32],
    weights: &[f32],
    channels: usize,
) {
    for (t, d_y) in d_y.chunks_exact(channels).enumerate() {
        for (j, (w, d_w)) in
            weights.chunks_exact(channels).zip(d_weight.chunks_exact_mut(channels)).enumerate()
        {
            let at = (t + j) * channels;
            let (x, d_x) = (&x[at..][..channels], &mut d_x[at..][..channels]);
            for c in 0..channels {
                d_x[c] = fma(w[c], d_y[c], d_x[c]);
                d_w[c] = fma(x[c], d_y[c], d_w[c]);
            }
        }
    }
}
