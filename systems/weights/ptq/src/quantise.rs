//! From a trained network to a quantised one: calibration and search.

use std::collections::BTreeMap;
use std::sync::Arc;

use burn::tensor::TensorData;
use clap::ValueEnum;
use kiln_core::{Context, Error, Result};
use kiln_nn::{Confusion, likeliest};
use rand::seq::SliceRandom;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::calibrate::{Shifts, grouping, mean_errors, observe, round_weights};
use crate::data::Examples;
use crate::latency::Profile;
use crate::mlp::log_sum_exp;
use crate::program::Program;
use crate::quantiser::Calibrator;
use crate::ready::Ready;
use crate::search::{
    Augment, Bits, Goal, Measured, Order, Trials, Tried, least_first, per_gain, search, within,
};
use crate::sensitivity::Sensitivities;
use crate::unit::{Numbers, Pair, Ranges, Scales, Unit, Weights, Work};

/// Examples that a program computes at once, where the network allows.
const BATCH: usize = 64;

/// What is measured on the validation set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, Serialize, Deserialize)]
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

/// What gets bits of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Granularity {
    /// A layer: its weights and its input have the same
    #[default]
    Layer,
    /// A tensor: weights and input apart, computed with the more of both
    Tensor,
}

/// Which tensors of a unit a [`Part`] is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Weights and input; of a product both operands.
    Both,
    /// The weights; of a product the second operand.
    Weight,
    /// The input; of a product the first operand.
    Input,
}

/// What the search decides about: a unit, or one of its tensors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// The unit's name, and the tensor's.
    pub name: String,
    /// The unit, by its number.
    pub unit: usize,
    /// Which of its tensors.
    pub side: Side,
}

impl Part {
    /// The parts of all units, in their order.
    pub fn of(program: &Program, granularity: Granularity) -> Vec<Self> {
        let parts = |(at, unit): (usize, &Unit)| {
            let part = |side, name: &str| Self { name: format!("{}{name}", unit.name), unit: at, side };
            match (granularity, unit.work) {
                (Granularity::Layer, _) => vec![part(Side::Both, "")],
                (Granularity::Tensor, Work::Table) => vec![part(Side::Weight, ".weight")],
                (Granularity::Tensor, Work::Product) => {
                    vec![part(Side::Input, ".first"), part(Side::Weight, ".second")]
                }
                (Granularity::Tensor, _) => vec![part(Side::Weight, ".weight"), part(Side::Input, ".input")],
            }
        };
        program.units.iter().enumerate().flat_map(parts).collect()
    }

    /// Gives this part of a pair its bits.
    fn set(&self, pair: &mut Pair, bits: u8) {
        if self.side != Side::Input {
            pair.weight = bits;
        }
        if self.side != Side::Weight {
            pair.input = bits;
        }
    }
}

/// How a network is quantised, apart from the bits.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct QuantConfig {
    /// How activations get their range.
    pub calibrator: Calibrator,
    /// What gets bits of its own.
    pub granularity: Granularity,
    /// Which weights share a scale.
    pub scales: Scales,
    /// Neighbours in a row of a linear layer that share a scale at four bits; the layer's input then stays a float.
    pub group: Option<usize>,
    /// Whether channels are equalised across layers first.
    pub equalise: bool,
    /// Whether biases make up for the mean error of the rounding.
    pub bias_correct: bool,
    /// Steps in which the rounding of four bits is learnt.
    pub adaround: Option<usize>,
}

/// A network that is being quantised.
#[derive(Debug, Clone)]
pub struct Quantiser {
    /// One example at a time.
    pub program: Program,
    /// Many at once, where the network allows.
    pub(crate) batched: Program,
    /// What the search decides about.
    pub parts: Vec<Part>,
    /// The latency model that says what bits save; measured when it is needed first.
    pub profile: Option<Profile>,
    config: QuantConfig,
    /// At eight and at four bits; nothing for products.
    weights: Vec<[Option<Arc<Weights>>; 2]>,
    ranges: Vec<Ranges>,
    shifts: Vec<Shifts>,
    pub(crate) floats: Vec<Ready>,
    halves: Vec<Ready>,
}

