//! How much a network suffers when a part of it is rounded: single losses and those of pairs, by forward passes alone, and curvature.

use std::collections::BTreeMap;

use kiln_core::{Context, Error, Result};
use kiln_ops::flex;
use rand::RngExt;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::curvature::{Curvature, Method, Probing, Trace};
use crate::data::Examples;
use crate::program::{Program, Values, float_value};
use crate::quantise::{Part, Quantiser, Side, batches, rows, total_loss};
use crate::ready::Ready;
use crate::search::Measured;
use crate::unit::{Pair, Work};

/// Of parts further apart than this, only some pairs are measured.
const NEAR: usize = 8;

/// Parts up to which all pairs are measured.
const ALL_PAIRS: usize = 40;

/// A share of the pairs of parts that are far apart.
const FAR_SHARE: f64 = 0.1;

/// What a batch of examples adds to the measurements of all parts.
struct Sums {
    /// At eight and at four bits, for every part.
    single: [Vec<f64>; 2],
    /// For every pair that is measured.
    paired: [Vec<f64>; 2],
    /// Squared errors of activations, for every part that is one.
    noise: [Vec<f64>; 2],
    /// Numbers of a part: weights, or an activation for one example.
    extents: Vec<usize>,
}

impl Quantiser {
    /// Measures all parts at 8 and 4 bits on labelled examples, with `probes` random directions for the curvature at most.
    ///
    /// What comes before the first part that is rounded is computed once: the tensors of the network as it was, and those with one
    /// part rounded, stay for as long as parts after it are tried.
    ///
    /// # Errors
    /// When the examples do not fit, or the user stops it.
    pub fn sensitivities(
        &self,
        examples: &Examples,
        probes: usize,
        pairs: bool,
        cx: &Context,
    ) -> Result<Sensitivities> {
        let parts = self.parts.len();
        let program = &self.in_batches(examples.len());
        let curvature = self.curvature(examples, Probing::at_most(probes), cx)?;
        let chosen: Vec<(usize, usize)> = if pairs { pairs_of(parts, cx) } else { Vec::new() };
        let work = examples.len().div_ceil(program.batch()) * parts;
        let bar = cx.progress(work as u64, "sensitivities");
        let alone: Vec<[Ready; 2]> =
            (0..parts).map(|part| [8, 4].map(|bits| self.rounded_parts(&[part], bits))).collect();
        let mut loss = 0.0;
        let mut sums = Sums {
            single: [vec![0.0; parts], vec![0.0; parts]],
            paired: [vec![0.0; chosen.len()], vec![0.0; chosen.len()]],
            noise: [vec![0.0; parts], vec![0.0; parts]],
            extents: self.parts.iter().map(|part| self.program.units[part.unit].weight.len()).collect(),
        };
        for (inputs, labels) in batches(examples, program.batch()) {
            let mut base = program.begin(&[inputs])?;
            program.run_from(0, &mut base, &self.floats, true, &mut |_, _, _| {});
            let loss_of = |values: &mut Values| -> f64 {
                let logits = program.read_outputs(values);
                total_loss(&rows(&logits[0], program.batch()), &labels)
            };
            let batch_loss = loss_of(&mut base);
            loss += batch_loss;
            // Parts at the same time: the threads of one would wait for each other after every unit.
            let measured = (0..parts).into_par_iter().map(|at| {
                if cx.interrupted() {
                    return Err(Error::interrupted("stopped while sensitivities were measured"));
                }
                let measured = self.measure_part(program, at, &base, &alone, &chosen, &loss_of);
                let noise = [8, 4]
                    .map(|bits| self.activation_noise(&self.parts[at], bits, program, &base, labels.len()));
                bar.inc(1);
                Ok((measured, noise))
            });
            for (at, measured) in measured.collect::<Vec<_>>().into_iter().enumerate() {
                let ((single, paired), noise) = measured?;
                for (precision, (single, noise)) in single.into_iter().zip(noise).enumerate() {
                    sums.single[precision][at] += single;
                    if let Some((error, extent)) = noise {
                        sums.noise[precision][at] += error;
                        sums.extents[at] = extent;
                    }
                }
                for (pair, losses) in paired {
                    (0..2).for_each(|precision| sums.paired[precision][pair] += losses[precision]);
                }
            }
        }
        Ok(self.summary(loss, &sums, &chosen, curvature, examples))
    }

    /// Losses of a batch with a part rounded at eight and at four bits, and with each part after it that is paired with it too.
    fn measure_part(
        &self,
        program: &Program,
        at: usize,
        base: &Values,
        alone: &[[Ready; 2]],
        chosen: &[(usize, usize)],
        loss_of: &impl Fn(&mut Values) -> f64,
    ) -> ([f64; 2], Vec<(usize, [f64; 2])>) {
        let unit = self.parts[at].unit;
        let run_from = |unit: usize, from: &Values, ready: &[Ready], keep: bool| {
            let mut values = from.clone();
            program.run_from(program.step_of(unit), &mut values, ready, keep, &mut |_, _, _| {});
            values
        };
        let after = chosen.iter().enumerate().filter(|(_, (i, _))| *i == at);
        let after: Vec<(usize, usize)> = after.map(|(pair, (_, j))| (pair, *j)).collect();
        let mut single = [0.0; 2];
        let mut paired: Vec<(usize, [f64; 2])> = after.iter().map(|(pair, _)| (*pair, [0.0; 2])).collect();
        for (precision, bits) in [8, 4].into_iter().enumerate() {
            let mut ready = self.floats.clone();
            ready[unit] = alone[at][precision].clone();
            let mut values = run_from(unit, base, &ready, !after.is_empty());
            single[precision] = loss_of(&mut values);
            for ((_, losses), &(_, j)) in paired.iter_mut().zip(&after) {
                let other = self.parts[j].unit;
                let mut both = ready.clone();
                losses[precision] = if other == unit {
                    both[unit] = self.rounded_parts(&[at, j], bits);
                    loss_of(&mut run_from(unit, base, &both, false))
                } else {
                    both[other] = alone[j][precision].clone();
                    loss_of(&mut run_from(other, &values, &both, false))
                };
            }
        }
        (single, paired)
    }

