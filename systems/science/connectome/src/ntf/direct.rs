//! All factors at once: the gradient of the loss and a quasi-Newton step that does not leave what is allowed.

use std::collections::VecDeque;

use kiln_core::Result;
use kiln_data::Matrix;

use super::loss::Loss;
use super::{Descent, Factors};
use crate::tensor::{AffinityTensor, Element};

/// Steps that the curvature is known from.
const REMEMBERED: usize = 10;
/// Halvings of a step before it is given up.
const HALVINGS: usize = 30;
/// Part of the decrease that the slope promises which a step must bring.
const SUFFICIENT: f64 = 1e-4;

/// Projected L-BFGS over all numbers of the factors (Bertsekas 1982; Liu and Nocedal 1989): those that lie at 0 and would
/// become negative stay, the others take the step that the remembered curvature gives, and what falls below 0 is set to 0.
pub struct Direct<'a, E> {
    tensor: &'a AffinityTensor<E>,
    loss: Loss,
    rank: usize,
    /// The number of neurons, where a pair's factor is the product of those of its neurons.
    tied: Option<usize>,
    /// The factors of time, animals and pairs, or in place of the last of neurons, one after another.
    x: Vec<f64>,
    value: f64,
    gradient: Vec<f64>,
    /// Steps, and what they changed of the gradient.
    curvature: VecDeque<(Vec<f64>, Vec<f64>)>,
    /// What a value is shown as.
    scale: Scale,
}

/// How a loss is reported.
enum Scale {
    /// The relative error, for the squared loss.
    Relative { squared_norm: f64 },
    /// The mean of an observed entry.
    Mean { entries: f64 },
}

impl<'a, E: Element> Direct<'a, E> {
    /// Begins with `start`; where factors are tied, with neurons that have the root of their pairs' mean.
    pub fn new(
        tensor: &'a AffinityTensor<E>,
        start: Factors,
        loss: Loss,
        tied: Option<usize>,
    ) -> Result<Self> {
        let start = start.absorbed();
        let rank = start.rank();
        let last = match tied {
            Some(neurons) => of_neurons(&start.pairs, neurons),
            None => start.pairs.values.clone(),
        };
        let x = [&start.time.values[..], &start.animals.values, &last].concat();
        let scale = match loss {
            Loss::Squared => Scale::Relative { squared_norm: tensor.squared_norm()? },
            _ => Scale::Mean { entries: tensor.observed() as f64 },
        };
        let curvature = VecDeque::with_capacity(REMEMBERED);
        let mut direct =
            Self { tensor, loss, rank, tied, x, value: 0.0, gradient: Vec::new(), curvature, scale };
        (direct.value, direct.gradient) = direct.slope(&direct.x)?;
        Ok(direct)
    }

    /// The loss, and its gradient in all numbers.
    fn slope(&self, x: &[f64]) -> Result<(f64, Vec<f64>)> {
        let (value, [time, animals, pairs]) = self.loss.gradient(self.tensor, &self.unfolded(x))?;
        let last = match self.tied {
            // c[(i,j)] = d[i] d[j]
            Some(neurons) => {
                let d = &x[x.len() - neurons * self.rank..];
                let mut slope = vec![0.0; d.len()];
                for (at, (i, j)) in pairs_of(neurons).enumerate() {
                    for r in 0..self.rank {
                        let of_pair = pairs.at(at, r);
                        slope[i * self.rank + r] += of_pair * d[j * self.rank + r];
                        slope[j * self.rank + r] += of_pair * d[i * self.rank + r];
                    }
                }
                slope
            }
            None => pairs.values,
        };
        Ok((value, [time.values, animals.values, last].concat()))
    }

    /// The factors that these numbers are.
    fn unfolded(&self, x: &[f64]) -> Factors {
        let rows = [self.tensor.frames, self.tensor.animals, self.tied.unwrap_or(self.tensor.pairs)];
        let mut rest = x;
        let [time, animals, mut pairs] = rows.map(|rows| {
            let (values, behind) = rest.split_at(rows * self.rank);
            rest = behind;
            Matrix::new(rows, self.rank, values.to_vec())
        });
        if let Some(neurons) = self.tied {
            let product = |(i, j): (usize, usize)| pairs.row(i).iter().zip(pairs.row(j)).map(|(a, b)| a * b);
            let values = pairs_of(neurons).flat_map(product).collect();
            pairs = Matrix::new(self.tensor.pairs, self.rank, values);
        }
        Factors { time, animals, pairs, weights: vec![1.0; self.rank] }
    }

