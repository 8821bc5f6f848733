//! From numbers to a class: thresholds, the order that classes have or have not, and regions about examples.

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

/// Gives each row of `target [rows, targets]` the class of the nearest of `classes` examples, rows drawn at random; every
/// target counts alike.
pub fn regions(target: &[f32], targets: usize, classes: usize, rng: &mut impl Rng) -> Vec<usize> {
    let scales: Vec<f32> = (0..targets)
        .map(|index| {
            let column: Vec<f32> = target.iter().skip(index).step_by(targets).copied().collect();
            let (_, std) = moments(&column);
            if std > 0.0 { 1.0 / std } else { 0.0 }
        })
        .collect();
    let rows = target.len() / targets;
    let examples: Vec<&[f32]> =
        (0..classes).map(|_| &target[rng.random_range(0..rows) * targets..][..targets]).collect();
    let distance = |a: &[f32], b: &[f32]| -> f32 {
        a.iter().zip(b).zip(&scales).map(|((a, b), scale)| ((a - b) * scale).powi(2)).sum()
    };
    let nearest = |row: &[f32]| {
        let by_distance =
            |a: &usize, b: &usize| distance(row, examples[*a]).total_cmp(&distance(row, examples[*b]));
        (0..classes).min_by(by_distance).unwrap_or(0)
    };
    target.chunks_exact(targets).map(nearest).collect()
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

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_core::random_stream;

    #[test]
    fn regions_part_clusters_that_no_threshold_on_one_target_parts() {
        // Four corners of a square: each target alone shows two values.
        let corners = [[0.0, 0.0], [0.0, 9.0], [900.0, 0.0], [900.0, 9.0]];
        let target: Vec<f32> = (0..400).flat_map(|row| corners[row % 4]).collect();
        let labels = (0..50)
            .map(|draw| regions(&target, 2, 10, &mut random_stream(0, "test", draw)))
            .find(|labels| {
                let mut first = labels[..4].to_vec();
                renumber(&mut first) == 4
            })
            .expect("ten examples often touch all four corners");
        assert!(labels.chunks(4).all(|row| row == &labels[..4]));
    }

    #[test]
    fn a_target_that_does_not_vary_makes_one_region() {
        let labels = regions(&[3.0; 40], 2, 5, &mut random_stream(0, "test", 0));
        assert!(labels.iter().all(|&label| label == labels[0]));
    }
}
