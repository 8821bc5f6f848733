//! How good predicted probabilities are. Probabilities are a matrix `[rows, classes]`, labels are numbers of classes.

use kiln_data::Matrix;
use serde::Serialize;

/// Probabilities are not taken for smaller than this in a logarithm.
const LEAST: f64 = 1e-15;
/// Bins of the reliability curve.
const BINS: usize = 10;

/// The most probable class of each row; of equals, the first.
pub fn most_probable(probabilities: &Matrix) -> Vec<usize> {
    let largest = |row: usize| {
        let row = probabilities.row(row);
        (0..row.len()).fold(0, |best, class| if row[class] > row[best] { class } else { best })
    };
    (0..probabilities.rows).map(largest).collect()
}

/// The share of rows whose most probable class is the right one.
pub fn accuracy(probabilities: &Matrix, labels: &[usize]) -> f64 {
    let right =
        most_probable(probabilities).iter().zip(labels).filter(|(found, label)| found == label).count();
    right as f64 / labels.len() as f64
}

/// The mean of -ln(probability of the right class).
pub fn log_loss(probabilities: &Matrix, labels: &[usize]) -> f64 {
    let loss = |(row, &label): (usize, &usize)| -probabilities.at(row, label).max(LEAST).ln();
    labels.iter().enumerate().map(loss).sum::<f64>() / labels.len() as f64
}

/// The area under the receiver operating characteristic, one class against one: the mean over all pairs of classes that
/// occur of the mean of both directions (Hand and Till 2001; scikit-learn's `multi_class="ovo"`). For two classes it is the
/// ordinary area. NaN where fewer than two classes occur.
pub fn roc_auc(probabilities: &Matrix, labels: &[usize]) -> f64 {
    let rows_of: Vec<Vec<usize>> = (0..probabilities.columns)
        .map(|class| (0..labels.len()).filter(|&row| labels[row] == class).collect())
        .collect();
    let (mut sum, mut pairs) = (0.0, 0.0);
    for a in 0..rows_of.len() {
        for b in a + 1..rows_of.len() {
            if rows_of[a].is_empty() || rows_of[b].is_empty() {
                continue;
            }
            let towards = |class: usize, other: usize| {
                let rows = [class, other].into_iter().flat_map(|of| &rows_of[of]);
                let scores = rows.map(|&row| (labels[row] == class, probabilities.at(row, class)));
                kiln_data::roc_auc(scores).unwrap_or(f64::NAN)
            };
            sum += 0.5 * (towards(a, b) + towards(b, a));
            pairs += 1.0;
        }
    }
    sum / pairs
}

/// The rows whose largest probability lies in one tenth of the scale.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ReliabilityBin {
    /// How many rows.
    pub rows: usize,
    /// Mean of their largest probabilities.
    pub confidence: f64,
    /// Share of them that are right.
    pub accuracy: f64,
}

/// How confident and how right predictions are, in ten bins of confidence; empty bins are left out.
pub fn reliability(probabilities: &Matrix, labels: &[usize]) -> Vec<ReliabilityBin> {
    let mut bins = vec![(0usize, 0.0, 0usize); BINS];
    for ((row, class), &label) in most_probable(probabilities).into_iter().enumerate().zip(labels) {
        let confidence = probabilities.at(row, class);
        let bin = &mut bins[((confidence * BINS as f64) as usize).min(BINS - 1)];
        bin.0 += 1;
        bin.1 += confidence;
        bin.2 += usize::from(class == label);
    }
    let full = bins.into_iter().filter(|bin| bin.0 > 0);
    full.map(|(rows, confidence, right)| ReliabilityBin {
        rows,
        confidence: confidence / rows as f64,
        accuracy: right as f64 / rows as f64,
    })
    .collect()
}

/// The expected calibration error: how far confidence and accuracy are apart, on average over the rows.
pub fn calibration_error(bins: &[ReliabilityBin]) -> f64 {
    let rows: usize = bins.iter().map(|bin| bin.rows).sum();
    bins.iter().map(|bin| bin.rows as f64 * (bin.confidence - bin.accuracy).abs()).sum::<f64>() / rows as f64
}

/// All figures of one prediction.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Scores {
    /// Share of rows that are right.
    pub accuracy: f64,
    /// Area under the curve, one class against one.
    pub roc_auc: f64,
    /// Mean negative logarithm of the right class's probability, in nats.
    pub log_loss: f64,
    /// Expected calibration error.
    pub calibration_error: f64,
}

