//! Steps of variables: every rank makes them on its own parts, since variable, gradient and state are split alike.

use burn::tensor::{Device, Tensor, TensorData};
use burn_flex::FlexTensor;
use clap::ValueEnum;
use kiln_ops::{AdamWStep, Parameter, SgdStep};
use serde::{Deserialize, Serialize};

/// How variables change.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Optimiser {
    /// Which step.
    pub kind: Kind,
    /// The learning rate.
    pub lr: f64,
}

/// Which step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Gradient descent with momentum 0.9
    Sgd,
    /// Adam, with decoupled weight decay 0
    Adam,
}

const MOMENTUM: f64 = 0.9;
const BETAS: (f64, f64) = (0.9, 0.999);
const EPSILON: f64 = 1e-8;

impl Default for Optimiser {
    fn default() -> Self {
        Self { kind: Kind::Adam, lr: 1e-3 }
    }
}

/// A rank's part of a variable, with what the optimiser keeps of it.
pub struct State {
    /// Its value.
    pub value: FlexTensor,
    kept: Vec<Tensor<1>>,
}

impl State {
    /// A value, with what the optimiser kept of it; nothing before the first step.
    pub fn new(value: FlexTensor, kept: Vec<TensorData>) -> Self {
        let flat = |data: TensorData| {
            let count = data.num_elements();
            Tensor::from_data(reshaped(data, &[count]), &Device::flex())
        };
        Self { value, kept: kept.into_iter().map(flat).collect() }
    }

    /// What the optimiser keeps, of the value's shape.
    pub fn kept(&self) -> impl Iterator<Item = TensorData> {
        let shape = self.value.layout().shape().to_vec();
        self.kept.iter().map(move |kept| reshaped(kept.to_data(), &shape))
    }
}

impl Optimiser {
    /// How many tensors it keeps of a variable.
    pub fn kept(&self) -> usize {
        match self.kind {
            Kind::Sgd => 1,
            Kind::Adam => 2,
        }
    }

    /// The variable after step `piece`, counted from 0, by `scale` times the gradient.
    pub fn step(&self, state: State, gradient: FlexTensor, piece: usize, scale: f64) -> State {
        let device = Device::flex();
        let shape = state.value.layout().shape().to_vec();
        let (value, gradient) = (flat(state.value, &device), flat(gradient, &device));
        let zeros = || Tensor::<1>::zeros(value.shape(), &device);
        let mut kept = state.kept.into_iter();
        let mut next = || kept.next().unwrap_or_else(zeros);
        let (value, kept) = match self.kind {
            Kind::Sgd => {
                let step = SgdStep { lr: self.lr, momentum: MOMENTUM, nesterov: false, scale };
                let state = [next()];
                let stepped = step.apply(vec![Parameter { value, gradient, state, weight_decay: 0.0 }]);
                stepped
                    .into_iter()
                    .map(|p| (p.value, p.state.to_vec()))
                    .next()
                    .expect("one parameter went in")
            }
            Kind::Adam => {
                let step = i32::try_from(piece + 1).unwrap_or(i32::MAX);
                let step = AdamWStep { lr: self.lr, betas: BETAS, epsilon: EPSILON, step, scale };
                let state = [next(), next()];
                let stepped = step.apply(vec![Parameter { value, gradient, state, weight_decay: 0.0 }]);
                stepped
                    .into_iter()
                    .map(|p| (p.value, p.state.to_vec()))
                    .next()
                    .expect("one parameter went in")
            }
        };
        State { value: FlexTensor::from_data(reshaped(value.into_data(), &shape)), kept }
    }
}

/// The sum of two tensors of one shape.
pub fn added(a: FlexTensor, b: FlexTensor) -> FlexTensor {
    let (device, shape) = (Device::flex(), a.layout().shape().to_vec());
    let sum = flat(a, &device) + flat(b, &device);
    FlexTensor::from_data(reshaped(sum.into_data(), &shape))
}

fn flat(tensor: FlexTensor, device: &Device) -> Tensor<1> {
    let data = tensor.into_data();
    let count = data.num_elements();
    Tensor::from_data(reshaped(data, &[count]), device)
}

fn reshaped(data: TensorData, shape: &[usize]) -> TensorData {
    let (bytes, _, dtype) = data.into_parts();
    TensorData::from_bytes(bytes, shape.to_vec(), dtype)
}
