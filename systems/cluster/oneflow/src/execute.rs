//! Running the physical graph: every rank computes its nodes, one after another or as actors.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Mutex, PoisonError};

use burn::backend::ir::{HandleKind, OperationIr, TensorIr, TensorStatus};
use burn::tensor::{DType, TensorData};
use burn_flex::{Flex, FlexDevice, FlexTensor};
use burn_router::TensorInterpreter;
use kiln_cluster::Communicator;
use kiln_compiler::catch_panic;
use kiln_core::{Error, Result};

use crate::actor::{Course, Queue, run};
use crate::boxing::Router;
use crate::exchange::Lines;
use crate::graph::{Logical, Variable};
use crate::local::{Local, localise};
use crate::optimiser::{Optimiser, State, added};
use crate::parts::cut;
use crate::physical::{Node, Physical, Value, Work};
use crate::pipeline::{Arriving, Departing};
use crate::random::{draw, key, random};
use crate::sbp::{NdSbp, Region};

/// Gives every input of a piece, whole.
pub type Feed<'a> = dyn Fn(usize) -> Result<Vec<TensorData>> + Sync + 'a;

/// How a graph is run.
#[derive(Debug, Clone)]
pub struct Run {
    /// How often.
    pub pieces: usize,
    /// The number of the first piece: steps that were made before.
    pub first: usize,
    /// Registers of every value; `None` runs the nodes one after another, without actors.
    pub registers: Option<usize>,
    /// How variables change.
    pub optimiser: Optimiser,
    /// Seed of random operations.
    pub seed: u64,
    /// Whether every register is searched for values that are no numbers.
    pub checked: bool,
    /// Whether acts are noted.
    pub traced: bool,
    /// Whether gradients are added up for [`Rank::step`], instead of a step with each.
    pub accumulated: bool,
}

impl Default for Run {
    fn default() -> Self {
        Self {
            pieces: 1,
            first: 0,
            registers: Some(2),
            optimiser: Optimiser::default(),
            seed: 0,
            checked: false,
            traced: false,
            accumulated: false,
        }
    }
}

/// What one rank did.
#[derive(Debug)]
pub struct Done {
    /// Its parts of the outputs, by piece.
    pub outputs: Vec<Vec<TensorData>>,
    /// Bytes that it sent.
    pub bytes_sent: u64,
    /// Bytes of registers that it held at once at most, variables apart.
    pub peak_bytes: usize,
    /// What its actors did; nothing where there were none.
    pub course: Option<Course>,
}

/// The ends of edges to and from other stages, by the ports of the graph.
#[derive(Default)]
pub struct Links<'a> {
    /// The rank in the world that is the first of these devices.
    pub first_rank: usize,
    /// Inputs that other ranks write.
    pub arriving: BTreeMap<usize, Arriving<'a>>,
    /// Outputs that other ranks read.
    pub departing: BTreeMap<usize, Departing<'a>>,
    /// Inputs that come after outputs of the same piece have gone: gradients.
    pub late: Vec<usize>,
    /// Where an error of this rank is told, so that nobody waits for it.
    pub control: Option<&'a Communicator>,
}

/// One rank's part of a physical graph.
pub struct Rank<'a> {
    physical: &'a Physical,
    logical: &'a Logical,
    lines: Lines,
    /// What is computed here, for every node that computes.
    locals: Vec<Option<Local>>,
    variables: Mutex<Vec<Option<State>>>,
    constants: HashMap<usize, FlexTensor>,
    /// Gradients that were added up, of every variable.
    sums: Mutex<Vec<Option<FlexTensor>>>,
    links: Links<'a>,
}

