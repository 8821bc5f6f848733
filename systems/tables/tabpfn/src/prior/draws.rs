//! How the prior draws its own parameters: distributions whose parameters are drawn themselves.

use rand::{Rng, RngExt};
use rand_distr::{Beta, Distribution, Gamma, Normal};

/// A whole number of at least `least` that is small more often than large: `least + round(γ)`, γ from a gamma
/// distribution of shape `exp U(0, ln max_shape)` and mean `U(0, max_mean)`.
pub fn small_count(least: usize, max_shape: f64, max_mean: f64, rng: &mut impl Rng) -> usize {
    let shape = (rng.random::<f64>() * max_shape.ln()).exp();
    let mean = rng.random::<f64>() * max_mean;
    let gamma = Gamma::new(shape, mean.max(f64::MIN_POSITIVE) / shape).expect("shape and scale are positive");
    least + gamma.sample(rng).round() as usize
}

/// A positive number from a normal distribution truncated at 0, whose mean is log-uniform in `means` and whose
/// standard deviation is the mean times a factor log-uniform in 0.01 to 1.
pub fn positive(means: [f64; 2], rng: &mut impl Rng) -> f64 {
    let mean = log_uniform(means, rng);
    let normal = Normal::new(mean, mean * log_uniform([0.01, 1.0], rng)).expect("the deviation is positive");
    // The mean is at least one deviation above 0, so that five draws in six are accepted.
    std::iter::repeat_with(|| normal.sample(rng)).find(|x| *x > 0.0).expect("an endless iterator")
}

/// A number whose logarithm is uniform between those of the bounds.
pub fn log_uniform([least, most]: [f64; 2], rng: &mut impl Rng) -> f64 {
    rng.random_range(least.ln()..=most.ln()).exp()
}

/// A probability of at most `most` from a beta distribution with parameters uniform in 0.1 to 5.
pub fn probability(most: f64, rng: &mut impl Rng) -> f64 {
    let mut parameter = || rng.random_range(0.1..=5.0);
    let beta = Beta::new(parameter(), parameter()).expect("both parameters are positive");
    most * beta.sample(rng)
}

/// One of the choices.
pub fn choose<T: Copy>(choices: &[T], rng: &mut impl Rng) -> T {
    choices[rng.random_range(0..choices.len())]
}

/// A standard normal number.
pub fn normal(rng: &mut impl Rng) -> f32 {
    rand_distr::StandardNormal.sample(rng)
}
