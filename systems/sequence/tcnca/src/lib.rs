//! TCNCA: sequence models of dilated convolutions and chunked attention, whose cost grows linearly with the length.
//!
//! Source: Aleksandar Terzic et al., "TCNCA: Temporal Convolution Network with Chunked Attention for Scalable Sequence
//! Processing", 2023, arXiv 2312.05605. It takes MEGA's layer (Ma et al., arXiv 2209.10655), a moving average over the sequence
//! followed by gated attention inside chunks, and puts a temporal convolution network in the place of the average:
//!
//! ```text
//! m = mixer(norm x)      a = attention inside chunks of queries, keys and values from m      x' = gates(x, m, a)
//! ```
//!
//! [`tcn`] is the convolution network and [`ema`] the average that it replaces, both `[batch, time, D]` to the same;
//! [`chunked`] the attention; [`layer`] puts them together, with MEGA's gates or, simplified, without; [`model`] has the
//! networks that are trained. [`plan`](mod@plan) tells which filters see how far, and at what cost. [`listops`] and
//! [`recall`] are tasks of the paper's experiments.

pub mod checkpoint;
pub mod chunked;
mod command;
pub mod data;
pub mod ema;
mod experiment;
pub mod layer;
pub mod listops;
mod long_conv;
pub mod model;
pub mod plan;
pub mod recall;
mod speed;
pub mod tcn;
mod tcn_kernel;
pub mod training;

use std::path::Path;

use clap::{CommandFactory, FromArgMatches};
use kiln_core::{Card, Context, Error, Network, Report, Result, Scale, System};

pub use chunked::{ChunkedAttentionConfig, RelativeBias};
pub use ema::{EmaState, MultiHeadEma, MultiHeadEmaConfig};
pub use layer::{MixerKind, TcncaLayer, TcncaLayerConfig, Variant};
pub use model::{TcncaClassifier, TcncaClassifierConfig, TcncaConfig, TcncaLm, TcncaLmConfig};
pub use tcn::{Tcn, TcnConfig};

/// The system, as the binary sees it.
#[derive(Debug, Clone, Copy)]
pub struct Tcnca;

impl System for Tcnca {
    fn card(&self) -> Card {
        Card {
            slug: checkpoint::KIND,
            family: "sequence",
            title: "TCNCA",
            paper: "Aleksandar Terzic et al., \"TCNCA: Temporal Convolution Network with Chunked Attention for Scalable \
                    Sequence Processing\", arXiv 2312.05605",
            year: 2023,
            claim: "Dilated convolutions in the place of MEGA's recurrence by FFT make it several times faster over long \
                    sequences, at the same or better quality.",
            purpose: "Classify long sequences and model texts at a cost linear in their length",
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
        Ok(Box::new(checkpoint::TcncaNetwork::open(model, cx)?))
    }
}

/// The README's example compiles and runs.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