impl<'a> Rank<'a> {
    /// Takes a place in the mesh. All ranks of `world` call it.
    ///
    /// # Errors
    /// When there are more or fewer ranks than devices, or one is lost.
    pub fn new(physical: &'a Physical, logical: &'a Logical, world: &Communicator) -> Result<Self> {
        let lines = Lines::new(world, &physical.placement.mesh)?;
        let at = |node: &Node| match &node.work {
            Work::Compute(operation, signature) => {
                Some(localise(operation, signature, lines.mesh(), lines.coordinate()))
            }
            _ => None,
        };
        let locals = physical.nodes.iter().map(at).collect();
        let mut variables: Vec<Option<State>> = logical.variables.iter().map(|_| None).collect();
        let mut constants = HashMap::new();
        for (number, node) in physical.nodes.iter().enumerate() {
            let part = |data: &TensorData| {
                let value = &physical.values[node.outputs[0]];
                cut(data, &Region::local(&value.shape, lines.mesh(), &value.sbp, lines.coordinate()))
            };
            match node.work {
                Work::Variable(variable) => {
                    let from = &logical.variables[variable];
                    variables[variable] = Some(State::new(
                        FlexTensor::from_data(part(&from.value)?),
                        from.kept.iter().map(part).collect::<Result<_>>()?,
                    ));
                }
                Work::Constant(id) => {
                    let data = logical.graph.constants.get(&id);
                    let data =
                        data.ok_or_else(|| Error::work(format!("constant %{} is not there", id.value())))?;
                    constants.insert(number, FlexTensor::from_data(part(data)?));
                }
                _ => {}
            }
        }
        let sums = Mutex::new(logical.variables.iter().map(|_| None).collect());
        let (variables, links) = (Mutex::new(variables), Links::default());
        Ok(Self { physical, logical, lines, locals, variables, constants, sums, links })
    }

    /// With edges to and from other ranks.
    #[must_use]
    pub fn linked(mut self, links: Links<'a>) -> Self {
        self.links = links;
        self
    }

    /// Changes every variable by the mean of `count` gradients that were added up, in step `number`. All ranks call it.
    ///
    /// # Errors
    /// When there is no gradient, or a rank is lost.
    pub fn step(&self, optimiser: &Optimiser, number: usize, count: usize) -> Result<()> {
        let mut variables = self.variables.lock().unwrap_or_else(PoisonError::into_inner);
        let mut sums = self.sums.lock().unwrap_or_else(PoisonError::into_inner);
        let places = variables.iter_mut().zip(sums.iter_mut()).zip(&self.logical.variables);
        for (at, ((state, sum), variable)) in places.enumerate() {
            let (Some(before), Some(mut gradient)) = (state.take(), sum.take()) else {
                return Err(Error::work(format!("{} has no gradient", variable.name)));
            };
            if let Some((value, path)) = self.physical.deferred.get(&at) {
                let form = &self.physical.values[*value];
                gradient = self.lines.convert(gradient, &form.shape, &form.sbp, path)?;
            }
            *state = Some(optimiser.step(before, gradient, number, 1.0 / count as f64));
        }
        Ok(())
    }

    /// Runs pieces through the graph. All ranks call it.
    ///
    /// # Errors
    /// When an operation does not fit its operands, a register holds no numbers and is searched for them, or a rank is lost.
    pub fn run(&self, options: &Run, feed: &Feed<'_>) -> Result<Done> {
        let sent = self.lines.bytes_sent();
        let outputs = Mutex::new(vec![vec![None; self.logical.graph.outputs.len()]; options.pieces]);
        let (course, peak_bytes) = match options.registers {
            Some(registers) => {
                let course = self.run_actors(registers, options, feed, &outputs)?;
                let network = self.physical.network(registers, !options.accumulated);
                let bytes = |value: usize| {
                    self.physical.values[value].local_bytes(self.lines.mesh(), self.lines.coordinate())
                };
                let values = 0..self.physical.values.len();
                let peak = values.filter(|&value| !self.is_kept(network.channels[value].from));
                let peak = peak.map(|value| bytes(value) * course.peak_registers[value]).sum();
                (Some(course), peak)
            }
            None => (None, self.run_in_order(options, feed, &outputs)?),
        };
        let outputs = outputs.into_inner().unwrap_or_else(PoisonError::into_inner);
        Ok(Done {
            outputs: outputs.into_iter().map(|piece| piece.into_iter().flatten().collect()).collect(),
            bytes_sent: self.lines.bytes_sent() - sent,
            peak_bytes,
            course,
        })
    }

