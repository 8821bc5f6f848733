//! Graphs compiled for the CPU.
//!
//! A graph becomes a list of steps over one planned memory: [`lower`] turns tensors into expressions over views of
//! buffers, so that moving elements costs nothing and element-wise chains end up inside of the steps around them;
//! [`plan`] gives results places that are used again; the kernels beneath are those of `kiln-ops`.

mod expression;
mod kernel;
mod lower;
mod memory;
mod plan;
mod program;
mod recover;
mod view;

use std::collections::HashSet;
use std::fmt;
use std::time::{Duration, Instant};

use burn::tensor::{BoolStore, DType, TensorData};
use kiln_core::{Error, Result};
use serde::Serialize;

use crate::graph::name_and_attributes;
use crate::{Graph, GraphPass, quiet};
use expression::Code;
use kernel::{Kernel, run_burn};
use memory::{Arenas, Buffer, Elements, ElementsMut, Kind, Place, Values};
use view::{BufferId, View};

/// A graph compiled for the CPU, with the memory that it runs in.
pub struct Executor {
    graph: Graph,
    steps: Vec<CompiledStep>,
    buffers: Vec<Buffer>,
    arenas: Arenas,
    /// Where the outputs lie.
    outputs: Vec<View>,
    /// What every step took, over all runs.
    times: Vec<Duration>,
}

struct CompiledStep {
    name: &'static str,
    kernel: Kernel,
    epilogue: Option<Code>,
    reads: Vec<BufferId>,
    outputs: Vec<BufferId>,
}

/// What a compiled graph takes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Footprint {
    /// Its steps by kind, in order of appearance.
    pub steps: Vec<StepKind>,
    /// Bytes of intermediate results at most.
    pub arena_bytes: usize,
    /// Bytes of constants.
    pub constant_bytes: usize,
}

/// All steps of one kind.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct StepKind {
    /// The operation that they begin with, and whether they do more.
    pub name: String,
    /// How many there are.
    pub count: usize,
    /// What they took together, over all runs so far.
    pub time: Duration,
}

impl Executor {
    /// Compiles a graph.
    ///
    /// # Errors
    /// When it computes with floats of another width than 32 bits, or an operation does not fit its operands.
    pub fn new(mut graph: Graph) -> Result<Self> {
        for pass in GraphPass::ALL {
            pass.apply(&mut graph)?;
        }
        let kind = graph.kind.clone();
        // A graph from a file may claim shapes that its operands do not have.
        quiet::catch_panic(|| Self::compile(graph)).unwrap_or_else(|found| Err(misfit(&kind, &found)))
    }

    fn compile(mut graph: Graph) -> Result<Self> {
        let (lowering, outputs) = lower::lower(&mut graph)?;
        let mut steps = plan::drop_unused(lowering.steps, &outputs);
        let plan = plan::place(&lowering.drafts, &steps, &outputs);
        // Constants go when nothing reads them any more.
        drop(lowering.drafts);
        let mut buffers = plan.buffers;
        plan::pack_weights(&mut steps, &mut buffers, &outputs);
        let kinds: Vec<Kind> = buffers.iter().map(|buffer| buffer.kind).collect();
        let is_float = |buffer: BufferId| kinds[buffer] == Kind::Float;
        let mut compiled = Vec::with_capacity(steps.len());
        for (number, step) in steps.into_iter().enumerate() {
            let destination = plan.in_place.get(&number).copied();
            let mut reads = step.reads();
            reads.retain(|buffer| Some(*buffer) != destination);
            let epilogue =
                step.epilogue.as_ref().map(|epilogue| Code::new(epilogue, Some(step.outputs[0]), &is_float));
            let kernel = Kernel::new(step.work, destination, &is_float);
            compiled.push(CompiledStep { name: step.name, kernel, epilogue, reads, outputs: step.outputs });
        }
        forget_unread(&mut buffers, &compiled, &outputs);
        let extent = |kind: Kind| plan.arenas.get(&kind).copied().unwrap_or(0);
        let arenas = Arenas {
            floats: room(extent(Kind::Float))?,
            ints: room(extent(Kind::Int))?,
            bools: room(extent(Kind::Bool))?,
        };
        // They have become steps.
        graph.operations = Vec::new();
        let times = vec![Duration::ZERO; compiled.len()];
        Ok(Self { graph, steps: compiled, buffers, arenas, outputs, times })
    }

    /// The graph's kind, inputs and outputs; what it computes has become steps.
    pub fn graph(&self) -> &Graph {
        &self.graph
    }

