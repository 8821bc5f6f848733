//! `kiln oneflow run`

use std::path::{Path, PathBuf};
use std::time::Instant;

use burn::tensor::TensorData;
use clap::Args;
use kiln_cluster::ClusterArgs;
use kiln_compiler::Graph;
use kiln_core::{Context, Error, HostTensor, PortKind, Result, TensorFile, write_atomic};
use kiln_data::{read_tensors, write_tensors};
use rand::RngExt;
use serde_json::json;

use super::plan::{PlanArgs, StageArgs};
use super::{Source, told_bytes};
use crate::actor::Trace;
use crate::execute::{Done, Rank, Run};
use crate::graph::Logical;
use crate::pipeline::{self, Pipeline, cut};

#[derive(Debug, Args)]
pub struct RunArgs {
    #[command(flatten)]
    source: Source,
    /// Inputs by their names: an .npz or .safetensors file [default: random floats, and 0 for whole numbers]
    #[arg(long, value_name = "FILE")]
    inputs: Option<PathBuf>,
    #[command(flatten)]
    plan: PlanArgs,
    #[command(flatten)]
    stages: StageArgs,
    /// How often the inputs go through
    #[arg(long, default_value_t = 1)]
    pieces: usize,
    /// Compare with one device
    #[arg(long)]
    check: bool,
    /// File for the outputs, .npz or .safetensors
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// File for what the actors of all ranks in this process did: .json for Chrome's trace viewer, or .svg
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    #[command(flatten)]
    cluster: ClusterArgs,
}

/// Outputs of the first rank, and what every rank in this process sent and held.
struct Outcome {
    rank: usize,
    outputs: Vec<TensorData>,
    bytes_sent: u64,
    peak_bytes: usize,
    trace: Option<Trace>,
    seconds: f64,
}

impl RunArgs {
    pub fn run(&self, cx: &Context) -> Result<()> {
        if self.pieces == 0 {
            return Err(Error::usage("--pieces is 0, but must be at least 1"));
        }
        let graph = self.source.open(cx)?.ok_or_else(|| Error::usage("--graph or --model is needed"))?;
        let inputs = match &self.inputs {
            Some(path) => read_inputs(path, &graph)?,
            None => random_inputs(&graph, cx),
        };
        let logical = Logical::of(graph.clone())?;
        let run = Run {
            pieces: self.pieces,
            registers: self.stages.registers()?,
            seed: cx.seed,
            checked: true,
            traced: self.trace.is_some(),
            ..Run::default()
        };
        let (outcomes, predicted, ranks) = match self.stages.stages {
            1 => self.run_whole(&logical, &run, &inputs, cx)?,
            stages => {
                let stages = cut(&logical.graph, &[], None, stages, &self.stages.pins)?;
                self.run_stages(&self.plan.compile_stages(stages, cx)?, &run, &inputs, cx)?
            }
        };
        // Files are rank 0's to write.
        let Some(first) = outcomes.first().filter(|first| first.rank == 0) else { return Ok(()) };
        let difference =
            if self.check { Some(difference(&first.outputs, &graph.run(&inputs)?)?) } else { None };
        if let Some(path) = &self.out {
            write_tensors(path, &named(&logical.graph, &first.outputs))?;
        }
        if let Some(path) = &self.trace {
            let trace = Trace::together(outcomes.iter().filter_map(|outcome| outcome.trace.as_ref()));
            let bytes = if path.extension().is_some_and(|extension| extension == "svg") {
                trace.to_svg().into_bytes()
            } else {
                trace.to_chrome().to_string().into_bytes()
            };
            write_atomic(path, &bytes)?;
        }
        let sent: u64 = outcomes.iter().map(|outcome| outcome.bytes_sent).sum();
        let peaks: Vec<usize> = outcomes.iter().map(|outcome| outcome.peak_bytes).collect();
        let shapes: Vec<_> = logical
            .graph
            .outputs
            .iter()
            .map(|output| json!({"name": output.port.name, "shape": output.port.shape}))
            .collect();
        let shown = json!({
            "outputs": shapes, "ranks": ranks, "bytes_sent": sent, "bytes_predicted": predicted,
            "peak_register_bytes": peaks, "seconds": first.seconds, "difference": difference, "out": self.out,
        });
        cx.emit(&shown, |_| {
            let mut text = String::new();
            for output in &logical.graph.outputs {
                text += &format!("{} {:?}\n", output.port.name, output.port.shape);
            }
            let whose = if outcomes.len() == ranks { "all ranks" } else { "this rank" };
            text += &format!(
                "{} sent by {whose} ({} predicted for all), {} of registers at most, {:.3} s\n",
                told_bytes(sent as f64),
                told_bytes(predicted as f64),
                told_bytes(peaks.iter().copied().max().unwrap_or(0) as f64),
                first.seconds
            );
            match difference {
                Some(difference) => text + &format!("largest difference from one device, relative to the largest value: {difference:.1e}\n"),
                None => text,
            }
        })
    }
}

/// What the ranks in this process did, the bytes that all ranks should send, and how many ranks there are.
type Ran = (Vec<Outcome>, u64, usize);