    /// This rank's place among the devices.
    pub fn lines(&self) -> &Lines {
        &self.lines
    }

    /// Every variable whole as it is now, with what the optimiser keeps of it. All ranks call it.
    ///
    /// # Errors
    /// When a rank is lost.
    pub fn variables(&self) -> Result<Vec<Variable>> {
        let states = self.variables.lock().unwrap_or_else(PoisonError::into_inner);
        let of = |number: usize| {
            self.physical.nodes.iter().find(|node| matches!(node.work, Work::Variable(at) if at == number))
        };
        let mut found = Vec::with_capacity(states.len());
        for (number, (state, variable)) in states.iter().zip(&self.logical.variables).enumerate() {
            let (Some(state), Some(node)) = (state, of(number)) else {
                return Err(Error::work(format!("the variable {} has no value", variable.name)));
            };
            let form = &self.physical.values[node.outputs[0]];
            let whole = |part: TensorData| self.whole(part, form);
            let kept = state.kept().map(whole).collect::<Result<_>>()?;
            found.push(Variable { value: whole(state.value.clone().into_data())?, kept, ..variable.clone() });
        }
        Ok(found)
    }

    /// An output whole, from the parts of all ranks. All of them call it.
    ///
    /// # Errors
    /// When a rank is lost.
    pub fn output(&self, port: usize, part: TensorData) -> Result<TensorData> {
        let node =
            self.physical.nodes.iter().find(|node| matches!(node.work, Work::Output(at) if at == port));
        let node = node.ok_or_else(|| Error::work("the graph has no such output"))?;
        self.whole(part, &self.physical.values[node.inputs[0]])
    }

    fn whole(&self, part: TensorData, form: &Value) -> Result<TensorData> {
        let copies = NdSbp::broadcast(form.sbp.0.len());
        let path = Router::new(self.lines.mesh()).path(&form.shape, form.dtype.size(), &form.sbp, &copies)?;
        Ok(self.lines.convert(FlexTensor::from_data(part), &form.shape, &form.sbp, &path)?.into_data())
    }

    /// Whether a node's value is kept over pieces.
    fn is_kept(&self, node: usize) -> bool {
        matches!(self.physical.nodes[node].work, Work::Variable(_) | Work::Constant(_))
    }

    /// Every node after the one before it: the baseline of the actors. The most bytes of values that were held at once.
    fn run_in_order(&self, options: &Run, feed: &Feed<'_>, outputs: &Mutex<Outputs>) -> Result<usize> {
        let mut last = vec![0; self.physical.values.len()];
        for (at, node) in self.physical.nodes.iter().enumerate() {
            node.inputs.iter().chain(&node.outputs).for_each(|&value| last[value] = at);
        }
        let mut hands = Hands::new(self, options, feed, outputs);
        let mut peak = 0;
        for piece in 0..options.pieces {
            let mut values: Vec<Option<FlexTensor>> = vec![None; self.physical.values.len()];
            let mut held = 0;
            for (at, node) in self.physical.nodes.iter().enumerate() {
                let inputs: Vec<FlexTensor> =
                    node.inputs.iter().filter_map(|&value| values[value].clone()).collect();
                let results = hands.act(at, piece, inputs)?;
                for (&value, result) in node.outputs.iter().zip(results) {
                    values[value] = Some(result);
                    held += if self.is_kept(at) { 0 } else { self.bytes(value) };
                }
                peak = peak.max(held);
                for &value in node.inputs.iter().chain(&node.outputs) {
                    if last[value] == at && values[value].take().is_some() && !self.writes_kept(value) {
                        held -= self.bytes(value);
                    }
                }
            }
        }
        Ok(peak)
    }

