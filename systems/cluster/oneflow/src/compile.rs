//! From the logical to the physical graph (§3): signatures are chosen, conversions inserted.

use std::collections::{BTreeMap, HashMap, HashSet};

use burn::backend::ir::{
    ActivationOperationIr as Activation, BinaryOpIr, FloatOperationIr as Float,
    NumericOperationIr as Numeric, OperationIr, ReduceDimOpIr, TensorId, TensorIr, TensorStatus, UnaryOpIr,
};
use burn::tensor::DType;
use kiln_compiler::operation_name;
use kiln_core::{Error, Result, random_stream};

use crate::boxing::Router;
use crate::graph::{Logical, is_product, read_tensors, work};
use crate::physical::{COMPUTE, LOADER, NETWORK, Node, Physical, Reason, Value, Work};
use crate::sbp::{NdSbp, Placement, Reduction, Sbp};
use crate::select::{Choice, Edge, Node as Item, Problem, Solver};
use crate::signature::{Law, NdSignature, Signature, law_of, on_mesh, worked_axis};

/// What is fixed before signatures are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Parallel {
    /// Nothing: the compiler chooses all
    Auto,
    /// Inputs are split along their first axis, variables are copies
    Data,
    /// Variables are split along their last axis, inputs are copies
    Model,
}

impl Parallel {
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Data => "data",
            Self::Model => "model",
        }
    }
}

/// How signatures are chosen.
#[derive(Debug, Clone)]
pub struct Compiler {
    logical: Logical,
    hints: BTreeMap<String, NdSbp>,
    memory: Option<u64>,
    lambda: f64,
    explain: bool,
    seed: u64,
}

/// Bytes that an operation which everybody computes costs, for each of its multiplications and additions: little, so that
/// it decides between signatures that move as much.
const LAMBDA: f64 = 1e-6;
/// Numbers that an optimiser keeps beside a weight and its gradient.
const STATES: usize = 2;

impl Compiler {
    /// For a logical graph.
    pub fn new(logical: Logical) -> Self {
        Self { logical, hints: BTreeMap::new(), memory: None, lambda: LAMBDA, explain: false, seed: 0 }
    }

    /// Fixes the form of a tensor: of a variable or an input where it is stored, of another where it is read.
    #[must_use]
    pub fn hint(mut self, name: impl Into<String>, sbp: NdSbp) -> Self {
        self.hints.insert(name.into(), sbp);
        self
    }

    /// Fixes inputs and variables; what cannot be split so is copied.
    #[must_use]
    pub fn parallel(mut self, parallel: Parallel, placement: &Placement) -> Self {
        let mesh = &placement.mesh;
        let copies = NdSbp::broadcast(mesh.len());
        let split = |shape: &[usize], axis: Option<usize>| -> NdSbp {
            let form = axis.map(|axis| NdSbp::uniform(Sbp::S(axis), mesh.len()));
            form.filter(|form| is_filled(form, shape, mesh)).unwrap_or_else(|| copies.clone())
        };
        let inputs: Vec<(String, Vec<usize>)> = self
            .logical
            .graph
            .inputs
            .iter()
            .map(|input| (input.port.name.clone(), input.port.shape.clone()))
            .collect();
        let variables: Vec<(String, Vec<usize>)> = self
            .logical
            .variables
            .iter()
            .map(|variable| (variable.name.clone(), variable.value.shape().to_vec()))
            .collect();
        // The axis that is split of a tensor of so many.
        type AxisOf = fn(usize) -> Option<usize>;
        let (of_inputs, of_variables): (AxisOf, AxisOf) = match parallel {
            Parallel::Auto => return self,
            Parallel::Data => (|rank| (rank > 0).then_some(0), |_| None),
            Parallel::Model => (|_| None, |rank| rank.checked_sub(1)),
        };
        self.hints
            .extend(inputs.into_iter().map(|(name, shape)| (name, split(&shape, of_inputs(shape.len())))));
        self.hints.extend(
            variables.into_iter().map(|(name, shape)| (name, split(&shape, of_variables(shape.len())))),
        );
        self
    }

    /// Bounds the bytes of a device.
    #[must_use]
    pub fn memory(mut self, bytes: Option<u64>) -> Self {
        self.memory = bytes;
        self
    }

    /// What a replicated multiplication costs, in bytes.
    #[must_use]
    pub fn lambda(mut self, lambda: f64) -> Self {
        self.lambda = lambda;
        self
    }

