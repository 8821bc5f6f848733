//! Data with a known answer.

mod coupled;
mod lfr;
mod motifs;

use rand::Rng;
use rand_distr::{Distribution, StandardNormal};

pub use coupled::{Coupled, CoupledConfig};
pub use lfr::{LfrConfig, LfrGraph};
pub use motifs::{Planted, PlantedMotif, SimulateConfig};

/// White noise smoothed with a Gaussian of `sigma` frames and scaled to a standard deviation of 1.
fn smooth_noise(frames: usize, sigma: f64, rng: &mut impl Rng) -> Vec<f64> {
    let margin = (4.0 * sigma).ceil() as usize;
    let white: Vec<f64> = (0..frames + 2 * margin).map(|_| StandardNormal.sample(rng)).collect();
    let weights: Vec<f64> =
        (0..=2 * margin).map(|k| (-0.5 * ((k as f64 - margin as f64) / sigma).powi(2)).exp()).collect();
    let scale = weights.iter().map(|w| w * w).sum::<f64>().sqrt().recip();
    let at = |t: usize| white[t..].iter().zip(&weights).map(|(x, w)| x * w).sum::<f64>() * scale;
    (0..frames).map(at).collect()
}
