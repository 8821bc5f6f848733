//! A small perceptron in double precision, whose sensitivities can be computed exactly: the check of what is estimated for
//! larger networks.

use kiln_core::{Error, Result};
use rand::{Rng, RngExt};
use rayon::prelude::*;
use serde::Deserialize;

use crate::curvature::{Probing, estimate};
use crate::quantiser::{Calibrator, Rows};

/// Layers `W [out, in]`, `B`, with tanh between them, and labelled examples; the loss is the mean cross-entropy.
#[derive(Debug, Clone, Deserialize)]
pub struct Mlp {
    #[serde(rename = "W")]
    weights: Vec<Vec<Vec<f64>>>,
    #[serde(rename = "B")]
    biases: Vec<Vec<f64>>,
    #[serde(rename = "X")]
    inputs: Vec<Vec<f64>>,
    #[serde(rename = "Y")]
    labels: Vec<usize>,
}

/// A step of a second difference of gradients, relative to the weights' size.
const RELATIVE_STEP: f64 = 1e-4;

impl Mlp {
    /// Makes sure that layers, inputs and labels fit each other; `place` names the file.
    ///
    /// # Errors
    /// Names the first that does not.
    pub fn check(&self, place: &str) -> Result<()> {
        let wrong = |found: String| Error::input(place, found);
        if self.weights.is_empty() || self.weights.len() != self.biases.len() {
            return Err(wrong(format!(
                "has {} matrices W and {} biases B",
                self.weights.len(),
                self.biases.len()
            )));
        }
        let mut width = self.inputs.first().map_or(0, Vec::len);
        if width == 0 || self.inputs.len() != self.labels.len() {
            return Err(wrong(format!(
                "has {} inputs X and {} labels Y",
                self.inputs.len(),
                self.labels.len()
            )));
        }
        if let Some(row) =
            self.inputs.iter().position(|x| x.len() != width || x.iter().any(|x| !x.is_finite()))
        {
            return Err(wrong(format!("row {row} of X is not {width} finite numbers, as the first")));
        }
        for (l, (matrix, bias)) in self.weights.iter().zip(&self.biases).enumerate() {
            let numbers = matrix.iter().flatten().chain(bias);
            if matrix.is_empty() || matrix.len() != bias.len() || matrix.iter().any(|row| row.len() != width)
            {
                return Err(wrong(format!(
                    "W[{l}] is not [{}, {width}], rows as many as B[{l}] has numbers",
                    bias.len()
                )));
            }
            if numbers.into_iter().any(|x| !x.is_finite()) {
                return Err(wrong(format!("W[{l}] or B[{l}] has a number that is not finite")));
            }
            width = matrix.len();
        }
        match self.labels.iter().position(|&label| label >= width) {
            Some(row) => Err(wrong(format!("label {} of row {row} is not below {width}", self.labels[row]))),
            None => Ok(()),
        }
    }

    /// How many layers.
    pub fn layers(&self) -> usize {
        self.weights.len()
    }

    /// The weights of every layer, row after row.
    pub fn flat_weights(&self) -> Vec<Vec<f64>> {
        self.weights.iter().map(|matrix| matrix.concat()).collect()
    }

    /// The mean cross-entropy with other weights.
    pub fn loss(&self, weights: &[Vec<f64>]) -> f64 {
        let of = |(x, &label): (&Vec<f64>, &usize)| {
            let logits = self.activations(weights, x).pop().unwrap_or_default();
            log_sum_exp(&logits) - logits[label]
        };
        self.inputs.iter().zip(&self.labels).map(of).sum::<f64>() / self.inputs.len() as f64
    }

    /// Input, outputs of every layer after its tanh, and logits.
    fn activations(&self, weights: &[Vec<f64>], x: &[f64]) -> Vec<Vec<f64>> {
        let mut all = vec![x.to_vec()];
        for (l, (weights, bias)) in weights.iter().zip(&self.biases).enumerate() {
            let x = &all[l];
            let row = |(row, bias): (&[f64], &f64)| row.iter().zip(x).map(|(w, x)| w * x).sum::<f64>() + bias;
            let mut y: Vec<f64> = weights.chunks(x.len()).zip(bias).map(row).collect();
            if l + 1 < self.weights.len() {
                y.iter_mut().for_each(|y| *y = y.tanh());
            }
            all.push(y);
        }
        all
    }

    /// The gradient of the loss in layer `layer`'s weights.
    fn gradient(&self, weights: &[Vec<f64>], layer: usize) -> Vec<f64> {
        let mut gradient = vec![0.0; weights[layer].len()];
        let share = 1.0 / self.inputs.len() as f64;
        for (x, &label) in self.inputs.iter().zip(&self.labels) {
            let all = self.activations(weights, x);
            let logits = &all[all.len() - 1];
            let total = log_sum_exp(logits);
            let mut d: Vec<f64> = logits.iter().map(|logit| share * (logit - total).exp()).collect();
            d[label] -= share;
            for l in (layer + 1..weights.len()).rev() {
                let x = &all[l];
                let back = |i: usize| {
                    let sum: f64 = d.iter().enumerate().map(|(o, d)| d * weights[l][o * x.len() + i]).sum();
                    sum * (1.0 - x[i] * x[i])
                };
                d = (0..x.len()).map(back).collect();
            }
            let x = &all[layer];
            for (row, d) in gradient.chunks_mut(x.len()).zip(&d) {
                row.iter_mut().zip(x).for_each(|(g, x)| *g += d * x);
            }
        }
        gradient
    }

