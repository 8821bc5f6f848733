//! `kiln tabpfn fit-prior`

use std::path::PathBuf;
use std::time::{Duration, Instant};

use burn::module::Module;
use clap::Args;
use kiln_core::{Context, Error, Result};
use kiln_nn::{TrainConfig, TrainRun, initialise, train};
use serde::{Deserialize, Serialize};

use crate::checkpoint::{self, KIND};
use crate::fit::{FitConfig, PriorFitting};
use crate::network::{TabPfn, TabPfnConfig};

/// The command whose runs a model folder keeps.
const FIT_PRIOR: &str = "tabpfn fit-prior";
/// Steps by which the time of a step is told.
const TIMED_STEPS: usize = 24;

#[derive(Debug, Args)]
pub(super) struct FitPriorArgs {
    /// Model folder to write
    #[arg(long, required_unless_present = "resume")]
    out: Option<PathBuf>,
    /// Continue the run in this folder
    #[arg(long, value_name = "DIR", conflicts_with_all = ["out", "init_from"])]
    resume: Option<PathBuf>,
    /// Start from the weights of this network, whose sizes then hold
    #[arg(long, value_name = "DIR", conflicts_with_all = ["emsize", "layers", "heads", "hidden", "max_features", "max_classes"])]
    init_from: Option<PathBuf>,
    /// Steps of the whole run
    #[arg(long)]
    steps: Option<usize>,
    /// As many steps as fit into this time, by the time that the first take
    #[arg(long, conflicts_with_all = ["steps", "resume"])]
    minutes: Option<f64>,
    #[command(flatten)]
    recipe: Recipe,
}

/// What besides steps and seed decides the outcome.
#[derive(Debug, Clone, Args, Serialize, Deserialize)]
struct Recipe {
    /// Width of the residual stream
    #[arg(long, default_value_t = 128, conflicts_with = "resume")]
    emsize: usize,
    /// Encoder layers
    #[arg(long, default_value_t = 6, conflicts_with = "resume")]
    layers: usize,
    /// Attention heads
    #[arg(long, default_value_t = 4, conflicts_with = "resume")]
    heads: usize,
    /// Width of the feed-forward part
    #[arg(long, default_value_t = 256, conflicts_with = "resume")]
    hidden: usize,
    /// Most columns of a table
    #[arg(long, default_value_t = 100, conflicts_with = "resume")]
    max_features: usize,
    /// Most classes of a table
    #[arg(long, default_value_t = 10, conflicts_with = "resume")]
    max_classes: usize,
    /// Rows of a data set; some are twice and four times as long
    #[arg(long, default_value_t = 256, conflicts_with = "resume")]
    rows: usize,
    /// Data sets of a step
    #[arg(long, default_value_t = 8, conflicts_with = "resume")]
    batch: usize,
    /// Where data sets come from
    #[arg(long, value_enum, default_value = "mix", conflicts_with = "resume")]
    prior: super::Prior,
    /// Share of data sets whose classes are regions in a space of several values, not slices of one
    #[arg(long, value_name = "SHARE", default_value_t = 0.25, conflicts_with = "resume")]
    #[serde(default)]
    regions: f64,
    /// Highest learning rate
    #[arg(long, default_value_t = 1e-3, conflicts_with = "resume")]
    lr: f64,
    /// Share of the steps over which the learning rate rises
    #[arg(long, default_value_t = 0.05, conflicts_with = "resume")]
    warmup: f64,
    /// Steps between validations
    #[arg(long, default_value_t = 250, conflicts_with = "resume")]
    eval_every: usize,
    /// Steps between checkpoints: what a crash can cost at most
    #[arg(long, default_value_t = 250, conflicts_with = "resume")]
    checkpoint_every: usize,
}

