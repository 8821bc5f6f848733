//! `kiln btsbot train`

use std::fs;
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use kiln_core::{Context, Error, Result};
use kiln_data::write_csv;
use kiln_nn::{Decay, Plateau, TrainConfig, TrainRun};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::ArrayArgs;
use crate::checkpoint::{Config, KIND, new_model};
use crate::dataset::{Dataset, Rejected};
use crate::features::FeatureOptions;
use crate::model::{MmCnnConfig, Mode};
use crate::page::{ACCURACY, read_accuracies};
use crate::train::{Accuracy, AlertTask, BATCH, LEARNING_RATE, MOST_ALERTS, SHARES, training};
use crate::triplet::SIDE;

/// The command whose runs a model folder keeps.
const TRAIN: &str = "btsbot train";
/// By how much the validation loss must fall to count as better,
const LEAST_IMPROVEMENT: f64 = 0.005;
/// by what the learning rate is multiplied when it does not,
const PLATEAU_FACTOR: f64 = 0.4;
/// and how far down.
const LEAST_RATE: f64 = 5e-10;

#[derive(Debug, Args)]
pub(super) struct TrainArgs {
    #[command(flatten)]
    arrays: ArrayArgs,
    /// Stamps to validate with, in place of a share of the sources
    #[arg(long, requires = "val_candidates")]
    val_triplets: Option<PathBuf>,
    /// Table of the same alerts
    #[arg(long, requires = "val_triplets")]
    val_candidates: Option<PathBuf>,
    /// Model folder to write
    #[arg(long, required_unless_present = "resume")]
    out: Option<PathBuf>,
    /// Continue the run in this folder
    #[arg(long, value_name = "DIR", conflicts_with = "out")]
    resume: Option<PathBuf>,
    #[command(flatten)]
    recipe: Recipe,
    /// JSON file with settings of the network, such as {"channels": [16, 32], "head_hidden": [64, 8]}
    #[arg(long, value_name = "FILE", conflicts_with = "resume")]
    config: Option<PathBuf>,
}

/// How the learning rate falls.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Schedule {
    /// By 0.4 whenever the validation loss no longer falls
    Plateau,
    /// As half a cosine, after a warm-up of one epoch in twenty
    Cosine,
}

/// What besides data and seed decides the outcome.
#[derive(Debug, Clone, Args, Serialize, Deserialize)]
struct Recipe {
    /// What the network sees
    #[arg(long, value_enum, default_value = "mm_cnn", conflicts_with = "resume")]
    model: Mode,
    /// Use only so many pixels of a side, an odd number
    #[arg(long, default_value_t = SIDE, conflicts_with = "resume", value_name = "PIXELS")]
    crop: usize,
    /// Passes through the alerts, at most
    #[arg(long, default_value_t = 1000, conflicts_with = "resume")]
    epochs: usize,
    /// Epochs without a validation loss that is lower by 0.5 %, after which training ends
    #[arg(long, default_value_t = 75, conflicts_with = "resume")]
    patience: usize,
    /// Epochs without a lower validation loss, after which the learning rate falls
    #[arg(long, default_value_t = 20, conflicts_with = "resume")]
    plateau_patience: usize,
    /// Alerts of a step
    #[arg(long, default_value_t = BATCH, conflicts_with = "resume")]
    batch: usize,
    /// Learning rate at the beginning
    #[arg(long, default_value_t = LEARNING_RATE, conflicts_with = "resume")]
    lr: f64,
    /// How it falls
    #[arg(long, value_enum, default_value = "plateau", conflicts_with = "resume")]
    schedule: Schedule,
    /// Weight decay
    #[arg(long, default_value_t = 0.0, conflicts_with = "resume")]
    weight_decay: f64,
    /// The most alerts of a source
    #[arg(long, default_value_t = MOST_ALERTS, conflicts_with = "resume")]
    n_max: usize,
    /// The most alerts of a bright transient [default: that of all]
    #[arg(long, conflicts_with = "resume")]
    n_max_p: Option<usize>,
    /// The most alerts of another source [default: that of all]
    #[arg(long, conflicts_with = "resume")]
    n_max_n: Option<usize>,
    /// Shares of the sources to train on, to validate with and to test
    #[arg(long, value_delimiter = ',', num_args = 3, default_values_t = SHARES, conflicts_with = "resume")]
    split: Vec<f64>,
}

impl Recipe {
    fn check(&self) -> Result<()> {
        if [self.epochs, self.batch, self.n_max, self.patience].contains(&0) {
            return Err(Error::usage("--epochs, --batch, --n-max and --patience must be at least 1"));
        }
        let shares_fit = self.split.len() == 3 && self.split.iter().all(|share| (0.0..=1.0).contains(share));
        if !shares_fit || self.split[0] == 0.0 {
            return Err(Error::usage(format!("--split {:?}", self.split))
                .hint("three shares between 0 and 1, such as 0.81,0.09,0.10"));
        }
        if self.crop.is_multiple_of(2) || self.crop > SIDE {
            return Err(
                Error::usage(format!("--crop {}", self.crop)).hint(format!("an odd number up to {SIDE}"))
            );
        }
        Ok(())
    }

    fn training(&self, per_epoch: usize) -> TrainConfig {
        let base = training(self.epochs * per_epoch, self.lr);
        let base = TrainConfig {
            eval_every: per_epoch,
            checkpoint_every: per_epoch,
            weight_decay: self.weight_decay,
            patience: Some(self.patience),
            min_improvement: LEAST_IMPROVEMENT,
            ..base
        };
        match self.schedule {
            Schedule::Plateau => TrainConfig {
                plateau: Some(Plateau {
                    factor: PLATEAU_FACTOR,
                    patience: self.plateau_patience,
                    least: LEAST_RATE,
                }),
                ..base
            },
            Schedule::Cosine => TrainConfig {
                warmup: (self.epochs * per_epoch).div_ceil(20),
                min_lr_ratio: 0.0,
                decay: Decay::Cosine,
                ..base
            },
        }
    }
}

