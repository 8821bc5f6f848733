//! The benchmark of Lancichinetti and Fortunato (2009): weighted graphs with communities and power laws.
//!
//! Degrees and sizes of communities follow power laws. A node of degree k has (1 − μ_t) k neighbours in its community, and
//! of its strength k^β a part 1 − μ_w goes to them.

use std::collections::BTreeSet;

use kiln_core::{Error, Result};
use rand::seq::SliceRandom;
use rand::{Rng, RngExt};
use serde::Serialize;

use crate::graph::Graph;

/// Attempts at a draw that fits before giving up.
const ATTEMPTS: usize = 500;
/// Rounds of fitting the weights to the strengths.
const ROUNDS: usize = 200;

/// Parameters of the benchmark.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct LfrConfig {
    /// N.
    pub nodes: usize,
    /// Mean degree.
    pub mean_degree: f64,
    /// Largest degree.
    pub max_degree: usize,
    /// Exponent of the degrees.
    pub degree_exponent: f64,
    /// Exponent of the sizes of communities.
    pub size_exponent: f64,
    /// μ_t: part of a node's edges that leave its community.
    pub mixing: f64,
    /// μ_w: part of a node's strength that leaves its community.
    pub weight_mixing: f64,
    /// β: strengths are degrees to this power.
    pub weight_exponent: f64,
}

/// A graph and its communities.
#[derive(Debug, Clone)]
pub struct LfrGraph {
    /// The graph.
    pub graph: Graph,
    /// Community of every node.
    pub groups: Vec<usize>,
}

impl LfrConfig {
    /// The paper's table: 125 nodes of mean degree 25, at most 100, exponents 2 and 1.
    ///
    /// A node of degree 100 needs a community of at least 1 + 100 (1 − μ_t) nodes. At a small μ_t this community is most of
    /// the graph, and the few nodes outside have no room for its edges to them: fewer edges leave it than μ_t says.
    pub fn table(mixing: f64, weight_mixing: f64, weight_exponent: f64) -> Self {
        Self {
            nodes: 125,
            mean_degree: 25.0,
            max_degree: 100,
            degree_exponent: 2.0,
            size_exponent: 1.0,
            mixing,
            weight_mixing,
            weight_exponent,
        }
    }

    /// Draws a graph.
    ///
    /// # Errors
    /// When no draw fits the parameters.
    pub fn draw(&self, rng: &mut impl Rng) -> Result<LfrGraph> {
        let drawn = (0..ATTEMPTS).find_map(|_| self.attempt(rng));
        let (degrees, groups) = drawn.ok_or_else(|| {
            Error::work(format!("no graph fits {self:?}")).hint("lower the degrees or raise the mixing")
        })?;
        let edges = self.edges(&degrees, &groups, rng);
        let weights = self.weights(&edges, &groups);
        let names = (0..self.nodes).map(|i| i.to_string()).collect();
        let weighted = edges.iter().zip(weights).map(|(&(i, j), weight)| (i, j, weight));
        Ok(LfrGraph { graph: Graph::new(names, weighted)?, groups })
    }

    /// Degrees, and communities that are large enough for the edges within; `None` when the draw does not fit.
    fn attempt(&self, rng: &mut impl Rng) -> Option<(Vec<usize>, Vec<usize>)> {
        let least = self.least_degree();
        let largest = self.max_degree as f64;
        let degrees: Vec<usize> = (0..self.nodes)
            .map(|_| power_law(self.degree_exponent, least, largest, rng).round() as usize)
            .collect();
        let inner = |degree: usize| (1.0 - self.mixing) * degree as f64;
        let smallest = least.round().max(3.0);
        let needed = degrees.iter().map(|&degree| inner(degree)).fold(0.0, f64::max) + 1.0;
        let biggest = largest.max(needed).min(self.nodes as f64);
        let mut sizes = Vec::new();
        while sizes.iter().sum::<usize>() < self.nodes {
            sizes.push(power_law(self.size_exponent, smallest, biggest, rng).round() as usize);
        }
        let surplus = sizes.iter().sum::<usize>() - self.nodes;
        let last = sizes.last_mut()?;
        *last = last.checked_sub(surplus).filter(|&size| size as f64 >= smallest)?;
        // The most connected node first, into a random community with room that is large enough.
        let mut order: Vec<usize> = (0..self.nodes).collect();
        order.sort_by_key(|&i| std::cmp::Reverse(degrees[i]));
        let mut room = sizes.clone();
        let mut groups = vec![0; self.nodes];
        for i in order {
            let fits: Vec<usize> = (0..sizes.len())
                .filter(|&c| room[c] > 0 && sizes[c] as f64 - 1.0 >= inner(degrees[i]))
                .collect();
            let total: usize = fits.iter().map(|&c| room[c]).sum();
            let mut pick = rng.random_range(0..total.max(1));
            let chosen = fits.into_iter().find(|&c| {
                let here = pick < room[c];
                pick = pick.saturating_sub(room[c]);
                here
            })?;
            room[chosen] -= 1;
            groups[i] = chosen;
        }
        Some((degrees, groups))
    }

    /// The least degree for which the power law has the wanted mean.
    fn least_degree(&self) -> f64 {
        let largest = self.max_degree as f64;
        let (mut low, mut high) = (1.0, largest);
        for _ in 0..60 {
            let middle = (low + high) / 2.0;
            if power_law_mean(self.degree_exponent, middle, largest) < self.mean_degree {
                low = middle;
            } else {
                high = middle;
            }
        }
        low
    }