/// The place of a precision among those of 8 and 4 bits.
fn place(bits: u8) -> Option<usize> {
    match bits {
        8 => Some(0),
        4 => Some(1),
        _ => None,
    }
}

impl Quantiser {
    /// Calibrates a network on examples, whose labels are not looked at.
    ///
    /// # Errors
    /// When the examples do not fit the network.
    pub fn calibrate(
        mut program: Program,
        examples: &Examples,
        config: QuantConfig,
        cx: &Context,
    ) -> Result<Self> {
        if examples.is_empty() {
            return Err(Error::usage("there are no examples to calibrate with"));
        }
        if config.equalise && program.equalise() == 0 {
            cx.note("no two layers follow each other so that they could be equalised");
        }
        let floats: Vec<Ready> = program.units.iter().map(Ready::float).collect();
        let batched = program.with_batch(BATCH, &floats).unwrap_or_else(|| program.clone());
        let (ranges, grams) = observe(&batched, &floats, examples, &config, cx)?;
        let weights = round_weights(&program.units, &grams, &config, cx)?;
        let shifts = match config.bias_correct {
            true => mean_errors(&batched, &floats, &weights, &ranges, examples, cx)?,
            false => vec![Shifts::default(); program.units.len()],
        };
        let halves = program.units.iter().map(Ready::half).collect();
        let parts = Part::of(&program, config.granularity);
        Ok(Self { program, batched, parts, profile: None, config, weights, ranges, shifts, floats, halves })
    }

    /// The program for so many examples at once, or for [`BATCH`] of more.
    pub(crate) fn in_batches(&self, examples: usize) -> Program {
        let size = examples.clamp(1, BATCH);
        self.program.with_batch(size, &self.floats).unwrap_or_else(|| self.program.clone())
    }

    /// How it is quantised.
    pub fn config(&self) -> QuantConfig {
        self.config
    }

    /// Bits of every unit's weights and input in a configuration.
    pub fn pairs(&self, bits: &Bits) -> Vec<Pair> {
        let mut pairs = vec![Pair::of(16); self.program.units.len()];
        self.parts.iter().zip(bits).for_each(|(part, &bits)| part.set(&mut pairs[part.unit], bits));
        pairs.iter().enumerate().map(|(unit, &pair)| self.resolved(unit, pair)).collect()
    }

    /// Numbers of a table's rows are not rounded, and neither is what weights in groups are multiplied with.
    fn resolved(&self, unit: usize, pair: Pair) -> Pair {
        let work = self.program.units[unit].work;
        let in_groups = pair.weight == 4 && grouping(&self.program.units[unit], &self.config).is_some();
        if work == Work::Table || in_groups { Pair { input: 16, ..pair } } else { pair }
    }

    /// How a unit is rounded at these bits.
    pub fn numbers(&self, unit: usize, pair: Pair) -> Numbers {
        let pair = self.resolved(unit, pair);
        let (weight, input) = (place(pair.weight), place(pair.input));
        let ranges = &self.ranges[unit];
        let product = self.program.units[unit].work == Work::Product;
        let shifts = &self.shifts[unit];
        let parts = [weight.map(|at| &shifts.weight[at]), input.map(|at| &shifts.input[at])];
        let mut shift: Vec<f32> = Vec::new();
        for part in parts.into_iter().flatten().filter(|part| !part.is_empty()) {
            shift.resize(part.len(), 0.0);
            shift.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
        }
        Numbers {
            weights: weight.and_then(|at| self.weights[unit][at].clone()),
            input: input.map(|at| ranges.input[at]),
            second: weight.filter(|_| product).and_then(|at| ranges.second.map(|second| second[at])),
            shift,
        }
    }

    /// The unit of some parts, of which these alone are rounded.
    pub(crate) fn rounded_parts(&self, parts: &[usize], bits: u8) -> Ready {
        let mut pair = Pair::of(16);
        parts.iter().for_each(|&part| self.parts[part].set(&mut pair, bits));
        let unit = self.parts[parts[0]].unit;
        Ready::rounded(&self.program.units[unit], &self.numbers(unit, pair))
    }

