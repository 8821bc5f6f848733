//! Passes over graphs: the same outputs from fewer operations.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use burn::backend::ir::{IrVisitorMut, OperationIr, TensorId, TensorIr, TensorStatus};
use kiln_core::{Error, Result};
use serde::{Deserialize, Serialize};

use crate::Graph;

/// Most bytes of constants that folding may add.
const MOST_FOLDED: usize = 64 << 20;

/// A pass over a graph.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GraphPass {
    /// Computes what depends on constants alone, up to 64 MiB of them.
    FoldConstants,
    /// Computes equal operations on equal operands once.
    Cse,
    /// Drops operations and constants that no output depends on.
    Dce,
}

impl GraphPass {
    /// All of them, in the order in which they are applied where none are named.
    pub const ALL: [Self; 3] = [Self::FoldConstants, Self::Cse, Self::Dce];

    /// The pass of a name.
    ///
    /// # Errors
    /// When there is none; lists those that there are.
    pub fn parse(name: &str) -> Result<Self> {
        serde_json::from_value(name.into()).map_err(|_| {
            let known: Vec<String> = Self::ALL.iter().map(|pass| pass.name()).collect();
            Error::usage(format!("there is no pass \"{name}\""))
                .hint(format!("there are: {}", known.join(", ")))
        })
    }

    /// Its name.
    pub fn name(self) -> String {
        serde_json::to_value(self).ok().and_then(|name| name.as_str().map(str::to_string)).unwrap_or_default()
    }

    /// Applies the pass, and verifies what comes out.
    ///
    /// # Errors
    /// When the graph reads something that nothing provides, before or after, or an operation does not fit its constants.
    pub fn apply(self, graph: &mut Graph) -> Result<()> {
        graph.verify()?;
        match self {
            Self::FoldConstants => fold_constants(graph)?,
            Self::Cse => share_equals(graph),
            Self::Dce => drop_unused(graph),
        }
        mark_last_uses(graph);
        graph.verify()
    }
}

impl Graph {
    /// Makes sure that every tensor is provided once, before it is read.
    ///
    /// # Errors
    /// Names the first tensor for which that does not hold.
    pub fn verify(&self) -> Result<()> {
        self.sound().map_err(|found| Error::work(format!("in the {} graph, {found}", self.kind)))
    }

    /// The same, without saying of which graph.
    pub(crate) fn sound(&self) -> Result<(), String> {
        let wrong = |id: TensorId, found: &str| Err(format!("tensor %{} {found}", id.value()));
        let mut provided: BTreeSet<TensorId> = self.constants.keys().copied().collect();
        for input in &self.inputs {
            if !provided.insert(input.tensor) {
                return wrong(input.tensor, "is an input and something else");
            }
        }
        for operation in &self.operations {
            if let Some(tensor) = operation.inputs().find(|tensor| !provided.contains(&tensor.id)) {
                return wrong(tensor.id, "is read before it is there");
            }
            for tensor in operation.outputs() {
                if !provided.insert(tensor.id) {
                    return wrong(tensor.id, "is computed twice");
                }
            }
        }
        match self.outputs.iter().find(|output| !provided.contains(&output.tensor)) {
            Some(output) => wrong(output.tensor, "is an output that nothing computes"),
            None => Ok(()),
        }
    }
}

/// What makes numbers of its own, or only ends the life of a tensor.
fn has_effect(operation: &OperationIr) -> bool {
    use burn::backend::ir::FloatOperationIr::Random;
    use burn::backend::ir::NumericOperationIr::IntRandom;
    matches!(
        operation,
        OperationIr::Float(_, Random(_)) | OperationIr::NumericInt(_, IntRandom(_)) | OperationIr::Drop(_)
    )
}

fn fold_constants(graph: &mut Graph) -> Result<()> {
    let mut known: BTreeSet<TensorId> = graph.constants.keys().copied().collect();
    let (mut folded, mut kept) = (Vec::new(), Vec::new());
    let mut bytes = 0;
    for operation in std::mem::take(&mut graph.operations) {
        let added: usize = operation.outputs().map(size_in_bytes).sum();
        let foldable = !has_effect(&operation)
            && bytes + added <= MOST_FOLDED
            && operation.inputs().all(|tensor| known.contains(&tensor.id));
        if foldable {
            bytes += added;
            known.extend(operation.outputs().map(|tensor| tensor.id));
            folded.push(operation);
        } else {
            kept.push(operation);
        }
    }
    graph.operations = kept;
    if folded.is_empty() {
        return Ok(());
    }
    let needed: BTreeSet<TensorId> = graph
        .operations
        .iter()
        .flat_map(|operation| operation.inputs().map(|tensor| tensor.id))
        .chain(graph.outputs.iter().map(|output| output.tensor))
        .collect();
    let results: Vec<TensorId> = folded
        .iter()
        .flat_map(|operation| operation.outputs().map(|tensor| tensor.id))
        .filter(|id| needed.contains(id))
        .collect();
    let constants = std::mem::take(&mut graph.constants);
    let mut prologue = Graph {
        kind: graph.kind.clone(),
        operations: folded,
        inputs: Vec::new(),
        outputs: Vec::new(),
        constants,
    };
    set_read_only(&mut prologue.operations);
    let values = prologue.interpret(std::iter::empty(), results.iter().copied());
    graph.constants = prologue.constants;
    graph.constants.extend(results.into_iter().zip(values?));
    Ok(())
}

