//! Running a graph operation by operation with Burn on the CPU: the reference for everything that is faster.

use std::cell::Cell;
use std::collections::BTreeSet;

use burn::backend::ir::{HandleKind, TensorId, TensorIr, TensorStatus};
use burn::tensor::{DType, TensorData};
use burn_flex::{Flex, FlexDevice};
use burn_router::TensorInterpreter;
use kiln_core::{Error, PortKind, Result};

use crate::graph::name_and_attributes;
use crate::{Boundary, Graph, quiet};

impl Graph {
    /// Computes the outputs from inputs, both in the order of the graph's. Integers of any width fit a port of integers.
    ///
    /// # Errors
    /// When an input does not fit its port, or an operation cannot be run on its operands.
    pub fn run(&self, inputs: &[TensorData]) -> Result<Vec<TensorData>> {
        self.check_inputs(inputs)?;
        let fitting = |(input, data): (&Boundary, &TensorData)| {
            (input.tensor, data.clone().convert_dtype(dtype(input.port.kind)))
        };
        let provided = self.inputs.iter().zip(inputs).map(fitting);
        self.interpret(provided, self.outputs.iter().map(|output| output.tensor))
    }

    /// The values of some tensors, from those of others.
    ///
    /// # Errors
    /// When an operation cannot be run on its operands: a graph from a file may claim shapes that these do not have, and an
    /// index may be out of range, and Burn panics then.
    pub(crate) fn interpret(
        &self,
        provided: impl Iterator<Item = (TensorId, TensorData)>,
        wanted: impl Iterator<Item = TensorId>,
    ) -> Result<Vec<TensorData>> {
        let at = Cell::new(0);
        quiet::catch_panic(|| self.interpret_from(&at, provided, wanted)).map_err(|found| {
            let operation =
                self.operations.get(at.get()).and_then(|operation| name_and_attributes(operation).ok());
            let name = operation.map_or("the end".into(), |(name, _)| name);
            let place = format!("operation {} ({name}) of the {} graph", at.get(), self.kind);
            Error::work(format!("{place} does not fit its operands: {found}"))
                .hint("are indices within range? If they are, the graph is damaged: write it again")
        })
    }

    /// The same in panic; `at` counts the operations that are done.
    fn interpret_from(
        &self,
        at: &Cell<usize>,
        provided: impl Iterator<Item = (TensorId, TensorData)>,
        wanted: impl Iterator<Item = TensorId>,
    ) -> Vec<TensorData> {
        let mut interpreter = TensorInterpreter::<Flex>::new(FlexDevice);
        let read: BTreeSet<TensorId> =
            self.operations.iter().flat_map(|operation| operation.inputs().map(|tensor| tensor.id)).collect();
        let wanted: Vec<TensorId> = wanted.collect();
        for (id, data) in self.constants.iter().filter(|(id, _)| read.contains(id) || wanted.contains(id)) {
            interpreter.register_tensor_data_id(*id, data.clone());
        }
        provided.for_each(|(id, data)| interpreter.register_tensor_data_id(id, data));
        for operation in &self.operations {
            interpreter.register_op(operation.clone());
            at.set(at.get() + 1);
        }
        wanted.into_iter().map(|id| read_tensor(&mut interpreter, &self.tensor(id))).collect()
    }

    /// Shape and type of a tensor that is an input, a constant or a result.
    pub(crate) fn tensor(&self, id: TensorId) -> TensorIr {
        let result =
            self.operations.iter().flat_map(|operation| operation.outputs()).find(|tensor| tensor.id == id);
        let (shape, dtype) = match (result, self.constants.get(&id)) {
            (Some(result), _) => (result.shape.clone(), result.dtype),
            (None, Some(data)) => (data.shape().clone(), data.dtype()),
            (None, None) => {
                let input = self.inputs.iter().find(|input| input.tensor == id);
                let input = input.expect("a loaded graph provides every tensor that it names");
                (input.port.shape.clone().into(), dtype(input.port.kind))
            }
        };
        TensorIr { id, shape, dtype, status: TensorStatus::ReadOnly }
    }

    pub(crate) fn check_inputs(&self, inputs: &[TensorData]) -> Result<()> {
        if inputs.len() != self.inputs.len() {
            let names: Vec<&str> = self.inputs.iter().map(|input| input.port.name.as_str()).collect();
            let found = format!("{} inputs for a graph of {}", inputs.len(), self.inputs.len());
            return Err(Error::usage(found).hint(format!("it takes: {}", names.join(", "))));
        }
        for (Boundary { port, .. }, data) in self.inputs.iter().zip(inputs) {
            let fits = match port.kind {
                PortKind::Float => data.dtype() == DType::F32,
                PortKind::Int => data.dtype().is_int(),
            };
            if data.shape().to_vec() != port.shape || !fits {
                let found = format!("is {:?}{:?}", data.dtype(), data.shape().to_vec());
                let expected = format!("must be {:?}{:?}", dtype(port.kind), port.shape);
                return Err(Error::input(format!("input \"{}\"", port.name), format!("{found}, {expected}")));
            }
        }
        Ok(())
    }
}

/// The element type of a port.
fn dtype(kind: PortKind) -> DType {
    match kind {
        PortKind::Float => DType::F32,
        PortKind::Int => DType::I64,
    }
}

fn read_tensor(interpreter: &mut TensorInterpreter<Flex>, tensor: &TensorIr) -> TensorData {
    match interpreter.get_tensor(tensor) {
        HandleKind::Float(values) | HandleKind::Int(values) | HandleKind::Bool(values) => values.into_data(),
        HandleKind::Quantized(_) => unreachable!("no captured graph is quantised"),
    }
}
