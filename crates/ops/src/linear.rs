//! The linear layer's function, with bias and activation in the same pass.

use burn::tensor::Tensor;
use burn_flex::FlexTensor;
use rayon::prelude::*;

use crate::activation::Activation;
use crate::blocks::{BLOCKS_PER_TASK, rows_at_once};
use crate::flex::{floats, tensor};
use crate::function::{Function, apply, runs_natively};
use crate::gemm::{Mat, Out, gemm_parallel};
use crate::simd;

/// `f(x W + b)`.
///
/// # Shapes
/// - x: `[..., inputs]`
/// - weight: `[inputs, outputs]`, as in [`burn::nn::Linear`]
/// - bias: `[outputs]`
/// - output: `[..., outputs]`
pub fn linear<const D: usize>(
    x: Tensor<D>,
    weight: Tensor<2>,
    bias: Option<Tensor<1>>,
    activation: Activation,
) -> Tensor<D> {
    if !runs_natively(&x) || !runs_natively(&weight) {
        return activation.composed(burn::tensor::module::linear(x, weight, bias));
    }
    let bias = bias.unwrap_or_else(|| Tensor::empty([0], &x.device()));
    let inputs = [x.into_dispatch(), weight.into_dispatch(), bias.into_dispatch()];
    Tensor::from_dispatch(apply(&Linear { activation }, inputs))
}

#[derive(Debug, Clone)]
struct Linear {
    activation: Activation,
}

/// What the backward pass of [`Linear`] needs.
#[derive(Clone)]
struct Saved {
    x: FlexTensor,
    weight: FlexTensor,
    /// `x W + b`, where there is an activation after it.
    before: Option<FlexTensor>,
    /// Whether there is a bias.
    bias: bool,
}

impl Function<3> for Linear {
    type Saved = Saved;

    fn forward(&self, inputs: [FlexTensor; 3]) -> (FlexTensor, Saved) {
        let before = affine(&inputs);
        let (output, before) = match self.activation {
            Activation::Identity => (before, None),
            activation => (activation.of(&before), Some(before)),
        };
        let [x, weight, bias] = inputs;
        let bias = bias.layout().num_elements() > 0;
        (output, Saved { x, weight, before, bias })
    }

    fn backward(
        &self,
        Saved { x, weight, before, bias }: Saved,
        upstream: FlexTensor,
        [wants_x, wants_weight, wants_bias]: [bool; 3],
    ) -> [Option<FlexTensor>; 3] {
        let [inputs, outputs] = [weight.layout().shape()[0], weight.layout().shape()[1]];
        let shape = x.layout().shape().clone();
        let rows = shape.num_elements() / inputs.max(1);
        let upstream = match before {
            Some(before) => self.activation.pull_back(&before, &upstream),
            None => upstream,
        };
        let (x, weight, d_output) = (floats(&x), floats(&weight), floats(&upstream));
        let d_output_matrix = Mat::new(&d_output, rows, outputs);

        let d_x = wants_x.then(|| {
            let mut d_x = vec![0.0; rows * inputs];
            gemm_parallel(
                &mut d_x,
                inputs,
                Out::Set,
                d_output_matrix,
                Mat::new(&weight, inputs, outputs).t(),
            );
            tensor(d_x, shape)
        });
        let d_weight = wants_weight.then(|| {
            let mut d_weight = vec![0.0; inputs * outputs];
            gemm_parallel(&mut d_weight, outputs, Out::Set, Mat::new(&x, rows, inputs).t(), d_output_matrix);
            tensor(d_weight, [inputs, outputs])
        });
        let d_bias = (wants_bias && bias).then(|| tensor(sum_rows(&d_output, outputs), [outputs]));
        [d_x, d_weight, d_bias]
    }

    fn infer(&self, inputs: [FlexTensor; 3]) -> FlexTensor {
        self.activation.of_owned(affine(&inputs))
    }
}

/// `x W + b`, `[..., outputs]`; no bias where it has no elements.
fn affine([x, weight, bias]: &[FlexTensor; 3]) -> FlexTensor {
    let [inputs, outputs] = [weight.layout().shape()[0], weight.layout().shape()[1]];
    let mut shape = x.layout().shape().clone();
    let rows = shape.num_elements() / inputs.max(1);
    let last = shape.num_dims() - 1;
    assert_eq!(shape[last], inputs, "the last axis of a linear layer's input must have its input width");
    shape[last] = outputs;

    let (x, weight, bias) = (floats(x), floats(weight), floats(bias));
    let mut output = vec![0.0; rows * outputs];
    gemm_parallel(
        &mut output,
        outputs,
        Out::Set,
        Mat::new(&x, rows, inputs),
        Mat::new(&weight, inputs, outputs),
    );
    if !bias.is_empty() && outputs > 0 {
        let at_once = rows_at_once(outputs) * outputs;
        output.par_chunks_mut(at_once).with_min_len(BLOCKS_PER_TASK).for_each(|rows| {
            simd(
                #[inline(always)]
                || {
                    for row in rows.chunks_exact_mut(outputs) {
                        row.iter_mut().zip(bias.iter()).for_each(|(y, b)| *y += b);
                    }
                },
            );
        });
    }
    tensor(output, shape)
}

/// The sum over all rows of a matrix with rows of `width`.
pub(crate) fn sum_rows(values: &[f32], width: usize) -> Vec<f32> {
    let sum = |values: &[f32]| {
        let mut total = vec![0.0; width];
        simd(
            #[inline(always)]
            || {
                for row in values.chunks_exact(width) {
                    total.iter_mut().zip(row).for_each(|(total, x)| *total += x);
                }
            },
        );
        total
    };
    if width == 0 {
        return Vec::new();
    }
    let at_once = rows_at_once(width) * width;
    let parts = values.par_chunks(at_once).with_min_len(BLOCKS_PER_TASK).map(sum);
    sum(&parts.collect::<Vec<_>>().concat())
}
