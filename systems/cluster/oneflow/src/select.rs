//! Choosing one signature for every operation so that conversions move the fewest bytes (§3.3).
//!
//! Every node of a [`Problem`] takes one of its choices; every tensor costs the conversions from what its producer writes
//! to each different form that consumers read. Small problems are solved by enumeration. For others a topological greedy
//! pass is improved by dynamic programming: nodes are eliminated one after another, each time by a table of the best cost
//! over its neighbours' choices. Where such a table would be too large, a neighbour keeps the choice that it had.

use std::collections::{BTreeSet, HashMap};

use kiln_core::{Error, Result};
use rand::RngExt;
use rand::seq::SliceRandom;

use crate::boxing::Router;
use crate::sbp::NdSbp;

/// A tensor between nodes.
#[derive(Debug, Clone)]
pub struct Edge {
    /// Name for people.
    pub name: String,
    /// Extents.
    pub shape: Vec<usize>,
    /// Bytes of an element.
    pub element: usize,
}

/// What a node may do.
#[derive(Debug, Clone, PartialEq)]
pub struct Choice {
    /// Forms of the operands.
    pub inputs: Vec<NdSbp>,
    /// Forms of the results.
    pub outputs: Vec<NdSbp>,
    /// Cost of its own, in bytes.
    pub cost: f64,
}

/// An operation, a variable, an input or an output.
#[derive(Debug, Clone)]
pub struct Node {
    /// Name for people.
    pub name: String,
    /// The tensors that it reads.
    pub inputs: Vec<usize>,
    /// The tensors that it writes.
    pub outputs: Vec<usize>,
    /// What it may do.
    pub choices: Vec<Choice>,
}

/// Nodes, in an order in which producers come before consumers as far as possible, and the tensors between them.
#[derive(Debug, Clone)]
pub struct Problem {
    /// The tensors.
    pub edges: Vec<Edge>,
    /// The nodes.
    pub nodes: Vec<Node>,
}

/// Most assignments that enumeration tries.
const MOST_ENUMERATED: u64 = 1 << 24;
/// Bounds of a table's entries in elimination: fewer in larger problems.
const TABLE: (usize, usize) = (1 << 11, 1 << 17);
/// Entries of all tables together, about.
const ALL_TABLES: usize = 1 << 24;
/// Sweeps of elimination without improvement that end the search.
const PATIENCE: usize = 3;

/// A problem with its conversion costs in tables.
pub struct Solver<'a> {
    problem: &'a Problem,
    /// For every tensor: where it comes from, and who reads it as what.
    links: Vec<Link>,
    /// For every tensor and node: costs from form to form.
    costs: Vec<Vec<Vec<f64>>>,
}

#[derive(Default)]
struct Link {
    producer: Option<(usize, usize)>,
    consumers: Vec<(usize, usize)>,
    /// The number of the form that a choice writes or reads, by node and place.
    forms: HashMap<(usize, bool, usize), Vec<usize>>,
}

impl<'a> Solver<'a> {
    /// Prepares a problem on a mesh.
    pub fn new(problem: &'a Problem, router: &mut Router) -> Self {
        let mut links: Vec<Link> = problem.edges.iter().map(|_| Link::default()).collect();
        for (at, node) in problem.nodes.iter().enumerate() {
            node.outputs
                .iter()
                .enumerate()
                .for_each(|(place, &edge)| links[edge].producer = Some((at, place)));
            node.inputs.iter().enumerate().for_each(|(place, &edge)| links[edge].consumers.push((at, place)));
        }
        let mut costs = Vec::with_capacity(links.len());
        for (link, edge) in links.iter_mut().zip(&problem.edges) {
            let mut forms: Vec<NdSbp> = Vec::new();
            let mut number = |form: &NdSbp| {
                forms.iter().position(|known| known == form).unwrap_or_else(|| {
                    forms.push(form.clone());
                    forms.len() - 1
                })
            };
            if let Some((node, place)) = link.producer {
                let written = problem.nodes[node].choices.iter().map(|choice| number(&choice.outputs[place]));
                link.forms.insert((node, true, place), written.collect());
            }
            for &(node, place) in &link.consumers {
                let read = problem.nodes[node].choices.iter().map(|choice| number(&choice.inputs[place]));
                link.forms.insert((node, false, place), read.collect());
            }
            let bytes = |router: &mut Router, from: &NdSbp, to: &NdSbp| {
                router.bytes(&edge.shape, edge.element, from, to).map_or(f64::INFINITY, |bytes| bytes as f64)
            };
            costs.push(
                forms.iter().map(|from| forms.iter().map(|to| bytes(router, from, to)).collect()).collect(),
            );
        }
        Self { problem, links, costs }
    }

