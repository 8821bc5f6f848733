//! From a trained network to a quantised one: calibration, sensitivities, search.

use std::collections::BTreeMap;
use std::sync::Arc;

use burn::tensor::TensorData;
use kiln_core::{Context, Error, Result};
use kiln_nn::{Confusion, likeliest};
use kiln_ops::flex;
use rand::RngExt;
use rand::seq::SliceRandom;
use serde::{Deserialize, Serialize};

use crate::data::Examples;
use crate::mlp::{log_sum_exp, random_signs};
use crate::program::Program;
use crate::quantiser::{Calibrator, Observer};
use crate::search::{Augment, Bits, Goal, Measured, Order, Trials, Tried, least_first, search};
use crate::unit::{Numbers, Ranges, Ready, Weights, Work};

/// Examples that a program computes at once, where the network allows.
const BATCH: usize = 64;

/// Of units further apart than this, only some pairs are measured.
const NEAR: usize = 8;

/// Units up to which all pairs are measured.
const ALL_PAIRS: usize = 40;

/// A share of the pairs of units that are far apart.
const FAR_SHARE: f64 = 0.1;

/// What is measured on the validation set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Metric {
    /// Share of right classes
    #[default]
    Accuracy,
    /// F1, the mean over classes
    F1,
    /// The mean cross-entropy, negative
    Loss,
}

/// A network that is being quantised.
#[derive(Debug, Clone)]
pub struct Quantiser {
    /// One example at a time.
    pub program: Program,
    /// Many at once, where the network allows.
    batched: Program,
    /// How weights of 4 bits, and activations, get their range.
    calibrator: Calibrator,
    /// Whole numbers of every unit at 8 and 4 bits.
    pub numbers: Vec<[Arc<Numbers>; 2]>,
    floats: Vec<Ready>,
    halves: Vec<Ready>,
    rounded: Vec<[Ready; 2]>,
}

impl Quantiser {
    /// Calibrates a network on examples, whose labels are not looked at.
    ///
    /// # Errors
    /// When the examples do not fit the network.
    pub fn calibrate(
        program: Program,
        examples: &Examples,
        calibrator: Calibrator,
        cx: &Context,
    ) -> Result<Self> {
        if examples.is_empty() {
            return Err(Error::usage("there are no examples to calibrate with"));
        }
        let floats: Vec<Ready> = program.units.iter().map(Ready::float).collect();
        let batched = program.with_batch(BATCH, &floats).unwrap_or_else(|| program.clone());
        let mut observers: Vec<[Observer; 2]> = vec![Default::default(); program.units.len()];
        let bar = cx.progress(examples.len() as u64, "calibrating");
        for (inputs, _) in batches(examples, batched.batch()) {
            let mut values = batched.begin(&[inputs])?;
            let mut wrong = None;
            batched.run_from(0, &mut values, &floats, false, &mut |unit, x, second| {
                if batched.units[unit].work == Work::Table {
                    return;
                }
                let x = flex::floats(x);
                if x.iter().any(|x| !x.is_finite()) {
                    wrong.get_or_insert(unit);
                    return;
                }
                observers[unit][0].observe(&x);
                if let Some(second) = second {
                    observers[unit][1].observe(&flex::floats(second));
                }
            });
            if let Some(unit) = wrong {
                return Err(Error::work(format!(
                    "what {} reads is not finite for some calibration examples",
                    program.units[unit].name
                ))
                .hint("the network itself overflows on them"));
            }
            bar.inc(batched.batch() as u64);
        }
        let range = |(unit, observers): (&crate::unit::Unit, &[Observer; 2])| {
            let second = (unit.work == Work::Product).then_some(&observers[1]);
            Ranges::of(&observers[0], second, calibrator)
        };
        let ranges: Vec<Ranges> = program.units.iter().zip(&observers).map(range).collect();
        let numbers_of = |(unit, ranges): (&crate::unit::Unit, &Ranges)| {
            [(8, Calibrator::Minmax), (4, Calibrator::Mse)].map(|(bits, calibrator)| {
                Arc::new(Numbers { weights: Weights::of(unit, bits, calibrator), ranges: ranges.clone() })
            })
        };
        let numbers: Vec<[Arc<Numbers>; 2]> = program.units.iter().zip(&ranges).map(numbers_of).collect();
        let both = program.units.iter().zip(&numbers);
        let rounded = both
            .map(|(unit, numbers)| numbers.each_ref().map(|numbers| Ready::rounded(unit, numbers)))
            .collect();
        let halves = program.units.iter().map(Ready::half).collect();
        Ok(Self { program, batched, calibrator, numbers, floats, halves, rounded })
    }

