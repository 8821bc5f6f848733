//! Effects of a treatment on each unit: networks of both outcomes that share softly through a hypernetwork.
//!
//! All learners see covariates x, treatment t and the outcome y of that treatment alone, and tell the outcomes of both;
//! the effect is their difference. The *S-learner* has t among the covariates, the *T-learner* a network for each t,
//! *TARNet* (Shalit et al., arXiv 1606.03976) a shared representation with a head for each t. Here a hypernetwork makes
//! TARNet's heads from an embedding of t, so that they share what they have in common. With noise beside the embedding
//! the heads become a distribution, and every effect gets a deviation, as in [`uncertainty`](crate::apps::uncertainty).

use std::path::Path;

use burn::module::Module;
use burn::tensor::{Tensor, TensorData, activation};
use kiln_core::{Context, Error, Result, Table as Sheet};
use kiln_data::{Table, TableOptions};
use rand::seq::SliceRandom;
use rand::{Rng, RngExt};

use crate::apps::uncertainty::nearest_log_distance;
use crate::apps::{Findings, Spread};
use crate::conditioning::{Condition, Conditioning, NoiseLaw};
use crate::data::{interleaved, numbers};
use crate::generator::Arch;
use crate::hypernet::{HyperNet, HyperNetConfig, OutputScheme};
use crate::target::Target;
use crate::training::{Fit, Plain, fit_best, normal, normals};

/// Units in an optimisation step.
const BATCH: usize = 100;
/// Width of the noise.
const NOISE: usize = 4;
/// Draws of the noise in a step.
const DRAWS: usize = 5;
/// Standard deviation of the prior of a weight that depends on noise.
const PRIOR: f64 = 0.3;
/// Deviations on either side of a mean within which 95 % of a normal distribution lie.
const NORMAL_95: f64 = 1.96;
/// Columns that tell what a model must find out; never features unless named.
const ANSWERS: [&str; 3] = ["y_cfactual", "mu0", "mu1"];

/// Units with a treatment and its outcome.
#[derive(Debug, Clone)]
pub struct Units {
    /// Number of covariates.
    pub width: usize,
    /// `[units, width]`
    pub x: Vec<f32>,
    /// 0 or 1.
    pub treated: Vec<bool>,
    /// Outcomes.
    pub y: Vec<f64>,
    /// True effects, where they are known.
    pub effects: Option<Vec<f64>>,
}

impl Units {
    /// Reads a table. Features are all other columns but `y_cfactual`, `mu0` and `mu1` unless named; the last two,
    /// where they are there, are the noiseless outcomes that effects are judged by.
    ///
    /// # Errors
    /// Names the column that is missing, or the row and column that holds no number or a treatment other than 0 or 1.
    pub fn read(path: &Path, treatment: &str, outcome: &str, features: &[String]) -> Result<Self> {
        let table = Table::read(path, TableOptions::default())?;
        let column = |name: &str| match table.column(name) {
            Some(column) => numbers(path, column),
            None => Err(table.no_column(name)),
        };
        let (t, y) = (column(treatment)?, column(outcome)?);
        let is_feature = |name: &&str| *name != treatment && *name != outcome && !ANSWERS.contains(name);
        let names: Vec<&str> = match features {
            [] => table.columns().iter().map(|column| column.name.as_str()).filter(is_feature).collect(),
            names => names.iter().map(String::as_str).collect(),
        };
        if names.is_empty() {
            return Err(Error::input(path.display(), "has no column left for features"));
        }
        let arm = |(row, t): (usize, &f64)| match t {
            0.0 => Ok(false),
            1.0 => Ok(true),
            other => {
                let place = format!("{}, row {}", path.display(), row + 1);
                Err(Error::input(place, format!("the treatment \"{treatment}\" is {other}, must be 0 or 1")))
            }
        };
        let covariates = names.iter().map(|name| column(name)).collect::<Result<Vec<_>>>()?;
        let effects = match ["mu0", "mu1"].map(|name| table.column(name)) {
            [Some(mu0), Some(mu1)] => {
                let (mu0, mu1) = (numbers(path, mu0)?, numbers(path, mu1)?);
                Some(mu1.iter().zip(&mu0).map(|(b, a)| b - a).collect())
            }
            _ => None,
        };
        let units = Self {
            width: names.len(),
            x: interleaved(&covariates, table.rows()),
            treated: t.iter().enumerate().map(arm).collect::<Result<_>>()?,
            y,
            effects,
        };
        let arms = [false, true].map(|arm| units.treated.iter().filter(|&&t| t == arm).count());
        if arms.iter().any(|&units| units < 10) {
            let found = format!("has {} untreated and {} treated units", arms[0], arms[1]);
            return Err(Error::input(path.display(), found).hint("effects need at least 10 of each"));
        }
        Ok(units)
    }

