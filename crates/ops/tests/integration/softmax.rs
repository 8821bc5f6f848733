//! Softmax and its logarithm equal Burn's, forward and backward, along every axis.

use burn::tensor::{DType, Device, Tensor, activation};
use kiln_ops::{log_softmax, softmax};
use rand::RngExt;

use crate::support::{assert_close, assert_same, rng};

#[test]
fn both_equal_burns_along_every_axis_for_random_shapes() {
    let mut rng = rng(0);
    for case in 0..60 {
        let dims = [0; 3].map(|_| rng.random_range(1..if case % 10 == 0 { 60 } else { 12 }));
        let dim = case % 3;
        // Now and then a view whose axes are not in order.
        let shape = |x: &Tensor<1>| match case % 2 {
            0 => x.clone().reshape(dims),
            _ => x.clone().reshape([dims[1], dims[0], dims[2]]).swap_dims(0, 1),
        };
        let len = [dims.iter().product()];
        assert_same(
            &format!("softmax of {dims:?} along {dim}"),
            &len,
            1e-5,
            |x| softmax(shape(&x[0]), dim).reshape([-1]),
            |x| activation::softmax(shape(&x[0]), dim).reshape([-1]),
        );
        assert_same(
            &format!("log softmax of {dims:?} along {dim}"),
            &len,
            1e-5,
            |x| log_softmax(shape(&x[0]), dim).reshape([-1]),
            |x| activation::log_softmax(shape(&x[0]), dim).reshape([-1]),
        );
    }
}

#[test]
fn nothing_in_gives_nothing_out() {
    let device = Device::flex();
    for dims in [[0, 3], [3, 0]] {
        for dim in [0, 1] {
            assert_eq!(softmax(Tensor::<2>::zeros(dims, &device), dim).dims(), dims);
            assert_eq!(log_softmax(Tensor::<2>::zeros(dims, &device), dim).dims(), dims);
        }
    }
}

#[test]
fn a_negative_axis_counts_from_the_end() {
    let x = Tensor::<2>::from_floats([[1.0, 2.0, 3.0], [0.0, -1.0, 4.0]], &Device::flex());
    assert_eq!(softmax(x.clone(), -1).into_data(), softmax(x.clone(), 1).into_data());
    assert_eq!(log_softmax(x.clone(), -2).into_data(), log_softmax(x, 0).into_data());
}

#[test]
fn huge_values_keep_their_differences_and_infinities_count_as_nothing() {
    let x = Tensor::<2>::from_floats([[1e30, 1e30, f32::NEG_INFINITY], [-1e4, -1e4, -1e4]], &Device::flex());
    let y = softmax(x.clone(), 1).into_data().try_to_vec::<f32>().unwrap();
    assert_close("probabilities", &y, &[0.5, 0.5, 0.0, 1.0 / 3.0, 1.0 / 3.0, 1.0 / 3.0], 1e-6);
    let y = log_softmax(x, 1).into_data().try_to_vec::<f32>().unwrap();
    assert_close("logarithms", &y[3..], &[-(3f32.ln()); 3], 1e-6);
    assert_eq!(y[2], f32::NEG_INFINITY);
}

#[test]
fn nan_spreads_over_its_row_alone_and_a_row_of_minus_infinity_is_nan() {
    let x = [[f32::NAN, 1.0, 2.0], [0.0, 1.0, 2.0], [f32::NEG_INFINITY; 3]];
    let x = Tensor::<2>::from_floats(x, &Device::flex());
    for y in [softmax(x.clone(), 1), log_softmax(x, 1)] {
        let y = y.into_data().try_to_vec::<f32>().unwrap();
        let nan: Vec<bool> = y.iter().map(|y| y.is_nan()).collect();
        assert_eq!(nan, [true, true, true, false, false, false, true, true, true]);
    }
}

#[test]
fn double_precision_is_burns() {
    let x = Tensor::<2>::from_floats([[1.0, 2.0, 3.0], [0.0, -1.0, 4.0]], &Device::flex()).cast(DType::F64);
    assert_eq!(softmax(x.clone(), 1).into_data(), activation::softmax(x.clone(), 1).into_data());
    assert_eq!(log_softmax(x.clone(), 0).into_data(), activation::log_softmax(x, 0).into_data());
}
