//! `kiln megatron train`

use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;
use kiln_cluster::{ClusterArgs, ClusterError, Communicator, Op};
use kiln_core::{Context, Error, ModelFolder, Result, write_atomic};
use kiln_data::Tokenizer;
use kiln_nn::{Decay, Schedule as LrSchedule};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::checkpoint::{self, KIND, Whole};
use crate::data::{Tokens, make_tokenizer, read_samples, read_text};
use crate::layout::ParallelLayout;
use crate::log::{Log, LogRow};
use crate::model::GptConfig;
use crate::optimiser::AdamW;
use crate::ranks::Ranks;
use crate::schedule::Kind;
use crate::stage::Recompute;
use crate::trainer::{BUCKET_BYTES, TrainOptions, Trainer};

#[derive(Debug, Args)]
pub struct TrainArgs {
    /// Text file, folder of text files, .jsonl file, or .npy array of token ids
    #[arg(long, required_unless_present = "tokens")]
    data: Option<PathBuf>,
    /// .npy array [steps, batch, seq + 1] of token ids, used in order
    #[arg(long, conflicts_with = "data")]
    tokens: Option<PathBuf>,
    /// Field of a .jsonl file that holds the text
    #[arg(long, default_value = "text")]
    text_field: String,
    /// bytes, char, or the path of a tokenizer.json
    #[arg(long, default_value = "bytes")]
    tokenizer: String,
    /// Token ids there are [default: those of the tokenizer]
    #[arg(long)]
    vocab: Option<usize>,
    /// Folder for the model
    #[arg(long)]
    out: PathBuf,
    /// Go on at the last finished checkpoint in --out
    #[arg(long)]
    resume: bool,
    /// Model folder with weights to start from
    #[arg(long, value_name = "DIR")]
    init: Option<PathBuf>,
    /// Layers [default: 4]
    #[arg(long)]
    layers: Option<usize>,
    /// Width [default: 128]
    #[arg(long)]
    hidden: Option<usize>,
    /// Attention heads [default: 4]
    #[arg(long)]
    heads: Option<usize>,
    /// Probability that an activation is dropped
    #[arg(long, default_value_t = 0.1)]
    dropout: f64,
    #[command(flatten)]
    division: DivisionArgs,
    #[command(flatten)]
    recipe: Recipe,
    /// Steps in all
    #[arg(long, default_value_t = 500)]
    steps: usize,
    /// Steps between checkpoints: what the loss of a rank can cost at most
    #[arg(long, default_value_t = 100)]
    save_every: usize,
    #[command(flatten)]
    cluster: ClusterArgs,
}

/// How the work is divided. Of these nothing changes the result but for rounding.
#[derive(Debug, Args)]
#[command(next_help_heading = "Division of the work")]
struct DivisionArgs {
    /// Ranks that share every layer
    #[arg(long, default_value_t = 1)]
    tensor: usize,
    /// Ranks that have layers one after another
    #[arg(long, default_value_t = 1)]
    pipeline: usize,
    /// Ranks that have the same layers and other samples
    #[arg(long, default_value_t = 1)]
    data_parallel: usize,
    /// Chunks of layers on each pipeline rank; more than 1 need --schedule interleaved
    #[arg(long, default_value_t = 1)]
    chunks: usize,
    /// Layers of each stage, where they are not all alike: 3,4,4,3
    #[arg(long, value_delimiter = ',')]
    stage_layers: Option<Vec<usize>>,
    /// Samples that go through the pipeline together
    #[arg(long, default_value_t = 4)]
    micro_batch: usize,
    /// Order of the pipeline's passes
    #[arg(long, value_enum, default_value = "1f1b")]
    schedule: Kind,
    /// What is computed again in the backward pass instead of kept
    #[arg(long, value_enum, default_value = "none")]
    recompute: Recompute,
    /// Each tensor rank sends its share of an activation to the next stage, which gathers them
    #[arg(long, action = clap::ArgAction::Set, default_value_t = true, value_name = "true|false")]
    scatter_gather: bool,
    /// Divide the optimiser's state over the data-parallel ranks
    #[arg(long, action = clap::ArgAction::Set, default_value_t = false, value_name = "true|false")]
    distributed_optimizer: bool,
}

