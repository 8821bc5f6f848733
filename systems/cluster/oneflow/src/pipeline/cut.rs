//! Consecutive stages of a graph, each a graph of its own.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use burn::backend::ir::{NumericOperationIr as Numeric, OperationIr, ReduceOpIr, TensorId, TensorIr};
use burn::tensor::{DType, TensorData};
use kiln_compiler::builder::{Builder, Fit};
use kiln_compiler::{Boundary, Graph};
use kiln_core::{Error, Port, PortKind, Result};

use crate::graph::{Logical, Variable, work};

/// Tensors that are computed, or read where they are weights, in a stage of the user's.
pub type Pins = [(String, usize)];

/// A stage: a logical graph, some of whose inputs and outputs are others' outputs and inputs.
#[derive(Debug, Clone)]
pub struct Stage {
    /// What it computes, with gradients of its variables where it is trained.
    pub logical: Logical,
    /// For every input of its graph the input of the whole that it is, where it is one.
    pub fed: Vec<Option<usize>>,
    /// For every input of its graph the edge by which it comes, where it comes from another stage.
    pub arrives: Vec<Option<usize>>,
    /// For every output of its graph the output of the whole that it is, where it is one.
    pub given: Vec<Option<usize>>,
    /// For every output of its graph the edge by which it goes, where another stage reads it.
    pub departs: Vec<Option<usize>>,
    /// Multiplications and additions of its forward pass.
    pub work: f64,
}

/// A tensor that one stage writes and another reads.
#[derive(Debug, Clone)]
pub struct Edge {
    /// For people.
    pub name: String,
    /// Extents.
    pub shape: Vec<usize>,
    /// Element type.
    pub dtype: DType,
    /// Who writes.
    pub from: usize,
    /// Who reads.
    pub to: usize,
    /// Whether it is a gradient, which waits for what comes later.
    pub backward: bool,
}

/// All stages, and the edges between them.
#[derive(Debug, Clone)]
pub struct Stages {
    /// In order.
    pub stages: Vec<Stage>,
    /// Forward edges before backward ones.
    pub edges: Vec<Edge>,
}

impl Stage {
    /// The inputs of its graph, of the whole graph's; those that come from other stages are empty.
    pub fn inputs(&self, whole: Vec<TensorData>) -> Result<Vec<TensorData>> {
        let of = |place: &Option<usize>| match place {
            Some(at) => {
                whole.get(*at).cloned().ok_or_else(|| Error::work("the graph has more inputs than there are"))
            }
            None => Ok(TensorData::new(Vec::<f32>::new(), [0])),
        };
        self.fed.iter().map(of).collect()
    }

    /// The names of inputs that come from other stages.
    pub fn arriving_ports(&self) -> Vec<String> {
        let inputs = self.logical.graph.inputs.iter().zip(&self.arrives);
        inputs.filter(|(_, edge)| edge.is_some()).map(|(input, _)| input.port.name.clone()).collect()
    }
}

/// Cuts a graph into stages with much the same work, between which few bytes move. Weights lie with the first stage that
/// reads them. With `loss`, the name of an output, every stage has the gradients of its own weights.
///
/// # Errors
/// When there are fewer operations than stages, pins contradict each other, or an operation has no derivative.
pub fn cut(
    graph: &Graph,
    variables: &[Variable],
    loss: Option<&str>,
    stages: usize,
    pins: &Pins,
) -> Result<Stages> {
    let mut graph = graph.clone();
    graph.operations.retain(|operation| !matches!(operation, OperationIr::Drop(_)));
    let cutter = Cutter::new(&graph, variables, stages, pins)?;
    let mut edges = cutter.forward_edges();
    let mut backward = Vec::new();
    if loss.is_some() {
        for (number, edge) in edges.iter().enumerate() {
            if cutter.depends.contains(&edge.1) {
                backward.push(number);
            }
        }
    }
    let forward = edges.len();
    for &number in &backward {
        let (Edge { name, shape, dtype, from, to, .. }, tensor) = edges[number].clone();
        let name = format!("d_{name}");
        edges.push((Edge { name, shape, dtype, from: to, to: from, backward: true }, tensor));
    }
    let stages = (0..stages)
        .map(|stage| cutter.stage(stage, loss, &edges, forward, &backward))
        .collect::<Result<Vec<_>>>()?;
    Ok(Stages { stages, edges: edges.into_iter().map(|(edge, _)| edge).collect() })
}

