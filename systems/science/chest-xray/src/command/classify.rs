//! `kiln chest-xray train`

use std::path::PathBuf;
use std::time::Instant;

use burn::module::Module;
use clap::Args;
use kiln_core::{Context, Error, Plot, Result};
use kiln_data::{read_tensors, write_csv};
use kiln_nn::{LrShare, TrainRun, initialise};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::judge::{apply_lungs, describe};
use super::{ImagesArgs, write_json};
use crate::NOTICE;
use crate::checkpoint::{ClassifyConfig, Config, KIND, fold_name};
use crate::dataset::Images;
use crate::image::{Cxr, Fit, Norm};
use crate::metrics::{DECISION, Metrics, Scored, intervals, operating_point, roc};
use crate::networks::{Classifier, ClassifierConfig, Freeze, Net};
use crate::train::{Augment, ClassifyTask, Fall, judge, probability, training};

/// The command whose runs a model folder keeps.
const TRAIN: &str = "chest-xray train";
/// Parts of the images of which one is held out when there is one model.
const HOLD_OUT: usize = 5;

#[derive(Debug, Args)]
pub(super) struct TrainArgs {
    #[command(flatten)]
    images: ImagesArgs,
    /// Weights to begin with, named as in torchvision: .safetensors, .pth, .pt or .npz
    #[arg(long)]
    weights: Option<PathBuf>,
    /// Let the network see lungs alone, as this model of `train-seg` finds them
    #[arg(long, value_name = "MODEL")]
    seg: Option<PathBuf>,
    /// Folder to write
    #[arg(long, required_unless_present = "resume")]
    out: Option<PathBuf>,
    /// Continue the runs in this folder
    #[arg(long, value_name = "DIR", conflicts_with = "out")]
    resume: Option<PathBuf>,
    #[command(flatten)]
    recipe: Recipe,
}

/// What besides data, weights and seed decides the outcome.
#[derive(Debug, Clone, Args, Serialize, Deserialize)]
struct Recipe {
    /// Which network
    #[arg(long, value_enum, default_value = "chexnet", conflicts_with = "resume")]
    net: Net,
    /// So many times the published widths
    #[arg(long, default_value_t = 1.0, conflicts_with = "resume")]
    width: f64,
    /// Rows and columns of images [default: 224; 227 for squeezenet, 299 for inception]
    #[arg(long, conflicts_with = "resume")]
    size: Option<usize>,
    /// How images become squares
    #[arg(long, value_enum, default_value = "stretch", conflicts_with = "resume")]
    fit: Fit,
    /// How brightness is made comparable [default: zscore; imagenet with --weights]
    #[arg(long, value_enum, conflicts_with = "resume")]
    norm: Option<Norm>,
    /// Cut images to the lungs (with --seg)
    #[arg(long, conflicts_with = "resume")]
    crop: bool,
    /// Parts of which each is tested on once; with 1, a fifth is tested on and there is one model
    #[arg(long, default_value_t = 5, conflicts_with = "resume")]
    folds: usize,
    /// Passes through the images
    #[arg(long, default_value_t = 15, conflicts_with = "resume")]
    epochs: usize,
    /// Images of a step
    #[arg(long, default_value_t = 32, conflicts_with = "resume")]
    batch: usize,
    /// Learning rate
    #[arg(long, default_value_t = 1e-4, conflicts_with = "resume")]
    lr: f64,
    /// Learning rate of the classifier, where it is to have another than what comes before it [default: that of --lr]
    #[arg(long, conflicts_with = "resume")]
    #[serde(default)]
    head_lr: Option<f64>,
    /// Epochs without a lower validation loss after which a run stops
    #[arg(long, default_value_t = 6, conflicts_with = "resume")]
    patience: usize,
    /// What does not learn: none, backbone, or until:NAME of torchvision
    #[arg(long, default_value_t = Freeze::None, conflicts_with = "resume")]
    freeze: Freeze,
    /// Which images are turned, moved and scaled in training
    #[arg(long, value_enum, default_value = "balance", conflicts_with = "resume")]
    augment: Augment,
    /// Let both classes count the same in the loss
    #[arg(long, conflicts_with = "resume")]
    class_weights: bool,
}

