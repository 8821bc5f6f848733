//! Normalisation of each row: layer norm and RMS norm.

use burn::tensor::{DType, Tensor};
use burn_flex::FlexTensor;

use crate::blocks::{changed, changed_with};
use crate::flex::{floats, tensor};
use crate::function::{Function, apply, runs_natively};
use crate::simd;
use crate::vector::{fma, long_dot, sum_of};

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
#[derive(Clone, Copy)]
struct Statistics {
    mean: f32,
    scale: f32,
}

#[derive(Clone)]
struct Saved {
    x: FlexTensor,
    weight: FlexTensor,
    bias: bool,
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
        let (scales, shifts) = (floats(&weight), floats(&bias));
        let output = changed(&floats(&x), width, |_, rows| self.normalise_rows(rows, &scales, &shifts));
        let bias = !shifts.is_empty();
        drop((scales, shifts));
        (tensor(output, shape), Saved { x, weight, bias })
    }

    /// With `x̂` the normalised row and `g = dy · weight`:
    /// `dx = scale (g - mean(g) - x̂ mean(g x̂))`, the mean of `g` only where rows are centred;
    /// `dweight = Σ dy x̂`, `dbias = Σ dy` over all rows. The statistics of a row are cheaper to compute again than to keep.
    fn backward(
        &self,
        Saved { x, weight, bias }: Saved,
        upstream: FlexTensor,
        _: [bool; 3],
    ) -> [Option<FlexTensor>; 3] {
        let width = weight.layout().num_elements();
        let (values, scales) = (floats(&x), floats(&weight));
        // The gradients of weight and bias, task by task.
        let sums = || [vec![0.0; width], vec![0.0; width]];
        let (d_x, partial) = changed_with(&floats(&upstream), width, sums, |sums, first, rows| {
            simd(
                #[inline(always)]
                || {
                    for (d, x) in rows.chunks_exact_mut(width).zip(values[first..].chunks_exact(width)) {
                        self.pull_back(d, x, &scales, sums);
                    }
                },
            );
        });
        let [mut d_weight, mut d_bias] = [vec![0.0; width], vec![0.0; width]];
        simd(
            #[inline(always)]
            || {
                for [weight, bias] in &partial {
                    for (sum, x) in d_weight.iter_mut().zip(weight) {
                        *sum += x;
                    }
                    for (sum, x) in d_bias.iter_mut().zip(bias) {
                        *sum += x;
                    }
                }
            },
        );
        [
            Some(tensor(d_x, upstream.layout().shape().clone())),
            Some(tensor(d_weight, [width])),
            bias.then(|| tensor(d_bias, [width])),
        ]
    }
}

/// Replaces rows by their layer norm, `(x - mean) / √(variance + ε) · weight + bias`; the rows are as long as the weight, and
/// no `bias` is none.
pub fn layer_norm_rows(rows: &mut [f32], weight: &[f32], bias: &[f32], epsilon: f32) {
    Norm { centred: true, epsilon }.normalise_rows(rows, weight, bias);
}

/// Replaces rows by their RMS norm, `x / √(mean of x² + ε) · weight`; the rows are as long as the weight.
pub fn rms_norm_rows(rows: &mut [f32], weight: &[f32], epsilon: f32) {
    Norm { centred: false, epsilon }.normalise_rows(rows, weight, &[]);
}

impl Norm {
    fn normalise_rows(&self, rows: &mut [f32], weight: &[f32], bias: &[f32]) {
        simd(
            #[inline(always)]
            || {
                for row in rows.chunks_exact_mut(weight.len()) {
                    normalise(row, self.statistics(row), weight, bias);
                }
            },
        );
    }

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

    /// Replaces a row's upstream gradient by that of its input `x`, and adds to those of weight and bias.
    #[inline(always)]
    fn pull_back(&self, d: &mut [f32], x: &[f32], weight: &[f32], [d_weight, d_bias]: &mut [Vec<f32>; 2]) {
        let Statistics { mean, scale } = self.statistics(x);
        let width = d.len();
        let (x, weight) = (&x[..width], &weight[..width]);
        let (d_weight, d_bias) = (&mut d_weight[..width], &mut d_bias[..width]);
        for i in 0..width {
            d_weight[i] = fma(d[i], (x[i] - mean) * scale, d_weight[i]);
            d_bias[i] += d[i];
            d[i] *= weight[i]; // g
        }
        let count = width as f32;
        let mean_g = sum_of(
            d,
            #[inline(always)]
            |g| g,
        ) / count;
        // mean(g x̂) = scale (Σ g x - mean Σ g) / count
        let mean_gx = scale * (long_dot(d, x) / count - mean * mean_g);
        let mean_g = if self.centred { mean_g } else { 0.0 };
        for i in 0..width {
            let normalised = (x[i] - mean) * scale;
            d[i] = scale * (d[i] - mean_g - normalised * mean_gx);
        }
    }
}

#[inline(always)]
fn normalise(x: &mut [f32], Statistics { mean, scale }: Statistics, weight: &[f32], bias: &[f32]) {
    let weight = &weight[..x.len()];
    for i in 0..x.len() {
        x[i] = (x[i] - mean) * scale * weight[i];
    }
    for (x, b) in x.iter_mut().zip(bias) {
        *x += b;
    }
}
