//! `kiln mip predict`, `eval` and `export`

use std::path::{Path, PathBuf};

use burn::module::{Module, ModuleDisplay};
use burn::tensor::Tensor;
use clap::Args;
use kiln_core::{Context, Error, ModelFolder, Plot, Result, TensorFile, write_atomic};
use kiln_data::Images;
use kiln_nn::likeliest;
use serde::Serialize;
use serde_json::{Value, json};

use super::{ConditionsArgs, DataArgs, GammaArgs, one_condition, register, scale};
use crate::checkpoint::{self, Config, KIND, PlainConfig, PlainUNetConfig, TaskKind};
use crate::classify::{Scores, predict as classify, predict_each, predict_mean, scores};
use crate::convert::MipHyper;
use crate::encoding::Range;
use crate::unet::UNet;

#[derive(Debug, Args)]
pub(super) struct PredictArgs {
    /// Model folder
    #[arg(long)]
    pub model: PathBuf,
    #[command(flatten)]
    pub data: DataArgs,
    #[command(flatten)]
    pub gamma: GammaArgs,
    #[command(flatten)]
    conditions: ConditionsArgs,
    /// Average over so many networks drawn at random, and add the entropy
    #[arg(long, conflicts_with_all = ["gamma", "gamma_grid", "conditions"])]
    samples: Option<usize>,
    /// Pairs of images that are registered, drawn within classes; pairs of one's own are all registered
    #[arg(long, default_value_t = 16)]
    pub pairs: usize,
    /// CSV file to write: gamma, row, pred, and a probability for each class; for registration and segmentation a folder
    #[arg(long)]
    pub out: PathBuf,
}

