//! The verbs of `kiln mip`.

mod forward;
mod register;
mod scale;

use std::path::PathBuf;

use burn::module::{Module, ModuleDisplay};
use burn::tensor::Tensor;
use clap::{Args, Parser, Subcommand};
use kiln_core::{Context, Error, ModelFolder, Plot, Result, TensorFile, write_atomic};
use kiln_data::{ImageOptions, Images, digits};
use kiln_nn::{Method, TrainConfig, TrainRun, TrainSummary, likeliest};
use rand::seq::SliceRandom;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::ablation::{self, Axis};
use crate::arch::{Arch, ClassifierConfig};
use crate::arms::Optimiser;
use crate::checkpoint::{self, Config, KIND, PlainConfig, PlainUNetConfig, TaskKind};
use crate::classify::{ClassifyTask, Control, Sampling, predict, predict_mean, scores};
use crate::convert::{MipConfig, MipHyper, Parametrisation};
use crate::encoding::{Range, condition};
use crate::experiment::{digit_images, probe};
use crate::hypernet::{HyperNetConfig, Nonlinearity, OutputInit};
use crate::proportionality::measure;
use crate::unet::{CLIP, UNet};

/// The command whose runs a model folder keeps.
const TRAIN: &str = "mip train";

/// `kiln mip …`
#[derive(Debug, Parser)]
#[command(
    name = "mip",
    about = "Networks whose weights depend on a condition, and learn as fast as ordinary ones"
)]
#[command(after_help = "Examples:
  kiln mip train --data digits.csv --control rotation --out m/
  kiln mip eval --model m/ --data digits.csv --gamma-grid 11 --out accuracy.csv
  kiln mip export --model m/ --gamma 0.3 --to plain/")]
