//! Choosing one signature for every operation so that conversions cost least (§3.3).
//!
//! Every node of a [`Problem`] takes one of its choices; every tensor costs the conversions from what its producer writes
//! to each different form that consumers read. Small problems are solved by enumeration. For others a topological greedy
//! pass is improved by dynamic programming: nodes are eliminated one after another, each time by a table of the best cost
//! over its neighbours' choices. Where such a table would be too large, a neighbour keeps the choice that it had.

use std::collections::BTreeSet;

use burn::tensor::DType;
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
    /// Element type.
    pub dtype: DType,
}

/// What a node may do.
#[derive(Debug, Clone, PartialEq)]
pub struct Choice {
    /// Forms of the operands.
    pub inputs: Vec<NdSbp>,
    /// Forms of the results.
    pub outputs: Vec<NdSbp>,
    /// Cost of its own, in the unit of the conversions' costs.
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
const ALL_TABLES: usize = 1 << 22;
/// Sweeps of elimination without improvement that end the search.
const PATIENCE: usize = 6;

/// A problem with its conversion costs in tables.
pub struct Solver<'a> {
    problem: &'a Problem,
    /// For every tensor: where it comes from, and who reads it as what.
    links: Vec<Link>,
    /// For every tensor and node: costs from form to form.
    costs: Vec<Vec<Vec<f64>>>,
}

/// The ends of a tensor.
#[derive(Default)]
struct Link {
    producer: Option<End>,
    consumers: Vec<End>,
}

/// A node at a tensor.
struct End {
    node: usize,
    /// The number of the form in which each of its choices writes or reads the tensor.
    forms: Vec<usize>,
}

