//! `kiln eeg train`

use std::path::PathBuf;

use burn::module::Module;
use clap::Args;
use kiln_core::{Context, Error, Result};
use kiln_nn::{TrainConfig, TrainRun};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::DataArgs;
use crate::augment::Augmentation;
use crate::checkpoint::{Config, KIND, stride};
use crate::dataset::Dataset;
use crate::model::{Arch, ModelConfig};
use crate::train::{EegTask, LEARNING_RATE, balancing_weights, steps_per_epoch, training};
use crate::transfer::new_model;
use crate::windows::WindowSet;

/// The command whose runs a model folder keeps.
const TRAIN: &str = "eeg train";
/// Samples of the paper's windows.
const WINDOW: usize = 6000;

#[derive(Debug, Args)]
pub(super) struct TrainArgs {
    #[command(flatten)]
    data: DataArgs,
    /// Model folder to write
    #[arg(long, required_unless_present = "resume")]
    out: Option<PathBuf>,
    /// Continue the run in this folder
    #[arg(long, value_name = "DIR", conflicts_with = "out")]
    resume: Option<PathBuf>,
    #[command(flatten)]
    recipe: Recipe,
}

/// What besides data and seed decides the outcome.
#[derive(Debug, Clone, Args, Serialize, Deserialize)]
struct Recipe {
    #[command(flatten)]
    #[serde(flatten)]
    shape: ShapeArgs,
    /// Passes through the windows
    #[arg(long, default_value_t = 20, conflicts_with = "resume")]
    epochs: usize,
    /// Windows of a step
    #[arg(long, default_value_t = 64, conflicts_with = "resume")]
    batch: usize,
    /// Learning rate at the beginning
    #[arg(long, default_value_t = LEARNING_RATE, conflicts_with = "resume")]
    lr: f64,
    /// Changes of windows in training, NAME[:PROBABILITY[:STRENGTH]]: time-reverse, sign-flip, ft-surrogate, channel-dropout,
    /// channel-shuffle, noise, band-stop, time-mask, time-shift
    #[arg(long, value_delimiter = ',', conflicts_with = "resume")]
    augment: Vec<Augmentation>,
    /// Let both classes count the same
    #[arg(long, conflicts_with = "resume")]
    class_weights: bool,
    /// Use only so many of the recordings to train on
    #[arg(long, value_name = "N", conflicts_with = "resume")]
    subset: Option<usize>,
    /// Share of the subjects that is held out for validation
    #[arg(long, default_value_t = 0.2, conflicts_with = "resume")]
    val_fraction: f64,
}

/// The network and its windows.
#[derive(Debug, Clone, Args, Serialize, Deserialize)]
pub(super) struct ShapeArgs {
    /// Which network
    #[arg(long, value_enum, default_value = "shallow")]
    model: Arch,
    /// Samples of a window [default: 6000, or the shortest recording]
    #[arg(long)]
    window: Option<usize>,
    /// Make a prediction at every place of a window, and windows that overlap accordingly
    #[arg(long)]
    cropped: bool,
    /// Steps of the last convolution with --cropped [default: those of the paper, or half of the window]
    #[arg(long, requires = "cropped")]
    final_conv: Option<usize>,
    /// So many times the paper's filters
    #[arg(long, default_value_t = 1.0)]
    width: f64,
    /// Blocks of a tcn [default: 5]
    #[arg(long)]
    depth: Option<usize>,
}

impl ShapeArgs {
    /// Trial-wise, for windows of so many samples.
    pub(super) fn of_windows(model: Arch, window: Option<usize>, width: f64) -> Self {
        Self { model, window, cropped: false, final_conv: None, width, depth: None }
    }

    /// The network for these recordings.
    pub(super) fn network(&self, data: &Dataset, chosen: &[usize]) -> Result<ModelConfig> {
        if !(self.width.is_finite() && (0.01..=64.0).contains(&self.width)) {
            return Err(Error::usage(format!("--width {} must lie between 0.01 and 64", self.width)));
        }
        let window = self.window.unwrap_or_else(|| data.shortest(chosen).min(WINDOW));
        let mut config = ModelConfig::new(self.model, data.channels.len(), 2, window).scaled(self.width);
        match (&mut config, self.depth) {
            (_, None) => {}
            (ModelConfig::Tcn(tcn), Some(depth)) if (1..=16).contains(&depth) => tcn.n_blocks = depth,
            (ModelConfig::Tcn(_), Some(depth)) => {
                return Err(Error::usage(format!("--depth {depth} must lie between 1 and 16")));
            }
            (_, Some(_)) => {
                return Err(Error::usage("only a tcn has blocks of the same kind, which --depth counts"));
            }
        }
        let config = if self.cropped { config.dense(self.final_conv) } else { config };
        config.check()?;
        Ok(config)
    }
}

