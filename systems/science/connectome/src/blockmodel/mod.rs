//! Communities of a weighted graph: the partition with the shortest description under a stochastic block model with
//! exponential edge weights.
//!
//! With m_rs edges of total weight x_rs between groups r and s, n_r nodes and e_r half-edges in group r, degrees k_i and
//! `((n m)) = C(n + m − 1, m)`, the description length in nats of a partition into B groups is (microcanonical model,
//! Peixoto 2017; e_rr = 2 m_rr)
//!
//! ```text
//! degree-corrected   −Σ_{r<s} ln m_rs! − Σ_r ln e_rr!! − Σ_i ln k_i! + Σ_r ln e_r! + Σ_r ln((n_r e_r))
//! not corrected      −Σ_{r<s} ln m_rs! − Σ_r ln e_rr!! + Σ_r e_r ln n_r
//! edge counts        + ln(( B(B+1)/2  E )), or nested: the model of the graph of groups, level by level
//! partition          + ln N + ln C(N−1, B−1) + ln N! − Σ_r ln n_r!
//! weights            + Σ_{r≤s} [ −ln m_rs! − ln β + (m_rs + 1) ln(β + x_rs) ],  β the mean weight of an edge
//! ```

mod nested;
mod posterior;
mod search;
mod spectral;
mod state;
mod terms;

use clap::ValueEnum;
use kiln_core::{Context, Error, Result};
use serde::{Deserialize, Serialize};

pub use nested::Hierarchy;
pub use posterior::{Posterior, sample};
pub use state::State;

use crate::graph::Graph;

/// Whether the degrees of nodes are part of the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Correction {
    /// Both are fitted and the shorter description wins
    #[default]
    Auto,
    /// Degree-corrected: nodes of one group may differ in degree
    Dc,
    /// Not corrected
    Ndc,
}

/// How communities are inferred.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BlockModelConfig {
    /// Whether the degrees of nodes are part of the model.
    pub correction: Correction,
    /// Whether the counts of edges between groups are described by groups of groups.
    pub nested: bool,
    /// Annealed restarts after the agglomerative and spectral starts.
    pub restarts: usize,
}

impl Default for BlockModelConfig {
    fn default() -> Self {
        Self { correction: Correction::Auto, nested: true, restarts: 16 }
    }
}

/// A partition and its description.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Partition {
    /// Group of every node, numbered from the largest group.
    pub groups: Vec<usize>,
    /// B.
    pub count: usize,
    /// Nats.
    pub description_length: f64,
    /// Whether degrees are part of the model.
    pub degree_corrected: bool,
    /// Groups of groups, level by level; empty for a flat description.
    pub levels: Vec<Vec<usize>>,
}

/// What was inferred.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Communities {
    /// The shortest description.
    pub best: Partition,
    /// By how many nats the other model (corrected or not) is longer, where both were fitted: the log posterior odds.
    pub log_odds: Option<f64>,
}

/// The inference of communities.
#[derive(Debug, Clone, Copy)]
pub struct BlockModel;

impl BlockModel {
    /// With the defaults: both corrections, nested, sixteen restarts.
    ///
    /// # Errors
    /// As [`BlockModelConfig::infer`].
    pub fn infer(graph: &Graph, cx: &Context) -> Result<Communities> {
        BlockModelConfig::default().infer(graph, cx)
    }
}

impl BlockModelConfig {
    /// The partition with the shortest description that the search finds. Every node must have an edge.
    ///
    /// # Errors
    /// When the graph has no edge or an isolated node, or the user stops.
    pub fn infer(&self, graph: &Graph, cx: &Context) -> Result<Communities> {
        check(graph)?;
        let models: &[bool] = match self.correction {
            Correction::Auto => &[false, true],
            Correction::Dc => &[true],
            Correction::Ndc => &[false],
        };
        let mut fitted = Vec::new();
        for &degree_corrected in models {
            fitted.push(search::search(graph, degree_corrected, self, cx)?);
        }
        fitted.sort_by(|a, b| a.description_length.total_cmp(&b.description_length));
        let log_odds = fitted.get(1).map(|other| other.description_length - fitted[0].description_length);
        Ok(Communities { best: fitted.swap_remove(0), log_odds })
    }
}

/// The flat description length of a given partition, in nats.
///
/// # Errors
/// When the graph has no edge or an isolated node, or the partition has not one group a node.
pub fn description_length(graph: &Graph, groups: &[usize], degree_corrected: bool) -> Result<f64> {
    check(graph)?;
    if groups.len() != graph.len() {
        return Err(Error::input(
            "the partition",
            format!("has {} nodes, the graph {}", groups.len(), graph.len()),
        ));
    }
    Ok(State::new(graph, groups, degree_corrected).description_length())
}

fn check(graph: &Graph) -> Result<()> {
    if graph.edges().is_empty() {
        return Err(
            Error::input("the graph", "has no edge").hint("communities need edges; lower the threshold τ")
        );
    }
    match (0..graph.len()).find(|&i| graph.neighbours(i).is_empty()) {
        Some(i) => Err(Error::input("the graph", format!("node {} has no edge", graph.nodes()[i]))
            .hint("take isolated nodes out first: Graph::without_isolated")),
        None => Ok(()),
    }
}

/// Groups renumbered from the largest; ties by their first node. Also where each old group went.
pub fn by_size(groups: &[usize]) -> (Vec<usize>, Vec<usize>) {
    let count = groups.iter().max().map_or(0, |m| m + 1);
    let mut sizes = vec![0; count];
    groups.iter().for_each(|&g| sizes[g] += 1);
    let mut order: Vec<usize> = (0..count).filter(|&g| sizes[g] > 0).collect();
    order.sort_by_key(|&g| (std::cmp::Reverse(sizes[g]), groups.iter().position(|&h| h == g)));
    let mut place = vec![usize::MAX; count];
    order.iter().enumerate().for_each(|(new, &old)| place[old] = new);
    (groups.iter().map(|&g| place[g]).collect(), place)
}