    /// Whether the next best signature is noted for every operation.
    #[must_use]
    pub fn explain(mut self, explain: bool) -> Self {
        self.explain = explain;
        self
    }

    /// Chooses signatures and inserts conversions.
    ///
    /// # Errors
    /// When a hint names no tensor or does not fit it, no choice fits all hints, or the graph needs more memory than there
    /// may be.
    pub fn compile(&self, placement: &Placement) -> Result<Physical> {
        self.check_hints(placement)?;
        let Some(limit) = self.memory else { return self.compile_at(placement, 0.0) };
        // Memory has a price, which rises until the graph fits.
        const PRICES: [f64; 6] = [0.0, 0.1, 1.0, 10.0, 100.0, 1e4];
        let mut least: Option<(u64, Physical)> = None;
        for price in PRICES {
            let physical = self.compile_at(placement, price)?;
            let memory = physical.memory(1);
            let needed = (memory.stored * (1 + STATES * usize::from(!self.logical.variables.is_empty()))
                + memory.shared) as u64;
            if needed <= limit {
                return Ok(physical);
            }
            if least.as_ref().is_none_or(|(bytes, _)| needed < *bytes) {
                least = Some((needed, physical));
            }
        }
        let (needed, physical) = least.ok_or_else(|| Error::work("nothing was compiled"))?;
        let largest = physical.memory(1).largest;
        let largest: Vec<String> =
            largest.into_iter().map(|(name, bytes)| format!("{name} {bytes} bytes")).collect();
        Err(Error::work(format!(
            "a device needs {needed} bytes, and {limit} are allowed; the largest are {}",
            largest.join(", ")
        ))
        .hint("allow more, take more devices, or split the largest by hints such as --hint name=S0"))
    }

    fn check_hints(&self, placement: &Placement) -> Result<()> {
        let names = self.logical.names();
        let tensors = self.logical.tensors();
        for (name, sbp) in &self.hints {
            let found = names.iter().find(|(_, known)| *known == name).map(|(id, _)| *id);
            let numbered = || name.strip_prefix('%')?.parse().ok().map(TensorId::new);
            let Some(tensor) = found.or_else(numbered).and_then(|id| tensors.get(&id)) else {
                let near = nearest(name, names.values());
                return Err(Error::usage(format!("the graph has no tensor \"{name}\""))
                    .hint(format!("near: {}", near.join(", "))));
            };
            sbp.check(name, &tensor.shape, &placement.mesh)?;
            let stored = self.logical.variables.iter().any(|variable| variable.tensor == tensor.id)
                || self.logical.graph.inputs.iter().any(|input| input.tensor == tensor.id)
                || self.logical.graph.constants.contains_key(&tensor.id);
            if stored && sbp.is_partial() {
                return Err(Error::usage(format!(
                    "{name} is stored, and cannot be {sbp}: partial sums have no one value to keep"
                ))
                .hint("B or a split"));
            }
        }
        Ok(())
    }

    fn hinted(&self, names: &BTreeMap<TensorId, String>, id: TensorId) -> Option<&NdSbp> {
        let by_name = names.get(&id).and_then(|name| self.hints.get(name));
        by_name.or_else(|| self.hints.get(&format!("%{}", id.value())))
    }

    fn compile_at(&self, placement: &Placement, price: f64) -> Result<Physical> {
        let mut router = Router::new(&placement.mesh);
        let plan = Plan::new(self, placement, price, &mut router)?;
        let starts = self.starts(&plan, placement, &mut router);
        let solver = Solver::new(&plan.problem, &mut router);
        let chosen = solver.solve(&starts, &mut random_stream(self.seed, "select", 0))?;
        let reasons = if self.explain { plan.reasons(&solver, &chosen) } else { Vec::new() };
        let mut writer = Writer::new(self, &plan, &mut router);
        writer.write(&chosen)?;
        let (values, nodes) = (writer.values, writer.nodes);
        Ok(Physical {
            placement: placement.clone(),
            values,
            nodes,
            reasons,
            undivided: plan.undivided.clone(),
        })
    }