struct Cutter<'a> {
    graph: &'a Graph,
    variables: &'a [Variable],
    tensors: HashMap<TensorId, TensorIr>,
    names: BTreeMap<TensorId, String>,
    /// The stage of every operation; none where it depends on constants alone, and everyone computes it who needs it.
    at: Vec<Option<usize>>,
    /// The stage of every tensor that lies in one: results of operations, and variables.
    home: HashMap<TensorId, usize>,
    /// What changes when a variable does.
    depends: BTreeSet<TensorId>,
    work: Vec<f64>,
}

impl<'a> Cutter<'a> {
    fn new(graph: &'a Graph, variables: &'a [Variable], stages: usize, pins: &Pins) -> Result<Self> {
        let logical = Logical { graph: graph.clone(), variables: variables.to_vec() };
        let (tensors, mut names) = (logical.tensors(), logical.names());
        for variable in variables {
            names.insert(variable.tensor, variable.name.clone());
        }
        let operations = &graph.operations;
        let mut constant: BTreeSet<TensorId> = graph.constants.keys().copied().collect();
        let mut placed = Vec::new();
        for (number, operation) in operations.iter().enumerate() {
            if operation.inputs().all(|tensor| constant.contains(&tensor.id)) {
                constant.extend(operation.outputs().map(|tensor| tensor.id));
            } else {
                placed.push(number);
            }
        }
        if placed.len() < stages {
            return Err(Error::usage(format!(
                "{} operations cannot be cut into {stages} stages",
                placed.len()
            )));
        }
        let pinned = pinned(graph, &names, &placed, stages, pins)?;
        let weight: Vec<f64> = placed.iter().map(|&number| work(&operations[number])).collect();
        let crossing = crossing(graph, &tensors, &placed, &constant);
        let starts = starts(&weight, &crossing, stages, &pinned).ok_or_else(|| {
            let told: Vec<String> = pins.iter().map(|(name, stage)| format!("{name}={stage}")).collect();
            Error::usage(format!("no {stages} consecutive stages fit {}", told.join(", ")))
                .hint("what comes later in the network must lie in the same stage or a later one")
        })?;
        let mut at = vec![None; operations.len()];
        for (stage, &start) in starts.iter().enumerate() {
            let end = starts.get(stage + 1).copied().unwrap_or(placed.len());
            placed[start..end].iter().for_each(|&number| at[number] = Some(stage));
        }
        let mut home = HashMap::new();
        for (operation, stage) in operations.iter().zip(&at) {
            let Some(stage) = *stage else { continue };
            operation.outputs().for_each(|tensor| _ = home.insert(tensor.id, stage));
            for tensor in operation.inputs() {
                if variables.iter().any(|variable| variable.tensor == tensor.id) {
                    home.entry(tensor.id).or_insert(stage);
                }
            }
        }
        let mut depends: BTreeSet<TensorId> = variables.iter().map(|variable| variable.tensor).collect();
        for operation in operations {
            if operation.inputs().any(|tensor| depends.contains(&tensor.id)) {
                let floats = operation.outputs().filter(|tensor| tensor.dtype.is_float());
                depends.extend(floats.map(|tensor| tensor.id));
            }
        }
        let work = operations.iter().map(work).collect();
        Ok(Self { graph, variables, tensors, names, at, home, depends, work })
    }

    /// Tensors that a later stage reads, by the stage.
    fn forward_edges(&self) -> Vec<(Edge, TensorId)> {
        let mut seen = BTreeSet::new();
        let mut edges = Vec::new();
        for (operation, stage) in self.graph.operations.iter().zip(&self.at) {
            let Some(to) = *stage else { continue };
            for tensor in operation.inputs() {
                let Some(&from) = self.home.get(&tensor.id) else { continue };
                if from != to && seen.insert((tensor.id, to)) {
                    let name = format!("{} to stage {to}", self.names[&tensor.id]);
                    let TensorIr { shape, dtype, .. } = &self.tensors[&tensor.id];
                    let edge = Edge { name, shape: shape.to_vec(), dtype: *dtype, from, to, backward: false };
                    edges.push((edge, tensor.id));
                }
            }
        }
        edges
    }

