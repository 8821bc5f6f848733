//! Hypernetworks: networks that make the weights of networks.
//!
//! Source: Vinod Kumar Chauhan et al., "A Brief Review of Hypernetworks in Deep Learning", Artificial Intelligence Review
//! 2024, arXiv 2306.06955. A target network `y = F(x; Θ)` gets its weights from another, which alone is learned:
//!
//! ```text
//! Θ = H(C; Φ)        y = F(x; H(C; Φ))        gradients flow from the loss through Θ to Φ
//! ```
//!
//! The review sorts hypernetworks by five criteria; here each is a type, and a [`HyperNetConfig`] picks one value of each:
//!
//! | criterion | type | values |
//! |---|---|---|
//! | inputs C | [`Conditioning`] | task, data, noise, given, or several |
//! | outputs | [`OutputScheme`] | once, heads, component, chunk |
//! | variability of inputs | [`Conditioning::is_static`] | static (tasks), dynamic (all others) |
//! | variability of outputs | [`Theta`] | static: keep it; dynamic: one set of weights a sample, in one pass |
//! | architecture | [`Arch`] | MLP, CNN, RNN, attention |
//!
//! [`target`] has the networks whose weights are made, [`kiln_nn::WeightSpec`] makes a target of any Burn module. [`apps`]
//! holds applications that the review lists, each beside the network that one would use without a hypernetwork.

pub mod advise;
pub mod apps;
mod command;
pub mod conditioning;
pub mod data;
mod experiment;
pub mod generator;
pub mod golden;
pub mod hypernet;
pub mod maker;
pub mod model;
pub mod table;
pub mod target;
pub mod training;

use std::path::Path;

use clap::{CommandFactory, FromArgMatches};
use kiln_core::{Card, Context, Error, Network, Report, Result, Scale, System};

pub use conditioning::{Condition, Conditioning, NoiseLaw};
pub use generator::Arch;
pub use hypernet::{HyperNet, HyperNetConfig, Init, OutputRegularizer, OutputScheme, Share, Theta};
pub use target::{Layer, Target};

/// The system, as the binary sees it.
#[derive(Debug, Clone, Copy)]
pub struct Hypernet;

impl System for Hypernet {
    fn card(&self) -> Card {
        Card {
            slug: model::KIND,
            family: "weights",
            title: "Hypernetworks",
            paper: "Vinod Kumar Chauhan et al., \"A Brief Review of Hypernetworks in Deep Learning\", arXiv 2306.06955",
            year: 2023,
            claim: "Networks that make the weights of others share information between tasks, adapt to data, compress, \
                    and know how sure they are, each with the right one of a few designs.",
            purpose: "Make one network's weights with another: for many tasks, few rows, new domains, uncertainty",
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
        Ok(Box::new(model::Classifier::open(model, cx)?))
    }
}

/// The README's example compiles and runs.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
