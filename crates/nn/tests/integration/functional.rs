//! A layer with one set of weights a sample equals a loop over the samples with an ordinary layer, and so do its
//! gradients.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use burn::tensor::ops::ConvOptions;
use burn::tensor::{Device, Tensor, Tolerance};
use kiln_nn::functional;
use kiln_ops::Activation;

use crate::random;

/// A leaf of normal values, the same in every run.
fn leaf<const D: usize>(name: &str, shape: [usize; D]) -> Tensor<D> {
    Tensor::from_inner(random(name, shape, &Device::flex())).require_grad()
}

/// Compares two ways to compute `y`, and the gradients of the inputs by way of each.
macro_rules! assert_same {
    ($batched:expr, $looped:expr, $($input:expr),+) => {{
        let (batched, looped) = ($batched, $looped);
        let tolerance = Tolerance::<f32>::absolute(2e-5);
        batched.clone().into_data().assert_approx_eq::<f32>(&looped.clone().into_data(), tolerance);
        let of_batched = batched.square().sum().backward();
        let of_looped = looped.square().sum().backward();
        $(
            let (found, expected) = ($input.grad(&of_batched).unwrap(), $input.grad(&of_looped).unwrap());
            found.into_data().assert_approx_eq::<f32>(&expected.into_data(), Tolerance::absolute(2e-4));
        )+
    }};
}

/// Element `i` of the batch.
fn sample<const D: usize, const E: usize>(x: &Tensor<D>, i: usize) -> Tensor<E> {
    x.clone().narrow(0, i, 1).squeeze_dim(0)
}

#[test]
fn linear_equals_a_loop() {
    let (x, w, b) = (leaf("x", [3, 4, 5]), leaf("w", [3, 5, 2]), leaf("b", [3, 2]));
    let looped = (0..3).map(|i| {
        kiln_ops::linear(sample::<3, 2>(&x, i), sample(&w, i), Some(sample(&b, i)), Activation::Identity)
    });
    let looped: Tensor<3> = Tensor::stack(looped.collect(), 0);
    assert_same!(functional::linear(x.clone(), w.clone(), Some(b.clone())), looped, x, w, b);
}

#[test]
fn conv2d_equals_a_loop() {
    for groups in [1, 2] {
        let (x, w, b) = (leaf("x", [3, 2, 4, 6, 5]), leaf("w", [3, 6, 4 / groups, 3, 2]), leaf("b", [3, 6]));
        let options = || ConvOptions::new([2, 1], [1, 0], [1, 1], groups);
        let looped =
            (0..3).map(|i| kiln_ops::conv2d(sample(&x, i), sample(&w, i), Some(sample(&b, i)), options()));
        let looped: Tensor<5> = Tensor::stack(looped.collect(), 0);
        assert_same!(functional::conv2d(x.clone(), w.clone(), Some(b.clone()), options()), looped, x, w, b);
    }
}

#[test]
fn layer_norm_equals_a_loop() {
    let (x, w, b) = (leaf("x", [3, 4, 8]), leaf("w", [3, 8]), leaf("b", [3, 8]));
    let looped =
        (0..3).map(|i| kiln_ops::layer_norm(sample::<3, 2>(&x, i), sample(&w, i), Some(sample(&b, i)), 1e-5));
    let looped: Tensor<3> = Tensor::stack(looped.collect(), 0);
    assert_same!(functional::layer_norm(x.clone(), w.clone(), Some(b.clone()), 1e-5), looped, x, w, b);
}

#[test]
fn lstm_cell_is_burns_lstm() {
    use burn::module::Param;
    let device = Device::flex();
    let mut lstm = burn::nn::LstmConfig::new(3, 4, true).init(&device);
    let (w_x, w_h, b) =
        (leaf("w_x", [1, 3, 16]).inner(), leaf("w_h", [1, 4, 16]).inner(), leaf("b", [1, 16]).inner());
    let part = |x: &Tensor<3>, gate: usize| -> Tensor<2> { sample(&x.clone().narrow(2, gate * 4, 4), 0) };
    for (gate, layer) in
        [&mut lstm.input_gate, lstm.forget_gate.as_mut().unwrap(), &mut lstm.cell_gate, &mut lstm.output_gate]
            .into_iter()
            .enumerate()
    {
        layer.input_transform.weight = Param::from_tensor(part(&w_x, gate));
        layer.hidden_transform.weight = Param::from_tensor(part(&w_h, gate));
        layer.input_transform.bias = Some(Param::from_tensor(sample(&b.clone().narrow(1, gate * 4, 4), 0)));
        layer.hidden_transform.bias = Some(Param::from_tensor(Tensor::zeros([4], &device)));
    }
    let x = leaf("x", [2, 3, 3]).inner(); // [rows, time, d_in]
    let (expected, _) = lstm.forward(x.clone(), None);
    let zeros = Tensor::<3>::zeros([1, 2, 4], &device);
    let mut state = (zeros.clone(), zeros);
    for t in 0..3 {
        let x: Tensor<3> = x.clone().narrow(1, t, 1).swap_dims(0, 1);
        state = functional::lstm_cell(x, state, w_x.clone(), w_h.clone(), b.clone());
        let expected = expected.clone().narrow(1, t, 1).swap_dims(0, 1);
        state.0.clone().into_data().assert_approx_eq::<f32>(&expected.into_data(), Tolerance::absolute(1e-5));
    }
}
