//! Decision trees over binned columns: the ground of the boosted trees and of the random forest that TabPFN is compared
//! with. A tree lowers Σ_outputs (gradient · value + ½ hessian · value²), as XGBoost's do; with one-hot targets for
//! gradients and weights for hessians that is Gini's criterion.

use kiln_data::Matrix;
use rand::Rng;
use rand::seq::index::sample;

/// Most bins of a column.
const BINS: usize = 256;

/// The columns of a table, each cut into bins of about as many rows.
pub struct Binned {
    /// For each column, the least value of every bin but the first.
    edges: Vec<Vec<f64>>,
    /// For each column, the bin of every row.
    bins: Vec<Vec<u8>>,
}

impl Binned {
    /// Bins a table without missing values.
    pub fn new(table: &Matrix) -> Self {
        let edges: Vec<Vec<f64>> = (0..table.columns).map(|column| edges(table.column(column))).collect();
        let bin = |column: usize, row: usize| {
            let x = table.at(row, column);
            edges[column].partition_point(|&edge| edge <= x) as u8
        };
        let bins = (0..table.columns).map(|column| (0..table.rows).map(|row| bin(column, row)).collect());
        Self { bins: bins.collect(), edges }
    }
}

/// Middles between neighbouring values: of all, or of quantiles where there are more than bins.
fn edges(mut values: Vec<f64>) -> Vec<f64> {
    values.sort_by(f64::total_cmp);
    let mut distinct = values.clone();
    distinct.dedup();
    let middle = |a: f64, b: f64| a + 0.5 * (b - a);
    if distinct.len() <= BINS {
        return distinct.windows(2).map(|pair| middle(pair[0], pair[1])).collect();
    }
    let mut edges: Vec<f64> = (1..BINS)
        .map(|bin| {
            let place = distinct.partition_point(|&x| x < values[bin * values.len() / BINS]);
            middle(distinct[place.max(1) - 1], distinct[place.max(1)])
        })
        .collect();
    edges.dedup();
    edges
}

/// What limits a tree's growth.
#[derive(Debug, Clone, Copy)]
pub struct Growth {
    /// Most splits on the way to a leaf.
    pub max_depth: usize,
    /// Least sum of hessians in a leaf.
    pub min_weight: f64,
    /// Ridge penalty on a leaf's value.
    pub lambda: f64,
    /// Columns that are tried at a node; all if `None`.
    pub columns_per_node: Option<usize>,
}

/// What a tree is fitted to, for each row that it sees.
pub struct Targets<'a> {
    /// Outputs of a leaf.
    pub outputs: usize,
    /// `[rows, outputs]`
    pub gradients: &'a [f64],
    /// `[rows]`, shared by the outputs.
    pub hessians: &'a [f64],
}

enum Node {
    Split { column: usize, edge: f64, left: usize, right: usize },
    Leaf(Vec<f64>),
}

/// A tree.
pub struct Tree {
    nodes: Vec<Node>,
}

struct Split {
    column: usize,
    /// The last bin that goes to the left.
    bin: u8,
    gain: f64,
}

impl Tree {
    /// Grows a tree on `rows` of the table, using these `columns`.
    pub fn grow(
        table: &Binned,
        targets: &Targets,
        mut rows: Vec<u32>,
        columns: &[usize],
        growth: &Growth,
        rng: &mut impl Rng,
    ) -> Self {
        let mut tree = Self { nodes: Vec::new() };
        let mut histogram = vec![0.0; BINS * (targets.outputs + 1)];
        tree.grow_node(table, targets, &mut rows, columns, growth, growth.max_depth, &mut histogram, rng);
        tree
    }

    /// Grows the node of `rows` and those below; returns its place.
    #[allow(clippy::too_many_arguments, reason = "a recursion carries what all its levels share")]
    fn grow_node(
        &mut self,
        table: &Binned,
        targets: &Targets,
        rows: &mut [u32],
        columns: &[usize],
        growth: &Growth,
        depth: usize,
        histogram: &mut [f64],
        rng: &mut impl Rng,
    ) -> usize {
        let place = self.nodes.len();
        let total = total(targets, rows);
        let (weight, gradients) = total.split_last().expect("a total ends with the weight");
        self.nodes.push(Node::Leaf(gradients.iter().map(|g| -g / (weight + growth.lambda)).collect()));
        if depth == 0 || rows.len() < 2 {
            return place;
        }
        let tried: Vec<usize> = match growth.columns_per_node {
            Some(count) if count < columns.len() => {
                sample(rng, columns.len(), count).iter().map(|index| columns[index]).collect()
            }
            _ => columns.to_vec(),
        };
        let splits = tried
            .into_iter()
            .filter_map(|column| best_split(table, targets, rows, column, &total, growth, histogram));
        let Some(split) = splits.reduce(|best, split| if split.gain > best.gain { split } else { best })
        else {
            return place;
        };
        let bins = &table.bins[split.column];
        let middle = partition(rows, |row| bins[row as usize] <= split.bin);
        let (left, right) = rows.split_at_mut(middle);
        let mut child =
            |rows| self.grow_node(table, targets, rows, columns, growth, depth - 1, histogram, rng);
        let (left, right) = (child(left), child(right));
        let edge = table.edges[split.column][split.bin as usize];
        self.nodes[place] = Node::Split { column: split.column, edge, left, right };
        place
    }

    /// The values of the leaf that a row falls into.
    pub fn values(&self, row: &[f64]) -> &[f64] {
        let mut place = 0;
        loop {
            match &self.nodes[place] {
                Node::Leaf(values) => return values,
                Node::Split { column, edge, left, right } => {
                    place = if row[*column] < *edge { *left } else { *right };
                }
            }
        }
    }
}

