//! How much a network suffers when a part of it is rounded: curvature, single losses and those of pairs, by forward passes alone.

use std::collections::BTreeMap;

use kiln_core::{Context, Error, Result};
use kiln_ops::flex;
use rand::RngExt;
use serde::{Deserialize, Serialize};

use crate::data::Examples;
use crate::mlp::orthogonal_signs;
use crate::program::{Values, float_value};
use crate::quantise::{Part, Quantiser, Side, batches, rows, total_loss};
use crate::search::Measured;
use crate::unit::{Pair, Ready, Work};

/// Of parts further apart than this, only some pairs are measured.
const NEAR: usize = 8;

/// Parts up to which all pairs are measured.
const ALL_PAIRS: usize = 40;

/// A share of the pairs of parts that are far apart.
const FAR_SHARE: f64 = 0.1;

/// A step along random signs over the size of what is moved, near a rounding error of four bits: below it single precision does not
/// show the curvature in the loss.
const RELATIVE_STEP: f64 = 0.05;

/// What a batch of examples adds to the measurements of all parts.
struct Sums {
    /// At eight and at four bits, for every part.
    single: [Vec<f64>; 2],
    /// For every pair that is measured.
    paired: [Vec<f64>; 2],
    /// Second differences, for every part and probe.
    curvature: Vec<Vec<f64>>,
    /// Squared errors of activations, for every part that is one.
    noise: [Vec<f64>; 2],
    /// Numbers of a part: weights, or an activation for one example.
    extents: Vec<usize>,
}