/// What decides the result besides data, network and seed.
#[derive(Debug, Clone, Args, PartialEq, Serialize, Deserialize)]
#[command(next_help_heading = "Training")]
struct Recipe {
    /// Samples of a step
    #[arg(long, default_value_t = 32)]
    batch: usize,
    /// Tokens of a sample
    #[arg(long, default_value_t = 128)]
    seq: usize,
    /// Highest learning rate
    #[arg(long, default_value_t = 3e-4)]
    lr: f64,
    /// Steps over which the learning rate rises
    #[arg(long, default_value_t = 20)]
    warmup: usize,
    /// Learning rate at the end
    #[arg(long, default_value_t = 3e-5)]
    min_lr: f64,
    /// Keep the learning rate as it is
    #[arg(long)]
    constant_lr: bool,
    /// Decoupled weight decay of matrices
    #[arg(long, default_value_t = 0.1)]
    weight_decay: f64,
    /// Largest norm of the gradient; 0 does not clip
    #[arg(long, default_value_t = 1.0)]
    clip: f64,
    /// How much of the mean gradient a step keeps
    #[arg(long, default_value_t = 0.9)]
    beta1: f64,
    /// How much of the mean squared gradient a step keeps
    #[arg(long, default_value_t = 0.95)]
    beta2: f64,
    /// Added to the root of the mean squared gradient
    #[arg(long, default_value_t = 1e-8)]
    eps: f64,
    /// Share of a target's probability that is spread over all tokens
    #[arg(long, default_value_t = 0.0)]
    label_smoothing: f64,
    /// Take the samples in the text's order
    #[arg(long)]
    no_shuffle: bool,
}

/// What a run leaves beside its model, to be compared on resuming.
#[derive(Debug, Serialize, Deserialize)]
struct RunFile {
    seed: u64,
    steps: usize,
    #[serde(flatten)]
    recipe: Recipe,
}

/// What `train` prints.
#[derive(Debug, Clone, Serialize)]
struct Summary {
    model: PathBuf,
    parameters: usize,
    ranks: usize,
    steps: usize,
    first_loss: f64,
    last_loss: f64,
    seconds: f64,
    tokens_per_s: f64,
    bubble: f64,
    bubble_formula: f64,
    /// Pipeline rank and chunk whose passes took longest, and seconds of a forward and a backward pass.
    slowest_stage: Option<(usize, usize, f64)>,
}

impl TrainArgs {
    pub fn run(&self, cx: &Context) -> Result<()> {
        let folder = ModelFolder::new(&self.out);
        let (whole, tokens) = self.prepare(&folder, cx)?;
        let layout = self.layout();
        let options = self.options(cx.seed);
        options.check(&whole.config, &layout)?;
        self.check_rates()?;
        let whole = match self.resume {
            true => self.resumed(whole, &folder, cx)?,
            false => whole,
        };
        let results = self
            .cluster
            .run(layout.ranks(), cx, |comm| self.train_rank(&whole, &tokens, &layout, &options, comm, cx));
        let results = results.map_err(|error| self.with_way_on(error))?;
        // Only the first rank speaks, wherever it lives.
        let Some(mut summary) = results.into_iter().flatten().next() else { return Ok(()) };
        let last = checkpoint::finished(&self.out)?.pop();
        let last = last.ok_or_else(|| Error::work("the run has left no checkpoint"))?;
        Whole::read(&last)?.write_model(&folder)?;
        summary.model = self.out.clone();
        cx.emit(&summary, |summary| summary.to_text())
    }

    /// A run that has lost a rank can go on where it has a checkpoint.
    fn with_way_on(&self, error: Error) -> Error {
        let lost = matches!(
            ClusterError::of(&error),
            Some(ClusterError::PeerLost { .. } | ClusterError::Timeout { .. } | ClusterError::Aborted { .. })
        );
        match checkpoint::finished(&self.out) {
            Ok(finished) if lost && !finished.is_empty() => {
                error.hint("the same line with --resume goes on at the last checkpoint")
            }
            _ => error,
        }
    }