    /// Assignments to begin with: the best in data and in model parallel, so that the choice is never worse than these.
    fn starts(&self, plan: &Plan, placement: &Placement, router: &mut Router) -> Vec<Vec<usize>> {
        let best_within = |parallel: Parallel| {
            let forms = self.clone().parallel(parallel, placement).hints;
            let mut problem = plan.problem.clone();
            let mut fixed = vec![None; problem.nodes.len()];
            let nodes = problem.nodes.iter_mut().zip(&mut fixed).zip(&plan.roles);
            for ((node, fixed), _) in
                nodes.filter(|(_, role)| matches!(role, Role::Variable(_) | Role::Input(_)))
            {
                let form = forms.get(&node.name);
                let choice = node.choices.iter().position(|choice| Some(&choice.outputs[0]) == form);
                if let Some(choice) = choice {
                    node.choices = vec![node.choices[choice].clone()];
                    *fixed = Some(choice);
                }
            }
            let solver = Solver::new(&problem, router);
            let found = solver.solve(&[], &mut random_stream(self.seed, "select", 0)).ok()?;
            Some(found.into_iter().zip(fixed).map(|(choice, fixed)| fixed.unwrap_or(choice)).collect())
        };
        [Parallel::Data, Parallel::Model].into_iter().filter_map(best_within).collect()
    }
}

/// What a node of the problem stands for.
#[derive(Debug, Clone, Copy)]
enum Role {
    Variable(usize),
    Input(usize),
    Constant(TensorId),
    Operation(usize),
    /// A tensor that is read in a form of the user's.
    Hint(TensorId),
    Output(usize),
}

/// The logical graph as a problem of selection.
struct Plan {
    problem: Problem,
    roles: Vec<Role>,
    /// The signatures behind an operation's choices.
    signatures: Vec<Vec<NdSignature>>,
    undivided: Vec<(String, f64)>,
    tensors: HashMap<TensorId, TensorIr>,
    names: BTreeMap<TensorId, String>,
}

