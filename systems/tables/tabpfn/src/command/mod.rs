//! The verbs of `kiln tabpfn`.

mod fit_prior;

use clap::{Parser, Subcommand, ValueEnum};
use kiln_core::{Context, Result};
use serde::{Deserialize, Serialize};

/// `kiln tabpfn …`
#[derive(Debug, Parser)]
#[command(name = "tabpfn", about = "Class probabilities for small tables in one forward pass")]
pub struct Command {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Train a network on synthetic tables
    #[command(after_help = "Examples:
  kiln tabpfn fit-prior --minutes 60 --out my-model/
  kiln tabpfn fit-prior --emsize 64 --layers 3 --max-features 20 --steps 2000 --out small/
  kiln tabpfn fit-prior --resume my-model/      after Ctrl-C or a crash")]
    FitPrior(fit_prior::FitPriorArgs),
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
    fn causal_share(self) -> f64 {
        match self {
            Self::Scm => 1.0,
            Self::Bnn => 0.0,
            Self::Mix => 0.5,
        }
    }
}

impl Command {
    /// Runs the verb.
    ///
    /// # Errors
    /// Whatever the verb's work runs into.
    pub fn run(self, cx: &Context) -> Result<()> {
        match self.verb {
            Verb::FitPrior(args) => fit_prior::run(args, cx),
        }
    }
}
