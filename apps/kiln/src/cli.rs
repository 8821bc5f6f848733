//! What can be typed.

use std::path::PathBuf;

use clap::builder::PossibleValuesParser;
use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use kiln::SYSTEMS;
use kiln::core::Scale;

/// Published neural systems on your own data, from one binary.
#[derive(Debug, Parser)]
#[command(
    name = "kiln",
    version,
    arg_required_else_help = true,
    subcommand_value_name = "COMMAND|SYSTEM",
    after_help = "Examples:\n  \
        kiln list                            what is there\n  \
        kiln show gla                        a system's paper, claim and verbs\n  \
        kiln run gla                         its reference experiment, in about a minute\n  \
        kiln tour                            every experiment, as one HTML page\n  \
        kiln gla train --text book.txt --out my-model"
)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub verb: Verb,
}

/// Options that every command takes.
#[derive(Debug, Args)]
#[command(next_help_heading = "Global options")]
pub struct Global {
    /// The number from which all randomness is derived
    #[arg(long, global = true, default_value_t = 0, value_name = "N")]
    pub seed: u64,
    /// Worker threads [default: as many as the machine has]
    #[arg(long, global = true, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub threads: Option<u16>,
    /// Where to compute
    #[arg(long, global = true, default_value = "cpu", value_name = "DEVICE")]
    pub device: DeviceName,
    /// Print one JSON document and nothing else
    #[arg(long, global = true, conflicts_with = "quiet")]
    pub json: bool,
    /// Print only what was asked for: no notes, no progress
    #[arg(long, short, global = true)]
    pub quiet: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum DeviceName {
    /// This machine's processor
    Cpu,
}

#[derive(Debug, Subcommand)]
pub enum Verb {
    /// List the systems
    #[command(after_help = "Examples:\n  kiln list\n  kiln list --json | jq -r '.[].slug'")]
    List,
    /// Show a system's paper, claim and verbs
    #[command(after_help = "Example:\n  kiln show gla")]
    Show {
        /// The system, as `kiln list` names it
        #[arg(value_name = "SYSTEM", value_parser = slugs())]
        slug: String,
    },
    /// Run a system's reference experiment: method beside baseline, claims against measurements
    #[command(
        after_help = "Examples:\n  kiln run gla\n  kiln run gla --scale full --seed 1 --out results\n\n\
        A claim that does not hold is a result, not an error: the exit code is 0."
    )]
    Run {
        /// The system, as `kiln list` names it
        #[arg(value_name = "SYSTEM", value_parser = slugs())]
        slug: String,
        /// How large the experiment is
        #[arg(long, default_value = "quick")]
        scale: Scale,
        /// Folder for the report and its plots [default: runs/<SYSTEM>]
        #[arg(long, value_name = "DIR")]
        out: Option<PathBuf>,
    },
    /// Run every system's reference experiment and put the results on one HTML page
    #[command(after_help = "Examples:\n  kiln tour\n  kiln tour --scale smoke --out /tmp/tour")]
    Tour {
        /// How large the experiments are
        #[arg(long, default_value = "quick")]
        scale: Scale,
        /// Folder for the page and a folder a system
        #[arg(long, value_name = "DIR", default_value = "runs/tour")]
        out: PathBuf,
    },
    /// Write a trained model's computation as a graph
    #[command(after_help = "Example:\n  kiln export --model my-model --out my-graph\n\n\
        DIR/graph.json holds the operations, DIR/constants.safetensors the parameters.")]
    Export {
        /// Folder of a trained model (config.json and model.safetensors)
        #[arg(long, value_name = "DIR")]
        model: PathBuf,
        /// Folder for the graph
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
    },
    /// Print a completion script for a shell
    #[command(
        after_help = "Example:\n  kiln completions bash > ~/.local/share/bash-completion/completions/kiln"
    )]
    Completions {
        /// The shell
        shell: Shell,
    },
}

fn slugs() -> PossibleValuesParser {
    PossibleValuesParser::new(SYSTEMS.iter().map(|system| system.card().slug))
}

/// Kiln's own verbs and, after them, one command a system.
pub fn command() -> clap::Command {
    let systems = SYSTEMS.iter().map(|system| system.command().name(system.card().slug));
    Cli::command().subcommands(systems)
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_command_line_is_consistent() {
        super::command().debug_assert();
    }
}
