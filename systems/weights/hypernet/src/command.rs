//! The verbs of `kiln hypernet`.

use std::path::{Path, PathBuf};

use burn::module::Module;
use clap::{Args, Parser, Subcommand, ValueEnum};
use kiln_core::{Context, Error, HostTensor, ModelFolder, Result, Table, TensorFile, write_atomic};
use kiln_nn::{TrainConfig, TrainRun, TrainSummary, likeliest};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::advise::{Problem, advise};
use crate::apps::uncertainty::{calibration_error, mean_nll};
use crate::apps::{Findings, causal, compare, continual, prune, rl, transfer, uncertainty, zeroshot};
use crate::conditioning::{Condition, Conditioning};
use crate::data::{Coded, Coding, Columns, Rows};
use crate::generator::Arch;
use crate::golden;
use crate::hypernet::{HyperNetConfig, Init, OutputRegularizer, OutputScheme};
use crate::model::{self, ClassificationTask, Config, KIND, mean, predict, split};
use crate::table::{Sizes, table};
use crate::target::Target;
use crate::training::{Fit, Labelled, accuracy, cross_entropy, fit, normals};

/// The command whose runs a model folder keeps.
const TRAIN: &str = "hypernet train";

/// `kiln hypernet …`
#[derive(Debug, Parser)]
#[command(name = "hypernet", about = "Networks that make the weights of networks")]
#[command(after_help = "Examples:
  kiln hypernet advise --tasks 20 --samples 50 --params 19000
  kiln hypernet train --target mlp:64-32-10 --cond task --task-col writer --data digits.csv --target-col label --out m/
  kiln hypernet app continual")]
pub struct Command {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Train a classifier whose weights a hypernetwork makes
    #[command(after_help = "Examples:
  kiln hypernet train --target mlp:64-32-10 --cond task --task-col writer --data rows.csv --target-col label --out m/
  kiln hypernet train --target mlp:20-16-3 --cond given --cond-cols dose,age --scheme once --data rows.csv --out m/
  kiln hypernet train --target mlp:20-16-3 --cond task,noise --data rows.csv --out m/
  kiln hypernet train --data rows.csv --resume m/                   after Ctrl-C or a crash
Every column that is no label, task or descriptor is a feature. An .npz file holds x, y and, as needed, task and given.")]
    Train(TrainArgs),
    /// Write the probabilities of all classes for every row
    #[command(after_help = "Example:
  kiln hypernet predict --model m/ --data new.csv --samples 20 --out predictions.csv")]
    Predict(PredictArgs),
    /// Score a trained model on labelled rows
    #[command(after_help = "Example:
  kiln hypernet eval --model m/ --data test.csv")]
    Eval(EvalArgs),
    /// Write the weights of the target for a task or descriptor, in PyTorch's layout
    #[command(after_help = "Examples:
  kiln hypernet generate --model m/ --task anna --to anna.safetensors
  kiln hypernet generate --model m/ --given 0.5,31 --to weights.safetensors
The file's header holds the features' means and deviations, which inputs are to be standardised by, and the classes.")]
    Generate(GenerateArgs),
    /// Learn one more task without forgetting the others
    #[command(after_help = "Example:
  kiln hypernet add-task --model m/ --data more.csv --out m2/")]
    AddTask(AddTaskArgs),
    /// Compare hypernetworks with plain networks on the bundled digits, for one problem and for many
    #[command(after_help = "Example:
  kiln hypernet compare --rows 5,20,100 --seeds 3 --out plots/")]
    Compare(CompareArgs),
    /// An application that the review lists, beside its baselines
    #[command(after_help = "Examples:
  kiln hypernet app continual --task-pairs 0/1,2/3,4/5,6/7,8/9
  kiln hypernet app causal --data trial.csv --treatment drug --outcome days --out effects.csv")]
    App(AppArgs),
    /// Recommend a kind of hypernetwork for a problem, or none
    #[command(after_help = "Example:
  kiln hypernet advise --tasks 20 --samples 50 --params 19000 --uncertainty")]
    Advise(AdviseArgs),
    /// Make the hypernetwork of every cell of the taxonomy and count its parameters
    #[command(after_help = "Example:
  kiln hypernet table --target lenet --out cells.csv")]
    Table(TableArgs),
    /// Run the four schemes with the weights of a file, for comparison with other implementations
    #[command(after_help = "Example:
  kiln hypernet forward --weights hypernet.safetensors --to theta.safetensors")]
    Forward(ForwardArgs),
}

#[derive(Debug, Args)]
struct TrainArgs {
    /// .csv or .npz file of labelled rows
    #[arg(long)]
    data: PathBuf,
    /// Folder for the model
    #[arg(long, required_unless_present = "resume")]
    out: Option<PathBuf>,
    /// Continue the run in this folder; only --steps may grow
    #[arg(long, value_name = "DIR", conflicts_with = "out")]
    resume: Option<PathBuf>,
    /// Optimisation steps in all [default: 2000]
    #[arg(long)]
    steps: Option<usize>,
    #[command(flatten)]
    recipe: Recipe,
}

