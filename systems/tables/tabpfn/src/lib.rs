//! TabPFN: class probabilities for small tables in one forward pass.

pub mod baselines;
pub mod boundary;
pub mod calibration;
pub mod checkpoint;
pub mod classifier;
mod command;
pub mod ensemble;
pub mod evaluate;
pub mod examples;
mod experiment;
pub mod explain;
pub mod fit;
pub mod metrics;
pub mod network;
pub mod preprocess;
pub mod prior;
pub mod results;
pub mod server;
mod trees;

use std::path::Path;

use clap::{CommandFactory, FromArgMatches};
use kiln_core::{Card, Context, Error, Network, Report, Result, Scale, System};

pub use calibration::{Calibrate, Calibration};
pub use classifier::{ClassifierOptions, TabPfnClassifier};
pub use network::{LabelledRows, TabPfn, TabPfnConfig};

/// The system, as the binary sees it.
#[derive(Debug, Clone, Copy)]
pub struct Tabpfn;

impl System for Tabpfn {
    fn card(&self) -> Card {
        Card {
            slug: checkpoint::KIND,
            family: "tables",
            title: "TabPFN",
            paper: "Noah Hollmann et al., \"TabPFN: A Transformer That Solves Small Tabular Classification Problems in a \
                    Second\", arXiv 2207.01848",
            year: 2022,
            claim: "One forward pass over a small table classifies its unlabelled rows as well as tuned boosted trees.",
            purpose: "Classify the rows of small tables without training or tuning",
        }
    }

    fn command(&self) -> clap::Command {
        command::Command::command()
    }

    fn execute(&self, args: &clap::ArgMatches, cx: &Context) -> Result<()> {
        let command = command::Command::from_arg_matches(args).map_err(|e| Error::usage(e.to_string()))?;
        command.run(cx)
    }

    fn experiment(&self, scale: Scale, cx: &Context) -> Result<Report> {
        experiment::run(self.card(), scale, cx)
    }

    fn network(&self, model: &Path, cx: &Context) -> Result<Box<dyn Network>> {
        Ok(Box::new(checkpoint::Captured::open(model, cx)?))
    }
}

/// The README's example compiles and runs.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
