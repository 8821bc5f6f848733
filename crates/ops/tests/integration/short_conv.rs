//! The short convolution equals its definition out of Burn's operations, forward and backward.

use burn::tensor::{Device, Tensor};
use kiln_ops::short_conv;
use rand::RngExt;

use crate::support::{assert_same, rng};

#[test]
fn it_is_a_sum_of_shifted_and_scaled_inputs_for_random_shapes() {
    let mut rng = rng(3);
    for case in 0..25 {
        let [batch, time, kernel, channels] = [4, 150, 6, 40].map(|most| rng.random_range(1..most));
        let seen = time + kernel - 1;
        let view = |x: &Tensor<1>| match case % 2 {
            0 => x.clone().reshape([seen, batch, channels]).swap_dims(0, 1),
            _ => x.clone().reshape([batch, seen, channels]),
        };
        let with_bias = case % 3 != 0;
        assert_same(
            &format!("[{batch}, {seen}, {channels}] by {kernel}"),
            &[batch * seen * channels, kernel * channels, channels],
            1e-4,
            |x| {
                let bias = with_bias.then(|| x[2].clone());
                short_conv(view(&x[0]), x[1].clone().reshape([kernel, channels]), bias).reshape([-1])
            },
            |x| {
                let weight = x[1].clone().reshape([kernel, 1, channels]);
                let term = |j| view(&x[0]).narrow(1, j, time) * weight.clone().narrow(0, j, 1);
                let sum = (1..kernel).fold(term(0), |sum, j| sum + term(j));
                let bias = x[2].clone().mul_scalar(if with_bias { 1.0 } else { 0.0 });
                (sum + bias.unsqueeze::<3>()).reshape([-1])
            },
        );
    }
}

#[test]
fn nothing_in_gives_nothing_out() {
    let device = Device::flex();
    for dims in [[0, 5, 3], [2, 3, 3], [2, 5, 0]] {
        let y = short_conv(Tensor::zeros(dims, &device), Tensor::ones([4, dims[2]], &device), None);
        assert_eq!(y.dims(), [dims[0], dims[1] - 3, dims[2]]);
    }
}

#[test]
#[should_panic(expected = "4 steps of weights do not fit 2 steps of input")]
fn an_input_shorter_than_the_weights_is_named() {
    let device = Device::flex();
    short_conv(Tensor::zeros([1, 2, 3], &device), Tensor::ones([4, 3], &device), None);
}
