//! t-SNE (van der Maaten and Hinton 2008): images as points of a plane, near where a network finds them alike.
//!
//! Exact up to [`EXACT`] points; of more, forces between distant ones are those between groups (Barnes–Hut t-SNE, van der
//! Maaten 2014), and only near points attract each other.

use bhtsne::{Neighbor, tSNE};
use kiln_core::{Context, Error, Progress, Result};
use rand_distr::{Distribution, Normal};
use rayon::ThreadPoolBuilder;
use rayon::prelude::*;

/// Most points whose forces are computed pair by pair.
pub const EXACT: usize = 2000;
/// Steps of gradient descent,
const STEPS: usize = 750;
/// of which the first exaggerate what is near,
const EARLY: usize = 250;
/// so many times,
const EXAGGERATION: f64 = 12.0;
/// and have less momentum.
const MOMENTUM: [f64; 2] = [0.5, 0.8];
/// Width of a group of points, as a share of its distance, up to which it counts as one.
const THETA: f64 = 0.5;
/// So many times the perplexity are neighbours that attract a point in the approximation.
const NEIGHBOURS: f64 = 3.0;

/// Places of `points` in a plane; the same for the same seed.
///
/// The perplexity is how many neighbours count; it is lowered where there are few points.
///
/// # Errors
/// When the user stopped, or the system gives no thread.
///
/// # Panics
/// When the points differ in length.
pub fn embed(points: &[Vec<f32>], perplexity: f64, cx: &Context) -> Result<Vec<[f64; 2]>> {
    let n = points.len();
    assert!(points.iter().all(|point| point.len() == points[0].len()), "points must have one length");
    let begin = Normal::new(0.0, 1e-4).expect("a deviation above 0");
    let mut rng = cx.rng("tsne", 0);
    let start: Vec<[f64; 2]> = (0..n).map(|_| [begin.sample(&mut rng), begin.sample(&mut rng)]).collect();
    if n < 3 {
        return Ok(start);
    }
    let perplexity = perplexity.min((n - 1) as f64 / NEIGHBOURS).max(1.0);
    let bar = cx.progress(STEPS as u64, "placing images");
    let places = match n <= EXACT {
        true => exact(points, perplexity, start, &bar, cx),
        false => barnes_hut(points, perplexity, &start, &bar)?,
    };
    if cx.interrupted() {
        return Err(Error::interrupted("stopped before all images had a place"));
    }
    Ok(places)
}

/// The learning rate of scikit-learn.
fn rate(n: usize) -> f64 {
    (n as f64 / EXAGGERATION / 4.0).max(50.0)
}

/// All pairs. Ends early when the user stops.
fn exact(
    points: &[Vec<f32>],
    perplexity: f64,
    mut y: Vec<[f64; 2]>,
    bar: &Progress,
    cx: &Context,
) -> Vec<[f64; 2]> {
    let n = points.len();
    let p = affinities(points, perplexity);
    let mut velocity = vec![[0.0; 2]; n];
    let mut gains = vec![[1.0f64; 2]; n];
    for step in (0..STEPS).take_while(|_| !cx.interrupted()) {
        let (exaggeration, momentum) =
            if step < EARLY { (EXAGGERATION, MOMENTUM[0]) } else { (1.0, MOMENTUM[1]) };
        let gradient = gradient(&p, &y, exaggeration);
        for i in 0..n {
            for axis in 0..2 {
                let turned = (gradient[i][axis] > 0.0) != (velocity[i][axis] > 0.0);
                let gain = if turned { gains[i][axis] + 0.2 } else { gains[i][axis] * 0.8 };
                gains[i][axis] = gain.max(0.01);
                velocity[i][axis] =
                    momentum * velocity[i][axis] - rate(n) * gains[i][axis] * gradient[i][axis];
                y[i][axis] += velocity[i][axis];
            }
        }
        bar.inc(1);
    }
    y
}

