//! Softmax and its logarithm along one axis.

use burn::tensor::{AsIndex, Tensor, activation as burn_activation};
use burn_flex::FlexTensor;

use crate::blocks::{changed, in_place};
use crate::flex::{floats, tensor};
use crate::function::{Function, apply, runs_natively};
use crate::simd;
use crate::vector::{fma, fold, long_dot, sum_of};

/// `softmax(x)_i = e^x_i / Σ_j e^x_j` along `dim`, which counts from the end where it is negative.
///
/// A row that holds nothing but -∞ has no softmax and gives NaN.
///
/// # Shapes
/// - x, output: any
///
/// # Panics
/// When `dim` is none of the tensor's.
pub fn softmax<const D: usize>(x: Tensor<D>, dim: impl AsIndex) -> Tensor<D> {
    normalise(x, dim.expect_dim_index(D), Form::Probabilities)
}

/// `log softmax(x)_i = x_i - ln Σ_j e^x_j` along `dim`, which counts from the end where it is negative.
///
/// A row that holds nothing but -∞ has no softmax and gives NaN.
///
/// # Shapes
/// - x, output: any
///
/// # Panics
/// When `dim` is none of the tensor's.
pub fn log_softmax<const D: usize>(x: Tensor<D>, dim: impl AsIndex) -> Tensor<D> {
    normalise(x, dim.expect_dim_index(D), Form::Logarithms)
}

fn normalise<const D: usize>(x: Tensor<D>, dim: usize, form: Form) -> Tensor<D> {
    if !runs_natively(&x) {
        return match form {
            Form::Probabilities => burn_activation::softmax(x, dim),
            Form::Logarithms => burn_activation::log_softmax(x, dim),
        };
    }
    if dim != D - 1 {
        return normalise(x.swap_dims(dim, D - 1), D - 1, form).swap_dims(dim, D - 1);
    }
    Tensor::from_dispatch(apply(&Softmax(form), [x.into_dispatch()]))
}

/// Replaces rows of `width` numbers by their softmax.
pub fn softmax_rows(rows: &mut [f32], width: usize) {
    Form::Probabilities.forward(rows, width);
}

/// Replaces rows of `width` numbers by the logarithm of their softmax.
pub fn log_softmax_rows(rows: &mut [f32], width: usize) {
    Form::Logarithms.forward(rows, width);
}

/// What a row of numbers is turned into.
#[derive(Debug, Clone, Copy)]
enum Form {
    Probabilities,
    Logarithms,
}

/// Softmax along the last axis.
#[derive(Debug, Clone)]
struct Softmax(Form);

impl Function<1> for Softmax {
    /// The result, from which the gradient follows.
    type Saved = FlexTensor;

    fn forward(&self, [x]: [FlexTensor; 1]) -> (FlexTensor, FlexTensor) {
        let width = last_axis(&x);
        let output = changed(&floats(&x), width, |_, rows| self.0.forward(rows, width));
        let output = tensor(output, x.layout().shape().clone());
        (output.clone(), output)
    }

    fn backward(&self, output: FlexTensor, upstream: FlexTensor, _: [bool; 1]) -> [Option<FlexTensor>; 1] {
        let (y, width) = (floats(&output), last_axis(&output));
        let gradient = overwrite_rows(upstream, width, |first, rows| {
            self.0.backward(&y[first * width..][..rows.len()], rows, width);
        });
        [Some(gradient)]
    }
}

impl Form {
    /// Replaces rows of `width` numbers by their softmax.
    fn forward(self, rows: &mut [f32], width: usize) {
        simd(
            #[inline(always)]
            || {
                for x in rows.chunks_exact_mut(width) {
                    let largest = max(x);
                    match self {
                        Self::Probabilities => {
                            let factor = 1.0 / exp_all(x, largest);
                            for x in x.iter_mut() {
                                *x *= factor;
                            }
                        }
                        Self::Logarithms => {
                            let log_sum = sum_of_exp(x, largest).ln();
                            for x in x.iter_mut() {
                                *x = *x - largest - log_sum;
                            }
                        }
                    }
                }
            },
        );
    }

    /// Replaces the gradient of `y`, the softmax of rows of `width` numbers, by that of these numbers.
    fn backward(self, y: &[f32], gradient: &mut [f32], width: usize) {
        simd(
            #[inline(always)]
            || {
                for (y, gradient) in y.chunks_exact(width).zip(gradient.chunks_exact_mut(width)) {
                    match self {
                        // y_i (dy_i - Σ_j y_j dy_j)
                        Self::Probabilities => {
                            let mean = long_dot(y, gradient);
                            for (gradient, y) in gradient.iter_mut().zip(y) {
                                *gradient = y * (*gradient - mean);
                            }
                        }
                        // dy_i - e^y_i Σ_j dy_j
                        Self::Logarithms => {
                            let sum = sum(gradient);
                            for (gradient, &y) in gradient.iter_mut().zip(y) {
                                *gradient -= exp_below(y) * sum;
                            }
                        }
                    }
                }
            },
        );
    }
}