    /// The cost of one tensor's conversions.
    fn edge_cost(&self, edge: usize, choice_of: impl Fn(usize) -> usize) -> f64 {
        let link = &self.links[edge];
        let Some((producer, place)) = link.producer else { return 0.0 };
        let from = link.forms[&(producer, true, place)][choice_of(producer)];
        let mut seen = 0u128;
        let mut cost = 0.0;
        for &(node, place) in &link.consumers {
            let to = link.forms[&(node, false, place)][choice_of(node)];
            // A form is converted to once, whoever reads it.
            if seen & (1 << (to % 128)) == 0 {
                seen |= 1 << (to % 128);
                cost += self.costs[edge][from][to];
            }
        }
        cost
    }

    /// The cost of an assignment of a choice to every node.
    pub fn cost(&self, assignment: &[usize]) -> f64 {
        let own: f64 =
            self.problem.nodes.iter().zip(assignment).map(|(node, &at)| node.choices[at].cost).sum();
        own + (0..self.links.len()).map(|edge| self.edge_cost(edge, |node| assignment[node])).sum::<f64>()
    }

    /// The best assignment by trying all of them.
    ///
    /// # Errors
    /// When there are too many, or none is possible.
    pub fn enumerate(&self) -> Result<Vec<usize>> {
        let sizes: Vec<usize> = self.problem.nodes.iter().map(|node| node.choices.len()).collect();
        let count = sizes.iter().try_fold(1u64, |n, &m| n.checked_mul(m as u64));
        if count.is_none_or(|count| count > MOST_ENUMERATED) {
            return Err(Error::work("there are too many assignments to try all of them"));
        }
        let mut assignment = vec![0; sizes.len()];
        let mut best = (f64::INFINITY, assignment.clone());
        loop {
            let cost = self.cost(&assignment);
            if cost < best.0 {
                best = (cost, assignment.clone());
            }
            let Some(at) = (0..sizes.len()).find(|&at| assignment[at] + 1 < sizes[at]) else { break };
            assignment[at] += 1;
            assignment[..at].fill(0);
        }
        self.possible(best.1)
    }

    fn possible(&self, assignment: Vec<usize>) -> Result<Vec<usize>> {
        if self.cost(&assignment).is_finite() {
            return Ok(assignment);
        }
        Err(Error::work("no choice of signatures fits what is fixed").hint("take a hint away"))
    }

    /// Node by node, the choice that costs least given those before: the paper's own method.
    pub fn greedy(&self) -> Vec<usize> {
        let nodes = &self.problem.nodes;
        let mut assignment: Vec<Option<usize>> = vec![None; nodes.len()];
        for at in 0..nodes.len() {
            let cost = |choice: usize| {
                let mut cost = nodes[at].choices[choice].cost;
                for (place, &edge) in nodes[at].inputs.iter().enumerate() {
                    let link = &self.links[edge];
                    let Some((producer, written)) = link.producer else { continue };
                    let Some(chosen) = assignment[producer] else { continue };
                    let from = link.forms[&(producer, true, written)][chosen];
                    let to = link.forms[&(at, false, place)][choice];
                    let there = link.consumers.iter().any(|&(other, place)| {
                        assignment[other]
                            .is_some_and(|chosen| link.forms[&(other, false, place)][chosen] == to)
                    });
                    if !there {
                        cost += self.costs[edge][from][to];
                    }
                }
                cost
            };
            let best = (0..nodes[at].choices.len()).min_by(|&a, &b| cost(a).total_cmp(&cost(b)));
            assignment[at] = best;
        }
        assignment.into_iter().map(|choice| choice.unwrap_or(0)).collect()
    }

