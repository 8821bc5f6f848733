//! The nested description of the counts of edges between groups: groups are themselves grouped, until one group is left.
//!
//! Each level adds `Σ_{r<s} ln((n_r n_s  m_rs)) + Σ_r ln((n_r(n_r+1)/2  m_rr))` and its partition.

use super::state::State;
use super::terms::Terms;

/// Groups of groups.
#[derive(Debug, Clone, PartialEq)]
pub struct Hierarchy {
    levels: Vec<Level>,
}

/// One level: the graph of its groups.
#[derive(Debug, Clone, PartialEq)]
struct Level {
    /// The group of every group of the level below.
    groups: Vec<usize>,
    sizes: Vec<usize>,
    /// m_rs, row by row, each edge once.
    counts: Vec<i64>,
}

impl Level {
    /// A partition of the groups whose edges are `below`, row by row.
    fn new(below: &[i64], groups: Vec<usize>) -> Self {
        let count = groups.iter().max().map_or(0, |m| m + 1);
        let mut level = Self { sizes: vec![0; count], counts: vec![0; count * count], groups };
        for (a, &r) in level.groups.iter().enumerate() {
            level.sizes[r] += 1;
            for (b, &s) in level.groups.iter().enumerate().skip(a) {
                let edges = below[a * level.groups.len() + b];
                level.counts[r * count + s] += edges;
                if r != s {
                    level.counts[s * count + r] += edges;
                }
            }
        }
        level
    }

    fn count(&self) -> usize {
        self.sizes.len()
    }

    fn pair(&self, r: usize, s: usize, edges: i64, terms: &Terms) -> f64 {
        let places = match r == s {
            true => self.sizes[r] * (self.sizes[r] + 1) / 2,
            false => self.sizes[r] * self.sizes[s],
        };
        terms.ln_multiset(places, edges as usize)
    }

    fn description_length(&self, terms: &Terms) -> f64 {
        let count = self.count();
        let pairs = (0..count).flat_map(|r| (r..count).map(move |s| (r, s)));
        let edges: f64 = pairs.map(|(r, s)| self.pair(r, s, self.counts[r * count + s], terms)).sum();
        let sizes: f64 = self.sizes.iter().map(|&n| terms.ln_factorial(n)).sum();
        edges + terms.partition(self.groups.len(), count) - sizes
    }

    /// How the counts change when edges to groups of this level leave `from` for `to`.
    fn changes(&self, from: usize, to: usize, edges: &[(usize, i64)]) -> Vec<(usize, usize, i64)> {
        let mut changes: Vec<(usize, usize, i64)> = Vec::new();
        let mut add = |r: usize, s: usize, n: i64| {
            let (r, s) = (r.min(s), r.max(s));
            match changes.iter_mut().find(|change| (change.0, change.1) == (r, s)) {
                Some(change) => change.2 += n,
                None => changes.push((r, s, n)),
            }
        };
        for &(t, n) in edges {
            add(from, t, -n);
            add(to, t, n);
        }
        changes
    }
}

impl Hierarchy {
    /// The hierarchy with the shortest description that merging groups finds, level upon level.
    pub fn infer(state: &State, terms: &Terms) -> Self {
        let count = state.count();
        let mut below: Vec<i64> =
            (0..count * count).map(|at| i64::from(state.edges_between(at / count, at % count))).collect();
        let mut size = count;
        let mut levels = Vec::new();
        loop {
            let level = if size == 1 { Level::new(&below, vec![0]) } else { best_level(&below, size, terms) };
            let end = level.count() == 1;
            (below, size) = (level.counts.clone(), level.count());
            levels.push(level);
            if end {
                return Self { levels };
            }
        }
    }

    /// The group of every group of the level below, level by level.
    pub fn levels(&self) -> Vec<Vec<usize>> {
        self.levels.iter().map(|level| level.groups.clone()).collect()
    }

    pub(super) fn description_length(&self, terms: &Terms) -> f64 {
        self.levels.iter().map(|level| level.description_length(terms)).sum()
    }

    /// By how much the description grows when a node with these edges moves from one group to another.
    pub(super) fn delta(
        &self,
        from: usize,
        to: usize,
        edges: impl Iterator<Item = (usize, i64)>,
        terms: &Terms,
    ) -> f64 {
        let (mut from, mut to) = (from, to);
        let mut edges: Vec<(usize, i64)> = edges.collect();
        let mut delta = 0.0;
        for level in &self.levels {
            (from, to) = (level.groups[from], level.groups[to]);
            if from == to {
                break; // nothing changes above
            }
            edges.iter_mut().for_each(|edge| edge.0 = level.groups[edge.0]);
            for (r, s, n) in level.changes(from, to, &edges) {
                let edges = level.counts[r * level.count() + s];
                delta += level.pair(r, s, edges + n, terms) - level.pair(r, s, edges, terms);
            }
        }
        delta
    }

    pub(super) fn apply(&mut self, from: usize, to: usize, edges: impl Iterator<Item = (usize, i64)>) {
        let (mut from, mut to) = (from, to);
        let mut edges: Vec<(usize, i64)> = edges.collect();
        for level in &mut self.levels {
            (from, to) = (level.groups[from], level.groups[to]);
            if from == to {
                break;
            }
            edges.iter_mut().for_each(|edge| edge.0 = level.groups[edge.0]);
            let count = level.count();
            for (r, s, n) in level.changes(from, to, &edges) {
                level.counts[r * count + s] += n;
                if r != s {
                    level.counts[s * count + r] += n;
                }
            }
        }
    }
}

/// The best of the partitions met when groups are merged two by two, each with the flat description above it.
fn best_level(below: &[i64], size: usize, terms: &Terms) -> Level {
    let edges: i64 = (0..size).flat_map(|r| (r..size).map(move |s| below[r * size + s])).sum();
    let cost = |level: &Level| {
        let above = if level.count() == 1 { 0.0 } else { terms.edge_counts(level.count(), edges as usize) };
        level.description_length(terms) + above
    };
    let mut current: Vec<usize> = (0..size).collect();
    let mut best: Option<(f64, Level)> = None;
    for count in (2..=size).rev() {
        let pairs = (0..count).flat_map(|r| (r + 1..count).map(move |s| (r, s)));
        let merged = |(r, s): (usize, usize)| -> Vec<usize> {
            current.iter().map(|&g| if g == s { r } else { g - usize::from(g > s) }).collect()
        };
        let levels = pairs.map(|pair| Level::new(below, merged(pair))).map(|level| (cost(&level), level));
        let Some(found) = levels.min_by(|a, b| a.0.total_cmp(&b.0)) else { break };
        current.clone_from(&found.1.groups);
        if best.as_ref().is_none_or(|best| found.0 < best.0) {
            best = Some(found);
        }
    }
    best.map_or_else(|| Level::new(below, vec![0; size]), |(_, level)| level)
}