/// `x` with its rows of `width` changed by `work`, which is also given the number of a block's first row; in the same
/// memory where nobody else holds it.
pub(crate) fn overwrite_rows(
    mut x: FlexTensor,
    width: usize,
    work: impl Fn(usize, &mut [f32]) + Sync,
) -> FlexTensor {
    let whole = x.is_contiguous() && x.bytes().len() == size_of::<f32>() * x.layout().num_elements();
    if let Some(values) = whole.then(|| x.try_storage_mut::<f32>()).flatten() {
        in_place(values, width, |first, rows| work(first / width, rows));
        return x;
    }
    let values = changed(&floats(&x), width, |first, rows| work(first / width, rows));
    tensor(values, x.layout().shape().clone())
}

/// The extent of the last axis, which is not 0 where there are elements.
fn last_axis(x: &FlexTensor) -> usize {
    let shape = x.layout().shape();
    shape[shape.num_dims() - 1]
}

/// `e^x` to within 3 ulp for `x ≤ 1`, in fewer operations than [`exp`](crate::vector::exp) needs for all `x`;
/// results below the smallest normal number are 0, NaN stays NaN.
///
/// Cody–Waite reduction `x = n ln 2 + r`, then a minimax polynomial on `|r| ≤ ln 2 / 2`.
#[inline(always)]
pub(crate) fn exp_below(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 · 2²³: adding it rounds to the nearest integer
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    const LOWEST: f32 = -87.336_54; // ln of the smallest normal number

    let shifted = fma(x, std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = fma(n, -LN2_LOW, fma(n, -LN2_HIGH, x));
    let mut p = 8.290_272e-3;
    p = fma(p, r, 4.189_816e-2);
    p = fma(p, r, 1.666_763_8e-1);
    p = fma(p, r, 4.999_914_8e-1);
    p = fma(p, r, 9.999_997e-1);
    p = fma(p, r, 1.0);
    // 2ⁿ: the last bits of `shifted` are n, which belongs into the exponent.
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(1.0f32.to_bits()));
    if x < LOWEST { 0.0 } else { p * power }
}

/// The largest element that is a number; -∞ where there is none.
#[inline(always)]
pub(crate) fn max(values: &[f32]) -> f32 {
    fold(
        values,
        f32::NEG_INFINITY,
        #[inline(always)]
        |x| x,
        f32::max,
    )
}

/// The sum of all elements.
#[inline(always)]
pub(crate) fn sum(values: &[f32]) -> f32 {
    sum_of(
        values,
        #[inline(always)]
        |x| x,
    )
}

/// `Σ e^(x - shift)`, where no `x` is larger than `shift`.
#[inline(always)]
pub(crate) fn sum_of_exp(values: &[f32], shift: f32) -> f32 {
    sum_of(
        values,
        #[inline(always)]
        |x| exp_below(x - shift),
    )
}

/// Sums that [`exp_all`] keeps side by side.
const LANES: usize = 64;

/// `x ← e^(x - shift)` for all elements, none of them larger than `shift`; their sum.
#[inline(always)]
pub(crate) fn exp_all(values: &mut [f32], shift: f32) -> f32 {
    let (body, tail) = values.as_chunks_mut::<LANES>();
    let mut sums = [0.0; LANES];
    for chunk in body {
        for lane in 0..LANES {
            chunk[lane] = exp_below(chunk[lane] - shift);
            sums[lane] += chunk[lane];
        }
    }
    for (sum, x) in sums.iter_mut().zip(tail) {
        *x = exp_below(*x - shift);
        *sum += *x;
    }
    sum(&sums)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_below_is_within_three_ulp_and_right_at_the_edges() {
        for i in 0..=200_000 {
            let x = 1.0 - i as f32 * (88.3 / 200_000.0);
            let (y, exact) = (exp_below(x), f64::from(x).exp() as f32);
            assert!(y.to_bits().abs_diff(exact.to_bits()) <= 3, "exp({x}) = {y}, should be {exact}");
        }
        assert_eq!([0.0, -88.0, -1e6, f32::NEG_INFINITY].map(exp_below), [1.0, 0.0, 0.0, 0.0]);
        // Even with a payload that would end up in the exponent.
        assert!(exp_below(f32::NAN).is_nan() && exp_below(f32::from_bits(0x7fc0_0101)).is_nan());
    }
}