impl Plan {
    fn new(compiler: &Compiler, placement: &Placement, price: f64, router: &mut Router) -> Result<Self> {
        let logical = &compiler.logical;
        let (tensors, names) = (logical.tensors(), logical.names());
        let mut plan = Self {
            problem: Problem { edges: Vec::new(), nodes: Vec::new() },
            roles: Vec::new(),
            signatures: Vec::new(),
            undivided: Vec::new(),
            tensors,
            names,
        };
        let mesh = &placement.mesh;
        // The edge from which a tensor is read: behind its hint, where there is one.
        let mut edges: HashMap<TensorId, usize> = HashMap::new();
        let read = read_tensors(&logical.graph);
        let memory = |shape: &[usize], dtype: DType, sbp: &NdSbp, copies: usize| {
            let origin = vec![0; mesh.len()];
            let local = crate::sbp::Region::local(shape, mesh, sbp, &origin);
            price * (local.elements() * dtype.size() * copies * placement.len()) as f64
        };
        let mut late = Vec::new();
        for (at, variable) in logical.variables.iter().enumerate() {
            let tensor = plan.tensors[&variable.tensor].clone();
            let forms = match compiler.hinted(&plan.names, tensor.id) {
                Some(hint) => vec![hint.clone()],
                None => stored_forms(&tensor.shape, mesh),
            };
            let choices = forms.into_iter().map(|form| Choice {
                cost: memory(&tensor.shape, tensor.dtype, &form, 1 + STATES),
                inputs: vec![form.clone()],
                outputs: vec![form],
            });
            let edge = plan.edge(&tensor);
            edges.insert(tensor.id, edge);
            // Its gradient has no edge yet.
            late.push((plan.problem.nodes.len(), variable.gradient));
            plan.node(
                Role::Variable(at),
                variable.name.clone(),
                Vec::new(),
                vec![edge],
                choices.collect(),
                Vec::new(),
            );
        }
        let stored =
            logical.graph.inputs.iter().enumerate().map(|(at, input)| (Role::Input(at), input.tensor));
        let constants = logical.graph.constants.keys().map(|&id| (Role::Constant(id), id));
        for (role, id) in stored.chain(constants).filter(|(_, id)| read.contains(id)) {
            let tensor = plan.tensors[&id].clone();
            let forms = match compiler.hinted(&plan.names, id) {
                Some(hint) => vec![hint.clone()],
                None => stored_forms(&tensor.shape, mesh),
            };
            let choices = forms.into_iter().map(|form| Choice {
                cost: memory(&tensor.shape, tensor.dtype, &form, 1),
                inputs: Vec::new(),
                outputs: vec![form],
            });
            let edge = plan.edge(&tensor);
            edges.insert(id, edge);
            let name = plan.names[&id].clone();
            plan.node(role, name, Vec::new(), vec![edge], choices.collect(), Vec::new());
        }
        let mut extremes: HashSet<TensorId> = HashSet::new();
        for (at, operation) in logical.graph.operations.iter().enumerate() {
            let kind = operation_name(operation)?;
            let signatures = useful(operation, &kind, mesh, &mut extremes)?;
            if signatures.iter().all(|signature| signature.0.iter().all(|one| !one.divides()))
                && placement.len() > 1
            {
                plan.undivided.push((format!("{kind} (operation {at})"), work(operation)));
            }
            let choices: Vec<Choice> = signatures
                .iter()
                .map(|signature| {
                    let inputs: Vec<NdSbp> =
                        (0..operation.inputs().count()).map(|at| signature.input(at)).collect();
                    let outputs: Vec<NdSbp> =
                        (0..operation.outputs().count()).map(|at| signature.output(at)).collect();
                    let held = operation.outputs().zip(&outputs);
                    let held: f64 =
                        held.map(|(tensor, form)| memory(&tensor.shape, tensor.dtype, form, 1)).sum();
                    let divided: usize = signature
                        .0
                        .iter()
                        .zip(mesh)
                        .filter(|(one, _)| one.divides())
                        .map(|(_, n)| n)
                        .product();
                    let replicated = work(operation) * (1.0 - divided as f64 / placement.len() as f64);
                    let cost =
                        compiler.lambda * replicated + held + in_parts_bytes(operation, signature, router);
                    Choice { inputs, outputs, cost }
                })
                .collect();
            let inputs = operation.inputs().map(|tensor| edges[&tensor.id]).collect();
            let outputs: Vec<usize> = operation.outputs().map(|tensor| plan.edge(tensor)).collect();
            for (tensor, &edge) in operation.outputs().zip(&outputs) {
                edges.insert(tensor.id, edge);
            }
            let name = format!(
                "{kind} {}",
                operation.outputs().next().map_or_else(String::new, |out| plan.names[&out.id].clone())
            );
            plan.node(Role::Operation(at), name, inputs, outputs, choices, signatures);
            for tensor in operation.outputs() {
                let Some(hint) = compiler.hinted(&plan.names, tensor.id) else { continue };
                let choice = Choice { inputs: vec![hint.clone()], outputs: vec![hint.clone()], cost: 0.0 };
                let (before, after) = (edges[&tensor.id], plan.edge(tensor));
                edges.insert(tensor.id, after);
                let name = format!("{} as {hint}", plan.names[&tensor.id]);
                plan.node(Role::Hint(tensor.id), name, vec![before], vec![after], vec![choice], Vec::new());
            }
        }
        for (node, gradient) in late {
            plan.problem.nodes[node].inputs = vec![edges[&gradient]];
        }
        for (at, output) in logical.graph.outputs.iter().enumerate() {
            let shape = plan.tensors[&output.tensor].shape.to_vec();
            let forms = stored_forms(&shape, mesh);
            let choices =
                forms.into_iter().map(|form| Choice { inputs: vec![form], outputs: Vec::new(), cost: 0.0 });
            let name = output.port.name.clone();
            plan.node(
                Role::Output(at),
                name,
                vec![edges[&output.tensor]],
                Vec::new(),
                choices.collect(),
                Vec::new(),
            );
        }
        Ok(plan)
    }

    fn edge(&mut self, tensor: &TensorIr) -> usize {
        let name = self.names.get(&tensor.id).cloned().unwrap_or_default();
        self.problem.edges.push(Edge { name, shape: tensor.shape.to_vec(), element: tensor.dtype.size() });
        self.problem.edges.len() - 1
    }

    fn node(
        &mut self,
        role: Role,
        name: String,
        inputs: Vec<usize>,
        outputs: Vec<usize>,
        choices: Vec<Choice>,
        signatures: Vec<NdSignature>,
    ) {
        self.problem.nodes.push(Item { name, inputs, outputs, choices });
        self.roles.push(role);
        self.signatures.push(signatures);
    }

    /// What was chosen for every operation, and what the next best would cost.
    fn reasons(&self, solver: &Solver<'_>, chosen: &[usize]) -> Vec<Reason> {
        let cost = solver.cost(chosen);
        let operations = self.roles.iter().enumerate().filter(|(_, role)| matches!(role, Role::Operation(_)));
        operations
            .map(|(at, _)| {
                let mut other = chosen.to_vec();
                let others =
                    (0..self.signatures[at].len()).filter(|&choice| choice != chosen[at]).map(|choice| {
                        other[at] = choice;
                        (choice, solver.cost(&other) - cost)
                    });
                let second = others.filter(|(_, more)| more.is_finite()).min_by(|a, b| a.1.total_cmp(&b.1));
                Reason {
                    node: self.problem.nodes[at].name.clone(),
                    chosen: self.signatures[at][chosen[at]].to_string(),
                    second: second.map(|(choice, _)| self.signatures[at][choice].to_string()),
                    more_bytes: second.map(|(_, more)| more),
                }
            })
            .collect()
    }
}

