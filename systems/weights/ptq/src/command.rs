//! The verbs of `kiln ptq`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::module::Module;
use clap::{Args, Parser, Subcommand, ValueEnum};
use kiln_compiler::{Executor, Graph, OnnxOptions, capture};
use kiln_core::{Context, Error, HostTensor, ModelFolder, Plot, Result, TensorFile, write_atomic};
use kiln_data::{ImageOptions, Images, write_npz};
use kiln_nn::{TrainConfig, TrainRun, TrainSummary, initialise, likeliest};
use rand::seq::SliceRandom;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokenizers::Tokenizer;

use crate::arch::{Arch, ClassifierConfig, Input};
use crate::arrays::{self, Column};
use crate::checkpoint::{self, KIND, Trained};
use crate::data::{self, Examples, Texts};
use crate::latency::{Profile, measure, timing};
use crate::mlp::Mlp;
use crate::program::Program;
use crate::quantise::{
    self, Metric, Quantiser, SearchPlan, Sensitivities, check_labels, logits, sample, score,
};
use crate::quantiser::{Asymmetric, Calibrator, Rows, largest_size, weight_range};
use crate::search::{Augment, Bits, Order, Trials, Tried, pareto};
use crate::store::{self, Quantised};
use crate::training::ClassifyTask;

/// The command whose runs a model folder keeps.
const TRAIN: &str = "ptq train";

/// Word pieces that are learnt from texts.
const VOCABULARY: usize = 4000;

/// `kiln ptq …`
#[derive(Debug, Parser)]
#[command(
    name = "ptq",
    about = "Trained networks in 16, 8 and 4 bits, as fast as the accuracy that you ask for allows"
)]
#[command(after_help = "Examples:
  kiln ptq train --arch mobilenetv2-s --data fashion/ --out m/
  kiln ptq quantize --model m/ --calib fashion/ --valid t10k-images-idx3-ubyte.gz --max-drop 0.1% --out q/
  kiln ptq eval --model q/ --data t10k-images-idx3-ubyte.gz
  kiln ptq bench --model q/ --data t10k-images-idx3-ubyte.gz")]
pub struct Command {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Train a network of images or texts
    #[command(after_help = "Examples:
  kiln ptq train --arch resnet-s --data photos/ --epochs 8 --out m/
  kiln ptq train --arch bert-s --data reviews.csv --out m/         columns label and text
  kiln ptq train --data photos/ --resume m/                        after Ctrl-C or a crash")]
    Train(TrainArgs),
    /// Decide the bits of every unit and write the quantised network
    #[command(after_help = "Examples:
  kiln ptq quantize --model m/ --calib photos/ --valid more/ --target 0.999 --out q/
  kiln ptq quantize --model m/ --calib x.npz --valid xy.npz --max-drop 0.5% --order hessian --out q/
  kiln export --model any/ --out graph/ && kiln ptq quantize --model graph/ --calib xy.npz --valid xy.npz --out q/
The search goes on where it was interrupted when the same command is given again.")]
    Quantize(QuantizeArgs),
    /// Classify examples with a quantised network, in whole numbers
    #[command(after_help = "Examples:
  kiln ptq predict --model q/ --input photos/ --out p.csv
  kiln ptq predict --model q/ --input x.npz --out y.npz        logits, as an array y")]
    Predict(PredictArgs),
    /// Accuracy of a quantised or a trained network
    #[command(after_help = "Example:
  kiln ptq eval --model q/ --data test/")]
    Eval(EvalArgs),
    /// Latency and size of a quantised network beside sixteen bits
    #[command(after_help = "Example:
  kiln ptq bench --model q/ --data test/ --batch 1 --runs 50")]
    Bench(BenchArgs),
    /// Measure how sensitive every unit is
    #[command(after_help = "Example:
  kiln ptq sensitivity --model m/ --calib photos/ --examples 256 --out s/")]
    Sensitivity(SensitivityArgs),
    /// Measure the constants of the latency model on this machine
    #[command(after_help = "Example:
  kiln ptq profile --out profile.json")]
    Profile(ProfileArgs),
    /// Compare a quantised network with another, unit by unit
    #[command(after_help = "Example:
  kiln ptq compare m/ q/ --data test/")]
    Compare(CompareArgs),
    /// Quantise an array
    #[command(after_help = "Example:
  kiln ptq quant-array --input w.npy --bits 8 --scheme sym --calibrator minmax --axis 0 --out q.npz")]
    QuantArray(QuantArrayArgs),
    /// Sensitivities of a small perceptron, exactly
    #[command(after_help = "Example:
  kiln ptq sensitivity-mlp --input mlp.json --bits 4 --exact-trace
The file holds W (a list of matrices [out, in]), B, X and Y.")]
    SensitivityMlp(MlpArgs),
}

