//! Calibration in context: how far the network's probabilities are to be trusted is learned from the labelled rows alone,
//! which predict each other in folds. The network stays as it is.
//!
//! Temperature and vector scaling (Guo, Pleiss, Sun and Weinberger, "On Calibration of Modern Neural Networks", ICML 2017,
//! §4.2) of the logarithms of the probabilities `p`:
//!
//! ```text
//! q_c ∝ exp(a ln p_c + b_c)
//! ```
//!
//! with one sharpness `a` (the temperature's inverse), and for vector scaling one bias `b_c` for each class.

use clap::ValueEnum;
use faer::Mat;
use faer::linalg::solvers::Solve;
use kiln_data::Matrix;
use rand::Rng;
use rand::seq::SliceRandom;
use serde::{Deserialize, Serialize};

use crate::ensemble::softmax;

/// Parts of the labelled rows, each of which the others predict.
pub const FOLDS: usize = 3;
/// Fewest classes for which it pays, and fewest rows of the rarest one.
const FEWEST_CLASSES: usize = 5;
const FEWEST_ROWS: usize = 5;
/// Probabilities are not taken for smaller than this in a logarithm.
const LEAST: f64 = 1e-15;
/// Weight of the squared distance from "nothing changes" beside the sum of losses: that of about one row. It keeps the
/// sharpness finite where every held-out row is right, and biases small where a class has few rows.
const RIDGE: f64 = 1.0;
/// A smaller sharpness would say that the network knows nothing, one below 0 that it knows the opposite.
const LEAST_SHARPNESS: f64 = 0.05;
const NEWTON_STEPS: usize = 50;

/// Whether and how probabilities are calibrated.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Calibrate {
    /// As `vector`, for five and more classes of which each has five rows at least
    #[default]
    Auto,
    /// Not at all: the paper's ensemble
    Off,
    /// One sharpness for all classes, which changes no prediction
    Temperature,
    /// A sharpness, and a bias for each class
    Vector,
}

/// What is fitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// The sharpness alone.
    Temperature,
    /// Sharpness and biases.
    Vector,
}

impl Calibrate {
    /// Whether old classifiers were calibrated.
    pub(crate) fn off() -> Self {
        Self::Off
    }

    /// What to fit for rows of these classes, if anything.
    pub fn form(self, labels: &[usize], classes: usize) -> Option<Form> {
        let rarest =
            || (0..classes).map(|class| labels.iter().filter(|&&label| label == class).count()).min();
        match self {
            Self::Off => None,
            Self::Temperature => Some(Form::Temperature),
            Self::Vector => Some(Form::Vector),
            Self::Auto => {
                (classes >= FEWEST_CLASSES && rarest() >= Some(FEWEST_ROWS)).then_some(Form::Vector)
            }
        }
    }
}

/// The fold of each row, so that each has its share of every class. A row that is the only one of its class is in none, as
/// nothing could predict it.
pub fn folds(labels: &[usize], classes: usize, rng: &mut impl Rng) -> Vec<Option<usize>> {
    let mut folds = vec![None; labels.len()];
    let mut next = 0;
    for class in 0..classes {
        let mut rows: Vec<usize> = (0..labels.len()).filter(|&row| labels[row] == class).collect();
        if rows.len() < 2 {
            continue;
        }
        rows.shuffle(rng);
        for row in rows {
            folds[row] = Some(next % FOLDS);
            next += 1;
        }
    }
    folds
}

/// A sharpness and biases.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Calibration {
    /// `a`: above 1 where the network is less confident than it is right, below 1 where it is more.
    pub sharpness: f64,
    /// `b`, for each class.
    pub bias: Vec<f64>,
}

impl Calibration {
    /// The sharpness and biases with the least log-loss over rows that were not learned from, by Newton's method: the loss is
    /// convex in both.
    ///
    /// # Shapes
    /// - probabilities: `[rows, classes]`, of which `labels` are the right ones
    pub fn fit(form: Form, probabilities: &Matrix, labels: &[usize]) -> Self {
        let classes = probabilities.columns;
        let mut found = Self { sharpness: 1.0, bias: vec![0.0; classes] };
        let mut loss = found.loss(probabilities, labels);
        for _ in 0..NEWTON_STEPS {
            let step = found.newton_step(form, probabilities, labels);
            // Far from the minimum a whole step may lead too far.
            let shorter = (0..20).map(|halvings| found.moved(&step, 0.5f64.powi(halvings)));
            let better =
                shorter.map(|next| (next.loss(probabilities, labels), next)).find(|(l, _)| *l < loss);
            let Some((lower, next)) = better else { break };
            let gained = loss - lower;
            (loss, found) = (lower, next);
            if gained < 1e-9 * loss {
                break;
            }
        }
        found.sharpness = found.sharpness.max(LEAST_SHARPNESS);
        found
    }

