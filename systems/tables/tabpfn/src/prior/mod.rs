//! The prior: synthetic tables, from which the network learns what tables are like.
//!
//! A data set is what a random mechanism makes of random causes. In the causal prior ([`ScmPrior`]) columns and target
//! are nodes of a random layered graph with sparse edges, so that a column may be a cause of the target, an effect of
//! it, or neither; small graphs are likelier than large ones. In the prior of Bayesian networks ([`BnnPrior`]) the
//! columns are the causes and the target is the output of a random perceptron. [`PriorBag`] mixes them and turns what
//! they make into tables as people have them: with categories, outliers and classes (Hollmann et al., §4 and C). Classes
//! are slices of one target, as published, or regions about examples in a space of several: kinds of things that differ
//! in more than one respect, as letters and species do.

mod classes;
mod draws;
mod functions;

use kiln_core::{Error, Result};
use rand::seq::{SliceRandom, index};
use rand::{Rng, RngExt};
use serde::{Deserialize, Serialize};

pub use functions::{Layer, RandomFunction};

use crate::preprocess::{OutlierRule, ZScore};
use draws::{log_uniform, small_count};
use functions::{Widths, draw_causes, hidden_width};

/// Columns and targets, before they look like a table of classes.
#[derive(Debug, Clone)]
pub struct Sample {
    /// `[rows, features]`
    pub x: Vec<f32>,
    /// `[rows, targets]`
    pub target: Vec<f32>,
    /// What made them.
    pub mechanism: Mechanism,
}

/// What made a data set.
#[derive(Debug, Clone)]
pub struct Mechanism {
    /// The random function.
    pub function: RandomFunction,
    /// Where columns and targets stand in it; `None` when the columns are its causes and the targets its outputs.
    pub nodes: Option<Nodes>,
}

/// Nodes of a causal graph, counted through its layers after the first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Nodes {
    /// One for every column.
    pub features: Vec<usize>,
    /// One for every target.
    pub targets: Vec<usize>,
}

/// Structural causal models.
#[derive(Debug, Clone, Copy, Default)]
pub struct ScmPrior;

impl ScmPrior {
    /// Draws a graph, its causes, and the nodes that are observed.
    pub fn sample(&self, rows: usize, features: usize, targets: usize, rng: &mut impl Rng) -> Sample {
        let causes = small_count(2, 3.0, 7.0, rng);
        let hidden = hidden_width(rng).max(2 * (features + targets) - 1);
        let function = RandomFunction::draw(Widths { causes, hidden, outputs: hidden }, rng);
        let layers = function.run(&draw_causes(rows, causes, rng), rng);
        let nodes = Nodes::draw(layers.len() * hidden, features, targets, rng);
        let value = |row: usize, node: usize| layers[node / hidden][row * hidden + node % hidden];
        let values = |nodes: &[usize]| {
            (0..rows).flat_map(|row| nodes.iter().map(move |&node| value(row, node))).collect()
        };
        Sample {
            x: values(&nodes.features),
            target: values(&nodes.targets),
            mechanism: Mechanism { function, nodes: Some(nodes) },
        }
    }
}

impl Nodes {
    /// Chooses among `count` nodes: the targets last of all or anywhere; the columns near each other or anywhere, in the
    /// order of the graph or in none.
    fn draw(count: usize, features: usize, targets: usize, rng: &mut impl Rng) -> Self {
        let near_each_other = rng.random::<bool>();
        let targets_are_last = rng.random::<bool>();
        let others = count - targets;
        let mut chosen = if near_each_other {
            let first = rng.random_range(0..=others - (features + targets));
            let mut range: Vec<usize> = (first..first + features + targets).collect();
            range.shuffle(rng);
            range
        } else {
            index::sample(rng, others, features + targets).into_vec()
        };
        let among_the_columns = chosen.split_off(features);
        let targets = if targets_are_last { (others..count).collect() } else { among_the_columns };
        if rng.random() {
            chosen.sort_unstable();
        }
        Self { features: chosen, targets }
    }
}

/// Bayesian neural networks.
#[derive(Debug, Clone, Copy, Default)]
pub struct BnnPrior;

impl BnnPrior {
    /// Draws a network and its inputs.
    pub fn sample(&self, rows: usize, features: usize, targets: usize, rng: &mut impl Rng) -> Sample {
        let widths = Widths { causes: features, hidden: hidden_width(rng), outputs: targets };
        let function = RandomFunction::draw(widths, rng);
        let x = draw_causes(rows, features, rng);
        let target = function.run(&x, rng).pop().expect("a random function has at least two layers");
        Sample { x, target, mechanism: Mechanism { function, nodes: None } }
    }
}

/// The extents of data sets to be drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extents {
    /// Rows.
    pub rows: usize,
    /// Of them, those whose labels are known: the first.
    pub labelled: usize,
    /// Most columns.
    pub max_features: usize,
    /// Most classes.
    pub max_classes: usize,
}