impl Quantiser {
    /// Measures all parts at 8 and 4 bits on labelled examples, with `probes` random directions for the curvature.
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
        let program = &self.batched;
        let chosen: Vec<(usize, usize)> = if pairs { pairs_of(parts, cx) } else { Vec::new() };
        let work = examples.len().div_ceil(program.batch()) * parts * (2 * probes + 3);
        let bar = cx.progress(work as u64, "sensitivities");
        let alone: Vec<[Ready; 2]> =
            (0..parts).map(|part| [8, 4].map(|bits| self.rounded_parts(&[part], bits))).collect();
        let mut loss = 0.0;
        let mut sums = Sums {
            single: [vec![0.0; parts], vec![0.0; parts]],
            paired: [vec![0.0; chosen.len()], vec![0.0; chosen.len()]],
            curvature: vec![vec![0.0; probes]; parts],
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
            for (at, part) in self.parts.iter().enumerate() {
                if cx.interrupted() {
                    return Err(Error::interrupted("stopped while sensitivities were measured"));
                }
                let step = program.step_of(part.unit);
                let rerun = |from: &Values, ready: &[Ready], keep: bool| {
                    let mut values = from.clone();
                    program.run_from(step, &mut values, ready, keep, &mut |_, _, _| {});
                    values
                };
                let mut ready = self.floats.clone();
                for precision in 0..2 {
                    ready[part.unit] = alone[at][precision].clone();
                    let after = chosen.iter().enumerate().filter(|(_, (i, _))| *i == at);
                    let after: Vec<(usize, usize)> = after.map(|(pair, (_, j))| (pair, *j)).collect();
                    let mut values = rerun(&base, &ready, !after.is_empty());
                    sums.single[precision][at] += loss_of(&mut values);
                    for (pair, j) in after {
                        let mut both = ready.clone();
                        let other = self.parts[j].unit;
                        sums.paired[precision][pair] += if other == part.unit {
                            both[other] = self.rounded_parts(&[at, j], [8, 4][precision]);
                            loss_of(&mut rerun(&base, &both, false))
                        } else {
                            both[other] = alone[j][precision].clone();
                            let mut second = values.clone();
                            program.run_from(
                                program.step_of(other),
                                &mut second,
                                &both,
                                false,
                                &mut |_, _, _| {},
                            );
                            loss_of(&mut second)
                        };
                    }
                }
                for probe in 0..probes {
                    let Some((moved, square)) = self.moved(part, probe, &base, cx) else { break };
                    for moved in moved {
                        ready[part.unit] = moved;
                        sums.curvature[at][probe] +=
                            (loss_of(&mut rerun(&base, &ready, false)) - batch_loss) / square;
                    }
                }
                for (noise, precision) in sums.noise.iter_mut().zip([8, 4]) {
                    if let Some((error, extent)) = self.activation_noise(part, precision, &base, labels.len())
                    {
                        noise[at] += error;
                        sums.extents[at] = extent;
                    }
                }
                bar.inc(2 * probes as u64 + 3);
            }
        }
        Ok(self.summary(loss, &sums, &chosen, examples))
    }

    /// Means over the examples, and the scores that follow from them.
    fn summary(
        &self,
        loss: f64,
        sums: &Sums,
        chosen: &[(usize, usize)],
        examples: &Examples,
    ) -> Sensitivities {
        let parts = self.parts.len();
        let count = examples.len() as f64;
        let mean = |sum: f64| sum / count;
        let loss = mean(loss);
        let traces: Vec<Trace> = sums
            .curvature
            .iter()
            .map(|probes| Trace::of(&probes.iter().map(|&p| mean(p)).collect::<Vec<_>>()))
            .collect();
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
        }
    }

    /// The activation that a part is, if it is one alone: whether it is the second operand of a product.
    fn activation(&self, part: &Part) -> Option<bool> {
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
    fn activation_noise(&self, part: &Part, bits: u8, base: &Values, count: usize) -> Option<(f64, usize)> {
        let second = self.activation(part)?;
        let unit = &self.program.units[part.unit];
        let numbers = self.numbers(part.unit, Pair::of(bits));
        let id = unit.second.filter(|_| second).unwrap_or(unit.input);
        let x = float_value(base, id)?;
        let x = flex::floats(&x).into_owned();
        let width = x.len() / self.batched.batch();
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

    /// A part that is moved along random signs to both sides, and the square of the step; nothing where there is nothing to move.
    fn moved(&self, part: &Part, probe: usize, base: &Values, cx: &Context) -> Option<([Ready; 2], f64)> {
        let original = &self.program.units[part.unit];
        let stream = format!("probe {}", part.name);
        let signs = |n| orthogonal_signs(n, probe, |block| cx.rng(&stream, block as u64));
        let step_of = |x: &[f32]| {
            let square: f64 = x.iter().map(|&x| f64::from(x).powi(2)).sum();
            RELATIVE_STEP * (square / x.len() as f64).sqrt().max(1e-6)
        };
        if let Some(second) = self.activation(part) {
            let id = original.second.filter(|_| second).unwrap_or(original.input);
            let x = float_value(base, id)?;
            let x = flex::floats(&x).into_owned();
            let (step, signs) = (step_of(&x), signs(x.len()));
            let moved = [1.0, -1.0].map(|side| {
                let by = signs.iter().map(|sign| (side * step * sign) as f32).collect();
                Ready::moved(original, by, second)
            });
            return Some((moved, step * step));
        }
        if original.weight.is_empty() {
            return None;
        }
        let (step, signs) = (step_of(&original.weight), signs(original.weight.len()));
        let moved = [1.0, -1.0].map(|side| {
            let mut unit = original.clone();
            unit.weight.iter_mut().zip(&signs).for_each(|(w, sign)| *w += (side * step * sign) as f32);
            Ready::float(&unit)
        });
        Some((moved, step * step))
    }
}

/// Which pairs are measured: all, or the near ones and some of the others.
fn pairs_of(parts: usize, cx: &Context) -> Vec<(usize, usize)> {
    let mut rng = cx.rng("pairs", 0);
    let all = (0..parts).flat_map(|i| (i + 1..parts).map(move |j| (i, j)));
    all.filter(|(i, j)| parts <= ALL_PAIRS || j - i <= NEAR || rng.random::<f64>() < FAR_SHARE).collect()
}

/// The trace of a part's Hessian, estimated.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Trace {
    /// Mean of `vᵀ H v`; negative where noise or a saddle makes it so, and then counted as 0.
    pub mean: f64,
    /// Its standard error.
    pub error: f64,
}

impl Trace {
    fn of(probes: &[f64]) -> Self {
        let n = probes.len() as f64;
        if probes.is_empty() {
            return Self::default();
        }
        let mean = probes.iter().sum::<f64>() / n;
        let variance = probes.iter().map(|p| (p - mean).powi(2)).sum::<f64>() / (n - 1.0).max(1.0);
        Self { mean, error: (variance / n).sqrt() }
    }
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
