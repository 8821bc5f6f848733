//! `kiln graph`: looking at captured networks, running and rewriting them.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use burn::tensor::TensorData;
use kiln::compiler::loops::{Buffer, read_buffers, write_buffers};
use kiln::compiler::{Boundary, Executor, Footprint, Graph, GraphPass, OnnxOptions, StepKind};
use kiln::core::{Context, Error, Port, Result, write_atomic};
use serde_json::json;

use crate::cli::{GraphSource, GraphTarget, GraphVerb};
use crate::commands::{Systems, captured};

pub fn execute(verb: GraphVerb, systems: Systems, cx: &Context) -> Result<()> {
    match verb {
        GraphVerb::Show { source, svg } => show(&open(&source, systems, cx)?, svg.as_deref(), cx),
        GraphVerb::Run { source, inputs, out, repeat, target, profile } => {
            if profile && target == GraphTarget::Interp {
                return Err(Error::usage("--profile tells the steps of a compiled graph")
                    .hint("leave out `--target interp`"));
            }
            let mut runner = Runner::new(open(&source, systems, cx)?, target)?;
            run(&mut runner, &inputs, &out, repeat, profile, cx)
        }
        GraphVerb::Optimise { source, passes, out } => {
            let passes = match passes.as_slice() {
                [] => GraphPass::ALL.to_vec(),
                named => named.iter().map(|name| GraphPass::parse(name)).collect::<Result<_>>()?,
            };
            optimise(open(&source, systems, cx)?, &passes, &out, cx)
        }
        GraphVerb::Grad { source, loss, wrt, out } => {
            let wrt: Vec<&str> = wrt.iter().map(String::as_str).collect();
            written(&open(&source, systems, cx)?.gradient(&loss, &wrt)?, &out, cx)
        }
        GraphVerb::Import { onnx, dims, out } => {
            let options = OnnxOptions { dims: dims.into_iter().collect() };
            written(&Graph::from_onnx(&onnx, &options)?, &out, cx)
        }
        GraphVerb::Export { source, onnx } => {
            let graph = open(&source, systems, cx)?;
            graph.to_onnx(&onnx)?;
            let shown =
                json!({ "onnx": onnx, "inputs": ports(&graph.inputs), "outputs": ports(&graph.outputs) });
            cx.emit(&shown, |_| format!("{} operations in {}\n", graph.operations.len(), onnx.display()))
        }
    }
}

fn open(source: &GraphSource, systems: Systems, cx: &Context) -> Result<Graph> {
    match (&source.graph, &source.model) {
        (Some(folder), _) => Graph::load(folder),
        (None, Some(model)) => captured(systems, model, cx),
        (None, None) => Err(Error::usage("--graph or --model is needed")),
    }
}

/// Saves a graph and says what goes in and comes out.
fn written(graph: &Graph, out: &Path, cx: &Context) -> Result<()> {
    graph.save(out)?;
    let (inputs, outputs) = (ports(&graph.inputs), ports(&graph.outputs));
    let shown =
        json!({ "out": out, "operations": graph.operations.len(), "inputs": inputs, "outputs": outputs });
    cx.emit(&shown, |_| {
        let line = |port: &Port| format!("  {} {:?}\n", port.name, port.shape);
        let lines = |ports: &[&Port]| ports.iter().map(|port| line(port)).collect::<String>();
        let count = graph.operations.len();
        format!(
            "{count} operations in {}\ninputs\n{}outputs\n{}",
            out.display(),
            lines(&inputs),
            lines(&outputs)
        )
    })
}

fn ports(boundary: &[Boundary]) -> Vec<&Port> {
    boundary.iter().map(|boundary| &boundary.port).collect()
}

fn show(graph: &Graph, svg: Option<&Path>, cx: &Context) -> Result<()> {
    if let Some(path) = svg {
        write_atomic(path, graph.to_svg()?.as_bytes())?;
    }
    let text = graph.to_text()?;
    let counts = graph.operation_counts()?;
    let shown =
        json!({ "kind": graph.kind, "operations": counts, "constants": graph.constants.len(), "text": text });
    cx.emit(&shown, |_| text.clone())
}

/// A graph ready to be run.
enum Runner {
    Compiled(Executor),
    Reference(Graph),
}

impl Runner {
    fn new(graph: Graph, target: GraphTarget) -> Result<Self> {
        Ok(match target {
            GraphTarget::Cpu => Self::Compiled(Executor::new(graph)?),
            GraphTarget::Interp => Self::Reference(graph),
        })
    }

    fn graph(&self) -> &Graph {
        match self {
            Self::Compiled(executor) => executor.graph(),
            Self::Reference(graph) => graph,
        }
    }

