//! t-SNE (van der Maaten and Hinton 2008), exact: images as points of a plane, near where a network finds them alike.

use rand::Rng;
use rand_distr::{Distribution, Normal};
use rayon::prelude::*;

/// Most points; of more, some are to be chosen.
pub const MOST: usize = 2000;
/// Steps of gradient descent,
const STEPS: usize = 750;
/// of which the first exaggerate what is near,
const EARLY: usize = 250;
/// so many times.
const EXAGGERATION: f64 = 12.0;

/// Places of `points` in a plane.
///
/// The perplexity is how many neighbours count; it is lowered where there are few points.
///
/// # Panics
/// When the points differ in length.
pub fn embed(points: &[Vec<f32>], perplexity: f64, rng: &mut impl Rng) -> Vec<[f64; 2]> {
    let n = points.len();
    assert!(points.iter().all(|point| point.len() == points[0].len()), "points must have one length");
    let start = Normal::new(0.0, 1e-4).expect("a deviation above 0");
    let mut y: Vec<[f64; 2]> = (0..n).map(|_| [start.sample(rng), start.sample(rng)]).collect();
    if n < 3 {
        return y;
    }
    let p = affinities(points, perplexity.min((n - 1) as f64 / 3.0).max(1.0));
    let mut velocity = vec![[0.0; 2]; n];
    let mut gains = vec![[1.0f64; 2]; n];
    // As in scikit-learn.
    let rate = (n as f64 / EXAGGERATION / 4.0).max(50.0);
    for step in 0..STEPS {
        let (exaggeration, momentum) = if step < EARLY { (EXAGGERATION, 0.5) } else { (1.0, 0.8) };
        let gradient = gradient(&p, &y, exaggeration);
        for i in 0..n {
            for axis in 0..2 {
                let turned = (gradient[i][axis] > 0.0) != (velocity[i][axis] > 0.0);
                let gain = if turned { gains[i][axis] + 0.2 } else { gains[i][axis] * 0.8 };
                gains[i][axis] = gain.max(0.01);
                velocity[i][axis] = momentum * velocity[i][axis] - rate * gains[i][axis] * gradient[i][axis];
                y[i][axis] += velocity[i][axis];
            }
        }
    }
    y
}

/// Probabilities that one point would choose another as its neighbour, both ways, `[n, n]`.
fn affinities(points: &[Vec<f32>], perplexity: f64) -> Vec<f64> {
    let n = points.len();
    let rows: Vec<Vec<f64>> = (0..n)
        .into_par_iter()
        .map(|i| {
            let distance = |j: usize| -> f64 {
                points[i].iter().zip(&points[j]).map(|(a, b)| f64::from(a - b).powi(2)).sum()
            };
            let distances: Vec<f64> = (0..n).map(distance).collect();
            neighbours(&distances, i, perplexity)
        })
        .collect();
    let mut p = vec![0.0; n * n];
    for i in 0..n {
        for j in 0..n {
            p[i * n + j] = ((rows[i][j] + rows[j][i]) / (2 * n) as f64).max(1e-12);
        }
    }
    p
}

/// A row of affinities whose entropy is the logarithm of the perplexity, by bisection.
fn neighbours(distances: &[f64], own: usize, perplexity: f64) -> Vec<f64> {
    let nearest =
        distances.iter().enumerate().filter(|(j, _)| *j != own).map(|(_, d)| *d).fold(f64::MAX, f64::min);
    let row = |beta: f64| -> (Vec<f64>, f64) {
        let weight = |(j, d): (usize, &f64)| if j == own { 0.0 } else { (-beta * (d - nearest)).exp() };
        let mut row: Vec<f64> = distances.iter().enumerate().map(weight).collect();
        let sum: f64 = row.iter().sum();
        row.iter_mut().for_each(|p| *p /= sum);
        let entropy = -row.iter().filter(|p| **p > 0.0).map(|p| p * p.ln()).sum::<f64>();
        (row, entropy)
    };
    let (mut low, mut high, mut beta) = (0.0, f64::INFINITY, 1.0);
    for _ in 0..64 {
        if row(beta).1 > perplexity.ln() {
            low = beta;
            beta = if high.is_finite() { (low + high) / 2.0 } else { beta * 2.0 };
        } else {
            high = beta;
            beta = (low + high) / 2.0;
        }
    }
    row(beta).0
}

/// `4 Σ_j (p_ij - q_ij) (y_i - y_j) / (1 + |y_i - y_j|²)`
fn gradient(p: &[f64], y: &[[f64; 2]], exaggeration: f64) -> Vec<[f64; 2]> {
    let n = y.len();
    let kernel = |i: usize, j: usize| 1.0 / (1.0 + (y[i][0] - y[j][0]).powi(2) + (y[i][1] - y[j][1]).powi(2));
    let sums: Vec<f64> =
        (0..n).into_par_iter().map(|i| (0..n).filter(|&j| j != i).map(|j| kernel(i, j)).sum()).collect();
    let total: f64 = sums.iter().sum();
    (0..n)
        .into_par_iter()
        .map(|i| {
            (0..n).filter(|&j| j != i).fold([0.0; 2], |sum, j| {
                let near = kernel(i, j);
                let force = 4.0 * (exaggeration * p[i * n + j] - near / total) * near;
                [sum[0] + force * (y[i][0] - y[j][0]), sum[1] + force * (y[i][1] - y[j][1])]
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_core::random_stream;

    #[test]
    fn points_of_two_clusters_stay_apart_and_a_seed_repeats_them() {
        let mut rng = random_stream(0, "tsne", 0);
        let noise = Normal::new(0.0f32, 1.0).unwrap();
        let points: Vec<Vec<f32>> = (0..60)
            .map(|i| (0..8).map(|_| noise.sample(&mut rng) + if i % 2 == 0 { 8.0 } else { 0.0 }).collect())
            .collect();
        let y = embed(&points, 30.0, &mut random_stream(0, "tsne", 1));
        assert_eq!(y, embed(&points, 30.0, &mut random_stream(0, "tsne", 1)));
        for i in 0..60 {
            let distance = |j: usize| (y[i][0] - y[j][0]).hypot(y[i][1] - y[j][1]);
            let nearest =
                (0..60).filter(|&j| j != i).min_by(|&a, &b| distance(a).total_cmp(&distance(b))).unwrap();
            assert_eq!(nearest % 2, i % 2);
        }
        assert_eq!(embed(&points[..2], 30.0, &mut rng).len(), 2);
    }

    #[test]
    fn a_row_of_affinities_has_the_perplexity() {
        let distances: Vec<f64> = (0..50).map(|j| f64::from(j * j)).collect();
        let row = neighbours(&distances, 0, 10.0);
        let entropy = -row.iter().filter(|p| **p > 0.0).map(|p| p * p.ln()).sum::<f64>();
        assert!((entropy.exp() - 10.0).abs() < 1e-6 && row[0] == 0.0);
    }
}
