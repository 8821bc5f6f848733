//! Stitchable neural networks: trained networks of several sizes, joined into many of sizes between.
//!
//! Source: Zizheng Pan, Jianfei Cai, Bohan Zhuang, "Stitchable Neural Networks", CVPR 2023, arXiv 2302.06586.
//! *Anchors* are networks of different cost that solve the same task, each a chain of blocks ([`anchor`]). The front of one,
//! blocks `0..l`, is joined to the rear of another, blocks `m..`, with one linear map of the channels ([`stitch`]):
//!
//! ```text
//! S(x) = x Wᵀ + b        x: [batch, positions, D_front] → [batch, positions, D_rear]
//! [W b]ᵀ = pinv([X 1]) Y
//! ```
//!
//! X is what the front gives and Y what block m takes in its own network, for a hundred images ([`least_squares`]). Which
//! fronts are joined to which rears is the stitch space ([`space`]): fast to slow, neighbours in cost, blocks within a
//! sliding window. All its networks share their weights ([`snnet`]), are trained together ([`training`]), have batch
//! norms' statistics of their own ([`norms`]), and are chosen among by what they cost ([`pareto`]).
//!
//! ```
//! # use burn::tensor::{Device, Tensor};
//! # use kiln_stitch::{SnNetConfig, family::VitConfig};
//! # let device = Device::flex();
//! let vit = |width| VitConfig { image: [1, 8, 8], patch: 4, width, depth: 3, heads: 2, classes: 10 };
//! let anchors = vec![vit(8).init(&device), vit(16).init(&device)];
//! let mut net = SnNetConfig::new(anchors).with_kernel(2).with_stride(1).init(&device)?;
//! let images = Tensor::<4>::zeros([4, 1, 8, 8], &device);
//! net.fit(images.clone(), &kiln_core::Context::new())?;
//! net.set_config(net.space().find("s0>s1@1>2")?)?;
//! assert_eq!(net.forward(images).dims(), [4, 10]);
//! # Ok::<(), kiln_core::Error>(())
//! ```

pub mod anchor;
pub mod budget;
pub mod checkpoint;
mod command;
pub mod data;
pub mod evaluate;
mod experiment;
pub mod family;
pub mod golden;
pub mod least_squares;
pub mod norms;
pub mod pareto;
pub mod serve;
pub mod similarity;
pub mod snnet;
pub mod space;
pub mod stitch;
pub mod training;

use std::path::Path;

use clap::{CommandFactory, FromArgMatches};
use kiln_core::{Card, Context, Error, Network, Report, Result, Scale, System};

pub use anchor::{Anchor, Cost, Extent, Feature, Grid, Outline, Segment};
pub use pareto::Pareto;
pub use snnet::{SnNet, SnNetConfig, Stitched};
pub use space::{SpaceConfig, StitchSpace};
pub use stitch::StitchLayer;

/// The system, as the binary sees it.
#[derive(Debug, Clone, Copy)]
pub struct Stitch;

impl System for Stitch {
    fn card(&self) -> Card {
        Card {
            slug: checkpoint::KIND,
            family: "weights",
            title: "Stitchable neural networks",
            paper: "Zizheng Pan, Jianfei Cai, Bohan Zhuang, \"Stitchable Neural Networks\", arXiv 2302.06586",
            year: 2023,
            claim: "The fronts and rears of trained networks, joined by linear maps that least squares begin, make many \
                    networks that interpolate in cost and accuracy and share their weights.",
            purpose: "Serve one model at any cost: switch at every request among networks between your small and large one",
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
