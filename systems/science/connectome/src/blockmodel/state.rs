//! A partition with the sums that its description length is made of, kept up to date move by move.

use super::nested::Hierarchy;
use super::terms::Terms;
use crate::graph::Graph;

/// A partition of a graph's nodes into groups 0..B, none of them empty.
#[derive(Debug, Clone)]
pub struct State<'g> {
    graph: &'g Graph,
    degree_corrected: bool,
    groups: Vec<usize>,
    /// n_r
    sizes: Vec<usize>,
    /// e_r
    half_edges: Vec<usize>,
    /// m_rs, each edge once; row r at `r * stride`.
    counts: Vec<u32>,
    /// x_rs
    weights: Vec<f64>,
    stride: usize,
    terms: Terms,
    /// Groups of groups, for which nothing may empty or begin a group.
    hierarchy: Option<Hierarchy>,
}

/// Where a node's edges lead: for each group the number and weight of its edges.
#[derive(Debug, Default)]
pub struct Reach {
    count: Vec<u32>,
    weight: Vec<f64>,
    /// The groups it reaches.
    pub groups: Vec<usize>,
}

impl<'g> State<'g> {
    /// The state of a partition; groups are renumbered without gaps.
    ///
    /// # Panics
    /// When the partition has not one group a node.
    pub fn new(graph: &'g Graph, groups: &[usize], degree_corrected: bool) -> Self {
        assert_eq!(groups.len(), graph.len(), "one group a node");
        let (groups, _) = super::by_size(groups);
        let count = groups.iter().max().map_or(0, |m| m + 1);
        let stride = count + 4;
        let edges = graph.edges();
        let mut state = Self {
            graph,
            degree_corrected,
            sizes: vec![0; count],
            half_edges: vec![0; count],
            counts: vec![0; stride * stride],
            weights: vec![0.0; stride * stride],
            stride,
            terms: Terms::new(2 * edges.len() + graph.len(), graph.mean_weight()),
            groups,
            hierarchy: None,
        };
        for (node, &r) in state.groups.iter().enumerate() {
            state.sizes[r] += 1;
            state.half_edges[r] += graph.neighbours(node).len();
        }
        for &(i, j, weight) in edges {
            let (r, s) = (state.groups[i], state.groups[j]);
            state.add_to_pair(r, s, 1, weight);
        }
        state
    }

    /// B.
    pub fn count(&self) -> usize {
        self.sizes.len()
    }

    /// The group of every node.
    pub fn groups(&self) -> &[usize] {
        &self.groups
    }

    /// Number of nodes in a group.
    pub fn size(&self, group: usize) -> usize {
        self.sizes[group]
    }

    /// Edges between two groups, or within one.
    pub fn edges_between(&self, r: usize, s: usize) -> u32 {
        self.counts[r * self.stride + s]
    }

    /// Describes the counts of edges between groups by groups of groups from now on, or flat again.
    pub fn set_hierarchy(&mut self, hierarchy: Option<Hierarchy>) {
        self.hierarchy = hierarchy;
    }

    /// The groups of groups.
    pub fn hierarchy(&self) -> Option<&Hierarchy> {
        self.hierarchy.as_ref()
    }

    fn pair(&self, r: usize, s: usize) -> f64 {
        let at = r * self.stride + s;
        self.terms.pair(r == s, self.counts[at], self.weights[at])
    }

    fn add_to_pair(&mut self, r: usize, s: usize, count: i32, weight: f64) {
        let mut at = r * self.stride + s;
        for _ in 0..if r == s { 1 } else { 2 } {
            self.counts[at] = self.counts[at].wrapping_add_signed(count);
            self.weights[at] = if self.counts[at] == 0 { 0.0 } else { self.weights[at] + weight };
            at = s * self.stride + r;
        }
    }

