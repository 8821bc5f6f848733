//! The verbs of `kiln gla`.

use std::path::{Path, PathBuf};

use burn::tensor::{Int, Tensor, TensorData};
use clap::{Args, Parser, Subcommand, ValueEnum};
use kiln_core::{Context, Error, HostTensor, Result, TensorFile};
use kiln_data::{Corpus, Tokenizer};
use kiln_nn::{
    ContinueText, LanguageModel, Score, TrainConfig, TrainRun, TrainSummary, score_carried,
    score_context_lengths, score_windows,
};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::checkpoint::{self, KIND, Trained};
use crate::layer::FeatureMap;
use crate::lm::{Arch, LmConfig, LmState};
use crate::model::GlaLmConfig;
use crate::op::{self, GlaOpConfig};
use crate::server;
use crate::training::{self, HeadMemory, LanguageTask};

/// The command whose runs a model folder keeps.
const TRAIN: &str = "gla train";
/// A text is read in pieces of so many tokens when the state is carried along.
const PIECE: usize = 1024;
/// More tokens in a training step are a slip of the pen: their logits alone fill a machine.
const MAX_BATCH_TOKENS: usize = 1 << 24;

/// `kiln gla …`
#[derive(Debug, Parser)]
#[command(name = "gla", about = "Gated linear attention: language models with constant memory a token")]
#[command(after_help = "Examples:
  kiln gla train --text my.txt --out m/
  kiln gla eval --model m/ --text held-out.txt
  kiln gla generate --model m/ --prompt \"Once upon a time\" --stream")]
pub struct Command {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Train a language model on your text
    #[command(after_help = "Examples:
  kiln gla train --text my.txt --out m/
  kiln gla train --text corpus/ --tokenizer tokenizer.json --d-model 512 --layers 8 --heads 8 --out m/
  kiln gla train --text my.txt --resume m/            after Ctrl-C or a crash
  kiln gla train --text my.txt --resume m/ --steps 4000    to go on longer")]
    Train(TrainArgs),
    /// Measure how well a model predicts a text
    #[command(after_help = "Examples:
  kiln gla eval --model m/ --text test.txt
  kiln gla eval --model m/ --text test.txt --window 256
  kiln gla eval --model m/ --text test.txt --lengths 256,512,1024,2048")]
    Eval(EvalArgs),
    /// Write the logits of a text
    #[command(after_help = "Example:
  kiln gla logits --model m/ --text test.txt --out logits.safetensors")]
    Logits(LogitsArgs),
    /// Continue a prompt
    #[command(after_help = "Examples:
  kiln gla generate --model m/ --prompt \"To be\" --stream
  kiln gla generate --model m/ --prompt-file - --greedy --max-tokens 50 < prompt.txt
  kiln gla generate --model m/ --prompt \"A long preface\" --state-out preface.safetensors
  kiln gla generate --model m/ --state-in preface.safetensors --prompt \" and on\"")]
    Generate(GenerateArgs),
    /// Run the attention operator on your own tensors, forward and backward
    #[command(after_help = "Example:
  kiln gla op --in qkvg.safetensors --form chunk --out result.safetensors
The input holds q, k, g [batch, heads, time, key], v [batch, heads, time, value] and optionally h0, do, dht.")]
    Op(OpArgs),
    /// Convert between Kiln's model folders and the reference implementation's
    #[command(after_help = "Examples:
  kiln gla convert --from fla-checkpoint/ --to m/
  kiln gla convert --from m/ --to fla-checkpoint/ --layout fla")]
    Convert(ConvertArgs),
    /// Show the size of a model and of its memory, and how long its heads remember
    #[command(after_help = "Examples:
  kiln gla info --model m/
  kiln gla info --model m/ --text my.txt --prune-report memory.svg")]
    Info(InfoArgs),
    /// Serve completions over HTTP
    #[command(after_help = "Examples:
  kiln gla serve --model m/ --port 8080
  curl -s localhost:8080/v1/completions -d '{\"prompt\": \"To be\", \"max_tokens\": 20}'")]
    Serve(ServeArgs),
}