    /// How ranges were chosen.
    pub fn calibrator(&self) -> Calibrator {
        self.calibrator
    }

    /// The units of a configuration, rounded as if quantised.
    fn as_if(&self, bits: &Bits) -> Vec<Ready> {
        let unit = |(unit, &bits): (usize, &u8)| match bits {
            16 => self.halves[unit].clone(),
            8 => self.rounded[unit][0].clone(),
            _ => self.rounded[unit][1].clone(),
        };
        bits.iter().enumerate().map(unit).collect()
    }

    /// The units of a configuration, in whole numbers where it says so.
    pub fn real(&self, bits: &Bits) -> Vec<Ready> {
        let unit = |(at, &bits): (usize, &u8)| match bits {
            16 => self.halves[at].clone(),
            bits => Ready::whole(&self.program.units[at], &self.numbers[at][usize::from(bits == 4)]),
        };
        bits.iter().enumerate().map(unit).collect()
    }

    /// Logits of the network as it was, `[examples, classes]`.
    ///
    /// # Errors
    /// When the examples do not fit.
    pub fn float_logits(&self, examples: &Examples) -> Result<Vec<Vec<f32>>> {
        logits(&self.batched, &self.floats, examples)
    }

    /// Logits of a configuration, computed in whole numbers.
    ///
    /// # Errors
    /// When the examples do not fit.
    pub fn real_logits(&self, bits: &Bits, examples: &Examples) -> Result<Vec<Vec<f32>>> {
        logits(&self.batched, &self.real(bits), examples)
    }

    /// Logits of a configuration, computed in floats that are rounded as if quantised.
    ///
    /// # Errors
    /// When the examples do not fit.
    pub fn rounded_logits(&self, bits: &Bits, examples: &Examples) -> Result<Vec<Vec<f32>>> {
        logits(&self.batched, &self.as_if(bits), examples)
    }

