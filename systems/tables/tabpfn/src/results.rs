//! Outcomes over tables, summed up and as listings and plots.

use kiln_core::{Plot, Table as Listing};
use serde::Serialize;

use crate::evaluate::{Outcome, ranks};

/// A table and what every method came to on it.
#[derive(Debug, Clone, Serialize)]
pub struct TableOutcome {
    /// What the table is called.
    pub name: String,
    /// Its rows.
    pub rows: usize,
    /// Its columns.
    pub columns: usize,
    /// Its classes.
    pub classes: usize,
    /// The same methods for every table.
    pub outcomes: Vec<Outcome>,
}

/// A method over all tables.
#[derive(Serialize)]
pub struct Summary {
    /// Whose.
    pub method: String,
    /// Mean area under the curve.
    pub mean_auc: f64,
    /// Mean accuracy.
    pub mean_accuracy: f64,
    /// Mean negative log-likelihood of a row, in nats.
    pub mean_log_loss: f64,
    /// Mean expected calibration error.
    pub mean_calibration_error: f64,
    /// Mean rank by area among the methods, 1 the best.
    pub mean_rank: f64,
    /// Tables on which no other method has a larger area.
    pub wins: usize,
    /// Mean time for a split of a table, in seconds.
    pub mean_seconds: f64,
}

/// Every method over all tables.
pub fn summaries(results: &[TableOutcome]) -> Vec<Summary> {
    let methods = results.first().map_or(0, |result| result.outcomes.len());
    let ranks: Vec<Vec<f64>> = results
        .iter()
        .map(|result| ranks(&result.outcomes.iter().map(|o| o.mean.roc_auc).collect::<Vec<_>>()))
        .collect();
    let summary = |method: usize| {
        let mean = |figure: &dyn Fn(&Outcome) -> f64| {
            results.iter().map(|r| figure(&r.outcomes[method])).sum::<f64>() / results.len() as f64
        };
        let best = |result: &TableOutcome| {
            let areas = result.outcomes.iter().map(|o| o.mean.roc_auc);
            result.outcomes[method].mean.roc_auc >= areas.fold(f64::NEG_INFINITY, f64::max)
        };
        Summary {
            method: results[0].outcomes[method].method.clone(),
            mean_auc: mean(&|o| o.mean.roc_auc),
            mean_accuracy: mean(&|o| o.mean.accuracy),
            mean_log_loss: mean(&|o| o.mean.log_loss),
            mean_calibration_error: mean(&|o| o.mean.calibration_error),
            mean_rank: ranks.iter().map(|ranks| ranks[method]).sum::<f64>() / results.len() as f64,
            wins: results.iter().filter(|result| best(result)).count(),
            mean_seconds: mean(&|o| o.seconds),
        }
    };
    (0..methods).map(summary).collect()
}

/// One row a method.
pub fn summary_listing(results: &[TableOutcome]) -> Listing {
    let mut listing = Listing::new(
        format!("Means over {} tables", results.len()),
        &[
            "method",
            "ROC AUC",
            "log-loss",
            "accuracy",
            "calibration error",
            "rank by AUC",
            "wins",
            "seconds a table",
        ],
    );
    for summary in summaries(results) {
        listing.row([
            summary.method,
            format!("{:.4}", summary.mean_auc),
            format!("{:.4}", summary.mean_log_loss),
            format!("{:.4}", summary.mean_accuracy),
            format!("{:.4}", summary.mean_calibration_error),
            format!("{:.2}", summary.mean_rank),
            summary.wins.to_string(),
            format!("{:.3}", summary.mean_seconds),
        ]);
    }
    listing
}

/// The areas of all methods, one row a table.
pub fn areas_listing(results: &[TableOutcome]) -> Listing {
    let methods = results.first().map(|result| result.outcomes.iter().map(|o| o.method.as_str()));
    let heads: Vec<&str> =
        ["table", "rows", "columns", "classes"].into_iter().chain(methods.into_iter().flatten()).collect();
    let mut listing = Listing::new("ROC AUC, one class against one", &heads);
    for result in results {
        let areas = result.outcomes.iter().map(|outcome| format!("{:.4}", outcome.mean.roc_auc));
        let extents = [result.rows, result.columns, result.classes].map(|n| n.to_string());
        listing.row([result.name.clone()].into_iter().chain(extents).chain(areas));
    }
    listing
}

/// One row a method, for one table.
pub fn scores_listing(title: &str, outcomes: &[Outcome]) -> Listing {
    let mut listing =
        Listing::new(title, &["method", "accuracy", "ROC AUC", "log-loss", "calibration error", "seconds"]);
    for outcome in outcomes {
        let mean = &outcome.mean;
        listing.row([
            outcome.method.clone(),
            format!("{:.4}", mean.accuracy),
            format!("{:.4}", mean.roc_auc),
            format!("{:.4}", mean.log_loss),
            format!("{:.4}", mean.calibration_error),
            format!("{:.3}", outcome.seconds),
        ]);
    }
    listing
}

/// Curves of confidence against accuracy, and what perfect calibration would be.
pub fn reliability_plot(outcomes: &[Outcome]) -> Plot {
    let plot = Plot::lines("Reliability", "confidence", "accuracy");
    let plot = outcomes.iter().take(5).fold(plot, |plot, outcome| {
        let points = outcome.reliability.iter().map(|bin| (bin.confidence, bin.accuracy));
        plot.series(&outcome.method, points.collect())
    });
    plot.series("perfect", vec![(0.0, 0.0), (1.0, 1.0)])
}