    /// The operations of a stage, with those of constants that it needs.
    fn operations(&self, stage: usize, wanted: &BTreeSet<TensorId>) -> Vec<OperationIr> {
        let mut needed = wanted.clone();
        let mut found = Vec::new();
        for (operation, at) in self.graph.operations.iter().zip(&self.at).rev() {
            let is_mine = *at == Some(stage)
                || (at.is_none() && operation.outputs().any(|tensor| needed.contains(&tensor.id)));
            if is_mine {
                needed.extend(operation.inputs().map(|tensor| tensor.id));
                found.push(operation.clone());
            }
        }
        found.reverse();
        found
    }

    fn stage(
        &self,
        stage: usize,
        loss: Option<&str>,
        edges: &[(Edge, TensorId)],
        forward: usize,
        backward: &[usize],
    ) -> Result<Stage> {
        let port = |name: &str, tensor: &TensorIr| Port {
            name: name.into(),
            kind: if tensor.dtype.is_float() { PortKind::Float } else { PortKind::Int },
            shape: tensor.shape.to_vec(),
        };
        let last = self.at.iter().flatten().max().copied().unwrap_or(0);
        // What depends on no operation is given by the first stage.
        let is_given = |output: &Boundary| {
            self.home.get(&output.tensor).map_or(stage == 0, |home| *home == stage) && stage <= last
        };
        let outputs: Vec<(usize, &Boundary)> =
            self.graph.outputs.iter().enumerate().filter(|(_, output)| is_given(output)).collect();
        let wanted = outputs.iter().map(|(_, output)| output.tensor).collect();
        let operations = self.operations(stage, &wanted);
        let reads: BTreeSet<TensorId> = operations
            .iter()
            .flat_map(|operation| operation.inputs().map(|tensor| tensor.id))
            .chain(wanted)
            .collect();

        let mut graph = Graph {
            kind: self.graph.kind.clone(),
            inputs: Vec::new(),
            outputs: outputs.iter().map(|(_, output)| (*output).clone()).collect(),
            operations,
            constants: self
                .graph
                .constants
                .iter()
                .filter(|(id, _)| reads.contains(id))
                .map(|(id, data)| (*id, data.clone()))
                .collect(),
        };
        let (mut fed, mut arrives) = (Vec::new(), Vec::new());
        let is_variable = |id: TensorId| self.variables.iter().any(|variable| variable.tensor == id);
        let inputs = self.graph.inputs.iter().filter(|input| !is_variable(input.tensor));
        for (number, input) in inputs.enumerate().filter(|(_, input)| reads.contains(&input.tensor)) {
            graph.inputs.push(input.clone());
            fed.push(Some(number));
            arrives.push(None);
        }
        let own = self.variables.iter().filter(|variable| self.home.get(&variable.tensor) == Some(&stage));
        let own: Vec<&Variable> = own.collect();
        let (arriving, departing): (Vec<usize>, Vec<usize>) = (
            (0..forward).filter(|&edge| edges[edge].0.to == stage).collect(),
            (0..forward).filter(|&edge| edges[edge].0.from == stage).collect(),
        );
        for &edge in &arriving {
            let tensor = &self.tensors[&edges[edge].1];
            graph.inputs.push(Boundary { port: port(&edges[edge].0.name, tensor), tensor: tensor.id });
            fed.push(None);
            arrives.push(Some(edge));
        }
        let mut given: Vec<Option<usize>> = outputs.iter().map(|(number, _)| Some(*number)).collect();
        let mut departs = vec![None; given.len()];
        let mut depart = |graph: &mut Graph, edge: usize, tensor: TensorId| {
            let port = port(&edges[edge].0.name, &self.tensors[&edges[edge].1]);
            graph.outputs.push(Boundary { port, tensor });
            given.push(None);
            departs.push(Some(edge));
        };
        // The backward edge of a forward one.
        let back = |edge: usize| backward.iter().position(|&of| of == edge).map(|place| forward + place);
        let mut variables = Vec::new();
        match loss {
            None => departing.iter().for_each(|&edge| depart(&mut graph, edge, edges[edge].1)),
            Some(loss) => {
                // Gradients arrive for what departs, and depart for what arrives.
                let seeded: Vec<(usize, usize)> =
                    departing.iter().filter_map(|&edge| Some((edge, back(edge)?))).collect();
                let asked: Vec<(usize, usize)> =
                    arriving.iter().filter_map(|&edge| Some((edge, back(edge)?))).collect();
                let reversed = self.reversed(graph, loss, edges, &seeded, &asked, &own)?;
                graph = reversed.graph;
                variables = reversed.variables;
                for (_, edge) in &seeded {
                    fed.push(None);
                    arrives.push(Some(*edge));
                }
                departing.iter().for_each(|&edge| depart(&mut graph, edge, edges[edge].1));
                for ((_, edge), gradient) in asked.iter().zip(reversed.gradients) {
                    depart(&mut graph, *edge, gradient);
                }
            }
        }
        let mut of_variables: BTreeSet<TensorId> =
            variables.iter().map(|variable| variable.gradient).collect();
        of_variables.extend(graph.outputs.iter().map(|output| output.tensor));
        prune(&mut graph, &of_variables)?;
        let mine = self.at.iter().zip(&self.work).filter(|(at, _)| **at == Some(stage));
        let work = mine.map(|(_, work)| work).sum();
        Ok(Stage { logical: Logical { graph, variables }, fed, arrives, given, departs, work })
    }

