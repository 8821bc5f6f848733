//! A captured graph as steps: the units whose precision is decided, with batch norms, biases and clamps folded into them, and
//! operations in between that stay as they are.

use std::collections::{BTreeMap, BTreeSet};

use burn::backend::ir::{
    BaseOperationIr, HandleKind, IrVisitorMut, OperationIr, TensorId, TensorIr, TensorStatus,
};
use burn::backend::{BackendTensor, DispatchTensor, DispatchTensorKind};
use burn::tensor::{DType, Shape, Tensor, TensorData};
use burn_flex::{Flex, FlexTensor};
use kiln_compiler::{Boundary, Graph, GraphPass, catch_panic};
use kiln_core::{Error, Port, PortKind, Result};
use kiln_ops::quantised::Affine;

use crate::find::Builder;
use crate::plain;
use crate::ready::Ready;
use crate::unit::Unit;

/// A tensor while a program runs.
pub type Value = HandleKind<Flex>;

/// Tensors while a program runs, by their number.
pub type Values = Vec<Option<Value>>;

/// What a program does next.
#[derive(Debug, Clone)]
pub(crate) enum Step {
    /// A unit, by its number.
    Unit(usize),
    /// An operation that is not quantised.
    Plain(Box<OperationIr>),
}

/// A network as units and operations between them.
#[derive(Debug, Clone)]
pub struct Program {
    /// The units, in the order in which they run.
    pub units: Vec<Unit>,
    /// What is fed in.
    pub inputs: Vec<Boundary>,
    /// What comes out.
    pub outputs: Vec<Boundary>,
    /// The slug of the system whose network it is.
    pub kind: String,
    steps: Vec<Step>,
    constants: BTreeMap<TensorId, TensorData>,
    /// For every step the tensors that no later one reads.
    done: Vec<Vec<TensorId>>,
    /// One more than the largest number of a tensor.
    tensors: usize,
    /// Examples at once.
    batch: usize,
}

impl Program {
    /// Finds the units of a graph and folds into them what follows.
    ///
    /// # Errors
    /// When the graph is not sound, or holds nothing to quantise.
    pub fn new(mut graph: Graph) -> Result<Self> {
        for pass in GraphPass::ALL {
            pass.apply(&mut graph)?;
        }
        graph.operations.iter_mut().for_each(|operation| operation.visit_mut(&mut ReadOnly));
        let mut builder = Builder::new(&graph);
        for operation in &graph.operations {
            builder.add(operation);
        }
        let Builder { units, steps, .. } = builder;
        if units.is_empty() {
            return Err(Error::work(format!(
                "the {} graph has no layer that could be quantised",
                graph.kind
            ))
            .hint("linear layers, convolutions, matrix products and embeddings are"));
        }
        let tensors =
            units.iter().flat_map(|unit| [Some(unit.input), unit.second, Some(unit.output)]).flatten();
        let tensors = tensors
            .chain(
                graph
                    .operations
                    .iter()
                    .flat_map(|op| op.inputs().chain(op.outputs()).map(|tensor| tensor.id)),
            )
            .chain(graph.inputs.iter().map(|input| input.tensor))
            .chain(graph.constants.keys().copied());
        let tensors = tensors.map(|id| id.value() as usize + 1).max().unwrap_or(0);
        let mut program = Self {
            units,
            inputs: graph.inputs,
            outputs: graph.outputs,
            kind: graph.kind,
            steps,
            constants: BTreeMap::new(),
            done: Vec::new(),
            tensors,
            batch: 1,
        };
        let read: BTreeSet<TensorId> = (0..program.steps.len()).flat_map(|at| program.reads(at)).collect();
        let outputs = program.outputs.iter().map(|output| output.tensor);
        let read: BTreeSet<TensorId> = read.into_iter().chain(outputs).collect();
        program.constants = graph.constants.into_iter().filter(|(id, _)| read.contains(id)).collect();
        program.plan();
        Ok(program)
    }