    fn bytes(&self, value: usize) -> usize {
        self.physical.values[value].local_bytes(self.lines.mesh(), self.lines.coordinate())
    }

    fn writes_kept(&self, value: usize) -> bool {
        let writer = self.physical.nodes.iter().position(|node| node.outputs.contains(&value));
        writer.is_some_and(|node| self.is_kept(node))
    }

    fn run_actors(
        &self,
        registers: usize,
        options: &Run,
        feed: &Feed<'_>,
        outputs: &Mutex<Outputs>,
    ) -> Result<Course> {
        let mut network = self.physical.network(registers, !options.accumulated);
        let nodes = &self.physical.nodes;
        // Collectives that wait for gradients give way to those of as many later pieces as there is room for.
        for node in self.late_nodes() {
            network.actors[node].lag = registers - 1;
        }
        let queue = |number: usize| {
            let mut hands = Hands::new(self, options, feed, outputs);
            Queue {
                name: self.physical.queues[number].clone(),
                act: Box::new(move |actor: usize, piece: usize, inputs: &[FlexTensor]| {
                    // Registers come in the order of values; a token of an update comes last and is not read.
                    let node = &nodes[actor];
                    let mut places: Vec<usize> = (0..node.inputs.len()).collect();
                    places.sort_by_key(|&place| node.inputs[place]);
                    let mut read: Vec<Option<FlexTensor>> = vec![None; node.inputs.len()];
                    places
                        .into_iter()
                        .zip(inputs)
                        .for_each(|(place, value)| read[place] = Some(value.clone()));
                    let acted = hands.act(actor, piece, read.into_iter().flatten().collect());
                    let mut results = acted.inspect_err(|error| {
                        if let Some(control) = self.links.control {
                            control.abort(&error.to_string());
                        }
                    })?;
                    // What is written goes out in the order of values too.
                    let mut order: Vec<usize> = (0..results.len()).collect();
                    order.sort_by_key(|&place| node.outputs[place]);
                    results = order.into_iter().map(|place| results[place].clone()).collect();
                    if matches!(node.work, Work::Update(_)) && !options.accumulated {
                        results.push(token());
                    }
                    Ok(results)
                }),
                // Collectives must meet, so they keep to the order of pieces and nodes.
                ordered: number == crate::physical::NETWORK,
            }
        };
        let place = self.lines.coordinate().iter().zip(self.lines.mesh());
        let rank = self.links.first_rank + place.fold(0, |rank, (at, extent)| rank * extent + at);
        run(
            &network,
            options.pieces,
            (0..self.physical.queues.len()).map(queue).collect(),
            |_| token(),
            rank,
            options.traced,
        )
    }
}

impl Rank<'_> {
    /// Nodes that wait for inputs which come late.
    fn late_nodes(&self) -> Vec<usize> {
        let mut values = BTreeSet::new();
        let mut late = Vec::new();
        for (at, node) in self.physical.nodes.iter().enumerate() {
            let comes_late = matches!(node.work, Work::Input(port) if self.links.late.contains(&port));
            if comes_late || node.inputs.iter().any(|value| values.contains(value)) {
                values.extend(node.outputs.iter().copied());
                late.push(at);
            }
        }
        late
    }
}

type Outputs = Vec<Vec<Option<TensorData>>>;

/// What a control edge carries.
fn token() -> FlexTensor {
    FlexTensor::from_data(TensorData::new(vec![0f32], [1]))
}

/// What one thread works with.
struct Hands<'r, 'a> {
    rank: &'r Rank<'a>,
    options: &'r Run,
    feed: &'r Feed<'r>,
    outputs: &'r Mutex<Outputs>,
    interpreter: TensorInterpreter<Flex>,
    /// The inputs of the piece that was read last.
    fed: Option<(usize, Vec<TensorData>)>,
}