impl Recipe {
    /// The classifier's learning rate over that of the rest, where it has one of its own.
    fn lr_shares(&self) -> Vec<LrShare> {
        let head = self.net.head().iter().map(|name| format!("{name}*"));
        self.head_lr
            .map_or(Vec::new(), |lr| head.map(|pattern| LrShare { pattern, share: lr / self.lr }).collect())
    }

    fn config(&self, has_weights: bool, is_segmented: bool) -> Result<ClassifyConfig> {
        let network = ClassifierConfig {
            width: self.width,
            size: self.size.unwrap_or(self.net.size()),
            ..ClassifierConfig::new(self.net, 2)
        };
        network.check()?;
        if self.batch == 0 || self.epochs == 0 || !(1..=100).contains(&self.folds) {
            return Err(Error::usage("--batch and --epochs must be at least 1, --folds between 1 and 100"));
        }
        if let Some(rate) = self.head_lr.filter(|rate| !(rate.is_finite() && *rate > 0.0)) {
            return Err(Error::usage(format!("--head-lr {rate} must be a number above 0")));
        }
        if self.crop && !is_segmented {
            return Err(Error::usage("--crop cuts to lungs, which only --seg finds"));
        }
        let norm = self.norm.unwrap_or(if has_weights { Norm::Imagenet } else { Norm::Zscore });
        let cxr = Cxr { size: network.size, fit: self.fit, norm };
        Ok(ClassifyConfig::new(network, cxr, is_segmented, self.crop))
    }
}

/// A prediction for an image that was held out.
#[derive(Serialize)]
struct HeldOutRow {
    image: String,
    label: &'static str,
    p_tb: f64,
    fold: usize,
}