impl<'a> Solver<'a> {
    /// Prepares a problem on a mesh.
    pub fn new(problem: &'a Problem, router: &mut Router) -> Self {
        let mut links: Vec<Link> = problem.edges.iter().map(|_| Link::default()).collect();
        let mut forms: Vec<Vec<&NdSbp>> = vec![Vec::new(); links.len()];
        let mut number = |edge: usize, form: &'a NdSbp| {
            let known: &mut Vec<&NdSbp> = &mut forms[edge];
            known.iter().position(|known| *known == form).unwrap_or_else(|| {
                known.push(form);
                known.len() - 1
            })
        };
        for (at, node) in problem.nodes.iter().enumerate() {
            for (place, &edge) in node.outputs.iter().enumerate() {
                let written = node.choices.iter().map(|choice| number(edge, &choice.outputs[place]));
                links[edge].producer = Some(End { node: at, forms: written.collect() });
            }
            for (place, &edge) in node.inputs.iter().enumerate() {
                let read = node.choices.iter().map(|choice| number(edge, &choice.inputs[place]));
                links[edge].consumers.push(End { node: at, forms: read.collect() });
            }
        }
        let edges = problem.edges.iter().zip(&forms);
        let costs = edges.map(|(edge, forms)| router.costs(&edge.shape, edge.dtype.size(), forms)).collect();
        Self { problem, links, costs }
    }

    /// The cost of one tensor's conversions: a form is converted to once, whoever reads it.
    fn edge_cost(&self, edge: usize, choice_of: impl Fn(usize) -> usize) -> f64 {
        let Link { producer: Some(producer), consumers } = &self.links[edge] else { return 0.0 };
        let form = |end: &End| end.forms[choice_of(end.node)];
        let row = &self.costs[edge][form(producer)];
        let first = |at: usize, to: usize| consumers[..at].iter().all(|before| form(before) != to);
        let read = consumers.iter().map(form).enumerate();
        read.filter(|&(at, to)| row[to] != 0.0 && first(at, to)).map(|(_, to)| row[to]).sum()
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
            // What reading an operand as the choice does adds to the conversions so far.
            let added = |edge: usize, choice: usize| {
                let link = &self.links[edge];
                let form = |end: &End| assignment[end.node].map(|chosen| end.forms[chosen]);
                let Some(from) = link.producer.as_ref().and_then(form) else { return 0.0 };
                let (own, others): (Vec<&End>, Vec<&End>) =
                    link.consumers.iter().partition(|end| end.node == at);
                let forms: BTreeSet<usize> = own.iter().map(|end| end.forms[choice]).collect();
                let there = |to: usize| others.iter().any(|other| form(other) == Some(to));
                forms.into_iter().filter(|to| !there(*to)).map(|to| self.costs[edge][from][to]).sum::<f64>()
            };
            let inputs: BTreeSet<usize> = nodes[at].inputs.iter().copied().collect();
            let cost = |choice: usize| {
                nodes[at].choices[choice].cost + inputs.iter().map(|&edge| added(edge, choice)).sum::<f64>()
            };
            let choices = (0..nodes[at].choices.len()).map(|choice| (choice, cost(choice)));
            assignment[at] = choices.min_by(|a, b| a.1.total_cmp(&b.1)).map(|(choice, _)| choice);
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
        // Tensors are taken in random order, so that another sweep frees other nodes.
        let mut edges: Vec<usize> = (0..scopes.len()).collect();
        edges.shuffle(rng);
        for edge in edges {
            while size(&domains, &scopes[edge]) > limit {
                fix(&mut domains, &scopes[edge], base, rng);
            }
        }
        let order = order(&mut domains, &scopes, limit, base, rng);
        let exact = (0..nodes).all(|at| domains[at].len() == self.problem.nodes[at].choices.len());
        (self.eliminate_in(&order, &domains, &scopes), exact)
    }

    fn eliminate_in(
        &self,
        order: &[(usize, Vec<usize>)],
        domains: &[Vec<usize>],
        scopes: &[Vec<usize>],
    ) -> Vec<usize> {
        let free = |node: &usize| domains[*node].len() > 1;
        let mut factors: Vec<Option<Factor>> = Vec::new();
        let mut touching: Vec<Vec<usize>> = vec![Vec::new(); domains.len()];
        let add = |factors: &mut Vec<Option<Factor>>, touching: &mut Vec<Vec<usize>>, factor: Factor| {
            factor.scope.iter().for_each(|&node| touching[node].push(factors.len()));
            factors.push(Some(factor));
        };
        for node in (0..domains.len()).filter(free) {
            let table = domains[node].iter().map(|&choice| self.problem.nodes[node].choices[choice].cost);
            let factor = Factor { scope: vec![node], table: table.collect() };
            add(&mut factors, &mut touching, factor);
        }
        let mut choice: Vec<usize> = domains.iter().map(|domain| domain[0]).collect();
        for (edge, scope) in scopes.iter().enumerate() {
            let scope: Vec<usize> = scope.iter().copied().filter(free).collect();
            if scope.is_empty() {
                continue;
            }
            let mut table = Vec::with_capacity(size(domains, &scope));
            each(domains, &scope, |chosen| {
                scope.iter().zip(chosen).for_each(|(&node, &at)| choice[node] = domains[node][at]);
                table.push(self.edge_cost(edge, |node| choice[node]));
            });
            scope.iter().for_each(|&node| choice[node] = domains[node][0]);
            add(&mut factors, &mut touching, Factor { scope, table });
        }
        let mut done: Vec<Vec<usize>> = Vec::with_capacity(order.len());
        for (node, around) in order {
            let parts: Vec<Factor> =
                touching[*node].iter().filter_map(|&factor| factors[factor].take()).collect();
            let (factor, best) = smallest(*node, around, &parts, domains);
            done.push(best);
            add(&mut factors, &mut touching, factor);
        }
        let mut chosen = vec![0; domains.len()];
        for ((node, around), best) in order.iter().zip(&done).rev() {
            let at = around.iter().fold(0, |at, &other| at * domains[other].len() + chosen[other]);
            chosen[*node] = best[at];
        }
        chosen.iter().zip(domains).map(|(&at, domain)| domain[at]).collect()
    }
}