    /// Whether it was made for so many classes, of finite numbers.
    pub(crate) fn fits(&self, classes: usize) -> bool {
        let finite = self.sharpness.is_finite() && self.bias.iter().all(|bias| bias.is_finite());
        self.sharpness > 0.0 && finite && self.bias.len() == classes
    }

    /// Calibrates probabilities `[rows, classes]`.
    pub fn apply(&self, probabilities: &mut Matrix) {
        for row in probabilities.values.chunks_exact_mut(self.bias.len()) {
            self.apply_row(row);
        }
    }

    fn apply_row(&self, row: &mut [f64]) {
        for (p, bias) in row.iter_mut().zip(&self.bias) {
            *p = self.sharpness * p.max(LEAST).ln() + bias;
        }
        softmax(row);
    }

    /// The sum of the rows' losses, and the ridge.
    fn loss(&self, probabilities: &Matrix, labels: &[usize]) -> f64 {
        let row_loss = |(row, &label): (usize, &usize)| {
            let mut q = probabilities.row(row).to_vec();
            self.apply_row(&mut q);
            -q[label].max(f64::MIN_POSITIVE).ln()
        };
        let squares = (self.sharpness - 1.0).powi(2) + self.bias.iter().map(|b| b * b).sum::<f64>();
        labels.iter().enumerate().map(row_loss).sum::<f64>() + 0.5 * RIDGE * squares
    }

    /// The gradient, multiplied by the inverse of the second derivatives: sharpness first, then the biases.
    fn newton_step(&self, form: Form, probabilities: &Matrix, labels: &[usize]) -> Vec<f64> {
        let classes = self.bias.len();
        let size = if form == Form::Vector { 1 + classes } else { 1 };
        let mut gradient = Mat::<f64>::zeros(size, 1);
        let mut curvature = Mat::<f64>::zeros(size, size);
        for (row, &label) in labels.iter().enumerate() {
            let logs: Vec<f64> = probabilities.row(row).iter().map(|p| p.max(LEAST).ln()).collect();
            let mut q = probabilities.row(row).to_vec();
            self.apply_row(&mut q);
            let mean: f64 = q.iter().zip(&logs).map(|(q, l)| q * l).sum();
            gradient[(0, 0)] += mean - logs[label];
            curvature[(0, 0)] += q.iter().zip(&logs).map(|(q, l)| q * (l - mean).powi(2)).sum::<f64>();
            for (i, class) in (1..size).enumerate() {
                gradient[(class, 0)] += q[i] - f64::from(u8::from(i == label));
                curvature[(0, class)] += q[i] * (logs[i] - mean);
                curvature[(class, class)] += q[i];
                for (j, other) in (1..size).enumerate() {
                    curvature[(class, other)] -= q[i] * q[j];
                }
            }
        }
        for at in 0..size {
            let parameter = if at == 0 { self.sharpness - 1.0 } else { self.bias[at - 1] };
            gradient[(at, 0)] += RIDGE * parameter;
            curvature[(at, at)] += RIDGE;
            curvature[(at, 0)] = curvature[(0, at)];
        }
        let step = curvature.partial_piv_lu().solve(&gradient);
        (0..size).map(|at| step[(at, 0)]).collect()
    }

