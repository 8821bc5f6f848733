//! Batch and group norm equal Burn's, forward and backward, for shapes of every kind.

use burn::tensor::{DType, Device, Tensor, module};
use kiln_ops::{batch_norm, batch_norm_train, group_norm};
use rand::RngExt;

use crate::support::{assert_close, assert_same, random, rng};

const EPSILON: f64 = 1e-5;

/// The four axes of a random input; extents of one and odd ones among them.
fn shape(rng: &mut rand_chacha::ChaCha8Rng) -> [usize; 4] {
    let channels = [1, 2, 6, 12][rng.random_range(0..4)];
    [rng.random_range(1..6), channels, rng.random_range(1..9), rng.random_range(2..20)]
}

/// A view that is not contiguous now and then.
fn input(x: &Tensor<1>, shape: [usize; 4], case: usize) -> Tensor<4> {
    let [batch, channels, height, width] = shape;
    match case % 3 {
        0 => x.clone().reshape([batch, height, width, channels]).permute([0, 3, 1, 2]),
        _ => x.clone().reshape(shape),
    }
}

#[test]
fn batch_norm_in_training_equals_burns() {
    let mut rng = rng(1);
    for case in 0..40 {
        let shape = shape(&mut rng);
        let lengths = [shape.iter().product(), shape[1], shape[1]];
        assert_same(
            &format!("{shape:?}"),
            &lengths,
            5e-5,
            |x| {
                let x_in = input(&x[0], shape, case);
                batch_norm_train(x_in, x[1].clone(), x[2].clone(), EPSILON).output.reshape([-1])
            },
            |x| {
                let x_in = input(&x[0], shape, case);
                module::batch_norm_train(x_in, x[1].clone(), x[2].clone(), EPSILON).output.reshape([-1])
            },
        );
    }
}

#[test]
fn batch_statistics_are_those_of_the_channels() {
    let mut rng = rng(2);
    let x = random(3 * 4 * 35, &mut rng).reshape([3, 4, 35]);
    let ones = || Tensor::ones([4], &Device::flex());
    let found = batch_norm_train(x.clone(), ones(), ones(), EPSILON);
    let expected = module::batch_norm_train(x, ones(), ones(), EPSILON);
    let values = |x: Tensor<1>| x.into_data().try_to_vec::<f32>().unwrap();
    assert_close("mean", &values(found.mean), &values(expected.mean), 1e-6);
    assert_close("variance", &values(found.variance), &values(expected.variance), 1e-6);
}

#[test]
fn batch_norm_with_given_statistics_equals_burns() {
    let mut rng = rng(3);
    for case in 0..40 {
        let shape = shape(&mut rng);
        let mean = random(shape[1], &mut rng);
        let variance = random(shape[1], &mut rng).abs() + 0.1;
        let constants = |x: &Tensor<1>| {
            [&mean, &variance].map(|constant| {
                let constant = constant.clone();
                if x.device().is_autodiff() { Tensor::from_inner(constant) } else { constant }
            })
        };
        let lengths = [shape.iter().product(), shape[1], shape[1]];
        assert_same(
            &format!("{shape:?}"),
            &lengths,
            2e-5,
            |x| {
                let [mean, variance] = constants(&x[0]);
                let x_in = input(&x[0], shape, case);
                batch_norm(x_in, x[1].clone(), x[2].clone(), mean, variance, EPSILON).reshape([-1])
            },
            |x| {
                let [mean, variance] = constants(&x[0]);
                let x_in = input(&x[0], shape, case);
                module::batch_norm(x_in, x[1].clone(), x[2].clone(), mean, variance, EPSILON).reshape([-1])
            },
        );
    }
}