    /// The description length in nats, from all sums anew.
    pub fn description_length(&self) -> f64 {
        let (count, nodes) = (self.count(), self.graph.len());
        let mut total = self.terms.partition(nodes, count);
        for r in 0..count {
            total += self.terms.group(self.degree_corrected, self.sizes[r], self.half_edges[r])
                - self.terms.ln_factorial(self.sizes[r]);
            total += (r..count).map(|s| self.pair(r, s)).sum::<f64>();
        }
        if self.degree_corrected {
            let degree = |i: usize| self.terms.ln_factorial(self.graph.neighbours(i).len());
            total -= (0..nodes).map(degree).sum::<f64>();
        }
        total
            + match &self.hierarchy {
                Some(hierarchy) => hierarchy.description_length(&self.terms),
                None => self.terms.edge_counts(count, self.graph.edges().len()),
            }
    }

    /// The hierarchy with the shortest description that merging groups finds.
    pub fn infer_hierarchy(&self) -> Hierarchy {
        Hierarchy::infer(self, &self.terms)
    }

    /// Where the edges of a node lead.
    pub fn reach(&self, node: usize, reach: &mut Reach) {
        for group in reach.groups.drain(..) {
            (reach.count[group], reach.weight[group]) = (0, 0.0);
        }
        if reach.count.len() <= self.count() {
            reach.count.resize(self.count() + 1, 0);
            reach.weight.resize(self.count() + 1, 0.0);
        }
        for &(neighbour, weight) in self.graph.neighbours(node) {
            let group = self.groups[neighbour];
            if reach.count[group] == 0 {
                reach.groups.push(group);
            }
            reach.count[group] += 1;
            reach.weight[group] += weight;
        }
    }

    /// By how much the description grows when a node moves to group `to`; `to == B` is a new group. O(degree).
    /// Infinite where the move would empty or begin a group of a hierarchy.
    pub fn delta(&self, node: usize, to: usize, reach: &Reach) -> f64 {
        let from = self.groups[node];
        if from == to {
            return 0.0;
        }
        let begins = to == self.count();
        let ends = self.sizes[from] == 1;
        let degree = self.graph.neighbours(node).len();
        let old = |r: usize, s: usize| match begins && (r == to || s == to) {
            true => (0, 0.0),
            false => (self.counts[r * self.stride + s], self.weights[r * self.stride + s]),
        };
        let change = |r: usize, s: usize, count: i64, weight: f64| {
            let (m, x) = old(r, s);
            let after = (i64::from(m) + count) as u32;
            self.terms.pair(r == s, after, if after == 0 { 0.0 } else { x + weight })
                - self.terms.pair(r == s, m, x)
        };
        let mut delta = 0.0;
        for &t in reach.groups.iter().filter(|&&t| t != from && t != to) {
            let (count, weight) = (i64::from(reach.count[t]), reach.weight[t]);
            delta += change(from, t, -count, -weight) + change(to, t, count, weight);
        }
        let (inner, inner_weight) = (i64::from(reach.count[from]), reach.weight[from]);
        let (outer, outer_weight) = (i64::from(reach.count[to]), reach.weight[to]);
        delta += change(from, from, -inner, -inner_weight) + change(to, to, outer, outer_weight);
        delta += change(from, to, inner - outer, inner_weight - outer_weight);

        let (n_to, e_to) = if begins { (0, 0) } else { (self.sizes[to], self.half_edges[to]) };
        let (n_from, e_from) = (self.sizes[from], self.half_edges[from]);
        let group = |n, e| self.terms.group(self.degree_corrected, n, e) - self.terms.ln_factorial(n);
        delta += group(n_from - 1, e_from - degree) - group(n_from, e_from);
        delta += group(n_to + 1, e_to + degree) - group(n_to, e_to);

        let count = self.count();
        let after = count + usize::from(begins) - usize::from(ends);
        match &self.hierarchy {
            Some(_) if begins || ends => f64::INFINITY,
            Some(hierarchy) => {
                let edges = reach.groups.iter().map(|&t| (t, i64::from(reach.count[t])));
                delta + hierarchy.delta(from, to, edges, &self.terms)
            }
            None => delta + self.count_terms(after) - self.count_terms(count),
        }
    }

    /// What depends on the number of groups alone.
    fn count_terms(&self, count: usize) -> f64 {
        self.terms.partition(self.graph.len(), count)
            + self.terms.edge_counts(count, self.graph.edges().len())
    }

