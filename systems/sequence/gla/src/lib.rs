//! Gated linear attention: language models whose memory per generated token is constant.
//!
//! Source: Songlin Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient Training", 2023,
//! arXiv 2312.06635. Per head, with queries and keys `q_t, k_t [key]`, values `v_t [value]` and a
//! data-dependent gate `α_t = exp g_t ∈ (0, 1)^key`, the layer keeps a matrix-valued state:
//!
//! ```text
//! S_t = diag(α_t) S_{t-1} + k_t v_tᵀ        o_t = (K^-1/2 q_t)ᵀ S_t
//! ```
//!
//! [`op`] has the recurrence in three exact forms (token by token, parallel, chunkwise), [`layer`] the
//! attention layer, [`model`] the language model. Baselines: retention and linear attention are the same
//! layer with another [`layer::Gate`]; the Transformer is [`kiln_nn::Llama`]; [`mamba`] is the selective
//! state-space model.

pub mod checkpoint;
mod command;
mod experiment;
mod kernel;
pub mod layer;
pub mod lm;
pub mod mamba;
pub mod model;
mod network;
pub mod op;
pub mod selective_scan;
pub mod server;
pub mod short_conv;
pub mod training;

use std::path::Path;

use clap::{CommandFactory, FromArgMatches};
use kiln_core::{Card, Context, Error, Network, Report, Result, Scale, System};

pub use layer::{GatedLinearAttention, GatedLinearAttentionConfig};
pub use lm::{Arch, Lm, LmConfig};
pub use model::{GlaLm, GlaLmConfig, GlaState};
pub use op::{GlaOpConfig, gla_chunk, gla_parallel, gla_recurrent};

/// The system, as the binary sees it.
#[derive(Debug, Clone, Copy)]
pub struct Gla;

impl System for Gla {
    fn card(&self) -> Card {
        Card {
            slug: checkpoint::KIND,
            family: "sequence",
            title: "Gated linear attention",
            paper: "Songlin Yang et al., \"Gated Linear Attention Transformers with Hardware-Efficient Training\", \
                    arXiv 2312.06635",
            year: 2023,
            claim: "A linear-attention Transformer with data-dependent gates rivals softmax Transformers and Mamba, \
                    trains in time linear in the length and extends to longer contexts than it was trained on.",
            purpose: "Train and run language models whose memory per generated token is constant",
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
        Ok(Box::new(network::LmNetwork::open(model, cx)?))
    }
}

/// The README's example compiles and runs.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