#[derive(Debug, Args)]
struct TrainArgs {
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

/// A trained network.
#[derive(Debug, Args)]
struct ModelArgs {
    /// Folder of a network that `kiln ptq train` or `kiln export` wrote, or an ONNX file
    #[arg(long, value_name = "DIR|FILE.onnx")]
    model: PathBuf,
}

/// How activations and weights get their ranges.
#[derive(Debug, Args)]
struct CalibArgs {
    /// Examples to calibrate with, and, where they have labels, to measure sensitivities on
    #[arg(long = "calib", alias = "calibration", value_name = "DATA")]
    calib: PathBuf,
    /// How many of them calibrate
    #[arg(long, default_value_t = 256)]
    calib_count: usize,
    /// How ranges are chosen
    #[arg(long, value_enum, default_value = "mse")]
    calibrator: Calibrator,
    /// Labelled examples on which sensitivities are measured
    #[arg(long, default_value_t = 256)]
    examples: usize,
    /// Random directions for the curvature of each unit
    #[arg(long, default_value_t = 8)]
    probes: usize,
    /// Leave out the losses of pairs of units, which take the most time
    #[arg(long)]
    no_pairs: bool,
}

#[derive(Debug, Args)]
struct QuantizeArgs {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    calib: CalibArgs,
    /// Labelled examples on which the search is judged
    #[arg(long, value_name = "DATA")]
    valid: PathBuf,
    /// How many of them at most
    #[arg(long, default_value_t = 2000)]
    valid_count: usize,
    /// Least share of the metric that must remain
    #[arg(long, default_value_t = 0.999, conflicts_with = "max_drop")]
    target: f64,
    /// How much of the metric may be lost, in points: 0.1% or 0.001
    #[arg(long, value_parser = share)]
    max_drop: Option<f64>,
    /// What is measured
    #[arg(long, value_enum, default_value = "accuracy")]
    metric: Metric,
    /// Precisions that may be used
    #[arg(long, value_delimiter = ',', default_value = "16,8,4")]
    bits: Vec<u8>,
    /// By what units are ordered
    #[arg(long, value_enum, default_value = "augmented")]
    order: Order,
    /// Weight of the dependencies between units; 0 leaves curvature alone
    #[arg(long, default_value_t = 1.0)]
    lambda: f64,
    /// Which dependencies
    #[arg(long, value_enum, default_value = "pair+single")]
    augment: Augment,
    /// A unit that must have so many bits: conv0=16
    #[arg(long, value_name = "NAME=BITS")]
    pin: Vec<String>,
    /// Try the refused units one by one afterwards
    #[arg(long)]
    refine: bool,
    /// Constants of the latency model, as `profile` writes them; measured anew by default
    #[arg(long)]
    profile: Option<PathBuf>,
    /// Folder to write
    #[arg(long)]
    out: PathBuf,
}

/// `0.1%` or `0.001`.
fn share(text: &str) -> Result<f64, String> {
    let (number, unit) = match text.strip_suffix('%') {
        Some(number) => (number, 100.0),
        None => (text, 1.0),
    };
    match number.trim().parse::<f64>() {
        Ok(x) if (0.0..=1.0).contains(&(x / unit)) => Ok(x / unit),
        _ => Err("must be a share such as 0.1% or 0.001".into()),
    }
}

#[derive(Debug, Args)]
struct PredictArgs {
    /// Folder of a quantised network
    #[arg(long)]
    model: PathBuf,
    /// Examples; labels are not needed
    #[arg(long)]
    input: PathBuf,
    /// .csv with classes and probabilities, or .npz with logits `y`
    #[arg(long)]
    out: PathBuf,
}

#[derive(Debug, Args)]
struct EvalArgs {
    /// Folder of a quantised or a trained network
    #[arg(long)]
    model: PathBuf,
    /// Labelled examples
    #[arg(long)]
    data: PathBuf,
}

#[derive(Debug, Args)]
struct BenchArgs {
    /// Folder of a quantised network
    #[arg(long)]
    model: PathBuf,
    /// Examples to run
    #[arg(long)]
    data: PathBuf,
    /// Examples at once
    #[arg(long, default_value_t = 1)]
    batch: usize,
    /// Runs that count, after five that do not
    #[arg(long, default_value_t = 50)]
    runs: usize,
}

#[derive(Debug, Args)]
struct SensitivityArgs {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    calib: CalibArgs,
    /// Folder to write: sensitivity.json and plots
    #[arg(long)]
    out: PathBuf,
}

#[derive(Debug, Args)]
struct ProfileArgs {
    /// JSON file to write
    #[arg(long)]
    out: PathBuf,
}

#[derive(Debug, Args)]
struct CompareArgs {
    /// Folder of the network as it was, or of a quantised one
    first: PathBuf,
    /// Folder of a quantised network
    second: PathBuf,
    /// Examples to run
    #[arg(long)]
    data: PathBuf,
    /// How many of them
    #[arg(long, default_value_t = 64)]
    count: usize,
}

/// Around zero or not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Scheme {
    /// Around zero, as for weights
    Sym,
    /// With a zero point, as for activations
    Asym,
}

#[derive(Debug, Args)]
struct QuantArrayArgs {
    /// .npy file, or .npz file with one array
    #[arg(long)]
    input: PathBuf,
    /// Bits of the whole numbers
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(2..=16))]
    bits: u32,
    /// Around zero or not
    #[arg(long, value_enum, default_value = "sym")]
    scheme: Scheme,
    /// How the range is chosen
    #[arg(long, value_enum, default_value = "minmax")]
    calibrator: Calibrator,
    /// Give every row along the first axis a scale of its own
    #[arg(long, value_parser = clap::value_parser!(u32).range(0..=0))]
    axis: Option<u32>,
    /// .npz file to write: scale, zero, q, deq
    #[arg(long)]
    out: PathBuf,
}

#[derive(Debug, Args)]
struct MlpArgs {
    /// JSON file with W, B, X and Y
    #[arg(long)]
    input: PathBuf,
    /// Bits of the weights
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(2..=16))]
    bits: u32,
    /// Compute traces exactly instead of estimating them
    #[arg(long)]
    exact_trace: bool,
    /// Random directions of the estimate
    #[arg(long, default_value_t = 4096)]
    probes: usize,
}