    /// Changes single nodes' choices as long as that saves something.
    pub fn adjust(&self, assignment: &mut [usize]) {
        let around: Vec<BTreeSet<usize>> = self
            .problem
            .nodes
            .iter()
            .map(|node| node.inputs.iter().chain(&node.outputs).copied().collect())
            .collect();
        loop {
            let mut changed = false;
            for at in 0..assignment.len() {
                let choices = &self.problem.nodes[at].choices;
                let cost = |choice: usize| {
                    let edges = around[at].iter();
                    let of = |node: usize| if node == at { choice } else { assignment[node] };
                    choices[choice].cost + edges.map(|&edge| self.edge_cost(edge, of)).sum::<f64>()
                };
                let now = cost(assignment[at]);
                let best = (0..choices.len())
                    .map(|choice| (choice, cost(choice)))
                    .min_by(|a, b| a.1.total_cmp(&b.1));
                if let Some((choice, found)) = best
                    && found < now * (1.0 - 1e-12) - 1e-9
                {
                    assignment[at] = choice;
                    changed = true;
                }
            }
            if !changed {
                return;
            }
        }
    }

    /// The best assignment that is found from the greedy one and those in `starts`.
    ///
    /// # Errors
    /// When no assignment is possible.
    pub fn solve(&self, starts: &[Vec<usize>], rng: &mut impl rand::Rng) -> Result<Vec<usize>> {
        let mut found: Vec<Vec<usize>> = starts.to_vec();
        found.push(self.greedy());
        for assignment in &mut found {
            self.adjust(assignment);
        }
        let mut best =
            found.into_iter().min_by(|a, b| self.cost(a).total_cmp(&self.cost(b))).unwrap_or_default();
        let mut idle = 0;
        while idle < PATIENCE {
            let (mut next, exact) = self.eliminate(&best, rng);
            self.adjust(&mut next);
            let (before, after) = (self.cost(&best), self.cost(&next));
            if after < before * (1.0 - 1e-12) || (after.is_finite() && !before.is_finite()) {
                best = next;
                idle = 0;
            } else {
                idle += 1;
            }
            if exact {
                break;
            }
        }
        self.possible(best)
    }

    /// The best assignment within tables of bounded size; nodes for which they do not suffice keep their choice of `base`.
    /// The second result says whether there are none of those, so that the assignment is the best of all.
    pub fn eliminate(&self, base: &[usize], rng: &mut impl rand::Rng) -> (Vec<usize>, bool) {
        let nodes = self.problem.nodes.len();
        let limit = (ALL_TABLES / nodes.max(1)).clamp(TABLE.0, TABLE.1);
        let mut domains: Vec<Vec<usize>> =
            self.problem.nodes.iter().map(|node| (0..node.choices.len()).collect()).collect();
        let scopes: Vec<Vec<usize>> = self.links.iter().map(scope).collect();
        // Nodes are taken in random order, so that another sweep frees others.
        let mut order: Vec<usize> = (0..scopes.len()).collect();
        order.shuffle(rng);
        for edge in order {
            while size(&domains, &scopes[edge]) > limit {
                fix(&mut domains, &scopes[edge], base, rng);
            }
        }
        while let Some(wide) = self.too_wide(&domains, &scopes, limit) {
            fix(&mut domains, &wide, base, rng);
        }
        let exact = (0..nodes).all(|at| domains[at].len() == self.problem.nodes[at].choices.len());
        (self.eliminate_within(&domains, &scopes), exact)
    }

    /// A table that elimination would need and that is too large, without filling any.
    fn too_wide(&self, domains: &[Vec<usize>], scopes: &[Vec<usize>], limit: usize) -> Option<Vec<usize>> {
        let mut graph = Neighbours::new(domains, scopes);
        while let Some((node, around)) = graph.next(domains) {
            let mut table = around.clone();
            table.push(node);
            if size(domains, &table) > limit {
                return Some(table);
            }
            graph.eliminate(node, &around);
        }
        None
    }