    /// The operations between units as a graph, with what units make as further inputs and what they read as further
    /// outputs; and for every step the unit that runs, or nothing for the next operation.
    pub fn skeleton(&self) -> (Graph, Vec<Option<usize>>) {
        let operations = self.steps.iter().filter_map(|step| match step {
            Step::Plain(operation) => Some((**operation).clone()),
            Step::Unit(_) => None,
        });
        let port = |name: String, tensor: TensorId| Boundary {
            port: Port { name, kind: PortKind::Float, shape: Vec::new() },
            tensor,
        };
        let made = self.units.iter().map(|unit| port(unit.name.clone(), unit.output));
        let read = self.units.iter().flat_map(|unit| {
            [Some(unit.input), unit.second].into_iter().flatten().map(move |id| port(unit.name.clone(), id))
        });
        let graph = Graph {
            kind: self.kind.clone(),
            inputs: self.inputs.iter().cloned().chain(made).collect(),
            outputs: self.outputs.iter().cloned().chain(read).collect(),
            operations: operations.collect(),
            constants: self.constants.clone(),
        };
        let order = self.steps.iter().map(|step| match step {
            Step::Unit(unit) => Some(*unit),
            Step::Plain(_) => None,
        });
        (graph, order.collect())
    }

    /// The program whose [`skeleton`](Self::skeleton) a graph is; `None` where it does not fit the units.
    pub fn assemble(graph: Graph, units: Vec<Unit>, order: &[Option<usize>]) -> Option<Self> {
        let mut operations = graph.operations.into_iter();
        let mut steps = Vec::with_capacity(order.len());
        for place in order {
            steps.push(match place {
                Some(unit) if *unit < units.len() => Step::Unit(*unit),
                Some(_) => return None,
                None => Step::Plain(Box::new(operations.next()?)),
            });
        }
        let inputs: Vec<Boundary> = graph.inputs.into_iter().rev().skip(units.len()).collect();
        let read = units.iter().map(|unit| 1 + usize::from(unit.second.is_some())).sum();
        let outputs: Vec<Boundary> = graph.outputs.into_iter().rev().skip(read).collect();
        let mut program = Self {
            inputs: inputs.into_iter().rev().collect(),
            outputs: outputs.into_iter().rev().collect(),
            kind: graph.kind,
            constants: graph.constants,
            done: Vec::new(),
            tensors: 0,
            batch: 1,
            units,
            steps,
        };
        // Everything must be there before it is read, and numbers stay small.
        let mut there: BTreeSet<TensorId> = program.constants.keys().copied().collect();
        there.extend(program.inputs.iter().map(|input| input.tensor));
        for at in 0..program.steps.len() {
            if program.reads(at).any(|id| !there.contains(&id)) {
                return None;
            }
            there.extend(program.writes(at));
        }
        const MOST_TENSORS: u64 = 1 << 24;
        let sound = operations.next().is_none()
            && !program.outputs.is_empty()
            && program.outputs.iter().all(|output| there.contains(&output.tensor))
            && there.iter().all(|id| id.value() < MOST_TENSORS);
        program.tensors = there.iter().map(|id| id.value() as usize + 1).max()?;
        program.plan();
        sound.then_some(program)
    }

    /// One more than the largest number of a tensor.
    pub fn tensors(&self) -> usize {
        self.tensors
    }