    fn moved(&self, step: &[f64], share: f64) -> Self {
        let mut next = self.clone();
        next.sharpness -= share * step[0];
        next.bias.iter_mut().zip(&step[1..]).for_each(|(bias, step)| *bias -= share * step);
        next
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::{log_loss, most_probable};
    use kiln_core::random_stream;
    use rand::RngExt;

    /// Probabilities of four classes, and labels drawn from what calibrating them with `truth` gives.
    fn drawn(rows: usize, truth: &Calibration) -> (Matrix, Vec<usize>) {
        let rng = &mut random_stream(0, "calibration", 0);
        let mut values: Vec<f64> = (0..4 * rows).map(|_| 2.0 * rng.random::<f64>()).collect();
        values.chunks_exact_mut(4).for_each(softmax);
        let said = Matrix::new(rows, 4, values);
        let mut right = said.clone();
        truth.apply(&mut right);
        let draw = |row: usize| {
            let mut left: f64 = rng.random();
            right
                .row(row)
                .iter()
                .position(|p| {
                    left -= p;
                    left < 0.0
                })
                .unwrap_or(3)
        };
        let labels = (0..rows).map(draw).collect();
        (said, labels)
    }

    #[test]
    fn sharpness_and_biases_that_labels_were_drawn_with_are_found_again() {
        let truth = Calibration { sharpness: 2.5, bias: vec![0.5, -0.5, 0.2, -0.2] };
        let (said, labels) = drawn(20_000, &truth);
        let found = Calibration::fit(Form::Vector, &said, &labels);
        assert!((found.sharpness - 2.5).abs() < 0.1, "{found:?}");
        assert!(found.bias.iter().zip(&truth.bias).all(|(a, b)| (a - b).abs() < 0.1), "{found:?}");
    }

    #[test]
    fn the_loss_is_least_where_the_fit_says() {
        let (said, labels) = drawn(200, &Calibration { sharpness: 0.4, bias: vec![0.3, 0.0, 0.0, -0.3] });
        let found = Calibration::fit(Form::Vector, &said, &labels);
        let least = found.loss(&said, &labels);
        for parameter in 0..5 {
            for by in [-1e-3, 1e-3] {
                let mut step = [0.0; 5];
                step[parameter] = by;
                assert!(found.moved(&step, 1.0).loss(&said, &labels) > least, "{parameter} {by}");
            }
        }
    }

    #[test]
    fn a_temperature_improves_the_loss_and_changes_no_prediction() {
        let (said, labels) = drawn(500, &Calibration { sharpness: 3.0, bias: vec![0.0; 4] });
        let found = Calibration::fit(Form::Temperature, &said, &labels);
        assert_eq!(found.bias, [0.0; 4]);
        let mut calibrated = said.clone();
        found.apply(&mut calibrated);
        assert_eq!(most_probable(&calibrated), most_probable(&said));
        assert!(log_loss(&calibrated, &labels) < log_loss(&said, &labels));
    }

    #[test]
    fn rows_that_are_all_right_or_all_wrong_leave_numbers_finite_and_their_order_as_it_was() {
        let said = Matrix::new(6, 2, [[1.0, 0.0], [0.0, 1.0]].concat().repeat(3));
        for labels in [[0, 1, 0, 1, 0, 1], [1, 0, 1, 0, 1, 0]] {
            let found = Calibration::fit(Form::Vector, &said, &labels);
            let mut calibrated = said.clone();
            found.apply(&mut calibrated);
            assert!(found.sharpness >= LEAST_SHARPNESS && calibrated.values.iter().all(|p| p.is_finite()));
            assert!(calibrated.at(0, 0) > calibrated.at(1, 0), "{found:?}");
        }
    }

    #[test]
    fn every_fold_has_its_share_of_a_class_and_a_lone_row_is_never_held_out() {
        let labels: Vec<usize> = (0..61).map(|row| if row == 60 { 2 } else { row % 2 }).collect();
        let folds = folds(&labels, 3, &mut random_stream(0, "folds", 0));
        assert_eq!(folds[60], None);
        for fold in 0..FOLDS {
            for class in 0..2 {
                let of = |row: &usize| folds[*row] == Some(fold) && labels[*row] == class;
                assert_eq!((0..60).filter(of).count(), 10);
            }
        }
    }

    #[test]
    fn few_classes_and_rare_ones_are_left_alone_unless_one_asks() {
        let labels =
            |classes: usize, each: usize| (0..classes * each).map(|row| row % classes).collect::<Vec<_>>();
        assert_eq!(Calibrate::Auto.form(&labels(2, 50), 2), None);
        assert_eq!(Calibrate::Auto.form(&labels(5, 4), 5), None);
        assert_eq!(Calibrate::Auto.form(&labels(5, 5), 5), Some(Form::Vector));
        assert_eq!(Calibrate::Temperature.form(&labels(2, 3), 2), Some(Form::Temperature));
        assert_eq!(Calibrate::Off.form(&labels(9, 50), 9), None);
    }
}