/// A data set to learn from.
#[derive(Debug, Clone)]
pub struct DataSet {
    /// `[rows, features]`, standardised by the labelled rows.
    pub x: Vec<f32>,
    /// Columns.
    pub features: usize,
    /// Class of each row, from 0.
    pub y: Vec<usize>,
    /// Classes that occur, among the labelled rows as among the others.
    pub classes: usize,
    /// What made it.
    pub mechanism: Mechanism,
}

/// A mixture of both priors, with everything that makes a table of what they draw.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct PriorBag {
    /// The share of causal models; the others are Bayesian networks.
    pub causal_share: f64,
    /// The share of data sets whose classes are regions about examples in a space of several targets; those of the
    /// others are slices of one.
    pub region_share: f64,
}

impl Default for PriorBag {
    fn default() -> Self {
        Self { causal_share: 0.5, region_share: 0.25 }
    }
}

/// Fewest and most targets of a space in which classes are regions.
const REGION_TARGETS: [usize; 2] = [2, 6];
/// Draws of a data set before it is given up; about one in ten is rejected.
const MOST_DRAWS: usize = 1000;
/// Orders of the rows that are tried until labelled and other rows hold the same classes.
const MOST_ORDERS: usize = 10;

impl PriorBag {
    /// Checks that shares are shares.
    ///
    /// # Errors
    /// Names the one that is not.
    pub fn check(&self) -> Result<()> {
        match [self.causal_share, self.region_share].iter().find(|share| !(0.0..=1.0).contains(*share)) {
            Some(share) => Err(Error::usage(format!("a share of {share} is not between 0 and 1"))),
            None => Ok(()),
        }
    }

    /// Draws a data set, again and again until one has finite columns and the same classes, two at least, among the
    /// labelled rows as among the others.
    ///
    /// # Errors
    /// When the extents leave no room for that.
    pub fn sample(&self, extents: &Extents, rng: &mut impl Rng) -> Result<DataSet> {
        let Extents { rows, labelled, max_features, max_classes } = *extents;
        if labelled < 2 || labelled + 2 > rows || max_features == 0 || max_classes < 2 {
            let found =
                format!("{labelled} of {rows} rows, {max_features} columns and {max_classes} classes");
            return Err(Error::usage(format!("no data set has so few labelled or other rows: {found}"))
                .hint("2 rows with labels and 2 without are the least, 1 column, 2 classes"));
        }
        (0..MOST_DRAWS).find_map(|_| self.try_sample(extents, rng)).ok_or_else(|| {
            Error::work(format!("none of {MOST_DRAWS} data sets had the same classes in both parts"))
        })
    }

    fn try_sample(&self, extents: &Extents, rng: &mut impl Rng) -> Option<DataSet> {
        let Extents { rows, labelled, max_features, max_classes } = *extents;
        let features = feature_count(max_features, rng);
        let causal = rng.random::<f64>() < self.causal_share;
        let in_regions = self.region_share > 0.0 && rng.random::<f64>() < self.region_share;
        let [fewest, most] = REGION_TARGETS;
        let targets = if in_regions { rng.random_range(fewest..=most) } else { 1 };
        let Sample { mut x, target, mechanism } = match causal {
            true => ScmPrior.sample(rows, features, targets, rng),
            false => BnnPrior.sample(rows, features, targets, rng),
        };
        if x.iter().chain(&target).any(|value| !value.is_finite()) {
            return None;
        }
        make_categories(&mut x, features, rng);
        let mut y = if in_regions {
            classes::regions(&target, targets, rng.random_range(2..=max_classes), rng)
        } else {
            let wanted = classes::class_count(max_classes, rng);
            let mut y = classes::cut(&target, wanted, rng);
            classes::reorder(&mut y, wanted, rng.random::<f64>() * 0.5, rng);
            y
        };
        let classes = classes::renumber(&mut y);
        let order = balanced_order(&y, classes, labelled, rng)?;
        let turn = rng.random_range(0..classes);
        let y = order.iter().map(|&row| (y[row] + turn) % classes).collect();
        let first = rng.random_range(0..features);
        let mut x: Vec<f32> = order
            .iter()
            .flat_map(|&row| (0..features).map(move |column| row * features + (first + column) % features))
            .map(|at| x[at])
            .collect();
        standardise(&mut x, features, labelled);
        Some(DataSet { x, features, y, classes, mechanism })
    }
}

/// Columns of a data set: uniform in half of the cases, as published, and log-uniform in the others, because most
/// tables are narrow.
fn feature_count(most: usize, rng: &mut impl Rng) -> usize {
    let uniform = rng.random::<bool>();
    let log_uniform = log_uniform([1.0, most as f64 + 1.0], rng) as usize;
    if uniform { rng.random_range(1..=most) } else { log_uniform.min(most) }
}