    /// Examples at once.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// The same for `batch` examples at once: the first extent of everything that depends on an input is multiplied.
    ///
    /// Whether that means the same is tested with random examples; `None` where it does not, as for a network that mixes its
    /// examples.
    pub fn with_batch(&self, batch: usize, ready: &[Ready]) -> Option<Self> {
        if batch == self.batch {
            return Some(self.clone());
        }
        let factor = batch / self.batch;
        let mut program = Self { batch, ..self.clone() };
        let mut depends: BTreeSet<TensorId> = self.inputs.iter().map(|input| input.tensor).collect();
        for at in 0..self.steps.len() {
            if self.reads(at).any(|id| depends.contains(&id)) {
                depends.extend(self.writes(at));
            }
        }
        let mut scale = ScaleFirst { depends: &depends, factor };
        for step in &mut program.steps {
            if let Step::Plain(operation) = step {
                operation.visit_mut(&mut scale);
                if let OperationIr::BaseFloat(BaseOperationIr::Slice(slice))
                | OperationIr::BaseInt(BaseOperationIr::Slice(slice)) = operation.as_mut()
                    && depends.contains(&slice.tensor.id)
                    && let Some(first) = slice.ranges.first_mut()
                    && first.start == 0
                {
                    first.end = first.end.map(|end| end * factor as isize);
                }
            }
        }
        for boundary in program.inputs.iter_mut().chain(&mut program.outputs) {
            boundary.port.shape.first_mut().map(|first| *first *= factor)?;
        }
        self.agrees(&program, ready).then_some(program)
    }

    /// Whether several examples at once give what each gives alone.
    fn agrees(&self, many: &Self, ready: &[Ready]) -> bool {
        let factor = many.batch / self.batch;
        let mut rng = kiln_core::random_stream(0, "batch", 0);
        let examples: Vec<Vec<TensorData>> = (0..factor.min(3))
            .map(|_| self.inputs.iter().map(|input| random_input(input, &mut rng)).collect())
            .collect();
        let together: Vec<TensorData> = (0..self.inputs.len())
            .map(|port| {
                let parts: Vec<&TensorData> =
                    (0..factor).map(|at| &examples[at % examples.len()][port]).collect();
                stack(&parts)
            })
            .collect();
        let run = |program: &Self, inputs: &[TensorData]| -> Option<Vec<Vec<f32>>> {
            // Shapes that do not fit make Burn panic.
            let outputs = catch_panic(|| program.run(inputs, ready)).ok()?.ok()?;
            Some(outputs.iter().map(|output| output.iter::<f32>().collect()).collect())
        };
        let Some(found) = run(many, &together) else { return false };
        (0..factor.min(3)).all(|at| {
            run(self, &examples[at]).is_some_and(|alone| {
                alone.iter().zip(&found).all(|(alone, found)| {
                    let part = found.get(at * alone.len()..(at + 1) * alone.len());
                    found.len() == factor * alone.len()
                        && part.is_some_and(|part| {
                            part.iter().zip(alone).all(|(a, b)| (a - b).abs() <= 1e-3 * (1.0 + b.abs()))
                        })
                })
            })
        })
    }

    /// Computes the outputs from inputs in the order of the ports; `ready` has the weights of every unit.
    ///
    /// # Errors
    /// When an input does not fit its port.
    pub fn run(&self, inputs: &[TensorData], ready: &[Ready]) -> Result<Vec<TensorData>> {
        let mut values = self.begin(inputs)?;
        self.run_from(0, &mut values, ready, false, &mut |_, _, _| {});
        Ok(self.read_outputs(&mut values))
    }

    /// Puts inputs and constants in their places.
    ///
    /// # Errors
    /// When an input does not fit its port.
    pub fn begin(&self, inputs: &[TensorData]) -> Result<Values> {
        if inputs.len() != self.inputs.len() {
            return Err(Error::usage(format!(
                "{} inputs for a network of {}",
                inputs.len(),
                self.inputs.len()
            )));
        }
        let mut values: Values = vec![None; self.tensors];
        for (id, data) in &self.constants {
            values[id.value() as usize] = Some(to_value(data.clone()));
        }
        for (Boundary { port, tensor }, data) in self.inputs.iter().zip(inputs) {
            if data.shape().to_vec() != port.shape {
                let found = format!("has the shape {:?}, must have {:?}", data.shape().to_vec(), port.shape);
                return Err(Error::input(format!("input \"{}\"", port.name), found));
            }
            let dtype = if port.kind == PortKind::Float { DType::F32 } else { DType::I64 };
            values[tensor.value() as usize] = Some(to_value(data.clone().convert_dtype(dtype)));
        }
        Ok(values)
    }

