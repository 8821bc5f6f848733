//! A new domain from a handful of labelled rows: only the domain's embedding is learned, the hypernetwork stays.
//!
//! Domains are digits turned by an angle each, or a user's. Baselines: one network for all domains, as it is and fine-tuned on the
//! same rows.

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use kiln_core::{Context, Error, Result, Table};
use kiln_nn::Weights;

use crate::apps::{Findings, Parts, Spread};
use crate::conditioning::{Condition, Conditioning};
use crate::generator::Arch;
use crate::hypernet::{HyperNet, HyperNetConfig, Init, OutputScheme};
use crate::target::Target;
use crate::training::{Fit, Labelled, Plain, accuracy_of, cross_entropy, fit, stack};

/// The name of the tasks' embeddings among the parameters of a hypernetwork.
const TABLE: &str = "conditioner.tables.0";

/// What decides the outcome.
#[derive(Debug, Clone)]
pub struct Config {
    /// Which of the domains is new.
    pub held_out: usize,
    /// Labelled rows of the new domain.
    pub labelled: usize,
    /// Optimisation steps on the known domains, and on the new one.
    pub steps: [usize; 2],
    /// Repetitions.
    pub seeds: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self { held_out: 2, labelled: 20, steps: [1500, 200], seeds: 1 }
    }
}

/// Images of 8 × 8 pixels turned about their middle, with bilinear sampling and zeros around them.
pub fn turned(rows: &Labelled, degrees: f64) -> Labelled {
    const SIZE: usize = 8;
    let (sin, cos) = degrees.to_radians().sin_cos();
    let middle = (SIZE as f64 - 1.0) / 2.0;
    let turn = |image: &[f32]| -> Vec<f32> {
        let pixel = |row: f64, column: f64| -> f64 {
            let inside = |x: f64| (0.0..SIZE as f64).contains(&x);
            if inside(row) && inside(column) {
                f64::from(image[row as usize * SIZE + column as usize])
            } else {
                0.0
            }
        };
        (0..SIZE * SIZE)
            .map(|at| {
                let (y, x) = ((at / SIZE) as f64 - middle, (at % SIZE) as f64 - middle);
                let (row, column) = (cos * y - sin * x + middle, sin * y + cos * x + middle);
                let (top, left) = (row.floor(), column.floor());
                let (down, right) = (row - top, column - left);
                let value = (1.0 - down)
                    * ((1.0 - right) * pixel(top, left) + right * pixel(top, left + 1.0))
                    + down * ((1.0 - right) * pixel(top + 1.0, left) + right * pixel(top + 1.0, left + 1.0));
                value as f32
            })
            .collect()
    };
    Labelled { x: rows.x.chunks(SIZE * SIZE).flat_map(turn).collect(), ..rows.clone() }
}

/// The digits turned by each of these angles as domains.
pub fn turned_digits(angles: &[f64]) -> Vec<Parts> {
    let all = Parts::digits(&[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
    let domain = |&degrees: &f64| Parts {
        name: format!("{degrees}°"),
        train: turned(&all.train, degrees),
        test: turned(&all.test, degrees),
        classes: all.classes,
    };
    angles.iter().map(domain).collect()
}

/// An embedding that is learned on its own.
#[derive(Module, Debug)]
struct Embedding {
    /// `[1, dim]`
    vector: Param<Tensor<2>>,
}

/// Accuracies on the new domain's test images.
#[derive(Debug, Clone, Copy)]
struct Accuracies {
    adapted: f64,
    unadapted: f64,
    pooled: f64,
    fine_tuned: f64,
}

/// Compares ways to a new domain.
///
/// # Errors
/// When the configuration makes no sense, or a training fails or is stopped.
pub fn run(config: &Config, domains: &[Parts], cx: &Context) -> Result<(Findings, [f64; 3])> {
    if domains.len() < 2 || config.held_out >= domains.len() {
        let message = format!("domain {} cannot be held out of {}", config.held_out, domains.len());
        return Err(Error::usage(message).hint("there must be at least two, numbered from 0"));
    }
    let mut all = Vec::new();
    for seed in 0..config.seeds {
        let cx = &Context { seed: cx.seed + seed, ..cx.clone() };
        cx.note(format!("a new domain, seed {}", cx.seed));
        all.push(once(config, domains, cx)?);
    }
    let spread = |pick: fn(&Accuracies) -> f64| Spread::of(&all.iter().map(pick).collect::<Vec<_>>());
    let rows = [
        ("hypernetwork, new embedding", spread(|a| a.adapted)),
        ("hypernetwork, mean of the known embeddings", spread(|a| a.unadapted)),
        ("one network for all domains", spread(|a| a.pooled)),
        ("the same, fine-tuned", spread(|a| a.fine_tuned)),
    ];
    let mut table = Table::new(
        format!("The domain {} from {} labelled rows", domains[config.held_out].name, config.labelled),
        &["method", "accuracy"],
    );
    for (name, accuracy) in &rows {
        table.row([name.to_string(), accuracy.text()]);
    }
    let notes = vec![format!(
        "A new domain: known ones are {}; {} steps there, {} on the new rows.",
        known(config, domains).map(|domain| domain.name.clone()).collect::<Vec<_>>().join(", "),
        config.steps[0],
        config.steps[1]
    )];
    Ok((Findings { table, plots: Vec::new(), notes }, [rows[0].1.mean, rows[2].1.mean, rows[3].1.mean]))
}

fn known<'a>(config: &Config, domains: &'a [Parts]) -> impl Iterator<Item = &'a Parts> {
    let held_out = config.held_out;
    domains.iter().enumerate().filter(move |(number, _)| *number != held_out).map(|(_, domain)| domain)
}

