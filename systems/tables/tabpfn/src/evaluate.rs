//! Classifiers compared on repeated splits of a table into rows to learn from and rows to predict.

use std::time::Instant;

use kiln_core::{Context, Error, Result};
use kiln_data::{Encoder, Matrix, Table};
use rand::seq::SliceRandom;
use serde::Serialize;

use crate::baselines::{Baseline, GradientBoosting, standardise};
use crate::calibration::Calibrate;
use crate::classifier::{ClassifierOptions, TabPfnClassifier, classes};
use crate::metrics::{ReliabilityBin, Scores, reliability};
use crate::network::TabPfn;

/// A labelled table as numbers.
#[derive(Debug, Clone)]
pub struct Labelled {
    /// What it is called.
    pub name: String,
    /// `[rows, columns]`, NaN where a value is missing.
    pub rows: Matrix,
    /// Places in `classes`.
    pub labels: Vec<usize>,
    /// Names of the classes in sorted order.
    pub classes: Vec<String>,
}

impl Labelled {
    /// The table with its target column apart.
    ///
    /// # Errors
    /// When there is no such column, a class is missing, or there is but one.
    pub fn new(name: &str, mut table: Table, target: &str) -> Result<Self> {
        let (classes, labels) = classes(&table.take(target)?, table.source())?;
        if classes.len() < 2 {
            return Err(Error::input(table.source(), format!("column \"{target}\" holds one class only")));
        }
        if table.columns().is_empty() {
            return Err(Error::input(table.source(), format!("has no columns besides \"{target}\"")));
        }
        let rows = Encoder::fit(&table).encode(&table)?.matrix;
        Ok(Self { name: name.into(), rows, labels, classes })
    }

    /// These rows and their labels.
    pub fn select(&self, rows: &[usize]) -> (Matrix, Vec<usize>) {
        (self.rows.select_rows(rows), rows.iter().map(|&row| self.labels[row]).collect())
    }
}

/// How a table is split, again and again.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Protocol {
    /// How often.
    pub splits: usize,
    /// Share of the rows to learn from.
    pub train_fraction: f64,
    /// Most rows to learn from.
    pub max_train_rows: usize,
}

impl Default for Protocol {
    /// The paper's: five halvings, at most 1000 rows to learn from.
    fn default() -> Self {
        Self { splits: 5, train_fraction: 0.5, max_train_rows: 1000 }
    }
}

/// One way to split the rows of a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Split {
    /// Rows to learn from; every class is among them.
    pub train: Vec<usize>,
    /// Rows to predict.
    pub test: Vec<usize>,
}

impl Protocol {
    /// Checks that the numbers make sense.
    ///
    /// # Errors
    /// Names the one that does not.
    pub fn check(&self) -> Result<()> {
        if self.splits == 0 {
            return Err(Error::usage("--splits must be at least 1"));
        }
        if !(self.train_fraction > 0.0 && self.train_fraction < 1.0) {
            return Err(Error::usage(format!(
                "--train-fraction {} must be between 0 and 1",
                self.train_fraction
            )));
        }
        Ok(())
    }

    /// Split number `number`: of every class the same share is learned from, one row at least.
    ///
    /// # Errors
    /// When no row is left to predict.
    pub fn split(&self, table: &Labelled, number: u64, cx: &Context) -> Result<Split> {
        let mut rng = cx.rng("split", number);
        let (mut train, mut test) = (Vec::new(), Vec::new());
        let share = self.train_fraction.min(self.max_train_rows as f64 / table.labels.len() as f64);
        for class in 0..table.classes.len() {
            let mut rows: Vec<usize> =
                (0..table.labels.len()).filter(|&row| table.labels[row] == class).collect();
            rows.shuffle(&mut rng);
            let of_half = rows.len() - (rows.len() as f64 * self.train_fraction).round().max(1.0) as usize;
            let seen = ((rows.len() as f64 * share).round() as usize).clamp(1, rows.len() - of_half);
            train.extend(&rows[..seen]);
            // A cap on what is learned from does not change what is predicted.
            test.extend(&rows[rows.len() - of_half..]);
        }
        if test.is_empty() {
            return Err(Error::input(&table.name, "is too small to be split: no row is left to predict"));
        }
        train.sort_unstable();
        test.sort_unstable();
        Ok(Split { train, test })
    }
}

/// Who predicts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Method {
    /// The network.
    TabPfn,
    /// The network, not calibrated whatever the options say.
    Uncalibrated,
    /// The network, which tells at most so many classes apart in one pass.
    TabPfnInGroups(usize),
    /// A baseline with its usual settings.
    Baseline(Baseline),
    /// Boosted trees, the best of so many settings by 5-fold cross-validation.
    TunedBoosting(usize),
}

impl Method {
    /// The name in tables.
    pub fn name(self) -> String {
        match self {
            Self::TabPfn => "TabPFN".into(),
            Self::Uncalibrated => "TabPFN, not calibrated".into(),
            Self::TabPfnInGroups(groups) => format!("TabPFN, {groups} groups of classes"),
            Self::Baseline(baseline) => baseline.name().into(),
            Self::TunedBoosting(settings) => format!("boosted trees, tuned over {settings}"),
        }
    }
}

