//! Convolutions, pooling and norms equal the layers of `burn::nn` of the same name and parameters.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use burn::module::{Module, ModuleVisitor, Param};
use burn::nn::{self as theirs, PaddingConfig1d, PaddingConfig2d, PaddingConfig3d};
use burn::tensor::{Device, Tensor};
use kiln_core::random_stream;
use kiln_nn as ours;

use crate::random;

fn device() -> Device {
    Device::flex().autodiff()
}

fn assert_close<const D: usize>(what: &str, found: Tensor<D>, expected: Tensor<D>) {
    assert_eq!(found.dims(), expected.dims(), "{what}");
    let values = |x: Tensor<D>| x.into_data().try_to_vec::<f32>().expect("a float tensor");
    let (found, expected) = (values(found), values(expected));
    let largest = expected.iter().fold(1.0f32, |largest, x| largest.max(x.abs()));
    for (found, expected) in found.iter().zip(&expected) {
        assert!((found - expected).abs() <= 3e-5 * largest, "{what}: {found}, should be {expected}");
    }
}

/// Makes sure that two results agree, and the gradients of `x` that a random upstream gradient gives.
fn assert_same_gradients<const D: usize>(what: &str, x: &Tensor<D>, found: Tensor<D>, expected: Tensor<D>) {
    assert_close(what, found.clone(), expected.clone());
    let upstream = random("upstream", found.dims(), &device());
    let gradient = |y: Tensor<D>| x.grad(&(y * upstream.clone()).sum().backward()).unwrap();
    assert_close(what, gradient(found), gradient(expected));
}

/// The names and shapes of a module's parameters.
fn parameters(module: &impl Module) -> Vec<(String, Vec<usize>)> {
    #[derive(Default)]
    struct Names(Vec<String>, Vec<(String, Vec<usize>)>);
    impl ModuleVisitor for Names {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            self.1.push((self.0.join("."), param.val().dims().to_vec()));
        }
        fn enter_module(&mut self, name: &str, _: &str) {
            self.0.push(name.to_owned());
        }
        fn exit_module(&mut self, _: &str, _: &str) {
            self.0.pop();
        }
    }
    let mut names = Names::default();
    module.visit(&mut names);
    names.1
}

/// Makes sure that a convolution and Burn's with the same configuration, weight and bias agree in the
/// output and all gradients. The configuration is a call and its further settings.
macro_rules! assert_same_convolution {
    ($config:ident $arguments:tt $shape:expr; $($setting:ident $value:tt)*) => {{
        let device = device();
        let expected = ours::initialise(&device, &mut random_stream(0, "conv", 0), |device| {
            theirs::conv::$config::new $arguments $(.$setting $value)*.init(device)
        });
        let mut found = ours::$config::new $arguments $(.$setting $value)*.init(&device);
        let names = parameters(&expected);
        assert_eq!(parameters(&found), names);
        found.weight = expected.weight.clone();
        found.bias = expected.bias.clone();

        let x = random("x", $shape, &device).require_grad();
        let (y, y_expected) = (found.forward(x.clone()), expected.forward(x.clone()));
        let what = stringify!($config $($setting $value)*);
        assert_close(what, y.clone(), y_expected.clone());
        let upstream = random("upstream", y.dims(), &device);
        let gradients = (y * upstream.clone()).sum().backward();
        let gradients_expected = (y_expected * upstream).sum().backward();
        let weight = expected.weight.val();
        assert_close(what, x.grad(&gradients).unwrap(), x.grad(&gradients_expected).unwrap());
        assert_close(what, weight.grad(&gradients).unwrap(), weight.grad(&gradients_expected).unwrap());
        if let Some(bias) = &expected.bias {
            let bias = bias.val();
            assert_close(what, bias.grad(&gradients).unwrap(), bias.grad(&gradients_expected).unwrap());
        }
    }};
}

#[test]
fn convolutions_over_one_axis_are_burns() {
    assert_same_convolution!(Conv1dConfig(6, 8, 3) [2, 6, 17]; );
    assert_same_convolution!(Conv1dConfig(6, 8, 4) [2, 6, 17]; with_padding(PaddingConfig1d::Same));
    assert_same_convolution!(Conv1dConfig(6, 8, 3) [2, 6, 17];
        with_padding(PaddingConfig1d::Explicit(4, 0)) with_dilation(2) with_bias(false));
    assert_same_convolution!(Conv1dConfig(6, 6, 4) [2, 6, 18]; with_groups(6) with_stride(2));
}

#[test]
fn convolutions_over_two_axes_are_burns() {
    assert_same_convolution!(Conv2dConfig([3, 8], [3, 3]) [2, 3, 9, 11]; );
    assert_same_convolution!(Conv2dConfig([20, 24], [3, 3]) [2, 20, 9, 11]; with_padding(PaddingConfig2d::Same));
    assert_same_convolution!(Conv2dConfig([4, 8], [2, 3]) [2, 4, 10, 11];
        with_padding(PaddingConfig2d::Explicit(1, 0, 1, 2)) with_stride([2, 2]) with_groups(2) with_bias(false));
}

