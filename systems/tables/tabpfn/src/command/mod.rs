//! The verbs of `kiln tabpfn`.

mod evaluate;
mod fit_prior;
mod forward;
mod graph_drawing;
mod insight;
mod predict;
mod sample_prior;
mod serve;
mod tables;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use kiln_core::{Context, Result, System};
use serde::{Deserialize, Serialize};

use crate::checkpoint;
use crate::network::TabPfn;
use crate::prior::PriorBag;

/// `kiln tabpfn …`
#[derive(Debug, Parser)]
#[command(name = "tabpfn", about = "Class probabilities for small tables in one forward pass")]
#[command(after_help = "Examples:
  kiln tabpfn predict --train a.csv --test b.csv --target y --out predictions.csv
  kiln tabpfn eval --data a.csv --target y
  kiln tabpfn serve --train a.csv --target y")]
pub struct Command {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Predict the classes of rows from labelled ones
    #[command(after_help = "Examples:
  kiln tabpfn predict --train a.csv --test b.csv --target y --out predictions.csv
  kiln tabpfn predict --train a.csv --test b.csv --target y --members 3      a quick look
  kiln tabpfn predict --train arrays.npz --out predictions.csv               X_train, y_train, X_test")]
    Predict(predict::PredictArgs),
    /// Compare with other classifiers on repeated splits of a table
    #[command(after_help = "Examples:
  kiln tabpfn eval --data a.csv --target y
  kiln tabpfn eval --data a.csv --target y --baselines gbdt --tune 20 --reliability curve.svg")]
    Eval(evaluate::EvalArgs),
    /// Compare with other classifiers on every table of a folder
    #[command(after_help = "Examples:
  kiln tabpfn bench --folder tables/ --members 16 --out results.csv
  kiln tabpfn bench --folder tables/ --baselines knn,gbdt --markdown")]
    Bench(evaluate::BenchArgs),
    /// Tell which columns matter, and how predictions move with them
    #[command(after_help = "Examples:
  kiln tabpfn explain --train a.csv --target y --members 4 --out why/
  kiln tabpfn explain --train a.csv --test b.csv --target y --columns age,income --out why/")]
    Explain(insight::ExplainArgs),
    /// Draw decision regions over two columns
    #[command(after_help = "Examples:
  kiln tabpfn boundary --train a.csv --target y --x c1 --y c2 --out regions.svg")]
    Boundary(insight::BoundaryArgs),
    /// Predict in the browser: paste or upload a table
    #[command(after_help = "Examples:
  kiln tabpfn serve --train a.csv --target y --port 8081")]
    Serve(serve::ServeArgs),
    /// Write what the network sees of a table
    #[command(after_help = "Examples:
  kiln tabpfn preprocess --train a.csv --test b.csv --target y --mode power --out seen.npz")]
    Preprocess(predict::PreprocessArgs),
    /// Train a network on synthetic tables
    #[command(after_help = "Examples:
  kiln tabpfn fit-prior --minutes 60 --out my-model/
  kiln tabpfn fit-prior --emsize 64 --layers 3 --max-features 20 --steps 2000 --out small/
  kiln tabpfn fit-prior --resume my-model/      after Ctrl-C or a crash
  kiln tabpfn fit-prior --init-from my-model/ --lr 5e-4 --steps 5000 --out further/")]
    FitPrior(fit_prior::FitPriorArgs),
    /// Write synthetic tables, as the network is trained on them
    #[command(after_help = "Examples:
  kiln tabpfn sample-prior --n 16 --rows 200 --out tables/ --plot
  kiln tabpfn sample-prior --prior scm --max-features 8 --max-classes 3 --out tables/")]
    SamplePrior(sample_prior::SamplePriorArgs),
    /// Run the network on prepared tensors
    #[command(after_help = "Examples:
  kiln tabpfn forward --model my-model/ --in tables.safetensors --out logits.safetensors")]
    Forward(forward::ForwardArgs),
    /// Make a model folder of a published checkpoint
    #[command(after_help = "Examples:
  kiln tabpfn import --checkpoint official.safetensors --out official/
  kiln tabpfn predict --model official/ --train a.csv --test b.csv --target y")]
    Import(forward::ImportArgs),
}

/// Which network.
#[derive(Debug, Args)]
struct ModelArgs {
    /// Model folder; by default the network that comes with Kiln
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
}

impl ModelArgs {
    fn open(&self, cx: &Context) -> Result<TabPfn> {
        match &self.model {
            Some(path) => checkpoint::open(path, cx),
            None => checkpoint::built_in(cx),
        }
    }
}

/// Where synthetic data sets come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Prior {
    /// Structural causal models
    Scm,
    /// Bayesian neural networks
    Bnn,
    /// Both, in equal shares
    Mix,
}

impl Prior {
    fn bag(self, region_share: f64) -> PriorBag {
        let causal_share = match self {
            Self::Scm => 1.0,
            Self::Bnn => 0.0,
            Self::Mix => 0.5,
        };
        PriorBag { causal_share, region_share }
    }
}

impl Command {
    /// Runs the verb.
    ///
    /// # Errors
    /// Whatever the verb's work runs into.
    pub fn run(self, cx: &Context) -> Result<()> {
        match self.verb {
            Verb::Predict(args) => predict::predict(&args, cx),
            Verb::Eval(args) => evaluate::eval(&args, cx),
            Verb::Bench(args) => evaluate::bench(&args, crate::Tabpfn.card(), cx),
            Verb::Explain(args) => insight::explain(&args, cx),
            Verb::Boundary(args) => insight::boundary(&args, cx),
            Verb::Serve(args) => serve::run(&args, cx),
            Verb::Preprocess(args) => predict::preprocess(&args, cx),
            Verb::FitPrior(args) => fit_prior::run(args, cx),
            Verb::SamplePrior(args) => sample_prior::run(&args, cx),
            Verb::Forward(args) => forward::forward(&args, cx),
            Verb::Import(args) => forward::import(&args, cx),
        }
    }
}