impl Command {
    /// Runs the verb.
    ///
    /// # Errors
    /// Whatever the verb's work runs into.
    pub fn run(self, cx: &Context) -> Result<()> {
        match self.verb {
            Verb::Train(args) => run_train(args, cx),
            Verb::Quantize(args) => run_quantize(&args, cx),
            Verb::Predict(args) => run_predict(&args, cx),
            Verb::Eval(args) => run_eval(&args, cx),
            Verb::Bench(args) => run_bench(&args, cx),
            Verb::Sensitivity(args) => run_sensitivity(&args, cx),
            Verb::Profile(args) => run_profile(&args, cx),
            Verb::Compare(args) => run_compare(&args, cx),
            Verb::QuantArray(args) => run_quant_array(&args, cx),
            Verb::SensitivityMlp(args) => run_mlp(&args, cx),
        }
    }
}

fn run_train(args: TrainArgs, cx: &Context) -> Result<()> {
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
    let ready: Vec<_> = program.units.iter().map(crate::unit::Ready::float).collect();
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
    let tokenizer = texts.learn_vocabulary(VOCABULARY)?;
    let classes = texts.classes();
    let input = Input::Text { vocabulary: tokenizer.get_vocab_size(true), length: recipe.length };
    let network = network(input, classes.len())?;
    let examples = texts.encode(&tokenizer, recipe.length, &classes, path)?;
    Ok((checkpoint::Config { network, classes, white: 1.0 }, examples, Some(data::to_json(&tokenizer)?)))
}

/// Texts to train on and texts held out, and the network for them.
pub(crate) fn learnt_texts(
    train: &Path,
    test: &Path,
    length: usize,
) -> Result<(ClassifierConfig, Examples, Examples)> {
    let texts = Texts::read(train, true)?;
    let tokenizer = texts.learn_vocabulary(VOCABULARY)?;
    let classes = texts.classes();
    let input = Input::Text { vocabulary: tokenizer.get_vocab_size(true), length };
    let config = ClassifierConfig::new(Arch::Bert, input, classes.len());
    let test_examples = Texts::read(test, true)?.encode(&tokenizer, length, &classes, test)?;
    Ok((config, texts.encode(&tokenizer, length, &classes, train)?, test_examples))
}

/// The tokenizer in a folder, for texts.
fn tokenizer_of(folder: &Path, input: Input) -> Result<Option<Tokenizer>> {
    match input {
        Input::Text { .. } => data::open_tokenizer(&folder.join("tokenizer.json")).map(Some),
        Input::Image(_) => Ok(None),
    }
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

/// A network that is about to be quantised, and how its examples are read.
struct Source {
    program: Program,
    graph: Graph,
    input: Option<Input>,
    classes: Vec<String>,
    white: f64,
    tokenizer: Option<Tokenizer>,
    folder: PathBuf,
}

impl Source {
    fn open(path: &Path, cx: &Context) -> Result<Self> {
        if store::is_quantised(path) {
            return Err(Error::input(path.display(), "holds a network that is quantised already")
                .hint("quantise the network that it was made from"));
        }
        let (graph, input, classes, white) = if path.extension().is_some_and(|extension| extension == "onnx")
        {
            (Graph::from_onnx(path, &OnnxOptions::default())?, None, Vec::new(), 1.0)
        } else if path.join("graph.json").exists() {
            (Graph::load(path)?, None, Vec::new(), 1.0)
        } else {
            let kind = ModelFolder::new(path).kind()?;
            if kind != KIND {
                return Err(Error::input(path.display(), format!("holds a model of {kind}")).hint(format!(
                    "make a graph of it first: kiln export --model {} --out graph/",
                    path.display()
                )));
            }
            let (config, net) = checkpoint::open(path, cx)?;
            let graph = capture(Box::new(Trained::new(config.network, net)))?;
            (graph, Some(config.network.input), config.classes, config.white)
        };
        if graph.inputs.len() != 1 || graph.inputs[0].port.shape.first() != Some(&1) {
            let ports: Vec<String> = graph
                .inputs
                .iter()
                .map(|input| format!("{} {:?}", input.port.name, input.port.shape))
                .collect();
            return Err(Error::input(path.display(), format!("the network reads {}", ports.join(", ")))
                .hint("networks with one input, for one example at a time, can be quantised"));
        }
        let output = &graph.outputs[0].port;
        if output.shape.len() != 2 || output.shape[0] != 1 {
            return Err(Error::input(path.display(), format!("the network's output is {:?}", output.shape))
                .hint("classifiers, whose output is [1, classes], can be quantised"));
        }
        let tokenizer = match input {
            Some(input) => tokenizer_of(path, input)?,
            None => None,
        };
        Ok(Self {
            program: Program::new(graph.clone())?,
            graph,
            input,
            classes,
            white,
            tokenizer,
            folder: path.into(),
        })
    }

    fn read(&self, path: &Path, labelled: bool) -> Result<Examples> {
        let examples = match self.input {
            Some(input) => {
                data::read(path, input, &self.classes, self.white, self.tokenizer.as_ref(), labelled)?
            }
            None => {
                let port = &self.graph.inputs[0].port;
                data::read_for_port(path, &port.shape[1..], port.kind, labelled)?
            }
        };
        if labelled {
            check_labels(&examples, self.class_count(), path)?;
        }
        Ok(examples)
    }

    fn class_count(&self) -> usize {
        self.graph.outputs[0].port.shape[1]
    }
}

impl CalibArgs {
    /// Calibrates, and measures sensitivities on labelled examples.
    fn measure(
        &self,
        source: &Source,
        other: Option<&Examples>,
        cx: &Context,
    ) -> Result<(Quantiser, Sensitivities)> {
        let all = match source.read(&self.calib, true) {
            Ok(all) => all,
            // Calibration needs no labels, where there are others to measure sensitivities on.
            Err(error) => match other {
                Some(_) => source.read(&self.calib, false).map_err(|_| error)?,
                None => return Err(error),
            },
        };
        let calibration = all.select(&sample(all.len(), self.calib_count, "calibration", cx));
        let labelled = if all.labels.is_empty() { other.unwrap_or(&all) } else { &all };
        let chosen = labelled.select(&sample(labelled.len(), self.examples, "sensitivity", cx));
        let quantiser = Quantiser::calibrate(source.program.clone(), &calibration, self.calibrator, cx)?;
        let sensitivities = quantiser.sensitivities(&chosen, self.probes, !self.no_pairs, cx)?;
        Ok((quantiser, sensitivities))
    }

    fn check(&self) -> Result<()> {
        if self.calib_count == 0 || self.examples == 0 {
            return Err(Error::usage("--calib-count and --examples must be at least 1"));
        }
        Ok(())
    }
}

/// What decides a search, kept beside it so that it goes on only if nothing has changed.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct SearchRecipe {
    model: PathBuf,
    calib: PathBuf,
    valid: PathBuf,
    counts: [usize; 4],
    calibrator: Calibrator,
    pairs: bool,
    seed: u64,
    plan: SearchPlan,
}