    /// 747 units of the kind of IHDP's response surface B (Hill 2011): 6 normal and 19 binary covariates, 19 % treated,
    /// `μ0 = exp((x + 0.5) w)`, `μ1 = x w - ω` with an average effect of 4, and noise of deviation 1.
    pub fn synthetic(rng: &mut impl Rng) -> Self {
        const UNITS: usize = 747;
        const NORMAL: usize = 6;
        const WIDTH: usize = 25;
        let coefficients = [0.0, 0.1, 0.2, 0.3, 0.4];
        let weights: Vec<f64> = (0..WIDTH)
            .map(|_| {
                // 0 with probability 0.6, the others with 0.1 each.
                let u = rng.random::<f64>();
                if u < 0.6 { 0.0 } else { coefficients[1 + ((u - 0.6) * 10.0) as usize % 4] }
            })
            .collect();
        let lean: Vec<f64> = (0..WIDTH).map(|_| 0.4 * normal(rng)).collect();
        let (mut x, mut treated, mut outcomes) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..UNITS {
            let row: Vec<f64> = (0..WIDTH)
                .map(|c| if c < NORMAL { normal(rng) } else { f64::from(u8::from(rng.random_bool(0.5))) })
                .collect();
            let dot = |shift: f64, by: &[f64]| row.iter().zip(by).map(|(x, w)| (x + shift) * w).sum::<f64>();
            let propensity = 1.0 / (1.0 + (1.6 - dot(-0.25, &lean)).exp());
            treated.push(rng.random_bool(propensity));
            outcomes.push((dot(0.5, &weights).min(4.0).exp(), dot(0.0, &weights)));
            x.extend(row.iter().map(|&x| x as f32));
        }
        let omega = outcomes.iter().map(|(mu0, mu1)| mu1 - mu0).sum::<f64>() / UNITS as f64 - 4.0;
        let y = outcomes.iter().zip(&treated).map(|((mu0, mu1), &t)| {
            let mean = if t { mu1 - omega } else { *mu0 };
            mean + normal(rng)
        });
        let y: Vec<f64> = y.collect();
        let effects = outcomes.iter().map(|(mu0, mu1)| mu1 - omega - mu0).collect();
        Self { width: WIDTH, x, treated, y, effects: Some(effects) }
    }
}

/// What decides the outcome.
#[derive(Debug, Clone)]
pub struct Config {
    /// Width of all hidden layers.
    pub hidden: usize,
    /// Width of the treatment's embedding.
    pub emb_dim: usize,
    /// Numbers in a chunk of a head's weights.
    pub chunk: usize,
    /// Optimisation steps.
    pub steps: usize,
    /// Learning rate.
    pub lr: f64,
    /// Draws of the noise that effects are the means of, where the heads are also made with noise.
    pub samples: Option<usize>,
    /// Factor of prior and entropy of weights that depend on noise; 1 is the variational bound itself.
    pub temper: f64,
}

impl Default for Config {
    fn default() -> Self {
        Self { hidden: 32, emb_dim: 4, chunk: 128, steps: 1000, lr: 2e-3, samples: None, temper: 1.0 }
    }
}

/// Networks that tell the outcomes of both treatments.
trait Learner: Module {
    /// Outcomes without and with the treatment, `[2, units]`, for covariates `[1, units, width]`.
    fn outcomes(&self, x: Tensor<3>) -> Result<Tensor<2>>;
}

/// The treatment is one more covariate.
#[derive(Module, Debug)]
struct SLearner {
    net: Plain,
    #[module(skip)]
    target: Target,
}

