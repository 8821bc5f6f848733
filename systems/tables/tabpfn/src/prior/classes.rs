//! From a number to a class: thresholds, and the order that classes have or have not.

use rand::seq::SliceRandom;
use rand::{Rng, RngExt};
use rand_distr::{Distribution, Exp};

use super::draws::normal;

/// How many classes a data set shall have: 2 in half of the cases, else 2 to `most`.
pub fn class_count(most: usize, rng: &mut impl Rng) -> usize {
    if rng.random() { 2 } else { rng.random_range(2..=most) }
}

/// Cuts the target at `classes - 1` thresholds: at values of random rows, or at normal quantiles.
pub fn cut(target: &[f32], classes: usize, rng: &mut impl Rng) -> Vec<usize> {
    let by_rank = rng.random::<bool>();
    let (mean, std) = moments(target);
    let mut threshold = || {
        if by_rank { target[rng.random_range(0..target.len())] } else { mean + std * normal(rng) }
    };
    let thresholds: Vec<f32> = (1..classes).map(|_| threshold()).collect();
    let above = |x: f32| thresholds.iter().filter(|&&threshold| x > threshold).count();
    target.iter().map(|&x| above(x)).collect()
}

/// Takes the order away from classes with probability `1 - ordered`, and turns it round in half of the other cases.
pub fn reorder(labels: &mut [usize], classes: usize, ordered: f64, rng: &mut impl Rng) {
    let mut names: Vec<usize> = (0..classes).collect();
    if rng.random::<f64>() >= ordered {
        names.shuffle(rng);
    } else if rng.random() {
        names.reverse();
    }
    labels.iter_mut().for_each(|label| *label = names[*label]);
}

/// Numbers the classes that occur from 0 in their order; returns how many there are.
pub fn renumber(labels: &mut [usize]) -> usize {
    let mut present = labels.to_vec();
    present.sort_unstable();
    present.dedup();
    labels.iter_mut().for_each(|label| *label = present.partition_point(|other| other < label));
    present.len()
}

/// Turns a column into 2 or more categories, about 10 of them, which have an order in three cases of ten.
pub fn categories(column: &mut [f32], rng: &mut impl Rng) {
    let exponential = Exp::<f64>::new(0.1).expect("the rate is positive");
    let count = (exponential.sample(rng).round() as usize).max(2);
    let thresholds: Vec<f32> = (1..count).map(|_| column[rng.random_range(0..column.len())]).collect();
    let above = |x: f32| thresholds.iter().filter(|&&threshold| x > threshold).count();
    let mut labels: Vec<usize> = column.iter().map(|&x| above(x)).collect();
    reorder(&mut labels, count, 0.3, rng);
    column.iter_mut().zip(labels).for_each(|(x, label)| *x = label as f32);
}

fn moments(values: &[f32]) -> (f32, f32) {
    let count = values.len() as f64;
    let mean = values.iter().map(|&x| f64::from(x)).sum::<f64>() / count;
    let variance = values.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / count;
    (mean as f32, variance.sqrt() as f32)
}