    /// Computes the outputs from inputs, both in the order of the graph's.
    ///
    /// # Errors
    /// When an input does not fit its port, or an index is out of bounds.
    pub fn run(&mut self, inputs: &[TensorData]) -> Result<Vec<TensorData>> {
        self.graph.check_inputs(inputs)?;
        let inputs: Vec<Values> = inputs.iter().cloned().filter_map(Values::of).collect();
        let kind = self.graph.kind.clone();
        // On a thread of the pool from the first step to the last, so that no step has to wait for one to wake.
        rayon::scope(|_| {
            quiet::catch_panic(|| {
                (0..self.steps.len()).try_for_each(|number| {
                    let begun = Instant::now();
                    self.run_step(number, &inputs)?;
                    self.times[number] += begun.elapsed();
                    Ok(())
                })
            })
        })
        .unwrap_or_else(|found| Err(misfit(&kind, &found)))?;
        let read: Vec<BufferId> = self.outputs.iter().map(|view| view.buffer).collect();
        let (memory, _) = self.arenas.borrow(&self.buffers, &inputs, &read, None);
        let output = |view: &View| {
            let dtype = match memory.elements(view.buffer) {
                Elements::Floats(_) => DType::F32,
                Elements::Ints(_) => DType::I64,
                Elements::Bools(_) => DType::Bool(BoolStore::Native),
            };
            memory.to_data(view, dtype)
        };
        Ok(self.outputs.iter().map(output).collect())
    }

    fn run_step(&mut self, number: usize, inputs: &[Values]) -> Result<()> {
        let step = &self.steps[number];
        let Kernel::Burn { operation, inputs: operands } = &step.kernel else {
            let (memory, out) =
                self.arenas.borrow(&self.buffers, inputs, &step.reads, step.outputs.first().copied());
            return step.kernel.run(&memory, step.epilogue.as_ref(), out).map_err(|found| {
                Error::work(format!("in step {number} ({}) of the graph, {found}", step.name))
            });
        };
        let (memory, _) = self.arenas.borrow(&self.buffers, inputs, &step.reads, None);
        let results = run_burn(operation, operands, &memory);
        for (&output, data) in step.outputs.iter().zip(results) {
            let (_, out) = self.arenas.borrow(&self.buffers, inputs, &[], Some(output));
            match out {
                ElementsMut::Floats(out) => {
                    out.iter_mut().zip(data.iter::<f32>()).for_each(|(out, x)| *out = x)
                }
                ElementsMut::Ints(out) => {
                    out.iter_mut().zip(data.iter::<i64>()).for_each(|(out, x)| *out = x)
                }
                ElementsMut::Bools(out) => {
                    out.iter_mut().zip(data.iter::<bool>()).for_each(|(out, x)| *out = u8::from(x));
                }
            }
        }
        Ok(())
    }

    /// What the compiled graph takes.
    pub fn footprint(&self) -> Footprint {
        let mut steps: Vec<StepKind> = Vec::new();
        for (step, time) in self.steps.iter().zip(&self.times) {
            let name = step.to_string();
            match steps.iter_mut().find(|known| known.name == name) {
                Some(known) => {
                    known.count += 1;
                    known.time += *time;
                }
                None => steps.push(StepKind { name, count: 1, time: *time }),
            }
        }
        let constant_bytes = self.buffers.iter().map(|buffer| match &buffer.place {
            Place::Constant(values) => values.bytes(),
            _ => 0,
        });
        let weight_bytes = self.steps.iter().map(|step| step.kernel.weight_bytes());
        let Arenas { floats, ints, bools } = &self.arenas;
        Footprint {
            arena_bytes: size_of_val(&floats[..]) + size_of_val(&ints[..]) + size_of_val(&bools[..]),
            constant_bytes: constant_bytes.sum::<usize>() + weight_bytes.sum::<usize>(),
            steps,
        }
    }
}

/// An arena, where there is memory for it.
fn room<T: Clone + Default>(len: usize) -> Result<Vec<T>> {
    Vec::<T>::new().try_reserve_exact(len).map_err(|_| {
        let mebibytes = len.saturating_mul(size_of::<T>()) >> 20;
        Error::work(format!("there is no memory for the graph's intermediate results, {mebibytes} MiB"))
            .hint("export the model for a smaller batch")
    })?;
    Ok(vec![T::default(); len])
}

/// The step's kind: an operation, with what it left to Burn or took in.
impl fmt::Display for CompiledStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.kernel {
            Kernel::Burn { operation, .. } => {
                let name = name_and_attributes(operation).map_or_else(|_| "?".into(), |(name, _)| name);
                write!(f, "{name} (by Burn)")
            }
            _ if self.epilogue.is_some() => write!(f, "{} and what follows", self.name),
            _ => f.write_str(self.name),
        }
    }
}

fn misfit(kind: &str, found: &str) -> Error {
    Error::work(format!("an operation of the {kind} graph does not fit its operands: {found}"))
        .hint("the graph is damaged: export the model again")
}

/// Lets go of constants that no step reads any more.
fn forget_unread(buffers: &mut [Buffer], steps: &[CompiledStep], outputs: &[View]) {
    let read: HashSet<BufferId> = steps
        .iter()
        .flat_map(|step| step.reads.iter().copied())
        .chain(outputs.iter().map(|view| view.buffer))
        .collect();
    for (id, buffer) in buffers.iter_mut().enumerate() {
        if matches!(buffer.place, Place::Constant(_)) && !read.contains(&id) {
            buffer.place = Place::Arena(0);
        }
    }
}
