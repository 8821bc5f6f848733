//! The depthwise convolution with dilation, channels last: every tap is a multiply-add over rows of channels, so that
//! time grows with `time × channels × kernel` whatever the dilation, and nothing is copied.

use burn::tensor::Tensor;
use burn_flex::FlexTensor;
use rayon::prelude::*;

use crate::flex::{floats, tensor};
use crate::function::{Function, apply, runs_natively};
use crate::linear::sum_rows;
use crate::simd;
use crate::vector::fma;

/// How a dilated convolution lies over its input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DilatedConvOptions {
    /// Distance between the steps that neighbouring taps see; at least 1.
    pub dilation: usize,
    /// Steps of zeros before the first and after the last step.
    pub padding: [usize; 2],
}

impl DilatedConvOptions {
    /// Output `t` sees `t` and steps before it.
    pub fn causal(kernel: usize, dilation: usize) -> Self {
        Self { dilation, padding: [(kernel - 1) * dilation, 0] }
    }

    /// Output `t` sees as many steps before as after it; the span `(kernel - 1) dilation` must be even.
    pub fn centred(kernel: usize, dilation: usize) -> Self {
        Self { dilation, padding: [(kernel - 1) * dilation / 2; 2] }
    }
}

/// `y_t = bias + Σ_j w_j ⊙ x_{t - before + j · dilation}`, with zeros outside the sequence.
///
/// # Shapes
/// - x: `[batch, time, channels]`
/// - weight: `[channels, kernel]`
/// - bias: `[channels]`
/// - output: `[batch, time + before + after - (kernel - 1) dilation, channels]`
///
/// # Panics
/// When the shapes do not fit.
pub fn dilated_conv(
    x: Tensor<3>,
    weight: Tensor<2>,
    bias: Option<Tensor<1>>,
    options: DilatedConvOptions,
) -> Tensor<3> {
    let ([batch, time, channels], [width, kernel]) = (x.dims(), weight.dims());
    let DilatedConvOptions { dilation, padding: [before, after] } = options;
    assert_eq!(channels, width, "a depthwise convolution has the weights of one filter a channel");
    assert!(kernel > 0 && dilation > 0, "a convolution needs a tap and a dilation of at least 1");
    let (span, padded) = ((kernel - 1) * dilation, time + before + after);
    assert!(padded >= span, "taps that span {span} steps do not fit {padded} steps of input");
    let outputs = padded - span;
    if !runs_natively(&x) || !runs_natively(&weight) {
        let zeros = |steps| Tensor::<3>::zeros([batch, steps, channels], &x.device());
        let mut parts = vec![zeros(before), x.clone(), zeros(after)];
        parts.retain(|part| part.dims()[1] > 0);
        let x = Tensor::cat(parts, 1);
        let weight = weight.transpose().unsqueeze::<3>(); // [1, kernel, channels]
        let term = |j: usize| x.clone().narrow(1, j * dilation, outputs) * weight.clone().narrow(1, j, 1);
        let y = (1..kernel).fold(term(0), |sum, j| sum + term(j));
        return match bias {
            Some(bias) => y + bias.unsqueeze::<3>(),
            None => y,
        };
    }
    let bias = bias.unwrap_or_else(|| Tensor::empty([0], &x.device()));
    let function = DilatedConv { outputs, taps: Taps { first: -(before as isize), step: dilation as isize } };
    let inputs = [x.into_dispatch(), weight.into_dispatch(), bias.into_dispatch()];
    Tensor::from_dispatch(apply(&function, inputs))
}

/// Which rows of the input an output row sees: row `t` sees `t + first + j · step` through tap `j`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Taps {
    /// Where tap 0 lies relative to the output.
    pub first: isize,
    /// Distance from one tap to the next.
    pub step: isize,
}

impl Taps {
    /// The taps of the adjoint: which outputs an input row contributes to.
    pub fn reversed(self) -> Self {
        Self { first: -self.first, step: -self.step }
    }

    fn offset(self, tap: usize) -> isize {
        self.first + tap as isize * self.step
    }