    /// Measures all units at 8 and 4 bits on labelled examples, with `probes` random directions for the curvature.
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
        let units = self.program.units.len();
        let program = &self.batched;
        let chosen: Vec<(usize, usize)> = if pairs { self.pairs(cx) } else { Vec::new() };
        let work = examples.len().div_ceil(program.batch()) * units * (2 * probes + 3);
        let bar = cx.progress(work as u64, "sensitivities");
        let mut loss = 0.0;
        let mut single = vec![vec![0.0; units]; 2];
        let mut paired = vec![vec![0.0; chosen.len()]; 2];
        let mut curvature = vec![vec![0.0; probes]; units];
        for (inputs, labels) in batches(examples, program.batch()) {
            let mut base = program.begin(&[inputs])?;
            program.run_from(0, &mut base, &self.floats, true, &mut |_, _, _| {});
            let loss_of = |values: &mut crate::program::Values| -> f64 {
                let logits = program.read_outputs(values);
                total_loss(&rows(&logits[0], program.batch()), &labels)
            };
            let batch_loss = loss_of(&mut base);
            loss += batch_loss;
            for unit in 0..units {
                if cx.interrupted() {
                    return Err(Error::interrupted("stopped while sensitivities were measured"));
                }
                let step = program.step_of(unit);
                let rerun = |from: &crate::program::Values, ready: &[Ready], keep: bool| {
                    let mut values = from.clone();
                    program.run_from(step, &mut values, ready, keep, &mut |_, _, _| {});
                    values
                };
                let mut ready = self.floats.clone();
                for (precision, rounded) in self.rounded[unit].iter().enumerate() {
                    ready[unit] = rounded.clone();
                    let after = chosen.iter().enumerate().filter(|(_, (i, _))| *i == unit);
                    let after: Vec<(usize, usize)> = after.map(|(at, (_, j))| (at, *j)).collect();
                    let mut values = rerun(&base, &ready, !after.is_empty());
                    single[precision][unit] += loss_of(&mut values);
                    for (at, j) in after {
                        let mut both = ready.clone();
                        both[j] = self.rounded[j][precision].clone();
                        let mut second = values.clone();
                        program.run_from(program.step_of(j), &mut second, &both, false, &mut |_, _, _| {});
                        paired[precision][at] += loss_of(&mut second);
                    }
                }
                if !self.program.units[unit].weight.is_empty() {
                    for (probe, curvature) in curvature[unit].iter_mut().enumerate() {
                        let (moved, step_size) = self.moved(unit, probe, cx);
                        for moved in moved {
                            ready[unit] = moved;
                            *curvature +=
                                (loss_of(&mut rerun(&base, &ready, false)) - batch_loss) / step_size;
                        }
                    }
                }
                bar.inc(2 * probes as u64 + 3);
            }
        }
        let count = examples.len() as f64;
        let mean = |sum: f64| sum / count;
        loss = mean(loss);
        let traces: Vec<Trace> = curvature
            .iter()
            .map(|probes| Trace::of(&probes.iter().map(|&p| mean(p)).collect::<Vec<_>>()))
            .collect();
        let measured = |precision: usize| {
            let single: Vec<f64> = single[precision].iter().map(|&sum| mean(sum) - loss).collect();
            let pairs: Vec<((usize, usize), f64)> = chosen
                .iter()
                .zip(&paired[precision])
                .map(|(&(i, j), &sum)| ((i, j), mean(sum) - loss - single[i] - single[j]))
                .collect();
            let noise: Vec<f64> = (0..units).map(|unit| self.noise(unit, precision)).collect();
            let hessian = (0..units).map(|unit| {
                let n = self.program.units[unit].weight.len().max(1) as f64;
                traces[unit].mean.max(0.0) / n * noise[unit]
            });
            Measured { hessian: hessian.collect(), noise, pair: symmetric(units, &pairs), single }
        };
        Ok(Sensitivities {
            units: self.program.units.iter().map(|unit| unit.name.clone()).collect(),
            loss,
            eight: measured(0),
            four: measured(1),
            traces,
        })
    }

    /// Which pairs are measured: all, or the near ones and some of the others.
    fn pairs(&self, cx: &Context) -> Vec<(usize, usize)> {
        let units = self.program.units.len();
        let mut rng = cx.rng("pairs", 0);
        let all = (0..units).flat_map(|i| (i + 1..units).map(move |j| (i, j)));
        all.filter(|(i, j)| units <= ALL_PAIRS || j - i <= NEAR || rng.random::<f64>() < FAR_SHARE).collect()
    }

    /// `‖δ‖²` of a unit's weights.
    fn noise(&self, unit: usize, precision: usize) -> f64 {
        let values = self.numbers[unit][precision].weights.values();
        let pairs = self.program.units[unit].weight.iter().zip(&values);
        pairs.map(|(w, q)| f64::from(w - q).powi(2)).sum()
    }

    /// A unit whose weights are moved along random signs to both sides, and the square of the step.
    ///
    /// The step is a twentieth of the weights' size, near that of a rounding error of four bits: below it single precision
    /// does not show the curvature in the loss.
    fn moved(&self, unit: usize, probe: usize, cx: &Context) -> ([Ready; 2], f64) {
        const RELATIVE_STEP: f64 = 0.05;
        let original = &self.program.units[unit];
        let n = original.weight.len();
        let square: f64 = original.weight.iter().map(|&w| f64::from(w).powi(2)).sum();
        let step = RELATIVE_STEP * (square / n as f64).sqrt().max(1e-6);
        let signs = random_signs(n, &mut cx.rng(&format!("probe {unit}"), probe as u64));
        let moved = [1.0, -1.0].map(|side| {
            let mut unit = original.clone();
            unit.weight.iter_mut().zip(&signs).for_each(|(w, sign)| *w += (side * step * sign) as f32);
            Ready::float(&unit)
        });
        (moved, step * step)
    }

    /// Searches for the bits of every unit.
    ///
    /// # Errors
    /// When the validation set does not fit or has no labels, or the user stops it.
    pub fn search(
        &self,
        sensitivities: &Sensitivities,
        validation: &Examples,
        plan: &SearchPlan,
        trials: &mut Trials,
        cx: &Context,
        mut record: impl FnMut(&Tried) -> Result<()>,
    ) -> Result<Found> {
        let baseline = score(&self.float_logits(validation)?, &validation.labels, plan.metric);
        let target = match (plan.max_drop, plan.metric) {
            (Some(drop), _) => baseline - drop,
            (None, Metric::Loss) => baseline / plan.target,
            (None, _) => baseline * plan.target,
        };
        let mut rng = cx.rng("order", plan.draw);
        let mut order = |measured: &Measured| {
            let scores = match plan.uniform {
                true => (0..measured.noise.len()).map(|unit| unit as f64).collect(),
                false => measured.scores(plan.order, plan.lambda, plan.augment, &mut rng),
            };
            least_first(&scores)
        };
        let (order8, order4) = (order(&sensitivities.eight), order(&sensitivities.four));
        let (none, units) = (Vec::new(), self.program.units.len());
        let goal = Goal {
            target,
            order8: if plan.bits.contains(&8) { &order8 } else { &none },
            order4: if plan.bits.contains(&4) { &order4 } else { &none },
            pinned: &plan.pinned,
            refine: plan.refine,
        };
        let bar = cx.progress(2 * (units.ilog2() as u64 + 2), "search");
        let bits = search(units, &goal, trials, |bits| {
            if cx.interrupted() {
                return Err(Error::interrupted("the search was stopped"));
            }
            let metric = score(&self.rounded_logits(bits, validation)?, &validation.labels, plan.metric);
            record(&Tried { bits: bits.clone(), metric })?;
            bar.inc(1);
            Ok(metric)
        })?;
        Ok(Found { bits, baseline, target })
    }

    /// Bytes of a configuration's weights, and of the network with sixteen bits everywhere.
    pub fn bytes(&self, bits: &Bits) -> (usize, usize) {
        let of = |bits: &Bits| -> usize {
            self.program.units.iter().zip(bits).map(|(unit, &bits)| unit.bytes(bits)).sum::<usize>()
                + self.program.other_bytes()
        };
        (of(bits), of(&vec![16; bits.len()]))
    }
}

