//! `kiln mip train`

use std::path::PathBuf;

use burn::module::Module;
use clap::{Args, ValueEnum};
use kiln_core::{Context, Error, Result};
use kiln_nn::{LrShare, Method, TrainConfig, TrainRun, TrainSummary};
use rand::seq::SliceRandom;
use serde::{Deserialize, Serialize};

use super::shape::{Norm, ShapeArgs};
use super::{ConditionsArgs, DataArgs, register, scale};
use crate::arms::Optimiser;
use crate::checkpoint::{Config, KIND, TaskKind};
use crate::classify::{ClassifyTask, Control, Given, Sampling, predict, predict_each, scores};
use crate::experiment::probe;
use crate::probing::{Probed, Probes};
use crate::unet::CLIP;

/// The command whose runs a model folder keeps.
const TRAIN: &str = "mip train";
/// Images that are passed through a network to measure proportionality.
pub(super) const PROBED: usize = 256;

#[derive(Debug, Args)]
pub(super) struct TrainArgs {
    #[command(flatten)]
    pub data: DataArgs,
    #[command(flatten)]
    conditions: ConditionsArgs,
    /// Model folder to write
    #[arg(long, required_unless_present = "resume")]
    out: Option<PathBuf>,
    /// Continue the run in this folder
    #[arg(long, value_name = "DIR", conflicts_with = "out")]
    resume: Option<PathBuf>,
    /// Steps of the whole run [default: 2000]
    #[arg(long)]
    steps: Option<usize>,
    #[command(flatten)]
    recipe: Recipe,
}

/// What is learned, by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum TaskName {
    /// To classify images
    Classify,
    /// The same with a distribution of networks, as --control noise
    Bayes,
    /// To deform one image into another
    Register,
    /// To tell what belongs to an object, at a scale of one's choice
    Scale,
}

impl TaskName {
    pub fn kind(self) -> TaskKind {
        match self {
            Self::Classify | Self::Bayes => TaskKind::Classify,
            Self::Register => TaskKind::Register,
            Self::Scale => TaskKind::Scale,
        }
    }

    /// What a condition means, where the task says it.
    pub fn control(self, control: Control) -> Control {
        if self == Self::Bayes { Control::Noise } else { control }
    }
}

/// What besides data, steps and seed decides the outcome.
#[derive(Debug, Clone, Args, Serialize, Deserialize)]
pub(super) struct Recipe {
    /// What is learned
    #[arg(long, value_enum, default_value = "classify", conflicts_with = "resume")]
    task: TaskName,
    #[command(flatten)]
    #[serde(flatten)]
    pub shape: ShapeArgs,
    /// What the condition means to a classifier, unless images have conditions of their own
    #[arg(long, value_enum, default_value = "rotation", conflicts_with_all = ["resume", "conditions"])]
    control: Control,
    /// How conditions are drawn
    #[arg(long, value_enum, default_value = "uniform", conflicts_with_all = ["resume", "conditions"])]
    pub gamma_sampling: Sampling,
    /// Images of a step
    #[arg(long, default_value_t = 64, conflicts_with = "resume")]
    pub batch: usize,
    /// Draw a condition for every image, not one for all images of a step
    #[arg(long, conflicts_with_all = ["resume", "conditions"])]
    #[serde(default)]
    per_sample: bool,
    /// What makes a step; sgd has a momentum of 0.9
    #[arg(long, value_enum, default_value = "adam", conflicts_with = "resume")]
    #[serde(default)]
    optim: Optimiser,
    /// Learning rate, the same in every step
    #[arg(long, default_value_t = 3e-4, conflicts_with = "resume")]
    lr: f64,
    /// Learning rate of the network's own weights [default: that of the hypernetwork]
    #[arg(long, conflicts_with_all = ["resume", "freeze_base"])]
    #[serde(default)]
    base_lr: Option<f64>,
    /// Largest norm of the gradients; 0 leaves them [default: 1 for networks over images, 0 for classifiers]
    #[arg(long, conflicts_with = "resume")]
    clip: Option<f64>,
    /// Share of the images that is held out for validation
    #[arg(long, default_value_t = 0.1, conflicts_with = "resume")]
    pub val_fraction: f64,
    /// Steps between validations
    #[arg(long, default_value_t = 200, conflicts_with = "resume")]
    eval_every: usize,
    /// Steps between checkpoints: what a crash can cost at most
    #[arg(long, default_value_t = 200, conflicts_with = "resume")]
    checkpoint_every: usize,
    /// Measure every so many steps, and before and after them, how weights, activations and gradients depend on the
    /// condition: proportionality.csv and .svg
    #[arg(long, value_name = "STEPS", conflicts_with = "resume")]
    #[serde(default)]
    probe_every: Option<usize>,
}

