//! `kiln hypernet train`

use std::path::{Path, PathBuf};

use burn::module::Module;
use burn::tensor::{Tensor, TensorData};
use clap::{Args, ValueEnum};
use kiln_core::{Context, Error, Result, TensorFile};
use kiln_nn::{TrainConfig, TrainRun, TrainSummary};
use serde::{Deserialize, Serialize};

use super::predict::{Scores, score};
use crate::conditioning::{Conditioning, NoiseLaw};
use crate::data::{Coding, Columns, Rows};
use crate::generator::Arch;
use crate::hypernet::{HyperNetConfig, Init, OutputScheme, Share};
use crate::model::{ClassificationTask, Config, KIND, split};
use crate::target::Target;

/// The command whose runs a model folder keeps.
const TRAIN: &str = "hypernet train";

#[derive(Debug, Args)]
pub(super) struct TrainArgs {
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
    /// Which tensors of the target come from one generator
    #[arg(long, value_enum, default_value = "all", conflicts_with = "resume")]
    #[serde(default)]
    share: Share,
    /// Divide the weights of the generator's linear layers by their largest singular value
    #[arg(long, conflicts_with = "resume")]
    #[serde(default)]
    spectral: bool,
    /// What the squares of the embeddings count in the loss
    #[arg(long, default_value_t = 0.0, conflicts_with = "resume")]
    #[serde(default)]
    emb_l2: f64,
    /// Make changes of so low a rank to the weights of --base, which stay as they are
    #[arg(long, value_name = "RANK", requires = "base", conflicts_with = "resume")]
    lora: Option<usize>,
    /// .safetensors file with weights of the target, as `generate` writes it; scales of its features are kept
    #[arg(long, requires = "lora", conflicts_with = "resume")]
    base: Option<PathBuf>,
    /// Tensors that are made, as patterns; the others are ordinary parameters
    #[arg(long, value_delimiter = ',', default_value = "*", conflicts_with = "resume")]
    predict: Vec<String>,
    /// Column of the classes
    #[arg(long, default_value = "label", conflicts_with = "resume")]
    target_col: String,
    /// Column of the tasks, with --cond task
    #[arg(long, default_value = "task", conflicts_with = "resume")]
    task_col: String,
    /// How noise is drawn, with --cond noise
    #[arg(long, value_enum, default_value = "normal", conflicts_with = "resume")]
    #[serde(default)]
    noise: NoiseLaw,
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

/// Trains a classifier whose weights a hypernetwork makes.
pub(super) fn run(args: &TrainArgs, cx: &Context) -> Result<()> {
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
        let mut coding = Coding::of(&rows, columns, &args.data)?;
        if let Some(path) = &recipe.base {
            take_scales(&mut coding, path)?;
        }
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
    if !(recipe.emb_l2.is_finite() && recipe.emb_l2 >= 0.0) {
        return Err(Error::usage(format!("--emb-l2 {} is no number of at least 0", recipe.emb_l2)));
    }
    let base = match &recipe.base {
        // A resumed run has them in its checkpoint.
        Some(path) if !run.resumed => Some(read_base(&config.target, path, cx)?),
        _ => None,
    };
    let hyper = config.hyper.draw_over(base, cx, "init")?;
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
    task.emb_l2 = recipe.emb_l2;
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
        Cond::Noise => Conditioning::Noise { dim, law: recipe.noise },
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
        share: recipe.share,
        lora: recipe.lora,
        spectral: recipe.spectral,
    };
    Ok(Config { target, hyper, coding })
}

/// The weights of the target in a file, `[N]`.
fn read_base(target: &Target, path: &Path, cx: &Context) -> Result<Tensor<1>> {
    let mut file = TensorFile::read(path)?;
    let mut all = Vec::new();
    for param in target.spec()?.params() {
        let tensor = file.take(&param.name)?;
        match tensor.as_floats() {
            Some(values) if tensor.shape == param.shape => all.extend_from_slice(values),
            _ => {
                let found = format!("\"{}\" has the shape {:?}", param.name, tensor.shape);
                return Err(Error::input(path.display(), found)
                    .hint(format!("the target's are floats of the shape {:?}", param.shape)));
            }
        }
    }
    if let Some(at) = all.iter().position(|value| !value.is_finite()) {
        return Err(Error::input(path.display(), format!("weight {at} is {}", all[at])));
    }
    let count = all.len();
    Ok(Tensor::from_data(TensorData::new(all, [count]), &cx.device))
}

/// Means and deviations of the features that a file of weights was trained with, where it tells them.
fn take_scales(coding: &mut Coding, path: &Path) -> Result<()> {
    let file = TensorFile::read(path)?;
    let damaged = |name: &str| Error::input(path.display(), format!("has no valid \"{name}\" in its header"));
    if let Some(classes) = file.metadata.get("classes") {
        let classes: Vec<String> = serde_json::from_str(classes).map_err(|_| damaged("classes"))?;
        if classes != coding.classes {
            return Err(Error::input(path.display(), format!("knows the classes {}", classes.join(", ")))
                .hint(format!("the data have {}", coding.classes.join(", "))));
        }
    }
    let [mean, deviation] = ["mean", "deviation"].map(|name| {
        let read = |text: &String| serde_json::from_str::<Vec<f32>>(text).map_err(|_| damaged(name));
        file.metadata.get(name).map(read).transpose()
    });
    let (Some(mean), Some(deviation)) = (mean?, deviation?) else { return Ok(()) };
    let fits = mean.len() == coding.scale.len() && deviation.len() == coding.scale.len();
    if !fits || deviation.iter().any(|d| !(d.is_finite() && *d > 0.0)) || mean.iter().any(|m| !m.is_finite())
    {
        return Err(
            damaged("mean\" or \"deviation").hint(format!("the data have {} features", coding.scale.len()))
        );
    }
    coding.scale = mean.into_iter().zip(deviation).map(|(mean, deviation)| [mean, deviation]).collect();
    Ok(())
}