    /// A stage with its reverse mode: of the loss, where it is here, and of what departs times the gradients that arrive.
    fn reversed(
        &self,
        mut graph: Graph,
        loss: &str,
        edges: &[(Edge, TensorId)],
        seeded: &[(usize, usize)],
        asked: &[(usize, usize)],
        own: &[&Variable],
    ) -> Result<Reversed> {
        const OBJECTIVE: &str = "objective of the stage";
        let outputs = graph.outputs.clone();
        let mut builder = Builder::new(self.tensors.keys().map(|id| id.value() + 1).max().unwrap_or(0));
        builder.operations = std::mem::take(&mut graph.operations);
        let mut terms: Vec<TensorIr> = Vec::new();
        let of_loss = outputs.iter().find(|output| output.port.name == loss);
        terms.extend(of_loss.map(|output| self.tensors[&output.tensor].clone()));
        for &(forward, backward) in seeded {
            let tensor = self.tensors[&edges[forward].1].clone();
            let seed = builder.provided(&tensor.shape.to_vec(), tensor.dtype);
            let port = Port {
                name: edges[backward].0.name.clone(),
                kind: PortKind::Float,
                shape: tensor.shape.to_vec(),
            };
            graph.inputs.push(Boundary { port, tensor: seed.id });
            terms.push(product_sum(&mut builder, &tensor, &seed).map_err(Error::work)?);
        }
        for variable in own {
            let shape = variable.value.shape().to_vec();
            let port = Port { name: variable.name.clone(), kind: PortKind::Float, shape };
            graph.inputs.push(Boundary { port, tensor: variable.tensor });
        }
        let Some((first, others)) = terms.split_first() else {
            // Nothing here is trained.
            graph.operations = builder.operations;
            return Ok(Reversed { graph, variables: Vec::new(), gradients: Vec::new() });
        };
        let sum = others.iter().try_fold(first.clone(), |sum, term| builder.add(&sum, term));
        let sum = sum.map_err(Error::work)?;
        graph.operations = builder.operations;
        graph.constants.extend(builder.constants);
        let port = Port { name: OBJECTIVE.into(), kind: PortKind::Float, shape: sum.shape.to_vec() };
        graph.outputs = vec![Boundary { port, tensor: sum.id }];
        let names: Vec<&str> = own.iter().map(|variable| variable.name.as_str()).collect();
        let arriving = asked.iter().map(|&(forward, _)| edges[forward].0.name.as_str());
        let wrt: Vec<&str> = names.iter().copied().chain(arriving).collect();
        let mut with = graph.gradient(OBJECTIVE, &wrt)?;
        let mut gradients: Vec<TensorId> = with.outputs.iter().skip(1).map(|output| output.tensor).collect();
        let of_edges = gradients.split_off(own.len());
        with.inputs.retain(|input| own.iter().all(|variable| variable.tensor != input.tensor));
        with.outputs = outputs;
        let variables = own.iter().zip(gradients);
        let variables = variables.map(|(variable, gradient)| Variable { gradient, ..(*variable).clone() });
        Ok(Reversed { graph: with, variables: variables.collect(), gradients: of_edges })
    }
}

