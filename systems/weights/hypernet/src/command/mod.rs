//! The verbs of `kiln hypernet`.

mod add_task;
mod app;
mod generate;
mod predict;
mod study;
mod train;

use clap::{Parser, Subcommand};
use kiln_core::{Context, Result};

use add_task::AddTaskArgs;
use app::{AppArgs, CompareArgs};
use generate::GenerateArgs;
use predict::{EvalArgs, PredictArgs};
use study::{AdviseArgs, ForwardArgs, TableArgs};
use train::TrainArgs;

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
    Train(Box<TrainArgs>),
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
  kiln hypernet app causal --data trial.csv --treatment drug --outcome days --samples 50 --out effects.csv")]
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

impl Command {
    /// Runs the verb.
    ///
    /// # Errors
    /// Whatever the verb's work runs into.
    pub fn run(self, cx: &Context) -> Result<()> {
        match self.verb {
            Verb::Train(args) => train::run(&args, cx),
            Verb::Predict(args) => predict::predict(&args, cx),
            Verb::Eval(args) => predict::eval(&args, cx),
            Verb::Generate(args) => generate::run(&args, cx),
            Verb::AddTask(args) => add_task::run(&args, cx),
            Verb::Compare(args) => app::run_compare(&args, cx),
            Verb::App(args) => args.run(cx),
            Verb::Advise(args) => study::run_advise(&args, cx),
            Verb::Table(args) => study::run_table(&args, cx),
            Verb::Forward(args) => study::run_forward(&args, cx),
        }
    }
}
