//! The verbs of `kiln tcnca`.

use std::path::{Path, PathBuf};

use burn::module::Module;
use burn::tensor::activation::softmax;
use burn::tensor::{Int, Tensor, TensorData};
use clap::{Args, Parser, Subcommand, ValueEnum};
use kiln_core::{Context, Error, HostTensor, Result, TensorFile, write_atomic};
use kiln_data::{Corpus, Tokenizer, read_tensors, write_tensors};
use kiln_nn::{
    ContinueText, Decay, LanguageModel, Score, Task, TrainConfig, TrainRun, TrainSummary, ids_to_tensor,
    likeliest, score_carried, score_windows,
};
use kiln_ops::{DilatedConvOptions, dilated_conv};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::checkpoint::{self, BYTES, ClassifyConfig, Config, KIND, RecallConfig, Trained};
use crate::chunked::{AttentionFunction, BiasKind};
use crate::data::{self, Coding, Columns, Content, Sequence, TextUnit};
use crate::ema::{MultiHeadEma, MultiHeadEmaConfig};
use crate::layer::Variant;
use crate::listops::ListOps;
use crate::model::{Mixers, TcncaClassifier, TcncaClassifierConfig, TcncaConfig, TcncaLm, TcncaLmConfig};
use crate::plan;
use crate::recall::Recall;
use crate::speed;
use crate::tcn::{TcnConfig, TcnConv};
use crate::training::{ClassificationTask, LanguageTask, RecallTask, Scores, predict, split};

/// A text is read in pieces of so many steps when the state is carried along.
const PIECE: usize = 1024;
/// More steps in a batch are a slip of the pen.
const MAX_BATCH_STEPS: usize = 1 << 24;
/// The command whose runs a model folder keeps.
const TRAIN: &str = "tcnca train";
/// Steps of training where none are asked for, and of its warm-up.
const STEPS: usize = 2000;
const WARMUP: usize = 100;
/// Expressions of `train --task listops` without a file.
const LISTOPS: (usize, ListOps) = (4000, ListOps { min_len: 50, max_len: 200, max_depth: 6, max_args: 5 });

/// `kiln tcnca …`
#[derive(Debug, Parser)]
#[command(name = "tcnca", about = "Sequence models of dilated convolutions and chunked attention")]
#[command(after_help = "Examples:
  kiln tcnca train --task lm --text my.txt --out m/
  kiln tcnca train --task classify --data reviews.csv --out c/
  kiln tcnca predict --model c/ --data new.csv --out labels.csv
  kiln tcnca plan --context 2000")]
pub struct Command {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Train a language model, a classifier of sequences, or a model of one of the test tasks
    #[command(after_help = "Examples:
  kiln tcnca train --task lm --text my.txt --out m/
  kiln tcnca train --task classify --data reviews.csv --text-col text --label-col label --out c/
  kiln tcnca train --task classify --data logs.jsonl --tokens word --causal --class-weights --out c/
  kiln tcnca train --task classify --data signals.npz --patience 5 --out c/
  kiln tcnca train --task classify --data pictures/ --out c/      one folder of PNG or JPEG files a class
  kiln tcnca train --task listops --out l/
  kiln tcnca train --task recall --seq-len 64 --values 16 --out r/
  kiln tcnca train --text my.txt --resume m/      after Ctrl-C or a crash")]
    Train(Box<TrainArgs>),
    /// Label sequences with a trained classifier
    #[command(after_help = "Examples:
  kiln tcnca predict --model c/ --data new.csv --out labels.csv
  kiln tcnca predict --model c/ --data endless.jsonl --mode stream --out labels.csv")]
    Predict(PredictArgs),
    /// Score a trained model on a text or on labelled sequences
    #[command(after_help = "Examples:
  kiln tcnca eval --model m/ --text test.txt
  kiln tcnca eval --model m/ --text test.txt --mode context --context 512
  kiln tcnca eval --model c/ --data test.csv --confusion confusion.svg")]
    Eval(EvalArgs),
    /// Write the logits of a text
    #[command(after_help = "Example:
  kiln tcnca logits --model m/ --text test.txt --out logits.safetensors")]
    Logits(LogitsArgs),
    /// Continue a prompt
    #[command(after_help = "Examples:
  kiln tcnca generate --model m/ --prompt \"To be\" --stream
  kiln tcnca generate --model m/ --prompt-file - --greedy --max-tokens 50 < prompt.txt
  kiln tcnca generate --model m/ --prompt \"A long preface\" --state-out preface.safetensors
  kiln tcnca generate --model m/ --state-in preface.safetensors --prompt \" and on\"")]
    Generate(GenerateArgs),
    /// Make ListOps expressions and their values
    #[command(after_help = "Examples:
  kiln tcnca listops --n 2000 --out listops.csv
  kiln tcnca listops --n 2000 --min-len 500 --max-len 2000 --max-depth 10 --max-args 10 --out long.csv")]
    Listops(ListopsArgs),
    /// Make sequences of associative recall
    #[command(after_help = "Example:
  kiln tcnca recall-data --n 1000 --length 32 --values 8 --out recall.jsonl")]
    RecallData(RecallArgs),
    /// List the filters that see a wanted number of steps, and what they cost
    #[command(after_help = "Examples:
  kiln tcnca plan --context 2000
  kiln tcnca plan --context 2000 --dim 64 --budget 20000")]
    Plan(PlanArgs),
    /// Time the dilated convolutions beside the EMA by FFT
    #[command(after_help = "Example:
  kiln tcnca bench --lengths 1024,4096,16384,65536 --dim 64 --out speed.csv")]
    Bench(BenchArgs),
    /// Run one operator on your own tensors, forward and backward
    #[command(after_help = "Examples:
  kiln tcnca op --kind conv --dilation 9 --in x.safetensors --out y.safetensors
  kiln tcnca op --kind ema --bidirectional --in x.npz --out y.npz