#[derive(Debug, Args)]
pub(super) struct EvalArgs {
    /// Model folder
    #[arg(long)]
    pub model: PathBuf,
    #[command(flatten)]
    pub data: DataArgs,
    #[command(flatten)]
    pub gamma: GammaArgs,
    #[command(flatten)]
    conditions: ConditionsArgs,
    /// Also score the mean of so many networks drawn at random
    #[arg(long)]
    samples: Option<usize>,
    /// Pairs of images that are registered, drawn within classes; pairs of one's own are all registered
    #[arg(long, default_value_t = 256)]
    pub pairs: usize,
    /// Label maps of the images that are registered, for their Dice: a folder laid out as that of the images with labels as
    /// grey levels, or an .npz with map [n, height, width]
    #[arg(long)]
    pub maps: Option<PathBuf>,
    /// CSV file to write; a plot goes beside it
    #[arg(long)]
    pub out: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(super) struct ExportArgs {
    /// Model folder
    #[arg(long)]
    model: PathBuf,
    /// The condition, its components between commas, in the units of training; a category by its name
    #[arg(long, value_delimiter = ',', required = true, allow_hyphen_values = true)]
    gamma: Vec<String>,
    /// Move values beyond the range to its end
    #[arg(long)]
    clamp: bool,
    /// Model folder to write, or .safetensors file of the weights alone
    #[arg(long)]
    to: PathBuf,
}

/// Classifies, registers or segments images.
pub(super) fn predict(args: &PredictArgs, cx: &Context) -> Result<()> {
    match checkpoint::task(&args.model)? {
        TaskKind::Classify => {}
        TaskKind::Register => return register::predict(args, cx),
        TaskKind::Scale => return scale::predict(args, cx),
    }
    let (config, model) = checkpoint::open(&args.model, cx)?;
    let images = args.data.read_for(&config, true)?;
    let classes = config.classes.iter().map(|class| format!("p_{class}"));
    let head = ["gamma", "row", "pred"].map(String::from).into_iter().chain(classes);
    let mut lines = vec![head.chain(args.samples.map(|_| "entropy".into())).collect::<Vec<String>>()];
    let mut add = |gamma: &str, row: usize, p: &[f32]| {
        let first = [gamma.to_string(), (row + 1).to_string(), config.classes[likeliest(p)].clone()];
        let entropy = args.samples.map(|_| entropy(p).to_string());
        lines.push(first.into_iter().chain(p.iter().map(f32::to_string)).chain(entropy).collect());
    };
    let own = args.conditions.conditions(images.len(), &config.ranges, args.gamma.clamp, cx)?;
    match (args.samples, own) {
        (Some(draws), _) => {
            let mean = mean_of(draws, &config, &model, &images, cx)?;
            mean.iter().enumerate().for_each(|(row, p)| add("mean", row, p));
        }
        (None, Some(own)) => {
            let found = predict_each(&model, config.control, &images, &own, cx)?;
            found
                .iter()
                .zip(&own)
                .enumerate()
                .for_each(|(row, (p, gamma))| add(&config.describe(gamma), row, p));
        }
        (None, None) => {
            for gamma in args.gamma.conditions(&config.ranges, cx)? {
                let found = classify(&model, config.control, &images, &gamma, cx)?;
                found.iter().enumerate().for_each(|(row, p)| add(&config.describe(&gamma), row, p));
            }
        }
    }
    write_csv(&args.out, &lines)?;
    let rows = lines.len() - 1;
    let result = json!({ "out": args.out, "rows": rows });
    cx.emit(&result, |_| format!("{rows} predictions in {}\n", args.out.display()))
}

/// Mean probabilities of so many networks, each under a condition drawn at random.
fn mean_of(
    draws: usize,
    config: &Config,
    model: &MipHyper<crate::arch::Classifier>,
    images: &Images,
    cx: &Context,
) -> Result<Vec<Vec<f32>>> {
    if draws == 0 {
        return Err(Error::usage("--samples 0 draws no network"));
    }
    if let Some(range) = config.ranges.iter().find(|range| !range.is_number()) {
        return Err(Error::usage(format!(
            "{} is one of several categories, which nothing draws",
            range.name
        ))
        .hint("name conditions with --gamma or --conditions"));
    }
    predict_mean(model, images, config.ranges.len(), draws, cx)
}

/// Entropy of probabilities, in nats.
fn entropy(p: &[f32]) -> f32 {
    -p.iter().filter(|p| **p > 0.0).map(|p| p * p.ln()).sum::<f32>()
}

fn write_csv(path: &Path, lines: &[Vec<String>]) -> Result<()> {
    let failed = || Error::work(format!("cannot write {}", path.display()));
    let mut writer = csv::Writer::from_writer(Vec::new());
    for line in lines {
        writer.write_record(line).map_err(|e| failed().caused_by(e))?;
    }
    let bytes = writer.into_inner().map_err(|e| failed().caused_by(e.into_error()))?;
    write_atomic(path, &bytes)
}

/// Measures how well images are classified, registered or segmented over the condition.
pub(super) fn eval(args: &EvalArgs, cx: &Context) -> Result<()> {
    match checkpoint::task(&args.model)? {
        TaskKind::Classify => {}
        TaskKind::Register => return register::eval(args, cx),
        TaskKind::Scale => return scale::eval(args, cx),
    }
    if args.maps.is_some() {
        return Err(Error::usage("label maps are for models that register images").hint("leave --maps out"));
    }
    let (config, model) = checkpoint::open(&args.model, cx)?;
    let images = args.data.read_for(&config, false)?;
    let mut found: Vec<(String, Scores)> = Vec::new();
    let mut lines: Vec<Value> = Vec::new();
    match args.conditions.conditions(images.len(), &config.ranges, args.gamma.clamp, cx)? {
        Some(own) => {
            let probabilities = predict_each(&model, config.control, &images, &own, cx)?;
            found.push(("own".into(), scores(&probabilities, &images.labels)));
            found.extend(by_category(&config, &own, &probabilities, &images.labels));
        }
        None => {
            for gamma in args.gamma.conditions(&config.ranges, cx)? {
                let probabilities = classify(&model, config.control, &images, &gamma, cx)?;
                // A grid goes along the diagonal: the first number stands for all.
                let is_plain = config.ranges.iter().all(Range::is_number);
                let name = if is_plain { gamma[0].to_string() } else { config.describe(&gamma) };
                found.push((name, scores(&probabilities, &images.labels)));
                lines.push(json!({ "gamma": gamma }));
            }
        }
    }
    let mean = match args.samples {
        Some(draws) => Some(scores(&mean_of(draws, &config, &model, &images, cx)?, &images.labels)),
        None => None,
    };
    lines.resize(found.len(), json!({}));
    for (line, (name, scores)) in lines.iter_mut().zip(&found) {
        line["condition"] = json!(name);
        line["scores"] = json!(scores);
    }
    if let Some(out) = &args.out {
        let head = ["gamma", "accuracy", "nll", "ece", "entropy"].map(String::from).to_vec();
        let row = |(name, s): &(String, Scores)| {
            let figures = [s.accuracy, s.nll, s.ece, s.entropy].map(|x| x.to_string());
            [vec![name.clone()], figures.to_vec()].concat()
        };
        let table: Vec<Vec<String>> = std::iter::once(head).chain(found.iter().map(row)).collect();
        write_csv(out, &table)?;
        plot(&found).save(&out.with_extension("svg"))?;
    }
    let result = json!({ "images": images.len(), "conditions": lines, "mean_of_samples": mean });
    cx.emit(&result, |_| {
        let width = found.iter().map(|(name, _)| name.len()).max().unwrap_or(0).max(8);
        let mut text = format!("{:<width$} accuracy  nll     ece\n", "gamma");
        let last = mean.map(|scores| ("mean".to_string(), scores));
        for (name, s) in found.iter().chain(&last) {
            text += &format!("{name:<width$} {:<9.4} {:<7.4} {:.4}\n", s.accuracy, s.nll, s.ece);
        }
        text
    })
}

/// Scores of the images of each category, where there are categories.
fn by_category(
    config: &Config,
    own: &[Vec<f32>],
    probabilities: &[Vec<f32>],
    labels: &[usize],
) -> Vec<(String, Scores)> {
    let mut found = Vec::new();
    for (component, range) in config.ranges.iter().enumerate() {
        for (place, category) in range.categories.iter().enumerate() {
            let is_of = |image: &usize| own[*image][component] as usize == place;
            let of: Vec<usize> = (0..labels.len()).filter(is_of).collect();
            if !of.is_empty() {
                let p: Vec<Vec<f32>> = of.iter().map(|&image| probabilities[image].clone()).collect();
                let right: Vec<usize> = of.iter().map(|&image| labels[image]).collect();
                found.push((format!("{}={category}", range.name), scores(&p, &right)));
            }
        }
    }
    found
}

/// Accuracy over the condition: a curve over numbers, bars for conditions with names.
fn plot(found: &[(String, Scores)]) -> Plot {
    let numbers: Vec<f64> = found.iter().filter_map(|(name, _)| name.parse().ok()).collect();
    let accuracies = || found.iter().map(|(_, scores)| scores.accuracy);
    if numbers.len() == found.len() {
        let points = numbers.into_iter().zip(accuracies()).collect();
        return Plot::lines("Accuracy over the condition", "γ", "accuracy").series("test", points);
    }
    let names = found.iter().map(|(name, _)| name.clone());
    Plot::bars("Accuracy over the condition", "accuracy", names, [("test", accuracies().collect())])
}

/// Writes the network for one condition.
pub(super) fn export(args: &ExportArgs, cx: &Context) -> Result<()> {
    let unet = |task, network, image, model: &MipHyper<UNet>| {
        write_network(args, &[Range::unit("gamma")], model, cx, |gamma| PlainUNetConfig {
            task,
            network,
            gamma,
            image,
        })
    };
    match checkpoint::task(&args.model)? {
        TaskKind::Classify => {
            let (Config { network, ranges, classes, .. }, model) = checkpoint::open(&args.model, cx)?;
            write_network(args, &ranges, &model, cx, |gamma| PlainConfig { network, gamma, classes })
        }
        TaskKind::Register => {
            let (config, model) = checkpoint::open_register(&args.model, cx)?;
            unet(config.task, config.network, config.image, &model)
        }
        TaskKind::Scale => {
            let (config, model) = checkpoint::open_scale(&args.model, cx)?;
            let [_, height, width] = config.image;
            unet(config.task, config.network, [height, width], &model)
        }
    }
}

/// Writes the network for the condition, and what `describe` says of it.
fn write_network<M: Module + ModuleDisplay, C: Serialize>(
    args: &ExportArgs,
    ranges: &[Range],
    model: &MipHyper<M>,
    cx: &Context,
    describe: impl FnOnce(Vec<f32>) -> C,
) -> Result<()> {
    let gamma = one_condition(&args.gamma, ranges, args.clamp, cx)?;
    let condition = Tensor::<1>::from_floats(gamma.as_slice(), &cx.device);
    let parameters = Module::num_params(&model.base);
    let result = json!({ "model": args.to, "gamma": gamma, "parameters": parameters });
    if args.to.extension().is_some_and(|ending| ending == "safetensors") {
        model.export(condition, &args.to)?;
    } else {
        let folder = ModelFolder::new(&args.to);
        folder.create()?;
        folder.save_weights(&TensorFile::from_module(&model.instantiate(condition)?))?;
        folder.save_config(KIND, &describe(gamma))?;
    }
    cx.emit(&result, |_| format!("{parameters} parameters in {}\n", args.to.display()))
}
