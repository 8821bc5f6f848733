//! Neurons that drive each other, so that silencing one has a true effect on the others.
//!
//! `x_i(t+1) = (1 − ρ) x_i + ρ tanh(Σ_j W_ij x_j + u_i(t))`, with connections within communities only and smooth input
//! `u` of each neuron's own.

use rand::{Rng, RngExt};

use super::smooth_noise;
use crate::traces::Recording;

/// ρ: how fast a neuron follows its input.
const SPEED: f64 = 0.5;
/// Sum of the weights onto a neuron.
const COUPLING: f64 = 1.6;
/// Size of a neuron's own input, and the frames over which it varies.
const INPUT: f64 = 0.6;
const INPUT_FRAMES: f64 = 3.0;

/// What is simulated.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CoupledConfig {
    /// N.
    pub neurons: usize,
    /// Communities of equal size.
    pub communities: usize,
    /// T.
    pub frames: usize,
}

/// A network with its input, which can be run again with a neuron silenced.
#[derive(Debug, Clone)]
pub struct Coupled {
    /// Community of every neuron.
    pub groups: Vec<usize>,
    /// `[N, N]` row by row: onto i from j.
    weights: Vec<f64>,
    /// One series a neuron.
    input: Vec<Vec<f64>>,
}

impl CoupledConfig {
    /// Draws a network and its input.
    pub fn draw(&self, rng: &mut impl Rng) -> Coupled {
        let n = self.neurons;
        let groups: Vec<usize> = (0..n).map(|i| i * self.communities / n).collect();
        let mut weights = vec![0.0; n * n];
        for i in 0..n {
            for j in (0..n).filter(|&j| j != i && groups[j] == groups[i]) {
                weights[i * n + j] = rng.random::<f64>();
            }
            let total: f64 = weights[i * n..(i + 1) * n].iter().sum();
            weights[i * n..(i + 1) * n].iter_mut().for_each(|w| *w *= COUPLING / total.max(1e-9));
        }
        let own = |_| smooth_noise(self.frames, INPUT_FRAMES, rng).into_iter().map(|u| INPUT * u).collect();
        Coupled { groups, weights, input: (0..n).map(own).collect() }
    }
}

impl Coupled {
    /// One series a neuron; a silenced neuron stays at 0.
    pub fn run(&self, silenced: Option<usize>) -> Vec<Vec<f64>> {
        let (n, frames) = (self.groups.len(), self.input[0].len());
        let mut x = vec![0.0; n];
        let mut traces = vec![Vec::with_capacity(frames); n];
        for t in 0..frames {
            let next = |i: usize| {
                if silenced == Some(i) {
                    return 0.0;
                }
                let onto: f64 = self.weights[i * n..(i + 1) * n].iter().zip(&x).map(|(w, x)| w * x).sum();
                (1.0 - SPEED) * x[i] + SPEED * (onto + self.input[i][t]).tanh()
            };
            x = (0..n).map(next).collect();
            traces.iter_mut().zip(&x).for_each(|(trace, x)| trace.push(*x));
        }
        traces
    }

    /// How much silencing a neuron changes each of the others: root mean square over time.
    pub fn effect(&self, silenced: usize) -> Vec<f64> {
        let (before, after) = (self.run(None), self.run(Some(silenced)));
        let change = |(a, b): (&Vec<f64>, &Vec<f64>)| {
            (a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum::<f64>() / a.len() as f64).sqrt()
        };
        before.iter().zip(&after).map(change).collect()
    }

    /// The undisturbed network as a recording with one sample a second.
    pub fn recording(&self) -> Recording {
        let traces = self.run(None);
        Recording {
            animal: "network".into(),
            source: "the simulation".into(),
            neurons: (0..traces.len()).map(|i| format!("N{i:03}")).collect(),
            time_s: (0..traces[0].len()).map(|t| t as f64).collect(),
            traces,
            behaviours: Vec::new(),
        }
    }
}
