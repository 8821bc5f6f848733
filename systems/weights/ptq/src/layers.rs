//! What quantising did to each layer: which one rounds coarsely, which one cuts off, and which one costs the accuracy.

use burn::tensor::DType;
use burn_flex::FlexTensor;
use kiln_core::{Context, Error, Result};
use kiln_ops::flex;
use kiln_ops::quantised::Affine;
use serde::Serialize;

use crate::data::Examples;
use crate::program::{Program, Values};
use crate::quantise::{batches, rows, total_loss};
use crate::quantiser::{Symmetric, largest};
use crate::ready::Ready;
use crate::store::Quantised;
use crate::unit::{Pair, Work};

/// What is exactly the same counts as so many decibels.
pub const EXACT: f64 = 200.0;

/// Examples at once.
const BATCH: usize = 64;

/// Signal and noise, summed up.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Noise {
    signal: f64,
    noise: f64,
    most: f64,
}

impl Noise {
    /// Adds numbers as they should be and as they are.
    pub fn add(&mut self, expected: &[f32], found: &[f32]) {
        for (&expected, &found) in expected.iter().zip(found) {
            let difference = f64::from(expected) - f64::from(found);
            self.signal += f64::from(expected).powi(2);
            self.noise += difference * difference;
            self.most = self.most.max(difference.abs());
        }
    }

    /// Signal over noise.
    pub fn decibels(&self) -> f64 {
        (10.0 * (self.signal / self.noise.max(1e-300)).log10()).clamp(-EXACT, EXACT)
    }
}

/// One unit of a quantised network beside the network that it was made from.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Layer {
    /// Its name.
    pub unit: String,
    /// Bits of weights and input.
    #[serde(flatten)]
    pub bits: Pair,
    /// Signal over noise of its weights, in decibels; nothing for products.
    pub weights_db: Option<f64>,
    /// Of its input by rounding it, apart from what units before did to it.
    pub rounding_db: Option<f64>,
    /// The share of its input that was cut off.
    pub clipped: Option<f64>,
    /// Signal over noise of what it reads: the work of all units before.
    pub reads_db: f64,
    /// The largest difference there.
    pub reads_max: f64,
    /// What the loss rises by when it alone is quantised.
    pub alone: Option<f64>,
    /// What the loss falls by when it alone is not: what more bits for it would gain.
    pub restored: Option<f64>,
}

/// A quantised network beside the one that it was made from.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Layers {
    /// How many examples were run.
    pub examples: usize,
    /// In the order of the network.
    pub layers: Vec<Layer>,
    /// Signal over noise of the logits.
    pub output_db: f64,
    /// The largest difference there.
    pub output_max: f64,
    /// The loss as it was and quantised; nothing without labels.
    pub loss: Option<[f64; 2]>,
}

/// What is summed up of a unit.
#[derive(Debug, Clone, Copy, Default)]
struct Sums {
    reads: Noise,
    rounding: Noise,
    clipped: usize,
    seen: usize,
    alone: f64,
    restored: f64,
}