/// Options of `train`; those that shape the run are kept in `train.json` for resuming.
#[derive(Debug, Args)]
struct TrainArgs {
    /// Text file, or folder of text files
    #[arg(long)]
    text: PathBuf,
    /// Validate on this file instead of the end of the text
    #[arg(long)]
    valid: Option<PathBuf>,
    /// Folder for the model
    #[arg(long, required_unless_present = "resume")]
    out: Option<PathBuf>,
    /// Continue the run in this folder; all other options are those it began with, only --steps may grow
    #[arg(long, value_name = "DIR", conflicts_with_all = ["out", "init_from"])]
    resume: Option<PathBuf>,
    /// Start from the weights of this model
    #[arg(long, value_name = "DIR")]
    init_from: Option<PathBuf>,
    /// Optimisation steps in all [default: 2000]
    #[arg(long)]
    steps: Option<usize>,
    #[command(flatten)]
    recipe: Recipe,
}

/// What decides the outcome of a training run, besides text, steps and seed.
#[derive(Debug, Clone, Args, Serialize, Deserialize)]
struct Recipe {
    /// Architecture
    #[arg(long, value_enum, default_value = "gla", conflicts_with = "resume")]
    arch: Arch,
    /// "byte", or the path of a Hugging Face tokenizer.json
    #[arg(long, default_value = "byte", conflicts_with = "resume")]
    tokenizer: String,
    /// Width of the model
    #[arg(long, default_value_t = 256, conflicts_with = "resume")]
    d_model: usize,
    /// Number of blocks
    #[arg(long, default_value_t = 6, conflicts_with = "resume")]
    layers: usize,
    /// Attention heads
    #[arg(long, default_value_t = 4, conflicts_with = "resume")]
    heads: usize,
    /// Heads of keys, values and gates; divides --heads
    #[arg(long, conflicts_with = "resume")]
    kv_heads: Option<usize>,
    /// Feature map of queries and keys
    #[arg(long, value_parser = parse_feature_map, conflicts_with = "resume")]
    feature_map: Option<FeatureMap>,
    /// Put short causal convolutions on q, k and v
    #[arg(long, conflicts_with = "resume")]
    short_conv: bool,
    /// Gate temperature
    #[arg(long, default_value_t = 16.0, conflicts_with = "resume")]
    tau: f64,
    /// Tokens a training window
    #[arg(long, default_value_t = 256, conflicts_with = "resume")]
    seq_len: usize,
    /// Windows a batch
    #[arg(long, default_value_t = 16, conflicts_with = "resume")]
    batch: usize,
    /// Highest learning rate
    #[arg(long, default_value_t = 1e-3, conflicts_with = "resume")]
    lr: f64,
    /// Steps over which the learning rate rises
    #[arg(long, default_value_t = 100, conflicts_with = "resume")]
    warmup: usize,
    /// Decoupled weight decay
    #[arg(long, default_value_t = 0.01, conflicts_with = "resume")]
    weight_decay: f64,
    /// Largest norm of the gradients
    #[arg(long, default_value_t = 1.0, conflicts_with = "resume")]
    clip: f64,
    /// Fraction at the end of the text that is held out for validation
    #[arg(long, default_value_t = 0.05, conflicts_with = "resume")]
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
    /// Rows per chunk of the operator
    #[arg(long, default_value_t = 64, conflicts_with = "resume")]
    chunk: usize,
    /// Rows per sub-block of a chunk
    #[arg(long, default_value_t = 16, conflicts_with = "resume")]
    sub_chunk: usize,
    /// Recompute chunk states in the backward pass: less memory, a little slower
    #[arg(long, conflicts_with = "resume")]
    recompute: bool,
}

fn parse_feature_map(name: &str) -> Result<FeatureMap, String> {
    serde_json::from_value(name.into()).map_err(|_| "expected relu, elu+1, silu or none".into())
}