impl Scores {
    /// Measures a prediction.
    pub fn new(probabilities: &Matrix, labels: &[usize]) -> Self {
        Self {
            accuracy: accuracy(probabilities, labels),
            roc_auc: roc_auc(probabilities, labels),
            log_loss: log_loss(probabilities, labels),
            calibration_error: calibration_error(&reliability(probabilities, labels)),
        }
    }

    /// The mean of several measurements. Areas that are not defined do not count.
    pub fn mean(scores: &[Self]) -> Self {
        let mean = |figure: fn(&Self) -> f64| {
            let defined: Vec<f64> = scores.iter().map(figure).filter(|x| !x.is_nan()).collect();
            defined.iter().sum::<f64>() / defined.len() as f64
        };
        Self {
            accuracy: mean(|s| s.accuracy),
            roc_auc: mean(|s| s.roc_auc),
            log_loss: mean(|s| s.log_loss),
            calibration_error: mean(|s| s.calibration_error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn assert_near(found: f64, expected: f64) {
        assert!((found - expected).abs() < 1e-12, "{found}, should be {expected}");
    }

    #[test]
    fn two_classes_give_the_share_of_pairs_in_the_right_order() {
        // Positive scores 0.4 and 0.8 against 0.1, 0.4 and 0.6: 1 + 1/2 + 0 and 3 of 6 pairs.
        let p = [0.4, 0.8, 0.1, 0.4, 0.6];
        let probabilities = Matrix::new(5, 2, p.iter().flat_map(|&p| [1.0 - p, p]).collect());
        assert_near(roc_auc(&probabilities, &[1, 1, 0, 0, 0]), 4.5 / 6.0);
    }

    #[test]
    fn several_classes_give_what_scikit_learn_gives() {
        // roc_auc_score(y, p, multi_class="ovo") worked by hand: pairs (0,1), (0,2), (1,2).
        let p = vec![0.6, 0.3, 0.1, 0.2, 0.5, 0.3, 0.3, 0.3, 0.4, 0.5, 0.4, 0.1];
        let labels = [0, 1, 2, 1];
        // (0,1): towards 0 {0.6} > {0.2, 0.5} = 1; towards 1 {0.5, 0.4} > {0.3} = 1.
        // (0,2): towards 0 1; towards 2 1. (1,2): towards 1 {0.5, 0.4} > {0.3} = 1; towards 2 {0.4} > {0.3, 0.1} = 1.
        let probabilities = Matrix::new(4, 3, p);
        assert_near(roc_auc(&probabilities, &labels), 1.0);
        // With rows 1 and 2 labelled the other way round:
        // (0,1): towards 0 1; towards 1 {0.3, 0.4} against {0.3} = 0.75. (0,2): 1 and 1. (1,2): towards 1 {0.3, 0.4}
        // against {0.5} = 0; towards 2 {0.3} against {0.4, 0.1} = 0.5.
        assert_near(roc_auc(&probabilities, &[0, 2, 1, 1]), (0.875 + 1.0 + 0.25) / 3.0);
        assert!(roc_auc(&probabilities, &[1, 1, 1, 1]).is_nan());
    }

    #[test]
    fn loss_and_accuracy_are_those_of_the_right_class() {
        let probabilities = Matrix::new(2, 2, vec![0.75, 0.25, 0.5, 0.5]);
        assert_near(accuracy(&probabilities, &[0, 1]), 0.5);
        assert_near(log_loss(&probabilities, &[0, 1]), -0.5 * (0.75f64.ln() + 0.5f64.ln()));
        assert!(log_loss(&Matrix::new(1, 2, vec![1.0, 0.0]), &[1]).is_finite());
    }

    #[test]
    fn calibration_error_is_the_distance_of_confidence_and_accuracy() {
        let probabilities = Matrix::new(4, 2, vec![0.92, 0.08, 0.94, 0.06, 0.6, 0.4, 0.6, 0.4]);
        let bins = reliability(&probabilities, &[0, 0, 0, 1]);
        assert_eq!(bins.iter().map(|bin| (bin.rows, bin.accuracy)).collect::<Vec<_>>(), [(2, 0.5), (2, 1.0)]);
        assert_near(calibration_error(&bins), 0.5 * 0.1 + 0.5 * 0.07);
    }
}