/// Group norm out of Burn's operations.
fn composed(x: Tensor<4>, gamma: Tensor<1>, beta: Tensor<1>, groups: usize) -> Tensor<4> {
    let shape = x.dims();
    let x = x.reshape([(shape[0] * groups) as isize, -1]);
    let centred = x.clone() - x.mean_dim(1);
    let variance = centred.clone().square().mean_dim(1);
    let normalised = (centred / (variance + EPSILON).sqrt()).reshape(shape);
    normalised * gamma.reshape([1, shape[1], 1, 1]) + beta.reshape([1, shape[1], 1, 1])
}

#[test]
fn group_norm_equals_its_definition() {
    let mut rng = rng(4);
    for case in 0..40 {
        let shape = shape(&mut rng);
        let groups = [1, shape[1], if shape[1].is_multiple_of(2) { 2 } else { 1 }][case % 3];
        let lengths = [shape.iter().product(), shape[1], shape[1]];
        assert_same(
            &format!("{shape:?} in {groups}"),
            &lengths,
            5e-5,
            |x| {
                let (gamma, beta) = (Some(x[1].clone()), Some(x[2].clone()));
                group_norm(input(&x[0], shape, case), gamma, beta, groups, EPSILON).reshape([-1])
            },
            |x| composed(input(&x[0], shape, case), x[1].clone(), x[2].clone(), groups).reshape([-1]),
        );
    }
}

#[test]
fn statistics_survive_a_large_mean() {
    let device = Device::flex();
    let x = Tensor::<1>::from_floats([1.0, -1.0], &device).repeat(&[500]).reshape([1, 1, 1000]) + 10_000.0;
    let one = || Tensor::ones([1], &device);
    let y = batch_norm_train(x.clone(), one(), Tensor::zeros([1], &device), 0.0);
    let variance = y.variance.into_data().try_to_vec::<f32>().unwrap();
    assert!((variance[0] - 1.0).abs() < 1e-3, "the variance is {variance:?}");
    let y = group_norm(x, None, None, 1, 0.0).abs().into_data().try_to_vec::<f32>().unwrap();
    assert!(y.iter().all(|y| (y - 1.0).abs() < 2e-3));
}

#[test]
fn nan_reaches_its_own_channel_only() {
    let device = Device::flex();
    let x = Tensor::<3>::from_floats([[[1.0, f32::NAN], [1.0, 2.0]]], &device);
    let y = batch_norm_train(x, Tensor::ones([2], &device), Tensor::zeros([2], &device), EPSILON).output;
    let y = y.into_data().try_to_vec::<f32>().unwrap();
    assert!(y[0].is_nan() && y[1].is_nan() && y[2].is_finite() && y[3].is_finite(), "{y:?}");
}

#[test]
fn nothing_in_gives_nothing_out() {
    let device = Device::flex();
    let (ones, zeros) = (|| Tensor::ones([2], &device), || Tensor::zeros([2], &device));
    let x = || Tensor::<3>::zeros([0, 2, 5], &device);
    assert_eq!(batch_norm(x(), ones(), zeros(), zeros(), ones(), EPSILON).dims(), [0, 2, 5]);
    assert_eq!(group_norm(x(), None, None, 2, EPSILON).dims(), [0, 2, 5]);
}

#[test]
fn double_precision_takes_burns_path() {
    let device = Device::flex();
    let x = || Tensor::<3>::ones([2, 2, 5], (&device, DType::F64));
    let one = || Tensor::<1>::ones([2], (&device, DType::F64));
    assert_eq!(batch_norm_train(x(), one(), one(), EPSILON).output.dtype(), DType::F64);
    assert_eq!(group_norm(x(), Some(one()), Some(one()), 2, EPSILON).dtype(), DType::F64);
}

#[test]
#[should_panic(expected = "must have the channels of the input [1, 3, 4]")]
fn a_scale_of_another_width_is_refused() {
    let device = Device::flex();
    let one = || Tensor::ones([2], &device);
    batch_norm_train(Tensor::<3>::zeros([1, 3, 4], &device), one(), one(), EPSILON);
}
