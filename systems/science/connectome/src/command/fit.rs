//! From traces to affinities, factors and the atlas.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::Args;
use kiln_core::{Context, Error, ErrorKind, HostTensor, Result, write_atomic};
use kiln_data::{read_tensors, write_tensors};
use serde_json::json;
use tempfile::TempDir;

use crate::affinity::{Affinity, AffinityConfig};
use crate::atlas::{Atlas, AtlasConfig};
use crate::blockmodel::{BlockModelConfig, Correction};
use crate::ntf::{Factors, Loss, NtfConfig, Solver, Starts};
use crate::tensor::{AffinityTensor, Layout};
use crate::traces::{AlignConfig, Events, Traces, align, read_recordings};

/// Folder within that of an atlas where finished starts are until it is complete.
const STARTS: &str = "starts";

/// A number or `auto`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Auto(Option<usize>);

impl FromStr for Auto {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self(None)),
            _ => text
                .parse()
                .map(|n| Self(Some(n)))
                .map_err(|_| format!("\"{text}\" is neither a number nor auto")),
        }
    }
}

/// Numbers from one to another, both included: `2..15`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ranks(usize, usize);

impl FromStr for Ranks {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let ends =
            text.split_once("..").and_then(|(low, high)| Some((low.parse().ok()?, high.parse().ok()?)));
        match ends {
            Some((low, high)) if 1 <= low && low <= high => Ok(Self(low, high)),
            _ => Err(format!("\"{text}\" is no range of ranks; write 2..15")),
        }
    }
}

/// The recordings, and how they are compared.
#[derive(Debug, Args)]
struct TraceArgs {
    /// Recordings: folders, .csv (one an animal), .npz or .nwb
    #[arg(long, required = true, num_args = 1..)]
    traces: Vec<PathBuf>,
    /// Stimuli (start,end,label) or behaviour (time_s,..) as CSV, on the clocks of the recordings
    #[arg(long, num_args = 1..)]
    events: Vec<PathBuf>,
    /// Samples a second after alignment; by default those of the slowest recording
    #[arg(long, value_name = "HZ")]
    rate: Option<f64>,
    /// Width of the derivative filter in frames
    #[arg(long, default_value_t = 2.0)]
    sigma: f64,
    /// Which nearest neighbour sets the bandwidth; auto is the root of the number of neurons
    #[arg(long, default_value = "auto")]
    knn: Auto,
    /// What is compared between two neurons
    #[arg(long, value_enum, default_value = "differential")]
    affinity: Affinity,
    /// Accept animals of which no two share a pair of neurons
    #[arg(long)]
    allow_unshared: bool,
}

impl TraceArgs {
    fn config(&self) -> AffinityConfig {
        AffinityConfig { affinity: self.affinity, sigma: self.sigma, knn: self.knn.0 }
    }

    fn read(&self, cx: &Context) -> Result<Traces> {
        let recordings = read_recordings(&self.traces)?;
        let mut events = Events::default();
        for path in &self.events {
            events.extend(Events::read(path)?);
        }
        let traces = align(&recordings, &events, AlignConfig { rate: self.rate })?;
        traces.warnings.iter().for_each(|warning| cx.note(warning));
        if !self.allow_unshared && !traces.share_a_pair() {
            return Err(Error::work(
                "no two animals have a pair of neurons in common: motifs could not be shared",
            )
            .hint("check the names of the neurons, or pass --allow-unshared"));
        }
        cx.note(format!(
            "{} animals, {} neurons, {} frames at {:.3} a second",
            traces.animals.len(),
            traces.neurons.len(),
            traces.frames,
            traces.rate
        ));
        Ok(traces)
    }
}

#[derive(Debug, Args)]
pub struct FitArgs {
    #[command(flatten)]
    traces: TraceArgs,
    /// Number of motifs, or auto: the largest of --ranks on which random starts agree
    #[arg(long, default_value = "auto")]
    rank: Auto,
    /// Ranks to choose from
    #[arg(long, default_value = "2..15")]
    ranks: Ranks,
    /// How the tensor is factorised
    #[arg(long, value_enum, default_value = "hals")]
    solver: Solver,
    /// What it minimises
    #[arg(long, value_enum, default_value = "squared")]
    loss: Loss,
    /// Make a pair's factor the product of those of its neurons (with --solver direct)
    #[arg(long)]
    tied: bool,
    /// Random starts of a factorisation
    #[arg(long, default_value_t = 10)]
    inits: usize,
    /// Most sweeps of a start
    #[arg(long, default_value_t = 500)]
    sweeps: usize,
    /// An edge of a motif is heavier than this part of its heaviest
    #[arg(long, default_value_t = 0.05)]
    threshold: f64,
    /// The block model of the communities
    #[arg(long, value_enum, default_value = "auto")]
    model: Correction,
    /// Describe the edges between communities flat, not nested
    #[arg(long)]
    flat: bool,
    /// Keep the affinities in a file in this folder, not in memory: for tensors larger than it
    #[arg(long, value_name = "DIR")]
    scratch: Option<PathBuf>,
    /// Folder to write
    #[arg(long, required_unless_present = "resume")]
    out: Option<PathBuf>,
    /// Go on with a fit that was stopped, in its folder and with its options
    #[arg(long, value_name = "DIR", conflicts_with = "out")]
    resume: Option<PathBuf>,
}