impl Recipe {
    fn network(&self) -> TabPfnConfig {
        TabPfnConfig {
            max_features: self.max_features,
            max_classes: self.max_classes,
            emsize: self.emsize,
            layers: self.layers,
            heads: self.heads,
            hidden: self.hidden,
        }
    }

    fn take_sizes(&mut self, network: &TabPfnConfig) {
        let TabPfnConfig { max_features, max_classes, emsize, layers, heads, hidden } = *network;
        *self = Self { max_features, max_classes, emsize, layers, heads, hidden, ..*self };
    }

    fn fit(&self) -> FitConfig {
        FitConfig { rows: self.rows, batch: self.batch, prior: self.prior.bag(self.regions) }
    }

    fn training(&self, steps: usize) -> TrainConfig {
        TrainConfig {
            steps,
            lr: self.lr,
            warmup: (self.warmup * steps as f64).round() as usize,
            min_lr_ratio: 0.0,
            weight_decay: 0.0,
            eval_every: self.eval_every,
            checkpoint_every: self.checkpoint_every,
            ..TrainConfig::default()
        }
    }

    /// Draws the network's first parameters.
    fn initial(&self, cx: &Context) -> TabPfn {
        initialise(&cx.device, &mut cx.rng("init", 0), |device| self.network().init(device))
    }

    /// How many steps fit into `time`, by the time that a few take.
    fn steps_within(&self, time: Duration, cx: &Context) -> Result<usize> {
        let config = TrainConfig { eval_every: 0, ..self.training(TIMED_STEPS) };
        let mut fitting = PriorFitting::new(self.fit(), self.network(), cx);
        let begun = Instant::now();
        train(self.initial(cx), &mut fitting, &config, None, false, cx)?;
        let step = begun.elapsed().div_f64(TIMED_STEPS as f64);
        Ok(((time.as_secs_f64() / step.as_secs_f64()) as usize).max(1))
    }
}

/// Trains a network on synthetic tables.
pub(super) fn run(args: FitPriorArgs, cx: &Context) -> Result<()> {
    let mut recipe = args.recipe;
    let start = args.init_from.as_deref().map(|folder| checkpoint::open(folder, cx)).transpose()?;
    if let Some(model) = &start {
        recipe.take_sizes(model.config());
    }
    recipe.network().check()?;
    recipe.fit().check()?;
    let run = match (&args.resume, &args.out) {
        (Some(folder), _) => TrainRun::resume(FIT_PRIOR, folder, args.steps)?,
        (None, Some(out)) => {
            let steps = match args.minutes {
                Some(minutes) if !(minutes > 0.0 && minutes < 1e6) => {
                    return Err(Error::usage(format!("--minutes {minutes} is no time to train for")));
                }
                Some(minutes) => recipe.steps_within(Duration::from_secs_f64(60.0 * minutes), cx)?,
                None => args.steps.unwrap_or(10_000),
            };
            TrainRun::begin(FIT_PRIOR, out, steps, recipe, cx)
        }
        (None, None) => return Err(Error::usage("--out or --resume is needed")),
    };
    let cx = &run.context(cx);
    let (recipe, config) = (&run.recipe, run.recipe.training(run.steps));
    config.check()?;
    run.save(|folder| folder.save_config(KIND, &recipe.network()))?;
    let model = start.unwrap_or_else(|| recipe.initial(cx));
    cx.note(format!("{} parameters, {} steps", model.num_params(), run.steps));
    let fitting = PriorFitting::new(recipe.fit(), recipe.network(), cx);
    let mut fitting = fitting.watching(run.folder.file("tables.csv"))?;
    let trained = run.train(model, &mut fitting, &config, "", cx)?;
    // Validation is noisier than what the last steps gain: the last weights are kept, not the luckiest.
    checkpoint::save(&trained.last, &run.folder)?;
    let summary = run.finish(&trained, "nats per row")?;
    cx.emit(&summary, |summary| {
        format!("{}model in {}\n", summary.to_text("nats a row"), summary.model.display())
    })
}
