//! Steps of optimisers: one pass over the memory of all parameters, in place where nobody else holds it.

use burn::backend::{BackendTensor, DispatchAutodiffContext, DispatchTensor, DispatchTensorKind};
use burn::tensor::Tensor;
use burn_flex::FlexTensor;
use rayon::prelude::*;

use crate::flex::{floats, tensor};
use crate::function::{primitive, runs_natively};
use crate::simd;
use crate::vector::fma;

/// Elements that one task updates.
const BLOCK: usize = 16 * 1024;

/// A parameter about to make a step, everything flattened and off the autodiff graph.
///
/// The memory of `value` and `state` is reused where these are its only owners.
#[derive(Debug, Clone)]
pub struct Parameter<const S: usize> {
    /// The parameter itself.
    pub value: Tensor<1>,
    /// The gradient of the loss.
    pub gradient: Tensor<1>,
    /// What the optimiser keeps from step to step; zeros before the first.
    pub state: [Tensor<1>; S],
    /// How strongly a step pulls the value to zero.
    pub weight_decay: f64,
}

/// A step of AdamW (Loshchilov and Hutter, arXiv 1711.05101). With gradient `g`, running means `m` and `v`,
/// weight decay `λ` and step number `t`:
///
/// ```text
/// m ← β₁ m + (1 - β₁) g
/// v ← β₂ v + (1 - β₂) g²
/// w ← (1 - lr λ) w - lr m/(1 - β₁ᵗ) / (√(v/(1 - β₂ᵗ)) + ε)
/// ```
#[derive(Debug, Clone, Copy)]
pub struct AdamWStep {
    /// The learning rate.
    pub lr: f64,
    /// `β₁` and `β₂`: how much of the running means the step keeps.
    pub betas: (f64, f64),
    /// Added to the root of the mean squared gradient.
    pub epsilon: f64,
    /// The number of this step, from 1 on.
    pub step: i32,
    /// What gradients are multiplied by beforehand, 1 without clipping.
    pub scale: f64,
}

/// A step of gradient descent with momentum. With gradient `g`, momentum buffer `b` and weight decay `λ`:
///
/// ```text
/// g ← g + λ w
/// b ← μ b + g
/// w ← w - lr b            or, with Nesterov's momentum,  w ← w - lr (g + μ b)
/// ```
#[derive(Debug, Clone, Copy)]
pub struct SgdStep {
    /// The learning rate.
    pub lr: f64,
    /// `μ`: how much of the buffer the step keeps; 0 is plain gradient descent.
    pub momentum: f64,
    /// Whether the step looks ahead by one application of the momentum.
    pub nesterov: bool,
    /// What gradients are multiplied by beforehand, 1 without clipping.
    pub scale: f64,
}

/// A step of Adagrad (Duchi, Hazan and Singer, JMLR 12, 2011). With gradient `g`, sum of squares `s` and weight
/// decay `λ`:
///
/// ```text
/// g ← g + λ w
/// s ← s + g²
/// w ← w - lr g / (√s + ε)
/// ```
#[derive(Debug, Clone, Copy)]
pub struct AdagradStep {
    /// The learning rate.
    pub lr: f64,
    /// Added to the root of the sum of squares.
    pub epsilon: f64,
    /// What gradients are multiplied by beforehand, 1 without clipping.
    pub scale: f64,
}

impl AdamWStep {
    /// The parameters after this step; their states are the running means `m` and `v`.
    ///
    /// # Panics
    /// When value, gradient and state of a parameter differ in length.
    pub fn apply(&self, parameters: Vec<Parameter<2>>) -> Vec<Parameter<2>> {
        apply(self, parameters)
    }
}

impl SgdStep {
    /// The parameters after this step; their state is the momentum buffer `b`.
    ///
    /// # Panics
    /// When value, gradient and state of a parameter differ in length.
    pub fn apply(&self, parameters: Vec<Parameter<1>>) -> Vec<Parameter<1>> {
        apply(self, parameters)
    }
}

impl AdagradStep {
    /// The parameters after this step; their state is the sum of squares `s`.
    ///
    /// # Panics
    /// When value, gradient and state of a parameter differ in length.
    pub fn apply(&self, parameters: Vec<Parameter<1>>) -> Vec<Parameter<1>> {
        apply(self, parameters)
    }
}

/// The Euclidean norm of all gradients taken together, summed in double precision.
pub fn gradient_norm(gradients: &[Tensor<1>]) -> f64 {
    let (native, other): (Vec<_>, Vec<_>) = gradients.iter().cloned().partition(runs_natively);
    let native: Vec<FlexTensor> = native.into_iter().map(|g| primitive(g.into_dispatch())).collect();
    let native: Vec<_> = native.iter().map(floats).collect();
    let blocks: Vec<&[f32]> = native.iter().flat_map(|g| g.chunks(BLOCK)).collect();
    let squares: Vec<f64> = match blocks.len() {
        0..=2 => blocks.into_iter().map(sum_of_squares).collect(),
        _ => blocks.into_par_iter().map(sum_of_squares).collect(),
    };
    let other = other.into_iter().map(|g| g.square().sum().into_scalar::<f64>());
    squares.into_iter().chain(other).sum::<f64>().sqrt()
}