/// Turns each column into categories with a probability of 0, 0.1 or 0.2 that is drawn for the whole table.
fn make_categories(x: &mut [f32], features: usize, rng: &mut impl Rng) {
    let share = draws::choose(&[0.0, 0.1, 0.2], rng);
    for feature in 0..features {
        if rng.random::<f64>() < share {
            let mut column: Vec<f32> = x.iter().skip(feature).step_by(features).copied().collect();
            classes::categories(&mut column, rng);
            x.iter_mut().skip(feature).step_by(features).zip(column).for_each(|(x, value)| *x = value);
        }
    }
}

/// An order of the rows in which the first `labelled` and the others hold the same classes.
fn balanced_order(y: &[usize], classes: usize, labelled: usize, rng: &mut impl Rng) -> Option<Vec<usize>> {
    let mut order: Vec<usize> = (0..y.len()).collect();
    let holds_all = |rows: &[usize]| {
        let mut present = vec![false; classes];
        rows.iter().for_each(|&row| present[y[row]] = true);
        present.iter().all(|&p| p)
    };
    (classes >= 2).then_some(())?;
    (0..MOST_ORDERS).find_map(|_| {
        order.shuffle(rng);
        let (with_label, without) = order.split_at(labelled);
        (holds_all(with_label) && holds_all(without)).then(|| order.clone())
    })
}

/// What prediction does to a user's columns: mean 0 and deviation 1 over the labelled rows, outliers drawn in.
fn standardise(x: &mut [f32], features: usize, labelled: usize) {
    for feature in 0..features {
        let mut column: Vec<f64> = x.iter().skip(feature).step_by(features).map(|&x| x.into()).collect();
        let score = ZScore::fit(&column[..labelled]);
        column.iter_mut().for_each(|x| *x = score.apply(*x));
        let outliers = OutlierRule::fit(&column[..labelled]);
        let values = x.iter_mut().skip(feature).step_by(features).zip(column);
        values.for_each(|(x, value)| *x = outliers.apply(value) as f32);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_core::random_stream;

    const EXTENTS: Extents = Extents { rows: 40, labelled: 20, max_features: 12, max_classes: 10 };

    #[test]
    fn ten_thousand_data_sets_are_finite_and_keep_their_bounds() {
        let mut rng = random_stream(0, "test", 0);
        let (mut causal, mut widths, mut counts) = (0, [0; 13], [0; 11]);
        for _ in 0..10_000 {
            let set = PriorBag::default().sample(&EXTENTS, &mut rng).unwrap();
            assert!(set.x.len() == 40 * set.features && set.x.iter().all(|x| x.is_finite()));
            let holds = |rows: &[usize]| (0..set.classes).all(|class| rows.contains(&class));
            assert!(set.y.len() == 40 && holds(&set.y[..20]) && holds(&set.y[20..]));
            causal += usize::from(set.mechanism.nodes.is_some());
            widths[set.features] += 1;
            counts[set.classes] += 1;
        }
        // Rejection favours sets whose classes survive a split, a little more of them Bayesian networks.
        assert!((4000..6000).contains(&causal), "{causal} are causal");
        assert!(widths[0] == 0 && widths[1..].iter().all(|&n| n > 300), "{widths:?}");
        assert!(
            counts[..2] == [0, 0] && counts[2] > 5000 && counts[3..].iter().all(|&n| n > 0),
            "{counts:?}"
        );
    }

    #[test]
    fn the_same_stream_draws_the_same_data_set() {
        let draw =
            |index| PriorBag::default().sample(&EXTENTS, &mut random_stream(3, "test", index)).unwrap();
        assert_eq!((draw(0).x, draw(0).y), (draw(0).x, draw(0).y));
        assert_ne!(draw(0).x, draw(1).x);
    }

    #[test]
    fn observed_nodes_differ_from_each_other_and_from_the_targets() {
        let mut rng = random_stream(0, "test", 1);
        for features in 1..=20 {
            let targets = 1 + features % 6;
            let count = 2 * (features + targets) - 1;
            let nodes = Nodes::draw(count, features, targets, &mut rng);
            let mut all = [&nodes.features[..], &nodes.targets].concat();
            all.sort_unstable();
            all.dedup();
            assert!(all.len() == features + targets && all.iter().all(|&node| node < count), "{nodes:?}");
        }
    }

    #[test]
    fn extents_without_room_for_both_parts_are_refused() {
        for (rows, labelled) in [(40, 1), (40, 39), (3, 2)] {
            let extents = Extents { rows, labelled, ..EXTENTS };
            assert!(PriorBag::default().sample(&extents, &mut random_stream(0, "test", 2)).is_err());
        }
    }
}