    /// Runs the steps from `first` on. With `keep`, tensors stay after their last use, so that the program can be run again
    /// from a later step. `watch` sees the operands of every unit before it runs.
    pub fn run_from(
        &self,
        first: usize,
        values: &mut Values,
        ready: &[Ready],
        keep: bool,
        watch: &mut dyn FnMut(usize, &FlexTensor, Option<&FlexTensor>),
    ) {
        for at in first..self.steps.len() {
            match &self.steps[at] {
                Step::Unit(number) => {
                    let unit = &self.units[*number];
                    let operand = |id: TensorId| values[id.value() as usize].clone().map(tensor);
                    let x = operand(unit.input).expect("a step's operands are there");
                    let second = unit.second.and_then(operand);
                    watch(*number, &x, second.as_ref());
                    let y = ready[*number].compute(unit, x, second);
                    values[unit.output.value() as usize] = Some(HandleKind::Float(y));
                }
                Step::Plain(operation) => plain::run(operation, values),
            }
            if !keep {
                self.done[at].iter().for_each(|id| values[id.value() as usize] = None);
            }
        }
    }

    /// Rounds results at once where all that reads them are units that round them in the same way: bytes pass between these.
    pub fn fused(&self, ready: Vec<Ready>) -> Vec<Ready> {
        let mut readers: BTreeMap<TensorId, Vec<Option<Affine>>> = BTreeMap::new();
        for step in &self.steps {
            match step {
                Step::Unit(at) => {
                    let unit = &self.units[*at];
                    readers.entry(unit.input).or_default().push(ready[*at].reads());
                    unit.second.iter().for_each(|id| readers.entry(*id).or_default().push(None));
                }
                Step::Plain(operation) => {
                    operation.inputs().for_each(|tensor| readers.entry(tensor.id).or_default().push(None));
                }
            }
        }
        self.outputs.iter().for_each(|output| readers.entry(output.tensor).or_default().push(None));
        let rounded = |(unit, ready): (&Unit, Ready)| match readers.get(&unit.output).map(Vec::as_slice) {
            Some([Some(first), others @ ..]) if others.iter().all(|other| *other == Some(*first)) => {
                ready.rounding(unit, *first)
            }
            _ => ready,
        };
        self.units.iter().zip(ready).map(rounded).collect()
    }

    /// The step at which a unit runs.
    pub fn step_of(&self, unit: usize) -> usize {
        self.steps.iter().position(|step| matches!(step, Step::Unit(at) if *at == unit)).unwrap_or(0)
    }

    /// The outputs, after all steps.
    pub fn read_outputs(&self, values: &mut Values) -> Vec<TensorData> {
        let take =
            |output: &Boundary| values[output.tensor.value() as usize].clone().expect("outputs are computed");
        self.outputs.iter().map(|output| tensor(take(output)).into_data()).collect()
    }

    /// Bytes of constants that no unit owns, at the size in which they are stored.
    pub fn other_bytes(&self) -> usize {
        self.constants.values().map(|data| data.as_bytes().len()).sum()
    }

    /// Tensors as often as steps read them.
    pub(crate) fn all_reads(&self) -> impl Iterator<Item = TensorId> + '_ {
        (0..self.steps.len()).flat_map(|at| self.reads(at))
    }

    fn reads(&self, at: usize) -> Box<dyn Iterator<Item = TensorId> + '_> {
        match &self.steps[at] {
            Step::Unit(unit) => {
                Box::new([Some(self.units[*unit].input), self.units[*unit].second].into_iter().flatten())
            }
            Step::Plain(operation) => Box::new(operation.inputs().map(|tensor| tensor.id)),
        }
    }

    fn writes(&self, at: usize) -> Vec<TensorId> {
        match &self.steps[at] {
            Step::Unit(unit) => vec![self.units[*unit].output],
            Step::Plain(operation) => operation.outputs().map(|tensor| tensor.id).collect(),
        }
    }

    /// Finds out after which step a tensor is not needed any more.
    fn plan(&mut self) {
        let mut needed: BTreeSet<TensorId> = self.outputs.iter().map(|output| output.tensor).collect();
        self.done = vec![Vec::new(); self.steps.len()];
        for at in (0..self.steps.len()).rev() {
            let last: Vec<TensorId> =
                self.reads(at).chain(self.writes(at)).filter(|id| !needed.contains(id)).collect();
            needed.extend(&last);
            self.done[at] = last;
        }
    }
}