impl Learner for SLearner {
    fn outcomes(&self, x: Tensor<3>) -> Result<Tensor<2>> {
        let [_, units, _] = x.dims();
        let device = x.device();
        let with = |t: f32| Tensor::cat(vec![x.clone(), Tensor::full([1, units, 1], t, &device)], 2);
        let both = Tensor::cat(vec![with(0.0), with(1.0)], 1); // one network, all units twice
        Ok(self.target.forward(self.net.theta.val(), both).reshape([2, units]))
    }
}

/// A network for each treatment.
#[derive(Module, Debug)]
struct TLearner {
    nets: Plain,
    #[module(skip)]
    target: Target,
}

impl Learner for TLearner {
    fn outcomes(&self, x: Tensor<3>) -> Result<Tensor<2>> {
        let [_, units, width] = x.dims();
        Ok(self.target.forward(self.nets.theta.val(), x.expand([2, units, width])).reshape([2, units]))
    }
}

/// A shared representation, and a head for each treatment.
#[derive(Module, Debug)]
struct TarNet {
    representation: Plain,
    heads: Plain,
    #[module(skip)]
    targets: [Target; 2],
}

impl Learner for TarNet {
    fn outcomes(&self, x: Tensor<3>) -> Result<Tensor<2>> {
        Ok(both_heads(&self.targets, self.representation.theta.val(), self.heads.theta.val(), x))
    }
}

/// The same with heads that a hypernetwork makes.
#[derive(Module, Debug)]
struct HyperTarNet {
    representation: Plain,
    heads: HyperNet,
    #[module(skip)]
    targets: [Target; 2],
}

impl Learner for HyperTarNet {
    fn outcomes(&self, x: Tensor<3>) -> Result<Tensor<2>> {
        let heads = self.heads.generate(&Condition::tasks([0, 1]))?.flat;
        Ok(both_heads(&self.targets, self.representation.theta.val(), heads, x))
    }
}

/// The same with heads that also depend on noise: as many outcomes as there are draws.
#[derive(Module, Debug)]
struct NoisyTarNet {
    representation: Plain,
    heads: HyperNet,
    #[module(skip)]
    targets: [Target; 2],
}

impl NoisyTarNet {
    /// Weights of both heads for every draw of the noise `[draws, NOISE]`: `[2 draws, N]`.
    fn make_heads(&self, noise: Tensor<2>) -> Result<Tensor<2>> {
        let [draws, width] = noise.dims();
        let twice = noise.unsqueeze_dim::<3>(1).expand([draws, 2, width]).reshape([2 * draws, width]);
        let tasks = (0..2 * draws).map(|set| set % 2).collect::<Vec<_>>();
        Ok(self.heads.generate(&Condition { noise: Some(twice), ..Condition::tasks(tasks) })?.flat)
    }

    /// Outcomes `[2 draws, units]`.
    fn outcomes(&self, heads: Tensor<2>, x: Tensor<3>) -> Tensor<2> {
        both_heads(&self.targets, self.representation.theta.val(), heads, x)
    }
}

/// Outcomes `[heads, units]` of heads that share a representation; every other one is that of the treated.
fn both_heads(targets: &[Target; 2], representation: Tensor<2>, heads: Tensor<2>, x: Tensor<3>) -> Tensor<2> {
    let ([_, units, _], [count, _]) = (x.dims(), heads.dims());
    let shared = activation::relu(targets[0].forward(representation, x));
    let width = shared.dims()[2];
    targets[1].forward(heads, shared.expand([count, units, width])).reshape([count, units])
}

/// Effects of one learner on all units, and how well they agree with the truth where it is known.
#[derive(Debug, Clone)]
pub struct Estimate {
    /// Its name.
    pub learner: &'static str,
    /// Number of parameters.
    pub parameters: usize,
    /// Estimated effect on every unit.
    pub effects: Vec<f64>,
    /// How far its draws lie apart, where there are several.
    pub deviations: Option<Vec<f64>>,
    /// √PEHE on units that were trained or validated on, and on the others.
    pub pehe: Option<[f64; 2]>,
    /// Error of the average effect on the same.
    pub ate_error: Option<[f64; 2]>,
    /// [`coverage`] of the test units, where effects have deviations.
    pub coverage: Option<f64>,
}