struct Reversed {
    graph: Graph,
    variables: Vec<Variable>,
    /// Of what arrives.
    gradients: Vec<TensorId>,
}

/// `sum(x · y)`, `[1]`
fn product_sum(b: &mut Builder, x: &TensorIr, y: &TensorIr) -> Fit<TensorIr> {
    let product = b.mul(x, y)?;
    let dtype = product.dtype;
    b.other(|id| OperationIr::NumericFloat(dtype, Numeric::Sum(ReduceOpIr::create(product, || id))))
}

/// Drops what none of some tensors depends on.
fn prune(graph: &mut Graph, wanted: &BTreeSet<TensorId>) -> Result<()> {
    let mut needed = wanted.clone();
    let mut kept = Vec::new();
    for operation in graph.operations.drain(..).rev() {
        if operation.outputs().any(|tensor| needed.contains(&tensor.id)) {
            needed.extend(operation.inputs().map(|tensor| tensor.id));
            kept.push(operation);
        }
    }
    kept.reverse();
    graph.operations = kept;
    graph.constants.retain(|id, _| needed.contains(id));
    Ok(())
}

/// The stage in which every operation must lie, where a pin says so.
fn pinned(
    graph: &Graph,
    names: &BTreeMap<TensorId, String>,
    placed: &[usize],
    stages: usize,
    pins: &Pins,
) -> Result<Vec<Option<usize>>> {
    let mut pinned = vec![None; placed.len()];
    for (name, stage) in pins {
        if *stage >= stages {
            return Err(Error::usage(format!(
                "{name}={stage}: the last of {stages} stages is {}",
                stages - 1
            )));
        }
        let numbered = || name.strip_prefix('%')?.parse().ok().map(TensorId::new);
        let id = names.iter().find(|(_, known)| *known == name).map(|(id, _)| *id).or_else(numbered);
        let touches = |operation: &OperationIr| {
            let Some(id) = id else { return false };
            operation.outputs().any(|tensor| tensor.id == id)
        };
        let reads = |operation: &OperationIr| {
            let Some(id) = id else { return false };
            operation.inputs().any(|tensor| tensor.id == id)
        };
        let made: Vec<usize> =
            (0..placed.len()).filter(|&place| touches(&graph.operations[placed[place]])).collect();
        let read = (0..placed.len()).filter(|&place| reads(&graph.operations[placed[place]]));
        let places: Vec<usize> = if made.is_empty() { read.collect() } else { made };
        if places.is_empty() {
            return Err(Error::usage(format!("no operation makes or reads a tensor \"{name}\""))
                .hint("names are those of inputs, weights and outputs; %7 is tensor 7"));
        }
        places.into_iter().for_each(|place| pinned[place] = Some(*stage));
    }
    Ok(pinned)
}

/// Bytes of what is made before every operation and read from it on.
fn crossing(
    graph: &Graph,
    tensors: &HashMap<TensorId, TensorIr>,
    placed: &[usize],
    constant: &BTreeSet<TensorId>,
) -> Vec<f64> {
    let mut made: HashMap<TensorId, usize> = HashMap::new();
    let mut read: HashMap<TensorId, usize> = HashMap::new();
    for (place, &number) in placed.iter().enumerate() {
        let operation = &graph.operations[number];
        operation.outputs().for_each(|tensor| _ = made.insert(tensor.id, place));
        operation.inputs().for_each(|tensor| _ = read.insert(tensor.id, place));
    }
    // Differences, summed up.
    let mut change = vec![0.0; placed.len() + 1];
    for (id, &place) in made.iter().filter(|(id, _)| !constant.contains(id)) {
        if let Some(&last) = read.get(id) {
            let tensor = &tensors[id];
            let bytes = (tensor.shape.num_elements() * tensor.dtype.size()) as f64;
            change[place + 1] += bytes;
            change[last + 1] -= bytes;
        }
    }
    let mut sum = 0.0;
    change
        .iter()
        .take(placed.len())
        .map(|change| {
            sum += change;
            sum
        })
        .collect()
}

