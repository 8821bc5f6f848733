//! `kiln ptq train`

use std::path::{Path, PathBuf};

use burn::module::Module;
use clap::Args;
use kiln_compiler::capture;
use kiln_core::{Context, Error, ModelFolder, Result, write_atomic};
use kiln_data::{ImageOptions, Images};
use kiln_nn::{TrainConfig, TrainRun, TrainSummary, initialise};
use rand::seq::SliceRandom;
use serde::{Deserialize, Serialize};

use super::source::tokenizer_of;
use crate::arch::{Arch, ClassifierConfig, Input};
use crate::checkpoint::{self, KIND, Trained};
use crate::data::{self, Examples, Texts};
use crate::program::Program;
use crate::quantise::{Metric, logits, score};
use crate::training::ClassifyTask;

/// The command whose runs a model folder keeps.
const TRAIN: &str = "ptq train";

#[derive(Debug, Args)]
pub(super) struct TrainArgs {
    /// Images (a folder with one folder a class, IDX, .npz, .csv) or texts (.csv with the columns label and text)
    #[arg(long)]
    data: PathBuf,
    /// Model folder to write
    #[arg(long, required_unless_present = "resume")]
    out: Option<PathBuf>,
    /// Continue the run in this folder
    #[arg(long, value_name = "DIR", conflicts_with = "out")]
    resume: Option<PathBuf>,
    /// Steps of the whole run, instead of epochs
    #[arg(long)]
    steps: Option<usize>,
    /// Times that every example is seen
    #[arg(long, default_value_t = 8.0)]
    epochs: f64,
    #[command(flatten)]
    recipe: Recipe,
}

/// What besides data, steps and seed decides the outcome.
#[derive(Debug, Clone, Args, Serialize, Deserialize)]
struct Recipe {
    /// Which network
    #[arg(long, value_enum, default_value = "mobilenetv2-s", conflicts_with = "resume")]
    arch: Arch,
    /// Factor of all widths [default: 0.5 for mobilenetv2-s, otherwise 1]
    #[arg(long, conflicts_with = "resume")]
    width: Option<f64>,
    /// Tokens of a text
    #[arg(long, default_value_t = 48, conflicts_with = "resume")]
    length: usize,
    /// Examples of a step
    #[arg(long, default_value_t = 64, conflicts_with = "resume")]
    batch: usize,
    /// Highest learning rate
    #[arg(long, default_value_t = 2e-3, conflicts_with = "resume")]
    lr: f64,
    /// Share of the examples that is held out for validation
    #[arg(long, default_value_t = 0.1, conflicts_with = "resume")]
    val_fraction: f64,
    /// Steps between validations
    #[arg(long, default_value_t = 200, conflicts_with = "resume")]
    eval_every: usize,
}

