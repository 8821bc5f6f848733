//! Elementwise nonlinearities.

use burn::tensor::{Tensor, activation as burn_activation};
use burn_flex::FlexTensor;

use crate::blocks::{changed, in_place};
use crate::flex::{floats, tensor};
use crate::function::{Function, apply, runs_natively};
use crate::simd;
use crate::vector::{erf, exp, fma, sigmoid, softplus, tanh};

/// A function applied to every element, alone ([`activate`]) or at the end of [`linear`](crate::linear()).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x`
    Identity,
    /// `max(x, 0)`
    Relu,
    /// `x Φ(x)` with the normal distribution function Φ.
    Gelu,
    /// `x/2 (1 + tanh(√(2/π) (x + 0.044715 x³)))`
    GeluTanh,
    /// `x σ(x)`
    Silu,
    /// `σ(x) = 1 / (1 + e^-x)`
    Sigmoid,
    /// `tanh x`
    Tanh,
    /// `ln(1 + e^x)`
    Softplus,
    /// `ln σ(x)`
    LogSigmoid,
}

const SQRT_HALF: f32 = std::f32::consts::FRAC_1_SQRT_2;
/// 1/√(2π)
const NORMAL_DENSITY_AT_0: f32 = 0.398_942_3;
/// √(2/π)
const TANH_SCALE: f32 = 0.797_884_6;
const TANH_CUBE: f32 = 0.044_715;

impl Activation {
    /// `x ← f(x)` for all elements of a slice.
    pub(crate) fn forward(self, values: &mut [f32]) {
        match self {
            Self::Identity => {}
            // Not `f32::max`, which would turn NaN into 0.
            Self::Relu => map(
                values,
                #[inline(always)]
                |x| if x < 0.0 { 0.0 } else { x },
            ),
            Self::Gelu => map(
                values,
                #[inline(always)]
                |x| 0.5 * x * (1.0 + erf(x * SQRT_HALF)),
            ),
            Self::GeluTanh => map(
                values,
                #[inline(always)]
                |x| 0.5 * x * (1.0 + tanh(TANH_SCALE * fma(TANH_CUBE * x * x, x, x))),
            ),
            Self::Silu => map(
                values,
                #[inline(always)]
                |x| x * sigmoid(x),
            ),
            Self::Sigmoid => map(values, sigmoid),
            Self::Tanh => map(values, tanh),
            Self::Softplus => map(values, softplus),
            Self::LogSigmoid => map(
                values,
                #[inline(always)]
                |x| -softplus(-x),
            ),
        }
    }

    /// `gradient ← gradient f'(x)` for all elements.
    pub(crate) fn backward(self, x: &[f32], gradient: &mut [f32]) {
        match self {
            Self::Identity => {}
            Self::Relu => scale(
                x,
                gradient,
                #[inline(always)]
                |x| if x > 0.0 { 1.0 } else { 0.0 },
            ),
            Self::Gelu => scale(
                x,
                gradient,
                #[inline(always)]
                |x| fma(x * NORMAL_DENSITY_AT_0, exp(-0.5 * x * x), 0.5 * (1.0 + erf(x * SQRT_HALF))),
            ),
            Self::GeluTanh => scale(
                x,
                gradient,
                #[inline(always)]
                |x| {
                    let t = tanh(TANH_SCALE * fma(TANH_CUBE * x * x, x, x));
                    let slope = TANH_SCALE * fma(3.0 * TANH_CUBE * x, x, 1.0);
                    0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * slope
                },
            ),
            Self::Silu => scale(
                x,
                gradient,
                #[inline(always)]
                |x| {
                    let s = sigmoid(x);
                    s * fma(x, 1.0 - s, 1.0)
                },
            ),
            Self::Sigmoid => scale(
                x,
                gradient,
                #[inline(always)]
                |x| {
                    let s = sigmoid(x);
                    s * (1.0 - s)
                },
            ),
            Self::Tanh => scale(
                x,
                gradient,
                #[inline(always)]
                |x| {
                    let t = tanh(x);
                    1.0 - t * t
                },
            ),
            Self::Softplus => scale(x, gradient, sigmoid),
            Self::LogSigmoid => scale(
                x,
                gradient,
                #[inline(always)]
                |x| sigmoid(-x),
            ),
        }
    }

    /// The same out of Burn's operations.
    pub(crate) fn composed<const D: usize>(self, x: Tensor<D>) -> Tensor<D> {
        match self {
            Self::Identity => x,
            Self::Relu => burn_activation::relu(x),
            Self::Gelu => burn_activation::gelu(x),
            Self::GeluTanh => burn_activation::gelu_approximate(x),
            Self::Silu => burn_activation::silu(x),
            Self::Sigmoid => burn_activation::sigmoid(x),
            Self::Tanh => burn_activation::tanh(x),
            Self::Softplus => burn_activation::softplus(x, 1.0),
            Self::LogSigmoid => burn_activation::log_sigmoid(x),
        }
    }
}

#[inline(always)]
fn map(values: &mut [f32], f: impl Fn(f32) -> f32) {
    simd(
        #[inline(always)]
        || {
            // A loop: `for_each` may be left out of line, and then computes without vector instructions.
            for x in values.iter_mut() {
                *x = f(*x);
            }
        },
    );
}

#[inline(always)]
fn scale(x: &[f32], gradient: &mut [f32], f: impl Fn(f32) -> f32) {
    simd(
        #[inline(always)]
        || {
            for (g, &x) in gradient.iter_mut().zip(x) {
                *g *= f(x);
            }
        },
    );
}

/// Applies an activation to every element.
///
/// # Shapes
/// - x, output: any
pub fn activate<const D: usize>(x: Tensor<D>, activation: Activation) -> Tensor<D> {
    if !runs_natively(&x) {
        return activation.composed(x);
    }
    Tensor::from_dispatch(apply(&Activate(activation), [x.into_dispatch()]))
}

#[derive(Debug, Clone)]
struct Activate(Activation);

impl Function<1> for Activate {
    type Saved = FlexTensor;

    fn forward(&self, [x]: [FlexTensor; 1]) -> (FlexTensor, FlexTensor) {
        (self.0.of(&x), x)
    }

    fn backward(&self, x: FlexTensor, upstream: FlexTensor, _: [bool; 1]) -> [Option<FlexTensor>; 1] {
        [Some(self.0.pull_back(&x, &upstream))]
    }

    fn infer(&self, [x]: [FlexTensor; 1]) -> FlexTensor {
        self.0.of_owned(x)
    }
}

impl Activation {
    /// `f(x)` for every element.
    pub(crate) fn of(self, x: &FlexTensor) -> FlexTensor {
        let output = changed(&floats(x), 1, |_, values| self.forward(values));
        tensor(output, x.layout().shape().clone())
    }

    /// `f(x)` for every element, in the memory of `x` where nobody else holds it.
    pub(crate) fn of_owned(self, mut x: FlexTensor) -> FlexTensor {
        match x.is_contiguous().then(|| x.try_storage_mut::<f32>()).flatten() {
            Some(values) => in_place(values, 1, |_, values| self.forward(values)),
            None => return self.of(&x),
        }
        x
    }

    /// `upstream f'(x)` for every element.
    pub(crate) fn pull_back(self, x: &FlexTensor, upstream: &FlexTensor) -> FlexTensor {
        let x = floats(x);
        let gradient = changed(&floats(upstream), 1, |first, gradient| {
            self.backward(&x[first..first + gradient.len()], gradient);
        });
        tensor(gradient, upstream.layout().shape().clone())
    }
}
