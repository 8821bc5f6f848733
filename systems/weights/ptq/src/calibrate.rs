//! What is found out from unlabelled examples before bits are decided about: ranges, rounded weights and mean errors.

use std::sync::Arc;

use kiln_core::{Context, Error, Result};
use kiln_ops::flex;

use crate::adaround::{Gram, learn};
use crate::data::Examples;
use crate::grouped::Grouped;
use crate::program::Program;
use crate::quantise::{QuantConfig, batches, in_batch};
use crate::quantiser::{Calibrator, Observer};
use crate::ready::Ready;
use crate::unit::{Numbers, Ranges, Unit, Weights, Work, channel_width};

/// Mean errors of each channel, for which its bias makes up; empty where that is not wanted.
#[derive(Debug, Clone, Default)]
pub(crate) struct Shifts {
    /// Of the weights, at eight and at four bits.
    pub weight: [Vec<f32>; 2],
    /// Of the input.
    pub input: [Vec<f32>; 2],
}

/// Neighbours that share a scale at four bits, where a unit's weights are in groups.
pub(crate) fn grouping(unit: &Unit, config: &QuantConfig) -> Option<usize> {
    config.group.filter(|&group| unit.work == Work::Linear && Grouped::fits(unit.shape[1], group))
}

/// Runs the network on the examples: the ranges of all operands, and what learning the rounding needs of them.
pub(crate) fn observe(
    program: &Program,
    floats: &[Ready],
    examples: &Examples,
    config: &QuantConfig,
    cx: &Context,
) -> Result<(Vec<Ranges>, Vec<Option<Gram>>)> {
    let mut observers: Vec<[Observer; 2]> = vec![Default::default(); program.units.len()];
    let mut grams: Vec<Option<Gram>> =
        program.units.iter().map(|unit| config.adaround.and_then(|_| Gram::new(unit))).collect();
    let mut rng = cx.rng("adaround", 0);
    let rounds = examples.len().div_ceil(program.batch());
    let bar = cx.progress(examples.len() as u64, "calibrating");
    for (number, (inputs, _)) in batches(examples, program.batch()).enumerate() {
        let real = in_batch(examples, number, program);
        let mut values = program.begin(&[inputs])?;
        let mut wrong = None;
        program.run_from(0, &mut values, floats, false, &mut |at, x, second| {
            let unit = &program.units[at];
            if unit.work == Work::Table {
                return;
            }
            let mut shape = x.layout().shape().to_vec();
            shape[0] = shape[0] / program.batch() * real;
            let x = flex::floats(x);
            let x = &x[..x.len() / program.batch() * real];
            if x.iter().any(|x| !x.is_finite()) {
                wrong.get_or_insert(at);
                return;
            }
            observers[at][0].observe(x);
            if let Some(second) = second {
                let second = flex::floats(second);
                observers[at][1].observe(&second[..second.len() / program.batch() * real]);
            }
            if let Some(gram) = &mut grams[at] {
                gram.observe(unit, x, &shape, rounds, &mut rng);
            }
        });
        if let Some(unit) = wrong {
            return Err(Error::work(format!(
                "what {} reads is not finite for some calibration examples",
                program.units[unit].name
            ))
            .hint("the network itself overflows on them"));
        }
        bar.inc(program.batch() as u64);
    }
    let range = |(unit, observers): (&Unit, &[Observer; 2])| {
        let second = (unit.work == Work::Product).then_some(&observers[1]);
        Ranges::of(&observers[0], second, config.calibrator)
    };
    Ok((program.units.iter().zip(&observers).map(range).collect(), grams))
}