fn run_quantize(args: &QuantizeArgs, cx: &Context) -> Result<()> {
    args.calib.check()?;
    if !(args.target > 0.0 && args.target <= 1.0) {
        return Err(Error::usage(format!("--target {} is not above 0 and at most 1", args.target)));
    }
    if let Some(bits) = args.bits.iter().find(|bits| ![16, 8, 4].contains(*bits)) {
        return Err(Error::usage(format!("--bits {bits} is not one of 16, 8 and 4")));
    }
    let source = Source::open(&args.model.model, cx)?;
    let plan = SearchPlan {
        metric: args.metric,
        target: args.target,
        max_drop: args.max_drop,
        bits: args.bits.clone(),
        order: args.order,
        lambda: args.lambda,
        augment: args.augment,
        pinned: pinned(&args.pin, &source.program)?,
        refine: args.refine,
        ..SearchPlan::default()
    };
    let recipe = SearchRecipe {
        model: args.model.model.clone(),
        calib: args.calib.calib.clone(),
        valid: args.valid.clone(),
        counts: [args.calib.calib_count, args.calib.examples, args.calib.probes, args.valid_count],
        calibrator: args.calib.calibrator,
        pairs: !args.calib.no_pairs,
        seed: cx.seed,
        plan: plan.clone(),
    };
    let folder = ModelFolder::new(&args.out);
    let earlier = resumed(&folder, &recipe)?;
    let profile = match &args.profile {
        Some(path) => read_json(path, "the constants of a latency model")?,
        None => Profile::measure(),
    };
    let valid = source.read(&args.valid, true)?;
    let valid = valid.select(&sample(valid.len(), args.valid_count, "validation", cx));
    let (quantiser, sensitivities) = args.calib.measure(&source, Some(&valid), cx)?;
    folder.create()?;
    write_json(&folder.file("search.json"), &recipe)?;
    write_json(&folder.file("sensitivity.json"), &sensitivities)?;

    let mut log = String::from("bits,metric\n");
    earlier.iter().for_each(|tried| log += &trial_line(tried));
    let mut trials = Trials::resumed(earlier);
    let found = quantiser.search(&sensitivities, &valid, &plan, &mut trials, cx, |tried| {
        log += &trial_line(tried);
        write_atomic(&folder.file("search.csv"), log.as_bytes())
    })?;
    let metric = score(&quantiser.real_logits(&found.bits, &valid)?, &valid.labels, plan.metric);
    let config = store::config(
        &quantiser,
        &found,
        &plan,
        metric,
        (source.input, source.classes.clone(), source.white),
    );
    store::save(&folder, &quantiser, &found.bits, &config)?;
    if source.tokenizer.is_some() {
        let tokenizer = source.folder.join("tokenizer.json");
        let bytes = std::fs::read(&tokenizer).map_err(Error::io("read", &tokenizer))?;
        write_atomic(&folder.file("tokenizer.json"), &bytes)?;
    }
    write_front(&folder, &quantiser, &trials, &profile)?;
    plot_sensitivities(&folder, &sensitivities)?;
    let sixteen: Bits = vec![16; found.bits.len()];
    let [plain, quantised] = [&sixteen, &found.bits].map(|bits| {
        measure(&quantiser.program, &quantiser.real(bits), &valid, 50).map(|timing| timing.median)
    });
    let (bytes, bytes_of_16) = quantiser.bytes(&found.bits);
    let result = QuantizeResult {
        out: args.out.clone(),
        units: found.bits.len(),
        at_8_bits: found.bits.iter().filter(|&&bits| bits == 8).count(),
        at_4_bits: found.bits.iter().filter(|&&bits| bits == 4).count(),
        baseline: found.baseline,
        target: found.target,
        metric,
        evaluations: trials.tried.len(),
        measured_seconds: [plain?, quantised?],
        modelled_seconds: [&sixteen, &found.bits].map(|bits| profile.latency(&quantiser.program, bits)),
        bytes: [bytes_of_16, bytes],
        negative_traces: sensitivities.traces.iter().filter(|trace| trace.mean < 0.0).count(),
    };
    cx.emit(&result, QuantizeResult::to_text)
}