    /// Moves a node; an emptied group gives its number to the last one.
    pub fn apply(&mut self, node: usize, to: usize, reach: &Reach) {
        let from = self.groups[node];
        if from == to {
            return;
        }
        if to == self.count() {
            self.begin_group();
        }
        for &t in &reach.groups {
            let (count, weight) = (reach.count[t] as i32, reach.weight[t]);
            self.add_to_pair(from, t, -count, -weight);
            self.add_to_pair(to, t, count, weight);
        }
        if let Some(hierarchy) = &mut self.hierarchy {
            hierarchy.apply(from, to, reach.groups.iter().map(|&t| (t, i64::from(reach.count[t]))));
        }
        let degree = self.graph.neighbours(node).len();
        self.sizes[from] -= 1;
        self.half_edges[from] -= degree;
        self.sizes[to] += 1;
        self.half_edges[to] += degree;
        self.groups[node] = to;
        if self.sizes[from] == 0 {
            self.end_group(from);
        }
    }

    fn begin_group(&mut self) {
        let count = self.count();
        if count == self.stride {
            let stride = 2 * self.stride;
            let (mut counts, mut weights) = (vec![0; stride * stride], vec![0.0; stride * stride]);
            for r in 0..count {
                counts[r * stride..r * stride + count]
                    .copy_from_slice(&self.counts[r * self.stride..][..count]);
                weights[r * stride..r * stride + count]
                    .copy_from_slice(&self.weights[r * self.stride..][..count]);
            }
            (self.counts, self.weights, self.stride) = (counts, weights, stride);
        }
        self.sizes.push(0);
        self.half_edges.push(0);
    }

    fn end_group(&mut self, empty: usize) {
        let last = self.count() - 1;
        if empty != last {
            self.groups.iter_mut().filter(|group| **group == last).for_each(|group| *group = empty);
            for t in 0..last {
                let (row, column) = (empty * self.stride + t, t * self.stride + empty);
                let source = last * self.stride + if t == empty { last } else { t };
                (self.counts[row], self.weights[row]) = (self.counts[source], self.weights[source]);
                (self.counts[column], self.weights[column]) = (self.counts[source], self.weights[source]);
            }
        }
        for t in 0..=last {
            for at in [last * self.stride + t, t * self.stride + last] {
                (self.counts[at], self.weights[at]) = (0, 0.0);
            }
        }
        self.sizes.swap_remove(empty);
        self.half_edges.swap_remove(empty);
    }

    /// By how much the (flat) description grows when two groups become one. O(B).
    pub fn merge_delta(&self, r: usize, s: usize) -> f64 {
        let at = |a: usize, b: usize| (self.counts[a * self.stride + b], self.weights[a * self.stride + b]);
        let mut delta = 0.0;
        for t in (0..self.count()).filter(|&t| t != r && t != s) {
            let ((m, x), (n, y)) = (at(r, t), at(s, t));
            if m > 0 && n > 0 {
                delta += self.terms.pair(false, m + n, x + y) - self.pair(r, t) - self.pair(s, t);
            }
        }
        let ((m, x), (n, y), (k, z)) = (at(r, r), at(s, s), at(r, s));
        delta +=
            self.terms.pair(true, m + n + k, x + y + z) - self.pair(r, r) - self.pair(s, s) - self.pair(r, s);
        let group = |n, e| self.terms.group(self.degree_corrected, n, e) - self.terms.ln_factorial(n);
        delta += group(self.sizes[r] + self.sizes[s], self.half_edges[r] + self.half_edges[s])
            - group(self.sizes[r], self.half_edges[r])
            - group(self.sizes[s], self.half_edges[s]);
        delta + self.count_terms(self.count() - 1) - self.count_terms(self.count())
    }

    /// The same graph and model with another partition.
    pub fn with_groups(&self, groups: &[usize]) -> Self {
        Self::new(self.graph, groups, self.degree_corrected)
    }

    /// The graph.
    pub fn graph(&self) -> &'g Graph {
        self.graph
    }
}