/// `√mean((τ̂ - τ)²)` over some units.
pub fn root_pehe(found: &[f64], truth: &[f64], units: &[usize]) -> f64 {
    (units.iter().map(|&i| (found[i] - truth[i]).powi(2)).sum::<f64>() / units.len() as f64).sqrt()
}

/// `|mean τ̂ - mean τ|` over some units.
pub fn ate_error(found: &[f64], truth: &[f64], units: &[usize]) -> f64 {
    (units.iter().map(|&i| found[i] - truth[i]).sum::<f64>() / units.len() as f64).abs()
}

/// The share of some units whose true effect lies within 1.96 deviations of the estimated one: 0.95 where deviations
/// are right.
pub fn coverage(found: &[f64], deviations: &[f64], truth: &[f64], units: &[usize]) -> f64 {
    let covers = |&&i: &&usize| (found[i] - truth[i]).abs() <= NORMAL_95 * deviations[i];
    units.iter().filter(covers).count() as f64 / units.len() as f64
}

/// Data as the learners see them, split 63 / 27 / 10.
struct Prepared<'a> {
    units: &'a Units,
    /// Standardised by the mean and deviation of those trained on, as are outcomes.
    x: Vec<f32>,
    y: Vec<f32>,
    deviation: f64,
    train: Vec<usize>,
    valid: Vec<usize>,
    test: Vec<usize>,
}

impl<'a> Prepared<'a> {
    fn new(units: &'a Units, cx: &Context) -> Self {
        let count = units.y.len();
        let mut order: Vec<usize> = (0..count).collect();
        order.shuffle(&mut cx.rng("split", 0));
        let (train, rest) = order.split_at(count * 63 / 100);
        let (valid, test) = rest.split_at(count * 27 / 100);
        let moments = |values: &dyn Fn(usize) -> f64| {
            let mean = train.iter().map(|&i| values(i)).sum::<f64>() / train.len() as f64;
            let variance =
                train.iter().map(|&i| (values(i) - mean).powi(2)).sum::<f64>() / train.len() as f64;
            (mean, if variance > 1e-12 { variance.sqrt() } else { 1.0 })
        };
        let mut x = units.x.clone();
        for column in 0..units.width {
            let (mean, deviation) = moments(&|i| f64::from(units.x[i * units.width + column]));
            for i in 0..count {
                let at = i * units.width + column;
                x[at] = ((f64::from(x[at]) - mean) / deviation) as f32;
            }
        }
        let (mean, deviation) = moments(&|i| units.y[i]);
        let y = units.y.iter().map(|y| ((y - mean) / deviation) as f32).collect();
        Self { units, x, y, deviation, train: train.into(), valid: valid.into(), test: test.into() }
    }

    /// Covariates `[1, units, width]` of some units.
    fn covariates(&self, units: &[usize], cx: &Context) -> Tensor<3> {
        let width = self.units.width;
        let rows: Vec<f32> =
            units.iter().flat_map(|&i| self.x[i * width..(i + 1) * width].to_vec()).collect();
        Tensor::from_data(TensorData::new(rows, [1, units.len(), width]), &cx.device)
    }

    /// Mean squared error of the outcomes that were seen, over all draws of `outcomes`, `[2 draws, units]`.
    fn loss(&self, outcomes: Tensor<2>, units: &[usize], cx: &Context) -> Tensor<1> {
        let (draws, count) = (outcomes.dims()[0] / 2, units.len());
        let seen = |arm: bool| units.iter().map(move |&i| f32::from(u8::from(self.units.treated[i] == arm)));
        let seen: Vec<f32> = seen(false).chain(seen(true)).collect();
        let seen = Tensor::<3>::from_data(TensorData::new(seen, [1, 2, count]), &cx.device);
        let y: Vec<f32> = units.iter().map(|&i| self.y[i]).collect();
        let y = Tensor::<3>::from_data(TensorData::new(y, [1, 1, count]), &cx.device);
        ((outcomes.reshape([draws, 2, count]) * seen).sum_dim(1) - y).square().mean()
    }

    /// Units of a step.
    fn draw(&self, step: usize, cx: &Context) -> Vec<usize> {
        let mut rng = cx.rng("causal batch", step as u64);
        (0..BATCH).map(|_| self.train[rng.random_range(0..self.train.len())]).collect()
    }