impl Recipe {
    pub fn training(&self, steps: usize) -> TrainConfig {
        let base = self.base_lr.map(|lr| LrShare { pattern: "base.*".into(), share: lr / self.lr });
        TrainConfig {
            steps,
            lr: self.lr,
            warmup: 0,
            min_lr_ratio: 1.0,
            weight_decay: 0.0,
            clip_norm: self.clip.unwrap_or(match self.task.kind() {
                TaskKind::Classify => 0.0,
                TaskKind::Register | TaskKind::Scale => CLIP,
            }),
            eval_every: self.eval_every,
            checkpoint_every: self.checkpoint_every,
            method: match self.optim {
                Optimiser::Adam => Method::AdamW,
                Optimiser::Sgd => Method::Sgd { momentum: 0.9 },
            },
            lr_shares: base.into_iter().collect(),
            ..TrainConfig::default()
        }
    }

    /// Measurements of proportionality, where they are asked for.
    pub fn probes<'a, M: Module>(
        &self,
        run: &TrainRun<Self>,
        probe: impl Fn(&M) -> crate::proportionality::Probe + 'a,
    ) -> Option<Probes<'a, M>> {
        self.probe_every.map(|every| Probes::new(every, run.folder.path().into(), probe))
    }

    fn check(&self) -> Result<()> {
        if self.batch == 0 {
            return Err(Error::usage("--batch must be at least 1"));
        }
        if self.probe_every == Some(0) {
            return Err(Error::usage("--probe-every must be at least 1"));
        }
        if !(self.val_fraction > 0.0 && self.val_fraction < 1.0) {
            return Err(Error::usage(format!("--val-fraction {} is not between 0 and 1", self.val_fraction)));
        }
        if self.task.kind() != TaskKind::Classify && (self.per_sample || self.control != Control::Rotation) {
            return Err(Error::usage("only classifiers have a --control, and a condition for every image")
                .hint("leave --control and --per-sample out"));
        }
        if self.per_sample && self.control == Control::Dropout {
            return Err(Error::usage("images of a step share what is dropped")
                .hint("leave --per-sample out with --control dropout"));
        }
        if self.task == TaskName::Bayes && !matches!(self.control, Control::Rotation | Control::Noise) {
            return Err(Error::usage("--task bayes draws networks by noise").hint("leave --control out"));
        }
        Ok(())
    }
}

/// Trains a network whose weights depend on a condition.
pub(super) fn run(args: TrainArgs, cx: &Context) -> Result<()> {
    let run = match (&args.resume, &args.out) {
        (Some(folder), _) => TrainRun::resume(TRAIN, folder, args.steps)?,
        (None, Some(out)) => TrainRun::begin(TRAIN, out, args.steps.unwrap_or(2000), args.recipe, cx),
        (None, None) => return Err(Error::usage("--out or --resume is needed")),
    };
    let cx = &run.context(cx);
    run.recipe.check()?;
    let kind = run.recipe.task.kind();
    if kind != TaskKind::Classify && args.conditions.conditions.is_some() {
        return Err(Error::usage("only classifiers have conditions of the images' own")
            .hint("leave --conditions out"));
    }
    match kind {
        TaskKind::Classify => classify(&run, &args.data, &args.conditions, cx),
        TaskKind::Register => register::train(&run, &args.data, cx),
        TaskKind::Scale => scale::train(&run, &args.data, cx),
    }
}

