//! The logical graph as a problem of selection.

use std::collections::{BTreeMap, HashMap, HashSet};

use burn::backend::ir::{OperationIr, TensorId, TensorIr};
use burn::tensor::DType;
use kiln_compiler::operation_name;
use kiln_core::Result;

use super::{Compiler, STATES};
use crate::boxing::Router;
use crate::graph::{is_product, read_tensors, work};
use crate::physical::Reason;
use crate::sbp::{NdSbp, Placement, Reduction, Region, Sbp};
use crate::select::{Choice, Edge, Node, Problem, Solver};
use crate::signature::{Law, NdSignature, law_of, on_mesh, worked_axis};

/// What a node of the problem stands for.
#[derive(Debug, Clone, Copy)]
pub(super) enum Role {
    Variable(usize),
    Input(usize),
    Constant(TensorId),
    Operation(usize),
    /// A tensor that is read in a form of the user's.
    Hint,
    Output(usize),
}

/// The logical graph as a problem of selection.
pub(super) struct Plan {
    pub problem: Problem,
    pub roles: Vec<Role>,
    /// The signatures behind an operation's choices.
    pub signatures: Vec<Vec<NdSignature>>,
    pub undivided: Vec<(String, f64)>,
    pub tensors: HashMap<TensorId, TensorIr>,
    pub names: BTreeMap<TensorId, String>,
}

impl Plan {
    pub fn new(compiler: &Compiler, placement: &Placement, price: f64, router: &mut Router) -> Result<Self> {
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
            let local = Region::local(shape, mesh, sbp, &origin);
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
            let arrives = compiler.arriving.contains(&plan.names[&id]);
            let choices = forms.into_iter().map(|form| {
                let bytes = (tensor.shape.num_elements() * tensor.dtype.size()) as f64;
                let copies: usize =
                    form.0.iter().zip(mesh).filter(|(sbp, _)| **sbp == Sbp::B).map(|(_, n)| n).product();
                let sent = if arrives { compiler.cost.of_byte() * bytes * copies as f64 } else { 0.0 };
                Choice {
                    cost: sent + memory(&tensor.shape, tensor.dtype, &form, 1),
                    inputs: Vec::new(),
                    outputs: vec![form],
                }
            });
            let choices: Vec<Choice> = choices.collect();
            let edge = plan.edge(&tensor);
            edges.insert(id, edge);
            let name = plan.names[&id].clone();
            plan.node(role, name, Vec::new(), vec![edge], choices, Vec::new());
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
                    let cost = compiler.lambda * compiler.cost.of_byte() * replicated
                        + held
                        + in_parts_cost(operation, signature, router);
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
                plan.node(Role::Hint, name, vec![before], vec![after], vec![choice], Vec::new());
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
        self.problem.edges.push(Edge { name, shape: tensor.shape.to_vec(), dtype: tensor.dtype });
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
        self.problem.nodes.push(Node { name, inputs, outputs, choices });
        self.roles.push(role);
        self.signatures.push(signatures);
    }

    /// What was chosen for every operation, and what the next best would cost.
    pub fn reasons(&self, solver: &Solver<'_>, chosen: &[usize]) -> Vec<Reason> {
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
                    more: second.map(|(_, more)| more),
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
pub(super) fn is_filled(form: &NdSbp, shape: &[usize], mesh: &[usize]) -> bool {
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

/// Cost of the two reductions with which an operation that normalises over a split axis is computed.
fn in_parts_cost(operation: &OperationIr, signature: &NdSignature, router: &mut Router) -> f64 {
    if signature.0.iter().all(|one| !one.in_parts) {
        return 0.0;
    }
    let (Some(input), Some(axis)) = (operation.inputs().next(), worked_axis(operation)) else { return 0.0 };
    let mut shape = input.shape.to_vec();
    shape[axis] = 1;
    let form = |kind: Sbp| {
        NdSbp(signature.0.iter().map(|one| if one.in_parts { kind } else { one.inputs[0] }).collect())
    };
    2.0 * router.cost(&shape, input.dtype.size(), &form(Sbp::SUM), &form(Sbp::B)).unwrap_or(0.0)
}