    /// The units of a configuration as `make` makes them, those of 16 bits as they are.
    fn units(&self, bits: &Bits, make: fn(&Unit, &Numbers) -> Ready) -> Vec<Ready> {
        let unit = |(at, pair): (usize, Pair)| match self.numbers(at, pair) {
            numbers if numbers.is_float() => self.halves[at].clone(),
            numbers => make(&self.program.units[at], &numbers),
        };
        self.pairs(bits).into_iter().enumerate().map(unit).collect()
    }

    /// The units of a configuration, rounded as if quantised.
    fn as_if(&self, bits: &Bits) -> Vec<Ready> {
        self.units(bits, Ready::rounded)
    }

    /// The units of a configuration, in whole numbers where it says so, which pass between them where they can.
    pub fn real(&self, bits: &Bits) -> Vec<Ready> {
        self.program.fused(self.apart(bits))
    }

    /// The same with floats between all units.
    pub fn apart(&self, bits: &Bits) -> Vec<Ready> {
        self.units(bits, Ready::whole)
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

    /// Searches for the bits of every part.
    ///
    /// # Errors
    /// When the validation set does not fit or has no labels, the budget is too small, or the user stops it.
    pub fn search(
        &self,
        sensitivities: &Sensitivities,
        validation: &Examples,
        plan: &SearchPlan,
        trials: &mut Trials,
        cx: &Context,
        mut record: impl FnMut(&Tried) -> Result<()>,
    ) -> Result<Found> {
        let baseline = match trials.baseline {
            Some(baseline) => baseline,
            None => score(&self.float_logits(validation)?, &validation.labels, plan.metric),
        };
        trials.baseline = Some(baseline);
        let target = match (plan.max_drop, plan.metric) {
            (Some(drop), _) => baseline - drop,
            (None, Metric::Loss) => baseline / plan.target,
            (None, _) => baseline * plan.target,
        };
        let mut rng = cx.rng("order", plan.draw);
        let profile = plan.per_gain.then(|| self.profile.unwrap_or_else(Profile::measure));
        let mut order = |measured: &Measured, from: u8, to: u8| {
            let scores = match plan.uniform {
                true => (0..measured.noise.len()).map(|part| part as f64).collect(),
                false => measured.scores(plan.order, plan.lambda, plan.augment, &mut rng),
            };
            least_first(&match &profile {
                Some(profile) => per_gain(&scores, &self.gains(profile, from, to)),
                None => scores,
            })
        };
        let eight = plan.bits.contains(&8);
        let order8 = order(&sensitivities.eight, 16, 8);
        let order4 = order(&sensitivities.four, if eight { 8 } else { 16 }, 4);
        let (none, parts) = (Vec::new(), self.parts.len());
        let goal = Goal {
            target,
            order8: if eight { &order8 } else { &none },
            order4: if plan.bits.contains(&4) { &order4 } else { &none },
            pinned: &plan.pinned,
            refine: plan.refine,
        };
        let bar = cx.progress(2 * (parts.ilog2() as u64 + 2), "search");
        let mut evaluate = |bits: &Bits| {
            if cx.interrupted() {
                return Err(Error::interrupted("the search was stopped"));
            }
            // In whole numbers, as the network will be run: rounded floats differ where a number is at the border of two steps.
            let metric = score(&self.real_logits(bits, validation)?, &validation.labels, plan.metric);
            record(&Tried { bits: bits.clone(), metric })?;
            bar.inc(1);
            Ok(metric)
        };
        let Some(budget) = plan.max_bytes else {
            let bits = search(parts, &goal, trials, evaluate)?;
            return Ok(Found { bits, baseline, target: Some(target) });
        };
        let bits = within(parts, budget, &goal, |bits| self.bytes(bits).0)
            .ok_or_else(|| self.over_budget(budget, plan))?;
        trials.metric(&bits, &mut evaluate)?;
        Ok(Found { bits, baseline, target: None })
    }

    /// Makes sure that a budget of bytes can be kept at all.
    ///
    /// # Errors
    /// When the fewest bits take more.
    pub fn check_budget(&self, plan: &SearchPlan) -> Result<()> {
        match plan.max_bytes {
            Some(budget) if self.least_bytes(plan) > budget => Err(self.over_budget(budget, plan)),
            _ => Ok(()),
        }
    }

    /// Bytes with the fewest bits that a plan allows.
    fn least_bytes(&self, plan: &SearchPlan) -> usize {
        let fewest = plan.bits.iter().copied().min().unwrap_or(16);
        let mut bits: Bits = vec![fewest; self.parts.len()];
        plan.pinned.iter().for_each(|(&part, &pinned)| bits[part] = pinned);
        self.bytes(&bits).0
    }

    fn over_budget(&self, budget: usize, plan: &SearchPlan) -> Error {
        let least = self.least_bytes(plan);
        Error::usage(format!("--max-bytes {budget}: the weights take {least} at the least"))
            .hint("allow more bytes, or fewer bits with --bits")
    }

    /// The time that fewer bits save each part's unit, by the latency model.
    fn gains(&self, profile: &Profile, from: u8, to: u8) -> Vec<f64> {
        let gain = |part: &Part| {
            let [before, after] = [from, to].map(|bits| {
                profile.unit(&self.program.units[part.unit], self.resolved(part.unit, Pair::of(bits)))
            });
            before - after
        };
        self.parts.iter().map(gain).collect()
    }

    /// Seconds for one example of a configuration, by the latency model.
    pub fn latency(&self, profile: &Profile, bits: &Bits) -> f64 {
        self.program.units.iter().zip(self.pairs(bits)).map(|(unit, pair)| profile.unit(unit, pair)).sum()
    }

    /// Bytes of a configuration's weights, and of the network with sixteen bits everywhere.
    pub fn bytes(&self, bits: &Bits) -> (usize, usize) {
        let of = |pairs: &[Pair]| -> usize {
            let unit = |(at, pair): (usize, &Pair)| {
                let unit = &self.program.units[at];
                let scales = place(pair.weight).and_then(|at_bits| self.weights[at][at_bits].as_ref());
                let more = scales.map_or(0, |weights| 4 * (weights.scales.len() - unit.rows()));
                unit.bytes(pair.weight) + more
            };
            pairs.iter().enumerate().map(unit).sum::<usize>() + self.program.other_bytes()
        };
        (of(&self.pairs(bits)), of(&vec![Pair::of(16); self.program.units.len()]))
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
    /// Most bytes of the weights, instead of anything that the metric must reach.
    pub max_bytes: Option<usize>,
    /// Precisions that may be used, of 16, 8 and 4.
    pub bits: Vec<u8>,
    /// By what units are ordered.
    pub order: Order,
    /// Weight of the dependencies.
    pub lambda: f64,
    /// Which of them.
    pub augment: Augment,
    /// Whether scores are divided by the time that fewer bits save.
    pub per_gain: bool,
    /// Bits that parts must have.
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
            max_bytes: None,
            bits: vec![16, 8, 4],
            order: Order::Augmented,
            lambda: 1.0,
            augment: Augment::Both,
            per_gain: false,
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
    /// Bits of every part.
    pub bits: Bits,
    /// The metric of the network as it was.
    pub baseline: f64,
    /// What had to be reached; nothing within a budget of bytes.
    pub target: Option<f64>,
}

/// Examples of a program's batch that are not there to fill it up.
pub(crate) fn in_batch(examples: &Examples, number: usize, program: &Program) -> usize {
    (examples.len() - number * program.batch()).min(program.batch())
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

pub(crate) fn rows(logits: &TensorData, batch: usize) -> Vec<Vec<f32>> {
    let values: Vec<f32> = logits.iter::<f32>().collect();
    values.chunks((values.len() / batch.max(1)).max(1)).map(<[f32]>::to_vec).collect()
}

/// Logits of examples, `[examples, classes]`.
///
/// # Errors
/// When the examples do not fit.
pub fn logits(program: &Program, ready: &[Ready], examples: &Examples) -> Result<Vec<Vec<f32>>> {
    // Whole batches at the same time: within one, threads would wait for each other after every unit.
    let batch = |(inputs, _)| Ok(rows(&program.run(&[inputs], ready)?[0], program.batch()));
    let all: Vec<_> = batches(examples, program.batch()).collect();
    let mut all = all.into_par_iter().map(batch).collect::<Result<Vec<_>>>()?.concat();
    all.truncate(examples.len());
    Ok(all)
}

/// The sum of the cross-entropies of the rows that have labels.
pub(crate) fn total_loss(logits: &[Vec<f32>], labels: &[usize]) -> f64 {
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