/// What `quantize` prints.
#[derive(Serialize)]
struct QuantizeResult {
    out: PathBuf,
    units: usize,
    at_8_bits: usize,
    at_4_bits: usize,
    /// The metric of the network as it was.
    baseline: f64,
    /// What had to be reached.
    target: f64,
    /// The quantised network's, computed in whole numbers.
    metric: f64,
    evaluations: usize,
    /// Median of fifty runs with one example, at sixteen bits and quantised.
    measured_seconds: [f64; 2],
    /// The same by the latency model.
    modelled_seconds: [f64; 2],
    /// At sixteen bits and quantised.
    bytes: [usize; 2],
    /// Estimates of traces that were below 0 and count as 0.
    negative_traces: usize,
}

impl QuantizeResult {
    fn to_text(&self) -> String {
        let less = |[before, after]: [f64; 2]| 100.0 * (1.0 - after / before);
        let none = if self.at_8_bits + self.at_4_bits == 0 {
            "no unit can be quantised within the target: the network stays at 16 bits\n"
        } else {
            ""
        };
        format!(
            "{none}{} units: {} at 8 bits, {} at 4, {} at 16, after {} evaluations\n\
             metric {:.4} (as it was {:.4}, at least {:.4})\n\
             one example takes {:.3} ms instead of {:.3} ms at 16 bits ({:.1} % less; {:.1} % by the latency model)\n\
             weights {} bytes instead of {} ({:.1} % less)\n\
             quantised network in {}\n",
            self.units,
            self.at_8_bits,
            self.at_4_bits,
            self.units - self.at_8_bits - self.at_4_bits,
            self.evaluations,
            self.metric,
            self.baseline,
            self.target,
            1e3 * self.measured_seconds[1],
            1e3 * self.measured_seconds[0],
            less(self.measured_seconds),
            less(self.modelled_seconds),
            self.bytes[1],
            self.bytes[0],
            less(self.bytes.map(|bytes| bytes as f64)),
            self.out.display()
        )
    }
}

/// `conv0=16`
fn pinned(pins: &[String], program: &Program) -> Result<BTreeMap<usize, u8>> {
    let unit = |pin: &String| {
        let (name, bits) = pin
            .split_once('=')
            .and_then(|(name, bits)| {
                Some((name, bits.parse::<u8>().ok().filter(|b| [16, 8, 4].contains(b))?))
            })
            .ok_or_else(|| Error::usage(format!("--pin {pin} is not NAME=BITS with 16, 8 or 4 bits")))?;
        let at = program.units.iter().position(|unit| unit.name == name).ok_or_else(|| {
            let names: Vec<&str> = program.units.iter().map(|unit| unit.name.as_str()).collect();
            Error::usage(format!("there is no unit \"{name}\""))
                .hint(format!("there are: {}", names.join(", ")))
        })?;
        Ok((at, bits))
    };
    pins.iter().map(unit).collect()
}

fn read_json<T: serde::de::DeserializeOwned>(path: &Path, what: &str) -> Result<T> {
    let text = std::fs::read(path).map_err(Error::io("read", path))?;
    serde_json::from_slice(&text)
        .map_err(|e| Error::input(path.display(), format!("does not hold {what}")).caused_by(e))
}

fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_vec_pretty(value)
        .map_err(|e| Error::work(format!("cannot write {}", path.display())).caused_by(e))?;
    write_atomic(path, &text)
}

/// One line of `search.csv`.
fn trial_line(tried: &Tried) -> String {
    let bits: Vec<String> = tried.bits.iter().map(u8::to_string).collect();
    format!("{},{}\n", bits.join(" "), tried.metric)
}

/// What an earlier search of the same kind has tried; an error where the folder holds another.
fn resumed(folder: &ModelFolder, recipe: &SearchRecipe) -> Result<Vec<Tried>> {
    if !folder.file("search.json").exists() {
        return Ok(Vec::new());
    }
    let earlier: SearchRecipe = read_json(&folder.file("search.json"), "the settings of a search")?;
    if earlier != *recipe {
        return Err(Error::usage(format!("{} holds a search with other settings", folder.path().display()))
            .hint("give the same options to go on with it, or choose another --out"));
    }
    let path = folder.file("search.csv");
    let Ok(text) = std::fs::read_to_string(&path) else { return Ok(Vec::new()) };
    let line = |(number, line): (usize, &str)| {
        let parsed = line.split_once(',').and_then(|(bits, metric)| {
            let bits = bits.split(' ').map(|b| b.parse::<u8>().ok()).collect::<Option<Bits>>()?;
            Some(Tried { bits, metric: metric.trim().parse().ok()? })
        });
        parsed.ok_or_else(|| {
            Error::input(format!("{}, line {}", path.display(), number + 1), "is not bits and a metric")
                .hint("remove the file to search anew")
        })
    };
    text.lines().enumerate().skip(1).map(line).collect()
}

/// `pareto.csv` and its plot: every configuration that was tried, and those that no other beats.
fn write_front(
    folder: &ModelFolder,
    quantiser: &Quantiser,
    trials: &Trials,
    profile: &Profile,
) -> Result<()> {
    let points: Vec<(f64, f64)> = trials
        .tried
        .iter()
        .map(|tried| (tried.metric, profile.latency(&quantiser.program, &tried.bits)))
        .collect();
    let front = pareto(&points);
    let mut text = String::from("metric,modelled_ms,bytes,on_front,bits\n");
    for (at, tried) in trials.tried.iter().enumerate() {
        let bits: Vec<String> = tried.bits.iter().map(u8::to_string).collect();
        let on = u8::from(front.contains(&at));
        let (bytes, _) = quantiser.bytes(&tried.bits);
        text += &format!("{},{},{bytes},{on},{}\n", tried.metric, 1e3 * points[at].1, bits.join(" "));
    }
    write_atomic(&folder.file("pareto.csv"), text.as_bytes())?;
    let milliseconds = |at: usize| (1e3 * points[at].1, points[at].0);
    Plot::points("Configurations that were tried", "modelled latency, ms", "metric")
        .series("tried", (0..points.len()).map(milliseconds).collect())
        .series("not beaten", front.into_iter().map(milliseconds).collect())
        .save(&folder.file("pareto.svg"))
}

