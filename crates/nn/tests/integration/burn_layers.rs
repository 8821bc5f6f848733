//! Layers that Burn has too give Burn's results and gradients with Burn's parameters, under the same names.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use kiln_core::{TensorFile, random_stream};
use kiln_nn::initialise;
use kiln_ops::Activation;

use crate::random;

/// Burn's module and Kiln's with the same parameters, by way of a file, both in training.
fn same_parameters<B: Module, K: Module>(
    burn: impl FnOnce(&Device) -> B,
    kiln: impl FnOnce(&Device) -> K,
) -> (B, K) {
    let device = Device::flex();
    let burn = initialise(&device, &mut random_stream(1, "burn", 0), burn);
    let kiln = initialise(&device, &mut random_stream(2, "kiln", 0), kiln);
    let file = TensorFile::from_module(&burn);
    assert_eq!(file.names().collect::<Vec<_>>(), TensorFile::from_module(&kiln).names().collect::<Vec<_>>());
    (burn.train(), file.into_module(kiln).unwrap().train())
}

/// Makes sure that two layers have the same output and input gradient.
fn assert_same(burn: impl Fn(Tensor<3>) -> Tensor<3>, kiln: impl Fn(Tensor<3>) -> Tensor<3>, width: usize) {
    let device = Device::flex();
    let x = random("x", [3, 5, width], &device);
    let run = |layer: &dyn Fn(Tensor<3>) -> Tensor<3>| {
        let x = Tensor::from_inner(x.clone()).require_grad();
        let y = layer(x.clone());
        let gradients = y.clone().square().sum().backward();
        (y.inner().into_data(), x.grad(&gradients).unwrap().into_data())
    };
    let ((y, d_x), (y_burn, d_x_burn)) = (run(&kiln), run(&burn));
    let tolerance = burn::tensor::Tolerance::absolute(5e-5);
    y.assert_approx_eq::<f32>(&y_burn, tolerance);
    d_x.assert_approx_eq::<f32>(&d_x_burn, tolerance);
}

#[test]
fn linear() {
    for bias in [true, false] {
        let (burn, kiln) = same_parameters(
            |device| burn::nn::LinearConfig::new(7, 12).with_bias(bias).init(device),
            |device| kiln_nn::LinearConfig::new(7, 12).with_bias(bias).init(device),
        );
        assert_same(|x| burn.forward(x), |x| kiln.forward(x), 7);
        assert_same(
            |x| burn::tensor::activation::gelu(burn.forward(x)),
            |x| kiln.forward_activated(x, Activation::Gelu),
            7,
        );
    }
}

#[test]
fn layer_norm() {
    for bias in [true, false] {
        let (burn, kiln) = same_parameters(
            |device| burn::nn::LayerNormConfig::new(9).with_bias(bias).init(device),
            |device| kiln_nn::LayerNormConfig::new(9).with_bias(bias).init(device),
        );
        assert_same(|x| burn.forward(x), |x| kiln.forward(x), 9);
    }
}

#[test]
fn rms_norm() {
    let (burn, kiln) = same_parameters(
        |device| burn::nn::RmsNormConfig::new(9).init(device),
        |device| kiln_nn::RmsNormConfig::new(9).init(device),
    );
    assert_same(|x| burn.forward(x), |x| kiln.forward(x), 9);
}
