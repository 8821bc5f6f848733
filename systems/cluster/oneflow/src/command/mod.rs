//! The verbs of `kiln oneflow`.

mod algebra;
mod plan;
mod predict;
mod run;
mod train;

use std::path::{Path, PathBuf};

use clap::{Args, Parser, Subcommand};
use kiln_cluster::Link;
use kiln_compiler::{Graph, capture};
use kiln_core::{Context, Error, Result};
use serde::Deserialize;

use crate::case::Case;
use crate::graph::Logical;
use crate::network::Trainee;
use crate::sbp::{NdSbp, Placement};

/// `kiln oneflow …`
#[derive(Debug, Parser)]
#[command(name = "oneflow", about = "A network written for one device, run and trained on many")]
#[command(after_help = "Examples:
  kiln oneflow plan --case softmax-head --mesh 4
  kiln oneflow train --case mlp --mesh 2 --out model/
  kiln oneflow run --model model/ --mesh 2x2 --inputs x.npz --out outputs.npz")]
pub struct Command {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// List how operations may be divided
    #[command(after_help = "Examples:
  kiln oneflow signatures
  kiln oneflow signatures --graph graph/ --op Matmul     those of the operations of a graph")]
    Signatures(algebra::SignaturesArgs),
    /// Show how a tensor gets from one form to another, and what that moves
    #[command(after_help = "Examples:
  kiln oneflow boxing --from S0 --to B --shape 1000x512 --mesh 4
  kiln oneflow boxing --from S0,P --to S1,B --shape 8x6 --mesh 2x2 --check")]
    Boxing(algebra::BoxingArgs),
    /// Choose the cheapest forms of a linear classifier's training step, or of a network
    #[command(after_help = "Examples:
  kiln oneflow select --linear batch=64,features=512,classes=100000 --devices 8
  kiln oneflow select --graph graph/ --devices 4")]
    Select(algebra::SelectArgs),
    /// Run a chain of actors on a virtual clock
    #[command(after_help = "Example:
  kiln oneflow actors --durations 2,1,3 --registers 2,2 --pieces 10 --svg actors.svg")]
    Actors(algebra::ActorsArgs),
    /// Choose how a network is divided over devices, without running it
    #[command(
        alias = "plan",
        after_help = "Examples:
  kiln oneflow compile --case hybrid-gpt --mesh 2x2 --explain
  kiln oneflow compile --model model/ --mesh 64 --out physical/
  kiln oneflow compile --graph graph/ --mesh 4 --hint x=S0 --memory 2GB
  kiln cluster probe --ranks 4 --backend tcp --json > links.json
  kiln oneflow compile --model model/ --mesh 4 --cost time --links links.json
Writes physical.json, physical.svg and physical.dot. Needs none of the devices."
    )]
    Compile(plan::CompileArgs),
    /// Run a network on the devices of a mesh
    #[command(after_help = "Examples:
  kiln oneflow run --model model/ --inputs x.npz --mesh 2x2 --out outputs.npz
  kiln oneflow run --graph graph/ --inputs x.npz --mesh 2 --check --trace trace.svg")]
    Run(run::RunArgs),
    /// Train a network, or one of the case studies, on the devices of a mesh
    #[command(after_help = "Examples:
  kiln oneflow train --model model/ --data rows.npz --mesh 2 --out trained/
  kiln oneflow train --graph graph/ --data rows.npz --loss squared --mesh 2x2 --out trained/
  kiln oneflow train --case mlp --mesh 2 --steps 200 --out model/
  kiln oneflow train --case wide-deep --data clicks.csv --columns columns.toml --mesh 2 --out model/
  kiln oneflow train --case hybrid-gpt --data corpus.txt --mesh 2x2 --out model/
  kiln oneflow train --case softmax-head --classes 100000 --mesh 4 --sbp model --out model/
Repeat the line with --resume and more --steps to go on; the mesh may be another.

rows.npz of --model and --graph holds an array for every input of the network, under its name or as x, and y: whole
numbers for classes, floats for numbers; the first axis counts examples. What is trained are the weights of the model's
file, or a graph's constants of floats. The network is the one that predicts: without dropout, and with the statistics
of batch norm as they are. A model is captured for --batch examples; a graph folder has the batch that it was written for.")]
    Train(Box<train::TrainArgs>),
    /// Apply a trained network to new examples
    #[command(after_help = "Examples:
  kiln oneflow predict --model model/ --data new.npz --out scores.npz
  kiln oneflow predict --graph trained/ --data new.npz --out scores.npz")]
    Predict(predict::PredictArgs),
}

impl Command {
    /// Does what was asked for.
    pub fn run(&self, cx: &Context) -> Result<()> {
        match &self.verb {
            Verb::Signatures(args) => args.run(cx),
            Verb::Boxing(args) => args.run(cx),
            Verb::Select(args) => args.run(cx),
            Verb::Actors(args) => args.run(cx),
            Verb::Compile(args) => args.run(cx),
            Verb::Run(args) => args.run(cx),
            Verb::Train(args) => args.run(cx),
            Verb::Predict(args) => args.run(cx),
        }
    }
}