/// Every form in which a tensor can be kept that leaves no part empty.
fn stored_forms(shape: &[usize], mesh: &[usize]) -> Vec<NdSbp> {
    let mut forms = vec![NdSbp(Vec::new())];
    for &extent in mesh {
        let splits = (0..shape.len()).filter(|_| extent > 1).map(Sbp::S);
        let kinds: Vec<Sbp> = splits.chain([Sbp::B]).collect();
        forms = forms
            .iter()
            .flat_map(|form| kinds.iter().map(|&kind| NdSbp([&form.0[..], &[kind]].concat())))
            .collect();
    }
    forms.retain(|form| is_filled(form, shape, mesh));
    forms
}

/// Whether every device has a part.
fn is_filled(form: &NdSbp, shape: &[usize], mesh: &[usize]) -> bool {
    (0..shape.len()).all(|axis| {
        let pieces: usize =
            form.0.iter().zip(mesh).filter(|(sbp, _)| sbp.axis() == Some(axis)).map(|(_, n)| n).product();
        pieces == 1 || pieces <= shape[axis]
    })
}

/// The signatures that are worth a look: no empty parts, products divided on every axis of the mesh where they can be, and
/// partial extremes only where there are any.
fn useful(
    operation: &OperationIr,
    kind: &str,
    mesh: &[usize],
    extremes: &mut HashSet<TensorId>,
) -> Result<Vec<NdSignature>> {
    let law = law_of(kind);
    let extreme = operation.inputs().any(|tensor| extremes.contains(&tensor.id))
        || matches!(law, Some(Law::Reduce(Reduction::Max | Reduction::Min)));
    if extreme && matches!(law, Some(Law::Reduce(_) | Law::Move)) {
        extremes.extend(operation.outputs().map(|tensor| tensor.id));
    }
    let is_extreme = |sbp: &Sbp| matches!(sbp, Sbp::P(Reduction::Max | Reduction::Min));
    let filled = |signature: &NdSignature| {
        let inputs = operation
            .inputs()
            .enumerate()
            .all(|(at, tensor)| is_filled(&signature.input(at), &tensor.shape, mesh));
        inputs
            && operation
                .outputs()
                .enumerate()
                .all(|(at, tensor)| is_filled(&signature.output(at), &tensor.shape, mesh))
    };
    // On an axis of one device everything is the same.
    let plain = |signature: &NdSignature| {
        signature
            .0
            .iter()
            .zip(mesh)
            .all(|(one, &n)| n > 1 || (!one.divides() && !one.outputs.contains(&Sbp::SUM)))
    };
    let mut found = on_mesh(operation, mesh)?;
    found.retain(|signature| {
        let forms = || signature.0.iter().flat_map(|one| one.inputs.iter().chain(&one.outputs));
        filled(signature) && plain(signature) && (extreme || !forms().any(is_extreme))
    });
    if is_product(kind) {
        let divided = |signature: &NdSignature| {
            signature.0.iter().zip(mesh).filter(|(one, n)| **n > 1 && one.divides()).count()
        };
        let most = found.iter().map(divided).max().unwrap_or(0);
        found.retain(|signature| divided(signature) == most);
    }
    Ok(found)
}

/// Bytes of the two reductions with which an operation that normalises over a split axis is computed.
fn in_parts_bytes(operation: &OperationIr, signature: &NdSignature, router: &mut Router) -> f64 {
    if signature.0.iter().all(|one| !one.in_parts) {
        return 0.0;
    }
    let (Some(input), Some(axis)) = (operation.inputs().next(), worked_axis(operation)) else { return 0.0 };
    let mut shape = input.shape.to_vec();
    shape[axis] = 1;
    let form = |kind: Sbp| {
        NdSbp(signature.0.iter().map(|one| if one.in_parts { kind } else { one.inputs[0] }).collect())
    };
    let bytes = router.bytes(&shape, input.dtype.size(), &form(Sbp::SUM), &form(Sbp::B));
    2.0 * bytes.unwrap_or(0) as f64
}