    fn estimate<L: Learner>(
        &self,
        name: &'static str,
        learner: L,
        config: &Config,
        cx: &Context,
    ) -> Result<Estimate> {
        let schedule = Fit { steps: config.steps, lr: config.lr, validate_every: 20 };
        let learner = fit_best(
            learner,
            schedule,
            cx,
            |learner, step| {
                let units = self.draw(step, cx);
                Ok(self.loss(learner.outcomes(self.covariates(&units, cx))?, &units, cx))
            },
            |learner| {
                let outcomes = learner.outcomes(self.covariates(&self.valid, cx))?;
                Ok(self.loss(outcomes, &self.valid, cx).into_scalar::<f32>().into())
            },
        )?;
        let all: Vec<usize> = (0..self.y.len()).collect();
        let effects = self.effects(learner.outcomes(self.covariates(&all, cx))?).swap_remove(0);
        Ok(self.judge(name, learner.num_params(), effects, None))
    }

    /// The same for heads that depend on noise. The loss is a variational bound: the likelihood of the outcomes with the
    /// variance of the residuals, a Gaussian prior on the heads' weights, and their entropy, which keeps the draws apart.
    fn estimate_noisy(
        &self,
        name: &'static str,
        learner: NoisyTarNet,
        config: &Config,
        samples: usize,
        cx: &Context,
    ) -> Result<Estimate> {
        let schedule = Fit { steps: config.steps, lr: config.lr, validate_every: 20 };
        let noise = |stream: &str, number: usize, draws| {
            normals(draws, NOISE, &mut cx.rng(stream, number as u64), &cx.device)
        };
        let share = config.temper / self.train.len() as f64;
        let learner = fit_best(
            learner,
            schedule,
            cx,
            |learner, step| {
                let units = self.draw(step, cx);
                let heads = learner.make_heads(noise("causal noise", step, DRAWS))?;
                let numbers = 2 * heads.dims()[1];
                let error =
                    self.loss(learner.outcomes(heads.clone(), self.covariates(&units, cx)), &units, cx);
                let prior = heads.clone().square().sum() / (2.0 * PRIOR * PRIOR * DRAWS as f64);
                // Both heads of a draw are one point.
                let entropy = nearest_log_distance(&heads.reshape([DRAWS, numbers])) * numbers as f64;
                Ok(error.clamp_min(1e-9).log() * 0.5 + (prior - entropy) * share)
            },
            |learner| {
                let heads = learner.make_heads(noise("causal validation", 0, DRAWS))?;
                let outcomes = learner.outcomes(heads, self.covariates(&self.valid, cx));
                Ok(self.loss(outcomes, &self.valid, cx).into_scalar::<f32>().into())
            },
        )?;
        let all: Vec<usize> = (0..self.y.len()).collect();
        let heads = learner.make_heads(noise("causal draws", 0, samples))?;
        let draws = self.effects(learner.outcomes(heads, self.covariates(&all, cx)));
        let over = |unit: usize, value: &dyn Fn(f64) -> f64| {
            draws.iter().map(|draw| value(draw[unit])).sum::<f64>() / samples as f64
        };
        let effects: Vec<f64> = all.iter().map(|&unit| over(unit, &|effect| effect)).collect();
        let deviation = |&unit: &usize| over(unit, &|effect| (effect - effects[unit]).powi(2)).sqrt();
        let deviations = all.iter().map(deviation).collect();
        Ok(self.judge(name, learner.num_params(), effects, Some(deviations)))
    }

    /// Effects of every draw of outcomes `[2 draws, units]`, in the outcome's own unit.
    fn effects(&self, outcomes: Tensor<2>) -> Vec<Vec<f64>> {
        let units = outcomes.dims()[1];
        let outcomes: Vec<f64> = outcomes.into_data().iter::<f64>().collect();
        let effects = |both: &[f64]| {
            let (without, with) = both.split_at(units);
            with.iter().zip(without).map(|(b, a)| (b - a) * self.deviation).collect()
        };
        outcomes.chunks(2 * units).map(effects).collect()
    }