pub fn fit(args: FitArgs, cx: &Context) -> Result<()> {
    if !(0.0..1.0).contains(&args.threshold) {
        return Err(Error::usage(format!(
            "--threshold {} is not a part of the heaviest edge",
            args.threshold
        ))
        .hint("give a number from 0 to below 1"));
    }
    let traces = args.traces.read(cx)?;
    let config = AtlasConfig {
        affinity: args.traces.config(),
        ntf: NtfConfig {
            solver: args.solver,
            loss: args.loss,
            tied: args.tied,
            ..NtfConfig::new(args.rank.0.unwrap_or(args.ranks.0))
                .with_inits(args.inits)
                .with_sweeps(args.sweeps)
        },
        ranks: if args.rank.0.is_some() { Vec::new() } else { (args.ranks.0..=args.ranks.1).collect() },
        communities: BlockModelConfig {
            correction: args.model,
            nested: !args.flat,
            ..BlockModelConfig::default()
        },
        threshold: args.threshold,
    };
    let (tensor, _scratch) = match &args.scratch {
        None => (config.affinity.compute(&traces)?, None),
        Some(folder) => {
            let (tensor, scratch) = in_file(&config.affinity, &traces, folder, cx)?;
            (tensor, Some(scratch))
        }
    };
    for &rank in config.ranks.iter().chain(config.ranks.is_empty().then_some(&config.ntf.rank)) {
        NtfConfig { rank, ..config.ntf.clone() }.check(&tensor)?;
    }
    let about = json!({
        "config": &config,
        "seed": cx.seed,
        "tensor": [tensor.frames, tensor.animals, tensor.pairs],
        "squared_norm": tensor.squared_norm()?,
    });
    let (out, starts) = match (&args.out, &args.resume) {
        (_, Some(out)) => (out, Starts::resume(&out.join(STARTS), &about)?),
        (Some(out), None) => (out, Starts::begin(&out.join(STARTS), &about)?),
        (None, None) => return Err(Error::usage("a fit needs --out or --resume")),
    };
    let atlas =
        Atlas::of_tensor(traces, &tensor, config, &starts, cx).map_err(|error| match error.kind() {
            ErrorKind::Interrupted => error.hint(format!("go on with --resume {}", out.display())),
            _ => error,
        })?;
    atlas.save(out)?;
    starts.remove()?;
    cx.emit(&atlas.to_json(), |_| {
        let mut text = format!("{} motifs, relative error {:.4}\n", atlas.motifs.len(), atlas.relative_error);
        for (number, motif) in atlas.motifs.iter().enumerate() {
            text += &format!("motif {}   {}\n", number + 1, atlas.summary(motif));
        }
        text + &format!("atlas in {}\n", out.join("atlas.html").display())
    })
}

/// Affinities in a file of a new folder within `scratch`, which lasts as long as what is returned beside them.
fn in_file(
    config: &AffinityConfig,
    traces: &Traces,
    scratch: &Path,
    cx: &Context,
) -> Result<(AffinityTensor, TempDir)> {
    let folder = tempfile::Builder::new().prefix("kiln-").tempdir_in(scratch);
    let folder = folder.map_err(Error::io("write into", scratch))?;
    let path = folder.path().join("affinity.safetensors");
    write(config, traces, Layout::Pairs, &path, cx)?;
    Ok((AffinityTensor::open(&path, None)?, folder))
}

/// Writes affinities frame by frame; returns their shape.
fn write(
    config: &AffinityConfig,
    traces: &Traces,
    layout: Layout,
    path: &Path,
    cx: &Context,
) -> Result<Vec<usize>> {
    let bar = cx.progress(traces.frames as u64, "affinities");
    config.write(traces, layout, path, &|frames| {
        bar.set(frames as u64);
        match cx.interrupted() {
            true => Err(Error::interrupted("the affinities were stopped")),
            false => Ok(()),
        }
    })
}