fn plot_sensitivities(folder: &ModelFolder, found: &Sensitivities) -> Result<()> {
    if let Some(width) = found.four.pair.first().map(Vec::len) {
        let values = found.four.pair.iter().flatten().map(|d| d.max(0.0)).collect();
        Plot::heat_map("What pairs of units lose beyond the sum, 4 bits", "unit", "unit", width, values)
            .save(&folder.file("pairs.svg"))?;
    }
    let shares = |values: Vec<f64>| {
        let sum = values.iter().sum::<f64>().max(1e-300);
        values.into_iter().map(|value| value / sum).collect::<Vec<f64>>()
    };
    let series = [
        ("curvature", shares(found.four.hessian.clone())),
        ("dependency", shares(found.four.dependency(Augment::Both))),
    ];
    Plot::bars("Sensitivity at 4 bits", "share", found.units.clone(), series)
        .save(&folder.file("sensitivity.svg"))
}

fn run_sensitivity(args: &SensitivityArgs, cx: &Context) -> Result<()> {
    args.calib.check()?;
    let source = Source::open(&args.model.model, cx)?;
    let (_, sensitivities) = args.calib.measure(&source, None, cx)?;
    let folder = ModelFolder::new(&args.out);
    folder.create()?;
    write_json(&folder.file("sensitivity.json"), &sensitivities)?;
    plot_sensitivities(&folder, &sensitivities)?;
    cx.emit(&sensitivities, |found| {
        let mut text =
            String::from("unit         trace          Ω at 4 bits    Δ at 4 bits    Δ at 8 bits\n");
        for (at, name) in found.units.iter().enumerate() {
            let (trace, four, eight) = (found.traces[at], &found.four, &found.eight);
            text += &format!(
                "{name:<12} {:<14.4} {:<14.3e} {:<14.3e} {:.3e}\n",
                trace.mean, four.hessian[at], four.single[at], eight.single[at]
            );
        }
        text
    })
}

/// Reads examples for a quantised network.
fn read_for(model: &Quantised, folder: &Path, path: &Path, labelled: bool) -> Result<Examples> {
    let examples = match model.config.input {
        Some(input) => {
            let tokenizer = tokenizer_of(folder, input)?;
            data::read(path, input, &model.config.classes, model.config.white, tokenizer.as_ref(), labelled)?
        }
        None => {
            let port = &model.program.inputs[0].port;
            data::read_for_port(path, &port.shape[1..], port.kind, labelled)?
        }
    };
    if labelled {
        check_labels(&examples, model.program.outputs[0].port.shape.get(1).copied().unwrap_or(0), path)?;
    }
    Ok(examples)
}

fn run_predict(args: &PredictArgs, cx: &Context) -> Result<()> {
    let model = Quantised::open(&args.model)?;
    let examples = read_for(&model, &args.model, &args.input, false)?;
    let rows = logits(&model.batched(64), &model.ready, &examples)?;
    let classes = rows.first().map_or(0, Vec::len);
    match args.out.extension().and_then(|extension| extension.to_str()) {
        Some("npz") => {
            let mut file = TensorFile::new();
            file.insert("y", HostTensor::float([rows.len(), classes], rows.concat()));
            write_npz(&args.out, &file)?;
        }
        Some("csv") => {
            let name = |class: usize| model.config.classes.get(class).cloned().unwrap_or(class.to_string());
            let failed = |e: csv::Error| Error::work("cannot lay out the predictions").caused_by(e);
            let mut writer = csv::Writer::from_writer(Vec::new());
            let heads = ["row".to_string(), "pred".to_string()];
            let heads = heads.into_iter().chain((0..classes).map(|class| format!("p_{}", name(class))));
            writer.write_record(heads).map_err(failed)?;
            for (number, row) in rows.iter().enumerate() {
                let wide: Vec<f64> = row.iter().map(|&x| f64::from(x)).collect();
                let total = crate::mlp::log_sum_exp(&wide);
                let cells = [(number + 1).to_string(), name(likeliest(row))];
                let shares = wide.iter().map(|x| format!("{:.6}", (x - total).exp()));
                writer.write_record(cells.into_iter().chain(shares)).map_err(failed)?;
            }
            let bytes = writer
                .into_inner()
                .map_err(|e| Error::work(format!("cannot lay out the predictions: {e}")))?;
            write_atomic(&args.out, &bytes)?;
        }
        _ => return Err(Error::usage(format!("{} ends neither in .csv nor in .npz", args.out.display()))),
    }
    let result = json!({ "examples": rows.len(), "out": args.out });
    cx.emit(&result, |_| format!("{} predictions in {}\n", rows.len(), args.out.display()))
}