    /// Means over the examples, and the scores that follow from them.
    fn summary(
        &self,
        loss: f64,
        sums: &Sums,
        chosen: &[(usize, usize)],
        Curvature { traces, method }: Curvature,
        examples: &Examples,
    ) -> Sensitivities {
        let parts = self.parts.len();
        let count = examples.len() as f64;
        let mean = |sum: f64| sum / count;
        let loss = mean(loss);
        let measured = |precision: usize| {
            let single: Vec<f64> = sums.single[precision].iter().map(|&sum| mean(sum) - loss).collect();
            let pairs: Vec<((usize, usize), f64)> = chosen
                .iter()
                .zip(&sums.paired[precision])
                .map(|(&(i, j), &sum)| ((i, j), mean(sum) - loss - single[i] - single[j]))
                .collect();
            let noise: Vec<f64> = (0..parts)
                .map(|at| {
                    self.weight_noise(&self.parts[at], precision).unwrap_or(mean(sums.noise[precision][at]))
                })
                .collect();
            let hessian =
                (0..parts).map(|at| traces[at].mean.max(0.0) / sums.extents[at].max(1) as f64 * noise[at]);
            Measured { hessian: hessian.collect(), noise, pair: symmetric(parts, &pairs), single }
        };
        Sensitivities {
            units: self.parts.iter().map(|part| part.name.clone()).collect(),
            loss,
            eight: measured(0),
            four: measured(1),
            traces,
            method,
        }
    }

    /// The activation that a part is, if it is one alone: whether it is the second operand of a product.
    pub(crate) fn activation(&self, part: &Part) -> Option<bool> {
        let product = self.program.units[part.unit].work == Work::Product;
        match part.side {
            Side::Input => Some(false),
            Side::Weight if product => Some(true),
            _ => None,
        }
    }

    /// `‖δ‖²` of a part's weights; nothing where it is an activation.
    fn weight_noise(&self, part: &Part, precision: usize) -> Option<f64> {
        if self.activation(part).is_some() {
            return None;
        }
        let numbers = self.numbers(part.unit, Pair::of([8, 4][precision]));
        let values = numbers.weights.map(|weights| weights.values()).unwrap_or_default();
        let pairs = self.program.units[part.unit].weight.iter().zip(&values);
        Some(pairs.map(|(w, q)| f64::from(w - q).powi(2)).sum())
    }

    /// The sum of `‖δ‖²` of an activation over the first `count` examples of a batch, and its numbers for one of them; nothing
    /// where the part is none.
    fn activation_noise(
        &self,
        part: &Part,
        bits: u8,
        program: &Program,
        base: &Values,
        count: usize,
    ) -> Option<(f64, usize)> {
        let second = self.activation(part)?;
        let unit = &self.program.units[part.unit];
        let numbers = self.numbers(part.unit, Pair::of(bits));
        let id = unit.second.filter(|_| second).unwrap_or(unit.input);
        let x = float_value(base, id)?;
        let x = flex::floats(&x).into_owned();
        let width = x.len() / program.batch();
        let error = |x: f32| -> f64 {
            let x = f64::from(x);
            match (second, numbers.input, numbers.second) {
                (true, _, Some(how)) => how.value(how.quantise(x)) - x,
                (false, Some(how), _) => how.value(how.quantise(x)) - x,
                _ => 0.0,
            }
        };
        Some((x[..width * count].iter().map(|&x| error(x).powi(2)).sum(), width))
    }
}

/// Which pairs are measured: all, or the near ones and some of the others.
fn pairs_of(parts: usize, cx: &Context) -> Vec<(usize, usize)> {
    let mut rng = cx.rng("pairs", 0);
    let all = (0..parts).flat_map(|i| (i + 1..parts).map(move |j| (i, j)));
    all.filter(|(i, j)| parts <= ALL_PAIRS || j - i <= NEAR || rng.random::<f64>() < FAR_SHARE).collect()
}

/// What was measured of all parts: `sensitivity.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sensitivities {
    /// Names of the parts.
    pub units: Vec<String>,
    /// The loss of the network as it was.
    pub loss: f64,
    /// Of every part's Hessian.
    pub traces: Vec<Trace>,
    /// How these were estimated.
    pub method: Method,
    /// At eight bits.
    pub eight: Measured,
    /// At four bits.
    pub four: Measured,
}

/// A symmetric matrix of the measured pairs; those that were not get the mean of their distance.
fn symmetric(units: usize, pairs: &[((usize, usize), f64)]) -> Vec<Vec<f64>> {
    if pairs.is_empty() {
        return Vec::new();
    }
    let mut by_distance: BTreeMap<usize, (f64, f64)> = BTreeMap::new();
    for ((i, j), d) in pairs {
        let (sum, count) = by_distance.entry(j - i).or_default();
        *sum += d;
        *count += 1.0;
    }
    let mean = |distance: usize| by_distance.get(&distance).map_or(0.0, |(sum, count)| sum / count);
    let mut matrix: Vec<Vec<f64>> = (0..units)
        .map(|i| (0..units).map(|j| if i == j { 0.0 } else { mean(i.abs_diff(j)) }).collect())
        .collect();
    for &((i, j), d) in pairs {
        matrix[i][j] = d;
        matrix[j][i] = d;
    }
    matrix
}