    fn layout(&self) -> ParallelLayout {
        let division = &self.division;
        ParallelLayout {
            tensor: division.tensor,
            pipeline: division.pipeline,
            data: division.data_parallel,
            chunks: division.chunks,
            stage_layers: division.stage_layers.clone(),
        }
    }

    fn options(&self, seed: u64) -> TrainOptions {
        let (division, recipe) = (&self.division, &self.recipe);
        TrainOptions {
            batch: recipe.batch,
            micro_batch: division.micro_batch,
            seq: recipe.seq,
            schedule: division.schedule,
            recompute: division.recompute,
            scatter_gather: division.scatter_gather,
            distributed_optimiser: division.distributed_optimizer,
            bucket_bytes: BUCKET_BYTES,
            label_smoothing: recipe.label_smoothing,
            optimiser: AdamW {
                betas: (recipe.beta1, recipe.beta2),
                epsilon: recipe.eps,
                weight_decay: recipe.weight_decay,
                clip: recipe.clip,
            },
            seed,
        }
    }

    fn check_rates(&self) -> Result<()> {
        if self.steps == 0 || self.save_every == 0 {
            return Err(Error::usage("--steps and --save-every must be at least 1"));
        }
        let Recipe { lr, min_lr, .. } = self.recipe;
        if !(lr.is_finite() && lr > 0.0) {
            return Err(Error::usage(format!("--lr is {lr}, but must be above 0")));
        }
        if !self.recipe.constant_lr && !(0.0..=lr).contains(&min_lr) {
            return Err(Error::usage(format!("--min-lr {min_lr} is not between 0 and --lr {lr}"))
                .hint("give a lower --min-lr, or --constant-lr"));
        }
        Ok(())
    }

    /// The network to begin with and the tokens.
    fn prepare(&self, folder: &ModelFolder, cx: &Context) -> Result<(Whole, Tokens)> {
        let start = match &self.init {
            Some(init) => Some(Whole::read(init)?),
            None => None,
        };
        let data = self.data.as_deref();
        let (tokenizer, name) = match (&start, &self.init) {
            // A network knows the tokens that it was trained on.
            (Some(start), Some(init)) => {
                let tokenizer = Tokenizer::open(&ModelFolder::new(init))?;
                folder.create()?;
                tokenizer.save(folder)?;
                (tokenizer, start.config.tokenizer.clone())
            }
            _ if self.resume && self.tokenizer == "char" => (Tokenizer::open(folder)?, "char".into()),
            _ => make_tokenizer(&self.tokenizer, data, &self.text_field, folder)?,
        };
        let (tokens, place) = match (&self.tokens, data) {
            (Some(path), _) => (read_samples(path)?, path),
            (None, Some(path)) => {
                let ids = read_text(path, &self.text_field, &tokenizer)?;
                (
                    Tokens::Text { ids, shuffle: !self.recipe.no_shuffle },
                    self.data.as_ref().unwrap_or(&self.out),
                )
            }
            (None, None) => return Err(Error::usage("--data or --tokens is needed")),
        };
        let whole = match start {
            Some(mut start) => {
                let config = &start.config;
                for (option, asked, found) in [
                    ("--layers", self.layers, config.layers),
                    ("--hidden", self.hidden, config.hidden),
                    ("--heads", self.heads, config.heads),
                    ("--vocab", self.vocab, config.vocab),
                ] {
                    if let Some(asked) = asked.filter(|&asked| asked != found) {
                        return Err(Error::usage(format!(
                            "{option} is {asked}, but the network of --init has {found}"
                        ))
                        .hint(format!("leave {option} out")));
                    }
                }
                start.config.dropout = self.dropout;
                Whole { progress: None, moments: None, layout: None, ..start }
            }
            None => {
                let vocab = self.vocab.unwrap_or(tokenizer.vocab_size());
                let config = GptConfig {
                    dropout: self.dropout,
                    tokenizer: name,
                    ..GptConfig::new(
                        self.layers.unwrap_or(4),
                        self.hidden.unwrap_or(128),
                        self.heads.unwrap_or(4),
                        vocab,
                    )
                    .with_max_seq(self.recipe.seq)
                };
                config.check()?;
                Whole::initial(&config, cx.seed)
            }
        };
        tokens.check(
            self.steps,
            (self.recipe.batch, self.recipe.seq),
            whole.config.vocab,
            &place.display().to_string(),
        )?;
        Ok((whole, tokens))
    }

