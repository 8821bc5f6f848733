//! Starts for the search: k-means on the leading eigenvectors of the normalised adjacency matrix.

use faer::{Mat, Side};
use rand::Rng;

use crate::baselines::kmeans;
use crate::graph::Graph;

/// Larger graphs are not decomposed: O(N³).
const MOST_NODES: usize = 1200;

/// Partitions into each number of groups, or none for a large graph.
pub fn partitions(graph: &Graph, counts: &[usize], rng: &mut impl Rng) -> Vec<Vec<usize>> {
    let n = graph.len();
    if n > MOST_NODES {
        return Vec::new();
    }
    let strength: Vec<f64> =
        (0..n).map(|i| graph.neighbours(i).iter().map(|(_, weight)| weight).sum::<f64>()).collect();
    let mut matrix = Mat::<f64>::zeros(n, n);
    for &(i, j, weight) in graph.edges() {
        let value = weight / (strength[i] * strength[j]).sqrt();
        (matrix[(i, j)], matrix[(j, i)]) = (value, value);
    }
    let Ok(eigen) = matrix.self_adjoint_eigen(Side::Lower) else { return Vec::new() };
    let vectors = eigen.U(); // by rising eigenvalue
    let embed = |count: usize| -> Vec<Vec<f64>> {
        (0..n)
            .map(|i| {
                let row: Vec<f64> = (1..=count).map(|c| vectors[(i, n - c)]).collect();
                let norm = row.iter().map(|x| x * x).sum::<f64>().sqrt().max(1e-12);
                row.into_iter().map(|x| x / norm).collect()
            })
            .collect()
    };
    counts.iter().filter(|&&count| count < n).map(|&count| kmeans(&embed(count), count, 5, rng)).collect()
}