    fn run(&mut self, inputs: &[TensorData]) -> Result<Vec<TensorData>> {
        match self {
            Self::Compiled(executor) => executor.run(inputs),
            Self::Reference(graph) => graph.run(inputs),
        }
    }

    fn footprint(&self) -> Option<Footprint> {
        match self {
            Self::Compiled(executor) => Some(executor.footprint()),
            Self::Reference(_) => None,
        }
    }
}

fn run(
    runner: &mut Runner,
    inputs: &Path,
    out: &Path,
    repeat: u32,
    profile: bool,
    cx: &Context,
) -> Result<()> {
    let arrays = read_buffers(inputs)?;
    let input = |name: &String| {
        let known = || arrays.keys().cloned().collect::<Vec<_>>().join(", ");
        arrays.get(name).map(Buffer::to_tensor).ok_or_else(|| {
            Error::input(inputs.display(), format!("there is no array \"{name}\""))
                .hint(format!("it holds: {}", known()))
        })
    };
    let inputs: Vec<_> =
        runner.graph().inputs.iter().map(|boundary| input(&boundary.port.name)).collect::<Result<_>>()?;
    let mut times = Vec::new();
    let mut outputs = Vec::new();
    let bar = cx.progress(repeat.into(), "runs");
    for _ in 0..repeat {
        let begun = Instant::now();
        outputs = runner.run(&inputs)?;
        times.push(begun.elapsed().as_secs_f64());
        bar.inc(1);
    }
    times.sort_by(f64::total_cmp);
    let named = runner.graph().outputs.iter().zip(&outputs).map(|(boundary, data)| {
        let name = &boundary.port.name;
        let buffer = Buffer::from_tensor(data).ok_or_else(|| {
            Error::work(format!("output \"{name}\" of type {:?} cannot be written", data.dtype()))
        })?;
        Ok((name.clone(), buffer))
    });
    let named: BTreeMap<String, Buffer> = named.collect::<Result<_>>()?;
    write_buffers(out, &named)?;
    let milliseconds = 1e3 * times[times.len() / 2];
    let names: Vec<&String> = named.keys().collect();
    let footprint = runner.footprint().filter(|_| profile);
    let mut shown = json!({ "out": out, "outputs": names, "median_ms": milliseconds, "runs": repeat });
    if let Some(footprint) = &footprint {
        shown["compiled"] = json!(footprint);
    }
    cx.emit(&shown, |_| {
        let first = format!("{} outputs in {}, {milliseconds:.2} ms\n", names.len(), out.display());
        first + &footprint.map_or_else(String::new, |footprint| profile_table(&footprint, repeat))
    })
}

/// Every kind of step with its share of a run, and the memory.
fn profile_table(footprint: &Footprint, runs: u32) -> String {
    let mut steps = footprint.steps.clone();
    steps.sort_by_key(|step| std::cmp::Reverse(step.time));
    let line = |step: &StepKind| {
        let milliseconds = 1e3 * step.time.as_secs_f64() / f64::from(runs);
        format!("{:>6} {:<32}{milliseconds:>10.3} ms\n", step.count, step.name)
    };
    let lines: String = steps.iter().map(line).collect();
    let [results, constants] =
        [footprint.arena_bytes, footprint.constant_bytes].map(|bytes| bytes as f64 / 1e6);
    format!("{lines}intermediate results {results:.2} MB, constants {constants:.2} MB\n")
}

fn optimise(mut graph: Graph, passes: &[GraphPass], out: &Path, cx: &Context) -> Result<()> {
    let bytes = |graph: &Graph| graph.constants.values().map(|data| data.as_bytes().len()).sum::<usize>();
    let size = |graph: &Graph| (graph.operations.len(), graph.constants.len(), bytes(graph));
    let mut steps = vec![("captured".to_string(), size(&graph))];
    for pass in passes {
        pass.apply(&mut graph)?;
        steps.push((pass.name(), size(&graph)));
    }
    graph.save(out)?;
    let rows: Vec<_> = steps
        .iter()
        .map(|(pass, (operations, constants, bytes))| {
            json!({ "after": pass, "operations": operations, "constants": constants, "constant_bytes": bytes })
        })
        .collect();
    cx.emit(&json!({ "out": out, "steps": rows }), |_| {
        let line = |(pass, (operations, constants, bytes)): &(String, (usize, usize, usize))| {
            format!(
                "{pass:<16}{operations:>6} operations {constants:>5} constants {:>9.2} MB\n",
                *bytes as f64 / 1e6
            )
        };
        steps.iter().map(line).collect()
    })
}