    /// `H v` of layer `layer`'s block, by a central difference of gradients.
    fn hessian_times(&self, layer: usize, v: &[f64]) -> Vec<f64> {
        let mut weights = self.flat_weights();
        let n = weights[layer].len() as f64;
        let size = weights[layer].iter().map(|w| w * w).sum::<f64>().sqrt() / n.sqrt();
        let step = RELATIVE_STEP * size.max(1e-3);
        let mut at = |sign: f64| {
            let moved: Vec<f64> =
                self.weights[layer].concat().iter().zip(v).map(|(w, v)| w + sign * step * v).collect();
            weights[layer] = moved;
            self.gradient(&weights, layer)
        };
        let (after, before) = (at(1.0), at(-1.0));
        after.iter().zip(&before).map(|(a, b)| (a - b) / (2.0 * step)).collect()
    }

    /// The trace of every layer's block of the Hessian, one column after another.
    pub fn exact_traces(&self) -> Vec<f64> {
        let trace = |layer: usize| {
            let n = self.weights[layer].concat().len();
            let diagonal = (0..n).into_par_iter().map(|at| {
                let mut unit = vec![0.0; n];
                unit[at] = 1.0;
                self.hessian_times(layer, &unit)[at]
            });
            diagonal.collect::<Vec<f64>>().iter().sum()
        };
        (0..self.layers()).map(trace).collect()
    }

    /// The same, estimated from random signs: the mean of `vᵀ H v` (Hutchinson), with signs that are orthogonal among each
    /// other ([`orthogonal_signs`]). `stream` gives the random numbers of a layer and a block of them.
    pub fn estimated_traces<R: Rng>(
        &self,
        probes: usize,
        stream: impl Fn(usize, usize) -> R + Sync,
    ) -> Vec<f64> {
        let trace = |layer: usize| {
            let n = self.weights[layer].concat().len();
            // In double precision a layer at a time, as often as was said.
            let probing = Probing { most: probes, error: 0.0 };
            let found = estimate(1, probing, |_, probe| {
                let v = orthogonal_signs(n, probe, |block| stream(layer, block));
                Ok(vec![self.hessian_times(layer, &v).iter().zip(&v).map(|(h, v)| h * v).sum()])
            });
            found.map_or(0.0, |found| found[0].mean)
        };
        (0..self.layers()).into_par_iter().map(trace).collect()
    }

    /// Every layer's weights, rounded to `bits` with one scale a layer.
    pub fn quantised(&self, bits: u32) -> Vec<Vec<f64>> {
        let weights = self.flat_weights();
        weights.iter().map(|weights| Rows::of(weights, 1, bits, Calibrator::Minmax).values()).collect()
    }

    /// `‖δ_l‖²`, `Δ_l` and `D_ij` at `bits`.
    pub fn perturbations(&self, bits: u32) -> (Vec<f64>, Vec<f64>, Vec<Vec<f64>>) {
        let (weights, quantised) = (self.flat_weights(), self.quantised(bits));
        let squares = |(w, q): (&Vec<f64>, &Vec<f64>)| w.iter().zip(q).map(|(w, q)| (q - w).powi(2)).sum();
        let noise = weights.iter().zip(&quantised).map(squares).collect();
        let loss_with = |chosen: &[usize]| {
            let mut weights = weights.clone();
            chosen.iter().for_each(|&l| weights[l].clone_from(&quantised[l]));
            self.loss(&weights)
        };
        let (loss, layers) = (self.loss(&weights), self.layers());
        let single: Vec<f64> = (0..layers).map(|l| loss_with(&[l]) - loss).collect();
        let pair = |i: usize, j: usize| match i == j {
            true => 0.0,
            false => loss_with(&[i, j]) - loss - single[i] - single[j],
        };
        let pairs = (0..layers).map(|i| (0..layers).map(|j| pair(i, j)).collect()).collect();
        (noise, single, pairs)
    }
}

/// `ln Σ e^x`
pub(crate) fn log_sum_exp(x: &[f64]) -> f64 {
    let most = x.iter().fold(f64::NEG_INFINITY, |most, &x| most.max(x));
    most + x.iter().map(|x| (x - most).exp()).sum::<f64>().ln()
}

/// The signs of a probe, 1 or -1: a row of Walsh's matrix `(-1)^(row & column)` of `n`, rounded up to a power of two, whose
/// columns are turned at random, by the same draw for as many probes as it has rows.
///
/// Each alone is as good as independent signs, so that the mean of `vᵀ H v` is the trace. But the `v vᵀ` of a whole block
/// sum up to a multiple of the identity: what the entries beside the diagonal add to one probe, they take from others.
pub(crate) fn orthogonal_signs<R: Rng>(n: usize, probe: usize, stream: impl Fn(usize) -> R) -> Vec<f64> {
    let block = n.next_power_of_two();
    let (mut rng, row) = (stream(probe / block), probe % block);
    let sign = |odd: bool| if odd { -1.0 } else { 1.0 };
    (0..n).map(|column| sign(rng.random::<bool>() != ((row & column).count_ones() % 2 == 1))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_of_signs_is_orthogonal_and_other_blocks_differ() {
        let stream = |block| kiln_core::random_stream(0, "signs", block as u64);
        for n in [1usize, 2, 5, 12] {
            let block = n.next_power_of_two();
            let all: Vec<Vec<f64>> = (0..block).map(|probe| orthogonal_signs(n, probe, stream)).collect();
            for i in 0..n {
                for j in 0..n {
                    let sum: f64 = all.iter().map(|v| v[i] * v[j]).sum();
                    assert_eq!(sum, if i == j { block as f64 } else { 0.0 }, "{n}: {i}, {j}");
                }
            }
        }
        assert_ne!(orthogonal_signs(12, 3, stream), orthogonal_signs(12, 19, stream));
    }
}