    fn eliminate_within(&self, domains: &[Vec<usize>], scopes: &[Vec<usize>]) -> Vec<usize> {
        let mut factors: Vec<Option<Factor>> = Vec::new();
        for (node, domain) in domains.iter().enumerate() {
            let table = domain.iter().map(|&choice| self.problem.nodes[node].choices[choice].cost).collect();
            factors.push(Some(Factor { scope: vec![node], table }));
        }
        for (edge, scope) in scopes.iter().enumerate().filter(|(_, scope)| !scope.is_empty()) {
            let mut table = Vec::with_capacity(size(domains, scope));
            each(domains, scope, |chosen| {
                let of = |node: usize| chosen[scope.iter().position(|other| *other == node).unwrap_or(0)];
                table.push(self.edge_cost(edge, |node| domains[node][of(node)]));
            });
            factors.push(Some(Factor { scope: scope.clone(), table }));
        }
        let mut graph = Neighbours::new(domains, scopes);
        let mut done: Vec<(usize, Vec<usize>, Vec<usize>)> = Vec::new();
        while let Some((node, around)) = graph.next(domains) {
            let touching: Vec<Factor> = factors
                .iter_mut()
                .filter(|factor| factor.as_ref().is_some_and(|factor| factor.scope.contains(&node)))
                .filter_map(Option::take)
                .collect();
            factors.retain(Option::is_some);
            let mut whole = around.clone();
            whole.push(node);
            let strides: Vec<Vec<usize>> =
                touching.iter().map(|factor| factor.strides(domains, &whole)).collect();
            let (mut table, mut best) = (Vec::new(), Vec::new());
            let choices = domains[node].len();
            each(domains, &around, |chosen| {
                let at: Vec<usize> = strides
                    .iter()
                    .map(|strides| strides.iter().zip(chosen).map(|(a, b)| a * b).sum())
                    .collect();
                let cost = |choice: usize| -> f64 {
                    let parts = touching.iter().zip(&at).zip(&strides);
                    parts
                        .map(|((factor, at), strides)| factor.table[at + choice * strides[around.len()]])
                        .sum()
                };
                let found =
                    (0..choices).map(|choice| (choice, cost(choice))).min_by(|a, b| a.1.total_cmp(&b.1));
                let (choice, cost) = found.unwrap_or((0, 0.0));
                table.push(cost);
                best.push(choice);
            });
            factors.push(Some(Factor { scope: around.clone(), table }));
            graph.eliminate(node, &around);
            done.push((node, around, best));
        }
        let mut chosen = vec![0; domains.len()];
        for (node, around, best) in done.into_iter().rev() {
            let at = around.iter().fold(0, |at, &other| at * domains[other].len() + chosen[other]);
            chosen[node] = best[at];
        }
        chosen.iter().zip(domains).map(|(&at, domain)| domain[at]).collect()
    }
}

/// The nodes that a tensor connects.
fn scope(link: &Link) -> Vec<usize> {
    let nodes = link.producer.iter().chain(&link.consumers).map(|(node, _)| *node);
    // Without a consumer there is nothing to convert.
    if link.consumers.is_empty() || link.producer.is_none() {
        return Vec::new();
    }
    nodes.collect::<BTreeSet<_>>().into_iter().collect()
}

/// Entries of a table over nodes.
fn size(domains: &[Vec<usize>], scope: &[usize]) -> usize {
    scope.iter().fold(1, |n: usize, &node| n.saturating_mul(domains[node].len()))
}

/// Lets one of the nodes that still have a choice keep that of `base`.
fn fix(domains: &mut [Vec<usize>], scope: &[usize], base: &[usize], rng: &mut impl rand::Rng) {
    let free: Vec<usize> = scope.iter().copied().filter(|&node| domains[node].len() > 1).collect();
    if !free.is_empty() {
        let node = free[rng.random_range(0..free.len())];
        domains[node] = vec![base[node]];
    }
}

/// Calls `f` with every combination of places in the domains, the last node the fastest.
fn each(domains: &[Vec<usize>], scope: &[usize], mut f: impl FnMut(&[usize])) {
    let mut chosen = vec![0; scope.len()];
    loop {
        f(&chosen);
        let Some(at) = (0..scope.len()).rev().find(|&at| chosen[at] + 1 < domains[scope[at]].len()) else {
            return;
        };
        chosen[at] += 1;
        chosen[at + 1..].fill(0);
    }
}

/// Costs over some nodes' choices.
struct Factor {
    scope: Vec<usize>,
    table: Vec<f64>,
}

impl Factor {
    /// How far a step of each node of `whole` goes in the table.
    fn strides(&self, domains: &[Vec<usize>], whole: &[usize]) -> Vec<usize> {
        let stride = |node: &usize| {
            let Some(place) = self.scope.iter().position(|other| other == node) else { return 0 };
            self.scope[place + 1..].iter().map(|&later| domains[later].len()).product()
        };
        whole.iter().map(stride).collect()
    }
}

/// Which nodes share a table with which.
struct Neighbours {
    around: Vec<Option<BTreeSet<usize>>>,
}