pub(super) fn run(args: TrainArgs, cx: &Context) -> Result<()> {
    let (folder, fresh) = match (&args.resume, &args.out) {
        (Some(folder), _) => (folder.clone(), false),
        (None, Some(out)) => (out.clone(), true),
        (None, None) => return Err(Error::usage("--out or --resume is needed")),
    };
    let recipe: Recipe = match fresh {
        true => args.recipe.clone(),
        false => TrainRun::<Recipe>::resume(TRAIN, &folder, None)?.recipe,
    };
    if recipe.batch == 0 {
        return Err(Error::usage("--batch must be at least 1"));
    }
    if !(recipe.val_fraction > 0.0 && recipe.val_fraction < 1.0) {
        return Err(Error::usage(format!("--val-fraction {} is not between 0 and 1", recipe.val_fraction)));
    }
    if !(args.epochs > 0.0 && args.epochs.is_finite()) {
        return Err(Error::usage(format!("--epochs {} is not above 0", args.epochs)));
    }
    let (config, examples, tokenizer) = if fresh {
        read_for_training(&args.data, &recipe)?
    } else {
        let config: checkpoint::Config = ModelFolder::new(&folder).config(KIND)?;
        let tokenizer = tokenizer_of(&folder, config.network.input)?;
        let network = config.network;
        let examples =
            data::read(&args.data, network.input, &config.classes, config.white, tokenizer.as_ref(), true)?;
        (config, examples, None)
    };
    let (train, valid) = split(&examples, recipe.val_fraction, cx)?;
    let per_epoch = (train.len() / recipe.batch).max(1);
    let steps = args.steps.unwrap_or((args.epochs * per_epoch as f64).round().max(1.0) as usize);
    let run = match fresh {
        true => TrainRun::begin(TRAIN, &folder, steps, recipe, cx),
        false => TrainRun::resume(TRAIN, &folder, args.steps)?,
    };
    let cx = &run.context(cx);
    let training = TrainConfig {
        steps: run.steps,
        lr: run.recipe.lr,
        warmup: (run.steps / 10).min(100),
        eval_every: run.recipe.eval_every,
        checkpoint_every: run.recipe.eval_every,
        ..TrainConfig::default()
    };
    training.check()?;
    run.save(|folder| {
        if let Some(tokenizer) = &tokenizer {
            write_atomic(&folder.file("tokenizer.json"), tokenizer.as_bytes())?;
        }
        folder.save_config(KIND, &config)
    })?;
    let model = initialise(&cx.device, &mut cx.rng("init", 0), |device| config.network.init(device));
    cx.note(format!(
        "{} parameters; {} examples of {} classes, {} held out",
        model.num_params(),
        train.len(),
        config.classes.len(),
        valid.len()
    ));
    let mut task = ClassifyTask { train: &train, valid: &valid, batch: run.recipe.batch, cx };
    let trained = run.train(model, &mut task, &training, &format!("--data {}", args.data.display()), cx)?;
    let summary = run.finish(&trained, "nats per example")?;
    let program = Program::new(capture(Box::new(Trained::new(config.network, trained.model)))?)?;
    let ready: Vec<_> = program.units.iter().map(crate::ready::Ready::float).collect();
    let batched = program.with_batch(64, &ready).unwrap_or(program);
    let accuracy = score(&logits(&batched, &ready, &valid)?, &valid.labels, Metric::Accuracy);
    let result = TrainResult { summary, accuracy };
    cx.emit(&result, |TrainResult { summary, accuracy }| {
        format!(
            "{}accuracy {accuracy:.4} on the examples held out\nmodel in {}\n",
            summary.to_text("nats an example"),
            summary.model.display()
        )
    })
}

/// What `train` prints.
#[derive(Serialize)]
struct TrainResult {
    #[serde(flatten)]
    summary: TrainSummary,
    /// Of the best weights, on the examples held out.
    accuracy: f64,
}

/// Examples, the network for them, and a tokenizer where they are texts.
fn read_for_training(path: &Path, recipe: &Recipe) -> Result<(checkpoint::Config, Examples, Option<String>)> {
    let network = |input, classes| {
        let network = ClassifierConfig::new(recipe.arch, input, classes);
        let network = ClassifierConfig { width: recipe.width.unwrap_or(network.width), ..network };
        network.check().map(|()| network)
    };
    if recipe.arch != Arch::Bert {
        let images = Images::read(&data::images_file(path), &ImageOptions::default())?;
        let network = network(data::image_input(recipe.arch, &images)?, images.classes.len())?;
        let config = checkpoint::Config { network, classes: images.classes.clone(), white: images.white };
        return Ok((config, Examples::of_images(images), None));
    }
    let texts = Texts::read(path, true)?;
    let tokenizer = texts.learn_vocabulary(data::VOCABULARY)?;
    let classes = texts.classes();
    let input = Input::Text { vocabulary: tokenizer.get_vocab_size(true), length: recipe.length };
    let network = network(input, classes.len())?;
    let examples = texts.encode(&tokenizer, recipe.length, &classes, path)?;
    Ok((checkpoint::Config { network, classes, white: 1.0 }, examples, Some(data::to_json(&tokenizer)?)))
}

/// Holds out a share of the examples, at random.
fn split(examples: &Examples, share: f64, cx: &Context) -> Result<(Examples, Examples)> {
    if examples.len() < 2 {
        return Err(Error::usage("one example is too few").hint("one is held out for validation"));
    }
    let mut order: Vec<usize> = (0..examples.len()).collect();
    order.shuffle(&mut cx.rng("split", 0));
    let held_out = ((examples.len() as f64 * share).round() as usize).clamp(1, examples.len() - 1);
    let (valid, train) = order.split_at(held_out);
    Ok((examples.select(train), examples.select(valid)))
}
