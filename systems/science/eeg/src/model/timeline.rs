//! How steps of time become predictions where layers follow one another.

use super::{FinalConv, receptive_of, steps_of};

/// Kernels and strides over time of a network's layers, of which the last is its classifier.
pub(super) struct Timeline {
    layers: Vec<(usize, usize)>,
    dense: bool,
}

impl Timeline {
    /// Of a classifier behind `features`, for windows of so many samples.
    pub fn new(features: &[(usize, usize)], classifier: FinalConv, samples: usize, dense: bool) -> Self {
        let steps = classifier.steps(steps_of(samples, features.iter().copied()).max(1));
        Self { layers: features.iter().copied().chain([(steps, 1)]).collect(), dense }
    }

    /// Steps of the classifier.
    pub fn final_steps(&self) -> usize {
        self.layers.last().map_or(1, |layer| layer.0)
    }

    /// Samples that a prediction sees.
    pub fn receptive(&self) -> usize {
        receptive_of(self.layers.iter().copied())
    }

    /// Predictions of so many samples.
    pub fn predictions(&self, samples: usize) -> usize {
        match self.dense {
            true => (samples + 1).saturating_sub(self.receptive()),
            false => steps_of(samples, self.layers.iter().copied()),
        }
    }
}