    /// `-H g` over the numbers that are free, by the two loops of L-BFGS; without a memory a step of length 1 downhill.
    fn direction(&self) -> Vec<f64> {
        let free: Vec<bool> = self.x.iter().zip(&self.gradient).map(|(x, g)| *x > 0.0 || *g < 0.0).collect();
        let only_free = |v: &mut [f64]| v.iter_mut().zip(&free).for_each(|(v, free)| *v *= f64::from(*free));
        let mut q = self.gradient.clone();
        only_free(&mut q);
        let mut steps = Vec::new();
        for (s, y) in self.curvature.iter().rev() {
            let alpha = dot(s, &q) / dot(s, y);
            q.iter_mut().zip(y).for_each(|(q, y)| *q -= alpha * y);
            steps.push(alpha);
        }
        let scale = match self.curvature.back() {
            Some((s, y)) => dot(s, y) / dot(y, y),
            None => 1.0 / dot(&q, &q).sqrt().max(f64::MIN_POSITIVE),
        };
        q.iter_mut().for_each(|q| *q *= scale);
        for ((s, y), alpha) in self.curvature.iter().zip(steps.into_iter().rev()) {
            let beta = dot(y, &q) / dot(s, y);
            q.iter_mut().zip(s).for_each(|(q, s)| *q += (alpha - beta) * s);
        }
        q.iter_mut().for_each(|q| *q = -*q);
        only_free(&mut q);
        q
    }

    /// Takes the longest of the halved steps that brings enough; whether there is one.
    fn step(&mut self, direction: &[f64]) -> Result<bool> {
        let mut length = 1.0;
        for _ in 0..HALVINGS {
            let x: Vec<f64> = self.x.iter().zip(direction).map(|(x, d)| (x + length * d).max(0.0)).collect();
            let moved: Vec<f64> = x.iter().zip(&self.x).map(|(new, old)| new - old).collect();
            let promised = dot(&moved, &self.gradient);
            if promised < 0.0
                && self.loss.total(self.tensor, &self.unfolded(&x))? <= self.value + SUFFICIENT * promised
            {
                let (value, gradient) = self.slope(&x)?;
                let turned: Vec<f64> =
                    gradient.iter().zip(&self.gradient).map(|(new, old)| new - old).collect();
                if dot(&moved, &turned) > 1e-10 * (dot(&moved, &moved) * dot(&turned, &turned)).sqrt() {
                    if self.curvature.len() == REMEMBERED {
                        self.curvature.pop_front();
                    }
                    self.curvature.push_back((moved, turned));
                }
                (self.x, self.value, self.gradient) = (x, value, gradient);
                return Ok(true);
            }
            length /= 2.0;
        }
        Ok(false)
    }
}

impl<E: Element> Descent for Direct<'_, E> {
    fn sweep(&mut self) -> Result<f64> {
        let direction = self.direction();
        if !self.step(&direction)? && !self.curvature.is_empty() {
            // The memory may mislead where the set of free numbers has changed.
            self.curvature.clear();
            let direction = self.direction();
            self.step(&direction)?;
        }
        Ok(match self.scale {
            Scale::Relative { squared_norm } => (self.value / squared_norm).sqrt(),
            Scale::Mean { entries } => self.value / entries,
        })
    }

    fn factors(&self) -> Factors {
        self.unfolded(&self.x)
    }
}

/// The pairs of n neurons, in the tensor's order.
fn pairs_of(neurons: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..neurons).flat_map(move |i| (i + 1..neurons).map(move |j| (i, j)))
}

/// For every neuron the root of the mean of its pairs, `[N, R]`.
fn of_neurons(pairs: &Matrix, neurons: usize) -> Vec<f64> {
    let rank = pairs.columns;
    let mut sums = vec![0.0; neurons * rank];
    for (at, (i, j)) in pairs_of(neurons).enumerate() {
        for r in 0..rank {
            sums[i * rank + r] += pairs.at(at, r);
            sums[j * rank + r] += pairs.at(at, r);
        }
    }
    sums.into_iter().map(|sum| (sum / (neurons - 1) as f64).sqrt()).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}
