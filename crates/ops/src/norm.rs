//! Normalisation of each row: layer norm and RMS norm.

use burn::tensor::{DType, Tensor};
use burn_flex::FlexTensor;
use rayon::prelude::*;

use crate::blocks::{BLOCKS_PER_TASK, rows_at_once};
use crate::flex::{floats, tensor};
use crate::function::{Function, apply, runs_natively};
use crate::simd;
use crate::vector::{dot, fma, sum_of};

/// `(x - mean) / √(variance + ε) · weight + bias`, mean and variance over the last axis
/// (Ba, Kiros and Hinton, "Layer Normalization", arXiv 1607.06450).
///
/// # Shapes
/// - x, output: `[..., width]`
/// - weight, bias: `[width]`
pub fn layer_norm<const D: usize>(
    x: Tensor<D>,
    weight: Tensor<1>,
    bias: Option<Tensor<1>>,
    epsilon: f64,
) -> Tensor<D> {
    if !runs_natively(&x) || !runs_natively(&weight) {
        return burn::tensor::module::layer_norm(x, weight, bias, epsilon);
    }
    let bias = bias.unwrap_or_else(|| Tensor::empty([0], &x.device()));
    let inputs = [x.into_dispatch(), weight.into_dispatch(), bias.into_dispatch()];
    Tensor::from_dispatch(apply(&Norm { centred: true, epsilon: epsilon as f32 }, inputs))
}

/// `x / √(mean of x² + ε) · weight`, the mean over the last axis
/// (Zhang and Sennrich, "Root Mean Square Layer Normalization", arXiv 1910.07467).
///
/// # Shapes
/// - x, output: `[..., width]`
/// - weight: `[width]`
pub fn rms_norm<const D: usize>(x: Tensor<D>, weight: Tensor<1>, epsilon: f64) -> Tensor<D> {
    if !runs_natively(&x) || !runs_natively(&weight) {
        let dtype = x.dtype();
        // Squares of half-precision numbers overflow early.
        let wide = if dtype == DType::F64 { x.clone() } else { x.clone().cast(DType::F32) };
        let mean_square = wide.square().mean_dim(D - 1);
        return x / (mean_square + epsilon).sqrt().cast(dtype) * weight.unsqueeze();
    }
    let bias = Tensor::<1>::empty([0], &x.device());
    let inputs = [x.into_dispatch(), weight.into_dispatch(), bias.into_dispatch()];
    Tensor::from_dispatch(apply(&Norm { centred: false, epsilon: epsilon as f32 }, inputs))
}

/// Layer norm, or without centring RMS norm; a bias without elements is none.
#[derive(Debug, Clone)]
struct Norm {
    centred: bool,
    epsilon: f32,
}

/// Mean (0 where rows are not centred) and reciprocal deviation of a row.
#[derive(Clone, Copy, Default)]
struct Statistics {
    mean: f32,
    scale: f32,
}

#[derive(Clone)]
struct Saved {
    x: FlexTensor,
    weight: FlexTensor,
    bias: bool,
    rows: Vec<Statistics>,
}

impl Function<3> for Norm {
    type Saved = Saved;

    fn forward(&self, [x, weight, bias]: [FlexTensor; 3]) -> (FlexTensor, Saved) {
        let shape = x.layout().shape().clone();
        let width = shape[shape.num_dims() - 1];
        assert_eq!(
            weight.layout().num_elements(),
            width,
            "the weight of a norm must have as many elements as the input's last axis"
        );
        let (values, scales, shifts) = (floats(&x), floats(&weight), floats(&bias));
        let mut output = vec![0.0; values.len()];
        let mut rows = vec![Statistics::default(); values.len() / width.max(1)];
        let at_once = rows_at_once(width);
        let blocks = output
            .par_chunks_mut(at_once * width.max(1))
            .zip(rows.par_chunks_mut(at_once))
            .zip(values.par_chunks(at_once * width.max(1)));
        blocks.with_min_len(BLOCKS_PER_TASK).for_each(|((output, rows), values)| {
            simd(
                #[inline(always)]
                || {
                    let lines = output.chunks_exact_mut(width).zip(values.chunks_exact(width)).zip(rows);
                    for ((y, x), row) in lines {
                        *row = self.statistics(x);
                        normalise(y, x, *row, &scales, &shifts);
                    }
                },
            );
        });
        let has_bias = !shifts.is_empty();
        let output = tensor(output, shape);
        drop((values, scales, shifts));
        (output, Saved { x, weight, bias: has_bias, rows })
    }

