//! Neural metamorphosis: one implicit function that holds the weights of a whole family of networks.
//!
//! Source: Xingyi Yang, Xinchao Wang, "Neural Metamorphosis", ECCV 2024, arXiv 2410.11878. A network of any width is a
//! sample of one smooth function over coordinates ([`coords`]):
//!
//! ```text
//! W[o, c] = F_l(l/L, o/C_out, c/C_in, L/N, C_out/N, C_in/N) / C_in
//! ```
//!
//! where `F_l` is a small residual perceptron for each tensor ([`inr`]) and yields a whole kernel at once. A trained
//! network is no such sample: its channels are in no order. Those that must move together ([`graph`]) are put into the
//! order of the shortest Hamiltonian path ([`shp`], [`smooth`]), which leaves the network's outputs as they are. Then
//! the function learns from networks of many widths, its coordinates moved by noise ([`family`], [`training`]).
//!
//! ```
//! # use kiln_core::Context;
//! # use kiln_neumeta::{Arch, CliquePermuter, Family, FamilyConfig, Goal, NetConfig, Plain, Size, Trainable};
//! # use kiln_neumeta::{BaseTerm, KernelCrop, NoiseOn};
//! # let cx = Context::new();
//! let net = NetConfig { goal: Goal::Classify, arch: "small".parse::<Arch>().unwrap(), image: [1, 8, 8], classes: 10 };
//! # let graph = net.build(Size::new(8))?.graph;
//! # let trained = Trainable::draw(&graph, &cx.device, &mut cx.rng("init", 0)).to_plain(&net, Size::new(8))?;
//! let (ordered, report) = CliquePermuter::default().permute(&trained, &cx)?;
//! assert!(report.variation_after < report.variation_before);
//! # let config = FamilyConfig {
//! #     inr: Family::inr_config(&net, 8)?, net, full: 8, widths: vec![4, 8], depths: vec![], kernels: vec![],
//! #     kernel_crop: KernelCrop::Flat, base: BaseTerm::Interp, output_scale: true, noise: 1.0, noise_on: NoiseOn::Channels,
//! # };
//! let family = Family::new(config, ordered)?;
//! let inr = family.draw(&cx.device, &mut cx.rng("inr", 0));
//! let narrow: Plain = family.sample(&inr, Size::new(5), 50, &cx)?;
//! # assert_eq!(narrow.tensors[0].len(), 5 * 9);
//! # Ok::<(), kiln_core::Error>(())
//! ```

pub mod arch;
pub mod checkpoint;
mod command;
pub mod coords;
pub mod data;
mod experiment;
pub mod family;
pub mod forward;
pub mod graph;
pub mod inr;
pub mod network;
pub mod objective;
pub mod prune;
pub mod shp;
pub mod smooth;
pub mod training;

use std::path::Path;

use clap::{CommandFactory, FromArgMatches};
use kiln_core::{Card, Context, Error, Network, Report, Result, Scale, System};

pub use arch::{Arch, NetConfig, Size};
pub use coords::{NoiseOn, WeightCoords};
pub use family::{BaseTerm, Family, FamilyConfig, KernelCrop};
pub use graph::ChannelGraph;
pub use inr::{Inr, InrConfig};
pub use network::{Plain, Trainable, fold_batch_norm};
pub use objective::Goal;
pub use shp::{Distances, ShpSolver};
pub use smooth::CliquePermuter;
pub use training::{FamilyTask, Objective, PlainTask, Recipe, WarmTask};

/// The system, as the binary sees it.
#[derive(Debug, Clone, Copy)]
pub struct NeuMeta;

impl System for NeuMeta {
    fn card(&self) -> Card {
        Card {
            slug: checkpoint::KIND,
            family: "weights",
            title: "Neural metamorphosis",
            paper: "Xingyi Yang, Xinchao Wang, \"Neural Metamorphosis\", ECCV 2024, arXiv 2410.11878",
            year: 2024,
            claim: "One implicit function over coordinates of weights writes networks of any width, seen in training or \
                    not, and loses nothing at 75 % compression.",
            purpose: "Train a network once, and take it out at whatever size a device has room for",
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