fn once(config: &Config, domains: &[Parts], cx: &Context) -> Result<Accuracies> {
    const BATCH: usize = 32; // rows of each domain
    let Parts { train: rows, test, classes, .. } = &domains[config.held_out];
    let target = Target::mlp(&[rows.width, 64, *classes]);
    let train: Vec<&Labelled> = known(config, domains).map(|domain| &domain.train).collect();
    let new = rows.few(config.labelled.div_ceil(*classes), &mut cx.rng("labelled", 0));
    let new = new.select(&(0..config.labelled.min(new.len())).collect::<Vec<_>>());
    let batches = |step: usize| -> Vec<Labelled> {
        let mut rng = cx.rng("batch", step as u64);
        train.iter().map(|rows| rows.draw(BATCH, &mut rng)).collect()
    };

    let hyper_config = HyperNetConfig::new(target.spec()?)
        .with_conditioning([Conditioning::Task { tasks: train.len(), dim: 4 }])
        .with_scheme(OutputScheme::Chunk { chunk: 512, emb_dim: 8 })
        .with_arch(Arch::Mlp(vec![64]))
        .with_init(Init::Small);
    let all: Vec<usize> = (0..train.len()).collect();
    let hyper =
        fit(hyper_config.draw(cx, "hypernet")?, Fit::new(config.steps[0], 1e-3), cx, |hyper, step| {
            let (x, y) = stack(&batches(step), &cx.device);
            let theta = hyper.generate(&Condition::tasks(all.clone()))?.flat;
            Ok(cross_entropy(target.forward(theta, x), y))
        })?;
    let start = hyper.conditioner.tables[0].val().mean_dim(0);
    let unadapted = accuracy_of(&target, with_embedding(&hyper, start.clone())?, test, cx);
    let (x, y) = new.tensors(&cx.device);
    let embedding = Embedding { vector: Param::from_tensor(start) };
    let embedding = fit(embedding, Fit::new(config.steps[1], 5e-2), cx, |embedding, _| {
        let theta = with_embedding(&hyper, embedding.vector.val())?;
        Ok(cross_entropy(target.forward(theta, x.clone()), y.clone()))
    })?;
    let adapted = accuracy_of(&target, with_embedding(&hyper, embedding.vector.val())?, test, cx);

    let net = Plain::new(&target, 1, cx, "plain")?;
    let net = fit(net, Fit::new(config.steps[0], 2e-3), cx, |net, step| {
        let (x, y) = Labelled::join(&batches(step)).tensors(&cx.device);
        Ok(cross_entropy(target.forward(net.theta.val(), x), y))
    })?;
    let pooled = accuracy_of(&target, net.theta.val(), test, cx);
    let net = fit(net, Fit::new(config.steps[1], 1e-3), cx, |net, _| {
        Ok(cross_entropy(target.forward(net.theta.val(), x.clone()), y.clone()))
    })?;
    Ok(Accuracies { adapted, unadapted, pooled, fine_tuned: accuracy_of(&target, net.theta.val(), test, cx) })
}

/// What a hypernetwork makes for a task with this embedding, `[1, N]`; gradients reach the embedding.
fn with_embedding(hyper: &HyperNet, vector: Tensor<2>) -> Result<Tensor<2>> {
    let known = hyper.conditioner.tables[0].val();
    let [tasks, width] = known.dims();
    let mut weights = Weights::new();
    // In place of the first task's.
    weights.insert(TABLE, Tensor::cat(vec![vector, known.slice([1..tasks, 0..width])], 0));
    Ok(weights.fill(hyper)?.generate(&Condition::tasks([0]))?.flat)
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_data::digits;

    #[test]
    fn four_quarter_turns_give_the_image_back() {
        let rows = Labelled::digits(digits::train(), &[3]).select(&[0, 1]);
        assert_eq!(turned(&rows, 0.0).x, rows.x);
        let around = (0..4).fold(rows.clone(), |rows, _| turned(&rows, 90.0));
        for (a, b) in around.x.iter().zip(&rows.x) {
            assert!((a - b).abs() < 1e-5);
        }
    }
}
