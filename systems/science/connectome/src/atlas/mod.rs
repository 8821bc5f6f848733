//! The atlas: motifs with their neurons, times, animals and communities.

mod draw;
mod files;
mod html;
mod layout;
mod panels;

use kiln_core::{Context, Error, Result};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::affinity::AffinityConfig;
use crate::blockmodel::BlockModelConfig;
use crate::graph::Graph;
use crate::ntf::rank::{RankScore, choose};
use crate::ntf::{Fit, NtfConfig, Starts, best};
use crate::tensor::{AffinityTensor, pair_index};
use crate::traces::Traces;

pub use files::{KIND, graphml};

/// A temporal factor is smoothed with so many σ of the derivative filter before its active interval is looked for.
const SMOOTH_SIGMAS: f64 = 4.0;

/// How recordings become an atlas.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AtlasConfig {
    /// Affinities.
    pub affinity: AffinityConfig,
    /// Factorisation.
    pub ntf: NtfConfig,
    /// Ranks to choose from; the one of the factorisation where there are none.
    pub ranks: Vec<usize>,
    /// Communities.
    pub communities: BlockModelConfig,
    /// τ: an edge of a motif is heavier than this part of its heaviest.
    pub threshold: f64,
}

impl AtlasConfig {
    /// The defaults with a given number of motifs.
    pub fn new(rank: usize) -> Self {
        Self {
            affinity: AffinityConfig::new(),
            ntf: NtfConfig::new(rank),
            ranks: Vec::new(),
            communities: BlockModelConfig::default(),
            threshold: 0.05,
        }
    }
}

/// Everything that was found in some recordings.
#[derive(Debug, Clone)]
pub struct Atlas {
    /// How.
    pub config: AtlasConfig,
    /// From what.
    pub traces: Traces,
    /// Motifs by weight.
    pub motifs: Vec<Motif>,
    /// Relative error of the factorisation.
    pub relative_error: f64,
    /// The ranks that were tried.
    pub ranks: Vec<RankScore>,
}

/// Neurons that act together for a while in some animals.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Motif {
    /// λ.
    pub weight: f64,
    /// `[T]`, of norm 1.
    pub time: Vec<f64>,
    /// `[W]`, of norm 1.
    pub animals: Vec<f64>,
    /// `[P]`, of norm 1.
    pub pairs: Vec<f64>,
    /// First frame and one past the last of the longest run above half of the smoothed maximum.
    pub active: (usize, usize),
    /// Community of every neuron, numbered from the largest; none for a neuron without an edge.
    pub communities: Vec<Option<usize>>,
    /// Nats of the block model.
    pub description_length: f64,
    /// Whether the model corrects for degrees.
    pub degree_corrected: bool,
    /// Nats by which the other model is longer.
    pub log_odds: Option<f64>,
}

impl Atlas {
    /// Affinities, motifs and their communities.
    ///
    /// # Errors
    /// As [`AffinityConfig::compute`], [`NtfConfig::fit`] and [`BlockModelConfig::infer`].
    pub fn build(traces: Traces, config: AtlasConfig, cx: &Context) -> Result<Self> {
        let tensor = config.affinity.compute(&traces)?;
        Self::of_tensor(traces, &tensor, config, &Starts::default(), cx)
    }

    /// The same from affinities that are there, without the random starts that are `kept`.
    ///
    /// # Errors
    /// As [`build`](Self::build).
    pub fn of_tensor(
        traces: Traces,
        tensor: &AffinityTensor,
        config: AtlasConfig,
        kept: &Starts,
        cx: &Context,
    ) -> Result<Self> {
        let (fit, ranks) = match config.ranks.is_empty() {
            true => (best(config.ntf.fit_all(tensor, kept, cx)?), Vec::new()),
            false => match choose(&config.ntf, config.ranks.iter().copied(), tensor, kept, cx)? {
                Some(choice) => (Some(choice.best), choice.scores),
                None => (None, Vec::new()),
            },
        };
        let fit = fit.ok_or_else(|| Error::usage("there is no rank to choose from, or no start"))?;
        Self::from_fit(traces, config, &fit, ranks, cx)
    }

    fn from_fit(
        traces: Traces,
        config: AtlasConfig,
        fit: &Fit,
        ranks: Vec<RankScore>,
        cx: &Context,
    ) -> Result<Self> {
        let bar = cx.progress(fit.factors.rank() as u64, "communities");
        let motifs = (0..fit.factors.rank()).map(|r| {
            let motif = Motif::find(&traces, &config, fit, r, cx);
            bar.inc(1);
            motif
        });
        let motifs = motifs.collect::<Result<_>>()?;
        Ok(Self { motifs, relative_error: fit.relative_error, config, traces, ranks })
    }
}