/// Sums of gradients, and of hessians behind them.
fn total(targets: &Targets, rows: &[u32]) -> Vec<f64> {
    let mut total = vec![0.0; targets.outputs + 1];
    for &row in rows {
        add(&mut total, targets, row as usize);
    }
    total
}

fn add(sums: &mut [f64], targets: &Targets, row: usize) {
    let gradients = &targets.gradients[row * targets.outputs..(row + 1) * targets.outputs];
    for (sum, gradient) in sums.iter_mut().zip(gradients) {
        *sum += gradient;
    }
    sums[targets.outputs] += targets.hessians[row];
}

/// How much a leaf with these sums lowers the loss, times 2.
fn score(sums: &[f64], lambda: f64) -> f64 {
    let (weight, gradients) = sums.split_last().expect("sums end with the weight");
    gradients.iter().map(|g| g * g).sum::<f64>() / (weight + lambda)
}

/// The best place to divide `rows` by a column; `None` where no place gains anything. `histogram` is all zeros, before and
/// after.
fn best_split(
    table: &Binned,
    targets: &Targets,
    rows: &[u32],
    column: usize,
    total: &[f64],
    growth: &Growth,
    histogram: &mut [f64],
) -> Option<Split> {
    let width = targets.outputs + 1;
    let bins = &table.bins[column];
    let (mut first, mut last) = (u8::MAX, 0);
    for &row in rows {
        let bin = bins[row as usize];
        (first, last) = (first.min(bin), last.max(bin));
        add(&mut histogram[bin as usize * width..][..width], targets, row as usize);
    }
    let whole = score(total, growth.lambda);
    let mut left = vec![0.0; width];
    let mut right = vec![0.0; width];
    let mut best = None;
    let mut best_gain = 1e-9 * (1.0 + whole);
    for bin in first..last {
        let sums = &histogram[bin as usize * width..][..width];
        if sums[targets.outputs] == 0.0 {
            continue;
        }
        for ((left, right), (sum, total)) in left.iter_mut().zip(&mut right).zip(sums.iter().zip(total)) {
            *left += sum;
            *right = total - *left;
        }
        if left[targets.outputs] < growth.min_weight || right[targets.outputs] < growth.min_weight {
            continue;
        }
        let gain = score(&left, growth.lambda) + score(&right, growth.lambda) - whole;
        if gain > best_gain {
            best_gain = gain;
            best = Some(Split { column, bin, gain });
        }
    }
    histogram[first as usize * width..(last as usize + 1) * width].fill(0.0);
    best
}

/// Brings the rows for which `first` holds before the others; returns how many they are.
fn partition(rows: &mut [u32], first: impl Fn(u32) -> bool) -> usize {
    let mut middle = 0;
    for place in 0..rows.len() {
        if first(rows[place]) {
            rows.swap(place, middle);
            middle += 1;
        }
    }
    middle
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_core::random_stream;

    const GROWTH: Growth = Growth { max_depth: 4, min_weight: 1.0, lambda: 0.0, columns_per_node: None };

    /// Grows a tree of class shares.
    fn grow(table: &Matrix, labels: &[usize], classes: usize, growth: &Growth) -> Tree {
        let gradients: Vec<f64> = labels
            .iter()
            .flat_map(|&label| (0..classes).map(move |c| if c == label { -1.0 } else { 0.0 }))
            .collect();
        let targets = Targets { outputs: classes, gradients: &gradients, hessians: &vec![1.0; labels.len()] };
        let columns: Vec<usize> = (0..table.columns).collect();
        let rows = (0..table.rows as u32).collect();
        Tree::grow(&Binned::new(table), &targets, rows, &columns, growth, &mut random_stream(0, "tree", 0))
    }

    #[test]
    fn a_tree_of_depth_two_solves_an_uneven_exclusive_or() {
        let points: Vec<(f64, f64)> =
            (0..7).flat_map(|i| (0..5).map(move |j| (i.into(), j.into()))).collect();
        let table = Matrix::new(35, 2, points.iter().flat_map(|&(x, y)| [x, y]).collect());
        let labels: Vec<usize> = points.iter().map(|&(x, y)| usize::from((x < 2.0) != (y < 2.0))).collect();
        let tree = grow(&table, &labels, 2, &Growth { max_depth: 2, ..GROWTH });
        for (row, &label) in labels.iter().enumerate() {
            assert_eq!(tree.values(table.row(row))[label], 1.0, "row {row}");
        }
    }

    #[test]
    fn leaves_hold_the_shares_of_classes_and_are_not_lighter_than_allowed() {
        let table = Matrix::new(6, 1, vec![0.0, 0.0, 0.0, 1.0, 1.0, 1.0]);
        let tree = grow(&table, &[0, 0, 1, 1, 1, 1], 2, &GROWTH);
        assert!((tree.values(&[-5.0])[0] - 2.0 / 3.0).abs() < 1e-12);
        assert_eq!(tree.values(&[5.0]), [0.0, 1.0]);
        let stump = grow(&table, &[0, 0, 1, 1, 1, 1], 2, &Growth { min_weight: 4.0, ..GROWTH });
        assert!((stump.values(&[5.0])[1] - 4.0 / 6.0).abs() < 1e-12);
    }

    #[test]
    fn many_values_fall_into_bins_of_about_as_many_rows() {
        let table = Matrix::new(10_000, 1, (0..10_000).map(|i| f64::from(i).powi(3)).collect());
        let binned = Binned::new(&table);
        let mut counts = [0; BINS];
        binned.bins[0].iter().for_each(|&bin| counts[bin as usize] += 1);
        assert!(counts.iter().all(|&count| (38..=41).contains(&count)), "{counts:?}");
    }
}