    /// Half-edges joined at random, those within communities and those between apart.
    fn edges(&self, degrees: &[usize], groups: &[usize], rng: &mut impl Rng) -> Vec<(usize, usize)> {
        let count = groups.iter().max().map_or(0, |m| m + 1);
        let mut inner = vec![Vec::new(); count];
        let mut outer = Vec::new();
        for (i, &degree) in degrees.iter().enumerate() {
            let exact = (1.0 - self.mixing) * degree as f64;
            let within = (exact + rng.random::<f64>()) as usize; // rounded at random, so that means are kept
            inner[groups[i]].extend(std::iter::repeat_n(i, within));
            outer.extend(std::iter::repeat_n(i, degree - within.min(degree)));
        }
        let mut edges = BTreeSet::new();
        for half_edges in inner {
            join(half_edges, &mut edges, |_, _| true, rng);
        }
        join(outer, &mut edges, |i, j| groups[i] != groups[j], rng);
        edges.into_iter().collect()
    }

    /// Weights for which the strengths within and between communities are as wanted, by scaling in turn.
    fn weights(&self, edges: &[(usize, usize)], groups: &[usize]) -> Vec<f64> {
        let mut degrees = vec![0usize; self.nodes];
        edges.iter().for_each(|&(i, j)| [i, j].into_iter().for_each(|node| degrees[node] += 1));
        let strength = |node: usize, within: bool| {
            let part = if within { 1.0 - self.weight_mixing } else { self.weight_mixing };
            part * (degrees[node] as f64).powf(self.weight_exponent)
        };
        let within = |&(i, j): &(usize, usize)| groups[i] == groups[j];
        let mut weights = vec![1.0; edges.len()];
        for _ in 0..ROUNDS {
            let mut sums = vec![[0.0; 2]; self.nodes];
            for (edge, weight) in edges.iter().zip(&weights) {
                let side = usize::from(within(edge));
                sums[edge.0][side] += weight;
                sums[edge.1][side] += weight;
            }
            for (edge, weight) in edges.iter().zip(&mut weights) {
                let side = usize::from(within(edge));
                let ratio = |node: usize| strength(node, side == 1) / sums[node][side];
                *weight *= (ratio(edge.0) * ratio(edge.1)).sqrt();
            }
        }
        weights
    }
}

/// Joins half-edges in random pairs to simple edges that are allowed; what does not fit after some rounds is left out.
fn join(
    mut half_edges: Vec<usize>,
    edges: &mut BTreeSet<(usize, usize)>,
    allowed: impl Fn(usize, usize) -> bool,
    rng: &mut impl Rng,
) {
    for _ in 0..100 {
        half_edges.shuffle(rng);
        let mut left = Vec::new();
        for pair in half_edges.chunks(2) {
            match *pair {
                [i, j] if i != j && allowed(i, j) && !edges.contains(&(i.min(j), i.max(j))) => {
                    edges.insert((i.min(j), i.max(j)));
                }
                ref pair => left.extend_from_slice(pair),
            }
        }
        half_edges = left;
        if half_edges.len() < 2 {
            return;
        }
    }
}

/// A number from `low` to `high` with density ∝ x^−exponent.
fn power_law(exponent: f64, low: f64, high: f64, rng: &mut impl Rng) -> f64 {
    let u: f64 = rng.random();
    match (exponent - 1.0).abs() < 1e-9 {
        true => low * (high / low).powf(u),
        false => {
            let p = 1.0 - exponent;
            (low.powf(p) + u * (high.powf(p) - low.powf(p))).powf(1.0 / p)
        }
    }
}

fn power_law_mean(exponent: f64, low: f64, high: f64) -> f64 {
    // ∫ x^(n − exponent)
    let moment = |n: f64| {
        let p = n + 1.0 - exponent;
        if p.abs() < 1e-9 { (high / low).ln() } else { (high.powf(p) - low.powf(p)) / p }
    };
    moment(1.0) / moment(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn degrees_and_mixing_are_near_what_was_asked_for() {
        let mut rng = kiln_core::random_stream(0, "lfr", 0);
        for (mixing, weight_mixing) in [(0.25, 0.25), (0.5, 0.25), (0.75, 0.75)] {
            // Without hubs, so that no community is most of the graph.
            let config = LfrConfig { max_degree: 40, ..LfrConfig::table(mixing, weight_mixing, 1.0) };
            let drawn = config.draw(&mut rng).unwrap();
            let edges = drawn.graph.edges();
            let mean = 2.0 * edges.len() as f64 / 125.0;
            assert!((mean - 25.0).abs() < 6.0, "mean degree {mean}");
            let between = |edge: &&(usize, usize, f64)| drawn.groups[edge.0] != drawn.groups[edge.1];
            let share = edges.iter().filter(between).count() as f64 / edges.len() as f64;
            assert!((share - mixing).abs() < 0.12, "{share} for {mixing}");
            let total: f64 = edges.iter().map(|edge| edge.2).sum();
            let weight = edges.iter().filter(between).map(|edge| edge.2).sum::<f64>() / total;
            assert!((weight - weight_mixing).abs() < 0.1, "{weight} for {weight_mixing}");
        }
    }
}
