//! The logical graph: a captured computation, which of its tensors are trained, and the gradients that training adds.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use burn::backend::ir::{OperationIr, TensorId, TensorIr, TensorStatus};
use burn::tensor::{DType, TensorData};
use kiln_compiler::{Boundary, Graph, GraphPass};
use kiln_core::{Error, PortKind, Result};

/// What one device would compute.
#[derive(Debug, Clone)]
pub struct Logical {
    /// Operations between inputs and outputs; gradients are outputs too.
    pub graph: Graph,
    /// The trained tensors.
    pub variables: Vec<Variable>,
}

/// A tensor that training changes.
#[derive(Debug, Clone)]
pub struct Variable {
    /// Its name: that of the graph's input, or `%7` for a constant.
    pub name: String,
    /// Its tensor in the graph.
    pub tensor: TensorId,
    /// Where its gradient is.
    pub gradient: TensorId,
    /// What it begins with.
    pub value: TensorData,
    /// What the optimiser keeps of it; nothing before the first step.
    pub kept: Vec<TensorData>,
}

impl Logical {
    /// A graph that is only run.
    ///
    /// # Errors
    /// When the graph is malformed.
    pub fn of(mut graph: Graph) -> Result<Self> {
        // Registers end the lives of tensors here.
        graph.operations.retain(|operation| !matches!(operation, OperationIr::Drop(_)));
        for pass in GraphPass::ALL {
            pass.apply(&mut graph)?;
        }
        Ok(Self { graph, variables: Vec::new() })
    }

    /// A graph whose output `loss` is to become small, by changing those of its inputs that `values` names.
    ///
    /// # Errors
    /// When the loss is not one number, or an operation on the way has no derivative.
    pub fn training(graph: &Graph, loss: &str, values: &BTreeMap<String, TensorData>) -> Result<Self> {
        let output = graph.outputs.iter().find(|output| output.port.name == loss);
        if let Some(output) = output
            && output.port.shape.iter().product::<usize>() != 1
        {
            let found = format!("the output \"{loss}\" has shape {:?}", output.port.shape);
            return Err(Error::usage(format!("{found}; what is trained must be one number")));
        }
        let names: Vec<&str> = values.keys().map(String::as_str).collect();
        let mut with = graph.gradient(loss, &names)?;
        let mut variables = Vec::with_capacity(names.len());
        for (name, value) in values {
            let input = with.inputs.iter().position(|input| input.port.name == *name);
            let gradient = with.outputs.iter().position(|output| output.port.name == format!("d_{name}"));
            let (Some(input), Some(gradient)) = (input, gradient) else {
                return Err(Error::usage(format!("the graph has no input \"{name}\" to train")));
            };
            if with.inputs[input].port.shape != value.shape().to_vec() {
                let found = format!("has shape {:?}", value.shape().to_vec());
                return Err(Error::input(
                    name,
                    format!("{found}, the graph takes {:?}", with.inputs[input].port.shape),
                ));
            }
            let tensor = with.inputs.remove(input).tensor;
            let gradient = with.outputs.remove(gradient).tensor;
            variables.push(Variable {
                name: name.clone(),
                tensor,
                gradient,
                value: value.clone(),
                kept: Vec::new(),
            });
        }
        Ok(Self { graph: with, variables })
    }

    /// Shape and type of every tensor.
    pub fn tensors(&self) -> HashMap<TensorId, TensorIr> {
        let operations = self.graph.operations.iter();
        let mut tensors: HashMap<TensorId, TensorIr> = HashMap::new();
        for operation in operations {
            for tensor in operation.inputs().chain(operation.outputs()) {
                tensors.insert(tensor.id, TensorIr { status: TensorStatus::ReadOnly, ..tensor.clone() });
            }
        }
        for (&id, data) in &self.graph.constants {
            tensors.entry(id).or_insert_with(|| described(id, data.shape(), data.dtype()));
        }
        for variable in &self.variables {
            let (shape, dtype) = (variable.value.shape(), variable.value.dtype());
            tensors.entry(variable.tensor).or_insert_with(|| described(variable.tensor, shape, dtype));
        }
        for Boundary { port, tensor } in self.graph.inputs.iter().chain(&self.graph.outputs) {
            let dtype = match port.kind {
                PortKind::Float => DType::F32,
                PortKind::Int => DType::I64,
            };
            tensors.entry(*tensor).or_insert_with(|| described(*tensor, &port.shape, dtype));
        }
        tensors
    }