/// The names that differ least from one that is not there.
fn nearest<'a>(name: &str, known: impl Iterator<Item = &'a String>) -> Vec<String> {
    let distance = |other: &str| {
        let (a, b): (Vec<char>, Vec<char>) = (name.chars().collect(), other.chars().collect());
        let mut row: Vec<usize> = (0..=b.len()).collect();
        for (i, x) in a.iter().enumerate() {
            let mut before = row[0];
            row[0] = i + 1;
            for (j, y) in b.iter().enumerate() {
                let next = (before + usize::from(x != y)).min(row[j] + 1).min(row[j + 1] + 1);
                before = std::mem::replace(&mut row[j + 1], next);
            }
        }
        row[b.len()]
    };
    let mut names: Vec<&String> = known.collect();
    names.sort_by_key(|other| distance(other));
    names.into_iter().take(4).cloned().collect()
}

/// Writes the physical graph.
struct Writer<'a> {
    plan: &'a Plan,
    logical: &'a Logical,
    router: &'a mut Router,
    values: Vec<Value>,
    nodes: Vec<Node>,
    /// The value of an edge in a form.
    of: HashMap<(usize, NdSbp), usize>,
    /// The form in which an edge was written.
    written: HashMap<usize, NdSbp>,
    next: u64,
}

impl<'a> Writer<'a> {
    fn new(compiler: &'a Compiler, plan: &'a Plan, router: &'a mut Router) -> Self {
        let logical = &compiler.logical;
        let next = logical.next_id();
        Self {
            plan,
            logical,
            router,
            values: Vec::new(),
            nodes: Vec::new(),
            of: HashMap::new(),
            written: HashMap::new(),
            next,
        }
    }

    fn write(&mut self, chosen: &[usize]) -> Result<()> {
        let mut updates = Vec::new();
        // A gradient is brought to its variable's form as soon as it is there, so that this goes on beside what follows.
        let mut awaited: HashMap<usize, NdSbp> = HashMap::new();
        for (at, role) in self.plan.roles.iter().enumerate() {
            if let Role::Variable(variable) = role {
                let item = &self.plan.problem.nodes[at];
                let form = item.choices[chosen[at]].inputs[0].clone();
                awaited.insert(item.inputs[0], form.clone());
                updates.push((*variable, item.inputs[0], form));
            }
        }
        for (at, role) in self.plan.roles.iter().enumerate() {
            let item = &self.plan.problem.nodes[at];
            let choice = &item.choices[chosen[at]];
            let name = item.name.clone();
            let inputs = match role {
                Role::Variable(_) => Vec::new(),
                _ => {
                    let read = item.inputs.iter().zip(&choice.inputs);
                    read.map(|(&edge, form)| self.read(edge, form)).collect::<Result<Vec<_>>>()?
                }
            };
            match role {
                Role::Hint(_) => {
                    self.written.insert(item.outputs[0], choice.outputs[0].clone());
                    self.of.insert((item.outputs[0], choice.outputs[0].clone()), inputs[0]);
                    continue;
                }
                Role::Operation(number) => {
                    let operation = &self.logical.graph.operations[*number];
                    let signature = &self.plan.signatures[at][chosen[at]];
                    if signature.0.iter().any(|one| one.in_parts) {
                        self.write_in_parts(operation, signature, inputs[0], item.outputs[0])?;
                    } else {
                        let outputs = self.outputs(&item.outputs, &choice.outputs);
                        let work = Work::Compute(Box::new(operation.clone()), signature.clone());
                        self.nodes.push(Node { name, work, inputs, outputs, queue: COMPUTE });
                    }
                }
                Role::Variable(number) => {
                    self.push(name, Work::Variable(*number), inputs, item, choice, COMPUTE)
                }
                Role::Input(number) => self.push(name, Work::Input(*number), inputs, item, choice, LOADER),
                Role::Constant(id) => self.push(name, Work::Constant(*id), inputs, item, choice, COMPUTE),
                Role::Output(number) => self.push(name, Work::Output(*number), inputs, item, choice, COMPUTE),
            }
            for edge in &item.outputs {
                if let Some(form) = awaited.get(edge).cloned() {
                    self.read(*edge, &form)?;
                }
            }
        }
        for (variable, edge, form) in updates {
            let name = format!("update {}", self.logical.variables[variable].name);
            let inputs = vec![self.read(edge, &form)?];
            self.nodes.push(Node {
                name,
                work: Work::Update(variable),
                inputs,
                outputs: Vec::new(),
                queue: COMPUTE,
            });
        }
        Ok(())
    }