#[derive(Debug, Args)]
struct EvalArgs {
    /// Model folder
    #[arg(long)]
    model: PathBuf,
    #[command(flatten)]
    source: Source,
    /// Tokens in view; 0 is the whole text with the state carried along
    #[arg(long, default_value_t = 0)]
    context: usize,
    /// Score independent windows of so many tokens
    #[arg(long, conflicts_with = "context")]
    window: Option<usize>,
    /// One row a context length, comma-separated; the last tokens of each window are scored
    #[arg(long, value_delimiter = ',', conflicts_with_all = ["context", "window"])]
    lengths: Vec<usize>,
}

/// A text, or token ids as they are.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct Source {
    /// Text file, or folder of text files
    #[arg(long)]
    text: Option<PathBuf>,
    /// Safetensors file with `input_ids [rows, time]`
    #[arg(long)]
    ids: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct LogitsArgs {
    /// Model folder
    #[arg(long)]
    model: PathBuf,
    #[command(flatten)]
    source: Source,
    /// Safetensors file to write
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
struct OpArgs {
    /// Safetensors file with q, k, v, g and optionally h0, do, dht
    #[arg(long = "in", value_name = "FILE")]
    input: PathBuf,
    /// Which of the equivalent forms
    #[arg(long, value_enum, default_value = "chunk")]
    form: Form,
    /// Rows per chunk
    #[arg(long, default_value_t = 64)]
    chunk: usize,
    /// Rows per sub-block
    #[arg(long, default_value_t = 16)]
    sub_chunk: usize,
    /// Safetensors file to write: o, ht, and the gradients when `do` is given
    #[arg(long)]
    out: PathBuf,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Form {
    /// Token by token
    Recurrent,
    /// All pairs at once
    Parallel,
    /// Chunk by chunk
    Chunk,
}

#[derive(Debug, Args)]
struct ConvertArgs {
    /// Folder to read, in either layout
    #[arg(long)]
    from: PathBuf,
    /// Folder to write
    #[arg(long)]
    to: PathBuf,
    /// Layout to write
    #[arg(long, value_enum, default_value = "kiln")]
    layout: Layout,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Layout {
    /// With `kind`, as Kiln reads it everywhere
    Kiln,
    /// As the reference implementation reads it
    Fla,
}

#[derive(Debug, Args)]
struct InfoArgs {
    /// Model folder
    #[arg(long)]
    model: PathBuf,
    /// Measure how long the heads remember on this text
    #[arg(long)]
    text: Option<PathBuf>,
    /// Draw the heads' memory into this SVG or PNG file
    #[arg(long, value_name = "FILE", requires = "text")]
    prune_report: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct ServeArgs {
    /// Model folder
    #[arg(long)]
    model: PathBuf,
    /// Port to listen on
    #[arg(long, default_value_t = 8080)]
    port: u16,
    /// Address to listen on
    #[arg(long, default_value = "127.0.0.1")]
    host: String,
}

impl Command {
    /// Runs the verb.
    ///
    /// # Errors
    /// Whatever the verb's work runs into.
    pub fn run(self, cx: &Context) -> Result<()> {
        match self.verb {
            Verb::Train(args) => run_train(args, cx),
            Verb::Eval(args) => run_eval(&args, cx),
            Verb::Logits(args) => run_logits(&args, cx),
            Verb::Generate(args) => run_generate(&args, cx),
            Verb::Op(args) => run_op(&args, cx),
            Verb::Convert(args) => run_convert(&args, cx),
            Verb::Info(args) => run_info(&args, cx),
            Verb::Serve(args) => server::serve(&args.model, &args.host, args.port, cx),
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
    let tokenizer =
        if run.resumed { Tokenizer::open(&run.folder)? } else { Tokenizer::load(&recipe.tokenizer)? };
    if recipe.seq_len == 0 || recipe.batch == 0 {
        return Err(Error::usage("--seq-len and --batch must be at least 1"));
    }
    if recipe.seq_len.saturating_mul(recipe.batch) > MAX_BATCH_TOKENS {
        let message = format!("--batch {} of --seq-len {} tokens is too large", recipe.batch, recipe.seq_len);
        return Err(Error::usage(message).hint(format!("at most {MAX_BATCH_TOKENS} tokens make a step")));
    }
    if !(recipe.val_fraction >= 0.0 && recipe.val_fraction < 1.0) {
        return Err(Error::usage(format!("--val-fraction {} is not in [0, 1)", recipe.val_fraction)));
    }

    let (train_text, valid_text) = read_texts(&args.text, args.valid.as_deref(), recipe, &tokenizer)?;
    let (config, model) = match (&args.init_from, run.resumed) {
        (_, true) => {
            let config = checkpoint::read_config(&run.folder)?;
            let model = config.init(cx);
            (config, model)
        }
        (Some(from), false) => {
            let Trained { config, model, .. } = checkpoint::open(from, cx)?;
            (config, model)
        }
        (None, false) => {
            let config = LmConfig::like(recipe.arch, &gla_config(recipe, tokenizer.vocab_size()))?;
            let model = config.init(cx);
            (config, model)
        }
    };
    if let Some(id) =
        train_text.ids.iter().chain(&valid_text.ids).find(|&&id| id as usize >= model.vocab_size())
    {
        let found = format!("holds token id {id}, the model's vocabulary has {}", model.vocab_size());
        return Err(Error::input(args.text.display(), found));
    }

    let train_config = TrainConfig {
        steps: run.steps,
        lr: recipe.lr,
        warmup: recipe.warmup,
        weight_decay: recipe.weight_decay,
        clip_norm: recipe.clip,
        eval_every: recipe.eval_every,
        checkpoint_every: recipe.checkpoint_every,
        patience: recipe.patience,
        ..TrainConfig::default()
    };
    train_config.check()?;
    run.save(|folder| checkpoint::save(folder, &config, &tokenizer, None))?;

    cx.note(format!(
        "{} with {} parameters on {} tokens, {} held out",
        config.arch().name(),
        burn::module::Module::num_params(&model),
        train_text.ids.len(),
        valid_text.ids.len()
    ));
    let mut task = LanguageTask {
        train: &train_text,
        valid: &valid_text,
        seq_len: recipe.seq_len,
        batch: recipe.batch,
        cx,
    };
    let text = format!("--text {}", args.text.display());
    let trained = run.train(model, &mut task, &train_config, &text, cx)?;
    let summary = run.finish(&trained, "nats per token")?;
    let memory = match config.arch() {
        Arch::Gla => training::head_memory(&trained.model, &valid_text.ids, cx),
        _ => Vec::new(),
    };
    if !memory.is_empty() {
        training::memory_plot(&memory).save(&run.folder.file("memory.svg"))?;
    }
    cx.emit(&TrainResult { summary, head_memory: memory }, |TrainResult { summary, head_memory }| {
        let mut text = summary.to_text("nats a token");
        if !head_memory.is_empty() {
            text += &training::memory_table(head_memory).to_text();
        }
        text + &format!("model in {}\n", summary.model.display())
    })
}

/// What `train` prints.
#[derive(Serialize)]
struct TrainResult {
    #[serde(flatten)]
    summary: TrainSummary,
    head_memory: Vec<HeadMemory>,
}

/// The training and the validation text, each long enough for one window.
fn read_texts(
    text: &Path,
    valid: Option<&Path>,
    recipe: &Recipe,
    tokenizer: &Tokenizer,
) -> Result<(Corpus, Corpus)> {
    let window = recipe.seq_len + 1;
    let whole = Corpus::read(text, tokenizer)?;
    let (train, held_out, places) = match valid {
        Some(path) => (whole, Corpus::read(path, tokenizer)?, [text, path].map(|p| p.display().to_string())),
        None => {
            // Both parts must hold a window; of a short text the tail that is held out grows to one.
            whole.require(2 * window, text.display())?;
            let fraction = recipe.val_fraction.max(window as f64 / whole.ids.len() as f64);
            let (train, held_out) = whole.split(fraction);
            let parts = ["the training part", "the held-out end"];
            (train, held_out, parts.map(|part| format!("{part} of {}", text.display())))
        }
    };
    train.require(window, &places[0])?;
    held_out.require(window, &places[1])?;
    Ok((train, held_out))
}

fn gla_config(recipe: &Recipe, vocab_size: usize) -> GlaLmConfig {
    GlaLmConfig {
        num_kv_heads: recipe.kv_heads,
        feature_map: recipe.feature_map,
        use_short_conv: recipe.short_conv,
        gate_logit_normalizer: recipe.tau,
        chunk: recipe.chunk,
        sub_chunk: recipe.sub_chunk,
        recompute: recipe.recompute,
        ..GlaLmConfig::new(vocab_size, recipe.d_model, recipe.layers, recipe.heads)
    }
}

/// Token ids row by row, and the bytes that the scored ones (all but each row's first) stand for, if known.
struct Rows {
    rows: Vec<Vec<u32>>,
    bytes: Option<usize>,
}

fn read_rows(source: &Source, trained: &Trained) -> Result<Rows> {
    if let Some(path) = &source.text {
        let corpus = Corpus::read(path, &trained.tokenizer)?;
        let bytes = trained.tokenizer.decode(corpus.ids.get(1..).unwrap_or(&[])).len();
        return Ok(Rows { rows: vec![corpus.ids], bytes: Some(bytes) });
    }
    let path = source.ids.as_ref().ok_or_else(|| Error::usage("--text or --ids is needed"))?;
    let (ids, [_, time]) = checkpoint::read_ids(path, trained.model.vocab_size())?;
    let rows = ids.chunks(time).map(|row| row.iter().map(|&id| id as u32).collect()).collect();
    Ok(Rows { rows, bytes: None })
}

fn run_eval(args: &EvalArgs, cx: &Context) -> Result<()> {
    let trained = checkpoint::open(&args.model, cx)?;
    let Rows { rows, bytes } = read_rows(&args.source, &trained)?;
    if !args.lengths.is_empty() {
        let scored = args.lengths.iter().copied().min().unwrap_or(1).min(256);
        let scores = match &rows[..] {
            [row] => score_context_lengths(&trained.model, row, &args.lengths, scored)?,
            _ => return Err(Error::usage("--lengths needs one text, not several rows of ids")),
        };
        return cx.emit(&scores, |scores| {
            let rows = scores.iter().map(|row| {
                format!(
                    "{:>8}  {:.4} nats  perplexity {:.3}\n",
                    row.context, row.score.nll_nats, row.score.perplexity
                )
            });
            format!(" context  loss of the last {scored} tokens\n{}", rows.collect::<String>())
        });
    }
    let window = args.window.or((args.context > 0).then_some(args.context));
    let mut nats = 0.0;
    let mut tokens = 0;
    for row in &rows {
        let score = match window {
            Some(window) => score_windows(&trained.model, row, window)?,
            None => score_carried(&trained.model, row, PIECE)?,
        };
        nats += score.nll_nats * score.tokens_scored as f64;
        tokens += score.tokens_scored;
    }
    let nll_nats = nats / tokens as f64;
    let score = Score { tokens_scored: tokens, nll_nats, perplexity: nll_nats.exp(), bits_per_byte: None };
    // A byte model's tokens are bytes, also where only ids are given.
    let bytes = bytes.or(matches!(trained.tokenizer, Tokenizer::Byte).then_some(tokens));
    let score = bytes.map_or(score, |bytes| score.over_bytes(bytes));
    cx.emit(&score, |score| {
        let bits = score.bits_per_byte.map_or(String::new(), |bits| format!(", {bits:.4} bits a byte"));
        format!(
            "{} tokens scored: {:.4} nats a token, perplexity {:.3}{bits}\n",
            score.tokens_scored, score.nll_nats, score.perplexity
        )
    })
}

fn run_logits(args: &LogitsArgs, cx: &Context) -> Result<()> {
    let trained = checkpoint::open(&args.model, cx)?;
    let Rows { rows, .. } = read_rows(&args.source, &trained)?;
    let (count, time) = (rows.len(), rows[0].len());
    let ids: Vec<i64> = rows.into_iter().flatten().map(i64::from).collect();
    let ids = Tensor::<2, Int>::from_data(TensorData::new(ids, [count, time]), &cx.device);
    let mut file = TensorFile::new();
    file.insert("logits", HostTensor::from_tensor(trained.model.forward(ids)));
    file.write(&args.out)?;
    let shape = [count, time, trained.model.vocab_size()];
    cx.emit(&json!({ "file": args.out, "logits": shape }), |_| {
        format!("logits {shape:?} in {}\n", args.out.display())
    })
}

fn run_generate(args: &GenerateArgs, cx: &Context) -> Result<()> {
    args.text.check()?;
    let Trained { model, tokenizer, .. } = checkpoint::open(&args.model, cx)?;
    args.text.run(&model, &tokenizer, cx)
}

fn run_op(args: &OpArgs, cx: &Context) -> Result<()> {
    let config = GlaOpConfig { chunk: args.chunk, sub_chunk: args.sub_chunk, recompute: false };
    config.check()?;
    let mut file = TensorFile::read(&args.input)?;
    let place = args.input.display().to_string();
    if let Some(values) = file.get("g").and_then(HostTensor::as_floats) {
        op::check_log_decays(values, &place)?;
    }
    for name in ["q", "k", "v", "g", "h0", "do", "dht"] {
        let values = file.get(name).and_then(HostTensor::as_floats).unwrap_or_default();
        if let Some(at) = values.iter().position(|x| !x.is_finite()) {
            let found = format!("element {at} of \"{name}\" is {}, must be a finite number", values[at]);
            return Err(Error::input(&place, found));
        }
    }
    let device = cx.device.clone().autodiff();
    let [q, k, v, g] = ["q", "k", "v", "g"].map(|name| file.take_float::<4>(name, &device));
    let (q, k, v, g) = (q?, k?, v?, g?);
    let [batch, heads, time, key] = q.dims();
    let value = v.dims()[3];
    if q.dims().contains(&0) || value == 0 {
        return Err(Error::input(
            &place,
            format!("\"q\" is {:?} and \"v\" {:?}: no extent may be 0", q.dims(), v.dims()),
        ));
    }
    let optional = |file: &mut TensorFile, name: &str| match file.get(name) {
        Some(_) => file.take_float::<4>(name, &device).map(Some),
        None => Ok(None),
    };
    let (h0, d_o, d_ht) =
        (optional(&mut file, "h0")?, optional(&mut file, "do")?, optional(&mut file, "dht")?);
    let (rows, outputs, states) =
        ([batch, heads, time, key], [batch, heads, time, value], [batch, heads, key, value]);
    for (name, found, expected) in [
        ("k", Some(k.dims()), rows),
        ("g", Some(g.dims()), rows),
        ("v", Some(v.dims()), outputs),
        ("h0", h0.as_ref().map(Tensor::dims), states),
        ("do", d_o.as_ref().map(Tensor::dims), outputs),
        ("dht", d_ht.as_ref().map(Tensor::dims), states),
    ] {
        if let Some(found) = found.filter(|found| *found != expected) {
            let message =
                format!("tensor \"{name}\" has shape {found:?}, expected {expected:?} to go with \"q\"");
            return Err(Error::input(&place, message));
        }
    }

    let h0 = h0.unwrap_or_else(|| op::zero_state(batch, heads, key, value, &device));
    let inputs = [q, k, v, g, h0].map(Tensor::require_grad);
    let [q, k, v, g, h0] = inputs.clone();
    let (o, ht) = match args.form {
        Form::Recurrent => op::gla_recurrent(q, k, v, g, Some(h0)),
        Form::Parallel => op::gla_parallel(q, k, v, g, Some(h0)),
        Form::Chunk => op::gla_chunk_with_state(q, k, v, g, Some(h0), config),
    };
    let mut result = TensorFile::new();
    result.insert("o", HostTensor::from_tensor(o.clone().inner()));
    result.insert("ht", HostTensor::from_tensor(ht.clone().inner()));
    if let Some(d_o) = d_o {
        let loss = (o * d_o).sum();
        let loss = match d_ht {
            Some(d_ht) => loss + (ht * d_ht).sum(),
            None => loss,
        };
        let gradients = loss.backward();
        for (name, input) in ["dq", "dk", "dv", "dg", "dh0"].into_iter().zip(&inputs) {
            let zeros = || Tensor::zeros(input.dims(), &cx.device);
            result.insert(name, HostTensor::from_tensor(input.grad(&gradients).unwrap_or_else(zeros)));
        }
    }
    let names: Vec<&str> = result.names().collect();
    for name in &names {
        let values = result.get(name).and_then(HostTensor::as_floats).unwrap_or_default();
        if values.iter().any(|x| !x.is_finite()) {
            let message = format!("\"{name}\" does not fit the range of f32");
            return Err(Error::work(message).hint("the inputs are too large; scale them down"));
        }
    }
    result.write(&args.out)?;
    cx.emit(&json!({ "file": args.out, "tensors": names }), |_| {
        format!("{} in {}\n", names.join(", "), args.out.display())
    })
}

fn run_convert(args: &ConvertArgs, cx: &Context) -> Result<()> {
    checkpoint::convert(&args.from, &args.to, args.layout == Layout::Fla, cx)?;
    cx.emit(&json!({ "model": args.to }), |_| format!("model in {}\n", args.to.display()))
}

fn run_info(args: &InfoArgs, cx: &Context) -> Result<()> {
    let trained = checkpoint::open(&args.model, cx)?;
    let state_bytes = match trained.model.initial_state(1, &cx.device) {
        LmState::Gla(state) => Some(
            4 * state
                .layers
                .iter()
                .map(|layer| {
                    let tails =
                        layer.tails.iter().flatten().map(|tail| tail.shape().num_elements()).sum::<usize>();
                    layer.state.shape().num_elements() + tails
                })
                .sum::<usize>(),
        ),
        LmState::Llama(_) | LmState::Mamba(_) => None,
    };
    // The equal-size Transformer keeps a key and a value of width d a layer and token, in f32.
    let cache = trained.config.gla().map(|config| {
        [2048usize, 8192, 32768]
            .map(|tokens| (tokens, 4 * 2 * config.num_hidden_layers * config.hidden_size * tokens))
    });
    let memory = match &args.text {
        Some(text) => training::head_memory(&trained.model, &Corpus::read(text, &trained.tokenizer)?.ids, cx),
        None => Vec::new(),
    };
    if let Some(path) = &args.prune_report {
        if memory.is_empty() {
            return Err(Error::usage(format!("a {} model has no gates", trained.config.arch().name())));
        }
        training::memory_plot(&memory).save(path)?;
    }
    let parameters = burn::module::Module::num_params(&trained.model);
    let info = json!({
        "kind": KIND,
        "arch": trained.config.arch().name(),
        "parameters": parameters,
        "weight_bytes": checkpoint::weight_bytes(&args.model)?,
        "state_bytes_per_sequence": state_bytes,
        "transformer_kv_cache_bytes": cache.map(|rows| rows.map(|(tokens, bytes)| json!({ "tokens": tokens, "bytes": bytes }))),
        "head_memory": memory,
    });
    cx.emit(&info, |_| {
        let mut text = format!("{} with {parameters} parameters\n", trained.config.arch().name());
        if let Some(bytes) = state_bytes {
            text += &format!("state of a sequence: {bytes} bytes, at any length\n");
        }
        for (tokens, bytes) in cache.into_iter().flatten() {
            text +=
                &format!("key/value cache of the equal-size Transformer at {tokens} tokens: {bytes} bytes\n");
        }
        if !memory.is_empty() {
            text += &training::memory_table(&memory).to_text();
        }
        text
    })
}