/// Examples of a step where nothing is said.
const DEFAULT_BATCH: usize = 64;

/// A captured network.
#[derive(Debug, Args)]
#[group(multiple = false)]
struct Source {
    /// Folder that `kiln export` wrote
    #[arg(long, value_name = "DIR")]
    graph: Option<PathBuf>,
    /// Folder of a trained model, of any system
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
}

impl Source {
    fn is_given(&self) -> bool {
        self.graph.is_some() || self.model.is_some()
    }

    /// The network with its weights by name, read from a folder in the place of the one that is named, where there is one.
    fn trainee(&self, from: Option<&Path>, batch: Option<usize>, cx: &Context) -> Result<Trainee> {
        if batch == Some(0) {
            return Err(Error::usage("--batch is 0, but must be at least 1"));
        }
        match (&self.graph, &self.model) {
            (Some(folder), _) => {
                let trainee = Trainee::from_graph(from.unwrap_or(folder))?;
                let written = trainee.batch()?;
                match batch.filter(|&batch| batch != written) {
                    Some(batch) => Err(Error::usage(format!(
                        "{} was written for {written} examples at once, and --batch is {batch}",
                        folder.display()
                    ))
                    .hint(
                        "leave out --batch; a --model is captured for any, an ONNX file imported by --dim",
                    )),
                    None => Ok(trainee),
                }
            }
            (None, Some(model)) => {
                Trainee::from_model(from.unwrap_or(model), batch.unwrap_or(DEFAULT_BATCH), cx)
            }
            (None, None) => Err(Error::usage("--graph or --model is needed")),
        }
    }

    fn open(&self, cx: &Context) -> Result<Option<Graph>> {
        match (&self.graph, &self.model) {
            (Some(folder), _) => Graph::load(folder).map(Some),
            (None, Some(model)) => capture(cx.network(model)?).map(Some),
            (None, None) => Ok(None),
        }
    }
}

/// A case study with its sizes.
#[derive(Debug, Args)]
#[command(next_help_heading = "Case study")]
struct CaseArgs {
    /// Which one
    #[arg(long, value_enum)]
    case: Option<CaseName>,
    /// Examples of a step [default: 64, or what a graph was captured for]
    #[arg(long)]
    batch: Option<usize>,
    /// mlp and softmax-head: numbers of an example [default: 64]
    #[arg(long)]
    inputs: Option<usize>,
    /// Width of hidden layers [default: 128; hybrid-gpt 64]
    #[arg(long)]
    hidden: Option<usize>,
    /// mlp and softmax-head: classes [default: 10 and 10000]
    #[arg(long)]
    classes: Option<usize>,
    /// softmax-head and wide-deep: width of an embedding [default: 128 and 8]
    #[arg(long)]
    embedding: Option<usize>,
    /// wide-deep: rows of the tables [default: 10000]
    #[arg(long)]
    rows: Option<usize>,
    /// hybrid-gpt: tokens of a sample [default: 32]
    #[arg(long)]
    seq: Option<usize>,
    /// hybrid-gpt: attention heads [default: 4]
    #[arg(long)]
    heads: Option<usize>,
    /// hybrid-gpt: layers [default: 2]
    #[arg(long)]
    layers: Option<usize>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum CaseName {
    /// Two layers; digits of 8 x 8 pixels where no data are given
    Mlp,
    /// Very many classes behind an embedding
    SoftmaxHead,
    /// Clicks from numbers and words
    WideDeep,
    /// A small Transformer over bytes
    HybridGpt,
}

impl CaseArgs {
    fn case(&self) -> Result<Option<Case>> {
        let Some(name) = self.case else { return Ok(None) };
        let case = match name {
            CaseName::Mlp => Case::Mlp {
                inputs: self.inputs.unwrap_or(64),
                hidden: self.hidden.unwrap_or(128),
                classes: self.classes.unwrap_or(10),
            },
            CaseName::SoftmaxHead => Case::SoftmaxHead {
                inputs: self.inputs.unwrap_or(64),
                embedding: self.embedding.unwrap_or(128),
                classes: self.classes.unwrap_or(10_000),
            },
            CaseName::WideDeep => Case::WideDeep {
                rows: self.rows.unwrap_or(10_000),
                width: self.embedding.unwrap_or(8),
                hidden: self.hidden.unwrap_or(128),
            },
            CaseName::HybridGpt => Case::HybridGpt {
                vocab: 256,
                seq: self.seq.unwrap_or(32),
                hidden: self.hidden.unwrap_or(64),
                heads: self.heads.unwrap_or(4),
                layers: self.layers.unwrap_or(2),
            },
        };
        case.check().map_err(Error::usage)?;
        Ok(Some(case))
    }