    fn judge(
        &self,
        name: &'static str,
        parameters: usize,
        effects: Vec<f64>,
        deviations: Option<Vec<f64>>,
    ) -> Estimate {
        let within: Vec<usize> = self.train.iter().chain(&self.valid).copied().collect();
        let parts = [&within, &self.test];
        let truth = self.units.effects.as_ref();
        let covered = |deviations: &Vec<f64>| Some(coverage(&effects, deviations, truth?, &self.test));
        Estimate {
            learner: name,
            parameters,
            pehe: truth.map(|truth| parts.map(|units| root_pehe(&effects, truth, units))),
            ate_error: truth.map(|truth| parts.map(|units| ate_error(&effects, truth, units))),
            coverage: deviations.as_ref().and_then(covered),
            effects,
            deviations,
        }
    }
}

/// Estimates the effects with all four learners; the hypernetwork's come first, and with noise last.
///
/// # Errors
/// When a training fails or is stopped, or there are no samples.
pub fn estimate(config: &Config, units: &Units, cx: &Context) -> Result<Vec<Estimate>> {
    if config.samples == Some(0) {
        return Err(Error::usage("0 samples have no mean").hint("raise --samples"));
    }
    let prepared = Prepared::new(units, cx);
    let (width, hidden) = (units.width, config.hidden);
    let whole = |inputs: usize| Target::mlp(&[inputs, hidden, hidden, 1]);
    let targets = [Target::mlp(&[width, hidden, hidden]), Target::mlp(&[hidden, hidden, 1])];
    let representation = || Plain::new(&targets[0], 1, cx, "representation");
    let task = Conditioning::Task { tasks: 2, dim: config.emb_dim };
    let made = HyperNetConfig::new(targets[1].spec()?)
        .with_conditioning([task.clone()])
        .with_scheme(OutputScheme::Chunk { chunk: config.chunk, emb_dim: 8 })
        .with_arch(Arch::Mlp(vec![hidden]));
    let hyper = HyperTarNet {
        representation: representation()?,
        heads: made.draw(cx, "heads")?,
        targets: targets.clone(),
    };
    let tarnet = TarNet {
        representation: representation()?,
        heads: Plain::new(&targets[1], 2, cx, "heads")?,
        targets: targets.clone(),
    };
    let t = TLearner { nets: Plain::new(&whole(width), 2, cx, "nets")?, target: whole(width) };
    let s = SLearner { net: Plain::new(&whole(width + 1), 1, cx, "nets")?, target: whole(width + 1) };
    let mut estimates = vec![
        prepared.estimate("hypernetwork", hyper, config, cx)?,
        prepared.estimate("TARNet", tarnet, config, cx)?,
        prepared.estimate("T-learner", t, config, cx)?,
        prepared.estimate("S-learner", s, config, cx)?,
    ];
    if let Some(samples) = config.samples {
        let noise = Conditioning::Noise { dim: NOISE, law: NoiseLaw::Normal };
        let noisy = NoisyTarNet {
            representation: representation()?,
            heads: made.with_conditioning([task, noise]).draw(cx, "heads")?,
            targets,
        };
        estimates.push(prepared.estimate_noisy("hypernetwork with noise", noisy, config, samples, cx)?);
    }
    Ok(estimates)
}

/// The IHDP replications among the shared data, or one of the same kind that is drawn.
///
/// # Errors
/// When a file there is damaged.
pub fn bundled(replications: usize, cx: &Context) -> Result<(Vec<Units>, String)> {
    let folder = kiln_data::shared_dir().map(|shared| shared.join("data/ihdp")).filter(|path| path.is_dir());
    match folder {
        Some(folder) => {
            let read = |number: usize| {
                Units::read(&folder.join(format!("ihdp_{number}.csv")), "treatment", "y_factual", &[])
            };
            let units = (1..=replications).map(read).collect::<Result<Vec<_>>>()?;
            Ok((units, format!("IHDP, {replications} replications")))
        }
        None => {
            let draw = |number| Units::synthetic(&mut cx.rng("units", number as u64));
            Ok(((0..replications).map(draw).collect(), format!("{replications} draws of IHDP's kind")))
        }
    }
}

