//! Reverse mode: from a graph that computes a loss to one that computes its gradient.
//!
//! The operations are walked backwards. Each hands the gradient of its result on to its operands by the rule of
//! [`rules`], as operations of the same representation, so that the gradient is a [`Graph`] like any other: it can be
//! run, rewritten, drawn, saved, and differentiated again.

mod rules;

use std::collections::{BTreeMap, BTreeSet, HashMap};

use burn::backend::ir::{OperationIr, TensorId, TensorIr};

use kiln_core::{Error, Port, PortKind, Result};

use crate::builder::{Builder, Fit};
use crate::graph::name_and_attributes;
use crate::{Boundary, Graph, GraphPass, quiet};

impl Graph {
    /// A graph of the same inputs whose outputs are the output `of` and its gradients with respect to `wrt`: names of
    /// inputs of floats, or `%7` for tensor 7, such as a parameter. The gradient for `x` is called `d_x`.
    ///
    /// An output of more than one element needs one more input, called `d_` and its name: the gradient with respect to
    /// this output of whatever is computed from it. The gradients are then those of `sum(output · d_output)`.
    ///
    /// # Errors
    /// When a name is not there or stands for whole numbers, or operations on the way have no derivative here (all are
    /// named).
    pub fn gradient(&self, of: &str, wrt: &[&str]) -> Result<Self> {
        self.verify()?;
        let output = self.outputs.iter().find(|output| output.port.name == of).ok_or_else(|| {
            let names: Vec<&str> = self.outputs.iter().map(|output| output.port.name.as_str()).collect();
            Error::usage(format!("the graph has no output \"{of}\""))
                .hint(format!("it has: {}", names.join(", ")))
        })?;
        let of_tensor = self.tensor(output.tensor);
        let variables: Vec<TensorIr> = wrt.iter().map(|name| self.variable(name)).collect::<Result<_>>()?;
        if let Some((name, _)) = wrt.iter().zip(&variables).find(|(_, tensor)| !tensor.dtype.is_float()) {
            return Err(Error::usage(format!("\"{name}\" holds whole numbers, which have no gradient")));
        }
        if !of_tensor.dtype.is_float() {
            return Err(Error::usage(format!("output \"{of}\" holds whole numbers, which have no gradient")));
        }

        let mut builder = Builder::new(self.next_id());
        builder.constants.clone_from(&self.constants);
        builder.operations = self.forward_operations();
        let mut inputs = self.inputs.clone();
        let shape = of_tensor.shape.to_vec();
        let seed = if of_tensor.shape.num_elements() == 1 {
            builder.full(1.0, &shape, of_tensor.dtype).map_err(Error::work)?
        } else {
            let tensor = builder.provided(&shape, of_tensor.dtype);
            let port = Port { name: format!("d_{of}"), kind: PortKind::Float, shape };
            inputs.push(Boundary { port, tensor: tensor.id });
            tensor
        };

        let depends = self.dependents(&variables);
        let gradients = propagate(self, &mut builder, &depends, of_tensor.id, seed)?;
        let mut outputs = vec![output.clone()];
        for (name, variable) in wrt.iter().zip(&variables) {
            let gradient = match gradients.get(&variable.id) {
                Some(gradient) => gradient.clone(),
                None => builder.full(0.0, &variable.shape.to_vec(), variable.dtype).map_err(Error::work)?,
            };
            let port =
                Port { name: format!("d_{name}"), kind: PortKind::Float, shape: variable.shape.to_vec() };
            outputs.push(Boundary { port, tensor: gradient.id });
        }
        let Builder { operations, constants, .. } = builder;
        let mut graph = Self { kind: self.kind.clone(), inputs, outputs, operations, constants };
        GraphPass::Dce.apply(&mut graph)?;
        Ok(graph)
    }