    /// The least and the greatest offset of so many taps.
    fn extremes(self, kernel: usize) -> (isize, isize) {
        let ends = [self.offset(0), self.offset(kernel - 1)];
        (ends[0].min(ends[1]), ends[0].max(ends[1]))
    }
}

/// Channels that are computed side by side.
const LANES: usize = 16;
/// Output rows whose sums stay in registers together.
const ROWS: usize = 6;
/// Channels whose sums of products stay in registers together.
const WIDE: usize = 64;
/// Rows whose gradients of weights are summed while they are in the cache.
const CACHED_ROWS: usize = 128;

/// `y_t += Σ_j w_j ⊙ x_{t + first + j · step}` for rows `start ..` of the output; rows outside `x` are zeros.
///
/// # Shapes
/// - y: `[rows, channels]`, rows `start .. start + rows` of all
/// - x: `[time, channels]`
/// - weights: `[kernel, channels]`
pub fn convolve(y: &mut [f32], start: usize, x: &[f32], weights: &[f32], channels: usize, taps: Taps) {
    let (time, kernel) = ((x.len() / channels) as isize, weights.len() / channels);
    let (least, greatest) = taps.extremes(kernel);
    simd(
        #[inline(always)]
        || {
            for (tile, y) in y.chunks_mut(ROWS * channels).enumerate() {
                let t = (start + tile * ROWS) as isize;
                if y.len() == ROWS * channels && t + least >= 0 && t + ROWS as isize + greatest <= time {
                    let mut c = 0;
                    while c + LANES <= channels {
                        strip::<LANES>(y, t, x, weights, channels, c, taps);
                        c += LANES;
                    }
                    while c + 4 <= channels {
                        strip::<4>(y, t, x, weights, channels, c, taps);
                        c += 4;
                    }
                    while c < channels {
                        strip::<1>(y, t, x, weights, channels, c, taps);
                        c += 1;
                    }
                } else {
                    for (row, y) in y.chunks_exact_mut(channels).enumerate() {
                        border_row(y, t + row as isize, x, weights, channels, taps);
                    }
                }
            }
        },
    );
}

/// `LANES` channels from `c` on of a whole tile, with its sums in registers.
#[inline(always)]
fn strip<const L: usize>(
    y: &mut [f32],
    t: isize,
    x: &[f32],
    weights: &[f32],
    channels: usize,
    c: usize,
    taps: Taps,
) {
    let mut sums = [[0.0f32; L]; ROWS];
    for (sums, y) in sums.iter_mut().zip(y.chunks_exact(channels)) {
        sums.copy_from_slice(&y[c..c + L]);
    }
    for (tap, weights) in weights.chunks_exact(channels).enumerate() {
        let weights = &weights[c..c + L];
        let at = (t + taps.offset(tap)) as usize * channels + c;
        let x = &x[at..at + (ROWS - 1) * channels + L];
        for row in 0..ROWS {
            let x = &x[row * channels..row * channels + L];
            for lane in 0..L {
                sums[row][lane] = fma(weights[lane], x[lane], sums[row][lane]);
            }
        }
    }
    for (sums, y) in sums.iter().zip(y.chunks_exact_mut(channels)) {
        y[c..c + L].copy_from_slice(sums);
    }
}

/// One row near an end of the sequence.
#[inline(always)]
fn border_row(y: &mut [f32], t: isize, x: &[f32], weights: &[f32], channels: usize, taps: Taps) {
    for (tap, weights) in weights.chunks_exact(channels).enumerate() {
        let Some(x) = row(x, t + taps.offset(tap), channels) else { continue };
        for c in 0..channels {
            y[c] = fma(weights[c], x[c], y[c]);
        }
    }
}

/// A row of the sequence; `None` outside.
#[inline(always)]
fn row(x: &[f32], t: isize, channels: usize) -> Option<&[f32]> {
    let at = usize::try_from(t).ok()? * channels;
    x.get(at..at + channels)
}

