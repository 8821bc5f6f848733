//! What the validation loss of a run says of its learning rate and of its end.

use serde::{Deserialize, Serialize};

/// A learning rate that falls whenever the validation loss no longer does.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Plateau {
    /// By what it is multiplied.
    pub factor: f64,
    /// Evaluations without a lower loss before that.
    pub patience: usize,
    /// How far it falls at most.
    pub least: f64,
}

/// What has come of the validation losses so far; a function of them alone, so that a resumed run finds it in its log.
#[derive(Debug, Clone, Default)]
pub(crate) struct Course {
    /// The last loss that was better by enough, and evaluations since then.
    reference: Option<f64>,
    pub stale: usize,
    /// The lowest loss, evaluations since then or since the last reduction, and reductions.
    lowest: Option<f64>,
    flat: usize,
    reductions: i32,
}

impl Course {
    /// Takes a validation loss in; one is better where it lies lower by this share.
    pub fn see(&mut self, loss: f64, least: f64, plateau: Option<&Plateau>) {
        if self.reference.is_none_or(|reference| loss < reference - least * reference.abs()) {
            (self.reference, self.stale) = (Some(loss), 0);
        } else {
            self.stale += 1;
        }
        if self.lowest.is_none_or(|lowest| loss < lowest) {
            (self.lowest, self.flat) = (Some(loss), 0);
        } else {
            self.flat += 1;
        }
        if plateau.is_some_and(|plateau| self.flat > plateau.patience) {
            self.flat = 0;
            self.reductions += 1;
        }
    }

    /// The learning rate that the schedule has as `lr`.
    pub fn reduced(&self, lr: f64, plateau: Option<&Plateau>) -> f64 {
        match plateau {
            Some(plateau) => (lr * plateau.factor.powi(self.reductions)).max(plateau.least.min(lr)),
            None => lr,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_falls_on_plateaus_and_no_further_than_to_its_least() {
        let plateau = Plateau { factor: 0.1, patience: 1, least: 0.005 };
        let mut course = Course::default();
        let mut rates = Vec::new();
        for loss in [1.0, 1.0, 1.0, 1.0, 1.0, 0.5, 0.6, 0.7] {
            course.see(loss, 0.0, Some(&plateau));
            rates.push(course.reduced(1.0, Some(&plateau)));
        }
        let expected = [1.0, 1.0, 0.1, 0.1, 0.01, 0.01, 0.01, 0.005];
        assert!(rates.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-12), "{rates:?}");
    }

    #[test]
    fn small_gains_do_not_count_one_by_one_but_together() {
        let mut course = Course::default();
        let stale = [1.0, 0.998, 0.996, 0.994, 0.99].map(|loss| {
            course.see(loss, 0.005, None);
            course.stale
        });
        assert_eq!(stale, [0, 1, 2, 0, 1]);
    }
}
