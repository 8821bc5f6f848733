//! Dropout drops what its seed says, forward and backward, and as much as it should.

use burn::tensor::{DType, Device, Tensor};
use kiln_ops::dropout;

use crate::support::{assert_close, assert_same, evaluate, random, rng};

fn floats<const D: usize>(x: Tensor<D>) -> Vec<f32> {
    x.cast(DType::F32).into_data().try_to_vec().expect("the values are f32")
}

/// What dropout multiplies every element by.
fn factors(length: usize, probability: f64, seed: u64) -> Vec<f32> {
    floats(dropout(Tensor::<1>::ones([length], &Device::flex()), probability, seed))
}

#[test]
fn elements_are_scaled_or_dropped_with_the_given_probability() {
    let length = 200_000;
    for probability in [0.0, 0.1, 0.5, 0.9] {
        let factors = factors(length, probability, 7);
        let scale = (1.0 / (1.0 - probability)) as f32;
        assert!(factors.iter().all(|&x| x == 0.0 || x == scale));
        let dropped = factors.iter().filter(|&&x| x == 0.0).count() as f64 / length as f64;
        // Five standard deviations.
        let allowed = 5.0 * (probability * (1.0 - probability) / length as f64).sqrt();
        assert!((dropped - probability).abs() <= allowed, "{dropped} of the elements at {probability}");
    }
}

#[test]
fn neighbours_positions_and_seeds_are_independent() {
    let length = 200_000;
    let signs = |seed| factors(length, 0.5, seed).into_iter().map(|x| x - 1.0).collect::<Vec<f32>>();
    let correlation = |a: &[f32], b: &[f32]| {
        let sum: f32 = a.iter().zip(b).map(|(a, b)| a * b).sum();
        sum / a.len().min(b.len()) as f32
    };
    let allowed = 5.0 / (length as f32).sqrt();
    let first = signs(0);
    for seed in [1, 2, 1 << 32, u64::MAX] {
        assert!(correlation(&first, &signs(seed)).abs() < allowed, "seed {seed}");
    }
    for distance in [1, 2, 3, 4, 8, 16, 64, 4096, 8192, 65_536] {
        assert!(correlation(&first, &first[distance..]).abs() < 2.0 * allowed, "distance {distance}");
    }
}

#[test]
fn the_same_seed_drops_the_same_in_every_precision_forward_and_backward() {
    for length in [0, 1, 17, 8192, 8193, 50_000] {
        assert_same(
            &format!("{length} elements"),
            &[length],
            1e-6,
            |x| dropout(x[0].clone(), 0.3, 5),
            |x| dropout(x[0].clone().cast(DType::F64), 0.3, 5).cast(DType::F32),
        );
    }
}

#[test]
fn the_gradient_is_dropped_where_the_element_was() {
    let x = [random(1000, &mut rng(0))];
    let (_, gradients) = evaluate(&x, 1, |x| dropout(x[0].clone(), 0.5, 3));
    let upstream = floats(random(1000, &mut rng(1)));
    let expected: Vec<f32> = factors(1000, 0.5, 3).iter().zip(upstream).map(|(f, u)| f * u).collect();
    assert_close("gradient", &gradients[0], &expected, 0.0);
}

#[test]
fn views_drop_by_their_own_order_and_nan_stays() {
    let x = random(60, &mut rng(0)).reshape([6, 10]);
    let view = dropout(x.clone().transpose(), 0.5, 1);
    let copy = dropout(Tensor::<2>::from_data(x.transpose().into_data(), &Device::flex()), 0.5, 1);
    assert_eq!(floats(view), floats(copy));
    let nan = dropout(Tensor::<1>::full([100], f32::NAN, &Device::flex()), 0.5, 1);
    assert!(floats(nan).iter().all(|x| x.is_nan()));
}

#[test]
#[should_panic(expected = "dropout needs a probability in [0, 1), not 1")]
fn everything_cannot_be_dropped() {
    dropout(Tensor::<1>::ones([1], &Device::flex()), 1.0, 0);
}