fn size_in_bytes(tensor: &TensorIr) -> usize {
    tensor.shape.num_elements() * tensor.dtype.size()
}

fn share_equals(graph: &mut Graph) {
    let mut replaced = Rename::default();
    let mut first_of: HashMap<String, Vec<TensorId>> = HashMap::new();
    // Equal constants first; they begin alike.
    const BEGINNING: usize = 64;
    let mut first_constant: HashMap<(&[u8], usize), Vec<TensorId>> = HashMap::new();
    for (id, data) in &graph.constants {
        let bytes = data.as_bytes();
        let alike = first_constant.entry((&bytes[..bytes.len().min(BEGINNING)], bytes.len())).or_default();
        match alike.iter().find(|first| graph.constants[first] == *data) {
            Some(first) => {
                replaced.0.insert(*id, *first);
            }
            None => alike.push(*id),
        }
    }
    let mut kept = Vec::with_capacity(graph.operations.len());
    for mut operation in std::mem::take(&mut graph.operations) {
        operation.visit_mut(&mut replaced);
        let outputs: Vec<TensorId> = operation.outputs().map(|tensor| tensor.id).collect();
        let key = (!has_effect(&operation)).then(|| {
            let mut anonymous = operation.clone();
            anonymous.visit_mut(&mut Anonymous { outputs: &outputs });
            format!("{anonymous:?}")
        });
        match key.as_ref().and_then(|key| first_of.get(key)) {
            Some(first) => replaced.0.extend(outputs.into_iter().zip(first.iter().copied())),
            None => {
                if let Some(key) = key {
                    first_of.insert(key, outputs);
                }
                kept.push(operation);
            }
        }
    }
    graph.operations = kept;
    for output in &mut graph.outputs {
        output.tensor = replaced.of(output.tensor);
    }
}

fn drop_unused(graph: &mut Graph) {
    let mut used: BTreeSet<TensorId> = graph.outputs.iter().map(|output| output.tensor).collect();
    let mut kept = Vec::with_capacity(graph.operations.len());
    for operation in std::mem::take(&mut graph.operations).into_iter().rev() {
        // What ends a tensor's life is needless: the last use does.
        if !matches!(operation, OperationIr::Drop(_))
            && operation.outputs().any(|tensor| used.contains(&tensor.id))
        {
            used.extend(operation.inputs().map(|tensor| tensor.id));
            kept.push(operation);
        }
    }
    kept.reverse();
    graph.operations = kept;
    graph.constants.retain(|id, _| used.contains(id));
}

/// Puts tensors in the place of others.
#[derive(Default)]
struct Rename(BTreeMap<TensorId, TensorId>);

impl Rename {
    fn of(&self, id: TensorId) -> TensorId {
        self.0.get(&id).copied().unwrap_or(id)
    }
}

impl IrVisitorMut for Rename {
    fn visit_tensor_mut(&mut self, tensor: &mut TensorIr) {
        tensor.id = self.of(tensor.id);
    }
}

/// Takes away what differs between two equal operations: the numbers of their outputs, and which uses are last.
struct Anonymous<'a> {
    outputs: &'a [TensorId],
}

impl IrVisitorMut for Anonymous<'_> {
    fn visit_tensor_mut(&mut self, tensor: &mut TensorIr) {
        tensor.status = TensorStatus::ReadOnly;
        if let Some(place) = self.outputs.iter().position(|id| *id == tensor.id) {
            tensor.id = TensorId::new(u64::MAX - place as u64);
        }
    }
}

/// Says of every operand whether it is used again.
fn mark_last_uses(graph: &mut Graph) {
    let mut used: BTreeSet<TensorId> = graph.outputs.iter().map(|output| output.tensor).collect();
    for operation in graph.operations.iter_mut().rev() {
        let operands: Vec<TensorId> = operation.inputs().map(|tensor| tensor.id).collect();
        // What stands twice among the operands is needed again after the first time.
        used.extend(
            operands.iter().enumerate().filter(|(at, id)| operands[..*at].contains(id)).map(|(_, id)| *id),
        );
        let operands: BTreeSet<TensorId> = operands.into_iter().collect();
        operation.visit_mut(&mut LastUses { operands: &operands, used: &used });
        used.extend(operands);
    }
}

/// An operand that is not in `used` is used for the last time.
struct LastUses<'a> {
    operands: &'a BTreeSet<TensorId>,
    used: &'a BTreeSet<TensorId>,
}

impl IrVisitorMut for LastUses<'_> {
    fn visit_tensor_mut(&mut self, tensor: &mut TensorIr) {
        if self.operands.contains(&tensor.id) {
            let last = !self.used.contains(&tensor.id);
            tensor.status = if last { TensorStatus::ReadWrite } else { TensorStatus::ReadOnly };
        }
    }
}

/// Lets every operand live on.
fn set_read_only(operations: &mut [OperationIr]) {
    for operation in operations {
        let operands: BTreeSet<TensorId> = operation.inputs().map(|tensor| tensor.id).collect();
        operation.visit_mut(&mut LastUses { operands: &operands, used: &operands });
    }
}