    /// What tensors are called: inputs, outputs and variables by their names, others by their numbers.
    pub fn names(&self) -> BTreeMap<TensorId, String> {
        let mut names: BTreeMap<TensorId, String> = BTreeMap::new();
        for operation in &self.graph.operations {
            operation
                .outputs()
                .for_each(|tensor| drop(names.insert(tensor.id, format!("%{}", tensor.id.value()))));
        }
        self.graph.constants.keys().for_each(|id| drop(names.insert(*id, format!("%{}", id.value()))));
        for Boundary { port, tensor } in self.graph.outputs.iter().chain(&self.graph.inputs) {
            names.insert(*tensor, port.name.clone());
        }
        for variable in &self.variables {
            names.insert(variable.gradient, format!("d_{}", variable.name));
            names.insert(variable.tensor, variable.name.clone());
        }
        names
    }

    /// A number that no tensor has.
    pub fn next_id(&self) -> u64 {
        self.tensors().keys().map(|id| id.value() + 1).max().unwrap_or(0)
    }
}

fn described(id: TensorId, shape: &[usize], dtype: DType) -> TensorIr {
    TensorIr { id, shape: shape.to_vec().into(), dtype, status: TensorStatus::ReadOnly }
}

/// Multiplications and additions of an operation, about.
pub fn work(operation: &OperationIr) -> f64 {
    use burn::backend::ir::{FloatOperationIr as Float, ModuleOperationIr as Module};
    let count = |tensor: &TensorIr| tensor.shape.num_elements() as f64;
    let out: f64 = operation.outputs().map(count).sum();
    let product = |inner: usize| 2.0 * out * inner as f64;
    match operation {
        OperationIr::Float(_, Float::Matmul(op)) => product(op.lhs.shape[op.lhs.shape.rank() - 1]),
        OperationIr::Module(module) => match module {
            Module::Linear(op) => product(op.weight.shape[0]),
            Module::LinearXBackward(op) => product(op.weight.shape[1]),
            Module::LinearWeightBackward(op) => 2.0 * count(&op.x) * op.out.shape[1] as f64,
            Module::Conv1d(op) => product(op.weight.shape[1..].iter().product()),
            Module::Conv2d(op) => product(op.weight.shape[1..].iter().product()),
            Module::Conv1dXBackward(op) => {
                2.0 * count(&op.output_grad) * (count(&op.weight) / op.weight.shape[0] as f64)
            }
            Module::Conv2dXBackward(op) => {
                2.0 * count(&op.output_grad) * (count(&op.weight) / op.weight.shape[0] as f64)
            }
            Module::Conv1dWeightBackward(op) => {
                2.0 * count(&op.output_grad) * (count(&op.weight) / op.weight.shape[0] as f64)
            }
            Module::Conv2dWeightBackward(op) => {
                2.0 * count(&op.output_grad) * (count(&op.weight) / op.weight.shape[0] as f64)
            }
            Module::Attention(op) => 4.0 * count(&op.query) * op.key.shape[2] as f64,
            _ => out,
        },
        _ => out,
    }
}

/// Whether an operation is a product, which must really be divided.
pub fn is_product(kind: &str) -> bool {
    const PRODUCTS: [&str; 7] =
        ["Matmul", "Linear", "LinearXBackward", "LinearWeightBackward", "Conv", "ConvTranspose", "Attention"];
    PRODUCTS.contains(&kind) || (kind.starts_with("Conv") && !kind.ends_with("BiasBackward"))
}

/// The tensors that some operation or output reads.
pub fn read_tensors(graph: &Graph) -> BTreeSet<TensorId> {
    let operations = graph.operations.iter().flat_map(|operation| operation.inputs().map(|tensor| tensor.id));
    operations.chain(graph.outputs.iter().map(|output| output.tensor)).collect()
}
