//! Gated products, as in gated linear units.

use burn::tensor::Tensor;
use burn_flex::FlexTensor;
use rayon::prelude::*;

use crate::activation::Activation;
use crate::blocks::{BLOCK, BLOCKS_PER_TASK};
use crate::flex::{floats, tensor};
use crate::function::{Function, apply, runs_natively};
use crate::simd;

/// `f(gate) ⊙ value`: with SiLU the heart of SwiGLU, with the sigmoid that of a GLU.
///
/// # Shapes
/// - gate, value, output: any, but the same
pub fn gated<const D: usize>(gate: Tensor<D>, value: Tensor<D>, activation: Activation) -> Tensor<D> {
    assert_eq!(gate.dims(), value.dims(), "a gate must have the shape of what it gates");
    if !runs_natively(&gate) || !runs_natively(&value) {
        return activation.composed(gate) * value;
    }
    Tensor::from_dispatch(apply(&Gated(activation), [gate.into_dispatch(), value.into_dispatch()]))
}

#[derive(Debug, Clone)]
struct Gated(Activation);

impl Function<2> for Gated {
    type Saved = [FlexTensor; 2];

    fn forward(&self, inputs: [FlexTensor; 2]) -> (FlexTensor, [FlexTensor; 2]) {
        let [gate, value] = inputs.each_ref().map(floats);
        let mut output = vec![0.0; gate.len()];
        let blocks = output.par_chunks_mut(BLOCK).zip(gate.par_chunks(BLOCK)).zip(value.par_chunks(BLOCK));
        blocks.with_min_len(BLOCKS_PER_TASK).for_each(|((output, gate), value)| {
            output.copy_from_slice(gate);
            self.0.forward(output);
            multiply(output, value);
        });
        drop((gate, value));
        (tensor(output, inputs[0].layout().shape().clone()), inputs)
    }

    fn backward(
        &self,
        inputs: [FlexTensor; 2],
        upstream: FlexTensor,
        _: [bool; 2],
    ) -> [Option<FlexTensor>; 2] {
        let [gate, value] = inputs.each_ref().map(floats);
        let upstream_values = floats(&upstream);
        let [mut d_gate, mut d_value] = [vec![0.0; gate.len()], vec![0.0; gate.len()]];
        let blocks = d_gate
            .par_chunks_mut(BLOCK)
            .zip(d_value.par_chunks_mut(BLOCK))
            .zip(gate.par_chunks(BLOCK))
            .zip(value.par_chunks(BLOCK))
            .zip(upstream_values.par_chunks(BLOCK));
        blocks.with_min_len(BLOCKS_PER_TASK).for_each(|((((d_gate, d_value), gate), value), upstream)| {
            d_value.copy_from_slice(gate);
            self.0.forward(d_value);
            multiply(d_value, upstream);
            d_gate.copy_from_slice(upstream);
            multiply(d_gate, value);
            self.0.backward(gate, d_gate);
        });
        let shape = upstream.layout().shape();
        [d_gate, d_value].map(|gradient| Some(tensor(gradient, shape.clone())))
    }
}

/// `a ← a b`
fn multiply(a: &mut [f32], b: &[f32]) {
    simd(
        #[inline(always)]
        || a.iter_mut().zip(b).for_each(|(a, b)| *a *= b),
    );
}
