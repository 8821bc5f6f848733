//! Networks out of this crate's operations, and their training.

mod bert;
mod resnet;
mod small;

pub use bert::BertLayer;
pub use resnet::ResNet18;
pub use small::{Cnn, Mlp, TransformerBlock};

use std::mem::replace;

use burn::tensor::{Gradients, Shape, Tensor};
use kiln_ops::Parameter;

/// A parameter of a network, a leaf of the autodiff graph.
pub enum ParameterMut<'a> {
    Vector(&'a mut Tensor<1>),
    Matrix(&'a mut Tensor<2>),
    Kernel(&'a mut Tensor<4>),
}

impl ParameterMut<'_> {
    /// The gradient, and the value in its place, whose memory is nobody else's then.
    fn take(&mut self, gradients: &mut Gradients) -> Taken {
        match self {
            Self::Vector(parameter) => take(parameter, gradients),
            Self::Matrix(parameter) => take(parameter, gradients),
            Self::Kernel(parameter) => take(parameter, gradients),
        }
    }

    fn put(&mut self, value: Tensor<1>, shape: Shape) {
        match self {
            Self::Vector(parameter) => **parameter = leaf(value, shape),
            Self::Matrix(parameter) => **parameter = leaf(value, shape),
            Self::Kernel(parameter) => **parameter = leaf(value, shape),
        }
    }
}

/// A parameter out of its place, flattened.
struct Taken {
    value: Tensor<1>,
    gradient: Tensor<1>,
    shape: Shape,
}

fn take<const D: usize>(parameter: &mut Tensor<D>, gradients: &mut Gradients) -> Taken {
    let gradient = parameter.grad_remove(gradients).expect("the loss depends on every parameter");
    let nothing = Tensor::empty([0; D], &parameter.device());
    let value = replace(parameter, nothing).inner();
    let shape = value.shape();
    Taken { value: value.reshape([-1]), gradient: gradient.reshape([-1]), shape }
}

fn leaf<const D: usize>(value: Tensor<1>, shape: Shape) -> Tensor<D> {
    Tensor::from_inner(value.reshape::<D, _>(shape)).require_grad()
}

/// An optimiser with `S` tensors of state a parameter.
pub struct Trainer<const S: usize> {
    /// A step by its number.
    rule: fn(i32, Vec<Parameter<S>>) -> Vec<Parameter<S>>,
    steps: i32,
    states: Vec<[Tensor<1>; S]>,
}

impl<const S: usize> Trainer<S> {
    pub fn new(rule: fn(i32, Vec<Parameter<S>>) -> Vec<Parameter<S>>) -> Self {
        Self { rule, steps: 0, states: Vec::new() }
    }

    pub fn step(&mut self, mut network: Vec<ParameterMut<'_>>, gradients: &mut Gradients) {
        self.steps += 1;
        let mut states = std::mem::take(&mut self.states).into_iter();
        let mut shapes = Vec::new();
        let parameters = network.iter_mut().map(|parameter| {
            let Taken { value, gradient, shape } = parameter.take(gradients);
            shapes.push(shape);
            let state = states.next().unwrap_or_else(|| [(); S].map(|()| value.zeros_like()));
            Parameter { value, gradient, state, weight_decay: 0.01 }
        });
        let after = (self.rule)(self.steps, parameters.collect());
        for ((parameter, shape), Parameter { value, state, .. }) in network.iter_mut().zip(shapes).zip(after)
        {
            parameter.put(value, shape);
            self.states.push(state);
        }
    }
}