/// Reads alerts, and remarks on those that are left out.
pub(super) fn read(triplets: &Path, candidates: &Path, side: usize, cx: &Context) -> Result<Dataset> {
    let (data, rejected) = Dataset::read(triplets, candidates, side)?;
    if let Some(Rejected { file, reason, .. }) = rejected.first() {
        cx.note(format!("{} alerts are left out; the first, {file}, {reason}", rejected.len()));
    }
    Ok(data)
}

pub(super) fn train(args: TrainArgs, cx: &Context) -> Result<()> {
    let (Some(triplets), Some(candidates)) = (&args.arrays.triplets, &args.arrays.candidates) else {
        return Err(Error::usage("there is nothing to train on").hint("give --triplets and --candidates"));
    };
    let mut run = match &args.resume {
        Some(folder) => TrainRun::<Recipe>::resume(TRAIN, folder, None)?,
        // The number of steps is known when there are alerts.
        None => TrainRun::begin(TRAIN, &args.out.clone().unwrap_or_default(), 1, args.recipe.clone(), cx),
    };
    let cx = &run.context(cx);
    let recipe = run.recipe.clone();
    recipe.check()?;
    let config: Config = match run.resumed {
        true => run.folder.config(KIND)?,
        false => {
            let network = network(args.config.as_deref(), &recipe)?;
            network.check()?;
            Config::new(network, FeatureOptions::default())
        }
    };
    let mut data = read(triplets, candidates, config.network.side, cx)?;
    let labelled = data.labelled()?;
    let shares = [recipe.split[0], recipe.split[1], recipe.split[2]];
    let [mut train, mut valid, test] = data.split(&labelled, shares, &mut cx.rng("split", 0));
    if let (Some(triplets), Some(candidates)) = (&args.val_triplets, &args.val_candidates) {
        train = labelled;
        let first = data.len();
        let validation = read(triplets, candidates, config.network.side, cx)?;
        let theirs = validation.labelled()?;
        if let Some((name, _)) =
            validation.by_source().into_iter().find(|(name, _)| data.by_source().contains_key(name))
        {
            return Err(Error::input(
                candidates.display(),
                format!("source {name} is to train on and to validate with"),
            )
            .hint("split alerts by source"));
        }
        valid = theirs.iter().map(|alert| first + alert).collect();
        data.images.extend(&validation.images);
        data.features.extend(&validation.features);
        data.about.extend(validation.about);
    }
    let most = [recipe.n_max_n.unwrap_or(recipe.n_max), recipe.n_max_p.unwrap_or(recipe.n_max)];
    let train = data.thinned(&train, most, &mut cx.rng("thin", 0));
    let valid = data.thinned(&valid, most, &mut cx.rng("thin", 1));
    let mut task = AlertTask::new(&data, &train, &valid, recipe.batch, cx)?;
    let per_epoch = task.steps_per_epoch();
    if !run.resumed {
        run.steps = recipe.epochs * per_epoch;
    }
    let training = recipe.training(per_epoch);
    training.check()?;
    let model = new_model(&config.network, cx);
    run.save(|folder| folder.save_config(KIND, &config))?;
    let parameters = model.parameters();
    let held_out: std::collections::BTreeSet<&str> =
        test.iter().map(|&alert| data.about[alert].object_id.as_str()).collect();
    if args.val_triplets.is_none() && !run.resumed {
        let text: String = held_out.iter().map(|id| format!("{id}\n")).collect();
        fs::write(run.folder.file("test_sources.txt"), text)
            .map_err(Error::io("write", run.folder.file("test_sources.txt")))?;
    }
    cx.note(format!(
        "{parameters} parameters; {} alerts to train on, {} to validate with, {} of {} sources held out to test",
        train.len(),
        valid.len(),
        test.len(),
        held_out.len()
    ));
    let words = format!("--triplets {} --candidates {}", triplets.display(), candidates.display());
    let trained = run.train(model, &mut task, &training, &words, cx);
    // Of a run that was stopped, too.
    keep_accuracies(&run.folder.file(ACCURACY), &task.accuracies)?;
    let trained = trained?;
    let summary = run.finish(&trained, "weighted cross-entropy")?;
    cx.emit(
        &json!({ "summary": summary, "parameters": parameters, "train": train.len(), "valid": valid.len() }),
        |_| format!("{}model in {}\n", summary.to_text("an alert"), summary.model.display()),
    )
}

/// Adds what a run found to what it had found before it was stopped.
fn keep_accuracies(path: &Path, found: &[Accuracy]) -> Result<()> {
    let Some(first) = found.first() else { return Ok(()) };
    let mut all = if path.exists() { read_accuracies(path)? } else { Vec::new() };
    all.retain(|row| row.step < first.step);
    all.extend(found);
    write_csv(path, &all)
}

/// The production network, or what a file says differently; --model and --crop come last.
fn network(path: Option<&Path>, recipe: &Recipe) -> Result<MmCnnConfig> {
    let config = match path {
        None => MmCnnConfig::new(),
        Some(path) => {
            let text = fs::read_to_string(path).map_err(Error::io("read", path))?;
            serde_json::from_str(&text).map_err(|e| {
                Error::input(path.display(), "does not describe such a network")
                    .caused_by(e)
                    .hint("write a JSON object such as {\"channels\": [16, 32], \"head_hidden\": [64, 8]}")
            })?
        }
    };
    Ok(config.with_mode(recipe.model).with_side(recipe.crop))
}
