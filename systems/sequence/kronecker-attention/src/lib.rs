//! Kronecker (tensor) attention: each query looks at pairs, or r-tuples, of tokens at once.
//!
//! Source: Josh Alman, Zhao Song, "How to Capture Higher-order Correlations? Generalizing Matrix Softmax Attention to
//! Kronecker Computation", ICLR 2024, arXiv 2310.04064. With queries `Q [n, d]`, keys `K1, K2 [n, d]` and values
//! `V1, V2 [n, dv]`, the output of query `i` is
//!
//! ```text
//! O_i = Σ_jk p_i(j, k) V1_j ⊙ V2_k        p_i = softmax over all pairs of s Σ_c Q_ic K1_jc K2_kc
//! ```
//!
//! and likewise for r key and value matrices; r = 1 is ordinary attention. [`attention`] computes it exactly without the
//! weights of all tuples in memory, [`polynomial`] in near-linear time for bounded entries, [`plan`](mod@plan) tells which of
//! the two suits given matrices. [`layer`] is the attention layer, [`model`] the network that is trained, and [`match3`] a
//! problem of triples that one head solves with weights in closed form.

pub mod attention;
pub mod checkpoint;
mod command;
pub mod data;
mod experiment;
pub mod explain;
mod kernel;
pub mod layer;
pub mod match3;
pub mod model;
pub mod plan;
pub mod polynomial;
pub mod training;

use std::path::Path;

use clap::{CommandFactory, FromArgMatches};
use kiln_core::{Card, Context, Error, Network, Report, Result, Scale, System};

pub use attention::{AttentionOptions, tensor_attention};
pub use layer::{KroneckerAttention, KroneckerAttentionConfig};
pub use model::{KroneckerTransformer, KroneckerTransformerConfig};
pub use polynomial::tensor_attention_poly;

/// The system, as the binary sees it.
#[derive(Debug, Clone, Copy)]
pub struct Kronecker;

impl System for Kronecker {
    fn card(&self) -> Card {
        Card {
            slug: checkpoint::KIND,
            family: "sequence",
            title: "Kronecker attention",
            paper: "Josh Alman, Zhao Song, \"How to Capture Higher-order Correlations? Generalizing Matrix Softmax \
                    Attention to Kronecker Computation\", arXiv 2310.04064",
            year: 2023,
            claim: "Attention over pairs of tokens captures correlations of three, which matrix attention cannot, and \
                    takes near-linear time if and only if the entries are small.",
            purpose: "Learn labels that triples of tokens decide; compute attention over tuples, exactly or near-linearly",
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
        Ok(Box::new(checkpoint::Classifier::open(model, cx)?))
    }
}

/// The README's example compiles and runs.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