/// Where stages begin: their work is much as even as can be, and few bytes cross.
fn starts(work: &[f64], crossing: &[f64], stages: usize, pinned: &[Option<usize>]) -> Option<Vec<usize>> {
    /// For fewer bytes, the largest stage may grow and the smallest shrink by so much.
    const SLACK: f64 = 1.2;
    let count = work.len();
    let mut sums = vec![0.0; count + 1];
    (0..count).for_each(|at| sums[at + 1] = sums[at] + work[at]);
    // How far back a stage that ends before `end` may begin.
    let earliest = |stage: usize, end: usize| {
        let stranger = (0..end).rev().find(|&at| pinned[at].is_some_and(|other| other != stage));
        stranger.map_or(0, |at| at + 1)
    };
    // The cheapest cut, where a stage has a cost by its first operation and its work; none where it may not be.
    let cheapest = |cost_of: &dyn Fn(usize, f64) -> Option<f64>| -> Option<Vec<usize>> {
        let mut cost = vec![f64::INFINITY; count + 1];
        cost[0] = 0.0;
        let mut begins: Vec<Vec<usize>> = Vec::new();
        for stage in 0..stages {
            let mut next = vec![f64::INFINITY; count + 1];
            let mut begin = vec![0; count + 1];
            for end in stage + 1..=count {
                for start in earliest(stage, end).max(stage)..end {
                    let Some(mine) = cost_of(start, sums[end] - sums[start]) else { continue };
                    if cost[start] + mine < next[end] {
                        (next[end], begin[end]) = (cost[start] + mine, start);
                    }
                }
            }
            cost = next;
            begins.push(begin);
        }
        let mut end = count;
        let mut found = Vec::new();
        for begin in begins.iter().rev() {
            end = begin[end];
            found.push(end);
        }
        found.reverse();
        cost[count].is_finite().then_some(found)
    };
    let even = cheapest(&|_, work| Some(work * work))?;
    let ends = even.iter().skip(1).copied().chain([count]);
    let works: Vec<f64> = even.iter().zip(ends).map(|(&start, end)| sums[end] - sums[start]).collect();
    let most = SLACK * works.iter().copied().fold(0.0, f64::max);
    let least = works.iter().copied().fold(f64::INFINITY, f64::min) / SLACK;
    cheapest(&|start, work| (least <= work && work <= most).then_some(crossing[start]))
}

#[cfg(test)]
mod tests {
    use super::starts;

    #[test]
    fn stages_are_even_and_cut_where_little_crosses() {
        let free = [None; 6];
        // The third operation writes little.
        let crossing = [0.0, 9.0, 9.0, 1.0, 9.0, 9.0];
        assert_eq!(starts(&[1.0; 6], &crossing, 2, &free), Some(vec![0, 3]));
        assert_eq!(starts(&[1.0; 6], &[0.0, 1.0, 1.0, 9.0, 1.0, 1.0], 2, &free), Some(vec![0, 3]));
        assert_eq!(
            starts(&[1.0, 1.0, 1.0, 1.1, 1.0, 1.0], &[0.0, 9.0, 9.0, 9.0, 1.0, 9.0], 3, &free),
            Some(vec![0, 2, 4])
        );
        // One operation has nearly all work: the others are a stage of their own.
        assert_eq!(
            starts(&[100.0, 1.0, 1.0, 1.0, 1.0, 1.0], &[0.0, 9.0, 9.0, 9.0, 9.0, 1.0], 2, &free),
            Some(vec![0, 1])
        );
        let mut pinned = free;
        pinned[4] = Some(0);
        assert_eq!(starts(&[1.0; 6], &crossing, 2, &pinned), Some(vec![0, 5]));
        pinned[1] = Some(1);
        assert_eq!(starts(&[1.0; 6], &crossing, 2, &pinned), None);
    }
}
