//! The fused cross-entropy equals log-softmax, gather and sum, forward and backward.

use burn::nn::loss::CrossEntropyLossConfig;
use burn::tensor::{DType, Device, Int, Tensor, TensorData, activation};
use kiln_ops::{CrossEntropyOptions, cross_entropy};
use rand::RngExt;

use crate::support::{assert_close, assert_same, rng};

fn targets(values: Vec<i64>) -> Tensor<1, Int> {
    let len = values.len();
    Tensor::from_data(TensorData::new(values, [len]), &Device::flex())
}

/// The definition, in the words of Burn.
fn by_definition(x: Tensor<2>, targets: &[i64], options: &CrossEntropyOptions) -> Tensor<1> {
    let [rows, classes] = x.dims();
    let device = x.device();
    let spread = options.label_smoothing / classes as f32;
    let mut smoothed = vec![0.0; rows * classes];
    for (row, &target) in targets.iter().enumerate() {
        if !options.ignored.contains(&target) {
            smoothed[row * classes..(row + 1) * classes].fill(spread);
            smoothed[row * classes + target as usize] += 1.0 - options.label_smoothing;
        }
    }
    let mut smoothed = Tensor::<2>::from_data(TensorData::new(smoothed, [rows, classes]), &device);
    if let Some(weights) = &options.weights {
        smoothed = smoothed * Tensor::<1>::from_data(weights.to_data(), &device).reshape([1, classes]);
    }
    (activation::log_softmax(x, 1) * smoothed).sum_dim(1).neg().reshape([rows])
}

#[test]
fn losses_and_gradients_equal_the_definition_with_every_option() {
    let mut rng = rng(0);
    for case in 0..48 {
        let rows = rng.random_range(1..40);
        let classes = rng.random_range(1..if case % 5 == 0 { 900 } else { 40 });
        let ids: Vec<i64> = (0..rows).map(|_| rng.random_range(0..classes) as i64).collect();
        let weights: Vec<f32> = (0..classes).map(|_| rng.random_range(0.2..2.0)).collect();
        let options = CrossEntropyOptions {
            label_smoothing: if case % 2 == 0 { 0.0 } else { 0.15 },
            weights: (case % 3 == 0).then(|| Tensor::from_floats(weights.as_slice(), &Device::flex())),
            ignored: if case % 4 < 2 { vec![] } else { vec![0, 1] },
        };
        // A transposed view now and then.
        let shape = |x: &Tensor<1>| match case % 2 {
            0 => x.clone().reshape([rows, classes]),
            _ => x.clone().reshape([classes, rows]).transpose(),
        };
        assert_same(
            &format!("{rows} rows of {classes} classes, {options:?}"),
            &[rows * classes],
            1e-5,
            |x| cross_entropy(shape(&x[0]), targets(ids.clone()), &options),
            |x| by_definition(shape(&x[0]), &ids, &options),
        );
    }
}

#[test]
fn the_gradient_is_right_whether_or_not_the_logits_live_on() {
    // Logits that nobody else holds give their memory to the gradient.
    for share in [false, true] {
        let logits = |x: &Tensor<1>| x.clone().mul_scalar(1.5).reshape([50, 300]);
        let ids: Vec<i64> = (0..50).map(|i| i * 5).collect();
        let options = CrossEntropyOptions::default();
        assert_same(
            "logits out of another operation",
            &[50 * 300],
            1e-5,
            |x| {
                let logits = logits(&x[0]);
                let kept = share.then(|| logits.clone());
                let loss = cross_entropy(logits, targets(ids.clone()), &options);
                kept.map_or(loss.clone(), |kept| loss + kept.sum_dim(1).reshape([50]))
            },
            |x| {
                let loss = by_definition(logits(&x[0]), &ids, &options);
                if share { loss + logits(&x[0]).sum_dim(1).reshape([50]) } else { loss }
            },
        );
    }
}

#[test]
fn the_weighted_mean_is_burns_loss() {
    let device = Device::flex();
    let logits = crate::support::random(12, &mut rng(3)).reshape([4, 3]);
    let ids = targets(vec![2, 0, 1, 1]);
    let weights = Tensor::<1>::from_floats([0.5, 2.0, 1.0], &device);
    let config =
        CrossEntropyLossConfig::new().with_weights(Some(vec![0.5, 2.0, 1.0])).with_smoothing(Some(0.1));
    let expected = config.init(&device).forward(logits.clone(), ids.clone());
    let options = CrossEntropyOptions {
        label_smoothing: 0.1,
        weights: Some(weights.clone()),
        ..CrossEntropyOptions::default()
    };
    let found = cross_entropy(logits, ids.clone(), &options).sum() / weights.gather(0, ids).sum();
    assert_close("loss", &[found.into_scalar()], &[expected.into_scalar()], 1e-6);
}

#[test]
fn ignored_targets_need_not_be_classes_and_no_rows_have_no_losses() {
    let device = Device::flex();
    let options = CrossEntropyOptions { ignored: vec![-100], ..Default::default() };
    let x = Tensor::<2>::from_floats([[0.0, 0.0], [f32::NAN, 0.0], [f32::NAN, 0.0]], &device);
    let loss = cross_entropy(x, targets(vec![1, -100, 0]), &options).into_data().try_to_vec::<f32>().unwrap();
    assert_close("losses", &loss[..2], &[2f32.ln(), 0.0], 1e-6);
    assert!(loss[2].is_nan());
    let none = cross_entropy(Tensor::zeros([0, 5], &device), targets(vec![]), &Default::default());
    assert_eq!(none.dims(), [0]);
}

#[test]
#[should_panic(expected = "the target 3 is none of the 3 classes")]
fn a_target_that_is_no_class_is_named() {
    cross_entropy(Tensor::zeros([1, 3], &Device::flex()), targets(vec![3]), &Default::default());
}

#[test]
fn double_precision_gives_the_same() {
    let options = CrossEntropyOptions { label_smoothing: 0.1, ignored: vec![1], ..Default::default() };
    let x = crate::support::random(15, &mut rng(4)).reshape([5, 3]);
    let ids = targets(vec![0, 1, 2, 2, 1]);
    let single = cross_entropy(x.clone(), ids.clone(), &options).into_data().try_to_vec::<f32>().unwrap();
    let double = cross_entropy(x.cast(DType::F64), ids, &options).into_data();
    let double: Vec<f32> = double.iter::<f32>().collect();
    assert_close("losses", &double, &single, 1e-6);
}