/// How the search is done.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SearchPlan {
    /// What is measured.
    pub metric: Metric,
    /// Least share of the baseline's metric.
    pub target: f64,
    /// Largest loss of the metric, instead.
    pub max_drop: Option<f64>,
    /// Precisions that may be used, of 16, 8 and 4.
    pub bits: Vec<u8>,
    /// By what units are ordered.
    pub order: Order,
    /// Weight of the dependencies.
    pub lambda: f64,
    /// Which of them.
    pub augment: Augment,
    /// Bits that units must have.
    pub pinned: BTreeMap<usize, u8>,
    /// Whether refused units are tried one by one.
    pub refine: bool,
    /// Which random order.
    pub draw: u64,
    /// Whether units stay in the order of the network.
    pub uniform: bool,
}

impl Default for SearchPlan {
    fn default() -> Self {
        Self {
            metric: Metric::Accuracy,
            target: 0.999,
            max_drop: None,
            bits: vec![16, 8, 4],
            order: Order::Augmented,
            lambda: 1.0,
            augment: Augment::Both,
            pinned: BTreeMap::new(),
            refine: false,
            draw: 0,
            uniform: false,
        }
    }
}

/// What a search found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Found {
    /// Bits of every unit.
    pub bits: Bits,
    /// The metric of the network as it was.
    pub baseline: f64,
    /// What had to be reached.
    pub target: f64,
}