impl Neighbours {
    fn new(domains: &[Vec<usize>], scopes: &[Vec<usize>]) -> Self {
        let mut around = vec![Some(BTreeSet::new()); domains.len()];
        for scope in scopes {
            for &a in scope {
                if let Some(set) = &mut around[a] {
                    // Who has no choice makes no table larger.
                    set.extend(scope.iter().copied().filter(|&b| b != a));
                }
            }
        }
        Self { around }
    }

    /// The node whose table is smallest, with its neighbours.
    fn next(&self, domains: &[Vec<usize>]) -> Option<(usize, Vec<usize>)> {
        let candidates =
            self.around.iter().enumerate().filter_map(|(node, around)| Some((node, around.as_ref()?)));
        let table =
            |around: &BTreeSet<usize>| around.iter().fold(1usize, |n, &m| n.saturating_mul(domains[m].len()));
        let (node, around) = candidates.min_by_key(|(_, around)| table(around))?;
        Some((node, around.iter().copied().collect()))
    }

    fn eliminate(&mut self, node: usize, around: &[usize]) {
        self.around[node] = None;
        for &a in around {
            if let Some(set) = &mut self.around[a] {
                set.remove(&node);
                set.extend(around.iter().copied().filter(|&b| b != a));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sbp::Sbp;
    use kiln_core::random_stream;

    /// A random acyclic problem of up to seven nodes.
    fn random_problem(number: u64) -> Problem {
        let mut rng = random_stream(7, "problem", number);
        let forms = [Sbp::S(0), Sbp::S(1), Sbp::B, Sbp::SUM];
        let mut problem = Problem { edges: Vec::new(), nodes: Vec::new() };
        let count = rng.random_range(2..8);
        for at in 0..count {
            let reads = if at == 0 { 0 } else { rng.random_range(1..=2.min(problem.edges.len())) };
            let inputs: Vec<usize> = (0..reads).map(|_| rng.random_range(0..problem.edges.len())).collect();
            problem.edges.push(Edge {
                name: at.to_string(),
                shape: vec![rng.random_range(2..9), rng.random_range(2..9)],
                element: 4,
            });
            let mut form = || NdSbp(vec![forms[rng.random_range(0..4)]]);
            let choices = (0..4)
                .map(|choice| Choice {
                    inputs: (0..reads).map(|_| form()).collect(),
                    outputs: vec![form()],
                    cost: f64::from(choice),
                })
                .collect();
            problem.nodes.push(Node { name: at.to_string(), inputs, outputs: vec![at], choices });
        }
        problem
    }

    #[test]
    fn elimination_finds_what_enumeration_finds() {
        for number in 0..200 {
            let problem = random_problem(number);
            let solver = Solver::new(&problem, &mut Router::new(&[3]));
            let best = solver.cost(&solver.enumerate().unwrap());
            let found = solver.solve(&[], &mut random_stream(0, "solve", number)).unwrap();
            assert!(
                (solver.cost(&found) - best).abs() < 1e-9,
                "{number}: {} and {best}",
                solver.cost(&found)
            );
            assert!(solver.cost(&solver.greedy()) >= best - 1e-9);
        }
    }

    #[test]
    fn one_conversion_serves_all_consumers_of_a_form() {
        let choice = |inputs: &[Sbp], outputs: &[Sbp]| Choice {
            inputs: inputs.iter().map(|&sbp| NdSbp(vec![sbp])).collect(),
            outputs: outputs.iter().map(|&sbp| NdSbp(vec![sbp])).collect(),
            cost: 0.0,
        };
        let node = |name: &str, inputs: Vec<usize>, outputs: Vec<usize>, choice: Choice| Node {
            name: name.into(),
            inputs,
            outputs,
            choices: vec![choice],
        };
        let problem = Problem {
            edges: vec![Edge { name: "x".into(), shape: vec![4], element: 4 }],
            nodes: vec![
                node("source", vec![], vec![0], choice(&[], &[Sbp::S(0)])),
                node("a", vec![0], vec![], choice(&[Sbp::B], &[])),
                node("b", vec![0], vec![], choice(&[Sbp::B], &[])),
            ],
        };
        let solver = Solver::new(&problem, &mut Router::new(&[2]));
        assert_eq!(solver.cost(&[0, 0, 0]), 16.0);
    }
}
