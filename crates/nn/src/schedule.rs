//! The learning rate over a run.

use serde::{Deserialize, Serialize};

/// How the learning rate falls after its peak.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Decay {
    /// As half a cosine.
    #[default]
    Cosine,
    /// Along a straight line.
    Linear,
}

/// Linear warm-up to the peak, then down to `min_ratio` of it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    /// Highest learning rate.
    pub peak: f64,
    /// Steps of warm-up; the first step already has `peak / warmup`.
    pub warmup: usize,
    /// Steps of the whole run.
    pub steps: usize,
    /// Final learning rate as a fraction of the peak.
    pub min_ratio: f64,
    /// How it falls.
    pub decay: Decay,
}

impl Schedule {
    /// The learning rate of step `step`, counted from 0. Beyond the end it stays at its minimum.
    pub fn at(&self, step: usize) -> f64 {
        if step < self.warmup {
            return self.peak * (step + 1) as f64 / self.warmup as f64;
        }
        let length = self.steps.saturating_sub(self.warmup).max(1) as f64;
        let progress = ((step - self.warmup) as f64 / length).min(1.0);
        let left = match self.decay {
            Decay::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
            Decay::Linear => 1.0 - progress,
        };
        self.peak * (self.min_ratio + (1.0 - self.min_ratio) * left)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warms_up_linearly_and_falls_as_a_cosine() {
        let schedule = Schedule { peak: 2.0, warmup: 4, steps: 12, min_ratio: 0.1, decay: Decay::Cosine };
        let close = |step, expected: f64| {
            assert!((schedule.at(step) - expected).abs() < 1e-12, "step {step}: {}", schedule.at(step));
        };
        close(0, 0.5);
        close(3, 2.0);
        close(4, 2.0);
        close(8, 2.0 * (0.1 + 0.9 * 0.5)); // half-way
        close(12, 0.2);
        close(100, 0.2);
        let linear = Schedule { decay: Decay::Linear, ..schedule };
        assert!((linear.at(6) - 2.0 * (0.1 + 0.9 * 0.75)).abs() < 1e-12); // a quarter of the way
    }

    #[test]
    fn no_warm_up_starts_at_the_peak() {
        assert_eq!(
            Schedule { peak: 1.0, warmup: 0, steps: 10, min_ratio: 0.0, decay: Decay::Linear }.at(0),
            1.0
        );
    }
}