impl Recipe {
    fn training(&self, steps: usize, per_epoch: usize) -> TrainConfig {
        TrainConfig { eval_every: per_epoch, checkpoint_every: per_epoch, ..training(steps, self.lr) }
    }
}

pub(super) fn train(args: TrainArgs, cx: &Context) -> Result<()> {
    let data = args.data.open(cx)?;
    let mut run = match &args.resume {
        Some(folder) => TrainRun::<Recipe>::resume(TRAIN, folder, None)?,
        // The number of steps is known when there are windows.
        None => TrainRun::begin(TRAIN, &args.out.clone().unwrap_or_default(), 1, args.recipe.clone(), cx),
    };
    let cx = &run.context(cx);
    let recipe = run.recipe.clone();
    if recipe.batch == 0 || recipe.epochs == 0 {
        return Err(Error::usage("--batch and --epochs must be at least 1"));
    }
    let chosen = chosen(&data, recipe.subset, &args.data, cx)?;
    let config = if run.resumed {
        let config: Config = run.folder.config(KIND)?;
        config.check_data(&data, &args.data.data)?;
        config
    } else {
        Config {
            network: recipe.shape.network(&data, &chosen)?,
            channels: data.channels.clone(),
            pipeline: data.pipeline.clone(),
            temperature: 1.0,
        }
    };
    let (train, valid) = data.split(&chosen, recipe.val_fraction, &mut cx.rng("split", 0))?;
    let (length, step) = (config.network.n_times(), stride(&config.network));
    let windows = WindowSet::for_training(&data, &train, length, step);
    let validation = WindowSet::for_evaluation(&data, &valid, length, step);
    for (set, what) in [(&windows, "train on"), (&validation, "validate with")] {
        if set.is_empty() {
            return Err(Error::usage(format!(
                "no recording to {what} is as long as a window of {length} samples"
            ))
            .hint(format!("the shortest has {}: use --window", data.shortest(&chosen))));
        }
    }
    let class_weights = balancing_weights(&windows)?;
    let per_epoch = steps_per_epoch(windows.len(), recipe.batch);
    if !run.resumed {
        run.steps = recipe.epochs * per_epoch;
    }
    let training = recipe.training(run.steps, per_epoch);
    training.check()?;
    let model = new_model(&config.network, cx);
    run.save(|folder| folder.save_config(KIND, &config))?;
    let parameters = model.num_params();
    cx.note(format!(
        "{parameters} parameters, {} recordings with {} windows to train on, {} with {} to validate with",
        train.len(),
        windows.len(),
        valid.len(),
        validation.len()
    ));
    let mut task = EegTask::new(&windows, &validation, recipe.batch, (), cx);
    task.augment = &recipe.augment;
    if recipe.class_weights {
        task.class_weights = class_weights;
    }
    let trained = run.train(model, &mut task, &training, &args.data.words(), cx)?;
    let summary = run.finish(&trained, "loss per window")?;
    cx.emit(&json!({ "summary": summary, "parameters": parameters }), |_| {
        format!("{}model in {}\n", summary.to_text("a window"), summary.model.display())
    })
}

/// The labelled recordings to train on, or so many of them.
pub(super) fn chosen(
    data: &Dataset,
    subset: Option<usize>,
    args: &DataArgs,
    cx: &Context,
) -> Result<Vec<usize>> {
    let all = data.training();
    if all.is_empty() {
        return Err(Error::input(args.data.display(), "has no labelled recordings to train on")
            .hint("give a table with --labels"));
    }
    match subset {
        None => Ok(all),
        Some(count) if count == 0 || count > all.len() => {
            Err(Error::usage(format!("--subset {count} of {} recordings", all.len())))
        }
        Some(count) => Ok(data.nested(&all, &mut cx.rng("subset", 0))[..count].to_vec()),
    }
}