/// For every combination of its neighbours' choices, the least sum of the parts over a node's choices, and the choice that
/// has it.
fn smallest(node: usize, around: &[usize], parts: &[Factor], domains: &[Vec<usize>]) -> (Factor, Vec<usize>) {
    let strides = |of: usize| -> Vec<usize> { parts.iter().map(|part| part.stride(domains, of)).collect() };
    let own = strides(node);
    let around_strides: Vec<Vec<usize>> = around.iter().map(|&other| strides(other)).collect();
    // The last neighbour is walked through for every combination of the others.
    let (others, last) = around.split_at(around.len().saturating_sub(1));
    let steps = last.first().map_or(1, |&last| domains[last].len());
    let step = around_strides.last().cloned().unwrap_or_else(|| vec![0; parts.len()]);
    let entries = size(domains, around);
    let (mut table, mut best) = (Vec::with_capacity(entries), Vec::with_capacity(entries));
    let mut sums = vec![0.0; domains[node].len()];
    let mut starts = vec![0; parts.len()];
    each(domains, others, |chosen| {
        starts.fill(0);
        for (strides, at) in around_strides.iter().zip(chosen) {
            starts.iter_mut().zip(strides).for_each(|(start, stride)| *start += stride * at);
        }
        for _ in 0..steps {
            sums.fill(0.0);
            for (((part, start), own), step) in parts.iter().zip(&mut starts).zip(&own).zip(&step) {
                let column = part.table[*start..].iter().step_by(*own);
                sums.iter_mut().zip(column).for_each(|(sum, cost)| *sum += cost);
                *start += step;
            }
            let found = sums.iter().copied().enumerate().min_by(|a, b| a.1.total_cmp(&b.1));
            let (choice, cost) = found.unwrap_or((0, 0.0));
            table.push(cost);
            best.push(choice);
        }
    });
    (Factor { scope: around.to_vec(), table }, best)
}

/// The nodes that a tensor connects.
fn scope(link: &Link) -> Vec<usize> {
    let nodes = link.producer.iter().chain(&link.consumers).map(|end| end.node);
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

/// Lets one of the nodes that still have a choice keep that of `base`, and says which.
fn fix(domains: &mut [Vec<usize>], scope: &[usize], base: &[usize], rng: &mut impl rand::Rng) -> usize {
    let free: Vec<usize> = scope.iter().copied().filter(|&node| domains[node].len() > 1).collect();
    let node = free[rng.random_range(0..free.len())];
    domains[node] = vec![base[node]];
    node
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
    /// How far a step of a node goes in the table.
    fn stride(&self, domains: &[Vec<usize>], node: usize) -> usize {
        let Some(place) = self.scope.iter().position(|other| *other == node) else { return 0 };
        self.scope[place + 1..].iter().map(|&later| domains[later].len()).product()
    }
}

/// The order in which nodes with a choice are eliminated, each time the one whose table is smallest, with the neighbours
/// that it has by then. Where even that table is larger than the limit, some of its nodes are fixed.
fn order(
    domains: &mut [Vec<usize>],
    scopes: &[Vec<usize>],
    limit: usize,
    base: &[usize],
    rng: &mut impl rand::Rng,
) -> Vec<(usize, Vec<usize>)> {
    let mut around: Vec<BTreeSet<usize>> = vec![BTreeSet::new(); domains.len()];
    for scope in scopes {
        let free = || scope.iter().copied().filter(|&node| domains[node].len() > 1);
        free().for_each(|a| around[a].extend(free().filter(|&b| b != a)));
    }
    let table = |domains: &[Vec<usize>], node: usize, around: &BTreeSet<usize>| {
        around.iter().fold(domains[node].len(), |n, &other| n.saturating_mul(domains[other].len()))
    };
    let mut sizes: Vec<Option<usize>> = (0..domains.len())
        .map(|node| (domains[node].len() > 1).then(|| table(domains, node, &around[node])))
        .collect();
    let mut order = Vec::new();
    loop {
        let open = sizes.iter().enumerate().filter_map(|(node, size)| Some((node, (*size)?)));
        let Some((node, entries)) = open.min_by_key(|(_, size)| *size) else { return order };
        let mut changed = std::mem::take(&mut around[node]);
        if entries > limit {
            // One of them loses its choice, and then the smallest table may be another's.
            let scope: Vec<usize> = changed.iter().copied().chain([node]).collect();
            let fixed = fix(domains, &scope, base, rng);
            around[node] = changed;
            changed = std::mem::take(&mut around[fixed]);
            changed.iter().for_each(|&other| _ = around[other].remove(&fixed));
            sizes[fixed] = None;
        } else {
            for &a in &changed {
                around[a].remove(&node);
                around[a].extend(changed.iter().copied().filter(|&b| b != a));
            }
            sizes[node] = None;
            order.push((node, changed.iter().copied().collect()));
        }
        for other in changed {
            sizes[other] = Some(table(domains, other, &around[other]));
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
                dtype: DType::F32,
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
            edges: vec![Edge { name: "x".into(), shape: vec![4], dtype: DType::F32 }],
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
