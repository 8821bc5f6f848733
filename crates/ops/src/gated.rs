//! Gated products, as in gated linear units.

use burn::tensor::Tensor;
use burn_flex::FlexTensor;

use crate::activation::Activation;
use crate::blocks::changed;
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
        let output = changed(&gate, 1, |first, output| {
            self.0.forward(output);
            multiply(output, &value[first..]);
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
        let d_output = floats(&upstream);
        let d_gate = changed(&d_output, 1, |first, d_gate| {
            multiply(d_gate, &value[first..]);
            self.0.backward(&gate[first..first + d_gate.len()], d_gate);
        });
        let d_value = changed(&gate, 1, |first, d_value| {
            self.0.forward(d_value);
            multiply(d_value, &d_output[first..]);
        });
        let shape = upstream.layout().shape();
        [d_gate, d_value].map(|gradient| Some(tensor(gradient, shape.clone())))
    }
}

/// `a ← a b`, as far as `a` goes
fn multiply(a: &mut [f32], b: &[f32]) {
    let b = &b[..a.len()];
    simd(
        #[inline(always)]
        || {
            for (a, b) in a.iter_mut().zip(b) {
                *a *= b;
            }
        },
    );
}
