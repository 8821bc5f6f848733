//! What a classifier's predictions hang on: how much worse they get when a column is shuffled, and how they move with it.

use kiln_core::{Context, Result};
use kiln_data::Matrix;
use rand::seq::SliceRandom;
use serde::Serialize;

use crate::classifier::TabPfnClassifier;
use crate::metrics::{Scores, log_loss};

/// How much a column matters.
#[derive(Debug, Clone, Serialize)]
pub struct Importance {
    /// The column.
    pub column: String,
    /// By how much the mean log-loss rises when its values change places, in nats; the mean over the shuffles.
    pub loss: f64,
    /// The standard deviation over the shuffles.
    pub deviation: f64,
    /// By how much the accuracy falls.
    pub accuracy: f64,
}

/// Shuffles one column of labelled rows after the other (Breiman 2001); the most important comes first. With a classifier
/// that keeps its labelled rows, only the shuffled ones pass through the network.
///
/// # Errors
/// When a prediction fails.
pub fn permutation_importance(
    classifier: &TabPfnClassifier,
    rows: &Matrix,
    labels: &[usize],
    repeats: usize,
    cx: &Context,
) -> Result<Vec<Importance>> {
    let quiet = &Context { output: kiln_core::OutputMode::Quiet, ..cx.clone() };
    let baseline = Scores::new(&classifier.predict_proba(rows, quiet)?, labels);
    let progress = cx.progress((rows.columns * repeats) as u64, "shuffling columns");
    let mut importances = Vec::with_capacity(rows.columns);
    for (column, known) in classifier.encoder().columns.iter().enumerate() {
        let (mut losses, mut accuracy) = (Vec::with_capacity(repeats), 0.0);
        for repeat in 0..repeats {
            let mut order: Vec<usize> = (0..rows.rows).collect();
            order.shuffle(&mut cx.rng("shuffle", (column * repeats + repeat) as u64));
            let mut shuffled = rows.clone();
            for (row, from) in order.into_iter().enumerate() {
                shuffled.values[row * rows.columns + column] = rows.at(from, column);
            }
            let probabilities = classifier.predict_proba(&shuffled, quiet)?;
            losses.push(log_loss(&probabilities, labels) - baseline.log_loss);
            accuracy +=
                (baseline.accuracy - crate::metrics::accuracy(&probabilities, labels)) / repeats as f64;
            progress.inc(1);
        }
        let mean = losses.iter().sum::<f64>() / repeats as f64;
        let variance = losses.iter().map(|loss| (loss - mean).powi(2)).sum::<f64>() / repeats as f64;
        importances.push(Importance {
            column: known.name.clone(),
            loss: mean,
            deviation: variance.sqrt(),
            accuracy,
        });
    }
    importances.sort_by(|a, b| b.loss.total_cmp(&a.loss));
    Ok(importances)
}

/// How the probabilities move with a column.
#[derive(Debug, Clone, Serialize)]
pub struct PartialDependence {
    /// The column.
    pub column: String,
    /// Values it is set to.
    pub values: Vec<f64>,
    /// The words behind the values, for a column of words.
    pub words: Option<Vec<String>>,
    /// Mean probabilities of the classes over the rows, for each value.
    pub probabilities: Vec<Vec<f64>>,
}

/// Sets a column to one value after another in all rows and averages the probabilities (Friedman 2001). Values are `points`
/// quantiles of the column, or all its words.
///
/// # Errors
/// When a prediction fails.
pub fn partial_dependence(
    classifier: &TabPfnClassifier,
    rows: &Matrix,
    column: usize,
    points: usize,
    cx: &Context,
) -> Result<PartialDependence> {
    let known = &classifier.encoder().columns[column];
    let values = match &known.words {
        Some(words) => (0..words.len()).map(|word| word as f64).collect(),
        None => quantiles(rows.column(column), points),
    };
    let classes = classifier.classes().len();
    // All values in one prediction: a copy of the rows for each.
    let mut copies = Vec::with_capacity(values.len() * rows.values.len());
    for &value in &values {
        let mut copy = rows.clone();
        copy.values.iter_mut().skip(column).step_by(rows.columns).for_each(|x| *x = value);
        copies.extend(copy.values);
    }
    let copies = Matrix::new(values.len() * rows.rows, rows.columns, copies);
    let probabilities = classifier.predict_proba(&copies, cx)?;
    let mean = |copy: &[f64]| -> Vec<f64> {
        let of_class =
            |class: usize| copy.iter().skip(class).step_by(classes).sum::<f64>() / rows.rows as f64;
        (0..classes).map(of_class).collect()
    };
    Ok(PartialDependence {
        column: known.name.clone(),
        probabilities: probabilities.values.chunks(rows.rows * classes).map(mean).collect(),
        words: known.words.clone(),
        values,
    })
}

/// Distinct values at even places of the sorted column.
fn quantiles(mut column: Vec<f64>, points: usize) -> Vec<f64> {
    column.retain(|x| !x.is_nan());
    column.sort_by(f64::total_cmp);
    if column.is_empty() {
        return Vec::new();
    }
    let place = |point: usize| point * (column.len() - 1) / (points - 1).max(1);
    let mut values: Vec<f64> = (0..points).map(|point| column[place(point)]).collect();
    values.dedup();
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_reach_from_the_least_to_the_largest_without_repeats() {
        let column = vec![3.0, f64::NAN, 1.0, 2.0, 2.0, 2.0, 9.0];
        assert_eq!(quantiles(column, 5), [1.0, 2.0, 9.0]);
        assert_eq!(quantiles((0..100).map(f64::from).collect(), 4), [0.0, 33.0, 66.0, 99.0]);
        assert!(quantiles(vec![f64::NAN], 4).is_empty());
    }
}