impl<'r, 'a> Hands<'r, 'a> {
    fn new(rank: &'r Rank<'a>, options: &'r Run, feed: &'r Feed<'r>, outputs: &'r Mutex<Outputs>) -> Self {
        Self { rank, options, feed, outputs, interpreter: TensorInterpreter::new(FlexDevice), fed: None }
    }

    fn act(&mut self, at: usize, piece: usize, inputs: Vec<FlexTensor>) -> Result<Vec<FlexTensor>> {
        let node = &self.rank.physical.nodes[at];
        let results = self.work(at, piece, inputs)?;
        let piece = self.options.first + piece;
        if self.options.checked {
            for (result, &value) in results.iter().zip(&node.outputs) {
                let broken = result.dtype() == DType::F32
                    && result
                        .to_contiguous()
                        .as_slice::<f32>()
                        .is_some_and(|values| values.iter().any(|x| x.is_nan()));
                if broken {
                    let name = &self.rank.physical.values[value].name;
                    return Err(Error::work(format!(
                        "{} wrote values for {name} that are not numbers, in piece {piece}",
                        node.name
                    ))
                    .hint("is the learning rate too high, or an input not a number?"));
                }
            }
        }
        Ok(results)
    }

    fn work(&mut self, at: usize, piece: usize, mut inputs: Vec<FlexTensor>) -> Result<Vec<FlexTensor>> {
        let rank = self.rank;
        let number = self.options.first + piece;
        let node = &rank.physical.nodes[at];
        let lost = || Error::work(format!("{} misses an operand", node.name));
        match &node.work {
            Work::Input(port) if rank.links.arriving.contains_key(port) => {
                Ok(vec![rank.links.arriving[port].pull(number)?])
            }
            Work::Input(port) => {
                if self.fed.as_ref().is_none_or(|(fed, _)| *fed != piece) {
                    self.fed = Some((piece, (self.feed)(number)?));
                }
                let data = self.fed.as_ref().and_then(|(_, data)| data.get(*port)).ok_or_else(lost)?;
                let value = &rank.physical.values[node.outputs[0]];
                let boundary = &rank.logical.graph.inputs[*port].port;
                if data.shape().to_vec() != boundary.shape {
                    let found = format!(
                        "has shape {:?}, the graph takes {:?}",
                        data.shape().to_vec(),
                        boundary.shape
                    );
                    return Err(Error::input(format!("input \"{}\"", boundary.name), found));
                }
                let region =
                    Region::local(&value.shape, rank.lines.mesh(), &value.sbp, rank.lines.coordinate());
                let data = if data.dtype() == value.dtype {
                    cut(data, &region)?
                } else {
                    cut(&data.clone().convert_dtype(value.dtype), &region)?
                };
                Ok(vec![FlexTensor::from_data(data)])
            }
            Work::Constant(_) => Ok(vec![rank.constants.get(&at).cloned().ok_or_else(lost)?]),
            Work::Variable(variable) => {
                let variables = rank.variables.lock().unwrap_or_else(PoisonError::into_inner);
                Ok(vec![variables[*variable].as_ref().ok_or_else(lost)?.value.clone()])
            }
            Work::Compute(operation, signature) => {
                let local = rank.locals[at].as_ref().ok_or_else(lost)?;
                if let Some(distribution) = random(operation) {
                    let out = &rank.physical.values[node.outputs[0]];
                    let region = Region::local(
                        &out.shape,
                        rank.lines.mesh(),
                        &signature.output(0),
                        rank.lines.coordinate(),
                    );
                    // By the logical tensor's number, which is the same in every physical graph.
                    let tensor = operation.outputs().next().map_or(0, |out| out.id.value());
                    let key = key(self.options.seed, tensor, number as u64);
                    return Ok(vec![draw(&out.shape, out.dtype, &region, distribution, key)]);
                }
                compute(&mut self.interpreter, local, inputs).map_err(|found| {
                    Error::work(format!("{} does not fit its operands: {found}", node.name))
                        .hint("are indices within range? If they are, the graph is damaged: write it again")
                })
            }
            Work::Boxing(path) => {
                let from = &rank.physical.values[node.inputs[0]];
                let local = inputs.pop().ok_or_else(lost)?;
                Ok(vec![rank.lines.convert(local, &from.shape, &from.sbp, path)?])
            }
            Work::Update(variable) if self.options.accumulated => {
                let gradient = inputs.pop().ok_or_else(lost)?;
                let mut sums = rank.sums.lock().unwrap_or_else(PoisonError::into_inner);
                let sum = match sums[*variable].take() {
                    Some(sum) => added(sum, gradient),
                    None => gradient,
                };
                sums[*variable] = Some(sum);
                Ok(Vec::new())
            }
            Work::Update(variable) => {
                let gradient = inputs.pop().ok_or_else(lost)?;
                // The step needs the value alone, so that it can be made in place.
                let state = rank.variables.lock().unwrap_or_else(PoisonError::into_inner)[*variable].take();
                let state = self.options.optimiser.step(state.ok_or_else(lost)?, gradient, number, 1.0);
                rank.variables.lock().unwrap_or_else(PoisonError::into_inner)[*variable] = Some(state);
                Ok(Vec::new())
            }
            Work::Output(port) => {
                let value = inputs.pop().ok_or_else(lost)?;
                if let Some(link) = rank.links.departing.get(port) {
                    link.offer(value, number)?;
                    return Ok(Vec::new());
                }
                let mut outputs = self.outputs.lock().unwrap_or_else(PoisonError::into_inner);
                outputs[piece][*port] = Some(value.into_data());
                Ok(Vec::new())
            }
        }
    }
}

