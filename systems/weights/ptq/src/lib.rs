//! Mixed-precision quantisation after training: every unit of a network gets 16, 8 or 4 bits, as few as the accuracy allows
//! that the user asks for, and is really computed in whole numbers.
//!
//! Source: Clemens J. S. Schaefer, Navid Lambert-Shirzad, Xiaofan Zhang, Chiachen Chou, Tom Jablin, Jian Li, Elfie Guo,
//! Caitlin Stanton, Siddharth Joshi, Yu Emma Wang, "Augmenting Hessians with Inter-Layer Dependencies for Mixed-Precision
//! Post-Training Quantization", arXiv 2306.04879. Rounding the weights `W_l` of unit `l` to `b` bits is a perturbation
//! `δ_l`. How much the loss `L` suffers is estimated from its curvature, and from what units do together, by forward passes
//! alone:
//!
//! ```text
//! Ω_l  = Tr(H_l) / n_l ‖δ_l‖²                                curvature
//! Δ_l  = L(l quantised) - L                                   one unit
//! D_ij = L(i and j quantised) - L - Δ_i - Δ_j                 a pair
//! I_l  = max(0, Δ_l) + ½ Σ_j max(0, D_lj)
//! S_l  = Ω_l / ΣΩ + λ I_l / ΣI                                the augmented score
//! ```
//!
//! Units are sorted by `S`, and bisection finds how many of the least sensitive can do with 8 bits, then with 4
//! ([`search`](mod@search)). The paper's abstract leaves `I` open; this form is Kiln's. [`program`] finds the units of a captured graph,
//! [`quantise`] calibrates and measures them, [`ready`] computes them with the kernels of [`kiln_ops::quantised`].
//!
//! ```
//! use kiln_ptq::quantiser::{Calibrator, Rows};
//! let weights = [0.5, -1.0, 0.25, 8.0, 0.0, 2.0];
//! let rows = Rows::of(&weights, 2, 8, Calibrator::Minmax);
//! assert_eq!(rows.q, [64, -127, 32, 127, 0, 32]);
//! ```

pub mod adaround;
pub mod arch;
pub mod arrays;
mod calibrate;
pub mod checkpoint;
mod command;
pub mod curvature;
pub mod data;
pub mod equalise;
mod experiment;
mod find;
pub mod fold;
pub mod foreign;
pub mod grouped;
pub mod latency;
pub mod layers;
pub mod mlp;
mod plain;
pub mod program;
pub mod quantise;
pub mod quantiser;
pub mod ready;
pub mod search;
pub mod sensitivity;
pub mod store;
pub mod training;
pub mod unit;
pub mod written;

use std::path::Path;

use clap::{CommandFactory, FromArgMatches};
use kiln_core::{Card, Context, Error, Network, Report, Result, Scale, System};

pub use layers::Layers;
pub use program::Program;
pub use quantise::{Granularity, Metric, QuantConfig, Quantiser, SearchPlan};
pub use store::Quantised;

/// The system, as the binary sees it.
#[derive(Debug, Clone, Copy)]
pub struct Ptq;

impl System for Ptq {
    fn card(&self) -> Card {
        Card {
            slug: checkpoint::KIND,
            family: "weights",
            title: "Mixed-precision quantisation after training",
            paper: "Clemens J. S. Schaefer, Navid Lambert-Shirzad, Xiaofan Zhang, Chiachen Chou, Tom Jablin, Jian Li, Elfie \
                    Guo, Caitlin Stanton, Siddharth Joshi, Yu Emma Wang, \"Augmenting Hessians with Inter-Layer \
                    Dependencies for Mixed-Precision Post-Training Quantization\", arXiv 2306.04879",
            year: 2023,
            claim: "Scores that join curvature and dependencies between layers find faster configurations of 16, 8 and 4 \
                    bits at the same accuracy than curvature alone.",
            purpose: "Make a trained network smaller and faster within an accuracy that you set",
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
        if store::is_quantised(model) {
            return Err(Error::input(model.display(), "holds a quantised network, which cannot be captured")
                .hint("capture the network that it was made from"));
        }
        Ok(Box::new(checkpoint::Trained::open(model, cx)?))
    }
}

/// The README's example compiles and runs.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
