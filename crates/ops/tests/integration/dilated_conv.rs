//! The dilated depthwise convolution equals its definition out of Burn's operations, forward and backward.

use burn::tensor::{Device, Tensor};
use kiln_ops::{DilatedConvOptions, dilated_conv};
use rand::RngExt;

use crate::support::{assert_same, rng};

/// The definition: a sum of shifted and scaled inputs, padded with zeros.
fn composed(x: Tensor<3>, weight: Tensor<2>, bias: Tensor<1>, options: DilatedConvOptions) -> Tensor<3> {
    let ([batch, time, channels], [_, kernel]) = (x.dims(), weight.dims());
    let DilatedConvOptions { dilation, padding: [before, after] } = options;
    let outputs = time + before + after - (kernel - 1) * dilation;
    let zeros = |steps| Tensor::<3>::zeros([batch, steps, channels], &x.device());
    let mut parts = vec![x.clone()];
    if before > 0 {
        parts.insert(0, zeros(before));
    }
    if after > 0 {
        parts.push(zeros(after));
    }
    let x = Tensor::cat(parts, 1);
    let weight = weight.transpose().unsqueeze::<3>();
    let term = |j: usize| x.clone().narrow(1, j * dilation, outputs) * weight.clone().narrow(1, j, 1);
    (1..kernel).fold(term(0), |sum, j| sum + term(j)) + bias.unsqueeze::<3>()
}

#[test]
fn it_is_a_sum_of_shifted_and_scaled_inputs_for_random_shapes() {
    let mut rng = rng(5);
    for case in 0..40 {
        let [batch, time, kernel, channels] = [4, 400, 18, 40].map(|most| rng.random_range(1..most));
        let dilation = [1, 2, 3, 9, 64][case % 5];
        let span = (kernel - 1) * dilation;
        // Causal, centred, and (where it fits) without padding.
        let options = match case % 3 {
            0 => DilatedConvOptions::causal(kernel, dilation),
            1 => DilatedConvOptions { dilation, padding: [span / 2, span - span / 2] },
            _ if time > span => DilatedConvOptions { dilation, padding: [0, 0] },
            _ => DilatedConvOptions { dilation, padding: [span + 2, 3] },
        };
        let shaped = |x: &[Tensor<1>]| {
            let weight = x[1].clone().reshape([channels, kernel]);
            (x[0].clone().reshape([batch, time, channels]), weight, x[2].clone())
        };
        assert_same(
            &format!("[{batch}, {time}, {channels}] by {kernel}, {options:?}"),
            &[batch * time * channels, channels * kernel, channels],
            1e-4,
            |x| {
                let (x, weight, bias) = shaped(x);
                dilated_conv(x, weight, Some(bias), options).reshape([-1])
            },
            |x| {
                let (x, weight, bias) = shaped(x);
                composed(x, weight, bias, options).reshape([-1])
            },
        );
    }
}

#[test]
fn nothing_in_gives_nothing_out() {
    let device = Device::flex();
    for dims in [[0, 5, 3], [2, 5, 0], [2, 0, 3]] {
        let options = DilatedConvOptions::causal(4, 2);
        let y =
            dilated_conv(Tensor::zeros(dims, &device), Tensor::ones([dims[2], 4], &device), None, options);
        assert_eq!(y.dims(), dims);
    }
}

#[test]
#[should_panic(expected = "taps that span 6 steps do not fit 5 steps of input")]
fn an_input_shorter_than_the_taps_is_named() {
    let device = Device::flex();
    let options = DilatedConvOptions { dilation: 2, padding: [0, 0] };
    dilated_conv(Tensor::zeros([1, 5, 3], &device), Tensor::ones([3, 4], &device), None, options);
}