/// The trace of a unit's Hessian, estimated.
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

/// What was measured of all units: `sensitivity.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sensitivities {
    /// Names of the units.
    pub units: Vec<String>,
    /// The loss of the network as it was.
    pub loss: f64,
    /// Of every unit's Hessian.
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

/// Batches of exactly `size` examples, the last filled up with the first example; the labels are only the real ones.
pub fn batches(examples: &Examples, size: usize) -> impl Iterator<Item = (TensorData, Vec<usize>)> + '_ {
    (0..examples.len()).step_by(size).map(move |first| {
        let real: Vec<usize> = (first..(first + size).min(examples.len())).collect();
        let labels = real.iter().filter_map(|&i| examples.labels.get(i).copied()).collect();
        let filled: Vec<usize> = real.iter().copied().chain(std::iter::repeat(0)).take(size).collect();
        (examples.batch(&filled), labels)
    })
}

fn rows(logits: &TensorData, batch: usize) -> Vec<Vec<f32>> {
    let values: Vec<f32> = logits.iter::<f32>().collect();
    values.chunks((values.len() / batch.max(1)).max(1)).map(<[f32]>::to_vec).collect()
}

/// Logits of examples, `[examples, classes]`.
///
/// # Errors
/// When the examples do not fit.
pub fn logits(program: &Program, ready: &[Ready], examples: &Examples) -> Result<Vec<Vec<f32>>> {
    let mut all = Vec::new();
    for (inputs, _) in batches(examples, program.batch()) {
        let outputs = program.run(&[inputs], ready)?;
        all.extend(rows(&outputs[0], program.batch()));
    }
    all.truncate(examples.len());
    Ok(all)
}

/// The sum of the cross-entropies of the rows that have labels.
fn total_loss(logits: &[Vec<f32>], labels: &[usize]) -> f64 {
    let loss = |(row, &label): (&Vec<f32>, &usize)| {
        let row: Vec<f64> = row.iter().map(|&x| f64::from(x)).collect();
        log_sum_exp(&row) - row[label.min(row.len() - 1)]
    };
    logits.iter().zip(labels).map(loss).sum()
}

/// The metric; the larger, the better.
pub fn score(logits: &[Vec<f32>], labels: &[usize], metric: Metric) -> f64 {
    let classes = logits.first().map_or(1, Vec::len);
    let pairs = || labels.iter().zip(logits).map(|(&label, row)| (label, likeliest(row)));
    match metric {
        Metric::Accuracy => Confusion::new(classes, pairs()).accuracy(),
        Metric::F1 => Confusion::new(classes, pairs()).macro_f1(),
        Metric::Loss => -total_loss(logits, labels) / labels.len().max(1) as f64,
    }
}

/// Makes sure that there are labels, all below the number of classes.
///
/// # Errors
/// When there are not.
pub fn check_labels(examples: &Examples, classes: usize, place: &std::path::Path) -> Result<()> {
    if examples.labels.len() != examples.len() {
        return Err(Error::input(place.display(), "has no labels").hint("the metric needs them"));
    }
    match examples.labels.iter().position(|&label| label >= classes) {
        Some(row) => Err(Error::input(
            place.display(),
            format!("example {} has the class {}, the network has {classes}", row + 1, examples.labels[row]),
        )),
        None => Ok(()),
    }
}

/// Some of `count`, drawn at random, in order.
pub fn sample(count: usize, wanted: usize, stream: &str, cx: &Context) -> Vec<usize> {
    let mut all: Vec<usize> = (0..count).collect();
    all.shuffle(&mut cx.rng(stream, 0));
    all.truncate(wanted);
    all.sort_unstable();
    all
}