fn run_eval(args: &EvalArgs, cx: &Context) -> Result<()> {
    let (examples, rows) = if store::is_quantised(&args.model) {
        let model = Quantised::open(&args.model)?;
        let examples = read_for(&model, &args.model, &args.data, true)?;
        let rows = logits(&model.batched(64), &model.ready, &examples)?;
        (examples, rows)
    } else {
        let source = Source::open(&args.model, cx)?;
        let examples = source.read(&args.data, true)?;
        let ready: Vec<_> = source.program.units.iter().map(crate::unit::Ready::float).collect();
        let program = source.program.with_batch(64, &ready).unwrap_or(source.program);
        let rows = logits(&program, &ready, &examples)?;
        (examples, rows)
    };
    let [accuracy, f1, loss] =
        [Metric::Accuracy, Metric::F1, Metric::Loss].map(|metric| score(&rows, &examples.labels, metric));
    let result = json!({ "examples": rows.len(), "accuracy": accuracy, "f1": f1, "loss": -loss });
    cx.emit(&result, |_| {
        format!("accuracy {accuracy:.4}, F1 {f1:.4}, loss {:.4} on {} examples\n", -loss, rows.len())
    })
}

fn run_bench(args: &BenchArgs, cx: &Context) -> Result<()> {
    if args.batch == 0 || args.runs == 0 {
        return Err(Error::usage("--batch and --runs must be at least 1"));
    }
    let model = Quantised::open(&args.model)?;
    let examples = read_for(&model, &args.model, &args.data, false)?;
    let program = model.batched(args.batch);
    if program.batch() != args.batch {
        return Err(Error::usage(format!("the network computes one example at a time, not {}", args.batch)));
    }
    let floats: Vec<_> = program.units.iter().map(crate::unit::Ready::half).collect();
    let plain = measure(&program, &floats, &examples, args.runs)?;
    let quantised = measure(&program, &model.ready, &examples, args.runs)?;
    let bytes = store::weight_bytes(&ModelFolder::new(&args.model));
    let peak = kiln_core::MemoryGauge::start()
        .and_then(|gauge| gauge.peak(|| measure(&program, &model.ready, &examples, 1)).1);
    let result = json!({
        "batch": args.batch, "runs": args.runs, "threads": rayon::current_num_threads(),
        "sixteen_bits": plain, "quantised": quantised,
        "less": 1.0 - quantised.median / plain.median, "bytes": bytes, "peak_bytes": peak,
    });
    cx.emit(&result, |_| {
        format!(
            "{} examples at once, {} runs, {} threads\n\
             16 bits:   median {:.3} ms, nine of ten within {:.3} ms\n\
             quantised: median {:.3} ms, nine of ten within {:.3} ms ({:.1} % less)\n\
             weights {bytes} bytes\n",
            args.batch,
            args.runs,
            rayon::current_num_threads(),
            1e3 * plain.median,
            1e3 * plain.p90,
            1e3 * quantised.median,
            1e3 * quantised.p90,
            100.0 * (1.0 - quantised.median / plain.median)
        )
    })
}

fn run_profile(args: &ProfileArgs, cx: &Context) -> Result<()> {
    let profile = Profile::measure();
    write_json(&args.out, &profile)?;
    cx.emit(&profile, |profile| {
        let mut text = String::from(
            "kind         billion multiplications a second      µs besides      (at 16, 8, 4 bits)\n",
        );
        let kinds = [
            ("conv", profile.conv),
            ("by channel", profile.by_channel),
            ("linear", profile.linear),
            ("product", profile.product),
        ];
        for (kind, rates) in kinds {
            let [t16, t8, t4] = rates.throughput.map(|rate| rate / 1e9);
            let [o16, o8, o4] = rates.overhead.map(|seconds| 1e6 * seconds);
            text += &format!(
                "{kind:<12} {t16:>8.1} {t8:>8.1} {t4:>8.1}         {o16:>8.1} {o8:>8.1} {o4:>8.1}\n"
            );
        }
        text + &format!("memory: {:.1} GB/s\n", profile.bandwidth / 1e9)
    })
}

/// Signal over noise of each unit's result, in decibels.
fn run_compare(args: &CompareArgs, cx: &Context) -> Result<()> {
    let second = Quantised::open(&args.second)?;
    let examples = read_for(&second, &args.second, &args.data, false)?;
    let examples = examples.select(&(0..args.count.clamp(1, examples.len())).collect::<Vec<_>>());
    let (program, ready) = if store::is_quantised(&args.first) {
        let first = Quantised::open(&args.first)?;
        (first.program, first.ready)
    } else {
        let source = Source::open(&args.first, cx)?;
        let ready = source.program.units.iter().map(crate::unit::Ready::float).collect();
        (source.program, ready)
    };
    if program.units.len() != second.program.units.len() {
        return Err(Error::usage(format!(
            "the networks have {} and {} units",
            program.units.len(),
            second.program.units.len()
        ))
        .hint("one must have been made from the other"));
    }
    // Of every unit the operand that it reads: what the units before have made.
    let mut units = vec![(0.0f64, 0.0f64, 0.0f64); program.units.len()];
    let mut outputs = (0.0f64, 0.0f64, 0.0f64);
    let compare = |sums: &mut (f64, f64, f64), a: &[f32], b: &[f32]| {
        for (&a, &b) in a.iter().zip(b) {
            let difference = f64::from(a - b);
            sums.0 += f64::from(a).powi(2);
            sums.1 += difference * difference;
            sums.2 = sums.2.max(difference.abs());
        }
    };
    for (inputs, _) in quantise::batches(&examples, 1) {
        let mut seen: Vec<Vec<f32>> = vec![Vec::new(); program.units.len()];
        let mut values = program.begin(std::slice::from_ref(&inputs))?;
        program.run_from(0, &mut values, &ready, false, &mut |unit, x, _| {
            if x.dtype() == burn::tensor::DType::F32 {
                seen[unit] = kiln_ops::flex::floats(x).into_owned();
            }
        });
        let expected: Vec<f32> = program.read_outputs(&mut values)[0].iter::<f32>().collect();
        let mut values = second.program.begin(&[inputs])?;
        second.program.run_from(0, &mut values, &second.ready, false, &mut |unit, x, _| {
            if x.dtype() == burn::tensor::DType::F32 {
                compare(&mut units[unit], &seen[unit], &kiln_ops::flex::floats(x));
            }
        });
        let found: Vec<f32> = second.program.read_outputs(&mut values)[0].iter::<f32>().collect();
        compare(&mut outputs, &expected, &found);
    }
    // What is exactly the same counts as 200 dB.
    let decibels = |sums: &(f64, f64, f64)| (10.0 * (sums.0 / sums.1.max(1e-300)).log10()).min(200.0);
    let rows: Vec<serde_json::Value> = program
        .units
        .iter()
        .zip(&units)
        .zip(&second.bits)
        .map(|((unit, sums), bits)| json!({ "unit": unit.name, "bits": bits, "snr_db": decibels(sums), "max": sums.2 }))
        .collect();
    let result = json!({ "examples": examples.len(), "operands": rows, "output_snr_db": decibels(&outputs), "output_max": outputs.2 });
    cx.emit(&result, |_| {
        let mut text = String::from("what it reads  bits  signal over noise  largest difference\n");
        for ((unit, sums), bits) in program.units.iter().zip(&units).zip(&second.bits) {
            text += &format!("{:<14} {bits:<5} {:>14.1} dB  {:.3e}\n", unit.name, decibels(sums), sums.2);
        }
        text + &format!("{:<20} {:>14.1} dB  {:.3e}\n", "logits", decibels(&outputs), outputs.2)
    })
}