    /// The state of the last finished checkpoint, which must be of the same run.
    fn resumed(&self, asked: Whole, folder: &ModelFolder, cx: &Context) -> Result<Whole> {
        let last = checkpoint::finished(&self.out)?.pop().ok_or_else(|| {
            Error::input(self.out.display(), "holds no finished checkpoint")
                .hint("leave out --resume to begin anew")
        })?;
        let found = Whole::read(&last)?;
        let as_value = |config: &GptConfig| serde_json::to_value(config).unwrap_or_default();
        same(&as_value(&found.config), &as_value(&asked.config), &last, &[])?;
        let path = folder.file(RUN_FILE);
        let bytes = std::fs::read(&path).map_err(Error::io("read", &path))?;
        let before: Value = serde_json::from_slice(&bytes)
            .map_err(|e| Error::input(path.display(), "is not valid JSON").caused_by(e))?;
        let now = serde_json::to_value(self.run_file(cx.seed)).unwrap_or_default();
        same(&before, &now, &path, &["steps"])?;
        let step = found.progress.map_or(0, |(step, ..)| step);
        if step > self.steps {
            return Err(Error::usage(format!(
                "the checkpoint is of step {step}, beyond --steps {}",
                self.steps
            )));
        }
        cx.note(format!("going on at step {step}, from {}", last.display()));
        Ok(found)
    }

    fn run_file(&self, seed: u64) -> RunFile {
        RunFile { seed, steps: self.steps, recipe: self.recipe.clone() }
    }

    fn learning_rate(&self, step: usize) -> f64 {
        let recipe = &self.recipe;
        if recipe.constant_lr {
            return recipe.lr;
        }
        let schedule = LrSchedule {
            peak: recipe.lr,
            warmup: recipe.warmup,
            steps: self.steps,
            min_ratio: recipe.min_lr / recipe.lr,
            decay: Decay::Cosine,
        };
        schedule.at(step)
    }

    /// What one rank does; the first one returns what is printed.
    fn train_rank(
        &self,
        whole: &Whole,
        tokens: &Tokens,
        layout: &ParallelLayout,
        options: &TrainOptions,
        comm: Communicator,
        cx: &Context,
    ) -> Result<Option<Summary>> {
        let ranks = Ranks::new(layout, comm)?;
        let mut trainer = Trainer::<f32>::new(&whole.config, options, ranks, |name| whole.weight(name), cx)?;
        whole.restore(&mut trainer)?;
        let first = trainer.ranks.world.rank() == 0;
        let mut log = None;
        if first {
            log = Some(self.begin_log(whole, trainer.step, cx)?);
        }
        let bar = first.then(|| cx.progress(self.steps as u64, "training"));
        if let Some(bar) = &bar {
            bar.set(trainer.step as u64);
        }
        let begun = Instant::now();
        let (begun_at, tokens_a_step) = (trainer.step, options.batch * options.seq);
        let mut first_loss = f64::NAN;
        let mut last = None;
        while trainer.step < self.steps {
            if stop_asked(&trainer, cx)? {
                checkpoint::save(&trainer, &self.out)?;
                return Err(Error::interrupted(format!("stopped after step {}", trainer.step))
                    .hint("the same line with --resume goes on"));
            }
            let step = trainer.step;
            let rows = tokens.batch(step, (options.batch, options.seq), options.seed);
            let lr = self.learning_rate(step);
            let result = trainer.train_step(&rows, lr)?;
            if first_loss.is_nan() {
                first_loss = result.loss;
            }
            if let Some(log) = &mut log {
                let operations = whole.config.operations(tokens_a_step, options.seq);
                log.push(LogRow {
                    step: trainer.step,
                    loss: result.loss,
                    lr,
                    grad_norm: result.grad_norm,
                    tokens_per_s: tokens_a_step as f64 / result.seconds,
                    tflops: operations / result.seconds / layout.ranks() as f64 / 1e12,
                    bubble: result.bubble,
                })?;
            }
            if let Some(bar) = &bar {
                bar.inc(1);
                bar.message(format!("loss {:.3}", result.loss));
            }
            if trainer.step.is_multiple_of(self.save_every) || trainer.step == self.steps {
                checkpoint::save(&trainer, &self.out)?;
            }
            last = Some(result);
        }
        let Some(last) = last else {
            return Err(
                Error::usage(format!("all {} steps are done already", self.steps)).hint("raise --steps")
            );
        };
        let seconds = begun.elapsed().as_secs_f64();
        let trace = trainer.gather_trace(&last.trace)?;
        if !first {
            return Ok(None);
        }
        let schedule = *trainer.schedule();
        let title = format!("Step {} of {schedule}", self.steps);
        write_atomic(&self.out.join("schedule.svg"), trace.to_svg(&title).as_bytes())?;
        Ok(Some(Summary {
            model: self.out.clone(),
            parameters: whole.config.parameters(),
            ranks: layout.ranks(),
            steps: self.steps,
            first_loss,
            last_loss: last.loss,
            seconds,
            tokens_per_s: (tokens_a_step * (self.steps - begun_at)) as f64 / seconds,
            bubble: trace.bubble(),
            bubble_formula: schedule.bubble(),
            slowest_stage: trace.slowest_stage().filter(|_| schedule.last_stage() > 0),
        }))
    }

