//! Dynamic functional connectome: motifs of neural activity.
//!
//! Source: Luciano Dyballa, Samuel Lang, Alexandra Haslund-Gourley, Eviatar Yemini, Steven W. Zucker, "Learning dynamic
//! representations of the functional connectome in neurobiological networks", ICLR 2024, arXiv 2402.14102.
//!
//! From traces of W animals with T frames and the union of their N neurons:
//!
//! ```text
//! affinities   a_ij(t) of rates of change             [T, W, P], P = N (N − 1) / 2     affinity
//! motifs       x[t,w,p] ≈ Σ_r λ_r a[t,r] b[w,r] c[p,r], all ≥ 0                        ntf
//! communities  of the graph c_r: a weighted stochastic block model                     blockmodel
//! atlas        when, in which animals, among whom, with pictures                       atlas
//! ```
//!
//! A pair that an animal lacks is masked; the paper's exact kernel is not known, so [`affinity`] defines Kiln's own.
//!
//! ```
//! # use kiln_connectome::{AffinityConfig, NtfConfig, generate::SimulateConfig};
//! # use kiln_connectome::traces::{AlignConfig, Events, align};
//! # use kiln_core::Context;
//! let cx = Context::new();
//! let planted = SimulateConfig { frames: 80, ..SimulateConfig::reference() }.draw(&mut cx.rng("doc", 0))?;
//! let traces = align(&planted.recordings, &Events::default(), AlignConfig::default())?;
//! let tensor = AffinityConfig::new().with_sigma(2.0).compute(&traces)?;
//! let fit = NtfConfig::new(3).with_inits(2).with_sweeps(20).fit(&tensor, &cx)?;
//! assert_eq!(fit.factors.pairs.rows, 36 * 35 / 2);
//! # Ok::<(), kiln_core::Error>(())
//! ```

pub mod affinity;
pub mod atlas;
pub mod baselines;
pub mod blockmodel;
mod command;
pub mod compare;
pub mod entries;
mod experiment;
pub mod generate;
pub mod graph;
pub mod ntf;
pub mod score;
pub mod silence;
pub mod tensor;
pub mod traces;

use clap::{CommandFactory, FromArgMatches};
use kiln_core::{Card, Context, Error, Report, Result, Scale, System};

pub use affinity::AffinityConfig;
pub use atlas::{Atlas, AtlasConfig};
pub use blockmodel::BlockModel;
pub use ntf::NtfConfig;

/// The system, as the binary sees it.
#[derive(Debug, Clone, Copy)]
pub struct Connectome;

impl System for Connectome {
    fn card(&self) -> Card {
        Card {
            slug: atlas::KIND,
            family: "science",
            title: "Dynamic functional connectome",
            paper: "Luciano Dyballa et al., \"Learning dynamic representations of the functional connectome in \
                    neurobiological networks\", arXiv 2402.14102",
            year: 2024,
            claim: "Tensor factorisation of differential affinities with a block model on top finds which neurons act \
                    together, when, and in which animals.",
            purpose: "Turn recordings of many neurons in several animals into an atlas of motifs",
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
}

/// The README's example compiles and runs.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