fn run_quant_array(args: &QuantArrayArgs, cx: &Context) -> Result<()> {
    let array = arrays::read_one(&args.input)?;
    if array.values.is_empty() {
        return Err(Error::input(args.input.display(), "holds no numbers"));
    }
    let x = &array.values;
    let (scale, zero, q, values): (Vec<f64>, i32, Vec<i32>, Vec<f64>) = match (args.scheme, args.axis) {
        (Scheme::Sym, axis) => {
            let rows = if axis.is_some() { array.shape.first().copied().unwrap_or(1) } else { 1 };
            let rows = Rows::of(x, rows.max(1), args.bits, args.calibrator);
            let values = rows.values();
            (rows.scales, 0, rows.q, values)
        }
        (Scheme::Asym, Some(_)) => {
            return Err(Error::usage("--axis is for the symmetric scheme").hint("activations have one range"));
        }
        (Scheme::Asym, None) => {
            let clip = match args.calibrator {
                Calibrator::Minmax | Calibrator::Ema => largest_size(x),
                calibrator => weight_range(x, args.bits, calibrator),
            };
            let ends = x.iter().fold([0.0f64, 0.0], |[low, high], &x| [low.min(x), high.max(x)]);
            let quantiser = Asymmetric::of_range(ends[0].max(-clip), ends[1].min(clip), args.bits);
            let q: Vec<i32> = x.iter().map(|&x| quantiser.quantise(x)).collect();
            let values = q.iter().map(|&q| quantiser.value(q)).collect();
            (vec![quantiser.scale], quantiser.zero, q, values)
        }
    };
    let error = x.iter().zip(&values).map(|(x, y)| (x - y).powi(2)).sum::<f64>() / x.len() as f64;
    let scale_shape = if scale.len() == 1 { Vec::new() } else { vec![scale.len()] };
    arrays::write(
        &args.out,
        &[
            ("scale", Column::F64(scale_shape, scale.clone())),
            ("zero", Column::I32(Vec::new(), vec![zero])),
            ("q", Column::I32(array.shape.clone(), q)),
            ("deq", Column::F64(array.shape.clone(), values)),
        ],
    )?;
    let result = json!({ "scale": scale, "zero": zero, "mean_squared_error": error, "out": args.out });
    cx.emit(&result, |_| {
        format!("{} numbers, mean squared error {error:.3e}, in {}\n", x.len(), args.out.display())
    })
}

fn run_mlp(args: &MlpArgs, cx: &Context) -> Result<()> {
    let mlp: Mlp = read_json(&args.input, "a perceptron W, B with examples X, Y")?;
    mlp.check(&args.input.display().to_string())?;
    if args.probes == 0 {
        return Err(Error::usage("--probes must be at least 1"));
    }
    let traces = match args.exact_trace {
        true => mlp.exact_traces(),
        false => mlp.estimated_traces(args.probes, &mut cx.rng("probe", 0)),
    };
    let (noise, single, pairs) = mlp.perturbations(args.bits);
    let weights = mlp.flat_weights();
    let hessian: Vec<f64> =
        traces.iter().zip(&noise).zip(&weights).map(|((t, e), w)| t.max(0.0) / w.len() as f64 * e).collect();
    let result = json!({
        "loss": mlp.loss(&weights), "trace": traces, "err2": noise, "hess": hessian, "single": single, "pair": pairs,
    });
    cx.emit(&result, |_| {
        let mut text = String::from("layer  trace        ‖δ‖²         Ω            Δ\n");
        for l in 0..mlp.layers() {
            text += &format!(
                "{l:<6} {:<12.6} {:<12.6} {:<12.6} {:.6}\n",
                traces[l], noise[l], hessian[l], single[l]
            );
        }
        text
    })
}

/// Seconds of the same network in floats, compiled: what a user would run otherwise.
pub(crate) fn compiled_seconds(graph: &Graph, examples: &Examples, runs: usize) -> Result<f64> {
    let mut executor = Executor::new(graph.clone())?;
    let inputs = [examples.batch(&[0])];
    Ok(timing(runs, || executor.run(&inputs).map(|_| ()))?.median)
}