/// Every operation leaves its operands alone.
struct ReadOnly;

impl IrVisitorMut for ReadOnly {
    fn visit_tensor_mut(&mut self, tensor: &mut TensorIr) {
        tensor.status = TensorStatus::ReadOnly;
    }
}

/// Multiplies the first extent of what depends on an input.
struct ScaleFirst<'a> {
    depends: &'a BTreeSet<TensorId>,
    factor: usize,
}

impl IrVisitorMut for ScaleFirst<'_> {
    fn visit_tensor_mut(&mut self, tensor: &mut TensorIr) {
        if self.depends.contains(&tensor.id) {
            let mut extents = tensor.shape.to_vec();
            if let Some(first) = extents.first_mut() {
                *first *= self.factor;
            }
            tensor.shape = Shape::from(extents);
        }
    }
}

fn random_input(input: &Boundary, rng: &mut impl rand::RngExt) -> TensorData {
    let count: usize = input.port.shape.iter().product();
    match input.port.kind {
        PortKind::Float => TensorData::new(
            (0..count).map(|_| rng.random::<f32>()).collect::<Vec<f32>>(),
            input.port.shape.clone(),
        ),
        // Two symbols that every vocabulary has.
        PortKind::Int => TensorData::new(
            (0..count).map(|_| rng.random_range(0..2i64)).collect::<Vec<i64>>(),
            input.port.shape.clone(),
        ),
    }
}

/// Examples one after another, along the first axis.
pub fn stack(parts: &[&TensorData]) -> TensorData {
    let mut shape = parts[0].shape().to_vec();
    shape[0] = parts.iter().map(|part| part.shape().to_vec()[0]).sum();
    if parts[0].dtype() == DType::F32 {
        TensorData::new(parts.iter().flat_map(|part| part.iter::<f32>()).collect::<Vec<f32>>(), shape)
    } else {
        TensorData::new(parts.iter().flat_map(|part| part.iter::<i64>()).collect::<Vec<i64>>(), shape)
    }
}

/// A tensor of floats while a program runs.
pub(crate) fn float_value(values: &Values, id: TensorId) -> Option<FlexTensor> {
    match values.get(id.value() as usize)? {
        Some(HandleKind::Float(tensor)) => Some(tensor.clone()),
        _ => None,
    }
}

fn to_value(data: TensorData) -> Value {
    let dtype = data.dtype();
    let tensor = FlexTensor::from_data(data);
    match dtype {
        DType::Bool(_) => HandleKind::Bool(tensor),
        dtype if dtype.is_int() => HandleKind::Int(tensor),
        _ => HandleKind::Float(tensor),
    }
}

pub(crate) fn tensor(value: Value) -> FlexTensor {
    match value {
        HandleKind::Float(tensor) | HandleKind::Int(tensor) | HandleKind::Bool(tensor) => tensor,
        HandleKind::Quantized(_) => unreachable!("no captured graph is quantised by Burn"),
    }
}

/// As a tensor of rank `D`.
pub fn of_rank<const D: usize>(tensor: FlexTensor) -> Tensor<D> {
    let kind = DispatchTensorKind::Flex(BackendTensor::Float(tensor));
    Tensor::from_dispatch(DispatchTensor { kind, autodiff: Default::default() })
}

/// The CPU tensor of a tensor.
pub fn primitive<const D: usize>(x: Tensor<D>) -> FlexTensor {
    match x.into_dispatch().kind {
        DispatchTensorKind::Flex(BackendTensor::Float(tensor)) => tensor,
        other => unreachable!("a CPU tensor came from the CPU: {other:?}"),
    }
}