/// Groups in place of distant points.
fn barnes_hut(
    points: &[Vec<f32>],
    perplexity: f64,
    start: &[[f64; 2]],
    bar: &Progress,
) -> Result<Vec<[f64; 2]>> {
    let near = nearest(points, (NEIGHBOURS * perplexity) as usize);
    let descend = || {
        let mut tsne = tSNE::<f64, Vec<f32>>::new(points);
        tsne.perplexity(perplexity)
            .epochs(STEPS)
            .early_exaggeration(EXAGGERATION)
            .stop_lying_epoch(EARLY)
            .momentum(MOMENTUM[0])
            .final_momentum(MOMENTUM[1])
            .momentum_switch_epoch(EARLY)
            // Its gradient lacks the factor 4.
            .learning_rate(4.0 * rate(points.len()))
            .initial_embedding(start.concat())
            .epoch_callback(|_, _| bar.inc(1))
            .barnes_hut_with_neighbors(THETA, &near);
        tsne.embedding()
    };
    // On several threads sums depend on which of them is first, and a map is chaotic: the last bit moves every point.
    let alone = ThreadPoolBuilder::new().num_threads(1).build();
    let places = alone.map_err(|e| Error::work("cannot start a thread").caused_by(e))?.install(descend);
    Ok(places.chunks(2).map(|place| [place[0], place[1]]).collect())
}

/// The nearest neighbours of every point, in order; equally near ones by their numbers.
fn nearest(points: &[Vec<f32>], count: usize) -> Vec<Vec<Neighbor<f64>>> {
    let of = |i: usize| {
        let neighbour =
            |index: usize| Neighbor { index, distance: square(&points[i], &points[index]).sqrt() };
        let mut all: Vec<Neighbor<f64>> = (0..points.len()).filter(|&j| j != i).map(neighbour).collect();
        let nearer = |a: &Neighbor<f64>, b: &Neighbor<f64>| {
            a.distance.total_cmp(&b.distance).then(a.index.cmp(&b.index))
        };
        if count < all.len() {
            all.select_nth_unstable_by(count, nearer);
            all.truncate(count);
        }
        all.sort_unstable_by(nearer);
        all
    };
    (0..points.len()).into_par_iter().map(of).collect()
}

/// The squared distance of two points.
fn square(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum()
}

