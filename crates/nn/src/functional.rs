//! Layers whose weights are arguments, with one set of weights for every element of the batch, each applied to rows of
//! its own: what a hypernetwork that is conditioned on the data needs. No layer loops over the batch.

use burn::tensor::ops::ConvOptions;
use burn::tensor::{Tensor, activation};
use kiln_ops::matmul;

/// `x W + b`.
///
/// # Shapes
/// - x: `[batch, rows, d_in]`
/// - weight: `[batch, d_in, d_out]`, as [`Linear`](crate::Linear) has it
/// - bias: `[batch, d_out]`
/// - output: `[batch, rows, d_out]`
pub fn linear(x: Tensor<3>, weight: Tensor<3>, bias: Option<Tensor<2>>) -> Tensor<3> {
    let y = matmul(x, weight);
    match bias {
        Some(bias) => y + bias.unsqueeze_dim::<3>(1),
        None => y,
    }
}

/// Convolution over two axes: one convolution with a group of channels for every set of weights.
///
/// # Shapes
/// - x: `[batch, rows, channels_in, height, width]`
/// - weight: `[batch, channels_out, channels_in / groups, ...kernel]`
/// - bias: `[batch, channels_out]`
/// - output: `[batch, rows, channels_out, height', width']`
pub fn conv2d(
    x: Tensor<5>,
    weight: Tensor<5>,
    bias: Option<Tensor<2>>,
    mut options: ConvOptions<2>,
) -> Tensor<5> {
    let [batch, rows, channels_in, height, width] = x.dims();
    let [_, channels_out, of_group, kernel_height, kernel_width] = weight.dims();
    let x = x.swap_dims(0, 1).reshape([rows, batch * channels_in, height, width]);
    let weight = weight.reshape([batch * channels_out, of_group, kernel_height, kernel_width]);
    options.groups *= batch;
    let y = kiln_ops::conv2d(x, weight, bias.map(|bias| bias.reshape([-1])), options);
    let [_, _, height, width] = y.dims();
    y.reshape([rows, batch, channels_out, height, width]).swap_dims(0, 1)
}

/// Layer norm over the last axis.
///
/// # Shapes
/// - x, output: `[batch, rows, width]`
/// - weight, bias: `[batch, width]`
pub fn layer_norm(x: Tensor<3>, weight: Tensor<2>, bias: Option<Tensor<2>>, epsilon: f64) -> Tensor<3> {
    let ones = Tensor::ones([x.dims()[2]], &x.device());
    let y = kiln_ops::layer_norm(x, ones, None, epsilon) * weight.unsqueeze_dim::<3>(1);
    match bias {
        Some(bias) => y + bias.unsqueeze_dim::<3>(1),
        None => y,
    }
}

/// One step of an LSTM: `c' = σ(f) c + σ(i) tanh(g)`, `h' = σ(o) tanh(c')` with the gates `i, f, g, o` one after another
/// in `x W_x + h W_h + b`.
///
/// # Shapes
/// - x: `[batch, rows, d_in]`
/// - h, c, outputs: `[batch, rows, hidden]`
/// - weight_x: `[batch, d_in, 4 hidden]`, weight_h: `[batch, hidden, 4 hidden]`, bias: `[batch, 4 hidden]`
pub fn lstm_cell(
    x: Tensor<3>,
    (h, c): (Tensor<3>, Tensor<3>),
    weight_x: Tensor<3>,
    weight_h: Tensor<3>,
    bias: Tensor<2>,
) -> (Tensor<3>, Tensor<3>) {
    let gates = linear(x, weight_x, Some(bias)) + linear(h, weight_h, None);
    let [i, f, g, o]: [Tensor<3>; 4] = gates.chunk(4, 2).try_into().expect("four gates");
    let c = activation::sigmoid(f) * c + activation::sigmoid(i) * activation::tanh(g);
    (activation::sigmoid(o) * activation::tanh(c.clone()), c)
}
