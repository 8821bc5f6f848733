//! The review's illustration: the same target trained directly and through a hypernetwork, for one problem and for many.

use std::time::Instant;

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use kiln_core::{Context, Plot, Result, Table};
use kiln_data::digits;

use crate::apps::transfer::turned;
use crate::apps::{Findings, Spread};
use crate::conditioning::{Condition, Conditioning};
use crate::generator::Arch;
use crate::hypernet::{HyperNet, HyperNetConfig, Init, OutputScheme};
use crate::target::Target;
use crate::training::{Fit, Labelled, Plain, accuracy_of, cross_entropy, fit, stack};

const ALL: [u8; 10] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9];
/// Sizes of the tasks' vectors at first that the hypernetwork is given, and learning rates that the networks are given; of
/// each the one with the lower loss on a fifth of the rows counts.
const SIZES: [f64; 2] = [1.0, 0.1];
const RATES: [f64; 2] = [2e-3, 5e-3];

/// What decides the outcome.
#[derive(Debug, Clone)]
pub struct Config {
    /// Optimisation steps.
    pub steps: usize,
    /// Rows of each class and task.
    pub rows: Vec<usize>,
    /// Degrees that the tasks are turned by.
    pub angles: Vec<f64>,
    /// Repetitions.
    pub seeds: u64,
}

impl Default for Config {
    fn default() -> Self {
        let angles = (0..6).map(|task| 15.0 * f64::from(task)).collect();
        Self { steps: 800, rows: vec![5, 20, 100], angles, seeds: 1 }
    }
}

/// Figures behind the claim about compression.
#[derive(Debug, Clone, Copy)]
pub struct Compression {
    /// Trainable parameters of the hypernetwork.
    pub parameters: usize,
    /// Of the target.
    pub target: usize,
    /// Accuracy of the target made by the hypernetwork, of that of the target trained directly.
    pub ratio: f64,
}

/// One problem: digits with the target 64-256-10, directly and through a chunked hypernetwork of fewer parameters.
///
/// # Errors
/// When a training fails or is stopped.
pub fn compression(config: &Config, cx: &Context) -> Result<(Findings, Compression)> {
    let target = Target::mlp(&[64, 256, 10]);
    let count = target.spec()?.numel();
    let (train, test) = (Labelled::digits(digits::train(), &ALL), Labelled::digits(digits::test(), &ALL));
    let hyper_config = HyperNetConfig::new(target.spec()?)
        .with_conditioning([Conditioning::Task { tasks: 1, dim: 4 }])
        .with_scheme(OutputScheme::Chunk { chunk: 256, emb_dim: 8 })
        .with_arch(Arch::Mlp(vec![32]));
    let (mut direct, mut made) = (Vec::new(), Vec::new());
    let (mut parameters, mut rates) = (0, [0.0; 2]);
    for seed in 0..config.seeds {
        let cx = &Context { seed: cx.seed + seed, ..cx.clone() };
        let batch = |step: usize| train.draw(64, &mut cx.rng("batch", step as u64)).tensors(&cx.device);
        let begun = Instant::now();
        let net =
            fit(Plain::new(&target, 1, cx, "plain")?, Fit::new(config.steps, 2e-3), cx, |net, step| {
                let (x, y) = batch(step);
                Ok(cross_entropy(target.forward(net.theta.val(), x), y))
            })?;
        rates[0] = config.steps as f64 / begun.elapsed().as_secs_f64();
        direct.push(accuracy_of(&target, net.theta.val(), &test, cx));
        let begun = Instant::now();
        let hyper = hyper_config.draw(cx, "hypernet")?;
        parameters = hyper.num_params();
        let hyper = fit(hyper, Fit::new(config.steps, 2e-3), cx, |hyper, step| {
            let (x, y) = batch(step);
            Ok(cross_entropy(target.forward(hyper.generate(&Condition::tasks([0]))?.flat, x), y))
        })?;
        rates[1] = config.steps as f64 / begun.elapsed().as_secs_f64();
        made.push(accuracy_of(&target, hyper.generate(&Condition::tasks([0]))?.flat, &test, cx));
    }
    let (direct, made) = (Spread::of(&direct), Spread::of(&made));
    let mut table = Table::new(
        "Digits with a target 64-256-10",
        &["trained", "parameters that are learned", "weights of the target", "accuracy", "steps a second"],
    );
    let rows =
        [("directly", count, direct, rates[0]), ("through a hypernetwork", parameters, made, rates[1])];
    for (name, parameters, accuracy, rate) in rows {
        table.row([
            name.into(),
            parameters.to_string(),
            count.to_string(),
            accuracy.text(),
            format!("{rate:.0}"),
        ]);
    }
    let found = Compression { parameters, target: count, ratio: made.mean / direct.mean };
    Ok((Findings { table, plots: Vec::new(), notes: Vec::new() }, found))
}