/// What a method came to on a table.
#[derive(Debug, Clone, Serialize)]
pub struct Outcome {
    /// Whose.
    pub method: String,
    /// Figures of each split.
    pub splits: Vec<Scores>,
    /// Their means.
    pub mean: Scores,
    /// Mean time to learn and predict, in seconds.
    pub seconds: f64,
    /// Confidence against accuracy over all splits.
    pub reliability: Vec<ReliabilityBin>,
}

/// Lets every method predict the same splits of a table.
///
/// # Errors
/// When a method fails on the table, or the user asks to stop.
pub fn evaluate(
    network: &TabPfn,
    table: &Labelled,
    methods: &[Method],
    options: ClassifierOptions,
    protocol: &Protocol,
    cx: &Context,
) -> Result<Vec<Outcome>> {
    protocol.check()?;
    let count = table.classes.len();
    let progress = cx.progress((methods.len() * protocol.splits) as u64, &table.name);
    // The bar of the whole replaces those of its parts.
    let quiet = &Context { output: kiln_core::OutputMode::Quiet, ..cx.clone() };
    let mut outcomes = Vec::with_capacity(methods.len());
    for &method in methods {
        let (mut scores, mut seconds) = (Vec::new(), 0.0);
        let (mut pooled, mut pooled_labels) = (Vec::new(), Vec::new());
        for number in 0..protocol.splits as u64 {
            if cx.interrupted() {
                return Err(Error::interrupted("the evaluation was stopped"));
            }
            let split = protocol.split(table, number, cx)?;
            let ((train, labels), (test, test_labels)) =
                (table.select(&split.train), table.select(&split.test));
            let begun = Instant::now();
            let probabilities = match method {
                Method::TabPfn | Method::Uncalibrated | Method::TabPfnInGroups(_) => {
                    let options = match method {
                        Method::Uncalibrated => ClassifierOptions { calibrate: Calibrate::Off, ..options },
                        Method::TabPfnInGroups(groups) => {
                            ClassifierOptions { groups: Some(groups), ..options }
                        }
                        _ => options,
                    };
                    let names = table.classes.clone();
                    TabPfnClassifier::fit_matrix(network, train, labels, names, options, quiet)
                        .and_then(|classifier| classifier.predict_proba(&test, quiet))?
                }
                Method::Baseline(baseline) => baseline.predict(&train, &labels, count, &test, quiet)?,
                Method::TunedBoosting(settings) => {
                    let (train, test) = standardise(&train, &test);
                    let (tuned, _) = GradientBoosting::tune(&train, &labels, count, settings, quiet)?;
                    tuned.predict_proba(&test)
                }
            };
            seconds += begun.elapsed().as_secs_f64();
            scores.push(Scores::new(&probabilities, &test_labels));
            pooled.extend(probabilities.values);
            pooled_labels.extend(test_labels);
            progress.inc(1);
        }
        outcomes.push(Outcome {
            method: method.name(),
            mean: Scores::mean(&scores),
            splits: scores,
            seconds: seconds / protocol.splits as f64,
            reliability: reliability(&Matrix::new(pooled_labels.len(), count, pooled), &pooled_labels),
        });
    }
    Ok(outcomes)
}

/// The rank of each figure among the others, 1 for the largest; equal ones share the mean of their ranks.
pub fn ranks(figures: &[f64]) -> Vec<f64> {
    let rank = |figure: &f64| {
        let above = figures.iter().filter(|other| *other > figure).count();
        let equal = figures.iter().filter(|other| *other == figure).count();
        above as f64 + 0.5 * (equal as f64 + 1.0)
    };
    figures.iter().map(rank).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(labels: Vec<usize>) -> Labelled {
        let rows = Matrix::new(labels.len(), 1, (0..labels.len()).map(|row| row as f64).collect());
        let count = labels.iter().max().unwrap() + 1;
        Labelled { name: "t".into(), rows, labels, classes: (0..count).map(|c| c.to_string()).collect() }
    }

    #[test]
    fn splits_are_disjoint_differ_and_keep_the_shares_of_classes() {
        let cx = Context::for_tests(".");
        let table = table((0..90).map(|row| usize::from(row % 3 == 0)).collect());
        let protocol = Protocol::default();
        let split = protocol.split(&table, 0, &cx).unwrap();
        let mut all = [split.train.clone(), split.test.clone()].concat();
        all.sort_unstable();
        assert_eq!(all, (0..90).collect::<Vec<_>>());
        assert_eq!(split.train.iter().filter(|&&row| table.labels[row] == 1).count(), 15);
        assert_eq!(protocol.split(&table, 0, &cx).unwrap(), split);
        assert_ne!(protocol.split(&table, 1, &cx).unwrap(), split);
        let capped = Protocol { max_train_rows: 12, ..protocol }.split(&table, 0, &cx).unwrap();
        assert_eq!((capped.train.len(), capped.test), (12, split.test));
    }

    #[test]
    fn a_class_of_one_row_is_learned_from_and_tables_without_rows_to_predict_are_refused() {
        let cx = Context::for_tests(".");
        let split = Protocol::default().split(&table(vec![0, 0, 0, 0, 1]), 0, &cx).unwrap();
        assert!(split.train.contains(&4));
        let error = Protocol::default().split(&table(vec![0, 1]), 0, &cx).unwrap_err().to_string();
        assert!(error.contains("too small"), "{error}");
    }

    #[test]
    fn equal_figures_share_their_rank() {
        assert_eq!(ranks(&[0.9, 0.7, 0.9, 0.8]), [1.5, 4.0, 1.5, 3.0]);
    }
}