fn classify(
    run: &TrainRun<Recipe>,
    data: &DataArgs,
    conditions: &ConditionsArgs,
    cx: &Context,
) -> Result<()> {
    let recipe = &run.recipe;
    let (config, images) = if run.resumed {
        let config: Config = run.folder.config(KIND)?;
        let images = data.read_for(&config, false)?;
        (config, images)
    } else {
        let images = data.read(None, false)?;
        let columns = conditions.read(images.len())?;
        let control = if columns.is_some() { Control::Given } else { recipe.task.control(recipe.control) };
        (recipe.shape.config(&images, control, recipe.gamma_sampling, columns.as_deref())?, images)
    };
    let own = conditions.conditions(images.len(), &config.ranges, false, cx)?;
    if own.is_some() != (config.control == Control::Given) {
        return Err(Error::usage("the run was begun with conditions of the images' own, or without")
            .hint("give --conditions as it was given then"));
    }
    if (recipe.per_sample || own.is_some()) && recipe.shape.norm == Norm::Batch {
        return Err(Error::usage("batch norms look at images with other weights")
            .hint("choose another --norm where every image has its condition"));
    }
    let [held_out, others] = split(images.len(), recipe.val_fraction, cx)?;
    let (train, valid) = (images.select(&others), images.select(&held_out));
    let given = own.map(|own| {
        let of = |places: &[usize]| places.iter().map(|&place| own[place].clone()).collect();
        Given { train: of(&others), valid: of(&held_out) }
    });
    let training = recipe.training(run.steps);
    training.check()?;
    let model = config.draw(None, cx)?;
    run.save(|folder| folder.save_config(KIND, &config))?;
    cx.note(format!(
        "{} weights made by {} parameters; {} images, {} held out",
        model.spec().numel(),
        model.num_params(),
        train.len(),
        valid.len()
    ));
    let gamma_dim = config.ranges.len();
    let probed = train.select(&(0..train.len().min(PROBED)).collect::<Vec<_>>());
    let probes = recipe.probes(run, |net| probe(net, &probed, cx));
    let condition = |step: usize| match config.control {
        Control::Given => "of its images".into(),
        _ => config.describe(&config.sampling.draw(gamma_dim, &mut cx.rng("step", step as u64))),
    };
    let task = ClassifyTask {
        train: &train,
        valid: &valid,
        control: config.control,
        sampling: config.sampling,
        gamma_dim,
        batch: recipe.batch,
        per_sample: recipe.per_sample,
        given: given.clone(),
        cx,
    };
    let mut task = Probed::new(task, gamma_dim, probes, condition, cx);
    let trained = run.train(model, &mut task, &training, &data.words(conditions), cx)?;
    task.finish(&trained.last, trained.log.len())?;
    let summary = run.finish(&trained, "nats per image")?;
    let (probabilities, place) = match &given {
        Some(given) => {
            let found = predict_each(&trained.model, config.control, &valid, &given.valid, cx)?;
            (found, "under their own conditions")
        }
        None => {
            let middle = vec![0.5; gamma_dim];
            (predict(&trained.model, config.control, &valid, &middle, cx)?, "in the middle of the range")
        }
    };
    let result = TrainResult { summary, accuracy: scores(&probabilities, &valid.labels).accuracy };
    cx.emit(&result, |TrainResult { summary, accuracy }| {
        format!(
            "{}accuracy {place} {accuracy:.4} on the images held out\nmodel in {}\n",
            summary.to_text("nats an image"),
            summary.model.display()
        )
    })
}

/// What `train` prints.
#[derive(Serialize)]
struct TrainResult {
    #[serde(flatten)]
    summary: TrainSummary,
    /// Of the best weights at γ = 0.5, or under the images' own conditions, on the images held out.
    accuracy: f64,
}

/// Holds out a share of so many images, at random: places of those held out, and of the others.
pub(super) fn split(count: usize, share: f64, cx: &Context) -> Result<[Vec<usize>; 2]> {
    if count < 2 {
        return Err(Error::usage("one image is too few")
            .hint("one is held out for validation, others are learned from"));
    }
    let mut order: Vec<usize> = (0..count).collect();
    order.shuffle(&mut cx.rng("split", 0));
    let held_out = ((count as f64 * share).round() as usize).clamp(1, count - 1);
    let (valid, train) = order.split_at(held_out);
    Ok([valid.to_vec(), train.to_vec()])
}

impl DataArgs {
    /// How the data were given, for the hint how to go on.
    pub fn words(&self, conditions: &ConditionsArgs) -> String {
        let conditions = conditions.conditions.iter().map(|path| format!(" --conditions {}", path.display()));
        format!("--data {}{}", self.data.display(), conditions.collect::<String>())
    }
}
