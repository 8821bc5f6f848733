//! The linear layer and the activations equal Burn's, forward and backward, for shapes of every kind.

use burn::tensor::{Device, Tensor, activation, module};
use kiln_ops::{Activation, activate, linear};
use rand::RngExt;

use crate::support::{assert_same, rng};

const ACTIVATIONS: [Activation; 9] = [
    Activation::Identity,
    Activation::Relu,
    Activation::Gelu,
    Activation::GeluTanh,
    Activation::Silu,
    Activation::Sigmoid,
    Activation::Tanh,
    Activation::Softplus,
    Activation::LogSigmoid,
];

/// Burn's own function of the same name.
fn burn_activation<const D: usize>(x: Tensor<D>, which: Activation) -> Tensor<D> {
    match which {
        Activation::Identity => x,
        Activation::Relu => activation::relu(x),
        Activation::Gelu => activation::gelu(x),
        Activation::GeluTanh => activation::gelu_approximate(x),
        Activation::Silu => activation::silu(x),
        Activation::Sigmoid => activation::sigmoid(x),
        Activation::Tanh => activation::tanh(x),
        Activation::Softplus => activation::softplus(x, 1.0),
        Activation::LogSigmoid => activation::log_sigmoid(x),
    }
}

#[test]
fn activations_equal_burns_for_every_length() {
    for which in ACTIVATIONS {
        for len in [0, 1, 17, 8193, 20_000] {
            let what = format!("{which:?} of {len}");
            assert_same(
                &what,
                &[len],
                1e-5,
                |x| activate(x[0].clone(), which),
                |x| burn_activation(x[0].clone(), which),
            );
        }
    }
}

#[test]
fn a_linear_layer_equals_burns_for_random_shapes() {
    let mut rng = rng(0);
    for case in 0..40 {
        let [batch, time, inputs, outputs] = [4, 9, 40, 70].map(|most| rng.random_range(1..most));
        let which = ACTIVATIONS[case % ACTIVATIONS.len()];
        let with_bias = case % 2 == 0;
        let what = format!("[{batch}, {time}, {inputs}] to {outputs}, {which:?}");
        let apply = |x: &[Tensor<1>], f: &dyn Fn(Tensor<3>, Tensor<2>, Option<Tensor<1>>) -> Tensor<3>| {
            let input = x[0].clone().reshape([batch, time, inputs]);
            // A transposed view now and then: kernels must not rely on the order in memory.
            let (input, weight) = match case % 3 {
                0 => (input.swap_dims(0, 1), x[1].clone().reshape([outputs, inputs]).transpose()),
                _ => (input, x[1].clone().reshape([inputs, outputs])),
            };
            f(input, weight, with_bias.then(|| x[2].clone())).reshape([-1])
        };
        let lengths = [batch * time * inputs, inputs * outputs, outputs];
        assert_same(
            &what,
            &lengths,
            2e-5,
            |x| apply(x, &|x, w, b| linear(x, w, b, which)),
            |x| apply(x, &|x, w, b| burn_activation(module::linear(x, w, b), which)),
        );
    }
}

#[test]
fn nothing_in_gives_nothing_out() {
    let device = Device::flex();
    let y =
        linear(Tensor::<2>::zeros([0, 3], &device), Tensor::ones([3, 5], &device), None, Activation::Gelu);
    assert_eq!(y.dims(), [0, 5]);
}

#[test]
fn nan_passes_through_every_activation() {
    let device = Device::flex();
    for which in ACTIVATIONS {
        let y = activate(Tensor::<1>::from_floats([f32::NAN, 1.0], &device), which);
        let y = y.into_data().try_to_vec::<f32>().unwrap();
        assert!(y[0].is_nan() && y[1].is_finite(), "{which:?} of NaN is {}", y[0]);
    }
}