    /// The tensor of an input's name or of a number.
    fn variable(&self, name: &str) -> Result<TensorIr> {
        let input = self.inputs.iter().find(|input| input.port.name == name).map(|input| input.tensor);
        let numbered = || name.strip_prefix('%')?.parse().ok().map(TensorId::new);
        let id = input.or_else(numbered).filter(|id| self.provides(*id));
        id.map(|id| self.tensor(id)).ok_or_else(|| {
            let names: Vec<&str> = self.inputs.iter().map(|input| input.port.name.as_str()).collect();
            Error::usage(format!("the graph has no input \"{name}\"")).hint(format!(
                "it has: {}; %7 stands for tensor 7, and `kiln graph show` prints the numbers",
                names.join(", ")
            ))
        })
    }

    fn provides(&self, id: TensorId) -> bool {
        self.constants.contains_key(&id)
            || self.inputs.iter().any(|input| input.tensor == id)
            || self.operations.iter().flat_map(|operation| operation.outputs()).any(|tensor| tensor.id == id)
    }

    /// A number that no tensor has yet.
    fn next_id(&self) -> u64 {
        let results =
            self.operations.iter().flat_map(|operation| operation.outputs()).map(|tensor| tensor.id);
        let inputs = self.inputs.iter().map(|input| input.tensor);
        results
            .chain(inputs)
            .chain(self.constants.keys().copied())
            .map(|id| id.value() + 1)
            .max()
            .unwrap_or(0)
    }

    /// The operations without those that end a tensor's life: the gradient needs them longer.
    fn forward_operations(&self) -> Vec<OperationIr> {
        self.operations
            .iter()
            .filter(|operation| !matches!(operation, OperationIr::Drop(_)))
            .cloned()
            .collect()
    }

    /// What changes when one of the variables does.
    fn dependents(&self, variables: &[TensorIr]) -> BTreeSet<TensorId> {
        let mut depends: BTreeSet<TensorId> = variables.iter().map(|variable| variable.id).collect();
        for operation in &self.operations {
            if operation.inputs().any(|tensor| depends.contains(&tensor.id)) {
                depends.extend(
                    operation.outputs().filter(|tensor| tensor.dtype.is_float()).map(|tensor| tensor.id),
                );
            }
        }
        depends
    }
}

/// The gradients of all tensors that `of` depends on and that depend on a variable.
fn propagate(
    graph: &Graph,
    builder: &mut Builder,
    depends: &BTreeSet<TensorId>,
    of: TensorId,
    seed: TensorIr,
) -> Result<HashMap<TensorId, TensorIr>> {
    let mut gradients = HashMap::from([(of, seed)]);
    let mut without = BTreeMap::<String, Vec<usize>>::new();
    for (at, operation) in graph.operations.iter().enumerate().rev() {
        let result = operation.outputs().find(|tensor| depends.contains(&tensor.id));
        let Some(gradient) = result.and_then(|result| gradients.get(&result.id)).cloned() else { continue };
        let name = name_and_attributes(operation)?.0;
        let fits =
            |e: String| Error::work(format!("operation {at} ({name}) of the {} graph: {e}", graph.kind));
        // A damaged graph may have operands that no operation takes.
        let parts = quiet::catch_panic(|| rules::gradients(builder, operation, &gradient)).map_err(&fits)?;
        match parts {
            None => without.entry(name).or_default().push(at),
            Some(parts) => {
                for (operand, part) in parts.map_err(&fits)? {
                    if depends.contains(&operand) {
                        accumulate(builder, &mut gradients, operand, part).map_err(&fits)?;
                    }
                }
            }
        }
    }
    if without.is_empty() {
        return Ok(gradients);
    }
    let told = without.into_iter().map(|(name, places)| format!("{name} (operations {places:?})"));
    let told = told.collect::<Vec<_>>().join("; ");
    Err(Error::work(format!("the {} graph has operations without a derivative: {told}", graph.kind)))
}

fn accumulate(
    builder: &mut Builder,
    gradients: &mut HashMap<TensorId, TensorIr>,
    operand: TensorId,
    part: TensorIr,
) -> Fit<()> {
    let sum = match gradients.get(&operand) {
        Some(before) => builder.add(before, &part)?,
        None => part,
    };
    gradients.insert(operand, sum);
    Ok(())
}

#[cfg(test)]
mod tests;