pub struct Command {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Train a classifier whose weights depend on a condition
    #[command(after_help = "Examples:
  kiln mip train --data digits.csv --control rotation --out m/
  kiln mip train --data photos/ --arch lenet --control smoothing --range smooth=0:0.5 --out m/
  kiln mip train --data digits.csv --control noise --gamma-dim 8 --out bayes/
  kiln mip train --data fashion/ --task register --out r/
  kiln mip train --data scans/ --task scale --out s/      scans/images/*.png with scans/masks/*.png
  kiln mip train --data digits.csv --resume m/      after Ctrl-C or a crash")]
    Train(TrainArgs),
    /// Classify images under one condition or several
    #[command(after_help = "Examples:
  kiln mip predict --model m/ --data new.csv --gamma 0.3 --out p.csv
  kiln mip predict --model m/ --data new.csv --gamma-grid 11 --out p.csv
  kiln mip predict --model bayes/ --data new.csv --samples 20 --out p.csv
  kiln mip predict --model r/ --data fashion/ --gamma 0.1 --out moved/      images and displacements
  kiln mip predict --model s/ --data scans/images --gamma 0.4 --out masks/")]
    Predict(PredictArgs),
    /// Accuracy, likelihood and calibration over the condition
    #[command(after_help = "Examples:
  kiln mip eval --model m/ --data test.csv --gamma-grid 11 --out accuracy.csv
The plot is written beside the table, as .svg.")]
    Eval(EvalArgs),
    /// Write the network for one condition as an ordinary model folder
    #[command(after_help = "Examples:
  kiln mip export --model m/ --gamma 0.3 --to plain/
  kiln export --model plain/ --out graph/")]
    Export(ExportArgs),
    /// Make a conditioned network of a trained one, which behaves the same at first
    #[command(after_help = "Examples:
  kiln mip convert --arch lenet --weights lenet.safetensors --data digits.csv --select 'net.conv*.weight' --out m/
Weights come from `kiln mip export` or have the same names; --data gives image size and classes.")]
    Convert(ConvertArgs),
    /// Measure how weights, activations and gradients scale with the condition
    #[command(after_help = "Examples:
  kiln mip analyze --model m/ --data digits.csv --gammas 0.01,0.1,0.5,1 --out report.json
  kiln mip analyze --arch mlp:32-32 --param default --out report.json")]
    Analyze(AnalyzeArgs),
    /// Compare the parametrisations over activations, norms, inputs, architectures and optimisers
    #[command(after_help = "Examples:
  kiln mip ablate --axes activation,optim --seeds 3 --out ablation/
  kiln mip ablate --axes activation,norm,dim,arch,optim,encoding --steps 700 --seeds 3 --out ablation/")]
    Ablate(AblateArgs),
    /// Run a bare hypernetwork on prepared tensors
    #[command(after_help = "Examples:
  kiln mip forward --weights hyper.safetensors --gamma gamma.safetensors:gamma --to theta.safetensors
  kiln mip forward --weights w.safetensors --gamma w.safetensors:gamma --layout layout.json --x --target --to out.safetensors
The weights are hyper.hidden0.weight [out, in] and .bias, .., hyper.output.weight and .bias.")]
    Forward(forward::ForwardArgs),
}

/// The images to work on.
#[derive(Debug, Args)]
struct DataArgs {
    /// Images: a folder with one folder a class, IDX, .npz or .csv
    #[arg(long)]
    data: PathBuf,
    /// IDX file of labels, where it is not beside the images
    #[arg(long)]
    labels: Option<PathBuf>,
    /// CSV column of labels; by default the last
    #[arg(long)]
    target: Option<String>,
}

impl DataArgs {
    fn read(&self, white: Option<f64>, unlabelled: bool) -> Result<Images> {
        let options =
            ImageOptions { labels: self.labels.clone(), target: self.target.clone(), white, unlabelled };
        Images::read(&self.data, &options)
    }

    /// Images that a trained model can classify.
    fn read_for(&self, config: &Config, unlabelled: bool) -> Result<Images> {
        let images = self.read(Some(config.white), unlabelled)?;
        if images.shape != config.network.image {
            let found = format!("the images are {:?}, channels first", images.shape);
            return Err(Error::input(self.data.display(), found)
                .hint(format!("the model was trained on {:?}", config.network.image)));
        }
        images.with_classes(&config.classes, &self.data)
    }
}

#[derive(Debug, Args)]
struct TrainArgs {
    #[command(flatten)]
    data: DataArgs,
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

/// What besides data, steps and seed decides the outcome.
#[derive(Debug, Clone, Args, Serialize, Deserialize)]
struct Recipe {
    /// What is learned
    #[arg(long, value_enum, default_value = "classify", conflicts_with = "resume")]
    task: TaskKind,
    #[command(flatten)]
    #[serde(flatten)]
    shape: ShapeArgs,
    /// What the condition means to a classifier
    #[arg(long, value_enum, default_value = "rotation", conflicts_with = "resume")]
    control: Control,
    /// How conditions are drawn
    #[arg(long, value_enum, default_value = "uniform", conflicts_with = "resume")]
    gamma_sampling: Sampling,
    /// Images of a step
    #[arg(long, default_value_t = 64, conflicts_with = "resume")]
    batch: usize,
    /// Draw a condition for every image, not one for all images of a step
    #[arg(long, conflicts_with = "resume")]
    #[serde(default)]
    per_sample: bool,
    /// What makes a step; sgd has a momentum of 0.9
    #[arg(long, value_enum, default_value = "adam", conflicts_with = "resume")]
    #[serde(default)]
    optim: Optimiser,
    /// Learning rate, the same in every step
    #[arg(long, default_value_t = 3e-4, conflicts_with = "resume")]
    lr: f64,
    /// Largest norm of the gradients; 0 leaves them [default: 1 for networks over images, 0 for classifiers]
    #[arg(long, conflicts_with = "resume")]
    clip: Option<f64>,
    /// Share of the images that is held out for validation
    #[arg(long, default_value_t = 0.1, conflicts_with = "resume")]
    val_fraction: f64,
    /// Steps between validations
    #[arg(long, default_value_t = 200, conflicts_with = "resume")]
    eval_every: usize,
    /// Steps between checkpoints: what a crash can cost at most
    #[arg(long, default_value_t = 200, conflicts_with = "resume")]
    checkpoint_every: usize,
}

impl Recipe {
    fn training(&self, steps: usize) -> TrainConfig {
        TrainConfig {
            steps,
            lr: self.lr,
            warmup: 0,
            min_lr_ratio: 1.0,
            weight_decay: 0.0,
            clip_norm: self.clip.unwrap_or(match self.task {
                TaskKind::Classify => 0.0,
                TaskKind::Register | TaskKind::Scale => CLIP,
            }),
            eval_every: self.eval_every,
            checkpoint_every: self.checkpoint_every,
            method: match self.optim {
                Optimiser::Adam => Method::AdamW,
                Optimiser::Sgd => Method::Sgd { momentum: 0.9 },
            },
            ..TrainConfig::default()
        }
    }
}

/// The network and its hypernetwork.
#[derive(Debug, Clone, Args, Serialize, Deserialize)]
struct ShapeArgs {
    /// The network: mlp:32-32, lenet or resnet8
    #[arg(long, default_value = "mlp:32-32")]
    arch: Arch,
    /// What follows each of its layers
    #[arg(long, value_enum, default_value = "leaky_relu")]
    act: Nonlinearity,
    /// Put a batch norm before that
    #[arg(long)]
    batch_norm: bool,
    /// How its weights depend on the condition
    #[arg(long, value_enum, default_value = "mip")]
    param: Parametrisation,
    /// Components of a condition
    #[arg(long, default_value_t = 1)]
    gamma_dim: usize,
    /// The components in your own units, name=low:high or name=low:high:log
    #[arg(long, value_name = "RANGE")]
    range: Vec<Range>,
    /// Parameters that depend on the condition, * stands for any characters; by default all of a classifier, and all but the
    /// biases of networks over images, whose few numbers would be drawn large
    #[arg(long, value_delimiter = ',')]
    select: Vec<String>,
    /// Hidden widths of the hypernetwork
    #[arg(long, value_delimiter = ',', default_value = "16,64,128")]
    hidden: Vec<usize>,
    /// How its output layer is drawn; by default hyperfan for networks over images, and for a classifier fan_out where
    /// weights are added to a network's own, fan_in otherwise
    #[arg(long, value_enum)]
    output_init: Option<OutputInit>,
    /// Make its output layer of two matrices with so many numbers between them
    #[arg(long)]
    rank: Option<usize>,
    /// Leave the network's own weights as they are
    #[arg(long)]
    freeze_base: bool,
}

impl ShapeArgs {
    /// The parametrisation; `all` are the parameters that depend on the condition unless others are named, and `drawn` is
    /// how the output layer is drawn unless it is said.
    fn mip(&self, all: &str, drawn: OutputInit) -> Result<MipConfig> {
        let hypernet = HyperNetConfig {
            encoding: self.param.encoding(),
            output_init: self.output_init.unwrap_or(drawn),
            hidden: self.hidden.clone(),
            rank: self.rank,
            ..HyperNetConfig::new(self.gamma_dim)
        };
        hypernet.check()?;
        Ok(MipConfig {
            select: if self.select.is_empty() { vec![all.into()] } else { self.select.clone() },
            hypernet,
            additive: self.param.is_additive(),
            freeze_base: self.freeze_base,
        })
    }

    fn config(&self, images: &Images, control: Control, sampling: Sampling) -> Result<Config> {
        let ranges = match self.range.len() {
            0 => (1..=self.gamma_dim).map(|i| Range::unit(format!("gamma{i}"))).collect(),
            n if n == self.gamma_dim => self.range.clone(),
            n => {
                return Err(Error::usage(format!("there are {n} ranges for {} components", self.gamma_dim))
                    .hint("give --range once for each component of --gamma-dim"));
            }
        };
        let network = ClassifierConfig {
            arch: self.arch.clone(),
            image: images.shape,
            classes: images.classes.len(),
            activation: self.act,
            batch_norm: self.batch_norm,
        };
        network.check()?;
        Ok(Config {
            task: TaskKind::Classify,
            network,
            mip: self.mip("*", self.param.output_init())?,
            control,
            sampling,
            ranges,
            classes: images.classes.clone(),
            white: images.white,
        })
    }
}

/// One condition or several.
#[derive(Debug, Args)]
struct GammaArgs {
    /// A condition, its components between commas, in the units of training
    #[arg(long, value_delimiter = ',', conflicts_with = "gamma_grid")]
    gamma: Option<Vec<f64>>,
    /// So many conditions evenly from one end to the other, the same for all components
    #[arg(long, value_name = "COUNT")]
    gamma_grid: Option<usize>,
    /// Move values beyond the range to its end
    #[arg(long)]
    clamp: bool,
}

impl GammaArgs {
    /// Conditions between 0 and 1.
    fn conditions(&self, ranges: &[Range], cx: &Context) -> Result<Vec<Vec<f32>>> {
        let narrow = |values: Vec<f64>| values.into_iter().map(|x| x as f32).collect();
        match (&self.gamma, self.gamma_grid) {
            (Some(values), _) => Ok(vec![narrow(condition(values, ranges, self.clamp, cx)?)]),
            (None, Some(0 | 1)) => Err(Error::usage("a grid needs at least two conditions")),
            (None, count) => {
                let count = count.unwrap_or(11);
                let place = |i: usize| i as f32 / (count - 1) as f32;
                Ok((0..count).map(|i| vec![place(i); ranges.len()]).collect())
            }
        }
    }
}

#[derive(Debug, Args)]
struct PredictArgs {
    /// Model folder
    #[arg(long)]
    model: PathBuf,
    #[command(flatten)]
    data: DataArgs,
    #[command(flatten)]
    gamma: GammaArgs,
    /// Average over so many networks drawn at random, and add the entropy
    #[arg(long, conflicts_with_all = ["gamma", "gamma_grid"])]
    samples: Option<usize>,
    /// Pairs of images that are registered, drawn within classes
    #[arg(long, default_value_t = 16)]
    pairs: usize,
    /// CSV file to write: gamma, row, pred, and a probability for each class; for registration a folder
    #[arg(long)]
    out: PathBuf,
}

#[derive(Debug, Args)]
struct EvalArgs {
    /// Model folder
    #[arg(long)]
    model: PathBuf,
    #[command(flatten)]
    data: DataArgs,
    #[command(flatten)]
    gamma: GammaArgs,
    /// Also score the mean of so many networks drawn at random
    #[arg(long)]
    samples: Option<usize>,
    /// Pairs of images that are registered, drawn within classes
    #[arg(long, default_value_t = 256)]
    pairs: usize,
    /// CSV file to write; a plot goes beside it
    #[arg(long)]
    out: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct ExportArgs {
    /// Model folder
    #[arg(long)]
    model: PathBuf,
    /// The condition, its components between commas, in the units of training
    #[arg(long, value_delimiter = ',', required = true)]
    gamma: Vec<f64>,
    /// Move values beyond the range to its end
    #[arg(long)]
    clamp: bool,
    /// Model folder to write
    #[arg(long)]
    to: PathBuf,
}

#[derive(Debug, Args)]
struct ConvertArgs {
    #[command(flatten)]
    data: DataArgs,
    /// Weights of the network, .safetensors
    #[arg(long)]
    weights: PathBuf,
    #[command(flatten)]
    shape: ShapeArgs,
    /// What the condition will mean
    #[arg(long, value_enum, default_value = "rotation")]
    control: Control,
    /// Model folder to write
    #[arg(long)]
    out: PathBuf,
}

#[derive(Debug, Args)]
struct AnalyzeArgs {
    /// Model folder; without it an untrained network is measured
    #[arg(long)]
    model: Option<PathBuf>,
    /// Images to pass through it; by default the digits that come with Kiln
    #[arg(long)]
    data: Option<PathBuf>,
    #[command(flatten)]
    shape: ShapeArgs,
    /// Conditions, the same for all components
    #[arg(long, value_delimiter = ',', default_value = "0.01,0.02,0.05,0.1,0.2,0.5,1")]
    gammas: Vec<f64>,
    /// JSON file to write; a plot goes beside it
    #[arg(long)]
    out: PathBuf,
}

#[derive(Debug, Args)]
struct AblateArgs {
    /// What is varied, one after another
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        default_value = "activation,norm,dim,arch,optim,encoding"
    )]
    axes: Vec<Axis>,
    /// Seeds of each run
    #[arg(long, default_value_t = 3)]
    seeds: u64,
    /// Steps of each run
    #[arg(long, default_value_t = 700)]
    steps: usize,
    /// Learning rate of Adam; gradient descent takes ten times as much
    #[arg(long, default_value_t = 1e-3)]
    lr: f64,
    /// Images; by default the digits that come with Kiln
    #[arg(long)]
    data: Option<PathBuf>,
    /// Folder to write: ablation.csv and a plot of the losses for each axis
    #[arg(long)]
    out: PathBuf,
}

impl Command {
    /// Runs the verb.
    ///
    /// # Errors
    /// Whatever the verb's work runs into.
    pub fn run(self, cx: &Context) -> Result<()> {
        match self.verb {
            Verb::Train(args) => run_train(args, cx),
            Verb::Predict(args) => run_predict(&args, cx),
            Verb::Eval(args) => run_eval(&args, cx),
            Verb::Export(args) => run_export(&args, cx),
            Verb::Convert(args) => run_convert(&args, cx),
            Verb::Analyze(args) => run_analyze(&args, cx),
            Verb::Ablate(args) => run_ablate(&args, cx),
            Verb::Forward(args) => forward::run(&args, cx),
        }
    }
}

fn run_train(args: TrainArgs, cx: &Context) -> Result<()> {
    let run = match (&args.resume, &args.out) {
        (Some(folder), _) => TrainRun::resume(TRAIN, folder, args.steps)?,
        (None, Some(out)) => TrainRun::begin(TRAIN, out, args.steps.unwrap_or(2000), args.recipe, cx),
        (None, None) => return Err(Error::usage("--out or --resume is needed")),
    };
    let cx = &run.context(cx);
    let recipe = &run.recipe;
    if recipe.batch == 0 {
        return Err(Error::usage("--batch must be at least 1"));
    }
    if !(recipe.val_fraction > 0.0 && recipe.val_fraction < 1.0) {
        return Err(Error::usage(format!("--val-fraction {} is not between 0 and 1", recipe.val_fraction)));
    }
    if recipe.per_sample && recipe.shape.batch_norm {
        return Err(Error::usage("batch norms look at images with other weights")
            .hint("leave --batch-norm out with --per-sample"));
    }
    match recipe.task {
        TaskKind::Classify => {}
        TaskKind::Register => return register::train(&run, &args.data, cx),
        TaskKind::Scale => return scale::train(&run, &args.data, cx),
    }
    let (config, images) = if run.resumed {
        let config: Config = run.folder.config(KIND)?;
        let images = args.data.read_for(&config, false)?;
        (config, images)
    } else {
        let images = args.data.read(None, false)?;
        (recipe.shape.config(&images, recipe.control, recipe.gamma_sampling)?, images)
    };
    let (train, valid) = split(&images, recipe.val_fraction, cx)?;
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
    let mut task = ClassifyTask {
        train: &train,
        valid: &valid,
        control: config.control,
        sampling: config.sampling,
        gamma_dim: config.ranges.len(),
        batch: recipe.batch,
        per_sample: recipe.per_sample,
        cx,
    };
    let data = format!("--data {}", args.data.data.display());
    let trained = run.train(model, &mut task, &training, &data, cx)?;
    let summary = run.finish(&trained, "nats per image")?;
    let middle = vec![0.5; config.ranges.len()];
    let probabilities = predict(&trained.model, config.control, &valid, &middle, cx)?;
    let result = TrainResult { summary, accuracy: scores(&probabilities, &valid.labels).accuracy };
    cx.emit(&result, |TrainResult { summary, accuracy }| {
        format!(
            "{}accuracy in the middle of the range {accuracy:.4} on the images held out\nmodel in {}\n",
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
    /// Of the best weights at γ = 0.5, on the images held out.
    accuracy: f64,
}

/// Holds out a share of the images, at random.
fn split(images: &Images, share: f64, cx: &Context) -> Result<(Images, Images)> {
    if images.len() < 2 {
        return Err(Error::usage("one image is too few")
            .hint("one is held out for validation, others are learned from"));
    }
    let mut order: Vec<usize> = (0..images.len()).collect();
    order.shuffle(&mut cx.rng("split", 0));
    let held_out = ((images.len() as f64 * share).round() as usize).clamp(1, images.len() - 1);
    let (valid, train) = order.split_at(held_out);
    Ok((images.select(train), images.select(valid)))
}

fn run_predict(args: &PredictArgs, cx: &Context) -> Result<()> {
    match checkpoint::task(&args.model)? {
        TaskKind::Classify => {}
        TaskKind::Register => return register::predict(args, cx),
        TaskKind::Scale => return scale::predict(args, cx),
    }
    let (config, model) = checkpoint::open(&args.model, cx)?;
    let images = args.data.read_for(&config, true)?;
    let mut writer = csv::Writer::from_writer(Vec::new());
    let failed = |e: csv::Error| Error::work(format!("cannot write {}", args.out.display())).caused_by(e);
    let classes = config.classes.iter().map(|class| format!("p_{class}"));
    let mut lines = 0;
    let mut write = |gamma: &str, rows: &[Vec<f32>]| -> Result<()> {
        for (number, row) in rows.iter().enumerate() {
            let first = [gamma.to_string(), (number + 1).to_string(), config.classes[likeliest(row)].clone()];
            writer.write_record(first.into_iter().chain(row.iter().map(f32::to_string))).map_err(failed)?;
            lines += 1;
        }
        Ok(())
    };
    let head = ["gamma", "row", "pred"].map(String::from).into_iter().chain(classes);
    let header: Vec<String> = head.collect();
    match args.samples {
        Some(0) => return Err(Error::usage("--samples 0 draws no network")),
        Some(draws) => write("mean", &predict_mean(&model, &images, config.ranges.len(), draws, cx)?)?,
        None => {
            for gamma in args.gamma.conditions(&config.ranges, cx)? {
                let text: Vec<String> = gamma.iter().map(f32::to_string).collect();
                write(&text.join(";"), &predict(&model, config.control, &images, &gamma, cx)?)?;
            }
        }
    }
    let body = writer
        .into_inner()
        .map_err(|e| Error::work(format!("cannot write {}", args.out.display())).caused_by(e.into_error()))?;
    let text = [header.join(",").as_bytes(), b"\n", &body].concat();
    write_atomic(&args.out, &text)?;
    let result = json!({ "out": args.out, "rows": lines });
    cx.emit(&result, |_| format!("{lines} predictions in {}\n", args.out.display()))
}

fn run_eval(args: &EvalArgs, cx: &Context) -> Result<()> {
    match checkpoint::task(&args.model)? {
        TaskKind::Classify => {}
        TaskKind::Register => return register::eval(args, cx),
        TaskKind::Scale => return scale::eval(args, cx),
    }
    let (config, model) = checkpoint::open(&args.model, cx)?;
    let images = args.data.read_for(&config, false)?;
    let mut lines: Vec<Value> = Vec::new();
    let mut points = Vec::new();
    for gamma in args.gamma.conditions(&config.ranges, cx)? {
        let found = scores(&predict(&model, config.control, &images, &gamma, cx)?, &images.labels);
        points.push((f64::from(gamma[0]), found));
        lines.push(json!({ "gamma": gamma, "scores": found }));
    }
    let mean = match args.samples {
        Some(0) => return Err(Error::usage("--samples 0 draws no network")),
        Some(draws) => {
            Some(scores(&predict_mean(&model, &images, config.ranges.len(), draws, cx)?, &images.labels))
        }
        None => None,
    };
    if let Some(out) = &args.out {
        let mut text = String::from("gamma,accuracy,nll,ece,entropy\n");
        for (gamma, s) in &points {
            text += &format!("{gamma},{},{},{},{}\n", s.accuracy, s.nll, s.ece, s.entropy);
        }
        write_atomic(out, text.as_bytes())?;
        Plot::lines("Accuracy over the condition", "γ", "accuracy")
            .series("test", points.iter().map(|(gamma, s)| (*gamma, s.accuracy)).collect())
            .save(&out.with_extension("svg"))?;
    }
    let result = json!({ "images": images.len(), "conditions": lines, "mean_of_samples": mean });
    cx.emit(&result, |_| {
        let mut text = String::from("gamma    accuracy  nll     ece\n");
        for (gamma, s) in &points {
            text += &format!("{gamma:<8.3} {:<9.4} {:<7.4} {:.4}\n", s.accuracy, s.nll, s.ece);
        }
        if let Some(s) = mean {
            text += &format!("mean     {:<9.4} {:<7.4} {:.4}\n", s.accuracy, s.nll, s.ece);
        }
        text
    })
}

fn run_export(args: &ExportArgs, cx: &Context) -> Result<()> {
    let unet = |task, network, image, model: &MipHyper<UNet>| {
        export(args, &[Range::unit("gamma")], model, cx, |gamma| PlainUNetConfig {
            task,
            network,
            gamma,
            image,
        })
    };
    match checkpoint::task(&args.model)? {
        TaskKind::Classify => {
            let (Config { network, ranges, classes, .. }, model) = checkpoint::open(&args.model, cx)?;
            export(args, &ranges, &model, cx, |gamma| PlainConfig { network, gamma, classes })
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
fn export<M: Module + ModuleDisplay, C: Serialize>(
    args: &ExportArgs,
    ranges: &[Range],
    model: &MipHyper<M>,
    cx: &Context,
    describe: impl FnOnce(Vec<f32>) -> C,
) -> Result<()> {
    let gamma: Vec<f32> =
        condition(&args.gamma, ranges, args.clamp, cx)?.into_iter().map(|x| x as f32).collect();
    let net = model.instantiate(Tensor::<1>::from_floats(gamma.as_slice(), &cx.device))?;
    let folder = ModelFolder::new(&args.to);
    folder.create()?;
    folder.save_weights(&TensorFile::from_module(&net))?;
    let parameters = Module::num_params(&net);
    let result = json!({ "model": args.to, "gamma": gamma, "parameters": parameters });
    folder.save_config(KIND, &describe(gamma))?;
    cx.emit(&result, |_| format!("{parameters} parameters in {}\n", args.to.display()))
}

fn run_convert(args: &ConvertArgs, cx: &Context) -> Result<()> {
    let images = args.data.read(None, false)?;
    let config = args.shape.config(&images, args.control, Sampling::Uniform)?;
    if !config.mip.additive {
        return Err(Error::usage("this parametrisation has no place for trained weights")
            .hint("convert with --param mip or --param residual"));
    }
    let model = config.draw(Some(TensorFile::read(&args.weights)?), cx)?;
    let folder = ModelFolder::new(&args.out);
    folder.create()?;
    folder.save_weights(&TensorFile::from_module(&model))?;
    folder.save_config(KIND, &config)?;
    let names: Vec<&str> = model.spec().params().iter().map(|param| param.name.as_str()).collect();
    let result = json!({ "model": args.out, "weights": model.spec().numel(), "conditioned": names });
    cx.emit(&result, |_| {
        format!(
            "{} weights depend on the condition: {}\nmodel in {}\n",
            model.spec().numel(),
            names.join(", "),
            args.out.display()
        )
    })
}

fn run_analyze(args: &AnalyzeArgs, cx: &Context) -> Result<()> {
    let images = match &args.data {
        Some(data) => Images::read(data, &ImageOptions::default())?,
        None => digit_images(digits::test()),
    };
    let (config, model) = match &args.model {
        Some(path) => checkpoint::open(path, cx)?,
        None => {
            let config = args.shape.config(&images, Control::Rotation, Sampling::Uniform)?;
            let model = config.draw(None, cx)?;
            (config, model)
        }
    };
    if images.shape != config.network.image {
        let found = format!("the images are {:?}, channels first", images.shape);
        return Err(Error::usage(found)
            .hint(format!("the model takes {:?}: name others with --data", config.network.image)));
    }
    let images = images.select(&(0..images.len().min(256)).collect::<Vec<_>>());
    let report =
        measure(&model, config.ranges.len(), &args.gammas, &cx.device, |net| probe(net, &images, cx))?;
    let json = serde_json::to_vec_pretty(&report)
        .map_err(|e| Error::work(format!("cannot write {}", args.out.display())).caused_by(e))?;
    write_atomic(&args.out, &json)?;
    report.plot().save(&args.out.with_extension("svg"))?;
    cx.emit(&report, |report| {
        let mut text = String::from("quantity                 slope   largest/smallest\n");
        for d in [&report.all_weights].into_iter().chain(&report.activations).chain([&report.gradient]) {
            text += &format!("{:<24} {:<7.3} {:.3}\n", d.name, d.slope, d.ratio);
        }
        text + &format!(
            "1 is proportional to the condition, 0 independent of it; all of it in {}\n",
            args.out.display()
        )
    })
}

fn run_ablate(args: &AblateArgs, cx: &Context) -> Result<()> {
    if args.seeds == 0 || args.steps < 2 {
        return Err(Error::usage("an ablation needs at least one seed and two steps"));
    }
    let images = match &args.data {
        Some(data) => Images::read(data, &ImageOptions::default())?,
        None => digit_images(digits::train()),
    };
    std::fs::create_dir_all(&args.out).map_err(Error::io("create", &args.out))?;
    let grid = ablation::Grid { steps: args.steps, seeds: args.seeds, lr: args.lr };
    let lines = ablation::run(&args.axes, &grid, &images, cx)?;
    let mut writer = csv::Writer::from_writer(Vec::new());
    let failed = |e: csv::Error| Error::work("cannot write ablation.csv").caused_by(e);
    for line in &lines {
        writer.serialize(&line.summary).map_err(failed)?;
    }
    let text = writer
        .into_inner()
        .map_err(|e| Error::work("cannot write ablation.csv").caused_by(e.into_error()))?;
    write_atomic(&args.out.join("ablation.csv"), &text)?;
    for plot in ablation::plots(&lines) {
        plot.save(&args.out.join(plot.file_stem()).with_extension("svg"))?;
    }
    let summaries: Vec<_> = lines.iter().map(|line| &line.summary).collect();
    cx.emit(&summaries, |summaries| {
        let mut text = String::from("axis         setting      arm             steps   ratio   diverged\n");
        for s in summaries.iter() {
            text += &format!(
                "{:<12} {:<12} {:<15} {:<7.0} {:<7.2} {}\n",
                s.axis, s.setting, s.arm, s.steps, s.convergence_ratio, s.diverged
            );
        }
        text + &format!("curves and table in {}\n", args.out.display())
    })
}