impl RunArgs {
    fn run_whole(&self, logical: &Logical, run: &Run, inputs: &[TensorData], cx: &Context) -> Result<Ran> {
        let physical = self.plan.compile(logical, false, cx)?;
        let ranks = self.plan.mesh.len();
        let outcomes = self.cluster.run(ranks, cx, |world| {
            let rank = Rank::new(&physical, logical, &world)?;
            let begun = Instant::now();
            let mut done = rank.run(run, &|_| Ok(inputs.to_vec()))?;
            let seconds = begun.elapsed().as_secs_f64();
            let last = done.outputs.pop().unwrap_or_default();
            let outputs = last
                .into_iter()
                .enumerate()
                .map(|(port, part)| rank.output(port, part))
                .collect::<Result<_>>()?;
            Ok(Outcome::of(world.rank(), outputs, done, seconds))
        })?;
        Ok((outcomes, physical.bytes() * self.pieces as u64, ranks))
    }

    fn run_stages(&self, pipeline: &Pipeline, run: &Run, inputs: &[TensorData], cx: &Context) -> Result<Ran> {
        let ranks = pipeline.ranks();
        let outcomes = self.cluster.run(ranks, cx, |world| {
            let begun = Instant::now();
            let (outputs, done) = pipeline::run(pipeline, &world, run, &|_| Ok(inputs.to_vec()))?;
            Ok(Outcome::of(world.rank(), outputs, done, begun.elapsed().as_secs_f64()))
        })?;
        Ok((outcomes, pipeline.bytes() * self.pieces as u64, ranks))
    }
}

impl Outcome {
    fn of(rank: usize, outputs: Vec<TensorData>, done: Done, seconds: f64) -> Self {
        let trace = done.course.map(|course| course.trace);
        Self { rank, outputs, bytes_sent: done.bytes_sent, peak_bytes: done.peak_bytes, trace, seconds }
    }
}

/// Inputs of a graph from a file.
fn read_inputs(path: &Path, graph: &Graph) -> Result<Vec<TensorData>> {
    let mut arrays = read_tensors(path)?;
    let names: Vec<String> = arrays.names().map(str::to_string).collect();
    graph
        .inputs
        .iter()
        .map(|input| {
            let port = &input.port;
            if !names.contains(&port.name) {
                let found = format!("has no array \"{}\"", port.name);
                return Err(Error::input(path.display(), found).hint(format!(
                    "the network reads \"{}\" {:?}; the file has: {}",
                    port.name,
                    port.shape,
                    names.join(", ")
                )));
            }
            let tensor = arrays.take(&port.name)?;
            let shape = tensor.shape.clone();
            if shape != port.shape {
                let found =
                    format!("\"{}\" has the shape {shape:?}, the network reads {:?}", port.name, port.shape);
                return Err(Error::input(path.display(), found));
            }
            match (port.kind, tensor.as_floats(), tensor.as_ints()) {
                (PortKind::Float, Some(values), _) => {
                    match values.iter().position(|value| !value.is_finite()) {
                        Some(at) => Err(Error::input(
                            path.display(),
                            format!("\"{}\" is {} at {at}", port.name, values[at]),
                        )),
                        None => Ok(TensorData::new(values.to_vec(), shape)),
                    }
                }
                (PortKind::Int, _, Some(values)) => Ok(TensorData::new(values.to_vec(), shape)),
                (kind, ..) => {
                    let kind = if kind == PortKind::Int { "whole numbers" } else { "floats" };
                    Err(Error::input(path.display(), format!("\"{}\" must hold {kind}", port.name)))
                }
            }
        })
        .collect()
}

/// Floats between 0 and 1, and zeros for whole numbers, which may be ids of anything.
fn random_inputs(graph: &Graph, cx: &Context) -> Vec<TensorData> {
    let inputs = graph.inputs.iter().enumerate();
    inputs
        .map(|(number, input)| {
            let (shape, count) = (input.port.shape.clone(), input.port.shape.iter().product());
            let mut rng = cx.rng("inputs", number as u64);
            match input.port.kind {
                PortKind::Float => {
                    TensorData::new((0..count).map(|_| rng.random::<f32>()).collect::<Vec<_>>(), shape)
                }
                PortKind::Int => TensorData::new(vec![0i64; count], shape),
            }
        })
        .collect()
}

/// Outputs by their names.
pub(super) fn named(graph: &Graph, outputs: &[TensorData]) -> TensorFile {
    let mut file = TensorFile::new();
    for (output, data) in graph.outputs.iter().zip(outputs) {
        let shape = data.shape().to_vec();
        let tensor = if data.dtype().is_float() {
            HostTensor::float(shape, data.iter::<f32>().collect())
        } else {
            HostTensor::int(shape, data.iter::<i64>().collect())
        };
        file.insert(&output.port.name, tensor);
    }
    file
}

/// The largest difference between outputs, relative to the largest value of each.
fn difference(found: &[TensorData], expected: &[TensorData]) -> Result<f64> {
    let mut worst = 0.0f64;
    for (found, expected) in found.iter().zip(expected) {
        if found.shape() != expected.shape() {
            return Err(Error::work(format!(
                "an output has the shape {:?}, on one device {:?}",
                found.shape(),
                expected.shape()
            )));
        }
        let largest = expected.iter::<f64>().fold(f64::MIN_POSITIVE, |most, value| most.max(value.abs()));
        let apart =
            found.iter::<f64>().zip(expected.iter::<f64>()).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        worst = worst.max(apart / largest);
    }
    Ok(worst)
}
