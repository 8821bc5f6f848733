//! Classifiers whose weights a hypernetwork makes, trained on users' rows.

use std::path::Path;

use burn::tensor::{Device, DispatchTensor, Tensor};
use kiln_core::{Context, Error, ModelFolder, Network, Port, PortKind, Result};
use kiln_nn::Task;
use rand::RngExt;
use rand::seq::SliceRandom;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::conditioning::{Condition, Conditioning};
use crate::data::{Coded, Coding};
use crate::hypernet::{HyperNet, HyperNetConfig};
use crate::target::Target;
use crate::training::{cross_entropy, probabilities};

/// The slug, and the kind of model folders.
pub const KIND: &str = "hypernet";
/// Draws of the weights a step, where noise alone is what they depend on.
const DRAWS: usize = 4;
/// Rows with weights of their own that are predicted at once.
const AT_ONCE: usize = 256;

/// What `config.json` holds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Config {
    /// The network whose weights are made.
    pub target: Target,
    /// The network that makes them.
    pub hyper: HyperNetConfig,
    /// From users' rows to numbers.
    pub coding: Coding,
}

impl Config {
    /// Makes sure that target, hypernetwork and data speak of the same numbers.
    ///
    /// # Errors
    /// Names what differs.
    pub fn check(&self) -> Result<()> {
        let (inputs, outputs) = (self.target.inputs(), self.target.outputs()?);
        let (features, classes) = (self.coding.features.len(), self.coding.classes.len());
        if inputs != features {
            return Err(Error::usage(format!(
                "the target takes {inputs} numbers, the data have {features} features"
            )));
        }
        if outputs != classes {
            return Err(Error::usage(format!(
                "the target has {outputs} outputs, the data have {classes} classes"
            )));
        }
        if self.hyper.target != self.target.spec()? {
            return Err(Error::usage("the hypernetwork makes the weights of another target"));
        }
        for part in &self.hyper.conditioning {
            match *part {
                Conditioning::Task { tasks, .. } if tasks != self.coding.tasks.len() => {
                    let known = self.coding.tasks.len();
                    return Err(Error::usage(format!(
                        "the hypernetwork has {tasks} tasks, the data {known}"
                    )));
                }
                Conditioning::Data { inputs, .. } if inputs != features => {
                    return Err(Error::usage(format!(
                        "the encoder takes {inputs} numbers, the data have {features}"
                    )));
                }
                Conditioning::Given { dim } if dim != self.coding.columns.given.len() => {
                    let columns = self.coding.columns.given.len();
                    return Err(Error::usage(format!(
                        "the descriptors have {dim} numbers, the data {columns} columns"
                    )));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// Reads a model folder.
///
/// # Errors
/// When it is missing, of another kind, or damaged.
pub fn open(path: &Path, cx: &Context) -> Result<(Config, HyperNet)> {
    let folder = ModelFolder::new(path);
    let config: Config = folder.config(KIND)?;
    config.check().map_err(|e| Error::input(folder.file("config.json").display(), e))?;
    // Drawn apart from other threads, although all of it is replaced: Burn's generator is shared.
    let hyper = folder.weights()?.into_module(config.hyper.draw(cx, "replaced")?)?;
    Ok((config, hyper))
}

/// Whether every row has weights of its own.
fn one_a_row(parts: &[Conditioning]) -> bool {
    parts.iter().any(|part| matches!(part, Conditioning::Data { .. } | Conditioning::Given { .. }))
}

fn has_noise(parts: &[Conditioning]) -> bool {
    parts.iter().any(|part| matches!(part, Conditioning::Noise { .. }))
}

/// Rows by their task; all in one group where weights depend on none.
fn by_task(rows: &Coded) -> Vec<Vec<usize>> {
    let tasks = rows.tasks.iter().max().map_or(1, |last| last + 1);
    let mut groups = vec![Vec::new(); tasks];
    for row in 0..rows.len() {
        groups[rows.tasks.get(row).copied().unwrap_or(0)].push(row);
    }
    groups.retain(|group| !group.is_empty());
    groups
}

/// Classification of rows.
pub struct ClassificationTask<'a> {
    /// What the model is.
    pub config: &'a Config,
    /// What is trained on.
    pub train: &'a Coded,
    /// What is validated on.
    pub valid: &'a Coded,
    /// Rows a batch.
    pub batch: usize,
    /// What the squares of all embeddings count in the loss.
    pub emb_l2: f64,
    /// Device and random streams.
    pub cx: &'a Context,
    groups: Vec<Vec<usize>>,
}

impl<'a> ClassificationTask<'a> {
    /// A task before its first step.
    pub fn new(
        config: &'a Config,
        train: &'a Coded,
        valid: &'a Coded,
        batch: usize,
        cx: &'a Context,
    ) -> Self {
        Self { config, train, valid, batch, emb_l2: 0.0, cx, groups: by_task(train) }
    }

    /// Rows of a step: one a set, as many of every task, or as many for every draw of the noise.
    fn draw(&self, step: usize) -> Vec<Vec<usize>> {
        let mut rng = self.cx.rng("batch", step as u64);
        let parts = &self.config.hyper.conditioning;
        if one_a_row(parts) {
            return (0..self.batch).map(|_| vec![rng.random_range(0..self.train.len())]).collect();
        }
        let sets = if self.groups.len() > 1 {
            self.groups.len()
        } else if has_noise(parts) {
            DRAWS
        } else {
            1
        };
        let rows = self.batch.div_ceil(sets);
        (0..sets)
            .map(|set| {
                let group = &self.groups[set % self.groups.len()];
                (0..rows).map(|_| group[rng.random_range(0..group.len())]).collect()
            })
            .collect()
    }
}

impl Task<HyperNet> for ClassificationTask<'_> {
    fn loss(&mut self, hyper: &HyperNet, step: usize) -> Result<(Tensor<1>, usize)> {
        let parts = &self.config.hyper.conditioning;
        let batch = self.train.batch(&self.draw(step), parts, ("noise", step as u64), self.cx);
        let theta = hyper.generate(&batch.condition)?.flat;
        let loss = cross_entropy(self.config.target.forward(theta, batch.x), batch.y);
        let loss = match self.emb_l2 {
            0.0 => loss,
            strength => hyper
                .conditioner
                .tables
                .iter()
                .chain(hyper.makers.iter().filter_map(|maker| maker.embeddings.as_ref()))
                .fold(loss, |loss, table| loss + table.val().square().sum() * strength),
        };
        Ok((loss, self.batch))
    }

    fn validate(&mut self, hyper: &HyperNet) -> Result<f64> {
        let samples = if has_noise(&self.config.hyper.conditioning) { DRAWS } else { 1 };
        let draws = predict(self.config, hyper, self.valid, samples, self.cx)?;
        Ok(crate::apps::uncertainty::mean_nll(&mean(&draws), &self.valid.y))
    }

    fn settings(&self) -> Map<String, Value> {
        let settings = [("batch", self.batch), ("train_rows", self.train.len())];
        let mut settings: Map<String, Value> =
            settings.into_iter().map(|(name, value)| (name.to_string(), value.into())).collect();
        if self.emb_l2 > 0.0 {
            settings.insert("emb_l2".into(), self.emb_l2.into());
        }
        settings
    }
}

/// Probabilities `[row][class]` of every draw of the noise; of one, where there is none.
///
/// # Errors
/// When the rows do not fit the model.
pub fn predict(
    config: &Config,
    hyper: &HyperNet,
    rows: &Coded,
    samples: usize,
    cx: &Context,
) -> Result<Vec<Vec<f32>>> {
    let parts = &config.hyper.conditioning;
    let samples = if has_noise(parts) { samples } else { 1 };
    let classes = config.coding.classes.len();
    let sets: Vec<Vec<Vec<usize>>> = match one_a_row(parts) {
        true => (0..rows.len())
            .map(|row| vec![row])
            .collect::<Vec<_>>()
            .chunks(AT_ONCE)
            .map(<[_]>::to_vec)
            .collect(),
        // One set of weights for all rows of a task, made once.
        false => by_task(rows).into_iter().map(|group| vec![group]).collect(),
    };
    let mut draws = vec![vec![0.0; rows.len() * classes]; samples];
    for (number, draw) in draws.iter_mut().enumerate() {
        for groups in &sets {
            let batch = rows.batch(groups, parts, ("predict", number as u64), cx);
            let theta = hyper.generate(&batch.condition)?.flat;
            let p = probabilities(config.target.forward(theta, batch.x));
            for (&row, p) in groups.iter().flatten().zip(p.chunks(classes)) {
                draw[row * classes..(row + 1) * classes].copy_from_slice(p);
            }
        }
    }
    Ok(draws)
}

/// The mean over draws.
pub fn mean(draws: &[Vec<f32>]) -> Vec<f32> {
    (0..draws[0].len()).map(|i| draws.iter().map(|draw| draw[i]).sum::<f32>() / draws.len() as f32).collect()
}

/// Splits off a share of the rows at random.
pub fn split(rows: &Coded, share: f64, cx: &Context) -> (Coded, Coded) {
    let mut order: Vec<usize> = (0..rows.len()).collect();
    order.shuffle(&mut cx.rng("split", 0));
    let valid = ((rows.len() as f64 * share).round() as usize).clamp(1, rows.len().max(2) - 1);
    (rows.select(&order[valid..]), rows.select(&order[..valid]))
}

/// The target with the weights of every task, for capture: one row in, the logits of all tasks out.
pub(crate) struct Classifier {
    target: Target,
    theta: Tensor<2>,
    classes: usize,
}

impl Classifier {
    pub fn open(path: &Path, cx: &Context) -> Result<Self> {
        let (config, hyper) = open(path, cx)?;
        let [Conditioning::Task { tasks, .. }] = config.hyper.conditioning[..] else {
            return Err(Error::input(path.display(), "has weights that depend on more than the task")
                .hint("only models conditioned on tasks have weights that are known beforehand"));
        };
        let theta = hyper.generate(&Condition::tasks((0..tasks).collect::<Vec<_>>()))?.flat;
        Ok(Self { classes: config.coding.classes.len(), target: config.target, theta })
    }
}

impl Network for Classifier {
    fn kind(&self) -> &str {
        KIND
    }

    fn inputs(&self) -> Vec<Port> {
        vec![Port { name: "x".into(), kind: PortKind::Float, shape: vec![1, self.target.inputs()] }]
    }

    fn outputs(&self) -> Vec<Port> {
        let shape = vec![self.theta.dims()[0], 1, self.classes];
        vec![Port { name: "logits".into(), kind: PortKind::Float, shape }]
    }

    fn move_to(&mut self, device: &Device) {
        self.theta = self.theta.clone().to_device(device);
    }

    fn forward(&self, inputs: Vec<DispatchTensor>) -> Vec<DispatchTensor> {
        let run = |x: DispatchTensor| {
            let x = Tensor::<2>::from_dispatch(x);
            let ([rows, width], [tasks, _]) = (x.dims(), self.theta.dims());
            let x = x.unsqueeze::<3>().expand([tasks, rows, width]);
            self.target.forward(self.theta.clone(), x).into_dispatch()
        };
        inputs.into_iter().map(run).collect()
    }
}
