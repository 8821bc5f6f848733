//! Weighted undirected graphs without loops.

use std::collections::BTreeMap;
use std::path::Path;

use kiln_core::{Error, Result};
use kiln_data::{Cells, Column, Table, TableOptions};

/// Nodes with names, and edges with weights.
#[derive(Debug, Clone, PartialEq)]
pub struct Graph {
    nodes: Vec<String>,
    edges: Vec<(usize, usize, f64)>,
    /// Neighbours of every node with the weights of the edges.
    neighbours: Vec<Vec<(usize, f64)>>,
}

impl Graph {
    /// A graph; edges of weight 0 are left out.
    ///
    /// # Errors
    /// When an edge joins a node with itself, names no node, occurs twice, or has a weight that is negative or not finite.
    pub fn new(nodes: Vec<String>, edges: impl IntoIterator<Item = (usize, usize, f64)>) -> Result<Self> {
        let mut neighbours = vec![Vec::new(); nodes.len()];
        let mut joined = BTreeMap::new();
        for (i, j, weight) in edges {
            if i >= nodes.len() || j >= nodes.len() {
                return Err(Error::input(
                    "the graph",
                    format!("an edge joins nodes {i} and {j} of {}", nodes.len()),
                ));
            }
            let place = format!("edge {} – {}", nodes[i], nodes[j]);
            if i == j {
                return Err(Error::input(place, "joins a node with itself").hint("leave self loops out"));
            }
            if !(weight.is_finite() && weight >= 0.0) {
                return Err(Error::input(place, format!("has the weight {weight}"))
                    .hint("weights are finite and not negative"));
            }
            if weight == 0.0 {
                continue;
            }
            if joined.insert((i.min(j), i.max(j)), weight).is_some() {
                return Err(
                    Error::input(place, "occurs twice").hint("add up the weights of parallel edges first")
                );
            }
        }
        let edges: Vec<(usize, usize, f64)> =
            joined.into_iter().map(|((i, j), weight)| (i, j, weight)).collect();
        for &(i, j, weight) in &edges {
            neighbours[i].push((j, weight));
            neighbours[j].push((i, weight));
        }
        Ok(Self { nodes, edges, neighbours })
    }

    /// Reads `source,target,weight`; without a column of weights they are 1.
    ///
    /// # Errors
    /// When a column is missing, a cell is empty, or as [`new`](Self::new).
    pub fn read(path: &Path) -> Result<Self> {
        let table = Table::read(path, TableOptions::default())?;
        let column = |name: &str| table.column(name).ok_or_else(|| table.no_column(name));
        let (source, target) = (column("source")?, column("target")?);
        let weights = table.column("weight").map(|column| match &column.cells {
            Cells::Numbers(numbers) => Ok(numbers.clone()),
            Cells::Words { .. } => Err(Error::input(
                format!("{}: column \"weight\"", table.source()),
                format!("holds \"{}\"", column.stray_word().unwrap_or("words")),
            )
            .hint("weights are numbers")),
        });
        let weights = weights.transpose()?;
        let mut names: Vec<String> = Vec::new();
        let mut numbers: BTreeMap<String, usize> = BTreeMap::new();
        let mut node = |column: &Column, row: usize| -> Result<usize> {
            let place = || format!("{}: row {}, column \"{}\"", table.source(), row + 1, column.name);
            let name = column.text(row).ok_or_else(|| Error::input(place(), "is empty"))?;
            Ok(*numbers.entry(name).or_insert_with_key(|name| {
                names.push(name.clone());
                names.len() - 1
            }))
        };
        let mut edges = Vec::with_capacity(table.rows());
        for row in 0..table.rows() {
            let weight = weights.as_ref().map_or(1.0, |weights| weights[row]);
            if !weight.is_finite() {
                return Err(Error::input(
                    format!("{}: row {}", table.source(), row + 1),
                    "the weight is missing",
                )
                .hint("every edge has a weight, or leave the column out"));
            }
            edges.push((node(source, row)?, node(target, row)?, weight));
        }
        Self::new(names, edges).map_err(|e| match e.hint_text() {
            Some(hint) => Error::input(table.source(), &e).hint(hint),
            None => Error::input(table.source(), &e),
        })
    }

    /// Names.
    pub fn nodes(&self) -> &[String] {
        &self.nodes
    }

    /// Number of nodes.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Whether there is no node.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// Edges (i, j, weight), i < j.
    pub fn edges(&self) -> &[(usize, usize, f64)] {
        &self.edges
    }

    /// Neighbours of a node, with the weights of the edges.
    pub fn neighbours(&self, node: usize) -> &[(usize, f64)] {
        &self.neighbours[node]
    }

    /// The mean weight of an edge; 1 for a graph without edges.
    pub fn mean_weight(&self) -> f64 {
        match self.edges.len() {
            0 => 1.0,
            count => self.edges.iter().map(|(_, _, weight)| weight).sum::<f64>() / count as f64,
        }
    }

    /// The part that has edges, and which nodes those are.
    pub fn without_isolated(&self) -> (Self, Vec<usize>) {
        let kept: Vec<usize> = (0..self.len()).filter(|&i| !self.neighbours[i].is_empty()).collect();
        let mut place = vec![0; self.len()];
        kept.iter().enumerate().for_each(|(new, &old)| place[old] = new);
        let part = Self {
            nodes: kept.iter().map(|&i| self.nodes[i].clone()).collect(),
            edges: self.edges.iter().map(|&(i, j, weight)| (place[i], place[j], weight)).collect(),
            neighbours: (kept.iter())
                .map(|&i| self.neighbours[i].iter().map(|&(j, weight)| (place[j], weight)).collect())
                .collect(),
        };
        (part, kept)
    }
}