/// Weights of all units at eight and at four bits.
pub(crate) fn round_weights(
    units: &[Unit],
    grams: &[Option<Gram>],
    config: &QuantConfig,
    cx: &Context,
) -> Result<Vec<[Option<Arc<Weights>>; 2]>> {
    let bar = config.adaround.map(|_| cx.progress(units.len() as u64, "learning to round"));
    let mut all = Vec::with_capacity(units.len());
    for (unit, gram) in units.iter().zip(grams) {
        if unit.weight.is_empty() {
            all.push([None, None]);
            continue;
        }
        let eight = Weights::of(unit, 8, Calibrator::Minmax, config.scales);
        let mut four = match grouping(unit, config) {
            Some(group) => Weights::grouped(unit, 4, group, Calibrator::Mse),
            None => Weights::of(unit, 4, Calibrator::Mse, config.scales),
        };
        if let (Some(steps), Some(gram)) = (config.adaround, gram) {
            if cx.interrupted() {
                return Err(Error::interrupted("stopped while the rounding was learnt"));
            }
            four = learn(unit, &four, gram, steps);
        }
        bar.iter().for_each(|bar| bar.inc(1));
        all.push([Some(Arc::new(eight)), Some(Arc::new(four))]);
    }
    Ok(all)
}

/// `E[y - y_q]` of each unit's channels, before anything follows the sums, with its weights or its input rounded.
pub(crate) fn mean_errors(
    program: &Program,
    floats: &[Ready],
    weights: &[[Option<Arc<Weights>>; 2]],
    ranges: &[Ranges],
    examples: &Examples,
    cx: &Context,
) -> Result<Vec<Shifts>> {
    let open: Vec<Unit> = program.units.iter().map(Unit::open).collect();
    let corrected = |unit: &Unit| matches!(unit.work, Work::Conv(_) | Work::Linear);
    let rounded = |at: usize| -> Vec<Ready> {
        let by_weight =
            weights[at].iter().map(|weights| Numbers { weights: weights.clone(), ..Numbers::default() });
        let by_input =
            ranges[at].input.iter().map(|&input| Numbers { input: Some(input), ..Numbers::default() });
        by_weight.chain(by_input).map(|numbers| Ready::rounded(&open[at], &numbers)).collect()
    };
    let rounded: Vec<Vec<Ready>> =
        (0..open.len()).map(|at| if corrected(&open[at]) { rounded(at) } else { Vec::new() }).collect();
    let exact: Vec<Ready> = open.iter().map(Ready::float).collect();
    let mut sums: Vec<Vec<Vec<f64>>> =
        open.iter().zip(&rounded).map(|(unit, all)| vec![vec![0.0; unit.rows()]; all.len()]).collect();
    let mut counts = vec![0usize; open.len()];
    let bar = cx.progress(examples.len() as u64, "correcting biases");
    for (number, (inputs, _)) in batches(examples, program.batch()).enumerate() {
        if cx.interrupted() {
            return Err(Error::interrupted("stopped while biases were corrected"));
        }
        let real = in_batch(examples, number, program);
        let mut values = program.begin(&[inputs])?;
        program.run_from(0, &mut values, floats, false, &mut |at, x, _| {
            if rounded[at].is_empty() {
                return;
            }
            let unit = &open[at];
            let y = exact[at].compute(unit, x.clone(), None);
            let width = channel_width(unit, &y.layout().shape().to_vec());
            let y = flex::floats(&y);
            let y = &y[..y.len() / program.batch() * real];
            counts[at] += y.len() / unit.rows();
            for (ready, sums) in rounded[at].iter().zip(&mut sums[at]) {
                let found = ready.compute(unit, x.clone(), None);
                let found = flex::floats(&found);
                for (place, (y, found)) in y.chunks(width).zip(found.chunks(width)).enumerate() {
                    let error: f64 = y.iter().zip(found).map(|(y, found)| f64::from(y - found)).sum();
                    let channel = place % unit.rows();
                    sums[channel] += error;
                }
            }
        });
        bar.inc(program.batch() as u64);
    }
    let mean = |sums: &[f64], count: usize| sums.iter().map(|sum| (sum / count as f64) as f32).collect();
    let shifts = |(sums, &count): (&Vec<Vec<f64>>, &usize)| match &sums[..] {
        [eight, four, input8, input4] => Shifts {
            weight: [mean(eight, count), mean(four, count)],
            input: [mean(input8, count), mean(input4, count)],
        },
        _ => Shifts::default(),
    };
    Ok(sums.iter().zip(&counts).map(shifts).collect())
}
