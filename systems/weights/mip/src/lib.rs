//! Magnitude invariant parametrisations: hypernetworks whose weights do not scale with their input.
//!
//! Source: Jose Javier Gonzalez Ortiz, John Guttag, Adrian Dalca, "Magnitude Invariant Parametrizations Improve
//! Hypernetwork Learning", ICLR 2024, arXiv 2304.07645. A hypernetwork `h` makes the weights θ of another network from a
//! condition γ. With ReLU or LeakyReLU and no biases, `h(c γ) = c h(γ)`: weights, what passes through them, and gradients
//! all scale with the condition, which slows training down ([`proportionality`] measures it). The cure has two parts:
//!
//! ```text
//! θ = θ0 + h(E(γ))        E(γ) = [cos(π/2 γ), sin(π/2 γ)]
//! ```
//!
//! The input has a constant norm ([`encoding`]), and what comes out is added to weights that the network has of its own
//! ([`convert`]), small at first ([`hypernet`]). Any [Burn](burn) module is converted as it is:
//!
//! ```
//! # use burn::tensor::{Device, Tensor};
//! # use kiln_mip::MipConfig;
//! # use kiln_nn::LinearConfig;
//! # let device = Device::flex();
//! # let network = LinearConfig::new(3, 2).init(&device);
//! # let x = Tensor::<2>::ones([4, 3], &device);
//! let model = MipConfig::new(1).init(network, &device)?;
//! let y = model.instantiate(Tensor::from_floats([0.3], &device))?.forward(x);
//! # assert_eq!(y.dims(), [4, 2]);
//! # Ok::<(), kiln_core::Error>(())
//! ```

pub mod ablation;
pub mod arch;
pub mod arms;
pub mod batched;
pub mod checkpoint;
pub mod classify;
mod command;
pub mod convert;
pub mod encoding;
mod experiment;
pub mod golden;
pub mod hypernet;
pub mod label_maps;
pub mod probing;
pub mod proportionality;
pub mod register;
pub mod scale;
pub mod unet;
mod weight_norm;

use std::path::Path;

use clap::{CommandFactory, FromArgMatches};
use kiln_core::{Card, Context, Error, Network, Report, Result, Scale, System};

pub use convert::{MipConfig, MipHyper, Parametrisation};
pub use encoding::Encoding;
pub use hypernet::{HyperNet, HyperNetConfig};

/// The system, as the binary sees it.
#[derive(Debug, Clone, Copy)]
pub struct Mip;

impl System for Mip {
    fn card(&self) -> Card {
        Card {
            slug: checkpoint::KIND,
            family: "weights",
            title: "Magnitude invariant parametrisations",
            paper: "Jose Javier Gonzalez Ortiz, John Guttag, Adrian Dalca, \"Magnitude Invariant Parametrizations Improve \
                    Hypernetwork Learning\", arXiv 2304.07645",
            year: 2023,
            claim: "Hypernetworks learn considerably faster when their input has a constant norm and their output is added \
                    to weights of the network's own.",
            purpose: "Train one network for every value of a condition, from any network you have",
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
        Ok(Box::new(checkpoint::Plain::open(model, cx)?))
    }
}

/// The README's example compiles and runs.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