#[derive(Debug, Args)]
pub struct AffinityArgs {
    #[command(flatten)]
    traces: TraceArgs,
    /// How the pairs are laid out
    #[arg(long, value_enum, default_value = "pairs")]
    layout: Layout,
    /// File to write, .safetensors or .npz
    #[arg(long)]
    out: PathBuf,
}

pub fn affinity(args: &AffinityArgs, cx: &Context) -> Result<()> {
    let traces = args.traces.read(cx)?;
    let config = args.traces.config();
    let shape = match args.out.extension() {
        Some(extension) if extension == "safetensors" => write(&config, &traces, args.layout, &args.out, cx)?,
        _ => {
            let folder = TempDir::new().map_err(Error::io("write into", std::env::temp_dir()))?;
            let path = folder.path().join("affinity.safetensors");
            let shape = write(&config, &traces, args.layout, &path, cx)?;
            write_tensors(&args.out, &read_tensors(&path)?)?;
            shape
        }
    };
    let animals: Vec<&str> = traces.animals.iter().map(|animal| animal.name.as_str()).collect();
    let result = json!({ "out": args.out, "shape": shape, "neurons": traces.neurons, "animals": animals });
    cx.emit(&result, |_| format!("affinities {shape:?} in {}\n", args.out.display()))
}

#[derive(Debug, Args)]
pub struct NtfArgs {
    /// The affinities, .safetensors or .npz
    #[arg(long)]
    tensor: PathBuf,
    /// Leave the tensor in its file and read it anew for every sweep: for .safetensors larger than memory
    #[arg(long)]
    out_of_core: bool,
    /// File with a "mask" [animals, pairs] that stands before that of the tensor
    #[arg(long)]
    mask: Option<PathBuf>,
    /// Number of components
    #[arg(long, required_unless_present = "init")]
    rank: Option<usize>,
    /// File with initial factors time, animals and pairs
    #[arg(long, conflicts_with_all = ["rank", "inits"])]
    init: Option<PathBuf>,
    /// How
    #[arg(long, value_enum, default_value = "hals")]
    solver: Solver,
    /// What is minimised
    #[arg(long, value_enum, default_value = "squared")]
    loss: Loss,
    /// Make a pair's factor the product of those of its neurons (with --solver direct)
    #[arg(long)]
    tied: bool,
    /// Random starts
    #[arg(long, default_value_t = 10)]
    inits: usize,
    /// Most sweeps of a start
    #[arg(long, default_value_t = 500)]
    sweeps: usize,
    /// Stop when the error changes by less than this part of itself; 0 makes all sweeps
    #[arg(long, default_value_t = 1e-6)]
    tolerance: f64,
    /// Folder to write: factors.safetensors and fit.json
    #[arg(long)]
    out: PathBuf,
}

pub fn ntf(args: &NtfArgs, cx: &Context) -> Result<()> {
    let mask: Option<HostTensor> = match &args.mask {
        Some(path) => Some(read_tensors(path)?.take("mask")?),
        None => None,
    };
    let tensor = match args.out_of_core {
        true => AffinityTensor::open(&args.tensor, mask)?,
        false => AffinityTensor::from_file(read_tensors(&args.tensor)?, mask)?,
    };
    let start = match &args.init {
        Some(path) => Some(Factors::from_file(read_tensors(path)?)?),
        None => None,
    };
    let rank = start.as_ref().map(Factors::rank).or(args.rank).unwrap_or(1);
    let config = NtfConfig {
        solver: args.solver,
        loss: args.loss,
        tied: args.tied,
        tolerance: args.tolerance,
        ..NtfConfig::new(rank).with_inits(args.inits).with_sweeps(args.sweeps)
    };
    let fit = match start {
        Some(start) => {
            let bar = cx.progress(args.sweeps as u64, "sweeps");
            config.fit_from(&tensor, start, cx, &|_| bar.inc(1))?
        }
        None => config.fit(&tensor, cx)?,
    };
    std::fs::create_dir_all(&args.out).map_err(Error::io("create", &args.out))?;
    fit.factors.to_file().write(&args.out.join("factors.safetensors"))?;
    let result = json!({
        "relative_error": fit.relative_error,
        "loss": args.loss,
        "sweeps": fit.errors.len(),
        "converged": fit.converged,
        "errors": fit.errors,
        "weights": fit.factors.weights,
        "out": args.out,
    });
    let text =
        serde_json::to_vec_pretty(&result).map_err(|e| Error::work("cannot write fit.json").caused_by(e))?;
    write_atomic(&args.out.join("fit.json"), &text)?;
    cx.emit(&result, |_| {
        format!(
            "relative error {:.6} after {} sweeps{}\nfactors in {}\n",
            fit.relative_error,
            fit.errors.len(),
            if fit.converged { "" } else { ", not converged" },
            args.out.join("factors.safetensors").display()
        )
    })
}