    /// With `x̂` the normalised row and `g = dy · weight`:
    /// `dx = scale (g - mean(g) - x̂ mean(g x̂))`, the mean of `g` only where rows are centred;
    /// `dweight = Σ dy x̂`, `dbias = Σ dy` over all rows.
    fn backward(&self, saved: Saved, upstream: FlexTensor, _: [bool; 3]) -> [Option<FlexTensor>; 3] {
        let Saved { x, weight, bias, rows } = saved;
        let shape = x.layout().shape().clone();
        let width = weight.layout().num_elements();
        let (values, scales, d_output) = (floats(&x), floats(&weight), floats(&upstream));
        let mut d_x = vec![0.0; values.len()];
        let at_once = rows_at_once(width);
        let elements = at_once * width.max(1);
        let blocks = d_x
            .par_chunks_mut(elements)
            .zip(values.par_chunks(elements))
            .zip(d_output.par_chunks(elements))
            .zip(rows.par_chunks(at_once));
        // The gradients of weight and bias, block by block, one after the other.
        let partial: Vec<[Vec<f32>; 2]> = blocks
            .with_min_len(BLOCKS_PER_TASK)
            .map(|(((d_x, values), d_output), rows)| {
                let mut sums = [vec![0.0; width], vec![0.0; width]];
                simd(
                    #[inline(always)]
                    || {
                        let lines = d_x
                            .chunks_exact_mut(width)
                            .zip(values.chunks_exact(width))
                            .zip(d_output.chunks_exact(width))
                            .zip(rows);
                        for (((d_x, x), d_y), row) in lines {
                            self.pull_back(d_x, x, d_y, *row, &scales, &mut sums);
                        }
                    },
                );
                sums
            })
            .collect();
        let [mut d_weight, mut d_bias] = [vec![0.0; width], vec![0.0; width]];
        for [weight, bias] in &partial {
            d_weight.iter_mut().zip(weight).for_each(|(sum, x)| *sum += x);
            d_bias.iter_mut().zip(bias).for_each(|(sum, x)| *sum += x);
        }
        [Some(tensor(d_x, shape)), Some(tensor(d_weight, [width])), bias.then(|| tensor(d_bias, [width]))]
    }
}

impl Norm {
    #[inline(always)]
    fn statistics(&self, x: &[f32]) -> Statistics {
        let count = x.len() as f32;
        let mean = if self.centred {
            sum_of(
                x,
                #[inline(always)]
                |x| x,
            ) / count
        } else {
            0.0
        };
        let variance = sum_of(
            x,
            #[inline(always)]
            |x| (x - mean) * (x - mean),
        ) / count;
        Statistics { mean, scale: 1.0 / (variance + self.epsilon).sqrt() }
    }

    #[inline(always)]
    fn pull_back(
        &self,
        d_x: &mut [f32],
        x: &[f32],
        d_y: &[f32],
        Statistics { mean, scale }: Statistics,
        weight: &[f32],
        [d_weight, d_bias]: &mut [Vec<f32>; 2],
    ) {
        let width = x.len();
        let (d_weight, d_bias) = (&mut d_weight[..width], &mut d_bias[..width]);
        for i in 0..width {
            d_x[i] = d_y[i] * weight[i]; // g
            d_weight[i] = fma(d_y[i], (x[i] - mean) * scale, d_weight[i]);
            d_bias[i] += d_y[i];
        }
        let count = width as f32;
        let mean_g = sum_of(
            d_x,
            #[inline(always)]
            |g| g,
        ) / count;
        // mean(g x̂) = scale (Σ g x - mean Σ g) / count
        let mean_gx = scale * (dot(d_x, x) / count - mean * mean_g);
        let mean_g = if self.centred { mean_g } else { 0.0 };
        for i in 0..width {
            let normalised = (x[i] - mean) * scale;
            d_x[i] = scale * (d_x[i] - mean_g - normalised * mean_gx);
        }
    }
}

#[inline(always)]
fn normalise(y: &mut [f32], x: &[f32], Statistics { mean, scale }: Statistics, weight: &[f32], bias: &[f32]) {
    let (x, weight) = (&x[..y.len()], &weight[..y.len()]);
    for i in 0..y.len() {
        y[i] = (x[i] - mean) * scale * weight[i];
    }
    y.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
}