impl Motif {
    fn find(traces: &Traces, config: &AtlasConfig, fit: &Fit, r: usize, cx: &Context) -> Result<Self> {
        let factors = &fit.factors;
        let time = factors.time.column(r);
        let smooth = smoothed(&time, SMOOTH_SIGMAS * config.affinity.sigma);
        let mut motif = Self {
            weight: factors.weights[r],
            active: longest_run_above_half(&smooth),
            time,
            animals: factors.animals.column(r),
            pairs: factors.pairs.column(r),
            communities: vec![None; traces.neurons.len()],
            description_length: 0.0,
            degree_corrected: false,
            log_odds: None,
        };
        let graph = motif.graph(&traces.neurons, config.threshold)?;
        let (connected, kept) = graph.without_isolated();
        if !connected.edges().is_empty() {
            let found = config.communities.infer(&connected, cx)?;
            kept.iter().zip(&found.best.groups).for_each(|(&i, &group)| motif.communities[i] = Some(group));
            motif.description_length = found.best.description_length;
            motif.degree_corrected = found.best.degree_corrected;
            motif.log_odds = found.log_odds;
        }
        Ok(motif)
    }

    /// The graph of the pairs that are heavier than a part of the heaviest.
    ///
    /// # Errors
    /// When a weight is no number.
    pub fn graph(&self, neurons: &[String], threshold: f64) -> Result<Graph> {
        let least = threshold * self.pairs.iter().copied().fold(0.0, f64::max);
        let n = neurons.len();
        let pairs = (0..n).flat_map(|i| (i + 1..n).map(move |j| (i, j)));
        let edges = pairs.zip(&self.pairs).filter(|(_, weight)| **weight > least);
        Graph::new(neurons.to_vec(), edges.map(|((i, j), &weight)| (i, j, weight)))
    }

    /// The weight between two neurons.
    pub fn between(&self, i: usize, j: usize) -> f64 {
        match i == j {
            true => 0.0,
            false => self.pairs[pair_index(i.min(j), i.max(j), self.communities.len())],
        }
    }

    /// Number of communities.
    pub fn community_count(&self) -> usize {
        self.communities.iter().flatten().max().map_or(0, |m| m + 1)
    }

    /// Neurons by community, those without one last; within a community by how strongly they are tied to it.
    pub fn order(&self) -> Vec<usize> {
        let n = self.communities.len();
        let ties: Vec<f64> = (0..n)
            .into_par_iter()
            .map(|i| {
                (0..n)
                    .filter(|&j| self.communities[j] == self.communities[i])
                    .map(|j| self.between(i, j))
                    .sum()
            })
            .collect();
        let mut order: Vec<usize> = (0..n).collect();
        let key = |i: usize| self.communities[i].unwrap_or(usize::MAX);
        order.sort_by(|&i, &j| key(i).cmp(&key(j)).then(ties[j].total_cmp(&ties[i])));
        order
    }
}

/// The series smoothed with a Gaussian; its ends go on as constants.
pub fn smoothed(x: &[f64], sigma: f64) -> Vec<f64> {
    let radius = (4.0 * sigma).ceil() as isize;
    let weights: Vec<f64> = (-radius..=radius).map(|k| (-0.5 * (k as f64 / sigma).powi(2)).exp()).collect();
    let total: f64 = weights.iter().sum();
    let last = x.len() as isize - 1;
    let at = |t: isize| {
        (-radius..=radius).zip(&weights).map(|(k, w)| w * x[(t + k).clamp(0, last) as usize]).sum::<f64>()
            / total
    };
    (0..=last).map(at).collect()
}

/// First frame and one past the last.
fn longest_run_above_half(x: &[f64]) -> (usize, usize) {
    let half = x.iter().copied().fold(0.0, f64::max) / 2.0;
    let mut longest = (0, 0);
    let mut start = 0;
    for t in 0..=x.len() {
        if x.get(t).is_none_or(|&value| value <= half) {
            if t - start > longest.1 - longest.0 {
                longest = (start, t);
            }
            start = t + 1;
        }
    }
    longest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_run_above_half_is_found_up_to_the_ends() {
        assert_eq!(longest_run_above_half(&[0.0, 2.0, 0.5, 2.0, 2.0, 0.0, 2.0]), (3, 5));
        assert_eq!(longest_run_above_half(&[0.0, 1.0, 2.0, 2.0]), (2, 4));
        assert_eq!(longest_run_above_half(&[0.0, 0.0]), (0, 0));
    }
}
