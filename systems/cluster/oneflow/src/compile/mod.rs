//! From the logical to the physical graph (§3): signatures are chosen, conversions inserted.

mod plan;
mod write;

use std::collections::{BTreeMap, BTreeSet};

use burn::backend::ir::TensorId;
use kiln_core::{Error, Result, random_stream};

use crate::boxing::{Cost, Router};
use crate::graph::Logical;
use crate::physical::{Physical, QUEUES};
use crate::sbp::{NdSbp, Placement, Sbp};
use crate::select::Solver;
use plan::{Plan, Role, is_filled};
use write::Writer;

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
    cost: Cost,
    explain: bool,
    seed: u64,
    /// Inputs that other devices have.
    arriving: BTreeSet<String>,
}

/// Bytes that an operation which everybody computes costs, for each of its multiplications and additions: little, so that
/// it decides between signatures that move as much.
const LAMBDA: f64 = 1e-6;
/// Numbers that an optimiser keeps beside a weight and its gradient.
const STATES: usize = 2;

impl Compiler {
    /// For a logical graph.
    pub fn new(logical: Logical) -> Self {
        Self {
            logical,
            hints: BTreeMap::new(),
            memory: None,
            lambda: LAMBDA,
            cost: Cost::Bytes,
            explain: false,
            seed: 0,
            arriving: BTreeSet::new(),
        }
    }

    /// Fixes the form of a tensor: of a variable or an input where it is stored, of another where it is read.
    #[must_use]
    pub fn hint(mut self, name: impl Into<String>, sbp: NdSbp) -> Self {
        self.hints.insert(name.into(), sbp);
        self
    }

    /// Says which inputs come from other devices, so that every copy of them is sent.
    #[must_use]
    pub fn arriving(mut self, names: Vec<String>) -> Self {
        self.arriving.extend(names);
        self
    }

    /// Whether the graph has a tensor of this name.
    pub fn knows(&self, name: &str) -> bool {
        let numbered = || name.strip_prefix('%')?.parse().ok().map(TensorId::new);
        self.logical.names().values().any(|known| known == name)
            || numbered().is_some_and(|id| self.logical.tensors().contains_key(&id))
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

    /// What is kept small: bytes, unless something else is said.
    #[must_use]
    pub fn cost(mut self, cost: Cost) -> Self {
        self.cost = cost;
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
        let mut router = Router::new(&placement.mesh).by(self.cost);
        let plan = Plan::new(self, placement, price * self.cost.of_byte(), &mut router)?;
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
            deferred: BTreeMap::new(),
            queues: QUEUES.iter().map(|name| (*name).to_string()).collect(),
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
