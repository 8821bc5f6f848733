//! Recordings with planted motifs: groups of neurons that are driven together in some animals for some time.

use kiln_core::{Error, Result};
use rand::Rng;
use rand::seq::SliceRandom;
use rand_distr::{Distribution, StandardNormal};
use serde::Serialize;

use super::smooth_noise;
use crate::traces::Recording;

/// The drive of a community is `tanh` of this times a smooth signal of unit variance.
const GAIN: f64 = 1.5;
/// Frames over which the drive of a community varies.
const DRIVE_FRAMES: f64 = 3.0;
/// Size of what every neuron does on its own, and the frames over which it varies.
const BACKGROUND: f64 = 1.2;
const BACKGROUND_FRAMES: f64 = 8.0;
/// Size of the noise of the measurement.
const WHITE: f64 = 0.1;
/// Driven communities of a motif; the other neurons are its undriven group.
const DRIVEN: usize = 2;

/// What is simulated.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SimulateConfig {
    /// W.
    pub animals: usize,
    /// N.
    pub neurons: usize,
    /// T.
    pub frames: usize,
    /// Planted motifs.
    pub motifs: usize,
    /// Samples a second.
    pub rate: f64,
}

/// Simulated recordings with what was planted.
#[derive(Debug, Clone)]
pub struct Planted {
    /// One an animal.
    pub recordings: Vec<Recording>,
    /// The truth.
    pub motifs: Vec<PlantedMotif>,
}

/// A planted motif.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PlantedMotif {
    /// First frame.
    pub start: usize,
    /// One past the last frame.
    pub end: usize,
    /// Animals in which it occurs.
    pub animals: Vec<usize>,
    /// Group of every neuron: 0 and 1 are driven, 2 is not.
    pub groups: Vec<usize>,
}

impl SimulateConfig {
    /// Six animals, 36 neurons, 240 frames, three motifs: the reference experiment.
    pub fn reference() -> Self {
        Self { animals: 6, neurons: 36, frames: 240, motifs: 3, rate: 2.0 }
    }

    /// Draws recordings.
    ///
    /// # Errors
    /// When a number is too small for motifs to be told apart.
    pub fn draw(&self, rng: &mut impl Rng) -> Result<Planted> {
        let least = [
            ("--animals", self.animals, 1),
            ("--neurons", self.neurons, 9),
            ("--frames", self.frames, 60),
            ("--motifs", self.motifs, 1),
        ];
        if let Some((name, found, least)) = least.into_iter().find(|&(_, found, least)| found < least) {
            return Err(
                Error::usage(format!("{name} {found} is too few")).hint(format!("give at least {least}"))
            );
        }
        let motifs: Vec<PlantedMotif> = (0..self.motifs).map(|m| self.plant(m, rng)).collect();
        let recordings = (0..self.animals).map(|w| self.record(w, &motifs, rng)).collect();
        Ok(Planted { recordings, motifs })
    }

    /// Motifs follow each other with a little overlap, and each is absent from another third of the animals.
    fn plant(&self, m: usize, rng: &mut impl Rng) -> PlantedMotif {
        let third = 3.0 / self.motifs as f64;
        let at = |part: f64| ((part * self.frames as f64).round() as usize).min(self.frames);
        let begin = 0.04 + 0.31 * third * m as f64;
        let present = |w: &usize| self.animals < 3 || 3 * w / self.animals != (m + 2) % 3;
        let mut order: Vec<usize> = (0..self.neurons).collect();
        order.shuffle(rng);
        let mut groups = vec![DRIVEN; self.neurons];
        for (place, neuron) in order.into_iter().enumerate() {
            groups[neuron] = (place * (DRIVEN + 1) / self.neurons).min(DRIVEN);
        }
        PlantedMotif {
            start: at(begin),
            end: at(begin + 0.35 * third),
            animals: (0..self.animals).filter(present).collect(),
            groups,
        }
    }

    fn record(&self, w: usize, motifs: &[PlantedMotif], rng: &mut impl Rng) -> Recording {
        let drives: Vec<Option<Vec<Vec<f64>>>> = motifs
            .iter()
            .map(|motif| {
                motif
                    .animals
                    .contains(&w)
                    .then(|| (0..DRIVEN).map(|_| smooth_noise(self.frames, DRIVE_FRAMES, rng)).collect())
            })
            .collect();
        let trace = |neuron: usize, rng: &mut _| -> Vec<f64> {
            let mut trace = smooth_noise(self.frames, BACKGROUND_FRAMES, rng);
            for (t, x) in trace.iter_mut().enumerate() {
                let white: f64 = StandardNormal.sample(rng);
                *x = BACKGROUND * *x + WHITE * white;
                for (motif, drives) in motifs.iter().zip(&drives) {
                    let drive = drives.as_ref().and_then(|drives| drives.get(motif.groups[neuron]));
                    if let (Some(drive), true) = (drive, (motif.start..motif.end).contains(&t)) {
                        *x += (GAIN * drive[t]).tanh();
                    }
                }
            }
            trace
        };
        let traces = (0..self.neurons).map(|neuron| trace(neuron, rng)).collect();
        let digits = self.neurons.to_string().len();
        Recording {
            animal: format!("animal{}", w + 1),
            source: "the simulation".into(),
            neurons: (1..=self.neurons).map(|n| format!("N{n:0digits$}")).collect(),
            time_s: (0..self.frames).map(|t| t as f64 / self.rate).collect(),
            traces,
            behaviours: Vec::new(),
        }
    }
}
