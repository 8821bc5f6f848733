//! OneFlow: a network written for one device, on many: global tensors, automatic parallelism, and actors.
//!
//! Source: Jinhui Yuan et al., "OneFlow: Redesign the Distributed Deep Learning Framework from Scratch", 2021, arXiv 2110.15032.
//!
//! - A **global tensor** lies on a mesh of devices; on every axis of the mesh it is split, broadcast or partial ([`sbp`], §3.1).
//!   Every kind of operation has its legal signatures, from the forms of its operands to those of its results ([`signature`]).
//! - **Boxing** is what a tensor needs to get from one form to another ([`boxing`], table 2), by collectives ([`exchange`]).
//! - The [`compile`]r takes a **logical** [`graph`], chooses a signature for every operation such that few bytes move
//!   ([`select`], §3.3), inserts the boxing, and writes the [`physical`] graph: what every device does ([`local`]).
//! - **[`actor`]s** run it (§4): an operation acts when its inputs have come and a register for its output is free, so that
//!   memory is bounded before anything runs, and communication goes on beside computation. [`execute`] binds them to tensors.
//!
//! - A [`pipeline`] cuts a graph into stages, each on devices of its own; pieces flow from actor to actor across ranks.
//!
//! [`train`] trains a [`network`] of any system, a Burn module ([`module`]) or one of the case studies ([`case`]) that way,
//! with the very losses of one device but for rounding.

pub mod actor;
pub mod boxing;
pub mod case;
mod command;
pub mod compile;
pub mod exchange;
pub mod execute;
mod experiment;
pub mod global;
pub mod graph;
pub mod linear;
pub mod local;
mod model;
pub mod module;
pub mod network;
pub mod optimiser;
pub mod parts;
pub mod physical;
pub mod pipeline;
mod random;
pub mod sbp;
pub mod select;
pub mod signature;
pub mod soundness;
pub mod train;

use std::path::Path;

use clap::{CommandFactory, FromArgMatches};
use kiln_core::{Card, Context, Error, Network, Report, Result, Scale, System};

pub use case::Case;
pub use compile::{Compiler, Parallel};
pub use execute::{Rank, Run};
pub use global::GlobalTensor;
pub use graph::Logical;
pub use module::GlobalModule;
pub use physical::Physical;
pub use sbp::{NdSbp, Placement, Sbp};

/// The system, as the binary sees it.
#[derive(Debug, Clone, Copy)]
pub struct OneFlow;

impl System for OneFlow {
    fn card(&self) -> Card {
        Card {
            slug: case::KIND,
            family: "cluster",
            title: "OneFlow",
            paper: "Jinhui Yuan et al., \"OneFlow: Redesign the Distributed Deep Learning Framework from Scratch\", arXiv \
                    2110.15032",
            year: 2021,
            claim: "One program runs in data, model and hybrid parallel; the compiler finds which moves the fewest bytes, and \
                    actors with few registers overlap communication and computation.",
            purpose: "Run and train a network written for one device on many",
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

    fn network(&self, path: &Path, _cx: &Context) -> Result<Box<dyn Network>> {
        let model = model::Model::open(path)?;
        Ok(Box::new(model.case.predictor(1, model.weights)?))
    }
}

/// The README's example compiles and runs.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