    fn push(
        &mut self,
        name: String,
        work: Work,
        inputs: Vec<usize>,
        item: &Item,
        choice: &Choice,
        queue: usize,
    ) {
        let outputs = self.outputs(&item.outputs, &choice.outputs);
        self.nodes.push(Node { name, work, inputs, outputs, queue });
    }

    fn outputs(&mut self, edges: &[usize], forms: &[NdSbp]) -> Vec<usize> {
        edges.iter().zip(forms).map(|(&edge, form)| self.output(edge, form)).collect()
    }

    /// A new value: an edge in the form in which it is written.
    fn output(&mut self, edge: usize, form: &NdSbp) -> usize {
        self.written.insert(edge, form.clone());
        self.value_of(edge, form)
    }

    fn value_of(&mut self, edge: usize, form: &NdSbp) -> usize {
        let Edge { name, shape, .. } = &self.plan.problem.edges[edge];
        let value =
            Value { name: name.clone(), shape: shape.clone(), dtype: self.dtype(edge), sbp: form.clone() };
        self.values.push(value);
        self.of.insert((edge, form.clone()), self.values.len() - 1);
        self.values.len() - 1
    }

    fn dtype(&self, edge: usize) -> DType {
        let producer = self
            .plan
            .problem
            .nodes
            .iter()
            .zip(&self.plan.roles)
            .find(|(item, _)| item.outputs.contains(&edge));
        let Some((item, role)) = producer else { return DType::F32 };
        let place = item.outputs.iter().position(|other| *other == edge).unwrap_or(0);
        let id = match role {
            Role::Variable(at) => self.logical.variables[*at].tensor,
            Role::Input(at) => self.logical.graph.inputs[*at].tensor,
            Role::Constant(id) | Role::Hint(id) => *id,
            Role::Operation(at) => match self.logical.graph.operations[*at].outputs().nth(place) {
                Some(tensor) => return tensor.dtype,
                None => return DType::F32,
            },
            Role::Output(_) => return DType::F32,
        };
        self.plan.tensors.get(&id).map_or(DType::F32, |tensor| tensor.dtype)
    }

    /// The value of an edge in a form, converted where it is not there yet.
    fn read(&mut self, edge: usize, form: &NdSbp) -> Result<usize> {
        if let Some(&value) = self.of.get(&(edge, form.clone())) {
            return Ok(value);
        }
        let from = self.written.get(&edge).cloned();
        let from = from.ok_or_else(|| Error::work("a tensor is read before it is written"))?;
        let Edge { shape, element, .. } = self.plan.problem.edges[edge].clone();
        let path = self.router.path(&shape, element, &from, form)?;
        let source = self.of[&(edge, from.clone())];
        let target = self.value_of(edge, form);
        self.nodes.push(boxing(&self.values, source, target, path));
        Ok(target)
    }