/// `d_weights_j += Σ_t d_y_t ⊙ x_{t + first + j · step}` over rows `start ..` of the output.
///
/// # Shapes
/// - d_weights: `[kernel, channels]`
/// - d_y: `[rows, channels]`, rows `start .. start + rows` of all
/// - x: `[time, channels]`
pub fn correlate(d_weights: &mut [f32], start: usize, d_y: &[f32], x: &[f32], channels: usize, taps: Taps) {
    let time = (x.len() / channels) as isize;
    simd(
        #[inline(always)]
        || {
            for (block, d_y) in d_y.chunks(CACHED_ROWS * channels).enumerate() {
                let (t, rows) = ((start + block * CACHED_ROWS) as isize, (d_y.len() / channels) as isize);
                for (tap, d_weights) in d_weights.chunks_exact_mut(channels).enumerate() {
                    // Rows that see a row of the sequence through this tap.
                    let offset = t + taps.offset(tap);
                    let first = (-offset).clamp(0, rows);
                    let last = (time - offset).clamp(first, rows);
                    if first == last {
                        continue;
                    }
                    let d_y = &d_y[first as usize * channels..last as usize * channels];
                    let x = &x[(offset + first) as usize * channels..][..d_y.len()];
                    let mut c = 0;
                    while c + WIDE <= channels {
                        column_products::<WIDE>(d_weights, d_y, x, channels, c);
                        c += WIDE;
                    }
                    while c + LANES <= channels {
                        column_products::<LANES>(d_weights, d_y, x, channels, c);
                        c += LANES;
                    }
                    while c < channels {
                        column_products::<1>(d_weights, d_y, x, channels, c);
                        c += 1;
                    }
                }
            }
        },
    );
}

/// `sum += Σ_t a_t ⊙ b_t` in `L` columns from `c` on, with the sums in registers.
#[inline(always)]
fn column_products<const L: usize>(sum: &mut [f32], a: &[f32], b: &[f32], channels: usize, c: usize) {
    let mut sums = [0.0f32; L];
    for (a, b) in a.chunks_exact(channels).zip(b.chunks_exact(channels)) {
        let (Some(a), Some(b)) = (a[c..].first_chunk::<L>(), b[c..].first_chunk::<L>()) else { return };
        for lane in 0..L {
            sums[lane] = fma(a[lane], b[lane], sums[lane]);
        }
    }
    for lane in 0..L {
        sum[c + lane] += sums[lane];
    }
}

/// Rows that one task computes.
const TASK_ROWS: usize = 256;

/// The convolution as a function of input, weight `[channels, kernel]` and bias, which has no elements where there is none.
#[derive(Debug, Clone)]
struct DilatedConv {
    /// Steps of a sequence's output.
    outputs: usize,
    taps: Taps,
}

#[derive(Clone)]
struct Saved {
    x: FlexTensor,
    weight: FlexTensor,
    bias: bool,
}

impl Function<3> for DilatedConv {
    type Saved = Saved;

    fn forward(&self, [x, weight, bias]: [FlexTensor; 3]) -> (FlexTensor, Saved) {
        let [batch, time, channels] = dims(&x);
        let (values, weights, shifts) = (floats(&x), by_tap(&floats(&weight), channels), floats(&bias));
        let mut output = vec![0.0; batch * self.outputs * channels];
        let tasks = tasks(&mut output, self.outputs, channels);
        tasks.into_par_iter().for_each(|(sequence, start, y)| {
            if !shifts.is_empty() {
                y.chunks_exact_mut(channels).for_each(|y| y.copy_from_slice(&shifts));
            }
            let x = &values[sequence * time * channels..][..time * channels];
            convolve(y, start, x, &weights, channels, self.taps);
        });
        let bias = !shifts.is_empty();
        drop((values, shifts));
        (tensor(output, [batch, self.outputs, channels]), Saved { x, weight, bias })
    }