fn sum_of_squares(values: &[f32]) -> f64 {
    const LANES: usize = 16;
    simd(
        #[inline(always)]
        || {
            let (body, tail) = values.as_chunks::<LANES>();
            let mut sums = [0.0f64; LANES];
            for chunk in body {
                for lane in 0..LANES {
                    let x = f64::from(chunk[lane]);
                    sums[lane] += x * x;
                }
            }
            let tail: f64 = tail.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
            sums.iter().sum::<f64>() + tail
        },
    )
}

/// How an optimiser updates a parameter with `S` tensors of state.
trait Rule<const S: usize>: Sync {
    /// One step on a piece of a parameter.
    fn update(&self, piece: Piece<'_, S>);

    /// The same out of Burn's operations.
    fn composed(&self, parameter: Parameter<S>) -> Parameter<S>;
}

/// The same range of a parameter's value, gradient and state.
struct Piece<'a, const S: usize> {
    value: &'a mut [f32],
    gradient: &'a [f32],
    state: [&'a mut [f32]; S],
    weight_decay: f64,
}

impl Rule<2> for AdamWStep {
    fn update(&self, Piece { value, gradient, state: [first, second], weight_decay }: Piece<'_, 2>) {
        let (beta1, beta2) = (self.betas.0 as f32, self.betas.1 as f32);
        let (new1, new2) = ((1.0 - self.betas.0) as f32, (1.0 - self.betas.1) as f32);
        let [rate, bias2] = self.corrections();
        let (rate, bias2, epsilon) = (rate as f32, bias2 as f32, self.epsilon as f32);
        let keep = (1.0 - self.lr * weight_decay) as f32;
        let scale = self.scale as f32;
        simd(
            #[inline(always)]
            || {
                let moments = first.iter_mut().zip(second.iter_mut());
                for ((w, &g), (m, v)) in value.iter_mut().zip(gradient).zip(moments) {
                    let g = g * scale;
                    *m = fma(beta1, *m, new1 * g);
                    *v = fma(beta2, *v, new2 * g * g);
                    *w = fma(keep, *w, -rate * *m / ((*v * bias2).sqrt() + epsilon));
                }
            },
        );
    }

    fn composed(&self, Parameter { value, gradient, state, weight_decay }: Parameter<2>) -> Parameter<2> {
        let (beta1, beta2) = self.betas;
        let [rate, bias2] = self.corrections();
        let [first, second] = state;
        let scaled = gradient.clone() * self.scale;
        let first = first * beta1 + scaled.clone() * (1.0 - beta1);
        let second = second * beta2 + scaled.square() * (1.0 - beta2);
        let direction = first.clone() / ((second.clone() * bias2).sqrt() + self.epsilon);
        let value = value * (1.0 - self.lr * weight_decay) - direction * rate;
        Parameter { value, gradient, state: [first, second], weight_decay }
    }
}

impl AdamWStep {
    /// `lr / (1 - β₁ᵗ)` and `1 / (1 - β₂ᵗ)`.
    fn corrections(&self) -> [f64; 2] {
        [self.lr / (1.0 - self.betas.0.powi(self.step)), 1.0 / (1.0 - self.betas.1.powi(self.step))]
    }
}

impl Rule<1> for SgdStep {
    fn update(&self, Piece { value, gradient, state: [buffer], weight_decay }: Piece<'_, 1>) {
        let (lr, momentum, scale) = (self.lr as f32, self.momentum as f32, self.scale as f32);
        let weight_decay = weight_decay as f32;
        // The step is `lr (ahead g + along b)`.
        let (ahead, along) = if self.nesterov { (lr, lr * momentum) } else { (0.0, lr) };
        simd(
            #[inline(always)]
            || {
                for ((w, &g), b) in value.iter_mut().zip(gradient).zip(buffer.iter_mut()) {
                    let g = fma(weight_decay, *w, g * scale);
                    *b = fma(momentum, *b, g);
                    *w -= fma(ahead, g, along * *b);
                }
            },
        );
    }