    /// The operations into which one is taken apart that normalises over a split axis: with the maximum and the sum over
    /// all parts between them.
    fn write_in_parts(
        &mut self,
        operation: &OperationIr,
        signature: &NdSignature,
        input: usize,
        edge: usize,
    ) -> Result<()> {
        let OperationIr::Activation(Activation::Softmax(op) | Activation::LogSoftmax(op)) = operation else {
            return Err(Error::work("an operation cannot be computed in parts"));
        };
        let logarithm = matches!(operation, OperationIr::Activation(Activation::LogSoftmax(_)));
        let (axis, dtype) = (op.axis, op.input.dtype);
        let x = TensorIr { status: TensorStatus::ReadOnly, ..op.input.clone() };
        let shape = x.shape.to_vec();
        let mut row = shape.clone();
        row[axis] = 1;
        let forms: Vec<Sbp> = signature.0.iter().map(|one| one.inputs[0]).collect();
        let split: Vec<bool> = signature.0.iter().map(|one| one.in_parts).collect();
        let with = |kind: Sbp| {
            NdSbp(forms.iter().zip(&split).map(|(&form, &split)| if split { kind } else { form }).collect())
        };
        let (whole, of_row) = (NdSbp(forms.clone()), with(Sbp::B));
        let name = self.plan.problem.edges[edge].name.clone();
        let intermediate = |writer: &mut Self, what: &str, shape: &[usize], sbp: NdSbp| {
            writer.values.push(Value { name: format!("{name} {what}"), shape: shape.to_vec(), dtype, sbp });
            writer.values.len() - 1
        };
        let signed = |inputs: &[&NdSbp], output: &NdSbp| {
            let one = |at: usize| Signature {
                inputs: inputs.iter().map(|nd| nd.0[at]).collect(),
                outputs: vec![output.0[at]],
                in_parts: false,
            };
            NdSignature((0..forms.len()).map(one).collect())
        };
        let reduce = |writer: &mut Self,
                      x: &TensorIr,
                      value: usize,
                      kind: Reduction,
                      what: &str|
         -> Result<(TensorIr, usize)> {
            let id = writer.fresh();
            let reduced = ReduceDimOpIr::create(x.clone(), axis, 1, || id);
            let out = read_only(&reduced.out);
            let operation = match kind {
                Reduction::Max => Numeric::MaxDim(reduced),
                _ => Numeric::SumDim(reduced),
            };
            let partial = with(Sbp::P(kind));
            let found = intermediate(writer, what, &row, partial.clone());
            writer.compute(
                what,
                OperationIr::NumericFloat(dtype, operation),
                signed(&[&whole], &partial),
                vec![value],
                found,
            );
            let total = intermediate(writer, what, &row, of_row.clone());
            let path = writer.router.path(&row, dtype.size(), &partial, &of_row)?;
            let node = boxing(&writer.values, found, total, path);
            writer.nodes.push(node);
            Ok((out, total))
        };

        let (maximum, largest) = reduce(self, &x, input, Reduction::Max, "maximum")?;
        let id = self.fresh();
        let shifted = BinaryOpIr::create(x.clone(), maximum, || id);
        let below = read_only(&shifted.out);
        let value = intermediate(self, "shifted", &shape, whole.clone());
        let rowed = signed(&[&whole, &of_row], &whole);
        self.compute(
            "shift",
            OperationIr::NumericFloat(dtype, Numeric::Sub(shifted)),
            rowed.clone(),
            vec![input, largest],
            value,
        );
        let id = self.fresh();
        let powers = UnaryOpIr::create(below.clone(), || id);
        let power = read_only(&powers.out);
        let raised = intermediate(self, "exponentials", &shape, whole.clone());
        let single = signed(&[&whole], &whole);
        self.compute(
            "exponentials",
            OperationIr::Float(dtype, Float::Exp(powers)),
            single,
            vec![value],
            raised,
        );
        let (sum, total) = reduce(self, &power, raised, Reduction::Sum, "sum")?;
        let out = self.output(edge, &whole);
        if logarithm {
            let id = self.fresh();
            let log = UnaryOpIr::create(sum, || id);
            let logged = read_only(&log.out);
            let level = intermediate(self, "logarithm", &row, of_row.clone());
            let on_rows = signed(&[&of_row], &of_row);
            self.compute(
                "logarithm",
                OperationIr::Float(dtype, Float::Log(log)),
                on_rows,
                vec![total],
                level,
            );
            let last = BinaryOpIr::create(below, logged, || op.out.id);
            self.compute(
                "log-softmax",
                OperationIr::NumericFloat(dtype, Numeric::Sub(last)),
                rowed,
                vec![value, level],
                out,
            );
        } else {
            let last = BinaryOpIr::create(power, sum, || op.out.id);
            self.compute(
                "softmax",
                OperationIr::NumericFloat(dtype, Numeric::Div(last)),
                rowed,
                vec![raised, total],
                out,
            );
        }
        Ok(())
    }

    fn fresh(&mut self) -> TensorId {
        self.next += 1;
        TensorId::new(self.next - 1)
    }

    fn compute(
        &mut self,
        name: &str,
        operation: OperationIr,
        signature: NdSignature,
        inputs: Vec<usize>,
        output: usize,
    ) {
        let work = Work::Compute(Box::new(operation), signature);
        self.nodes.push(Node { name: name.into(), work, inputs, outputs: vec![output], queue: COMPUTE });
    }
}

fn read_only(tensor: &TensorIr) -> TensorIr {
    TensorIr { status: TensorStatus::ReadOnly, ..tensor.clone() }
}

fn boxing(values: &[Value], source: usize, target: usize, path: Vec<crate::boxing::Step>) -> Node {
    let (from, to) = (&values[source], &values[target]);
    // Cutting and zero-filling need nobody else.
    let talks = path.iter().any(|step| {
        use crate::boxing::Collective::{Place, Slice};
        !matches!(step.collective(), Slice | Place)
    });
    Node {
        name: format!("{} {} → {}", to.name, from.sbp, to.sbp),
        work: Work::Boxing(path),
        inputs: vec![source],
        outputs: vec![target],
        queue: if talks { NETWORK } else { COMPUTE },
    }
}
