//! The verbs of `kiln connectome`.

mod atlas;
mod fit;
mod graph;
mod simulate;

use clap::{Parser, Subcommand};
use kiln_core::{Context, Result};

/// `kiln connectome …`
#[derive(Debug, Parser)]
#[command(name = "connectome", about = "Which neurons act together, when, and in which animals")]
#[command(after_help = "Examples:
  kiln connectome simulate --out demo/
  kiln connectome fit --traces demo/ --rank 3 --out atlas/
  kiln connectome silence --model atlas/ --neuron N01 --out effects.csv")]
pub struct Command {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Find the motifs of recordings: an atlas with pictures, tables and graphs
    #[command(after_help = "Examples:
  kiln connectome fit --traces worms/ --rank 5 --out atlas/
  kiln connectome fit --traces worms.npz --events stimuli.csv --rank auto --ranks 2..8 --inits 5 --out atlas/
  kiln connectome fit --traces a.nwb b.nwb --rate 2 --sigma 3 --rank 4 --out atlas/
CSV: time_s,<neuron>,.. one file an animal; NPZ: <animal>/traces, <animal>/neurons, <animal>/time_s; NWB: RoiResponseSeries.")]
    Fit(fit::FitArgs),
    /// Compute the affinities of all pairs of neurons over time
    #[command(after_help = "Examples:
  kiln connectome affinity --traces worms/ --out affinity.safetensors
  kiln connectome affinity --traces w.npz --affinity gaussian-level --layout matrix --out affinity.safetensors")]
    Affinity(fit::AffinityArgs),
    /// Factorise a tensor of affinities
    #[command(after_help = "Examples:
  kiln connectome ntf --tensor affinity.safetensors --rank 5 --out factors/
  kiln connectome ntf --tensor x.npz --init start.npz --sweeps 50 --out factors/
The tensor is called \"tensor\" [time, animals, pairs] or [time, animals, neurons, neurons], its mask \"mask\" [animals, pairs].")]
    Ntf(fit::NtfArgs),
    /// Find the communities of a weighted graph
    #[command(after_help = "Examples:
  kiln connectome communities --edges edges.csv --out communities/
  kiln connectome communities --edges edges.csv --model dc --flat --posterior 1000 --out communities/
  kiln connectome communities --edges edges.csv --partition labels.csv --out scored/      only scores it
Edges are source,target,weight; labels are node,label.")]
    Communities(graph::CommunitiesArgs),
    /// Write the pages, pictures, tables and graphs of an atlas again
    #[command(after_help = "Examples:
  kiln connectome atlas --model atlas/ --out pages/")]
    Atlas(atlas::AtlasArgs),
    /// Match the motifs of two atlases
    #[command(after_help = "Examples:
  kiln connectome compare --a wildtype/ --b mutant/")]
    Compare(atlas::CompareArgs),
    /// Predict whom silencing a neuron affects
    #[command(after_help = "Examples:
  kiln connectome silence --model atlas/ --neuron AWBL --out effects.csv")]
    Silence(atlas::SilenceArgs),
    /// Make recordings with planted motifs
    #[command(after_help = "Examples:
  kiln connectome simulate --out demo/
  kiln connectome simulate --animals 6 --neurons 40 --frames 300 --motifs 3 --out demo/")]
    Simulate(simulate::SimulateArgs),
}

impl Command {
    /// Runs the verb.
    ///
    /// # Errors
    /// Whatever the verb's work runs into.
    pub fn run(self, cx: &Context) -> Result<()> {
        match self.verb {
            Verb::Fit(args) => fit::fit(args, cx),
            Verb::Affinity(args) => fit::affinity(&args, cx),
            Verb::Ntf(args) => fit::ntf(&args, cx),
            Verb::Communities(args) => graph::communities(&args, cx),
            Verb::Atlas(args) => atlas::atlas(&args, cx),
            Verb::Compare(args) => atlas::compare(&args, cx),
            Verb::Silence(args) => atlas::silence(&args, cx),
            Verb::Simulate(args) => simulate::simulate(&args, cx),
        }
    }
}