    /// `dx_s = Σ_j w_j dy_{s - first - j · step}`, `dw_j = Σ_t dy_t x_{t + first + j · step}`, `dbias = Σ_t dy_t`
    fn backward(
        &self,
        Saved { x, weight, bias }: Saved,
        upstream: FlexTensor,
        wanted: [bool; 3],
    ) -> [Option<FlexTensor>; 3] {
        let [batch, time, channels] = dims(&x);
        let (values, weights, d_y) = (floats(&x), by_tap(&floats(&weight), channels), floats(&upstream));
        let outputs = self.outputs * channels;
        let d_x = wanted[0].then(|| {
            let mut d_x = vec![0.0; values.len()];
            let tasks = tasks(&mut d_x, time, channels);
            tasks.into_par_iter().for_each(|(sequence, start, d_x)| {
                let d_y = &d_y[sequence * outputs..][..outputs];
                convolve(d_x, start, d_y, &weights, channels, self.taps.reversed());
            });
            tensor(d_x, [batch, time, channels])
        });
        let d_weight = wanted[1].then(|| {
            let d_weight = weight_gradient(
                &d_y,
                &values,
                [batch, self.outputs, time],
                channels,
                weights.len(),
                self.taps,
            );
            tensor(by_channel(&d_weight, channels), weight.layout().shape().clone())
        });
        let d_bias = (bias && wanted[2]).then(|| tensor(sum_rows(&d_y, channels), [channels]));
        [d_x, d_weight, d_bias]
    }
}

/// `Σ_t dy_t x_{t + first + j · step}` over all sequences, `[kernel, channels]`: stretches of rows side by side, summed in
/// an order that depends on the shape alone.
fn weight_gradient(
    d_y: &[f32],
    x: &[f32],
    [batch, outputs, time]: [usize; 3],
    channels: usize,
    weights: usize,
    taps: Taps,
) -> Vec<f32> {
    let rows = (batch * outputs).div_ceil(STRETCHES).max(CACHED_ROWS);
    let stretches: Vec<(usize, usize)> =
        (0..batch).flat_map(|b| (0..outputs).step_by(rows).map(move |start| (b, start))).collect();
    let parts: Vec<Vec<f32>> = stretches
        .into_par_iter()
        .map(|(b, start)| {
            let mut d_weights = vec![0.0; weights];
            let end = (start + rows).min(outputs);
            let d_y = &d_y[(b * outputs + start) * channels..(b * outputs + end) * channels];
            correlate(
                &mut d_weights,
                start,
                d_y,
                &x[b * time * channels..][..time * channels],
                channels,
                taps,
            );
            d_weights
        })
        .collect();
    parts.into_iter().fold(vec![0.0; weights], |mut sum, part| {
        sum.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
        sum
    })
}

/// Stretches of rows that weights' gradients are summed over side by side.
const STRETCHES: usize = 32;

fn dims(x: &FlexTensor) -> [usize; 3] {
    let shape = x.layout().shape();
    [shape[0], shape[1], shape[2]]
}

/// The rows of sequences of `steps` steps in pieces, each with the number of its sequence and of its first step.
fn tasks(values: &mut [f32], steps: usize, channels: usize) -> Vec<(usize, usize, &mut [f32])> {
    if steps * channels == 0 {
        return Vec::new();
    }
    let pieces = |(sequence, values)| -> Vec<(usize, usize, &mut [f32])> {
        let values: &mut [f32] = values;
        let pieces = values.chunks_mut(TASK_ROWS * channels).enumerate();
        pieces.map(|(piece, values)| (sequence, piece * TASK_ROWS, values)).collect()
    };
    values.chunks_exact_mut(steps * channels).enumerate().flat_map(pieces).collect()
}

/// Weights `[channels, kernel]` as `[kernel, channels]`, the order that [`convolve`] reads.
pub fn by_tap(weights: &[f32], channels: usize) -> Vec<f32> {
    let kernel = weights.len().checked_div(channels).unwrap_or(0);
    (0..kernel).flat_map(|j| (0..channels).map(move |c| weights[c * kernel + j])).collect()
}

/// Weights `[kernel, channels]` as `[channels, kernel]`.
pub fn by_channel(weights: &[f32], channels: usize) -> Vec<f32> {
    let kernel = weights.len().checked_div(channels).unwrap_or(0);
    (0..channels).flat_map(|c| (0..kernel).map(move |j| weights[j * channels + c])).collect()
}
