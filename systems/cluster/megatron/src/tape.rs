//! Stretches of a network between two communications, each with its own autodiff graph.
//!
//! Communication inside an autodiff graph would make the backward pass of one rank wait within the autodiff of its process.
//! So a layer is cut where its ranks communicate: every piece is computed from fresh leaves, and its gradients are taken
//! later, from the gradient of its output.

use burn::backend::{BackendTensor, DispatchTensorKind};
use burn::tensor::{Gradients, Tensor};
use burn_flex::FlexTensor;
use kiln_ops::{Function, apply, flex};

/// A tensor at which an autodiff graph begins.
pub(crate) fn leaf<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    x.autodiff().require_grad()
}

/// The gradients of all leaves of `output`, given that of the output itself.
pub(crate) fn pull_back<const D: usize>(output: Tensor<D>, upstream: Tensor<D>) -> Gradients {
    match upstream.clone().into_dispatch().kind {
        DispatchTensorKind::Flex(BackendTensor::Float(upstream)) => {
            let end = apply(&Seed { upstream }, [output.into_dispatch()]);
            Tensor::<1>::from_dispatch(end).backward()
        }
        _ => (output * upstream.autodiff()).sum().backward(),
    }
}

/// The gradient of a leaf, which must be there.
pub(crate) fn gradient<const D: usize>(leaf: &Tensor<D>, gradients: &mut Gradients) -> Tensor<D> {
    leaf.grad_remove(gradients).expect("every leaf takes part in its output")
}

/// A function whose gradient is whatever it was given.
#[derive(Debug, Clone)]
struct Seed {
    upstream: FlexTensor,
}

impl Function<1> for Seed {
    type Saved = ();

    fn forward(&self, _: [FlexTensor; 1]) -> (FlexTensor, ()) {
        (flex::tensor(vec![0.0], [1]), ())
    }

    fn backward(&self, (): (), _: FlexTensor, _: [bool; 1]) -> [Option<FlexTensor>; 1] {
        [Some(self.upstream.clone())]
    }
}