#[test]
fn convolutions_over_three_axes_are_burns() {
    assert_same_convolution!(Conv3dConfig([3, 4], [3, 3, 3]) [2, 3, 5, 6, 7]; with_padding(PaddingConfig3d::Same));
    assert_same_convolution!(Conv3dConfig([3, 4], [2, 3, 1]) [2, 3, 5, 6, 7];
        with_padding(PaddingConfig3d::Explicit(1, 1, 0)) with_stride([2, 1, 1]) with_bias(false));
}

#[test]
fn transposed_convolutions_are_burns() {
    assert_same_convolution!(ConvTranspose1dConfig([4, 6], 4) [2, 4, 9]; with_stride(2) with_padding(1));
    assert_same_convolution!(ConvTranspose2dConfig([4, 6], [3, 3]) [2, 4, 5, 6];
        with_stride([2, 2]) with_padding([1, 1]) with_padding_out([1, 1]) with_groups(2));
    assert_same_convolution!(ConvTranspose3dConfig([4, 6], [2, 2, 2]) [2, 4, 3, 4, 5]; with_bias(false));
}

/// Makes sure that a layer without parameters and Burn's with the same configuration agree.
macro_rules! assert_same_pooling {
    ($config:ident $arguments:tt $shape:expr; $($setting:ident $value:tt)*) => {{
        let device = device();
        let x = random("x", $shape, &device).require_grad();
        let found = ours::$config::new $arguments $(.$setting $value)*.init().forward(x.clone());
        let expected = theirs::pool::$config::new $arguments $(.$setting $value)*.init().forward(x.clone());
        assert_same_gradients(stringify!($config $($setting $value)*), &x, found, expected);
    }};
}

#[test]
fn pooling_layers_are_burns() {
    assert_same_pooling!(MaxPool1dConfig(3) [2, 3, 11]; with_padding(PaddingConfig1d::Same));
    assert_same_pooling!(MaxPool2dConfig([3, 3]) [2, 3, 11, 12];
        with_strides([2, 2]) with_padding(PaddingConfig2d::Explicit(1, 1, 1, 1)));
    assert_same_pooling!(AvgPool1dConfig(3) [2, 3, 11]; with_ceil_mode(true));
    assert_same_pooling!(AvgPool2dConfig([2, 3]) [2, 3, 11, 12];
        with_padding(PaddingConfig2d::Same) with_count_include_pad(false));
    assert_same_pooling!(AdaptiveAvgPool1dConfig(4) [2, 3, 11]; );
    assert_same_pooling!(AdaptiveAvgPool2dConfig([1, 5]) [2, 3, 11, 12]; );
}

#[test]
fn batch_norm_and_its_running_statistics_are_burns() {
    let device = device();
    let found = ours::BatchNormConfig::new(5).with_momentum(0.3).init(&device);
    let expected = theirs::BatchNormConfig::new(5).with_momentum(0.3).init(&device);
    assert_eq!(parameters(&found), parameters(&expected));
    for step in ["first", "second", "third"] {
        let x = random(step, [4, 5, 3, 6], &device).require_grad();
        let (y, y_expected) = (found.forward(x.clone()), expected.forward(x.clone()));
        assert_close("output", y.clone(), y_expected.clone());
        let upstream = random("upstream", y.dims(), &device);
        let gradients = (y * upstream.clone()).sum().backward();
        let gradients_expected = (y_expected * upstream).sum().backward();
        assert_close("gradient", x.grad(&gradients).unwrap(), x.grad(&gradients_expected).unwrap());
        let (gamma, gamma_expected) = (found.gamma.val(), expected.gamma.val());
        let d_gamma = (gamma.grad(&gradients), gamma_expected.grad(&gradients_expected));
        assert_close("gradient of gamma", d_gamma.0.unwrap(), d_gamma.1.unwrap());
    }
    assert_close("mean", found.running_mean.value_sync(), expected.running_mean.value_sync());
    assert_close("variance", found.running_var.value_sync(), expected.running_var.value_sync());

    let (found, expected) = (found.valid(), expected.valid());
    let x = random("x", [2, 5, 7], &Device::flex());
    assert_close("inference", found.forward(x.clone()), expected.forward(x));
}

#[test]
fn a_frozen_batch_norm_keeps_its_statistics() {
    let device = device();
    let layer = ours::BatchNormConfig::new(5).init(&device).freeze();
    layer.forward(random("x", [4, 5, 3], &device));
    assert_close("mean", layer.running_mean.value_sync(), Tensor::zeros([5], &device));
}

#[test]
fn group_and_instance_norm_are_burns() {
    let device = device();
    let x = random("x", [2, 6, 4, 5], &device).require_grad();
    for affine in [true, false] {
        let found = ours::GroupNormConfig::new(3, 6).with_affine(affine).init(&device);
        let expected = theirs::GroupNormConfig::new(3, 6).with_affine(affine).init(&device);
        assert_eq!(parameters(&found), parameters(&expected));
        assert_same_gradients("group norm", &x, found.forward(x.clone()), expected.forward(x.clone()));
        let found = ours::InstanceNormConfig::new(6).with_affine(affine).init(&device);
        let expected = theirs::InstanceNormConfig::new(6).with_affine(affine).init(&device);
        assert_same_gradients("instance norm", &x, found.forward(x.clone()), expected.forward(x.clone()));
    }
}