pub(super) fn train(args: TrainArgs, cx: &Context) -> Result<()> {
    let out = args.resume.clone().or(args.out.clone()).unwrap_or_default();
    let mut recipe = args.recipe.clone();
    let mut seed = cx.seed;
    if args.resume.is_some() {
        let first = if out.join("train.json").exists() { out.clone() } else { out.join(fold_name(1)) };
        let run = TrainRun::<Recipe>::resume(TRAIN, &first, None)?;
        (recipe, seed) = (run.recipe, run.seed);
    }
    let cx = &Context { seed, ..cx.clone() };
    let config = recipe.config(args.weights.is_some(), args.seg.is_some())?;
    let mut images = Images::read(args.images.list()?, config.cxr, cx)?;
    images.require_labels(&args.images.images)?;
    let copies = images.duplicates().len();
    if copies > 0 {
        cx.note(format!("{copies} images are copies of others; a copy stays in the fold of its original"));
    }
    let parts = if recipe.folds == 1 { HOLD_OUT } else { recipe.folds };
    let folds = images.folds(parts, &mut cx.rng("folds", 0))?;
    apply_lungs(&mut images, args.seg.as_deref(), config.crop, cx)?;

    let begun = Instant::now();
    let (mut rows, mut scores, mut curves, mut fold_metrics) =
        (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let (mut judged_seconds, mut trained_seconds, mut trained_images) = (0.0, 0.0, 0);
    for fold in 0..recipe.folds {
        let folder = if recipe.folds == 1 { out.clone() } else { out.join(fold_name(fold + 1)) };
        let [train, valid, test] = images.split(&folds, fold, &mut cx.rng("split", fold as u64))?;
        let mut run = match args.resume.is_some() && folder.join("train.json").exists() {
            true => TrainRun::<Recipe>::resume(TRAIN, &folder, None)?,
            false => TrainRun::begin(TRAIN, &folder, 1, recipe.clone(), cx),
        };
        let mut task = ClassifyTask::new(
            &images,
            [&train, &valid],
            recipe.batch,
            recipe.augment,
            recipe.class_weights,
            cx,
        );
        let per_epoch = task.steps_per_epoch();
        if !run.resumed {
            run.steps = recipe.epochs * per_epoch;
        }
        let mut plan = training(run.steps, recipe.lr, Fall::None);
        (plan.eval_every, plan.checkpoint_every) = (per_epoch, per_epoch);
        plan.patience = Some(recipe.patience);
        plan.lr_shares = recipe.lr_shares();
        plan.check()?;
        let model = begin_with(&config, &args, cx, fold == 0)?;
        let model = recipe.freeze.apply(model, recipe.net.head())?;
        run.save(|folder| folder.save_config(KIND, &Config::Classify(config.clone())))?;
        if fold == 0 {
            let parameters = model.num_params();
            cx.note(format!(
                "{parameters} parameters, {} images in {} folds; {NOTICE}",
                images.len(),
                recipe.folds
            ));
        }
        let words = format!("--images {}", args.images.images.display());
        let trained = run.train(model, &mut task, &plan, &words, cx)?;
        run.finish(&trained, "cross-entropy")?;
        trained_seconds += trained.log.last().map_or(0.0, |row| row.seconds);
        trained_images += trained.log.last().map_or(0, |row| row.tokens);
        let clock = Instant::now();
        let margins = judge(&trained.model, &images, &test, cx)?;
        judged_seconds += clock.elapsed().as_secs_f64();
        let of_fold: Vec<Scored> = test
            .iter()
            .zip(margins)
            .map(|(&index, margin)| Scored {
                image: images.entries[index].name.clone(),
                is_tb: images.is_tb(index),
                p_tb: probability(margin),
            })
            .collect();
        rows.extend(of_fold.iter().map(|s| HeldOutRow {
            image: s.image.clone(),
            label: if s.is_tb { "TB" } else { "Normal" },
            p_tb: s.p_tb,
            fold: fold + 1,
        }));
        curves.push((format!("fold {}", fold + 1), roc(&of_fold)));
        fold_metrics.push(Metrics::of(&of_fold, DECISION));
        scores.extend(of_fold);
    }
    let metrics = Metrics::of(&scores, DECISION);
    write_csv(&out.join("predictions.csv"), &rows)?;
    let mut plot = Plot::lines("ROC on images that were held out", "1 - specificity", "sensitivity");
    for (name, points) in curves {
        plot = plot.series(name, points);
    }
    plot.series("chance", vec![(0.0, 0.0), (1.0, 1.0)]).save(&out.join("roc.svg"))?;
    let mut result = json!({
        "model": out,
        "net": recipe.net.name(),
        "segmented": config.segmented,
        "metrics": metrics,
        "intervals_95": intervals(&scores, DECISION, &mut cx.rng("bootstrap", 0)),
        "triage": operating_point(&scores, crate::metrics::TRIAGE_SENSITIVITY),
        "folds": fold_metrics,
        "seconds": begun.elapsed().as_secs_f64(),
        "milliseconds_per_image": 1e3 * judged_seconds / scores.len().max(1) as f64,
        "training_milliseconds_per_image": 1e3 * trained_seconds / trained_images.max(1) as f64,
    });
    result["note"] = Value::from(NOTICE);
    write_json(&out.join("metrics.json"), &result)?;
    cx.emit(&result, |_| format!("{}models in {}; {NOTICE}\n", describe(&metrics), out.display()))
}

/// The network to begin with.
fn begin_with(config: &ClassifyConfig, args: &TrainArgs, cx: &Context, tells: bool) -> Result<Classifier> {
    let drawn = initialise(&cx.device, &mut cx.rng("init", 0), |device| config.network.init(device));
    let Some(path) = &args.weights else { return Ok(drawn) };
    let (model, transfer) = config.network.transfer(drawn, read_tensors(path)?)?;
    if tells {
        cx.note(format!(
            "{} tensors from {}; drawn anew: {}; not used: {}",
            transfer.loaded,
            path.display(),
            listed(&transfer.redrawn),
            listed(&transfer.skipped)
        ));
    }
    Ok(model)
}

fn listed(names: &[String]) -> String {
    if names.is_empty() { "none".into() } else { names.join(", ") }
}
