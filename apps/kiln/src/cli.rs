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
    /// Look at a trained model's computation, run it, and make it smaller
    Graph {
        #[command(subcommand)]
        verb: GraphVerb,
    },
    /// Compile a loop program or a network into WebAssembly, or run it
    #[command(
        after_help = "A program is text (`program relu(in X: f32[4], out Y: f32[4]) { .. }`) or JSON (kiln-loop-ir/1)."
    )]
    Compile {
        #[command(subcommand)]
        verb: CompileVerb,
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

#[derive(Debug, Subcommand)]
pub enum GraphVerb {
    /// Print a graph, and draw it
    #[command(
        after_help = "Examples:\n  kiln graph show --model my-model\n  kiln graph show --graph my-graph --svg graph.svg"
    )]
    Show {
        #[command(flatten)]
        source: GraphSource,
        /// Also draw it into this SVG file
        #[arg(long, value_name = "FILE")]
        svg: Option<PathBuf>,
    },
    /// Compute a graph's outputs
    #[command(after_help = "Example:\n  kiln graph run --graph my-graph --inputs in.npz --out out.npz\n  \
        kiln graph run --model my-model --inputs in.npz --out out.npz --repeat 50 --profile\n\n\
        in.npz holds an array for every input, under its name: f32, or whole numbers.")]
    Run {
        #[command(flatten)]
        source: GraphSource,
        /// .npz file of the inputs
        #[arg(long, value_name = "FILE")]
        inputs: PathBuf,
        /// .npz file for the outputs
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
        /// Compute so many times and tell the median time
        #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
        repeat: u32,
        /// Compiled for this machine, or operation by operation as the reference
        #[arg(long, value_enum, default_value_t)]
        target: GraphTarget,
        /// Also tell the compiled steps, what each kind of them took, and the memory
        #[arg(long)]
        profile: bool,
    },
    /// Write a graph that computes the same with fewer operations
    #[command(after_help = "Example:\n  kiln graph optimise --graph my-graph --out smaller\n  \
        kiln graph optimise --graph my-graph --passes cse,dce --out smaller")]
    Optimise {
        #[command(flatten)]
        source: GraphSource,
        /// Passes in their order: fold-constants, cse, dce [default: all]
        #[arg(long, value_delimiter = ',')]
        passes: Vec<String>,
        /// Folder for the graph
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
    },
    /// Write a graph that computes an output and its gradients
    #[command(
        after_help = "Examples:\n  kiln graph grad --graph my-loss --loss loss --wrt x --out my-gradient\n  \
        kiln graph grad --model my-model --loss logits --wrt %1,%2 --out my-gradient\n\n\
        Gradients are outputs called d_ and the name: of inputs of floats, or of any tensor by its number\n\
        (`kiln graph show` prints them). For an output of more than one element the graph takes one input\n\
        more, such as d_logits: the gradient with respect to this output."
    )]
    Grad {
        #[command(flatten)]
        source: GraphSource,
        /// The output whose gradient it is
        #[arg(long, value_name = "NAME")]
        loss: String,
        /// Inputs (or %NUMBER) with respect to which it is taken
        #[arg(long, value_delimiter = ',', required = true)]
        wrt: Vec<String>,
        /// Folder for the graph
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
    },
    /// Read an ONNX model
    #[command(after_help = "Examples:\n  kiln graph import --onnx resnet.onnx --out my-graph\n  \
        kiln graph import --onnx bert.onnx --dim batch=8 --dim sequence=128 --out my-graph\n\n\
        Sizes that the file leaves open are 1 unless --dim gives them, by the file's name for them or by\n\
        input and axis (--dim x.0=8). Floats become 32-bit, whole numbers 64-bit.")]
    Import {
        /// The model; numbers in files beside it are read too
        #[arg(long, value_name = "FILE")]
        onnx: PathBuf,
        /// A size that the file leaves open
        #[arg(long = "dim", value_name = "NAME=SIZE", value_parser = size)]
        dims: Vec<(String, usize)>,
        /// Folder for the graph
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
    },
    /// Write a graph as an ONNX model, for ONNX Runtime and others
    #[command(after_help = "Examples:\n  kiln graph export --model my-model --onnx my-model.onnx\n  \
        kiln graph export --graph my-graph --onnx my-graph.onnx")]
    Export {
        #[command(flatten)]
        source: GraphSource,
        /// File for the model (set of operators 20)
        #[arg(long, value_name = "FILE")]
        onnx: PathBuf,
    },
}

/// How a graph is run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum GraphTarget {
    /// Compiled, in 32-bit floats
    #[default]
    Cpu,
    /// Operation by operation
    Interp,
}

/// Where a graph comes from.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub struct GraphSource {
    /// Folder that `kiln export` wrote
    #[arg(long, value_name = "DIR")]
    pub graph: Option<PathBuf>,
    /// Folder of a trained model
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
}

/// A program and how it is made.
#[derive(Debug, Args)]
pub struct ProgramArgs {
    #[command(flatten)]
    pub source: ProgramSource,
    /// What it is made into
    #[arg(long, value_enum, default_value = "wasm")]
    pub target: Target,
    /// "default", "none", or passes in their order, such as simplify,unroll:8,vectorize:4
    #[arg(long, value_delimiter = ',', default_value = "default")]
    pub passes: Vec<String>,
}

/// Where a program comes from.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub struct ProgramSource {
    /// Program as text or JSON
    #[arg(long, value_name = "FILE")]
    pub program: Option<PathBuf>,
    /// Folder that `kiln export` wrote
    #[arg(long, value_name = "DIR")]
    pub graph: Option<PathBuf>,
    /// Model folder
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Target {
    /// The program itself, for the reference interpreter
    Interp,
    /// A WebAssembly module
    Wasm,
    /// Compute shaders for WebGPU; only `build`
    Wgsl,
}

#[derive(Debug, Subcommand)]
pub enum CompileVerb {
    /// Write a program as its target has it, with the text and the JSON of what the passes made of it
    #[command(after_help = "Examples:\n  kiln compile build --program relu.txt --out relu/\n  \
        kiln compile build --program relu.json --passes simplify,vectorize:4 --target interp --out relu/\n  \
        kiln compile build --model my-model --out module/\n  \
        kiln compile build --model my-model --target wgsl --out shaders/\n\n\
        A network's parameters stand in constants.npz: its module takes them as inputs beside the network's own.")]
    Build {
        #[command(flatten)]
        program: ProgramArgs,
        /// Folder for the compiled program
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
    },
    /// Run a program on arrays
    #[command(
        after_help = "Example:\n  kiln compile run --program relu.txt --target interp --inputs in.npz --out out.npz"
    )]
    Run {
        #[command(flatten)]
        program: ProgramArgs,
        /// .npz file with the program's inputs by their names
        #[arg(long, value_name = "FILE")]
        inputs: PathBuf,
        /// .npz file for the outputs
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
        /// Stop the interpreter after so many statements
        #[arg(long, default_value_t = 10_000_000_000)]
        max_steps: u64,
    },
}

/// `batch=8`
fn size(text: &str) -> Result<(String, usize), String> {
    let (name, size) = text.split_once('=').ok_or("it is written NAME=SIZE, such as batch=8")?;
    let size = size.parse().map_err(|_| format!("\"{size}\" is not a size"))?;
    Ok((name.to_string(), size))
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
