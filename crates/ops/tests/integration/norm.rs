//! Norms, gated products and batched matrix products equal Burn's, forward and backward.

use burn::tensor::{DType, Device, Tensor, TensorData, activation, module};
use kiln_ops::{Activation, gated, layer_norm, matmul, rms_norm};
use rand::RngExt;

use crate::support::{assert_same, rng};

fn composed_rms_norm<const D: usize>(x: Tensor<D>, weight: Tensor<1>, epsilon: f64) -> Tensor<D> {
    x.clone() / (x.square().mean_dim(D - 1) + epsilon).sqrt() * weight.unsqueeze()
}

#[test]
fn norms_equal_burns_for_random_shapes() {
    let mut rng = rng(1);
    for case in 0..30 {
        let [batch, time, width] = [5, 9, 300].map(|most| rng.random_range(1..most));
        let view = |x: &Tensor<1>| {
            let x = x.clone().reshape([batch, time, width]);
            if case % 2 == 0 { x.swap_dims(0, 1) } else { x }
        };
        let lengths = [batch * time * width, width, width];
        let what = format!("[{batch}, {time}, {width}]");
        for with_bias in [true, false] {
            let bias = |x: &[Tensor<1>]| with_bias.then(|| x[2].clone());
            assert_same(
                &format!("layer norm of {what}"),
                &lengths,
                3e-5,
                |x| layer_norm(view(&x[0]), x[1].clone(), bias(x), 1e-3).reshape([-1]),
                |x| module::layer_norm(view(&x[0]), x[1].clone(), bias(x), 1e-3).reshape([-1]),
            );
        }
        assert_same(
            &format!("RMS norm of {what}"),
            &lengths[..2],
            3e-5,
            |x| rms_norm(view(&x[0]), x[1].clone(), 1e-3).reshape([-1]),
            |x| composed_rms_norm(view(&x[0]), x[1].clone(), 1e-3).reshape([-1]),
        );
    }
}

#[test]
fn layer_norm_keeps_its_digits_far_from_zero() {
    // One-pass variances lose everything here: mean 10000, deviations below 1.
    let device = Device::flex();
    let x: Vec<f32> = (0..64).map(|i| 10_000.0 + (i % 8) as f32 * 0.125).collect();
    let x = Tensor::<2>::from_data(TensorData::new(x, [1, 64]), &device);
    let y = layer_norm(x, Tensor::ones([64], &device), None, 0.0);
    let y = y.into_data().try_to_vec::<f32>().unwrap();
    let deviation = (0..8).map(|i| (f64::from(i) - 3.5).powi(2) / 8.0).sum::<f64>().sqrt();
    for (i, y) in y.iter().enumerate() {
        let exact = ((i % 8) as f64 - 3.5) / deviation;
        assert!((f64::from(*y) - exact).abs() < 1e-5, "{y} {exact}");
    }
}

#[test]
fn gated_products_equal_burns() {
    for len in [0, 1, 33, 20_001] {
        assert_same(
            &format!("{len} elements"),
            &[len, len],
            1e-5,
            |x| gated(x[0].clone(), x[1].clone(), Activation::Silu),
            |x| activation::silu(x[0].clone()) * x[1].clone(),
        );
    }
}

#[test]
fn batched_products_equal_burns_with_repeated_and_transposed_factors() {
    let mut rng = rng(2);
    for case in 0..40 {
        let [outer, inner_batch, rows, inner, columns] =
            [3, 4, 20, 20, 20].map(|most| rng.random_range(1..most));
        let a_outer = if case % 3 == 0 { 1 } else { outer };
        let b_batch = if case % 4 == 0 { 1 } else { inner_batch };
        let factors = |x: &[Tensor<1>]| {
            let a = match case % 2 {
                0 => x[0].clone().reshape([a_outer, inner_batch, rows, inner]),
                _ => x[0].clone().reshape([a_outer, inner_batch, inner, rows]).swap_dims(2, 3),
            };
            let b = match case % 5 {
                0 => x[1].clone().reshape([outer, inner, b_batch, columns]).swap_dims(1, 2),
                _ => x[1].clone().reshape([outer, b_batch, inner, columns]),
            };
            (a, b)
        };
        let lengths = [a_outer * inner_batch * rows * inner, outer * b_batch * inner * columns];
        assert_same(
            &format!("case {case}"),
            &lengths,
            2e-5,
            |x| {
                let (a, b) = factors(x);
                matmul(a, b).reshape([-1])
            },
            |x| {
                let (a, b) = factors(x);
                a.matmul(b).reshape([-1])
            },
        );
    }
}

#[test]
fn double_precision_is_composed_of_burns_operations() {
    let device = Device::flex();
    let x = TensorData::new((0..12).map(|i| f64::from(i).sin()).collect::<Vec<f64>>(), [3, 4]);
    let x = Tensor::<2>::from_data(x, (&device, DType::F64));
    let weight = Tensor::<1>::ones([4], (&device, DType::F64));
    let y = rms_norm(x.clone(), weight.clone(), 1e-6);
    assert_eq!(y.dtype(), DType::F64);
    let same = composed_rms_norm(x.clone(), weight.clone(), 1e-6).into_data();
    y.into_data().assert_approx_eq::<f64>(&same, burn::tensor::Tolerance::absolute(1e-12));
    assert_eq!(layer_norm(x, weight, None, 1e-6).dtype(), DType::F64);
}

#[test]
#[should_panic(expected = "matrices of [2, 3] and [4, 5] cannot be multiplied")]
fn factors_that_do_not_fit_are_named() {
    let device = Device::flex();
    matmul(Tensor::<2>::zeros([2, 3], &device), Tensor::zeros([4, 5], &device));
}
