//! Differentiable functions of CPU tensors, each with a hand-written backward pass.
//!
//! A [`Function`] computes on [`FlexTensor`]s and says how its gradients follow from what it kept;
//! [`apply`] gives it a place in Burn's autodiff graph. [`runs_natively`] decides beforehand whether the
//! tensors at hand are the CPU's: on other devices, under capture and for other element types every
//! operation of this crate is composed of Burn's own.

use std::fmt::{self, Debug};

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::{
    BalancedCheckpointing, CheckpointStrategy, NoCheckpointing,
};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{
    Autodiff, BackendTensor, DispatchAutodiffContext, DispatchTensor, DispatchTensorKind, Flex,
    GradientCheckpointingStrategy,
};
use burn::tensor::{DType, Tensor};
use burn_flex::FlexTensor;

use crate::flex::is_cpu;

/// A CPU tensor as a node of the autodiff graph.
type Node = FloatTensor<Autodiff<Flex>>;

/// A function of `N` f32 tensors with one f32 tensor as result.
pub trait Function<const N: usize>: Clone + Debug + Send + 'static {
    /// What the backward pass needs: inputs, outputs or statistics of the forward pass.
    type Saved: Clone + Send + 'static;

    /// The result, and what the backward pass will need.
    fn forward(&self, inputs: [FlexTensor; N]) -> (FlexTensor, Self::Saved);

    /// The gradients of the inputs, given that of the result; only those that are `wanted` count.
    fn backward(
        &self,
        saved: Self::Saved,
        upstream: FlexTensor,
        wanted: [bool; N],
    ) -> [Option<FlexTensor>; N];

    /// The result alone, where no gradient will be asked for.
    fn infer(&self, inputs: [FlexTensor; N]) -> FlexTensor {
        self.forward(inputs).0
    }
}

/// Whether a tensor lies on the CPU in single precision, which is what the kernels compute on.
pub fn runs_natively<const D: usize>(x: &Tensor<D>) -> bool {
    x.dtype() == DType::F32 && is_cpu(&x.device())
}

/// Applies `function` to tensors for which [`runs_natively`] holds, and records it where one of them is
/// on an autodiff device.
///
/// # Panics
/// When a tensor is not the CPU's.
pub fn apply<const N: usize, F: Function<N>>(function: &F, inputs: [DispatchTensor; N]) -> DispatchTensor {
    let autodiff = inputs.iter().map(|x| x.autodiff).reduce(DispatchAutodiffContext::merge);
    let autodiff = autodiff.unwrap_or_default();
    let kind = match autodiff {
        DispatchAutodiffContext::Disabled => {
            let output = function.infer(inputs.map(primitive));
            DispatchTensorKind::Flex(BackendTensor::Float(output))
        }
        DispatchAutodiffContext::Enabled(strategy) => {
            let inputs = inputs.map(node);
            let output = match strategy {
                GradientCheckpointingStrategy::Disabled => record::<N, F, NoCheckpointing>(function, inputs),
                GradientCheckpointingStrategy::Balanced => {
                    record::<N, F, BalancedCheckpointing>(function, inputs)
                }
            };
            DispatchTensorKind::Autodiff(Box::new(DispatchTensorKind::Flex(BackendTensor::Autodiff(output))))
        }
    };
    DispatchTensor { kind, autodiff }
}

/// A tensor off the autodiff graph.
pub(crate) fn primitive(x: DispatchTensor) -> FlexTensor {
    match x.kind {
        DispatchTensorKind::Flex(tensor) => tensor.float(),
        other => panic!("a CPU kernel was given another backend's tensor: {other:?}"),
    }
}

/// A tensor as a node of the autodiff graph; a constant where it comes from outside.
fn node(x: DispatchTensor) -> Node {
    match x.kind {
        DispatchTensorKind::Autodiff(inner) => match *inner {
            DispatchTensorKind::Flex(tensor) => tensor.autodiff(),
            other => panic!("a CPU kernel was given another backend's tensor: {other:?}"),
        },
        _ => Node::new(primitive(x)),
    }
}

/// Computes the result; keeps what its gradient needs only if one of the inputs has a gradient.
fn record<const N: usize, F: Function<N>, C: CheckpointStrategy>(function: &F, inputs: [Node; N]) -> Node {
    let guards = inputs.each_ref().map(Node::node);
    let inputs = inputs.map(Node::into_primitive);
    match Recorded(function.clone()).prepare::<C>(guards).compute_bound().stateful() {
        OpsKind::Tracked(prep) => {
            let (output, saved) = function.forward(inputs);
            prep.finish(Saved(saved), output)
        }
        OpsKind::UnTracked(prep) => prep.finish(function.infer(inputs)),
    }
}

/// A function as Burn's autodiff sees it.
#[derive(Debug)]
struct Recorded<F>(F);

/// What the forward pass left for the backward pass.
#[derive(Clone)]
struct Saved<S>(S);

impl<S> Debug for Saved<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Saved")
    }
}

impl<const N: usize, F: Function<N>> Backward<Flex, N> for Recorded<F> {
    type State = Saved<F::Saved>;

    fn backward(self, ops: Ops<Self::State, N>, grads: &mut Gradients, _: &mut Checkpointer) {
        let upstream = grads.consume::<Flex>(&ops.node);
        let wanted = ops.parents.each_ref().map(Option::is_some);
        let gradients = self.0.backward(ops.state.0, upstream, wanted);
        for (parent, gradient) in ops.parents.into_iter().zip(gradients) {
            if let (Some(parent), Some(gradient)) = (parent, gradient) {
                grads.register::<Flex>(parent.id, gradient);
            }
        }
    }
}
