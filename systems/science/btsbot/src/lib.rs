//! BTSbot: bright transients in a survey's alert stream, identified and followed up without a person.
//!
//! Source: Nabeel Rehemtulla et al., "The Zwicky Transient Facility Bright Transient Survey. III. BTSbot: Automated
//! Identification and Follow-up of Bright Transients with Deep Learning", ApJ 972, 7 (2024), arXiv 2401.15167. An alert is
//! three stamps ([`triplet`]) and 25 numbers ([`features`]); a network of two branches ([`model`]) gives it a score, and a
//! policy over the scores of a source so far decides whether it becomes a target ([`policy`]):
//!
//! ```text
//! score = σ(f(stamps [3, 63, 63], features [25]))
//! target at the first alert t with  #{s ≤ t : score_s > 0.5, m_s < 19} ≥ 2      (bts_p1; bts_p2: and min m_s ≤ 18.5)
//! ```
//!
//! ```
//! # use burn::tensor::{Device, Tensor};
//! # use kiln_btsbot::MmCnnConfig;
//! # let device = Device::flex();
//! let network = MmCnnConfig::new().with_channels([8, 16]).init(&device);
//! let logits = network.forward(Tensor::zeros([2, 3, 63, 63], &device), Tensor::zeros([2, 25], &device));
//! # assert_eq!(logits.dims(), [2, 1]);
//! ```

pub mod augment;
pub mod calibrate;
pub mod checkpoint;
mod command;
pub mod dataset;
mod experiment;
pub mod features;
pub mod fields;
pub mod filter;
pub mod follow_up;
pub mod metrics;
pub mod model;
pub mod names;
pub mod packet;
pub mod packets;
pub mod page;
pub mod picture;
pub mod policy;
pub mod scores;
pub mod server;
pub mod shift;
pub mod simulate;
pub mod store;
pub mod tables;
pub mod train;
pub mod triplet;
pub mod watch;

use std::path::Path;

use clap::{CommandFactory, FromArgMatches};
use kiln_core::{Card, Context, Error, Network, Report, Result, Scale, System};

pub use features::FeatureHistory;
pub use model::{MmCnn, MmCnnConfig, Mode};
pub use packet::{Alert, AlertReader};
pub use policy::Policy;
pub use triplet::Triplet;

/// The system, as the binary sees it.
#[derive(Debug, Clone, Copy)]
pub struct Btsbot;

impl System for Btsbot {
    fn card(&self) -> Card {
        Card {
            slug: checkpoint::KIND,
            family: "science",
            title: "BTSbot: bright transients, identified and followed up",
            paper: "Nabeel Rehemtulla et al., \"The Zwicky Transient Facility Bright Transient Survey. III. BTSbot: \
                    Automated Identification and Follow-up of Bright Transients with Deep Learning\", arXiv 2401.15167",
            year: 2024,
            claim: "A network that sees an alert's images and metadata finds all bright transients of a survey, and asks \
                    for their spectra sooner than people do.",
            purpose: "Score the alerts of a sky survey, pick bright transients, and request their spectra",
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