/// Compares the learners on units whose effects are known.
///
/// # Errors
/// As [`estimate`].
pub fn run(
    config: &Config,
    sets: &[Units],
    what: &str,
    cx: &Context,
) -> Result<(Findings, Vec<Vec<Estimate>>)> {
    let mut all = Vec::new();
    for (number, units) in sets.iter().enumerate() {
        cx.note(format!("effects of the treatment, {what}: number {}", number + 1));
        all.push(estimate(config, units, cx)?);
    }
    let mut table = Sheet::new(
        format!("Effects of a treatment ({what})"),
        &["learner", "parameters", "√PEHE within", "√PEHE test", "error of the mean effect, test"],
    );
    for learner in 0..all[0].len() {
        let spread = |pick: &dyn Fn(&Estimate) -> Option<f64>| {
            let values: Vec<f64> = all.iter().filter_map(|estimates| pick(&estimates[learner])).collect();
            if values.is_empty() { "unknown".into() } else { Spread::of(&values).text() }
        };
        table.row([
            all[0][learner].learner.to_string(),
            all[0][learner].parameters.to_string(),
            spread(&|e| Some(e.pehe?[0])),
            spread(&|e| Some(e.pehe?[1])),
            spread(&|e| Some(e.ate_error?[1])),
        ]);
    }
    let mut notes = vec![format!(
        "Effects: {} steps each, the weights with the lowest error of the seen outcomes on 27 % of the units; 10 % are for \
         tests. Effects themselves are used for nothing but the figures.",
        config.steps
    )];
    let covered: Vec<f64> = all.iter().flatten().filter_map(|estimate| estimate.coverage).collect();
    if !covered.is_empty() {
        notes.push(format!(
            "With noise: the true effect lies within 1.96 deviations of the mean over draws for a share of {} of the test \
             units (0.95 would be right).",
            Spread::of(&covered).text()
        ));
    }
    Ok((Findings { table, plots: Vec::new(), notes }, all))
}

/// The mean over sets of units of a learner's √PEHE on the test units.
pub fn mean_test_pehe(all: &[Vec<Estimate>], learner: &str) -> f64 {
    let of = |estimates: &Vec<Estimate>| {
        estimates.iter().find(|estimate| estimate.learner == learner)?.pehe.map(|pehe| pehe[1])
    };
    let values: Vec<f64> = all.iter().filter_map(of).collect();
    Spread::of(&values).mean
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_effects_by_hand() {
        let (found, truth) = ([1.0, 3.0, 9.0], [2.0, 1.0, 0.0]);
        assert!((root_pehe(&found, &truth, &[0, 1]) - 2.5f64.sqrt()).abs() < 1e-12);
        assert_eq!(ate_error(&found, &truth, &[0, 1]), 0.5);
        // Errors of 1, 2 and 9 where 1.96, 1.96 and 0.2 are allowed.
        assert_eq!(coverage(&found, &[1.0, 1.0, 0.1], &truth, &[0, 1]), 0.5);
        assert_eq!(coverage(&found, &[1.0, 1.0, 0.1], &truth, &[0, 1, 2]), 1.0 / 3.0);
    }

    #[test]
    fn drawn_units_have_an_average_effect_of_four_and_few_treated() {
        let units = Units::synthetic(&mut kiln_core::random_stream(0, "units", 0));
        let effects = units.effects.unwrap();
        let mean = effects.iter().sum::<f64>() / effects.len() as f64;
        assert!((mean - 4.0).abs() < 1e-9, "{mean}");
        let treated = units.treated.iter().filter(|&&t| t).count();
        assert!((75..300).contains(&treated), "{treated}");
        assert_eq!(units.x.len(), 747 * 25);
    }

    /// With one draw the loss and the effects are those of a network without noise; with more they are its means.
    #[test]
    fn outcomes_of_several_draws_count_evenly() {
        let cx = Context::for_tests("unused");
        let units = Units::synthetic(&mut cx.rng("units", 0));
        let prepared = Prepared::new(&units, &cx);
        let draw = |number| normals(2, 3, &mut cx.rng("outcomes", number), &cx.device);
        let loss = |outcomes| f64::from(prepared.loss(outcomes, &[0, 1, 2], &cx).into_scalar::<f32>());
        let both = Tensor::cat(vec![draw(0), draw(1)], 0);
        assert!((loss(both.clone()) - (loss(draw(0)) + loss(draw(1))) / 2.0).abs() < 1e-5);
        let effects = prepared.effects(both);
        assert_eq!(effects, [prepared.effects(draw(0)), prepared.effects(draw(1))].concat());
    }
}