impl Layers {
    /// Runs both networks on the examples, and with labels also each with one unit of the other.
    ///
    /// # Errors
    /// When the networks differ in their units, the examples do not fit, or the user stops it.
    pub fn compare(
        first: &Program,
        first_ready: &[Ready],
        second: &Quantised,
        examples: &Examples,
        cx: &Context,
    ) -> Result<Self> {
        let units = first.units.len();
        if units != second.program.units.len() {
            let found = format!("the networks have {units} and {} units", second.program.units.len());
            return Err(Error::usage(found).hint("one must have been made from the other"));
        }
        let both = first.with_batch(BATCH, first_ready).zip(second.program.with_batch(BATCH, &second.ready));
        let (one, other) = both.unwrap_or_else(|| (first.clone(), second.program.clone()));
        let second_ready = second.apart();
        let labelled = !examples.labels.is_empty();
        let mut sums = vec![Sums::default(); units];
        let (mut outputs, mut losses) = (Noise::default(), [0.0; 2]);
        let bar = cx.progress(examples.len() as u64, "comparing");
        for (number, (inputs, labels)) in batches(examples, one.batch()).enumerate() {
            // The last batch is filled up.
            let real = (examples.len() - number * one.batch()).min(one.batch());
            let part = |x: &FlexTensor| -> Vec<f32> {
                let x = flex::floats(x);
                x[..x.len() / one.batch() * real].to_vec()
            };
            let mut seen: Vec<Vec<f32>> = vec![Vec::new(); units];
            let mut before = one.begin(std::slice::from_ref(&inputs))?;
            one.run_from(0, &mut before, first_ready, labelled, &mut |unit, x, _| {
                if x.dtype() == DType::F32 {
                    seen[unit] = part(x);
                }
            });
            let mut after = other.begin(&[inputs])?;
            other.run_from(0, &mut after, &second_ready, labelled, &mut |unit, x, second_operand| {
                if x.dtype() != DType::F32 {
                    return;
                }
                let (sums, numbers, x) = (&mut sums[unit], &second.numbers[unit], part(x));
                sums.reads.add(&seen[unit], &x);
                if let Some(input) = &numbers.input {
                    sums.round(&x, &input.affine());
                }
                if let (Some(how), Some(x)) = (&numbers.second, second_operand) {
                    sums.round_evenly(&part(x), how);
                }
            });
            let loss = |program: &Program, values: &mut Values| {
                total_loss(&rows(&program.read_outputs(values)[0], program.batch()), &labels)
            };
            let logits = |program: &Program, values: &mut Values| {
                let all: Vec<f32> = program.read_outputs(values)[0].iter::<f32>().collect();
                all[..all.len() / program.batch() * real].to_vec()
            };
            outputs.add(&logits(&one, &mut before), &logits(&other, &mut after));
            if labelled {
                let base = [loss(&one, &mut before), loss(&other, &mut after)];
                losses = [losses[0] + base[0], losses[1] + base[1]];
                for (at, sums) in sums.iter_mut().enumerate() {
                    if cx.interrupted() {
                        return Err(Error::interrupted("stopped while layers were compared"));
                    }
                    if second.numbers[at].is_float() {
                        continue;
                    }
                    let changed = |program: &Program, from: &Values, ready: &[Ready], unit: &Ready| {
                        let mut ready = ready.to_vec();
                        ready[at] = unit.clone();
                        let mut values = from.clone();
                        program.run_from(program.step_of(at), &mut values, &ready, false, &mut |_, _, _| {});
                        loss(program, &mut values)
                    };
                    sums.alone += changed(&one, &before, first_ready, &second_ready[at]) - base[0];
                    sums.restored += base[1] - changed(&other, &after, &second_ready, &first_ready[at]);
                }
            }
            bar.inc(real as u64);
        }
        let mean = |sum: f64| sum / examples.len().max(1) as f64;
        let layer = |at: usize| {
            let (sums, numbers, unit) = (&sums[at], &second.numbers[at], &first.units[at]);
            let mut weights = Noise::default();
            weights.add(&unit.weight, &second.program.units[at].weight);
            let rounds = sums.seen > 0;
            let quantised = labelled && !numbers.is_float();
            Layer {
                unit: unit.name.clone(),
                bits: second.pairs[at],
                weights_db: (unit.work != Work::Product).then(|| weights.decibels()),
                rounding_db: rounds.then(|| sums.rounding.decibels()),
                clipped: rounds.then(|| sums.clipped as f64 / sums.seen as f64),
                reads_db: sums.reads.decibels(),
                reads_max: sums.reads.most,
                alone: quantised.then(|| mean(sums.alone)),
                restored: quantised.then(|| mean(sums.restored)),
            }
        };
        Ok(Self {
            examples: examples.len(),
            layers: (0..units).map(layer).collect(),
            output_db: outputs.decibels(),
            output_max: outputs.most,
            loss: labelled.then(|| losses.map(mean)),
        })
    }

    /// The units whose bits cost the most, the worst first: those without which the loss would be less.
    pub fn worst(&self, count: usize) -> Vec<&Layer> {
        let mut costly: Vec<&Layer> =
            self.layers.iter().filter(|layer| layer.restored.is_some_and(|gain| gain > 0.0)).collect();
        costly.sort_by(|a, b| b.restored.unwrap_or(0.0).total_cmp(&a.restored.unwrap_or(0.0)));
        costly.truncate(count);
        costly
    }
}

impl Sums {
    fn round(&mut self, x: &[f32], how: &Affine) {
        self.rounding.add(x, &how.floats(&how.quantise(x)));
        let (zero, most) = (f32::from(how.zero), f32::from(how.most));
        let ends = [(-zero - 0.5) * how.scale, (most - zero + 0.5) * how.scale];
        self.clipped += x.iter().filter(|&&x| x < ends[0] || x > ends[1]).count();
        self.seen += x.len();
    }

    fn round_evenly(&mut self, x: &[f32], how: &Symmetric) {
        let found: Vec<f32> = x.iter().map(|&x| how.value(how.quantise(x.into())) as f32).collect();
        self.rounding.add(x, &found);
        let end = (f64::from(largest(how.bits)) + 0.5) * how.scale;
        self.clipped += x.iter().filter(|&&x| f64::from(x).abs() > end).count();
        self.seen += x.len();
    }
}