/// Probabilities that one point would choose another as its neighbour, both ways, `[n, n]`.
fn affinities(points: &[Vec<f32>], perplexity: f64) -> Vec<f64> {
    let n = points.len();
    let rows: Vec<Vec<f64>> = (0..n)
        .into_par_iter()
        .map(|i| {
            let distances: Vec<f64> = (0..n).map(|j| square(&points[i], &points[j])).collect();
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

/// `4 Σ_j (p_ij - q_ij) k_ij (y_i - y_j)`, `k_ij = 1 / (1 + |y_i - y_j|²)`, `q_ij = k_ij / Σ k`: attraction and repulsion
/// apart, so that the sum of all kernels is known when it is needed.
fn gradient(p: &[f64], y: &[[f64; 2]], exaggeration: f64) -> Vec<[f64; 2]> {
    let n = y.len();
    let forces = |i: usize| {
        let (mut near, mut far, mut sum) = ([0.0; 2], [0.0; 2], 0.0);
        for j in (0..n).filter(|&j| j != i) {
            let away = [y[i][0] - y[j][0], y[i][1] - y[j][1]];
            let kernel = 1.0 / (1.0 + away[0] * away[0] + away[1] * away[1]);
            sum += kernel;
            for axis in 0..2 {
                near[axis] += p[i * n + j] * kernel * away[axis];
                far[axis] += kernel * kernel * away[axis];
            }
        }
        (near, far, sum)
    };
    let forces: Vec<_> = (0..n).into_par_iter().map(forces).collect();
    let total: f64 = forces.iter().map(|(_, _, sum)| sum).sum();
    let join = |near: f64, far: f64| 4.0 * (exaggeration * near - far / total);
    forces.into_iter().map(|(near, far, _)| [join(near[0], far[0]), join(near[1], far[1])]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_core::random_stream;

    fn context(seed: u64) -> Context {
        Context { seed, ..Context::for_tests("") }
    }

    /// Points of two clusters in turn.
    fn clusters(n: usize) -> Vec<Vec<f32>> {
        let mut rng = random_stream(0, "tsne", 0);
        let noise = Normal::new(0.0f32, 1.0).unwrap();
        (0..n)
            .map(|i| (0..8).map(|_| noise.sample(&mut rng) + if i % 2 == 0 { 8.0 } else { 0.0 }).collect())
            .collect()
    }

    /// Every point's nearest neighbour in the plane is of its own cluster.
    fn assert_apart(y: &[[f64; 2]]) {
        for i in 0..y.len() {
            let distance = |j: usize| (y[i][0] - y[j][0]).hypot(y[i][1] - y[j][1]);
            let others = (0..y.len()).filter(|&j| j != i);
            let nearest = others.min_by(|&a, &b| distance(a).total_cmp(&distance(b))).unwrap();
            assert_eq!(nearest % 2, i % 2);
        }
    }

    #[test]
    fn points_of_two_clusters_stay_apart_and_a_seed_repeats_them() {
        let (cx, points) = (context(0), clusters(60));
        let y = embed(&points, 30.0, &cx).unwrap();
        assert_apart(&y);
        assert_eq!(y, embed(&points, 30.0, &cx).unwrap());
        assert_ne!(y, embed(&points, 30.0, &context(1)).unwrap());
        assert_eq!(embed(&points[..2], 30.0, &cx).unwrap().len(), 2);
    }

    #[test]
    fn the_approximation_keeps_clusters_apart_and_repeats_them_too() {
        let cx = context(0);
        let bar = cx.progress(1, "");
        let mut points = clusters(300);
        points[7] = points[9].clone(); // a copy is as near as can be
        let mut rng = cx.rng("start", 0);
        let begin = Normal::new(0.0, 1e-4).unwrap();
        let start: Vec<[f64; 2]> =
            (0..300).map(|_| [begin.sample(&mut rng), begin.sample(&mut rng)]).collect();
        let y = barnes_hut(&points, 20.0, &start, &bar).unwrap();
        assert_apart(&y);
        assert!(y == barnes_hut(&points, 20.0, &start, &bar).unwrap());
        // Of points that are all the same, too, every one gets a place.
        let same = barnes_hut(&vec![vec![1.0]; 100], 20.0, &start[..100], &bar).unwrap();
        assert!(same.iter().flatten().all(|x| x.is_finite()));
        // Of the size of the exact map, by the mean distance from its middle; how large a map is means nothing.
        let size = |y: &[[f64; 2]]| y.iter().map(|y| y[0].hypot(y[1])).sum::<f64>() / y.len() as f64;
        let ratio = size(&y) / size(&exact(&points, 20.0, start, &bar, &cx));
        assert!((0.3..3.0).contains(&ratio), "{ratio}");
    }

    #[test]
    fn the_gradient_is_that_of_the_divergence() {
        let p = affinities(&clusters(12), 3.0);
        let mut rng = random_stream(0, "places", 0);
        let place = Normal::new(0.0, 1.0).unwrap();
        let y: Vec<[f64; 2]> = (0..12).map(|_| [place.sample(&mut rng), place.sample(&mut rng)]).collect();
        // Σ p ln(p / q)
        let divergence = |y: &[[f64; 2]]| {
            let kernel =
                |i: usize, j: usize| 1.0 / (1.0 + (y[i][0] - y[j][0]).powi(2) + (y[i][1] - y[j][1]).powi(2));
            let pairs = || (0..12).flat_map(|i| (0..12).map(move |j| (i, j))).filter(|(i, j)| i != j);
            let total: f64 = pairs().map(|(i, j)| kernel(i, j)).sum();
            pairs().map(|(i, j)| p[i * 12 + j] * (p[i * 12 + j] * total / kernel(i, j)).ln()).sum::<f64>()
        };
        // The affinities of all pairs have the sum 1, but for the diagonal that is not counted.
        let found = gradient(&p, &y, 1.0);
        for i in 0..12 {
            for axis in 0..2 {
                let moved = |by: f64| {
                    let mut y = y.clone();
                    y[i][axis] += by;
                    divergence(&y)
                };
                let expected = (moved(1e-5) - moved(-1e-5)) / 2e-5;
                assert!((found[i][axis] - expected).abs() < 1e-6, "{} {expected}", found[i][axis]);
            }
        }
    }

    #[test]
    fn a_row_of_affinities_has_the_perplexity() {
        let distances: Vec<f64> = (0..50).map(|j| f64::from(j * j)).collect();
        let row = neighbours(&distances, 0, 10.0);
        let entropy = -row.iter().filter(|p| **p > 0.0).map(|p| p * p.ln()).sum::<f64>();
        assert!((entropy.exp() - 10.0).abs() < 1e-6 && row[0] == 0.0);
    }
}