    /// Prepares the model folder.
    fn begin_log(&self, whole: &Whole, step: usize, cx: &Context) -> Result<Log> {
        let folder = ModelFolder::new(&self.out);
        folder.create()?;
        if step == 0 {
            // Checkpoints of an earlier run in this folder are not this one's.
            let old = self.out.join("checkpoints");
            if old.exists() {
                std::fs::remove_dir_all(&old).map_err(Error::io("remove", &old))?;
            }
        }
        folder.save_config(KIND, &whole.config)?;
        let run = serde_json::to_vec_pretty(&self.run_file(cx.seed))
            .map_err(|e| Error::work("cannot write the options as JSON").caused_by(e))?;
        write_atomic(&folder.file(RUN_FILE), &run)?;
        Log::begin(&folder.file("log.csv"), step)
    }
}

/// The options of a run, in its model folder.
const RUN_FILE: &str = "train.json";

/// Whether the user asked any rank to stop.
fn stop_asked(trainer: &Trainer<f32>, cx: &Context) -> Result<bool> {
    let mut asked = [i32::from(cx.interrupted())];
    if trainer.ranks.world.size() > 1 {
        trainer.ranks.world.all_reduce(&mut asked, Op::Max)?;
    }
    Ok(asked[0] > 0)
}

/// Makes sure that what is asked for is what a run began with.
fn same(before: &Value, now: &Value, place: &Path, may_change: &[&str]) -> Result<()> {
    for (key, now) in now.as_object().into_iter().flatten() {
        let before = before.get(key).unwrap_or(&Value::Null);
        if before != now && !may_change.contains(&key.as_str()) {
            return Err(Error::usage(format!(
                "the run in {} has {} {before}, but {now} is asked for",
                place.display(),
                key.replace('_', " ")
            ))
            .hint("only --steps and the division of the work may change on --resume"));
        }
    }
    Ok(())
}

impl Summary {
    fn to_text(&self) -> String {
        let mut text = format!(
            "{} parameters on {} rank{}, {} steps in {:.1} s, {:.0} tokens a second\nloss {:.4} at first, {:.4} at last (nats a token)\n",
            self.parameters,
            self.ranks,
            if self.ranks == 1 { "" } else { "s" },
            self.steps,
            self.seconds,
            self.tokens_per_s,
            self.first_loss,
            self.last_loss
        );
        if let Some((rank, chunk, seconds)) = self.slowest_stage {
            text += &format!(
                "bubble {:.1} % of the work (formula {:.1} %); slowest: pipeline rank {rank}, chunk {chunk}, {:.2} ms a micro-batch\n",
                100.0 * self.bubble,
                100.0 * self.bubble_formula,
                1e3 * seconds
            );
        }
        text + &format!("model in {}\n", self.model.display())
    }
}
