//! Lloyd's k-means with the starts of k-means++.

use rand::{Rng, RngExt};

/// Most rounds of one start.
const ROUNDS: usize = 100;

/// The best of several starts: for each point the number of its cluster.
pub fn kmeans(points: &[Vec<f64>], k: usize, starts: usize, rng: &mut impl Rng) -> Vec<usize> {
    let runs = (0..starts).map(|_| run(points, k.min(points.len()), rng));
    runs.min_by(|a, b| a.0.total_cmp(&b.0)).map_or_else(Vec::new, |(_, clusters)| clusters)
}

fn squared_distance(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum()
}

/// The sum of squared distances and the clusters of one start.
fn run(points: &[Vec<f64>], k: usize, rng: &mut impl Rng) -> (f64, Vec<usize>) {
    let mut centres = vec![points[rng.random_range(0..points.len())].clone()];
    while centres.len() < k {
        let distance =
            |p: &Vec<f64>| centres.iter().map(|c| squared_distance(p, c)).fold(f64::INFINITY, f64::min);
        let distances: Vec<f64> = points.iter().map(distance).collect();
        let mut left = rng.random::<f64>() * distances.iter().sum::<f64>();
        let far = distances.iter().position(|d| {
            left -= d;
            left < 0.0
        });
        centres.push(points[far.unwrap_or(points.len() - 1)].clone());
    }
    let mut clusters = vec![usize::MAX; points.len()];
    for _ in 0..ROUNDS {
        let nearest = |p: &Vec<f64>| {
            let distances = centres.iter().map(|c| squared_distance(p, c)).enumerate();
            distances.min_by(|a, b| a.1.total_cmp(&b.1)).map_or(0, |(c, _)| c)
        };
        let next: Vec<usize> = points.iter().map(nearest).collect();
        if next == clusters {
            break;
        }
        clusters = next;
        for (c, centre) in centres.iter_mut().enumerate() {
            let members: Vec<&Vec<f64>> =
                points.iter().zip(&clusters).filter(|(_, at)| **at == c).map(|(p, _)| p).collect();
            if !members.is_empty() {
                let mean = |d: usize| members.iter().map(|p| p[d]).sum::<f64>() / members.len() as f64;
                *centre = (0..centre.len()).map(mean).collect();
            }
        }
    }
    let total = points.iter().zip(&clusters).map(|(p, &c)| squared_distance(p, &centres[c])).sum();
    (total, clusters)
}