/// Runs one device's part of an operation.
pub(crate) fn compute(
    interpreter: &mut TensorInterpreter<Flex>,
    local: &Local,
    inputs: Vec<FlexTensor>,
) -> Result<Vec<FlexTensor>, String> {
    if local.operations.is_empty() {
        return Ok(local.outputs.iter().map(|out| filled(out, local.fill)).collect());
    }
    catch_panic(|| {
        for (tensor, value) in local.inputs.iter().zip(inputs) {
            interpreter.register_tensor_to_device(tensor.id, handle(value));
        }
        local.operations.iter().for_each(|operation| interpreter.register_op(operation.clone()));
        let results = local.outputs.iter().map(|out| take(interpreter, out)).collect();
        // Operands and what lies between are needed no more.
        let made = local.operations.iter().flat_map(|operation| operation.outputs());
        for tensor in
            local.inputs.iter().chain(made.filter(|made| local.outputs.iter().all(|out| out.id != made.id)))
        {
            interpreter.register_op(OperationIr::Drop(TensorIr {
                status: TensorStatus::ReadWrite,
                ..tensor.clone()
            }));
        }
        results
    })
}

fn handle(value: FlexTensor) -> HandleKind<Flex> {
    match value.dtype() {
        dtype if dtype.is_float() => HandleKind::Float(value),
        DType::Bool(_) => HandleKind::Bool(value),
        _ => HandleKind::Int(value),
    }
}

fn take(interpreter: &mut TensorInterpreter<Flex>, tensor: &TensorIr) -> FlexTensor {
    match interpreter.get_tensor(&TensorIr { status: TensorStatus::ReadWrite, ..tensor.clone() }) {
        HandleKind::Float(value) | HandleKind::Int(value) | HandleKind::Bool(value) => value,
        HandleKind::Quantized(_) => unreachable!("no captured graph is quantised"),
    }
}

fn filled(tensor: &TensorIr, fill: f64) -> FlexTensor {
    let data = match tensor.dtype {
        DType::Bool(_) => TensorData::new(vec![false; tensor.shape.num_elements()], tensor.shape.clone()),
        dtype => TensorData::new(vec![fill; tensor.shape.num_elements()], tensor.shape.clone())
            .convert_dtype(dtype),
    };
    FlexTensor::from_data(data)
}
