//! Megatron: language models trained on many ranks, divided by tensors, pipeline stages and data (PTD-P).
//!
//! Source: Deepak Narayanan et al., "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM", SC 2021,
//! arXiv 2104.04473. A batch of B sequences is shared by `n = t p d` ranks:
//!
//! - **t** ranks compute every layer together ([`layers`], [`embedding`]). `Y = GELU(X A) B` with the columns of A and the
//!   rows of B divided needs one all-reduce forward and one backward, and likewise attention with its heads divided.
//! - **p** ranks have successive layers ([`stage`]), `v` chunks each. m micro-batches follow one another through them in the
//!   order of a [`schedule`]; the interleaved one idles for `(p - 1) / (v m)` of its work ([`trace`]). [`executor`] runs it.
//! - **d** ranks have the same layers and other samples; their gradients are averaged ([`optimiser`]).
//!
//! Whatever the layout, the result is that of one rank ([`model`]), but for rounding. [`perf`] tells how long an iteration
//! takes on a given cluster and searches the best division.

mod attention;
pub mod checkpoint;
mod command;
pub mod data;
mod dropout;
pub mod embedding;
pub mod executor;
mod experiment;
pub mod figures;
pub mod layers;
pub mod layout;
mod log;
pub mod model;
pub mod optimiser;
pub mod parameters;
pub mod perf;
pub mod ranks;
pub mod real;
pub mod schedule;
pub mod stage;
mod tape;
pub mod trace;
pub mod trainer;

use std::path::Path;

use clap::{CommandFactory, FromArgMatches};
use kiln_core::{Card, Context, Error, Network, Report, Result, Scale, System};

pub use embedding::{VocabParallelEmbedding, vocab_parallel_cross_entropy};
pub use executor::PipelineExecutor;
pub use layers::{ColumnParallelLinear, RowParallelLinear};
pub use layout::ParallelLayout;
pub use model::{Gpt, GptConfig};
pub use perf::{Cluster, GptShape, PerfModel, Plan, plan};
pub use ranks::Ranks;
pub use schedule::{Kind, Operation, Schedule};
pub use trace::Trace;
pub use trainer::{TrainOptions, Trainer};

/// The system, as the binary sees it.
#[derive(Debug, Clone, Copy)]
pub struct Megatron;

impl System for Megatron {
    fn card(&self) -> Card {
        Card {
            slug: checkpoint::KIND,
            family: "cluster",
            title: "Megatron",
            paper: "Deepak Narayanan et al., \"Efficient Large-Scale Language Model Training on GPU Clusters Using \
                    Megatron-LM\", arXiv 2104.04473",
            year: 2021,
            claim: "Tensor, pipeline and data parallelism together train language models on thousands of devices at half of \
                    their peak; interleaving pipeline stages gains 10 % and more.",
            purpose: "Train a language model on many ranks; choose how to divide one over a cluster",
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
        Ok(Box::new(checkpoint::Trained::open(model, cx)?))
    }
}

/// The README's example compiles and runs.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