The input holds x [batch, time, D], and for conv weight [D, 1, K] and bias [D], for ema delta, alpha, beta [D, N, 1],
gamma [D, N] and omega [D] (twice as many rows where it runs both ways); optionally dy, the gradient of the output.")]
    Op(OpArgs),
}

#[derive(Debug, Args)]
struct TrainArgs {
    /// Text file, or folder of text files, for --task lm
    #[arg(long)]
    text: Option<PathBuf>,
    /// .csv, .jsonl or .npz file of labelled sequences, or folder of images with one folder a class, for --task
    /// classify and listops
    #[arg(long, conflicts_with = "text")]
    data: Option<PathBuf>,
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

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum TaskKind {
    /// Predict the next byte of a text
    Lm,
    /// Label sequences
    Classify,
    /// Evaluate nested expressions; without --data, 4000 are made
    Listops,
    /// Recall the value of a key among --seq-len symbols
    Recall,
}

/// What decides the outcome of a training run, besides data, steps and seed.
#[derive(Debug, Clone, Args, Serialize, Deserialize)]
struct Recipe {
    /// What is learned
    #[arg(long, value_enum, default_value = "lm", conflicts_with = "resume")]
    task: TaskKind,
    /// Form of the layers
    #[arg(long, value_enum, default_value = "full", conflicts_with = "resume")]
    variant: Variant,
    /// What mixes the steps: tcn or ema, or one for every layer as tcn,ema,tcn,tcn
    #[arg(long, default_value = "tcn", conflicts_with = "resume")]
    mixer: Mixers,
    /// Width of the network
    #[arg(long, default_value_t = 128, conflicts_with = "resume")]
    dim: usize,
    /// Number of layers
    #[arg(long, default_value_t = 4, conflicts_with = "resume")]
    layers: usize,
    /// Width of queries and keys
    #[arg(long, default_value_t = 64, conflicts_with = "resume")]
    z_dim: usize,
    /// Width of values
    #[arg(long, default_value_t = 256, conflicts_with = "resume")]
    h_dim: usize,
    /// Width inside the feed-forward maps
    #[arg(long, default_value_t = 256, conflicts_with = "resume")]
    ffn_dim: usize,
    /// Taps of a filter
    #[arg(long, default_value_t = 17, conflicts_with = "resume")]
    kernel: usize,
    /// Factor by which the dilation grows from block to block
    #[arg(long, default_value_t = 4, conflicts_with = "resume")]
    dilation: usize,
    /// Blocks of dilated convolutions
    #[arg(long, default_value_t = 3, conflicts_with = "resume")]
    blocks: usize,
    /// As many blocks as see this many steps, instead of --blocks
    #[arg(long, value_name = "STEPS", conflicts_with_all = ["resume", "blocks"])]
    receptive_field: Option<usize>,
    /// Which channels a filter sees
    #[arg(long, value_enum, default_value = "depthwise", conflicts_with = "resume")]
    tcn_conv: TcnConv,
    /// States a channel of an EMA
    #[arg(long, default_value_t = 16, conflicts_with = "resume")]
    ema_states: usize,
    /// Cut an EMA's kernel off after so many steps
    #[arg(long, value_name = "STEPS", conflicts_with = "resume")]
    ema_truncation: Option<usize>,
    /// Steps of a chunk that attention sees; 0 is the whole sequence
    #[arg(long, default_value_t = 128, conflicts_with = "resume")]
    chunk: usize,
    /// How attention's scores become weights
    #[arg(long, value_enum, default_value = "softmax", conflicts_with = "resume")]
    attention: AttentionFunction,
    /// How attention's bias depends on the distance
    #[arg(long, value_enum, default_value = "rotary", conflicts_with = "resume")]
    bias: BiasKind,
    /// A classifier that looks back only, so that it can read sequences as they come
    #[arg(long, conflicts_with = "resume")]
    causal: bool,
    /// Bytes of a training window (lm), or symbols before the question (recall)
    #[arg(long, default_value_t = 1024, conflicts_with = "resume")]
    seq_len: usize,
    /// Keys, and values, of recall
    #[arg(long, default_value_t = 8, conflicts_with = "resume")]
    values: usize,
    /// Windows or sequences a batch
    #[arg(long, default_value_t = 8, conflicts_with = "resume")]
    batch: usize,
    /// Highest learning rate
    #[arg(long, default_value_t = 2e-3, conflicts_with = "resume")]
    lr: f64,
    /// Steps over which the learning rate rises, before it falls along a line to 0 [default: 100, or a tenth of all]
    #[arg(long, conflicts_with = "resume")]
    warmup: Option<usize>,
    /// Decoupled weight decay
    #[arg(long, default_value_t = 0.1, conflicts_with = "resume")]
    weight_decay: f64,
    /// Largest norm of the gradients
    #[arg(long, default_value_t = 0.25, conflicts_with = "resume")]
    clip: f64,
    /// Share of elements that training drops
    #[arg(long, default_value_t = 0.1, conflicts_with = "resume")]
    dropout: f64,
    /// How text of sequences becomes steps; ListOps is always read by words
    #[arg(long, value_enum, default_value = "byte", conflicts_with = "resume")]
    tokens: TextUnit,
    /// Column or field of the text
    #[arg(long, default_value = "text", conflicts_with = "resume")]
    text_col: String,
    /// Column or field of the label
    #[arg(long, default_value = "label", conflicts_with = "resume")]
    label_col: String,
    /// Longest sequence
    #[arg(long, default_value_t = 4096, conflicts_with = "resume")]
    max_len: usize,
    /// Cut longer sequences off at the end instead of refusing them
    #[arg(long, conflicts_with = "resume")]
    truncate: bool,
    /// Let rare classes count as much as common ones
    #[arg(long, conflicts_with = "resume")]
    class_weights: bool,
    /// Share of the sequences that is held out for validation
    #[arg(long, default_value_t = 0.1, conflicts_with = "resume")]
    val_fraction: f64,
    /// Steps between validations
    #[arg(long, default_value_t = 200, conflicts_with = "resume")]
    eval_every: usize,
    /// Steps between checkpoints: what a crash can cost at most
    #[arg(long, default_value_t = 100, conflicts_with = "resume")]
    checkpoint_every: usize,
    /// Stop after so many validations without improvement
    #[arg(long, conflicts_with = "resume")]
    patience: Option<usize>,
}

#[derive(Debug, Args)]
struct PredictArgs {
    /// Model folder
    #[arg(long)]
    model: PathBuf,
    /// .csv, .jsonl or .npz file of sequences, or folder of images
    #[arg(long)]
    data: PathBuf,
    /// CSV file to write: row, label, and the probability of every class
    #[arg(long)]
    out: PathBuf,
    /// How sequences are read
    #[arg(long, value_enum, default_value = "whole")]
    mode: Reading,
    #[command(flatten)]
    columns: ColumnArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Reading {
    /// Each at once
    Whole,
    /// Piece by piece in constant memory, whatever their length; for models trained with --causal
    Stream,
}

#[derive(Debug, Args)]
struct ColumnArgs {
    /// Column or field of the text
    #[arg(long, default_value = "text")]
    text_col: String,
    /// Column or field of the label
    #[arg(long, default_value = "label")]
    label_col: String,
}

impl ColumnArgs {
    fn columns(&self) -> Columns {
        Columns { text: self.text_col.clone(), label: self.label_col.clone() }
    }
}

#[derive(Debug, Args)]
struct EvalArgs {
    /// Model folder
    #[arg(long)]
    model: PathBuf,
    /// Text file, or folder of text files, for a language model
    #[arg(long, required_unless_present = "data", conflicts_with = "data")]
    text: Option<PathBuf>,
    /// File or folder of labelled sequences, for a classifier or a model of recall
    #[arg(long)]
    data: Option<PathBuf>,
    /// How a text is read
    #[arg(long, value_enum, default_value = "stream")]
    mode: EvalMode,
    /// Bytes of a window of --mode context
    #[arg(long, default_value_t = 1024)]
    context: usize,
    /// Also draw the confusion matrix into this SVG or PNG file
    #[arg(long, value_name = "FILE")]
    confusion: Option<PathBuf>,
    #[command(flatten)]
    columns: ColumnArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum EvalMode {
    /// In windows that know nothing of each other
    Context,
    /// With the state carried over the whole text
    Stream,
}

#[derive(Debug, Args)]
struct LogitsArgs {
    /// Model folder
    #[arg(long)]
    model: PathBuf,
    /// Text file, or folder of text files
    #[arg(long, required_unless_present = "ids", conflicts_with = "ids")]
    text: Option<PathBuf>,
    /// .safetensors or .npz file with `input_ids [rows, time]`
    #[arg(long)]
    ids: Option<PathBuf>,
    /// .safetensors or .npz file to write
    #[arg(long)]
    out: PathBuf,
}

#[derive(Debug, Args)]
struct GenerateArgs {
    /// Model folder
    #[arg(long)]
    model: PathBuf,
    #[command(flatten)]
    text: ContinueText,
}

#[derive(Debug, Args)]
struct ListopsArgs {
    /// Number of expressions
    #[arg(long, default_value_t = 2000)]
    n: usize,
    /// Fewest symbols
    #[arg(long, default_value_t = 50)]
    min_len: usize,
    /// Most symbols
    #[arg(long, default_value_t = 200)]
    max_len: usize,
    /// Most lists inside one another
    #[arg(long, default_value_t = 6)]
    max_depth: usize,
    /// Most arguments of a list
    #[arg(long, default_value_t = 5)]
    max_args: usize,
    /// CSV file to write: text, label
    #[arg(long, required_unless_present = "solve")]
    out: Option<PathBuf>,
    /// Print the value of this expression instead
    #[arg(long, value_name = "TEXT", conflicts_with = "out")]
    solve: Option<String>,
}

#[derive(Debug, Args)]
struct RecallArgs {
    /// Number of sequences
    #[arg(long, default_value_t = 1000)]
    n: usize,
    /// Symbols before the question
    #[arg(long, default_value_t = 32)]
    length: usize,
    /// Keys, and values
    #[arg(long, default_value_t = 8)]
    values: usize,
    /// JSONL file to write: tokens, label
    #[arg(long)]
    out: PathBuf,
}

#[derive(Debug, Args)]
struct PlanArgs {
    /// Steps that an output should see
    #[arg(long)]
    context: usize,
    /// Channels
    #[arg(long, default_value_t = 128)]
    dim: usize,
    /// Most multiplications a step of one mixer
    #[arg(long)]
    budget: Option<usize>,
    /// Look both ways
    #[arg(long)]
    bidirectional: bool,
}

#[derive(Debug, Args)]
struct BenchArgs {
    /// Lengths, comma-separated
    #[arg(long, value_delimiter = ',', default_value = "1024,2048,4096,8192,16384,32768,65536,131072")]
    lengths: Vec<usize>,
    /// Channels
    #[arg(long, default_value_t = 64)]
    dim: usize,
    /// Sequences at once
    #[arg(long, default_value_t = 1)]
    batch: usize,
    /// Taps of a filter
    #[arg(long, default_value_t = 17)]
    kernel: usize,
    /// Factor by which the dilation grows
    #[arg(long, default_value_t = 4)]
    dilation: usize,
    /// Blocks of convolutions
    #[arg(long, default_value_t = 3)]
    blocks: usize,
    /// States a channel of the EMA
    #[arg(long, default_value_t = 16)]
    states: usize,
    /// CSV file to write, in seconds; the plot goes beside it as .svg
    #[arg(long)]
    out: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct OpArgs {
    /// Which operator
    #[arg(long, value_enum)]
    kind: OpKind,
    /// Distance between taps
    #[arg(long, default_value_t = 1)]
    dilation: usize,
    /// Look both ways
    #[arg(long)]
    bidirectional: bool,
    /// .safetensors or .npz file with the inputs
    #[arg(long = "in", value_name = "FILE")]
    input: PathBuf,
    /// .safetensors or .npz file to write: y, and dx where dy is given
    #[arg(long)]
    out: PathBuf,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum OpKind {
    /// Dilated depthwise convolution
    Conv,
    /// MEGA's damped moving average, with skip and SiLU
    Ema,
}

impl Command {
    /// Runs the verb.
    ///
    /// # Errors
    /// Whatever the verb's work runs into.
    pub fn run(self, cx: &Context) -> Result<()> {
        match self.verb {
            Verb::Train(args) => run_train(*args, cx),
            Verb::Predict(args) => run_predict(&args, cx),
            Verb::Eval(args) => run_eval(&args, cx),
            Verb::Logits(args) => run_logits(&args, cx),
            Verb::Generate(args) => run_generate(&args, cx),
            Verb::Listops(args) => run_listops(&args, cx),
            Verb::RecallData(args) => run_recall_data(&args, cx),
            Verb::Plan(args) => run_plan(&args, cx),
            Verb::Bench(args) => run_bench(&args, cx),
            Verb::Op(args) => run_op(&args, cx),
        }
    }
}

impl Recipe {
    fn network(&self) -> Result<TcncaConfig> {
        let blocks = match self.receptive_field {
            Some(steps) => {
                let one = TcnConfig::new(self.dim).with_filters(self.kernel, self.dilation, 1);
                one.with_receptive_field(steps)?.blocks
            }
            None => self.blocks,
        };
        Ok(TcncaConfig {
            dim: self.dim,
            z_dim: self.z_dim,
            h_dim: self.h_dim,
            ffn_dim: self.ffn_dim,
            layers: self.layers,
            variant: self.variant,
            mixer: self.mixer.clone(),
            kernel: self.kernel,
            dilation_factor: self.dilation,
            tcn_blocks: blocks,
            tcn_conv: self.tcn_conv,
            ema_states: self.ema_states,
            ema_truncation: self.ema_truncation,
            chunk: self.chunk,
            attention: self.attention,
            bias: self.bias,
            dropout: self.dropout,
        })
    }

    fn train_config(&self, steps: usize) -> Result<TrainConfig> {
        if self.batch == 0 || self.seq_len == 0 || self.max_len == 0 {
            return Err(Error::usage("--batch, --seq-len and --max-len must be at least 1"));
        }
        let (option, longest) = match self.task {
            TaskKind::Lm | TaskKind::Recall => ("--seq-len", self.seq_len),
            TaskKind::Classify | TaskKind::Listops => ("--max-len", self.max_len),
        };
        if self.batch.saturating_mul(longest) > MAX_BATCH_STEPS {
            let message = format!("--batch {} of {option} {longest} is too large", self.batch);
            return Err(Error::usage(message).hint(format!("at most {MAX_BATCH_STEPS} steps make a batch")));
        }
        if !(self.val_fraction > 0.0 && self.val_fraction < 1.0) {
            return Err(Error::usage(format!("--val-fraction {} is not between 0 and 1", self.val_fraction)));
        }
        let config = TrainConfig {
            steps,
            lr: self.lr,
            warmup: self.warmup.unwrap_or(WARMUP),
            min_lr_ratio: 0.0,
            decay: Decay::Linear,
            betas: (0.9, 0.98),
            weight_decay: self.weight_decay,
            clip_norm: self.clip,
            eval_every: self.eval_every,
            checkpoint_every: self.checkpoint_every,
            patience: self.patience,
            ..TrainConfig::default()
        };
        config.check()?;
        Ok(config)
    }
}

fn run_train(args: TrainArgs, cx: &Context) -> Result<()> {
    let run = match (&args.resume, &args.out) {
        (Some(folder), _) => TrainRun::resume(TRAIN, folder, args.steps)?,
        (None, Some(out)) => {
            let steps = args.steps.unwrap_or(STEPS);
            let warmup = Some(args.recipe.warmup.unwrap_or((steps / 10).min(WARMUP)));
            TrainRun::begin(TRAIN, out, steps, Recipe { warmup, ..args.recipe.clone() }, cx)
        }
        (None, None) => return Err(Error::usage("--out or --resume is needed")),
    };
    let cx = &run.context(cx);
    let config = run.recipe.train_config(run.steps)?;
    match run.recipe.task {
        TaskKind::Lm => train_lm(&run, &config, &args, cx),
        TaskKind::Recall => train_recall(&run, &config, cx),
        TaskKind::Classify | TaskKind::Listops => train_classifier(&run, &config, &args, cx),
    }
}

/// Says how large a network is and how far a layer of it sees.
fn introduce(network: &TcncaConfig, parameters: usize, data: &str, cx: &Context) -> Result<()> {
    let [filters, factor, blocks] = [network.kernel, network.dilation_factor, network.tcn_blocks];
    let tcn = TcnConfig::new(network.dim).with_filters(filters, factor, blocks);
    let steps = tcn.receptive_field()?;
    cx.note(format!("{parameters} parameters; mixer {}, a tcn sees {steps} steps; {data}", network.mixer));
    Ok(())
}

/// Trains and sums up; the model of the best validation.
fn carry_out<M: Module>(
    run: &TrainRun<Recipe>,
    model: M,
    task: &mut impl Task<M>,
    config: &TrainConfig,
    data: &str,
    cx: &Context,
) -> Result<(M, TrainSummary)> {
    let trained = run.train(model, task, config, data, cx)?;
    let summary = run.finish(&trained, "nats")?;
    Ok((trained.model, summary))
}

fn train_lm(run: &TrainRun<Recipe>, config: &TrainConfig, args: &TrainArgs, cx: &Context) -> Result<()> {
    let recipe = &run.recipe;
    let path = args.text.as_deref().ok_or_else(|| Error::usage("--text is needed for --task lm"))?;
    let whole = Corpus::read(path, &Tokenizer::Byte)?;
    // The protocol of EnWik8: 90 % for training, 5 % for validation, 5 % for the test.
    let needed = (recipe.seq_len + 1).max(36).saturating_mul(10).div_ceil(9);
    whole.require(needed, path.display())?;
    let (train, rest) = whole.split(0.1);
    let (valid, test) = rest.split(0.5);
    let lm = TcncaLmConfig { network: recipe.network()?, vocab: BYTES };
    lm.check()?;
    run.save(|folder| folder.save_config(KIND, &Config::Lm(lm.clone())))?;
    let model = checkpoint::draw_lm(&lm, cx);
    let counts = [&train, &valid, &test].map(|part| part.ids.len().to_string()).join(", ");
    let data = format!("bytes for training, validation and test: {counts}");
    introduce(&lm.network, model.num_params(), &data, cx)?;
    let mut task =
        LanguageTask { train: &train, valid: &valid, seq_len: recipe.seq_len, batch: recipe.batch, cx };
    let (model, summary) =
        carry_out(run, model, &mut task, config, &format!("--text {}", path.display()), cx)?;
    let test = score_windows(&model, &test.ids, recipe.seq_len)?.over_bytes(test.ids.len() - 1);
    let result = LmResult { summary, test: TextScore::of(&test) };
    cx.emit(&result, |LmResult { summary, test }| {
        let test = format!("on the test part {}", test.to_text());
        format!("{}{test}model in {}\n", summary.to_text("nats a byte"), summary.model.display())
    })
}

/// What `train --task lm` prints.
#[derive(Serialize)]
struct LmResult {
    #[serde(flatten)]
    summary: TrainSummary,
    /// Of the best weights, on the last 5 % of the text.
    test: TextScore,
}

/// How well a text is predicted.
#[derive(Serialize)]
struct TextScore {
    bytes: usize,
    nll_nats: f64,
    bits_per_byte: f64,
}

impl TextScore {
    fn of(score: &Score) -> Self {
        let bits_per_byte = score.nll_nats / std::f64::consts::LN_2;
        Self { bytes: score.tokens_scored, nll_nats: score.nll_nats, bits_per_byte }
    }

    fn to_text(&self) -> String {
        let Self { bytes, nll_nats, bits_per_byte } = self;
        format!("{bytes} bytes scored: {nll_nats:.4} nats a byte, {bits_per_byte:.4} bits a byte\n")
    }
}

fn train_recall(run: &TrainRun<Recipe>, config: &TrainConfig, cx: &Context) -> Result<()> {
    let recipe = &run.recipe;
    let recall = Recall { length: recipe.seq_len, values: recipe.values };
    recall.check()?;
    let network = TcncaLmConfig { network: recipe.network()?, vocab: recall.vocab() };
    network.check()?;
    run.save(|folder| {
        folder.save_config(KIND, &Config::Recall(RecallConfig { network: network.clone(), recall }))
    })?;
    let model = checkpoint::draw_lm(&network, cx);
    introduce(&network.network, model.num_params(), "fresh sequences", cx)?;
    let mut task = RecallTask { recall, batch: recipe.batch, cx };
    let (model, summary) = carry_out(run, model, &mut task, config, &format!("--steps {}", run.steps), cx)?;
    let accuracy = task.accuracy(&model, 1000);
    let result = json!({ "summary": summary, "accuracy": accuracy });
    cx.emit(&result, |_| {
        let text = summary.to_text("nats an answer");
        format!("{text}right answers {accuracy:.4}\nmodel in {}\n", summary.model.display())
    })
}

fn train_classifier(
    run: &TrainRun<Recipe>,
    config: &TrainConfig,
    args: &TrainArgs,
    cx: &Context,
) -> Result<()> {
    let recipe = &run.recipe;
    let listops = recipe.task == TaskKind::Listops;
    let columns = Columns { text: recipe.text_col.clone(), label: recipe.label_col.clone() };
    let (sequences, place) = match &args.data {
        Some(path) => (data::read(path, &columns)?, path.clone()),
        None if listops => (made_listops(LISTOPS.0, &LISTOPS.1, cx)?, PathBuf::from("ListOps")),
        None => return Err(Error::usage("--data is needed for --task classify")),
    };
    if sequences.len() < 2 {
        return Err(Error::input(place.display(), "holds one sequence, needs at least two")
            .hint("one is held out for validation"));
    }
    let classify = if run.resumed {
        let Config::Classify(classify) = Config::read(&run.folder)? else {
            return Err(Error::input(run.folder.path().display(), "holds no classifier"));
        };
        classify.coding.check(&sequences, &place, true)?;
        classify
    } else {
        let unit = if listops { TextUnit::Word } else { recipe.tokens };
        let coding = Coding::of(&sequences, unit, recipe.max_len, recipe.truncate, &place)?;
        let network = TcncaClassifierConfig {
            network: recipe.network()?,
            input: coding.input(),
            classes: coding.classes.len(),
            causal: recipe.causal,
        };
        ClassifyConfig { network, coding }
    };
    classify.network.check()?;
    run.save(|folder| folder.save_config(KIND, &Config::Classify(classify.clone())))?;
    let model = checkpoint::draw_classifier(&classify.network, cx);
    let (train, valid) = split(sequences, recipe.val_fraction, cx);
    let data = format!("{} sequences, {} held out", train.len(), valid.len());
    introduce(&classify.network.network, model.num_params(), &data, cx)?;
    let coding = &classify.coding;
    let mut task = ClassificationTask::new([&train, &valid], coding, recipe.class_weights, recipe.batch, cx);
    let given = match &args.data {
        Some(path) => format!("--data {}", path.display()),
        None => format!("--steps {}", run.steps),
    };
    let (model, summary) = carry_out(run, model, &mut task, config, &given, cx)?;
    let scores = Scores::new(&predict(&model, coding, &valid, cx), &valid, coding);
    scores.plot().save(&run.folder.file("confusion.svg"))?;
    let result = ClassifyResult { summary, validation: scores };
    cx.emit(&result, |ClassifyResult { summary, validation }| {
        let scores = scores_text(validation);
        format!("{}{scores}model in {}\n", summary.to_text("nats a sequence"), summary.model.display())
    })
}

/// What `train --task classify` prints.
#[derive(Serialize)]
struct ClassifyResult {
    #[serde(flatten)]
    summary: TrainSummary,
    /// Of the best weights, on the sequences held out.
    validation: Scores,
}

/// Classes up to which the confusion matrix is printed.
const PRINTED_CLASSES: usize = 12;

fn scores_text(scores: &Scores) -> String {
    let mut text = format!(
        "accuracy {:.4} on {} sequences (commonest label {:.4}), macro F1 {:.4}\n",
        scores.accuracy, scores.sequences, scores.majority, scores.macro_f1
    );
    if scores.classes.len() <= PRINTED_CLASSES {
        text += &scores.table().to_text();
    }
    text
}

fn open_classifier(path: &Path, cx: &Context) -> Result<(TcncaClassifier, TcncaClassifierConfig, Coding)> {
    match checkpoint::open(path, cx)? {
        Trained::Classifier(model, config, coding) => Ok((*model, config, coding)),
        Trained::Lm(..) => Err(Error::input(path.display(), "is a language model, not a classifier")
            .hint("`kiln tcnca train --task classify` makes one")),
    }
}

fn run_predict(args: &PredictArgs, cx: &Context) -> Result<()> {
    let (model, config, coding) = open_classifier(&args.model, cx)?;
    let sequences = data::read(&args.data, &args.columns.columns())?;
    let predictions = match args.mode {
        Reading::Whole => {
            coding.check(&sequences, &args.data, false)?;
            predict(&model, &coding, &sequences, cx)
        }
        Reading::Stream if !config.causal => {
            return Err(Error::usage("the model looks both ways and must have a sequence whole")
                .hint("train with --causal for --mode stream"));
        }
        Reading::Stream => {
            let unlimited = Coding { max_len: usize::MAX, ..coding.clone() };
            unlimited.check(&sequences, &args.data, false)?;
            stream(&model, &unlimited, &sequences, cx)
        }
    };
    let failed = |e: csv::Error| Error::work("cannot lay out the predictions").caused_by(e);
    let mut writer = csv::Writer::from_writer(Vec::new());
    let heads = ["row".to_string(), "label".into()].into_iter();
    writer
        .write_record(heads.chain(coding.classes.iter().map(|class| format!("p_{class}"))))
        .map_err(failed)?;
    for (row, probabilities) in predictions.iter().enumerate() {
        if probabilities.iter().any(|p| !p.is_finite()) {
            let message = format!("the probabilities of row {} are not numbers", row + 1);
            return Err(Error::work(message).hint("the numbers of the sequence may be too large"));
        }
        let cells = [(row + 1).to_string(), coding.classes[likeliest(probabilities)].clone()].into_iter();
        writer.write_record(cells.chain(probabilities.iter().map(|p| format!("{p:.6}")))).map_err(failed)?;
    }
    let bytes =
        writer.into_inner().map_err(|e| Error::work(format!("cannot lay out the predictions: {e}")))?;
    write_atomic(&args.out, &bytes)?;
    let result = json!({ "sequences": sequences.len(), "out": args.out });
    cx.emit(&result, |_| format!("labels of {} sequences in {}\n", sequences.len(), args.out.display()))
}

/// Probabilities of sequences that are read piece by piece.
fn stream(model: &TcncaClassifier, coding: &Coding, sequences: &[Sequence], cx: &Context) -> Vec<Vec<f32>> {
    let bar = cx.progress(sequences.len() as u64, "reading");
    let read = |sequence: &Sequence| {
        let mut state = model.initial_state(1, &cx.device);
        let mut probabilities = Vec::new();
        for piece in coding.pieces(sequence, PIECE) {
            let (steps, _) = coding.encode(&[&piece], &cx.device);
            let (logits, next) = model.forward_with_state(steps, state);
            state = next;
            probabilities = softmax(logits, 1).into_data().iter::<f32>().collect();
        }
        bar.inc(1);
        probabilities
    };
    sequences.iter().map(read).collect()
}

fn run_eval(args: &EvalArgs, cx: &Context) -> Result<()> {
    match (checkpoint::open(&args.model, cx)?, &args.text, &args.data) {
        (Trained::Lm(model, _), Some(path), _) => {
            let corpus = Corpus::read(path, &Tokenizer::Byte)?;
            let score = match args.mode {
                EvalMode::Context => score_windows(&*model, &corpus.ids, args.context)?,
                EvalMode::Stream => score_carried(&*model, &corpus.ids, PIECE)?,
            };
            cx.emit(&TextScore::of(&score), TextScore::to_text)
        }
        (Trained::Classifier(model, _, coding), _, Some(path)) => {
            let sequences = data::read(path, &args.columns.columns())?;
            coding.check(&sequences, path, true)?;
            let scores = Scores::new(&predict(&model, &coding, &sequences, cx), &sequences, &coding);
            if let Some(path) = &args.confusion {
                scores.plot().save(path)?;
            }
            cx.emit(&scores, scores_text)
        }
        (Trained::Lm(model, Some(recall)), None, Some(path)) => {
            let sequences = data::read(path, &args.columns.columns())?;
            let accuracy = recall_accuracy(&model, recall, &sequences, path, cx)?;
            cx.emit(&json!({ "sequences": sequences.len(), "accuracy": accuracy }), |_| {
                format!("right answers {accuracy:.4} of {} sequences\n", sequences.len())
            })
        }
        (Trained::Lm(..), ..) => {
            Err(Error::usage("a language model is scored on a text").hint("give --text"))
        }
        (Trained::Classifier(..), ..) => {
            Err(Error::usage("a classifier is scored on labelled sequences").hint("give --data"))
        }
    }
}

/// The share of sequences whose label is the likeliest symbol after the last.
fn recall_accuracy(
    model: &TcncaLm,
    recall: Recall,
    sequences: &[Sequence],
    path: &Path,
    cx: &Context,
) -> Result<f64> {
    let mut right = 0;
    for (row, sequence) in sequences.iter().enumerate() {
        let wrong = |found: &str| Error::input(format!("{}, row {}", path.display(), row + 1), found);
        let symbol = |word: &String| word.parse().ok().filter(|&id: &u32| (id as usize) < recall.vocab());
        let ids: Option<Vec<u32>> = match &sequence.content {
            Content::Symbols(symbols) => symbols.iter().map(symbol).collect(),
            _ => None,
        };
        let ids = ids.ok_or_else(|| {
            wrong(&format!("is not a list \"tokens\" of numbers below {}", recall.vocab()))
                .hint("`kiln tcnca recall-data` writes such files")
        })?;
        let label = sequence
            .label
            .as_ref()
            .and_then(symbol)
            .ok_or_else(|| wrong("has no label among the symbols"))?;
        let logits = model.forward(ids_to_tensor(&ids, &cx.device)).narrow(1, ids.len() - 1, 1);
        let logits: Vec<f32> = logits.into_data().iter::<f32>().collect();
        right += usize::from(likeliest(&logits) == label as usize);
    }
    Ok(right as f64 / sequences.len() as f64)
}

fn run_logits(args: &LogitsArgs, cx: &Context) -> Result<()> {
    let model = checkpoint::open_lm(&args.model, cx)?;
    let (ids, shape) = match (&args.text, &args.ids) {
        (Some(path), _) => {
            let ids = Corpus::read(path, &Tokenizer::Byte)?.ids;
            let shape = [1, ids.len()];
            (ids.into_iter().map(i64::from).collect(), shape)
        }
        (None, Some(path)) => read_ids(path)?,
        (None, None) => return Err(Error::usage("--text or --ids is needed")),
    };
    let vocab = model.vocab_size();
    if let Some(at) = ids.iter().position(|id| !(0..vocab as i64).contains(id)) {
        let message = format!("id {} at {at} is outside the vocabulary of {vocab}", ids[at]);
        return Err(Error::usage(message));
    }
    let ids = Tensor::<2, Int>::from_data(TensorData::new(ids, shape), &cx.device);
    let mut file = TensorFile::new();
    file.insert("logits", HostTensor::from_tensor(model.forward(ids)));
    write_tensors(&args.out, &file)?;
    let shape = [shape[0], shape[1], vocab];
    cx.emit(&json!({ "file": args.out, "logits": shape }), |_| {
        format!("logits {shape:?} in {}\n", args.out.display())
    })
}

fn read_ids(path: &Path) -> Result<(Vec<i64>, [usize; 2])> {
    let ids = read_tensors(path)?.take("input_ids")?;
    match (&ids.shape[..], ids.as_ints()) {
        (&[rows, time], Some(values)) if rows * time > 0 => Ok((values.to_vec(), [rows, time])),
        _ => {
            let found =
                format!("\"input_ids\" has the shape {:?}, expected integers [rows, time]", ids.shape);
            Err(Error::input(path.display(), found))
        }
    }
}

fn run_generate(args: &GenerateArgs, cx: &Context) -> Result<()> {
    args.text.check()?;
    let model = checkpoint::open_lm(&args.model, cx)?;
    if model.vocab_size() != BYTES {
        return Err(Error::input(args.model.display(), "does not know bytes, so it writes no text"));
    }
    args.text.run(&model, &Tokenizer::Byte, cx)
}

fn made_listops(count: usize, listops: &ListOps, cx: &Context) -> Result<Vec<Sequence>> {
    let bar = cx.progress(count as u64, "expressions");
    let mut rng = cx.rng("listops", 0);
    (0..count)
        .map(|_| {
            let (text, value) = listops.draw(&mut rng)?;
            bar.inc(1);
            Ok(Sequence { content: Content::Text(text.into()), label: Some(value.to_string()) })
        })
        .collect()
}

fn run_listops(args: &ListopsArgs, cx: &Context) -> Result<()> {
    if let Some(text) = &args.solve {
        let value = crate::listops::evaluate(text).map_err(|e| {
            Error::input("expression", e).hint("symbols are separated by spaces: [MAX 2 9 [MIN 4 7 ] 0 ]")
        })?;
        return cx.emit(&json!({ "value": value }), |_| format!("{value}\n"));
    }
    let Some(out) = &args.out else { return Err(Error::usage("--out is needed")) };
    let ListopsArgs { min_len, max_len, max_depth, max_args, .. } = *args;
    let sequences = made_listops(args.n, &ListOps { min_len, max_len, max_depth, max_args }, cx)?;
    let failed = |e: csv::Error| Error::work("cannot lay out the expressions").caused_by(e);
    let mut writer = csv::Writer::from_writer(Vec::new());
    writer.write_record(["text", "label"]).map_err(failed)?;
    for Sequence { content, label } in &sequences {
        if let (Content::Text(text), Some(label)) = (content, label) {
            writer.write_record([text, label.as_bytes()]).map_err(failed)?;
        }
    }
    let bytes =
        writer.into_inner().map_err(|e| Error::work(format!("cannot lay out the expressions: {e}")))?;
    write_atomic(out, &bytes)?;
    cx.emit(&json!({ "expressions": args.n, "out": out }), |_| {
        format!("{} expressions in {}\n", args.n, out.display())
    })
}

fn run_recall_data(args: &RecallArgs, cx: &Context) -> Result<()> {
    let recall = Recall { length: args.length, values: args.values };
    recall.check()?;
    let mut rng = cx.rng("recall", 0);
    let line = |_| {
        let (tokens, label) = recall.draw(&mut rng);
        format!("{}\n", json!({ "tokens": tokens, "label": label }))
    };
    let lines: String = (0..args.n).map(line).collect();
    write_atomic(&args.out, lines.as_bytes())?;
    cx.emit(&json!({ "sequences": args.n, "out": args.out }), |_| {
        format!("{} sequences in {}\n", args.n, args.out.display())
    })
}

fn run_plan(args: &PlanArgs, cx: &Context) -> Result<()> {
    let candidates = plan::plan(args.dim, args.context, args.budget, args.bidirectional)?;
    cx.emit(&candidates, |candidates| plan::table(args.dim, candidates).to_text())
}

fn run_bench(args: &BenchArgs, cx: &Context) -> Result<()> {
    let tcn = TcnConfig::new(args.dim).with_filters(args.kernel, args.dilation, args.blocks);
    tcn.check()?;
    if args.lengths.is_empty()
        || args.lengths.contains(&0)
        || [args.dim, args.batch, args.states].contains(&0)
    {
        return Err(Error::usage("lengths, --dim, --batch and --states must be at least 1"));
    }
    let longest = args.lengths.iter().copied().max().unwrap_or(0);
    if longest.saturating_mul(args.batch).saturating_mul(args.dim) > 1 << 28 {
        return Err(Error::usage("lengths, --dim and --batch together are too large")
            .hint("length × channels × batch may be up to 2^28"));
    }
    let timings = speed::measure(tcn, args.states, args.batch, &args.lengths, cx);
    if let Some(out) = &args.out {
        let failed = |e: csv::Error| Error::work("cannot lay out the timings").caused_by(e);
        let mut writer = csv::Writer::from_writer(Vec::new());
        timings.iter().try_for_each(|timing| writer.serialize(timing)).map_err(failed)?;
        let bytes =
            writer.into_inner().map_err(|e| Error::work(format!("cannot lay out the timings: {e}")))?;
        write_atomic(out, &bytes)?;
        speed::plot(&timings).save(&out.with_extension("svg"))?;
    }
    let steps = tcn.receptive_field()?;
    let title = format!("milliseconds; the TCN sees {steps} steps, the EMA all");
    cx.emit(&timings, |timings| {
        let table = speed::table(title, timings);
        format!("{}\n{}", table.title, table.to_text())
    })
}

fn run_op(args: &OpArgs, cx: &Context) -> Result<()> {
    let mut file = read_tensors(&args.input)?;
    let place = args.input.display().to_string();
    for name in ["x", "dy", "weight", "bias", "delta", "alpha", "beta", "gamma", "omega"] {
        let values = file.get(name).and_then(HostTensor::as_floats).unwrap_or_default();
        if let Some(at) = values.iter().position(|x| !x.is_finite()) {
            return Err(Error::input(&place, format!("element {at} of \"{name}\" is {}", values[at]))
                .hint("operators take finite numbers"));
        }
    }
    let device = cx.device.clone().autodiff();
    let x = file.take_float::<3>("x", &device)?.require_grad();
    let [_, _, channels] = x.dims();
    if x.dims().contains(&0) {
        return Err(Error::input(&place, format!("\"x\" has the shape {:?}, no extent may be 0", x.dims())));
    }
    let y = match args.kind {
        OpKind::Conv => {
            let weight = file.take_float::<3>("weight", &device)?;
            let bias = file.take_float::<1>("bias", &device)?;
            let [_, _, kernel] = weight.dims();
            if weight.dims() != [channels, 1, kernel] || bias.dims() != [channels] || kernel == 0 {
                let found = format!("\"weight\" is {:?} and \"bias\" {:?}", weight.dims(), bias.dims());
                return Err(Error::input(&place, found).hint(format!(
                    "for \"x\" of {channels} channels they are [{channels}, 1, K] and [{channels}]"
                )));
            }
            let config = TcnConfig {
                bidirectional: args.bidirectional,
                ..TcnConfig::new(channels).with_filters(kernel, 1, 1)
            };
            config.check()?;
            if args.dilation == 0 || args.dilation.checked_mul(kernel).is_none_or(|span| span > 1 << 32) {
                return Err(Error::usage(format!("--dilation {} makes no sense", args.dilation)));
            }
            let options = match args.bidirectional {
                true => DilatedConvOptions::centred(kernel, args.dilation),
                false => DilatedConvOptions::causal(kernel, args.dilation),
            };
            dilated_conv(x.clone(), weight.reshape([channels, kernel]), Some(bias), options)
        }
        OpKind::Ema => read_ema(&mut file, channels, args, cx)?.forward(x.clone(), None),
    };
    let mut result = TensorFile::new();
    result.insert("y", HostTensor::from_tensor(y.clone().inner()));
    if file.get("dy").is_some() {
        let dy = file.take_float::<3>("dy", &device)?;
        if dy.dims() != y.dims() {
            return Err(Error::input(
                &place,
                format!("\"dy\" is {:?}, the output {:?}", dy.dims(), y.dims()),
            ));
        }
        let gradients = (y * dy).sum().backward();
        let dx = x.grad(&gradients).unwrap_or_else(|| Tensor::zeros(x.dims(), &cx.device));
        result.insert("dx", HostTensor::from_tensor(dx));
    }
    let names: Vec<&str> = result.names().collect();
    for name in &names {
        let values = result.get(name).and_then(HostTensor::as_floats).unwrap_or_default();
        if values.iter().any(|x| !x.is_finite()) {
            let message = format!("\"{name}\" does not fit the range of f32");
            return Err(Error::work(message).hint("the inputs are too large; scale them down"));
        }
    }
    write_tensors(&args.out, &result)?;
    cx.emit(&json!({ "file": args.out, "tensors": names }), |_| {
        format!("{} in {}\n", names.join(", "), args.out.display())
    })
}

/// An EMA with the parameters of a file.
fn read_ema(file: &mut TensorFile, channels: usize, args: &OpArgs, cx: &Context) -> Result<MultiHeadEma> {
    let mut parameters = TensorFile::from_source(&args.input);
    for name in ["delta", "alpha", "beta", "gamma", "omega"] {
        parameters.insert(name, file.take(name)?);
    }
    let states = parameters.get("gamma").and_then(|gamma| gamma.shape.get(1).copied()).unwrap_or(0);
    let config =
        MultiHeadEmaConfig { states, bidirectional: args.bidirectional, ..MultiHeadEmaConfig::new(channels) };
    config.check()?;
    parameters.into_module(config.init(&cx.device))
}
