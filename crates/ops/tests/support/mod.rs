//! Compares an operation with the same one out of Burn's own, forward and backward, at random inputs.

use burn::tensor::{Device, Tensor, TensorData};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// A stream of random numbers for one test.
pub fn rng(seed: u64) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(seed)
}

/// Values between -2 and 2 in a tensor `[len]` on the CPU.
pub fn random(len: usize, rng: &mut ChaCha8Rng) -> Tensor<1> {
    let values: Vec<f32> = (0..len).map(|_| rng.random_range(-2.0..2.0)).collect();
    Tensor::from_data(TensorData::new(values, [len]), &Device::flex())
}

/// The result and the gradients of `f` at flat `inputs`, with a random upstream gradient drawn from `seed`.
pub fn evaluate(
    inputs: &[Tensor<1>],
    seed: u64,
    f: impl Fn(&[Tensor<1>]) -> Tensor<1>,
) -> (Vec<f32>, Vec<Vec<f32>>) {
    let device = Device::flex().autodiff();
    let leaves: Vec<Tensor<1>> =
        inputs.iter().map(|x| Tensor::from_inner(x.clone()).to_device(&device).require_grad()).collect();
    let output = f(&leaves);
    let upstream = Tensor::from_inner(random(output.dims()[0], &mut rng(seed)));
    let gradients = (output.clone() * upstream).sum().backward();
    let values = |x: Tensor<1>| x.into_data().try_to_vec::<f32>().expect("the values are f32");
    let of_leaf = |leaf: &Tensor<1>| leaf.grad(&gradients).map_or_else(|| vec![0.0; leaf.dims()[0]], values);
    (values(output.inner()), leaves.iter().map(of_leaf).collect())
}

/// Makes sure that `kernel` and `composed` have the same results and gradients at random inputs of the
/// given lengths, up to `tolerance` relative to the largest value of each.
///
/// Both take flat tensors, which they reshape as they need, and return a flat one.
pub fn assert_same(
    what: &str,
    lengths: &[usize],
    tolerance: f32,
    kernel: impl Fn(&[Tensor<1>]) -> Tensor<1>,
    composed: impl Fn(&[Tensor<1>]) -> Tensor<1>,
) {
    let mut rng = rng(lengths.iter().sum::<usize>() as u64);
    let inputs: Vec<Tensor<1>> = lengths.iter().map(|&len| random(len, &mut rng)).collect();
    let (found, found_gradients) = evaluate(&inputs, 1, kernel);
    let (expected, expected_gradients) = evaluate(&inputs, 1, composed);
    assert_close(&format!("{what}: result"), &found, &expected, tolerance);
    for (i, (found, expected)) in found_gradients.iter().zip(&expected_gradients).enumerate() {
        assert_close(&format!("{what}: gradient of input {i}"), found, expected, tolerance);
    }
}

/// Makes sure that two lists of numbers differ by at most `tolerance` relative to the largest.
pub fn assert_close(what: &str, found: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(found.len(), expected.len(), "{what}: lengths");
    let largest = expected.iter().fold(1.0f32, |largest, x| largest.max(x.abs()));
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        let same = (found - expected).abs() <= tolerance * largest || found == expected;
        assert!(same, "{what}: element {i} is {found}, should be {expected}");
    }
}