    fn composed(
        &self,
        Parameter { value, gradient, state: [buffer], weight_decay }: Parameter<1>,
    ) -> Parameter<1> {
        let g = gradient.clone() * self.scale + value.clone() * weight_decay;
        let buffer = buffer * self.momentum + g.clone();
        let direction = if self.nesterov { g + buffer.clone() * self.momentum } else { buffer.clone() };
        Parameter { value: value - direction * self.lr, gradient, state: [buffer], weight_decay }
    }
}

impl Rule<1> for AdagradStep {
    fn update(&self, Piece { value, gradient, state: [squares], weight_decay }: Piece<'_, 1>) {
        let (lr, epsilon, scale) = (self.lr as f32, self.epsilon as f32, self.scale as f32);
        let weight_decay = weight_decay as f32;
        simd(
            #[inline(always)]
            || {
                for ((w, &g), s) in value.iter_mut().zip(gradient).zip(squares.iter_mut()) {
                    let g = fma(weight_decay, *w, g * scale);
                    *s = fma(g, g, *s);
                    *w -= lr * g / (s.sqrt() + epsilon);
                }
            },
        );
    }

    fn composed(
        &self,
        Parameter { value, gradient, state: [squares], weight_decay }: Parameter<1>,
    ) -> Parameter<1> {
        let g = gradient.clone() * self.scale + value.clone() * weight_decay;
        let squares = squares + g.clone().square();
        let value = value - g / (squares.clone().sqrt() + self.epsilon) * self.lr;
        Parameter { value, gradient, state: [squares], weight_decay }
    }
}

/// A parameter whose value and state are writable memory.
struct Unpacked<const S: usize> {
    value: FlexTensor,
    gradient: FlexTensor,
    state: [FlexTensor; S],
    weight_decay: f64,
}

/// Applies `rule` to all parameters, in their order.
fn apply<const S: usize>(rule: &impl Rule<S>, parameters: Vec<Parameter<S>>) -> Vec<Parameter<S>> {
    if !parameters.iter().all(|p| p.state.iter().chain([&p.value, &p.gradient]).all(runs_natively)) {
        return parameters.into_iter().map(|parameter| rule.composed(parameter)).collect();
    }
    let mut unpacked: Vec<_> = parameters.into_iter().map(Unpacked::from).collect();
    let pieces: Vec<_> = unpacked.iter_mut().flat_map(Unpacked::pieces).collect();
    match pieces.len() {
        0..=2 => pieces.into_iter().for_each(|piece| rule.update(piece)),
        _ => pieces.into_par_iter().for_each(|piece| rule.update(piece)),
    }
    unpacked.into_iter().map(Parameter::from).collect()
}

impl<const S: usize> From<Parameter<S>> for Unpacked<S> {
    fn from(Parameter { value, gradient, state, weight_decay }: Parameter<S>) -> Self {
        let lengths = state.each_ref().map(|state| state.dims()[0]);
        assert!(
            value.dims() == gradient.dims() && lengths.iter().all(|&length| length == value.dims()[0]),
            "a parameter of {} values has a gradient of {} and a state of {lengths:?}",
            value.dims()[0],
            gradient.dims()[0],
        );
        let gradient = primitive(gradient.into_dispatch());
        let gradient = match gradient.as_slice::<f32>() {
            Some(_) => gradient,
            None => copy(&gradient),
        };
        Self {
            value: own(primitive(value.into_dispatch())),
            gradient,
            state: state.map(|state| own(primitive(state.into_dispatch()))),
            weight_decay,
        }
    }
}

impl<const S: usize> From<Unpacked<S>> for Parameter<S> {
    fn from(Unpacked { value, gradient, state, weight_decay }: Unpacked<S>) -> Self {
        Self { value: wrap(value), gradient: wrap(gradient), state: state.map(wrap), weight_decay }
    }
}

impl<const S: usize> Unpacked<S> {
    /// The parameter in blocks.
    fn pieces(&mut self) -> Vec<Piece<'_, S>> {
        let gradient = self.gradient.as_slice::<f32>().expect("it was made so");
        let weight_decay = self.weight_decay;
        let mut state = self.state.each_mut().map(|state| writable(state).chunks_mut(BLOCK));
        let values = writable(&mut self.value).chunks_mut(BLOCK).zip(gradient.chunks(BLOCK));
        values
            .map(|(value, gradient)| {
                let state = state.each_mut().map(|state| state.next().expect("states are as long as values"));
                Piece { value, gradient, state, weight_decay }
            })
            .collect()
    }
}

/// The tensor itself where it is the only owner of its memory and uses all of it; else a copy.
fn own(tensor: FlexTensor) -> FlexTensor {
    let whole = tensor.as_slice::<f32>().is_some_and(|values| values.len() == tensor.storage::<f32>().len());
    if whole && tensor.is_unique() { tensor } else { copy(&tensor) }
}

fn copy(x: &FlexTensor) -> FlexTensor {
    tensor(floats(x).into_owned(), x.layout().shape().clone())
}

fn writable(tensor: &mut FlexTensor) -> &mut [f32] {
    tensor.try_storage_mut().expect("nobody else holds it")
}

fn wrap(tensor: FlexTensor) -> Tensor<1> {
    Tensor::from_dispatch(DispatchTensor {
        kind: DispatchTensorKind::Flex(BackendTensor::Float(tensor)),
        autodiff: DispatchAutodiffContext::default(),
    })
}
