//! From a network to a graph.

use std::collections::{BTreeMap, HashMap};

use burn::backend::ir::{IrVisitorMut, OperationIr, TensorId, TensorIr};
use burn::backend::ops::{FloatTensorOps, IntTensorOps};
use burn::backend::{BackendTensor, Dispatch, DispatchTensor, DispatchTensorKind};
use burn::tensor::{CapturedGraph, Device, TensorData};
use kiln_core::{Error, Network, Port, PortKind, Result};

use crate::{Boundary, Graph};

/// Records what `network` computes for inputs of its ports' shapes.
///
/// Tensors are numbered in order of appearance (inputs, constants and results as operations use them),
/// so that capturing the same network twice gives equal graphs. Parameters are on the CPU afterwards.
///
/// # Errors
/// When the network returns another number of tensors than it declares, or an output that depends on
/// something that is neither an input nor a constant.
///
/// # Panics
/// When the network reads a tensor's elements while it computes: they do not exist during a capture.
pub fn capture(mut network: Box<dyn Network>) -> Result<Graph> {
    let device = Device::capture();
    let (input_ports, output_ports) = (network.inputs(), network.outputs());
    let mut returned = 0;
    let captured = device.capture_scope(|scope| {
        network.move_to(&device);
        let inputs: Vec<DispatchTensor> = input_ports.iter().map(|port| zeros(port, &device)).collect();
        let input_ids: Vec<TensorId> = inputs.iter().filter_map(recorded_id).collect();
        let outputs = network.forward(inputs);
        returned = outputs.len();
        let output_ids: Vec<TensorId> = outputs.iter().filter_map(recorded_id).collect();
        scope.complete(input_ids, output_ids)
    });

    let kind = network.kind();
    let captured = captured
        .map_err(|e| Error::work(format!("the {kind} network cannot be captured as a graph: {e}")))?;
    if returned != output_ports.len() || captured.graph.outputs.len() != output_ports.len() {
        return Err(Error::work(format!(
            "the {kind} network returned {returned} tensors of which {} were recorded; it declares {} outputs",
            captured.graph.outputs.len(),
            output_ports.len()
        )));
    }
    Ok(to_graph(kind, captured, input_ports, output_ports))
}

/// A tensor of a port's kind and shape from outside the graph.
fn zeros(port: &Port, device: &Device) -> DispatchTensor {
    let shape = port.shape.clone();
    match port.kind {
        PortKind::Float => {
            Dispatch::float_from_data(TensorData::zeros::<f32, _>(shape), device.as_dispatch())
        }
        PortKind::Int => Dispatch::int_from_data(TensorData::zeros::<i64, _>(shape), device.as_dispatch()),
    }
}

/// The number under which the capture device knows a tensor; `None` for a tensor of another device.
fn recorded_id(tensor: &DispatchTensor) -> Option<TensorId> {
    match &tensor.kind {
        DispatchTensorKind::Capture(
            BackendTensor::Float(tensor) | BackendTensor::Int(tensor) | BackendTensor::Bool(tensor),
        ) => Some(tensor.id()),
        _ => None,
    }
}

fn to_graph(kind: &str, captured: CapturedGraph, inputs: Vec<Port>, outputs: Vec<Port>) -> Graph {
    let mut numbering = Numbering::default();
    let boundary = |numbering: &mut Numbering, ports: Vec<Port>, ids: Vec<TensorId>| {
        let numbered = ports.into_iter().zip(ids);
        numbered.map(|(port, id)| Boundary { port, tensor: numbering.number(id) }).collect::<Vec<_>>()
    };
    let inputs = boundary(&mut numbering, inputs, captured.graph.inputs);
    // An initialisation only says that a tensor has a value, which stands among the constants.
    let mut operations: Vec<OperationIr> = captured.graph.operations;
    operations.retain(|operation| !matches!(operation, OperationIr::Init(_)));
    for operation in &mut operations {
        operation.visit_mut(&mut numbering);
    }
    let outputs = boundary(&mut numbering, outputs, captured.graph.outputs);
    let constants: BTreeMap<TensorId, TensorData> = captured
        .values
        .into_iter()
        .filter_map(|(id, data)| numbering.new_ids.get(&id).map(|&new| (new, data)))
        .filter(|(id, _)| inputs.iter().all(|input| input.tensor != *id))
        .collect();
    Graph { kind: kind.into(), inputs, outputs, operations, constants }
}

/// Gives tensors new numbers from 0 on; the recorded ones count over the life of the process.
#[derive(Default)]
struct Numbering {
    new_ids: HashMap<TensorId, TensorId>,
}

impl Numbering {
    fn number(&mut self, id: TensorId) -> TensorId {
        let next = TensorId::new(self.new_ids.len() as u64);
        *self.new_ids.entry(id).or_insert(next)
    }
}

impl IrVisitorMut for Numbering {
    fn visit_tensor_mut(&mut self, tensor: &mut TensorIr) {
        tensor.id = self.number(tensor.id);
    }
}