/// What decides the outcome of a training run, besides data, steps and seed.
#[derive(Debug, Clone, Args, Serialize, Deserialize)]
struct Recipe {
    /// Network whose weights are made: mlp:64-32-10, lenet, or a .json file
    #[arg(
        long,
        required_unless_present = "resume",
        default_value = "",
        hide_default_value = true,
        conflicts_with = "resume"
    )]
    target: String,
    /// What the weights depend on; several are separated by commas
    #[arg(long, value_enum, value_delimiter = ',', default_value = "task", conflicts_with = "resume")]
    cond: Vec<Cond>,
    /// What is made at a time
    #[arg(long, value_enum, default_value = "chunk", conflicts_with = "resume")]
    scheme: Scheme,
    /// How
    #[arg(long, value_enum, default_value = "mlp", conflicts_with = "resume")]
    arch: ArchName,
    /// Numbers in a chunk
    #[arg(long, default_value_t = 256, conflicts_with = "resume")]
    chunk: usize,
    /// Width of embeddings of tasks, data, noise, chunks and tensors
    #[arg(long, default_value_t = 8, conflicts_with = "resume")]
    emb_dim: usize,
    /// Width of the hidden layers
    #[arg(long, value_delimiter = ',', default_value = "32", conflicts_with = "resume")]
    hidden: Vec<usize>,
    /// How the output layer is drawn
    #[arg(long, value_enum, default_value = "hyperfan", conflicts_with = "resume")]
    init: Init,
    /// Tensors that are made, as patterns; the others are ordinary parameters
    #[arg(long, value_delimiter = ',', default_value = "*", conflicts_with = "resume")]
    predict: Vec<String>,
    /// Column of the classes
    #[arg(long, default_value = "label", conflicts_with = "resume")]
    target_col: String,
    /// Column of the tasks, with --cond task
    #[arg(long, default_value = "task", conflicts_with = "resume")]
    task_col: String,
    /// Columns of the descriptor, with --cond given
    #[arg(long, value_delimiter = ',', conflicts_with = "resume")]
    cond_cols: Vec<String>,
    /// Rows a batch
    #[arg(long, default_value_t = 64, conflicts_with = "resume")]
    batch: usize,
    /// Highest learning rate
    #[arg(long, default_value_t = 1e-3, conflicts_with = "resume")]
    lr: f64,
    /// Share of the rows that is held out for validation
    #[arg(long, default_value_t = 0.1, conflicts_with = "resume")]
    val_fraction: f64,
    /// Steps between validations
    #[arg(long, default_value_t = 200, conflicts_with = "resume")]
    eval_every: usize,
    /// Steps between checkpoints: what a crash can cost at most
    #[arg(long, default_value_t = 200, conflicts_with = "resume")]
    checkpoint_every: usize,
    /// Stop after so many validations without improvement
    #[arg(long, conflicts_with = "resume")]
    patience: Option<usize>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Cond {
    /// A learned vector for every task
    Task,
    /// The row itself
    Data,
    /// Noise: weights become a distribution
    Noise,
    /// Columns of the table
    Given,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Scheme {
    /// All weights in one output layer
    Once,
    /// An output layer for every tensor
    Heads,
    /// An output layer for every layer of the target
    Layers,
    /// One tensor a call
    Component,
    /// One chunk a call
    Chunk,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum ArchName {
    /// Linear layers
    Mlp,
    /// Transposed convolutions
    Cnn,
    /// A GRU
    Rnn,
    /// Attention
    Attention,
}

#[derive(Debug, Args)]
struct PredictArgs {
    /// Model folder
    #[arg(long)]
    model: PathBuf,
    /// .csv or .npz file of rows
    #[arg(long)]
    data: PathBuf,
    /// All rows belong to this task, whatever the table says
    #[arg(long)]
    task: Option<String>,
    /// Draws of the weights, where they depend on noise
    #[arg(long, default_value_t = 20)]
    samples: usize,
    /// CSV file to write
    #[arg(long)]
    out: PathBuf,
}

#[derive(Debug, Args)]
struct EvalArgs {
    /// Model folder
    #[arg(long)]
    model: PathBuf,
    /// .csv or .npz file of labelled rows
    #[arg(long)]
    data: PathBuf,
    /// Draws of the weights, where they depend on noise
    #[arg(long, default_value_t = 20)]
    samples: usize,
}

#[derive(Debug, Args)]
struct GenerateArgs {
    /// Model folder
    #[arg(long)]
    model: PathBuf,
    /// The task whose weights to write
    #[arg(long)]
    task: Option<String>,
    /// The descriptor whose weights to write, in the table's units
    #[arg(long, value_delimiter = ',', allow_negative_numbers = true)]
    given: Vec<f32>,
    /// .safetensors file to write
    #[arg(long)]
    to: PathBuf,
}

#[derive(Debug, Args)]
struct AddTaskArgs {
    /// Model folder, conditioned on tasks
    #[arg(long)]
    model: PathBuf,
    /// .csv or .npz file of labelled rows of the new task
    #[arg(long)]
    data: PathBuf,
    /// How strongly the weights of the other tasks are kept
    #[arg(long, default_value_t = 0.01)]
    beta: f64,
    /// Optimisation steps
    #[arg(long, default_value_t = 400)]
    steps: usize,
    /// Learning rate
    #[arg(long, default_value_t = 1e-3)]
    lr: f64,
    /// Folder for the model with the new task
    #[arg(long)]
    out: PathBuf,
}

#[derive(Debug, Args)]
struct CompareArgs {
    /// Optimisation steps
    #[arg(long, default_value_t = 800)]
    steps: usize,
    /// Rows of each class and task
    #[arg(long, value_delimiter = ',', default_value = "5,20,100")]
    rows: Vec<usize>,
    /// Repetitions
    #[arg(long, default_value_t = 1)]
    seeds: u64,
    /// Folder for plots
    #[arg(long)]
    out: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct AppArgs {
    #[command(subcommand)]
    app: App,
}

#[derive(Debug, Subcommand)]
enum App {
    /// Tasks that come one after another; baselines: fine-tuning, elastic weight consolidation, joint training
    Continual {
        /// Digits of each task; the first of a pair has the label 0
        #[arg(long, default_value = "0/1,2/3,4/5,6/7,8/9")]
        task_pairs: String,
        /// Tasks of your own instead: a .csv or .npz file; a fifth of each is for tests
        #[arg(long)]
        data: Option<PathBuf>,
        /// Column of the classes
        #[arg(long, default_value = "label")]
        target_col: String,
        /// Column of the tasks
        #[arg(long, default_value = "task")]
        task_col: String,
        /// How strongly the weights of earlier tasks are kept
        #[arg(long, default_value_t = 0.01)]
        beta: f64,
        /// Optimisation steps of each task
        #[arg(long, default_value_t = 400)]
        steps_per_task: usize,
        /// Repetitions
        #[arg(long, default_value_t = 1)]
        seeds: u64,
        /// Folder for plots
        #[arg(long)]
        out: Option<PathBuf>,
    },
    /// Effects of a treatment on each unit; baselines: TARNet, T-learner, S-learner
    Causal {
        /// A .csv table of your own; IHDP, or units of its kind, otherwise
        #[arg(long)]
        data: Option<PathBuf>,
        /// Column of the treatment, 0 or 1
        #[arg(long, default_value = "treatment")]
        treatment: String,
        /// Column of the outcome
        #[arg(long, default_value = "y_factual")]
        outcome: String,
        /// Columns of covariates; all others by default
        #[arg(long, value_delimiter = ',')]
        features: Vec<String>,
        /// Replications of IHDP
        #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=3))]
        replications: u64,
        /// Optimisation steps
        #[arg(long, default_value_t = 1000)]
        steps: usize,
        /// CSV file for the effect on each unit of your table
        #[arg(long, requires = "data")]
        out: Option<PathBuf>,
    },
    /// A new domain from a few rows; baselines: one network for all domains, and the same fine-tuned
    Transfer {
        /// Degrees that digits are turned by
        #[arg(long, value_delimiter = ',', default_value = "0,30,60,90")]
        angles: Vec<f64>,
        /// Which of them is new, from 0
        #[arg(long, default_value_t = 2)]
        held_out: usize,
        /// Labelled rows of the new domain
        #[arg(long, default_value_t = 20)]
        labelled: usize,
        /// Optimisation steps on the known domains
        #[arg(long, default_value_t = 1500)]
        steps: usize,
        /// Repetitions
        #[arg(long, default_value_t = 1)]
        seeds: u64,
    },
    /// Weights as a distribution; baselines: one network, dropout that stays on, an ensemble of five
    Uncertainty {
        /// Optimisation steps
        #[arg(long, default_value_t = 1000)]
        steps: usize,
        /// Draws that a prediction averages
        #[arg(long, default_value_t = 20)]
        samples: usize,
        /// Repetitions
        #[arg(long, default_value_t = 1)]
        seeds: u64,
        /// Folder for plots
        #[arg(long)]
        out: Option<PathBuf>,
    },
    /// A smaller network, by masks that the hypernetwork makes; baseline: magnitude pruning
    Prune {
        /// Shares of the hidden units to remove
        #[arg(long, value_delimiter = ',', default_value = "0.5,0.75")]
        removed: Vec<f64>,
        /// Optimisation steps
        #[arg(long, default_value_t = 1500)]
        steps: usize,
        /// Steps of fine-tuning what stays
        #[arg(long, default_value_t = 300)]
        fine_tune: usize,
        /// Repetitions
        #[arg(long, default_value_t = 1)]
        seeds: u64,
    },
    /// Policies for worlds that differ; baseline: one policy that sees the description of the world
    Rl {
        /// Family of worlds
        #[arg(long, value_enum, default_value = "cartpole")]
        world: rl::World,
        /// Steps of the evolution strategy
        #[arg(long, default_value_t = 150)]
        steps: usize,
        /// Unseen worlds that policies are judged in
        #[arg(long, default_value_t = 100)]
        test_worlds: usize,
        /// Repetitions
        #[arg(long, default_value_t = 1)]
        seeds: u64,
        /// Folder for plots
        #[arg(long)]
        out: Option<PathBuf>,
    },
    /// Digits that were never seen, from their description; baseline: a linear map of the attributes
    Zeroshot {
        /// CSV file with a row of attributes for every digit; strokes by default
        #[arg(long)]
        attributes: Option<PathBuf>,
        /// Optimisation steps
        #[arg(long, default_value_t = 600)]
        steps: usize,
    },
}

#[derive(Debug, Args)]
struct AdviseArgs {
    /// Related tasks
    #[arg(long, default_value_t = 1)]
    tasks: usize,
    /// Rows of each task
    #[arg(long)]
    samples: usize,
    /// Weights of the network that would solve one task
    #[arg(long)]
    params: usize,
    /// Data change over time, or weights should follow the input
    #[arg(long)]
    changing_data: bool,
    /// Predictions must tell how sure they are
    #[arg(long)]
    uncertainty: bool,
    /// Tasks will come that have only a description
    #[arg(long)]
    described_tasks: bool,
    /// Few parameters may be stored
    #[arg(long)]
    compression: bool,
}

#[derive(Debug, Args)]
struct TableArgs {
    /// Network whose weights are made: mlp:64-32-10, lenet, or a .json file
    #[arg(long, default_value = "mlp:64-32-10")]
    target: String,
    /// Width of the hidden layer
    #[arg(long, default_value_t = 32)]
    hidden: usize,
    /// Numbers in a chunk
    #[arg(long, default_value_t = 256)]
    chunk: usize,
    /// Width of embeddings and codes
    #[arg(long, default_value_t = 8)]
    emb_dim: usize,
    /// Tasks
    #[arg(long, default_value_t = 5)]
    tasks: usize,
    /// CSV file to write
    #[arg(long)]
    out: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct ForwardArgs {
    /// .safetensors file with the tensors of one or more schemes
    #[arg(long)]
    weights: PathBuf,
    /// Network whose weights are made
    #[arg(long, default_value = "mlp:5-7-3")]
    target: String,
    /// .safetensors file to write
    #[arg(long)]
    to: PathBuf,
}

impl Command {
    /// Runs the verb.
    ///
    /// # Errors
    /// Whatever the verb's work runs into.
    pub fn run(self, cx: &Context) -> Result<()> {
        match self.verb {
            Verb::Train(args) => run_train(&args, cx),
            Verb::Predict(args) => run_predict(&args, cx),
            Verb::Eval(args) => run_eval(&args, cx),
            Verb::Generate(args) => run_generate(&args, cx),
            Verb::AddTask(args) => run_add_task(&args, cx),
            Verb::Compare(args) => run_compare(&args, cx),
            Verb::App(args) => run_app(args.app, cx),
            Verb::Advise(args) => run_advise(&args, cx),
            Verb::Table(args) => run_table(&args, cx),
            Verb::Forward(args) => run_forward(&args, cx),
        }
    }
}

fn run_train(args: &TrainArgs, cx: &Context) -> Result<()> {
    let run = match (&args.resume, &args.out) {
        (Some(folder), _) => TrainRun::resume(TRAIN, folder, args.steps)?,
        (None, Some(out)) => TrainRun::begin(TRAIN, out, args.steps.unwrap_or(2000), args.recipe.clone(), cx),
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
    let columns = columns(recipe)?;
    let rows = Rows::read(&args.data, &columns, None, true)?;
    if rows.count < 2 {
        return Err(Error::input(args.data.display(), "holds one row, needs at least two"));
    }
    let config = if run.resumed {
        run.folder.config(KIND)?
    } else {
        let coding = Coding::of(&rows, columns, &args.data)?;
        configure(recipe, coding)?
    };
    config.check()?;
    let coded = config.coding.encode(&rows, &args.data)?;
    let train_config = TrainConfig {
        steps: run.steps,
        lr: recipe.lr,
        warmup: 0,
        weight_decay: 0.0,
        eval_every: recipe.eval_every,
        checkpoint_every: recipe.checkpoint_every,
        patience: recipe.patience,
        ..TrainConfig::default()
    };
    train_config.check()?;
    let hyper = config.hyper.draw(cx, "init")?;
    run.save(|folder| folder.save_config(KIND, &config))?;

    let (train_part, valid_part) = split(&coded, recipe.val_fraction, cx);
    cx.note(format!(
        "{} parameters make the {} weights of the target; {} rows, {} held out",
        hyper.num_params(),
        hyper.target_len(),
        train_part.len(),
        valid_part.len()
    ));
    if let OutputScheme::Chunk { chunk, .. } = config.hyper.scheme
        && chunk > hyper.target_len()
    {
        cx.note(format!("a chunk of {chunk} holds more than the target's weights; the rest is made in vain"));
    }
    let mut task = ClassificationTask::new(&config, &train_part, &valid_part, recipe.batch, cx);
    let data = format!("--data {}", args.data.display());
    let parameters = [hyper.num_params(), hyper.target_len()];
    let trained = run.train(hyper, &mut task, &train_config, &data, cx)?;
    let summary = run.finish(&trained, "nats per row")?;
    let validation = score(&config, &trained.model, &valid_part, 20, cx)?;
    let [parameters, target_weights] = parameters;
    let result = TrainResult { summary, parameters, target_weights, validation };
    cx.emit(&result, |result| {
        format!(
            "{}{}model in {}\n",
            result.summary.to_text("nats a row"),
            result.validation.to_text(),
            result.summary.model.display()
        )
    })
}

/// What `train` prints.
#[derive(Serialize)]
struct TrainResult {
    #[serde(flatten)]
    summary: TrainSummary,
    parameters: usize,
    target_weights: usize,
    /// Of the best weights, on the rows held out.
    validation: Scores,
}

/// The columns that a recipe speaks of.
fn columns(recipe: &Recipe) -> Result<Columns> {
    let given = recipe.cond.contains(&Cond::Given);
    if given && recipe.cond_cols.is_empty() {
        return Err(Error::usage("--cond given needs --cond-cols")
            .hint("name the columns that the weights depend on"));
    }
    if !given && !recipe.cond_cols.is_empty() {
        return Err(
            Error::usage("--cond-cols needs --cond given").hint("without it weights depend on no columns")
        );
    }
    Ok(Columns {
        label: recipe.target_col.clone(),
        task: recipe.cond.contains(&Cond::Task).then(|| recipe.task_col.clone()),
        given: recipe.cond_cols.clone(),
    })
}

fn configure(recipe: &Recipe, coding: Coding) -> Result<Config> {
    let target = Target::parse(&recipe.target)?;
    let dim = recipe.emb_dim;
    let conditioning = |cond: &Cond| match cond {
        Cond::Task => Conditioning::Task { tasks: coding.tasks.len(), dim },
        Cond::Data => Conditioning::Data { inputs: coding.features.len(), dim },
        Cond::Noise => Conditioning::Noise { dim },
        Cond::Given => Conditioning::Given { dim: coding.columns.given.len() },
    };
    let width = recipe.hidden.last().copied().unwrap_or(0);
    let hyper = HyperNetConfig {
        target: target.spec()?,
        predict: recipe.predict.clone(),
        conditioning: recipe.cond.iter().map(conditioning).collect(),
        scheme: match recipe.scheme {
            Scheme::Once => OutputScheme::Once,
            Scheme::Heads => OutputScheme::Heads { by_layer: false },
            Scheme::Layers => OutputScheme::Heads { by_layer: true },
            Scheme::Component => OutputScheme::Component { emb_dim: dim },
            Scheme::Chunk => OutputScheme::Chunk { chunk: recipe.chunk, emb_dim: dim },
        },
        arch: match recipe.arch {
            ArchName::Mlp => Arch::Mlp(recipe.hidden.clone()),
            ArchName::Cnn => Arch::Cnn(width),
            ArchName::Rnn => Arch::Rnn(width),
            ArchName::Attention => Arch::Attention(width),
        },
        init: recipe.init,
    };
    Ok(Config { target, hyper, coding })
}

/// How well predictions agree with classes.
#[derive(Debug, Clone, Serialize)]
struct Scores {
    rows: usize,
    accuracy: f64,
    /// Mean negative log-likelihood, nats.
    nll: f64,
    /// Expected calibration error over 15 bins.
    calibration_error: f64,
    /// Accuracy of every task, where weights depend on tasks.
    tasks: Vec<TaskScore>,
}

#[derive(Debug, Clone, Serialize)]
struct TaskScore {
    task: String,
    rows: usize,
    accuracy: f64,
}

impl Scores {
    fn to_text(&self) -> String {
        let mut text = format!(
            "accuracy {:.4} on {} rows, negative log-likelihood {:.4}, calibration error {:.4}\n",
            self.accuracy, self.rows, self.nll, self.calibration_error
        );
        for task in &self.tasks {
            text += &format!("  task {}: {:.4} on {} rows\n", task.task, task.accuracy, task.rows);
        }
        text
    }
}

fn score(
    config: &Config,
    hyper: &crate::hypernet::HyperNet,
    rows: &Coded,
    samples: usize,
    cx: &Context,
) -> Result<Scores> {
    let p = mean(&predict(config, hyper, rows, samples, cx)?);
    let classes = config.coding.classes.len();
    let mut tasks = Vec::new();
    for (number, name) in config.coding.tasks.iter().enumerate() {
        let of_task: Vec<usize> = (0..rows.len()).filter(|&row| rows.tasks[row] == number).collect();
        if of_task.is_empty() {
            continue;
        }
        let p: Vec<f32> =
            of_task.iter().flat_map(|&row| p[row * classes..(row + 1) * classes].to_vec()).collect();
        let y: Vec<usize> = of_task.iter().map(|&row| rows.y[row]).collect();
        tasks.push(TaskScore { task: name.clone(), rows: y.len(), accuracy: accuracy(&p, &y) });
    }
    Ok(Scores {
        rows: rows.len(),
        accuracy: accuracy(&p, &rows.y),
        nll: mean_nll(&p, &rows.y),
        calibration_error: calibration_error(&p, &rows.y, 15),
        tasks,
    })
}

/// Rows of a file for a trained model; with `task`, all of that task.
fn read_rows(config: &Config, path: &Path, task: Option<&str>, labelled: bool) -> Result<Coded> {
    let mut columns = config.coding.columns.clone();
    if task.is_some() {
        if columns.task.is_none() {
            return Err(Error::usage("the model's weights depend on no task").hint("leave --task out"));
        }
        columns.task = None;
    }
    let mut rows = Rows::read(path, &columns, Some(&config.coding.features), labelled)?;
    if let Some(task) = task {
        rows.tasks = vec![task.to_string(); rows.count];
    }
    config.coding.encode(&rows, path)
}

fn run_predict(args: &PredictArgs, cx: &Context) -> Result<()> {
    if args.samples == 0 {
        return Err(Error::usage("--samples must be at least 1"));
    }
    let (config, hyper) = model::open(&args.model, cx)?;
    let rows = read_rows(&config, &args.data, args.task.as_deref(), false)?;
    let draws = predict(&config, &hyper, &rows, args.samples, cx)?;
    let p = mean(&draws);
    let names = &config.coding.classes;
    let classes = names.len();

    let failed = |e: csv::Error| Error::work("cannot lay out the predictions").caused_by(e);
    let mut writer = csv::Writer::from_writer(Vec::new());
    let mut heads = vec!["row".to_string(), "class".into()];
    heads.extend(names.iter().map(|name| format!("p_{name}")));
    if draws.len() > 1 {
        heads.extend(names.iter().map(|name| format!("std_{name}")));
    }
    heads.push("entropy".into());
    writer.write_record(&heads).map_err(failed)?;
    for (row, p) in p.chunks(classes).enumerate() {
        let mut cells = vec![(row + 1).to_string(), names[likeliest(p)].clone()];
        cells.extend(p.iter().map(|p| format!("{p:.6}")));
        if draws.len() > 1 {
            for (class, mean) in p.iter().enumerate() {
                let square = |draw: &Vec<f32>| f64::from(draw[row * classes + class] - mean).powi(2);
                let variance = draws.iter().map(square).sum::<f64>() / draws.len() as f64;
                cells.push(format!("{:.6}", variance.sqrt()));
            }
        }
        cells.push(format!("{:.6}", continual::entropy(p)));
        writer.write_record(&cells).map_err(failed)?;
    }
    let bytes =
        writer.into_inner().map_err(|e| Error::work(format!("cannot lay out the predictions: {e}")))?;
    write_atomic(&args.out, &bytes)?;
    let result = json!({ "rows": rows.len(), "draws": draws.len(), "out": args.out });
    cx.emit(&result, |_| format!("{} rows in {}\n", rows.len(), args.out.display()))
}

fn run_eval(args: &EvalArgs, cx: &Context) -> Result<()> {
    if args.samples == 0 {
        return Err(Error::usage("--samples must be at least 1"));
    }
    let (config, hyper) = model::open(&args.model, cx)?;
    let rows = read_rows(&config, &args.data, None, true)?;
    cx.emit(&score(&config, &hyper, &rows, args.samples, cx)?, Scores::to_text)
}

fn run_generate(args: &GenerateArgs, cx: &Context) -> Result<()> {
    let (config, hyper) = model::open(&args.model, cx)?;
    let mut condition = Condition::default();
    for part in &config.hyper.conditioning {
        match *part {
            Conditioning::Task { .. } => {
                let names = config.coding.tasks.join(", ");
                let task = args.task.as_ref().ok_or_else(|| {
                    Error::usage("--task is needed").hint(format!("the model knows {names}"))
                })?;
                let number = config.coding.tasks.iter().position(|name| name == task).ok_or_else(|| {
                    Error::usage(format!("there is no task \"{task}\""))
                        .hint(format!("the model knows {names}"))
                })?;
                condition.tasks = Some(vec![number]);
            }
            Conditioning::Given { dim } => {
                if args.given.len() != dim || args.given.iter().any(|value| !value.is_finite()) {
                    return Err(Error::usage(format!(
                        "--given has {} numbers, needs {dim}",
                        args.given.len()
                    ))
                    .hint(format!("they are {}", config.coding.columns.given.join(", "))));
                }
                let scaled = args
                    .given
                    .iter()
                    .zip(&config.coding.given_scale)
                    .map(|(v, [mean, std])| (v - mean) / std);
                let scaled = burn::tensor::TensorData::new(scaled.collect::<Vec<f32>>(), [1, dim]);
                condition.given = Some(burn::tensor::Tensor::from_data(scaled, &cx.device));
            }
            Conditioning::Noise { dim } => {
                condition.noise = Some(normals(1, dim, &mut cx.rng("predict", 0), &cx.device));
            }
            Conditioning::Data { .. } => {
                return Err(Error::usage("the model's weights depend on each row")
                    .hint("only weights for tasks, descriptors or noise can be written down"));
            }
        }
    }
    let weights = hyper.generate(&condition)?.flat.into_data().iter::<f32>().collect::<Vec<_>>();
    let mut file = TensorFile::new();
    let mut at = 0;
    for param in config.hyper.target.params() {
        file.insert(
            param.name.clone(),
            HostTensor::float(param.shape.clone(), weights[at..at + param.len()].to_vec()),
        );
        at += param.len();
    }
    // What a user of the weights must do to its inputs, and what the outputs are.
    let column = |which: usize| config.coding.scale.iter().map(|scale| scale[which]).collect::<Vec<f32>>();
    for (name, value) in [
        ("features", json!(config.coding.features)),
        ("mean", json!(column(0))),
        ("deviation", json!(column(1))),
        ("classes", json!(config.coding.classes)),
    ] {
        file.metadata.insert(name.into(), value.to_string());
    }
    file.write(&args.to)?;
    let names: Vec<&str> = file.names().collect();
    cx.emit(&json!({ "weights": at, "tensors": names, "file": args.to }), |_| {
        format!("{at} weights in {}: {}\n", args.to.display(), names.join(", "))
    })
}

fn run_add_task(args: &AddTaskArgs, cx: &Context) -> Result<()> {
    const BATCH: usize = 64;
    let (mut config, hyper) = model::open(&args.model, cx)?;
    let [Conditioning::Task { tasks: known, .. }] = config.hyper.conditioning[..] else {
        return Err(Error::input(args.model.display(), "depends on more than the task")
            .hint("tasks are added to models trained with --cond task"));
    };
    let folder = ModelFolder::new(&args.out);
    if folder.file("config.json").exists() {
        return Err(Error::usage(format!("{} already holds a model", args.out.display()))
            .hint("choose another --out"));
    }
    let rows = Rows::read(&args.data, &config.coding.columns, Some(&config.coding.features), true)?;
    let new: std::collections::BTreeSet<&String> =
        rows.tasks.iter().filter(|task| !config.coding.tasks.contains(task)).collect();
    let [name] = new.iter().collect::<Vec<_>>()[..] else {
        return Err(Error::input(
            args.data.display(),
            format!("holds {} new tasks, must hold one", new.len()),
        )
        .hint(format!("the model knows {}", config.coding.tasks.join(", "))));
    };
    let name = (*name).clone();
    config.coding.tasks.push(name.clone());
    let coded = config.coding.encode(&rows, &args.data)?;
    let coded = coded.select(&(0..coded.len()).filter(|&row| coded.tasks[row] == known).collect::<Vec<_>>());

    let hyper = hyper.add_task()?;
    config.hyper = hyper.config().clone();
    let before = OutputRegularizer::snapshot(&hyper, known)?;
    let hyper = fit(hyper, Fit::new(args.steps, args.lr), cx, |hyper, step| {
        use rand::RngExt;
        let mut rng = cx.rng("batch", step as u64);
        let group = (0..BATCH).map(|_| rng.random_range(0..coded.len())).collect();
        let batch = coded.batch(&[group], &config.hyper.conditioning, ("noise", 0), cx);
        let theta = hyper.generate(&batch.condition)?.flat;
        let loss = cross_entropy(config.target.forward(theta, batch.x), batch.y);
        Ok(loss + before.value(hyper)? * args.beta)
    })?;
    let moved = f64::from(before.value(&hyper)?.into_scalar::<f32>()).sqrt();
    let scores = score(&config, &hyper, &coded, 1, cx)?;
    folder.create()?;
    folder.save_weights(&TensorFile::from_module(&hyper))?;
    folder.save_config(KIND, &config)?;
    let result = json!({
        "model": args.out, "task": name, "rows": coded.len(), "accuracy_on_them": scores.accuracy,
        "moved_weights_of_others": moved,
    });
    cx.emit(&result, |_| {
        format!(
            "task {name} learned: accuracy {:.4} on its {} rows; weights of the other tasks moved by {moved:.4} \
             (Euclidean); model in {}\n",
            scores.accuracy,
            coded.len(),
            args.out.display()
        )
    })
}

/// Prints what an application came to, and saves its plots.
fn show(findings: &[Findings], out: Option<&Path>, cx: &Context) -> Result<()> {
    let mut saved = Vec::new();
    if let Some(folder) = out {
        ModelFolder::new(folder).create()?;
        for plot in findings.iter().flat_map(|findings| &findings.plots) {
            let path = folder.join(format!("{}.svg", plot.file_stem()));
            plot.save(&path)?;
            saved.push(path);
        }
    }
    cx.emit(&json!({ "findings": findings, "plots": saved }), |_| {
        let mut text = String::new();
        for findings in findings {
            text += &format!("{}\n{}", findings.table.title, findings.table.to_text());
            for note in &findings.notes {
                text += &format!("{note}\n");
            }
            text += "\n";
        }
        for path in &saved {
            text += &format!("plot in {}\n", path.display());
        }
        text
    })
}

fn run_compare(args: &CompareArgs, cx: &Context) -> Result<()> {
    if args.rows.is_empty() || args.rows.contains(&0) || args.seeds == 0 {
        return Err(Error::usage("--rows and --seeds must be at least 1"));
    }
    let config = compare::Config {
        steps: args.steps,
        rows: args.rows.clone(),
        seeds: args.seeds,
        ..compare::Config::default()
    };
    let (one, _) = compare::compression(&config, cx)?;
    let (many, _) = compare::sharing(&config, cx)?;
    show(&[one, many], args.out.as_deref(), cx)
}

fn run_app(app: App, cx: &Context) -> Result<()> {
    let at_least_one = |seeds: u64| match seeds {
        0 => Err(Error::usage("--seeds must be at least 1")),
        seeds => Ok(seeds),
    };
    match app {
        App::Continual { task_pairs, data, target_col, task_col, beta, steps_per_task, seeds, out } => {
            let mut config = continual::Config {
                beta,
                steps: steps_per_task,
                seeds: at_least_one(seeds)?,
                ..continual::Config::new()
            };
            let tasks = match data {
                Some(path) => own_tasks(&path, target_col, task_col, cx)?,
                None => continual::digit_tasks(&task_pairs)?,
            };
            let classes = tasks.iter().flat_map(|task| &task.train.y).max().map_or(0, |last| last + 1);
            config.target = Target::mlp(&[tasks[0].train.width, 32, classes]);
            show(&[continual::run(&config, &tasks, cx)?.0], out.as_deref(), cx)
        }
        App::Causal { data, treatment, outcome, features, replications, steps, out } => {
            let config = causal::Config { steps, ..causal::Config::default() };
            let Some(path) = data else {
                let (sets, what) = causal::bundled(replications as usize, cx)?;
                return show(&[causal::run(&config, &sets, &what, cx)?.0], None, cx);
            };
            let units = causal::Units::read(&path, &treatment, &outcome, &features)?;
            let name = path.display().to_string();
            let (findings, all) = causal::run(&config, &[units], &name, cx)?;
            if let Some(out) = out {
                let mut csv =
                    format!("row,{}\n", all[0].iter().map(|e| e.learner).collect::<Vec<_>>().join(","));
                for row in 0..all[0][0].effects.len() {
                    let effects: Vec<String> =
                        all[0].iter().map(|e| format!("{:.6}", e.effects[row])).collect();
                    csv += &format!("{},{}\n", row + 1, effects.join(","));
                }
                write_atomic(&out, csv.as_bytes())?;
            }
            show(&[findings], None, cx)
        }
        App::Transfer { angles, held_out, labelled, steps, seeds } => {
            if labelled == 0 {
                return Err(Error::usage("--labelled must be at least 1"));
            }
            let config = transfer::Config {
                angles,
                held_out,
                labelled,
                steps: [steps, transfer::Config::default().steps[1]],
                seeds: at_least_one(seeds)?,
            };
            show(&[transfer::run(&config, cx)?.0], None, cx)
        }
        App::Uncertainty { steps, samples, seeds, out } => {
            let config = uncertainty::Config {
                steps,
                samples,
                seeds: at_least_one(seeds)?,
                ..uncertainty::Config::default()
            };
            show(&[uncertainty::run(&config, cx)?.0], out.as_deref(), cx)
        }
        App::Prune { removed, steps, fine_tune, seeds } => {
            let config = prune::Config { removed, steps: [steps, fine_tune], seeds: at_least_one(seeds)? };
            show(&[prune::run(&config, cx)?.0], None, cx)
        }
        App::Rl { world, steps, test_worlds, seeds, out } => {
            let config = rl::Config { world, steps, test_worlds, seeds: at_least_one(seeds)? };
            show(&[rl::run(&config, cx)?.0], out.as_deref(), cx)
        }
        App::Zeroshot { attributes, steps } => {
            let mut config = zeroshot::Config { steps, ..zeroshot::Config::default() };
            if let Some(path) = attributes {
                config.attributes = zeroshot::read_attributes(&path)?;
            }
            show(&[zeroshot::run(&config, cx)?.0], None, cx)
        }
    }
}

/// Tasks of a user's table, a fifth of each for tests.
fn own_tasks(path: &Path, label: String, task: String, cx: &Context) -> Result<Vec<continual::TaskData>> {
    let columns = Columns { label, task: Some(task), given: Vec::new() };
    let rows = Rows::read(path, &columns, None, true)?;
    let coding = Coding::of(&rows, columns, path)?;
    let coded = coding.encode(&rows, path)?;
    let width = coding.features.len();
    let mut tasks = Vec::new();
    for (number, name) in coding.tasks.iter().enumerate() {
        let of_task: Vec<usize> = (0..coded.len()).filter(|&row| coded.tasks[row] == number).collect();
        if of_task.len() < 5 {
            return Err(Error::input(
                path.display(),
                format!("task \"{name}\" has {} rows, needs at least 5", of_task.len()),
            ));
        }
        let (train, test) = split(&coded.select(&of_task), 0.2, cx);
        let labelled = |rows: Coded| Labelled { width, x: rows.x, y: rows.y };
        tasks.push(continual::TaskData { train: labelled(train), test: labelled(test) });
    }
    Ok(tasks)
}

fn run_advise(args: &AdviseArgs, cx: &Context) -> Result<()> {
    let advice = advise(&Problem {
        tasks: args.tasks,
        samples: args.samples,
        params: args.params,
        changing_data: args.changing_data,
        uncertainty: args.uncertainty,
        described_tasks: args.described_tasks,
        compression: args.compression,
    })?;
    cx.emit(&advice, |advice| {
        let mut text = match advice.use_hypernetwork {
            true => {
                format!("--cond {} --scheme {} --arch {}\n", advice.conditioning, advice.scheme, advice.arch)
            }
            false => "a plain network\n".to_string(),
        };
        for reason in &advice.reasons {
            text += &format!("- {reason}\n");
        }
        let mut table =
            Table::new("Weights of the output layer (hidden 32, chunk 256)", &["scheme", "weights"]);
        for (scheme, count) in &advice.output_parameters {
            table.row([scheme.to_string(), count.to_string()]);
        }
        text + &format!("\n{}\n{}", table.title, table.to_text())
    })
}

fn run_table(args: &TableArgs, cx: &Context) -> Result<()> {
    let sizes = Sizes { hidden: args.hidden, chunk: args.chunk, emb_dim: args.emb_dim, tasks: args.tasks };
    let table = table(&Target::parse(&args.target)?, sizes, cx)?;
    if let Some(out) = &args.out {
        let mut writer = csv::Writer::from_writer(Vec::new());
        let failed = |e: csv::Error| Error::work("cannot lay out the table").caused_by(e);
        writer.write_record(&table.columns).map_err(failed)?;
        for row in &table.rows {
            writer.write_record(row).map_err(failed)?;
        }
        let bytes = writer.into_inner().map_err(|e| Error::work(format!("cannot lay out the table: {e}")))?;
        write_atomic(out, &bytes)?;
    }
    cx.emit(&table, |table| format!("{}\n{}", table.title, table.to_text()))
}

fn run_forward(args: &ForwardArgs, cx: &Context) -> Result<()> {
    let target = Target::parse(&args.target)?;
    let result = golden::forward(TensorFile::read(&args.weights)?, &target, cx)?;
    result.write(&args.to)?;
    let names: Vec<Value> = result.names().map(Value::from).collect();
    cx.emit(&json!({ "file": args.to, "tensors": names }), |_| {
        let names: Vec<&str> = result.names().collect();
        format!("{} in {}\n", names.join(", "), args.to.display())
    })
}