/// Many problems: one hypernetwork for all turned digits, and a network for each of its own, from few rows. Returns by
/// how much the hypernetwork is ahead with the fewest rows.
///
/// # Errors
/// When a training fails or is stopped.
pub fn sharing(config: &Config, cx: &Context) -> Result<(Findings, f64)> {
    let target = Target::mlp(&[64, 32, 10]);
    let tasks = config.angles.len();
    let hyper_config = HyperNetConfig::new(target.spec()?)
        .with_conditioning([Conditioning::Task { tasks, dim: 4 }])
        .with_scheme(OutputScheme::Chunk { chunk: 256, emb_dim: 8 })
        .with_arch(Arch::Mlp(vec![32]))
        .with_init(Init::Base);
    let domain = |images, degrees: &f64| turned(&Labelled::digits(images, &ALL), *degrees);
    let test: Vec<Labelled> = config.angles.iter().map(|angle| domain(digits::test(), angle)).collect();
    let mean_accuracy = |theta: Tensor<2>, cx: &Context| {
        let of = |task: usize| accuracy_of(&target, theta.clone().narrow(0, task, 1), &test[task], cx);
        (0..tasks).map(of).sum::<f64>() / tasks as f64
    };
    let all: Vec<usize> = (0..tasks).collect();
    let mut table = Table::new(
        format!("{tasks} tasks, digits turned by {:?}°: mean accuracy", config.angles),
        &["rows a class and task", "one hypernetwork", "a network for each", "parameters", "of the networks"],
    );
    let mut curves: [Vec<(f64, f64)>; 2] = Default::default();
    let mut ahead = f64::NAN;
    for (number, &rows) in config.rows.iter().enumerate() {
        let (mut joint, mut apart) = (Vec::new(), Vec::new());
        let mut parameters = [0, 0];
        for seed in 0..config.seeds {
            let cx = &Context { seed: cx.seed + seed, ..cx.clone() };
            let few = |(task, angle): (usize, &f64)| {
                domain(digits::train(), angle).few(rows, &mut cx.rng("few", task as u64))
            };
            let train: Vec<Labelled> = config.angles.iter().enumerate().map(few).collect();
            let batch = |sets: &[Labelled], step: usize| {
                let mut rng = cx.rng("batch", step as u64);
                stack(&sets.iter().map(|rows| rows.draw(32, &mut rng)).collect::<Vec<_>>(), &cx.device)
            };
            let made = |hyper: &HyperNet| Ok(hyper.generate(&Condition::tasks(all.clone()))?.flat);
            let share = |size: f64, sets: &[Labelled]| -> Result<HyperNet> {
                let mut hyper = hyper_config.draw(cx, "hypernet")?;
                let table = hyper.conditioner.tables[0].val() * size;
                hyper.conditioner.tables[0] = Param::from_tensor(table);
                fit(hyper, Fit::new(config.steps, 3e-3), cx, |hyper, step| {
                    let (x, y) = batch(sets, step);
                    Ok(cross_entropy(target.forward(made(hyper)?, x), y))
                })
            };
            let separate = |rate: f64, sets: &[Labelled]| -> Result<Plain> {
                let nets = Plain::new(&target, tasks, cx, "plain")?;
                fit(nets, Fit::new(config.steps, rate), cx, |nets, step| {
                    let (x, y) = batch(sets, step);
                    Ok(cross_entropy(target.forward(nets.theta.val(), x), y) * tasks as f64)
                })
            };
            let (learned, held_out): (Vec<Labelled>, Vec<Labelled>) =
                train.iter().map(apart_from_a_fifth).unzip();
            let (x, y) = stack(&held_out, &cx.device);
            let loss = |theta: Tensor<2>| -> f64 {
                cross_entropy(target.forward(theta, x.clone()), y.clone()).into_scalar::<f32>().into()
            };
            let size = least(&SIZES, |size| Ok(loss(made(&share(size, &learned)?)?)))?;
            let rate = least(&RATES, |rate| Ok(loss(separate(rate, &learned)?.theta.val())))?;
            let hyper = share(size, &train)?;
            parameters[0] = hyper.num_params();
            joint.push(mean_accuracy(made(&hyper)?, cx));
            let nets = separate(rate, &train)?;
            parameters[1] = nets.num_params();
            apart.push(mean_accuracy(nets.theta.val(), cx));
        }
        let (joint, apart) = (Spread::of(&joint), Spread::of(&apart));
        if number == 0 {
            ahead = joint.mean - apart.mean;
        }
        curves[0].push((rows as f64, joint.mean));
        curves[1].push((rows as f64, apart.mean));
        table.row([
            rows.to_string(),
            joint.text(),
            apart.text(),
            parameters[0].to_string(),
            parameters[1].to_string(),
        ]);
    }
    let [joint, apart] = curves;
    // A single number of rows makes no curve.
    let plots = (config.rows.len() > 1).then(|| {
        Plot::lines("Sharing between tasks", "rows a class and task", "mean accuracy")
            .series("one hypernetwork", joint)
            .series("a network for each", apart)
            .log_x()
    });
    Ok((Findings { table, plots: plots.into_iter().collect(), notes: Vec::new() }, ahead))
}

/// The value of which a figure is least.
fn least(values: &[f64], figure: impl Fn(f64) -> Result<f64>) -> Result<f64> {
    let figures = values.iter().map(|&value| Ok((figure(value)?, value))).collect::<Result<Vec<_>>>()?;
    Ok(figures.into_iter().min_by(|a, b| a.0.total_cmp(&b.0)).map_or(f64::NAN, |(_, value)| value))
}

/// Rows without every fifth of each class, at least one of them, and those.
fn apart_from_a_fifth(rows: &Labelled) -> (Labelled, Labelled) {
    let mut seen = std::collections::BTreeMap::new();
    let (mut learned, mut held_out) = (Vec::new(), Vec::new());
    for (row, class) in rows.y.iter().enumerate() {
        let count = seen.entry(class).or_insert(0usize);
        if *count % 5 == 0 {
            held_out.push(row)
        } else {
            learned.push(row)
        }
        *count += 1;
    }
    (rows.select(&learned), rows.select(&held_out))
}