    /// Examples of a step, unless something else is said.
    fn batch(&self) -> Result<usize> {
        match self.batch.unwrap_or(DEFAULT_BATCH) {
            0 => Err(Error::usage("--batch is 0, but must be at least 1")),
            batch => Ok(batch),
        }
    }
}

/// A graph to be run, or a case to be trained.
fn logical(source: &Source, case: &CaseArgs, cx: &Context) -> Result<Logical> {
    match (source.open(cx)?, case.case()?) {
        (Some(graph), None) => Logical::of(graph),
        (None, Some(study)) => study.logical(case.batch()?, &study.initial(cx.seed)),
        _ => Err(Error::usage("one of --graph, --model and --case is needed")),
    }
}

/// `name=S0,B`
fn parse_hint(text: &str) -> std::result::Result<(String, NdSbp), String> {
    let (name, form) = text.rsplit_once('=').ok_or("a hint is NAME=SBP, such as head.weight=S1")?;
    let form = form.parse().map_err(|e: Error| e.to_string())?;
    Ok((name.to_string(), form))
}

/// Hints of a TOML file, a line `"head.weight" = "S1"` each.
fn read_hints(path: &Path) -> Result<Vec<(String, NdSbp)>> {
    let text = std::fs::read_to_string(path).map_err(Error::io("read", path))?;
    let table: std::collections::BTreeMap<String, String> = toml::from_str(&text).map_err(|e| {
        Error::input(path.display(), format!("is no list of forms: {}", e.to_string().trim_end()))
            .hint("write a line \"head.weight\" = \"S1\" for every tensor")
    })?;
    let read = |(name, form): (String, String)| {
        let form =
            form.parse().map_err(|e: Error| Error::input(path.display(), format!("\"{name}\": {e}")))?;
        Ok((name, form))
    };
    table.into_iter().map(read).collect()
}

/// The slowest of the links that `kiln cluster probe --json` wrote: a collective waits for it.
fn read_link(path: &Path) -> Result<Link> {
    #[derive(Deserialize)]
    struct Pair {
        latency_s: f64,
        bandwidth_bytes_per_s: f64,
    }
    let refused = |found: String| {
        Error::input(path.display(), found).hint("write it by `kiln cluster probe --ranks 4 --json`")
    };
    let text = std::fs::read_to_string(path).map_err(Error::io("read", path))?;
    let pairs: Vec<Pair> =
        serde_json::from_str(&text).map_err(|e| refused(format!("is no list of links: {e}")))?;
    let is_link = |pair: &Pair| {
        let Pair { latency_s, bandwidth_bytes_per_s } = *pair;
        latency_s >= 0.0
            && latency_s.is_finite()
            && bandwidth_bytes_per_s > 0.0
            && bandwidth_bytes_per_s.is_finite()
    };
    if let Some(at) = pairs.iter().position(|pair| !is_link(pair)) {
        return Err(refused(format!(
            "link {at} has a latency of {} s and {} bytes/s; a latency of at least 0 and a bandwidth above 0 are needed",
            pairs[at].latency_s, pairs[at].bandwidth_bytes_per_s
        )));
    }
    let slower = |a: Link, b: Link| Link {
        latency: a.latency.max(b.latency),
        bandwidth: a.bandwidth.min(b.bandwidth),
    };
    let links =
        pairs.iter().map(|pair| Link { latency: pair.latency_s, bandwidth: pair.bandwidth_bytes_per_s });
    links.reduce(slower).ok_or_else(|| refused("lists no link".into()))
}

fn parse_mesh(text: &str) -> std::result::Result<Placement, String> {
    Placement::parse(text).map_err(|e| format!("{e}; {}", e.hint_text().unwrap_or_default()))
}

/// Extents joined by x: `8x6`.
fn parse_shape(text: &str) -> std::result::Result<Vec<usize>, String> {
    // So that bytes on any number of devices can be counted.
    const MOST_ELEMENTS: usize = 1 << 40;
    let extents: Option<Vec<usize>> = text.split(['x', ',']).map(|part| part.trim().parse().ok()).collect();
    let extents = extents.ok_or_else(|| format!("\"{text}\" is no shape; write 8x6"))?;
    match extents.iter().try_fold(1usize, |n, &m| n.checked_mul(m)) {
        Some(count) if count <= MOST_ELEMENTS => Ok(extents),
        _ => Err(format!("a tensor of {text} has more than {MOST_ELEMENTS} elements")),
    }
}

/// `2GB`, `500MB`, `1024`.
fn parse_bytes(text: &str) -> std::result::Result<u64, String> {
    let end = text.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let unit = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "kb" | "k" => 1e3,
        "mb" | "m" => 1e6,
        "gb" | "g" => 1e9,
        other => return Err(format!("\"{other}\" is no unit; use kB, MB or GB")),
    };
    let number: f64 = number.parse().map_err(|_| format!("\"{text}\" is no number of bytes; write 2GB"))?;
    Ok((number * unit) as u64)
}

/// Bytes as people read them.
fn told_bytes(bytes: f64) -> String {
    match bytes {
        bytes if bytes >= 1e9 => format!("{:.2} GB", bytes / 1e9),
        bytes if bytes >= 1e6 => format!("{:.2} MB", bytes / 1e6),
        bytes if bytes >= 1e3 => format!("{:.2} kB", bytes / 1e3),
        bytes => format!("{bytes:.0} B"),
    }
}
